r"""
Fine-tune one BERT encoder so that it is good at every size: SRL, Starbucks Representation Learning.

    python finetune_srl.py                                       # six sizes from scratch; 5 to 11 minutes with bfloat16
    python finetune_srl.py --sizes 6:192 --out_dir out/full      # one size alone, here the ordinary full-size model
    python finetune_srl.py --train_pairs my_pairs.csv --out_dir out/mine      # columns query, positive, negative...
    python finetune_srl.py --init_from bert-base-uncased --train_pairs sentence-transformers/all-nli:triplet \
        --learning_rate 5e-5 --temperature 0.05 --weight_decay 0 --dropout 0.1 --epochs 1 --out_dir out/nli

Writes to OUT_DIR an ordinary Hugging Face model, args.json, log.jsonl and, where there is a test set, eval.json and a
model card, README.md; until it ends also training_state.pt, for --resume.
Paper: arXiv 2410.13230. srl_loss is its fine-tuning loss; the README lists the known differences.
"""
import argparse, math, os, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import evaluate
from model import (POOLINGS, SIMILARITIES, STATE, HelpFormatter, autocast, average, catch_signals, check_about,
                   check_finite, check_out_dir, check_sizes, configure_optimizer, default_signals, full_size, get_lr,
                   interrupted, keep_freed_memory, load_model, load_run, log, named_sizes, new_bert, nonneg_float,
                   nonneg_int, open_run, pack, permute_channels, positive_float, positive_int, readable, run_script,
                   save_run, score, set_sizes, size_name, start_ranks, status, sum_over_ranks, text_length,
                   training_flags)

# ---- the method ------------------------------------------------------------------------------------------------------
# Q queries, P passages, C channels; a size is (layer, dim)

def srl_loss(queries, passages, sizes, similarity, temperature, kl_weight, teacher_scores=None, gold=None, same=None):
    """ L = mean over sizes of [ InfoNCE(s) + kl_weight * KL(softmax(s_full) || softmax(s)) ]
    with the scores s = sim(q, p) / temperature.
    queries {layer: (Q, C)}, passages {layer: (P, C)}: embeddings of every layer that has a size. Passage i < Q is the
    positive of query i; passages from Q on are hard negatives. All passages but i are the negatives of query i, except
    where same (Q, P) is True, see data.duplicates. sizes: (layer, dim) pairs from small to large; the last, the full
    size, is the teacher.
    teacher_scores (Q, P): a frozen model takes the place of s_full. gold (Q,): how similar query i and passage i are;
    CoSENT then replaces InfoNCE, and the KL stays.
    Call it outside autocast: bfloat16 scores would be wrong in the third digit.
    -> loss, {size name: InfoNCE or CoSENT}, {size name: KL} """
    full = max(layer for layer, _ in sizes), max(dim for _, dim in sizes)
    assert sizes[-1] == full, f"no full size (deepest layer, widest dim) last: {sizes}"
    scores = {size_name((layer, dim)): score(queries[layer], passages[layer], dim, similarity) / temperature
              for layer, dim in sizes}                             # (Q, P) each
    if teacher_scores is None:
        teacher_scores = scores[size_name(full)].detach()   # detached: the full size must not move towards the others
    if same is not None:                              # -1e9 gives probability 0; -inf would make the KL NaN
        teacher_scores = teacher_scores.masked_fill(same, -1e9)
        scores = {name: s.masked_fill(same, -1e9) for name, s in scores.items()}
    teacher_probs = teacher_scores.softmax(-1)                                          # (Q, P)
    nce, kl = {}, {}                                  # by size name; nce holds CoSENT where there is gold
    for name, s in scores.items():
        log_probs = s.log_softmax(-1)                                                   # (Q, P)
        nce[name] = info_nce(log_probs) if gold is None else cosent(s.diagonal(), gold)
        kl[name] = kl_divergence(teacher_probs, log_probs)              # 0 where a size is its own teacher
    return (sum(nce.values()) + kl_weight * sum(kl.values())) / len(nce), nce, kl

def info_nce(log_probs):
    """ (Q, P) log-probabilities of the passages -> mean of -log p(positive): from queries to passages, not back """
    target = torch.arange(len(log_probs), device=log_probs.device)   # (Q,) 0 1 2 ...: passage i is query i's positive
    return F.nll_loss(log_probs, target)

def kl_divergence(teacher_probs, log_probs):
    """ (Q, P) probabilities of the teacher, (Q, P) log-probabilities of a size -> mean KL(teacher || size) """
    return F.kl_div(log_probs, teacher_probs, reduction="batchmean")   # torch's order: student, teacher

def cosent(scores, gold):
    """ (Q,) scores of pairs of texts, (Q,) their gold scores -> log(1 + sum of exp(s_j - s_i) over all i, j with
    gold_i > gold_j): every pair should score above those that are less similar. (CoSENT, kexue.fm/archives/8847) """
    difference = scores[None, :] - scores[:, None]                                      # (Q, Q), s_j - s_i
    wrong = difference[gold[:, None] > gold[None, :]]                                   # (pairs of pairs,)
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(0)

def step_sizes(method, sizes, seed, step):
    """ The sizes that one step trains, the full size last. The methods differ in nothing else here: all have InfoNCE
    and KL at each of these sizes.
    srl     the same few sizes in every step
    2dmse   2D Matryoshka (arXiv 2402.14776): draw any layer below the full one, and a smaller dim of --sizes; train
            all four combinations of these two with the full layer and the full dim. In time every layer is trained
            with every dim, most pairs rarely. """
    if method == "srl":
        return sizes
    full_layer, full_dim = sizes[-1]
    rng = np.random.default_rng([seed, step, data.SIZE_SEED])
    layer = int(rng.integers(1, full_layer))                                 # 1 ... full_layer - 1
    dim = int(rng.choice(sorted({dim for _, dim in sizes} - {full_dim})))
    return (layer, dim), (layer, full_dim), (full_layer, dim), (full_layer, full_dim)

# ---- one step --------------------------------------------------------------------------------------------------------
def train_step(model, teacher, batch, sizes, args, step, pieces=1, rank=0, world_size=1):
    """ Batch -> what srl_loss returns. Adds to the gradients of the parameters. step: decides the dropout. pieces: into
    how many parts the batch is split, because of --micro_batch or several processes (rank of world_size); see
    cached_backward """
    token_ids = batch.queries + batch.passages            # of Q + P texts, (T,) each
    Q, layers = len(batch.queries), sorted({layer for layer, _ in sizes})
    teacher_scores = frozen_scores(teacher, token_ids, Q, args) if teacher else None                  # (Q, P)
    def to_device(array):
        return None if array is None else torch.from_numpy(array).to(args.device)
    def embed(texts):                                     # B of the token_ids -> {layer: (B, C)}
        with autocast(args.device, args.dtype):
            return model.encode(pack(texts, args.device, multiple=128), layers)
    def loss_of(embeddings):                              # {layer: (Q + P, C)}, the queries first
        query_rows = {layer: rows[:Q] for layer, rows in embeddings.items()}
        passage_rows = {layer: rows[Q:] for layer, rows in embeddings.items()}
        return srl_loss(query_rows, passage_rows, sizes, model.config.similarity, args.temperature, args.kl_weight,
                        teacher_scores, to_device(batch.gold), to_device(batch.same))
    # The usual case: embed all texts at once, loss, backward. Otherwise cached_backward gives the gradient in pieces.
    if pieces == 1:
        # Dropout by seed, step and piece (here the only one, 0), so runs can resume. A hash of integers, unlike one of
        # strings, is always the same.
        torch.manual_seed(hash((args.seed, step, 0)))
        loss, nce, kl = loss_of(embed(token_ids))
        loss.backward()
        return loss, nce, kl
    return cached_backward(embed, token_ids, loss_of, pieces, (args.seed, step), rank, world_size)

def frozen_scores(teacher, token_ids, Q, args):
    """ Q queries, then P passages -> (Q, P): the scores of --teacher at its full size, divided by the temperature """
    layer, dim = full_size(teacher.config)
    rows = evaluate.embed_ids(teacher, token_ids, [layer], args.dtype)[layer].to(args.device)        # (Q + P, C)
    return score(rows[:Q], rows[Q:], dim, teacher.config.similarity) / args.temperature

# ==== Below is the training around the method =========================================================================
# Read main first: it calls build_model, plan, order_channels and load_teacher, then for each step srl_batch and
# train_step, and evaluate_saved at the end. cached_backward is for --micro_batch and several ranks only.
def cached_backward(embed, token_ids, loss_of, pieces, seed, rank=0, world_size=1):
    """ The gradient of loss_of(embed(token_ids))[0].backward(), for several processes, or for a batch that is too large
    for the memory. The loss is that of the whole batch: the passages of all ranks are negatives. The texts of a batch
    depend on each other only through their embeddings (gradient caching, arXiv 2101.06983), so
      1. embed the pieces of the batch that are this rank's, and gather the embeddings of all ranks;
      2. compute the loss and its gradient with respect to the embeddings, the same on every rank;
      3. backpropagate each piece's rows of that gradient. The caller then sums the parameters' gradients over ranks.
    The activations of several pieces would fill the memory, so step 1 keeps no graph and step 3 embeds again. Piece k
    is token_ids[k::pieces]; its dropout is drawn from (*seed, k), the same in both passes and on any number of ranks.
    embed: list of B (T,) ids -> {layer: (B, C)}. loss_of: {layer: (B, C)} of all -> (loss, ...), which is returned. """
    def embed_piece(k):
        torch.manual_seed(hash((*seed, k)))
        return embed(token_ids[k::pieces])
    mine = range(rank, pieces, world_size)
    single = len(mine) == 1      # a single piece keeps its graph and is embedded once
    # 1. the embeddings of the whole batch
    all_rows = {}                # {layer: (B, C)}
    for k in mine:
        with torch.set_grad_enabled(single):
            embeddings = embed_piece(k)
        for layer, rows in embeddings.items():
            if layer not in all_rows:
                all_rows[layer] = rows.new_zeros(len(token_ids), rows.shape[1])
            all_rows[layer][k::pieces] = rows.detach()
    if world_size > 1:
        for rows in all_rows.values():
            dist.all_reduce(rows)      # a sum that gathers: the rows of other ranks are 0 here
    # 2. the loss, and its gradient with respect to them
    losses = loss_of({layer: rows.requires_grad_() for layer, rows in all_rows.items()})
    losses[0].backward()
    # 3. on through the encoder, piece by piece
    for k in mine:
        if not single:                    # of a single piece `embeddings` is still that of step 1, with its graph
            embeddings = embed_piece(k)   # the same numbers again, this time with a graph
        torch.autograd.backward(list(embeddings.values()), [all_rows[layer].grad[k::pieces] for layer in embeddings])
    return losses

def build_model(args, strings):
    """ -> Bert with sizes, pooling and similarity in its config; tokenizer. strings: what load_pairs gives for each
    source, for the vocabulary of a new model. Raises ValueError for flags that misfit """
    init_from = args.out_dir if args.resume else args.init_from
    if init_from == "scratch":
        print(f"training a WordPiece vocabulary of {args.vocab_size} on the pairs")
        texts = (text for rows in strings for query, positives, negatives, _ in rows
                 for text in [query, *positives, *negatives])
        tokenizer = data.train_wordpiece(texts, args.vocab_size)
        # half of BERT's standard deviation, so that AdamW's steps weigh more
        model = new_bert(args, tokenizer, args.max_length, initializer_range=0.01)
    else:
        model, tokenizer = load_model(init_from, hidden_dropout_prob=args.dropout,
                                      attention_probs_dropout_prob=args.dropout)
    config = model.config
    for name in ("query_max_length", "passage_max_length"):
        if getattr(args, name) > config.max_position_embeddings:
            raise ValueError(f"--{name} {getattr(args, name)}: {args.init_from} has {config.max_position_embeddings} "
                             "positions; choose that or less")
    config.pooling, config.similarity = args.pooling or config.pooling, args.similarity or config.similarity
    choose_sizes(args, config)
    config.num_hidden_layers = config.sizes[-1][0]        # layers that no size uses are not saved
    del model.blocks[config.num_hidden_layers:]
    if init_from == "scratch" and config.pooling == "mean":
        silence_last_channels(model)
    tokenizer.model_max_length = min(args.max_length, config.max_position_embeddings)   # is saved with the model
    return model.to(args.device).train(), tokenizer

def choose_sizes(args, config):
    """ --sizes, else the model's own -> config. Raises ValueError if they lack a full size, or what 2dmse draws. """
    set_sizes(config, check_sizes(args.sizes or named_sizes(config), config))
    full = max(layer for layer, _ in config.sizes), max(dim for _, dim in config.sizes)
    if config.sizes[-1] != full:
        raise ValueError(f"--sizes {','.join(map(size_name, config.sizes))}: no size is both the deepest and the "
                         f"widest, so none can teach the others; add {size_name(full)}")
    if args.method == "2dmse" and (full[0] == 1 or len({dim for _, dim in config.sizes}) == 1):
        raise ValueError(f"--method 2dmse draws a layer and a dim below {size_name(full)}; give --sizes that have some")

def silence_last_channels(model):
    """ Set the last sixth of the model's channels to 0 after its last block, where they stay: a channel that is 0 in
    every text has no gradient. From scratch with mean pooling this lifts every size (results/README.md). The likely
    reason: LayerNorm gives all tokens vectors of the same length, so "the" weighs as much in the mean as a rare word,
    unless common words can hide in channels that are not scored. Small sizes have such channels anyway; now the full
    size has some. """
    silent = math.ceil(model.config.hidden_size / 6)
    model.blocks[-1].norm2.weight.data[-silent:] = 0      # the bias is 0 already

def order_channels(model, token_ids, sizes):
    """ Sort the hidden channels, so that each size keeps the ones that matter at its layer: first the channels whose
    embeddings vary most over the texts at the smallest size's layer, as many as it has dims, then those of the next
    size. A full size of all C channels stays the same function. token_ids: list of (T,) ids """
    embeddings = evaluate.embed_ids(model, token_ids, sorted({layer for layer, _ in sizes}))
    order = []
    for layer, dim in sizes:
        variance = embeddings[layer].var(dim=0)                                         # (C,)
        variance[order] = -1                                                            # last: smaller sizes have them
        order += variance.argsort(descending=True)[:max(0, dim - len(order))].tolist()
    permute_channels(model, order + sorted(set(range(model.config.hidden_size)) - set(order)))

def load_teacher(args, tokenizer):
    """ --teacher -> frozen Bert, or None. Raises ValueError if it does not read the same token ids. """
    if not args.teacher:
        return None
    teacher, its_tokenizer = load_model(args.teacher, args.device)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {args.teacher} has another vocabulary than --init_from {args.init_from}; choose a "
                         "teacher that reads the same tokens")
    if teacher.config.max_position_embeddings < max(args.query_max_length, args.passage_max_length):
        raise ValueError(f"--teacher {args.teacher} has {teacher.config.max_position_embeddings} positions; choose "
                         "that or less as --query_max_length and --passage_max_length")
    return teacher

def plan(args, sources, world_size):
    """ list of Pairs -> queries of a batch, pieces of a batch, steps of the training. Raises ValueError where nothing
    can be learned, and warns if the first batch has nothing to learn from. """
    counts = [len(pairs.queries) for pairs in sources]
    batch_size = min([args.batch_size, *counts])   # a batch is of one source, maybe of the smallest
    if batch_size < 2 * world_size:
        raise ValueError(f"--batch_size {args.batch_size}, --train_pairs with {min(counts)} rows: the other rows of a "
                         f"batch are the negatives, so {world_size} ranks need {2 * world_size} rows or more")
    if any(len(set(pairs.gold)) == 1 for pairs in sources):
        raise ValueError("--train_pairs: every score of a source is the same, so there is no order to learn; take "
                         "the scores out, if the texts of every pair belong together")
    first = data.srl_batch(sources, batch_size, args.negatives, args.passage_max_length, args.seed, 0)
    if first.same is not None and first.same.sum() == batch_size * (len(first.passages) - 1):
        print("warning: all queries or all positives of the first batch are the same text, so it has no negatives to "
              "learn from", file=sys.stderr)
    pieces = max(world_size, math.ceil(batch_size / (args.micro_batch or batch_size)))
    steps_an_epoch = sum(n // batch_size for n in counts)
    return batch_size, pieces, args.max_steps or max(1, round(args.epochs * steps_an_epoch))

def evaluate_dev(args, model, tokenizer, step, max_steps, log_file):
    """ every size on the dev queries, into the log """
    results, _ = evaluate.retrieval(model, tokenizer, f"{args.retrieval}:dev", model.config.sizes, args.dtype)
    shown = [f"{r['layer']}:{r['dim']} {r['value']:.3f}"
             for r in results if r["metric"] == "MRR@10" and r["layer"]]               # without BM25
    log(log_file, {"step": step, "dev": results}, f"step {step}/{max_steps} | dev MRR@10 | " + " | ".join(shown))

def evaluate_saved(args, test_set, rank, world_size):
    """ evaluate.py on the model in --out_dir. All ranks call it and share the encoding; the first writes eval.json. The
    speed is measured without other ranks only, because they would wait for each other. """
    if world_size > 1:
        dist.barrier()   # until rank 0 has saved the model
    flags = ["--speed"] if world_size == 1 else []
    if rank > 0:
        flags = ["--out", os.devnull]
    evaluate.main(evaluate.parse_args([args.out_dir, "--retrieval", str(test_set), *flags,
                                       "--device", args.device, "--dtype", args.dtype]))

def main(args):
    """ data, model, optimizer, loop, evaluation. Raises ValueError or OSError for what the user can mend. """
    start = time.time()
    rank, world_size = start_ranks(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    saved = load_run(args) if args.resume else None

    # data and model: read all input before anything is written
    test_set = args.retrieval
    if test_set:
        data.Collection(test_set)                     # raises now, not after the training
        if args.eval_interval:
            data.Collection(f"{test_set}:dev")
    strings = [data.load_pairs(source, args.columns) for source in args.train_pairs]
    if args.hold_out:
        strings[0], test_set = data.hold_out(strings[0], args.hold_out)
    model, tokenizer = build_model(args, strings)
    sources = [data.tokenize_pairs(rows, tokenizer, args.query_max_length, tokenizer.model_max_length)
               for rows in strings]   # passages keep more tokens than a step takes: srl_batch cuts windows out of them
    sizes = model.config.sizes
    batch_size, pieces, max_steps = plan(args, sources, world_size)
    if args.order_channels and not args.resume:
        order_channels(model, sources[0].queries[:1000], sizes)
    teacher = load_teacher(args, tokenizer)

    # optimizer
    optimizer = configure_optimizer(dict(model.named_parameters()), args.learning_rate, args.weight_decay,
                                    ("word.weight", "position.weight", "token_type.weight"), args.embedding_lr_scale)
    parts = {"model": model, "optimizer": optimizer}
    first_step = saved["step"] if saved else 0
    about = {"--train_pairs": [data.checksum(pairs) for pairs in sources], "pieces of a batch": pieces,
             "--teacher": teacher and evaluate.made_by(teacher, tokenizer, args.dtype)}
    if saved:
        check_about(args, saved, about)
        with readable(f"--resume: the model in {args.out_dir} is not that of {STATE}", "begin again with --overwrite"):
            for name, part in parts.items():
                part.load_state_dict(saved[name])
    if args.compile:
        for block in model.blocks:   # not attention: its groups differ in every batch
            block.after_attention = torch.compile(block.after_attention, dynamic=True)

    log_file = open_run(args, first_step) if rank == 0 else None
    print(f"{sum(len(pairs.queries) for pairs in sources):,} pairs, {max_steps} steps of {batch_size} queries; sizes "
          f"{', '.join(map(size_name, sizes))}; {args.dtype} on {args.device}")

    # the loop
    clock, tokens, records, caught = time.time(), 0, [], catch_signals()
    for step in range(first_step, max_steps):
        lr = get_lr(step, max_steps, args, "linear")
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        batch = data.srl_batch(sources, batch_size, args.negatives, args.passage_max_length, args.seed, step)
        optimizer.zero_grad(set_to_none=True)
        loss, nce, kl = train_step(model, teacher, batch, step_sizes(args.method, sizes, args.seed, step), args, step,
                                   pieces, rank, world_size)
        sum_over_ranks(model.parameters(), world_size)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        check_finite(step, loss, norm, nce | {f"KL of {name}": value for name, value in kl.items()}, args)
        optimizer.step()

        tokens += sum(map(len, batch.queries + batch.passages))
        records.append(({"loss": loss}, nce, kl))           # of each step since the last line of the log
        last_step = step + 1 == max_steps or interrupted(caught, args, world_size)
        if (step + 1) % args.log_interval == 0 or last_step:
            mean_loss, mean_nce, mean_kl = (average(column) for column in zip(*records))
            seconds, tokens_a_step = (time.time() - clock) / len(records), tokens / len(records)
            ends = dict.fromkeys([size_name(sizes[0]), size_name(sizes[-1])])               # one, if there is one size
            shown = [f"{name} {mean_nce[name]:.3f}" for name in ends if name in mean_nce]   # 2dmse: maybe not drawn
            log(log_file, {"step": step + 1, "loss": mean_loss["loss"], "nce": mean_nce, "kl": mean_kl,
                           "learning_rate": lr, "norm": norm.item(), "ms": 1000 * seconds,
                           "tokens_per_second": tokens_a_step / seconds, "seconds": time.time() - start},
                status(step + 1, max_steps, [f"loss {mean_loss['loss']:.3f}", *shown], lr, norm, seconds,
                       tokens_a_step))
            clock, tokens, records = time.time(), 0, []
        if args.retrieval and args.eval_interval and (step + 1) % args.eval_interval == 0 and not last_step:
            pause = time.time()
            evaluate_dev(args, model, tokenizer, step + 1, max_steps, log_file)
            clock += time.time() - pause
        if rank == 0 and (last_step or args.save_interval and (step + 1) % args.save_interval == 0):
            save_run(args, step + 1, model, tokenizer, parts, about, last_step)
        if last_step and step + 1 < max_steps:
            raise KeyboardInterrupt(f"stopped after step {step + 1}; go on with the same command and --resume")
    default_signals()
    print(f"saved {args.out_dir}")
    if test_set:
        evaluate_saved(args, test_set, rank, world_size)
    if rank == 0:
        Path(args.out_dir, STATE).unlink(missing_ok=True)   # three times the model, and the run is finished
    print(f"{(time.time() - start) / 60:.1f} minutes in all")

# ---- flags -----------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args; a wrong one ends the program with status 2 and a line that says why """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train_pairs", nargs="+", default=["docs"], metavar="SOURCE",
        help="docs, a .jsonl/.csv/.tsv/.parquet file, or hub NAME[:CONFIG][:SPLIT], with the columns query, positive, "
             "maybe negative, or sentence1, sentence2, score; several: each batch is of one, in proportion to its size")
    add("--batch_size", type=positive_int, default=128,
        help="queries a step, over all ranks; all their passages are candidates")
    add("--negatives", type=nonneg_int, default=1, help="hard negatives a query, at most, where the pairs have any")
    add("--micro_batch", type=nonneg_int, default=0,
        help="queries that are encoded at a time, with their passages: the same gradient in less memory, for one more "
             "forward pass; 0 encodes the whole batch at once")
    add("--query_max_length", type=text_length, default=32, help="tokens, [CLS] and [SEP] included")
    add("--passage_max_length", type=text_length, default=64,
        help="tokens of a passage in a step; of a longer one its beginning or, half of the time, a random window")
    add("--max_length", type=text_length, default=256,
        help="tokens that the finished model reads of a text, if it has so many positions. Training on short windows "
             "is faster, and reading more finds more, although the later positions are untrained")
    add = parser.add_argument_group("loss and embeddings").add_argument
    add("--pooling", choices=list(POOLINGS), help="of the tokens; by default the loaded model's own, from scratch mean")
    add("--similarity", choices=SIMILARITIES,
        help="of a query and a passage; by default the loaded model's own, from scratch cosine")
    add("--temperature", type=positive_float, default=0.1, help="divides the similarities; use 1 with --similarity dot")
    add("--method", choices=["srl", "2dmse"], default="srl", help="which sizes a step trains: see step_sizes")
    add("--teacher", help="a frozen model whose full size every size follows; by default the trained model's own")
    add("--order_channels", action=flag, default=False,
        help="for a loaded model: before training, sort the channels so that the first dims matter most")
    add("--kl_weight", type=nonneg_float, default=1.0, help="of the KL from the full size; 0 leaves it out")
    add("--embedding_lr_scale", type=positive_float,
        help="learning rate of the embeddings over that of the blocks, because a word is seen less often than a block; "
             "by default 8 from scratch, 1 for a loaded model")
    add = parser.add_argument_group("evaluation").add_argument
    add("--retrieval",
        help="docs, a BEIR folder or a BEIR set of the hub, without :SPLIT: dev in training, test at the end; by "
             "default docs if the pairs are docs, else none")
    add("--hold_out", type=nonneg_int, default=0, help="measure on so many of the pairs, which are not trained on")
    add("--eval_interval", type=nonneg_int, default=300, help="steps between two evaluations on dev; 0 for none")
    training_flags(parser)
    # for the docs from random weights; 3.6 epochs are 544 steps
    parser.set_defaults(learning_rate=5e-4, warmup=0.1, weight_decay=0.1, epochs=3.6, out_dir="out/srl")

    args = parser.parse_args(argv)
    if args.hold_out and (args.retrieval or len(args.train_pairs) > 1):
        parser.error(f"--hold_out {args.hold_out} makes the test set, of one source; leave --retrieval and the other "
                     "sources out")
    if args.retrieval is None:
        args.retrieval = "docs" if args.train_pairs == ["docs"] and not args.hold_out else ""
    if args.embedding_lr_scale is None:
        args.embedding_lr_scale = 8.0 if args.init_from == "scratch" else 1.0
    args.max_length = max(args.max_length, args.query_max_length, args.passage_max_length)
    check_out_dir(parser, args)
    return args

if __name__ == "__main__":
    run_script(main, parse_args)
