""" What other programs make of our folders: sentence-transformers, AutoModel, ONNX; exports, their vocabulary and card. """
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from conftest import needs
from model import from_pretrained, load_model, save_pretrained

TEXTS = ["the apple", "where is the bridge garden", "the candle stands beside the lantern in the morning and so on"]


@pytest.fixture
def trained(bert_folder, tmp_path):
    """ (pooling, similarity) -> a folder of ours with three sizes: 3 layers x 48, texts cut to 9 tokens """
    def make(pooling="mean", similarity="cosine", sizes=((1, 8), (2, 16), (3, 48))):
        model, tokenizer = load_model(bert_folder, max_length=9, pooling=pooling, similarity=similarity)
        model.config.sizes, model.config.size_names = sizes, ("",) * len(sizes)
        save_pretrained(model, tokenizer, tmp_path / "trained")
        return tmp_path / "trained"
    return make


def ours(folder, size):
    """ our embeddings of TEXTS at a size, normalised where the similarity is the cosine """
    model, tokenizer = load_model(folder)
    embeddings = evaluate.embed_texts(model, tokenizer, TEXTS, [size[0]])[size[0]][:, :size[1]]
    return F.normalize(embeddings, dim=-1) if model.config.similarity == "cosine" else embeddings


def theirs(folder, caplog, capfd):
    """ SentenceTransformer(folder), which must load without a word of warning, and so must AutoModel """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = SentenceTransformer(str(folder), device="cpu")
        AutoModel.from_pretrained(folder)
    said = capfd.readouterr()
    assert not [r for r in caplog.records if r.levelname == "WARNING"] and "LOAD REPORT" not in said.out + said.err
    return found


@needs("sentence_transformers")
@pytest.mark.parametrize("pooling, similarity", [("mean", "cosine"), ("cls", "dot"), ("cls", "cosine")])
def test_our_folder_in_sentence_transformers_and_back(trained, tmp_path, caplog, capfd, pooling, similarity):
    """ sentence-transformers gives the full size to 1e-5 and knows similarity and length; what it saves is read back. """
    folder = trained(pooling, similarity)
    loaded, want = theirs(folder, caplog, capfd), ours(folder, (3, 48))
    assert (loaded.similarity_fn_name, loaded.max_seq_length) == (similarity, 9)
    torch.testing.assert_close(torch.from_numpy(loaded.encode(TEXTS)), want, rtol=0, atol=1e-5)
    loaded.save(str(tmp_path / "back"))
    torch.testing.assert_close(ours(tmp_path / "back", (3, 48)), want, rtol=0, atol=1e-5)
    assert load_model(tmp_path / "back")[0].config == load_model(folder)[0].config
    plain = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in ("sizes", "size_names", "pooling", "similarity"):   # sentence-transformers' own files say it, too
        del plain[key]
    (tmp_path / "back" / "config.json").write_text(json.dumps(plain))
    torch.testing.assert_close(ours(tmp_path / "back", (3, 48)), want, rtol=0, atol=1e-5)


@needs("sentence_transformers")
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_largest_size_below_all_channels(trained, caplog, capfd, similarity):
    """ A model trained for 16 of its 48 channels alone gives vectors of 16 numbers in the right directions. """
    folder = trained("mean", similarity, ((3, 16),))
    found, want = torch.from_numpy(theirs(folder, caplog, capfd).encode(TEXTS)), ours(folder, (3, 16))
    if similarity == "cosine":
        found = F.normalize(found, dim=-1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_the_files_are_read_without_our_config(trained):
    """ read_modules takes pooling and similarity from the files of sentence-transformers that save_pretrained writes. """
    for pooling, similarity in (("mean", "cosine"), ("cls", "dot")):
        folder = trained(pooling, similarity)
        config = json.loads((folder / "config.json").read_text())
        del config["pooling"], config["similarity"]
        (folder / "config.json").write_text(json.dumps(config))
        model, tokenizer = load_model(folder)
        assert (model.config.pooling, model.config.similarity, tokenizer.model_max_length) == (pooling, similarity, 9)
        kinds = [module["type"].rsplit(".")[-1] for module in json.loads((folder / "modules.json").read_text())]
        assert kinds == ["Transformer", "Pooling", "Normalize"][:2 + (similarity == "cosine")]
