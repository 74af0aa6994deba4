""" The loss is the equation, gradients go where they should, and the script runs or says in one line why not. """
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import finetune_srl
import model
from conftest import NOUNS, make_beir, needs, refused_process
from finetune_srl import cached_backward, cosent, main, order_channels, parse_args, srl_loss, step_sizes
from model import (Bert, BertConfig, average, from_pretrained, get_lr, load_model, load_tokenizer, named_sizes, pack,
                   save_pretrained)

ROOT = Path(finetune_srl.__file__).parent


SMALL = ("--retrieval= --vocab_size 200 --num_layers 3 --hidden_size 64 --sizes 1:8,3:64 --batch_size 16 --max_steps 4 "
         "--log_interval 1 --dtype float32 --device cpu --no-compile").split()


@pytest.fixture(scope="module")
def trained(pairs_file, tmp_path_factory):
    """ the folder of a run with dropout and with evaluation, which tests read and do not change """
    folder = tmp_path_factory.mktemp("trained")
    run(pairs_file, folder / "a", "--retrieval", str(make_beir(folder / "beir")), "--eval_interval", "2",
        "--dropout", "0.1")
    return folder / "a"


def loss_and_terms(*args):
    """ srl_loss -> loss, [InfoNCE a size], [KL a size]; the tests know the form of what it returns from here alone """
    loss, nce, kl = srl_loss(*args)
    return loss, list(nce.values()), list(kl.values())


def logged(out_dir, kind="loss"):
    """ the records of log.jsonl that have this key """
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [record for record in records if kind in record]


def logged_terms(record, kind):
    """ "nce" or "kl" of a record -> [a value a size], from the smallest to the largest """
    return list(record[kind].values())


def adamw(bert, learning_rate, weight_decay, embedding_lr_scale=1.0):
    """ the optimizer of a run """
    return model.configure_optimizer(dict(bert.named_parameters()), learning_rate, weight_decay,
                                     ("word.weight", "position.weight", "token_type.weight"), embedding_lr_scale)


def run(pairs_file, out_dir, *flags):
    """ a whole run on 64 short pairs, a second or less """
    main(parse_args(["--train_pairs", pairs_file, "--out_dir", str(out_dir), *SMALL, *flags]))


class Masks:
    """ dropout masks of a generator of their own: the same ones in every run, whatever else draws random numbers """

    def __init__(self):
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, size, p, dtype):
        return (torch.rand(size, generator=self.random) >= p).to(dtype) / (1 - p)


def plain_loop(bert_folder, pairs_file, lrs, embedding_scale, weight_decay, clip, kl_weight, p):
    """ what a run of main has to do, in plain PyTorch -> the trained model, [loss a step], [norm a step] """
    bert = from_pretrained(bert_folder, hidden_dropout_prob=p, attention_probs_dropout_prob=p).train()
    pairs = data.tokenize_pairs(data.load_pairs(pairs_file), load_tokenizer(bert_folder), 32, 64)
    embeddings = {"word.weight", "position.weight", "token_type.weight"}
    optimizer = torch.optim.AdamW([{"params": [q], "weight_decay": weight_decay if q.dim() > 1 else 0.0,
                                    "scale": embedding_scale if name in embeddings else 1.0}
                                   for name, q in bert.named_parameters()])
    losses, norms = [], []
    for step, lr in enumerate(lrs):
        queries, passages, *_ = data.srl_batch([pairs], 16, 1, 64, 1, step)
        taps = bert.encode(pack(queries + passages), [1, 3])
        loss, *_ = loss_and_terms({n: t[:16] for n, t in taps.items()}, {n: t[16:] for n, t in taps.items()},
                                  ((1, 8), (3, 48)), "cosine", 0.2, kl_weight)
        bert.zero_grad()
        loss.backward()
        norm = torch.stack([q.grad.norm() for q in bert.parameters()]).norm()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            for q in group["params"]:
                q.grad *= min(1, clip / norm)
        optimizer.step()
        losses.append(loss.item()), norms.append(norm.item())
    return bert, losses, norms


def test_a_run_equals_a_plain_loop(bert_folder, pairs_file, tmp_path, monkeypatch):
    """ Four steps of main give the weights, losses and norms of a plain loop, with every option on. """
    monkeypatch.setattr(model, "dropout_mask", Masks())
    run(pairs_file, tmp_path / "a", "--init_from", bert_folder, "--sizes", "1:8,3:48", "--max_length", "64",
        "--learning_rate", "0.002", "--warmup", "0.5", "--embedding_lr_scale", "3", "--weight_decay", "0.3",
        "--grad_clip", "0.5", "--kl_weight", "0.3", "--temperature", "0.2", "--dropout", "0.25")
    monkeypatch.setattr(model, "dropout_mask", Masks())
    bert, losses, norms = plain_loop(bert_folder, pairs_file, [0.001, 0.002, 0.002, 0.001], 3.0, 0.3, 0.5, 0.3, 0.25)
    assert min(norms) < 0.5 < max(norms)   # clipping bites in some steps
    assert [r["loss"] for r in logged(tmp_path / "a")] == pytest.approx(losses, rel=1e-4)
    assert [r["norm"] for r in logged(tmp_path / "a")] == pytest.approx(norms, rel=1e-3)
    assert [r["learning_rate"] for r in logged(tmp_path / "a")] == pytest.approx([0.001, 0.002, 0.002, 0.001])
    for (name, found), want in zip(from_pretrained(tmp_path / "a").named_parameters(), bert.parameters()):
        if name.endswith("qkv.bias"):   # softmax ignores the bias of the keys: its gradient is rounding error
            found, want = (torch.cat([bias[:48], bias[96:]]) for bias in (found, want))
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5, msg=name)


def test_loss_by_hand():
    """ srl_loss gives the numbers of a worked example: 2 queries, 2 positives, sizes (1, 1) and (2, 2), dot, T = 1. """
    # layer 1, first coordinate: q = (1, 0), p = (2, 1), so s = [[2, 1], [0, 0]];
    #     CE: -log(e^2 / (e^2 + e)) = log(1 + 1/e) and log 2, mean m1 = (log(1 + 1/e) + log 2) / 2
    # layer 2, both coordinates: q = (1, 0), (0, 1), p = (3, 0), (0, 3), so s = [[3, 0], [0, 3]]; m2 = log(1 + e^-3)
    # KL of layer 1 from the teacher's rows (a, b), (b, a), a = 1 / (1 + e^-3), b = 1 - a:
    #     row 1: a log(a / c) + b log(b / d) with c = 1 / (1 + 1/e), d = 1 - c; row 2: a log(2a) + b log(2b)
    q = {1: torch.tensor([[1.0, 9.0], [0.0, 9.0]]), 2: torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    p = {1: torch.tensor([[2.0, 7.0], [1.0, -7.0]]), 2: torch.tensor([[3.0, 0.0], [0.0, 3.0]])}
    loss, nce, kl = loss_and_terms(q, p, ((1, 1), (2, 2)), "dot", 1.0, 0.5)
    m1, m2 = (math.log(1 + 1 / math.e) + math.log(2)) / 2, math.log(1 + math.exp(-3))
    a = 1 / (1 + math.exp(-3))
    b, c = 1 - a, 1 / (1 + 1 / math.e)
    row1 = a * math.log(a / c) + b * math.log(b / (1 - c))
    row2 = a * math.log(2 * a) + b * math.log(2 * b)
    assert [x.item() for x in nce] == pytest.approx([m1, m2], abs=1e-6)
    assert [x.item() for x in kl] == pytest.approx([(row1 + row2) / 2, 0], abs=1e-6)
    assert loss.item() == pytest.approx((m1 + m2) / 2 + 0.5 * (row1 + row2) / 4, abs=1e-6)


def test_cosine_slices_before_it_normalises():
    """ The score of (1, 1) is 1 or -1, divided by T, whatever the second coordinate is. """
    q, p = {1: torch.tensor([[0.1, 5.0], [-0.1, 5.0]])}, {1: torch.tensor([[0.2, 8.0], [-0.3, 8.0]])}
    _, nce, _ = loss_and_terms(q, p, ((1, 1),), "cosine", 0.5, 1.0)
    assert nce[0].item() == pytest.approx(math.log(1 + math.exp(-4)), abs=1e-6)   # s = [[2, -2], [-2, 2]]


def test_hard_negatives_are_candidates_of_every_query():
    """ A third passage, equal to the two positives, adds a third term to the denominator of both queries. """
    q, p = {1: torch.zeros(2, 4)}, {1: torch.zeros(3, 4)}
    _, nce, _ = loss_and_terms(q, p, ((1, 4),), "dot", 1.0, 1.0)
    assert nce[0].item() == pytest.approx(math.log(3), abs=1e-6)


def test_duplicates_are_no_negatives():
    """ Queries a b a with positives x y z and hard negatives x w: for both a, x and z are positives. """
    a, b, w, x, y, z = (np.array([2, i, 3], dtype=np.uint16) for i in range(10, 16))
    assert data.duplicates([a, b, a], [x, y, z, x, w]).tolist() == [[False, False, True, True, False], [False] * 5,
                                                                    [True, False, False, True, False]]
    assert data.duplicates([a, b], [x, y, z]) is None
    # The loss is that of each query without the passages that are left out, so both terms ignore them.
    torch.manual_seed(0)
    q, p = {n: torch.randn(3, 8) for n in (1, 2)}, {n: torch.randn(5, 8) for n in (1, 2)}
    same = torch.from_numpy(data.duplicates([a, b, a], [x, y, z, x, w]))
    found = srl_loss(q, p, ((1, 4), (2, 8)), "dot", 0.5, 1.0, same=same)
    nce, kl = [], []
    for i, left in enumerate(([0, 1, 4], [0, 1, 2, 3, 4], [1, 2, 4])):
        small, full = (q[n][i, :d] @ p[n][left, :d].T / 0.5 for n, d in ((1, 4), (2, 8)))
        nce.append(-small.log_softmax(-1)[left.index(i)])
        kl.append((full.softmax(-1) * (full.log_softmax(-1) - small.log_softmax(-1))).sum())
    assert found[1]["1:4"].item() == pytest.approx(torch.stack(nce).mean().item(), abs=1e-5)
    assert found[2]["1:4"].item() == pytest.approx(torch.stack(kl).mean().item(), abs=1e-5)
    teacher = srl_loss(q, p, ((1, 4), (2, 8)), "dot", 0.5, 1.0, q[2] @ p[2].T / 0.5, same=same)
    assert teacher[2]["1:4"].item() == pytest.approx(found[2]["1:4"].item(), abs=1e-6)


def test_training_leaves_duplicates_out(tmp_path, bert_folder, capsys):
    """ If all positives or all queries are one text, nothing is left to rank: a loss of 0, and a warning. Scored pairs
    with one first sentence are no duplicates. """
    path, flags = tmp_path / "pairs.jsonl", ["--init_from", bert_folder, *SMALL, "--max_steps", "2",
                                              "--sizes", "1:8,3:48"]
    for one, other in (("query", "positive"), ("positive", "query")):
        path.write_text("".join(json.dumps({one: noun, other: "the same"}) + "\n" for noun in NOUNS[:8]))
        main(parse_args(["--train_pairs", str(path), "--out_dir", str(tmp_path / one), *flags]))
        assert [record["loss"] for record in logged(tmp_path / one)] == [0, 0]
        assert "warning: all queries or all positives of the first batch are the same" in capsys.readouterr().err
    path.write_text("".join(json.dumps({"sentence1": "the same", "sentence2": noun, "score": i}) + "\n"
                            for i, noun in enumerate(NOUNS[:8])))
    main(parse_args(["--train_pairs", str(path), "--out_dir", str(tmp_path / "b"), *flags]))
    assert all(value > 0 for record in logged(tmp_path / "b") for value in (record["nce"]["1:8"], record["kl"]["1:8"]))
    assert "warning" not in capsys.readouterr().err


def split(taps, queries):
    """ {layer: (Q + P, C)} -> the queries and the passages """
    return {n: tap[:queries] for n, tap in taps.items()}, {n: tap[queries:] for n, tap in taps.items()}


def test_the_teacher_learns_nothing_from_the_small_sizes():
    """ The gradient of the KL part alone is 0 at the full size and not at the small one. """
    torch.manual_seed(0)
    taps = {n: torch.randn(6, 8, requires_grad=True) for n in (1, 2)}
    _, _, kl = loss_and_terms(*split(taps, 3), ((1, 4), (2, 8)), "cosine", 0.1, 1.0)
    sum(kl).backward()
    assert taps[2].grad is None or taps[2].grad.abs().max() < 1e-6   # the full size's KL with itself: rounding
    assert (taps[1].grad[:, :4].abs() > 1e-4).any() and (taps[1].grad[:, 4:] == 0).all()


def test_gradient_of_the_loss():
    """ Autograd equals finite differences in float64, for the small size (the teacher is a constant to it). """
    torch.manual_seed(0)
    full = torch.randn(5, 6, dtype=torch.float64)
    small = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    loss = lambda x: loss_and_terms(*split({1: x, 2: full}, 2), ((1, 4), (2, 6)), "cosine", 0.5, 1.0)[0]
    assert torch.autograd.gradcheck(loss, small)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("pieces", [1, 3])
def test_gradient_caching_equals_one_large_batch(config, texts, p, pieces):
    """ Gradient caching gives every gradient of the large batch, to rounding in float64, with dropout too. """
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = p
    torch.manual_seed(0)
    bert = Bert(config).double().train()
    embed = lambda texts: bert.encode(pack(texts), [1, 2, 3, 4])
    sizes = ((1, 8), (2, 16), (3, 32), (4, 48))   # 4 queries, 4 positives and 4 negatives
    loss_of = lambda taps: srl_loss(*split(taps, 4), sizes, "cosine", 0.1, 1.0)
    def embed_piece(k):
        torch.manual_seed(hash((7, 5, k)))
        return embed(texts[k::pieces])
    parts = [embed_piece(k) for k in range(pieces)]   # all graphs at once; dropout as drawn piece by piece
    order = [i for k in range(pieces) for i in range(len(texts))[k::pieces]]
    back = [order.index(i) for i in range(len(texts))]
    expected, *_ = loss_of({n: torch.cat([part[n] for part in parts])[back] for n in (1, 2, 3, 4)})
    expected.backward()
    gradients = [p.grad.clone() for p in bert.parameters()]
    bert.zero_grad()
    loss, *terms = cached_backward(embed, texts, loss_of, pieces, (7, 5))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12) and terms
    for gradient, p in zip(gradients, bert.parameters()):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batch_trains_as_the_whole_batch(pairs_file, tmp_path, dtype):
    """ The log of a run with --micro_batch 5 of 16 is that of the whole batch to rounding, with 16 of 16 exactly. """
    def losses(name, *flags):
        run(pairs_file, tmp_path / name, "--dtype", dtype, *flags)
        return [record["loss"] for record in logged(tmp_path / name)]
    whole = losses("a")
    assert losses("b", "--micro_batch", "5") == pytest.approx(whole, abs=1e-5 if dtype == "float32" else 2e-2)
    assert losses("c", "--micro_batch", "16", "--dropout", "0.1") == losses("d", "--dropout", "0.1")


def texts_at_a_time(pairs, out_dir, monkeypatch, *flags):
    """ [number of texts that each pass of the encoder takes] in one step of a run """
    found = []
    monkeypatch.setattr(finetune_srl, "pack", lambda texts, *rest, **named: found.append(len(texts))
                        or pack(texts, *rest, **named))
    run(pairs, out_dir, "--max_steps", "1", *flags)
    return found


def test_micro_batch_is_the_most_that_is_encoded_at_a_time(pairs_file, tmp_path, monkeypatch):
    """ --micro_batch 5 never takes more than 5 queries and their passages, and all 16 of a batch, twice. """
    found = texts_at_a_time(pairs_file, tmp_path / "a", monkeypatch, "--micro_batch", "5")
    assert max(found) <= 2 * 5 and sum(found) == 2 * (16 + 16)


@pytest.mark.parametrize("negatives", [0, 2])
def test_the_negatives_flag(tmp_path, monkeypatch, negatives):
    """ --negatives is how many of a row's three hard negatives a step takes. """
    (path := tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"query": f"the {a}", "positive": f"a {a} {b}", "negatives": [f"{b} {i}" for i in range(3)]}) + "\n"
        for a, b in zip(NOUNS, NOUNS[::-1])))
    flags = ["--negatives", str(negatives), "--vocab_size", "110"]
    found = texts_at_a_time(str(path), tmp_path / "a", monkeypatch, *flags)
    assert found == [16 * (2 + negatives)]


def test_overfits_one_batch(pairs_file, tokenizer):
    """ 60 steps on 8 pairs bring the loss of three sizes, KL included, from above 1.5 to below 0.01. """
    torch.manual_seed(0)
    pairs = data.tokenize_pairs(data.load_pairs(pairs_file), tokenizer, 32, 32)
    queries, passages, *_ = data.srl_batch([pairs], 8, 0, 32, 1, 0)
    bert = Bert(BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
                           intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    optimizer = adamw(bert, 1e-3, 0.01)
    batch, losses = pack(queries + passages), []
    for _ in range(60):
        taps = split(bert.encode(batch, [1, 2, 3]), 8)
        loss, *_ = loss_and_terms(*taps, ((1, 16), (2, 32), (3, 64)), "cosine", 0.05, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.01


def test_schedule():
    """ The rate rises over the first tenth and falls in a line or a cosine, and the last step is not wasted at 0. """
    args = parse_args(["--learning_rate", "1", "--warmup", "0.1", "--out_dir", "out/nowhere"])
    for shape, last in (("linear", 1 / 90), ("cosine", (1 - math.cos(math.pi / 90)) / 2)):
        rates = [get_lr(step, 100, args, shape) for step in range(100)]
        assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1) and rates[10] == pytest.approx(1)
        assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(last)


def test_embeddings_have_a_rate_of_their_own():
    """ Embeddings learn 8 times as fast from scratch and as fast as the rest in a loaded model, or as a flag says. """
    scale = lambda *flags: parse_args([*flags, "--out_dir", "out/nowhere"]).embedding_lr_scale
    assert [scale(), scale("--init_from", "x"), scale("--init_from", "x", "--embedding_lr_scale", "3")] == [8, 1, 3]
    bert = Bert(BertConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                           intermediate_size=64))
    fast = {id(p) for group in adamw(bert, 1.0, 0.0, 3.0).param_groups if group["scale"] == 3 for p in group["params"]}
    assert fast == {id(p) for p in (bert.word.weight, bert.position.weight, bert.token_type.weight)}


def test_a_run_end_to_end(trained):
    """ A run writes model, log, arguments and evaluation, and when it is finished nothing is left to resume. """
    assert not (trained / model.STATE).exists()
    bert = from_pretrained(trained)
    assert bert.config.sizes == ((1, 8), (3, 64)) and bert.config.pooling == "mean"
    assert [r["step"] for r in logged(trained, "step")] == [1, 2, 2, 3, 4]
    assert [r["step"] for r in logged(trained, "dev")] == [2]
    first = logged(trained)[0]
    assert len(logged_terms(first, "nce")) == len(logged_terms(first, "kl")) == 2 and first["learning_rate"] > 0
    assert json.loads((trained / "args.json").read_text())["sizes"] == [[1, 8], [3, 64]]
    results = json.loads((trained / "eval.json").read_text())["results"]
    assert {(r["layer"], r["dim"]) for r in results if r["metric"] == "MRR@10"} == {(1, 8), (3, 64), (None, None)}
    dev, = logged(trained, "dev")
    assert {r["n"] for r in dev["dev"]} == {1} and {r["n"] for r in results if r["metric"] == "MRR@10"} == {2}
    assert bert.config.max_position_embeddings == load_tokenizer(trained).model_max_length == 256


def test_evaluation_is_no_time_of_a_step(pairs_file, tmp_path, monkeypatch):
    """ The ms of a step in the log are the same with a dev evaluation, as long as 100 steps, in between. """
    now, make = [0.0], data.srl_batch
    def passes(seconds, result=None):
        now[0] += seconds
        return result
    monkeypatch.setattr(finetune_srl, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(data, "srl_batch", lambda *args: passes(1, make(*args)))
    monkeypatch.setattr(finetune_srl, "evaluate_dev", lambda *args: passes(100))
    monkeypatch.setattr(finetune_srl, "evaluate_saved", lambda *args: None)
    run(pairs_file, tmp_path / "a", "--retrieval", str(make_beir(tmp_path / "beir")), "--eval_interval", "2",
        "--log_interval", "2")
    assert now[0] == 1 + 4 + 100 and [r["ms"] for r in logged(tmp_path / "a")] == [1000, 1000]   # plan has a batch, too


def test_the_log_holds_its_terms_by_size(trained):
    """ Every record of training holds InfoNCE and KL under the names of the sizes. """
    for record in logged(trained):
        assert list(record["nce"]) == list(record["kl"]) == ["1:8", "3:64"]
        assert record["nce"]["1:8"] != record["nce"]["3:64"] and record["kl"]["1:8"] > record["kl"]["3:64"]


def test_steps_of_different_sizes_are_averaged_by_name():
    """ A size that is missing in some steps has the mean over the steps that had it. """
    torch.manual_seed(0)
    taps = [split({n: torch.randn(6, 8) for n in (1, 2)}, 3) for _ in range(3)]
    sizes = [((1, 4), (2, 8)), ((2, 8),), ((1, 4), (2, 8))]
    (_, a, _), (_, b, _), (_, c, _) = (srl_loss(*t, s, "cosine", 0.1, 1.0) for t, s in zip(taps, sizes))
    mean = average([a, b, c])
    assert list(mean) == ["1:4", "2:8"]
    assert mean["1:4"] == pytest.approx((a["1:4"].item() + c["1:4"].item()) / 2, rel=1e-6)
    assert mean["2:8"] == pytest.approx((a["2:8"].item() + b["2:8"].item() + c["2:8"].item()) / 3, rel=1e-6)


def test_own_columns_and_held_out_pairs(tmp_path, monkeypatch, capsys, refused):
    """ A CSV of questions and answers trains with --columns and ends with a table on the pairs that were held out; own
    pairs are never measured on the Python documentation. """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    rows = [f"where is the {a} {b},the {a} stands beside the {b}\n" for a in NOUNS[:8] for b in NOUNS[8:]]
    (path := tmp_path / "faq.csv").write_text("question,answer\n" + "".join(rows))
    flags = ["--columns", "query=question", "positive=answer", "--hold_out", "10", "--dtype", "bfloat16"]
    small = [flag for flag in SMALL if flag != "--retrieval="]
    main(parse_args(["--train_pairs", str(path), "--out_dir", str(tmp_path / "a"), *small, *flags]))
    found = json.loads((tmp_path / "a" / "eval.json").read_text())
    results = found["results"]
    assert found["dtype"] == "bfloat16"   # the evaluation at the end has the flag, too
    assert {r["n"] for r in results if r["metric"] == "MRR@10"} == {10} and "54 pairs" in capsys.readouterr().out
    assert parse_args(["--train_pairs", str(path), "--out_dir", str(tmp_path / "b")]).retrieval == ""
    assert parse_args(["--out_dir", str(tmp_path / "b")]).retrieval == "docs"
    assert "--hold_out 10" in refused(finetune_srl, [*flags, "--retrieval", "docs", "--out_dir", str(tmp_path / "b")])


def test_the_same_seed_gives_the_same_weights(trained, pairs_file, tmp_path):
    """ A second run, without evaluation in between, ends with the same bits, and its log has means of two steps. """
    run(pairs_file, tmp_path / "b", "--dropout", "0.1", "--log_interval", "2")
    a, b = from_pretrained(trained), from_pretrained(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    each, two = logged(trained), logged(tmp_path / "b")
    assert [r["step"] for r in two] == [2, 4]
    for first, second, mean in zip(each[0::2], each[1::2], two, strict=True):
        assert mean["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-6)
        for kind in ("nce", "kl"):
            assert mean[kind]["1:8"] == pytest.approx((first[kind]["1:8"] + second[kind]["1:8"]) / 2, rel=1e-6)


def test_epochs_may_be_broken(pairs_file, tmp_path):
    """ --epochs 1.5 of 64 pairs in batches of 16 are 6 steps. """
    run(pairs_file, tmp_path / "a", "--epochs", "1.5", "--max_steps", "0", "--sizes", "1:8")
    assert logged(tmp_path / "a")[-1]["step"] == 6


def test_an_epoch_of_two_sources():
    """ Of sources with 7 and 9 rows an epoch in batches of 4 has 1 + 2 steps: the rest of each source is left out. """
    sources = [data.Pairs([np.array([i]) for i in range(n)], [[np.array([i])] for i in range(n)], [[]] * n, [])
               for n in (7, 9)]
    args = parse_args(["--batch_size", "4", "--epochs", "2", "--out_dir", "out/nowhere"])
    batch_size, pieces, max_steps = finetune_srl.plan(args, sources, 1)
    assert (batch_size, pieces, max_steps) == (4, 1, 2 * (1 + 2))


def test_a_run_starts_from_the_folder_of_another(trained, pairs_file, tmp_path):
    """ A run takes another's folder, and its own flags decide on pooling, length and, by the largest size, depth. """
    run(pairs_file, tmp_path / "c", "--init_from", str(trained), "--passage_max_length", "16", "--pooling", "cls",
        "--max_length", "8", "--sizes", "2:16")
    bert = from_pretrained(tmp_path / "c")
    assert bert.config.pooling == "cls" and len(bert.blocks) == 2
    assert load_tokenizer(tmp_path / "c").model_max_length == 32   # its queries in training


@pytest.fixture
def cls_dot_folder(bert_folder, tmp_path):
    """ a BERT of 3 layers x 48 that was trained with cls, dot and three sizes of its own, two of which have names """
    shutil.copytree(bert_folder, tmp_path / "cls_dot")
    config = json.loads((tmp_path / "cls_dot" / "config.json").read_text())
    config |= {"pooling": "cls", "similarity": "dot", "sizes": [[1, 8], [2, 20], [3, 48]],
               "size_names": ["Demi", "", "Trenta"]}
    (tmp_path / "cls_dot" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "cls_dot")


@pytest.mark.parametrize("flags, pooling, similarity, names", [
    ([], "cls", "dot", {(1, 8): "Demi", (2, 20): "", (3, 48): "Trenta"}),
    (["--sizes", "3:48,1:8"], "cls", "dot", {(1, 8): "Demi", (3, 48): "Trenta"}),
    (["--sizes", "2:16,2:20", "--pooling", "mean"], "mean", "dot", {(2, 16): "", (2, 20): ""}),
    (["--similarity", "cosine"], "cls", "cosine", {(1, 8): "Demi", (2, 20): "", (3, 48): "Trenta"}),
])
def test_a_loaded_model_keeps_its_ways(cls_dot_folder, pairs_file, tmp_path, flags, pooling, similarity, names):
    """ Pooling, similarity and sizes with their names are trained as loaded, unless a flag says otherwise. """
    out, small = tmp_path / "out", [flag for flag in SMALL if flag not in ("--sizes", "1:8,3:64")]
    main(parse_args(["--init_from", cls_dot_folder, "--train_pairs", pairs_file, "--out_dir", str(out), *small,
                     "--max_steps", "1", "--learning_rate", "1e-30", "--temperature", "2", *flags]))
    bert = from_pretrained(out)
    assert (bert.config.pooling, bert.config.similarity, named_sizes(bert.config)) == (pooling, similarity, names)
    pairs = data.tokenize_pairs(data.load_pairs(pairs_file), load_tokenizer(cls_dot_folder), 32, 64)
    queries, passages, *_ = data.srl_batch([pairs], 16, 1, 64, 1, 0)
    with torch.no_grad():
        tap, = bert(batch := pack(queries + passages), [list(names)[-1][0]]).values()
        q, p = split({0: model.POOLINGS[pooling](tap, batch)}, 16)
    want, = loss_and_terms(q, p, ((0, list(names)[-1][1]),), similarity, 2.0, 1.0)[1]
    assert logged_terms(logged(out)[0], "nce")[-1] == pytest.approx(want.item(), rel=1e-4)


def test_pooling_flag_takes_the_poolings(monkeypatch, refused):
    """ --pooling takes the entries of POOLINGS, one that is added included, and no others. """
    monkeypatch.setitem(model.POOLINGS, "last", model.cls_pool)
    assert parse_args(["--pooling", "last", "--out_dir", "out/nowhere"]).pooling == "last"
    assert "invalid choice: 'median'" in (said := refused(finetune_srl, ["--pooling", "median"]))
    assert all(name in said for name in ("mean", "cls", "last"))


@pytest.mark.parametrize("flags, blocks, last", [([], 3, 0), (["--sizes", "2:64"], 2, 0), (["--pooling", "cls"], 3, 1)])
def test_the_largest_size_has_channels_that_it_does_not_score(pairs_file, tmp_path, flags, blocks, last):
    """ From scratch the last sixth of the last block's gains begins at 0, and no other gain; with cls none does. The
    matrices begin with a standard deviation of 0.01. """
    run(pairs_file, tmp_path / "a", "--max_steps", "1", "--learning_rate", "1e-30", *flags)
    bert = from_pretrained(tmp_path / "a")
    assert all(p.std().item() == pytest.approx(0.01, rel=0.2) for p in bert.parameters() if p.dim() == 2)
    gains = torch.stack([block.norm2.weight for block in bert.blocks])   # (blocks, 64)
    assert len(gains) == blocks and (gains[:-1] == 1).all() and (gains[-1, :53] == 1).all()
    assert (gains[-1, 53:] - last).abs().max() < 1e-9
    run(pairs_file, tmp_path / "b", *flags)   # silent channels stay silent, because no gradient reaches them
    norm = from_pretrained(tmp_path / "b").blocks[-1].norm2
    assert last == 1 or not norm.weight[53:].any() and not norm.bias[53:].any()
    assert norm.weight[:53].std() > 1e-4 and norm.bias[:53].all()


def test_compiled_is_the_same(pairs_file, tmp_path):
    """ --compile gives the same losses to rounding with batches of varying lengths, and the same configuration. """
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    run(pairs_file, tmp_path / "a")
    run(pairs_file, tmp_path / "b", "--compile")
    a, b = ([record["loss"] for record in logged(tmp_path / name)] for name in "ab")
    assert a == pytest.approx(b, rel=1e-4)
    assert from_pretrained(tmp_path / "b").config == from_pretrained(tmp_path / "a").config


def test_one_size_alone_has_only_its_layers(pairs_file, tmp_path, capsys):
    """ --sizes 1:8 trains a separate model: one block, no KL, and a line of the log shows the size once. """
    run(pairs_file, tmp_path / "a", "--sizes", "1:8")
    last_line, = re.findall(r"step 4/4 \|.*", capsys.readouterr().out)
    assert last_line.count("| 1:8 ") == 1
    bert = from_pretrained(tmp_path / "a")
    assert len(bert.blocks) == bert.config.num_hidden_layers == 1 and bert.config.sizes == ((1, 8),)
    for record in logged(tmp_path / "a"):
        assert logged_terms(record, "kl") == [pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize("flags, message", [
    (["--sizes", "2:32,6"], "argument --sizes: '2:32,6' is not LAYER:DIM"),
    (["--temperature", "0"], "--temperature: 0: must be above 0"),
    (["--dropout", "1"], "--dropout: 1: must be 0 or more and below 1"),
    (["--hidden_size", "100"], "--hidden_size: 100: must be a multiple of 64"),
    (["--max_steps", "-1"], "--max_steps: -1: must be 0 or more"),
    (["--query_max_length", "1"], "--query_max_length: 1: must be 3 or more"),   # 1 would not cut, 2 leaves no word
    (["--passage_max_length", "2"], "--passage_max_length: 2: must be 3 or more"),
    (["--max_length", "2"], "--max_length: 2: must be 3 or more"),
    (["--learn", "1"], "unrecognized arguments: --learn"),
    (["--sizes", "9:8"], "--sizes asks for layer 9 but the model has 3 layers; use a layer between 1 and 3"),
    (["--sizes", "2:64,3:8"], "--sizes 2:64,3:8: no size is both the deepest and the widest, so none can teach the "
                              "others; add 3:64"),
    (["--train_pairs", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--init_from", "nowhere"], "nowhere: neither a folder nor a model of the hub"),
    (["--retrieval", "nowhere"], "--retrieval nowhere: neither docs, nor a folder in BEIR layout"),
    (["--device", "cuda:9"], "--device: cuda:9"),
    (["--device", "meta"], "--device: meta"),
    (["--device", "hpu"], "--device: hpu"),
    (["--seed", "-1"], "--seed: -1: must be 0 or more"),
    (["--seed", str(2**70)], "must be below 2**63"),
    (["--max_steps", "9" * 400], "must be below 2**63"),
    (["--epochs", "1e308"], "--epochs: 1e308: must be below 2**63"),
    (["--epochs", "nan"], "--epochs: nan: must be above 0"),
    (["--vocab_size", "1000001"], "--vocab_size: 1000001: must be 100, to spell English, to 1,000,000"),
])
def test_bad_flags_say_what_and_why(pairs_file, tmp_path, refused, flags, message):
    """ A wrong flag ends the run with a line that names flag, value and rule, and nothing is written. """
    flags = ["--train_pairs", pairs_file, "--out_dir", str(tmp_path / "out"), *SMALL, *flags]
    assert message in refused(finetune_srl, flags)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(pairs_file, tmp_path):
    """ A process that is asked for a layer too many ends with status 2 and says so in one line, without traceback. """
    flags = ["--train_pairs", pairs_file, "--out_dir", str(tmp_path / "out"), *SMALL, "--sizes", "9:8"]
    assert "--sizes asks for layer 9" in refused_process("finetune_srl.py", *flags)


def test_a_finished_run_is_not_overwritten(trained, pairs_file, tmp_path, refused):
    """ An out_dir with a finished run in it is refused and not touched, unless --overwrite is there. """
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    before = (folder / "model.safetensors").read_bytes()
    flags = ["--train_pairs", pairs_file, "--out_dir", str(folder), *SMALL, "--seed", "2"]
    assert "holds a run" in refused(finetune_srl, flags)
    assert (folder / "model.safetensors").read_bytes() == before
    run(pairs_file, folder, "--seed", "2", "--overwrite")
    assert (folder / "model.safetensors").read_bytes() != before


def test_stops_when_the_loss_is_not_a_number(pairs_file, tmp_path):
    """ A loss that is not finite ends the run, names step and remedy, and no model is saved. """
    with pytest.raises(FloatingPointError, match="--learning_rate"):
        run(pairs_file, tmp_path / "a", "--learning_rate", "1e18", "--grad_clip", "0")
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_compile_takes_any_length_without_breaks(config):
    """ Ten compiled blocks need no graph break and at most three graphs for 12 lengths, dropout on. """
    from torch._dynamo.testing import CompileCounter
    config.num_hidden_layers, config.hidden_dropout_prob = 10, 0.1   # more blocks than dynamo's limit of recompilations
    bert, counter = Bert(config).train(), CompileCounter()
    torch._dynamo.reset()
    for block in bert.blocks:
        block.after_attention = torch.compile(block.after_attention, dynamic=True, fullgraph=True, backend=counter)
    rng, after_two = np.random.default_rng(0), None
    for step in range(12):
        texts = [rng.integers(5, 97, size=n) for n in rng.integers(3, 40, size=5 + step)]
        bert.encode(pack(texts), [10])[10].sum().backward()
        after_two = counter.frame_count if step == 1 else after_two
    assert counter.frame_count == after_two <= 3


def test_help_loads_nothing_slow():
    """ Importing the script imports none of the packages that take seconds. """
    code = ("import sys, finetune_srl; slow = {'transformers', 'datasets', 'scipy.stats', 'matplotlib'}; "
            "sys.exit(', '.join(slow & set(sys.modules)) or 0)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sizes_of_a_step():
    """ SRL trains its sizes in every step. 2DMSE trains the full size, a random smaller layer and dim, and the two
    combinations; in time every layer below the full one and every dim of the list has its turn. """
    sizes = ((1, 8), (2, 16), (4, 64))
    assert step_sizes("srl", sizes, 1, 0) == step_sizes("srl", sizes, 1, 7) == sizes
    drawn = [step_sizes("2dmse", sizes, 1, step) for step in range(100)]
    assert all(step == ((n, d), (n, 64), (4, d), (4, 64)) for step in drawn for n, d in step[:1])
    assert {step[0] for step in drawn} == {(n, d) for n in (1, 2, 3) for d in (8, 16)}
    assert drawn == [step_sizes("2dmse", sizes, 1, step) for step in range(100)]
    assert drawn != [step_sizes("2dmse", sizes, 2, step) for step in range(100)]


def test_2dmse_trains_what_it_draws(pairs_file, tmp_path):
    """ A run with --method 2dmse logs the terms of the sizes that its steps drew. """
    run(pairs_file, tmp_path / "a", "--method", "2dmse", "--sizes", "1:8,2:16,3:64")
    for record in logged(tmp_path / "a"):
        want = step_sizes("2dmse", ((1, 8), (2, 16), (3, 64)), 1, record["step"] - 1)
        assert list(record["nce"]) == [f"{n}:{d}" for n, d in want]


def test_cosent_by_hand():
    """ Three pairs with gold 3, 1, 2: the wrong orders are 1 over 0, 2 over 0 and 1 over 2. """
    scores, gold = torch.tensor([0.5, 1.0, 0.2]), torch.tensor([3.0, 1.0, 2.0])
    want = math.log(1 + math.exp(1.0 - 0.5) + math.exp(0.2 - 0.5) + math.exp(1.0 - 0.2))
    assert cosent(scores, gold).item() == pytest.approx(want, abs=1e-6)
    assert cosent(scores, torch.ones(3)).item() == 0   # equal gold asks for nothing


def test_every_size_has_a_cosent_of_its_own():
    """ With gold scores each size has the CoSENT of its own scores. """
    torch.manual_seed(0)
    taps, gold = {n: torch.randn(8, 6) for n in (1, 2)}, torch.tensor([3.0, 1.0, 2.0, 2.0])
    q, p = split(taps, 4)
    _, found, _ = srl_loss(q, p, ((1, 3), (2, 6)), "dot", 0.5, 1.0, gold=gold)
    for n, d in ((1, 3), (2, 6)):
        want = cosent((q[n][:, :d] * p[n][:, :d]).sum(-1) / 0.5, gold)
        assert found[f"{n}:{d}"].item() == pytest.approx(want.item(), rel=1e-5)


@needs("sentence_transformers")
def test_cosent_is_that_of_sentence_transformers(monkeypatch):
    """ srl_loss with gold scores and one size equals CoSENTLoss on the same embeddings, scale 20. """
    from sentence_transformers.losses import CoSENTLoss
    torch.manual_seed(0)
    a, b, gold = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([0.0, 5.0, 2.0, 2.0, 3.0, 1.0])
    want = CoSENTLoss.compute_loss_from_embeddings(CoSENTLoss(None, scale=20.0), [a, b], gold)
    loss, nce, kl = srl_loss({1: a}, {1: b}, ((1, 8),), "cosine", 0.05, 1.0, gold=gold)
    assert nce["1:8"].item() == pytest.approx(want.item(), rel=1e-5)
    assert loss.item() == pytest.approx(want.item() + kl["1:8"].item(), rel=1e-5)


def test_scored_pairs_train(tmp_path, bert_folder):
    """ Pairs with gold scores bring the loss down, and the similar pairs end above the others. """
    path, out = tmp_path / "scored.jsonl", tmp_path / "out"
    rows = [{"sentence1": f"the {a}", "sentence2": f"a {b} in the morning", "score": float(i == j)}
            for i, a in enumerate(NOUNS[:6]) for j, b in enumerate(NOUNS[:6])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [flag for flag in SMALL if flag not in ("--sizes", "1:8,3:64")]
    main(parse_args(["--train_pairs", str(path), "--init_from", bert_folder, "--out_dir", str(out), *flags, "--batch_size",
                     "36", "--max_steps", "40", "--learning_rate", "0.002", "--temperature", "0.2", "--sizes", "1:16,3:48"]))
    records = logged(out)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    model, tokenizer = evaluate.load_model(str(out))
    (task, first, second, gold), sizes = data.load_sts(str(path)), ((1, 16), (3, 48))
    found, _ = evaluate.sts(model, tokenizer, str(path), sizes, "float32")
    assert min(r["value"] for r in found) > 0.5 and len(gold) == 36


def test_a_frozen_teacher_teaches_every_size():
    """ With scores of another model, the KL of every size, the full one included, is that from these scores, and moves
    the size; the gradient reaches no teacher. """
    torch.manual_seed(0)
    taps = {n: torch.randn(6, 8, requires_grad=True) for n in (1, 2)}
    teacher = torch.randn(3, 3, requires_grad=True)
    _, _, kl = srl_loss(*split(taps, 3), ((1, 4), (2, 8)), "dot", 0.5, 1.0, teacher.detach())
    for (n, d), value in zip(((1, 4), (2, 8)), kl.values()):
        scores = taps[n][:3, :d] @ taps[n][3:, :d].T / 0.5
        want = (teacher.softmax(-1) * (teacher.log_softmax(-1) - scores.log_softmax(-1))).sum(-1).mean()
        assert value.item() == pytest.approx(want.item(), abs=1e-5)
    sum(kl.values()).backward()
    assert taps[2].grad.abs().max() > 1e-3


def test_the_teacher_flag(bert_folder, pairs_file, tmp_path, refused):
    """ At the first step, with the untrained model as its own frozen teacher, the KL of the full size is 0 and that of
    the small one is as with the live teacher; a teacher with another vocabulary is refused. """
    flags = ["--init_from", bert_folder, "--sizes", "1:8,3:48", "--learning_rate", "0.01", "--max_length", "64"]
    run(pairs_file, tmp_path / "frozen", *flags, "--teacher", bert_folder)
    run(pairs_file, tmp_path / "live", *flags)
    frozen, live = logged(tmp_path / "frozen"), logged(tmp_path / "live")
    assert frozen[0]["kl"]["3:48"] == pytest.approx(0, abs=1e-5) and frozen[-1]["kl"]["3:48"] > 1e-3
    assert frozen[0]["kl"]["1:8"] == pytest.approx(live[0]["kl"]["1:8"], rel=1e-4)
    said = refused(finetune_srl, ["--train_pairs", pairs_file, "--out_dir", str(tmp_path / "c"), *SMALL, "--vocab_size",
                                  "110", "--teacher", bert_folder])
    assert "--teacher" in said and "vocabulary" in said
    said = refused(finetune_srl, ["--train_pairs", pairs_file, "--out_dir", str(tmp_path / "c"), *SMALL, *flags,
                                  "--teacher", short_teacher(bert_folder, tmp_path / "t")])
    assert "has 63 positions; choose that or less" in said


def short_teacher(bert_folder, folder):
    """ the model with one position less """
    bert, tokenizer = load_model(bert_folder)
    bert.config.max_position_embeddings = 63
    bert.position = torch.nn.Embedding.from_pretrained(bert.position.weight[:63])
    save_pretrained(bert, tokenizer, folder)
    return str(folder)


def test_equal_scores_are_refused(tmp_path, refused):
    """ Pairs whose scores are all the same have no order to learn. """
    (tmp_path / "p.csv").write_text("sentence1,sentence2,score\n" + "a,b,1\nc,d,1.0\n" * 9)
    flags = ["--train_pairs", str(tmp_path / "p.csv"), "--out_dir", str(tmp_path / "out"), *SMALL]
    assert "every score of a source is the same" in refused(finetune_srl, flags)


def test_retrieval_without_dev(pairs_file, beir, tmp_path, refused):
    """ A collection without dev judgements is refused with the flag that does without. """
    (beir / "qrels" / "dev.tsv").unlink()
    flags = ["--train_pairs", pairs_file, "--out_dir", str(tmp_path / "out"), *SMALL, "--retrieval", str(beir)]
    assert "has no qrels/dev.tsv" in (said := refused(finetune_srl, flags)) and "--eval_interval 0" in said


def test_a_teacher_scores_in_its_own_way(bert_folder, cls_dot_folder, pairs_file, tmp_path):
    """ The KL of a run is from the teacher's scores by its own pooling and similarity, at the run's temperature. """
    run(pairs_file, tmp_path / "a", "--init_from", bert_folder, "--teacher", cls_dot_folder, "--sizes", "1:8,3:48",
        "--max_length", "64", "--temperature", "2", "--max_steps", "1")
    pairs = data.tokenize_pairs(data.load_pairs(pairs_file), load_tokenizer(bert_folder), 32, 64)
    queries, passages, *_ = data.srl_batch([pairs], 16, 1, 64, 1, 0)
    def log_probs(bert):
        with torch.no_grad():
            rows = bert.encode(pack(queries + passages), [3])[3]
        return (model.score(rows[:16], rows[16:], 48, bert.config.similarity) / 2).log_softmax(-1)
    ours, its = log_probs(from_pretrained(bert_folder)), log_probs(from_pretrained(cls_dot_folder))
    want = (its.exp() * (its - ours)).sum(-1).mean().item()
    assert logged(tmp_path / "a")[0]["kl"]["3:48"] == pytest.approx(want, rel=1e-4)


def test_a_teacher_scores_at_its_full_size(model, texts):
    """ The scores of a teacher whose largest size has 20 of its 48 dims are those of the 20 dims at that layer. """
    model.config.sizes, model.config.similarity = ((1, 8), (3, 20)), "dot"
    rows = evaluate.embed_ids(model, texts, [3])[3][:, :20]
    args = SimpleNamespace(dtype="float32", device="cpu", temperature=2)
    found = finetune_srl.frozen_scores(model, texts, 5, args)
    torch.testing.assert_close(found, rows[:5] @ rows[5:].T / 2)


def test_windows_come_from_all_of_a_passage(tmp_path, monkeypatch):
    """ A step of 6 tokens a passage takes windows from beyond the first 6 tokens of longer passages. """
    rows = [{"query": f"the {a}", "positive": " ".join(NOUNS) + f" {a}"} for a in NOUNS]
    (path := tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    monkeypatch.setattr(finetune_srl, "pack", lambda texts, *rest, **named: seen.extend(texts[16:])
                        or pack(texts, *rest, **named))
    run(str(path), tmp_path / "a", "--passage_max_length", "6", "--vocab_size", "110", "--max_steps", "2")
    assert {len(text) for text in seen} == {6} and len({text.tobytes() for text in seen}) > 8


def test_permuted_channels_are_the_same_function(model_with_every_weight, texts):
    """ In float64 every tap of a model with permuted channels is the old tap with permuted columns. """
    bert, order = model_with_every_weight, np.random.default_rng(0).permutation(48).tolist()
    with torch.no_grad():
        before = bert(pack(texts), [0, 1, 4])
        model.permute_channels(bert, order)
        after = bert(pack(texts), [0, 1, 4])
    for a, b in zip(before.values(), after.values(), strict=True):
        torch.testing.assert_close(b, a[:, order], rtol=0, atol=1e-12)


@pytest.fixture
def model_with_every_weight(config):
    """ a float64 BERT in which no bias or LayerNorm is at its usual start """
    bert = Bert(config).double().eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, mean=0.3, std=0.2)
    return bert


def test_ordered_channels_are_those_that_vary_most(model_with_every_weight, texts):
    """ --order_channels puts the channels first that vary most at the smallest size's layer, then those of the next. """
    bert, sizes = model_with_every_weight.float(), ((1, 6), (3, 16), (4, 48))
    before = evaluate.embed_ids(bert, texts, [1, 3])
    order_channels(bert, texts, sizes)
    after = evaluate.embed_ids(bert, texts, [1, 3])
    first = before[1].var(0).argsort(descending=True)[:6]
    torch.testing.assert_close(after[1][:, :6], before[1][:, first], rtol=0, atol=1e-5)
    rest = [i for i in before[3].var(0).argsort(descending=True).tolist() if i not in first.tolist()][:10]
    torch.testing.assert_close(after[3][:, 6:16], before[3][:, rest], rtol=0, atol=1e-5)


def test_ordered_channels_where_a_deeper_size_is_narrower(model_with_every_weight, texts):
    """ A deeper size with fewer dims than the one before takes no channels, and the model stays the same function. """
    bert, sizes = model_with_every_weight.float(), ((1, 16), (2, 8), (4, 48))
    before = evaluate.embed_ids(bert, texts, [1, 4])
    order_channels(bert, texts, sizes)
    after, first = evaluate.embed_ids(bert, texts, [1, 4]), before[1].var(0).argsort(descending=True)[:16]
    torch.testing.assert_close(after[1][:, :16], before[1][:, first], rtol=0, atol=1e-5)
    torch.testing.assert_close(after[4].sort(1).values, before[4].sort(1).values, rtol=0, atol=1e-5)
