"""What is sent while an answer grows: whole characters, nothing of a stop sequence, and in the end all of the text."""

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qr_integrations.backend import interruptible
from qr_integrations.backend.listening import Listener
from qr_integrations.errors import Cancelled

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("abcENDx .\n")


def of_bytes() -> PreTrainedTokenizerFast:
    """As Llama's: what is not in the vocabulary is spelt byte by byte."""
    vocabulary = {token: number for number, token in enumerate([*BYTES, *LETTERS])}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def tokens(text: str) -> list[int]:
    known = of_bytes().get_vocab()
    return [number for sign in text for number in ([known[sign]] if sign in known else list(sign.encode()))]


class Heard:
    """A generation that is fed token by token."""

    def __init__(self, ids: list[int], stop: tuple[str, ...] = (), **more: Any) -> None:
        self.pieces: list[str] = []
        self.listener = Listener(of_bytes(), 2, stop, self.pieces.append, **more)
        self.calls = 0
        shown = torch.tensor([[7, 7, *ids]])  # two tokens of a prompt
        for end in range(3, shown.shape[1] + 1):
            self.calls += 1
            if bool(self.listener(shown[:, :end], None)):
                break
        text, self.stopped = self.listener.read(shown[0, 2 : 2 + self.calls])
        self.before_the_end = "".join(self.pieces)
        self.listener.finish(text)
        self.text = text


def test_a_character_of_several_tokens_is_sent_once_and_whole() -> None:
    heard = Heard(tokens("a😀b"))
    assert heard.pieces == ["a", "😀", "b"]
    assert heard.text == "a😀b" and not heard.stopped and heard.calls == 6


def test_an_answer_cut_within_a_character_is_sent_as_it_reads() -> None:
    heard = Heard(tokens("ab😀")[:4])
    assert heard.before_the_end == "ab"
    assert heard.text.startswith("ab\ufffd") and "".join(heard.pieces) == heard.text


def test_a_stop_sequence_of_several_tokens_is_never_sent() -> None:
    heard = Heard(tokens("abENDab"), ("END",))
    assert (heard.text, heard.stopped, heard.calls) == ("ab", True, 5)
    assert "".join(heard.pieces) == "ab"


def test_a_beginning_that_does_not_become_a_stop_sequence_is_sent_later() -> None:
    heard = Heard(tokens("aENc"), ("END",))
    assert heard.pieces == ["a", "ENc"]
    heard = Heard(tokens("aEN"), ("END",))
    assert heard.before_the_end == "a" and heard.pieces == ["a", "EN"]


def test_a_stop_sequence_with_a_character_of_several_tokens() -> None:
    heard = Heard(tokens("abEN😀c"), ("EN😀",))
    assert (heard.text, "".join(heard.pieces)) == ("ab", "ab")
    other = Heard(tokens("abEN😂c"), ("EN😀",))
    assert "".join(other.pieces) == other.text == "abEN😂c"


def test_the_stop_sequence_that_comes_first_counts() -> None:
    assert Heard(tokens("abc.x"), ("x", "c", "bc")).text == "a"
    assert Heard(tokens("abc"), ("abc",)).text == ""


def test_space_before_an_answer_is_not_sent() -> None:
    heard = Heard(tokens("  \n a b"))
    assert heard.text == "a b" and heard.pieces[0] == "a"


def test_who_calls_it_off_ends_the_generation_after_any_token() -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled("gone")

    with pytest.raises(Cancelled), interruptible(check):
        Heard(tokens("abcabc"))
    assert len(asked) == 3


@pytest.mark.parametrize("shares_model", [True, False])
def test_others_come_in_between_two_tokens_not_after_the_last(shares_model: bool) -> None:
    between: list[int] = []
    with interruptible(lambda: None, lambda: between.append(1)):
        heard = Heard(tokens("abEND"), stop=("EN",), shares_model=shares_model)
    assert heard.calls == 4 and len(between) == (3 if shares_model else 0)


@pytest.mark.parametrize("stop", [(), ("EN",)])
def test_rows_end_one_by_one(stop: tuple[str, ...]) -> None:
    """Beams: each ends by its own text, and none is sent before the best is known."""
    pieces: list[str] = []
    listener = Listener(of_bytes(), 0, stop, pieces.append)
    rows = torch.tensor([tokens("abc"), tokens("aEN")])
    assert listener(rows, None).tolist() == [False, bool(stop)]
    assert pieces == []
    listener.finish("abc")
    assert pieces == ["abc"]


def test_the_first_token_is_timed_once() -> None:
    listener = Listener(of_bytes(), 0, ())
    assert listener.first_token_at is None
    listener(torch.tensor([tokens("a")]), None)
    first = listener.first_token_at
    listener(torch.tensor([tokens("ab")]), None)
    assert first is not None and listener.first_token_at == first


@pytest.mark.parametrize("seed", range(40))
def test_pieces_add_up_and_hold_no_stop_sequence(seed: int) -> None:
    draw = random.Random(seed)
    signs = [*"abEND .", "é", "😀", "\n"]
    text = "".join(draw.choices(signs, k=draw.randint(1, 20)))
    stop = tuple("".join(draw.choices(signs[:8], k=draw.randint(1, 3))) for _ in range(draw.randint(0, 2)))
    heard = Heard(tokens(text), stop)
    assert "".join(heard.pieces) == heard.text
    assert heard.text.startswith(heard.before_the_end)
    found = [place for one in stop if (place := text.lstrip().find(one)) >= 0]
    assert heard.stopped == bool(found)
    assert heard.text == (text.lstrip()[: min(found)] if found else text.lstrip())
