"""Train a small CLIP on real handwritten digits, from scratch, with `mmkernels.info_nce`, in less than a minute.

    pip install "mmkernels[examples]"
    python examples/clip_digits.py

Two towers learn to map an image and its captions to the same direction. Each image has several correct captions and
each caption several correct images; `image_ids` and `text_ids` define the pairs. The script trains twice from one seed,
with the fused kernels and with the naive formulas, and shows that the two loss curves are equal up to rounding. Then it
classifies and retrieves held-out images with prompts that were not in training. For batches this small both take about
the same time; `mmkernels bench info_nce` measures what fusing saves on large ones.

    python examples/clip_digits.py --ranks 4
    torchrun --standalone --nproc-per-node 4 examples/clip_digits.py

Either command trains in four processes, of which each holds a quarter of every batch; the first one starts torchrun
itself. `info_nce(..., group=...)` compares all images with all captions, `DistributedDataParallel` averages gradients,
and the curve is that of one process, which the first rank trains for comparison.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021, figure 3.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmkernels
from mmkernels import SpanMask
from mmkernels.nn import CrossAttention

try:
    from clip_digits_data import (
        CAPTIONS_PER_IMAGE,
        LONGEST,
        NUMBERS,
        PROMPTS,
        TRAINING_CAPTIONS,
        Batch,
        batches,
        load,
        tokenize,
    )
    from clip_digits_pictures import draw_loss, draw_retrieval
    from clip_digits_ranks import BatchNorm, launch
except ModuleNotFoundError as error:
    package = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}.get((error.name or "").partition(".")[0])
    if package is None:
        raise
    print(f'clip_digits: this needs {package}: pip install "mmkernels[examples]"', file=sys.stderr)
    raise SystemExit(2) from None

WIDTH, HEADS, IMAGE_LAYERS, TEXT_LAYERS = 64, 4, 2, 1
WEIGHT_DECAY, WARMUP_STEPS = 0.05, 20
LEARNING_RATE = 4e-3  # for 128 images a step; proportionally less for fewer, or rounding errors grow too fast

# The largest relative difference of the two loss curves. Neighbouring float32 numbers differ by up to 1.2e-7 (EPS). In
# the first steps both runs have the same weights up to rounding, so the difference is the rounding of the ops, a few
# EPS. After that, rounding errors feed back through the weights. With 14 seeds the difference was at most 4e-6. It is
# as large between two naive runs if the weights of the first layer differ by one EPS.
EPS = torch.finfo(torch.float32).eps
FIRST_STEPS = 10
BOUND_OF_FIRST, BOUND_OF_ALL = 16 * EPS, 1e-4


# The model.


class Block(nn.Module):
    """A transformer layer: self-attention, then a feed-forward, each after a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = CrossAttention(WIDTH, num_heads=HEADS)  # self-attention, as no context is given
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: SpanMask | None) -> Tensor:  # [B, L, WIDTH]
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.feed(self.feed_norm(x))


class Tower(nn.Module):
    """Maps tokens [B, L, WIDTH] to unit vectors [B, WIDTH]: a transformer, then pooling by a learned query."""

    def __init__(self, layers: int, longest: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.5 * torch.randn(longest, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pool = CrossAttention(WIDTH, num_heads=HEADS)

    def forward(self, tokens: Tensor, mask: SpanMask | None = None) -> Tensor:
        x = tokens + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.pool(self.query.expand(len(x), -1, -1), self.norm(x), mask=mask)  # [B, 1, WIDTH]
        return F.normalize(x[:, 0], dim=-1)


class DigitClip(nn.Module):
    """An image tower and a text tower with features in one space, and the temperature of their similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(  # 8 x 8 pixels to 4 x 4 tokens
            nn.Conv2d(1, WIDTH // 2, 3, padding=1, bias=False), BatchNorm(WIDTH // 2), nn.GELU(),
            nn.Conv2d(WIDTH // 2, WIDTH, 3, padding=1, stride=2, bias=False), BatchNorm(WIDTH),
        )  # fmt: skip
        self.image_tower = Tower(IMAGE_LAYERS, longest=16)
        self.words = nn.Embedding(2 + len(NUMBERS), WIDTH)
        self.text_tower = Tower(TEXT_LAYERS, LONGEST)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns unit vectors [N, WIDTH] and [M, WIDTH] of images and captions, and the factor of similarities."""
        return self.encode_image(batch.pixels), self.encode_text(batch.tokens, batch.lengths), self.logit_scale()

    def logit_scale(self) -> Tensor:
        """Returns the factor by which the loss multiplies similarities, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=100.0)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns unit vectors [B, WIDTH] of pixels [B, 8, 8] from 0 to 1."""
        return self.image_tower(self.stem(pixels[:, None]).flatten(2).mT)

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Returns unit vectors [B, WIDTH] of word numbers [B, L]; padding is hidden from every query."""
        return self.text_tower(self.words(tokens), SpanMask.key_padding(lengths))


# Training.


def train(
    pixels: Tensor,
    digits: Tensor,
    *,
    epochs: int,
    batch: int,
    seed: int,
    backend: str | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[DigitClip, Tensor, Tensor]:
    """Trains a model on pixels [N, 8, 8] and their digits [N]. The same seed gives the same model.

    Args:
        batch: images a step, of all ranks together.
        backend: of every op: "reference" for the naive formulas, None for the fastest available.
        group: the ranks that share each batch; None: this process alone.

    Returns:
        The model; the loss of each step and the smallest possible loss of each step, both float64 [steps].
    """
    torch.manual_seed(seed)
    model, draw = DigitClip(), torch.Generator().manual_seed(seed)
    trained: nn.Module = model
    if group is not None:
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.group = group
        trained = DistributedDataParallel(model, process_group=group)
    steps = epochs * (len(pixels) // batch)
    rate = LEARNING_RATE * min(1.0, batch / 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    losses, least = [], []
    with mmkernels.use_backend(backend or ""):
        for step_batch in batches(pixels, digits, epochs, batch, draw):
            here = step_batch if group is None else step_batch.share(group)
            image, text, logit_scale = trained(here)
            loss = mmkernels.info_nce(
                image,  # [N, WIDTH]
                text,  # [M, WIDTH]
                logit_scale,
                image_ids=here.image_ids,  # an image and a caption of one digit belong together,
                text_ids=here.text_ids,  # whichever image the caption was drawn for, and on whichever rank
                group=group,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            least.append(least_loss(step_batch.image_ids, step_batch.text_ids))
    return model.eval(), torch.tensor(losses, dtype=torch.float64), torch.tensor(least, dtype=torch.float64)


def least_loss(image_ids: Tensor, text_ids: Tensor) -> float:
    """Returns the entropy of the targets: a row with n positives has target 1/n for each, and entropy log n."""
    images, texts = (torch.bincount(ids, minlength=10).double() for ids in (image_ids, text_ids))
    return (texts[image_ids].log().mean() + images[text_ids].log().mean()).item() / 2


def check_same(fused: Tensor, naive: Tensor) -> str:
    """Asserts that two loss curves [steps] are equal up to rounding; returns a text with their difference."""
    apart = (fused - naive).abs() / naive
    first, every = apart[:FIRST_STEPS].max().item(), apart.max().item()
    assert first <= BOUND_OF_FIRST, f"the curves must start within {BOUND_OF_FIRST:.1e}, got {first:.1e}"
    assert every <= BOUND_OF_ALL, f"the curves must stay within {BOUND_OF_ALL:.1e}, got {every:.1e}"
    return (
        f"{first:.1e} in the first {min(FIRST_STEPS, len(apart))} steps (bound {BOUND_OF_FIRST:.1e}), "
        f"{every:.1e} in all (bound {BOUND_OF_ALL:.1e})"
    )


# Evaluation.


@torch.no_grad()
def encode_prompts(model: DigitClip, prompts: list[str]) -> Tensor:
    """Returns unit vectors [10, prompts of a digit, WIDTH] of the prompts of all digits, in the order of `captions`."""
    return model.encode_text(*tokenize(prompts)).unflatten(0, (10, -1))


def classify(images: Tensor, prompts: Tensor) -> Tensor:
    """Returns the digits int64 [N] whose prompts [10, P, WIDTH], averaged, are nearest to images [N, WIDTH]."""
    return (images @ F.normalize(prompts.mean(1), dim=-1).mT).argmax(1)


class Recall(NamedTuple):
    """Shares at k = 1 and k = 5.

    Attributes:
        any_right: of queries with a correct item among the first k: recall@k as usual for queries with several correct
            items, such as the five captions of a photo in COCO.
        chance: the same for a gallery in random order.
        each_right: of pairs of a query and a correct item, the share with fewer than k wrong items before it: recall@k
            if this item were the only correct one. This is much harder: an unusual seven that comes after a one counts
            too.
    """

    any_right: list[float]
    chance: list[float]
    each_right: list[float]


def recall(query: Tensor, query_digits: Tensor, gallery: Tensor, gallery_digits: Tensor) -> Recall:
    """Returns how well queries [N, WIDTH] retrieve the items of their digit from a gallery [M, WIDTH]."""
    rows, target = (query_digits[:, None] == gallery_digits).nonzero(as_tuple=True)  # the correct pairs, query by query
    ranks = mmkernels.retrieval_ranks(query[rows], gallery, target)
    counts = torch.bincount(rows, minlength=len(query)).tolist()  # the number of correct items of each query
    ordered = [of_query.sort().values for of_query in ranks.split(counts)]
    best = torch.stack([of_query[0] for of_query in ordered])
    wrong_before = torch.cat([of_query - torch.arange(len(of_query)) for of_query in ordered])
    missed = [
        sum(math.comb(len(gallery) - n, k) for n in counts) / (len(query) * math.comb(len(gallery), k)) for k in (1, 5)
    ]
    return Recall(
        any_right=[(best < k).double().mean().item() for k in (1, 5)],
        chance=[1 - share for share in missed],
        each_right=[(wrong_before < k).double().mean().item() for k in (1, 5)],
    )


def report(model: DigitClip, pixels: Tensor, digits: Tensor, path: Path) -> None:
    """Prints accuracy and recall on held-out images, and draws the images that some prompts retrieve."""
    with torch.no_grad():
        images = model.encode_image(pixels)
    prompts, known = encode_prompts(model, PROMPTS), encode_prompts(model, TRAINING_CAPTIONS)
    guesses = classify(images, prompts)
    accuracy, of_known = ((guess == digits).double().mean() for guess in (guesses, classify(images, known)))
    print(f"zero-shot accuracy{percent(accuracy)} by new prompts,{percent(of_known)} by training's captions")

    texts, text_digits = prompts.flatten(0, 1), torch.arange(10).repeat_interleave(prompts.shape[1])
    print(f"retrieval, {len(texts)} prompts and {len(images)} images, none in training; right: the same digit")
    print("                 some right one among            each right one with fewer")
    print("                 the first k (by chance)         than k wrong ones before it")
    print("  recall@k       k = 1           k = 5           k = 1      k = 5")
    for name, result in (
        ("text to image", recall(texts, text_digits, images, digits)),
        ("image to text", recall(images, digits, texts, text_digits)),
    ):
        some = [f"{percent(share)} ({100 * chance:.0f} %)" for share, chance in zip(result.any_right, result.chance)]
        print(f"  {name}  {'  '.join(some)}  {'   '.join(percent(share) for share in result.each_right)}")
    chosen = [prompts.shape[1] * digit + digit % prompts.shape[1] for digit in range(10)]  # templates in turn
    best = (texts[chosen] @ images.mT).argsort(dim=1, descending=True, stable=True)[:, :5]
    draw_retrieval([PROMPTS[place] for place in chosen], best, pixels, digits, guesses, path)


def percent(share: float | Tensor) -> str:
    return f"{100 * float(share):.1f} %".rjust(7)


# The command.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (%(default)s)")
    parser.add_argument("--ranks", type=int, help="processes that share each batch (1, or as many as torchrun starts)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, captions, augmentation (%(default)s)")
    parser.add_argument("--samples", type=int, default=1797, help="images of the data set in use, from its start (all)")
    parser.add_argument("--out", type=Path, default=Path("build/clip_digits"), help="folder of pictures (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="more gain little on tensors this small (%(default)s)")
    options = parser.parse_args(arguments)
    started = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else None
    if options.ranks is None:
        options.ranks = started or 1
    for name, least, most in (
        ("epochs", 1, 10_000), ("threads", 1, 1024), ("seed", 0, 2**63 - 1), ("samples", 200, 1797),
        ("batch", 2, options.samples - options.samples // 5), ("ranks", 1, options.batch),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, got {getattr(options, name)}")
    if started not in (None, options.ranks):
        parser.error(f"--ranks must be what torchrun starts, {started}, got {options.ranks}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / picture_names(options.ranks)[0]).touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    return options


def compare(options: argparse.Namespace, group: dist.ProcessGroup | None) -> None:
    """Trains twice, and compares; with a group, each rank calls it, and the first one reports."""
    pixels, digits, held_pixels, held_digits = load(options.samples)
    first = group is None or group.rank() == 0
    if first:
        size = sum(parameter.numel() for parameter in DigitClip().parameters())
        print(f"{len(pixels):,} handwritten digits to train on; {len(held_pixels)} held out, the last of the file")
        print(f"{len(TRAINING_CAPTIONS) // 10} captions a digit, of which each image draws {CAPTIONS_PER_IMAGE} a step")
        print(f"two towers of {size:,} parameters together, {options.batch} images a step", flush=True)
    losses = {}
    runs = (("naive", "reference", None), ("fused", None, None))
    if group is not None:
        runs = (("one process", None, None), (f"{group.size()} ranks", None, group))
    for name, backend, ranks in runs:
        if not first and ranks is None:
            continue  # the next run begins when the first rank is there
        begin = time.perf_counter()
        model, loss, least = train(
            pixels, digits, epochs=options.epochs, batch=options.batch, seed=options.seed, backend=backend, group=ranks
        )
        seconds = time.perf_counter() - begin
        if first:
            print(f"{name}: {len(loss)} steps in {seconds:.1f} s, loss {loss[0]:.3f} to {loss[-1]:.3f}", flush=True)
        losses[name] = loss
    if not first:
        return
    pictures = [options.out / name for name in picture_names(options.ranks)]
    bounds = [(FIRST_STEPS, BOUND_OF_FIRST), (None, BOUND_OF_ALL)]
    draw_loss(losses, least, bounds, EPS, pictures[0])
    (one, baseline), (other, curve) = losses.items()
    print(f"the losses of {other} and {one} differ, relatively, by at most {check_same(curve, baseline)}")
    report(model, held_pixels, held_digits, pictures[1])  # the last run's
    print(f"pictures: {pictures[0]}, {pictures[1]}")


def picture_names(ranks: int) -> list[str]:
    of = "" if ranks == 1 else f"_{ranks}_ranks"
    return [f"clip_digits{of}_{name}.png" for name in ("loss", "retrieval")]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.ranks == 1:
        compare(options, None)
    elif not dist.is_torchelastic_launched():
        raise SystemExit(launch(__file__, options.ranks, sys.argv[1:] if arguments is None else arguments))
    else:
        dist.init_process_group("gloo")
        compare(options, dist.group.WORLD)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
