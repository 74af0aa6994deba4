"""
Texts in, batches of token ids out.

A batch is a pure function of (data, seed, step), so resuming a run needs no state of a data loader (a stream is read
again up to that step):
  srl_batch    queries with their positives and hard negatives, for finetune_srl.py
  smae_batch   running text masked twice, for pretrain_smae.py
Below the batches: tokenising, which happens once; the sources of pairs, text and test sets (local files and the Hugging
Face hub); and `docs`, the corpus that needs no download, because it is the documentation of the installed packages.

Letters for shapes: see model.py.
"""
import ast, contextlib, csv, functools, glob, gzip, itertools, json, math, os, re, shutil, string, sys, sysconfig, time
import importlib.metadata, importlib.util, warnings, zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

# ---- batches of pairs, for SRL ---------------------------------------------------------------------------------------
class Pairs(NamedTuple):
    """ tokenised training pairs, row by row """
    queries: list     # of (T,) arrays of ids, one per row
    positives: list   # of lists of such arrays: the positives of each row, one or more
    negatives: list   # of lists of such arrays: its hard negatives, maybe none
    gold: list        # of numbers: how similar the two texts of a row are; empty for pairs without a score

class Batch(NamedTuple):
    """ Q queries and P >= Q passages. Passage i < Q is the positive of query i; the hard negatives follow. """
    queries: list      # Q (T,) ids
    passages: list     # P (T,) ids
    same: np.ndarray   # (Q, P) bool, see duplicates, or None
    gold: np.ndarray   # (Q,) gold scores, or None

# The last number of a seed, so that windows, sources and sizes (step_sizes) are drawn independently of each other. 0 is
# not among them, because default_rng([seed, step, 0]) draws as default_rng([seed, step]) does.
TEXT_SEED, SOURCE_SEED, SIZE_SEED = 1, 2, 3

@functools.lru_cache(maxsize=64)   # every step asks for it; sources take turns
def epoch_order(rows, seed, epoch):
    """ (rows,) the order of the rows in one epoch """
    return np.random.default_rng([seed, epoch]).permutation(rows)

def window(text, length, rng):
    """ (T,) ids -> at most `length` ids, [CLS] and [SEP] kept. A longer text gives with probability 1/2 its beginning,
    else a random window. """
    if len(text) <= length:
        return text
    last = len(text) - length + 1   # a window that starts here ends right before [SEP]
    start = 1 if rng.random() < 0.5 else rng.integers(1, last + 1)
    return np.concatenate([text[:1], text[start:start + length - 2], text[-1:]])

def duplicates(queries, passages):
    """ Q queries, P passages, (T,) ids -> (Q, P) bool. True: passage j also answers query i, so it must not count as a
    negative. It does if its text is the positive of query i in this batch, or of a query with the same text. The pair
    (i, i), the positive itself, is False. None if nothing is True. """
    def numbered(texts):
        seen = {}
        return np.array([seen.setdefault(text.tobytes(), len(seen)) for text in texts])   # the same for the same text
    query, passage = numbered(queries), numbered(passages)    # (Q,), (P,)
    # Queries A B A with positives x y z have the numbers 0 1 0 and 0 1 2, and A has the answers x and z. So same is
    # True at (0, 2) and (2, 0): z is no negative of the first query, nor x of the third.
    answers = np.zeros((len(queries), len(passages)), bool)   # [number of a query, number of a passage]
    answers[query, passage[:len(query)]] = True
    same = answers[query][:, passage]                         # (Q, P)
    np.fill_diagonal(same, False)                             # the positive itself
    return same if same.any() else None

def batch_rows(sources, batch_size, seed, step):
    """ list of Pairs -> the Pairs that batch number `step` is drawn from, and the numbers of its rows """
    batches_per_source = [len(pairs.queries) // batch_size for pairs in sources]
    epoch, batch = divmod(step, sum(batches_per_source))
    # Sources of 3 and 2 batches may take turns 0 1 0 0 1. Then batch 2 is of source 0, which has had one batch: i = 1.
    turns = np.repeat(np.arange(len(sources)), batches_per_source)
    turns = np.random.default_rng([seed, epoch, SOURCE_SEED]).permutation(turns)
    pairs = sources[turns[batch]]
    i = (turns[:batch] == turns[batch]).sum()       # batches that this source has had in this epoch
    return pairs, epoch_order(len(pairs.queries), seed, epoch)[i * batch_size:(i + 1) * batch_size]

def srl_batch(sources, batch_size, max_negatives, passage_max_length, seed, step):
    """ list of Pairs -> Batch number `step`. A row has at most max_negatives hard negatives, which count as negatives
    of all queries. Longer passages than passage_max_length are cut to a window. All rows of a batch are of one source:
    passages of another source would be negatives that are too easy. An epoch visits every row of every source at most
    once; an incomplete last batch is dropped. """
    pairs, rows = batch_rows(sources, batch_size, seed, step)
    rng = np.random.default_rng([seed, step, TEXT_SEED])
    positives = [pairs.positives[row][rng.integers(len(pairs.positives[row]))] for row in rows]
    hard = [pairs.negatives[row][k] for row in rows
            for k in rng.permutation(len(pairs.negatives[row]))[:max_negatives]]
    queries = [pairs.queries[row] for row in rows]
    gold = np.array([pairs.gold[row] for row in rows], np.float32) if pairs.gold else None
    # Compares whole texts, because windows of copies may differ. Of scored pairs sentence2 may be no positive.
    same = None if pairs.gold else duplicates(queries, positives + hard)
    return Batch(queries, [window(text, passage_max_length, rng) for text in positives + hard], same, gold)

# ---- batches of masked text, for SMAE --------------------------------------------------------------------------------
class Masked(NamedTuple):
    """ B texts masked twice, sorted by length as in model.pack. Positions are indices into the row of N tokens. The row
    has no fillers yet: with_ids in pretrain_smae.py adds them. """
    texts: list                     # B (T,) the true ids, [CLS] ... [SEP]
    encoder_ids: np.ndarray         # (N,) what the encoder sees
    encoder_positions: np.ndarray   # (M,) positions in the row that the encoder must guess: about 20 %
    decoder_ids: np.ndarray         # (N,) what the decoder sees
    decoder_positions: np.ndarray   # (M',) those that the decoder must guess: about 40 %, the encoder's among them

@functools.lru_cache(maxsize=4)
def word_begins(tokenizer):
    """ (V,) bool: does this entry of the vocabulary begin a word? WordPiece marks those that do not by ## """
    return np.array([not piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])

def whole_word_mask(begins, rates, rng):
    """ begins (T,) bool: a word begins at this token of one text; [CLS] and [SEP] are a word each -> a (T,) bool mask
    for each rate; a smaller rate's mask lies inside a larger rate's.
    The words are shuffled, [CLS] and [SEP] behind all others, where no rate reaches them. A rate masks words from the
    front, up to a budget of round(rate * tokens without [CLS] and [SEP]). The word in which the budget ends is masked
    if its middle lies within the budget, so long words are masked as often as short ones. For example, at rate 0.5
    with a budget of 2:
      tokens           [CLS] the dra ##gon sleeps [SEP]
      words, shuffled  dragon  sleeps  the  [CLS]  [SEP]
      their lengths    2       1       1    1      1
      their middles    1       2.5     3.5  4.5    5.5
      masked           dra ##gon, the only word with a middle of 2 or less """
    word = np.cumsum(begins) - 1                                    # (T,) number of each token's word
    length = np.bincount(word)                                      # (words,) tokens of each word
    key = rng.random(len(length))                                   # (words,) words are sorted by it
    key[[0, -1]] = 2                                                # [CLS] and [SEP]
    order = key.argsort()
    middle = np.empty(len(length))
    middle[order] = np.cumsum(length[order]) - length[order] / 2    # (words,) in the shuffled row of words
    return [(middle <= np.round(rate * (len(begins) - 2)))[word] for rate in rates]

def corrupt(ids, masked, mask_token_id, vocab_size, rng):
    """ ids (N,), masked (N,) bool -> (N,) ids. BERT's 80/10/10: of the masked positions 80 % show [MASK], 10 % a random
    token, 10 % the true one. """
    ids = ids.copy()
    at = np.flatnonzero(masked)
    dice = rng.random(len(at))
    ids[at[dice < 0.8]] = mask_token_id
    random_at = at[dice >= 0.9]
    ids[random_at] = rng.integers(vocab_size, size=len(random_at))
    return ids

def smae_batch(documents, max_length, rates, tokenizer, seed):
    """ B documents, (T,) ids without [CLS] and [SEP] -> Masked. Each gives one random window of at most max_length
    tokens, [CLS] and [SEP] included. rates: shares that are hidden from (encoder, decoder). seed: a list of integers
    that decides windows and masks. """
    rng = np.random.default_rng(seed)
    begins_word = word_begins(tokenizer)                                                 # (V,)
    room = max_length - 2                                               # [CLS] and [SEP] take two
    starts = [rng.integers(max(1, len(document) - room + 1)) for document in documents]
    windows = [document[start:start + room] for document, start in zip(documents, starts)]
    texts = [np.concatenate([[tokenizer.cls_token_id], ids, [tokenizer.sep_token_id]])   # (T,)
             for ids in sorted(windows, key=len)]                       # the order of model.pack
    masks = []                                                          # (encoder's, decoder's), (T,) each, of a text
    for text in texts:
        begins = begins_word[text]                                      # (T,), a copy
        begins[1] = True                                                # a window may begin inside a word
        masks.append(whole_word_mask(begins, rates, rng))
    row = np.concatenate(texts)                                                          # (N,) true ids
    encoder_mask = np.concatenate([encoder for encoder, _ in masks])                     # (N,)
    decoder_mask = np.concatenate([decoder for _, decoder in masks])                     # (N,)
    encoder_ids = corrupt(row, encoder_mask, tokenizer.mask_token_id, len(tokenizer), rng)
    decoder_ids = corrupt(row, decoder_mask, tokenizer.mask_token_id, len(tokenizer), rng)   # draws of its own
    return Masked(texts, encoder_ids, np.flatnonzero(encoder_mask), decoder_ids, np.flatnonzero(decoder_mask))

# ==== Below is tokenising and reading files, not the method ===========================================================
# pairs: load_pairs -> Rows of (query, [positive, ...], [negative, ...], score or None) -> tokenize_pairs -> Pairs
# text:  load_texts -> strings -> token_file -> TokenFile
# test sets: load_sts -> sentences and scores; Collection -> queries, qrels, shards of the corpus; hold_out makes one
# files: read_rows -> rows, whose cells as_text, as_texts, as_score check; docs: docs_folder -> build_docs -> docstrings

# one progress bar for all ranks, and none where stderr is no terminal
progress = functools.partial(tqdm, disable=int(os.environ.get("RANK", 0)) > 0 or None)
CACHE = Path(__file__).parent / "out"   # the docs corpus and tokenised text; git-ignored, made again when missing

# ---- tokenising ------------------------------------------------------------------------------------------------------
def train_wordpiece(texts, vocab_size):
    """ a lower-casing WordPiece tokenizer like BERT's, trained on an iterable of texts -> transformers tokenizer """
    from transformers import BertTokenizer   # imported where it is used, because that takes a second or two
    # The trainer numbers new letters in the order of a hash table and breaks ties by number. Give it the letters in a
    # fixed order and sort its pieces afterwards, so that the same texts always give the same vocabulary.
    letters = [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    blank = BertTokenizer()
    trained = blank.train_new_from_iterator(texts, vocab_size, new_special_tokens=letters, show_progress=False)
    pieces = special + sorted(set(trained.get_vocab()) - set(special))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})

def tokenize(texts, tokenizer, max_length):
    """ list of B texts -> list of B (T,) unsigned integers, [CLS] ... [SEP], T <= max_length """
    return [ids for chunk in chunks(texts, 4096)
            for ids in to_ids(chunk, tokenizer, truncation=True, max_length=max_length)]

def tokenize_documents(texts, tokenizer):
    """ iterable of strings -> yields (T,) unsigned integers without [CLS] and [SEP], T > 0 """
    for chunk in chunks(texts, 1024):
        yield from filter(len, to_ids(chunk, tokenizer, add_special_tokens=False, verbose=False))

def to_ids(texts, tokenizer, **flags):
    """ list of strings -> list of (T,) unsigned integers """
    ids = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **flags)["input_ids"]
    dtype = token_dtype(tokenizer)
    return [np.array(text, dtype) for text in ids]

def token_dtype(tokenizer):
    """ the smallest unsigned integers that hold an id; 12 M passages of MS MARCO take 2 GB with 16 bits """
    return np.uint16 if len(tokenizer) <= 2**16 else np.uint32

def chunks(items, size):
    """ yields the items as lists of `size`, the last maybe shorter """
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk

def tokenize_pairs(rows, tokenizer, query_max_length, passage_max_length):
    """ rows of load_pairs -> Pairs; rows without a query or a positive are left out, and their number is printed. Only
    one chunk of strings is in memory. """
    pairs = Pairs([], [], [], [])
    for chunk in chunks(progress(rows, desc="tokenising pairs", unit=" rows"), 4096):
        chunk = [row for row in chunk if row[0].strip() and row[1]]
        texts = [text for _, positives, negatives, _ in chunk for text in positives + negatives]
        queries = tokenize([query for query, *_ in chunk], tokenizer, query_max_length)
        passages = iter(tokenize(texts, tokenizer, passage_max_length))
        for query, (_, positives, negatives, gold) in zip(queries, chunk):
            pairs.queries.append(query)
            pairs.positives.append([next(passages) for _ in positives])
            pairs.negatives.append([next(passages) for _ in negatives])
            if gold is not None:
                pairs.gold.append(gold)
    if not pairs.queries:
        raise ValueError("--train_pairs: not a single row has a query and a positive; fill these columns")
    if left_out := len(rows) - len(pairs.queries):
        print(f"{left_out:,} of {len(rows):,} pairs are left out, because they have no query or no positive")
    return pairs

def checksum(pairs):
    """ Pairs -> a number that changes when a token, a score or the order of the rows does """
    found = 0
    for query, positives, negatives in zip(pairs.queries, pairs.positives, pairs.negatives):
        for text in (query, *positives, *negatives):
            found = zlib.crc32(text.tobytes(), found)
    return zlib.crc32(repr(pairs.gold).encode(), found)

def token_file(source, tokenizer, columns=()):
    """ --train_text -> TokenFile. Tokenises once; found again by source, columns, tokenizer, and the path, size and
    date of each of its local files. A set of the hub is found by its name: it is taken to stay as it is. """
    path = docs_folder() if source == "docs" else Path(source.split(":")[0])   # FOLDER:CONFIG:SPLIT
    files = [file for file in sorted({path, *path.rglob("*"), *map(Path, glob.glob(source))}) if file.is_file()]
    decides_ids = [source, *columns, about_tokenizer(tokenizer),
                   [(os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]]
    folder = CACHE / f"tokens-{zlib.crc32(json.dumps(decides_ids).encode()):08x}"
    if not folder.exists():
        with atomic_write(folder) as part:
            part.mkdir()
            lengths, documents = [], tokenize_documents(load_texts(source, columns=columns), tokenizer)
            with open(part / "tokens.bin", "wb") as file:
                for tokens in progress(documents, desc="tokenising", unit=" documents"):
                    tokens.tofile(file)
                    lengths.append(len(tokens))
            if len(lengths) < 2:
                raise ValueError(f"--train_text {source} holds {len(lengths)} documents with text; give two or more")
            np.save(part / "ends.npy", np.cumsum(lengths))
    return TokenFile(folder, token_dtype(tokenizer))

def about_tokenizer(tokenizer):
    """ what decides the ids of a text: the vocabulary, and what is done to a text before, lower-casing for example """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)   # None if not of Rust
    return [sorted(tokenizer.get_vocab().items()), str(normalizer)]

class TokenFile:
    """ tokenised documents in one memory-mapped file: it may be larger than memory """
    def __init__(self, folder, dtype):
        self.name = folder.name   # says which source, of what date, and which vocabulary
        try:
            self.ends = np.load(folder / "ends.npy")   # (documents,)
            self.tokens = np.memmap(folder / "tokens.bin", dtype, mode="r")
            assert len(self.tokens) == self.ends[-1]
        except (FileNotFoundError, EOFError, ValueError, AssertionError):
            raise ValueError(f"{folder}: no whole tokens.bin, ends.npy; delete the folder, to make it again") from None
    def __len__(self):
        return len(self.ends)
    def __getitem__(self, i):
        return np.asarray(self.tokens[self.ends[i - 1] if i else 0:self.ends[i]])

@contextlib.contextmanager
def atomic_write(path):
    """ with atomic_write(path) as part: write a file or a folder at `part`, which is renamed to `path` at the end. So
    `path` is never half written. If two runs make the same folder at once, both use that of the first to finish. """
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

# ---- sources: local files and the Hugging Face hub -------------------------------------------------------------------
# What columns are called in training data: any one of the names will do, also with _1, _2, ... behind it.
COLUMNS = {"query": ["query", "anchor", "sentence1"], "positive": ["positive", "positive_passages", "sentence2"],
           "negative": ["negative", "negatives", "negative_passages"], "text": ["text"],
           "sentence1": ["sentence1"], "sentence2": ["sentence2"], "score": ["score"]}
LOCAL = re.compile(r"\.(txt|jsonl|csv|tsv)(\.gz)?$")

class Rows:
    """ an iterable with a len that makes its rows anew each time, because MS MARCO does not fit a list of strings """
    def __init__(self, length, make):
        self.length, self.make = length, make
    def __len__(self):
        return self.length
    def __iter__(self):
        return self.make()

def load_pairs(source, columns=()):
    """ One of --train_pairs -> Rows of (query, [positive, ...], [negative, ...], gold). Negatives may be empty; gold is
    a number where the columns are sentence1, sentence2 and score, else None. columns: see find_columns.
    source: "docs", a .jsonl/.csv/.tsv/.parquet file, or a name for load_table: sentence-transformers/all-nli:triplet.
    Raises ValueError for a source that it cannot read; for a cell, when it comes to that row. """
    path = str(docs_folder() / "train.jsonl") if source == "docs" else source
    if LOCAL.search(path):
        rows, unit = list(read_rows(path)), "line"
        present = list(dict.fromkeys(column for _, row in rows for column in row))   # a row of a .jsonl may lack some
    else:
        table, unit = load_table(source, f"--train_pairs {source}: neither a .jsonl/.csv/.tsv/.parquet file"), "row"
        rows, present = Rows(len(table), lambda: enumerate(table, start=1)), table.column_names
    if not rows:
        raise ValueError(f"--train_pairs {source} holds no pairs; give a file with at least one row")
    found = find_columns(source, present, [kind for kind in COLUMNS if kind != "text"], columns)
    if not found["query"] or not found["positive"]:
        raise ValueError(f"--train_pairs {source} has the columns {', '.join(present)}; it needs query and positive, "
                         "maybe negative; say which of yours these are: --columns query=COLUMN positive=COLUMN")
    # A score beside query and positive may say anything. It counts if --columns names it or a sentence, or if it stands
    # beside columns called sentence1 and sentence2.
    score_is_meant = any(item.startswith(("sentence", "score=")) for item in columns)
    scored = found["score"] and (score_is_meant or found["sentence1"] and found["sentence2"])
    def texts(row, kind, where):
        return [text for column in found[kind] for text in as_texts(row.get(column), f"{where} {column}")]
    def make():
        for number, row in rows:
            where = f"{source}, {unit} {number}:"
            gold = as_score(row.get(found["score"][0]), f"{where} the score") if scored else None
            column = found["query"][0]
            query = as_text(row.get(column), f"{where} {column}")
            yield query, texts(row, "positive", where), texts(row, "negative", where), gold
    return Rows(len(rows), make)

def load_texts(source, streaming=False, rank=0, world_size=1, columns=()):
    """ --train_text -> yields documents (strings): those of "docs" (its training part), a line of a .txt file each, the
    column "text" of another file or of a name for load_table such as HuggingFaceFW/fineweb:sample-100BT.
    streaming reads tables as they arrive, each of world_size ranks files of its own. columns: see find_columns. """
    local = source == "docs" or LOCAL.search(source)
    if streaming and local:
        raise ValueError(f"--streaming with {source}: is for .parquet files and hub sets; leave it out")
    if source == "docs":
        rows = ((number, {"text": f"{row['query']} {row['positive']}"})
                for number, row in read_rows(docs_folder() / "train.jsonl"))
    elif local:
        rows = read_rows(source)
    else:
        table = load_table(source, f"--train_text {source}: neither a .txt/.jsonl/.csv/.tsv/.parquet file", streaming)
        if streaming:
            from datasets.distributed import split_dataset_by_node
            table = split_dataset_by_node(table, rank, world_size)
        rows = enumerate(table, start=1)
    for number, row in rows:
        where = f"{source}, {'line' if local else 'row'} {number}"
        found = find_columns(where, row, ["text"], columns)["text"]
        if not found:
            raise ValueError(f"{where}: has the columns {', '.join(row)}; it needs text, or --columns text=COLUMN")
        yield as_text(row[found[0]], f"{where}: {found[0]}")

def find_columns(where, present, kinds, columns):
    """ the columns of the source `where` -> {kind: those that hold it}. columns: the flag, as ["query=question"]; kinds
    that it does not name go by COLUMNS. sentence1=X counts as query=X and sentence2=X as positive=X, because scored
    pairs are pairs, too. Columns query, positive, negative_1, negative_2 give two negatives; text=body gives body for
    text. Raises ValueError for a kind or a column that is not there. """
    chosen = {kind: [] for kind in kinds}
    for item in columns:
        kind, _, name = item.partition("=")
        if kind not in kinds or name not in present:
            raise ValueError(f"--columns {item}: {where} has the columns {', '.join(present)}; give KIND=COLUMN, where "
                             f"KIND is {' or '.join(kinds)}")
        counts_as = {"sentence1": "query", "sentence2": "positive"}.get(kind, kind)
        chosen[counts_as].append(name)
        if any(len(chosen.get(one, [])) > 1 for one in ("query", "score", "text")):
            raise ValueError(f"--columns {item}: is the second {kind}, and a row has one; leave out one of them")
    return {kind: names or [column for column in present if re.sub(r"_\d+$", "", column) in COLUMNS[kind]]
            for kind, names in chosen.items()}

def load_table(source, error_start, streaming=False):
    """ A .parquet file, or NAME[:CONFIG][:SPLIT], by default the split "train", of the hub or of a folder with the
    same layout -> rows with named columns. Raises ValueError that begins with error_start: "--sts x: neither ...". """
    import datasets   # imported here, because that takes 0.7 s and local files do without
    try:
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train", streaming=streaming)
        name, config, split = (source.split(":") + ["", ""])[:3]
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except Exception as error:   # datasets has a dozen errors for "not there", being offline among them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{error_start}, nor a data set that could be loaded as NAME[:CONFIG][:SPLIT], {source} "
                         f"({reason})") from error

# ---- sources of test sets: sentence pairs with gold scores, and retrieval collections --------------------------------
STS = {f"sts{year}": f"mteb/sts{year}-sts" for year in range(12, 17)}
STS |= {"stsb": "sentence-transformers/stsb", "sickr": "mteb/sickr-sts"}
SHARD = 25_000   # documents in memory at a time

def task_name(name):
    """ "folder/scifact:dev" -> "scifact:dev"; "folder/sts12.jsonl.gz" -> "sts12" """
    return LOCAL.sub("", Path(name).name or Path(name).resolve().name)   # of "." too

def load_sts(name):
    """ A name in STS (its test split, from the hub) or a file {sentence1, sentence2, score} -> task, first sentences,
    second sentences, (pairs,) gold scores. Raises ValueError that names file and line. """
    if LOCAL.search(name):
        rows = read_rows(name)
    else:
        error_start = f"--sts {name}: neither one of {', '.join(STS)}, nor a .jsonl, .csv or .tsv file (.gz or not)"
        rows = enumerate(load_table(f"{STS.get(name, name)}::test", error_start), start=1)
    first, second, gold = [], [], []
    for line, row in rows:
        where = f"{name}, line {line}:"
        if not {"sentence1", "sentence2", "score"} <= set(row):
            raise ValueError(f"{where} has the columns {', '.join(row)}; it needs sentence1, sentence2 and score")
        first.append(as_text(row["sentence1"], f"{where} sentence1"))
        second.append(as_text(row["sentence2"], f"{where} sentence2"))
        gold.append(as_score(row["score"], f"{where} the score"))
    if len(gold) < 2:
        raise ValueError(f"{name}: {len(gold)} pairs; a correlation needs two or more")
    if len(set(gold)) < 2:
        raise ValueError(f"{name}: every score is {gold[0]}; a correlation needs two different ones")
    return task_name(name), first, second, np.array(gold)

class Collection:
    """ NAME[:SPLIT], split "test" by default. NAME: docs; a folder in BEIR layout; a BEIR set of the hub (scifact,
    msmarco, whose test is DL19, ...). For DL20 put its qrels file into a folder's qrels/. BEIR layout: corpus.jsonl
    {"_id", "text", maybe "title"}, queries.jsonl {"_id", "text"}, qrels/SPLIT.tsv with the header query-id, corpus-id,
    score; each maybe .gz.
    task; queries {id: text} and qrels {query id: {document id: grade}} of the judged queries; shards() reads the
    corpus. Raises ValueError naming file and line for what is missing, broken, unknown or there twice. """
    def __init__(self, name):
        self.task = task_name(name)
        self.name, _, split = name.partition(":")
        self.folder = docs_folder() if self.name == "docs" else Path(self.name)
        hub_split = "validation" if split == "dev" else split or "test"   # the hub calls it so
        self.qrels_file, judgements = self.open_table(f"qrels/{split or 'test'}.tsv", f"{self.name}-qrels::{hub_split}")
        texts = dict(self.texts("queries"))
        self.qrels, self.lines = {}, {}   # lines {document id: the first line that judges it}, for shards()
        for line, row in judgements:
            where = f"{self.qrels_file}, line {line}"
            try:
                query, document, grade = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
                assert grade.is_integer()
            except (KeyError, TypeError, ValueError, AssertionError):
                raise ValueError(f"{where}: needs the columns query-id, corpus-id and score (a whole number)") from None
            if query not in texts:
                raise ValueError(f"{where}: query {query!r} is not among the queries")
            if document in self.qrels.setdefault(query, {}):
                raise ValueError(f"{where}: query {query!r} and document {document!r} are judged twice")
            self.qrels[query][document] = int(grade)
            self.lines.setdefault(document, line)
        if not self.qrels:
            raise ValueError(f"{self.qrels_file}: no judgements; one line a judged document is needed")
        self.queries = {query: texts[query] for query in self.qrels}

    def open_table(self, file, hub_name):
        """ -> name of the source, (line number, row) of a file in the folder or of its counterpart on the hub.
        hub_name: NAME:CONFIG:SPLIT for load_table. BeIR's sets have a config and a split called corpus, and queries;
        their judgements are another set, NAME-qrels. """
        if not self.folder.is_dir():
            source = f"BeIR/{hub_name}"
            rows = load_table(source, f"--retrieval {self.name}: neither docs, nor a folder in BEIR layout")
            return source, enumerate(rows, start=2)
        for path in (self.folder / file, self.folder / f"{file}.gz"):
            if path.exists():
                return path, read_rows(path)
        raise ValueError(f"{self.folder} has no {file}; it needs corpus.jsonl, queries.jsonl and qrels/test.tsv; "
                         "finetune_srl.py also qrels/dev.tsv, or --eval_interval 0")

    def texts(self, stem):
        """ yields (id, text) of the "corpus", where the title is part of the text, or of the "queries" """
        source, rows = self.open_table(f"{stem}.jsonl", f"{self.name}:{stem}:{stem}")
        seen = set()
        for line, row in rows:
            where = f"{source}, line {line}:"
            if not {"_id", "text"} <= set(row):
                raise ValueError(f"{where} has the columns {', '.join(row)}; it needs _id and text")
            key = str(row["_id"]) if isinstance(row["_id"], int) else as_text(row["_id"], f"{where} _id")
            if key in seen:
                raise ValueError(f"{where} the id {key!r} is there twice")
            seen.add(key)
            yield key, "".join(as_texts(row, where)) if stem == "corpus" else as_text(row["text"], f"{where} text")
        if not seen:
            raise ValueError(f"{source} is empty; it needs one line a text")

    def shards(self):
        """ yields ([id], [title + text]) of SHARD documents at a time; raises at the end if a judged one is missing """
        missing = dict(self.lines)
        for shard in chunks(self.texts("corpus"), SHARD):
            ids, texts = map(list, zip(*shard))
            for key in ids:
                missing.pop(key, None)
            yield ids, texts
        if missing:
            document, line = next(iter(missing.items()))   # the first in the file
            raise ValueError(f"{self.qrels_file}, line {line}: document {document!r} is not in the corpus")

def fold(text):
    """ "Sort the -- LIST." -> "sort the list": texts that differ in case or punctuation alone become equal """
    return re.sub(r"\W+", " ", text).strip().lower()

def write_jsonl(path, rows):
    """ dicts -> a line each """
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

def write_beir(folder, corpus, queries, qrels):
    """ corpus, queries: {"_id", "text", ...} each; qrels {split: [(query id, document id), ...]} -> a Collection """
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    for split, judged in qrels.items():
        lines = ["query-id\tcorpus-id\tscore\n"] + [f"{query}\t{document}\t1\n" for query, document in judged]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(lines))

def hold_out(rows, n):
    """ rows as of load_pairs -> Rows to train on, the folder of a test set: n of the pairs, drawn at random; its corpus
    is their positives. A row is not trained on if its query or a positive of it is a query of the test set, whatever
    the case and punctuation. A passage of the test set may be: a new question may have a known answer. """
    # row numbers: usable have a query and a positive, drawn make the test set, kept are trained on
    usable = [i for i, (query, positives, *_) in enumerate(rows) if query.strip() and positives]
    drawn = set(np.random.default_rng(0).permutation(usable)[:n].tolist())
    pairs = [(query, text, gold) for i, (query, positives, _, gold) in enumerate(rows) if i in drawn
             for text in positives]
    if any(gold is not None for *_, gold in pairs):
        raise ValueError("--hold_out: is for queries and passages; for scored pairs give evaluate.py a file with --sts")
    queries, corpus = {fold(query): query for query, *_ in pairs}, {fold(text): text for _, text, _ in pairs}
    kept = {i for i, (query, positives, *_) in enumerate(rows)
            if not {fold(query), *map(fold, positives)} & queries.keys()}
    left = len(kept.intersection(usable))
    if min(n, left) < 2:
        raise ValueError(f"--hold_out {n}: leaves {left} of {len(usable)} pairs to train on; both sides need 2 or more")
    ids = {key: i for i, key in enumerate(queries | corpus)}
    folder = CACHE / f"held-out-{zlib.crc32(repr([queries, corpus]).encode()):08x}"
    with atomic_write(folder) as part:
        write_beir(part, [{"_id": f"d{ids[key]}", "text": text} for key, text in corpus.items()],
                   [{"_id": f"q{ids[key]}", "text": text} for key, text in queries.items()],
                   {"test": dict.fromkeys((f"q{ids[fold(query)]}", f"d{ids[fold(text)]}") for query, text, _ in pairs)})
    print(f"--hold_out: {len(drawn):,} pairs to test on, {left:,} of the others to train on")
    return Rows(len(kept), lambda: (row for i, row in enumerate(rows) if i in kept)), folder

def load_passages(source):
    """ --texts: "docs", or a file or folder of .txt, .md and .jsonl, maybe .gz -> [(name, text), ...]: the docstrings,
    the paragraphs, the rows with "text" and maybe "title". Raises ValueError where there is none. """
    if source == "docs":
        rows = [row for file in ("train.jsonl", "corpus.jsonl") for _, row in read_rows(docs_folder() / file)]
        return [(row["name"], f"{row['query']} {row.get('positive') or row.get('text')}") for row in rows]
    files = sorted(Path(source).rglob("*")) if Path(source).is_dir() else [Path(source)]
    passages = []
    for file in files:
        if re.search(r"\.jsonl(\.gz)?$", file.name):
            for line, row in read_rows(file):
                passages += [(f"{file}:{line}", text) for text in as_texts(row, f"{file}, line {line}:")]
        elif re.search(r"\.(txt|md)(\.gz)?$", file.name) and file.is_file():
            numbered = enumerate(read_lines(file), start=1)
            for filled, group in itertools.groupby(numbered, key=lambda row: bool(row[1].strip())):
                if filled:
                    numbers, lines = zip(*group)
                    passages.append((f"{file}:{numbers[0]}", " ".join(" ".join(lines).split())))
    if not passages:
        raise ValueError(f"--texts {source}: neither docs nor a file or folder of .txt, .md or .jsonl with text in it")
    return passages

# ---- reading files: tables line by line, and what a cell may hold ----------------------------------------------------
def read_rows(path):
    """ .jsonl, .csv or .tsv with a header, or .txt, each gzipped or not -> yields (line number, dict), {"text": line}
    for .txt; blank lines are passed over. Raises ValueError that names the file and the line. """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind in ("csv", "tsv"):
        yield from read_cells(path, "\t" if kind == "tsv" else ",")
        return
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                row = json.loads(line) if kind == "jsonl" else {"text": line}
                assert isinstance(row, dict)
            except (ValueError, RecursionError, AssertionError):
                raise ValueError(f"{path}, line {number}: not a JSON object: {line.strip()[:60]!r}") from None
            yield number, row

def read_cells(path, delimiter):
    """ .csv or .tsv with a header -> yields (line number, dict); the line is the row's first, as cells may hold line
    breaks. Raises ValueError for rows that do not fit the header, and for quotes that do not close. """
    csv.field_size_limit(2**31 - 1)   # the default, 131,072 characters, is less than a long document
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    header, begin = [], 1             # begin: the line where the next row begins
    try:
        for cells in reader:
            number, begin = begin, reader.line_num + 1
            if not any(map(str.strip, cells)):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if twice := [name for name in header if name and header.count(name) > 1]:
                    raise ValueError(f"{path}, line {number}: has the column {twice[0]} twice; rename one")
            elif len(cells) != len(header):
                raise ValueError(f"{path}, line {number}: has {len(cells)} cells and the header {len(header)}; leave a "
                                 "cell empty rather than out, and put quotes around one that holds the separator")
            else:
                yield number, dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin}: a quote is not closed or text follows it ({error}); in a quoted cell "
                         'write "" for a quote') from None

def read_lines(path):
    """ yields the lines of a text file, gzipped or not. Raises ValueError for what is neither UTF-8 nor gzip. """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # surrogateescape lets bytes through that are not UTF-8, so that the line that holds them can be named
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line or not line.isascii() and re.search("[\udc80-\udcff]", line):
                    raise ValueError(f"{path}, line {number}: is not plain UTF-8 text; save the file as UTF-8")
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: is no whole gzip file ({error}); make it again, or rename it") from None

# These three check a cell. `where` begins the message of the ValueError that they raise: "pairs.csv, line 3: query".
def as_text(cell, where):
    """ a cell -> itself, if it is a string """
    if not isinstance(cell, str):
        raise ValueError(f"{where} is {cell!r:.60}; it must be a text")
    if not cell.isascii() and (half := re.search("[\ud800-\udfff]", cell)):   # a tokenizer refuses it
        raise ValueError(f"{where} holds {half[0]!r}, half of a character, such as a cut emoji leaves; take it out")
    return cell

def as_texts(cell, where):
    """ None, a string, a passage {"title": ..., "text": ...}, or a list of these -> list of strings, none blank """
    if isinstance(cell, list):
        return [text for item in cell for text in as_texts(item, where)]
    if isinstance(cell, dict):
        title, text = as_text(cell.get("title") or "", f"{where} title"), as_text(cell.get("text"), f"{where} text")
        cell = f"{title} {text}".strip()
    return [cell] if as_text("" if cell is None else cell, where).strip() else []

def as_score(cell, where):
    """ a number, or a string of one -> finite float """
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(score := float(cell)):
            return score
    raise ValueError(f"{where} {cell!r:.60} is not a finite number")

# ---- docs: the documentation of this machine's Python packages, as training pairs and as a test collection -----------
DOCS_PACKAGES = "numpy scipy torch transformers datasets pandas sympy networkx huggingface_hub".split()

def docs_folder():
    """ Path of the docs corpus for the installed package versions; builds it when it is not there yet """
    versions = " ".join([sys.version.split()[0]] + [f"{p} {importlib.metadata.version(p)}" for p in DOCS_PACKAGES])
    folder = CACHE / f"docs-{zlib.crc32(versions.encode()):08x}"
    return folder if folder.exists() else build_docs(folder)

def build_docs(folder):
    """ Docstrings of the standard library and of DOCS_PACKAGES (query = first paragraph, passage = the rest) -> folder,
    in the layout of a BEIR set with train.jsonl {query, positive} beside it. A fifth of the source files is held out
    whole, for the corpus, 1,000 test and 500 dev queries; a text that occurs in both parts stays in the held-out part
    only. Deterministic for given package versions. """
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(importlib.util.find_spec(package).origin).parent for package in DOCS_PACKAGES]
    # Installed packages lie below the standard library but are not part of it; tests hold much code and little prose.
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [(f"{root.name}/{path.relative_to(root).as_posix()}", path)
             for root in roots for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    def is_held_out(file):
        return zlib.crc32(file.encode()) % 5 == 0
    files.sort(key=lambda file: not is_held_out(file[0]))   # held-out files first: they keep shared texts
    with ProcessPoolExecutor() as pool:
        found = list(progress(pool.map(docstrings, [path for _, path in files], chunksize=16), total=len(files),
                              unit=" files", desc="docs: reading the docstrings of this machine's Python packages"))
    seen, train, corpus = set(), [], []
    for (file, _), texts in zip(files, found):
        module = re.sub(r"(/__init__)?\.py$", "", file).replace("/", ".")
        side = corpus if is_held_out(file) else train
        for name, query, passage in texts:
            keys = {fold(query), fold(passage)}
            if not keys & seen:
                side.append((module + name, query, passage))
            seen |= keys
    order = np.random.default_rng(0).permutation(len(corpus)).tolist()
    test, dev = order[:1000], order[1000:1500]
    with atomic_write(folder) as part:
        write_beir(part, [{"_id": str(i), "title": "", "text": passage, "name": name, "query": query}
                          for i, (name, query, passage) in enumerate(corpus)],
                   [{"_id": f"q{i}", "text": corpus[i][1]} for i in test + dev],
                   {"test": [(f"q{i}", i) for i in test], "dev": [(f"q{i}", i) for i in dev]})
        write_jsonl(part / "train.jsonl", [{"name": name, "query": query, "positive": passage}
                                           for name, query, passage in train])
    return folder

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
