""" The benchmark: every contestant takes its steps, and those that claim to do the same work have the same loss. """
import functools, math, re

import pytest

from conftest import NOUNS, needs, write_jsonl
from model import new_config
from tools import bench

def race(bert_folder, folder, capsys, *flags):
    """ one round on triplets -> {contestant: [ms, times ours, GB, loss]} """
    rows = [{"query": f"where is the {a} {b}", "positive": f"the {a} beside the {b}", "negative": f"a {b} or an {a}"}
            for a in NOUNS[:4] for b in NOUNS[4:8]]
    pairs = write_jsonl(folder / "triplets.jsonl", rows)
    bench.main(bench.parse_args([bert_folder, pairs, "--rounds", "1", "--batch_size", "8", "--dropout", "0", *flags]))
    lines = re.findall(r"^(S.+?) {2,}(\d.*)$", capsys.readouterr().out, re.M)
    return {name: list(map(float, numbers.split())) for name, numbers in lines}

@needs("sentence_transformers")
def test_srl_contestants(bert_folder, tmp_path, capsys):
    """ Each has a row. The padded BertModel has our loss at all sizes, and MultipleNegativesRankingLoss that of our
    full size alone: the same triplets, weights, pooling, temperature. """
    found = race(bert_folder, tmp_path, capsys, "--dtype", "float32")
    assert list(found) == [name for name in bench.CONTESTANTS if name.startswith("SRL")]
    all_sizes, alone, _, ranking, padded = [numbers[-1] for numbers in found.values()]
    assert all_sizes == pytest.approx(padded, abs=5e-6) and alone == pytest.approx(ranking, abs=5e-6)
    assert abs(all_sizes - alone) > 1e-3 and found["SRL here, all sizes"][1] == 1

@needs("sentence_transformers")   # as slow as the other one
def test_smae_contestants_and_what_is_not_installed(bert_folder, tmp_path, capsys, monkeypatch):
    """ --smae adds three rows, whose loss is a mean over words: log(V) with random weights. Without
    sentence-transformers its rows are left out. """
    small = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 3}
    monkeypatch.setattr(bench, "new_config", functools.partial(new_config, **small))   # not of BERT-base's shape
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.delitem(bench.CONTESTANTS, "SRL here, all sizes")
    (tmp_path / "text.txt").write_text("the apple stands beside the bridge\n")
    found = race(bert_folder, tmp_path, capsys, "--smae", str(tmp_path / "text.txt"), "--dtype", "bfloat16")
    assert list(found) == [name for name in bench.CONTESTANTS if "Loss" not in name]
    losses = [numbers[-1] for name, numbers in found.items() if name.startswith("SMAE")]
    assert losses == pytest.approx([math.log(148)] * 3, rel=0.02)
