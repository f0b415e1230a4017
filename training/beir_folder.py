"""`python -m training.beir_folder DATA OUT`: the questions that `qr-mini` was not trained on, as a BEIR folder.

``test``: lines 1,200 to 1,599 of the NQ file, which nothing was trained or chosen on. ``dev``: lines 1,100 to 1,199,
which chose the heads. The corpus holds the passages of all lines, each text once.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .data import TRAIN_LINES, VALID_LINES, Pool, load_nq


def main(data: Path, out: Path) -> None:
    """Write corpus, queries and judgments."""
    nq = load_nq(data)
    ids: dict[str, str] = {}  # text -> the id of its first passage
    for number, passage in enumerate(nq.passages):
        ids.setdefault(passage.text, f"p{number}")
    firsts = [nq.passages[int(identity[1:])] for identity in ids.values()]
    corpus = [{"_id": ids[p.text], "title": p.title, "text": p.text} for p in firsts]
    asked = range(TRAIN_LINES, len(nq.questions))
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(out / "corpus.jsonl.gz", corpus)
    _write_lines(out / "queries.jsonl.gz", [{"_id": f"q{i}", "text": nq.questions[i].text} for i in asked])
    _write_qrels(out / "qrels" / "dev.tsv", nq, ids, range(TRAIN_LINES, VALID_LINES))
    _write_qrels(out / "qrels" / "test.tsv", nq, ids, range(VALID_LINES, len(nq.questions)))


def _write_lines(path: Path, entries: Sequence[dict[str, str]]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write(text.encode())


def _write_qrels(path: Path, nq: Pool, ids: dict[str, str], lines: range) -> None:
    rows = [f"q{i}\t{ids[nq.passages[nq.questions[i].gold].text]}\t1\n" for i in lines]
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
