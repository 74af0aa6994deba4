#!/usr/bin/env bash
# Does SMAE help on general text? Pre-train 6 layers x 256 by SMAE, by plain MLM on the same tokens, or not at all; then
# SRL on NLI triplets, then STS dev sets. results/README.md has what came out of it, and what the files were.
#   runs/wikipedia_nli.sh TEXT.txt.gz TRIPLETS.jsonl STS_DEV.jsonl...
# TEXT: a paragraph a line; TRIPLETS: anchor, positive, negative; STS_DEV: sentence1, sentence2, score.
set -euo pipefail
text=$(realpath "$1") triplets=$(realpath "$2") sts=$(realpath "${@:3}")
cd "$(dirname "$0")/.."
for start in smae mlm scratch; do
    init="--init_from out/wikipedia-$start"
    if [ $start = scratch ]; then
        init="--hidden_size 256"
    else
        python pretrain_smae.py --train_text "$text" --objective $start --hidden_size 256 --epochs 1 --out_dir out/wikipedia-$start
    fi
    python finetune_srl.py $init --train_pairs "$triplets" --retrieval= --temperature 0.05 --epochs 2 \
        --learning_rate 8e-4 --embedding_lr_scale 5 \
        --query_max_length 64 --out_dir out/wikipedia-$start-srl
    python evaluate.py out/wikipedia-$start-srl --sts $sts
done
