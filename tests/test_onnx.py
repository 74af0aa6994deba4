""" tools.export --onnx: another runtime gives the embeddings of a size. """
import pytest
import torch

import evaluate
from conftest import NOUNS, needs, write_jsonl
from model import load_model, save_pretrained
from tools import export

@needs("onnxscript")
@needs("onnxruntime")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_onnx(bert_folder, tmp_path, capsys, monkeypatch, pooling):
    """ On a padded batch model.onnx gives the size's embeddings to 1e-5, and 0 beyond; int8 is smaller and close. The
    printed Spearman is that of evaluate.py. A file that gives other embeddings is an error. """
    import onnxruntime
    model, tokenizer = load_model(bert_folder, pooling=pooling)
    save_pretrained(model, tokenizer, folder := tmp_path / "model")
    sts = [{"sentence1": a, "sentence2": f"the {b}", "score": len(a) + len(b)} for a, b in zip(NOUNS, NOUNS[3:])]
    flags = [str(folder), "2:16", str(tmp_path / "out"), "--onnx", "--sts", write_jsonl(tmp_path / "sts.jsonl", sts)]
    export.main(export.parse_args(flags))
    want = evaluate.sts(model, tokenizer, evaluate.load_sts(flags[-1]), [(2, 16)], "float32")[0][0]["value"]
    assert capsys.readouterr().out.count(f"Spearman {want:.4f}\n") >= 2   # of PyTorch and of ONNX
    inputs, rows = dict(tokenizer(texts := [*NOUNS, "where is the bridge"], padding=True, return_tensors="np")), []
    want, mask = evaluate.embed_texts(model, tokenizer, texts, [2])[2][:, :16], inputs["attention_mask"][:, :, None]
    for name in ("model.onnx", "model_int8.onnx"):
        hidden, = onnxruntime.InferenceSession(tmp_path / "out/onnx" / name).run(None, inputs)      # (B, T, C)
        rows.append(torch.from_numpy({"cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1)}[pooling]))
    torch.testing.assert_close(rows[0][:, :16].float(), want, rtol=0, atol=1e-5)
    assert not rows[0][:, 16:].any() and 0.95 < torch.cosine_similarity(rows[1][:, :16], want).min() < 1 - 1e-6
    monkeypatch.setattr(export, "onnx_model", lambda model, file: export.cut(model, (2, 15)))
    with pytest.raises(ValueError, match="model.onnx: its embeddings are off by"):
        export.main(export.parse_args([str(folder), "2:16", str(tmp_path / "wrong"), "--onnx"]))

def test_missing_packages(bert_folder, tmp_path, monkeypatch):
    """ Without its packages --onnx names them, and writes nothing. """
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime onnxscript"):
        export.main(export.parse_args([bert_folder, "2:16", str(tmp_path / "out"), "--onnx"]))
    assert not (tmp_path / "out").exists()
