"""Questions as the model reads them: words are known, packing changes no logit."""

import hashlib
import random
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def sizes() -> Any:
    from training.vl.model import Sizes

    return Sizes(56, 14, 3, 32, 2, 48, 2, 32, 2, 48)


@pytest.fixture(scope="module")
def processor(sizes: Any) -> Any:
    from training.vl.model import build_processor

    return build_processor(sizes)


@pytest.fixture(scope="module")
def model(sizes: Any, processor: Any) -> Any:
    from training.vl.model import build_model

    return build_model(sizes, processor.tokenizer).eval()


def drawn(seed: int) -> tuple[random.Random, Any]:
    from qr_integrations.evaluation.drawn_world.world import draw_scene

    rng = random.Random(seed)
    return rng, draw_scene(rng)


def test_every_word_is_known(processor: Any) -> None:
    from qr_integrations.evaluation.drawn_world.questions import ask, ask_caption

    unknown = processor.tokenizer.unk_token_id
    for seed in range(300):
        rng, scene = drawn(seed)
        for question in [*ask(rng, scene, 8), ask_caption(rng, scene)]:
            for text in (question.text, question.answer):
                assert unknown not in processor.tokenizer.encode(text)
                assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_words_and_their_numbers_are_those_that_were_trained(processor: Any) -> None:
    words = sorted(processor.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    digest = hashlib.sha256("|".join(word for word, _ in words).encode()).hexdigest()
    assert digest[:16] == "5ac48e74521159f8"


def test_the_chat_template_gives_the_tokens_that_training_uses(processor: Any, sizes: Any) -> None:
    from qr_integrations.evaluation.drawn_world.questions import Question
    from qr_integrations.evaluation.drawn_world.render import render
    from qr_integrations.evaluation.drawn_world.views import whole
    from training.vl.packing import Example, Packer

    _, scene = drawn(4)
    question = Question("what color is the ball ?", "red", "color", 0)
    packer = Packer(processor.tokenizer, sizes)
    for count in (1, 2):
        words = {"type": "text", "text": "What color is the ball?"}
        message = {"role": "user", "content": [*[{"type": "image"}] * count, words]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        given = processor(images=[render(scene)] * count, text=text, return_tensors="pt")
        packed = packer.pack([Example((whole(scene, sizes.resolution),) * count, (question,))])
        assert given["input_ids"].tolist() == packed.input_ids[:, :-1].tolist()  # without the answer
        assert given["pixel_values"].shape == packed.pixel_values.shape
        assert (given["pixel_values"] - packed.pixel_values).abs().mean() < 0.1


@pytest.mark.parametrize("pair", [False, True])
def test_packed_questions_have_the_logits_they_have_alone(model: Any, processor: Any, sizes: Any, pair: bool) -> None:
    from training.vl.packing import Example, Packer, answer_logits, draw_example

    packer = Packer(processor.tokenizer, sizes)
    examples = [draw_example(random.Random(seed), 1.0, pair, sizes.resolution) for seed in (1, 2)]
    assert len(examples[0].views) == 1 + pair
    with torch.no_grad():
        together = answer_logits(model, packer.pack(examples))
        alone = []
        for example in examples:
            for question in example.questions:
                batch = packer.pack([Example(example.views, (question,))])
                plain = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits[0]
                alone.append(plain[batch.targets[0] >= 0])
    assert len(alone) > 6
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


def test_a_question_does_not_see_the_others(model: Any, processor: Any, sizes: Any) -> None:
    from training.vl.packing import Packer, draw_example

    packed = Packer(processor.tokenizer, sizes).pack([draw_example(random.Random(7), 1.0, False, sizes.resolution)])
    seen = packed.mask()[0, 0] == 0
    branch = packed.branch[0]
    for row in (int((branch == 2).nonzero()[-1]), int((branch == 1).nonzero()[0])):
        visible = set(branch[seen[row]].tolist())
        assert visible == {0, int(branch[row])}
        assert not seen[row, row + 1 :].any()


def test_questions_about_what_no_view_shows_are_rare() -> None:
    from training.vl.packing import draw_example, is_clear

    examples = [draw_example(random.Random(seed), 1.0, False, 140) for seed in range(150)]
    clear = [is_clear(q, e.views) for e in examples for q in e.questions]
    assert 0.7 < sum(clear) / len(clear) < 1.0
