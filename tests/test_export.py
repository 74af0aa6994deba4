""" What other programs make of our folders: sentence-transformers, AutoModel, ONNX; exports, vocabulary, card. """
import json
import re
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F

import evaluate
import finetune_srl
from conftest import needs
from model import MLMHead, load_model, open_run, save_pretrained

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
    """ sentence-transformers gives the full size to 1e-5 and keeps similarity and length; we read what it saves. """
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
    """ A model trained for 16 of its 48 channels alone gives its 16 numbers, not divided by the length of 48. """
    folder = trained("mean", similarity, ((3, 16),))
    model, tokenizer = load_model(folder)
    want = evaluate.embed_texts(model, tokenizer, TEXTS, [3])[3][:, :16]   # whose length is for the reader to divide by
    found = torch.from_numpy(theirs(folder, caplog, capfd).encode(TEXTS))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


@needs("sentence_transformers")
@pytest.mark.parametrize("pooling, similarity", [("mean", "cosine"), ("cls", "dot")])
def test_folder_with_an_mlm_head(trained, pooling, similarity):
    """ For BertForMaskedLM nothing is missing or unexpected, AutoModel finds all of the encoder, and
    sentence-transformers gives our embeddings to 1e-5. """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoModelForMaskedLM
    model, tokenizer = load_model(folder := trained(pooling, similarity))
    save_pretrained(model, tokenizer, folder, MLMHead(model.config))
    _, masked = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    _, plain = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(masked.values()) and plain["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(key.startswith("cls.predictions.") for key in plain["unexpected_keys"])
    found = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
    torch.testing.assert_close(found, ours(folder, (3, 48)), rtol=0, atol=1e-5)


def test_the_files_are_read_without_our_config(trained):
    """ Pooling and similarity come back from the files for sentence-transformers alone. """
    for pooling, similarity in (("mean", "cosine"), ("cls", "dot")):
        folder = trained(pooling, similarity)
        config = json.loads((folder / "config.json").read_text())
        del config["pooling"], config["similarity"]
        (folder / "config.json").write_text(json.dumps(config))
        model, tokenizer = load_model(folder)
        assert (model.config.pooling, model.config.similarity, tokenizer.model_max_length) == (pooling, similarity, 9)
        kinds = [module["type"].rsplit(".")[-1] for module in json.loads((folder / "modules.json").read_text())]
        assert kinds == ["Transformer", "Pooling", "Normalize"][:2 + (similarity == "cosine")]


def run(*flags):
    evaluate.main(evaluate.parse_args([*map(str, flags), "--device", "cpu"]))


@needs("sentence_transformers")
@pytest.mark.parametrize("pooling, similarity", [("mean", "cosine"), ("cls", "dot")])
def test_exports_in_sentence_transformers(trained, tmp_path, caplog, capfd, pooling, similarity):
    """ Each of --export all gives our embeddings of its size to 1e-5, of d numbers, without our code or a warning. """
    folder = trained(pooling, similarity)
    run(folder, "--export", "all", tmp_path / "six")
    for layer, dim in ((1, 8), (2, 16), (3, 48)):
        loaded, want = theirs(tmp_path / "six" / f"{layer}-{dim}", caplog, capfd), ours(folder, (layer, dim))
        assert len(loaded[0].auto_model.encoder.layer) == layer and loaded.max_seq_length == 9
        torch.testing.assert_close(torch.from_numpy(loaded.encode(TEXTS)), want, rtol=0, atol=1e-5)
        score = loaded.similarity(*loaded.encode(TEXTS[:2])).item()
        assert score == pytest.approx((want[0] @ want[1]).item(), abs=1e-4)


@needs("sentence_transformers")
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_code_of_the_card(trained, tmp_path, monkeypatch, similarity):
    """ The card's Python gives the full and the smallest size from the one folder with all sizes. """
    folder = trained("mean", similarity)
    evaluate.write_card(folder, folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    code = code.replace('["a text", "another one"]', "TEXTS")
    monkeypatch.chdir(tmp_path)
    found = {"TEXTS": TEXTS}
    exec(code, found)
    torch.testing.assert_close(torch.from_numpy(found["embeddings"]), ours(folder, (3, 48)), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found["small"]), ours(folder, (1, 8)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_exports_are_read_back(trained, tmp_path, similarity):
    """ Our own reader gets the size's embeddings exactly, its config, and exact zeros beyond the dims. """
    folder = trained("mean", similarity)
    run(folder, "--export", "2:16", tmp_path / "out")
    assert torch.equal(ours(tmp_path / "out", (2, 16)), ours(folder, (2, 16)))
    model, tokenizer = load_model(tmp_path / "out")
    assert (model.config.sizes, model.config.num_hidden_layers, tokenizer.model_max_length) == (((2, 16),), 2, 9)
    assert not evaluate.embed_texts(model, tokenizer, TEXTS, [2])[2][:, 16:].any()
    truncated = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["truncate_dim"]
    kinds = [module["type"].rsplit(".")[-1] for module in json.loads((tmp_path / "out" / "modules.json").read_text())]
    assert truncated == 16 and ("Normalize" in kinds) == (similarity == "cosine")
    run(folder, "--export", "1:8,3:48", tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["1-8", "3-48"]


def test_export_warns_of_other_sizes(trained, tmp_path, capsys):
    """ A size that the model was not trained at is exported with a warning; its own sizes without one. """
    folder = trained()
    run(folder, "--export", "2:16,3:17", tmp_path / "out")
    assert capsys.readouterr().err == f"warning: {folder} has the sizes 1:8, 2:16, 3:48; 3:17 may be worse\n"
    run(tmp_path / "out" / "2-16", "--export", "2:20", tmp_path / "wider")   # 0 from the 17th number on
    assert capsys.readouterr().err == f"warning: {tmp_path / 'out' / '2-16'} has the sizes 2:16; 2:20 may be worse\n"


def test_export_refuses(trained, beir, tmp_path, refused):
    """ A size that is not there, a folder that is not empty, and flags that do not fit are refused in one line. """
    folder, full = trained(), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "words.txt").write_text("the apple\n")
    vocabulary = ["--export", "1:8", "OUT", "--texts", tmp_path / "words.txt", "--vocab_size"]
    for flags, message in [
            (["--export", "7:8", "OUT"], "--export asks for layer 7"),
            (["--export", "1:99", "OUT"], "--export asks for 99 dims"),
            (["--export", "big", "OUT"], "--export 'big' is not LAYER:DIM,LAYER:DIM,... such as 2:32,4:64, or all"),
            (["--export", "1:8", full], "something is there already; delete it, or name another folder"),
            (["--export", "1:8", full / "mine.txt"], "something is there already"),
            (["--export", "1:8", "OUT", "--grid"], "--export takes one MODEL"),
            (["--vocab_size", "50"], "--vocab_size 50 is for --export SIZE OUT; add it"),
            ([*vocabulary, "20"], "special tokens and single characters must stay"),
            ([*vocabulary, "9999"], "special tokens and single characters must stay"),
            (["--search", "why", "--texts", "nowhere"], "--texts nowhere: neither docs nor a file or folder of .txt")]:
        said = refused(evaluate, [str(folder), *[str(flag).replace("OUT", str(tmp_path / "out")) for flag in flags]])
        assert message in said and "\n" not in said
        assert not (tmp_path / "out").exists() and [path.name for path in full.iterdir()] == ["mine.txt"]


def test_vocabulary_of_an_export(trained, tmp_path, capsys):
    """ Words that the texts have keep their embeddings and those of a text of such words are the same bit by bit; other
    words are spelled by single characters; the ids are those of the smaller matrix; the cost is printed. """
    folder, words = trained(), tmp_path / "words.txt"
    words.write_text("The apple stands\n\nbeside the bridge\n")
    model, tokenizer = load_model(folder)
    pieces = tokenizer.get_vocab()
    must = [piece for piece in pieces if piece in tokenizer.all_special_tokens or len(piece.removeprefix("##")) == 1]
    used = set(tokenizer.tokenize("the apple stands beside the bridge")) - set(must)
    run(folder, "--export", "2:16", tmp_path / "out", "--vocab_size", len(must) + len(used), "--texts", words)
    assert f"{len(must) + len(used)} of {len(tokenizer)} vocabulary entries" in (said := capsys.readouterr().out)
    assert "before is 1.000" in said
    small, cut = load_model(tmp_path / "out")
    assert set(cut.get_vocab()) == {*must, *used} and small.config.vocab_size == len(must) + len(used) < len(tokenizer)
    for piece, i in cut.get_vocab().items():
        assert torch.equal(small.word.weight[i], model.word.weight[pieces[piece]])
    assert cut.tokenize("The bridge apple") == tokenizer.tokenize("the bridge apple")
    assert len(tokenizer.tokenize("candle")) < len(cut.tokenize("candle")) and "[UNK]" not in cut.tokenize("candle")
    assert cut("the apple")["input_ids"][0] == cut.cls_token_id and cut.model_max_length == 9
    before, after = (evaluate.embed_texts(m, t, ["the apple bridge"], [2])[2][:, :16]
                     for m, t in ((model, tokenizer), (small, cut)))
    assert torch.equal(before, after)
    run(folder, "--export", "2:16", tmp_path / "less", "--vocab_size", len(must) + 1, "--texts", words)
    less, its_tokenizer = load_model(tmp_path / "less")
    kept, = set(its_tokenizer.get_vocab()) - set(must)
    assert kept == "the"   # the most frequent
    before, after = (evaluate.embed_texts(m, t, ["The apple stands", "beside the bridge"], [2])[2][:, :16]
                     for m, t in ((model, tokenizer), (less, its_tokenizer)))
    cosine = torch.cosine_similarity(before, after).mean()   # over the dims of the size
    assert cosine < 0.99 and f"before is {cosine:.3f}" in capsys.readouterr().out


def test_card(trained, tmp_path, capsys):
    """ The card has the hub's metadata, the results of its sizes alone, and does not replace one of the user's. """
    import yaml   # comes with huggingface_hub
    folder = trained()
    results = [{"task": "stsb", "metric": "Spearman", "layer": n, "dim": dim, "value": n / 10, "n": 9}
               for n, dim in ((1, 8), (2, 16), (3, 48))] + [
              {"task": "stsb", "metric": "Spearman", "layer": None, "dim": None, "value": 0.9, "n": 9},
              {"task": "cost", "metric": "bytes", "layer": 2, "dim": 16, "value": 64, "n": 1}]
    (folder / "eval.json").write_text(json.dumps({"results": results, "per_item": {"stsb": {}}}))
    run(folder, "--export", "2:16", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["library_name"] == "sentence-transformers" and "sentence-similarity" in about["tags"]
    found, = about["model-index"][0]["results"]
    assert found["dataset"]["name"] == "stsb" and found["metrics"][0]["value"] == 0.2
    assert "| 2:16 | 64 | 0.2000 |" in card and "1:8" not in card
    (tmp_path / "out" / "README.md").write_text("mine")
    evaluate.write_card(tmp_path / "out", folder)
    assert (tmp_path / "out" / "README.md").read_text() == "mine" and "stays as it is" in capsys.readouterr().out


def test_card_names_what_the_run_had_from_the_hub(trained, tmp_path, monkeypatch):
    """ Files and folders that the run read are not names of the hub, even if they are gone later, resumed or not. """
    import yaml
    monkeypatch.chdir(tmp_path)
    for hub_model, base_model in (("out/smae", None), ("owner/bert", ["owner/bert"]), ("bert", ["bert"])):
        for gone in ("out/smae", "data/set"):
            (tmp_path / gone).mkdir(parents=True)
        args = finetune_srl.parse_args(["--init_from", hub_model, "--out_dir", "run", "--train_pairs", "docs",
                                        "data/set:x", "data/pairs.csv", "a/set:x:train", "a/set:y"])
        (tmp_path / "data/pairs.csv").touch()
        args.out_dir = str(folder := trained())
        open_run(args).close()
        shutil.rmtree("out")
        shutil.rmtree("data")
        for args.resume in (False, True):
            if args.resume:
                open_run(args).close()
            evaluate.write_card(folder, folder)
            about = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
            assert about.get("base_model") == base_model and about["datasets"] == ["a/set"]


def test_an_export_is_evaluated_after_its_model(trained, tmp_path, capsys):
    """ With --sts the tables of the model and of its export say the same; so does the card. """
    pairs = [{"sentence1": f"the {a}", "sentence2": f"a {b}", "score": i} for i, (a, b) in
             enumerate(zip(("apple", "bridge", "garden", "mirror"), ("garden", "bridge", "lantern", "apple")))]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    folder = trained()
    run(folder, "--export", "2:16", tmp_path / "out", "--sts", tmp_path / "sts.jsonl")
    before, after = (re.findall(r"2:16 +(\S+)", text) for text in capsys.readouterr().out.split(", float32")[1:3])
    assert before[0] == after[0] and f"| {after[0]} |" in (tmp_path / "out" / "README.md").read_text()


def test_search_in_a_folder(trained, tmp_path, monkeypatch, capsys):
    """ Paragraphs of .txt and .md and rows of .jsonl are found, at each size and by the funnel; questions come from the
    prompt; a changed text makes the embeddings again and drops the old ones. """
    folder, notes = trained(), tmp_path / "notes"
    for name in ("sub", "e.txt"):   # the second is a folder, too
        (notes / name).mkdir(parents=True)
    (notes / "a.txt").write_text("the apple\nin the morning\n\n\nthe lantern\n")
    (notes / "sub" / "b.md").write_text("where is the bridge garden")
    (notes / "c.jsonl").write_text('{"title": "candle", "text": "stands beside"}\n')
    (notes / "d.csv").write_text("text\nnot read\n")
    assert [(name.removeprefix(f"{notes}/"), text) for name, text in evaluate.data.load_passages(str(notes))] == [
        ("a.txt:1", "the apple in the morning"), ("a.txt:5", "the lantern"), ("c.jsonl:1", "candle stands beside"),
        ("sub/b.md:1", "where is the bridge garden")]
    run(folder, "--search", "the lantern", "--texts", notes)
    assert capsys.readouterr().out.splitlines()[0] == f"1.000  {notes}/a.txt:5"
    questions = iter(["the lantern", "where is the bridge garden", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    run(folder, "--search", "--texts", notes, "--sizes", "1:8,3:48")
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if " ms" in line]
    assert [lines[i].split(": enc")[0] for i in heads] == ["1:8", "3:48", "1:8, then 3:48"] * 2
    assert [lines[i + 1] for i in heads] == [f"1.000  {notes}/a.txt:5"] * 3 + [f"1.000  {notes}/sub/b.md:1"] * 3
    before = {path.name for path in folder.glob("search-*.npy")}
    (notes / "a.txt").write_text("the mirror\n")
    run(folder, "--search", "the mirror", "--texts", notes, "--sizes", "1:8,3:48")
    assert f"1.000  {notes}/a.txt:1" in capsys.readouterr().out
    after = {path.name for path in folder.glob("search-*.npy")}
    assert len(after) == 2 and not after & before


def test_funnel_by_hand():
    """ The small vectors choose the shortlist and the large ones its order; with one size it is plain search. """
    small, large = torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1.0, 0.0], [4.0, 0.0], [9.0, 0.0]])
    queries = [torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]])]
    scores, docs = evaluate.funnel(queries, [small, large], 5, shortlist=2)
    assert docs.tolist() == [[1, 0]] and scores.tolist() == [[4.0, 1.0]]   # 2 would be first, but is not on the list
    scores, docs = evaluate.funnel(queries[:1], [small], 2)
    assert docs.tolist() == [[0, 1]] and scores.tolist() == [[3.0, 2.0]]


def test_a_run_without_sizes_has_no_card(trained, beir):
    """ A run of plain MLM has no sizes of its own; it is evaluated and exported, and no card
    says that it was trained at several. """
    folder = trained(sizes=())
    (folder / "args.json").write_text("{}")
    run(folder, "--retrieval", beir)
    run(folder, "--export", "1:8", folder / "small")
    assert not [*folder.rglob("README.md")]


@needs("onnxscript")
@needs("onnxruntime")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_onnx(trained, tmp_path, pooling):
    """ The export as ONNX gives our embeddings to 1e-5, padded texts included; int8 and int4 are smaller and close. """
    import to_onnx
    folder = trained(pooling, "cosine")
    run(folder, "--export", "2:16", tmp_path / "out")
    files, want = to_onnx.to_onnx(tmp_path / "out"), ours(tmp_path / "out", (2, 16))
    for name, least in (("float32", 1 - 1e-6), ("int8", 0.95), ("int4", 0.9)):
        found = torch.tensor(to_onnx.embedder(tmp_path / "out", files[name])(TEXTS))
        assert F.cosine_similarity(found, want).min() > least
        if name == "float32":
            torch.testing.assert_close(F.normalize(found.float(), dim=-1), want, rtol=0, atol=1e-5)
        else:
            assert files[name].stat().st_size < files["float32"].stat().st_size
