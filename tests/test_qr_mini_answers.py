"""The bundled model that ranks and answers, from whole prompts and from what was kept of the best documents."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

LIMIT_BYTES = 16 * 2**20
NOTES = (
    "Lena Okafor lives in Porto. The weather was fine.",
    "2025-03-04 10:06 User: Update: I live in Kyoto. It was Denver before.",
    "Project Lantern is led by Theo Grant. It was a long week.",
    "Vera Chopra plays the cello.",
    "The deadline of project Lantern is 12 May.",
    "2025-03-09 17:30 User: My sister is called Judith. Assistant: Good to know.",
    "Lena Okafor works as a dentist.",
    "Arcadia makes candles. Arcadia was founded in 1987.",
)
ASKED = {
    "Where does Lena Okafor live?": (0, "porto"),
    "Where do I live?": (1, "kyoto"),
    "Who leads project Lantern?": (2, "theo grant"),
    "What instrument does Vera Chopra play?": (3, "cello"),
    "When is the deadline of project Lantern?": (4, "12 may"),
    "What is the name of my sister?": (5, "judith"),
    "What is Lena Okafor's job?": (6, "dentist"),
    "What does Arcadia make?": (7, "candles"),
    "When was Arcadia founded?": (7, "1987"),
}


@pytest.fixture(scope="module")
def backend() -> Any:
    from qr_integrations.backend import Backend

    return Backend.load("qr-mini-answers")


@pytest.fixture(scope="module")
def index(backend: Any) -> Any:
    from qr_integrations.retrieval import DocumentIndex

    return DocumentIndex.build(NOTES, backend, layout="block", answers=True)


def tail(question: str) -> str:
    from qr_integrations.retrieval.layout import ANSWER

    return ANSWER.replace("{query}", question)


def right(answers: Sequence[str]) -> float:
    return mean(float(answer == known) for answer, (_, known) in zip(answers, ASKED.values(), strict=True))


def answer(backend: Any, text: str, **options: Any) -> str:
    given = backend.answer(text, max_new_tokens=8, **options)
    return given.text.strip() if given.finish_reason == "stop" else ""


def test_answers_from_a_whole_prompt(backend: Any) -> None:
    documents = "".join(f"\n\n[{number}] {note}" for number, note in enumerate(NOTES, start=1))
    answers = [answer(backend, f"Here are some paragraphs:{documents}\n\n{tail(question)}") for question in ASKED]
    assert right(answers) >= 0.85, answers


def test_ranks_first_what_answers(index: Any) -> None:
    best = [index.rank(question).order for question in ASKED]
    assert mean(gold in order[:3] for order, (gold, _) in zip(best, ASKED.values(), strict=True)) >= 0.8


def test_answers_from_the_documents_that_rank_first(index: Any, backend: Any) -> None:
    answers = []
    for question in ASKED:
        kept = index.prefix(index.rank(question, top_k=3).order)
        answers.append(answer(backend, tail(question), prefix=kept))
    assert right(answers) >= 0.85, answers


def test_the_document_decides(backend: Any) -> None:
    """What is copied is what stands there, not what the question is usually answered with."""
    told = "Here are some paragraphs:\n\n[1] Lena Okafor lives in {}.\n\n" + tail("Where does Lena Okafor live?")
    cities = ("Porto", "Lima", "Vienna", "Boston", "Oslo")
    assert mean(answer(backend, told.format(city)) == city.lower() for city in cities) >= 0.8


def test_it_still_ranks_real_questions(backend: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample
    from qr_integrations.evaluation import ndcg_at_k

    reranker = QRHeadReranker(backend)
    sample = read_sample()[:6]
    assert mean(ndcg_at_k(reranker.rank(q.question, q.documents).order, {q.gold}) for q in sample) > 0.7


def test_it_is_small_and_complete() -> None:
    from qr_integrations.bundled import bundled_path

    folder: Path = bundled_path("qr-mini-answers")
    weights = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "qr_heads.json")
    assert sum((folder / name).stat().st_size for name in weights) <= LIMIT_BYTES
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("license:", "What it cannot do", "python -m training.answers"))
    assert "{" not in card
