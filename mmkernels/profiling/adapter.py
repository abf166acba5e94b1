"""What the profiler must know about a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from mmkernels.profiling.options import Options


@dataclass(frozen=True)
class Stage:
    """One part of a model's work, from the state that the stage before left to its own.

    Args:
        name: in tables, pictures and JSON.
        about: what it does, for people.
        run: takes model, inputs and the earlier stage's state; answers its own state.
        calls: how many equal steps one `run` makes; the time reported is that of one.
        fork: copies a state that `run` would change; not timed.
    """

    name: str
    about: str
    run: Callable[[Any, Any, Any], Any]
    calls: int = 1
    fork: Callable[[Any], Any] = lambda state: state


class Adapter(Protocol):
    """A model, cut into stages.

    Attributes:
        sizes: names that ``--size`` takes.
        stages: in the order in which they run. Those with ``calls == 1`` lead to the first answer, and the last of them
            is what summaries speak of; the others repeat.
        total: what the sum of the former is called.
    """

    @property
    def sizes(self) -> tuple[str, ...]: ...
    @property
    def stages(self) -> tuple[Stage, ...]: ...
    @property
    def total(self) -> str: ...

    def build(self, options: Options, tokens: int) -> nn.Module:
        """The model with `tokens` visual tokens per image and random weights, float32, on the CPU."""
        ...

    def inputs(self, options: Options, model: Any, photos: list[Image.Image]) -> Any:
        """What its stages, `logits` and `loss` take, on the model's device and in its dtype."""
        ...

    def logits(self, model: Any, inputs: Any) -> Tensor:
        """The whole model's scores ``[..., classes]``."""
        ...

    def loss(self, model: Any, inputs: Any) -> Tensor:
        """The whole model's training loss, with its graph."""
        ...
