"""Real text: questions of NQ and XQuAD whose answers stand in the passage, and sentences with a part asked for."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

from ..data import TRAIN_LINES, VALID_LINES, XQUAD_TRAIN_PARAGRAPHS, Passage, read_json
from .facts import Asked, Lesson

_SPANS = (
    (r"\b(?:1\d|20)\d\d\b", ("when", "in which year", "what year", "since when")),
    (r"\b\d{1,2} (?:January|February|March|April|May|June|July|August|September|October|November|December) \d{4}\b",
     ("when", "on what date", "what date")),
    (r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+){0,2}\b", ("who", "what", "where", "which", "what is the name of")),
    (r"(?<=[a-z] )\d[\d,.]*\d\b", ("how many", "how much", "what number")),
)  # fmt: skip
LONGEST = 6
"""Words of an answer."""
Real = tuple[str, Passage, list[str]]
"""A question, the passage that answers it, and the answers that are accepted."""


def real_questions(folder: Path, part: str) -> list[Real]:
    """Questions with their passage and the short answers found in it.

    `part`: "train" (NQ lines before `TRAIN_LINES` and the training paragraphs of XQuAD), or the NQ lines that choose
    ("valid") and test ("test").
    """
    with gzip.open(folder / "nq_passages.jsonl.gz", "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    lines = {"train": rows[:TRAIN_LINES], "valid": rows[TRAIN_LINES:VALID_LINES], "test": rows[VALID_LINES:]}[part]
    held_out = {row["text"] for row in rows[TRAIN_LINES:]} if part == "train" else set()
    found = [
        (row["question"], Passage(row["title"], row["text"]), row["answers"])
        for row in lines
        if row["text"] not in held_out
    ]
    if part == "train":
        paragraphs = [p for article in read_json(folder / "xquad.en.json.gz")["data"] for p in article["paragraphs"]]
        for paragraph in paragraphs[:XQUAD_TRAIN_PARAGRAPHS]:
            passage = Passage("", paragraph["context"])
            found += [(qa["question"], passage, [qa["answers"][0]["text"]]) for qa in paragraph["qas"]]
    kept = [(text, passage, _short(answers, passage)) for text, passage, answers in found]
    return [(text, passage, answers) for text, passage, answers in kept if answers]


def _short(answers: Sequence[str], passage: Passage) -> list[str]:
    body = passage.text.lower()
    return [
        a for a in answers if len(a.split()) <= LONGEST and re.search(rf"(?<!\w){re.escape(a.lower())}(?!\w)", body)
    ]


class PassageReader:
    """Draws lessons over real passages.

    Args:
        questions: of `real_questions`.
        passages: any others, to be asked about by their own sentences.
        width: words of a passage that are kept around what is asked for.
    """

    def __init__(self, questions: Sequence[Real], passages: Sequence[Passage], width: int = 60) -> None:
        self._questions, self._passages, self._width = questions, passages, width

    def draw(self, size: int, questions: int, rng: Random) -> Lesson:
        """A lesson of `size` passages: one or several real questions, and parts of sentences asked for."""
        documents: list[Passage] = []
        asked: list[Asked] = []
        for place in range(size):
            if rng.random() < 0.6:
                text, passage, answers = rng.choice(self._questions)
                answer = rng.choice(answers)
                document = self._around(passage, answer, rng)
                asked.append(Asked(text, answer, place))
            else:
                document = self._around(rng.choice(self._passages), "", rng)
            documents.append(document)
            made = (self._made(document, place, rng) for _ in range(9))
            asked += [one for one in made if one is not None]
        rng.shuffle(asked)
        return Lesson(documents, asked[:questions]) if asked else self.draw(size, questions, rng)

    def _around(self, passage: Passage, answer: str, rng: Random) -> Passage:
        """About `width` words of the passage with the answer among them, in whole sentences."""
        sentences = re.split(r"(?<=[.!?])\s+", passage.text)
        has = [n for n, sentence in enumerate(sentences) if answer.lower() in sentence.lower()]
        if not has:
            return passage
        first = last = rng.choice(has)
        while sum(len(s.split()) for s in sentences[first : last + 1]) < self._width:
            if first == 0 and last == len(sentences) - 1:
                break
            if last == len(sentences) - 1 or (first > 0 and rng.random() < 0.5):
                first -= 1
            else:
                last += 1
        return Passage("" if rng.random() < 0.2 else passage.title, " ".join(sentences[first : last + 1]))

    def _made(self, document: Passage, place: int, rng: Random) -> Asked | None:
        """A year, a date, a name or a number of a sentence, asked for with the words around it."""
        sentence = rng.choice(re.split(r"(?<=[.!?])\s+", document.text))
        pattern, starts = rng.choice(_SPANS)
        spans = list(re.finditer(pattern, sentence))
        if not spans:
            return None
        span = rng.choice(spans)
        if len(span[0]) < 3 or document.text.count(span[0]) != document.text.lower().count(span[0].lower()):
            return None
        before, after = sentence[: span.start()].split()[-9:], sentence[span.end() :].split()[:9]
        kept = [word.strip('.,()"') for word in (*before, *after) if rng.random() < 0.8]
        if len(kept) < 3:
            return None
        return Asked(" ".join([rng.choice(starts), *kept]) + rng.choice(("", "", "?")), span[0], place)
