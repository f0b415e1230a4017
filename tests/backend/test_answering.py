"""Answers: what `generate` says, cut where it must be, streamed as it is said, and nothing left behind."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch

from qr_integrations.backend import Backend, interruptible
from qr_integrations.cropping.vicrop import ViCrop
from qr_integrations.decoding import DeCo
from qr_integrations.errors import Cancelled, ClosedError, InputError, ScoreError, WindowError
from qr_integrations.types import Answer, Message
from tests.backend.seeing import (
    OTHER,
    QUESTION,
    backend,
    breaking,
    counted,
    fresh,
    generated,
    layers,
    pictures,
    seen,
    text,
)

SHARING = ["llava", "pixtral", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"]
SHARING += ["idefics3", "smolvlm", "internvl", "mistral3", "mqt_llava"]
VARIED = dict(temperature=6.0, seed=22, max_new_tokens=12)  # a random model says one word only, unless it is warm
LOOK = ViCrop(base=30)


@pytest.fixture
def varied() -> Answer:
    answer = backend("llava").answer(seen(), **VARIED)
    assert len(set(answer.text.split())) == 12 and answer.finish_reason == "length"
    return answer


# ---- what `generate` says


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [*SHARING, "paligemma", "instructblip"])
def test_greedy_answers_are_those_of_generate(name: str, count: int) -> None:
    opened, count = backend(name), max(count, int(name == "paligemma"))
    expected = generated(opened, seen(count)) if count or name != "instructblip" else None
    answer = opened.answer(seen(count), max_new_tokens=8)
    assert answer.usage.prompt_tokens == len(opened.lay_out(seen(count)))
    assert answer.usage.completion_tokens == (8 if expected is None else len(expected))
    assert expected is None or answer.text == text(opened, expected)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (dict(temperature=0.7), dict(temperature=0.7, top_k=0)),
        (dict(temperature=3.0, top_p=0.6), dict(temperature=3.0, top_p=0.6, top_k=0)),
        (dict(temperature=3.0, top_k=3), dict(temperature=3.0, top_k=3)),
        (
            dict(temperature=1.5, top_p=0.9, top_k=9, num_beams=2),
            dict(temperature=1.5, top_p=0.9, top_k=9, num_beams=2),
        ),
        (dict(num_beams=3), dict(num_beams=3)),
        (dict(repetition_penalty=1.5), dict(repetition_penalty=1.5)),
        (dict(top_p=0.5, top_k=2), {}),  # without a temperature the most probable token is taken
    ],
)
def test_settings_are_those_of_generate(settings: dict[str, Any], options: dict[str, Any]) -> None:
    opened = backend("llava")
    torch.manual_seed(3)
    expected = generated(opened, seen(), do_sample="temperature" in settings, **options)
    answer = opened.answer(seen(), max_new_tokens=8, seed=3, **settings)
    assert answer.text == text(opened, expected)


def test_whole_numbers_are_taken(unchecked: None) -> None:
    opened = backend("llava")
    mine = opened.answer(seen(), temperature=2, top_p=1, repetition_penalty=2, seed=0, max_new_tokens=4)
    its = opened.answer(seen(), temperature=2.0, top_p=1.0, repetition_penalty=2.0, seed=0, max_new_tokens=4)
    assert mine.text == its.text


@pytest.mark.parametrize(
    "own",
    [
        dict(do_sample=True, temperature=0.1, top_p=0.1, top_k=1),
        dict(min_p=0.99),
        dict(typical_p=0.05),
        dict(epsilon_cutoff=0.2),
        dict(num_return_sequences=1, return_dict_in_generate=True),
        dict(num_beams=4, max_length=3),
        dict(repetition_penalty=9.0),
    ],
)
@pytest.mark.parametrize("settings", [{}, VARIED])
def test_the_checkpoints_own_sampling_settings_are_left_out(own: dict[str, Any], settings: dict[str, Any]) -> None:
    opened = fresh("llava")
    expected = opened.answer(seen(), **settings)
    opened.model.generation_config.update(**own)
    assert opened.answer(seen(), **settings).text == expected.text


def test_seeds() -> None:
    opened = backend("llava")
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    answers = [opened.answer(seen(), **(VARIED | dict(seed=seed))).text for seed in (0, 1, 0, 1, 2)]
    assert answers[:2] == answers[2:4] and len(set(answers)) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
    free = [opened.answer(seen(), **(VARIED | dict(seed=None))).text for _ in range(2)]
    assert free[0] != free[1]
    torch.manual_seed(11)
    assert opened.answer(seen(), **(VARIED | dict(seed=None))).text == free[0]


def test_a_conversation_of_several_turns() -> None:
    opened = backend("qwen2_5_vl")
    one, two = pictures(2)
    turns = [Message.user(one, QUESTION)]
    for question in (Message.user(OTHER), Message.user(two, QUESTION), Message.user("right ?")):
        answer = opened.answer(turns, max_new_tokens=4)
        assert answer.text == text(opened, generated(opened, turns, max_new_tokens=4))
        turns += [Message.assistant(answer.text), question]


# ---- with crops


@pytest.mark.parametrize("name", SHARING)
def test_an_answer_on_what_was_read_is_that_of_the_whole_prompt(name: str) -> None:
    """Token for token, though the picture is read once only."""
    opened = backend(name)
    conversation = seen(1)
    cropped = LOOK.crop(opened, conversation)
    assert [len(message.pictures) for message in cropped.messages] == [2]
    with counted(layers(opened)[0]) as tokens:
        answer = opened.answer(conversation, crop=LOOK, max_new_tokens=6)
    assert answer.text == text(opened, generated(opened, cropped.messages, max_new_tokens=6))
    assert answer.text == opened.answer(cropped.messages, max_new_tokens=6).text
    assert answer.usage.prompt_tokens == len(opened.lay_out(cropped.messages))
    assert cropped.read is not None
    assert answer.usage.prompt_tokens not in tokens  # never read as a whole


@pytest.mark.parametrize("settings", [dict(num_beams=3), dict(temperature=4.0, seed=2), dict(repetition_penalty=2.0)])
def test_settings_are_the_same_with_crops(settings: dict[str, Any]) -> None:
    opened = backend("llava")
    cropped = LOOK.crop(opened, seen(1)).messages
    mine, its = (opened.answer(asked, crop=crop, max_new_tokens=6, **settings) for asked, crop in crops(cropped))
    assert mine.text == its.text and mine.usage == its.usage


def crops(cropped: Any) -> list[tuple[Any, Any]]:
    return [(seen(1), LOOK), (cropped, None)]


def test_what_a_model_of_three_directions_read_last_does_not_matter() -> None:
    """Qwen keeps how far positions lag behind tokens, which is another number for each prompt."""
    opened = backend("qwen2_5_vl")
    expected = opened.answer(seen(1), crop=LOOK, max_new_tokens=6).text
    opened.answer(seen(3, OTHER), max_new_tokens=2)
    assert opened.answer(seen(1), crop=LOOK, max_new_tokens=6).text == expected
    opened.answer(seen(3, OTHER), crop=LOOK, max_new_tokens=2)
    assert opened.answer(QUESTION, max_new_tokens=6).text == text(opened, generated(opened, QUESTION, max_new_tokens=6))


def test_crops_and_corrections_go_together() -> None:
    opened, rule = backend("llava"), DeCo(alpha=3.0, layers=(1, 2))
    cropped = LOOK.crop(opened, seen(1))
    both = opened.answer(seen(1), crop=LOOK, deco=rule, max_new_tokens=6)
    alone = opened.answer(cropped.messages, deco=rule, max_new_tokens=6)
    assert both.text == alone.text != opened.answer(cropped.messages, max_new_tokens=6).text
    assert [look.box for look in both.steps["crop"]] == [look.box for look in cropped.record]
    assert set(both.steps) == {"crop", "deco"} and set(alone.steps) == {"deco"}
    assert set(both.seconds) == {"crop", "generate", "first_token"} and min(both.seconds.values()) > 0


def test_without_pictures_there_is_nothing_to_look_at(qr_mini: Backend) -> None:
    for opened in (backend("llava"), qr_mini):
        answer = opened.answer("what is left ?", crop=LOOK, max_new_tokens=3)
        assert answer.steps == {} and answer.text == opened.answer("what is left ?", max_new_tokens=3).text


# ---- where an answer ends


def test_an_answer_that_is_cut(varied: Answer) -> None:
    short = backend("llava").answer(seen(), **(VARIED | dict(max_new_tokens=5)))
    assert short.text == " ".join(varied.text.split()[:5])
    assert (short.finish_reason, short.usage.completion_tokens) == ("length", 5)
    assert short.usage.total_tokens == short.usage.prompt_tokens + 5


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("room", [0, 3])
def test_an_answer_that_the_model_ends(as_list: bool, room: int, varied: Answer) -> None:
    opened = fresh("llava")
    ends_at = varied.text.split()[3]
    token = opened.tokenizer.convert_tokens_to_ids(ends_at)
    opened.model.generation_config.eos_token_id = [0, token] if as_list else token
    answer = opened.answer(seen(), **(VARIED | dict(max_new_tokens=4 + room)))
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("stop", 4)


def test_special_tokens_are_not_part_of_an_answer() -> None:
    """This model draws all tokens alike, those for pictures and the end too."""
    opened = fresh("llava")
    opened.model.lm_head.weight.zero_()
    answers = [opened.answer("left", temperature=1.0, seed=seed, max_new_tokens=40) for seed in range(3)]
    said = {word for answer in answers for word in answer.text.split()}
    assert len(said) > 10 and not said & {"<s>", "</s>", "<pad>", "<unk>", "<image>"}
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


def test_stop_sequences(varied: Answer) -> None:
    opened, (first, second, third, *_) = backend("llava"), varied.text.split()
    answer = opened.answer(seen(), stop=[f"{second} {third}"], **VARIED)
    assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == (f"{first} ", "stop", 3)
    across = opened.answer(seen(), stop=f"{first[-1]} {second[0]}", **VARIED)
    assert (across.text, across.finish_reason, across.usage.completion_tokens) == (first[:-1], "stop", 2)
    earlier = opened.answer(seen(), stop=[third, second, "xyz"], **VARIED)
    assert earlier.text == f"{first} "
    never = opened.answer(seen(), stop=["xyz"], **VARIED)
    assert never.text == varied.text and never.finish_reason == "length"
    last = opened.answer(seen(), stop=[varied.text.split()[-1]], **VARIED)
    assert last.finish_reason == "stop" and varied.text.startswith(last.text)


def test_beams_end_at_stop_sequences() -> None:
    opened = backend("llava")
    plain = opened.answer(seen(), num_beams=3, max_new_tokens=6)
    stop = plain.text.split()[1]
    answer = opened.answer(seen(), num_beams=3, max_new_tokens=6, stop=[stop])
    assert stop not in answer.text
    assert answer.usage.completion_tokens <= 6


def test_the_window_caps_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = backend("llava")
    needed = len(opened.lay_out(seen()))
    monkeypatch.setattr(opened.config, "max_position_embeddings", needed + 3)
    answer = opened.answer(seen(), max_new_tokens=50)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 3)
    monkeypatch.setattr(opened.config, "max_position_embeddings", needed)
    with pytest.raises(WindowError, match="fewer pictures"):
        opened.answer(seen())


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(num_beams=0), "num_beams=0"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty=nan"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(top_p=float("nan")), "top_p=nan"),
        (dict(top_k=0), "top_k=0"),
        (dict(stop=["a", ""]), "texts that are not empty"),
        (dict(seed=2**70), "out of range"),
        (dict(max_tokens=3), "unknown setting 'max_tokens': pass max_new_tokens"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    opened = backend("llava")
    with pytest.raises(InputError, match=match):
        opened.answer(QUESTION, **settings)
    with pytest.raises(InputError, match=match):
        opened.stream(QUESTION, **settings)  # before anything is asked of it


def test_a_closed_backend() -> None:
    opened = fresh("llava")
    opened.close()
    with pytest.raises(ClosedError, match="load it again"):
        opened.answer(QUESTION)
    with pytest.raises(ClosedError, match="load it again"):
        list(opened.stream(QUESTION))


# ---- piece by piece


@pytest.mark.parametrize("how", [{}, dict(crop=LOOK), dict(deco=DeCo(alpha=1.0, layers=(1, 2))), dict(num_beams=2)])
def test_pieces_add_up_to_the_answer(how: dict[str, Any]) -> None:
    opened = backend("llava")
    *pieces, last = opened.stream(seen(1), **how, **VARIED)
    assert last.answer is not None and last.delta == ""
    assert all(piece.answer is None and piece.delta for piece in pieces)
    assert "".join(piece.delta for piece in pieces) == last.answer.text
    assert (len(pieces) == 1) == ("num_beams" in how)
    whole = opened.answer(seen(1), **how, **VARIED)
    assert (whole.text, whole.usage, whole.finish_reason) == (
        last.answer.text,
        last.answer.usage,
        last.answer.finish_reason,
    )


def test_a_model_that_generates_from_embeddings_is_streamed_too() -> None:
    opened = backend("instructblip")
    *pieces, last = opened.stream(seen(1), **VARIED)
    assert last.answer is not None and len(pieces) > 3
    assert "".join(piece.delta for piece in pieces) == last.answer.text
    second = last.answer.text.split()[1]
    assert opened.answer(seen(1), stop=[second], **VARIED).finish_reason == "stop"


def test_stop_sequences_are_never_sent(varied: Answer) -> None:
    """It begins in the second word and ends in the third."""
    first, second, third, *_ = varied.text.split()
    stop = f"{second[-1]} {third[0]}"
    *pieces, last = backend("llava").stream(seen(), stop=[stop], **VARIED)
    assert last.answer is not None
    assert "".join(piece.delta for piece in pieces) == last.answer.text == f"{first} {second[:-1]}"
    begun = f"{varied.text.split()[-1]} and more"
    *pieces, last = backend("llava").stream(seen(), stop=[begun], **VARIED)
    assert "".join(piece.delta for piece in pieces) == varied.text


@pytest.mark.parametrize("layer", [0, 3])
def test_what_breaks_reaches_who_listens(layer: int) -> None:
    opened = fresh("llava")
    before = opened.answer(seen(), **VARIED).text
    with breaking(layers(opened)[layer]):
        with pytest.raises(ZeroDivisionError, match="on fire"):
            list(opened.stream(seen(), **VARIED))
        with pytest.raises(ZeroDivisionError), closing(opened.stream(seen(), crop=LOOK, **VARIED)) as pieces:
            next(pieces)
    assert in_another_thread(lambda: opened.answer(seen(), **VARIED).text) == before


def in_another_thread(ask: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result(30)


def test_input_errors_reach_who_listens() -> None:
    with pytest.raises(InputError, match="nothing to answer"):
        next(backend("llava").stream([]))


def test_who_stops_listening_stops_the_model() -> None:
    opened = backend("llava")
    with counted(layers(opened)[0]) as passes:
        pieces = opened.stream(seen(), **(VARIED | dict(max_new_tokens=3000)))
        assert next(pieces).delta
        pieces.close()  # type: ignore[attr-defined]
        stopped_at = len(passes)
    assert 0 < stopped_at < 1000
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(run)")]
    with counted(layers(opened)[0]) as passes:
        assert in_another_thread(lambda: opened.answer(seen(), max_new_tokens=2)).text
    assert len(passes) == 2


def test_a_listener_may_ask_again_meanwhile() -> None:
    opened = backend("llava")
    asked = [opened.answer(seen(), max_new_tokens=2).text for _ in islice(opened.stream(seen(), **VARIED), 2)]
    assert len(asked) == 2


def test_the_callers_gradients_stay_switched_on() -> None:
    opened = fresh("llava")
    opened.model.requires_grad_(True)
    with torch.enable_grad():
        opened.answer(seen(1), crop=ViCrop(method="gradient", base=30), max_new_tokens=2)
        assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in opened.model.parameters())


# ---- many at once


def ask(opened: Backend, number: int) -> str:
    """All kinds of answers in turn."""
    kinds: list[dict[str, Any]] = [{}, dict(crop=LOOK), dict(deco=DeCo(alpha=2.0, layers=(1, 2))), VARIED]
    settings = dict(max_new_tokens=5) | kinds[number % 4]
    conversation = seen(number % 3, QUESTION if number % 2 else OTHER)
    if number % 5:
        return opened.answer(conversation, **settings).text
    *_, last = opened.stream(conversation, **settings)
    assert last.answer is not None
    return last.answer.text


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_sixteen_threads_get_the_answers_of_one(name: str) -> None:
    opened = backend(name)
    calm = [ask(opened, number) for number in range(12)]
    assert len(set(calm)) > 3
    with ThreadPoolExecutor(16) as pool:
        found: Iterator[str] = pool.map(lambda number: ask(opened, number), range(12))
        assert list(found) == calm


# ---- what went wrong once


def test_a_stream_in_a_thread_that_holds_the_model_is_refused() -> None:
    opened = backend("llava")
    with opened.locked(), pytest.raises(InputError, match="holds the model"):
        next(opened.stream("What?"))
    assert not opened.held


def give_up() -> None:
    raise Cancelled("gone")


def test_who_is_gone_does_not_wait_for_the_model() -> None:
    opened, locked, done = backend("llava"), threading.Event(), threading.Event()

    def hold() -> None:
        with opened.locked():
            locked.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait(30)
    try:
        with pytest.raises(Cancelled), interruptible(give_up):
            opened.answer("What?")
        assert holder.is_alive()
    finally:
        done.set()
        holder.join()


def test_a_model_whose_logits_are_nan_says_so() -> None:
    opened = fresh("llava")
    with torch.no_grad():
        opened.model.get_output_embeddings().weight.fill_(torch.nan)
    for settings in ({}, {"temperature": 1.0}, {"num_beams": 2}):
        with pytest.raises(ScoreError, match="NaN"):
            opened.answer("What?", max_new_tokens=2, **settings)


@pytest.mark.parametrize("wrong", [True, "relative", ViCrop])
def test_what_cannot_look_or_correct_is_refused(wrong: Any, unchecked: Any) -> None:
    with pytest.raises(InputError, match="pass crop=ViCrop"):
        backend("llava").answer("What?", crop=wrong)
    with pytest.raises(InputError, match="pass deco=DeCo"):
        backend("llava").answer("What?", deco=wrong)
