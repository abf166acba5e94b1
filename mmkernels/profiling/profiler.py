"""Profiles a model over numbers of visual tokens, or over reducers, and describes the results in one dictionary."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from PIL import Image

from mmkernels.machine import describe_machine, device_name
from mmkernels.meters import memory_why_not
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import Adapter, PhotoAdapter, Staged
from mmkernels.profiling.blip2 import BLIP2Adapter
from mmkernels.profiling.deepseek_vl import DeepSeekVLAdapter
from mmkernels.profiling.deepseek_vl2 import DeepSeekVL2Adapter
from mmkernels.profiling.flamingo import FlamingoAdapter, ReducingFlamingoAdapter
from mmkernels.profiling.internvl import InternVLAdapter
from mmkernels.profiling.janus import JanusAdapter
from mmkernels.profiling.options import Options, Row, Settings
from mmkernels.profiling.pareto import front
from mmkernels.profiling.photo import crops
from mmkernels.profiling.point import Cell
from mmkernels.profiling.qwen_vl import QwenVLAdapter
from mmkernels.profiling.sound_options import HEARING
from mmkernels.profiling.timing import measure_rows, steps_of_rows

REDUCING: dict[str, PhotoAdapter] = {
    "flamingo": ReducingFlamingoAdapter(),
    "qwen2_vl": QwenVLAdapter("qwen2"),
    "qwen2_5_vl": QwenVLAdapter("qwen2_5"),
    "qwen3_vl": QwenVLAdapter("qwen3"),
    "internvl": InternVLAdapter(),
    "deepseek_vl": DeepSeekVLAdapter(hybrid=False),
    "deepseek_vl_hybrid": DeepSeekVLAdapter(hybrid=True),
    "deepseek_vl2": DeepSeekVL2Adapter(),
    "janus": JanusAdapter(),
}
"""What can be profiled over reducers and resolutions. A new model is one adapter here."""

MODELS: dict[str, Adapter[Options]] = {**REDUCING, "flamingo": FlamingoAdapter(), "blip2": BLIP2Adapter()}
"""What can be profiled: `REDUCING` models, or over numbers of tokens."""

SCHEMA = 1


def find_model(options: Options) -> Adapter[Options]:
    """Returns the adapter of the model that `options` names.

    Raises:
        BadInput: there is no such model, it has no such size, or a number of tokens or a reducer does not suit it.
    """
    models: Mapping[str, Adapter[Options]] = REDUCING if options.reduce else MODELS
    if options.model not in models:
        with_reduce = " with --reduce" * bool(options.reduce)
        known = [*models, *HEARING] if models is MODELS else models
        raise BadInput(f"model must be one of {', '.join(known)}{with_reduce}; got {options.model!r}")
    adapter = models[options.model]
    check_size(options, adapter)
    adapter.check(options)
    return adapter


def check_size(options: Settings, adapter: Adapter[Any]) -> None:
    """Raises `BadInput` unless the model has this size, or is read from a folder."""
    if options.folder is None and options.size not in adapter.sizes:
        raise BadInput(f"--size must be one of {', '.join(adapter.sizes)}; got {options.size!r}")


def check_photo(options: Options, photo: Image.Image) -> None:
    """Raises `BadInput` unless every row of `options` suits the photograph's shape."""
    if options.reduce:
        REDUCING[options.model].check_photo(options, photo)


def steps(options: Options) -> int:
    """Returns how often `profile` reports progress."""
    adapter = find_model(options)
    return sum(steps_of_rows(options, adapter, len(rows)) for rows in _groups(options))


def _groups(options: Options) -> list[tuple[Row, ...]]:
    """Returns the rows that are measured together: reducers share weights, and are compared with each other."""
    return [options.rows] if options.reduce is not None else [(row,) for row in options.rows]


def profile(
    options: Options, photo: Image.Image, progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measures, and returns the last of the `reports`, which has everything."""
    *_, report = reports(options, photo, progress)
    return report


def reports(
    options: Options, photo: Image.Image, progress: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """Measures, and yields after each row of `options` what is known by then: a dictionary that is ready for JSON.

    Reducers take turns, so that their times come together after the last row, stage by stage.
    The names in it contain the units.

    Args:
        options: what to run.
        photo: the picture, RGB.
        progress: called with the name of each step before it begins.

    Raises:
        BadInput: no such model or size.
    """
    adapter = find_model(options)
    check_photo(options, photo)
    photos = crops(photo, options.images or 1, square=adapter.square)
    cells: list[Cell] = []
    for rows in _groups(options):
        found: list[Cell] = []
        reductions: dict[str, Any] = {}
        for points in measure_rows(adapter, options, rows, photos, progress):
            found = [cell for point in points for cell in point.cells.values()]
            reductions = {
                str(row): asdict(point.reduction) for row, point in zip(rows, points, strict=False) if point.reduction
            }
            yield _report(options, adapter, cells + found, reductions)
        cells += found
        del points  # with their models


def _report(
    options: Options, adapter: Adapter[Options], cells: list[Cell], reductions: dict[str, Any]
) -> dict[str, Any]:
    return common(options, adapter, command(options), cells) | {
        "settings": settings(options) | {"image": options.image.name},
        "square": adapter.square,
        "reducers": reductions,
        "pareto": front(cells, options.backends or ()),
        "marginal_seconds_per_visual_token": {} if options.reduce else marginal(cells),
    }


def common(options: Settings, adapter: Staged, command: str, cells: list[Cell]) -> dict[str, Any]:
    """Returns what the reports of all models have."""
    return {
        "kind": "mmkernels profile",
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": settings(options),
        "rows": [row if isinstance(row, int) else str(row) for row in options.rows],
        "about_size": adapter.about.get(options.size or "", ""),
        "stages": {stage.name: stage.about for stage in adapter.stages},
        "total": {"name": adapter.total, "stages": [stage.name for stage in adapter.stages if stage.calls == 1]},
        "device": device_name(options.device),
        "machine": describe_machine(options.device),
        "memory_why_not": memory_why_not(options.device),
        "cells": cells,
    }


def settings(options: Settings) -> dict[str, Any]:
    """Returns the options as JSON has them, without the folder in which a checkpoint lies."""
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}
    return found if options.folder is None else found | {"folder": options.folder.name}


def command(options: Options) -> str:
    """Returns the command that repeats this profile; it has no path but the photograph's file name."""
    words = ["mmkernels", "profile", options.model, "--image", options.image.name]
    if options.resolutions is not None:
        words += ["--resolutions", _joined(options.resolutions)]
    words += (
        ["--tokens", _joined(options.tokens or ())] if options.reduce is None else ["--reduce", _joined(options.reduce)]
    )
    words += ["--images", str(options.images)]
    words += ["--text-length", str(options.text_length), *words_of_run(options)]
    words += ["--prompt", options.prompt] if options.prompt else []
    return shlex.join(words + ["--train"] * options.train)


def words_of_run(options: Settings) -> list[str]:
    """Returns the part of a command that says how the model runs."""
    words = ["--backend", _joined(options.backends or ()), "--dtype", options.dtype, "--device", options.device]
    return words + (["--model", options.folder.name] if options.folder else ["--size", options.size or ""])


def _joined(parts: Iterable[object]) -> str:
    return ",".join(map(str, parts))


def marginal(cells: list[Cell]) -> dict[str, dict[str, float]]:
    """Returns seconds per further visual token, by backend and stage: the slope from the fewest tokens to the most."""
    slopes: dict[str, dict[str, float]] = {}
    for backend in dict.fromkeys(cell["backend"] for cell in cells):
        row = [cell for cell in cells if cell["backend"] == backend and cell["failed"] is None]
        if not row:
            continue
        few, many = row[0], row[-1]
        more = many["visual_tokens"] - few["visual_tokens"]
        if more > 0:
            slopes[backend] = {
                name: (seconds - few["seconds"][name]) / more
                for name, seconds in many["seconds"].items()
                if name in few["seconds"]
            }
    return slopes
