"""Writes the model folder: half-precision weights, tokenizer with its chat template, the detected heads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .evaluate import Heads

DETECTION_DATA = "NaturalQuestions-open (lost-in-the-middle), lines 1000-1099: 1 gold + 19 BM25 negatives, shuffled"
SOURCE = "python -m training.qr_mini; QRscore of arXiv 2506.09944: mean calibrated attention mass on the gold document"


def export(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Saves weights in float16 and the tokenizer without white space in its file, which halves it."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    half.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    _write(folder / "tokenizer.json", json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    _for_older_releases(folder, tokenizer.chat_template)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _for_older_releases(folder: Path, template: str) -> None:
    """Names that transformers 4 reads too: tokenizer class, template in the configuration, `rope_theta` on top."""
    path = folder / "tokenizer_config.json"
    names = json.loads(path.read_text(encoding="utf-8"))
    extra = {"additional_special_tokens": names.get("extra_special_tokens", [])}
    dropped = {"backend", "is_local", "local_files_only", "extra_special_tokens"}
    kept = {k: v for k, v in names.items() if k not in dropped}
    extra |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    _write(path, json.dumps(kept | extra, indent=2))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    _write(path, json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}, indent=2))
    for written in folder.iterdir():
        written.chmod(0o644)


def export_heads(folder: Path, heads: Heads, detection: str = DETECTION_DATA) -> None:
    """Saves the heads, best first."""
    content = {
        "model": "qr-mini",
        "detection_data": detection,
        "objective": "qrscore",
        "heads": [list(h) for h in heads],
        "source": SOURCE,
    }
    _write(folder / "qr_heads.json", json.dumps(content))


def folder_size(folder: Path) -> int:
    """Bytes of weights and tokenizer."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in {".safetensors", ".json", ".jinja"})


def load_exported(folder: Path) -> LlamaForCausalLM:
    """The exported weights, computed in float32: what is measured is what is shipped."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
