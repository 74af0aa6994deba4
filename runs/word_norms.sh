#!/usr/bin/env bash
# How much of its norm does a word keep in the dims of a size, by the number of docstrings that it is in? All tokens leave
# a block with a norm of about sqrt(hidden_size). Mean pooling weighs each by what is left in the first dims.
#   runs/word_norms.sh out/srl      # after python finetune_srl.py
set -euo pipefail
cd "$(dirname "$0")/.."
python - "$@" <<'PYTHON'
import sys
import numpy as np, torch
from scipy.stats import spearmanr
import data, evaluate
from model import load_model, pack, size_name

model, tokenizer = load_model(sys.argv[1])
_, texts, _ = next(evaluate.Collection("docs").shards())
texts = data.tokenize(texts[:2000], tokenizer, tokenizer.model_max_length)
count = np.bincount(np.concatenate([np.unique(text) for text in texts]), minlength=len(tokenizer))   # (V,) texts a word
batch = pack(texts[:300])
with torch.no_grad():
    taps = model(batch, [layer for layer, _ in model.config.sizes])                                  # {layer: (N, C)}
count, limits = count[batch.input_ids.numpy()], [1, 10, 50, 200, 1000, 2001]                         # (N,)
print("mean norm of tokens in", ", ".join(f"{a} to {b - 1}" for a, b in zip(limits, limits[1:])), "of 2,000 texts")
for layer, dim in model.config.sizes:
    tap = taps[layer]
    norm = tap[:, :dim].norm(dim=1).numpy()                                                          # (N,)
    means = [norm[(a <= count) & (count < b)].mean() for a, b in zip(limits, limits[1:])]
    print(f"{size_name((layer, dim)):>6}", " ".join(f"{mean:6.2f}" for mean in means),
          f"  Spearman with the number of texts {spearmanr(norm, count)[0]:.2f}")
PYTHON
