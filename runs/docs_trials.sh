#!/usr/bin/env bash
# Settings that were searched on docs: seed 1, 200 steps, MRR@10 on the dev set alone (runs/docs_heldout.sh), never on test.
# 1. The same learning rates for SRL, 2D Matryoshka, and separate models of two sizes. 2. What could make SMAE serve the
# mean over the tokens, and why it does not. 5 to 7 minutes a trial on one core with bfloat16, 15 for each pre-training.
# What is done is skipped. Results: results/docs-trials.json and the table that it prints.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e out/docs-heldout ] || runs/docs_heldout.sh
mkdir -p out/docs-trials
trial() {      # NAME FLAGS...: fine-tune, then dev
    local out=out/docs-trials/$1
    [ -e $out/model.safetensors ] && [ ! -e $out/training_state.pt ] ||
        python finetune_srl.py --max_steps 200 --retrieval= --out_dir $out --overwrite "${@:2}"
    [ -e $out/eval.json ] || python evaluate.py $out --retrieval out/docs-heldout
}
# 1. learning rate of the blocks, and of the embeddings as a multiple of it
for rate in "5e-4 8" "1e-3 8" "2.5e-4 8" "5e-4 16" "5e-4 32" "2.5e-4 16"; do
    flags="--learning_rate ${rate% *} --embedding_lr_scale ${rate#* }" name=${rate/ /x}
    trial srl-$name $flags
    trial 2dmse-$name $flags --method 2dmse
    trial alone2-$name $flags --sizes 2:16
    trial alone5-$name $flags --sizes 5:128
done

# 2. SMAE as it comes, and a gentle SMAE that starts as SRL from scratch does: weights of .01, 160 scored channels
sizes=1:8,2:16,3:32,4:64,5:128,6:160
python - $sizes <<'PYTHON'
import sys
from functools import partial
from pathlib import Path
import pretrain_smae

def pretrain(name, *flags):
    out = f"out/docs-trials/smae-{name}"
    if not Path(out, "done").exists():
        pretrain_smae.main(pretrain_smae.parse_args(["--max_steps", "1000", "--out_dir", out, "--overwrite", *flags]))
        Path(out, "done").touch()

pretrain("plain")
pretrain_smae.new_config = partial(pretrain_smae.new_config, initializer_range=0.01)
pretrain("gentle", "--learning_rate", "5e-4", "--embedding_lr_scale", "8", "--sizes", sys.argv[1])
PYTHON
pre=out/docs-trials/smae-plain
mean="--pooling mean --embedding_lr_scale 8"
trial mean --init_from $pre $mean
trial mean-1.5e-3 --init_from $pre $mean --learning_rate 1.5e-3
trial mean-2.5e-4 --init_from $pre $mean --learning_rate 2.5e-4
trial mean-1.25e-4x16 --init_from $pre --pooling mean --learning_rate 1.25e-4 --embedding_lr_scale 16
trial mean-x2 --init_from $pre --pooling mean --embedding_lr_scale 2
trial cls --init_from $pre --pooling cls --embedding_lr_scale 8
# 3. Channels left unscored, or weights changed, between SMAE and SRL, to learn what of SMAE does the harm
trial mean-silence --init_from $pre $mean --sizes $sizes
edited() {     # FROM OUT CHANGES: a copy of the model with other weights
    [ -e $2/model.safetensors ] || python - "$@" <<'PYTHON'
import sys
import torch
from model import load_model, save_pretrained
(_, source, out, changes), g = sys.argv, torch.Generator().manual_seed(0)
model, tokenizer = load_model(source)
C, words = model.config.hidden_size, model.word.weight.data
if "center" in changes:       # no direction that all words share
    words -= words.mean(0)
if "shrink" in changes:       # std .01; the model stays the same function, because LayerNorm follows
    factor = 0.01 / words.std()
    for embedding in (model.word, model.position, model.token_type):
        embedding.weight.data *= factor
if "whiten" in changes:       # words of equal length that fill all directions equally; new positions, segments, LayerNorm
    values, vectors = torch.linalg.eigh(torch.cov((words - words.mean(0)).double().T))
    white = (words - words.mean(0)).double() @ vectors @ torch.diag(values**-0.5) @ vectors.T
    words.copy_(0.01 * C**0.5 * torch.nn.functional.normalize(white, dim=-1))
    for embedding in (model.position, model.token_type):
        embedding.weight.data = 0.01 * torch.randn(embedding.weight.shape, generator=g)
    torch.nn.init.ones_(model.embedding_norm.weight), torch.nn.init.zeros_(model.embedding_norm.bias)
if "identity" in changes:     # a tenth of what attention and MLP add
    for block in model.blocks:
        for linear in (block.out, block.down):
            linear.weight.data *= 0.1
            linear.bias.data *= 0.1
save_pretrained(model, tokenizer, out)
PYTHON
}
for changes in identity center-shrink whiten-identity shrink; do
    edited $pre out/docs-trials/from-$changes $changes
    trial mean-$changes --init_from out/docs-trials/from-$changes $mean
done
trial mean-gentle --init_from out/docs-trials/smae-gentle $mean
# few pairs: 1,000 of the 19,433, 100 steps; and no training at all
python - > out/docs-trials/few.jsonl <<'PYTHON'
import random
import data
lines = (data.docs_folder() / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
print("".join(random.Random(1).sample(lines, 1000)), end="")
PYTHON
few="--train_pairs out/docs-trials/few.jsonl --max_steps 100"
trial few-scratch $few
trial few-smae $few --init_from $pre $mean
trial zero-scratch --max_steps 1 --learning_rate 1e-9
trial zero-smae --max_steps 1 --learning_rate 1e-9 --init_from $pre --pooling mean

python - <<'PYTHON'
import json
from pathlib import Path
runs = []
for file in sorted(Path("out/docs-trials").glob("*/eval.json")):
    run = json.loads(file.read_text())
    values = {f"{r['layer']}:{r['dim']}": round(r["value"], 4) for r in run["results"]
              if r["metric"] == "MRR@10" and r["layer"]}
    runs.append({"run": file.parent.name, "commit": run["commit"], "dev MRR@10": values})
    print(f"{file.parent.name:24}", *values.values(), f"mean {sum(values.values()) / len(values):.4f}")
Path("results/docs-trials.json").write_text(json.dumps(runs, indent=1) + "\n")
PYTHON
