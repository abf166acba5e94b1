"""The pictures of `grpo_digits.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_digits_data import WORDS, read
from grpo_digits_rewards import judge
from grpo_digits_training import Run
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from read_digits_answers import wanted
from read_digits_data import KINDS, SIDE, Scenes, spell
from read_digits_pictures import BLUE, GREEN, GREY, RED, draw_box, draw_scene, save, smooth, steps_of
from torch import Tensor

# From the palette of Okabe and Ito, which all kinds of colour vision can distinguish.
STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"))
PANELS = (
    ("format", "format: answers that are JSON", 100.0, "%"),
    ("correctness", "correctness: right digits and refusals", 100.0, "%"),
    ("grounding", "grounding: IoU of the box, 0 without one", 1.0, "mean"),
    ("area", "area of the box over the right one's", 1.0, "mean"),
    ("invented", "invented: a box for what is not there", 100.0, "%"),
)
WHERE, ABSENT = 2, 3  # the kinds of questions that the picture of answers shows


def draw_ablation(runs: dict[str, Run], path: Path) -> None:
    """Draws what becomes of each term on held-out scenes, a line for each run, and the runs' rewards."""
    figure, grid = plt.subplots(2, 3, figsize=(14, 7.6), dpi=100, layout="constrained")
    figure.suptitle("GRPO without one term of the reward each, on held-out scenes", fontsize=16, weight="bold")
    for axes, (name, title, scale, unit) in zip(grid.flat, PANELS):
        for (label, run), (colour, marker) in zip(runs.items(), STYLES):
            values = [scale * getattr(found, name) for found in run.rates.values()]
            axes.plot(list(run.rates), values, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
        axes.set_title(title, fontsize=12)
        axes.set_ylabel(unit)
        if name == "area":
            axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    for (label, run), (colour, _) in zip(runs.items(), STYLES):
        grid[1, 2].plot(steps_of(run.rewards), smooth(run.rewards), color=colour, linewidth=1.8, label=label)
    grid[1, 2].set_title("each run's own reward, in training", fontsize=12)
    grid[1, 2].set_ylabel("mean of 25 steps")
    grid[0, 0].legend(frameon=False, fontsize=10)
    _finish(grid.flat)
    save(figure, path)


def draw_curves(curves: dict[str, list[list[float]]], runs: dict[str, Run], path: Path) -> None:
    """Draws the curves of all stages, by fused kernels and by naive formulas.

    Args:
        curves: of each stage the losses, of the third the surprise, and those of the naive formulas in the first steps.
        runs: those of the third stage, of which the first is drawn.
    """
    figure, grid = plt.subplots(2, 3, figsize=(14, 7.4), dpi=100, layout="constrained", height_ratios=(3, 2))
    figure.suptitle("Three stages; fused kernels and naive formulas from one seed", fontsize=16, weight="bold")
    for above, below, (name, (fused, naive)) in zip(grid[0], grid[1], curves.items()):
        above.plot(steps_of(fused), fused, color=BLUE, linewidth=0.8, alpha=0.35)
        above.plot(steps_of(fused), smooth(fused), color=BLUE, linewidth=2, label="mean of 25 steps")
        above.set_title(name, fontsize=12)
        above.set_ylabel("loss" if below is not grid[1, 2] else "-log p of sampled tokens, mean")
        above.legend(frameon=False)
        below.plot(steps_of(naive), fused[: len(naive)], color=BLUE, linewidth=5, alpha=0.4, label="fused")
        below.plot(steps_of(naive), naive, color="black", linewidth=1.2, label="naive")
        below.set_title(f"the first {len(naive)} steps", fontsize=11)
        below.legend(frameon=False)
    for axes in grid[0, :2]:
        axes.set_yscale("log")
    _finish(grid.flat)
    save(figure, path)


def _finish(grid: Sequence[Axes]) -> None:
    for axes in grid:
        axes.set_xlabel("step")
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def draw_replies(scenes: Scenes, answers: dict[str, Tensor], path: Path) -> None:
    """Draws scenes with each model's answers to two questions: where a digit is, and where an absent digit is.

    Args:
        scenes: N scenes.
        answers: of each model the answers, tokens int64 [N, KINDS, L].
    """
    questions = [(scene, kind) for scene in range(len(scenes.shown)) for kind in (WHERE, ABSENT)]
    rows, columns = len(answers), len(questions)
    figure, grid = plt.subplots(rows, columns, figsize=(2.9 * columns, 3.05 * rows + 1), dpi=80, squeeze=False)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.04, top=0.91, hspace=0.28, wspace=0.12)
    figure.text(0.05, 0.965, "What each reward teaches", fontsize=19, weight="bold")
    note = "green: right (box: IoU of 0.5), orange: wrong. Dashed: the true box. The most likely answers."
    figure.text(0.05, 0.943, note, fontsize=11, color=GREY)
    for row, (name, tokens) in enumerate(answers.items()):
        texts = spell(tokens.flatten(0, 1), WORDS)
        found = judge(texts, *wanted(scenes))
        right = (found.correctness > 0) & (~found.there | (found.grounding >= 0.5))
        grid[row, 0].set_ylabel(name, fontsize=13, weight="bold")
        for axes, (scene, kind) in zip(grid[row], questions):
            place, region = scene * len(KINDS) + kind, int(scenes.regions[scene, kind])
            colour, said = GREEN if right[place] else RED, read(texts[place])
            draw_scene(axes, scenes.pixels[scene, 0], None)
            if region >= 0:
                draw_box(axes, scenes.boxes[scene, region].tolist(), "black", dashed=True)
            if said is not None and "box" in said:
                box = [min(x, SIDE) for x in said["box"]]
                draw_box(axes, box, colour)
            if row == 0:
                axes.set_title(spell(scenes.questions[scene, kind][None])[0], fontsize=12)
            axes.set_xlabel(texts[place], fontsize=8, color=colour, family="monospace")
    save(figure, path)
