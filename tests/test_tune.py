"""The search for tile sizes, with a clock that is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tune

from mmkernels import ops
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.runtime import tuning
from mmkernels.runtime.tuning import PRODUCTS, Config

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")
DEFAULT = tuning.default("forward", tuning.architecture(CPU), torch.float32, 64)
FAST, WRONG, BROKEN, SLOW = (Config(16, 16 * n, 4, 1) for n in range(1, 5))
TIMES = {FAST: 1.0, WRONG: 0.1, SLOW: 9.0}


def small(generator: torch.Generator, dim: int) -> dict[str, Any]:
    return attention_inputs(generator, 1, 2, 6, 9, dim)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"forward": (tune.Problem(small), tune.Problem(small)), "grad_query": (tune.Problem(small, ("query",)),)}
    monkeypatch.setitem(tune.PROBLEMS, "cross_attention", problems)
    space = ((16,), tuple(config.block_k for config in (FAST, WRONG, BROKEN, SLOW)), (4,), (1,))
    monkeypatch.setitem(tune.SPACE, "forward", space)
    monkeypatch.setitem(tune.SPACE, "grad_query", space)


def search(kernel: str, **times: float) -> tune.Search:
    """Whose kernels take what `TIMES` says, and do what the names of the configurations say."""

    def forced() -> Config | None:
        return tuning._forced.get(("cross_attention", kernel))

    def clock(call: Any, calls: int, device: torch.device) -> float:
        return TIMES.get(forced(), times.get("default", 2.0))  # type: ignore[arg-type]

    found = tune.Search("cross_attention", kernel, "fp32", 64, CPU, clock=clock, backend="chunked")
    for timed in found._timed:
        right = timed.call

        def call(right: Any = right) -> Any:
            if forced() == BROKEN:
                raise RuntimeError("out of resource: shared memory")
            out = right()
            wrong = (lambda x: x + 1) if forced() == WRONG else lambda x: x
            return tuple(map(wrong, out)) if isinstance(out, tuple) else wrong(out)

        timed.call = call
    return found


@pytest.mark.parametrize("kernel", ["forward", "grad_query"])
def test_the_fastest_right_configuration_wins(kernel: str) -> None:
    found = search(kernel)
    row = found.run(float("inf"))
    assert row is not None
    assert Config(row["block_q"], row["block_k"], row["warps"], row["stages"]) == FAST
    assert (row["milliseconds"], row["default_milliseconds"]) == (1000.0, 2000.0)
    assert (row["device"], row["kernel"], row["dtype"], row["dim"]) == ("cpu", kernel, "float32", 64)
    assert found.failures == {"RuntimeError": 1, "WrongResult": 1}
    assert "2.00x the default's speed; 5 tried, 1 WrongResult, 1 RuntimeError" in next(tune._told(found, row))


def test_a_configuration_that_does_not_fit_the_heaviest_call_is_none() -> None:
    """A row serves every mask: what only the timed calls can be launched with would break users."""
    found = search("forward")
    fits = found._heaviest.call

    def call() -> bool:
        if tuning._forced.get(("cross_attention", "forward")) == FAST:
            raise RuntimeError("out of resource: shared memory")
        return fits()

    found._heaviest.call = call  # type: ignore[method-assign]
    row = found.run(float("inf"))
    assert row is not None and Config(row["block_q"], row["block_k"], row["warps"], row["stages"]) == DEFAULT
    assert found.failures["RuntimeError"] == 2


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    row = search("forward", default=1.01).run(float("inf"))
    assert row is not None and Config(row["block_q"], row["block_k"], row["warps"], row["stages"]) == DEFAULT


def test_what_has_no_time_left_is_counted() -> None:
    found = search("forward")
    row = found.run(0.0)
    assert row is not None and row["milliseconds"] == row["default_milliseconds"]
    assert found.left_out == 4 and "4 left out for time" in list(tune._told(found, row))[1]


def test_compiling_beforehand_survives_what_fails() -> None:
    found = search("forward")
    found.compile(found.candidates())
    assert found.failures == {"RuntimeError": 1}


def test_rows_replace_those_of_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops" / "cross_attention" / "tuned.json"
    path.parent.mkdir(parents=True)
    row = search("forward").run(float("inf"))
    assert row is not None
    tune.write(path, row | {"dim": 128})
    tune.write(path, row | {"milliseconds": 5.0})
    tune.write(path, row)
    rows = json.loads(path.read_text())
    assert [(each["dim"], each["milliseconds"]) for each in rows] == [(64, 1000.0), (128, 1000.0)]
    monkeypatch.setattr(ops, "folder", lambda name: tmp_path / "ops" / name)
    tuning._config.cache_clear()
    try:
        assert tuning.config("cross_attention", "forward", CPU, torch.float32, 40) == FAST
        assert tuning.config("cross_attention", "forward", CPU, torch.bfloat16, 40) != FAST
        assert tuning.config("cross_attention", "decode", CPU, torch.float32, 40) != FAST
    finally:
        tuning._config.cache_clear()


def test_every_kernel_has_a_space_with_its_default_s_kind() -> None:
    for kernels in tune.PROBLEMS.values():
        assert set(kernels) <= set(tune.SPACE)
    for kernel in tune.SPACE:
        assert tuning.default(kernel, "sm_90", torch.bfloat16, 128).warps in (4, 8)


@pytest.mark.parametrize(
    ("op", "kernel"),
    [(op, kernel) for op, kernels in tune.PROBLEMS.items() for kernel in kernels if kernel in PRODUCTS],
)
def test_contrastive_problems(op: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their calls, the heaviest too, are the op's, and a wrong result is seen."""
    for name in ("_PAIRS", "_HEAVY_PAIRS"):
        monkeypatch.setattr(tune, name, 64)
    found = tune.Search(op, kernel, "fp32", 64, CPU, clock=lambda *_: 1.0, backend="chunked")
    row = found.run(0.0)
    assert row is not None and (row["kernel"], row["dim"]) == (kernel, 64)
    assert found._heaviest.call()
    wrong = found._timed[0].call
    found._timed[0].call = lambda: [x + 1 for x in tune.flat(wrong())]
    assert found.run(0.0) is None and set(found.failures) == {"WrongResult"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "cross_attention"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2 and "nothing was searched: there is no GPU" in ended.stderr
