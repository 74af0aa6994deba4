"""
How good is each size of a model, and what does it cost? One pass over the texts gives the embeddings of all sizes.

    python evaluate.py out/srl                                 # retrieval in this machine's documentation, beside BM25
    python evaluate.py out/srl --search "invert a matrix"      # ask that documentation, or a folder: --texts notes
    python evaluate.py out/srl --sts stsb sts12 my_pairs.jsonl --retrieval scifact my_beir_folder:dev --speed
    python evaluate.py sentence-transformers/all-MiniLM-L6-v2 --sts stsb --grid     # any BERT, layers x dims
    python evaluate.py --compare a/eval.json b/eval.json --plot figure.svg          # which are significant
    python evaluate.py out/srl --export 2:16 out/small         # a folder for sentence-transformers and transformers

Prints a table and writes its values to --out, or to MODEL/eval.json if that is a folder with sizes of its own; see
evaluate_model. STS: Spearman's rank correlation of the cosine. Retrieval: exact search in shards, so of the corpus only
the ids stay in memory; equal scores rank as in trec_eval. MS MARCO (8.8 M passages) at six sizes of BERT-base needs
about 1.3 GB.

Reading order: embed_ids, from texts to embeddings; METRICS; sts; retrieval, which is search_corpus -> best_documents ->
METRICS.
Letters for shapes: see model.py; here P passages of a shard, K documents that are kept for a query.
"""
import argparse, contextlib, itertools, json, os, re, statistics, sys, time, zlib
from pathlib import Path

import numpy as np
import scipy   # its parts load when they are first used: scipy.stats alone takes most of a second
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (POOLINGS, SIMILARITIES, HelpFormatter, autocast, check_sizes, cut, cut_vocabulary, device_arg,
                   find_folder, git_commit, keep_freed_memory, load_model, named_sizes, pack, parse_sizes, positive_int,
                   read_json, readable, run_script, save_pretrained, score, shorten, size_name, text_length)

# ---- embeddings ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def embed_ids(model, token_ids, layers, dtype="float32", batch_tokens=8192, desc="encoding"):
    """ list of B (T,) arrays of token ids -> {layer: (B, C) float32 on the CPU}. A batch has batch_tokens or fewer,
    or one text. Ranks share the batches, so all of them must call this with the same texts. """
    B, device, training = len(token_ids), model.word.weight.device, model.training
    model.eval()   # no dropout, also in the middle of a training
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world_size > 1:   # a batch for every rank, also of few texts
        batch_tokens = min(batch_tokens, sum(map(len, token_ids)) // world_size)
    batches = batches_by_length(token_ids, batch_tokens)
    embeddings = {layer: torch.zeros(B, model.config.hidden_size) for layer in layers}
    no_bar = True if B < 1000 or rank > 0 else None   # None: tqdm shows it where stderr is a terminal
    # one autocast around all batches, because it casts every weight once and keeps the copy
    with autocast(device, dtype), tqdm(total=B, desc=desc, unit=" texts", leave=False, disable=no_bar) as bar:
        for rows in batches[rank::world_size]:   # rows: numbers of texts
            batch = pack([token_ids[i] for i in rows], device, multiple=128)
            for layer, pooled in model.encode(batch, layers).items():   # (B of the batch, C)
                if not pooled.isfinite().all():
                    raise FloatingPointError(f"layer {layer} gave embeddings that are not finite; try --dtype float32")
                embeddings[layer][rows] = pooled.float().cpu()
            bar.update(len(rows) * world_size)
    model.train(training)
    return gather_rows(embeddings, device) if world_size > 1 else embeddings

def batches_by_length(token_ids, batch_tokens):
    """ list of (T,) ids -> lists of their numbers: equal lengths side by side (see model.Pack), and texts x the longest
    of them is batch_tokens or less, but for a single longer text """
    batches = []
    for i in sorted(range(len(token_ids)), key=lambda i: len(token_ids[i])):
        if not batches or (len(batches[-1]) + 1) * len(token_ids[i]) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches

def embed_texts(model, tokenizer, texts, layers, dtype="float32", batch_tokens=8192, desc="encoding"):
    """ list of B strings -> {layer: (B, C) float32 on the CPU} """
    input_ids = data.tokenize(texts, tokenizer, tokenizer.model_max_length)
    return embed_ids(model, input_ids, layers, dtype, batch_tokens, desc)

# ---- metrics ---------------------------------------------------------------------------------------------------------
def spearman(x, y):
    """ (n,), (n,) -> Spearman's rank correlation, ties at their mean rank; 0 where all of x or all of y are equal """
    return float(scipy.stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0

def mrr_at_10(ranked, grades):
    """ ranked document ids, {document id: grade} -> 1 / rank of the first relevant one among ten, else 0 """
    return next((1 / i for i, doc in enumerate(ranked[:10], start=1) if grades.get(doc, 0) > 0), 0.0)

def ndcg_at_10(ranked, grades):
    """ discounted gain of the first ten over that of the best possible ten; gain is the grade itself """
    discount = 1 / np.log2(np.arange(2, 12))
    gain = np.array([max(0, grades.get(doc, 0)) for doc in ranked[:10]])
    ideal = np.array(sorted((max(0, grade) for grade in grades.values()), reverse=True)[:10])
    return float(gain @ discount[:len(gain)] / max(ideal @ discount[:len(ideal)], 1e-12))

def recall_at_100(ranked, grades):
    """ share of the relevant documents that are among the first hundred """
    relevant = {doc for doc, grade in grades.items() if grade > 0}
    return len(relevant & set(ranked[:100])) / max(1, len(relevant))

# name -> function of the 100 best document ids of a query, best first, and of {document id: grade}
METRICS = {"MRR@10": mrr_at_10, "nDCG@10": ndcg_at_10, "Recall@100": recall_at_100}

def record(task, metric, size, value, n):
    """ one value as it stands in eval.json: of a task with n queries or pairs """
    return {"task": task, "metric": metric, "layer": size[0], "dim": size[1], "value": value, "n": n}

# ---- STS -------------------------------------------------------------------------------------------------------------
def sts(model, tokenizer, name, sizes, dtype, batch_tokens=8192):
    """ every size on one STS set -> records, per-item values (cosines of the pairs). Raises as data.load_sts does. """
    task, first, second, gold = data.load_sts(name)
    texts = list(dict.fromkeys(first + second))   # each sentence once
    row = {text: i for i, text in enumerate(texts)}
    left, right = [row[text] for text in first], [row[text] for text in second]   # (n,) rows of texts
    embeddings = embed_texts(model, tokenizer, texts, {layer for layer, _ in sizes}, dtype, batch_tokens, task)
    records, per_item = [], {"gold": gold.tolist()}
    for layer, dim in sizes:
        x = shorten(embeddings[layer], dim, "cosine")         # (texts, D)
        cosine = (x[left] * x[right]).sum(-1).numpy()         # (n,)
        if np.ptp(cosine) == 0:
            print(f"{task} {layer}:{dim}: the cosine of every pair is {cosine[0]:.4f}; Spearman counts as 0")
        records.append(record(task, "Spearman", (layer, dim), spearman(cosine, gold), len(gold)))
        per_item[size_name((layer, dim))] = {"Spearman": cosine.tolist()}
    return records, per_item

# ---- retrieval: search_corpus -> best_documents -> METRICS -> records ------------------------------------------------
# "docs" are numbers of documents in the order of the corpus, doc_ids[number] is the id. Empty places score -inf.
BM25 = (None, None)   # stands where a size stands: BM25 has no layers and no dims
K = 200               # documents kept for a query: the metrics look at 100, the others are room for equal scores

def retrieval(model, tokenizer, name, sizes, dtype, batch_tokens=8192, embeddings_dir=None, runs_dir=None):
    """ every size, and BM25 if the corpus is one shard -> records, per-item values; raises as data.Collection does """
    collection = data.Collection(name)
    found, doc_ids = search_corpus(model, tokenizer, collection, sizes, dtype, batch_tokens, embeddings_dir)
    if len(doc_ids) <= data.SHARD:
        found[BM25] = search_bm25(collection)
    records, per_item = [], {"ids": list(collection.queries)}
    for size, (scores, docs) in found.items():
        label = "BM25" if size == BM25 else size_name(size)
        rankings = best_documents(scores, docs, doc_ids)   # ([id], [score]) of each query, in the order of qrels
        ranked_ids = [ids for ids, _ in rankings]
        per_item[label] = {}
        for metric, function in METRICS.items():
            values = [function(ids, grades) for ids, grades in zip(ranked_ids, collection.qrels.values())]
            per_item[label][metric] = values
            records.append(record(collection.task, metric, size, float(np.mean(values)), len(values)))
        if runs_dir:
            write_run(Path(runs_dir), f"{collection.task}-{label}".replace(":", "-"), collection.queries, rankings)
    return records, per_item

def search_corpus(model, tokenizer, collection, sizes, dtype, batch_tokens, embeddings_dir):
    """ Exact search, one shard of the corpus after the other, with one pass of the encoder for all sizes
    -> {size: (scores (Q, K), docs (Q, K))}, doc_ids """
    Q = len(collection.queries)
    widest = widest_dims(sizes)
    def embed(texts):   # -> {layer: (texts, C)}
        return embed_texts(model, tokenizer, texts, list(widest), dtype, batch_tokens)
    queries = embed(list(collection.queries.values()))                                 # {layer: (Q, C)}
    best, doc_ids = {size: no_documents(Q) for size in sizes}, []
    about = made_by(model, tokenizer, dtype) if embeddings_dir else ""
    for shard, (ids, texts) in enumerate(collection.shards()):
        prefix = shard_prefix(embeddings_dir, f"{collection.task}-{shard:04}-{about}", texts)   # None: keep no files
        passages = load_or_embed(prefix, widest, texts, embed)                         # {layer: (P, C or widest dim)}
        own_column = own_documents(collection.queries, ids)
        for layer, dim in sizes:
            for start in range(0, Q, 1024):   # 1,024 queries and a shard have 100 MB of scores
                rows = slice(start, start + 1024)
                scores = score(queries[layer][rows], passages[layer], dim, model.config.similarity)   # (rows, P)
                keep_best(best[layer, dim], rows, scores, len(doc_ids), own_column)
        doc_ids += ids
    return best, doc_ids

def widest_dims(sizes):
    """ -> {layer: the largest dim of its sizes} """
    widest = {}
    for layer, dim in sorted(sizes):
        widest[layer] = dim   # ascending, so the largest comes last and stays
    return widest

def no_documents(Q, dtype=torch.float32):
    """ -> scores (Q, K), docs (Q, K): all places empty """
    return torch.full((Q, K), -np.inf, dtype=dtype), torch.zeros(Q, K, dtype=torch.long)

def keep_best(best, rows, scores, first_doc, own_column):
    """ Merge a shard into best = (scores (Q, K), docs (Q, K)), for the queries in `rows`, a slice of the Q. scores
    (rows, P), changed in place: of these queries and the documents first_doc, first_doc + 1, ... own_column: see
    own_documents """
    best_scores, best_docs = best
    for row, column in own_column.items():
        if rows.start <= row < rows.stop:
            scores[row - rows.start, column] = -np.inf
    new_scores, columns = scores.topk(min(K, scores.shape[1]))                 # (rows, K), or (rows, P) if P < K
    both_scores = torch.cat([best_scores[rows], new_scores], dim=1)            # (rows, K + K), or K + P
    both_docs = torch.cat([best_docs[rows], first_doc + columns], dim=1)       # (rows, K + K), or K + P
    best_scores[rows], kept = both_scores.topk(K)                              # (rows, K)
    best_docs[rows] = both_docs.gather(1, kept)

def best_documents(scores, docs, doc_ids):
    """ scores (Q, K), docs (Q, K) -> [([document id], [score]) of each query]: the 100 best, best first, equal scores
    by descending id, as in trec_eval """
    rankings = []
    for values, numbers in zip(scores.tolist(), docs.tolist()):   # K each
        hits = [(value, doc_ids[i]) for value, i in zip(values, numbers) if value > -np.inf]
        hits = sorted(hits, reverse=True)[:100]                   # by score, then by id
        rankings.append(([key for _, key in hits], [value for value, _ in hits]))
    return rankings

# ==== Below: the jobs of this script and their flags ==================================================================
# evaluate: evaluate_model, cost, print_table | --search: search, funnel | --export: export, write_card | --speed: speed
# --compare: compare | --plot: plot | --embeddings_dir: load_or_embed | BM25: search_bm25, bm25
# ---- all tasks at all sizes: what main calls for every model ---------------------------------------------------------
def evaluate_model(name, model, tokenizer, sizes, args):
    """ all tasks at all sizes, the table, and the file of the results -> [path of that file], or [] without one.
    In the file, with layer and dim null for BM25, and per_item for --compare:
      "results": [{"task": "docs", "metric": "MRR@10", "layer": 1, "dim": 8, "value": 0.135, "n": 1000}, ...]
      "per_item": {"docs": {"ids": [of the queries], "1:8": {"MRR@10": [one value a query], ...}, ...},
                   "stsb": {"gold": [scores], "1:8": {"Spearman": [one cosine a pair]}, ...}} """
    start = time.time()
    if args.grid:
        dims = sorted({dim for _, dim in sizes})
        sizes = tuple((layer, dim) for layer in range(1, model.config.num_hidden_layers + 1) for dim in dims)
    out = check_outputs(name, model, args)
    results, per_item = [], {}
    for task in args.sts:
        records, per_item[data.task_name(task)] = sts(model, tokenizer, task, sizes, args.dtype, args.batch_tokens)
        results += records
    if len(args.sts) > 1:
        for size, values in by_size(results).items():
            results.append(record("mean of STS", "Spearman", size, statistics.fmean(values.values()), len(args.sts)))
    for task in args.retrieval or ([] if args.sts else ["docs"]):
        records, per_item[data.task_name(task)] = retrieval(
            model, tokenizer, task, sizes, args.dtype, args.batch_tokens, args.embeddings_dir, args.save_run)
        results += records
    results += cost(model, sizes)
    if args.speed:
        results += speed(model, tokenizer, sizes, args.dtype, args.batch_tokens)
    if out:
        run = {"model": str(name), "commit": git_commit(), "python": sys.version.split()[0],
               "torch": torch.__version__, "numpy": np.__version__, "dtype": args.dtype, "device": args.device,
               "max_length": tokenizer.model_max_length, "seconds": time.time() - start, "command": sys.argv,
               "results": results, "per_item": per_item}
        Path(out).write_text(json.dumps(run, allow_nan=False) + "\n")
    title = f"{name}, {args.dtype}, {time.time() - start:.0f} s" + (f", written to {out}" if out else "")
    print_table(results, title, named_sizes(model.config))
    return [str(out)] if out else []

def check_outputs(name, model, args):
    """ -> where the results go: --out, or eval.json in the folder of a model with sizes of its own, else None. Raises
    ValueError, before the minutes of an evaluation, where nothing can be written. """
    ours = model.config.sizes and Path(name).exists()
    out = args.out or (Path(name) / "eval.json" if ours else None)
    if not out and (args.plot or args.compare):
        raise ValueError("--compare and --plot: this model's results go into no file of its own; add --out FILE.json")
    if out and Path(out).is_file() and not re.search(r'"per_item"|^\s*$', Path(out).read_text(errors="replace")):
        raise ValueError(f"--out {out}: holds what evaluate.py did not write; choose another file")
    for folder in filter(None, (args.embeddings_dir, args.save_run)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for path in map(Path, filter(None, (out, args.plot))):
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise ValueError(f"{path}: no file can be written there; choose another --out or --plot")
    return out

def by_size(results):
    """ records -> {(layer, dim): {(task, metric): value}} """
    found = {}
    for r in results:
        found.setdefault((r["layer"], r["dim"]), {})[r["task"], r["metric"]] = r["value"]
    return found

# ---- for embed_ids and retrieval: ranks, files of embeddings and of runs, BM25 ---------------------------------------
def gather_rows(embeddings, device):
    """ {layer: (B, C)}, 0 in the rows of other ranks -> all rows on every rank: a sum that gathers """
    for layer, rows in embeddings.items():
        rows = rows.to(device)
        dist.all_reduce(rows)
        embeddings[layer] = rows.cpu()
    return embeddings

def made_by(model, tokenizer, dtype):
    """ checksum of whatever decides the embedding of a text, for the names of files """
    weights = [zlib.crc32(parameter.detach().cpu().numpy()) for parameter in model.parameters()]
    config = [getattr(model.config, key) for key in ("pooling", "num_attention_heads", "hidden_act", "layer_norm_eps")]
    about = [weights, config, data.about_tokenizer(tokenizer), tokenizer.model_max_length, dtype]
    return f"{zlib.crc32(repr(about).encode()):08x}"

def shard_prefix(embeddings_dir, name, texts):
    """ how the names of the files begin that keep a shard's embeddings; None without --embeddings_dir """
    return Path(embeddings_dir, f"{name}-{zlib.crc32(repr(texts).encode()):08x}") if embeddings_dir else None

def load_or_embed(prefix, widest, texts, embed):
    """ texts -> {layer: (P, C)}; with a prefix {layer: (P, widest dim)} from the .npy files whose names begin so, made
    when one is missing or of another shape """
    if not prefix:
        return embed(texts)
    files = {layer: Path(f"{prefix}-layer{layer}-dims{dim}.npy") for layer, dim in widest.items()}
    with readable(f"{prefix}...npy: embeddings that cannot be read", "delete the files, they will be made again"):
        whole = all(path.exists() and np.load(path, mmap_mode="r").shape == (len(texts), widest[layer])
                    for layer, path in files.items())
    if not whole:
        for layer, embeddings in embed(texts).items():                                 # (P, C)
            with data.atomic_write(files[layer]) as part, open(part, "wb") as out:
                np.save(out, embeddings[:, :widest[layer]].numpy())
    return {layer: torch.from_numpy(np.load(path)) for layer, path in files.items()}

def own_documents(queries, ids):
    """ {row of a query: column of the document with the same id}. In some BEIR sets (ArguAna) the queries are
    documents, too; a document is no answer to itself. """
    column_of = {key: column for column, key in enumerate(ids)}
    return {row: column_of[key] for row, key in enumerate(queries) if key in column_of}

def search_bm25(collection):
    """ a corpus of one shard -> scores (Q, K), docs (Q, K), as search_corpus gives them for a size """
    (ids, texts), = collection.shards()
    scores = torch.from_numpy(bm25(texts, list(collection.queries.values())).toarray())    # (Q, P)
    scores[scores == 0] = -np.inf                                              # not a word in common: not found
    best = no_documents(len(scores), scores.dtype)
    keep_best(best, slice(0, len(scores)), scores, 0, own_documents(collection.queries, ids))
    return best

def bm25(texts, queries, k1=1.2, b=0.75):
    """ list of P texts, list of Q texts -> sparse (Q, P) BM25 scores (Lucene's defaults; words: letters or digits):
    the sum over the words of the query of  idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length)) """
    def split(text):
        return re.findall(r"[^\W_]+", text.lower())   # at underscores too: names of functions become words
    texts, queries = [split(text) for text in texts], [split(query) for query in queries]
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in texts for word in text}))}
    def count_words(texts):   # -> sparse (texts, V)
        pairs = [(row, vocabulary[word]) for row, text in enumerate(texts) for word in text if word in vocabulary]
        rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
        # repeats are summed
        return scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(texts), len(vocabulary)))
    tf = count_words(texts)                                                            # term frequency
    df = np.bincount(tf.indices, minlength=len(vocabulary))                            # (V,) texts with the word
    idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))                             # (V,)
    length = np.asarray(tf.sum(axis=1)).ravel()                                        # (P,)
    norm = np.repeat(k1 * (1 - b + b * length / max(length.mean(), 1e-9)), np.diff(tf.indptr))   # of each entry
    tf.data = tf.data * (k1 + 1) / (tf.data + norm) * idf[tf.indices]
    return count_words(queries) @ tf.T                                                 # (Q, P)

def write_run(folder, label, queries, rankings):
    """ FOLDER/LABEL.run, one line a hit, in the format of trec_eval """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{label}.run", "w") as file:
        for query, (ranked, values) in zip(queries, rankings):
            file.writelines(f"{query} Q0 {document} {i} {value:.9g} {label}\n"
                            for i, (document, value) in enumerate(zip(ranked, values), start=1))

# ---- search: ask a folder of texts, at each size ---------------------------------------------------------------------
def search(model, tokenizer, question, sizes, args, model_folder):
    """ Print the 5 passages of --texts that answer a question best, at each size and, of several, by the funnel.
    Without a question ask for some. Embeddings stay in the model's folder until the model or the passages change. """
    passages, widest = data.load_passages(args.texts), widest_dims(sizes)
    texts = [text for _, text in passages]
    def embed(strings, layers=list(widest)):   # -> {layer: (strings, C)}
        return embed_texts(model, tokenizer, strings, layers, args.dtype, args.batch_tokens)
    name = f"search-{Path(args.texts).resolve().name}-"
    index = shard_prefix(model_folder, f"{name}{made_by(model, tokenizer, args.dtype)}", texts)
    for old in set(model_folder.glob(f"{name}*.npy")) - set(model_folder.glob(f"{index.name}*")):
        old.unlink()
    embeddings = load_or_embed(index, widest, texts, embed)                                   # {layer: (P, D)}
    similarity = model.config.similarity
    vectors = {(layer, dim): shorten(embeddings[layer], dim, similarity) for layer, dim in sizes}   # (P, D) each
    ways = [(size,) for size in sizes]   # each is for funnel: one size, or a small and the full one
    if len(sizes) > 1:
        ways.append((sizes[0], sizes[-1]))                                                    # the funnel
    for asked in [question] if question else ask():
        for way in ways:
            start = time.perf_counter()
            queries = embed([data.as_text(asked, "--search")], [layer for layer, _ in way])
            encoded = time.perf_counter()
            queries = [shorten(queries[layer], dim, similarity) for layer, dim in way]        # (1, D) each
            scores, docs = funnel(queries, [vectors[size] for size in way], 5)                # (1, 5) each
            if len(sizes) > 1:
                print(f"{', then '.join(map(size_name, way))}: encoding {1000 * (encoded - start):.1f} ms, search in "
                      f"{len(texts):,} passages {1000 * (time.perf_counter() - encoded):.1f} ms")
            for value, i in zip(scores[0], docs[0]):
                print(f"{value:.3f}  {passages[i][0]}\n       {texts[i][:110]}")

def funnel(queries, passages, k, shortlist=100):
    """ lists of one or two (Q, D) and (P, D), the small size first -> scores (Q, k), docs (Q, k). The first size finds
    as many passages as the shortlist holds, reading few numbers of each; the last ranks these with all its numbers. """
    scores = queries[0] @ passages[0].T                                                       # (Q, P)
    if len(queries) == 1:
        return scores.topk(min(k, len(passages[0])))
    found = scores.topk(min(shortlist, len(passages[0])))
    scores = (passages[-1][found.indices] @ queries[-1][:, :, None])[:, :, 0]                 # (Q, shortlist)
    scores, order = scores.topk(min(k, scores.shape[1]))                                      # (Q, k)
    return scores, found.indices.gather(1, order)

def ask():
    """ yields what the user types, until an empty line """
    with contextlib.suppress(EOFError):
        while question := input("\nquestion (an empty line ends): ").strip():
            yield question

# ---- handing over: a size as a folder of its own ---------------------------------------------------------------------
def export(model, tokenizer, name, args):
    """ --export: write a folder for one size, or one for each of several in OUT -> the folders. Raises ValueError """
    asked, out = args.export
    sizes = check_sizes(named_sizes(model.config) if asked == "all" else asked, model.config, name, "--export")
    several = asked == "all" or len(sizes) > 1
    folders = [Path(out, size_name(size).replace(":", "-") if several else "") for size in sizes]
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--export {folder}: something is there already; delete it, or name another folder")
    smaller, small_tokenizer = model, tokenizer
    if args.vocab_size:
        texts = [text for _, text in data.load_passages(args.texts)]
        counts = sum(np.bincount(ids, minlength=len(tokenizer)) for ids in data.tokenize(texts, tokenizer, 10**6))
        smaller, small_tokenizer = cut_vocabulary(model, tokenizer, counts, args.vocab_size)
        texts = texts[::max(1, len(texts) // 1000)]   # a thousand of them show the cost
    trained = model.config.sizes or ((model.config.num_hidden_layers, model.config.hidden_size),)
    for size, folder in zip(sizes, folders):
        if size not in trained:
            known = ", ".join(map(size_name, trained))
            print(f"warning: {name} has the sizes {known}; {size_name(size)} may be worse", file=sys.stderr)
        save_pretrained(cut(smaller, size), small_tokenizer, folder)
        megabytes = (folder / "model.safetensors").stat().st_size / 1e6
        print(f"{size_name(size)} is in {folder}: {megabytes:.1f} MB of float32")
        if args.vocab_size:
            layer, dim = size
            before = embed_texts(model, tokenizer, texts, [layer], args.dtype)[layer][:, :dim]             # (texts, D)
            after = embed_texts(smaller, small_tokenizer, texts, [layer], args.dtype)[layer][:, :dim]
            print(f"  {args.vocab_size:,} of {len(tokenizer):,} vocabulary entries: the mean cosine of a text's vector "
                  f"to that before is {F.cosine_similarity(before, after).mean():.3f}")
    return folders

def card_table(results, sizes):
    """ records -> the lines of a Markdown table, one for each size """
    table = {size: {"layers:dims": size_name(size), "bytes a vector": str(4 * size[1])} for size in sizes}
    for r in results:
        table[r["layer"], r["dim"]][f"{r['task']} {r['metric']}"] = f"{r['value']:.4f}"
    columns = list(table[sizes[-1]])
    rows = [columns, ["---"] * len(columns)] + [[row.get(column, "") for column in columns] for row in table.values()]
    return [f"| {' | '.join(row)} |" for row in rows]

MADE_HERE = "<!-- written by evaluate.py, which replaces this file as long as this line stands -->"

def write_card(folder, source):
    """ FOLDER/README.md, a model card as the hub reads it; one that the user wrote stays. source: the run's folder, for
    what the model was trained on, and for the results where the exported folder has none of its own. """
    from huggingface_hub import EvalResult, ModelCardData   # imported here, because few commands write a card
    card, config, trained = folder / "README.md", read_json(folder / "config.json"), read_json(source / "args.json")
    if card.exists() and MADE_HERE not in card.read_text(encoding="utf-8"):
        return print(f"{card} stays as it is, because evaluate.py did not write it")
    results, sizes, name = read_json(folder / "eval.json"), list(map(tuple, config["sizes"])), folder.resolve().name
    if not results and read_json(source / "config.json").get("vocab_size") == config["vocab_size"]:
        results = read_json(source / "eval.json")
    results = [r for r in results.get("results", []) if (r["layer"], r["dim"]) in sizes and r["task"] != "cost"]
    def of_the_hub(names):   # NAME:CONFIG -> NAME; the hub rejects a card with names that are not its own
        return list(dict.fromkeys(n.split(":")[0] for n in names if n in trained.get("from_hub", []))) or None
    shown = [EvalResult("sentence-similarity", r["task"], r["task"], r["metric"], r["value"],
                        metric_name=f"{r['metric']} at {r['layer']}:{r['dim']}") for r in results]
    about = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka", "starbucks"],
        base_model=of_the_hub([trained.get("init_from", "")]), datasets=of_the_hub(trained.get("train_pairs", [])),
        model_name=name if shown else None, eval_results=shown or None)
    lines = ["---", about.to_yaml(), "---", MADE_HERE, "", f"# {name}", "",
             "One BERT trained with [Starbucks](https://arxiv.org/abs/2410.13230) for use at several sizes. "
             f"Pooling: {config['pooling']}. Similarity: {config['similarity']}.", "",
             *card_table(results, sizes), "",
             "```python", "from sentence_transformers import SentenceTransformer", "",
             f'model = SentenceTransformer("{name}")   # the path of this folder, or OWNER/NAME on the hub',
             f'embeddings = model.encode(["a text", "another one"])   # (2, {sizes[-1][1]})']
    if len(sizes) > 1:
        (layer, dim), normalise = sizes[0], ", normalize_embeddings=True" * (config["similarity"] == "cosine")
        lines += [f"# at another size: keep {layer} of the layers, then {dim} of the numbers",
                  f"model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:{layer}]",
                  f'small = model.encode(["a text", "another one"], truncate_dim={dim}{normalise})']
    card.write_text("\n".join([*lines, "```"]) + "\n", encoding="utf-8")

# ---- cost, table, comparison, figure ---------------------------------------------------------------------------------
def cost(model, sizes):
    """ -> records: parameters, bytes of a float32 vector, arithmetic of the blocks' matrices (2 FLOP an entry) """
    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())
    matrices = sum(parameter.numel() for parameter in model.blocks[0].parameters() if parameter.dim() == 2)
    def costs(layer, dim):
        parameters = count(model.word, model.position, model.token_type, model.norm, *model.blocks[:layer])
        return {"parameters": parameters, "bytes": 4 * dim, "MFLOP/token": 2 * matrices * layer / 1e6}
    return [record("cost", metric, size, value, 1) for size in sizes for metric, value in costs(*size).items()]

def speed(model, tokenizer, sizes, dtype, batch_tokens=8192):
    """ -> records: ms to tokenise and embed one query (median, 95th percentile of 50); texts a second in batches """
    texts = [f"{i}: a passage of about thirty words, as long as the ones that are searched most often, made of "
             "ordinary words so that the tokenizer and the model have as much to do as in real use" for i in range(512)]
    def seconds(texts, layer):
        start = time.perf_counter()
        embed_texts(model, tokenizer, texts, [layer], dtype, batch_tokens)
        return time.perf_counter() - start
    records = []
    for size in sizes:
        ms = [1000 * seconds(["how do I invert a large matrix"], size[0]) for _ in range(53)][3:]   # three warm up
        records += [record("cost", "ms/query", size, statistics.median(ms), 50),
                    record("cost", "p95 ms", size, sorted(ms)[47], 50),   # 47 of 50 are faster
                    record("cost", "texts/s", size, len(texts) / seconds(texts, size[0]), len(texts))]
    return records

def print_table(results, title, names):
    """ one line a size, one column a value; names {size: name} """
    columns = list(dict.fromkeys((r["task"], r["metric"]) for r in results))
    width = max([10] + [len(task) for task, _ in columns]) + 2
    def cell(v):
        if v is None:
            return ""
        if v < 2:
            return f"{v:.4f}"
        return f"{v:,.1f}" if v % 1 else f"{v:,.0f}"
    print(f"\n{title}")
    for header in zip(*columns):
        print(f"{'':16}" + "".join(f"{text if text != 'cost' else '':>{width}}" for text in header))
    for size, values in by_size(results).items():
        label = f"{names.get(size, ''):7} {size_name(size)}" if size != BM25 else "BM25"
        print(f"{label:16}" + "".join(f"{cell(values.get(column)):>{width}}" for column in columns))

def compare(specs, metrics=()):
    """ One table of several results, the first is the baseline. * marks differences that are significant at 0.05 after
    Bonferroni's correction for the whole table: a paired t-test over queries, for Spearman a bootstrap over sentence
    pairs. Sizes are paired in order, smallest with smallest. Raises ValueError when sizes or data do not match. """
    labels, _, per_items = zip(*map(load_results, specs))
    sizes = [sorted({key for items in per_item.values() for key in items if ":" in key}, key=parse_sizes)
             for per_item in per_items]   # of each file: ["2:32", ...] from small to large, without BM25
    if len(set(map(len, sizes))) > 1:
        raise ValueError(f"--compare: {', '.join(str(len(s)) for s in sizes)} sizes; evaluate all at as many --sizes")
    rows = []   # (task, metric, a size of each file, (n,) values of each file)
    for task, metric, row in itertools.product(per_items[0], metrics or ["Spearman", *METRICS], zip(*sizes)):
        values = [per_item.get(task, {}).get(size, {}).get(metric) for per_item, size in zip(per_items, row)]
        if all(values):
            rows.append((task, metric, row, values))
    if not rows:
        raise ValueError("--compare: no task and metric is in all files; evaluate on the same data, or see --metrics")
    comparisons = len(rows) * (len(specs) - 1)
    print("".join(f"{text:>22}" for text in ["", *labels]))
    for task, metric, row, values in rows:
        sets = [(per_item[task].get("ids"), per_item[task].get("gold")) for per_item in per_items]
        if any(other != sets[0] for other in sets):
            raise ValueError(f"--compare: {task} is not the same set in all files; evaluate on the same data")
        cells = [f"{task} {metric}"]
        for size, found in zip(row, values):
            mean, p = mean_and_p(metric, found, values[0], gold=sets[0][1])
            cells.append(f"{size} {mean:.4f}{'*' if p * comparisons < 0.05 else ' '}")
        print("".join(f"{cell:>22}" for cell in cells))
    print(f"* differs from the first file at p < 0.05 / {comparisons} comparisons")

def mean_and_p(metric, values, baseline, gold):
    """ (n,) values and those of the baseline, (n,) gold of an STS set -> mean, or Spearman; p of the difference """
    same = values == baseline
    if metric == "Spearman":
        return spearman(values, gold), 1 if same else paired_bootstrap(baseline, values, gold)
    return np.mean(values), 1 if same else scipy.stats.ttest_rel(baseline, values).pvalue

def paired_bootstrap(x, y, gold, resamples=1000):
    """ (n,) cosines of two models, (n,) gold -> two-sided p of the difference of their Spearmans, taken as normal """
    rows = np.random.default_rng(0).integers(len(gold), size=(resamples, len(gold)))   # the same for both models
    def correlations(values):   # (n,) -> (resamples,)
        a, b = (scipy.stats.rankdata(np.array(v)[rows], axis=1) for v in (values, gold))   # (resamples, n)
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        return (a * b).sum(1) / np.maximum(np.sqrt((a**2).sum(1) * (b**2).sum(1)), 1e-9)   # 0, as in spearman
    spread = np.std(correlations(x) - correlations(y))
    difference = abs(spearman(x, gold) - spearman(y, gold))
    return float(2 * scipy.stats.norm.sf(difference / spread)) if spread > 0 else float(difference == 0)

def plot(specs, path, metrics=()):
    """ Quality against cost -> SVG or PNG: a line for each of the results, a point a size, BM25 as a level. metrics: to
    average, by default Spearman and nDCG@10. Raises ValueError without matplotlib. """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.rcParams |= {"backend": "agg", "svg.fonttype": "none"}   # no window; text stays text
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]   # Okabe and Ito
    for spec, color in zip(specs, colors * len(specs)):
        label, results, per_item = load_results(spec)
        chosen = [r for r in results if r["metric"] in (metrics or ("Spearman", "nDCG@10")) and r["task"] in per_item]
        quality = {size: 100 * statistics.fmean(values.values()) for size, values in by_size(chosen).items()}
        sizes = sorted(quality.keys() - {BM25})
        mflop = {(r["layer"], r["dim"]): r["value"] for r in results if r["metric"] == "MFLOP/token"}
        if not chosen or set(metrics) - {r["metric"] for r in chosen} or set(sizes) - mflop.keys():
            raise ValueError(f"--plot: {spec} lacks {' or '.join(metrics) or 'Spearman and nDCG@10'}, or the cost of a "
                             "size; choose other --metrics, or evaluate again")
        x = [mflop[size] for size in sizes]
        axes.plot(x, [quality[size] for size in sizes], "o-", color=color, label=label)
        if spec == specs[0]:
            names = [f"{size_name(size)}\n{4 * size[1]:,} B\n{cost:.2g}" for size, cost in zip(sizes, x)]
            axes.set_xscale("log")
            axes.set_xticks(x, names, fontsize=8)
            axes.set_xticks([], minor=True)
            if BM25 in quality:
                axes.axhline(quality[BM25], color="grey", linestyle=":", label="BM25")
    axes.legend(frameon=False, labelcolor="linecolor", loc="lower right")
    tasks = ", ".join(dict.fromkeys(f"{r['task']} {r['metric']}" for r in chosen))
    axes.set(xlabel="layer:dim, bytes per vector, MFLOP per token (log scale; left is cheaper)",
             ylabel=f"{tasks} x 100 (up is better)")
    axes.margins(0.1, 0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

def load_results(spec):
    """ [LABEL=]FILE[,FILE...] -> label, records, {task: per-item values}, those of several files (say one a size)
    joined. Raises ValueError for a file that evaluate.py did not write. """
    label, _, files = spec.rpartition("=")
    results, per_item = [], {}
    for file in files.split(","):
        with readable(f"--compare {spec}: {file!r} is no file that evaluate.py wrote", "evaluate again"):
            name, records, tasks = read_results(file)
        label = label or name
        results += records
        for task, items in tasks.items():
            known = per_item.setdefault(task, {})
            if any(known.get(key, items.get(key)) != items.get(key) for key in ("ids", "gold")):
                raise ValueError(f"--compare {spec}: {task} is not the same set in all; evaluate on the same data")
            if twice := [size for size in items if ":" in size and size in known]:
                raise ValueError(f"--compare {spec}: two files have {task} at {twice[0]}; leave one of them out")
            known.update(items)
    return label, results, per_item

def read_results(file):
    """ a file of evaluate_model -> name of its model, records, {task: per-item values}. Raises for another file """
    run = json.loads(Path(file).read_text(encoding="utf-8"))
    records = [record(r["task"], r["metric"], (r["layer"], r["dim"]), float(r["value"]), r["n"])
               for r in run["results"]]
    for task, items in run["per_item"].items():
        n = len(items.get("gold", items.get("ids", [])))                                # pairs or queries
        for size in [size for size in items if ":" in size and parse_sizes(size)]:
            for values in items[size].values():
                assert np.isfinite(np.array(values, float).reshape(n)).all(), f"a value of {task} is no number"
    return Path(run["model"]).name, records, run["per_item"]

# ---- flags -----------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """ command line -> args; a wrong one ends the program with status 2 and a line that says why """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a folder of finetune_srl.py, or any BERT")
    add = parser.add_argument_group("tasks; with none: --retrieval docs").add_argument
    add("--sts", nargs="+", default=[], metavar="NAME_OR_FILE",
        help=f"{', '.join(data.STS)}, or a file with sentence1, sentence2, score")
    add("--retrieval", nargs="+", default=[], metavar="NAME[:SPLIT]", help="docs, a BEIR folder, or a hub BEIR set")
    add("--speed", action="store_true", help="time every size")
    add = parser.add_argument_group("use").add_argument
    add("--search", nargs="?", const="", metavar="QUESTION",
        help="answer from --texts, with the largest size or with each of --sizes; without a question ask for some")
    add("--texts", default="docs", metavar="PATH", help="docs, or a file or folder of .txt, .md, .jsonl")
    add("--export", nargs=2, metavar=("SIZE", "OUT"),
        help="write a folder for sentence-transformers and transformers: of one LAYER:DIM, of several, or of all sizes")
    add("--vocab_size", type=positive_int, metavar="N", help="of --export: keep the N entries most frequent in --texts")
    add = parser.add_argument_group("sizes").add_argument
    add("--sizes", type=parse_sizes, help="LAYER:DIM,... by default the model's own, else the paper's in proportion")
    add("--grid", action="store_true", help="every layer at the dims of all sizes")
    add = parser.add_argument_group("encoding").add_argument
    add("--max_length", type=text_length, help="tokens of a text; by default the model's own")
    add("--batch_tokens", type=positive_int, default=8192, help="tokens of a batch")
    add("--pooling", choices=list(POOLINGS), help="of the tokens; by default the model's own, else mean")
    add("--similarity", choices=SIMILARITIES, help="of query and document; by default the model's own, else cosine")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    add("--device", type=device_arg, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1, mps")
    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="FILE.json", help="for the results of one model; by default MODEL/eval.json if it is ours")
    add("--embeddings_dir", metavar="DIR", help="keep document embeddings there as float32 .npy, and use what is there")
    add("--save_run", metavar="DIR", help="write TREC runs there")
    add("--compare", nargs="+", metavar="[LABEL=]FILE.json[,FILE.json...]",
        help="results to compare; the first is the baseline; files joined by commas count as one, say one file a size")
    add("--metrics", nargs="+", default=[], choices=["Spearman", *METRICS],
        help="of --compare, by default all (fewer need less correction); of --plot, by default Spearman and nDCG@10")
    add("--plot", metavar="FILE.svg|png", help="draw the results of --compare, or of this evaluation")
    args = parser.parse_args(argv)
    tasks = args.sts + args.retrieval
    searching = args.search is not None
    evaluating = args.speed or args.grid or args.compare or args.out or args.plot
    # one job at a time: evaluate, compare, search or export
    if not args.models and (not args.compare or tasks or searching or args.export):
        parser.error("nothing to do: name a MODEL, before the flags, or --compare FILE.json ...")
    if args.compare and len(args.compare) + len(args.models) < 2 and not args.plot:
        parser.error(f"--compare {args.compare[0]}: is one file; name another one to compare it with")
    if searching and (tasks or evaluating or args.export):
        parser.error("--search answers a question and evaluates nothing; use it without the flags of an evaluation")
    if args.search == "" and not sys.stdin:
        parser.error("--search without a QUESTION reads some from stdin, which is closed; add the question")
    if args.export and (len(args.models) > 1 or evaluating):
        parser.error("--export takes one MODEL, and of an evaluation --sts and --retrieval; leave the rest out")
    # values that do not fit their flag, or each other
    if args.vocab_size and not args.export:
        parser.error(f"--vocab_size {args.vocab_size} is for --export SIZE OUT; add it")
    if args.export and args.export[0] != "all":
        try:
            args.export[0] = parse_sizes(args.export[0])
        except argparse.ArgumentTypeError as error:
            parser.error(f"--export {error}, or all")
    if args.out and len(args.models) > 1:
        parser.error(f"--out {args.out} takes the results of one model, not of {len(args.models)}; go one by one")
    if args.plot and Path(args.plot).suffix not in (".svg", ".png"):
        parser.error(f"--plot {args.plot}: must end in .svg or .png")
    names = [data.task_name(task) for task in tasks]
    if len(set(names)) < len(names):
        parser.error(f"two tasks of {', '.join(names)} have the same name; evaluate them one by one")
    return args

def main(args):
    """ search, export, or evaluate every model, then compare and plot. Raises ValueError for what cannot be read. """
    keep_freed_memory()
    files = list(args.compare or [])
    for task in args.sts:         # a mistake in the last file should show before the first is evaluated
        data.load_sts(task)
    for task in args.retrieval:
        collection = data.Collection(task)
        shards = collection.shards()
        ids, _ = next(shards)
        if args.save_run:         # blanks separate the columns of a run
            names = [collection.task, *collection.queries, *ids, *(key for more, _ in shards for key in more)]
            if odd := [name for name in names if len(name.split()) != 1]:
                raise ValueError(f"--save_run: {odd[0]!r} of {task} is not one word, as a run needs; rename it")
    ways = {key: getattr(args, key) for key in ("pooling", "similarity") if getattr(args, key)}
    for name in args.models:
        model, tokenizer = load_model(name, args.device, args.max_length, **ways)
        sizes = check_sizes(args.sizes or named_sizes(model.config), model.config, name)
        if args.search is not None:
            search(model, tokenizer, args.search, sizes if args.sizes else sizes[-1:], args, find_folder(name))
        elif args.export:
            exported = export(model, tokenizer, name, args)
            if args.sts or args.retrieval:                  # the model, then what was cut out of it
                files += evaluate_model(name, model, tokenizer, sizes, args)
                for folder in exported:
                    small, its_tokenizer = load_model(folder, args.device)
                    evaluate_model(folder, small, its_tokenizer, tuple(named_sizes(small.config)), args)
            for folder in exported if model.config.sizes else []:   # the card says: trained with Starbucks
                write_card(folder, find_folder(name))
        else:
            files += evaluate_model(name, model, tokenizer, sizes, args)
            is_run = not args.out and (Path(name) / "args.json").exists()
            if is_run and model.config.sizes:
                write_card(Path(name), Path(name))
    if len(files) > 1:
        compare(files, args.metrics)
    if args.plot and files:
        plot(files, args.plot, args.metrics)

if __name__ == "__main__":
    run_script(main, parse_args)
