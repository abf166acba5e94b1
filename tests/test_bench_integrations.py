"""The benchmark of patched models, on tiny ones."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import integrations_measure
import integrations_report
import pytest
import torch
from integrations_measure import Row, Trial, measure
from integrations_models import CASES, Case
from integrations_targets import CAP, EAGER, PEAK, SDPA, Found
from rich.console import Console
from test_bench_models import Fixture, _quick

from mmkernels.integrations.patching.classes import is_patched
from mmkernels.profiling.point import REMOVED
from mmkernels.targets import OURS
from mmkernels.testing import models, parts

__all__ = ["_quick"]  # a fixture: no clock of the machine's peak, one round


def build() -> torch.nn.Module:
    return models.build("BlipVisionModel", parts.vision(width=32, mlp=32, depth=1, heads=2))


TINY = Case(
    "tiny",
    build,
    lambda: {"pixel_values": parts.pixels(2)},
    own=(EAGER,),
    attention="BlipAttention",
    targets=PEAK,
)


def tiny_step() -> torch.nn.Module:
    return models.build("LlamaForCausalLM", parts.decoder(width=32, depth=1, heads=2, kv_heads=2))


STEP = Case(
    "tiny step",
    tiny_step,
    lambda: {"input_ids": (ids := parts.tokens(2, 8)), "labels": ids, "use_cache": False},
    own=(SDPA,),
    trains=True,
    gradients=("lm_head.weight",),
    head="lm_head.weight",
    targets=(CAP,),
)


def measured(case: Case) -> dict[str, Any]:
    fixture = Fixture()
    measure(fixture, Row(case, "fp32", quick=True))
    return json.loads(json.dumps(fixture.extra_info))


def test_a_forward_pass() -> None:
    row = measured(TINY)
    assert row["peers"].keys() == {EAGER} and row["attention_calls"]["flops"] == 2 * 2 * 2 * 17 * 17 * 32
    assert all(seconds > 0 for seconds in row["attention_modules"]["seconds"].values())
    assert [target["than"] for target in row["targets"]] == ["attention, eager's", "attention, of FMA peak"]


def test_a_training_step() -> None:
    row = measured(STEP)
    assert row["pass"] == "training step" and row["peers"].keys() == {SDPA}
    assert 0 < row["peak_memory_bytes"] < row["peers"][SDPA]["peak_memory_bytes"]


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trial.run

    def wrong(self: Trial, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(x + (name == OURS) for x in run(self, name))

    monkeypatch.setattr(Trial, "run", wrong)
    with pytest.raises(AssertionError, match=r"tiny, fp32, forward is wrong after patch, result 0"):
        measure(Fixture(), Row(TINY, "fp32"))


def test_only_ours_is_patched() -> None:
    trial = Trial(Row(TINY, "fp32"))
    for name, expected in ((EAGER, False), (OURS, True), (REMOVED, True), (EAGER, False)):
        trial.prepare(name)
        assert any(map(is_patched, trial.net.modules())) == expected


def test_what_is_found() -> None:
    found = Found({EAGER: 4.0, SDPA: 2.0, REMOVED: 0.9, OURS: 1.0}, {EAGER: 3.0, OURS: 0.5}, 0.25, 10.0,
                  {EAGER: 9, SDPA: 8, OURS: 2}, 5.0, 100.0)  # fmt: skip
    assert (found.peer, found.ratio, found.share_of_cap) == (SDPA, 2.0, 0.9)
    assert found.share_of_peak == pytest.approx(0.4) and found.attention_ratio == 6.0
    assert found.memory_share == 0.25 and found.loss_at_peak == pytest.approx(0.5)


def test_the_report() -> None:
    rows = [measured(TINY), measured(STEP)]
    report = {
        "benchmarks": [{"extra_info": row} for row in rows],
        "machine_info": {"device": "a machine", "versions": {"transformers": "5", "torch": "2"}},
        "expected_rows": 3,
    }
    console = Console(file=io.StringIO(), width=130)
    console.print(integrations_report.render(report))
    text = console.file.getvalue()
    assert "1 of 3 rows were not measured" in text and "tiny step" in text and "attention, of FMA peak" in text


def test_the_cases() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.trains == bool(case.gradients) and case.targets
    assert integrations_measure.Row(replace(TINY, id="x"), "bf16").__str__() == "x, bf16, forward"
