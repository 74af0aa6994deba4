"""
BERT that can be read at any layer, for texts packed into one row of tokens.

Starbucks (arXiv 2410.13230) uses one BERT encoder (arXiv 1810.04805) at several sizes. A size is a pair (layer, dim):
run the first `layer` blocks, pool the tokens of each text into one vector, keep the first `dim` coordinates. BERT
normalises the output of every block, so each block's output (a "tap") can serve as an embedding without an extra head.
Layers count from 1; layer 0 is the output of the embedding layer.

Letters for shapes, the same in all files:
  B texts, T tokens of one text, N tokens of all texts of a batch, G texts of equal length, C channels (768), H heads,
  S sizes, D dims that a size keeps (the first D of the C), Q queries, P passages, M positions that the encoder must
  guess, M' those of SMAE's decoder, V words of the vocabulary.
In formulas L is the loss, q a query, p a passage; as an argument of a function p is the dropout.
"""
import argparse, contextlib, copy, ctypes, functools, json, math, os, re, shutil, signal, subprocess, sys, tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- sizes: (layer, dim) pairs ---------------------------------------------------------------------------------------
# name, share of the model's layers, share of its channels
SIZES = [("Demi", 1/6, 1/24), ("Short", 1/3, 1/12), ("Tall", 1/2, 1/6),
         ("Grande", 2/3, 1/3), ("Venti", 5/6, 2/3), ("Trenta", 1, 1)]

def default_sizes(config):
    """ {(layer, dim): name} of SIZES, small to large: 2:32 ... 12:768 for BERT-base, 1:8 ... 6:192 for the 6 layers x
    192 of the scripts' default """
    return {(max(1, round(config.num_hidden_layers * layers)), max(1, round(config.hidden_size * channels))): name
            for name, layers, channels in SIZES}   # in a tiny model two may round to the same pair: the later one stays

def named_sizes(config):
    """ {(layer, dim): name or ""}: the sizes in the model's config, which may lack names; the default ones if it holds
    none """
    if not config.sizes:
        return default_sizes(config)
    return dict.fromkeys(config.sizes, "") | dict(zip(config.sizes, config.size_names))

def set_sizes(config, sizes):
    """ sizes -> config, with the names that named_sizes has for them """
    names = named_sizes(config)
    config.sizes, config.size_names = tuple(sizes), tuple(names.get(size, "") for size in sizes)

def full_size(config):
    """ the last of the model's sizes: the deepest and, in a model of finetune_srl.py, also the widest """
    return list(named_sizes(config))[-1]

def size_name(size):
    """ (2, 32) -> "2:32" """
    return f"{size[0]}:{size[1]}"

# ---- the batch without padding, the vector of a text, the score of a pair --------------------------------------------
class Pack(NamedTuple):
    """ B texts in one row of N tokens, short texts first, in place of (B, T) ids and a mask for padding. Linear
    layers, LayerNorm and GELU treat every token alone, so they run on the row; attention views each group of G equally
    long texts as (G, T, C). Three texts of 4, 2 and 4 tokens, called a, b, c, become the row  b b a a a a c c c c  with
        position_ids 0 1 0 1 2 3 0 1 2 3,  text_ids 1 1 0 0 0 0 2 2 2 2,  starts 2 0 6,  groups [(1, 2), (2, 4)] """
    input_ids: torch.Tensor      # (N,)
    position_ids: torch.Tensor   # (N,) 0 .. T-1 within each text
    text_ids: torch.Tensor       # (N,) number of the token's text in the caller's list; filler tokens have B
    starts: torch.Tensor         # (B,) where each text of the caller's list begins: its [CLS]
    groups: list                 # [(G, T), ...] in the order of the row; fillers come last, as texts of one token

def pack(token_ids, device="cpu", multiple=1):
    """ list of B (T,) integer arrays of token ids -> Pack. Raises ValueError on a text without tokens.
    multiple: round N up to a multiple with filler tokens, which belong to no text. A CPU's matrix library compiles a
    kernel for every new N; with multiples of 128 only a dozen different N occur. A batch below 8 x multiple stays as it
    is, because fillers would cost more than they save. """
    lengths = np.array([len(text) for text in token_ids])
    if lengths.min() == 0:
        raise ValueError("a text without a single token; a tokenizer adds at least [CLS] and [SEP]")
    order = np.argsort(lengths, kind="stable")                              # (B,) short texts first
    ends = lengths[order].cumsum()                                          # (B,)
    starts = np.empty_like(lengths)                                         # (B,)
    starts[order] = ends - lengths[order]
    text_ids = np.repeat(order, lengths[order])                             # (N,)
    T_values, G_values = np.unique(lengths, return_counts=True)             # ascending
    groups = list(zip(G_values.tolist(), T_values.tolist()))
    fillers = int(-ends[-1] % multiple) if ends[-1] >= 8 * multiple else 0
    if fillers:
        groups.append((fillers, 1))
    def tensor(array):
        return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
    def padded(array, value=0):   # (N without fillers,) -> (N,)
        return tensor(np.pad(array, (0, fillers), constant_values=value))
    return Pack(input_ids=padded(np.concatenate([token_ids[i] for i in order])),
                position_ids=padded(np.arange(ends[-1]) - starts[text_ids]),
                text_ids=padded(text_ids, len(token_ids)), starts=tensor(starts), groups=groups)

def mean_pool(hidden, batch):
    """ (N, C) -> (B, C): the mean over the tokens of each text, [CLS] and [SEP] included """
    B = len(batch.starts)
    lengths = torch.bincount(batch.text_ids, minlength=B + 1)              # (B + 1,), the last counts the fillers
    total = hidden.new_zeros(B + 1, hidden.shape[1]).index_add(0, batch.text_ids, hidden)
    return total[:B] / lengths[:B, None]

def cls_pool(hidden, batch):
    """ (N, C) -> (B, C): the first token of each text, [CLS] """
    return hidden[batch.starts]

POOLINGS = {"mean": mean_pool, "cls": cls_pool}
SIMILARITIES = ("cosine", "dot")

def pool(hidden, batch, pooling):
    """ tap (N, C) -> (B, C) embeddings, at least float32: scores of bfloat16 vectors lose digits """
    return POOLINGS[pooling](hidden.to(torch.promote_types(hidden.dtype, torch.float32)), batch)

def shorten(embeddings, dim, similarity):
    """ (B, C) -> (B, D), the vectors of a size, whose dot products are the scores. Slice first, then normalise: an
    index of D numbers a text can normalise only those D. """
    embeddings = embeddings[:, :dim]
    return F.normalize(embeddings, dim=-1) if similarity == "cosine" else embeddings

def score(queries, passages, dim, similarity):
    """ (Q, C), (P, C) -> (Q, P). The product (Q, D) x (D, P) never builds a (Q, P, C) tensor. """
    return shorten(queries, dim, similarity) @ shorten(passages, dim, similarity).T

# ---- the encoder -----------------------------------------------------------------------------------------------------
# `dropout` and `fast_attention`, below the double line, stand for F.dropout and `attention`: faster on a CPU, equal but
# for rounding and random draws; there the rate of dropout is a multiple of 1/256. Dropout is where BERT has it: after
# the LayerNorm of the embeddings, on the attention's weights, before both sums of a block. Its rate is --dropout in
# training, by default 0; BERT's own is 0.1.
@dataclass
class BertConfig:
    """ Architecture, under the names of Hugging Face's config.json; then how the embeddings are meant to be used. """
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    sizes: tuple = ()            # ((layer, dim), ...) that the model was trained for, small to large; else ()
    size_names: tuple = ()       # their names, "" for a size without one
    pooling: str = "mean"        # a key of POOLINGS
    similarity: str = "cosine"   # one of SIMILARITIES

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "gelu_new": functools.partial(F.gelu, approximate="tanh")}

def attention(qkv, groups, H, p):
    """ softmax(q k^T / sqrt(C / H)) v within each text, H heads, dropout p: (N, 3C) -> (N, C) """
    C = qkv.shape[1] // 3
    mixed = []                                                                       # of each group: (G * T, C)
    for (G, T), rows in zip(groups, qkv.split([G * T for G, T in groups])):          # (G * T, 3C)
        q, k, v = rows.view(G, T, 3, H, C // H).permute(2, 0, 3, 1, 4)               # (G, H, T, C / H) each
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=p)                 # no mask: nothing is padded
        mixed.append(heads.transpose(1, 2).reshape(G * T, C))
    return torch.cat(mixed)

class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        assert self.heads > 0 and config.hidden_size % self.heads == 0, f"{self.heads} heads"
        self.p = config.attention_probs_dropout_prob
        # q, k and v in one matrix: the first C of the 3C outputs are q, then k, then v; in each, head after head
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, groups):
        """ (N, C) -> (N, C) """
        # fast_attention is `attention` but for rounding and the draws of dropout; it is faster in training on a CPU
        attend = fast_attention if self.training and x.device.type == "cpu" else attention
        return self.out(attend(self.qkv(x), groups, self.heads, self.p if self.training else 0.0))

class Block(nn.Module):
    """ Post-LayerNorm, as in BERT: the output of a block is normalised, so every tap can be used as it is. """
    def __init__(self, config):
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.attention = SelfAttention(config)
        self.norm1 = nn.LayerNorm(C, eps=eps)
        self.up = nn.Linear(C, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, C)
        self.norm2 = nn.LayerNorm(C, eps=eps)
        self.act = ACTIVATIONS[config.hidden_act]
        self.p = config.hidden_dropout_prob

    def forward(self, x, groups):
        """ (N, C) -> (N, C) """
        return self.after_attention(x, self.attention(x, groups))

    def after_attention(self, x, mixed):
        """ block input (N, C), output of its attention (N, C) -> (N, C) """
        x = self.norm1(x + dropout(mixed, self.p, self.training))
        return self.norm2(x + dropout(self.down(self.act(self.up(x))), self.p, self.training))

class Bert(nn.Module):
    """ BERT's embedding layer and its blocks. forward gives the taps, encode the vectors of the texts. """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False   # see maybe_checkpoint
        C = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, C)
        self.position = nn.Embedding(config.max_position_embeddings, C)
        self.token_type = nn.Embedding(config.type_vocab_size, C)
        self.norm = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.apply(self.init_weights)

    def init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, batch):
        """ Pack -> (N, C), layer 0. One text is one segment, so the segment id is 0 everywhere. """
        assert max(T for _, T in batch.groups) <= self.config.max_position_embeddings, f"{batch.groups}"
        x = self.word(batch.input_ids) + self.position(batch.position_ids) + self.token_type.weight[0]
        x = dropout(self.norm(x), self.config.hidden_dropout_prob, self.training)
        if not self.training and torch.is_autocast_enabled(x.device.type):
            # Speed: training keeps sums and LayerNorms in float32. For encoding bfloat16 is 7 % faster and as accurate.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def maybe_checkpoint(self, function, *args):
        """ function(*args); with gradient checkpointing, backward computes it again instead of storing activations """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def forward(self, batch, layers):
        """ Pack, list of layers (0 .. num_hidden_layers) -> {layer: tap (N, C)}. No block above the last runs. """
        assert all(0 <= n <= len(self.blocks) for n in layers), f"{layers}, and the model has {len(self.blocks)} blocks"
        x = self.embed(batch)
        taps = {0: x}
        for n, block in enumerate(self.blocks[:max(layers)], start=1):
            x = self.maybe_checkpoint(block, x, batch.groups)
            if n in layers:
                taps[n] = x
        return {n: taps[n] for n in layers}

    def encode(self, batch, layers):
        """ Pack, list of layers -> {layer: (B, C) embeddings}, in the order in which pack() was given the texts. A
        pooling with weights of its own, or a layer behind it, would be made in __init__ and called here;
        permute_channels, from_hf, cut and save_pretrained must know of its weights, too. """
        return {n: pool(tap, batch, self.config.pooling) for n, tap in self(batch, layers).items()}

class MLMHead(nn.Module):
    """ BERT's masked-language-model head. Its output matrix is the word embeddings, so only the bias is here. """
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.act = ACTIVATIONS[config.hidden_act]
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def transform(self, x):
        """ (..., D) -> (..., C): the dense layer uses its first D input columns, so one head serves all sizes """
        return self.norm(self.act(F.linear(x, self.dense.weight[:, :x.shape[-1]], self.dense.bias)))

# ==== Below is not the encoder, but what the scripts share; the method can be understood and changed without it =======
# speed: fast_attention, dropout | optimizer: configure_optimizer, get_lr | a trained model changed: permute_channels,
# cut, cut_vocabulary | Hugging Face folders: load_model, save_pretrained | a training run: run_script ... log, status
# OUT_DIR: check_out_dir, open_run, load_run, save_run | flags: training_flags
# ---- speed, mostly on a CPU ------------------------------------------------------------------------------------------
def fast_attention(qkv, groups, H, p):
    """ `attention` and its gradient but for rounding (float32 also under autocast) and the draws of dropout; 3 times as
    fast in training on a CPU """
    with torch.autocast("cpu", enabled=False):
        return PackedAttention.apply(qkv, groups, H, p)

class PackedAttention(torch.autograd.Function):
    """ `attention` as one node of the autograd graph, with the backward pass by hand: autograd would spend more time on
    dozens of small tensors than on the products. In float32, because bfloat16 is slower for many small products of ever
    new shapes. With A the weights after the softmax, Z the dropout mask (0 or 1 / (1 - p)), g the gradient of the
    output, and * entry by entry, A = softmax(Q K^T / sqrt(width)), out = (A * Z) V, and
        dV = (A * Z)^T g,  dA = (g V^T) * Z,  dS = A * (dA - rowsum(dA * A)) / sqrt(width),  dQ = dS K,  dK = dS^T Q """
    @staticmethod
    def forward(ctx, qkv, groups, H, p):
        N, C, width = len(qkv), qkv.shape[1] // 3, qkv.shape[1] // 3 // H
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        rows, entries = [G * T for G, T in groups], [G * H * T * T for G, T in groups]
        masks = dropout_mask(sum(entries), p, dtype).split(entries) if p else [None] * len(groups)
        mixed, saved = qkv.new_empty(N, C), []
        for (G, T), of_group, out, mask in zip(groups, qkv.split(rows), mixed.split(rows), masks):
            heads = of_group.view(G, T, 3, H, width).permute(2, 0, 3, 1, 4)         # (3, G, H, T, width)
            q, k, v = as_contiguous(heads, dtype).view(3, G * H, T, width)          # (G * H, T, width) each
            weights = torch.bmm(q, k.mT).mul_(width**-0.5).softmax(-1)              # (G * H, T, T), A
            dropped = weights * mask.view(weights.shape) if p else weights          # (G * H, T, T), A * Z
            out.view(G, T, H, width).copy_(torch.bmm(dropped, v).view(G, H, T, width).transpose(1, 2))
            saved += [q, k, v, weights, mask, dropped]                              # six tensors a group
        ctx.save_for_backward(*saved)
        ctx.groups = groups
        return mixed

    @staticmethod
    def backward(ctx, grad):
        N, C = grad.shape
        saved = ctx.saved_tensors   # read once, because under gradient checkpointing each access recomputes them
        grad_qkv, rows = grad.new_empty(N, 3 * C), [G * T for G, T in ctx.groups]
        for i, ((G, T), of_group, out) in enumerate(zip(ctx.groups, grad.split(rows), grad_qkv.split(rows))):
            q, k, v, weights, mask, dropped = saved[6 * i:6 * i + 6]
            width = q.shape[-1]
            heads = of_group.view(G, T, C // width, width).transpose(1, 2)          # (G, H, T, width)
            g = as_contiguous(heads, q.dtype).view(q.shape)                         # (G * H, T, width)
            g_weights = torch.bmm(g, v.mT)                                          # (G * H, T, T), dA once masked
            if mask is not None:
                g_weights *= mask.view(weights.shape)
            g_scores = torch._softmax_backward_data(g_weights, weights, -1, q.dtype).mul_(width**-0.5)   # dS
            dq, dk, dv = out.view(G, T, 3, C // width, width).permute(2, 0, 3, 1, 4)   # (G, H, T, width) each
            dq.copy_(torch.bmm(g_scores, k).view(dq.shape))
            dk.copy_(torch.bmm(g_scores.mT, q).view(dk.shape))
            dv.copy_(torch.bmm(dropped.mT, g).view(dv.shape))
        return grad_qkv, None, None, None

def as_contiguous(x, dtype):
    """ cast and reorder in one copy """
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()   # to() may return x itself

def dropout(x, p, training):
    """ F.dropout, with dropout_mask on a CPU """
    if p == 0 or not training or x.device.type != "cpu":
        return F.dropout(x, p, training)
    return x * dropout_mask(x.numel(), p, x.dtype).view(x.shape)

def dropout_mask(size, p, dtype):
    """ (size,): 0 with probability p, else 1 / (1 - p). On a CPU F.dropout draws one random number for each entry. Here
    one 64-bit number serves 8 entries, 13 times as fast, so p is a multiple of 1/256: 0.1 becomes 26/256. """
    threshold = min(255, round(256 * p))
    bits = torch.randint(-2**63, 2**63 - 1, (size // 8 + 1,)).view(torch.uint8)[:size]   # one number to spare
    return (bits >= threshold).to(dtype).mul_(256 / (256 - threshold))

def autocast(device, dtype, **flags):
    """ with autocast(...): matrix products in dtype, "float32" or "bfloat16" """
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32", **flags)

def fast_dtype():
    """ "bfloat16" where the machine multiplies it faster than float32, else "float32" """
    cpu = torch.cpu.get_capabilities()
    cpu_is_fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    is_fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_is_fast
    return "bfloat16" if is_fast else "float32"

def keep_freed_memory(keep=True):
    """ keep=True: freed memory stays in the process. By default glibc returns large blocks, and the system clears their
    pages before the next step can use them: 3 to 10 % of a step. keep=False returns every block of 1 MB or more. """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4   # glibc's numbers of its settings
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if keep:
            libc.mallopt(mmap_max, 0)                   # map no block alone
            libc.mallopt(trim_threshold, 2**31 - 1)     # keep the free end of the heap
        else:
            libc.mallopt(mmap_threshold, 2**20)         # glibc would raise it to 32 MB step by step

# ---- optimizer and learning rate -------------------------------------------------------------------------------------
def configure_optimizer(parameters, learning_rate, weight_decay, faster, scale):
    """ {name: parameter} -> AdamW. Matrices decay, also the embeddings; biases and LayerNorms do not. The training loop
    multiplies the learning rate by the "scale" of each group: `scale` for the names in `faster`, else 1. """
    rest = [parameter for name, parameter in parameters.items() if name not in faster]
    groups = [{"params": [parameters[name] for name in faster], "weight_decay": weight_decay, "scale": scale},
              {"params": [matrix for matrix in rest if matrix.dim() >= 2], "weight_decay": weight_decay, "scale": 1.0},
              {"params": [vector for vector in rest if vector.dim() < 2], "weight_decay": 0.0, "scale": 1.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)   # fused: all tensors in one kernel

def get_lr(step, max_steps, args, shape):
    """ the learning rate of a step: linear warm-up, then a "linear" or "cosine" decay to 0 """
    warmup_steps = max(1, round(args.warmup * max_steps))
    if step < warmup_steps:
        return args.learning_rate * (step + 1) / warmup_steps
    rest = max_steps - warmup_steps   # not 0, because step is one of these
    if shape == "linear":
        return args.learning_rate * (max_steps - step) / rest
    return args.learning_rate * (1 + math.cos(math.pi * (step - warmup_steps) / rest)) / 2

# ---- a trained model changed: the order of its channels, one size alone, fewer words ---------------------------------
def permute_channels(model, order):
    """ Put the hidden channels in another order, in place. order: list of C channels. LayerNorm, the sums and all
    linear layers treat the channels alike, so the outputs are the same numbers in the new order. """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("word.weight", "position.weight", "token_type.weight", "qkv.weight", "up.weight")):
                parameter.copy_(parameter[:, order])             # embeddings, and matrices that read channels: columns
            elif not name.endswith(("qkv.bias", "up.bias")):     # these two lie inside a block
                parameter.copy_(parameter[order])                # matrices that write channels, and vectors: rows

def cut(model, size):
    """ -> the model of one size alone: its layers, and a last LayerNorm that gives 0 beyond its dims. Zeros change no
    cosine and no dot product, so programs that normalise before they slice, or never slice, are right as well. """
    layer, dim = size
    small = copy.deepcopy(model)
    set_sizes(small.config, [size])   # first: the names of default sizes depend on the number of layers
    small.config.num_hidden_layers = layer
    del small.blocks[layer:]
    small.blocks[-1].norm2.weight.data[dim:] = 0
    small.blocks[-1].norm2.bias.data[dim:] = 0
    return small.eval()

def cut_vocabulary(model, tokenizer, counts, vocab_size):
    """ Keep vocab_size pieces of WordPiece: the special tokens, the single characters, which can spell any word, and
    those with the highest counts (V,) -> model, tokenizer, whose ids keep their order. Raises ValueError if vocab_size
    is too small or too large for that. """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    must = np.array([piece in tokenizer.all_special_tokens or len(piece.removeprefix("##")) == 1 for piece in pieces])
    if not must.sum() <= vocab_size <= len(pieces):
        raise ValueError(f"--vocab_size {vocab_size}: {must.sum()} special tokens and single characters must stay, and "
                         f"there are {len(pieces)} entries; give a number between")
    kept = np.sort(np.lexsort((-counts, ~must))[:vocab_size]).tolist()   # equal counts: the lower id stays
    model = copy.deepcopy(model)
    model.word = nn.Embedding.from_pretrained(model.word.weight[kept], freeze=False)
    model.config.vocab_size = vocab_size
    vocab = {"vocab": {pieces[old]: new for new, old in enumerate(kept)}, "added_tokens_decoder": {}}
    smaller = type(tokenizer)(**tokenizer.init_kwargs | vocab)
    smaller.backend_tokenizer.normalizer = tokenizer.backend_tokenizer.normalizer
    smaller.model_max_length, model.config.pad_token_id = tokenizer.model_max_length, smaller.pad_token_id
    return model, smaller

# ---- files that may be broken ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def readable(start, remedy):
    """ with readable(...): whatever goes wrong inside raises ValueError("START (REASON); REMEDY") """
    try:
        yield
    except Exception as error:   # the hub, zip, pickle, torch and the tokenizers have a dozen errors each
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{start} ({reason:.300}); {remedy}") from None

def read_json(path, kind=dict):
    """ a JSON file -> dict or list, empty if there is no such file; raises ValueError if it holds something else """
    if not path.exists():
        return kind()
    with readable(f"{path}: not a JSON {kind.__name__}", "copy or download the file again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, kind), f"a {type(content).__name__}"
        return content

# ---- Hugging Face folders --------------------------------------------------------------------------------------------
def load_model(name, device="cpu", max_length=None, **overrides):
    """ A folder or hub name of any BERT -> model, tokenizer, with its own pooling, similarity and length. overrides:
    fields of BertConfig. Raises ValueError for files that are broken, missing, of another model or not supported. """
    folder, defaults = read_modules(find_folder(name))
    model = from_pretrained(folder, defaults, **overrides).to(device)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_json(folder / file)   # raises for a broken one, with its name
    tokenizer = load_tokenizer(folder)
    # without one of these files transformers returns a tokenizer of five words, and every text becomes [UNK]
    has_words = (folder / "tokenizer.json").exists() or (folder / "vocab.txt").exists()
    words = 1 + max(tokenizer.get_vocab().values(), default=-1) if has_words else 0
    message = f"{name}: {words} words in the tokenizer, {model.config.vocab_size} in the model; copy its files there"
    if not 0 < words <= model.config.vocab_size:
        raise ValueError(message)
    if words <= model.config.vocab_size - 128:   # more than are needed to pad to a round number
        print("warning:", message, file=sys.stderr)
    st_config = read_json(folder / "sentence_bert_config.json")
    if st_config.get("do_lower_case"):   # before the tokenizer proper, as sentence-transformers does
        from tokenizers.normalizers import Lowercase, Sequence
        backend = tokenizer.backend_tokenizer
        backend.normalizer = Sequence([Lowercase(), backend.normalizer])
    length = max_length or st_config.get("max_seq_length") or tokenizer.model_max_length
    with readable(f"{name}: its max_seq_length is {length!r}", "write 3 or more tokens there, or give --max_length"):
        tokenizer.model_max_length = min(int(length), model.config.max_position_embeddings)
        assert tokenizer.model_max_length >= 3, "[CLS], a token and [SEP]"
    return model, tokenizer

def find_folder(name):
    """ a local folder, or a name on the Hugging Face hub (downloaded once, then found offline too) -> Path """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.txt", "model.safetensors", "pytorch_model.bin"]
    with readable(f"{name}: neither a folder nor a model of the hub that could be had", "check name and network"):
        return Path(snapshot_download(name, allow_patterns=wanted))

def read_modules(folder):
    """ A folder -> the folder of its BERT, {"pooling", "similarity"}: what the files of sentence-transformers say of
    them, if there are such files. Raises ValueError for modules such as Dense. """
    content = read_json(folder / "modules.json", list)
    with readable(f"{folder / 'modules.json'}: a module without type or path", "copy or download the file again"):
        modules = {module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in content}
    unknown = set(modules) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ValueError(f"{folder}: modules.json asks for {', '.join(unknown)}, which is not supported")
    similarity = read_json(folder / "config_sentence_transformers.json").get("similarity_fn_name")
    # after Normalize the dot product is the cosine
    settings = {"similarity": "cosine" if "Normalize" in modules or not similarity else similarity}
    if "Pooling" in modules:
        pooling = read_json(modules["Pooling"] / "config.json")
        # newer files name the mode, older ones have a switch for each: pooling_mode_mean_tokens
        modes = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if "pooling_mode_" in key and on]
        settings["pooling"] = str(pooling.get("pooling_mode") or re.sub(r"_tokens?\b", "", " and ".join(modes)))
    return modules.get("Transformer", folder), settings

def from_pretrained(name, defaults=(), **overrides):
    """ A folder or hub name of any BERT -> Bert in eval mode, float32. defaults, overrides: fields of BertConfig that
    count less and more than config.json. Raises ValueError if it is no BERT. """
    folder = find_folder(name)
    if not (folder / "config.json").exists():
        raise ValueError(f"{name}: no config.json in this folder; give one that save_pretrained wrote")
    read = dict(defaults) | read_json(folder / "config.json")
    positions = read.get("position_embedding_type", "absolute")
    if read.get("model_type") != "bert" or positions != "absolute":
        raise ValueError(f"{name}: model_type {read.get('model_type')!r} with {positions} positions is not supported; "
                         "this code is BERT with absolute positions")
    known = {field.name for field in fields(BertConfig)}
    config = BertConfig(**{key: value for key, value in (read | overrides).items() if key in known})
    for key, choices in (("hidden_act", ACTIVATIONS), ("pooling", POOLINGS), ("similarity", SIMILARITIES)):
        if str(getattr(config, key)) not in choices:   # a list cannot be looked up
            raise ValueError(f"{name}: {key} {getattr(config, key)!r} is not supported; known are {', '.join(choices)}")
    state = load_state(folder)
    with readable(f"{name}: config.json and the tensors of the checkpoint are not of one BERT", "copy both again"):
        config.sizes = tuple((int(layer), int(dim)) for layer, dim in config.sizes or ())
        config.size_names = tuple(config.size_names or ())
        model = Bert(config)
        model.load_state_dict(from_hf(state, model.state_dict()))
    return model.eval()

def load_state(folder):
    """ the weights in a Hugging Face folder, under the names of BertModel; raises ValueError if none can be read """
    from safetensors.torch import load_file
    found = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()]
    if not found:
        raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin in this folder; copy one there")
    path = found[0]
    with readable(f"{path}: cannot be read", "copy or download it again, unquantised"):
        state = (load_file(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True))
        for name, tensor in state.items():   # old checkpoints list their position_ids, too
            assert tensor.is_floating_point() or name.endswith("_ids"), f"{name} is {tensor.dtype}, no float"
        # The oldest checkpoints say gamma and beta; checkpoints with a head say bert.encoder...
        return {name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias"): tensor
                for name, tensor in state.items()}

# our name -> their name; a name without a leading dot matches only at the start
WEIGHT_NAMES = [("blocks.", "encoder.layer."), (".attention.out.", ".attention.output.dense."),
                (".norm1.", ".attention.output.LayerNorm."), (".up.", ".intermediate.dense."),
                (".down.", ".output.dense."), (".norm2.", ".output.LayerNorm."),
                ("word.", "embeddings.word_embeddings."), ("position.", "embeddings.position_embeddings."),
                ("token_type.", "embeddings.token_type_embeddings."), ("norm.", "embeddings.LayerNorm.")]
HEAD = {"dense.weight": "transform.dense.weight", "dense.bias": "transform.dense.bias",
        "norm.weight": "transform.LayerNorm.weight", "norm.bias": "transform.LayerNorm.bias", "bias": "bias"}

def hf_names(name):
    """ our name of a weight -> its names in BertModel: three for q, k and v, which are one matrix here, else one:
    norm.bias -> embeddings.LayerNorm.bias, blocks.3.attention.qkv.bias -> encoder.layer.3.attention.self.query.bias and
    the same with key and value """
    for ours, theirs in WEIGHT_NAMES:
        if name.startswith(ours) or (ours[0] == "." and ours in name):
            name = name.replace(ours, theirs, 1)
    if ".attention.qkv." not in name:
        return [name]
    return [name.replace("attention.qkv", f"attention.self.{part}") for part in ("query", "key", "value")]

def from_hf(state, ours):
    """ Hugging Face's state_dict, which may hold heads and a pooler too, and our names -> our state_dict """
    return {name: torch.cat([state[theirs] for theirs in hf_names(name)]) for name in ours}

def to_hf(state):
    """ our state_dict -> Hugging Face's BertModel state_dict """
    return {theirs: piece.contiguous() for name, tensor in state.items()
            for theirs, piece in zip(hf_names(name), tensor.chunk(len(hf_names(name))))}

def load_tokenizer(folder):
    """ the tokenizer of a Hugging Face folder -> transformers tokenizer """
    from transformers import AutoTokenizer   # imported where it is used, because that takes a second or two
    with readable(f"{folder}: its tokenizer cannot be loaded", "copy or download its files again"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("\N{SNOWMAN}")   # fails without [UNK], now rather than at the first rare word
        return tokenizer

def load_head(name, config):
    """ the MLMHead of a folder or hub name; a new one if the checkpoint has none """
    state, head = load_state(find_folder(name)), MLMHead(config)
    theirs = {ours: state.get(f"cls.predictions.{hf}") for ours, hf in HEAD.items()}
    if all(tensor is not None for tensor in theirs.values()):
        with readable(f"{name}: its MLM head does not fit its BERT", "copy or download the weights again"):
            head.load_state_dict(theirs)
    return head

def save_pretrained(model, tokenizer, folder, head=None):
    """ Write an ordinary Hugging Face folder, for AutoModel or, with an MLMHead, for BertForMaskedLM; and what
    sentence-transformers, old or new, needs to give the embeddings of the largest size. """
    from safetensors.torch import save_file
    config, folder, C = model.config, Path(folder), model.config.hidden_size
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    state, architecture = to_hf(model.state_dict()), "BertModel"
    if head is None:   # nothing here uses the pooler, but AutoModel warns of random weights where there is none
        state |= {"pooler.dense.weight": torch.zeros(C, C), "pooler.dense.bias": torch.zeros(C)}
    else:
        state, architecture = {f"bert.{name}": tensor for name, tensor in state.items()}, "BertForMaskedLM"
        state |= {f"cls.predictions.{HEAD[name]}": tensor for name, tensor in head.state_dict().items()}
    _, dim = full_size(config)
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    last, modules = model.blocks[-1].norm2, {"Transformer": "", "Pooling": "1_Pooling"}
    # sentence-transformers normalises first and slices last, which is right only if all beyond the dims is 0
    if config.similarity == "cosine" and not last.weight[dim:].any() and not last.bias[dim:].any():
        modules["Normalize"] = "2_Normalize"
    files = {
        "config.json": {"architectures": [architecture], "model_type": "bert", **asdict(config)},
        "modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
                         for i, (module, path) in enumerate(modules.items())],
        "1_Pooling/config.json": {"word_embedding_dimension": C, "pooling_mode": config.pooling},
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": config.similarity,
                                              "truncate_dim": dim if dim < C else None},
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", (folder / "config.json").stat().st_mode)   # safetensors lets no others read

# ---- a training run, for both scripts: start, ranks, signals, log ----------------------------------------------------
def run_script(main, parse_args):
    """ main(parse_args()); one line and exit status 2 for a mistake of the user's, 1 for what went wrong in the run """
    try:
        main(parse_args())
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped")
        sys.exit(130)                                            # not 0, so that a script stops, too
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        if type(error) is RuntimeError and not dist.is_initialized() and "allocate memory" not in str(error):
            raise                                                # a mistake of the program's: show where
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, OSError)) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def start_ranks(args):
    """ Join the processes that torchrun started -> rank, number of ranks; (0, 1) without it. Only rank 0 prints. """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
    return rank, world_size

def sum_over_ranks(parameters, world_size):
    """ every gradient becomes the sum of the ranks' gradients """
    for parameter in parameters:
        if world_size > 1 and parameter.grad is not None:   # blocks above the largest size have none
            dist.all_reduce(parameter.grad)

def catch_signals():
    """ -> a list, empty until Ctrl-C or SIGTERM arrives: the loop then saves and ends. A second signal kills. """
    caught = []
    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught

def interrupted(caught, args, world_size):
    """ Did a signal reach any rank? All ranks must leave the loop after the same step. """
    found = torch.tensor(len(caught), device=args.device)
    if world_size > 1:
        dist.all_reduce(found)
    return found.item() > 0

def default_signals():
    """ after the loop a signal ends the program at once again """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def check_finite(step, loss, norm, terms, args):
    """ terms {name: scalar}: what the loss consists of. Raises FloatingPointError if loss or norm is not finite. """
    loss, norm = loss.item(), norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = [name for name, value in terms.items() if not value.isfinite()]
        raise FloatingPointError(f"step {step + 1}: the loss is {loss:.4g}, the norm of the gradient {norm:.4g}; not "
                                 f"finite: {', '.join(bad) or 'the gradient'}. Lower --learning_rate, or use --dtype "
                                 f"float32. {last_checkpoint(args)}")

def average(records, world_size=1):
    """ list of {name: scalar tensor} -> {name: float}, the mean over the records that have the name, and over ranks """
    names = dict.fromkeys(name for record in records for name in record)
    means = torch.stack([torch.stack([record[name].detach() for record in records if name in record]).mean()
                         for name in names])
    if world_size > 1:
        dist.all_reduce(means)
    return dict(zip(names, (means / world_size).tolist()))   # a single read, because each would wait for a GPU

def log(log_file, record, line):
    """ a record to log.jsonl, a line to the screen; log_file is None on all ranks but the first """
    if log_file:
        print(json.dumps(record), file=log_file, flush=True)
        print(line, flush=True)

def status(step, max_steps, parts, lr, norm, seconds, tokens):
    """ a line of the log; seconds and tokens of one step """
    rate, left = tokens / seconds / 1000, (max_steps - step) * seconds / 60
    return " | ".join([f"step {step}/{max_steps}", *parts, f"lr {lr:.1e}", f"norm {norm:.2f}",
                       f"{1000 * seconds:.0f} ms", f"{rate:.1f}k tok/s", f"eta {left:.1f}m"])

# ---- OUT_DIR ---------------------------------------------------------------------------------------------------------
# What the folder of a run holds while it trains, and what becomes of it:
#   a new run      refuses a folder that holds a model (check_out_dir)
#   --overwrite    moves the earlier run to OUT_DIR/replaced; the new run's first checkpoint deletes it (save_run)
#   --resume       goes on from STATE; log.jsonl keeps its lines up to that step (open_run)
#   the end        the model, args.json and log.jsonl stay; a test set adds eval.json and the model card README.md,
#                  which --overwrite leaves alone; finetune_srl.py deletes STATE, because its run is finished
STATE = "training_state.pt"   # for --resume; the other files are for those who use the model
MODEL_FILES = (STATE, "model.safetensors", "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
               "sentence_bert_config.json", "eval.json")
RUN_FILES = (*MODEL_FILES, "args.json", "log.jsonl")   # the last two alone: nothing was saved yet

def check_out_dir(parser, args):
    """ parser.error where --out_dir, --resume and --overwrite do not fit what is there """
    out_dir = Path(args.out_dir)
    if not args.out_dir or out_dir.exists() and not out_dir.is_dir():
        parser.error(f"--out_dir {args.out_dir!r} is no folder; name one, it is made when missing")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it; give one of the two")
    if args.resume and not (out_dir / STATE).exists():
        parser.error(f"--resume: there is no {out_dir / STATE}: the run is finished, or was stopped before its first "
                     "checkpoint; leave --resume out to begin a run")
    found = [name for name in (*MODEL_FILES, "pytorch_model.bin") if (out_dir / name).exists()]
    if found and not args.resume and not args.overwrite:
        parser.error(f"--out_dir {args.out_dir} holds a run; choose another folder, or add --overwrite"
                     + (" or --resume" if STATE in found else ""))

def open_run(args, first_step=0):
    """ Write args.json -> log.jsonl, open and locked. A resumed run keeps its lines up to first_step. Raises ValueError
    if another run is writing there. """
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    log_file = open_locked(out_dir / "log.jsonl")
    for leftover in out_dir.glob("save.*.part"):          # of a killed run
        shutil.rmtree(leftover)
    if args.resume:
        shutil.rmtree(out_dir / "replaced", ignore_errors=True)   # this run has a checkpoint
    if args.overwrite:
        move_aside(out_dir)
        log_file = open_locked(out_dir / "log.jsonl")
    log_file.seek(0)
    with readable(f"{out_dir / 'log.jsonl'}: is no log of a run", "move it away, or choose another --out_dir"):
        kept = [line for line in log_file if line.endswith("\n") and json.loads(line)["step"] <= first_step]
    log_file.truncate(len("".join(kept).encode()))
    # from_hub: for the model card, see write_card in evaluate.py. A resumed run keeps it: files may be gone by then.
    inputs = [args.init_from, *getattr(args, "train_pairs", [])]
    from_hub = [name for name in inputs if name not in ("scratch", "docs")
                and not Path(name).exists() and not Path(name.split(":")[0]).exists()]
    begun = read_json(out_dir / "args.json") if args.resume else {"from_hub": from_hub}
    about = begun | vars(args) | {"commit": git_commit(), "torch": torch.__version__}
    (out_dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    return log_file

def move_aside(out_dir):
    """ The run in OUT_DIR goes to OUT_DIR/replaced. If a run is there already, the one in OUT_DIR was to replace it and
    has saved nothing: delete that. """
    replaced = out_dir / "replaced"
    waiting = (replaced / "log.jsonl").exists()
    (replaced / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        if waiting:
            (out_dir / name).unlink(missing_ok=True)
        elif (out_dir / name).exists():
            os.replace(out_dir / name, replaced / name)

def open_locked(path):
    """ -> the file, open to read and append, which no other process can lock. Raises ValueError if one has. """
    file = open(path, "a+")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out_dir {path.parent}: another run is writing there; choose another folder") from None
    except (ImportError, OSError):   # Windows and some network drives cannot: two runs into one folder go unnoticed
        pass
    return file

def git_commit():
    """ short hash of the code's commit, with + if files have changed since; "" outside a repository or without git """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:   # no git on this machine
        return ""

def load_run(args):
    """ training_state.pt of the run in --out_dir. Raises ValueError when a flag that decides the result differs. """
    path = Path(args.out_dir, STATE)
    with readable(f"--resume: {path} cannot be read", "begin the run again with --overwrite"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, *_ = (state[name] for name in ("args", "about", "step", "model", "optimizer"))   # none may be missing
    free = {"out_dir", "overwrite", "resume", "log_interval", "save_interval", "eval_interval", "device", "compile"}
    if (saved.keys() ^ vars(args).keys()) - free:   # flags that only one of the two knows
        raise ValueError(f"--resume: {path} is of another script, or of another version of this one")
    for name, value in vars(args).items():
        if name not in free and saved[name] != value:
            raise ValueError(f"--resume: --{name} is {value}, and the run in {args.out_dir} had {saved[name]}; give "
                             "the flags it was begun with")
    return state

def check_about(args, state, about):
    """ about {name: value}. Raises ValueError when data or ranks are not those of the run to resume. """
    for name, value in about.items():
        if state["about"].get(name) != value:
            raise ValueError(f"--resume: {name} differ from those of the run in {args.out_dir} "
                             f"({value} for {state['about'].get(name)}); resume with the same, or begin another run")

def save_run(args, step, bert, tokenizer, parts, about, last_step, head=None):
    """ the model, then STATE for --resume; every file is whole at any moment. parts {"model": ..., "optimizer": ...};
    about: see check_about. Raises FloatingPointError for what is not finite, OSError if the last step is lost. """
    from safetensors import SafetensorError
    broken = [name for name, tensor in parts["model"].state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise FloatingPointError(f"step {step}: not saved, because {broken[0]} is not finite; lower --learning_rate. "
                                 f"{last_checkpoint(args)}")
    out_dir = Path(args.out_dir)
    try:
        with tempfile.TemporaryDirectory(prefix="save.", suffix=".part", dir=out_dir) as fresh:
            save_pretrained(bert, tokenizer, fresh, head)
            state = {name: trained.state_dict() for name, trained in parts.items()}
            torch.save(state | {"step": step, "args": vars(args), "about": about}, Path(fresh, STATE))
            (out_dir / "1_Pooling").mkdir(exist_ok=True)
            files = [file for file in Path(fresh).rglob("*") if file.is_file()]
            # STATE last: a kill in between leaves an older STATE, and --resume takes all weights from it
            for file in sorted(files, key=lambda file: file.name == STATE):
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
                os.replace(file, out_dir / file.relative_to(fresh))
            if (out_dir / "replaced").exists():   # the run that --overwrite replaced: is deleted with `fresh`
                os.replace(out_dir / "replaced", Path(fresh, "replaced"))
    except (OSError, RuntimeError, SafetensorError) as error:   # torch and safetensors wrap a full disk in their own
        lost = f"step {step}: nothing could be saved in {out_dir} ({error})"
        if last_step:
            raise OSError(f"{lost}; make room, then go on with --resume. {last_checkpoint(args)}") from error
        print(f"{lost}; the training goes on", file=sys.stderr)
    if last_step:
        records = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
        losses = [record["loss"] for record in records if "loss" in record]
        if losses[-1] > losses[0]:
            print(f"warning: the loss began at {losses[0]:.3f} and is {losses[-1]:.3f} now; try a lower "
                  "--learning_rate", file=sys.stderr)

def last_checkpoint(args):
    """ the end of a message: what a run that fails leaves behind """
    return f"The last checkpoint: {args.out_dir if Path(args.out_dir, STATE).exists() else 'there is none'}"

# ---- flags of both training scripts ----------------------------------------------------------------------------------
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """ keep the docstring's line breaks and print every default, but not "(default: None)" """
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

def number(kind, rule, holds):
    """ an argparse type: an int or float for which holds(value). argparse names the flag. """
    def parse(text):
        value = kind(text)
        if not (holds(value) and value < 2**63):   # nan compares false
            raise argparse.ArgumentTypeError(f"{text}: must be {'below 2**63' if holds(value) else rule}")
        return value
    parse.__name__ = kind.__name__   # for argparse's "invalid int value"
    return parse

positive_int, positive_float = (number(kind, "above 0", lambda value: value > 0) for kind in (int, float))
nonneg_int, nonneg_float = (number(kind, "0 or more", lambda value: value >= 0) for kind in (int, float))
fraction = number(float, "0 or more and below 1", lambda value: 0 <= value < 1)
text_length = number(int, "3 or more: [CLS], a token and [SEP]", lambda value: value >= 3)

def parse_sizes(text):
    """ "2:32,12:768" -> ((2, 32), (12, 768)); an argparse type, so it raises ArgumentTypeError """
    try:
        return tuple((int(layer), int(dim)) for layer, dim in (size.split(":") for size in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER:DIM,LAYER:DIM,... such as 2:32,4:64") from None

def check_sizes(sizes, config, name="the model", flag="--sizes"):
    """ -> tuple of sizes from small to large. Raises ValueError if the model lacks one of the layers or channels. """
    layers, dims = config.num_hidden_layers, config.hidden_size
    for layer, dim in sizes:
        if not 1 <= layer <= layers:
            raise ValueError(f"{flag} asks for layer {layer} but {name} has {layers} layers; "
                             f"use a layer between 1 and {layers}")
        if not 1 <= dim <= dims:
            raise ValueError(f"{flag} asks for {dim} dims but {name} has {dims}; use 1 to {dims}")
    return tuple(sorted(set(sizes)))

def device_arg(text):
    """ an argparse type: a device that torch can use """
    try:
        torch.zeros(1, device=text).item()   # item() fails on "meta", which has no memory
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from None
    return text

def new_bert(args, tokenizer, max_length, **settings):
    """ random weights, in the shape that the flags ask for """
    return Bert(BertConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64, intermediate_size=4 * args.hidden_size,
        max_position_embeddings=max_length, hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout, **settings))

def training_flags(parser):
    """ add the flags that both training scripts have; each script sets its own defaults """
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("columns of the data").add_argument
    add("--columns", nargs="+", default=[], metavar="KIND=COLUMN",
        help="what yours are called, as query=question positive=answer, or sentence1=a sentence2=b score=label, or "
             "text=body; the others have the names in COLUMNS of data.py")
    add = parser.add_argument_group("model").add_argument
    add("--init_from", default="scratch", help="scratch, a folder, or a BERT of the hub")
    add("--sizes", type=parse_sizes,
        help="LAYER:DIM,... trained together; by default the loaded model's own, else the paper's six in proportion")
    add("--dropout", type=fraction, default=0.0, help="in the hidden layers and the attention; BERT's own is 0.1")
    add = parser.add_argument_group("model from scratch; a loaded one brings its own").add_argument
    add("--num_layers", type=positive_int, default=6, help="blocks")
    add("--hidden_size", type=number(int, "a multiple of 64, the width of an attention head",
                                     lambda value: value > 0 and value % 64 == 0), default=192, help="channels")
    add("--vocab_size", type=number(int, "100, to spell English, to 1,000,000", lambda value: 100 <= value <= 10**6),
        default=8192, help="WordPiece vocabulary, trained on the text")
    add = parser.add_argument_group("optimisation").add_argument
    add("--learning_rate", type=positive_float, help="peak, of AdamW")
    add("--warmup", type=fraction, help="share of the steps in which the rate rises; then it falls to 0")
    add("--weight_decay", type=nonneg_float, help="of the matrices; biases and LayerNorms have none")
    add("--grad_clip", type=nonneg_float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    add("--epochs", type=positive_float, help="passes over the data")
    add("--max_steps", type=nonneg_int, default=0, help="steps in place of --epochs; 0 goes by --epochs")
    add("--seed", type=nonneg_int, default=1, help="of weights, order, windows, masks and dropout")
    add = parser.add_argument_group("system").add_argument
    add("--out_dir", help="where the model and the log go")
    add("--overwrite", action=flag, default=False,
        help="replace the run in --out_dir; it stays in OUT_DIR/replaced until the new run has a checkpoint")
    add("--resume", action=flag, default=False, help="go on with the stopped run in --out_dir, exactly")
    add("--save_interval", type=nonneg_int, default=200, help="steps between two checkpoints; 0 saves at the end only")
    add("--log_interval", type=positive_int, default=10, help="steps between two lines of the log")
    add("--device", type=device_arg, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1, mps")
    add("--dtype", choices=["float32", "bfloat16"], default=fast_dtype(),
        help="of the matrix products; the weights stay float32. By default bfloat16 if this machine is fast at it")
    add("--compile", action=flag, default=torch.cuda.is_available(), help="torch.compile the blocks but for attention")
