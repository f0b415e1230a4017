"""An index on disk: comes back to the last bit, survives being killed, and says what is wrong with a folder."""

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.retrieval.index import DocumentIndex

TEXTS = [
    "Cats sleep for most of the day, in the sun if there is any.",
    "Dracula was written by Bram Stoker, who managed a theatre in London.",
    "The moon pulls the water of the seas, so that it comes and goes.",
    "Bread is made of flour, water and salt, and time does the rest. " * 4,
    "Violins have four strings, which are tuned in fifths.",
]
QUERIES = ["who wrote dracula", "what do cats do", "why are there tides"]
WAYS = {
    "joint": {},
    "joint, float16": {"kv_dtype": "float16"},
    "joint, several windows": {"batch_size": 2},
    "joint, several windows, pieces, int8": {"max_context_tokens": 300, "max_doc_tokens": 24, "kv_dtype": "int8"},
    "joint, heads cut": {"truncation": "head", "max_doc_tokens": 20},
    "joint, settings": {"instruction": "Prefer people.", "null_instruction": 0.5, "heads": [(1, 0), (2, 3)]},
    "block": {"layout": "block"},
    "block, bfloat16": {"layout": "block", "kv_dtype": "bfloat16"},
    "block, int8, all layers": {"layout": "block", "kv_dtype": "int8", "answers": True},
    "block, in line": {"layout": "block", "refinements": {"layout": "block", "positions": "in_line"}},
    "block, several windows": {"layout": "block", "batch_size": 2, "calibrated": False},
}


def build(backend: "Backend", texts: list[Any] = TEXTS, **options: Any) -> "DocumentIndex":
    from qr_integrations.retrieval.index import DocumentIndex

    return DocumentIndex.build(texts, backend, **options)


def load(folder: Path, model: Any, **options: Any) -> "DocumentIndex":
    from qr_integrations.retrieval.index import DocumentIndex

    return DocumentIndex.load(folder, model, **options)


def answers(index: "DocumentIndex", **options: Any) -> list[Any]:
    return [index.rank(query, **options).items for query in QUERIES]


def files(folder: Path, pattern: str = "*") -> dict[str, int]:
    """Names and inodes: a file that was written again has another."""
    return {path.name: path.stat().st_ino for path in folder.glob(pattern)}


@pytest.fixture(scope="module")
def joint(qr_mini: "Backend") -> "DocumentIndex":
    return build(qr_mini)


@pytest.fixture
def folder(joint: "DocumentIndex", tmp_path: Path) -> Path:
    joint.save(tmp_path / "index")
    return tmp_path / "index"


# ---- what comes back


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_index_ranks_as_the_saved_one_to_the_last_bit(qr_mini: "Backend", tmp_path: Path, way: str) -> None:
    index = build(qr_mini, **WAYS[way])
    index.save(tmp_path)
    loaded = load(tmp_path, qr_mini)
    assert len(loaded.windows) == len(index.windows) and (len(index.windows) > 1) == ("several" in way)
    assert loaded.num_bytes == index.num_bytes
    assert answers(loaded, explain=True) == answers(index, explain=True)
    assert [ranking.items for ranking in loaded.rank_batch(QUERIES)] == [r.items for r in index.rank_batch(QUERIES)]
    assert repr(loaded) == repr(index) and loaded.reranker.limits == index.reranker.limits


@pytest.mark.parametrize("kind", ["icr", "own heads and prompt"])
def test_the_reranker_is_rebuilt(qr_mini: "Backend", tmp_path: Path, kind: str) -> None:
    from qr_integrations import ICRReranker
    from qr_integrations.retrieval.layout import PromptStyle
    from qr_integrations.retrieval.reranker import AttentionReranker

    prompt = "Which paragraph answers this?\n\n{query}"
    if kind == "icr":
        index = build(ICRReranker(qr_mini, retrieval_type="QA", refinements={"length_power": 0.5}))
    else:
        index = build(AttentionReranker(qr_mini, [(0, 1), (1, 2)], PromptStyle(prompt, strip=True)))
    index.save(tmp_path)
    loaded = load(tmp_path, qr_mini)
    assert type(loaded.reranker) is type(index.reranker) and answers(loaded) == answers(index)


def test_documents_come_back_as_they_were(qr_mini: "Backend", tmp_path: Path) -> None:
    from qr_integrations import Document, Span

    given = [
        Document("Größe\n和\u2028\x85 🙂", "Tïtle", "id\ud800", {"a": [1, 2.5, None], "b": {"c": True}}, Span(2, 5)),
        Document("Cats sleep."),
    ]
    build(qr_mini, given).save(tmp_path)
    assert load(tmp_path, qr_mini).documents == tuple(given)


def test_an_index_without_documents(qr_mini: "Backend", tmp_path: Path) -> None:
    build(qr_mini, []).save(tmp_path)
    loaded = load(tmp_path, qr_mini)
    assert len(loaded) == 0 and len(loaded.rank("who?")) == 0
    loaded.add(TEXTS)
    loaded.save(tmp_path)
    assert len(load(tmp_path, qr_mini)) == len(TEXTS)


def test_the_model_is_loaded_by_its_name(folder: Path, joint: "DocumentIndex") -> None:
    assert load(folder, None).backend.name == "qr-mini"
    assert answers(load(folder, "qr-mini")) == answers(joint)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_keys_and_values_stay_in_the_file(folder: Path, qr_mini: "Backend") -> None:
    loaded = load(folder, qr_mini)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mapped]
    cache = loaded.windows[0].prefix.cache
    assert cache is not None
    for layer in cache.layers:
        keys: Any = layer.keys if getattr(layer, "heads", None) is None else layer.stored_keys.steps  # type: ignore[attr-defined]
        assert any(start <= keys.data_ptr() < stop for start, stop in spans)
        assert keys.data_ptr() % 64 == 0


# ---- changing and saving again


@pytest.mark.parametrize("layout", ["joint", "block"])
def test_a_loaded_index_goes_on(qr_mini: "Backend", tmp_path: Path, layout: str) -> None:
    index = build(qr_mini, layout=layout)
    index.save(tmp_path)
    loaded, mapped = load(tmp_path, qr_mini), load(tmp_path, qr_mini)
    before = answers(mapped)
    for each in (index, loaded):
        each.add(["Paper was made of rags."])
        each.remove([0, 2])
    assert answers(loaded) == answers(index)
    loaded.save(tmp_path)
    assert answers(load(tmp_path, qr_mini)) == answers(index)
    assert answers(mapped) == before


def test_windows_that_are_there_are_not_written_again(qr_mini: "Backend", tmp_path: Path) -> None:
    index = build(qr_mini, batch_size=2)
    index.save(tmp_path)
    first = files(tmp_path, "window-*")
    index.save(tmp_path)
    assert files(tmp_path, "window-*") == first
    loaded = load(tmp_path, qr_mini)
    loaded.add(["Paper was made of rags."])
    loaded.save(tmp_path)
    second = files(tmp_path, "window-*")
    names = [entry["file"]["name"] for entry in json.loads((tmp_path / "index.json").read_text())["windows"]]
    assert sorted(names) == sorted(second) and {name: second[name] for name in names[:-1]}.items() <= first.items()
    assert names[-1] not in first


def test_a_window_that_was_damaged_is_written_again(folder: Path, joint: "DocumentIndex", qr_mini: "Backend") -> None:
    path = next(folder.glob("window-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    joint.save(folder)
    assert answers(load(folder, qr_mini)) == answers(joint)


def test_a_window_that_others_removed_meanwhile_is_written_again(
    folder: Path, joint: "DocumentIndex", qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch
) -> None:
    from qr_integrations.retrieval import index_files

    def read_and_lose(path: Path, *args: Any) -> Any:
        piece = read(path, *args)
        path.unlink()
        return piece

    read = index_files.read_piece
    with monkeypatch.context() as losing:
        losing.setattr(index_files, "read_piece", read_and_lose)
        index = load(folder, qr_mini)
    index.save(folder)
    assert answers(load(folder, qr_mini)) == answers(joint)


def test_limits_may_be_numbers_of_numpy(qr_mini: "Backend", tmp_path: Path, unchecked: None) -> None:
    index = build(qr_mini, max_context_tokens=np.int64(300), max_doc_tokens=np.int32(24))
    index.save(tmp_path / "index")
    assert answers(load(tmp_path / "index", qr_mini)) == answers(index)


def test_what_no_index_needs_is_removed(folder: Path, joint: "DocumentIndex", qr_mini: "Backend") -> None:
    for name in (".writing-abcd_123", "index.jsonabcd1234", f"window-{'0' * 32}.safetensors"):
        (folder / name).write_text("from a process that was killed")
    (folder / "notes.txt").write_text("mine")
    joint.save(folder)
    left = [re.sub("[0-9a-f]{32}", "*", name) for name in sorted(files(folder))]
    assert left == ["documents-*.jsonl", "index.json", "notes.txt", "window-*.safetensors"]


def test_a_first_save_that_was_killed_does_not_stand_in_the_way(joint: "DocumentIndex", tmp_path: Path) -> None:
    (tmp_path / ".writing-abcd1234").write_text("half")
    joint.save(tmp_path)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("name", ["thesis.txt", "index.json"])
def test_a_folder_of_something_else_is_left_alone(joint: "DocumentIndex", tmp_path: Path, name: str) -> None:
    from qr_integrations.errors import InputError

    (tmp_path / name).write_text('{"format": "mine"}')
    with pytest.raises(InputError, match=f"holds '{name}' and no index: pass an empty folder"):
        joint.save(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        joint.save(tmp_path / name)
    assert list(files(tmp_path)) == [name]


@pytest.mark.parametrize("value", [{1, 2}, (1, 2), {1: "a"}, float("nan"), object()])
def test_metadata_that_json_cannot_hold_is_named(qr_mini: "Backend", tmp_path: Path, value: Any) -> None:
    from qr_integrations import Document
    from qr_integrations.errors import InputError

    index = build(qr_mini, ["Cats sleep.", Document("Dogs bark.", metadata={"key": value})])
    with pytest.raises(InputError, match=r"document #1 cannot be kept as JSON .*: pass strings"):
        index.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_reranker_of_ones_own_is_not_saved_as_another(qr_mini: "Backend", tmp_path: Path) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import InputError

    class QuietReranker(QRHeadReranker):
        pass

    with pytest.raises(InputError, match="QuietReranker cannot be saved: build it with one of"):
        build(QuietReranker(qr_mini)).save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# ---- what is refused


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, signed: bool) -> None:
    """Change the manifest, with or without the digest that belongs to it then."""
    manifest = json.loads((folder / "index.json").read_text())
    change(manifest)
    if signed:
        del manifest["digest"]
        manifest["digest"] = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps(manifest))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def leave(manifest: dict[str, Any]) -> None:
    manifest["windows"][0]["file"]["name"] = "../secret"


def other_heads(manifest: dict[str, Any]) -> None:
    manifest["reranker"]["heads"]["heads"] = [[7, 7]]


def other_window(manifest: dict[str, Any]) -> None:
    manifest["windows"][0]["file"] = manifest["windows"][1]["file"]


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "there is no index at"),
    "no JSON": (lambda folder: cut_off(folder / "index.json"), "is no JSON .*: restore"),
    "no text": (lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\xff"), "is no JSON"),
    "not ours": (lambda folder: (folder / "index.json").write_text('{"name": "x"}'), "is of something else"),
    "a list": (lambda folder: (folder / "index.json").write_text("[1]"), "is of something else"),
    "newer": (lambda f: rewrite(f, lambda m: m.update(version=2), signed=True), "has format 2, .* reads 1: upgrade"),
    "older": (lambda f: rewrite(f, lambda m: m.update(version=0), signed=True), "was changed"),
    "by hand": (lambda f: rewrite(f, lambda m: m.update(whole=True), signed=False), "was changed after it was written"),
    "leaves the folder": (lambda f: rewrite(f, leave, signed=True), "names '../secret', which is no file of an index"),
    "an entry less": (lambda f: rewrite(f, lambda m: m.pop("model"), signed=True), "cannot be read .'model'"),
    "no such head": (lambda f: rewrite(f, other_heads, signed=True), r"has no head \(7, 7\)"),
    "window missing": (lambda folder: next(folder.glob("window-*")).unlink(), "window-.* is missing: restore"),
    "documents missing": (lambda folder: next(folder.glob("documents-*")).unlink(), "documents-.* is missing: restore"),
    "window cut off": (lambda folder: cut_off(next(folder.glob("window-*"))), "bytes, .* were written: restore"),
    "a bit of a window": (lambda folder: flip(next(folder.glob("window-*"))), "does not hold what was written"),
    "a bit of a text": (lambda folder: flip(next(folder.glob("documents-*"))), "does not hold what was written"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_folder_that_is_refused_says_why(folder: Path, qr_mini: "Backend", what: str) -> None:
    from qr_integrations.errors import LoadError

    spoil, message = REFUSALS[what]
    spoil(folder)
    with pytest.raises(LoadError, match=message):
        load(folder, qr_mini)


def test_without_verifying_sizes_shapes_and_tokens_are_checked(qr_mini: "Backend", tmp_path: Path) -> None:
    from qr_integrations.errors import LoadError

    index = build(qr_mini, batch_size=2)
    index.save(tmp_path)
    rewrite(tmp_path, other_window, signed=True)
    with pytest.raises(LoadError, match=r"cannot be read .* has the shape .* tokens\): restore"):
        load(tmp_path, qr_mini, verify=False)
    index.save(tmp_path)
    path = next(tmp_path.glob("documents-*"))
    path.write_bytes(path.read_bytes().replace(b"Cats", b"Dogs"))
    with pytest.raises(LoadError, match="built of other tokens"):
        load(tmp_path, qr_mini, verify=False)
    index.save(tmp_path)
    path = next(tmp_path.glob("window-*"))
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(LoadError, match="cannot be read"):
        load(tmp_path, qr_mini, verify=False)
    cut_off(path)
    with pytest.raises(LoadError, match=r"bytes, .* were written"):
        load(tmp_path, qr_mini, verify=False)


def test_another_model_is_refused(folder: Path, qr_mini: "Backend") -> None:
    import copy

    import torch

    from qr_integrations.backend import Backend
    from qr_integrations.errors import LoadError

    half = Backend(copy.deepcopy(qr_mini.model).half(), qr_mini.tokenizer, name="qr-mini")
    with pytest.raises(LoadError, match=r"dtype 'float32' .* has 'float16': load the model with that dtype"):
        load(folder, half)
    trained = copy.deepcopy(qr_mini.model)
    with torch.no_grad():
        next(trained.parameters()).add_(0.01)
    with pytest.raises(LoadError, match=r"weights .*: load the model that it was built with"):
        load(folder, Backend(trained, qr_mini.tokenizer, name="qr-mini"))


def test_another_tokenizer_is_refused(folder: Path, qr_mini: "Backend") -> None:
    import copy

    from qr_integrations.backend import Backend
    from qr_integrations.errors import LoadError

    tokenizer = copy.deepcopy(qr_mini.tokenizer)
    tokenizer.add_tokens(["theatre"])
    with pytest.raises(LoadError, match=r"built of other tokens .*: load the tokenizer and chat template"):
        load(folder, Backend(qr_mini.model, tokenizer, name="qr-mini"))


# ---- many at a time, and the end of a process


def test_many_threads_load_and_rank(folder: Path, qr_mini: "Backend", joint: "DocumentIndex") -> None:
    expected = answers(joint)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: answers(load(folder, qr_mini)), range(16)))
    assert found == [expected] * 16


@pytest.fixture
def saving(joint: "DocumentIndex", qr_mini: "Backend", folder: Path) -> Iterator[list[str]]:
    """Two threads that save two indexes into one folder as long as the test runs; what went wrong there."""
    other = build(qr_mini, TEXTS[:2])
    over, wrong = threading.Event(), []

    def save(index: "DocumentIndex") -> None:
        while not over.is_set():
            try:
                index.save(folder)
            except Exception as error:
                wrong.append(repr(error))
                return

    threads = [threading.Thread(target=save, args=(index,)) for index in (joint, other)]
    for thread in threads:
        thread.start()
    yield wrong
    over.set()
    for thread in threads:
        thread.join()


def test_an_index_can_be_read_while_others_save(saving: list[str], folder: Path, qr_mini: "Backend") -> None:
    seen = {len(load(folder, qr_mini)) for _ in range(12)}
    assert seen <= {2, len(TEXTS)} and not saving


KILLED = """
import os, random, signal, time
from itertools import cycle
from pathlib import Path
import torch
from qr_integrations.retrieval.index import DocumentIndex

torch.set_num_threads(1)
folder, texts = Path({folder!r}), {texts!r}
first = DocumentIndex.build(texts, "qr-mini", batch_size=2)
second = DocumentIndex.build(texts[:2], first.backend)
first.save(folder)
start = time.perf_counter()
second.save(folder)
pause, draw, seen, unfinished = 1.2 * (time.perf_counter() - start), random.Random(0), [], 0
for turn in range(50):
    saved, tell = os.pipe()
    child = os.fork()
    if not child:
        for index in cycle((first, second, DocumentIndex.load(folder, first.backend))):
            index.save(folder)
            os.write(tell, b".")
    for _ in range(turn % 3):
        os.read(saved, 1)
    time.sleep(draw.uniform(0, pause))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved)
    os.close(tell)
    found = DocumentIndex.load(folder, first.backend)
    seen.append(len(found))
    unfinished += len(list(folder.iterdir())) > 2 + len(found.windows)
    assert found.documents == (first if len(found) > 2 else second).documents
found.save(folder)
assert len(list(folder.iterdir())) == 2 + len(found.windows)
print(seen.count(len(texts)), seen.count(2), unfinished)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_leaves_the_old_index_or_the_new_one(
    tmp_path: Path, in_fresh_python: Callable[[str], str]
) -> None:
    printed = in_fresh_python(KILLED.format(folder=str(tmp_path / "index"), texts=TEXTS))
    old, new, unfinished = map(int, printed.split())
    assert old + new == 50 and min(old, new) > 0 and unfinished > 0
