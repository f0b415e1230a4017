"""The bundled model does what its card says, on the questions that ship with it."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

LIMIT_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def folder() -> Path:
    from qr_integrations.bundled import bundled_path

    return bundled_path("qr-mini")


@pytest.fixture(scope="module")
def stated(folder: Path) -> dict[str, float]:
    """The card's table of the shipped questions."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    table = card.split("**the first 40 of them shuffled, which ship with the package**")[1].split("**")[0]
    return {name: float(value) for name, value in re.findall(r"^\| ([^|]+?) \| ([\d.]+) \|$", table, re.MULTILINE)}


@pytest.fixture(scope="module")
def sample() -> list[Any]:
    from qr_integrations.bundled import read_sample

    return read_sample()


def ndcg(rank: Any, sample: list[Any]) -> float:
    from qr_integrations.evaluation import ndcg_at_k

    return mean(ndcg_at_k(rank(question), {question.gold}) for question in sample)


def test_ndcg_of_the_card(qr_mini: Any, sample: list[Any], stated: dict[str, float]) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini)
    measured = ndcg(lambda q: reranker.rank(q.question, q.documents).order, sample)
    assert measured == pytest.approx(stated["detected heads"], abs=0.002)
    bm25 = ndcg(lambda q: sorted(range(len(q.bm25)), key=lambda i: -q.bm25[i]), sample)
    assert bm25 == pytest.approx(stated["BM25"], abs=0.002)
    assert measured > stated["all heads"] and measured > 3 * stated["random order"]


def test_order_of_the_documents_hardly_matters(qr_mini: Any, sample: list[Any]) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini)
    forward = ndcg(lambda q: reranker.rank(q.question, q.documents).order, sample[:20])
    last = {id(q): len(q.documents) - 1 for q in sample}
    backward = ndcg(
        lambda q: [last[id(q)] - i for i in reranker.rank(q.question, q.documents[::-1]).order], sample[:20]
    )
    assert backward == pytest.approx(forward, abs=0.1)


def test_a_hundred_documents_and_eight_thousand_tokens(qr_mini: Any, sample: list[Any]) -> None:
    from qr_integrations import QRHeadReranker

    question, others = sample[0], [d for q in sample[1:] for d in q.documents]
    documents = [*others[:99], question.documents[question.gold]]
    ranking = QRHeadReranker(qr_mini).rank(question.question, documents)
    assert len(ranking) == 100 and sum(item.num_tokens for item in ranking) > 8192
    assert ranking.order.index(99) < 10


@pytest.mark.parametrize(
    ("query", "documents"),
    [
        ("wer schrieb dracula", ["Katzen schlafen viel.", "Dracula wurde von Bram Stoker geschrieben.", "Die Donau."]),
        ("谁写了德古拉", ["猫睡得很多。", "德古拉是布拉姆·斯托克写的。", "多瑙河流经维也纳。"]),
    ],
)
def test_german_and_chinese(qr_mini: Any, query: str, documents: list[str]) -> None:
    from qr_integrations import QRHeadReranker

    assert QRHeadReranker(qr_mini).rank(query, documents).order[0] == 1


def test_it_is_small_and_complete(folder: Path) -> None:
    weights = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "qr_heads.json")
    assert sum((folder / name).stat().st_size for name in weights) <= LIMIT_BYTES
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(
        word in card for word in ("license:", "QRscore", "BM25", "What it cannot do", "python -m training.qr_mini")
    )
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
