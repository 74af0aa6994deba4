""" The README's commands do what it says, shortened only by flags that are added at the end. """
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import transformers

import data
import evaluate
import finetune_srl
import pretrain_smae

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines()]
SCRIPTS = {"finetune_srl.py": finetune_srl, "evaluate.py": evaluate, "pretrain_smae.py": pretrain_smae}


def split_command(command):
    """ "pip install ... && python evaluate.py out/srl  # why" -> ["python", "evaluate.py", "out/srl"] """
    return shlex.split(command.split("&&")[-1], comments=True)


def run(command, *flags):
    """ a line of the README, without the pip install in front, in this process """
    python, script, *words = split_command(command)
    assert python == "python"
    SCRIPTS[script].main(SCRIPTS[script].parse_args([*words, *flags]))


@pytest.fixture
def small_docs(tmp_path, monkeypatch):
    """ a docs corpus of networkx alone, seven of eight files held out: just enough for 1,000 test queries """
    source = Path(importlib.util.find_spec("networkx").origin).parent
    (tmp_path / "lib").mkdir()
    for i, path in enumerate(path for path in sorted(source.rglob("*.py")) if "tests" not in path.parts):
        names = (f"file{i}_{k}.py" for k in itertools.count())   # the checksum of its name says whether it is held out
        name = next(name for name in names if (zlib.crc32(f"lib/{name}".encode()) % 5 == 0) == (i % 8 > 0))
        shutil.copy(path, tmp_path / "lib" / name)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "DOCS_PACKAGES", [])
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))   # as the standard library


def test_quick_start_and_search(small_docs, tmp_path, capsys):
    """ The first command builds the data and trains; its table has BM25 and six sizes; search gives five answers. """
    command, = [line for line in COMMANDS if line.endswith("&& python finetune_srl.py")]
    out = str(tmp_path / "srl")
    run(command, "--max_steps", "2", "--out_dir", out, "--max_length", "64")
    shown = capsys.readouterr().out
    for size in ("Demi    1:8", "Short   2:16", "Tall    3:32", "Grande  4:64", "Venti   5:128", "Trenta  6:192"):
        assert size in shown
    assert "BM25" in shown
    results = json.loads((tmp_path / "srl" / "eval.json").read_text())["results"]
    assert {r["n"] for r in results if r["task"] == "docs"} == {1000}
    mrr = {r["layer"]: r["value"] for r in results if r["metric"] == "MRR@10"}
    bm25 = mrr.pop(None)
    assert 0.54 < bm25 < 0.74   # .64 with networkx 3; depends on its version
    assert max(mrr.values()) < bm25   # after two steps
    search, = [line for line in COMMANDS if "out/srl --search" in line]
    run(search.replace("out/srl", out), "--sizes", "1:8")
    assert len(capsys.readouterr().out.splitlines()) == 10   # a name and a query each


def test_every_command_parses(tmp_path, monkeypatch):
    """ No line of the README or of runs/paper.sh has a flag that the scripts do not have. """
    (tmp_path / "out").mkdir()   # git ignores it, so a fresh clone has none; the README's first command makes it
    monkeypatch.chdir(tmp_path)
    checked = 0
    paper = (ROOT / "runs/paper.sh").read_text().replace("\\\n", " ").splitlines()
    for command in COMMANDS + [line for line in paper if line.startswith(("python", "torchrun"))]:
        command = re.sub(r"torchrun --nproc_per_node \d", "python", command)
        script, *words = split_command(command)[1:] or [""]
        if script in SCRIPTS and not {"--help", "--resume"} & set(words):
            SCRIPTS[script].parse_args(words + ["--out_dir", "out/nowhere"] * (script != "evaluate.py"))
            checked += 1
    assert checked >= 11


def test_worked_example_of_srl():
    """ srl_loss gives the worked example's softmax, InfoNCE, KL and loss from its scores, to the digits shown. """
    rows = re.findall(r"\| q\d, (small|full) \| ([-\d ]+) \| ([.\d ]+) \| ([.\d]+) \| ([.\d]+) \|", README)
    assert len(rows) == 6
    scores = {size: torch.tensor([[float(s) for s in row[1].split()] for row in rows if row[0] == size])
              for size in ("small", "full")}                                                  # (3, 4) each
    for i, (size, _, softmax, nce, kl) in enumerate(rows):
        query = i % 3
        probs, teacher = scores[size][query].softmax(-1), scores["full"][query].softmax(-1)
        assert probs.tolist() == pytest.approx([float(x) for x in softmax.split()], abs=0.00501)
        assert -probs[query].log().item() == pytest.approx(float(nce), abs=0.000501)
        assert (teacher * (teacher / probs).log()).sum().item() == pytest.approx(float(kl), abs=0.000501)
    passages = {layer: torch.eye(4) for layer in (1, 2)}   # so that the queries are the scores
    queries = {1: scores["small"], 2: scores["full"]}
    loss, nce, kl = finetune_srl.srl_loss(queries, passages, ((1, 4), (2, 4)), "dot", 1.0, 1.0)
    means = re.search(r"Mean InfoNCE: small ([.\d]+), full ([.\d]+)\. Mean KL: small ([.\d]+), "
                      r"full 0\. With kl_weight 1, L = .* = ([.\d]+)\. ", README).groups()
    found = [nce["1:4"], nce["2:4"], kl["1:4"], loss]
    assert [float(x) for x in means] == pytest.approx([x.item() for x in found], abs=0.000501)


def test_worked_example_of_smae():
    """ smae_batch masks the README's sentence as the README shows, with seed 53. """
    text, encoder, decoder = (re.search(rf"^    {name} +(.+)$", README, re.M)[1].split() for name in
                              ("text", "encoder", "decoder"))
    words = text[1:-1]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    document, = data.tokenize_documents([" ".join(words)], tokenizer)
    masked = data.smae_batch([document], 64, (0.2, 0.4), tokenizer, [53])
    true = masked.texts[0]
    for shown, ids, positions in ((encoder, masked.encoder_ids, masked.encoder_positions),
                                  (decoder, masked.decoder_ids, masked.decoder_positions)):
        assert shown[1:12] == [pieces[i] for i in ids[1:]]
        assert shown[12:] == ["guesses:", *(pieces[i] for i in true[positions])]
    assert encoder[0] == "[CLS]" and decoder[0] == "BOTTLENECK"


def test_the_scripts_in_runs_name_what_there_is():
    """ Every data.X, evaluate.X, finetune_srl.X, pretrain_smae.X and `from model import X` in runs/*.sh exists. """
    found = 0
    for script in sorted((ROOT / "runs").glob("*.sh")):
        text = script.read_text()
        used = re.findall(r"\b(data|evaluate|finetune_srl|pretrain_smae)\.(?!py\b|json\b)([a-zA-Z_]\w*)", text)
        for module, names in re.findall(r"^from (data|evaluate|model) import (.+)$", text, re.M):
            used += [(module, name.strip()) for name in names.split(",")]
        for module, name in used:
            assert hasattr(importlib.import_module(module), name), f"{script.name}: {module}.{name}"
        found += len(used)
    assert found > 20
