"""What is made of right and wrong answers in fewer tokens: known skills, fair comparisons, the report."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

METHODS = {"random_tokens": ["random 50", "random 10"], "mine": ["mine 50", "mine 10"]}
READ = {"none": 100.0, "mqt 64": 64.0, "mqt 2": 2.0}
READ |= {"random 50": 50.0, "random 10": 10.0, "mine 50": 50.0, "mine 10": 30.0}


def test_one_question_of_each_skill_and_sizes_take_turns() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.token_accuracy import one_of_each_skill

    every = drawn_questions(48)
    chosen = one_of_each_skill(every)
    asked = Counter((one.group, one.skill) for one in chosen)
    assert set(asked.values()) == {1} and set(asked) == {(one.group, one.skill) for one in every}
    for skill in ("color", "shape", "side", "letter", "number"):
        sizes = Counter(one.share for one in chosen if one.skill == skill)
        assert len(sizes) == 6 and max(sizes.values()) - min(sizes.values()) <= 1
    answers = Counter(one.answers for one in chosen if one.skill == "presence")
    assert abs(answers["yes",] - answers["no",]) <= 6


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    """60 scenes, each asked for one of three colours at two sizes, and for a side that nobody knows."""
    from qr_integrations.evaluation.picture_questions import PictureQuestion

    image, colours = Image.new("RGB", (8, 8)), ("red", "blue", "red", "green")
    questions = []
    for scene in range(60):
        for skill, share in (("color", 0.4), ("color", 0.05), ("side", 0.4)):
            answer = colours[scene % 4] if skill == "color" else ("left", "right")[scene % 2]
            questions.append(PictureQuestion(image, "?", (answer,), skill, share, None, f"scene {scene}", str(scene)))
    return questions


@pytest.fixture(scope="module")
def runs(asked: list[Any]) -> list[Any]:
    """All tokens know the colours; half of the random ones do for half of the scenes; mine are better than as many."""
    from qr_integrations.evaluation.pictures import PictureRun
    from qr_integrations.evaluation.token_accuracy import guess

    known: dict[str, Callable[[int], bool]] = {
        "none": lambda scene: True,
        "mqt 64": lambda scene: scene % 10 != 0,
        "mqt 2": lambda scene: scene % 2 == 0,
        "random 50": lambda scene: scene % 4 < 2,
        "random 10": lambda scene: False,
        "mine 50": lambda scene: scene % 4 < 3,
        "mine 10": lambda scene: scene % 4 == 0,
    }
    made = guess(asked)
    for name, knows in known.items():
        for number, one in enumerate(asked):
            right = knows(number // 3) if one.skill == "color" else number // 3 % 4 < 2
            made.append(PictureRun(name, number, "red", right, None, 0.2, 0.1, READ[name]))
    return made


@pytest.fixture(scope="module")
def report(asked: list[Any], runs: list[Any]) -> Any:
    from qr_integrations.evaluation.pictures import count_questions
    from qr_integrations.evaluation.token_accuracy import GUESS, compare_tokens, known_skills, slice_known
    from qr_integrations.evaluation.token_report import TokenReport

    known = known_skills(runs, asked)
    slices = slice_known(asked, known)
    pruned = [name for names in METHODS.values() for name in names]
    baselines = {"none": (GUESS,), "mqt 2": ("none", "mqt 64"), "mqt 64": ("none",), **dict.fromkeys(pruned, ("none",))}
    randoms = [*METHODS["random_tokens"], "none"]
    systems = compare_tokens(runs, asked, slices, randoms=randoms, pruned=pruned, baselines=baselines)
    counts = count_questions(asked, slices)
    return TokenReport({"data": "made up"}, systems, ["mqt 64", "mqt 2"], METHODS, ["50", "10"], ["side"], counts)


def test_a_guess_is_the_most_common_answer_to_the_skill(asked: list[Any]) -> None:
    from qr_integrations.evaluation.token_accuracy import guess

    guessed = guess(asked)
    assert [run.number for run in guessed] == list(range(len(asked)))
    assert {run.text for run, one in zip(guessed, asked, strict=True) if one.skill == "color"} == {"red"}
    right = [run.right for run, one in zip(guessed, asked, strict=True) if one.skill == "color"]
    assert np.mean(right) == 0.5


def test_a_guess_is_the_answer_that_is_right_most_often(asked: list[Any]) -> None:
    from qr_integrations.evaluation.answers import is_right
    from qr_integrations.evaluation.picture_questions import PictureQuestion
    from qr_integrations.evaluation.token_accuracy import guess

    def times_right(answers: list[tuple[str, ...]], *, contains: bool = False) -> tuple[str, int]:
        runs = guess([PictureQuestion(asked[0].image, "?", some) for some in answers], contains=contains)
        return runs[0].text, sum(run.right for run in runs)

    assert times_right([("red", "crimson"), ("red",), ("blue", "crimson"), ("dark", "Crimson.")]) == ("crimson", 3)
    assert times_right([("two",), ("a 2",), ("3",)]) == ("two", 2)
    assert times_right([("ball",), ("red",), ("the red ball",), ("?",)], contains=True) == ("the red ball", 3)
    assert times_right([("?",), ("?!",), ("?",)], contains=True) == ("?!", 3)
    drawn = np.random.default_rng(0)
    words = ["a", "red", "ball", "2", "two", "?", "?!", "A Red ball", "red ball two"]
    for contains in (False, True):
        for _ in range(20):
            answers = [tuple(drawn.choice(words, 2).tolist()) for _ in range(7)]
            most = max(sum(is_right(word, some, contains=contains) for some in answers) for word in sum(answers, ()))
            assert times_right(answers, contains=contains)[1] == most


def test_skills_at_chance_are_told_from_those_that_the_model_has(asked: list[Any], runs: list[Any]) -> None:
    from qr_integrations.evaluation.token_accuracy import KNOWN, known_skills, slice_known

    assert known_skills(runs, asked) == ("color",)
    sliced = slice_known(asked, ["color"])
    assert len(sliced["all"][KNOWN]) == 120 and len(sliced["all"]["all"]) == 180
    assert {name: len(some) for name, some in sliced["size"].items()} == {"0.40": 60, "0.05": 60}
    assert set(sliced["skill"]) == {"color", "side"}
    assert len(slice_known(asked, [])["all"][KNOWN]) == 180


def test_a_method_is_compared_with_as_many_random_tokens_as_it_reads(report: Any) -> None:
    from qr_integrations.evaluation.token_accuracy import AS_MANY, KNOWN

    gain = {one.name: one.against[AS_MANY]["all"][KNOWN] for one in report.systems if AS_MANY in one.against}
    assert set(gain) == {"mine 50", "mine 10"}
    assert gain["mine 50"].mean == pytest.approx(0.25) and gain["mine 50"].p < 0.001
    assert gain["mine 10"].mean == pytest.approx(0.0) and gain["mine 10"].p > 0.1  # halfway between 10 and 50 tokens
    everything = report.system("mine 10").against["none"]["all"][KNOWN]
    assert everything.mean == pytest.approx(-0.75) and everything.high < 0


@pytest.mark.parametrize(
    ("wanted", "shares"),
    [
        (10.0, {"ten": 1.0}),
        (50.0, {"fifty": 1.0}),
        (40.0, {"ten": 0.25, "fifty": 0.75}),
        (3.0, {}),
        (80.0, {}),
    ],
)
def test_between_two_numbers_of_tokens_lie_both_in_part(wanted: float, shares: dict[str, float]) -> None:
    from qr_integrations.evaluation.token_accuracy import between

    assert between({"fifty": 50.0, "ten": 10.0}, wanted) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("random", "wanted", "compared"),
    [(None, 30.0, False), (20.0, 19.0, False), (20.0, 20.0, True), (20.0, 30.0, True)],
)
def test_only_as_many_tokens_as_were_drawn_at_random_are_compared(
    asked: list[Any], random: float | None, wanted: float, compared: bool
) -> None:
    from qr_integrations.evaluation.pictures import PictureRun, count_questions
    from qr_integrations.evaluation.token_accuracy import AS_MANY, compare_tokens, guess, slice_known
    from qr_integrations.evaluation.token_report import TokenReport, token_page

    read = {"none": 100.0, "mine": wanted, **({} if random is None else {"random": random})}
    runs = guess(asked)
    for name, tokens in read.items():
        runs += [PictureRun(name, number, "", bool(number % 2), None, 0.1, 0.1, tokens) for number in range(len(asked))]
    slices, randoms = slice_known(asked, ["color"]), ["random", "none"]
    systems = compare_tokens(
        runs, asked, slices, randoms=randoms, pruned=["random", "mine"], baselines={"mine": ["none"]}
    )
    assert {one.name for one in systems if AS_MANY in one.against} == ({"mine"} if compared else set())
    pruned = {"mine": ["mine"], **({} if random is None else {"random_tokens": ["random"]})}
    page = token_page(TokenReport({}, systems, [], pruned, ["some"], [], count_questions(asked, slices)))
    assert ("## Against random tokens, as many" in page) is compared


def lines(page: str, first: str) -> list[list[str]]:
    """The cells of lines that begin with a cell."""
    cut = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return [line for line in cut if line[0] == first]


def test_the_page_holds_what_was_measured(report: Any) -> None:
    from qr_integrations.evaluation.token_report import token_page

    page = token_page(report)
    by_skill, by_size, as_many_by_size, time = lines(page, "mine 10")
    assert by_skill[1] == "30.0" and [cell.split()[0] for cell in by_skill[2:]] == ["0.250", "0.500", "0.250"]
    assert [cell.split()[0] for cell in by_size[2:]] == ["0.250", "0.250", "0.250"]
    assert [cell.split()[0] for cell in as_many_by_size[1:]] == ["+0.000", "+0.000"]
    assert time[1:] == ["30.0", "100.0", "200.0"]
    assert "side (at chance)" in page and "color (at chance)" not in page
    as_many, whole = lines(page, "mine")
    assert [cell.split()[0] for cell in as_many[1:]] == ["+0.250", "+0.000"]
    assert [cell.split()[0] for cell in whole[1:]] == ["-0.250", "-0.750"]
    against = lines(page, "mqt 2")[2]
    assert [cell.split()[0] for cell in against[1:]] == ["-0.500", "-0.400"]
    assert lines(page, "questions / scenes")[0][1:] == ["", "120 / 60", "60 / 60", "120 / 60"]
    assert page.index("data: made up") < page.index("## Matryoshka tokens, by skill") < page.index("## Dropped")


def test_a_report_has_its_figures_its_answers_and_two_plots(
    report: Any, asked: list[Any], runs: list[Any], tmp_path: Path
) -> None:
    from qr_integrations.evaluation.token_report import save_token_report

    folder = tmp_path / "report"
    for _ in range(2):  # a report replaces an earlier one
        save_token_report(report, runs, asked, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.md", "results.json", "per_query.jsonl", "quality.png", "skills.png"}
    results = json.loads((folder / "results.json").read_text())
    assert results["at_chance"] == ["side"] and results["baseline"] == "none"
    found: Sequence[Any] = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
    assert len(found) == len(runs) and {one["visual_tokens"] for one in found} == {None, *READ.values()}
    page = (folder / "report.md").read_text()
    for name in ("quality.png", "skills.png"):
        assert f"({name})" in page
        with Image.open(folder / name) as plot:
            assert plot.size[0] > 400 and len(set(plot.convert("L").tobytes())) > 20


def test_questions_without_skills_and_sizes_and_without_matryoshka_make_a_report_too(tmp_path: Path) -> None:
    from qr_integrations.evaluation.picture_questions import PictureQuestion
    from qr_integrations.evaluation.pictures import PictureRun, count_questions
    from qr_integrations.evaluation.token_accuracy import compare_tokens, guess, known_skills, slice_known
    from qr_integrations.evaluation.token_report import TokenReport, save_token_report

    asked = [PictureQuestion(Image.new("RGB", (8, 8)), "?", (str(number % 3),)) for number in range(9)]
    runs = guess(asked)
    for name in ("none", "mine"):
        runs += [PictureRun(name, n, "", bool(n % 2), None, 0.1, 0.1, READ.get(name, 9.0)) for n in range(9)]
    slices = slice_known(asked, known_skills(runs, asked))
    systems = compare_tokens(runs, asked, slices, randoms=["none"], pruned=["mine"], baselines={})
    report = TokenReport({}, systems, [], {"mine": ["mine"]}, ["9"], [], count_questions(asked, slices))
    save_token_report(report, runs, asked, tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "Against random tokens" not in page
    assert lines(page, "mine")[0][1:3] == ["9.0", lines(page, "mine")[0][2]] and "Matryoshka" not in page
    assert not (tmp_path / "report" / "skills.png").exists()
