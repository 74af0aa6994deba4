#!/usr/bin/env bash
# Settings that were searched on docs: seed 1, 200 steps, MRR@10 on the dev set alone (runs/docs_heldout.sh), never on test.
# 1. The same learning rates for SRL, 2D Matryoshka, and separate models of two sizes. 2. What could make SMAE serve the
# mean over the tokens, and why it does not. 5 to 7 minutes a trial on one core with bfloat16, 15 for each pre-training.
# What is done is skipped. Results: results/docs-trials.json and the table that it prints.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e out/docs-heldout ] || runs/docs_heldout.sh
trial() {      # NAME FLAGS...: fine-tune, then dev
    local out=out/docs-trials/$1
    [ -e $out/model.safetensors ] && [ ! -e $out/training_state.pt ] ||
        python finetune_srl.py --max_steps 200 --retrieval= --out_dir $out --overwrite "${@:2}"
    [ -e $out/eval.json ] || python evaluate.py $out --retrieval out/docs-heldout
}
# 1. learning rate of the blocks, and of the embeddings as a multiple of it
for rate in "5e-4 8" "1e-3 8" "2.5e-4 8" "5e-4 16"; do
    flags="--learning_rate ${rate% *} --embedding_lr_scale ${rate#* }" name=${rate/ /x}
    trial srl-$name $flags
    trial 2dmse-$name $flags --method 2dmse
    trial alone2-$name $flags --sizes 2:16
    trial alone5-$name $flags --sizes 5:128
done

# 2. SMAE as it comes, and a gentle SMAE that starts as SRL from scratch does: weights of .01, 32 gains at 0
python - <<'PYTHON'
from functools import partial
from pathlib import Path
import torch
import finetune_srl, pretrain_smae

def pretrain(name, *flags):
    out = f"out/docs-trials/smae-{name}"
    if not Path(out, "done").exists():
        pretrain_smae.main(pretrain_smae.parse_args(["--max_steps", "1000", "--out_dir", out, "--overwrite", *flags]))
        Path(out, "done").touch()

pretrain("plain")
class Silenced(pretrain_smae.SMAE):
    def __init__(self, bert, head):
        finetune_srl.silence_last_channels(bert)
        super().__init__(bert, head)
pretrain_smae.SMAE = Silenced
pretrain_smae.BertConfig = partial(pretrain_smae.BertConfig, initializer_range=0.01)
pretrain("gentle", "--learning_rate", "5e-4", "--word_lr_scale", "8")
PYTHON
