"""Train a small Qwen-VL on scenes of real handwritten digits, then measure what fewer visual tokens cost it.

    pip install "mmkernels[models,examples]"
    python examples/tradeoff_digits.py

A scene is a board of 3 x 3 squares with three to six digits, each in a corner of its square: an image of 36 visual
tokens. The model answers questions about it: which digit is at a square, how many digits there are, how many there are
of one kind, which is the largest. It is trained once, from scratch, with all tokens; then each reducer leaves fewer of
them, and the same questions are asked about scenes of digits that were not in training. The picture is the trade-off
curve that you would want for your own model: accuracy against visual tokens kept.

    python examples/tradeoff_digits.py --weights build/tradeoff_digits/model.safetensors

asks again without training. `model.encode` encodes a scene once, one call fills the KV cache with it, and each question
starts from a fork of that cache, as in a conversation: no question encodes anything.

Source: Bai et al., "Qwen3-VL Technical Report", 2025; the reducers: docs/guide/visual-tokens.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.models import QwenVL

try:
    from clip_digits_data import load
    from safetensors.torch import load_model, save_model
    from tradeoff_digits_data import (
        GRID,
        IMAGE,
        KINDS,
        MERGE,
        PATCH,
        TOKENS,
        VIDEO,
        WORDS,
        Scenes,
        chance,
        draw_scenes,
        lessons,
        patches,
        prompt,
    )
    from tradeoff_digits_pictures import draw_curve, draw_kept
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("sklearn", "matplotlib", "safetensors"):
        raise
    print(f'tradeoff_digits: this needs {missing}: pip install "mmkernels[models,examples]"', file=sys.stderr)
    raise SystemExit(2) from None

LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.05, 50
GAIN = 4.0  # of embeddings of positions and words over `from_size`'s
ASKED_AT_ONCE = 50  # scenes of a batch in evaluation
CURVE = (24, 18, 12, 9, 6, 4, 2)  # tokens that reducers leave, of 36
REDUCERS = (
    "none", "pool:2", "pool:3",
    *(f"{kind}:{keep}" for kind in ("tome", "select", "diverse") for keep in CURVE),
)  # fmt: skip
SHOWN = ("none", "select:9", "diverse:9", "select:4")


def make_model(seed: int) -> QwenVL:
    """Returns a Qwen3-VL of small sizes with random weights."""
    model = QwenVL.from_size(
        "tiny_qwen3", seed=seed,
        vision_width=64, vision_layers=2, vision_heads=4, vision_mlp=128, position_side=GRID[1], deep_layers=(0, 1),
        patch_size=PATCH, patch_frames=1, channels=1, merge=MERGE,
        text_width=64, text_layers=3, text_heads=4, text_kv_heads=2, text_head_dim=16, text_mlp=128, text_length=256,
        vocab_size=len(WORDS), image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    with torch.no_grad():  # as large as the patches' features: places are learned as soon as shapes
        model.vision.positions.weight.mul_(GAIN)
        model.decoder.embed.weight.mul_(GAIN)
    return model


# Training.


def train(model: QwenVL, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int) -> list[float]:
    """Trains a model on new scenes in each step, of pixels [M, 8, 8] and their digits [M]; returns the losses."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    losses: list[float] = []
    begin = time.perf_counter()
    model.train()
    for step in range(steps):
        scenes = draw_scenes(pixels, digits, batch, draw)
        text, labels = lessons(scenes)
        loss = model(text, patches(scenes.pixels), image_grid_thw=[GRID] * batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            recent = losses[-100:]
            seconds = time.perf_counter() - begin
            print(f"  step {step + 1}: loss {sum(recent) / len(recent):.3f}, {seconds:.0f} s", flush=True)
    model.eval()
    return losses


# Evaluation.


class Point(NamedTuple):
    """What one reducer costs.

    Attributes:
        reducer: its name.
        tokens: that are left of a scene.
        accuracy: the share of questions that are answered correctly.
        of_kind: the same of each kind of question, in the order of `KINDS`.
    """

    reducer: str
    tokens: int
    accuracy: float
    of_kind: tuple[float, ...]


@torch.no_grad()
def ask(model: QwenVL, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Returns the answers int64 [N, QUESTIONS], each question asked alone, and the scenes' tokens int64 [N, kept].

    A token's number is that of its place on the board, row by row.
    """
    count = len(scenes.pixels)
    image = model.encode(patches(scenes.pixels), [GRID] * count)
    cache = model(prompt(count), images=image).kv_cache  # the only time that the scenes are read
    answers = [
        model(question, kv_cache=cache.fork(), last_logits_only=True).logits[:, 0].argmax(-1)
        for question in scenes.questions.unbind(1)
    ]
    places = image.places[:, 1] * (GRID[2] // MERGE) + image.places[:, 2]
    return torch.stack(answers, dim=1), places.view(count, -1)


def measure(model: QwenVL, scenes: Scenes, reducer: str) -> Point:
    """Returns how many questions the model answers correctly with a reducer."""
    model.set_reducer(reducer)
    found = [ask(model, scenes.part(slice(i, i + ASKED_AT_ONCE))) for i in range(0, len(scenes.pixels), ASKED_AT_ONCE)]
    right = torch.cat([answers for answers, _ in found]) == scenes.answers
    of_kind = tuple(right[scenes.kinds == kind].double().mean().item() for kind in range(len(KINDS)))
    return Point(reducer, found[0][1].shape[1], right.double().mean().item(), of_kind)


def curve(model: QwenVL, scenes: Scenes, reducers: tuple[str, ...]) -> list[Point]:
    """Measures each reducer, and prints a line for it."""
    print(f"{'reducer':>12}  tokens  all questions  " + "  ".join(KINDS))
    points = []
    for reducer in reducers:
        point = measure(model, scenes, reducer)
        cells = "  ".join(percent(share).rjust(len(kind)) for share, kind in zip(point.of_kind, KINDS, strict=True))
        print(f"{reducer:>12}  {point.tokens:>6}  {percent(point.accuracy):>13}  {cells}", flush=True)
        points.append(point)
    return points


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# The command.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="scenes a step (%(default)s)")
    parser.add_argument("--scenes", type=int, default=300, help="scenes to ask about, of digits held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (%(default)s)")
    parser.add_argument("--weights", type=Path, help="of an earlier run, to ask again without training")
    parser.add_argument("--out", type=Path, default=Path("build/tradeoff_digits"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps and scenes: it shows that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.batch, options.scenes = 6, 8, 12
    for name, least, most in (
        ("steps", 1, 10**6), ("batch", 1, 4096), ("scenes", 4, 10**5), ("seed", 0, 2**63 - 1), ("threads", 1, 1024),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, got {getattr(options, name)}")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights must be a file that an earlier run wrote, got {str(options.weights)!r}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "curve.png").touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pixels, digits, held_pixels, held_digits = load(1797)
    scenes = draw_scenes(held_pixels, held_digits, options.scenes, torch.Generator().manual_seed(1), vary=False)
    model = make_model(options.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"a model of {size:,} parameters; scenes of {TOKENS} visual tokens, {len(pixels):,} digits in training")
    if options.weights is None:
        train(model, pixels, digits, steps=options.steps, batch=options.batch, seed=options.seed)
        save_model(model, str(options.out / "model.safetensors"))
    else:
        load_model(model.eval(), str(options.weights))

    print(f"{scenes.answers.numel():,} questions about {options.scenes} scenes of {len(held_digits)} digits held out")
    points = curve(model, scenes, REDUCERS)
    blind = measure(model, scenes._replace(pixels=scenes.pixels.roll(1, dims=0)), "none").accuracy
    least = chance(scenes)
    print(f"the most frequent answers: {percent(least)}; asked about one scene and shown another: {percent(blind)}")
    (options.out / "curve.json").write_text(
        json.dumps({"chance": least, "blind": blind, "points": [point._asdict() for point in points]}, indent=1)
    )
    draw_curve(points, least, blind, options.out / "curve.png")
    few = scenes.part(slice(0, 3))
    seen = []
    for reducer in SHOWN:
        model.set_reducer(reducer)
        seen.append((reducer, *ask(model, few)))
    draw_kept(few, seen, options.out / "kept.png")
    print(f"pictures: {options.out / 'curve.png'}, {options.out / 'kept.png'}; numbers: {options.out / 'curve.json'}")


if __name__ == "__main__":
    main()
