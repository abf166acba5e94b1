"""The cost model of a contrastive step, the logs that it plans from, and what the command prints."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from mmkernels import cli
from mmkernels.options import BadInput
from mmkernels.planning import measure
from mmkernels.planning.check import Check, Checked, check
from mmkernels.planning.devices import DEVICES
from mmkernels.planning.model import Curve, MeasuredRates, SheetRates, Took, hidden_from, predict
from mmkernels.planning.options import BATCHES, read_options
from mmkernels.planning.processes import on_ranks
from mmkernels.planning.ring import Step, gathered_bytes, passes, sent_bytes
from mmkernels.planning.runlog import read_log
from mmkernels.planning.table import checked_table

H200 = SheetRates(DEVICES["h200"], "bf16", 0.4, 40e9)

# The model.


def test_bytes_sent_by_a_rank_in_a_bf16_step_are_8_n_w_d() -> None:
    step = Step(262_144, 1024, 256, "bf16", gpu=True)
    share = sent_bytes(step) / (8 * step.rows * step.ranks * step.dim)
    assert 0.99 < share < 1.01


def test_one_rank_sends_nothing_and_waits_for_nothing() -> None:
    made = predict(Step(4096, 512, 1, "bf16"), H200)
    assert made.sent == 0 and made.wire_seconds == 0.0
    assert made.seconds == made.compute_seconds


def test_a_step_takes_its_blocks_or_its_wire_whichever_is_longer() -> None:
    for batch, binds in ((1_048_576, "wire"), (8_388_608, "compute")):
        made = predict(Step(batch, 1024, 256, "bf16", gpu=True), H200)
        assert made.binds == binds
        assert made.seconds == pytest.approx(max(made.compute_seconds, made.wire_seconds), rel=0.05)


def test_small_blocks_take_what_a_visit_costs_at_least() -> None:
    step = Step(32_768, 1024, 256, "bf16", gpu=True)
    made = predict(step, H200)
    assert made.binds == "calls" and made.seconds == pytest.approx(2 * step.ranks * H200.host, rel=0.01)


def test_compute_is_the_arithmetic_at_the_assumed_share_of_the_peak() -> None:
    step = Step(1 << 20, 1024, 8, "bf16", gpu=True)
    assert predict(step, H200).compute_seconds == pytest.approx(step.flops / (0.4 * 989e12), rel=1e-6)


POINTS = ((64, 1e-4), (1 << 20, 0.1))
MESSAGES = Curve(((1 << 13, 1e-4), (1 << 22, 0.01)))
MEASURED = MeasuredRates(
    forward=Curve(POINTS),
    backward=Curve(POINTS),
    handling=MESSAGES,
    alone=Took(1e-3, 1e-3),
    pair=Took(1.4e-3, 1.4e-3),
    sharing=1.0,
    memory_bytes=1e10,
)


def test_ranks_that_share_a_core_take_turns() -> None:
    step = Step(1 << 16, 64, 8, "fp32")
    alone, shared = (predict(step, replace(MEASURED, sharing=x)) for x in (1.0, 4.0))
    assert shared.seconds == pytest.approx(4 * alone.seconds)


def test_waiting_is_not_multiplied_where_ranks_share_a_core() -> None:
    waiting = replace(MEASURED, alone=Took(1e-3, 1e-4), pair=Took(1.4e-3, 1.4e-4), sharing=4.0)
    assert waiting.call(2) == pytest.approx(1.5 * 0.04e-3) and waiting.start(1) == pytest.approx(1e-3)


def test_the_smallest_step_is_predicted_as_it_was_measured() -> None:
    """On two ranks; more have more messages of those by which two ranks differ from one."""
    for ranks, messages in ((2, 10), (6, 4 * 5 + 2 * 11)):
        seconds = predict(Step(8 * ranks, 16, ranks, "fp32"), MEASURED).seconds
        assert seconds == pytest.approx(1e-3 + messages * 0.04e-3)


def test_a_limited_wire_is_hidden_until_it_binds() -> None:
    step = Step(1 << 14, 64, 4, "fp32")
    free = predict(step, MEASURED).seconds
    times = [predict(step, replace(MEASURED, wire_rate=sent_bytes(step) / (share * free))) for share in (0.1, 10.0)]
    assert times[0].seconds < 1.1 * free and times[0].binds == "compute"
    assert times[1].seconds == pytest.approx(10 * free, rel=0.15) and times[1].binds == "wire"


def test_what_does_not_fit_binds() -> None:
    assert predict(Step(1 << 28, 1024, 2, "bf16", gpu=True), H200).binds == "memory"


def test_every_part_of_a_batch_is_in_a_pass() -> None:
    for batch in (999, 4096, 12_345):
        step = Step(batch, 512, 3, "fp32")
        for backward in (False, True):
            found = [made for made in passes(step) if made.backward == backward]
            logits = sum(made.count * many * rows * columns for made in found for many, rows, columns in made.blocks)
            assert logits == step.rows**2


def test_from_the_batch_named_on_no_hop_waits() -> None:
    step = Step(32_768, 1024, 256, "bf16", gpu=True)
    hidden = hidden_from(step, H200)
    assert hidden is not None and hidden % step.ranks == 0
    for batch, waits in ((hidden, False), (hidden - step.ranks, True)):
        visits = passes(Step(batch, 1024, 256, "bf16", gpu=True))
        waiting = [H200.wire(made.passed) + H200.wire(made.follows) > H200.visit(made, step) for made in visits]
        assert any(waiting) == waits


def test_open_clips_gather_takes_half_of_what_it_is_published_to_take_under_autocast() -> None:
    """Inf-CL's table 1: 2.27 GB at 32k and 33.6 GB at 128k, on 8 GPUs, 768 channels."""
    for batch, published in ((32_768, 2.27e9), (131_072, 33.6e9)):
        assert 0.5 < gathered_bytes(Step(batch, 768, 8, "bf16")) / published < 0.6


def test_a_curve_passes_through_its_points_and_grows_with_the_size() -> None:
    curve = Curve([(100, 1.0), (10_000, 10.0), (1_000_000, 1000.0)])
    for size, seconds in curve.points:
        assert curve.at(size) == pytest.approx(seconds)
    assert curve.at(1000) == pytest.approx(10**0.5)
    assert curve.at(2_000_000) == pytest.approx(2000.0)
    assert curve.at(1) == 1.0 and curve.above_least(10_000) == pytest.approx(9.0)


def test_errors_are_shares_of_what_was_measured() -> None:
    one = Checked(Step(1024, 64, 2, "fp32"), (1.1, 1.0), (9.0, 10.0))
    assert one.time_error == pytest.approx(0.1) and one.memory_error == pytest.approx(-0.1)
    assert Checked(one.step, (1.0, 1.0), None).memory_error is None


# Ranks.


def _rank_and_sum(start: int) -> tuple[int, int]:
    total = torch.tensor([start + torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), int(total)


def _fails_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("too late")


def test_results_of_ranks_come_in_their_order() -> None:
    assert on_ranks(3, _rank_and_sum, 5, timeout=60.0) == [(0, 18), (1, 18), (2, 18)]


def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed: .*too late"):
        on_ranks(2, _fails_on_rank_1, timeout=60.0)


# Logs.

OPEN_CLIP = """\
2026-11-30,09:00:00 | INFO | Params:
2026-11-30,09:00:00 | INFO |   accum_freq: 2
2026-11-30,09:00:00 | INFO |   batch_size: 256
2026-11-30,09:00:00 | INFO |   model: ViT-B-32
2026-11-30,09:00:00 | INFO |   precision: amp_bf16
2026-11-30,09:00:00 | INFO |   world_size: 8
2026-11-30,09:00:05 | INFO | Train Epoch: 0 [   4096/1000000 (0%)] Data (t): 0.021 Batch (t): 0.700, 5851.43/s, \
731.429/s/gpu LR: 0.000001 Logit Scale: 14.286 Contrastive_loss: 8.3176 (8.3176) Loss: 8.3176 (8.3176)
2026-11-30,09:00:09 | INFO | Train Epoch: 0 [ 413696/1000000 (41%)] Data (t): 0.019 Batch (t): 0.500, 8192.00/s, \
1024.00/s/gpu LR: 0.000100 Logit Scale: 14.301 Contrastive_loss: 7.9 (8.1) Loss: 7.9 (8.1)
2026-11-30,09:00:14 | INFO | Train Epoch: 0 [ 823296/1000000 (82%)] Data (t): 0.020 Batch (t): 0.520, 7876.92/s, \
984.615/s/gpu LR: 0.000200 Logit Scale: 14.310 Contrastive_loss: 7.5 (7.9) Loss: 7.5 (7.9)
"""


@pytest.fixture
def log(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "out.log"
        path.write_text(text)
        return path

    return write


def test_a_log_of_open_clip(log, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("open_clip")
    stub.get_model_config = {"ViT-B-32": {"embed_dim": 512}}.get
    monkeypatch.setitem(sys.modules, "open_clip", stub)
    run = read_log(log(OPEN_CLIP))
    assert (run.batch, run.ranks, run.dim, run.dtype) == (256 * 2 * 8, 8, 512, "bf16")
    assert run.step_seconds == pytest.approx(0.520) and run.steps == 3


def test_a_log_of_open_clip_without_its_parameters(log) -> None:
    lines = [line for line in OPEN_CLIP.splitlines() if "Epoch" in line]
    run = read_log(log("\n".join(lines)))
    assert run.ranks == 8 and run.batch == pytest.approx(4096, rel=0.01) and run.dim is None and run.dtype is None


def test_json_lines(log) -> None:
    fields = [
        {"batch_size": 128, "world_size": 4, "embed_dim": 768, "precision": "bfloat16", "train/batch_time": 0.3},
        {"train/batch_time": 0.5, "train/loss": 7.1},
        {"train/batch_time": 0.4},
    ]
    run = read_log(log("starting\n" + "\n".join(map(json.dumps, fields)) + "\n{broken"))
    assert (run.batch, run.ranks, run.dim, run.dtype) == (512, 4, 768, "bf16")
    assert run.step_seconds == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "in which no line names a batch, ranks or times"),
        ('{"batch_size": 0}', "batch_size must be a number above 0, got 0 in out.log, line 1"),
        ('\n{"world_size": 2.5}', "world_size must be an integer, got 2.5 in out.log, line 2"),
        ('{"batch_size": "many"}', "batch_size must be a number above 0, got 'many'"),
        ('{"precision": "int8"}', "the precision must be one of fp32, "),
    ],
)
def test_a_log_that_cannot_be_used(log, text: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        read_log(log(text))
    assert message in str(error.value)


def test_a_plan_of_a_run(log) -> None:
    path = log('{"batch_size": 1000, "world_size": 16, "embed_dim": 512, "dtype": "fp16", "batch_time": 0.5}')
    options = read_options(log=path)
    assert [step.batch for step in options.steps] == [16_000, *BATCHES]
    assert options.steps[0] == Step(16_000, 512, 16, "fp16", torch.cuda.is_available())
    assert options.encoder_seconds == pytest.approx(0.5 / 1000)
    assert read_options(log=path, ranks=4, batch="64", device="a100").steps == (Step(64, 512, 4, "fp16", gpu=True),)


def test_a_log_that_does_not_say_the_channels_needs_them(log) -> None:
    path = log('{"batch_size": 1000, "world_size": 16, "dtype": "fp16"}')
    with pytest.raises(BadInput, match=r"--dim must be given with --from-log .*, which does not say it"):
        read_options(log=path)
    assert read_options(log=path, dim=64).steps[0].dim == 64


# The command.


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmkernels", "plan", "contrastive", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_by_a_data_sheet(plan, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    code, text, errors = plan("--dim", 1024, "--ranks", 256, "--device", "h200", "--no-check", "--out", out)
    assert code == 0, errors
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for size in BATCHES:
        assert f"{size:,}" in words
    assert "989 TFLOP/s bf16 x 40%, assumed" in words and "No kernel of this package has run on a GPU" in words
    assert "accuracy end near a batch of 32k" in words and "arXiv 2303.15343" in words
    assert "The wire is hidden from a batch of" in words
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["rows"]] == list(BATCHES)
    assert {row["binds"] for row in report["rows"]} <= {"calls", "compute", "memory", "wire"}
    assert report["rows"][0]["sent_bytes"] == sent_bytes(Step(BATCHES[0], 1024, 256, "bf16", gpu=True))


def test_a_given_bandwidth_replaces_the_data_sheets(plan) -> None:
    _, text, _ = plan("--batch", 32768, "--device", "h200", "--bandwidth", 12.5, "--no-check", "--encoder-ms", 100)
    assert "Wire: 12.5 GB/s (as given)" in " ".join(text.split()) and "whole" in text


@pytest.fixture
def _small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_MOST_FLOPS", {"cpu": 1e7, "cuda": 1e7})
    monkeypatch.setattr(measure, "_LEAST", 0.0)


@pytest.mark.usefixtures("_small_samples")
def test_of_this_machine(plan) -> None:
    code, text, errors = plan("--batch", 256, "--dim", 16, "--dtype", "fp32", "--ranks", 2, "--no-check")
    assert code == 0, errors
    words = " ".join(text.split())
    assert "Each rank is a machine like this one" in words and "GFLOP/s forward" in words
    assert "as measured between ranks on this machine" in words


@pytest.mark.slow
def test_a_check_measures_what_fits_into_the_time() -> None:
    steps = [Step(64, 16, 2, "fp32"), Step(1 << 22, 16, 2, "fp32")]
    found = check(steps, 30.0)
    assert [one.step for one in found.checked] == steps[:1] and found.left_out == steps[1:]
    one = found.checked[0]
    assert min(one.seconds) > 0 and one.memory_bytes is not None
    words = rendered(checked_table(found))
    assert "Worst error in time" in words and "Left out, as the time was up: 4,194,304 on 2." in words


def test_a_busy_machine_is_told() -> None:
    one = Checked(Step(1024, 64, 2, "fp32"), (1.1, 1.0), None)
    for spread, told in ((0.01, False), (0.2, True)):
        words = rendered(checked_table(Check([one], [], spread)))
        assert ("Unsteady: repeated times differ by 20% and more." in words) == told


def rendered(table: object) -> str:
    """Returns the words of what is printed."""
    screen = Console(file=io.StringIO(), width=100)
    screen.print(table)
    return " ".join(screen.file.getvalue().split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "many"], "--batch must be one or more integers, such as 32768,262144; got 'many'"),
        (["--batch", ","], "--batch must be one or more integers, such as 32768,262144; got ','"),
        (["--batch", "0"], "--batch must be from 1 to 68719476736, got 0"),
        (["--batch", "64", "--ranks", "65"], "--batch must be at least --ranks, 65, so that each has a pair; got 64"),
        (["--dim", "0"], "--dim must be from 1 to 65536, got 0"),
        (["--ranks", "-1"], "--ranks must be from 1 to 65536, got -1"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16; got 'fp8'"),
        (["--device", "v100"], "--device must be one of here, a100, h100, h200, b200; got 'v100'"),
        (["--bandwidth", "0"], "--bandwidth must be a number above 0, got 0.0"),
        (["--bandwidth", "nan"], "--bandwidth must be a number above 0, got nan"),
        (["--encoder-ms", "-3"], "--encoder-ms must be a number above 0, got -3.0"),
        (["--seconds", "0"], "--seconds must be a number above 0, got 0.0"),
        (["--from-log", "missing.log"], "--from-log must be a file that can be read, got missing.log: No such file"),
        (["--from-log", "/"], "--from-log must be a file that can be read, got /: Is a directory"),
        (["--out", "/"], "--out must be a file, got the folder /"),
        (["--out", "/proc/here/plan.json"], "--out /proc/here can't be written to"),
        (["--out", ""], "'--out': must be a path, got an empty text"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(plan, arguments: list[str], message: str) -> None:
    code, text, errors = plan("--device", "h200", *arguments)
    assert code == 2 and text == ""
    assert len(errors.splitlines()) == 1 and errors.startswith("mmkernels: ") and message in errors


def test_the_plan_needs_a_name(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mmkernels", "plan"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
