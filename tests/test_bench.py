""" The benchmark: every contestant takes its steps, and those that claim to do the same work have the same loss. """
import functools, itertools, math, pickle, re
from concurrent.futures import Future

import pytest

from conftest import NOUNS, needs, write_jsonl
from model import new_config
from tools import bench

class Worker:
    """ in place of a process: what it is given can be pickled, and it has a READY of its own """
    def __init__(self, *_):
        self.ready, self.shutdown = [], lambda: None

    def submit(self, function, *args):
        bench.READY, done = self.ready, Future()
        done.set_result(function(*pickle.loads(pickle.dumps(args))))
        return done

@needs("sentence_transformers")
def test_contestants(bert_folder, tmp_path, capsys, monkeypatch):
    """ Each has a row. The padded BertModel has our loss at all sizes, and MultipleNegativesRankingLoss that of our
    full size alone: the same triplets, weights, pooling, temperature. That of SMAE is a mean over words: log(V) with
    random weights. Without sentence-transformers its rows are left out. """
    small = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 3}
    monkeypatch.setattr(bench, "new_config", functools.partial(new_config, **small))   # not of BERT-base's shape
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Worker)
    monkeypatch.setattr(bench, "READY", [])
    rows = [{"query": f"where is the {a} {b}", "positive": f"the {a} beside the {b}", "negative": f"a {b} or an {a}"}
            for a in NOUNS[:4] for b in NOUNS[4:8]]
    pairs = write_jsonl(tmp_path / "triplets.jsonl", rows)
    (tmp_path / "text.txt").write_text("the apple stands beside the bridge\n")
    def race(*flags):
        """ -> {contestant: [ms, times ours, GB, loss]} """
        small_race = ["--rounds", "1", "--batch_size", "8", "--dropout", "0", "--smae", str(tmp_path / "text.txt")]
        bench.main(bench.parser.parse_args([bert_folder, pairs, *small_race, *flags]))
        lines = re.findall(r"^(S.+?) {2,}(\d.*)$", capsys.readouterr().out, re.M)
        return {name: list(map(float, numbers.split())) for name, numbers in lines}
    found = race("--dtype", "float32")
    assert list(found) == list(bench.CONTESTANTS) and found["SRL here, all sizes"][1] == 1
    all_sizes, alone, _, ranking, padded, *smae = [numbers[-1] for numbers in found.values()]
    assert all_sizes == pytest.approx(padded, abs=5e-6) and alone == pytest.approx(ranking, abs=5e-6)
    assert abs(all_sizes - alone) > 1e-3 and smae == pytest.approx([math.log(148)], rel=0.02)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert list(race("--dtype", "bfloat16")) == [name for name in bench.CONTESTANTS if "Loss" not in name]

def test_units_of_the_embedding_speed(bert_folder, monkeypatch, capsys):
    """ Without pairs each size has a line. By a clock that gives each encoding its ms times the layer: three warm up,
    50 queries have a median, and 512 texts make texts a second. """
    now, ms = [0.0], itertools.cycle([900] * 3 + list(range(50, 0, -1)) + [512])
    def embed(model, tokenizer, texts, layers, dtype):
        assert dtype == "bfloat16" and len(texts) in (1, 512)
        now.append(now[-1] + next(ms) * layers[0] / 1000)
    monkeypatch.setattr(bench, "embed_texts", embed)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[-1])
    bench.main(bench.parser.parse_args([bert_folder, "--dtype", "bfloat16"]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-7:]]
    want = [[f"{layer}:{dim}", f"{25.5 * layer:.2f}", f"{1000 / layer:.0f}"]
            for layer, dim in ((1, 2), (1, 4), (2, 8), (2, 16), (2, 32), (3, 48))]
    assert lines == [["bfloat16", "ms/query", "texts/s"], *want]
