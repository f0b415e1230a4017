"""Questions about pictures: how answers are judged, where crops lie, what is made of right and wrong answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("said", "answers", "exact", "contained"),
    [
        ("Red.", ["red"], True, True),
        ("  the RED ball ", ["a red ball"], True, True),
        ("Two", ["2"], True, True),
        ("A", ["a"], True, True),
        ("A", ["the"], False, False),
        ("It is a red ball.", ["red ball"], False, True),
        ("red big ball", ["red ball"], False, False),
        ("redder", ["red"], False, False),
        ("", ["red"], False, False),
        ("3.14", ["3.14"], True, True),
        ("blue", ["red", "blue"], True, True),
        ("ＲＥＤ", ["red"], True, True),
        ("", ["?"], False, False),
        ("cat", ["$"], False, False),
        (" ? ", ["?"], True, True),
        ("It is $.", ["$"], False, True),
        ("cat", [""], False, False),
    ],
)
def test_answers_are_compared_by_their_words(said: str, answers: list[str], exact: bool, contained: bool) -> None:
    from qr_integrations.evaluation.answers import is_right

    assert is_right(said, answers) is exact
    assert is_right(said, answers, contains=True) is contained


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("Yes", True),
        ("no.", False),
        ("There is not. Yes, sure.", False),
        ("There isn’t any", False),
        ("yes and no", None),
        ("a ball", None),
        ("", None),
        ("nothing is known", None),
    ],
)
def test_yes_and_no_are_told_from_everything_else(said: str, yes: bool | None) -> None:
    from qr_integrations.evaluation.answers import yes_or_no

    assert yes_or_no(said) is yes


def test_a_ratio_is_that_of_the_sums_and_as_sure_as_a_plain_bootstrap_of_pictures_says() -> None:
    from qr_integrations.evaluation.ratios import ratio

    rng = np.random.default_rng(0)
    wholes = rng.integers(1, 12, 50).astype(float)
    parts = rng.binomial(wholes.astype(int), rng.beta(2, 2, 50)).astype(float)
    drawn = rng.integers(0, 50, (20_000, 50))
    plain = np.quantile(parts[drawn].sum(1) / wholes[drawn].sum(1), [0.025, 0.975])
    found = ratio(parts, wholes)
    assert found.mean == pytest.approx(parts.sum() / wholes.sum())
    assert [found.low, found.high] == pytest.approx(plain, abs=0.1 * (plain[1] - plain[0]))


def test_questions_about_one_picture_count_as_one_observation() -> None:
    from qr_integrations.evaluation.ratios import ratio

    right = np.array([1.0, 0.0] * 10)
    alone = ratio(right, np.ones(20))
    ten_each = ratio(10 * right, 10 * np.ones(20))
    assert (ten_each.low, ten_each.high) == pytest.approx((alone.low, alone.high))


def test_a_ratio_without_a_whole_has_no_value_and_stays_between_0_and_1() -> None:
    from qr_integrations.evaluation.ratios import ratio, ratio_difference

    none, some = np.zeros(3), np.array([1.0, 4.0, 1.0])
    assert ratio(none, none) is None
    assert ratio_difference(some, some, none, none) is None
    skewed = ratio(np.array([10.0, 0.0, 0.0, 1.0]), np.array([10.0, 1.0, 1.0, 1.0]))
    assert 0 <= skewed.low < skewed.mean < skewed.high <= 1


def question(number: int = 0, **changes: Any) -> Any:
    from qr_integrations.evaluation.picture_questions import PictureQuestion

    given = {"image": Image.new("RGB", (8, 8)), "question": "What?", "answers": ("red",), "id": f"q{number}", **changes}
    return PictureQuestion(**given)


def test_an_oracle_crop_is_the_smallest_that_holds_the_box() -> None:
    from qr_integrations.evaluation.known_crops import crop_sides, oracle_box
    from qr_integrations.types import Box

    rng, checked = Random(0), set()
    for _ in range(300):
        size = rng.randint(150, 1300), rng.randint(150, 1300)
        width, height = rng.randint(1, min(300, size[0])), rng.randint(1, min(300, size[1]))
        left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
        found = oracle_box(size, Box(left, top, left + width, top + height), 140)
        sides = [side for side in crop_sides(140) if side >= max(width, height)]
        if not sides:
            assert found is None
            continue
        assert (found.width, found.height) == (min(sides[0], size[0]), min(sides[0], size[1]))
        assert 0 <= found.left <= left and left + width <= found.right <= size[0]
        assert 0 <= found.top <= top and top + height <= found.bottom <= size[1]
        checked.add(sides[0])
    assert checked == {140, 168, 196, 224, 252, 280}


def test_no_crop_where_nothing_is_to_be_looked_at_or_the_picture_is_small() -> None:
    from qr_integrations.evaluation.known_crops import oracle_box
    from qr_integrations.types import Box

    box = Box(10, 10, 20, 20)
    assert oracle_box((500, 500), None, 140) is None
    assert oracle_box((140, 100), box, 140) is None
    assert oracle_box((141, 100), box, 140) == Box(0, 0, 140, 100)


def test_random_crops_are_as_large_as_the_other_and_lie_anywhere() -> None:
    from qr_integrations.evaluation.known_crops import random_box
    from qr_integrations.types import Box

    draw, size = Random(1), (900, 600)
    found = [random_box(size, Box(5, 9, 145, 129), draw) for _ in range(400)]
    assert {(box.width, box.height) for box in found} == {(140, 120)}
    assert all(b.left >= 0 and b.right <= 900 and b.top >= 0 and b.bottom <= 600 for b in found)
    centres = np.array([[b.left + b.right, b.top + b.bottom] for b in found]) / 2
    assert np.abs(centres.mean(0) - [450, 300]).max() < 40


def test_a_known_box_shows_its_part_behind_the_picture() -> None:
    from qr_integrations.evaluation.known_crops import KnownBox
    from qr_integrations.types import Box, Message

    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    said = (Message.system("Be brief."), Message.user(picture, "What?"))
    cropped = KnownBox(Box(10, 5, 40, 30)).crop(None, said)
    assert cropped.messages[0] == said[0]
    first, second, text = cropped.messages[1].content
    assert first is picture and text == "What?"
    assert np.array_equal(np.asarray(second), np.asarray(picture)[5:30, 10:40])
    assert KnownBox(None).crop(None, said).messages == said


def test_systems_are_named_once_and_exist() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.pictures import make_picture_systems

    with pytest.raises(InputError, match="stands twice"):
        make_picture_systems(["none", "none"])
    with pytest.raises(InputError, match="'sideways' is no system: write none, relative"):
        make_picture_systems(["sideways"])
    with pytest.raises(InputError, match="random has no setting 'layers': there are none"):
        make_picture_systems(["random:layers=2"])
    with pytest.raises(InputError, match="layers cannot be 'two'"):
        make_picture_systems(["relative:layers=two"])


def test_settings_reach_the_second_look(unchecked: None) -> None:
    from qr_integrations.cropping import ViCrop
    from qr_integrations.evaluation.pictures import make_picture_systems

    specs = ["relative:layers=4-6,min_lift=1.5", "gradient:layers=all", "input_gradient:base=64", "none"]
    made: list[Any] = [one.steps(None, question(), (8, 8))["crop"] for one in make_picture_systems(specs)]
    assert made == [
        ViCrop("relative", layers=(4, 5, 6), min_lift=1.5),
        ViCrop("gradient", layers="all"),
        ViCrop("input_gradient", base=64),
        None,
    ]


# ---- files


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """A picture of 60 x 40 pixels whose file says that it lies on its side."""
    image = Image.new("RGB", (60, 40), "red")
    image.putpixel((0, 39), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return "photo.png"


def read(path: Path) -> list[Any]:
    from qr_integrations.evaluation.picture_questions import read_picture_questions

    return list(read_picture_questions(path))


def test_questions_of_a_file_and_their_pictures(tmp_path: Path, photo: str) -> None:
    from qr_integrations.evaluation.picture_questions import look
    from qr_integrations.types import Box

    box = [0, 30, 10, 60]  # fits the upright picture of 40 x 60 only
    first, second = read(
        write(
            tmp_path,
            {"image": photo, "question": "What?", "answer": "red", "box": box, "skill": "color", "id": 7},
            {"image": photo, "question": "And?", "answers": ["a", "b"]},
        )
    )
    assert (first.answers, first.skill, first.box, first.share, first.id) == (("red",), "color", Box(*box), 0.5, "7")
    assert (second.answers, second.box, second.share, second.id) == (("a", "b"), None, None, "2")
    assert first.group == second.group != ""
    picture = look(first.image)
    assert picture.size == (40, 60)
    assert picture.getpixel((0, 0)) == (0, 0, 255)  # what was at the bottom left is at the top left


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1: not JSON"),
        ({"question": "What?", "answer": "x"}, "no `image`"),
        ({"image": "gone.png", "question": "What?", "answer": "x"}, "there is no picture"),
        ({"image": "photo.png", "answer": "x"}, "no `question`"),
        ({"image": "photo.png", "question": "What?"}, "no answers"),
        ({"image": "photo.png", "question": "What?", "answers": []}, "no answers"),
        ({"image": "photo.png", "question": "What?", "answers": [1]}, "no answers"),
        ({"image": "photo.png", "question": "What?", "answer": "x", "box": [1, 2, 3]}, "four whole numbers"),
        ({"image": "photo.png", "question": "What?", "answer": "x", "box": [5, 5, 5, 9]}, "left < right"),
        ({"image": "photo.png", "question": "What?", "answer": "x", "box": [0, 0, 60, 40]}, "beyond the picture"),
        ({"image": "questions.jsonl", "question": "What?", "answer": "x", "box": [0, 0, 1, 1]}, "holds no picture"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, photo: str, line: Any, told: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"questions\.jsonl, line 1") as caught:
        read(write(tmp_path, line))
    assert told in str(caught.value)


# ---- figures


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    """40 scenes, each asked for a colour at two sizes and for a count."""
    return [
        question(3 * scene + place, skill=skill, share=share, group=f"scene {scene}")
        for scene in range(40)
        for place, (skill, share) in enumerate([("color", 0.4), ("color", 0.05), ("count", None)])
    ]


def runs_of(system: str, asked: Sequence[Any], right: Any) -> list[Any]:
    from qr_integrations.evaluation.pictures import PictureRun
    from qr_integrations.types import Box

    box = Box(0, 0, 4, 4) if system != "none" else None
    return [PictureRun(system, i, "red", bool(right(i, one)), box, 0.1 + i / 1000) for i, one in enumerate(asked)]


@pytest.fixture(scope="module")
def runs(asked: list[Any]) -> list[Any]:
    """Plain answers see large things; one system sees small ones too, in three of four scenes; one guesses."""
    return [
        *runs_of("none", asked, lambda i, one: one.share == 0.4),
        *runs_of("relative", asked, lambda i, one: one.share == 0.4 or (one.share == 0.05 and i // 3 % 4)),
        *runs_of("random", asked, lambda i, one: one.share == 0.4 and i // 3 % 2),
    ]


def test_accuracy_by_size_and_skill_and_the_differences(asked: list[Any], runs: list[Any]) -> None:
    from qr_integrations.evaluation.pictures import summarise_pictures

    found = {system.name: system for system in summarise_pictures(runs, asked)}
    told = {name: {k: {n: e.mean for n, e in v.items()} for k, v in s.accuracy.items()} for name, s in found.items()}
    assert told["none"]["size"] == {"0.40": 1.0, "0.05": 0.0}
    assert told["relative"]["size"] == {"0.40": 1.0, "0.05": 0.75}
    assert told["none"]["skill"] == {"color": 0.5, "count": 0.0}
    assert told["random"]["all"]["all"] == pytest.approx(1 / 6)
    gain = found["relative"].against["none"]
    assert gain["size"]["0.05"].mean == 0.75 and gain["size"]["0.05"].p < 0.001
    assert gain["size"]["0.40"].mean == 0.0 and gain["size"]["0.40"].p == 1.0
    assert gain["all"]["all"].mean == pytest.approx(0.25)
    assert found["random"].against["none"]["size"]["0.40"].mean == -0.5
    assert set(found["none"].against) == {"random"} and set(found["random"].against) == {"none"}
    assert found["none"].looked_again == 0 and found["relative"].looked_again == 1
    assert found["none"].seconds == pytest.approx(0.1595)


def test_crops_that_hold_the_middle_of_what_is_asked_about_are_counted() -> None:
    from qr_integrations.evaluation.pictures import PictureRun, summarise_pictures
    from qr_integrations.types import Box

    asked = [question(i, box=box) for i, box in enumerate([Box(10, 10, 20, 20)] * 4 + [None])]
    crops = [Box(0, 0, 16, 16), Box(0, 0, 15, 40), None, Box(14, 14, 90, 90), Box(0, 0, 9, 9)]
    (system,) = summarise_pictures(
        [PictureRun("relative", i, "", True, box, 0.1) for i, box in enumerate(crops)], asked
    )
    assert system.found == pytest.approx(2 / 3) and system.looked_again == 0.8


def test_sizes_of_users_pictures_go_to_the_nearest_by_ratio() -> None:
    from qr_integrations.evaluation.pictures import size_name, slice_questions

    assert [size_name(share) for share in (1.0, 0.14, 0.15, 0.001)] == ["0.60", "0.10", "0.20", "0.03"]
    sliced = slice_questions([question(share=None), question(share=0.5), question(share=0.02)])
    assert sliced == {"all": {"all": [0, 1, 2]}, "size": {"0.60": [1], "0.03": [2]}}
    assert set(slice_questions([question()])) == {"all"}


@pytest.fixture
def report(asked: list[Any], runs: list[Any]) -> Any:
    from qr_integrations.evaluation.picture_report import PictureReport
    from qr_integrations.evaluation.pictures import count_questions, summarise_pictures

    return PictureReport({"data": "made up"}, "none", summarise_pictures(runs, asked), count_questions(asked))


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of lines that begin with a cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return [line for line in lines if line[0] == first]


def test_the_page_holds_what_was_measured(report: Any) -> None:
    from qr_integrations.evaluation.picture_report import picture_page

    page = picture_page(report)
    by_size, by_skill, time = rows(page, "relative")
    assert [cell.split()[0] for cell in by_size[1:]] == ["1.000", "0.750", "0.583"]
    assert [cell.split()[0] for cell in by_skill[1:]] == ["0.875", "0.000", "0.583"]
    assert time[1:4] == ["100%", "", ""]
    assert rows(page, "questions / scenes")[0][1:] == ["40 / 40", "40 / 40", "120 / 40"]
    against_none, against_random = rows(page, "size 0.05")
    assert [cell.split()[0] for cell in against_none[1:]] == ["+0.750", "+0.000"]
    assert [cell.split()[0] for cell in against_random[1:]] == ["+0.000", "+0.750"]
    assert "- data: made up" in page


def test_a_report_replaces_an_earlier_one_and_nothing_else(
    report: Any, asked: list[Any], runs: list[Any], tmp_path: Path
) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.picture_report import save_picture_report

    folder = tmp_path / "report"
    for _ in range(2):
        save_picture_report(report, runs, asked, folder)
    assert {path.name for path in folder.iterdir()} == {"report.md", "results.json", "per_query.jsonl", "quality.png"}
    lines = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
    assert len(lines) == len(runs)
    assert lines[121] == {
        "id": "q1",
        "query": "What?",
        "answers": ["red"],
        "skill": "color",
        "share": 0.05,
        "system": "relative",
        "said": "red",
        "right": False,
        "box": [0, 0, 4, 4],
        "seconds": 0.101,
        "first_token": 0.0,
        "visual_tokens": None,
    }
    results = json.loads((folder / "results.json").read_text())
    assert results["systems"][1]["accuracy"]["size"]["0.05"]["mean"] == 0.75
    with Image.open(folder / "quality.png") as plot:
        assert plot.size[0] > 300
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="no earlier report"):
        save_picture_report(report, runs, asked, folder)
    assert (folder / "mine.txt").read_text() == "keep"


def test_questions_without_sizes_make_a_report_too(tmp_path: Path) -> None:
    from qr_integrations.evaluation.picture_report import PictureReport, save_picture_report
    from qr_integrations.evaluation.pictures import count_questions, summarise_pictures

    asked = [question(number) for number in range(5)]
    runs = [run for name in ("none", "random") for run in runs_of(name, asked, lambda i, one: i % 2)]
    report = PictureReport({}, "none", summarise_pictures(runs, asked), count_questions(asked))
    save_picture_report(report, runs, asked, tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert rows(page, "none")[0][1].startswith("0.400")


def test_a_figure_that_no_system_has_leaves_its_panel_empty(tmp_path: Path) -> None:
    from qr_integrations.evaluation.picture_plots import plot_estimates
    from qr_integrations.evaluation.statistics import Estimate

    plot_estimates({"recall": {"greedy": Estimate(0.5, 0.25, 0.625)}, "F1": {}}, tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as plot:
        assert plot.size[0] > 300


# ---- the drawn world


def test_the_drawn_world_asks_what_is_at_its_box_at_every_size() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.drawn_world.held_out import SHARES
    from qr_integrations.evaluation.drawn_world.world import COLOURS
    from qr_integrations.evaluation.picture_questions import look

    questions = drawn_questions(6)
    assert len({one.id for one in questions}) == len(questions)
    by_share = {share: [one for one in questions if one.share == share or one.share is None] for share in SHARES}
    texts = [[(one.group, one.question, one.answers) for one in some if one.box] for some in by_share.values()]
    assert texts.count(texts[0]) == len(SHARES) and len(texts[0]) > 12
    assert {one.skill for one in questions} >= {"color", "shape", "side", "presence", "count"}
    checked = 0
    for one in questions:
        if one.skill == "color" and one.box.width >= 20:
            pixels = np.asarray(look(one.image))[one.box.top : one.box.bottom, one.box.left : one.box.right]
            near = np.abs(pixels.astype(int) - COLOURS[one.answers[0]]).max(-1) < 30
            assert near.mean() > 0.15, one
            checked += 1
    assert checked >= 4


def test_what_has_no_place_has_no_size() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions

    for one in drawn_questions(4):
        assert (one.box is None) == (one.share is None)
        assert one.share is not None or one.skill == "count" or one.answers == ("no",)


def test_scenes_may_begin_anywhere() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions

    later = drawn_questions(1, (0.5,), first=2)
    assert {one.group for one in later} == {"scene 2"}
    assert [one.question for one in drawn_questions(3, (0.5,)) if one.group == "scene 2"] == [
        one.question for one in later
    ]


@pytest.mark.parametrize(
    "bad", [{"scenes": 0}, {"scenes": 1, "shares": ()}, {"scenes": 1, "shares": (0.5, 0.0)}, {"first": -1}]
)
def test_there_are_scenes_and_sizes(bad: dict[str, Any]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.drawn_world.data import drawn_questions

    with pytest.raises(InputError, match="pass"):
        drawn_questions(**bad)
