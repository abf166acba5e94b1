"""Ranks that disagree, have bad input, die or are late: each living rank gets a clear error in time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from group_tools import small_pieces
from torch import Tensor

import mmkernels
from mmkernels.runtime.group import GroupError

TIMEOUT = 3.0
_DIM = 8


def _call(rank: int, rows: int = 4, **change: Any) -> Tensor:
    """Returns `info_nce` of this rank's random features."""
    generator = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(rows, _DIM, generator=generator, requires_grad=True) for _ in range(2))
    arguments: dict[str, Any] = {"image": image, "text": text, "logit_scale": 10.0, "group": dist.group.WORLD}
    return mmkernels.info_nce(**(arguments | change))


def _changed(name: str, rank: int) -> dict[str, Any]:
    """Returns what rank 1 does otherwise than the others."""
    if rank != 1:
        all_others: dict[str, dict[str, Any]] = {
            "no ids": {"image_ids": torch.arange(4)},
            "backend": {"return_stats": True, "backend": "chunked"},
        }
        return all_others.get(name, {})
    return {
        "channels": lambda: {"image": torch.randn(4, 6), "text": torch.randn(4, 6)},
        "dtype": lambda: {"image": torch.randn(4, _DIM).double(), "text": torch.randn(4, _DIM).double()},
        "label_smoothing": lambda: {"label_smoothing": 0.1},
        "image_weight": lambda: {"image_weight": 0.25},
        "reduction": lambda: {"reduction": "sum"},
        "return_stats": lambda: {"return_stats": True},
        "logit_scale": lambda: {"logit_scale": 11.0},
        "ids": lambda: {"image_ids": torch.arange(4)},
        "no ids": lambda: {},
        "queries": lambda: {"image": torch.randn(4, 3, _DIM)},
        "backend": lambda: {"return_stats": True, "backend": "reference"},
    }[name]()


def _disagree(rank: int, names: list[str]) -> list[str]:
    messages = []
    for name in names:
        with pytest.raises(ValueError) as caught:
            _call(rank, **_changed(name, rank))
        messages.append(str(caught.value))
    # The group can still be used, and an option may be said in another way.
    assert _call(rank, return_stats=torch.tensor(True) if rank else True)[0].isfinite()
    assert _call(rank, backend="chunked" if rank else "reference").isfinite()
    return messages


def test_ranks_that_disagree() -> None:
    said = {
        "channels": r"the number of channels must be the same on every rank .*, got 8 on rank 0 and 6 on rank 1",
        "dtype": r"the dtype must be the same .*'torch.float32' on rank 0 and 'torch.float64' on rank 1",
        "label_smoothing": r"label_smoothing must be the same .*, got 0.0 on rank 0 and 0.1 on rank 1",
        "image_weight": r"image_weight must be the same",
        "reduction": r"reduction must be the same .*, got 'mean' on rank 0 and 'sum' on rank 1",
        "return_stats": r"return_stats must be the same",
        "logit_scale": r"logit_scale must be the same .*, got 10.0 on rank 0 and 11.0 on rank 1",
        "ids": r"whether ids are given must be the same .*, got False on rank 0 and True on rank 1",
        "no ids": r"whether ids are given must be the same .*, got True on rank 0 and False on rank 1",
        "queries": r"the number of dims must be the same",
        "backend": r"the backend must be the same .*, got 'chunked' on rank 0 and 'reference' on rank 1",
    }
    first, *others = ranks.run(3, _disagree, list(said))
    assert all(messages == first for messages in others)
    for message, pattern in zip(first, said.values(), strict=True):
        assert re.search(pattern, message), message


def _bad_on_one(rank: int) -> list[str]:
    bad: list[dict[str, Any]] = [
        {"text": torch.randint(3, (4, _DIM))},
        {"text": torch.randn(5, _DIM)},
        {"same_id": "maybe"},
        {"same_id": 400 * "\U0001f600"},  # four bytes each
        {"return_stats": torch.zeros(2)},  # a RuntimeError of PyTorch
        {"label_smoothing": 2.0},
        {"logit_scale": "10"},
        {"image": None},
        {"backend": "triton"},
        {"hard_texts": torch.randn(2, 3)},
    ]
    messages = []
    for change in bad:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            _call(rank, **(change if rank == 2 else {}))
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    assert _call(rank).isfinite()
    return messages


def test_bad_input_of_one_rank() -> None:
    """That rank gets its own error, the others hear of it."""
    first, second, third = ranks.run(3, _bad_on_one)
    assert first == second
    for heard, own in zip(first, third, strict=True):
        assert heard.startswith("ValueError: info_nce, forward: rank 2 of the group has bad input: ")
        assert own[:100] in heard


def _transforms(rank: int) -> None:
    image, text = torch.randn(2, 4, _DIM)

    def loss(x: Tensor) -> Tensor:
        return mmkernels.info_nce(x, text, 10.0, group=dist.group.WORLD)

    for alone in (True, False):  # rank 0 alone, then all ranks
        if rank and alone:
            with pytest.raises(ValueError, match="rank 0 of the group has bad input: NotImplementedError"):
                loss(image)
        else:
            with pytest.raises(NotImplementedError, match="none in forward mode"):
                torch.func.jvp(loss, (image,), (image,))
    two = torch.vmap(loss)(torch.stack([image, 2 * image]))
    assert torch.equal(two, torch.stack([loss(image), loss(2 * image)]))
    grad = torch.func.grad(loss)(image)
    loss(image.requires_grad_()).backward()
    assert image.grad is not None and torch.equal(grad, image.grad)


def test_transforms() -> None:
    """Derivatives in forward mode are refused before ranks wait for each other."""
    ranks.run(2, _transforms)


def _other_call(rank: int) -> str:
    features = torch.randn(3, _DIM)
    ops = (partial(mmkernels.sigmoid_contrastive, logit_bias=-5.0), mmkernels.info_nce)
    with pytest.raises(ValueError, match="call must be the same") as caught:
        ops[rank](features, features, 10.0, group=dist.group.WORLD)
    return str(caught.value)


def test_ranks_that_call_different_ops() -> None:
    assert "'sigmoid_contrastive' on rank 0 and 'info_nce, forward' on rank 1" in ranks.run(2, _other_call)[0]


def _nothing(rank: int) -> None:
    with pytest.raises(ValueError, match="together must have an image and a text"):
        _call(rank, rows=0)
    empty = torch.randn(0, _DIM)
    with pytest.raises(ValueError, match="must have an image and a text at least, got 0 images and 2 texts"):
        mmkernels.info_nce(
            empty,
            torch.randn(1, _DIM),
            10.0,
            image_ids=torch.arange(0),
            text_ids=torch.arange(1),
            group=dist.group.WORLD,
        )
    with pytest.raises(ValueError, match="together must have an image and a text"):
        mmkernels.sigmoid_contrastive(empty, empty, 10.0, -5.0, group=dist.group.WORLD)
    query, target = torch.randn(2, _DIM), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="gallery must have an item on one rank at least, got none"):
        mmkernels.retrieval_ranks(query, empty, target, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"target must be from 0 to 3, .*, got 0 to 4 on rank 1"):
        mmkernels.retrieval_ranks(query, query, target + torch.tensor([0, 4 * rank]), group=dist.group.WORLD)
    assert mmkernels.retrieval_ranks(empty, empty, target[:0], group=dist.group.WORLD).shape == (0,)


def test_no_rows_at_all() -> None:
    ranks.run(2, _nothing)


def _nan(rank: int) -> list[float]:
    image = torch.randn(4, _DIM)
    if rank == 1:
        image[2, 3] = torch.nan
    loss, stats = _call(rank, image=image.requires_grad_(), return_stats=True)
    loss.backward()
    assert image.grad is not None
    rows = [float(x) for x in _call(rank, image=image, reduction="none")[0]]
    return [float(loss), float(stats.image_mean_rank), float(image.grad.isnan().any()), *rows]


def test_nan_on_one_rank() -> None:
    """The loss of all is NaN, as of one process; rows that do not see it are not."""
    first, second = ranks.run(2, _nan)
    for loss, mean_rank, nan_gradient, *_ in (first, second):
        assert loss != loss and mean_rank == mean_rank and nan_gradient == 1.0
    assert all(x == x for x in first[3:])
    assert [x != x for x in second[3:]] == [False, False, True, False]


def _one_id(rank: int) -> None:
    """Of a row all texts but its own are hidden: whole blocks, and one class is left."""
    image = torch.randn(4, _DIM, requires_grad=True)
    with small_pieces(1, 2):
        loss = _call(rank, image=image, image_ids=torch.zeros(4, dtype=torch.int64), same_id="ignore")
        loss.backward()
    assert image.grad is not None and float(loss.detach()) == 0.0 and not image.grad.any()


def test_all_texts_but_one_hidden() -> None:
    ranks.run(3, _one_id)


def _nan_query(rank: int) -> list[int]:
    query, gallery = torch.eye(4), torch.eye(4)
    if rank == 1:
        query[2, 1] = torch.nan
    return mmkernels.retrieval_ranks(query, gallery, torch.arange(4), group=dist.group.WORLD).tolist()


def test_nan_in_a_query_of_one_rank() -> None:
    assert ranks.run(2, _nan_query) == [[0, 0, 0, 0], [0, 0, 7, 0]]


def _subgroup(rank: int) -> tuple[str, float]:
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        with pytest.raises(ValueError, match="this process is not a member") as caught:
            _call(rank, group=group)
        return str(caught.value), 0.0
    return "", float(_call(rank, group=group))


def test_a_subgroup() -> None:
    found = ranks.run(4, _subgroup)
    features = [torch.cat([torch.randn(4, _DIM, generator=g) for g in pair]) for pair in _twice(_generators())]
    whole = mmkernels.info_nce(*features, 10.0)
    assert found[1] == found[3] and found[0][0] == found[2][0] != ""
    torch.testing.assert_close(torch.tensor(found[1][1]), whole)


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(rank) for rank in (1, 3)]


def _twice(generators: list[torch.Generator]) -> list[list[torch.Generator]]:
    return [generators, generators]  # images first, then texts, of the same generators


def _destroyed(rank: int) -> None:
    group = dist.group.WORLD
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="group must be initialised"):
        _call(rank, group=group)


def _destroyed_before_backward(rank: int) -> None:
    loss = _call(rank)
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(GroupError, match="backward: the process group '0' has been destroyed since forward"):
        loss.backward()


def test_no_group() -> None:
    ranks.run(1, _destroyed)
    ranks.run(2, _destroyed_before_backward)
    features = torch.randn(3, _DIM)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup .*, got str"):
        mmkernels.info_nce(features, features, 10.0, group="world")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"group must be .*, got bool"):
        mmkernels.retrieval_ranks(features, features, torch.arange(3), group=True)  # type: ignore[arg-type]


# Deaths and delays.


def _at_exchange(number: int, act: Callable[[], None]) -> None:
    """Call `act` when this process begins its exchange of that number."""
    exchange, count = dist.batch_isend_irecv, 0

    def counting(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return exchange(*args)

    dist.batch_isend_irecv = counting


def _dies(rank: int, op: str, number: int) -> None:
    """A forward pass has 5 exchanges on 3 ranks, so that a larger number is in the backward pass."""
    if rank == 1:
        _at_exchange(number, lambda: os._exit(1))
    _step(rank, op)


def _step(rank: int, op: str) -> None:
    if op == "info_nce":
        _call(rank).backward()
        return
    features = torch.randn(4, _DIM, requires_grad=True)
    if op == "sigmoid_contrastive":
        mmkernels.sigmoid_contrastive(features, features, 10.0, -5.0, group=dist.group.WORLD).backward()
    else:
        mmkernels.retrieval_ranks(features, features, torch.arange(4), group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("op", "number"),
    [("info_nce", 1), ("info_nce", 4), ("info_nce", 7), ("sigmoid_contrastive", 2), ("retrieval_ranks", 3)],
)
def test_a_rank_dies(op: str, number: int) -> None:
    ended = ranks.outcomes(3, _dies, op, number, timeout=TIMEOUT)
    assert ended[1].died
    for rank in (0, 2):
        _assert_clear(ended[rank], rank, op)
        assert ended[rank].seconds < TIMEOUT + 2.0


def _assert_clear(outcome: ranks.Outcome, rank: int, op: str) -> None:
    assert isinstance(outcome.error, GroupError), outcome
    message = str(outcome.error)
    assert message.startswith(op) and f"rank {rank} of 3 waited for" in message and "has died, is late" in message


def _is_late(rank: int) -> None:
    if rank == 1:
        _at_exchange(2, lambda: time.sleep(2 * TIMEOUT))
    _step(rank, "info_nce")


def test_a_rank_is_late() -> None:
    ended = ranks.outcomes(3, _is_late, timeout=TIMEOUT)
    for rank, outcome in enumerate(ended):
        _assert_clear(outcome, rank, "info_nce")
        assert outcome.seconds < 4 * TIMEOUT


def _no_backward(rank: int) -> None:
    loss = _call(rank)
    if rank:
        loss.backward()
    else:
        time.sleep(2 * TIMEOUT)


@pytest.mark.slow
def test_a_rank_does_not_go_backward() -> None:
    first, *others = ranks.outcomes(3, _no_backward, timeout=TIMEOUT)
    assert first.error is None
    for rank, outcome in enumerate(others, 1):
        _assert_clear(outcome, rank, "info_nce, backward")
