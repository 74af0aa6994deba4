"""
Pre-train one BERT encoder so that every size can sum up a text: SMAE, Starbucks Masked Autoencoding.

    python pretrain_smae.py                    # from scratch, on the docs of this machine; about 25 minutes on 2 cores
    python pretrain_smae.py --objective mlm --out_dir out/mlm                  # the control: MLM on the same tokens
    python pretrain_smae.py --train_text my_text.txt.gz --out_dir out/mine     # a line is a document
    torchrun --nproc_per_node 8 pretrain_smae.py --init_from bert-base-uncased ...     # the paper's run: runs/paper.sh

Writes to OUT_DIR an ordinary Hugging Face BertForMaskedLM (SMAE's pooling is cls) for finetune_srl.py --init_from;
training_state.pt, which --resume takes and which holds the decoder; args.json and log.jsonl.
Paper: arXiv 2410.13230. smae_loss is its loss, MLM and MAE.
"""
import argparse, copy, itertools, math, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from model import (STATE, HelpFormatter, MLMHead, as_contiguous, autocast, average, catch_signals, check_about,
                   check_finite, check_out_dir, check_sizes, configure_optimizer, dropout, fraction, get_lr,
                   interrupted, keep_freed_memory, load_head, load_model, load_run, log, named_sizes, new_bert,
                   nonneg_int, number, open_run, pack, positive_float, positive_int, readable, run_script, save_run,
                   set_sizes, size_name, start_ranks, status, sum_over_ranks, training_flags)

# ---- the method ------------------------------------------------------------------------------------------------------
# B texts, N tokens of a batch, C channels, D dims of a size, S sizes (layer, dim), V vocabulary;
# M positions that the encoder must guess, M' those of the decoder
# Read smae_loss first, then what it calls: with_ids, `transform` of MLMHead (model.py), decode, vocabulary_loss. The
# last two are the definition. batch_loss passes fast_decode and fast_vocabulary_loss in their place, which tests hold
# equal; you need those only to change the decoder or the loss over the vocabulary.

class SMAE(nn.Module):
    """ What is trained: encoder, MLM head, and a decoder of one layer that is not needed afterwards. The decoder has no
    embeddings of its own: it reads the encoder's layer 0. No parameter belongs to one size: a size (layer, D) uses the
    first `layer` blocks and the first D columns of the head's matrix. smae_loss calls the parts, so there is no
    forward. """
    def __init__(self, bert, head):
        super().__init__()
        self.bert, self.head = bert, head
        self.decoder = copy.deepcopy(bert.blocks[0])   # starts as a copy of the encoder's first block

def with_ids(batch, ids):
    """ the Pack with other ids: the masked ones, which stop before pack's filler tokens """
    ids = torch.from_numpy(ids).to(batch.input_ids.device)
    return batch._replace(input_ids=F.pad(ids, (0, len(batch.input_ids) - len(ids))))   # fillers have the id 0

def decode(decoder, embeddings, bottlenecks, batch, positions):
    """ (N, C), (S, B, C), masked positions (M',) -> (S, M', C): what the decoder makes of the positions it must guess.
    `fast_decode` equals it without dropout. If you change this function, let `batch_loss` pass it. """
    decoded = []
    for vectors in bottlenecks:                                           # (B, C), one size
        # The bottleneck replaces [CLS]. It needs no position embedding, because it is always at position 0.
        x = embeddings.index_copy(0, batch.starts, vectors.to(embeddings.dtype))   # (N, C); GPU autocast mixes dtypes
        decoded.append(decoder(x, batch.groups)[positions])               # (M', C)
    return torch.stack(decoded)

def vocabulary_loss(model, hidden, labels):
    """ hidden {term: (M, C)}, what transform gives at the positions to guess; labels {term: (M,)}, the true ids; M' for
    MAE's terms -> mean over terms of CE(E hidden + bias, labels), {term: CE}, {term: accuracy}.
    `fast_vocabulary_loss` equals it where every term has a position. """
    ce, accuracy = {}, {}
    for term in hidden:
        logits = hidden[term] @ model.bert.word.weight.T + model.head.bias         # (M, V)
        ce[term] = F.cross_entropy(logits, labels[term])
        accuracy[term] = (logits.argmax(-1) == labels[term]).float().mean()
    return sum(ce.values()) / len(ce), ce, accuracy

def smae_loss(model, batch, masked, sizes, objective="smae", decode_with=decode, loss_with=vocabulary_loss):
    """ For every size (layer, dim), with E the word embeddings (V, C) and the functions above:
      h   = the first dim coordinates of the encoder's output at that layer
      MLM = CE( E transform(h) + bias, words hidden from the encoder )
      x   = layer 0 of the decoder's ids, with x[CLS] replaced by the bottleneck transform(h[CLS])
      MAE = CE( E transform(decoder(x)) + bias, words hidden from the decoder )
      L   = mean over sizes of (MLM + MAE) / 2;  with objective "mlm" the mean of MLM alone
    The decoder shares the encoder's layer 0, but of what the blocks make of the text it sees the bottleneck alone, and
    much of its own input is hidden (--decoder_mask). So it can only do well if dim numbers say what the text is about.
    All sizes share the head and the decoder.
    batch, masked: Pack and Masked of the same texts. decode_with, loss_with: training passes the fast ones.
    -> loss, {"mlm 1:8": CE, ..., "mae 1:8": CE, ...}, the same names with accuracies """
    device = batch.input_ids.device                  # batch has the true ids; with_ids gives it the masked ones
    hidden, labels = {}, {}                          # by term: "mlm 1:8", ..., then "mae 1:8", ...

    # MLM: one pass of the encoder, read at every size
    taps = model.bert(with_ids(batch, masked.encoder_ids), [layer for layer, _ in sizes])      # {layer: (N, C)}
    sliced = {size_name((layer, dim)): taps[layer][:, :dim] for layer, dim in sizes}           # h of a size, (N, D)
    encoder_at = torch.from_numpy(masked.encoder_positions).to(device)                         # (M,)
    for name, h in sliced.items():
        hidden[f"mlm {name}"] = model.head.transform(h[encoder_at])                            # (M, C)
        labels[f"mlm {name}"] = batch.input_ids[encoder_at]                                    # (M,)

    # MAE: the decoder guesses from its own tokens and, in place of [CLS], the bottleneck of one size at a time
    if objective == "smae":
        bottlenecks = torch.stack([model.head.transform(h[batch.starts]) for h in sliced.values()])   # (S, B, C)
        embeddings = model.bert.embed(with_ids(batch, masked.decoder_ids))                     # (N, C)
        decoder_at = torch.from_numpy(masked.decoder_positions).to(device)                     # (M',)
        # maybe_checkpoint(f, ...) is f(...): decode(model.decoder, ..., decoder_at) -> (S, M', C)
        decoded = model.bert.maybe_checkpoint(decode_with, model.decoder, embeddings, bottlenecks, batch, decoder_at)
        for name, guesses in zip(sliced, model.head.transform(decoded)):                       # (M', C) of a size
            hidden[f"mae {name}"] = guesses
            labels[f"mae {name}"] = batch.input_ids[decoder_at]                                # (M',)

    return loss_with(model, hidden, labels)   # L is the mean of the terms: 2S, or S with objective "mlm"

def batch_loss(model, documents, tokenizer, sizes, args, seed):
    """ documents -> what smae_loss returns, number of tokens. The two fast functions are below the double line. """
    masked = data.smae_batch(documents, args.max_length, (args.encoder_mask, args.decoder_mask), tokenizer, seed)
    # autocast keeps a bfloat16 copy of every weight until it ends: memory that --gradient_checkpointing saves, too
    with autocast(args.device, args.dtype, cache_enabled=not args.gradient_checkpointing):
        losses = smae_loss(model, pack(masked.texts, args.device, multiple=128), masked, sizes, args.objective,
                           fast_decode, fast_vocabulary_loss)
    return losses, len(masked.encoder_ids)

# ==== Below: the same in less time and memory (training uses these two), then the training itself and its flags =======
def fast_decode(decoder, embeddings, bottlenecks, batch, positions):
    """ Equals `decode` without dropout. The S inputs of the decoder differ at position 0 alone. So the attention among
    all other positions is computed once, and each size then mixes in its bottleneck with the weight that the softmax
    gives it.
    With s_0 the score of the bottleneck and s_j the scores of the other positions,
        softmax(s)_0 = exp s_0 / (exp s_0 + sum_j exp s_j) = sigmoid(s_0 - logsumexp_j s_j)
    In the code: weight, s_first and logsumexp; the attention gives (1 - weight) * others + weight * v_first.
    Dropout is drawn once for that shared attention. This function needs a decoder of one layer, and no [CLS] among the
    positions. """
    attention = decoder.attention
    (N, C), S, H = embeddings.shape, len(bottlenecks), attention.heads
    width = C // H
    # 1. q, k, v of the decoder's tokens, once; of position 0 k and v for each size ([C:] leaves out q: no guess there)
    qkv = attention.qkv(embeddings).view(N, 3, H, width)
    kv_first = F.linear(bottlenecks, attention.qkv.weight[C:], attention.qkv.bias[C:])   # (S, B, 2C)
    k_first, v_first = kv_first.view(S, -1, 2, H, width).unbind(2)                       # (S, B, H, width) each
    with torch.autocast(embeddings.device.type, enabled=False):
        # 2. the attention among all positions but 0, which the sizes share, and its normaliser
        others, logsumexp = [], []
        # A filler is a text of one token, without others: its logsumexp is -inf. No position to guess is a filler.
        for (G, T), rows in zip(batch.groups, qkv.split([G * T for G, T in batch.groups])):
            rows = rows.view(G, T, 3, H, width).permute(2, 0, 3, 1, 4)
            q, k, v = as_contiguous(rows, torch.promote_types(qkv.dtype, torch.float32))   # (G, H, T, width) each
            scores = (q * width**-0.5) @ k[:, :, 1:].transpose(-1, -2)                     # (G, H, T, T-1)
            probs = dropout(scores.softmax(-1), attention.p, decoder.training)             # (G, H, T, T-1)
            attended = probs @ v[:, :, 1:]                                                 # (G, H, T, width)
            others.append(attended.transpose(1, 2).reshape(G * T, H, width))
            logsumexp.append(scores.logsumexp(-1).transpose(1, 2).reshape(G * T, H, 1))
        others, logsumexp = torch.cat(others)[positions], torch.cat(logsumexp)[positions]   # (M', H, width), (M', H, 1)
        # 3. each size mixes its bottleneck in, at the positions to guess
        q_masked, text_ids = qkv[positions, 0], batch.text_ids[positions]                # (M', H, width), (M',)
        products = q_masked * k_first[:, text_ids]                                       # (S, M', H, width)
        s_first = products.sum(-1, keepdim=True, dtype=others.dtype) * width**-0.5       # (S, M', H, 1)
        weight = (s_first - logsumexp).sigmoid()                                         # of the bottleneck
        dropped = dropout(weight, attention.p, decoder.training)
        mixed = (1 - weight) * others + dropped * v_first[:, text_ids]                   # (S, M', H, width)
    return decoder.after_attention(embeddings[positions], attention.out(mixed.flatten(2)))

def fast_vocabulary_loss(model, hidden, labels):
    """ Equals `vocabulary_loss`, but a term without positions counts 0, and a tie for the best word is a hit. All terms
    in one call: with the row weights 1 / (terms * rows of the term) the sum over all rows is the mean over terms of
    their means. """
    rows = [len(label) for label in labels.values()]
    word = model.bert.word.weight                                                       # (V, C)
    weights = torch.cat([word.new_full((M,), 1 / (len(rows) * max(1, M))) for M in rows])
    loss, ce, hit = VocabularyLoss.apply(torch.cat(list(hidden.values())), word, model.head.bias,
                                         torch.cat(list(labels.values())), weights, torch.is_grad_enabled())
    def mean(values):
        return {term: part.sum() / max(1, len(part)) for term, part in zip(hidden, values.split(rows))}
    return loss, mean(ce), mean(hit.float())

class VocabularyLoss(torch.autograd.Function):
    """ hidden (M, C), weight (V, C), bias (V,), labels (M,), row_weights (M,), needs_grad
    -> sum of row_weights * CE, CE (M,), hit (M,). needs_grad: forward itself cannot see whether it runs under no_grad.
        logits = hidden weight^T + bias,   CE = logsumexp(logits) - logits[label]
        g = row_weights (softmax(logits) - onehot(label)),   the gradient of the logits, (M, V)
        d hidden = g weight,   d weight = g^T hidden,   d bias = column sums of g
    The logits never exist as a whole: ROWS rows are multiplied out, turned into their own gradient on the spot and
    overwritten by the next. That takes three products, as any training step; checkpointing would take four. """
    ROWS = 1024   # rows: 50 MB of buffers with a vocabulary of 8,192, 190 MB with 30,522
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, row_weights, needs_grad):
        device, dtype = hidden.device, hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, enabled=False):
            x, w = hidden.to(dtype), weight.to(dtype)
            ce, hit = torch.empty_like(row_weights), torch.empty_like(labels, dtype=torch.bool)
            if needs_grad:
                d_hidden, d_weight, d_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
                ctx.grads = [d_hidden, d_weight, d_bias]
            at_once = min(VocabularyLoss.ROWS, max(1, len(x)))
            # Buffers, because on a CPU fresh memory of this size costs as much time as the product that fills it.
            # `buffer32` holds one after the other logits, probabilities and g; `buffer` holds logits and g in dtype.
            buffer = x.new_empty(at_once, len(w))                                   # (ROWS, V) in dtype
            buffer32 = weight.new_empty(at_once, len(w))                            # (ROWS, V) in float32
            product3 = torch.empty_like(w)                                          # (V, C)
            for i in range(0, len(x), at_once):
                rows = slice(i, i + at_once)
                xs, ys = x[rows], labels[rows, None]                    # (ROWS, C), (ROWS, 1); the last has fewer
                product1 = torch.mm(xs, w.T, out=buffer[:len(xs)])
                logits = buffer32[:len(xs)].copy_(product1).add_(bias)
                top, true = logits.amax(1), logits.gather(1, ys)[:, 0]
                probs = torch.softmax(logits, 1, out=logits)            # in the memory of the logits
                ce[rows] = top - true - probs.amax(1).log()             # log sum exp = top - log(probability of top)
                hit[rows] = true == top
                if needs_grad:
                    g_full = probs                                      # in the same memory once more
                    g_full.scatter_add_(1, ys, torch.full_like(ys, -1, dtype=probs.dtype))   # softmax - onehot
                    g_full.mul_(row_weights[rows, None])
                    d_bias += g_full.sum(0)
                    g = buffer[:len(xs)].copy_(g_full)                  # (ROWS, V), over the logits in dtype
                    torch.mm(g, w, out=d_hidden[rows])                  # product 2
                    d_weight += torch.mm(g.T, xs, out=product3)
        ctx.mark_non_differentiable(ce, hit)
        return (ce * row_weights).sum(), ce, hit

    @staticmethod
    def backward(ctx, grad, *_):
        grads = [g.mul_(grad.to(g.dtype)) for g in ctx.grads]   # in place, so backward can run only once
        del ctx.grads   # if the loss kept them alive, torch would copy them into .grad
        return *grads, None, None, None

# ---- training --------------------------------------------------------------------------------------------------------
HELD_OUT = 500                       # documents that are never trained on: the validation loss
MAX_COUNTED_TOKENS = 10_000_000      # that the frequencies of the words are taken from
MAX_VOCABULARY_DOCUMENTS = 200_000   # that a vocabulary is trained on

def build_model(args, saved):
    """ -> SMAE, tokenizer, sizes to train. saved: the state of the run to resume, or None """
    init_from = args.out_dir if saved else args.init_from
    if init_from == "scratch":
        print(f"training a WordPiece vocabulary of {args.vocab_size} on the text")
        texts = data.load_texts(args.train_text, args.streaming, columns=args.columns)
        texts = itertools.islice(texts, MAX_VOCABULARY_DOCUMENTS)
        tokenizer = data.train_wordpiece(texts, args.vocab_size)
        bert = new_bert(args, tokenizer, max(512, args.max_length))   # room for longer texts later
        head = MLMHead(bert.config)
    else:
        bert, tokenizer = load_model(init_from, hidden_dropout_prob=args.dropout,
                                     attention_probs_dropout_prob=args.dropout)
        head = load_head(init_from, bert.config)
        if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id):
            raise ValueError(f"{init_from}: its tokenizer has no [CLS], [SEP] or [MASK]; copy a BERT's files there")
    config = bert.config
    if args.max_length > config.max_position_embeddings:
        raise ValueError(f"--max_length {args.max_length}: {init_from} has {config.max_position_embeddings} positions; "
                         "choose that or less")
    if args.objective == "smae":
        sizes = check_sizes(args.sizes or named_sizes(config), config)
        set_sizes(config, sizes)
        config.pooling = "cls"   # the vector that SMAE trains
    else:
        full = (config.num_hidden_layers, config.hidden_size)
        sizes = check_sizes(args.sizes or [full], config)
        set_sizes(config, ())    # fine-tuning chooses the sizes
    tokenizer.model_max_length = args.max_length
    model = SMAE(bert, head).to(args.device).train()
    bert.gradient_checkpointing = args.gradient_checkpointing
    load_weights(model, Path(init_from, STATE), saved)
    return model, tokenizer, sizes

def load_weights(model, state_file, saved):
    """ Encoder, head and decoder of an earlier SMAE, if there is one: of the run to resume, `saved`, or of the run that
    --init_from names. Only training_state.pt has a decoder; and after a kill model.safetensors may be newer. A stopped
    fine-tuning and plain MLM have no trained decoder in their state_file: then the new decoder stays. """
    if state_file.exists():
        with readable(f"{state_file}: does not fit the model there", "delete it, for a new decoder"):
            earlier = saved or torch.load(state_file, map_location="cpu", weights_only=True)
            if saved or earlier["args"].get("objective") == "smae":
                model.load_state_dict(earlier["model"])

def split_batch(args, world_size):
    """ -> documents of a piece, pieces of a batch: 32 documents in micro-batches of 8 are 4 pieces, 2 for each of 2
    ranks. Raises ValueError if the ranks cannot share the pieces equally. """
    micro_batch = args.micro_batch or args.batch_size // world_size
    pieces = args.batch_size // max(1, micro_batch)
    if micro_batch == 0 or args.batch_size % micro_batch or pieces % world_size:
        raise ValueError(f"--batch_size {args.batch_size} --micro_batch {args.micro_batch}: {world_size} ranks cannot "
                         f"share pieces of that size equally; choose a multiple of {world_size} x --micro_batch")
    return micro_batch, pieces

def stream_text(args, tokenizer, micro_batch, first_step, my_pieces, rank, world_size):
    """ --train_text as it arrives -> held-out documents, max_steps, and an iterator that yields for each step from
    first_step on [(piece, documents), ...]: the pieces of the batch that are this rank's. It raises ValueError when the
    text ends too soon. """
    stream = data.tokenize_documents(data.load_texts(args.train_text, True, rank, world_size, args.columns), tokenizer)
    held_out = list(itertools.islice(stream, HELD_OUT))
    read_before = first_step * args.batch_size // world_size    # by this rank, before the run was stopped
    stream = itertools.islice(stream, read_before, None)        # reads them again and drops them
    def batches():
        for step in range(first_step, args.max_steps):
            found = [(piece, list(itertools.islice(stream, micro_batch))) for piece in my_pieces]
            if len(found[-1][1]) < micro_batch:
                raise ValueError(f"--train_text {args.train_text} ended at step {step}; choose fewer --max_steps")
            yield found
    return held_out, args.max_steps, batches()

def shuffle_text(args, text, micro_batch, first_step, my_pieces):
    """ a TokenFile in random order -> the same as stream_text. Raises ValueError when there are too few documents, or
    too short ones. """
    longest = min(np.diff(text.ends, prepend=0).max(), args.max_length - 2)
    if round(args.encoder_mask * longest) == 0:
        raise ValueError(f"--encoder_mask {args.encoder_mask}: hides none of the {longest} tokens that the longest "
                         f"document of {args.train_text} has; choose more, or longer documents")
    n_held_out = min(HELD_OUT, (len(text) + 9) // 10)     # of few documents a tenth
    held_out, train = np.split(np.random.default_rng(0).permutation(len(text)), [n_held_out])
    if args.batch_size > len(train):
        raise ValueError(f"--batch_size {args.batch_size}: {args.train_text} has {len(train)} documents to train "
                         "on; choose that or less")
    steps_an_epoch = len(train) // args.batch_size
    max_steps = args.max_steps or max(1, round(args.epochs * steps_an_epoch))
    def batches():
        for step in range(first_step, max_steps):
            epoch, i = divmod(step, steps_an_epoch)
            rows = train[data.epoch_order(len(train), args.seed, epoch)[i * args.batch_size:(i + 1) * args.batch_size]]
            yield [(piece, [text[row] for row in rows[piece * micro_batch:(piece + 1) * micro_batch]])
                   for piece in my_pieces]
    return [text[row] for row in held_out], max_steps, batches()

def set_bias(head, text):
    """ Start the bias of a new MLM head at the log frequency of every word. Otherwise the word embeddings have to learn
    the frequencies: then the vectors of all rare words become alike, and they are hard to tell apart. """
    counts = np.bincount(text.tokens[:MAX_COUNTED_TOKENS], minlength=len(head.bias)) + 1
    with torch.no_grad():
        head.bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))

def validate(model, held_out, tokenizer, sizes, args):
    """ what smae_loss returns, on the held-out documents, with the same windows and masks every time, as floats """
    model.eval()
    with torch.no_grad():
        losses = [batch_loss(model, held_out[i:i + 50], tokenizer, sizes, args, [0, i])[0]
                  for i in range(0, len(held_out), 50)]
    model.train()
    loss, ce, accuracy = zip(*losses)
    return torch.stack(loss).mean().item(), average(ce), average(accuracy)   # of batches; the last may be smaller

def main(args):
    """ model, text, optimizer, loop. Raises ValueError or OSError for what the user can mend. """
    start = time.time()
    rank, world_size = start_ranks(args)
    keep_freed_memory(not args.gradient_checkpointing)
    torch.manual_seed(args.seed)

    # model and text
    micro_batch, pieces = split_batch(args, world_size)
    saved = load_run(args) if args.resume else None
    first_step = saved["step"] if saved else 0
    model, tokenizer, sizes = build_model(args, saved)
    my_pieces = range(rank, pieces, world_size)
    if args.streaming:
        text = None
        held_out, max_steps, batches = stream_text(
            args, tokenizer, micro_batch, first_step, my_pieces, rank, world_size)
    else:
        if rank > 0:
            dist.barrier()                     # rank 0 writes the file; the others wait, then find it
        text = data.token_file(args.train_text, tokenizer, args.columns)
        if rank == 0 and world_size > 1:
            dist.barrier()
        held_out, max_steps, batches = shuffle_text(args, text, micro_batch, first_step, my_pieces)
    about = {"--train_text": text.name if text else args.train_text,
             "pieces of a batch": pieces, "ranks with --streaming": world_size * args.streaming}
    if saved:
        check_about(args, saved, about)
    if args.init_from == "scratch" and not saved and text:
        set_bias(model.head, text)

    # optimizer
    trained = {name: parameter for name, parameter in model.named_parameters()
               if args.objective == "smae" or not name.startswith("decoder")}
    optimizer = configure_optimizer(trained, args.learning_rate, args.weight_decay, ["bert.word.weight"],
                                    args.word_lr_scale if args.init_from == "scratch" else 1.0)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    if args.compile:
        for block in [*model.bert.blocks, model.decoder]:   # not attention: its groups differ in every batch
            block.after_attention = torch.compile(block.after_attention, dynamic=True)

    log_file = open_run(args, first_step) if rank == 0 else None
    print(f"{args.objective}, {max_steps} steps of {args.batch_size} documents; "
          f"sizes {', '.join(map(size_name, sizes))}; "
          f"{sum(parameter.numel() for parameter in trained.values()) / 1e6:.2f}M parameters; "
          f"{args.dtype} on {args.device}")

    # the loop
    clock, tokens, records, caught = time.time(), 0, [], catch_signals()
    for step, documents_of_pieces in enumerate(batches, start=first_step):
        lr = get_lr(step, max_steps, args, "cosine")   # as in the paper's run
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.zero_grad(set_to_none=True)
        for piece, documents in documents_of_pieces:
            torch.manual_seed(hash((args.seed, step, piece)))   # dropout by seed, step and piece, so runs can resume
            (loss, ce, accuracy), N = batch_loss(model, documents, tokenizer, sizes, args, [args.seed, step, piece])
            (loss / pieces).backward()   # the mean of the pieces' losses; unlike in SRL, other pieces are other masks
            tokens += N * world_size
            records.append(({"loss": loss}, ce, accuracy))     # of each piece since the last line of the log
        sum_over_ranks(trained.values(), world_size)           # the sum over all pieces of the batch
        norm = nn.utils.clip_grad_norm_(trained.values(), args.grad_clip or math.inf)
        check_finite(step, loss, norm, ce, args)               # loss and ce of the last piece; the norm covers all
        optimizer.step()

        last_step = step + 1 == max_steps or interrupted(caught, args, world_size)
        if (step + 1) % args.log_interval == 0 or last_step:
            mean_loss, mean_ce, mean_accuracy = (average(column, world_size) for column in zip(*records))
            steps_done = len(records) * world_size / pieces
            seconds = (time.time() - clock) / steps_done
            shown = [f"{name} {mean_ce[name]:.2f} acc {mean_accuracy[name]:.2f}"
                     for name in dict.fromkeys([list(mean_ce)[0], list(mean_ce)[-1]])]
            log(log_file, {"step": step + 1, "loss": mean_loss["loss"], "ce": mean_ce, "accuracy": mean_accuracy,
                           "learning_rate": lr, "norm": norm.item(), "ms": 1000 * seconds,
                           "tokens_per_second": tokens / steps_done / seconds, "seconds": time.time() - start},
                status(step + 1, max_steps, [f"loss {mean_loss['loss']:.3f}", *shown], lr, norm, seconds,
                       tokens / steps_done))
            clock, tokens, records = time.time(), 0, []
        if args.eval_interval and (step + 1) % args.eval_interval == 0 or step + 1 == max_steps:
            pause = time.time()
            loss, ce, accuracy = validate(model, held_out, tokenizer, sizes, args)
            log(log_file, {"step": step + 1, "val_loss": loss, "val_ce": ce, "val_accuracy": accuracy},
                f"step {step + 1}/{max_steps} | validation loss {loss:.3f} | "
                + " | ".join(f"{name} {ce[name]:.2f} acc {accuracy[name]:.2f}" for name in ce))
            clock += time.time() - pause
        if rank == 0 and (last_step or args.save_interval and (step + 1) % args.save_interval == 0):
            save_run(args, step + 1, model.bert, tokenizer, {"model": model, "optimizer": optimizer}, about, last_step,
                     model.head)
        if last_step and step + 1 < max_steps:
            raise KeyboardInterrupt(f"stopped after step {step + 1}; go on with the same command and --resume")
    print(f"saved {args.out_dir}; {(time.time() - start) / 60:.1f} minutes in all")

# ---- flags -----------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args; a wrong one ends the program with status 2 and a line that says why """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train_text", default="docs",
        help="docs, a .txt file (a line is a document), a file with the column text (.jsonl, .csv, .tsv, .parquet), or "
             "NAME[:CONFIG][:SPLIT] of the hub; tokenised once into a memory-mapped file")
    add("--streaming", action=flag, default=False,
        help="read parquet and hub sets as they arrive, in their order; every rank has files of its own")
    add("--max_length", type=number(int, "8 or more, to leave something to mask", lambda value: value >= 8), default=64,
        help="tokens, [CLS] and [SEP] included: one random window a document")
    add("--batch_size", type=positive_int, default=32, help="documents a step, over all ranks")
    add("--micro_batch", type=nonneg_int, default=0,
        help="documents at a time, which decides the memory; the ranks share these pieces; 0: one piece each")
    add = parser.add_argument_group("loss").add_argument
    add("--objective", choices=["smae", "mlm"], default="smae",
        help="mlm leaves the decoder out: MLM alone, at --sizes, by default at the full size")
    add("--encoder_mask", type=fraction, default=0.2, help="share of the tokens hidden from the encoder")
    add("--decoder_mask", type=fraction, default=0.4, help="share hidden from the decoder")
    add("--word_lr_scale", type=positive_float, default=3.0,
        help="from scratch: learning rate of the word embeddings over that of the rest; a word is seen less often")
    add = parser.add_argument_group("validation and memory").add_argument
    add("--eval_interval", type=nonneg_int, default=200,
        help="steps between two measurements of the loss on held-out text; 0 for the end only")
    add("--gradient_checkpointing", action=flag, default=False,
        help="least memory: compute blocks and decoder again in the backward pass; 1.6 times the time at BERT-base")
    training_flags(parser)
    parser.set_defaults(learning_rate=1e-3, warmup=0.05, weight_decay=0.001, epochs=6, out_dir="out/smae")

    args = parser.parse_args(argv)
    if not 0 < args.encoder_mask <= args.decoder_mask:
        parser.error(f"--encoder_mask {args.encoder_mask} --decoder_mask {args.decoder_mask}: shares between 0 and 1, "
                     "the encoder's not above the decoder's, whose mask contains it")
    if args.streaming and not args.max_steps:
        parser.error("--streaming does not know how long the text is; give --max_steps")
    check_out_dir(parser, args)
    return args

if __name__ == "__main__":
    run_script(main, parse_args)
