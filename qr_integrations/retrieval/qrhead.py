"""QRHead: a few query-focused heads rank documents (arXiv 2506.09944)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qr_integrations.backend import Backend
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.layout import FIND, PromptStyle
from qr_integrations.retrieval.refinements import PUBLISHED, Refinements
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.retrieval.store import DocumentCache
from qr_integrations.retrieval.windows import Merge, Truncation


class QRHeadReranker(AttentionReranker):
    """Rank documents with the query-focused heads of a model (QRHead, arXiv 2506.09944, equations 2-4).

    Example:
        >>> from qr_integrations import QRHeadReranker
        >>> reranker = QRHeadReranker("qr-mini")
        >>> ranking = reranker.rank("who wrote dracula", ["Cats sleep.", "Dracula was written by Bram Stoker."])
        >>> ranking[0].document.text
        'Dracula was written by Bram Stoker.'

    Where we differ from the authors' code (princeton-pli/QRHead, 7a668e7): layers above the deepest chosen head do not
    run; a document's span is recorded while the prompt is written, not searched for (``first_occurrence=True``
    searches); models other than Llama 3 and Qwen 2 get their own chat template; scores are fp32 whatever the model's
    dtype.
    """

    def __init__(
        self,
        model: Backend | str | Path,
        *,
        heads: HeadSet | str | Path | Sequence[tuple[int, int]] = "auto",
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
        first_occurrence: bool = False,
        cache: DocumentCache | None = None,
    ) -> None:
        """Args:
        model: a `Backend`, or a name for `Backend.load`.
        heads: ``"auto"`` (shipped or published for the model), ``"all"``, a `HeadSet`, a file, or ``(layer, head)``
            pairs.
        calibrated: subtract the null query's attention (equation 3).
        prompt: what stands after the documents, with ``{query}`` in it; None takes the published words.
        instruction: what counts as relevant, in words, for every query; stands in front of the query. A rule for all
            queries goes well with ``null_instruction=1``.
        null_instruction: how much of the instruction the null query keeps, 0 to 1 (the lambda of arXiv 2609.17764).
            With 0, what the instruction asks for counts; with 1, only what the query adds to it.
        truncation: when documents exceed the window. ``"error"`` raises; ``"head"`` cuts the longest at their ends
            until all fit, or ranks in several prompts where too little of them would be left; ``"chunk"`` cuts nothing:
            long documents are ranked in pieces, by their best one.
        max_doc_tokens: cut every document to this many tokens, or, with ``"chunk"``, into pieces of this many.
        max_context_tokens: window in tokens; None takes the model's own.
        batch_size: the most documents in one prompt.
        merge: how several prompts become one ranking, see `Limits`: ``"one_scale"``, ``"final"`` or ``"raw"``.
        keep_prefixes: how many lists of documents stay in memory for further queries; 0 keeps none.
        refinements: ways to read and to count that the published method does not have, see `Refinements`; a mapping
            of its names will do.
        first_occurrence: the authors' text search for spans, quirk included.
        cache: keeps the keys and values of single documents, for other lists that they come back in.

        Raises:
            HeadError: no heads are known for the model, or it lacks them.
            LoadError: the model cannot be loaded.
        """
        super().__init__(
            model,
            heads,
            PromptStyle(FIND if prompt is None else prompt, first_occurrence=first_occurrence),
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
