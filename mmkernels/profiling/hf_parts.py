"""Finds a model's parts by transformers' own accessors, and when each of them runs while a prompt is answered."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.profiling.adapter import Stage
from mmkernels.profiling.hf_inputs import NEW_TOKENS

FEATURES = "get_image_features"
"""The accessor by which transformers makes tokens of images, projector included."""

ENCODE, PROJECT, PREFILL, DECODE = "encode", "project", "prefill", "decode"


@dataclass
class Watch:
    """What was seen of one call of ``generate``; times in seconds.

    Args:
        begin: when it began.
        in_tower: spent in the vision tower.
        in_features: spent in `FEATURES`; None: it was not called.
        tower_end: when the vision tower returned last before the language model began; None: it was not called.
        decoder_begin: when the language model began; None: it was not called.
        tokens: when each token was there.
        vectors: rows that `FEATURES` returned, or else the vision tower; None: neither returned a tensor of them.
        between: the outermost modules with weights that ran behind the vision tower: within `FEATURES`, if it was
            called, else before the language model, but for its embeddings.
    """

    begin: float = 0.0
    in_tower: float = 0.0
    in_features: float | None = None
    tower_end: float | None = None
    decoder_begin: float | None = None
    tokens: list[float] = field(default_factory=list)
    vectors: int | None = None
    between: list[nn.Module] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """A model's parts.

    Args:
        tower: what ``get_encoder(modality="image")`` returns; None: no vision tower.
        decoder: what ``get_decoder()`` returns; None: no language model.
        names: of modules, in the model.
    """

    tower: nn.Module | None
    decoder: nn.Module | None
    names: dict[nn.Module, str]

    def about(self, module: nn.Module) -> str:
        """Such as "model.vision_tower (CLIPVisionModel)"."""
        return f"{self.names.get(module, 'a module')} ({type(module).__name__})"


def find_parts(model: Any) -> Parts:
    """Returns what the model's own accessors find; what they return must be a part of the model, not all of it."""
    names = {module: name for name, module in model.named_modules()}
    decoder = _accessed(model, lambda: model.get_decoder())
    tower = _accessed(model, lambda: model.get_encoder(modality="image"))
    if (
        tower is not None
        and decoder is not None
        and (decoder in set(tower.modules()) or tower in set(decoder.modules()))
    ):
        tower = None  # the accessor found the text's encoder, or the whole
    return Parts(tower, decoder, names)


def _accessed(model: Any, access: Callable[[], Any]) -> nn.Module | None:
    try:
        found = access()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    whole = (model, getattr(model, "base_model", None))
    return found if isinstance(found, nn.Module) and not any(found is one for one in whole) else None


# What runs when.


class _Clock:
    """Watches one call."""

    def __init__(self, parts: Parts, device: torch.device, *, naming: bool) -> None:
        self.parts, self.device, self.naming = parts, device, naming
        self.watch = Watch()
        self.depth = {"tower": 0, "features": 0, "named": 0}
        self.entered = {"tower": 0.0, "features": 0.0}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self, what: str) -> None:
        self.depth[what] += 1
        if self.depth[what] == 1:
            self.entered[what] = self.now()

    def leave(self, what: str) -> float | None:
        """Returns the seconds of an outermost call; None: of one within another."""
        self.depth[what] -= 1
        return None if self.depth[what] else self.now() - self.entered[what]

    def tower_begins(self, *args: Any) -> None:
        self.enter("tower")

    def tower_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        seconds = self.leave("tower")
        if seconds is not None:
            self.watch.in_tower += seconds
            if self.watch.decoder_begin is None:
                self.watch.tower_end = self.now()
            if self.watch.in_features is None and not self.depth["features"]:
                self.watch.vectors = (self.watch.vectors or 0) + (
                    _rows(_field(output, "last_hidden_state")) or 0
                ) or None

    def decoder_begins(self, *args: Any) -> None:
        if self.watch.decoder_begin is None:
            self.watch.decoder_begin = self.now()

    def features(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.enter("features")
            try:
                output = method(*args, **kwargs)
            finally:
                seconds = self.leave("features")
            if seconds is not None:
                if self.watch.in_features is None:
                    self.watch.in_features, self.watch.vectors = 0.0, None
                self.watch.in_features += seconds
                rows = _rows(_field(output, "pooler_output"))
                self.watch.vectors = None if rows is None else (self.watch.vectors or 0) + rows
            return output

        return watched

    def token(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """A stopping criterion, which ``generate`` asks behind each token: it stops nothing."""
        self.watch.tokens.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _field(output: Any, name: str) -> Any:
    return getattr(output, name, None) if not isinstance(output, Tensor) else output


def _rows(output: Any) -> int | None:
    """Returns how many vectors a tensor, or a list of them, has."""
    if isinstance(output, Tensor):
        return output.numel() // output.shape[-1] if output.dim() > 1 else None
    if isinstance(output, list | tuple) and output and all(isinstance(part, Tensor) for part in output):
        return sum(part.numel() // part.shape[-1] for part in output)
    return None


@contextmanager
def watching(model: Any, parts: Parts, *, naming: bool = False) -> Iterator[_Clock]:
    """Inside, one call of ``generate`` is watched; the model is as it was afterwards.

    Args:
        model: the model.
        parts: of it.
        naming: also find what runs behind the vision tower, which takes time.
    """
    clock = _Clock(parts, torch.device(model.device), naming=naming)
    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        if parts.tower is not None:
            hook(parts.tower.register_forward_pre_hook(clock.tower_begins))
            hook(parts.tower.register_forward_hook(clock.tower_ends))
        if parts.decoder is not None:
            hook(parts.decoder.register_forward_pre_hook(clock.decoder_begins))
        if naming:
            stack.enter_context(_naming(model, clock))
        for module in model.modules():
            if callable(getattr(type(module), FEATURES, None)) and FEATURES not in vars(module):
                vars(module)[FEATURES] = clock.features(getattr(module, FEATURES))
                stack.callback(vars(module).pop, FEATURES)
        yield clock


@contextmanager
def _naming(model: Any, clock: _Clock) -> Iterator[None]:
    """Inside, the outermost modules with weights that run behind the vision tower are written down."""
    parts, watch = clock.parts, clock.watch
    own = set(parts.tower.modules()) if parts.tower is not None else set()
    apart = {model.get_input_embeddings(), model.get_output_embeddings()}
    above = {
        module for module in model.modules() if own & set(module.modules()) or parts.decoder in set(module.modules())
    }
    within: list[nn.Module] = []
    named: list[nn.Module] = []

    def begins(module: nn.Module, args: Any) -> None:
        if module in above or module in apart or module not in parts.names or named or clock.depth["tower"]:
            return
        if watch.decoder_begin is None and watch.tower_end is not None and any(True for _ in module.parameters()):
            named.append(module)
            (within if clock.depth["features"] else watch.between).append(module)

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        if named and named[-1] is module:
            named.pop()

    before = nn.modules.module.register_module_forward_pre_hook(begins)
    behind = nn.modules.module.register_module_forward_hook(ends)
    try:
        yield
    finally:
        before.remove()
        behind.remove()
        found = within if watch.in_features is not None else watch.between if watch.decoder_begin is not None else []
        watch.between = list(dict.fromkeys(found))


def answer(model: Any, inputs: dict[str, Any], clock: _Clock, options: dict[str, Any]) -> Any:
    """Returns what ``generate`` makes of a prompt, greedily: `NEW_TOKENS` tokens, and the scores of each."""
    import transformers

    clock.watch.begin = clock.now()
    return model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
        stopping_criteria=transformers.StoppingCriteriaList([clock.token]),
        **options,
    )


# Stages.


@dataclass(frozen=True)
class Division:
    """How a model's time is divided.

    Args:
        stages: as of `mmkernels.profiling.adapter.Staged`; they are timed together, by `seconds`.
        parts: what stands for the vision tower, the projector and the language model, in words.
        not_found: what could not be found, in words.
    """

    stages: tuple[Stage, ...]
    parts: dict[str, str]
    not_found: tuple[str, ...]
    about: dict[str, str] = field(default_factory=dict)
    total: str = "first token"

    def seconds(self, watch: Watch) -> dict[str, float]:
        """Returns the seconds of each stage in one call."""
        found = _times(watch)
        if PROJECT not in [stage.name for stage in self.stages] and PROJECT in found:
            found[ENCODE] = found.get(ENCODE, 0.0) + found.pop(PROJECT)
        return found


def _times(watch: Watch) -> dict[str, float]:
    first = watch.tokens[0] - watch.begin
    found = {}
    if watch.in_features is not None:
        found = {ENCODE: watch.in_tower, PROJECT: max(0.0, watch.in_features - watch.in_tower)}
    elif watch.tower_end is not None:
        found = {ENCODE: watch.in_tower}
        if watch.decoder_begin is not None:
            found[PROJECT] = watch.decoder_begin - watch.tower_end
    steps = len(watch.tokens) - 1
    found[PREFILL] = first - sum(found.values())
    found[DECODE] = (watch.tokens[-1] - watch.tokens[0]) / steps if steps else 0.0
    return found


def divide(parts: Parts, watch: Watch) -> Division:
    """Returns how the time of a model is divided, as one watched call shows it."""
    found, missing, stages = dict[str, str](), list[str](), list[tuple[str, str]]()
    tower = parts.tower if watch.tower_end is not None else None
    if tower is not None:
        found["vision tower"] = parts.about(tower)
        stages.append((ENCODE, f"the vision tower, {type(tower).__name__}"))
    else:
        why = "finds none" if parts.tower is None else "finds one that is not called before the language model"
        missing.append(f"vision tower: get_encoder(modality='image') {why}")
        if watch.in_features is not None:
            stages.append((ENCODE, f"all of {FEATURES}"))
    if tower is not None and watch.between:
        found["projector"] = ", ".join(parts.about(module) for module in watch.between)
        until = f"the end of {FEATURES}" if watch.in_features is not None else "the language model"
        stages.append((PROJECT, f"from there to {until}"))
    elif tower is not None:
        bounded = watch.in_features is not None or watch.decoder_begin is not None
        why = "no module with weights runs behind the vision tower, whose time has it, if there is one"
        missing.append(f"projector: {why if bounded else 'nothing tells it from the language model'}")
    if parts.decoder is not None and watch.decoder_begin is not None:
        found["language model"] = parts.about(parts.decoder)
    else:
        why = "finds none" if parts.decoder is None else "finds one that is not called"
        missing.append(f"language model: get_decoder() {why}")
    rest = "the rest up to the first token" if stages else "everything up to the first token, images too"
    stages += [(PREFILL, rest), (DECODE, f"one more token, the mean of {NEW_TOKENS - 1}")]
    return Division(tuple(_stage(name, about) for name, about in stages), found, tuple(missing))


def _stage(name: str, about: str) -> Stage:
    """Returns a stage that is only described: all of them run, and are timed, in one call."""

    def run(model: Any, inputs: Any, state: Any) -> Any:
        raise NotImplementedError(f"{name} is timed within generate")

    return Stage(name, about, run, NEW_TOKENS - 1 if name == DECODE else 1)
