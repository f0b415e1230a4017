"""Files and folders are whole or not there, and belong to whom the umask says."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_has_the_rights_of_new_files(tmp_path: Path, umask: int) -> None:
    from qr_integrations.files import write_whole

    for text in ("first", "sécond"):
        write_whole(tmp_path / "any.txt", text)
        assert (tmp_path / "any.txt").read_text("utf-8") == text and names(tmp_path) == ["any.txt"]
    assert mode(tmp_path / "any.txt") == 0o666 & ~umask
    assert os.umask(umask) == umask  # as it was


def test_half_a_file_is_none(tmp_path: Path) -> None:
    from qr_integrations.files import write_whole

    write_whole(tmp_path / "any.txt", "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "any.txt", "after \ud800")
    assert (tmp_path / "any.txt").read_text() == "before" and names(tmp_path) == ["any.txt"]


def test_a_new_folder_appears_when_it_is_full(tmp_path: Path, umask: int) -> None:
    from qr_integrations.files import whole_folder

    target = tmp_path / "made"
    with whole_folder(target) as place:
        (place / "one").write_text("1")
        assert not target.exists() and place.parent == tmp_path
    assert names(tmp_path) == ["made"] and (target / "one").read_text() == "1"
    assert mode(target) == 0o777 & ~umask and mode(target / "one") == 0o666 & ~umask


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    from qr_integrations.files import whole_folder

    target = tmp_path / "made"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "old").write_text("old")
    with whole_folder(target) as place:
        (place / "new").write_text("new")
        assert (target / "deep" / "old").read_text() == "old"
    assert names(tmp_path) == ["made"] and names(target) == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    from qr_integrations.files import whole_folder

    target = tmp_path / "made"
    if exists:
        target.mkdir()
        (target / "old").write_text("old")
    with pytest.raises(error), whole_folder(target) as place:
        (place / "new").write_text("new")
        raise error
    assert names(tmp_path) == ["made"] * exists and (not exists or names(target) == ["old"])


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failure_while_the_folders_change_places_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    from qr_integrations.files import whole_folder

    target = tmp_path / "made"
    target.mkdir()
    (target / "old").write_text("old")
    calls, rename = [], Path.rename

    def failing(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == fails_at:
            raise OSError("no more")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no more"), whole_folder(target) as place:
        (place / "new").write_text("new")
    assert names(tmp_path) == ["made"] and names(target) == ["old"]


def test_a_relative_path_and_a_link_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.files import whole_folder

    (tmp_path / "work").mkdir()
    (tmp_path / "real").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with whole_folder("new") as place:
        (place / "one").write_text("1")
    assert names(tmp_path / "work" / "new") == ["one"]
    (tmp_path / "work" / "link").symlink_to(tmp_path / "real")
    with whole_folder("link") as place:
        (place / "two").write_text("2")
    assert (tmp_path / "work" / "link").is_symlink() and names(tmp_path / "real") == ["two"]
    assert names(tmp_path) == ["real", "work"] and names(tmp_path / "work") == ["link", "new"]


def test_a_file_that_is_named_after_what_it_holds(tmp_path: Path, umask: int) -> None:
    from hashlib import sha256

    from qr_integrations.files import write_by_content

    digest = sha256(b"one, two").hexdigest()
    written = write_by_content(tmp_path, [b"one, ", memoryview(b"two")], "part-{}.bin")
    assert written == (f"part-{digest[:32]}.bin", 8, digest)
    assert names(tmp_path) == [written[0]] and (tmp_path / written[0]).read_bytes() == b"one, two"
    assert mode(tmp_path / written[0]) == 0o666 & ~umask


def test_a_file_whose_contents_fail_is_not_there(tmp_path: Path) -> None:
    from qr_integrations.files import write_by_content

    def chunks() -> Iterator[bytes]:
        yield b"one"
        raise MemoryError

    with pytest.raises(MemoryError):
        write_by_content(tmp_path, chunks(), "{}")
    assert not names(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_one_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    import threading

    from qr_integrations.files import locked_folder

    order, waiting = [], threading.Event()

    def second() -> None:
        waiting.set()
        with locked_folder(tmp_path):
            order.append("second")

    with locked_folder(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and not names(tmp_path)
