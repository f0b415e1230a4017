"""What it takes to read a prompt whose picture is told in fewer tokens, beside a prompt that is as short by itself.

``python -m benchmarks.prefill_speed`` measures layers of LLaVA-1.5-7B's shape (4,096 wide, 32 heads) with random
weights: 35 words, 576 visual tokens, 57 words. All layers share one set of weights, so that the shape fits anywhere;
on a CPU there are 8 layers. The tower is small, and the same for all. Tokens go before the language model (evenly
spread cells; choosing is not what is measured) or within it (SparseVLM). The floor is the plain pass over as many.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks import measure
from benchmarks.rank_workload import seeded_in
from qr_integrations import Backend
from qr_integrations.backend.surgery import Prefilled, prefill_pruned
from qr_integrations.bundled import bundled_path
from qr_integrations.errors import InputError
from qr_integrations.pruning import SparseVLM
from qr_integrations.pruning.baselines import UniformGrid

_RESULTS = Path(__file__).parent / "results"
BEFORE, VISUAL, BEHIND, IMAGE = 35, 576, 57, 1023
VERSIONS: tuple[Literal["1.5", "2.0"], ...] = ("1.5", "2.0")
SHAPES = {"llava-1.5-7b": (4096, 11008, 32), "small": (1024, 2816, 8)}


def load(shape: tuple[int, int, int], num_layers: int, dtype: torch.dtype, device: str) -> Backend:
    """A random LLaVA whose layers have the same weights and each a number of its own."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("qr-mini"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    width, inner, heads = shape
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    with seeded_in(dtype, device):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE)
        )
    decoder: Any = model.model.language_model
    first = decoder.layers[0]
    decoder.layers = nn.ModuleList(_numbered(first, number) for number in range(num_layers))
    decoder.config.num_hidden_layers = model.config.text_config.num_hidden_layers = num_layers
    return Backend(model.eval().requires_grad_(False), tokenizer, name="random LLaVA")


def _numbered(layer: nn.Module, number: int) -> nn.Module:
    same: Any = copy.deepcopy(layer, {id(weights): weights for weights in layer.parameters()})
    same.self_attn.layer_idx = number
    return same


def prompt(backend: Backend, num_visual: int) -> dict[str, Tensor]:
    """Words, so many placeholders, words."""
    ids = torch.arange(BEFORE + num_visual + BEHIND, device=backend.device) % 900 + 3
    ids[BEFORE : BEFORE + num_visual] = IMAGE
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def jobs(backend: Backend, counts: Sequence[int]) -> list[measure.Job]:
    """The floor of each length, and both ways to get there."""
    draws = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, 336, 336, generator=draws).to(backend.device, backend.model.dtype)
    whole = prompt(backend, VISUAL) | {"pixel_values": picture}

    @torch.no_grad()
    def read(inputs: dict[str, Tensor]) -> Any:
        return backend.model(**inputs, use_cache=True, logits_to_keep=1)

    def plain(count: int) -> Callable[[int], Any]:
        inputs = prompt(backend, count)
        inputs["input_ids"] = inputs["input_ids"].clamp(max=IMAGE - 1)  # a prompt of words
        return lambda _: read(inputs)

    def pruned(pruner: Any) -> Callable[[int], Prefilled]:
        return lambda _: prefill_pruned(backend, whole, pruner)

    made = []
    for count in counts:
        made.append(measure.Job(f"floor {count}", plain(count)))
        made.append(measure.Job(f"before {count}", pruned(UniformGrid(count))))
        for version in VERSIONS:
            made.append(
                measure.Job(f"within {version} {count}", pruned(within(count, version, len(backend.decoder.layers))))
            )
    return made


def within(count: int, version: Literal["1.5", "2.0"], num_layers: int) -> SparseVLM:
    """After the usual layers; where these are too late for so few, the first cut is after layer 0."""
    usual = SparseVLM(count, version)
    layers = usual.layers_of(num_layers)
    try:
        usual.budgets_of(VISUAL, layers, num_layers)
    except InputError:
        return SparseVLM(count, version, layers=(0, *layers[1:]))
    return usual


def cache_bytes(result: Any) -> int:
    """Keys and values, exactly."""
    cache = result.cache if isinstance(result, Prefilled) else result.past_key_values
    return sum(kept.numel() * kept.element_size() for layer in cache.layers for kept in (layer.keys, layer.values))


def table(rows: dict[str, dict[str, Any]], counts: Sequence[int]) -> str:
    """A line for each number of tokens: processor time of the floor, ratios to it, and to reading all."""
    methods = ("before", "within 1.5", "within 2.0")
    lines = [
        "| visual tokens | floor, processor ms | " + " | ".join(f"{method} / floor" for method in methods) + " | "
        "speed-up before | within 1.5 | cache before | within 1.5 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole = rows[f"floor {VISUAL}"]
    for count in counts:
        floor = rows[f"floor {count}"]
        found = [rows[f"{method} {count}"] for method in methods]
        ratios = " | ".join(f"{row['cpu_min_s'] / floor['cpu_min_s']:.2f}" for row in found)
        gains = " | ".join(f"{whole['cpu_min_s'] / row['cpu_min_s']:.2f}" for row in found[:2])
        caches = " | ".join(f"{row['cache_bytes'] / whole['cache_bytes']:.0%}" for row in found[:2])
        lines.append(f"| {count} | {1000 * floor['cpu_min_s']:.0f} | {ratios} | {gains} | {caches} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("python -m benchmarks.prefill_speed", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=32 if on_gpu else 8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 192, 128, 64, 32], help="visual tokens kept")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--memory", action="store_true", help="the peak of each job too")
    parser.add_argument("--out", type=Path, default=_RESULTS / "prefill-speed.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    counts = sorted({VISUAL, *options.tokens}, reverse=True)
    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    backend = load(SHAPES[options.shape], options.layers, dtype, device)
    work = jobs(backend, counts)
    times = measure.interleaved(work, options.repeats, lambda name: 1)
    rows: dict[str, dict[str, Any]] = {name: dict(measure.summary(taken)) for name, taken in times.items()}
    for job in work:
        rows[job.name]["cache_bytes"] = cache_bytes(job.run(0))
        if options.memory:
            rows[job.name] |= measure.peak_memory(job)
    machine = measure.machine()
    where = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"
    print(f"{options.shape}, {options.layers} layers, {str(dtype).removeprefix('torch.')}; {where}\n")
    print(table(rows, counts))
    options.out.parent.mkdir(exist_ok=True)
    told = {"machine": machine, "shape": options.shape, "layers": options.layers, "jobs": rows}
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
