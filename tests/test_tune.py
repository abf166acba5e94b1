"""The search for tile sizes, with a clock that is none."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tune

from mmkernels import ops
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.plan import Config, Plan, Problem, Search
from mmkernels.runtime import tuning

CPU = torch.device("cpu")
OP = "cross_attention"
DEFAULT = tuning.default(OP, "forward", tuning.architecture(CPU), torch.float32, 64)
FAST, WRONG, BROKEN, SLOW = (Config(16, 16 * n, 4, 1) for n in range(1, 5))
TIMES = {FAST: 1.0, WRONG: 0.1, SLOW: 9.0}
PLANS = tuning.plans()


def small(generator: torch.Generator, dim: int) -> dict[str, Any]:
    return attention_inputs(generator, 1, 2, 6, 9, dim)


def search(*grads: str, problems: int = 1, **changes: Any) -> Search:
    problem = Problem(small, grads)
    columns = tuple(config.block_k for config in (FAST, WRONG, BROKEN, SLOW))
    return replace(Search((16,), columns, (4,), (1,), (problem,) * problems, problem), **changes)


def plan_with(**searches: Search) -> Plan:
    return replace(PLANS[OP], searches=searches)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plan = plan_with(forward=search(problems=2), grad_query=search("query"))
    monkeypatch.setattr(tuning, "plan", (PLANS | {OP: plan}).get)
    yield
    tuning._config.cache_clear()


def forced(kernel: str) -> Config | None:
    return tuning._forced.get((OP, kernel))


def tuner(kernel: str, **times: float) -> tune.Tuner:
    """Whose kernels take what `TIMES` says, and do what the names of the configurations say."""

    def clock(call: Any) -> float:
        return TIMES.get(forced(kernel), times.get("default", 2.0))  # type: ignore[arg-type]

    found = tune.Tuner(OP, kernel, "fp32", 64, CPU, clock=clock, backend="chunked")
    for timed in found.timed:

        def call(right: Any = timed.call) -> Any:
            if forced(kernel) == BROKEN:
                raise RuntimeError("out of resource: shared memory")
            out = right()
            wrong = (lambda x: x + 1) if forced(kernel) == WRONG else lambda x: x
            return tuple(map(wrong, out)) if isinstance(out, tuple) else wrong(out)

        timed.call = call
    return found


def config_of(row: dict[str, Any] | None) -> Config:
    assert row is not None
    return Config(row["block_q"], row["block_k"], row["warps"], row["stages"])


@pytest.mark.parametrize("kernel", ["forward", "grad_query"])
def test_the_fastest_right_configuration_wins(kernel: str) -> None:
    found = tuner(kernel)
    row = found.run(float("inf"))
    assert row is not None and config_of(row) == FAST
    assert (row["milliseconds"], row["default_milliseconds"]) == (1.0, 2.0)
    assert (row["device"], row["kernel"], row["dtype"], row["dim"]) == ("cpu", kernel, "float32", 64)
    assert row.keys() >= {"date", "torch", "triton"} and row["torch"] == torch.__version__
    assert found.failures == {"RuntimeError": 1, "WrongResult": 1}
    assert "2.00x the default's speed; 5 tried, 1 WrongResult, 1 RuntimeError" in next(found.describe(row))


def test_a_configuration_that_does_not_fit_the_heaviest_call_is_none() -> None:
    """A row serves every mask: what only the timed calls can be launched with would break users."""
    found = tuner("forward")
    fits = found.heaviest.call
    found.heaviest.call = lambda: fits() if forced("forward") != FAST else 1 / 0
    assert config_of(found.run(float("inf"))) == DEFAULT
    assert found.failures["ZeroDivisionError"] == 1


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    assert config_of(tuner("forward", default=1.01).run(float("inf"))) == DEFAULT


def test_what_has_no_time_left_is_counted() -> None:
    found = tuner("forward")
    row = found.run(0.0)
    assert row is not None and row["milliseconds"] == row["default_milliseconds"]
    assert found.left_out == 4 and "4 left out for time" in list(found.describe(row))[1]


def test_a_default_that_does_not_work_gives_no_row() -> None:
    found = tuner("forward")
    found.default = BROKEN
    assert found.run(float("inf")) is None and "does not work; 4 tried" in next(found.describe(None))


def test_compiling_beforehand_survives_what_fails() -> None:
    found = tuner("forward")
    found.compile(found.candidates())
    assert found.failures == {"RuntimeError": 1}


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that alone take more registers than there are, before sm_100; pipelines larger than shared memory."""

    def least(config: Config, dim: int, size: int) -> int:
        return config.block_k * dim * size * config.stages

    wide = search(rows=(128, 256), columns=(128, 256), warps=(4, 8), stages=(1,), least_shared=least)
    monkeypatch.setattr(tuning, "plan", lambda op: plan_with(forward=wide))
    found = tuner("forward")
    tried = set(found.candidates()) - {DEFAULT}
    assert tried == {Config(128, 128, 4, 1), Config(128, 128, 8, 1), Config(128, 256, 8, 1), Config(256, 128, 8, 1)}
    with tuning.pretend("sm_100"):
        assert len(found.candidates()) == 9
    with tuning.pretend("gfx942"):  # 64 KiB
        assert {config.block_k for config in found.candidates()} == {32, 128, 256}
        found.dim = 128
        assert {config.block_k for config in found.candidates()} == {32, 128}


def test_rows_replace_those_of_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ops" / OP / "tuned.json"
    path.parent.mkdir(parents=True)
    row = tuner("forward").run(float("inf"))
    assert row is not None
    tune.write(path, row | {"dim": 128})
    tune.write(path, row | {"milliseconds": 5.0})
    tune.write(path, row)
    rows = json.loads(path.read_text())
    assert [(each["dim"], each["milliseconds"]) for each in rows] == [(64, 1.0), (128, 1.0)]
    monkeypatch.setattr(ops, "folder", lambda name: tmp_path / "ops" / name)
    tuning._config.cache_clear()
    assert tuning.config(OP, "forward", CPU, torch.float32, 40) == FAST
    assert tuning.config(OP, "forward", CPU, torch.bfloat16, 40) != FAST
    assert tuning.config(OP, "decode", CPU, torch.float32, 40) != FAST


def test_every_search_is_of_a_kernel_and_holds_its_default_s_kind() -> None:
    for op, plan in PLANS.items():
        assert set(plan.searches) <= set(plan.kernels)
        for kernel, search in plan.searches.items():
            default = tuning.default(op, kernel, "sm_90", torch.bfloat16, 128)
            assert default.warps in search.warps and default.block_k in search.columns


CONTRASTIVE = [
    (op, kernel) for op in ("info_nce", "sigmoid_contrastive", "retrieval_ranks") for kernel in PLANS[op].searches
]


@pytest.mark.parametrize(("op", "kernel"), CONTRASTIVE)
def test_contrastive_problems(op: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their calls, the heaviest too, are the op's, and a wrong result is seen."""
    from mmkernels.ops.contrastive import plans

    for name in ("TIMED_PAIRS", "HEAVY_PAIRS"):
        monkeypatch.setattr(plans, name, 64)
    found = tune.Tuner(op, kernel, "fp32", 64, CPU, clock=lambda call: 1.0, backend="chunked")
    row = found.run(0.0)
    assert row is not None and (row["kernel"], row["dim"]) == (kernel, 64)
    assert found.heaviest.call() is not None
    wrong = found.timed[0].call
    found.timed[0].call = lambda: [x + 1 for x in tune.flat(wrong())]
    assert found.run(0.0) is None and set(found.failures) == {"WrongResult"}


def test_attention_s_heaviest_calls_are_the_ops() -> None:
    for op in ("cross_attention", "attention_received", "attention_weights"):
        for kernel, entry in PLANS[op].searches.items():
            heaviest = replace(entry.heaviest, whole=True)
            timed = tune.Timed(op, heaviest, torch.float32, 16, CPU, "chunked")
            assert timed.call() is not None, kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_results_can_t_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("", tmp_path, tmp_path / "none" / "tuned.json"):
        with pytest.raises(SystemExit) as end:
            tune.main(["cross_attention", "--out", str(out)])
        assert end.value.code == 2 and "--out must be a file in a folder that exists, got" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["cross_attention"]) == 2
    assert "nothing was searched: there is no GPU" in capsys.readouterr().err
