"""
Pre-train one BERT encoder so that every size can sum up a text: SMAE, Starbucks Masked Autoencoding.

    python pretrain_smae.py                   # from scratch, on the docs of this machine; about 25 minutes on 2 cores
    python pretrain_smae.py --objective mlm --out_dir out/mlm               # the control: MLM on the same tokens
    python pretrain_smae.py --train_text my_text.txt.gz --out_dir out/mine  # a line is a document

Writes to OUT_DIR a Hugging Face BertForMaskedLM for finetune_srl.py --init_from, args.json, log.jsonl, and for --resume
training_state.pt, which has the decoder. Paper: arXiv 2410.13230; smae_loss is its loss.
"""
import argparse, copy, functools, itertools, time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from model import (Bert, HelpFormatter, average, check_sizes, configure_optimizer, fast_dtype, load_model, load_run,
                   load_weights, log, new_config, open_run, pack, parse_sizes, ranks, read_modules, read_weights,
                   restore, run_script, save_run, set_learning_rate, size_name, start_ranks, sum_and_clip)

# ---- the method ----------------------------------------------------
class MLMHead(nn.Module):
    """ BERT's masked-language-model head. Its output matrix is the word embeddings, so only the bias is here. """
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.act = getattr(F, config.hidden_act)
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x):
        """ (..., D) -> (..., C): the dense layer uses its first D input columns, so one head serves all sizes """
        return self.norm(self.act(F.linear(x, self.dense.weight[:, :x.shape[-1]], self.dense.bias)))

class SMAE(nn.Module):
    """ What is trained: encoder, MLM head, and a decoder of one layer that is not needed afterwards. The decoder has no
    embeddings of its own: it reads the encoder's layer 0. No parameter belongs to one size: a size (layer, D) uses the
    first `layer` blocks and the first D columns of the head's matrix. """
    def __init__(self, bert, head):
        super().__init__()
        self.bert, self.head = bert, head
        self.decoder = copy.deepcopy(bert.blocks[0])   # starts as a copy of the encoder's first block

def smae_loss(model, batch, masked, sizes, objective="smae"):
    """ For every size (layer, dim), with E the word embeddings (V, C):
      h   = the first dim coordinates of the encoder's output at that layer
      MLM = CE( E head(h) + bias, words hidden from the encoder )
      x   = layer 0 of the decoder's ids, with x[CLS] replaced by the bottleneck head(h[CLS])
      MAE = CE( E head(decoder(x)) + bias, words hidden from the decoder )
      L   = mean over sizes of (MLM + MAE) / 2;  with objective "mlm" the mean of MLM alone
    The decoder shares the encoder's layer 0; all it gets from the blocks is the bottleneck, and much of its
    input is hidden (--decoder_mask). So it can only do well if dim numbers say what the text is about.
    batch, masked: Pack with the true ids and Masked of the same texts. All sizes share the head and the decoder.
    -> loss, {"mlm 1:8": CE, "mae 1:8": CE, ...} for the log """
    tensor = functools.partial(torch.as_tensor, device=batch.input_ids.device)
    encoder_at, decoder_at = tensor(masked.encoder_positions), tensor(masked.decoder_positions)   # (M,), (M',)
    encoder_sees = batch._replace(input_ids=tensor(masked.encoder_ids))
    taps = model.bert(encoder_sees, [layer for layer, _ in sizes])                     # {layer: (N, C)}
    if objective == "smae":
        tokens = model.bert.embed(batch._replace(input_ids=tensor(masked.decoder_ids)))   # (N, C), the decoder's
    loss, terms = 0, {}
    for layer, dim in sizes:
        h = taps[layer][:, :dim]                                                       # (N, D)
        ce = {"mlm": vocabulary_loss(model, h[encoder_at], batch.input_ids[encoder_at])}
        if objective == "smae":
            bottleneck = model.head(h[batch.starts])                                   # (B, C)
            decoded = model.bert.maybe_checkpoint(decode, model.decoder, tokens, bottleneck, batch, decoder_at)
            ce["mae"] = vocabulary_loss(model, decoded, batch.input_ids[decoder_at])   # decoded (M', C)
        loss = loss + sum(ce.values()) / (len(ce) * len(sizes))
        terms |= {f"{name} {layer}:{dim}": value.detach() for name, value in ce.items()}
    return loss, terms

def decode(decoder, tokens, bottleneck, batch, positions):
    """ tokens (N, C), bottleneck (B, C), masked positions (M',) -> (M', C): what the decoder makes of the positions
    that it must guess. The bottleneck replaces [CLS] and needs no position embedding: it is always at position 0. """
    x = tokens.index_copy(0, batch.starts, bottleneck.to(tokens.dtype))                        # (N, C)
    mixed = decoder.attend(decoder.query(x), decoder.key(x), decoder.value(x), batch.groups)   # (N, C)
    return decoder.after_attention(x[positions], mixed[positions])   # the rest only where there is a word to guess

def vocabulary_loss(model, hidden, labels):
    """ (M, D), true ids (M,) -> CE(E head(hidden) + bias, labels); 0 if texts are too short to hide a word. It is
    F.cross_entropy(F.linear(x, E, bias), labels), in training 1,024 positions at a time: (M, V) is large. """
    x, E, bias = model.head(hidden), model.bert.word.weight, model.head.word_bias   # (M, C), (V, C), (V,)
    if torch.is_autocast_enabled(x.device.type):   # autocast skips linear_cross_entropy
        dtype = torch.get_autocast_dtype(x.device.type)
        x, E, bias = x.to(dtype), E.to(dtype), bias.to(dtype)
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=1024, acc_policy="balanced")   # "auto" is slower
    options = chunks if torch.is_grad_enabled() else None
    total = F.linear_cross_entropy(x, E, labels, linear_bias=bias, options=options, reduction="sum")
    return total.to(model.head.word_bias.dtype) / max(1, len(labels))

def batch_loss(model, documents, tokenizer, sizes, args, seed):
    """ documents -> loss, {"loss", and the terms of smae_loss} """
    masked = data.smae_batch(documents, args.max_length, (args.encoder_mask, args.decoder_mask), tokenizer, seed)
    # autocast would cache a bfloat16 copy of every weight; --gradient_checkpointing saves that, too
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16",
                        cache_enabled=not args.gradient_checkpointing):
        loss, terms = smae_loss(model, pack(masked.texts, args.device), masked, sizes, args.objective)
    return loss, {"loss": loss.detach()} | terms

# ---- model and text ------------------------------------------------
HELD_OUT = 500   # documents that are never trained on: the validation loss

def build_model(args):
    """ -> SMAE, tokenizer, sizes to train """
    dropout = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    init_from = args.out_dir if args.resume else args.init_from   # a vocabulary is trained only once
    if init_from == "scratch":
        texts = itertools.islice(data.text_rows(args.train_text, args.streaming, args.columns), 200_000)
        tokenizer = data.train_wordpiece((row["text"] for row in texts), args.vocab_size)
        bert = Bert(new_config(vocab_size=len(tokenizer), hidden_size=args.hidden_size,
                               max_position_embeddings=max(512, args.max_length),   # room for longer texts later
                               num_hidden_layers=args.num_layers, **dropout))
    else:
        bert, tokenizer = load_model(init_from, **dropout)
    model, config = SMAE(bert, MLMHead(bert.config)), bert.config
    if init_from != "scratch":
        try:
            load_weights(model.head, read_weights(read_modules(init_from)[0]))
        except KeyError:
            print(f"{init_from} has no whole MLM head, so a new one is trained")
    if args.objective == "smae":
        config.pooling = "cls"   # the vector that SMAE trains
        config.sizes = sizes = check_sizes(args.sizes or config.sizes, config)
    else:   # the sizes of the model stay those that it had
        sizes = check_sizes(args.sizes or [(config.num_hidden_layers, config.hidden_size)], config)
    if args.max_length > config.max_position_embeddings:
        raise ValueError(f"--max_length {args.max_length}: this model has {config.max_position_embeddings} positions")
    bert.gradient_checkpointing = args.gradient_checkpointing
    tokenizer.model_max_length = args.max_length
    return model.to(args.device).train(), tokenizer, sizes

def read_text(args, text, micro_batch, skip):
    """ a table or stream of documents -> those held out, max_steps, and a function of (step, piece of its batch) -> the
    micro_batch documents to train on. A stream just gives the next ones; --resume skips the first `skip`. """
    if args.streaming:
        stream = (np.array(row["ids"], np.int32) for row in text)
        held_out = list(itertools.islice(stream, HELD_OUT))
        stream = itertools.islice(stream, skip, None)
        return held_out, args.max_steps, lambda step, piece: list(itertools.islice(stream, micro_batch))   # the next
    n_held_out = min(HELD_OUT, (len(text) + 9) // 10)   # of few documents a tenth
    held_out, train_rows = np.split(np.random.default_rng(0).permutation(len(text)), [n_held_out])
    steps_an_epoch = len(train_rows) // args.batch_size
    if steps_an_epoch == 0:
        raise ValueError(f"--batch_size {args.batch_size}: there are {len(train_rows)} documents to train on")
    max_steps = args.max_steps or max(1, round(args.epochs * steps_an_epoch))
    def get_piece(step, piece):
        epoch, i = divmod(step, steps_an_epoch)
        first = i * args.batch_size + piece * micro_batch
        order = data.epoch_order(len(train_rows), args.seed, epoch)   # indices into train_rows
        return data.as_arrays(text[train_rows[order[first:first + micro_batch]]]["ids"])
    return data.as_arrays(text[held_out]["ids"]), max_steps, get_piece

def validate(model, held_out, tokenizer, sizes, args):
    """ -> {"val loss", "val mlm 1:8", ...} on the held-out documents, with the same windows and masks every time """
    model.eval()
    with torch.no_grad():
        records = [batch_loss(model, held_out[i:i + 50], tokenizer, sizes, args, [0, i])[1]
                   for i in range(0, len(held_out), 50)]
    model.train()
    return {f"val {name}": value for name, value in average(records).items()}   # of batches; the last may be smaller

# ---- training ------------------------------------------------------
def main(args):
    """ model, text, optimizer, loop """
    start_ranks(args)
    rank, world_size = ranks()
    saved = load_run(args)
    first_step = saved["step"] if saved else 0
    torch.manual_seed(args.seed)

    # model and text: a batch is pieces of micro_batch documents, which the ranks share
    micro_batch = args.micro_batch or args.batch_size // world_size
    if micro_batch < 1 or args.batch_size % (micro_batch * world_size):
        raise ValueError(f"--batch_size {args.batch_size}: no multiple of {world_size} x --micro_batch {micro_batch}")
    pieces = args.batch_size // micro_batch
    mine = range(rank, pieces, world_size)
    model, tokenizer, sizes = build_model(args)
    text = data.tokenize_text(args.train_text, tokenizer, args.streaming, rank, world_size, args.columns)
    held_out, max_steps, get_piece = read_text(args, text, micro_batch, skip=first_step * len(mine) * micro_batch)

    # optimizer, and the run to resume
    optimizer = configure_optimizer(model.named_parameters(), args)   # with mlm the decoder has no gradient
    content = next(data.text_rows(args.train_text, True, args.columns)) if args.streaming else data.content_hash(text)
    must_match = {"--train_text": content, "pieces": pieces, "ranks": world_size}
    if saved:
        restore(saved, must_match, model, optimizer)
    if args.compile:
        for block in [*model.bert.blocks, model.decoder]:   # not attention: its groups differ in every batch
            block.after_attention = torch.compile(block.after_attention, dynamic=True)
    log_file = open_run(args) if rank == 0 else None
    print(f"{max_steps} steps; sizes {', '.join(map(size_name, sizes))}; {args.dtype} on {args.device}")

    # the loop
    clock, records = time.time(), []
    for step in range(first_step, max_steps):
        lr = set_learning_rate(optimizer, step, max_steps, args, "cosine")   # as in the paper's run
        optimizer.zero_grad()
        piece_terms = []
        for piece in mine:
            batch = get_piece(step, piece)
            if len(batch) < micro_batch:
                raise ValueError(f"--train_text {args.train_text} ended after {step} steps; lower --max_steps")
            torch.manual_seed(hash((args.seed, step, piece)))   # dropout by seed, step and piece, so runs can resume
            loss, terms = batch_loss(model, batch, tokenizer, sizes, args, [args.seed, step, piece])
            (loss / pieces).backward()   # the mean over pieces; another number of pieces gives other masks
            piece_terms.append(terms)
        losses = {name: sum(terms[name] for terms in piece_terms) / len(mine) for name in piece_terms[0]}
        norm = sum_and_clip(model.parameters(), step, losses)
        optimizer.step()

        done = step + 1
        records.append(losses | {"norm": norm})
        if done % (args.log_interval or max_steps) == 0 or done == max_steps:
            ms = 1000 * (time.time() - clock) / len(records)
            log(log_file, {"step": done} | average(records) | {
                "lr": lr, "ms": ms, "minutes left": ms * (max_steps - done) / 60_000},
                ["step", *list(losses)[:3], *list(losses)[-2:], "lr", "norm", "ms", "minutes left"])
            clock, records = time.time(), []
        if done % (args.eval_interval or max_steps) == 0 or done == max_steps:
            start = time.time()
            values = validate(model, held_out, tokenizer, sizes, args)
            log(log_file, {"step": done} | values, ["step", *values])
            clock += time.time() - start
        if rank == 0 and (done % (args.save_interval or max_steps) == 0 or done == max_steps):
            save_run(args, done, model, optimizer, must_match, model.bert, tokenizer, model.head)

# ---- flags ---------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train_text", default="docs", help="docs, a .txt (a line is a document), a table with the column text, hub")
    add("--columns", nargs="+", default=[], metavar="KIND=COLUMN", help="another name of the column: text=body")
    add("--streaming", action=flag, default=False, help="read the text as it arrives, in its order; needs --max_steps")
    add("--max_length", type=int, default=64, help="tokens with [CLS] and [SEP]: one random window a document")
    add("--batch_size", type=int, default=32, help="documents a step, over all ranks")
    add("--micro_batch", type=int, default=0, help="documents at a time: less memory; 0: all of a rank")
    add = parser.add_argument_group("loss").add_argument
    add("--objective", choices=["smae", "mlm"], default="smae", help="mlm: no decoder, by default the full size alone")
    add("--encoder_mask", type=float, default=0.2, help="share of the tokens hidden from the encoder")
    add("--decoder_mask", type=float, default=0.4, help="share hidden from the decoder, with the encoder's")
    add = parser.add_argument_group("model").add_argument
    add("--init_from", default="scratch", help="scratch, a folder, or a BERT of the hub")
    add("--sizes", type=parse_sizes, help="LAYER:DIM,...; by default the model's own, or the paper's")
    add("--dropout", type=float, default=0.0, help="BERT's own is 0.1")
    add("--num_layers", type=int, default=6, help="from scratch: blocks")
    add("--hidden_size", type=int, default=192, help="from scratch: channels")
    add("--vocab_size", type=int, default=8192, help="from scratch: WordPiece entries")
    add = parser.add_argument_group("optimisation").add_argument
    add("--learning_rate", type=float, default=1e-3, help="peak, of AdamW")
    add("--embedding_lr_scale", type=float, help="times that for the embeddings; by default 3 from scratch, else 1")
    add("--warmup", type=float, default=0.05, help="share of the steps; then the rate falls to 0")
    add("--weight_decay", type=float, default=0.001, help="of all but biases and LayerNorms")
    add("--epochs", type=float, default=6, help="passes over the data")
    add("--max_steps", type=int, help="by default what --epochs says")
    add("--seed", type=int, default=1, help="of weights, order, windows, masks and dropout")
    add = parser.add_argument_group("system").add_argument
    add("--out_dir", default="out/smae", help="where the model and the log go")
    add("--resume", action=flag, default=False, help="go on with the stopped run in --out_dir, exactly")
    add("--log_interval", type=int, default=10, help="steps between two lines of the log")
    add("--save_interval", type=int, default=200, help="steps between two checkpoints; 0: at the end only")
    add("--eval_interval", type=int, default=200, help="steps between two losses on held-out text; 0: only at the end")
    add("--gradient_checkpointing", action=flag, default=False, help="less memory: backward computes blocks again")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--dtype", choices=["float32", "bfloat16"], default=fast_dtype(), help="of the matrix products")
    add("--compile", action=flag, default=torch.cuda.is_available(), help="torch.compile the blocks but for attention")
    args = parser.parse_args(argv)
    if not 0 < args.encoder_mask <= args.decoder_mask < 1 or args.max_length < 3:
        parser.error("0 < --encoder_mask <= --decoder_mask < 1 and --max_length >= 3 are needed")
    if args.streaming and not args.max_steps:
        parser.error("--streaming does not know how long the text is; give --max_steps")
    if args.embedding_lr_scale is None:   # a word is seen less often than a block
        args.embedding_lr_scale = 3.0 if args.init_from == "scratch" else 1.0
    return args

if __name__ == "__main__":
    run_script(main, parse_args)
