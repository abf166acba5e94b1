"""`ClipLoss` and `SigLipLoss` on ranks: beside open_clip's own modules, and with ranks on which those fail."""

from __future__ import annotations

import inspect
from typing import Any

import losses_on_ranks
import open_clip_loop
import pytest
import ranks
from open_clip_loss import open_clip, why_not

from mmkernels.nn import ClipLoss, SigLipLoss

needs_open_clip = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@needs_open_clip
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_beside_open_clip(world: int) -> None:
    ranks.run(world, losses_on_ranks.beside_open_clip, world)


@needs_open_clip
def test_in_open_clips_training_loop() -> None:
    """An epoch of `train_one_epoch` of the release, under DDP, ends with the same weights."""
    for found in ranks.run(2, open_clip_loop.trained, 2):
        assert list(found) == list(open_clip_loop.OPTIONS)
        assert max(found.values()) <= 2e-6, found


@pytest.mark.parametrize("sizes", [[7, 2], [5, 0, 6]], ids=str)
def test_ranks_may_differ_in_pairs(sizes: list[int]) -> None:
    found = ranks.run(len(sizes), losses_on_ranks.as_one_process, sizes)
    for value, expected in (values[0] for values in found):  # ClipLoss without local_loss
        assert value == pytest.approx(expected, rel=1e-12)
    if 0 in sizes:
        assert [value for value, _ in found[sizes.index(0)][1:]] == [0.0, 0.0]  # the share of no pairs


def test_compiled() -> None:
    ranks.run(2, losses_on_ranks.compiled, 2)


def test_as_open_clips_tasks_call_it() -> None:
    for keys in ranks.run(2, losses_on_ranks.tasks, 2):
        assert keys == ["contrastive_loss", "loss"]


def test_uneven_ranks_where_logits_are_built() -> None:
    for errors in ranks.run(2, losses_on_ranks.uneven_logits):
        assert errors == ["ranks must hold as many pairs where logits are built, got [3, 2]"] * 2


def test_ranks_must_be_those_of_the_group() -> None:
    for rank, errors in enumerate(ranks.run(2, losses_on_ranks.other_groups)):
        size = "world_size must be that of the default process group, 2, got 3"
        assert errors == [size, f"rank must be that of the default process group, {rank}, got {1 - rank}"] * 2


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_without_a_process_group(module: Any) -> None:
    loss = module(rank=1, world_size=2)
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be initialised where world_size is 2: call in"):
        loss(*losses_on_ranks.inputs([4]))
    for bad in (2, -1, True, 0.0):
        with pytest.raises(ValueError, match=f"rank must be 0 to 1, as world_size is 2; got {bad!r}"):
            module(rank=bad, world_size=2)


def test_horovod() -> None:
    with pytest.raises(ValueError, match="use_horovod must be False where world_size is above 1, got True: the exch"):
        ClipLoss(world_size=2, use_horovod=True)


@needs_open_clip
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_arguments_are_open_clips(name: str) -> None:
    """In their order and with their defaults; ours may take more."""
    theirs, ours = getattr(open_clip(), name), {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
    for method in ("__init__", "forward", "get_logits", "get_ground_truth", "_loss"):
        if not hasattr(theirs, method):
            continue
        want, found = (
            [(x.name, x.default) for x in inspect.signature(getattr(module, method)).parameters.values()]
            for module in (theirs, ours)
        )
        assert found[: len(want)] == want, method
