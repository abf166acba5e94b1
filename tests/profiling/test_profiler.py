"""The profiler end to end on a tiny model, and on a stand-in model."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mmkernels
from mmkernels import report as writer
from mmkernels.profiling import plot, point, profiler, table
from mmkernels.profiling.adapter import Stage
from mmkernels.profiling.options import Options
from mmkernels.profiling.photo import default_photo
from mmkernels.runtime import dispatch, eager

PHOTO = Image.open(default_photo()).convert("RGB")


def options(**more: Any) -> Options:
    settings = {"tokens": (4, 8), "images": 2, "text_length": 12, "size": "tiny"} | more
    return Options(model="flamingo", image=default_photo(), **settings)


@pytest.fixture(scope="module")
def report(two_rounds: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    with two_rounds():
        return profiler.profile(options(train=True), PHOTO)


def render(report: dict[str, Any], width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table.render(report))
    return capture.get()


def test_report_has_a_cell_for_each_token_count_and_backend(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["schema"] == 1
    assert report["machine"]["versions"]["mmkernels"] == mmkernels.__version__
    assert [(cell["tokens_per_image"], cell["backend"]) for cell in report["cells"]] == [
        (4, "fused"), (4, "reference"), (8, "fused"), (8, "reference")
    ]  # fmt: skip
    for cell in report["cells"]:
        assert cell["visual_tokens"] == 2 * cell["tokens_per_image"]
        seconds = cell["seconds"]
        assert set(seconds) == {"encode", "resample", "prefill", "decode", "total", "train_step"}
        assert min(seconds.values()) > 0
        assert seconds["total"] == pytest.approx(seconds["encode"] + seconds["resample"] + seconds["prefill"])
        assert all(len(samples) == 2 for samples in cell["samples_seconds"].values())
        assert report["memory_why_not"] or cell["train_peak_memory_bytes"] > 0


def test_drift_is_that_of_rounding(report: dict[str, Any]) -> None:
    for cell in report["cells"]:
        assert cell["drift"]["relative_l2"] < (1e-5 if cell["backend"] == "fused" else 1e-30)
        assert cell["drift"]["top1_agreement"] > 0.9


def test_amdahl_bounds_agree_with_the_times(report: dict[str, Any]) -> None:
    fused, naive = report["cells"][2:]
    assert naive["amdahl"] == {}
    for name, bound in fused["amdahl"].items():
        assert bound["speedup"] == pytest.approx(naive["seconds"][name] / fused["seconds"][name])
        assert bound["cap"] * bound["share_of_cap"] == pytest.approx(bound["speedup"])


def test_a_naive_loss_stands_beside_the_fused_one(report: dict[str, Any]) -> None:
    for cell in report["cells"]:
        found = cell["naive_loss"]
        if cell["backend"] == "reference":
            assert found == {}
        else:
            assert found["train_step"] > 0
            assert report["memory_why_not"] or found["train_peak_memory_bytes"] > 0
    lines = render(report).splitlines()
    (legend,) = (line for line in lines if line.startswith("logits:"))
    assert legend == "logits: fused but for the training loss, which is made from all logits."
    first, second = (line.split() for line in lines if " logits  " in line)
    assert first[:4] == ["2", "x", "4", "logits"] and second[:4] == ["2", "x", "8", "logits"]
    measured = report["cells"][0]["naive_loss"]
    expected = [writer.milliseconds(measured["train_step"]), writer.megabytes(measured["train_peak_memory_bytes"])]
    assert first[4:] == expected
    older = [{name: value for name, value in cell.items() if name != "naive_loss"} for cell in report["cells"]]
    assert " logits  " not in render(report | {"cells": older})


def test_the_naive_loss_is_the_same_loss() -> None:
    adapter = profiler.MODELS["flamingo"]
    model = adapter.build(options(), 4).double()
    inputs = adapter.inputs(options(), model, [PHOTO, PHOTO], 4)
    losses = adapter.loss(model, inputs), adapter.naive_loss(model, inputs)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[0].float(), losses[1], rtol=1e-6, atol=0)  # the naive one is in float32
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_marginal_cost_is_the_slope_between_the_ends(report: dict[str, Any]) -> None:
    few, many = report["cells"][0], report["cells"][2]
    slope = (many["seconds"]["prefill"] - few["seconds"]["prefill"]) / 8
    assert report["marginal_seconds_per_visual_token"]["fused"]["prefill"] == pytest.approx(slope)


def test_command_in_the_report_names_no_folder(report: dict[str, Any]) -> None:
    assert report["command"] == (
        "mmkernels profile flamingo --image grace_hopper.jpg --tokens 4,8 --images 2 --text-length 12 "
        "--backend fused,reference --dtype fp32 --device cpu --size tiny --train"
    )
    assert str(default_photo().parent) not in json.dumps(report)


def test_table_fits_in_100_columns(report: dict[str, Any]) -> None:
    lines = render(report).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert sum("2 x 8" in line for line in lines) == 4  # fused, its naive loss, naive; fused again beside its bounds
    assert "…" not in "".join(lines)
    assert "8 tokens x 2 images" in table.summary(report)


def test_progress_is_told_as_often_as_promised() -> None:
    told: list[str] = []
    chosen = options(tokens=(4,), backends=("chunked",), train=True)
    report = profiler.profile(chosen, PHOTO, told.append)
    assert len(told) == profiler.steps(chosen)
    assert report["cells"][0]["drift"] is None and report["cells"][0]["amdahl"] == {}
    assert "chunked" in render(report) and "prefill" in table.summary(report)


def test_16_bit_drift_is_measured_against_float32_too() -> None:
    report = profiler.profile(options(tokens=(4,), dtype="bf16"), PHOTO)
    fused, naive = (cell["drift"]["relative_l2_to_fp32"] for cell in report["cells"])
    assert 1e-4 < fused < 0.1 and 1e-4 < naive < 0.1


def test_picture_is_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    plot.draw(report, PHOTO, tmp_path / "profile.png")
    with Image.open(tmp_path / "profile.png") as picture:
        assert min(picture.size) > 600
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000


@pytest.mark.parametrize(("unsteady", "cut"), [(False, False), (True, False), (False, True), (True, True)])
def test_warnings_stand_in_the_table_and_in_the_picture(
    report: dict[str, Any],
    figures_of: Callable[[ModuleType], list[Any]],
    tmp_path: Path,
    unsteady: bool,
    cut: bool,
) -> None:
    samples = [1.0, 1.0, 2.0, 2.0] if unsteady else [1.0] * 4
    cells = [cell | {"samples_seconds": {"encode": samples}} for cell in report["cells"]]
    changed = report | {"cells": [cell for cell in cells if not cut or cell["tokens_per_image"] == 4]}
    drawn = figures_of(plot)
    plot.draw(changed, PHOTO, tmp_path / "profile.png")
    shown = " ".join(text.get_text() for text in drawn[0].texts)
    for words in (shown, " ".join(render(changed).split())):
        assert ("Unsteady: repeated times differ by" in words) == unsteady
        assert ("Interrupted: 8 tokens per image were not measured." in words) == cut


def test_a_committed_profile_still_loads_and_plots(tmp_path: Path) -> None:
    (path,) = Path(__file__).parents[2].glob("benchmarks/results/*/profile_flamingo.json")
    saved = json.loads(path.read_text())
    assert "prefill" in render(saved) and table.summary(saved)
    plot.draw(saved, PHOTO, tmp_path / "profile.png")


def test_picture_of_one_point_without_memory(report: dict[str, Any], tmp_path: Path) -> None:
    cells = [cell | {"peak_memory_bytes": None, "train_peak_memory_bytes": None} for cell in report["cells"][:1]]
    settings = report["settings"] | {"tokens": [4], "backends": ["fused"]}
    alone = report | {"cells": cells, "settings": settings, "memory_why_not": "no meter here"}
    plot.draw(alone, PHOTO, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    assert "n/a" in render(alone) and "no meter here" in render(alone)


class Linear:
    """The smallest model that can be profiled: what another model must bring."""

    sizes = ("one",)
    total = "answer"
    about: ClassVar[dict[str, str]] = {}
    square = True
    stages = (Stage("multiply", "one matrix", lambda model, inputs, state: model(inputs)),)

    def check(self, options: Options) -> None:
        pass

    def build(self, options: Options, tokens: int) -> nn.Module:
        return nn.Linear(tokens, tokens)

    def inputs(self, options: Options, model: nn.Linear, photos: list[Image.Image], tokens: int) -> Tensor:
        return torch.ones(len(photos), model.in_features).to(model.weight)

    def logits(self, model: nn.Linear, inputs: Tensor) -> Tensor:
        if self.fails and dispatch.resolve(None) == "reference":
            raise RuntimeError(self.fails)
        return model(inputs)

    def loss(self, model: nn.Linear, inputs: Tensor) -> Tensor:
        return model(inputs).sum()

    naive_loss = None  # it has no logits

    fails = ""


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Linear:
    adapter = Linear()
    monkeypatch.setitem(profiler.MODELS, "linear", adapter)
    return adapter


def test_another_model_is_one_adapter(linear: Linear, tmp_path: Path) -> None:
    report = profiler.profile(Options("linear", default_photo(), tokens=(4, 8), size="one", train=True), PHOTO)
    assert report["cells"][0]["seconds"]["total"] == report["cells"][0]["seconds"]["multiply"]
    plot.draw(report, PHOTO, tmp_path / "profile.png")


def test_a_backend_that_runs_out_of_memory_leaves_the_others(linear: Linear, tmp_path: Path) -> None:
    linear.fails = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
    report = profiler.profile(Options("linear", default_photo(), tokens=(4,), size="one", train=True), PHOTO)
    fused, naive = report["cells"]
    assert naive["failed"] == "out of memory" and naive["seconds"] == {}
    assert fused["seconds"]["train_step"] > 0 and fused["amdahl"] == {}
    assert "out of memory" in render(report)
    plot.draw(report, PHOTO, tmp_path / "profile.png")


def test_a_training_step_that_runs_out_of_memory_is_left_out(linear: Linear, tmp_path: Path) -> None:
    def loss(model: nn.Linear, inputs: Tensor) -> Tensor:
        if dispatch.resolve(None) == "reference":
            raise torch.OutOfMemoryError("no more")
        return model(inputs).sum()

    linear.loss = loss  # type: ignore[method-assign]
    report = profiler.profile(Options("linear", default_photo(), tokens=(4, 8), size="one", train=True), PHOTO)
    fused, naive = report["cells"][:2]
    assert "train_step" in fused["seconds"] and "train_step" not in naive["seconds"]
    assert set(fused["amdahl"]) == {"multiply", "total"} and naive["failed"] is None
    assert "n/a" in render(report) and table.summary(report)
    plot.draw(report, PHOTO, tmp_path / "profile.png")


def test_choices_are_restored_after_an_error(linear: Linear) -> None:
    linear.fails = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        profiler.profile(Options("linear", default_photo(), tokens=(4,), size="one"), PHOTO)
    for candidate in ("reference", point.REMOVED):
        with pytest.raises(KeyError), point.running_as(candidate):
            raise KeyError
    assert not eager.stubbed() and dispatch.resolve(None) == ""


def test_removed_returns_zeros() -> None:
    x = torch.randn(1, 2, 3, 4)
    with point.running_as(point.REMOVED):
        assert not mmkernels.cross_attention(x, x, x).any()
    assert mmkernels.cross_attention(x, x, x).any()
