"""
A size of a model as a folder of its own, for sentence-transformers and transformers, with a model card.

    python -m tools.export out/srl 2:16 out/small        # 2 layers, 16 dims (for transformers zeros beyond)
    python -m tools.export out/srl all out/sizes         # a folder for each size, or for those of 1:8,3:32
    python -m tools.export out/srl 2:16 out/tiny --vocab_size 4000 --texts my_folder
    python -m tools.export out/srl                       # no folder: only the card of out/srl itself

Most of a small size's weight is its vocabulary. --vocab_size keeps the entries that are most frequent in --texts.
"""
import argparse, copy, re, sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from evaluate import embed_texts
from model import (check_sizes, find_folder, load_model, named_sizes, parse_sizes, read_json, run_script,
                   save_pretrained, size_name)
from tools.search import load_passages

def cut(model, size):
    """ -> the model of one size alone: its layers, and a last LayerNorm that gives 0 beyond its dims. Zeros change no
    cosine and no dot product, so programs that normalise before they slice, or never slice, are right as well. """
    layer, dim = size
    small = copy.deepcopy(model)
    small.config.sizes = (size,)
    small.config.num_hidden_layers = layer
    del small.blocks[layer:]
    last = small.blocks[-1].norm2
    last.weight.data[dim:] = 0
    last.bias.data[dim:] = 0
    return small.eval()

def cut_vocabulary(model, tokenizer, counts, vocab_size):
    """ Keep vocab_size pieces of WordPiece: the special tokens, the single characters, which can spell any word, and
    those with the highest counts (V,) -> model, tokenizer, whose ids keep their order """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    must = np.array([piece in tokenizer.all_special_tokens or len(piece.removeprefix("##")) == 1 for piece in pieces])
    if not must.sum() <= vocab_size <= len(pieces):
        raise ValueError(f"--vocab_size {vocab_size}: {must.sum()} special tokens and single characters must stay, and "
                         f"there are {len(pieces)} entries; give a number between")
    kept = np.sort(np.lexsort((-counts, ~must))[:vocab_size]).tolist()   # equal counts: the lower id stays
    model = copy.deepcopy(model)
    model.word = torch.nn.Embedding.from_pretrained(model.word.weight[kept], freeze=False)
    model.config.vocab_size = vocab_size
    vocab = {"vocab": {pieces[old]: new for new, old in enumerate(kept)}, "added_tokens_decoder": {}}
    smaller = type(tokenizer)(**tokenizer.init_kwargs | vocab)
    smaller.backend_tokenizer.normalizer = tokenizer.backend_tokenizer.normalizer
    smaller.model_max_length, model.config.pad_token_id = tokenizer.model_max_length, smaller.pad_token_id
    return model, smaller

def export(model, tokenizer, args):
    """ write a folder for each size that is asked for -> the folders """
    known = named_sizes(model.config)
    sizes = check_sizes(known if args.size == "all" else parse_sizes(args.size), model.config)
    several = args.size == "all" or len(sizes) > 1
    folders = [Path(args.out, size_name(size).replace(":", "-") if several else "") for size in sizes]
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: something is there already; delete it, or name another folder")
    smaller, its_tokenizer = model, tokenizer
    if args.vocab_size:
        texts = [text for _, text in load_passages(args.texts)]
        ids = np.concatenate(data.tokenize(texts, tokenizer, 10**6))
        counts = np.bincount(ids, minlength=len(tokenizer))
        smaller, its_tokenizer = cut_vocabulary(model, tokenizer, counts, args.vocab_size)
        texts = texts[::max(1, len(texts) // 1000)]   # a thousand of them show the cost
    for (layer, dim), folder in zip(sizes, folders):
        if model.config.sizes and (layer, dim) not in known:
            print(f"warning: {args.model} was not trained at {layer}:{dim}, which may be worse", file=sys.stderr)
        save_pretrained(cut(smaller, (layer, dim)), its_tokenizer, folder)
        megabytes = (folder / "model.safetensors").stat().st_size / 1e6
        print(f"{layer}:{dim} is in {folder}: {megabytes:.1f} MB of float32")
        if args.vocab_size:
            before = embed_texts(model, tokenizer, texts, [layer])[layer][:, :dim]             # (texts, D)
            after = embed_texts(smaller, its_tokenizer, texts, [layer])[layer][:, :dim]
            print(f"  {args.vocab_size:,} of {len(tokenizer):,} vocabulary entries: the mean cosine of a text's vector "
                  f"to that before is {F.cosine_similarity(before, after).mean():.3f}")
    return folders

MADE_HERE = "<!-- written by tools/export.py, which replaces this file as long as this line stands -->"
CARD = """
# {name}

One BERT trained with [Starbucks](https://arxiv.org/abs/2410.13230) for use at several sizes. Pooling: {pooling}.
Similarity: {similarity}. Sizes (layers:dims): {sizes}.

{table}

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
    names = [run.get("init_from", ""), *run.get("train_pairs", [])]
    # the hub rejects a card with names that are not its own
    hub = [name.split(":")[0] for name in names if re.match(r"[\w.-]+/[\w.-]+(:|$)", name)
           and not Path(name.split(":")[0]).exists()]
    about = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka", "starbucks"],
        base_model=[name for name in hub if names[0] == name] or None,
        datasets=[name for name in hub if names[0] != name] or None,
        model_name=folder.resolve().name if results else None,
        eval_results=[EvalResult("sentence-similarity", r["task"], r["task"], r["metric"], r["value"],
                                 metric_name=f"{r['metric']} at {r['layer']}:{r['dim']}") for r in results] or None)
    table = "\n".join(["| layers:dims | task | metric | value |", "|---|---|---|---|"] + [
        f"| {r['layer']}:{r['dim']} | {r['task']} | {r['metric']} | {r['value']:.4f} |" for r in results])
    text = CARD.format(name=folder.resolve().name, pooling=config["pooling"], similarity=config["similarity"],
                       sizes=", ".join(map(size_name, sizes)), table=table if results else "Not evaluated yet.",
                       layer=sizes[0][0], dim=sizes[0][1])
    card.write_text(f"---\n{about.to_yaml()}\n---\n{MADE_HERE}\n{text}", encoding="utf-8")
    print(f"the card is in {card}")

def parse_args(argv=None):
    """ command line -> args """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of finetune_srl.py, or any BERT")
    parser.add_argument("size", nargs="?", metavar="SIZE", help="LAYER:DIM, several with commas between, or all")
    parser.add_argument("out", nargs="?", metavar="OUT", help="the new folder; of several sizes the one above them")
    parser.add_argument("--vocab_size", type=int, metavar="N", help="keep the N entries most frequent in --texts")
    parser.add_argument("--texts", default="docs", metavar="PATH", help="as in tools.search; by default %(default)s")
    args = parser.parse_args(argv)
    if args.size and not args.out:
        parser.error(f"SIZE {args.size}: add the folder OUT")
    return args

def main(args):
    model, tokenizer = load_model(args.model)
    for folder in export(model, tokenizer, args) if args.size else [Path(args.model)]:
        if model.config.sizes:   # the card says: trained with Starbucks
            write_card(folder, find_folder(args.model))

if __name__ == "__main__":
    run_script(main, parse_args)
