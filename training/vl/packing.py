"""Many questions about the same pictures in one sequence: each sees the pictures and itself, never the others.

A question in a packed sequence has the same mask and the same positions as alone, so it also has the same logits, while
the pictures, by far the longest part, are read once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from qr_integrations.evaluation.drawn_world.questions import SHORT, Question, ask, ask_about, ask_caption
from qr_integrations.evaluation.drawn_world.views import View, whole
from qr_integrations.evaluation.drawn_world.world import Difficulty, draw_scene, seeded

from .labels import IGNORED
from .model import Sizes
from .views import crop_of, draw_level, to_pixel_values

QUESTIONS = 8
UNCLEAR = 0.25
"""How many questions stay whose thing is too small in every picture: the model should guess, but not learn from it."""
CLEAR_SIZE, CLEAR_MARK = 6.0, 7.0
"""Pixels of the model's input from which a thing, or what is written on it, counts as visible."""
CAPTION_WEIGHT = 0.3
SHARED, PADDING = 0, -1
"""Branch numbers of the pictures and of padding; questions count from 1."""


@dataclass(frozen=True)
class Example:
    """The views of one scene and questions about it."""

    views: tuple[View, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Packed:
    """Pictures (B x views, 3, R, R); ids, positions, branches, next tokens and their weights, (B, T) each."""

    pixel_values: Tensor
    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Packed:
        """The batch on a device."""
        return Packed(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, 1, T, T), added to attention logits: causal, pictures for all, questions for themselves."""
        row, column = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool, device=row.device).tril()
        seen = ((column == SHARED) | (column == row)) & causal
        return torch.zeros(seen.shape, dtype=dtype, device=row.device).masked_fill(~seen, -1e9).unsqueeze(1)


def is_clear(question: Question, views: Sequence[View]) -> bool:
    """Whether what a question asks for is large enough in one of the views."""
    if question.about is None:
        return True
    thing = views[0].scene.things[question.about]
    seen = [view for view in views if view.shows(thing) > 0.9]
    if question.answer == thing.mark:
        return any(view.mark_size(thing) >= CLEAR_MARK for view in seen)
    return any(view.size(thing) >= CLEAR_SIZE for view in seen)


def draw_example(rng: random.Random, progress: float, pair: bool, resolution: int) -> Example:
    """A whole picture, or that and a crop of it, with questions; half of those of a pair are about the crop."""
    scene = draw_scene(rng, Difficulty.at(draw_level(rng, 0.2 + progress)))
    views = [whole(scene, resolution)]
    if pair:
        about = rng.randrange(len(scene.things))
        views.append(crop_of(rng, scene, about, resolution))
        asked = ask_about(rng, scene, about, QUESTIONS // 2) + ask(rng, scene, QUESTIONS // 2)
    else:
        asked = ask(rng, scene, 2 * QUESTIONS)
    kept = [q for q in asked if is_clear(q, views) or rng.random() < UNCLEAR][:QUESTIONS]
    if rng.random() < 0.5:
        kept.append(ask_caption(rng, scene))
    long = [replace(q, text=f"{q.text} {SHORT}") if q.skill != "caption" and rng.random() < 0.15 else q for q in kept]
    return Example(tuple(views), tuple(long))


class Packer:
    """Puts examples together, with the tokens that the chat template would give; a picture has `tokens` of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sizes: Sizes, tokens: int | None = None) -> None:
        self.tokenizer, self.sizes, self.tokens = tokenizer, sizes, tokens or sizes.patches
        self.words: dict[str, int] = tokenizer.get_vocab()
        self.image = int(tokenizer.convert_tokens_to_ids("<image>"))
        self.end = int(tokenizer.eos_token_id)
        self.begin = int(tokenizer.bos_token_id)

    def question_ids(self, question: Question) -> tuple[list[int], list[int]]:
        """Ids of the question's turn up to "ASSISTANT:", and of the answer with its end."""
        asked = [self.words[word] for word in f"user : {question.text} assistant :".split()]
        return asked, [*(self.words[word] for word in question.answer.split()), self.end]

    def rows(self, example: Example) -> tuple[list[int], list[int], list[int], list[int], list[float]]:
        """Ids, positions, branches, targets and weights of one sequence."""
        shared = [self.begin] + [self.image] * (self.tokens * len(example.views))
        count = len(shared)
        ids, positions, branch = list(shared), list(range(count)), [SHARED] * count
        targets, weights = [IGNORED] * count, [0.0] * count
        for number, question in enumerate(example.questions, 1):
            asked, answer = self.question_ids(question)
            tokens = asked + answer[:-1]
            ids += tokens
            positions += range(count, count + len(tokens))
            branch += [number] * len(tokens)
            targets += [IGNORED] * (len(asked) - 1) + answer
            weight = CAPTION_WEIGHT if question.skill == "caption" else 1.0
            weights += [0.0] * (len(asked) - 1) + [weight] * len(answer)
        return ids, positions, branch, targets, weights

    def pack(self, examples: Sequence[Example]) -> Packed:
        """One batch; all examples have the same number of views."""
        rows = [self.rows(example) for example in examples]
        longest = max(len(row[0]) for row in rows)
        fill = (int(self.tokenizer.pad_token_id), 0, PADDING, IGNORED, 0.0)
        columns = [
            torch.tensor([row[i] + [fill[i]] * (longest - len(row[i])) for row in rows]) for i in range(len(fill))
        ]
        pictures = [view.pixels() for example in examples for view in example.views]
        return Packed(to_pixel_values(pictures), *columns)


def packed_batch(packer: Packer, name: str, step: int, progress: float, pictures: int, pairs: float) -> Packed:
    """The batch of a step; a share `pairs` of the steps shows two pictures, and then half as many sequences."""
    pair = seeded(name, step).random() < pairs
    count = max(1, pictures // 2) if pair else pictures
    resolution = packer.sizes.resolution
    return packer.pack([draw_example(seeded(name, step, i), progress, pair, resolution) for i in range(count)])


def picture_features(model: LlavaForConditionalGeneration, batch: Packed) -> Tensor:
    """What the model's own projector makes of the pictures: (pictures x tokens, width)."""
    return torch.cat(model.get_image_features(batch.pixel_values, return_dict=True).pooler_output)


def answer_logits(model: LlavaForConditionalGeneration, batch: Packed, features: Tensor | None = None) -> Tensor:
    """Logits (targets, vocabulary) at every position that predicts a token of an answer.

    `features` are the pictures' tokens in the order of the batch, (..., width); the model's own where None.
    """
    features = picture_features(model, batch) if features is None else features
    embedded = model.get_input_embeddings()(batch.input_ids)
    places = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
    embedded = embedded.masked_scatter(places, features.flatten(0, -2).to(embedded.dtype))
    output = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask(), position_ids=batch.position_ids, use_cache=False
    )
    return model.lm_head(output.last_hidden_state[batch.targets != IGNORED]).float()


def answer_loss(logits: Tensor, batch: Packed) -> Tensor:
    """Weighted cross entropy of the answers' tokens."""
    asked = batch.targets != IGNORED
    losses = cross_entropy(logits, batch.targets[asked], reduction="none")
    weights = batch.weights[asked]
    return (losses * weights).sum() / weights.sum()
