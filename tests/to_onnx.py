"""
An exported folder as ONNX, for browsers and programs without PyTorch: FOLDER/onnx/model.onnx in float32,
model_int8.onnx, and model_int4.onnx (weights alone in four bits, which is smaller and loses less, because int8 rounds
the activations as well). sentence-transformers and transformers.js look for the files there. Prints megabytes,
milliseconds a query and Spearman's correlation of each, on one core.

    pip install onnx onnxruntime onnxscript
    python evaluate.py out/srl --export 1:8 out/small && python tests/to_onnx.py out/small my_sts.jsonl

float32 and int8 without this file, in an environment of its own, since optimum wants transformers 4:
    pip install "sentence-transformers[onnx]"
    model = SentenceTransformer("out/small", backend="onnx"); model.save_pretrained("out/small")
    export_dynamic_quantized_onnx_model(model, "avx2", "out/small")
"""
import logging, statistics, sys, time, warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from evaluate import spearman
from model import load_model

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]

def to_onnx(folder):
    """ FOLDER -> {precision: file} """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from transformers import AutoModel
    (Path(folder) / "onnx").mkdir(exist_ok=True)
    files = {name: Path(folder) / "onnx" / file for name, file in
             (("float32", "model.onnx"), ("int8", "model_int8.onnx"), ("int4", "model_int4.onnx"))}
    class LastHiddenState(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        def forward(self, *inputs):
            return self.bert(**dict(zip(INPUTS, inputs))).last_hidden_state
    example = tuple(torch.tensor(rows) for rows in ([[2, 3, 4], [2, 3, 0]], [[1, 1, 1], [1, 1, 0]], [[0] * 3] * 2))
    logging.disable(logging.WARNING)   # the quantisers tell of every layer
    with warnings.catch_warnings():    # of names of axes that mean the same
        warnings.simplefilter("ignore")
        B, T = torch.export.Dim("batch"), torch.export.Dim("tokens", max=load_model(folder)[1].model_max_length)
        torch.onnx.export(LastHiddenState(), example, input_names=INPUTS, output_names=["last_hidden_state"],
                          dynamic_shapes={"inputs": ({0: B, 1: T},) * 3}, verbose=False, external_data=False).save(
                              files["float32"])
    quantize_dynamic(files["float32"], files["int8"], weight_type=QuantType.QInt8)
    smaller = MatMulNBitsQuantizer(onnx.load(files["float32"]), bits=4, block_size=64, is_symmetric=True,
                                   accuracy_level=4, op_types_to_quantize=("MatMul", "Gather"))
    smaller.process()
    smaller.model.save_model_to_file(files["int4"], False)
    logging.disable(logging.NOTSET)
    return files

def embedder(folder, file):
    """ an ONNX file, tokenizer and config of its folder -> a function: list of B strings -> (B, D) vectors """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    model, tokenizer = load_model(folder)
    dim = model.config.sizes[-1][1]
    def embed(texts):
        inputs = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="np"))
        hidden = session.run(None, {name: inputs[name].astype(np.int64) for name in INPUTS})[0]   # (B, T, C)
        mask = inputs["attention_mask"][:, :, None]                                               # (B, T, 1)
        pooled = {"cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1)}
        return pooled[model.config.pooling][:, :dim]
    return embed

def main(folder, sts_file):
    _, first, second, gold = data.load_sts(sts_file)
    for name, file in to_onnx(folder).items():
        embed, ms = embedder(folder, file), []
        for _ in range(103):
            start = time.perf_counter()
            embed(["how do I invert a large matrix"])
            ms.append(1000 * (time.perf_counter() - start))
        x, y = (np.concatenate([embed(texts[i:i + 32]) for i in range(0, len(texts), 32)]) for texts in (first, second))
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        print(f"{name:8} {file.stat().st_size / 1e6:6.1f} MB {statistics.median(ms[3:]):6.2f} ms a query   "
              f"Spearman {spearman(cosine, gold):.4f}", flush=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
