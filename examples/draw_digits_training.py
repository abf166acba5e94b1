"""The model of `draw_digits.py`, and how it is trained: first the tokenizer of images, then Janus on its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from clip_digits_data import DIGITS, augment
from torch import Tensor

from mmkernels.models import Janus

PAD, BOS, START, END, MARKER, FIRST_WORD = range(6)
TEMPLATES = ("draw a {}", "a handwritten {}", "the number {} please")
QUESTION = "which digit is this"
VOCABULARY = sorted({*(word for text in (*TEMPLATES, QUESTION) for word in text.split() if word != "{}"), *DIGITS})
NUMBERS = {word: FIRST_WORD + place for place, word in enumerate(VOCABULARY)}

CODES, CODE_WIDTH, SIDE = 64, 8, 8  # of the codebook; of an image, in pixels
TOKENS = 16  # of an image, 4 x 4
DROPPED = 0.1  # of the prompts say nothing, as in Janus, for guidance
REVIVED_EVERY = 25  # steps of the tokenizer's training, in its first half
TOKENIZER_RATE, RATE, WEIGHT_DECAY, WARMUP_STEPS = 4e-3, 3e-3, 0.05, 20


def make_model(seed: int) -> Janus:
    """Returns a Janus for images [B, 1, 8, 8] from -1 to 1, with random weights."""
    return Janus.from_size(
        "tiny", seed=seed, image_size=SIDE, patch_size=2, channels=1,
        vision_width=64, vision_layers=2, vision_heads=4, vision_mlp=128,
        text_width=64, text_layers=3, text_heads=4, text_kv_heads=4, text_head_dim=16, text_mlp=192, text_length=64,
        vocab_size=FIRST_WORD + len(VOCABULARY), image_token_id=MARKER, image_start_token_id=START, bos_token_id=BOS,
        pad_token_id=PAD, eos_token_ids=(END,), vq_codes=CODES, vq_code_width=CODE_WIDTH, vq_latent=32, vq_width=32,
        vq_multipliers=(1, 2), vq_blocks=1, vq_directions=True,
    )  # fmt: skip


def to_images(pixels: Tensor) -> Tensor:
    """Returns images [B, 1, 8, 8] from -1 to 1 of pixels [B, 8, 8] from 0 to 1."""
    return 2 * pixels[:, None] - 1


def prompts(digits: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
    """Returns prompts for drawings, int64 [B, L], and their attention mask; they are padded on the left.

    Args:
        digits, template: int64 [B], what is drawn, and which of `TEMPLATES` says so.
    """
    rows = [
        [BOS, *words(TEMPLATES[which].format(DIGITS[digit])), START]
        for digit, which in zip(digits.tolist(), template.tolist())
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def questions(count: int) -> Tensor:
    """Returns prompts that ask about an image each, int64 [B, L]."""
    return torch.tensor([[BOS, *[MARKER] * TOKENS, *words(QUESTION)]]).expand(count, -1)


def words(text: str) -> list[int]:
    return [NUMBERS[word] for word in text.split()]


NAMES = torch.tensor([NUMBERS[name] for name in DIGITS])
"""The token of each digit."""


def draws(count: int, size: int, steps: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Yields rows of a batch, int64 [size]: every image once, in a new order, then again."""
    left = torch.zeros(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=draw)])
        rows, left = left[:size], left[size:]
        yield rows


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns a warm-up, then half a cosine."""
    rate = lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


# Training.


def train_tokenizer(model: Janus, pixels: Tensor, *, steps: int, batch: int, seed: int) -> list[float]:
    """Trains the tokenizer of images on pixels [N, 8, 8]; returns the mean squared error of each step."""
    vq, draw, losses = model.vq, torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(vq.parameters(), lr=TOKENIZER_RATE, weight_decay=0.0)
    schedule = schedule_of(optimizer, steps)
    vq.train()
    used = torch.zeros(CODES, dtype=torch.bool)
    for step, rows in enumerate(draws(len(pixels), batch, steps, draw)):
        images = to_images(augment(pixels[rows], draw))
        if step % REVIVED_EVERY == 0 and step <= steps // 2:
            revive(model, images, ~used, draw)
            used.zero_()
        out = vq(images)
        used[out.tokens.flatten()] = True
        error = F.mse_loss(out.pixels, images)
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        schedule.step()
        losses.append(error.item())
    vq.requires_grad_(False)
    return losses


@torch.no_grad()
def revive(model: Janus, images: Tensor, idle: Tensor, draw: torch.Generator) -> None:
    """Gives codes that no image uses, bool [CODES], values that the encoder makes of random parts of images."""
    latents = model.vq.latents(images).flatten(0, 1)  # [B * TOKENS, CODE_WIDTH]
    chosen = latents[torch.randint(len(latents), (CODES,), generator=draw)]
    codes = model.vq.quantize["embedding"].weight
    codes.copy_(torch.where(idle[:, None], chosen, codes))


def train(
    model: Janus, pixels: Tensor, digits: Tensor, *, steps: int, batch: int, seed: int
) -> tuple[list[float], list[float]]:
    """Trains Janus to draw and to read; returns the two losses of each step.

    Args:
        pixels, digits: [N, 8, 8], and int64 [N].
        batch: images a step, each of which is drawn and read.
    """
    draw, drawing, reading = torch.Generator().manual_seed(seed), [], []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = schedule_of(optimizer, steps)
    model.train()
    for rows in draws(len(pixels), batch, steps, draw):
        images, of = to_images(augment(pixels[rows], draw)), digits[rows]
        ids, mask = prompts(of, torch.randint(len(TEMPLATES), (batch,), generator=draw))
        silent = torch.rand(batch, 1, generator=draw) < DROPPED
        ids = torch.where(silent, model.unconditional(ids), ids)
        drawn = model(ids, attention_mask=mask, image_tokens=model.encode_tokens(images)).loss

        asked = torch.cat([questions(batch), NAMES[of, None]], dim=1)
        answers = F.pad(NAMES[of, None], (asked.shape[1] - 1, 0), value=-100)
        read = model(asked, images, labels=answers).loss
        optimizer.zero_grad()
        (drawn + read).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        drawing.append(drawn.item())
        reading.append(read.item())
    model.eval()
    return drawing, reading


# Use.


@torch.no_grad()
def draw_images(model: Janus, digits: Tensor, guidance_scale: float, seed: int) -> Tensor:
    """Returns drawings of digits int64 [N], as pixels [N, 8, 8] from 0 to 1."""
    ids, mask = prompts(digits, torch.zeros_like(digits))
    tokens = model.generate_image(ids, attention_mask=mask, guidance_scale=guidance_scale, seed=seed)
    return (model.decode(tokens)[:, 0] + 1).div(2).clamp(0, 1)


@torch.no_grad()
def read_images(model: Janus, pixels: Tensor) -> Tensor:
    """Returns the digits int64 [N] that the model reads from pixels [N, 8, 8]."""
    out = model(questions(len(pixels)), to_images(pixels), last_logits_only=True)
    return out.logits[:, 0, NAMES].argmax(1)
