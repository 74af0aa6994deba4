"""
BERT that can be read at any layer, for texts packed into one row of tokens.

Starbucks (arXiv 2410.13230) uses one BERT encoder (arXiv 1810.04805) at several sizes. A size is a pair (layer, dim):
run the first `layer` blocks, pool the tokens of each text into one vector, keep the first `dim` coordinates. BERT
normalises the output of every block, so each block's output (a "tap") can serve as an embedding without an extra head.
Layers count from 1; layer 0 is the embedding layer. Below: Hugging Face's files, what both training scripts share.

Letters for shapes, the same in all files: B texts, T tokens of one text, N tokens of all texts of a batch, G texts of
equal length, C channels (768), H heads, D dims that a size keeps (the first D of the C), Q queries, P passages,
M positions that the encoder must guess, M' those of SMAE's decoder, V words of the vocabulary.
"""
import argparse, json, math, os, shutil, sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- sizes: (layer, dim) pairs -------------------------------------
# name, share of the model's layers, share of its channels: 2:32 ... 12:768 for BERT-base
SIZES = [("Demi", 1/6, 1/24), ("Short", 1/3, 1/12), ("Tall", 1/2, 1/6),
         ("Grande", 2/3, 1/3), ("Venti", 5/6, 2/3), ("Trenta", 1, 1)]

def default_sizes(layers, channels):
    """ -> ((layer, dim), ...), small to large: SIZES for a model with so many layers and channels """
    return tuple((max(1, round(layers * depth)), max(1, round(channels * width))) for _, depth, width in SIZES)

def size_name(size):
    return "{}:{}".format(*size)   # 2:32

def parse_sizes(text):
    """ "2:32,12:768" -> ((2, 32), (12, 768)); an argparse type """
    return tuple((int(layer), int(dim)) for layer, dim in (size.split(":") for size in text.split(",")))

def check_sizes(sizes, config):
    """ -> tuple of sizes from small to large. Raises ValueError if the model lacks one of the layers or channels. """
    layers, dims = config.num_hidden_layers, config.hidden_size
    if not all(1 <= layer <= layers and 1 <= dim <= dims for layer, dim in sizes):   # a slice would be silently shorter
        raise ValueError(f"--sizes {','.join(map(size_name, sizes))}: this model has {layers} layers and {dims} dims")
    return tuple(sorted(set(sizes)))

# ---- the batch without padding, the vector of a text, the score of a pair ----
class Pack(NamedTuple):
    """ B texts in one row of N tokens, short texts first, in place of (B, T) ids and a mask for padding. Linear
    layers, LayerNorm and GELU treat every token alone, so they run on the row; attention views each group of G equally
    long texts as (G, T, C). Three texts of 4, 2 and 4 tokens, called a, b, c, become the row  b b a a a a c c c c  with
        position_ids 0 1 0 1 2 3 0 1 2 3,  text_ids 1 1 0 0 0 0 2 2 2 2,  starts 2 0 6,  groups [(1, 2), (2, 4)] """
    input_ids: torch.Tensor      # (N,)
    position_ids: torch.Tensor   # (N,) 0 .. T-1 within each text
    text_ids: torch.Tensor       # (N,) number of the token's text in the caller's list
    starts: torch.Tensor         # (B,) where each text of the caller's list begins: its [CLS]
    lengths: torch.Tensor        # (B,) tokens of each text of the caller's list
    groups: list                 # [(G, T), ...] in the order of the row

def pack(token_ids, device="cpu"):
    """ list of B (T,) token ids, none empty -> Pack """
    lengths = np.array([len(text) for text in token_ids])
    order = np.argsort(lengths, kind="stable")                    # (B,) short texts first
    starts = np.empty_like(lengths)                               # (B,)
    starts[order] = lengths[order].cumsum() - lengths[order]
    text_ids = np.repeat(order, lengths[order])                   # (N,)
    input_ids = np.concatenate([token_ids[i] for i in order])     # (N,)
    position_ids = np.arange(len(text_ids)) - starts[text_ids]    # (N,)
    T_values, G_values = np.unique(lengths, return_counts=True)   # ascending
    tensors = [torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
               for array in (input_ids, position_ids, text_ids, starts, lengths)]
    return Pack(*tensors, list(zip(G_values.tolist(), T_values.tolist())))

POOLINGS, SIMILARITIES = ("mean", "cls"), ("cosine", "dot")   # under the names of sentence-transformers

def pool(hidden, batch, pooling):
    """ tap (N, C) -> (B, C) embeddings, at least float32: scores of bfloat16 vectors lose digits """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "cls":
        return hidden[batch.starts]             # the first token of each text
    total = hidden.new_zeros(len(batch.starts), hidden.shape[1]).index_add(0, batch.text_ids, hidden)
    return total / batch.lengths[:, None]       # (B, C): all tokens, also [CLS] and [SEP]

def shorten(embeddings, dim, similarity):
    """ (B, C) -> (B, D) vectors of a size. Slice, then normalise: an index of D numbers can normalise only those. """
    embeddings = embeddings[:, :dim]
    return F.normalize(embeddings, dim=-1) if similarity == "cosine" else embeddings

def score(queries, passages, dim, similarity):
    """ (Q, C), (P, C) -> (Q, P). The product (Q, D) x (D, P) never builds a (Q, P, C) tensor. """
    return shorten(queries, dim, similarity) @ shorten(passages, dim, similarity).T

# ---- the encoder ---------------------------------------------------
class Dropout(nn.Dropout):
    """ (...) -> (...). On a CPU an entry is kept if its random byte is below `keep`, and one random int64 gives eight
    bytes: a step is a tenth faster than with nn.Dropout. p becomes a multiple of 1/256 (0.1: 26/256). """
    def forward(self, x):
        if not (x.is_cpu and self.training and self.p):
            return super().forward(x)
        keep = 256 - round(256 * self.p)
        dice = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.uint8)   # any int64
        return x * (dice[:x.numel()].view(x.shape) < keep).to(x.dtype).mul_(256 / keep)

class Block(nn.Module):
    """ Post-LayerNorm, as in BERT: the output of a block is normalised, so every tap can be used as it is. """
    def __init__(self, config):
        super().__init__()
        C, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.key.bias.requires_grad_(False)   # the softmax ignores it, and AdamW would amplify its rounding errors
        self.norm1 = nn.LayerNorm(C, eps=eps)
        self.up, self.down = nn.Linear(C, wide), nn.Linear(wide, C)
        self.norm2 = nn.LayerNorm(C, eps=eps)
        self.act, self.dropout = getattr(F, config.hidden_act), Dropout(config.hidden_dropout_prob)
        self.heads, self.attention_dropout = config.num_attention_heads, Dropout(config.attention_probs_dropout_prob)

    def forward(self, x, groups):
        """ (N, C) -> (N, C) """
        return self.after_attention(x, self.attend(self.query(x), self.key(x), self.value(x), groups))

    @torch.autocast("cpu", enabled=False)   # on a CPU bfloat16 makes the backward 8 times slower
    def attend(self, q, k, v, groups):
        """ softmax(q k^T / sqrt(C / H)) v within each text, H heads: (N, C) each -> (N, C) """
        if q.is_cpu:
            q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        p = self.attention_dropout.p if self.training else 0.0
        mixed, tokens = [], [G * T for G, T in groups]
        for (G, T), *group in zip(groups, q.split(tokens), k.split(tokens), v.split(tokens)):   # (G * T, C): no padding
            qs, ks, vs = (x.view(G, T, self.heads, -1).transpose(1, 2) for x in group)      # (G, H, T, C / H) each
            if p and q.is_cpu:                                                              # with our fast Dropout
                weights = (qs @ ks.mT / math.sqrt(qs.shape[-1])).softmax(-1)                # (G, H, T, T)
                y = self.attention_dropout(weights) @ vs
            else:                                                                           # the same, in one kernel
                y = F.scaled_dot_product_attention(qs, ks, vs, dropout_p=p)
            mixed.append(y.transpose(1, 2).reshape(G * T, -1))                              # (G * T, C)
        return torch.cat(mixed)

    def after_attention(self, x, mixed):
        """ block input (N, C), output of its attention (N, C) -> (N, C) """
        x = self.norm1(x + self.dropout(self.out(mixed)))
        return self.norm2(x + self.dropout(self.down(self.act(self.up(x)))))

class Bert(nn.Module):
    """ BERT's embedding layer and its blocks. forward gives the taps, encode the vectors of the texts. """
    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.hidden_size
        self.gradient_checkpointing = False
        self.word = nn.Embedding(config.vocab_size, C)
        self.position = nn.Embedding(config.max_position_embeddings, C)
        self.token_type = nn.Embedding(config.type_vocab_size, C)
        self.embedding_norm = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.dropout = Dropout(config.hidden_dropout_prob)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def embed(self, batch):
        """ Pack -> (N, C), layer 0. One text is one segment, so the segment id is 0 everywhere. """
        x = self.word(batch.input_ids) + self.position(batch.position_ids) + self.token_type.weight[0]
        return self.dropout(self.embedding_norm(x))

    def maybe_checkpoint(self, function, *args):
        """ function(*args); with gradient checkpointing, backward computes it again instead of storing activations """
        return checkpoint(function, *args, use_reentrant=False) if self.gradient_checkpointing else function(*args)

    def forward(self, batch, layers):
        """ Pack, list of layers (0 .. num_hidden_layers) -> {layer: tap (N, C)}. No block above the last runs. """
        x = self.embed(batch)
        taps = {0: x}
        for n, block in enumerate(self.blocks[:max(layers)], start=1):
            x = self.maybe_checkpoint(block, x, batch.groups)
            if n in layers:
                taps[n] = x
        return {n: taps[n] for n in layers}

    def encode(self, batch, layers):
        """ Pack, list of layers -> {layer: (B, C) embeddings}, in the order in which pack() was given the texts """
        return {n: pool(tap, batch, self.config.pooling) for n, tap in self(batch, layers).items()}

# ---- Hugging Face folders ------------------------------------------
# our name of a part -> theirs: blocks.3.up.weight is encoder.layer.3.intermediate.dense.weight
HF_NAMES = {
    "word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings", "embedding_norm": "embeddings.LayerNorm",
    "blocks": "encoder.layer", "query": "attention.self.query", "key": "attention.self.key",
    "value": "attention.self.value", "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
    "dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
    "word_bias": "cls.predictions.bias"}   # the last three are of MLMHead in pretrain_smae.py

def hf_name(name):
    """ our name of a weight -> Hugging Face's """
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))

def new_config(**fields):
    """ -> transformers' BertConfig, and how the embeddings are used; None leaves a default; the full size is last """
    from transformers import BertConfig   # here, because it takes a second or two
    C = fields.get("hidden_size", 768)
    shape = {"intermediate_size": 4 * C, "num_attention_heads": C // math.gcd(C, 64)}   # BERT has 64 a head
    usage = {"sizes": (), "pooling": "mean", "similarity": "cosine", "query_prompt": "", "passage_prompt": ""}
    config = BertConfig(**shape | usage | {name: value for name, value in fields.items() if value is not None})
    config.sizes = tuple(map(tuple, config.sizes)) or default_sizes(config.num_hidden_layers, config.hidden_size)
    return config

def load_model(name, device="cpu", max_length=None, **overrides):
    """ A folder or hub name of any BERT -> model, tokenizer. Pooling, similarity and prompts are those of `overrides`,
    else of config.json, else of the files of sentence-transformers. Raises ValueError if it cannot be read. """
    from transformers import AutoTokenizer
    try:
        folder, usage, transformer = read_modules(name)
        config = read_json(folder / "config.json")
        kind, positions = config.get("model_type"), config.get("position_embedding_type", "absolute")
        adapter = (folder / "adapter_config.json").exists()
        if (kind, positions) != ("bert", "absolute") or config.get("is_decoder") or adapter:
            raise ValueError(f"model_type {kind}, {positions} positions: no BERT encoder, or an adapter to merge first")
        fields = usage | config | {field: value for field, value in overrides.items() if value is not None}
        if not fields["pooling"]:
            print(f"{name} does not say how to pool, so the mean over the tokens is assumed")
        config = new_config(**fields | {"pooling": fields["pooling"] or "mean", "dtype": "float32"})
        if config.pooling not in POOLINGS or config.similarity not in SIMILARITIES:
            raise ValueError(f"pooling {config.pooling} or similarity {config.similarity} is unknown here")
        model, tokenizer = Bert(config), AutoTokenizer.from_pretrained(folder)
        load_weights(model, read_weights(folder))
        if transformer.get("do_lower_case") and tokenizer.tokenize("A") != tokenizer.tokenize("a"):
            raise ValueError("do_lower_case in sentence_bert_config.json, but a tokenizer that does not lower-case")
        if not config.vocab_size / 4 < len(tokenizer) <= config.vocab_size:
            raise ValueError(f"{len(tokenizer)} words in the tokenizer, {config.vocab_size} in the model: copy its own "
                             "files there or, if words were added, call resize_token_embeddings of transformers")
    except Exception as error:   # transformers, safetensors, json and the hub have a dozen errors
        raise ValueError(f"{name}: no BERT that can be read ({type(error).__name__}: {error!s:.300})") from error
    length = max_length or transformer.get("max_seq_length") or tokenizer.model_max_length
    tokenizer.model_max_length = min(length, config.max_position_embeddings)
    return model.eval().to(device), tokenizer

def read_json(path):
    """ a JSON file -> its content; {} if there is no such file """
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

def read_modules(name):
    """ a local folder, or a name on the hub -> what its files of sentence-transformers say: the folder of the BERT;
    pooling, similarity and prompts; sentence_bert_config.json """
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.txt", "*model*.safetensors", "*pytorch_model*.bin"]
    folder = Path(name) if Path(name).exists() else Path(snapshot_download(name, allow_patterns=files))
    parts = {part["type"].rsplit(".", 1)[-1]: folder / part["path"] for part in read_json(folder / "modules.json")}
    if unknown := parts.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"modules.json asks for {', '.join(unknown)}, which is not supported")
    bert = parts.get("Transformer", folder)
    pooling = read_json(parts.get("Pooling", folder / "1_Pooling") / "config.json")
    switches = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}   # newer files name the mode
    modes = [switches.get(key, key) for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    encoding = read_json(folder / "config_sentence_transformers.json")
    prompts = encoding.get("prompts", {})
    if prompts and not pooling.get("include_prompt", True):
        raise ValueError("its pooling leaves the tokens of prompts out, which is not supported")
    usage = {"pooling": pooling.get("pooling_mode") or "+".join(modes),
             "similarity": "cosine" if "Normalize" in parts else encoding.get("similarity_fn_name") or "cosine",
             "query_prompt": prompts.get("query") or "",
             "passage_prompt": prompts.get("passage") or prompts.get("document") or ""}
    return bert, usage, read_json(bert / "sentence_bert_config.json")

def read_weights(folder):
    """ one file or several shards -> {name: tensor}; module.bert.encoder.X becomes encoder.X, module.cls.Y cls.Y """
    from safetensors.torch import load_file
    state, key = {}, hf_name("word.weight")
    for file in sorted(folder.glob("model[.-]*safetensors")) or sorted(folder.glob("pytorch_model[.-]*bin")):
        state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    prefixes = [name.removesuffix(key) for name in state if name.endswith(key)]   # "", "bert.", "module.bert.", ...
    if len(prefixes) != 1:
        raise ValueError(f"its weights hold {len(prefixes)} BERTs")
    outer = prefixes[0].removesuffix("bert.")
    return {name.removeprefix(outer).removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias"): tensor
            for name, tensor in state.items()}   # gamma, beta: names of 2018

def load_weights(module, state):
    """ what read_weights gives -> the weights of Bert or MLMHead. Raises KeyError for a name that is not there. """
    weights = {name: state[hf_name(name)] for name in module.state_dict()}
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} ({tensor.dtype}) is quantised, or not finite")
    module.load_state_dict(weights)

def save_pretrained(model, tokenizer, folder, head=None):
    """ Write a folder for AutoModel, or with an MLMHead for BertForMaskedLM, and for sentence-transformers """
    from safetensors.torch import save_file
    config, folder, C = model.config, Path(folder), model.config.hidden_size
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    state = {hf_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if head is None:   # nothing here uses the pooler, but AutoModel warns of random weights where there is none
        state |= {"pooler.dense.weight": torch.zeros(C, C), "pooler.dense.bias": torch.zeros(C)}
    else:
        state = {f"bert.{name}": tensor for name, tensor in state.items()}
        state |= {hf_name(name): tensor for name, tensor in head.state_dict().items()}
    config.architectures = ["BertModel" if head is None else "BertForMaskedLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    dim = config.sizes[-1][1]   # of the full size
    normalized = config.similarity == "cosine" and dim == C   # sentence-transformers normalises before it slices
    modules = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normalized else {})
    files = {"modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                              for i, (kind, path) in enumerate(modules.items())],
             "1_Pooling/config.json": {"word_embedding_dimension": C, "pooling_mode": config.pooling},
             "config_sentence_transformers.json": {"similarity_fn_name": config.similarity, "truncate_dim": dim,
                 "prompts": {"query": config.query_prompt, "document": config.passage_prompt}},
             "sentence_bert_config.json": {"max_seq_length": tokenizer.model_max_length}}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")

# ---- what both training scripts share ------------------------------
def fast_dtype():
    """ "bfloat16" where that is faster than "float32": on a GPU, and on a CPU with AMX """
    return "bfloat16" if torch.cuda.is_available() or torch.cpu.get_capabilities().get("amx_bf16") else "float32"

def configure_optimizer(named_parameters, args):
    """ AdamW. All but biases and LayerNorms decay. Embeddings may learn faster, by their group's scale. """
    embeddings, matrices, vectors = [], [], []
    for name, parameter in named_parameters:
        is_embedding = any(part in name for part in ("word.", "position.", "token_type."))
        (embeddings if is_embedding else matrices if parameter.dim() == 2 else vectors).append(parameter)
    groups = [{"params": embeddings, "scale": args.embedding_lr_scale}, {"params": matrices, "scale": 1.0},
              {"params": vectors, "scale": 1.0, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)   # fused: all tensors in one kernel

def set_learning_rate(optimizer, step, max_steps, args, decay):
    """ linear warm-up, then a "linear" or "cosine" decay to 0 -> the learning rate of the step """
    warmup_steps = max(1, round(args.warmup * max_steps))
    share = (step + 1) / warmup_steps
    if step >= warmup_steps:
        done = (step - warmup_steps) / (max_steps - warmup_steps)
        share = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * share * group["scale"]
    return args.learning_rate * share

def start_ranks(args):
    """ Join the processes that torchrun started, if it did. Only rank 0 prints from now on. """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))   # "cuda" means this one from now on
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")

def ranks():
    """ -> the number of this process, how many there are """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def sum_and_clip(parameters, step, terms):
    """ The gradient becomes the sum of the ranks' gradients, of norm 1 at most -> the norm before that. Raises
    FloatingPointError if it is not finite, and names those of the terms {name: scalar} that are not. """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if dist.is_initialized():
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not norm.isfinite():
        broken = [name for name, value in terms.items() if not value.isfinite()]
        raise FloatingPointError(f"step {step + 1}: not finite: {', '.join(broken) or 'the gradient'}; lower "
                                 "--learning_rate, raise --temperature, or use --dtype float32")
    if step == 0 and (norm < 1e-6 or terms["loss"] < 1e-6):
        print(f"warning: step 1 has nothing to learn from (loss {terms['loss']:.2g}, gradient {norm:.2g}): are all "
              "queries, all passages or all scores of a batch the same, or the texts too short?", file=sys.stderr)
    return norm

def average(records):
    """ list of {name: scalar tensor} -> {name: float}, the mean over the records that have the name, and over ranks """
    names = dict.fromkeys(name for record in records for name in record)
    means = torch.stack([torch.stack([r[name].detach() for r in records if name in r]).mean() for name in names])
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return dict(zip(names, means.tolist()))

def log(log_file, record, shown):
    """ a record to log.jsonl, its entries in shown to the screen; log_file is None on all ranks but the first """
    if log_file:
        print(json.dumps(record), file=log_file, flush=True)
        print(" | ".join(f"{name} {record[name]:.6g}" for name in dict.fromkeys(shown) if name in record), flush=True)

STATE = "training_state.pt"   # in --out_dir, beside the model in Hugging Face's files, args.json and log.jsonl
FREE = {"out_dir", "resume", "log_interval", "save_interval", "eval_interval", "retrieval", "device", "compile",
        "train_pairs", "train_text", "columns"}   # may change with --resume; the content of the data may not

def load_run(args):
    """ with --resume -> what save_run left in --out_dir; else None, or ValueError if a model is there already """
    if not args.resume:
        if Path(args.out_dir, "config.json").exists():
            raise ValueError(f"--out_dir {args.out_dir} holds a model; delete it, choose another folder, or --resume")
        return None
    saved = torch.load(Path(args.out_dir, STATE), map_location="cpu", weights_only=True)
    changed = [name for name, value in vars(args).items() if name not in FREE and saved["args"].get(name) != value]
    if changed:
        raise ValueError(f"--resume: the run in {args.out_dir} had other values of --{', --'.join(changed)}; to train "
                         "on with new ones, give --init_from the folder")
    return saved

def restore(saved, must_match, model, optimizer):
    """ what load_run read -> the weights of model and optimizer. Raises ValueError for other data or ranks. """
    if saved["must_match"] != must_match:
        raise ValueError(f"--resume: data and ranks were {saved['must_match']}, they are {must_match}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])

def open_run(args):
    """ make --out_dir -> log.jsonl, open; a resumed run adds to it, so a repeated step is there twice """
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    Path(args.out_dir, "args.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2) + "\n")
    return open(Path(args.out_dir, "log.jsonl"), "a" if args.resume else "w", encoding="utf-8")

def save_run(args, step, model, optimizer, must_match, bert, tokenizer, head=None):
    """ what --resume needs to STATE, and bert to Hugging Face's files; none is ever half written """
    out_dir, part = Path(args.out_dir), Path(args.out_dir, "saving.part")
    save_pretrained(bert, tokenizer, part, head)
    torch.save({"step": step, "args": vars(args), "must_match": must_match, "model": model.state_dict(),
                "optimizer": optimizer.state_dict()}, part / STATE)
    (out_dir / "1_Pooling").mkdir(exist_ok=True)
    for file in sorted(filter(Path.is_file, part.rglob("*")), key=lambda file: file.name == STATE):   # STATE last
        os.replace(file, out_dir / file.relative_to(part))
    shutil.rmtree(part)

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """ keep the docstring's line breaks and print every default """

def run_script(main, parse_args):
    """ main(parse_args()); for what the user can mend one line and exit status 2, with python -X dev a traceback """
    sys.stdout.reconfigure(errors="replace")   # a terminal may lack the letters of a text
    try:
        args = parse_args()
        for name, value in vars(args).items():
            if isinstance(value, int | float) and not value >= 0:   # NaN is not
                raise ValueError(f"--{name} {value}: a number from 0 on is needed")
        main(args)
    except () if sys.flags.dev_mode else (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
