#!/usr/bin/env bash
# The dev set of results/README.md: the held-out docs queries that are not in the test set (3,988 with the pinned packages),
# as a BEIR folder, out/docs-heldout. Takes seconds.
#   runs/docs_heldout.sh && python evaluate.py out/srl --retrieval out/docs-heldout
set -euo pipefail
cd "$(dirname "$0")/.."
python - <<'PYTHON'
import json, shutil
from pathlib import Path
import data, evaluate

docs, out = data.docs_folder(), Path("out/docs-heldout")
(out / "qrels").mkdir(parents=True, exist_ok=True)
shutil.copy(docs / "corpus.jsonl", out)
test = set(evaluate.Collection("docs").qrels)
rows = [row for line in open(docs / "corpus.jsonl") if f"q{(row := json.loads(line))['_id']}" not in test]
(out / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{row['_id']}", "text": row["query"]}) + "\n" for row in rows))
(out / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n"
                                        + "".join(f"q{row['_id']}\t{row['_id']}\t1\n" for row in rows))
print(f"{len(rows)} queries in {out}")
PYTHON
