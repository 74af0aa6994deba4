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
[ -e $out/six ] || python evaluate.py "$model" --export all $out/six
zcat -f "$data"/pairs/nli-*.jsonl* | head -100000 > $out/text.jsonl
python - $out/text.jsonl <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
texts = dict.fromkeys(text for row in rows for key, text in row.items() if isinstance(text, str))
open(sys.argv[1].replace("jsonl", "txt"), "w").write("\n\n".join(texts))
PYTHON
# the vocabulary counted on the training texts; what it costs on the STS development set
[ -e $out/words ] || python evaluate.py $out/six/1-32 --export 1:32 $out/words --vocab_size 10000 --texts $out/text.txt \
    --sts "$data/sts/stsb-dev.jsonl"
[ -e $out/words/onnx ] || python tests/to_onnx.py $out/words "$data/sts/stsb-test.jsonl"
python - $out "$data" "$minilm" "$model" $tests <<'PYTHON'
# everything else: sentence-transformers alone against our embeddings, tables, funnel, queries of layer 1
import json, sys, time, zlib
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
sys.path.insert(0, ".")
import data, evaluate
from model import Bert, BertConfig, load_model, save_pretrained
out, folder, minilm, run, *tests = sys.argv[1:]
SIZES, C, found = ((1, 32), (2, 64), (3, 128), (4, 192), (5, 256), (6, 384)), 384, {}
torch.set_num_threads(1)

def sts_of(embed, name):   # embed: list of texts -> (B, D), of unit length
    task, first, second, gold = data.load_sts(name)
    cosine = (embed(first) * embed(second)).sum(-1)
    return evaluate.spearman(cosine.numpy(), gold)

from sentence_transformers import SentenceTransformer
model, tokenizer = load_model(run)
found["sentence-transformers"] = []
for layer, dim in SIZES:
    theirs = SentenceTransformer(f"{out}/six/{layer}-{dim}", device="cpu")
    def mine(texts):
        return F.normalize(evaluate.embed_texts(model, tokenizer, texts, [layer])[layer][:, :dim], dim=-1)
    texts = data.load_sts(tests[0])[1]
    gap = (torch.from_numpy(theirs.encode(texts)) - mine(texts)).abs().max().item()
    a, b = sts_of(lambda texts: torch.from_numpy(theirs.encode(texts)), tests[0]), sts_of(mine, tests[0])
    found["sentence-transformers"].append({"size": f"{layer}:{dim}", "largest difference": gap, "theirs": a, "ours": b})
    print(found["sentence-transformers"][-1], flush=True)

found["table"] = []
scifact = f"{folder}/retrieval/scifact"
for label, name, sizes in (("export", run, SIZES), ("MiniLM, first layers", minilm, tuple((n, C) for n in range(7))),
                           ("MiniLM, cut", minilm, SIZES[:-1])):
    model, tokenizer = load_model(name, max_length=256)
    values, _ = evaluate.retrieval(model, tokenizer, scifact, sizes, "float32", embeddings_dir=f"{out}/embeddings")
    tokenizer.model_max_length = 128
    records = [r for test in tests for r in evaluate.sts(model, tokenizer, test, sizes, "float32")[0]]
    timed = evaluate.speed(model, tokenizer, sizes, "float32")
    for size in sizes:
        def mean(rows, metric):
            return float(np.mean([r["value"] for r in rows if (r["layer"], r["dim"], r["metric"]) == (*size, metric)]))
        found["table"].append({"model": label, "size": f"{size[0]}:{size[1]}", "MB": 4 * mean(evaluate.cost(model, sizes), "parameters") / 1e6,
                               "ms/query": mean(timed, "ms/query"), "texts/s": mean(timed, "texts/s"),
                               "STS": mean(records, "Spearman"), "SciFact nDCG@10": mean(values, "nDCG@10")})
        print(found["table"][-1], flush=True)

found["funnel"], found["query layer"] = [], []
model, tokenizer = load_model(run, max_length=256)
for task in (scifact, "docs"):
    collection = data.Collection(task)
    (ids, texts), = collection.shards()
    queries = evaluate.embed_texts(model, tokenizer, list(collection.queries.values()), list(range(1, 7)))
    about = f"{evaluate.made_by(model, tokenizer, 'float32')}-{zlib.crc32(repr(texts).encode()):08x}"
    passages = evaluate.load_or_embed(f"{out}/embeddings/{collection.task}-0000-{about}", dict(SIZES), texts,   # as above
                                      lambda texts: evaluate.embed_texts(model, tokenizer, texts, list(range(1, 7))))
    def ndcg(scores, docs):
        rankings = evaluate.best_documents(scores.numpy(), docs.numpy(), ids)
        return float(np.mean([evaluate.ndcg_at_10(ranked, grades)
                              for (ranked, _), grades in zip(rankings, collection.qrels.values())]))
    def unit(x, dim):
        return F.normalize(x[:, :dim], dim=-1)
    q, p = ({size: unit(x[size[0]], size[1]) for size in SIZES} for x in (queries, passages))
    for size in SIZES:
        way = [size, SIZES[-1]] if size != SIZES[-1] else [size]
        seconds = []
        for row in range(100):   # a query at a time, as a user asks
            start = time.perf_counter()
            evaluate.funnel([q[s][row:row + 1] for s in way], [p[s] for s in way], 10)
            seconds.append(time.perf_counter() - start)
        value = ndcg(*evaluate.funnel([q[s] for s in way], [p[s] for s in way], 100))
        found["funnel"].append({"task": collection.task, "passages": len(ids), "shortlist by": f"{size[0]}:{size[1]}",
                                "nDCG@10": value, "search ms": 1000 * float(np.median(seconds))})
        print(found["funnel"][-1], flush=True)
    for dim in (64, 384):
        for layer in (1, 3, 6):
            scores = unit(queries[layer], dim) @ unit(passages[6], dim).T
            found["query layer"].append({"task": collection.task, "queries": f"{layer}:{dim}", "passages": f"6:{dim}",
                                         "nDCG@10": ndcg(*scores.topk(100))})
            print(found["query layer"][-1], flush=True)
big = torch.randn(2, 1_000_000, 32), F.normalize(torch.randn(1_000_000, 384), dim=-1)   # what the funnel saves in a large index
for way in ([(1, 32), (6, 384)], [(6, 384)]):
    p = {(1, 32): big[0][0], (6, 384): big[1]}
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        evaluate.funnel([p[s][:1] for s in way], [p[s] for s in way], 10)
        seconds.append(time.perf_counter() - start)
    found["funnel"].append({"task": "random", "passages": 1_000_000, "shortlist by": f"{way[0][0]}:{way[0][1]}",
                            "search ms": 1000 * float(np.median(seconds))})
    print(found["funnel"][-1], flush=True)
def rounded(x):
    return float(f"{x:.4g}") if isinstance(x, float) else x
Path("results/handover.json").write_text(json.dumps(
    {key: [{k: rounded(v) for k, v in row.items()} for row in rows] for key, rows in found.items()}, indent=1) + "\n")
# the smallest size at BERT-base's shape, random weights: megabytes alone count
torch.manual_seed(1)
_, tokenizer = load_model(f"{out}/words")
base = Bert(BertConfig(num_hidden_layers=2, vocab_size=len(tokenizer), sizes=((2, 32),), size_names=("Demi",)))
save_pretrained(base, tokenizer, f"{out}/base")
PYTHON
python tests/to_onnx.py $out/base "$data/sts/stsb-test.jsonl"
