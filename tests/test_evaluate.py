""" Metrics are trec_eval's, search is exact, embeddings ignore batches, and mistakes show before the work. """
import json, math, re, shutil
from itertools import combinations, product

import numpy as np
import pytest
import torch

import data, evaluate
from conftest import needs, write_jsonl
from evaluate import Collection, embed_ids, embed_texts, record, search_corpus
from model import load_model, save_pretrained, score
from tools.bm25 import match_words, write_run

JUDGED = "query-id\tcorpus-id\tscore\n"

@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """ a folder with a small model of ours, 4 layers x 48, for two sizes """
    model.config.sizes, model.word = ((1, 8), (4, 48)), torch.nn.Embedding(len(tokenizer), 48)
    model.config.vocab_size = len(tokenizer)
    save_pretrained(model, tokenizer, tmp_path / "m")
    return tmp_path / "m"

@pytest.fixture
def sts_file(tmp_path):
    """ 30 pairs of sentences """
    nouns = enumerate(zip(("apple", "bridge", "garden") * 10, ("apple", "garden") * 15))
    return write_jsonl(tmp_path / "mine.jsonl", [
        {"sentence1": f"the {a} in the morning", "sentence2": f"a {b}", "score": i % 6} for i, (a, b) in nouns])

def run(*flags):
    """ evaluate.py in this process """
    evaluate.main(evaluate.parse_args([*map(str, flags), "--device", "cpu"]))

def change_config(folder, **fields):
    """ fields of FOLDER/config.json get other values; None deletes one """
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))

def make_set(folder, documents, queries, judged):
    """ documents, queries {id: text}; judged [(query, document, grade)] -> a folder in BEIR layout """
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        write_jsonl(folder / f"{name}.jsonl", [{"_id": key, "text": text} for key, text in texts.items()])
    (folder / "qrels" / "test.tsv").write_text(JUDGED + "".join("\t".join(map(str, row)) + "\n" for row in judged))
    return str(folder)

D = [f"d{i}" for i in range(200)]
MIXED = {"b": 1, "d": 3, "z": 2, "c": 0, "a": -1}   # z is not found; a and c are judged as wrong
DCG, IDEAL = 1 / math.log2(3) + 3 / math.log2(5), 3 + 2 / math.log2(3) + 1 / 2

@pytest.mark.parametrize("metric, ranked, grades, value", [
    ("MRR@10", list("abcd"), MIXED, 1 / 2), ("MRR@10", D, {"d9": 1}, 1 / 10), ("MRR@10", D, {"d10": 1}, 0),
    ("nDCG@10", list("abcd"), MIXED, DCG / IDEAL), ("nDCG@10", D, {"d10": 1}, 0),
    ("nDCG@10", D[:10], dict.fromkeys(D, 1), 1), ("nDCG@10", D, {"d0": 0, "d1": -2}, 0),
    ("Recall@100", list("abcd"), MIXED, 2 / 3), ("Recall@100", D, {"d99": 1}, 1), ("Recall@100", D, {"d100": 1}, 0),
    ("Recall@100", D, dict.fromkeys(D, 1), 1 / 2), ("Recall@100", D, {"d0": 0}, 0)])
def test_metrics_by_hand(metric, ranked, grades, value):
    """ Each metric has its value of a worked example, cuts where its name says; grades of 0 or less are wrong. """
    assert evaluate.METRICS[metric](ranked, grades) == pytest.approx(value, abs=1e-12)

def test_embed_ids_ignores_batches_order_and_dropout(model, texts, monkeypatch):
    """ Neither the size nor the order of the batches changes an embedding, in float64; equal batches give equal bits.
    In the middle of a training there is no dropout, and the training goes on with it. One bad number is an error. """
    def embed(texts, batch_tokens):
        monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
        return embed_ids(model, texts, [2, 4])
    lengths = list(map(len, texts))
    different = [texts[lengths.index(n)] for n in set(lengths)]   # no two of one length
    once, turned = embed(different, 30), embed(different[::-1], 30)
    model.dropout.p = 0.5
    in_training = embed(different, 30) if model.train() else None
    assert model.training
    for layer in (2, 4):
        assert torch.equal(turned[layer].flip(0), once[layer]) and torch.equal(in_training[layer], once[layer])
    model.double()
    one, turned = embed(texts, 1), embed(texts[::-1], 40)
    for layer, whole in embed(texts, 8192).items():
        torch.testing.assert_close(one[layer], whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(turned[layer].flip(0), whole, rtol=0, atol=1e-12)
    model.word.weight.data[texts[3][1], 0] = np.nan
    with pytest.raises(FloatingPointError, match="layer 2 gave embeddings that are not finite; try --dtype float32"):
        embed(texts, 8192)

def test_flags_are_fields_of_the_model(saved, beir, monkeypatch, capsys):
    """ Pooling, similarity, length, type and the prompts before queries and before documents, empty ones too, are those
    of the flags, else the model's own; each changes the scores. Texts that the length cuts are counted. """
    change_config(saved, query_prompt="the ")
    measure, found, collection = evaluate.measure, [], Collection(str(beir))
    monkeypatch.setattr(evaluate, "measure", lambda *args: found.append(args[2]) or measure(*args))
    texts, ((ids, documents, _),) = list(collection.queries.values()), collection.shards()
    for way in ({}, {"pooling": "cls"}, {"similarity": "dot"}, {"max_length": 4}, {"query_prompt": ""},
                {"query_prompt": "a "}, {"passage_prompt": "a "}, {"dtype": "bfloat16"}):
        run(saved, "--retrieval", beir, "--sizes", "4:48", *[f"--{key}={value}" for key, value in way.items()])
        said = "beir, first documents: 4 of 4 texts are longer than 4 tokens" in capsys.readouterr().out
        model, tokenizer = load_model(saved, **way)
        before, dtype = {"query_prompt": "the ", "passage_prompt": ""} | way, way.get("dtype", "float32")
        q, p = (embed_texts(model, tokenizer, [before[key] + text for text in rows], [4], dtype)[4]
                for key, rows in (("query_prompt", texts), ("passage_prompt", documents)))
        for hits, row in zip(found[-1], score(q, p, 48, model.config.similarity).tolist(), strict=True):
            assert {doc: value for value, doc in hits} == pytest.approx(dict(zip(ids, row)), abs=1e-4), way
        assert said == ("max_length" in way)
    assert all(one != other for one, other in combinations(found, 2))

def test_sts_is_spearman_of_the_cosine(saved, sts_file, recwarn, capsys):
    """ The records equal cosines that are made one by one, without the model's prompts or its dot product, and scipy's
    correlation, ties at their mean rank. Where all cosines are equal, as those of a single positive dim, it is 0 and
    not NaN, and there is a warning. """
    from scipy.stats import spearmanr
    model, tokenizer = load_model(saved, similarity="dot", query_prompt="the ", passage_prompt="a ")
    pairs = evaluate.load_sts(sts_file)
    records, items = evaluate.sts(model, tokenizer, pairs, ((1, 8), (4, 48)), "float32")
    assert items["gold"] == [i % 6 for i in range(30)] and not capsys.readouterr().err
    for r, (layer, dim) in zip(records, ((1, 8), (4, 48)), strict=True):
        embeddings = [embed_texts(model, tokenizer, texts, [layer])[layer][:, :dim] for texts in zip(*pairs[1:3])]
        cosine = [torch.cosine_similarity(a, b, dim=0).item() for a, b in embeddings]
        assert items[f"{layer}:{dim}"]["Spearman"] == pytest.approx(cosine, abs=1e-5)
        want = spearmanr(np.round(cosine, 5), items["gold"]).statistic
        assert r == record("mine", "Spearman", (layer, dim), pytest.approx(want, abs=1e-9), 30)
    model.blocks[-1].norm2.weight.data[0], model.blocks[-1].norm2.bias.data[0] = 0, 1
    (r,), items = evaluate.sts(model, tokenizer, pairs, ((4, 1),), "float32")
    assert r["value"] == 0 and items["4:1"]["Spearman"] == [1] * 30 and not recwarn.list
    assert "warning: mine at 4:1: all scores are within 0.001" in capsys.readouterr().err

ENDS = ((1, 3), (2, 2))

@pytest.fixture
def made(tmp_path, monkeypatch, model):
    """ vectors {text: (3,)} in place of layer 1, reversed of layer 2 -> model, None as tokenizer, collection, ENDS, a
    type: what search_corpus and retrieval take """
    def call(documents, queries, judged, vectors, shard=25_000):
        monkeypatch.setattr(evaluate, "SHARD", shard)
        monkeypatch.setattr(evaluate, "embed_texts", lambda model, tokenizer, texts, *rest: {
            layer: torch.tensor([list(vectors[text])[::3 - 2 * layer] for text in texts]) for layer in (1, 2)})
        model.config.similarity = "dot"
        return model, None, Collection(make_set(tmp_path / "made", documents, queries, judged)), ENDS, "float32"
    return call

@needs("pytrec_eval")
def test_values_are_those_of_trec_eval(made, tmp_path):
    """ Of scores with ties and of grades from -2 to 3 the per-item values, whose means are the records, equal those of
    trec_eval to 1e-9, for all scores and for the TREC runs. """
    import pytrec_eval
    rng = np.random.default_rng(0)
    ids, queries = [f"d{i}" for i in range(150)], [f"q{i}" for i in range(20)]
    vectors = {key: rng.integers(0, 4, size=3).astype(float) for key in [*ids, *queries]}
    qrels = {q: {i: int(rng.integers(-2, 4)) for i in rng.permutation(ids)[:40]} for q in queries}
    judged = [(q, i, grade) for q, grades in qrels.items() for i, grade in grades.items()]
    given = made({i: i for i in ids}, {q: q for q in queries}, judged, vectors)
    records, items = evaluate.retrieval(*given)
    write_run(tmp_path, "run", queries, search_corpus(*given)[1, 3])
    run_of_ours = pytrec_eval.parse_run(open(tmp_path / "run.run"))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "ndcg_cut_10", "recall_100"})
    for scores in (run_of_ours, {q: {i: float(vectors[q] @ vectors[i]) for i in ids} for q in queries}):
        theirs = evaluator.evaluate(scores)
        for metric, name in zip(evaluate.METRICS, ("recip_rank", "ndcg_cut_10", "recall_100")):
            want = [value if metric != "MRR@10" or value >= 0.1 else 0 for value in (theirs[q][name] for q in queries)]
            assert items["1:3"][metric] == pytest.approx(want, abs=1e-9), metric
            assert record("made", metric, (1, 3), pytest.approx(np.mean(want)), 20) in records

@pytest.mark.parametrize("shard, numbers", [(25_000, 9), (70, 9), (1, 9), (25_000, 1), (70, 1)])
def test_search_is_exact_in_shards_and_at_ties(made, capsys, shard, numbers):
    """ In whatever shards, at each size a query finds the hundred documents of the highest scores, of equal scores
    those with the last ids, even if all 190 scores are equal; then there is a warning, too. """
    rng = np.random.default_rng(0)
    ids, queries = [f"d{i:03}" for i in rng.permutation(190)], [f"q{i}" for i in range(5)]
    vectors = {key: rng.integers(1, 1 + numbers, size=3).astype(float) for key in [*ids, *queries]}
    judged = [(query, ids[0], 1) for query in queries]
    found = search_corpus(*made({i: i for i in ids}, {q: q for q in queries}, judged, vectors, shard))
    for size, part in zip(ENDS, (slice(0, 3), slice(1, 3)), strict=True):
        for query, hits in zip(queries, found[size], strict=True):
            scores = {(vectors[i][part] @ vectors[query][part], i) for i in ids}
            assert hits == sorted(scores, reverse=True)[:100]
    said = capsys.readouterr().err
    assert all((f"warning: made at {size}: all scores are within" in said) == (numbers == 1) for size in ("1:3", "2:2"))

@pytest.mark.parametrize("shard", [25_000, 2])
def test_a_query_is_no_answer_to_itself(made, capsys, shard):
    """ Of queries that are documents, too, none finds itself, by vectors or by words, and they are counted; one that is
    judged as its own answer does, and so does one that shares the number, but not the text, of a document. """
    texts = {"0": "red tea", "1": "red milk", "2": "red tea cup", "3": "tea"}
    rows = {"red tea": [3, 0, 2], "red milk": [1, 3, 0], "red tea cup": [4, 1, 2], "tea": [1, 0, 1], "cup?": [1, 0, 3]}
    judged = [("0", "2", 1), ("1", "1", 1), ("3", "0", 1), ("2", "0", 1)]
    given = made(texts, texts | {"2": "cup?"}, judged, {text: np.float32(row) for text, row in rows.items()}, shard)
    assert list(given[2].queries) == ["0", "1", "3", "2"]
    found, matched = (["".join(document for _, document in hits) for hits in rankings]
                      for rankings in (search_corpus(*given)[1, 3], match_words(given[2])))
    assert found == ["231", "1203", "201", "2031"] and matched == ["231", "102", "02", "2"]
    assert "made: of 2 queries, which are documents, too, the document itself is left" in capsys.readouterr().out

def test_collection(beir, monkeypatch, capsys):
    """ A collection joins titles and texts, reads .gz, keeps the judged queries alone, and has a split; docs is one,
    and . is called as its folder. Unknown documents count as not found, unknown queries are left out, the same
    judgement twice counts once, and all are counted. A query may be a document with its title or without. """
    (ids, texts, own), = (collection := Collection(str(beir))).shards()
    assert texts[:2] == ["apple an apple is a fruit", "a bridge crosses the river"] and ids[3] == "d4" and own == {}
    assert collection.queries == {"q1": "apple fruit", "q2": "river bridge"}
    assert collection.qrels == {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1}}
    monkeypatch.setattr(evaluate, "docs_folder", lambda: beir)
    assert list(Collection("docs:dev").queries) == ["q1"] and Collection("docs:dev").task == "docs:dev"
    shutil.copytree(beir, colon := str(beir.parent / "a:b"))
    assert [list(Collection(colon, split).queries) for split in (None, "dev")] == [["q1", "q2"], ["q1"]]
    monkeypatch.chdir(beir)
    judged = "q1 d1 2, q1 d9 1, q8 d1 1, q1 d1 2, q2 d2 -1, d1 d3 1, d3 d1 1"
    (beir / "qrels" / "test.tsv").write_text(JUDGED + judged.replace(" ", "\t").replace(",\t", "\n"))
    assert (odd := Collection(".")).task == "beir" and [own for *_, own in odd.shards()] == [{2: 0, 3: 2}]
    assert odd.qrels == {"q1": {"d1": 2, "d9": 1}, "q2": {"d2": -1}, "d1": {"d3": 1}, "d3": {"d1": 1}}
    said = capsys.readouterr().out
    assert all(re.search(f"{kind}[^,]*: 1\\b", said) for kind in ("unknown queries", "unknown documents", "twice"))

def test_sets_of_the_hub(monkeypatch):
    """ Short names stand for STS sets of the hub; a BEIR set has its judgements beside it, and calls dev validation;
    the test split is read where none is named. """
    from datasets import Dataset
    rows, asked = {"sts": [{"sentence1": "a", "sentence2": "b", "score": score} for score in (1., 2.)],
                   "-qrels": [{"query-id": "1", "corpus-id": 2, "score": 1}], ":queries": [{"_id": "1", "text": "why"}],
                   ":corpus": [{"_id": "2", "title": "a", "text": "b"}]}, set()
    monkeypatch.setattr(data, "open_source", lambda source, split, streaming: asked.add((source, split))
                        or Dataset.from_list(next(rows[part] for part in rows if part in source)))
    assert [*evaluate.STS] == "sts12 sts13 sts14 sts15 sts16 stsb sickr".split()
    assert evaluate.load_sts("sts12")[0] == "sts12" and evaluate.load_sts("stsb")[3].tolist() == [1, 2]
    assert asked == {("mteb/sts12-sts", "test"), ("sentence-transformers/stsb", "test")}
    for split, name in ((":dev", "validation"), ("", "test"), (":train", "train")):
        asked.clear()
        assert Collection(f"scifact{split}").qrels == {"1": {"2": 1}}
        parts = {source.removeprefix("BeIR/scifact") for source, _ in asked}
        assert parts == {":corpus:corpus", ":queries:queries", f"-qrels::{name}"}

def test_cost_by_hand(model):
    """ A size costs its parameters, 4 bytes a dim, and 2 FLOP a token for each entry of the matrices of its blocks. """
    found = {(r["layer"], r["metric"]): r["value"] for r in evaluate.cost(model, ((1, 8), (4, 48)))}
    matrices = 4 * 48 * 48 + 2 * 48 * 80                   # of a block: q, k, v, output; up, down
    block = matrices + 4 * 48 + 80 + 48 + 4 * 48           # and biases, two LayerNorms
    embeddings = (97 + 40 + 2 + 2) * 48                    # words, positions, types, LayerNorm
    assert found == {(1, "bytes"): 32, (4, "bytes"): 192, (1, "parameters"): embeddings + block,
                     (4, "parameters"): embeddings + 4 * block, (1, "MFLOP/token"): 2 * matrices / 1e6,
                     (4, "MFLOP/token"): 8 * matrices / 1e6}

def test_command_line(saved, beir, sts_file, tmp_path, monkeypatch, capsys):
    """ Without tasks docs is searched; the table is printed, and the JSON, with the flags, lies beside a model with
    sizes of its own and no other; --grid has every layer at every dim. """
    monkeypatch.setattr(evaluate, "docs_folder", lambda: beir)
    run(saved)
    found = json.loads((saved / "eval.json").read_text())
    assert {(r["task"], r["layer"]) for r in found["results"]} == {*product(("docs", "cost"), (1, 4))}
    assert (found["model"], found["max_length"], found["torch"]) == (str(saved), None, torch.__version__)
    assert list(found["per_item"]["docs"]) == ["ids", "1:8", "4:48"]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert shown[:2] == [["docs", "cost"], [*evaluate.METRICS, "parameters", "bytes", "MFLOP/token"]]
    assert [row[:2] for row in shown[2:]] == [[f"{r['layer']}:{r['dim']}", f"{r['value']:.4f}"]
                                              for r in found["results"] if r["metric"] == "MRR@10"]
    (tmp_path / "other.jsonl").write_text("".join(open(sts_file).readlines()[:11]))
    change_config(saved, sizes=[])
    (saved / "eval.json").unlink()
    flags = ["--grid", "--sizes", "1:8,4:48", "--out", out := tmp_path / "o.json"]
    run(saved, "--sts", sts_file, tmp_path / "other.jsonl", *flags)
    found = {}   # {(task, metric): {size: value}}
    for r in json.loads(out.read_text())["results"]:
        found.setdefault((r["task"], r["metric"]), {})[r["layer"], r["dim"]] = r["value"]
    for values in found.values():
        assert list(values) == list(product((1, 2, 3, 4), (8, 48)))
    run(saved, "--sts", sts_file)
    assert not (saved / "eval.json").exists() and "Demi    1:2" in capsys.readouterr().out   # the paper's in proportion

ROW, DOCUMENT = '{"sentence1": "a", "sentence2": "b", "score": 2}\n', '{"_id": "d1", "text": "x"}\n'
MISTAKES = [   # a file, what is in it, what is said of it
    ("same.jsonl", ROW * 3, "same.jsonl: every score is the same"),
    ("nan.jsonl", ROW + ROW.replace("2}", "NaN}"), "nan.jsonl cannot be read, row 2"),
    ("twice/corpus.jsonl", DOCUMENT * 2, "corpus.jsonl: two rows have one _id"),
    ("empty/corpus.jsonl", "", "corpus.jsonl: not a single row"),
    ("broken/corpus.jsonl", DOCUMENT + '{"_id": "d2"\n', "corpus.jsonl cannot be read, row 1 .*JSON"),
    ("grades/qrels/test.tsv", f"{JUDGED}q1\td1\t1\nq1\td1\t2\n", "test.tsv: query q1, document d1 have two grades"),
    ("none/qrels/test.tsv", JUDGED, "test.tsv: no relevant document")]

@pytest.mark.parametrize("flags, message", [
    *((f"--retrieval good {file.split('/')[0]}" if "/" in file else f"--sts STS {file}", message)
      for file, _, message in MISTAKES),
    ("--retrieval good good:dev", "qrels/dev.tsv"), ("--retrieval good missing", "missing"),
    ("--sts STS --columns score=grade", "--columns score=grade: .* has the columns sentence1"),
    ("--sts STS a/mine.csv", "two tasks of mine, mine have the same name"),
    ("--retrieval good --max_length 9 --query_prompt the-the-the-the", "good, first queries: the prompt 'the.*no room"),
    ("--retrieval good --max_length 9 --passage_prompt the-the-the-the", "good, first documents: the prompt 'the-"),
    ("--sts STS --out missing/o.json", "--out .*: there is no such folder"),
    ("--sts STS --sizes 5:8", "--sizes 5:8: this model has 4 layers and 48 dims"),
    ("--sts STS --sizes big", "argument --sizes: invalid .* value: 'big'")])
def test_mistakes_show_before_the_first_embedding(saved, sts_file, tmp_path, monkeypatch, capsys, flags, message):
    """ A second task that is broken, or a flag that is wrong, is refused before a text is embedded, and named. """
    for file in ("good/", *(file for file, *_ in MISTAKES if "/" in file)):
        documents = {"d1": "the apple", "d2": "the bridge"}
        make_set(tmp_path / file.split("/")[0], documents, {"q1": "apple"}, [("q1", "d1", 1)])
    for file, text, _ in MISTAKES:
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "embed_ids", lambda *args: pytest.fail("an evaluation began"))
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        run(saved, *flags.replace("STS", sts_file).split())
    said = capsys.readouterr().err.splitlines()[-1] if error.type is SystemExit else str(error.value)
    assert re.search(message, said)
