"""One model ranks and answers: from what it read for the ranking, against fresh prompts of the same documents."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.retrieval import DocumentIndex
    from qr_integrations.types import GroundedAnswer

QUESTION = "who wrote dracula"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [
        "Cats sleep most of the day.",
        "The river Danube flows through Vienna and Budapest.",
        "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
        "Frankenstein was written by Mary Shelley.",
        "Bram Stoker was born in Dublin.",
    ]


@pytest.fixture(scope="module")
def indexes(qr_mini: "Backend", texts: list[str]) -> dict[str, "DocumentIndex"]:
    from qr_integrations.retrieval import DocumentIndex

    return {layout: DocumentIndex.build(texts, qr_mini, layout=layout, answers=True) for layout in ("joint", "block")}


def ask(index: "DocumentIndex", question: str = QUESTION, **options: Any) -> "GroundedAnswer":
    return index.answer(question, **{"max_new_tokens": 6, **options})


def logits_behind(backend: "Backend", prefix: Any, question: str) -> Any:
    """Of the answer's first token."""
    import torch

    from qr_integrations.backend.behind_prefix import continued_behind, lay_out_behind
    from qr_integrations.types import Message

    prompt = lay_out_behind(backend, (Message.user(question),), prefix)
    inputs = continued_behind(backend, prompt, prefix, 1)
    past = len(prefix)
    positions = torch.arange(len(prompt) - past)[None] + prefix.num_positions
    with torch.no_grad():
        out = backend.model(
            input_ids=inputs["input_ids"][:, past:], position_ids=positions, past_key_values=inputs["past_key_values"]
        )
    return out.logits[0, -1]


@pytest.mark.parametrize("layout", ["joint", "block"])
def test_it_answers_from_the_best(indexes: dict[str, Any], layout: str) -> None:
    index = indexes[layout]
    found = ask(index, top_k=2)
    best = index.rank(QUESTION)
    assert found.ranking == best and found.used == tuple(best.order[:2])
    assert [item.index for item in found.sources] == best.order[:2]
    assert found.answer.steps["prefix"] == len(index.prefix(found.used))
    assert found.text == found.answer.text


@pytest.mark.parametrize("order", [[2, 4], [4, 2, 0]])
def test_blocks_are_what_a_fresh_reading_of_these_documents_is(
    indexes: dict[str, Any], texts: list[str], order: Sequence[int]
) -> None:
    from qr_integrations.types import Document

    index = indexes["block"]
    scorer = index.reranker.scorer
    reading = scorer.lay_out([Document(texts[i]) for i in order])
    fresh = scorer.prefill(reading.layout, whole=True)
    kept = index.prefix(order)
    assert (kept.token_ids, kept.num_positions) == (fresh.token_ids, fresh.num_positions)
    tail = f"Please answer.\n\nQuery: {QUESTION}"
    one, other = (logits_behind(index.backend, prefix, tail) for prefix in (kept, fresh))
    assert (one - other).abs().max() < 1e-5 * max(1.0, float(other.abs().max()))
    said = [index.backend.answer(tail, prefix=prefix, max_new_tokens=6).text for prefix in (kept, fresh)]
    assert said[0] == said[1]


def test_all_documents_together_are_a_plain_prompt(indexes: dict[str, Any], texts: list[str]) -> None:
    from qr_integrations.retrieval.answers import answer_afresh
    from qr_integrations.types import Document, Ranking, ScoredDocument

    items = tuple(ScoredDocument(i, -float(i), Document(text), 9) for i, text in enumerate(texts))
    fresh = answer_afresh(indexes["joint"].backend, Ranking(QUESTION, items), top_k=9, max_new_tokens=12)
    kept = ask(indexes["joint"], top_k=9, max_new_tokens=12)
    assert sorted(kept.used) == [0, 1, 2, 3, 4] and fresh.used == (0, 1, 2, 3, 4)
    assert kept.text == fresh.text and kept.answer.usage == fresh.answer.usage


def test_a_fresh_prompt_holds_the_best_and_no_others(indexes: dict[str, Any], texts: list[str]) -> None:
    from qr_integrations.retrieval.answers import answer_afresh

    backend, ranking = indexes["joint"].backend, indexes["joint"].rank(QUESTION)
    found = answer_afresh(backend, ranking, top_k=2, instruction="In one word.", max_new_tokens=6)
    first, second = (texts[i] for i in ranking.order[:2])
    written = f"Here are some paragraphs:\n\n[1] {first}\n\n[2] {second}\n\nPlease answer the following question "
    written += f"based on the information in the paragraphs above.\n\nIn one word.\n\nQuery: {QUESTION}"
    assert found.answer.usage.prompt_tokens == len(backend.lay_out(written))
    assert found.text == backend.answer(written, max_new_tokens=6).text
    assert found.used == tuple(ranking.order[:2]) and "prefix" not in found.answer.steps


def test_the_question_is_asked_as_the_template_says(indexes: dict[str, Any]) -> None:
    index = indexes["block"]
    prefix = index.prefix([2])
    found = ask(index, documents=[2], template="Answer in French.\n\n{query}?", instruction="Be short.")
    asked = index.backend.answer(f"Answer in French.\n\nBe short.\n\n{QUESTION}?", prefix=prefix, max_new_tokens=6)
    assert (found.used, found.answer.usage) == ((2,), asked.usage) and found.text == asked.text


def test_joint_answers_from_the_best_documents_window(qr_mini: "Backend", texts: list[str]) -> None:
    from qr_integrations.retrieval import DocumentIndex

    index = DocumentIndex.build(texts, qr_mini, answers=True, batch_size=2)
    assert len(index.windows) == 3
    found = ask(index, top_k=4)
    window = next(w for w in index.windows if found.ranking[0].index in [c.index for c in w.candidates])
    home = [candidate.index for candidate in window.candidates]
    assert found.used == tuple(i for i in found.ranking.order if i in home)


def test_the_first_document_moved_to_the_question_is_a_fresh_prompt_of_it(
    indexes: dict[str, Any], texts: list[str]
) -> None:
    """It saw no other document, so closing the gap behind it leaves nothing of them."""
    from qr_integrations.retrieval.answers import without_gaps

    backend = indexes["joint"].backend
    chat = backend.chat.opening
    ids = backend.tokenizer(f"{chat}Here are some paragraphs:\n\n[1] {texts[0]}\n\n", add_special_tokens=False)
    fresh = backend.prefill(ids["input_ids"], top_layer=3, values=True)
    closed, gap = without_gaps(indexes["joint"], [0]), indexes["joint"].prefix([0])
    assert closed.token_ids == fresh.token_ids and closed.num_positions == len(fresh) < gap.num_positions
    logits = [logits_behind(backend, prefix, QUESTION) for prefix in (closed, fresh, gap)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 < (logits[2] - logits[1]).abs().max()
    told = ask(indexes["joint"], documents=[0], close_gaps=True)
    assert told.answer.usage == ask(indexes["joint"], documents=[0]).answer.usage


def test_keys_are_turned_to_where_their_document_is_moved(indexes: dict[str, Any]) -> None:
    """Keys of the first layer depend on the token and its position alone."""
    from qr_integrations.retrieval.answers import without_gaps

    closed = without_gaps(indexes["joint"], [3, 1])
    fresh = indexes["joint"].backend.prefill(closed.token_ids, top_layer=3, values=True)
    keys = [prefix.cache.layers[0].keys for prefix in (closed, fresh)]
    assert (keys[0] - keys[1]).abs().max() < 1e-4 * keys[1].abs().max()
    assert closed.is_plain and not closed.blocks and closed.next_position is None


def test_answers_while_documents_come_and_go(qr_mini: "Backend", texts: list[str]) -> None:
    """Each answer stands on the documents that its ranking saw."""
    from qr_integrations.retrieval import DocumentIndex

    index = DocumentIndex.build(texts, qr_mini, layout="block", answers=True)
    alone, over = len(index.prefix([2])), threading.Event()

    def change() -> None:
        while not over.is_set():
            index.add([index.documents[0]])
            index.remove([0])

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: ask(index, top_k=1, max_new_tokens=1), range(8)))
    finally:
        over.set()
        changing.join()
    for one in found:
        assert one.sources[0].document.text == texts[2]
        assert one.answer.steps["prefix"] == alone


def test_what_cannot_be_answered(qr_mini: "Backend", indexes: dict[str, Any], texts: list[str]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.retrieval import DocumentIndex
    from qr_integrations.retrieval.answers import answer_afresh
    from qr_integrations.types import Ranking

    with pytest.raises(InputError, match="answers=True"):
        ask(DocumentIndex.build(texts, qr_mini))
    with pytest.raises(InputError, match="at least 1"):
        ask(indexes["joint"], top_k=0)
    with pytest.raises(InputError, match="add some"):
        ask(DocumentIndex.build([], qr_mini, answers=True))
    with pytest.raises(InputError, match="#7"):
        ask(indexes["joint"], documents=[7])
    with pytest.raises(InputError, match="rank some first"):
        answer_afresh(qr_mini, Ranking(QUESTION, ()))
    with pytest.raises(InputError, match="no place for the query"):
        ask(indexes["joint"], template="Answer.")
