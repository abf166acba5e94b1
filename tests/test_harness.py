"""What the tests themselves rest on: rows that cover all pairs, runs that are counted, truth that is computed once."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import op_runs
import pytest
import torch
from budget import BUDGET, DEFAULT, FIXED_SECONDS
from harness import SPECS, backends, check, expected
from layouts import embedded, far_apart, guarded
from op_runs import OpRuns
from pairwise import cover, traits

from mmkernels import SpanMask, merge_attention
from mmkernels.ops import NAMES
from mmkernels.spec import Case

PRODUCT = list(itertools.product("abcd", (1, 2, 3), ("x", "y"), (True, False), range(5)))
Row = tuple[Any, ...]


def by_place(row: Row) -> dict[str, Any]:
    return {str(place): value for place, value in enumerate(row)}


def combinations(rows: list[Row], strength: int) -> set[Any]:
    return {c for row in rows for c in itertools.combinations(enumerate(row), strength)}


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_few_rows_cover_all_combinations(strength: int) -> None:
    rows = cover(PRODUCT, by_place, strength=strength)
    assert combinations(rows, strength) == combinations(PRODUCT, strength)
    assert len(rows) <= {1: 5, 2: 26, 3: 90}[strength] < len(PRODUCT)


def test_an_axis_may_be_there_once_in_each_value() -> None:
    rows = cover(PRODUCT, by_place, once="4")
    others = [row[:4] for row in rows]
    assert {row[4] for row in rows} == set(range(5))
    assert combinations(others, 2) == combinations([row[:4] for row in PRODUCT], 2) and len(rows) < 20


def test_another_seed_draws_other_rows_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = cover(PRODUCT, by_place), cover(PRODUCT, by_place)
    case = SPECS["merge_attention"].cases[0]
    draw = lambda: (harness.draw(case)["out_a"], harness.cotangent(torch.zeros(3)), harness.reseed() or torch.randn(3))
    drawn = draw()
    torch.testing.assert_close(draw(), drawn, rtol=0, atol=0)
    monkeypatch.setattr(harness.settings, "seed", harness.settings.seed + 1)
    assert not any(torch.equal(x, y) for x, y in zip(draw(), drawn, strict=True))
    other = cover(PRODUCT, by_place)
    assert first == again != other and combinations(other, 2) == combinations(first, 2)


def test_traits_tell_kinds_of_calls_apart() -> None:
    query, key = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 7, 16)
    calls = [
        {"query": query, "key": key},
        {"query": query, "key": key[:, :1].expand(2, 4, 7, 16)},
        {"query": query[..., :9], "key": key[..., :9]},
        {"query": query.mT.contiguous().mT, "key": key},
        {"query": query, "key": key, "mask": SpanMask.causal(5, 7)},
        {"query": query, "key": key, "mask": SpanMask.key_padding([7, 3])},
        {"query": query, "key": key, "mask": SpanMask.key_padding([7, 0])},
        {"query": query, "key": key, "mask": torch.ones(5, 7).bool()},
        {"query": query, "key": key, "scale": 0.5},
        {"query": query, "key": key, "scale": -0.5},
    ]
    assert len({repr(traits(call)) for call in calls}) == len(calls)


# Runs and their budget.


@pytest.mark.parametrize("backend", backends(SPECS["merge_attention"]))
def test_each_backend_s_run_is_counted_with_its_backward_pass(backend: str) -> None:
    out, lse = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3)
    before = op_runs._counts["merge_attention"]
    merged, _ = merge_attention(out, lse, out, lse, backend=backend)
    merged.sum().backward()
    assert op_runs._counts["merge_attention"] == before + 1


@pytest.mark.parametrize("op", NAMES)
def test_every_check_is_counted(op: str) -> None:
    """Where the reference is differentiated by PyTorch, and goes through no table, too."""
    before = op_runs._counts[op]
    case = SPECS[op].cases[0]
    harness.run(SPECS[op], case, harness.draw(case), "reference")
    assert op_runs._counts[op] == before + 1


def report(test: str, runs: dict[str, int], seconds: float = 1.0) -> Any:
    return SimpleNamespace(nodeid=test, duration=seconds, when="call", user_properties=[("op runs", runs)])


@pytest.mark.parametrize("over", [0, 5])
def test_an_op_above_its_budget_fails_the_session(over: int) -> None:
    account = OpRuns(None, interpreted=False, judged=True)
    account.pytest_runtest_logreport(report("a.py::test_one[1]", {"new_op": DEFAULT.native}))
    account.pytest_runtest_logreport(report("a.py::test_one[2]", {"new_op": over}))
    session = SimpleNamespace(config=SimpleNamespace(), exitstatus=pytest.ExitCode.OK)
    account.pytest_sessionfinish(session)  # type: ignore[arg-type]
    assert session.exitstatus == (pytest.ExitCode.TESTS_FAILED if over else pytest.ExitCode.OK)
    if over:
        (line,) = account.over_budget()
        assert f"new_op: {DEFAULT.native + 5} runs, 5 above" in line and "most in a.py::test_one " in line


def test_seconds_of_files_and_ops_are_written(tmp_path: Path) -> None:
    account = OpRuns(tmp_path / "new" / "main.json", interpreted=False, judged=False)
    account.pytest_runtest_logreport(report("a.py::test_one", {"info_nce": 3, "merge_attention": 1}, seconds=8.0))
    account.pytest_runtest_logreport(report("b.py::test_two", {}, seconds=2.0))
    account.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(), exitstatus=pytest.ExitCode.OK))  # type: ignore[arg-type]
    written = json.loads((tmp_path / "new" / "main.json").read_text())
    assert written["files"] == {"a.py": {"seconds": 8.0, "tests": 1}, "b.py": {"seconds": 2.0, "tests": 1}}
    assert written["ops"]["info_nce"] == {
        "seconds": 6.0, "tests": 1, "runs": 3, "most runs": {"a.py::test_one": 3},
    }  # fmt: skip
    assert (written["tests"], written["test_seconds"]) == (2, 10.0)


def test_only_ops_that_exist_have_a_budget() -> None:
    assert set(BUDGET) <= set(NAMES)


def test_all_ops_fit_into_fifteen_minutes() -> None:
    budgets = [BUDGET.get(op, DEFAULT) for op in NAMES]
    assert len(budgets) >= 21
    assert FIXED_SECONDS + sum(budget.seconds for budget in budgets) / 2 < 900


# Truth.


def test_truth_is_computed_once_and_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, drawn = SPECS["merge_attention"], []
    case = spec.cases[0]
    counted = Case("counted", lambda g: (drawn.append(1), case.make(g))[1], case.grads)
    for _ in range(3):
        check(spec, counted, torch.float32, "chunked")
    assert len(drawn) == 4  # for the truth, and for each check's own inputs
    monkeypatch.setattr(harness, "_KEPT_BYTES", 1)
    kept = expected(spec, counted, torch.bfloat16)
    assert expected(spec, counted, torch.bfloat16) is not kept


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["merge_attention"]
    case = spec.cases[0]
    real = harness.run

    def wrong(spec: Any, case: Case, inputs: Any, backend: str, function: Any = None) -> harness.Result:
        found = real(spec, case, inputs, backend, function)
        return (
            found
            if backend == "reference"
            else harness.Result(found.outputs, {n: 2 * x for n, x in found.grads.items()})
        )

    assert check(spec, case, torch.float32, "chunked") > 0
    monkeypatch.setattr(harness, "run", wrong)
    with pytest.raises(
        AssertionError, match=r"merge_attention / plain / chunked / torch.float32 / eight draws / out_a"
    ):
        check(spec, case, torch.float32, "chunked")
    inputs = harness.draw(case)
    with pytest.raises(AssertionError, match="plain: draws must differ"):
        check(spec, dataclasses.replace(case, make=lambda g: inputs), torch.float32, "chunked")


def test_a_written_input_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, real = SPECS["merge_attention"], harness.run

    def writes(spec: Any, case: Case, inputs: Any, backend: str, function: Any = None) -> harness.Result:
        found = real(spec, case, inputs, backend, function)
        inputs["lse_b"].zero_()
        return found

    monkeypatch.setattr(harness, "run", writes)
    with pytest.raises(AssertionError, match="Tensor-likes are not equal"):
        check(spec, spec.cases[0], torch.float32, "chunked")


# Memory.


def test_views_hold_what_they_are_made_of() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(embedded(x), x) and not embedded(x).is_contiguous()
    for dim in range(3):
        assert torch.equal(far_apart(x, dim), x) and (x.shape[dim] - 1) * far_apart(x, dim).stride(dim) > 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_a_write_past_an_end_is_noticed(dtype: torch.dtype) -> None:
    x = torch.zeros(1, dtype=dtype)
    with guarded() as made:
        inside = [x.new_empty(2, 3), torch.empty(6, dtype=dtype, device="cpu"), torch.empty_like(x)]
    assert len(made) == 3 and all(tensor.intact() for tensor in made)
    for tensor, view in zip(made, inside, strict=True):
        view.fill_(1)
        assert tensor.intact()
        view.as_strided((1,), (1,), view.storage_offset() + view.numel()).fill_(1)
        assert not tensor.intact()


# Memory of outputs.


def test_outputs_that_lie_in_each_other_s_or_an_input_s_memory() -> None:
    a, b = torch.zeros(3), torch.zeros(2, 2)
    assert op_runs.shared_storage([a, None, 1.0, b], (a.clone(), b.clone(), a.new_empty(0), a.new_empty(0))) == ""
    assert op_runs.shared_storage([a, b], b.view(4)) == "output 0 lies in the memory of an input"
    assert op_runs.shared_storage([a], (b[0], a.clone(), b[1])) == "output 2 lies in the memory of output 0"
