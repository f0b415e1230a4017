"""Fine-tuning from lists to a model folder: it learns, goes on where it stopped, and says what is wrong."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from tests.training.tiny import finetune, made_up, qr, refused, scores, settings, tiny

POOR = [(1, 2), (1, 3), (2, 3)]  # heads of qr-mini that do not rank


# The bundled model


@pytest.fixture(scope="module")
def taught(qr_mini: Any, lists: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Poor heads trained on four lists: the result, and the model in memory."""
    backend = qr().Backend(copy.deepcopy(qr_mini.model), qr_mini.tokenizer, name="qr-mini")
    out = tmp_path_factory.mktemp("taught") / "model"
    given = settings(steps=32, rate=5e-3, max_doc_tokens=40)
    return finetune(backend, lists, out, heads=POOR, settings=given), backend


def test_poor_heads_learn_to_rank(taught: tuple[Any, Any]) -> None:
    losses = taught[0].losses
    assert mean(losses[:4]) > 0.8 and mean(losses[-4:]) < 0.3 * mean(losses[:4])


def test_the_folder_is_complete(taught: tuple[Any, Any], qr_mini: Any, lists: list[Any]) -> None:
    from peft import PeftModel

    (done, trained), judged = taught, lists[0]
    in_memory = scores(qr().QRHeadReranker(trained, heads=POOR), judged)
    assert scores(qr().QRHeadReranker(done.folder), judged) == in_memory
    told = json.loads((done.folder / "training.json").read_text())
    assert told["losses"] == list(done.losses) and told["settings"]["rate"] == 5e-3 and told["before"] is None
    assert told["best_step"] == 32 and told["model"] == "qr-mini"
    assert not [p for p in done.folder.rglob("*") if p.suffix in {".bin", ".pt"} or p.name == "README.md"]
    alone = PeftModel.from_pretrained(copy.deepcopy(qr_mini.model), done.folder / "adapter")
    by_adapter = qr().Backend(alone.base_model.model, qr_mini.tokenizer)
    assert scores(qr().QRHeadReranker(by_adapter, heads=POOR), judged) == pytest.approx(in_memory, abs=1e-4)


# Validation and stops


def test_the_checkpoint_that_validates_best_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from training.head_trainer import HeadTrainer

    class Scripted(HeadTrainer):
        """Measures what the test says."""

        def ndcg(self) -> float:
            return [0.5, 0.5, 0.9, 0.9, 0.7][len(self.checks)]

    kept: dict[int, Any] = {}
    run = Scripted(tiny(), qr().HeadSet.of([(0, 1)]), made_up(4), made_up(2, seed=1), settings(steps=4, check_every=1))
    run.run(tmp_path / "checkpoint.safetensors", lambda run: kept.update({run.step: run.adapter.state()}))
    assert run.checks == [(0, 0.5), (1, 0.5), (2, 0.9), (3, 0.9), (4, 0.7)] and run.best_step == 2
    run.finish(tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): tensor for name, tensor in kept[2].items()}
    assert all(torch.equal(tensor, written[f"base_model.model.{name}"]) for name, tensor in expected.items())
    assert len(written) == len(expected) and not torch.equal(kept[2][min(kept[2])], kept[3][min(kept[3])])


def test_training_that_does_not_help_changes_nothing(tmp_path: Path) -> None:
    valid = [replace(judged, documents=judged.documents[:2], relevance={0: 1}) for judged in made_up(3, seed=1)]
    judged, heads = made_up(1)[0], [(0, 1)]
    before = scores(qr().QRHeadReranker(tiny(), heads=heads), judged)
    given = settings(steps=2, rate=1e-9, check_every=1)
    done = finetune(tiny(), made_up(4), tmp_path / "new", heads=heads, valid=valid, settings=given)
    assert done.best_step == 0 and done.before == done.after and len(done.checks) == 3
    assert scores(qr().QRHeadReranker(tmp_path / "new"), judged) == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "new"
    long_run(out)
    return out


def long_run(out: Path, stop_at: int = 99, **changed: Any) -> Any:
    """Seven steps with all that must survive a stop: several lists a step, validation, a moving rate."""

    def progress(run: Any) -> None:
        if run.step == stop_at:
            raise KeyboardInterrupt

    given = dict(steps=7, rate=1e-2, accumulate=2, check_every=3, save_every=2, max_doc_tokens=12)
    options = {"backend": tiny(), "lists": made_up(5), "valid": made_up(3, seed=1), "heads": [(0, 1), (1, 3)]}
    options |= {name: value for name, value in changed.items() if name in options}
    given |= {name: value for name, value in changed.items() if name not in options}
    return finetune(out=out, settings=settings(**given), progress=progress, **options)


@pytest.mark.parametrize("stops", [(1,), (4,), (5, 6), (7,)], ids=str)
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(stops: tuple[int, ...], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    for stop_at in stops:
        with pytest.raises(KeyboardInterrupt):
            long_run(out, stop_at)
        assert not out.exists() and (tmp_path / "new.part").is_dir()
    done = long_run(out)
    assert len(done.losses) == 7 and [p.name for p in tmp_path.iterdir()] == ["new"]
    for name in ("model.safetensors", "training.json", "qr_heads.json", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped after its fifth step."""
    with pytest.raises(KeyboardInterrupt):
        long_run(tmp_path / "new", stop_at=5)
    return tmp_path / "new"


CHANGES = [("seed", 1, "settings"), ("steps", 8, "settings"), ("heads", [(1, 3)], "heads")]


@pytest.mark.parametrize(("name", "value", "says"), CHANGES)
def test_a_checkpoint_of_another_run_is_refused(stopped: Path, name: str, value: Any, says: str) -> None:
    with refused(f"another {says}: remove it"):
        long_run(stopped, **{name: value})
    with refused("another training lists: remove it"):
        long_run(stopped, lists=made_up(5, seed=8))


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
def test_a_damaged_checkpoint_is_refused(stopped: Path, damage: str) -> None:
    from safetensors.torch import save_file

    checkpoint = stopped.with_name("new.part") / "checkpoint.safetensors"
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    if damage == "foreign":
        save_file({"weight": torch.zeros(2)}, checkpoint)
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[: 2000 if damage == "cut" else 0])
    with refused("no checkpoint .*remove it"):
        long_run(stopped)


# Bad input


def test_lists_that_cannot_teach_are_refused_by_name(tmp_path: Path) -> None:
    good = made_up(2)
    for relevance in ({}, {0: 0}, dict.fromkeys(range(4), 1)):
        bad = [good[0], replace(good[1], relevance=relevance)]
        with refused(rf"training list #1 \('{good[1].query}'\)"):
            finetune(tiny(), bad, tmp_path / "new", heads="all")
        with refused("validation list #1"):
            finetune(tiny(), good, tmp_path / "new", heads="all", valid=bad)
    with refused("no lists"):
        finetune(tiny(), [], tmp_path / "new", heads="all")
    assert not list(tmp_path.iterdir())


def test_heads_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with refused("no heads are known", "HeadError"):
        finetune(tiny(), made_up(2), tmp_path / "new")
    with refused(r"no head \(9, 0\)", "HeadError"):
        finetune(tiny(), made_up(2), tmp_path / "new", heads=[(9, 0)])
    with refused("larger max_layer", "HeadError"):
        finetune(tiny(), made_up(2), tmp_path / "new", heads=[(1, 0)], max_layer=0)


def test_heads_above_the_limit_are_left_out(tmp_path: Path) -> None:
    finetune(tiny(), made_up(2), tmp_path / "new", heads="all", max_layer=1, settings=settings(steps=1))
    assert {layer for layer, _ in qr().HeadSet.load(tmp_path / "new" / "qr_heads.json").heads} == {0, 1}


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    for out in (tmp_path, tmp_path / "mine", tmp_path / "nowhere" / "new"):
        with refused("new folder"):
            finetune(tiny(), made_up(2), out, heads="all")
    assert (tmp_path / "mine").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_a_list_that_needs_several_prompts_is_refused(tmp_path: Path) -> None:
    judged = made_up(1)[0]
    long = replace(judged, documents=tuple(qr().Document("common1 " * 900) for _ in range(9)))
    with refused("pass fewer documents in a list, or a smaller max_doc_tokens", "WindowError"):
        finetune(tiny(), [long], tmp_path / "new", heads="all")


def test_without_peft_the_error_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused(r"fine-tuning needs .*pip install 'qr-integrations\[train\]'", "MissingExtra"):
        finetune(tiny(), made_up(2), tmp_path / "new", heads="all")
    assert not list(tmp_path.iterdir())


# The command


@pytest.fixture
def command(tmp_path: Path) -> Iterator[list[str]]:
    """Arguments for a tiny model, with its files."""
    backend, folder, data = tiny(), tmp_path / "base", tmp_path / "lists.jsonl"
    backend.model.save_pretrained(folder)
    backend.tokenizer.save_pretrained(folder)
    qr().HeadSet.of([(0, 1), (1, 3)], source="by hand").save(folder / "qr_heads.json")
    lines = [
        {"query": x.query, "documents": [document.text for document in x.documents], "gold": sorted(x.relevance)}
        for x in made_up(5)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield ["--model", str(folder), "--data", str(data), "--out", str(tmp_path / "new"), "--device", "cpu"]
    qr().Backend.load(folder, device="cpu").close()


def test_the_command_trains_and_tells(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from training.finetune_heads import main

    assert main([*command, "--valid-share", "0.4", "--steps", "4", "--check-every", "2", "--rate", "0.01"]) == 0
    told = capsys.readouterr()
    assert "nDCG@10 0." in told.out and "before" in told.out and str(tmp_path / "new") in told.out
    assert [line.split(":")[0] for line in told.err.splitlines() if line.startswith("step")] == ["step 2/4", "step 4/4"]
    facts = json.loads((tmp_path / "new" / "training.json").read_text())
    assert [step for step, _ in facts["checks"]] == [0, 2, 4] and facts["data"] == "lists.jsonl"
    heads = qr().HeadSet.load(tmp_path / "new" / "qr_heads.json")
    assert heads.source.startswith("by hand; ") and "3 lists of lists.jsonl" in heads.source


def test_the_command_says_what_is_wrong(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from training.finetune_heads import main

    (tmp_path / "lists.jsonl").write_text('{"query": "rare1", "documents": ["rare1", "rare2"], "gold": []}\n')
    assert main(command) == 2
    assert "error: training list #0 ('rare1') has 0 relevant of 2" in capsys.readouterr().err
    assert main([*command, "--valid-share", "0.5"]) == 2
    assert "pass another share" in capsys.readouterr().err


def test_a_share_is_kept_apart() -> None:
    from training.finetune_heads import held_out

    lists = made_up(10)
    train, valid = held_out(lists, 0.2, seed=3)
    assert (len(train), len(valid)) == (8, 2)
    assert {x.id for x in train} | {x.id for x in valid} == {x.id for x in lists}
    assert held_out(lists, 0.2, seed=3) == (train, valid) != held_out(lists, 0.2, seed=4)
