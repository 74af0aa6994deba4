#!/usr/bin/env bash
# The README's table and figure of similarity: all-MiniLM-L6-v2, which has one size, gets six. SRL, 2D Matryoshka, a model
# per size, and the untouched model, cut to fewer layers or to fewer dims alone; each on the same pairs in the same order.
#   runs/minilm_study.sh MODEL DATA [PART]
# MODEL: sentence-transformers/all-MiniLM-L6-v2 or its folder. DATA: a folder with pairs/nli-*.jsonl[.gz], whose rows have
# anchor, positive and negative, and sts/{stsb-dev,sickr-dev,stsb-test,sts12,sts14,sts16}.jsonl (sentence1, sentence2, score).
# PART, with the minutes that it took on one core with bfloat16 (less on two); without a part all, one after the other:
#   short    100 steps, three seeds, a learning rate chosen on dev for each way, also SRL without KL: 57
#   1, 2, 3  920 steps with ordered channels and a frozen teacher, SRL and 2D Matryoshka, of this seed; with 1 also SRL
#            without ordered channels and teacher: 84, 72, 65
#   alone    920 steps of a model per size, seed 1: 186, other work included
#   table    the untouched model; then results/minilm.json, one record a run, and minilm.svg (needs matplotlib)
# What is done is skipped.
set -euo pipefail
model=$1 data=$(realpath "$2") part=${3:-all}
cd "$(dirname "$0")/.."
sizes=1:32,2:64,3:128,4:192,5:256,6:384
dev="$data/sts/stsb-dev.jsonl $data/sts/sickr-dev.jsonl"
tests=$(for name in stsb-test sts12 sts14 sts16; do echo "$data/sts/$name.jsonl"; done)
mkdir -p out/minilm
zcat -f "$data"/pairs/nli-*.jsonl* | grep '"negative"' > out/minilm/nli.jsonl   # 29,464 triplets

wants() { case $part in short|[123]|alone|table) [ $part = $1 ] ;; esac; }
evaluate() {   # FOLDER SIZES OUT SETS...: one evaluation, unless it is there
    [ -e "$3" ] || python evaluate.py "$1" --sizes "$2" --max_length 128 --out "$3" --sts "${@:4}"
}
train() {      # NAME SEED RATE SIZES FLAGS...
    local out=out/minilm/$1-$3-$2
    [ -e $out/model.safetensors ] && [ ! -e $out/training_state.pt ] || { rm -rf $out
        python finetune_srl.py --init_from "$model" --train_pairs out/minilm/nli.jsonl --sizes $4 --learning_rate $3 \
            --temperature 0.05 --weight_decay 0.01 --query_max_length 64 --passage_max_length 64 --max_length 128 \
            --batch_size 64 --max_steps 100 --seed $2 --out_dir $out "${@:5}"; }
    evaluate $out $4 $out/dev.json $dev
    [ $3 = 3e-4 ] || evaluate $out $4 $out/test.json $tests
}
longer() {     # NAME SEED SIZES FLAGS...: from MiniLM with its channels ordered for these sizes
    local ordered=out/minilm/ordered-${3//[:,]/-}
    [ -e $ordered ] || python -m tools.order_channels "$model" $ordered --sizes $3 --texts out/minilm/nli.jsonl
    train $1 $2 5e-4 $3 --max_steps 920 --teacher "$model" --init_from $ordered --kl_weight 3 "${@:4}"
}
if wants short; then   # the rate, 3e-4 or 6e-4, was chosen with seed 1 by the mean of the two dev sets: 6e-4 for every way
    for seed in 1 2 3; do
        for rate in 6e-4 $([ $seed != 1 ] || echo 3e-4); do
            train srl $seed $rate $sizes
            train 2dmse $seed $rate $sizes --method 2dmse
            train alone1 $seed $rate 1:32
            train alone3 $seed $rate 3:128
        done
        for size in 2:64 4:192 5:256 6:384; do
            train alone${size%:*} $seed 6e-4 $size
        done
        train nokl $seed 6e-4 $sizes --kl_weight 0
    done
fi
for seed in 1 2 3; do
    if wants $seed; then
        longer best $seed $sizes
        longer best2dmse $seed $sizes --method 2dmse
    fi
done
if wants 1; then
    train bestplain 1 5e-4 $sizes --max_steps 920
fi
if wants alone; then
    for size in ${sizes//,/ }; do
        longer bestalone${size%:*} 1 $size
    done
fi
wants table || exit 0
evaluate "$model" $sizes out/minilm/cut.json $tests
evaluate "$model" 6:32,6:64,6:128,6:192,6:256,6:384 out/minilm/dims.json $tests
# Does the full size still find documents? Seed 1 and the untouched model, on a BEIR set that neither was trained on.
for name in srl-6e-4-1 best-5e-4-1 untouched; do
    folder=out/minilm/$name; [ $name != untouched ] || folder=$model
    [ -e out/minilm/scifact-$name.json ] || python evaluate.py "$folder" --sizes $sizes --max_length 256 \
        --retrieval "$data/retrieval/scifact" --out out/minilm/scifact-$name.json
done
python - <<'PYTHON'
# The mean over seeds and sets, its standard deviation over seeds, and whether the difference from SRL, after as many
# steps, is more than chance: a paired bootstrap over the sentence pairs of each set, the same pairs for every run.
import json
from pathlib import Path
import numpy as np
from scipy.stats import norm, rankdata
from tools.compare import load_results, plot

LABELS = {"best": "SRL: one model", "best2dmse": "2D Matryoshka", "cut": "MiniLM, cut",
          "bestalone": "six models, one per size"}   # the figure
out, rows = Path("out/minilm"), {}
def draws(run, size):   # -> (1001,) means over the sets: of all pairs, then of 1,000 samples of them
    found = []
    for name, items in run["per_item"].items():
        n = len(items["gold"])
        if name not in rows:
            rows[name] = np.vstack([np.arange(n), np.random.default_rng(0).integers(n, size=(1000, n))])
        a, b = (rankdata(np.array(values)[rows[name]], axis=1) for values in (items[size]["Spearman"], items["gold"]))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        found.append((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))
    return np.mean(found, axis=0)

values, runs = {}, []   # values {method: {size: [draws of each seed]}}
for file in sorted(out.glob("*-?e-4-?/test.json")) + [out / "dims.json", out / "cut.json"]:
    run, name = json.loads(file.read_text()), file.parent.name if file.parent != out else file.stem
    method = name.split("-")[0].rstrip("123456")
    sizes = [size for size in list(run["per_item"].values())[0] if ":" in size]
    for size in sizes if name != "dims" else []:   # SRL has no sizes of all layers and fewer dims
        values.setdefault(method, {}).setdefault(size, []).append(draws(run, size))
    log = file.parent / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    minutes = np.mean([r["ms"] for r in records if "ms" in r]) * records[-1]["step"] / 60_000 if records else 0   # of training
    runs.append({"run": name, "commit": run["commit"], "minutes": round(float(minutes), 1),
                 "results": [r for r in run["results"] if r["metric"] == "Spearman"]})
table, shape = [], [r for r in run["results"] if r["metric"] == "MFLOP/token"]
for method, sizes in values.items():
    records = []
    for size, found in sizes.items():
        srl = values["best" if method.startswith(("best", "cut")) else "srl"][size]
        difference = np.mean(found, axis=0) - np.mean(srl[:len(found)], axis=0)   # of the same seeds
        spread = difference[1:].std()
        p = 2 * norm.sf(abs(difference[0]) / spread) if spread > 0 else 1.0
        each = [x[0] for x in found]
        layer, dim = map(int, size.split(":"))
        records.append({"task": "STS", "metric": "Spearman", "layer": layer, "dim": dim, "value": float(np.mean(each)), "n": 4})
        table.append({"method": method, "size": size, "mean": round(float(np.mean(each)), 4), "seeds": len(each),
                      "std": round(float(np.std(each, ddof=1)), 4) if len(each) > 1 else None, "p against SRL": float(p)})
    about = {"model": method, "results": records + shape, "per_item": {"STS": {"-": {}}}}
    (out / f"figure-{method}.json").write_text(json.dumps(about))
Path("results/minilm.json").write_text(json.dumps({"table": table, "runs": runs}, indent=1) + "\n")
for method in values:
    print(f"{method:8}", *(f"{r['size']} {r['mean']:.4f}{'*' if r['p against SRL'] < 0.05 / 42 else ' '}"
                           for r in table if r["method"] == method))
figures = [load_results(f"{label}={out}/figure-{method}.json") for method, label in LABELS.items()]
plot(figures, "results/minilm.svg", ["Spearman"], [])
PYTHON
