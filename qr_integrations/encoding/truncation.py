"""Matryoshka embeddings of texts (arXiv 2205.13147): the first numbers of a vector, used alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from qr_integrations.errors import InputError, MissingExtra


def truncate_embeddings(vectors: Float[np.ndarray, "*N D"], dim: int) -> Float[np.ndarray, "*N d"]:
    """The first `dim` numbers of each vector, at length 1 again; a vector of zeros stays one.

    It serves vectors of models that were trained for it, whose first numbers tell the most.

    Raises:
        InputError: more numbers than there are, or less than 1.

    Example:
        >>> import numpy as np
        >>> from qr_integrations.encoding import truncate_embeddings
        >>> truncate_embeddings(np.array([[3.0, 4.0, 12.0]]), 2).tolist()
        [[0.6, 0.8]]
    """
    if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= vectors.shape[-1]:
        raise InputError(f"dim={dim!r} cannot be cut from {vectors.shape[-1]} numbers: pass 1 to {vectors.shape[-1]}")
    cut = vectors[..., :dim]
    lengths = np.linalg.norm(cut, axis=-1, keepdims=True)
    return cut / np.where(lengths == 0, 1, lengths)


class TruncatedTextEncoder:
    """A sentence-transformers model whose vectors are cut to their first numbers.

    It knows no framework: its two methods are those that embeddings of LangChain and LlamaIndex are made of.

    Args:
        model: a name or folder that sentence-transformers loads, or a ``SentenceTransformer``.
        dim: numbers of a vector; None keeps all.

    Raises:
        InputError: `dim` that the model does not have.
        MissingExtra: sentence-transformers is not installed.
    """

    def __init__(self, model: Any, dim: int | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra("TruncatedTextEncoder", "eval") from error
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
            raise InputError(f"dim={dim!r} leaves nothing of a vector: pass 1 or more")
        self.model = SentenceTransformer(str(model)) if isinstance(model, str | Path) else model
        self.dim = dim
        self.embed_query("how long is a vector")

    def embed_documents(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector of length 1 for each text."""
        return self._embed(self.model.encode_document, list(texts))

    def embed_query(self, text: str) -> list[float]:
        """A vector of length 1, as the model embeds questions."""
        return self._embed(self.model.encode_query, [text])[0]

    def _embed(self, encode: Any, texts: list[str]) -> list[list[float]]:
        if not texts:
            return []
        made = encode(texts, truncate_dim=self.dim, normalize_embeddings=True, show_progress_bar=False)
        if self.dim is not None and made.shape[1] != self.dim:
            raise InputError(f"dim={self.dim} cannot be cut from {made.shape[1]} numbers: pass 1 to {made.shape[1]}")
        vectors: list[list[float]] = made.tolist()
        return vectors
