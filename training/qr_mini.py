"""Makes qr-mini from data to model card with one command; every stage is kept in the output folder and not repeated.

python -m training.qr_mini --data FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .branches import check_branches
from .card import write_card, write_sample
from .data import TRAIN_LINES, VALID_LINES, Bm25, load_nq, load_xquad, training_pool
from .evaluate import Measured, list_batch
from .export import export, export_heads, load_exported
from .init import configure, embeddings, initialise
from .language import train_language
from .lists import ListMaker, load_bank
from .report import Setup, find_heads, full_report, hard_lists
from .teacher import Teacher
from .tokenizer import PromptPieces, check_pieces, load_tokenizer, random_lists, train_tokenizer
from .train import Plan, Trainer

VOCABULARY = 16000


def make_tokenizer(data: Path, out: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, trained once; its pieces are checked on 400 prompts every time."""
    pool, foreign = training_pool(data), [load_xquad(data, language, test=False) for language in ("de", "zh")]
    if not (out / "tokenizer").exists():
        train_tokenizer(pool, foreign, VOCABULARY).save_pretrained(out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    checked = sum(check_pieces(tokenizer, random_lists(p, seed=0)) for p in (pool, *foreign))
    print(f"tokenizer: {len(tokenizer)} tokens, parts equal the whole in {checked} prompts", flush=True)
    return tokenizer


def start_model(data: Path, tokenizer: PreTrainedTokenizerFast, pieces: PromptPieces) -> LlamaForCausalLM:
    """The model before training, its branch computation checked against plain attention."""
    model = initialise(configure(tokenizer), embeddings(tokenizer, Teacher(), training_pool(data).passages))
    nq, rng = load_nq(data), random.Random(0)
    bm25 = Bm25(nq.passages[:TRAIN_LINES])
    lists = [bm25.hard_list(question, 5, rng) for question in nq.questions[:3]]
    worst = check_branches(model, [list_batch(pieces, nq.passages, ranked) for ranked in lists])
    print(f"branches equal plain attention within {worst:.1e}", flush=True)
    return model


def train_ranking(
    data: Path, out: Path, pieces: PromptPieces, model: LlamaForCausalLM, plan: Plan
) -> tuple[ListMaker, int]:
    """The ranking phase; leaves the mean of the best and the last weights in the model and returns the steps done."""
    nq = load_nq(data)
    lists = ListMaker(load_bank(data, out / "bank", plan.seed), pieces, plan.seed)
    pool = type(nq)(nq.passages[:VALID_LINES], nq.questions[:VALID_LINES])
    check = Measured(pieces, nq.passages, hard_lists(pool, nq.questions[TRAIN_LINES:VALID_LINES], 20))
    trainer = Trainer(model, lists, plan, out)
    trainer.load("last")
    trainer.run(check)
    trainer.average()
    print(f"ranking: step {trainer.step}, best nDCG@10 on the way {trainer.best:.4f} (lines 1100-1199)", flush=True)
    return lists, trainer.step


def finish_language(out: Path, model: LlamaForCausalLM, lists: ListMaker, seconds: float) -> float:
    """The language phase, done once."""
    path = out / "language.pt"
    if not path.exists():
        loss = train_language(model, lists, steps=3000, seconds=seconds)
        torch.save({"model": model.state_dict(), "loss": loss}, path)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    return saved["loss"]


def measure_and_describe(data: Path, folder: Path, untrained: LlamaForCausalLM, steps: int, loss: float) -> None:
    """Detects heads, measures, and writes card, heads and demo lists beside the exported weights."""
    model, pieces = load_exported(folder), PromptPieces(load_tokenizer(folder))
    heads, qrscores, counts = find_heads(model, pieces, data)
    export_heads(folder, heads)
    print(f"heads by QRscore: {heads}; {counts}", flush=True)
    report = full_report(Setup(model, untrained, pieces, heads, data))
    (folder.parent / "report.json").write_text(json.dumps(report, indent=1))
    uniform = torch.tensor(float(model.config.vocab_size)).log().item()
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"parameters": parameters, "language": loss, "uniform": uniform, "steps": steps}
    print(write_card(folder, report, heads, qrscores, counts, facts), flush=True)
    write_sample(folder, data)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the NQ, Wikipedia and XQuAD files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints; the model goes to OUT/qr-mini")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="ranking steps")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="limit of the ranking phase")
    parser.add_argument("--language-seconds", type=float, default=420.0, help="limit of the language phase")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(steps=options.steps, seconds=options.seconds)
    tokenizer = make_tokenizer(options.data, options.out)
    pieces = PromptPieces(tokenizer)
    model = start_model(options.data, tokenizer, pieces)
    untrained = copy.deepcopy(model)
    lists, steps = train_ranking(options.data, options.out, pieces, model, plan)
    loss = finish_language(options.out, model, lists, options.language_seconds)
    export(options.out / "qr-mini", model, tokenizer)
    measure_and_describe(options.data, options.out / "qr-mini", untrained, steps, loss)


if __name__ == "__main__":
    main()
