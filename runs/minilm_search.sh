#!/usr/bin/env bash
# all-MiniLM-L6-v2 at six sizes for search: 250 steps of SRL on pairs of a query and a passage, in which every size follows
# the frozen MiniLM: a KL weight of 300, at a temperature of 0.5, which lets all passages count and not the best alone.
# SciFact's training queries are among the pairs; settings were chosen on the other four collections. On one core with
# bfloat16 a seed takes 20 minutes of training and 10 of evaluation.
#   runs/minilm_search.sh MODEL DATA
# MODEL: sentence-transformers/all-MiniLM-L6-v2 or its folder. DATA: a folder with the pairs named below (anchor, positive)
# and the collections in BEIR layout. What is done is skipped. Results: results/minilm-search.json,
# nDCG@10, and the figure minilm-search.svg, which needs matplotlib.
set -euo pipefail
model=$1 data=$(realpath "$2")
cd "$(dirname "$0")/.."
sizes=1:32,2:64,3:128,4:192,5:256,6:384 out=out/minilm-search
mkdir -p $out
[ -e $out/scifact-train.jsonl ] || python - "$data/retrieval/scifact" > $out/scifact-train.jsonl <<'PYTHON'
import json, sys
import evaluate
train = evaluate.Collection(f"{sys.argv[1]}:train")
passages = {key: text for ids, texts, _ in train.shards() for key, text in zip(ids, texts)}
for query, grades in train.qrels.items():
    for document, grade in grades.items():
        if grade > 0:
            print(json.dumps({"query": train.queries[query], "positive": passages[document]}))
PYTHON
sets=$(for name in scifact clapnq-dev cranfield pubmedqa-labeled qed-nq-dev; do echo "$data/retrieval/$name"; done)
[ -e $out/ordered ] || python -m tools.order_channels "$model" $out/ordered --sizes $sizes \
    --texts "$data/pairs/wikipedia-title-lead.jsonl.gz"
evaluate() {   # MODEL NAME SIZES
    [ -e $out/$2.json ] || python evaluate.py "$1" --sizes $3 --max_length 256 --dtype bfloat16 --out $out/$2.json --retrieval $sets
}
train() {      # NAME SEED FLAGS
    [ -e $out/$1/model.safetensors ] && [ ! -e $out/$1/training_state.pt ] ||
        python finetune_srl.py --init_from $out/ordered --teacher "$model" --kl_weight 300 --retrieval= --sizes $sizes \
            --train_pairs "$data"/pairs/{wikipedia-title-lead.jsonl.gz,medquad-qa.jsonl.gz,climate-fever-supports.jsonl} \
            $out/scifact-train.jsonl --learning_rate 2e-4 --temperature 0.5 --weight_decay 0.01 --query_max_length 64 \
            --passage_max_length 128 --max_length 128 --batch_size 64 --max_steps 250 --seed $2 --out_dir $out/$1 --overwrite "${@:3}"
    evaluate $out/$1 $1 $sizes
}
evaluate "$model" untouched $sizes
evaluate "$model" dims 6:32,6:64,6:128,6:192,6:256,6:384          # all layers, fewer dims
for seed in 1 2 3; do
    train $seed $seed
    train 2dmse-$seed $seed --method 2dmse
    [ -e $out/$seed/dev.json ] || python evaluate.py $out/$seed --sizes $sizes --max_length 128 --out $out/$seed/dev.json \
        --sts "$data"/sts/{stsb,sickr}-dev.jsonl                  # what it costs in sentence similarity
done
[ -e $out/funnel ] || {
python - $sets > $out/funnel.part <<'PYTHON'
# nDCG@10 where each size picks 100 passages and the full size ranks them: a line for each seed and set
import json, sys
import numpy as np
import evaluate
from model import load_model, named_sizes, shorten
from tools.search import funnel
for seed in ("1", "2", "3"):
    model, tokenizer = load_model(f"out/minilm-search/{seed}", max_length=256)
    sizes = list(named_sizes(model.config))
    for name in sys.argv[1:]:
        collection, found = evaluate.Collection(name), {}
        (ids, texts, own), = collection.shards()
        layers = [layer for layer, _ in sizes]
        queries, passages = (evaluate.embed_texts(model, tokenizer, some, layers, "bfloat16", prompt=kind) for kind, some in
                             (("query", list(collection.queries.values())), ("passage", texts)))
        for size in sizes:
            way = list(dict.fromkeys((size, sizes[-1])))
            q, p = ([shorten(rows[layer], dim, "cosine") for layer, dim in way] for rows in (queries, passages))
            scores, docs = funnel(q, p, 100)                                                 # (Q, 100) each
            for row, column in own.items():
                scores[row][docs[row] == column] = -np.inf
            ranked = evaluate.best_documents(scores, docs, ids)
            values = [evaluate.ndcg_at_10(best, grades) for (best, _), grades in zip(ranked, collection.qrels.values())]
            found[f"{size[0]}:{size[1]}"] = round(float(np.mean(values)), 4)
        print(json.dumps({"seed": seed, "task": collection.task, "nDCG@10": found}))
PYTHON
mv $out/funnel.part $out/funnel; }
python - <<'PYTHON'
import json
from pathlib import Path
import numpy as np
from evaluate import record
from tools.compare import load_results, plot

LABELS = {"srl": "SRL: one model", "2dmse": "2D Matryoshka", "untouched": "MiniLM, cut"}   # the figure
out, runs, figure = Path("out/minilm-search"), [], {}
for file in sorted(out.glob("*.json")):
    if file.stem.startswith("figure"):
        continue
    run, found = json.loads(file.read_text()), {}
    for r in run["results"]:
        if r["metric"] == "nDCG@10":
            found.setdefault(r["task"], {})[f"{r['layer']}:{r['dim']}" if r["layer"] else "BM25"] = round(r["value"], 4)
            name = "srl" if file.stem in "123" else file.stem.split("-")[0]                  # seeds are averaged
            figure.setdefault(name, {}).setdefault((r["layer"], r["dim"]), []).append(r["value"])
    runs.append({"run": file.stem, "commit": run["commit"], "dtype": run["dtype"], "nDCG@10": found})
    for task, values in found.items():
        print(f"{file.stem:10} {task:18}", *(f"{size} {value:.4f}" for size, value in values.items()))
    shape = [r for r in run["results"] if r["metric"] == "MFLOP/token"]
funnel = list(map(json.loads, (out / "funnel").read_text().splitlines()))
Path("results/minilm-search.json").write_text(json.dumps({"runs": runs, "funnel": funnel}, indent=1) + "\n")
for name in LABELS:   # means over the five collections and the seeds
    records = [record("five collections", "nDCG@10", size, float(np.mean(values)), len(values))
               for size, values in figure[name].items()]
    (out / f"figure-{name}.json").write_text(
        json.dumps({"model": name, "results": records + shape, "per_item": {"five collections": {"-": {}}}}))
plot([load_results(f"{label}={out}/figure-{name}.json") for name, label in LABELS.items()], "results/minilm-search.svg", ["nDCG@10"])
PYTHON
