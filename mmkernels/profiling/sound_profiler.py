"""Profiles a model that hears over lengths of sound and pooling, and describes the results in one dictionary."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from mmkernels.profiling.options import Excerpt
from mmkernels.profiling.point import Cell
from mmkernels.profiling.profiler import check_size, common, words_of_run
from mmkernels.profiling.qwen_audio import QwenAudioAdapter
from mmkernels.profiling.sound import Sound
from mmkernels.profiling.sound_adapter import SoundAdapter
from mmkernels.profiling.sound_options import SoundOptions
from mmkernels.profiling.timing import measure_rows, steps_of_rows
from mmkernels.profiling.whisper import WhisperAdapter

ADAPTERS: dict[str, SoundAdapter] = {"whisper": WhisperAdapter(), "qwen2_audio": QwenAudioAdapter()}
"""The models that can be profiled; a new one is one adapter here, and its name in `HEARING`."""


def fit(options: SoundOptions, sound: Sound) -> SoundOptions:
    """Returns the options with the lengths that are heard of a sound.

    Raises:
        BadInput: the sound is shorter than what was asked for, or the model has no such size, or no room for the text.
    """
    options = replace(options, seconds=options.fitted(sound.name, sound.seconds))
    adapter = ADAPTERS[options.model]
    check_size(options, adapter)
    adapter.check(options)
    return options


def _groups(options: SoundOptions) -> list[tuple[Excerpt, ...]]:
    """Returns the rows that are measured together: those of one sound, which share inputs and are compared."""
    return [tuple(rows) for _, rows in groupby(options.rows, lambda row: row.seconds)]


def steps(options: SoundOptions) -> int:
    """Returns how often `reports` reports progress."""
    return sum(steps_of_rows(options, ADAPTERS[options.model], len(rows)) for rows in _groups(options))


def reports(
    options: SoundOptions, sound: Sound, progress: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """Measures, and yields after each row what is known by then, as `mmkernels.profiling.profiler.reports` does.

    Args:
        options: as `fit` returned them.
        sound: what is heard.
        progress: called with the name of each step before it begins.
    """
    adapter = ADAPTERS[options.model]
    cells: list[Cell] = []
    for rows in _groups(options):
        found: list[Cell] = []
        for points in measure_rows(adapter, options, rows, [sound], progress):
            found = [cell for point in points for cell in point.cells.values()]
            yield _report(options, adapter, sound, cells + found)
        cells += found
        del points  # with their models


def profile(options: SoundOptions, sound: Sound, progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Measures, and returns the last of the `reports`, which has everything."""
    *_, report = reports(options, sound, progress)
    return report


def _report(options: SoundOptions, adapter: SoundAdapter, sound: Sound, cells: list[Cell]) -> dict[str, Any]:
    found = common(options, adapter, command(options), cells)
    return found | {
        "settings": found["settings"] | {"audio": sound.name},
        "sound": {"name": sound.name, "seconds": sound.seconds, "made": sound.made},
        "about_tokens": adapter.about_tokens,
        "padded_elsewhere": adapter.padded_elsewhere,
        "seconds_per_second_of_sound": slopes(cells),
    }


def command(options: SoundOptions) -> str:
    """Returns the command that repeats this profile; of the sound's path it has the file's name alone."""
    words = ["mmkernels", "profile", options.model]
    words += [] if options.audio is None else ["--audio", options.audio.name]
    words += ["--seconds", ",".join(f"{part:g}" for part in options.seconds or ())]
    words += ["--pool", ",".join(map(str, options.pool or ())), "--text-length", str(options.text_length)]
    return shlex.join(words + words_of_run(options) + ["--train"] * options.train)


def slopes(cells: list[Cell]) -> dict[str, float]:
    """Returns seconds to the first token per further second of sound, by backend: from the shortest to the longest."""
    found = {}
    for backend in dict.fromkeys(cell["backend"] for cell in cells):
        row = [c for c in cells if c["backend"] == backend and c["pool"] == 1 and "total" in c["seconds"]]
        if len(row) > 1:
            more = row[-1]["sound_seconds"] - row[0]["sound_seconds"]
            found[backend] = (row[-1]["seconds"]["total"] - row[0]["seconds"]["total"]) / more
    return found
