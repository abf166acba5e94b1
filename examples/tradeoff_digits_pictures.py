"""The pictures of `tradeoff_digits.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from torch import Tensor
from tradeoff_digits_data import GRID, KINDS, MERGE, PATCH, SIDE, SQUARE, SQUARES, TOKENS, WORDS, Scenes

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from tradeoff_digits import Point

# From the palette of Okabe and Ito, which all kinds of colour vision can distinguish.
STYLES = {
    "tome": ("#0072B2", "o", "tome: similar tokens merged"),
    "select": ("#D55E00", "s", "select: the most attended tokens"),
    "diverse": ("#009E73", "^", "diverse: tokens that differ"),
    "pool": ("#CC79A7", "D", "pool: means of neighbours"),
}
GREY, GREEN, RED = "#555555", "#007A59", "#D55E00"


def draw_curve(points: Sequence[Point], least: float, blind: float, path: Path) -> None:
    """Draws accuracy against visual tokens kept, of all questions and of each kind.

    Args:
        points: one of each reducer; the first has all tokens.
        least, blind: the accuracy of the most frequent answers, and that with another scene's image.
    """
    figure = plt.figure(figsize=(12, 6.4), dpi=110, layout="constrained")
    figure.suptitle(
        "What fewer visual tokens cost: one model, trained once with all of them", fontsize=15, weight="bold"
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    big = left.subplots()
    _lines(big, points, lambda point: point.accuracy)
    for share, words in ((least, "most frequent answers"), (blind, "another scene's image")):
        big.axhline(100 * share, color=GREY, linewidth=1, linestyle="--" if share == least else ":", label=words)
    big.set_ylabel("questions answered correctly (%)", fontsize=11)
    big.set_title("all questions", fontsize=12)
    big.set_xlabel("visual tokens kept of a scene", fontsize=11)
    big.legend(frameon=False, fontsize=10, loc="upper left")
    small = right.subplots(2, 2, sharex=True, sharey=True)
    for kind, axes in enumerate(small.flat):
        _lines(axes, points, lambda point, kind=kind: point.of_kind[kind])
        axes.set_title(KINDS[kind], fontsize=11)
    for axes in small[1]:
        axes.set_xlabel("tokens kept", fontsize=10)
    _save(figure, path)


def _lines(axes: Axes, points: Sequence[Point], share: object) -> None:
    for kind, (colour, marker, words) in STYLES.items():
        line = sorted(point for point in points if point.reducer.startswith((f"{kind}:", "none")))
        line.sort(key=lambda point: point.tokens)
        x, y = [point.tokens for point in line], [100 * share(point) for point in line]  # type: ignore[operator]
        axes.plot(x, y, marker=marker, color=colour, label=words, linewidth=1.8, markersize=5.5)
    axes.set_xscale("log", base=2)
    ticks = (2, 4, 9, 18, 36)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_kept(scenes: Scenes, seen: Sequence[tuple[str, Tensor, Tensor]], path: Path) -> None:
    """Draws scenes, the tokens that reducers keep of them, and the answers that the model gives.

    Args:
        scenes: N scenes.
        seen: reducer, answers [N, QUESTIONS], and tokens kept [N, kept], of each reducer.
    """
    rows, columns = len(scenes.pixels), len(seen)
    height = 4.5 * rows + 0.8
    figure, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, height), dpi=100, squeeze=False)
    figure.subplots_adjust(left=0.03, right=0.99, bottom=1.3 / height, top=1 - 0.9 / height, wspace=0.12, hspace=0.55)
    title, note = (
        "What is kept of a scene, and what the model answers",
        "orange: wrong, with the right answer in brackets",
    )
    figure.text(0.03, 1 - 0.35 / height, title, fontsize=16, weight="bold")
    figure.text(0.99, 1 - 0.35 / height, note, fontsize=10, color=GREY, ha="right")
    for row in range(rows):
        for column, (reducer, answers, kept) in enumerate(seen):
            axes = grid[row, column]
            _board(axes, scenes.pixels[row], kept[row])
            if row == 0:
                axes.set_title(f"{reducer} ({kept.shape[1]} tokens)", fontsize=12)
            _answers(axes, scenes, row, answers[row])
    _save(figure, path)


def _board(axes: Axes, pixels: Tensor, kept: Tensor) -> None:
    axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", extent=(0, SIDE, SIDE, 0))
    left_out = torch.ones(TOKENS)
    left_out[kept] = 0
    shade = torch.zeros(*[GRID[1] // MERGE] * 2, 4)
    shade[..., 2], shade[..., 3] = 0.4, 0.55 * left_out.view(shade.shape[:2])
    axes.imshow(shade.numpy(), interpolation="nearest", extent=(0, SIDE, SIDE, 0))
    for line in range(0, SIDE + 1, PATCH * MERGE):
        width = 1.0 if line % SQUARE == 0 else 0.3
        axes.axhline(line, color="#888888", linewidth=width)
        axes.axvline(line, color="#888888", linewidth=width)
    middles = [SQUARE * place + SQUARE / 2 for place in range(SQUARES)]
    axes.set_xticks(middles, "abc", fontsize=9)
    axes.set_yticks(middles, range(1, SQUARES + 1), fontsize=9)
    axes.tick_params(length=0)


def _answers(axes: Axes, scenes: Scenes, row: int, answers: Tensor) -> None:
    """Writes each question and its answer below a board."""
    order = scenes.kinds[row].argsort(stable=True).tolist()
    for line, place in enumerate(order):
        question = " ".join(WORDS[word] for word in scenes.questions[row, place])
        answer, right = WORDS[answers[place]], WORDS[scenes.answers[row, place]]
        words = f"{question}: {answer}" + ("" if answer == right else f" ({right})")
        x, y = (0.0 if line % 2 == 0 else 0.53), -0.1 - 0.075 * (line // 2)
        colour = GREEN if answer == right else RED
        axes.text(x, y, words, transform=axes.transAxes, fontsize=8, color=colour, va="top")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
