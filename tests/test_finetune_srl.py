""" SRL: the loss as a loop that reads like the equation, worked examples, and whole runs on a few short pairs. """
import functools, json, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data, evaluate, finetune_srl, pretrain_smae
from conftest import NOUNS, assert_frozen, learned, plain_training, set_weights, write_jsonl
from finetune_srl import cosent, main, parse_args, plan, srl_loss, step_sizes, train_step
from model import STATE, Bert, load_model, new_config, pack, save_pretrained
from tools import order_channels

SIZES = (1, 4), (2, 8), (3, 16), (4, 48)
NONE = torch.zeros(16, 16, dtype=torch.bool)   # no passage is also right

def split(rows, Q):
    """ {layer: (Q + P, C)} -> that of the queries, that of the passages """
    return {layer: r[:Q] for layer, r in rows.items()}, {layer: r[Q:] for layer, r in rows.items()}

# ---- the method: a literal loop --------------------------------------------------------------------------------------
def literal_loss(bert, queries, passages, sizes, similarity, temperature, kl_weight, also_right, teacher_scores):
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
            candidates = [j for j in range(len(passages)) if not also_right[i][j]]   # its positive i, and its negatives
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
    also_right = torch.zeros(3, 6, dtype=torch.bool)
    also_right[0, 2] = also_right[2, 0] = also_right[1, 5] = True   # no negatives
    teacher_scores = torch.randn(3, 6, dtype=torch.double) if frozen else None
    want = literal_loss(bert, queries, passages, sizes, similarity, temperature, 0.7, also_right, teacher_scores)
    rows = bert.encode(pack(queries + passages), [1, 2, 4])
    loss, terms = srl_loss(*split(rows, 3), sizes, similarity, temperature, 0.7, also_right, teacher_scores)
    found, wanted = (torch.autograd.grad(result, learned(bert)) for result in (loss, want))
    torch.testing.assert_close([loss, *found], [want, *wanted], rtol=0, atol=1e-10)
    assert len(wanted) == 5 + 4 * 15 and max(gradient.abs().max() for gradient in wanted) > 0.01
    assert (terms["kl 4:48"] > 0.1) == frozen                       # by itself the full size teaches the others alone

def test_cosent_by_hand():
    """ Three pairs with gold 3, 1, 2: the wrong orders are 1 over 0, 2 over 0 and 1 over 2. """
    scores, gold = torch.tensor([0.5, 1.0, 0.2]), torch.tensor([3.0, 1.0, 2.0])
    want = math.log(1 + math.exp(1.0 - 0.5) + math.exp(0.2 - 0.5) + math.exp(1.0 - 0.2))
    assert cosent(scores, gold).item() == pytest.approx(want, abs=1e-6)
    assert cosent(scores, torch.ones(3)).item() == 0   # equal gold asks for nothing

ARGS = SimpleNamespace(device="cpu", dtype="float32", seed=1, temperature=0.1, kl_weight=1.0, sizes=SIZES)

@pytest.mark.parametrize("case, changed", [
    ("srl", {}), ("cls dot", {"temperature": 1.0}), ("teacher", {"kl_weight": 3.0}), ("duplicates", {}),
    ("cosent", {}), ("2dmse", {"sizes": step_sizes("2dmse", SIZES, 1, 0)}),
    ("2dmse step 5", {"sizes": step_sizes("2dmse", SIZES, 1, 5)})])
def test_frozen_figures(config, frozen_texts, case, changed):
    """ Loss and gradients of a step are those of earlier versions of this program, to 1e-12 in float64. """
    config.pooling, config.similarity = ("cls", "dot") if case == "cls dot" else ("mean", "cosine")
    bert, gold = set_weights(Bert(config).train()), None
    queries, passages = frozen_texts[:5], frozen_texts[5:]
    if case == "cosent":
        gold, passages = np.linspace(0, 1, 5), passages[:5]
    also_right = np.zeros((5, len(passages)), bool)
    if case == "duplicates":
        also_right[0, 3] = also_right[3, 0] = also_right[1, 8] = True
    args, batch = SimpleNamespace(**vars(ARGS) | changed), data.Batch(queries, passages, also_right, gold)
    teacher = None
    if case == "teacher":   # one whose scores are these: those of the queries, and an identity matrix
        scores = 0.1 * torch.from_numpy(np.random.default_rng(3).normal(size=(5, 10)))
        teacher = SimpleNamespace(config=SimpleNamespace(sizes=((1, 10),), similarity="dot", num_hidden_layers=1,
                                                         hidden_size=10),
                                  encode=lambda *_: {1: torch.cat([scores, torch.eye(10).double()])})
    losses = train_step(bert, teacher, batch, args.sizes, args, 0)
    assert_frozen(case, losses["loss"], bert)

def filled(texts):
    """ the texts and as many of one token as fill the row to a multiple of 128: dropout draws for these, too """
    return [*texts, *[np.zeros(1, int)] * (-sum(map(len, texts)) % 128)]

def test_pieces_give_the_gradients_of_the_whole_batch(config, texts):
    """ A batch in three pieces has the loss and all gradients of the whole batch; dropout is drawn by piece. """
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    torch.manual_seed(0)
    bert, layers = Bert(config).double().train(), [1, 2, 3, 4]
    rows = {layer: [None] * 12 for layer in layers}   # the graphs of all pieces at once
    for k in range(3):
        torch.manual_seed(hash((1, 5, k)))
        for layer, vectors in bert.encode(pack(filled(texts[k::3])), layers).items():
            rows[layer][k::3] = vectors[:4]
    rows = {layer: torch.stack(vectors) for layer, vectors in rows.items()}
    want, _ = srl_loss(*split(rows, 4), SIZES, "cosine", 0.1, 1.0, NONE[:4, :8])
    wanted = torch.autograd.grad(want, learned(bert))
    batch = data.Batch(texts[:4], texts[4:], NONE[:4, :8].numpy(), None)
    losses = train_step(bert, None, batch, SIZES, ARGS, 5, pieces=3)
    torch.testing.assert_close(losses["loss"], want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close([p.grad for p in learned(bert)], list(wanted), rtol=1e-9, atol=1e-12)

def test_ordered_channels_are_those_that_vary_most(bert_folder, tmp_path):
    """ order_channels puts the channels first that vary most at the smallest of --sizes over the queries of --texts,
    then those of the next that has more dims, and changes nothing else. """
    texts = [f"{a} {b}" for a in NOUNS[:4] for b in NOUNS[4:]]
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"query": text, "positive": "the lantern"} for text in texts])
    flags = [bert_folder, str(tmp_path / "out"), "--texts", pairs, "--sizes", "1:6,2:4,3:16"]
    order_channels.main(order_channels.parser.parse_args(flags))
    before, after = (evaluate.embed_texts(*load_model(folder), texts, [1, 2, 3]) for folder in flags[:2])
    first = before[1].var(0).argsort(descending=True)[:6].tolist()
    rest = [i for i in before[3].var(0).argsort(descending=True).tolist() if i not in first][:10]
    for layer in (1, 2, 3):
        torch.testing.assert_close(after[layer][:, :16], before[layer][:, first + rest], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[layer].sort()[0], before[layer].sort()[0], rtol=0, atol=1e-5)

# ---- whole runs ------------------------------------------------------------------------------------------------------
SMALL = ("--vocab_size 200 --num_layers 3 --hidden_size 64 --batch_size 16 --max_steps 4 --log_interval 1 "
         "--dtype float32 --device cpu --no-compile").split()

def run(pairs_file, out_dir, *flags, sizes=["--sizes", "1:8,3:64"]):
    """ a whole run on short pairs, a second or less -> its records in log.jsonl """
    main(parse_args(["--train_pairs", pairs_file, "--out_dir", str(out_dir), *SMALL, *sizes, *flags]))
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]

def first_batch(pairs_file, tokenizer, step=0, **prompts):
    """ the ids of the queries and then of the passages of a step of such a run """
    pairs = data.tokenize_pairs(pairs_file, data.load_pairs(pairs_file), tokenizer, 32, 64, new_config(**prompts))
    batch = data.srl_batch([pairs], 16, 1, 64, 1, step)
    return batch.queries + batch.passages

def variant(folder, target, **ways):
    """ the model in folder, copied to target with other entries in its config -> target, as a string """
    bert, tokenizer = load_model(folder)
    bert.config.update(ways)
    save_pretrained(bert, tokenizer, target)
    return str(target)

def test_a_run_equals_a_plain_loop(bert_folder, pairs_file, tmp_path):
    """ Five steps of main, with dropout, give the weights, losses and norms of a plain PyTorch loop. """
    records = run(pairs_file, tmp_path / "a", "--init_from", bert_folder, "--sizes", "1:8,3:48", "--warmup", "0.4",
                  "--learning_rate", "0.0006", "--embedding_lr_scale", "3", "--weight_decay", "0.3",
                  "--kl_weight", "0.3", "--temperature", "0.03", "--max_steps", "5", "--dropout", "0.2")
    bert, tokenizer = load_model(bert_folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    bert.train()
    def loss_of(step):
        torch.manual_seed(hash((1, step, 0)))   # of dropout
        rows = bert.encode(pack(filled(first_batch(pairs_file, tokenizer, step))), [1, 3])
        rows = {layer: vectors[:32] for layer, vectors in rows.items()}
        return srl_loss(*split(rows, 16), ((1, 8), (3, 48)), "cosine", 0.03, 0.3, NONE)[0]
    rates = [0.0003, 0.0006, 0.0006, 0.0004, 0.0002]   # two steps up, then a line to 0 over three
    losses, norms = plain_training(bert, loss_of, rates, scale=3, decay=0.3)
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-4)
    assert [r["norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    for (name, want), found in zip(bert.named_parameters(), load_model(tmp_path / "a")[0].parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5, msg=name)

def test_a_run_end_to_end(pairs_file, beir, tmp_path, monkeypatch):
    """ A run logs values of the dev split, saves the model and those of the test split, and leaves nothing to resume.
    The same seed gives the same weights, with dropout, and without evaluation; a line of the log is the mean of its
    steps. """
    tasks, inner = [], evaluate.retrieval
    monkeypatch.setattr(evaluate, "retrieval", lambda *args: tasks.append(len(args[2].qrels)) or inner(*args))
    one = run(pairs_file, tmp_path / "a", "--dropout", "0.1", "--retrieval", str(beir), "--eval_interval", "2")
    assert tasks == [1, 1, 2] and [r["step"] for r in one if "dev 1:8" in r] == [2, 4]   # dev has one query
    results = json.loads((tmp_path / "a" / "eval.json").read_text())["results"]
    found = {(r["layer"], r["dim"], r["n"]) for r in results if r["metric"] == "MRR@10"}
    assert found == {(1, 8, 2), (3, 64, 2)} and not (tmp_path / "a" / STATE).exists()   # the two queries of test
    two = run(pairs_file, tmp_path / "b", "--dropout", "0.1", "--log_interval", "2")
    one = [r["loss"] for r in one if "loss" in r]
    assert [r["loss"] for r in two] == pytest.approx([sum(one[:2]) / 2, sum(one[2:]) / 2], rel=1e-6)
    assert all(map(torch.equal, *(load_model(tmp_path / name)[0].parameters() for name in "ab")))

def test_steps_and_rates_by_default():
    """ Without --max_steps the steps are --epochs times the full batches of every source. Of both scripts the
    embeddings of a new model learn faster, those of a loaded one as the rest. """
    args = parse_args("--train_pairs x --epochs 2.5 --batch_size 4 --micro_batch 3".split())
    assert plan(args, [SimpleNamespace(table=range(n)) for n in (10, 11)]) == (4, 2, 10)
    for script, scale in ((finetune_srl, 8), (pretrain_smae, 3)):
        scales = [script.parse_args(["--init_from", name]).embedding_lr_scale for name in ("scratch", "a/bert")]
        assert scales == [scale, 1]

SIX = ((1, 3), (1, 5), (2, 11), (2, 21), (2, 43))
@pytest.mark.parametrize("flags, sizes", [
    ([], (*SIX, (3, 53))), (["--pooling", "cls"], (*SIX, (3, 64))), (["--sizes", "1:8"], ((1, 8),)),
    (["--method", "2dmse", "--sizes", "1:8,2:16,3:64"], ((1, 8), (2, 16), (3, 64)))])
def test_sizes_of_a_run(pairs_file, tmp_path, flags, sizes):
    """ A new model has six sizes, with the mean 5/6 of the channels. One size alone has only its layers, and no KL.
    2DMSE trains the full size, any smaller layer and dim, and both mixed. """
    record, _ = run(pairs_file, tmp_path / "a", "--max_steps", "2", *flags, sizes=[])
    bert, _ = load_model(tmp_path / "a")
    assert bert.config.sizes == sizes and len(bert.blocks) == bert.config.num_hidden_layers == sizes[-1][0]
    drawn = [step_sizes("2dmse" if "2dmse" in flags else "srl", sizes, 1, step) for step in range(60)]
    assert [name for name in record if name.startswith("nce")] == [f"nce {n}:{d}" for n, d in drawn[0]]
    if "2dmse" in flags:
        assert all(step == ((n, d), (n, 64), (3, d), (3, 64)) for step in drawn for n, d in step[:1])
        assert {step[0] for step in drawn} == {(n, d) for n in (1, 2) for d in (8, 16)}
    else:
        assert set(drawn) == {sizes} and (len(sizes) > 1 or abs(record["kl 1:8"]) < 1e-6)

@pytest.mark.parametrize("row, flags, said", [
    ({"query": "the same"}, [], "nothing to learn from"), ({"positive": "the same"}, [], "nothing to learn from"),
    ({}, ["--init_from", "SAME"], "first batch: all scores are within 0.001"), ({}, [], "")])
def test_a_run_that_cannot_learn_warns(tmp_path, bert_folder, capsys, row, flags, said):
    """ If all queries or passages are the same, or the model tells no two texts apart, the first step says so;
    what is a duplicate of the positive is no negative, so the loss is 0. """
    bert, tokenizer = load_model(bert_folder)
    bert.blocks[2].norm2.weight.data.fill_(1e-9)   # so the bias alone is the embedding of every text
    save_pretrained(bert, tokenizer, tmp_path / "same")
    path = write_jsonl(tmp_path / "p.jsonl", [{"query": noun, "positive": f"the {noun}"} | row for noun in NOUNS])
    flags = [flag.replace("SAME", str(tmp_path / "same")) for flag in flags]
    records = run(path, tmp_path / "a", "--init_from", bert_folder, "--max_steps", "2", "--sizes", "1:8,3:48", *flags)
    assert [record["loss"] == 0 for record in records] == 2 * [said.startswith("nothing")]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == bool(said) and said in "".join(warnings)

def test_a_step_takes_pieces_and_windows(tmp_path, monkeypatch):
    """ With --micro_batch 5 the encoder never takes more than 5 queries and their passages, and all 16 of a batch,
    twice. Of longer passages than 6 tokens it takes windows, also from beyond the first 6. """
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": noun, "positive": " ".join(NOUNS)} for noun in NOUNS])
    texts = []   # [those that each pass of the encoder takes]
    monkeypatch.setattr(finetune_srl, "pack", lambda found, *rest: texts.append(found) or pack(found, *rest))
    run(path, tmp_path / "a", "--max_steps", "1", "--micro_batch", "5", "--passage_max_length", "6")
    texts = [[text for text in piece if len(text) > 1] for piece in texts]   # without fillers
    assert max(map(len, texts)) <= 2 * 5 and sum(map(len, texts)) == 2 * (16 + 16)
    passages = {text.tobytes() for piece in texts for text in piece if len(text) == 6}
    assert len(passages) > 3 and max(len(text) for piece in texts for text in piece) == 6

@pytest.mark.parametrize("flags, pooling, similarity, sizes, prompt", [
    ([], "cls", "dot", ((1, 8), (2, 20), (3, 48)), "where "),
    (["--sizes", "2:16,2:20", "--pooling", "mean", "--similarity", "cosine", "--query_prompt", ""],
     "mean", "cosine", ((2, 16), (2, 20)), "")])
def test_a_loaded_model_keeps_its_ways(bert_folder, pairs_file, tmp_path, flags, pooling, similarity, sizes, prompt):
    """ Pooling, similarity, sizes and prompts are trained and saved as loaded, unless a flag says otherwise. """
    folder = variant(bert_folder, tmp_path / "m", pooling="cls", similarity="dot", sizes=((1, 8), (2, 20), (3, 48)),
                     query_prompt="where ", passage_prompt="the ")
    record, = run(pairs_file, tmp_path / "a", "--init_from", folder, "--max_steps", "1", "--temperature", "2",
                  "--learning_rate", "1e-30", *flags, sizes=[])
    bert, tokenizer = load_model(tmp_path / "a")
    prompts = {"query_prompt": prompt, "passage_prompt": "the "}
    want = {"pooling": pooling, "similarity": similarity, "sizes": sizes} | prompts
    assert want.items() <= vars(bert.config).items()
    with torch.no_grad():
        rows = bert.encode(pack(first_batch(pairs_file, tokenizer, **prompts)), [n for n, _ in sizes])
    _, want = srl_loss(*split(rows, 16), sizes, similarity, 2.0, 1.0, NONE)
    assert [record[name] for name in want] == pytest.approx([value.item() for value in want.values()], abs=1e-5)

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
    folder = variant(bert_folder, tmp_path / "other", query_prompt="query: ")
    with pytest.raises(ValueError, match="other has another vocabulary, or other prompts, than the model"):
        run(pairs_file, tmp_path / "b", "--init_from", bert_folder, "--teacher", folder, "--sizes", "3:48")

@pytest.mark.parametrize("flags, message", [
    (["--sizes", "9:8"], "--sizes 9:8: this model has 3 layers and 64 dims"),
    (["--sizes", "2:64,3:8"], "none is deepest and widest, to teach the others; add 3:64"),
    (["--batch_size", "1"], "a batch of 1 pairs: the others of a batch are the negatives"),
    (["--teacher", "BERT"], "--teacher .* has another vocabulary"),
    (["--query_prompt", " ".join(NOUNS)], "first queries: the prompt 'apple .* leaves no room in the 32 tokens"),
    (["--passage_prompt", " ".join(NOUNS * 3)], "--passage_max_length: the prompt 'apple .* leaves no room in the")])
def test_refused(bert_folder, pairs_file, tmp_path, flags, message):
    """ What cannot be trained is refused before anything is written, and the reason is said. """
    flags = [flag.replace("BERT", bert_folder) for flag in flags]
    with pytest.raises(ValueError, match=message):
        run(pairs_file, tmp_path / "a", "--vocab_size", "110", *flags)
    assert not (tmp_path / "a").exists()

def test_compiled_is_the_same(pairs_file, tmp_path, monkeypatch):
    """ --compile gives the same losses to rounding with batches of varying lengths, and the same names of weights. """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    eager, compiled = ([r["loss"] for r in run(pairs_file, tmp_path / flag, "--max_steps", "2", f"--{flag}")]
                       for flag in ("no-compile", "compile"))
    assert eager == pytest.approx(compiled, rel=1e-4) and eager[0] != eager[1]
    assert load_model(tmp_path / "compile")[0].config.sizes == ((1, 8), (3, 64))
