"""Train a small BLIP-2 to read scenes of real handwritten digits: understand, answer, show evidence.

    pip install "mmkernels[models,examples,evaluation]"
    python examples/read_digits.py

A scene has two to four digits on a board of 3 x 3 regions. A question asks which digit is in a region, or where a digit
is, and its answer can be checked: JSON with a digit and its box, or that it is absent. The model, an image encoder, a
Q-Former and an OPT of small sizes, learns from scratch in three stages and about three minutes:

1. see: every patch and every query says which digit it sees, and every query where. This stands for the pre-trained
   encoder and the first stage of a large BLIP-2, and then both are frozen;
2. answer: the projection and the language model learn from questions with their answers, and from descriptions. It ends
   early, so that the third stage has something to do;
3. be rewarded (GRPO): the model answers each question several times, a verifier rewards each answer by its form, digit,
   box or refusal, and answers that earned more than others to the same question become more likely.

The report is about scenes of digits that were not in training, before and after the third stage, and when the images
are blurred, cropped or full of JPEG's noise. A crop moves and enlarges digits, which otherwise lie exactly on patches
of the encoder: the model never saw that, and most of its answers are wrong then. A description names digits with the
box that it saw each in, so all its claims can be checked too. The pictures: the curves of training, where fused kernels
and naive formulas give the same losses from one seed; and answered scenes, with boxes and with the part of the image
that an answer came from.

    python examples/read_digits.py --weights build/read_digits/model.safetensors

asks again without training.

Source: Li et al., "BLIP-2", 2023; Shao et al., "DeepSeekMath", 2024, section 4.1 (GRPO).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mmkernels.models import BLIP2

try:
    import jsonschema  # noqa: F401, the verifier needs it
    from read_digits_answers import LABELS, SEVERITY, Figures, ask, figures, robustness
    from read_digits_data import KINDS, Scenes, draw_scenes, load
    from read_digits_evidence import evidence
    from read_digits_pictures import draw_answers, draw_curves
    from read_digits_training import BOUND, QUERIES, answer, check_same, improve, make_model, see
    from safetensors.torch import load_model, save_model
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("sklearn", "matplotlib", "safetensors", "jsonschema"):
        raise
    print(f'read_digits: this needs {missing}: pip install "mmkernels[models,examples,evaluation]"', file=sys.stderr)
    raise SystemExit(2) from None

COMPARED = 30  # steps of each supervised stage that the naive formulas take too


def learn(model: BLIP2, pixels: Tensor, digits: Tensor, held: Scenes, options: argparse.Namespace) -> Figures:
    """Trains all three stages, draws their curves, and returns the figures before the third."""
    losses, naive = {}, {}
    begin = time.perf_counter()
    for name, stage, steps, batch in (
        ("1: see", see, options.seeing, 2 * options.batch),
        ("2: answer", answer, options.answering, options.batch),
    ):
        print(f"stage {name}", flush=True)
        again = copy.deepcopy(model)
        sizes = {"steps": steps, "batch": batch, "seed": options.seed}
        losses[name] = stage(model, pixels, digits, **sizes)
        naive[name] = stage(again, pixels, digits, last=COMPARED, backend="reference", **sizes)
        same = check_same(losses[name], naive[name])
        print(f"  fused and naive, the first {len(naive[name])} steps: losses differ, relatively, by at most {same}")
    before = figures(held, ask(model.eval(), held))
    print("stage 3: be rewarded", flush=True)
    rewards = improve(model, pixels, digits, steps=options.rewarded, batch=options.batch // 2, seed=options.seed)
    save_model(model, str(options.out / "model.safetensors"))
    print(f"trained in {time.perf_counter() - begin:.0f} s, {COMPARED} naive steps a stage and one report included")
    draw_curves(losses, naive, rewards, BOUND, options.out / "curves.png")
    return before


def table(columns: dict[str, Figures]) -> str:
    """Returns figures of each column as a table."""
    lines = [" " * 22 + "  ".join(name.rjust(13) for name in columns)]
    for label, *values in zip(LABELS, *columns.values()):
        lines.append(f"{label:>20}  " + "  ".join(percent(value) for value in values))
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".rjust(13)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeing", type=int, default=1200, help="steps of the first stage (%(default)s)")
    parser.add_argument("--answering", type=int, default=450, help="steps of the second stage (%(default)s)")
    parser.add_argument("--rewarded", type=int, default=900, help="steps of the third stage (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="scenes a step of the second stage (%(default)s)")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes of digits held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (%(default)s)")
    parser.add_argument("--weights", type=Path, help="of an earlier run, to ask again without training")
    parser.add_argument("--out", type=Path, default=Path("build/read_digits"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps and scenes: it shows that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeing, options.answering, options.rewarded, options.batch, options.scenes = 4, 4, 2, 8, 8
    for name, least, most in (
        ("seeing", 1, 10**6), ("answering", 1, 10**6), ("rewarded", 1, 10**6), ("batch", 2, 4096), ("scenes", 4, 10**5),
        ("seed", 0, 2**31), ("threads", 1, 1024),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, got {getattr(options, name)}")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights must be a file that an earlier run wrote, got {str(options.weights)!r}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "answers.png").touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pixels, digits, held_pixels, held_digits = load()
    held = draw_scenes(held_pixels, held_digits, options.scenes, torch.Generator().manual_seed(1), vary=False)
    model = make_model(options.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"a BLIP-2 of {size:,} parameters, {QUERIES} visual tokens a scene; {len(pixels):,} digits in training")
    columns: dict[str, Figures] = {}
    if options.weights is None:
        columns["before GRPO"] = learn(model, pixels, digits, held, options)
    else:
        load_model(model, str(options.weights))
    model.eval()
    found = robustness(model, held)
    columns["after GRPO" if options.weights is None else "clean"] = Figures(**found.clean)
    columns |= {name: Figures(**levels[SEVERITY]) for name, levels in found.corrupted.items()}
    print(
        f"{options.scenes} scenes of {len(held_digits)} digits held out, {len(KINDS)} questions and a description each"
    )
    print(table(columns))
    numbers = {name: column._asdict() for name, column in columns.items()} | {"mean drop": found.mean_drop}
    finite = {name: {key: x if math.isfinite(x) else None for key, x in row.items()} for name, row in numbers.items()}
    (options.out / "figures.json").write_text(json.dumps(finite, indent=1))
    few = held.part(slice(0, 4))
    asked = ask(model, few)
    draw_answers(few, asked, evidence(model, few, asked.answers), options.out / "answers.png")
    print(f"in {options.out}: model.safetensors, figures.json, curves.png, answers.png")


if __name__ == "__main__":
    main()
