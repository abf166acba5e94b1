"""Searches the tile sizes of an op's Triton kernels on the GPU at hand, and writes them to ``ops/<op>/tuned.json``.

python benchmarks/tune.py OP [--kernels forward,decode] [--dtypes bf16] [--dims 64,128] [--seconds 540]

(With ``PYTHONPATH=.`` before it, where mmkernels is not installed.)

For each kernel, dtype and head dim every configuration of `SPACE` is compiled, checked against the op's definition in
float64 and timed; those that do not compile (too many registers, too much shared memory) are counted. The fastest few
and the default are then timed again in turns, and the winner's row is written: the default's own where nothing beats
it by 2 %. Rows of other kernels, dtypes, head dims and GPUs stay.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels import SpanMask, ops
from mmkernels.bench.gate import Call, Gate, draw_cotangents, flat
from mmkernels.machine import versions
from mmkernels.meters import time_calls
from mmkernels.ops import specs
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.ops.contrastive.cases import features, two_towers
from mmkernels.options import DTYPES, parse_list
from mmkernels.runtime import tuning
from mmkernels.runtime.tuning import Config
from mmkernels.spec import Inputs, cast

Clock = Callable[[Call, int, torch.device], float]  # as `time_calls`

# Of each kernel: tiles' rows, tiles' keys, warps, pipeline stages.
SPACE: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]] = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "decode": ((16,), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5)),
    "grad_query": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "grad_key_value": ((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "grad_key_value_masked": ((32, 64), (64, 128), (4, 8), (1, 2, 3)),
    "grad_bias": ((32, 64, 128), (32, 64, 128), (4, 8), (1, 2)),
    "received": ((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "weights": ((32, 64, 128), (64, 128), (4, 8), (1, 2)),
    **dict.fromkeys(tuning.PRODUCTS, ((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4))),
}
_PAIRS = 8192  # of images and texts that are timed
_HEAVY_PAIRS = 2048
_MARGIN = 0.98  # of the default's time, that a configuration must undercut: less is noise
_FINALISTS = 3
_ROUNDS = 9


@dataclass(frozen=True)
class Problem:
    """What a kernel is timed on.

    Args:
        make: takes a generator and the head dim.
        grads: what is differentiated by; only the backward pass is then timed.
        whole: the forward pass is timed with it, which gives the gradients.
    """

    make: Callable[[torch.Generator, int], Inputs]
    grads: tuple[str, ...] = ()
    whole: bool = False


def _plain(length: int) -> Callable[[torch.Generator, int], Inputs]:
    return lambda g, dim: attention_inputs(g, 1, 16, length, length, dim)


def _media(g: torch.Generator, dim: int) -> Inputs:
    index = (torch.arange(2048) * 8 // 2048)[None].expand(2, -1)
    return attention_inputs(g, 2, 16, 2048, 8192, dim) | {"mask": SpanMask.media(index, 1024)}


def _biased(g: torch.Generator, dim: int) -> Inputs:
    return attention_inputs(g, 4, 16, 1024, 2048, dim) | {"bias": normal(g, 1, 16, 1024, 2048)}


def _scores(g: torch.Generator, dim: int) -> Inputs:
    inputs = attention_inputs(g, 1, 16, 2048, 4096, dim)
    return {name: inputs[name] for name in ("query", "key")}


def _cached(g: torch.Generator, dim: int) -> Inputs:
    return attention_inputs(g, 16, 32, 1, 4096, dim, key_heads=8)


def _pairs(g: torch.Generator, dim: int) -> Inputs:
    """A head dim of 256 stands for all that are more."""
    return two_towers(g, _PAIRS, _PAIRS, dim if dim < 256 else 768, scale=50.0)


def _biased_pairs(g: torch.Generator, dim: int) -> Inputs:
    return _pairs(g, dim) | {"logit_bias": torch.tensor(-10.0)}


def _gallery(g: torch.Generator, dim: int) -> Inputs:
    inputs = _pairs(g, dim)
    return {"query": inputs["image"], "gallery": inputs["text"], "target": torch.arange(_PAIRS)}


# Each kernel at a long sequence without a mask and at a text over images, as far as it has the two. The configurations
# for dropout are not searched: what they hold is set by registers.
PROBLEMS: dict[str, dict[str, tuple[Problem, ...]]] = {
    "cross_attention": {
        "forward": (Problem(_plain(8192)), Problem(_media)),
        "decode": (Problem(_cached),),
        "grad_query": (Problem(_plain(4096), ("query",)), Problem(_media, ("query",))),
        "grad_key_value": (Problem(_plain(4096), ("key", "value")),),
        "grad_key_value_masked": (Problem(_media, ("key", "value")),),
        "grad_bias": (Problem(_biased, ("bias",)),),
    },
    "attention_received": {"received": (Problem(_scores),)},
    "attention_weights": {"weights": (Problem(_scores),)},
    "info_nce": {"contrastive": (Problem(_pairs),), "contrastive_grad": (Problem(_pairs, ("image", "text")),)},
    "sigmoid_contrastive": {"sigmoid": (Problem(_biased_pairs, ("image", "text"), whole=True),)},
    "retrieval_ranks": {"ranks": (Problem(_gallery),)},
}


def heaviest(op: str, kernel: str, g: torch.Generator, dim: int) -> Inputs:
    """The call that takes a kernel the most registers and shared memory: a row serves that one too."""
    if kernel in tuning.PRODUCTS:
        return _heaviest_pairs(op, kernel, g, dim)
    q_len, k_len = (1 if kernel == "decode" else 256), 512
    inputs = attention_inputs(g, 2, 4, q_len, k_len, dim)
    if op != "cross_attention":
        inputs = {name: inputs[name] for name in ("query", "key")}
    elif kernel in ("forward", "decode"):
        inputs |= {"dropout_p": 0.1, "gate": normal(g, 4)}
    else:
        inputs |= {"gate": normal(g, 4)}
    if kernel == "grad_key_value":  # which only runs without a mask
        return inputs
    mask = torch.rand(2, 4, q_len, k_len, generator=g, device=g.device) < 0.5
    return inputs | {"mask": mask, "bias": normal(g, 2 if kernel == "grad_query" else 1, 4, q_len, k_len)}


def _heaviest_pairs(op: str, kernel: str, g: torch.Generator, dim: int) -> Inputs:
    inputs = two_towers(g, _HEAVY_PAIRS, _HEAVY_PAIRS, dim)
    if op == "retrieval_ranks":
        return {"query": inputs["image"], "gallery": inputs["text"], "target": torch.arange(_HEAVY_PAIRS)}
    inputs["image_ids"] = torch.arange(_HEAVY_PAIRS) // 2
    if op == "sigmoid_contrastive":
        return inputs | {"logit_bias": torch.tensor(-10.0)}
    inputs |= {"hard_texts": features(g, _HEAVY_PAIRS, dim), "label_smoothing": 0.1}
    return inputs | ({"return_stats": True} if kernel == "contrastive" else {})


class Search:
    """One kernel, dtype and head dim.

    Args:
        clock: `time_calls`, or a stand-in.
        backend: whose kernels are timed.
    """

    def __init__(
        self,
        op: str,
        kernel: str,
        dtype: str,
        dim: int,
        device: torch.device,
        *,
        clock: Clock = time_calls,
        backend: str = "triton",
    ) -> None:
        self.op, self.kernel, self.dtype, self.dim, self.device = op, kernel, dtype, dim, device
        self.clock = clock
        self.default = tuning.default(kernel, tuning.architecture(device), DTYPES[dtype], dim)
        self._timed = [_Timed(op, problem, DTYPES[dtype], dim, device, backend) for problem in PROBLEMS[op][kernel]]
        self._heaviest = _Heaviest(op, kernel, DTYPES[dtype], dim, device, PROBLEMS[op][kernel][0].grads, backend)
        self.failures: Counter[str] = Counter()
        self.left_out = 0

    def candidates(self) -> list[Config]:
        """The default, then the rest of the space."""
        return list(
            dict.fromkeys([self.default, *(Config(*sizes) for sizes in itertools.product(*SPACE[self.kernel]))])
        )

    def compile(self, candidates: Sequence[Config]) -> None:
        """Run each once, whatever comes of it: its code is then in Triton's cache on disk."""
        for config in candidates:
            self._try(config, lambda: [timed.call() for timed in self._timed])

    def run(self, end: float) -> dict[str, Any] | None:
        """The row to write; None: not even the default works.

        Args:
            end: by `time.monotonic`, after which no further configuration is tried.
        """
        for timed in self._timed:
            timed.prepare_gate()
        found: dict[Config, list[float]] = {}
        for config in self.candidates():
            if found and time.monotonic() > end:
                self.left_out += 1
                continue
            seconds = self._try(config, partial(self._check_and_time, 3))
            if seconds is not None:
                found[config] = seconds
        if self.default not in found:
            return None
        score = partial(self._score, found[self.default])
        ranked = sorted(found, key=lambda config: score(found[config]))
        finalists = [self.default]
        for config in ranked:
            if config not in finalists and self._try(config, self._heaviest.call) is not None:
                finalists.append(config)
            if len(finalists) > _FINALISTS:
                break
        again: dict[Config, list[list[float]]] = {config: [] for config in finalists}
        for _ in range(_ROUNDS):
            for config in finalists:
                seconds = self._try(config, partial(self._time, 1))
                if seconds is not None:
                    again[config].append(seconds)
        final = {config: [statistics.median(x) for x in zip(*rounds)] for config, rounds in again.items() if rounds}
        base = final[self.default]
        best = min(final, key=lambda config: self._score(base, final[config]))
        if self._score(base, final[best]) > _MARGIN:
            best = self.default
        return self._row(best, final[best][0], base[0])

    @staticmethod
    def _score(base: Sequence[float], seconds: Sequence[float]) -> float:
        """The geometric mean, over the problems, of the time as a share of the default's."""
        return math.exp(statistics.fmean(math.log(own / other) for own, other in zip(seconds, base, strict=True)))

    def _try(self, config: Config, work: Callable[[], Any]) -> Any:
        """What `work` answers with `config` in force; None, and a failure noted, where it raises."""
        try:
            with tuning.use_config(self.op, self.kernel, config):
                return work()
        except Exception as error:  # out of registers or shared memory, a shape that the compiler refuses
            self.failures[type(error).__name__] += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # raises again where the error has broken the GPU's context
            return None

    def _check_and_time(self, rounds: int) -> list[float]:
        for timed in self._timed:
            problem = timed.problem()
            if problem is not None:
                raise WrongResult(problem)
        return self._time(rounds)

    def _time(self, rounds: int) -> list[float]:
        return [
            statistics.median(self.clock(timed.call, 5, self.device) for _ in range(rounds)) for timed in self._timed
        ]

    def _row(self, best: Config, seconds: float, default_seconds: float) -> dict[str, Any]:
        known = versions()
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "kernel": self.kernel,
            "dtype": str(DTYPES[self.dtype]).removeprefix("torch."),
            "dim": tuning.bucket(self.dim),
            "block_q": best.block_q,
            "block_k": best.block_k,
            "warps": best.warps,
            "stages": best.stages,
            "milliseconds": round(1e3 * seconds, 4),
            "default_milliseconds": round(1e3 * default_seconds, 4),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "triton": known["triton"],
        }


class WrongResult(Exception):
    """A configuration compiles and computes something else."""


class _Timed:
    """A problem on the device, and the call to time."""

    def __init__(
        self, op: str, problem: Problem, dtype: torch.dtype, dim: int, device: torch.device, backend: str
    ) -> None:
        self.spec = specs()[op]
        with device:
            drawn = problem.make(torch.Generator(device).manual_seed(0), dim)
        self.inputs = {
            name: x.requires_grad_() if name in problem.grads else x
            for name, x in cast(drawn, dtype, device, self.spec.always_wide).items()
        }
        self.grads = problem.grads
        forward = partial(self.spec.function, **self.inputs, backend=backend)
        self.outputs: list[Tensor] = []
        self.cotangents: list[Tensor] = []
        self.call: Call = forward
        if problem.grads:
            out = forward()
            self.outputs, self.cotangents = flat(out), draw_cotangents(flat(out))
            leaves = [self.inputs[name] for name in problem.grads]
            self.call = lambda: torch.autograd.grad(out, leaves, self.cotangents, retain_graph=True)
            if problem.whole:
                self.call = lambda: torch.autograd.grad(forward(), leaves, self.cotangents)
        self.gate: Gate | None = None

    def prepare_gate(self) -> None:
        self.gate = Gate(self.spec, self.inputs, self.grads, self.cotangents)

    def problem(self) -> str | None:
        assert self.gate is not None
        return self.gate.problem([*self.outputs, *flat(self.call())])


class _Heaviest:
    """The heaviest call of a kernel, run once for what is not timed: whether it can be launched."""

    def __init__(
        self,
        op: str,
        kernel: str,
        dtype: torch.dtype,
        dim: int,
        device: torch.device,
        grads: Sequence[str],
        backend: str,
    ) -> None:
        self.spec, self.grads = specs()[op], grads
        with device:
            drawn = heaviest(op, kernel, torch.Generator(device).manual_seed(0), dim)
        self.inputs = cast(drawn, dtype, device, self.spec.always_wide)
        self.backend = backend

    def call(self) -> bool:
        inputs = {name: x.requires_grad_() if name in self.grads else x for name, x in self.inputs.items()}
        out = self.spec.function(**inputs, backend=self.backend)
        if self.grads:
            torch.autograd.grad(out, [inputs[name] for name in self.grads], draw_cotangents(flat(out)))
        (first, *_) = flat(out)
        if first.is_cuda:
            torch.cuda.synchronize(first.device)
        return True


def write(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file in place of the one with its device, kernel, dtype and dim; the others stay."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if _key(old) != _key(row)] + [row]
    lines = ",\n".join("  " + json.dumps(each) for each in sorted(rows, key=_key))
    path.write_text(f"[\n{lines}\n]\n")


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["device"], row["kernel"], row["dtype"], row["dim"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers the exit code."""
    parser = argparse.ArgumentParser(description="Search the tile sizes of an op's Triton kernels on this GPU.")
    parser.add_argument("op", choices=sorted(PROBLEMS))
    parser.add_argument("--kernels", default="", help="comma-separated; default: all of the op's")
    parser.add_argument("--dtypes", default="bf16", help="of bf16, fp16, fp32")
    parser.add_argument(
        "--dims", default="64,128,256", help="head dims; a row serves all up to the next of 64, 128, 256"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which what is left is left out")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile beforehand; 0: none")
    parser.add_argument("--out", default="", help="file to write; default: mmkernels/ops/<op>/tuned.json")
    parser.add_argument("--compile", default="", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    from gpu import gpu_why_not  # beside this file

    reason = gpu_why_not()
    if reason is not None:
        print(f"tune.py: nothing was searched: {reason}", file=sys.stderr)
        return 2
    known = PROBLEMS[options.op]
    kernels = parse_list(options.kernels) or tuple(known)
    for kernel in kernels:
        if kernel not in known:
            parser.error(f"{options.op} has no kernel {kernel!r}; it has {', '.join(known)}")
    searches = itertools.product(kernels, parse_list(options.dtypes), map(int, parse_list(options.dims)))
    device = torch.device("cuda", torch.cuda.current_device())
    if options.compile:
        worker, workers = map(int, options.compile.split("/"))
        for kernel, dtype, dim in searches:
            search = Search(options.op, kernel, dtype, dim, device)
            search.compile(search.candidates()[worker::workers])
        return 0
    path = Path(options.out) if options.out else ops.folder(options.op) / "tuned.json"
    failed = 0
    for kernel, dtype, dim in searches:
        if time.monotonic() > end:
            print(f"{kernel}, {dtype}, {dim}: left out, the time is up")
            continue
        _compile_beforehand(options, kernel, dtype, dim)
        search = Search(options.op, kernel, dtype, dim, device)
        row = search.run(end)
        failed += row is None
        if row is not None:
            write(path, row)
        print("\n".join(_told(search, row)), flush=True)
    return int(failed > 0)


def _compile_beforehand(options: argparse.Namespace, kernel: str, dtype: str, dim: int) -> None:
    """Fill Triton's cache from several processes: compiling is most of a search, and each does it on one core."""
    command = [sys.executable, __file__, options.op, "--kernels", kernel, "--dtypes", dtype, "--dims", str(dim)]
    workers = [
        subprocess.Popen([*command, "--compile", f"{n}/{options.workers}"], stdout=subprocess.DEVNULL)
        for n in range(options.workers)
    ]
    for worker in workers:
        worker.wait()


def _told(search: Search, row: dict[str, Any] | None) -> Iterator[str]:
    name = f"{search.kernel}, {search.dtype}, head dim {search.dim}"
    tried = len(search.candidates()) - search.left_out
    failures = ", ".join(f"{count} {kind}" for kind, count in search.failures.items()) or "none failed"
    if row is None:
        yield f"{name}: the default {search.default} does not work; {tried} tried, {failures}"
        return
    sizes = " ".join(f"{key}={row[key]}" for key in ("block_q", "block_k", "warps", "stages"))
    gain = row["default_milliseconds"] / row["milliseconds"]
    yield f"{name}: {sizes}, {row['milliseconds']} ms, {gain:.2f}x the default's speed; {tried} tried, {failures}"
    if search.left_out:
        yield f"  {search.left_out} left out for time"


if __name__ == "__main__":
    sys.exit(main())
