"""Prompts with images for small models of the Qwen-VL family, and what several tests of conversations need."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mmkernels.models import QwenVL

SIZES = ("tiny_qwen2", "tiny", "tiny_qwen3")
MARKER = 127
Size = tuple[int, int]


@cache
def model(size: str = "tiny") -> QwenVL:
    """Returns a model in float64, so that two ways to the same result differ by 1e-12; tests don't change it."""
    made = QwenVL.from_size(size, dtype=torch.float64, seed=3).eval()
    with torch.no_grad():
        made.head.weight[126:] = 0  # no marker is generated: as a part of a later prompt it would stand for an image
    return made


def image(height: int, width: int, seed: int = 0) -> tuple[Tensor, Size]:
    """Returns the patches of an image of height x width tokens, and this size."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(4 * height * width, 96, generator=generator, dtype=torch.float64), (height, width)


def given(*images: tuple[Tensor, Size]) -> dict[str, object]:
    """Returns the arguments of `forward` for images."""
    if not images:
        return {}
    grid = torch.tensor([(1, 2 * height, 2 * width) for _, (height, width) in images])
    return {"pixel_values": torch.cat([pixels for pixels, _ in images]), "image_grid_thw": grid}


def text(*parts: int | tuple[Tensor, Size]) -> list[int]:
    """Returns the tokens of a prompt: each image becomes as many markers as it has tokens."""
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [MARKER] * (part[1][0] * part[1][1])
    return tokens


def padded(rows: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    """Returns rows as tokens ``[B, L]`` and their attention mask."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side)
        for x in (tensors, [torch.ones_like(row) for row in tensors])
    )
    return ids, mask


class EncoderCalls:
    """Counts the patches of each call of a model's encoder, within a ``with`` block."""

    def __init__(self, of: QwenVL) -> None:
        self.patches: list[int] = []
        self._module = of.vision

    def __enter__(self) -> list[int]:
        self._hook = self._module.register_forward_hook(lambda module, args, out: self.patches.append(len(args[0])))
        return self.patches

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
