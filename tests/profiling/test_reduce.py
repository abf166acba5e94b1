"""The profiler over reducers, end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mmkernels.options import BadInput
from mmkernels.profiling import plot_reduce, profiler, table
from mmkernels.profiling.flamingo import FlamingoAdapter, ReducingFlamingoAdapter
from mmkernels.profiling.options import Choice, Options
from mmkernels.profiling.photo import default_photo, paint
from mmkernels.runtime import dispatch

PHOTO = Image.open(default_photo()).convert("RGB")
Overlaps = Callable[[Any], list[tuple[str, str]]]
REDUCERS = ("pool:2", "tome:0.5", "select:0.25", "perceiver:4")
TOKENS = {"none": 17, "pool:2": 5, "tome:0.5": 9, "select:0.25": 5, "perceiver:4": 5}


def options(**more: Any) -> Options:
    settings = {"reduce": REDUCERS, "images": 2, "text_length": 24, "size": "tiny"} | more
    return Options(model="flamingo", image=default_photo(), **settings)


@pytest.fixture(scope="module")
def stages(two_rounds: Callable[[], AbstractContextManager[None]]) -> list[dict[str, Any]]:
    """All reports of one profile, the last of which is complete."""
    with two_rounds():
        return list(profiler.reports(options(train=True), PHOTO))


@pytest.fixture(scope="module")
def report(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return stages[-1]


def render(report: dict[str, Any]) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table.render(report))
    return capture.get()


def words(text: str) -> str:
    return " ".join(text.split())


def cell(report: dict[str, Any], reducer: str, backend: str = "fused") -> dict[str, Any]:
    (found,) = (cell for cell in report["cells"] if (cell["reducer"], cell["backend"]) == (reducer, backend))
    return found


def test_report_has_a_cell_for_each_reducer_and_backend(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert [cell["reducer"] for cell in report["cells"][::2]] == ["none", *REDUCERS]
    for reducer, tokens in TOKENS.items():
        for backend in ("fused", "reference"):
            found = cell(report, reducer, backend)
            assert (found["tokens_per_image"], found["visual_tokens"]) == (tokens, 2 * tokens)
            assert set(found["seconds"]) == {"encode", "reduce", "prefill", "decode", "total", "train_step"}
            assert all(len(samples) == 2 for samples in found["samples_seconds"].values())
            assert report["memory_why_not"] or found["train_peak_memory_bytes"] > 0
    assert set(cell(report, "pool:2")["amdahl"]) == {"encode", "reduce", "prefill", "decode", "total", "train_step"}
    assert report["settings"]["tokens"] is None and report["marginal_seconds_per_visual_token"] == {}


def test_drift_is_measured_from_the_unreduced_naive_model(report: dict[str, Any]) -> None:
    assert cell(report, "none", "reference")["drift"]["relative_l2"] == 0
    assert 0 < cell(report, "none")["drift"]["relative_l2"] < 1e-5
    for reducer in ("pool:2", "tome:0.5", "select:0.25"):
        fused, naive = (cell(report, reducer, backend)["drift"] for backend in ("fused", "reference"))
        assert 0.01 < fused["relative_l2"] < 2
        assert fused["relative_l2"] == pytest.approx(naive["relative_l2"], rel=1e-3)
        assert fused["top1_agreement"] < 1
    assert cell(report, "perceiver:4")["drift"] is None, "its weights are random"


def test_what_reducers_make_of_the_first_image(report: dict[str, Any]) -> None:
    token_of = {name: about["token_of"] for name, about in report["reducers"].items()}
    assert token_of["none"] == list(range(16))
    assert token_of["pool:2"] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert len(set(token_of["tome:0.5"])) == 8 and token_of["perceiver:4"] is None
    assert sorted(token_of["select:0.25"]) == [-1] * 12 + [0, 1, 2, 3]
    assert [about["learned"] for about in report["reducers"].values()] == [False, False, False, False, True]
    assert {(about["rows"], about["columns"]) for about in report["reducers"].values()} == {(4, 4)}


def test_command_repeats_the_profile(report: dict[str, Any]) -> None:
    assert report["command"] == (
        "mmkernels profile flamingo --image grace_hopper.jpg --reduce none,pool:2,tome:0.5,select:0.25,perceiver:4 "
        "--images 2 --text-length 24 --backend fused,reference --dtype fp32 --device cpu --size tiny --train"
    )
    assert options(reduce=("none", *REDUCERS, "pool:2")).rows == options().rows


@pytest.mark.parametrize("train", [False, True])
def test_tables_fit_in_100_columns(report: dict[str, Any], train: bool) -> None:
    shown = render(report | {"settings": report["settings"] | {"train": train}})
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 100 and "…" not in shown
    for reducer, tokens in TOKENS.items():
        rows = [line.split() for line in lines if line.split()[:1] == [reducer]]
        assert [row[1:5] for row in rows] == [
            ["2", "x", str(tokens), backend] for backend in ("fused", *["logits"] * train, "naive", "fused")
        ]
        drift = rows[0][-1 if train else -2]
        found = cell(report, reducer)["drift"]
        mark = table.MARK if reducer in report["pareto"] else ""
        assert drift == ("-" if found is None else table.drift_text(found["relative_l2"]) + mark)


@pytest.mark.parametrize("train", [False, True])
def test_legend_says_what_the_columns_are(report: dict[str, Any], train: bool) -> None:
    shown = words(render(report | {"settings": report["settings"] | {"train": train}}))
    assert "drift: relative L2 distance of all logits from those of none, naive" in shown
    assert ("same token: how often" in shown) == ("the share of the cap" in shown) == (not train)
    assert "The weights are random." in shown
    assert "No drift of perceiver:4: with random weights of its own it says nothing." in shown


def test_summary_compares_with_the_unreduced_model(report: dict[str, Any]) -> None:
    cells = [dict(found) for found in report["cells"] if found["backend"] == "fused"]
    for found, seconds in zip(cells, (0.4, 0.2, 0.4, 0.8, 0.1), strict=True):
        found["seconds"] = {"total": seconds}
        found["drift"] = found["drift"] and {"relative_l2": 0.123, "top1_agreement": 0.5}
    assert table.summary(report | {"cells": cells}) == (
        "fused, all 17 tokens: first token after 400 ms; pool:2 2.00x as fast (drift 0.12); "
        "tome:0.5 1.00x as fast (drift 0.12); select:0.25 0.50x as fast (drift 0.12); perceiver:4 4.00x as fast."
    )


@pytest.fixture
def drawn(figures_of: Callable[[ModuleType], list[Any]]) -> list[Any]:
    """The figures that are drawn."""
    return figures_of(plot_reduce)


@pytest.mark.parametrize("close", [False, True])
def test_texts_of_the_picture_do_not_touch(
    report: dict[str, Any], drawn: list[Any], overlaps: Overlaps, tmp_path: Path, close: bool
) -> None:
    cells = [dict(found) for found in report["cells"]]
    for i, found in enumerate(cells):
        found["seconds"] = dict.fromkeys(report["stages"], 0.1) | {"total": 0.3 if close else 0.3 + 0.1 * (i % 3)}
        if found["drift"]:
            found["drift"] = {"relative_l2": 0.5 if close else 0.1 * i, "top1_agreement": 0.5}
    plot_reduce.draw(report | {"cells": cells}, PHOTO, tmp_path / "profile.png")
    assert overlaps(drawn[0]) == []


def test_picture_shows_each_reducer(report: dict[str, Any], drawn: list[Any], tmp_path: Path) -> None:
    plot_reduce.draw(report, PHOTO, tmp_path / "profile.png")
    time, memory, trade, *photos = drawn[0].axes
    assert [label.get_text() for label in time.get_yticklabels()] == [f"{n}\n{t} tokens" for n, t in TOKENS.items()]
    widths = [sum(bar.get_width() for bar in time.patches[i : i + 3]) for i in range(0, len(time.patches), 3)]
    assert widths == pytest.approx([found["seconds"]["total"] * 1e3 for found in report["cells"]])
    if not report["memory_why_not"]:
        assert [bar.get_width() * 1e6 for bar in memory.patches] == pytest.approx(
            [found["peak_memory_bytes"] for found in report["cells"]]
        )
    assert {text.get_text() for text in trade.texts} >= TOKENS.keys() - {"perceiver:4"}
    assert [photo.texts[0].get_text() for photo in photos] == list(TOKENS)
    assert [photo.texts[1].get_text() for photo in photos] == [
        "all 16 patches", "16 patches in 4 tokens", "16 patches in 8 tokens", "4 of 16 patches kept",
        "each token sees all patches",
    ]  # fmt: skip
    assert "Each image has 1 token beside its patches, such as a class token." in words(
        " ".join(text.get_text() for text in drawn[0].texts)
    )
    with Image.open(tmp_path / "profile.png") as picture:
        assert min(picture.size) > 600


def test_a_profile_that_is_cut_short_is_shown(stages: list[dict[str, Any]], drawn: list[Any], tmp_path: Path) -> None:
    """Reducers are timed together, so what comes before has no times."""
    assert [len(report["reducers"]) for report in stages] == [1, 2, 3, 4] + [5] * 6
    for at, warning in (
        (2, "Interrupted: select:0.25 and perceiver:4 were not measured."),
        (3, "Interrupted: perceiver:4 was not measured."),
        (4, "Interrupted: not all times were measured."),
    ):
        cut = untimed(stages[at])
        plot_reduce.draw(cut, PHOTO, tmp_path / "profile.png")
        assert warning in {text.get_text() for text in drawn[-1].texts}
        assert warning in words(render(cut)) and "Not all times were measured." in table.summary(cut)


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report as it was before the times came, which are written into the same cells."""
    return report | {"cells": [cell | {"seconds": {}, "samples_seconds": {}, "amdahl": {}} for cell in report["cells"]]}


def test_progress_is_told_as_often_as_promised() -> None:
    told: list[str] = []
    chosen = options(reduce=("diverse:5",), train=True)  # it indexes with what an op returns, zeros for the cap
    profiler.profile(chosen, PHOTO, told.append)
    assert len(told) == profiler.steps(chosen)
    assert "diverse:5: peak memory, naive" in told and "time to reduce" in told


def test_without_the_naive_backend_drift_is_from_the_first() -> None:
    report = profiler.profile(options(reduce=("pool:2",), backends=("fused",)), PHOTO)
    assert cell(report, "none")["drift"]["relative_l2"] == 0
    assert 0.01 < cell(report, "pool:2")["drift"]["relative_l2"] < 2
    assert "from those of none, fused" in words(render(report))
    assert table.summary(report).startswith("fused, all 17 tokens")


def test_16_bit_drift_is_measured_from_float32() -> None:
    report = profiler.profile(options(reduce=("pool:2",), dtype="bf16"), PHOTO)
    whole, pooled = (cell(report, name)["drift"]["relative_l2_to_fp32"] for name in ("none", "pool:2"))
    assert 1e-4 < whole < 0.1 < pooled < 2
    assert "from those of none, naive float32" in words(render(report))


def test_rows_share_their_weights() -> None:
    adapter = ReducingFlamingoAdapter()
    whole = adapter.build(options(), Choice("none"))
    for reducer in ("tome:0.5", "perceiver:4"):
        other = adapter.exchange(options(), whole, Choice(reducer))
        shared = dict(other.named_parameters())
        assert all(shared[name].data_ptr() == weight.data_ptr() for name, weight in whole.named_parameters())
        assert other.config.reduce == reducer


def test_a_backend_that_runs_out_of_memory_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, drawn: list[Any], tmp_path: Path
) -> None:
    logits = FlamingoAdapter.logits

    def fails(self: FlamingoAdapter, model: Any, inputs: Any) -> torch.Tensor:
        if dispatch.resolve(None) == "reference":
            raise torch.OutOfMemoryError("no more")
        return logits(self, model, inputs)

    monkeypatch.setattr(FlamingoAdapter, "logits", fails)
    report = profiler.profile(options(reduce=("pool:2",)), PHOTO)
    assert cell(report, "pool:2", "reference")["failed"] == "out of memory"
    assert cell(report, "pool:2")["seconds"]["total"] > 0 and cell(report, "pool:2")["drift"] is None
    plot_reduce.draw(report, PHOTO, tmp_path / "profile.png")
    assert "out of memory" in render(report)
    assert any("out of memory" in text.get_text() for text in drawn[0].axes[0].texts)
    assert "not measured" in {text.get_text() for text in drawn[0].axes[2].texts}


def test_a_machine_without_a_memory_meter(report: dict[str, Any], drawn: list[Any], tmp_path: Path) -> None:
    cells = [cell | {"peak_memory_bytes": None, "train_peak_memory_bytes": None} for cell in report["cells"]]
    plot_reduce.draw(report | {"cells": cells, "memory_why_not": "no meter here"}, PHOTO, tmp_path / "profile.png")
    assert "no meter here" in {text.get_text() for text in drawn[0].axes[1].texts}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tokens": (4, 8)}, "--tokens and --reduce can't be given together: .* got 4,8 and pool:2,tome:0.5"),
        ({"reduce": ()}, "--reduce must be 1 to 24 reducers, such as pool:2,tome:0.5; got nothing"),
        ({"reduce": tuple(f"tome:{i}" for i in range(1, 26))}, "--reduce must be 1 to 24 reducers"),
        ({"reduce": ("pool:2", "best:3")}, "--reduce best:3: a reducer must be .*, got 'best:3'"),
        ({"reduce": ("select:17",)}, "--reduce select:17: keep must be"),
        ({"reduce": ("tome:0",)}, "--reduce tome:0: keep must be 1 or more, or a share"),
        ({"reduce": ("perceiver:65536",)}, "--reduce must leave at most 65536 tokens per image, got perceiver:65536"),
        ({"reduce": ("perceiver:0.5",)}, "--reduce perceiver:0.5: keep must be an integer, got float"),
    ],
)
def test_bad_reducers_are_found_before_anything_is_measured(given: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        profiler.find_model(options(**given))


def test_a_model_that_takes_no_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(profiler.MODELS, "other", FlamingoAdapter())
    with pytest.raises(BadInput, match=r"model must be one of flamingo, .* with --reduce; got 'other'"):
        profiler.find_model(Options("other", default_photo(), reduce=("pool:2",), size="tiny"))


# What is painted.


def painted(token_of: list[int] | None) -> np.ndarray:
    """Returns the middle of each patch of an image of 2 x 2 patches: red, green, blue and black."""
    colours = np.array([[[200, 0, 0], [0, 100, 0]], [[0, 0, 50], [0, 0, 0]]], dtype=np.uint8)
    image = Image.fromarray(colours.repeat(24, 0).repeat(24, 1))
    return paint(image, {"rows": 2, "columns": 2, "token_of": token_of})[12::24, 12::24]


def test_patches_that_share_a_token_have_their_mean_colour() -> None:
    whole = painted(None)
    assert whole.tolist() == [[[200, 0, 0], [0, 100, 0]], [[0, 0, 50], [0, 0, 0]]]
    assert np.array_equal(painted([0, 1, 2, 3]), whole)
    assert painted([0, 0, 1, 0]).tolist() == [[[66, 33, 0]] * 2, [[0, 0, 50], [66, 33, 0]]]


def test_patches_that_were_dropped_are_grey() -> None:
    shown = painted([-1, 0, -1, 1])
    assert shown[0, 1].tolist() == [0, 100, 0] and shown[1, 1].tolist() == [0, 0, 0]
    for grey in (shown[0, 0], shown[1, 0]):
        assert len(set(grey.tolist())) == 1 and 190 < grey[0] < 230


def test_lines_stand_between_tokens_of_several_patches() -> None:
    image = Image.new("RGB", (48, 48), "black")
    about = {"rows": 2, "columns": 2}
    assert not paint(image, about | {"token_of": [0, 1, 2, 3]}).any()
    lines = paint(image, about | {"token_of": [0, 0, 1, 2]}).any(-1)
    assert lines[23:25].all() and not lines[:23].any() and not lines[25:].any()
