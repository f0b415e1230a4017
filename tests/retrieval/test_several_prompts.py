"""Documents that need several prompts: each is ranked once, nothing is lost, and all stand on one scale."""

import random
from collections import Counter
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer

QUERY = "who wrote dracula"
DRACULA = "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker."
WORDS = ["river", "mountain", "the", "of", "Danube", "東京", "naïve", "🙂", "don't", "3.14", "हिन्दी", "\n\n", "Stoker."]


def passages(count: int, num_words: int = 12) -> list[str]:
    """Texts that differ."""
    return [f"Passage {i} speaks. " + "the river and the mountain " * (num_words // 5) for i in range(count)]


def hay() -> str:
    """Some pages about everything but vampires."""
    from qr_integrations.bundled import read_sample

    return " ".join(document.text for document in read_sample()[0].documents[:12])


def drawn(seed: int) -> list[Any]:
    """Documents of all lengths and some languages, with and without titles, empty ones and equal ones among them."""
    from qr_integrations import Document

    draw = random.Random(seed)
    documents = []
    for _ in range(draw.randint(2, 12)):
        words = [draw.choice(WORDS) for _ in range(draw.choice([0, 1, 5, 30, 100, 300]))]
        padding = draw.choice(["", "", " ", "\n\n"])
        documents.append(Document(padding + " ".join(words) + padding, draw.choice([None, None, "", "Title", " T "])))
    return documents + documents[:2]


def ranker(qr_mini: Any, *, icr: bool = False, **options: Any) -> Any:
    from qr_integrations import ICRReranker, QRHeadReranker

    return ICRReranker(qr_mini, **options) if icr else QRHeadReranker(qr_mini, **options)


def windows_of(reranker: Any, documents: list[Any]) -> list[list[Any]]:
    """What is read in each prompt before the last one."""
    from qr_integrations.retrieval.given import as_documents
    from qr_integrations.retrieval.layout import Query

    windows: list[list[Any]] = reranker.fit(Query(QUERY), as_documents(documents), reranker.limits)
    return windows


@pytest.fixture
def prompts(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all prompts that are read."""
    lengths: list[int] = []
    ways = {name: getattr(type(qr_mini), name) for name in ("forward_branches", "forward_branch_rows")}

    def counting(name: str) -> Any:
        def counted(self: Any, texts: Any, wanted: Any, *, prefix: Any, **kwargs: Any) -> Any:
            if len(prefix) > 16:  # not the trial, once per model
                lengths.extend(len(prefix) + len(text) for text in texts)
            return ways[name](self, texts, wanted, prefix=prefix, **kwargs)

        return counted

    for name in ways:
        monkeypatch.setattr(type(qr_mini), name, counting(name))
    return lengths


# ---- whatever the limits


@pytest.mark.parametrize("truncation", ["head", "chunk"])
@pytest.mark.parametrize("seed", range(8))
def test_all_documents_once_best_first_in_prompts_that_fit(
    qr_mini: Any, prompts: list[int], truncation: str, seed: int
) -> None:
    from qr_integrations.errors import WindowError

    draw, documents = random.Random(seed), drawn(seed)
    window, batch_size = draw.choice([256, 400, 1000]), draw.choice([None, None, 1, 2, 7])
    limits = {"max_context_tokens": window, "batch_size": batch_size, "max_doc_tokens": draw.choice([None, None, 50])}
    reranker = ranker(qr_mini, icr=seed % 2 == 1, truncation=truncation, **limits)
    try:
        ranking = reranker.rank(QUERY, documents, explain=True)
    except WindowError:
        assert len(documents) * 8 > window  # a prompt cannot hold them all
        return
    assert sorted(ranking.order) == list(range(len(documents)))
    numbers = [item.score for item in ranking]
    assert numbers == sorted(numbers, reverse=True)
    assert max(prompts) <= window
    for item in ranking:
        assert item.document is documents[item.index]
        assert all(item.document.text[span.span.slice()] == span.text for span in item.spans)
        assert truncation == "head" or item.num_tokens_cut == 0
    if batch_size:
        assert all(len(read) <= batch_size for read in windows_of(reranker, documents))
        assert max(Counter(item.window for item in ranking).values()) <= batch_size


@pytest.mark.parametrize("icr", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_hold_all_of_every_document(qr_mini: Any, seed: int, icr: bool) -> None:
    documents = drawn(seed)
    reranker = ranker(qr_mini, icr=icr, truncation="chunk", max_context_tokens=500, max_doc_tokens=60)
    read: dict[int, set[int]] = {i: set() for i in range(len(documents))}
    for piece in (piece for window in windows_of(reranker, documents) for piece in window):
        stop = piece.start + len(piece.read.text)
        assert documents[piece.index].text[piece.start : stop] == piece.read.text
        assert piece.read.title == documents[piece.index].title and piece.num_tokens_cut == 0
        read[piece.index].update(range(piece.start, stop))
    for i, document in enumerate(documents):
        assert all(place in read[i] for place, char in enumerate(document.text) if not char.isspace())


def test_a_thousand_short_documents(qr_mini: Any) -> None:
    texts = [f"Document {i} is about cats." for i in range(1000)]
    texts[777] = "Dracula was written by Bram Stoker."
    ranking = ranker(qr_mini, truncation="head", max_context_tokens=2048).rank(QUERY, texts)
    assert sorted(ranking.order) == list(range(1000)) and ranking.order[0] == 777


@pytest.mark.parametrize("truncation", ["head", "chunk"])
def test_one_document_far_longer_than_the_window(qr_mini: Any, prompts: list[int], truncation: str) -> None:
    text = hay() + "\n\n" + DRACULA
    ranking = ranker(qr_mini, truncation=truncation, max_context_tokens=800).rank(QUERY, [text], explain=True)
    assert ranking.order == [0] and max(prompts) <= 800
    assert (ranking[0].num_tokens_cut == 0) == (truncation == "chunk")
    assert ("Dracula" in ranking[0].spans[0].text) == (truncation == "chunk")


@pytest.mark.parametrize("truncation", ["head", "chunk"])
def test_a_title_longer_than_the_window_is_no_way_around_it(qr_mini: Any, prompts: list[int], truncation: str) -> None:
    from qr_integrations import Document
    from qr_integrations.errors import WindowError

    documents = [Document(DRACULA, "a very long title " * 200), Document("Cats sleep.")]
    try:
        ranking = ranker(qr_mini, truncation=truncation, max_context_tokens=300).rank(QUERY, documents)
    except WindowError:
        return
    assert max(prompts) <= 300 and sorted(ranking.order) == [0, 1]


def test_the_last_prompt_fits_when_its_documents_are_many_and_short(qr_mini: Any, prompts: list[int]) -> None:
    # Four long documents fill one prompt to the brim, hundreds of short ones the others. Those have more to stand
    # between them, so fewer of their tokens fit.
    query = "who wrote dracula" + " and" * 36  # 64 tokens with what stands around it: no room is left over
    texts = ["the river and the mountain " * 200] * 4 + ["a"] * 257
    ranker(qr_mini, truncation="head", max_context_tokens=300).rank(query, texts)
    assert max(prompts) <= 300


def test_leading_white_space_is_not_what_is_kept_of_a_cut_document(qr_mini: Any) -> None:
    reranker = ranker(qr_mini, icr=True, truncation="head", max_doc_tokens=30)  # its prompt strips documents
    ((candidate,),) = windows_of(reranker, ["\n" * 500 + DRACULA * 20])
    assert candidate.read.text.strip().startswith("Dracula is an 1897")


# ---- head


@pytest.mark.parametrize(
    ("window", "count", "one"), [(2048, 6, True), (2048, 9, False), (440, 4, True), (440, 6, False)]
)
def test_one_prompt_if_enough_is_left_of_each_document(qr_mini: Any, window: int, count: int, one: bool) -> None:
    # 2,048 tokens leave about 320 and 210 for each of 6 and 9 documents; 440 leave a quarter and a sixth.
    given = passages(count, 1500)
    ranking = ranker(qr_mini, truncation="head", max_context_tokens=window).rank(QUERY, given)
    assert ({item.window for item in ranking} == {0}) == one
    assert all(item.num_tokens_cut > 0 for item in ranking) and sorted(ranking.order) == list(range(count))
    least = min(256, (window - 128) // 4) - 16
    assert all(item.num_tokens >= least for item in ranking)
    if one:
        assert sum(item.num_tokens for item in ranking) > 0.8 * (window - 64)  # the room is used


def test_short_documents_stay_whole_beside_cut_ones(qr_mini: Any) -> None:
    given = [*passages(5, 10), *passages(3, 2000)]
    ranking = ranker(qr_mini, truncation="head", max_context_tokens=1200).rank(QUERY, given)
    assert {item.index for item in ranking if item.num_tokens_cut} == {5, 6, 7} and {i.window for i in ranking} == {0}


# ---- chunk


@pytest.mark.parametrize("limits", [{"max_doc_tokens": 64}, {"max_context_tokens": 700}])
def test_a_needle_at_the_end_is_found_in_pieces_and_not_in_heads(qr_mini: Any, limits: dict[str, Any]) -> None:
    given = [*passages(3), hay() + "\n\n" + DRACULA, *passages(5)]
    in_pieces = ranker(qr_mini, truncation="chunk", **limits).rank(QUERY, given, explain=True)
    assert in_pieces.order[0] == 3 and in_pieces[0].num_tokens_cut == 0
    assert in_pieces[0].spans[0].span.start >= len(hay()) and "Dracula" in in_pieces[0].spans[0].text
    heads = ranker(qr_mini, truncation="head", **limits).rank(QUERY, given)
    found = next(item for item in heads if item.index == 3)
    assert heads.order[0] != 3 and found.num_tokens_cut > 0


def test_num_tokens_are_those_of_the_whole_document(qr_mini: Any) -> None:
    given = passages(3, 300)
    whole = ranker(qr_mini).rank(QUERY, given)
    pieces = ranker(qr_mini, truncation="chunk", max_doc_tokens=50).rank(QUERY, given)
    assert {i.index: i.num_tokens for i in whole} == {i.index: i.num_tokens for i in pieces}


# ---- error


def test_error_does_the_arithmetic(qr_mini: Any) -> None:
    from qr_integrations.errors import WindowError

    given = passages(3, 60)
    with pytest.raises(WindowError, match=r"document #0 has \d\d tokens, more than max_doc_tokens=20: pass .*chunk"):
        ranker(qr_mini, max_doc_tokens=20).rank(QUERY, given)
    needs = r"needs (\d+) tokens \(3 documents, longest #\d with \d+; query .* \d+\), the model holds 150: pass"
    with pytest.raises(WindowError, match=needs) as caught:
        ranker(qr_mini, max_context_tokens=150).rank(QUERY, given)
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    assert len(ranker(qr_mini, max_context_tokens=needed).rank(QUERY, given)) == 3  # no token more
    with pytest.raises(WindowError, match=needs.replace("150", str(needed - 1))):
        ranker(qr_mini, max_context_tokens=needed - 1).rank(QUERY, given)


def test_error_with_batches_cuts_nothing(qr_mini: Any) -> None:
    ranking = ranker(qr_mini, batch_size=3).rank(QUERY, [*passages(7, 40), DRACULA])
    assert ranking.order[0] == 7 and sorted(ranking.order) == list(range(8))
    assert len({item.window for item in ranking}) > 1 and all(item.num_tokens_cut == 0 for item in ranking)


# ---- one scale


def alike(count: int, num_tokens: int, qr_mini: Any) -> tuple[str, list[str]]:
    """A question, and passages of the same length, so that a query behind any of them stands at the same position."""
    from qr_integrations.bundled import read_sample

    sample, tokenizer = read_sample()[0], qr_mini.tokenizer
    ids = [
        tokenizer(document.text, add_special_tokens=False)["input_ids"][:num_tokens] for document in sample.documents
    ]
    return sample.question, [tokenizer.decode(some) for some in ids[:count]]


def scores_of(ranking: Any) -> list[float]:
    return [item.score for item in sorted(ranking, key=lambda item: item.index)]


LAYER_0 = [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize(
    ("heads", "layout", "within"), [(LAYER_0, "block", 0.005), ("auto", "block", 0.1), ("auto", "joint", 0.1)]
)
def test_as_many_as_rivals_score_in_several_prompts_as_in_one(
    qr_mini: Any, heads: Any, layout: str, within: float
) -> None:
    """What differs is which tokens are outliers, and above layer 0 what the query read in its own prompt."""
    question, texts = alike(16, 40, qr_mini)
    options = {"heads": heads, "refinements": {"layout": layout}}
    whole = scores_of(ranker(qr_mini, **options).rank(question, texts))
    several = scores_of(ranker(qr_mini, batch_size=4, **options).rank(question, texts))
    raw = scores_of(ranker(qr_mini, batch_size=4, merge="raw", **options).rank(question, texts))
    assert several == pytest.approx(whole, abs=within * max(whole))
    assert raw != pytest.approx(whole, abs=max(whole))


def test_in_another_order_blocks_meet_others_and_their_scores_hardly_change(qr_mini: Any) -> None:
    question, texts = alike(16, 40, qr_mini)
    order = random.Random(0).sample(range(16), 16)
    for heads, within in ((LAYER_0, 0.02), ("auto", 0.1)):
        reranker = ranker(qr_mini, heads=heads, batch_size=4, refinements={"layout": "block"})
        straight = scores_of(reranker.rank(question, texts))
        shuffled = scores_of(reranker.rank(question, [texts[i] for i in order]))
        assert shuffled == pytest.approx([straight[i] for i in order], abs=within * max(straight))


def test_the_order_within_prompts_of_blocks_makes_no_difference(qr_mini: Any) -> None:
    question, texts = alike(12, 60, qr_mini)
    reranker = ranker(qr_mini, batch_size=4, refinements={"layout": "block"})
    turned = [texts[4 * window + place] for window in range(3) for place in (3, 1, 0, 2)]
    found = {texts[item.index]: item.score for item in reranker.rank(question, texts)}
    again = {turned[item.index]: item.score for item in reranker.rank(question, turned)}
    assert again == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("layout", ["joint", "block"])
def test_a_document_twice_is_two_neighbours_wherever_they_are_read(qr_mini: Any, layout: str) -> None:
    given = [DRACULA, *passages(9, 20), DRACULA]
    ranking = ranker(qr_mini, batch_size=4, refinements={"layout": layout}).rank(QUERY, given)
    assert set(ranking.order[:2]) == {0, 10} and {ranking[0].window, ranking[1].window} == {0, 2}
    assert ranking[1].score > 0.8 * ranking[0].score > 4 * ranking[2].score


def test_answers_that_share_a_prompt_come_before_the_best_of_prompts_without(qr_mini: Any) -> None:
    answers = [f"{DRACULA} It is about a {thing}." for thing in ("vampire", "count", "castle", "lawyer")]
    given = [*answers, "Dracula is a film.", *passages(3), "Bram was a king.", *passages(3)]
    assert set(ranker(qr_mini, batch_size=4).rank(QUERY, given).order[:4]) == {0, 1, 2, 3}


def test_orders_are_put_on_one_scale_each(qr_mini: Any) -> None:
    given = [*passages(7, 20), DRACULA]
    refinements = {"orders": 2}
    ranking = ranker(qr_mini, batch_size=4, refinements=refinements).rank(QUERY, given)
    assert ranking.order[0] == 7 and sorted(ranking.order) == list(range(8))
    turned = ranker(qr_mini, batch_size=4, refinements=refinements).rank(QUERY, [*given[3::-1], *given[:3:-1]])
    assert sorted(scores_of(turned)) == pytest.approx(sorted(scores_of(ranking)), abs=1e-5)


def test_without_calibration_scores_are_shares_among_rivals(qr_mini: Any) -> None:
    ranking = ranker(qr_mini, batch_size=4, calibrated=False).rank(QUERY, [*passages(7, 20), DRACULA])
    assert all(0.0 < item.score < 1.0 * len(ranker(qr_mini).heads.heads) for item in ranking)


def test_queries_asked_a_few_at_a_time_give_the_same(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations import DocumentIndex
    from qr_integrations.retrieval import window_scores

    queries = [QUERY, "which river flows through vienna", "what do cats do"]
    index = DocumentIndex.build(
        [*passages(7, 20), DRACULA], ranker(qr_mini, icr=True, batch_size=4, truncation="chunk")
    )
    assert len(index.windows) > 1
    at_once = index.rank_batch(queries)
    monkeypatch.setattr(window_scores, "_ROOM", 1)
    for one, other in zip(at_once, index.rank_batch(queries), strict=True):
        assert one.order == other.order
        assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_a_way_to_merge_that_there_is_not(qr_mini: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"unknown merge 'anchor': pass 'one_scale', 'final' or 'raw'"):
        ranker(qr_mini, merge="anchor")


# ---- the play-off


def test_the_best_have_the_scores_of_the_last_prompt(qr_mini: Any) -> None:
    given = [*passages(14, 30), DRACULA]
    reranker = ranker(qr_mini, truncation="head", batch_size=4, merge="final")
    ranking = reranker.rank(QUERY, given)
    heats = windows_of(reranker, given)
    last = [item for item in ranking if item.window == len(heats)]
    assert len(last) == 4 and list(ranking[:4]) == last
    alone = sorted(item.index for item in last)
    again = {alone[item.index]: item.score for item in ranker(qr_mini).rank(QUERY, [given[i] for i in alone])}
    assert {item.index: item.score for item in last} == pytest.approx(again, abs=1e-6)
    for number, heat in enumerate(heats):  # the best of each prompt is there, the others say where they were read
        places = [piece.index for piece in heat]
        best = ranker(qr_mini).rank(QUERY, [given[i] for i in places]).order[0]
        assert places[best] in alone
        assert all(item.window in (number, len(heats)) for item in ranking if item.index in places)


def test_the_best_of_several_prompts_are_the_first_of_all(qr_mini: Any) -> None:
    reranker = ranker(qr_mini, truncation="head", batch_size=4)
    whole, best = reranker.rank(QUERY, passages(9)), reranker.rank(QUERY, passages(9), 6)
    assert best.order == whole.order[:6]
    assert [item.score for item in best] == pytest.approx([item.score for item in whole[:6]], abs=1e-6)


def test_one_prompt_is_number_zero(qr_mini: Any) -> None:
    assert {i.window for i in ranker(qr_mini, truncation="head", batch_size=4).rank(QUERY, passages(4))} == {0}


@pytest.mark.parametrize(("merge", "total"), [("one_scale", 4), ("raw", 4), ("final", 5)])
def test_progress_counts_the_prompts(qr_mini: Any, prompts: list[int], merge: str, total: int) -> None:
    calls: list[tuple[int, int]] = []
    reranker = ranker(qr_mini, truncation="head", batch_size=4, merge=merge)
    ranking = reranker.rank(QUERY, passages(14), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert max(item.window for item in ranking) == total - 1
    assert len(prompts) == 2 * total  # each with its null query


def test_explained_words_are_of_the_right_document(qr_mini: Any) -> None:
    given = [*passages(6, 30), DRACULA, *passages(3)]
    reranker = ranker(qr_mini, truncation="head", batch_size=3)
    for index in (0, 5, 6, 9):
        words = reranker.explain(QUERY, given, index)
        assert [given[index][word.span.slice()] for word in words] == [word.text for word in words]
        assert words[0].text == given[index].split()[0] and len(words) >= len(given[index].split()) - 1


# ---- tokenizers that cannot tell the characters of a token


class Characters(PreTrainedTokenizer):
    """Python only, one token per character."""

    vocab_size = 300

    def get_vocab(self) -> dict[str, int]:
        return {}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) % 300

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


@pytest.fixture(scope="module")
def characters() -> Any:
    from qr_integrations import Backend

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
    )
    return Backend(LlamaForCausalLM(config).eval(), Characters())


@pytest.mark.parametrize("truncation", ["head", "chunk"])
def test_without_offsets_all_is_read_in_prompts_that_fit(characters: Any, prompts: list[int], truncation: str) -> None:
    reranker = ranker(characters, heads=[(0, 0)], truncation=truncation, max_context_tokens=600)
    given = [*passages(5, 20), "東京 🙂 " * 200, "", DRACULA]
    ranking = reranker.rank(QUERY, given)
    assert sorted(ranking.order) == list(range(8)) and max(prompts) <= 600
    assert [item.score for item in ranking] == sorted((item.score for item in ranking), reverse=True)
    read = "".join(piece.read.text for window in windows_of(reranker, given) for piece in window)
    assert ("".join(read.split()) == "".join("".join(given).split())) == (truncation == "chunk")


def test_without_offsets_words_cannot_be_told_and_that_is_said(characters: Any) -> None:
    from qr_integrations.errors import ModelError

    reranker = ranker(characters, heads=[(0, 0)])
    assert len(reranker.rank(QUERY, [DRACULA, "Cats."])) == 2
    for explain in (lambda: reranker.rank(QUERY, [DRACULA], explain=True), lambda: reranker.explain(QUERY, ["a"], 0)):
        with pytest.raises(ModelError, match=r"does not tell the characters of its tokens: load .*tokenizer\.json"):
            explain()
