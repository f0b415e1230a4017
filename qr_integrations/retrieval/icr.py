"""ICR: in-context reranking with the attention of all heads (arXiv 2410.02642)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from qr_integrations.backend import Backend
from qr_integrations.errors import InputError
from qr_integrations.retrieval.layout import ANSWER, FIND, PromptStyle
from qr_integrations.retrieval.refinements import PUBLISHED, Refinements
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.retrieval.store import DocumentCache
from qr_integrations.retrieval.windows import Merge, Truncation

STYLES = {"IE": PromptStyle(FIND, strip=True), "QA": PromptStyle(ANSWER, strip=True)}


class ICRReranker(AttentionReranker):
    """Rank documents with all heads of a model (ICR, arXiv 2410.02642).

    It is QRHead's road with every head, other white space, and for questions another instruction. All layers up to the
    last attention run, so it is slower than `QRHeadReranker`; it needs no head set.

    Where we differ from the authors' code (OSU-NLP-Group/In-Context-Reranking, 9117e9f): documents that end in white
    space are stripped and ranked, where the published code stops with a counting error; all documents are ranked in one
    prompt, where theirs slides a window of 20 over them.
    """

    def __init__(
        self,
        model: Backend | str | Path,
        *,
        retrieval_type: Literal["IE", "QA"] = "IE",
        calibrated: bool = True,
        prompt: str | None = None,
        instruction: str | None = None,
        null_instruction: float = 0.0,
        truncation: Truncation = "error",
        max_doc_tokens: int | None = None,
        max_context_tokens: int | None = None,
        batch_size: int | None = None,
        merge: Merge = "one_scale",
        keep_prefixes: int = 2,
        refinements: Refinements | Mapping[str, Any] = PUBLISHED,
        cache: DocumentCache | None = None,
    ) -> None:
        """Args:
        model: a `Backend`, or a name for `Backend.load`.
        retrieval_type: ``"IE"`` asks to find information, ``"QA"`` to answer a question (multi-hop).
        calibrated: subtract the null query's attention.
        prompt, instruction, null_instruction, truncation, max_doc_tokens, max_context_tokens, batch_size,
            merge, keep_prefixes, refinements, cache: as in `QRHeadReranker`.

        Raises:
            InputError: unknown `retrieval_type`.
            LoadError: the model cannot be loaded.
        """
        if retrieval_type not in STYLES:
            raise InputError(f"unknown retrieval_type {retrieval_type!r}: pass 'IE' or 'QA'")
        style = STYLES[retrieval_type]
        super().__init__(
            model,
            "all",
            style if prompt is None else replace(style, template=prompt),
            calibrated=calibrated,
            instruction=instruction,
            null_instruction=null_instruction,
            truncation=truncation,
            max_doc_tokens=max_doc_tokens,
            max_context_tokens=max_context_tokens,
            batch_size=batch_size,
            merge=merge,
            keep_prefixes=keep_prefixes,
            refinements=refinements,
            cache=cache,
        )
