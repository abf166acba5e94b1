"""What the profiler needs of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from PIL import Image
from torch import Tensor, nn

from mmkernels.profiling.options import Options, Row, Settings

Given = TypeVar("Given", bound=Settings, contravariant=True)
"""The kind of options that an adapter takes."""


@dataclass(frozen=True)
class Stage:
    """One part of a model's work.

    Args:
        name: in tables, pictures and JSON.
        about: what it does, for people.
        run: takes the model, the inputs and the state after the stage before; returns the state after this one.
        calls: how many equal steps one `run` makes; the time reported is that of one.
        fork: copies a state that `run` would change; not timed.
        shared: whether it is the same work whatever the reducer is, so that rows with the same inputs share its time.
    """

    name: str
    about: str
    run: Callable[[Any, Any, Any], Any]
    calls: int = 1
    fork: Callable[[Any], Any] = lambda state: state
    shared: bool = False


@dataclass(frozen=True)
class Reduction:
    """What a reducer makes of one image.

    Args:
        tokens: how many are left, those included that stand for no patch.
        rows, columns: of the image's patches, or of tokens that the model has made of them.
        token_of: which token each of these went to, row by row, numbered from 0; -1: none. None: any of them to any.
        learned: whether the reducer has weights. They are random here, so that what it makes of an image says nothing.
        side: of each square in patches; 1: it is a patch.
    """

    tokens: int
    rows: int
    columns: int
    token_of: list[int] | None
    learned: bool
    side: int = 1


class Staged(Protocol):
    """What is divided into stages.

    Attributes:
        about: what must be said of some sizes, such as that layers are left out.
        stages: in the order in which they run. Those with ``calls == 1`` lead to the first output, and summaries are
            about the last of them; the others repeat.
        total: the name of the sum of those with ``calls == 1``.
    """

    @property
    def about(self) -> Mapping[str, str]: ...
    @property
    def stages(self) -> tuple[Stage, ...]: ...
    @property
    def total(self) -> str: ...


class Adapter(Staged, Protocol[Given]):
    """A model, divided into stages.

    Attributes:
        sizes: names that ``--size`` takes.
        square: whether images are squares cut out of the photograph; else each has the photograph's shape, or there is
            no photograph.
    """

    @property
    def sizes(self) -> tuple[str, ...]: ...
    @property
    def square(self) -> bool: ...

    def check(self, options: Given) -> None:
        """Raises `BadInput` unless every number of tokens, or reducer, of `options` suits the model and its images."""
        ...

    def build(self, options: Given, row: Row) -> nn.Module:
        """Returns the model with random weights, float32, on the CPU: of so many visual tokens per image, or with this
        reducer, which changes no other weights."""
        ...

    def inputs(self, options: Given, model: Any, sources: list[Any], row: Row) -> Any:
        """Returns what the stages, `logits` and `loss` take, on the model's device and in its dtype.

        Args:
            options, row: of the profile.
            model: as `build` or `exchange` returned it.
            sources: the photographs, or one sound.
        """
        ...

    def logits(self, model: Any, inputs: Any) -> Tensor:
        """Returns the whole model's scores ``[..., classes]``; of text tokens alone, if the others may become fewer."""
        ...

    def loss(self, model: Any, inputs: Any) -> Tensor:
        """Returns the whole model's training loss, with its graph."""
        ...

    @property
    def naive_loss(self) -> Callable[[Any, Any], Tensor] | None:
        """The same loss from all logits, for which all but the loss runs as in `loss`; None: there is no such one."""
        ...


class ReducingAdapter(Adapter[Given], Protocol[Given]):
    """A model in which rows share the weights: they differ in the tokens that go on, or in what is read."""

    def exchange(self, options: Given, model: Any, choice: Any) -> nn.Module:
        """Returns the model for another row, such as another reducer: it shares all weights that are neither the
        reducer's nor positions."""
        ...

    def reduction(self, model: Any, inputs: Any) -> Reduction:
        """Returns what becomes of the first image, or of the sound."""
        ...


class PhotoAdapter(ReducingAdapter[Options], Protocol):
    """A model in which a `mmkernels.nn.TokenReducer` may choose the visual tokens."""

    def check_photo(self, options: Options, photo: Image.Image) -> None:
        """Raises `BadInput` unless every row suits the photograph's shape."""
        ...
