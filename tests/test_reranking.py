"""What all adapters share: settings, scales, and a reranker that is made once, without a framework around it."""

import copy
import gc
import json
import math
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

QUERY = "who wrote dracula"
TEXTS = [
    "Cats sleep most of the day.",
    "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
    "The Danube flows through Vienna and Budapest.",
    "Frankenstein was written by Mary Shelley.",
    "Cats sleep most of the day.",
]


def documents(texts: list[str] = TEXTS) -> list[Any]:
    from qr_integrations import Document

    return [Document(text) for text in texts]


def settings(qr_mini: Any, **given: Any) -> Any:
    from qr_integrations.reranking import RerankSettings

    return RerankSettings(backend=qr_mini, **given)


@pytest.fixture(scope="module")
def raw(qr_mini: Any) -> list[float]:
    """The scores of the texts in the given order, from the reranker itself."""
    from qr_integrations import QRHeadReranker

    ranking = QRHeadReranker(qr_mini).rank(QUERY, TEXTS)
    return [item.score for item in sorted(ranking, key=lambda item: item.index)]


def best_first(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


# ---- scales


def test_without_normalize_the_attention_is_left_as_it_is(qr_mini: Any, raw: list[float]) -> None:
    found = settings(qr_mini).relevances(QUERY, documents(), None)
    assert [r.index for r in found] == best_first(raw) and [r.rank for r in found] == [1, 2, 3, 4, 5]
    assert [r.score for r in found] == [r.qr_score for r in found] == pytest.approx(sorted(raw, reverse=True), abs=1e-6)
    assert {r.score_type for r in found} == {"raw"} and {type(r.score) for r in found} == {float}
    assert min(raw) < 0 < max(raw)  # otherwise the scales below prove nothing


def test_share_is_of_what_is_positive_and_sigmoid_is_a_sigmoid(qr_mini: Any, raw: list[float]) -> None:
    whole = sum(score for score in raw if score > 0)
    expected = {
        "share": [max(0.0, score) / whole for score in raw],
        "sigmoid": [1 / (1 + math.exp(-score)) for score in raw],
    }
    for name, numbers in expected.items():
        found = settings(qr_mini, normalize=name).relevances(QUERY, documents(), None)
        assert [r.index for r in found] == best_first(raw) and {r.score_type for r in found} == {name}
        assert {r.index: r.score for r in found} == pytest.approx(dict(enumerate(numbers)), abs=1e-6)
        assert {r.index: r.qr_score for r in found} == pytest.approx(dict(enumerate(raw)), abs=1e-6)
    assert sum(expected["share"]) == pytest.approx(1.0)


def test_a_share_of_nothing_is_zero(qr_mini: Any) -> None:
    from qr_integrations import Ranking, ScoredDocument

    items = tuple(ScoredDocument(i, score, documents()[i], 9) for i, score in enumerate((0.0, -0.0, -0.5)))
    assert settings(qr_mini, normalize="share")._normalized(Ranking(QUERY, items)) == ([0.0, 0.0, 0.0], "share")


def test_a_function_sees_all_scores_best_first_and_its_order_counts(qr_mini: Any, raw: list[float]) -> None:
    seen: list[list[float]] = []

    def upside_down(scores: list[float]) -> Iterator[float]:
        seen.append(list(scores))
        return (-score for score in scores)

    found = settings(qr_mini, normalize=upside_down).relevances(QUERY, documents(), 2)
    assert seen[0] == pytest.approx(sorted(raw, reverse=True), abs=1e-6)
    assert [r.index for r in found] == best_first(raw)[::-1][:2] and [r.rank for r in found] == [1, 2]
    assert [r.score for r in found] == pytest.approx([-raw[r.index] for r in found], abs=1e-6)
    assert [r.qr_score for r in found] == pytest.approx([raw[r.index] for r in found], abs=1e-6)
    assert {r.score_type for r in found} == {"custom"}


def test_whoever_a_function_puts_first_has_spans(qr_mini: Any) -> None:
    texts = [f"Bram Stoker wrote Dracula, chapter {i}." for i in range(5)]
    reversing = settings(qr_mini, normalize=lambda scores: [-score for score in scores], explain=True)
    found = reversing.relevances(QUERY, documents(texts), 2)
    assert len(found) == 2 and all(r.spans for r in found)


NO_NUMBERS = [
    None,
    3.5,
    [],
    [1.0],
    [1.0] * 6,
    ["a"] * 5,
    [None] * 5,
    [[1.0]] * 5,
    [math.nan] * 5,
    [1, 2, 3, 4, -math.inf],
]


@pytest.mark.parametrize("given", NO_NUMBERS)
def test_a_function_that_does_not_return_a_number_each_is_an_error(qr_mini: Any, given: Any) -> None:
    from qr_integrations.errors import InputError

    adapter = settings(qr_mini, normalize=lambda scores: given)
    for call in (lambda: adapter.relevances(QUERY, documents(), None), lambda: adapter.scores(QUERY, documents())):
        with pytest.raises(InputError, match=r"normalize (returned|made) .*: return"):
            call()


def test_what_a_function_may_return(qr_mini: Any) -> None:
    import numpy as np
    import torch

    expected = [5.0, 4.0, 3.0, 2.0, 1.0]
    for given in (
        expected,
        tuple(expected),
        np.array(expected),
        torch.tensor(expected),
        iter(expected),
        range(5, 0, -1),
    ):
        found = settings(qr_mini, normalize=lambda scores, given=given: given).relevances(QUERY, documents(), None)
        assert [r.score for r in found] == expected and {type(r.score) for r in found} == {float}


# ---- who stays


def test_the_threshold_goes_by_the_scale_and_holds_for_equals(qr_mini: Any, raw: list[float]) -> None:
    second = settings(qr_mini, normalize="sigmoid").relevances(QUERY, documents(), None)[1].score
    strict = settings(qr_mini, normalize="sigmoid", score_threshold=second)
    assert [r.index for r in strict.relevances(QUERY, documents(), None)] == best_first(raw)[:2]
    assert [r.rank for r in strict.relevances(QUERY, documents(), 1)] == [1]
    above = settings(qr_mini, normalize="sigmoid", score_threshold=math.nextafter(second, 1))
    assert len(above.relevances(QUERY, documents(), None)) == 1
    assert settings(qr_mini, score_threshold=99).relevances(QUERY, documents(), None) == []
    positive = settings(qr_mini, score_threshold=0.0).relevances(QUERY, documents(), None)
    assert {r.index for r in positive} == {i for i, score in enumerate(raw) if score >= 0}


@pytest.mark.parametrize(("top_n", "expected"), [(None, 5), (0, 0), (1, 1), (4, 4), (5, 5), (99, 5)])
def test_top_n_keeps_the_best(qr_mini: Any, raw: list[float], top_n: int | None, expected: int) -> None:
    found = settings(qr_mini).relevances(QUERY, documents(), top_n)
    assert [r.index for r in found] == best_first(raw)[:expected]


def test_nothing_to_rank_needs_no_model() -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.reranking import RerankSettings

    absent = RerankSettings(model="/no/such/folder", local_files_only=True)
    assert absent.relevances(QUERY, [], None) == absent.relevances(QUERY, documents(), 0) == []
    assert absent.scores(QUERY, []) == []
    with pytest.raises(LoadError):
        absent.open()


def test_scores_are_in_the_given_order_also_where_they_are_equal(qr_mini: Any, raw: list[float]) -> None:
    assert settings(qr_mini).scores(QUERY, documents()) == pytest.approx(raw, abs=1e-6)
    equal = settings(qr_mini, normalize=lambda scores: [0.5] * len(scores))
    assert equal.scores(QUERY, documents()) == [0.5] * 5
    assert [r.index for r in equal.relevances(QUERY, documents(), None)] == [0, 1, 2, 3, 4]
    places = settings(qr_mini, normalize=lambda scores: range(len(scores))).scores(QUERY, documents())
    assert places == [float(best_first(raw).index(i)) for i in range(5)]
    share = settings(qr_mini, normalize="share")
    by_index = {r.index: r.score for r in share.relevances(QUERY, documents(), None)}
    assert list(by_index.values()).count(0.0) > 1  # ties
    assert share.scores(QUERY, documents()) == [by_index[i] for i in range(5)]
    assert settings(qr_mini, score_threshold=99).scores(QUERY, documents()) == pytest.approx(raw, abs=1e-6)


# ---- what is said about a document


def test_metadata_goes_into_json_tells_of_cuts_and_has_spans_if_asked_for(qr_mini: Any) -> None:
    plain = settings(qr_mini).relevances(QUERY, documents(), None)[0]
    said = {"qr_score": plain.qr_score, "qr_score_type": "raw", "qr_rank": 1, "qr_truncated": False}
    assert plain.spans is None and plain.added_to({}) == said
    explaining = settings(qr_mini, explain=True, max_spans=1)
    best, *others = explaining.relevances(QUERY, documents(), None)
    own = {"page": 3, "qr_score_type": "old", "qr_rank": "old", "qr_spans": "old"}
    kept = dict(own)
    said = json.loads(json.dumps(best.added_to(own)))
    assert own == kept and said["page"] == 3 and "old" not in said.values()
    assert said["qr_rank"] == 1 and said["qr_truncated"] is False and said["qr_score"] == best.qr_score
    (span,) = said["qr_spans"]
    assert TEXTS[best.index][span["start"] : span["end"]] == span["text"] and "Dracula" in span["text"]
    assert all(r.spans is not None and len(r.spans) <= 1 for r in others)
    cut = settings(qr_mini, max_doc_tokens=10).relevances(QUERY, documents([TEXTS[1], "Cats."]), None)
    assert {r.index: r.truncated for r in cut} == {0: True, 1: False}
    every = settings(qr_mini, explain=True, max_spans=None)
    assert len(every.relevances(QUERY, documents([TEXTS[1] + "\n\n" + TEXTS[1]]), 1)[0].spans) > 1


def test_a_bar_is_shown_over_several_prompts(qr_mini: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings(qr_mini, show_progress=True, batch_size=2).relevances(QUERY, documents(), None)
    assert "3/3" in capsys.readouterr().err
    settings(qr_mini, show_progress=False, batch_size=2).relevances(QUERY, documents(), None)
    assert capsys.readouterr().err == ""


# ---- the reranker behind it


def test_equal_settings_give_the_same_reranker_others_a_new_one(qr_mini: Any) -> None:
    adapter = settings(qr_mini)
    first = adapter.open()
    assert adapter.open() is first and first.backend is qr_mini
    adapter.relevances(QUERY, documents(), None)
    adapter.normalize, adapter.score_threshold, adapter.explain = "share", 0.1, True  # not the reranker's business
    assert adapter.open() is first
    for name, value in {"instruction": "Only novels.", "batch_size": 2, "method": "icr"}.items():
        before = adapter.open()
        setattr(adapter, name, value)
        assert adapter.open() is not before and adapter.open() is adapter.open(), name
    from qr_integrations import ICRReranker

    opened = adapter.open()
    assert isinstance(opened, ICRReranker) and opened.instruction == "Only novels." and opened.limits.batch_size == 2


def test_threads_that_open_at_once_get_one_reranker(qr_mini: Any) -> None:
    for _ in range(5):
        adapter, barrier = settings(qr_mini), threading.Barrier(16)

        def opened(_: int, adapter: Any = adapter, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            return adapter.open()

        with ThreadPoolExecutor(16) as pool:
            rerankers = list(pool.map(opened, range(16)))
        assert len({id(reranker) for reranker in rerankers}) == 1 and adapter.open() is rerankers[0]


def test_a_thread_that_looked_before_another_one_opened_takes_the_same_reranker(qr_mini: Any) -> None:
    adapter, looked, other_is_done = settings(qr_mini), threading.Event(), threading.Event()

    class Delayed(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            found = super().get(key, default)
            if threading.current_thread().name.startswith("late"):
                looked.set()
                other_is_done.wait(1)
            return found

    adapter._opened.rerankers = Delayed()
    with ThreadPoolExecutor(1, thread_name_prefix="late") as pool:
        late = pool.submit(adapter.open)
        looked.wait(1)
        early = adapter.open()
        other_is_done.set()
        assert late.result() is early is adapter.open()


def test_threads_with_copies_get_the_reranker_of_their_own_settings(qr_mini: Any) -> None:
    first = settings(qr_mini, instruction="0")
    copies = [first.model_copy(update={"instruction": str(i)}) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(lambda i: copies[i % 4].open().instruction, range(800)))
    finally:
        sys.setswitchinterval(interval)
    assert opened == [str(i % 4) for i in range(800)]


def test_closing_lets_go_of_the_weights_and_of_what_read_with_them(qr_mini: Any) -> None:
    from qr_integrations.reranking import RerankSettings

    adapter = RerankSettings(model="qr-mini", local_files_only=True)  # weights of its own: other tests use qr-mini
    adapter.close()  # nothing was loaded
    before = adapter.scores(QUERY, documents())
    backends = []
    for close in (adapter.close, lambda: adapter.open().backend.close()):
        backends.append(adapter.open().backend)
        old = weakref.ref(adapter.open())
        close()
        assert backends[-1].closed and adapter.scores(QUERY, documents()) == pytest.approx(before, abs=1e-6)
        gc.collect()
        assert old() is None
    assert adapter.open().backend not in backends and not qr_mini.closed
    adapter.close()


# ---- copies, pickles, JSON


def test_copies_share_the_weights_and_are_equal(qr_mini: Any) -> None:
    adapter = settings(qr_mini, instruction="Only novels.")
    opened = adapter.open()
    for twin in (copy.copy(adapter), copy.deepcopy(adapter), adapter.model_copy(), adapter.model_copy(deep=True)):
        assert twin == adapter and twin.backend is qr_mini and twin.open() is opened
    changed = adapter.model_copy(update={"instruction": None})
    assert changed != adapter and changed.open().instruction is None and adapter.open().instruction == "Only novels."


def test_a_pickle_leaves_the_backend_out_and_ranks_alike(qr_mini: Any) -> None:
    adapter = settings(qr_mini, normalize="share", heads=[(1, 1), (2, 0)])
    expected = adapter.scores(QUERY, documents())
    assert adapter.__getstate__()["__dict__"]["backend"] is None and adapter.backend is qr_mini
    data = pickle.dumps(adapter)
    assert len(data) < 5000
    again = pickle.loads(data)
    assert again.backend is None and again.model == "qr-mini" and again.open().backend is qr_mini
    assert again.scores(QUERY, documents()) == pytest.approx(expected, abs=1e-6)


def test_a_backend_around_a_model_of_your_own_cannot_be_pickled(qr_mini: Any) -> None:
    from qr_integrations import Backend
    from qr_integrations.errors import InputError

    adapter = settings(Backend(qr_mini.model, qr_mini.tokenizer, name="mine"), heads=[(1, 1)])
    assert adapter.model == "mine" and len(adapter.scores(QUERY, documents())) == 5
    with pytest.raises(InputError, match=r"'mine' .*cannot be pickled: make it with Backend\.load"):
        pickle.dumps(adapter)


def test_how_a_backend_was_loaded_stands_in_the_settings(qr_mini: Any) -> None:
    from qr_integrations import Backend
    from qr_integrations.bundled import bundled_path

    loading = {"dtype": "float64", "device": "cpu", "attn_implementation": "eager", "local_files_only": True}
    backend = Backend.load(bundled_path("qr-mini"), **loading)
    try:
        adapter = settings(backend)
        assert {name: getattr(adapter, name) for name in loading} == loading
        assert adapter.model == str(bundled_path("qr-mini")) and adapter.device_map is None
        assert pickle.loads(pickle.dumps(adapter)).open().backend is backend
    finally:
        backend.close()
    assert settings(qr_mini).dtype == settings(qr_mini).device == "auto" and settings(qr_mini).model == "qr-mini"


def test_settings_go_through_json(qr_mini: Any) -> None:
    from qr_integrations.reranking import RerankSettings

    adapter = settings(qr_mini, heads=[(1, 1), (2, 0)], normalize="sigmoid", instruction="x", null_instruction=0.5)
    data = adapter.model_dump_json()
    assert "backend" not in json.loads(data)
    again = RerankSettings.model_validate_json(data)
    assert again.model_dump() == adapter.model_dump() and RerankSettings(**again.model_dump()) == again
    assert again.scores(QUERY, documents()) == pytest.approx(adapter.scores(QUERY, documents()), abs=1e-6)


def test_paths_and_head_sets_become_plain(tmp_path: Any) -> None:
    from qr_integrations import HeadSet
    from qr_integrations.reranking import RerankSettings

    heads = HeadSet.of([(1, 1), (2, 0)])
    heads.save(tmp_path / "heads.json")
    assert RerankSettings(model=tmp_path).model == str(tmp_path)
    assert RerankSettings(model="qr-mini", heads=heads).heads == [(1, 1), (2, 0)]
    by_file = RerankSettings(model="qr-mini", heads=tmp_path / "heads.json")
    assert by_file.heads == str(tmp_path / "heads.json") and by_file.open().heads.heads == heads.heads


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "no model: pass model="),
        ({"model": "qr-mini", "modell": 1}, "modell"),
        ({"model": "qr-mini", "normalize": "softmax"}, "normalize"),
        ({"model": "qr-mini", "max_spans": 0}, "max_spans"),
    ],
)
def test_a_setting_that_cannot_be_is_named_at_once(wrong: dict[str, Any], message: str) -> None:
    from qr_integrations.reranking import RerankSettings

    with pytest.raises(ValueError, match=message):
        RerankSettings(**wrong)


def test_importing_it_loads_no_model_library(in_fresh_python: Any) -> None:
    heavy = ["torch", "transformers", "numpy", "langchain_core", "llama_index", "tqdm"]
    code = f"""if True:
        import sys
        from qr_integrations.reranking import RerankSettings
        RerankSettings(model="qr-mini", heads=[(1, 1)]).relevances("q", [], None)
        print(*[name for name in {heavy} if name in sys.modules])"""
    assert in_fresh_python(code) == ""
