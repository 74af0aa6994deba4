""" What tools/ makes: the docs corpus, held-out pairs, exports that other programs read, answers, comparisons. """
import io, re, warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import data, evaluate
from conftest import needs, refused, write_jsonl
from evaluate import Collection, embed_texts, record, spearman
from model import load_model, save_pretrained, shorten
from tools import compare, docs, export, hold_out, search

TEXTS = ["the apple", "where is the bridge garden", "the candle stands beside the lantern in the morning and so on"]
SIZES = ((1, 8), (2, 16), (3, 48))

def run(tool, *flags):
    """ a tool in this process """
    return tool.main(tool.parse_args(list(map(str, flags))))

def read(folder):
    """ -> {query: {answers}} of its test set, texts of the corpus, rows of train.jsonl """
    collection = Collection(str(folder))
    (ids, texts, _), = collection.shards()
    test = {collection.queries[q]: {texts[ids.index(key)] for key in grades} for q, grades in collection.qrels.items()}
    return test, texts, list(data.read_rows(f"{folder}/train.jsonl"))

def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}

@pytest.mark.parametrize("tool, flags, message", [
    ("export", ["BERT", "7:8", "TMP/out"], "--sizes 7:8: this model has 3 layers and 48 dims"),
    ("search", ["BERT", "why", "--texts", "TMP/nowhere"], "--texts .*nowhere: neither docs nor a file or folder"),
    ("compare", ["TMP/x.json"], "No such file .*x.json"), ("hold_out", ["TMP/x.csv", "TMP/out"], "x.csv cannot be")])
def test_a_process_says_one_line(bert_folder, tmp_path, tool, flags, message):
    """ What the user can mend ends a tool with status 2 and one line. """
    flags = [flag.replace("BERT", bert_folder).replace("TMP", str(tmp_path)) for flag in flags]
    assert re.match(f"error: .*{message}", refused(f"tools.{tool}", *flags)) and not (tmp_path / "out").exists()

def test_docs(tmp_path, monkeypatch):
    """ Of the documentation whole files are held out: by the checksum of their names m6 and m7, and not m0 and m1. None
    of their texts, whatever its case, punctuation and partner, is trained on, and no query of the 1,000 for tests is
    among the 500 for development. The same packages give the same files; a corpus that is there stays. """
    text = "This second paragraph goes on for at least fifteen words so that it counts as a passage, number {}."
    m6, m7 = ([(f"Query number {m} {i}.", text.format(f"{m} {i}")) for i in range(800)] for m in (6, 7))
    train = [(m6[0][0], text.format(1)), ("query -- NUMBER 7 5", text.format(2)), ("Another query again", m6[3][1]),
             ("Another query upper", m7[4][1].upper()), ("Another query other", m7[9][1].replace(",", ";")),
             ("A query of  its\n    own", text.format(4) + "\n\n    And more."), ("Too short here.", "Returns: bool")]
    modules = {"__init__": [], "m6": m6, "m7": m7, "m0": train, "m1": train[-2:], "tests/m2": [("in a test", text)]}
    (tmp_path / "fakepackage" / "tests").mkdir(parents=True)
    for module, texts in modules.items():
        (tmp_path / "fakepackage" / f"{module}.py").write_text("class C:\n  pass\n" + "".join(
            f'  def f{i}():\n    """{query}\n\n    {passage}"""\n' for i, (query, passage) in enumerate(texts)))
    (tmp_path / "fakepackage" / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(docs, "ProcessPoolExecutor", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(docs.sysconfig, "get_path", lambda _: str(tmp_path / "fakepackage"))   # the real one takes long
    for name in ("docs", "again", "docs"):
        docs.main(str(tmp_path / name), "fakepackage")
    test, corpus, rows = read(tmp_path / "docs")
    dev, passages = set(Collection(f"{tmp_path}/docs:dev").queries.values()), {q: {text} for q, text in m6 + m7}
    want = {"name": "fakepackage.m0.C.f5", "query": "A query of its own", "positive": text.format(4) + " And more."}
    assert rows == [want] and files(tmp_path / "docs") == files(tmp_path / "again") and not [*tmp_path.glob("*.part")]
    assert set(corpus) == set.union(*passages.values()) and test.items() <= passages.items()
    assert len(test) == 1000 and len(dev) == 500 and dev <= set(passages) - set(test)

def test_hold_out(tmp_path):
    """ n rows become a test set, with all their positives. No row with one of its queries, as query or positive, in
    whatever case and punctuation, is trained on; rows that share a passage are; a seed always gives the same files. """
    rows = [{"q": q.format(i), "a": [text.format(i) for text in texts]} for i in range(20) for q, texts in (
        ("query {}", ["text {}", "more {}"]), ("Query, {}!", ["other {}"]), ("third {}", ["TEXT {}."]),
        ("fourth {}", ["any", "QUERY {}"]))]   # the query, the passage again, and the query as a positive
    for name, seed in (("out", 0), ("same", 0), ("other", 1)):
        run(hold_out, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / name, "--n", 30, "--seed", seed,
            "--columns", "query=q", "positive=a")
    folded = lambda texts: set(map(docs.fold, texts))
    (test, corpus, train), want = read(tmp_path / "out"), {}
    for i in np.random.default_rng(0).permutation(80)[:30]:
        want[docs.fold(rows[i]["q"])] = want.get(docs.fold(rows[i]["q"]), set()) | folded(rows[i]["a"])
    assert {docs.fold(query): folded(answers) for query, answers in test.items()} == want and len(want) < 30
    assert len(folded(corpus)) == len(corpus) < sum(map(len, test.values()))   # some were drawn twice
    kept = [row for row in rows if not folded(test) & folded([row["q"], *row["a"]])]
    assert [(row["query"], row["positive"]) for row in train] == [(row["q"], row["a"]) for row in kept]
    assert files(tmp_path / "same") == files(tmp_path / "out") != files(tmp_path / "other")

@pytest.fixture
def trained(bert_folder, tmp_path):
    """ -> a folder of ours: 3 layers x 48, texts cut to 9 tokens, prompts """
    def make(pooling="mean", similarity="cosine", sizes=SIZES):
        model, tokenizer = load_model(bert_folder, max_length=9, pooling=pooling, similarity=similarity, sizes=sizes,
                                      prompts={"query": "where is ", "passage": "the "})
        save_pretrained(model, tokenizer, tmp_path / "trained")
        return tmp_path / "trained"
    return make

def ours(folder, size, prompt=None, texts=TEXTS):
    """ vectors of texts at a size """
    model, tokenizer = load_model(folder)
    embeddings = embed_texts(model, tokenizer, texts, [size[0]], prompt=prompt)[size[0]]
    return shorten(embeddings, size[1], model.config.similarity)

@needs("sentence_transformers")
@pytest.mark.parametrize("pooling, similarity, sizes", [
    ("mean", "cosine", SIZES), ("cls", "dot", SIZES), ("mean", "cosine", ((3, 16),)), ("mean", "dot", ((3, 16),))])
def test_other_programs(trained, tmp_path, monkeypatch, caplog, capfd, pooling, similarity, sizes):
    """ A model, its largest size may be narrower, its exports and the code of its card give our vectors to 1e-5: in
    sentence-transformers, prompts included and without a warning; in transformers, with zeros beyond the dims. """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer
    folder = trained(pooling, similarity, sizes)
    run(export, folder, "all", tmp_path / "all")
    def close(found, size, prompt=None):
        assert found.shape == (3, size[1])
        found = shorten(torch.as_tensor(found), size[1], similarity)
        torch.testing.assert_close(found, ours(folder, size, prompt), rtol=0, atol=1e-5)
    for size, path in [(sizes[-1], folder), *((size, tmp_path / "all" / "{}-{}".format(*size)) for size in sizes)]:
        capfd.readouterr()
        with warnings.catch_warnings(action="error"):
            theirs, bert = SentenceTransformer(str(path), device="cpu"), AutoModel.from_pretrained(path)
        assert "LOAD REPORT" not in "".join(capfd.readouterr()) and "WARNING" not in caplog.text
        normalizes = similarity == "cosine" and size[1] == 48   # it would do so before it slices
        assert (theirs.similarity_fn_name, theirs.max_seq_length, len(theirs)) == (similarity, 9, 2 + normalizes)
        batch = AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, truncation=True, return_tensors="pt")
        hidden, mask = bert(**batch).last_hidden_state.detach(), batch["attention_mask"][:, :, None]
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        assert len(bert.encoder.layer) == size[0] and (path == folder or not pooled[:, size[1]:].any())
        for prompt, found in ((None, pooled[:, :size[1]]), (None, theirs.encode(TEXTS)),
                              ("query", theirs.encode_query(TEXTS)), ("passage", theirs.encode_document(TEXTS))):
            close(found, size, prompt)
    run(export, folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('["a text", "another one"]', "TEXTS"), found := {"TEXTS": TEXTS})
    close(found["embeddings"], sizes[-1])
    close(found["small"], sizes[0])

@pytest.mark.parametrize("added", [[], ["applegarden"]])
def test_vocabulary_of_an_export(trained, tmp_path, capsys, added):
    """ Words of the texts, and added ones, keep their embeddings, and a text of such words its vector bit by bit;
    special tokens stay, other words are spelled by single characters, and the printed cost is that of the size. """
    (tmp_path / "words.txt").write_text("The apple stands\n\nbeside the bridge garden the\n")
    model, tokenizer = load_model(folder := trained())
    model.config.vocab_size += tokenizer.add_tokens(added)
    model.word = torch.nn.Embedding.from_pretrained(torch.cat([model.word.weight, torch.randn(len(added), 48)]))
    save_pretrained(model, tokenizer, folder)
    ids, special = tokenizer.get_vocab(), tokenizer.all_special_tokens
    must = {piece for piece in ids if piece in special + added or len(piece.removeprefix("##")) == 1}
    texts = ["The apple stands", "beside the bridge garden the"]
    kept = must | set(tokenizer.tokenize(" ".join(texts)))
    for name, n in (("out", len(kept)), ("less", len(must) + 1)):
        run(export, folder, "2:16", tmp_path / name, "--texts", tmp_path / "words.txt", "--vocab_size", n)
        before, after = (ours(path, (2, 16), "passage", texts) for path in (folder, tmp_path / name))
        cosine, said = (before * after).sum(-1).mean(), capsys.readouterr()
        assert f"{n} of {len(ids)} vocabulary" in said.out and f"before is {cosine:.3f}" in said.out and not said.err
    assert cosine < 0.999 and set(load_model(tmp_path / "less")[1].get_vocab()) - must == {"the"}   # the most frequent
    (small, cut), texts = load_model(tmp_path / "out"), ["beside the apple bridge", *added]
    assert set(cut.get_vocab()) == kept and len(cut.get_vocab()) == small.config.vocab_size < len(ids)
    assert all(torch.equal(small.word.weight[i], model.word.weight[ids[piece]]) for piece, i in cut.get_vocab().items())
    assert torch.equal(ours(tmp_path / "out", (2, 16), texts=texts), ours(folder, (2, 16), texts=texts))
    assert (small.config.sizes, len(small.blocks), cut.all_special_tokens) == (((2, 16),), 2, special)
    assert len(tokenizer.tokenize("candle")) < len(cut.tokenize("candle")) and "[UNK]" not in cut.tokenize("candle")

def test_card(trained, tmp_path, capsys, monkeypatch):
    """ The card has the hub's metadata, names of the hub and not of folders, and the results of its sizes alone; one of
    the user's stays, and a model without sizes has none. A size that the model was not trained at has a warning. """
    import yaml   # comes with huggingface_hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "set").mkdir(parents=True)
    results = [record("stsb", "Spearman", size, size[0] / 10, 9) for size in SIZES]
    results += [record("stsb", "Spearman", evaluate.BM25, 0.9, 9), record("cost", "bytes", (2, 16), 64, 1)]
    write_jsonl(trained() / "eval.json", [{"results": results}])
    write_jsonl(tmp_path / "trained" / "args.json", [
        {"init_from": "owner/bert", "train_pairs": ["docs", "data/set", "a/set:x:train"]}])
    run(export, "trained", "2:16,3:17", "out")
    assert capsys.readouterr().err == "warning: trained was not trained at 3:17, which may be worse\n"
    about = yaml.safe_load((card := (tmp_path / "out" / "2-16" / "README.md").read_text()).split("---\n")[1])
    assert about["library_name"] == "sentence-transformers" and "sentence-similarity" in about["tags"]
    assert (about["base_model"], about["datasets"]) == (["owner/bert"], ["a/set"])
    assert [found["metrics"][0]["value"] for found in about["model-index"][0]["results"]] == [0.2]
    assert re.findall(r"\| \d.*", card) == ["| 2:16 | stsb | Spearman | 0.2000 |"]
    (theirs := tmp_path / "out" / "3-17" / "README.md").write_text("mine")
    run(export, theirs.parent)
    assert theirs.read_text() == "mine"
    run(export, trained(sizes=()), "1:8", "small")
    assert not (tmp_path / "small" / "README.md").exists()

@pytest.fixture
def notes(tmp_path, monkeypatch):
    """ a folder of texts; the cache of their embeddings is in tmp_path """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    (tmp_path / "notes" / "sub").mkdir(parents=True)
    for name, text in {"a.txt": "the apple\nin the morning\n\n\nthe lantern\n", "sub/b.md": TEXTS[1],
                       "c.jsonl": '{"title": "candle", "text": "stands beside"}\n', "d.csv": "text\nx\n"}.items():
        (tmp_path / "notes" / name).write_text(text)
    return tmp_path / "notes"

def test_search_in_a_folder(trained, notes, monkeypatch, capsys):
    """ Paragraphs of .txt and .md and rows of .jsonl are found, at each size and by the funnel, with the model's
    prompts; the user is asked for questions until an empty line or the end. """
    names, texts = zip(*search.load_passages(str(notes)))
    assert " ".join(names).replace(f"{notes}/", "") == "a.txt:1 a.txt:2 c.jsonl:1 sub/b.md:1"
    assert texts == ("the apple in the morning", "the lantern", "candle stands beside", TEXTS[1])
    query = ours(folder := trained(), (3, 48), "query", ["the lantern"])
    scores, order = (query @ ours(folder, (3, 48), "passage", list(texts)).T)[0].sort(descending=True)
    run(search, folder, "the lantern", "--texts", notes)
    values, found = zip(*re.findall(r"^(\d.\d{3})  (.*)$", capsys.readouterr().out, re.M))
    assert [*found] == [names[i] for i in order] and [*values] == [f"{value:.3f}" for value in scores]
    for end in ("\n\nand this is not read\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"the lantern\n{TEXTS[1]}{end}"))
        run(search, folder, "--texts", notes, "--sizes", "1:8,3:48")
        found = re.findall("(\\d.*): encoding .* ms, search in 4 passages", capsys.readouterr().out)
        assert found == ["1:8", "3:48", "1:8, then 3:48"] * 2

def test_passages_are_embedded_again_if_they_must(trained, notes, monkeypatch):
    """ Embeddings are found again until a layer, a weight, a prompt, the length or a text is another. """
    model, tokenizer = load_model(folder := trained())
    made, embed = [], search.embed_texts
    monkeypatch.setattr(search, "embed_texts", lambda *args, prompt: made.extend(args[2] * (prompt == "passage"))
                        or embed(*args, prompt=prompt))
    def count(size="3:48"):
        made.clear()
        save_pretrained(model, tokenizer, folder)
        run(search, folder, "the lantern", "--texts", notes, "--sizes", size)
        return len(made)
    assert [count(), count(), count("3:8"), count("2:8"), count()] == [4, 0, 0, 4, 0]
    for change in (lambda: model.blocks[0].up.bias.data[0].add_(0.1), lambda: model.config.prompts.update(passage="a "),
                   lambda: (notes / "a.txt").write_text("the apple\nin the morning\n\n\nthe mirror\n"),
                   lambda: setattr(tokenizer, "model_max_length", 5)):
        change()
        assert [count(), count()] == [4, 0]

def test_funnel_by_hand():
    """ The small vectors choose the shortlist and the large ones its order; with one size it is plain search. """
    small, large = torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1.0, 0.0], [4.0, 0.0], [9.0, 0.0]])
    queries = [torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]])]
    scores, found = search.funnel(queries, [small, large], 5, shortlist=2)
    assert found.tolist() == [[1, 0]] and scores.tolist() == [[4.0, 1.0]]   # 2 would be first, but is not on the list
    assert [x.tolist() for x in search.funnel(queries[:1], [small], 2)] == [[[3.0, 2.0]], [[0, 1]]]

@pytest.fixture
def results_file(tmp_path):
    """ name, {size: MRR@10s}, {size: cosines}, gold -> a file as of evaluate.py; nDCG@10 is half of MRR@10 """
    def write(name, sizes, cosines={}, gold=(), ids=range(200)):
        results, items = [], {"ids": list(ids)}
        for label, values in {**sizes, "BM25": [0.1] * 200}.items():
            size = tuple(map(int, label.split(":"))) if label != "BM25" else evaluate.BM25
            items[label] = {"MRR@10": list(values), "nDCG@10": [value / 2 for value in values]}
            results += [record("set", key, size, float(np.mean(v)), 200) for key, v in items[label].items()]
            results += [record("cost", "MFLOP/token", size, size[0], 1)] * (label != "BM25")
        sts = {"gold": list(gold)} | {label: {"Spearman": list(values)} for label, values in cosines.items()}
        content = {"model": f"out/{name}", "results": results, "per_item": {"set": items, "sts": sts}}
        return write_jsonl(tmp_path / f"{name}.json", [content])
    return write

def test_compare_marks_what_is_significant(results_file, capsys):
    """ A shift of every query or of the correlation is marked, noise is not; the correction counts the chosen lines.
    Sizes are paired from small to large, whatever the order of joined files and within them. """
    rng = np.random.default_rng(0)
    gold, noise, base, gain = *rng.normal(size=(2, 400)), *rng.normal(size=(2, 200))
    gain += 2.5 * gain.std() / 200**0.5 - gain.mean()   # t = 2.5: p = .013, above .05 / 6 and below .05 / 2
    a = results_file("a", {"10:8": base, "2:4": base}, {"10:8": gold + noise, "2:4": gold + noise}, gold)
    b = results_file("b", {"1:9": base + gain}, {"1:9": gold + 0.9 * noise}, gold)
    c = results_file("c", {"12:8": base + noise[:200]}, {"12:8": gold + 1.001 * noise}, gold)
    run(compare, a, f"other={c},{b}")
    head, *lines, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["a", "other"] and "0.05 / 6 comparisons" in note
    assert lines[0].split() == f"set MRR@10 2:4 {base.mean():.4f} 1:9 {(base + gain).mean():.4f}".split()
    assert lines[4].split()[3] == f"{spearman(gold + noise, gold):.4f}"
    assert [line.split()[2::2] for line in lines] == [["2:4", "1:9"], ["10:8", "12:8"]] * 3
    assert [line.endswith("*") for line in lines] == [False] * 4 + [True, False]
    run(compare, a, f"{b},{c}", "--metrics", "MRR@10")
    assert [line.endswith("*") for line in capsys.readouterr().out.splitlines()] == [False, True, False, False]

def test_bootstrap_equals_a_plain_loop():
    """ The p-value of two Spearmans is that of the spread of their difference, resample by resample, in pairs: a small
    gain on every pair counts although each Spearman varies more. Equal values and three pairs are not significant. """
    from scipy.stats import norm
    rng, draw = np.random.default_rng(1), np.random.default_rng(0)
    gold, noise = np.round(rng.normal(size=300)), rng.normal(size=300)   # with ties
    x, y = (gold + noise).tolist(), (gold + 0.93 * noise).tolist()
    rows = [row for _ in range(10) for row in draw.integers(0, 300, size=(100, 300))]   # as scipy draws its batches
    first, second = ([spearman(np.array(values)[row], gold[row]) for row in rows] for values in (x, y))
    difference = abs(spearman(x, gold) - spearman(y, gold))
    want = 2 * norm.sf(difference / np.std(np.subtract(first, second), ddof=1))
    assert compare.p_value("Spearman", x, y, gold.tolist()) == pytest.approx(want, rel=1e-9)
    assert 0 < want < 1e-3 and difference < np.std(first) and compare.p_value("Spearman", x, x, gold.tolist()) == 1
    assert compare.p_value("Spearman", [0.1, 0.2, 0.3], [0.1, 0.3, 0.2], [1, 2, 3]) > 0.05

@pytest.mark.parametrize("tool, flags, message", [
    (hold_out, "rows.jsonl out --n 1", "--n 1: leaves 9 of 10"), (hold_out, "rows.jsonl out --n 9", "leaves 1 of 10"),
    (hold_out, "rows.jsonl full", "full: something is there already"), (hold_out, "scored.jsonl out", "scored pairs"),
    (export, "trained 1:99 out", "--sizes 1:99"), (export, "trained 1:8 full", "full: something is there already"),
    (export, "trained 1:8", "the new folder"), (export, "trained big out", "big"),
    (export, "trained 1:8 out --vocab_size 20 --texts full", "special tokens and single characters must stay"),
    (export, "trained 1:8 out --vocab_size 9999 --texts full", "there are 148 entries"),
    (compare, "a.json c.json", "set is not the same set"), (compare, "a.json,c.json", "set is not the same set"),
    (compare, "a.json x=a.json,b.json", "1, 2 sizes; evaluate"), (compare, "b.json,b.json", "two files have set at"),
    (compare, "a.json b.json --metrics Spearman", "no task and metric is in all files"),
    (compare, "a.json bad.json", "bad.json: was not written by evaluate.py")])
def test_what_is_refused(trained, results_file, tmp_path, monkeypatch, capsys, tool, flags, message):
    """ Fewer than two pairs on a side, folders that are there, files that do not fit: nothing is written. """
    monkeypatch.chdir(trained().parent)
    write_jsonl(tmp_path / "rows.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(10)])
    write_jsonl(tmp_path / "scored.jsonl", [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(10)])
    for name, size, ids in (("a", "1:8", range(200)), ("b", "2:4", range(200)), ("c", "3:8", "x" * 200)):
        results_file(name, {size: [0.25] * 200}, ids=ids)
    (tmp_path / "full").mkdir()
    write_jsonl(tmp_path / "full" / "a.txt", [write_jsonl(tmp_path / "bad.json", [{"per_item": 5}])])
    before = files(tmp_path)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        run(tool, *flags.split())
    assert message in str(error.value) + capsys.readouterr().err and files(tmp_path) == before

@needs("matplotlib")
def test_plot(results_file, tmp_path):
    """ A line for each of the results, MFLOP against the chosen metric x 100, a level for BM25, and labels as text of
    the SVG; what is not there is refused. """
    from matplotlib import pyplot
    a = results_file("a", {"2:16": [0.4, 0.6] * 100, "1:8": [0.5, 0] * 100})
    b, c = results_file("b", {"1:8": [0.1, 0.5] * 100}), results_file("c", {"3:9": [0.9, 0.5] * 100})
    run(compare, a, f"both={b},{c}", "--metrics", "MRR@10", "--plot", tmp_path / "f.svg")
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in pyplot.gcf().axes[0].lines]
    pyplot.close("all")
    # the second is the level, in shares of the width
    assert np.array(lines) == pytest.approx(np.array([[[1, 2], [25, 50]], [[0, 1], [10, 10]], [[1, 3], [30, 70]]]))
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "f.svg").read_text()))
    assert {"a", "both", "BM25", "1:8", "32 B", "2:16", "64 B"} <= texts
    with pytest.raises(ValueError, match="--plot: a lacks Spearman"):
        run(compare, a, "--metrics", "Spearman", "--plot", tmp_path / "g.svg")
