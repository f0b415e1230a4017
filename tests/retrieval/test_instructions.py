"""Instructions: where they stand in the prompt, and how much of them the null query keeps. Against eager attention."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

QUERY = "who wrote it"
DOCUMENTS = [
    "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
    "The Danube flows through Vienna and Budapest.",
    "Frankenstein was written by Mary Shelley.",
    "Cats sleep most of the day.",
]
VAMPIRES = "Only novels about vampires are relevant."
RIVERS = "Only rivers are relevant."
TASK = "Please find information that are relevant to the following query in the paragraphs above."


def documents() -> list[Any]:
    from qr_integrations import Document

    return [Document(text) for text in DOCUMENTS]


def query(text: str = QUERY, instruction: str | None = None) -> Any:
    from qr_integrations.retrieval.layout import Query

    return Query(text, instruction)


def scores(ranking: Any) -> list[float]:
    return [item.score for item in sorted(ranking, key=lambda item: item.index)]


def token_scores(reranker: Any, instruction: str | None) -> torch.Tensor:
    scores_KT = reranker.scorer.score(query(instruction=instruction), documents())[1]
    return scores_KT[0]


@pytest.fixture(scope="module")
def eager(qr_mini: Any) -> Any:
    """Attention that heads pay to the tokens before the task, from transformers alone and a prompt written by hand."""
    from transformers import AutoModelForCausalLM

    from qr_integrations import HeadSet
    from qr_integrations.bundled import bundled_path

    folder = bundled_path("qr-mini")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    heads = HeadSet.load(folder / "qr_heads.json").heads

    @torch.no_grad()
    def attention(text: str, instruction: str | None) -> torch.Tensor:
        passages = [f"[{number}] {document}" for number, document in enumerate(DOCUMENTS, start=1)]
        asked = [TASK, *([instruction] if instruction else []), f"Query: {text}"]
        message = "\n\n".join(["Here are some paragraphs:", *passages, *asked])
        prompt = qr_mini.tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        out = qr_mini.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        task = [start for start, _ in out["offset_mapping"]].index(prompt.index(TASK))
        layers = model(torch.tensor([out["input_ids"]]), output_attentions=True).attentions
        return sum(layers[layer][0, head, task:, :task].mean(0) for layer, head in heads)

    return attention


# ---- the prompt


def test_the_instruction_stands_before_the_query_and_leaves_the_documents_alone(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    scorer = QRHeadReranker(qr_mini).scorer
    without, with_it = (scorer.layout(query(instruction=given), documents()) for given in (None, VAMPIRES))
    assert f"\n\n{TASK}\n\nQuery: {QUERY}<" in without.text
    assert f"\n\n{TASK}\n\n{VAMPIRES}\n\nQuery: {QUERY}<" in with_it.text
    assert without.text.replace("Query:", f"{VAMPIRES}\n\nQuery:") == with_it.text
    shared = without.shared.slice()
    assert with_it.shared == without.shared and with_it.token_ids[shared] == without.token_ids[shared]
    assert (with_it.documents, with_it.texts) == (without.documents, without.texts)
    assert np.array_equal(with_it.offsets[shared], without.offsets[shared])
    assert with_it.query.start == without.query.start and with_it.query.stop == len(with_it)  # its rows count too
    assert list(with_it.token_ids) == qr_mini.tokenizer(with_it.text, add_special_tokens=False)["input_ids"]


def test_an_instruction_for_one_call_takes_the_place_of_the_rerankers_own(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    plain, own = QRHeadReranker(qr_mini), QRHeadReranker(qr_mini, instruction=RIVERS)
    assert scores(own.rank(QUERY, DOCUMENTS)) == scores(plain.rank(QUERY, DOCUMENTS, instruction=RIVERS))
    assert scores(own.rank(QUERY, DOCUMENTS, instruction=VAMPIRES)) == scores(
        plain.rank(QUERY, DOCUMENTS, instruction=VAMPIRES)
    )
    different = {None: plain.rank(QUERY, DOCUMENTS), RIVERS: own.rank(QUERY, DOCUMENTS)}
    different[VAMPIRES] = own.rank(QUERY, DOCUMENTS, instruction=VAMPIRES)
    assert len({tuple(scores(ranking)) for ranking in different.values()}) == 3
    assert scores(own.rank(QUERY, DOCUMENTS)) == scores(different[RIVERS])  # for that call only


def test_words_and_single_heads_are_explained_with_the_instruction(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    plain, own = QRHeadReranker(qr_mini), QRHeadReranker(qr_mini, instruction=VAMPIRES)
    assert own.explain(QUERY, DOCUMENTS, 0) != plain.explain(QUERY, DOCUMENTS, 0)
    assert not torch.equal(own.score_per_head(QUERY, DOCUMENTS), plain.score_per_head(QUERY, DOCUMENTS))
    spans = own.rank(QUERY, DOCUMENTS, explain=True)[0].spans
    assert spans == plain.rank(QUERY, DOCUMENTS, explain=True, instruction=VAMPIRES)[0].spans


# ---- the null query


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_the_null_query_keeps_as_much_of_the_instruction_as_asked(qr_mini: Any, eager: Any, kept: float) -> None:
    from qr_integrations import QRHeadReranker

    asked, without, with_it = eager(QUERY, VAMPIRES), eager("N/A", None), eager("N/A", VAMPIRES)
    assert (without - with_it).abs().max() > 1e-3  # otherwise this proves nothing
    expected = asked - (1 - kept) * without - kept * with_it
    ours = token_scores(QRHeadReranker(qr_mini, null_instruction=kept), VAMPIRES)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_single_heads_are_calibrated_in_the_same_way(qr_mini: Any, kept: float) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini, null_instruction=kept)
    per_head = reranker.scorer.score(query(instruction=VAMPIRES), documents(), per_head=True)[1]
    torch.testing.assert_close(per_head.sum(0), token_scores(reranker, VAMPIRES), rtol=0, atol=1e-6)


def test_without_an_instruction_nothing_is_kept(qr_mini: Any, eager: Any) -> None:
    from qr_integrations import QRHeadReranker

    first, *others = (token_scores(QRHeadReranker(qr_mini, null_instruction=kept), None) for kept in (0.0, 0.3, 1.0))
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, eager(QUERY, None) - eager("N/A", None), rtol=0, atol=1e-5)


def test_without_calibration_there_is_no_null_query(qr_mini: Any, eager: Any) -> None:
    from qr_integrations import QRHeadReranker

    for kept in (0.0, 0.3, 1.0):
        reranker = QRHeadReranker(qr_mini, calibrated=False, null_instruction=kept)
        torch.testing.assert_close(token_scores(reranker, RIVERS), eager(QUERY, RIVERS), rtol=0, atol=1e-5)


def test_documents_that_the_instruction_names_move_up_and_less_so_against_a_null_with_it(qr_mini: Any) -> None:
    # 10 real questions. The instruction names the title of a passage that is not the answer. By how much does its
    # score change, compared with the other passages of the list?
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample

    changes: dict[float, list[float]] = {0.0: [], 1.0: []}
    rerankers = {kept: QRHeadReranker(qr_mini, null_instruction=kept) for kept in changes}
    for question in read_sample()[:10]:
        named = (question.gold + 7) % 20
        instruction = f"Only passages about {question.documents[named].title} are relevant."
        before = scores(rerankers[0.0].rank(question.question, question.documents))
        for kept, reranker in rerankers.items():
            after = scores(reranker.rank(question.question, question.documents, instruction=instruction))
            change = [b - a for a, b in zip(before, after, strict=True)]
            changes[kept].append(change.pop(named) - statistics.mean(change))
    less = [a - b for a, b in zip(changes[0.0], changes[1.0], strict=True)]
    found = {name: (statistics.mean(x), error(x)) for name, x in (("0", changes[0.0]), ("less", less))}
    for mean, standard_error in found.values():
        assert mean > 3 * standard_error, found


def error(numbers: list[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


# ---- what is kept in memory


def test_known_documents_are_not_read_again_for_another_instruction(qr_mini: Any, lengths_read: list[int]) -> None:
    from qr_integrations import QRHeadReranker

    for kept in (0.0, 0.3, 1.0):
        reranker = QRHeadReranker(qr_mini, null_instruction=kept)
        reranker.rank(QUERY, DOCUMENTS, instruction=RIVERS)
        lengths_read.clear()
        own = {given: len(reranker.scorer.layout(query(instruction=given), documents()).query) for given in (VAMPIRES,)}
        null = len(reranker.scorer.layout(query("N/A", VAMPIRES), documents()).query)
        reranker.rank(QUERY, DOCUMENTS, instruction=VAMPIRES)
        trunk = max(lengths_read)  # the task and the instruction; then the query, and what the null query adds to it
        assert lengths_read == [trunk, own[VAMPIRES] - trunk] + ([null - trunk] if kept else [])
        lengths_read.clear()
        reranker.rank(QUERY, DOCUMENTS, instruction=VAMPIRES)
        assert lengths_read == [own[VAMPIRES] - trunk]


def test_many_instructions_take_no_more_memory_than_some(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini, null_instruction=0.5)
    first = scores(reranker.rank(QUERY, DOCUMENTS, instruction=VAMPIRES))
    counts = []
    for number in range(40):
        reranker.rank(QUERY, DOCUMENTS, instruction=f"Only chapter {number} is relevant.")
        (known,) = reranker.scorer._known.values()
        counts.append(len(known.asked))
    assert max(counts) == counts[20] == counts[39] < 20
    assert scores(reranker.rank(QUERY, DOCUMENTS, instruction=VAMPIRES)) == pytest.approx(first, abs=1e-6)


# ---- the template


def prompt_of(reranker: Any, text: str, instruction: str | None = None) -> str:
    """What stands after the documents, as the user's words."""
    layout = reranker.scorer.layout(query(text, instruction), documents())
    return layout.text[layout.texts[-1].stop :].removesuffix(reranker.backend.chat.closing)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{query}", "\n\n{i}who?"),
        ("Find what answers: {query} Thanks.", "\n\n{i}Find what answers: who? Thanks."),
        ("Read.\n\nThen find:\n{query}\n\nBe quick.", "\n\nRead.\n\n{i}Then find:\nwho?\n\nBe quick."),
        ('Keep {x}, {} and {{ }}: "{query}"', '\n\n{i}Keep {x}, {} and {{ }}: "who?"'),
    ],
)
def test_the_query_stands_where_the_prompt_says(qr_mini: Any, template: str, expected: str) -> None:
    from qr_integrations import ICRReranker, QRHeadReranker

    for reranker in (QRHeadReranker(qr_mini, prompt=template), ICRReranker(qr_mini, prompt=template)):
        assert prompt_of(reranker, "who?") == expected.replace("{i}", "")
        assert prompt_of(reranker, "who?", "Only {query} of {x}.") == expected.replace(
            "{i}", "Only {query} of {x}.\n\n"
        )
        assert reranker.rank("who wrote dracula", DOCUMENTS).order[0] == 0


@pytest.mark.parametrize(
    "text", ["{query}", "{x}", "{", "what is {query} in {0}?", "\\1 \\g<0> %s", "two\n\nparagraphs"]
)
def test_braces_and_lines_in_a_query_are_left_alone(qr_mini: Any, text: str) -> None:
    from qr_integrations import ICRReranker, QRHeadReranker

    for reranker in (QRHeadReranker(qr_mini), ICRReranker(qr_mini)):
        assert prompt_of(reranker, text) == f"\n\n{TASK}\n\nQuery: {text}"
        assert prompt_of(reranker, text, VAMPIRES) == f"\n\n{TASK}\n\n{VAMPIRES}\n\nQuery: {text}"
        assert len(reranker.rank(text, DOCUMENTS)) == 4


@pytest.mark.parametrize("template", ["no place", "{query} and {query}", "{Query}", "{query", "{ query }", ""])
def test_a_prompt_without_one_place_for_the_query_is_an_error(qr_mini: Any, template: str) -> None:
    from qr_integrations import ICRReranker, QRHeadReranker
    from qr_integrations.errors import InputError

    for cls in (ICRReranker, QRHeadReranker):
        with pytest.raises(InputError, match=r"no place for the query: pass one with \{query\} in it, once"):
            cls(qr_mini, prompt=template)


def test_icr_strips_the_query_but_not_the_prompt_around_it(qr_mini: Any) -> None:
    from qr_integrations import ICRReranker

    assert prompt_of(ICRReranker(qr_mini, prompt="Find: {query} \n"), "  who? \n") == "\n\nFind: who? \n"
    answering = ICRReranker(qr_mini, retrieval_type="QA")
    assert "Please answer the following question" in prompt_of(answering, "who?")
    assert "Please" not in prompt_of(ICRReranker(qr_mini, retrieval_type="QA", prompt="{query}"), "who?")


@pytest.mark.parametrize("template", [" Find: {query}", "{query}", "\n{query}", "\t{query}"])
def test_a_prompt_that_begins_with_white_space_is_rewritten_as_it_is_written(qr_mini: Any, template: str) -> None:
    from qr_integrations.retrieval.layout import PromptStyle, PromptWriter

    writer = PromptWriter(qr_mini, PromptStyle(template))
    known = writer.write(query("N/A"), documents())
    for text in ("who?", " who?", "\n\nwho?"):
        ours: Any = writer.rewrite(known, query(text), documents())
        fresh: Any = writer.write(query(text), documents())
        assert ours.text == fresh.text and ours.token_ids == fresh.token_ids
        assert np.array_equal(ours.offsets, fresh.offsets) and ours.query == fresh.query


@pytest.mark.parametrize("kept", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_none_and_all(qr_mini: Any, kept: float) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"null_instruction is a share.*pass a number from 0 to 1"):
        QRHeadReranker(qr_mini, null_instruction=kept)
