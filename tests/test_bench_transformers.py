"""The benchmark of transformers' models, on tiny ones."""

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers_measure
import transformers_report
from rich.console import Console
from transformers import AttentionInterface, AttentionMaskInterface
from transformers_measure import NAME, SDPA, Clock, Row, Trial, measure
from transformers_models import HEADLINES, MODELS, Model, decoder

from mmkernels.options import DTYPES
from mmkernels.testing import models
from mmkernels.testing.parts import left_padded, tokens

LAYERS = 2


def build() -> torch.nn.Module:
    return models.build("LlamaModel", decoder(width=32, mlp=64, depth=LAYERS, heads=4, kv_heads=2))


def second_layer(module: Any) -> bool:
    return module.layer_idx == 1


TINY = Model(
    "tiny",
    build,
    lambda: left_padded(tokens(2, 12), [9, 12]),
    least={"fp32": 1.5, "bf16": 2.0},
    counts=second_layer,
    called="of layer 1",
)


class Fixture:
    """The part of pytest-benchmark's fixture that the benchmark uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""

    def pedantic(self, target: Callable[[], Any], rounds: int, iterations: int) -> None:
        target()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_measure, "_BUDGET", 0.0)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    transformers_measure.register()
    before = registered()
    yield
    for (interface, name), function in before.items():
        interface.register(name, function)


def registered() -> dict[tuple[Any, str], Any]:
    places = [(interface, name) for interface in (AttentionInterface, AttentionMaskInterface) for name in (SDPA, NAME)]
    return {(interface, name): interface()[name] for interface, name in places}


def measured(model: Model = TINY, dtype: str = "fp32") -> dict[str, Any]:
    fixture = Fixture()
    measure(fixture, Row(model, dtype))
    return json.loads(json.dumps(fixture.extra_info))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_times_ratios_and_targets(dtype: str) -> None:
    info = measured(dtype=dtype)
    sdpa, bound = info["peers"]["sdpa"], info["amdahl"]
    assert [info[name] for name in ("op", "configuration", "dtype", "pass")] == [
        "transformers",
        "tiny",
        dtype,
        "forward",
    ]
    assert info["rounds"] == 5
    assert sdpa["ratio"] == bound["speedup"] == sdpa["seconds"] / info["seconds"]
    assert bound["cap"] * bound["share_of_cap"] == pytest.approx(bound["speedup"])
    assert (info["attention"]["calls"], info["counted"]["calls"], info["masks"]["calls"]) == (LAYERS, 1, 1)
    for kind in ("attention", "counted", "masks"):
        assert 0 < info[kind]["seconds"] < info["seconds"]
        assert info[kind]["ratio"] == info[kind]["sdpa_seconds"] / info[kind]["seconds"]
    assert info["masks"]["spans"] + info["masks"]["dense"] == LAYERS
    assert info["memory_why_not"] or info["peak_memory_bytes"] >= 0
    calls = info["peers"]["sdpa's attention calls"]
    assert calls == {"seconds": info["counted"]["sdpa_seconds"], "ratio": info["counted"]["ratio"]}
    targets = {target["than"]: target for target in info["targets"]}
    assert targets["forward"]["found"] == sdpa["ratio"]
    assert targets["attention"] == {"than": "attention", "least": TINY.least[dtype], "found": info["counted"]["ratio"]}
    assert targets["share of cap"]["found"] == bound["share_of_cap"]


def test_the_time_of_each_call_of_a_registered_function_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_measure, "time_once", lambda run, device: (run(), 0.5)[1])
    info = measured()
    for kind, calls in (("attention", LAYERS), ("counted", 1), ("masks", 1)):
        assert info[kind]["seconds"] == info[kind]["sdpa_seconds"] == 0.5 * calls, kind


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = AttentionInterface()[NAME]

    @functools.wraps(ours)
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, weights = ours(*args, **kwargs)
        return out * 1.001, weights

    monkeypatch.setattr(transformers_measure, "register", lambda: AttentionInterface.register(NAME, wrong))
    fixture = Fixture()
    with pytest.raises(AssertionError, match=r"mmkernels is wrong at tiny, fp32, forward, result 0: .* error"):
        measure(fixture, Row(TINY, "fp32"))
    assert not fixture.extra_info


def test_padding_is_not_compared() -> None:
    outputs = Trial(Row(TINY, "fp32")).results(SDPA)
    assert [x.shape for x in outputs] == [(2 * 12 - 3, 32)]


def test_attention_that_is_not_reached_is_an_error() -> None:
    def bow() -> torch.nn.Module:
        net = build()
        net.layers = torch.nn.ModuleList()
        return net

    with pytest.raises(AssertionError, match="no attention call of tiny, fp32, forward ran on mmkernels"):
        measure(Fixture(), Row(replace(TINY, build=bow), "fp32"))


def test_only_a_row_that_is_compiled_is_not_measured() -> None:
    fixture = Fixture()
    measure(fixture, Row(TINY, "fp32", compile_only=True))
    assert not fixture.extra_info


def test_the_clock_leaves_what_was_registered() -> None:
    before = registered()

    def fail() -> None:
        with Clock(second_layer, "cpu").around((SDPA, NAME)):
            assert all(function is not before[place] for place, function in registered().items())
            raise RuntimeError("in a forward pass")

    with pytest.raises(RuntimeError, match="in a forward pass"):
        fail()
    assert registered() == before
    measured()
    assert registered() == before


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_wider_dtype_computes_the_same_problem(dtype: str) -> None:
    """Weights and inputs are those of the narrow dtype, and come back as they were."""
    trial = Trial(Row(replace(TINY, inputs=lambda: {"inputs_embeds": torch.randn(1, 5, 32)}), dtype))
    seen = []
    for kind in (DTYPES[dtype], torch.float64, DTYPES[dtype]):
        trial.to(kind)
        seen.append([x.clone() for x in (*trial.net.parameters(), trial.inputs["inputs_embeds"])])
    for begin, between, end in zip(*seen, strict=True):
        assert begin.dtype == DTYPES[dtype] and between.dtype == torch.float64
        assert torch.equal(begin.double(), between) and torch.equal(begin, end)


def test_each_forward_pass_begins_with_the_same_cache() -> None:
    one_token = lambda: {"input_ids": tokens(1, 1), "use_cache": True}
    model = Model("decode", build, one_token, cached=6, most_overhead=1.0)
    trial = Trial(Row(model, "fp32"))
    first, again = (trial.results(SDPA)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert trial.inputs["past_key_values"].get_seq_length() == 6 + 1
    info = measured(model)
    difference = info["seconds"] - info["peers"]["sdpa"]["seconds"]
    assert info["amdahl"] == {}
    assert info["targets"] == [{"than": "overhead", "most": 1.0, "found": difference / LAYERS}]


def test_gates_that_begin_closed_are_opened() -> None:
    def gated() -> torch.nn.Module:
        net = build()
        net.gate = torch.nn.Parameter(torch.zeros(1))
        net.bias = torch.nn.Parameter(torch.zeros(7))
        return net

    net = Trial(Row(replace(TINY, build=gated), "fp32")).net
    assert net.gate.item() == 0.5 and net.bias.all()


def test_every_model_has_its_own_name_and_headlines_a_target_in_each_dtype() -> None:
    names = [model.id for model in MODELS]
    assert len(set(names)) == len(names)
    assert all(set(model.least) == {"fp32", "bf16"} for model in HEADLINES)


def test_the_report_shows_rows_and_targets() -> None:
    slow = measured()
    slow["targets"] = [
        {"than": "forward", "least": 0.95, "found": 0.5},
        {"than": "attention", "least": 2.5, "found": 3.0},
        {"than": "overhead", "most": 20e-6, "found": 30e-6},
    ]
    fast = slow | {"configuration": "fast", "targets": [{"than": "forward", "least": 0.95, "found": 1.5}]}
    machine = {"device": "Abacus", "versions": {"torch": "1", "transformers": "2"}}
    report = {"machine_info": machine, "benchmarks": [{"extra_info": slow}, {"extra_info": fast}]}
    screen = Console(width=130, file=io.StringIO())
    screen.print(transformers_report.render(report))
    lines = [line.split() for line in screen.file.getvalue().splitlines()]
    targets = {line[2]: line[3:] for line in lines if line[:2] == ["tiny", "fp32"]}
    assert targets["forward"] == [">=", "0.95x", "0.50x", "missed"]
    assert targets["attention"] == [">=", "2.5x", "3.00x", "met"]
    assert targets["overhead"] == ["<=", "20", "us", "30", "us", "missed"]
    assert ["fast", "fp32"] not in [line[:2] for line in lines]
    assert "slowest forward: 0.50x sdpa's speed (tiny, fp32); none may be below 0.95x" in map(" ".join, lines)
