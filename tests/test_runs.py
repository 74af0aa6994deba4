""" Ranks, resuming, signals, locks, what --overwrite keeps, and numbers that are not finite: both scripts alike. """
import errno
import functools
import json
import os
import shutil
import signal
import socket

import pytest
import torch
import torch.distributed as dist

import data
import evaluate
import finetune_srl
import model
import pretrain_smae
from finetune_srl import cached_backward, srl_loss
from conftest import make_beir
from kill import end, records, same, start
from model import STATE, Bert, from_pretrained, load_tokenizer, pack, run_script

COMMON = ("--batch_size 8 --max_steps 8 --log_interval 1 --save_interval 2 --dropout 0.1 --dtype float32 --device cpu "
          "--no-compile").split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """ Sums depend on the number of threads, and a forked process may have fewer: one everywhere. """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flags(pairs_file, bert_folder, tmp_path_factory):
    """ {script: the flags of a run of 8 steps on 64 short texts} """
    folder = tmp_path_factory.mktemp("text")
    texts = [line.split('"')[7] for line in open(pairs_file)]
    (folder / "text.txt").write_text("\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", folder / "cache")
        yield {finetune_srl: ["--train_pairs", pairs_file, "--retrieval=", "--sizes", "1:8,3:48",
                              "--init_from", bert_folder, *COMMON],
               pretrain_smae: ["--train_text", str(folder / "text.txt"), "--init_from", bert_folder,
                               "--max_length", "24", "--eval_interval", "0", *COMMON]}


def run(script, flags, out, *more):
    script.main(script.parse_args([*flags, "--out_dir", str(out), *more]))


def contents(folder):
    """ {path below the folder: bytes} of all its files """
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status(script, flags, out, *more):
    """ the exit status of the run, as a process would have it """
    try:
        run_script(script.main, lambda: script.parse_args([*flags, "--out_dir", str(out), *more]))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """ {script: the folder of a run that nothing disturbed}; tests read it and do not change it """
    folder = tmp_path_factory.mktemp("whole")
    for script in flags:
        run(script, flags[script], folder / script.__name__)
    return {script: folder / script.__name__ for script in flags}


def after(step, do):
    """ a log() that also calls do() once the record of this step is written, when the loop has looked for signals """
    log = model.log
    def logs(log_file, record, line):
        log(log_file, record, line)
        if record["step"] == step:
            do()
    return logs


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """ {script: (the folder of a run that a signal stopped after 4 of 8 steps, exit status, what it printed)} """
    folder, found = tmp_path_factory.mktemp("stopped"), {}
    for script, number in ((finetune_srl, signal.SIGINT), (pretrain_smae, signal.SIGTERM)):
        out = folder / script.__name__
        def job():
            script.log = after(3, lambda: os.kill(os.getpid(), number))
            run_script(script.main, lambda: script.parse_args([*flags[script], "--out_dir", str(out)]))
        code = end(start(job, f"{out}.txt"))
        found[script] = out, code, open(f"{out}.txt").read()
    return found


def warnings(capsys):
    """ the lines of stderr, without progress bars """
    return [line for line in capsys.readouterr().err.splitlines() if "|" not in line and line]


BOTH = pytest.mark.parametrize("script", [finetune_srl, pretrain_smae])


# ---- a machine without git -------------------------------------------------------------------------------------------
def test_a_run_needs_no_git(flags, tmp_path, monkeypatch):
    """ Where there is no git, the commit is "" and the run goes its way. """
    monkeypatch.setenv("PATH", str(tmp_path))
    run(finetune_srl, flags[finetune_srl], tmp_path / "a", "--max_steps", "1")
    assert json.loads((tmp_path / "a" / "args.json").read_text())["commit"] == ""


# ---- dtype -----------------------------------------------------------------------------------------------------------
@BOTH
def test_every_pass_has_the_dtype_of_the_flag(script, flags, bert_folder, tmp_path, monkeypatch):
    """ With --dtype bfloat16 training, teacher, validation and the evaluation at the end multiply in bfloat16. """
    used, forward = set(), model.Block.forward
    def watched(self, x, groups):
        used.add((self.training, self.up(x).dtype))
        return forward(self, x, groups)
    monkeypatch.setattr(model.Block, "forward", watched)
    monkeypatch.setattr(evaluate, "speed", lambda *_: [])   # takes a second
    more = ["--eval_interval", "1"]
    if script is finetune_srl:
        more += ["--retrieval", str(make_beir(tmp_path / "beir")), "--teacher", bert_folder]
    run(script, flags[script], tmp_path / "a", "--max_steps", "2", "--dtype", "bfloat16", *more)
    assert used == {(True, torch.bfloat16), (False, torch.bfloat16)}


@BOTH
def test_a_grad_clip_of_zero_does_not_clip(script, flags, tmp_path):
    """ --grad_clip 0 trains as a bound far above every norm does; a bound below them gives other weights. """
    for name, bound in (("zero", "0"), ("high", "1e9"), ("low", "0.5")):
        run(script, flags[script], tmp_path / name, "--max_steps", "3", "--grad_clip", bound)
    zero, high, low = (contents(tmp_path / name)["model.safetensors"] for name in ("zero", "high", "low"))
    assert min(record["norm"] for record in records(tmp_path / "zero") if "norm" in record) > 1
    assert zero == high != low


# ---- ranks ----------------------------------------------------------------------------------------------------------
def ranks(job, printed):
    """ run job(rank) in two processes as torchrun would -> their process ids. printed: the folder for what they say """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(functools.partial(job, rank), printed / f"rank{rank}.txt", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                  RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]


def test_two_ranks_give_the_gradient_of_one_process(config, texts, tmp_path):
    """ To 1e-10 in float64, cosine and dot, with hard negatives, dropout and pieces that ranks share unequally. """
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    torch.manual_seed(0)
    bert, cases = Bert(config).double().train(), [("cosine", 2), ("dot", 2), ("cosine", 3), ("dot", 5)]
    def gradients(similarity, pieces, rank=0, world_size=1):
        bert.zero_grad()
        def loss_of(taps):   # 4 queries, 4 positives and 4 negatives
            return srl_loss({n: tap[:4] for n, tap in taps.items()}, {n: tap[4:] for n, tap in taps.items()},
                            ((1, 8), (3, 32), (4, 48)), similarity, 0.5, 1.0)
        loss, *_ = cached_backward(lambda texts: bert.encode(pack(texts), [1, 3, 4]), texts, loss_of, pieces, (7, 5),
                                   rank, world_size)
        model.sum_over_ranks(bert.parameters(), world_size)
        return [loss.detach()] + [parameter.grad.clone() for parameter in bert.parameters()]
    def job(rank):
        dist.init_process_group("gloo")
        torch.save([gradients(*case, rank, 2) for case in cases], tmp_path / f"{rank}.pt")
    wanted = [gradients(*case) for case in cases]
    assert [end(pid) for pid in ranks(job, tmp_path)] == [0, 0]
    for rank in (0, 1):
        for case, found, want in zip(cases, torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True):
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=str(case))


def test_a_run_on_two_ranks(flags, bert_folder, tmp_path):
    """ Two ranks, which share the teacher's work too, end with the weights of one process to 1e-6; the second writes
    nothing and prints no line. """
    more = ["--micro_batch", "3", "--dropout", "0.2", "--teacher", bert_folder]   # 3 pieces for 2 ranks
    run(finetune_srl, flags[finetune_srl], tmp_path / "one", *more)
    def job(rank):
        load, encoded = finetune_srl.load_teacher, []
        def load_teacher(*args):
            teacher = load(*args)
            encode = teacher.encode
            teacher.encode = lambda *batch: encoded.append(0) or encode(*batch)
            return teacher
        finetune_srl.load_teacher = load_teacher
        run(finetune_srl, flags[finetune_srl], tmp_path / f"rank{rank}", *more)
        assert 8 <= len(encoded) <= 24, len(encoded)   # in 8 steps, and each rank leaves the other some
    assert [end(pid) for pid in ranks(job, tmp_path)] == [0, 0]
    found, want = (from_pretrained(tmp_path / name).state_dict() for name in ("rank0", "one"))
    for name in want:
        if name.endswith("qkv.bias"):   # softmax ignores the bias of the keys: its gradient is rounding error
            found[name][48:96] = want[name][48:96]
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=1e-6, msg=name)
    assert "saved" in (tmp_path / "rank0.txt").read_text()
    lines = (tmp_path / "rank1.txt").read_text().splitlines()
    assert not [line for line in lines if line and "tokenising" not in line] and not (tmp_path / "rank1").exists()


def test_ranks_share_an_evaluation(flags, texts, config, tmp_path):
    """ Each of two ranks encodes half of the batches and has all embeddings, those of one process bit by bit; a run on
    two ranks ends with the evaluation, whose file the first rank writes. """
    torch.manual_seed(0)
    bert, encoded = Bert(config), []
    want = evaluate.embed_ids(bert, texts, [1, 4], batch_tokens=16)
    more = ["--retrieval", str(make_beir(tmp_path / "beir")), "--max_steps", "2", "--eval_interval", "1"]
    def job(rank):
        run(finetune_srl, flags[finetune_srl], tmp_path / "out", *more)   # leaves the process group open
        encode = bert.encode
        bert.encode = lambda batch, layers: encoded.append(len(batch.starts)) or encode(batch, layers)
        torch.save([evaluate.embed_ids(bert, texts, [1, 4], batch_tokens=16), sum(encoded)], tmp_path / f"{rank}.pt")
    assert [end(pid) for pid in ranks(job, tmp_path)] == [0, 0]
    (first, a), (second, b) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a + b == len(texts) and min(a, b) > 0
    assert all(torch.equal(found[layer], want[layer]) for found in (first, second) for layer in want)
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    printed, silent = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert "dev MRR@10" in printed and f"written to {tmp_path / 'out' / 'eval.json'}" in printed and not silent.strip()


@BOTH
def test_two_ranks_go_on_exactly(script, flags, tmp_path):
    """ A run on two ranks that a signal to one of them stopped ends as the run on two ranks that nothing disturbed. """
    def job(rank, out, *more, stop=False):
        if stop and rank == 1:
            script.log = after(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_script(script.main, lambda: script.parse_args([*flags[script], "--out_dir", str(tmp_path / out), *more]))
    for code, *how in ((0, "whole"), (130, "out"), (0, "out", "--resume")):
        go = functools.partial(job, stop=code == 130)
        assert [end(pid) for pid in ranks(lambda rank: go(rank, *how), tmp_path)] == [code, code]
    assert same(tmp_path / "out", tmp_path / "whole") and len(records(tmp_path / "out")) >= 8


@BOTH
def test_a_rank_that_dies_ends_the_others(script, flags, tmp_path):
    """ When one rank is gone the other ends with status 1 and one line, within seconds. """
    def job(rank):
        if rank == 1:
            finite = script.check_finite
            script.check_finite = lambda *args: os._exit(9) if args[0] == 2 else finite(*args)
        signal.alarm(30)
        run_script(script.main, lambda: script.parse_args([*flags[script], "--out_dir", str(tmp_path / "out")]))
    assert [end(pid) for pid in ranks(job, tmp_path)] == [1, 9]
    lines = (tmp_path / "rank0.txt").read_text().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)


# ---- signals and resuming --------------------------------------------------------------------------------------------
@BOTH
def test_a_signal_saves_and_ends(script, stopped):
    """ Ctrl-C and SIGTERM let the step end, save, say how to go on and end with status 130. """
    out, code, printed = stopped[script]
    assert code == 130 and [record["step"] for record in records(out)] == [1, 2, 3, 4]
    assert printed.splitlines()[-1] == "stopped after step 4; go on with the same command and --resume"
    assert torch.load(out / STATE)["step"] == 4


@BOTH
def test_a_stopped_run_goes_on_exactly(script, flags, stopped, whole, tmp_path, capsys):
    """ Resumed, it ends with weights and log of the run that nothing disturbed, bit by bit, with dropout. """
    shutil.copytree(stopped[script][0], tmp_path / "out")
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')   # as if it had been killed while it wrote
    run(script, flags[script], tmp_path / "out", "--resume")
    assert same(tmp_path / "out", whole[script]) and len(records(tmp_path / "out")) >= 8
    assert "step 4/8" not in capsys.readouterr().out


@BOTH
def test_a_checkpoint_counts_once_it_is_whole(script, flags, tmp_path, monkeypatch):
    """ training_state.pt comes into the folder last: where it is, the files that --resume reads beside it are. """
    put, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: put.append(str(target)) or replace(source, target))
    run(script, flags[script], tmp_path / "out", "--max_steps", "1")
    put = [name.removeprefix(f"{tmp_path / 'out'}/") for name in put if name.startswith(str(tmp_path / "out"))]
    assert put[-1] == STATE and {"model.safetensors", "config.json", "tokenizer.json"} <= set(put[:-1])


def test_ctrl_c_ends_an_evaluation(flags, tmp_path, monkeypatch):
    """ Ctrl-C in the evaluation after the last step ends it at once; --resume then makes it again. """
    out, evaluation = tmp_path / "out", evaluate.main
    more = ["--retrieval", str(make_beir(tmp_path / "beir")), "--max_steps", "2"]
    monkeypatch.setattr(evaluate, "main", lambda args: os.kill(os.getpid(), signal.SIGINT) or evaluation(args))
    assert status(finetune_srl, flags[finetune_srl], out, *more) == 130 and not (out / "eval.json").exists()
    monkeypatch.setattr(evaluate, "main", evaluation)
    assert status(finetune_srl, flags[finetune_srl], out, *more, "--resume") == 0 and (out / "eval.json").exists()


def test_every_way_of_fine_tuning_goes_on_exactly(flags, pairs_file, bert_folder, tmp_path):
    """ bfloat16, sizes drawn step by step, a teacher, two sources, micro-batches and sorted channels go on too; with
    other weights under the teacher's name the run does not. """
    scored, teacher = tmp_path / "scored.jsonl", tmp_path / "teacher"
    scored.write_text("".join(json.dumps({"sentence1": row["query"], "sentence2": row["positive"], "score": i % 5})
                              + "\n" for i, row in enumerate(map(json.loads, open(pairs_file)))))
    shutil.copytree(bert_folder, teacher)
    more = ["--train_pairs", pairs_file, str(scored), "--dtype", "bfloat16", "--method", "2dmse", "--micro_batch", "3",
            "--teacher", str(teacher), "--order_channels", "--save_interval", "4"]
    run(finetune_srl, flags[finetune_srl], tmp_path / "whole", *more)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_srl, "log", after(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run(finetune_srl, flags[finetune_srl], tmp_path / "out", *more)
    weights = (teacher / "model.safetensors").read_bytes()
    (another := from_pretrained(teacher)).word.weight.data[5, 0] += 1      # a single weight
    model.save_pretrained(another, load_tokenizer(teacher), teacher)
    with pytest.raises(ValueError, match="--resume: --teacher differ from"):
        run(finetune_srl, flags[finetune_srl], tmp_path / "out", *more, "--resume")
    (teacher / "model.safetensors").write_bytes(weights)
    run(finetune_srl, flags[finetune_srl], tmp_path / "out", *more, "--resume")
    assert same(tmp_path / "out", tmp_path / "whole")


def test_every_step_has_dropout_of_its_own(flags, tmp_path, monkeypatch):
    """ The seed of dropout holds the step: no two steps draw the same masks. """
    seeds = []
    monkeypatch.setattr(finetune_srl.torch, "manual_seed", seeds.append)
    run(finetune_srl, flags[finetune_srl], tmp_path / "out")
    assert len(seeds) == len(set(seeds)) == 9   # the run's own, then one a step


@pytest.mark.parametrize("damage, more, message", [
    (None, ["--learning_rate", "0.5"], "--resume: --learning_rate is 0.5, and the run in"),
    (None, ["--overwrite"], "--resume goes on with a run and --overwrite replaces it; give one of the two"),
    (None, ["--train_pairs", "OTHER"], "--resume: --train_pairs"),
    ("rows", [], "--resume: --train_pairs differ from those of the run in"),
    ("script", [], "is of another script, or of another version of this one"),
    ("cut", [], "cannot be read"),
    ("empty", [], "cannot be read"),
    ("old", [], "cannot be read (KeyError: 'about')"),
    ("log", [], "log.jsonl: is no log of a run"),
    ("model", [], f"is not that of {STATE}"),
    ("gone", [], "--resume: there is no"),
])
def test_what_cannot_be_resumed_is_refused(damage, more, message, flags, stopped, pairs_file, tmp_path, refused):
    """ Another flag, other data, the other script's checkpoint or a damaged one is refused in one line, untouched. """
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    shutil.copytree(stopped[finetune_srl][0], out)
    shutil.copy(pairs_file, pairs)
    if damage == "rows":
        shutil.copy(pairs, tmp_path / "earlier.jsonl")
        state = torch.load(out / STATE)
        torch.save(state | {"args": state["args"] | {"train_pairs": [str(pairs)]}}, out / STATE)
        pairs.write_text(pairs.read_text().replace("dragon", "garden", 1))
        more = ["--train_pairs", str(pairs)]
    if damage == "script":
        shutil.copy(stopped[pretrain_smae][0] / STATE, out)
    if damage in ("cut", "empty"):
        (out / STATE).write_bytes((out / STATE).read_bytes()[:5000 if damage == "cut" else 0])
    if damage == "old":
        state = torch.load(out / STATE)
        del state["about"]
        torch.save(state, out / STATE)
    if damage == "log":
        (out / "log.jsonl").write_text("\0\0\n")
    if damage == "model":
        torch.save(torch.load(out / STATE) | {"model": {}}, out / STATE)
    if damage == "gone":
        (out / STATE).unlink()
    before = contents(out)
    said = refused(finetune_srl, [*flags[finetune_srl], "--out_dir", str(out), "--resume",
                                  *[str(pairs) if flag == "OTHER" else flag for flag in more]])
    assert message in said and "\n" not in said
    assert before == contents(out)


# ---- what is in the folder already -----------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("out", ["", "FILE"])
def test_a_folder_that_is_none_is_refused(script, out, flags, tmp_path, refused):
    """ --out_dir "" and a file are refused in one line. """
    (tmp_path / "file").write_text("")
    assert "is no folder" in refused(script, [*flags[script], "--out_dir", str(tmp_path / "file") if out else ""])


@BOTH
def test_the_folder_of_the_other_script_is_refused(script, flags, whole, refused):
    """ A folder with a run of any script is refused without --overwrite. """
    other, = set(whole) - {script}
    assert "holds a run" in refused(script, [*flags[script], "--out_dir", str(whole[other])])


@BOTH
def test_the_folder_of_another_model_is_refused(script, flags, tmp_path, refused):
    """ Files that a run would write over are refused without --overwrite, whoever wrote them. """
    for name in ("config.json", "pytorch_model.bin", "tokenizer.json", "1_Pooling/config.json", "eval.json"):
        (tmp_path / name / "..").resolve().mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
        assert "holds a run" in refused(script, [*flags[script], "--out_dir", str(tmp_path)])
        (tmp_path / name).unlink()


def test_the_state_beside_another_model(flags, bert_folder, tmp_path, refused):
    """ Pre-training that begins from a folder whose training_state.pt is cut off or of another model says so. """
    shutil.copytree(bert_folder, tmp_path / "bert")
    for content in (b"", {"args": {"objective": "smae"}, "model": {}}):
        torch.save(content, tmp_path / "bert" / STATE) if content else (tmp_path / "bert" / STATE).write_bytes(b"")
        said = refused(pretrain_smae, [*flags[pretrain_smae], "--init_from", str(tmp_path / "bert"), "--out_dir",
                                       str(tmp_path / "out")])
        assert f"{tmp_path / 'bert' / STATE}: does not fit the model there" in said


@BOTH
def test_too_little_memory_is_one_line(script, flags, tmp_path, capsys):
    """ What the machine has no memory for ends with status 1 and the size that was asked for. """
    more = ["--init_from", "scratch", "--hidden_size", "640000000", "--num_layers", "1", "--vocab_size", "150"]
    if script == finetune_srl:
        more += ["--sizes", "1:8"]
    assert status(script, flags[script], tmp_path / "out", *more) == 1
    assert "can't allocate memory" in warnings(capsys)[-1]


@BOTH
def test_a_folder_where_a_run_is_writing_is_refused(script, flags, whole, tmp_path, refused):
    """ A second run into a folder is refused in one line, and the files of the first stay. """
    shutil.copytree(whole[script], tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with model.open_locked(tmp_path / "out" / "log.jsonl"):
        said = refused(script, [*flags[script], "--out_dir", str(tmp_path / "out"), "--overwrite"])
    assert "another run is writing there; choose another folder" in said
    assert before == sorted(path.name for path in (tmp_path / "out").iterdir())


@BOTH
def test_the_earlier_run_stays_until_the_first_checkpoint(script, flags, whole, tmp_path, monkeypatch, refused):
    """ With --overwrite the earlier run is in OUT_DIR/replaced, however often the new one dies before it has saved,
    nothing of it passes for the new one, and the first checkpoint takes its place. """
    out, save = tmp_path / "out", model.save_pretrained
    shutil.copytree(whole[script], out)
    files = contents(out)
    def check(*args):
        assert contents(out / "replaced") == files
        assert {name for name in contents(out) if not name.startswith("replaced/")} == {"args.json", "log.jsonl"}
        if dies:
            raise MemoryError
        save(*args)
    monkeypatch.setattr(model, "save_pretrained", check)
    for dies in (True, True, False):
        if dies:
            with pytest.raises(MemoryError):
                run(script, flags[script], out, "--overwrite", "--seed", "2", "--save_interval", "0")
            assert "there is no" in refused(script, [*flags[script], "--out_dir", str(out), "--resume"])
        else:
            run(script, flags[script], out, "--overwrite", "--seed", "2", "--save_interval", "0")
    assert not (out / "replaced").exists() and not list(out.glob("*.part"))
    assert records(out)[0] != records(whole[script])[0] and len(records(out)) >= 8


# ---- what goes wrong in a run ----------------------------------------------------------------------------------------
def break_loss(script, patch):
    """ the loss of step 6 """
    name, calls = "srl_loss" if script == finetune_srl else "smae_loss", []
    loss_of = getattr(script, name)
    def broken(*args, **kwargs):
        calls.append(0)
        loss, *rest = loss_of(*args, **kwargs)
        return (loss * float("nan") if len(calls) == 6 else loss, *rest)
    patch.setattr(script, name, broken)


def break_gradient(script, patch):
    """ the gradient of step 6 """
    calls = []
    def broken(parameters, world_size):
        calls.append(0)
        for parameter in parameters:
            if len(calls) == 6 and parameter.grad is not None:
                parameter.grad[..., 0] = float("inf")
    patch.setattr(script, "sum_over_ranks", broken)


def break_parameter(script, patch):
    """ a parameter in the last step, after which no loss shows it; of pre-training, one of the decoder """
    calls, inner = [], torch.optim.AdamW.step
    def broken(self, *args, **kwargs):
        calls.append(0)
        inner(self, *args, **kwargs)
        if len(calls) == 8:
            self.param_groups[-1]["params"][-1].data[0] = float("nan")
    patch.setattr(torch.optim.AdamW, "step", broken)


@BOTH
@pytest.mark.parametrize("broken, last, words", [
    (break_loss, 4, "step 6: the loss is nan"), (break_gradient, 4, "not finite: the gradient"),
    (break_parameter, 6, "step 8: not saved, because")])
def test_numbers_that_are_not_finite_end_the_run(script, broken, last, words, flags, tmp_path, monkeypatch, capsys):
    """ A loss, gradient or parameter that is not finite ends the run with status 1 and one line, and the checkpoint
    before it stays as it was. """
    broken(script, monkeypatch)
    assert status(script, flags[script], tmp_path / "out") == 1
    line, = warnings(capsys)
    assert words in line and line.endswith(f"The last checkpoint: {tmp_path / 'out'}")
    state = torch.load(tmp_path / "out" / STATE)
    assert state["step"] == last and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert all(p.isfinite().all() for p in from_pretrained(tmp_path / "out").parameters())


@BOTH
def test_a_gradient_that_is_not_finite_ends_the_run(script, flags, tmp_path, monkeypatch, capsys):
    """ A finite loss with a gradient that is not finite ends the run, before the weights become NaN. """
    monkeypatch.setattr(script, "sum_over_ranks", lambda parameters, _: [
        parameter.grad.fill_(float("nan")) for parameter in parameters if parameter.grad is not None])
    assert status(script, flags[script], tmp_path / "out", "--save_interval", "0") == 1
    line, = warnings(capsys)
    assert "step 1: the loss is" in line and line.endswith("The last checkpoint: there is none")


@BOTH
def test_a_full_disk(script, flags, tmp_path, monkeypatch, capsys):
    """ In the middle a full disk is a warning, and the checkpoint before it stays; at the end it is one line that says
    how to go on, and --resume then does. """
    save, full = torch.save, [4, 6, 8]
    def torch_save(state, file):
        save(state, file)
        if state["step"] in full:
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(evaluate.torch, "save", torch_save)
    assert status(script, flags[script], tmp_path / "out") == 2
    fourth, sixth, last = warnings(capsys)
    assert fourth.startswith("step 4: nothing could be saved") and fourth.endswith("; the training goes on")
    assert last.startswith("error: step 8: nothing could be saved") and "go on with --resume" in last
    assert torch.load(tmp_path / "out" / STATE)["step"] == 2 and not list((tmp_path / "out").glob("*.part"))
    full.clear()
    assert status(script, flags[script], tmp_path / "out", "--resume") == 0


@BOTH
def test_a_loss_that_rises_is_a_warning(script, flags, tmp_path, monkeypatch, capsys):
    """ A run that ends above where it began says so, and one that does not is silent. """
    for loss_of, lines in ((lambda step: 9 - step, []), (lambda step: step, [
            "warning: the loss began at 1.000 and is 2.000 now; try a lower --learning_rate"])):
        monkeypatch.setattr(script, "log", lambda file, record, line: model.log(
            file, record | {"loss": loss_of(record["step"])}, line))
        assert status(script, flags[script], tmp_path / "out", "--max_steps", "2", "--overwrite") == 0
        assert warnings(capsys) == lines
