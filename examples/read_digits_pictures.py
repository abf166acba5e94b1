"""The pictures of `read_digits.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from read_digits_answers import Asked, claims_of, parse, verify, wanted
from read_digits_data import CELL, CELLS, KINDS, SIDE, Scenes, spell
from torch import Tensor

from mmkernels.evaluation import Region, claim_scores

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# From the palette of Okabe and Ito, which all kinds of colour vision can distinguish.
BLUE, GREEN, RED, GREY = "#0072B2", "#007A59", "#D55E00", "#555555"


def draw_curves(
    losses: dict[str, list[float]], naive: dict[str, list[float]], rewards: list[float], bound: float, path: Path
) -> None:
    """Draws the losses of supervised stages, the same by naive formulas, their difference, and the rewards.

    Args:
        losses: of each supervised stage by its name.
        naive: the same of the first steps, by the naive formulas.
        rewards: of the last stage.
        bound: what the relative differences must not pass.
    """
    figure, grid = plt.subplots(2, 3, figsize=(14, 7.4), dpi=100, layout="constrained", height_ratios=(3, 2))
    figure.suptitle("Three stages: see, answer, be rewarded", fontsize=16, weight="bold")
    zoom = grid[1, 2]
    for axes, below, (name, fused) in zip(grid[0], grid[1], losses.items()):
        formula = naive[name]
        axes.plot(steps_of(fused), fused, color=BLUE, linewidth=0.8, alpha=0.35)
        axes.plot(steps_of(fused), smooth(fused), color=BLUE, linewidth=2, label="mean of 25 steps")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=12)
        axes.set_ylabel("loss (nats)")
        axes.legend(frameon=False)
        draw_difference(below, name, [abs(a - b) / b for a, b in zip(fused, formula)], bound)
        zoom.plot(steps_of(formula), fused[: len(formula)], color=BLUE, linewidth=5, alpha=0.4)
        zoom.plot(steps_of(formula), formula, color="black", linewidth=1.2)
        zoom.text(2, formula[0], name, va="bottom", fontsize=10)
    zoom.set_yscale("log")
    zoom.set_title("fused (blue) and naive (black): losses", fontsize=11)
    axes = grid[0, 2]
    axes.plot(steps_of(rewards), rewards, color=GREEN, linewidth=0.8, alpha=0.35)
    axes.plot(steps_of(rewards), smooth(rewards), color=GREEN, linewidth=2, label="mean of 25 steps")
    axes.set_title("3: be rewarded (GRPO)", fontsize=12)
    axes.set_ylabel("reward of sampled answers, at most 1")
    axes.legend(frameon=False, loc="lower right")
    for axes in grid.flat:
        axes.set_xlabel("step")
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_difference(axes: Axes, name: str, apart: list[float], bound: float) -> None:
    """Draws the relative differences of two curves, without those that are 0."""
    steps = [step for step in steps_of(apart) if apart[step - 1] > 0]
    axes.semilogy(steps, [apart[step - 1] for step in steps], "o", color=BLUE, markersize=4)
    axes.axhline(bound, color="black", linewidth=1.5)
    axes.text(1, bound * 1.4, f"bound: {bound:.0e}", fontsize=9)
    axes.axhline(2**-23, color=GREY, linewidth=1, linestyle="--")
    axes.text(
        len(apart), 2**-23 / 1.6, "one unit in float32's last place", fontsize=9, color=GREY, ha="right", va="top"
    )
    axes.set_xlim(0, len(apart) + 1)
    axes.set_ylim(5e-9, bound * 10)
    equal = f"{len(apart) - len(steps)} of {len(apart)} are equal, without a dot"
    axes.set_title(f"fused and naive, {name}: relative difference\n({equal})", fontsize=10)


def steps_of(values: Sequence[float]) -> list[int]:
    return list(range(1, len(values) + 1))


def smooth(values: Sequence[float], over: int = 25) -> list[float]:
    """Returns the means of the last `over` values, of fewer at the start."""
    return [sum(values[max(0, i - over + 1) : i + 1]) / min(over, i + 1) for i in range(len(values))]


def draw_answers(scenes: Scenes, asked: Asked, looks: Tensor, path: Path) -> None:
    """Draws scenes with the answers to their questions, the boxes that they name, and where they come from.

    Args:
        scenes: N scenes.
        asked: what the model says of them.
        looks: [N, KINDS, rows, columns], the part of each patch in each answer.
    """
    rows, columns = len(KINDS) + 1, len(scenes.shown)
    figure, grid = plt.subplots(rows, columns, figsize=(3.5 * columns, 3.55 * rows + 1), dpi=90, squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.05, top=0.925, hspace=0.3, wspace=0.12)
    figure.text(0.02, 0.968, "What the model reads, and from where", fontsize=19, weight="bold")
    note = "green: right, orange: wrong. Dashed: the true box. Blue: the patches that the answer attends to."
    figure.text(0.02, 0.946, note, fontsize=11, color=GREY)
    answers = spell(asked.answers.flatten(0, 1))
    found = verify(answers, *wanted(scenes))
    right = (found.there & found.read & (found.overlap >= 0.5)) | (~found.there & found.refused)
    for column in range(columns):
        for kind in range(len(KINDS)):
            place = column * len(KINDS) + kind
            axes = grid[kind, column]
            draw_scene(axes, scenes.pixels[column, 0], looks[column, kind])
            value, region = parse(answers[place]), int(scenes.regions[column, kind])
            colour = GREEN if right[place] else RED
            if region >= 0:
                draw_box(axes, scenes.boxes[column, region].tolist(), "black", dashed=True)
            if value is not None and "box" in value:
                draw_box(axes, value["box"], colour)
            question = spell(scenes.questions[column, kind][None])[0]
            axes.set_title(question, fontsize=12)
            axes.set_xlabel(answers[place], fontsize=9.5, color=colour, family="monospace")
        _description(grid[-1, column], scenes, column, spell(asked.sentences[column][None])[0])
    save(figure, path)


def _description(axes: Axes, scenes: Scenes, row: int, sentence: str) -> None:
    """Draws a scene and the boxes of the claims about it, each in green where the scene has evidence for it."""
    draw_scene(axes, scenes.pixels[row, 0], None)
    there = [
        Region(digit, box) for digit, box in zip(scenes.shown[row].tolist(), scenes.boxes[row].tolist()) if digit >= 0
    ]
    for claim in claims_of(sentence):
        holds = claim_scores([[claim]], [there]).unsupported_rate == 0
        assert claim.box is not None
        draw_box(axes, claim.box, GREEN if holds else RED, str(claim.label))
    axes.set_title("describe the scene", fontsize=12)
    axes.set_xlabel(sentence.replace(" and ", "\nand "), fontsize=9)


def draw_scene(axes: Axes, pixels: Tensor, look: Tensor | None) -> None:
    axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", extent=(0, SIDE, SIDE, 0))
    if look is not None:
        strength = look / look.max()
        axes.imshow(strength.numpy(), cmap="Blues", alpha=(0.6 * strength).numpy(), extent=(0, SIDE, SIDE, 0), vmin=0)
    for line in range(CELL, CELL * CELLS, CELL):
        axes.axhline(line, color="#bbbbbb", linewidth=0.8)
        axes.axvline(line, color="#bbbbbb", linewidth=0.8)
    axes.set_xlim(0, SIDE)
    axes.set_ylim(SIDE, 0)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_box(axes: Axes, box: Sequence[float], colour: str, words: str = "", *, dashed: bool = False) -> None:
    x0, y0, x1, y1 = box
    style = {"linestyle": (0, (3, 3)), "linewidth": 1.2} if dashed else {"linestyle": "-", "linewidth": 2.2}
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, **style))
    if words:
        axes.text(x1 + 1, y0 + 7, words, color=colour, fontsize=12, weight="bold")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
