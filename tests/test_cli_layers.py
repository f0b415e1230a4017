"""`qr-integrations layers`: real files, the bundled model, and what the library itself says."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from qr_integrations.backend import Backend


def run(*argv: str) -> int:
    from qr_integrations.cli import main

    return main(["layers", *argv])


def found(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON of the command; nothing else may be on standard output."""
    assert run(*argv, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    parsed: dict[str, Any] = json.loads(out)
    return parsed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of pictures; the terminal is 100 columns wide."""
    from qr_integrations.evaluation.layer_skills import skill_scenes

    (tmp_path / "shots" / "deeper").mkdir(parents=True)
    for number, scene in enumerate(skill_scenes(3)):
        scene.picture().save(tmp_path / "shots" / f"{number}.{'PNG' if number else 'jpg'}")
    (tmp_path / "shots" / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torn.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_it_says_what_the_library_says(folder: Path, capsys: pytest.CaptureFixture[str], qr_mini_vl: "Backend") -> None:
    from qr_integrations.encoding.layers import group_layers, layer_similarity, representatives

    options = ["--groups", "4", "--rule", "adjacent", "--compare", "mean", "--tokens", "all"]
    told = found(capsys, "--images", "shots", *options)
    paths = [folder / "shots" / name for name in ("0.jpg", "1.PNG", "2.PNG")]
    similarity = layer_similarity(qr_mini_vl, paths, compare="mean", tokens="all")
    groups = group_layers(similarity, 4, "adjacent")
    np.testing.assert_allclose(told["matrix"], similarity.matrix, atol=1e-6)
    np.testing.assert_allclose(told["adjacent"], similarity.adjacent, atol=1e-6)
    assert told["groups"] == [[group[0], group[-1]] for group in groups]
    assert told["candidates"] == {
        rule: list(representatives(similarity, groups, rule)) for rule in ("medoid", "penultimate", "paper")
    }
    assert (told["num_pictures"], told["tower"], told["feature_layers"]) == (3, "qr-mini-vl", [11])
    assert told["picture"] is None


def test_the_table_and_the_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", "shots", "--limit", "2", "--out", "map.png") == 0
    captured = capsys.readouterr()
    words = " ".join(captured.out.split())
    for part in ("0 | 1", "11 | 12", "<- cut", "2 pictures, 12 layers", "(paper): vision_feature_layer=[1, 9, 11]"):
        assert part in words, part
    assert "The model reads: 11" in words and "Map: map.png" in words and captured.err == ""
    assert captured.out.count("<- cut") == 2 and max(map(len, captured.out.splitlines())) <= 100
    with Image.open("map.png") as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 300 and len(set(drawn.convert("L").tobytes())) > 50


def test_the_example_draws_its_own_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    told = found(capsys, "--example", "--limit", "1", "--groups", "1")
    assert told["num_pictures"] == 1 and told["groups"] == [[0, 12]] and told["error"][0][1] is None
    assert sorted(folder.iterdir()) == before
    assert run("--example", "--limit", "1") == 0
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "pass either --images FOLDER or --example"),
        (["--images", "shots", "--example"], "pass either"),
        (["--images", "nowhere"], "no folder 'nowhere': check the path"),
        (["--images", "shots/1.PNG"], "no folder"),
        (["--images", "empty"], "'empty' holds no pictures"),
        (["--images", "broken"], "convert it to PNG or JPEG"),
        (["--images", "shots", "--limit", "0"], "--limit 0"),
        (["--images", "shots", "--groups", "0"], "--groups 0"),
        (["--images", "shots", "--groups", "14"], "--groups 14 are too many: pass up to 13"),
        (["--images", "shots", "--out", "map.txt"], "end its name in .png"),
        (["--images", "shots", "--out", "gone/map.png"], "cannot be written"),
        (["--images", "shots", "--model", "qr-mini"], "reads text only"),
        (["--images", "shots", "--model", "./nowhere"], "no model folder"),
        (["--images", "nowhere", "--model", "./nowhere"], "no folder 'nowhere'"),
    ],
)
def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert told in captured.err and "unexpected" not in captured.err


def test_probes_can_be_drawn(tmp_path: Path) -> None:
    import torch

    from qr_integrations.encoding.layer_probes import probe_layers
    from qr_integrations.evaluation.layer_plots import plot_probes

    probes = probe_layers(torch.randn(4, 30, 5), ["a", "b", "c"] * 10)
    plot_probes({"color": probes, "shape": probes}, tmp_path / "probes.png")
    with Image.open(tmp_path / "probes.png") as drawn:
        assert min(drawn.size) > 300


def test_help_loads_no_torch(in_fresh_python: Any) -> None:
    code = (
        "import sys\nfrom qr_integrations.cli import main\n"
        "try:\n    main(['layers', '--help'])\nexcept SystemExit as stop:\n    print('exit', stop.code)\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'PIL') if m in sys.modules])"
    )
    printed = in_fresh_python(code).splitlines()
    assert printed[-2:] == ["exit 0", "[]"] and "--images" in "".join(printed)
