"""The peers of the linear ops: PyTorch's and transformers' losses, compiled ones; on a GPU packages with kernels.

"eager" is what a model without a fused loss does, in bfloat16 as in float32. "torch chunked" is
``F.linear_cross_entropy`` with its option of chunks. "HF loss" is transformers' own ``ForCausalLMLoss``, on the
logits of all rows, as its models compute them. "mm alone" is no loss: the matrix products that the op needs, by
PyTorch, into memory that is there already.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.peers import Call, CantRunError, Peer, check_room, compiled, first_line
from mmkernels.spec import Inputs

_CHUNK = 256  # rows of PyTorch's chunks on a CPU; its own choice there, 4 at 152k tokens, is five times slower
_IGNORED = -100


# Losses.


def eager(inputs: Inputs) -> Call:
    """``F.linear``, ``F.cross_entropy``."""
    hidden, weight, target = _loss_tensors(inputs, tensors=3)
    return lambda: naive_loss(hidden, weight, target)


def naive_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def compiled_loss(inputs: Inputs) -> Call:
    """`naive_loss` by ``torch.compile``."""
    return compiled(naive_loss, *_loss_tensors(inputs, tensors=2))


def torch_chunked(inputs: Inputs) -> Call:
    """``F.linear_cross_entropy`` in chunks of rows; on a GPU of as many as PyTorch chooses."""
    hidden, weight, target = _loss_tensors(inputs)
    function: Any = getattr(F, "linear_cross_entropy", None)
    make: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or make is None:
        raise CantRunError("is not in this PyTorch: it needs 2.13")
    options = make() if hidden.is_cuda else make(chunking_method=None, batch_chunk_size=_CHUNK)
    return lambda: function(hidden, weight, target, options=options)


def causal_lm_loss(inputs: Inputs) -> Call:
    """transformers' ``ForCausalLMLoss``, whose shift is done: row n has the label n."""
    hidden, weight, target = _loss_tensors(inputs, tensors=4, itemsize=4)
    if bool((target != _IGNORED).all()):
        raise CantRunError("is eager, in float32, where all rows are supervised: left out")
    loss = _imported("transformers.loss.loss_utils", "transformers").ForCausalLMLoss
    labels = target[None]

    def call() -> Tensor:
        logits = F.linear(hidden, weight)[None]
        return loss(logits, labels, len(weight), shift_labels=labels)

    return call


def liger(inputs: Inputs) -> Call:
    """Liger's Triton kernels."""
    hidden, weight, target = _loss_tensors(inputs)
    function = _imported("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")
    return _liger_call(function, hidden, weight, target)


def liger_cute(inputs: Inputs) -> Call:
    """Liger's CuTe kernels."""
    hidden, weight, target = _loss_tensors(inputs)
    function = _imported("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy", "liger-kernel nvidia-cutlass-dsl")
    return _liger_call(function, hidden, weight, target)


def _liger_call(module: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Call:
    function = module.LigerFusedLinearCrossEntropyFunction
    return lambda: function.apply(hidden, weight, target)[0]


def quack(inputs: Inputs) -> Call:
    """QuACK's chunks, with its tuned products."""
    hidden, weight, target = _loss_tensors(inputs)
    function = _imported("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    return lambda: function(hidden, weight, target)


def cut(inputs: Inputs) -> Call:
    """Cut cross-entropy, with its filter of small gradients, as its authors measure it."""
    hidden, weight, target = _loss_tensors(inputs)
    function = _imported("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda: function(hidden, weight, target)


# Log-probabilities.


def log_softmax(inputs: Inputs) -> Call:
    """``F.linear``, ``log_softmax``, ``gather``, and the entropy, in float32 from the logits on."""
    hidden, weight, target, entropy = _row_tensors(inputs, tensors=3)
    return lambda: naive_rows(hidden, weight, target, entropy)


def naive_rows(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> Any:
    every = F.linear(hidden, weight).float().log_softmax(-1)
    logprobs = every.gather(1, target[:, None])[:, 0]
    return (logprobs, -(every.exp() * every).sum(-1)) if entropy else logprobs


def compiled_rows(inputs: Inputs) -> Call:
    """`naive_rows` by ``torch.compile``."""
    return compiled(naive_rows, *_row_tensors(inputs, tensors=2))


def verl(inputs: Inputs) -> Call:
    """verl's kernels for log-probabilities with their entropy."""
    hidden, weight, target, entropy = _row_tensors(inputs)
    function = _imported("verl.utils.kernel.linear_cross_entropy", "verl").linear_cross_entropy

    def call() -> Any:
        logprobs, of_rows = function(hidden, weight, target, 1.0, "none")
        return (logprobs, of_rows) if entropy else logprobs

    return call


# The products alone.


def products_of_loss(inputs: Inputs) -> Call:
    """One product forward; in training also the gradients'. Rows that are ignored take no part."""
    hidden, weight, target = _loss_tensors(inputs, tensors=1)
    return _products(hidden, weight, target, [hidden.new_zeros(())], again=False)


def products_of_rows(inputs: Inputs) -> Call:
    """As for a loss; in training the logits twice."""
    hidden, weight, target, entropy = _row_tensors(inputs, tensors=1)
    return _products(hidden, weight, target, [hidden.new_zeros(len(hidden)) for _ in range(1 + entropy)], again=True)


def _products(hidden: Tensor, weight: Tensor, target: Tensor, outputs: list[Tensor], again: bool) -> Call:
    trains, some, head = hidden.requires_grad, hidden.detach()[target != _IGNORED], weight.detach()
    logits = some.new_empty(len(some), len(head))
    grads = [torch.zeros_like(x) for x in (hidden.detach(), head)] if trains else []
    of_some = torch.empty_like(some)

    def call() -> Any:
        for _ in range(1 + (again and trains)):
            torch.mm(some, head.T, out=logits)
        if trains:
            torch.mm(logits, head, out=of_some)
            torch.mm(logits.T, some, out=grads[1])
        results = _Computed.apply(hidden, weight, outputs, grads)
        return results if len(results) > 1 else results[0]

    return call


class _Computed(torch.autograd.Function):
    """Results and gradients that are there already, whatever they hold."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, outputs: list[Tensor], grads: list[Tensor]) -> Any:
        ctx.grads = grads
        return tuple(x.clone() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *flows: Any) -> Any:
        return (*ctx.grads, None, None)


# Arguments.


def _loss_tensors(inputs: Inputs, tensors: int = 0, itemsize: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tensors of a plain call; `tensors` of the logits' size, of `itemsize` bytes, must fit into memory."""
    if inputs.keys() != {"input", "linear_weight", "target"} or inputs["input"].dim() != 2:
        raise CantRunError("only rows [T, d] and tokens, without a bias and other options")
    hidden, weight, target = (inputs[name] for name in ("input", "linear_weight", "target"))
    _check_room(hidden, weight, tensors, itemsize)
    return hidden, weight, target


def _row_tensors(inputs: Inputs, tensors: int = 0) -> tuple[Tensor, Tensor, Tensor, bool]:
    if inputs.keys() - {"return_entropy"} != {"hidden", "weight", "target"} or inputs["hidden"].dim() != 2:
        raise CantRunError("only rows [T, d], without a bias and other options")
    hidden, weight, target = (inputs[name] for name in ("hidden", "weight", "target"))
    if bool((target == _IGNORED).any()):
        raise CantRunError("only where no row is ignored")
    _check_room(hidden, weight, tensors, itemsize=4)
    return hidden, weight, target, inputs.get("return_entropy", False)


def _check_room(hidden: Tensor, weight: Tensor, tensors: int, itemsize: int) -> None:
    check_room(tensors * len(hidden) * len(weight) * (itemsize or hidden.element_size()), hidden.device)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CantRunError(f"is not installed: pip install {package} ({first_line(error)})") from error


def _on_gpu(name: str, prepare: Callable[[Inputs], Call]) -> Peer:
    return Peer(name, prepare, device="cuda")


CROSS_ENTROPY = (
    Peer("eager", eager),
    Peer("torch chunked", torch_chunked, slow=True),
    Peer("compiled", compiled_loss, slow=True),
    Peer("HF loss", causal_lm_loss),
    Peer("mm alone", products_of_loss, checked=False),
    _on_gpu("Liger", liger),
    _on_gpu("Liger CuTe", liger_cute),
    _on_gpu("QuACK", quack),
    _on_gpu("CCE", cut),
)
LOGPROBS = (
    Peer("log_softmax", log_softmax),
    Peer("compiled", compiled_rows, slow=True),
    Peer("mm alone", products_of_rows, checked=False),
    _on_gpu("verl", verl),
)
