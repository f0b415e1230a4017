"""Pieces of a text lose nothing, stay within their size, and end where a reader would pause: in any language."""

import bisect
import itertools
import random
import re
import time
from typing import Any

import numpy as np
import pytest

WORDS = [
    [
        "the",
        "river",
        "and",
        "the",
        "mountain",
        "of",
        "Dracula",
        "don't",
        "state-of-the-art",
        "1897",
        "U.S.",
        "étude",
        "Straße",
    ],
    ["ड्रैकुला", "ब्रैम", "स्टोकर", "ने", "लिखा", "हिन्दी", "में"],
    ["東京都は日本の首都", "ドラキュラ", "德古拉是布拉姆", "吸血鬼"],
    ["ภาษาไทยเขียนติดกัน", "แดร็กคูลา"],
    ["دراكولا", "رواية", "می\u200cخواهم", "كتبها", "برام", "ستوكر"],
    ["👩\u200d🚀", "🙂🙂", "\U0001f1e9\U0001f1ea", "e\u0301\u0302\u0303", "\x00", "\u200b", "x" * 70, "." * 30, "----"],
]
BETWEEN = [
    " ",
    " ",
    " ",
    " ",
    "",
    ", ",
    ". ",
    "! ",
    "。",
    "।\n",
    ".\n",
    "\n",
    "\n\n",
    " \n\t\n ",
    "\r\n\r\n",
    "\u00a0",
    "\t",
]


def written(draw: random.Random, most: int = 120) -> str:
    """A text in one to three languages."""
    words = [word for language in draw.sample(WORDS, draw.randint(1, 3)) for word in language]
    return "".join(draw.choice(words) + draw.choice(BETWEEN) for _ in range(draw.randint(0, most)))


def rough(text: str) -> Any:
    from qr_integrations.retrieval.chunks import rough_token_starts

    return rough_token_starts(text)


@pytest.fixture(params=["rough", "real"])
def starts_of(request: pytest.FixtureRequest, qr_mini: Any) -> Any:
    """Where the tokens of a text start: guessed, or as the bundled model's tokenizer has it."""

    def real(text: str) -> Any:
        offsets = qr_mini.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return np.array([start for start, _ in offsets], dtype=np.int64)

    return rough if request.param == "rough" else real


def inked(text: str, starts: Any) -> list[tuple[int, int]]:
    """First and last character of every token; white space that a tokenizer counts to a token is not its business."""
    bounds = [*starts.tolist(), len(text)]
    tokens = []
    for i in range(len(starts)):
        stop = next((bound for bound in bounds[i + 1 :] if bound > bounds[i]), len(text))
        ink = text[bounds[i] : stop]
        if ink.strip():
            first = bounds[i] + len(ink) - len(ink.lstrip())
            tokens.append((first, first + len(ink.strip()) - 1))
    return tokens


def num_tokens(tokens: list[tuple[int, int]], start: int, stop: int) -> int:
    """Tokens with a visible character in ``[start, stop)``."""
    return bisect.bisect_left(tokens, (stop, -1)) - bisect.bisect_left([last for _, last in tokens], start)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_and_no_piece_is_too_long(starts_of: Any, seed: int) -> None:
    from qr_integrations.retrieval.chunks import chunk

    draw = random.Random(seed)
    text = written(draw)
    starts, size = starts_of(text), draw.choice([1, 2, 3, 7, 20, 64, 1000])
    overlap = draw.choice([0, 0, draw.randrange(size)])
    spans, tokens = chunk(text, starts, size, overlap), inked(text, starts_of(text))
    kept = {i for span in spans for i in range(span.start, span.stop)}
    assert all(i in kept for i, char in enumerate(text) if not char.isspace())
    for span in spans:
        piece = text[span.slice()]
        assert piece and piece == piece.strip()
        assert num_tokens(tokens, span.start, span.stop) <= size or len(piece) == 1, piece
    for before, span in itertools.pairwise(spans):
        assert before.start < span.start and before.stop < span.stop
        if overlap == 0:
            assert before.stop <= span.start
        elif span.start < before.stop:
            assert num_tokens(tokens, span.start, before.stop) <= overlap
            assert text[span.start - 1].isspace()  # repeats from the start of a word


PAUSES = [r"\n\s*\n\s*", r"\n\s*", r"[.!?]+\s+|[。！？।]+\s*", r"\s+", r""]


def pause_after(text: str, span: Any, after: Any) -> int:
    """At which kind of pause a piece ends: the number of the first that fits."""
    found = [re.search(rf"({pause})$", text[span.start : after.start]) for pause in PAUSES]
    return next(kind for kind, match in enumerate(found) if match and match.end() >= len(span))


@pytest.mark.parametrize("seed", range(40))
def test_a_piece_ends_at_the_best_pause_that_leaves_it_half_full(starts_of: Any, seed: int) -> None:
    from qr_integrations.retrieval.chunks import chunk

    draw = random.Random(seed)
    text = written(draw)
    starts, size = starts_of(text).tolist(), draw.choice([5, 12, 40])

    def limit(position: int) -> int:
        """Where `size` tokens from the one at `position` end."""
        token = bisect.bisect_left(starts, starts[max(0, bisect.bisect_right(starts, position) - 1)])
        return starts[token + size] if token + size < len(starts) else len(text)

    spans = chunk(text, starts_of(text), size)
    for i, span in enumerate(spans[:-1]):
        end_before = spans[i - 1].stop if i else 0  # the white space between two pieces may count to either
        half = (span.start + limit(span.start)) / 2
        for kind, pause in enumerate(PAUSES[: pause_after(text, span, spans[i + 1])]):
            places = [m.start() for m in re.finditer(pause, text) if half <= m.start() and m.end() <= limit(end_before)]
            assert not places, (kind, text[span.start : limit(span.start)], text[span.slice()])


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("One two.\nThree four.\n\nFive six. Seven eight.", 11, ["One two.\nThree four.", "Five six. Seven eight."]),
        ("One two three four\n\nfive\nsix seven", 6, ["One two three four", "five\nsix seven"]),
        ("One two three four\nfive. Six seven", 7, ["One two three four", "five. Six seven"]),
        ("One two three. Four five six. Seven", 8, ["One two three. Four five six.", "Seven"]),
        ("one two three four five", 3, ["one two three", "four five"]),
        ("他写了。她读了。我睡了。", 9, ["他写了。她读了。", "我睡了。"]),
        ("उसने लिखा। मैंने पढ़ा।", 4, ["उसने लिखा।", "मैंने पढ़ा।"]),
        ("A.\n\none two three four five six seven", 6, ["A.\n\none two three four", "five six seven"]),  # too soon
        ("no", 1, ["no"]),
        ("", 5, []),
        (" \n\t\u00a0\u3000 ", 5, []),
        ("  padded  ", 5, ["padded"]),
    ],
)
def test_where_pieces_end(text: str, size: int, expected: list[str]) -> None:
    from qr_integrations.retrieval.chunks import chunk

    assert [text[span.slice()] for span in chunk(text, rough(text), size)] == expected


@pytest.mark.parametrize("before_the_word", [True, False])
def test_a_sentence_that_just_fits_stays_whole(before_the_word: bool) -> None:
    # Many tokenizers count the space to the word that follows it.
    from qr_integrations.retrieval.chunks import chunk

    sentence = "The cat sat on the mat today."
    text = " ".join([sentence] * 6)
    starts = rough(text)
    if before_the_word:
        starts = np.array([s - 1 if s and text[s - 1] == " " else s for s in starts])
    for many in (1, 2, 3):
        pieces = [text[span.slice()] for span in chunk(text, starts, 8 * many)]
        assert pieces == [" ".join([sentence] * many)] * (6 // many)


def test_a_piece_repeats_the_last_words_of_the_one_before() -> None:
    from qr_integrations.retrieval.chunks import chunk

    text = " ".join(f"w{i}" for i in range(20))
    pieces = [text[span.slice()].split() for span in chunk(text, rough(text), 6, 2)]
    assert len(pieces) > 3
    for before, piece in itertools.pairwise(pieces):
        assert piece[:2] == before[-2:] and len(piece) <= 6


def test_a_character_of_several_tokens_is_repeated_whole_or_not_at_all() -> None:
    from qr_integrations.retrieval.chunks import chunk

    starts = np.array([0, 2, 2, 2, 2, 3, 4])  # as byte-level tokenizers have it: four tokens for the smile
    assert [(s.start, s.stop) for s in chunk("x 🙂ab", starts, 6, 2)] == [(0, 4), (4, 5)]


def test_long_unbroken_strings_are_cut_by_tokens(starts_of: Any) -> None:
    from qr_integrations.retrieval.chunks import chunk

    for text in ("a" * 5000, "東" * 3000, "🙂" * 500, "\u0301" * 500, "ab/cd?ef=" * 400, "." * 5000, "\x00" * 50):
        for overlap in (0, 5):
            spans = chunk(text, starts_of(text), 16, overlap)
            assert "".join(text[span.slice()] for span in spans) == text
            tokens = inked(text, starts_of(text))
            assert all(num_tokens(tokens, s.start, s.stop) <= 16 or len(s) == 1 for s in spans)


def test_a_character_of_many_tokens_is_a_piece_of_its_own(qr_mini: Any) -> None:
    from qr_integrations.retrieval.chunks import chunk

    text = "🙂東a"
    offsets = qr_mini.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    assert (starts == 0).sum() > 2  # otherwise this proves nothing
    assert [text[span.slice()] for span in chunk(text, starts, 1)] == ["🙂", "東", "a"]


def test_text_before_the_first_token_and_without_tokens() -> None:
    from qr_integrations.retrieval.chunks import chunk

    nothing = np.array([], dtype=np.int64)
    assert [(s.start, s.stop) for s in chunk(" a b ", nothing, 1)] == [(1, 4)]
    assert chunk("", nothing, 1) == []
    assert [(s.start, s.stop) for s in chunk("a b c d", np.array([4, 6]), 1)] == [(0, 5), (6, 7)]


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-5, 0), (1, 1), (5, 5), (5, 6), (5, -1)])
def test_sizes_that_cannot_be(size: int, overlap: int) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.retrieval.chunks import chunk

    with pytest.raises(InputError, match=f"chunk_size {size} .*chunk_overlap {overlap} cannot be: pass"):
        chunk("a b c", rough("a b c"), size, overlap)


@pytest.mark.parametrize("seed", range(20))
def test_rough_tokens_ascend_and_start_at_something_visible(seed: int) -> None:
    text = written(random.Random(seed))
    starts = rough(text).tolist()
    assert starts == sorted(set(starts)) and all(0 <= start < len(text) for start in starts)
    assert not any(text[start].isspace() for start in starts)
    first = [m.start() for m in re.finditer(r"(?<!\S)\S", text)]
    assert set(first) <= set(starts)  # a word never starts inside a token


def test_rough_tokens_are_about_as_many_as_real_ones(qr_mini: Any) -> None:
    from qr_integrations.bundled import read_sample

    texts = [document.text for question in read_sample()[:5] for document in question.documents]
    real = sum(len(qr_mini.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert 0.7 * real < sum(len(rough(text)) for text in texts) < 1.3 * real


@pytest.mark.parametrize(
    "unit",
    ["the river and the mountain. ", "a", "東", "\n", " \n", "x" + "\n" * 200, "word\n\n", "ab ", "." * 60 + " "],
    ids=["words", "letter", "han", "lines", "empty lines", "gaps", "paragraphs", "short", "dots"],
)
def test_a_megabyte_is_cut(unit: str) -> None:
    from qr_integrations.retrieval.chunks import chunk

    text = unit * (1_000_000 // len(unit))
    begun = time.process_time()
    spans = chunk(text, rough(text), 512, 64)
    assert time.process_time() - begun < 10
    assert sum(map(len, spans)) >= len(text.split()) and all(a < b for a, b in itertools.pairwise(spans))


def test_a_line_of_a_hundred_thousand_dots_is_cut() -> None:
    # Tokenizers have tokens of many dots: a piece holds thousands.
    from qr_integrations.retrieval.chunks import chunk

    text = "." * 100_000
    begun = time.process_time()
    spans = chunk(text, np.arange(0, len(text), 32), 512)
    assert time.process_time() - begun < 2
    assert len(spans) == 7 and "".join(text[span.slice()] for span in spans) == text
