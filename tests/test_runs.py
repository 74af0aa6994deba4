""" Several ranks, kill -9, resuming, and what a folder with a run in it does: both training scripts alike. """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import finetune_srl
import pretrain_smae
from conftest import NOUNS, ROOT, write_jsonl
from model import STATE, Bert, load_model, pack

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

@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """ {script: the folder of a run that nothing disturbed}; tests read it and do not change it """
    folder = tmp_path_factory.mktemp("whole")
    for script in flags:
        run(script, flags[script], folder / script.__name__)
    return {script: folder / script.__name__ for script in flags}

def start(script, flags, out, rank=None, port=None):
    """ -> the running process, as one of two that torchrun starts if it has a rank """
    ranks = {} if rank is None else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, ROOT / f"{script.__name__}.py", *flags, "--out_dir", str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ranks | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def end(*processes):
    """ -> what each printed; they must end well, and in time """
    printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed

def two_ranks(script, flags, *outs):
    """ run the script on two ranks, whose --out_dir may differ -> what they printed """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return end(*[start(script, flags, outs[rank % len(outs)], rank, port) for rank in (0, 1)])

def weights(folder):
    return load_file(folder / "model.safetensors")

def steps(folder):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "loss" in record]

def same(a, b):
    """ Are the weights of the two folders the same, bit by bit, and has each log every step once? """
    a, b, logs = weights(a), weights(b), (steps(a), steps(b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and logs[0] == logs[1]

def stop_after(script, step, monkeypatch):
    """ the run ends, as if it had been killed, once the checkpoint of this step is saved """
    save_run = script.save_run
    def saved(args, done, *rest):
        save_run(args, done, *rest)
        if done == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(script, "save_run", saved)

# ---- kill and resume -------------------------------------------------------------------------------------------------
@BOTH
def test_a_killed_run_goes_on_exactly(script, flags, whole, tmp_path):
    """ kill -9 in the middle, then --resume: weights bit for bit, and every step once in the log. """
    out = tmp_path / "out"
    process, deadline = start(script, flags[script], out), time.time() + LIMIT
    while time.time() < deadline and not (out / STATE).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    assert (out / STATE).exists() and process.returncode == -signal.SIGKILL
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 99, "lo')   # as if it had been killed while it wrote
    end(start(script, [*flags[script], "--resume"], out))
    assert same(out, whole[script]) and steps(out) == list(range(1, 9))

WAYS = {"pieces": ["--micro_batch", "3"], "2dmse": ["--method", "2dmse"], "bfloat16": ["--dtype", "bfloat16"],
        "teacher": ["--teacher", "BERT", "--kl_weight", "3"], "sources": ["--train_pairs", "PAIRS", "SCORED"]}

@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_fine_tuning_goes_on_exactly(way, flags, pairs_file, bert_folder, tmp_path, monkeypatch):
    scored = write_jsonl(tmp_path / "scored.jsonl", [{"sentence1": f"{noun} a", "sentence2": f"{noun} b", "score": i}
                                                     for i, noun in enumerate(NOUNS)])
    names = {"BERT": bert_folder, "PAIRS": pairs_file, "SCORED": scored}
    more = [names.get(flag, flag) for flag in WAYS[way]]
    run(finetune_srl, flags[finetune_srl], tmp_path / "whole", *more)
    stop_after(finetune_srl, 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(finetune_srl, flags[finetune_srl], tmp_path / "out", *more)
    monkeypatch.undo()
    run(finetune_srl, flags[finetune_srl], tmp_path / "out", *more, "--resume")
    assert same(tmp_path / "out", tmp_path / "whole")

def test_a_stream_goes_on_exactly(flags, tmp_path, monkeypatch):
    """ A resumed run on a stream skips what it has read. """
    monkeypatch.setattr(pretrain_smae, "HELD_OUT", 4)
    more = ["--streaming", "--micro_batch", "4", "--max_steps", "6"]
    run(pretrain_smae, flags[pretrain_smae], tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_after(pretrain_smae, 4, patch)
        with pytest.raises(KeyboardInterrupt):
            run(pretrain_smae, flags[pretrain_smae], tmp_path / "out", *more)
    run(pretrain_smae, flags[pretrain_smae], tmp_path / "out", *more, "--resume")
    assert same(tmp_path / "out", tmp_path / "whole")

@BOTH
@pytest.mark.parametrize("broken_at", [1, 4, 8, 9])
def test_a_kill_while_it_saves_loses_nothing(script, broken_at, flags, whole, tmp_path, monkeypatch):
    """ Whichever file of the second checkpoint is the last to come into the folder, --resume ends with the same weights
    as the run that nothing disturbed. """
    moved, replace = [], os.replace
    def replaced(source, target):
        if "saving.part" in str(source) and script.save_run.__name__ == "saved":
            moved.append(target)
            if len(moved) == broken_at:
                raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        save_run = script.save_run
        def saved(args, done, *rest):
            if done == 4:
                patch.setattr(os, "replace", replaced)
            save_run(args, done, *rest)
        patch.setattr(script, "save_run", saved)
        with pytest.raises(KeyboardInterrupt):
            run(script, flags[script], tmp_path / "out")
    assert torch.load(tmp_path / "out" / STATE)["step"] == 2
    run(script, flags[script], tmp_path / "out", "--resume")
    assert same(tmp_path / "out", whole[script])

# ---- ranks -----------------------------------------------------------------------------------------------------------
GRADIENT = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from finetune_srl import embed_in_pieces, srl_loss
from model import Bert, clip_gradient, pack
rank, world_size, cases = int(sys.argv[2]), int(sys.argv[3]), [("cosine", 2), ("dot", 2), ("cosine", 3), ("dot", 5)]
if world_size > 1:
    dist.init_process_group("gloo")
torch.set_num_threads(1)
bert, texts = torch.load(sys.argv[4], weights_only=False)
found = []
for similarity, pieces in cases:
    bert.zero_grad()
    rows = embed_in_pieces(lambda texts: bert.encode(pack(texts), [1, 3, 4]), texts, pieces, (7, 5), rank, world_size)
    loss, _ = srl_loss({n: r[:4] for n, r in rows.items()}, {n: r[4:] for n, r in rows.items()},
                       ((1, 8), (3, 32), (4, 48)), similarity, 0.5, 1.0)
    (1e-6 * loss).backward()   # so small that nothing is clipped
    clip_gradient(bert.parameters(), 0, {})
    found.append([loss.detach()] + [p.grad.clone() for p in bert.parameters() if p.grad is not None])
torch.save(found, sys.argv[5])
"""

def test_two_ranks_give_the_gradient_of_one_process(config, texts, tmp_path):
    """ To 1e-10 in float64, cosine and dot, with hard negatives, dropout and pieces that ranks share unequally. """
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    torch.manual_seed(0)
    torch.save((Bert(config).double().train(), texts), tmp_path / "job.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    def process(rank, world_size):
        command = [sys.executable, "-c", GRADIENT, ROOT, str(rank), str(world_size), tmp_path / "job.pt",
                   tmp_path / f"{world_size}-{rank}.pt"]
        return subprocess.Popen(command, env=os.environ | address | {"RANK": str(rank)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end(process(0, 2), process(1, 2), process(0, 1))
    for rank in (0, 1):
        for found, want in zip(torch.load(tmp_path / f"2-{rank}.pt"), torch.load(tmp_path / "1-0.pt"), strict=True):
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-16)

@BOTH
def test_a_run_on_two_ranks_is_that_of_one_process(script, flags, tmp_path):
    """ Weights to 1e-5 (AdamW makes steps of the rounding of tiny gradients, which are equal to 1e-10, see above); the
    second rank prints nothing and writes nothing. """
    more = [*flags[script], "--micro_batch", "3" if script is finetune_srl else "4"]
    run(script, more, tmp_path / "one")
    printed = two_ranks(script, more, tmp_path / "zero", tmp_path / "second")
    found, want = weights(tmp_path / "zero"), weights(tmp_path / "one")
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=1e-5, msg=lambda m: f"{name} {m}")
    assert "step 8" in printed[0] and "step" not in printed[1] and not (tmp_path / "second").exists()

def test_ranks_share_the_text_of_a_stream(tmp_path):
    """ Each of two ranks reads its own half, and together they read all. """
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"number {i}" for i in range(20)))
    tokenizer = data.train_wordpiece([path.read_text()], 100)
    read = [[tuple(row["ids"]) for row in data.tokenize_text(str(path), tokenizer, True, rank, 2)] for rank in (0, 1)]
    assert len(read[0]) == len(read[1]) == 10 and len(set(read[0] + read[1])) == 20

# ---- a folder with a run in it ---------------------------------------------------------------------------------------
@BOTH
def test_a_run_is_not_overwritten(script, flags, whole, tmp_path):
    """ A folder with a run is refused; --overwrite begins anew, and nothing of the earlier run is left. """
    with pytest.raises(ValueError, match="holds a run"):
        run(script, flags[script], whole[script])
    run(script, flags[script], tmp_path / "a", "--max_steps", 2)
    (tmp_path / "a" / "eval.json").write_text("{}")
    run(script, flags[script], tmp_path / "a", "--max_steps", 1, "--overwrite")
    assert steps(tmp_path / "a") == [1] and not (tmp_path / "a" / "eval.json").exists()
    assert not (tmp_path / "a" / "saving.part").exists()

REFUSED = {"a flag": (["--learning_rate", "1"], "--learning_rate"), "the data": ([], "data and ranks"),
           "pieces": (["--micro_batch", "2"], "micro_batch"), "half a state": ([], STATE), "no state": ([], STATE)}

@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_refused(script, case, flags, tmp_path, monkeypatch, capsys):
    """ Other flags, other data under the same name, a broken or missing state: an error that names it. """
    source = Path(flags[script][1])
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    mine = [flags[script][0], str(copy), *flags[script][2:]]
    with monkeypatch.context() as patch:
        stop_after(script, 4, patch)
        with pytest.raises(KeyboardInterrupt):
            run(script, mine, tmp_path / "out")
    state = tmp_path / "out" / STATE
    if case == "the data":
        copy.write_text(copy.read_text().replace("apple", "orange"))
    elif case == "half a state":
        state.write_bytes(state.read_bytes()[:1000])
    elif case == "no state":
        state.unlink()
    more, words = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=words):
        run(script, mine, tmp_path / "out", *more, "--resume")

@BOTH
def test_a_moved_run_goes_on(script, flags, whole, tmp_path, monkeypatch):
    """ What counts is the content of the data, not its date, and not the folder of the run. """
    with monkeypatch.context() as patch:
        stop_after(script, 4, patch)
        with pytest.raises(KeyboardInterrupt):
            run(script, flags[script], tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    os.utime(flags[script][1])
    run(script, flags[script], tmp_path / "b", "--resume")
    assert same(tmp_path / "b", whole[script])

def test_numbers_that_are_not_finite_end_the_run(flags, tmp_path):
    """ A learning rate that ruins the model stops with the step and the terms that are not finite. """
    with pytest.raises(FloatingPointError, match="step [2-8]: not finite: .*nce"):
        run(finetune_srl, flags[finetune_srl], tmp_path / "out", "--learning_rate", "1e30", "--warmup", "0")
    assert not (tmp_path / "out" / STATE).exists() or torch.load(tmp_path / "out" / STATE)["step"] < 8
