"""Heads that can be trained: LoRA on what makes their queries and keys, and their scores with gradients."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qr_integrations.backend import AttentionTap, Backend
from qr_integrations.errors import InputError, MissingExtra, WindowError
from qr_integrations.retrieval import HeadSet
from qr_integrations.retrieval.layout import PromptLayout, PromptStyle, PromptWriter, Query
from qr_integrations.retrieval.scoring import calibrate
from qr_integrations.retrieval.token_scores import NULL_QUERY
from qr_integrations.retrieval.windows import Limits, fit
from qr_integrations.types import Document, Span

ALPHA_PER_RANK = 2


def query_key_matrices(backend: Backend, top_layer: int, targets: str | None = None) -> list[str]:
    """Names of the matrices inside the attention of layers 0..top_layer that an adapter goes on.

    Which ones make queries and keys is not told from their names, which differ by family: the attention rows of a layer
    have a gradient with respect to these and no others. One that makes values too (GPT-2, Phi-3) is among them.

    Args:
        backend: the model.
        top_layer: the deepest layer that is read.
        targets: a regex; the matrices whose name inside the attention module it matches as a whole are taken instead,
            for example ``"q_proj"``.

    Raises:
        InputError: there is none.
    """
    names = {module: name for name, module in backend.model.named_modules()}
    inside: dict[int, dict[str, nn.Module]] = {}
    for layer, attention in backend.attention_layers.items():
        if layer <= top_layer:
            parts = attention.module.named_modules()
            inside[layer] = {name: part for name, part in parts if isinstance(part, nn.Linear | Conv1D)}
    if targets is None:
        chosen = _with_gradient(backend, inside)
    else:
        chosen = [part for parts in inside.values() for name, part in parts.items() if re.fullmatch(targets, name)]
    if not chosen:
        known = sorted({name for parts in inside.values() for name in parts})
        raise InputError(f"no matrix of {backend.name!r} to train: pass targets that match one of {known}")
    return [names[part] for part in chosen]


def _with_gradient(backend: Backend, inside: Mapping[int, Mapping[str, nn.Module]]) -> list[nn.Module]:
    """Two tokens are read with a zero added to what every matrix puts out: do the rows depend on that zero?"""
    zeros = {part: torch.zeros((), requires_grad=True) for parts in inside.values() for part in parts.values()}

    def add_zero(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + zeros[module].to(output)

    hooks = [part.register_forward_hook(add_zero) for part in zeros]
    chosen: list[nn.Module] = []
    try:
        for layer, parts in inside.items():  # a pass each: rows of several layers come as one tensor with one graph
            tap = AttentionTap(((layer, 0),), Span(1, 2), differentiable=True)
            row = backend.forward([0, 0], tap=tap).sum()
            added = [zeros[part] for part in parts.values()]
            found = torch.autograd.grad(row, added, allow_unused=True) if added else ()
            chosen += [part for part, gradient in zip(parts.values(), found, strict=True) if gradient is not None]
    finally:
        for hook in hooks:
            hook.remove()
    return chosen


class Adapter:
    """LoRA inside a model, which is changed in place: everything else in it is frozen.

    In fp32 whatever the model's dtype. What the model computes stays the same until the first step.

    Attributes:
        parameters: name -> what is trained.

    Raises:
        MissingExtra: peft is not installed.
    """

    def __init__(self, backend: Backend, matrices: Sequence[str], rank: int, seed: int) -> None:
        try:
            import peft
        except ImportError as error:
            raise MissingExtra("fine-tuning", "train") from error
        transposed = isinstance(backend.model.get_submodule(matrices[0]), Conv1D)
        config = peft.LoraConfig(
            r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=list(matrices), fan_in_fan_out=transposed
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            torch.manual_seed(seed)
            self._peft = peft.get_peft_model(backend.model, config).eval()
        self._peft.peft_config["default"].base_model_name_or_path = backend.name
        self.parameters = {name: p for name, p in backend.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """A copy of what was learned, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write the adapter alone, for ``peft.PeftModel.from_pretrained``."""
        self._peft.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form

    def merge(self) -> None:
        """Add what was learned to the model's weights, in their own dtype; there is no adapter afterwards."""
        self._peft.merge_and_unload()
        self.parameters = {}


class ListwiseScorer:
    """Document scores with gradients: as the package computes them, but without the outlier filter.

    The filter (tokens below mean - 2 standard deviations count nothing) is left out because a token that it drops would
    have no gradient: nothing could teach the model to look elsewhere than at such tokens.
    """

    def __init__(self, backend: Backend, heads: HeadSet, *, max_doc_tokens: int | None = None) -> None:
        self._backend, self._heads = backend, heads
        self._writer = PromptWriter(backend, PromptStyle())
        self._limits = Limits(backend.max_tokens, max_doc_tokens, None, "head")

    def scores(self, query: str, documents: Sequence[Document]) -> Tensor:
        """Calibrated attention mass (equation 3) of every document, summed over its tokens and the heads.

        Returns:
            ``[N]`` in fp32, with a graph unless called in ``torch.no_grad()``.

        Raises:
            WindowError: the documents do not fit into one prompt.
        """
        asked = Query(query)
        windows = fit(documents, lambda read: self._writer.write(asked, read), self._limits)
        if len(windows) > 1:
            raise WindowError(
                f"the list of {query!r} with {len(documents)} documents needs {len(windows)} prompts: pass fewer "
                "documents in a list, or a smaller max_doc_tokens"
            )
        read = [candidate.read for candidate in windows[0]]
        null = self._writer.write(Query(NULL_QUERY), read)
        layout = self._writer.rewrite(null, asked, read)
        scores_KT = calibrate(self._attention(layout), self._attention(null))
        return torch.stack([scores_KT[:, span.slice()].sum() for span in layout.documents])

    def _attention(self, layout: PromptLayout) -> Tensor:
        tap = AttentionTap(self._heads.heads, layout.query, differentiable=True)
        return self._backend.forward(layout.token_ids, tap=tap)[0, :, layout.shared.slice()]


def listwise_loss(scores: Tensor, gold: Sequence[int], factor: Tensor) -> Tensor:
    """Cross entropy of ``softmax(factor * scores)`` against the gold documents, which share the target evenly."""
    return -(factor * scores).log_softmax(-1)[list(gold)].mean()
