"""Answers behind a prefix, against a loop of plain passes with the mask and the positions written out."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit

from qr_integrations.backend import Backend, Prefix, cut, join, pack
from qr_integrations.backend.behind_prefix import continued_behind, lay_out_behind
from qr_integrations.cropping import ViCrop
from qr_integrations.decoding import DeCo
from qr_integrations.errors import InputError, UnsupportedModelError, WindowError
from qr_integrations.pruning import CDPruner
from qr_integrations.types import Answer, Message, Span
from tests.backend import measure
from tests.backend.architectures import Architecture
from tests.backend.measure import Bench, named, random_ids, tiny_tokenizer

FAMILIES = ["Llama", "Qwen3", "GPT-NeoX", "GPT-2", "OPT", "OLMo 2", "Gemma 2", "SmolLM3", "GPT-OSS", "Qwen2.5-VL"]
FAMILIES += ["DeepSeek-V3", "Gemma 3n", "BioGPT"]
RECURRENT = ["Qwen3-Next", "Jamba", "LFM2", "RecurrentGemma"]
WIDE = ["Llama", "Qwen3", "GPT-NeoX", "GPT-2", "OPT", "OLMo 2", "SmolLM3", "Qwen2.5-VL", "DeepSeek-V3", "BioGPT"]
BLOCKS = (Span(4, 11), Span(11, 13), Span(13, 18))
GAPS = (Span(0, 4), Span(7, 11), Span(14, 18))
STOP, TOTAL, NEW = 18, 24, 5


@lru_cache(maxsize=4)
def bench(architecture: Architecture) -> Bench:
    """With a tokenizer that takes words apart."""
    on, tokenizer = measure.bench(architecture), tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return replace(on, backend=Backend(on.backend.model, tokenizer, name=architecture.name))


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def last(on: Bench) -> int:
    return int(on.backend.config.num_hidden_layers) - 1


def whole(on: Bench, ids: Sequence[int]) -> Prefix:
    return on.backend.prefill(ids, top_layer=last(on), values=True)


def with_gaps(on: Bench, ids: Sequence[int]) -> Prefix:
    pieces = cut(whole(on, ids), GAPS)
    return join(pieces, dtype=torch.float32, next_position=STOP)


def said(on: Bench, prefix: Prefix, tail: Sequence[int], **settings: Any) -> tuple[list[int], torch.Tensor]:
    """New tokens, and the logits that each was chosen from, ``[N, V]``."""
    prompt = lay_out_behind(on.backend, (Message.user(words(tail)),), prefix)
    inputs = continued_behind(on.backend, prompt, prefix, settings.get("num_beams", 1))
    out = on.backend.model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def expected(
    on: Bench, ids: Sequence[int], mask: torch.Tensor | None = None, positions: Sequence[int] | None = None
) -> tuple[list[int], torch.Tensor]:
    """The same by plain passes over everything, nothing kept; what comes new sees all that its last row sees."""
    known, logits = list(ids), []
    for _ in range(NEW):
        total = len(known)
        given: dict[str, Any] = {}
        if mask is not None and positions is not None:
            visible = torch.ones(total, total).tril().bool()
            visible[: len(ids), : len(ids)] = mask
            visible[len(ids) :, : len(ids)] = mask[-1]
            given["attention_mask"] = torch.zeros(total, total).masked_fill(~visible, torch.finfo(torch.float32).min)
            given["attention_mask"] = given["attention_mask"][None, None]
            further = range(positions[-1] + 1, positions[-1] + 1 + total - len(ids))
            given["position_ids"] = torch.tensor([[*positions, *further]])
        with torch.no_grad():
            out = on.eager(input_ids=torch.tensor([known]), use_cache=False, **given)
        row = out.logits[:, -1].float()
        logits.append(row)
        scores = row.clone()
        scores[:, on.backend.model.generation_config.eos_token_id] = -torch.inf
        known.append(int(scores.argmax()))
    return known[len(ids) :], torch.cat(logits)


def check_same(found: tuple[list[int], torch.Tensor], wanted: tuple[list[int], torch.Tensor]) -> None:
    assert found[0] == wanted[0]
    assert (found[1] - wanted[1]).abs().max() < 1e-5 * max(1.0, float(wanted[1].abs().max()))


# ---- what is said


@pytest.mark.parametrize("name", [*FAMILIES, *RECURRENT])
def test_a_plain_prefix_says_what_the_whole_text_says(name: str) -> None:
    on, ids = bench(named(name)), random_ids(TOTAL)
    check_same(said(on, whole(on, ids[:STOP]), ids[STOP:]), expected(on, ids))


@pytest.mark.parametrize("name", WIDE)
def test_blocks_say_what_their_mask_and_positions_say(name: str) -> None:
    on, ids = bench(named(name)), random_ids(TOTAL)
    prefix = on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=last(on), values=True)
    mask = torch.ones(TOTAL, TOTAL).tril().bool()
    positions = list(range(TOTAL))
    for block in BLOCKS:
        mask[block.slice(), 4 : block.start] = False
        positions[block.slice()] = range(4, 4 + len(block))
    positions[STOP:] = range(11, 11 + TOTAL - STOP)
    check_same(said(on, prefix, ids[STOP:]), expected(on, ids, mask, positions))


@pytest.mark.parametrize("name", WIDE)
def test_gaps_stay_open(name: str) -> None:
    """Tokens that were left out are masked for what follows, and were seen by what was read before."""
    on, ids = bench(named(name)), random_ids(TOTAL)
    mask = torch.ones(TOTAL, TOTAL).tril().bool()
    for gone in (Span(4, 7), Span(11, 14)):
        mask[STOP:, gone.slice()] = False
    check_same(said(on, with_gaps(on, ids[:STOP]), ids[STOP:]), expected(on, ids, mask, range(TOTAL)))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_beams_find_what_they_find_in_the_whole_text(name: str) -> None:
    on, ids = bench(named(name)), random_ids(TOTAL)
    tokens, _ = said(on, whole(on, ids[:STOP]), ids[STOP:], num_beams=3)
    out = on.backend.model.generate(
        torch.tensor([ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=3
    )
    assert tokens == out[0, TOTAL:].tolist()


def test_what_is_kept_as_other_numbers_is_read() -> None:
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    prefix = whole(on, ids[:STOP])
    exact = said(on, prefix, ids[STOP:])[1][0]
    for dtype, limit in (("float32", 1e-5), ("int8", 0.1)):
        kept = said(on, pack(prefix, dtype=dtype), ids[STOP:])[1][0]
        assert (kept - exact).norm() < limit * exact.norm()


# ---- what it cannot stand on


def test_a_prefix_that_lacks_layers_or_values_says_how_to_get_them() -> None:
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    for prefix in (on.backend.prefill(ids, top_layer=1, values=True), on.backend.prefill(ids, top_layer=last(on))):
        with pytest.raises(InputError, match="answers=True"):
            on.backend.answer("w5", prefix=prefix)
    with pytest.raises(InputError, match="answers=True"):
        on.backend.answer("w5", prefix=pack(whole(on, ids), top_heads=(0,)))


def test_another_models_prefix_is_refused() -> None:
    on, other, ids = bench(named("Llama")), bench(named("Qwen3")), random_ids(TOTAL)
    with pytest.raises(InputError, match="another model's"):
        on.backend.answer("w5", prefix=whole(other, ids))
    same_shape = bench(named("OLMo 2"))
    with pytest.raises(InputError, match="another model's"):
        on.backend.answer("w5", prefix=whole(same_shape, ids))
    with pytest.raises(InputError, match="another model's"):
        on.backend.answer("w5", prefix=replace(whole(on, ids), token_ids=tuple(i + 100 for i in ids)))


def test_sliding_layers_refuse_gaps_that_their_mask_does_not_know() -> None:
    on = bench(named("Mistral"))
    with pytest.raises(UnsupportedModelError, match="see 8 tokens back"):
        on.backend.answer("w5", prefix=with_gaps(on, random_ids(STOP)))


@pytest.mark.parametrize("steps", [{"num_visual_tokens": 4}, {"prune": CDPruner(keep=4)}, {"crop": ViCrop()}])
def test_what_reads_pictures_does_not_go_with_a_prefix(steps: dict[str, Any]) -> None:
    on = bench(named("Llama"))
    with pytest.raises(InputError, match=f"leave out {next(iter(steps))} or prefix"):
        on.backend.answer("w5", prefix=whole(on, random_ids()), **steps)


@pytest.mark.parametrize(
    "messages", [[Message.user("w5"), Message.assistant("w6"), Message.user("w7")], [Message.system("w5")]]
)
def test_a_conversation_has_no_place_behind_a_prefix(messages: list[Message]) -> None:
    on = bench(named("Llama"))
    with pytest.raises(InputError, match="one text"):
        on.backend.answer(messages, prefix=whole(on, random_ids()))


def test_positions_count_against_the_window() -> None:
    on, ids = bench(named("Llama")), random_ids(STOP)
    far = replace(with_gaps(on, ids), next_position=126)
    with pytest.raises(WindowError, match="128"):
        on.backend.answer("w5 w6", prefix=far)
    assert on.backend.answer("w5", prefix=far, max_new_tokens=9).usage.completion_tokens == 1


# ---- the answer, through the front door


TAIL = "\n\nPlease answer the following question based on the information in the paragraphs above.\n\nQuery: who?"
FRONT = "Here are some paragraphs:\n\n[1] Dracula was written by Bram Stoker."


@pytest.fixture(scope="module")
def kept(qr_mini: Backend) -> Prefix:
    ids = qr_mini.tokenizer(qr_mini.chat.opening + FRONT, add_special_tokens=False)["input_ids"]
    return qr_mini.prefill(ids, top_layer=3, values=True)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"temperature": 0.9, "seed": 3},
    {"repetition_penalty": 1.5},
    {"stop": ["e"]},
    {"deco": DeCo(layers=(1, 2))},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_answers_are_those_of_the_whole_prompt(qr_mini: Backend, kept: Prefix, settings: dict[str, Any]) -> None:
    plain = qr_mini.answer(FRONT + TAIL, max_new_tokens=8, **settings)
    found = qr_mini.answer(TAIL, prefix=kept, max_new_tokens=8, **settings)
    assert (found.text, found.finish_reason, found.usage) == (plain.text, plain.finish_reason, plain.usage)
    assert found.steps["prefix"] == len(kept) and "prefix" not in plain.steps
    assert ("deco" in found.steps) == ("deco" in settings)


def test_only_what_follows_is_read(qr_mini: Backend, kept: Prefix, lengths_read: list[int]) -> None:
    qr_mini.answer(TAIL, prefix=kept, max_new_tokens=3)
    tail = qr_mini.tokenizer(TAIL + qr_mini.chat.closing, add_special_tokens=False)["input_ids"]
    assert lengths_read == [1, len(tail), 1, 1]  # the first looks whose prefix it is


def test_threads_share_a_prefix_that_stays_as_it_is(qr_mini: Backend, kept: Prefix) -> None:
    assert kept.cache is not None
    before = [(layer.keys.clone(), layer.values.clone()) for layer in kept.cache.layers]
    questions = [TAIL.replace("who", word) for word in ("who", "what", "when", "where")]
    alone = [qr_mini.answer(question, prefix=kept, max_new_tokens=2).text for question in questions]

    def ask(number: int) -> Answer:
        beams = {"num_beams": 2} if number >= 12 else {}
        return qr_mini.answer(questions[number % 4], prefix=kept, max_new_tokens=2, **beams)

    with ThreadPoolExecutor(16) as pool:
        together = [answer.text for answer in pool.map(ask, range(16))]
    assert together[:12] == alone * 3
    for layer, (keys, values) in zip(kept.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_stream_says_the_same(qr_mini: Backend, kept: Prefix) -> None:
    whole_answer = qr_mini.answer(TAIL, prefix=kept, max_new_tokens=8)
    *pieces, end = qr_mini.stream(TAIL, prefix=kept, max_new_tokens=8)
    assert "".join(piece.delta for piece in pieces) == whole_answer.text
    assert end.answer is not None and end.answer.steps["prefix"] == len(kept)
