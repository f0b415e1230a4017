"""A lower-casing byte-level BPE in which a word is cut the same way wherever it stands."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .data import Passage, Pool

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = (
    "['\u2019]"
    r"(?:s|t|re|ve|ll|d|m)(?!\p{L})|[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{M}]+|\p{N}{1,4}|\n"
    r"|[^\s\p{L}\p{M}\p{N}]"
)
"""A piece is a word, a Chinese character, up to four digits, one newline or one other sign.

Every newline is a piece of its own, so no text put in front of or behind a paragraph break changes how the rest is cut.
"""
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
OPENING = "Here are some paragraphs:"
INSTRUCTION = "Please find information that are relevant to the following query in the paragraphs above.\n\nQuery:"
NULL_QUERY = "N/A"


def _texts(passages: Sequence[Passage], questions: Sequence[str]) -> Iterable[str]:
    yield from (p.body for p in passages)
    yield from questions
    yield from [f"[{i}] {INSTRUCTION} {NULL_QUERY} {OPENING}" for i in range(1, 300)]


def train_tokenizer(pool: Pool, foreign: Sequence[Pool], size: int) -> PreTrainedTokenizerFast:
    """Trains the vocabulary on the training passages and questions and the foreign paragraphs.

    White space is dropped and every piece gets one space in front, so "Paris" after a newline, a bracket or a space is
    the same token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    texts = list(_texts(pool.passages, [q.text for q in pool.questions]))
    for other in foreign:
        texts += list(_texts(other.passages, [q.text for q in other.questions]))
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it; it adds no token of its own, the chat template writes the first one."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt_text(passages: Sequence[Passage], query: str) -> str:
    """The user message, word for word as the package builds it."""
    documents = "".join(f"\n\n[{i}] {p.body}" for i, p in enumerate(passages, 1))
    return f"{OPENING}{documents}\n\n{INSTRUCTION} {query}"


class PromptPieces:
    """Token ids of the prompt's parts, so that a list is put together without tokenizing its passages again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.head = self.ids(f"<|bos|><|user|>\n{OPENING}")
        self.gap = self.ids("\n\n")
        self.instruction = self.ids(INSTRUCTION)
        self.closing = self.ids("<|end|>\n<|assistant|>\n")
        self.numbers = [self.ids(f"[{i}]") for i in range(1001)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def branch(self, query: str) -> list[int]:
        """The tokens after "Query:": the query's own and the closing ones."""
        return self.ids(query) + self.closing

    def prefix(self, documents: Sequence[Sequence[int]]) -> tuple[list[int], list[int], int]:
        """Ids up to "Query:", the document number of every token (-1 outside), and the first row of the instruction."""
        tokens, owner = list(self.head), [-1] * len(self.head)
        for i, document in enumerate(documents):
            tokens += self.gap
            owner += [-1] * len(self.gap)
            body = [*self.numbers[i + 1], *document]
            tokens += body
            owner += [i] * len(body)
        tokens += self.gap
        start = len(tokens)
        tokens += self.instruction
        return tokens, owner + [-1] * (len(tokens) - len(owner)), start


def check_pieces(tokenizer: PreTrainedTokenizerFast, lists: Sequence[tuple[Sequence[Passage], str]]) -> int:
    """Asserts over the lists that the parts make the whole prompt, and that offsets point into the original text."""
    pieces = PromptPieces(tokenizer)
    for passages, query in lists:
        prefix, owner, _ = pieces.prefix([pieces.ids(p.body) for p in passages])
        message = [{"role": "user", "content": prompt_text(passages, query)}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert whole["input_ids"] == prefix + pieces.branch(query), query
        last = len(passages)
        begin = whole["offset_mapping"][owner.index(last - 1)][0]
        end = whole["offset_mapping"][len(owner) - 1 - owner[::-1].index(last - 1)][1]
        assert text[begin:end] == f"[{last}] {passages[-1].body}".rstrip(), text[begin:end]
    return len(lists)


def random_lists(pool: Pool, seed: int) -> list[tuple[list[Passage], str]]:
    """Random lists for `check_pieces`."""
    rng = random.Random(seed)
    return [([rng.choice(pool.passages) for _ in range(6)], rng.choice(pool.questions).text) for _ in range(200)]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer that `train_tokenizer` made."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
