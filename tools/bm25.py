"""
What does word matching find? BM25 on test sets of evaluate.py --retrieval, and TREC runs of it and of a model.

    python -m tools.bm25 docs my_beir_folder:dev
    python -m tools.bm25 docs --runs out/runs --model out/srl

A TREC run is a file FOLDER/TASK-SIZE.run, one line a hit: query, Q0, document, rank, score, label.
"""
import argparse, re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import evaluate
from model import load_model, run_script, size_name

def bm25(texts, queries, k1=1.2, b=0.75):
    """ list of P texts, list of Q texts -> (Q, P) BM25 scores (Lucene's defaults; words: letters or digits): the sum
    over the words of the query of  idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length)) """
    def count_words(text):
        return Counter(re.findall(r"[^\W_]+", text.lower()))   # at underscores too: names of functions become words
    found = {}                                                              # {word: {text: how often it has the word}}
    lengths = np.zeros(len(texts))                                          # (P,) in words
    for i, words in enumerate(map(count_words, texts)):
        lengths[i] = words.total()
        for word, tf in words.items():
            found.setdefault(word, {})[i] = tf
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))           # (P,)
    scores = np.zeros((len(queries), len(texts)))
    for row, words in zip(scores, map(count_words, queries)):
        for word in sorted(words.keys() & found.keys()):
            docs, tf = (np.array(list(values)) for values in (found[word], found[word].values()))   # (texts with it,)
            idf = np.log(1 + (len(texts) - len(docs) + 0.5) / (len(docs) + 0.5))
            row[docs] += words[word] * idf * tf * (k1 + 1) / (tf + norm[docs])
    return scores

def match_words(collection):
    """ a Collection -> rankings, as those of evaluate.search_corpus, but by BM25; all documents are in memory """
    shards = list(collection.shards())
    doc_ids, texts = [key for ids, _, _ in shards for key in ids], [text for _, texts, _ in shards for text in texts]
    scores = torch.from_numpy(bm25(texts, list(collection.queries.values())))   # (Q, P)
    scores[scores == 0] = -np.inf                                               # not a word in common: not found
    for number, (_, _, own) in enumerate(shards):
        scores[list(own), [number * evaluate.SHARD + column for column in own.values()]] = -np.inf
    return evaluate.best_documents(*scores.topk(min(evaluate.K, len(texts))), doc_ids)

def write_run(folder, label, queries, rankings):
    """ FOLDER/LABEL.run """
    lines = [f"{query} Q0 {document} {i} {value:.9g} {label}\n" for query, hits in zip(queries, rankings)
             for i, (value, document) in enumerate(hits, start=1)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{label}.run").write_text("".join(lines), encoding="utf-8")

def main(args):
    if args.model and not args.runs:
        raise ValueError("--model is for --runs; evaluate.py prints its values")
    collections = [evaluate.Collection(name) for name in args.retrieval]
    model, tokenizer = load_model(args.model) if args.model else (None, None)
    for collection in collections:
        rankings = {"BM25": match_words(collection)}
        records, _ = evaluate.measure(collection, (None, None), rankings["BM25"])
        print(f"BM25 on {collection.task}: " + ", ".join(f"{r['metric']} {r['value']:.4f}" for r in records))
        if model:
            found = evaluate.search_corpus(model, tokenizer, collection, model.config.sizes, "float32")
            rankings |= {size_name(size): hits for size, hits in found.items()}
        for label, hits in rankings.items() if args.runs else ():
            write_run(args.runs, f"{collection.task}-{label}".replace(":", "-"), collection.queries, hits)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("retrieval", nargs="+", metavar="NAME[:SPLIT]", help="what evaluate.py --retrieval takes")
parser.add_argument("--runs", metavar="FOLDER", help="write TREC runs there")
parser.add_argument("--model", help="of --runs: a model, at all its sizes")

if __name__ == "__main__":
    run_script(main, parser.parse_args)
