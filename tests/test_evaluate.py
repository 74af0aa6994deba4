""" The metrics are trec_eval's, and encoding does not depend on the batches. """
import itertools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

import data
import evaluate
from conftest import needs, refused_process
from data import Collection
from evaluate import bm25, embed_ids, mrr_at_10, ndcg_at_10, best_documents, recall_at_100, score
from model import Bert, average, save_pretrained


def test_metrics_by_hand():
    """ Each metric has its value of a worked example. """
    # relevant documents at ranks 2 (grade 1) and 4 (grade 3), a third one (grade 2) not found
    ranked, grades = ["a", "b", "c", "d"], {"b": 1, "d": 3, "z": 2, "c": 0}
    assert mrr_at_10(ranked, grades) == 1 / 2
    dcg, ideal = 1 / math.log2(3) + 3 / math.log2(5), 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg_at_10(ranked, grades) == pytest.approx(dcg / ideal, abs=1e-12)
    assert recall_at_100(ranked, grades) == pytest.approx(2 / 3)
    assert mrr_at_10(list("abcdefghij") + ["k"], {"k": 1}) == 0   # rank 11


def test_metrics_at_their_edges():
    """ A document of grade 0 is no hit; recall looks at a hundred documents and divides by all relevant ones. """
    assert mrr_at_10(["c", "b"], {"c": 0, "b": 1}) == 1 / 2
    ids = [f"d{i}" for i in range(200)]
    assert recall_at_100(ids, {"d99": 1}) == 1 and recall_at_100(ids, {"d100": 1}) == 0
    assert recall_at_100(ids, {doc: 1 for doc in ids}) == 1 / 2
    assert recall_at_100(ids, {"d0": 1, "d5": 0, "d150": 2}) == 1 / 2


def ranking(scores, ids):
    """ one query's (P,) scores -> the 100 best ids, through `keep_best` and `rank` """
    best = (torch.full((1, evaluate.K), -np.inf), torch.zeros(1, evaluate.K, dtype=torch.long))
    half = len(ids) // 2   # as if the corpus came in two shards
    evaluate.keep_best(best, slice(0, 1), torch.tensor(scores[:half])[None], 0, {})
    evaluate.keep_best(best, slice(0, 1), torch.tensor(scores[half:])[None], half, {})
    (ranked, _), = best_documents(best[0].numpy(), best[1].numpy(), ids)
    return ranked


def test_ties_are_broken_by_descending_document_id():
    """ Equal scores rank by descending id, as strings, and -inf is no hit. """
    assert ranking(np.float32([1, 2, 1, 1, -np.inf]), ["d1", "d2", "d10", "d3", "d4"]) == ["d2", "d3", "d10", "d1"]


@needs("pytrec_eval")
def test_metrics_against_trec_eval():
    """ The metrics of random runs with ties and grades equal those of trec_eval to 1e-9. """
    import pytrec_eval
    rng = np.random.default_rng(0)
    ids = [f"d{i}" for i in range(150)]
    for _ in range(20):
        scores = rng.integers(0, 12, size=150) / 4
        grades = {doc: int(grade) for doc, grade in zip(rng.permutation(ids)[:40], rng.integers(0, 4, size=40))}
        ranked = ranking(scores.astype(np.float32), ids)
        theirs = pytrec_eval.RelevanceEvaluator({"q": grades}, {"recip_rank", "ndcg_cut_10", "recall_100"}).evaluate(
            {"q": dict(zip(ids, scores.tolist()))})["q"]
        assert ndcg_at_10(ranked, grades) == pytest.approx(theirs["ndcg_cut_10"], abs=1e-9)
        assert recall_at_100(ranked, grades) == pytest.approx(theirs["recall_100"], abs=1e-9)
        want = theirs["recip_rank"] if theirs["recip_rank"] >= 0.1 else 0
        assert mrr_at_10(ranked, grades) == pytest.approx(want, abs=1e-9)


def test_bm25_by_hand():
    """ BM25 gives the numbers of a worked example. """
    # 3 documents of 2, 1 and 3 words (mean 2); "tea" is in two of them: idf = log(1 + 1.5 / 2.5) = log 1.6
    # document 1: tf 1, norm = 1.2 * (0.25 + 0.75 * 2 / 2) = 1.2, so 2.2 / 2.2
    # document 3: tf 2, norm = 1.2 * 1.375 = 1.65, so 4.4 / 3.65
    scores = bm25(["Green tea", "coffee", "tea, tea_pot"], ["TEA?", "milk"]).toarray()
    assert scores[0] == pytest.approx([math.log(1.6), 0, math.log(1.6) * 4.4 / 3.65])
    assert scores[1].tolist() == [0, 0, 0]


def test_embed_ids_ignores_batches_and_order(model, texts):
    """ Neither the size nor the order of the batches changes an embedding, in float64. """
    model.double()
    one, all_of_them = embed_ids(model, texts, [2, 4], batch_tokens=1), embed_ids(model, texts, [2, 4])
    turned = embed_ids(model, texts[::-1], [2, 4], batch_tokens=40)
    for layer in (2, 4):
        torch.testing.assert_close(one[layer], all_of_them[layer], rtol=0, atol=1e-12)
        torch.testing.assert_close(turned[layer].flip(0), one[layer], rtol=0, atol=1e-12)


def test_an_evaluation_has_no_dropout(model, texts):
    """ In the middle of training, too, embeddings are made without dropout, and the training goes on with it. """
    want, model.config.hidden_dropout_prob = embed_ids(model, texts, [4])[4], 0.5
    assert torch.equal(embed_ids(model.train(), texts, [4])[4], want) and model.training


def test_one_embedding_that_is_not_finite_ends_the_evaluation(model, texts):
    """ A single bad coordinate of a single text is enough, and the message names the layer. """
    model.word.weight.data[texts[3][1], 0] = np.nan
    with pytest.raises(FloatingPointError, match="layer 2 gave embeddings that are not finite; try --dtype float32"):
        embed_ids(model, texts[:8], [2], batch_tokens=10**6)


def test_batches_are_full_and_no_fuller(model, texts, monkeypatch):
    """ As many texts as fit batch_tokens if all were as long as the longest; a longer text goes alone. """
    batches, pack = [], evaluate.pack
    monkeypatch.setattr(evaluate, "pack", lambda texts, *rest, **named: batches.append([len(text) for text in texts])
                        or pack(texts, *rest, **named))
    embed_ids(model, texts, [1], batch_tokens=18)   # of 3 3 5 5 7 7 7 9 11 12 20 20 tokens
    assert batches == [[3, 3, 5], [5, 7], [7, 7], [9], [11], [12], [20], [20]]


def test_score_slices_first():
    """ A score looks at the first dims alone, and the cosine divides by their norm. """
    q, p = torch.tensor([[3.0, 4.0, 100.0]]), torch.tensor([[4.0, 3.0, -100.0]])
    assert score(q, p, 2, "dot").item() == 24
    assert score(q, p, 2, "cosine").item() == pytest.approx(24 / 25)


def test_collection(beir):
    """ A collection joins titles and texts, reads .gz and keeps the judged queries alone. """
    collection = Collection(str(beir))
    (ids, texts), = collection.shards()
    assert texts[0] == "apple an apple is a fruit" and texts[1] == "a bridge crosses the river"
    assert list(collection.queries) == ["q1", "q2"] and collection.qrels["q1"] == {"d1": 2, "d3": 1}


def test_command_line(saved, beir, tmp_path, monkeypatch, capsys):
    """ The command line prints the table, writes the JSON beside the model, and searches in the documentation. """
    evaluate.main(evaluate.parse_args([str(tmp_path / "m"), "--retrieval", str(beir), "--device", "cpu"]))
    table = capsys.readouterr().out
    assert "1:8" in table and "BM25" in table and "Recall@100" in table
    saved = json.loads((tmp_path / "m" / "eval.json").read_text())
    assert {"task", "metric", "layer", "dim", "value", "n"} <= set(saved["results"][0])
    bm25_rows = [r for r in saved["results"] if r["layer"] is None]
    assert {"MRR@10", "nDCG@10", "Recall@100"} <= {r["metric"] for r in bm25_rows if r["value"] == 1}

    row = {"name": "pkg.f", "query": "the bridge", "positive": "stands beside the river"}
    (beir / "train.jsonl").write_text(json.dumps(row) + "\n")
    (beir / "corpus.jsonl").write_text('{"_id": "0", "name": "pkg.g", "query": "an apple", "text": "fruit"}\n')
    monkeypatch.setattr(data, "docs_folder", lambda: beir)
    question = "the bridge stands beside the river"
    evaluate.main(evaluate.parse_args([str(tmp_path / "m"), "--search", question, "--device", "cpu"]))
    assert "pkg.f" in capsys.readouterr().out.splitlines()[0]
    index, = (tmp_path / "m").glob("search-*.npy")
    stamp = index.stat().st_mtime_ns
    evaluate.main(evaluate.parse_args([str(tmp_path / "m"), "--search", question, "--device", "cpu"]))
    assert index.stat().st_mtime_ns == stamp and len(list((tmp_path / "m").glob("search-*.npy"))) == 1   # used again
    model, tokenizer = evaluate.load_model(tmp_path / "m")
    with torch.no_grad():
        model.blocks[0].up.weight += 0.1
    save_pretrained(model, tokenizer, tmp_path / "m")
    os.utime(tmp_path / "m" / "model.safetensors", (0, 0))   # even if the file is old, as one that was copied
    for flags in ([], ["--pooling", "cls"]):
        before = set((tmp_path / "m").glob("search-*.npy"))
        evaluate.main(evaluate.parse_args([str(tmp_path / "m"), "--search", question, "--device", "cpu", *flags]))
        assert len(set((tmp_path / "m").glob("search-*.npy")) - before) == 1   # another model, another pooling


def test_bad_input_is_one_line(tmp_path):
    """ A process that is given a folder without a model ends with status 2 and one line on stderr. """
    assert refused_process("evaluate.py", str(tmp_path)).endswith("give one that save_pretrained wrote")


# ---------------------------------------------------------------------------------------------------------------------
# STS, shards, foreign models, comparison


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """ a folder with a small model of ours, 4 layers x 48 """
    model.config.sizes, model.word = ((1, 8), (4, 48)), torch.nn.Embedding(len(tokenizer), 48)
    model.config.vocab_size = len(tokenizer)
    save_pretrained(model, tokenizer, tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sts_file(tmp_path):
    """ 30 pairs of sentences """
    path = tmp_path / "mine.jsonl"
    nouns = zip(("apple", "bridge", "garden") * 10, ("apple", "garden") * 15)
    rows = [{"sentence1": f"the {a} in the morning", "sentence2": f"a {b}", "score": i % 6}
            for i, (a, b) in enumerate(nouns)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sts_is_spearman_of_the_cosine(saved, sts_file):
    """ The records equal cosines that are made one by one, and scipy's correlation. """
    from scipy.stats import spearmanr
    model, tokenizer = evaluate.load_model(saved, similarity="dot")   # STS is about the cosine all the same
    records, items = evaluate.sts(model, tokenizer, sts_file, ((1, 8), (4, 48)), "float32")
    rows = [row for _, row in data.read_rows(sts_file)]
    for r, (layer, dim) in zip(records, ((1, 8), (4, 48))):
        texts = [[row["sentence1"], row["sentence2"]] for row in rows]
        pairs = [evaluate.embed_texts(model, tokenizer, pair, [layer])[layer][:, :dim] for pair in texts]
        cosine = [torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
        want = spearmanr(np.round(cosine, 5), [row["score"] for row in rows]).statistic
        assert items[f"{layer}:{dim}"]["Spearman"] == pytest.approx(cosine, abs=1e-5)
        assert (r["task"], r["metric"], r["layer"], r["dim"], r["n"]) == ("mine", "Spearman", layer, dim, 30)
        assert r["value"] == pytest.approx(want, abs=1e-9)


def test_mean_of_sts_is_by_size(saved, sts_file, tmp_path):
    """ Two STS sets have a mean for every size, of the two values of this size. """
    other = tmp_path / "other.jsonl"
    other.write_text("".join(open(sts_file).readlines()[:11]))
    out = tmp_path / "o.json"
    evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, str(other), "--sizes", "4:8,4:48",
                                       "--out", str(out)]))
    found = {(r["task"], r["dim"]): r["value"] for r in json.loads(out.read_text())["results"]
             if r["metric"] == "Spearman"}
    for dim in (8, 48):
        assert found["mean of STS", dim] == pytest.approx((found["mine", dim] + found["other", dim]) / 2)
    assert found["mean of STS", 8] != found["mean of STS", 48]


def test_cost_by_hand(model):
    """ A size costs its parameters, 4 bytes a dim, and 2 FLOP a token for each entry of the matrices of its blocks. """
    found = {(r["layer"], r["metric"]): r["value"] for r in evaluate.cost(model, ((1, 8), (4, 48)))}
    matrices = 4 * 48 * 48 + 2 * 48 * 80                   # of a block: q, k, v, output; up, down
    block = matrices + 4 * 48 + 80 + 48 + 4 * 48           # and biases, two LayerNorms
    embeddings = (97 + 40 + 2 + 2) * 48                    # words, positions, types, LayerNorm
    assert found == {(1, "bytes"): 32, (4, "bytes"): 192,
                     (1, "parameters"): embeddings + block, (4, "parameters"): embeddings + 4 * block,
                     (1, "MFLOP/token"): 2 * matrices / 1e6, (4, "MFLOP/token"): 8 * matrices / 1e6}


def test_shards_and_stored_embeddings_change_nothing(saved, beir, tmp_path, monkeypatch):
    """ One document a shard, written to .npy and read back without the encoder, gives the records of one piece. """
    model, tokenizer = evaluate.load_model(saved)
    sizes = ((1, 8), (4, 48))
    in_one, _ = evaluate.retrieval(model, tokenizer, str(beir), sizes, "float32")
    monkeypatch.setattr(data, "SHARD", 1)
    by_shards, _ = evaluate.retrieval(model, tokenizer, str(beir), sizes, "float32", embeddings_dir=tmp_path / "e",
                                      runs_dir=tmp_path / "runs")
    assert by_shards == [r for r in in_one if r["layer"]]   # BM25 needs the corpus in one shard
    files = sorted((tmp_path / "e").glob("*.npy"))
    assert len(files) == 8 and np.load(files[0]).shape == (1, 8) and np.load(files[0]).dtype == np.float32
    calls, embed = [], evaluate.embed_texts
    monkeypatch.setattr(evaluate, "embed_texts", lambda *args: calls.append(args[2]) or embed(*args))
    again, _ = evaluate.retrieval(model, tokenizer, str(beir), sizes, "float32", embeddings_dir=tmp_path / "e")
    assert again == by_shards and calls == [["apple fruit", "river bridge"]]   # the queries alone
    with torch.no_grad():
        model.blocks[0].up.weight += 0.1
    evaluate.retrieval(model, tokenizer, str(beir), sizes, "float32", embeddings_dir=tmp_path / "e")
    assert len(calls) == 6   # other weights: queries again, and four shards
    model.config.pooling = "cls"
    evaluate.retrieval(model, tokenizer, str(beir), sizes, "float32", embeddings_dir=tmp_path / "e")
    assert len(calls) == 11   # another pooling
    tokenizer.model_max_length = 5
    evaluate.retrieval(model, tokenizer, str(beir), sizes, "float32", embeddings_dir=tmp_path / "e")
    assert len(calls) == 16   # another length
    evaluate.retrieval(model, tokenizer, str(beir), sizes, "bfloat16", embeddings_dir=tmp_path / "e")
    assert len(calls) == 21   # another dtype
    run = (tmp_path / "runs" / "beir-1-8.run").read_text().splitlines()
    assert len(run) == 8 and run[0].split()[0::2][:2] == ["q1", run[0].split()[2]] and run[0].split()[3] == "1"


def test_stored_embeddings_hold_the_widest_size_of_a_layer(saved, beir, tmp_path):
    """ With two sizes at one layer the stored embeddings serve both: the records are those without files. """
    model, tokenizer = evaluate.load_model(saved)
    plain, stored = (evaluate.retrieval(model, tokenizer, str(beir), ((1, 6), (4, 8), (4, 48)), "float32",
                                        embeddings_dir=folder) for folder in (None, tmp_path / "e"))
    assert plain == stored and len(list((tmp_path / "e").glob("*-layer4-dims48.npy"))) == 1


def test_a_query_is_no_answer_to_itself(saved, beir):
    """ The document with the id of the query is dropped, and the next one is first. """
    (beir / "queries.jsonl").write_text('{"_id": "d1", "text": "apple an apple is a fruit"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd1\td1\t1\nd1\td3\t1\n")
    model, tokenizer = evaluate.load_model(saved)
    _, items = evaluate.retrieval(model, tokenizer, str(beir), ((4, 48),), "float32")
    assert items["4:48"]["Recall@100"] == [0.5]
    assert items["BM25"]["Recall@100"] == [0.5] and items["BM25"]["MRR@10"] == [1]


@pytest.fixture
def ranked_by(tmp_path, monkeypatch, saved):
    """ documents, queries {id: text}; vectors {text: [...]}, no model -> per-item values, {query: [document ids]} """
    def call(documents, queries, vectors, size_of_shard, run="1-2"):
        folder = tmp_path / "made"
        (folder / "qrels").mkdir(parents=True)
        for name, texts in (("corpus", documents), ("queries", queries)):
            lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        judged = [f"{query}\t{query if query in documents else next(iter(documents))}\t1\n" for query in queries]
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
        monkeypatch.setattr(data, "SHARD", size_of_shard)
        monkeypatch.setattr(evaluate, "embed_texts", lambda model, tokenizer, texts, layers, *rest, **named: {
            layer: torch.tensor([vectors[text] for text in texts]) for layer in layers})
        model, tokenizer = evaluate.load_model(saved)
        model.config.similarity = "dot"
        _, items = evaluate.retrieval(model, tokenizer, str(folder), ((1, 2),), "float32", runs_dir=tmp_path / "runs")
        found = {query: [] for query in queries}
        for line in (tmp_path / "runs" / f"made-{run}.run").read_text().splitlines():
            found[line.split()[0]].append(line.split()[2])
        return items, found
    return call


def test_a_thousand_queries_are_no_answers_to_themselves(ranked_by):
    """ Of 1,100 queries that are documents none finds itself, those beyond the first 1,024 included. """
    texts = {f"d{i}": f"word{i}" for i in range(1100)}
    angles = {f"word{i}": [math.cos(i / 1000), math.sin(i / 1000)] for i in range(1100)}
    items, found = ranked_by(texts, texts, angles, 25_000)
    assert not any(items["1:2"]["Recall@100"])
    assert all(len(ids) == 100 and query not in ids for query, ids in found.items())
    assert found["d1050"][:2] in (["d1049", "d1051"], ["d1051", "d1049"])


@pytest.mark.parametrize("size_of_shard", [25_000, 40])
def test_ties_at_rank_100(ranked_by, size_of_shard):
    """ Of 150 documents with one score the hundred with the last ids are kept, whatever their order and shards. """
    ids = [f"d{i:03}" for i in np.random.default_rng(0).permutation(150)]
    _, found = ranked_by({key: "same" for key in ids}, {"q": "query"}, {"same": [1.0, 0.0], "query": [1.0, 0.0]},
                         size_of_shard)
    assert found["q"] == [f"d{i:03}" for i in range(149, 49, -1)]


def test_bm25_finds_nothing_without_a_word_in_common(ranked_by):
    """ In the run of BM25 stand the documents that share a word with the query, and no others. """
    documents = {"d1": "an apple", "d2": "a bridge", "d3": "apple tree", "d4": "nothing"}
    vectors = {text: [1.0, 0.0] for text in [*documents.values(), "apple apple", "unknown"]}
    _, found = ranked_by(documents, {"q1": "apple apple", "q2": "unknown"}, vectors, 25_000, run="BM25")
    assert set(found["q1"]) == {"d1", "d3"} and found["q2"] == []


@pytest.mark.parametrize("pooling", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
                                     {"pooling_mode": "cls"}])
def test_sentence_transformers_folder(plain, pooling):
    """ Pooling, length and lower-casing come from the folder's own files; what is not supported is refused. """
    (plain / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48} | pooling))
    (plain / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": true}')
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (plain / "modules.json").write_text(json.dumps(modules[:2]))
    assert evaluate.load_model(plain, max_length=99)[1].model_max_length == 40   # its positions
    model, tokenizer = evaluate.load_model(plain)
    assert model.config.pooling == "cls" and tokenizer.model_max_length == 6
    assert evaluate.load_model(plain, max_length=5)[1].model_max_length == 5
    assert tokenizer.tokenize("The APPLE") == tokenizer.tokenize("the apple")
    (plain / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="modules.json asks for Dense"):
        evaluate.load_model(plain)


@pytest.fixture
def plain(saved):
    """ the folder as other programs write it: config.json says nothing of sizes, pooling and similarity """
    config = json.loads((saved / "config.json").read_text())
    for key in ("sizes", "size_names", "pooling", "similarity"):
        del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
                 "sentence_bert_config.json"):
        (saved / name).unlink()
    return saved


def write_files(folder, files):
    """ {name: text or JSON content, None to delete the file} """
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


POOLING = [{"type": "s.Transformer", "path": ""}, {"type": "s.Pooling", "path": "1_Pooling"}]
NORMALIZE = [{"type": "s.Transformer", "path": ""}, {"type": "s.Normalize", "path": "2_Normalize"}]
SIMILARITY, MODES = "config_sentence_transformers.json", "1_Pooling/config.json"
MEAN, CLS, LAST, SQRT = (f"pooling_mode_{mode}" for mode in ("mean_tokens", "cls_token", "lasttoken",
                                                            "mean_sqrt_len_tokens"))
WAYS = [   # files, overrides, (pooling, similarity) or what is said
    ({}, {}, ("mean", "cosine")),
    ({}, {"pooling": "cls", "similarity": "dot"}, ("cls", "dot")),
    ({SIMILARITY: {"similarity_fn_name": "dot"}}, {}, ("mean", "dot")),
    ({SIMILARITY: {"similarity_fn_name": None}}, {}, ("mean", "cosine")),
    ({SIMILARITY: {"similarity_fn_name": "dot"}, "modules.json": NORMALIZE}, {}, ("mean", "cosine")),
    ({SIMILARITY: {"similarity_fn_name": "dot"}}, {"similarity": "cosine"}, ("mean", "cosine")),
    ({SIMILARITY: {"similarity_fn_name": "euclidean"}}, {}, "'euclidean' is not supported; known are cosine, dot"),
    ({SIMILARITY: {"similarity_fn_name": "euclidean"}}, {"similarity": "dot"}, ("mean", "dot")),
    ({"modules.json": POOLING, MODES: {CLS: True, MEAN: False}}, {}, ("cls", "cosine")),
    ({"modules.json": POOLING, MODES: {SQRT: True, MEAN: False}}, {}, "pooling 'mean_sqrt_len' is not supported"),
    ({"modules.json": POOLING, MODES: {LAST: True}}, {}, "pooling 'lasttoken' is not supported; known are mean, cls"),
    ({"modules.json": POOLING, MODES: {CLS: True, MEAN: True}}, {}, "pooling 'cls and mean' is not supported"),
    ({"modules.json": POOLING, MODES: {"pooling_mode": "lasttoken"}}, {}, "pooling 'lasttoken' is not supported"),
    ({"modules.json": POOLING, MODES: {"pooling_mode": ["cls", "lasttoken"]}}, {}, "is not supported; known are mean, cls"),
    ({"modules.json": POOLING, MODES: {LAST: True}}, {"pooling": "mean"}, ("mean", "cosine"))]


@pytest.mark.parametrize("files, overrides, want", WAYS)
def test_pooling_and_similarity_of_foreign_folders(plain, files, overrides, want):
    """ They are those of sentence-transformers' files; overrides replace them, and what is not known is refused. """
    write_files(plain, files)
    if isinstance(want, str):
        with pytest.raises(ValueError, match=re.escape(want)):
            evaluate.load_model(plain, **overrides)
    else:
        config = evaluate.load_model(plain, **overrides)[0].config
        assert (config.pooling, config.similarity) == want


def test_our_own_similarity_counts(saved):
    """ What our config.json says of the similarity is not replaced by sentence-transformers' file. """
    write_files(saved, {SIMILARITY: {"similarity_fn_name": "dot"}})
    assert evaluate.load_model(saved)[0].config.similarity == "cosine"


def test_flags_of_pooling_and_similarity(saved, beir, tmp_path):
    """ --pooling and --similarity change what is evaluated, as the arguments of load_model do. """
    out = tmp_path / "o.json"
    evaluate.main(evaluate.parse_args([str(saved), "--retrieval", str(beir), "--out", str(out), "--pooling", "cls",
                                       "--similarity", "dot", "--save_run", str(tmp_path / "flags")]))
    model, tokenizer = evaluate.load_model(saved, pooling="cls", similarity="dot")
    evaluate.retrieval(model, tokenizer, str(beir), ((4, 48),), "float32", runs_dir=tmp_path / "same")
    model, tokenizer = evaluate.load_model(saved)
    evaluate.retrieval(model, tokenizer, str(beir), ((4, 48),), "float32", runs_dir=tmp_path / "own")
    flags, same, own = ((tmp_path / name / "beir-4-48.run").read_text() for name in ("flags", "same", "own"))
    assert flags == same != own


def weights(dtype):
    """ a model.safetensors with one weight """
    return safetensors.torch.save({"encoder.layer.0.output.dense.weight": torch.zeros(2, 2, dtype=dtype)})


BROKEN = [   # files, what is said
    ({"tokenizer.json": None}, "0 words in the tokenizer"),
    ({"tokenizer.json": {"version": "1.0"}}, "its tokenizer cannot be loaded"),
    ({"tokenizer.json": None, "tokenizer_config.json": None}, "0 words in the tokenizer"),
    *(({file: text}, f"{file}: not a JSON {kind}") for file, kind in (
        ("config.json", "dict"), ("modules.json", "list"), ("sentence_bert_config.json", "dict"), (SIMILARITY, "dict"),
        ("tokenizer.json", "dict"), ("tokenizer_config.json", "dict"), ("special_tokens_map.json", "dict"))
      for text in ('{"half": ', '"a string"', "[" * 10**5)),
    *(({"modules.json": [module]}, "modules.json: a module without type or path")
      for module in (1, {}, {"type": "s.Transformer"}, {"type": 5, "path": ""}, {"type": "s.Pooling", "path": None})),
    *(({"sentence_bert_config.json": {"max_seq_length": length}}, f"its max_seq_length is {length!r}")
      for length in ("many", -5, 2, [5], True)),
    ({"tokenizer_config.json": {"model_max_length": "many"}}, "its tokenizer cannot be loaded (TypeError: "),
    ({"vocab.txt": "apple\n", "tokenizer.json": None}, "Missing [UNK]"),
    ({"vocab.txt": "[UNK]\n" + "apple\n" * 9999, "tokenizer.json": None}, "words in the tokenizer"),
    ({"model.safetensors": "no weights"}, "model.safetensors: cannot be read"),
    ({"model.safetensors": None, "pytorch_model.bin": "no weights"}, "pytorch_model.bin: cannot be read"),
    *(({"model.safetensors": weights(dtype)}, f"layer.0.output.dense.weight is {dtype}, no float); copy or download it")
      for dtype in (torch.int8, torch.bool, torch.complex64))]


@pytest.mark.parametrize("files, message", BROKEN)
def test_a_broken_folder_is_refused_with_the_file(plain, files, message):
    """ A file that is missing or broken is refused with its name, in one line. """
    write_files(plain, files)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        evaluate.load_model(plain)
    assert str(plain) in str(error.value) and "\n" not in str(error.value)


def test_half_of_the_weights_are_refused(saved):
    """ model.safetensors that was cut off in a copy ends the program with one line that names the file. """
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file}: cannot be read" in refused_process("evaluate.py", str(saved))


@pytest.mark.parametrize("more, outcome", [(-1, "refused"), (0, ""), (127, ""), (128, "warning")])
def test_the_tokenizer_fits_the_model(model, tokenizer, tmp_path, capsys, more, outcome):
    """ Ids beyond the embeddings are refused, a much smaller vocabulary gives a warning, and padding gives none. """
    model.config.vocab_size = len(tokenizer) + more
    model.word = torch.nn.Embedding(model.config.vocab_size, 48)
    save_pretrained(model, tokenizer, tmp_path)
    message = f"{len(tokenizer)} words in the tokenizer, {len(tokenizer) + more} in the model"
    if outcome == "refused":
        with pytest.raises(ValueError, match=message):
            evaluate.load_model(tmp_path)
    else:
        evaluate.load_model(tmp_path)
        assert (f"warning: {tmp_path}: {message}" in capsys.readouterr().err) == (outcome == "warning")


def test_embeddings_of_another_vocabulary_or_shape_are_made_again(saved, beir, tmp_path, monkeypatch):
    """ Stored embeddings are not used for a tokenizer with other words, nor if their shape is not that of the texts. """
    model, tokenizer = evaluate.load_model(saved)
    calls, embed = [], evaluate.embed_texts
    monkeypatch.setattr(evaluate, "embed_texts", lambda *args: calls.append(args[2]) or embed(*args))
    def run(tokenizer):
        calls.clear()
        found, _ = evaluate.retrieval(model, tokenizer, str(beir), ((4, 48),), "float32", embeddings_dir=tmp_path / "e")
        return found, len(calls)
    first, passes = run(tokenizer)
    assert passes == 2 and run(tokenizer) == (first, 1)   # queries and a shard, then the queries alone
    file, = (tmp_path / "e").glob("*.npy")
    np.save(file, np.load(file)[:3])
    assert run(tokenizer) == (first, 2) and np.load(file).shape == (4, 48)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    other = type(tokenizer)(vocab={word: i for i, word in enumerate(words[:5] + words[:4:-1])})
    other.model_max_length = tokenizer.model_max_length
    assert run(other)[1] == 2
    model.config.num_attention_heads = 6
    assert run(tokenizer)[1] == 2
    cased = type(tokenizer)(vocab=tokenizer.get_vocab(), do_lower_case=False)
    cased.model_max_length = tokenizer.model_max_length
    assert run(cased)[1] == 2
    for file in (tmp_path / "e").glob("*.npy"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="npy: embeddings that cannot be read .* delete the files"):
        run(tokenizer)


def test_constant_cosines_count_as_0(saved, sts_file, tmp_path, capsys):
    """ A size whose cosines are all equal, as those of a single positive dim, has the value 0 and a note, not NaN. """
    model, tokenizer = evaluate.load_model(saved)
    model.blocks[-1].norm2.weight.data[0] = 0
    model.blocks[-1].norm2.bias.data[0] = 1
    save_pretrained(model, tokenizer, saved)
    out = tmp_path / "o.json"
    evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, "--sizes", "4:1", "--out", str(out)]))
    assert json.loads(out.read_text())["results"][0]["value"] == 0 and "NaN" not in out.read_text()
    assert "mine 4:1: the cosine of every pair is 1.0000; Spearman counts as 0" in capsys.readouterr().out
    evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, "--sizes", "4:48"]))
    evaluate.compare([str(out), str(saved / "eval.json")])
    assert "0.0000" in capsys.readouterr().out


def test_bootstrap_of_very_few_pairs():
    """ Resamples in which all gold scores are equal do not make a difference of three pairs significant. """
    assert evaluate.paired_bootstrap([0.1, 0.2, 0.3], [0.1, 0.3, 0.2], [1, 2, 3]) > 0.05


def test_no_nan_in_the_results(saved, sts_file, tmp_path, monkeypatch):
    """ A value that is not a number is an error, and the file of an earlier evaluation stays. """
    out = tmp_path / "o.json"
    out.write_text('{"per_item": "earlier"}')
    monkeypatch.setattr(evaluate, "spearman", lambda x, y: math.nan)
    with pytest.raises(ValueError, match="JSON compliant"):
        evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, "--out", str(out)]))
    assert out.read_text() == '{"per_item": "earlier"}'


@pytest.mark.parametrize("flags, message", [
    (["--sts", "STS", "BROKEN"], "bad.jsonl, line 1: has the columns"),
    (["--sts", "STS", "CONSTANT"], "same.jsonl: every score is 2.0; a correlation needs two different ones"),
    (["--retrieval", "BEIR", "NOTHING"], "has no qrels/test.tsv"),
    (["--retrieval", "BEIR", "NO_CORPUS"], "has no corpus.jsonl"),
    (["--sts", "STS", "--out", "FOLDER"], "no file can be written there; choose another --out or --plot"),
    (["--sts", "STS", "--out", "FOLDER/missing/o.json"], "no file can be written there"),
    (["--sts", "STS", "--plot", "FOLDER/missing/f.svg"], "no file can be written there"),
    (["--retrieval", "BEIR", "--save_run", "STS"], "File exists"),
    (["--retrieval", "BEIR", "--embeddings_dir", "STS"], "File exists"),
    (["--sts", "STS", "--out", "STS"], "holds what evaluate.py did not write; choose another file"),
    (["--sts", "STS", "--out", "BROKEN"], "holds what evaluate.py did not write"),
    (["--retrieval", "MY SET", "--save_run", "FOLDER/run"], "--save_run: 'my set' of"),
    (["--retrieval", "BLANKS", "--save_run", "FOLDER/run"], "--save_run: 'd 4' of")])
def test_mistakes_show_before_the_first_evaluation(saved, sts_file, beir, tmp_path, monkeypatch, flags, message):
    """ A second task that is broken, and a file that cannot be written, are refused before a text is embedded. """
    (tmp_path / "bad.jsonl").write_text('{"sentence1": "a"}\n')
    row = '{"sentence1": "a", "sentence2": "b", "score": 2}\n'
    (tmp_path / "same.jsonl").write_text(row * 3)
    (tmp_path / "nothing").mkdir()
    shutil.copytree(beir, tmp_path / "no_corpus")
    (tmp_path / "no_corpus" / "corpus.jsonl.gz").unlink()
    for name in ("my set", "blanks"):
        shutil.copytree(tmp_path / "no_corpus", tmp_path / name)
        (tmp_path / name / "corpus.jsonl").write_text("".join(
            f'{{"_id": "{key}", "text": "text"}}\n' for key in ("d1", "d2", "d3", "d 4" if name == "blanks" else "d4")))
    paths = {"STS": sts_file, "BROKEN": tmp_path / "bad.jsonl", "CONSTANT": tmp_path / "same.jsonl", "BEIR": beir,
             "NOTHING": tmp_path / "nothing", "NO_CORPUS": tmp_path / "no_corpus", "FOLDER": tmp_path,
             "MY SET": tmp_path / "my set", "BLANKS": tmp_path / "blanks"}
    monkeypatch.setattr(evaluate, "embed_texts", lambda *args: pytest.fail("an evaluation began"))
    monkeypatch.setattr(data, "SHARD", 2)   # the blank is not in the first shard
    for name, path in paths.items():
        flags = [re.sub(rf"^{name}\b", str(path), flag) for flag in flags]
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        evaluate.main(evaluate.parse_args([str(saved), *flags]))


@pytest.mark.parametrize("flag, file", [("--compare", "other.json"), ("--plot", "f.svg")])
def test_results_without_a_file_are_not_compared(saved, sts_file, monkeypatch, flag, file):
    """ The results of a model without sizes of its own go into no file, so they can be neither compared nor drawn. """
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"sizes": [], "size_names": []}))
    monkeypatch.setattr(evaluate, "embed_texts", lambda *args: pytest.fail("an evaluation began"))
    with pytest.raises(ValueError, match="--compare and --plot: this model's results go into .* add --out FILE.json"):
        evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, flag, file]))


@pytest.mark.parametrize("flags", [["--sts", "stsb"], ["--retrieval", "docs"], ["--speed"], ["--grid"],
                                   ["--out", "o.json"], ["--plot", "f.svg"], ["--compare", "a.json"]])
def test_search_evaluates_nothing(refused, flags):
    """ --search beside a flag of an evaluation, which it would pass over, is refused. """
    assert "--search answers a question and evaluates nothing" in refused(evaluate, ["m", "--search", "why", *flags])


def test_texts_of_no_word_are_refused(refused):
    """ --max_length 2 would leave [CLS] and [SEP] alone. """
    assert "--max_length: 2: must be 3 or more" in refused(evaluate, ["m", "--max_length", "2"])


def test_progress_is_for_terminals(model, capsys):
    """ Embedding many texts prints nothing where stderr is no terminal. """
    embed_ids(model, [np.array([5, 6])] * 2000, [1])
    assert capsys.readouterr().err == ""


@needs("sentence_transformers")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_of_sentence_transformers(tokenizer, tmp_path, pooling):
    """ A folder that sentence-transformers saved gives the embeddings of its own encode, to 1e-5. """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                                intermediate_size=80, max_position_embeddings=40, initializer_range=0.2))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"), max_seq_length=9)
    theirs = SentenceTransformer(modules=[transformer, Pooling(48, pooling)], device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    texts = ["the apple", "where is the bridge garden", "the candle stands beside the lantern in the morning and so on"]
    model, tokenizer = evaluate.load_model(tmp_path / "theirs")
    ours = evaluate.embed_texts(model, tokenizer, texts, [2])[2]
    torch.testing.assert_close(ours, torch.from_numpy(theirs.encode(texts)), rtol=0, atol=1e-5)
    assert ours.std() > 0.1 and tokenizer.model_max_length == 9   # the last text is cut


@pytest.fixture
def results_file(tmp_path):
    """ name, {size name: (queries,) MRR@10} -> a file as evaluate.py writes it, with the sizes in this order """
    def write(name, sizes):
        results, per_item = [], {"ids": [f"q{i}" for i in range(200)]}
        for size, values in {**sizes, "BM25": [0.1] * 200}.items():
            layer, dim = map(int, size.split(":")) if ":" in size else (None, None)
            per_item[size] = {"MRR@10": list(values), "nDCG@10": [value / 2 for value in values]}
            results += [{"task": "set", "metric": metric, "layer": layer, "dim": dim, "value": float(np.mean(items)),
                         "n": 200} for metric, items in per_item[size].items()]
            if layer:
                results.append({"task": "cost", "metric": "MFLOP/token", "layer": layer, "dim": dim,
                                "value": float(layer), "n": 1})
        content = {"model": f"out/{name}", "results": results, "per_item": {"set": per_item}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return str(tmp_path / f"{name}.json")
    return write


def test_several_files_count_as_one(results_file):
    """ LABEL=a.json,b.json joins the records and the per-item values of both; the default label is the first model. """
    a, b = results_file("a", {"1:8": [0.25] * 200}), results_file("b", {"2:4": [0.5] * 200})
    label, results, per_item = evaluate.load_results(f"mine={a},{b}")
    assert label == "mine" and evaluate.load_results(f"{a},{b}")[0] == "a"
    found = {(r["layer"], r["dim"]): r["value"] for r in results if r["metric"] == "MRR@10" and r["layer"]}
    assert found == {(1, 8): 0.25, (2, 4): 0.5}
    assert set(per_item["set"]) == {"ids", "1:8", "2:4", "BM25"} and per_item["set"]["2:4"]["MRR@10"] == [0.5] * 200


def test_compare_pairs_sizes_by_order(results_file, capsys):
    """ The smallest size is compared with the smallest, whatever the order of files and of sizes within them. """
    base = results_file("base", {"10:8": [0.3, 0.5] * 100, "2:4": [0.1, 0.3] * 100})
    small, large = results_file("small", {"1:9": [0.3] * 200}), results_file("large", {"12:8": [0.5] * 200})
    evaluate.compare([base, f"other={large},{small}"], ["MRR@10"])
    head, first, second, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["base", "other"]
    assert first.replace("*", "").split() == ["set", "MRR@10", "2:4", "0.2000", "1:9", "0.3000"]
    assert second.replace("*", "").split() == ["set", "MRR@10", "10:8", "0.4000", "12:8", "0.5000"]
    with pytest.raises(ValueError, match="--compare: 2, 1 sizes"):
        evaluate.compare([base, small])
    with pytest.raises(ValueError, match="--compare: no task and metric is in all files"):
        evaluate.compare([small, large], ["Spearman"])


def test_compare_what_cannot_be_compared(results_file, tmp_path, refused):
    """ One file alone, a file without results, and files of other queries joined by a comma are refused. """
    a, b = results_file("a", {"1:8": [0.25] * 200}), results_file("b", {"2:4": [0.5] * 200})
    assert f"--compare {a}: is one file" in refused(evaluate, ["--compare", a])
    content = json.loads(open(b).read())
    content["per_item"]["set"]["ids"][0] = "another"
    for name, other in (("other", content), ("empty", {"per_item": 5})):
        (tmp_path / f"{name}.json").write_text(json.dumps(other))
    assert "set is not the same set in all" in refused(evaluate, ["--compare", a, f"x={b},{tmp_path / 'other.json'}"])
    assert "no file that evaluate.py wrote" in refused(evaluate, ["--compare", a, str(tmp_path / "empty.json")])


def change(key, value):
    """ a function that sets results[key], or what is at per_item["set"][key]; None deletes it """
    def do(content):
        place = content["per_item"]["set"] if key in ("ids", "1:8", "a:8") else content
        place.pop(key, None)
        if value is not None:
            place[key] = value
    return do


@pytest.mark.parametrize("spoil, flags, message", [
    *((change(key, value), ["A", "B"], "--compare B: 'B' is no file that evaluate.py wrote")
      for key, value in (("model", None), ("model", 5), ("results", None), ("results", ["a"]), ("results", [{"n": 1}]),
                         ("per_item", [1]), ("per_item", "text"), ("per_item", {"set": [1]}), ("ids", None),
                         ("1:8", 5), ("a:8", {"MRR@10": [0.5] * 200}), ("1:8", {"MRR@10": [None] * 200}),
                         ("1:8", {"MRR@10": ["a"] * 200}), ("1:8", {"MRR@10": [0.5] * 9}))),
    (None, ["A", ""], "--compare : '' is no file that evaluate.py wrote"),
    (None, ["A", "x=B,"], "--compare x=B,: '' is no file"),
    (None, ["A", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
    (None, ["A", "FOLDER"], "Is a directory"),
    (None, ["A", "x=B,B"], "--compare x=B,B: two files have set at 1:8; leave one of them out"),
])
def test_results_that_a_hand_wrote(results_file, tmp_path, refused, spoil, flags, message):
    """ A file of results that lacks something, or that joins the same size twice, is refused. """
    paths = {name: results_file(name.lower(), {"1:8": [0.25, 0.5] * 100}) for name in "AB"}
    if spoil:
        spoil(content := json.loads(open(paths["B"]).read()))
        (tmp_path / "b.json").write_text(json.dumps(content))
    for name, path in [*paths.items(), ("FOLDER", str(tmp_path))]:
        flags, message = [re.sub(rf"\b{name}\b", path, flag) for flag in flags], re.sub(rf"\b{name}\b", path, message)
    said = refused(evaluate, ["--compare", *flags])
    assert message in said and "\n" not in said


@needs("matplotlib")
def test_plot_of_what_is_not_there(results_file, tmp_path, refused):
    """ --plot refuses results without one of --metrics or without a cost, and draws nothing. """
    file, svg = results_file("a", {"1:8": [0.25] * 200}), tmp_path / "f.svg"
    for metrics, lacks in ((["Spearman"], "Spearman"), (["MRR@10", "Spearman"], "MRR@10 or Spearman")):
        said = refused(evaluate, ["--compare", file, "--plot", str(svg), "--metrics", *metrics])
        assert f"--plot: {file} lacks {lacks}, or the cost of a size" in said
    content = json.loads(open(file).read())
    for kept in ("cost", "set"):
        rows = [r for r in content["results"] if r["task"] == kept]
        (tmp_path / "a.json").write_text(json.dumps(content | {"results": rows}))
        assert "lacks Spearman and nDCG@10, or the cost" in refused(evaluate, ["--compare", file, "--plot", str(svg)])
    assert not svg.exists()


def test_bm25_of_no_words(recwarn):
    """ A corpus without a word scores 0, without a warning. """
    assert not evaluate.bm25(["...", ""], ["?", "a"]).toarray().any() and not recwarn.list


def test_the_folder_here_has_a_name(beir, monkeypatch):
    """ --retrieval . is called as the folder is. """
    monkeypatch.chdir(beir)
    assert data.Collection(".").task == "beir"


def test_a_question_that_is_no_text(saved, tmp_path, refused):
    """ A byte of the command line that is no UTF-8 is refused. """
    (tmp_path / "t.txt").write_text("apple\n")
    flags = [str(saved), "--texts", str(tmp_path / "t.txt"), "--search", "bad \udcff byte"]
    assert "--search holds" in refused(evaluate, flags)


def test_no_question_and_no_stdin(refused, monkeypatch):
    """ --search without a question is refused at once where stdin is closed. """
    monkeypatch.setattr("sys.stdin", None)
    assert "--search without a QUESTION reads some from stdin, which is closed" in refused(evaluate, ["m", "--search"])


def test_compare_tests_the_chosen_metrics_alone(results_file, capsys):
    """ --metrics chooses the lines, and Bonferroni's correction counts these alone. """
    rng = np.random.default_rng(0)
    base = rng.random(200)
    gain = rng.normal(size=200)
    gain += 2.5 * gain.std() / 200**0.5 - gain.mean()   # t = 2.5: p = .013, above .05 / 4 and below .05 / 2
    files = [results_file(name, {"1:8": base + 0.01 * i * gain, "2:16": base}) for i, name in enumerate("ab")]
    evaluate.main(evaluate.parse_args(["--compare", *files, "--metrics", "MRR@10"]))
    _, small, large, note = capsys.readouterr().out.splitlines()
    assert small.endswith("*") and "*" not in large and "0.05 / 2 comparisons" in note
    evaluate.compare(files)
    *lines, note = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "*" not in "".join(lines) and "0.05 / 4 comparisons" in note


@needs("matplotlib")
def test_plot_draws_a_line_for_each_of_the_results(results_file, tmp_path):
    """ A line for each of the results, cost against the mean of the chosen metric, and one level for BM25. """
    from matplotlib import pyplot
    a = results_file("a", {"2:16": [0.5] * 200, "1:8": [0.25] * 200})
    b, c = results_file("b", {"1:8": [0.3] * 200}), results_file("c", {"3:9": [0.7] * 200})
    evaluate.plot([a, f"both={b},{c}"], tmp_path / "f.svg", ["MRR@10"])
    lines = [(line.get_xdata(), line.get_ydata()) for line in pyplot.gcf().axes[0].lines]
    pyplot.close("all")
    assert [list(x) for x, _ in lines] == [[1, 2], [0, 1], [1, 3]]   # the second is the level, in shares of the width
    assert [list(y) for _, y in lines] == [pytest.approx(y) for y in ([25, 50], [10, 10], [30, 70])]   # x 100
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "f.svg").read_text())
    assert {"a", "both", "BM25"} <= set(texts)
    evaluate.plot([a], tmp_path / "g.png")   # nDCG@10, which is half of it here
    assert list(pyplot.gcf().axes[0].lines[0].get_ydata()) == pytest.approx([12.5, 25])
    pyplot.close("all")


def test_average_by_hand():
    """ average gives the mean of each name over the records that have it, as floats, in order of appearance. """
    tensor = lambda value: torch.tensor(value, requires_grad=True)
    mean = average([{"b": tensor(1.0)}, {"a": tensor(5.0), "b": tensor(2.0)}, {"b": tensor(6.0)}])
    assert list(mean.items()) == [("b", 3.0), ("a", 5.0)] and type(mean["a"]) is float


def test_compare_marks_what_is_significant(tmp_path, capsys):
    """ A shift of every query is marked, by the t-test or the bootstrap, noise is not, and other data is refused. """
    rng = np.random.default_rng(0)
    gold, base = rng.normal(size=400), rng.normal(size=400)
    def write(name, queries, noise, ids="q"):
        cosine = gold + noise * base
        results = [{"task": t, "metric": m, "layer": 1, "dim": 8, "value": float(v), "n": 400} for t, m, v in
                   (("set", "MRR@10", np.mean(queries)), ("sts", "Spearman", evaluate.spearman(cosine, gold)))]
        per_item = {"set": {"ids": [f"{ids}{i}" for i in range(400)], "1:8": {"MRR@10": list(queries)}},
                    "sts": {"gold": gold.tolist(), "1:8": {"Spearman": cosine.tolist()}}}
        (tmp_path / name).write_text(json.dumps({"model": name, "results": results, "per_item": per_item}))
        return str(tmp_path / name)
    queries = rng.random(400)
    files = [write("a.json", queries, 1.0), write("b.json", queries + 0.02 + 0.05 * rng.normal(size=400), 0.5),
             write("c.json", queries + 0.2 * rng.normal(size=400), 1.001)]
    evaluate.compare(files)
    mrr, sts, note = capsys.readouterr().out.splitlines()[1:]
    assert mrr.count("*") == sts.count("*") == 1 and "0.05 / 4" in note
    assert mrr.rstrip().split("1:8")[2].strip().endswith("*") and sts.rstrip().split("1:8")[2].strip().endswith("*")
    with pytest.raises(ValueError, match="set is not the same set"):
        evaluate.compare([files[0], write("d.json", queries, 1.0, ids="other")])


def test_bootstrap_is_paired():
    """ A small gain on every pair is significant although each Spearman alone varies more; equal values give p = 1. """
    rng = np.random.default_rng(0)
    gold, noise = rng.normal(size=300), rng.normal(size=300)
    x, y = gold + noise, gold + 0.93 * noise
    rows = rng.integers(300, size=(200, 300))
    spread = np.std([evaluate.spearman(x[row], gold[row]) for row in rows])
    assert evaluate.spearman(y, gold) - evaluate.spearman(x, gold) < spread
    assert evaluate.paired_bootstrap(x, y, gold) < 1e-3
    assert evaluate.paired_bootstrap(x, x, gold) == 1


def test_bootstrap_equals_a_plain_loop():
    """ The p-value is that of the spread of the difference of the two Spearmans, resample by resample. """
    from scipy.stats import norm
    rng = np.random.default_rng(1)
    gold = np.round(rng.normal(size=80))   # with ties
    x, y = gold + rng.normal(size=80), gold + 1.3 * rng.normal(size=80)
    rows = np.random.default_rng(0).integers(80, size=(50, 80))
    first, second = ([evaluate.spearman(values[row], gold[row]) for row in rows] for values in (x, y))
    difference = abs(evaluate.spearman(x, gold) - evaluate.spearman(y, gold))
    want = 2 * norm.sf(difference / np.std(np.subtract(first, second)))
    assert evaluate.paired_bootstrap(x, y, gold, resamples=50) == pytest.approx(want, rel=1e-9) and 1e-6 < want < 0.9


@needs("matplotlib")
def test_plot(saved, beir, sts_file, tmp_path):
    """ The figure names the model and labels each size with its bytes, as text of the SVG. """
    evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, "--retrieval", str(beir),
                                       "--plot", str(tmp_path / "f.svg")]))
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "f.svg").read_text())
    assert {"1:8", "32 B", "4:48", "192 B", saved.name} <= set(texts)
    assert any("mine Spearman, beir nDCG@10" in text for text in texts)


def test_every_encoding_has_the_dtype_of_the_flag(saved, sts_file, beir, monkeypatch):
    """ With --dtype bfloat16 STS, retrieval, speed and search encode in bfloat16. """
    used, forward = set(), Bert.forward
    def watched(*args):
        used.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(*args)
    monkeypatch.setattr(Bert, "forward", watched)
    for flags in (["--sts", sts_file, "--sizes", "1:8", "--speed"], ["--retrieval", str(beir)],
                  ["--search", "an apple", "--texts", str(beir)]):
        evaluate.main(evaluate.parse_args([str(saved), *flags, "--dtype", "bfloat16", "--device", "cpu"]))
        assert used == {torch.bfloat16}, flags
        used.clear()


def test_units_of_the_speed(saved, monkeypatch):
    """ Where every encoding takes 5 ms by the clock, a query takes 5 ms, and 512 texts are 102,400 a second. """
    model, tokenizer = evaluate.load_model(saved)
    clock = itertools.count()
    monkeypatch.setattr(evaluate, "embed_texts", lambda *_: None)
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: 0.005 * next(clock))
    found = {r["metric"]: r["value"] for r in evaluate.speed(model, tokenizer, ((1, 8),), "float32")}
    assert found == pytest.approx({"ms/query": 5, "p95 ms": 5, "texts/s": 512 / 0.005})


def test_p95_of_the_speed_is_by_rank(saved, monkeypatch):
    """ After three slow passes, of 50 queries that take 50, 49, ... 1 ms, 47 are faster than the p95 of 48 ms. """
    model, tokenizer = evaluate.load_model(saved)
    now, ms = [0.0], iter([900] * 3 + list(range(50, 0, -1)) + [512])
    def embed_texts(*args):
        now[0] += next(ms) / 1000
    monkeypatch.setattr(evaluate, "embed_texts", embed_texts)
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: now[0])
    found = {r["metric"]: r["value"] for r in evaluate.speed(model, tokenizer, ((1, 8),), "float32")}
    assert found == pytest.approx({"ms/query": 25.5, "p95 ms": 48, "texts/s": 1000})


def test_grid_and_speed(saved, sts_file, tmp_path, capsys):
    """ --grid evaluates every layer at every dim of the sizes, and --speed times each. """
    out = str(tmp_path / "o.json")
    evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, "--grid", "--speed", "--out", out]))
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    found = [(r["layer"], r["dim"]) for r in results if r["metric"] == "Spearman"]
    assert found == [(layer, dim) for layer in (1, 2, 3, 4) for dim in (8, 48)]
    assert all(r["value"] > 0 for r in results if r["task"] == "cost")


def test_the_table_names_trained_sizes_alone(saved, sts_file, tmp_path, capsys):
    """ A size has a name in the table if the model was trained for it, not because the paper would give it one. """
    config = json.loads((saved / "config.json").read_text())
    config |= {"sizes": [[1, 8], [3, 48]], "size_names": ["Demi", "Large"]}
    (saved / "config.json").write_text(json.dumps(config))
    evaluate.main(evaluate.parse_args([str(saved), "--sts", sts_file, "--grid", "--out", str(tmp_path / "o.json")]))
    lines = capsys.readouterr().out.splitlines()[-8:]
    assert [" ".join(re.match(r"(\D*)(\d:\d+)", line).groups()).split() for line in lines] == [
        ["Demi", "1:8"], ["1:48"], ["2:8"], ["2:48"], ["3:8"], ["Large", "3:48"], ["4:8"], ["4:48"]]


JUDGED = "query-id\tcorpus-id\tscore\n"
BAD = {
    "corpus.jsonl": [
        ('{"_id": "d1", "text": "x"}\n{"_id": "d1", "text": "y"}\n',
         "corpus.jsonl, line 2: the id 'd1' is there twice"),
        ('{"_id": "d1", "text": "x"}\n{"_id": "d2"\n', "corpus.jsonl, line 2: not a JSON object"),
        ('{"_id": "d1"}\n', "corpus.jsonl, line 1: has the columns _id; it needs _id and text"),
        ("", "corpus.jsonl is empty"),
        ('{"_id": "d1", "text": "x"}\n', "test.tsv, line 3: document 'd3' is not in the corpus")],
    "qrels/test.tsv": [
        (f"{JUDGED}q9\td1\t1\n", "test.tsv, line 2: query 'q9' is not among the queries"),
        (f"{JUDGED}q1\td1\thigh\n", "test.tsv, line 2: needs the columns query-id, corpus-id and score"),
        (f"{JUDGED}q1\td1\t1\nq1\td1\t2\n", "test.tsv, line 3: query 'q1' and document 'd1' are judged twice"),
        (JUDGED, "no judgements")],
    "sts.jsonl": [
        ('{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "b"}\n',
         "line 2: has the columns"),
        ('{"sentence1": "a", "sentence2": "b", "score": NaN}\n', "line 1: the score nan is not a finite number"),
        ('{"sentence1": "a", "sentence2": "b", "score": 1}\n', "1 pairs; a correlation needs two or more")],
}


@pytest.mark.parametrize("file, text, message", [(file, *case) for file, cases in BAD.items() for case in cases])
def test_bad_files_are_named_with_the_line(saved, beir, file, text, message):
    """ A file that is wrong is refused with its name and, where there is one, its line. """
    (beir / "corpus.jsonl.gz").unlink()
    (beir / "corpus.jsonl").write_text("".join(f'{{"_id": "d{i}", "text": "text"}}\n' for i in range(1, 5)))
    (beir / file).write_text(text)
    task = ["--sts", str(beir / file)] if file == "sts.jsonl" else ["--retrieval", str(beir)]
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.main(evaluate.parse_args([str(saved), *task]))


def test_figures_of_a_real_model():
    """ all-MiniLM-L6-v2 has 82.03 on STS-B, as with sentence-transformers, where model and data are at hand. """
    model_folder, sts_file = os.environ.get("MINILM"), os.environ.get("STSB")
    if not model_folder or not sts_file:
        pytest.skip("set MINILM to a folder of all-MiniLM-L6-v2 and STSB to a file of the STS-B test set")
    model, tokenizer = evaluate.load_model(model_folder)
    (r,), _ = evaluate.sts(model, tokenizer, sts_file, ((6, 384),), "float32")
    assert r["value"] == pytest.approx(0.8203, abs=2e-4)
