#!/usr/bin/env bash
# all-MiniLM-L6-v2 at six sizes for search: 250 steps of SRL and of 2D Matryoshka on pairs of a query and a passage. Every
# size follows the frozen MiniLM: a KL weight of 300, at a temperature of 0.5, which lets all passages count and not the
# best alone. SciFact's training queries are among the pairs; settings were chosen on the other four collections. On one
# core with bfloat16 a run takes 20 minutes and its evaluation 5 to 10: three hours for three seeds, less on two cores.
#   runs/minilm_search.sh MODEL DATA
# MODEL: sentence-transformers/all-MiniLM-L6-v2 or its folder. DATA: a folder with the pairs named below (anchor, positive)
# and the collections in BEIR layout. What is done is skipped. Writes results/minilm-search.json, nDCG@10, and the figure
# minilm-search.svg, which needs matplotlib.
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
    [ -e $out/$1/model.safetensors ] && [ ! -e $out/$1/training_state.pt ] || { rm -rf $out/$1
        python finetune_srl.py --init_from $out/ordered --teacher "$model" --kl_weight 300 --sizes $sizes \
            --train_pairs "$data"/pairs/{wikipedia-title-lead.jsonl.gz,medquad-qa.jsonl.gz,climate-fever-supports.jsonl} \
            $out/scifact-train.jsonl --learning_rate 2e-4 --temperature 0.5 --weight_decay 0.01 --query_max_length 64 \
            --passage_max_length 128 --max_length 128 --batch_size 64 --max_steps 250 --seed $2 --out_dir $out/$1 "${@:3}"; }
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
[ -e $out/funnel ] || { python - $sets > $out/funnel.part <<'PYTHON'
# nDCG@10 where each size picks 100 passages and the full size ranks them: a line for each seed and set; then that of BM25
import json, sys
import numpy as np
import evaluate
from model import load_model, shorten
from tools.bm25 import match_words
from tools.search import funnel
def ndcg(collection, size, rankings):
    return round(next(r["value"] for r in evaluate.measure(collection, size, rankings)[0] if r["metric"] == "nDCG@10"), 4)

collections = [evaluate.Collection(name) for name in sys.argv[1:]]
for seed in ("1", "2", "3"):
    model, tokenizer = load_model(f"out/minilm-search/{seed}", max_length=256)
    sizes = model.config.sizes
    for collection in collections:
        (ids, texts, own), = collection.shards()
        asked = ((list(collection.queries.values()), model.config.query_prompt), (texts, model.config.passage_prompt))
        embeddings = [evaluate.embed_texts(model, tokenizer, some, [layer for layer, _ in sizes], "bfloat16", prompt)
                      for some, prompt in asked]
        found = {}
        for size in sizes:
            way = dict.fromkeys((size, sizes[-1]))
            scores, docs = funnel(*([shorten(rows[layer], dim, "cosine") for layer, dim in way] for rows in embeddings), 100)
            for row, column in own.items():   # scores and docs: (Q, 100)
                scores[row][docs[row] == column] = -np.inf
            found[f"{size[0]}:{size[1]}"] = ndcg(collection, size, evaluate.best_documents(scores, docs, ids))
        print(json.dumps({"seed": seed, "task": collection.task, "nDCG@10": found}))
print(json.dumps({c.task: {"BM25": ndcg(c, (None, None), match_words(c))} for c in collections}))
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
            found.setdefault(r["task"], {})[f"{r['layer']}:{r['dim']}"] = round(r["value"], 4)
            name = "srl" if file.stem in "123" else file.stem.split("-")[0]                  # seeds are averaged
            figure.setdefault(name, {}).setdefault((r["layer"], r["dim"]), []).append(r["value"])
    runs.append({"run": file.stem, "commit": run["commit"], "dtype": run["dtype"], "nDCG@10": found})
    for task, values in found.items():
        print(f"{file.stem:10} {task:18}", *(f"{size} {value:.4f}" for size, value in values.items()))
    shape = [r for r in run["results"] if r["metric"] == "MFLOP/token"]
*funnel, bm25 = map(json.loads, (out / "funnel").read_text().splitlines())
runs.append({"run": "BM25", "nDCG@10": bm25})
Path("results/minilm-search.json").write_text(json.dumps({"runs": runs, "funnel": funnel}, indent=1) + "\n")
for name in LABELS:   # means over the five collections and the seeds
    records = [record("five collections", "nDCG@10", size, float(np.mean(values)), len(values))
               for size, values in figure[name].items()]
    (out / f"figure-{name}.json").write_text(
        json.dumps({"model": name, "results": records + shape, "per_item": {"five collections": {"-": {}}}}))
plot([load_results(f"{label}={out}/figure-{name}.json") for name, label in LABELS.items()], "results/minilm-search.svg",
     ["nDCG@10"], [f"BM25={100 * np.mean([values['BM25'] for values in bm25.values()]):.1f}"])
PYTHON
