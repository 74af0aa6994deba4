""" Rows of every kind of source are the same, a batch is a function of (seed, step), masks hide whole words. """
import csv, gzip, json, os

import datasets
import numpy as np
import pandas
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import data
from conftest import LINES, write_jsonl
from model import new_config
from tools import docs

# ---- files -----------------------------------------------------------------------------------------------------------
def write(path, rows):
    """ rows -> a file of the kind that its name says, gzipped if it says so; the path, as a string """
    name, opened = path.name.lower(), gzip.open if path.name.lower().endswith(".gz") else open
    if "parquet" in name:
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif "sv" in name:
        tsv = {"sep": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if "tsv" in name else {}
        pandas.DataFrame(rows).to_csv(path, index=False, **tsv)
    else:   # blank lines are no rows
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(json.dumps(rows, indent=1) if "array" in name else "\n\n".join(map(json.dumps, rows)))
    return str(path)

LONG = "long " * 40_000   # characters; the csv module takes 131,072 by default
@pytest.mark.parametrize("name, text, rows", [
    ("p.csv", "\ufeffa;b\r\n1;2,5\r\n", [{"a": "1", "b": "2,5"}]), ("p.csv", f"a\n{LONG}\n", [{"a": LONG}]),
    ("p.csv", 'a,b\n"q\nr","x ""y"""\n\n', [{"a": "q\nr", "b": 'x "y"'}]), ("p.tsv", 'a\n"5" n\n', [{"a": '"5" n'}]),
    ("p.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": "x\u2028y"}', [{"a": 1}, {"a": "x\u2028y"}]),
    ("p.txt", " one\r\n\ntwo\u2028three", [{"text": "one"}, {"text": ""}, {"text": "two\u2028three"}])])
def test_files_that_look_odd(tmp_path, name, text, rows):
    """ Byte order marks, CRLF, semicolons, line breaks, long cells and quotes are read as they are meant. """
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert list(data.read_rows(str(tmp_path / name))) == rows

@pytest.mark.parametrize("name, content, message", [
    ("p.csv", b"a,b\n1,2\n3\n", "1 or .*line 3 has not as many"), ("p.csv", b"a,b\n1,2,3\n", "0 or .*line 2 has not"),
    ("p.csv", b'a,b\n"x" y,2\n', "expected after"), ("p.csv", "a,b\n1,é\n".encode("latin-1"), "UnicodeDecodeError"),
    ("p.csv", b'a,b\n1,2\n3,"x\n4,5\n', "1 or the next .*unexpected end of data"),
    ("p.jsonl", b'{"a": 1}\n{"a"\n', "1 or the next .*JSONDecodeError"), ("p.json", b'[{"a": 1},', "JSONDecodeError"),
    ("p.jsonl.gz", b'{"a": 1}\n', "BadGzipFile"), ("p.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "EOFError"),
    ("p.parquet", b"none", "ArrowInvalid"), ("nowhere.csv", None, "FileNotFoundError"), ("no/where", None, "Error")])
def test_broken_files(tmp_path, monkeypatch, name, content, message):
    """ A file that is broken or not there is refused in one line with its name and the row. """
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name} cannot be read, row .*{message}") as error:
        list(data.read_rows(name))
    assert "\n" not in str(error.value)

# ---- pairs -----------------------------------------------------------------------------------------------------------
def pairs_of(source, *args, **flags):
    """ load_pairs -> [(query, positives, negatives)], of scored pairs with the score """
    return [tuple(row.values()) for row in data.load_pairs(str(source), *args, **flags)]

@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "array.json", "array.json.gz", "p.csv", "P.CSV.GZ",
                                  "p.tsv", "p.tsv.gz", "P.TSV", "p.parquet", "P.PARQUET"])
def test_the_same_pairs_of_every_file(tmp_path, name, capsys):
    """ Null, NaN, empty cells, numbers, quotes, separators and accents are the same in every format, gzipped or not;
    rows without a query or a positive are out. """
    table = {"query": ["café", 'b; "two", c', None, "d"], "positive": [0, 2, 3, None],
             "negative_1": [None, "n", " ", "o"], "negative_2": [2.5, float("nan"), None, 0.5]}
    rows = [dict(zip(table, cells)) for cells in zip(*table.values())]
    if "sv" in name.lower():
        rows = [{name: "" if cell is None or cell != cell else str(cell) for name, cell in row.items()} for row in rows]
    source = write(tmp_path / name, rows)
    assert pairs_of(source) == [("café", ["0"], ["2.5"]), ('b; "two", c', ["2"], ["n"])]
    assert capsys.readouterr().out == (f"{source}: 2 pairs of 4 rows | query: query | positive: positive | "
                                       "negative: negative_1, negative_2 | not used: -\n")

def test_a_column_that_comes_late(tmp_path):
    """ In JSON a column may first occur in a late row, and hold strings here and lists there. """
    rows = [{"query": "a", "positive": "p"}] * 1500 + [{"query": "b", "positive": ["p", "", ["r"]], "negative": "n"},
                                                       {"query": "c", "positive": "p", "negative": ["n", None, "m"]}]
    found = pairs_of(write_jsonl(tmp_path / "p.jsonl", rows))
    assert found[1499:] == [("a", ["p"], []), ("b", ["p", "r"], ["n"]), ("c", ["p"], ["n", "m"])]

QP, SCORED = {"query": "q", "positive": "p"}, {"sentence1": "q", "sentence2": "p", "score": "2"}
@pytest.mark.parametrize("row, columns, found", [
    ({"question": "q", "answer": "p"}, "", ("q", ["p"], [])),
    ({"question": "q", "answers": {"text": ["p", "r"], "answer_start": [0, 9]}}, "", ("q", ["p", "r"], [])),   # SQuAD
    ({"Anchor": "q", "Positive": "p", "Neg": ["n"], "id": 1}, "", ("q", ["p"], ["n"])),
    ({"query_id": "1", "query": "q", "positive_passages": [{"docid": "7", "title": "t", "text": "p"}],
      "negative_passages": [{"title": "", "text": "n"}, {"text": "m"}]}, "", ("q", ["t p"], ["n", "m"])),
    (QP | {"positive": None, "positive_1": "p", "positive_2": "r", "negative_1": "n"}, "", ("q", ["p", "r"], ["n"])),
    (QP | {"query": "x", "anchor": "q"}, "query=anchor", ("q", ["p"], [])),   # in place of query
    (QP | {"hard": "a", "harder": "b", "negative": "x"}, "negative=hard negative=harder", ("q", ["p"], ["a", "b"])),
    (QP | {"score": 2}, "score=score", ("q", ["p"], [], 2)), (QP | {"label": 2}, "score=label", ("q", ["p"], [], 2)),
    ({"sentence1": "q", "sentence2": "p", "Score": "2"}, "", ("q", ["p"], [], 2.0)),
    (SCORED, "", ("q", ["p"], [], 2.0)), (SCORED | {"score": "1", "label": "1"}, "", ("q", ["p"], [], 1.0)),
    ({"a": "q", "b": "p", "label": "2"}, "sentence1=a sentence2=b score=label", ("q", ["p"], [], 2.0)),
    ({"a": "q", "b": "p", "score": -2.5}, "sentence1=a sentence2=b", ("q", ["p"], [], -2.5))])
def test_columns(tmp_path, row, columns, found):
    """ Columns go by usual names, also numbered, or by --columns, which may name columns of another source, too; a
    score counts beside sentences or by name. """
    other = {name: 9 if name in ("score", "Score", "label") else cell for name, cell in row.items()}
    source = write_jsonl(tmp_path / "p.jsonl", [row, row, other])
    assert pairs_of(source, columns.split())[:2] == [found, found]

@pytest.mark.parametrize("rows, columns, message", [
    ([{"query": "q", "body": "p"}], "", "has the columns query, body; --columns positive=COLUMN says"),
    ([QP | {"anchor": "a"}], "", "has the columns query, positive, anchor; --columns query=COLUMN"),
    ([QP | {"answer": "a"}], "", "--columns positive=C"), ([QP | {"neg": "a", "negative": "b"}], "", "negative=C"),
    ([QP | {"target": f"{i % 2}"} for i in range(9)], "", "target may say which rows are no pairs"),
    *(([QP | {name: 1}], "", f"{name} may say which rows are no pairs") for name in
      "label Labels gold_label is_duplicate relevance relevant entailment class score Score".split()),
    *(([{"sentence1": "q", "sentence2": "p", name: 2}], "", f"--columns score={name}") for name in
      ("similarity", "similarity_score", "relatedness_score")),
    ([SCORED] * 2, "", "every score is the same"), ([SCORED, SCORED | {"score": "high"}], "", "row 2 .*not convert"),
    ([SCORED | {"score": None}], "", "row 1 "),
    *(([SCORED | {"score": score}], "", "is no finite number") for score in ("nan", "-inf", True)),
    ([QP | {"query": ["a", "b"]}], "", "row 1 .*several queries, or .* give each a row of its own"),
    ([SCORED | {"sentence2": ["a", "b"]}, SCORED], "", "row 1 .*several texts to one score"),
    ([QP, QP | {"positive": [True]}], "", "row 2 .*True is no text"), ([QP | {"positive": {"a": 1}}], "", "is no text"),
    ([QP], "query=body", "--columns query=body: .*has the columns query, positive; --columns query=COLUMN"),
    ([QP], "text=query", "the KIND is query or positive or negative or score"), ([QP], "query", "--columns que"),
    ([QP | {"query": ""}], "", "not a single row with a text in each column that is needed")])
def test_columns_that_are_refused(tmp_path, rows, columns, message):
    """ Ambiguous or missing names, labels that may say which rows are no pairs, and bad cells are refused. """
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        data.load_pairs(source, columns.split())
    assert source in str(error.value) and "\n" not in str(error.value)

def test_names_of_the_hub(tmp_path, monkeypatch):
    """ NAME[:CONFIG][:SPLIT] is a part of a data set, here of a local copy of the hub's layout. """
    monkeypatch.chdir(tmp_path)   # a relative name with a slash, as on the hub
    card = "---\nconfigs:\n"
    for config in ("triplet", "pair"):
        card += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "dev"):
            (tmp_path / "a" / "set" / config).mkdir(parents=True, exist_ok=True)
            write(tmp_path / "a" / "set" / config / f"{split}.parquet", [{"anchor": config, "positive": split}])
            card += f"  - split: {split}\n    path: {config}/{split}*\n"
    (tmp_path / "a" / "set" / "README.md").write_text(card + "---\n")
    for name, split, config, found in (("triplet", "train", "triplet", "train"), ("pair", "dev", "pair", "dev"),
                                   ("pair:dev", "train", "pair", "dev"), ("pair:train[:1]", "dev", "pair", "train")):
        assert pairs_of(f"a/set:{name}", split=split) == [(config, [found], [])]

@pytest.mark.parametrize("kind", ["p.jsonl", "p.parquet", "folder/train.parquet"])
def test_a_changed_file_is_read_anew(tmp_path, monkeypatch, kind):
    """ The second reading comes from the cache; another date, as many bytes, and other columns are read anew. """
    path, source, read = tmp_path / kind, tmp_path / kind.split("/")[0], data.as_texts
    path.parent.mkdir(exist_ok=True)
    for date, query in ((10**9, "a"), (10**9 + 1, "b")):
        write(path, [{"query": query, "positive": "p", "other": "o"}])
        os.utime(path, (date, date))
        assert pairs_of(source) == [(query, ["p"], [])]
        monkeypatch.setattr(data, "as_texts", None)   # no cell can be read
        assert pairs_of(source) == [(query, ["p"], [])]
        monkeypatch.setattr(data, "as_texts", read)
        assert pairs_of(source, ["positive=other"]) == [(query, ["o"], [])]

# ---- batches of pairs ------------------------------------------------------------------------------------------------
def table_of(first, rows, positives=lambda i: [100 + i], negatives=lambda i: []):
    """ row i: query [first + i], positives and negatives of one token each """
    return data.Pairs(datasets.Dataset.from_list([{
        "query": [first + i], "positive": [[id] for id in positives(i)], "negative": [[id] for id in negatives(i)]}
        for i in range(rows)]), {})

@pytest.fixture(scope="module")
def pairs():
    """ row i: query [i], positives [100 + i] (and [200 + i] in even rows), i % 4 negatives """
    return table_of(0, 10, lambda i: [100 + i, 200 + i][:2 - i % 2], lambda i: range(k := 300 + 10 * i, k + i % 4))

def firsts(texts):
    return [int(text[0]) for text in texts]

def test_a_batch_is_a_function_of_seed_and_step(pairs):
    """ A batch is the same in any order of calls, and another one for another seed, step or epoch. """
    def batch(seed, step, size=4):
        return [firsts(part) for part in data.srl_batch([pairs], size, 2, 9, seed, step)[:2]]
    first = [batch(1, step) for step in range(4)]
    assert [batch(1, step) for step in (3, 2, 1, 0)] == first[::-1] and first[0] != first[1]
    one, other = ([batch(seed, step, 5)[0] for step in range(4)] for seed in (1, 2))
    assert one != other and one[:2] != one[2:]   # an epoch has two steps
    assert len({tuple(data.epoch_order(30, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16

def test_batches_align_and_cover_an_epoch(pairs):
    """ Passage i is a positive of query i, at most two negatives a query follow, an epoch sees every row once, and all
    positives and negatives of a row have their turns. Gold scores are those of the rows. """
    drawn = []
    for epoch in range(150):
        seen = []
        for step in (2 * epoch, 2 * epoch + 1):
            rows, passages = map(firsts, data.srl_batch([pairs], 5, 2, 9, 1, step)[:2])
            seen, drawn = seen + rows, drawn + passages
            assert [p % 100 for p in passages[:5]] == rows and len(set(passages)) == len(passages)
            assert len(passages) == 5 + sum(min(2, row % 4) for row in rows)
            assert {(p - 300) // 10 for p in passages[5:]} == {row for row in rows if row % 4}
        assert sorted(seen) == list(range(10))
    count = [drawn.count(id) for id in (100, 200, 330, 331, 332)]   # of row 0, and of row 3
    assert sum(count[:2]) == 150 and sum(count[2:]) == 300 and min(count[:2]) > 55 and min(count[2:]) > 80
    scored = data.Pairs(pairs.table.add_column("score", [float(row) for row in range(10)]), {})
    batch = data.srl_batch([scored], 5, 0, 9, 1, 1)
    assert batch.gold.tolist() == firsts(batch.queries) and not batch.also_right.any()

def test_a_batch_is_of_one_source():
    """ A batch has one source, an epoch sees every row of each once, each seed and epoch has its own turns. """
    sources, turns = [table_of(100, 12), table_of(200, 4), table_of(300, 9)], []   # 3, 1, 2 batches; a row is left over
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        batches = [firsts(data.srl_batch(sources, 4, 0, 9, seed, 6 * epoch + i).queries) for i in range(6)]
        turns.append([batch[0] // 100 for batch in batches])
        assert all(row // 100 == turn for batch, turn in zip(batches, turns[-1]) for row in batch)
        assert sorted(turns[-1]) == [1, 1, 1, 2, 3, 3] and len(set(sum(batches, []))) == 24
    assert turns[0] != turns[1] and turns[0] != turns[2]

def test_windows_of_long_passages():
    """ A window keeps [CLS], the prompt, [SEP] and one piece: the beginning or, as often, any; queries are not cut. """
    text, rng = np.arange(20), np.random.default_rng(0)
    found = [data.window(text, 8, rng).tolist() for _ in range(2000)]
    assert all(w[0] == 0 and w[-1] == 19 and w[1:-1] == list(range(w[1], w[1] + 6)) for w in found)
    share = np.bincount([w[1] for w in found], minlength=14) / len(found)     # a window begins at 1 .. 13
    assert abs(share[1] - (0.5 + 0.5 / 13)) < 0.04 and all(abs(share[2:] - 0.5 / 13) < 0.02) and len(share) == 14
    assert data.window(text, 20, rng) is text
    rows = [{"query": [i] * 20, "positive": [text.tolist()], "negative": [text.tolist()]} for i in range(4)]
    pairs = data.Pairs(datasets.Dataset.from_list(rows), {}, 3)
    queries, passages, also_right, _ = data.srl_batch([pairs], 4, 1, 8, 1, 0)
    assert {len(q) for q in queries} == {20} and [len(p) for p in passages] == [8] * 8
    assert {tuple(p[[0, 1, 2, 7]]) for p in passages} == {(0, 1, 2, 19)}          # of a prompt of two tokens
    assert all(np.diff(p[3:7]).tolist() == [1, 1, 1] for p in passages)
    assert also_right.sum() == 4 * 8 - 4 and len({p.tobytes() for p in passages}) > 1   # copies, cut differently

def test_known_answers_are_no_negatives(tmp_path, tokenizer):
    """ Whatever the file gives to a query, in any of its rows, and the query itself are no negatives, nothing else. """
    words, rng = np.array("apple bridge candle dragon engine forest garden hammer".split()), np.random.default_rng(0)
    rows = [{"query": q, "positive": [p, r], "negative": n} for q, p, r, n in
            zip(*(rng.choice(words[:count], 24).tolist() for count in (4, 8, 8, 8)))]
    answers = {(row["query"], text) for row in rows for text in [row["query"], *row["positive"]]}
    table = data.load_pairs(write_jsonl(tmp_path / "p.jsonl", rows))
    pairs = data.tokenize_pairs("", table, tokenizer, 9, 9, new_config())
    for step in range(24):
        queries, passages, also_right, _ = data.srl_batch([pairs], 3, 1, 9, 1, step)
        q, p = (tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in (queries, passages))
        want = np.array([[i != j and (q[i], p[j]) in answers for j in range(len(p))] for i in range(3)])
        assert np.array_equal(want, also_right)

# ---- text and tokens -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet", "folder"])
def test_text_of_every_source(tmp_path, tokenizer, kind):
    """ Every source gives the same ids, none cut or blank, streamed or not; ranks share a stream without a gap. """
    texts, path = [f"{line} {i} {line} {line}" for i, line in enumerate(LINES * 5)], tmp_path / f"text.{kind}"
    (tmp_path / "text.folder").mkdir()
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    else:
        file = path / "train.parquet" if kind == "folder" else path
        write(file, [{"text": text, "id": "apple"} for text in [*texts, " "]])
    def ids(*flags):
        return [row["ids"] for row in data.tokenize_text(str(path), tokenizer, *flags)]
    want = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [row["text"] for row in data.text_rows(str(path))] == texts and ids() == ids(True) == want
    ranks = ids(True, 0, 2), ids(True, 1, 2)
    assert sorted(ranks[0] + ranks[1]) == sorted(want) and len(ranks[0]) == len(ranks[1]) == 10
    if kind != "txt":
        assert tokenizer.batch_decode(ids(False, 0, 1, ["text=id"])) == ["apple"] * 21

def test_tokenised_tables(tmp_path, pairs_file, tokenizer):
    """ Pairs are cut, begin with the prompts and stay aligned; a table is found again, but not for other flags. The
    hash of its content changes with flags and the order of the rows. The tokenizer does not go on cutting. """
    rows = [json.loads(line) | {"negative": "the apple"} for line in open(pairs_file)]
    pairs = data.load_pairs(write_jsonl(tmp_path / "p.jsonl", rows))
    other = data.train_wordpiece(["where is the"], 90)
    def table(tokenizer, length, **prompts):
        found = data.tokenize_pairs("p", pairs, tokenizer, length, 64, new_config(**prompts)).table
        tokenizer("x" * 99, truncation=True, max_length=7)   # datasets hashes the state of a tokenizer
        return found
    first = table(tokenizer, 5)
    prompted = table(tokenizer, 64, query_prompt="garden ", passage_prompt="orange ")
    assert len(first) == 64 and all(len(ids) == 5 for ids in first["query"])
    assert table(tokenizer, 5).cache_files == first.cache_files != []
    text = "the bridge stands beside the jacket in the morning"
    for ids, want in ((first[9]["positive"][0], text), (prompted[9]["positive"][0], f"orange {text}"),
                      (prompted[9]["negative"][0], "orange the apple"),
                      (prompted[9]["query"], "garden where is the bridge jacket")):
        assert tokenizer.decode(ids, skip_special_tokens=True) == want
    tables = first, prompted, table(tokenizer, 6), table(other, 5), first.select(range(63, -1, -1))
    assert len(set(map(data.content_hash, tables))) == 5
    cut, = data.to_ids([text], tokenizer, truncation=True, max_length=5)
    assert len(cut) == 5 and not tokenizer.backend_tokenizer.truncation

def test_check_texts(tmp_path, tokenizer, capsys):
    """ Text of another language is refused, streamed or not, and so is a prompt that fills the window; some unknown
    words, or texts that become the same ids, are a warning; a line counts texts that are longer than the window. """
    known, greek = "the apple stands beside the bridge in the morning", "μήλο γέφυρα"   # known: 9 tokens
    (tmp_path / "greek.txt").write_text(f"apple {greek} {greek} {greek} {greek}", encoding="utf-8")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"greek.txt: 89% of the tokens are \[UNK\]"):
            data.tokenize_text(str(tmp_path / "greek.txt"), tokenizer, streaming)
    for texts in ([known, f"apple {greek}"], [f"{known} {known} {known} {sign}" for sign in "αβγδ"]):
        data.check_texts("here", texts, tokenizer)
        assert "warning: here: " in capsys.readouterr().err
    for window, prompt, longer in ((11, "", 0), (10, "", 1), (12, "apple ", 0), (11, "apple ", 1), (5, "apple ", 2)):
        data.check_texts("here", [known, "where is the apple"], tokenizer, window, prompt)
        said = f"here: {longer} of 2 texts are longer than {window} tokens and are cut\n" if longer else ""
        assert capsys.readouterr() == (said, "")
    for window, prompt in ((9, known), (11, known)):
        with pytest.raises(ValueError, match="here: the prompt 'the apple .* leaves no room in the"):
            data.check_texts("here", ["apple"], tokenizer, window, prompt)

def test_train_wordpiece():
    """ The same texts give the same vocabulary every time; words that differ in an accent stay different, however that
    is encoded. """
    texts = [f"where is the {a}dge {b}ine pêche peche Ärger" for a in ("bri", "led") for b in ("eng", "mar")] * 3
    tokenizers = [data.train_wordpiece(iter(texts), 120) for _ in range(6)]
    assert len({json.dumps(tokenizer.get_vocab(), sort_keys=True) for tokenizer in tokenizers}) == 1
    assert tokenizers[0].tokenize("pêche PECHE ärger") == ["pêche", "peche", "ärger"]
    one, other = data.to_ids(["p\u00eache", "pe\u0302che"], tokenizers[0])
    assert one == other and tokenizers[0].unk_token_id not in one

@pytest.mark.parametrize("pieces, continue_a_word", [(["a", "##a", "#"], ["##a"]), (["▁a", "b", "▁"], ["b"]),
                                                     (["Ġa", "b"], ["b"]), (["a", "b"], [])])
def test_word_begins(capsys, pieces, continue_a_word):
    """ WordPiece marks what continues a word, others what begins one; without marks, which is said, all do. """
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    vocab = {piece: i for i, piece in enumerate([*special.values(), *pieces])}
    begins = data.word_begins(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, "[UNK]")), **special))
    assert [piece for piece, begin in zip(vocab, begins, strict=True) if not begin] == continue_a_word
    assert ("does not mark where words begin" in capsys.readouterr().err) == (not continue_a_word)

def test_whole_word_mask():
    """ The docstring's example comes out, as many tokens are masked as the rate says, and long words as often. """
    class Shuffle:   # of [CLS] the dragon sleeps [SEP]: the smallest number comes first
        random = staticmethod(lambda words: np.array([0, 0.9, 0.1, 0.5, 0]))
    half, more = data.whole_word_mask(np.array([True, True, True, False, True, True]), [0.5, 0.75], Shuffle)
    assert np.flatnonzero(half).tolist() == [2, 3] and np.flatnonzero(more).tolist() == [2, 3, 4]
    for words in range(1, 20):
        masks = data.whole_word_mask(np.ones(words + 2, bool), [0.28, 0.4], np.random.default_rng(words))
        assert [mask.sum() for mask in masks] == [round(0.28 * words), round(0.4 * words)]
    begins = np.array([True] + [True, True, False, True, False, False] * 20 + [True])
    shares = np.mean([data.whole_word_mask(begins, [0.3], np.random.default_rng(seed))[0] for seed in range(400)], 0)
    by_length = [shares[1:-1].reshape(20, 6)[:, i].mean() for i in (0, 1, 3)]
    assert np.allclose(by_length, 0.3, atol=0.02) and shares[0] == shares[-1] == 0

def test_corrupt():
    """ Of the masked tokens 80 % show [MASK], 10 % a random token, 10 % the true one; no other token changes. """
    rng = np.random.default_rng(0)
    ids, hidden = rng.integers(5, 60, size=40_000), rng.random(40_000) < 0.5
    shown = data.corrupt(ids, hidden, 4, 60, rng)
    mask, same = shown == 4, shown == ids
    assert same[~hidden].all() and mask[hidden].mean() == pytest.approx(0.8 + 0.1 / 60, abs=0.01)
    assert same[hidden].mean() == pytest.approx(0.1 + 0.1 / 60, abs=0.01)
    assert set(shown[hidden & ~same]) == set(range(60))   # random: from all of the vocabulary

@pytest.fixture(scope="module")
def words():
    return data.train_wordpiece(LINES * 8, 60)   # words of one to several pieces

def test_smae_batch(words):
    """ Masks hide whole words and no special tokens, as many as the rates say, the encoder's among the decoder's; the
    same seed gives the same batch, any other number in it another one. """
    rng, vocabulary, wide = np.random.default_rng(0), " ".join(LINES).split(), 0
    documents = data.as_arrays(words([" ".join(rng.choice(vocabulary, n)) for n in rng.integers(10, 100, size=40)],
                                     add_special_tokens=False)["input_ids"])
    masked, again, *others = (data.smae_batch(documents, 80, (0.2, 0.4), words, seed)
                              for seed in ([1, 5, 2], [1, 5, 2], [1, 5, 3], [1, 4, 2], [2, 5, 2]))
    assert all(map(np.array_equal, masked[1:], again[1:]))
    assert not any(np.array_equal(masked.decoder_positions, other.decoder_positions) for other in others)
    assert [len(text) for text in masked.texts] == sorted(min(80, len(document) + 2) for document in documents)
    row, ends = np.concatenate(masked.texts), np.cumsum([len(text) for text in masked.texts])
    assert set(masked.encoder_positions) < set(masked.decoder_positions)
    for shown, at, rate in ((masked.encoder_ids, masked.encoder_positions, 0.2),
                            (masked.decoder_ids, masked.decoder_positions, 0.4)):
        mask = np.isin(np.arange(len(row)), at)
        assert (shown == row)[~mask].all() and (shown == words.mask_token_id)[mask].mean() > 0.7
        for text, hidden in zip(masked.texts, np.split(mask, ends)):
            pieces = words.convert_ids_to_tokens(text[1:-1])
            number = np.cumsum([i > 0 and piece[:2] != "##" for i, piece in enumerate(pieces)])
            length, hits = np.bincount(number), np.bincount(number, hidden[1:-1])    # of each word
            assert ((hits == 0) | (hits == length)).all() and not hidden[0] and not hidden[-1]
            assert abs(hits.sum() - round(rate * len(pieces))) <= length.max() / 2 + 0.5
            wide += length.max() > 1
    assert wide > 40   # the claim about whole words was put to the test

def test_windows_of_documents(words):
    """ A window starts anywhere; what is left of a word at its start is masked as often as a word. """
    windows = [data.smae_batch([np.arange(1, 61)], 12, (0.2, 0.4), words, [7, step]).texts[0] for step in range(2000)]
    assert {int(window[1]) for window in windows} == set(range(1, 52)) and {len(window) for window in windows} == {12}
    begins = data.word_begins(words)
    document = np.array([*np.flatnonzero(~begins)[:2], *[np.flatnonzero(begins)[-1]] * 18])   # no word begins at 0
    at = [1 in data.smae_batch([document], 22, (0.2, 0.4), words, [seed]).decoder_positions for seed in range(500)]
    assert np.mean(at) == pytest.approx(0.4, abs=0.08)

PROSE = "This passage, number {0}, goes on for at least fifteen words; its own number, as said above, is {0}"
HELD_OUT = [("Sort an array in place.", PROSE.format(0)), ("Reverse the given list.", PROSE.format(1))]
OWN = ("A query of its own", PROSE.format(2))
TRAIN = [(HELD_OUT[0][0], PROSE.format(3)), ("reverse the -- GIVEN list", PROSE.format(4)),
         ("Another for the first", PROSE.format(0)), ("Another for the second", PROSE.format(1).upper()),
         ("Another for the third", PROSE.format(1).replace(";", ",")), ("Too short", PROSE.format(5)),
         ("A query with a short passage", "Returns: bool"), OWN]

def test_docs_keep_training_and_test_apart(tmp_path, monkeypatch):
    """ Whole files are held out; neither a query nor a passage of theirs is trained on, whatever its case, punctuation
    and partner; short docstrings and files that do not parse are left out; the same package gives the same files. """
    package, files = tmp_path / "fakepackage", []
    package.mkdir()
    for module, texts in {"m6": HELD_OUT, "m0": TRAIN, "m1": [OWN], "__init__": []}.items():   # by its checksum m6 is
        (package / f"{module}.py").write_text("".join(                                         # held out, m0 and m1 not
            f'class C{i}:\n    def f(self):\n        """{query}\n\n        {passage}"""\n'
            for i, (query, passage) in enumerate(texts)))
    (package / "broken.py").write_text("def f(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(docs.sysconfig, "get_path", lambda _: str(package))   # no standard library: it takes 5 s
    for folder in (tmp_path / "once", tmp_path / "twice"):
        docs.main(folder, "fakepackage")
        files.append({path.name: path.read_bytes() for path in folder.rglob("*.*")})
    assert files[0] == files[1] and len(files[0]) == 5
    train, corpus = (list(data.read_rows(str(folder / f"{name}.jsonl"))) for name in ("train", "corpus"))
    assert train == [{"name": "fakepackage.m0.C7.f", "query": OWN[0], "positive": OWN[1]}]
    assert [(row["query"], row["text"]) for row in corpus] == HELD_OUT
    monkeypatch.setattr(data, "docs_folder", lambda: folder)
    assert pairs_of("docs") == [(OWN[0], [OWN[1]], [])] and list(data.text_rows("docs")) == [{"text": " ".join(OWN)}]
