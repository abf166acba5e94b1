"""Compares a model on ``"mmkernels"`` with itself on transformers' own attention: outputs, gradients, generated tokens.

The truth is the model in float64 with ``"eager"``. In float32 the error of ``"mmkernels"`` may be `FACTOR` times the
error of transformers' own attention, plus a floor. Padding is not compared: what a model computes there is arbitrary.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmkernels.integrations.transformers.counts import counting
from mmkernels.integrations.transformers.registration import NAME
from mmkernels.spec import cast
from mmkernels.testing.models import Family, Inputs, seeded

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "assisted": {},
}
"""Ways to generate, with arguments of `generate`; "assisted" by a copy of the model, so that every guess is right."""

NEW_TOKENS = 6

FACTOR = 2.0
"""Times the larger of the errors of ``"sdpa"`` and ``"eager"`` in float32: where a gradient is a single number, one of
them is sometimes exact by chance."""

FLOOR = 1e-6
"""Times a tensor's largest true value: the floor of an op in float32, see `mmkernels.spec.OpSpec`."""

CANCELLED = torch.finfo(torch.float32).eps
"""Times the largest gradient of the model: some gradients (of a key's bias) are sums that cancel to 0, so that they
consist of rounding errors."""

OTHER = 1e-4
"""Times an output's root mean square: where "sdpa" is farther from "eager", it computes something else."""


class NotEqual(Exception):
    """A result on ``"mmkernels"`` is not within its budget; the message names the result and the error."""


class NotOffered(Exception):
    """Transformers' own attention does not support this either."""


class Comparison:
    """One family with each implementation, in float32 and float64; truth and baseline are computed once, on demand."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model, self.inputs = family.build()
        self._wide, wide_inputs = family.build()
        self._wide.double()
        self._wide_inputs = cast(wide_inputs, torch.float64)
        self._built_on: dict[tuple[str, torch.dtype], Any] | None = None  # None: the models can be set
        self._patched: Any = None  # what stands in for the model on "mmkernels"; None: nothing does

    @cached_property
    def truth(self) -> Results:
        return self.run_wide("eager")

    @cached_property
    def baseline(self) -> list[Results]:
        """Transformers' own attention in float32, with each implementation that the model accepts."""
        return [self._run(name) for name in self._own_implementations]

    @cached_property
    def _own_implementations(self) -> list[str]:
        """Those that the model accepts, without an "sdpa" that computes something else than "eager".

        In transformers 5.17, Gemma 2's omits the cap on the scores; PaliGemma's sees later words of a prompt that comes
        without ``token_type_ids``.
        """
        accepted = []
        for name in ("sdpa", "eager"):
            with suppress(ValueError):  # the model refuses it
                self.on(name)
                accepted.append(name)
        if len(accepted) == 2:
            with torch.no_grad():
                sdpa, eager = (outputs_of(self.family, self.on(name), self.inputs) for name in accepted)
            if any(_rms(sdpa[name] - x) > OTHER * _rms(x) for name, x in eager.items() if name in sdpa):
                return ["eager"]
        return accepted

    def on(self, implementation: str) -> Any:
        """Returns the float32 model, on this implementation until the next call."""
        if implementation == NAME and self._patched is not None:
            return self._patched
        return self._on(implementation, self.model)

    def _on(self, implementation: str, model: Any) -> Any:
        if self._built_on is None:
            model.set_attn_implementation(implementation)
            return model
        key = implementation, model.dtype
        if key not in self._built_on:
            self._built_on[key] = _built(model, attn_implementation=implementation)
        return self._built_on[key]

    def run_wide(self, implementation: str) -> Results:
        """Returns outputs and gradients in float64."""
        model = self._on(implementation, self._wide)
        with float64():
            return one_pass(self.family, model, self._wide_inputs)

    def _run(self, implementation: str) -> Results:
        return one_pass(self.family, self.on(implementation), self.inputs)

    def with_inputs(self, inputs: Inputs) -> Comparison:
        """Returns the comparison of the same models on other inputs, padded ones.

        The baseline is "eager" alone: where a query sees nothing, "sdpa" is far from it, and would allow anything.
        """
        other = self._without_results()
        other.inputs, other._wide_inputs = inputs, cast(inputs, torch.float64)
        other.__dict__["_own_implementations"] = ["eager"]
        return other

    @cached_property
    def by_building(self) -> Comparison:
        """The comparison of models that are built with each implementation, for one that can't be set to it."""
        other = self._without_results()
        other._built_on = {}
        return other

    def unpatched(self) -> Any:
        """Returns a copy of the float32 model with transformers' own attention, as `from_pretrained` gives it."""
        return copy.deepcopy(self.on(self._own_implementations[0]))

    def with_patched(self, model: Any) -> Comparison:
        """Returns the comparison of a patched model, in place of the one that is set to ``"mmkernels"``."""
        _ = self.truth, self.baseline  # computed once for both
        other = copy.copy(self)
        other._patched = model
        return other

    def _without_results(self) -> Comparison:
        other = copy.copy(self)
        for computed in ("truth", "baseline", "_own_implementations", "by_building"):
            other.__dict__.pop(computed, None)
        return other

    def loading(self) -> None:
        """Raises `NotEqual` if a model that is built or loaded with ``"mmkernels"`` is not as one that is set to it."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            for way, load in (
                ("_from_config", partial(_built, self.model)),
                ("from_pretrained", partial(_loaded, self.model, folder)),
            ):
                switched = self.on(NAME) if self._built_on is not None else load()
                switched.set_attn_implementation(NAME)
                expected, calls = self.counted(switched)
                outputs, calls_when_loaded = self.counted(load(attn_implementation=NAME))
                what = f"{way}(attn_implementation={NAME!r})"
                if calls_when_loaded < calls:
                    raise NotEqual(f"{what} makes {calls_when_loaded} attention calls, set_attn_implementation {calls}")
                _check_names(f"outputs after {what}", outputs, expected)
                # more calls: set_attn_implementation does not reach every part
                exact = self._built_on is None and calls_when_loaded == calls
                for name, x in expected.items():
                    rounding = 0.0 if exact else FLOOR * float(x.abs().max())
                    if not float((outputs[name] - x).abs().max()) <= rounding:
                        raise NotEqual(f"{name} after {what} is another than after set_attn_implementation")

    def built(self, implementation: str) -> Any:
        """Returns a copy of the float32 model that is built with this implementation."""
        return _built(self.model, attn_implementation=implementation)

    def counted(self, model: Any) -> tuple[dict[str, Tensor], int]:
        """Returns a model's outputs and its attention calls on ``"mmkernels"``."""
        with counting() as calls, torch.no_grad():
            outputs = outputs_of(self.family, model, self.inputs)
        return outputs, calls.total

    def forward(self) -> None:
        """Raises `NotEqual` if an output differs."""
        ours = self._run(NAME).outputs
        _check_names("outputs", ours, self.truth.outputs)
        for name, true in self.truth.outputs.items():
            _check_error(name, ours[name], [run.outputs[name] for run in self.baseline], true)

    def gradients(self) -> None:
        """Raises `NotEqual` if a parameter's gradient differs."""
        ours = self._run(NAME).grads
        _check_names("parameters with a gradient", ours, self.truth.grads)
        grads = {name: true for name, true in self.truth.grads.items() if true.numel()}
        largest = max(float(true.abs().max()) for true in grads.values())
        for name, true in grads.items():
            baseline = [run.grads[name] for run in self.baseline]
            _check_error(f"gradient of {name}", ours[name], baseline, true, CANCELLED * largest)

    def generation(self, way: str) -> None:
        """Raises `NotEqual` if tokens differ, or the logits that they were chosen by."""
        try:
            theirs = self._generate(self.on(self._own_implementations[0]), self.inputs, way)
        except Exception as error:
            raise NotOffered(one_line(error)) from error
        ours = self._generate(self.on(NAME), self.inputs, way)
        _check_tokens(ours.tokens, theirs.tokens)
        if way == "sampled":  # float64 would draw other random numbers
            return
        wide = self._on("eager", self._wide)
        with float64():
            true = self._generate(wide, self._wide_inputs, way)
        _check_tokens(ours.tokens, true.tokens)
        _check_error("logits", ours.logits, [theirs.logits], true.logits)

    def _generate(self, model: Any, inputs: Inputs, way: str) -> _Generated:
        inputs = {name: x for name, x in inputs.items() if name not in self.family.only_forward}
        options = WAYS[way] | {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        if way == "assisted":  # supports one row only
            inputs = {name: x[: len(x) // 2] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            options["assistant_model"] = copy.deepcopy(model)
        with torch.no_grad(), seeded(1):
            out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        return _Generated(out.sequences, torch.stack(out.logits))


def _built(model: Any, **options: str) -> Any:
    """Returns a copy of the model that is built anew."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # as in a folder: a choice is not saved
    built = type(model)._from_config(config, **options).to(model.dtype).eval()
    built.load_state_dict(model.state_dict())
    return built.requires_grad_(True)


def _loaded(model: Any, folder: str, **options: str) -> Any:
    with seeded(0):  # weights that the folder lacks, because transformers ties them, are drawn
        return type(model).from_pretrained(folder, **options).eval()


class _Generated(NamedTuple):
    tokens: Tensor
    logits: Tensor


class Results(NamedTuple):
    """Results of one forward and backward pass, by the names of outputs and parameters."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def one_pass(family: Family, model: Any, inputs: Inputs) -> Results:
    """Returns the outputs of one forward pass, and the gradients of their sum with fixed random weights."""
    model.zero_grad()
    with seeded(1):
        outputs = outputs_of(family, model, inputs)
        learned = [x for x in outputs.values() if x.requires_grad]  # positions may be floats too
        weights = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in learned]
    torch.autograd.backward([(x * weight).sum() for x, weight in zip(learned, weights)])
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return Results({name: x.detach() for name, x in outputs.items()}, grads)


def outputs_of(family: Family, model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Returns the outputs of one forward pass that are not padding."""
    with seeded(1):  # ViLT draws which patches it uses
        return _valid(family, model(**inputs), inputs)


def _valid(family: Family, output: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Returns the output's tensors; of a padded sequence [B, L, C] the positions [valid, C] that are not padding."""
    masks = [inputs[name].bool() for name in family.padded if name in inputs]
    valid = {}
    for name, x in output.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            mask = next((m for m in masks if x.dim() == 3 and x.shape[:2] == m.shape), None)
            valid[name] = x if mask is None else x[mask]
    return valid


def _check_tokens(ours: Tensor, expected: Tensor) -> None:
    if ours.shape != expected.shape:
        raise NotEqual(f"tokens {tuple(ours.shape)} generated, expected {tuple(expected.shape)}")
    for row, place in (ours != expected).nonzero().tolist()[:1]:
        raise NotEqual(f"token {place} of row {row}: {ours[row, place]}, expected {expected[row, place]}")


def _check_names(what: str, ours: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    different = sorted(ours.keys() ^ true.keys())
    if different:
        raise NotEqual(f"{what} differ: {', '.join(different[:3])}")


def _check_error(name: str, ours: Tensor, baseline: list[Tensor], true: Tensor, floor: float = 0.0) -> None:
    """Raises `NotEqual` if the root mean square error is over budget."""
    if ours.shape != true.shape:
        raise NotEqual(f"{name}: shape {tuple(ours.shape)}, expected {tuple(true.shape)}")
    error = _rms(ours - true)
    allowed = FACTOR * max(_rms(x - true) for x in baseline) + FLOOR * float(true.abs().max()) + floor
    if not error <= allowed:  # also if it is NaN
        raise NotEqual(f"{name}: error {error:.2g}, allowed {allowed:.2g}")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


class _Wide(TorchFunctionMode):
    """Replaces float32 by float64: transformers computes norms, rotations and softmax in float32 in any model."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        return function(*map(_widened, args), **{name: _widened(x) for name, x in (kwargs or {}).items()})


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


@contextmanager
def float64() -> Iterator[None]:
    """Computes in float64 inside the ``with`` block, also where transformers requests float32."""
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
