"""Two optimisers side by side: Muon for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BESIDE = 1e-3
"""Learning rate of AdamW where Muon has `rate`: embeddings, norms and biases like it slower."""

Group = tuple[float, Sequence[nn.Module]]
"""Learning rate and the modules that learn with it."""


class Optimisers:
    """Muon and AdamW over the parameters of some modules.

    The tower needs half of the pictures with it to reach the losses that AdamW reaches in 400 steps.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        matrices, others = [], []
        for rate, modules in groups:
            named = [pair for module in modules for pair in module.named_parameters()]
            inner = [p for name, p in named if p.ndim == 2 and "layers." in name]
            chosen = {id(p) for p in inner}
            matrices.append({"params": inner, "lr": rate})
            others.append({"params": [p for _, p in named if id(p) not in chosen], "lr": min(rate, BESIDE)})
        self.both: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
        )
        self.rates = [[float(group["lr"]) for group in optimiser.param_groups] for optimiser in self.both]
        self.parameters: list[Tensor] = [p for o in self.both for group in o.param_groups for p in group["params"]]

    def update(self, factor: float) -> None:
        """One step with `factor` times the learning rates, gradients clipped to norm 1; clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, rates in zip(self.both, self.rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name: "optimiser.0.17.momentum_buffer"."""
        return {
            f"optimiser.{which}.{number}.{name}": value.clone()
            for which, optimiser in enumerate(self.both)
            for number, state in optimiser.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Takes over what `state` gave; other names are left alone."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.both]
        for key, value in saved.items():
            if key.startswith("optimiser."):
                _, which, number, name = key.split(".")
                states[int(which)].setdefault(int(number), {})[name] = value
        for optimiser, state in zip(self.both, states, strict=True):
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
