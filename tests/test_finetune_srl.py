""" SRL: the loss as a loop that reads like the equation, worked examples, and whole runs on a few short pairs. """
import functools, json, math, shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data, evaluate, finetune_srl
from conftest import NOUNS, assert_frozen, make_beir, needs, set_weights, write_jsonl
from finetune_srl import cosent, main, parse_args, srl_loss, step_sizes, train_step
from model import STATE, Bert, load_model, pack, read_weights, save_pretrained
from tools.order_channels import order_channels, permute_channels

NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
SIZES = (1, 4), (2, 8), (3, 16), (4, 48)

def split(rows, Q):
    """ {layer: (Q + P, C)} -> that of the queries, that of the passages """
    return {layer: r[:Q] for layer, r in rows.items()}, {layer: r[Q:] for layer, r in rows.items()}

def learned(bert):
    """ -> the parameters that have a gradient: all but the biases of the keys """
    return [p for p in bert.parameters() if p.requires_grad]

# ---- the method: a literal loop --------------------------------------------------------------------------------------
def literal_loss(bert, queries, passages, sizes, similarity, temperature, kl_weight, same, teacher_scores):
    """ SRL as its equation stands: text by text, size by size, query by query. Nothing here is fast. """
    def embed(text, layer):
        tokens = bert(pack([text]), [layer])[layer]                 # (T, C): the tokens of this text at this layer
        return sum(tokens) / len(tokens)                            # (C,): their mean

    def score(a, b):
        if similarity == "cosine":
            a, b = a / (a * a).sum().sqrt(), b / (b * b).sum().sqrt()
        return (a * b).sum() / temperature

    def probabilities(scores):                                      # softmax, over the candidates of one query
        total = sum(score.exp() for score in scores.values())
        return {j: score.exp() / total for j, score in scores.items()}

    full_layer, full_dim = sizes[-1]
    losses = []
    for layer, dim in sizes:
        for i, query in enumerate(queries):
            candidates = [j for j in range(len(passages)) if not same[i][j]]   # its positive i, and its negatives
            scores, full_scores = {}, {}
            for j in candidates:
                q, p = embed(query, layer), embed(passages[j], layer)
                scores[j] = score(q[:dim], p[:dim])                 # slice first, then normalise
                q, p = embed(query, full_layer), embed(passages[j], full_layer)
                full_scores[j] = score(q[:full_dim], p[:full_dim]).detach()    # the teacher does not learn from it
            if teacher_scores is not None:                          # those of another, frozen model teach all sizes
                full_scores = {j: teacher_scores[i, j] for j in candidates}
            student, teacher = probabilities(scores), probabilities(full_scores)
            info_nce = -student[i].log()
            kl = sum(teacher[j] * (teacher[j].log() - student[j].log()) for j in candidates)
            losses.append(info_nce + kl_weight * kl)
    return sum(losses) / len(losses)                                # the mean over sizes and queries

@pytest.mark.parametrize("similarity, temperature, frozen", [("cosine", 0.1, 0), ("dot", 2.0, 0), ("cosine", 0.1, 1)])
def test_loss_is_the_literal_loop(model, texts, similarity, temperature, frozen):
    """ srl_loss and all its gradients are those of the literal loop, to 1e-10 in float64. """
    bert, queries, passages, sizes = model.double(), texts[:3], texts[3:9], ((1, 4), (2, 16), (4, 48))
    same = torch.zeros(3, 6, dtype=torch.bool)
    same[0, 2] = same[2, 0] = same[1, 5] = True                     # no negatives, see data.duplicates
    teacher_scores = torch.randn(3, 6, dtype=torch.double) if frozen else None
    want = literal_loss(bert, queries, passages, sizes, similarity, temperature, 0.7, same, teacher_scores)
    rows = bert.encode(pack(queries + passages), [1, 2, 4])
    loss, terms = srl_loss(*split(rows, 3), sizes, similarity, temperature, 0.7, teacher_scores, same=same)
    found, wanted = (torch.autograd.grad(result, learned(bert)) for result in (loss, want))
    torch.testing.assert_close([loss, *found], [want, *wanted], rtol=0, atol=1e-10)
    assert len(wanted) == 5 + 4 * 15 and max(gradient.abs().max() for gradient in wanted) > 0.01
    assert (terms["kl 4:48"] > 0.1) == frozen                       # by itself the full size teaches the others alone

# ---- the method: worked examples -------------------------------------------------------------------------------------
def test_loss_by_hand():
    """ srl_loss gives the numbers of a worked example: 2 queries, 2 positives, sizes (1, 1) and (2, 2), dot, T = 1. """
    # layer 1, first coordinate: q = (1, 0), p = (2, 1), so s = [[2, 1], [0, 0]];
    #     CE: -log(e^2 / (e^2 + e)) = log(1 + 1/e) and log 2, mean m1 = (log(1 + 1/e) + log 2) / 2
    # layer 2, both coordinates: q = (1, 0), (0, 1), p = (3, 0), (0, 3), so s = [[3, 0], [0, 3]]; m2 = log(1 + e^-3)
    # KL of layer 1 from the teacher's rows (a, b), (b, a), a = 1 / (1 + e^-3), b = 1 - a:
    #     row 1: a log(a / c) + b log(b / d) with c = 1 / (1 + 1/e), d = 1 - c; row 2: a log(2a) + b log(2b)
    q = {1: torch.tensor([[1.0, 9.0], [0.0, 9.0]]), 2: torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    p = {1: torch.tensor([[2.0, 7.0], [1.0, -7.0]]), 2: torch.tensor([[3.0, 0.0], [0.0, 3.0]])}
    loss, terms = srl_loss(q, p, ((1, 1), (2, 2)), "dot", 1.0, 0.5)
    m1, m2 = (math.log(1 + 1 / math.e) + math.log(2)) / 2, math.log(1 + math.exp(-3))
    a, b, c, d = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3)), 1 / (1 + 1 / math.e), 1 / (1 + math.e)
    row1 = a * math.log(a / c) + b * math.log(b / d)
    row2 = a * math.log(2 * a) + b * math.log(2 * b)
    assert terms == pytest.approx({"nce 1:1": m1, "kl 1:1": (row1 + row2) / 2, "nce 2:2": m2, "kl 2:2": 0}, abs=1e-6)
    assert loss.item() == pytest.approx((m1 + m2) / 2 + 0.5 * (row1 + row2) / 4, abs=1e-6)

def test_cosine_slices_before_it_normalises():
    """ The score of (1, 1) is 1 or -1, divided by T, whatever the second coordinate is. """
    q, p = {1: torch.tensor([[0.1, 5.0], [-0.1, 5.0]])}, {1: torch.tensor([[0.2, 8.0], [-0.3, 8.0]])}
    _, terms = srl_loss(q, p, ((1, 1),), "cosine", 0.5, 1.0)
    assert terms["nce 1:1"].item() == pytest.approx(math.log(1 + math.exp(-4)), abs=1e-6)   # s = [[2, -2], [-2, 2]]

def test_hard_negatives_are_candidates_of_every_query():
    """ A third passage, equal to the two positives, adds a third term to the denominator of both queries. """
    _, terms = srl_loss({1: torch.zeros(2, 4)}, {1: torch.zeros(3, 4)}, ((1, 4),), "dot", 1.0, 1.0)
    assert terms["nce 1:4"].item() == pytest.approx(math.log(3), abs=1e-6)

def test_duplicates_are_no_negatives():
    """ A passage that answers all queries changes neither loss nor terms and gets no gradient. """
    torch.manual_seed(0)
    q, p = ({n: torch.randn(rows, 8, dtype=torch.double, requires_grad=True) for n in (1, 2)} for rows in (3, 5))
    same = (torch.arange(5) == 4).expand(3, 5)
    found = srl_loss(q, p, ((1, 4), (2, 8)), "dot", 0.5, 1.0, same=same)
    want = srl_loss(q, {n: r[:4] for n, r in p.items()}, ((1, 4), (2, 8)), "dot", 0.5, 1.0)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    given = torch.autograd.grad(found[0], list(p.values()))
    assert not any(gradient[4].any() for gradient in given) and all(gradient[3].any() for gradient in given)

def test_the_teacher_learns_nothing_from_the_small_sizes():
    """ The small size moves towards the full one, and not the other way: of the KL the full size has no gradient. """
    torch.manual_seed(0)
    rows = {n: torch.randn(6, 8, dtype=torch.double, requires_grad=True) for n in (1, 2)}
    both, nce = (srl_loss(*split(rows, 3), ((1, 4), (2, 8)), "cosine", 0.1, kl_weight)[0] for kl_weight in (1, 0))
    small, full = torch.autograd.grad(both - nce, [rows[1], rows[2]])   # of the KL alone
    assert full.abs().max() < 1e-12 and (small[:, :4].abs() > 1e-4).any() and not small[:, 4:].any()

def test_gradient_of_the_loss():
    """ Autograd equals finite differences in float64, for the small size (the teacher is a constant to it). """
    torch.manual_seed(0)
    full, small = torch.randn(2, 5, 6, dtype=torch.double).unbind()
    loss = lambda x: srl_loss(*split({1: x, 2: full}, 2), ((1, 4), (2, 6)), "cosine", 0.5, 1.0)[0]
    assert torch.autograd.gradcheck(loss, small.requires_grad_())

def test_cosent_by_hand():
    """ Three pairs with gold 3, 1, 2: the wrong orders are 1 over 0, 2 over 0 and 1 over 2. """
    scores, gold = torch.tensor([0.5, 1.0, 0.2]), torch.tensor([3.0, 1.0, 2.0])
    want = math.log(1 + math.exp(1.0 - 0.5) + math.exp(0.2 - 0.5) + math.exp(1.0 - 0.2))
    assert cosent(scores, gold).item() == pytest.approx(want, abs=1e-6)
    assert cosent(scores, torch.ones(3)).item() == 0   # equal gold asks for nothing

@needs("sentence_transformers")
def test_cosent_is_that_of_sentence_transformers():
    """ srl_loss with gold scores and one size equals CoSENTLoss on the same embeddings, scale 20. """
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss
    torch.manual_seed(0)
    a, b, gold = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([0.0, 5.0, 2.0, 2.0, 3.0, 1.0])
    want = CoSENTLoss.compute_loss_from_embeddings(CoSENTLoss(None, scale=20.0), [a, b], gold)
    loss, _ = srl_loss({1: a}, {1: b}, ((1, 8),), "cosine", 0.05, 0.0, gold=gold)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)

def test_sizes_of_a_step():
    """ SRL trains its sizes in every step. 2DMSE trains the full size, any smaller layer and dim, and both mixed. """
    sizes = ((1, 8), (2, 16), (4, 64))
    assert step_sizes("srl", sizes, 1, 0) == step_sizes("srl", sizes, 1, 7) == sizes
    drawn = [step_sizes("2dmse", sizes, 1, step) for step in range(100)]
    assert all(step == ((n, d), (n, 64), (4, d), (4, 64)) for step in drawn for n, d in step[:1])
    assert {step[0] for step in drawn} == {(n, d) for n in (1, 2, 3) for d in (8, 16)}

# ---- one step --------------------------------------------------------------------------------------------------------
ARGS = SimpleNamespace(device="cpu", dtype="float32", seed=1, temperature=0.1, kl_weight=1.0, sizes=SIZES, pieces=1)

@pytest.mark.parametrize("case, changed", [
    ("srl", {}), ("cls dot", {"temperature": 1.0}), ("teacher", {"kl_weight": 3.0}), ("duplicates", {}),
    ("micro_batch", {"pieces": 3}), ("micro_batch cosent", {"pieces": 2}), ("cosent", {}),
    ("2dmse", {"sizes": step_sizes("2dmse", SIZES, 1, 0)}),
    ("2dmse step 5", {"sizes": step_sizes("2dmse", SIZES, 1, 5)})])
def test_frozen_figures(config, frozen_texts, monkeypatch, case, changed):
    """ Loss and gradients of a step are those of earlier versions of this program, to 1e-12 in float64. """
    config.pooling, config.similarity = ("cls", "dot") if case == "cls dot" else ("mean", "cosine")
    bert, gold, same = set_weights(Bert(config).train()), None, None
    queries, passages = frozen_texts[:5], frozen_texts[5:]
    if "cosent" in case:
        gold, passages = np.linspace(0, 1, 5), passages[:5]
    if case == "duplicates":
        same = np.zeros((5, 10), bool)
        same[0, 3] = same[3, 0] = same[1, 8] = True
    scores = torch.from_numpy(np.random.default_rng(3).normal(size=(5, 10)))
    monkeypatch.setattr(finetune_srl, "frozen_scores", lambda *_: scores)
    args, batch = SimpleNamespace(**vars(ARGS) | changed), data.Batch(queries, passages, same, gold)
    losses = train_step(bert, case == "teacher", batch, args.sizes, args, 0, args.pieces)
    assert_frozen(case, losses["loss"], bert)

@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pieces_give_the_gradients_of_the_whole_batch(config, texts, dropout):
    """ A batch in three pieces has the loss and all gradients of the whole batch, with dropout drawn by piece, too. """
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(0)
    bert, layers = Bert(config).double().train(), [1, 2, 3, 4]
    rows = bert.encode(pack(texts), layers)
    if dropout:   # the graphs of all pieces at once
        pieces = {layer: [None] * 12 for layer in layers}
        for k in range(3):
            torch.manual_seed(hash((1, 5, k)))
            for layer, vectors in bert.encode(pack(texts[k::3]), layers).items():
                pieces[layer][k::3] = vectors
        rows = {layer: torch.stack(vectors) for layer, vectors in pieces.items()}
    want, _ = srl_loss(*split(rows, 4), SIZES, "cosine", 0.1, 1.0)
    wanted = torch.autograd.grad(want, learned(bert))
    losses = train_step(bert, None, data.Batch(texts[:4], texts[4:], None, None), SIZES, ARGS, 5, pieces=3)
    torch.testing.assert_close(losses["loss"], want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close([p.grad for p in learned(bert)], list(wanted), rtol=1e-9, atol=1e-12)

def test_overfits_one_batch(config, texts):
    """ 60 steps on 6 pairs bring the loss of all sizes, KL included, from above 1.5 to below 0.01. """
    torch.manual_seed(0)
    bert, batch, losses = Bert(config).train(), data.Batch(texts[:6], texts[6:], None, None), []
    optimizer = torch.optim.AdamW(bert.parameters(), 2e-3)
    for step in range(60):
        optimizer.zero_grad()
        losses.append(train_step(bert, None, batch, ((1, 16), (2, 32), (4, 48)), ARGS, step)["loss"].item())
        optimizer.step()
    assert losses[0] > 1.5 and losses[-1] < 0.01

def test_permuted_channels_are_the_same_function(config, texts):
    """ In float64 every tap of a model with permuted channels is the old tap with permuted columns. """
    bert, order = set_weights(Bert(config)), np.random.default_rng(0).permutation(48).tolist()
    with torch.no_grad():
        before = bert(pack(texts), [0, 1, 4])
        permute_channels(bert, order)
        after = bert(pack(texts), [0, 1, 4])
    for a, b in zip(before.values(), after.values(), strict=True):
        torch.testing.assert_close(b, a[:, order], rtol=0, atol=1e-12)

def test_ordered_channels_are_those_that_vary_most(bert_folder):
    """ order_channels puts the channels first that vary most at the smallest size's layer, then those of the next that
    has more dims. """
    bert, tokenizer = load_model(bert_folder)
    texts = [f"{a} {b}" for a in NOUNS[:4] for b in NOUNS[4:]]
    before = evaluate.embed_texts(bert, tokenizer, texts, [1, 3])
    order_channels(bert, tokenizer, texts, ((1, 6), (2, 4), (3, 16)))
    after = evaluate.embed_texts(bert, tokenizer, texts, [1, 3])
    first = before[1].var(0).argsort(descending=True)[:6].tolist()
    torch.testing.assert_close(after[1][:, :6], before[1][:, first], rtol=0, atol=1e-5)
    rest = [i for i in before[3].var(0).argsort(descending=True).tolist() if i not in first][:10]
    torch.testing.assert_close(after[3][:, 6:16], before[3][:, rest], rtol=0, atol=1e-5)

# ---- whole runs ------------------------------------------------------------------------------------------------------
SMALL = ("--vocab_size 200 --num_layers 3 --hidden_size 64 --batch_size 16 --max_steps 4 --log_interval 1 "
         "--dtype float32 --device cpu --no-compile").split()

def run(pairs_file, out_dir, *flags, sizes=["--sizes", "1:8,3:64"]):
    """ a whole run on short pairs, a second or less -> its records in log.jsonl """
    main(parse_args(["--train_pairs", pairs_file, "--out_dir", str(out_dir), *SMALL, *sizes, *flags]))
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]

def first_batch(pairs_file, tokenizer, step=0, prompts={"query": "", "passage": ""}):
    """ the ids of the queries and then of the passages of a step of such a run """
    pairs = data.tokenize_pairs(pairs_file, data.load_pairs(pairs_file), tokenizer, 32, 64, prompts)
    batch = data.srl_batch([pairs], 16, 1, 64, 1, step)
    return batch.queries + batch.passages

def variant(folder, target, **ways):
    """ the model in folder, copied to target with other entries in its config -> target, as a string """
    bert, tokenizer = load_model(folder)
    bert.config.update(ways)
    save_pretrained(bert, tokenizer, target)
    return str(target)

def test_a_run_equals_a_plain_loop(bert_folder, pairs_file, tmp_path):
    """ Five steps of main give the weights, losses and norms of a plain PyTorch loop. """
    records = run(pairs_file, tmp_path / "a", "--init_from", bert_folder, "--sizes", "1:8,3:48", "--warmup", "0.4",
                  "--learning_rate", "0.0006", "--embedding_lr_scale", "3", "--weight_decay", "0.3",
                  "--kl_weight", "0.3", "--temperature", "0.03", "--max_steps", "5")
    bert, tokenizer = load_model(bert_folder)
    embeddings = {"word.weight", "position.weight", "token_type.weight"}
    named = [(name, p) for name, p in bert.named_parameters() if not name.endswith("key.bias")]
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": 0.3 if p.dim() > 1 else 0.0,
                                    "scale": 3 if name in embeddings else 1} for name, p in named], fused=False)
    losses, norms = [], []
    for step, lr in enumerate([0.0003, 0.0006, 0.0006, 0.0004, 0.0002]):   # two steps up, then a line to 0 over three
        rows = bert.encode(pack(first_batch(pairs_file, tokenizer, step)), [1, 3])
        loss, _ = srl_loss(*split(rows, 16), ((1, 8), (3, 48)), "cosine", 0.03, 0.3)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for _, p in named]).norm()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            for p in group["params"]:
                p.grad *= min(1, 1 / (norm + 1e-6))
        optimizer.step()
        losses.append(loss.item()), norms.append(norm.item())
    assert min(norms) < 1 < max(norms)   # clipping bites in some steps
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-4)
    assert [r["norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    for (name, want), found in zip(bert.named_parameters(), load_model(tmp_path / "a")[0].parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5, msg=name)

def test_a_run_end_to_end(pairs_file, tmp_path):
    """ A run writes model, log and values of dev and test, and leaves nothing to resume. The same seed gives the same
    weights, with dropout, and without evaluation; a line of the log is the mean of its steps. """
    each = run(pairs_file, tmp_path / "a", "--dropout", "0.1", "--eval_interval", "2", "--retrieval",
               str(make_beir(tmp_path / "beir")))
    assert [r["step"] for r in each] == [1, 2, 2, 3, 4] and list(each[2]) == ["step", "dev 1:8", "dev 3:64"]
    results = json.loads((tmp_path / "a" / "eval.json").read_text())["results"]
    found = {(r["layer"], r["dim"], r["n"]) for r in results if r["metric"] == "MRR@10"}
    assert found == {(1, 8, 2), (3, 64, 2), (None, None, 2)}   # the two queries of test
    assert not (tmp_path / "a" / STATE).exists()
    two = run(pairs_file, tmp_path / "b", "--dropout", "0.1", "--log_interval", "2")
    one = [r["loss"] for r in each if "loss" in r]
    assert [r["loss"] for r in two] == pytest.approx([sum(one[:2]) / 2, sum(one[2:]) / 2], rel=1e-6)
    assert all(map(torch.equal, *(load_model(tmp_path / name)[0].parameters() for name in "ab")))

@pytest.mark.parametrize("pooling, last", [("mean", 53), ("cls", 64)])
def test_six_sizes_from_scratch(pairs_file, tmp_path, pooling, last):
    """ Without --sizes a new model has six. With the mean the full size has 5/6 of the channels, with [CLS] all. """
    run(pairs_file, tmp_path / "a", "--max_steps", "1", "--pooling", pooling, sizes=[])
    found = load_model(tmp_path / "a")[0].config.sizes
    assert len(found) == 6 and found[-2:] == ((2, 43), (3, last))

def test_one_size_alone_has_only_its_layers(pairs_file, tmp_path):
    """ --sizes 1:8 trains and saves a separate model: one block, and no KL. """
    records = run(pairs_file, tmp_path / "a", "--sizes", "1:8")
    bert, _ = load_model(tmp_path / "a")
    assert bert.config.num_hidden_layers == 1 and bert.config.sizes == ((1, 8),)
    assert not [name for name in read_weights(tmp_path / "a") if "layer.1" in name]
    assert all(abs(record["kl 1:8"]) < 1e-6 < record["nce 1:8"] for record in records)

def test_2dmse_trains_what_it_draws(pairs_file, tmp_path):
    """ A run with --method 2dmse logs the terms of the sizes that its steps drew. """
    for record in run(pairs_file, tmp_path / "a", "--method", "2dmse", "--sizes", "1:8,2:16,3:64"):
        drawn = step_sizes("2dmse", ((1, 8), (2, 16), (3, 64)), 1, record["step"] - 1)
        assert [name for name in record if name.startswith("nce")] == [f"nce {n}:{d}" for n, d in drawn]

def texts_of_a_step(monkeypatch, pairs_file, out_dir, *flags):
    """ one step of a run -> [the texts that each pass of the encoder takes] """
    found, inner = [], pack
    monkeypatch.setattr(finetune_srl, "pack", lambda texts, *rest: found.append(texts) or inner(texts, *rest))
    run(pairs_file, out_dir, "--max_steps", "1", *flags)
    return found

def test_micro_batch_is_the_most_that_is_encoded_at_a_time(pairs_file, tmp_path, monkeypatch):
    """ --micro_batch 5 never takes more than 5 queries and their passages, and all 16 of a batch, twice. """
    found = [len(texts) for texts in texts_of_a_step(monkeypatch, pairs_file, tmp_path / "a", "--micro_batch", "5")]
    assert max(found) <= 2 * 5 and sum(found) == 2 * (16 + 16)

def test_windows_come_from_all_of_a_passage(tmp_path, monkeypatch):
    """ A step of 6 tokens a passage takes windows from beyond the first 6 tokens of longer passages. """
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": noun, "positive": " ".join(NOUNS)} for noun in NOUNS])
    texts, = texts_of_a_step(monkeypatch, path, tmp_path / "a", "--passage_max_length", "6")
    assert {len(text) for text in texts[16:]} == {6} and len({text.tobytes() for text in texts[16:]}) > 3

def test_training_leaves_duplicates_out(tmp_path, bert_folder, capsys):
    """ If all positives or all queries are one text, nothing is left to rank: a loss of 0, and a warning. """
    flags = ["--init_from", bert_folder, "--max_steps", "2", "--sizes", "1:8,3:48"]
    for one, other in (("query", "positive"), ("positive", "query")):
        path = write_jsonl(tmp_path / f"{one}.jsonl", [{one: noun, other: "the same"} for noun in NOUNS[:8]])
        assert [record["loss"] for record in run(path, tmp_path / one, *flags)] == [0, 0]
        assert "warning: all queries or all positives of the first batch are the same" in capsys.readouterr().err

def test_scored_pairs_train(tmp_path, bert_folder):
    """ Pairs with gold scores train with CoSENT: the loss falls, and the similar pairs end above the others. """
    path = write_jsonl(tmp_path / "scored.jsonl", [
        {"sentence1": f"the {a}", "sentence2": f"a {b} in the morning", "score": float(i == j)}
        for i, a in enumerate(NOUNS[:6]) for j, b in enumerate(NOUNS[:6])])
    records = run(path, tmp_path / "a", "--init_from", bert_folder, "--batch_size", "36", "--max_steps", "40",
                  "--learning_rate", "0.002", "--temperature", "0.2", "--sizes", "1:16,3:48")
    assert records[0]["nce 3:48"] > math.log(1 + 6 * 30 / 2)   # CoSENT: half of 180 wrong orders; InfoNCE is log 36
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    found, _ = evaluate.sts(*load_model(tmp_path / "a"), evaluate.load_sts(path), ((1, 16), (3, 48)), "float32")
    assert min(r["value"] for r in found) > 0.5 and len(found) == 2

@pytest.mark.parametrize("flags, pooling, similarity, sizes", [
    ([], "cls", "dot", ((1, 8), (2, 20), (3, 48))),
    (["--sizes", "2:16,2:20", "--pooling", "mean", "--similarity", "cosine"], "mean", "cosine", ((2, 16), (2, 20)))])
def test_a_loaded_model_keeps_its_ways(bert_folder, pairs_file, tmp_path, flags, pooling, similarity, sizes):
    """ Pooling, similarity and sizes are trained and saved as loaded, unless a flag says otherwise. """
    folder = variant(bert_folder, tmp_path / "m", pooling="cls", similarity="dot", sizes=((1, 8), (2, 20), (3, 48)))
    record, = run(pairs_file, tmp_path / "a", "--init_from", folder, "--max_steps", "1", "--temperature", "2",
                  "--learning_rate", "1e-30", *flags, sizes=[])
    bert, tokenizer = load_model(tmp_path / "a")
    assert (bert.config.pooling, bert.config.similarity, bert.config.sizes) == (pooling, similarity, sizes)
    with torch.no_grad():
        rows = bert.encode(pack(first_batch(pairs_file, tokenizer)), [n for n, _ in sizes])
    _, want = srl_loss(*split(rows, 16), sizes, similarity, 2.0, 1.0)
    assert [record[name] for name in want] == pytest.approx([value.item() for value in want.values()], abs=1e-5)

@pytest.mark.parametrize("flags, query, passage", [([], "where ", "the "), (["--query_prompt", ""], "", "the ")])
def test_prompts_are_trained_and_saved(bert_folder, pairs_file, tmp_path, monkeypatch, flags, query, passage):
    """ The prompts of a loaded model, or those of flags, go before the texts of the training and into the folder. """
    folder = variant(bert_folder, tmp_path / "m", prompts={"query": "where ", "passage": "the "})
    texts, = texts_of_a_step(monkeypatch, pairs_file, tmp_path / "a", "--init_from", folder, "--sizes", "3:48", *flags)
    bert, tokenizer = load_model(tmp_path / "a")
    prompts = {"query": query, "passage": passage}
    assert bert.config.prompts == prompts
    assert all(map(np.array_equal, texts, first_batch(pairs_file, tokenizer, prompts=prompts)))
    assert len(texts[16]) == len(first_batch(pairs_file, tokenizer)[16]) + 1   # the prompt is a word

def test_a_teacher_scores_in_its_own_way(bert_folder, pairs_file, tmp_path):
    """ The KL of a run with --teacher is from the teacher's scores by its own pooling, similarity and full size. """
    folder = variant(bert_folder, tmp_path / "m", pooling="cls", similarity="dot", sizes=((1, 8), (2, 20)))
    record, = run(pairs_file, tmp_path / "a", "--init_from", bert_folder, "--teacher", folder, "--sizes", "1:8,3:48",
                  "--temperature", "2", "--max_steps", "1")
    (bert, tokenizer), (teacher, _) = load_model(bert_folder), load_model(folder)
    texts = pack(first_batch(pairs_file, tokenizer))
    ours, its = torch.nn.functional.normalize(bert.encode(texts, [3])[3]), teacher.encode(texts, [2])[2][:, :20]
    ours, its = ((rows[:16] @ rows[16:].T / 2).log_softmax(-1) for rows in (ours, its))
    assert record["kl 3:48"] == pytest.approx((its.exp() * (its - ours)).sum(-1).mean().item(), rel=1e-4)

@pytest.mark.parametrize("flags, message", [
    (["--sizes", "9:8"], "--sizes 9:8: this model has 3 layers and 64 dims"),
    (["--sizes", "2:64,3:8"], "none is deepest and widest, to teach the others; add 3:64"),
    (["--method", "2dmse", "--sizes", "1:8,3:8"], "--method 2dmse draws a layer and a dim below 3:8"),
    (["--method", "2dmse", "--sizes", "1:8,1:64"], "--method 2dmse draws a layer and a dim below 1:64"),
    (["--batch_size", "1"], "a batch of 1 pairs: the others of a batch are the negatives"),
    (["--teacher", "BERT"], "--teacher .* has another vocabulary than the model to train"),
    (["--init_from", "BERT", "--sizes", "3:48", "--passage_max_length", "65"], "64 positions"),
    (["--train_pairs", "EQUAL"], "every score of the first batch is the same")])
def test_refused(bert_folder, pairs_file, tmp_path, flags, message):
    """ What cannot be trained is refused before anything is written, and the reason is said. """
    (tmp_path / "equal.csv").write_text("sentence1,sentence2,score\n" + "apple,bridge,1\ngarden,engine,1.0\n" * 9)
    flags = [flag.replace("BERT", bert_folder).replace("EQUAL", str(tmp_path / "equal.csv")) for flag in flags]
    with pytest.raises(ValueError, match=message):
        run(pairs_file, tmp_path / "a", "--vocab_size", "110", *flags)
    assert not (tmp_path / "a").exists()

def test_a_loss_that_is_not_finite(bert_folder, pairs_file, tmp_path):
    """ Where the loss is not finite the run stops, names step and sizes, and saves no model. """
    bert, tokenizer = load_model(bert_folder)
    torch.nn.init.constant_(bert.blocks[2].up.bias, float("nan"))
    save_pretrained(bert, tokenizer, tmp_path / "m")
    with pytest.raises(FloatingPointError, match="step 1: not finite: loss, kl 1:8, nce 3:48, kl 3:48; lower"):
        run(pairs_file, tmp_path / "a", "--init_from", str(tmp_path / "m"), "--sizes", "1:8,3:48")
    assert not (tmp_path / "a" / "model.safetensors").exists()

@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_compiled_is_the_same(pairs_file, tmp_path, monkeypatch, backend):
    """ --compile gives the same losses to rounding with batches of varying lengths, and the same names of weights. """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    eager, compiled = ([r["loss"] for r in run(pairs_file, tmp_path / flag, "--max_steps", "2", f"--{flag}")]
                       for flag in ("no-compile", "compile"))
    assert eager == pytest.approx(compiled, rel=1e-4) and eager[0] != eager[1]
    assert load_model(tmp_path / "compile")[0].config.sizes == ((1, 8), (3, 64))
