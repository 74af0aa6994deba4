#!/usr/bin/env bash
# all-MiniLM-L6-v2 at six sizes for search: 250 steps of SRL on pairs of a query and a passage, in which every size follows
# the frozen MiniLM: a KL weight of 300, at a temperature of 0.5, which lets all passages count and not the best alone.
# SciFact's training queries are among the pairs; settings were chosen on the other four collections. On one core with
# bfloat16 a seed takes 20 minutes of training and 10 of evaluation.
#   runs/minilm_search.sh MODEL DATA
# MODEL: sentence-transformers/all-MiniLM-L6-v2 or its folder. DATA: a folder with the pairs named below (anchor, positive)
# and the collections in BEIR layout. What is done is skipped. Results: results/minilm-search.json, nDCG@10.
set -euo pipefail
model=$1 data=$(realpath "$2")
cd "$(dirname "$0")/.."
sizes=1:32,2:64,3:128,4:192,5:256,6:384 out=out/minilm-search
mkdir -p $out
[ -e $out/scifact-train.jsonl ] || python - "$data/retrieval/scifact" > $out/scifact-train.jsonl <<'PYTHON'
import json, sys
import data
train = data.Collection(f"{sys.argv[1]}:train")
passages = {key: text for ids, texts in train.shards() for key, text in zip(ids, texts)}
for query, grades in train.qrels.items():
    for document, grade in grades.items():
        if grade > 0:
            print(json.dumps({"query": train.queries[query], "positive": passages[document]}))
PYTHON
evaluate() {   # MODEL NAME
    [ -e $out/$2.json ] || python evaluate.py "$1" --sizes $sizes --max_length 256 --dtype bfloat16 --out $out/$2.json \
        --retrieval "$data"/retrieval/{scifact,clapnq-dev,cranfield,pubmedqa-labeled,qed-nq-dev}
}
evaluate "$model" untouched
for seed in 1 2 3; do
    [ -e $out/$seed/model.safetensors ] && [ ! -e $out/$seed/training_state.pt ] ||
        python finetune_srl.py --init_from "$model" --teacher "$model" --order_channels --kl_weight 300 --retrieval= --sizes $sizes \
            --train_pairs "$data"/pairs/{wikipedia-title-lead.jsonl.gz,medquad-qa.jsonl.gz,climate-fever-supports.jsonl} \
            $out/scifact-train.jsonl --learning_rate 2e-4 --temperature 0.5 --weight_decay 0.01 --query_max_length 64 \
            --passage_max_length 128 --max_length 128 --batch_size 64 --max_steps 250 --seed $seed --out_dir $out/$seed --overwrite
    evaluate $out/$seed $seed
    [ -e $out/$seed/dev.json ] || python evaluate.py $out/$seed --sizes $sizes --max_length 128 --out $out/$seed/dev.json \
        --sts "$data"/sts/{stsb,sickr}-dev.jsonl                  # what it costs in sentence similarity
done
python - <<'PYTHON'
import json
from pathlib import Path
runs = []
for file in sorted(Path("out/minilm-search").glob("*.json")):
    run, found = json.loads(file.read_text()), {}
    for r in run["results"]:
        if r["metric"] == "nDCG@10":
            found.setdefault(r["task"], {})[f"{r['layer']}:{r['dim']}" if r["layer"] else "BM25"] = round(r["value"], 4)
    runs.append({"run": file.stem, "commit": run["commit"], "dtype": run["dtype"], "nDCG@10": found})
    for task, values in found.items():
        print(f"{file.stem:10} {task:18}", *(f"{size} {value:.4f}" for size, value in values.items()))
Path("results/minilm-search.json").write_text(json.dumps(runs, indent=1) + "\n")
PYTHON
