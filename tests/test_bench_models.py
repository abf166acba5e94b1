"""The benchmark of vision-language models, on tiny ones."""

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models_cases as cases
import models_measure
import models_pairs
import models_report
import pytest
import torch
import transformers
from models_clock import Clock, visible_pairs
from models_measure import Row, Trial, measure, rounds_for
from models_pairs import blip2, blip2_config, internvl, internvl_config, qwen_config, qwen_vl
from models_targets import NAIVE, ONE_IMAGE, SDPA, TEXT_ONLY, Found
from models_work import MAIN, BridgeStep, Encode, SecondTurn, TrainingStep, Work
from rich.console import Console
from torch import Tensor
from transformers import AttentionInterface

import mmkernels
from mmkernels import SpanMask, cross_attention
from mmkernels.bench import rounds, tables
from mmkernels.integrations.transformers import NAME
from mmkernels.models import BLIP2, InternVL, QwenVL
from mmkernels.models.blocks import packed_encoder
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.profiling.point import REMOVED
from mmkernels.targets import OURS

TRANSLATIONS: dict[Any, Any] = {qwen_config: QwenVL, internvl_config: InternVL, blip2_config: BLIP2}
PAIR = partial(qwen_vl, "tiny")
ENCODER = cases.Case(
    "tiny encoder", PAIR, partial(cases._one_image, side=40, text=8), Encode(), (cases.CAP, cases.ONE_CALL, cases.PEAK)
)
STEP = cases.Case(
    "tiny step", PAIR, partial(cases._supervised, side=16, length=20, share=0.1), TrainingStep(), (cases.HALF_MEMORY,)
)
BRIDGE = cases.Case(
    "tiny bridge",
    partial(blip2, "tiny"),
    partial(cases._captions, shortest=2, longest=4),
    BridgeStep(),
    (cases.CAP, cases.THIRD_MEMORY),
    baseline=NAIVE,
)
TURN = cases.Case(
    "tiny turn",
    PAIR,
    partial(cases._second_turn, side=24, text=5),
    SecondTurn(),
    (cases.NO_ENCODER, cases.TEXT_AND_ATTENTION),
)
VIDEO = cases.Case("tiny video", PAIR, partial(cases._video, frames=8, side=16, text=8), Work(), (cases.AS_ONE_IMAGE,))


class Fixture:
    """The part of pytest-benchmark's fixture that the benchmark uses: it times nothing, so that samples are alike."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Callable[[], Any], setup: Callable[[], Any], rounds: int, **more: Any) -> None:
        assert more == {"iterations": 1, "warmup_rounds": 0}
        for _ in range(rounds):
            setup()
            begin = time.perf_counter()
            target()
            self.stats.stats.data.append(time.perf_counter() - begin)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.machine, "arithmetic", lambda dtype, device: lambda: 1e9)
    monkeypatch.setattr(rounds.machine, "memory", lambda device: lambda: 2e9)
    monkeypatch.setattr(models_measure, "_QUICK_BUDGET", 0.0)  # one round, however fast the machine is


def measured(case: cases.Case, dtype: str = "fp32") -> dict[str, Any]:
    fixture = Fixture()
    measure(fixture, Row(case, dtype, quick=True))
    return json.loads(json.dumps(fixture.extra_info))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_times_ratios_and_targets(dtype: str) -> None:
    info = measured(ENCODER, dtype)
    sdpa, bound, attention = info["peers"][SDPA], info["amdahl"], info["attention"]
    assert [info[name] for name in ("op", "configuration", "dtype", "pass")] == [
        "models",
        "tiny encoder",
        dtype,
        "encode",
    ]
    assert sdpa["ratio"] == bound["speedup"] == sdpa["seconds"] / info["seconds"]
    assert bound["cap"] * bound["share_of_cap"] == pytest.approx(bound["speedup"])
    assert (attention["calls"], attention["layers"], attention["calls_per_layer"]) == (2, 2, 1.0)
    assert attention["sdpa_calls"] == 9 + 1  # windows, and the image
    assert set(attention["seconds"]) == {OURS, SDPA, REMOVED} == set(info["samples_seconds"])
    assert attention["ratio"] == attention["seconds"][SDPA] / attention["seconds"][OURS]
    assert attention["share_of_peak"] == attention["flops"] / attention["seconds"][OURS] / 1e9
    for name in (OURS, SDPA):
        assert 0 < attention["seconds"][name] < (info["seconds"] if name == OURS else sdpa["seconds"])
        assert info["memory_why_not"] or info["peak_memory_bytes"] > 0
    targets = {target["than"]: target for target in info["targets"]}
    assert targets["share of cap"] == {
        "than": "share of cap",
        "unit": "share",
        "least": 0.85,
        "found": bound["share_of_cap"],
    }
    assert targets["calls a layer"]["found"] == 1.0 == targets["calls a layer"]["most"]
    assert targets["attention, of FMA peak"]["found"] == attention["share_of_peak"]


def test_the_flops_are_those_of_the_visible_pairs() -> None:
    """40 x 40 pixels are 10 x 10 patches: 5 x 5 tokens, in windows of 2 x 2, then all at once."""
    patches = 4  # of a token
    windows = [(patches * h * w) ** 2 for h in (2, 2, 1) for w in (2, 2, 1)]
    pairs = sum(windows) + 100**2
    config = QwenVL.sizes["tiny"]
    assert measured(ENCODER)["attention"]["flops"] == 4 * pairs * config.vision_width


def test_transformers_model_is_measured_on_our_attention() -> None:
    info = measured(replace(ENCODER, subject=NAME))
    assert info["attention"]["calls"] == info["attention"]["layers"] == 2
    assert info["attention"]["flops"] == measured(ENCODER)["attention"]["flops"]
    assert info["encoder_calls"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    right, wrong = Encode.ours, lambda self, model, inputs: (right(self, model, inputs)[0] * 1.02,)
    monkeypatch.setattr(Encode, "ours", wrong)
    fixture = Fixture()
    match = rf"tiny encoder, {dtype}, encode is wrong, result 0: relative distance 0.0\d+, allowed "
    with pytest.raises(AssertionError, match=match):
        measure(fixture, Row(ENCODER, dtype))
    assert not fixture.extra_info


def test_attention_that_is_not_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encode, "ours", Encode.theirs)
    monkeypatch.setattr(Trial, "run", lambda self, name: Encode().theirs(self.theirs, self._next[name]))
    with pytest.raises(AssertionError, match="no attention call of tiny encoder, fp32, encode ran on mmkernels"):
        measure(Fixture(), Row(ENCODER, "fp32"))


def test_long_rows_have_few_rounds_and_short_ones_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [rounds_for(seconds, False) for seconds in (60.0, 20.0, 3.0, 0.2)] == [2, 3, 5, 50]
    assert [rounds_for(seconds, True) for seconds in (60.0, 1.0)] == [1, 5]


def test_only_a_row_that_is_compiled_is_not_measured() -> None:
    fixture = Fixture()
    measure(fixture, Row(ENCODER, "fp32", compile_only=True))
    assert not fixture.extra_info


def test_a_training_step_is_checked_by_its_loss_and_gradients() -> None:
    info = measured(STEP)
    assert len(info["distances"][OURS]) == 3 and max(info["distances"][OURS]) < 1e-5
    assert info["targets"][0]["than"] == "activations, of sdpa's"
    assert info["attention"]["calls"] == info["attention"]["layers"] == 4
    inputs = Trial(Row(STEP, "fp32"))._inputs[MAIN]
    assert int((inputs["labels"] >= 0).sum()) == 2 and inputs["labels"].shape == (1, 20)


def test_a_bridge_is_measured_beside_the_naive_formulas() -> None:
    info = measured(BRIDGE)
    assert max(info["distances"][OURS] + info["distances"][NAIVE]) < 1e-5 and len(info["distances"][OURS]) == 3
    assert info["attention"]["calls"] == info["attention"]["layers"] == 2 + 3 + 2 + 2 == info["attention"]["sdpa_calls"]
    naive, sdpa, bound = info["peers"][NAIVE], info["peers"][SDPA], info["amdahl"]
    assert bound["speedup"] == naive["ratio"] == naive["seconds"] / info["seconds"] and sdpa["ratio"] > 0
    assert 0 < info["peak_memory_bytes"] < naive["peak_memory_bytes"]
    limits = [(target["than"], target["found"]) for target in info["targets"]]
    assert limits == [
        ("share of cap", bound["share_of_cap"]),
        ("activations, of naive", info["peak_memory_bytes"] / naive["peak_memory_bytes"]),
    ]
    rows = [json.loads(json.dumps(info)), info | {"peers": {SDPA: sdpa}}]
    screen = Console(width=140, file=io.StringIO())
    screen.print(models_report._table(rows))
    cells = [line.split() for line in screen.file.getvalue().splitlines() if "tiny bridge" in line]
    assert len(cells[0]) == len(cells[1]) and "naive" in screen.file.getvalue()


def test_a_bridge_trains_what_lies_between_frozen_models() -> None:
    trial = Trial(Row(BRIDGE, "fp32"))
    for name, net in ((OURS, trial.ours), (SDPA, trial.theirs)):
        trial.results(name)
        trained = {part.split(".")[0] for part, x in net.named_parameters() if x.grad is not None}
        assert trained == (
            {"qformer", "projection"} if name == OURS else {"query_tokens", "qformer", "language_projection"}
        )
    inputs = trial._inputs[MAIN]
    assert inputs["attention_mask"].sum(1).tolist() == [4 + 2, 4 + 3, 4 + 4]
    assert (inputs["labels"] >= 0).sum(1).tolist() == [2, 3, 4]


def test_activations_are_what_the_backward_pass_needs() -> None:
    """The loss of 256 tokens over 32,768 keeps a matrix of 34 MB or more at transformers, and none in ours."""
    pair = partial(qwen_vl, "tiny", vocab_size=32768)
    case = replace(STEP, pair=pair, inputs=partial(cases._supervised, side=16, length=256, share=0.1))
    info = measured(case)
    ours, theirs = info["peak_memory_bytes"], info["peers"][SDPA]["peak_memory_bytes"]
    assert theirs - ours > 0.9 * 256 * 32768 * 4
    assert 256 * 64 * 4 < ours < 20e6  # its layers' activations are counted, the head's gradient of 8 MB is not
    assert info["targets"][0]["found"] == ours / theirs


def test_gradients_do_not_stay() -> None:
    trial = Trial(Row(STEP, "fp32"))
    trial.results(OURS)
    assert all(x.grad is not None for x in trial.ours.parameters())
    trial.drop_gradients()
    assert all(x.grad is None for x in trial.ours.parameters())


@torch.no_grad()
def test_a_second_turn_encodes_nothing_and_each_run_begins_with_the_same_cache() -> None:
    info = measured(TURN)
    assert {target["than"]: target["found"] for target in info["targets"]}["encoder calls"] == 0
    assert TEXT_ONLY in info["peers"] and TEXT_ONLY in info["attention"]["seconds"]
    trial = Trial(Row(TURN, "fp32"))
    for name in (SDPA, OURS):
        first, again = (trial.results(name)[0] for _ in range(2))
        assert torch.equal(first, again)
    alone = trial.results(TEXT_ONLY)[0]
    assert torch.linalg.vector_norm(alone - first) > 0.05 * torch.linalg.vector_norm(first)


def test_a_video_is_compared_with_an_image_of_as_many_tokens() -> None:
    info = measured(VIDEO)
    assert info["targets"][0]["found"] == pytest.approx(1 / info["peers"][ONE_IMAGE]["ratio"])
    inputs = Trial(Row(VIDEO, "fp32"))._inputs
    video, image = inputs[MAIN], inputs[ONE_IMAGE]
    assert video["pixel_values_videos"].shape == image["pixel_values"].shape
    assert video["input_ids"].shape == image["input_ids"].shape
    assert video["video_grid_thw"].tolist() == [[4, 4, 4]] and image["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_what_a_second_turn_may_take() -> None:
    times = {OURS: 5.0, TEXT_ONLY: 3.0}
    found = Found(times, {OURS: 1.5, TEXT_ONLY: 0.5}, {}, 1, 1, 1.0, 1.0, 0)
    assert found.over_text() == 5.0 / (3.0 + 1.0)


@pytest.mark.parametrize(
    ("translate", "config"),
    [
        pytest.param(translate, config, id=f"{model.__name__} {size}")
        for translate, model in TRANSLATIONS.items()
        for size, config in model.sizes.items()
        if not getattr(config, "instruct", False)
    ],
)
def test_both_models_have_the_published_sizes(translate: Any, config: Any) -> None:
    architecture, theirs = translate(config)
    made = getattr(transformers, architecture).config_class(**theirs)
    assert type(config).from_hf(made.to_dict() | {"architectures": [architecture]}) == config


@pytest.mark.parametrize(
    ("pair", "inputs"),
    [
        (partial(qwen_vl, "tiny_qwen2"), partial(cases._one_image, side=24, text=8)),
        (partial(qwen_vl, "tiny_qwen3"), partial(cases._one_image, side=24, text=8)),
        (partial(internvl, "tiny"), partial(cases._tiles, tiles=2, text=8)),
    ],
    ids=["Qwen2-VL", "Qwen3-VL", "InternVL"],
)
def test_pairs_have_the_same_weights(pair: Any, inputs: Any) -> None:
    info = measured(cases.Case("pair", pair, inputs, Work(), (cases.CAP,)))
    assert max(info["distances"][OURS]) < 1e-5 and info["attention"]["calls_per_layer"] == 1


def test_a_small_vocabulary_ends_with_the_markers() -> None:
    config = qwen_vl("tiny", vocab_size=90).ours.config
    assert (config.vocab_size, config.image_token_id, config.video_token_id) == (90, 89, 88)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_every_row_has_models_and_prompts(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that both models accept, and as many markers as there are visual tokens; nothing of that size is run."""
    monkeypatch.setattr(models_pairs, "_pair", lambda *made, **more: made)
    model_class, config, translate = case.pair()
    architecture, theirs = translate(config)
    made = getattr(transformers, architecture).config_class(**theirs)
    values = made.to_dict() | {"architectures": [architecture]}
    assert model_class._read_config(values, Path("config.json")) == config
    with torch.device("meta"):
        ours = model_class(config)
    for inputs in case.inputs(config).values():
        whole = inputs.get("first", inputs)
        given = {name: x for name, x in whole.items() if name not in ("input_ids", "attention_mask", "labels")}
        media, _ = ours._media(whole["input_ids"], **given)
        for kind in media:
            assert int((whole["input_ids"] == kind.marker).sum()) == sum(kind.marked)


def test_every_row_has_its_own_name_and_targets() -> None:
    names = [str(Row(case, "fp32")) for case in cases.CASES]
    assert len(set(names)) == len(names) and all(case.targets for case in cases.CASES)


# The clock.


@pytest.mark.parametrize(
    "mask",
    [
        None,
        SpanMask.causal(5, 7),
        SpanMask.causal(5, 7) & SpanMask.key_padding([3, 6]),
        SpanMask.from_key_mask(torch.tensor([[True, False, True, True, True, False, True]])),
        SpanMask(
            torch.tensor([[-3, 2, 6, 0, 1]], dtype=torch.int32), torch.tensor([[2, 9, 4, 0, 7]], dtype=torch.int32)
        ),
        torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5,
    ],
    ids=["none", "causal", "padding", "holes", "any bounds", "dense"],
)
def test_visible_pairs_are_those_of_the_matrix(mask: SpanMask | Tensor | None) -> None:
    dense = (
        torch.ones(5, 7, dtype=torch.bool) if mask is None else mask.to_dense(7) if isinstance(mask, SpanMask) else mask
    )
    assert visible_pairs(mask, 2, 3, 5, 7) == int(dense.expand(2, 3, 5, 7).sum())


def test_the_clock_sees_calls_of_every_module_and_leaves_them_as_they_were() -> None:
    x = torch.randn(1, 2, 3, 4)
    before = AttentionInterface()["sdpa"]
    clock = Clock("cpu")
    with clock.watching():
        mmkernels.cross_attention(x, x, x)
        packed_encoder.cross_attention(x, x, x, SpanMask.causal(3, 3))
        AttentionInterface()["sdpa"](torch.nn.Module(), x, x, x, None, is_causal=False)
    assert (len(clock.calls), clock.sdpa_calls) == (2, 1) and clock.seconds > 0
    assert clock.flops() == 2 * (9 + 6) * 2 * 8
    assert mmkernels.cross_attention is cross_attention is packed_encoder.cross_attention
    assert AttentionInterface()["sdpa"] is before


def test_the_cost_of_the_op_is_counted_alike() -> None:
    x = torch.randn(1, 2, 3, 4)
    clock = Clock("cpu")
    with clock.watching():
        mmkernels.cross_attention(x, x, x)
    inputs = {"query": x, "key": x, "value": x, "mask": None}
    assert clock.flops() == SPEC.cost(inputs, False).flops


# The report.


def test_the_report_shows_rows_and_targets() -> None:
    info = measured(ENCODER)
    info |= {"peak_memory_bytes": 10**6}
    info["targets"][0]["found"] = 0.5
    machine = {"device": "Abacus", "versions": {"torch": "1", "transformers": "2"}}
    report = {"machine_info": machine, "expected_rows": 3, "benchmarks": [{"extra_info": info}]}
    info["attention"]["share_of_peak"] = 0.612
    assert tables.line(info).endswith(", 1 attention calls a layer, 61% of peak, 1.0 MB")
    screen = Console(width=130, file=io.StringIO())
    screen.print(models_report.render(report))
    lines = [" ".join(line.split()) for line in screen.file.getvalue().splitlines()]
    assert "2 of 3 rows were not measured" in lines
    assert any(line.startswith("tiny encoder encode ") for line in lines)
    assert "tiny encoder fp32 encode share of cap 85% 50% missed" in lines
    assert "tiny encoder fp32 encode calls a layer <= 1.00 1.00 met" in lines
