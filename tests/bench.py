"""
How fast is this, against what people would pick instead, and against the machine? Not a test: pytest does not collect it.

    python tests/bench.py MODEL PAIRS [--parts srl encode memory] [--batch_size 64] [--max_length 64]

MODEL: a BERT folder; PAIRS: what finetune_srl.py --train_pairs takes, with one negative a row. Every figure is measured
in this run: the contestants take their steps in turn, on the same rows, weights, dropout 0.1 and bfloat16 autocast;
medians. A step is forward, loss, backward, clipping, fused AdamW; tokenising and padding are done before the clock
starts. Encoding includes tokenising. Useful arithmetic: 6 x parameters of the blocks x real tokens, 2 x in encoding.
Without sentence-transformers its rows are left out. Matryoshka2dLoss runs as it comes: the last layer and one other a
step, one of the dims at each.
"""
import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import evaluate
from finetune_srl import cached_backward, srl_loss
from model import from_pretrained, keep_freed_memory, pack, paper_sizes

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def update(parameters, optimizer):
    """ the end of everybody's step """
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

# ----------------------------------------------------------------------------------------------------------------------
# contestants: args -> prepare, step; prepare(B rows of three strings) -> what step takes


def packed(args, sizes=None, micro_batch=0):
    """ this project """
    keep_freed_memory()
    tokenizer = data.load_tokenizer(args.model)
    model = from_pretrained(args.model, **DROPOUT).train()
    sizes = sizes or paper_sizes(model.config)
    optimizer = model.configure_optimizers(1e-6, 0.0)

    def prepare(rows):
        return [ids for texts in zip(*rows) for ids in data.tokenize(list(texts), tokenizer, args.max_length)]

    def embed(texts):
        with torch.autocast("cpu", torch.bfloat16):
            return model.encode(pack(texts, multiple=128), [layer for layer, _ in sizes])

    def step(texts):
        Q = len(texts) // 3
        loss_of = lambda taps: srl_loss({n: t[:Q] for n, t in taps.items()}, {n: t[Q:] for n, t in taps.items()},
                                        sizes, "cosine", 0.05, 1.0)
        if micro_batch:
            cached_backward(embed, texts, -(-Q // micro_batch), loss_of, lambda loss: loss)
        else:
            loss_of(embed(texts))[0].backward()
        update(model.parameters(), optimizer)
    return prepare, step


def packed_full_size(args):
    """ this project, the full size alone """
    config = from_pretrained(args.model).config
    return packed(args, paper_sizes(config)[-1:])


def packed_micro_batch(args):
    """ this project, 16 times the batch, --micro_batch of the batch """
    return packed(args, micro_batch=args.batch_size)


def padded(args):
    """ transformers' BertModel, one padded batch, our loss """
    from transformers import BertModel
    tokenizer = data.load_tokenizer(args.model)
    model = BertModel.from_pretrained(args.model, add_pooling_layer=False, **DROPOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    sizes = paper_sizes(model.config)

    def prepare(rows):
        texts = [text for column in zip(*rows) for text in column]
        return tokenizer(texts, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")

    def step(batch):
        Q = len(batch["input_ids"]) // 3
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"][:, :, None]
        taps = {layer: (hidden[layer] * mask).sum(1) / mask.sum(1) for layer, _ in sizes}   # (Q + P, C)
        srl_loss({n: t[:Q] for n, t in taps.items()}, {n: t[Q:] for n, t in taps.items()}, sizes, "cosine", 0.05,
                 1.0)[0].backward()
        update(model.parameters(), optimizer)
    return prepare, step


def sentence_transformers(args, two_d=False):
    """ its MultipleNegativesRankingLoss; every column padded to its longest text, as its collator does """
    from sentence_transformers import SentenceTransformer, losses
    model = SentenceTransformer(args.model, device="cpu", config_kwargs=DROPOUT).train()
    model.max_seq_length = args.max_length
    loss_of = losses.MultipleNegativesRankingLoss(model)
    if two_d:
        config = model[0].auto_model.config
        loss_of = losses.Matryoshka2dLoss(model, loss_of, sorted({dim for _, dim in paper_sizes(config)}, reverse=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def prepare(rows):
        return [model.tokenize(list(texts)) for texts in zip(*rows)]

    def step(columns):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of([dict(column) for column in columns], None)   # it writes into what it is given
        loss.backward()
        update(model.parameters(), optimizer)
    return prepare, step


def sentence_transformers_2d(args):
    """ its Matryoshka2dLoss, with the dims of our sizes """
    return sentence_transformers(args, two_d=True)


# The SMAE step comes here when there is one: smae(args) -> prepare, step; its row goes to CONTESTANTS.

CONTESTANTS = {"here": packed, "here, full size alone": packed_full_size,
               "sentence-transformers Matryoshka2dLoss": sentence_transformers_2d,
               "sentence-transformers MultipleNegativesRankingLoss": sentence_transformers,
               "transformers, padded": padded}
MEMORY = CONTESTANTS | {"here, 16 x the batch, --micro_batch": packed_micro_batch}

# ----------------------------------------------------------------------------------------------------------------------
# parts


def measure_peak(config, tokens, dtype):
    """ FLOP/s of the matrix product: the median of ten, the better of the block's widest and a square one """
    best = 0.0
    for M, K, N in ((tokens, config.hidden_size, config.intermediate_size), (2048, 2048, 2048)):
        a, b, times = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), []
        for _ in range(13):
            start = time.perf_counter()
            a @ b.T
            times.append(time.perf_counter() - start)
        best = max(best, 2 * M * K * N / statistics.median(times[3:]))
    return best


def in_turn(functions, inputs, warm_up):
    """ {name: function}, one {name: input} a round -> {name: median seconds} """
    seconds = {name: [] for name in functions}
    for number, given in enumerate(inputs):
        for name, function in functions.items():
            start = time.perf_counter()
            function(given[name])
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def table(title, seconds, tokens, flops, peaks, first="here"):
    """ one row a contestant, all against the first """
    print(f"\n{title}\n{'':52} {'ms':>7} {'x ours':>7} {'tokens/s':>9}  share of the bfloat16 / float32 peak")
    for name, s in seconds.items():
        shares = " / ".join(f"{flops / s / peak:.0%}" for peak in peaks.values())
        print(f"{name:52} {1000 * s:7.0f} {s / seconds[first]:7.2f} {tokens / s:9.0f}  {shares}")


def have_sentence_transformers():
    try:
        import sentence_transformers
        return bool(sentence_transformers)
    except ImportError:
        print("rows of sentence-transformers left out: it is not installed")
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--parts", nargs="+", choices=["srl", "encode", "memory"], default=["srl", "encode", "memory"])
    parser.add_argument("--batch_size", type=int, default=64, help="rows a step")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each contestant, two of them to warm up")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)   # a subprocess: the peak of one contestant
    args = parser.parse_args()
    rows = [(query, positives[0], negatives[0]) for query, positives, negatives
            in itertools.islice(iter(data.load_pairs(args.pairs)), 16 * args.batch_size) if negatives]

    if args.memory_of:
        large = 16 if args.memory_of == "here, 16 x the batch, --micro_batch" else 1
        prepare, step = MEMORY[args.memory_of](args)
        for number in range(6 if large == 1 else 1):
            step(prepare(rows[number * args.batch_size:(number + large) * args.batch_size]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return

    names = [n for n in MEMORY if have_sentence_transformers() or not n.startswith("sentence")]
    model, tokenizer = from_pretrained(args.model), data.load_tokenizer(args.model)
    parameters = sum(p.numel() for p in model.blocks.parameters())
    peaks = {dtype: measure_peak(model.config, 3072, dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; peak of the matrix products: " +
          ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s".removeprefix("torch.") for dtype, peak in peaks.items()))

    if "srl" in args.parts:
        built = {name: CONTESTANTS[name](args) for name in names if name in CONTESTANTS}
        batches = [rows[i * args.batch_size:(i + 1) * args.batch_size] for i in range(args.rounds)]
        tokens = statistics.mean(sum(map(len, data.tokenize([t for row in batch for t in row], tokenizer,
                                                            args.max_length))) for batch in batches)
        inputs = [{name: prepare(batch) for name, (prepare, _) in built.items()} for batch in batches]
        seconds = in_turn({name: step for name, (_, step) in built.items()}, inputs, warm_up=2)
        table(f"SRL step, {args.batch_size} rows, {tokens:.0f} tokens, bfloat16", seconds, tokens,
              6 * parameters * tokens, peaks)

    if "encode" in args.parts:
        texts = [text for row in rows for text in row]
        layer = model.config.num_hidden_layers
        runs = {f"here, {dtype}": lambda texts, dtype=dtype: evaluate.embed(model, tokenizer, texts, [layer], dtype)
                for dtype in ("bfloat16", "float32")}
        runs["here, bfloat16, layer 1 alone"] = lambda texts: evaluate.embed(model, tokenizer, texts, [1], "bfloat16")
        if "sentence-transformers MultipleNegativesRankingLoss" in names:
            from sentence_transformers import SentenceTransformer
            for dtype in ("bfloat16", "float32"):
                theirs = SentenceTransformer(args.model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
                runs[f"sentence-transformers encode, {dtype}"] = theirs.encode
        seconds = in_turn(runs, [dict.fromkeys(runs, texts)] * 5, warm_up=1)
        tokens = sum(map(len, data.tokenize(texts, tokenizer, tokenizer.model_max_length)))
        table(f"encoding {len(texts)} texts, {tokens} tokens", seconds, tokens, 2 * parameters * tokens, peaks,
              "here, bfloat16")

    if "memory" in args.parts:
        print(f"\npeak memory, a process each\n{'':52} {'GB':>7} {'x ours':>7}")
        command = [sys.executable, __file__, args.model, args.pairs, "--batch_size", str(args.batch_size),
                   "--max_length", str(args.max_length), "--memory_of"]
        kilobytes = {name: int(subprocess.run([*command, name], capture_output=True, text=True, check=True)
                               .stdout.split()[-1]) for name in names}
        for name, peak in kilobytes.items():
            print(f"{name:52} {peak / 1e6:7.2f} {peak / kilobytes['here']:7.2f}")


if __name__ == "__main__":
    main()
