"""
Split pairs of your own into some to train on and a test set for evaluate.py.

    python -m tools.hold_out faq.csv out/faq --n 100 --columns query=question positive=answer
    python finetune_srl.py --train_pairs out/faq/train.jsonl --retrieval out/faq ...

OUT is a folder in BEIR layout: corpus.jsonl (the positives of the test rows), queries.jsonl, qrels/test.tsv, and beside
them train.jsonl. A row is not trained on if its query or a positive of it is a query of the test set, whatever the case
and punctuation. A passage of the test set may be: a new question may have a known answer.
"""
import argparse, json
from pathlib import Path

import numpy as np

import data
from model import run_script
from tools.docs import fold, write_beir

def main(args):
    pairs, out = data.load_pairs(args.pairs, args.columns), Path(args.out)
    if out.exists():
        raise ValueError(f"{out}: something is there already; delete it, or name another folder")
    if "score" in pairs.column_names:
        raise ValueError(f"{args.pairs}: these are scored pairs; give a part of the file to evaluate.py --sts")
    drawn = np.sort(np.random.default_rng(args.seed).permutation(len(pairs))[:args.n])
    test = [(row["query"], text) for row in pairs.select(drawn) for text in row["positive"]]
    queries, corpus = {fold(query): query for query, _ in test}, {fold(text): text for _, text in test}
    kept = [row for row in pairs if not {fold(row["query"]), *map(fold, row["positive"])} & queries.keys()]
    if min(len(drawn), len(kept)) < 2:
        raise ValueError(f"--n {args.n}: leaves {len(kept)} of {len(pairs)} pairs; both sides need 2 or more")
    ids = {key: number for number, key in enumerate(queries | corpus)}
    write_beir(out, [{"_id": f"d{ids[key]}", "text": text} for key, text in corpus.items()],
               [{"_id": f"q{ids[key]}", "text": text} for key, text in queries.items()],
               {"test": dict.fromkeys((f"q{ids[fold(query)]}", f"d{ids[fold(text)]}") for query, text in test)})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    (out / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(drawn):,} pairs to test on, {len(kept):,} of the others to train on")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pairs", help="what finetune_srl.py --train_pairs takes")
parser.add_argument("out", help="the new folder")
parser.add_argument("--n", type=int, default=100, help="rows to test on; by default %(default)s")
parser.add_argument("--columns", nargs="+", default=[], metavar="KIND=COLUMN", help="other names of the columns")
parser.add_argument("--seed", type=int, default=0)

if __name__ == "__main__":
    run_script(main, parser.parse_args)
