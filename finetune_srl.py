"""
Fine-tune one BERT encoder so that it is good at every size: SRL, Starbucks Representation Learning.

    python finetune_srl.py                                       # six sizes from scratch; 5 to 8 minutes on 2 cores
    python finetune_srl.py --sizes 6:192 --out_dir out/full      # one size alone, here the ordinary full-size model
    python finetune_srl.py --train_pairs my_pairs.csv --out_dir out/mine      # columns query, positive, negative...
    python finetune_srl.py --init_from bert-base-uncased --train_pairs sentence-transformers/all-nli:triplet \\
        --learning_rate 5e-5 --temperature 0.05 --weight_decay 0 --dropout 0.1 --epochs 1 --out_dir out/nli

Writes to OUT_DIR an ordinary Hugging Face model, args.json, log.jsonl and, at the end, the evaluation in eval.json.
Paper: arXiv 2410.13230. srl_loss is its fine-tuning loss; the README lists the known differences.
"""
import argparse, math, os, time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
from evaluate import (HelpFormatter, average, log, nonneg_float, nonneg_int, open_run, positive_float, positive_int,
                      training_flags)
from model import (POOLINGS, SIMILARITIES, Bert, BertConfig, check_sizes, configure_optimizer, keep_freed_memory,
                   named_sizes, pack, save_pretrained, score, size_name)

# ---- the method ------------------------------------------------------------------------------------------------------
# Q queries, P passages, C channels; a size is (layer, dim)

def srl_loss(queries, passages, sizes, similarity, temperature, kl_weight):
    """ L = mean over sizes of [ InfoNCE(s) + kl_weight * KL(softmax(s_full) || softmax(s)) ]
    with the scores s = sim(q, p) / temperature.
    queries {layer: (Q, C)}, passages {layer: (P, C)}: embeddings of every layer that has a size. Passage i < Q is the
    positive of query i; passages from Q on are hard negatives. For query i every passage but i counts as a negative,
    even if the same text occurs twice. sizes: (layer, dim) pairs; the last is the full size, the teacher.
    Call it outside autocast: bfloat16 scores would be wrong in the third digit.
    -> loss, {size name: InfoNCE}, {size name: KL} """
    assert sizes[-1] == (max(layer for layer, _ in sizes), max(dim for _, dim in sizes)), f"no full size last: {sizes}"
    scores = {(layer, dim): score(queries[layer], passages[layer], dim, similarity) / temperature
              for layer, dim in sizes}                             # (Q, P) each
    teacher = scores[sizes[-1]].detach()          # (Q, P), detached: the full size must not move towards the others
    nce, kl = {}, {}
    for size in sizes:
        log_probs = scores[size].log_softmax(-1)                                # (Q, P)
        nce[size_name(size)] = info_nce(log_probs)
        kl[size_name(size)] = kl_divergence(teacher.softmax(-1), log_probs)     # for the full size 0, like its gradient
    return (sum(nce.values()) + kl_weight * sum(kl.values())) / len(nce), nce, kl

def info_nce(log_probs):
    """ (Q, P) log-probabilities of the passages -> mean of -log p(positive). It makes each size a retriever. """
    target = torch.arange(len(log_probs), device=log_probs.device)   # (Q,), passage i is the positive of query i
    return F.nll_loss(log_probs, target)

def kl_divergence(teacher, log_probs):
    """ (Q, P) probabilities of the teacher, (Q, P) log-probabilities of a size -> mean KL(teacher || size) """
    return F.kl_div(log_probs, teacher, reduction="batchmean")       # torch takes the teacher as second argument

def cached_backward(encode, texts, chunks, loss_of, scale):
    """ Gradient caching (arXiv 2101.06983): the gradient of a large batch in the memory of a small one. The loss needs
    all embeddings at once, but embeddings are small: it is the encoder's activations that fill the memory. So
      1. encode chunk by chunk without a graph; 2. compute the loss and its gradient with respect to the embeddings;
      3. encode each chunk again, with the same dropout, and backpropagate its rows of that gradient.
    encode: list of B texts -> {layer: (B, C)}. Chunk k is texts[k::chunks], about as many queries as any other chunk.
    loss_of: {layer: (B, C)} of all texts -> (loss, ...), which is returned. scale: GradScaler.scale. """
    random_states, cache = [], {}
    for k in range(chunks):
        random_states.append((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
        with torch.no_grad():
            for layer, tap in encode(texts[k::chunks]).items():
                if layer not in cache:
                    cache[layer] = tap.new_zeros(len(texts), tap.shape[1])   # (B, C)
                cache[layer][k::chunks] = tap
    losses = loss_of({layer: tap.requires_grad_() for layer, tap in cache.items()})
    scale(losses[0]).backward()
    for k, (cpu, cuda) in enumerate(random_states):
        torch.set_rng_state(cpu), torch.cuda.set_rng_state_all(cuda)
        taps = encode(texts[k::chunks])
        torch.autograd.backward(list(taps.values()), [cache[layer].grad[k::chunks] for layer in taps])
    return losses

# ---- training --------------------------------------------------------------------------------------------------------
def backward(model, queries, passages, sizes, args, scaler):
    """ lists of Q and P token id arrays: one pass through the encoder for all sizes, then backward -> as srl_loss """
    Q, layers = len(queries), [layer for layer, _ in sizes]
    def encode(texts):
        with torch.autocast(args.device.split(":")[0], getattr(torch, args.dtype), enabled=args.dtype != "float32"):
            return model.encode(pack(texts, args.device, multiple=128), layers)      # {layer: (B, C)}
    def loss_of(taps):
        return srl_loss({layer: tap[:Q] for layer, tap in taps.items()},
                        {layer: tap[Q:] for layer, tap in taps.items()},
                        sizes, model.config.similarity, args.temperature, args.kl_weight)
    if args.micro_batch:
        chunks = math.ceil(Q / args.micro_batch)
        return cached_backward(encode, queries + passages, chunks, loss_of, scaler.scale)
    losses = loss_of(encode(queries + passages))
    scaler.scale(losses[0]).backward()
    return losses

def get_lr(step, max_steps, args):
    """ linear warm-up, then linear decay to 0 """
    warmup_steps = max(1, round(args.warmup * max_steps))
    if step < warmup_steps:
        return args.learning_rate * (step + 1) / warmup_steps
    return args.learning_rate * (max_steps - step) / max(1, max_steps - warmup_steps)

def build_model(args, rows):
    """ -> Bert with sizes, pooling and similarity in its config; tokenizer. Raises ValueError for flags that misfit """
    p = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    if args.init_from == "scratch":
        print(f"training a WordPiece vocabulary of {args.vocab_size} on the pairs")
        texts = (text for query, positives, negatives, _ in rows for text in [query, *positives, *negatives])
        tokenizer = data.train_wordpiece(texts, args.vocab_size)
        model = Bert(BertConfig(vocab_size=len(tokenizer), hidden_size=args.hidden_size,
                                num_hidden_layers=args.num_layers, num_attention_heads=args.hidden_size // 64,
                                intermediate_size=4 * args.hidden_size, max_position_embeddings=args.max_length,
                                initializer_range=0.01, **p))   # half of BERT's, so that AdamW's steps weigh more
    else:
        model, tokenizer = evaluate.load_model(args.init_from, **p)
    config = model.config
    for name in ("query_max_length", "passage_max_length"):
        if getattr(args, name) > config.max_position_embeddings:
            raise ValueError(f"--{name} {getattr(args, name)}: {args.init_from} has {config.max_position_embeddings} "
                             "positions; choose that or less")
    names = named_sizes(config)
    config.sizes = check_sizes(args.sizes or names, config)
    config.size_names = tuple(names.get(size, "") for size in config.sizes)
    config.pooling, config.similarity = args.pooling or config.pooling, args.similarity or config.similarity
    layer, dim = config.sizes[-1][0], max(dim for _, dim in config.sizes)
    if config.sizes[-1] != (layer, dim):
        raise ValueError(f"--sizes {','.join(map(size_name, config.sizes))}: no size is both the deepest and the "
                         f"widest, so none can teach the others; add {layer}:{dim}")
    config.num_hidden_layers = layer
    del model.blocks[layer:]                              # layers that no size uses
    if args.init_from == "scratch" and config.pooling == "mean":
        leave_channels_unscored(model)
    tokenizer.model_max_length = min(args.max_length, config.max_position_embeddings)   # is saved with the model
    return model.to(args.device).train(), tokenizer

def leave_channels_unscored(model):
    """ Mean pooling weighs a token by its norm in the scored dims, but LayerNorm gives all tokens the same norm over
    all channels. So "the" can only weigh less than a rare word if its norm is in channels that are not scored, and the
    full size has none. Start the last sixth of its LayerNorm's gains at 0, so that these channels hardly count. """
    model.blocks[-1].norm2.weight.data[-model.config.hidden_size // 6:] = 0

def main(args):
    """ data, model, optimizer, loop, evaluation. Raises ValueError or OSError for what the user can mend. """
    start = time.time()
    keep_freed_memory()
    torch.manual_seed(args.seed)

    # data and model: read all input before anything is written
    if args.retrieval:
        data.Collection(args.retrieval)
        if args.eval_interval:
            data.Collection(f"{args.retrieval}:dev")
    rows = data.load_pairs(args.train_pairs)
    model, tokenizer = build_model(args, rows)
    sizes = model.config.sizes
    # passages keep more tokens than a step takes: srl_batch cuts a window of --passage_max_length out of them
    pairs = data.tokenize_pairs(rows, tokenizer, args.query_max_length, tokenizer.model_max_length)
    batch_size = min(args.batch_size, len(pairs.queries))
    max_steps = args.max_steps or max(1, round(args.epochs * (len(pairs.queries) // batch_size)))

    # optimizer
    optimizer = configure_optimizer(dict(model.named_parameters()), args.learning_rate, args.weight_decay,
                                    ("word.weight", "position.weight", "token_type.weight"), args.embedding_lr_scale)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "float16")
    if args.compile:
        for block in model.blocks:
            block.rest = torch.compile(block.rest, dynamic=True)   # not attention: its groups differ in every batch

    log_file = open_run(args)
    print(f"{len(pairs.queries):,} pairs, {max_steps} steps of {batch_size} queries; "
          f"sizes {', '.join(map(size_name, sizes))}; "
          f"{model.num_params(sizes[-1][0]) / 1e6:.2f}M parameters; {args.dtype} on {args.device}")

    # the loop
    clock, tokens, losses = time.time(), 0, []
    for step in range(max_steps):
        lr = get_lr(step, max_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        queries, passages, _ = data.srl_batch([pairs], batch_size, args.negatives, args.passage_max_length, args.seed, step)
        optimizer.zero_grad(set_to_none=True)
        loss, nce, kl = backward(model, queries, passages, sizes, args, scaler)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()

        tokens += sum(map(len, queries + passages))
        losses.append(({"loss": loss}, nce, kl))
        if (step + 1) % args.log_interval == 0 or step + 1 == max_steps:
            mean, nce, kl = map(average, zip(*losses))
            if not math.isfinite(mean["loss"]):
                raise FloatingPointError(f"step {step + 1}: the loss is {mean['loss']}, InfoNCE per size {nce}; "
                                         "nothing was saved. Try a lower --learning_rate, or --dtype float32")
            seconds = (time.time() - clock) / len(losses)
            rate = tokens / len(losses) / seconds
            first, last = list(nce)[0], size_name(sizes[-1])
            log(log_file, {"step": step + 1, "loss": mean["loss"], "nce": nce, "kl": kl, "learning_rate": lr,
                           "norm": norm.item(), "ms": 1000 * seconds, "tokens_per_second": rate,
                           "seconds": time.time() - start},
                f"step {step + 1}/{max_steps} | loss {mean['loss']:.3f} | {first} {nce[first]:.3f} | "
                f"{last} {nce[last]:.3f} | lr {lr:.1e} | norm {norm:.2f} | {1000 * seconds:.0f} ms | "
                f"{rate / 1000:.1f}k tok/s | eta {(max_steps - step - 1) * seconds / 60:.1f}m")
            clock, tokens, losses = time.time(), 0, []
        if args.retrieval and args.eval_interval and (step + 1) % args.eval_interval == 0 and step + 1 < max_steps:
            pause = time.time()
            results, _ = evaluate.retrieval(model, tokenizer, f"{args.retrieval}:dev", sizes, args.dtype)
            mrr = [r for r in results if r["metric"] == "MRR@10" and r["layer"]]   # without BM25
            log(log_file, {"step": step + 1, "dev": results}, f"step {step + 1}/{max_steps} | dev MRR@10 | "
                + " | ".join(f"{r['layer']}:{r['dim']} {r['value']:.3f}" for r in mrr))
            clock += time.time() - pause

    save_pretrained(model, tokenizer, args.out_dir)
    print(f"saved {args.out_dir}")
    if args.retrieval:
        evaluate.main(evaluate.parse_args([args.out_dir, "--retrieval", args.retrieval, "--speed",
                                           "--device", args.device, "--dtype", args.dtype]))
    print(f"{(time.time() - start) / 60:.1f} minutes in all")

# ---- flags -----------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args; a wrong one ends the program with status 2 and a line that says why """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--train_pairs", default="docs", help="docs, a .jsonl/.csv/.tsv/.parquet file, or hub NAME[:CONFIG][:SPLIT]")
    add("--batch_size", type=positive_int, default=128, help="queries per step; all their passages are candidates")
    add("--negatives", type=nonneg_int, default=1, help="hard negatives a query, at most, where the pairs have any")
    add("--micro_batch", type=nonneg_int, default=0,
        help="encode this many queries and their passages at a time: the same gradient in less memory, for one more "
             "forward pass; 0 encodes the whole batch at once")
    add("--query_max_length", type=positive_int, default=32, help="tokens, [CLS] and [SEP] included")
    add("--passage_max_length", type=positive_int, default=64,
        help="tokens of a passage in a step; a longer passage gives its beginning or, as often, any window")
    add("--max_length", type=positive_int, default=256,
        help="tokens that the finished model reads of a text, if it has so many positions. Training on short windows "
             "is faster; reading more afterwards finds more")
    add = parser.add_argument_group("loss and embeddings").add_argument
    add("--pooling", choices=list(POOLINGS), help="of the tokens; by default the loaded model's own, from scratch mean")
    add("--similarity", choices=SIMILARITIES,
        help="of a query and a passage; by default the loaded model's own, from scratch cosine")
    add("--temperature", type=positive_float, default=0.1, help="divides the similarities; use 1 with --similarity dot")
    add("--kl_weight", type=nonneg_float, default=1.0, help="of the KL from the full size; 0 leaves it out")
    add("--embedding_lr_scale", type=positive_float,
        help="learning rate of the embeddings over that of the blocks, because a word is seen less often than a block; "
             "by default 8 from scratch, 1 for a loaded model")
    add = parser.add_argument_group("evaluation").add_argument
    add("--retrieval", default="docs",
        help='docs, a folder in BEIR layout or a BEIR set of the hub: dev in training, test at the end; "" for none')
    add("--eval_interval", type=nonneg_int, default=300, help="steps between two evaluations on dev; 0 for none")
    training_flags(parser)
    parser.set_defaults(learning_rate=5e-4, warmup=0.1, weight_decay=0.1, epochs=3.6, out_dir="out/srl")

    args = parser.parse_args(argv)
    if args.embedding_lr_scale is None:
        args.embedding_lr_scale = 8.0 if args.init_from == "scratch" else 1.0
    args.max_length = max(args.max_length, args.query_max_length, args.passage_max_length)
    if (Path(args.out_dir) / "model.safetensors").exists() and not args.overwrite:
        parser.error(f"--out_dir {args.out_dir} holds a finished run; choose another folder or add --overwrite")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("this script runs as one process, and torchrun started several; start it with python")
    return args

if __name__ == "__main__":
    evaluate.run_script(main, parse_args)
