"""A model on ``"mmkernels"`` beside itself on transformers' own attention: outputs, gradients, generated tokens.

Truth is the model in float64 with ``"eager"``, and ``"mmkernels"`` in float32 may be `FACTOR` times as far from it as
transformers' own float32 attention is, plus a floor. Padding is left out: what a model computes there is arbitrary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmkernels.integrations.transformers.registration import NAME
from mmkernels.spec import cast
from mmkernels.testing.families_common import Family, Inputs

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "assisted": {},
}
"""Ways to generate, and what `generate` is told; "assisted" by a copy of the model, all of whose guesses are right."""

NEW_TOKENS = 6

FACTOR = 2.0
"""How many times the error of transformers' own attention in float32, the larger of ``"sdpa"``'s and ``"eager"``'s: a
gradient that is a single number is now and then exact by luck in one of them."""

FLOOR = 1e-6
"""Of a tensor's largest true value: an op's own floor in float32, see `mmkernels.spec.OpSpec`."""

CANCELLED = torch.finfo(torch.float32).eps
"""Of the largest gradient of all: some (of a key's bias) are sums that cancel to 0, where only rounding is left."""


class NotEqual(Exception):
    """The model computes something else on ``"mmkernels"``; the message says what and by how much."""


class NotOffered(Exception):
    """Transformers can't do this with its own attention either."""


class Comparison:
    """One family with each implementation, in float32 and float64."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model, self.inputs = family.build()
        self.wide, wide_inputs = family.build()
        self.wide.double()
        self.wide_inputs = cast(wide_inputs, torch.float64)
        self.peers = [name for name in ("sdpa", "eager") if accepts(self.model, name)]
        self.truth = self.run_wide("eager")
        self.theirs = [self._run(name) for name in self.peers]

    def run_wide(self, implementation: str) -> Results:
        """Outputs and gradients in float64."""
        set_attention(self.wide, implementation)
        with _float64():
            return one_pass(self.family, self.wide, self.wide_inputs)

    def _run(self, implementation: str) -> Results:
        set_attention(self.model, implementation)
        return one_pass(self.family, self.model, self.inputs)

    def forward(self) -> None:
        """Raise `NotEqual` where an output differs."""
        ours = self._run(NAME).outputs
        _check_names("outputs", ours, self.truth.outputs)
        for name, true in self.truth.outputs.items():
            _check_error(name, ours[name], [peer.outputs[name] for peer in self.theirs], true)

    def gradients(self) -> None:
        """Raise `NotEqual` where a parameter's gradient differs."""
        ours = self._run(NAME).grads
        _check_names("parameters with a gradient", ours, self.truth.grads)
        largest = max(float(true.abs().max()) for true in self.truth.grads.values())
        for name, true in self.truth.grads.items():
            peers = [peer.grads[name] for peer in self.theirs]
            _check_error(f"gradient of {name}", ours[name], peers, true, CANCELLED * largest)

    def generation(self, way: str) -> None:
        """Raise `NotEqual` where tokens differ, or the logits that they were chosen by."""
        try:
            set_attention(self.model, self.peers[0])
            theirs = self._generate(self.model, self.inputs, way)
        except Exception as error:
            raise NotOffered(one_line(error)) from error
        set_attention(self.model, NAME)
        ours = self._generate(self.model, self.inputs, way)
        _check_tokens(ours.tokens, theirs.tokens)
        if way == "sampled":  # in float64 other numbers would be drawn
            return
        set_attention(self.wide, "eager")
        with _float64():
            true = self._generate(self.wide, self.wide_inputs, way)
        _check_tokens(ours.tokens, true.tokens)
        _check_error("logits", ours.logits, [theirs.logits], true.logits)

    def _generate(self, model: Any, inputs: Inputs, way: str) -> _Generated:
        return _generate(model, {name: x for name, x in inputs.items() if name not in self.family.only_forward}, way)


@dataclass(frozen=True)
class Results:
    """What one pass forward and backward gives, by the names of outputs and parameters."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def one_pass(family: Family, model: Any, inputs: Inputs) -> Results:
    """Outputs of one forward pass, and the gradients of their sum with fixed random weights."""
    model.zero_grad()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)  # ViLT draws the patches that it looks at
        outputs = _valid(family, model(**inputs), inputs)
        weights = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in outputs.values()]
    torch.autograd.backward(list(outputs.values()), weights)
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return Results({name: x.detach() for name, x in outputs.items()}, grads)


def _valid(family: Family, output: Any, inputs: Inputs) -> dict[str, Tensor]:
    """The output's tensors; of a sequence [B, L, C] that the input pads, the [valid, C] that are not padding."""
    masks = [inputs[name].bool() for name in family.padded if name in inputs]
    found = {}
    for name, x in output.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            mask = next((m for m in masks if x.dim() == 3 and x.shape[:2] == m.shape), None)
            found[name] = x if mask is None else x[mask]
    return found


@dataclass(frozen=True)
class _Generated:
    tokens: Tensor
    logits: Tensor


def _generate(model: Any, inputs: Inputs, way: str) -> _Generated:
    told = dict(WAYS[way])
    if way == "assisted":  # takes one row
        inputs = {name: x[: len(x) // 2] if isinstance(x, Tensor) else x for name, x in inputs.items()}
        told["assistant_model"] = copy.deepcopy(model)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        out = model.generate(**inputs, **length, **told, return_dict_in_generate=True, output_logits=True)
    return _Generated(out.sequences, torch.stack(out.logits))


def _check_tokens(ours: Tensor, expected: Tensor) -> None:
    if ours.shape != expected.shape:
        raise NotEqual(f"tokens {tuple(ours.shape)} generated, expected {tuple(expected.shape)}")
    for row, place in (ours != expected).nonzero().tolist()[:1]:
        raise NotEqual(f"token {place} of row {row}: {ours[row, place]}, expected {expected[row, place]}")


def _check_names(what: str, ours: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    different = sorted(ours.keys() ^ true.keys())
    if different:
        raise NotEqual(f"{what} differ: {', '.join(different[:3])}")


def _check_error(name: str, ours: Tensor, peers: list[Tensor], true: Tensor, floor: float = 0.0) -> None:
    """Raise `NotEqual` where the root mean square error is over budget."""
    if ours.shape != true.shape:
        raise NotEqual(f"{name}: shape {tuple(ours.shape)}, expected {tuple(true.shape)}")
    error = _rms(ours - true)
    allowed = FACTOR * max(_rms(peer - true) for peer in peers) + FLOOR * float(true.abs().max()) + floor
    if not error <= allowed:  # also where it is NaN
        raise NotEqual(f"{name}: error {error:.2g}, allowed {allowed:.2g}")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def set_attention(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)


def accepts(model: Any, implementation: str) -> bool:
    try:
        set_attention(model, implementation)
    except ValueError:
        return False
    return True


class _Wide(TorchFunctionMode):
    """Transformers computes norms, rotations and softmax in float32 whatever the model's dtype is: here in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        return function(*map(_widened, args), **{name: _widened(x) for name, x in (kwargs or {}).items()})


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


@contextmanager
def _float64() -> Iterator[None]:
    """Everything in float64, also what transformers writes float32 for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
