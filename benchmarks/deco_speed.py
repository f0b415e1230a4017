"""What DeCo costs per token, beside plain greedy and the published procedure.

``python -m benchmarks.deco_speed --help``. The model has random weights in a usual shape, drawn in place: they cost as
much as trained ones. The threshold sets how many tokens have one candidate. On a busy machine processor time counts.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import measure
from qr_integrations.backend import Backend
from qr_integrations.bundled import bundled_path
from qr_integrations.decoding import DeCo

_RESULTS = Path(__file__).parent / "results"
_SHARES = (0.0, 0.5, 0.9)  # of tokens with a single candidate
_GOAL = 1.10  # per token, the most that DeCo may cost of plain greedy
_COUNTED = 9  # layers that are looked at, as many as published
_FIELDS = ("cpu_min_s", "cpu_median_s", "min_s", "median_s")


@dataclass(frozen=True, slots=True)
class Times:
    """Time to the first token, and between each two that follow."""

    first: measure.Taken
    between: tuple[measure.Taken, ...]


class Clock:
    """A streamer that notes when a token came."""

    def __init__(self) -> None:
        self._at = [_now()]

    def put(self, tokens: Tensor) -> None:
        """The prompt comes first, then each token."""
        self._at.append(_now())

    def end(self) -> None:
        """Nothing to do."""

    def times(self) -> Times:
        """Of what came so far; the prompt does not count."""
        start, _, *at = self._at
        first, *between = (_difference(b, a) for a, b in pairwise([start, *at]))
        return Times(first, tuple(between))


def _now() -> measure.Taken:
    measure.synchronize()
    return time.perf_counter(), time.process_time()


def _difference(later: measure.Taken, earlier: measure.Taken) -> measure.Taken:
    return later[0] - earlier[0], later[1] - earlier[1]


@dataclass(frozen=True, slots=True)
class Work:
    """A model, a prompt, and how many tokens to say."""

    backend: Backend
    prompt: Tensor
    new_tokens: int

    def generate(self) -> tuple[Tensor, Times]:
        """Greedy, as the model stands."""
        clock = Clock()
        out: Tensor = self.backend.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
        return out[0, self.prompt.shape[1] :].cpu(), clock.times()

    def with_deco(self, deco: DeCo) -> tuple[Tensor, Times]:
        """Greedy, corrected."""
        with deco.on(self.backend):
            return self.generate()

    def with_share(self, deco: DeCo) -> tuple[float, Times]:
        """Greedy, corrected; and the share of tokens that had one candidate."""
        with deco.on(self.backend) as record:
            _, times = self.generate()
        return statistics.fmean(step.num_candidates == (1,) for step in record), times

    @torch.no_grad()
    def published(self, deco: DeCo) -> tuple[Tensor, Times]:
        """As the authors' code goes about it: all hidden states are kept, and the head reads every layer by itself, all
        positions of it, the last layer once more."""
        model, clock, layers = self.backend.model, Clock(), deco.layers_of(self.backend.config.num_hidden_layers)
        ids, cache, said = self.prompt, None, []
        clock.put(ids)
        for _ in range(self.new_tokens):
            out = model(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
            cache, states = out.past_key_values, out.hidden_states
            read = [model.lm_head(model.model.norm(states[layer])) for layer in layers]
            model.lm_head(states[-1])
            early = torch.stack([logits[:, -1:] for logits in read]).float()
            ids = deco.correct(out.logits[:, -1:].float(), early, layers).logits.argmax(-1)
            said.append(int(ids))
            clock.put(ids)
        return torch.tensor(said), clock.times()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.deco_speed", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/deco-<machine>.json")
    return parser.parse_args(argv)


def _work(args: argparse.Namespace, dtype: str) -> Work:
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        intermediate_size=int(2.75 * args.hidden),
        vocab_size=args.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("qr-mini"))  # which nothing reads
    prompt = torch.randint(args.vocab, (1, args.prompt), device=device)
    return Work(Backend(model, tokenizer, name="random"), prompt, args.new_tokens)


def _thresholds(work: Work, deco: DeCo) -> list[float]:
    """For each of `_SHARES`, a threshold that this share of most probable tokens reaches."""
    ids = work.prompt
    with torch.no_grad(), deco.on(work.backend):
        said, _ = work.generate()
    path = torch.cat([ids, said[None].to(ids)], dim=1)
    with torch.no_grad():
        logits = work.backend.model(path, logits_to_keep=work.new_tokens + 1).logits[0, :-1]
    probs = logits.float().softmax(-1).amax(-1).sort(descending=True).values.tolist()
    return [min(1.0, 2 * probs[0]) if share == 0 else probs[round(share * len(probs)) - 1] for share in _SHARES]


def _jobs(work: Work) -> tuple[DeCo, dict[str, Callable[[], tuple[Any, Times]]]]:
    depth = work.backend.config.num_hidden_layers
    last = max(DeCo().layers_of(depth))
    deco = DeCo(layers=tuple(range(max(1, last - _COUNTED + 1), last + 1)))
    jobs: dict[str, Callable[[], tuple[Any, Times]]] = {
        "greedy": work.generate,
        "deco": lambda: work.with_deco(deco),
        "published": lambda: work.published(deco),
    }
    for share, top_p in zip(_SHARES, _thresholds(work, deco), strict=True):
        skipping = replace(deco, top_p=top_p, skip_confident=True)
        jobs[f"deco_skip_{share:.0%}"] = lambda skipping=skipping: work.with_share(skipping)  # type: ignore[misc]
    return deco, jobs


def _measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """All jobs in turns, one round more, first, that does not count."""
    work = _work(args, dtype)
    deco, jobs = _jobs(work)
    ours, theirs = work.with_deco(deco)[0], work.published(deco)[0]
    taken: dict[str, list[Times]] = {name: [] for name in jobs}
    shares = {}
    for turn in range(args.repeats + 1):
        for name in jobs if turn % 2 else reversed(jobs):
            said, times = jobs[name]()
            taken[name] += [times] if turn else []
            if isinstance(said, float):
                shares[name] = said
    parameters = sum(p.numel() for p in work.backend.model.parameters())
    return {
        "dtype": dtype,
        "parameters": parameters,
        "shape": {name: getattr(args, name) for name in ("layers", "hidden", "vocab", "prompt", "new_tokens")},
        "candidate_layers": list(deco.layers or ()),
        "same_tokens_as_published": f"{int((ours == theirs).sum())} of {len(ours)}",
        "jobs": {name: _summary(times, taken["greedy"], shares.get(name)) for name, times in taken.items()},
    }


def _summary(times: Sequence[Times], greedy: Sequence[Times], share: float | None) -> dict[str, Any]:
    first, plain_first = (measure.summary([t.first for t in which]) for which in (times, greedy))
    token, plain = (measure.summary([taken for t in which for taken in t.between]) for which in (times, greedy))
    return {
        "token": token,
        "token_x_greedy": {field: token[field] / plain[field] for field in _FIELDS},
        "first_token": first,
        "first_token_x_greedy": {field: first[field] / plain_first[field] for field in _FIELDS},
        **({} if share is None else {"one_candidate": share}),
    }


def _text(result: dict[str, Any]) -> str:
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    layers, same = result["candidate_layers"], result["same_tokens_as_published"]
    lines = [
        f"{result['parameters'] / 1e6:.0f} M parameters, {result['dtype']}; {shape}; layers {layers[0]} to "
        f"{layers[-1]}; {same} tokens as published",
        "",
        "| job | token, cpu min | min | x greedy: cpu min | cpu median | min | median | first token, cpu min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, job in result["jobs"].items():
        share = f" ({job['one_candidate']:.0%} have one candidate)" if "one_candidate" in job else ""
        times = [f"{1000 * job['token'][field]:.1f} ms" for field in ("cpu_min_s", "min_s")]
        ratios = [f"{job['token_x_greedy'][field]:.2f}" for field in _FIELDS]
        first = f"{job['first_token_x_greedy']['cpu_min_s']:.2f}"
        lines.append("| " + " | ".join([name + share, *times, *ratios, first]) + " |")
    ratio = result["jobs"]["deco"]["token_x_greedy"]["cpu_min_s"]
    lines += ["", f"{'PASS' if ratio <= _GOAL else 'FAIL'}  DeCo per token <= {_GOAL:.2f} x greedy: {ratio:.3f}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine, results = measure.machine(), []
    where = machine["gpu"] or f"{machine['processor']} {machine['cores']} cores"
    print(f"{where}, {machine['threads']} threads, {machine['cpu_capability']}, torch {machine['torch']}")
    for dtype in args.dtype:
        results.append(_measure(args, dtype))
        print("", _text(results[-1]), sep="\n", flush=True)
    name = f"deco-{re.sub(r'[^a-z0-9]+', '-', where.lower()).strip('-')}.json"
    out = args.out or _RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
