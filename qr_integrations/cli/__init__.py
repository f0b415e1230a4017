"""`qr-integrations`: ranks documents, shows how it does so, and checks models.

This file parses the command line; each command is a module with ``run(args) -> int``, imported when it is called.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from qr_integrations import __version__
from qr_integrations.cli.bulk_arguments import add_bulk
from qr_integrations.cli.layers_arguments import add_layers
from qr_integrations.cli.serve_arguments import add_serve
from qr_integrations.errors import QRError

EXIT_FAILED_CHECK, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130

_RERANK_NOTES = """\
FILE is text, Markdown (.md), JSON lines (.jsonl, one {"text": ..., "title": ..., "id": ...} per line), or `-` for
standard input: JSON lines if it begins with `{`, else text. A text file is one document unless --split says otherwise.
The table goes to standard output, notes and errors to standard error. Exit codes: 0 done, 2 error, 130 interrupted.
"""
_DETECT_NOTES = """\
A line of --data: {"query": "...", "documents": [{"text": "...", "title": "..."}, ...], "gold": [0]}, counted from 0.
Stopped and started again with the same arguments, it goes on where it was. A file qr_heads.json in a model's folder is
found by heads="auto". Exit codes: 0 done, 2 error, 130 interrupted.
"""
_EVAL_NOTES = """\
DATA stands before the options. It is a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; perhaps
.gz), a .jsonl file of lists as for `detect`, or a .json file as the QRHead authors' scripts read it (LongMemEval,
CLIPPER). Without it: 40 questions that ship with the package. SPEC is random, retrieved, bm25, icr, qr, cross:PATH (a
sentence-transformers CrossEncoder) or bi:PATH (a SentenceTransformer); icr and qr take settings, without commas in
them: qr:heads=FILE,top=8  qr:random=16,seed=1 (heads drawn at random)  qr:calibrated=no  qr:layout=block  qr:orders=4
qr:length_power=0.5  qr:rare_words=1. METRIC is what ir-measures knows (nDCG@10 R@5 RR@10 AP Success@5), or All@5.
Exit codes: 0 done, 2 error, 130 interrupted.
"""
_EVAL_PICTURES_NOTES = """\
crops: questions about pictures, answered plainly (none), with ViCrop (relative, gradient, input_gradient), and with a
crop elsewhere (random) or around what is asked about (oracle); with settings relative:layers=4-6,min_lift=1.5. With
fewer tokens too: cdpruner:keep=0.33 and what else eval-tokens knows, mqt:tokens=16 of a matryoshka model. A line
of --data: {"image": "photo.jpg", "question": "...", "answers": ["..."], "box": [left, top, right, bottom],
"skill": "..."}; box and skill may be left out.
captions: which objects captions invent, and yes-or-no questions about objects. SPEC is greedy, deco, dola, or with
settings deco:alpha=0.6,layers=4-6. A line of --data: {"image": "photo.jpg", "objects": ["dog", "car"]}.
Pictures are looked for beside the file. Exit codes: 0 done, 2 error, 130 interrupted.
"""
_EVAL_TOKENS_NOTES = """\
Without --data: one question of every skill about each drawn scene, at sizes that take turns; 72 scenes take about 12
minutes on one core. METHOD is cdpruner, sparsevlm, random_tokens, uniform_grid, class_attention or last_token, perhaps
with settings: sparsevlm:version=2.0  last_token:layer=1  cdpruner:theta=0.5. KEEP is a share of a view's tokens with a
point in it (0.33), or a whole number of them. Skills that the model with all tokens answers no better than by chance
are shown and left out of the means. --data as for eval-pictures. Exit codes: 0 done, 2 error, 130 interrupted.
"""
_LOOK_NOTES = """\
The picture that is written shows where the model looked, and the crop beside it. An earlier one of that name is
replaced. Lift: how strong the map is within the crop, on average, over how strong it is in the whole picture.
Layers are written 5, 4-6 or 2,4-6. Exit codes: 0 done, 2 error, 130 interrupted.
"""
_CAPTION_NOTES = """\
Without --deco there is one caption of each picture, with it two. --probe tells for every layer how often it would have
said the same as the last one, and how probable it found what was said. Layers are written 5, 4-6 or 2,4-6.
Exit codes: 0 done, 2 error, 130 interrupted.
"""
_DOCTOR_NOTES = (
    "Exit codes: 0 all checks passed, 1 a check failed, 2 the model cannot be loaded or read, 130 interrupted."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors of the package become one line on standard error."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return EXIT_ERROR
    try:
        run = import_module(f"qr_integrations.cli.{args.command.replace('-', '_')}").run
        return int(run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {_told(error)}", file=sys.stderr)
        return EXIT_ERROR


def _told(error: Exception) -> str:
    if isinstance(error, QRError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "qr-integrations", description="Rank documents with the attention of a language model that you run yourself."
    )
    parser.add_argument("--version", action="version", version=f"qr-integrations {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        title="commands",
        metavar="{demo,rerank,look,caption,layers,serve,detect,eval,eval-pictures,eval-tokens,bulk,doctor}",
    )
    for add in (
        *(_add_demo, _add_rerank, _add_look, _add_caption, _add_layers, add_serve),
        *(_add_detect, _add_eval, _add_eval_pictures, _add_eval_tokens, _add_bulk, _add_doctor),
    ):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="rank real questions' passages with the bundled model, offline",
        description="Rank the passages of real questions with a small model that ships with the package, offline.",
    )
    demo.add_argument(
        "--question", type=int, default=1, metavar="N", help="which one is shown in full, from 1 (default: 1)"
    )
    demo.add_argument("--questions", type=int, default=40, metavar="N", help="how many are measured (default: all 40)")
    _add_model(demo)


def _add_rerank(commands: Any) -> None:
    rerank = commands.add_parser(
        "rerank",
        help="rank your files for a query",
        description="Rank documents by how much a query looks at them.",
        epilog=_RERANK_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rerank.add_argument("files", nargs="+", metavar="FILE", help="text, Markdown, JSON lines, or - for standard input")
    rerank.add_argument("--query", "-q", required=True, help="what is asked")
    rerank.add_argument("--split", choices=["paragraphs"], help="one document per paragraph, headings become titles")
    rerank.add_argument(
        "--heads", default="auto", help='auto, all, a JSON file, or layer-head pairs from 0: "1-3,2-5" (default: auto)'
    )
    rerank.add_argument("--icr", action="store_true", help="ICR: all heads, with its own prompt")
    rerank.add_argument("--top-k", type=int, metavar="N", help="show the best N only")
    rerank.add_argument(
        "--truncation",
        choices=["error", "head", "chunk"],
        default="head",
        help="when the documents exceed the model's window: stop, cut the longest at their ends (default), or read "
        "long ones in pieces",
    )
    rerank.add_argument(
        "--max-doc-tokens", type=int, metavar="N", help="cut every document to N tokens, or into pieces of N"
    )
    rerank.add_argument("--instruction", metavar="TEXT", help="what counts as relevant, in words")
    rerank.add_argument("--explain", action="store_true", help="show which words each document was ranked by")
    rerank.add_argument("--json", action="store_true", help="one JSON object; rank counts from 1, index from 0")
    _add_model(rerank)


def _add_look(commands: Any) -> None:
    look = commands.add_parser(
        "look",
        help="ask about a picture, and look again where it matters",
        description="Answer a question about a picture without and with a crop of what matters (ViCrop).",
        epilog=_LOOK_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    look.add_argument("image", nargs="?", metavar="IMAGE", help="a file, or an address with --allow-urls")
    look.add_argument("question", nargs="?", metavar="QUESTION", help="what is asked about it")
    look.add_argument("--example", action="store_true", help="draw a picture, example.png, and ask about that")
    look.add_argument(
        "--method",
        choices=["relative", "gradient", "input_gradient"],
        default="relative",
        help="how what matters is found: attention against a generic question's (default), attention times gradient, "
        "or gradient of the pixels",
    )
    look.add_argument("--layers", metavar="N", help="whose attention is read, from 0, or all (default: published one)")
    look.add_argument(
        "--base",
        type=float,
        metavar="N",
        help="side of the smallest crop in pixels, or as a share of the picture below 1 (default: the model's)",
    )
    look.add_argument("--high-resolution", action="store_true", help="look at tiles of at most 1,024 pixels one by one")
    look.add_argument(
        "--min-lift", type=float, default=0.0, metavar="X", help="no crop that stands out less (default: 0, always one)"
    )
    look.add_argument("--out", metavar="FILE", help="what is drawn, .png or .jpg (default: NAME.look.png beside IMAGE)")
    _add_answering(look, longest=64)
    look.add_argument("--json", action="store_true", help="one JSON object; boxes are left, top, right, bottom")
    _add_model(look, default="qr-mini-vl")


def _add_caption(commands: Any) -> None:
    caption = commands.add_parser(
        "caption",
        help="caption pictures, with fewer invented things",
        description="Caption pictures plainly and, if asked for, with the correction of earlier layers (DeCo).",
        epilog=_CAPTION_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="files, or addresses with --allow-urls")
    caption.add_argument("--prompt", metavar="TEXT", help="what is asked for (default: a detailed description)")
    caption.add_argument("--crop", action="store_true", help="look again where it matters first (ViCrop)")
    caption.add_argument("--probe", action="store_true", help="what every layer would have said in the plain caption")
    _add_answering(caption, longest=256)
    caption.add_argument("--json", action="store_true", help="one JSON object and line for each picture")
    _add_model(caption, default="qr-mini-vl")


def _add_layers(commands: Any) -> None:
    _add_model(add_layers(commands), default="qr-mini-vl")


def _add_bulk(commands: Any) -> None:
    for task in add_bulk(commands):
        _add_model(task)


def _add_answering(parser: argparse.ArgumentParser, longest: int) -> None:
    """What commands that answer about pictures have in common."""
    parser.add_argument("--deco", action="store_true", help="let earlier layers correct what is said (DeCo)")
    parser.add_argument("--alpha", type=float, metavar="X", help="how strongly (default: 0.6); switches --deco on")
    parser.add_argument(
        "--deco-layers",
        metavar="N",
        help="which layers, as numbers of hidden states, from 1 (default: 62.5 to 87.5 %% of the depth); switches "
        "--deco on",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=longest, metavar="N", help=f"longest answer (default: {longest})"
    )
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from public http(s) addresses")


def _add_detect(commands: Any) -> None:
    detect = commands.add_parser(
        "detect",
        help="find the heads of a model that rank",
        description="Score every head of a model on questions with known answers, and write the best to a file.",
        epilog=_DETECT_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    detect.add_argument("--data", metavar="FILE", help="lists as JSON lines (default: 100 built-in lists)")
    detect.add_argument(
        "--objective",
        choices=["qrscore", "ndcg", "contrastive"],
        default="qrscore",
        help="attention mass on the gold documents (default), nDCG@10 of each head, or gold against the others",
    )
    detect.add_argument("--top-k", type=int, default=16, metavar="N", help="how many heads to keep (default: 16)")
    detect.add_argument("--max-layer", type=int, metavar="N", help="no head above this layer: fewer layers to run")
    detect.add_argument("--limit", type=int, metavar="N", help="read the first N lists only")
    detect.add_argument("--max-doc-tokens", type=int, metavar="N", help="cut every document to N tokens")
    detect.add_argument("--seed", type=int, default=0, help="of the order of the documents (default: 0)")
    detect.add_argument("--out", default="qr_heads.json", metavar="FILE", help="the result (default: qr_heads.json)")
    detect.add_argument("--plot", metavar="FILE", help="a heat map of all heads, for instance heads.png")
    detect.add_argument("--json", action="store_true", help="the result on standard output too, as one JSON object")
    _add_model(detect)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure rerankers side by side",
        description="Measure rerankers on judged lists: as retrieved and shuffled, with intervals, tests and biases.",
        epilog=_EVAL_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("data", nargs="?", metavar="DATA", help="a BEIR folder, .jsonl or .json (default: built in)")
    evaluate.add_argument("--split", default="test", help="which qrels of a BEIR folder (default: test)")
    evaluate.add_argument("--run", metavar="FILE", help="a TREC run with the candidates (default: BM25 finds them)")
    evaluate.add_argument("--depth", type=int, default=100, metavar="N", help="candidates per query (default: 100)")
    evaluate.add_argument("--skip-unknown", action="store_true", help="leave out judgments of unknown documents")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N lists only")
    evaluate.add_argument(
        "--system",
        nargs="+",
        default=["bm25", "qr", "icr", "random"],
        metavar="SPEC",
        help="what is measured (default: bm25 qr icr random)",
    )
    evaluate.add_argument("--baseline", metavar="SPEC", help="what the others are compared with (default: the first)")
    evaluate.add_argument(
        "--metrics", nargs="+", default=["nDCG@10", "R@5", "RR"], metavar="METRIC", help="default: nDCG@10 R@5 RR"
    )
    evaluate.add_argument("--seeds", type=int, default=3, metavar="N", help="shuffled orders per list (default: 3)")
    evaluate.add_argument(
        "--sweep",
        nargs="?",
        const="detect",
        metavar="FILE",
        help="numbers of heads and exit layers too, with the scores of a file from `detect`, or detected first",
    )
    evaluate.add_argument(
        "--lengths", nargs="+", type=int, metavar="N", help="recall in long inputs of N tokens too, made of all lists"
    )
    evaluate.add_argument("--generate", choices=["chat", "book"], default="chat", help="what they are (default: chat)")
    evaluate.add_argument("--evidence", type=int, default=1, metavar="N", help="questions asked at once (default: 1)")
    evaluate.add_argument("--recall-at", type=int, default=5, metavar="N", help="ranks that count there (default: 5)")
    evaluate.add_argument(
        "--count", type=int, metavar="N", help="long inputs of each length (default: one per list measured)"
    )
    evaluate.add_argument("--out", default="eval-report", metavar="FOLDER", help="the report (default: eval-report)")
    evaluate.add_argument("--json", action="store_true", help="the results on standard output too, as one JSON object")
    _add_model(evaluate)


def _add_eval_pictures(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval-pictures",
        help="measure second looks and decoders on pictures",
        description="Measure what a second look at pictures gains (crops), or what decoders invent (captions).",
        epilog=_EVAL_PICTURES_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("what", choices=["crops", "captions"], help="what is measured")
    evaluate.add_argument("--data", metavar="FILE", help="pictures as JSON lines (default: a drawn world, built in)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N lines, or drawn scenes (20, or 100)")
    evaluate.add_argument("--system", nargs="+", metavar="SPEC", help="what is measured (default: all)")
    evaluate.add_argument("--contains", action="store_true", help="crops: an answer need only hold the right words")
    evaluate.add_argument("--names", metavar="FILE", help='captions: JSON with synonyms, {"dog": ["puppy"], "car": []}')
    evaluate.add_argument("--prompt", metavar="TEXT", help="behind every question, or what captions are asked for with")
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="captions: their longest (default: 512)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    evaluate.add_argument(
        "--out", default="pictures-report", metavar="FOLDER", help="the report (default: pictures-report)"
    )
    evaluate.add_argument("--json", action="store_true", help="the results on standard output too, as one JSON object")
    _add_model(evaluate, default="qr-mini-vl")


def _add_eval_tokens(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval-tokens",
        help="measure what fewer visual tokens cost",
        description="Measure matryoshka tokens and what drops tokens: accuracy by skill and size, and time.",
        epilog=_EVAL_TOKENS_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--scenes", type=int, default=72, metavar="N", help="drawn scenes (default: 72)")
    evaluate.add_argument("--first-scene", type=int, default=0, metavar="N", help="number of the first (default: 0)")
    evaluate.add_argument("--data", metavar="FILE", help="pictures as JSON lines (default: a drawn world, built in)")
    evaluate.add_argument(
        "--mqt-model",
        metavar="MODEL",
        help="as --model (default, beside qr-mini-vl: qr-mini-vl-mqt); none: no such model",
    )
    evaluate.add_argument(
        "--tokens", nargs="+", type=int, metavar="N", help="of a matryoshka model (default: 2 4 8 16 36 64)"
    )
    evaluate.add_argument("--methods", nargs="*", metavar="METHOD", help="what drops tokens (default: all)")
    evaluate.add_argument("--keep", nargs="+", metavar="KEEP", help="how many stay (default: 0.5 0.33 0.22 0.11 0.056)")
    evaluate.add_argument("--contains", action="store_true", help="an answer need only hold the right words")
    evaluate.add_argument("--prompt", metavar="TEXT", help="behind every question")
    evaluate.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    evaluate.add_argument(
        "--out", default="tokens-report", metavar="FOLDER", help="the report (default: tokens-report)"
    )
    evaluate.add_argument("--json", action="store_true", help="the results on standard output too, as one JSON object")
    _add_model(evaluate, default="qr-mini-vl")


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check that a model's attention is read right",
        description="Load a model and compare what is read from it with what it computes itself.",
        epilog=_DOCTOR_NOTES,
    )
    doctor.add_argument("--attn-implementation", metavar="NAME", help="sdpa, flash_attention_2, eager")
    doctor.add_argument("--quantization", choices=["8bit", "4bit"], help="load with bitsandbytes")
    doctor.add_argument("--revision", help="branch, tag or commit on the hub")
    doctor.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="length of the memory check (default: 512)"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    _add_model(doctor)


def _add_model(parser: argparse.ArgumentParser, default: str = "qr-mini") -> None:
    """What every command knows about the model."""
    parser.add_argument(
        "--model", default=default, help=f"a bundled name, a folder, or a hub id (default: {default}, bundled)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings along")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
