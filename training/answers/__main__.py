"""Teaches qr-mini to answer: from its weights to those of qr-mini-answers with one command.

python -m training.answers --data FOLDER --out FOLDER

The command may be stopped and started again. The model and its card end in OUT/qr-mini-answers.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from ..data import TRAIN_LINES, VALID_LINES, Pool, load_nq
from ..evaluate import Heads, Measured, by_qrscore
from ..export import DETECTION_DATA, export, load_exported
from ..lists import Bank, ListMaker, load_bank
from ..report import hard_lists
from ..tokenizer import PromptPieces, load_tokenizer
from ..train import RANKED_HEADS
from .evaluate import fact_lessons
from .facts import FactWriter, Lesson
from .passages import PassageReader, real_questions
from .prompts import AnswerPrompts
from .report import Setup, report, write_card
from .start import let_copy, tell_apart
from .train import Material, Plan, Trainer
from .vocabulary import Vocabulary

START = Path(__file__).parents[2] / "qr_integrations" / "bundled" / "qr-mini"
NAME = "qr-mini-answers"


def training_facts(bank: Bank) -> FactWriter:
    """Facts with the names and wordings of training; names and values are often any capitalised word of a passage."""
    texts = [passage.text for passage in bank.pool.passages]
    words = sorted({word for text in texts for word in re.findall(r"(?<=[a-z] )[A-Z][a-z]{3,}", text)})
    sentences = [part for text in texts for part in re.split(r"(?<=[.!?])\s+", text) if 4 < len(part.split()) < 16]
    return FactWriter(Vocabulary(False, tuple(words), 0.4), fillers=sentences[:2000])


def make_trainer(data: Path, out: Path, plan: Plan) -> Trainer:
    """Everything ready to train, from `qr-mini` or where a run stopped."""
    model, tokenizer = load_exported(START), load_tokenizer(START)
    tell_apart(model, tokenizer.eos_token_id)
    let_copy(model)
    bank = load_bank(data, out / "bank", plan.seed)
    passages = PassageReader(real_questions(data, "train"), bank.pool.passages)
    material = Material(training_facts(bank), passages, ListMaker(bank, PromptPieces(tokenizer), plan.seed))
    trainer = Trainer(model, AnswerPrompts(tokenizer), material, plan, out)
    trainer.load()
    return trainer


def checks() -> dict[str, tuple[list[Lesson], bool]]:
    """What is measured on the way."""
    known, new = FactWriter(Vocabulary(True)), FactWriter(Vocabulary(True), new_wordings=True)
    return {
        "joint 3": (fact_lessons(known, 3, 25), False),
        "block 3": (fact_lessons(known, 3, 25), True),
        "joint 10": (fact_lessons(known, 10, 25), False),
        "new wordings, block 5": (fact_lessons(new, 5, 25), True),
    }


def finish(trainer: Trainer, data: Path, folder: Path) -> None:
    """Exports the weights, detects heads and measures what was exported."""
    tokenizer = load_tokenizer(START)
    export(folder, trainer.model, tokenizer)
    model, pieces = load_exported(folder), PromptPieces(tokenizer)
    heads = find_heads(model, pieces, data)
    write_heads(folder, heads)
    known = json.loads((START / "qr_heads.json").read_text(encoding="utf-8"))["heads"]
    before: LlamaForCausalLM = load_exported(START)
    setup = Setup(model, heads, before, [(layer, head) for layer, head in known], trainer.prompts, pieces, data)
    facts = {"steps": trainer.step, "minutes": trainer.spent / 60, "speed": trainer.tokens / trainer.spent}
    write_card(folder, report(setup), heads, facts)


def find_heads(model: LlamaForCausalLM, pieces: PromptPieces, data: Path) -> Heads:
    """The heads that carry the ranking loss, by QRscore on lines 1000-1099.

    The heads that copy have higher QRscores, and rank real passages worse.
    """
    nq = load_nq(data)
    pool = Pool(nq.passages[:VALID_LINES], nq.questions[:VALID_LINES])
    lists = hard_lists(pool, nq.questions[TRAIN_LINES - 100 : TRAIN_LINES], 20)
    qrscores = Measured(pieces, nq.passages, lists).measure(model).qrscores()
    return [head for head in by_qrscore(qrscores) if head in RANKED_HEADS]


def write_heads(folder: Path, heads: Heads) -> None:
    """Saves the heads, best first."""
    content = {
        "model": NAME,
        "detection_data": DETECTION_DATA,
        "objective": "qrscore",
        "heads": [list(h) for h in heads],
    }
    content["source"] = "python -m training.answers; QRscore of arXiv 2506.09944"
    (folder / "qr_heads.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the NQ, Wikipedia and XQuAD files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the model")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="length of the training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(options.data, options.out, Plan(seconds=options.seconds))
    trainer.run(checks())
    finish(trainer, options.data, options.out / NAME)


if __name__ == "__main__":
    main()
