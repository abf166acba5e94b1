"""What a model's own processor makes of a photograph of several sizes, and of a question about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkernels.options import BadInput
from mmkernels.profiling.hf_model import Source, quiet
from mmkernels.profiling.hf_options import HFOptions

NEW_TOKENS = 9
"""Tokens that are generated: the first, and those over which the time of one more is averaged."""

_EDGE = "longest_edge"

Tensors = Mapping[str, Any]
"""Keyword arguments of the model, most of them tensors."""


@dataclass(frozen=True)
class Prepared:
    """The inputs of one row.

    Args:
        side: the row's.
        tensors: what the processor returned, on the CPU.
        markers: how many tokens of the prompt stand for the photograph; 0: the model has no such token.
    """

    side: int
    tensors: Tensors
    markers: int

    @property
    def text_tokens(self) -> int:
        """Tokens of the prompt that are text."""
        return int(self.tensors["input_ids"].shape[-1]) - self.markers

    def is_like(self, other: Prepared) -> bool:
        """Returns whether the model has the same work: inputs of the same shapes, and of the same integers."""
        return self.tensors.keys() == other.tensors.keys() and all(
            _alike(value, other.tensors[name]) for name, value in self.tensors.items()
        )


@dataclass(frozen=True)
class Rows:
    """The rows of a profile.

    Args:
        prepared: those that differ, the fewest tokens first.
        how: how a side becomes the size of a photograph, in words.
        notes: what must be said of those that were asked for and are not there.
    """

    prepared: tuple[Prepared, ...]
    how: str
    notes: tuple[str, ...]


def prepare(options: HFOptions, source: Source, photo: Image.Image) -> Rows:
    """Returns the inputs of every row.

    The photograph is scaled to each side, and the processor does what it does. Of one that scales every photograph to
    a longest edge, and would so make all rows the same, that edge is set instead.

    Raises:
        BadInput: the processor can't make a prompt of the photograph and the question, or there is no room for it.
    """
    sides = options.resolutions or ()
    rows = [_prepared(options, source, _scaled(photo, side), side, {}) for side in sides]
    how = "the photograph is scaled to as many pixels as a square of this side has"
    if len(rows) > 1 and _are_alike(rows) and _size_names(source.processor) == {_EDGE}:
        again = [_prepared(options, source, photo, side, {"size": {_EDGE: side}}) for side in sides]
        if not _are_alike(again):
            rows, how = again, f"the processor scales the photograph's longest edge to it ({_EDGE})"
    different, notes = _distinct(rows)
    for row in different:
        _check_room(source, row)
    return Rows(tuple(sorted(different, key=lambda row: (row.markers, row.side))), how, notes)


def _scaled(photo: Image.Image, side: int) -> Image.Image:
    """Returns the photograph in its shape, with about as many pixels as a square of this side."""
    factor = side / sqrt(photo.width * photo.height)
    size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
    return photo.resize(size, Image.Resampling.BICUBIC)


def _size_names(processor: Any) -> set[str]:
    """Returns the names in which a processor of images says to what size it scales them."""
    size = getattr(processor.image_processor, "size", None)
    return {name for name, value in dict(size).items() if value is not None} if size is not None else set()


def _prepared(
    options: HFOptions, source: Source, photo: Image.Image, side: int, of_images: Mapping[str, Any]
) -> Prepared:
    marker = _marker(source)
    errors = []
    with quiet():
        for make in _ways(options, source, photo, of_images):
            try:
                tensors = dict(make())
            except Exception as error:  # the processor is someone else's: the next way may be the right one
                errors.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
                continue
            markers = 0 if marker is None else int((torch.as_tensor(tensors["input_ids"]) == marker).sum())
            if markers or marker is None:
                return Prepared(side, tensors, markers)
            errors.append(f"it put no token {marker} for the image into the prompt")
    raise BadInput(
        f"--model: the processor of {options.name} made no prompt of a photograph of {photo.width} x {photo.height} "
        f"pixels and the question: {'; '.join(dict.fromkeys(errors))}"
    )


def _ways(options: HFOptions, source: Source, photo: Image.Image, of_images: Mapping[str, Any]) -> Iterator[Any]:
    """Yields functions that make a prompt: by the chat template; where there is none, by the question alone, to which
    some processors add what stands for an image, and by the image's token before it."""
    processor, question = source.processor, options.question
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": photo}, {"type": "text", "text": question}]
        more = {"processor_kwargs": {"images_kwargs": dict(of_images)}} if of_images else {}
        yield lambda: processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **more,
        )
        return
    more = {"images_kwargs": dict(of_images)} if of_images else {}
    yield lambda: processor(images=photo, text=question, return_tensors="pt", **more)
    token = getattr(processor, "image_token", None)
    if isinstance(token, str):
        yield lambda: processor(images=photo, text=f"{token}\n{question}", return_tensors="pt", **more)


def _marker(source: Source) -> int | None:
    """Returns the token that stands for an image in the prompt; None: neither configuration nor processor names one."""
    for owner in (source.config, source.processor):
        found = getattr(owner, "image_token_id", None)
        if isinstance(found, int):
            return found
    return None


def _are_alike(rows: list[Prepared]) -> bool:
    return all(row.is_like(rows[0]) for row in rows)


def _alike(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return type(value) is type(other)
    return value.shape == other.shape and (value.is_floating_point() or torch.equal(value, other))


def _distinct(rows: list[Prepared]) -> tuple[list[Prepared], tuple[str, ...]]:
    """Returns the rows that differ, and what must be said of the others."""
    different: list[Prepared] = []
    same: dict[int, list[int]] = {}
    for row in rows:
        like = next((other for other in different if row.is_like(other)), None)
        if like is None:
            different.append(row)
        else:
            same.setdefault(like.side, []).append(row.side)
    notes = (
        f"The processor makes the same of {', '.join(f'{side:,}' for side in sides)} px as of {first:,} px."
        for first, sides in same.items()
    )
    return different, tuple(notes)


def _check_room(source: Source, row: Prepared) -> None:
    """Raises `BadInput` where a prompt is longer than the model's positions."""
    most = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    length = row.tensors["input_ids"].shape[-1] + NEW_TOKENS
    if isinstance(most, int) and length > most:
        must = f"leave the prompt and {NEW_TOKENS} tokens more within {most}"
        raise BadInput(f"--resolutions must {must}, got {length} by {row.side}")


def to_device(row: Prepared, model: Any) -> dict[str, Any]:
    """Returns a row's inputs on the model's device, pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in row.tensors.items()
    }
