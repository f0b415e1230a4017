"""A list that does not fit into memory is ranked in shorter prompts; nothing of the failed pass stays behind."""

from typing import Any

import pytest
import torch


@pytest.fixture
def holds_1200_tokens(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From here on, a pass over more than 1,200 tokens ends as on a GPU that is full. Lists the lengths tried."""
    decoder = type(qr_mini.decoder)
    forward, lengths = decoder.forward, []

    def limited(self: Any, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1] + (past_key_values.get_seq_length() if past_key_values is not None else 0))
        if lengths[-1] > 1200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(decoder, "forward", limited)
    return lengths


@pytest.mark.parametrize("truncation", ["head", "chunk"])
def test_out_of_memory_ranks_again_in_shorter_prompts(
    qr_mini: Any, holds_1200_tokens: list[int], truncation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample

    question = read_sample()[0]
    ranking = QRHeadReranker(qr_mini, truncation=truncation).rank(question.question, question.documents)
    assert max(holds_1200_tokens) > 1200, "the whole list was tried first"
    assert sorted(ranking.order) == list(range(len(question.documents)))
    assert ranking[0].index == question.gold and ranking[0].window > 0
    assert "out of memory: ranking again" in caplog.text
    assert ranking.notes == ranking.top(1).notes == ("out of memory: ranking again in prompts of 1,299 tokens",)


def test_what_was_done_as_asked_has_no_notes(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    assert QRHeadReranker(qr_mini, truncation="head").rank("who wrote dracula", ["Cats sleep."]).notes == ()


def test_out_of_memory_in_the_middle_begins_again_and_loses_nothing(
    qr_mini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample

    question = read_sample()[0]
    undisturbed = QRHeadReranker(qr_mini, truncation="head", max_context_tokens=2000)
    expected = len({item.window for item in undisturbed.rank(question.question, question.documents)})
    decoder, passes = type(qr_mini.decoder), [0]
    forward = decoder.forward

    def full_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        if passes[0] == 6:  # the first prompt took four: its documents two, the null query, the query
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", full_once)
    reranker = QRHeadReranker(qr_mini, truncation="head", max_context_tokens=2000)
    ranking = reranker.rank(question.question, question.documents)
    assert sorted(ranking.order) == list(range(len(question.documents))) and ranking[0].index == question.gold
    assert len({item.window for item in ranking}) > expected > 1 and len(ranking.notes) == 1


def test_it_is_the_same_as_asking_for_shorter_prompts(qr_mini: Any, holds_1200_tokens: list[int]) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample

    question = read_sample()[0]
    rescued = QRHeadReranker(qr_mini, truncation="head").rank(question.question, question.documents)
    tokens = sum(item.num_tokens for item in rescued)
    asked = QRHeadReranker(qr_mini, truncation="head", max_context_tokens=tokens // 2)
    assert rescued.items == asked.rank(question.question, question.documents).items


def test_truncation_error_cuts_nothing_and_says_what_to_pass(qr_mini: Any, holds_1200_tokens: list[int]) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample
    from qr_integrations.errors import MemoryLimitError

    question = read_sample()[0]
    reranker = QRHeadReranker(qr_mini)
    with pytest.raises(MemoryLimitError, match=r"out of memory.*pass fewer documents, max_context_tokens"):
        reranker.rank(question.question, question.documents)
    assert reranker.rank("who wrote dracula", ["Cats sleep.", "Dracula was written by Bram Stoker."])[0].index == 1


def test_a_pass_of_another_kind_of_error_is_not_retried(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations import QRHeadReranker

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("something else")

    reranker = QRHeadReranker(qr_mini, truncation="head")
    monkeypatch.setattr(type(qr_mini.decoder), "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        reranker.rank("who wrote dracula", ["Cats sleep."])
