"""From a name to a model on a device, with errors that name the cure."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from qr_integrations.backend import mqt_llava  # noqa: F401 (transformers shall know it)
from qr_integrations.bundled import BUNDLED, bundled_path
from qr_integrations.errors import LoadError, MissingExtra

_QUANTIZATION: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
}


def resolve_name(name_or_path: str | Path) -> str:
    """A bundled name becomes its folder, an existing folder stays, anything else is a hub id.

    Raises:
        LoadError: it looks like a path and nothing is there.
    """
    name = str(name_or_path)
    if name in BUNDLED:
        return str(bundled_path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LoadError(
            f"no model folder at {name!r}: pass a folder with config.json and model.safetensors, a hub id like "
            f"'organisation/model', or a bundled name ({', '.join(sorted(BUNDLED))})"
        )
    return name


def resolve_device(device: str) -> str:
    """``"auto"`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        LoadError: the device is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"device {device!r} cannot be used ({error}): pass device='auto' or 'cpu'") from error
    return device


def resolve_dtype(dtype: str | torch.dtype, device: str) -> str | torch.dtype:
    """``"auto"`` is the checkpoint's dtype on an accelerator, and float32 on the CPU, where half precision is slow."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise LoadError(f"unknown dtype {dtype!r}: pass 'auto', 'float32', 'bfloat16', 'float16' or a torch.dtype")
    return named


def quantization_config(quantization: Any) -> Any:
    """``"8bit"`` and ``"4bit"`` mean bitsandbytes; a transformers quantization config passes through."""
    if not isinstance(quantization, str):
        return quantization
    if quantization not in _QUANTIZATION:
        raise LoadError(
            f"unknown quantization {quantization!r}: pass '8bit', '4bit' or a transformers quantization config"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"quantization={quantization!r}", "quant") from error
    return BitsAndBytesConfig(**_QUANTIZATION[quantization])


def load_model(
    name: str,
    *,
    device: str,
    device_map: Any,
    quantization: Any,
    hub_kwargs: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights (safetensors only) and tokenizer.

    Raises:
        LoadError: wrong id, missing file, no space, unknown architecture.
        MissingExtra: `device_map` without accelerate, quantization without bitsandbytes.
    """
    placement: dict[str, Any] = {}
    if device_map is not None:
        placement["device_map"] = _checked_device_map(device_map)
    if quantization is not None:
        placement["quantization_config"] = quantization_config(quantization)
        placement.setdefault("device_map", {"": device})
    try:
        with _quiet(name):
            config = AutoConfig.from_pretrained(name, **hub_kwargs)
            auto = (
                AutoModelForImageTextToText
                if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
                else AutoModelForCausalLM
            )
            tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs)
            model = auto.from_pretrained(name, use_safetensors=True, **placement, **hub_kwargs, **model_kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LoadError(_explain(name, error)) from error
    if not placement:
        model = model.to(device)
    return model.eval(), tokenizer


def load_processor(name: str, hub_kwargs: dict[str, Any]) -> ProcessorMixin:
    """The processor that lies beside a vision-language model.

    Raises:
        LoadError: there is none, or it needs a library that is not installed.
    """
    cure = (
        "it needs processor_config.json or preprocessor_config.json beside the weights, and for some families pip "
        "install torchvision"
    )
    with explained(f"the processor of {name!r} cannot be loaded", cure):
        processor = AutoProcessor.from_pretrained(name, **hub_kwargs)
    if not isinstance(processor, ProcessorMixin):
        raise LoadError(
            f"{name!r} has no processor for pictures: load a vision-language model with its processor files"
        )
    return processor


@contextmanager
def explained(what: str, cure: str) -> Iterator[None]:
    """What libraries say about files that they cannot read becomes a `LoadError`, with what failed and the cure."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        text = " ".join(f"{error}".split())[:300]
        raise LoadError(f"{what} ({text}): {cure}") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No progress bar for a bundled model, which is there at once."""
    bundled = Path(name) in {bundled_path(known) for known in BUNDLED}
    if not bundled or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _checked_device_map(device_map: Any) -> Any:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtra("device_map", "accelerate") from error
    return device_map


def _explain(name: str, error: Exception) -> str:
    text = f"{error}".strip().split("\n")[0]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left while loading {name!r}: free the disk, or set HF_HOME to one with room"
    if "trust_remote_code" in str(error):
        return f"{name!r} brings its own code: read it, then pass trust_remote_code=True ({text})"
    if Path(name).is_dir():
        here = ", ".join(sorted(p.name for p in Path(name).iterdir())[:12]) or "nothing"
        return (
            f"the folder {name!r} cannot be loaded ({text}): it needs config.json, model.safetensors (or an index with "
            f"its shards) and tokenizer.json, and holds {here}"
        )
    return (
        f"{name!r} cannot be loaded ({text}): check the id's spelling and that this machine may reach the hub, log in "
        f"for a gated model (hf auth login), pass a local folder, or a bundled name ({', '.join(sorted(BUNDLED))})"
    )


def hide_progress_bars() -> None:
    """No progress bars of transformers from here on, for this process: they are noise in a log."""
    transformers_logging.disable_progress_bar()
