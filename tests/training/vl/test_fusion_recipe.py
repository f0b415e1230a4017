"""The comparison of fusions: all cells alike, resumable, and measured as they will be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SCENES = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as small as they get."""
    from training.vl.export import export
    from training.vl.model import Sizes, build_model, build_processor

    sizes = Sizes(56, 14, 3, 32, 2, 48, 2, 32, 2, 48)
    processor = build_processor(sizes)
    folder = tmp_path_factory.mktemp("base")
    export(folder, build_model(sizes, processor.tokenizer), processor)
    return folder


def course(folder: Path, base: Path, steps: int = 5) -> Any:
    from training.vl.fusion import Course

    return Course(folder, base, steps, pictures=3, scenes=SCENES)


def spec(*settings: Any) -> Any:
    from qr_integrations.encoding.fusion_layers import FusionSpec

    return FusionSpec(*settings)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two cells."""
    made = course(tmp_path_factory.mktemp("finished"), base)
    made.run("external", spec("all"))
    made.run("internal", spec("triple", "internal_modular"))
    return made


def test_there_is_a_cell_for_every_set_and_strategy() -> None:
    from training.vl.fusion import BASELINE, all_cells

    cells = all_cells()
    assert next(iter(cells)) == BASELINE
    assert len(set(cells.values())) == len(cells) == 35
    assert {s.wiring for s in cells.values()} == {"pre"}


def test_a_finished_cell_is_skipped_and_a_started_one_goes_on(finished: Any, base: Path, tmp_path: Path) -> None:
    again = course(tmp_path, base)
    begun = again.trainer("external", spec("all"))
    assert not begun.run(2)
    again = course(tmp_path, base)
    again.run("external", spec("all"))
    again.run("external", spec("latter"))
    lines = [{k: v for k, v in line.items() if k != "train_seconds"} for line in (*again.lines(), finished.lines()[0])]
    assert lines[0] == lines[1] and len(lines) == 2
    assert not list(tmp_path.glob("*.safetensors"))  # only what is fused stays, in a folder of its own


def test_cells_that_cannot_be_compared_share_no_folder(finished: Any, base: Path) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"'steps': 5.*another folder"):
        course(finished.folder, base, steps=6)
    assert len(course(finished.folder, base).lines()) == 2


def test_the_tower_and_the_model_to_start_from_stay_as_they_are(finished: Any, base: Path) -> None:
    from training.vl.export import load_exported

    trainer = finished.trainer("other", spec("triple"))
    before = trainer.parts.state()
    trainer.run(2)
    after = trainer.parts.state()
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector", "weight"}  # "weight" is the tied output
    fresh = load_exported(base)[0].state_dict()
    assert all(torch.equal(before[f"model.{name}"], v) for name, v in fresh.items() if "projector" not in name)


@pytest.mark.parametrize("settings", [("all",), ("triple", "internal_direct"), ("triple", "internal_modular")])
def test_what_is_kept_of_the_tower_gives_the_model_s_own_logits(finished: Any, settings: Any) -> None:
    from training.vl.fusion import lesson_logits
    from training.vl.packing import IGNORED, packed_batch

    trainer = finished.trainer("other", spec(*settings))
    model = trainer.parts.model.eval()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    packed = packed_batch(trainer.packer, "test", 0, 0.5, 2, 0.0)
    lesson = finished.lessons.get("test", lambda: packed)
    assert lesson.states.shape == (4, 2, 16, 32) and len(lesson.packed.pixel_values) == 0
    kept, place = lesson_logits(model, lesson), 0
    for row in range(2):
        branch = packed.branch[row]
        for number in range(1, int(branch.max()) + 1):
            chosen = (branch == 0) | (branch == number)
            own = model(input_ids=packed.input_ids[row, chosen][None], pixel_values=packed.pixel_values[row : row + 1])
            asked = packed.targets[row, chosen] != IGNORED
            count = int(asked.sum())
            torch.testing.assert_close(kept[place : place + count], own.logits[0, asked], atol=0.05, rtol=0.05)
            place += count
    assert place == len(kept)


def test_what_is_written_answers_as_measured(finished: Any, base: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion
    from training.vl.export import load_exported
    from training.vl.fusion import right_by_scene

    for line in finished.lines():
        model = load_fusion(load_exported(base)[0], finished.folder / line["cell"])
        trainer = finished.trainer("other", spec("triple"))
        assert right_by_scene(model, trainer.packer, finished.lessons, SCENES) == line["right"]


def test_means_are_taken_over_scenes() -> None:
    from training.vl.fusion import scene_means

    rows = {"color": {"0.60": [[0, 1, 1], [1, 0, 2]]}, "count": {"0.60": [[0, 0, 1]], "0.40": [[1, 2, 2]]}}
    np.testing.assert_allclose(scene_means({"right": rows}), [0.5, 0.5])
    np.testing.assert_allclose(scene_means({"right": rows}, "count"), [0.0, 1.0])
    np.testing.assert_allclose(scene_means({"right": rows}, shares=[0.6]), [0.5, 0.0])


def test_the_tables_show_every_cell_with_its_interval(tmp_path: Path) -> None:
    from training.vl.fusion import BASELINE, tables

    def line(cell: str, right: int) -> dict[str, Any]:
        rows = [[number, right, 10] for number in range(8)]
        return {"cell": cell, "loss": 0.5, "right": {"color": {"0.60": rows}}}

    text = tables([line(BASELINE, 5), line("external_direct triple", 7), line("layer 4", 2)])
    assert "| triple | 70.0 [70.0, 70.0] |" in text
    assert "| external_direct triple | 70.0 [70.0, 70.0] | 20.0 [20.0, 20.0] | 0.0078 | 0.5 |" in text
    assert f"| {BASELINE} | 50.0 [50.0, 50.0] |  |  | 0.5 |" in text
    assert "| layer 4 | 20.0 [20.0, 20.0] |" in text.split("| cell | color |")[1]


def test_the_command_begins_no_cell_after_its_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from training.vl.fusion import main

    arguments = ["--steps", "1", "--pictures", "2", "--scenes", "2", "--threads", "1"]
    command = ["fusion", "--out", str(tmp_path), "--base", str(base), *arguments]
    monkeypatch.setattr(sys, "argv", [*command, "--hours", "0"])
    main()
    assert not (tmp_path / "cells.jsonl").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--cells", "layer own", "linear sin"])
    main()
    lines = [json.loads(line)["cell"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert lines == ["layer own", "linear single"]
    assert "| linear single |" in (tmp_path / "tables.md").read_text()


def test_cells_that_there_are_not_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from training.vl.fusion import main

    monkeypatch.setattr(sys, "argv", ["fusion", "--out", str(tmp_path / "out"), "--cells", "layer own", "sideways"])
    with pytest.raises(SystemExit):
        main()
    assert "no cell begins with 'sideways': write one of layer own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
