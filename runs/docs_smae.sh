#!/usr/bin/env bash
# Does SMAE help? On docs: pre-train by SMAE, by plain MLM on the same tokens, or not at all, then fine-tune as the quick
# start does, but for 544 steps. Three seeds. The vector is that of [CLS], which is what SMAE trains. Two hours on one core
# with AMX. Each fine-tuning prints two tables: the 1,000 test queries, then the 3,988 dev queries of results/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/docs_heldout.sh
for seed in 1 2 3; do
    for start in smae mlm scratch; do
        out=out/docs-$start-$seed init=
        rm -rf $out $out-srl
        if [ $start != scratch ]; then
            python pretrain_smae.py --objective $start --max_steps 1000 --seed $seed --out_dir $out
            init="--init_from $out --embedding_lr_scale 8"
        fi
        python finetune_srl.py $init --max_steps 544 --pooling cls --seed $seed --out_dir $out-srl
        python evaluate.py $out-srl --retrieval out/docs-heldout --out $out-srl/heldout.json
    done
done
