"""Makes qr-mini-vl-mqt with one command: qr-mini-vl with a matryoshka query transformer as its projector.

python -m training.vl.mqt --out FOLDER [--hours 1]

The recipe of arXiv 2405.19315, small: first the query transformer alone with all its tokens, then it and the language
model with a random even number of tokens in each step. The tower stays as it is. How it starts is ours: `start_like`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from qr_integrations.backend.mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration
from qr_integrations.backend.query_transformer import QueryTransformer, stretch_table
from qr_integrations.bundled import bundled_path
from qr_integrations.evaluation.drawn_world.views import View
from qr_integrations.evaluation.drawn_world.world import seeded

from .export import export, load_exported
from .model import Sizes
from .optimisers import Group
from .packing import Packed, Packer, answer_logits, packed_batch
from .tower import TowerBatch
from .train import Parts, Stage, Trainer
from .views import draw_view, to_pixel_values

QUERIES, HEADS = 64, 8
_SHARPNESS = (1.0, 1.5, 2.0, 2.0, 2.5, 2.5, 3.0, 3.0)
"""How closely each head's queries look at their own place at the start."""
_LEAST = 0.05
"""Directions in which places differ less than that share of the most are not stretched: gradients would explode."""


def mqt_config(model: LlavaForConditionalGeneration) -> MQTLlavaConfig:
    """The config of a LLaVA model with a query transformer in the place of its projector."""
    given = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        given.pop(name, None)
    return MQTLlavaConfig(**{**given, "image_seq_length": QUERIES, "num_queries": QUERIES, "num_query_heads": HEADS})


def with_query_transformer(model: LlavaForConditionalGeneration) -> MQTLlavaForConditionalGeneration:
    """The same tower and language model, and a query transformer."""
    made = MQTLlavaForConditionalGeneration(mqt_config(model)).float()
    made.set_attn_implementation("eager")
    own = {name: value for name, value in model.state_dict().items() if "multi_modal_projector" not in name}
    missing, unexpected = made.load_state_dict(own, strict=False)
    assert not unexpected and all("multi_modal_projector" in name for name in missing)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def spread_order(side: int) -> list[int]:
    """The cells of a grid so that the first few of them are far from each other, beginning in the middle."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    chosen = [int((places - (side - 1) / 2).norm(dim=1).argmin())]
    distance = (places - places[chosen[0]]).norm(dim=1)
    while len(chosen) < side * side:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (places - places[chosen[-1]]).norm(dim=1))
    return chosen


@torch.no_grad()
def start_like(module: QueryTransformer, patches: Tensor, tokens: Tensor) -> None:
    """Queries begin at places spread over the picture, and what they pool becomes what another projector made of it.

    Args:
        module: what begins so.
        patches: of some pictures, (patches, V).
        tokens: what the other projector made of each, (patches, D).
    """
    table = stretch_table(module.pos_embed, module.side)
    module.query.copy_(table[spread_order(module.side)[: module.num_queries]] - module.pos_embed)
    keys = module.ln_k(table)
    _, spectrum, directions = torch.linalg.svd(keys - keys.mean(0), full_matrices=False)
    per_head = keys.shape[1] // module.attn.num_heads
    spread = spectrum[:per_head].clamp(min=_LEAST * float(spectrum[0])) / len(keys) ** 0.5
    whitening = directions[:per_head] / spread[:, None]
    weights = torch.cat([whitening * sharp for sharp in _SHARPNESS[: module.attn.num_heads]])
    width = keys.shape[1]
    module.attn.in_proj_weight.copy_(torch.cat([weights, weights, torch.eye(width)]))
    module.attn.in_proj_bias.copy_(torch.cat([-(weights @ keys.mean(0))] * 2 + [torch.zeros(width)]))
    module.attn.out_proj.weight.copy_(torch.eye(width))
    module.attn.out_proj.bias.zero_()
    normed = module.ln_v(patches)
    ridge = normed.mT @ normed + 1e-2 * len(patches) / width * torch.eye(width)
    module.proj.copy_(torch.linalg.solve(ridge, normed.mT @ tokens))


@torch.no_grad()
def patches_and_tokens(model: LlavaForConditionalGeneration, pictures: int = 64) -> tuple[Tensor, Tensor]:
    """Patches of drawn pictures, and what the model's projector makes of them."""
    resolution = model.config.vision_config.image_size
    views: list[View] = [draw_view(seeded("mqt start", number), 1.0, resolution) for number in range(pictures)]
    pixels = to_pixel_values([view.pixels() for view in views])
    states = model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    patches = states[model.config.vision_feature_layer][:, 1:]
    return patches.flatten(0, 1), model.model.multi_modal_projector(patches).flatten(0, 1)


class MQTTrainer(Trainer):
    """The two stages: ``queries`` and ``all tokens``, then ``together`` with fewer."""

    def groups(self) -> list[Group]:
        """The query transformer, and in the second stage the language model; its table of places never learns."""
        inner = self.parts.model.model
        own: Group = (self.stage.rate, [inner.multi_modal_projector])
        return [own] if self.stage.name == "queries" else [own, (self.stage.tower_rate, [inner.language_model])]

    def batches(self, step: int) -> tuple[TowerBatch | None, Packed | None]:
        """Questions about pictures of as many tokens as the step draws: an even number in the second stage."""
        stage, count = self.stage, QUERIES
        if stage.name == "together":
            count = 2 * seeded("mqt tokens", step).randint(1, QUERIES // 2)
        packer = Packer(self.parts.tokenizer, self.parts.sizes, count)
        return None, packed_batch(packer, f"mqt {stage.name}", step, 0.8, stage.pictures, stage.pairs)

    def losses(self, dense: TowerBatch | None, packed: Packed | None) -> Tensor:
        """The loss of the answers."""
        assert packed is not None
        model = self.parts.model
        count = int((packed.input_ids == model.config.image_token_id).sum()) // len(packed.pixel_values)
        tokens = model.model.tokens_of(packed.pixel_values, count)
        return self.noted_loss(answer_logits(model, packed, tokens), packed)


def plan(hours: float) -> list[Stage]:
    """The stages and their shares of the time."""
    seconds = 3600 * hours
    return [
        Stage("queries", steps=800, seconds=0.2 * seconds, pictures=12, rate=1e-3),
        Stage("together", steps=6000, seconds=0.8 * seconds, pictures=16, pairs=0.2, rate=1e-3, tower_rate=6e-4),
    ]


def start(folder: Path) -> tuple[Parts, LlavaProcessor]:
    """qr-mini-vl, its projector replaced."""
    base, processor = load_exported(folder)
    torch.manual_seed(0)
    model = with_query_transformer(base)
    start_like(model.model.multi_modal_projector, *patches_and_tokens(base))
    return Parts(model.train(), torch.nn.Identity(), processor.tokenizer, Sizes()), processor


def query_processor(processor: LlavaProcessor, sizes: Sizes) -> LlavaProcessor:
    """The processor makes one placeholder for each query: a query stands for a larger patch of the picture."""
    made = copy.deepcopy(processor)
    side = int(QUERIES**0.5)
    made.patch_size = sizes.resolution // side
    assert (sizes.resolution // made.patch_size) ** 2 == QUERIES
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for checkpoints; the model goes to OUT/qr-mini-vl-mqt")
    parser.add_argument(
        "--base", type=Path, default=bundled_path("qr-mini-vl"), help="folder of the model to start from"
    )
    parser.add_argument("--hours", type=float, default=1.0, help="time for both stages together")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--workers", type=int, default=1, help="threads that draw pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts, processor = start(options.base)
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in plan(options.hours):
        trainer = MQTTrainer(parts, stage, options.out, options.workers)
        trainer.load()
        trainer.run()
    export(options.out / "qr-mini-vl-mqt", parts.model, query_processor(processor, parts.sizes))


if __name__ == "__main__":
    main()
