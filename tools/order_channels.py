"""
Sort the channels of a BERT, so that the first dims say most: before a training that starts from a loaded model.

    python -m tools.order_channels MODEL out/ordered --sizes 1:32,3:128,6:384 --texts my_pairs.jsonl
    python finetune_srl.py --init_from out/ordered --teacher MODEL ...

The first dims of a BERT are arbitrary, and a size keeps the first. The sorted model is the same function at full width.
"""
import argparse
from pathlib import Path

import data
from evaluate import embed_texts
from model import check_sizes, load_model, parse_sizes, run_script, save_pretrained

def order_channels(model, tokenizer, texts, sizes):
    """ Sort the hidden channels, so that each size keeps those that matter at its layer: first the channels that vary
    most over the texts at the smallest size's layer, as many as it has dims, then the next size's """
    layers = sorted({layer for layer, _ in sizes})
    embeddings = embed_texts(model, tokenizer, texts, layers, prompt=model.config.query_prompt)
    order = []
    for layer, dim in sizes:
        variance = embeddings[layer].var(dim=0)                                         # (C,)
        variance[order] = -1                                                            # last: smaller sizes have them
        order += variance.argsort(descending=True)[:max(0, dim - len(order))].tolist()
    permute_channels(model, order + sorted(set(range(model.config.hidden_size)) - set(order)))

def permute_channels(model, order):
    """ Put the hidden channels in another order, in place. order: list of C channels. LayerNorm, the sums and all
    linear layers treat the channels alike, so the outputs are the same numbers in the new order. """
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in ("word", "position", "token_type"):
            parameter.data = parameter.data[:, order]
        elif kind not in ("query", "key", "value", "up"):   # what writes channels: a matrix's rows, a vector's entries
            parameter.data = parameter.data[order]
        elif parameter.dim() == 2:                          # what only reads them: a matrix's columns
            parameter.data = parameter.data[:, order]

def main(args):
    model, tokenizer = load_model(args.model)
    if Path(args.out).exists():
        raise ValueError(f"{args.out}: something is there already; delete it, or name another folder")
    pairs = data.load_pairs(args.texts, args.columns)
    sizes = check_sizes(args.sizes or model.config.sizes, model.config)
    order_channels(model, tokenizer, pairs[:1000]["query"], sizes)
    save_pretrained(model, tokenizer, args.out)
    print(f"{args.out}: {args.model} with its channels sorted for {len(sizes)} sizes")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder or hub name of a BERT")
parser.add_argument("out", help="the new folder")
parser.add_argument("--texts", default="docs", help="pairs as for --train_pairs; the first 1,000 queries count")
parser.add_argument("--columns", nargs="+", default=[], metavar="KIND=COLUMN", help="other names of the columns")
parser.add_argument("--sizes", type=parse_sizes, help="LAYER:DIM,... by default the model's own, or the paper's")

if __name__ == "__main__":
    run_script(main, parser.parse_args)
