"""The prompt, and where its parts are: spans are recorded while it is written, never searched for.

``opening  Here are some paragraphs:  [1] title⏎text  [2] ...  task  instruction  Query: query  closing``

Everything before the task is `shared`: it does not depend on the query and is read once per list of documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from qr_integrations.backend import Backend
from qr_integrations.errors import InputError
from qr_integrations.types import Document, Span

FIND = "Please find information that are relevant to the following query in the paragraphs above.\n\nQuery: {query}"
ANSWER = "Please answer the following question based on the information in the paragraphs above.\n\nQuery: {query}"
_INTRO = "Here are some paragraphs:"
Offsets = Int[np.ndarray, "token 2"]


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked.

    Attributes:
        text: the question.
        instruction: what counts as relevant, in words; a paragraph of its own in front of the question.
    """

    text: str
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How prompts differ from each other.

    Attributes:
        template: what stands after the documents, ``{query}`` in the question's place (`FIND`, or `ANSWER` as ICR has
            for questions). Empty lines part paragraphs.
        strip: remove white space around query and passages, as ICR's code does.
        first_occurrence: place each document where its text first occurs in the prompt, as QRHead's code does: wrong
            for a document whose text is quoted by an earlier one. Only for reproducing published numbers.
        blocks: documents do not see each other; each is written, and numbered, as if it were the only one.
    """

    template: str = FIND
    strip: bool = False
    first_occurrence: bool = False
    blocks: bool = False

    def __post_init__(self) -> None:
        if self.first_occurrence and self.blocks:
            raise InputError("the authors' search knows one text, not blocks: leave out first_occurrence")
        if self.template.count("{query}") != 1:
            raise InputError(
                f"the prompt {self.template!r} has no place for the query: pass one with {{query}} in it, once"
            )


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A prompt as tokens, and the token spans of its parts (half-open).

    Attributes:
        token_ids: the whole prompt, length T.
        documents: one span each, from the ``[`` of its number to the last character of its text.
        query: the rows whose attention is averaged: task, instruction, query and closing, to the end of the prompt.
        shared: what comes before; the same for every query over these documents.
        text: the prompt as text.
        offsets: ``[T, 2]`` characters of each token in `text`; None for tokenizers that cannot tell.
        texts: character span of each document's text in `text`.
        tail: the character of `text` where what follows the documents starts.
        blocks: for documents that do not see each other, the tokens of each with the white space behind it.
    """

    token_ids: tuple[int, ...]
    documents: tuple[Span, ...]
    query: Span
    shared: Span
    text: str
    offsets: Offsets | None
    texts: tuple[Span, ...]
    tail: int
    blocks: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def build(
        cls, backend: Backend, query: str, documents: Sequence[Document], style: PromptStyle | None = None
    ) -> "PromptLayout":
        """Write the prompt of `query` over `documents` for the model of `backend`."""
        return PromptWriter(backend, style or PromptStyle()).write(Query(query), documents)


class PromptWriter:
    """Writes prompts for one model, in its chat template or, for the families of the paper, as published."""

    def __init__(self, backend: Backend, style: PromptStyle) -> None:
        self._tokenizer, self._chat, self.style = backend.tokenizer, backend.chat, style

    def write(self, query: Query, documents: Sequence[Document]) -> PromptLayout:
        """The prompt of `query` over `documents`."""
        pieces = [self._chat.opening + _INTRO, self._chat.separator]
        more, passages, texts = self._pieces(documents, 1, len("".join(pieces)))
        pieces += [*more, self._tail(query)]
        text = "".join(pieces)
        if self.style.first_occurrence:
            passages = [Span(found := text.index(text[p.slice()]), found + len(p)) for p in passages]
        tail = len(text) - len(pieces[-1])
        ids, offsets, spans, blocks = self._tokenize(pieces, [*passages, Span(tail, len(text))])
        rows = Span(spans[-1].start, len(ids))
        return PromptLayout(
            tuple(ids), tuple(spans[:-1]), rows, Span(0, rows.start), text, offsets, tuple(texts), tail, blocks
        )

    def rewrite(self, known: PromptLayout, query: Query, documents: Sequence[Document]) -> PromptLayout:
        """The prompt of another query over the documents of `known`, without tokenizing the documents again.

        The end of the prompt is tokenized alone where that gave the same tokens for the known query.
        """
        start, same = known.tail, known.offsets is not None
        if same:
            same = tuple(self._encode(known.text[start:], False)[0]) == known.token_ids[known.query.slice()]
        if not same:
            return self.write(query, documents)
        tail = self._tail(query)
        ids, offsets = self._encode(tail, False)
        assert offsets is not None and known.offsets is not None
        shared = known.shared.slice()
        return PromptLayout(
            known.token_ids[shared] + tuple(ids),
            known.documents,
            Span(known.query.start, known.query.start + len(ids)),
            known.shared,
            known.text[:start] + tail,
            np.concatenate([known.offsets[shared], offsets + start]),
            known.texts,
            start,
            known.blocks,
        )

    def extend(self, known: PromptLayout, query: Query, documents: Sequence[Document]) -> PromptLayout:
        """The prompt over the documents of `known` and further ones behind, tokenizing the last known one and these.

        All are tokenized where the last known one by itself gives other tokens.

        Args:
            known: the prompt of the same query over the first of `documents`.
            query: what is asked.
            documents: all of them.
        """
        known_last = len(known.documents) - 1
        if known.offsets is None or known_last < 0 or self.style.first_occurrence:
            return self.write(query, documents)
        head, _ = self._passage(1 if self.style.blocks else known_last + 1, documents[known_last])
        start, first = known.texts[-1].start - len(head), known.documents[-1].start
        pieces, passages, texts = self._pieces(documents[known_last:], known_last + 1, start)
        tail = self._tail(query)
        again = self._encode_all([*pieces[:2], tail], special=False)[0]
        if known.offsets[first, 0] != start or tuple(again) != known.token_ids[first:]:
            return self.write(query, documents)
        ids, found, ends = self._encode_all([*pieces, tail], special=False)
        assert found is not None
        offsets = found + start
        text = known.text[:start] + "".join(pieces) + tail
        spans = [_token_span(offsets, span) for span in [*passages, Span(len(text) - len(tail), len(text))]]
        spans = [Span(span.start + first, span.stop + first) for span in spans]
        blocks = tuple(Span(a + first, b + first) for a, b in pairwise(ends[:-1])) if self.style.blocks else ()
        return PromptLayout(
            known.token_ids[:first] + tuple(ids),
            (*known.documents[:-1], *spans[:-1]),
            Span(spans[-1].start, first + len(ids)),
            Span(0, spans[-1].start),
            text,
            np.concatenate([known.offsets[:first], offsets]),
            (*known.texts[:-1], *texts),
            len(text) - len(tail),
            (*known.blocks[:-1], *blocks),
        )

    def _pieces(
        self, documents: Sequence[Document], number: int, position: int
    ) -> tuple[list[str], list[Span], list[Span]]:
        """Passages, each with its separator behind; the characters of each, and of its text, from `position` on."""
        pieces, passages, texts = [], [], []
        for place, document in enumerate(documents, start=number):
            head, body = self._passage(1 if self.style.blocks else place, document)
            pieces += [head + body, self._chat.separator]
            passages.append(Span(position, position + len(head) + len(body)))
            texts.append(Span(position + len(head), passages[-1].stop))
            position = passages[-1].stop + len(self._chat.separator)
        return pieces, passages, texts

    def _passage(self, number: int, document: Document) -> tuple[str, str]:
        title = "" if document.title is None else f"{document.title}\n"
        text = document.text
        if self.style.strip:
            title, text = (title.lstrip(), text.rstrip()) if title.strip() else ("", text.strip())
        return f"[{number}] {title}", text

    def _tail(self, query: Query) -> str:
        text = query.text.strip() if self.style.strip else query.text
        paragraphs = []
        for paragraph in self.style.template.split("\n\n"):
            if "{query}" in paragraph and query.instruction:
                paragraphs.append(query.instruction)
            paragraphs.append(paragraph.replace("{query}", text))
        return self._chat.separator.join(paragraphs) + self._chat.closing

    def _encode(self, text: str, special: bool) -> tuple[list[int], Offsets | None]:
        fast = self._tokenizer.is_fast
        out = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
        return list(out["input_ids"]), np.asarray(out["offset_mapping"]).reshape(-1, 2) if fast else None

    def _tokenize(
        self, pieces: Sequence[str], chars: Sequence[Span]
    ) -> tuple[list[int], Offsets | None, list[Span], tuple[Span, ...]]:
        """Token ids, offsets, the token span of every character span, and the blocks.

        In one go; for blocks, each with its separator by itself; and for a tokenizer that cannot tell characters piece
        by piece, so that every boundary is known.
        """
        ids, offsets, ends = self._encode_all(pieces, special=self._chat.add_special_tokens)
        block_ends = (ends[1:-1] if offsets is not None else ends[2::2]) if self.style.blocks else []
        blocks = tuple(Span(*ends) for ends in pairwise(block_ends))
        if offsets is None:
            return ids, None, [Span(*ends) for ends in list(pairwise(ends))[2::2]], blocks
        return ids, offsets, [_token_span(offsets, span) for span in chars], blocks

    def _encode_all(self, pieces: Sequence[str], *, special: bool) -> tuple[list[int], Offsets | None, list[int]]:
        """Token ids, offsets, and the number of tokens after each part that is tokenized by itself."""
        fast = self._tokenizer.is_fast
        if not fast:
            parts = list(pieces)
        elif self.style.blocks:
            parts = ["".join(pieces[i : i + 2]) for i in range(0, len(pieces), 2)]
        else:
            parts = ["".join(pieces)]
        ids: list[int] = []
        found, ends, characters = [], [0], 0
        for part in parts:
            some, offsets = self._encode(part, special and not ids)
            ids += some
            ends.append(len(ids))
            found += [] if offsets is None else [offsets + characters]
            characters += len(part)
        return ids, np.concatenate(found) if found else None, ends


def _token_span(offsets: Offsets, chars: Span) -> Span:
    """Tokens of a character span. A character in several tokens counts for its last one, as in the published code."""
    real = np.flatnonzero(offsets[:, 1] > offsets[:, 0])  # added special tokens stand at (0, 0)
    starts, stops = offsets[real, 0], offsets[real, 1]
    last_begun = np.searchsorted(starts, [chars.start, max(chars.start, chars.stop - 1)], side="right") - 1
    first = last_begun[0]
    if first < 0 or stops[first] <= chars.start:  # the character itself has no token: take the next one
        first = np.searchsorted(stops, chars.start, side="right")
    return Span(int(real[first]), int(real[last_begun[1]]) + 1)


def num_title_tokens(layout: PromptLayout, index: int, before: int = 0) -> int:
    """Tokens of a document that start `before` characters ahead of its text: number and title, or less.

    0 for tokenizers that cannot tell.
    """
    if layout.offsets is None:
        return 0
    starts = layout.offsets[layout.documents[index].slice(), 0]
    return int((starts < layout.texts[index].start - before).sum())


def title_room(layout: PromptLayout, index: int, document: Document, max_tokens: int) -> int:
    """How many of a document's `max_tokens` its number and title get: all they need, or half if that left none."""
    needed = num_title_tokens(layout, index)
    number = num_title_tokens(layout, index, before=len(document.title or "") + 1) + 1  # and the line end
    return needed if needed < max_tokens else min(needed, max(number, max_tokens // 2))


def shorten_title(layout: PromptLayout, index: int, document: Document, max_tokens: int) -> Document:
    """`document` with a title that takes, with its number, at most `max_tokens` tokens."""
    if document.title is None or layout.offsets is None or num_title_tokens(layout, index) <= max_tokens:
        return document
    kept = int(layout.offsets[layout.documents[index].start + max(1, max_tokens) - 1][1])
    cut = layout.texts[index].start - 1 - kept  # characters up to the line end
    return replace(document, title=document.title[: max(0, len(document.title) - max(0, cut))])


def shorten(layout: PromptLayout, index: int, document: Document, max_tokens: int) -> Document:
    """`document`, cut after its first `max_tokens` tokens in `layout` (its number and title included)."""
    span, chars = layout.documents[index], layout.texts[index]
    if len(span) <= max_tokens:
        return document
    left_out = document.text.index(layout.text[chars.slice()])  # white space in front, where the prompt strips
    if layout.offsets is None:
        return replace(document, text=document.text[: left_out + len(document.text) * max_tokens // len(span)])
    room = title_room(layout, index, document, max_tokens)
    first = span.start + num_title_tokens(layout, index)
    last = min(first + max(0, max_tokens - room), span.stop) - 1
    kept = int(layout.offsets[last][1]) - chars.start if last >= first else 0
    return replace(shorten_title(layout, index, document, room), text=document.text[: left_out + max(0, kept)])
