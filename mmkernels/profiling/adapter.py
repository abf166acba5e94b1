"""What the profiler needs of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from mmkernels.profiling.options import Options


@dataclass(frozen=True)
class Stage:
    """One part of a model's work.

    Args:
        name: in tables, pictures and JSON.
        about: what it does, for people.
        run: takes the model, the inputs and the state after the stage before; returns the state after this one.
        calls: how many equal steps one `run` makes; the time reported is that of one.
        fork: copies a state that `run` would change; not timed.
    """

    name: str
    about: str
    run: Callable[[Any, Any, Any], Any]
    calls: int = 1
    fork: Callable[[Any], Any] = lambda state: state


class Adapter(Protocol):
    """A model, divided into stages.

    Attributes:
        sizes: names that ``--size`` takes.
        stages: in the order in which they run. Those with ``calls == 1`` lead to the first output, and summaries are
            about the last of them; the others repeat.
        total: the name of the sum of those with ``calls == 1``.
    """

    @property
    def sizes(self) -> tuple[str, ...]: ...
    @property
    def stages(self) -> tuple[Stage, ...]: ...
    @property
    def total(self) -> str: ...

    def build(self, options: Options, tokens: int) -> nn.Module:
        """Returns the model with `tokens` visual tokens per image and random weights, float32, on the CPU."""
        ...

    def inputs(self, options: Options, model: Any, photos: list[Image.Image]) -> Any:
        """Returns what the stages, `logits` and `loss` take, on the model's device and in its dtype."""
        ...

    def logits(self, model: Any, inputs: Any) -> Tensor:
        """Returns the whole model's scores ``[..., classes]``."""
        ...

    def loss(self, model: Any, inputs: Any) -> Tensor:
        """Returns the whole model's training loss, with its graph."""
        ...
