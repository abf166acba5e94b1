"""Train a small model to find handwritten digits by spoken ones and the reverse, from scratch, in two minutes.

    pip install "mmkernels[examples]"
    python examples/spoken_digits.py

A synthesiser (eSpeak NG) says the ten digits in many voices: accents, speakers, speeds and pitches, with noise. A sound
tower, Whisper's encoder in a small size, and an image tower learn to map a spoken and a handwritten digit to the same
direction (`mmkernels.info_nce`, where all sounds of a digit belong to all its images). Nobody tells the model that
there are ten words or ten shapes: it is told which pairs belong together. A head on top compares one sound with one
image closely: frames attend to patches, and patches to frames, by one matrix of scores (`mmkernels.co_attention`).

The script trains twice from one seed, with the fused kernels and with the naive formulas, and shows that the loss
curves begin alike; they part as rounding errors grow through the weights. The report is about voices, an accent, a kind
of noise and images that were not in training: names without training, recall, confusions, what noise costs, and what
the head looks at. The folder has some of the sounds, to listen to.

    python examples/spoken_digits.py --weights build/spoken_digits/model.safetensors

asks again without training.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021, figure 3;
Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (Whisper), 2022; a head that compares, of
right and wrong pairs: Li et al., "Align before Fuse" (ALBEF), 2021, section 3.2.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import mmkernels

try:
    import espeakng_loader  # noqa: F401, the synthesiser
    import soundfile
    import soxr  # noqa: F401, its sounds are resampled
    from clip_digits_data import load
    from clip_digits_pictures import draw_loss
    from safetensors.torch import load_model, save_model
    from spoken_digits_data import (
        HELD_SPEAKERS,
        LEVELS,
        NEW_NOISE,
        NOISES,
        RATE,
        SPEAKERS,
        Recordings,
        Sounds,
        batches,
        hear,
        held_sounds,
        held_voices,
        record,
        training_sounds,
    )
    from spoken_digits_model import SpokenDigits
    from spoken_digits_pictures import draw_match, draw_report, draw_retrieval
    from spoken_digits_report import Held, investigate, lines, numbers, with_kind
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    package = {"sklearn": "scikit-learn", "espeakng_loader": "espeakng-loader"}.get(package, package)
    if package not in (
        "scikit-learn",
        "matplotlib",
        "safetensors",
        "transformers",
        "soundfile",
        "soxr",
        "espeakng-loader",
    ):
        raise
    print(f'spoken_digits: this needs {package}: pip install "mmkernels[examples]"', file=sys.stderr)
    raise SystemExit(2) from None

LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 4e-3, 0.05, 20
EASY_STEPS = 100  # that the head learns from random wrong pairs alone: until then similarity says little

# The largest relative difference of two loss curves in the first steps, and in all: a few times the distance of
# neighbouring float32 numbers (EPS) at first, then rounding errors feed back through the weights.
EPS = torch.finfo(torch.float32).eps
BOUNDS = ((10, 16 * EPS), (40, 1e-4), (None, 0.5))
SHOWN_KINDS = (None, *NOISES, NEW_NOISE)  # of noise, of the sounds in the pictures
SHOWN_LEVEL = LEVELS[1]


def train(
    pixels: Tensor, digits: Tensor, recordings: Recordings, *, steps: int, batch: int, seed: int, backend: str | None
) -> tuple[SpokenDigits, Tensor, Tensor]:
    """Trains a model on pixels [N, 8, 8] with their digits [N] and on recordings. The same seed gives the same model.

    Args:
        batch: images a step, and sounds.
        backend: of every op: "reference" for the naive formulas, None for the fastest available.

    Returns:
        The model; of each step the contrastive loss and that of the head, float64 [steps, 2]; and the smallest possible
        contrastive loss, float64 [steps]: the entropy of the targets.
    """
    torch.manual_seed(seed)
    model = SpokenDigits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    draw = torch.Generator().manual_seed(seed)
    losses, least = [], []
    with mmkernels.use_backend(backend or ""):
        for number, step in enumerate(batches(pixels, digits, recordings, steps=steps, size=batch, draw=draw)):
            contrastive, compared = model.losses(step, hard=number >= EASY_STEPS)
            optimizer.zero_grad()
            (contrastive + compared).backward()
            optimizer.step()
            schedule.step()
            losses.append([contrastive.item(), compared.item()])
            counts = torch.bincount(step.digits, minlength=10).double()
            least.append(counts[step.digits].log().mean().item())
    return model.eval(), torch.tensor(losses, dtype=torch.float64), torch.tensor(least, dtype=torch.float64)


def check_same(fused: Tensor, naive: Tensor, bounds: Sequence[tuple[int | None, float]] = BOUNDS) -> str:
    """Asserts that two loss curves [steps] are alike within bounds; returns a text with their relative differences."""
    apart = (fused - naive).abs() / naive
    words = []
    for steps, bound in bounds:
        most = apart[:steps].max().item()
        part = "all steps" if steps is None else f"the first {min(steps, len(apart))} steps"
        assert most <= bound, f"the losses of {part} must be within {bound:.1e}, got {most:.1e}"
        words.append(f"{most:.1e} in {part} (bound {bound:.1e})")
    return ", ".join(words)


def learn(pixels: Tensor, digits: Tensor, options: argparse.Namespace) -> SpokenDigits:
    """Makes the sounds, trains twice, compares and draws the losses, and returns the model of the fused kernels."""
    begin = time.perf_counter()
    draw = torch.Generator().manual_seed(options.seed)
    sounds = training_sounds(options.speakers, draw)
    recordings = record(sounds, draw)
    seconds = time.perf_counter() - begin
    print(
        f"{len(sounds.digits):,} sounds (speakers: {options.speakers}), recorded {len(recordings.digits):,} times with "
        f"noise, and {len(pixels):,} images to train on: {seconds:.0f} s",
        flush=True,
    )
    losses = {}
    for name, backend in (("naive", "reference"), ("fused", None)):
        begin = time.perf_counter()
        sizes = {"steps": options.steps, "batch": options.batch, "seed": options.seed}
        model, loss, least = train(pixels, digits, recordings, backend=backend, **sizes)
        seconds = time.perf_counter() - begin
        first, last = (" and ".join(f"{x:.3f}" for x in row) for row in (loss[0], loss[-1]))
        print(
            f"{name}: {len(loss)} steps in {seconds:.0f} s; losses of towers and head {first}, then {last}", flush=True
        )
        losses[name] = loss
    for place, name in enumerate(("towers'", "head's")):
        same = check_same(losses["fused"][:, place], losses["naive"][:, place], BOUNDS[: 3 - place])
        print(f"the {name} losses differ, relatively, by at most {same}")
    save_model(model, str(options.out / "model.safetensors"))
    draw_loss({name: loss[:, 0] for name, loss in losses.items()}, least, list(BOUNDS), EPS, options.out / "loss.png")
    return model


def keep_sounds(held: Held, chosen: Tensor, folder: Path) -> Sounds:
    """Returns sounds `chosen`, int64 [10], with one kind of noise after the other, and writes them to a folder."""
    folder.mkdir(exist_ok=True)
    parts = []
    for place, row in enumerate(chosen):
        kind = SHOWN_KINDS[place % len(SHOWN_KINDS)]
        clean = held.sounds.part(row[None])
        noise = clean if kind is None else with_kind(held.sounds, kind, SHOWN_LEVEL).part(row[None])
        voice = held.voices[int(row) % len(held.voices)]
        name = f"{int(clean.digits)}_{voice.accent}_{voice.speaker}_{voice.speed}_{kind or 'clean'}.wav"
        soundfile.write(folder / name, noise.samples[0, : int(noise.lengths)].numpy(), RATE)
        parts.append(noise)
    return Sounds(*(torch.cat(x) for x in zip(*parts)))


# The command.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images and sounds a step (%(default)s)")
    parser.add_argument("--speakers", type=int, default=len(SPEAKERS), help="in training (%(default)s)")
    parser.add_argument("--held", type=int, default=len(HELD_SPEAKERS), help="speakers held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, voices, noise and order (%(default)s)")
    parser.add_argument("--weights", type=Path, help="of an earlier run, to ask again without training")
    parser.add_argument("--out", type=Path, default=Path("build/spoken_digits"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="more gain little on tensors this small (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps and voices: it shows that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.batch, options.speakers, options.held = 4, 16, 1, 1
    for name, least, most in (
        ("steps", 1, 10**6), ("batch", 8, 1437), ("speakers", 1, len(SPEAKERS)), ("held", 1, len(HELD_SPEAKERS)),
        ("seed", 0, 2**63 - 1), ("threads", 1, 1024),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, got {getattr(options, name)}")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights must be a file that an earlier run wrote, got {str(options.weights)!r}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "retrieval.png").touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pixels, digits, held_pixels, held_digits = load(1797)
    size = sum(parameter.numel() for parameter in SpokenDigits().parameters())
    print(f"two towers and a head, {size:,} parameters together, {options.batch} sounds and images a step")
    if options.weights is None:
        model = learn(pixels, digits, options)
    else:
        model = SpokenDigits().eval()
        load_model(model, str(options.weights))
    voices = held_voices(options.held)
    held = Held(held_sounds(voices), voices, held_pixels, held_digits)
    found = investigate(model, held)
    print("\n".join(lines(found, held)))
    (options.out / "figures.json").write_text(json.dumps(numbers(found, held), indent=1))

    chosen = torch.arange(10) * len(voices) + torch.arange(10) * 7 % len(voices)  # each digit, by different voices
    queries = keep_sounds(held, chosen, options.out / "sounds")
    said_by = [voices[int(row) % len(voices)] for row in chosen]
    kinds = [SHOWN_KINDS[place % len(SHOWN_KINDS)] for place in range(10)]
    titles = [
        f"{voice.speaker}, {voice.accent},\n{voice.speed} wpm, "
        + (f"{kind} at {SHOWN_LEVEL} dB" if kind else "no noise")
        for voice, kind in zip(said_by, kinds)
    ]
    draw_report(found, held, options.out / "report.png")
    draw_retrieval(model, found, held, hear(queries), titles, options.out / "retrieval.png")
    draw_match(model, found, held, hear(queries), options.out / "match.png")
    pictures = ("loss.png, " if options.weights is None else "") + "report.png, retrieval.png, match.png"
    print(f"in {options.out}: model.safetensors, figures.json, {pictures}, and sounds")


if __name__ == "__main__":
    main()
