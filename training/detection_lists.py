"""`python -m training.detection_lists DATA OUT`: the lists that `qr-integrations detect` uses when it is given none.

100 questions that nothing was trained on, lines 1,100 to 1,199 of the NQ file, each with its own passage and the nine
passages that BM25 ranks highest beside it among the first 1,200. The test questions and their passages stay out.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import bm25s

from .data import TRAIN_LINES, VALID_LINES, load_nq

RIVALS = 9


def main(data: Path, out: Path) -> None:
    """Write the lists: passages once, lists as numbers, the answering passage first."""
    nq = load_nq(data)
    passages = nq.passages[:VALID_LINES]
    index = bm25s.BM25()
    index.index(bm25s.tokenize([p.full for p in passages], stopwords="en", show_progress=False), show_progress=False)
    lists = []
    for gold in range(TRAIN_LINES, VALID_LINES):
        asked = bm25s.tokenize(nq.questions[gold].text, stopwords="en", show_progress=False)
        found = index.retrieve(asked, k=RIVALS + 1, show_progress=False)[0][0].tolist()
        lists.append((nq.questions[gold].text, [gold, *[i for i in found if i != gold][:RIVALS]]))
    used = sorted({i for _, numbers in lists for i in numbers})
    place = {number: i for i, number in enumerate(used)}
    entry = {
        "passages": [[passages[i].title, passages[i].text] for i in used],
        "lists": [[question, [place[i] for i in numbers]] for question, numbers in lists],
    }
    text = json.dumps(entry, ensure_ascii=False).encode()
    with out.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
