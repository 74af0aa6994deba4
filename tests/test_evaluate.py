""" The metrics are trec_eval's, and encoding does not depend on the batches. """
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import evaluate
from evaluate import Collection, bm25, encode, mrr_at_10, ndcg_at_10, rank, recall_at_100, score
from model import save_pretrained


def test_metrics_by_hand():
    """ relevant documents at ranks 2 (grade 1) and 4 (grade 3), a third one (grade 2) not found """
    ranked, grades = ["a", "b", "c", "d"], {"b": 1, "d": 3, "z": 2, "c": 0}
    assert mrr_at_10(ranked, grades) == 1 / 2
    dcg, ideal = 1 / math.log2(3) + 3 / math.log2(5), 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg_at_10(ranked, grades) == pytest.approx(dcg / ideal, abs=1e-12)
    assert recall_at_100(ranked, grades) == pytest.approx(2 / 3)
    assert mrr_at_10(list("abcdefghij") + ["k"], {"k": 1}) == 0   # rank 11


def ranking(scores, ids):
    """ one query's (P,) scores -> the 100 best ids, through the function that keeps the best and the one that ranks them """
    best = (torch.full((1, evaluate.K), -np.inf), torch.zeros(1, evaluate.K, dtype=torch.long))
    half = len(ids) // 2   # as if the corpus came in two shards
    evaluate.keep(best, slice(0, 1), torch.tensor(scores[:half])[None], 0)
    evaluate.keep(best, slice(0, 1), torch.tensor(scores[half:])[None], half)
    (numbers, _), = rank(best[0].numpy(), best[1].numpy(), np.argsort(np.argsort(np.array(ids))))
    return [ids[i] for i in numbers]


def test_ties_are_broken_by_descending_document_id():
    """ as strings: d3 comes before d10; -inf is no hit """
    assert ranking(np.float32([1, 2, 1, 1, -np.inf]), ["d1", "d2", "d10", "d3", "d4"]) == ["d2", "d3", "d10", "d1"]


def test_metrics_against_trec_eval():
    """ random runs with ties and grades, equal to 1e-9 """
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval is not installed: an optional second opinion on the metrics")
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
        assert mrr_at_10(ranked, grades) == pytest.approx(theirs["recip_rank"] if theirs["recip_rank"] >= 0.1 else 0, abs=1e-9)


def test_bm25_by_hand():
    """
    3 documents of 2, 1 and 3 words (mean 2); "tea" is in two of them: idf = log(1 + 1.5 / 2.5) = log 1.6.
    Document 1: tf 1, norm = 1.2 * (0.25 + 0.75 * 2 / 2) = 1.2, so 2.2 / 2.2; document 3: tf 2, norm = 1.2 * 1.375 = 1.65, so 4.4 / 3.65
    """
    scores = bm25(["Green tea", "coffee", "tea, tea_pot"], ["TEA?", "milk"]).toarray()
    assert scores[0] == pytest.approx([math.log(1.6), 0, math.log(1.6) * 4.4 / 3.65])
    assert scores[1].tolist() == [0, 0, 0]


def test_encode_ignores_batches_and_order(model, texts):
    """ one text a batch, all in one, and in another order: the same embeddings to rounding """
    one, all_of_them = encode(model, texts, [2, 4], batch_tokens=1), encode(model, texts, [2, 4])
    turned = encode(model, texts[::-1], [2, 4], batch_tokens=40)
    for layer in (2, 4):
        torch.testing.assert_close(one[layer], all_of_them[layer], rtol=0, atol=2e-6)
        torch.testing.assert_close(turned[layer].flip(0), one[layer], rtol=0, atol=2e-6)


def test_score_slices_first():
    q, p = torch.tensor([[3.0, 4.0, 100.0]]), torch.tensor([[4.0, 3.0, -100.0]])
    assert score(q, p, 2, "dot").item() == 24
    assert score(q, p, 2, "cosine").item() == pytest.approx(24 / 25)


def test_collection(beir):
    """ titles are joined, gz is read, only the judged queries are kept """
    collection = Collection(str(beir))
    (ids, texts), = collection.shards()
    assert texts[0] == "apple an apple is a fruit" and texts[1] == "a bridge crosses the river"
    assert list(collection.queries) == ["q1", "q2"] and collection.qrels["q1"] == {"d1": 2, "d3": 1}


def test_command_line(model, tokenizer, beir, tmp_path, monkeypatch, capsys):
    """ the table, the JSON beside the model, and search in the documentation """
    model.config.sizes, model.word = ((1, 8), (4, 48)), torch.nn.Embedding(len(tokenizer), 48)
    model.config.vocab_size = len(tokenizer)
    save_pretrained(model, tokenizer, tmp_path / "m")
    evaluate.main(evaluate.parse_args([str(tmp_path / "m"), "--retrieval", str(beir), "--device", "cpu"]))
    table = capsys.readouterr().out
    assert "1:8" in table and "BM25" in table and "Recall@100" in table
    saved = json.loads((tmp_path / "m" / "eval.json").read_text())
    assert {"task", "metric", "layer", "dim", "value", "n"} == set(saved["results"][0])
    bm25_rows = [r for r in saved["results"] if r["layer"] is None]
    assert {r["metric"]: r["value"] for r in bm25_rows} == {"MRR@10": 1, "nDCG@10": 1, "Recall@100": 1}

    (beir / "train.jsonl").write_text('{"name": "pkg.f", "query": "the bridge", "positive": "stands beside the river"}\n')
    (beir / "corpus.jsonl").write_text('{"_id": "0", "name": "pkg.g", "query": "an apple", "text": "fruit"}\n')
    monkeypatch.setattr(data, "docs_folder", lambda: beir)
    evaluate.main(evaluate.parse_args([str(tmp_path / "m"), "--search", "the bridge stands beside the river", "--device", "cpu"]))
    assert "pkg.f" in capsys.readouterr().out.splitlines()[0]


def test_bad_input_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, evaluate.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].endswith("give one that save_pretrained wrote")
    assert "Traceback" not in done.stderr
