""" Several ranks, kill -9, resuming, and what a folder with a run in it does: both training scripts alike. """
import json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data, finetune_srl, pretrain_smae
from conftest import NOUNS, ROOT, write_jsonl
from model import STATE, load_model, sum_and_clip

LIMIT = 120   # seconds that a process may take
COMMON = ("--batch_size 8 --max_steps 8 --log_interval 1 --save_interval 2 --dropout 0.1 --dtype float32 --device cpu "
          "--no-compile").split()
BOTH = pytest.mark.parametrize("script", [finetune_srl, pretrain_smae], ids=["srl", "smae"])

@pytest.fixture(scope="module")
def flags(pairs_file, bert_folder, tmp_path_factory):
    """ {script: the flags of a run of 8 steps on 64 short texts} """
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(json.loads(line)["positive"] for line in open(pairs_file)))
    start = ["--init_from", bert_folder, *COMMON]
    return {finetune_srl: ["--train_pairs", pairs_file, "--sizes", "1:8,3:48", *start],
            pretrain_smae: ["--train_text", str(text), "--max_length", "24", "--eval_interval", "0", *start]}

def run(script, flags, out, *more):
    script.main(script.parse_args([*flags, "--out_dir", str(out), *map(str, more)]))

def stopped(script, flags, out, *more, after=4):
    """ a run that ends, as if it had been killed, once the checkpoint of this step is saved """
    def saved(args, done, *rest, **more):
        save_run(args, done, *rest, **more)
        if done == after:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save_run = script.save_run
        patch.setattr(script, "save_run", saved)
        run(script, flags, out, *more)

@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """ {script: the folder of a run that nothing disturbed}; tests read it and do not change it """
    folder = tmp_path_factory.mktemp("whole")
    for script in flags:
        run(script, flags[script], folder / script.__name__)
    return {script: folder / script.__name__ for script in flags}

def start(*command, ranks=1):
    """ -> the running processes, as torchrun starts them """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [subprocess.Popen([sys.executable, *(str(word).replace("RANK", str(rank)) for word in command)], cwd=ROOT,
                             env=os.environ | address | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(ranks)]

def end(processes):
    """ -> what each printed; they must end well, and in time """
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed

def weights(folder):
    return load_file(folder / "model.safetensors")

def logged(folder, key="step"):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record[key] for record in records if "loss" in record]

def same(a, b):
    """ Are the weights of the two folders the same, bit by bit? """
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

# ---- kill and resume -------------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_exactly(flags, whole, tmp_path):
    """ kill -9 in the middle, then --resume: weights bit for bit; the log goes on after what was in it. """
    outs, deadline = {script: tmp_path / script.__name__ for script in flags}, time.time() + LIMIT
    processes = {script: start(ROOT / f"{script.__name__}.py", *flags[script], "--out_dir", out)[0]
                 for script, out in outs.items()}
    waiting = dict(processes)
    while waiting and time.time() < deadline:
        for script in list(waiting):
            if (outs[script] / STATE).exists() or waiting[script].poll() is not None:
                waiting.pop(script).send_signal(signal.SIGKILL)
        time.sleep(0.01)
    for script, out in outs.items():
        assert processes[script].wait(LIMIT) == -signal.SIGKILL and (out / STATE).exists()
        before, saved = logged(out), torch.load(out / STATE)["step"]
        run(script, flags[script], out, "--resume")
        assert same(out, whole[script]) and logged(out) == before + list(range(saved + 1, 9))

@BOTH
@pytest.mark.parametrize("broken_at", [5, 9])
def test_a_kill_while_it_saves_loses_nothing(script, broken_at, flags, whole, tmp_path, monkeypatch):
    """ Killed in the middle of the files of a checkpoint or before the last, the run goes on exactly, elsewhere and
    with a newer date of the data, too. """
    moved, replace = [], os.replace
    def replaced(source, target):
        moved.extend([target] * ("saving.part" in str(source)))
        if len(moved) == 9 + broken_at:   # a checkpoint has nine files, and this is the second one
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replaced)
        run(script, flags[script], tmp_path / "a")
    assert torch.load(tmp_path / "a" / STATE)["step"] == 2
    (tmp_path / "a").rename(tmp_path / "b")
    os.utime(flags[script][1])
    run(script, flags[script], tmp_path / "b", "--resume")
    assert same(tmp_path / "b", whole[script])

@pytest.mark.parametrize("script, more", [
    (finetune_srl, ["--micro_batch", "3", "--method", "2dmse", "--sizes", "1:8,2:16,3:48", "--dtype", "bfloat16"]),
    (finetune_srl, ["--init_from", "scratch", "--num_layers", "3", "--vocab_size", "200"]),
    (finetune_srl, ["--teacher", "BERT", "--kl_weight", "3", "--train_pairs", "PAIRS", "SCORED"]),
    (pretrain_smae, ["--streaming", "--micro_batch", "2", "--max_steps", "6", "--dtype", "bfloat16"])])
def test_every_way_of_training_goes_on_exactly(script, more, flags, pairs_file, bert_folder, tmp_path, monkeypatch):
    """ Pieces, 2DMSE, bfloat16, a teacher, several sources, a vocabulary of its own, which is not trained again, and a
    stream that two ranks share: a resumed run ends with the same bits. """
    monkeypatch.setattr(pretrain_smae, "HELD_OUT", 4)
    monkeypatch.setattr(pretrain_smae, "ranks", lambda: (0, 2))   # the first of two
    scored = write_jsonl(tmp_path / "scored.jsonl", [{"sentence1": f"{noun} a", "sentence2": f"{noun} b", "score": i}
                                                     for i, noun in enumerate(NOUNS)])
    names = {"BERT": bert_folder, "PAIRS": pairs_file, "SCORED": scored}
    more = [names.get(flag, flag) for flag in more]
    run(script, flags[script], tmp_path / "whole", *more)
    stopped(script, flags[script], tmp_path / "out", *more)
    monkeypatch.setattr(data, "train_wordpiece", None)
    run(script, flags[script], tmp_path / "out", *more, "--resume")
    assert same(tmp_path / "out", tmp_path / "whole")

# ---- ranks -----------------------------------------------------------------------------------------------------------
def gradients(bert_folder):
    """ -> the losses and gradients of several steps on 12 texts """
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    bert, rng, found = load_model(bert_folder, **dropout)[0].double().train(), np.random.default_rng(0), []
    texts = [rng.integers(5, 97, size=n) for n in (7, 3, 20, 7, 12, 5, 20, 7, 9, 5, 11, 3)]
    args = SimpleNamespace(seed=7, device="cpu", dtype="float32")
    for similarity, pieces in [("cosine", 2), ("dot", 2), ("cosine", 3), ("dot", 5)]:
        bert.zero_grad()
        rows = finetune_srl.embed_in_pieces(bert, [1, 2, 3], texts, args, 5, pieces)
        queries, passages = {n: r[:4] for n, r in rows.items()}, {n: r[4:] for n, r in rows.items()}
        nothing = torch.zeros(4, 8, dtype=torch.bool)   # is also right
        loss, _ = finetune_srl.srl_loss(queries, passages, ((1, 8), (2, 32), (3, 48)), similarity, 0.5, 1.0, nothing)
        (1e-6 * loss).backward()   # so small that nothing is clipped
        sum_and_clip(bert.parameters(), 1, {})
        found += [loss.detach()] + [p.grad.clone() for p in bert.parameters() if p.grad is not None]
    return found

def on_a_rank(rank, folder, bert_folder, runs):
    """ what one of two processes does: a run of each script, and in between the gradients """
    torch.set_num_threads(1)
    run(pretrain_smae, runs["pretrain_smae"], f"{folder}/pretrain_smae {rank}")   # starts the process group
    torch.save(gradients(bert_folder), f"{folder}/{rank}.pt")
    dist.init_process_group = lambda *_: None
    run(finetune_srl, runs["finetune_srl"], f"{folder}/finetune_srl {rank}")      # ends it

def test_two_ranks_are_one_process(flags, bert_folder, tmp_path):
    """ SRL's gradients to 1e-10 in float64, cosine and dot, with hard negatives, dropout and pieces that ranks share
    unequally. Runs of both scripts to 1e-5, because AdamW makes steps of the rounding of tiny gradients, and the losses
    and norms of their logs. The second rank prints nothing and writes nothing. """
    runs = {script.__name__: [*its_flags, "--max_steps", "3", "--save_interval", "0", "--micro_batch", micro_batch]
            for (script, its_flags), micro_batch in zip(flags.items(), "34", strict=True)}
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_runs; "
    call = f"test_runs.on_a_rank(RANK, {str(tmp_path)!r}, {bert_folder!r}, {runs!r})"
    processes = start("-c", code + call, ranks=2)
    want = gradients(bert_folder)
    for script in flags:
        run(script, runs[script.__name__], tmp_path / "one" / script.__name__)
    printed = end(processes)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want, rtol=1e-10, atol=1e-16)
    for name in runs:
        first, one = tmp_path / f"{name} 0", tmp_path / "one" / name
        torch.testing.assert_close(weights(first), weights(one), rtol=0, atol=1e-5)
        assert all(logged(first, key) == pytest.approx(logged(one, key), rel=1e-4) for key in ("loss", "norm"))
        assert not (tmp_path / f"{name} 1").exists()
    assert printed[0].count("step 3 | loss") == 2 and "step" not in printed[1]

# ---- a folder with a run in it ---------------------------------------------------------------------------------------
@BOTH
def test_what_cannot_be_started_or_resumed_is_refused(script, flags, tmp_path):
    """ A folder with a run in it without --resume; with it other flags, other data under the same name, a missing
    state: an error that names it, and the folder stays as it was. """
    source, out = Path(shutil.copy(flags[script][1], tmp_path)), tmp_path / "out"
    mine = [flags[script][0], str(source), *flags[script][2:]]
    stopped(script, mine, out, after=2)
    files = {file: file.read_bytes() for file in out.rglob("*.*")}
    def refused(words, *more):
        with pytest.raises((ValueError, OSError), match=words):
            run(script, mine, out, *more)
        assert {file: file.read_bytes() for file in out.rglob("*.*")} == files
    refused("holds a model")
    refused("--learning_rate", "--resume", "--learning_rate", "1")
    refused("--micro_batch", "--resume", "--micro_batch", "2")
    refused("--max_steps", "--resume", "--max_steps", "9")
    source.write_text(source.read_text().replace("apple", "orange"))
    refused("data and ranks", "--resume")
    files.pop(out / STATE)
    (out / STATE).unlink()
    refused("holds a model")
    refused(STATE, "--resume")
