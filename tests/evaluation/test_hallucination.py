"""What is said to be in pictures: names found in captions, CHAIR and POPE counted by hand, questions, the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def names(**synonyms: tuple[str, ...]) -> Any:
    from qr_integrations.evaluation.object_names import ObjectNames

    return ObjectNames({name.replace("_", " "): others for name, others in synonyms.items()})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A dog and a Puppy.", ["dog", "dog"]),
        ("two dogs, three puppies and buses", ["dog", "dog", "bus"]),
        ("a hot dog near a dog", ["hot dog", "dog"]),
        ("the dogma of a doghouse", []),
        ("hot dogs; traffic\nlights", ["hot dog", "traffic light"]),
        ("hot. dog", ["hot dog"]),  # punctuation is not looked at
        ("", []),
    ],
)
def test_objects_are_found_by_all_their_names(text: str, named: list[str]) -> None:
    known = names(dog=("puppy",), hot_dog=(), bus=(), traffic_light=("lights",))
    assert known.named(text) == named


def test_a_name_of_its_own_goes_before_anothers_synonym_or_plural() -> None:
    assert names(glass=("cup",), cup=(), glasses=("spectacles",)).named("glasses and a cup") == ["glasses", "cup"]


def test_names_must_be_words() -> None:
    from qr_integrations.errors import InputError

    for bad in ({}, {"": ()}, {"dog": ("?",)}):
        with pytest.raises(InputError, match="name each with a word"):
            names(**bad)


def picture(*objects: str, name: str = "") -> Any:
    from qr_integrations.evaluation.object_names import LabelledPicture

    return LabelledPicture(Image.new("RGB", (8, 8)), frozenset(objects), name)


# ---- CHAIR


def captions(decoder: str, *texts: str) -> list[Any]:
    from qr_integrations.evaluation.hallucination import Caption

    known = names(dog=("puppy",), cat=(), ball=(), car=())
    return [Caption(decoder, i, text, tuple(known.named(text)), 0.5) for i, text in enumerate(texts)]


@pytest.fixture
def pictures() -> list[Any]:
    return [picture("dog", "ball", name="one"), picture("cat", name="two"), picture("car", "cat", name="three")]


SAID = ("A dog, a puppy and two cats.", "nothing at all", "a car")


def test_chair_counts_mentions_and_captions(pictures: list[Any]) -> None:
    from qr_integrations.evaluation.hallucination import caption_counts

    counts = caption_counts(captions("greedy", *SAID), pictures)
    told = {name: (parts.tolist(), wholes.tolist()) for name, (parts, wholes) in counts.items()}
    assert told == {
        "CHAIR instance": ([1, 0, 0], [3, 0, 1]),  # dog, puppy, cat; car
        "CHAIR sentence": ([1, 0, 0], [1, 1, 1]),
        "recall": ([1, 0, 1], [2, 1, 2]),
        "words": ([7, 3, 2], [1, 1, 1]),
    }


def test_repeated_inventions_count_each_time_in_instances_and_once_in_sentences() -> None:
    from qr_integrations.evaluation.hallucination import caption_counts

    counts = caption_counts(captions("greedy", "a cat, a cat, a cat, a dog"), [picture("dog")])
    assert [int(part[0]) for part in counts["CHAIR instance"]] == [3, 4]
    assert [int(part[0]) for part in counts["CHAIR sentence"]] == [1, 1]


# ---- POPE


def answers(decoder: str, strategy: str, given: Callable[[Any], bool | None], questions: list[Any]) -> list[Any]:
    from qr_integrations.evaluation.hallucination import ObjectAnswer

    words = {True: "Yes", False: "No", None: "Perhaps"}
    told = [(one, given(one)) for one in questions if one.strategy == strategy]
    return [ObjectAnswer(decoder, one, words[yes], yes) for one, yes in told]


def test_answers_are_counted_as_by_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

    from qr_integrations.evaluation.hallucination import ObjectAnswer, ObjectQuestion, answer_counts
    from qr_integrations.evaluation.ratios import ratio

    there = [True, True, False, False, True, False, True, False, False]
    said = [True, False, True, False, True, False, True, True, False]
    given = [
        ObjectAnswer("greedy", ObjectQuestion(i // 3, "dog", one, "random"), "", yes)
        for i, (one, yes) in enumerate(zip(there, said, strict=True))
    ]
    found = {name: ratio(*counts).mean for name, counts in answer_counts(given).items()}
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(there, said),
            "precision": precision_score(there, said),
            "recall": recall_score(there, said),
            "F1": f1_score(there, said),
            "yes": 5 / 9,
        }
    )


def test_an_answer_that_says_nothing_is_wrong_and_no_yes() -> None:
    from qr_integrations.evaluation.hallucination import ObjectAnswer, ObjectQuestion, answer_counts

    given = [ObjectAnswer("greedy", ObjectQuestion(0, "dog", one, "random"), "", None) for one in (True, False)]
    totals = {name: (parts.sum(), wholes.sum()) for name, (parts, wholes) in answer_counts(given).items()}
    assert totals == {"accuracy": (0, 2), "precision": (0, 0), "recall": (0, 1), "F1": (0, 1), "yes": (0, 2)}


@pytest.fixture
def street() -> list[Any]:
    """Cars are everywhere; a boat comes with water only."""
    return [
        *[picture("car", "man") for _ in range(8)],
        *[picture("water", "boat", "car") for _ in range(3)],
        picture("water"),
        picture("man"),
    ]


def asked(pictures: list[Any], strategy: str, number: int, **more: Any) -> list[tuple[str, bool]]:
    from qr_integrations.evaluation.hallucination import ask_for_objects

    found = ask_for_objects(pictures, strategy, **more)
    assert {one.strategy for one in found} == {strategy}
    return [(one.name, one.there) for one in found if one.picture == number]


def test_negatives_are_frequent_or_companions(street: list[Any]) -> None:
    assert asked(street, "popular", 11, each=1) == [("water", True), ("car", False)]
    assert asked(street, "adversarial", 12, each=1) == [("man", True), ("car", False)]
    popular, adversarial = (asked(street, strategy, 11, each=3) for strategy in ("popular", "adversarial"))
    assert popular == [("water", True), ("car", False)]  # one object is there, so one is asked for that is not
    assert adversarial[1] in (("boat", False), ("car", False))
    assert {asked(street, "random", 11, each=1, seed=seed)[1][0] for seed in range(30)} == {"car", "man", "boat"}


def test_the_strongest_companion_is_asked_for_first() -> None:
    pictures = [picture("car"), *[picture("dog", "leash")] * 2, *[picture("car", "man")] * 5, picture("dog", "man")]
    assert asked(pictures, "adversarial", 8, each=1)[1] == ("car", False)
    assert set(asked(pictures, "popular", 1, each=2)[2:]) == {("man", False), ("car", False)}  # both in six
    lonely = [*pictures, picture("dog")]
    assert asked(lonely, "adversarial", 9)[1] == ("leash", False)
    assert asked(lonely, "popular", 9)[1][0] in ("car", "man")


def test_half_of_the_questions_are_true_and_all_answers_are(street: list[Any]) -> None:
    from qr_integrations.evaluation.hallucination import STRATEGIES, ask_for_objects

    positives = []
    for strategy in STRATEGIES:
        found = ask_for_objects(street, strategy, each=2)
        assert all(one.there == (one.name in street[one.picture].objects) for one in found)
        assert sum(one.there for one in found) * 2 == len(found) > 20
        assert len({(one.picture, one.name) for one in found}) == len(found)
        positives.append([(one.picture, one.name) for one in found if one.there])
    assert positives[0] == positives[1] == positives[2]


def test_questions_are_asked_in_words() -> None:
    from qr_integrations.evaluation.hallucination import ObjectQuestion

    assert ObjectQuestion(0, "apple", True, "random").text == "Is there an apple in the image?"
    assert ObjectQuestion(0, "hot dog", True, "random").text == "Is there a hot dog in the image?"


def test_what_cannot_be_asked_is_said(street: list[Any]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.hallucination import ask_for_objects, check_pictures

    with pytest.raises(InputError, match="unknown strategy 'rare': pass random, popular, adversarial"):
        ask_for_objects(street, "rare")
    for all_alike in ([], [picture()], [picture("dog"), picture("dog")]):
        with pytest.raises(InputError, match="pass pictures with different objects"):
            ask_for_objects(all_alike, "random")
    with pytest.raises(InputError, match="pass at least one"):
        check_pictures([], names(dog=()))
    with pytest.raises(InputError, match="'boat', in picture 'p', is no object of the names: add it"):
        check_pictures([picture("boat", "dog", name="p")], names(dog=()))


# ---- files


def test_pictures_and_names_of_files(tmp_path: Path) -> None:
    from qr_integrations.evaluation.object_names import ObjectNames, read_labelled_pictures, read_object_names

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    entries = [{"image": "a.png", "objects": ["dog", "dog", "hot dog"], "id": 4}, {"image": "a.png", "objects": []}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    first, second = read_labelled_pictures(tmp_path / "data.jsonl")
    assert (first.image, first.objects, first.id) == (tmp_path / "a.png", {"dog", "hot dog"}, "4")
    assert (second.objects, second.id) == (frozenset(), "2")
    assert ObjectNames.of([first, second]).named("hot dogs") == ["hot dog"]
    (tmp_path / "names.json").write_text(json.dumps({"dog": ["puppy"], "hot dog": []}, indent=2))
    assert read_object_names(tmp_path / "names.json").named("a puppy") == ["dog"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"image": "a.png"}', "no list of names under `objects`"),
        ('{"image": "a.png", "objects": "dog"}', "no list of names under `objects`"),
        ('{"image": "a.png", "objects": ["dog", "?"]}', "no list of names under `objects`"),
        ('{"image": "b.png", "objects": ["dog"]}', "there is no picture"),
        ("[]", "no JSON object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, told: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.object_names import read_labelled_pictures

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=r"data\.jsonl, line 2") as caught:
        list(read_labelled_pictures(tmp_path / "data.jsonl"))
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ['{"dog": "puppy"}', '{"dog": [1]}', "[]", "{"])
def test_bad_names_are_told(tmp_path: Path, text: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.object_names import read_object_names

    (tmp_path / "names.json").write_text(text)
    with pytest.raises(InputError, match=r"names\.json.*write"):
        read_object_names(tmp_path / "names.json")


# ---- decoders


def test_decoders_are_what_their_lines_say() -> None:
    from qr_integrations.decoding import DeCo, DoLa
    from qr_integrations.evaluation.decoders import make_decoders

    specs = ["greedy", "deco", "deco:alpha=0.3,layers=2-4,top_p=0.8,top_k=5", "dola", "dola:layers=high"]
    made = make_decoders(specs)
    assert [one.name for one in made] == specs
    assert [one.corrector for one in made] == [
        None,
        DeCo(),
        DeCo(0.3, (2, 3, 4), 0.8, 5),
        DoLa(),
        DoLa("high"),
    ]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("beams", "'beams' is no system: write greedy, deco, dola"),
        ("greedy:alpha=1", "greedy has no setting 'alpha': there are none"),
        ("deco:beta=1", "deco has no setting 'beta': known are alpha, layers, top_k, top_p"),
        ("deco:alpha=much", "alpha cannot be 'much'"),
        ("deco:alpha=1,alpha=2", "alpha stands twice"),
        ("deco:", "deco has no setting ''"),
        ("deco:alpha=-1", "alpha is at least 0"),
    ],
)
def test_lines_that_are_no_decoder(spec: str, told: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.decoders import make_decoders

    with pytest.raises(InputError) as caught:
        make_decoders([spec])
    assert told in str(caught.value)
    with pytest.raises(InputError, match="stands twice"):
        make_decoders(["greedy", "greedy"])


# ---- figures


@pytest.fixture
def measured(pictures: list[Any]) -> dict[str, Any]:
    """Two decoders on three pictures: one invents, the other says little; one always says yes, the other no."""
    from qr_integrations.evaluation.hallucination import ask_for_objects

    questions = [one for strategy in ("random", "popular") for one in ask_for_objects(pictures, strategy)]
    said = [*captions("greedy", *SAID), *captions("deco", "a dog", "a cat", "a car")]
    given = [
        one
        for strategy in ("random", "popular")
        for one in (
            *answers("greedy", strategy, lambda one: True, questions),
            *answers("deco", strategy, lambda one: None if one.name == "ball" else False, questions),
        )
    ]
    return {"captions": said, "answers": given, "pictures": pictures}


@pytest.fixture
def report(measured: dict[str, Any]) -> Any:
    from qr_integrations.evaluation.hallucination_report import HallucinationReport, summarise_decoders

    return HallucinationReport({"data": "made up"}, "greedy", summarise_decoders(**measured))


def test_figures_of_decoders(report: Any) -> None:
    greedy, deco = report.systems
    told = {name: one.mean for name, one in greedy.measured["captions"].items()}
    assert told == pytest.approx({"CHAIR instance": 1 / 4, "CHAIR sentence": 1 / 3, "recall": 2 / 5, "words": 4.0})
    assert deco.measured["captions"]["CHAIR instance"].mean == 0
    assert deco.against["captions"]["CHAIR instance"].mean == pytest.approx(-1 / 4)
    assert deco.against["captions"]["words"].mean == pytest.approx(-2.0)
    assert greedy.measured["random"]["F1"].mean == pytest.approx(2 / 3)
    assert greedy.measured["random"]["yes"].mean == 1 and greedy.against == {}
    assert "precision" not in deco.measured["popular"] and deco.measured["popular"]["recall"].mean == 0
    assert greedy.unclear == 0 < deco.unclear < 0.5
    assert deco.seconds == 0.5


def test_the_report_holds_what_was_measured(report: Any, measured: dict[str, Any], tmp_path: Path) -> None:
    from qr_integrations.evaluation.hallucination_report import save_hallucination_report

    for _ in range(2):  # the second replaces the first
        save_hallucination_report(report, **measured, folder=tmp_path / "report")
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"report.md", "results.json", "per_query.jsonl", "quality.png"}
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| greedy | 0.250 [" in page and "## Is it there? Objects that are not: popular" in page
    assert "| deco | -0.250 [" in page
    lines = [json.loads(line) for line in (tmp_path / "report" / "per_query.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "id": "one",
        "system": "greedy",
        "caption": SAID[0],
        "named": ["dog", "dog", "cat"],
        "invented": ["cat"],
        "there": ["ball", "dog"],
    }
    assert lines[6]["query"].startswith("Is there a") and lines[6]["strategy"] == "random" and lines[6]["yes"] is True
    assert len(lines) == 6 + len(measured["answers"])
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["systems"][0]["measured"]["captions"]["recall"]["mean"] == pytest.approx(0.4)


# ---- the drawn world


def test_drawn_pictures_lack_the_partner_of_their_largest_thing() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_names, drawn_pictures
    from qr_integrations.evaluation.drawn_world.held_out import caption_scene
    from qr_integrations.evaluation.drawn_world.world import PARTNERS
    from qr_integrations.evaluation.hallucination import check_pictures
    from qr_integrations.evaluation.picture_questions import look

    drawn = drawn_pictures(12)
    check_pictures(drawn, drawn_names())
    for number, one in enumerate(drawn):
        largest = caption_scene(number).things[0].kind
        assert largest in one.objects and PARTNERS.get(largest) not in one.objects
    assert look(drawn[0].image).size == caption_scene(0).frame[2:]


def test_drawn_names_find_singular_and_plural() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_names

    assert drawn_names().named("two boxes , a red ball and crosses") == ["box", "ball", "cross"]


def test_companions_in_the_drawn_world_are_the_partners() -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_pictures
    from qr_integrations.evaluation.drawn_world.held_out import caption_scene
    from qr_integrations.evaluation.drawn_world.world import PARTNERS
    from qr_integrations.evaluation.hallucination import ask_for_objects

    drawn = drawn_pictures(60)
    partners = [PARTNERS.get(caption_scene(number).things[0].kind) for number in range(60)]
    asked = {strategy: ask_for_objects(drawn, strategy, each=1) for strategy in ("random", "adversarial")}
    hits = {
        strategy: sum(not one.there and one.name == partners[one.picture] for one in found)
        for strategy, found in asked.items()
    }
    assert hits["adversarial"] > 2 * hits["random"] > 0
