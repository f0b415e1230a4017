"""What a request costs: documents, and tokens read and written, for the log and for the counters."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from qr_integrations.serving.work import ChatWork, Engine, ModelCard, Ranked, RankWork, Said, State


@dataclass(slots=True)
class Cost:
    """Of one request, as far as it has come.

    Attributes:
        documents: that were sent.
        tokens_read, tokens_written: by the model.
        is_cancelled: the client went away before the work was done.
        texts: what was asked; empty unless the log may hold it.
    """

    documents: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    is_cancelled: bool = False
    texts: list[str] = field(default_factory=list)


current_cost: ContextVar[Cost] = ContextVar("current_cost")


class CountingEngine:
    """An `Engine` that notes down what each request costs, and lets another one do the work.

    Args:
        engine: does the work.
        log_text: note down what was asked, too.
    """

    def __init__(self, engine: Engine, *, log_text: bool = False) -> None:
        self.engine, self.log_text = engine, log_text

    @property
    def state(self) -> State:
        """Whether there is work to be had."""
        return self.engine.state

    async def models(self) -> tuple[ModelCard, ...]:
        """What is served."""
        return await self.engine.models()

    async def rank(self, work: RankWork) -> Ranked:
        """Rank documents."""
        cost = self._noted(lambda: [work.query, *(document.text for document in work.documents)])
        cost.documents += len(work.documents)
        try:
            ranked = await self.engine.rank(work)
        except asyncio.CancelledError:
            cost.is_cancelled = True
            raise
        cost.tokens_read += ranked.num_tokens
        return ranked

    async def chat(self, work: ChatWork) -> Said:
        """Answer a conversation."""
        cost = self._noted(lambda: [message.text for message in work.messages])
        try:
            said = await self.engine.chat(work)
        except asyncio.CancelledError:
            cost.is_cancelled = True
            raise
        _add(cost, said)
        return said

    async def stream(self, work: ChatWork) -> AsyncIterator[str | Said]:
        """As `chat`, piece by piece."""
        cost = self._noted(lambda: [message.text for message in work.messages])
        pieces = self.engine.stream(work)
        try:
            async for piece in pieces:
                if isinstance(piece, Said):
                    _add(cost, piece)
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            cost.is_cancelled = True
            raise
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def start(self) -> None:
        """Load what is to be served."""
        await self.engine.start()

    async def stop(self, grace: float) -> None:
        """Finish what has begun, call off the rest."""
        await self.engine.stop(grace)

    def _noted(self, texts: Callable[[], list[str]]) -> Cost:
        cost = current_cost.get(None) or Cost()
        if self.log_text:
            cost.texts += texts()
        return cost


def _add(cost: Cost, said: Said) -> None:
    cost.tokens_read += said.usage.prompt_tokens
    cost.tokens_written += said.usage.completion_tokens
