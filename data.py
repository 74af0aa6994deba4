"""
Texts in, batches of token ids out.

A batch is a pure function of (data, seed, step), so resuming a run needs no state of a data loader:
  srl_batch    queries with their positives and hard negatives, for finetune_srl.py
  smae_batch   running text masked twice, for pretrain_smae.py
Below the batches: tokenising, which happens once; the sources of pairs, text and test sets (local files and the Hugging
Face hub); and `docs`, the corpus that needs no download, because it is the documentation of the installed packages.

Letters for shapes: see model.py.
"""
import ast, contextlib, csv, functools, gzip, itertools, json, os, re, shutil, string, sys, sysconfig, time
import importlib.metadata, importlib.util, warnings, zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

CACHE = Path(__file__).parent / "out"   # the docs corpus and tokenised text; git-ignored, made again when missing

# ---- batches of pairs, for SRL ---------------------------------------------------------------------------------------
class Pairs(NamedTuple):
    """ tokenised training pairs, row by row """
    queries: list     # of (T,) arrays of ids, one per row
    positives: list   # of lists of such arrays: the positives of each row, one or more
    negatives: list   # of lists of such arrays: its hard negatives, maybe none
    gold: list        # of numbers: how similar the two texts of a row are; empty for pairs without a score

@functools.lru_cache(maxsize=64)
def epoch_order(rows, seed, epoch):
    """ (rows,) the order of the rows in one epoch """
    return np.random.default_rng([seed, epoch]).permutation(rows)

def window(text, length, rng):
    """ (T,) ids -> at most `length` ids, [CLS] and [SEP] kept. A longer text gives with probability 1/2 its beginning,
    else a random window. """
    if len(text) <= length:
        return text
    start = 1 if rng.random() < 0.5 else rng.integers(1, len(text) - length + 2)
    return np.concatenate([text[:1], text[start:start + length - 2], text[-1:]])

def srl_batch(sources, batch_size, negatives, passage_max_length, seed, step):
    """ list of Pairs -> batch number `step`: Q queries and P >= Q passages, lists of (T,) ids, and the gold scores (Q,)
    or None. Passage i < Q is the positive of query i; the hard negatives follow, at most `negatives` a query. Passages
    longer than passage_max_length are cut to a window.
    All rows of a batch are of one source: passages of another source would be negatives that are too easy. An epoch
    visits every row of every source once and drops the last, incomplete batch of each. """
    batches = [len(pairs.queries) // batch_size for pairs in sources]                   # of each source
    epoch, i = divmod(step, sum(batches))
    turns = np.random.default_rng([seed, epoch, 2]).permutation(np.repeat(np.arange(len(sources)), batches))
    pairs, i = sources[turns[i]], (turns[:i] == turns[i]).sum()                         # batch i of this source
    rows = epoch_order(len(pairs.queries), seed, epoch)[i * batch_size:(i + 1) * batch_size]
    rng = np.random.default_rng([seed, step, 1])
    positives = [pairs.positives[row][rng.integers(len(pairs.positives[row]))] for row in rows]
    hard = [pairs.negatives[row][k] for row in rows for k in rng.permutation(len(pairs.negatives[row]))[:negatives]]
    gold = np.array([pairs.gold[row] for row in rows]) if pairs.gold else None
    passages = [window(text, passage_max_length, rng) for text in positives + hard]
    return [pairs.queries[row] for row in rows], passages, gold

# ---- batches of masked text, for SMAE --------------------------------------------------------------------------------
class Masked(NamedTuple):
    """ B texts masked twice. N is the number of their tokens in one row, the short texts first, as in model.Pack. """
    texts: list                     # B (T,) the true ids, [CLS] ... [SEP]
    encoder_ids: np.ndarray         # (N,) what the encoder sees
    encoder_masked: np.ndarray      # (M,) positions in the row that the encoder must guess: about 20 %
    decoder_ids: np.ndarray         # (N,) what the decoder sees
    decoder_masked: np.ndarray      # (M',) positions that the decoder must guess: about 40 %, encoder_masked among them

def whole_word_mask(begins, special, text_ids, rates, rng):
    """ begins (N,) bool: a word begins at this token; special (N,) bool: [CLS] or [SEP]; text_ids (N,): 0 0 ... 1 1 ...
    -> one (N,) bool mask for each rate; a smaller rate's mask lies inside a larger rate's.
    The words of each text are shuffled once. A rate masks words from the front of that order, up to its budget of
    round(rate * tokens but [CLS] and [SEP]); a word is masked if its middle lies within the budget. For one text
      tokens   [CLS] the dra ##gon sleeps [SEP]     shuffled words: dragon (2 tokens), sleeps, the
      middles        3.5  1   1     2.5             rate 0.5, budget 2: masks "dragon", whose middle is 1
    All texts are masked at once. """
    word = np.cumsum(begins) - 1                                          # (N,) number of each token's word
    first = np.flatnonzero(begins)                                        # (words,) first token of each word
    length = np.diff(np.append(first, len(begins)))                       # (words,) tokens of each word
    text = text_ids[first]                                                # (words,) text of each word
    key = np.where(special[first], 2.0, rng.random(len(first)))           # special tokens sort behind all others
    order = np.lexsort((key, text))                                       # (words,) by text, shuffled within each text
    ends = np.cumsum(length[order])                                       # (words,) tokens up to here, in that order
    start = (ends - length[order])[np.searchsorted(text[order], text[order])]   # (words,) tokens of all earlier texts
    middle = np.empty(len(first))                                         # (words,) of each word, within its text
    middle[order] = ends - start - length[order] / 2
    tokens = np.bincount(text_ids, weights=~special).astype(int)          # (B,) without [CLS] and [SEP]
    return [(middle <= np.round(rate * tokens)[text])[word] for rate in rates]

def corrupt(ids, masked, mask_token_id, vocab_size, rng):
    """ BERT's 80/10/10: of the masked positions 80 % show [MASK], 10 % a random token, 10 % the true one -> (N,) """
    ids, at = ids.copy(), np.flatnonzero(masked)
    dice = rng.random(len(at))
    ids[at[dice < 0.8]] = mask_token_id
    at = at[dice >= 0.9]
    ids[at] = rng.integers(vocab_size, size=len(at))
    return ids

def smae_batch(documents, max_length, rates, tokenizer, seed):
    """ B documents as tokenize_documents gives them -> Masked. Each document gives one random window of at most
    max_length tokens, [CLS] and [SEP] included. rates: shares that are hidden from (encoder, decoder). seed: a list
    of integers that decides windows and masks. """
    rng = np.random.default_rng(seed)
    starts = [rng.integers(max(1, len(document) - (max_length - 2) + 1)) for document in documents]
    windows = sorted((document[start:start + max_length - 2] for document, start in zip(documents, starts)), key=len)
    texts, begins = [], []
    for ids, begin in map(split_tokens, windows):
        texts.append(np.concatenate([[tokenizer.cls_token_id], ids, [tokenizer.sep_token_id]]))
        begins.append(np.concatenate([[True, True], begin[1:], [True]]))   # a window may begin inside a word
    ids = np.concatenate(texts)                                                                  # (N,)
    text_ids = np.repeat(np.arange(len(texts)), [len(text) for text in texts])                   # (N,)
    border = np.diff(text_ids, prepend=-1, append=len(texts)) > 0          # (N + 1,): a text ends or begins in front
    special = border[:-1] | border[1:]                                     # (N,): so the token is [CLS] or [SEP]
    encoder, decoder = whole_word_mask(np.concatenate(begins), special, text_ids, rates, rng)    # (N,) each
    encoder_ids, decoder_ids = (corrupt(ids, masked, tokenizer.mask_token_id, len(tokenizer), rng)
                                for masked in (encoder, decoder))
    return Masked(texts, encoder_ids, np.flatnonzero(encoder), decoder_ids, np.flatnonzero(decoder))

# ---- tokenising ------------------------------------------------------------------------------------------------------
def train_wordpiece(texts, vocab_size):
    """ a lower-casing WordPiece tokenizer like BERT's, trained on an iterable of texts -> transformers tokenizer """
    from transformers import BertTokenizer   # imported where it is used, because that takes a second or two
    # The trainer numbers new letters in the order of a hash table and breaks ties by number. Give it the letters in a
    # fixed order and sort its pieces afterwards, so that the same texts always give the same vocabulary.
    letters = [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    blank, special = BertTokenizer(), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained = blank.train_new_from_iterator(texts, vocab_size, new_special_tokens=letters, show_progress=False)
    pieces = special + sorted(set(trained.get_vocab()) - set(special))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})

def load_tokenizer(folder):
    """ the tokenizer of a Hugging Face folder -> transformers tokenizer """
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)

def tokenize(texts, tokenizer, max_length, desc="tokenising"):
    """ list of B texts -> list of B (T,) integer arrays, [CLS] ... [SEP], T <= max_length """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32   # 12 M MS MARCO passages: 2 GB instead of 4
    ids = []
    for i in tqdm(range(0, len(texts), 4096), desc=desc, unit=" x 4096 texts", disable=len(texts) <= 4096):
        chunk = tokenizer(texts[i:i + 4096], truncation=True, max_length=max_length, return_attention_mask=False,
                          return_token_type_ids=False)["input_ids"]
        ids += [np.array(text, dtype=dtype) for text in chunk]
    return ids

def tokenize_pairs(rows, tokenizer, query_max_length, passage_max_length):
    """ rows of load_pairs -> Pairs; rows without a positive are left out. Only one chunk of strings is in memory. """
    pairs, stream, bar = Pairs([], [], [], []), iter(rows), tqdm(total=len(rows), desc="tokenising pairs", unit=" rows")
    while chunk := list(itertools.islice(stream, 4096)):
        bar.update(len(chunk))
        chunk = [row for row in chunk if row[1]]
        texts = [text for _, positives, negatives, _ in chunk for text in positives + negatives]
        queries = tokenize([query for query, *_ in chunk], tokenizer, query_max_length)
        passages = iter(tokenize(texts, tokenizer, passage_max_length))
        for query, (_, positives, negatives, gold) in zip(queries, chunk):
            pairs.queries.append(query)
            if gold is not None:
                pairs.gold.append(gold)
            pairs.positives.append([next(passages) for _ in positives])
            pairs.negatives.append([next(passages) for _ in negatives])
    bar.close()
    if not pairs.queries:
        raise ValueError("--train_pairs: not a single row has a positive; fill that column")
    return pairs

def tokenize_documents(texts, tokenizer):
    """ iterable of strings -> yields (T,) unsigned integers without [CLS] and [SEP], T > 0. The top bit of each says
    whether a word begins there, the other bits are the token's id: in 16 bits, 5 is stored as 32773 at the beginning of
    a word and as 5 inside one. Vocabularies above 2**15 (BERT's has 30,522) take 32 bits. """
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**15 else np.uint32)
    begins = np.array([not piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    stored = np.arange(len(tokenizer), dtype=dtype) | (begins.astype(dtype) << dtype.type(8 * dtype.itemsize - 1))
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, 1024)):
        for ids in tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                             verbose=False)["input_ids"]:
            if ids:
                yield stored[ids]

def split_tokens(tokens):
    """ (T,) as tokenize_documents stores them -> (T,) ids, (T,) bool: does a word begin here? """
    top = tokens.dtype.type(1 << 8 * tokens.dtype.itemsize - 1)
    return (tokens & ~top).astype(np.int64), tokens & top > 0

class TokenFile:
    """ tokenised documents in one memory-mapped file: it may be larger than memory """
    def __init__(self, folder):
        self.ends = np.load(folder / "ends.npy")   # (documents,)
        size = (folder / "tokens.bin").stat().st_size // int(self.ends[-1])   # bytes a token
        self.tokens = np.memmap(folder / "tokens.bin", np.dtype(f"uint{8 * size}"), mode="r")
    def __len__(self):
        return len(self.ends)
    def __getitem__(self, i):
        return np.asarray(self.tokens[self.ends[i - 1] if i else 0:self.ends[i]])

def token_file(source, tokenizer):
    """ --train_text -> TokenFile. Tokenises once; found again by source, date of the file and vocabulary. """
    about = [source, sorted(tokenizer.get_vocab().items())]
    if source == "docs":
        about.append(docs_folder().name)
    elif Path(source).is_file():
        about += [os.path.abspath(source), os.stat(source).st_size, os.stat(source).st_mtime_ns]
    folder = CACHE / f"text-{zlib.crc32(json.dumps(about).encode()):08x}"
    if not folder.exists():
        with whole(folder) as part:
            part.mkdir()
            ends, documents = [0], tokenize_documents(load_texts(source), tokenizer)
            with open(part / "tokens.bin", "wb") as file:
                for tokens in tqdm(documents, desc="tokenising", unit=" documents"):
                    tokens.tofile(file)
                    ends.append(ends[-1] + len(tokens))
            if len(ends) < 3:
                raise ValueError(f"--train_text {source} holds {len(ends) - 1} documents with text; give two or more")
            np.save(part / "ends.npy", np.array(ends[1:]))
    return TokenFile(folder)

@contextlib.contextmanager
def whole(path):
    """ with whole(path) as part: write a file or a folder at `part`, which is renamed to `path` at the end. So `path`
    is never half written. If two runs make the same folder at once, both use that of the first to finish. """
    def remove(left):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{path.name}.*.part"):   # of killed runs: nobody has written to it for a day
        if time.time() - max(file.stat().st_mtime for file in [leftover, *leftover.rglob("*")]) > 86_400:
            remove(leftover)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        try:
            os.replace(part, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        remove(part)

# ==== Below is reading files, not the method ==========================================================================
# ---- sources: local files and the Hugging Face hub -------------------------------------------------------------------
# What columns are called. In training data any one of the names will do, also with _1, _2, ... behind it.
COLUMNS = {"query": ["query", "anchor", "sentence1"], "positives": ["positive", "positive_passages", "sentence2"],
           "negatives": ["negative", "negatives", "negative_passages"], "text": ["text"]}
STS_COLUMNS = ["sentence1", "sentence2", "score"]   # the two texts, then the gold score
QRELS_COLUMNS = ["query-id", "corpus-id", "score"]  # a BEIR set has these, and _id, text, maybe title for its texts
LOCAL = re.compile(r"\.(txt|jsonl|csv|tsv)(\.gz)?$")

def read_rows(path):
    """ .jsonl, .csv or .tsv with a header, or .txt, each gzipped or not -> yields (line number, dict), {"text": line}
    for .txt; blank lines are passed over. Raises ValueError that names the file and the line. """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in ("csv", "tsv"):
            reader = csv.DictReader(file, delimiter="\t" if kind == "tsv" else ",")
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line) if kind == "jsonl" else {"text": line}
                    assert isinstance(row, dict)
                except (json.JSONDecodeError, AssertionError):
                    raise ValueError(f"{path}, line {number}: not a JSON object: {line.strip()[:60]!r}") from None
                yield number, row

def load_table(source, what, streaming=False):
    """ A .parquet file, or NAME[:CONFIG][:SPLIT] of the hub or of a local folder with the same layout (by default the
    split "train") -> rows with named columns. Raises ValueError with the message "`what`, nor a data set that ...". """
    import datasets   # imported here, because that takes 0.7 s and local files do without
    try:
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train", streaming=streaming)
        name, config, split = (source.split(":") + ["", ""])[:3]
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except Exception as error:   # datasets has a dozen errors for "not there", being offline among them
        raise ValueError(f"{what}, nor a data set that could be loaded as NAME[:CONFIG][:SPLIT], {source} "
                         f"({str(error).splitlines()[0]})") from error

def find_columns(row, kind):
    """ the columns of a row {column: value} that hold the texts of this kind, a key of COLUMNS """
    return [column for column in row if re.sub(r"_\d+$", "", column) in COLUMNS[kind]]

def load_pairs(source):
    """ One of --train_pairs -> an iterable with a len, of (query, [positive, ...], [negative, ...], gold). Negatives may
    be empty; gold is a number where the columns are sentence1, sentence2 and score, else None.
    source: "docs", a .jsonl/.csv/.tsv/.parquet file (.gz or not, but for parquet), or a name for load_table such as
    sentence-transformers/all-nli:triplet or Tevatron/msmarco-passage. Raises ValueError on a source it cannot read. """
    path = str(docs_folder() / "train.jsonl") if source == "docs" else source
    rows = ([row for _, row in read_rows(path)] if LOCAL.search(path) else
            load_table(source, f"--train_pairs {source}: neither a .jsonl/.csv/.tsv/.parquet file"))
    if not len(rows):
        raise ValueError(f"--train_pairs {source} holds no pairs; give a file with at least one row")
    names = {kind: find_columns(rows[0], kind) for kind in ("query", "positives", "negatives")}
    if not names["query"] or not names["positives"]:
        query, positives, negatives = (" or ".join(COLUMNS[kind]) for kind in names)
        raise ValueError(f"--train_pairs {source} has the columns {', '.join(rows[0])}; it needs {query}, and "
                         f"{positives}, and may have {negatives}; rename yours, or add them to COLUMNS in data.py")
    return Rows(rows, names, scored=set(STS_COLUMNS) <= set(rows[0]))

class Rows:
    """ the pairs of any source, read one row at a time, because MS MARCO does not fit a list of strings """
    def __init__(self, rows, names, scored):
        self.rows, self.names, self.scored = rows, names, scored
    def __len__(self):
        return len(self.rows)
    def __iter__(self):
        for row in self.rows:
            query = row[self.names["query"][0]]
            positives, negatives = ([text for name in self.names[kind] for text in as_texts(row.get(name))]
                                    for kind in ("positives", "negatives"))
            yield query, positives, negatives, float(row["score"]) if self.scored else None

def as_texts(value):
    """ A cell -> list of texts: None, "text", ["text", ...] or Tevatron's [{"title": ..., "text": ...}, ...]. """
    if not value:
        return []
    if isinstance(value, dict):
        return [f"{value.get('title') or ''} {value['text']}".strip()]
    return [value] if isinstance(value, str) else [text for item in value for text in as_texts(item)]

def load_texts(source, streaming=False, rank=0, world_size=1):
    """ --train_text -> iterable of documents (strings): "docs" (its training part), a .txt file (a line is a document),
    a file with a column "text", or a name for load_table such as HuggingFaceFW/fineweb:sample-100BT. streaming reads
    parquet and hub sets as they arrive; each of world_size ranks takes files of its own. Raises ValueError. """
    if source == "docs":
        return (f"{row['query']} {row['positive']}" for _, row in read_rows(docs_folder() / "train.jsonl"))
    if LOCAL.search(source):
        if streaming:
            raise ValueError(f"--streaming with {source}: is for .parquet files and hub sets; leave it out, the file "
                             "is tokenised once, line by line, whatever its size")
        return text_column(row for _, row in read_rows(source))
    rows = load_table(source, f"--train_text {source}: neither a .txt/.jsonl/.csv/.tsv/.parquet file", streaming)
    if streaming:
        from datasets.distributed import split_dataset_by_node
        rows = split_dataset_by_node(rows, rank, world_size)
    return text_column(rows)

def text_column(rows):
    """ yields the texts of dicts, one a dict; raises ValueError where there is none or it is no string """
    for row in rows:
        text = [row[column] for column in find_columns(row, "text")]
        if not text or not isinstance(text[0], str):
            raise ValueError(f"--train_text: a row with the columns {', '.join(row)}; it needs text, a string")
        yield text[0]

# ---- sources of test sets: sentence pairs with gold scores, and retrieval collections --------------------------------
STS = {f"sts{year}": f"mteb/sts{year}-sts" for year in range(12, 17)}
STS |= {"stsb": "sentence-transformers/stsb", "sickr": "mteb/sickr-sts"}
SHARD = 25_000   # documents in memory at a time

def task_name(name):
    """ "folder/scifact:dev" -> "scifact:dev"; "folder/sts12.jsonl.gz" -> "sts12" """
    return LOCAL.sub("", Path(name).name)

def load_sts(name):
    """ A name in STS (its test split, from the hub) or a file {sentence1, sentence2, score} -> task, first sentences,
    second sentences, (pairs,) gold scores. Raises ValueError naming file and line for what is missing or no number. """
    if LOCAL.search(name):
        rows = read_rows(name)
    else:
        what = f"--sts {name}: neither one of {', '.join(STS)}, nor a .jsonl, .csv or .tsv file (.gz or not)"
        rows = enumerate(load_table(f"{STS.get(name, name)}::test", what), start=1)
    pairs = []
    for line, row in rows:
        if set(STS_COLUMNS) - set(row):
            raise ValueError(f"{name}, line {line}: has the columns {', '.join(row)}; needs {', '.join(STS_COLUMNS)}")
        first, second, gold = (row[column] for column in STS_COLUMNS)
        try:
            pairs.append((first, second, float(gold)))
            assert np.isfinite(pairs[-1][2])
        except (TypeError, ValueError, AssertionError):
            raise ValueError(f"{name}, line {line}: the score {gold!r} is not a finite number") from None
    if len(pairs) < 2:
        raise ValueError(f"{name}: {len(pairs)} pairs; a correlation needs two or more")
    first, second, gold = zip(*pairs)
    if len(set(gold)) < 2:
        raise ValueError(f"{name}: every score is {gold[0]}; a correlation needs two different ones")
    return task_name(name), first, second, np.array(gold)

class Collection:
    """ NAME[:SPLIT], split "test" by default. NAME: docs; a folder in BEIR layout; a BEIR set of the hub (scifact,
    msmarco with the splits validation = dev and test = DL19, ...). For DL20 put its qrels file into a folder's qrels/.
    task; queries {id: text} and qrels {query id: {document id: grade}} of the judged queries; shards() reads the
    corpus. Raises ValueError naming file and line for what is missing, broken, unknown or there twice. """
    def __init__(self, name):
        self.task = task_name(name)
        self.name, _, split = name.partition(":")
        self.folder = docs_folder() if self.name == "docs" else Path(self.name)
        self.qrels_file, judgements = self.open(f"qrels/{split or 'test'}.tsv", f"{self.name}-qrels::{split or 'test'}")
        texts = {key: row["text"] for key, row in self.texts("queries")}
        self.qrels, self.lines = {}, {}   # lines {document id: the first line that judges it}, for shards()
        for line, row in judgements:
            where = f"{self.qrels_file}, line {line}"
            try:
                query, document, grade = (row[column] for column in QRELS_COLUMNS)
                query, document, grade = str(query), str(document), int(grade)
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

    def open(self, file, hub_name):
        """ -> name of the source, (line number, row) of a file in the folder or of its counterpart on the hub """
        if not self.folder.is_dir():
            source = f"BeIR/{hub_name}"
            rows = load_table(source, f"--retrieval {self.name}: neither docs, nor a folder in BEIR layout")
            return source, enumerate(rows, start=2)
        path = self.folder / file
        if not path.exists() and Path(f"{path}.gz").exists():
            path = Path(f"{path}.gz")
        if not path.exists():
            raise ValueError(f"{self.folder} has no {file}; it needs corpus.jsonl, queries.jsonl and qrels/test.tsv")
        return path, read_rows(path)

    def texts(self, stem):
        """ yields (id, row) of the "corpus" or the "queries" """
        source, rows = self.open(f"{stem}.jsonl", f"{self.name}:{stem}:{stem}")
        seen = set()
        for line, row in rows:
            if not {"_id", "text"} <= set(row):
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
        rows = self.texts("corpus")
        while shard := list(itertools.islice(rows, SHARD)):
            ids = [key for key, _ in shard]
            for key in ids:
                missing.pop(key, None)
            yield ids, [f"{row.get('title') or ''} {row['text']}".strip() for _, row in shard]
        for document, line in missing.items():
            raise ValueError(f"{self.qrels_file}, line {line}: document {document!r} is not in the corpus")

# ---- docs: the documentation of this machine's Python packages, as training pairs and as a test collection -----------
DOCS_PACKAGES = "numpy scipy torch transformers datasets pandas sympy networkx huggingface_hub".split()

def docs_folder():
    """ Path of the docs corpus for the installed package versions; builds it when it is not there yet """
    versions = " ".join([sys.version.split()[0]] + [f"{p} {importlib.metadata.version(p)}" for p in DOCS_PACKAGES])
    folder = CACHE / f"docs-{zlib.crc32(versions.encode()):08x}"
    return folder if folder.exists() else build_docs(folder)

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
    """ Docstrings of the standard library and of DOCS_PACKAGES (query = first paragraph, passage = the rest) -> folder,
    in the layout of a BEIR set: train.jsonl {query, positive} to train on; corpus.jsonl, queries.jsonl, qrels/test.tsv
    (1,000 queries) and qrels/dev.tsv (500). A fifth of the source files is held out whole for corpus and queries; a
    text that occurs in both parts stays in the held-out part only. Deterministic for given package versions. """
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(package).origin).parent for package in DOCS_PACKAGES]
    # Installed packages lie below the standard library but are not part of it; tests hold much code and little prose.
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
    with whole(folder) as part:
        (part / "qrels").mkdir(parents=True)
        def write(file, rows):
            (part / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        write("train.jsonl", [{"name": name, "query": query, "positive": passage} for name, query, passage in train])
        write("corpus.jsonl", [{"_id": str(i), "title": "", "text": passage, "name": name, "query": query}
                               for i, (name, query, passage) in enumerate(corpus)])
        write("queries.jsonl", [{"_id": f"q{i}", "text": corpus[i][1]} for i in test + dev])
        for split, rows in (("test", test), ("dev", dev)):
            lines = ["query-id\tcorpus-id\tscore\n"] + [f"q{i}\t{i}\t1\n" for i in rows]
            (part / "qrels" / f"{split}.tsv").write_text("".join(lines))
    return folder
