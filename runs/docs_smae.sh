#!/usr/bin/env bash
# Does SMAE help? The docs of this machine: pre-train by SMAE, by plain MLM on the same tokens, or not at all, then the
# quick start's fine-tuning; three seeds. The vector is that of [CLS] in all, as in the paper's retrieval: it is what
# SMAE trains. A seed takes 35 minutes on one core. results/README.md has the outcome, and that of mean pooling.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    for objective in smae mlm; do
        python pretrain_smae.py --objective $objective --max_steps 1000 --seed $seed --out_dir out/docs-$objective-$seed
        python finetune_srl.py --init_from out/docs-$objective-$seed --embedding_lr_scale 8 --pooling cls --seed $seed \
            --out_dir out/docs-$objective-$seed-srl
    done
    python finetune_srl.py --pooling cls --seed $seed --out_dir out/docs-scratch-$seed-srl
done
