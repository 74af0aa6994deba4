"""
Kill both training scripts at random moments and at every point where they touch their folder, resume, and compare the
weights and the log with those of a run that nothing disturbed. Not a test of pytest, because it takes minutes:

    OMP_NUM_THREADS=1 python tests/kill.py 10       # random moments a script; 0 for none
"""
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import conftest   # finds the repository
import json
import torch
import model
from model import run_script
import finetune_srl
import pretrain_smae
from safetensors.torch import load_file

TIMES = {"ms", "tokens_per_second", "seconds"}


def start(job, printed, **environment):
    """ run job() in a process of its own, which prints to the file -> its process id. A fork need not load torch. """
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.environ.update(environment)
        torch.set_num_threads(1)   # a fork has none of its parent's threads
        sys.stdout = sys.stderr = open(printed, "w", buffering=1)
        job()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(pid):
    """ wait for the process -> its exit status, below 0 for a signal """
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records(folder):
    """ log.jsonl without what a clock says """
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """ Are weights and logs of the two folders the same, bit by bit? """
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in (a, b))
    return records(a) == records(b) and first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first)


def strike(folder, point):
    """ SIGKILL this process just before it changes the folder for the point-th time """
    seen = [0]
    def hook(event, details):
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or (
            event == "open" and details[1] not in ("r", "rb", None))
        if writes and any(isinstance(detail, (str, Path)) and str(folder) in str(detail) for detail in details):
            seen[0] += 1
            if seen[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def attempt(script, flags, out, point=None):
    """ start the script as its user would after what happened to the folder -> process id """
    saved, model = ((out / name).exists() for name in ("training_state.pt", "model.safetensors"))
    argv = [*flags, "--out_dir", str(out)] + (["--resume"] if saved else ["--overwrite"] if model else [])
    def job():
        if point:
            strike(out, point)
        run_script(script.main, lambda: script.parse_args(argv))
    return start(job, f"{out}.txt")


def finish(script, flags, out):
    """ resume until the run is finished """
    status = end(attempt(script, flags, out))
    assert status == 0, Path(f"{out}.txt").read_text()


def main(moments):
    """ both scripts, killed everywhere """
    folder = Path(tempfile.mkdtemp())
    (folder / "pairs.jsonl").write_text("".join(
        f'{{"query": "where is the {a} {b}", "positive": "the {a} stands beside the {b} in the morning"}}\n'
        for a in conftest.NOUNS[:8] for b in conftest.NOUNS[8:]))
    (folder / "text.txt").write_text("".join(
        f"the {a} stands beside the {b} in the morning\n" for a in conftest.NOUNS[:8] for b in conftest.NOUNS[8:]))
    conftest.data.CACHE = folder / "cache"
    small = ("--vocab_size 200 --num_layers 2 --hidden_size 64 --batch_size 16 --max_steps 3 --log_interval 1 "
             "--save_interval 2 --dropout 0.1 --dtype float32 --device cpu --no-compile").split()
    for script, flags in ((finetune_srl, [*small, "--retrieval=", "--train_pairs", str(folder / "pairs.jsonl")]),
                          (pretrain_smae, [*small, "--train_text", str(folder / "text.txt")])):
        name, whole, out = script.__name__, folder / f"{script.__name__}-whole", folder / script.__name__
        script.main(script.parse_args([*flags, "--out_dir", str(whole)]))   # here, so that all modules are loaded
        shutil.rmtree(out, ignore_errors=True)
        begun = time.time()
        finish(script, flags, out)
        seconds, rng = time.time() - begun, random.Random(1)
        print(f"{name}: a run takes {seconds:.1f} s", flush=True)
        for i in range(moments):
            shutil.rmtree(out, ignore_errors=True)
            pid = attempt(script, flags, out)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            if end(pid) != 0:
                finish(script, flags, out)
            assert same(whole, out), f"{name}, random moment {i}"
        print(f"{name}: {moments} random moments", flush=True)
        point, status = 0, -signal.SIGKILL
        while status == -signal.SIGKILL:
            point += 1
            shutil.rmtree(out, ignore_errors=True)
            status = end(attempt(script, flags, out, point))
            if status:
                finish(script, flags, out)
            assert same(whole, out), f"{name}, point {point}"
            assert not list(out.glob("*.part")), f"{name}, point {point}: {os.listdir(out)}"
        print(f"{name}: {point - 1} points of the first run", flush=True)
        # over an earlier run, which must be whole somewhere until the new one has a checkpoint
        earlier, point, status = (whole / "model.safetensors").read_bytes(), 0, -signal.SIGKILL
        while status == -signal.SIGKILL:
            point += 1
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            argv = [*flags, "--out_dir", str(out), "--overwrite", "--seed", "2"]
            for again in (point, None):   # killed, then begun again by the same command and stopped before it saves
                def job():
                    if again:
                        strike(out, again)
                    else:
                        model.save_pretrained = lambda *args: os._exit(77)
                    run_script(script.main, lambda: script.parse_args(argv))
                found = end(start(job, f"{out}.txt"))
                if again:
                    status, saved = found, out / "training_state.pt"
                    if status == 0 or not (out / "replaced").exists() and saved.exists() and (
                            torch.load(saved)["args"]["seed"] == 2):
                        break   # the new run has a checkpoint, and the earlier one is gone
                else:
                    assert found == 77, Path(f"{out}.txt").read_text()
                    assert (out / "replaced" / "model.safetensors").read_bytes() == earlier, f"{name}, point {point}"
                    assert records(out / "replaced") == records(whole), f"{name}, overwriting, point {point}"
                    assert not (out / "model.safetensors").exists() and not (out / "training_state.pt").exists()
        print(f"{name}: {point - 1} points of a run over an earlier one", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]))
