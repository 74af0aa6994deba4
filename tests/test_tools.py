""" What tools/ makes: held-out pairs, word matching, exports that other programs read, answers, comparisons. """
import io, json, math, re, warnings

import numpy as np
import pytest
import torch

import data, evaluate
from conftest import needs, write_jsonl
from evaluate import Collection, embed_texts, record, spearman
from model import load_model, save_pretrained, shorten
from tools import bm25, compare, docs, export, hold_out, search

TEXTS = ["the apple", "where is the bridge garden", "the candle stands beside the lantern in the morning and so on"]
SIZES = ((1, 8), (2, 16), (3, 48))
WAYS = {"sizes", "pooling", "similarity", "query_prompt", "passage_prompt"}   # what our config has beside BERT's

def run(tool, *flags):
    """ a tool in this process """
    return tool.main(tool.parser.parse_args(list(map(str, flags))))

def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}

def test_hold_out(tmp_path):
    """ n rows become a test set, with all their positives. No row with one of its queries, as query or positive, in
    whatever case and punctuation, is trained on; rows that share a passage are; the files are those of the seed. """
    rows = [{"q": q.format(i), "a": [text.format(i) for text in texts]} for i in range(20) for q, texts in (
        ("query {}", ["text {}", "more {}"]), ("Query, {}!", ["other {}"]), ("third {}", ["TEXT {}."]),
        ("fourth {}", ["any", "QUERY {}"]))]   # the query, the passage again, and the query as a positive
    source, folded = write_jsonl(tmp_path / "rows.jsonl", rows), lambda texts: set(map(docs.fold, texts))
    for name, seed in (("out", 0), ("same", 0), ("other", 1)):
        run(hold_out, source, tmp_path / name, "--n", 30, "--seed", seed, "--columns", "query=q", "positive=a")
    ((ids, texts, _),) = (collection := Collection(str(tmp_path / "out"))).shards()
    passages, want = dict(zip(ids, map(docs.fold, texts))), {}
    for i in np.random.default_rng(0).permutation(80)[:30]:
        want[docs.fold(rows[i]["q"])] = want.get(docs.fold(rows[i]["q"]), set()) | folded(rows[i]["a"])
    assert want == {docs.fold(collection.queries[q]): {passages[key] for key in grades}
                    for q, grades in collection.qrels.items()}
    assert len(want) < 30 and len(set(passages.values())) == len(ids)   # some were drawn twice
    kept = [(row["q"], row["a"]) for row in rows if not want.keys() & folded([row["q"], *row["a"]])]
    assert [(row["query"], row["positive"]) for row in data.read_rows(f"{tmp_path}/out/train.jsonl")] == kept
    assert files(tmp_path / "same") == files(tmp_path / "out") != files(tmp_path / "other")

@pytest.fixture
def trained(bert_folder, tmp_path):
    """ -> a folder of ours: 3 layers x 48, texts cut to 9 tokens, prompts """
    def make(pooling="mean", similarity="cosine", sizes=SIZES):
        model, tokenizer = load_model(bert_folder, max_length=9, pooling=pooling, similarity=similarity, sizes=sizes,
                                      query_prompt="where is ", passage_prompt="the ")
        save_pretrained(model, tokenizer, tmp_path / "trained")
        write_jsonl(tmp_path / "trained" / "args.json", [{}])
        return tmp_path / "trained"
    return make

def ours(folder, size, prompt="", texts=TEXTS):
    """ vectors of texts at a size; "query_prompt" or "passage_prompt" goes before them """
    model, tokenizer = load_model(folder)
    embeddings = embed_texts(model, tokenizer, texts, [size[0]], prompt=getattr(model.config, prompt, ""))[size[0]]
    return shorten(embeddings, size[1], model.config.similarity)

def test_bm25_by_hand(recwarn):
    """ BM25 gives the numbers of a worked example; where there is no word all is 0, without a warning. """
    # 3 documents of 2, 1 and 3 words (mean 2); "tea" is in two of them: idf = log(1 + 1.5 / 2.5) = log 1.6
    # document 1: tf 1, norm = 1.2 * (0.25 + 0.75 * 2 / 2) = 1.2, so 2.2 / 2.2
    # document 3: tf 2, norm = 1.2 * 1.375 = 1.65, so 4.4 / 3.65
    scores = bm25.bm25(["Green tea", "coffee", "tea, tea_pot"], ["TEA?", "milk", "tea tea"])
    assert scores[0] == pytest.approx([math.log(1.6), 0, math.log(1.6) * 4.4 / 3.65])
    assert scores[1].tolist() == [0, 0, 0] and scores[2] == pytest.approx(2 * scores[0])
    assert not bm25.bm25(["...", ""], ["?", "a"]).any() and not recwarn.list

def test_bm25_with_and_without_a_model(trained, beir, tmp_path, capsys):
    """ Its values are printed and its ranking is a TREC run, whose lines are the hits; so are a model's, of each size,
    as evaluate.py finds them. """
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td3\t1\nq2\td2\t1\n")
    run(bm25, beir, "--runs", tmp_path / "alone")   # finds d1 before d3
    assert "BM25 on beir: MRR@10 0.7500, nDCG@10 0.8155, Recall@100 1.0000\n" in capsys.readouterr().out
    run(bm25, f"{beir}:dev", "--runs", tmp_path / "runs", "--model", folder := trained())
    collection = Collection(f"{beir}:dev")
    found = evaluate.search_corpus(*load_model(folder), collection, SIZES, "float32")
    found = {"BM25": bm25.match_words(collection)} | {"{}-{}".format(*size): hits for size, hits in found.items()}
    assert [*files(tmp_path / "alone")] == ["beir-BM25.run"] and len(files(tmp_path / "runs")) == len(found) == 4
    for label, (hits,) in found.items():
        lines = [line.split() for line in open(tmp_path / f"runs/beir-dev-{label}.run")]
        assert lines == [["q1", "Q0", document, str(rank), f"{value:.9g}", f"beir-dev-{label}"]
                         for rank, (value, document) in enumerate(hits, start=1)]

@needs("sentence_transformers")
@pytest.mark.parametrize("pooling, similarity, sizes", [
    ("mean", "cosine", SIZES), ("cls", "dot", SIZES), ("mean", "cosine", ((3, 16),)), ("mean", "dot", ((3, 16),))])
def test_other_programs(trained, tmp_path, monkeypatch, caplog, capfd, pooling, similarity, sizes):
    """ A model, its largest size may be narrower, its exports and the code of its card give our vectors to 1e-5: in
    sentence-transformers, prompts included and without a warning; in transformers, with zeros beyond the dims. What
    sentence-transformers saves gives them here again. """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer
    folder = trained(pooling, similarity, sizes)
    run(export, folder, "all", tmp_path / "all")
    def close(found, size, prompt="", folder=folder):
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
        close(pooled, size)
        theirs.save(str(again := tmp_path / f"again-{size[0]}"))
        config = json.loads((again / "config.json").read_text())   # theirs, without what is ours
        write_jsonl(again / "config.json", [{key: value for key, value in config.items() if key not in WAYS}])
        for prompt, found in (("", theirs.encode(TEXTS)), ("query_prompt", theirs.encode_query(TEXTS)),
                              ("passage_prompt", theirs.encode_document(TEXTS))):
            assert found.shape == (3, size[1])
            close(found, size, prompt)
            close(found, size, prompt, again)
    run(export, folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('["a text", "another one"]', "TEXTS"), found := {"TEXTS": TEXTS})
    close(found["embeddings"], sizes[-1])
    close(found["small"], sizes[0])
    (folder / "README.md").write_text("mine")   # a card of the user's stays
    run(export, folder)
    assert (folder / "README.md").read_text() == "mine"

def test_vocabulary_of_an_export(trained, tmp_path, capsys):
    """ Words of the texts, and added ones, keep their embeddings, and a text of such words its vector bit by bit;
    special tokens stay, other words are spelled by single characters, and the printed cost is that of the size. """
    (tmp_path / "words.txt").write_text("The apple stands\n\nbeside the bridge garden apple\n")
    (model, tokenizer), added = load_model(folder := trained()), ["applegarden"]
    model.config.vocab_size += tokenizer.add_tokens(added)
    model.word = torch.nn.Embedding.from_pretrained(torch.cat([model.word.weight, torch.randn(1, 48)]))
    save_pretrained(model, tokenizer, folder)
    ids, special = tokenizer.get_vocab(), tokenizer.all_special_tokens
    must = {piece for piece in ids if piece in special + added or len(piece.removeprefix("##")) == 1}
    texts = ["The apple stands", "beside the bridge garden apple"]
    must |= {"where", "is", "the"}   # the prompts
    kept = must | set(tokenizer.tokenize(" ".join(texts)))
    for name, n in (("out", len(kept)), ("less", len(must) + 1)):
        run(export, folder, "2:16", tmp_path / name, "--texts", tmp_path / "words.txt", "--vocab_size", n)
        before, after = (ours(path, (2, 16), "passage_prompt", texts) for path in (folder, tmp_path / name))
        cosine, said = (before * after).sum(-1).mean(), capsys.readouterr().out
        assert f"{n} of {len(ids)} vocabulary" in said and f"before is {cosine:.3f}" in said
    assert cosine < 0.999 and set(load_model(tmp_path / "less")[1].get_vocab()) - must == {"apple"}
    (small, cut), texts = load_model(tmp_path / "out"), ["beside the apple bridge", *added]
    assert set(cut.get_vocab()) == kept and len(kept) == small.config.vocab_size and cut.all_special_tokens == special
    assert all(torch.equal(small.word.weight[i], model.word.weight[ids[piece]]) for piece, i in cut.get_vocab().items())
    assert torch.equal(ours(tmp_path / "out", (2, 16), texts=texts), ours(folder, (2, 16), texts=texts))
    assert len(tokenizer.tokenize("candle")) < len(cut.tokenize("candle")) and "[UNK]" not in cut.tokenize("candle")

def test_card(trained, tmp_path, capsys, monkeypatch):
    """ The card has the hub's metadata, names of the hub and not of folders, and the results of its sizes alone; a
    model that was not trained here has none. A size that the model was not trained at has a warning. """
    import yaml   # comes with huggingface_hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "set").mkdir(parents=True)
    results = [record("stsb", "Spearman", size, size[0] / 10, 9) for size in SIZES]
    results.append(record("cost", "bytes", (2, 16), 64, 1))
    write_jsonl(trained() / "eval.json", [{"results": results}])
    write_jsonl(tmp_path / "trained" / "args.json", [
        {"init_from": "owner/bert", "train_pairs": ["docs", "data/set", "a/set:x:train"]}])
    run(export, "trained", "2:16,3:17", "out")
    assert capsys.readouterr().err == "warning: trained was not trained at 3:17, which may be worse\n"
    about = yaml.safe_load((card := (tmp_path / "out" / "2-16" / "README.md").read_text()).split("---\n")[1])
    assert about["library_name"] == "sentence-transformers" and "sentence-similarity" in about["tags"]
    assert (about["base_model"], about["datasets"]) == (["owner/bert"], ["a/set"])
    assert [found["metrics"][0]["value"] for found in about["model-index"][0]["results"]] == [0.2]
    assert re.findall(r"^\d.*", card, re.M) == ["2:16   0.2000"]
    (tmp_path / "trained" / "args.json").unlink()
    run(export, "trained", "1:8", "small")
    assert not (tmp_path / "small" / "README.md").exists()

@pytest.fixture
def notes(tmp_path, monkeypatch):
    """ a folder of texts; the cache of their embeddings is in tmp_path """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    (folder := tmp_path / "notes").mkdir()
    (folder / "a.txt").write_text("the apple\nin the morning\n\n\nthe lantern\n")
    (folder / "b.md").write_text(TEXTS[1])
    write_jsonl(folder / "c.jsonl", [{"title": "candle", "text": "stands beside"}])
    (folder / "d.csv").write_text("text\nx\n")
    return folder

def test_search_in_a_folder(trained, notes, monkeypatch, capsys):
    """ Paragraphs of .txt and .md and rows of .jsonl are found, at each size and by the funnel, with the model's
    prompts; the user is asked for questions until an empty line. """
    names, texts = zip(*search.load_passages(str(notes)))
    assert " ".join(names).replace(f"{notes}/", "") == "a.txt:1 a.txt:2 b.md:1 c.jsonl:1"
    assert texts == ("the apple in the morning", "the lantern", TEXTS[1], "candle stands beside")
    query = ours(folder := trained(), (3, 48), "query_prompt", ["the lantern"])
    scores, order = (query @ ours(folder, (3, 48), "passage_prompt", texts).T)[0].sort(descending=True)
    run(search, folder, "the lantern", "--texts", notes)
    values, found = zip(*re.findall(r"^(\d.\d{3})  (.*)$", capsys.readouterr().out, re.M))
    assert [*found] == [names[i] for i in order] and [*values] == [f"{value:.3f}" for value in scores]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"the lantern\n{TEXTS[1]}\n\nand this is not read\n"))
    run(search, folder, "--texts", notes, "--sizes", "1:8,3:48")
    found = re.findall("(\\d.*): encoding .* ms, search in 4 passages", capsys.readouterr().out)
    assert found == ["1:8", "3:48", "1:8, then 3:48"] * 2
    with pytest.raises(ValueError, match="the question: 100% of the tokens are"):
        run(search, folder, "ቡና", "--texts", notes)

def test_passages_are_embedded_again_if_they_must(trained, notes, capsys):
    """ Embeddings are found again until a layer, a weight, a prompt, a text or the length is another. Texts that the
    length cuts are counted. """
    model, tokenizer = load_model(folder := trained())
    def count(size="3:48"):
        save_pretrained(model, tokenizer, folder)
        run(search, folder, "the lantern", "--texts", notes, "--sizes", size)
        return len([*data.CACHE.rglob("*.arrow")])
    assert [count(), count(), count("3:8"), count("2:8"), count()] == [1, 1, 1, 2, 2]
    model.blocks[0].up.bias.data[0].add_(0.1)
    assert count() == 3
    model.config.passage_prompt = "a "
    assert count() == 4
    (notes / "a.txt").write_text("the apple\nin the morning\n\n\nthe mirror\n")
    assert count() == 5 and "are cut" not in capsys.readouterr().out
    tokenizer.model_max_length = 5
    assert [count(), count()] == [6, 6] and "3 of 4 texts are longer than 5 tokens" in capsys.readouterr().out

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
        for label, values in sizes.items():
            size = tuple(map(int, label.split(":")))
            items[label] = {"MRR@10": list(values), "nDCG@10": [value / 2 for value in values]}
            results += [record("set", key, size, float(np.mean(v)), 200) for key, v in items[label].items()]
            results.append(record("cost", "MFLOP/token", size, size[0], 1))
        sts = {"gold": list(gold)} | {label: {"Spearman": list(values)} for label, values in cosines.items()}
        content = {"model": f"out/{name}", "results": results, "per_item": {"set": items, "sts": sts}}
        return write_jsonl(tmp_path / f"{name}.json", [content])
    return write

def test_compare_marks_what_is_significant(results_file, capsys):
    """ A shift of every query or of the correlation is marked, noise is not; the correction counts the chosen lines
    and the files. Sizes are paired from small to large, whatever the order of joined files and within them. """
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
    run(compare, a, *3 * [f"{b},{c}"], "--metrics", "MRR@10")   # 6 comparisons again
    assert capsys.readouterr().out.count("*") == 1              # that of the note

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
    (export, "trained 1:8 out --vocab_size 20 --texts full", "special tokens and single characters must stay"),
    (bm25, "full --model trained", "--model is for --runs"), (search, "trained a --texts missing", "neither docs nor"),
    (compare, "a.json c.json", "set is not the same set"), (compare, "a.json,c.json", "set is not the same set"),
    (compare, "a.json x=a.json,b.json", "1, 2 sizes; evaluate"), (compare, "b.json,b.json", "two files have set at"),
    (compare, "a.json b.json --metrics Spearman", "no task and metric is in all files"),
    (compare, "a.json bad.json", "bad.json: was not written by evaluate.py")])
def test_what_is_refused(trained, results_file, tmp_path, monkeypatch, tool, flags, message):
    """ Fewer than two pairs on a side, folders that are there, files that do not fit: nothing is written. """
    monkeypatch.chdir(trained().parent)
    write_jsonl(tmp_path / "rows.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(10)])
    write_jsonl(tmp_path / "scored.jsonl", [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(10)])
    for name, size, ids in (("a", "1:8", range(200)), ("b", "2:4", range(200)), ("c", "3:8", "x" * 200)):
        results_file(name, {size: [0.25] * 200}, ids=ids)
    (tmp_path / "full").mkdir()
    write_jsonl(tmp_path / "full" / "a.txt", [write_jsonl(tmp_path / "bad.json", [{"per_item": 5}])])
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tool, *flags.split())
    assert files(tmp_path) == before

@needs("matplotlib")
def test_plot(results_file, tmp_path):
    """ A line for each of the results, MFLOP against the chosen metric x 100, a level for each of --levels, and labels
    as text of the SVG; what is not there is refused. """
    from matplotlib import pyplot
    a = results_file("a", {"2:16": [0.4, 0.6] * 100, "1:8": [0.5, 0] * 100})
    b, c = results_file("b", {"1:8": [0.1, 0.5] * 100}), results_file("c", {"3:9": [0.9, 0.5] * 100})
    figure = "--plot", tmp_path / "f.svg", "--levels", "BM25=48.8", "k=1=12"
    run(compare, a, f"both={b},{c}", "--metrics", "MRR@10", *figure)
    lines = [[*line.get_xdata(), *line.get_ydata()] for line in pyplot.gcf().axes[0].lines]
    pyplot.close("all")   # of the levels x is in shares of the width
    assert lines == [pytest.approx(line) for line in (
        [1, 2, 25, 50], [1, 3, 30, 70], [0, 1, 48.8, 48.8], [0, 1, 12, 12])]
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "f.svg").read_text()))
    assert {"a", "both", "BM25", "k=1", "1:8", "32 B", "2:16", "64 B"} <= texts
    with pytest.raises(ValueError, match="--plot: a lacks Spearman"):
        run(compare, a, "--metrics", "Spearman", "--plot", tmp_path / "g.svg")

@needs("matplotlib")
def test_plot_log(tmp_path):
    """ A line for the smallest size and one for the largest, of InfoNCE alone. """
    from tools import plot_log
    rows = [{"step": n, "loss": 1, "nce 1:8": 4 / n, "kl 1:8": 7, "nce 2:16": 3, "nce 3:48": 2} for n in (1, 2)]
    write_jsonl(tmp_path / "log.jsonl", [*rows, {"step": 2, "dev 1:8": 0.5}])
    run(plot_log, tmp_path, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert ">nce 1:8<" in drawn and ">nce 3:48<" in drawn and "kl" not in drawn and "2:16" not in drawn
