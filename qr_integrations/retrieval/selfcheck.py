"""Does a model rank? The checks that need a query and documents; the others are in `backend.selfcheck`."""

import math
from collections.abc import Iterator
from functools import partial

from qr_integrations.backend import Backend
from qr_integrations.backend.selfcheck import Check, guarded, seconds
from qr_integrations.errors import HeadError
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.qrhead import QRHeadReranker
from qr_integrations.types import Document

# The example of the official README (princeton-pli/QRHead, README.md, MIT) and the scores it prints.
EXAMPLE_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
EXAMPLE_HEADS = "LME"
EXAMPLE_QUERY = "Which town in Nizhnyaya has the largest population?"
EXAMPLE_DOCUMENTS = (
    Document("Kushva is the largest town in Nizhnyaya. It has a population of 1,000.", "Kushva"),
    Document("Levikha is a bustling town in Nizhnyaya. It has a population of 200,000.", "Levikha"),
)
EXAMPLE_SCORES = (0.63, 1.17)
_TOLERANCE = 0.03


def known_heads(backend: Backend) -> str:
    """Which query-focused heads are known for the model, in words."""
    try:
        heads = HeadSet.resolve("auto", backend)
    except HeadError:
        return "none known; --heads all, or detect them"
    return f"{len(heads)} known, found with {heads.detection_data or 'unnamed data'}; layers 0..{heads.top_layer} run"


def run_ranking_checks(backend: Backend) -> Iterator[Check]:
    """Both checks, each as soon as it is done."""
    for name, check in (("ranking", check_ranking), ("official example", check_official_example)):
        yield guarded(name, partial(check, backend))


def check_ranking(backend: Backend) -> Check:
    """Two documents get finite scores that differ, by the known heads or by all; the time of both queries."""
    try:
        reranker, kind = QRHeadReranker(backend), "known heads"
    except HeadError:
        reranker, kind = QRHeadReranker(backend, heads="all"), "all heads"
    cold, ranking = seconds(lambda: reranker.rank(EXAMPLE_QUERY, EXAMPLE_DOCUMENTS))
    warm, _ = seconds(lambda: reranker.rank("Who founded Levikha?", EXAMPLE_DOCUMENTS))
    scores = sorted((item.index, item.score) for item in ranking)
    told = ", ".join(f"{EXAMPLE_DOCUMENTS[index].title} {score:.4f}" for index, score in scores)
    good = all(math.isfinite(score) for _, score in scores) and scores[0][1] != scores[1][1]
    detail = f"seconds of a further query; {told} ({kind}); first query {cold:.2f} s"
    return Check("ranking", "passed" if good else "failed", warm, None, detail)


def check_official_example(backend: Backend) -> Check:
    """The official README's example (princeton-pli/QRHead, MIT): Kushva 0.63, Levikha 1.17, within 0.03.

    It holds for Llama-3.1-8B-Instruct with the heads found on LME, and is skipped for every other model.
    """
    name, official = "official example", HeadSet.published(EXAMPLE_MODEL, EXAMPLE_HEADS)
    try:
        heads = HeadSet.published(backend.name, EXAMPLE_HEADS)
    except HeadError:
        heads = None
    if heads != official:
        return Check(name, "skipped", detail=f"it is for {EXAMPLE_MODEL}, not for {backend.name}")
    ranking = QRHeadReranker(backend, heads=official).rank(EXAMPLE_QUERY, EXAMPLE_DOCUMENTS)
    scores = [item.score for item in sorted(ranking, key=lambda item: item.index)]
    error = max(abs(score - published) for score, published in zip(scores, EXAMPLE_SCORES, strict=True))
    told = f"largest difference from the published scores; Kushva {scores[0]:.3f}, Levikha {scores[1]:.3f}"
    return Check(name, "passed" if error <= _TOLERANCE else "failed", error, _TOLERANCE, told)
