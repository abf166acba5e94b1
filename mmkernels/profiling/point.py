"""One row of a profile, a number of visual tokens or a reducer: its model, its outputs, and the peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmkernels.meters import peak_memory
from mmkernels.profiling.adapter import Adapter, ReducingAdapter, Reduction
from mmkernels.profiling.options import Choice, Excerpt, Row, Settings, baseline_of, name_of, title_of
from mmkernels.runtime.dispatch import use_backend
from mmkernels.runtime.eager import stub_ops

REMOVED = "removed"
"""The candidate in which every op returns zeros at once: its time is the Amdahl bound."""

NAIVE_LOSS = "logits"
"""The candidate "fused" but for the training loss, which is made from all logits: what the loss alone saves."""

Cell = dict[str, Any]


@contextmanager
def running_as(candidate: str) -> Iterator[None]:
    """Runs every op as this candidate does: a forced backend, or the automatic choice ("fused" and those above)."""
    with ExitStack() as stack:
        if candidate == REMOVED:  # by the automatic choice: "reference" would not pass the op boundary
            stack.enter_context(stub_ops())
        stack.enter_context(use_backend("" if candidate in ("fused", REMOVED, NAIVE_LOSS) else candidate))
        yield


@dataclass(frozen=True)
class Exact:
    """The outputs from which drift is measured, float32; None: there are none.

    Args:
        same: in the dtype that is profiled.
        wide: in float32, where another dtype is profiled.
    """

    same: Tensor | None
    wide: Tensor | None


class Point:
    """One row: a cell of results for each backend, all on the same weights and inputs.

    Args:
        adapter, options: of the profile.
        row: a number of tokens, or a reducer.
        sources: the photographs, or the sound.
        progress: called with the name of each step before it begins.
        earlier: for rows that are measured together, those before this one, which shares their weights, and the inputs
            of one with the same resolution or length; drift is measured from the outputs of the first. Without any,
            this is the first row, or drift is measured from this row's own naive outputs.

    Attributes:
        model, inputs: what the adapter takes.
        cells: by backend; what `prepare` and `mmkernels.profiling.timing` find is written into them.
        seconds: by candidate, the cells' and those of `REMOVED`; of `NAIVE_LOSS`, what stands in the cell of "fused".
        reduction: what becomes of the first image or of the sound, where the row is no number of tokens.
    """

    def __init__(
        self,
        adapter: Adapter[Any],
        options: Settings,
        row: Row,
        sources: list[Any],
        progress: Callable[[str], None],
        earlier: Sequence[Point] = (),
    ) -> None:
        first = earlier[0] if earlier else None
        self.adapter, self.options, self.row, self.first = adapter, options, row, first
        self.device = torch.device(options.device)
        self.progress = lambda what: progress(f"{title_of(row)}: {what}")
        self.progress("weights, inputs, warm-up")
        self.exact = Exact(None, None)
        self.model: Any
        self.inputs: Any
        if first is None:
            self._build(row, sources)
        else:
            assert not isinstance(row, int)
            self.model = cast(ReducingAdapter[Any], adapter).exchange(options, first.model, row)
            alike = [point for point in earlier if cast(Choice | Excerpt, point.row).source == row.source]
            self.inputs = alike[0].inputs if alike else adapter.inputs(options, self.model, sources, row)
        self.reduction: Reduction | None = None
        if isinstance(row, int):
            tokens = row
        else:
            with torch.inference_mode():
                self.reduction = cast(ReducingAdapter[Any], adapter).reduction(self.model, self.inputs)
            tokens = self.reduction.tokens
        self.cells: dict[str, Cell] = {
            backend: {
                **_about(row, tokens, getattr(options, "images", None) or 0),
                **not_measured(backend),
            }
            for backend in options.backends or ()
        }
        self.seconds = {backend: cell["seconds"] for backend, cell in self.cells.items()}
        self.seconds[REMOVED] = {}
        self.seconds[NAIVE_LOSS] = self.cells["fused"]["naive_loss"] if "fused" in self.cells else {}

    def _build(self, row: Row, sources: list[Any]) -> None:
        """Makes model and inputs; finds the outputs in float32 on the way, where another dtype is measured."""
        options = self.options
        self.model = self.adapter.build(options, row).to(self.device)
        if options.torch_dtype != torch.float32 and "reference" in (options.backends or ()):
            wide = self._logits("reference", self.adapter.inputs(options, self.model, sources, row))
            self.exact = Exact(None, wide)
        self.model.to(options.torch_dtype)
        self.inputs = self.adapter.inputs(options, self.model, sources, row)

    def prepare(self) -> None:
        """Measures all but times: drift, which also warms up every backend, and peak memory."""
        self._measure_drift()
        with torch.inference_mode():
            for backend in self.able():
                self.progress(f"peak memory, {name_of(backend)}")
                self.cells[backend]["peak_memory_bytes"] = self.peak(backend, self._whole)

    def able(self) -> list[str]:
        """Returns the backends that have not run out of memory."""
        return [backend for backend, cell in self.cells.items() if cell["failed"] is None]

    def trainable(self) -> list[str]:
        """Returns the candidates whose training step is measured."""
        naive = self.adapter.naive_loss is not None and "fused" in self.able()
        return [*self.able(), NAIVE_LOSS] if naive else self.able()

    def peak(self, backend: str, run: Callable[[], Any]) -> int | None:
        with running_as(backend):
            return peak_memory(run, self.device)

    def _whole(self) -> None:
        state = None
        for stage in self.adapter.stages:
            state = stage.run(self.model, self.inputs, state)

    def _logits(self, backend: str, inputs: Any) -> Tensor | None:
        """Returns the whole model's scores in float32; None: there is not enough memory."""
        logits = []
        with torch.inference_mode(), running_as(backend):
            enough = fits(lambda: logits.append(self.adapter.logits(self.model, inputs).float()))
        return logits[0] if enough else None

    def _measure_drift(self) -> None:
        outputs = {backend: self._logits(backend, self.inputs) for backend in self.cells}
        if self.first is None:
            baseline = baseline_of(self.options.backends or (), reducing=self.reduction is not None)
            self.exact = Exact(outputs.get(baseline), self.exact.wide)
        else:
            self.exact = self.first.exact
        same, wide = self.exact.same, self.exact.wide
        for backend, logits in outputs.items():
            cell = self.cells[backend]
            if logits is None:
                cell["failed"] = "out of memory"
                continue
            drift: dict[str, float] = {}
            if same is not None:
                drift |= {"relative_l2": distance(logits, same), "top1_agreement": agreement(logits, same)}
            if wide is not None:
                drift |= {
                    "relative_l2_to_fp32": distance(logits, wide),
                    "top1_agreement_with_fp32": agreement(logits, wide),
                }
            if self.reduction is None or not self.reduction.learned:
                cell["drift"] = drift or None


def _about(row: Row, tokens: int, images: int) -> Cell:
    """Returns what a cell says of its row."""
    if isinstance(row, Excerpt):
        return {"sound_seconds": row.seconds, "pool": row.pool, "tokens": tokens}
    reducer, resolution = (None, None) if isinstance(row, int) else row
    return {
        "reducer": reducer,
        "resolution": resolution,
        "tokens_per_image": tokens,
        "visual_tokens": tokens * images,
    }


def not_measured(backend: str) -> Cell:
    """Returns what is measured of a row on one backend, empty."""
    return {
        "backend": backend,
        "failed": None,
        "seconds": {},
        "samples_seconds": {},
        "peak_memory_bytes": None,
        "train_peak_memory_bytes": None,
        "naive_loss": {},
        "drift": None,
        "amdahl": {},
    }


def fits(run: Callable[[], Any]) -> bool:
    """Runs; returns whether the memory was enough."""
    try:
        run()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return False
    return True


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def distance(logits: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 distance: the drift of an output."""
    return float(torch.linalg.vector_norm(logits - exact) / torch.linalg.vector_norm(exact))


def agreement(logits: Tensor, exact: Tensor) -> float:
    """Returns the share of rows whose largest score is at the same place."""
    return float((logits.argmax(-1) == exact.argmax(-1)).float().mean())


def amdahl(reference: float, seconds: float, removed: float) -> dict[str, float]:
    """Returns the speed-up over the reference, its cap with the ops removed, and the share of the cap reached."""
    return {
        "removed_seconds": removed,
        "speedup": reference / seconds,
        "cap": reference / removed,
        "share_of_cap": removed / seconds,
    }
