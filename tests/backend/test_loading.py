"""From a name to a model: one per process, and errors that name the cure."""

import importlib.util
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qr_integrations.backend import AttentionTap, Backend
from qr_integrations.errors import ClosedError, LoadError, MissingExtra
from qr_integrations.types import Span
from tests.backend.measure import bench, difference, named, random_ids, random_model, reference, tap_all, tiny_tokenizer

LLAMA = named("Llama")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    random_model(LLAMA).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    yield tmp_path


def test_a_loaded_model_is_the_saved_one(folder: Path) -> None:
    backend = Backend.load(folder, device="cpu")
    rows = backend.forward(random_ids(), tap=tap_all(bench(LLAMA), Span(0, 24)))
    assert difference(rows, reference(bench(LLAMA).eager, random_ids())) < 1e-5
    assert not backend.model.training and backend.max_tokens == 128
    assert repr(backend) == f"Backend({str(folder)!r}, device='cpu', dtype=torch.float32)"


def test_the_same_arguments_share_one_model(folder: Path) -> None:
    backend = Backend.load(folder)
    assert Backend.load(str(folder)) is backend
    assert Backend.load(folder, dtype="bfloat16") is not backend
    assert Backend.load(folder, attn_implementation="eager") is not backend


def test_threads_that_ask_together_load_once(folder: Path) -> None:
    together = threading.Barrier(8)

    def load(_: int) -> Backend:
        together.wait(20)
        return Backend.load(folder)

    with ThreadPoolExecutor(8) as pool:
        assert len({id(backend) for backend in pool.map(load, range(8))}) == 1


def test_closed_is_closed_and_loading_again_is_new(folder: Path) -> None:
    backend = Backend.load(folder)
    backend.close()
    backend.close()
    assert repr(backend) == f"Backend({str(folder)!r}, closed)"
    with pytest.raises(ClosedError, match="load it again with Backend"):
        backend.forward(random_ids(), tap=AttentionTap(((0, 0),), Span(0, 2)))
    again = Backend.load(folder)
    backend.close()
    assert again is not backend and Backend.load(folder) is again
    again.forward(random_ids(), tap=AttentionTap(((0, 0),), Span(0, 2)))


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(LoadError, match=r"'nobody/nothing' cannot be loaded .* pass a local folder, or a bundled name"):
        Backend.load("nobody/nothing", local_files_only=True)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", __file__])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(LoadError, match=r"no model folder at .* config.json and model.safetensors"):
        Backend.load(name)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file(folder: Path, missing: str) -> None:
    for file in folder.glob(missing.replace("tokenizer.json", "tokenizer*")):
        file.unlink()
    with pytest.raises(LoadError, match=r"needs config.json, model.safetensors .* and tokenizer.json, and holds"):
        Backend.load(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000])
def test_weights_that_were_cut_off(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(LoadError, match="cannot be loaded"):
        Backend.load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(random_model(LLAMA).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        Backend.load(folder)


@pytest.mark.parametrize("dtype", ["float33", "nn", "Tensor"])
def test_an_unknown_dtype(folder: Path, dtype: str) -> None:
    with pytest.raises(LoadError, match="pass 'auto', 'float32', 'bfloat16'"):
        Backend.load(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["quantum", "cuda:99"])
def test_an_unknown_device(folder: Path, device: str) -> None:
    with pytest.raises(LoadError, match="pass device='auto' or 'cpu'"):
        Backend.load(folder, device=device)


def test_an_unknown_quantization(folder: Path) -> None:
    with pytest.raises(LoadError, match="pass '8bit', '4bit'"):
        Backend.load(folder, quantization="3bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_without_its_dependency(folder: Path) -> None:
    with pytest.raises(MissingExtra, match=r"qr-integrations\[quant\]"):
        Backend.load(folder, quantization="8bit")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map(folder: Path, device_map: object) -> None:
    backend = Backend.load(folder, device="cpu", device_map=device_map)
    on = bench(LLAMA)
    prefix = backend.prefill(random_ids()[:13], top_layer=2)
    rows = backend.forward(random_ids()[13:], tap=tap_all(on, Span(13, 24)), prefix=prefix)
    assert difference(rows, reference(on.eager, random_ids())[:, :, 13:]) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_layers_that_accelerate_keeps_elsewhere(folder: Path) -> None:
    from accelerate import cpu_offload

    backend, on = Backend.load(folder, device="cpu"), bench(LLAMA)
    cpu_offload(backend.model, execution_device="cpu")
    rows = backend.forward(random_ids(), tap=tap_all(on, Span(0, 24)))
    assert difference(rows, reference(on.eager, random_ids())) < 1e-5
