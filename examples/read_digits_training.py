"""The model of `read_digits.py`, and the three stages of its training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from read_digits_answers import first, repeated, verify, wanted
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
    SENTENCE,
    SIDE,
    SPELLED,
    STEP,
    Scenes,
    box_sides,
    descriptions,
    draw_scenes,
    lessons,
    patch_names,
    prompts,
    requests,
    spell,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

import mmkernels
from mmkernels.models import BLIP2
from mmkernels.models.blocks.vision_language import VisionLanguageModel
from mmkernels.models.blocks.visual import Visual
from mmkernels.objectives import group_advantages, grpo_loss

QUERIES = CELLS**2  # one for each region
WIDTH = 64  # of all three parts
GAIN, QUERY_GAIN = 4.0, 8.0  # of patches, words and positions, and of queries, over `from_size`'s
WEIGHT_DECAY, WARMUP_STEPS = 0.05, 30
SEEING_RATE, ANSWERING_RATE, REWARDED_RATE = 3e-3, 3e-3, 1.5e-3  # learning rates of the three stages
PATCH_WEIGHT = 6.0  # what the patches' loss counts in the first stage
DESCRIBED = 16  # scenes of a step of the second and third stage that are described too
BOUND = 1e-3  # the largest relative difference of fused and naive losses: rounding errors, which grow
GROUP, SCALE = 8, "batch"  # answers to a question in the third stage, and what divides their advantages


def make_model(seed: int) -> BLIP2:
    """Returns a BLIP-2 of small sizes with random weights."""
    model = BLIP2.from_size(
        "tiny", seed=seed, image_size=SIDE, patch_size=PATCH, channels=1,
        vision_width=WIDTH, vision_layers=2, vision_heads=4, vision_mlp=2 * WIDTH,
        num_queries=QUERIES, qformer_width=WIDTH, qformer_layers=2, qformer_heads=4, qformer_mlp=2 * WIDTH,
        qformer_cross_every=1,
        text_width=WIDTH, text_layers=2, text_heads=4, text_kv_heads=4, text_mlp=2 * WIDTH,
        text_length=QUERIES + QUESTION + SENTENCE, vocab_size=len(SPELLED), image_token_id=IMAGE, pad_token_id=PAD,
        eos_token_ids=(END,), tie_embeddings=False, freeze_vision=False, freeze_text=False,
    )  # fmt: skip
    with torch.no_grad():  # images, places and words make a difference from the first step on
        for weight in (
            model.vision.patch.weight, model.vision.positions, model.decoder.embed.weight,
            model.decoder.positions.weight,
        ):  # fmt: skip
            weight.mul_(GAIN)
        model.qformer.queries.mul_(QUERY_GAIN)
    return model


def fit(
    parameters: list[Parameter], loss_of_step: Callable[[], Tensor], *, rate: float, steps: int,
    last: int | None = None, backend: str | None = None, report: Callable[[], str] | None = None,
) -> list[float]:  # fmt: skip
    """Trains parameters; returns the loss of each step.

    Args:
        loss_of_step: returns the loss of new scenes.
        rate: the learning rate behind the warm-up; it falls to 0 as a cosine.
        last: the step to stop at, with the schedule of all `steps`; None: the last.
        backend: of every op: "reference" for the naive formulas, None for the fastest available.
        report: what to say from time to time; None: the loss.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    losses: list[float] = []
    begin = time.perf_counter()
    with mmkernels.use_backend(backend or ""):
        for step in range(steps if last is None else min(last, steps)):
            loss = loss_of_step()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if last is None and ((step + 1) % max(1, steps // 5) == 0):
                words = f"loss {mean(losses[-50:]):.3f}" if report is None else report()
                print(f"  step {step + 1}: {words}, {time.perf_counter() - begin:.0f} s", flush=True)
    return losses


def check_same(fused: list[float], naive: list[float]) -> str:
    """Asserts that two loss curves begin alike; returns a text with their largest relative difference."""
    apart = max(math.inf if math.isnan(a) else abs(a - b) / b for a, b in zip(fused, naive))
    assert apart <= BOUND, f"the curves must stay within {BOUND:.0e}, got {apart:.1e}"
    return f"{apart:.1e} (bound {BOUND:.0e})"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# The first stage: encoder and Q-Former learn to see.


class Sight(nn.Module):
    """What the first stage asks of the encoder's patches and of the Q-Former's queries. It is not used afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(WIDTH, 11)  # which digit a patch is a part of, or none
        self.name = nn.Linear(WIDTH, 11)  # which digit is in the query's region, or none
        self.sides = nn.Linear(WIDTH, 4 * (CELL // STEP + 1))  # where its box begins and ends, in steps


def see(
    model: BLIP2, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int, last: int | None = None,
    backend: str | None = None,
) -> list[float]:  # fmt: skip
    """Trains encoder and Q-Former on scenes of pixels [M, 8, 8] and their digits [M]; returns the losses."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sight = Sight()
    parameters = [x for part in (model.vision, model.vision_norm, model.qformer, sight) for x in part.parameters()]

    def loss_of_step() -> Tensor:
        return seeing_loss(model, sight, draw_scenes(pixels, digits, batch, draw))

    return fit(parameters, loss_of_step, rate=SEEING_RATE, steps=steps, last=last, backend=backend)


def seeing_loss(model: BLIP2, sight: Sight, scenes: Scenes) -> Tensor:
    """Returns the loss of what patches and queries tell of scenes."""
    features = model.encode_vision(scenes.pixels)  # [N, 1 + patches, WIDTH]
    queries = model.qformer(features).queries  # [N, 9, WIDTH]
    there = scenes.shown >= 0
    names = torch.where(there, scenes.shown, 10)
    sides = sight.sides(queries[there]).unflatten(1, (4, -1))
    return (
        PATCH_WEIGHT * cross_entropy(sight.patch(features[:, 1:]).flatten(0, 1), patch_names(scenes).flatten())
        + cross_entropy(sight.name(queries).flatten(0, 1), names.flatten())
        + cross_entropy(sides.flatten(0, 1), box_sides(scenes)[there].flatten())
    )


# The second stage: the language model learns to answer. What sees is frozen, as in BLIP-2.


def answer(
    model: BLIP2, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int, last: int | None = None,
    backend: str | None = None,
) -> list[float]:  # fmt: skip
    """Trains the projection and the language model on questions about scenes; returns the losses."""
    draw = torch.Generator().manual_seed(seed + 1)

    def loss_of_step() -> Tensor:
        return answering_loss(model, draw_scenes(pixels, digits, batch, draw))

    return fit(speaking(model), loss_of_step, rate=ANSWERING_RATE, steps=steps, last=last, backend=backend)


def speaking(model: BLIP2) -> list[Parameter]:
    """Freezes what sees; returns the other parameters: of the projection and the language model."""
    for part in (model.vision, model.vision_norm, model.qformer):
        part.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def answering_loss(model: BLIP2, scenes: Scenes) -> Tensor:
    """Returns the loss of questions about scenes, each asked alone, and of descriptions of some scenes."""
    images = model.encode(scenes.pixels)
    text, labels = lessons(scenes.questions, scenes.answers, QUERIES)
    answered = model(text, images=repeated(images, len(KINDS)), labels=labels).loss
    return answered + describing_loss(model, images, scenes)


def describing_loss(model: BLIP2, images: Visual, scenes: Scenes) -> Tensor:
    """Returns the loss of descriptions of the first scenes, which `images` are of."""
    few = min(DESCRIBED, len(scenes.shown))
    text, labels = lessons(requests(few), descriptions(scenes.part(slice(0, few))), QUERIES)
    return model(text, images=first(images, few), labels=labels).loss


# The third stage: answers are rewarded.


def improve(model: BLIP2, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int) -> list[float]:
    """Trains a model by what a verifier says of its answers; returns the mean reward of each step, from 0 to 1.

    Each step asks questions about new scenes, and samples `GROUP` answers to each.
    """
    draw = torch.Generator().manual_seed(seed + 2)
    rewards: list[float] = []

    def loss_of_step() -> Tensor:
        scenes = draw_scenes(pixels, digits, batch, draw)
        text, answers = sampled(model, scenes, seed=int(torch.randint(2**31, (), generator=draw)))
        reward = verify(spell(answers), *(x.repeat_interleave(GROUP, 0) for x in wanted(scenes))).reward()
        rewards.append(reward.mean().item())
        logprobs, shown = answer_logprobs(model, scenes, text, answers)
        loss = rewarded_loss(logprobs, group_advantages(reward, GROUP, scale=SCALE), shown)
        return loss + describing_loss(model, model.encode(scenes.pixels), scenes)  # or it would forget how to describe

    report = lambda: f"reward {mean(rewards[-20:]):.3f}"
    fit(speaking(model), loss_of_step, rate=REWARDED_RATE, steps=steps, report=report)
    return rewards


@torch.no_grad()
def sampled(
    model: VisionLanguageModel, scenes: Scenes, *, seed: int, visual: int = QUERIES, group: int = GROUP,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns prompts [M, L] and sampled answers [M, up to ANSWER]; M is N * KINDS * `group`.

    Args:
        visual: tokens of a scene.
        group: how many answers each question gets.
        temperature: 0 takes the most likely answer.
    """
    text = prompts(scenes.questions, visual).repeat_interleave(group, 0)
    images = repeated(model.encode(scenes.pixels), len(KINDS) * group)
    answers = model.generate(text, images=images, max_new_tokens=ANSWER, temperature=temperature, seed=seed).tokens
    return text, answers


def answer_logprobs(model: VisionLanguageModel, scenes: Scenes, text: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities of sampled answers to the questions about scenes, [M, L], and which tokens count.

    Args:
        text, answers: as `sampled` returns them.
    """
    images = repeated(model.encode(scenes.pixels), len(KINDS) * GROUP)
    targets = answers.masked_fill(answers == PAD, -100)
    read = answers.masked_fill(answers == IMAGE, PAD)  # a marker would need an image
    out = model(torch.cat([text, read], 1), images=images, return_hidden=True, return_logits=False)
    hidden = out.hidden[:, text.shape[1] - 1 : -1].contiguous()  # behind the token before each of the answer's
    return mmkernels.linear_logprobs(hidden, model.head.weight, targets), targets != -100


def rewarded_loss(logprobs: Tensor, advantages: Tensor, shown: Tensor) -> Tensor:
    """Returns GRPO's loss of answers by their log-probabilities [M, L] and advantages [M]."""
    return grpo_loss(logprobs, advantages, shown, loss_type="dr_grpo", max_length=ANSWER).loss
