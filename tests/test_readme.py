""" What README.md, runs/*.sh and the docstrings tell people to type and to expect is true. """
import ast, importlib.util, inspect, itertools, json, os, re, shutil, subprocess

import pytest, transformers

import data, evaluate, finetune_srl
from conftest import NOUNS, ROOT, needs, write_jsonl
from tools import docs, export, search

README = (ROOT / "README.md").read_text()
FILES = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}   # {"tools.search": path, ...}

def test_quick_start_then_search(tmp_path, monkeypatch, capsys):
    """ The first command trains and tests six sizes, all of which find most docstrings; tools.search finds one. """
    pairs = [{"query": f"where is the {a} {b}", "positive": f"the {a} is by the {b} in the morning", "name": f"{a}.{b}"}
             for a, b in itertools.combinations(NOUNS, 2)]
    corpus = [pair | {"_id": str(i), "text": pair["positive"]} for i, pair in enumerate(pairs[::8])]
    docs.write_beir(tmp_path, corpus, [{"_id": f"q{row['_id']}", "text": row["query"]} for row in corpus],
                    {split: [(f"q{row['_id']}", row["_id"]) for row in corpus] for split in ("test", "dev")})
    write_jsonl(tmp_path / "train.jsonl", [pair for i, pair in enumerate(pairs) if i % 8])
    for module in (data, evaluate):
        monkeypatch.setattr(module, "docs_folder", lambda: tmp_path)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    flags, out = re.search(r"&& python finetune_srl.py(.*)$", README, re.M)[1].split(), str(tmp_path / "srl")
    finetune_srl.main(finetune_srl.parse_args([*flags, "--max_steps", "15", "--out_dir", out]))
    shown = " ".join(capsys.readouterr().out.split())
    for row in ("Demi 1:8", "Short 2:16", "Tall 3:32", "Grande 4:64", "Venti 5:128", "Trenta 6:160"):
        assert f" {row} " in shown, row
    results = json.loads((tmp_path / "srl/eval.json").read_text())["results"]
    assert min(r["value"] for r in results if r["metric"] == "MRR@10") > 0.5   # 0.2 for an order by chance
    search.main(search.parser.parse_args([out, pairs[8]["query"]]))
    name, text, *rest = capsys.readouterr().out.splitlines()[-10:]             # five hits of two lines
    assert name.split()[1:] == [pairs[8]["name"]] and text.strip().endswith(pairs[8]["positive"]) and len(rest) == 8

@needs("sentence_transformers")
def test_a_size_that_is_handed_over(bert_folder, tmp_path):
    """ README's lines of Python load what tools.export wrote, and give vectors of the shape that they name. """
    export.main(export.parser.parse_args([str(bert_folder), "2:16", str(tmp_path / "small")]))
    code = re.search(r"```python\n(from sentence.*?)```", README, re.S)[1]
    exec(code.replace("out/small", str(tmp_path / "small")), names := {})
    assert f"# {names['vectors'].shape}" in code and names["vectors"].shape == (2, 16)

@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """ [(where, words after python)], [(where, Python code)]: all that README, docstrings and runs/*.sh start. Their
    shell code runs here, in a bash where python and torchrun write down how they are called. """
    folder, words, code = tmp_path_factory.mktemp("typed"), [], []
    (folder / "bash_env").write_text("""
        python() { local f=$(mktemp "$LOG.XXXXXX"); printf "%s\\n" "$@" > $f.words; [ "$1" != - ] || cat > $f.code; }
        torchrun() { shift 2; python "$@"; }; pip() { :; }; pytest() { :; }; hf() { :; }\n""")
    (folder / "data/pairs").mkdir(parents=True)
    write_jsonl(folder / "data/pairs/nli-a.jsonl", [{"negative": "a text"}])
    shutil.copytree(ROOT / "runs", folder / "runs")
    scripts = {file.name: file.read_text() for file in (ROOT / "runs").glob("*.sh")}
    scripts["README.md"] = "\n".join(map("".join, re.findall(r"```sh\n(.*?)```|`(python -m [^`]+)`", README, re.S)))
    for name, file in FILES.items():
        usage = ast.get_docstring(ast.parse(file.read_text())).replace("\\\n", " ").replace("...", "")
        scripts[name] = "\n".join(re.findall(r"^    ((?:python|torchrun) .*)$", usage, re.M))
    for where, text in scripts.items():
        (folder / "runs" / where).write_text(text)
        subprocess.run(["bash", "-euo", "pipefail", f"runs/{where}", "model", "data", "minilm"], check=True, timeout=60,
                       cwd=folder, env=os.environ | {"LOG": where, "BASH_ENV": folder / "bash_env"})
        words += [(where, *file.read_text().splitlines()) for file in folder.glob(f"{where}.*.words")]
        code += [(where, file.read_text()) for file in folder.glob(f"{where}.*.code")]
    return words, code

def test_every_command_parses(typed, monkeypatch):
    """ No line of README, of runs/*.sh and of the docstrings has a flag or value that its script does not take. """
    modules, checked = {name: importlib.import_module(name) for name in FILES}, set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)   # --plot and the like need optional packages
    for where, *words in typed[0]:
        name, *flags = words[1:] if words[0] == "-m" else words
        if name not in ("-", "-c", "tools.docs"):
            print(where, name, flags)   # is shown if argparse does not like it, which is a SystemExit
            script = modules[name.removesuffix(".py")]
            checked.add((where, str(getattr(script, "parser", script).parse_args(flags))))
    assert len(checked) > 200 and {"README.md", "paper.sh", "handover.sh", "tools.export"} <= set(dict(checked))

def test_the_python_code_in_runs_names_what_there_is(typed):
    """ Every name that the Python code in runs/*.sh takes from a file of ours exists there. """
    used = set()
    for where, text in typed[1]:
        nodes = list(ast.walk(ast.parse(text)))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & FILES.keys()
        used |= {(where, node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom)
                 for alias in node.names if node.module in FILES}
        used |= {(where, node.value.id, node.attr) for node in nodes if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id in modules}
    assert len(used) > 20 and not [row for row in used if not hasattr(importlib.import_module(row[1]), row[2])]

def test_the_loss_in_readme_is_that_of_finetune_srl():
    """ README shows srl_loss as it stands, but for its docstring. """
    whole = inspect.getsource(finetune_srl.srl_loss)
    before, _, after = whole.partition(f'    """{finetune_srl.srl_loss.__doc__}"""\n')
    assert after and f"```python\n{before}{after}```" in README

def test_worked_example_of_smae():
    """ smae_batch masks the README's sentence as the README shows, with seed 53. """
    (_, *words, _), encoder, decoder = map(str.split, re.findall(r"^    (?:text|encoder|decoder) +(.+)$", README, re.M))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    document = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    masked = data.smae_batch([document], 64, (0.2, 0.4), tokenizer, [53])
    for shown, ids, at in ((encoder, *masked[1:3]), (decoder, *masked[3:])):
        assert shown[1:] == [*(pieces[i] for i in ids[1:]), "guesses:", *(pieces[i] for i in masked.texts[0][at])]
