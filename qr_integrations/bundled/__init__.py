"""The small models that ship with the package: weights, cards, and the sample of questions of the demo."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qr_integrations.errors import LoadError
from qr_integrations.types import Document, JudgedList

BUNDLED = frozenset({"qr-mini", "qr-mini-answers", "qr-mini-vl", "qr-mini-vl-mqt"})
SAMPLE_SOURCE = (
    "NaturalQuestions-open with annotated gold passages, as published with Lost in the Middle "
    "(nelson-liu/lost-in-the-middle, MIT); questions and Wikipedia text CC BY-SA 3.0"
)


@dataclass(frozen=True, slots=True)
class SampleQuestion:
    """A question that people asked, and passages of which one answers it.

    Attributes:
        question: what is asked.
        documents: the passages, shuffled.
        gold: index of the passage that answers it.
        bm25: the BM25 score of each passage, for comparison.
    """

    question: str
    documents: tuple[Document, ...]
    gold: int
    bm25: tuple[float, ...]


def bundled_path(name: str) -> Path:
    """The folder of a bundled model."""
    return Path(__file__).parent / name


def read_sample(path: str | Path | None = None) -> list[SampleQuestion]:
    """The questions that ship with ``qr-mini``, or those of another file of the same form.

    Raises:
        LoadError: no such file, or a line of it is no question.
    """
    path = bundled_path("qr-mini") / "sample.jsonl" if path is None else Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split inside JSON strings
    except OSError as error:
        raise LoadError(f"the sample of questions cannot be read ({error}): install the package again") from error
    return [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _question(path: Path, number: int, line: str) -> SampleQuestion:
    try:
        entry: dict[str, Any] = json.loads(line)
        documents = tuple(Document(d["text"], d.get("title") or None) for d in entry["documents"])
        bm25 = tuple(float(score) for score in entry["bm25"])
        question = SampleQuestion(entry["question"], documents, entry["gold"], bm25)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{path}, line {number}: no sample question ({error!r}): install the package again") from error
    if not (0 <= question.gold < len(documents) == len(bm25)):
        raise LoadError(f"{path}, line {number}: `gold` and `bm25` do not fit the documents: install the package again")
    return question


def read_detection_lists() -> list[JudgedList]:
    """100 questions with ten passages each, the first of which answers; other questions than those of `read_sample`.

    From the same source. `qr-mini` was not trained on these questions; its heads were chosen with them.
    """
    packed = (Path(__file__).parent / "nq-detection" / "lists.json.gz").read_bytes()
    entry = json.loads(gzip.decompress(packed))
    passages = [Document(text, title or None) for title, text in entry["passages"]]
    return [
        JudgedList(question, tuple(passages[i] for i in numbers), {0: 1}, id=f"nq-{number}")
        for number, (question, numbers) in enumerate(entry["lists"])
    ]
