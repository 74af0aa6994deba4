#!/usr/bin/env bash
# The paper's runs: BERT-base on eight GPUs. They were tested on CPUs with small copies of the data, not at this size.
# SMAE took the authors days; without it leave --init_from bert-base-uncased in the two commands below.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node 8 pretrain_smae.py --init_from bert-base-uncased --train_text HuggingFaceFW/fineweb:sample-100BT \
    --streaming --max_length 512 --batch_size 512 --micro_batch 32 --max_steps 291000 --learning_rate 1e-4 --dropout 0.1 \
    --out_dir out/smae
# semantic similarity: AllNLI
torchrun --nproc_per_node 8 finetune_srl.py --init_from out/smae --pooling mean --out_dir out/nli \
    --train_pairs sentence-transformers/all-nli:triplet --learning_rate 5e-5 --temperature 0.05 --weight_decay 0 \
    --dropout 0.1 --epochs 1 --query_max_length 512 --passage_max_length 512 --max_length 512
python evaluate.py out/nli --sts sts12 sts13 sts14 sts15 sts16 stsb sickr
# retrieval: MS MARCO
torchrun --nproc_per_node 8 finetune_srl.py --init_from out/smae --pooling cls --similarity dot --out_dir out/marco \
    --train_pairs Tevatron/msmarco-passage --temperature 1 --negatives 7 --learning_rate 1e-4 --weight_decay 0 \
    --dropout 0.1 --epochs 3 --query_max_length 32 --passage_max_length 196 --max_length 196
python evaluate.py out/marco --retrieval msmarco:validation msmarco:test
