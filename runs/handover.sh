#!/usr/bin/env bash
# What a trained MiniLM weighs and costs when it is handed over, beside what one would take instead. On one core, 1.5 hours.
#   runs/handover.sh MODEL DATA MINILM
# MODEL: a run of runs/minilm_study.sh, say out/minilm/srl-6e4-1. DATA: its data, and retrieval/scifact in BEIR layout.
# MINILM: all-MiniLM-L6-v2 or its folder. Needs onnx, onnxruntime, onnxscript and sentence-transformers beside requirements.txt.
set -euo pipefail
model=$(realpath "$1") data=$(realpath "$2") minilm=$(realpath "$3")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/handover
mkdir -p $out
tests=$(for name in stsb-test sts12 sts14 sts16; do echo "$data/sts/$name.jsonl"; done)
[ -e $out/six ] || python -m tools.export "$model" all $out/six
zcat -f "$data"/pairs/nli-*.jsonl* | head -100000 > $out/text.jsonl || true   # head closes the pipe
python - $out/text.jsonl <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
texts = dict.fromkeys(text for row in rows for key, text in row.items() if isinstance(text, str))
open(sys.argv[1].replace("jsonl", "txt"), "w").write("\n\n".join(texts))
PYTHON
# a vocabulary counted on the training texts, in ONNX, too; what it costs on the STS development set
[ -e $out/words ] || python -m tools.export $out/six/1-32 1:32 $out/words --vocab_size 10000 --texts $out/text.txt \
    --onnx --sts "$data/sts/stsb-test.jsonl"
for folder in $out/six/1-32 $out/words; do
    python evaluate.py $folder --sts "$data/sts/stsb-dev.jsonl" --out $folder/dev.json
done
python - $out "$data" "$minilm" "$model" $tests <<'PYTHON'
# everything else: sentence-transformers alone against our embeddings, tables, funnel, queries of layer 1
import json, sys, time
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
import evaluate
from model import Bert, load_model, new_config, save_pretrained, shorten, size_name
from tools.search import funnel
out, data, minilm, run, *tests = sys.argv[1:]
SIZES, C, found = ((1, 32), (2, 64), (3, 128), (4, 192), (5, 256), (6, 384)), 384, {}
tests = [evaluate.load_sts(test) for test in tests]

def add(kind, **row):
    found.setdefault(kind, []).append({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()})
    print(kind, found[kind][-1], flush=True)
def milliseconds(function, n):   # median of n calls: function(0), function(1), ...
    seconds = []
    for i in range(n):
        start = time.perf_counter()
        function(i)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds))

model, tokenizer = load_model(run)
_, first, second, gold = tests[0]
for layer, dim in SIZES:
    theirs = SentenceTransformer(f"{out}/six/{layer}-{dim}", device="cpu")
    both = []   # of sentence-transformers, then ours: (pairs, D) of the first sentences, and of the second
    for embed in (lambda texts: F.normalize(torch.from_numpy(theirs.encode(texts)), dim=-1),
                  lambda texts: shorten(evaluate.embed_texts(model, tokenizer, texts, [layer])[layer], dim, "cosine")):
        both.append((embed(first), embed(second)))
    a, b = (evaluate.spearman((x * y).sum(-1).numpy(), gold) for x, y in both)
    gap = (both[0][0] - both[1][0]).abs().max().item()
    add("sentence-transformers", **{"size": f"{layer}:{dim}", "largest difference": gap, "theirs": a, "ours": b})

scifact = evaluate.Collection(f"{data}/retrieval/scifact")
for label, name, sizes in (("export", run, SIZES), ("MiniLM, first layers", minilm, tuple((n, C) for n in range(7))),
                           ("MiniLM, cut", minilm, SIZES[:-1])):
    model, tokenizer = load_model(name, max_length=256)
    values, _ = evaluate.retrieval(model, tokenizer, scifact, sizes, "float32")
    tokenizer.model_max_length = 128
    records = [r for test in tests for r in evaluate.sts(model, tokenizer, test, sizes, "float32")[0]]
    records += values + evaluate.cost(model, sizes) + evaluate.speed(model, tokenizer, sizes, "float32")
    for size in sizes:
        def mean(metric):
            return float(np.mean([r["value"] for r in records if (r["layer"], r["dim"], r["metric"]) == (*size, metric)]))
        add("table", **{"model": label, "size": size_name(size), "MB": 4 * mean("parameters") / 1e6,
                        "ms/query": mean("ms/query"), "texts/s": mean("texts/s"), "STS": mean("Spearman"),
                        "SciFact nDCG@10": mean("nDCG@10")})

model, tokenizer = load_model(run, max_length=256)
for collection in (scifact, evaluate.Collection("docs")):
    (ids, texts, _), = collection.shards()
    queries, passages = (evaluate.embed_texts(model, tokenizer, some, list(range(1, 7)), prompt=kind)
                         for kind, some in (("query", list(collection.queries.values())), ("passage", texts)))
    def ndcg(scores, docs):
        rankings = evaluate.best_documents(scores, docs, ids)
        return float(np.mean([evaluate.ndcg_at_10(ranked, grades)
                              for (ranked, _), grades in zip(rankings, collection.qrels.values())]))
    for size in SIZES:
        way = list(dict.fromkeys((size, SIZES[-1])))
        q, p = ([shorten(rows[layer], dim, "cosine") for layer, dim in way] for rows in (queries, passages))
        ms = milliseconds(lambda i: funnel([x[i:i + 1] for x in q], p, 10), 100)   # a query at a time, as a user asks
        add("funnel", **{"task": collection.task, "passages": len(ids), "shortlist by": size_name(size),
                         "nDCG@10": ndcg(*funnel(q, p, 100)), "search ms": ms})
    for dim in (64, 384):
        for layer in (1, 3, 6):
            scores = shorten(queries[layer], dim, "cosine") @ shorten(passages[6], dim, "cosine").T
            add("query layer", **{"task": collection.task, "queries": f"{layer}:{dim}", "passages": f"6:{dim}",
                                  "nDCG@10": ndcg(*scores.topk(min(100, len(ids))))})
big = {"1:32": torch.randn(1_000_000, 32), "6:384": F.normalize(torch.randn(1_000_000, C), dim=-1)}   # a large index
for way in (["1:32", "6:384"], ["6:384"]):
    p = [big[size] for size in way]
    add("funnel", **{"task": "random", "passages": 1_000_000, "shortlist by": way[0],
                     "search ms": milliseconds(lambda i: funnel([x[i:i + 1] for x in p], p, 10), 20)})
Path("results/handover.json").write_text(json.dumps(found, indent=1) + "\n")
# the smallest size at BERT-base's shape, random weights: megabytes alone count
torch.manual_seed(1)
_, tokenizer = load_model(f"{out}/words")
save_pretrained(Bert(new_config(num_hidden_layers=2, vocab_size=len(tokenizer), sizes=((2, 32),))), tokenizer, f"{out}/base")
PYTHON
python -m tools.export $out/base 2:32 $out/base-2-32 --onnx --sts "$data/sts/stsb-test.jsonl"
