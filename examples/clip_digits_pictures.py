"""The pictures of `clip_digits.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the palette of Okabe and Ito, which all kinds of colour vision can distinguish.
BLUE, GREEN, RED = "#0072B2", "#007A59", "#D55E00"
GREY = "#555555"


def draw_loss(
    losses: dict[str, Tensor], least: Tensor, bounds: list[tuple[int | None, float]], eps: float, path: Path
) -> None:
    """Draws two loss curves [steps], and below them their relative difference.

    Args:
        losses: each curve by its name; the first is the baseline.
        least: [steps], the smallest possible loss.
        bounds: pairs of a number of steps from the start (None: all) and the largest difference in them.
        eps: the relative distance of two neighbouring floating-point numbers.
    """
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(9.5, 7.6), dpi=110, height_ratios=(3, 2), layout="constrained"
    )
    (one, baseline), (other, curve) = losses.items()
    figure.suptitle(f"From one seed, training gives one loss curve: {one} and {other}", fontsize=15, weight="bold")
    steps = np.arange(1, len(curve) + 1)
    upper.plot(steps, curve.numpy(), color=BLUE, linewidth=5, alpha=0.5, label=other)
    upper.plot(steps, baseline.numpy(), color="black", linewidth=1.1, label=one)
    upper.plot(
        steps, least.numpy(), color=RED, linewidth=1.1, linestyle=":", label="least possible: the targets' entropy"
    )
    upper.set_ylabel("contrastive loss (nats)", fontsize=11)
    upper.legend(frameon=False, fontsize=11)
    upper.margins(x=0.01)
    _difference(lower, ((curve - baseline).abs() / baseline).numpy(), bounds, eps)
    for axes in (upper, lower):
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _difference(axes: Axes, apart: np.ndarray, bounds: list[tuple[int | None, float]], eps: float) -> None:
    steps, differ = np.arange(1, len(apart) + 1), apart > 0
    axes.semilogy(steps[differ], apart[differ], "o", color=BLUE, markersize=3.5, markeredgewidth=0)
    axes.set_ylim(eps / 20, 10 * max(bound for _, bound in bounds))
    axes.axhline(eps, color=GREY, linewidth=1, linestyle="--")
    axes.text(len(steps), eps / 8, "dashed: one unit in float32's last place", ha="right", fontsize=9.5, color=GREY)
    for last, bound in bounds:
        end = min(last or len(steps), len(steps))
        axes.plot([1, end], [bound, bound], color="black", linewidth=1.8, solid_capstyle="butt")
        words = f"bound of the first {last} steps" if last else "bound of all steps"
        x, side = (end, "left") if last else (len(steps), "right")
        axes.annotate(f"{words}: {bound:.1e}", (x, bound), xytext=(6 if last else 0, 4), textcoords="offset points",
                      ha=side, fontsize=9.5)  # fmt: skip
    axes.set_ylabel("relative difference", fontsize=11)
    equal = f"{len(steps) - int(differ.sum())} of {len(steps)} steps have equal losses, and no dot"
    axes.set_xlabel(f"training step ({equal})", fontsize=11)


def draw_retrieval(
    prompts: list[str], best: Tensor, pixels: Tensor, digits: Tensor, guesses: Tensor, path: Path
) -> None:
    """Draws the first images that each prompt retrieves, and below them those that are classified wrongly.

    Args:
        prompts: one for each of the ten digits.
        best: int64 [10, 5], the images retrieved, best first.
        pixels, digits, guesses: [N, 8, 8], [N], [N]: all images, their digits, the digits that the model predicts.
    """
    figure = plt.figure(figsize=(10.5, 12.2), dpi=100, facecolor="white")
    figure.text(0.04, 0.962, "What a prompt finds among held-out digits", fontsize=19, weight="bold")
    words = f"The first {best.shape[1]} of {len(pixels)} images, best first. Neither image nor prompt was in training."
    figure.text(0.04, 0.938, words, fontsize=11.5, color=GREY)
    for digit, prompt in enumerate(prompts):
        column, row = divmod(digit, 5)
        left, bottom = 0.04 + 0.48 * column, 0.805 - 0.145 * row
        figure.text(left, bottom + 0.083, f"“{prompt}”", fontsize=12.5)
        for place, image in enumerate(best[digit].tolist()):
            axes = figure.add_axes((left + 0.088 * place, bottom, 0.079, 0.079 * 10.5 / 12.2))
            right = int(digits[image]) == digit
            _show(axes, pixels[image], GREEN if right else RED, "✓" if right else f"✗ a {int(digits[image])}")
    _mistakes(figure, pixels, digits, guesses)
    _save(figure, path)


def _mistakes(figure: Figure, pixels: Tensor, digits: Tensor, guesses: Tensor, fit: int = 10) -> None:
    wrong = (guesses != digits).nonzero()[:, 0].tolist()
    title = f"{len(wrong)} of the {len(pixels)} images are taken for another digit"
    title += f"; the first {fit}:" if len(wrong) > fit else ":" if wrong else ""
    figure.text(0.04, 0.125, title, fontsize=13, weight="bold")
    for place, image in enumerate(wrong[:fit]):
        axes = figure.add_axes((0.04 + 0.0945 * place, 0.045, 0.0705, 0.0705 * 10.5 / 12.2))
        _show(axes, pixels[image], RED, f"{int(digits[image])}, read as {int(guesses[image])}")


def _show(axes: Axes, pixels: Tensor, colour: str, words: str) -> None:
    axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(words, color=colour, labelpad=3, fontsize=10)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
