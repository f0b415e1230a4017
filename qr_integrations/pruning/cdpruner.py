"""CDPruner: tokens that differ from each other and have to do with the question (arXiv 2506.10967).

Legend: B prompts, T tokens, N tokens of a view, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qr_integrations.backend.clip_text import clip_text, tower_norm
from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.visual_tokens import NOT_VISUAL, Embedded
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.pruning.base import (
    ChosenBefore,
    Positions,
    check_finite,
    check_keep,
    check_positions,
    choose_before,
    num_kept,
)
from qr_integrations.pruning.greedy import greedy_map
from qr_integrations.pruning.relevance import mean_cosine, relevance_of

Relevance = Literal["auto", "clip", "language"] | None
_THETA = 0.5  # of relevance in the space of words, which is not published; see `CDPruner`


@dataclass(frozen=True, slots=True)
class CDPruner:
    """Keep the tokens that together tell most about a picture and a question; pass it as ``Backend.answer(prune=...)``.

    Tokens are chosen before the language model, which reads a shorter prompt. Each view of a picture, such as a tile,
    keeps its own share; ends of lines stay. For Qwen2-VL and Qwen2.5-VL tokens are chosen behind the merger.

    Args:
        keep: tokens per view, or a share of them in (0, 1]. Published: 128, 64 or 32 of 576.
        relevance: ``"clip"``: cosines of patches and question in the space of CLIP, as published, for models whose
            tower is CLIP's; ``"language"``: cosines of visual tokens and the embeddings of the question's words; None:
            diversity alone. ``"auto"`` is ``"clip"`` with a `text_encoder`, else ``"language"``. Where the question is
            not known or empty, ``"language"`` takes the words behind the picture, and diversity alone where there are
            none.
        text_encoder: folder or hub id of the CLIP model that the tower was taken from, in safetensors;
            ``"openai/clip-vit-large-patch14-336"`` for LLaVA-1.5 and LLaVA-NeXT. Loaded when it is first needed.
        sign: -1 makes what is least similar most relevant, as the authors found to be right for CLIP; 1 what is most
            similar. None: -1 for ``"clip"``, 1 for ``"language"``.
        theta: how much relevance counts, see `relevance_of`; None takes it as it is, as published. ``"auto"``: None for
            ``"clip"``, 0.5 for ``"language"``.
        positions: what is left gets the positions 0, 1, 2, ... (``"compact"``, as published) or keeps its own
            (``"kept"``); ``"auto"`` is compact unless positions are time, height and width.
        published: as the authors' code. Relevance is scaled over the whole batch and compared with all questions of it;
            features are normalised in the model's dtype; a question that is too long for CLIP is cut as it is; where no
            token adds anything, rounding decides and fewer tokens are kept. Otherwise pictures do not influence each
            other, and exactly as many tokens are kept as were asked for.

    The authors show LLaVA-NeXT every picture at 672 x 672 pixels and leave out the ends of lines, which makes five
    views of 576 tokens: that is a matter of the processor. Here the views are those that the processor makes.

    What is asked in words has little to do with single visual tokens in the bundled ``"qr-mini-vl"``: on 348 questions
    about drawn pictures, with 12 of 100 tokens, 83.9 % of first tokens were right with ``theta=None``, 86.2 % with 0.5,
    86.8 % with ``relevance=None``, 82.5 % with tokens drawn at random and 85.6 % with all. Hence 0.5.

    Raises:
        InputError: a setting out of range or of the wrong type.
    """

    keep: int | float
    relevance: Relevance = "auto"
    text_encoder: str | None = None
    sign: int | None = None
    theta: float | Literal["auto"] | None = "auto"
    positions: Positions = "auto"
    published: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)
        if self.relevance not in ("auto", "clip", "language", None):
            raise InputError(f"unknown relevance {self.relevance!r}: pass 'auto', 'clip', 'language' or None")
        if not (self.text_encoder is None or (isinstance(self.text_encoder, str) and self.text_encoder)):
            raise InputError(
                f"text_encoder={self.text_encoder!r} cannot be: pass a folder or hub id as a string, such as "
                "'openai/clip-vit-large-patch14-336', or None"
            )
        if self.relevance == "clip" and self.text_encoder is None:
            raise InputError(
                "relevance='clip' needs the text encoder that belongs to the vision tower: pass "
                "text_encoder='openai/clip-vit-large-patch14-336' for LLaVA-1.5 and LLaVA-NeXT"
            )
        if not (self.sign is None or (type(self.sign) is int and self.sign in (-1, 1))):
            raise InputError(f"sign={self.sign!r} cannot be: pass -1, 1 or None")
        is_share = isinstance(self.theta, int | float) and not isinstance(self.theta, bool) and 0 <= self.theta < 1
        if not (is_share or self.theta in ("auto", None)):
            raise InputError(f"theta={self.theta!r} cannot be: pass 0 or more and less than 1, None or 'auto'")
        if not isinstance(self.published, bool):
            raise InputError(f"published={self.published!r} cannot be: pass True or False")

    def start(self, backend: Any, seen: Embedded) -> ChosenBefore:
        """Choose what the language model reads.

        Raises:
            UnsupportedModelError: ``"clip"`` for a model whose tower is not of the text encoder's CLIP.
            ScoreError: features, or their cosines with the question, of NaN or infinity.
        """
        views = [_View(prompt, places) for prompt in range(len(seen.mask)) for places in seen.views_of(prompt)]
        if not views or all(num_kept(self.keep, len(view.places)) == len(view.places) for view in views):
            return choose_before("CDPruner", seen, _of_prompts(seen, views), self.positions)
        for view in views:
            check_finite(view.of(seen.states).float(), "features of the picture")
        relevance = self._relevance(backend, seen, views)
        chosen = [self._chosen(seen, view, weights) for view, weights in zip(views, relevance, strict=True)]
        return choose_before("CDPruner", seen, _of_prompts(seen, chosen), self.positions)

    def _relevance(self, backend: Any, seen: Embedded, views: Sequence["_View"]) -> list[Tensor]:
        found = [torch.ones(len(view.places), device=seen.states.device) for view in views]
        if self.relevance is None:
            return found
        by_clip = self.relevance == "clip" or (self.relevance == "auto" and self.text_encoder is not None)
        cosines = (self._clip_cosines if by_clip else self._language_cosines)(backend, seen, views)
        sign = self.sign or (-1 if by_clip else 1)
        theta = self.theta if self.theta != "auto" else None if by_clip else _THETA
        for one in cosines.values():
            check_finite(one, "cosines of picture and question")
        scope = [0 if self.published else int(view.of(seen.picture)[0]) for view in views]
        for _, numbers in groupby(cosines, key=scope.__getitem__):
            some = list(numbers)
            together = relevance_of([cosines[one] for one in some], sign=sign, theta=theta, published=self.published)
            for number, relevance in zip(some, together, strict=True):
                found[number] = relevance
        return found

    def _clip_cosines(self, backend: Any, seen: Embedded, views: Sequence["_View"]) -> dict[int, Tensor]:
        """By the number of the view."""
        assert self.text_encoder is not None
        if seen.tower is None or not picture_family(backend.model.config).has_places:
            raise UnsupportedModelError(
                f"the visual tokens of {backend.name!r} are not the patches of CLIP's tower: pass relevance='language'"
            )
        if not seen.questions:
            raise InputError("relevance='clip' needs a question: ask one, or pass relevance=None")
        encoder, norm = clip_text(self.text_encoder, seen.states.device), tower_norm(backend.model)
        texts = [encoder.texts(question, published=self.published) for question in seen.questions]
        if self.published:
            texts = [torch.cat(texts)] * len(texts)
        cosines = [mean_cosine(encoder.patches(view.patches(seen), norm), texts[view.prompt]) for view in views]
        return dict(enumerate(cosines))

    def _language_cosines(self, backend: Any, seen: Embedded, views: Sequence["_View"]) -> dict[int, Tensor]:
        """By the number of the view; none for those about which nothing is asked."""
        words = [_words(backend, seen, prompt) for prompt in range(len(seen.mask))]
        if self.published:
            words = [torch.cat(words)] * len(words)
        asked = [number for number, view in enumerate(views) if len(words[view.prompt])]
        return {number: mean_cosine(views[number].of(seen.states), words[views[number].prompt]) for number in asked}

    def _chosen(self, seen: Embedded, view: "_View", relevance: Float[Tensor, " N"]) -> "_View":
        features = view.of(seen.states)
        kernel = kernel_of(features, relevance, published=self.published).cpu().numpy()
        picks = greedy_map(kernel, num_kept(self.keep, len(view.places)), published=self.published)
        order = torch.from_numpy(picks.order).to(view.places.device)
        return _View(view.prompt, view.places[order.unique()])


def kernel_of(
    features: Shaped[Tensor, "N D"], relevance: Float[Tensor, " N"], *, published: bool = False
) -> Float[Tensor, "N N"]:
    """Cosines of the features, weighted on both sides with the relevance, in fp32.

    `published` normalises in the features' own dtype. Otherwise features of zeros have the cosine 0 with all others.
    """
    if published:
        normed = (features / features.norm(dim=-1, keepdim=True)).float()
    else:
        normed = torch.nn.functional.normalize(features.float(), dim=-1)
    return relevance[:, None] * (normed @ normed.T) * relevance


@dataclass(frozen=True, slots=True)
class _View:
    """Tokens of one view of a prompt."""

    prompt: int
    places: Int[Tensor, " N"]

    def of(self, values: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "N *D"]:
        return values[self.prompt, self.places]

    def patches(self, seen: Embedded) -> Tensor:
        """What went into the projector."""
        assert seen.tower is not None
        return seen.tower.patches[self.of(seen.view), self.of(seen.cell)]


def _words(backend: Any, seen: Embedded, prompt: int) -> Tensor:
    """Embeddings of the question; where it is not known, or empty, of the words behind the picture, if any."""
    embed = backend.model.get_input_embeddings()
    ids: list[int] = []
    if seen.questions:
        ids = backend.tokenizer(seen.questions[prompt], add_special_tokens=False).input_ids
    if ids:
        words: Tensor = embed(torch.tensor(ids, device=seen.states.device))
        return words
    behind = seen.words_behind(prompt)
    return seen.states[prompt, behind[seen.picture[prompt, behind] == NOT_VISUAL]]  # ends of lines are no words


def _of_prompts(seen: Embedded, views: Sequence[_View]) -> list[Tensor]:
    """The places of all views of each prompt."""
    found = [[seen.mask.new_zeros(0, dtype=torch.long)] for _ in range(len(seen.mask))]
    for view in views:
        found[view.prompt].append(view.places)
    return [torch.cat(places) for places in found]
