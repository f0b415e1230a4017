"""`qr-integrations look` and `caption`: real files, the bundled model, and what the library itself says."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

QUESTION = "What color is the moon?"
SHORT = ["--max-new-tokens", "6"]


def run(*argv: str) -> int:
    from qr_integrations.cli import main

    return main(argv)


def found(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON of a command; nothing else may be on standard output."""
    assert run(*argv, *SHORT, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error of a command that must fail: one line on standard error, nothing on standard output."""
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "unexpected" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A drawn scene with a small moon in it."""
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.picture_questions import look

    return look(drawn_questions(1, shares=(0.1,))[0].image)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> Path:
    """A working directory with pictures and what is none; the terminal is 100 columns wide."""
    photo.save(tmp_path / "photo.png")
    photo.resize((40, 30)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


# ---- look


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--layers", "2,4-6", "--base", "90"], {"layers": (2, 4, 5, 6)}),
        (["--method", "gradient", "--layers", "4-5", "--base", "90"], {"method": "gradient", "layers": (4, 5)}),
        (["--layers", "all", "--base", "90", "--high-resolution"], {"layers": "all", "high_resolution": True}),
        (["--method", "input_gradient", "--min-lift", "0.1"], {"method": "input_gradient", "min_lift": 0.1}),
    ],
)
def test_look_says_what_the_library_says(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    qr_mini_vl: "Backend",
    photo: Image.Image,
    options: list[str],
    settings: dict[str, Any],
) -> None:
    from qr_integrations import Message, ViCrop

    told = found(capsys, "look", "photo.png", QUESTION, *options)
    crop = ViCrop(**settings, base=90 if "--base" in options else None)
    messages = [Message.user(photo, QUESTION)]
    plain = qr_mini_vl.answer(messages, max_new_tokens=6)
    closer = qr_mini_vl.answer(messages, max_new_tokens=6, crop=crop)
    (look,) = closer.steps["crop"]
    assert told["plain"]["text"] == plain.text and told["with_crop"]["text"] == closer.text
    assert told["plain"]["prompt_tokens"] == plain.usage.prompt_tokens < told["with_crop"]["prompt_tokens"]
    assert told["look"]["box"] == list(look.box.as_tuple()) and told["look"]["method"] == look.importance.method
    assert told["look"]["lift"] == pytest.approx(look.lift, rel=1e-4)
    assert (told["size"], told["picture"]) == ([672, 672], "photo.look.png")
    assert "crop" in told["with_crop"]["seconds"] and "crop" not in told["plain"]["seconds"]


def test_the_drawing_shows_map_box_and_crop(
    folder: Path, capsys: pytest.CaptureFixture[str], qr_mini_vl: "Backend", photo: Image.Image
) -> None:
    from qr_integrations import ViCrop

    before = (folder / "photo.png").read_bytes()
    told = found(capsys, "look", "photo.png", QUESTION, "--base", "90")
    look = ViCrop(base=90).look(qr_mini_vl, photo, QUESTION)
    with Image.open("photo.look.png") as drawn:
        assert drawn.size == (672 + 8 + 672, 672)
        tinted = look.importance.heat_map(photo, look.box)
        assert drawn.crop((0, 0, 672, 672)).tobytes() == tinted.tobytes()
        crop = photo.crop(tuple(told["look"]["box"])).resize((672, 672))
        assert drawn.crop((680, 0, 1352, 672)).tobytes() == crop.tobytes()
    assert (folder / "photo.png").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["photo.look.png", "photo.png", "small.png", "text.png"]


def test_a_large_picture_is_drawn_smaller(folder: Path, capsys: pytest.CaptureFixture[str], photo: Image.Image) -> None:
    photo.resize((2000, 1000)).save("large.png")
    told = found(capsys, "look", "large.png", QUESTION, "--out", "large.JPG")
    left, top, right, bottom = told["look"]["box"]
    assert right - left == bottom - top <= 1000 and 0 <= left < right <= 2000
    with Image.open("large.JPG") as drawn:
        assert (drawn.format, drawn.size) == ("JPEG", (1280 + 8 + 640, 640))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [(["small.png"], "no larger than its crop"), (["photo.png", "--min-lift", "99"], "stands out")],
)
def test_where_no_crop_is_worth_it(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], reason: str
) -> None:
    told = found(capsys, "look", argv[0], QUESTION, *argv[1:])
    assert told["with_crop"] is None and told["look"]["box"] is None and reason in told["look"]["reason"]
    assert run("look", argv[0], QUESTION, *argv[1:], *SHORT) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert reason in shown and "with the crop" not in shown and "whole picture" in shown
    with Image.open(told["picture"]) as drawn, Image.open(argv[0]) as picture:
        assert drawn.size == picture.size


@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_look_on_any_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    question = "What [bold]color[/] is\x1b[31m the moon?"
    assert run("look", "photo.png", question, "--deco", "--max-new-tokens", "1") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= int(columns) and "\x1b" not in captured.out
    words = " ".join(captured.out.split())
    for part in ("[bold]color[/]", "whole picture", "with the crop", "168 x 168 of 672", "lift", "photo.look.png"):
        assert part in words, part
    assert captured.err == "note: an answer was cut at its longest: --max-new-tokens allows for more\n"


def test_an_earlier_drawing_is_replaced_and_the_picture_never(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "photo.look.png").write_text("an earlier one")
    found(capsys, "look", "photo.png", QUESTION)
    with Image.open("photo.look.png") as drawn:
        assert drawn.format == "PNG"
    assert "is the picture itself" in refused(capsys, "look", "photo.png", QUESTION, "--out", "./photo.png")
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    found(capsys, "look", "../small.png", QUESTION)
    assert not list((folder / "sub").iterdir()) and (folder / "small.look.png").is_file()


def test_the_example_is_drawn_again_but_never_over_another_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = found(capsys, "look", "--example")
    assert (told["image"], told["picture"]) == ("example.png", "example.look.png")
    assert told["question"].startswith("What letter is on the ") and told["with_crop"] is not None
    drawn = (folder / "example.png").read_bytes()
    assert found(capsys, "look", "--example")["plain"]["text"] == told["plain"]["text"]
    assert (folder / "example.png").read_bytes() == drawn
    mine = (folder / "photo.png").read_bytes()
    (folder / "example.png").write_bytes(mine)
    assert "there is another 'example.png' here: move it" in refused(capsys, "look", "--example")
    assert (folder / "example.png").read_bytes() == mine


def test_where_the_drawing_of_an_address_goes() -> None:
    from qr_integrations.cli.look import _beside

    assert _beside("https://e.org/a/photo.jpg?key=secret/x") == Path("photo.look.png")
    assert _beside("http://e.org/") == _beside("https://e.org") == Path("picture.look.png")
    assert _beside("a/b.c/photo.old.tiff") == Path("a/b.c/photo.old.look.png")


# ---- caption


def test_captions_say_what_the_library_says(
    folder: Path, capsys: pytest.CaptureFixture[str], qr_mini_vl: "Backend", photo: Image.Image
) -> None:
    from qr_integrations import DeCo, Message, ViCrop

    options = ["--alpha", "2", "--deco-layers", "2-4", "--crop", "--prompt", "describe the picture", "--json"]
    assert run("caption", "photo.png", "small.png", *options, "--max-new-tokens", "12") == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(first["image"], second["image"])] == [("photo.png", "small.png")]
    messages = [Message.user(photo, "describe the picture")]
    plain = qr_mini_vl.answer(messages, crop=ViCrop(), max_new_tokens=12)
    deco = DeCo(alpha=2.0, layers=(2, 3, 4))
    corrected = qr_mini_vl.answer(messages, crop=ViCrop(), deco=deco, max_new_tokens=12)
    assert (first["plain"]["text"], first["deco"]["text"]) == (plain.text, corrected.text)
    record = corrected.steps["deco"]
    assert first["deco"]["deco"]["share_changed"] == record.share_changed
    assert first["deco"]["deco"]["num_steps"] == len(record)
    anchors = first["deco"]["deco"]["anchors"]
    assert sum(anchors.values()) == len(record) and set(anchors) <= {"2", "3", "4"}
    assert first["plain"]["crop"][0]["box"] == list(plain.steps["crop"][0].box.as_tuple())
    assert second["plain"]["crop"][0]["box"] is None and "deco" not in first["plain"]


@pytest.mark.parametrize("options", [["--deco"], ["--alpha", "0.6"], ["--deco-layers", "5,6,7"]])
def test_deco_and_its_settings_switch_it_on(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    told = found(capsys, "caption", "small.png", *options)
    assert set(told) == {"image", "prompt", "model", "plain", "deco"} and "describe" in told["prompt"]
    assert set(told["deco"]["deco"]["anchors"]) <= {"5", "6", "7"}


def test_without_deco_there_is_one_caption(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = found(capsys, "caption", "small.png", "--probe")
    assert set(told) == {"image", "prompt", "model", "plain", "probe"}
    probe = told["probe"]
    assert " ".join(token.strip() for token in probe["said"]) == told["plain"]["text"] and len(probe["said"]) == 6
    assert list(probe["agreement"]) == list(probe["mean_prob"]) == [str(layer) for layer in range(1, 8)]
    assert len(probe["settled_at"]) == 6 and max(probe["settled_at"]) <= 8


@pytest.mark.parametrize("columns", ["60", "100"])
def test_captions_on_any_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("caption", "small.png", "--deco", "--crop", "--probe", *SHORT) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= int(columns) and "\x1b" not in captured.out
    words = " ".join(captured.out.split())
    for part in ("small.png 40 x 30 pixels", "Plain 6 tokens", "DeCo 6 tokens", "by layer", "no crop", "settled by"):
        assert part in words, part
    assert "a caption of small.png was cut" in captured.err


# ---- what is refused


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["look", "nowhere.png", "q"], "no file 'nowhere.png': check the path"),
        (["look", ".", "q"], "no file '.'"),
        (["look", "text.png", "q"], "convert it to PNG or JPEG"),
        (["look", "https://me:word@e.org/a.png?key=1", "q"], "'https://e.org/a.png' is an address: pass --allow-urls"),
        (["look", "http://127.0.0.1:9/a.png", "q", "--allow-urls"], "not on the public internet"),
        (["look", "http://[", "q"], "'http://[' is an address"),
        (["look", "http://[", "q", "--allow-urls"], "could not be fetched"),
        (["look", "photo.png", "--example"], "--example brings its own picture and question: leave out IMAGE"),
        (["look", "photo.png", "q", "--example"], "leave out IMAGE and QUESTION, or --example"),
        (["look", "photo.png", "  "], "question is empty"),
        (["look", "photo.png", "q", "--model", "qr-mini"], "reads text only: pass a vision-language model"),
        (["look", "photo.png", "q", "--layers", "2,6-4"], "'2,6-4' are no layers: write 5, 4-6"),
        (["look", "photo.png", "q", "--layers", "x"], "--layers 'x' are no layers"),
        (["look", "photo.png", "q", "--layers", "99"], "in layers [99]"),
        (["look", "photo.png", "q", "--layers", "4", "--method", "input_gradient"], "leave out --layers"),
        (["look", "photo.png", "q", "--base", "1"], "base=1"),
        (["look", "photo.png", "q", "--min-lift", "-1"], "min_lift=-1"),
        (["look", "photo.png", "q", "--alpha", "-1"], "alpha=-1"),
        (["look", "photo.png", "q", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["look", "photo.png", "q", "--out", "a.txt"], "end its name in .png or .jpg"),
        (["look", "photo.png", "q", "--out", "gone/a.png"], "no folder 'gone'"),
        (["caption", "photo.png", "nowhere.png"], "no file 'nowhere.png'"),
        (["caption", "photo.png", "text.png"], "convert it to PNG or JPEG"),
        (["caption", "photo.png", "HTTP://e.org/a.png"], "pass --allow-urls"),
        (["caption", "photo.png", "--prompt", " "], "--prompt is empty"),
        (["caption", "photo.png", "--deco-layers", "0"], "[0] are no layers"),
        (["caption", "photo.png", "--deco-layers", "5-"], "--deco-layers '5-' are no layers"),
        (["caption", "photo.png", "--max-new-tokens", "-3"], "--max-new-tokens -3"),
        (["caption", "photo.png", "--model", "qr-mini"], "reads text only"),
    ],
)
def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    before = sorted(folder.iterdir())
    assert told in refused(capsys, *argv)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("command", [["look", "photo.png", QUESTION], ["caption", "photo.png"]])
def test_what_fails_does_so_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    missing = ["--model", "./nowhere"]
    assert "no model folder" in refused(capsys, *command, *missing)
    assert "--deco-layers" in refused(capsys, *command, *missing, "--deco-layers", "x")
    assert "alpha" in refused(capsys, *command, *missing, "--alpha", "nan")


def test_help_loads_no_torch(in_fresh_python: Any) -> None:
    code = (
        "import sys\nfrom qr_integrations.cli import main\n"
        "for command in ('look', 'caption'):\n"
        "    try:\n        main([command, '--help'])\n    except SystemExit as stop:\n"
        "        print('exit', stop.code)\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'PIL') if m in sys.modules])"
    )
    printed = in_fresh_python(code).splitlines()
    assert printed.count("exit 0") == 2 and printed[-1] == "[]" and "--min-lift" in "".join(printed)
