"""
A size of a model as a folder of its own, for sentence-transformers and transformers, with a model card.

    python -m tools.export out/srl 2:16 out/small        # 2 layers, 16 dims (for transformers zeros beyond)
    python -m tools.export out/srl all out/sizes         # a folder for each size, or for those of 1:8,3:32
    python -m tools.export out/srl 2:16 out/tiny --vocab_size 4000 --texts my_folder
    python -m tools.export out/srl 2:16 out/web --onnx --sts my_pairs.jsonl    # for programs without PyTorch, browsers
    python -m tools.export out/srl                       # no folder: only the card of out/srl itself

Most of a small size's weight is its vocabulary. --vocab_size keeps the entries that are most frequent in --texts.
"""
import argparse, copy, importlib.util, json, logging, re, sys, warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
from model import check_sizes, load_model, parse_sizes, read_json, run_script, save_pretrained, size_name
from tools.search import load_passages

def cut(model, size):
    """ -> the model of one size alone: its layers, and a last LayerNorm that gives 0 beyond its dims. Zeros change no
    cosine and no dot product, so programs that normalise before they slice, or never slice, are right as well. """
    layer, dim = size
    small = copy.deepcopy(model)
    small.config.sizes, small.config.num_hidden_layers = (size,), layer
    del small.blocks[layer:]
    last = small.blocks[-1].norm2
    last.weight.data[dim:] = last.bias.data[dim:] = 0
    return small.eval()

def cut_vocabulary(model, tokenizer, counts, vocab_size):
    """ Keep vocab_size pieces of WordPiece: the special tokens and others that were added, the single characters, which
    can spell any word, and those with the highest counts (V,) -> model, tokenizer, whose ids keep their order """
    from tokenizers import Tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()   # {piece: id}
    if state["model"]["type"] != "WordPiece":
        raise ValueError(f"--vocab_size is for WordPiece; this tokenizer is {state['model']['type']}")
    must = {piece for piece in ids if piece in added or len(piece.removeprefix("##")) == 1}
    must |= {*tokenizer.tokenize(model.config.query_prompt), *tokenizer.tokenize(model.config.passage_prompt)}
    if not len(must) <= vocab_size <= len(ids):
        raise ValueError(f"--vocab_size {vocab_size}: {len(must)} special tokens and single characters must stay, and "
                         f"there are {len(ids)} entries; give a number between")
    best = sorted(ids, key=lambda piece: (piece not in must, -counts[ids[piece]], ids[piece]))[:vocab_size]
    kept = {piece: new for new, piece in enumerate(sorted(best, key=ids.get))}
    state["model"]["vocab"] = {piece: kept[piece] for piece in state["model"]["vocab"] if piece in kept}
    state["added_tokens"] = [token | {"id": kept[token["content"]]} for token in state["added_tokens"]]
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    state |= {"post_processor": {"type": "BertProcessing", "cls": [cls, kept[cls]], "sep": [sep, kept[sep]]},
              "padding": None}   # these have ids, too
    flags = {"tokenizer_object": Tokenizer.from_str(json.dumps(state)), "added_tokens_decoder": {}}
    smaller, model = type(tokenizer)(**tokenizer.init_kwargs | flags), copy.deepcopy(model)
    smaller.model_max_length = tokenizer.model_max_length
    if smaller.get_vocab() != kept or [kept.get(t) for t in tokenizer("").tokens()] != smaller("")["input_ids"]:
        raise ValueError("--vocab_size: this tokenizer numbers or surrounds its words in another way than BERT's")
    model.word = torch.nn.Embedding.from_pretrained(model.word.weight[[ids[piece] for piece in kept]], freeze=False)
    model.config.vocab_size, model.config.pad_token_id = vocab_size, smaller.pad_token_id
    return model, smaller

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]

def write_onnx(model, tokenizer, folder, sts):
    """ a size and its folder -> FOLDER/onnx/model.onnx and model_int8.onnx, where sentence-transformers and
    transformers.js look for them. Raises ValueError if the first does not give the size's embeddings. """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel
    bert, (size,) = AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), model.config.sizes
    bert.pooler = None                          # an output of zeros
    ids = torch.tensor([[2, 3, 4], [2, 3, 0]])  # an example, with padding
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=model.config.max_position_embeddings)}
    (folder / "onnx").mkdir()
    file, int8 = folder / "onnx/model.onnx", folder / "onnx/model_int8.onnx"
    logging.disable(logging.WARNING)            # they tell of every layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(bert, kwargs=dict(zip(INPUTS, (ids, ids.clamp(max=1), 0 * ids))), verbose=False,
                          dynamic_shapes=dict.fromkeys(INPUTS, axes), output_names=["last_hidden_state"]).save(file)
        quantize_dynamic(file, int8, weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    versions = {folder / "model.safetensors": model, file: onnx_model(model, file), int8: onnx_model(model, int8)}
    texts = sts[1] if sts else ["a text", "another one, which is longer"]
    rows = [evaluate.embed_texts(version, tokenizer, texts, [size[0]])[size[0]] for version in versions.values()]
    if (error := (rows[0] - rows[1]).abs().max()) > 1e-4:
        raise ValueError(f"{file}: its embeddings are off by {error:.1e}")
    for path, version in versions.items():
        found = sts and evaluate.sts(version, tokenizer, sts, [size], "float32")[0][0]["value"]
        print(f"  {path.name:18}{path.stat().st_size / 1e6:8.1f} MB" + (f"  Spearman {found:.4f}" if sts else ""))

def onnx_model(model, file):
    """ -> a model that encodes as `model` does, but with the ONNX file """
    import onnxruntime
    session, model = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), copy.copy(model)
    def forward(batch, layers):
        at = batch.text_ids, batch.position_ids                                                   # of tokens in (B, T)
        ids, mask = torch.zeros(2, len(batch.starts), batch.groups[-1][1], dtype=torch.long)      # (B, T) each
        ids[at], mask[at] = batch.input_ids, 1
        hidden, = session.run(None, {name: x.numpy() for name, x in zip(INPUTS, (ids, mask, 0 * ids))})   # (B, T, C)
        return dict.fromkeys(layers, torch.from_numpy(hidden)[at])                                # (N, C)
    model.forward = forward
    return model

def export(model, tokenizer, args):
    """ write a folder for each size that is asked for -> the folders """
    sizes = check_sizes(model.config.sizes if args.size == "all" else args.size, model.config)
    several = args.size == "all" or len(sizes) > 1
    folders = [Path(args.out, size_name(size).replace(":", "-") if several else "") for size in sizes]
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: something is there already; delete it, or name another folder")
    if args.onnx and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise ValueError("--onnx needs more packages: pip install onnx onnxruntime onnxscript")
    sts = evaluate.load_sts(args.sts) if args.sts else None
    smaller, its_tokenizer = model, tokenizer
    if args.vocab_size:
        texts = [text for _, text in load_passages(args.texts)]
        ids = np.concatenate(data.to_ids(texts, tokenizer, verbose=False))
        counts = np.bincount(ids, minlength=model.config.vocab_size)
        smaller, its_tokenizer = cut_vocabulary(model, tokenizer, counts, args.vocab_size)
        some = texts[::max(1, len(texts) // 1000)]   # a thousand texts show the cost
    for (layer, dim), folder in zip(sizes, folders):
        if (layer, dim) not in model.config.sizes:
            print(f"warning: {args.model} was not trained at {layer}:{dim}, which may be worse", file=sys.stderr)
        small = cut(smaller, (layer, dim))
        save_pretrained(small, its_tokenizer, folder)
        print(f"{layer}:{dim} is in {folder}: {(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB of float32")
        if args.vocab_size:
            prompt = model.config.passage_prompt
            before, after = (evaluate.embed_texts(*pair, some, [layer], prompt=prompt)[layer][:, :dim]
                             for pair in ((model, tokenizer), (small, its_tokenizer)))
            print(f"  {args.vocab_size:,} of {len(tokenizer):,} vocabulary entries: the mean cosine of a text's vector "
                  f"to that before is {F.cosine_similarity(before, after).mean():.3f}")
        if args.onnx:
            write_onnx(small, its_tokenizer, folder, sts)
    return folders

MADE_HERE = "<!-- written by tools/export.py, which replaces this file as long as this line stands -->"
CARD = """
# {name}

One BERT trained with [Starbucks](https://arxiv.org/abs/2410.13230) for use at several sizes. Pooling: {pooling}.
Similarity: {similarity}. Sizes (layers:dims): {sizes}.

```
{table}
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")   # the path of this folder, or OWNER/NAME on the hub
embeddings = model.encode(["a text", "another one"])
# at a smaller size of this model: keep its first layers, then its first numbers
model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:{layer}]
small = model.encode(["a text", "another one"], truncate_dim={dim})   # compare by {similarity}
```
"""

def write_card(folder, source):
    """ FOLDER/README.md, a model card as the hub reads it; one that the user wrote stays. source: the run's folder, for
    what the model was trained on, and for the results where FOLDER has none of its own """
    from huggingface_hub import EvalResult, ModelCardData
    card, config, run = folder / "README.md", read_json(folder / "config.json"), read_json(source / "args.json")
    if card.exists() and MADE_HERE not in card.read_text(encoding="utf-8"):
        return print(f"{card} stays as it is, because it was not written here")
    results, sizes = read_json(folder / "eval.json"), list(map(tuple, config["sizes"]))
    if not results and read_json(source / "config.json").get("vocab_size") == config["vocab_size"]:
        results = read_json(source / "eval.json")
    results = [r for r in results.get("results", []) if (r["layer"], r["dim"]) in sizes and r["task"] != "cost"]
    names = [name.split(":")[0] for name in (run.get("init_from", ""), *run.get("train_pairs", []))]
    # the hub rejects a card with names that are not its own
    hub = [name for name in names if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
           and name not in ("scratch", "docs") and not data.FILE.search(name)]
    about = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka", "starbucks"],
        base_model=[name for name in hub if name == names[0]] or None,
        datasets=list(dict.fromkeys(name for name in hub if name != names[0])) or None,
        model_name=folder.resolve().name if results else None,
        eval_results=[EvalResult("sentence-similarity", r["task"], r["task"], r["metric"], r["value"],
                                 metric_name=f"{r['metric']} at {r['layer']}:{r['dim']}") for r in results] or None)
    text = CARD.format(name=folder.resolve().name, pooling=config["pooling"], similarity=config["similarity"],
                       sizes=", ".join(map(size_name, sizes)), layer=sizes[0][0], dim=sizes[0][1],
                       table=evaluate.table(results, sizes) if results else "Not evaluated yet.")
    card.write_text(f"---\n{about.to_yaml()}\n---\n{MADE_HERE}\n{text}", encoding="utf-8")
    print(f"the card is in {card}")

def main(args):
    if not args.out and (args.size or args.vocab_size or args.onnx) or args.sts and not args.onnx:
        raise ValueError("--vocab_size and --onnx need SIZE and OUT, the new folder; --sts needs --onnx")
    model, tokenizer = load_model(args.model)
    for folder in export(model, tokenizer, args) if args.size else [Path(args.model)]:
        if Path(args.model, "args.json").exists():   # the card says: trained with Starbucks
            write_card(folder, Path(args.model))

def sizes_or_all(text):
    """ an argparse type """
    return text if text == "all" else parse_sizes(text)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder of finetune_srl.py, or any BERT")
parser.add_argument("size", nargs="?", metavar="SIZE", type=sizes_or_all, help="LAYER:DIM,LAYER:DIM,... or all")
parser.add_argument("out", nargs="?", metavar="OUT", help="the new folder; of several sizes the one above them")
parser.add_argument("--vocab_size", type=int, metavar="N", help="keep the N entries most frequent in --texts")
parser.add_argument("--texts", default="docs", metavar="PATH", help="as in tools.search; by default %(default)s")
parser.add_argument("--onnx", action="store_true", help="also OUT/onnx: model.onnx in float32, model_int8.onnx")
parser.add_argument("--sts", metavar="FILE", help="of --onnx: Spearman of both, on what evaluate.py --sts takes")

if __name__ == "__main__":
    run_script(main, parser.parse_args)
