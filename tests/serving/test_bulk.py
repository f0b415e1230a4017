"""Bulk work: Ray in processes of its own, killed and started again; all that needs no Ray in this one."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if find_spec("ray") is None:  # it is not to be imported here
    pytest.skip("needs Ray: pip install '.[ray]'", allow_module_level=True)

COMMAND = "import sys; from qr_integrations.cli import main; sys.exit(main(sys.argv[1:]))"
CLUSTER = """
import logging, sys, ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         _node_ip_address="127.0.0.1", object_store_memory=100 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""
LISTS, DOCUMENTS = 40, 4


def bulk(name: str = "") -> Any:
    from importlib import import_module

    return import_module(f"qr_integrations.serving.bulk{name}")


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    """The first are about books; the gold passage stands first."""
    from qr_integrations.bundled import read_detection_lists
    from qr_integrations.types import JudgedList

    return [
        JudgedList(one.query, one.documents[:DOCUMENTS], one.relevance, one.id)
        for one in read_detection_lists()[:LISTS]
    ]


def line(one: Any, **more: Any) -> str:
    documents = [{"text": document.text, "title": document.title or ""} for document in one.documents]
    return json.dumps({"id": one.id, "query": one.query, "documents": documents, "gold": [0]} | more) + "\n"


@pytest.fixture(scope="module")
def file_of_lists(lists: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "lists.jsonl"
    path.write_text("".join(map(line, lists)))
    return path


def environment(**more: str) -> dict[str, str]:
    import qr_integrations

    package = str(Path(qr_integrations.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", **more}


def started(*args: str | Path, **more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-c", COMMAND, "bulk", *map(str, args), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(**more), text=True, **pipes)  # type: ignore[call-overload]


def ended(*args: str | Path, **more: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process = started(*args, **more)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray that several commands share: the variables by which they find it and are let in."""
    keys = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    variables = environment(RAY_USAGE_STATS_ENABLED="0", **keys)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-P", "-W", "ignore", "-c", CLUSTER]
    process: Any = subprocess.Popen(command, env=variables, text=True, **pipes)  # type: ignore[call-overload]
    yield {"RAY_ADDRESS": process.stdout.readline().strip(), **keys}
    process.communicate(timeout=60)


def descendants(process: int) -> list[int]:
    """It and all that it started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill_all(process: "subprocess.Popen[str]") -> None:
    for number in descendants(process.pid):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate()


def rows(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    return found


def expected(lists: Sequence[Any], ranker: Any, ids: bool = False) -> list[tuple[Any, ...]]:
    return [
        (one.id, item.document.id if ids else None, item.index, rank)
        for one in lists
        for rank, item in enumerate(ranker.rank(one.query, one.documents), start=1)
    ]


@pytest.fixture(scope="module")
def ranker(qr_mini: Any) -> Any:
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(qr_mini, truncation="head")


# ---- with Ray


def test_killed_in_the_middle_and_started_again_every_row_is_there_once(
    lists: list[Any],
    file_of_lists: Path,
    ranker: Any,
    cluster: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from qr_integrations.cli import main

    out = tmp_path / "out"
    command = ["rerank", "--lists", file_of_lists, "--out", out, "--shard-lists", "1", "--json"]
    killed = started(*command)
    until = time.monotonic() + 500
    while len(list(out.glob("part-*.parquet"))) < 3:
        assert killed.poll() is None and time.monotonic() < until, killed.communicate()
        time.sleep(0.02)
    kill_all(killed)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 3 <= len(before) < LISTS

    trec = tmp_path / "out.run"
    code, told, errors = ended(*command, "--replicas", "2", "--trec", trec, **cluster)
    assert (code, errors) == (0, "")
    assert json.loads(told) | {"seconds": 0} == {
        **{"lists": LISTS, "bad": 0, "done_now": LISTS - len(before), "seconds": 0, "out": str(out)},
    }
    found = rows(out)
    names = ("query_id", "document_id", "index", "rank")
    assert [tuple(row[name] for name in names) for row in found] == expected(lists, ranker)
    scores = [item.score for one in lists for item in ranker.rank(one.query, one.documents)]
    np.testing.assert_allclose([row["qr_score"] for row in found], scores, atol=1e-6)
    assert {row["model"] for row in found} == {"qr-mini"}
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert before.items() <= after.items()
    assert sorted(after) == ["_manifest.json", *(f"part-{i:06d}.parquet" for i in range(LISTS))]

    from qr_integrations.evaluation.trec import read_run

    run = read_run(trec)
    assert [(query, int(name)) for query, documents in run.items() for name, _ in documents] == [
        (row["query_id"], row["index"]) for row in found
    ]
    again = ["bulk", *map(str, command), "--device", "cpu"]  # in this process: nothing is left that needs Ray
    assert main(again) == 0 and json.loads(capsys.readouterr().out)["done_now"] == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == after
    assert main([*again, "--top-n", "2"]) == 2
    assert "was made with another top_n: pass a new folder" in capsys.readouterr().err


def test_a_trec_run_is_ranked_and_a_query_with_an_unknown_document_is_told(
    lists: list[Any], ranker: Any, cluster: dict[str, str], tmp_path: Path
) -> None:
    asked = lists[:3]
    write_run_and_texts(tmp_path, asked)
    with (tmp_path / "in.run").open("a") as run:
        run.write(f"{lists[3].id} Q0 nobody 1 0.5 bm25\n")
    files = [word for name in ("run", "corpus", "queries") for word in (f"--{name}", FILES[name])]
    command = [sys.executable, "-P", "-c", COMMAND, "bulk", "rerank", *files, "--out", "out", "--trec", "out.run"]
    done = subprocess.run(
        [*command, "--shard-lists", "2", "--device", "cpu"],
        **{"cwd": tmp_path, "env": environment(**cluster), "capture_output": True, "text": True},
    )
    assert done.returncode == 1 and done.stdout.startswith("3 of 4 lists done"), done.stderr
    assert "1 of 4 lists were passed over" in done.stderr
    (bad,) = map(json.loads, (tmp_path / "out" / "_errors.jsonl").read_text().splitlines())
    assert bad["line"] == 3 * DOCUMENTS + 1 and "'nobody' is not in" in bad["error"]
    found = [(row["query_id"], row["document_id"], row["index"], row["rank"]) for row in rows(tmp_path / "out")]
    assert found == expected([with_ids(one) for one in asked], ranker, ids=True)
    ranks = [words.split()[:4] for words in (tmp_path / "out.run").read_text().splitlines()]
    assert ranks == [[query, "Q0", document, str(rank)] for query, document, _, rank in found]
    assert not list((tmp_path / "out").glob("*.sqlite*"))


def test_detection_in_bulk_is_that_of_the_head_detector(
    lists: list[Any], qr_mini: Any, cluster: dict[str, str], tmp_path: Path
) -> None:
    from qr_integrations import HeadDetector

    data, out = tmp_path / "lists.jsonl", tmp_path / "heads.json"
    data.write_text("".join(map(line, lists[:9])) + "no list\n")
    command = ["detect", "--data", data, "--out", out, "--top-k", "5", "--shard-lists", "2", "--seed", "3"]
    code, told, errors = ended(*command, **cluster)
    assert code == 1 and "5 of 16 heads of qr-mini" in told and "1 of 10 lists were passed over" in errors, errors
    entry = json.loads(out.read_text())
    detector = HeadDetector(qr_mini, seed=3, truncation="head", max_doc_tokens=None)
    alone = detector.detect(lists[:9], data=str(data))
    alone.save(tmp_path / "alone.json", top_k=5)
    wanted = json.loads((tmp_path / "alone.json").read_text())
    scores, wanted_scores = entry.pop("scores"), wanted.pop("scores")
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)
    shared, wanted_shared = entry.pop("split_half"), wanted.pop("split_half")
    assert shared == pytest.approx(wanted_shared) and entry == wanted


# ---- without: the input


def cut(path: Path, size: int) -> tuple[Any, list[Any]]:
    source = bulk("_inputs").ListsFile(path)
    return source, source.cut(size)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_shards_hold_every_list_once_with_the_number_of_its_line(lists: list[Any], size: int, tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(line(one).strip() for one in lists[:5]).encode() + b"\r\n\n")
    source, shards = cut(path, size)
    given = [given for shard in shards for given in source.read(shard)]
    assert [(g.number, g.line, g.found.query) for g in given] == [
        (i, 2 * i + 1, one.query) for i, one in enumerate(lists[:5])
    ]
    assert [shard.lists for shard in shards] == [len(list(source.read(shard))) for shard in shards]
    assert shards[0].start == 0 and shards[-1].stop == path.stat().st_size


def test_names_and_judgments_may_be_left_out_and_wrong_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    entries = ['{"query": "q", "documents": ["a"]}', "{", '{"query": " ", "documents": ["a"]}']
    entries += ['{"query": "q", "documents": []}', '{"query": "q", "documents": ["a"], "gold": [4]}']
    path.write_bytes("\n".join(entries).encode() + b'\n{"query": "\xff", "documents": ["a"]}')
    source, (shard,) = cut(path, 10)
    first, *others = source.read(shard)
    assert (first.found.id, first.found.relevance) == ("1", {})
    told = ["no list", "no query", "no documents", "no document #4", "not UTF-8"]
    assert all(
        f"line {i}: " in str(g.found) and words in str(g.found)
        for i, (g, words) in enumerate(zip(others, told, strict=True), start=2)
    )
    judged = bulk("_inputs").ListsFile(path, judged=True)
    assert "gold" in str(next(judged.read(shard)).found)


def test_files_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "lists.jsonl"
    with refused("cannot be read"):
        cut(path, 1)
    path.write_text("\n \n")
    with refused("is empty"):
        cut(path, 1)
    path.write_bytes(gzip.compress(b"{}"))
    with refused("unpack it with gunzip"):
        cut(path, 1)


FILES = {"run": "in.run", "corpus": "corpus.jsonl", "queries": "queries.jsonl"}


def with_ids(one: Any) -> Any:
    from dataclasses import replace

    documents = [replace(document, id=f"{one.id}-{i}") for i, document in enumerate(one.documents)]
    return replace(one, documents=tuple(documents))


def write_run_and_texts(folder: Path, lists: Sequence[Any]) -> None:
    """The documents of a list stand in a mixed order with scores that say the right one."""
    named = [with_ids(one) for one in lists]
    texts = [document for one in named for document in one.documents]
    corpus = [{"_id": d.id, "title": d.title or "", "text": d.text} for d in reversed(texts)]
    (folder / FILES["corpus"]).write_text("".join(json.dumps(entry) + "\n" for entry in corpus))
    queries = [{"_id": one.id, "text": one.query} for one in named]
    (folder / FILES["queries"]).write_text("".join(json.dumps(entry) + "\n" for entry in queries))
    run = [f"{one.id} Q0 {one.documents[i].id} 7 {9 - i} bm25\n" for one in named for i in reversed(range(DOCUMENTS))]
    (folder / FILES["run"]).write_text("".join(run))


@pytest.fixture
def run_file(lists: list[Any], tmp_path: Path) -> Any:
    write_run_and_texts(tmp_path, lists[:3])
    return bulk().RunFile(*(tmp_path / name for name in FILES.values()), texts=tmp_path / "texts")


def read_all(source: Any, size: int) -> list[Any]:
    bulk("_texts").TextIndex.write(source.texts, source.corpus, source.queries)
    return [given.found for shard in source.cut(size)[0] for given in source.read(shard)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_run_gives_the_documents_by_score(lists: list[Any], run_file: Any, size: int) -> None:
    from dataclasses import replace

    asked = [replace(with_ids(one), relevance={}) for one in lists[:3]]
    assert read_all(run_file, size) == asked
    first_two = read_all(replace(run_file, depth=2), size)
    assert [one.documents for one in first_two] == [one.documents[:2] for one in asked]


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        (2, "nobody", "'nobody' is not in"),
        (4, "high", "the score is 'high'"),
        (4, "1.0 again", "7 columns, not 6"),
        (2, "nq-1-2", "stands there twice"),
    ],
)
def test_what_is_wrong_with_a_query_of_a_run_hits_that_query_only(
    run_file: Any, column: int, value: str, told: str
) -> None:
    lines = [words.split() for words in run_file.path.read_text().splitlines()]
    lines[DOCUMENTS + 2][column] = value  # of the second query
    run_file.path.write_text("".join(" ".join(words) + "\n" for words in lines))
    first, second, third = read_all(run_file, 2)
    assert told in str(second) and f"line {DOCUMENTS}" not in str(first)
    assert [one.id for one in (first, third)] == ["nq-0", "nq-2"]


def test_a_run_whose_queries_are_mixed_and_texts_with_equal_ids_are_refused(run_file: Any) -> None:
    lines = run_file.path.read_text().splitlines(keepends=True)
    run_file.path.write_text("".join([*lines, lines[0]]))
    with refused(f"line {len(lines) + 1}: query 'nq-0' stands there again"):
        run_file.cut(2)
    run_file.queries.write_text(run_file.queries.read_text() * 2)
    with refused("line 4: the id 'nq-0' stands there for the second time"):
        bulk("_texts").TextIndex.write(run_file.texts, run_file.corpus, run_file.queries)
    assert not run_file.texts.exists()


# ---- without: the folder and the worker


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    folder = bulk("_folder").BulkFolder(tmp_path / "out")
    claim(folder, top_n=3)
    return folder


def claim(folder: Any, **asked: Any) -> None:
    with folder.claimed(asked):
        pass


def test_a_folder_belongs_to_one_job(folder: Any, tmp_path: Path) -> None:
    claim(folder, top_n=3)
    with refused("was made with another top_n: pass a new folder"):
        claim(folder, top_n=4)
    with refused("was made with another depth"):
        claim(folder, top_n=3, depth=1)
    with refused("holds something else"):
        claim(bulk("_folder").BulkFolder(tmp_path), top_n=3)
    with refused("cannot be used"):
        claim(bulk("_folder").BulkFolder(tmp_path / "no" / "out"))


@pytest.mark.skipif(os.name == "nt", reason="folders are not locked there")
def test_two_processes_do_not_work_on_one_folder(folder: Any) -> None:
    with folder.claimed({"top_n": 3}), refused("another process works on"):
        claim(folder, top_n=3)


def test_what_a_killed_worker_leaves_is_no_finished_shard(folder: Any) -> None:
    import pyarrow as pa

    left = folder.path / "part-000000.parquet0x1y2z"
    left.write_bytes(b"half")
    assert (folder.begin(0), folder.begin(0), folder.finished()) == (1, 2, set())
    folder.finish(1, pa.table({"a": [1]}), {"bad": []})
    claim(folder, top_n=3)
    assert not left.exists() and folder.begin(0) == 1
    assert folder.finished() == {1} and folder.notes(1) == {"bad": []} and rows(folder.part(1)) == [{"a": 1}]


@pytest.fixture
def work(folder: Any, qr_mini: Any) -> Callable[..., Any]:
    """Let a worker in this process do the first shard of a file."""
    from qr_integrations.reranking import RerankSettings

    def work(path: Path, strict: bool = False, identity: Any = None, size: int = 10, **settings: Any) -> Any:
        source, shards = cut(path, size)
        job = bulk("_workers").RankJob(RerankSettings(**{"backend": qr_mini, **settings}), batch_size=3)
        worker = bulk("_workers").ShardWorker(job, source, folder, strict, identity)
        batch = {name: np.array([value]) for name, value in asdict(shards[0]).items()}
        return {name: value[0].item() for name, value in worker(batch).items()}

    return work


@pytest.fixture
def with_bad_ones(lists: list[Any], tmp_path: Path) -> Path:
    """The second line is no list, the fourth is longer than the window."""
    path = tmp_path / "some.jsonl"
    long = line(lists[2], documents=["word " * 3000])
    path.write_text(line(lists[0]) + "no list\n" + line(lists[1]) + long + line(lists[3]))
    return path


def test_bad_lists_are_passed_over_and_the_others_are_ranked(
    lists: list[Any], ranker: Any, work: Callable[..., Any], folder: Any, with_bad_ones: Path
) -> None:
    report = work(with_bad_ones, truncation="error", max_context_tokens=2048)
    assert (report["lists"], report["bad"], report["failed"], report["refused"]) == (5, 2, "", "")
    found = rows(folder.part(0))
    assert [(row["query_id"], row["document_id"], row["index"], row["rank"]) for row in found] == expected(
        [lists[0], lists[1], lists[3]], ranker
    )
    assert [row["line"] for row in found[::DOCUMENTS]] == [1, 3, 5]
    bad = folder.notes(0)["bad"]
    assert [(entry["line"], entry["query_id"]) for entry in bad] == [(2, None), (4, lists[2].id)]
    folder.close(bad)
    assert [json.loads(told)["line"] for told in folder.errors.read_text().splitlines()] == [2, 4]
    folder.close([])
    assert not folder.errors.exists()


def test_strict_writes_nothing_of_a_shard_with_a_bad_list(
    work: Callable[..., Any], folder: Any, with_bad_ones: Path
) -> None:
    report = work(with_bad_ones, strict=True)
    assert report["bad"] == 1 and "line 2: no list" in report["first_bad"] and not folder.finished()


def test_a_model_that_is_not_there_or_is_another_one_is_refused(
    work: Callable[..., Any], folder: Any, file_of_lists: Path
) -> None:
    assert "no-such-model" in work(file_of_lists, backend=None, model="./no-such-model")["refused"]
    identity = {"name": "other", "revision": "", "dtype": "float32", "weights": "0" * 64}
    assert "what is in" in work(file_of_lists, identity=identity)["refused"]
    assert not folder.finished()


def test_a_shard_that_kills_its_workers_is_given_up(work: Callable[..., Any], folder: Any, file_of_lists: Path) -> None:
    for _ in range(3):
        folder.begin(0)
    assert "the 1 lists from line 1 on: 3 workers died" in work(file_of_lists, size=1)["failed"]
    claim(folder, top_n=3)  # started again
    assert work(file_of_lists, size=1)["failed"] == "" and folder.finished() == {0}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lists", "x", "--run", "y"], "pass --lists, or --run with --corpus"),
        (["--run", "y", "--corpus", "z"], "pass --lists, or --run with --corpus"),
        (["--lists", "x", "--depth", "3"], "--depth counts documents of a run"),
        (["--lists", "x", "--method", "icr", "--heads", "1-2"], "takes all heads"),
        (["--lists", "x", "--replicas", "0"], "pass at least 1"),
        (["--lists", "x", "--batch-size", "0"], "pass at least 1"),
        (["--lists", "x"], "'.*x' cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_an_error_before_ray_starts(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    from qr_integrations.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["bulk", "rerank", "--out", "out", *arguments]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
