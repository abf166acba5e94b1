"""The pictures of `spoken_digits.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from clip_digits_data import DIGITS
from spoken_digits_data import LEVELS, NEW_NOISE, NOISES, Recordings, hear
from spoken_digits_model import SpokenDigits
from spoken_digits_report import Findings, Held
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the palette of Okabe and Ito, which all kinds of colour vision can distinguish.
BLUE, GREEN, RED, GREY = "#0072B2", "#007A59", "#D55E00", "#555555"
STYLES = {"white": (BLUE, "o"), "pink": ("#CC79A7", "D"), "babble": (RED, "s"), "hum": (GREEN, "^")}
FOUND = 5  # items that a query retrieves
FRAME_MS = 10  # milliseconds from one frame of a spectrogram to the next


# What it gets right.


def draw_report(found: Findings, held: Held, path: Path) -> None:
    """Draws confusions, and accuracy by voice and by noise."""
    figure = plt.figure(figsize=(13, 10.2), dpi=100, layout="constrained")
    figure.suptitle("Voices, noise and images that were not in training", fontsize=16, weight="bold")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, right = upper.subplots(1, 2)
    _confusions(left, held.sounds.digits, found.sound_names, "spoken", "named by the images that it is nearest to")
    _confusions(right, held.digits, found.image_names, "handwritten", "named by the sounds that it is nearest to")
    by_voice, by_noise = lower.subplots(1, 2)
    _voices(by_voice, found)
    _noise(by_noise, found)
    _save(figure, path)


def _confusions(axes: Axes, truth: Tensor, names: Tensor, what: str, words: str) -> None:
    counts = torch.zeros(10, 10).index_put_((truth, names), torch.ones(len(truth)), accumulate=True)
    share = counts / counts.sum(1, keepdim=True)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, column in counts.nonzero().tolist():
        colour = "white" if share[row, column] > 0.5 else "black" if row == column else RED
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=10, color=colour)
    accuracy = 100 * float((names == truth).double().mean())
    axes.set_title(f"{len(truth)} {what} digits, {accuracy:.1f} % right", fontsize=12)
    axes.set_xlabel(words, fontsize=11)
    axes.set_ylabel(what, fontsize=11)
    axes.set_xticks(range(10))
    axes.set_yticks(range(10), DIGITS if what == "spoken" else [str(digit) for digit in range(10)])
    axes.set_xticks([x + 0.5 for x in range(9)], minor=True)
    axes.set_yticks([x + 0.5 for x in range(9)], minor=True)
    axes.grid(True, which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _voices(axes: Axes, found: Findings) -> None:
    """Draws a bar for each accent, speaker and speed."""
    place, ticks = 0.0, []
    for field, values in found.by_voice.items():
        for name, share in values.items():
            colour = {"accent": BLUE, "speaker": GREEN, "speed": "#E69F00"}[field]
            axes.barh(place, 100 * share, color=colour, height=0.75)
            axes.text(100 * share + 1, place, f"{100 * share:.0f}", va="center", fontsize=9.5)
            new = " (new)" if name == "en-gb-scotland" else ""
            ticks.append((place, f"{name}{' wpm' if field == 'speed' else new}"))
            place += 1
        place += 0.6
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    axes.set_xlabel("sounds without noise named rightly (%)", fontsize=11)
    axes.set_title("by accent, speaker (all new) and speed", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def _noise(axes: Axes, found: Findings) -> None:
    levels = ["none", *(f"{level} dB" for level in LEVELS)]
    clean = found.noise.clean["accuracy"]
    for kind in (*NOISES, NEW_NOISE):
        values = [clean, *(level["accuracy"] for level in found.noise.corrupted[kind].values())]
        colour, marker = STYLES[kind]
        new = " (not in training)" if kind == NEW_NOISE else ""
        style = "--" if new else "-"
        axes.plot(
            levels, [100 * x for x in values], style, color=colour, marker=marker, label=f"{kind}{new}", linewidth=2
        )
    axes.axhline(10, color=GREY, linewidth=1, linestyle=":")
    axes.text(0, 11, "chance", fontsize=9.5, color=GREY)
    axes.set_ylim(0, 102)
    axes.set_ylabel("sounds named rightly (%)", fontsize=11)
    axes.set_xlabel("signal over noise", fontsize=11)
    axes.set_title("by kind and strength of noise", fontsize=12)
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.legend(frameon=False, fontsize=10, loc="lower left", bbox_to_anchor=(0, 0.1))
    axes.spines[["top", "right"]].set_visible(False)


# What a query finds.


@torch.no_grad()
def draw_retrieval(
    model: SpokenDigits, found: Findings, held: Held, queries: Recordings, titles: Sequence[str], path: Path
) -> None:
    """Draws the images that spoken digits find, and the sounds that images find.

    Args:
        queries: one of each digit, with noise.
        titles: who says it, and the noise.
    """
    gallery = hear(held.sounds)
    to_image = _best(model.encode_sound(queries).features, found.images.features)
    images = [int((held.digits == digit).nonzero()[digit, 0]) for digit in range(10)]  # not always the first
    to_sound = _best(found.images.features[images], found.sounds.features)
    figure, grid = plt.subplots(
        10, 2 * FOUND + 3, figsize=(17, 13.6), dpi=90, width_ratios=(1.7, *[1] * FOUND, 0.45, 1, *[1.25] * FOUND)
    )
    figure.subplots_adjust(left=0.125, right=0.985, top=0.905, bottom=0.025, wspace=0.12, hspace=0.42)
    figure.text(0.02, 0.965, "What a spoken digit finds, and what a handwritten one", fontsize=20, weight="bold")
    words = f"The first {FOUND} of {len(held.digits)} images and of {len(gallery.digits)} sounds, best first; green: "
    words += "right, orange: wrong. No voice and no image was in training. Spectrograms: 80 mel bands."
    figure.text(0.02, 0.942, words, fontsize=12, color=GREY)
    for digit in range(10):
        row = grid[digit]
        _sound(row[0], queries, digit, "black")
        row[0].set_ylabel(f"“{DIGITS[digit]}”\n{titles[digit]}", rotation=0, ha="right", va="center", fontsize=9.5)
        for axes, image in zip(row[1:], to_image[digit].tolist()):
            shown = int(held.digits[image])
            _image(axes, held.pixels[image], shown == digit, "" if shown == digit else f"a {shown}")
        row[FOUND + 1].set_axis_off()
        _image(row[FOUND + 2], held.pixels[images[digit]], None)
        for axes, sound in zip(row[FOUND + 3 :], to_sound[digit].tolist()):
            said, voice = int(gallery.digits[sound]), held.voices[sound % len(held.voices)]
            _sound(axes, gallery, sound, GREEN if said == digit else RED)
            mark = "" if said == digit else f"“{DIGITS[said]}” "
            axes.set_xlabel(f"{mark}{voice.speaker} {voice.accent[3:]}", fontsize=8, labelpad=2)
    for column, words in ((0, "says"), (1, "finds"), (FOUND + 2, "shows"), (FOUND + 3, "finds")):
        grid[0, column].set_title(words, fontsize=12, loc="left")
    _save(figure, path)


def _best(query: Tensor, gallery: Tensor) -> Tensor:
    """Returns the first items that each query finds, int64 [N, FOUND]."""
    return (query @ gallery.mT).topk(FOUND, dim=1).indices


def _sound(axes: Axes, recordings: Recordings, row: int, colour: str) -> None:
    frames = int(recordings.frames[row])
    axes.imshow(recordings.mel[row, :, :frames].numpy(), origin="lower", aspect="auto", cmap="magma")
    _frame(axes, colour)


def _image(axes: Axes, pixels: Tensor, right: bool | None, words: str = "") -> None:
    axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    _frame(axes, "black" if right is None else GREEN if right else RED)
    axes.set_xlabel(words, color=RED, fontsize=9, labelpad=2)


def _frame(axes: Axes, colour: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)


# What the head looks at.


@torch.no_grad()
def draw_match(model: SpokenDigits, found: Findings, held: Held, queries: Recordings, path: Path) -> None:
    """Draws sounds beside a right image and the most similar wrong one, with what the head attends to in each pair."""
    sounds = model.encode_sound(queries)
    score = sounds.features @ found.images.features.mT
    same = queries.digits[:, None] == held.digits
    pairs = [score.masked_fill(hidden, -2.0).argmax(1) for hidden in (~same, same)]
    figure, grid = plt.subplots(5, 8, figsize=(15, 10.6), dpi=100, width_ratios=(1.5, 1, 1.5, 1) * 2)
    figure.subplots_adjust(left=0.025, right=0.985, top=0.87, bottom=0.03, wspace=0.1, hspace=0.42)
    figure.text(0.025, 0.955, "Do they belong together? What the head looks at", fontsize=19, weight="bold")
    words = (
        "Each sound with the most similar right image and the most similar wrong one, and the probability that they "
    )
    words += (
        "are the same digit.\nBlue: the patches that the sound's frames attend to. White line: how much the image's "
    )
    words += "patches attend to each moment."
    figure.text(0.025, 0.905, words, fontsize=11.5, color=GREY)
    for which, chosen in enumerate(pairs):
        images = found.images.part(chosen)
        patches, frames = model.match.looks(sounds, images)
        probability = model.match(sounds, images).sigmoid()
        for digit in range(10):
            row, side = digit % 5, digit // 5
            left, right = grid[row, 4 * side + 2 * which], grid[row, 4 * side + 2 * which + 1]
            correct = bool((probability[digit] > 0.5) == (which == 0))
            _moments(left, queries, digit, frames[digit])
            _patches(right, held.pixels[chosen[digit]], patches[digit])
            right.set_xlabel(f"{100 * float(probability[digit]):.1f} %", fontsize=11, color=GREEN if correct else RED)
            left.set_title(f"“{DIGITS[digit]}”", fontsize=11, loc="left")
            right.set_title(f"a {int(held.digits[chosen[digit]])}", fontsize=11, loc="left")
    _save(figure, path)


def _moments(axes: Axes, recordings: Recordings, row: int, look: Tensor) -> None:
    """Draws a spectrogram, and over it how much each moment is attended to."""
    _sound(axes, recordings, row, "black")
    tokens = -(-int(recordings.frames[row]) // 2)
    bands = recordings.mel.shape[1]
    times = [2 * place + 0.5 for place in range(tokens)]
    axes.plot(times, (look[:tokens] / look.max() * 0.9 * bands).tolist(), color="white", linewidth=1.8)
    axes.set_ylim(-0.5, bands - 0.5)
    axes.set_xlim(-0.5, int(recordings.frames[row]) - 0.5)
    axes.set_xlabel(f"{FRAME_MS * int(recordings.frames[row])} ms", fontsize=9, labelpad=2)


def _patches(axes: Axes, pixels: Tensor, look: Tensor) -> None:
    """Draws an image, and over it how much each patch is attended to."""
    side = pixels.shape[0]
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    strength = (look / look.max()).view(round(look.numel() ** 0.5), -1)
    sky = torch.tensor([0.10, 0.60, 0.95]).expand(*strength.shape, 3)
    axes.imshow(torch.cat([sky, 0.85 * strength[..., None]], 2).numpy(), interpolation="nearest", extent=extent)
    _frame(axes, "black")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
