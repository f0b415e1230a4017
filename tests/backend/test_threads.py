"""Many threads, one model: as if they had asked one after the other."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from qr_integrations.backend import AttentionTap, Backend
from qr_integrations.backend.opened import lock_of
from qr_integrations.backend.tower_states import tower_around
from qr_integrations.errors import ClosedError
from qr_integrations.types import Span
from tests.backend import seeing
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


def test_two_backends_around_one_model_wait_for_each_other() -> None:
    model, calm = random_model(named("Llama")), fresh("Llama")
    backends = [Backend(model, tiny_tokenizer()) for _ in range(4)]
    inside, most = 0, 0

    def enter(*_: object) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    assert backends[0].attention_layers and calm.attention_layers
    decoder_layers(backends[0])[0].register_forward_pre_hook(enter)
    decoder_layers(backends[0])[0].register_forward_hook(leave)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: ask(backends[seed % 4], seed), range(24)))
    assert most == 1
    assert all(torch.equal(rows, ask(calm, seed)) for seed, rows in enumerate(found))


def test_a_backend_and_a_tower_around_its_model_wait_for_each_other() -> None:
    backend = seeing.fresh("llava")
    processor: Any = backend.processor
    tower = tower_around(backend.model, processor.image_processor)
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        reading.set()
        list(tower.states(seeing.pictures(1)))
        done.set()

    with ThreadPoolExecutor(1) as pool:
        with backend.locked():
            asked = pool.submit(read)
            assert reading.wait(20) and not done.wait(0.2)
        asked.result(20)
    assert done.is_set()


def test_a_lock_goes_with_its_model() -> None:
    model, other = random_model(named("Llama")), random_model(named("Llama"))
    assert lock_of(model) is lock_of(model) is not lock_of(other)
    backend, gone = Backend(model, tiny_tokenizer()), weakref.ref(model)
    del model
    backend.close()
    gc.collect()
    assert gone() is None


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
