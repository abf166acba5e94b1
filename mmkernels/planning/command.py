"""``mmkernels plan contrastive``: predict, check, print, write JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.text import Text

from mmkernels.interrupts import Interrupted
from mmkernels.machine import describe_machine, device_name, memory_of
from mmkernels.options import BadInput
from mmkernels.planning.check import Checked, full_check, quick_check
from mmkernels.planning.devices import DEVICES, PEAK_SHARE, PEAK_SHARE_WHY, WIRE_SHARE
from mmkernels.planning.measure import Samples, block_shapes, curves, message_rate, sample_blocks, sample_ring
from mmkernels.planning.model import Prediction, Rates, SheetRates, hidden_from, predict
from mmkernels.planning.options import HERE, Options
from mmkernels.planning.processes import on_ranks
from mmkernels.planning.ring import Step, gathered_bytes
from mmkernels.planning.table import ACCURACY, checked_table, plan_table, rate
from mmkernels.report import console, number, plural, prepare_folder, progress_bar, write_json
from mmkernels.runtime import host

__all__ = ["run_plan"]

_ROUNDS = 3
_CHECK_DIM = 512  # the most channels of a quick check
_TIMEOUT = 120.0  # seconds


def run_plan(options: Options, *, checking: str = "quick", limit: float = 300.0, out: Path | None = None) -> None:
    """Prints the plan, and the model's error on this machine.

    Args:
        checking: "quick" (one small step over 2 ranks), "full" (2, 4 and 8 ranks, 1k to 64k pairs) or "none".
        limit: seconds of a full check.
        out: of a JSON file with all numbers; None: none is written.

    Raises:
        BadInput: the file can't be written, or the wire of a GPU here is not given.
        Interrupted: by Ctrl-C in the check; the plan is printed and written before.
    """
    if out is not None:
        if out.is_dir():
            raise BadInput(f"--out must be a file, got the folder {out}")
        prepare_folder(out.parent)
    rates, basis = _rates(options)
    predictions = [predict(step, rates) for step in options.steps]
    first = options.steps[0]
    hidden = hidden_from(first, rates)
    output = console()
    title = f"Contrastive step of info_nce over {plural(first.ranks, 'rank')}, d = {first.dim:,}, {first.dtype}\n"
    output.print(Text(title, style="bold"))
    output.print(plan_table(predictions, options.encoder_seconds))
    for line in (*_verdict(first, hidden), *_of_run(options, predictions), ACCURACY, *basis):
        output.print(Text(line))
    report = _json(options, predictions, hidden, basis)
    if out is not None:
        write_json(out, report)
    if checking != "none":
        try:
            checked = _check(first, full=checking == "full", limit=limit)
        except KeyboardInterrupt:
            raise Interrupted("the plan above is kept") from None
        if out is not None:
            write_json(out, report | {"checked": list(map(_json_of, checked))})
    if out is not None:
        output.print(f"Written: {out} (all numbers)", soft_wrap=True)


def _rates(options: Options) -> tuple[Rates, list[str]]:
    """Returns the rates of a rank and its link, and where they come from."""
    return _measured(options) if options.device == HERE else _of_sheet(options)


def _of_sheet(options: Options) -> tuple[Rates, list[str]]:
    sheet, step = DEVICES[options.device], options.steps[0]
    inside = step.ranks <= sheet.per_machine
    link = sheet.link_rate if inside else sheet.network_rate
    wire = options.wire_rate or link * WIRE_SHARE
    rates = SheetRates(sheet, step.dtype, PEAK_SHARE, wire)
    kind = "NVLink within a machine" if inside else f"the network between machines of {sheet.per_machine}"
    of_link = "as given" if options.wire_rate else f"{rate(link)} by {kind} x {WIRE_SHARE:.0%}, assumed"
    peak = f"{number(sheet.flops[step.dtype] / 1e12)} TFLOP/s {step.dtype}"
    return rates, [
        f"{sheet.name}: {peak} x {PEAK_SHARE:.0%}, {PEAK_SHARE_WHY}.",
        f"Wire: {rate(wire)} ({of_link}), {rates.latency * 1e6:.0f} us a message, assumed; the host launches a "
        f"visit in {rates.host * 1e6:.0f} us, assumed.",
        f"Figures: {sheet.source}.",
        "No kernel of this package has run on a GPU: times are a projection, not a measurement.",
    ]


def _measured(options: Options) -> tuple[Rates, list[str]]:
    """Measures this machine: blocks with all threads, messages between 2 ranks."""
    step = options.steps[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and options.wire_rate is None and step.ranks > 1:
        raise BadInput("--bandwidth must be given for GPUs that are here, as their links are not measured")
    with progress_bar(2) as advance:
        advance("blocks of the loss")
        samples: list[Samples] = [sample_blocks(step.dim, step.dtype, device) for _ in range(_ROUNDS)]
        advance("messages between 2 ranks")
        samples += [one for rank in on_ranks(2, _ring, step.dim, step.dtype, timeout=_TIMEOUT) for one in rank]
    wire = options.wire_rate or message_rate(samples)
    rates = curves(samples, 1.0, memory_of(device), wire)
    rows, columns = block_shapes(step.dim, step.dtype, gpu=device == "cuda")[-1]
    flops = 2.0 * rows * columns * step.dim
    speeds = [f"{number(times * flops / curve.at(rows * columns) / 1e9)} GFLOP/s {name}"
              for name, times, curve in (("forward", 1, rates.forward), ("backward", 3, rates.backward))]  # fmt: skip
    of_wire = "as given" if options.wire_rate else "as measured between ranks on this machine"
    return rates, [
        f"Each rank is a machine like this one, {device_name(device)}, {plural(torch.get_num_threads(), 'thread')}: "
        f"measured {' and '.join(speeds)} in blocks of {rows:,} x {columns:,}, and "
        f"{rates.call(step.ranks) * 1e6:.0f} us a visit whatever its size.",
        f"Wire: {rate(wire)}, {of_wire}.",
    ]


def _ring(dim: int, dtype: str) -> list[Samples]:
    """Returns samples of one of 2 ranks."""
    alone = [dist.new_group([member]) for member in range(2)][dist.get_rank()]
    assert dist.group.WORLD is not None
    return [sample_ring(dim, dtype, dist.group.WORLD, alone) for _ in range(_ROUNDS)]


def _verdict(step: Step, hidden: int | None) -> list[str]:
    if step.ranks == 1:
        return ["One rank sends nothing."]
    if hidden is None:
        return ["The wire is hidden behind the blocks at no batch."]
    if hidden == step.ranks:
        return ["The wire is hidden at every batch."]
    return [
        f"The wire is hidden from a batch of {hidden:,} on ({hidden // step.ranks:,} pairs a rank): a block's time "
        "grows with the pairs of both sides, its bytes with those of one."
    ]


def _of_run(options: Options, predictions: Sequence[Prediction]) -> list[str]:
    run = options.run
    if run is None or run.step_seconds is None:
        return []
    made = predictions[0]
    return [
        f"The run's step took {number(run.step_seconds * 1e3)} ms, the median of {plural(run.steps, 'line')} of its "
        f"log; the loss at {made.step.batch:,} pairs is predicted to take {made.seconds / run.step_seconds:.0%} of "
        "that. Of the whole: beside that time, scaled with the pairs."
    ]


def _check(step: Step, *, full: bool, limit: float) -> list[Checked]:
    output = console()
    if full:
        found = full_check(step.dim, step.dtype, limit)
    else:
        found = quick_check(min(step.dim, _CHECK_DIM), step.dtype)
    checked = found.checked
    shared, channels = plural(host.physical_cores(), "core"), checked[0].step.dim if checked else step.dim
    title = f"\nThe model on this machine, whose {shared} the ranks share, d = {channels:,}, {step.dtype}"
    output.print(Text(title, style="bold"))
    output.print(checked_table(found))
    return checked


def _json(
    options: Options, predictions: Sequence[Prediction], hidden: int | None, basis: Sequence[str]
) -> dict[str, Any]:
    """Returns all numbers of a plan; the names contain the units."""
    return {
        "kind": "mmkernels plan contrastive",
        "device": options.device,
        "machine": describe_machine(),
        "basis": list(basis),
        "accuracy": ACCURACY,
        "wire_hidden_from_batch": hidden,
        "encoder_seconds_per_pair": options.encoder_seconds,
        "run": None if options.run is None else asdict(options.run),
        "rows": [
            asdict(made.step)
            | {
                "pairs_per_rank": made.step.rows,
                "seconds": made.seconds,
                "compute_seconds": made.compute_seconds,
                "wire_seconds": made.wire_seconds,
                "sent_bytes": made.sent,
                "memory_bytes": made.memory,
                "gathered_bytes": gathered_bytes(made.step),
                "binds": made.binds,
            }
            for made in predictions
        ],
    }


def _json_of(one: Checked) -> dict[str, Any]:
    """Returns the numbers of a step that was checked."""
    predicted, measured = one.memory_bytes or (None, None)
    return asdict(one.step) | {
        "predicted_seconds": one.seconds[0],
        "measured_seconds": one.seconds[1],
        "time_error": one.time_error,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "memory_error": one.memory_error,
    }
