"""
Texts in, token ids out: where the training pairs come from, how they are tokenised, and which of them form step 1234.

* `docs`: the default corpus needs no download. The required packages carry tens of megabytes of real English, their own
  docstrings: query = first paragraph, passage = the rest. `build_docs` writes them once, in the layout of a BEIR set.
* `load_pairs`: `docs`, a local .jsonl/.csv/.tsv/.parquet file (.gz or not), or a hub name NAME[:CONFIG][:SPLIT].
* `load_sts`, `Collection`: the sets to measure on, from the same kinds of source.
* `tokenize_pairs`, `srl_batch`: texts are tokenised once; a batch is a pure function of (seed, step), so nothing about
  the order of the data has to be saved to resume.
* `load_texts`, `TokenFile`, `whole_word_mask`, `smae_batch`: running text for pre-training, the same way.
"""
import ast
import csv
import functools
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import string
import sys
import sysconfig
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# docs: the documentation that is on this machine, as pairs for training and as a test collection for retrieval

DOCS_PACKAGES = "numpy scipy torch transformers datasets pandas sympy networkx huggingface_hub".split()
CACHE = Path(__file__).parent / "out"   # git-ignored; deleting it loses nothing but half a minute


def part_of(folder):
    """ -> a new folder to fill, which publish then makes `folder`: an interrupted run leaves no half one """
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    return part


def publish(part, folder):
    """ Rename what is complete. Another run at the same time may have been faster: then its folder serves both. """
    try:
        os.replace(part, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(part)


def docs_folder():
    """ Path of the docs corpus for the package versions at hand; builds it when it is not there yet. """
    versions = " ".join([sys.version.split()[0]] + [f"{p} {importlib.metadata.version(p)}" for p in DOCS_PACKAGES])
    folder = CACHE / f"docs-{zlib.crc32(versions.encode()):08x}"
    return folder if folder.exists() else build_docs(folder)


def docstrings(path):
    """ Pairs of one source file -> [(dotted name in the file, first paragraph, the rest)]; [] if it does not parse. """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # other people's invalid escape sequences
            tree = ast.parse(Path(path).read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return []   # Python 2 code and the like, kept on purpose by some packages as test input
    found, stack = [], [(tree, "")]
    while stack:
        node, prefix = stack.pop()
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            stack.append((child, f"{prefix}.{child.name}" if named else prefix))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            query, _, passage = (ast.get_docstring(node) or "").partition("\n\n")
            query, passage = " ".join(query.split()), " ".join(passage.split())
            if len(query.split()) >= 3 and len(passage.split()) >= 15:   # shorter ones ("Returns: bool") say too little
                found.append((prefix, query, passage))
    return sorted(found)


def build_docs(folder):
    """
    Extract every docstring of the standard library and DOCS_PACKAGES and write `folder`, which doubles as a BEIR set:
    train.jsonl {query, positive} to train on; corpus.jsonl, queries.jsonl, qrels/test.tsv (1,000 queries) and
    qrels/dev.tsv (500). The split is by source file: a fifth of the files is held out whole, and a text that occurs in
    both halves is kept only in the held-out one. Deterministic for given package versions. -> folder
    """
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(package).origin).parent for package in DOCS_PACKAGES]
    # Third-party code below the standard library is not part of it; tests have much code and next to no prose.
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [(f"{root.name}/{path.relative_to(root).as_posix()}", path)
             for root in roots for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    with ProcessPoolExecutor() as pool:
        found = list(tqdm(pool.map(docstrings, [path for _, path in files], chunksize=16), total=len(files),
                          desc="docs: reading the docstrings of this machine's Python packages", unit=" files"))
    held_out = [zlib.crc32(name.encode()) % 5 == 0 for name, _ in files]
    seen, train, corpus = set(), [], []
    for i in sorted(range(len(files)), key=lambda i: not held_out[i]):   # held-out files first: they keep shared texts
        module = re.sub(r"(/__init__)?\.py$", "", files[i][0]).replace("/", ".")
        for name, query, passage in found[i]:
            keys = {re.sub(r"\W+", " ", text).strip().lower() for text in (query, passage)}
            if not keys & seen:
                (corpus if held_out[i] else train).append((module + name, query, passage))
            seen |= keys
    order = np.random.default_rng(0).permutation(len(corpus)).tolist()
    test, dev = order[:1000], order[1000:1500]

    part = part_of(folder)
    (part / "qrels").mkdir(exist_ok=True)
    def write(file, rows):
        (part / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write("train.jsonl", [{"name": name, "query": query, "positive": passage} for name, query, passage in train])
    write("corpus.jsonl", [{"_id": str(i), "title": "", "text": passage, "name": name, "query": query}
                           for i, (name, query, passage) in enumerate(corpus)])
    write("queries.jsonl", [{"_id": f"q{i}", "text": corpus[i][1]} for i in test + dev])
    for split, rows in (("test", test), ("dev", dev)):
        lines = ["query-id\tcorpus-id\tscore\n"] + [f"q{i}\t{i}\t1\n" for i in rows]
        (part / "qrels" / f"{split}.tsv").write_text("".join(lines))
    publish(part, folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# pairs from anywhere: rows of (query, [positives], [negatives])

COLUMNS = {"query": ("query", "anchor"), "positives": ("positive", "positive_passages"),
           "negatives": ("negative", "negatives", "negative_passages")}   # and negative_1, negative_2, ...


def load_pairs(source):
    """
    Training pairs -> an iterable with a len, of (query, [positive, ...], [negative, ...]); negatives may be empty.
    source: "docs", a local .jsonl/.csv/.tsv/.parquet file (.jsonl/.csv/.tsv also .gz), or NAME[:CONFIG][:SPLIT] of the
    Hugging Face hub or a local folder of the same layout (split "train" by default), for example
    sentence-transformers/all-nli:triplet or Tevatron/msmarco-passage. Raises ValueError on a source it cannot read.
    """
    if source == "docs":
        source = str(docs_folder() / "train.jsonl")
    if re.search(r"\.(jsonl|csv|tsv)(\.gz)?$", source):
        rows = [row for _, row in read_rows(source)]
    else:
        import datasets   # imported here: it takes 0.7 s, and the branch above does without
        try:
            if source.endswith(".parquet"):
                rows = datasets.load_dataset("parquet", data_files=source, split="train")
            else:
                name, config, split = (source.split(":") + ["", ""])[:3]
                rows = datasets.load_dataset(name, config or None, split=split or "train")
        except Exception as error:   # datasets raises a dozen kinds for "not there", offline among them
            raise ValueError(f"--train_pairs {source}: neither a .jsonl/.csv/.tsv/.parquet file nor a data set that "
                             f"could be loaded as NAME[:CONFIG][:SPLIT] ({str(error).splitlines()[0]})") from error
    if not len(rows):
        raise ValueError(f"--train_pairs {source} holds no pairs; give a file with at least one row")
    names = {kind: [column for column in rows[0] if column in known or re.sub(r"_\d+$", "", column) in known]
             for kind, known in COLUMNS.items()}
    if not names["query"] or not names["positives"]:
        raise ValueError(f"--train_pairs {source} has the columns {', '.join(rows[0])}; it needs query (or anchor) and "
                         "positive, and may have negative, negatives or negative_1, negative_2, ...")
    return Rows(rows, names)


class Rows:
    """ The rows of any source, columns resolved, decoded one at a time: MS MARCO does not fit a list of strings. """

    def __init__(self, rows, names):
        self.rows, self.names = rows, names

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        for row in self.rows:
            query = row[self.names["query"][0]]
            yield query, *([text for name in self.names[kind] for text in as_texts(row.get(name))]
                           for kind in ("positives", "negatives"))


def as_texts(value):
    """ A cell -> list of texts: None, "text", ["text", ...] or Tevatron's [{"title": ..., "text": ...}, ...]. """
    if not value:
        return []
    if isinstance(value, dict):
        return [f"{value.get('title') or ''} {value['text']}".strip()]
    return [value] if isinstance(value, str) else [text for item in value for text in as_texts(item)]


def read_rows(path):
    """
    .jsonl, .csv or .tsv with a header, gzipped or not -> yields (line number, dict); blank lines are passed over.
    Raises ValueError that names the file and the line.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        if ".jsonl" not in path.name:
            reader = csv.DictReader(file, delimiter="\t" if ".tsv" in path.name else ",")
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                    assert isinstance(row, dict)
                except (json.JSONDecodeError, AssertionError):
                    raise ValueError(f"{path}, line {number}: not a JSON object: {line.strip()[:60]!r}") from None
                yield number, row

# ----------------------------------------------------------------------------------------------------------------------
# test sets: sentence pairs with gold scores, and retrieval collections

STS = {f"sts{year}": f"mteb/sts{year}-sts" for year in range(12, 17)}
STS |= {"stsb": "sentence-transformers/stsb", "sickr": "mteb/sickr-sts"}
SHARD = 25_000   # documents in memory at a time


def task_name(name):
    """ "folder/scifact:dev" -> "scifact:dev"; "folder/sts12.jsonl.gz" -> "sts12" """
    return re.sub(r"\.(jsonl|csv|tsv)(\.gz)?$", "", Path(name).name)


def load_sts(name):
    """
    a name of STS (its test split, from the hub) or a file {sentence1, sentence2, score} -> task, n sentences, their n
    partners, (n,) gold scores. Raises ValueError naming file and line for what is missing or no number.
    """
    if name in STS:
        import datasets
        rows = enumerate(datasets.load_dataset(STS[name], split="test"), start=1)
    elif re.search(r"\.(jsonl|csv|tsv)(\.gz)?$", name):
        rows = read_rows(name)
    else:
        raise ValueError(f"--sts {name}: neither one of {', '.join(STS)} nor a .jsonl, .csv or .tsv file (.gz or not)")
    pairs = []
    for line, row in rows:
        if {"sentence1", "sentence2", "score"} - set(row):
            raise ValueError(f"{name}, line {line}: has the columns {', '.join(row)}; "
                             "it needs sentence1, sentence2 and score")
        try:
            gold = float(row["score"])
        except (TypeError, ValueError):
            gold = float("nan")
        if not np.isfinite(gold):
            raise ValueError(f"{name}, line {line}: the score {row['score']!r} is not a finite number")
        pairs.append((row["sentence1"], row["sentence2"], gold))
    if len(pairs) < 2:
        raise ValueError(f"{name}: {len(pairs)} pairs; a correlation needs two or more")
    first, second, gold = zip(*pairs)
    return task_name(name), first, second, np.array(gold)


class Collection:
    """
    NAME[:SPLIT], split "test" by default. NAME: docs; a folder in BEIR layout; a BEIR set of the hub (scifact, arguana,
    msmarco with the splits validation = dev and test = DL19, ...). For DL20 put its qrels file into a folder's qrels/.
    task; queries {id: text}, qrels {query id: {document id: grade}} of the judged queries; shards() reads the corpus.
    Raises ValueError naming file and line for what is missing, broken, unknown or there twice.
    """

    def __init__(self, name):
        self.task = task_name(name)
        self.name, _, split = name.partition(":")
        split = split or "test"
        self.folder = docs_folder() if self.name == "docs" else Path(self.name)
        if self.folder.is_dir():
            self.qrels_file = self.folder / "qrels" / f"{split}.tsv"
            judgements = read_rows(self.qrels_file)
        else:
            self.qrels_file = f"BeIR/{self.name}-qrels"
            judgements = enumerate(self.from_hub(self.qrels_file, None, split), start=2)
        texts = {key: row["text"] for key, row in self.rows("queries")}
        self.qrels, self.lines = {}, {}   # lines {document id: the first line that judges it}, for shards()
        for line, row in judgements:
            where = f"{self.qrels_file}, line {line}"
            try:
                query, document, grade = str(row["query-id"]), str(row["corpus-id"]), int(row["score"])
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{where}: needs the columns query-id, corpus-id and score (a whole number)") from None
            if query not in texts:
                raise ValueError(f"{where}: query {query!r} is not among the queries")
            if document in self.qrels.setdefault(query, {}):
                raise ValueError(f"{where}: query {query!r} and document {document!r} are judged twice")
            self.qrels[query][document] = grade
            self.lines.setdefault(document, line)
        if not self.qrels:
            raise ValueError(f"{self.qrels_file}: no judgements; one line a judged document is needed")
        self.queries = {query: texts[query] for query in self.qrels}

    def from_hub(self, name, config, split):
        """ one data set of the hub; raises ValueError when it cannot be had """
        import datasets
        try:
            return datasets.load_dataset(name, config, split=split)
        except Exception as error:   # the hub has a dozen kinds of "not there", offline among them
            raise ValueError(f"--retrieval {self.name}: neither docs, nor a folder in BEIR layout, nor a set that "
                             f"could be loaded from the hub as {name} ({str(error).splitlines()[0]})") from error

    def rows(self, stem):
        """ yields (id, row) of the "corpus" or the "queries" """
        if self.folder.is_dir():
            paths = [self.folder / f"{stem}.jsonl", self.folder / f"{stem}.jsonl.gz"]
            paths = [path for path in paths if path.exists()]
            if not paths:
                raise ValueError(f"{self.folder} has no {stem}.jsonl; "
                                 "a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/test.tsv")
            source, rows = paths[0], read_rows(paths[0])
        else:
            source = f"BeIR/{self.name}"
            rows = enumerate(self.from_hub(source, stem, stem), start=1)
        seen = set()
        for line, row in rows:
            if "_id" not in row or "text" not in row:
                raise ValueError(f"{source}, line {line}: has the columns {', '.join(row)}; it needs _id and text")
            key = str(row["_id"])
            if key in seen:
                raise ValueError(f"{source}, line {line}: the id {key!r} is there twice")
            seen.add(key)
            yield key, row
        if not seen:
            raise ValueError(f"{source} is empty; it needs one line a text")

    def shards(self):
        """ yields ([id], [title + text]) of SHARD documents at a time; raises at the end if a judged one is missing """
        missing = dict(self.lines)
        rows = self.rows("corpus")
        while shard := list(itertools.islice(rows, SHARD)):
            ids = [key for key, _ in shard]
            for key in ids:
                missing.pop(key, None)
            yield ids, [f"{row.get('title') or ''} {row['text']}".strip() for _, row in shard]
        for document, line in missing.items():
            raise ValueError(f"{self.qrels_file}, line {line}: document {document!r} is not in the corpus")

# ----------------------------------------------------------------------------------------------------------------------
# token ids, once


def train_wordpiece(texts, vocab_size):
    """ a lower-casing WordPiece tokenizer like BERT's, trained on an iterable of texts -> transformers tokenizer """
    from transformers import BertTokenizer   # here: importing it takes a second or two
    # The trainer numbers what it meets in the order of a hash table, and breaks ties by number. So that the same texts
    # give the same vocabulary, it gets the letters in a fixed order, and its pieces are sorted afterwards.
    letters = [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    trained = BertTokenizer().train_new_from_iterator(texts, vocab_size, new_special_tokens=letters,
                                                      show_progress=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = special + sorted(set(trained.get_vocab()) - set(special))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def load_tokenizer(folder):
    """ the tokenizer of a Hugging Face folder -> transformers tokenizer """
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


def tokenize(texts, tokenizer, max_length, desc="tokenising"):
    """ list of B texts -> list of B (T,) int arrays, [CLS] ... [SEP], at most max_length long. Parallel inside. """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32   # 12 M MS MARCO passages: 2 GB instead of 4
    ids = []
    for i in tqdm(range(0, len(texts), 4096), desc=desc, unit=" x 4096 texts", disable=len(texts) <= 4096):
        chunk = tokenizer(texts[i:i + 4096], truncation=True, max_length=max_length, return_attention_mask=False,
                          return_token_type_ids=False)["input_ids"]
        ids += [np.array(text, dtype=dtype) for text in chunk]
    return ids


class Pairs(NamedTuple):
    """ n tokenised rows. queries[i]: (T,) ids; positives[i], negatives[i]: lists of (T,) ids. """
    queries: list
    positives: list
    negatives: list


def tokenize_pairs(rows, tokenizer, query_max_length, passage_max_length):
    """ What load_pairs returns -> Pairs. The strings are dropped chunk by chunk, so memory holds the ids alone. """
    pairs, rows, bar = Pairs([], [], []), iter(rows), tqdm(total=len(rows), desc="tokenising pairs", unit=" rows")
    while chunk := list(itertools.islice(rows, 4096)):
        bar.update(len(chunk))
        chunk = [row for row in chunk if row[1]]   # a row without a positive teaches nothing
        passages = [text for _, positives, negatives in chunk for text in positives + negatives]
        queries = tokenize([query for query, _, _ in chunk], tokenizer, query_max_length)
        passages = iter(tokenize(passages, tokenizer, passage_max_length))
        for query, (_, positives, negatives) in zip(queries, chunk):
            pairs.queries.append(query)
            pairs.positives.append([next(passages) for _ in positives])
            pairs.negatives.append([next(passages) for _ in negatives])
    bar.close()
    if not pairs.queries:
        raise ValueError("--train_pairs: not a single row has a positive; fill that column")
    return pairs

# ----------------------------------------------------------------------------------------------------------------------
# batches


@functools.lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """ (n,) the order of the rows in one epoch """
    return np.random.default_rng([seed, epoch]).permutation(n)


def window(text, length, rng):
    """ (T,) ids -> `length` of them if there are more, [CLS] and [SEP] kept: the beginning or, as often, any piece """
    if len(text) <= length:
        return text
    start = 1 if rng.random() < 0.5 else rng.integers(1, len(text) - length + 2)
    return np.concatenate([text[:1], text[start:start + length - 2], text[-1:]])


def srl_batch(pairs, batch_size, negatives, passage_max_length, seed, step):
    """
    Batch number `step` -> Q queries and P >= Q passages, lists of (T,) ids: passage i is the positive of query i; the
    hard negatives (at most `negatives` a query) come after the Q positives, so rows may have different numbers of them.
    Of passages above passage_max_length a window. Every epoch visits every row once in an order of its own; the last,
    incomplete batch is dropped.
    """
    epoch, i = divmod(step, len(pairs.queries) // batch_size)
    rows = epoch_order(len(pairs.queries), seed, epoch)[i * batch_size:(i + 1) * batch_size]
    rng = np.random.default_rng([seed, step, 1])
    positives = [pairs.positives[row][rng.integers(len(pairs.positives[row]))] for row in rows]
    hard = [pairs.negatives[row][k] for row in rows
            for k in rng.permutation(len(pairs.negatives[row]))[:negatives]]
    return [pairs.queries[row] for row in rows], [window(text, passage_max_length, rng) for text in positives + hard]

# ----------------------------------------------------------------------------------------------------------------------
# running text, for pre-training


def load_texts(source, streaming=False, rank=0, world_size=1):
    """
    -> iterable of documents (strings). source: "docs" (the train half), a local .txt (a line is a document), .jsonl or
    .parquet file (column "text"; .txt and .jsonl also .gz), or NAME[:CONFIG][:SPLIT] of the hub, for example
    HuggingFaceFW/fineweb:sample-100BT. streaming reads parquet and hub sets as they arrive, and each of world_size
    ranks takes files of its own. Raises ValueError on a source it cannot read.
    """
    if source == "docs":
        return (f"{row['query']} {row['positive']}" for _, row in read_rows(docs_folder() / "train.jsonl"))
    if re.search(r"\.(txt|jsonl)(\.gz)?$", source):
        if streaming:
            raise ValueError(f"--streaming with {source}: is for .parquet files and hub sets; leave it out, the file "
                             "is tokenised once, line by line, whatever its size")
        return read_lines(source) if ".txt" in Path(source).name else column_text(row for _, row in read_rows(source))
    import datasets
    try:
        if source.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=source, split="train", streaming=streaming)
        else:
            name, config, split = (source.split(":") + ["", ""])[:3]
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except Exception as error:   # as in load_pairs
        raise ValueError(f"--train_text {source}: neither a .txt/.jsonl/.parquet file nor a data set that could be "
                         f"loaded as NAME[:CONFIG][:SPLIT] ({str(error).splitlines()[0]})") from error
    if streaming:
        from datasets.distributed import split_dataset_by_node
        rows = split_dataset_by_node(rows, rank, world_size)
    return column_text(rows)


def read_lines(path):
    """ yields the lines of a .txt or .txt.gz file """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from file


def column_text(rows):
    """ yields the column text of dicts; raises ValueError where it is missing or no string """
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"--train_text: a row with the columns {', '.join(row)}; it needs text, a string")
        yield row["text"]


def tokenize_documents(texts, tokenizer):
    """
    iterable of strings -> yields (T,) arrays of ids without [CLS] and [SEP], T > 0, the top bit of an id set where a
    word begins: uint16 if 15 bits hold the vocabulary (BERT's 30,522), else uint32.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**15 else np.uint32
    begins = np.array([not piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    flagged = np.arange(len(tokenizer), dtype=dtype) | begins.astype(dtype) << dtype(8 * dtype().itemsize - 1)
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, 1024)):
        for ids in tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                             verbose=False)["input_ids"]:
            if ids:
                yield flagged[ids]


class TokenFile:
    """ Documents in one memory-mapped file: the operating system holds what is being read, whatever the size. """

    def __init__(self, folder):
        self.ends = np.load(folder / "ends.npy")   # (documents,)
        size = (folder / "tokens.bin").stat().st_size // int(self.ends[-1])   # bytes a token
        self.tokens = np.memmap(folder / "tokens.bin", np.dtype(f"uint{8 * size}"), mode="r")

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return np.asarray(self.tokens[self.ends[i - 1] if i else 0:self.ends[i]])


def token_file(source, tokenizer):
    """ TokenFile of a source; tokenised the first time, found again by source, its date and the vocabulary """
    about = [source, sorted(tokenizer.get_vocab().items())]
    if source == "docs":
        about.append(docs_folder().name)
    elif Path(source).is_file():
        about += [os.path.abspath(source), os.stat(source).st_size, os.stat(source).st_mtime_ns]
    folder = CACHE / f"text-{zlib.crc32(json.dumps(about).encode()):08x}"
    if not folder.exists():
        part, ends = part_of(folder), [0]
        with open(part / "tokens.bin", "wb") as file:
            for tokens in tqdm(tokenize_documents(load_texts(source), tokenizer), desc="tokenising", unit=" documents"):
                tokens.tofile(file)
                ends.append(ends[-1] + len(tokens))
        if len(ends) < 3:
            raise ValueError(f"--train_text {source} holds {len(ends) - 1} documents with text; give two or more")
        np.save(part / "ends.npy", np.array(ends[1:]))
        publish(part, folder)
    return TokenFile(folder)


class Masked(NamedTuple):
    """ B texts masked twice, N tokens in one row, texts sorted by length as `pack` wants them. """
    texts: list                     # B (T,) the true ids, [CLS] ... [SEP]
    encoder_ids: np.ndarray         # (N,) about 20 % of the tokens hidden
    encoder_masked: np.ndarray      # (M,) positions in the row: where the encoder has to guess
    decoder_ids: np.ndarray         # (N,) about 40 % hidden
    decoder_masked: np.ndarray      # (M',) positions, a superset of encoder_masked


def whole_word_mask(begins, special, text_ids, rates, rng):
    """
    begins, special (N,) bool: a word begins here; [CLS] or [SEP]. text_ids (N,): ascending, which text.
    -> one (N,) bool mask a rate. The words of a text are shuffled once, and a rate takes them from the front until its
    budget, round(rate * tokens that are not special), is met to within half a word: the masks are nested.
    """
    word = np.cumsum(begins) - 1                                          # (N,) number of the word, over all texts
    first = np.flatnonzero(begins)                                        # (W,) its first token
    length = np.diff(np.append(first, len(begins)))                       # (W,) its tokens
    text = text_ids[first]                                                # (W,)
    key = np.where(special[first], 2.0, rng.random(len(first)))           # special tokens go last, beyond any rate
    order = np.lexsort((key, text))                                       # shuffled within each text
    tokens = np.bincount(text_ids, weights=~special).astype(int)          # (B,)
    before = np.cumsum(length[order]) - length[order]                     # tokens in front of a word, over all texts
    before -= before[np.searchsorted(text[order], text[order])]           # ... within its text
    middle = np.empty(len(first))
    middle[order] = before + length[order] / 2
    return [(middle <= np.round(rate * tokens)[text])[word] for rate in rates]


def corrupt(ids, masked, mask_token_id, vocab_size, rng):
    """ BERT's 80/10/10: of the masked positions, 80 % show [MASK], 10 % a random token, 10 % what is there. -> (N,) """
    ids, at = ids.copy(), np.flatnonzero(masked)
    dice = rng.random(len(at))
    ids[at[dice < 0.8]] = mask_token_id
    at = at[dice >= 0.9]
    ids[at] = rng.integers(vocab_size, size=len(at))
    return ids


def smae_batch(documents, max_length, rates, tokenizer, seed):
    """
    B arrays of tokenize_documents, tokens a text at most, (encoder, decoder) mask rates -> Masked. A pure function: one
    random window a document, masked at random, both decided by seed, a list of integers.
    """
    rng = np.random.default_rng(seed)
    top = documents[0].dtype.type(1 << 8 * documents[0].itemsize - 1)
    starts = [rng.integers(max(1, len(document) - (max_length - 2) + 1)) for document in documents]
    windows = sorted((document[start:start + max_length - 2] for document, start in zip(documents, starts)), key=len)
    lengths = np.array([len(window) + 2 for window in windows])
    text_ids = np.repeat(np.arange(len(windows)), lengths)
    last = lengths.cumsum() - 1
    special = np.zeros(len(text_ids), bool)
    special[last] = special[last - lengths + 1] = True
    row = np.zeros(len(text_ids), documents[0].dtype)
    row[~special] = np.concatenate(windows)
    ids = (row & ~top).astype(np.int64)
    ids[last - lengths + 1], ids[last] = tokenizer.cls_token_id, tokenizer.sep_token_id
    begins = (row & top > 0) | special
    begins[last - lengths + 2] = True                                     # a window may begin inside a word
    encoder, decoder = whole_word_mask(begins, special, text_ids, rates, rng)
    hide = functools.partial(corrupt, ids, mask_token_id=tokenizer.mask_token_id, vocab_size=len(tokenizer), rng=rng)
    return Masked(np.split(ids, last[:-1] + 1), hide(encoder), np.flatnonzero(encoder), hide(decoder),
                  np.flatnonzero(decoder))
