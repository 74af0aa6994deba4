""" Metrics are trec_eval's, search is exact, embeddings ignore batches, and mistakes show before the work. """
import json, math, re
from itertools import product

import numpy as np
import pytest
import torch

import data, evaluate
from conftest import needs, refused, write_jsonl
from evaluate import BM25, Collection, batches_by_length, bm25, embed_ids, embed_texts, record
from model import Bert, load_model, save_pretrained

TEXTS = ["the apple", "where is the bridge garden", "the candle stands beside the lantern in the morning and so on"]
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
    ("Recall@100", D, dict.fromkeys(D, 1), 1 / 2), ("Recall@100", D, {"d0": 1, "d5": 0, "d150": 2}, 1 / 2),
    ("Recall@100", D, {"d0": 0}, 0)])
def test_metrics_by_hand(metric, ranked, grades, value):
    """ Each metric has its value of a worked example, cuts where its name says; grades of 0 or less are wrong. """
    assert evaluate.METRICS[metric](ranked, grades) == pytest.approx(value, abs=1e-12)

def test_bm25_by_hand(recwarn):
    """ BM25 gives the numbers of a worked example; where there is no word all is 0, without a warning. """
    # 3 documents of 2, 1 and 3 words (mean 2); "tea" is in two of them: idf = log(1 + 1.5 / 2.5) = log 1.6
    # document 1: tf 1, norm = 1.2 * (0.25 + 0.75 * 2 / 2) = 1.2, so 2.2 / 2.2
    # document 3: tf 2, norm = 1.2 * 1.375 = 1.65, so 4.4 / 3.65
    scores = bm25(["Green tea", "coffee", "tea, tea_pot"], ["TEA?", "milk", "tea tea"])
    assert scores[0] == pytest.approx([math.log(1.6), 0, math.log(1.6) * 4.4 / 3.65])
    assert scores[1].tolist() == [0, 0, 0] and scores[2] == pytest.approx(2 * scores[0])
    assert not bm25(["...", ""], ["?", "a"]).any() and not recwarn.list

def test_embed_ids_ignores_batches_and_order(model, texts):
    """ Neither the size nor the order of the batches changes an embedding, in float64; equal batches give equal bits,
    in whatever order the texts come. """
    lengths = list(map(len, texts))
    different = [texts[lengths.index(n)] for n in set(lengths)]
    def embed(texts, batch_tokens):
        model.batch_tokens = batch_tokens
        return embed_ids(model, texts, [2, 4])
    once, turned = embed(different, 30), embed(different[::-1], 30)
    assert all(torch.equal(turned[layer].flip(0), once[layer]) for layer in (2, 4))
    model.double()
    one, turned = embed(texts, 1), embed(texts[::-1], 40)
    for layer, whole in embed(texts, 8192).items():
        torch.testing.assert_close(one[layer], whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(turned[layer].flip(0), whole, rtol=0, atol=1e-12)

def test_an_evaluation_has_no_dropout(model, texts):
    """ In the middle of a training, too, embeddings are made without dropout, and the training goes on with it. """
    want, model.dropout.p = embed_ids(model, texts, [4])[4], 0.5
    assert torch.equal(embed_ids(model.train(), texts, [4])[4], want) and model.training

def test_one_embedding_that_is_not_finite_ends_the_evaluation(model, texts):
    """ A single bad coordinate of a single text is enough, and the message names the layer. """
    model.word.weight.data[texts[3][1], 0] = np.nan
    with pytest.raises(FloatingPointError, match="layer 2 gave embeddings that are not finite; try --dtype float32"):
        embed_ids(model, texts[:8], [2])

@pytest.mark.parametrize("lengths, room, want", [
    ([7, 3, 20, 7, 5, 7, 3, 5], 18, [[3, 3, 5], [5, 7], [7, 7], [20]]), ([4, 4, 4], 12, [[4, 4, 4]]),
    ([4, 4, 4], 11, [[4, 4], [4]]), ([9, 8], 0, [[8], [9]]), ([], 8, [])])
def test_batches_are_full_and_no_fuller(lengths, room, want):
    """ A batch has as many texts as fit if all were as long as its longest; a longer text goes alone. """
    batches = batches_by_length([np.ones(n) for n in lengths], room)
    assert [[lengths[i] for i in batch] for batch in batches] == want
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))

def test_prompts_go_before_queries_and_passages(saved, beir, sts_file, monkeypatch):
    """ The model's own prompts, or those of the flags, an empty one too, begin every query and passage of a retrieval
    and no sentence of STS. """
    change_config(saved, prompts={"query": "the ", "passage": "a "})
    seen, tokenize = [], evaluate.tokenize
    monkeypatch.setattr(evaluate, "tokenize", lambda texts, *rest: seen.append(texts[0]) or tokenize(texts, *rest))
    for flags, query, passage in (([], "the ", "a "), (["--query_prompt", "q: ", "--passage_prompt", ""], "q: ", "")):
        run(saved, "--sts", sts_file, "--retrieval", beir, *flags)
        assert seen == ["the apple in the morning", f"{query}apple fruit", f"{passage}apple an apple is a fruit"]
        seen.clear()

@needs("sentence_transformers")
@pytest.mark.parametrize("whose", ["theirs", "ours"])
@pytest.mark.parametrize("pooling, similarity", [("mean", "cosine"), ("cls", "dot"), ("mean", "dot")])
def test_sentence_transformers_embeds_as_we_do(bert_folder, tokenizer, tmp_path, pooling, similarity, whose):
    """ Folders that sentence-transformers saved, and those that we did, give the same embeddings, with the prompts of
    queries and documents, and scores here and there to 1e-5, also of texts that are cut. """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    if whose == "theirs":
        parts = [Transformer(bert_folder, max_seq_length=9), Pooling(48, pooling)]
        SentenceTransformer(modules=parts + [Normalize()] * (similarity == "cosine"), device="cpu",
                            prompts={"query": "where is ", "document": "the "},
                            similarity_fn_name=similarity).save(str(tmp_path / "st"))
        change_config(tmp_path / "st", sizes=None, pooling=None, similarity=None, prompts=None)   # of the BERT's folder
    else:
        model, tokenizer = load_model(bert_folder, max_length=9, pooling=pooling, similarity=similarity,
                                      prompts={"query": "where is ", "passage": "the "})
        save_pretrained(model, tokenizer, tmp_path / "st")
    (model, tokenizer), theirs = load_model(tmp_path / "st"), SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert (model.config.pooling, model.config.similarity, tokenizer.model_max_length) == (pooling, similarity, 9)
    found = {}
    for prompt, encode in ((None, theirs.encode), ("query", theirs.encode_query), ("passage", theirs.encode_document)):
        found[prompt] = embed_texts(model, tokenizer, TEXTS, [3], prompt=prompt)[3]
        ours, want = evaluate.shorten(found[prompt], 48, similarity), torch.from_numpy(encode(TEXTS))
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)
    assert theirs.similarity_fn_name == similarity
    assert not torch.allclose(found["query"], found["passage"], atol=0.1)   # the prompts matter

def test_sts_is_spearman_of_the_cosine(saved, sts_file, recwarn):
    """ The records equal cosines that are made one by one, also of a model for dot products, and scipy's correlation,
    ties at their mean rank; where all cosines are equal, as those of a single positive dim, it is 0 and not NaN. """
    from scipy.stats import spearmanr
    (model, tokenizer), pairs = load_model(saved, similarity="dot"), evaluate.load_sts(sts_file)
    records, items = evaluate.sts(model, tokenizer, pairs, ((1, 8), (4, 48)), "float32")
    assert items["gold"] == [i % 6 for i in range(30)]
    for r, (layer, dim) in zip(records, ((1, 8), (4, 48)), strict=True):
        embeddings = [embed_texts(model, tokenizer, texts, [layer])[layer][:, :dim] for texts in zip(*pairs[1:3])]
        cosine = [torch.cosine_similarity(a, b, dim=0).item() for a, b in embeddings]
        assert items[f"{layer}:{dim}"]["Spearman"] == pytest.approx(cosine, abs=1e-5)
        want = spearmanr(np.round(cosine, 5), items["gold"]).statistic
        assert r == record("mine", "Spearman", (layer, dim), pytest.approx(want, abs=1e-9), 30)
    model.blocks[-1].norm2.weight.data[0], model.blocks[-1].norm2.bias.data[0] = 0, 1
    (r,), items = evaluate.sts(model, tokenizer, pairs, ((4, 1),), "float32")
    assert r["value"] == 0 and items["4:1"]["Spearman"] == [1] * 30 and not recwarn.list

@pytest.fixture
def searched(tmp_path, monkeypatch, model):
    """ vectors {text: (3,)} in place of layer 1, reversed of layer 2 -> {"1-3", "2-2" or "BM25": {query: [ids]}} """
    def call(documents, queries, judged, vectors, shard=25_000):
        collection = Collection(make_set(tmp_path / "made", documents, queries, judged))
        monkeypatch.setattr(evaluate, "SHARD", shard)
        monkeypatch.setattr(evaluate, "embed_texts", lambda model, tokenizer, texts, *rest: {
            layer: torch.tensor([list(vectors[text])[::3 - 2 * layer] for text in texts]) for layer in (1, 2)})
        model.config.similarity, found = "dot", {}
        records, items = evaluate.retrieval(model, None, collection, ((1, 3), (2, 2)), "float32", runs_dir=tmp_path)
        for file in tmp_path.glob("*.run"):
            ranked = found[file.stem.removeprefix("made-")] = {query: [] for query in queries}
            for query, _, document, *_ in map(str.split, file.open()):
                ranked[query].append(document)
        return found, records, items
    return call

@needs("pytrec_eval")
def test_values_are_those_of_trec_eval(searched, tmp_path):
    """ Of scores with ties and of grades from -2 to 3 the per-item values, whose means are the records, equal those of
    trec_eval to 1e-9, for all scores and for the TREC runs. """
    import pytrec_eval
    rng = np.random.default_rng(0)
    ids, queries = [f"d{i}" for i in range(150)], [f"q{i}" for i in range(20)]
    vectors = {key: rng.integers(0, 4, size=3).astype(float) for key in [*ids, *queries]}
    qrels = {q: {i: int(rng.integers(-2, 4)) for i in rng.permutation(ids)[:40]} for q in queries}
    judged = [(q, i, grade) for q, grades in qrels.items() for i, grade in grades.items()]
    _, records, items = searched({i: i for i in ids}, {q: q for q in queries}, judged, vectors)
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "ndcg_cut_10", "recall_100"})
    lines = (tmp_path / "made-1-3.run").read_text().splitlines()
    assert lines[1].split()[:2] == ["q0", "Q0"] and lines[1].split()[3:6:2] == ["2", "made-1-3"]
    runs = pytrec_eval.parse_run(lines), {q: {i: float(vectors[q] @ vectors[i]) for i in ids} for q in queries}
    for theirs in map(evaluator.evaluate, runs):
        for metric, name in zip(evaluate.METRICS, ("recip_rank", "ndcg_cut_10", "recall_100")):
            want = [value if metric != "MRR@10" or value >= 0.1 else 0 for value in (theirs[q][name] for q in queries)]
            assert items["1:3"][metric] == pytest.approx(want, abs=1e-9), metric
            assert record("made", metric, (1, 3), pytest.approx(np.mean(want)), 20) in records

@pytest.mark.parametrize("shard, numbers", [(25_000, 9), (70, 9), (1, 9), (25_000, 1), (70, 1)])
def test_search_is_exact_in_shards_and_at_ties(searched, shard, numbers):
    """ In whatever shards, at each size a query finds the hundred documents of the highest scores, of equal scores
    those with the last ids, even if all 190 scores are equal. """
    rng = np.random.default_rng(0)
    ids, queries = [f"d{i:03}" for i in rng.permutation(190)], [f"q{i}" for i in range(5)]
    vectors = {key: rng.integers(1, 1 + numbers, size=3).astype(float) for key in [*ids, *queries]}
    judged = [(query, ids[0], 1) for query in queries]
    found, *_ = searched({i: i for i in ids}, {q: q for q in queries}, judged, vectors, shard)
    assert set(found) == {"1-3", "2-2"} | ({"BM25"} if shard > 190 else set())   # BM25 needs the corpus in one shard
    for size, part in (("1-3", slice(0, 3)), ("2-2", slice(1, 3))):
        for query in queries:
            scores = {(vectors[i][part] @ vectors[query][part], i) for i in ids}
            assert found[size][query] == [i for _, i in sorted(scores, reverse=True)][:100]

def test_a_query_is_no_answer_to_itself(searched, capsys):
    """ Of 1,100 queries that are documents none finds itself, those beyond the first 1,024 included, and they are
    counted; one that is judged as its own answer does. """
    texts = {f"d{i}": f"word{i}" for i in range(1100)}
    angles = {f"word{i}": [math.cos(i / 1000), math.sin(i / 1000), 0] for i in range(1100)}
    found, *_ = searched(texts, texts, [(f"d{i}", "d7", 1) for i in range(1100)], angles)
    assert all((query in ids) == (query == "d7") and len(ids) == 100 for query, ids in found["1-3"].items())
    assert found["1-3"]["d7"][0] == "d7" and found["1-3"]["d1050"][:2] in (["d1049", "d1051"], ["d1051", "d1049"])
    assert {query: ids for query, ids in found["BM25"].items() if ids} == {"d7": ["d7"]}
    assert "of 1,099 queries, which are documents, too, the document itself is left out" in capsys.readouterr().out

def test_shared_numbers_as_ids_lose_no_answer(searched, capsys):
    """ Where queries and documents are numbered from 0 alike, document 0 is an answer to query 0. """
    found, *_ = searched({"0": "red tea", "1": "milk"}, {"0": "tea", "1": "milk?"}, [("0", "0", 1), ("1", "0", 1)],
                         {"red tea": [1., 0, 0], "milk": [0, 1., 0], "tea": [2., 1, 0], "milk?": [1., 2, 0]})
    assert found["1-3"] == {"0": ["0", "1"], "1": ["1", "0"]} and found["BM25"] == {"0": ["0"], "1": ["1"]}
    assert "left out" not in capsys.readouterr().out

def test_collection(beir, monkeypatch):
    """ A collection joins titles and texts, reads .gz, keeps the judged queries alone, and has a split; docs is one,
    and . is called as its folder. """
    (ids, texts, own), = (collection := Collection(str(beir))).shards()
    assert texts[:2] == ["apple an apple is a fruit", "a bridge crosses the river"] and ids[3] == "d4" and own == {}
    assert collection.queries == {"q1": "apple fruit", "q2": "river bridge"}
    assert collection.qrels == {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1}}
    monkeypatch.setattr(evaluate, "docs_folder", lambda: beir)
    assert list(Collection("docs:dev").queries) == ["q1"] and Collection("docs:dev").task == "docs:dev"
    monkeypatch.chdir(beir)
    assert Collection(".").task == "beir"

def test_sets_of_the_hub(monkeypatch):
    """ Short names stand for STS sets of the hub; a BEIR set has its judgements beside it, and calls dev validation;
    the test split is read where none is named. """
    from datasets import Dataset
    rows, asked = {"sts": [{"sentence1": "a", "sentence2": "b", "score": score} for score in (1., 2.)],
                   "-qrels": [{"query-id": "1", "corpus-id": 2, "score": 1}], ":queries": [{"_id": "1", "text": "why"}],
                   ":corpus": [{"_id": "2", "title": "a", "text": "b"}]}, set()
    monkeypatch.setattr(data, "open_source", lambda source, split, streaming: asked.add((source, split))
                        or Dataset.from_list(next(rows[part] for part in rows if part in source)))
    assert evaluate.load_sts("sts12")[0] == "sts12" and evaluate.load_sts("stsb")[3].tolist() == [1, 2]
    assert asked == {("mteb/sts12-sts", "test"), ("sentence-transformers/stsb", "test")}
    for split, name in ((":dev", "validation"), ("", "test"), (":train", "train")):
        asked.clear()
        assert Collection(f"scifact{split}").qrels == {"1": {"2": 1}}
        parts = {source.removeprefix("BeIR/scifact") for source, _ in asked}
        assert parts == {":corpus:corpus", ":queries:queries", f"-qrels::{name}"}

def test_odd_judgements_are_counted(beir, capsys):
    """ Unknown documents count as not found, unknown queries are left out, the same judgement twice counts once. """
    (beir / "qrels" / "test.tsv").write_text(f"{JUDGED}q1\td1\t2\nq1\td9\t1\nq8\td1\t1\nq1\td1\t2\nq2\td2\t-1\n")
    assert Collection(str(beir)).qrels == {"q1": {"d1": 2, "d9": 1}, "q2": {"d2": -1}}
    said = capsys.readouterr().out
    assert all(re.search(f"{kind}[^,]*: 1\\b", said) for kind in ("unknown queries", "unknown documents", "twice"))

def test_cost_by_hand(model):
    """ A size costs its parameters, 4 bytes a dim, and 2 FLOP a token for each entry of the matrices of its blocks. """
    found = {(r["layer"], r["metric"]): r["value"] for r in evaluate.cost(model, ((1, 8), (4, 48)))}
    matrices = 4 * 48 * 48 + 2 * 48 * 80                   # of a block: q, k, v, output; up, down
    block = matrices + 4 * 48 + 80 + 48 + 4 * 48           # and biases, two LayerNorms
    embeddings = (97 + 40 + 2 + 2) * 48                    # words, positions, types, LayerNorm
    assert found == {(1, "bytes"): 32, (4, "bytes"): 192, (1, "parameters"): embeddings + block,
                     (4, "parameters"): embeddings + 4 * block, (1, "MFLOP/token"): 2 * matrices / 1e6,
                     (4, "MFLOP/token"): 8 * matrices / 1e6}

def test_units_of_the_speed(monkeypatch):
    """ By a clock that gives each encoding its ms: three warm up, 50 queries have a median and a p95, which 47 are
    below, and 512 texts make texts a second. """
    now, ms = [0.0], iter([900] * 3 + list(range(50, 0, -1)) + [512])
    monkeypatch.setattr(evaluate, "embed_texts", lambda *args: now.append(now[-1] + next(ms) / 1000))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: now[-1])
    found = {r["metric"]: r["value"] for r in evaluate.speed(None, None, ((1, 8),), "float32")}
    assert found == pytest.approx({"ms/query": 25.5, "p95 ms": 48, "texts/s": 1000})

def test_table_by_hand():
    """ A line for each size, under its name if it has one, and for BM25; a column for each task and metric. """
    results = [record("set", "MRR@10", (1, 8), 0.25, 9), record("set", "MRR@10", (2, 8), 0.5, 9),
               record("set", "MRR@10", BM25, 0.125, 9), record("mine", "Spearman", (1, 8), -0.03125, 9),
               record("cost", "bytes", (1, 8), 3200, 1), record("cost", "ms/query", (2, 8), 2.25, 1)]
    assert list(map(str.split, evaluate.table(results, {(1, 8): "Demi"}).splitlines())) == [
        ["set", "mine", "cost"], ["MRR@10", "Spearman", "bytes", "ms/query"],
        ["Demi", "1:8", "0.2500", "-0.0312", "3,200"], ["2:8", "0.5000", "2.2"], ["BM25", "0.1250"]]

def test_command_line(saved, beir, sts_file, tmp_path, monkeypatch, capsys):
    """ Without tasks docs is searched; the table is printed, and the JSON lies beside a model with sizes of its own and
    no other; --grid has every layer at every dim, --speed times each, and two STS sets have a mean at each. """
    monkeypatch.setattr(evaluate, "docs_folder", lambda: beir)
    run(saved)
    found = json.loads((saved / "eval.json").read_text())
    assert {(r["task"], r["layer"]) for r in found["results"]} == {("docs", None), *product(("docs", "cost"), (1, 4))}
    assert list(found["per_item"]["docs"]) == ["ids", "1:8", "4:48", "BM25"]
    assert re.search(r"\n1:8 +0.*\n4:48 +0.*\nBM25 +1.0000 ", capsys.readouterr().out)
    (tmp_path / "other.jsonl").write_text("".join(open(sts_file).readlines()[:11]))
    run(saved, "--sts", sts_file, tmp_path / "other.jsonl", "--grid", "--speed", "--out", tmp_path / "o.json")
    found = {}   # {(task, metric): {size: value}}
    for r in json.loads((tmp_path / "o.json").read_text())["results"]:
        found.setdefault((r["task"], r["metric"]), {})[r["layer"], r["dim"]] = r["value"]
    for values in found.values():
        assert list(values) == list(product((1, 2, 3, 4), (8, 48)))
    one, other, mean = (list(found[task, "Spearman"].values()) for task in ("mine", "other", "mean of STS"))
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(one, other)]) and ("cost", "texts/s") in found
    (saved / "eval.json").unlink()
    change_config(saved, sizes=[])
    run(saved, "--sts", sts_file)
    assert not (saved / "eval.json").exists() and "Demi    1:2" in capsys.readouterr().out   # the paper's in proportion

def test_flags_of_pooling_similarity_and_length(saved, beir, tmp_path):
    """ --pooling, --similarity and --max_length change what is evaluated, as the arguments of load_model do. """
    flags, written = {"pooling": "cls", "similarity": "dot", "max_length": 4}, set()
    for way in [{}, flags, *({key: value} for key, value in flags.items())]:
        model, tokenizer = load_model(saved, **way)
        evaluate.retrieval(model, tokenizer, Collection(str(beir)), ((4, 48),), "float32", runs_dir=tmp_path / "a")
        cells = [cell for key, value in way.items() for cell in (f"--{key}", value)]
        run(saved, "--retrieval", beir, "--sizes", "4:48", "--save_run", tmp_path / "b", *cells)
        a, b = ((tmp_path / folder / "beir-4-48.run").read_text() for folder in "ab")
        assert a == b and a not in written
        written.add(a)

def test_every_encoding_has_the_dtype_of_the_flag(saved, sts_file, beir, monkeypatch):
    """ With --dtype bfloat16 STS, retrieval and speed encode in bfloat16, without it in float32. """
    used, encode = set(), Bert.encode
    monkeypatch.setattr(Bert, "encode", lambda *args: used.add(torch.is_autocast_enabled("cpu")) or encode(*args))
    tasks = ["--sts", sts_file], ["--retrieval", beir], ["--sts", sts_file, "--speed"]
    for flags, dtype in product(tasks, ("bfloat16", "float32")):
        used.clear()
        run(saved, *flags, "--sizes", "1:8", "--dtype", dtype)
        assert used == {dtype == "bfloat16"}, flags

ROW, DOCUMENT = '{"sentence1": "a", "sentence2": "b", "score": 2}\n', '{"_id": "d1", "text": "x"}\n'
FILES = {"bad.jsonl": '{"sentence1": "a"}\n', "same.jsonl": ROW * 3, "nan.jsonl": ROW + ROW.replace("2}", "NaN}"),
         "twice/corpus.jsonl": DOCUMENT * 2, "grades/qrels/test.tsv": f"{JUDGED}q1\td1\t1\nq1\td1\t2\n",
         "broken/corpus.jsonl": DOCUMENT + '{"_id": "d2"\n', "no_text/corpus.jsonl": '{"_id": "d1"}\n',
         "empty/corpus.jsonl": "", "high/qrels/test.tsv": f"{JUDGED}q1\td1\thigh\n", "none/qrels/test.tsv": JUDGED,
         "ids/queries.jsonl": '{"id": "q1", "text": "x"}\n', "header/qrels/test.tsv": "q1\td1\t1\nq1\td1\t1\n"}
MISTAKES = {"twice": "corpus.jsonl: two rows have one _id", "empty": "corpus.jsonl: not a single row",
            "broken": "corpus.jsonl cannot be read, row 1 .*JSON", "no_text": "corpus.jsonl cannot be read.*'text'",
            "grades": "test.tsv: query q1, document d1 have two grades", "none": "test.tsv: no judgement",
            "high": "test.tsv cannot be read, row 1 .*'high'", "header": "test.tsv cannot be read, row 1 .*'query-id'",
            "ids": "queries.jsonl cannot be read, row 1 .*'_id'", "good:dev": "qrels/dev.tsv", "missing": "missing"}

@pytest.mark.parametrize("flags, message", [
    *((["--retrieval", "good", name], message) for name, message in MISTAKES.items()),
    (["--sts", "STS", "bad.jsonl"], "bad.jsonl has the columns sentence1"),
    (["--sts", "STS", "same.jsonl"], "same.jsonl: needs .* with two different numbers"),
    (["--sts", "STS", "nan.jsonl"], "nan.jsonl cannot be read, row 2"),
    (["--sts", "STS", "--columns", "score=grade"], "--columns score=grade: .* has the columns sentence1"),
    (["--sts", "STS", "a/mine.csv"], "two tasks of mine, mine have the same name"),
    (["--sts", "STS", "--out", "missing/o.json"], "--out .*: there is no such folder"),
    (["--sts", "STS", "--sizes", "5:8"], "--sizes 5:8: this model has 4 layers and 48 dims"),
    (["--sts", "STS", "--sizes", "big"], "invalid LAYER:DIM,LAYER:DIM,... value: 'big'")])
def test_mistakes_show_before_the_first_embedding(saved, sts_file, tmp_path, monkeypatch, capsys, flags, message):
    """ A second task that is broken, or a flag that is wrong, is refused before a text is embedded, and named. """
    for name in {"good", *(file.split("/")[0] for file in FILES if "/" in file)}:
        make_set(tmp_path / name, {"d1": "x", "d2": "y"}, {"q1": "x"}, [("q1", "d1", 1)])
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "embed_ids", lambda *args: pytest.fail("an evaluation began"))
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        run(saved, *[sts_file if flag == "STS" else flag for flag in flags])
    said = capsys.readouterr().err.splitlines()[-1] if error.type is SystemExit else str(error.value)
    assert re.search(message, said) and (error.type is not SystemExit or error.value.code == 2)

def test_a_process_says_one_line(tmp_path, sts_file):
    """ A folder without a model ends the program with status 2 and one line. """
    assert f"error: {tmp_path}: no BERT that can" in refused("evaluate.py", tmp_path, "--sts", sts_file)
