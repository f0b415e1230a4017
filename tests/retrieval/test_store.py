"""Documents that come back: found in other lists, with the numbers of a fresh reading, within the bytes allowed."""

import copy
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.retrieval.store import DocumentCache

QUERY = "who wrote dracula"
CATS = "Cats sleep most of the day, and wrote nothing."
DRACULA = "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker."
DANUBE = "The Danube flows through Vienna and Budapest."
SHELLEY = "Frankenstein was written by Mary Shelley; Dracula was not."
TEXTS = [CATS, DRACULA, DANUBE, SHELLEY]
LAYOUTS = ["joint", "block"]


def scores(backend: "Backend", texts: Sequence[str], layout: str, cache: "DocumentCache | None" = None) -> list[float]:
    """In the order of the texts; no list of documents is kept but by the cache."""
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(backend, refinements={"layout": layout}, keep_prefixes=0, cache=cache)
    return [item.score for item in sorted(reranker.rank(QUERY, texts), key=lambda item: item.index)]


def new_cache(*args: Any, **kwargs: Any) -> "DocumentCache":
    from qr_integrations.retrieval.store import DocumentCache

    return DocumentCache(*args, **kwargs)


def counted(cache: "DocumentCache") -> tuple[int, int]:
    return cache.stats().hits, cache.stats().misses


@pytest.fixture(scope="module")
def one_size(qr_mini: "Backend") -> int:
    """Bytes of the beginning and the four texts, read as blocks."""
    cache = new_cache()
    scores(qr_mini, TEXTS, "block", cache)
    return cache.stats().num_bytes


# ---- what hits, and what comes of it


@pytest.mark.parametrize(
    "texts", [TEXTS[::-1], [DANUBE], [SHELLEY, CATS, SHELLEY], ["Bees hum.", DRACULA, CATS, "Rivers flow."]], ids=len
)
def test_blocks_are_found_in_any_list_at_any_place(qr_mini: "Backend", texts: list[str]) -> None:
    cache = new_cache()
    scores(qr_mini, TEXTS, "block", cache)
    found = scores(qr_mini, texts, "block", cache)
    new = sum(text not in TEXTS for text in texts)
    assert counted(cache) == (len(texts) - new, len(TEXTS) + new)
    assert found == pytest.approx(scores(qr_mini, texts, "block"), abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "hits"),
    [([*TEXTS, "Bees hum."], 4), (TEXTS[:2], 2), ([CATS, SHELLEY, DRACULA], 1), (TEXTS[::-1], 0)],
)
def test_a_joint_list_is_found_as_far_as_it_begins_like_another(
    qr_mini: "Backend", texts: list[str], hits: int
) -> None:
    cache = new_cache()
    scores(qr_mini, TEXTS, "joint", cache)
    found = scores(qr_mini, texts, "joint", cache)
    assert counted(cache) == (hits, len(TEXTS) + len(texts) - hits)
    assert found == pytest.approx(scores(qr_mini, texts, "joint"), abs=1e-5)


def test_what_was_found_is_not_read_again(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    cache, lengths = new_cache(), []
    scores(qr_mini, TEXTS, "block", cache)
    decoder = type(qr_mini.decoder)
    forward = decoder.forward

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", noted)
    scores(qr_mini, TEXTS, "block")
    read, lengths[:] = sum(lengths), []
    scores(qr_mini, TEXTS[::-1], "block", cache)
    documents = sum(len(qr_mini.tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS)
    assert sum(lengths) <= read - documents


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", ["auto", "float16", "int8"])
def test_a_hit_gives_the_numbers_of_the_reading_bit_for_bit(qr_mini: "Backend", layout: str, kv_dtype: str) -> None:
    cache = new_cache(kv_dtype=kv_dtype)
    read = scores(qr_mini, TEXTS, layout, cache)
    assert scores(qr_mini, TEXTS, layout, cache) == read
    assert counted(cache) == (4, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_bits_cost_a_quarter_and_little_else(qr_mini: "Backend", layout: str) -> None:
    plain, small = new_cache(), new_cache(kv_dtype="int8")
    exact = scores(qr_mini, TEXTS, layout, plain)
    assert scores(qr_mini, TEXTS, layout, small) == pytest.approx(exact, abs=0.01)
    assert small.stats().num_bytes < 0.3 * plain.stats().num_bytes
    assert max(exact) > 0.1


def test_blocks_that_are_placed_one_behind_the_other_are_found_too(qr_mini: "Backend") -> None:
    from qr_integrations import QRHeadReranker

    settings: dict[str, Any] = {"refinements": {"layout": "block", "positions": "in_line"}, "keep_prefixes": 0}
    cache = new_cache()
    cached, plain = QRHeadReranker(qr_mini, cache=cache, **settings), QRHeadReranker(qr_mini, **settings)
    for texts in (TEXTS, TEXTS[::-1]):
        expected = [(item.index, pytest.approx(item.score, abs=1e-5)) for item in plain.rank(QUERY, texts)]
        assert [(item.index, item.score) for item in cached.rank(QUERY, texts)] == expected
    assert counted(cache) == (4, 4)


# ---- whose they are


def others(backend: "Backend") -> Iterator["Backend"]:
    from qr_integrations.backend import Backend

    yield Backend(copy.deepcopy(backend.model).bfloat16(), backend.tokenizer, name="qr-mini")
    noisy = copy.deepcopy(backend.model)
    with torch.no_grad():
        noisy.get_input_embeddings().weight.mul_(1.5)
    yield Backend(noisy, backend.tokenizer, name="qr-mini")
    turned = type(backend.model)(copy.deepcopy(backend.model.config))
    turned.config.rope_parameters["rope_theta"] *= 2
    turned = type(backend.model)(turned.config)
    turned.load_state_dict(backend.model.state_dict())
    yield Backend(turned.eval(), backend.tokenizer, name="qr-mini")


def test_models_do_not_mix_in_one_cache(qr_mini: "Backend") -> None:
    """Another precision, other weights of the same shapes, the same weights with other angles: one name for all."""
    cache = new_cache()
    scores(qr_mini, TEXTS[:2], "block", cache)
    for number, other in enumerate(others(qr_mini), start=2):
        assert scores(other, TEXTS[:2], "block", cache) == scores(other, TEXTS[:2], "block")
        assert counted(cache) == (0, 2 * number)


def test_deeper_readings_serve_shallower_ones_but_not_the_other_way_round(qr_mini: "Backend") -> None:
    from qr_integrations import ICRReranker

    cache = new_cache()
    shallow = scores(qr_mini, TEXTS, "joint", cache)
    deep = ICRReranker(qr_mini, cache=cache, keep_prefixes=0)
    plain = ICRReranker(qr_mini, keep_prefixes=0).rank(QUERY, TEXTS)
    for hits in (0, 4):
        assert [item.score for item in deep.rank(QUERY, TEXTS)] == pytest.approx([item.score for item in plain])
        assert counted(cache) == (hits, 8)
    assert scores(qr_mini, TEXTS, "joint", cache) == pytest.approx(shallow, abs=1e-6)
    assert counted(cache) == (8, 8)


def test_the_top_values_are_there_if_they_are_asked_for(qr_mini: "Backend") -> None:
    """And a prompt of which some documents were read with them, others without, is joined without."""
    from qr_integrations.retrieval import PromptLayout
    from qr_integrations.retrieval.layout import PromptStyle
    from qr_integrations.types import Document

    def layout(texts: Sequence[str]) -> PromptLayout:
        return PromptLayout.build(qr_mini, QUERY, [Document(text) for text in texts], PromptStyle(blocks=True))

    cache, top = new_cache(), max(qr_mini.attention_layers)
    cache.read(qr_mini, layout([CATS, DRACULA]), top_layer=top)
    whole = cache.read(qr_mini, layout([DRACULA]), top_layer=top, values=True)
    assert counted(cache) == (0, 3), "the keys alone are not enough"
    plain = qr_mini.prefill(whole.token_ids, top_layer=top, values=True)
    assert whole.cache is not None and plain.cache is not None
    for mine, its in zip(whole.cache.layers, plain.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys)
        torch.testing.assert_close(mine.values, its.values)
    mixed = cache.read(qr_mini, layout([CATS, DRACULA]), top_layer=top)
    assert counted(cache) == (2, 3) and mixed.cache is not None
    assert mixed.cache.layers[-1].keys.shape[-2] == len(mixed) and not mixed.cache.layers[-1].values.numel()


# ---- how much is held


def test_never_more_bytes_than_allowed_and_the_least_used_go_first(qr_mini: "Backend", one_size: int) -> None:
    cache = new_cache(one_size // 2)
    for texts in (TEXTS, [CATS], [DRACULA, CATS], [SHELLEY], [DANUBE]):
        scores(qr_mini, texts, "block", cache)
        held = [entry.piece.num_bytes for entry in cache._memory.values()]
        assert cache.stats().num_bytes == sum(held) <= one_size // 2 and held
    before = counted(cache)
    scores(qr_mini, [DANUBE], "block", cache)
    assert counted(cache) == (before[0] + 1, before[1]), "what was used last is there"
    scores(qr_mini, [CATS, DRACULA], "block", cache)
    assert counted(cache)[1] > before[1], "what was not, is not"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_found_again_was_used_last(qr_mini: "Backend", layout: str) -> None:
    cache = new_cache()
    for texts in ([CATS], [DRACULA], [CATS]):
        scores(qr_mini, texts, layout, cache)
    cache.max_bytes = cache.stats().num_bytes
    scores(qr_mini, ["Bees hum."], layout, cache)
    before = counted(cache)
    scores(qr_mini, [CATS], layout, cache)
    assert counted(cache) == (before[0] + 1, before[1])


def test_the_beginning_of_a_joint_list_stays_longest(qr_mini: "Backend", one_size: int) -> None:
    """What stands behind a gap is never found."""
    cache = new_cache(one_size // 2)
    scores(qr_mini, TEXTS, "joint", cache)
    scores(qr_mini, TEXTS, "joint", cache)
    assert counted(cache)[0] >= 1
    assert cache.stats().num_bytes <= one_size // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_has_no_room_is_read_and_not_kept(qr_mini: "Backend", layout: str) -> None:
    cache = new_cache(1000)
    assert scores(qr_mini, TEXTS, layout, cache) == pytest.approx(scores(qr_mini, TEXTS, layout), abs=1e-5)
    assert cache.stats().num_bytes == len(cache) == 0 and counted(cache) == (0, 4)


# ---- on disk


@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_leaves_memory_comes_back_from_the_folder(
    qr_mini: "Backend", tmp_path: Path, layout: str, kv_dtype: str, one_size: int
) -> None:
    for max_bytes in (0, one_size // 4):
        cache = new_cache(max_bytes, folder=tmp_path / str(max_bytes), kv_dtype=kv_dtype)
        read = scores(qr_mini, TEXTS, layout, cache)
        assert scores(qr_mini, TEXTS, layout, cache) == read
        assert counted(cache) == (4, 4)
        sizes = [path.stat().st_size for path in (tmp_path / str(max_bytes)).iterdir()]
        assert cache.stats().disk_bytes == sum(sizes) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_later_cache_over_the_folder_finds_what_was_flushed(qr_mini: "Backend", tmp_path: Path, layout: str) -> None:
    cache = new_cache(folder=tmp_path / "deep" / "er")
    read = scores(qr_mini, TEXTS, layout, cache)
    assert not list(tmp_path.rglob("*.safetensors"))
    cache.flush()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    cache.flush()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    later = new_cache(folder=tmp_path / "deep" / "er")
    assert later.stats().disk_bytes == cache.stats().disk_bytes > 0
    assert scores(qr_mini, TEXTS, layout, later) == read and counted(later) == (4, 0)
    other_kind = new_cache(folder=tmp_path / "deep" / "er", kv_dtype="int8")
    scores(qr_mini, TEXTS[:1], layout, other_kind)
    assert counted(other_kind) == (0, 1)


def test_the_folder_has_its_limit_too(qr_mini: "Backend", tmp_path: Path, one_size: int) -> None:
    cache = new_cache(0, folder=tmp_path, max_disk_bytes=one_size // 2)
    for texts in (TEXTS, TEXTS[::-1], [DANUBE]):
        scores(qr_mini, texts, "block", cache)
        sizes = [path.stat().st_size for path in tmp_path.iterdir()]
        assert cache.stats().disk_bytes == sum(sizes) <= one_size // 2 and sizes
    hits = counted(cache)[0]
    scores(qr_mini, [DANUBE], "block", cache)
    assert counted(cache)[0] == hits + 1
    assert new_cache(0, folder=tmp_path, max_disk_bytes=1000).stats().disk_bytes == 0 and not list(tmp_path.iterdir())


def cut_off(content: bytes, other: bytes) -> bytes:
    return content[:-100]


def header_cut_off(content: bytes, other: bytes) -> bytes:
    return content[:20]


def emptied(content: bytes, other: bytes) -> bytes:
    return b""


def changed(content: bytes, other: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


def moved_on(content: bytes, other: bytes) -> bytes:
    digit = content.index(b'"position":"') + len(b'"position":"')
    return content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :]


def exchanged(content: bytes, other: bytes) -> bytes:
    return other


@pytest.mark.parametrize("damage", [cut_off, header_cut_off, emptied, changed, moved_on, exchanged])
def test_a_damaged_file_is_a_miss_and_never_a_number(
    qr_mini: "Backend", tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    read = scores(qr_mini, TEXTS, "block", new_cache(0, folder=tmp_path))
    paths = sorted(tmp_path.iterdir())
    sound = {path: path.read_bytes() for path in paths}
    for path, other in zip(paths[1:], paths, strict=False):
        path.write_bytes(damage(sound[path], sound[other]))
    cache = new_cache(0, folder=tmp_path)
    assert scores(qr_mini, TEXTS, "block", cache) == pytest.approx(read, abs=1e-6)
    assert cache.stats().misses >= 3 and "damaged" in caplog.text
    assert set(tmp_path.iterdir()) == set(sound), "removed, and written again"
    caplog.clear()
    assert scores(qr_mini, TEXTS, "block", new_cache(0, folder=tmp_path)) == pytest.approx(read, abs=1e-6)
    assert not caplog.text


def test_files_that_another_process_removes_are_read_again(qr_mini: "Backend", tmp_path: Path) -> None:
    one, other = new_cache(0, folder=tmp_path), new_cache(0, folder=tmp_path)
    read = scores(qr_mini, TEXTS, "block", one)
    assert scores(qr_mini, TEXTS, "block", other) == read and counted(other) == (4, 0)
    other.clear()
    assert not list(tmp_path.iterdir()) and other.stats().disk_bytes == 0
    assert scores(qr_mini, TEXTS, "block", one) == pytest.approx(read, abs=1e-6)
    assert counted(one) == (0, 8) and len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_fills_up_costs_no_ranking(
    qr_mini: "Backend", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qr_integrations.retrieval.piece_files.write_whole", full)
    cache = new_cache(0, folder=tmp_path)
    assert scores(qr_mini, TEXTS, "block", cache) == pytest.approx(scores(qr_mini, TEXTS, "block"), abs=1e-5)
    assert "No space left" in caplog.text and cache.stats().disk_bytes == 0


def test_half_written_files_are_cleared_away_and_strange_ones_left(tmp_path: Path) -> None:
    name = "0" * 64 + ".safetensors"
    for other in (name + "k2x", name + "old", "README", "model.safetensors"):
        (tmp_path / other).write_text("?")
    os.utime(tmp_path / (name + "old"), (time.time() - 86400,) * 2)
    new_cache(folder=tmp_path, max_disk_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {name + "k2x", "README", "model.safetensors"}


# ---- threads, and what goes wrong


@pytest.mark.parametrize("max_bytes", [2**30, 200_000])
def test_sixteen_threads_get_what_one_gets(qr_mini: "Backend", tmp_path: Path, max_bytes: int) -> None:
    lists = [TEXTS[i:] + TEXTS[:i] for i in range(4)]
    expected = {tuple(texts): scores(qr_mini, texts, "block") for texts in lists}
    cache = new_cache(max_bytes, folder=tmp_path, max_disk_bytes=2 * max_bytes)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda i: scores(qr_mini, lists[i % 4], "block", cache), range(16)))
    for number, some in enumerate(found):
        assert some == pytest.approx(expected[tuple(lists[number % 4])], abs=1e-5)
    assert sum(counted(cache)) == 64 and cache.stats().num_bytes <= max_bytes
    if max_bytes == 2**30:
        assert counted(cache)[1] == 4, "one reads, the others wait"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reading_that_fails_leaves_nothing_behind(
    qr_mini: "Backend", layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, passes = new_cache(), iter([False, True])
    forward = type(qr_mini.decoder).forward

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(passes):
            raise RuntimeError("a cable was pulled")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr("qr_integrations.backend.reader._CPU_CHUNK", 64)
    with monkeypatch.context() as broken:
        broken.setattr(type(qr_mini.decoder), "forward", failing)
        with pytest.raises(RuntimeError, match="cable"):
            scores(qr_mini, TEXTS, layout, cache)
    assert len(cache) == cache.stats().num_bytes == 0 and counted(cache) == (0, 0)
    assert scores(qr_mini, TEXTS, layout, cache) == pytest.approx(scores(qr_mini, TEXTS, layout), abs=1e-5)


def layout_of(backend: "Backend", num_tokens: int, *, are_blocks: bool) -> Any:
    """A beginning of two tokens, and two documents."""
    from qr_integrations.retrieval import PromptLayout
    from qr_integrations.types import Span
    from tests.backend.measure import random_ids

    ids, middle = tuple(random_ids(num_tokens + 3)), num_tokens // 2
    spans = (Span(2, middle), Span(middle, num_tokens))
    rows, shared = Span(num_tokens, num_tokens + 3), Span(0, num_tokens)
    return PromptLayout(ids, spans, rows, shared, "", None, (), 0, spans if are_blocks else ())


@pytest.mark.parametrize("name", ["Qwen3-Next", "Jamba"])
def test_recurrent_models_are_read_every_time(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from tests.backend.measure import bench, named

    on, cache = bench(named(name)), new_cache()
    layout = layout_of(on.backend, 20, are_blocks=False)
    for _ in range(2):
        prefix = cache.read(on.backend, layout, top_layer=on.top_layer)
        assert prefix.token_ids == layout.token_ids[:20]
    assert len(cache) == 0 and counted(cache) == (0, 4)
    assert caplog.text.count("read every time") == 1


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Mistral", "Gemma 2", "GPT-2"])
def test_other_kinds_of_attention_are_found_again(name: str) -> None:
    from qr_integrations.types import Span
    from tests.backend.measure import bench, difference, named, random_ids, tap_all

    on, cache = bench(named(name)), new_cache()
    layout = layout_of(on.backend, 20, are_blocks=False)
    first, again = (cache.read(on.backend, layout, top_layer=on.top_layer) for _ in range(2))
    assert counted(cache) == (2, 2)
    tap, more = tap_all(on, Span(20, 24)), random_ids(24)[20:]
    plain = on.backend.prefill(layout.token_ids[:20], top_layer=on.top_layer)
    rows = [on.backend.forward(more, tap=tap, prefix=prefix) for prefix in (first, again, plain)]
    assert torch.equal(rows[0], rows[1]) and difference(rows[0], rows[2]) < 1e-5


def test_blocks_that_were_found_must_not_be_longer_than_layers_see() -> None:
    """Each was read alone; together they are too long."""
    from qr_integrations.errors import UnsupportedModelError
    from qr_integrations.types import Span
    from tests.backend.measure import bench, named

    on, cache = bench(named("Mistral")), new_cache()
    both = layout_of(on.backend, 12, are_blocks=True)
    for block in both.blocks:
        ids = both.token_ids[:2] + both.token_ids[block.slice()]
        spans, shared = (Span(2, len(ids)),), Span(0, len(ids))
        alone = replace(both, token_ids=ids, documents=spans, blocks=spans, shared=shared)
        cache.read(on.backend, alone, top_layer=on.top_layer)
    with pytest.raises(UnsupportedModelError, match="8 tokens back, the documents have 12"):
        cache.read(on.backend, both, top_layer=on.top_layer)


# ---- copies and settings


def test_copies_share_and_pickles_keep_the_settings(qr_mini: "Backend", tmp_path: Path) -> None:
    cache = new_cache(10**6, folder=tmp_path, max_disk_bytes=10**7, kv_dtype="int8")
    scores(qr_mini, TEXTS, "block", cache)
    assert copy.copy(cache) is cache and copy.deepcopy({"cache": cache})["cache"] is cache
    other = pickle.loads(pickle.dumps(cache))
    settings = ("max_bytes", "folder", "max_disk_bytes", "kv_dtype")
    assert [getattr(other, name) for name in settings] == [10**6, tmp_path, 10**7, "int8"]
    assert len(other) == 0 and counted(other) == (0, 0)


def test_clear_forgets_all(qr_mini: "Backend", tmp_path: Path) -> None:
    cache = new_cache(folder=tmp_path)
    scores(qr_mini, TEXTS, "block", cache)
    cache.flush()
    cache.clear()
    assert len(cache) == cache.stats().num_bytes == cache.stats().disk_bytes == 0 and not list(tmp_path.iterdir())
    scores(qr_mini, TEXTS, "block", cache)
    assert counted(cache) == (0, 8)


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"max_bytes": -1}, "pass 0 or more"),
        ({"max_disk_bytes": 5}, "pass folder too"),
        ({"kv_dtype": "int4"}, "pass one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], cure: str, unchecked: None) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=cure):
        new_cache(**settings)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    from qr_integrations.errors import InputError

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="pass a folder to write to"):
        new_cache(folder=tmp_path / "file")
