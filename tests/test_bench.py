"""The benchmark harness: checks, rounds, figures."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from mmkernels import SpanMask, report
from mmkernels.bench import benchmark, gate, peers, rounds, tables
from mmkernels.bench.peers import CantRunError, Peer
from mmkernels.bench.rows import Row, rows
from mmkernels.meters import memory_why_not, quick_collections
from mmkernels.ops import specs
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.runtime import dispatch
from mmkernels.runtime.dispatch import Backend
from mmkernels.spec import Benchmark
from mmkernels.targets import ExtraMemory, MemoryRatio, PeakShare, Rate, Speedup, YardstickShare


def inputs(g: torch.Generator) -> dict[str, Any]:
    q, k, v = (torch.randn(2, 2, length, 8, generator=g, dtype=torch.float64) for length in (6, 9, 9))
    return {"query": q, "key": k, "value": v, "mask": SpanMask.key_padding([9, 4])}


CONFIG = Benchmark("tiny padding", inputs, {"B": 2}, ("query", "key", "value"), frozenset({"padding"}))


class Fixture:
    """As much of pytest-benchmark as the harness uses; notes what ran when."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Callable[[], Any], setup: Callable[[], Any], rounds: int, **more: Any) -> None:
        for number in range(more["warmup_rounds"] + rounds):
            setup()
            target()
            if number >= more["warmup_rounds"]:
                self.stats.stats.data.append(0.5)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    with quick_collections():
        yield


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "BUDGET", 0.0)
    monkeypatch.setattr(rounds, "SAMPLE", 0.0)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(rounds.machine, "arithmetic", lambda dtype, device: lambda: 1e9)
    monkeypatch.setattr(rounds.machine, "memory", lambda device: lambda: 2e9)


def measured(
    *beside: Peer, config: Benchmark = CONFIG, dtype: str = "fp32", backward: bool = False, **options: Any
) -> dict[str, Any]:
    """Returns what the harness says about a row."""
    fixture = Fixture()
    benchmark.measure(fixture, Row(SPEC, config, dtype, backward), beside, **options)
    return fixture.extra_info


def sdpa(given: dict[str, Any]) -> Callable[[], Any]:
    mask = given["mask"].to_dense(given["key"].shape[2])
    return lambda: F.scaled_dot_product_attention(given["query"], given["key"], given["value"], mask)


def unable(given: dict[str, Any]) -> Callable[[], Any]:
    raise CantRunError("there is no such thing here")


def mistaken(given: dict[str, Any]) -> Callable[[], Any]:
    return lambda: F.scaled_dot_product_attention(given["query"], given["key"], given["value"])


def broken(given: dict[str, Any]) -> Callable[[], Any]:
    return lambda: given["query"] @ given["key"]


def rough(given: dict[str, Any]) -> Callable[[], Any]:
    """Attention as SDPA's, of what has a bit or two of each number left in 16 bits."""

    def call() -> Tensor:
        out = sdpa(given)()
        return out if out.dtype == torch.float32 else out * 1.5

    return call


def noted(runs: list[str]) -> Callable[[dict[str, Any]], Callable[[], Any]]:
    """Returns a peer that notes each of its runs."""

    def prepare(given: dict[str, Any]) -> Callable[[], Any]:
        call = sdpa(given)
        return lambda: (runs.append("peer"), call())[1]

    return prepare


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_times_ratios_memory_and_shares(dtype: str, backward: bool) -> None:
    """A peer need not be as exact as the op; one that can't run, fails or computes something else has a reason."""
    beside = (Peer(function.__name__, function) for function in (sdpa, unable, mistaken, broken, rough))
    absent = Peer("absent", sdpa, device="cuda")
    info = json.loads(json.dumps(measured(*beside, absent, dtype=dtype, backward=backward)))
    assert info["seconds"] == 0.5 and info["rounds"] == 5
    assert info["pass"] == ("forward + backward" if backward else "forward")
    at_peak = max(info["flops"] / 1e9, info["bytes"] / 2e9)
    for name in ("naive", "sdpa", "rough"):
        seconds = info["peers"][name]["seconds"]
        assert info["peers"][name]["ratio"] == seconds / 0.5
        assert info["peers"][name]["ratio_at_peak"] == pytest.approx(seconds / at_peak)
    assert info["peers"]["unable"] == {"why_not": "there is no such thing here"}
    assert "computes something else" in info["peers"]["mistaken"]["why_not"]
    assert info["peers"]["broken"]["why_not"].startswith("fails: RuntimeError: ")
    assert "absent" not in info["peers"]
    assert info["flops_per_second"] == info["flops"] / 0.5
    assert info["peak_flops_per_second"] == 1e9 and info["peak_bytes_per_second"] == 2e9
    assert info["share_of_compute_peak"] == pytest.approx(info["flops"] / 0.5 / 1e9)
    assert info["share_of_bandwidth_peak"] == pytest.approx(info["bytes"] / 0.5 / 2e9)
    assert info["memory_why_not"] or info["peak_memory_bytes"] >= 0


def test_peers_and_ours_take_turns() -> None:
    order: list[str] = []

    class Watch(Fixture):
        def pedantic(self, target: Callable[[], Any], **more: Any) -> None:
            order.clear()
            super().pedantic(lambda: (order.append("ours"), target()), **more)

    benchmark.measure(Watch(), Row(SPEC, CONFIG, "fp32", False), (Peer("sdpa", noted(order)),))
    assert order == ["peer", "ours"] * 6  # a warm-up and five rounds


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        out, lse = dispatch.TABLES["cross_attention"][-1].run(*args)
        return out * 1.001, lse

    table = (Backend("chunked", wrong), *dispatch.TABLES["cross_attention"])
    monkeypatch.setitem(dispatch.TABLES, "cross_attention", table)
    fixture = Fixture()
    with pytest.raises(AssertionError, match=r"cross_attention is wrong at tiny padding, .*, output 0: .* error"):
        benchmark.measure(fixture, Row(SPEC, CONFIG, "fp32", False), ())
    assert not fixture.extra_info


def grouped(g: torch.Generator) -> dict[str, Any]:
    """Each part of which is one sequence, one key head and its two query heads."""
    q = torch.randn(3, 4, 6, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(3, 2, 9, 8, generator=g, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(3, 4, 6, 9, generator=g, dtype=torch.float64)
    return {"query": q, "key": k, "value": v, "bias": bias, "mask": SpanMask.key_padding([9, 4, 7])}


def shared(g: torch.Generator) -> dict[str, Any]:
    """Where a bias is shared by all sequences, they stay together; a dense mask is cut like any other tensor."""
    dense = torch.rand(3, 1, 6, 9, generator=g) < 0.8
    return grouped(g) | {"bias": torch.randn(1, 4, 6, 9, generator=g, dtype=torch.float64), "mask": dense}


_QKVB = ("query", "key", "value", "bias")
PARTED = [Benchmark(make.__name__, make, {}, _QKVB) for make in (grouped, shared)]


@pytest.mark.parametrize("config", PARTED, ids=lambda config: config.id)
@pytest.mark.parametrize("backward", [False, True])
def test_what_does_not_fit_is_checked_on_parts(
    config: Benchmark, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Peer("mistaken", mistaken)
    assert measured(beside, config=config, backward=backward)["checked"] == "everything"
    monkeypatch.setattr(gate, "room", lambda device: 0.0)
    info = measured(beside, config=config, backward=backward)
    assert info["checked"].startswith("parts at full length")
    assert info["peers"]["naive"]["ratio"] > 0 and "why_not" in info["peers"]["mistaken"]


@pytest.mark.parametrize("bad", [torch.nan, 1.0])
def test_parts_see_what_is_wrong_in_them_and_what_is_not_finite_anywhere(bad: float) -> None:
    given = grouped(torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "room", lambda device: 0.0)
        checker = gate.Gate(SPEC, given, (), ())
    right = SPEC.function(**given)
    assert checker.problem([right]) is None and checker.distance([right]) < 1e-12
    last = right.clone()
    last[-1, -1, 2, 3] = bad  # the last sequence and head are always a part
    assert checker.problem([last]) is not None
    elsewhere = right.clone()
    elsewhere[1, 0, 2, 3] = bad
    assert (checker.problem([elsewhere]) is not None) == (bad != bad)


def test_a_gpu_s_row_has_its_backward_pass_alone_and_its_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "kind", lambda device: "gpu")
    monkeypatch.setattr("mmkernels.bench.rows.kind", lambda device: "gpu")
    targets = (
        *(kind("fp32", True, 0.5, device="gpu") for kind in (Rate, YardstickShare, PeakShare)),
        *(Speedup("fp32", True, 0.5, peer, device="gpu") for peer in ("sdpa", "nowhere")),
    )
    config = Benchmark("tiny", inputs, {}, ("query", "key", "value"), targets=targets, yardstick=CONFIG)
    info = measured(Peer("sdpa", sdpa), config=config, backward=True)
    assert 0 < info["backward_seconds"] < 0.5 and info["peers"]["sdpa"]["backward_flops_per_second"] > 0
    assert info["backward_flops_per_second"] * info["backward_seconds"] == pytest.approx(info["flops"] * 5 / 7)
    found = {target["than"]: target["found"] for target in info["targets"]}
    assert found["tflops"] == pytest.approx(info["backward_flops_per_second"] / 1e12)
    assert found["yardstick"] == pytest.approx(info["flops_per_second"] / info["yardstick_flops_per_second"])
    assert found["nowhere"] is None and found["sdpa"] > 0
    assert [str(report.verdict(target)) for target in info["targets"]].count("can't run") == 1


def test_targets_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above inputs and gradients: three of [1, 2, 6, 8] each and more."""
    if memory_why_not() is not None:
        pytest.skip(str(memory_why_not()))
    targets = (
        MemoryRatio("fp32", True, 3.0, "hungry"),
        MemoryRatio("fp32", True, 3.0, "missing"),
        ExtraMemory("fp32", True, 1.0),
    )
    config = Benchmark("tiny", inputs, {}, ("query", "key", "value"), targets=targets)

    def hungry(given: dict[str, Any]) -> Callable[[], Any]:
        call = sdpa(given)
        return lambda: (torch.zeros(2**20).sum(), call())[1]

    info = measured(Peer("hungry", hungry), config=config, backward=True)
    ratio, missing, extra = info["targets"]
    assert ratio["found"] > 3.0 and ratio["at_peak"] is None and report.met(ratio)
    assert missing["found"] is None and str(report.verdict(missing)) == "can't run"
    assert "least" not in extra and extra["most"] == 1.0 and 0.0 < extra["found"] < 1.0 and report.met(extra)
    grads = sum(inputs(torch.Generator().manual_seed(0))[name].numel() * 4 for name in config.grads)
    ours, theirs = info["peak_memory_bytes"], info["peers"]["hungry"]["peak_memory_bytes"]
    assert extra["found"] * 1e6 == pytest.approx(max(ours - grads, 1))
    assert ratio["found"] == pytest.approx((theirs - grads) / max(ours - grads, 1))
    text = rendered(info)
    assert "extra MB" in text and "<= 1" in text and "memory of hungry" in text


def test_a_long_row_wastes_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate's first run serves for its check and its memory, and each other one is timed: here a single one."""
    monkeypatch.setattr(benchmark, "_LONG", -1.0)
    monkeypatch.setattr(benchmark, "_LONG_BUDGET", 0.0)
    runs: list[str] = []
    info = measured(Peer("sdpa", noted(runs)), backward=True, counts_products=True)
    assert len(runs) == 2
    assert info["rounds"] == 1 and info["calls_per_round"] == 1 and info["peers"]["sdpa"]["ratio"] > 0
    assert info["memory_why_not"] or info["peers"]["sdpa"]["peak_memory_bytes"] >= 0
    assert "gemms" not in info["peers"]["sdpa"]  # PyTorch's products in a long run are not counted


def test_a_row_whose_peers_are_long_has_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the op multiplies little of what they do."""
    monkeypatch.setattr(benchmark, "_LONG_BUDGET", 1e-9)
    runs: list[str] = []
    assert measured(Peer("sdpa", noted(runs)))["rounds"] == 1
    assert len(runs) == 3  # its check, its memory, and one round


def test_a_loss_gets_a_cotangent_of_1() -> None:
    loss, rows = gate.draw_cotangents([torch.zeros((), dtype=torch.bfloat16), torch.zeros(3)])
    assert loss.dtype == torch.bfloat16 and loss == 1
    assert rows.shape == (3,) and rows.unique().numel() == 3


def test_products_are_counted_where_that_is_asked_for() -> None:
    """In units of the forward pass, which has two; the naive one multiplies the 5 of 18 keys that are hidden too."""
    for asked in (False, True):
        naive = measured(backward=True, counts_products=asked)["peers"]["naive"]
        assert ("gemms" in naive) == asked
    assert naive["gemms"] == pytest.approx(6 / 2 * 18 / 13)


def test_a_naive_formula_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "memory_of", lambda device: 1000)
    peers_of_row = measured(Peer("sdpa", sdpa))["peers"]
    assert peers_of_row["naive"] == {"why_not": "would take 0 GB or more of 0 GB: left out"}
    assert peers_of_row["sdpa"]["ratio"] > 0


def test_the_table_has_a_column_for_products_that_were_counted() -> None:
    row = measured(Peer("two words", sdpa), backward=True, counts_products=True) | {"gemms": 4.25}
    without = {name: x for name, x in row.items() if name != "gemms"}
    for infos, shown in (([row], True), ([without, row], True), ([without], False)):
        text = rendered(*infos)
        assert ("GEMMs" in text) == ("4.25" in text) == shown


def rendered(*rows: dict[str, Any]) -> str:
    rates = {f"{name}_per_second": 1e9 for name in ("fp32_flops", "copy_bytes", "read_bytes")}
    results = {
        "machine_info": {"device": "a CPU", "ceilings": rates},
        "benchmarks": [{"extra_info": row} for row in rows],
    }
    console = Console(width=100)
    with console.capture() as printed:
        console.print(tables.render(results))
    return printed.get()


def test_rows() -> None:
    names = [str(row) for row in rows(SPEC, ["fp32", "bf16"]) if "media" in str(row)]
    assert names == [
        f"B1 H8 1024x4096 D64 media, {dtype}, {passes}"
        for dtype in ("fp32", "bf16")
        for passes in ("forward", "forward + backward")
    ]
    assert all(row.config.grads or not row.backward for row in rows(SPEC, ["fp32"]))


def test_quick_rows_are_each_op_s_headlines_in_the_pass_that_costs_more() -> None:
    for name, spec in specs().items():
        quick = rows(spec, ["fp32"], quick=True)
        assert quick and all(row.quick and row.config.headline for row in quick), name
        assert all(row.backward == bool(row.config.grads) for row in quick)
        assert {str(row) for row in quick} <= {str(row) for row in rows(spec, ["fp32"])}


def test_a_quick_row_takes_few_rounds_and_leaves_slow_peers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_LONG", -1.0)
    fixture = Fixture()
    beside = (Peer("sdpa", sdpa), Peer("slow", sdpa, slow=True))
    targets = tuple(Speedup("fp32", False, 1.0, peer) for peer in ("sdpa", "slow"))
    config = Benchmark("tiny", inputs, {}, targets=targets)
    benchmark.measure(fixture, Row(SPEC, config, "fp32", False, quick=True), beside)
    assert set(fixture.extra_info["peers"]) == {"naive", "sdpa"}
    assert [target["than"] for target in fixture.extra_info["targets"]] == ["sdpa"]
    assert fixture.extra_info["rounds"] <= 5 and fixture.extra_info["checked"].startswith("parts")


# The peak.


def test_bursts_have_their_share_of_the_time_and_their_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])
    rates = iter((5.0, 100.0, 6.0, 4.0, 7.0))

    def arithmetic() -> float:
        now[0] += 0.02
        return next(rates)

    def memory() -> float:
        now[0] += 0.02
        return 3.0

    monkeypatch.setattr(rounds.machine, "arithmetic", lambda dtype, device: arithmetic)
    monkeypatch.setattr(rounds.machine, "memory", lambda device: memory)
    peaks = rounds.Peaks(torch.float32, "cpu")
    for _ in range(80):  # 0.8 seconds of samples
        peaks.measure_if_due()
        now[0] += 0.01
    assert next(rates, None) is None  # five bursts, every 0.2 seconds
    assert peaks.flops == 6.0 and peaks.bytes == 3.0


def test_bursts_stand_between_the_candidates_calls() -> None:
    order: list[str] = []
    peaks = SimpleNamespace(measure_if_due=lambda: order.append("peak"))
    candidates = {name: lambda name=name: order.append(name) for name in ("ours", "a", "b")}
    samples = rounds.alternate(Fixture(), candidates, peaks, torch.device("cpu"), rounds=2)  # type: ignore[arg-type]
    assert order == ["peak", "a", "peak", "b", "ours"] * 2
    assert {name: len(seconds) for name, seconds in samples.items()} == {"ours": 2, "a": 2, "b": 2}


def test_what_a_run_needs_is_done_before_it_and_not_timed() -> None:
    order: list[str] = []
    peaks = SimpleNamespace(measure_if_due=lambda: order.append("peak"))
    candidates = {name: lambda name=name: order.append(name) for name in ("ours", "a")}
    before = lambda name: order.append(f"before {name}")
    rounds.alternate(Fixture(), candidates, peaks, torch.device("cpu"), rounds=2, before=before)  # type: ignore[arg-type]
    assert order == ["peak", "before a", "a", "before ours", "ours"] * 2
    with pytest.raises(ValueError, match="rounds must be given with before"):
        rounds.alternate(Fixture(), candidates, peaks, torch.device("cpu"), before=before)  # type: ignore[arg-type]


def test_the_peak_is_measured_where_no_peer_runs() -> None:
    order: list[str] = []
    peaks = SimpleNamespace(measure_if_due=lambda: order.append("peak"))
    rounds.alternate(Fixture(), {"ours": lambda: order.append("ours")}, peaks, torch.device("cpu"), rounds=2)  # type: ignore[arg-type]
    assert order == ["peak", "ours"] * 2


def test_the_naive_formula_is_measured_even_where_rounding_decides_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.Gate, "distance", lambda self, results: 1.0)
    peers_of_row = measured(Peer("sdpa", sdpa))["peers"]
    assert "ratio" in peers_of_row["naive"] and "computes something else" in peers_of_row["sdpa"]["why_not"]


def test_results_that_have_no_gradient_are_left_out_of_it() -> None:
    x = torch.ones(3, requires_grad=True)
    results = lambda: (2 * x, torch.arange(3), torch.ones(2))
    cotangents = gate.draw_cotangents(results())
    grad = gate.with_gradients(results, [x], cotangents)()[-1]
    torch.testing.assert_close(grad, 2 * cotangents[0])
