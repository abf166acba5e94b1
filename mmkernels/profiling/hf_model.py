"""Loads any image-text-to-text model of transformers, with its own classes: configuration, processor, model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmkernels.options import BadInput
from mmkernels.profiling.hf_options import HFOptions
from mmkernels.transformers_version import import_transformers

_OPEN = 0.5
"""What gates of one number are where a class initialises them to 0: images would change nothing."""

_MEMINFO = Path("/proc/meminfo")

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Source:
    """What is read of a model before its weights.

    Args:
        config: its configuration.
        processor: its processor.
        model_class: the class that `AutoModelForImageTextToText` makes of the configuration.
    """

    config: Any
    processor: Any
    model_class: Any


def open_source(options: HFOptions) -> Source:
    """Returns the configuration and the processor, and what class the model is of.

    Raises:
        BadInput: they can't be read, or the model is of another kind.
    """
    transformers = import_transformers("mmkernels profile hf")
    with quiet():
        where = {"trust_remote_code": False, "local_files_only": options.is_local}
        config = _read(
            options, "configuration", lambda: transformers.AutoConfig.from_pretrained(options.source, **where)
        )
        mapping = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if type(config) not in mapping:
            must = "a model that transformers.AutoModelForImageTextToText loads"
            raise BadInput(f"--model must be {must}, got the model type {config.model_type} of {options.name}")
        model_class = mapping[type(config)]
        processor = _read(
            options, "processor", lambda: transformers.AutoProcessor.from_pretrained(options.source, **where)
        )
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        kind = type(processor).__name__
        raise BadInput(f"--model must have a processor of images and text, got only a {kind} in {options.name}")
    return Source(config, processor, model_class)


def load_model(options: HFOptions, source: Source) -> tuple[Any, list[str]]:
    """Returns the model in evaluation mode on its device, and what must be said of its weights.

    Raises:
        BadInput: the weights can't be read, or the device has too little memory for them.
    """
    transformers = import_transformers("mmkernels profile hf")
    _check_memory(options, source)
    auto = transformers.AutoModelForImageTextToText
    with quiet():
        if options.random:
            model = _read(options, "model", lambda: _made(auto, options, source))
            return model.to(options.device).eval(), _open_gates(model)
        model, info = _read(
            options,
            "model",
            lambda: auto.from_pretrained(
                options.source,
                dtype=options.torch_dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=options.is_local,
                output_loading_info=True,
            ),
        )
    notes = _note("Not in the checkpoint, so random", sorted(info["missing_keys"]))
    return model.to(options.device).eval(), notes


def _made(auto: Any, options: HFOptions, source: Source) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(options.seed)
        return auto.from_config(source.config, dtype=options.torch_dtype, trust_remote_code=False)


def _open_gates(model: Any) -> list[str]:
    """Sets gates that are 0 to a number. Returns what must be said of them."""
    gates = [
        (name, gate)
        for name, gate in model.named_parameters()
        if gate.numel() == 1 and gate.is_floating_point() and float(gate.detach()) == 0
    ]
    with torch.no_grad():
        for _, gate in gates:
            gate.fill_(_OPEN)
    return _note(f"Set to {_OPEN}, because its class begins with 0", [name for name, _ in gates])


def _note(what: str, names: list[str]) -> list[str]:
    """Returns what must be said of some weights: the first one's name, and how many there are more."""
    more = f" and {len(names) - 1} more" * (len(names) > 1)
    return [f"{what}: {names[0]}{more}."] if names else []


def _check_memory(options: HFOptions, source: Source) -> None:
    """Raises `BadInput` where the weights alone are more than the device has left."""
    free = _free_memory(options.device)
    count = _count_parameters(source)
    if free is None or count is None:
        return
    needed = count * options.torch_dtype.itemsize
    if needed > free:
        raise BadInput(
            f"--model must fit into memory: {options.name} has {count / 1e9:.1f} billion weights, which take "
            f"{needed / 1e9:.1f} GB in {options.dtype}; got {free / 1e9:.1f} GB on {options.device}"
        )


def _count_parameters(source: Source) -> int | None:
    """Returns how many weights the model has, without making them; None: the class can't tell."""
    try:
        with torch.device("meta"), quiet():
            model = source.model_class._from_config(copy.deepcopy(source.config))
    except Exception:  # a class whose constructor computes needs real tensors
        return None
    return sum(x.numel() for x in model.parameters())


def _free_memory(device: str) -> int | None:
    """Returns the bytes that are free on a device; None: nothing tells."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _read(options: HFOptions, what: str, read: Callable[[], Loaded]) -> Loaded:
    """Calls a loader of transformers.

    Raises:
        BadInput: with the first line of whatever error it raises: the files are the user's.
    """
    try:
        return read()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, ImportError):  # instructions follow
            lines = lines[0].split(". ")
        where = f"the folder {options.name}" if options.is_local else f"{options.name}, which is no folder here,"
        hint = _hint(options, what, error)
        raise BadInput(f"--model: the {what} of {where} can't be loaded: {lines[0].strip()}{hint}") from error


def _hint(options: HFOptions, what: str, error: Exception) -> str:
    """Returns what may help."""
    words = str(error).lower()
    if "torchvision" in words:
        return " (pip install torchvision, the version that goes with this torch)"
    for package in ("num2words", "sentencepiece", "accelerate", "timm"):
        if isinstance(error, ImportError) and package in words:
            return f" (pip install {package})"
    if what == "model" and options.is_local and isinstance(error, OSError):
        return " (--random makes random weights from the configuration alone)"
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints errors alone, and no progress bars."""
    transformers = import_transformers("mmkernels profile hf")
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
