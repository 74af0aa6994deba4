"""
Pre-train one BERT encoder so that every size has learnt to sum up a text: SMAE, Starbucks Masked Autoencoding.

    python pretrain_smae.py                       # the docs of this machine, scratch; 21 minutes on 2 cores with AMX
    python pretrain_smae.py --objective mlm       # the control: plain masked language modelling on the same tokens
    python pretrain_smae.py --train_text my_text.txt.gz --out_dir out/mine          # a line is a document
    torchrun --nproc_per_node 8 pretrain_smae.py --init_from bert-base-uncased --streaming \\
        --train_text HuggingFaceFW/fineweb:sample-100BT --max_length 512 --batch_size 512 --micro_batch 32 \\
        --max_steps 291000 --learning_rate 1e-4 --dropout 0.1      # the run of the paper, 8 GPUs, not measured here

What comes out: OUT_DIR with an ordinary Hugging Face BertForMaskedLM, which finetune_srl.py --init_from takes as it is,
training_state.pt (the decoder is in there) for --resume, log.jsonl and args.json.
Method: arXiv 2410.13230. Both halves of the loss are in smae_loss below.

Shapes: B texts, N tokens of a pack, C channels, S sizes (n layers, d dims), M masked positions, V vocabulary
"""
import argparse
import copy
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from evaluate import git_commit
from finetune_srl import HelpFormatter
from model import (Bert, BertConfig, MLMHead, check_sizes, dropout, fast_dtype, from_pretrained,
                   keep_freed_memory, load_head, pack, paper_sizes, parse_sizes, save_pretrained, size_name)

HELD_OUT = 500          # documents that are never trained on: the validation loss
PIECE = 1024            # rows of logits at a time: 48 MB in float32 and bfloat16 with 8,192 words, 187 MB with 30,522
COUNTED = 10_000_000    # tokens, at most, that the frequencies of the words are taken from
VOCABULARY = 200_000    # documents, at most, that a vocabulary is trained on


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    group.add_argument("--train_text", default="docs",
                       help="docs, a .txt (a line is a document), .jsonl or .parquet file (column text), or "
                            "NAME[:CONFIG][:SPLIT] of the hub; tokenised once into a memory-mapped file")
    group.add_argument("--streaming", action=flag, default=False,
                       help="read parquet and hub sets as they arrive, in their order; every rank has files of its own")
    group.add_argument("--max_length", type=int, default=64,
                       help="tokens, [CLS] and [SEP] included: one random window a document")
    group.add_argument("--batch_size", type=int, default=32, help="documents a step, over all ranks")
    group.add_argument("--micro_batch", type=int, default=0,
                       help="documents at a time, by which memory goes; pieces of a batch are spread over the ranks; 0 "
                            "is one piece a rank")

    group = parser.add_argument_group("model")
    group.add_argument("--init_from", default="scratch", help="scratch, a folder, or a BERT of the hub")
    group.add_argument("--sizes", type=parse_sizes,
                       help="LAYER:DIM,... trained together; by default the paper's six in proportion to the model, "
                            "and the full one alone with --objective mlm")
    group.add_argument("--dropout", type=float, default=0.0, help="in the hidden layers and the attention")
    group.add_argument("--num_layers", type=int, default=6, help="blocks, from scratch")
    group.add_argument("--hidden_size", type=int, default=192, help="channels, from scratch: a multiple of 64")
    group.add_argument("--vocab_size", type=int, default=8192, help="WordPiece vocabulary, from scratch")
    group.add_argument("--embedding_lr_scale", type=float, default=3.0,
                       help="learning rate of the word embeddings over that of the rest, from scratch: a word is rarer "
                            "than a block")

    group = parser.add_argument_group("loss")
    group.add_argument("--objective", choices=["smae", "mlm"], default="smae",
                       help="mlm leaves the decoder out: MLM alone, at --sizes")
    group.add_argument("--encoder_mask", type=float, default=0.2, help="share of the tokens hidden from the encoder")
    group.add_argument("--decoder_mask", type=float, default=0.4, help="share hidden from the decoder")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=float, default=1e-3, help="peak, of AdamW")
    group.add_argument("--warmup", type=float, default=0.05,
                       help="share of the steps in which the rate rises; then it falls to 0 as a cosine")
    group.add_argument("--weight_decay", type=float, default=0.001, help="on the matrices alone")
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    group.add_argument("--epochs", type=float, default=6, help="windows a document")
    group.add_argument("--max_steps", type=int, default=0, help="steps in place of --epochs; 0 goes by --epochs")
    group.add_argument("--seed", type=int, default=1, help="of weights, order, windows, masks and dropout")

    group = parser.add_argument_group("system")
    group.add_argument("--out_dir", default="out/smae", help="where model, training state and log go")
    group.add_argument("--overwrite", action=flag, default=False, help="replace the run that is in --out_dir")
    group.add_argument("--resume", action=flag, default=False, help="go on with the run in --out_dir, exactly")
    group.add_argument("--log_interval", type=int, default=10, help="steps between two lines of the log")
    group.add_argument("--eval_interval", type=int, default=200,
                       help="steps between two checkpoints, each with the loss on held-out text; 0 for the end only")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=fast_dtype(),
                       help="of the matrix products (autocast); the weights stay float32")
    group.add_argument("--compile", action=flag, default=torch.cuda.is_available(),
                       help="torch.compile all of a block but attention; takes a minute to start")
    group.add_argument("--gradient_checkpointing", action=flag, default=False,
                       help="least memory: compute the inside of blocks and decoder again in backward, and give freed "
                            "memory back; BERT-base then takes 1.6 times as long a step")

    args = parser.parse_args(argv)
    for name in ("max_length", "batch_size", "num_layers", "hidden_size", "learning_rate", "epochs", "log_interval",
                 "embedding_lr_scale"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    for name in ("micro_batch", "weight_decay", "grad_clip", "max_steps", "eval_interval"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must be 0 or more")
    for name in ("warmup", "dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be 0 or more and below 1")
    if not 0 < args.encoder_mask <= args.decoder_mask < 1:
        parser.error(f"--encoder_mask {args.encoder_mask} --decoder_mask {args.decoder_mask}: shares between 0 and 1, "
                     "the encoder's not above the decoder's, whose mask contains it")
    if args.max_length < 8:
        parser.error(f"--max_length {args.max_length}: too short to mask; use 8 or more")
    if args.hidden_size % 64:
        parser.error(f"--hidden_size {args.hidden_size}: must be a multiple of 64, the width of an attention head")
    if args.vocab_size < 100:
        parser.error(f"--vocab_size {args.vocab_size}: too few to spell English; use 100 or more")
    if args.streaming and not args.max_steps:
        parser.error("--streaming does not know how long the text is; give --max_steps")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    run = Path(args.out_dir) / "training_state.pt"
    if run.exists() and not (args.overwrite or args.resume):
        parser.error(f"--out_dir {args.out_dir} holds a run; add --resume or --overwrite, or choose another folder")
    if args.resume and not run.exists():
        parser.error(f"--resume: there is no {run}; leave --resume out to begin a run")
    return args

# ----------------------------------------------------------------------------------------------------------------------
# the method


class SMAE(nn.Module):
    """ What is trained: encoder, MLM head, and a decoder of one layer that is not needed afterwards. """

    def __init__(self, bert, head):
        super().__init__()
        self.bert, self.head = bert, head
        self.decoder = copy.deepcopy(bert.blocks[0])


def smae_loss(model, batch, masked, sizes, objective="smae"):
    """
    L = mean over sizes (n, d) of (MLM + MAE) / 2, with h_n the encoder's tap at layer n:
      MLM = CE( V transform_d(h_n[:, :d]), what the encoder's mask hides )
      MAE = CE( V transform_C( decoder([ transform_d(h_n[CLS, :d]), embeddings[1:] ]) ), what the decoder's mask hides )
    The decoder hears of the encoder through position 0 alone, while 40 % of its own input is hidden: it can only do
    well if d numbers of layer n say what the text is about. One head and one decoder for all sizes.
    batch, masked: the Pack and the Masked of the same texts. -> loss, [CE], [accuracy]: S MLM losses, then S MAE losses
    """
    bert, transform = model.bert, model.head.transform
    to = lambda array: torch.from_numpy(array).to(batch.input_ids.device, non_blocking=True)
    shown = lambda ids: batch._replace(input_ids=F.pad(to(ids), (0, len(batch.input_ids) - len(ids))))   # fillers: 0
    encoder_masked, decoder_masked = to(masked.encoder_masked), to(masked.decoder_masked)       # (M,), (M',)

    # encode
    taps = bert(shown(masked.encoder_ids), [n for n, _ in sizes])                               # S x (N, C)
    hidden = [transform(h[encoder_masked, :d]) for h, (_, d) in zip(taps, sizes)]               # S x (M, C)
    labels = [batch.input_ids[encoder_masked]] * len(sizes)
    if objective == "smae":
        # bottleneck
        bottleneck = torch.stack([transform(h[batch.starts, :d]) for h, (_, d) in zip(taps, sizes)])   # (S, B, C)
        # decode
        embeddings = bert.embed(shown(masked.decoder_ids))                                             # (N, C)
        decoded = bert.run(decode, model.decoder, embeddings, bottleneck, batch, decoder_masked)       # S x (M', C)
        hidden += transform(decoded)
        labels += [batch.input_ids[decoder_masked]] * len(sizes)
    # loss: all rows in one call, each weighted so that the sum is the mean over terms of the mean over positions
    rows = [len(part) for part in labels]
    weights = torch.cat([bert.word.weight.new_full((n,), 1 / (len(rows) * max(1, n))) for n in rows])
    loss, ce, hit = VocabularyLoss.apply(torch.cat(hidden), bert.word.weight, model.head.bias, torch.cat(labels),
                                         weights, torch.is_grad_enabled())
    mean = lambda x: torch.stack([part.sum() / max(1, len(part)) for part in x.split(rows)])
    return loss, mean(ce), mean(hit.float())


def decode(decoder, embeddings, bottleneck, batch, positions):
    """
    The decoder's S inputs, [bottleneck, embeddings[1:]] each, differ at position 0 alone, and only what comes out at
    the M masked positions is used. So attention among the rest is computed once for all sizes, and each size then mixes
    in its bottleneck by the share it has in the softmax. With scores s_0 of the bottleneck and s_j of the rest that is
        softmax(s)_0 = exp s_0 / (exp s_0 + sum_j exp s_j) = sigmoid(s_0 - logsumexp_j s_j)
    embeddings (N, C), bottleneck (S, B, C), positions (M,) -> (S, M, C)
    """
    layer, H, p = decoder.attention, decoder.attention.heads, decoder.attention.p if decoder.training else 0.0
    (N, C), S = embeddings.shape, len(bottleneck)
    qkv = layer.qkv(embeddings).view(N, 3, H, C // H)
    k0, v0 = F.linear(bottleneck, layer.qkv.weight[C:], layer.qkv.bias[C:]).view(S, -1, 2, H, C // H).unbind(2)
    q0, text_ids = qkv[positions, 0], batch.text_ids[positions]                     # (M, H, D), (M,)
    with torch.autocast(embeddings.device.type, enabled=False):
        rest, logsumexp = [], []
        for (B, T), part in zip(batch.groups, qkv.split([B * T for B, T in batch.groups])):
            q, k, v = part.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4).to(       # (B, H, T, D) each
                torch.promote_types(qkv.dtype, torch.float32), memory_format=torch.contiguous_format)
            scores = q * q.shape[-1]**-0.5 @ k[:, :, 1:].transpose(-1, -2)           # (B, H, T, T-1)
            mixed = dropout(scores.softmax(-1), p) @ v[:, :, 1:]                     # (B, H, T, D)
            rest.append(mixed.transpose(1, 2).reshape(B * T, H, C // H))
            logsumexp.append(scores.logsumexp(-1).transpose(1, 2).reshape(B * T, H, 1))
        rest, logsumexp = torch.cat(rest)[positions], torch.cat(logsumexp)[positions]   # (M, H, D), (M, H, 1)
        s0 = (q0 * k0[:, text_ids]).sum(-1, keepdim=True, dtype=rest.dtype) * q0.shape[-1]**-0.5   # (S, M, H, 1)
        share = (s0 - logsumexp).sigmoid()
        mixed = (1 - share) * rest + dropout(share, p) * v0[:, text_ids]                # (S, M, H, D)
    return decoder.rest(embeddings[positions], layer.out(mixed.flatten(2)))


class VocabularyLoss(torch.autograd.Function):
    """
    hidden (M, C), weight (V, C), bias (V,), labels (M,), row_weights (M,) -> sum of row_weights * CE, CE (M,), hit (M,)
    training: whether gradients are wanted; torch does not tell forward that it runs under no_grad.
    The logits (M, V) never exist as a whole: a piece is multiplied out, turned into its own gradient on the spot and
    overwritten by the next. That takes the three products that any backward needs, where checkpointing takes four.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, row_weights, training):
        device, dtype = hidden.device, hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, enabled=False):
            x, w = hidden.to(dtype), weight.to(dtype)
            ce, hit = torch.empty_like(row_weights), torch.empty_like(labels, dtype=torch.bool)
            ctx.grads = [torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)] if training else []
            size = min(PIECE, max(1, len(x)))
            # buffers, because fresh memory of this size costs a CPU as much time as the product that fills it
            low, full, grad_w = x.new_empty(size, len(w)), weight.new_empty(size, len(w)), torch.empty_like(w)
            for i in range(0, len(x), size):
                rows = slice(i, i + size)
                xs, ys = x[rows], labels[rows, None]
                logits = full[:len(xs)].copy_(torch.mm(xs, w.T, out=low[:len(xs)])).add_(bias)
                top, true = logits.amax(1), logits.gather(1, ys)[:, 0]
                p = torch.softmax(logits, 1, out=logits)
                ce[rows] = top - true - p.amax(1).log()                 # log sum exp = top - log p(top)
                hit[rows] = true == top
                if training:
                    p.scatter_add_(1, ys, torch.full_like(ys, -1, dtype=p.dtype)).mul_(row_weights[rows, None])
                    ctx.grads[2] += p.sum(0)
                    g = low[:len(xs)].copy_(p)                          # (m, V) gradient of the logits
                    torch.mm(g, w, out=ctx.grads[0][rows])
                    ctx.grads[1] += torch.mm(g.T, xs, out=grad_w)
        ctx.mark_non_differentiable(ce, hit)
        return (ce * row_weights).sum(), ce, hit

    @staticmethod
    def backward(ctx, grad, *_):
        grads = [g.mul_(grad.to(g.dtype)) for g in ctx.grads]   # in place: backward runs once
        del ctx.grads   # else the loss keeps them alive, and torch copies what it could take over
        return *grads, None, None, None

# ----------------------------------------------------------------------------------------------------------------------


def arithmetic(config, sizes, objective, B, N, M, M_decoder):
    """ floating-point operations of a training step: matrix products, forward and backward, without attention's """
    C, I, V, S = config.hidden_size, config.intermediate_size, config.vocab_size, len(sizes)
    products = N * sizes[-1][0] * (4 * C * C + 2 * C * I) + M * sum(C * d + V * C for _, d in sizes)
    if objective == "smae":
        products += (3 * N + 2 * S * B) * C * C + B * sum(C * d for _, d in sizes)    # decoder's qkv, bottlenecks
        products += S * M_decoder * (C * C + 2 * C * I + C * C + V * C)               # the rest of it, head
    return 6 * products


def matmul_peak(device, dtype, n=2048):
    """ floating-point operations a second of an (n, n) product, the best of five """
    a, best = torch.randn(n, n, device=device, dtype=getattr(torch, dtype)), math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()   # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def get_lr(step, max_steps, args):
    """ linear warm-up, then a cosine to 0 """
    warmup_steps = max(1, round(args.warmup * max_steps))
    if step < warmup_steps:
        return args.learning_rate * (step + 1) / warmup_steps
    return args.learning_rate * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps))) / 2


def check_resumed(args, saved):
    """ Raises ValueError when a flag that decides what is computed is not what it was. """
    free = {"out_dir", "overwrite", "resume", "log_interval", "device", "compile"}
    for name, value in vars(args).items():
        if name not in free and saved.get(name, value) != value:   # a newer flag is in no older run
            raise ValueError(f"--resume: --{name} is {value}, and the run in {args.out_dir} had {saved[name]}; give "
                             "the flags it was begun with, or begin another with --init_from")


def main(args):
    start = time.time()
    keep_freed_memory(not args.gradient_checkpointing)
    torch.manual_seed(args.seed)
    out_dir = Path(args.out_dir)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun sets them
    if world_size > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    device_type = args.device.split(":")[0]

    # model
    saved = torch.load(out_dir / "training_state.pt", map_location="cpu") if args.resume else None
    if args.resume:
        check_resumed(args, saved["args"])
    init_from = args.out_dir if args.resume else args.init_from
    if init_from == "scratch":
        print(f"training a WordPiece vocabulary of {args.vocab_size} on the text")
        texts = itertools.islice(data.load_texts(args.train_text, args.streaming), VOCABULARY)
        tokenizer = data.train_wordpiece(texts, args.vocab_size)
        bert = Bert(BertConfig(vocab_size=len(tokenizer), hidden_size=args.hidden_size,
                               num_hidden_layers=args.num_layers, num_attention_heads=args.hidden_size // 64,
                               intermediate_size=4 * args.hidden_size,
                               max_position_embeddings=max(512, args.max_length),   # fine-tuning may read more
                               hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout))
        head = MLMHead(bert.config)
    else:
        bert = from_pretrained(init_from, hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout)
        tokenizer, head = data.load_tokenizer(init_from), load_head(init_from, bert.config)
    config = bert.config
    if args.max_length > config.max_position_embeddings:
        raise ValueError(f"--max_length {args.max_length}: {init_from} has {config.max_position_embeddings} positions; "
                         "choose that or less")
    full = (config.num_hidden_layers, config.hidden_size)
    sizes = check_sizes(args.sizes or (paper_sizes(config) if args.objective == "smae" else (full,)), config)
    config.sizes = sizes if args.objective == "smae" else ()
    tokenizer.model_max_length = args.max_length
    model = SMAE(bert, head).to(args.device).train()
    bert.gradient_checkpointing = args.gradient_checkpointing
    if (Path(init_from) / "training_state.pt").exists():   # further pre-training goes on with its decoder
        earlier = saved or torch.load(Path(init_from) / "training_state.pt", map_location="cpu")
        model.load_state_dict(earlier["model"])

    # text
    micro_batch = args.micro_batch or args.batch_size // world_size
    pieces = args.batch_size // micro_batch
    if micro_batch == 0 or args.batch_size % micro_batch or pieces % world_size:
        raise ValueError(f"--batch_size {args.batch_size} --micro_batch {args.micro_batch}: {world_size} ranks cannot "
                         "share pieces of that size equally; choose a batch that is a multiple of both")
    first_step = saved["step"] if args.resume else 0
    if args.streaming:
        stream = data.tokenize_documents(data.load_texts(args.train_text, True, rank, world_size), tokenizer)
        held_out = list(itertools.islice(stream, HELD_OUT))
        next(itertools.islice(stream, first_step * args.batch_size // world_size, None), None)   # read before
        def documents(step, piece):
            if len(found := list(itertools.islice(stream, micro_batch))) < micro_batch:
                raise ValueError(f"--train_text {args.train_text} ended at step {step}; choose fewer --max_steps")
            return found
        max_steps = args.max_steps
    else:
        if rank > 0:
            dist.barrier()   # until rank 0 has written the file
        text = data.token_file(args.train_text, tokenizer)
        if rank == 0 and world_size > 1:
            dist.barrier()
        split = np.random.default_rng(0).permutation(len(text))
        held_out, train = np.split(split, [min(HELD_OUT, (len(text) + 9) // 10)])
        held_out = [text[i] for i in held_out]
        if args.batch_size > len(train):
            raise ValueError(f"--batch_size {args.batch_size}: {args.train_text} has {len(train)} documents to train "
                             "on; choose that or less")
        steps = len(train) // args.batch_size
        def documents(step, piece):
            epoch, i = divmod(step, steps)
            i = i * args.batch_size + piece * micro_batch
            return [text[k] for k in train[data.epoch_order(len(train), args.seed, epoch)[i:i + micro_batch]]]
        max_steps = args.max_steps or max(1, round(args.epochs * steps))
        if init_from == "scratch":
            # The bias says how frequent a word is. Else the embeddings have to: all rare ones then move to one side,
            # until they are hard to tell apart (see results/README.md).
            ids = text.tokens[:COUNTED] & (np.iinfo(text.tokens.dtype).max >> 1)   # without the bit
            counts = np.bincount(ids, minlength=len(tokenizer)) + 1
            with torch.no_grad():
                head.bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))

    # optimizer
    trained = {name: p for name, p in model.named_parameters() if args.objective == "smae" or "decoder" not in name}
    rest = [p for name, p in trained.items() if name != "bert.word.weight"]
    scale = args.embedding_lr_scale if args.init_from == "scratch" else 1.0
    groups = [{"params": [bert.word.weight], "weight_decay": args.weight_decay, "scale": scale},
              {"params": [p for p in rest if p.dim() >= 2], "weight_decay": args.weight_decay, "scale": 1.0},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "scale": 1.0}]
    trained = list(trained.values())
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == "float16")
    autocast = torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != "float32",
                              cache_enabled=not args.gradient_checkpointing)   # a cached cast lives until forward ends
    if args.resume:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    if args.compile:
        for block in [*bert.blocks, model.decoder]:
            block.rest = torch.compile(block.rest, dynamic=True)

    peak = matmul_peak(args.device, args.dtype)
    rates = (args.encoder_mask, args.decoder_mask)
    names = [f"mlm {size_name(size)}" for size in sizes]
    names += [f"mae {size_name(size)}" for size in sizes] if args.objective == "smae" else []
    log_file = None
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        versions = {"commit": git_commit(), "torch": torch.__version__}
        (out_dir / "args.json").write_text(json.dumps(vars(args) | versions, indent=2) + "\n")
        kept = (out_dir / "log.jsonl").read_text().splitlines(keepends=True) if args.resume else []
        log_file = open(out_dir / "log.jsonl", "w")   # without the steps behind the checkpoint, which come again
        log_file.writelines(line for line in kept if json.loads(line)["step"] <= first_step)
        print(f"{args.objective}, {max_steps - first_step} steps of {args.batch_size} documents; sizes "
              f"{', '.join(map(size_name, sizes))}; {sum(p.numel() for p in trained) / 1e6:.2f}M parameters; "
              f"{args.dtype} on {args.device}, whose matrix products reach {peak / 1e12:.2f} TFLOP/s")

    def log(record, line):
        if rank == 0:
            print(json.dumps(record), file=log_file, flush=True)
            print(line, flush=True)

    def save(step):
        if rank == 0:
            save_pretrained(bert, tokenizer, out_dir, head)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                     "step": step, "args": vars(args)}
            torch.save(state, out_dir / "training_state.pt.part")
            os.replace(out_dir / "training_state.pt.part", out_dir / "training_state.pt")   # never half a state

    def loss_of(documents, seed):
        """ -> smae_loss, number of tokens, arithmetic of the step """
        masked = data.smae_batch(documents, args.max_length, rates, tokenizer, seed)
        batch = pack(masked.texts, args.device, multiple=128)
        with autocast:
            found = smae_loss(model, batch, masked, sizes, args.objective)
        N, M = len(masked.encoder_ids), len(masked.encoder_masked)
        return found, N, arithmetic(config, sizes, args.objective, len(documents), N, M, len(masked.decoder_masked))

    def validate():
        """ -> mean CE and accuracy of every term on the held-out documents, the same windows and masks every time """
        model.eval()
        with torch.no_grad():
            found = [loss_of(held_out[i:i + 50], [0, i])[0] for i in range(0, len(held_out), 50)]
        model.train()
        return (torch.stack([f[k] for f in found]).mean(0).tolist() for k in (1, 2))

    # the loop
    clock, tokens, operations, losses = time.time(), 0, 0, []
    for step in range(first_step, max_steps):
        lr = get_lr(step, max_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.zero_grad(set_to_none=True)
        for piece in range(rank, pieces, world_size):
            torch.manual_seed(hash((args.seed, step, piece)))   # of dropout: no random state has to be saved to resume
            (loss, ce, hit), N, flops = loss_of(documents(step, piece), [args.seed, step, piece])
            scaler.scale(loss / pieces).backward()
            losses.append(torch.cat([loss[None], ce, hit]).detach())   # not read here: that would wait for the GPU
            tokens, operations = tokens + N * world_size, operations + flops
        if world_size > 1:
            for p in trained:
                if p.grad is not None:   # blocks above the largest size have none
                    dist.all_reduce(p.grad)   # the sum over pieces, wherever they were computed
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()

        last = step + 1 == max_steps
        if (step + 1) % args.log_interval == 0 or last:
            means = torch.stack(losses).mean(0)
            if world_size > 1:
                dist.all_reduce(means)
                means /= world_size
            loss, *means = means.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {step + 1}: the loss is {loss}, per term {dict(zip(names, means))}; "
                                         f"the last checkpoint is in {out_dir}. Try a lower --learning_rate, or "
                                         "--dtype float32")
            ce, accuracy = dict(zip(names, means)), dict(zip(names, means[len(names):]))
            seconds = time.time() - clock
            steps_done = len(losses) // (pieces // world_size)
            log({"step": step + 1, "loss": loss, "ce": ce, "accuracy": accuracy, "learning_rate": lr,
                 "norm": norm.item(), "ms": 1000 * seconds / steps_done, "tokens_per_second": tokens / seconds,
                 "share_of_peak": operations / seconds / peak, "seconds": time.time() - start},
                f"step {step + 1}/{max_steps} | loss {loss:.3f} | "
                + " | ".join(f"{name} {ce[name]:.2f} acc {accuracy[name]:.2f}" for name in (names[0], names[-1]))
                + f" | lr {lr:.1e} | norm {norm:.2f} | {1000 * seconds / steps_done:.0f} ms | "
                f"{tokens / seconds / 1000:.1f}k tok/s | {operations / seconds / peak:.0%} of peak | "
                f"eta {(max_steps - step - 1) * seconds / steps_done / 60:.1f}m")
            clock, tokens, operations, losses = time.time(), 0, 0, []
        if args.eval_interval and (step + 1) % args.eval_interval == 0 or last:
            pause = time.time()
            ce, accuracy = validate()
            log({"step": step + 1, "val_loss": sum(ce) / len(ce), "val_ce": dict(zip(names, ce)),
                 "val_accuracy": dict(zip(names, accuracy))},
                f"step {step + 1}/{max_steps} | validation loss {sum(ce) / len(ce):.3f} | " + " | ".join(
                    f"{name} {c:.2f} acc {a:.2f}" for name, c, a in zip(names, ce, accuracy)))
            save(step + 1)
            clock += time.time() - pause
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        print(f"saved {out_dir}; {(time.time() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:   # the user's mistakes: one line, no traceback
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
