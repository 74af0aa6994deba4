""" tools.export --onnx: another runtime gives the embeddings of the size. """
import re

import pytest
import torch
import torch.nn.functional as F

import evaluate
from conftest import NOUNS, needs, write_jsonl
from model import load_model, save_pretrained
from tools import export

def run(*flags):
    export.main(export.parse_args(list(map(str, flags))))

@needs("onnxscript")
@needs("onnxruntime")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_onnx(bert_folder, tmp_path, capsys, pooling):
    """ On a batch that its own tokenizer pads, model.onnx gives the size's embeddings to 1e-5; int8 is smaller and
    close. The printed Spearman is that of evaluate.py, for both formats of float32. """
    import onnxruntime
    model, tokenizer = load_model(bert_folder, pooling=pooling)
    save_pretrained(model, tokenizer, tmp_path / "model")
    rows = [{"sentence1": f"the {a}", "sentence2": f"the {b} stands", "score": i} for i, (a, b) in
            enumerate(zip(NOUNS, NOUNS[3:]))]
    sts = write_jsonl(tmp_path / "sts.jsonl", rows)
    run(tmp_path / "model", "2:16", tmp_path / "out", "--onnx", "--sts", sts)
    records, _ = evaluate.sts(model, tokenizer, evaluate.load_sts(sts), [(2, 16)], "float32")
    printed = re.findall(r"(\S+) +[\d.]+ MB +Spearman (\S+)", capsys.readouterr().out)
    assert [name for name, _ in printed] == ["model.safetensors", "model.onnx", "model_int8.onnx"]
    assert [float(value) for _, value in printed[:2]] == pytest.approx([records[0]["value"]] * 2, abs=1e-3)
    texts = ["the apple", "where is the bridge garden", "the candle stands beside the lantern in the morning"]
    want = F.normalize(evaluate.embed_texts(model, tokenizer, texts, [2])[2][:, :16], dim=-1)
    inputs = dict(load_model(tmp_path / "out")[1](texts, padding=True, return_tensors="np"))
    files = [tmp_path / "out" / "onnx" / name for name in ("model.onnx", "model_int8.onnx")]
    for file, least in zip(files, (1 - 1e-6, 0.95)):
        hidden = torch.from_numpy(onnxruntime.InferenceSession(file).run(["last_hidden_state"], inputs)[0])  # (B, T, C)
        mask = torch.from_numpy(inputs["attention_mask"])[:, :, None]
        found = F.normalize({"cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1)}[pooling], dim=-1)
        assert (found[:, :16] * want).sum(-1).min() > least and found[:, 16:].abs().max() < 1e-5
    assert files[1].stat().st_size < files[0].stat().st_size

@needs("onnxscript")
@needs("onnxruntime")
def test_a_wrong_export_is_refused(bert_folder, tmp_path, monkeypatch):
    """ What does not give the embeddings to 1e-4 is an error, not a file. """
    monkeypatch.setattr(export, "onnx_model", lambda model, file: export.cut(model, (1, 16)))
    with pytest.raises(ValueError, match="model.onnx: its embeddings are off by"):
        run(bert_folder, "2:16", tmp_path / "out", "--onnx")

def test_missing_packages(bert_folder, tmp_path, monkeypatch):
    """ Without its packages --onnx names them, and writes nothing. """
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime onnxscript"):
        run(bert_folder, "2:16", tmp_path / "out", "--onnx")
    assert not (tmp_path / "out").exists()
