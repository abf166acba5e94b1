"""The model of `grpo_digits.py`, its supervised start, and GRPO."""

from __future__ import annotations

from typing import NamedTuple

import torch
from grpo_digits_data import WORDS, conversations, demonstrations
from grpo_digits_rewards import Judgement, Weights, judge
from read_digits_answers import wanted
from read_digits_data import (
    ANSWER,
    CELL,
    CELLS,
    END,
    IMAGE,
    KINDS,
    PAD,
    PATCH,
    QUESTION,
    SIDE,
    STEP,
    Scenes,
    draw_scenes,
    patch_names,
    spell,
)
from read_digits_training import GAIN, GROUP, SCALE, answer_logprobs, fit, mean, rewarded_loss, sampled
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from mmkernels.models import DeepSeekVL
from mmkernels.objectives import group_advantages

WIDTH = 64  # of encoder and language model
VISUAL = (SIDE // PATCH) ** 2  # tokens of a scene: one a patch
SEEING_RATE, ANSWERING_RATE, REWARDED_RATE = 3e-3, 6e-3, 1e-3  # learning rates of the three stages
PROSE = 0.5  # share of the demonstrations in prose


def make_model(seed: int) -> DeepSeekVL:
    """Returns a DeepSeek-VL of small sizes with random weights."""
    model = DeepSeekVL.from_size(
        "tiny", seed=seed, image_size=SIDE, patch_size=PATCH, channels=1,
        vision_width=WIDTH, vision_layers=2, vision_heads=4, vision_mlp=2 * WIDTH,
        text_width=WIDTH, text_layers=2, text_heads=2, text_kv_heads=2, text_head_dim=WIDTH // 2, text_mlp=2 * WIDTH,
        text_length=VISUAL + len(KINDS) * (QUESTION + ANSWER), vocab_size=len(WORDS), rope_theta=1e6,
        image_token_id=IMAGE, pad_token_id=PAD, eos_token_ids=(END,),
    )  # fmt: skip
    with torch.no_grad():  # images and words make a difference from the first step on
        for weight in (model.vision.patch.weight, model.vision.positions, model.decoder.embed.weight):
            weight.mul_(GAIN)
    return model


# The supervised start.


class Sight(nn.Module):
    """What the first stage asks of visual tokens. It is not used afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.name = nn.Linear(WIDTH, 11)  # which digit a token is a part of, or none
        self.region = nn.Linear(WIDTH, CELLS**2)  # where it is
        self.sides = nn.Linear(WIDTH, 4 * (SIDE // STEP + 1))  # where the digit's box begins and ends, in steps

    def loss(self, tokens: Tensor, scenes: Scenes) -> Tensor:
        """Returns the loss of visual tokens [N * VISUAL, WIDTH]."""
        names = patch_names(scenes).flatten()  # 10: no digit
        along = torch.arange(SIDE // PATCH) * PATCH // CELL
        region = (along[:, None] * CELLS + along).flatten()  # of each patch
        sides = (scenes.boxes // STEP)[:, region].flatten(0, 1)[names < 10]
        found = self.sides(tokens[names < 10]).unflatten(1, (4, -1))
        return (
            cross_entropy(self.name(tokens), names)
            + cross_entropy(self.region(tokens), region.repeat(len(scenes.shown)))
            + cross_entropy(found.flatten(0, 1), sides.flatten())
        )


def see(
    model: DeepSeekVL, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int, last: int | None = None,
    backend: str | None = None,
) -> list[float]:  # fmt: skip
    """Trains encoder and aligner on scenes of pixels [M, 8, 8] and their digits [M]; returns the losses."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sight = Sight()

    def loss_of_step() -> Tensor:
        scenes = draw_scenes(pixels, digits, batch, draw)
        return sight.loss(model.encode(scenes.pixels).tokens, scenes)

    parameters = [x for part in (model.vision, model.vision_norm, model.aligner, sight) for x in part.parameters()]
    return fit(parameters, loss_of_step, rate=SEEING_RATE, steps=steps, last=last, backend=backend)


def answer(
    model: DeepSeekVL, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int, last: int | None = None,
    backend: str | None = None,
) -> list[float]:  # fmt: skip
    """Trains the language model on questions about scenes with their answers; returns the losses."""
    draw = torch.Generator().manual_seed(seed + 1)

    def loss_of_step() -> Tensor:
        scenes = draw_scenes(pixels, digits, batch, draw)
        text, labels = conversations(scenes, demonstrations(scenes, PROSE, draw), VISUAL, draw)
        return model(text, images=model.encode(scenes.pixels), labels=labels).loss

    return fit(speaking(model), loss_of_step, rate=ANSWERING_RATE, steps=steps, last=last, backend=backend)


def speaking(model: DeepSeekVL) -> list[Parameter]:
    """Freezes what sees; returns the parameters of the language model."""
    for part in (model.vision, model.vision_norm, model.aligner):
        part.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# GRPO.


class Rates(NamedTuple):
    """How a model answers on held-out scenes, means over questions.

    Attributes:
        format: of all answers, those that are JSON of the schema.
        correctness: of all answers, those with the right digit, or a right refusal.
        grounding: the IoU of the box with the right one, where something is there; 0 without a box.
        area: of the boxes, over that of the right one, where both are there.
        invented: of questions about what is not there, those answered with a box.
    """

    format: float
    correctness: float
    grounding: float
    area: float
    invented: float


class Run(NamedTuple):
    """What one run of GRPO leaves.

    Attributes:
        surprise: the mean of ``-log p`` of the tokens that each step sampled, in nats: it estimates the entropy. GRPO's
            loss is no measure: its ratios are 1, so its value tells the advantages alone.
        rewards: the mean reward of each step's answers.
        answers: tokens of the answers that the first steps sampled.
        rates: on held-out scenes, by the number of steps before.
    """

    surprise: list[float]
    rewards: list[float]
    answers: list[Tensor]
    rates: dict[int, Rates]


def improve(
    model: DeepSeekVL, pixels: Tensor, digits: Tensor, held: Scenes | None, weights: Weights, *, steps: int, batch: int,
    seed: int, every: int = 1, kept: int = 0, replayed: list[Tensor] | None = None, backend: str | None = None,
) -> Run:  # fmt: skip
    """Trains a model's language model by the rewards of its own answers.

    Each step asks questions about new scenes, and samples `GROUP` answers to each.

    Args:
        held: scenes to measure the rates on, before, behind and after each `every` steps; None: never.
        weights: of the reward's terms.
        kept: of how many steps the answers are kept.
        replayed: answers of an earlier run with this seed, in place of sampled ones; training ends with them.
        backend: as in `fit`.
    """
    draw = torch.Generator().manual_seed(seed + 2)
    run = Run([], [], [], {})

    def loss_of_step() -> Tensor:
        done = len(run.rewards)
        if held is not None and done % every == 0:
            run.rates[done] = rates(model, held)
        scenes = draw_scenes(pixels, digits, batch, draw)
        chance = int(torch.randint(2**31, (), generator=draw))
        text, answers = sampled(model, scenes, seed=chance, visual=VISUAL)
        if replayed is not None:
            answers = replayed[done]
        if done < kept:
            run.answers.append(answers)
        reward = judged(scenes, answers, GROUP).reward(weights)
        run.rewards.append(reward.mean().item())
        logprobs, shown = answer_logprobs(model, scenes, text, answers)
        run.surprise.append(-logprobs.detach()[shown].mean().item())
        return rewarded_loss(logprobs, group_advantages(reward, GROUP, scale=SCALE), shown)

    last = None if replayed is None else len(replayed)
    report = lambda: f"reward {mean(run.rewards[-20:]):.3f}"
    fit(speaking(model), loss_of_step, rate=REWARDED_RATE, steps=steps, last=last, backend=backend, report=report)
    if held is not None:
        run.rates[steps] = rates(model, held)
    return run


def judged(scenes: Scenes, answers: Tensor, group: int) -> Judgement:
    """Checks answers, tokens [N * KINDS * group, L], `group` to each question about the scenes."""
    digits, boxes = (x.repeat_interleave(group, 0) for x in wanted(scenes))
    return judge(spell(answers, WORDS), digits, boxes)


@torch.no_grad()
def replies(model: DeepSeekVL, scenes: Scenes, temperature: float = 0.0) -> Tensor:
    """Returns an answer to each question, tokens int64 [N, KINDS, L]; at temperature 0 the most likely one."""
    _, answers = sampled(model, scenes, seed=0, visual=VISUAL, group=1, temperature=temperature)
    return answers.unflatten(0, (-1, len(KINDS)))


def rates(model: DeepSeekVL, scenes: Scenes, temperature: float = 1.0) -> Rates:
    """Returns how a model answers; at temperature 1 as it is trained, at 0 with its most likely answers."""
    found = judged(scenes, replies(model, scenes, temperature).flatten(0, 1), 1)
    boxed = found.boxed & found.there
    return Rates(
        found.format.mean().item(),
        found.correctness.mean().item(),
        found.grounding[found.there].mean().item(),
        found.area[boxed].mean().item(),
        found.boxed[~found.there].float().mean().item(),
    )
