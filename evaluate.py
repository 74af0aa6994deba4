"""
How good is each size of a model, and what does it cost? One pass over the texts gives the embeddings of all sizes.

    python evaluate.py out/srl                  # retrieval in the documentation of this machine
    python evaluate.py out/srl --sts stsb sts12 my_pairs.jsonl --retrieval scifact my_beir_folder:dev
    python evaluate.py sentence-transformers/all-MiniLM-L6-v2 --sts stsb --grid     # any BERT, layers x dims

Prints a table and writes its values to --out, or to MODEL/eval.json if that folder has sizes of its own. STS is
Spearman's correlation of the cosine; retrieval is exact, shard by shard. Letters for shapes: see model.py, and K
documents kept for a query; P are the passages of a shard.
"""
import argparse, functools, json, subprocess, sys, time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas
import scipy   # its parts load when they are first used: scipy.stats alone takes most of a second
import torch
from datasets import Value
from tqdm import tqdm

from data import FILE, as_score, as_texts, check_texts, docs_folder, load_pairs, make_table, read_rows, to_ids
from model import (POOLINGS, SIMILARITIES, SIZES, HelpFormatter, check_sizes, load_model, pack, parse_sizes,
                   read_json, run_script, score, shorten, size_name)

# ---- embeddings ----------------------------------------------------
BATCH_TOKENS = 8192

@torch.no_grad()
def embed_ids(model, token_ids, layers, dtype="float32"):
    """ list of B (T,) token ids -> {layer: (B, C) float32 on the CPU} """
    B, device, training = len(token_ids), next(model.parameters()).device, model.training
    model.eval()   # no dropout, also in the middle of a training
    embeddings = {layer: torch.empty(B, model.config.hidden_size) for layer in layers}
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        for rows in tqdm(batches_by_length(token_ids), "encoding", leave=False, disable=None):
            batch = pack([token_ids[i] for i in rows], device)   # rows: numbers of texts
            for layer, pooled in model.encode(batch, layers).items():   # (B of the batch, C)
                if not pooled.isfinite().all():
                    raise FloatingPointError(f"layer {layer} gave embeddings that are not finite; try --dtype float32")
                embeddings[layer][rows] = pooled.float().cpu()
    model.train(training)
    return embeddings

def batches_by_length(token_ids):
    """ list of (T,) ids -> arrays of their numbers, short texts first, each with about BATCH_TOKENS tokens """
    lengths = np.array([len(ids) for ids in token_ids])
    order = lengths.argsort(kind="stable")
    batch = lengths[order].cumsum() // BATCH_TOKENS   # number of each text's batch
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1)

def embed_texts(model, tokenizer, texts, layers, dtype="float32", prompt=""):
    """ list of B strings, what goes before each -> {layer: (B, C) float32 on the CPU} """
    ids = to_ids([prompt + text for text in texts], tokenizer, truncation=True, max_length=tokenizer.model_max_length)
    return embed_ids(model, ids, layers, dtype)

# ---- metrics -------------------------------------------------------
def spearman(x, y):
    """ (n,), (n,) -> Spearman's rank correlation, ties at their mean rank; 0 where all of x or all of y are equal """
    return float(scipy.stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0

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

# name -> function of the 100 best document ids of a query, best first, and of {document id: grade}
METRICS = {"MRR@10": mrr_at_10, "nDCG@10": ndcg_at_10, "Recall@100": recall_at_100}

def record(task, metric, size, value, n):
    """ one value as it stands in eval.json: of a task with n queries or pairs """
    return {"task": task, "metric": metric, "layer": size[0], "dim": size[1], "value": value, "n": n}

# ---- similarity of sentences: STS ----------------------------------
STS = {f"sts{year}": f"mteb/sts{year}-sts" for year in range(12, 17)}
STS |= {"stsb": "sentence-transformers/stsb", "sickr": "mteb/sickr-sts"}

def task_name(name):
    """ "folder/scifact:dev" -> "scifact:dev"; "folder/sts12.jsonl.gz" -> "sts12" """
    return FILE.sub("", Path(name).name or Path(name).resolve().name)   # of "." too

def load_sts(name, columns=()):
    """ a name in STS or of the hub (its test split), or a file with sentence1, sentence2, score -> task, first
    sentences, second sentences, (pairs,) gold scores """
    pairs = load_pairs(STS.get(name, name), columns, split="test")
    if "score" not in pairs.column_names:
        raise ValueError(f"{name}: needs the columns sentence1, sentence2 and score")
    return task_name(name), pairs["query"][:], [texts[0] for texts in pairs["positive"]], np.array(pairs["score"])

def check_spread(name, scores):
    """ warn if all scores are nearly equal, because the model tells no two texts apart then """
    if scores.numel() > 2 and scores.max() - scores.min() < 1e-3:
        print(f"warning: {name}: all scores are within 0.001 of each other; has a training failed?", file=sys.stderr)

def sts(model, tokenizer, pairs, sizes, dtype):
    """ every size on the pairs of load_sts -> records, per-item values (cosines of the pairs) """
    task, first, second, gold = pairs
    embeddings = embed_texts(model, tokenizer, first + second, {layer for layer, _ in sizes}, dtype)
    records, per_item = [], {"gold": gold.tolist()}
    for layer, dim in sizes:
        x = shorten(embeddings[layer], dim, "cosine")           # (n + n, D)
        cosine = (x[:len(first)] * x[len(first):]).sum(-1)      # (n,)
        check_spread(f"{task} at {size_name((layer, dim))}", cosine)
        records.append(record(task, "Spearman", (layer, dim), spearman(cosine.numpy(), gold), len(gold)))
        per_item[size_name((layer, dim))] = {"Spearman": cosine.tolist()}
    return records, per_item

# ---- retrieval: Collection -> search_corpus -> best_documents -> METRICS -> records ----
SHARD = 25_000   # documents in memory at a time
K = 200   # documents kept for a query: 100 for the metrics, the others are room for equal scores

class Collection:
    """ NAME[:SPLIT], split "test" by default. NAME: docs; a folder in BEIR layout; a BEIR set of the hub (scifact,
    msmarco, whose test is DL19, ...). BEIR layout: corpus.jsonl {"_id", "text", maybe "title"}, queries.jsonl {"_id",
    "text"}, qrels/SPLIT.tsv with the header query-id, corpus-id, score; each maybe .gz.
    task; queries {id: text} and qrels {query id: {document id: grade}} of the judged queries; shards(). """
    def __init__(self, name, split=None):   # split: in place of the one in the name
        self.task, is_folder = task_name(name), Path(name).is_dir()   # C:\data is a folder and no NAME:SPLIT
        name, _, named = (name, "", "") if is_folder else name.partition(":")
        split = split or named or "test"
        folder = docs_folder() if name == "docs" else Path(name)
        if folder.is_dir():
            files = [folder / file for file in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")]
            corpus, queries, judgements = (str(file) if file.exists() else f"{file}.gz" for file in files)
        else:   # the hub has the judgements in a set of their own, and calls dev validation
            corpus, queries = f"BeIR/{name}:corpus:corpus", f"BeIR/{name}:queries:queries"   # NAME:CONFIG:SPLIT
            judgements = f"BeIR/{name}-qrels::{'validation' if split == 'dev' else split}"
        def as_document(row):
            title, text = (" ".join(as_texts(cell)) for cell in (row.get("title"), row["text"]))
            return {"_id": str(row["_id"]), "title": title, "text": text}
        features = dict.fromkeys(["_id", "title", "text"], Value("string"))
        self.corpus = make_table(corpus, functools.partial(read_rows, corpus, as_document), features)
        rows = [(row["_id"], row["text"]) for row in read_rows(queries, as_document)]
        documents, texts = set(self.corpus["_id"]), dict(rows)
        for file, different, count in ((corpus, documents, len(self.corpus)), (queries, texts, len(rows))):
            if len(different) < count:
                raise ValueError(f"{file}: two rows have one _id")
        self.qrels = read_qrels(judgements, texts, documents)
        self.queries = {query: texts[query] for query in self.qrels}   # in the order of qrels, which measure needs

    def shards(self):
        """ yields ([id], [title + text], own) of SHARD documents at a time. own {row of a query: column of a document}:
        in ArguAna queries are documents, too, and a document is no answer to itself unless it is judged as one. """
        row_of = {query: row for row, query in enumerate(self.queries)}
        for rows in self.corpus.iter(SHARD):
            ids, texts = rows["_id"], [f"{title} {text}".strip() for title, text in zip(rows["title"], rows["text"])]
            own = {row_of[key]: column for column, key in enumerate(ids) if key in row_of
                   and self.queries[key] in (texts[column], rows["text"][column]) and self.qrels[key].get(key, 0) <= 0}
            yield ids, texts, own

def read_qrels(source, queries, documents):
    """ a table of judgements, the ids that there are -> {query id: {document id: grade}}. As in trec_eval a document
    that is not there counts as one that is not found. """
    def as_judgement(row):
        return str(row["query-id"]), str(row["corpus-id"]), as_score(row["score"])
    qrels, odd = {}, Counter()   # odd {kind: how often}; True counts as 1
    for query, document, grade in read_rows(source, as_judgement):
        grades = qrels.setdefault(query, {})
        if document in grades and grades[document] != grade:
            raise ValueError(f"{source}: query {query}, document {document} have two grades")
        odd.update({"of unknown queries (left out)": query not in queries, "there twice": document in grades,
                    "of unknown documents (not found)": document not in documents})
        grades[document] = grade
    if odd.total():
        counts = [f"{kind}: {count:,}" for kind, count in odd.items() if count]
        print(f"{source}: judgements {', '.join(counts)}")
    qrels = {query: grades for query, grades in qrels.items() if query in queries}
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise ValueError(f"{source}: no relevant document of a query that is there")
    return qrels

def retrieval(model, tokenizer, collection, sizes, dtype):
    """ a Collection -> records, per-item values, of every size """
    records, per_item = [], {"ids": list(collection.queries)}
    for size, rankings in search_corpus(model, tokenizer, collection, sizes, dtype).items():
        size_records, per_item[size_name(size)] = measure(collection, size, rankings)
        records += size_records
    return records, per_item

def measure(collection, size, rankings):
    """ rankings of search_corpus at a size -> records, {metric: [value of each query]} """
    ranked = [[document for _, document in hits] for hits in rankings]
    values = {name: [metric(documents, grades) for documents, grades in zip(ranked, collection.qrels.values())]
              for name, metric in METRICS.items()}
    return [record(collection.task, name, size, float(np.mean(v)), len(v)) for name, v in values.items()], values

def search_corpus(model, tokenizer, collection, sizes, dtype):
    """ exact search, one shard of the corpus after the other -> {size: of each query the 100 best [(score, document
    id)], best first} """
    Q, layers = len(collection.queries), sorted({layer for layer, _ in sizes})
    queries = embed_texts(model, tokenizer, list(collection.queries.values()), layers, dtype,
                          model.config.query_prompt)
    best_scores = {size: torch.full((Q, K), -np.inf) for size in sizes}         # -inf: no document yet
    best_docs = {size: torch.zeros(Q, K, dtype=torch.long) for size in sizes}   # numbers of doc_ids
    doc_ids, dropped = [], 0
    for ids, texts, own in collection.shards():
        passages = embed_texts(model, tokenizer, texts, layers, dtype, model.config.passage_prompt)   # {layer: (P, C)}
        for layer, dim in sizes:
            scores = score(queries[layer], passages[layer], dim, model.config.similarity)   # (Q, P)
            if not doc_ids:   # the first shard
                check_spread(f"{collection.task} at {layer}:{dim}", scores)
            scores[list(own), list(own.values())] = -np.inf
            new_scores, columns = scores.topk(min(K, len(ids)))                             # (Q, K), or (Q, P) if P < K
            new_scores = torch.cat([best_scores[layer, dim], new_scores], dim=1)            # (Q, K + K), or K + P
            new_docs = torch.cat([best_docs[layer, dim], len(doc_ids) + columns], dim=1)    # (Q, K + K), or K + P
            best_scores[layer, dim], kept = new_scores.topk(K)                              # (Q, K)
            best_docs[layer, dim] = new_docs.gather(1, kept)                                # (Q, K)
        doc_ids += ids
        dropped += len(own)
    if dropped:
        print(f"{collection.task}: of {dropped:,} queries, which are documents, too, the document itself is left out")
    return {size: best_documents(best_scores[size], best_docs[size], doc_ids) for size in sizes}

def best_documents(scores, docs, doc_ids):
    """ scores (Q, K), docs (Q, K), which are numbers of doc_ids -> [[(score, document id), best first] of each query]:
    the 100 best but for scores of -inf, which are no document; equal scores by descending id, as in trec_eval """
    hits_of_queries = ([(value, doc_ids[i]) for value, i in zip(values, numbers) if value > -np.inf]
                       for values, numbers in zip(scores.tolist(), docs.tolist()))
    return [sorted(hits, reverse=True)[:100] for hits in hits_of_queries]   # by score, then by id

# ---- cost ----------------------------------------------------------
def cost(model, sizes):
    """ -> records: parameters, bytes of a float32 vector, arithmetic of the blocks' matrices (2 FLOP an entry) """
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())
    embeddings = sum(map(count, (model.word, model.position, model.token_type, model.embedding_norm)))
    matrices = sum(parameter.numel() for parameter in model.blocks[0].parameters() if parameter.dim() == 2)
    return [record("cost", metric, (layer, dim), value, 1) for layer, dim in sizes for metric, value in (
            ("parameters", embeddings + count(model.blocks[:layer])), ("bytes", 4 * dim),
            ("MFLOP/token", 2 * matrices * layer / 1e6))]

# ---- all tests at all sizes ----------------------------------------
def main(args):
    """ tests, model, sizes, values, table. The values go to a file:
      "results": [{"task": "docs", "metric": "MRR@10", "layer": 1, "dim": 8, "value": 0.135, "n": 1000}, ...]
      "per_item": {"docs": {"ids": [of the queries], "1:8": {"MRR@10": [one value a query], ...}, ...},
                   "stsb": {"gold": [scores], "1:8": {"Spearman": [one cosine a pair]}, ...}} """
    # tests and model: all is read before the first is evaluated, so a mistake in the last shows at once
    sts_sets = [load_sts(name, args.columns) for name in args.sts]
    collections = [Collection(name) for name in args.retrieval or ([] if args.sts else ["docs"])]
    model, tokenizer = load_model(args.model, args.device, args.max_length, pooling=args.pooling,
                                  similarity=args.similarity, query_prompt=args.query_prompt,
                                  passage_prompt=args.passage_prompt)
    longest = tokenizer.model_max_length
    for task, first, second, _ in sts_sets:
        check_texts(task, first + second, tokenizer, longest)
    for collection in collections:
        queries, documents = list(collection.queries.values())[:1000], next(collection.shards())[1][:1000]
        check_texts(f"{collection.task}, first queries", queries, tokenizer, longest, model.config.query_prompt)
        check_texts(f"{collection.task}, first documents", documents, tokenizer, longest, model.config.passage_prompt)
    start = time.time()
    sizes = check_sizes(args.sizes or model.config.sizes, model.config)
    if args.grid:
        sizes = list(product(range(1, model.config.num_hidden_layers + 1), sorted({dim for _, dim in sizes})))
    is_ours = read_json(Path(args.model, "config.json")).get("sizes")
    out = args.out or (Path(args.model, "eval.json") if is_ours else None)
    if out and not Path(out).resolve().parent.is_dir():   # says it now, not after minutes
        raise ValueError(f"--out {out}: there is no such folder")

    results, per_item = [], {}
    for pairs in sts_sets:
        records, per_item[pairs[0]] = sts(model, tokenizer, pairs, sizes, args.dtype)
        results += records
    for collection in collections:
        records, per_item[collection.task] = retrieval(model, tokenizer, collection, sizes, args.dtype)
        results += records
    results += cost(model, sizes)

    if out:
        git = subprocess.run("git describe --always --exclude='*' --dirty=+", shell=True, cwd=Path(__file__).parent,
                             capture_output=True, text=True)   # "" without git
        run = vars(args) | {"commit": git.stdout.strip(), "torch": torch.__version__, "seconds": time.time() - start,
                            "command": sys.argv, "results": results, "per_item": per_item}
        Path(out).write_text(json.dumps(run, allow_nan=False) + "\n")
    print(f"\n{args.model}, {args.dtype}, {time.time() - start:.0f} s" + (f", written to {out}" if out else ""))
    print(table(results, model.config.sizes))

def table(results, sizes):
    """ records, the sizes of the model, which have names if they are six -> a line for each size, a column for each
    task and metric """
    names = dict(zip(sizes, (name for name, *_ in SIZES))) if len(sizes) == len(SIZES) else {}
    frame = pandas.DataFrame(results, dtype=object)
    frame["size"] = [f"{names.get(size, ''):7} {size_name(size)}".strip() for size in zip(frame["layer"], frame["dim"])]
    frame = frame.astype({"value": float}).pivot_table("value", "size", ["task", "metric"], sort=False)
    frame = frame.rename_axis(index=None, columns=[None, None])
    return frame.to_string(na_rep="", float_format=lambda v: f"{v:.4f}" if v < 2 else f"{v:,.1f}".removesuffix(".0"))

# ---- flags ---------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a folder of finetune_srl.py, or any BERT")
    add = parser.add_argument_group("tasks; with none: --retrieval docs").add_argument
    add("--sts", nargs="+", default=[], metavar="NAME_OR_FILE",
        help=f"{', '.join(STS)}, or a file with sentence1, sentence2, score")
    add("--retrieval", nargs="+", default=[], metavar="NAME[:SPLIT]", help="docs, a BEIR folder, or a hub BEIR set")
    add("--columns", nargs="+", default=[], metavar="KIND=COLUMN", help="of --sts: sentence1=a sentence2=b score=label")
    add = parser.add_argument_group("sizes").add_argument
    add("--sizes", type=parse_sizes, help="LAYER:DIM,... by default the model's own, else the paper's in proportion")
    add("--grid", action="store_true", help="every layer at the dims of all sizes")
    add = parser.add_argument_group("encoding").add_argument
    add("--query_prompt", help="goes before every query of --retrieval, as 'query: '; by default the model's own")
    add("--passage_prompt", help="goes before every document; sentences of --sts have no prompt")
    add("--max_length", type=int, help="tokens of a text; by default the model's own")
    add("--pooling", choices=POOLINGS, help="of the tokens; by default the model's own, else mean")
    add("--similarity", choices=SIMILARITIES, help="of query and document; by default the model's own, else cosine")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1, mps")
    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="FILE.json", help="by default MODEL/eval.json if that is a folder of ours, else no file")
    args = parser.parse_args(argv)
    names = [task_name(task) for task in args.sts + args.retrieval]
    if len(set(names)) < len(names):
        parser.error(f"two tasks of {', '.join(names)} have the same name; evaluate them one by one")
    return args

if __name__ == "__main__":
    run_script(main, parse_args)
