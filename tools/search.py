"""
Ask a folder of texts: the 5 passages that answer a question best, at each of --sizes and, of several, by the funnel:
the smallest size picks 100 passages, the largest ranks them.

    python -m tools.search out/srl "invert a matrix"                  # in the documentation of the installed packages
    python -m tools.search out/srl --texts notes --sizes 3:128,6:384  # asks for questions; .txt, .md, .jsonl

Embeddings stay in a cache of the library `datasets` until the model or the passages change.
"""
import argparse, contextlib, re, time, zlib
from pathlib import Path

import torch

import data
from evaluate import embed_texts
from model import check_sizes, load_model, parse_sizes, run_script, shorten, size_name

def load_passages(source):
    """ "docs", or a file or folder of .txt, .md and .jsonl, maybe .gz -> [(name, text), ...]: the docstrings, the
    paragraphs, the rows with "text" and maybe "title" """
    if source == "docs":
        rows = [row for file in ("train.jsonl", "corpus.jsonl")
                for row in data.read_rows(str(data.docs_folder() / file))]
        return [(row["name"], f"{row['query']} {row.get('positive') or row['text']}") for row in rows]
    passages = []
    for file in sorted(Path(source).rglob("*.*")) if Path(source).is_dir() else [Path(source)]:
        if re.search(r"\.jsonl(\.gz)?$", file.name):
            passages += [(f"{file}:{number}", text) for number, row in enumerate(data.read_rows(str(file)), start=1)
                         for text in data.as_texts(row)]
        elif re.search(r"\.(txt|md)(\.gz)?$", file.name):
            lines = [row["text"] for row in data.read_rows(str(file))]
            paragraphs = re.split(r"\n\n+", "\n".join(lines))
            passages += [(f"{file}:{number}", " ".join(text.split())) for number, text in enumerate(paragraphs, start=1)
                         if text.strip()]
    if not passages:
        raise ValueError(f"--texts {source}: neither docs nor a file or folder of .txt, .md or .jsonl with text in it")
    return passages

def embed_passages(model, tokenizer, texts, layers):
    """ -> {layer: (P, C)}; found again by the texts and by whatever decides their embedding """
    from datasets import Dataset
    weights = [zlib.crc32(parameter.detach().numpy()) for parameter in model.parameters()]
    about = [texts, weights, model.config.to_json_string(), tokenizer.backend_tokenizer.to_str(),
             tokenizer.model_max_length, layers]
    def embed(batch):
        found = embed_texts(model, tokenizer, batch["text"], layers, prompt=model.config.passage_prompt)
        return {str(layer): rows.numpy() for layer, rows in found.items()}
    table = Dataset.from_dict({"text": texts})
    cache = data.CACHE / "search" / f"{zlib.crc32(repr(about).encode()):08x}.arrow"
    cache.parent.mkdir(parents=True, exist_ok=True)
    table = table.map(embed, batched=True, batch_size=25_000, remove_columns=["text"], cache_file_name=str(cache),
                      new_fingerprint=cache.stem)
    return {layer: torch.from_numpy(table.with_format("numpy")[str(layer)][:]) for layer in layers}

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

def main(args):
    model, tokenizer = load_model(args.model)
    sizes = check_sizes(args.sizes or model.config.sizes[-1:], model.config)
    passages, layers = load_passages(args.texts), sorted({layer for layer, _ in sizes})
    data.check_texts(args.texts, [text for _, text in passages[:1000]], tokenizer, tokenizer.model_max_length,
                     model.config.passage_prompt)
    embeddings = embed_passages(model, tokenizer, [text for _, text in passages], layers)
    similarity = model.config.similarity
    vectors = {(layer, dim): shorten(embeddings[layer], dim, similarity) for layer, dim in sizes}   # (P, D) each
    ways = [(size,) for size in sizes]   # each is for funnel: one size, or a small and the full one
    if len(sizes) > 1:
        ways.append((sizes[0], sizes[-1]))                                                    # the funnel
    for question in [args.question] if args.question else ask():
        question = question.encode("utf-8", "replace").decode()   # a terminal may send letters of another encoding
        data.check_texts("the question", [question], tokenizer)
        for way in ways:
            start = time.perf_counter()
            layers = [layer for layer, _ in way]
            query = embed_texts(model, tokenizer, [question], layers, prompt=model.config.query_prompt)
            encoded = time.perf_counter()
            queries = [shorten(query[layer], dim, similarity) for layer, dim in way]          # (1, D) each
            scores, docs = funnel(queries, [vectors[size] for size in way], 5)                # (1, 5) each
            if len(sizes) > 1:
                print(f"{', then '.join(map(size_name, way))}: encoding {1000 * (encoded - start):.1f} ms, search in "
                      f"{len(passages):,} passages {1000 * (time.perf_counter() - encoded):.1f} ms")
            for value, i in zip(scores[0], docs[0]):
                name, text = passages[i]
                print(f"{value:.3f}  {name}\n       {text[:110]}")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder of finetune_srl.py, or any BERT")
parser.add_argument("question", nargs="?", help="without one it asks for some")
parser.add_argument("--texts", default="docs", metavar="PATH", help="docs, or a file or folder of texts")
parser.add_argument("--sizes", type=parse_sizes, help="LAYER:DIM,... by default the largest")

if __name__ == "__main__":
    run_script(main, parser.parse_intermixed_args)   # the question may stand behind the flags
