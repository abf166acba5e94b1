"""Training steps on several ranks: gradients of models, bytes on the wire, autocast, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from group_tools import small_pieces
from harness import peak_of
from test_contrastive_groups import assert_equal
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmkernels
from mmkernels.meters import memory_why_not

_IN, _DIM = 10, 6
_COUNTS = {2: (5, 3), 3: (4, 0, 6), 4: (3, 1, 0, 5)}


class Towers(nn.Module):
    """Two encoders, a temperature and a bias. FSDP2 shards parameters along a dim, so these have one."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(_IN, 12), nn.Tanh(), nn.Linear(12, _DIM)) for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor([2.0]))
        self.bias = nn.Parameter(torch.tensor([-3.0]))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_image, of_text = F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)
        return of_image, of_text, self.temperature.exp(), self.bias


def _towers(dtype: torch.dtype) -> Towers:
    torch.manual_seed(0)
    return Towers().to(dtype)


def _batch(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(count, _IN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return image, text


def _loss(op: str, outputs: tuple[Tensor, ...], group: Any = None) -> Tensor:
    image, text, scale, bias = outputs
    if op == "info_nce":
        # In the graph, or DDP waits for the bias's gradient in vain.
        return mmkernels.info_nce(image, text, scale, group=group) + 0.0 * bias.sum()
    return mmkernels.sigmoid_contrastive(image, text, scale, bias, group=group)


def _ddp(model: Towers) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: Towers) -> nn.Module:
    for part in (model.image, model.text, model):
        fully_shard(part)
    return model


def _averaged_by_hand(model: Towers) -> nn.Module:
    return model


WRAPPERS: dict[str, Callable[[Towers], nn.Module]] = {"DDP": _ddp, "FSDP2": _fsdp, "none": _averaged_by_hand}


OPS = ("info_nce", "sigmoid_contrastive")


def _train_all(rank: int, dtype: torch.dtype, counts: tuple[int, ...]) -> dict[str, dict[str, Tensor]]:
    return {f"{op} / {wrapper}": _train(rank, op, wrapper, dtype, counts) for op in OPS for wrapper in WRAPPERS}


def _train(rank: int, op: str, wrapper: str, dtype: torch.dtype, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns the gradients after two steps' accumulation: whole ones, on each rank."""
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    image, text = _batch(sum(counts), dtype)
    plain = _towers(dtype)
    model = WRAPPERS[wrapper](plain)
    losses = []
    for factor in (1.0, 0.5):
        loss = _loss(op, model(factor * image[rows], text[rows]), dist.group.WORLD)
        loss.backward()
        losses.append(loss.detach())
    grads = {"losses": torch.stack(losses)}
    for name, parameter in plain.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if wrapper == "FSDP2":
            grad = grad.full_tensor()  # type: ignore[attr-defined]
        elif wrapper == "none" and name != "temperature" and name != "bias":
            # The docstring's rule: sum over ranks, divide by their number; the temperature's is right as it is.
            dist.all_reduce(grad)
            grad = grad / len(counts)
        grads[name] = grad
    return grads


@pytest.mark.parametrize("world", list(_COUNTS))
def test_parameters_gradients(world: int) -> None:
    """Those of one process with the whole batch, to 1e-12; temperature and bias too, and with a rank without data."""
    dtype, counts = torch.float64, _COUNTS[world]
    image, text = _batch(sum(counts), dtype)
    whole = {}
    for op in OPS:
        model = _towers(dtype)
        losses = [_loss(op, model(factor * image, text)) for factor in (1.0, 0.5)]
        torch.autograd.backward(losses)
        whole[op] = {"losses": torch.stack(losses).detach()}
        whole[op] |= {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    for rank, found in enumerate(ranks.run(world, _train_all, dtype, counts)):
        for what, grads in found.items():
            right = whole[what.partition(" ")[0]]
            assert grads.keys() == right.keys()
            for name, grad in grads.items():
                assert_equal(grad, right[name], 1e-12, f"{what} / rank {rank} of {world} / {name}")


# Ranks that differ in what they want.

_FLOWS = (1.0, 0.5, 3.0)  # what flows back to the loss on each rank
_FEATURES_WANTED = ((True, True), (False, True), (True, False))  # whether image's and text's gradients are
_HARD_RANK, _SCALE_NUMBER = 2, 1


def _unlike_parts() -> dict[str, list[Tensor]]:
    """Returns features of each rank, float64; hard texts of one rank."""
    generator = torch.Generator().manual_seed(2)
    counts = {"image": (4, 2, 3), "text": (4, 2, 3), "hard": (0, 0, 5)}
    return {
        name: list(torch.randn(sum(rows), 8, generator=generator, dtype=torch.float64).split(rows))
        for name, rows in counts.items()
    }


def _unlike(rank: int, op: str) -> dict[str, Tensor]:
    parts = _unlike_parts()
    image, text = (
        parts[name][rank].requires_grad_(wanted)
        for name, wanted in zip(("image", "text"), _FEATURES_WANTED[rank], strict=True)
    )
    hard = parts["hard"][rank].requires_grad_() if rank == _HARD_RANK else None
    scale: Any = 3.0 if rank == _SCALE_NUMBER else torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    if op == "info_nce":
        loss = mmkernels.info_nce(image, text, scale, hard_texts=hard, group=dist.group.WORLD)
    else:
        loss = mmkernels.sigmoid_contrastive(image, text, scale, -1.0, group=dist.group.WORLD)
    leaves = {"image": image, "text": text, "scale": scale, "hard": hard if op == "info_nce" else None}
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    (_FLOWS[rank] * loss).backward()
    grads = {name: x.grad for name, x in wanted.items() if x.grad is not None}
    assert grads.keys() == wanted.keys()
    return grads


@pytest.mark.parametrize("op", OPS)
def test_ranks_that_differ_in_what_they_want(op: str) -> None:
    """Unequal upstream gradients, frozen towers, a scale that is a number, and hard texts, each on some ranks only."""
    parts = _unlike_parts()
    image, text, hard = (torch.cat(parts[name]).requires_grad_() for name in ("image", "text", "hard"))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    logits, diagonal = scale * image @ text.mT, torch.arange(len(image))
    if op == "info_nce":
        unseen = torch.ones(len(image), 1, dtype=torch.bool)
        unseen[-len(parts["image"][_HARD_RANK]) :] = False
        more = (scale * image @ hard.mT).masked_fill(unseen, -torch.inf)
        loss = (F.cross_entropy(torch.cat([logits, more], 1), diagonal) + F.cross_entropy(logits.mT, diagonal)) / 2
    else:
        signs = 2 * torch.eye(len(image), dtype=torch.float64) - 1
        loss = -F.logsigmoid(signs * (logits - 1.0)).sum() / len(image)
    loss.backward()
    flow = sum(_FLOWS)
    for rank, grads in enumerate(ranks.run(3, _unlike, op)):
        for name, grad in grads.items():
            whole = {"image": image, "text": text, "hard": hard, "scale": scale}[name].grad
            assert whole is not None
            if name == "scale":
                right = whole * flow / 3
            else:
                right = whole.split([len(x) for x in parts[name]])[rank] * flow
            assert_equal(grad, right, 1e-12, f"{op} / rank {rank} / {name}")


# Bytes on the wire.


def _sent(rank: int, op: str, rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns the bytes that a rank sends to its neighbour in a step, and those of what it gathers."""
    exchange, gather, sent, gathered = dist.batch_isend_irecv, dist.all_gather, 0, 0

    def counting_exchange(plan: list[Any]) -> Any:
        nonlocal sent
        sent += sum(item.tensor.nbytes for item in plan if item.op is dist.isend)
        return exchange(plan)

    def counting_gather(found: list[Tensor], x: Tensor, **more: Any) -> Any:
        nonlocal gathered
        gathered += x.nbytes * (len(found) - 1)
        return gather(found, x, **more)

    dist.batch_isend_irecv, dist.all_gather = counting_exchange, counting_gather
    image, text = (torch.randn(rows, dim).to(dtype).requires_grad_() for _ in range(2))
    _loss(op, (image, text, torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0)), dist.group.WORLD).backward()
    return sent, gathered


@pytest.mark.parametrize(
    ("op", "dtype", "row_bytes"),
    [
        ("info_nce", torch.bfloat16, 8),  # texts twice, and their gradient in float32
        ("info_nce", torch.float32, 12),
        ("sigmoid_contrastive", torch.bfloat16, 6),  # texts once
    ],
)
def test_bytes_that_a_rank_sends(op: str, dtype: torch.dtype, row_bytes: int) -> None:
    """At most 8 n W d in bfloat16, and 64 bytes for each of n W rows: its sums, its state and its upstream gradient."""
    world, rows, dim = 4, 3000, 128
    for sent, gathered in ranks.run(world, _sent, op, rows, dim, dtype):
        least = (row_bytes * world - (row_bytes - 4)) * rows * dim  # texts do not travel home, gradients do
        assert least <= sent <= row_bytes * rows * world * dim + 64 * rows * world
        assert gathered < 20_000


# Memory.

_ROWS, _WIDE = 1024, 512


def _peak(rank: int, op: str) -> int:
    """Returns the bytes that a step takes at its peak above its inputs; gradients are in them."""

    def step(rows: int) -> None:
        outputs = (image[:rows], text[:rows], torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0))
        torch.autograd.grad(_loss(op, outputs, dist.group.WORLD), outputs[:2])

    image, text = (torch.randn(_ROWS, _WIDE, requires_grad=True) for _ in range(2))
    with small_pieces(64, 256):
        return peak_of(lambda: step(_ROWS), first=lambda: step(100))


@pytest.mark.parametrize("op", OPS)
def test_memory_of_a_rank(op: str) -> None:
    """At most two blocks of features and some scratch above the gradients: three more were those of all ranks."""
    if (why_not := memory_why_not()) is not None:
        pytest.skip(why_not)
    block = _ROWS * _WIDE * 4
    for peak in ranks.run(4, _peak, op):
        assert 2 * block <= peak < 4 * block + 3_000_000, peak / block


# How it is called.


def _under_autocast(rank: int) -> tuple[str, float]:
    torch.manual_seed(rank)
    image, text = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mmkernels.info_nce(image, text, 10.0, group=dist.group.WORLD)
    loss.backward()
    assert image.grad is not None and image.grad.dtype == torch.float32
    same = mmkernels.info_nce(image.bfloat16(), text.bfloat16(), 10.0, group=dist.group.WORLD)
    return str(loss.dtype), float((loss - same).detach())


def test_autocast() -> None:
    assert ranks.run(2, _under_autocast) == [("torch.float32", 0.0)] * 2


def _in_a_graph(rank: int) -> list[float]:
    torch.manual_seed(rank)
    image, text = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)

    def step(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return mmkernels.info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, group=dist.group.WORLD)

    errors = []
    eager = torch.autograd.grad(step(image, text, scale), (image, text, scale))
    graph = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, right in zip(torch.autograd.grad(graph(image, text, scale), (image, text, scale)), eager, strict=True):
        errors.append(float((ours - right).abs().max()))
    return errors


def test_in_a_graph() -> None:
    for errors in ranks.run(2, _in_a_graph):
        assert max(errors) < 1e-6


def _twice(rank: int) -> None:
    image = torch.randn(4, 8, requires_grad=True)
    loss = mmkernels.info_nce(image, image, 10.0, group=dist.group.WORLD)
    (grad,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


def test_second_derivatives_are_refused() -> None:
    ranks.run(2, _twice)
