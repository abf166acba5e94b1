"""Settings of the profiler's tests."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from mmkernels import report as writer
from mmkernels.meters import quick_collections
from mmkernels.profiling import timing


@pytest.fixture(scope="package", autouse=True)
def _short_and_steady() -> Iterator[None]:
    """One round, and one thread: tiny models wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_BUDGET", 0.0)
        patch.setattr(timing, "_LEAST_ROUNDS", 1)
        patch.setattr(timing, "_ROUNDS_TOGETHER", 1)
        with quick_collections():
            yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def two_rounds() -> Callable[[], AbstractContextManager[None]]:
    """Returns what measures two rounds while it is entered, for a report that has several times of each stage."""

    @contextmanager
    def entered() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing, "_LEAST_ROUNDS", 2)
            patch.setattr(timing, "_ROUNDS_TOGETHER", 2)
            yield

    return entered


@pytest.fixture
def figures_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[Any]]:
    """Returns a list of the figures that a module draws from now on."""

    def keep(module: ModuleType) -> list[Any]:
        figures: list[Any] = []

        @contextmanager
        def picture(*args: Any, **options: Any) -> Iterator[Any]:
            with writer.picture(*args, **options) as figure:
                figures.append(figure)
                yield figure

        monkeypatch.setattr(module, "picture", picture)
        return figures

    return keep


@pytest.fixture
def overlaps() -> Callable[[Any], list[tuple[str, str]]]:
    """Returns a function that finds the texts of a figure that touch."""

    def touching(figure: Any) -> list[tuple[str, str]]:
        """Returns texts that touch."""
        figure.canvas.draw()
        texts = list(figure.texts)
        for axes in figure.axes:
            texts += [*axes.texts, axes.title, axes._left_title]
            if axes.axison:
                (left, right), ticks = axes.get_xlim(), zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                texts += [*(label for place, label in ticks if left <= place <= right), *axes.get_yticklabels()]
                texts.append(axes.xaxis.label)
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
        return [(name, other) for i, (name, box) in enumerate(boxes) for other, box2 in boxes[:i] if box.overlaps(box2)]

    return touching
