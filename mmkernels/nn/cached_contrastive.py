"""`CachedContrastive`: a step with a large batch whose encoders hold activations of a small part of it (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmkernels.nn.checks import check_positive
from mmkernels.nn.data_parallel import DataParallel
from mmkernels.nn.replay import (
    Encoder,
    RandomState,
    call,
    random_devices,
    rows_of,
    running_statistics_kept,
    slice_rows,
    tensors_of,
)

Scale = float | Tensor | Callable[[Tensor], Tensor] | None


class CachedContrastive:
    """Encodes a large batch in chunks, and gives each parameter the gradient that one pass over all of it would give.

    A call encodes chunk by chunk without a graph, computes the loss of all features and its gradients by them, then
    encodes each chunk again, with the same random numbers, and backpropagates its features' gradients. Memory holds the
    features and the activations of one chunk; the price is one more forward pass. A call replaces ``loss.backward()``;
    the caller steps the optimizer. It is no module: it has no parameters.

    - **Random numbers**: dropout and whatever else draws PyTorch's random numbers are the same in both passes, and a
      call advances the generators as one pass of the same chunks does. Random numbers of Python or NumPy, and state
      that a pass changes (spectral norm), are not; `verify` finds such encoders.
    - **Batch norm** in training normalises each chunk by its own statistics, as in gradient accumulation; gradients are
      exact for that. The running averages count each chunk once.
    - **Autocast**: call it within the context. Both passes and the loss run under it, backward passes do not.
    - **Gradient accumulation**: gradients are added to those that are there. Zero them when the optimizer has stepped.
      Hooks on gradients run in every chunk, so an optimizer that steps in them raises an error.
    - **DDP**: gradients are averaged once, at the end of a call, also where both encoders are parts of one DDP module,
      where the temperature is a parameter of it, with `find_unused_parameters`, and on ranks with fewer rows, or none.
      Within `ddp.no_sync()` they are not averaged. In place of `ddp.join()`, a rank without data left passes no rows.
    - **FSDP2**: gradients are reduced in each encoder's last chunk; until then they are kept unsharded, unless
      `reduce_each_chunk`. As ranks communicate in each pass, all make as many as the one with the most chunks, the
      others with empty batches, which an encoder must take. Keep a temperature out of what is sharded
      (``fully_shard(..., ignored_params=...)``). After an error in a second pass the model can't be used any more.
    - **A rank with bad input** makes the others raise too. They learn of it before the first pass (FSDP2, where ranks
      communicate in each pass), or after all first passes (DDP).
    - **Several ranks**: the loss is computed by this rank alone, unless it shares features: pass a `group` to
      `info_nce` or `sigmoid_contrastive`, whose gradients are then averaged to those of one process.

    Args:
        encoders: one callable, or a list of them, one for each input: a module, a method of one, or a function. Each
            returns features, a floating-point tensor with a row for each row of its input. The list may hold the same
            encoder twice.
        loss: called with the features of each encoder and the named arguments of the step. Returns the loss, a tensor
            of one element, or a tuple that begins with it (`info_nce` with `return_stats`). Parameters that it uses,
            such as a temperature, get their gradients too.
        chunk_size: rows that an encoder is given at a time; a list has one for each encoder.
        modules: modules that contain the encoders, where these are functions, or methods of what a wrapper contains
            (``ddp.module.encode_image``: then pass ``modules=ddp``). Wrappers (DDP, FSDP2), batch norms and devices are
            looked for in these, in the encoders, in the objects of which encoders are methods, and in the loss.
        reduce_each_chunk: FSDP2 reduces gradients in every chunk: more communication, and no unsharded gradients.
        verify: compare the features of the second pass with those of the first, which are then kept, and raise where
            they differ by more than rounding.

    Raises:
        TypeError, ValueError: a wrong argument; an input whose tensors differ in rows, or that has a graph; features
            of a wrong type or number of rows; a loss of a wrong type; FSDP1; a DDP module with a static graph; an error
            of another rank.
        RuntimeError: with `verify`, the features of both passes differ; a parameter changes in a backward pass; an
            earlier step under FSDP2 ended in an error.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), 2021.

    Example:
        >>> import torch, mmkernels
        >>> from mmkernels.nn import CachedContrastive
        >>> image_encoder, text_encoder = torch.nn.Linear(48, 16), torch.nn.Linear(24, 16)
        >>> log_scale = torch.nn.Parameter(torch.tensor(2.0))
        >>> def loss(image, text):
        ...     image, text = (torch.nn.functional.normalize(x, dim=1) for x in (image, text))
        ...     return mmkernels.info_nce(image, text, log_scale.exp(), return_stats=True)
        >>> step = CachedContrastive([image_encoder, text_encoder], loss, chunk_size=8)
        >>> value, stats = step(torch.randn(32, 48), torch.randn(32, 24))
        >>> image_encoder.weight.grad.shape, log_scale.grad.shape
        (torch.Size([16, 48]), torch.Size([]))
    """

    def __init__(
        self,
        encoders: Encoder | Sequence[Encoder],
        loss: Callable[..., Any],
        *,
        chunk_size: int | Sequence[int],
        modules: nn.Module | Sequence[nn.Module] = (),
        reduce_each_chunk: bool = False,
        verify: bool = False,
    ) -> None:
        many = isinstance(encoders, list | tuple | nn.ModuleList)
        self.encoders: list[Encoder] = list(encoders) if many else [encoders]  # type: ignore
        for i, encoder in enumerate(self.encoders):
            if not callable(encoder):
                raise TypeError(f"encoders[{i}] must be callable, got {type(encoder).__name__}")
        if not self.encoders:
            raise ValueError("encoders must hold at least one encoder, got none")
        if not callable(loss):
            raise TypeError(f"loss must be callable, got {type(loss).__name__}")
        self.loss = loss
        many = isinstance(chunk_size, list | tuple)
        self.chunk_sizes: list[int] = list(chunk_size) if many else [chunk_size] * len(self.encoders)  # type: ignore
        if len(self.chunk_sizes) != len(self.encoders):
            raise ValueError(f"chunk_size must have one size for each of {len(self.encoders)} encoders, "
                             f"got {len(self.chunk_sizes)}")  # fmt: skip
        for size in self.chunk_sizes:
            check_positive("chunk_size", size)
        self.modules = [modules] if isinstance(modules, nn.Module) else list(modules)
        for module in self.modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules must be modules, got {type(module).__name__}")
        self.reduce_each_chunk = reduce_each_chunk
        self.verify = verify
        self._unusable = False

    def __call__(self, *inputs: Any, scale_loss: Scale = None, sync: bool = True, **arguments: Any) -> Any:
        """Adds the loss's gradients to those of all parameters, and returns the loss.

        Where gradients are disabled (`torch.no_grad`), it returns the loss alone, of features encoded in chunks. Then
        DDP communicates nothing, so one rank can call it alone if its loss has no group.

        Args:
            inputs: what each encoder is given: a tensor; a tuple or list, its positional arguments; or a mapping, its
                named arguments. Every tensor in it with a dim is cut along dim 0; all else, such as a list of strings,
                is passed whole to each chunk.
                Inputs may differ in rows, if the loss takes such features.
            scale_loss: what the gradients are those of, and not the returned value: a number by which the loss is
                multiplied (1/4 in four accumulated steps), or a function of it (``scaler.scale`` of a `GradScaler`).
            sync: False: gradients are not averaged over ranks, as under DDP's ``no_sync``; FSDP2 has no other way.
            arguments: of the loss, by name.

        Returns:
            What the loss function returned, detached.
        """
        if self._unusable:
            raise RuntimeError(
                "the model must be built and sharded anew: a step ended in an error, and FSDP2 keeps the gradients of "
                "its chunks where zero_grad does not reach them"
            )
        modules = self._modules()
        parallel = DataParallel(modules)
        with parallel.local():
            try:
                with torch.no_grad():
                    passes, features = self._first_passes(inputs, modules, parallel)
            except Exception as error:
                parallel.report(error)  # else the other ranks would wait for this one
                raise
            parallel.confirm()
            if not torch.is_grad_enabled():
                result = self.loss(*features, **arguments)
                parallel.reshard()  # else `zero_grad` would not reach the sharded parameters
                return tree_map_only(Tensor, Tensor.detach, result)
            kept = [x.detach() for x in features] if self.verify else None
            result, grads = self._loss_and_grads(passes, features, scale_loss, arguments)
            try:
                with running_statistics_kept(modules):
                    for i, of_encoder in enumerate(passes):
                        for last in of_encoder.second(grads.pop(0), None if kept is None else kept[i]):
                            parallel.reduce_next(sync and (last or self.reduce_each_chunk))
            except BaseException:
                self._unusable = bool(parallel.fsdp)
                raise
            finally:
                parallel.reduce_next(True)
        if sync:
            parallel.average()
        return result

    def _first_passes(
        self, inputs: tuple[Any, ...], modules: list[nn.Module], parallel: DataParallel
    ) -> tuple[list[_Passes], list[Tensor]]:
        """Returns the passes of each encoder, and its features."""
        if len(inputs) != len(self.encoders):
            raise ValueError(f"inputs must be one for each of {len(self.encoders)} encoders, got {len(inputs)}")
        rows = [rows_of(f"inputs[{i}]", x) for i, x in enumerate(inputs)]
        counts = [max(1, -(-n // size)) for n, size in zip(rows, self.chunk_sizes, strict=True)]
        devices = random_devices(modules, inputs)
        parameters = list(dict.fromkeys(x for module in modules for x in module.parameters()))
        passes = [
            _Passes(i, encoder, batch, n, size, count, devices, parameters)
            for i, (encoder, batch, n, size, count) in enumerate(
                zip(self.encoders, inputs, rows, self.chunk_sizes, parallel.agree(counts), strict=True)
            )
        ]
        return passes, [x.first() for x in passes]

    def _loss_and_grads(
        self, passes: list[_Passes], features: list[Tensor], scale: Scale, arguments: dict[str, Any]
    ) -> tuple[Any, list[Tensor | None]]:
        """Returns what the loss function returns, detached, and the gradient of each encoder's features.

        Args:
            features: emptied, so that they and the loss's graph are gone when the second passes begin.
        """
        leaves = [x.requires_grad_(y.may_train) for x, y in zip(features, passes, strict=True)]
        features.clear()
        result = self.loss(*leaves, **arguments)
        with torch._C._DisableAutocast():
            _scaled(_loss_of(result), scale).backward()
        return tree_map_only(Tensor, Tensor.detach, result), [x.grad for x in leaves]

    def _modules(self) -> list[nn.Module]:
        """Returns the modules that are known to take part."""
        callables = [*self.encoders, self.loss]
        objects = [*self.modules, *callables, *(getattr(x, "__self__", None) for x in callables)]
        return [x for x in dict.fromkeys(objects) if isinstance(x, nn.Module)]


class _Passes:
    """Both passes of one encoder.

    Args:
        index: of the encoder.
        rows: of the batch.
        count: of chunks; those behind the last row are empty.
        devices: whose random numbers the encoder may use.
        parameters: which no backward pass may change.
    """

    def __init__(
        self,
        index: int,
        encoder: Encoder,
        batch: Any,
        rows: int,
        size: int,
        count: int,
        devices: list[torch.device],
        parameters: list[nn.Parameter],
    ) -> None:
        self.name = f"encoders[{index}]"
        self.encoder, self.batch, self.rows, self.devices, self.parameters = encoder, batch, rows, devices, parameters
        self.chunks = [slice(min(i * size, rows), min((i + 1) * size, rows)) for i in range(count)]
        self.states: list[RandomState] = []
        trained = [encoder.parameters()] if isinstance(encoder, nn.Module) else []
        self.may_train = not trained or any(x.requires_grad for x in (*trained[0], *tensors_of(batch)))

    def first(self) -> Tensor:
        """Returns the features of all rows."""
        features = None
        for rows in self.chunks:
            self.states.append(RandomState(self.devices))
            part = self._encode(rows)
            if features is None:
                features = part.new_empty(self.rows, *part.shape[1:])
            if part.shape[1:] != features.shape[1:] or part.dtype != features.dtype:
                raise ValueError(
                    f"{self.name} must return features of one shape and dtype, got rows of {tuple(features.shape[1:])} "
                    f"in {features.dtype}, then of {tuple(part.shape[1:])} in {part.dtype}"
                )
            features[rows] = part
        assert features is not None  # there is a chunk, if an empty one
        return features

    def second(self, grad: Tensor | None, expected: Tensor | None) -> Iterator[bool]:
        """Encodes again, and backpropagates the features' gradient; None: the loss does not depend on them.

        Args:
            expected: the features of the first pass, to compare with.

        Yields:
            before each chunk, whether it is the last.
        """
        if grad is None:
            return
        for rows, state in zip(self.chunks, self.states, strict=True):
            yield rows is self.chunks[-1]
            with state.again():
                features = self._encode(rows)
            if expected is not None:
                self._compare(features.detach(), expected[rows])
            if features.requires_grad:
                before = [x._version for x in self.parameters]
                with torch._C._DisableAutocast():
                    features.backward(grad[rows])
                if before != [x._version for x in self.parameters]:
                    raise RuntimeError(
                        "parameters must not change in a backward pass, as each chunk has one: step the optimizer "
                        "after the call, not in a hook on gradients"
                    )
            del features  # before the next chunk's are made

    def _encode(self, rows: slice) -> Tensor:
        features = call(self.encoder, slice_rows(self.batch, rows))
        if not isinstance(features, Tensor):
            raise TypeError(f"{self.name} must return a tensor of features, got {type(features).__name__}")
        if not features.is_floating_point():
            raise TypeError(f"{self.name} must return floating-point features, got {features.dtype}")
        count = rows.stop - rows.start
        if not features.dim() or features.shape[0] != count:
            raise ValueError(
                f"{self.name} must return a row for each of {count} rows, got shape {tuple(features.shape)}"
            )
        return features

    def _compare(self, features: Tensor, expected: Tensor) -> None:
        tolerance = 2 * torch.finfo(features.dtype).eps ** 0.5
        largest = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
        if not torch.allclose(features, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True):
            apart = float((features - expected).abs().max())
            raise RuntimeError(
                f"{self.name} must return the same features in both passes, got features up to {largest:.2g} that are "
                f"{apart:.2g} apart: it draws random numbers that are not PyTorch's, or a pass changes its state"
            )


def _loss_of(result: Any) -> Tensor:
    loss = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss must return a tensor of one element, or a tuple that begins with one, got {got}")
    return loss


def _scaled(loss: Tensor, scale: Scale) -> Tensor:
    if scale is None:
        return loss
    return scale(loss) if callable(scale) else scale * loss
