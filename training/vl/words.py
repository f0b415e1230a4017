"""The words that the tokenizer knows."""

from __future__ import annotations

from qr_integrations.evaluation.drawn_world.questions import DESCRIBE, NUMBERS, SHORT
from qr_integrations.evaluation.drawn_world.world import COLOURS, KINDS, MARKS, PLURALS, WORDS


def all_words() -> list[str]:
    """Every word of questions, answers and instructions, sorted."""
    texts = [
        "user : assistant : . , ? and an a picture of in image is there the thing color what which letter number word",
        "shape on left or right how many are yes no small large detail details look at where read written it this",
        "mark object objects image content most important area question following describe find locate show nothing",
        "to for with from by be can you see please give me about not unsure zero six seven eight nine ten",
        SHORT,
        *DESCRIBE,
        *("".join(f" {word}" for word in group) for group in (KINDS, PLURALS, COLOURS, MARKS, WORDS, NUMBERS)),
    ]
    return sorted({word for text in texts for word in text.split()})
