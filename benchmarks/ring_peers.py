"""What each rank of the ring's benchmark runs: the ring, open_clip's gather, and on rank 0 one process with all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
import torch.nn.functional as F
from torch import Tensor

from mmkernels import info_nce
from mmkernels.meters import peak_memory
from mmkernels.ops.contrastive.info_nce.spec import SPEC
from mmkernels.options import DTYPES
from mmkernels.targets import OURS

GATHER, GATHER_LOCAL, ONE = "open_clip", "open_clip local", "one process"
SCALE = 50.0

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure_beside(pairs: int, dim: int, dtype: str, rounds: int, cores: int) -> dict[str, Any]:
    """Returns what one rank measured of all candidates: seconds, CPU seconds, peak bytes above inputs and gradients.

    Args:
        pairs: of each rank.
        rounds: of which each candidate has one call.
        cores: threads of the one process that has all pairs, so that both use the whole machine.
    """
    image, text, scale = _leaves(dist.get_rank(), pairs, dim, dtype)
    losses: dict[str, Losses] = {OURS: ring, GATHER: gather, GATHER_LOCAL: gather_local}
    runs = {name: _step(loss, image, text, scale) for name, loss in losses.items()}
    wrong = _wrong(runs[OURS](), pairs, dim, dtype)
    memory, seconds, cpu = {}, {name: [] for name in runs}, {name: [] for name in (*runs, ONE)}
    for name, run in runs.items():
        if name != OURS:
            run()
        dist.barrier()
        memory[name] = _extra(peak_memory(run), image, text)
    whole = _one_process(pairs, dim, dtype, cores) if dist.get_rank() == 0 else None
    for _ in range(rounds):
        for name, run in runs.items():
            dist.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(time.process_time() - busy)
            dist.barrier()
            seconds[name].append(time.perf_counter() - begin)
        if whole is not None:
            cpu[ONE].append(whole())
        dist.barrier()
    return {"wrong": wrong, "seconds": seconds, "cpu": cpu, "memory": memory}


def measure_alone(pairs: int, dim: int, dtype: str) -> dict[str, Any]:
    """Returns the same of the ring alone, of one call: so many pairs take minutes. Its results must be finite."""
    image, text, scale = _leaves(dist.get_rank(), pairs, dim, dtype)
    run, results = _step(ring, image, text, scale), list[Tensor]()
    dist.barrier()
    begin = time.perf_counter()
    memory = _extra(peak_memory(lambda: results.extend(run())), image, text)
    seconds = time.perf_counter() - begin
    wrong = None if all(bool(x.isfinite().all()) for x in results) else "not finite"
    return {"wrong": wrong, "seconds": {OURS: [seconds]}, "memory": {OURS: memory}}


def _extra(peak: int | None, image: Tensor, text: Tensor) -> float | None:
    """Returns the bytes above inputs and gradients, at least one."""
    return None if peak is None else max(float(peak - image.nbytes - text.nbytes), 1.0)


def ring(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    loss: Tensor = info_nce(image, text, scale, group=dist.group.WORLD)
    return loss


def gather(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's loss with ``gather_with_grad``: every rank computes the logits of all pairs."""
    images, texts = _gathered(image), _gathered(text)
    logits, labels = scale * images @ texts.T, torch.arange(len(images))
    return _wide(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gather_local(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same with ``local_loss``: the logits of this rank's rows alone."""
    images, texts = _gathered(image), _gathered(text)
    labels = torch.arange(len(image)) + len(image) * dist.get_rank()
    of_images, of_texts = scale * image @ texts.T, scale * text @ images.T
    return _wide(F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2


def _gathered(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip calls it too
        return torch.cat(collectives.all_gather(x))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _leaves(rank: int, pairs: int, dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randn(2, pairs, dim, generator=generator)
    image, text = (F.normalize(x, dim=1).to(DTYPES[dtype]).requires_grad_() for x in drawn)
    return image, text, torch.tensor(SCALE, requires_grad=True)


def _all_leaves(pairs: int, dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pairs of all ranks."""
    parts = [_leaves(rank, pairs, dim, dtype) for rank in range(dist.get_world_size())]
    image, text = (torch.cat([part[side].detach() for part in parts]).requires_grad_() for side in (0, 1))
    return image, text, torch.tensor(SCALE, requires_grad=True)


def _step(loss: Losses, image: Tensor, text: Tensor, scale: Tensor) -> Callable[[], list[Tensor]]:
    """Returns a call of the loss and its gradients."""

    def run() -> list[Tensor]:
        value = loss(image, text, scale)
        return [value.detach(), *torch.autograd.grad(value, (image, text, scale))]

    return run


def _one_process(pairs: int, dim: int, dtype: str, cores: int) -> Callable[[], float]:
    """Returns a call that gives the CPU seconds of a step over all pairs by this process alone."""
    run = _step(info_nce, *_all_leaves(pairs, dim, dtype))

    def timed() -> float:
        torch.set_num_threads(cores)
        busy = time.process_time()
        run()
        busy = time.process_time() - busy
        torch.set_num_threads(1)
        return busy

    timed()
    return timed


def _wrong(results: list[Tensor], pairs: int, dim: int, dtype: str) -> str | None:
    """Returns what is wrong with a rank's results, against the definition in float64 of all pairs."""
    ranks = dist.get_world_size()
    expected = [_expected(pairs, dim, dtype, wide=wide) for wide in (False, True)]
    for name, ours, naive, true in zip(("loss", "image", "text", "scale"), results, *expected, strict=True):
        share = slice(dist.get_rank() * pairs, (dist.get_rank() + 1) * pairs)
        if name in ("image", "text"):  # gradients of features are those of the sum over ranks
            naive, true = ranks * naive[share], ranks * true[share]
        problem = SPEC.over_budget(ours, naive, true)
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _expected(pairs: int, dim: int, dtype: str, *, wide: bool) -> list[Tensor]:
    """Returns what one process makes of all pairs: rank 0 computes it, and tells the others."""
    image, text, scale = _all_leaves(pairs, dim, dtype)
    if wide:
        image, text, scale = (x.detach().double().requires_grad_() for x in (image, text, scale))
    results = [
        image.new_empty((), dtype=torch.float64 if wide else torch.float32),
        *map(torch.empty_like, (image, text, scale)),
    ]
    if dist.get_rank() == 0:
        loss = info_nce(image, text, scale, backend="chunked" if wide else "reference")
        results = [loss.detach(), *torch.autograd.grad(loss, (image, text, scale))]
    results = [x.detach().contiguous() for x in results]
    for x in results:
        dist.broadcast(x, 0)
    return results
