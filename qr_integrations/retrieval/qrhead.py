"""QRHead: a few query-focused heads rank documents (arXiv 2506.09944)."""

from collections.abc import Sequence
from pathlib import Path

from qr_integrations.backend import Backend
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.layout import PromptStyle
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.retrieval.windows import Overflow


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
        overflow: Overflow = "error",
        max_doc_tokens: int | None = None,
        max_tokens: int | None = None,
        keep_prefixes: int = 2,
        first_occurrence: bool = False,
    ) -> None:
        """Args:
        model: a `Backend`, or a name for `Backend.load`.
        heads: ``"auto"`` (shipped or published for the model), ``"all"``, a `HeadSet`, a file, or ``(layer, head)``
            pairs.
        calibrated: subtract the null query's attention (equation 3).
        overflow: when documents exceed the window: ``"error"``, ``"head"`` cuts the longest at their ends until all
            fit, ``"windows"`` ranks in several prompts and lets the best of each meet in a last one.
        max_doc_tokens: cut every document to this many tokens.
        max_tokens: window in tokens; None takes the model's own.
        keep_prefixes: how many lists of documents stay in memory for further queries; 0 keeps none.
        first_occurrence: the authors' text search for spans, quirk included.

        Raises:
            HeadError: no heads are known for the model, or it lacks them.
            LoadError: the model cannot be loaded.
        """
        super().__init__(
            model,
            heads,
            PromptStyle(first_occurrence=first_occurrence),
            calibrated=calibrated,
            overflow=overflow,
            max_doc_tokens=max_doc_tokens,
            max_tokens=max_tokens,
            keep_prefixes=keep_prefixes,
        )
