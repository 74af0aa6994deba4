#!/usr/bin/env bash
# Hand a trained MiniLM over: each size as a folder, whose embeddings by sentence-transformers are compared with ours; and
# the smallest size with 10,000 vocabulary entries, counted on the training texts, in PyTorch and in ONNX. Trains nothing.
#   runs/handover.sh MODEL DATA
# MODEL: a run of runs/minilm_study.sh, say out/minilm/srl-6e-4-1. DATA: the data of that run.
# Needs onnx, onnxruntime, onnxscript and sentence-transformers beside requirements.txt.
set -euo pipefail
model=$(realpath "$1") data=$(realpath "$2")
cd "$(dirname "$0")/.."
out=out/handover
rm -rf $out
mkdir -p $out
python -m tools.export "$model" all $out/six
python - "$model" "$data/sts/stsb-test.jsonl" $out/six <<'PYTHON'
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
import evaluate
from model import load_model, shorten
model, tokenizer = load_model(sys.argv[1])
_, first, second, gold = evaluate.load_sts(sys.argv[2])
for layer, dim in model.config.sizes:
    theirs = SentenceTransformer(f"{sys.argv[3]}/{layer}-{dim}", device="cpu").encode(first + second, normalize_embeddings=True)
    ours = shorten(evaluate.embed_texts(model, tokenizer, first + second, [layer])[layer], dim, "cosine").numpy()
    a, b = (evaluate.spearman((x[:len(gold)] * x[len(gold):]).sum(-1), gold) for x in (theirs, ours))
    print(f"{layer}:{dim}: largest difference {np.abs(theirs - ours).max():.1e}, Spearman {a:.4f} and {b:.4f}")
PYTHON
zcat -f "$data"/pairs/nli-*.jsonl* | head -100000 > $out/rows.jsonl || true   # head closes the pipe
python - $out/rows.jsonl > $out/text.txt <<'PYTHON'
import json, sys
texts = (text for line in open(sys.argv[1]) for text in json.loads(line).values() if isinstance(text, str))
print(*dict.fromkeys(texts), sep="\n\n")
PYTHON
# prints megabytes and Spearman on STS-B test of PyTorch, ONNX float32 and ONNX int8
python -m tools.export $out/six/1-32 1:32 $out/words --vocab_size 10000 --texts $out/text.txt \
    --onnx --sts "$data/sts/stsb-test.jsonl"
for folder in $out/six/1-32 $out/words; do
    python evaluate.py $folder --sts "$data/sts/stsb-dev.jsonl" --out $folder/dev.json
done
