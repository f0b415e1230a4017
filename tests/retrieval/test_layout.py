"""Spans are right for any tokenizer, for identical documents, and when only the query changes."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Dracula was written by Bram Stoker in 1897.",
    "  Leading and trailing space. \n\nAnd a blank line.\t",
    "東京都は日本の首都 🙂👩\u200d🚀 e\u0301 Straße ﬁn İstanbul",
    "Dracula was written by Bram Stoker in 1897.",
    "",
    "No",
]
CORPUS = [
    *TEXTS,
    "Here are some paragraphs: Please find information that are relevant to the following query",
    "[1] [2]",
] * 3


def byte_level(normalizer: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Like sentencepiece: a mark for spaces, one also in front of the text, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    """Drops white space: line ends have no token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, lower-cased and NFKC": lambda: byte_level(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "metaspace": metaspace,
    "word-piece": word_piece,
}


class Characters(PreTrainedTokenizer):
    """A python-only tokenizer, which cannot tell offsets: one token per character."""

    vocab_size = 0x110000

    def get_vocab(self) -> dict[str, int]:
        return {}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def backend(tokenizer: Any) -> Any:
    from qr_integrations import Backend

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=None
    )
    return Backend(LlamaForCausalLM(config), tokenizer)


def write(tokenizer: Any, query: str, texts: list[str]) -> Any:
    from qr_integrations import Document, PromptLayout

    return PromptLayout.build(backend(tokenizer), query, [Document(text, "Title") for text in texts])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_document_span_covers_its_text_and_no_neighbour(name: str) -> None:
    layout = write(TOKENIZERS[name](), "who wrote dracula", TEXTS)
    assert layout.offsets is not None
    for i, (span, text) in enumerate(zip(layout.documents, layout.texts, strict=True)):
        assert layout.text[text.slice()] == TEXTS[i]
        begin = layout.text.index(f"[{i + 1}] Title\n")
        first, last = layout.offsets[span.start], layout.offsets[span.stop - 1]
        assert first[0] <= begin < first[1]
        # A boundary token may also hold the separator (as published), but never a character of the next document.
        end = layout.documents[i + 1].start if i + 1 < len(TEXTS) else layout.query.start
        assert span.stop <= end and last[1] <= layout.offsets[end][0] + 1
        written = layout.text[begin : text.stop].rstrip()
        assert last[1] >= begin + len(written)
    assert layout.query.stop == len(layout.token_ids) and layout.shared.stop == layout.query.start
    assert layout.text[layout.offsets[layout.query.start][0] :].lstrip().startswith("Please find")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rewriting_the_query_equals_writing_afresh(name: str) -> None:
    from qr_integrations import Document
    from qr_integrations.retrieval.layout import PromptStyle, PromptWriter, Query

    documents = [Document(text) for text in TEXTS]
    writer = PromptWriter(backend(TOKENIZERS[name]()), PromptStyle())
    known = writer.write(Query("N/A"), documents)
    for query in ["who wrote dracula", " spaced\n\n", "東京 🙂", "\u0301combining", "x" * 500]:
        ours, fresh = writer.rewrite(known, Query(query), documents), writer.write(Query(query), documents)
        assert ours.token_ids == fresh.token_ids and ours.text == fresh.text
        assert (ours.documents, ours.query, ours.shared, ours.texts) == (
            fresh.documents,
            fresh.query,
            fresh.shared,
            fresh.texts,
        )
        assert (ours.offsets == fresh.offsets).all()


@pytest.mark.parametrize("blocks", [False, True], ids=["joint", "blocks"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_further_documents_written_behind_equal_writing_afresh(name: str, blocks: bool) -> None:
    from qr_integrations import Document
    from qr_integrations.retrieval.layout import PromptStyle, PromptWriter, Query

    writer = PromptWriter(backend(TOKENIZERS[name]()), PromptStyle(blocks=blocks))
    texts = [*TEXTS, "", "\n", "ends in white space \n\n ", "[2] 東京 🙂", "\u0301combining", "x" * 500]
    documents = [Document(text, title) for text in texts for title in (None, "Title", "\n")]
    query, known = Query("N/A"), writer.write(Query("N/A"), documents[:1])
    for count in range(2, len(documents) + 1):
        known, fresh = writer.extend(known, query, documents[:count]), writer.write(query, documents[:count])
        assert all(np.array_equal(getattr(known, part.name), getattr(fresh, part.name)) for part in fields(fresh)), (
            documents[count - 1]
        )


def test_a_tokenizer_without_offsets_is_written_piece_by_piece() -> None:
    layout = write(Characters(), "who", TEXTS)
    assert layout.offsets is None and "".join(map(chr, layout.token_ids)) == layout.text
    for i, span in enumerate(layout.documents):
        assert layout.text[span.slice()] == f"[{i + 1}] Title\n{TEXTS[i]}"
    assert layout.text[layout.query.slice()].startswith("Please find") and layout.query.stop == len(layout)


def test_chat_template_of_the_model_is_used(qr_mini: Any) -> None:
    from qr_integrations import Document, PromptLayout

    layout = PromptLayout.build(qr_mini, "who", [Document("A text.", "A title")])
    message = (
        "Here are some paragraphs:\n\n[1] A title\nA text.\n\n"
        "Please find information that are relevant to the following query in the paragraphs above.\n\nQuery: who"
    )
    rendered = qr_mini.tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    assert layout.text == rendered
    assert list(layout.token_ids) == qr_mini.tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("num_tokens", [1, 3, 5, 8, 1000])
def test_shortening_keeps_the_beginning(num_tokens: int) -> None:
    from qr_integrations import Document
    from qr_integrations.retrieval.layout import PromptStyle, PromptWriter, Query, shorten

    document = Document(TEXTS[0], "Title", id="d", metadata={"k": 1})
    layout = write(byte_level(), "who", [TEXTS[0]])
    shorter = shorten(layout, 0, document, num_tokens)
    assert TEXTS[0].startswith(shorter.text) and (shorter.id, shorter.metadata) == ("d", {"k": 1})
    assert document.title is not None and shorter.title is not None and document.title.startswith(shorter.title)
    writer = PromptWriter(backend(byte_level()), PromptStyle())
    again, bare = (writer.write(Query("who"), [d]) for d in (shorter, Document("", "")))
    assert len(again.documents[0]) <= max(num_tokens, len(bare.documents[0])) + 2
