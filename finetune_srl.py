"""
Fine-tune one BERT encoder so that it is good at every size: SRL, Starbucks Representation Learning.

    python finetune_srl.py                      # the docs of this machine; 4.9 minutes on 2 cores, MRR@10 .13 to .41
    python finetune_srl.py --sizes 6:192        # the ordinary full-size model; --sizes 1:8 a separate small one
    python finetune_srl.py --init_from bert-base-uncased --train_pairs sentence-transformers/all-nli:triplet \\
        --learning_rate 5e-5 --temperature 0.05 --weight_decay 0 --dropout 0.1 --epochs 1 --query_max_length 512 \\
        --passage_max_length 512 --out_dir out/nli                     # the paper's STS run; one GPU, not measured here
    python finetune_srl.py --init_from bert-base-uncased --train_pairs Tevatron/msmarco-passage --negatives 7 \\
        --pooling cls --similarity dot --temperature 1 --learning_rate 1e-4 --weight_decay 0 --dropout 0.1 --epochs 3 \\
        --passage_max_length 196 --max_length 196 --out_dir out/marco  # the paper's retrieval run, likewise

What comes out: OUT_DIR with an ordinary Hugging Face model, log.jsonl, args.json and eval.json (the table at the end).
Method: arXiv 2410.13230. The loss is srl_loss below; where it departs from the paper or its reference code, the README
says so with both values.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
from model import (Bert, BertConfig, check_sizes, fast_dtype, from_pretrained, keep_freed_memory, pack, paper_sizes,
                   parse_sizes, save_pretrained, size_name)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """ keep the docstring's line breaks and print every default """


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    group.add_argument("--train_pairs", default="docs",
                       help="docs, a .jsonl/.csv/.tsv/.parquet file, or NAME[:CONFIG][:SPLIT] of the hub")
    group.add_argument("--batch_size", type=int, default=128,
                       help="queries a step; every passage of the batch is a candidate for each")
    group.add_argument("--negatives", type=int, default=1,
                       help="hard negatives a query, at most, where the pairs have any")
    group.add_argument("--micro_batch", type=int, default=0,
                       help="encode this many queries and their passages at a time: the same gradient in the memory of "
                            "such a small batch, for one more forward pass; 0 encodes the whole batch at once")
    group.add_argument("--query_max_length", type=int, default=32, help="tokens, [CLS] and [SEP] included")
    group.add_argument("--passage_max_length", type=int, default=64,
                       help="tokens of a passage in a step: of a longer one the start or, as often, any window")
    group.add_argument("--max_length", type=int, default=256,
                       help="tokens read of a passage, and by the trained model of any text, if it has so many "
                            "positions; at least as many as in a step. It finds more with longer passages, and trains "
                            "faster on short ones")

    group = parser.add_argument_group("model")
    group.add_argument("--init_from", default="scratch", help="scratch, a folder, or a BERT of the hub")
    group.add_argument("--sizes", type=parse_sizes,
                       help="LAYER:DIM,... trained together; by default the paper's six in proportion to the model: "
                            "2:32,4:64,6:128,8:256,10:512,12:768 of BERT-base. Layers above the largest are dropped")
    group.add_argument("--pooling", choices=["mean", "cls"], default="mean", help="mean over the tokens, or the first")
    group.add_argument("--similarity", choices=["cosine", "dot"], default="cosine", help="of a query and a passage")
    group.add_argument("--dropout", type=float, default=0.0,
                       help="in the hidden layers and the attention (BERT was pre-trained with 0.1)")

    group = parser.add_argument_group("model from scratch; a loaded one brings its own")
    group.add_argument("--num_layers", type=int, default=6, help="blocks")
    group.add_argument("--hidden_size", type=int, default=192, help="channels, a multiple of 64 (the width of a head)")
    group.add_argument("--vocab_size", type=int, default=8192, help="WordPiece vocabulary, trained on the pairs")

    group = parser.add_argument_group("loss")
    group.add_argument("--temperature", type=float, default=0.1,
                       help="divides the similarities; use 1 with --similarity dot")
    group.add_argument("--kl_weight", type=float, default=1.0,
                       help="of the term that pulls every size to the largest; 0 leaves it out")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=float, default=5e-4, help="peak, of AdamW")
    group.add_argument("--embedding_lr_scale", type=float,
                       help="learning rate of the embeddings over that of the rest, for a word is rarer than a block; "
                            "by default 8 from scratch, 1 for a loaded model")
    group.add_argument("--warmup", type=float, default=0.1,
                       help="share of the steps in which the rate rises; then it falls linearly to 0")
    group.add_argument("--weight_decay", type=float, default=0.1, help="on the matrices alone")
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    group.add_argument("--epochs", type=float, default=3.6, help="passes over the pairs")
    group.add_argument("--max_steps", type=int, default=0, help="steps in place of --epochs; 0 goes by --epochs")
    group.add_argument("--seed", type=int, default=1, help="of the weights, the order of the pairs and dropout")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--retrieval", default="docs",
                       help="docs, a folder in BEIR layout or a BEIR set of the hub: its dev queries are used while "
                            'training, its test queries at the end; "" for none')
    group.add_argument("--eval_interval", type=int, default=300,
                       help="steps between two evaluations on the dev queries; 0 for none")

    group = parser.add_argument_group("system")
    group.add_argument("--out_dir", default="out/srl", help="where the model, the log and the evaluation go")
    group.add_argument("--overwrite", action=flag, default=False, help="replace the finished run that is in --out_dir")
    group.add_argument("--log_interval", type=int, default=10, help="steps between two lines of the log")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=fast_dtype(),
                       help="of the matrix products (autocast); the weights stay float32. By default bfloat16 where "
                            "the machine is fast at it")
    group.add_argument("--compile", action=flag, default=torch.cuda.is_available(),
                       help="torch.compile all of a block but attention; takes a minute to start")

    args = parser.parse_args(argv)
    if args.embedding_lr_scale is None:
        args.embedding_lr_scale = 8.0 if args.init_from == "scratch" else 1.0
    for name in ("batch_size", "query_max_length", "passage_max_length", "max_length", "num_layers", "hidden_size",
                 "log_interval", "temperature", "learning_rate", "embedding_lr_scale", "epochs"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    args.max_length = max(args.max_length, args.query_max_length, args.passage_max_length)
    for name in ("micro_batch", "negatives", "kl_weight", "weight_decay", "grad_clip", "max_steps", "eval_interval"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must be 0 or more")
    for name in ("warmup", "dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be 0 or more and below 1")
    if args.hidden_size % 64:
        parser.error(f"--hidden_size {args.hidden_size}: must be a multiple of 64, the width of an attention head")
    if args.vocab_size < 100:
        parser.error(f"--vocab_size {args.vocab_size}: too few to spell English; use 100 or more")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if (Path(args.out_dir) / "model.safetensors").exists() and not args.overwrite:
        parser.error(f"--out_dir {args.out_dir} holds a finished run; choose another folder or add --overwrite")
    return args

# ----------------------------------------------------------------------------------------------------------------------
# the method


def srl_loss(queries, passages, sizes, similarity, temperature, kl_weight):
    """
    L = 1/|S| sum over sizes of [ CE(s, positive) + kl_weight * KL(softmax(s of the full size) || softmax(s)) ]
    queries {layer: (Q, C)} and passages {layer: (P, C)}: pooled taps; passage i is the positive of query i, passages
    Q .. P-1 are hard negatives. sizes: ((layer, dim), ...), the full size last. -> loss, [InfoNCE a size], [KL a size]
    Outside autocast, on float32 embeddings: bfloat16 scores are wrong in the third digit.
    """
    scores = []
    for layer, dim in sizes:
        q, p = queries[layer][:, :dim], passages[layer][:, :dim]    # (Q, D), (P, D): slice first ...
        if similarity == "cosine":
            q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)   # ... then normalise what is left
        scores.append(q @ p.T / temperature)                        # (Q, P)
    target = torch.arange(len(q), device=q.device)                  # (Q,)
    teacher = scores[-1].detach().softmax(-1)                       # (Q, P), detached: it learns nothing from the small
    log_probs = [s.log_softmax(-1) for s in scores]
    nce = [F.nll_loss(s, target) for s in log_probs]
    kl = [F.kl_div(s, teacher, reduction="batchmean") for s in log_probs]   # 0 for the full size
    return (sum(nce) + kl_weight * sum(kl)) / len(sizes), nce, kl


def cached_backward(embed, texts, chunks, loss_of, scale):
    """
    Gradient caching (arXiv 2101.06983): the gradient of the whole batch, all sizes at once, in the memory of a chunk.
    A contrastive loss needs all embeddings, but these are small: embed chunk by chunk without keeping the graphs, take
    the gradient of the loss to the embeddings, then embed every chunk again, with the same dropout, and hand it on.
    embed: texts -> {layer: (B, C)}; chunk k is texts[k::chunks], a share of the queries, positives and negatives alike;
    loss_of: {layer: (B, C)} of the whole batch -> loss, ...; scale: of the gradient scaler. -> what loss_of returns
    """
    random_states, cache = [], {}
    for k in range(chunks):
        random_states.append((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
        with torch.no_grad():
            for layer, tap in embed(texts[k::chunks]).items():
                if layer not in cache:
                    cache[layer] = tap.new_zeros(len(texts), tap.shape[1])   # (B, C)
                cache[layer][k::chunks] = tap
    losses = loss_of({layer: tap.requires_grad_() for layer, tap in cache.items()})
    scale(losses[0]).backward()
    for k, (cpu, cuda) in enumerate(random_states):
        torch.set_rng_state(cpu), torch.cuda.set_rng_state_all(cuda)
        taps = embed(texts[k::chunks])
        torch.autograd.backward(list(taps.values()), [cache[layer].grad[k::chunks] for layer in taps])
    return losses

# ----------------------------------------------------------------------------------------------------------------------


def get_lr(step, max_steps, args):
    """ linear warm-up, then linear decay to 0 """
    warmup_steps = max(1, round(args.warmup * max_steps))
    if step < warmup_steps:
        return args.learning_rate * (step + 1) / warmup_steps
    return args.learning_rate * (max_steps - step) / max(1, max_steps - warmup_steps)


def main(args):
    start = time.time()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    out_dir = Path(args.out_dir)
    device_type = args.device.split(":")[0]

    # data and model; whatever can be wrong with the input shows before anything is written
    if args.retrieval:
        data.Collection(args.retrieval)
        if args.eval_interval:
            data.Collection(f"{args.retrieval}:dev")
    rows = data.load_pairs(args.train_pairs)
    if args.init_from == "scratch":
        print(f"training a WordPiece vocabulary of {args.vocab_size} on the pairs")
        texts = (text for query, positives, negatives in rows for text in [query, *positives, *negatives])
        tokenizer = data.train_wordpiece(texts, args.vocab_size)
        model = Bert(BertConfig(vocab_size=len(tokenizer), hidden_size=args.hidden_size,
                                num_hidden_layers=args.num_layers, num_attention_heads=args.hidden_size // 64,
                                intermediate_size=4 * args.hidden_size,
                                max_position_embeddings=args.max_length,
                                initializer_range=0.01,   # half of BERT's: Adam's steps weigh twice as much
                                hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout))
    else:
        model = from_pretrained(args.init_from, hidden_dropout_prob=args.dropout,
                                attention_probs_dropout_prob=args.dropout)
        tokenizer = data.load_tokenizer(args.init_from)
    config = model.config
    for name in ("query_max_length", "passage_max_length"):
        if getattr(args, name) > config.max_position_embeddings:
            raise ValueError(f"--{name} {getattr(args, name)}: {args.init_from} has {config.max_position_embeddings} "
                             "positions; choose that or less")
    config.sizes = check_sizes(args.sizes or paper_sizes(config), config)
    config.num_hidden_layers = config.sizes[-1][0]
    del model.blocks[config.num_hidden_layers:]            # --sizes 6:128 is a separate model: no layer above 6
    if args.init_from == "scratch" and args.pooling == "mean":
        # The mean over tokens weighs a word by its norm in the dims of a size, but LayerNorm makes all norms equal: so
        # common words put theirs in channels that are not scored. The largest size needs some of these, too: gain 0.
        model.blocks[-1].norm2.weight.data[-config.hidden_size // 6:] = 0
    config.pooling, config.similarity = args.pooling, args.similarity
    tokenizer.model_max_length = min(args.max_length, config.max_position_embeddings)   # evaluate.py reads as much
    layers = [layer for layer, _ in config.sizes]
    model.to(args.device).train()

    pairs = data.tokenize_pairs(rows, tokenizer, args.query_max_length, tokenizer.model_max_length)
    batch_size = min(args.batch_size, len(pairs.queries))
    max_steps = args.max_steps or max(1, round(args.epochs * (len(pairs.queries) // batch_size)))

    # torchrun comes here: init_process_group, rank and world size, gathered embeddings (see README, todos)
    optimizer = model.configure_optimizers(args.learning_rate, args.weight_decay, args.embedding_lr_scale)
    autocast = torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == "float16")
    if args.compile:
        for block in model.blocks:
            block.rest = torch.compile(block.rest, dynamic=True)   # attention's groups differ in every batch

    def embed(texts):
        """ B texts -> {layer: (B, C)}, one pass for all sizes """
        with autocast:
            return model.encode(pack(texts, args.device, multiple=128), layers)

    def loss_of(taps):
        """ {layer: (Q + P, C)} -> loss, [InfoNCE a size], [KL a size] """
        return srl_loss({n: tap[:batch_size] for n, tap in taps.items()},
                        {n: tap[batch_size:] for n, tap in taps.items()},
                        config.sizes, args.similarity, args.temperature, args.kl_weight)

    out_dir.mkdir(parents=True, exist_ok=True)
    versions = {"commit": evaluate.git_commit(), "torch": torch.__version__}
    (out_dir / "args.json").write_text(json.dumps(vars(args) | versions, indent=2) + "\n")
    log_file = open(out_dir / "log.jsonl", "w")
    def log(record):
        print(json.dumps(record), file=log_file, flush=True)
    print(f"{len(pairs.queries):,} pairs, {max_steps} steps of {batch_size} queries; "
          f"sizes {', '.join(map(size_name, config.sizes))}; "
          f"{model.num_params(config.num_hidden_layers) / 1e6:.2f}M parameters; {args.dtype} on {args.device}")

    # the loop
    clock, tokens, losses = time.time(), 0, []
    for step in range(max_steps):
        lr = get_lr(step, max_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        queries, passages = data.srl_batch(pairs, batch_size, args.negatives, args.passage_max_length, args.seed, step)
        texts = queries + passages
        optimizer.zero_grad(set_to_none=True)
        if args.micro_batch:
            chunks = math.ceil(batch_size / args.micro_batch)
            loss, nce, kl = cached_backward(embed, texts, chunks, loss_of, scaler.scale)
        else:
            loss, nce, kl = loss_of(embed(texts))
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()

        tokens += sum(map(len, texts))
        losses.append(torch.stack([loss, *nce, *kl]).detach())         # not read here: that would wait for the GPU
        last = step + 1 == max_steps
        if (step + 1) % args.log_interval == 0 or last:
            means = torch.stack(losses).mean(0).tolist()
            nce, kl = means[1:len(layers) + 1], means[len(layers) + 1:]
            if not math.isfinite(means[0]):
                raise FloatingPointError(f"step {step + 1}: the loss is {means[0]}, InfoNCE per size {nce}; nothing "
                                         "was saved. Try a lower --learning_rate, or --dtype float32")
            seconds = (time.time() - clock) / len(losses)
            rate = tokens / len(losses) / seconds
            log({"step": step + 1, "loss": means[0], "nce": nce, "kl": kl, "learning_rate": lr, "norm": norm.item(),
                 "ms": 1000 * seconds, "tokens_per_second": rate, "seconds": time.time() - start})
            print(f"step {step + 1}/{max_steps} | loss {means[0]:.3f} | {size_name(config.sizes[0])} {nce[0]:.3f} | "
                  f"{size_name(config.sizes[-1])} {nce[-1]:.3f} | lr {lr:.1e} | norm {norm:.2f} | "
                  f"{1000 * seconds:.0f} ms | {rate / 1000:.1f}k tok/s | "
                  f"eta {(max_steps - step - 1) * seconds / 60:.1f}m", flush=True)
            clock, tokens, losses = time.time(), 0, []
        if args.retrieval and args.eval_interval and (step + 1) % args.eval_interval == 0 and not last:
            pause = time.time()
            results, _ = evaluate.retrieval(model, tokenizer, f"{args.retrieval}:dev", config.sizes, args.dtype)
            log({"step": step + 1, "dev": results})
            print(f"step {step + 1}/{max_steps} | dev MRR@10 | " + " | ".join(
                f"{r['layer']}:{r['dim']} {r['value']:.3f}" for r in results if r["metric"] == "MRR@10" and r["layer"]))
            clock += time.time() - pause

    save_pretrained(model, tokenizer, out_dir)
    print(f"saved {out_dir}")
    if args.retrieval:
        evaluate.main(evaluate.parse_args([args.out_dir, "--retrieval", args.retrieval, "--speed",
                                           "--device", args.device, "--dtype", args.dtype]))
    print(f"{(time.time() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:   # the user's mistakes: one line, no traceback
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
