""" tools.export --onnx: another runtime gives the embeddings of a size. """
import functools, shutil
from types import SimpleNamespace

import pytest
import torch

import evaluate
from conftest import NOUNS, needs, write_jsonl
from model import load_model
from test_tools import run
from tools import export

@needs("onnxscript")
@needs("onnxruntime")
def test_onnx(bert_folder, tmp_path, capsys, monkeypatch):
    """ On a padded batch model.onnx gives the size's embeddings to 1e-5 with either pooling, and 0 beyond; int8 is
    close. The printed Spearman is that of evaluate.py. A file that gives others is an error. """
    import onnxruntime
    sts = [{"sentence1": a, "sentence2": f"the {b}", "score": len(a) + len(b)} for a, b in zip(NOUNS, NOUNS[3:])]
    sts_file, (model, tokenizer) = write_jsonl(tmp_path / "sts.jsonl", sts), load_model(bert_folder)
    run(export, bert_folder, "2:16", tmp_path / "out", "--onnx", "--sts", sts_file)
    want = evaluate.sts(model, tokenizer, evaluate.load_sts(sts_file), [(2, 16)], "float32")[0][0]["value"]
    assert capsys.readouterr().out.count(f"Spearman {want:.4f}\n") >= 2   # of PyTorch and of ONNX
    texts, folder = [*NOUNS, "where is the bridge"], tmp_path / "out/onnx"
    inputs = dict(tokenizer(texts, padding=True, return_tensors="np"))
    mask = torch.from_numpy(inputs["attention_mask"])[:, :, None]
    hidden, int8 = (torch.from_numpy(onnxruntime.InferenceSession(folder / name).run(None, inputs)[0])   # (B, T, C)
                    for name in ("model.onnx", "model_int8.onnx"))
    ways = {"cls": lambda hidden: hidden[:, 0], "mean": lambda hidden: (hidden * mask).sum(1) / mask.sum(1)}
    for model.config.pooling, pool in ways.items():
        want = evaluate.embed_texts(model, tokenizer, texts, [2])[2][:, :16]
        torch.testing.assert_close(pool(hidden)[:, :16].float(), want, rtol=0, atol=1e-5)
        cosine = torch.cosine_similarity(pool(int8)[:, :16], want)
        assert not pool(hidden)[:, 16:].any() and 0.95 < cosine.min() < 1 - 1e-6
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **flags: SimpleNamespace(
        save=functools.partial(shutil.copy, folder / "model.onnx")))
    with pytest.raises(ValueError, match="model.onnx: its embeddings are off by"):
        run(export, bert_folder, "2:15", tmp_path / "wrong", "--onnx")
