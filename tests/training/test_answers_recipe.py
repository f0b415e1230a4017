"""The recipe of the model that answers: its prompts are the package's, and nothing of the test is in the training."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

TEXTS = ("Lena lives in Porto. The weather was fine.", "Otto has a cat.", "Vera\nVera Chopra plays the old grey cello.")
QUESTIONS = (("Where does Lena live?", "Porto", 0), ("What does Vera Chopra play?", "grey cello", 2))


@pytest.fixture(scope="module")
def model() -> Any:
    from qr_integrations.bundled import bundled_path
    from training.export import load_exported

    return load_exported(bundled_path("qr-mini")).eval()


@pytest.fixture(scope="module")
def prompts() -> Any:
    from qr_integrations.bundled import bundled_path
    from training.answers.prompts import AnswerPrompts
    from training.tokenizer import load_tokenizer

    return AnswerPrompts(load_tokenizer(bundled_path("qr-mini")))


def lesson(questions: Any = QUESTIONS, texts: Any = TEXTS) -> Any:
    from training.answers.facts import Asked, Lesson
    from training.data import Passage

    return Lesson([Passage("", text) for text in texts], [Asked(*question) for question in questions])


def writer(held_out: bool = False, **options: Any) -> Any:
    from training.answers.facts import FactWriter
    from training.answers.vocabulary import Vocabulary

    return FactWriter(Vocabulary(held_out), **options)


def drawn(writer: Any, count: int = 60) -> Iterator[Any]:
    rng = Random(5)
    return (writer.draw(rng.randint(2, 12), 6, rng) for _ in range(count))


def logits(model: Any, packed: Any) -> Any:
    """In float32, where a pass over all is comparable to passes one by one."""
    with torch.no_grad():
        hidden = model.model(
            input_ids=packed.ids[None], attention_mask=packed.mask[None, None], position_ids=packed.positions[None]
        ).last_hidden_state[0, packed.rows]
        return hidden @ model.model.embed_tokens.weight.T


# Prompts


@pytest.mark.parametrize("blocks", [False, True], ids=["joint", "block"])
def test_prompt_of_the_package(prompts: Any, qr_mini: Any, blocks: bool) -> None:
    from qr_integrations.retrieval.layout import ANSWER, PromptLayout, PromptStyle
    from qr_integrations.types import Document

    style = PromptStyle(ANSWER, blocks=blocks)
    layout = PromptLayout.build(qr_mini, QUESTIONS[0][0], [Document(text) for text in TEXTS], style)
    packed = prompts.pack([lesson(QUESTIONS[:1])], [blocks])
    assert packed.ids.tolist()[: len(layout)] == list(layout.token_ids)
    assert prompts.tokenizer.decode(packed.ids[len(layout) :]).strip() == "porto"
    assert packed.rows[0] == len(layout) - 1


def test_block_prompt_reads_as_kept_blocks_do(prompts: Any, model: Any, qr_mini: Any) -> None:
    from qr_integrations.retrieval import DocumentIndex
    from qr_integrations.retrieval.layout import ANSWER

    index = DocumentIndex.build(TEXTS, qr_mini, layout="block", answers=True)
    packed = prompts.pack([lesson(QUESTIONS[1:])], [True])
    told = qr_mini.answer(ANSWER.replace("{query}", QUESTIONS[1][0]), prefix=index.prefix(), max_new_tokens=1)
    assert told.text.strip() == prompts.tokenizer.decode(logits(model, packed)[0].argmax()).strip()


@pytest.mark.parametrize("blocks", [(False, False), (True, False), (True, True)], ids=str)
def test_packed_lessons_do_not_touch_each_other(prompts: Any, model: Any, blocks: tuple[bool, bool]) -> None:
    lessons = [lesson(), lesson((("What does Otto have?", "cat", 1),), TEXTS[:2])]
    together = logits(model, prompts.pack(lessons, blocks))
    alone = [
        logits(model, prompts.pack([lesson([(one.text, one.answer, one.gold)], [d.text for d in some.documents])], [b]))
        for some, b in zip(lessons, blocks, strict=True)
        for one in some.asked
    ]
    assert torch.allclose(together, torch.cat(alone), atol=2e-3)


def test_joint_prompt_reads_as_plain_text(prompts: Any, model: Any) -> None:
    packed = prompts.pack([lesson(QUESTIONS[:1])], [False])
    with torch.no_grad():
        plain = model(packed.ids[None]).logits[0, packed.rows]
    assert torch.allclose(logits(model, packed), plain, atol=2e-3)


@pytest.mark.parametrize("block", [False, True])
def test_where_the_answer_stands(prompts: Any, block: bool) -> None:
    packed = prompts.pack([lesson()], [block])
    copied = packed.sources.any(-1)
    assert (packed.ids[packed.sources.int().argmax(-1)] == packed.targets)[copied].all()
    assert (packed.targets[~copied] == prompts.tokenizer.eos_token_id).all() and (~copied).sum() == 2


def test_hidden_documents_are_not_seen_by_questions(prompts: Any, model: Any) -> None:
    hidden = prompts.pack([lesson(QUESTIONS[:1])], [True], Random(0), hide=1.0)
    changed = prompts.pack([lesson(QUESTIONS[:1], (TEXTS[0], "Otto has a dog.", TEXTS[2]))], [True], Random(0), 1.0)
    seen = prompts.pack([lesson(QUESTIONS[:1], (TEXTS[0], "Otto has a dog.", TEXTS[2]))], [True])
    assert torch.allclose(logits(model, hidden), logits(model, changed), atol=1e-4)
    assert not torch.allclose(logits(model, hidden), logits(model, seen), atol=1e-2)


# What is trained on, and what is kept apart


def test_answers_stand_in_the_document_that_answers() -> None:
    for some in drawn(writer()):
        for one in some.asked:
            assert one.answer in some.documents[one.gold].text and 0 <= one.gold < len(some.documents)


def test_no_question_is_asked_twice() -> None:
    """Of facts told twice only the later one is asked for."""
    for some in drawn(writer(), 40):
        texts = [one.text.rstrip("?") for one in some.asked]
        assert len(texts) == len(set(texts))


def test_facts_that_change() -> None:
    """What holds last is asked for; what held before is in some lists told by an earlier document."""
    told_before = []
    for some in drawn(writer(), 150):
        for one in some.asked:
            changed = re.search(r"It (?:was|is no longer) (.+?)(?: before)?\.", some.documents[one.gold].text)
            if changed:
                assert one.answer != changed[1]
                told_before.append(any(changed[1] in document.text for document in some.documents[: one.gold]))
    assert any(told_before) and not all(told_before)


def test_held_out_names_and_wordings_are_not_in_training() -> None:
    from training.answers.relations import RELATIONS
    from training.answers.vocabulary import held_out_words

    kept = held_out_words()
    plain = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "may", "october"}
    asked = {q.split("{s}")[0] for relation in RELATIONS for q in relation.questions[-1:]}
    known = {q.split("{s}")[0] for relation in RELATIONS for q in relation.questions[:-1]}
    for some in drawn(writer(), 100):
        for one in some.asked:
            assert not set(one.answer.lower().split()) & (kept - plain)
            assert not any(one.text.startswith(begin) for begin in asked - known if len(begin) > 12)


def test_real_questions_keep_the_test_out(tmp_path: Path) -> None:
    import gzip

    from training.answers.passages import PassageReader, real_questions
    from training.data import TRAIN_LINES, VALID_LINES

    rows = [
        {"question": f"who is number {n}", "answers": ["Ada Byron", "somebody else"], "title": "", "text": text}
        for n in range(VALID_LINES + 3)
        for text in [f"In 1843, the note number {n} was written by Ada Byron and signed."]
    ]
    with gzip.open(tmp_path / "nq_passages.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.write("\n".join(map(json.dumps, rows)))
    paragraph = {"context": "Lena lives in Porto.", "qas": [{"question": "where", "answers": [{"text": "Porto"}]}]}
    with gzip.open(tmp_path / "xquad.en.json.gz", "wt", encoding="utf-8") as handle:
        json.dump({"data": [{"paragraphs": [paragraph]}]}, handle)
    train, test = real_questions(tmp_path, "train"), real_questions(tmp_path, "test")
    assert len(train) == TRAIN_LINES + 1 and len(test) == 3
    assert all(answers == ["Ada Byron"] for _, _, answers in test)
    assert not {passage.text for _, passage, _ in train} & {passage.text for _, passage, _ in test}
    some = PassageReader(train, [passage for _, passage, _ in train]).draw(4, 12, Random(1))
    assert any(one.answer == "1843" for one in some.asked)
    assert all(one.answer in some.documents[one.gold].text for one in some.asked)


# Weights


def test_tokens_are_told_apart_and_copied(model: Any, prompts: Any) -> None:
    from training.answers.start import let_copy, tell_apart

    changed = copy.deepcopy(model)
    changed.model.embed_tokens.weight.data = changed.model.embed_tokens.weight.data[:2000].clone()  # the rest is slow
    tell_apart(changed, prompts.tokenizer.eos_token_id)
    let_copy(changed)
    inside, alone = (prompts.tokenizer.convert_tokens_to_ids(token) for token in ("re", "Ġre"))
    table, before = changed.model.embed_tokens.weight.detach(), model.model.embed_tokens.weight.detach()
    assert cosine_similarity(before[inside, 2:], before[alone, 2:], dim=0) > 0.95
    assert cosine_similarity(table[inside, 2:], table[alone, 2:], dim=0) < 0.9
    attention, heads = changed.model.layers[3].self_attn, slice(2 * 64, 4 * 64)
    word = prompts.ids("city")[0]
    written = attention.o_proj.weight[:, heads] @ (attention.v_proj.weight[heads] @ table[word])
    assert int((table @ written.detach()).argmax()) == word


class Lists:
    """Two lists of made-up vectors in the place of the bank that needs another model to be built."""

    def __init__(self, pieces: Any) -> None:
        self.pieces, self.rng = pieces, Random(0)

    def draw(self, size: int, questions: int) -> Any:
        from training.answers.prompts import ranking_batch

        return ranking_batch(self.pieces, lesson()), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])

    draw_foreign = draw


def trainer(prompts: Any, folder: Path, **plan: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.answers.passages import PassageReader
    from training.answers.train import Material, Plan, Trainer
    from training.data import Passage
    from training.tokenizer import PromptPieces

    torch.manual_seed(0)
    sizes = dict(vocab_size=16000, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    tiny = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=8, tie_word_embeddings=True))
    passage = Passage("Ada", "The note was written by Ada Byron in 1843.")
    passages = PassageReader([("who wrote the note", passage, ["Ada Byron"])], [passage])
    material = Material(writer(), passages, Lists(PromptPieces(prompts.tokenizer)))
    return Trainer(tiny, prompts, material, Plan(**{"seconds": 1e9, "tokens": 120, "questions": 3} | plan), folder)


def test_a_stopped_run_goes_on(prompts: Any, tmp_path: Path) -> None:
    first = trainer(prompts, tmp_path, ranking=0.5)
    kinds = {first.one_step()[0] for _ in range(5)}
    first.save()
    second = trainer(prompts, tmp_path, ranking=0.5, seed=4)
    second.load()
    assert kinds == {"answers", "ranking"} and (second.step, second.tokens) == (first.step, first.tokens)
    one, other = ([run.one_step()[1] for _ in range(3)] for run in (first, second))
    assert one == pytest.approx(other, rel=1e-3)


def test_answers_are_learned(prompts: Any, tmp_path: Path) -> None:
    run = trainer(prompts, tmp_path, ranking=0.0, rate=0.2, table_rate=0.2, pointing=0.0)
    run.lessons = lambda: [lesson()]
    losses = [run.one_step()[1] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_exact_match_counts_whole_answers(prompts: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.answers import evaluate

    packed = prompts.pack([lesson()], [False])
    said = torch.nn.functional.one_hot(packed.targets, 16000).float()
    monkeypatch.setattr(evaluate, "read_answers", lambda model, packed: (said, None))
    assert evaluate.exact(model, packed) == [True, True]
    said[-1] = said[0]  # the second answer does not end
    assert evaluate.exact(model, packed) == [True, False]
