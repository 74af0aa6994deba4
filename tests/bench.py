"""
How fast is this, against what people would pick instead and against the machine? No test: pytest does not collect it.

    python tests/bench.py MODEL PAIRS [--parts srl encode] [--batch_size 64] [--max_length 64]
    python tests/bench.py MODEL TEXT --parts windows paragraphs --batch_size 16 --rounds 3

MODEL: a BERT folder; PAIRS: what finetune_srl.py --train_pairs takes, with one negative a row; TEXT: what
pretrain_smae.py --train_text takes, for the SMAE step at the shape of BERT-base: windows of 128 tokens, all full, or
whole paragraphs of 512 tokens at most. Every figure is measured in this run: the contestants, a process each, take
their steps in turn, on the same rows, dropout 0.1 and bfloat16 autocast, from the same weights (SMAE: random ones);
medians. A step is forward, loss, backward, clipping, fused AdamW; tokenising and padding are done before the clock
starts. Encoding includes tokenising. Useful arithmetic: 6 x parameters of the blocks x real tokens, 2 x in encoding,
and `arithmetic` below. Without sentence-transformers its rows are left out. Matryoshka2dLoss runs as it
comes: the last layer and one other a step, one of the dims at each.
"""
import argparse
import copy
import functools
import importlib.util
import itertools
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import evaluate
from finetune_srl import cached_backward, srl_loss
from model import (Bert, BertConfig, MLMHead, configure_optimizer, from_pretrained, keep_freed_memory, load_tokenizer, pack,
                   default_sizes)
from pretrain_smae import SMAE, fast_decode, fast_vocabulary_loss, smae_loss

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
    tokenizer = load_tokenizer(args.model)
    model = from_pretrained(args.model, **DROPOUT).train()
    sizes = sizes or list(default_sizes(model.config))
    optimizer = configure_optimizer(dict(model.named_parameters()), 1e-6, 0.0, (), 1.0)

    def prepare(rows):
        return [ids for texts in zip(*rows) for ids in data.tokenize(list(texts), tokenizer, args.max_length)]

    def embed(texts):
        with torch.autocast("cpu", torch.bfloat16):
            return model.encode(pack(texts, multiple=128), [layer for layer, _ in sizes])

    def step(texts):
        Q = len(texts) // 3
        loss_of = lambda taps: srl_loss({n: t[:Q] for n, t in taps.items()}, {n: t[Q:] for n, t in taps.items()},
                                        sizes, "cosine", 0.05, 1.0)
        pieces = -(-Q // micro_batch) if micro_batch else 1
        cached_backward(embed, texts, loss_of, pieces, (1,))
        update(model.parameters(), optimizer)
    return prepare, step


def packed_full_size(args):
    """ this project, the full size alone """
    config = from_pretrained(args.model).config
    return packed(args, list(default_sizes(config))[-1:])


def packed_micro_batch(args):
    """ this project, 16 times the batch, --micro_batch of the batch """
    return packed(args, micro_batch=args.batch_size)


def padded(args):
    """ transformers' BertModel, one padded batch, our loss """
    from transformers import BertModel
    tokenizer = load_tokenizer(args.model)
    model = BertModel.from_pretrained(args.model, add_pooling_layer=False, **DROPOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    sizes = list(default_sizes(model.config))

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
        loss_of = losses.Matryoshka2dLoss(model, loss_of, sorted({dim for _, dim in default_sizes(config)}, reverse=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def prepare(rows):
        return [model.preprocess(list(texts)) for texts in zip(*rows)]

    def step(columns):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of([dict(column) for column in columns], None)   # it writes into what it is given
        loss.backward()
        update(model.parameters(), optimizer)
    return prepare, step


def sentence_transformers_2d(args):
    """ its Matryoshka2dLoss, with the dims of our sizes """
    return sentence_transformers(args, two_d=True)


# SMAE, at the shape of BERT-base, from random weights: args -> prepare, step; prepare(B documents of token ids)


def smae_masked(args):
    """ documents -> Masked, the same for both sides """
    tokenizer = load_tokenizer(args.model)
    return lambda documents: data.smae_batch(documents, args.max_length, (0.2, 0.4), tokenizer, [len(documents[0])])


def smae_packed(args, checkpointing=False):
    """ this project """
    keep_freed_memory(not checkpointing)
    config = BertConfig()
    model = SMAE(Bert(config), MLMHead(config)).train()
    model.bert.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(masked):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=not checkpointing):
            loss, _, _ = smae_loss(model, pack(masked.texts, multiple=128), masked, default_sizes(config), "smae",
                                   fast_decode, fast_vocabulary_loss)
        loss.backward()
        update(model.parameters(), optimizer)
    return smae_masked(args), step


def smae_checkpointing(args):
    """ this project, --gradient_checkpointing """
    return smae_packed(args, checkpointing=True)


def smae_padded(args):
    """ transformers' BertForMaskedLM and BertLayer, padded to the longest, vocabulary heads at all positions """
    from transformers import BertConfig as Config, BertForMaskedLM
    model = BertForMaskedLM(Config()).train()
    model.smae_decoder = copy.deepcopy(model.bert.encoder.layer[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    head, sizes = model.cls.predictions, default_sizes(BertConfig())
    masked_of = smae_masked(args)

    def prepare(documents):
        masked = masked_of(documents)
        lengths = [len(text) for text in masked.texts]
        def pad(flat, fill):
            padded = np.full((len(lengths), max(lengths)), fill)                                  # (B, T)
            padded[np.arange(max(lengths)) < np.array(lengths)[:, None]] = flat
            return torch.from_numpy(padded)
        def labels(positions):
            true, flat = np.concatenate(masked.texts), np.full(sum(lengths), -100)
            flat[positions] = true[positions]
            return pad(flat, -100).flatten()
        return (pad(masked.encoder_ids, 0), labels(masked.encoder_positions), pad(masked.decoder_ids, 0),
                labels(masked.decoder_positions), pad(np.ones(sum(lengths), dtype=np.int64), 0))

    def transform(x):
        dense = head.transform.dense
        return head.transform.LayerNorm(F.gelu(F.linear(x, dense.weight[:, :x.shape[-1]], dense.bias)))

    def step(batch):
        encoder_ids, encoder_labels, decoder_ids, decoder_labels, mask = batch
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.bert(encoder_ids, attention_mask=mask, output_hidden_states=True).hidden_states
            embeddings, terms = model.bert.embeddings(decoder_ids), []
            bias = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
            for layer, dim in sizes:
                tap = hidden[layer][:, :, :dim]                                                   # (B, T, D)
                terms.append(F.cross_entropy(head.decoder(transform(tap)).flatten(0, 1), encoder_labels))
                inputs = torch.cat([transform(tap[:, :1]).to(embeddings.dtype), embeddings[:, 1:]], 1)
                decoded = model.smae_decoder(inputs, attention_mask=bias)
                decoded = decoded[0] if isinstance(decoded, tuple) else decoded                   # (B, T, C)
                terms.append(F.cross_entropy(head.decoder(transform(decoded)).flatten(0, 1), decoder_labels))
        (sum(terms) / len(terms)).backward()
        update(model.parameters(), optimizer)
    return prepare, step


def arithmetic(config, sizes, B, N, M, M_decoder):
    """
    floating-point operations of an SMAE step with B texts, N tokens, M and M_decoder masked positions: matrix products,
    forward and backward, without attention's
    """
    C, I, V, S = config.hidden_size, config.intermediate_size, config.vocab_size, len(sizes)
    products = N * max(layer for layer, _ in sizes) * (4 * C * C + 2 * C * I)             # encoder
    products += M * sum(C * d + V * C for _, d in sizes)                                  # its head
    products += (3 * N + 2 * S * B) * C * C + B * sum(C * d for _, d in sizes)            # decoder's qkv, bottlenecks
    products += S * M_decoder * (C * C + 2 * C * I + C * C + V * C)                       # the rest of it, its head
    return 6 * products


SMAE_LENGTHS = {"windows": 128, "paragraphs": 512}   # tokens at most
MICRO_BATCH = "here, 16 x the batch, --micro_batch"
CONTESTANTS = {"here": packed, "here, full size alone": packed_full_size,
               "sentence-transformers Matryoshka2dLoss": sentence_transformers_2d,
               "sentence-transformers MultipleNegativesRankingLoss": sentence_transformers,
               "transformers, padded": padded, MICRO_BATCH: packed_micro_batch}
SMAE_CONTESTANTS = {"here": smae_packed, "here, --gradient_checkpointing": smae_checkpointing,
                    "transformers, padded, heads at all positions": smae_padded}

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


def median_in_turn(functions, rounds):
    """ {name: function of the number of the round} -> {name: median seconds}; two rounds to warm up """
    seconds = {name: [] for name in functions}
    for number in range(-2, rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            took = function(number + 2)   # what a worker measured itself
            seconds[name].append(took or time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def load_rows(args, part):
    """ what the contestants of a part take their batches from """
    if part in ("srl", "encode"):
        return [(query, positives[0], negatives[0]) for query, positives, negatives, _
                in itertools.islice(iter(data.load_pairs(args.source)), 16 * args.batch_size) if negatives]
    documents = data.tokenize_documents(data.load_texts(args.source), load_tokenizer(args.model))
    if part == "windows":
        documents = (document for document in documents if len(document) >= SMAE_LENGTHS[part] - 2)
    return list(itertools.islice(documents, (2 + args.rounds) * args.batch_size))


def work(args):
    """ a process of its own for each contestant: the number of a batch comes in, seconds and peak kilobytes go out """
    rows = load_rows(args, args.parts[0])
    large = 16 if args.worker == MICRO_BATCH else 1
    prepare, step = (CONTESTANTS if args.parts[0] == "srl" else SMAE_CONTESTANTS)[args.worker](args)
    for line in sys.stdin:
        first = int(line) * args.batch_size % len(rows)
        batch = prepare(rows[first:first + large * args.batch_size])
        start = time.perf_counter()
        step(batch)
        print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


def start_workers(names, args, part, max_length):
    """ -> ask(name, number of a batch) -> seconds; finish(), which ends the processes and prints their peak memory """
    command = [sys.executable, __file__, args.model, args.source, "--batch_size", str(args.batch_size), "--max_length",
               str(max_length), "--rounds", str(args.rounds), "--parts", part, "--worker"]
    workers = {name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for name in names}
    kilobytes = {}
    def ask(name, number):
        print(number, file=workers[name].stdin, flush=True)
        seconds, kilobytes[name] = workers[name].stdout.readline().split()
        return float(seconds)
    def finish():
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        print(f"\npeak memory, a process each\n{'':52} {'GB':>7} {'x ours':>7}")
        for name, peak in kilobytes.items():
            print(f"{name:52} {int(peak) / 1e6:7.2f} {int(peak) / int(kilobytes['here']):7.2f}", flush=True)
    return ask, finish


def table(title, seconds, tokens, flops, peaks, first="here"):
    """ one row a contestant, all against the first; flops {name: FLOP} """
    print(f"\n{title}\n{'':52} {'ms':>7} {'x ours':>7} {'tokens/s':>9}  share of the bfloat16 / float32 peak")
    for name, s in seconds.items():
        shares = " / ".join(f"{flops[name] / s / peak:.0%}" for peak in peaks.values())
        print(f"{name:52} {1000 * s:7.0f} {s / seconds[first]:7.2f} {tokens / s:9.0f}  {shares}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source", help="PAIRS or TEXT")
    parser.add_argument("--parts", nargs="+", choices=["srl", "encode", *SMAE_LENGTHS], default=["srl", "encode"])
    parser.add_argument("--batch_size", type=int, default=64, help="rows a step")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each contestant, after two to warm up")
    parser.add_argument("--worker", help=argparse.SUPPRESS)   # the name of the contestant that this process is
    args = parser.parse_args()
    if args.worker:
        work(args)
        return

    installed = importlib.util.find_spec("sentence_transformers") is not None
    if not installed:
        print("sentence-transformers is not installed: its rows are left out")
    names = [name for name in CONTESTANTS if installed or not name.startswith("sentence")]
    model, tokenizer = from_pretrained(args.model), load_tokenizer(args.model)
    parameters = sum(p.numel() for p in model.blocks.parameters())
    peaks = {dtype: measure_peak(model.config, 3072, dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; peak of the matrix products: " +
          ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s".removeprefix("torch.") for dtype, peak in peaks.items()))

    if "srl" in args.parts:
        rows = load_rows(args, "srl")
        ask, finish = start_workers(names, args, "srl", args.max_length)
        seconds = median_in_turn({name: functools.partial(ask, name) for name in names if name != MICRO_BATCH},
                                 args.rounds)
        texts = [text for row in rows[2 * args.batch_size:(2 + args.rounds) * args.batch_size] for text in row]
        tokens = sum(map(len, data.tokenize(texts, tokenizer, args.max_length))) / args.rounds
        table(f"SRL step, {args.batch_size} rows, {tokens:.0f} tokens, bfloat16", seconds, tokens,
              dict.fromkeys(names, 6 * parameters * tokens), peaks)
        ask(MICRO_BATCH, 0)   # the optimizer has its memory from here on
        micro = ask(MICRO_BATCH, 0)
        print(f"{MICRO_BATCH:52} {1000 * micro:7.0f} {micro / seconds['here'] / 16:7.2f} a row")
        finish()

    for part in [part for part in args.parts if part in SMAE_LENGTHS]:
        rows, length = load_rows(args, part)[2 * args.batch_size:], SMAE_LENGTHS[part]
        ask, finish = start_workers(SMAE_CONTESTANTS, args, part, length)
        seconds = median_in_turn({name: functools.partial(ask, name) for name in SMAE_CONTESTANTS}, args.rounds)
        N = sum(min(len(document) + 2, length) for document in rows) / args.rounds
        config = BertConfig()
        flops = arithmetic(config, default_sizes(config), args.batch_size, N, 0.2 * N, 0.4 * N)
        table(f"SMAE step, BERT-base, {part}, {args.batch_size} texts, {N:.0f} tokens", seconds, N,
              dict.fromkeys(SMAE_CONTESTANTS, flops), peaks)
        finish()

    if "encode" in args.parts:
        texts = [text for row in load_rows(args, "encode") for text in row]
        layer = model.config.num_hidden_layers
        keep_freed_memory()   # one process here, so it serves both sides
        def embed(dtype, layer, number):
            evaluate.embed_texts(model, tokenizer, texts, [layer], dtype)
        runs = {f"here, {dtype}": functools.partial(embed, dtype, layer) for dtype in ("bfloat16", "float32")}
        runs["here, bfloat16, layer 1 alone"] = functools.partial(embed, "bfloat16", 1)
        if installed:
            from sentence_transformers import SentenceTransformer
            for dtype in ("bfloat16", "float32"):
                theirs = SentenceTransformer(args.model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
                def encode(number, theirs=theirs):
                    theirs.encode(texts)
                runs[f"sentence-transformers encode, {dtype}"] = encode
        seconds = median_in_turn(runs, 3)
        tokens = sum(map(len, data.tokenize(texts, tokenizer, tokenizer.model_max_length)))
        flops = {name: 2 * parameters * tokens / (layer if "alone" in name else 1) for name in runs}
        table(f"encoding {len(texts)} texts, {tokens} tokens", seconds, tokens, flops, peaks, "here, bfloat16")


if __name__ == "__main__":
    main()
