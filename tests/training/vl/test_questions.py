"""Questions: answers are true of the scene, words are known, packing changes no logit."""

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
    from training.vl.world import draw_scene

    rng = random.Random(seed)
    return rng, draw_scene(rng)


def truth(scene: Any, question: Any) -> str:
    """The answer, worked out from the words of the question."""
    from training.vl.questions import NUMBERS
    from training.vl.world import COLOURS, KINDS, PLURALS

    words = question.text.split()
    colours, kinds = [w for w in words if w in COLOURS], [w for w in words if w in KINDS]
    if question.skill == "count":
        kind = next(KINDS[PLURALS.index(w)] for w in words if w in PLURALS)
        return NUMBERS[sum(t.kind == kind for t in scene.things) - 1]
    meant = [t for t in scene.things if (not colours or t.colour in colours) and (not kinds or t.kind in kinds)]
    if question.skill == "presence":
        return "yes" if meant else "no"
    assert len(meant) == 1, question
    (thing,) = meant
    side = "left" if thing.centre[0] < scene.width / 2 else "right"
    by_skill = {"color": thing.colour, "shape": thing.kind, "side": side}
    return by_skill.get(question.skill, thing.mark)


def test_answers_are_true_and_every_word_is_known(processor: Any) -> None:
    from training.vl.questions import SKILLS, ask, ask_caption, named_things

    asked, unknown = set(), processor.tokenizer.unk_token_id
    for seed in range(300):
        rng, scene = drawn(seed)
        for question in ask(rng, scene, 8):
            assert question.answer == truth(scene, question), question
            asked.add(question.skill)
        caption = ask_caption(rng, scene)
        assert named_things(caption.answer) == [(t.colour, t.kind) for t in scene.things]
        for text in (question.text, question.answer, caption.text, caption.answer):
            assert unknown not in processor.tokenizer.encode(text)
            assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text
    assert asked | {"caption"} == set(SKILLS)


def test_yes_and_no_are_equally_frequent() -> None:
    from training.vl.questions import ask_presence

    answers = [ask_presence(*drawn(seed)).answer for seed in range(600)]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_the_chat_template_gives_the_tokens_that_training_uses(processor: Any, sizes: Any) -> None:
    from training.vl.packing import Example, Packer
    from training.vl.questions import Question
    from training.vl.render import render
    from training.vl.views import whole

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
