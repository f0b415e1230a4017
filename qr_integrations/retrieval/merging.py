"""One ranking out of several windows. Attention is a share of one prompt, and shares of different prompts differ.

Legend: W windows, K kept heads, Q query rows, T tokens of the shared part (documents), N documents of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.retrieval.windows import Candidate
from qr_integrations.types import ScoredDocument, Span

RIVALS = 16
_LEAST = 1e-6  # of a row's attention that falls beside the documents; less is rounding


@dataclass(frozen=True, slots=True)
class Shares:
    """What the rows of one query pay to one window, the heads apart, not calibrated.

    Attributes:
        tokens_KT: to every shared token, the mean over the rows.
        documents_KQN: of every row to every document.
        common_KQ: of every row to what all windows have in common: the prompt's beginning and the query itself.
    """

    tokens_KT: Float[Tensor, "K T"]
    documents_KQN: Float[Tensor, "K Q N"]
    common_KQ: Float[Tensor, "K Q"]


def on_one_scale(
    windows: Sequence[Shares], documents: Sequence[Sequence[Span]], *, rivals: int = RIVALS
) -> list[Float[Tensor, "K _"]]:
    """What one query pays to the tokens of every window, as if each document stood among `rivals` average ones.

    A softmax divides what a document draws by all that its prompt draws. What every window has in common, the prompt's
    beginning and the query, draws the same everywhere, so a row's share of it tells what the window draws. With that,
    a document that draws ``m`` (in units of what is common) where the others draw ``s`` on average gets the share
    ``m / (1 + m + rivals * s)``, row by row and head by head. One window stays as it is. It is exact, however the
    documents are split, where what they draw does not depend on the window: in layer 0, with documents that do not see
    each other and the query at the same position. Higher up, the rows themselves have read the window.

    On 600 passages in 10 prompts (``benchmarks/windows_quality.py``, 100 questions, `qr-mini`) nDCG@10 is 0.966 against
    0.958 for scores as they are, and 0.979 against 0.964 where documents do not see each other; with 300 more, so that
    four which answer share a prompt, 0.970 against 0.751, and 0.984 against 0.746. Between 8 and 30 rivals it is flat.

    Call it for the query and for every null query, before `calibrate`.

    Args:
        windows: the same query's shares of every window.
        documents: the spans of the documents in each.
        rivals: how many others each document is compared with; never more than there are.
    """
    if len(windows) == 1:
        return [windows[0].tokens_KT]
    drawn_WKQ = torch.stack([1.0 / shares.common_KQ.clamp(min=_LEAST) for shares in windows])
    all_KQ1 = (drawn_WKQ - 1.0).sum(0)[..., None]
    share = min(1.0, rivals / max(1, sum(map(len, documents)) - 1))
    scaled = []
    for shares, drawn_KQ, spans in zip(windows, drawn_WKQ, documents, strict=True):
        own_KQN = shares.documents_KQN * drawn_KQ[..., None]
        others_KQN = (all_KQ1 - own_KQN).clamp(min=0.0)
        new_KN = (own_KQN / (1.0 + own_KQN + share * others_KQN)).sum(1)
        old_KN = shares.documents_KQN.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        tokens_KT = shares.tokens_KT.clone()
        for span, factor_K in zip(spans, (new_KN / old_KN).T, strict=True):
            tokens_KT[:, span.slice()] *= factor_K[:, None]
        scaled.append(tokens_KT)
    return scaled


class Entrant(NamedTuple):
    """A document in one window: its best piece there, and what came of it."""

    piece: Candidate
    item: ScoredDocument


def best_of_all(heats: Sequence[Sequence[Entrant]]) -> list[ScoredDocument]:
    """The documents of all windows, best first; of one that stands in several, the best. Ties keep the given order."""
    best: dict[int, ScoredDocument] = {}
    for item in (entrant.item for heat in heats for entrant in heat):
        if item.index not in best or best[item.index].score < item.score:
            best[item.index] = item
    return sorted(best.values(), key=lambda item: (-item.score, item.index))


def finalists(heats: Sequence[Sequence[Entrant]], room: int, max_count: int | None) -> list[Candidate]:
    """The best of every window, then the second ... while they fit; each document once.

    Args:
        heats: every window, best first.
        room: tokens of the last prompt.
        max_count: the most documents in it.
    """
    places = sorted(
        ((place, -entrant.item.score, entrant.piece) for heat in heats for place, entrant in enumerate(heat)),
        key=lambda entry: entry[:2],
    )
    chosen: dict[int, Candidate] = {}
    for _, _, piece in places:
        room -= 0 if piece.index in chosen else piece.cost
        if room < 0 or len(chosen) == max_count:
            break
        chosen.setdefault(piece.index, piece)
    return list(chosen.values())


def behind_the_final(heats: Sequence[Sequence[Entrant]], final: Sequence[ScoredDocument]) -> list[ScoredDocument]:
    """The documents that did not reach the final, on its scale as far as that can be told."""
    reached = {item.index: item.score for item in final}
    others = []
    for heat in heats:
        here = sum(max(0.0, e.item.score) for e in heat if e.item.index in reached)
        there = sum(max(0.0, reached[e.item.index]) for e in heat if e.item.index in reached)
        scale = there / here if there > 0 and here > 0 else 1.0
        others.append([Entrant(e.piece, _scaled(e.item, scale)) for e in heat if e.item.index not in reached])
    return [replace(item, score=min(item.score, final[-1].score)) for item in best_of_all(others)]


def _scaled(item: ScoredDocument, scale: float) -> ScoredDocument:
    spans = tuple(replace(span, score=span.score * scale) for span in item.spans)
    return replace(item, score=item.score * scale, spans=spans)
