"""How fast a second look is, beside a plain answer to two pictures and the published procedure.

``python -m benchmarks.vicrop_speed`` measures a random LLaVA of a real shape: a CLIP tower at 336 pixels with 576
tokens per picture, 20 new tokens as published. Before anything is timed, our map is compared with the published one.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from benchmarks import measure
from benchmarks.rank_workload import seeded_in
from qr_integrations import Backend, Message, ViCrop
from qr_integrations.bundled import bundled_path
from qr_integrations.cropping import GENERIC, search_box

_RESULTS = Path(__file__).parent / "results"
_NEW_TOKENS = 20  # as published
_QUESTION = "What is written on the small sign at the left?"
_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}\nUSER: "
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}\nASSISTANT:"
)
_GOAL = 1.20  # x a plain answer to two pictures


@dataclass(frozen=True)
class Shape:
    """Layers and widths of tower and language model."""

    tower_layers: int
    tower_width: int
    layers: int
    width: int
    inner: int
    heads: int


SHAPES = {
    "cpu": Shape(tower_layers=12, tower_width=512, layers=16, width=1024, inner=2816, heads=16),
    "llava-1.5-7b": Shape(tower_layers=24, tower_width=1024, layers=32, width=4096, inner=11008, heads=32),
}


def load(shape: Shape, dtype: torch.dtype, device: str) -> Backend:
    """A random LLaVA with a real processor."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("qr-mini"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    tower = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_width // 64,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    with seeded_in(dtype, device):
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return Backend(model.eval(), tokenizer, name="random LLaVA", processor=processor)


class Published:
    """saccharomycetes/mllms_know, commit a64c5d5, on stock transformers: eager attention, every matrix of every layer,
    both prompts whole, the answer from the beginning."""

    def __init__(self, backend: Backend, layer: int) -> None:
        self._backend, self._layer = backend, layer

    def inputs(self, pictures: list[Image.Image], question: str) -> Any:
        """The prompt's tensors."""
        return self._backend.lay_out([Message.user(*pictures, question)]).inputs

    @torch.no_grad()
    def attention(self, picture: Image.Image, question: str) -> torch.Tensor:
        """The last row of one layer over the picture's tokens, the mean over heads."""
        inputs = self.inputs([picture], question)
        output = self._backend.model(**inputs, output_attentions=True)
        places = (inputs["input_ids"][0] == self._backend.model.config.image_token_id).nonzero()[:, 0]
        row: torch.Tensor = output.attentions[self._layer][0, :, -1, places].mean(0)
        return row.float().view(24, 24)

    def map(self, picture: Image.Image) -> torch.Tensor:
        """rel-att."""
        return self.attention(picture, _QUESTION) / self.attention(picture, GENERIC)

    def answer(self, picture: Image.Image) -> Any:
        """Look, crop, answer."""
        self._backend.model.set_attn_implementation("eager")
        try:
            box = search_box(self.map(picture).cpu().numpy(), picture.size, 336).box
            return self.two_pictures([picture, picture.crop(box.as_tuple())])
        finally:
            self._backend.model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def two_pictures(self, pictures: list[Image.Image]) -> Any:
        """Stock `generate`."""
        inputs = self.inputs(pictures, _QUESTION)
        return self._backend.model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)


def jobs(backend: Backend, picture: Image.Image, published: Published) -> list[measure.Job]:
    """All of them answer the same question about the same picture."""
    asked = [Message.user(picture, _QUESTION)]
    crop = picture.crop((0, 0, 336, 336))

    def ours(method: Any) -> Callable[[int], Any]:
        return lambda _: backend.answer(asked, crop=ViCrop(method=method), max_new_tokens=_NEW_TOKENS)

    return [
        measure.Job("floor: stock generate, two pictures", lambda _: published.two_pictures([picture, crop])),
        measure.Job("stock generate, one picture", lambda _: published.two_pictures([picture])),
        measure.Job("ours, relative", ours("relative")),
        measure.Job("ours, gradient", ours("gradient")),
        measure.Job("ours, input_gradient", ours("input_gradient")),
        measure.Job("published, relative", lambda _: published.answer(picture)),
    ]


def same_map(backend: Backend, picture: Image.Image, published: Published) -> float:
    """The largest difference of our map from the published one, as a share of its maximum."""
    backend.model.set_attn_implementation("eager")
    try:
        theirs = published.map(picture).cpu().numpy()
    finally:
        backend.model.set_attn_implementation("sdpa")
    ours = ViCrop().look(backend, picture, _QUESTION).importance.values
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.vicrop_speed", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llava-1.5-7b" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=_RESULTS / "vicrop-speed.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    shape = SHAPES[options.shape]
    backend = load(shape, dtype, device)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8))
    published = Published(backend, 14 if shape.layers == 32 else shape.layers // 2)
    difference = same_map(backend, picture, published)
    assert on_gpu or difference < 1e-4, difference
    work = jobs(backend, picture, published)
    times = measure.interleaved(work, options.repeats, lambda name: 1)
    rows = {name: measure.summary(taken) for name, taken in times.items()}
    floor = rows[work[0].name]
    print(
        f"| {options.shape}, {measure.machine()['processor']} | min s | x floor (min) | x floor (median) |\n"
        "|---|---|---|---|"
    )
    for name, row in rows.items():
        ratios = [row[key] / floor[key] for key in ("min_s", "median_s")]
        print(f"| {name} | {row['min_s']:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    print(f"goal: ours, relative <= {_GOAL} x floor; largest difference of the maps {difference:.1e} of the maximum")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(
        json.dumps(
            {"machine": measure.machine(), "shape": options.shape, "map_difference": difference, "jobs": rows}, indent=1
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
