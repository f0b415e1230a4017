"""Many threads, one model: as if they had asked one after the other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qr_integrations.backend import AttentionTap, Backend
from qr_integrations.errors import ClosedError
from qr_integrations.types import Span
from tests.backend.measure import decoder_layers, named, random_ids, random_model, tiny_tokenizer

TAP = AttentionTap(((0, 1), (2, 3)), Span(13, 24))


def ask(backend: Backend, seed: int) -> Tensor:
    """Odd seeds go over a prefix, even ones do not."""
    ids = random_ids(seed=seed)
    if seed % 2 == 0:
        return backend.forward(ids, tap=TAP)
    return backend.forward(ids[13:], tap=TAP, prefix=backend.prefill(ids[:13], top_layer=2, chunk_tokens=5))


def fresh(name: str) -> Backend:
    return Backend(random_model(named(name)), tiny_tokenizer(), name=name)


def test_sixteen_threads_get_the_numbers_of_one() -> None:
    backend, calm = fresh("Llama"), fresh("Llama")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda seed: ask(backend, seed), range(32)))
    assert all(torch.equal(rows, ask(calm, seed)) for seed, rows in enumerate(found))


def test_two_models_at_once() -> None:
    models = [fresh("Llama"), fresh("GPT-OSS")]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: ask(models[seed // 2 % 2], seed), range(24)))
    assert all(torch.equal(rows, ask(models[seed // 2 % 2], seed)) for seed, rows in enumerate(found))


def test_gradients_of_one_thread_do_not_reach_another() -> None:
    backend = fresh("Llama")
    with_graph = AttentionTap(TAP.heads, TAP.rows, differentiable=True)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: backend.forward(random_ids(), tap=with_graph if i % 2 else TAP), range(16)))
    assert [rows.requires_grad for rows in found] == [bool(i % 2) for i in range(16)]


def test_closing_waits_for_the_pass_that_runs() -> None:
    backend = fresh("Llama")
    expected = ask(backend, 0)
    running, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        running.set()
        assert go_on.wait(20)

    hook = decoder_layers(backend)[0].register_forward_pre_hook(hold)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask, backend, 0)
        assert running.wait(20)
        closed = pool.submit(backend.close)
        assert not closed.done()
        hook.remove()
        go_on.set()
        assert torch.equal(asked.result(20), expected)
        closed.result(20)
    with pytest.raises(ClosedError, match="load it again"):
        ask(backend, 0)
