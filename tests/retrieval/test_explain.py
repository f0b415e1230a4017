"""Which words made a document relevant: every shortcut against the same thing written out plainly."""

import math
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import regex

QUERY = "who wrote dracula"
DRACULA = "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker."
TEXTS = [
    "Cats don't sleep all day: 'some' do, in state-of-the-art baskets of the U.S. Army.",
    DRACULA,
    "  \n\tLeading and trailing space around Bram Stoker. \n\n ",
    "हिन्दी में ड्रैकुला ब्रैम स्टोकर ने लिखा।",
    "E\u0301mile a e\u0301crit nai\u0308vement; la the\u0301orie 👩\u200d🚀 de Dracula 🙂.",
    "東京都は日本の首都。ドラキュラを書いた。",
    "ภาษาไทยเขียนติดกัน แดร็กคูลา",
    "First paragraph about Dracula.\n\nSecond paragraph about Stoker.\n \nThird one.",
    "",
    DRACULA,
]
TITLES = [None, "Dracula", "Bram Stoker", None, "", None, "ชื่อ", None, "Only a title", None]


def documents() -> list[Any]:
    from qr_integrations import Document

    return [Document(text, title) for text, title in zip(TEXTS, TITLES, strict=True)]


@pytest.fixture(scope="module")
def reranker(qr_mini: Any) -> Any:
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(qr_mini)


@pytest.fixture(scope="module", params=["qrhead", "icr"])
def either(request: pytest.FixtureRequest, qr_mini: Any, reranker: Any) -> Any:
    from qr_integrations import ICRReranker

    return reranker if request.param == "qrhead" else ICRReranker(qr_mini)


# ---- maximal runs


def best_stretches(scores: Sequence[float], start: int = 0) -> list[tuple[int, int]]:
    """The definition: the stretch with the largest sum (of equal ones the shortest), then the same on both sides."""
    stretches = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores) + 1)]
    if not stretches or max(scores) <= 0:
        return []
    i, j = min(stretches, key=lambda s: (-math.fsum(scores[s[0] : s[1]]), s[1] - s[0], s[0]))
    left, right = best_stretches(scores[:i], start), best_stretches(scores[j:], start + j)
    return [*left, (start + i, start + j), *right]


@pytest.mark.parametrize("seed", range(40))
def test_maximal_runs_are_those_of_the_definition(seed: int) -> None:
    from qr_integrations.retrieval.explain import maximal_runs

    draw = random.Random(seed)
    for _ in range(10):
        length = draw.randint(0, 14)
        whole = [float(draw.randint(-4, 4)) for _ in range(length)]  # whole numbers have ties and zeros, and exact sums
        eighths = [draw.randint(-99, 99) / 8 for _ in range(length)]
        for scores in (whole, eighths):
            assert maximal_runs(scores) == best_stretches(scores), scores


def test_maximal_runs_of_very_long_lists() -> None:
    from qr_integrations.retrieval.explain import maximal_runs

    n = 100_000
    assert maximal_runs([2.0, -1.0] * n) == [(0, 2 * n - 1)]
    assert maximal_runs([1.0, -2.0] * n) == [(2 * i, 2 * i + 1) for i in range(n)]
    assert maximal_runs([1.0, -2.0] * n + [3.0 * n]) == [(2 * i, 2 * i + 1) for i in range(n)] + [(2 * n, 2 * n + 1)]
    assert maximal_runs([float(n - i) for i in range(2 * n)]) == [(0, n)]  # falling through zero
    assert maximal_runs([-1.0] * 2 * n) == []
    falling = [score for i in range(n, 0, -1) for score in (float(i), -float(i) - 1)]  # ever smaller, ever lower
    assert len(maximal_runs(falling)) == n
    rising = [score for i in range(n) for score in (-2.0 * i, 2.0 * i + 1)]  # every run is joined to the ones before
    assert maximal_runs(rising)[-1][1] == 2 * n


# ---- words


def written_out(layout: Any, scores_KT: Any, index: int) -> tuple[list[float], float]:
    """The share of every character of a document's text, and what fell beside its text: one token after the other."""
    span, chars = layout.documents[index], layout.texts[index]
    tokens = scores_KT.double().sum(0)[span.slice()].tolist()
    limit = statistics.mean(tokens) - 2 * statistics.stdev(tokens)
    per_char, beside = [0.0] * len(chars), 0.0
    for score, (start, stop) in zip(tokens, layout.offsets[span.slice()].tolist(), strict=True):
        if score <= limit:
            continue
        for char in range(start, stop):
            if chars.start <= char < chars.stop:
                per_char[char - chars.start] += score / (stop - start)
            else:
                beside += score / (stop - start)
    return per_char, beside


def test_words_add_up_as_in_a_plain_loop_over_tokens(either: Any) -> None:
    from qr_integrations.retrieval.explain import attended_words
    from qr_integrations.retrieval.layout import Query

    scores = {item.index: item.score for item in either.rank(QUERY, documents())}
    layout, scores_KT = either.scorer.score(Query(QUERY), documents())
    for index in range(len(TEXTS)):
        words = attended_words(layout, scores_KT, index)
        per_char, rest = written_out(layout, scores_KT, index)
        text = layout.text[layout.texts[index].slice()]
        for word in words:
            assert text[word.span.slice()] == word.text
            assert word.score == pytest.approx(sum(per_char[word.span.slice()]), abs=1e-6)
        in_words = {char for word in words for char in range(word.span.start, word.span.stop)}
        assert len(in_words) == sum(len(word.text) for word in words)  # no character is in two words
        rest += sum(score for char, score in enumerate(per_char) if char not in in_words)
        assert sum(word.score for word in words) + rest == pytest.approx(scores[index], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("E\u0301mile nai\u0308ve", ["E\u0301mile", "nai\u0308ve"]),
        ("the 👩\u200d🚀 flew 🙂", ["the", "flew"]),
        ("東京都 首都", ["東", "京", "都", "首", "都"]),
        ("ที่นี่", ["ที่", "นี่"]),
        (
            "Don't use state-of-the-art in the U.S. today",
            ["Don't", "use", "state-of-the-art", "in", "the", "U.S", "today"],
        ),
        ("l\u2019été 3.14 snake_case", ["l\u2019été", "3.14", "snake_case"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("(«quoted», - and -dashed-)", ["quoted", "and", "dashed"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("2024年に東京へ", ["2024", "年", "に", "東", "京", "へ"]),
        ("Python入門abc", ["Python", "入", "門", "abc"]),
        ("… ! \n", []),
    ],
)
def test_what_a_word_is(reranker: Any, text: str, expected: list[str]) -> None:
    assert [word.text for word in reranker.explain(QUERY, [text], 0)] == expected


def test_japanese_long_vowels_do_not_glue_characters_together(reranker: Any) -> None:
    text = "コーヒーとデータベースのユーザー"
    words = [word.text for word in reranker.explain(QUERY, [text], 0)]
    assert "".join(words) == text and max(map(len, words)) <= 2  # a letter, perhaps with its mark


# ---- spans


def made_up(draw: random.Random) -> tuple[str, list[Any]]:
    """A text, and its words with scores drawn at random."""
    from qr_integrations import Span
    from qr_integrations.types import ScoredSpan

    text, words = draw.choice(["", "  ", "“"]), []
    for _ in range(draw.randint(0, 12)):
        word = draw.choice(["the", "don't", "हिन्दी", "e\u0301tude", "Dracula", "3.14", "U.S"])
        score = draw.choice([0.0, draw.uniform(-0.2, 0.1), draw.expovariate(1.0)])
        words.append(ScoredSpan(Span(len(text), len(text) + len(word)), word, score))
        text += word + draw.choice([" ", " ", " ", ", ", "\n", "\n\n", ".\n \t\n", "\r\n\r\n", " 👩\u200d🚀 "])
    return text, words


def letters_meet(text: str, position: int) -> bool:
    """Whether a word goes on across this place."""
    around = text[max(0, position - 1) : position + 1]
    return regex.fullmatch(r"[\p{L}\p{N}\p{M}]{2}", around) is not None


@pytest.mark.parametrize("seed", range(60))
def test_spans_are_the_maximal_runs_of_every_paragraph(seed: int) -> None:
    from qr_integrations.retrieval.explain import strongest_spans

    text, words = made_up(random.Random(seed))
    spans = strongest_spans(text, words, None)
    positive = [max(0.0, word.score) for word in words]
    base = 0.9 * sum(positive) / max(1, len(words))
    expected, paragraph = [], []
    for i, word in enumerate(words):
        paragraph.append(i)
        after = text[word.span.stop : words[i + 1].span.start] if i + 1 < len(words) else "\n\n"
        if after.count("\n") >= 2:
            runs = best_stretches([words[j].score - base for j in paragraph])
            expected += [[words[j] for j in paragraph[first:last]] for first, last in runs]
            paragraph = []
    found = {(span.span.start, span.span.stop): span.score for span in spans}
    assert found == {
        (run[0].span.start, run[-1].span.stop): pytest.approx(sum(word.score for word in run)) for run in expected
    }
    assert len(found) == len(spans)
    for span in spans:
        assert text[span.span.slice()] == span.text and not regex.search(r"\n\s*\n", span.text)
        assert not letters_meet(text, span.span.start) and not letters_meet(text, span.span.stop)
    in_order = sorted(spans, key=lambda span: span.span)
    assert all(a.span.stop <= b.span.start for a, b in pairwise(in_order))
    assert [span.score for span in spans] == sorted((span.score for span in spans), reverse=True)
    for most in (1, 2, 3):
        assert strongest_spans(text, words, most) == spans[:most]


def spans_of(text: str, scores: list[float]) -> list[str]:
    """The spans of words that are parted by white space, strongest first."""
    from qr_integrations import Span
    from qr_integrations.retrieval.explain import strongest_spans
    from qr_integrations.types import ScoredSpan

    matches = list(regex.finditer(r"\S+", text))
    words = [ScoredSpan(Span(*m.span()), m.group(), float(s)) for m, s in zip(matches, scores, strict=True)]
    return [span.text for span in strongest_spans(text, words)]


def test_a_weak_word_between_strong_ones_is_taken_in_a_weak_sentence_is_not() -> None:
    assert spans_of("by Bram and Stoker who was Irish", [0, 1, 0.1, 1, 0, 0, 0]) == ["Bram and Stoker"]
    weak = "this is a long weak sentence of nothing"
    assert spans_of(f"Bram {weak} Stoker", [1, *[0.0] * 8, 2]) == ["Stoker", "Bram"]
    assert spans_of("Bram\n\nStoker", [1.9, 2]) == ["Stoker", "Bram"]  # no weak word, but an empty line
    assert spans_of("Bram\nStoker", [1.9, 2]) == ["Bram\nStoker"]


def test_without_a_positive_score_there_are_no_spans() -> None:
    assert spans_of("Bram Stoker wrote", [0, 0, 0]) == spans_of("Bram Stoker wrote", [-1, -2, 0]) == []
    assert spans_of("", []) == []


# ---- explain while ranking


def test_the_spans_of_a_ranking_are_those_of_the_explained_words(either: Any) -> None:
    from qr_integrations.retrieval.explain import strongest_spans

    for most in (3, 1, None):
        for item in either.rank(QUERY, documents(), explain=True, max_spans=most):
            words = either.explain(QUERY, documents(), item.index)
            expected = strongest_spans(TEXTS[item.index], words, most)
            assert [(s.span, s.text) for s in item.spans] == [(s.span, s.text) for s in expected]
            assert [s.score for s in item.spans] == pytest.approx([s.score for s in expected], abs=1e-6)
            assert all(TEXTS[item.index][s.span.slice()] == s.text for s in item.spans)


def test_spans_cost_no_pass_and_change_no_score(reranker: Any, lengths_read: list[int]) -> None:
    plain = reranker.rank(QUERY, documents())
    lengths_read.clear()
    reranker.rank(QUERY, documents())
    known = list(lengths_read)
    explained = reranker.rank(QUERY, documents(), explain=True)
    assert lengths_read == known * 2 and len(known) == 1  # the query's own tokens, nothing else
    assert [(item.index, item.score) for item in explained] == [(item.index, item.score) for item in plain]
    assert all(not item.spans for item in plain)


def test_explain_says_of_how_many(reranker: Any) -> None:
    texts = [f"Bram Stoker wrote Dracula, chapter {i}." for i in range(6)]
    for given, expected in ((True, 6), (False, 0), (0, 0), (1, 1), (2, 2), (99, 6)):
        ranking = reranker.rank(QUERY, texts, explain=given)
        assert [bool(item.spans) for item in ranking] == [True] * expected + [False] * (6 - expected)
    assert [bool(item.spans) for item in reranker.rank(QUERY, texts, 2, explain=True)] == [True, True]


def test_explain_says_of_how_many_in_several_prompts_too(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    texts = [f"Bram Stoker wrote Dracula, chapter {i}." for i in range(12)]
    ranking = QRHeadReranker(qr_mini, truncation="head", batch_size=3).rank(QUERY, texts, explain=2)
    assert [bool(item.spans) for item in ranking] == [True] * 2 + [False] * 10
    ranking = QRHeadReranker(qr_mini, truncation="head", batch_size=3).rank(QUERY, texts, explain=True)
    assert all(item.spans for item in ranking)


def test_copies_of_a_document_have_their_own_scores(reranker: Any) -> None:
    from qr_integrations.retrieval.layout import Query

    texts = [DRACULA, "Cats sleep.", DRACULA, DRACULA]
    ranking = reranker.rank(QUERY, texts, explain=True)
    layout, scores_KT = reranker.scorer.score(Query(QUERY), [item.document for item in sorted_by_index(ranking)])
    copies = [item for item in ranking if texts[item.index] == DRACULA]
    assert len({item.score for item in copies}) == 3
    assert len({item.spans[0].score for item in copies}) == 3
    for item in copies:
        per_char, _ = written_out(layout, scores_KT, item.index)
        for span in item.spans:
            assert DRACULA[span.span.slice()] == span.text
            words = [m for m in regex.finditer(r"\w+", DRACULA) if span.span.start <= m.start() < span.span.stop]
            assert span.score == pytest.approx(sum(sum(per_char[m.start() : m.end()]) for m in words), abs=1e-6)


def sorted_by_index(ranking: Any) -> list[Any]:
    return sorted(ranking, key=lambda item: item.index)


def test_offsets_do_not_count_the_title(either: Any) -> None:
    from qr_integrations import Document

    text = "The Irish author Bram Stoker wrote it."
    for title in ("Dracula", text, "  Dracula ", "", " "):
        item = either.rank("which irish author was it", [Document(text, title), Document("Cats.")], explain=True)[0]
        assert item.spans and all(text[span.span.slice()] == span.text for span in item.spans)


def test_pieces_of_a_long_document_have_offsets_in_all_of_it(qr_mini: Any) -> None:
    from qr_integrations import ICRReranker, QRHeadReranker

    text = " \n" + "The mountain is high.\n\n" * 150 + DRACULA + "\n\n" + "The river is long. " * 150 + "\n"
    for cls in (QRHeadReranker, ICRReranker):
        reranker = cls(qr_mini, truncation="chunk", max_doc_tokens=50, max_context_tokens=800)
        item = next(item for item in reranker.rank(QUERY, ["Cats sleep.", text], explain=True) if item.index == 1)
        assert all(text[span.span.slice()] == span.text for span in item.spans)
        assert item.spans[0].text in DRACULA and "Dracula" in item.spans[0].text
        first = reranker.explain(QUERY, ["Cats sleep.", text], 1)
        assert first[0].text == "The" and all(text[word.span.slice()] == word.text for word in first)


# ---- quality

COMMON = {"what", "when", "where", "which", "whom", "whose", "does", "that", "this", "with", "from", "have", "they"}
COMMON |= {"them", "were", "been", "their", "into"}


def test_the_strongest_span_of_the_answer_is_about_the_question(reranker: Any) -> None:
    # Of 20 gold passages: how often the strongest span has a word of the question in it (four letters or more), and
    # how often a span of as many words does that is laid anywhere in the passage. Titles are not in either.
    from qr_integrations.bundled import read_sample

    hits, expected, variance = 0, 0.0, 0.0
    for question in read_sample()[:20]:
        asked = {w for w in regex.findall(r"\w+", question.question.casefold()) if len(w) > 3} - COMMON
        ranking = reranker.rank(question.question, question.documents, explain=True, max_spans=1)
        top = next(item for item in ranking if item.index == question.gold).spans[0]
        words = reranker.explain(question.question, question.documents, question.gold)
        named = [not asked.isdisjoint(regex.findall(r"\w+", word.text.casefold())) for word in words]
        inside = [top.span.start <= word.span.start < top.span.stop for word in words]
        length = sum(inside)
        hits += any(name for name, here in zip(named, inside, strict=True) if here)
        anywhere = statistics.mean(any(named[i : i + length]) for i in range(len(words) - length + 1))
        expected, variance = expected + anywhere, variance + anywhere * (1 - anywhere)
    deviation = math.sqrt(variance)
    assert hits > expected + 3 * deviation, f"{hits} of 20, by chance {expected:.1f} with deviation {deviation:.1f}"
