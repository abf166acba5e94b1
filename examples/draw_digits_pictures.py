"""The pictures of `draw_digits.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from clip_digits_data import DIGITS
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from draw_digits import Drawings

# From the palette of Okabe and Ito, which all kinds of colour vision can distinguish.
BLUE, GREEN, RED, GREY = "#0072B2", "#007A59", "#D55E00", "#555555"
SMOOTH = 20  # steps that a loss curve is averaged over


def draw_drawings(
    real: Tensor, restored: Tensor, held: dict[str, float], drawn: Sequence[Drawings], path: Path
) -> None:
    """Draws images of each digit: real ones, what their tokens keep, and drawings with several guidance scales.

    Args:
        real, restored: [10, 4, 8, 8].
        held: the classifier's accuracy of "real" and "restored" images.
        drawn: with at least four drawings of each digit.
    """
    rows = [("real, held out", held["real"], real), ("from their tokens", held["restored"], restored)]
    for found in drawn:
        words = {0.0: "0: prompt ignored", 1.0: "1: none"}.get(found.scale, f"{found.scale:g}")
        rows.append((f"guidance {words}", found.recognised, found.pixels))
    figure, axes = plt.subplots(
        len(rows), 10, figsize=(12.5, 1.12 * len(rows) + 0.9), dpi=100, layout="constrained", facecolor="white"
    )
    figure.suptitle("“draw a …”: handwritten digits, four of each, by a small Janus", fontsize=15, weight="bold")
    for (words, share, images), line in zip(rows, axes):
        for digit, cell in enumerate(line):
            cell.imshow(_mosaic(images[digit, :4]), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            for spine in cell.spines.values():
                spine.set_color("#bbbbbb")
        label = f"{words}\n{100 * share:.1f} % recognised"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10.5)
    for digit, cell in enumerate(axes[0]):
        cell.set_title(DIGITS[digit], fontsize=12)
    _save(figure, path)


def _mosaic(images: Tensor) -> np.ndarray:
    """Returns four images [4, 8, 8] as one, with a line between them."""
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
    whole: np.ndarray = framed.view(2, 2, 10, 10).transpose(1, 2).reshape(20, 20).numpy()
    return whole


def draw_curves(
    losses: dict[str, list[float]] | None, drawn: Sequence[Drawings], held: dict[str, float], path: Path
) -> None:
    """Draws the losses of training, where there was one, and what guidance gives and costs.

    Args:
        losses: of each step: "tokenizer", "drawing", "reading".
        drawn: of each guidance scale.
        held: shares of real images.
    """
    figure, axes = plt.subplots(1, 3 if losses else 1, figsize=(15 if losses else 6.5, 4.8), dpi=100,
                                layout="constrained", squeeze=False)  # fmt: skip
    if losses:
        _losses(axes[0, 0], {"squared error of a pixel, from -1 to 1": (losses["tokenizer"], BLUE)}, "the tokenizer")
        curves = {"an image's token, given a prompt": (losses["drawing"], BLUE)}
        curves |= {"a digit's name, given an image": (losses["reading"], RED)}
        _losses(axes[0, 1], curves, "Janus: cross-entropy (nats)")
    last, scales = axes[0, -1], [found.scale for found in drawn]
    last.plot(scales, [100 * found.recognised for found in drawn], "o-", color=BLUE, label="recognised (%)")
    last.plot(scales, [100 * found.read for found in drawn], "s--", color=RED, label="read by Janus itself (%)")
    last.plot(scales, [100 * found.spread for found in drawn], "^-", color=GREEN,
              label="how much drawings of a digit differ (real: 100)")  # fmt: skip
    last.axhline(100 * held["restored"], color=GREY, linewidth=1, linestyle=":")
    last.text(scales[-1], 100 * held["restored"], "recognised of real images from their tokens ", ha="right",
              va="top", fontsize=9, color=GREY)  # fmt: skip
    last.set_ylim(0, 125)
    last.set_xlabel("guidance scale", fontsize=11)
    last.set_title("what guidance gives and costs", fontsize=12)
    last.legend(frameon=False, fontsize=9.5, loc="lower right")
    for each in axes.flat:
        each.grid(True, color="#dddddd", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _losses(axes: Axes, curves: dict[str, tuple[list[float], str]], title: str) -> None:
    for name, (loss, colour) in curves.items():
        window = min(SMOOTH, len(loss))
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.semilogy(np.arange(window, len(loss) + 1), smooth, color=colour, linewidth=1.6, label=name)
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(f"step (means of {SMOOTH})", fontsize=11)
    axes.legend(frameon=False, fontsize=9.5)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
