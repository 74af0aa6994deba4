""" Pairs come out of every kind of source the same, and a batch is a function of (seed, step). """
import gzip
import json
import os
import time

import numpy as np
import pytest

import data

ROWS = [("q one", ["p one"], ["n one"], None), ("q two", ["p, two"], ["n two"], None),
        ("q three", ["p three"], ["n three"], None)]
DICTS = [{"anchor": q, "positive": p[0], "negative": n[0]} for q, p, n, _ in ROWS]


def write_csv(path, delimiter):
    import csv
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, DICTS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(DICTS)


def write(path):
    import datasets
    if ".jsonl" in path.name:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in DICTS)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(DICTS).to_parquet(path)
    else:
        write_csv(path, "\t" if ".tsv" in path.name else ",")


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.csv", "p.csv.gz", "p.tsv", "p.tsv.gz", "p.parquet"])
def test_local_files(tmp_path, name):
    """ Every format, gzipped or not, gives the same three rows, as often as one asks. """
    write(tmp_path / name)
    rows = data.load_pairs(str(tmp_path / name))
    assert len(rows) == 3 and list(rows) == ROWS == list(rows)   # twice: once for the vocabulary, once for the ids


def test_hub_name_with_config_and_split(tmp_path, monkeypatch):
    """ NAME[:CONFIG][:SPLIT] names the split of a data set, here a local copy of the hub's layout. """
    import datasets
    monkeypatch.chdir(tmp_path)   # a relative name with a slash, as on the hub
    for config, rows in (("triplet", DICTS), ("pair", [{"anchor": "q", "positive": "p"}])):
        for split in ("train", "dev"):
            path = f"sentence-transformers/all-nli/{config}/{split}-00000-of-00001.parquet"
            datasets.Dataset.from_list(rows).to_parquet(path)
    with open("sentence-transformers/all-nli/README.md", "w") as file:
        file.write("---\nconfigs:\n")
        for config in ("triplet", "pair"):
            file.write(f"- config_name: {config}\n  data_files:\n")
            file.writelines(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "dev"))
        file.write("---\n")
    assert list(data.load_pairs("sentence-transformers/all-nli:triplet")) == ROWS
    assert list(data.load_pairs("sentence-transformers/all-nli:pair:dev")) == [("q", ["p"], [], None)]


def test_tevatron_form_of_ms_marco(tmp_path):
    """ Of nested passages title and text are joined, and all negatives are kept. """
    path = tmp_path / "marco.jsonl"
    path.write_text(json.dumps({"query_id": "1", "query": "what is tea",
                                "positive_passages": [{"docid": "7", "title": "Tea", "text": "A drink."}],
                                "negative_passages": [{"docid": "8", "title": "", "text": "A tree."},
                                                      {"docid": "9", "title": "Tee", "text": "A peg."}]}) + "\n")
    assert list(data.load_pairs(str(path))) == [("what is tea", ["Tea A drink."], ["A tree.", "Tee A peg."], None)]


def test_numbered_and_missing_negatives(tmp_path):
    """ Negatives come from numbered columns, and an empty cell gives none. """
    path = tmp_path / "p.jsonl"
    path.write_text('{"query": "q", "positive": "p", "negative_1": "a", "negative_2": "b"}\n'
                    '{"query": "r", "positive": "p", "negative_1": null, "negative_2": "b"}\n')
    assert list(data.load_pairs(str(path))) == [("q", ["p"], ["a", "b"], None), ("r", ["p"], ["b"], None)]


@pytest.mark.parametrize("text, message", [
    ('{"query": "q", "positive": "p"}\n{"query"\n', "line 2: not a JSON object"),
    ("[1]\n", "line 1: not a JSON object"),
    ("", "holds no pairs"),
    ('{"query": "q", "answer": "p"}\n', "has the columns query, answer; it needs"),
])
def test_bad_files_are_named_with_the_line(tmp_path, text, message):
    """ A file that cannot be read is refused with its line, or with its columns. """
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load_pairs(str(path))


Q, STS = "query,positive\n", "sentence1,sentence2,score\n"
LONG = "long " * 40_000   # characters; the csv module takes 131,072 by default


def pair(**cells):
    """ a row of a .jsonl, by default a good one """
    return json.dumps({"query": "q", "positive": "p"} | cells) + "\n"


READ = {   # file, its content, the rows it gives
    "negative that row 1 lacks": ("p.jsonl", pair() + pair(negative="n"),
                                  [("q", ["p"], [], None), ("q", ["p"], ["n"], None)]),
    "positive that row 1 lacks": ("p.jsonl", '{"query": "q"}\n' + pair(),
                                  [("q", [], [], None), ("q", ["p"], [], None)]),
    "no text in a cell": ("p.jsonl", pair(positive=["p", "", None], negative=None) + pair(query="", negative=" "),
                          [("q", ["p"], [], None), ("", ["p"], [], None)]),
    "blanks in the header": ("p.csv", " query, positive \nq,p\n", [("q", ["p"], [], None)]),
    "blank rows": ("p.csv", f"\n{Q}\nq,p\n,\n\n", [("q", ["p"], [], None)]),
    "line break in a cell": ("p.csv", Q + '"q\nr",p\n', [("q\nr", ["p"], [], None)]),
    "quotes within a cell": ("p.tsv", 'query\tpositive\n5" nail\t"a ""b"" c"\n', [('5" nail', ['a "b" c'], [], None)]),
    "long cell": ("p.csv", f"{Q}q,{LONG}\n", [("q", [LONG], [], None)]),
    "byte order mark": ("p.csv", "\ufeff" + Q + "q,p\n", [("q", ["p"], [], None)]),
    "scores": ("p.csv", STS + "a,b,1\nc,d,-2.5e1\n", [("a", ["b"], [], 1.0), ("c", ["d"], [], -25.0)]),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(tmp_path, case):
    """ Files that look odd and have one meaning are read as they are meant. """
    name, content, rows = READ[case]
    (tmp_path / name).write_bytes(content.encode())
    found = data.load_pairs(str(tmp_path / name))
    assert list(found) == rows and len(found) == len(rows)


GZ = gzip.compress((pair() * 50).encode(), mtime=0)
REFUSED = [   # file, its content, what is said
    ("p.csv", Q + "q,p\n" * 2 + 'q,"p\n' + "q,p\n" * 38, "p.csv, line 4: a quote is not closed"),
    ("p.csv", Q + '"q" r,p\n', "p.csv, line 2: a quote is not closed or text follows it"),
    ("p.csv", Q + '"q\nr",p\nq,p,n\n', "p.csv, line 4: has 3 cells and the header 2"),
    ("p.csv", Q + '"q\nr",p,n\n', "p.csv, line 2: has 3 cells and the header 2"),
    ("p.tsv.gz", gzip.compress(b"query\tpositive\nq\n"), "p.tsv.gz, line 2: has 1 cells and the header 2"),
    ("p.csv", "query,positive,positive \nq,p,r\n", "p.csv, line 1: has the column positive twice"),
    ("p.csv", Q + "q,p\nq,p\0\n", "p.csv, line 3: is not plain UTF-8 text"),
    ("p.csv", (Q + "q,p\nq,caf\u00e9\n").encode("latin-1"), "p.csv, line 3: is not plain UTF-8 text"),
    ("p.csv", (Q + "q,p\n").encode("utf-16"), "p.csv, line 1: is not plain UTF-8 text"),
    ("p.csv", (Q + "q,p\n").encode("utf-16-le"), "p.csv, line 1: is not plain UTF-8 text"),
    ("p.jsonl.gz", pair(), "p.jsonl.gz: is no whole gzip file .*; make it again"),
    ("p.jsonl.gz", GZ[:-20], "p.jsonl.gz: is no whole gzip file"),
    ("p.jsonl.gz", GZ[:10] + b"\xff" + GZ[11:], "p.jsonl.gz: is no whole gzip file"),
    ("p.jsonl", "\n" + pair() + pair(query=None), "p.jsonl, line 3: query is None; it must be a text"),
    ("p.jsonl", pair() + '{"positive": "p"}\n', "p.jsonl, line 2: query is None; it must be a text"),
    ("p.jsonl", pair(query=["q", "r"]), r"line 1: query is \['q', 'r'\]; it must be a text"),
    ("p.jsonl", pair(query=5), "line 1: query is 5; it must be a text"),
    ("p.jsonl", pair(query={"text": "q"}), "line 1: query is {'text': 'q'}; it must be a text"),
    ("p.jsonl", pair() + pair(query="cut \ud83d"), r"line 2: query holds '\\ud83d', half of a character"),
    ("p.jsonl", pair(positive=[{"text": "\ud83d"}]), "line 1: positive text holds .*, half of a character"),
    ("p.jsonl", pair(positive=0), "line 1: positive is 0; it must be a text"),
    ("p.jsonl", pair(positive=["p", 5]), "line 1: positive is 5; it must be a text"),
    ("p.jsonl", pair(positive={"title": "t"}), "line 1: positive text is None; it must be a text"),
    ("p.jsonl", pair(negative=[{"title": 5, "text": "t"}]), "line 1: negative title is 5; it must be a text"),
    ("p.csv", STS + "a,b,1\na,b,high\n", "p.csv, line 3: the score 'high' is not a finite number"),
    ("p.csv", STS + "a,b,nan\n", "line 2: the score 'nan' is not a finite number"),
    ("p.csv", STS + "a,b,\n", "line 2: the score '' is not a finite number"),
    ("p.jsonl", f'{{"sentence1": "a", "sentence2": "b", "score": {"9" * 400}}}\n', "line 1: the score 9+ is not a"),
    ("p.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "b"}\n',
     "line 2: the score None is not a finite number"),
    ("p.parquet", [{"query": "q", "positive": "p"}, {"query": None, "positive": "p"}],
     "p.parquet, row 2: query is None"),
    ("text.jsonl", '{"text": "a"}\n{"text": ["a"]}\n', r"text.jsonl, line 2: text is \['a'\]; it must be a text"),
    ("text.jsonl", '{"text": "a"}\n{"body": "a"}\n', "text.jsonl, line 2: has the columns body; it needs text"),
    ("text.parquet", [{"text": "a"}, {"text": None}], "text.parquet, row 2: text is None; it must be a text"),
    ("text.txt", b"a\n\xe9\n", "text.txt, line 2: is not plain UTF-8 text"),
    ("sts.jsonl", '{"sentence1": "a", "sentence2": null, "score": 1}\n', "sts.jsonl, line 1: sentence2 is None"),
    ("sts.csv", STS + "a,b,inf\n", "sts.csv, line 2: the score 'inf' is not a finite number"),
    ("sts.csv", STS + 'a,"b,1\nc,d,2\n', "sts.csv, line 2: a quote is not closed"),
    ("corpus.jsonl", '{"_id": "d1", "text": ["a"]}\n', r"corpus.jsonl, line 1: text is \['a'\]; it must be a text"),
    ("corpus.jsonl", '{"_id": "d1", "text": "a", "title": 5}\n', "corpus.jsonl, line 1: title is 5; it must be a text"),
    ("corpus.jsonl", '{"_id": null, "text": "a"}\n', "corpus.jsonl, line 1: _id is None; it must be a text"),
    ("queries.jsonl", '{"_id": "q1", "text": null}\n', "queries.jsonl, line 1: text is None; it must be a text"),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0.5\n", r"line 2: needs the columns .*a whole number"),
]


@pytest.mark.parametrize("name, content, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_refused(tmp_path, beir, name, content, message):
    """ A file that is broken or holds no text where a text belongs is refused in one line that names its line. """
    import datasets
    (beir / "corpus.jsonl.gz").unlink()
    (beir / "corpus.jsonl").write_text('{"_id": "d1", "text": "a"}\n')
    path = beir / name
    if isinstance(content, list):
        datasets.Dataset.from_list(content).to_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    def read():
        kind = name.split(".")[0]
        if kind in ("corpus", "queries", "qrels/test"):
            list(data.Collection(str(beir)).shards())
        else:
            list({"p": data.load_pairs, "text": data.load_texts, "sts": data.load_sts}[kind](str(path)))
    with pytest.raises(ValueError, match=message) as stop:
        read()
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("row, columns, found", [
    ({"question": "q", "answer": "p"}, "query=question positive=answer", ("q", ["p"], [], None)),
    ({"query": "x", "anchor": "q", "positive": "p"}, "query=anchor", ("q", ["p"], [], None)),   # in place of query
    ({"query": "q", "positive": "p", "hard": "a", "harder": "b", "negative": "x"}, "negative=hard negative=harder",
     ("q", ["p"], ["a", "b"], None)),
    ({"a": "q", "b": "p", "label": "2"}, "sentence1=a sentence2=b score=label", ("q", ["p"], [], 2.0)),
    ({"a": "q", "b": "p", "score": "2"}, "sentence1=a sentence2=b", ("q", ["p"], [], 2.0)),
    ({"query": "q", "positive": "p", "score": "2"}, "query=query", ("q", ["p"], [], None)),   # no gold score of a pair
])
def test_columns_have_other_names(tmp_path, kind, row, columns, found):
    """ --columns says which of the columns is the query, the positive, the negatives or the score. """
    import datasets
    path, rows = tmp_path / f"p.{kind}", datasets.Dataset.from_list([row])
    rows.to_csv(path) if kind == "csv" else rows.to_parquet(path)
    assert list(data.load_pairs(str(path), columns.split())) == [found]


def test_columns_that_are_not_there(tmp_path, refused):
    """ --columns with an unknown kind, or a column that is not there, is refused with a list of what there is. """
    import finetune_srl
    import pretrain_smae
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "q", "answer": "p"}\n{"question": "q", "reply": "p"}\n')
    for item in ("query=body", "question=query", "text=question", "question"):
        flags = ["--train_pairs", str(path), "--out_dir", str(tmp_path / "out"), "--retrieval=", "--columns", item]
        assert f"--columns {item}: {path} has the columns question, answer, reply; " in refused(finetune_srl, flags)
    flags = ["--train_pairs", str(path), "--out_dir", str(tmp_path / "out"), "--retrieval=", "--columns"]
    said = refused(finetune_srl, [*flags, "query=question", "positive=reply", "positive=answer", "query=answer"])
    assert "--columns query=answer: is the second query" in said   # positives may be several
    for item in ("text=body", "query=question"):
        flags = ["--train_text", str(path), "--out_dir", str(tmp_path / "out"), "--columns", item]
        assert f"--columns {item}: {path}, line 1 has the columns question, answer; " in refused(pretrain_smae, flags)


def first_text(source, tokenizer, columns=()):
    """ the first document of a token file, as text """
    return tokenizer.decode(data.token_file(source, tokenizer, columns)[0])


def test_tokenised_text_is_that_of_the_source(tmp_path, tokenizer, monkeypatch):
    """ Another column, another file in a folder or of a pattern, another working directory and another way to lower
    case give another token file. """
    import datasets
    from transformers import BertTokenizer
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    def fill(folder, text, body):
        path = tmp_path / folder / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": [text, text], "body": [body, body]}).to_parquet(path)
        return path
    files = fill("a/set", "bridge", "dragon"), fill("b/set", "candle", "forest")
    for path in files:
        os.utime(path, ns=(0, 10**18))
    assert len({path.stat().st_size for path in files}) == 1   # of one size and date, and in two folders
    monkeypatch.chdir(tmp_path / "a")
    assert [first_text("set", tokenizer), first_text("set", tokenizer, ["text=body"])] == ["bridge", "dragon"]
    monkeypatch.chdir(tmp_path / "b")
    assert first_text("set", tokenizer) == first_text("set::train", tokenizer) == "candle"
    fill("b/set", "garden engine", "forest")
    assert first_text("set", tokenizer) == first_text("set::train", tokenizer) == "garden engine"
    made = len(os.listdir(data.CACHE))
    assert first_text("set", tokenizer) == "garden engine" and len(os.listdir(data.CACHE)) == made == 6
    cased = BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    about = {data.token_file(str(tmp_path / "a" / "set" / "*.parquet"), which).name for which in (tokenizer, cased)}
    fill("a/set", "bridge kitchen", "dragon")
    about.add(data.token_file(str(tmp_path / "a" / "set" / "*.parquet"), tokenizer).name)
    assert len(about) == 3


@pytest.mark.parametrize("file, spoil", [
    ("tokens.bin", lambda content: content[:len(content) // 2]), ("tokens.bin", lambda content: content + b"ab"),
    ("tokens.bin", lambda content: b""), ("ends.npy", lambda content: content[:-3]), ("ends.npy", None)])
def test_half_a_token_file(tmp_path, tokenizer, monkeypatch, file, spoil):
    """ Tokens and ends that do not belong together are refused with the way out. """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    (tmp_path / "t.txt").write_text("apple\nbridge\n")
    data.token_file(str(tmp_path / "t.txt"), tokenizer)
    folder, = data.CACHE.iterdir()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(spoil(content)) if spoil else (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{folder}: .* delete the folder"):
        data.token_file(str(tmp_path / "t.txt"), tokenizer)


def test_hold_out(tmp_path, monkeypatch):
    """ A test set of n pairs. Rows that hold one of its queries are not trained on; those that share a passage are. """
    monkeypatch.setattr(data, "CACHE", tmp_path)
    rows = [(f"query {i}", [f"text {i}"], ["n"], None) for i in range(20)]
    rows += [(f"Query, {i}!", [f"other {i}"], [], None) for i in range(20)]   # each query again
    rows += [(f"third {i}", [f"TEXT {i}."], [], None) for i in range(20)]     # each passage again
    rows += [("", ["no query"], [], None), ("no positive", [], ["n"], None)]
    train, folder = data.hold_out(rows, 6)
    collection = data.Collection(str(folder))
    (ids, texts), = collection.shards()
    corpus = dict(zip(ids, texts))
    pairs = {(collection.queries[query], corpus[document]) for query, grades in collection.qrels.items()
             for document in grades}
    drawn = [row for row in rows if row[1] and (row[0], row[1][0]) in pairs]
    assert len(drawn) == len(pairs) == 6 and sorted(texts) == sorted(text for _, text in pairs)
    def words(row):
        return {" ".join("".join(c for c in text.lower() if c.isalnum() or c == " ").split())
                for text in [row[0], *row[1]]}
    taken = set().union(*(words((row[0], [])) for row in drawn))
    assert list(train) == list(train) == [row for row in rows if not words(row) & taken]   # the same twice
    assert len(train) == len(list(train)) and ("no positive", [], ["n"], None) in list(train)
    shared = {row[1][0].lower().strip(".") for row in drawn}
    assert any(row[1] and row[1][0].lower().strip(".") in shared for row in train)
    before = {path.name: path.read_bytes() for path in folder.rglob("*.*")}
    assert set(before) == {"corpus.jsonl", "queries.jsonl", "test.tsv"}
    again, _ = data.hold_out(rows, 6)
    assert list(again) == list(train) and before == {path.name: path.read_bytes() for path in folder.rglob("*.*")}
    assert len(data.Collection(str(data.hold_out(rows, 7)[1])).qrels) == 7


def test_a_query_of_the_test_set_is_no_positive_to_train_on(tmp_path, monkeypatch):
    """ A row with a query of the test set among its positives, in whatever case, is not trained on. """
    monkeypatch.setattr(data, "CACHE", tmp_path)
    rows = [(f"query {i}", [f"text {i}"], [], None) for i in range(10)]
    rows += [(f"other {i}", ["any", f"Query, {i}!"], [], None) for i in range(10)]
    train, folder = data.hold_out(rows, 4)
    held_out = set(data.Collection(str(folder)).queries.values())
    hit = [row for row in rows if {data.fold(text) for text in (row[0], *row[1])} & held_out]
    assert len(hit) > len(held_out) == 4 and list(train) == [row for row in rows if row not in hit]


def test_a_query_that_is_held_out_twice_has_both_positives(tmp_path, monkeypatch):
    """ Held-out rows with the same query, or the same positive, become one query with both, or one document. """
    monkeypatch.setattr(data, "CACHE", tmp_path)
    pairs = [("Query", ["a"]), ("query?", ["b", "A"]), ("r", ["b"]), ("s", ["c"]), ("t", ["d"])]
    drawn = np.random.default_rng(0).permutation(5).tolist()   # hold_out draws the first three
    rows = [pairs[drawn.index(i)] + ([], None) for i in range(5)] + [("", ["x"], [], None), ("u", [], [], None)] * 9
    train, folder = data.hold_out(rows, 3)
    collection = data.Collection(str(folder))
    (_, texts), = collection.shards()
    assert len(train) == 2 + 18 and sorted(map(str.lower, texts)) == ["a", "b"]
    assert sorted(len(grades) for grades in collection.qrels.values()) == [1, 2]


def test_every_positive_of_a_held_out_row_is_an_answer(tmp_path, monkeypatch):
    """ A held-out row with several positives becomes a query with as many documents. """
    monkeypatch.setattr(data, "CACHE", tmp_path)
    _, folder = data.hold_out([(f"q{i}", [f"a{i}", f"b{i}", f"c{i}"], [], None) for i in range(6)], 2)
    collection = data.Collection(str(folder))
    (ids, texts), = collection.shards()
    corpus = dict(zip(ids, texts))
    found = {collection.queries[query]: {corpus[key] for key in grades} for query, grades in collection.qrels.items()}
    assert len(found) == 2 and found == {query: {f"{letter}{query[1]}" for letter in "abc"} for query in found}


@pytest.mark.parametrize("rows, n, message", [(10, 1, "--hold_out 1: "), (10, 9, "--hold_out 9: leaves 1 of 10 pairs"),
                                              (10, 50, "--hold_out 50: leaves 0 of 10"), (0, 2, "leaves 0 of 0")])
def test_hold_out_leaves_two_on_each_side(tmp_path, monkeypatch, rows, n, message):
    """ Fewer than two pairs to test or to train on are refused, and so are scored pairs; nothing is written. """
    monkeypatch.setattr(data, "CACHE", tmp_path)
    pairs = [(f"q{i}", [f"p{i}"], [], None) for i in range(rows)]
    with pytest.raises(ValueError, match=message):
        data.hold_out(pairs, n)
    with pytest.raises(ValueError, match="--hold_out: is for queries and passages"):
        data.hold_out([(f"q{i}", [f"p{i}"], [], 0.5) for i in range(9)], 3)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", [f"rows.{kind}{gz}" for kind in ("txt", "csv", "tsv", "jsonl") for gz in ("", ".gz")])
def test_read_rows(tmp_path, name):
    """ read_rows gives line numbers and dicts of every format, passes over blank lines, keeps quotes and accents. """
    texts, kind = ["caf\u00e9, \"noir\"", "th\u00e9 \u2615"], name.split(".")[1]
    lines = {"txt": [texts[0], "", texts[1]], "csv": ["text,id", '"caf\u00e9, ""noir""",1', f"{texts[1]},2"],
             "tsv": ["text\tid", '"caf\u00e9, ""noir"""\t1', f"{texts[1]}\t2"],
             "jsonl": [json.dumps({"text": texts[0], "id": "1"}, ensure_ascii=False), " ",
                       json.dumps({"text": texts[1], "id": "2"})]}[kind]
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    (first, a), (last, b) = data.read_rows(tmp_path / name)
    assert (first, last) == ((2, 3) if kind in ("csv", "tsv") else (1, 3))
    assert [a["text"].strip(), b["text"].strip()] == texts
    assert kind == "txt" or [a["id"], b["id"]] == ["1", "2"]


def test_train_text_from_a_table(tmp_path, tokenizer, monkeypatch):
    """ --train_text takes the column text of a .csv, line breaks in a cell included, and refuses one without it. """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    path = tmp_path / "t.csv"
    path.write_text('id,text\n1,"the apple\nstands beside"\n2,the bridge\n')
    assert list(data.load_texts(str(path))) == ["the apple\nstands beside", "the bridge"]
    found = data.token_file(str(path), tokenizer)
    texts = [tokenizer.decode(found[i]) for i in (0, 1)]
    assert texts == ["the apple stands beside", "the bridge"]
    path.write_text("id,body\n1,an apple\n")
    with pytest.raises(ValueError, match=r"t.csv, line 2: has the columns id, body; it needs text"):
        list(data.load_texts(str(path)))


@pytest.mark.parametrize("folder", [False, True])
def test_a_failed_write_leaves_nothing(tmp_path, folder):
    """ When writing fails, the error comes out, what was there before stays as it was, and nothing else is left. """
    old = tmp_path / "file"
    old.write_text("old")
    for path in (old, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="disk"), data.atomic_write(path) as part:
            if folder:
                part.mkdir()
            (part / "inside" if folder else part).write_text("half")
            raise RuntimeError("disk")
    assert os.listdir(tmp_path) == ["file"] and old.read_text() == "old"
    with data.atomic_write(old) as part:
        part.write_text("new")
        assert old.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"] and old.read_text() == "new"


def test_what_killed_runs_left_goes_after_a_day(tmp_path):
    """ A .part that nobody has written to for a day is removed; one that is written to, or another file's, stays. """
    two_days_ago = time.time() - 2 * 86_400
    for name, ages in {"file.1.part": (two_days_ago, two_days_ago), "file.2.part": (two_days_ago, time.time()),
                       "file.3.part": (time.time(), time.time()), "other.1.part": (two_days_ago, two_days_ago)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_text("")
        os.utime(tmp_path / name / "tokens.bin", (ages[1], ages[1]))
        os.utime(tmp_path / name, (ages[0], ages[0]))
    (tmp_path / "file.4.part").write_text("")
    os.utime(tmp_path / "file.4.part", (two_days_ago, two_days_ago))
    with data.atomic_write(tmp_path / "file") as part:
        part.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["file", "file.2.part", "file.3.part", "other.1.part"]


@pytest.mark.parametrize("source", ["nowhere/nothing", "nowhere.jsonl", "nowhere.parquet"])
def test_missing_sources(source):
    """ A source that is not there is named. """
    with pytest.raises(ValueError, match=source):
        data.load_pairs(source)


def test_docs_hold_out_whole_files_and_no_text_twice(tmp_path, monkeypatch):
    """ The docs corpus is split by file, without short docstrings; shared texts are in the held-out half alone. """
    prose = "This second paragraph goes on for at least fifteen words so that it counts as a passage, number {}."
    package = tmp_path / "site" / "fakepackage"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tests" / "test_x.py").write_text(f'"""A test file is left out.\n\n{prose.format("t")}"""\n')
    for i in range(40):
        (package / f"m{i}.py").write_text(
            f'class C:\n    def f(self):\n        """First  paragraph\n        number {i}.\n\n'
            f'        {prose.format(i)}\n\n        And more.\n        """\n'
            f'def shared():\n    """The same in every file.\n\n    {prose.format("shared")}"""\n'
            f'def short():\n    """Too short here.\n\n    Returns: bool"""\n')
    (package / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(data, "DOCS_PACKAGES", ["fakepackage"])
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(package))   # no standard library: it takes 5 s
    folder = data.build_docs(tmp_path / "docs")
    train, corpus = ([row for _, row in data.read_rows(folder / name)] for name in ("train.jsonl", "corpus.jsonl"))
    assert len(train) + len(corpus) == 41
    assert sum(row["query"] == "The same in every file." for row in corpus) == 1
    row = next(row for row in train if row["query"] == "First paragraph number 3.")
    assert row == {"name": "fakepackage.m3.C.f", "query": "First paragraph number 3.",
                   "positive": prose.format(3) + " And more."}
    assert {row["name"].split(".")[1] for row in train}.isdisjoint(row["name"].split(".")[1] for row in corpus)
    assert 0 < len(corpus) < len(train)
    assert (folder / "train.jsonl").read_bytes() == (data.build_docs(tmp_path / "again") / "train.jsonl").read_bytes()


def docs_of(site, modules, monkeypatch):
    """ {module: [(query, passage), ...]} of a package that is made here -> the folder of its docs corpus """
    (site / "fakepackage").mkdir(parents=True)
    for module, texts in ({"__init__": []} | modules).items():
        (site / "fakepackage" / f"{module}.py").write_text("".join(
            f'def f{i}():\n    """{query}\n\n    {passage}"""\n' for i, (query, passage) in enumerate(texts)))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(data, "DOCS_PACKAGES", ["fakepackage"])
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(site / "fakepackage"))   # no standard library
    return data.build_docs(site.parent / "docs")


# By the checksum of their names these two modules are held out, and the other two are not.
HELD_OUT, TRAIN = ("m6", "m7"), ("m0", "m1")


def test_dev_queries_are_no_test_queries(tmp_path, monkeypatch):
    """ The docs corpus has 1,000 test queries and 500 dev queries, and no query is in both. """
    text = "is what the passage with the number {} says in its at least fifteen words, as all of them say {}"
    modules = {m: [(f"query number {m} {i}", text.format(f"{m} {i}", i)) for i in range(800)] for m in HELD_OUT}
    modules |= {TRAIN[0]: [("query of the train half", text.format("x", "y"))]}
    folder = docs_of(tmp_path / "site", modules, monkeypatch)
    test, dev = (data.Collection(f"{folder}:{split}") for split in ("test", "dev"))
    assert len(test.queries) == 1000 and len(dev.queries) == 500 and not set(test.queries) & set(dev.queries)
    assert not set(test.queries.values()) & set(dev.queries.values())


def test_no_query_or_passage_of_the_held_out_half_is_trained_on(tmp_path, monkeypatch):
    """ Neither a query nor a passage is in both halves, whatever its case, its punctuation and its partner. """
    passages = [f"This passage, number {i}, goes on for at least fifteen words; its own number, as said, is {i}"
                for i in range(5)]
    held_out = [("Sort an array in place.", passages[0]), ("Reverse the given list.", passages[1])]
    train = [("Sort an array in place.", passages[2]), ("reverse the -- GIVEN list", passages[3]),   # queries again
             ("Another query for the first", passages[0]), ("Another query for the second", passages[1].upper()),
             ("Another query for the third", passages[1].replace(";", ",")), ("A query of its own", passages[4])]
    folder = docs_of(tmp_path / "site", {HELD_OUT[0]: held_out, TRAIN[0]: train, TRAIN[1]: train[-1:]}, monkeypatch)
    assert [row["query"] for _, row in data.read_rows(folder / "train.jsonl")] == ["A query of its own"]
    assert [row["query"] for _, row in data.read_rows(folder / "corpus.jsonl")] == [query for query, _ in held_out]


@pytest.fixture
def pairs():
    """ row i: query [i], positives [100 + i] (and [200 + i] in even rows), i % 4 negatives """
    ids = lambda *values: np.array(values)
    return data.Pairs([ids(i) for i in range(10)],
                      [[ids(100 + i)] + [ids(200 + i)] * (i % 2 == 0) for i in range(10)],
                      [[ids(300 + 10 * i + k) for k in range(i % 4)] for i in range(10)], [])


def test_a_batch_is_a_function_of_seed_and_step(pairs):
    """ A batch is the same in any order of calls, and another one for another seed, step or epoch. """
    def batch(seed, step):
        return [text.tolist() for part in data.srl_batch([pairs], 4, 2, 9, seed, step)[:2] for text in part]
    first = [batch(1, step) for step in (0, 1, 2, 3)]
    assert [batch(1, step) for step in (3, 2, 1, 0)] == first[::-1]
    assert batch(2, 0) != first[0] and first[0] != first[1]
    rows, others = ([[int(query[0]) for query in data.srl_batch([pairs], 5, 0, 9, seed, step)[0]] for step in range(4)]
                    for seed in (1, 2))
    assert rows != others                           # the order is another one for another seed
    assert rows[0] + rows[1] != rows[2] + rows[3]   # the second epoch has an order of its own


def test_batches_align_and_cover_an_epoch(pairs):
    """ Passage i is a positive of query i, at most two negatives a query follow, and an epoch sees every row once. """
    seen = []
    for step in (0, 1):
        queries, passages, *_ = data.srl_batch([pairs], 5, 2, 9, 1, step)
        rows = [int(query[0]) for query in queries]
        seen += rows
        assert [int(p[0]) % 100 for p in passages[:5]] == rows
        assert len(passages) == 5 + sum(min(2, row % 4) for row in rows)
        assert {(int(p[0]) - 300) // 10 for p in passages[5:]} == {row for row in rows if row % 4}
    assert sorted(seen) == list(range(10))


def test_every_positive_and_every_negative_has_its_turn(pairs):
    """ Over the steps a row gives each of its positives, and each of its negatives, about equally often. """
    drawn = [int(p[0]) for step in range(300) for p in data.srl_batch([pairs], 10, 1, 9, 1, step)[1]]
    count = {value: drawn.count(value) for value in (100, 200, 330, 331, 332)}   # of row 0, and of row 3
    assert count[100] + count[200] == count[330] + count[331] + count[332] == 300
    assert min(count[100], count[200]) > 120 and min(count[330], count[331], count[332]) > 70


def test_orders_of_two_seeds_have_nothing_in_common():
    """ No epoch of a seed has the order of any epoch of another, and each seed has its own turns of the sources. """
    orders = {tuple(data.epoch_order(30, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    sources = [data.Pairs([np.array([i])] * 20, [[np.array([i])]] * 20, [[]] * 20, []) for i in range(3)]
    def turns(seed):   # the source of each batch of an epoch
        return tuple(int(data.srl_batch(sources, 2, 0, 9, seed, step)[0][0][0]) for step in range(30))
    assert len({turns(seed) for seed in range(4)}) == 4


def test_a_batch_is_of_one_source():
    """ Each batch holds rows of one source only, sources take turns in proportion to their size, and an epoch sees
    every row once. """
    ids = lambda *values: np.array(values)
    def source(first, rows):
        return data.Pairs([ids(first + i) for i in range(rows)], [[ids(first + i)] for i in range(rows)],
                          [[]] * rows, [])
    sources = [source(100, 12), source(200, 4), source(300, 9)]   # 3, 1 and 2 batches of 4; one row of the last is left
    batches = [[int(q[0]) for q in data.srl_batch(sources, 4, 0, 9, 1, step)[0]] for step in range(12)]
    turns = [batch[0] // 100 for batch in batches]
    assert all({row // 100 for row in batch} == {turn} for batch, turn in zip(batches, turns))
    assert sorted(turns[:6]) == sorted(turns[6:]) == [1, 1, 1, 2, 3, 3] and turns[:6] != turns[6:]
    for epoch in (batches[:6], batches[6:]):
        rows = sum(epoch, [])
        assert len(set(rows)) == 24 and set(range(100, 112)) | set(range(200, 204)) <= set(rows)


def test_scored_pairs(tmp_path, tokenizer):
    """ Columns sentence1, sentence2 and score give pairs whose gold scores follow them into the batch. """
    path, words = tmp_path / "sts.csv", ["apple", "bridge", "candle", "dragon", "engine", "forest"]
    lines = [f"{word},the {word},{i}.5\n" for i, word in enumerate(words)]
    path.write_text("sentence1,sentence2,score\n" + "".join(lines))
    rows = list(data.load_pairs(str(path)))
    assert rows[1] == ("bridge", ["the bridge"], [], 1.5)
    queries, passages, _, gold = data.srl_batch([data.tokenize_pairs(rows, tokenizer, 9, 9)], 5, 1, 9, 1, 0)
    found = [tokenizer.decode(query, skip_special_tokens=True) for query in queries]
    assert len(passages) == 5 and gold.tolist() == [words.index(word) + 0.5 for word in found] != sorted(gold)


def test_worked_example_of_whole_word_mask():
    """ The example of whole_word_mask's docstring comes out, and a larger rate masks the next word as well. """
    tokens = "[CLS] the dra ##gon sleeps [SEP]".split()
    class Shuffle:   # of [CLS] the dragon sleeps [SEP]: the smallest number comes first
        random = staticmethod(lambda words: np.array([0, 0.9, 0.1, 0.5, 0]))
    masks = data.whole_word_mask(np.array([token[:2] != "##" for token in tokens]), [0.5, 0.75], Shuffle)
    found = [[token for token, hidden in zip(tokens, mask) if hidden] for mask in masks]
    assert found == [["dra", "##gon"], ["dra", "##gon", "sleeps"]]


def test_the_budget_of_a_mask_is_rounded():
    """ Of words of one token as many are masked as the rounded budget says, and a word whose middle is where the budget
    ends is masked. """
    for words in range(1, 20):
        one, other = data.whole_word_mask(np.ones(words + 2, bool), [0.28, 0.4], np.random.default_rng(words))
        assert (one.sum(), other.sum()) == (round(0.28 * words), round(0.4 * words))
    mask, = data.whole_word_mask(np.array([True, True, False, True]), [0.5], np.random.default_rng(0))
    assert mask.tolist() == [False, True, True, False]   # one word of two tokens, and a budget of 1


def test_a_number_sign_begins_a_word():
    """ Two number signs mark the piece that goes on with a word; a single one is a word like any other. """
    from transformers import BertTokenizer
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "#"]
    begins = data.word_begins(BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}))
    assert dict(zip(pieces, begins)) == dict.fromkeys(pieces, True) | {"##a": False}


def test_windows_of_long_passages():
    """ A window keeps [CLS] and [SEP] and one piece: the beginning or, as often, any. """
    text, rng = np.arange(20), np.random.default_rng(0)
    found = [data.window(text, 8, rng).tolist() for _ in range(2000)]
    assert all(w[0] == 0 and w[-1] == 19 and w[1:-1] == list(range(w[1], w[1] + 6)) for w in found)
    share = np.bincount([w[1] for w in found], minlength=14) / len(found)     # a window begins at 1 .. 13
    assert abs(share[1] - (0.5 + 0.5 / 13)) < 0.04 and all(abs(share[2:] - 0.5 / 13) < 0.02) and len(share) == 14
    assert data.window(text, 20, rng) is text
    pairs = data.Pairs([np.arange(20)] * 4, [[text]] * 4, [[text]] * 4, [])
    queries, passages, same, _ = data.srl_batch([pairs], 4, 1, 8, 1, 0)
    assert [len(q) for q in queries] == [20] * 4 and [len(p) for p in passages] == [8] * 8
    assert same.sum() == 4 * 8 - 4 and len({p.tobytes() for p in passages}) > 1   # copies, cut to different windows


def test_checksum_of_pairs(pairs):
    """ The checksum, by which --resume knows its data, changes with any text, any score and the order of the rows. """
    def changed(field, row, value):
        values = list(getattr(pairs, field))
        values[row] = value
        return pairs._replace(**{field: values})
    one, found = np.array([1000]), {data.checksum(pairs), data.checksum(pairs._replace(gold=[0.5] * 10))}
    others = [changed("queries", 9, one), changed("positives", 9, [one]), changed("negatives", 9, [one])]
    found |= {data.checksum(other) for other in [*others, data.Pairs(*(part[::-1] for part in pairs))]}
    assert len(found) == 6 and data.checksum(pairs) == data.checksum(changed("queries", 9, pairs.queries[9].copy()))


def test_tokenize_pairs(pairs_file, tokenizer):
    """ Lengths are cut, rows stay aligned, ids are the tokenizer's. """
    pairs = data.tokenize_pairs(data.load_pairs(pairs_file), tokenizer, 5, 64)
    assert len(pairs.queries) == 64 and max(map(len, pairs.queries)) == 5 and not any(pairs.negatives)
    text = tokenizer.decode(pairs.positives[9][0], skip_special_tokens=True)
    assert text == "the bridge stands beside the jacket in the morning"


def test_ids_beyond_16_bits():
    """ Of a vocabulary of 70,000 words the last one keeps its id. """
    from transformers import BertTokenizer
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(70_000)]
    ids, = data.tokenize(["word69999"], BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}), 8)
    assert ids.tolist() == [2, 70_004, 3]


def test_documents_without_a_token_are_left_out(tokenizer):
    """ A text in which the tokenizer finds nothing is no document. """
    found = data.tokenize_documents(["", "apple", " \u200b", "bridge"], tokenizer)
    assert [tokenizer.decode(document) for document in found] == ["apple", "bridge"]


def test_long_documents_are_not_cut(tokenizer, monkeypatch):
    """ A document keeps all of its tokens, whatever length the tokenizer is meant for: windows are drawn from it. """
    monkeypatch.setattr(tokenizer, "model_max_length", 4)
    document, = data.tokenize_documents(["apple bridge candle dragon engine forest"], tokenizer)
    assert tokenizer.decode(document) == "apple bridge candle dragon engine forest"


def test_one_document_is_too_few(tmp_path, tokenizer, monkeypatch):
    """ Text of a single document is refused, because one is held out; nothing of it stays in the cache. """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    (tmp_path / "t.txt").write_text("apple\n\n")
    with pytest.raises(ValueError, match="holds 1 documents with text; give two or more"):
        data.token_file(str(tmp_path / "t.txt"), tokenizer)
    assert not list(data.CACHE.iterdir())


def test_sts_of_the_hub(monkeypatch):
    """ An STS set of the hub is known by a short name, and its test split is read. """
    rows, asked = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (1, 2)], []
    monkeypatch.setattr(data, "load_table", lambda source, what: asked.append(source) or rows)
    assert data.load_sts("sts12")[0] == "sts12" and data.load_sts("stsb")[3].tolist() == [1, 2]
    assert asked == ["mteb/sts12-sts::test", "sentence-transformers/stsb::test"]


def test_rows_without_a_query_or_a_positive_are_left_out(tokenizer, capsys):
    """ Rows without a query or a positive are left out, which is said, and when no row is left, that is said. """
    rows = [("apple", [], ["bridge"], None), (" ", ["apple"], [], None), ("garden", ["candle"], ["dragon"], None)]
    pairs = data.tokenize_pairs(rows, tokenizer, 8, 8)
    assert capsys.readouterr().out == "2 of 3 pairs are left out, because they have no query or no positive\n"
    found = (pairs.queries, *pairs.positives, *pairs.negatives)
    texts = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in found]
    assert texts == ["garden", "candle", "dragon"]   # what follows the row is still aligned
    with pytest.raises(ValueError, match="not a single row has a query and a positive"):
        data.tokenize_pairs(rows[:1], tokenizer, 8, 8)


def test_vocabulary_is_the_same_every_time():
    """ The same texts give the same vocabulary, although the trainer breaks ties by the order of a hash table. """
    texts = [f"where is the {a}dge {b}ine" for a in "bri led wed".split() for b in "eng mar sal".split()] * 3
    vocabularies = [data.train_wordpiece(iter(texts), 120).get_vocab() for _ in range(6)]
    assert all(v == vocabularies[0] for v in vocabularies) and vocabularies[0]["[PAD]"] == 0


def test_dev_of_a_hub_set_is_its_validation(monkeypatch):
    """ Training asks a BEIR set of the hub for :dev, which the hub calls validation; other splits keep their name. """
    tables = {"qrels": [{"query-id": "1", "corpus-id": 2, "score": 1}], "queries": [{"_id": "1", "text": "why"}]}
    asked = []
    def load_table(source, what):
        asked.append(source)
        return tables["qrels" if "qrels" in source else "queries"]
    monkeypatch.setattr(data, "load_table", load_table)
    for name in ("scifact:dev", "scifact", "scifact:train"):
        assert data.Collection(name).qrels == {"1": {"2": 1}}
    assert [name for name in asked if "qrels" in name] == [f"BeIR/scifact-qrels::{split}"
                                                           for split in ("validation", "test", "train")]
