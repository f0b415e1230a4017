"""Writes and reads the model's folder: half-precision weights, processor, tokenizer, chat template."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor


def export(folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Saves a copy in float16, which `from_pretrained` of both classes reads."""
    half = copy.deepcopy(model).to("cpu", torch.float16)
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone
    processor.save_pretrained(folder)


def load_exported(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The exported model in float32, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
