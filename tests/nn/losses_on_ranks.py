"""What each rank does in the tests of `ClipLoss` and `SigLipLoss` on ranks; see `ranks.run`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip_loss import open_clip
from torch import Tensor

from mmkernels.nn import ClipLoss, SigLipLoss
from mmkernels.nn.contrastive import _EXCHANGES

SHARING = [{"local_loss": x, "gather_with_grad": y} for x, y in itertools.product((False, True), repeat=2)]
NAMES = ("loss", "image", "text", "logit_scale", "logit_bias")


class Sub(ClipLoss):
    """Replaces a method, so that logits are built."""

    def get_logits(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return super().get_logits(*args, **options)


class SubSig(SigLipLoss):
    """Replaces a method, so that logits are built."""

    def get_ground_truth(self, *args: Any, **options: Any) -> Tensor:
        return super().get_ground_truth(*args, **options)


def inputs(sizes: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Returns features of all ranks, the scale and the bias."""
    generator = torch.Generator().manual_seed(sum(sizes))
    image = torch.randn(sum(sizes), 12, generator=generator, dtype=torch.float64)
    text = image + torch.randn(sum(sizes), 12, generator=generator, dtype=torch.float64)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (9.0, -3.0)]
    return [x.to(dtype) for x in (F.normalize(image, dim=1), F.normalize(text, dim=1), *scalars)]


def results(loss: Callable[..., Tensor], given: list[Tensor], sizes: list[int] | None = None) -> dict[str, Tensor]:
    """Returns the loss and its gradients; with sizes those of this rank's rows."""
    if sizes is not None:
        given = [x.split(sizes)[dist.get_rank()] if x.dim() else x for x in given]
    leaves = [x.clone().requires_grad_() for x in given]
    value = loss(*leaves)
    value.backward()
    return dict(zip(NAMES, (value.detach(), *(x.grad for x in leaves)), strict=True))  # type: ignore[arg-type]


def average(found: dict[str, Tensor], *names: str) -> None:
    """Averages over ranks, as DDP does with gradients."""
    for name in names:
        found[name] = found[name].clone()
        dist.all_reduce(found[name])
        found[name] /= dist.get_world_size()


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], what: Any) -> None:
    """To 1e-12 of the largest; a bias in a softmax has a gradient of 0, which open_clip's only rounds to."""
    for name, want in expected.items():
        apart = float((actual[name] - want).abs().max()) if want.numel() else 0.0
        size = float(want.abs().max()) if want.numel() else 0.0
        assert actual[name].shape == want.shape, f"{what} {name}"
        assert apart <= 1e-12 * max(size, 1e-3), f"{what} {name}: {apart} of {size}"


def beside_open_clip(rank: int, world: int) -> None:
    """Values and gradients on each rank. With `local_loss` only the average of the scale's is the same."""
    theirs, sizes = open_clip(), [5] * world
    common = {"rank": rank, "world_size": world, "cache_labels": True}
    for sharing in SHARING:
        averaged = ["logit_scale"] if sharing["local_loss"] else []
        expected = results(theirs.ClipLoss(**common, **sharing), inputs(sizes), sizes)
        average(expected, *averaged)
        for module in (ClipLoss, Sub):
            found = results(module(**common, **sharing), inputs(sizes), sizes)
            average(found, *averaged)
            compare(found, expected, (module, sharing))
        if sharing["gather_with_grad"]:
            teacher = [x.flip(0) for x in inputs(sizes)[:2]]
            teacher = [x.split(sizes)[rank] for x in teacher]
            distilled = type("Distilled", (Sub,), dict(theirs.DistillClipLoss.__dict__))
            one, other = (
                results(lambda i, t, s, b, m=m: sum(m(i, t, s, *teacher, 5.0)) + 0 * b, inputs(sizes), sizes)  # noqa: B023
                for m in (distilled(**common, **sharing), theirs.DistillClipLoss(**common, **sharing))
            )
            compare(one, other, ("distillation", sharing))
    for dist_impl in _EXCHANGES:
        expected = results(theirs.SigLipLoss(**common, dist_impl=dist_impl), inputs(sizes), sizes)
        for kind in (SigLipLoss, SubSig):
            found = results(kind(**common, dist_impl=dist_impl), inputs(sizes), sizes)
            compare(found, expected, (kind, dist_impl))


def as_one_process(rank: int, sizes: list[int]) -> list[tuple[float, float]]:
    """Ranks with different numbers of pairs, or none: the average over ranks is what one process has.

    Returns:
        the value of each loss on this rank, and that of all pairs.
    """
    world, given, values = len(sizes), inputs(sizes), []
    common = {"rank": rank, "world_size": world}
    losses: list[Any] = [ClipLoss(**common, **sharing) for sharing in SHARING if sharing["gather_with_grad"]]
    for loss in (*losses, SigLipLoss(**common)):
        expected = results(type(loss)(), given)
        found = results(loss, given, sizes)
        values.append((float(found["loss"]), float(expected["loss"])))
        for name in ("image", "text"):  # a rank's rows of one process's gradient, which DDP's average divides by W
            found[name] = found[name] / world
            expected[name] = expected[name].split(sizes)[rank]
        average(found, "loss", "logit_scale", "logit_bias")
        compare(found, expected, (type(loss), sizes))
    return values


def uneven_logits(rank: int) -> list[str]:
    """Returns the errors of subclasses that build logits."""
    sizes, found = [3, 2], []
    for loss in (Sub(rank=rank, world_size=2), SubSig(rank=rank, world_size=2)):
        try:
            results(loss, inputs(sizes), sizes)
        except ValueError as error:
            found.append(str(error))
    return found


def other_groups(rank: int) -> list[str]:
    """Returns the errors of losses that were told of other ranks than there are."""
    found = []
    for loss in (ClipLoss, SigLipLoss):
        for told in ({"rank": rank, "world_size": 3}, {"rank": 1 - rank, "world_size": 2}):
            try:
                loss(**told)(*inputs([4]))
            except ValueError as error:
                found.append(str(error))
    return found


def compiled(rank: int, world: int) -> None:
    """In one graph, without a break."""
    sizes, common = [5] * world, {"rank": rank, "world_size": world}
    losses: list[Any] = [ClipLoss(**common, **sharing) for sharing in SHARING[::3]]  # with neither option, with both
    for loss in (*losses, SigLipLoss(**common)):
        torch._dynamo.reset()
        in_one = torch.compile(loss, backend="aot_eager", fullgraph=True)
        compare(results(in_one, inputs(sizes), sizes), results(loss, inputs(sizes), sizes), loss)


def tasks(rank: int, world: int) -> list[str]:
    """Calls as open_clip's training tasks (4.x) make them, and gradient accumulation over two batches.

    Returns:
        the keys of the losses.
    """
    sizes = [4] * world
    image, text, scale, bias = inputs(sizes)
    here = [x.split(sizes)[rank].clone().requires_grad_() for x in (image, text)]
    scale = scale[None].requires_grad_()  # FSDP2 shards no parameter without a dim
    model_out = {"image_features": here[0], "text_features": here[1], "logit_scale": scale, "logit_bias": bias}
    loss = ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world, use_horovod=False
    )
    losses = loss(**model_out, output_dict=True)
    total = sum(value for key, value in losses.items() if key.endswith("_loss"))
    losses["loss"] = total
    total.backward()
    want = here[0].grad.clone()  # type: ignore[union-attr]
    found = []
    for part in range(2):  # each with a graph, beside the features of the other one, which have none
        parts = [list(x.detach().split(2)) for x in here]
        for x in parts:
            x[part].requires_grad_()
        features = dict(zip(("image_features", "text_features"), map(torch.cat, parts), strict=True))
        loss(**features, logit_scale=scale, logit_bias=bias, output_dict=True)["contrastive_loss"].backward()
        found.append(parts[0][part].grad)
    torch.testing.assert_close(torch.cat(found), want, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]
    return list(losses)
