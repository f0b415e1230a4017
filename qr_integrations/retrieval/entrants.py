"""From the scores of a prompt's tokens to its documents, best first, with the words that they were ranked by.

Legend: K kept heads, T tokens of the shared part (documents).
"""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from qr_integrations.retrieval.explain import attended_words, strongest_spans
from qr_integrations.retrieval.layout import PromptLayout
from qr_integrations.retrieval.merging import Entrant
from qr_integrations.retrieval.scoring import score_documents
from qr_integrations.retrieval.windows import Candidate
from qr_integrations.types import ScoredDocument, ScoredSpan


def num_explained(explain: bool | int, top_k: int | None, count: int) -> int:
    """How many of `count` documents get spans."""
    return int(explain) if explain is not True else top_k or count


def explained_only(items: Sequence[ScoredDocument], count: int) -> list[ScoredDocument]:
    """Spans for the first `count` only: in the prompts before the last, others stood first."""
    return [replace(item, spans=()) if item.spans and place >= count else item for place, item in enumerate(items)]


def entrants(
    candidates: Sequence[Candidate],
    layout: PromptLayout,
    scores_KT: Float[Tensor, "K T"],
    window: int,
    *,
    explained: int = 0,
    max_spans: int | None = None,
) -> list[Entrant]:
    """The documents of one prompt, best first; of one in several pieces, the best. Ties keep their order.

    Args:
        candidates: as they stand in the prompt.
        layout, scores_KT: its layout and the calibrated scores of its tokens.
        window: its number.
        explained: so many get spans, the strongest `max_spans` each.
    """
    scores = score_documents(scores_KT, layout.documents).tolist()
    best: dict[int, int] = {}  # document -> place of its best piece in the prompt
    for place in sorted(range(len(scores)), key=lambda place: -scores[place]):
        best.setdefault(candidates[place].index, place)
    found: list[Entrant] = []
    for index, place in best.items():
        piece = candidates[place]
        words = words_of(layout, scores_KT, place, piece) if len(found) < explained else []
        spans = tuple(strongest_spans(piece.given.text, words, max_spans))
        tokens, cut = piece.document_tokens, piece.num_tokens_cut
        found.append(Entrant(piece, ScoredDocument(index, scores[place], piece.given, tokens, cut, window, spans)))
    return found


def words_of(layout: PromptLayout, scores_KT: Float[Tensor, "K T"], place: int, piece: Candidate) -> list[ScoredSpan]:
    """The words of a document in the prompt, by their characters in the text that the caller gave."""
    read = layout.text[layout.texts[place].slice()]
    shift = piece.start + piece.read.text.index(read)  # a prompt may leave out white space at the ends
    moved = [word.moved(shift) for word in attended_words(layout, scores_KT, place)]
    body = piece.given.body
    return [w for w in moved if body is None or (body.start <= w.span.start and w.span.stop <= body.stop)]
