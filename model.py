"""
BERT with layer taps: the hidden states of any of its layers, and nothing runs above the deepest one asked for.

There is no padding in here. A batch of texts is a `Pack`: all their tokens in one row, sorted so that texts of the same
length lie side by side. What treats tokens one by one (linear layers, LayerNorm, GELU: nearly all the arithmetic) runs
on that row; attention views each run of B texts of T tokens as (B, T, C). No masks, no wasted products.

References: BERT (arXiv 1810.04805); Starbucks (arXiv 2410.13230), where a size is a pair (layer, dim): run the first
`layer` blocks, pool, keep the first `dim` coordinates. Layers count from 1; layer 0 is the output of the embeddings.

Shapes: B texts, T tokens of a text, N tokens of a pack, C channels (768), H heads, D channels of a head, V vocabulary
"""
import argparse
import ctypes
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# sizes: (layer, dim) pairs

# of the layers, of the width: Demi, Short, Tall, Grande, Venti, Trenta
SHARES = [(1/6, 1/24), (1/3, 1/12), (1/2, 1/6), (2/3, 1/3), (5/6, 2/3), (1, 1)]


def paper_sizes(config):
    """ the paper's six, as shares of this model: 2:32 ... 12:768 of BERT-base, 1:8 ... 6:192 of 6 layers x 192 """
    L, C = config.num_hidden_layers, config.hidden_size
    return tuple(sorted({(max(1, round(L * layers)), max(1, round(C * dims))) for layers, dims in SHARES}))


def parse_sizes(text):
    """ "2:32,12:768" -> ((2, 32), (12, 768)); an argparse type, so it raises ArgumentTypeError """
    try:
        return tuple((int(layer), int(dim)) for layer, dim in (size.split(":") for size in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER:DIM,LAYER:DIM,... such as 2:32,4:64") from None


def check_sizes(sizes, config, name="the model"):
    """ -> sorted sizes, the full one last. Raises ValueError when the model has not so many layers or channels. """
    for layer, dim in sizes:
        if not 1 <= layer <= config.num_hidden_layers:
            raise ValueError(f"--sizes asks for layer {layer} but {name} has {config.num_hidden_layers} layers; "
                             f"use a layer between 1 and {config.num_hidden_layers}")
        if not 1 <= dim <= config.hidden_size:
            raise ValueError(f"--sizes asks for {dim} dims but {name} has {config.hidden_size}; "
                             f"use 1 to {config.hidden_size}")
    return tuple(sorted(set(sizes)))


def size_name(size):
    return f"{size[0]}:{size[1]}"

# ----------------------------------------------------------------------------------------------------------------------
# the batch


class Pack(NamedTuple):
    """ B texts, N tokens, no padding but for a few fillers at the end when asked for. """
    input_ids: torch.Tensor      # (N,) texts in order of length
    position_ids: torch.Tensor   # (N,) 0 .. T-1 in every text
    text_ids: torch.Tensor       # (N,) which of the B texts (in the caller's order) the token belongs to; B of fillers
    starts: torch.Tensor         # (B,) where each text (in the caller's order) begins: its [CLS]
    groups: list                 # [(B, T), ...] runs of texts of equal length; the products B * T add up to N


def pack(texts, device="cpu", multiple=1):
    """
    list of B (T,) integer arrays of token ids -> Pack. Raises ValueError on a text without tokens.
    multiple: fill N up to a multiple of it with texts of one token, the id 0, that belong to nobody. On CPU oneDNN
    builds a kernel for every N it has not met, 12 % of a step; with 128 it meets a dozen, for 2 % more tokens. An N
    below 8 x multiple is left alone: a lone query would pay for 128 tokens.
    """
    lengths = np.array([len(text) for text in texts])
    if lengths.min() == 0:
        raise ValueError("a text without a single token; a tokenizer adds at least [CLS] and [SEP]")
    order = np.argsort(lengths, kind="stable")
    ends = lengths[order].cumsum()
    starts = np.empty_like(lengths)
    starts[order] = ends - lengths[order]
    text_ids = np.repeat(order, lengths[order])
    groups = [(int(B), int(T)) for T, B in zip(*np.unique(lengths, return_counts=True))]
    fill = int(-ends[-1] % multiple) if ends[-1] >= 8 * multiple else 0
    if fill:
        groups.append((fill, 1))
    def to(array, filler=None):
        array = array if filler is None else np.concatenate([array, np.full(fill, filler)])
        return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
    return Pack(to(np.concatenate([texts[i] for i in order]), 0), to(np.arange(ends[-1]) - starts[text_ids], 0),
                to(text_ids, len(texts)), to(starts), groups)


def pool(hidden, batch, pooling):
    """ (N, C) tap of a pack -> (B, C), in the caller's order of texts: the mean over a text's tokens, or its first """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))   # sums and scores of bfloat16 lose digits
    if pooling == "cls":
        return hidden[batch.starts]
    B = len(batch.starts)
    lengths = torch.bincount(batch.text_ids, minlength=B + 1)              # (B + 1,), the last of the fillers
    total = hidden.new_zeros(B + 1, hidden.shape[1]).index_add(0, batch.text_ids, hidden)
    return total[:B] / lengths[:B, None]                                   # (B, C)

# ----------------------------------------------------------------------------------------------------------------------
# the encoder


@dataclass
class BertConfig:
    """ Architecture, under the names of Hugging Face's config.json, and how the model wants to be used. """
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
    sizes: tuple = ()            # ((layer, dim), ...) from small to large; () in a model that is not ours
    pooling: str = "mean"        # or "cls"
    similarity: str = "cosine"   # or "dot"


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


def dropout_mask(size, p, dtype):
    """
    (size,) zeros with probability p, else 1 / (1 - p). On CPU one 64-bit random number decides for 8 entries: F.dropout
    draws one for each, serially, which takes 13 times as long. p is rounded to a multiple of 1/256 (0.1 -> 26/256).
    """
    cut = round(256 * p)
    bits = torch.randint(-2**63, 2**63 - 1, (size // 8 + 1,)).view(torch.uint8)[:size]
    return (bits >= cut).to(dtype).mul_(256 / (256 - cut))


def dropout(x, p):
    """ F.dropout, but see dropout_mask on CPU """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    return x * dropout_mask(x.numel(), p, x.dtype).view(x.shape)


def fast_dtype():
    """ "bfloat16" where it is multiplied faster than float32 (GPUs, CPUs with AVX512-BF16 or AMX), else "float32" """
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bfloat16" if fast else "float32"


def keep_freed_memory(keep=True):
    """
    The scripts call this first. glibc gives large blocks back to the system as soon as they are free, and the system
    clears them anew, hundreds of megabytes in every step: 3 to 10 % of it. keep=False is the opposite, the least
    memory: every block from 1 MB on has a mapping of its own, so that no holes are left between blocks. Nothing happens
    with another C library.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if keep:
            libc.mallopt(-4, 0)           # M_MMAP_MAX: no block has a mapping of its own
            libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD: what is free at the end of the heap stays
        else:
            libc.mallopt(-3, 2**20)       # M_MMAP_THRESHOLD: else glibc raises it to 32 MB by and by


def as_contiguous(x, dtype):
    """ cast and reorder in one copy """
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()   # to() does neither if x has the dtype


class PackedAttention(torch.autograd.Function):
    """
    softmax(q k^T / sqrt(D)) v within every text, for training on CPU: qkv (N, 3C) -> (N, C), gradient by hand. A batch
    of sentences has dozens of groups with small products; autograd's cutting, copying and gluing took longer than
    these, and for texts so short the backward of torch's fused attention five times as long. In float32 although the
    rest is bfloat16: for small products of ever new shapes (B, T) that is three times as fast.
    """

    @staticmethod
    def forward(ctx, qkv, groups, heads, p):
        N, C, D = len(qkv), qkv.shape[1] // 3, qkv.shape[1] // 3 // heads
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        keep = dropout_mask(heads * sum(B * T * T for B, T in groups), p, dtype) if p else None   # of all groups
        mixed, saved, row, entry = qkv.new_empty(N, C), [], 0, 0
        for B, T in groups:
            part = qkv[row:row + B * T].view(B, T, 3, heads, D).permute(2, 0, 3, 1, 4)
            q, k, v = as_contiguous(part, dtype).view(3, B * heads, T, D)
            weights = torch.bmm(q, k.mT).mul_(D**-0.5).softmax(-1)                            # (B * H, T, T)
            mask = keep[entry:entry + B * heads * T * T].view(weights.shape) if p else None
            dropped = weights * mask if p else weights
            out = torch.bmm(dropped, v).view(B, heads, T, D)
            mixed[row:row + B * T].view(B, T, heads, D).copy_(out.transpose(1, 2))
            saved += [q, k, v, weights, mask, dropped]
            row, entry = row + B * T, entry + B * heads * T * T
        ctx.save_for_backward(*saved)
        ctx.groups = groups
        return mixed

    @staticmethod
    def backward(ctx, grad):
        N, C = grad.shape
        grad_qkv, row, saved = grad.new_empty(N, 3 * C), 0, ctx.saved_tensors   # checkpointing lets them be read once
        for i, (B, T) in enumerate(ctx.groups):
            q, k, v, weights, mask, dropped = saved[6 * i:6 * i + 6]
            D = q.shape[-1]
            part = grad[row:row + B * T].view(B, T, C // D, D).transpose(1, 2)
            g = as_contiguous(part, q.dtype).view(q.shape)                                    # (B * H, T, D)
            g_weights = torch.bmm(g, v.mT)                                                    # (B * H, T, T)
            if mask is not None:
                g_weights *= mask
            g_scores = torch._softmax_backward_data(g_weights, weights, -1, q.dtype).mul_(D**-0.5)
            out = grad_qkv[row:row + B * T].view(B, T, 3, C // D, D).permute(2, 0, 3, 1, 4)   # (3, B, H, T, D)
            out[0].copy_(torch.bmm(g_scores, k).view(out[0].shape))
            out[1].copy_(torch.bmm(g_scores.mT, q).view(out[0].shape))
            out[2].copy_(torch.bmm(dropped.mT, g).view(out[0].shape))
            row += B * T
        return grad_qkv, None, None, None


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.hidden_size % config.num_attention_heads == 0, f"{config}"
        self.heads = config.num_attention_heads
        self.p = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, groups):
        C, p = x.shape[1], self.p if self.training else 0.0
        qkv = self.qkv(x)                                                                     # (N, 3C)
        if x.device.type == "cpu" and (self.training or torch.is_grad_enabled()):
            with torch.autocast("cpu", enabled=False):
                mixed = PackedAttention.apply(qkv, groups, self.heads, p)
            return self.out(mixed)                                                            # (N, C)
        mixed = []
        for (B, T), part in zip(groups, qkv.split([B * T for B, T in groups])):
            q, k, v = part.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
            part = F.scaled_dot_product_attention(q, k, v, dropout_p=p)   # no text has padding to hide
            mixed.append(part.transpose(1, 2).reshape(B * T, C))
        return self.out(torch.cat(mixed))                                                     # (N, C)


class Block(nn.Module):
    """ Post-LayerNorm, as in BERT: what leaves a block is normalised, so every tap can be used as it is. """

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
        return self.rest(x, self.attention(x, groups))

    def rest(self, x, mixed):
        """ (N, C), (N, C) -> (N, C): what does not depend on the groups. torch.compile takes this part: N may vary. """
        p = self.p if self.training else 0.0
        x = self.norm1(x + dropout(mixed, p))
        return self.norm2(x + dropout(self.down(self.act(self.up(x))), p))


class Bert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False   # see run
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
        """ Pack -> (N, C), layer 0. We never encode pairs of texts: the segment is 0 everywhere. """
        assert max(T for _, T in batch.groups) <= self.config.max_position_embeddings, f"{batch.groups[-1]}"
        x = self.word(batch.input_ids) + self.position(batch.position_ids) + self.token_type.weight[0]
        x = dropout(self.norm(x), self.config.hidden_dropout_prob if self.training else 0.0)
        if not self.training and torch.is_autocast_enabled(x.device.type):
            # On CPU what runs between the layers is then bfloat16, too: encoding is 7 % faster and no less accurate.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def run(self, function, *args):
        """ function(*args); with gradient_checkpointing, backward computes its inside again instead of keeping it """
        return checkpoint(function, *args, use_reentrant=False) if self.gradient_checkpointing else function(*args)

    def forward(self, batch, layers):
        """ Pack, L layers (0 .. num_hidden_layers) -> list of L taps (N, C); no block above max(layers) runs """
        assert all(0 <= n <= len(self.blocks) for n in layers), f"{layers}, and the model has {len(self.blocks)} blocks"
        x = self.embed(batch)
        taps = {0: x}
        for n, block in enumerate(self.blocks[:max(layers)], start=1):
            x = self.run(block, x, batch.groups)
            if n in layers:
                taps[n] = x
        return [taps[n] for n in layers]

    def encode(self, batch, layers):
        """ Pack, list of L layers -> {layer: (B, C) pooled embeddings}, in the caller's order of texts. """
        return {n: pool(tap, batch, self.config.pooling) for n, tap in zip(layers, self(batch, layers))}

    def num_params(self, layer):
        """ parameters that a size needs: embeddings (all their channels, whatever the dim) and the first blocks """
        used = [self.word, self.position, self.token_type, self.norm, *self.blocks[:layer]]
        return sum(p.numel() for module in used for p in module.parameters())

    def configure_optimizers(self, learning_rate, weight_decay, embedding_lr_scale=1.0):
        """
        AdamW; decay on the matrices, not on biases and LayerNorm; fused: all tensors in one kernel. Every group has a
        "scale" by which the training loop multiplies the rate of the step.
        """
        embeddings = [self.word.weight, self.position.weight, self.token_type.weight]
        rest = [p for name, p in self.named_parameters() if not name.startswith(("word.", "position.", "token_type."))]
        groups = [{"params": embeddings, "weight_decay": weight_decay, "scale": embedding_lr_scale},
                  {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay, "scale": 1.0},
                  {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "scale": 1.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


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
        """ (..., d) -> (..., C): first d coordinates of a tap, lifted by the first d columns of the dense weight """
        return self.norm(self.act(F.linear(x, self.dense.weight[:, :x.shape[-1]], self.dense.bias)))

# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face folders in and out

# our name -> theirs, by substring; q, k and v are one matrix here (one product instead of three) and three there
NAMES = [("blocks.", "encoder.layer."), (".attention.out.", ".attention.output.dense."),
         (".norm1.", ".attention.output.LayerNorm."), (".up.", ".intermediate.dense."), (".down.", ".output.dense."),
         (".norm2.", ".output.LayerNorm."), ("word.", "embeddings.word_embeddings."),
         ("position.", "embeddings.position_embeddings."), ("token_type.", "embeddings.token_type_embeddings."),
         ("norm.", "embeddings.LayerNorm.")]
QKV = ["attention.self.query", "attention.self.key", "attention.self.value"]


def hf_name(name):
    for ours, theirs in NAMES:
        # the last four begin the name, so that "norm." does not match inside another one
        if name.startswith(ours) or ours[0] == "." and ours in name:
            name = name.replace(ours, theirs, 1)
    return name


def to_hf(state):
    """ our state_dict -> Hugging Face's BertModel state_dict """
    theirs = {}
    for name, tensor in state.items():
        if ".attention.qkv." in name:
            for part, piece in zip(QKV, tensor.chunk(3)):
                theirs[hf_name(name.replace("attention.qkv", part))] = piece.contiguous()
        else:
            theirs[hf_name(name)] = tensor
    return theirs


def from_hf(state, ours):
    """ Hugging Face's state_dict (heads, pooler and all) -> one for our model, whose names are `ours`. """
    def find(name):
        if ".attention.qkv." in name:
            return torch.cat([state[hf_name(name.replace("attention.qkv", part))] for part in QKV])
        return state[hf_name(name)]
    return {name: find(name) for name in ours}


def find_folder(name):
    """ a local folder, or a name on the Hugging Face hub (downloaded once, then found offline too) -> Path """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download
    try:
        wanted = ["*.json", "*.txt", "model.safetensors", "pytorch_model.bin"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:   # the hub has a dozen kinds of "not there", offline among them
        raise ValueError(f"{name}: neither a folder nor a model of the hub that could be had "
                         f"({str(error).splitlines()[0]})") from error


def load_state(folder):
    """ the weights in a Hugging Face folder, under the names of BertModel; raises ValueError when there are none """
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file
        state = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").exists():
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin in this folder")
    # The oldest checkpoints say gamma and beta; those with a head on top say bert.encoder...
    return {name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias"): tensor
            for name, tensor in state.items()}


def from_pretrained(name, **overrides):
    """
    Any BERT checkpoint: a local folder or a name on the Hugging Face hub -> Bert in eval mode, float32.
    overrides: BertConfig fields to replace, for example hidden_dropout_prob. Raises ValueError if it is no BERT.
    """
    folder = find_folder(name)
    if not (folder / "config.json").exists():
        raise ValueError(f"{name}: no config.json in this folder; give one that save_pretrained wrote")
    read = json.loads((folder / "config.json").read_text())
    positions = read.get("position_embedding_type", "absolute")
    if read.get("model_type") != "bert" or positions != "absolute":
        raise ValueError(f"{name}: model_type {read.get('model_type')!r} with {positions} positions; "
                         "this code is BERT with absolute positions, nothing else")
    known = {field.name for field in fields(BertConfig)}
    config = BertConfig(**{key: value for key, value in (read | overrides).items() if key in known})
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{name}: hidden_act {config.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
    config.sizes = tuple(map(tuple, config.sizes))
    state = load_state(folder)
    model = Bert(config)
    try:
        model.load_state_dict(from_hf(state, model.state_dict()))
    except KeyError as error:
        raise ValueError(f"{name}: the checkpoint has no tensor {error}; is it a BERT?") from None
    except RuntimeError as error:   # shapes: config.json and weights are of different models
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    return model.float().eval()


HEAD = {"dense.weight": "transform.dense.weight", "dense.bias": "transform.dense.bias",
        "norm.weight": "transform.LayerNorm.weight", "norm.bias": "transform.LayerNorm.bias", "bias": "bias"}


def load_head(name, config):
    """ the MLMHead of a folder or hub name; a new one if the checkpoint has none """
    state, head = load_state(find_folder(name)), MLMHead(config)
    theirs = {ours: state.get(f"cls.predictions.{hf}") for ours, hf in HEAD.items()}
    if all(tensor is not None for tensor in theirs.values()):
        head.load_state_dict(theirs)
    return head.float()


def save_pretrained(model, tokenizer, folder, head=None):
    """
    An ordinary Hugging Face folder, config.json, model.safetensors and tokenizer files; AutoModel loads it. With a head
    (MLMHead) it is a BertForMaskedLM.
    """
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, kind = to_hf(model.state_dict()), "BertModel"
    if head is not None:
        state, kind = {f"bert.{name}": tensor for name, tensor in state.items()}, "BertForMaskedLM"
        state |= {f"cls.predictions.{HEAD[name]}": tensor for name, tensor in head.state_dict().items()}
    config = {"architectures": [kind], "model_type": "bert", **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")   # never half a model
