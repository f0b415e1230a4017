"""What all chat adapters share: settings, steps, conversations and metadata, without a framework around it."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

QUESTION = "what color is the box ?"
DESCRIBE = "describe the image ."  # the answer has several words


@pytest.fixture
def picture() -> Image.Image:
    """A red square, far from the middle."""
    drawn = Image.new("RGB", (640, 480), "white")
    drawn.paste((200, 0, 0), (500, 340, 580, 420))
    return drawn


@pytest.fixture
def chat(qr_mini_vl: Any) -> Callable[..., Any]:
    """Chats of the loaded model, with short answers."""
    from qr_integrations.chatting import ChatSettings

    return lambda **given: ChatSettings(**{"backend": qr_mini_vl, "max_new_tokens": 5, **given})


def asked(*content: str | Image.Image) -> list[Any]:
    from qr_integrations.types import Message

    return [Message.user(*content)]


# ---- settings


def test_settings_have_the_names_that_the_frameworks_know() -> None:
    from qr_integrations.chatting import ChatSettings

    ours = ChatSettings(model="some/model", max_new_tokens=7, stop=["a", "b"])
    theirs = ChatSettings(model_name="some/model", max_tokens=7, stop_sequences=("a", "b"))
    assert ours == theirs
    assert (theirs.model_name, theirs.max_tokens, theirs.stop_sequences) == ("some/model", 7, ("a", "b"))
    assert ChatSettings(model="m", stop="end").stop == ("end",)


def test_none_is_what_stands_there_by_default() -> None:
    from qr_integrations.chatting import ChatSettings

    names = ("max_tokens", "temperature", "repetition_penalty", "num_beams", "stop", "top_p", "top_k", "crop", "deco")
    unset = ChatSettings(model="m", **dict.fromkeys(names))
    assert unset == ChatSettings(model="m")
    unset.temperature = 0.5
    assert unset.temperature == 0.5 and unset.top_p is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "no model: pass model="),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"num_beams": 0}, "num_beams"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_picture_bytes": 0}, "max_picture_bytes"),
        ({"crop": "gradient"}, r"crop='gradient' is no ViCrop: pass True, False, ViCrop\(\.\.\.\) or a mapping"),
        ({"crop": {"methods": "gradient"}}, "ViCrop has no setting 'methods': pass method, layers"),
        ({"crop": {"min_lift": -1.0}}, r"min_lift=-1\.0"),
        ({"deco": {"alpha": -1.0}}, r"alpha=-1\.0"),
        ({"deco": 0.6}, "deco=0.6 is no DeCo"),
        ({"prune": True}, r"prune=True does not say how many tokens stay: pass prune=64"),
        ({"prune": {"pruner": "Nothing"}}, "there is no pruner 'Nothing': pass CDPruner, SparseVLM"),
        ({"prune": {"pruner": "CDPruner", "kept": 1}}, "CDPruner has no setting 'kept': pass keep"),
        ({"prune": 1.5}, "keep=1.5 cannot be"),
        ({"num_visual_tokens": {"budget": "TokenBudget", "totally": 1}}, "TokenBudget has no setting 'totally'"),
        (
            {"num_visual_tokens": "many"},
            r"num_visual_tokens='many' is no Confidence: pass a number, False, Conf.*Token",
        ),
        ({"num_visual_tokens": 0}, "num_visual_tokens=0 is no number of tokens"),
        ({"num_visual_tokens": 2.5}, r"num_visual_tokens=2\.5 is no number of tokens"),
        ({"num_visual_tokens": float("nan")}, "num_visual_tokens=nan is no number of tokens"),
        ({"prune": "64"}, r"prune='64' is no CDPruner: pass a number, False, CDPruner\(\.\.\.\), SparseVLM"),
        ({"prune": {"pruner": "CDPruner"}}, "lacks a value, .*'keep'.*: pass values as CDPruner has them"),
        ({"prune": {"pruner": ["CDPruner"], "keep": 1}}, r"there is no pruner \['CDPruner'\]"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_an_error_at_once(settings: dict[str, Any], message: str) -> None:
    from qr_integrations.chatting import ChatSettings

    with pytest.raises(ValueError, match=message):
        ChatSettings(**{"model": "m", **settings})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"crop": {"min_lift": "a"}}, "crop=.*'a'.* one of a wrong type.*: pass values as ViCrop has them"),
        ({"deco": {"alpha": "0.5"}}, "deco=.*'0.5'.* one of a wrong type.*: pass values as DeCo has them"),
        ({"deco": {"layers": 5}}, r"layers=5 cannot be: pass layers=\(5,\)"),
    ],
    ids=str,
)
def test_a_step_with_values_of_wrong_types_is_an_error_at_once(
    unchecked: None, steps: dict[str, Any], message: str
) -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.errors import InputError

    with pytest.raises(ValueError, match=message):
        ChatSettings(model="m", **steps)
    with pytest.raises(InputError, match=message):
        ChatSettings(model="m").strategy(steps)


def test_steps_come_as_switches_objects_and_mappings() -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.cropping.vicrop import ViCrop
    from qr_integrations.decoding import DeCo

    def steps(**given: Any) -> Any:
        return ChatSettings(model="m", **given).strategy().steps

    assert steps() == steps(crop=False, deco=None) == {}
    assert steps(crop=True, deco=True) == {"crop": ViCrop(), "deco": DeCo()}
    given = {"crop": ViCrop(layers=(1, 2)), "deco": DeCo(alpha=0.3, layers=(2, 3))}
    assert steps(**given) == given
    assert steps(crop={"layers": [1, 2]}, deco={"alpha": 0.3, "layers": [2, 3]}) == given


def test_fewer_tokens_come_as_numbers_objects_and_mappings() -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.encoding.matryoshka import Confidence, TokenBudget
    from qr_integrations.pruning import CDPruner, SparseVLM

    def steps(**given: Any) -> Any:
        return ChatSettings(model="m", **given).strategy().steps

    assert (
        steps(prune=64) == steps(prune={"keep": 64}) == steps(prune=CDPruner(keep=64)) == {"prune": CDPruner(keep=64)}
    )
    assert steps(prune={"pruner": "SparseVLM", "keep": 0.25}) == {"prune": SparseVLM(keep=0.25)}
    assert steps(num_visual_tokens=16, prune=False) == {"num_visual_tokens": 16}
    assert json.dumps(ChatSettings(model="m", num_visual_tokens=16.0).identity()["qr_params"]) == (
        '{"num_visual_tokens": 16}'
    )
    assert steps(num_visual_tokens={"budget": "TokenBudget", "total": 99}) == {"num_visual_tokens": TokenBudget(99)}
    assert steps(num_visual_tokens=True) == {"num_visual_tokens": Confidence()}
    everything = {"crop": True, "num_visual_tokens": 16, "prune": 64, "deco": True}
    assert ChatSettings(model="m", **everything).strategy().method == "vicrop+mqt+cdpruner+deco"
    given = {"num_visual_tokens": TokenBudget(99), "prune": SparseVLM(keep=64)}
    chat = ChatSettings(model="m", **given)
    again = ChatSettings(**json.loads(json.dumps(chat.model_dump(mode="json"))))
    assert again == chat and again.strategy().steps == given


def test_one_call_may_do_other_steps() -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.decoding import DeCo

    chat = ChatSettings(model="m", crop=True)
    assert chat.strategy().method == "vicrop" and ChatSettings(model="m").strategy().method == "plain"
    assert chat.strategy({"deco": {"alpha": 0.3}}).method == "vicrop+deco"
    only = chat.strategy({"crop": False, "deco": DeCo(alpha=0.3, layers=(2, 3)), "temperature": 1})
    assert (only.method, list(only.params)) == ("deco", ["deco"])
    assert only.params["deco"]["alpha"] == 0.3 and only.params["deco"]["layers"] == [2, 3]


def test_settings_go_through_json() -> None:
    from qr_integrations.chatting import ChatSettings

    chat = ChatSettings(
        model="m", crop={"method": "gradient", "layers": [3]}, deco=True, stop=["a"], temperature=0.5, seed=3
    )
    again = ChatSettings(**json.loads(json.dumps(chat.model_dump(mode="json"))))
    assert again == chat and again.identity() == chat.identity()


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"revision": "v2"},
        {"dtype": "bfloat16"},
        {"crop": True},
        {"deco": {"alpha": 0.3}},
        {"deco": {"layers": [2]}},
        {"deco": False},
        {"prune": 64},
        {"prune": {"pruner": "SparseVLM", "keep": 64}},
        {"num_visual_tokens": 16},
        {"max_tokens": 3},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"num_beams": 2},
        {"repetition_penalty": 1.2},
        {"stop": ["a"]},
        {"seed": 1},
        {"system_prompt": "be brief"},
    ],
    ids=str,
)
def test_what_changes_answers_changes_the_identity(other: dict[str, Any]) -> None:
    from qr_integrations.chatting import ChatSettings

    given = {"model": "m", "deco": True}
    before, after = (json.dumps(ChatSettings(**one).identity()) for one in (given, {**given, **other}))
    assert before != after


def test_the_same_settings_said_otherwise_have_the_same_identity(qr_mini_vl: Any) -> None:
    from qr_integrations import Backend
    from qr_integrations.chatting import ChatSettings

    identity = ChatSettings(model=qr_mini_vl.name, deco=True).identity()
    assert ChatSettings(backend=qr_mini_vl, deco={"alpha": 0.6}, allow_urls=True).identity() == identity
    own = [Backend(qr_mini_vl.model, qr_mini_vl.tokenizer, name="mine") for _ in range(2)]
    assert ChatSettings(backend=own[0]).identity() != ChatSettings(backend=own[1]).identity()


# ---- what one call changes


def test_settings_of_a_call_take_the_place_of_those_of_the_chat() -> None:
    from qr_integrations.chatting import ChatSettings

    chat = ChatSettings(model="m", temperature=0.5, stop=["a", "b"], seed=1, top_k=5)
    call = {"max_tokens": 9, "temperature": None, "stop_sequences": ["c", "a"], "seed": None, "crop": True}
    found = chat.generation(call)
    assert (found["max_new_tokens"], found["temperature"], found["seed"], found["top_k"]) == (9, 0.5, None, 5)
    assert found["stop"] == ("a", "b", "c")  # what ends every answer still does
    assert chat.generation() == {**found, "max_new_tokens": 256, "stop": ("a", "b"), "seed": 1}
    with pytest.raises(ValueError, match=r"no setting 'max_token': leave it out, or pass one of max_new_tokens"):
        chat.generation({"max_token": 9})


# ---- conversations


def test_turns_of_one_speaker_become_one_and_keep_their_order(picture: Image.Image) -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.types import Message

    said = [
        Message.system("one"),
        Message.system("two"),
        Message.user("a", ""),
        Message.user(),
        Message.user(picture, "b", "c"),
        Message.assistant("d"),
        Message.assistant("e"),
        Message.user("f"),
    ]
    turns = ChatSettings(model="m").conversation(said)
    assert [(turn.role, turn.content) for turn in turns] == [
        ("system", ("one\ntwo",)),
        ("user", ("a", picture, "b\nc")),
        ("assistant", ("d\ne",)),
        ("user", ("f",)),
    ]


def test_the_system_prompt_stands_in_front_unless_there_is_one() -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.types import Message

    chat = ChatSettings(model="m", system_prompt="be brief")
    assert chat.conversation(asked("a"))[0] == Message.system("be brief")
    assert chat.conversation([Message.system("be long"), *asked("a")])[0] == Message.system("be long")


@pytest.mark.parametrize("content", [(), ("",)], ids=["no content", "an empty text"])
def test_nothing_said_is_an_error(content: tuple[str, ...]) -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="nothing was said: pass at least one message"):
        ChatSettings(model="m", system_prompt="be brief").conversation(asked(*content))


# ---- answers


STEPS = [{}, {"crop": True}, {"deco": {"alpha": 0.3}}, {"crop": True, "deco": True}, {"prune": 0.5}]
STEPS += [{"crop": True, "prune": {"pruner": "SparseVLM", "keep": 0.3}, "deco": True}]


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_answers_are_those_of_the_backend(qr_mini_vl: Any, chat: Any, picture: Image.Image, steps: Any) -> None:
    answer = chat(**steps).give_answer(asked(QUESTION, picture))
    expected = qr_mini_vl.answer(asked(QUESTION, picture), max_new_tokens=5, **chat(**steps).strategy().steps)
    assert (answer.text, answer.usage, answer.finish_reason) == (expected.text, expected.usage, expected.finish_reason)
    assert list(answer.steps) == list(steps)


def test_what_is_told_about_an_answer_is_json(chat: Any, picture: Image.Image) -> None:
    both = chat(crop={"min_lift": 0.0}, deco=True)
    answer = both.give_answer(asked(QUESTION, picture, picture))
    told = json.loads(json.dumps(both.answer_metadata(answer)))
    assert set(told) == {"model_name", "finish_reason", "qr_method", "qr_params", "qr_steps", "qr_seconds"}
    assert (told["model_name"], told["finish_reason"]) == (both.model_name, answer.finish_reason)
    assert told["qr_method"] == "vicrop+deco" and told["qr_params"] == both.strategy().params
    (look, again), record = answer.steps["crop"], answer.steps["deco"]
    assert told["qr_steps"]["crop"][0] == {
        "box": list(look.box.as_tuple()),
        "sharpness": pytest.approx(look.sharpness),
        "lift": pytest.approx(look.lift),
        "reason": "",
    }
    assert told["qr_steps"]["crop"][1]["box"] == list(again.box.as_tuple())
    assert told["qr_steps"]["deco"]["num_steps"] == sum(told["qr_steps"]["deco"]["anchors"].values()) == len(record)
    assert told["qr_steps"]["deco"]["share_changed"] == record.share_changed
    assert told["qr_seconds"] == answer.seconds and "crop" in told["qr_seconds"]


def test_what_was_dropped_is_told_as_json(chat: Any, picture: Image.Image) -> None:
    pruned = chat(prune=0.25)
    answer = pruned.give_answer(asked(picture, QUESTION))
    told = pruned.answer_metadata(answer)
    assert json.loads(json.dumps(told)) == told and told["qr_method"] == "cdpruner"
    assert told["qr_params"]["prune"]["pruner"] == "CDPruner" and told["qr_params"]["prune"]["keep"] == 0.25
    (stage,) = told["qr_steps"]["prune"]["stages"]
    assert (stage["kept"], stage["of"]) == (25, 100)
    whole = chat().give_answer(asked(picture, QUESTION))
    assert whole.usage.prompt_tokens - answer.usage.prompt_tokens == 75


def test_a_crop_that_was_not_worth_it_says_why(chat: Any, picture: Image.Image) -> None:
    strict = chat(crop={"min_lift": 1e6})
    (look,) = strict.answer_metadata(strict.give_answer(asked(QUESTION, picture)))["qr_steps"]["crop"]
    assert look["box"] is None and "stands out" in look["reason"]


def test_one_call_without_the_crop_reads_one_picture_less(chat: Any, picture: Image.Image) -> None:
    cropping, call = chat(crop=True), {"crop": False, "max_tokens": 2}
    whole = cropping.give_answer(asked(picture, DESCRIBE))
    without = cropping.give_answer(asked(picture, DESCRIBE), call)
    assert whole.usage.prompt_tokens - without.usage.prompt_tokens == 100  # what the model reads of a picture
    assert (without.usage.completion_tokens, without.finish_reason) == (2, "length")
    assert cropping.answer_metadata(without, call)["qr_method"] == "plain"


def test_pieces_make_up_the_answer(chat: Any, picture: Image.Image) -> None:
    whole = chat(crop=True).give_answer(asked(picture, DESCRIBE))
    pieces = list(chat(crop=True).stream_answer(asked(picture, DESCRIBE)))
    assert "".join(piece.delta for piece in pieces) == whole.text
    assert [piece.answer is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].answer.usage == whole.usage
    assert len(pieces) > 2


def test_many_threads_answer_as_one(chat: Any, picture: Image.Image) -> None:
    one, questions = chat(crop=True, deco=True), [QUESTION, "what shape is red", "how many squares", "what letter"]
    alone = [one.give_answer(asked(picture, question)).text for question in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: one.give_answer(asked(picture, question)).text, questions))
    assert together == alone


# ---- tokens


def test_tokens_are_counted_as_they_are_read(chat: Any, picture: Image.Image) -> None:
    from qr_integrations.types import Message

    said = [Message.system("one"), *asked(picture, QUESTION), Message.assistant("red"), *asked("what shape", picture)]
    assert chat().num_tokens(said) == chat().give_answer(said).usage.prompt_tokens > 200
    assert chat().num_tokens([]) == chat().num_tokens(asked()) == 0
    assert len(chat().text_token_ids("red square")) == 2


def test_fewer_tokens_of_pictures_are_counted_as_such(picture: Image.Image) -> None:
    from qr_integrations.chatting import ChatSettings

    few = ChatSettings(model="qr-mini-vl-mqt", num_visual_tokens=4, max_new_tokens=1)
    said = asked(picture, QUESTION)
    assert few.num_tokens(said) == few.give_answer(said).usage.prompt_tokens
    assert few.model_copy(update={"num_visual_tokens": False}).num_tokens(said) == few.num_tokens(said) + 60


def test_what_is_too_long_is_counted_too(chat: Any, picture: Image.Image) -> None:
    from qr_integrations.errors import WindowError

    long = asked(*[picture] * 12, QUESTION)
    with pytest.raises(WindowError):
        chat().give_answer(long)
    assert 12 * 100 < chat().num_tokens(long) < 12 * 100 + 30


# ---- pictures


def test_pictures_come_in_as_far_as_they_are_allowed(picture: Image.Image, tmp_path: Path) -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.errors import InputError

    picture.save(tmp_path / "a.png")
    closed = ChatSettings(model="m")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        with pytest.raises(InputError, match=r"^here: .*allow_local_files is off"):
            closed.picture(source, "here")
        assert ChatSettings(model="m", allow_local_files=True).picture(source, "here").size == (640, 480)
    with pytest.raises(InputError, match=r"^here: .*allow_urls is off"):
        closed.picture("https://example.com/a.png", "here")
    with pytest.raises(InputError, match="resize it or raise max_pixels"):
        ChatSettings(model="m", max_picture_pixels=100).picture(picture, "here")
    policy = ChatSettings(model="m", allow_urls=True, max_picture_bytes=9, picture_timeout=2.5).picture_policy
    assert (policy.allow_urls, policy.max_bytes, policy.timeout) == (True, 9, 2.5)


# ---- the model


def test_importing_and_making_a_chat_loads_no_model_library(in_fresh_python: Any) -> None:
    code = """
import sys
from qr_integrations.chatting import ChatSettings
chat = ChatSettings(model="no/such-model", crop=True, deco=True, max_tokens=3)
print(chat, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    assert in_fresh_python(code) == "model='no/such-model' crop=True deco=True max_new_tokens=3 []"


def test_a_model_that_is_not_there_is_an_error_on_use() -> None:
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.errors import LoadError

    with pytest.raises(LoadError, match=r"no/such-model"):
        ChatSettings(model="no/such-model", local_files_only=True).give_answer(asked("a"))


def test_chats_share_the_weights_that_are_loaded(qr_mini_vl: Any, chat: Any) -> None:
    from qr_integrations.chatting import ChatSettings

    named = ChatSettings(model=qr_mini_vl.name)
    assert named.open() is chat().open() is named.model_copy(update={"temperature": 1.0}).open() is qr_mini_vl
    assert named.model_copy(update={"model": "qr-mini"}).open().name == "qr-mini"


def test_a_closed_model_is_loaded_again_if_it_has_a_name(qr_mini_vl: Any) -> None:
    from qr_integrations import Backend
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.errors import ClosedError

    own = {"model": qr_mini_vl.name, "local_files_only": True, "max_tokens": 3}  # weights of its own
    named = ChatSettings(**own)
    named.close()  # nothing was loaded
    before = named.give_answer(asked(QUESTION)).text
    given = ChatSettings(backend=named.open())
    assert given.give_answer(asked(QUESTION), {"max_tokens": 3}).text == before
    named.close()
    with pytest.raises(ClosedError):
        given.give_answer(asked(QUESTION))
    assert named.give_answer(asked(QUESTION)).text == before
    assert not qr_mini_vl.closed
    Backend.load(qr_mini_vl.name, local_files_only=True).close()


def test_pickles_are_small_and_answer_alike(qr_mini_vl: Any, chat: Any) -> None:
    used = chat(deco={"alpha": 0.3})
    text = used.give_answer(asked(QUESTION)).text
    packed = pickle.dumps(used)
    assert len(packed) < 5000
    again = pickle.loads(packed)
    assert again.identity() == used.identity() and again.give_answer(asked(QUESTION)).text == text


def test_a_model_made_by_hand_is_not_pickled(qr_mini_vl: Any) -> None:
    from qr_integrations import Backend
    from qr_integrations.chatting import ChatSettings
    from qr_integrations.errors import InputError

    own = ChatSettings(backend=Backend(qr_mini_vl.model, qr_mini_vl.tokenizer, name="mine"))
    with pytest.raises(InputError, match=r"'mine' stands around a model object.*Backend\.load"):
        pickle.dumps(own)


def test_a_backend_loaded_otherwise_or_of_another_kind_is_an_error(qr_mini_vl: Any) -> None:
    from qr_integrations.chatting import ChatSettings

    for given, message in (
        ({"model": "other"}, r"model='other' and a backend of .*: pass one of the two"),
        ({"dtype": "bfloat16"}, "loaded already: leave out dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            ChatSettings(backend=qr_mini_vl, **given)
    with pytest.raises(ValueError, match=r"the backend is a str: pass what Backend\.load"):
        ChatSettings(backend="qr-mini-vl")
