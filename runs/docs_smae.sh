#!/usr/bin/env bash
# Does SMAE help? The docs of this machine: pre-train by SMAE, by plain MLM on the same tokens, or not at all, then the
# quick start's fine-tuning of 544 steps; three seeds. The vector is that of [CLS] in all, as in the paper's retrieval: it is what
# SMAE trains. A seed takes about 40 minutes on one core with AMX. Each run ends with two tables: the 1,000 test queries, then the
# 3,988 of results/README.md, which has the outcome, and that of mean pooling.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/docs_heldout.sh
for seed in 1 2 3; do
    for start in smae mlm scratch; do
        out=out/docs-$start-$seed init=
        if [ $start != scratch ]; then
            python pretrain_smae.py --objective $start --max_steps 1000 --seed $seed --out_dir $out
            init="--init_from $out --embedding_lr_scale 8"
        fi
        python finetune_srl.py $init --max_steps 544 --pooling cls --seed $seed --out_dir $out-srl
        python evaluate.py $out-srl --retrieval out/docs-heldout --out $out-srl/heldout.json
    done
done
