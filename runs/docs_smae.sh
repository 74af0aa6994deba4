#!/usr/bin/env bash
# Does SMAE help? The docs of this machine: pre-train by SMAE, by plain MLM on the same tokens, or not at all, then the
# quick start's fine-tuning, passages of 64 tokens and embeddings 8 times as fast for all; three seeds. SMAE takes 21
# minutes a seed on 2 cores, fine-tuning 4.8 each time.
# results/README.md says what is known so far.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    for objective in smae mlm; do
        python pretrain_smae.py --objective $objective --seed $seed --out_dir out/docs-$objective-$seed
        python finetune_srl.py --init_from out/docs-$objective-$seed --embedding_lr_scale 8 --seed $seed \
            --max_length 64 --out_dir out/docs-$objective-$seed-srl
    done
    python finetune_srl.py --seed $seed --max_length 64 --out_dir out/docs-scratch-$seed-srl
done
