"""GRPO with verifiable rewards on a small DeepSeek-VL, and what each term of the reward is good for.

    pip install "mmkernels[models,examples,evaluation]"
    python examples/grpo_digits.py

The scenes and questions are those of `read_digits.py`: which digit is in a region, where is a digit, and half of the
time it is not there. The model, SigLIP, an MLP and a Llama of small sizes, learns from scratch in about three minutes:

1. see: every visual token says which digit it is a part of, and where. This stands for the pre-trained encoder of a
   large DeepSeek-VL, and it is frozen then;
2. answer: the language model learns from questions with their answers, half of them in JSON with a digit and its box,
   half in prose. It ends early, as one that could still learn from its own answers;
3. be rewarded (GRPO): the model answers each question several times, a verifier rewards each answer by its format,
   correctness and grounding, and answers that earned more than others to the same question become more likely.

`grpo_digits_rewards.py` has the whole design of the reward. The third stage is run several times from the same weights
and with the same scenes: with all terms, without one term each, and with a grounding term that can be exploited. What
becomes of each term, on scenes of digits that were not in training, is drawn over the steps. Each run is one seed:
another one moves the curves by some per cent.

Fused kernels and naive formulas give the same curves from one seed; in the third stage the naive formulas are given the
answers that the fused run sampled, as one rounded probability can draw another token.

Source: Lu et al., "DeepSeek-VL", 2024; Shao et al., "DeepSeekMath", 2024, section 4.1 (GRPO).
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

from mmkernels.models import DeepSeekVL

try:
    import jsonschema  # noqa: F401, the verifier needs it
    from grpo_digits_pictures import draw_ablation, draw_curves, draw_replies
    from grpo_digits_rewards import ABLATION
    from grpo_digits_training import Rates, Run, answer, improve, make_model, rates, replies, see
    from read_digits_data import KINDS, Scenes, draw_scenes, load
    from read_digits_training import check_same
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("sklearn", "matplotlib", "jsonschema"):
        raise
    print(f'grpo_digits: this needs {missing}: pip install "mmkernels[models,examples,evaluation]"', file=sys.stderr)
    raise SystemExit(2) from None

COMPARED = 20  # steps of each stage that the naive formulas take too
MEASURED = 10  # how often a run of the third stage is measured on held-out scenes
SHOWN = 3  # scenes of the picture of answers


def learn(
    model: DeepSeekVL, pixels: Tensor, digits: Tensor, options: argparse.Namespace
) -> dict[str, list[list[float]]]:
    """Trains the first two stages; returns for each the losses, and those of the naive formulas."""
    curves = {}
    for name, stage, steps in (("1: see", see, options.seeing), ("2: answer", answer, options.answering)):
        print(f"stage {name}", flush=True)
        again = copy.deepcopy(model)
        sizes = {"steps": steps, "batch": options.batch, "seed": options.seed}
        fused = stage(model, pixels, digits, **sizes)
        naive = stage(again, pixels, digits, last=COMPARED, backend="reference", **sizes)
        curves[name] = [fused, naive]
        tell_same(fused, naive)
    return curves


def tell_same(fused: list[float], naive: list[float]) -> None:
    same = check_same(fused, naive)
    print(f"  fused and naive, the first {len(naive)} steps: curves differ, relatively, by at most {same}")


def ablate(
    model: DeepSeekVL, pixels: Tensor, digits: Tensor, held: Scenes, options: argparse.Namespace
) -> tuple[dict[str, Run], dict[str, DeepSeekVL], list[list[float]]]:
    """Runs the third stage from one start with each reward of the ablation.

    Returns:
        the runs, the trained models, and the surprise of the first run with that by the naive formulas.
    """
    runs: dict[str, Run] = {}
    models: dict[str, DeepSeekVL] = {}
    curve: list[list[float]] = []
    every = max(1, options.rewarded // MEASURED)
    sizes = {"steps": options.rewarded, "batch": max(1, options.batch // 4), "seed": options.seed}
    for name, weights in ABLATION.items():
        print(f"stage 3: be rewarded, {name}", flush=True)
        models[name] = copy.deepcopy(model)
        runs[name] = improve(
            models[name], pixels, digits, held, weights, every=every, kept=0 if runs else COMPARED, **sizes
        )
        if not curve:
            again, first = copy.deepcopy(model), runs[name]
            naive = improve(again, pixels, digits, None, weights, replayed=first.answers, backend="reference", **sizes)
            curve = [first.surprise, naive.surprise]
            tell_same(*curve)
    return runs, models, curve


def table(columns: dict[str, Rates]) -> str:
    """Returns rates, a line for each column of the table's header."""
    heads = ("JSON", "correct", "IoU", "box area", "invented")
    lines = [" " * 18 + "".join(head.rjust(11) for head in heads)]
    for name, found in columns.items():
        cells = [f"{100 * found.format:.1f} %", f"{100 * found.correctness:.1f} %", f"{found.grounding:.3f}"]
        cells += [f"{found.area:.2f}", f"{100 * found.invented:.1f} %"]
        lines.append(name.rjust(18) + "".join(cell.rjust(11) for cell in cells))
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeing", type=int, default=500, help="steps of the first stage (%(default)s)")
    parser.add_argument("--answering", type=int, default=1000, help="steps of the second stage (%(default)s)")
    parser.add_argument("--rewarded", type=int, default=80, help="steps of each run of the third stage (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="scenes a step of the first two stages (%(default)s)")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of digits held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/grpo_digits"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps and scenes: it shows that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeing, options.answering, options.rewarded, options.batch, options.scenes = 3, 3, 2, 8, 4
    for name, least, most in (
        ("seeing", 1, 10**6), ("answering", 1, 10**6), ("rewarded", 1, 10**6), ("batch", 2, 4096),
        ("scenes", SHOWN, 10**5), ("seed", 0, 2**31), ("threads", 1, 1024),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, got {getattr(options, name)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ablation.png").touch()
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
    print(f"a DeepSeek-VL of {size:,} parameters; {len(pixels):,} digits in training")
    begin = time.perf_counter()
    curves = learn(model, pixels, digits, options)
    runs, models, curve = ablate(model, pixels, digits, held, options)
    print(f"trained in {time.perf_counter() - begin:.0f} s, the naive steps and all measurements included")

    print(f"{options.scenes} scenes of {len(held_digits)} digits held out, {len(KINDS)} questions each; sampled")
    sampled = {"before GRPO": next(iter(runs.values())).rates[0]}
    sampled |= {name: run.rates[options.rewarded] for name, run in runs.items()}
    print(table(sampled))
    likely = {"before GRPO": model, **models}
    greedy = {name: rates(each, held, temperature=0.0) for name, each in likely.items()}
    print("the same, the most likely answers")
    print(table(greedy))
    write(runs, sampled, greedy, options.out / "figures.json")
    draw_ablation(runs, options.out / "ablation.png")
    draw_curves(curves | {"3: be rewarded": curve}, runs, options.out / "curves.png")
    few = held.part(slice(0, SHOWN))
    draw_replies(few, {name: replies(each, few) for name, each in likely.items()}, options.out / "answers.png")
    print(f"in {options.out}: figures.json, ablation.png, curves.png, answers.png")


def write(runs: dict[str, Run], sampled: dict[str, Rates], greedy: dict[str, Rates], path: Path) -> None:
    """Writes all rates and rewards as JSON; a mean of no boxes is null."""
    plain = lambda found: {key: x if math.isfinite(x) else None for key, x in found._asdict().items()}
    of = lambda columns: {name: plain(found) for name, found in columns.items()}
    steps = {name: {step: plain(found) for step, found in run.rates.items()} for name, run in runs.items()}
    rewards = {name: run.rewards for name, run in runs.items()}
    found = {"sampled": of(sampled), "most likely": of(greedy), "over steps": steps, "rewards": rewards}
    path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
