#!/usr/bin/env bash
# A search model that beats word matching: all-MiniLM-L6-v2, trained on docs for 200 steps, three seeds, SRL and 2D Matryoshka;
# beside them MiniLM cut to fewer layers, and its first dims with all layers. A run takes 12 minutes on two cores with AMX, all
# together 80. Settings were chosen on dev (runs/docs_heldout.sh). What is done is skipped.
#   runs/minilm_docs.sh MODEL
# MODEL: sentence-transformers/all-MiniLM-L6-v2 or its folder. Writes results/minilm-docs.json and prints its table.
set -euo pipefail
model=$1
cd "$(dirname "$0")/.."
out=out/minilm-docs sizes=1:32,2:64,3:128,4:192,5:256,6:384
mkdir -p $out/{cut,dims}-0
[ -e $out/ordered ] || python -m tools.order_channels "$model" $out/ordered --sizes $sizes
[ -e $out/cut-0/eval.json ] || python evaluate.py "$model" --sizes $sizes --retrieval docs --out $out/cut-0/eval.json
[ -e $out/dims-0/eval.json ] || python evaluate.py "$model" --sizes ${sizes//[1-5]:/6:} --retrieval docs --out $out/dims-0/eval.json
train() {      # NAME SEED FLAGS
    [ -e $out/$1-$2/eval.json ] || { rm -rf $out/$1-$2
        python finetune_srl.py --init_from $out/ordered --teacher "$model" --sizes $sizes --kl_weight 0.3 --temperature 0.05 \
            --learning_rate 3e-4 --embedding_lr_scale 4 --passage_max_length 128 --seed $2 --out_dir $out/$1-$2 "${@:3}"; }
}
for seed in 1 2 3; do
    train srl $seed
    train 2dmse $seed --method 2dmse
done
python - <<'PYTHON'
import json
from pathlib import Path
import pandas
rows = [{"method": file.parent.name.split("-")[0], "size": f"{r['layer']}:{r['dim']}", **r, "commit": run["commit"]}
        for file in sorted(Path("out/minilm-docs").glob("*/eval.json")) for run in [json.loads(file.read_text())]
        for r in run["results"] if r["task"] == "docs"]
groups = pandas.DataFrame(rows).groupby(["metric", "method", "layer", "dim"], sort=False)
table = groups.agg(mean=("value", "mean"), std=("value", "std"), seeds=("value", "size"), commit=("commit", "first")).round(4)
table.reset_index().to_json("results/minilm-docs.json", orient="records", indent=1)
print(table.to_string())
PYTHON
