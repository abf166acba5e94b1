"""What each rank does in the tests of `CachedContrastive` on ranks; see `ranks.run`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cached_tools import Model, assert_equal, batch, grads, one_pass
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmkernels
from mmkernels.nn import CachedContrastive
from mmkernels.nn.data_parallel import DataParallel

CHUNKS = (4, 3)
DDP = ("towers", "one", "unused", "view", "methods")
FSDP = ("flat", "towers", "one", "temperature")


class Both(nn.Module):
    """Two towers behind one `forward`, as a wrapper needs it, and a parameter that nothing uses."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.spare = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("rank", torch.tensor(float(dist.get_rank())))

    def forward(self, pixels: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        if pixels is not None:
            return self.model.encode_image(pixels)
        assert tokens is not None
        return self.model.encode_text(tokens)


def loss_of(model: Model, sigmoid: bool = False) -> Callable[..., Tensor]:
    group = dist.group.WORLD

    def loss(image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        scale = model.log_scale  # a DTensor where it is sharded, and not gathered
        scale = (scale.full_tensor() if isinstance(scale, DTensor) else scale).reshape(()).exp()
        if sigmoid:
            return mmkernels.sigmoid_contrastive(image, text, scale, model.bias, group=group)
        found: Tensor = mmkernels.info_nce(image, text, scale, group=group)
        return found

    return loss


def truth(sizes: list[int], sigmoid: bool = False) -> tuple[Model, list[Tensor], dict[str, Tensor]]:
    """Returns a model, this rank's inputs, and the gradients of one process with all of them."""
    torch.manual_seed(0)
    model, inputs = Model(0.0), batch(sum(sizes))
    whole = copy.deepcopy(model)
    (whole.sigmoid if sigmoid else whole.info_nce)(
        whole.encode_image(inputs[0]), whole.encode_text(inputs[1])
    ).backward()
    return model, [x.split(sizes)[dist.get_rank()] for x in inputs], grads(whole)


def wrapped(kind: str, model: Model) -> tuple[list[nn.Module], list[Callable[..., Tensor]]]:
    """Returns DDP modules, and the encoders."""
    if kind == "towers":
        towers: list[Any] = [DistributedDataParallel(model.image), DistributedDataParallel(model.text)]
        return towers, towers
    options = {"find_unused_parameters": kind == "unused", "gradient_as_bucket_view": kind == "view"}
    ddp = DistributedDataParallel(Both(model), **options)
    if kind == "methods":  # which DDP does not see
        return [ddp], [model.encode_image, model.encode_text]
    return [ddp], [lambda x: ddp(pixels=x), lambda x: ddp(tokens=x)]


def with_ddp(rank: int, sizes: list[int]) -> None:
    """Three steps, as DDP arranges its buckets anew after the first; then two that are accumulated."""
    for kind in DDP if len(sizes) < 4 else DDP[:2]:
        sigmoid = kind == "view"
        model, inputs, want = truth(sizes, sigmoid)
        modules, encoders = wrapped(kind, model)
        reductions: list[int] = []
        for module in modules:
            module.register_comm_hook(reductions, _noted)
        step = CachedContrastive(encoders, loss_of(model, sigmoid), chunk_size=CHUNKS, modules=modules)
        for _ in range(3):
            model.zero_grad()
            reductions.clear()
            with _counted("_broadcast_coalesced") as broadcasts:
                step(*inputs)
            assert len(reductions) == len(modules), kind  # each one's only bucket, once
            assert len(broadcasts) == (kind != "towers"), kind  # of buffers, which towers have none of
            assert_equal(_alike(model, want), want, what=kind)
        for module in modules:
            assert module.require_backward_grad_sync and module.require_forward_param_sync, kind
        if kind != "towers":
            (ddp,) = modules
            spare = ddp.module.spare.grad
            assert (spare is None) == (kind == "unused"), kind  # as with DDP alone
            assert float(ddp.module.rank) == 0.0, kind  # a buffer, which DDP copies from rank 0
            model.zero_grad()
            reductions.clear()
            with ddp.no_sync():
                step(*inputs)
            step(*inputs, sync=False)
            assert not reductions, kind
            step(*inputs, scale_loss=2.0)
            assert_equal(_alike(model, want), {name: 4 * x for name, x in want.items()}, what=kind)


def _noted(reductions, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    reductions.append(bucket.index())
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda x: x.value()[0] / dist.get_world_size())


def _alike(model: nn.Module, want: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients that one process has; others are 0, where DDP gives each parameter one."""
    found = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads(model).items()}
    assert all(not x.any() for name, x in found.items() if name not in want)
    return {name: x.reshape(want[name].shape) for name, x in found.items() if name in want}


def with_fsdp(rank: int, sizes: list[int]) -> None:
    """Ranks that hold fewer rows pass empty batches through their encoders."""
    mesh = init_device_mesh("cpu", (len(sizes),))
    reduce = next(x for x in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, x))  # by PyTorch's age
    for kind in FSDP if len(sizes) < 4 else FSDP[1:3]:
        model, inputs, want = truth(sizes)
        if kind in ("flat", "towers"):
            encoders: list[Any] = [model.image, model.text]
            modules: list[nn.Module] = []
            for tower in encoders:
                if kind == "towers":
                    fully_shard(tower[0], mesh=mesh)
                fully_shard(tower, mesh=mesh)
        else:
            both = Both(model)
            model.log_scale, model.bias = (nn.Parameter(x.data[None]) for x in (model.log_scale, model.bias))
            outside = set() if kind == "temperature" else {model.log_scale, model.bias}
            for module in (model.image, model.text, both):
                fully_shard(module, mesh=mesh, ignored_params=outside)
            encoders = [lambda x, both=both: both(pixels=x), lambda x, both=both: both(tokens=x)]
            modules = [both]
        options = {"chunk_size": CHUNKS, "modules": modules, "reduce_each_chunk": kind == "one"}
        step = CachedContrastive(encoders, loss_of(model), **options)
        most = [max(1, -(-max(sizes) // chunk)) for chunk in CHUNKS]
        for _ in range(2):
            model.zero_grad()
            with _counted(reduce) as reductions:
                step(*inputs)
            # Of each tower there are one or two groups of parameters, and one around them in which nothing is used.
            times = {"flat": 2, "towers": 2 * 2, "one": sum(most), "temperature": 2 + 1}[kind]
            assert len(reductions) == times, f"{kind}: {len(reductions)}"
            assert_equal(_alike(model, want), want, what=kind)
        model.zero_grad()
        with _counted(reduce) as reductions:
            step(*inputs, sync=False)
        assert not reductions, kind
        step(*inputs, scale_loss=2.0)
        assert_equal(_alike(model, want), {name: 3 * x for name, x in want.items()}, what=kind)
        with torch.no_grad():  # leaves the outermost modules' parameters gathered
            step(*inputs)
        model.zero_grad()
        step(*inputs)
        assert_equal(_alike(model, want), want, what=kind)
        step(*inputs, sync=False)
        with _counted(reduce) as reductions:  # a pass of the caller's own
            encoders[0](inputs[0]).sum().backward()
        assert reductions, kind


@contextmanager
def _counted(name: str) -> Iterator[list[Any]]:
    """Counts the calls of a function of torch.distributed."""
    found: list[Any] = []
    original = getattr(dist, name)
    setattr(dist, name, lambda *args, **options: (found.append(args), original(*args, **options))[1])
    try:
        yield found
    finally:
        setattr(dist, name, original)


def with_dropout(rank: int, sizes: list[int]) -> None:
    """Each rank draws its own; the same chunks in one graph, averaged by hand, draw the same."""
    model, inputs, _ = truth(sizes)
    model.image[2].p = model.text[1].p = 0.4
    encoders = [model.encode_image, model.encode_text]
    torch.manual_seed(rank)
    one_pass(encoders, loss_of(model), inputs, CHUNKS)
    want = grads(model)
    for x in want.values():
        dist.all_reduce(x)
        x /= len(sizes)
    model.zero_grad()
    ddp, _ = wrapped("one", model)
    torch.manual_seed(rank)
    CachedContrastive(encoders, loss_of(model), chunk_size=CHUNKS, modules=ddp, verify=True)(*inputs)
    assert_equal(_alike(model, want), want)


def with_what_does_not_work(rank: int) -> list[str]:
    """Returns the errors."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = []
    for module in (
        DistributedDataParallel(nn.Linear(2, 2), static_graph=True),
        FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")),
    ):
        try:
            CachedContrastive(module, lambda x: x.sum(), chunk_size=2)(torch.ones(4, 2))
        except ValueError as error:
            found.append(str(error))
    return found


def with_an_error(rank: int) -> None:
    """An encoder that fails in the second pass leaves no wrapper changed: the next step is right."""
    model, inputs, want = truth([9])
    ddp = DistributedDataParallel(Both(model))
    passes: list[int] = []

    def encoder(x: Tensor) -> Tensor:
        passes.append(1)
        if len(passes) == 4:
            raise ZeroDivisionError
        found: Tensor = ddp(pixels=x)
        return found

    step = CachedContrastive([encoder, lambda x: ddp(tokens=x)], loss_of(model), chunk_size=4, modules=ddp)
    try:
        step(*inputs)
        raise AssertionError("no error")
    except ZeroDivisionError:
        assert ddp.require_backward_grad_sync and ddp.require_forward_param_sync
    model.zero_grad()
    step(*inputs)
    assert_equal(_alike(model, want), want)


def with_an_error_where_sharded(rank: int) -> str:
    """Returns the error of the step after one that failed in its second passes."""
    model, inputs, _ = truth([4, 4])
    fully_shard(model.image, mesh=init_device_mesh("cpu", (2,)))
    passes: list[int] = []

    def encoder(x: Tensor) -> Tensor:
        passes.append(1)
        if len(passes) == 4:
            raise ZeroDivisionError
        found: Tensor = model.image(x)
        return found

    step = CachedContrastive([encoder, model.text], loss_of(model), chunk_size=2, modules=model)
    for error in (ZeroDivisionError, RuntimeError):
        try:
            step(*inputs)
        except error as raised:
            found = str(raised)
    return found


def with_sparse_gradients(rank: int) -> None:
    """Of an embedding, which DDP averages as sparse tensors."""
    torch.manual_seed(0)
    words, tokens = nn.EmbeddingBag(50, 8, sparse=True), torch.randint(50, (2, 6, 4))
    loss = lambda x: x.square().sum()
    step = CachedContrastive(DistributedDataParallel(words), loss, chunk_size=2)
    want = torch.autograd.grad(loss(words(tokens.flatten(0, 1))) / 2, words.weight)[0].to_dense()
    for _ in range(2):  # DDP learns of sparse gradients in the first
        words.weight.grad = None
        step(tokens[rank])
        assert words.weight.grad is not None and words.weight.grad.is_sparse
        torch.testing.assert_close(words.weight.grad.to_dense(), want)


def without_gradients(rank: int) -> float | None:
    """Rank 0 alone computes a loss, as in validation."""
    model, inputs, _ = truth([4, 4])
    ddp = DistributedDataParallel(model.image)
    step = CachedContrastive([ddp, model.text], model.info_nce, chunk_size=3)
    with torch.no_grad():
        return None if rank else float(step(*inputs))


def with_bad_input(rank: int) -> list[str]:
    """Rank 1 has a fault: in an input under DDP and FSDP2, in an encoder under DDP. Returns this rank's errors."""
    found = []
    for kind in ("input", "encoder", "sharded"):
        model, inputs, _ = truth([5, 4])
        module: Any = model.image
        if kind == "sharded":
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        else:
            module = DistributedDataParallel(module)
        given: Any = inputs[0]
        if rank == 1 and kind != "encoder":
            given = (inputs[0], inputs[0][1:])
        cut = lambda x, bad=rank == 1 and kind == "encoder": x[1:] if bad else x
        encoder = lambda x, y=None, module=module, cut=cut: cut(module(x))
        try:
            CachedContrastive(encoder, lambda x: x.sum(), chunk_size=2, modules=module)(given)
        except ValueError as error:
            found.append(str(error))
        dist.barrier()  # no rank has gone on to tell the others what they know
    return found


def with_synchronised_norms(rank: int) -> None:
    """The larger number of passes, for the norms themselves, which run on GPUs only."""
    parallel = DataParallel([nn.Sequential(nn.SyncBatchNorm(4))])
    assert parallel.agree([rank + 1, 5 - rank]) == [2, 5]


def with_compiled_and_checkpointed(rank: int, sizes: list[int]) -> None:
    """`torch.compile` around DDP, and encoders that compute their activations again in the backward pass."""
    model, inputs, want = truth(sizes)
    image, text = DistributedDataParallel(model.image), DistributedDataParallel(model.text)
    encoders = [
        torch.compile(image, backend="aot_eager"),
        lambda x: torch.utils.checkpoint.checkpoint(text, x, use_reentrant=False),
    ]
    step = CachedContrastive(encoders, loss_of(model), chunk_size=CHUNKS, modules=[text])
    for _ in range(3):
        model.zero_grad()
        step(*inputs)
        assert_equal(_alike(model, want), want)
