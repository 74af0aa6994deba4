"""
docs, the corpus that needs no download: the documentation of this machine's Python packages. data.docs_folder() calls

    python -m tools.docs FOLDER PACKAGE...

Docstrings of the standard library and of the packages (query = first paragraph, passage = the rest) -> FOLDER, in the
layout of a BEIR set with train.jsonl {name, query, positive} beside it. A fifth of the source files is held out
whole, for the corpus, 1,000 test and 500 dev queries; a text that occurs in both parts stays in the held-out part only.
The same package versions give the same files.
"""
import ast, importlib.util, json, os, re, shutil, sys, sysconfig, warnings, zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Installed packages lie below the standard library but are not part of it; tests hold much code and little prose.
SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}

def fold(text):
    """ "Sort the -- LIST." -> "sort the list": texts that differ in case or punctuation alone become equal """
    return re.sub(r"\W+", " ", text).strip().lower()

def write_beir(folder, corpus, queries, qrels):
    """ corpus, queries: [{"_id", "text", ...}]; qrels {split: [(query id, document id)]} -> a folder for Collection """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for stem, rows in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{stem}.jsonl").write_text("".join(lines), encoding="utf-8")
    for split, judged in qrels.items():
        lines = ["query-id\tcorpus-id\tscore\n"] + [f"{query}\t{document}\t1\n" for query, document in judged]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(lines))

def docstrings(path):
    """ one source file -> [(dotted name in the file, first paragraph, the rest)]; [] if it does not parse """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # invalid escape sequences in other people's code
            tree = ast.parse(Path(path).read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return []   # some packages hold Python 2 code and the like as test input
    found, stack = [], [(tree, "")]
    while stack:
        node, name = stack.pop()
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and node is not tree:
            name += f".{node.name}"
        stack += [(child, name) for child in ast.iter_child_nodes(node)]
        if documented:
            query, _, passage = (ast.get_docstring(node) or "").partition("\n\n")
            query, passage = query.split(), passage.split()
            if len(query) >= 3 and len(passage) >= 15:   # shorter ones ("Returns: bool") say too little
                found.append((name, " ".join(query), " ".join(passage)))
    return sorted(found)

def source_files(packages):
    """ -> [("numpy/linalg.py", path), ...], the held-out files first """
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(package).origin).parent for package in packages]
    files = [(f"{root.name}/{path.relative_to(root).as_posix()}", path)
             for root in roots for path in sorted(root.rglob("*.py")) if not SKIP & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda file: not is_held_out(file[0]))

def is_held_out(file):
    return zlib.crc32(file.encode()) % 5 == 0

def main(folder, *packages):
    files = source_files(packages)
    with ProcessPoolExecutor() as pool:
        found = pool.map(docstrings, [path for _, path in files], chunksize=16)
        found = list(tqdm(found, "docs: reading the docstrings of this machine's packages", len(files), disable=None))
    seen, train, corpus = set(), [], []
    for (file, _), texts in zip(files, found):
        module = re.sub(r"(/__init__)?\.py$", "", file).replace("/", ".")
        side = corpus if is_held_out(file) else train
        for name, query, passage in texts:
            keys = {fold(query), fold(passage)}
            if not keys & seen:   # held-out files came first, so they keep shared texts
                side.append((module + name, query, passage))
            seen |= keys
    order = np.random.default_rng(0).permutation(len(corpus)).tolist()
    test, dev = order[:1000], order[1000:1500]
    part = Path(f"{folder}.{os.getpid()}.part")   # renamed at the end, so that the folder is never half written
    write_beir(part, [{"_id": str(i), "title": "", "text": passage, "name": name, "query": query}
                      for i, (name, query, passage) in enumerate(corpus)],
               [{"_id": f"q{i}", "text": corpus[i][1]} for i in test + dev],
               {"test": [(f"q{i}", i) for i in test], "dev": [(f"q{i}", i) for i in dev]})
    rows = [json.dumps({"name": name, "query": query, "positive": passage}) + "\n" for name, query, passage in train]
    (part / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    if Path(folder).exists():   # another process was faster
        shutil.rmtree(part)
    else:
        os.replace(part, folder)

if __name__ == "__main__":
    main(*sys.argv[1:])
