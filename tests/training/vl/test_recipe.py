"""The recipe: stages resume where they stopped, every stage lowers its loss, what is exported is what was trained."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 6


def sizes() -> Any:
    from training.vl.model import Sizes

    return Sizes(56, 14, 3, 32, 2, 48, 2, 32, 2, 48)


def start(seed: int = 0) -> Any:
    from training.vl.qr_mini_vl import start as begin

    return begin(sizes(), "cpu", seed)


def stages(steps: int = STEPS) -> list[Any]:
    from training.vl.qr_mini_vl import plan

    return [replace(stage, steps=steps, seconds=1e9, pictures=4, pairs=0.5) for stage in plan(1.0)]


def train(parts: Any, todo: Sequence[Any], folder: Path) -> None:
    from training.vl.qr_mini_vl import train as run

    run(parts, todo, folder)


def trainer(parts: Any, stage: Any, folder: Path) -> Any:
    from training.vl.train import Trainer

    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(parts, stage, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """All stages in one go."""
    parts, folder = start(), tmp_path_factory.mktemp("one")
    train(parts, stages(), folder)
    return parts, folder


def test_a_run_in_pieces_gives_the_weights_of_one_run(trained: tuple[Any, Path], tmp_path: Path) -> None:
    for number in range(3):
        for steps in (2, 3):
            parts = start(seed=9)  # other weights: all must come from the files
            for stage in stages()[:number]:
                train(parts, [stage], tmp_path)
            if not number and steps == 2:
                parts = start()
            stopped = trainer(parts, stages()[number], tmp_path)
            stopped.load()
            assert not stopped.run(steps)
        train(parts, [stages()[number]], tmp_path)
    parts = start(seed=9)
    train(parts, stages(), tmp_path)
    for name, value in trained[0].state().items():
        assert torch.equal(value, parts.state()[name]), name


def test_checkpoints_hold_no_pickle(trained: tuple[Any, Path]) -> None:
    files = sorted(path.name for path in trained[1].iterdir())
    assert files == ["both.safetensors", "language.safetensors", "tower.safetensors"]


def test_the_language_stage_leaves_the_tower_alone(tmp_path: Path) -> None:
    parts = start()
    before = parts.state()
    train(parts, stages()[1:2], tmp_path)
    after = parts.state()
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector", "weight"}  # "weight" is the tied output


@pytest.mark.parametrize(("number", "loss", "factor"), [(0, "colour_loss", 0.9), (1, "answer_loss", 0.87)])
def test_a_stage_learns(number: int, loss: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.vl import train as module

    monkeypatch.setattr(module, "REPORT_EVERY", 20)
    monkeypatch.setattr(module, "WARM_UP", 10)
    stage = replace(stages(60)[number], pictures=16, pairs=0.0)
    trainer(start(), stage, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert lines[-1][loss] < factor * lines[0][loss]


def test_the_exported_model_says_what_the_trained_one_says(trained: tuple[Any, Path], tmp_path: Path) -> None:
    from qr_integrations.evaluation.drawn_world.held_out import held_out_scene
    from training.vl.evaluate import write_captions
    from training.vl.export import export, load_exported
    from training.vl.model import build_processor
    from training.vl.packing import Packer

    parts = trained[0]
    rounded = {name: value.half().float() for name, value in parts.model.state_dict().items()}
    parts.model.load_state_dict(rounded)
    export(tmp_path / "model", parts.model, build_processor(sizes()))
    model, processor = load_exported(tmp_path / "model")
    scenes = [held_out_scene(number) for number in range(3)]
    written = [write_captions(m.eval(), Packer(processor.tokenizer, sizes()), scenes) for m in (parts.model, model)]
    assert written[0] == written[1]
    assert parts.model.dtype == torch.float32


def test_the_full_model_fits_its_budget_and_a_small_report_is_whole(tmp_path: Path) -> None:
    from training.vl.model import Sizes, build_model, build_processor

    processor = build_processor(Sizes())
    model = build_model(Sizes(), processor.tokenizer)
    assert sum(p.numel() for p in model.parameters()) * 2 < 16e6
    assert model.config.vision_config.num_hidden_layers >= 12 and model.config.text_config.num_hidden_layers >= 8


def test_the_report_covers_all_skills_and_sizes(trained: tuple[Any, Path], tmp_path: Path) -> None:
    from qr_integrations.evaluation.drawn_world.held_out import SHARES
    from qr_integrations.evaluation.drawn_world.questions import SKILLS
    from training.vl.export import export
    from training.vl.model import build_processor
    from training.vl.qr_mini_vl import report

    export(tmp_path / "model", trained[0].model, build_processor(sizes()))
    text = report(tmp_path / "model", sizes(), scenes=12)
    measured = json.loads((tmp_path / "report.json").read_text())
    for table in (measured["whole"], measured["whole and oracle crop"]):
        assert set(table) | {"caption"} == set(SKILLS)
        assert all(len(row) == len(SHARES) and all(0 <= v <= 1 for v in row.values()) for row in table.values())
    assert "| color |" in text and "recall_large" in text
