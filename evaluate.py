"""
How good is each size, and what does it cost? One pass over the texts gives the embeddings of all sizes.

    python evaluate.py out/srl                                # retrieval on this machine's documentation, BM25 beside it
    python evaluate.py out/srl --search "invert a matrix"     # ask that documentation
    python evaluate.py out/srl --sizes 1:8 --split dev        # one size runs only its own layers

Prints a table and writes the same numbers to MODEL/eval.json, one record a value under "results":
{"task", "metric", "layer", "dim", "value", "n"}; the yardstick BM25 has layer and dim null.

Metrics are trec_eval's: recip_rank cut at 10, ndcg_cut_10 (linear gain), recall_100, averaged over the judged queries, ties
broken by document id. To come here: STS, other BEIR sets, comparison of models, figures.

Shapes: Q queries, P passages, C channels, D dims that a size keeps, K documents ranked for a query
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import check_sizes, find_folder, from_pretrained, pack, paper_sizes, parse_sizes, size_name

METRICS = ("MRR@10", "nDCG@10", "Recall@100")
NAMES = ("Demi", "Short", "Tall", "Grande", "Venti", "Trenta")
FORMATS = {"parameters": "{:,.0f}", "ms/query": "{:.1f}"}   # of the table; quality has three digits
K = 100   # the deepest cut-off of the metrics

# ----------------------------------------------------------------------------------------------------------------------
# embeddings


@torch.no_grad()
def encode(model, texts, layers, dtype="float32", batch_tokens=8192, desc="encoding"):
    """ list of B (T,) arrays of token ids -> {layer: (B, C) float32 on the CPU}. Sorted by length, about batch_tokens a batch. """
    device, training = model.word.weight.device, model.training
    model.eval()   # no dropout
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings = {layer: torch.empty(len(texts), model.config.hidden_size) for layer in layers}
    with tqdm(total=len(texts), desc=desc, unit=" texts", leave=False, disable=len(texts) < 1000) as bar:
        start = 0
        while start < len(order):
            # The longest text of a batch is its last: take as many as fit if all were as long as the one batch_tokens away.
            end = start + max(1, batch_tokens // len(texts[order[start]]))
            end = start + max(1, batch_tokens // len(texts[order[min(end, len(order)) - 1]]))
            rows = order[start:end]
            with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
                taps = model.encode(pack([texts[i] for i in rows], device), layers)
            for layer, tap in taps.items():
                embeddings[layer][rows] = tap.float().cpu()
            bar.update(len(rows))
            start = end
    model.train(training)
    return embeddings


def score(queries, passages, dim, similarity):
    """ (Q, C), (P, C) -> (Q, P): keep the first dim coordinates, then (for cosine) normalise, then multiply """
    q, p = queries[:, :dim], passages[:, :dim]
    if similarity == "cosine":
        q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
    return q @ p.T

# ----------------------------------------------------------------------------------------------------------------------
# retrieval


class Collection(NamedTuple):
    """ A BEIR set. qrels: {query id: {document id: grade}}, judged queries only; queries: their texts. """
    doc_ids: list
    docs: list
    queries: dict
    qrels: dict


def load_collection(name, split="test"):
    """ "docs" or a folder in BEIR layout -> Collection. Raises ValueError when something is missing. """
    folder = data.docs_folder() if name == "docs" else Path(name)
    def read(stem):
        paths = [path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.exists()]
        if not paths:
            raise ValueError(f"{folder} has no {stem}.jsonl; a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/{split}.tsv")
        return data.read_rows(str(paths[0]))
    corpus = read("corpus")
    texts = {str(row["_id"]): row["text"] for row in read("queries")}
    qrels = {}
    for row in data.read_rows(str(folder / "qrels" / f"{split}.tsv")):
        qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    return Collection([str(row["_id"]) for row in corpus], [f"{row.get('title') or ''} {row['text']}".strip() for row in corpus],
                      {query: texts[query] for query in qrels}, qrels)


def rank(scores, doc_ids):
    """ (P,) scores of one query -> the K best document ids; equal scores by descending id, which is what trec_eval does """
    top = np.argpartition(-scores, min(K, len(scores) - 1))[:K]
    worst = scores[top].min()
    top = np.flatnonzero(scores >= worst)   # with everything that ties with the last one
    return [doc_ids[i] for i in sorted(top, key=lambda i: (scores[i], doc_ids[i]), reverse=True)[:K]]


def mrr_at_10(ranked, grades):
    """ ranked document ids, {document id: grade} -> 1 / rank of the first relevant one among ten, else 0 """
    return next((1 / i for i, doc in enumerate(ranked[:10], start=1) if grades.get(doc, 0) > 0), 0.0)


def ndcg_at_10(ranked, grades):
    """ discounted gain of the first ten over that of the best possible ten; gain is the grade itself """
    discount = 1 / np.log2(np.arange(2, 12))
    gain = np.array([max(0, grades.get(doc, 0)) for doc in ranked[:10]])
    ideal = np.array(sorted((max(0, grade) for grade in grades.values()), reverse=True)[:10])
    return float(gain @ discount[:len(gain)] / max(ideal @ discount[:len(ideal)], 1e-12))


def recall_at_100(ranked, grades):
    """ share of the relevant documents that are among the first hundred """
    relevant = {doc for doc, grade in grades.items() if grade > 0}
    return len(relevant & set(ranked[:100])) / max(1, len(relevant))


def measure(scores, collection):
    """ (Q, P) scores -> {metric: mean over the queries} """
    values = []
    for row, grades in zip(scores, collection.qrels.values()):
        ranked = rank(row, collection.doc_ids)
        values.append((mrr_at_10(ranked, grades), ndcg_at_10(ranked, grades), recall_at_100(ranked, grades)))
    return dict(zip(METRICS, np.mean(values, axis=0).tolist()))


def bm25(docs, queries, k1=1.2, b=0.75):
    """ list of P texts, list of Q texts -> (Q, P) BM25 scores (Lucene's defaults; words are runs of letters or digits) """
    split = lambda text: re.findall(r"[^\W_]+", text.lower())   # at underscores too: names of functions become words
    words = [split(text) for text in docs]
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in words for word in text}))}
    def count(texts):
        pairs = [(row, vocabulary[word]) for row, text in enumerate(texts) for word in text if word in vocabulary]
        rows, columns = np.array(pairs).reshape(-1, 2).T
        return scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(vocabulary)))   # sums repeats
    tf = count(words)
    length = np.asarray(tf.sum(axis=1)).ravel()
    df = np.bincount(tf.indices, minlength=len(vocabulary))
    idf = np.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
    norm = np.repeat(k1 * (1 - b + b * length / length.mean()), np.diff(tf.indptr))   # of each entry's document
    tf.data = tf.data * (k1 + 1) / (tf.data + norm) * idf[tf.indices]
    return (count([split(text) for text in queries]) @ tf.T).toarray()


def retrieval(model, tokenizer, name, split, sizes, dtype):
    """ Search a collection with every size -> records """
    collection = load_collection(name, split)
    layers = sorted({layer for layer, _ in sizes})
    docs = encode(model, data.tokenize(collection.docs, tokenizer, tokenizer.model_max_length), layers, dtype)
    queries = encode(model, data.tokenize(list(collection.queries.values()), tokenizer, tokenizer.model_max_length), layers, dtype)
    records = []
    for layer, dim in sizes:
        scores = score(queries[layer], docs[layer], dim, model.config.similarity).numpy()
        for metric, value in measure(scores, collection).items():
            records.append({"task": Path(name).name, "metric": metric, "layer": layer, "dim": dim, "value": value, "n": len(scores)})
    return records

# ----------------------------------------------------------------------------------------------------------------------
# cost


def milliseconds_a_query(model, tokenizer, layer, dtype):
    """ median time to embed one query of ordinary length with `layer` blocks, tokenising included """
    times = []
    for _ in range(30):
        start = time.perf_counter()
        text = data.tokenize(["how do I invert a large sparse matrix"], tokenizer, tokenizer.model_max_length)
        encode(model, text, [layer], dtype)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)

# ----------------------------------------------------------------------------------------------------------------------
# search


def search(model, tokenizer, question, size, dtype, model_folder):
    """ Print the 5 docstrings that answer a question best. The embeddings of all are made once and kept beside the model. """
    layer, dim = size
    folder = data.docs_folder()
    rows = data.read_rows(str(folder / "train.jsonl")) + data.read_rows(str(folder / "corpus.jsonl"))
    index = model_folder / f"search-{folder.name}-{layer}-{dim}.npy"
    if index.exists() and index.stat().st_mtime > (model_folder / "config.json").stat().st_mtime:   # not of an earlier model
        docs = torch.from_numpy(np.load(index))
    else:
        texts = [f"{row['query']} {row.get('positive') or row.get('text')}" for row in rows]
        ids = data.tokenize(texts, tokenizer, tokenizer.model_max_length)
        docs = encode(model, ids, [layer], dtype, desc="embedding the documentation, once")[layer][:, :dim].contiguous()
        np.save(index, docs.numpy())
    query = encode(model, data.tokenize([question], tokenizer, tokenizer.model_max_length), [layer], dtype)[layer]
    scores = score(query, docs, dim, model.config.similarity)[0]
    for value, i in zip(*torch.topk(scores, min(5, len(rows)))):
        print(f"{value:.3f}  {rows[i]['name']}\n       {rows[i]['query'][:110]}")

# ----------------------------------------------------------------------------------------------------------------------


def git_commit():
    """ short hash of the code's commit, with + if files have changed since; "" outside a repository """
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def parse_args(argv=None):
    class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """ keep the docstring's line breaks and print every default """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("model", help="a folder that finetune_srl.py wrote, or any BERT: a folder or a name on the hub")
    parser.add_argument("--retrieval", default="docs", help="docs, or a folder in BEIR layout")
    parser.add_argument("--split", default="test", help="which qrels: test, dev or another file of the folder's qrels/")
    parser.add_argument("--sizes", type=parse_sizes, help="LAYER:DIM,... to evaluate; by default those the model was trained for")
    parser.add_argument("--search", metavar="QUESTION", help="answer from this machine's documentation instead, with the largest size")
    parser.add_argument("--out", help="JSON file for the results; by default MODEL/eval.json where MODEL is a folder of ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the matrix products")
    return parser.parse_args(argv)


def main(args):
    start = time.time()
    model = from_pretrained(args.model).to(args.device)
    tokenizer = data.load_tokenizer(args.model)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    sizes = check_sizes(args.sizes or model.config.sizes or paper_sizes(model.config), model.config, args.model)
    if args.search:
        return search(model, tokenizer, args.search, sizes[-1], args.dtype, find_folder(args.model))

    results = retrieval(model, tokenizer, args.retrieval, args.split, sizes, args.dtype)
    n = results[0]["n"]
    for layer, dim in sizes:
        results += [{"task": "cost", "metric": "parameters", "layer": layer, "dim": dim, "value": model.num_params(layer), "n": 1},
                    {"task": "cost", "metric": "ms/query", "layer": layer, "dim": dim,
                     "value": milliseconds_a_query(model, tokenizer, layer, args.dtype), "n": 30}]
    collection = load_collection(args.retrieval, args.split)
    for metric, value in measure(bm25(collection.docs, list(collection.queries.values())), collection).items():
        results.append({"task": Path(args.retrieval).name, "metric": metric, "layer": None, "dim": None, "value": value, "n": n})

    out = args.out or (Path(args.model) / "eval.json" if model.config.sizes and Path(args.model).exists() else None)
    if out:
        Path(out).write_text(json.dumps({"model": args.model, "commit": git_commit(), "torch": torch.__version__, "dtype": args.dtype,
                                         "seconds": time.time() - start, "command": sys.argv, "results": results}, indent=1) + "\n")
    print_table(results, f"{args.model} on {args.retrieval}, {n} {args.split} queries, {len(collection.docs):,} documents")


def print_table(results, title):
    """ one line a size, one column a metric """
    columns = list(dict.fromkeys(record["metric"] for record in results))
    rows = {}
    for record in results:
        rows.setdefault((record["layer"], record["dim"]), {})[record["metric"]] = record["value"]
    names = dict(zip(sorted(size for size in rows if size[0]), NAMES)) if len(rows) == len(NAMES) + 1 else {}
    print(f"\n{title}\n{'':16}" + "".join(f"{column:>12}" for column in columns))
    for size, values in rows.items():
        label = f"{names.get(size, 'size'):8}{size_name(size)}" if size[0] else "BM25"
        print(f"{label:16}" + "".join(f"{FORMATS.get(column, '{:.3f}').format(values[column]) if column in values else '':>12}"
                                      for column in columns))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:   # the user's mistakes: one line, no traceback
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
