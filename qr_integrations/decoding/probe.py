"""What a model's layers would say, so that candidate layers can be chosen with open eyes.

Legend: B batch, N positions, S steps, J layers, V vocabulary, k top tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.early_logits import early_logits
from qr_integrations.errors import InputError

_TOP, _TOKEN_WIDTH = 5, 14


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that a layer would say, and its probability."""

    token: str
    prob: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerProbe:
    """What every probed layer would have said at every step of a greedy answer; printed, a table per layer and step.

    Attributes:
        layers: numbered like hidden states, the last one not among them.
        num_layers: blocks of the model.
        said: what the last layer found most probable at each step, which is what was said, and its probability.
        guesses: for each step and each layer the most probable tokens, the most probable first.
        probs: what each layer gives to the token that was said.
        agrees: where that token is the layer's most probable one.
    """

    layers: tuple[int, ...]
    num_layers: int
    said: tuple[Guess, ...]
    guesses: tuple[tuple[tuple[Guess, ...], ...], ...]
    probs: Float[np.ndarray, "S J"]
    agrees: Bool[np.ndarray, "S J"]

    @property
    def agreement(self) -> dict[int, float]:
        """Of each layer, the share of steps at which it would have said the same."""
        return dict(zip(self.layers, self.agrees.mean(0).tolist(), strict=True))

    @property
    def mean_prob(self) -> dict[int, float]:
        """Of each layer, the mean probability of the token that was said."""
        return dict(zip(self.layers, self.probs.mean(0).tolist(), strict=True))

    @property
    def settled_at(self) -> tuple[int, ...]:
        """For each step, the first probed layer from which on all would have said the same; the last one if none."""
        numbers = (*self.layers, self.num_layers)
        differing = [np.flatnonzero(~row) for row in self.agrees]
        return tuple(numbers[int(places[-1]) + 1 if len(places) else 0] for places in differing)

    def step(self, index: int) -> str:
        """All layers at one step: what each would have said, and the probability of what was said."""
        said = self.said[index]
        lines = [f"step {index}: {said.token!r} {said.prob:.3f}"]
        for place in reversed(range(len(self.layers))):
            guesses = "  ".join(f"{guess.token!r} {guess.prob:.3f}" for guess in self.guesses[index][place])
            lines.append(f"{self.layers[place]:5}  {self.probs[index, place]:.3f}  {guesses}")
        return "\n".join(lines)

    def __str__(self) -> str:
        settled = self.settled_at
        lines = [f"{len(self.said)} tokens, layers {self.layers[0]} to {self.layers[-1]} of {self.num_layers}", ""]
        lines.append("layer  says the same  its probability  settled by then")
        for layer in self.layers:
            by_then = fmean(at <= layer for at in settled)
            lines.append(f"{layer:5}  {self.agreement[layer]:13.0%}  {self.mean_prob[layer]:15.3f}  {by_then:15.0%}")
        lines += ["", f"step  {'token':{_TOKEN_WIDTH}}  probability  settled at"]
        for index, (said, at) in enumerate(zip(self.said, settled, strict=True)):
            lines.append(f"{index:4}  {repr(said.token)[:_TOKEN_WIDTH]:{_TOKEN_WIDTH}}  {said.prob:11.3f}  {at:10}")
        return "\n".join(lines)


def probe_layers(
    backend: Backend,
    prompt_or_inputs: str | Mapping[str, Any],
    *,
    max_new_tokens: int = 32,
    layers: Sequence[int] | None = None,
) -> LayerProbe:
    """Answer greedily and note, for every token, what earlier layers would have said.

    A layer whose most probable tokens are nonsense cannot correct anything, and one that always agrees with the last
    layer has nothing to add. Which layers of a model help is not decided by this: only labelled examples tell.

    Args:
        backend: the model.
        prompt_or_inputs: a text as it stands, without a chat template, or what the model takes (``input_ids``,
            ``pixel_values``, ...), one row.
        max_new_tokens: tokens of the answer.
        layers: numbered like hidden states, i is the output of the i-th block; None probes all but the last.

    Example:
        >>> from qr_integrations import Backend
        >>> from qr_integrations.decoding import probe_layers
        >>> probe = probe_layers(Backend.load("qr-mini"), "dracula was written by", max_new_tokens=4)
        >>> len(probe.said), len(probe.agreement) == probe.num_layers - 1
        (4, True)

    Raises:
        InputError: several rows, or layers that the model does not have.
    """
    num_layers = backend.config.num_hidden_layers
    chosen = tuple(sorted(layers)) if layers is not None else tuple(range(1, num_layers))
    steps = _Steps(backend)
    inputs = _inputs(backend, prompt_or_inputs)
    with early_logits(backend, chosen, steps.note):
        backend.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0
        )
    return LayerProbe(
        chosen, num_layers, tuple(steps.said), tuple(steps.guesses), np.array(steps.probs), np.array(steps.agrees)
    )


class _Steps:
    """Notes of a generation under way, one entry per step."""

    def __init__(self, backend: Backend) -> None:
        self._tokenizer = backend.tokenizer
        self.said: list[Guess] = []
        self.guesses: list[tuple[tuple[Guess, ...], ...]] = []
        self.probs: list[list[float]] = []
        self.agrees: list[list[bool]] = []

    def note(self, final: Float[Tensor, "1 N V"], early: Float[Tensor, "J 1 N V"]) -> Float[Tensor, "1 N V"]:
        """Of a pass the last position counts."""
        prob, token = final[0, -1].softmax(-1).max(-1)
        probs = early[:, 0, -1].softmax(-1)
        top_probs, top = probs.topk(min(_TOP, probs.shape[-1]), dim=-1)
        self.said.append(self._guess(int(token), float(prob)))
        rows = zip(top.tolist(), top_probs.tolist(), strict=True)
        self.guesses.append(tuple(tuple(map(self._guess, tokens, shares)) for tokens, shares in rows))
        self.probs.append(probs[:, token].tolist())
        self.agrees.append((top[:, 0] == token).tolist())
        return final

    def _guess(self, token: int, prob: float) -> Guess:
        return Guess(self._tokenizer.decode([token]), prob)


def _inputs(backend: Backend, prompt_or_inputs: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(prompt_or_inputs, str):
        prompt_or_inputs = {**backend.tokenizer(prompt_or_inputs, return_tensors="pt")}
    if len(prompt_or_inputs["input_ids"]) != 1:
        raise InputError(f"{len(prompt_or_inputs['input_ids'])} rows cannot be probed together: pass one")
    return {
        name: value.to(backend.device) if isinstance(value, Tensor) else value
        for name, value in prompt_or_inputs.items()
    }
