r"""
Fine-tune one BERT encoder so that it is good at every size: SRL, Starbucks Representation Learning.

    python finetune_srl.py                                   # six sizes from scratch; 5 minutes on 2 cores
    python finetune_srl.py --sizes 6:160 --out_dir out/full  # one size alone: the largest of the six
    python finetune_srl.py --train_pairs my_pairs.csv --out_dir out/mine  # columns query, positive, negative...
    python finetune_srl.py --init_from bert-base-uncased --train_pairs sentence-transformers/all-nli:triplet \
        --learning_rate 5e-5 --temperature 0.05 --weight_decay 0 --dropout 0.1 --epochs 1 --out_dir out/nli

Writes to OUT_DIR a Hugging Face model, args.json, log.jsonl, eval.json if there is a test set, and until it ends
training_state.pt, for --resume. Paper: arXiv 2410.13230; srl_loss is its fine-tuning loss. Letters: see model.py.
"""
import argparse, math, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import evaluate
from model import (POOLINGS, SIMILARITIES, STATE, Bert, HelpFormatter, average, check_sizes, configure_optimizer,
                   fast_dtype, load_model, load_run, log, new_config, open_run, pack, parse_sizes, ranks, restore,
                   run_script, save_run, score, set_learning_rate, size_name, start_ranks, sum_and_clip)

# ---- the method ----------------------------------------------------
def srl_loss(queries, passages, sizes, similarity, temperature, kl_weight, also_right, teacher_scores=None, gold=None):
    """ L = mean over sizes of [ InfoNCE(s) + kl_weight * KL(softmax(s_full) || softmax(s)) ]
    with the scores s = sim(q, p) / temperature.
    queries {layer: (Q, C)}, passages {layer: (P, C)}: embeddings of every layer that has a size. Passage i < Q is the
    positive of query i; all other passages are its negatives, except where also_right (Q, P) is True.
    sizes: (layer, dim) pairs; the last, the full size, is the teacher.
    teacher_scores (Q, P): s of a frozen model, in place of s_full. gold (Q,): how similar query i and passage i are;
    CoSENT then replaces InfoNCE, the KL stays. Call it outside autocast: bfloat16 scores are wrong in the third digit.
    -> loss, {"nce 1:8": InfoNCE or CoSENT, "kl 1:8": KL, ...} for the log """
    full_layer, full_dim = sizes[-1]
    if teacher_scores is None:
        with torch.no_grad():   # the full size must not move towards the others
            teacher_scores = score(queries[full_layer], passages[full_layer], full_dim, similarity) / temperature
    teacher_probs = teacher_scores.masked_fill(also_right, -1e9).softmax(-1)   # (Q, P); -inf would make the KL NaN
    positive = torch.arange(len(teacher_probs), device=teacher_probs.device)   # (Q,) passage i is query i's positive
    loss, terms = 0, {}
    for layer, dim in sizes:
        scores = score(queries[layer], passages[layer], dim, similarity) / temperature   # (Q, P)
        log_probs = scores.masked_fill(also_right, -1e9).log_softmax(-1)                 # (Q, P)
        nce = F.nll_loss(log_probs, positive) if gold is None else cosent(scores.diagonal(), gold)
        kl = F.kl_div(log_probs, teacher_probs, reduction="batchmean")   # KL(teacher || size)
        loss = loss + (nce + kl_weight * kl) / len(sizes)
        terms |= {f"nce {layer}:{dim}": nce.detach(), f"kl {layer}:{dim}": kl.detach()}
    return loss, terms

def cosent(scores, gold):
    """ (Q,) scores of pairs of texts, (Q,) their gold scores -> log(1 + sum of exp(s_j - s_i) over all i, j with
    gold_i > gold_j): every pair should score above those that are less similar. (CoSENT, kexue.fm/archives/8847) """
    difference = scores[None, :] - scores[:, None]      # (Q, Q), s_j - s_i
    wrong = difference[gold[:, None] > gold[None, :]]   # (pairs of pairs,)
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(0)   # exp(0) is the 1

def step_sizes(method, sizes, seed, step):
    """ The sizes that one step trains, the full size last. The methods differ in nothing else here.
    srl     the same few sizes in every step
    2dmse   2D Matryoshka (arXiv 2402.14776): draw any layer below the full one, and a smaller dim of --sizes; train
            all four combinations of these two with the full layer and the full dim """
    if method == "srl":
        return sizes
    full_layer, full_dim = sizes[-1]
    rng = np.random.default_rng([seed, step, data.SIZE_SEED])
    layer = int(rng.integers(1, full_layer))   # 1 ... full_layer - 1
    dim = int(rng.choice(sorted({dim for _, dim in sizes} - {full_dim})))
    return (layer, dim), (layer, full_dim), (full_layer, dim), (full_layer, full_dim)

def train_step(model, teacher, batch, sizes, args, step, pieces=1):
    """ Batch -> {"loss", and the terms of srl_loss}. Adds to the gradients of the parameters. """
    texts, Q = batch.queries + batch.passages, len(batch.queries)   # Q + P texts, (T,) ids each
    embeddings = embed_in_pieces(model, sorted({layer for layer, _ in sizes}), texts, args, step, pieces)
    queries = {layer: vectors[:Q] for layer, vectors in embeddings.items()}    # {layer: (Q, C)}
    passages = {layer: vectors[Q:] for layer, vectors in embeddings.items()}   # {layer: (P, C)}
    if step == 0:
        layer, dim = sizes[-1]
        evaluate.check_spread("the first batch", score(queries[layer], passages[layer], dim, model.config.similarity))
    teacher_scores = None
    if teacher:
        layer, dim = teacher.config.sizes[-1]   # its full size
        with torch.no_grad():
            vectors = embed_in_pieces(teacher, [layer], texts, args, step, pieces)[layer]   # (Q + P, C)
        teacher_scores = score(vectors[:Q], vectors[Q:], dim, teacher.config.similarity) / args.temperature   # (Q, P)
    also_right = torch.from_numpy(batch.also_right).to(args.device)
    gold = None if batch.gold is None else torch.from_numpy(batch.gold).to(args.device)
    loss, terms = srl_loss(queries, passages, sizes, model.config.similarity, args.temperature, args.kl_weight,
                           also_right, teacher_scores, gold)
    loss.backward()
    return {"loss": loss.detach()} | terms

def embed_in_pieces(encoder, layers, texts, args, step, pieces=1):
    """ B texts, (T,) ids -> {layer: (B, C)}, as encoder.encode, but in pieces, for a batch that is too large for the
    memory, or that ranks share. Every rank computes the loss of the whole batch, but only the rows that it
    embedded itself carry a gradient, so the ranks' gradients, which sum_and_clip sums, give the exact one. With several
    pieces a rank, backward embeds each again, so that memory holds the activations of one (arXiv 2101.06983). """
    def encode_piece(piece):   # a list of texts -> {layer: (texts, C)}
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            filler = [np.zeros(1, int)] * (-sum(map(len, piece)) % 128)   # N a multiple of 128: few shapes, faster
            vectors = encoder.encode(pack(piece + filler, args.device), layers)
        return {layer: vectors[layer][:len(piece)] for layer in layers}
    rank, world_size = ranks()
    mine, embeddings = range(rank, pieces, world_size), {}
    for k in mine:
        torch.manual_seed(hash((args.seed, step, k)))   # of dropout: the same after --resume and on any rank
        piece = texts[k::pieces]                        # queries and passages
        encoded = checkpoint(encode_piece, piece, use_reentrant=False) if len(mine) > 1 else encode_piece(piece)
        for layer, vectors in encoded.items():
            whole = embeddings.setdefault(layer, vectors.new_zeros(len(texts), vectors.shape[1]))   # (B, C)
            whole[k::pieces] = vectors
    if world_size > 1:
        for layer, own in embeddings.items():
            everyone = own.detach().clone()
            dist.all_reduce(everyone)                             # a row is 0 on all ranks but the one that embedded it
            embeddings[layer] = own + (everyone - own.detach())   # the value is everyone, the gradient goes to own
    return embeddings

# ---- model ---------------------------------------------------------
def build_model(args, tables):
    """ -> Bert with sizes, pooling, similarity and prompts in its config; tokenizer; --teacher, a frozen Bert, or None.
    tables: for a new vocabulary """
    fields = {"pooling": args.pooling, "similarity": args.similarity, "query_prompt": args.query_prompt,
              "passage_prompt": args.passage_prompt, "hidden_dropout_prob": args.dropout,
              "attention_probs_dropout_prob": args.dropout}
    init_from = args.out_dir if args.resume else args.init_from   # a vocabulary is trained only once
    if init_from == "scratch":
        prompts = [args.query_prompt or "", args.passage_prompt or ""]
        texts = (text for table in tables for row in table
                 for text in [*prompts, row["query"], *row["positive"], *row["negative"]])
        tokenizer = data.train_wordpiece(texts, args.vocab_size)
        model = Bert(new_config(vocab_size=len(tokenizer), max_position_embeddings=args.max_length,
                                num_hidden_layers=args.num_layers, hidden_size=args.hidden_size,
                                initializer_range=0.01, **fields))   # half of BERT's: AdamW's steps weigh more
        if model.config.pooling == "mean":   # measured: all sizes rank better if the full one has 5/6 of the channels
            model.config.sizes = *model.config.sizes[:-1], (args.num_layers, round(5 / 6 * args.hidden_size))
    else:
        model, tokenizer = load_model(init_from, **fields)
    config = model.config
    config.sizes = check_sizes(args.sizes or config.sizes, config)
    full = max(layer for layer, _ in config.sizes), max(dim for _, dim in config.sizes)
    if config.sizes[-1] != full:
        raise ValueError(f"--sizes: none is deepest and widest, to teach the others; add {size_name(full)}")
    if args.method == "2dmse" and (full[0] == 1 or len({dim for _, dim in config.sizes}) == 1):
        raise ValueError(f"--method 2dmse draws a layer and a dim below {size_name(full)}; add smaller --sizes")
    config.num_hidden_layers = full[0]
    del model.blocks[full[0]:]   # layers that no size uses
    tokenizer.model_max_length = min(args.max_length, config.max_position_embeddings)   # is saved with the model
    teacher, its_tokenizer = load_model(args.teacher, args.device) if args.teacher else (None, tokenizer)
    theirs = teacher.config if teacher else config
    alike = theirs.query_prompt in ("", config.query_prompt) and theirs.passage_prompt in ("", config.passage_prompt)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab() or not alike:
        raise ValueError(f"--teacher {args.teacher} has another vocabulary, or other prompts, than the model to train")
    return model.to(args.device).train(), tokenizer, teacher

def plan(args, sources):
    """ list of Pairs -> queries of a batch; pieces in which it is embedded, one or more a rank; steps """
    _, world_size = ranks()
    counts = [len(source.table) for source in sources]
    batch_size = min(args.batch_size, *counts)   # a batch is of one source, maybe of the smallest
    if batch_size < 2 * world_size:
        raise ValueError(f"a batch of {batch_size} pairs: the others of a batch are the negatives, so take more")
    pieces = max(world_size, math.ceil(batch_size / (args.micro_batch or batch_size)))
    return batch_size, pieces, args.max_steps or max(1, round(args.epochs * sum(n // batch_size for n in counts)))

# ---- training ------------------------------------------------------
def main(args):
    """ data, model, optimizer, loop, evaluation """
    start_ranks(args)
    rank, _ = ranks()
    saved = load_run(args)
    torch.manual_seed(args.seed)

    # data and model: all input is read before anything is written
    if args.retrieval:
        evaluate.Collection(args.retrieval)   # is not used: a mistake in it shows now and not after the training
    dev = evaluate.Collection(args.retrieval, "dev") if args.retrieval and args.eval_interval else None
    tables = [data.load_pairs(source, args.columns) for source in args.train_pairs]
    model, tokenizer, teacher = build_model(args, tables)
    sizes, longest = model.config.sizes, tokenizer.model_max_length   # a step cuts windows out of passages
    data.check_texts("--passage_max_length", [], tokenizer, args.passage_max_length, model.config.passage_prompt)
    sources = [data.tokenize_pairs(source, table, tokenizer, min(args.query_max_length, longest), longest,
                                   model.config) for source, table in zip(args.train_pairs, tables)]
    batch_size, pieces, max_steps = plan(args, sources)

    # optimizer, and the run to resume
    optimizer = configure_optimizer(model.named_parameters(), args)
    must_match = {"--train_pairs": [data.content_hash(source.table) for source in sources], "pieces": pieces}
    if saved:
        restore(saved, must_match, model, optimizer)
    if args.compile:
        for block in model.blocks:   # not attention: its groups differ in every batch
            block.after_attention = torch.compile(block.after_attention, dynamic=True)
    log_file = open_run(args) if rank == 0 else None
    names = [size_name(size) for size in sizes]
    print(f"{max_steps} steps of {batch_size} queries; sizes {', '.join(names)}; {args.dtype} on {args.device}")

    # the loop
    clock, records = time.time(), []
    for step in range(saved["step"] if saved else 0, max_steps):
        lr = set_learning_rate(optimizer, step, max_steps, args, "linear")
        batch = data.srl_batch(sources, batch_size, args.negatives, args.passage_max_length, args.seed, step)
        drawn = step_sizes(args.method, sizes, args.seed, step)
        optimizer.zero_grad()
        losses = train_step(model, teacher, batch, drawn, args, step, pieces)
        norm = sum_and_clip(model.parameters(), step, losses)
        optimizer.step()

        done = step + 1
        records.append(losses | {"norm": norm})
        if done % (args.log_interval or max_steps) == 0 or done == max_steps:
            ms = 1000 * (time.time() - clock) / len(records)
            log(log_file, {"step": done} | average(records) | {
                "lr": lr, "ms": ms, "minutes left": ms * (max_steps - done) / 60_000},
                ["step", "loss", f"nce {names[0]}", f"nce {names[-1]}", "lr", "norm", "ms", "minutes left"])
            clock, records = time.time(), []
        if rank == 0 and (done % (args.save_interval or max_steps) == 0 or done == max_steps):
            save_run(args, done, model, optimizer, must_match, bert=model, tokenizer=tokenizer)
        if dev and (done % args.eval_interval == 0 or done == max_steps):   # on all ranks, so that none waits
            start = time.time()
            dev_records, _ = evaluate.retrieval(model, tokenizer, dev, sizes, args.dtype)
            values = {f"dev {r['layer']}:{r['dim']}": r["value"] for r in dev_records if r["metric"] == "MRR@10"}
            log(log_file, {"step": done} | values, ["step", *values])
            clock += time.time() - start
    if dist.is_initialized():
        dist.destroy_process_group()         # rank 0 evaluates alone
    if rank == 0:
        if args.retrieval:
            evaluate.main(evaluate.parse_args([args.out_dir, "--retrieval", args.retrieval, "--device", args.device,
                                               "--dtype", args.dtype]))
        Path(args.out_dir, STATE).unlink()   # three times the model, and the run is finished

# ---- flags ---------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train_pairs", nargs="+", default=["docs"], metavar="SOURCE",
        help="docs, a .jsonl/.csv/.tsv/.parquet file, or hub NAME[:CONFIG][:SPLIT], with query, positive, maybe "
             "negative, or sentence1, sentence2, score; each batch is of one source")
    add("--columns", nargs="+", default=[], metavar="KIND=COLUMN", help="other names: query=question positive=answer")
    add("--retrieval", help="docs, a BEIR folder or set of the hub, to evaluate the finished model on")
    add("--eval_interval", type=int, default=0, help="steps between two evaluations on the dev of --retrieval; 0: none")
    add("--batch_size", type=int, default=128, help="queries a step, over all ranks")
    add("--micro_batch", type=int, default=0, help="queries embedded at a time: less memory; 0: all")
    add("--negatives", type=int, default=1, help="hard negatives a query, at most")
    add("--query_max_length", type=int, default=32, help="tokens with [CLS] and [SEP]")
    add("--passage_max_length", type=int, default=64, help="tokens; half of the time a random window")
    add("--max_length", type=int, default=256, help="tokens that the finished model reads of a text")
    add("--query_prompt", help="goes before every query, as 'query: '; by default the loaded model's own")
    add("--passage_prompt", help="goes before every passage; by default the loaded model's own")
    add = parser.add_argument_group("loss and embeddings").add_argument
    add("--pooling", choices=POOLINGS, help="of the tokens; by default the loaded model's own, from scratch mean")
    add("--similarity", choices=SIMILARITIES, help="by default the loaded model's own, from scratch cosine")
    add("--temperature", type=float, default=0.1, help="divides the similarities; use 1 with --similarity dot")
    add("--method", choices=["srl", "2dmse"], default="srl", help="which sizes a step trains: see step_sizes")
    add("--kl_weight", type=float, default=1.0, help="of the KL from the full size; 0 leaves it out")
    add("--teacher", help="a frozen model for all sizes to follow; by default their own full size")
    add = parser.add_argument_group("model").add_argument
    add("--init_from", default="scratch", help="scratch, a folder, or a BERT of the hub")
    add("--sizes", type=parse_sizes, help="LAYER:DIM,...; by default the model's own, from scratch as the paper's")
    add("--dropout", type=float, default=0.0, help="BERT's own is 0.1")
    add("--num_layers", type=int, default=6, help="from scratch: blocks")
    add("--hidden_size", type=int, default=192, help="from scratch: channels")
    add("--vocab_size", type=int, default=8192, help="from scratch: WordPiece entries")
    add = parser.add_argument_group("optimisation").add_argument
    add("--learning_rate", type=float, default=5e-4, help="peak, of AdamW")
    add("--embedding_lr_scale", type=float, help="times that for the embeddings; by default 8 from scratch, else 1")
    add("--warmup", type=float, default=0.1, help="share of the steps; then the rate falls to 0")
    add("--weight_decay", type=float, default=0.1, help="of all but biases and LayerNorms")
    add("--epochs", type=float, default=1, help="passes over the data, without --max_steps")
    add("--max_steps", type=int, help="by default 200 for docs, else what --epochs says")
    add("--seed", type=int, default=1, help="of weights, order, windows and dropout")
    add = parser.add_argument_group("system").add_argument
    add("--out_dir", default="out/srl", help="where the model and the log go")
    add("--resume", action=flag, default=False, help="go on with the stopped run in --out_dir, exactly")
    add("--log_interval", type=int, default=10, help="steps between two lines of the log")
    add("--save_interval", type=int, default=200, help="steps between two checkpoints; 0: at the end only")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16"], default=fast_dtype(), help="of the matrix products")
    add("--compile", action=flag, default=torch.cuda.is_available(), help="torch.compile the blocks but for attention")
    args = parser.parse_args(argv)
    if args.train_pairs == ["docs"]:
        args.retrieval = "docs" if args.retrieval is None else args.retrieval
        args.max_steps = 200 if args.max_steps is None else args.max_steps
    if args.embedding_lr_scale is None:   # a word is seen less often than a block
        args.embedding_lr_scale = 8.0 if args.init_from == "scratch" else 1.0
    args.max_length = max(args.max_length, args.query_max_length, args.passage_max_length)
    return args

if __name__ == "__main__":
    run_script(main, parse_args)
