"""Rankings of an index against fresh rankings of the same documents."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

QUERIES = ["who wrote dracula", "what do cats do all day", "which river flows through vienna", "capital of france"]
TEXTS = [
    "Cats sleep most of the day, and hunt at dusk.",
    "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
    "The Danube flows through Vienna, Bratislava, Budapest and Belgrade.",
    "Paris is the capital of France and its largest city.",
    "Bread is baked from flour, water, salt and yeast.",
    "The first computers filled whole rooms and were programmed with cables.",
]
LAYOUTS = [{"layout": "joint"}, {"layout": "block"}, {"layout": "block", "positions": "in_line"}]


def fresh(qr_mini: Any, refinements: dict[str, str], **options: Any) -> Any:
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(qr_mini, refinements=refinements, **options)


def built(qr_mini: Any, refinements: dict[str, str], texts: list[str] = TEXTS, **options: Any) -> Any:
    from qr_integrations import DocumentIndex

    return DocumentIndex.build(texts, fresh(qr_mini, refinements, truncation="chunk"), **options)


def scores(ranking: Any) -> list[float]:
    return [item.score for item in sorted(ranking, key=lambda item: item.index)]


def alike(one: Any, other: Any, limit: float = 1e-6) -> bool:
    return scores(one) == pytest.approx(scores(other), abs=limit) and len(one) == len(other)


@pytest.mark.parametrize("refinements", LAYOUTS, ids=str)
def test_rankings_are_those_of_a_fresh_reranker(qr_mini: Any, refinements: dict[str, str]) -> None:
    index, reranker = built(qr_mini, refinements), fresh(qr_mini, refinements, keep_prefixes=0)
    for query in QUERIES:
        expected, found = reranker.rank(query, TEXTS), index.rank(query)
        assert alike(found, expected)
        assert found.order == expected.order
        assert [item.document for item in found] == [item.document for item in expected]


@pytest.mark.parametrize("refinements", LAYOUTS, ids=str)
def test_queries_together_are_ranked_as_one_by_one(
    qr_mini: Any, refinements: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = built(qr_mini, refinements)
    queries = [*QUERIES, QUERIES[0], "who " * 300 + "wrote dracula"]
    monkeypatch.setattr("qr_integrations.retrieval.index._TOGETHER", 4)
    together = index.rank_batch(queries, top_k=3)
    for query, ranking in zip(queries, together, strict=True):
        assert ranking.query == query and len(ranking) == 3
        assert alike(ranking, index.rank(query, top_k=3))


def test_instructions_and_explanations(qr_mini: Any) -> None:
    index, reranker = built(qr_mini, {}), fresh(qr_mini, {}, keep_prefixes=0)
    only = "Only passages about animals are relevant."
    assert alike(index.rank(QUERIES[0], instruction=only), reranker.rank(QUERIES[0], TEXTS, instruction=only))
    assert not alike(index.rank(QUERIES[0], instruction=only), index.rank(QUERIES[0]), 1e-4)
    explained, expected = (
        one for one in (index.rank(QUERIES[0], explain=2), reranker.rank(QUERIES[0], TEXTS, explain=2))
    )
    assert [[span.text for span in item.spans] for item in explained] == [
        [span.text for span in item.spans] for item in expected
    ]
    assert explained[0].spans and not explained[2].spans


# ---- documents that come and go


@pytest.mark.parametrize("refinements", LAYOUTS, ids=str)
def test_added_documents_are_ranked_as_if_they_had_been_there(qr_mini: Any, refinements: dict[str, str]) -> None:
    grown = built(qr_mini, refinements, TEXTS[:2])
    grown.rank(QUERIES[0])
    grown.add(TEXTS[2:3])
    grown.add([])
    grown.add(TEXTS[3:])
    assert [document.text for document in grown.documents] == TEXTS
    for query in QUERIES:
        assert alike(grown.rank(query), built(qr_mini, refinements).rank(query))


@pytest.mark.parametrize("refinements", LAYOUTS, ids=str)
@pytest.mark.parametrize("gone", [[0], [5], [1, 3], [4, 0, 5]], ids=str)
def test_what_is_removed_leaves_nothing_behind(qr_mini: Any, refinements: dict[str, str], gone: list[int]) -> None:
    index, left = built(qr_mini, refinements), [text for i, text in enumerate(TEXTS) if i not in gone]
    index.remove(gone)
    assert [document.text for document in index.documents] == left
    for query in QUERIES:
        assert alike(index.rank(query), fresh(qr_mini, refinements).rank(query, left))
    index.add(["Bread again."])
    assert alike(index.rank(QUERIES[0]), fresh(qr_mini, refinements).rank(QUERIES[0], [*left, "Bread again."]))


def test_documents_and_windows_change_together(qr_mini: Any) -> None:
    from qr_integrations import DocumentIndex

    seen: list[tuple[int, int]] = []

    class Watched(DocumentIndex):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            held = {candidate.index for window in self.windows for candidate in window.candidates}
            seen.append((len(self.documents), len(held)))

    index: Any = Watched.__new__(Watched)
    vars(index).update(vars(built(qr_mini, {})))
    index.add(["One more."])
    index.remove([1, 3])
    assert seen and all(documents == held for documents, held in seen) and seen[-1] == (5, 5)


@pytest.mark.parametrize("layout", ["joint", "block"])
def test_what_is_removed_frees_its_memory(qr_mini: Any, layout: str) -> None:
    index = built(qr_mini, {"layout": layout}, TEXTS * 5)
    index.remove(range(3, 30))
    layers = index.windows[0].prefix.cache.layers
    stored = [kept for layer in layers for kept in (layer.stored_keys, layer.stored_values) if kept is not None]
    assert sum(kept.steps.untyped_storage().nbytes() for kept in stored) == index.num_bytes


def test_only_what_is_new_is_read(qr_mini: Any, lengths_read: list[int]) -> None:
    for layout in ("joint", "block"):
        index = built(qr_mini, {"layout": layout}, TEXTS[:5])
        lengths_read.clear()
        index.add(TEXTS[5:])
        beginning, *documents = map(len, index.windows[0].spans)
        assert sum(lengths_read) == documents[5] + (beginning if layout == "block" else 0)
        lengths_read.clear()
        index.remove([3])
        behind = sum(documents[4:])  # the first of them takes over the number of the one before
        assert sum(lengths_read) == 0 if layout == "block" else behind - 4 < sum(lengths_read) <= behind
        lengths_read.clear()
        index.remove([len(index) - 1])
        assert not lengths_read


def test_everything_out_and_in_again(qr_mini: Any) -> None:
    index = built(qr_mini, {})
    index.remove(range(len(TEXTS)))
    assert (len(index), index.num_bytes, list(index.rank(QUERIES[0])), list(index.rank_batch(QUERIES)[0])) == (
        0,
        0,
        [],
        [],
    )
    index.add(TEXTS)
    assert alike(index.rank(QUERIES[0]), built(qr_mini, {}).rank(QUERIES[0]))


def test_the_order_of_blocks_makes_no_difference(qr_mini: Any) -> None:
    order = list(range(len(TEXTS)))
    random.Random(1).shuffle(order)
    index, turned = built(qr_mini, LAYOUTS[1]), built(qr_mini, LAYOUTS[1], [TEXTS[i] for i in order])
    for query in QUERIES:
        found = scores(turned.rank(query))
        assert [found[order.index(i)] for i in range(len(TEXTS))] == pytest.approx(scores(index.rank(query)), abs=1e-6)


def test_the_layout_beside_other_refinements(qr_mini: Any) -> None:
    from qr_integrations import DocumentIndex, Refinements

    for given in ({"positions": "in_line"}, {"layout": "block", "positions": "in_line"}):
        assert DocumentIndex.build(TEXTS, qr_mini, layout="block", refinements=given).layout == "block"
    index = DocumentIndex.build(TEXTS, qr_mini, refinements=Refinements(layout="block"))
    assert (index.layout, DocumentIndex.build(TEXTS, qr_mini).layout) == ("block", "joint")
    assert (
        DocumentIndex.build(TEXTS, qr_mini, layout="joint", refinements=Refinements(layout="block")).layout == "joint"
    )


# ---- windows


@pytest.mark.parametrize("layout", ["joint", "block"])
def test_windows_fill_up(qr_mini: Any, layout: str) -> None:
    from qr_integrations import DocumentIndex

    options = {"layout": layout, "max_context_tokens": 400}
    index = DocumentIndex.build(TEXTS * 4, qr_mini, **options)
    assert len(index.windows) > 1
    assert all(len(window.reading.layout) <= 400 for window in index.windows)
    found = index.rank("who wrote dracula")
    assert sorted(item.index for item in found) == list(range(24))
    assert {item.index % 6 for item in found[:4]} == {1}
    grown = DocumentIndex.build(TEXTS * 2, qr_mini, **options)
    grown.add(TEXTS * 2)
    assert sorted(item.index for item in grown.rank("who wrote dracula")) == list(range(24))
    assert all(len(window.reading.layout) <= 400 for window in grown.windows)
    grown.remove([i for i in range(24) if i % 6 == 1])
    assert all(item.document.text != TEXTS[1] for item in grown.rank("who wrote dracula"))


def test_long_documents_are_read_in_pieces(qr_mini: Any) -> None:
    from qr_integrations import DocumentIndex

    filler = " ".join(TEXTS[0] for _ in range(300))
    novel = f"{filler} Dracula was written by Bram Stoker. {filler}"
    index = DocumentIndex.build([*TEXTS[2:], novel], qr_mini, max_context_tokens=2048)
    found = index.rank("who wrote dracula", explain=1)
    assert found[0].index == 4 and len(found) == 5
    assert any("Stoker" in span.text for span in found[0].spans)
    index.remove([4])
    assert len(index.rank("who wrote dracula")) == 4


# ---- less memory


@pytest.mark.parametrize(
    ("dtype", "limit", "share"), [("float16", 5e-4, 0.5), ("bfloat16", 4e-3, 0.5), ("int8", 2e-2, 0.27)]
)
@pytest.mark.parametrize("layout", ["joint", "block"])
def test_keys_and_values_in_less(qr_mini: Any, layout: str, dtype: str, limit: float, share: float) -> None:
    whole, less = built(qr_mini, {"layout": layout}), built(qr_mini, {"layout": layout}, kv_dtype=dtype)
    assert less.num_bytes / whole.num_bytes == pytest.approx(share, abs=0.01)
    less.add(["Bram Stoker was born in Dublin."])
    less.remove([len(TEXTS)])
    for query in QUERIES:
        assert alike(less.rank(query), whole.rank(query), limit)
        assert less.rank(query)[0].index == whole.rank(query)[0].index


def test_the_deepest_layer_keeps_the_keys_that_are_read(qr_mini: Any) -> None:
    index, whole = built(qr_mini, {}), built(qr_mini, {}, answers=True)
    tokens = len(index.windows[0].prefix)
    assert index.num_bytes == tokens * 4 * 64 * (
        4 + 4 + 4 + 4 + 3
    )  # layers 0 and 1, of layer 2 the keys of three heads
    assert whole.num_bytes == tokens * 4 * 64 * 4 * 2 * 4
    assert alike(index.rank(QUERIES[0]), whole.rank(QUERIES[0]))


# ---- prefixes to go on from


def test_prefixes_of_some_documents(qr_mini: Any) -> None:
    joint, block = built(qr_mini, {}, answers=True), built(qr_mini, LAYOUTS[1], answers=True)
    some = joint.prefix([4, 1])
    spans = joint.windows[0].spans
    assert len(some) == len(spans[0]) + len(spans[2]) + len(spans[5])
    assert some.num_positions == joint.windows[0].prefix.num_positions  # they stay where they stood
    assert block.prefix([1]).num_positions == len(block.prefix([1]))
    assert [len(block.prefix(order)) for order in ([1, 4], [4, 1])] == [len(block.prefix([1, 4]))] * 2
    assert block.prefix([1, 4]).token_ids != block.prefix([4, 1]).token_ids
    assert joint.prefix().token_ids == joint.windows[0].prefix.token_ids
    in_line = built(qr_mini, LAYOUTS[2], answers=True)
    assert in_line.prefix([4, 1]).num_positions == len(block.prefix([4, 1]))  # one behind the other, as if alone


# ---- what cannot be, and many at once


def test_what_cannot_be_says_so(qr_mini: Any, unchecked: None) -> None:
    from qr_integrations import DocumentIndex, QRHeadReranker
    from qr_integrations.errors import InputError, WindowError

    index = built(qr_mini, {})
    for ask, message in (
        (lambda: index.rank(""), "the query is empty"),
        (lambda: index.rank_batch("who"), "queries is a single query"),
        (lambda: index.rank_batch(["who", " "]), "the query is empty"),
        (lambda: index.remove([0, 6]), "there is no document #6 among 6"),
        (lambda: index.remove([-1]), "there is no document #-1"),
        (lambda: index.remove([0.5]), "pass a list of whole numbers"),
        (lambda: index.remove(0), "pass a list of whole numbers"),
        (lambda: index.rank("who", explain=True, max_spans=0), "max_spans must be at least 1"),
        (lambda: index.add([{"body": "no text"}]), "document #0 has no text"),
        (lambda: index.add("one"), "single document"),
        (lambda: index.prefix(), "answers=True"),
        (
            lambda: DocumentIndex.build(TEXTS, QRHeadReranker(qr_mini), truncation="head"),
            "the reranker has its settings",
        ),
        (lambda: built(qr_mini, {"orders": 2}), "one order"),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    assert len(index) == 6
    small = DocumentIndex.build(TEXTS, qr_mini, max_context_tokens=700)
    with pytest.raises(WindowError, match="pass a shorter query"):
        small.rank("who " * 1000)
    assert repr(index).startswith("DocumentIndex(6 documents, 1 windows, ")


def worded(name: str) -> Any:
    """A tiny random model whose tokenizer takes words apart."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    from qr_integrations.backend import Backend
    from tests.backend.measure import named, random_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return Backend(random_model(named(name)), tokenizer, name=name)


@pytest.mark.parametrize("layout", ["joint", "block"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_query_beyond_the_window_is_not_read(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations import DocumentIndex
    from qr_integrations.errors import WindowError

    index = DocumentIndex.build(["w1 w2", "w3 w4"], worded(name), heads=[(1, 0)], layout=layout)
    monkeypatch.setattr(index.backend, "forward_branches", None)
    with pytest.raises(WindowError, match="the window holds 128: pass a shorter query"):
        index.rank_batch(["w5", "w5 " * 200])


@pytest.mark.parametrize("layout", ["joint", "block"])
def test_latent_keys_are_kept_whole(layout: str) -> None:
    from qr_integrations import DocumentIndex, QRHeadReranker

    backend, texts = worded("DeepSeek-V3"), ["w5 w6", "w7 w8 w9", "w3"]
    options = {"heads": [(0, 0), (2, 1)], "refinements": {"layout": layout}}
    index = DocumentIndex.build(texts[:2], QRHeadReranker(backend, **options))
    index.add(texts[2:])
    assert alike(index.rank("w5 w9"), QRHeadReranker(backend, **options).rank("w5 w9", texts))


def test_models_that_keep_more_than_keys_and_values_say_so() -> None:
    from qr_integrations import DocumentIndex
    from qr_integrations.errors import UnsupportedModelError
    from tests.backend.measure import bench, named

    with pytest.raises(UnsupportedModelError, match="rank with a reranker"):
        DocumentIndex.build(["w1 w2", "w3 w4"], bench(named("Qwen3-Next")).backend, heads=[(1, 0)])


def test_nothing_changes_when_reading_fails(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = built(qr_mini, {})
    before = scores(index.rank(QUERIES[0]))
    monkeypatch.setattr(type(qr_mini), "prefill", lambda *_, **__: 1 / 0)
    for change in (lambda: index.add(TEXTS), lambda: index.remove([1])):
        with pytest.raises(ZeroDivisionError):
            change()
    monkeypatch.undo()
    assert len(index) == 6 and scores(index.rank(QUERIES[0])) == before
    index.add(["The lock is free again."])


def test_progress_counts_tokens(qr_mini: Any) -> None:
    for layout in ("joint", "block"):
        told: list[tuple[int, int]] = []
        built(qr_mini, {"layout": layout}, TEXTS * 80, progress=lambda *counts, to=told: to.append(counts))
        assert len({total for _, total in told}) == 1 and len(told) > 1
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert told[-1][0] == pytest.approx(told[-1][1], rel=0.15)


def test_sixteen_threads_ask_while_documents_come_and_go(qr_mini: Any) -> None:
    index = built(qr_mini, LAYOUTS[1])
    expected = {query: scores(index.rank(query)) for query in QUERIES}
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            index.add(["Nobody asks about this one."])
            index.remove([len(TEXTS)])

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda i: (QUERIES[i % 4], index.rank(QUERIES[i % 4])), range(64)))
    finally:
        stop.set()
        changing.join()
    assert {len(ranking) for _, ranking in found} <= {6, 7}
    for query, ranking in found:
        if len(ranking) == 6:
            assert scores(ranking) == pytest.approx(expected[query], abs=1e-6)
