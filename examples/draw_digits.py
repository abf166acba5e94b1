"""Train a small Janus on real handwritten digits, from scratch: it reads them, and draws what it is told to.

    pip install "mmkernels[models,examples]"
    python examples/draw_digits.py

One language model does both. To read, it gets an image as the tokens of a vision encoder, and names the digit. To draw,
it gets "draw a seven" and writes the 16 tokens of an image, one after the other, which a decoder turns into pixels. The
decoder is trained first, with an encoder and a codebook that make tokens of the training images. Janus then learns to
write these tokens, and its loss builds no logits (`mmkernels.linear_cross_entropy`).

One prompt in ten says nothing in training. So the model also knows what images are like in general, and guidance can
exaggerate what a prompt adds to that: the script draws each digit with several guidance scales, and a classifier that
was trained on real images says how many drawings are what was asked for. It also measures what guidance costs: drawings
of one digit become alike.

    python examples/draw_digits.py --weights build/draw_digits/model.safetensors

draws again without training.

Source: Wu et al., "Janus: Decoupling Visual Encoding for Unified Multimodal Understanding and Generation", 2024; Ho and
Salimans, "Classifier-Free Diffusion Guidance", 2022.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.models import Janus

try:
    from clip_digits_data import load
    from draw_digits_pictures import draw_curves, draw_drawings
    from draw_digits_training import (
        CODES,
        TOKENS,
        draw_images,
        make_model,
        read_images,
        to_images,
        train,
        train_tokenizer,
    )
    from safetensors import SafetensorError
    from safetensors.torch import load_model, save_model
    from sklearn.svm import SVC
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("sklearn", "matplotlib", "safetensors"):
        raise
    print(f'draw_digits: this needs {missing}: pip install "mmkernels[models,examples]"', file=sys.stderr)
    raise SystemExit(2) from None

SCALES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)
SHOWN = (0.0, 1.0, 3.0, 5.0)  # of the scales, in the picture
SHARPNESS = 0.256  # of the classifier: scikit-learn's example for these images, 0.001 for pixels from 0 to 16


class Drawings(NamedTuple):
    """Drawings of each digit with one guidance scale.

    Attributes:
        scale: the guidance scale.
        pixels: [10, n, 8, 8] from 0 to 1.
        recognised: the share that the classifier takes for what was asked for.
        read: the share that the model itself does.
        spread: how much drawings of one digit differ, relative to how much real images of one do.
    """

    scale: float
    pixels: Tensor
    recognised: float
    read: float
    spread: float


class Judge:
    """A classifier of pixels [N, 8, 8] from 0 to 1, trained on real images."""

    def __init__(self, pixels: Tensor, digits: Tensor) -> None:
        self.classifier = SVC(gamma=SHARPNESS).fit(pixels.flatten(1).numpy(), digits.numpy())

    def share(self, pixels: Tensor, digits: Tensor) -> float:
        """Returns the share of images that it takes for digits int64 [N]."""
        return right(torch.from_numpy(self.classifier.predict(pixels.flatten(1).numpy())), digits)


def right(found: Tensor, truth: Tensor) -> float:
    return (found == truth).double().mean().item()


def spread(pixels: Tensor) -> float:
    """Returns the mean distance of two different images of one digit, of images [n, 8, 8] of it."""
    count = len(pixels)
    return torch.pdist(pixels.flatten(1)).mean().item() if count > 1 else 0.0


def draw_all(model: Janus, judge: Judge, real_spread: float, *, each: int, seed: int) -> list[Drawings]:
    """Draws every digit so many times with every guidance scale, and judges the drawings."""
    asked, found = torch.arange(10).repeat_interleave(each), []
    for scale in SCALES:
        pixels = draw_images(model, asked, scale, seed)
        by_digit = pixels.unflatten(0, (10, each))
        found.append(
            Drawings(
                scale,
                by_digit,
                judge.share(pixels, asked),
                right(read_images(model, pixels), asked),
                sum(map(spread, by_digit)) / 10 / real_spread,
            )
        )
    return found


@torch.no_grad()
def restored(model: Janus, pixels: Tensor) -> Tensor:
    """Returns images [N, 8, 8] as the decoder makes them of their tokens."""
    return (model.decode(model.encode_tokens(to_images(pixels)))[:, 0] + 1).div(2).clamp(0, 1)


def learn(model: Janus, pixels: Tensor, digits: Tensor, options: argparse.Namespace) -> dict[str, list[float]]:
    """Trains a model; returns the losses of each step."""
    begin = time.perf_counter()
    errors = train_tokenizer(model, pixels, steps=options.tokenizer_steps, batch=options.batch, seed=options.seed)
    used = len(model.encode_tokens(to_images(pixels)).unique())
    seconds = time.perf_counter() - begin
    print(f"tokenizer: {len(errors)} steps in {seconds:.0f} s, {used} of {CODES} codes in use", flush=True)
    begin = time.perf_counter()
    drawing, reading = train(model, pixels, digits, steps=options.steps, batch=options.batch, seed=options.seed)
    seconds = time.perf_counter() - begin
    print(f"Janus: {len(drawing)} steps in {seconds:.0f} s, {losses_of('an image token', drawing)}, "
          f"{losses_of('a name', reading)}", flush=True)  # fmt: skip
    save_model(model, str(options.out / "model.safetensors"))
    return {"tokenizer": errors, "drawing": drawing, "reading": reading}


def losses_of(what: str, losses: list[float]) -> str:
    return f"loss of {what} {losses[0]:.2f} to {losses[-1]:.2f}"


# The command.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokenizer-steps", type=int, default=500, help="of its training (%(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="of Janus' training (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a step (%(default)s)")
    parser.add_argument("--each", type=int, default=50, help="drawings of each digit and scale (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and drawings (%(default)s)")
    parser.add_argument("--weights", type=Path, help="of an earlier run, to draw again without training")
    parser.add_argument("--out", type=Path, default=Path("build/draw_digits"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps: it shows that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokenizer_steps, options.steps, options.batch, options.each = 3, 3, 8, 4
    for name, least, most in (
        ("tokenizer_steps", 1, 10**6), ("steps", 1, 10**6), ("batch", 2, 1437), ("each", 4, 10_000),
        ("seed", 0, 2**63 - 1), ("threads", 1, 1024),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be {least} to {most}, got {getattr(options, name)}")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights must be a file that an earlier run wrote, got {str(options.weights)!r}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "drawings.png").touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pixels, digits, held_pixels, held_digits = load(1797)
    model = make_model(options.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"a model of {size:,} parameters, images of {TOKENS} tokens; {len(pixels):,} digits in training, "
          f"{len(held_pixels)} held out", flush=True)  # fmt: skip
    losses = None
    if options.weights is None:
        losses = learn(model, pixels, digits, options)
    else:
        try:
            load_model(model, str(options.weights))
        except (RuntimeError, SafetensorError) as error:
            sys.exit(f"--weights must be a file that an earlier run wrote: {error}")
    model.eval()
    judge = Judge(pixels, digits)
    again = restored(model, held_pixels)
    real = {
        "real": judge.share(held_pixels, held_digits),
        "restored": judge.share(again, held_digits),
        "read": right(read_images(model, held_pixels), held_digits),
        "error": (again - held_pixels).square().mean().sqrt().item(),
    }
    print(f"held-out images: Janus reads {percent(real['read'])}, the classifier {percent(real['real'])};")
    print(f"  restored from tokens {percent(real['restored'])} (error of a pixel {real['error']:.3f})", flush=True)
    of_digit = [held_pixels[held_digits == digit] for digit in range(10)]
    drawn = draw_all(model, judge, sum(map(spread, of_digit)) / 10, each=options.each, seed=options.seed)
    print(f"{10 * options.each} drawings with each guidance scale:")
    print("  scale   recognised   read by Janus   differ, relative to real images of a digit")
    for found in drawn:
        print(
            f"  {found.scale:5.1f}     {percent(found.recognised)}       {percent(found.read)}       {found.spread:.2f}"
        )
    numbers = [{name: x for name, x in found._asdict().items() if name != "pixels"} for found in drawn]
    (options.out / "figures.json").write_text(json.dumps({"held out": real, "drawings": numbers}, indent=1))
    shown = [found for found in drawn if found.scale in SHOWN]
    few = torch.stack([images[:4] for images in of_digit])
    draw_drawings(few, restored(model, few.flatten(0, 1)).view_as(few), real, shown, options.out / "drawings.png")
    draw_curves(losses, drawn, real, options.out / "curves.png")
    print(f"in {options.out}: model.safetensors, figures.json, drawings.png, curves.png")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".rjust(7)


if __name__ == "__main__":
    main()
