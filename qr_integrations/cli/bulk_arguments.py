"""What the command line of `qr-integrations bulk` takes; nothing heavy is imported here."""

import argparse
from typing import Any

_RERANK_NOTES = """\
A line of --lists: {"query": "...", "documents": [{"text": "...", "title": "...", "id": "..."}, ...], "id": "..."}; ids
may be left out. With --run, corpus and queries are those of BEIR: {"_id": "...", "text": "..."}. Files are not packed.
FOLDER gets Parquet files with the columns query_id, document_id, index, rank, score, qr_score, truncated, model, line.
Stopped or killed, and started again with the same arguments, the command goes on where it was; --replicas, --threads,
--num-gpus, --memory-gb, --strict and --trec may be others. Lists that are wrong are passed over and stand in
FOLDER/_errors.jsonl. With RAY_ADDRESS set, a cluster does the work; all its nodes must find the files at these paths.
Exit codes: 0 done, 1 done but for lists that were passed over, 2 error, 130 interrupted.
"""
_DETECT_NOTES = """\
A line of --data: {"query": "...", "documents": [{"text": "...", "title": "..."}, ...], "gold": [0]}, counted from 0.
What is finished stands in FILE.parts; stopped or killed, and started again with the same arguments, the command goes on
where it was. The folder may be removed at the end. Lists that are wrong are passed over and stand in
FILE.parts/_errors.jsonl. With RAY_ADDRESS set, a cluster does the work; all its nodes must find the files at these
paths. Exit codes: 0 done, 1 done but for lists that were passed over, 2 error, 130 interrupted.
"""


def add_bulk(commands: Any) -> list[argparse.ArgumentParser]:
    """Adds the command; returns the parsers of its tasks, which lack what every command knows about the model."""
    bulk = commands.add_parser(
        "bulk",
        help="millions of lists, with Ray Data",
        description="Rank or detect over millions of lists: on this machine, or on a cluster, with Ray Data.",
    )
    tasks = bulk.add_subparsers(dest="task", title="tasks", metavar="{rerank,detect}", required=True)
    return [_add_rerank(tasks), _add_detect(tasks)]


def _add_rerank(tasks: Any) -> argparse.ArgumentParser:
    rerank: argparse.ArgumentParser = tasks.add_parser(
        "rerank",
        help="rank every list",
        description="Rank every list of a file, or every query of a TREC run, into Parquet files.",
        epilog=_RERANK_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rerank.add_argument("--lists", metavar="FILE", help="lists as JSON lines")
    rerank.add_argument("--run", metavar="FILE", help="or a TREC run, the lines of a query together")
    rerank.add_argument("--corpus", metavar="FILE", help="its documents, such as corpus.jsonl of BEIR")
    rerank.add_argument("--queries", metavar="FILE", help="its queries, such as queries.jsonl of BEIR")
    rerank.add_argument("--depth", type=int, metavar="N", help="rank the best N documents of the run (default: all)")
    rerank.add_argument("--out", required=True, metavar="FOLDER", help="the result")
    rerank.add_argument("--trec", metavar="FILE", help="the result as a TREC run too")
    rerank.add_argument("--top-n", type=int, metavar="N", help="write the best N of each list only")
    rerank.add_argument(
        "--heads", default="auto", help='auto, all, a JSON file, or layer-head pairs from 0: "1-3,2-5" (default: auto)'
    )
    rerank.add_argument(
        "--method", choices=["qrhead", "icr"], default="qrhead", help="icr: all heads (default: qrhead)"
    )
    rerank.add_argument(
        "--layout",
        choices=["joint", "block"],
        default="joint",
        help="each document sees those before it, as published (default), or none of the others",
    )
    rerank.add_argument(
        "--normalize",
        choices=["share", "sigmoid", "none"],
        default="share",
        help="of score: share of the list (default), 1/(1+exp(-x)), or attention as it is, as in qr_score",
    )
    rerank.add_argument(
        "--truncation",
        choices=["error", "head", "chunk"],
        default="head",
        help="when documents exceed the window: pass the list over, cut the longest (default), or read in pieces",
    )
    rerank.add_argument("--max-doc-tokens", type=int, metavar="N", help="cut every document to N tokens")
    rerank.add_argument("--max-context-tokens", type=int, metavar="N", help="longest prompt (default: the window)")
    rerank.add_argument("--instruction", metavar="TEXT", help="what counts as relevant, in words")
    rerank.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="lists that go to the model at once; those over the same documents share a pass (default: 16)",
    )
    _add_work(rerank)
    return rerank


def _add_detect(tasks: Any) -> argparse.ArgumentParser:
    detect: argparse.ArgumentParser = tasks.add_parser(
        "detect",
        help="find the heads of a model that rank",
        description="Score every head of a model on every list, as `qr-integrations detect`, with several workers.",
        epilog=_DETECT_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    detect.add_argument("--data", required=True, metavar="FILE", help="lists as JSON lines")
    detect.add_argument(
        "--objective",
        choices=["qrscore", "ndcg", "contrastive"],
        default="qrscore",
        help="attention mass on the gold documents (default), nDCG@10 of each head, or gold against the others",
    )
    detect.add_argument("--top-k", type=int, default=16, metavar="N", help="how many heads to keep (default: 16)")
    detect.add_argument("--max-layer", type=int, metavar="N", help="no head above this layer: fewer layers to run")
    detect.add_argument("--max-doc-tokens", type=int, metavar="N", help="cut every document to N tokens")
    detect.add_argument("--seed", type=int, default=0, help="of the order of the documents (default: 0)")
    detect.add_argument("--out", default="qr_heads.json", metavar="FILE", help="the result (default: qr_heads.json)")
    _add_work(detect)
    return detect


def _add_work(parser: argparse.ArgumentParser) -> None:
    """How the work is done."""
    parser.add_argument(
        "--replicas", "--concurrency", type=int, default=1, metavar="N", help="workers, each with a model (default: 1)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU cores of each (default: 1; all, of a single one on this machine)"
    )
    parser.add_argument("--num-gpus", type=float, metavar="X", help="GPUs of each, such as 0.5 (default: 1 if any)")
    parser.add_argument("--memory-gb", type=float, metavar="X", help="main memory that Ray sets aside for each")
    parser.add_argument(
        "--shard-lists",
        type=int,
        default=256,
        metavar="N",
        help="lists in one file; a worker that is killed loses at most so many (default: 256)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first list that is wrong")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
