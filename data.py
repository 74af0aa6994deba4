"""
Texts in, batches of token ids out.

A batch is a pure function of (data, seed, step), but for a stream; no data loader has a state to save:
  srl_batch    queries with their positives and hard negatives, for finetune_srl.py
  smae_batch   running text masked twice, for pretrain_smae.py
Below: rows of files and of the hub, the tables that `datasets` makes of them, tokenising. Letters: see model.py.
"""
import csv, functools, gzip, importlib.metadata, itertools, json, os, re, string, subprocess, sys, unicodedata, zlib
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Features, List, Value
from datasets.distributed import split_dataset_by_node

# ---- batches of pairs, for SRL -------------------------------------
class Pairs(NamedTuple):
    """ what tokenize_pairs makes of a source """
    table: datasets.Dataset   # query: ids; positive, negative: lists of ids; score, if the pairs have one
    rows_of_repeated: dict    # {ids of a query, as bytes: numbers of its rows} of the queries with several rows
    prefix: int = 1           # tokens before the text of a passage: [CLS] and those of a prompt

class Batch(NamedTuple):
    """ Q queries and P >= Q passages. Passage i < Q is the positive of query i; the hard negatives follow. """
    queries: list            # Q (T,) ids
    passages: list           # P (T,) ids
    also_right: np.ndarray   # (Q, P) bool: passages that are no negatives of a query, see find_also_right
    gold: np.ndarray         # (Q,) gold scores, or None

TEXT_SEED, SOURCE_SEED, SIZE_SEED = 1, 2, 3   # last in a seed of SRL, so that draws are independent

@functools.lru_cache(maxsize=64)   # every step asks for it; sources take turns
def epoch_order(rows, seed, epoch):
    """ (rows,) the order of the rows in one epoch """
    return np.random.default_rng([seed, epoch]).permutation(rows)

def window(text, length, rng, prefix=1):
    """ (T,) ids -> at most `length` ids; the prefix ([CLS], maybe a prompt) and [SEP] are kept. A longer text is cut
    to its beginning (probability 1/2) or to a random window. """
    if len(text) <= length:
        return text
    last = len(text) - length + prefix   # a window that starts here ends right before [SEP]
    start = prefix if rng.random() < 0.5 else rng.integers(prefix, last + 1)
    return np.concatenate([text[:prefix], text[start:start + length - prefix - 1], text[-1:]])

def find_also_right(queries, passages, answers):
    """ Q queries, P passages, pairs (query, answer) of all queries, each text (T,) ids -> (Q, P) bool. True: passage j
    is an answer of query i, too, or the query itself, and must not count as a negative. (i, i), the positive, is False.
    Queries A B A with positives x y z: A has the answers x and z, so (0, 2) and (2, 0) are True. """
    right = {}   # {query: its answers}
    for query, answer in answers:
        right.setdefault(query.tobytes(), {query.tobytes()}).add(answer.tobytes())
    texts = [passage.tobytes() for passage in passages]
    also_right = np.zeros((len(queries), len(passages)), dtype=bool)
    for i, query in enumerate(queries):
        also_right[i] = [text in right[query.tobytes()] for text in texts]
        also_right[i, i] = False
    return also_right

def srl_batch(sources, batch_size, max_negatives, passage_max_length, seed, step):
    """ list of Pairs -> Batch number `step`. A row has at most max_negatives hard negatives, which count for all
    queries. Longer passages than passage_max_length are cut to a window. All rows of a batch are of one source:
    passages of another would be negatives that are too easy. An epoch visits every row of every source at most once; an
    incomplete last batch is dropped. """
    batches_per_source = [len(pairs.table) // batch_size for pairs in sources]
    epoch, turn = divmod(step, sum(batches_per_source))
    # Sources of 3 and 2 batches may take turns 0 1 0 0 1. Then turn 2 is of source 0, which has had one batch: i = 1.
    turns = np.repeat(np.arange(len(sources)), batches_per_source)
    turns = np.random.default_rng([seed, epoch, SOURCE_SEED]).permutation(turns)
    pairs = sources[turns[turn]]
    i = (turns[:turn] == turns[turn]).sum()     # batches that this source has had in this epoch
    rows = epoch_order(len(pairs.table), seed, epoch)[i * batch_size:(i + 1) * batch_size]

    rng = np.random.default_rng([seed, step, TEXT_SEED])
    table = pairs.table[rows]                   # {column: a list with a cell for each row}
    positives = [texts[rng.integers(len(texts))] for texts in table["positive"]]
    hard = [texts[k] for texts in table["negative"] for k in rng.permutation(len(texts))[:max_negatives]]
    queries, passages = as_arrays(table["query"]), as_arrays(positives + hard)
    windows = [window(text, passage_max_length, rng, pairs.prefix) for text in passages]
    if "score" in table:   # no passage is right or wrong: pairs are more or less similar
        nothing = np.zeros((len(queries), len(passages)), dtype=bool)
        return Batch(queries, windows, nothing, np.array(table["score"], np.float32))
    # Answers of a query are no negatives: neither those of its row that were not drawn nor those of its other rows.
    # Whole texts are compared: windows of copies differ.
    more = pairs.table[[row for query in queries for row in pairs.rows_of_repeated.get(query.tobytes(), ())]]
    answers = [(query, answer) for part in (table, more)
               for query, texts in zip(as_arrays(part["query"]), part["positive"]) for answer in as_arrays(texts)]
    return Batch(queries, windows, find_also_right(queries, passages, answers), None)

# ---- batches of masked text, for SMAE ------------------------------
class Masked(NamedTuple):
    """ B texts masked twice, sorted by length as in model.pack. Positions are indices into the row of N tokens. """
    texts: list                     # B (T,) the true ids, [CLS] ... [SEP]
    encoder_ids: np.ndarray         # (N,) what the encoder sees
    encoder_positions: np.ndarray   # (M,) positions in the row that the encoder must guess: 20 %
    decoder_ids: np.ndarray         # (N,) what the decoder sees
    decoder_positions: np.ndarray   # (M',) those that the decoder must guess: 40 %, the encoder's among them

@functools.lru_cache(maxsize=4)
def word_begins(tokenizer):
    """ (V,) bool: does this entry of the vocabulary begin a word? WordPiece marks those that do not by ##,
    SentencePiece and byte-level BPE those that do by a sign for the blank """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if any(piece.startswith("##") for piece in pieces):
        return np.array([not piece.startswith("##") for piece in pieces])
    begins = np.array([piece.startswith(("\u2581", "\u0120")) for piece in pieces])
    if not begins.any():
        print("warning: the tokenizer does not mark where words begin: pieces are masked one by one", file=sys.stderr)
        return np.ones(len(pieces), dtype=bool)
    return begins | np.isin(pieces, tokenizer.all_special_tokens)

def whole_word_mask(begins, rates, rng):
    """ begins (T,) bool: a word begins at this token of one text; [CLS] and [SEP] are a word each -> a (T,) bool mask
    for each rate; a smaller rate's mask lies inside a larger rate's.
    The words are shuffled, [CLS] and [SEP] behind all others. A rate masks words from the front, up to a budget of
    round(rate * tokens without [CLS] and [SEP]). The word in which the budget ends is masked if its middle lies within
    the budget, so long words are masked as often as short ones. For example, at rate 0.5 with a budget of 2:
      tokens           [CLS] the dra ##gon sleeps [SEP]
      words, shuffled  dragon  sleeps  the  [CLS]  [SEP]
      their middles    1       2.5     3.5  4.5    5.5        masked: dra ##gon, the only word with 2 or less """
    word = np.cumsum(begins) - 1                                   # (T,) number of each token's word
    length = np.bincount(word)                                     # (words,) tokens of each word
    key = rng.random(len(length))                                  # (words,) words are sorted by it
    key[[0, -1]] = 2                                               # [CLS] and [SEP] come last
    order = key.argsort()
    middle = np.empty(len(length))
    middle[order] = np.cumsum(length[order]) - length[order] / 2   # (words,) in the shuffled row of words
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
    room = max_length - 2                           # [CLS] and [SEP] take two
    starts = [rng.integers(max(1, len(document) - room + 1)) for document in documents]
    windows = [document[start:start + room] for document, start in zip(documents, starts)]
    texts = [np.concatenate([[tokenizer.cls_token_id], ids, [tokenizer.sep_token_id]])   # (T,)
             for ids in sorted(windows, key=len)]   # the order of model.pack
    masks = []                                      # (encoder's, decoder's), (T,) each, of a text
    for text in texts:
        begins = word_begins(tokenizer)[text]       # (T,), a copy
        begins[1] = True                            # a window may begin inside a word
        masks.append(whole_word_mask(begins, rates, rng))
    row = np.concatenate(texts)                                                  # (N,)
    for_encoder, for_decoder = map(np.concatenate, zip(*masks))                  # (N,) bool each
    encoder_ids = corrupt(row, for_encoder, tokenizer.mask_token_id, len(tokenizer), rng)
    decoder_ids = corrupt(row, for_decoder, tokenizer.mask_token_id, len(tokenizer), rng)   # draws of its own
    return Masked(texts, encoder_ids, np.flatnonzero(for_encoder), decoder_ids, np.flatnonzero(for_decoder))

# ---- rows: docs, local files, the Hugging Face hub -----------------
FILE = re.compile(r"\.(csv|tsv|jsonl?|txt|md|parquet)(\.gz)?$", re.IGNORECASE)
CACHE = Path(__file__).parent / "out"   # the docs corpus; git-ignored, made again when missing
datasets.logging.set_verbosity(datasets.logging.CRITICAL)   # errors are said once, by us
if int(os.environ.get("RANK", 0)) > 0 or not sys.stderr.isatty():
    datasets.disable_progress_bars()

def docs_folder():
    """ docs, the corpus that needs no download: what tools/docs.py makes of the installed packages' documentation """
    packages = "numpy scipy torch transformers datasets pandas sympy networkx huggingface_hub".split()
    versions = " ".join([sys.version.split()[0]] + [f"{name} {importlib.metadata.version(name)}" for name in packages])
    folder = CACHE / f"docs-{zlib.crc32(versions.encode()):08x}"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "tools.docs", folder, *packages], cwd=Path(__file__).parent, check=True)
    return folder

def read_rows(source, convert=dict, split="train", streaming=False):
    """ docs, a file (see FILE), or NAME[:CONFIG][:SPLIT] of the hub or of a folder with the same layout -> yields
    convert(row) of each row {column: cell}, unless it is empty. ValueError names source and row. """
    number = 0
    try:
        for number, row in enumerate(open_source(source, split, streaming), start=1):
            if converted := convert(row):
                yield converted
    except Exception as error:   # csv, json, gzip, datasets, pyarrow and the hub have a dozen kinds
        reason = f"{type(error).__name__}: {error!s:.300}"
        raise ValueError(f"{source} cannot be read, row {number} or the next ({reason})") from error

def open_source(source, split, streaming):
    """ what read_rows reads -> an iterator over its rows """
    path = str(docs_folder() / "train.jsonl") if source == "docs" else source
    kind = FILE.search(path) and FILE.search(path)[1].lower()
    if kind == "parquet":
        return datasets.load_dataset("parquet", data_files=path, split="train", streaming=streaming)
    if kind:
        return read_file(path, kind)
    parts = [source] if Path(source).exists() else source.split(":", 2)   # C:\data is a folder and no NAME:CONFIG
    name, config, named_split = [*parts, "", ""][:3]   # maybe train[:1000]
    return datasets.load_dataset(name, config or None, split=named_split or split, streaming=streaming)

def read_file(path, kind):
    """ a text file, maybe .gz -> yields its rows; the cells of .csv and .tsv are strings """
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        start = file.readline()
        file.seek(0)
        if kind in ("txt", "md"):
            yield from ({"text": line.strip()} for line in file)
        elif kind in ("csv", "tsv"):
            csv.field_size_limit(2**31 - 1)
            separator = "\t" if kind == "tsv" else max(",;", key=start.count)   # spreadsheets may write semicolons
            quoting = csv.QUOTE_NONE if kind == "tsv" else csv.QUOTE_MINIMAL   # in .tsv a quote is a character
            rows = csv.DictReader(file, delimiter=separator, quoting=quoting, strict=True)
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError("two columns have one name")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"line {rows.line_num} has not as many cells as the first line")
                yield row
        else:
            yield from json.load(file) if start.startswith("[") else map(json.loads, filter(str.strip, file))

def as_texts(cell):
    """ None, a text, a number, a passage {"title", "text"}, or a list of them -> list of strings, none blank """
    if isinstance(cell, list):
        return [text for item in cell for text in as_texts(item)]
    if isinstance(cell, dict) and "text" in cell:   # of SQuAD a list of texts
        return [" ".join([*as_texts(cell.get("title")), text]) for text in as_texts(cell["text"])]
    if cell is None or cell != cell:   # NaN, an empty cell of pandas
        return []
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise ValueError(f"{cell!r:.60} is no text")
    return [str(cell)] if str(cell).strip() else []

def as_score(cell):
    """ a number, or a string of one -> finite float """
    if isinstance(cell, bool) or not np.isfinite(score := float(cell)):
        raise ValueError(f"{cell!r:.60} is no finite number")
    return score

def make_table(source, rows, features, settings=None, split="train"):
    """ rows(), an iterator over rows with these features -> datasets.Dataset in a memory-mapped file, found again until
    the source (of a file path, date and size), the settings or the code of `rows` change """
    path = Path(docs_folder() / "train.jsonl" if source == "docs" else source)
    if FILE.search(path.name):
        version = str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size
    else:
        version = open_source(source, split, streaming=False)._fingerprint
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("data.py", "evaluate.py")]
    key = f"{zlib.crc32(repr((version, sorted(features), settings, code)).encode()):08x}"
    try:
        return datasets.Dataset.from_generator(rows, features=Features(features), fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:   # around that of `rows`
        raise error.__cause__ from None
    except ValueError:   # no row at all
        raise ValueError(f"{source}: not a single row with a text in each column that is needed") from None

# ---- columns -------------------------------------------------------
# what columns are called in people's files: any one of the names will do, also with _1, _2, ... behind it
COLUMNS = {"query": "query|question|anchor|sentence1", "text": "text", "score": "score",
           "positive": "pos|positives?|positive_passages|answers?|context|document|passage|response|sentence2",
           "negative": "neg|negatives?|negative_passages"}
LABELS = "(gold_)?labels?|is_duplicate|relevan(ce|t)|entailment|class|(.*_)?scores?|similarity"   # mark non-pairs?
YES_OR_NO = {"0", "1"}, {"0.0", "1.0"}, {"False", "True"}   # so may these cells alone
SENTENCES = {"sentence1": "query", "sentence2": "positive"}   # what --columns may call them, too

def find_columns(source, present, kinds, columns):
    """ -> {"query": ["question"], "positive": ["answer_1", "answer_2"], "negative": [], "score": []}, of those present:
    what --columns names, as ["query=question"], else the names of COLUMNS. A query and a score are one column. """
    has = f"{source} has the columns {', '.join(present)}"
    asked = [(SENTENCES.get(kind, kind), column) for kind, _, column in (item.partition("=") for item in columns)]
    if unknown := {kind for kind, _ in asked} - set(kinds):
        raise ValueError(f"--columns {unknown.pop()}: {has}; in KIND=COLUMN the KIND is {' or '.join(kinds)}")
    found = {}
    for kind in kinds:
        named = [column for its_kind, column in asked if its_kind == kind]   # several, if sources differ
        by_name = [column for column in present if re.fullmatch(rf"({COLUMNS[kind]})(_\d+)?", column.lower())]
        found[kind] = [column for column in present if column in named] if named else by_name
        missing = not found[kind] and (named or kind not in ("negative", "score"))
        several = len(found[kind]) > 1 and kind in ("query", "score")
        mixed = not named and len({re.sub(r"_\d+$", "", column) for column in by_name}) > 1   # positive and answer
        if missing or several or mixed:
            flag = f"--columns {kind}={','.join(named)}: " if named else ""
            raise ValueError(f"{flag}{has}; --columns {kind}=COLUMN says which is the {kind}")
    return found

def load_pairs(source, columns=(), split="train"):
    """ a source of --train_pairs, see read_rows -> table with the columns query (a string), positive, negative (lists
    of strings) and, of scored pairs, score; without the rows that have no query or no positive. Prints its columns. """
    names, count = {}, 0   # {column: up to three different cells}
    for count, row in enumerate(read_rows(source, split=split), start=1):   # all: in JSON a column may come late
        for name, cell in row.items():
            if len(names.setdefault(name, set())) < 3:
                names[name].add(str(cell))
    found = find_columns(source, list(names), ["query", "positive", "negative", "score"], columns)
    kinds_asked = {item.split("=")[0] for item in columns}
    two_sentences = {"sentence1", "sentence2"} <= {*names, *kinds_asked}
    if "score" not in kinds_asked and not two_sentences:
        found["score"] = []   # it may say anything
    unused = [name for name in names if name not in sum(found.values(), [])]
    for name in unused:
        if not found["score"] and (re.fullmatch(LABELS, name.lower()) or names[name] in YES_OR_NO):
            raise ValueError(f"{source}: {name} may say which rows are no pairs. Copy those that are to a file without "
                             f"this column, or train on it as a similarity: --columns score={name}")

    def as_pair(row):
        pair = {kind: as_texts([row.get(name) for name in found[kind]]) for kind in ("query", "positive", "negative")}
        if len(pair["query"]) > 1 or found["score"] and len(pair["positive"]) > 1:
            raise ValueError("several queries, or several texts to one score; give each a row of its own")
        if not pair["query"] or not pair["positive"]:
            return None
        score = {"score": as_score(row.get(name)) for name in found["score"]}   # one or none
        return pair | {"query": pair["query"][0]} | score

    features = {"query": Value("string"), "positive": List(Value("string")), "negative": List(Value("string"))}
    features |= {"score": Value("float64") for _ in found["score"]}
    pairs = make_table(source, functools.partial(read_rows, source, as_pair, split), features, (found, split), split)
    if found["score"] and len(set(pairs["score"])) < 2:
        raise ValueError(f"{source}: every score is the same, so there is no order to learn or to test")
    used = " | ".join(f"{kind}: {', '.join(cells)}" for kind, cells in found.items() if cells)
    print(f"{source}: {len(pairs):,} pairs of {count:,} rows | {used} | not used: {', '.join(unused) or '-'}")
    return pairs

def text_rows(source, streaming=False, columns=()):
    """ --train_text, see read_rows -> yields {"text": a document}, none blank """
    columns = ["text=query", "text=positive"] if source == "docs" else columns   # a document is both of its texts
    first = next(read_rows(source, streaming=True), {})
    names = find_columns(source, list(first), ["text"], columns)["text"]
    def as_document(row):
        text = " ".join(as_texts([row.get(name) for name in names]))
        return text and {"text": text}
    return read_rows(source, as_document, streaming=streaming)

# ---- tokenising ----------------------------------------------------
def train_wordpiece(texts, vocab_size):
    """ an iterable of texts -> transformers tokenizer: lower-casing WordPiece like BERT's, but it keeps accents and
    vowel signs, without which words of many languages become the same. On English texts it is deterministic. """
    from transformers import BertTokenizer   # here, because it takes a second or two
    # The trainer numbers letters in the order of a hash table and breaks ties by number. Given as special tokens they
    # have fixed numbers, so the pieces are the same every time; they are sorted in the end.
    texts = (unicodedata.normalize("NFC", text) for text in texts)   # as to_ids does
    letters = [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    blank = BertTokenizer(strip_accents=False)
    trained = blank.train_new_from_iterator(texts, vocab_size, new_special_tokens=letters, show_progress=False)
    pieces = special + sorted(set(trained.get_vocab()) - set(special))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, strip_accents=False)

def to_ids(texts, tokenizer, **flags):
    """ list of strings -> list of lists of ids, [CLS] ... [SEP] """
    if not texts:
        return []
    texts = [unicodedata.normalize("NFC", text) for text in texts]   # PDFs write an accent behind its letter
    ids = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **flags)["input_ids"]
    tokenizer.backend_tokenizer.no_truncation()   # else the truncation of this call would be saved with the tokenizer
    return ids

def as_arrays(texts):
    """ list of lists of ids -> list of (T,) arrays """
    return [np.array(ids, np.int32) for ids in texts]

def check_texts(source, texts, tokenizer, max_length=None, prompt=""):
    """ A warning if more than one token in twenty is [UNK] or different texts become the same ids: does the tokenizer
    know the language? Prints how many texts are cut. ValueError if most are [UNK], or a prompt leaves no room """
    ids = to_ids(texts, tokenizer, add_special_tokens=False, verbose=False)
    tokens = [token for text in ids for token in text]
    unknown = tokens.count(tokenizer.unk_token_id) / max(1, len(tokens))
    different = len({" ".join(text.lower().split()) for text in texts})
    left = len(set(map(tuple, ids)))
    message = (f"{source}: {unknown:.0%} of the tokens are {tokenizer.unk_token}, and {different:,} different texts "
               f"have {left:,} different token sequences; does this tokenizer know their language?")
    if unknown > 0.8:
        raise ValueError(message)
    if unknown > 0.05 or left < 0.95 * different:
        print(f"warning: {message}", file=sys.stderr)
    if max_length:
        room = max_length - len(to_ids([prompt], tokenizer)[0])   # less [CLS], prompt, [SEP]
        longer = sum(len(text) > room for text in ids)
        if room < 1:
            raise ValueError(f"{source}: the prompt {prompt!r:.60} leaves no room in the {max_length} tokens of a text")
        if longer:
            print(f"{source}: {longer:,} of {len(ids):,} texts are longer than {max_length} tokens and are cut")

def tokenize_pairs(source, pairs, tokenizer, query_max_length, passage_max_length, config):
    """ table of load_pairs, config with the prompts -> Pairs, where every string is its ids, [CLS] ... [SEP] """
    first = pairs[:1000]
    check_texts(f"{source}, first queries", first["query"], tokenizer, query_max_length, config.query_prompt)
    check_texts(f"{source}, first passages", [texts[0] for texts in first["positive"]], tokenizer, passage_max_length,
                config.passage_prompt)
    def encode(batch):
        queries = [config.query_prompt + text for text in batch["query"]]
        ids = {"query": to_ids(queries, tokenizer, truncation=True, max_length=query_max_length)}
        for kind in ("positive", "negative"):
            passages = [config.passage_prompt + text for row in batch[kind] for text in row]
            all_ids = iter(to_ids(passages, tokenizer, truncation=True, max_length=passage_max_length))
            ids[kind] = [[next(all_ids) for _ in row] for row in batch[kind]]
        return ids
    ids = List(Value("int32"))
    features = Features({**pairs.features, "query": ids, "positive": List(ids), "negative": List(ids)})
    table = pairs.map(encode, batched=True, features=features)
    rows_of, batches = {}, table.select_columns("query").iter(1000)
    for number, query in enumerate(query for batch in batches for query in as_arrays(batch["query"])):
        rows_of.setdefault(query.tobytes(), []).append(number)
    repeated = {query: numbers for query, numbers in rows_of.items() if len(numbers) > 1}
    return Pairs(table, repeated, prefix=len(to_ids([config.passage_prompt], tokenizer)[0]) - 1)   # less [SEP]

def tokenize_text(source, tokenizer, streaming=False, rank=0, world_size=1, columns=()):
    """ --train_text -> Dataset, or with streaming IterableDataset, with the column ids: a document a row, without [CLS]
    and [SEP]. Of a stream each of world_size ranks reads its own part. """
    rows = functools.partial(text_rows, source, streaming, columns)
    check_texts(source, [row["text"] for row in itertools.islice(rows(), 1000)], tokenizer)
    if streaming:
        table = split_dataset_by_node(datasets.IterableDataset.from_generator(rows), rank, world_size)
    else:
        table = make_table(source, rows, {"text": Value("string")}, columns)
    def encode(batch):
        ids = to_ids(batch["text"], tokenizer, add_special_tokens=False, verbose=False)
        return {"ids": list(filter(len, ids))}
    return table.map(encode, batched=True, remove_columns=["text"], features=Features({"ids": List(Value("int32"))}))

def content_hash(table):
    """ changes when a token, a score or the order of the rows does, but not with path or date """
    crc = 0
    for chunk in table.with_format("arrow").iter(10_000):
        for batch in chunk.combine_chunks().to_batches():
            crc = zlib.crc32(batch.serialize(), crc)
    return f"{crc:08x}"
