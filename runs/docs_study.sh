#!/usr/bin/env bash
# Five ways to six sizes from random weights, on docs: SRL; SRL without KL; 2D Matryoshka; a model per size; the full-size
# model, cut. Three seeds, 200 steps as in the quick start, each run on the same pairs in the same order. It took 80 minutes
# on two cores with bfloat16, two runs at a time. What is done is skipped. Writes results/docs-study.json and prints its
# table: MRR@10 of the 1,000 test queries, mean and standard deviation over seeds, and the difference from SRL with its 95 %
# interval (paired over queries).
set -euo pipefail
cd "$(dirname "$0")/.."
sizes=1:8,2:16,3:32,4:64,5:128,6:160
train() {      # NAME SEED FLAGS...: one run; its eval.json has the test queries
    local out=out/docs-study/$1-$2
    [ -e $out/eval.json ] || { rm -rf $out
        python finetune_srl.py --max_steps 200 --seed $2 --out_dir $out "${@:3}"; }
}
for seed in 1 2 3; do
    train srl $seed
    train nokl $seed --kl_weight 0
    train 2dmse $seed --method 2dmse
    for size in ${sizes//,/ }; do
        train alone${size%:*} $seed --sizes $size
    done
    mkdir -p out/docs-study/cut-$seed
    [ -e out/docs-study/cut-$seed/eval.json ] ||
        python evaluate.py out/docs-study/alone6-$seed --sizes $sizes --retrieval docs --out out/docs-study/cut-$seed/eval.json
done
python - <<'PYTHON'
import json
from pathlib import Path
import numpy as np
from scipy.stats import t

values, runs = {}, []      # values {method: {size: [(1000,) of each seed]}}
for file in sorted(Path("out/docs-study").glob("*/eval.json")):
    run, method = json.loads(file.read_text()), file.parent.name.split("-")[0].rstrip("123456")
    for size, metrics in run["per_item"]["docs"].items():
        if ":" in size:
            values.setdefault(method, {}).setdefault(size, []).append(metrics["MRR@10"])
    log = file.parent / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    minutes = np.mean([r["ms"] for r in records if "ms" in r]) * records[-1]["step"] / 60_000 if records else 0   # of training
    runs.append({"run": file.parent.name, "commit": run["commit"], "dtype": run["dtype"], "minutes": round(float(minutes), 1),
                 "MRR@10": {f"{r['layer']}:{r['dim']}": round(r["value"], 4) for r in run["results"] if r["metric"] == "MRR@10"}})
table = []
for method, sizes in values.items():
    for size, found in sorted(sizes.items()):
        difference = np.mean(found, axis=0) - np.mean(values["srl"][size], axis=0)               # (1000,)
        error = difference.std(ddof=1) / len(difference)**0.5
        z = abs(difference.mean()) / error if error > 0 else 0.0
        means = np.mean(found, axis=1)
        table.append({"method": method, "size": size, "seeds": len(found), "mean": round(float(means.mean()), 4),
                      "std": round(float(means.std(ddof=1)), 4) if len(means) > 1 else None,
                      "minus srl": round(float(difference.mean()), 4), "interval": round(float(1.96 * error), 4),
                      "p": float(2 * t.sf(z, len(difference) - 1))})
Path("results/docs-study.json").write_text(json.dumps({"table": table, "runs": runs}, indent=1) + "\n")
for row in table:
    print("{method:6} {size:6} {mean:.4f} ± {std}  minus SRL {minus srl:+.4f} ± {interval:.4f}, p {p:.1g}".format(**row))
PYTHON
