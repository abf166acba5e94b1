"""What each rank does in the tests of `CoCaLoss` on ranks; see `ranks.run`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nn.open_clip_loss import open_clip
from torch import Tensor

from mmkernels.integrations.open_clip import CoCaLoss, replace_loss

NAMES = ("image", "text", "logits", "logit_scale")
PAIRS, WORDS, VOCABULARY = 4, 5, 11


def inputs(world: int) -> tuple[list[Tensor], Tensor]:
    """Returns features, logits and scale of all ranks in float64, and labels, of which some are padding."""
    generator = torch.Generator().manual_seed(world)
    draw = {"generator": generator, "dtype": torch.float64}
    count = PAIRS * world
    image, text = (F.normalize(torch.randn(count, 6, **draw), dim=1) for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (count, WORDS), generator=generator)
    labels[:, -1] = 0
    return [image, text, torch.randn(count, WORDS, VOCABULARY, **draw), torch.tensor(9.0, dtype=torch.float64)], labels


def results(loss: Any, given: list[Tensor], labels: Tensor) -> list[Tensor]:
    """Returns both losses, and the gradients of their sum."""
    image, text, logits, scale = leaves = [x.clone().requires_grad_() for x in given]
    losses = loss(image_features=image, text_features=text, logits=logits, labels=labels, logit_scale=scale,
                  output_dict=True)  # fmt: skip
    assert list(losses) == ["contrastive_loss", "caption_loss"]
    total = sum(losses.values())
    total.backward()
    return [*(x.detach() for x in losses.values()), *(x.grad for x in leaves)]


def beside_open_clip(rank: int, world: int) -> None:
    """Both losses and all gradients are open_clip's; with `local_loss` the scale's only on average over the ranks."""
    theirs = open_clip()
    given, labels = inputs(world)
    here = [x.split(PAIRS)[rank] if x.dim() else x for x in given]
    for local, with_grad in itertools.product((False, True), repeat=2):
        options = {"local_loss": local, "gather_with_grad": with_grad, "cache_labels": True, "rank": rank}
        reference = theirs.CoCaLoss(2.0, 0.5, **options, world_size=world)
        expected = results(reference, here, labels.split(PAIRS)[rank])
        for ours in (CoCaLoss(2.0, 0.5, **options, world_size=world), replace_loss(reference)):
            assert type(ours) is CoCaLoss
            found = results(ours, here, labels.split(PAIRS)[rank])
            for name, one, other in zip(("contrastive", "caption", *NAMES), found, expected, strict=True):
                if local and name == "logit_scale":
                    one, other = (_mean(x, world) for x in (one, other))
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def _mean(x: Tensor, world: int) -> Tensor:
    if world == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world
