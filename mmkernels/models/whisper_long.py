"""Sounds that are longer than a `Whisper` hears at once: read in windows, whose places the written times decide.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, section 3.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.whisper_generation import Options, WhisperGeneration, check_prompt_ids, generate, prompts
from mmkernels.models.whisper_timestamps import SECONDS, check_finite, check_frame_lengths
from mmkernels.runtime.checks import check_floating, check_range

if TYPE_CHECKING:
    from mmkernels.models.whisper import Whisper


@dataclass
class Segment:
    """A part of a sound and what is said in it.

    Attributes:
        start, end: in seconds from the start of the sound.
        tokens: int64 ``[n]``, with the times as the model wrote them, from the start of the window.
        token_times: when each token begins, in seconds from the start of the sound, float32 ``[n]``; None where it was
            not asked for.
    """

    start: float
    end: float
    tokens: Tensor
    token_times: Tensor | None = None


def transcribe(
    model: Whisper,
    input_features: Tensor,
    frame_lengths: Tensor | None,
    options: Options,
    *,
    hide_padding: bool,
    language: str | Sequence[str] | None,
    task: str | None,
    prompt_ids: Tensor | None,
) -> list[list[Segment]]:
    """Returns the segments of each sound; `Whisper.transcribe` describes the arguments."""
    first_time = model.config.tokens.first_time
    if first_time is None:
        raise ValueError("the model must have tokens of times to transcribe, got none")
    lengths = _lengths(input_features, frame_lengths, model.config.mel_bins)
    check_finite("input_features", input_features, frame_lengths)
    model.config.tokens.check_request(len(lengths), language=language, task=task, timestamps=True)
    check_prompt_ids(prompt_ids)
    most = model.encoder.most_frames
    seeks, found = [0] * len(lengths), [list[Segment]() for _ in lengths]
    prompt: Tensor | None = None
    while rows := [row for row, length in enumerate(lengths) if seeks[row] < length]:
        counts = [min(lengths[row] - seeks[row], most) for row in rows]
        parts = [input_features[row, :, seeks[row] : seeks[row] + n] for row, n in zip(rows, counts, strict=True)]
        window = torch.stack([F.pad(part, (0, most - part.shape[1])) for part in parts])
        sizes = torch.tensor(counts)
        keys = model.project(model.encode(window, sizes if hide_padding else None))
        if prompt is None:
            prompt = input_features.new_zeros(len(lengths), 0, dtype=torch.int64)
            spoken = [language[row] for row in rows] if isinstance(language, list | tuple) else language
            given = prompts(model, keys, language=spoken, task=task, timestamps=True, prompt_ids=prompt_ids)
            prompt = given.new_zeros(len(lengths), given.shape[1])
            prompt[rows] = given  # sounds without frames have no window
        out = generate(model, keys, prompt[rows], options, sizes if options.token_times else None)
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            part = _Part.of(out, place, options.ends)
            segments, step = _segments(part, first_time, count, seeks[row] * SECONDS / 2)
            found[row] += segments
            seeks[row] += step
    return found


def _lengths(input_features: Tensor, frame_lengths: Tensor | None, mel_bins: int) -> list[int]:
    """Returns the frames of each sound; raises where an input is wrong."""
    check_floating("input_features", input_features)
    shape = tuple(input_features.shape)
    if len(shape) != 3 or shape[1] != mel_bins or not (shape[0] and shape[2]):
        raise ValueError(f"input_features must be [B, {mel_bins}, T], B and T at least 1, got shape {shape}")
    if frame_lengths is None:
        return [shape[2]] * shape[0]
    check_frame_lengths(frame_lengths, shape[0])
    check_range("frame_lengths", frame_lengths, 0, shape[2])
    lengths: list[int] = frame_lengths.tolist()
    return lengths


class _Part(NamedTuple):
    """What was written about a window: tokens without the end of the text, on the host, and their times."""

    tokens: list[int]
    ids: Tensor
    times: Tensor | None

    @classmethod
    def of(cls, out: WhisperGeneration, row: int, ends: tuple[int, ...]) -> _Part:
        tokens: list[int] = out.tokens[row, : int(out.lengths[row])].tolist()
        if tokens and tokens[-1] in ends:
            tokens.pop()
        times = None if out.token_times is None else out.token_times[row, : len(tokens)]
        return cls(tokens, out.tokens[row, : len(tokens)], times)

    def segment(self, start: int, end: int, seconds: tuple[float, float], offset: float) -> Segment:
        """Returns the segment of these tokens and seconds, of a window that begins at `offset`."""
        times = None if self.times is None else self.times[start:end] + offset
        return Segment(offset + seconds[0], offset + seconds[1], self.ids[start:end], times)


def _segments(part: _Part, first_time: int, frames: int, offset: float) -> tuple[list[Segment], int]:
    """Returns the segments of a window, and by how many frames the next window begins behind it.

    Two times side by side end a segment and begin the next one. The last one counts only where its end was written: if
    it was not, the next window begins with it.

    Args:
        part: what was written.
        first_time: the token of the time 0.
        frames: of the window that are of the sound.
        offset: at which the window begins, in seconds.
    """
    tokens = part.tokens
    is_time = [token >= first_time for token in tokens]
    seconds = lambda place: (tokens[place] - first_time) * SECONDS
    ends = [place + 1 for place in range(len(tokens) - 1) if is_time[place] and is_time[place + 1]]
    if not ends:
        times = [place for place, time in enumerate(is_time) if time]
        last = seconds(times[-1]) if times and tokens[times[-1]] != first_time else frames // 2 * SECONDS
        return [part.segment(0, len(tokens), (0.0, last), offset)], frames
    closed = is_time[-2:] == [False, True]  # nothing is said behind the last time
    if closed:
        ends.append(len(tokens))
    segments, start = [], 0
    for number, end in enumerate(ends):
        more = int(number == len(ends) - 1 and not closed)  # the time at which the next window begins
        segments.append(part.segment(start, end + more, (seconds(start), seconds(end - 1)), offset))
        start = end
    return segments, frames if closed else max(2, 2 * (tokens[ends[-1] - 1] - first_time))
