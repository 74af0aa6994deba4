#!/usr/bin/env bash
# The quick start with 544 steps in place of 200, one seed: one model at six sizes, 2D Matryoshka, an ordinary model cut to each size (the floor), and a model
# trained for each size alone (the ceiling). Eight trainings, about 40 minutes on two cores. The figure needs matplotlib.
set -euo pipefail
cd "$(dirname "$0")/.."
python finetune_srl.py --max_steps 544 --out_dir out/docs-six
python finetune_srl.py --max_steps 544 --method 2dmse --out_dir out/docs-2dmse
for size in 1:8 2:16 3:32 4:64 5:128 6:160; do
    python finetune_srl.py --max_steps 544 --sizes $size --out_dir out/docs-alone-${size/:/-}
done
python evaluate.py out/docs-alone-6-160 --sizes 1:8,2:16,3:32,4:64,5:128,6:160 --out out/docs-cut.json
python - <<'PYTHON'
# What results/README.md quotes, without the values of other metrics query by query: results/docs-*.json
import json
from pathlib import Path
alone = [f"out/docs-alone-{size}/eval.json" for size in ("1-8", "2-16", "3-32", "4-64", "5-128", "6-160")]
for name, files in (("six", ["out/docs-six/eval.json"]), ("2dmse", ["out/docs-2dmse/eval.json"]),
                    ("cut", ["out/docs-cut.json"]), ("alone", alone)):
    runs = [json.loads(Path(file).read_text()) for file in files]
    items = {size: values if size == "ids" else {"MRR@10": [round(value, 6) for value in values["MRR@10"]]}
             for run in runs for size, values in run["per_item"]["docs"].items()}
    about = {key: value for key, value in runs[0].items() if key not in ("results", "per_item", "command", "model")}
    found = about | {"model": name, "results": [record for run in runs for record in run["results"]],
                     "per_item": {"docs": items}}
    Path(f"results/docs-{name}.json").write_text(json.dumps(found) + "\n")
PYTHON
python -m tools.compare "one model, six sizes=results/docs-six.json" "2D Matryoshka=results/docs-2dmse.json" \
    "an ordinary model, cut=results/docs-cut.json" "one model per size=results/docs-alone.json" \
    --metrics MRR@10 --plot results/docs.svg
