""" The README's commands run as they stand there, shortened only by flags that are added at the end. """
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines()]


def run(command, *flags):
    """ a line of the README, with this Python, and without the pip install in front """
    words = re.findall(r'"[^"]*"|[^\s"]+', command.split("&&")[-1].split("#")[0])
    words = [word.strip('"') for word in words] + list(flags)
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_quick_start_and_search(tmp_path):
    """ the default data are built, the default model takes two steps, the table has BM25 and six sizes, search answers """
    command, = [line for line in COMMANDS if line.endswith("&& python finetune_srl.py")]
    out = str(tmp_path / "srl")
    shown = run(command, "--max_steps", "2", "--out_dir", out)
    for row in ("Demi    1:8", "Trenta  6:192", "BM25"):
        assert row in shown
    results = json.loads((tmp_path / "srl" / "eval.json").read_text())["results"]
    assert {r["n"] for r in results if r["task"] == "docs"} == {1000}
    bm25, = [r["value"] for r in results if r["layer"] is None and r["metric"] == "MRR@10"]
    assert 0.4 < bm25 < 0.6   # depends on the versions of the packages
    search, = [line for line in COMMANDS if "--search" in line]
    assert len(run(search.replace("out/srl", out), "--sizes", "1:8").splitlines()) == 10


def test_every_command_parses():
    """ no line of the README has a flag that the scripts do not have """
    import evaluate
    import finetune_srl
    import pretrain_smae
    parsers = {"finetune_srl.py": finetune_srl.parse_args, "evaluate.py": evaluate.parse_args,
               "pretrain_smae.py": pretrain_smae.parse_args}
    checked = 0
    for command in COMMANDS:
        script, *words = re.sub(r"torchrun --nproc_per_node \d", "python", command.split("&&")[-1].split("#")[0]).split()[1:] or [""]
        if script in parsers and not {"--help", "--search", "--resume"} & set(words):
            parsers[script](words + ["--out_dir", "out/nowhere"] * (script != "evaluate.py"))
            checked += 1
    assert checked >= 9
