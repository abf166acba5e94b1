"""The ahead-of-time gate: what it compiles, what it calls wrong, and that a launch is specialised as it will be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mmkernels.aot import __main__ as gate
from mmkernels.aot.resources import Resources
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.runtime.tuning import ARCHITECTURES, KERNELS, Config

pytest.importorskip("triton")

from mmkernels.aot import triton as aot
from mmkernels.aot.variants import distinct, launches, variants

pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="compiles, and the interpreter does not")

GOOD = Resources("forward_kernel", "bfloat16 D64 spans training", "sm_90", 200, 0, 1000, 5000)
COMPILERS = {"triton": "1", "nvcc": "2"}


def test_every_default_configuration_is_compiled() -> None:
    """Of each target: every kernel's tiles for every bucket of head dims that the op is trained with."""
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        compiled = {(x.kernel.__name__, x.config) for _, x in distinct(target)}
        for kernel, dim in itertools.product(("forward", "grad_query", "grad_key_value_masked"), (64, 128, 256)):
            name = kernel.removesuffix("_masked") + "_kernel"
            assert (name, tuning.default(kernel, target, torch.bfloat16, dim)) in compiled, (target, kernel, dim)
    for target in ARCHITECTURES:
        compiled = {(x.kernel.__name__, x.config) for _, x in distinct(target)}
        for kernel, name in (("contrastive", "info_nce_kernel"), ("contrastive_grad", "info_nce_gradient_kernel")):
            plan = tuning.default(kernel, target, torch.bfloat16, 768)
            assert {(name, plan), (f"exact_{name}", plan)} <= compiled, (target, kernel)


def test_defaults_exist_for_everything() -> None:
    for architecture, kernel, dim, dtype in itertools.product(
        ARCHITECTURES, KERNELS, (1, 64, 65, 128, 256), (torch.float32, torch.bfloat16)
    ):
        found = tuning.default(kernel, architecture, dtype, dim)
        assert all(n >= 16 and n & (n - 1) == 0 for n in (found.block_q, found.block_k))
        assert found.warps in (4, 8) and 1 <= found.stages <= 4


def test_launches_are_recorded_not_made() -> None:
    (variant,) = [x for x in variants("sm_90") if str(x) == "bfloat16 D64 everything"]
    names = [x.kernel.__name__ for x in launches(variant, "sm_90")]
    assert names.count("forward_kernel") == names.count("grad_query_kernel") == 1
    assert names.count("grad_key_value_kernel") == 1 and "tile_status" in names


def test_contrastive_launches() -> None:
    """Each kernel for what is asked of it: descriptors on Hopper, none elsewhere; a pass more where ranks are."""
    for target, tma in (("sm_90", True), ("sm_80", False), ("gfx942", False)):
        (variant,) = [x for x in variants(target) if str(x) == "bfloat16 D768 place" and x.what == "info_nce"]
        found = {x.kernel.__name__: x for x in launches(variant, target)}
        assert "best_positives_kernel" not in found
        assert {found[name].constants["TILE"].TMA for name in ("info_nce_kernel", "info_nce_gradient_kernel")} == {tma}
        assert found["info_nce_kernel"].constants["FLATTEN_LOOP"] == (target != "gfx942")
    (variant,) = [x for x in variants("sm_90") if str(x) == "bfloat16 D768 everything" and x.what == "info_nce"]
    names = [x.kernel.__name__ for x in launches(variant, "sm_90")]
    assert names.count("info_nce_kernel") == 2 and names.count("best_positives_kernel") == 1  # hard texts: one more
    assert names.count("info_nce_gradient_kernel") == names.count("exact_info_nce_gradient_kernel") == 2


def test_a_launch_is_specialised_by_alignment_ones_and_none() -> None:
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    value = (torch.empty(2, dtype=torch.bfloat16), None, 1, 32, 33, 2**40, 0.5)
    kinds = aot._type_of(value, (3,), constants, attributes)
    assert kinds == ("*bf16", "constexpr", "constexpr", "i32", "i32", "i64", "fp32")
    assert constants == {(3, 1): None, (3, 2): 1}
    assert set(attributes) == {(3, 0), (3, 3), (3, 5)}


def test_resources_of_a_small_kernel() -> None:
    launch = next(x for _, x in distinct("sm_90") if x.kernel.__name__ == "list_tiles")
    for target in ("sm_90", "gfx942"):
        found = aot.resources(launch, "small", target)
        assert 0 < found.registers < 64 and found.spilled_bytes == 0
        assert 0 < found.code_bytes < 2**16 and found.shared_bytes < 2**14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"spilled_bytes": 8, "variant": "bfloat16 D128 none training"}, "spills 8 bytes"),
        ({"spilled_bytes": 8, "variant": "bfloat16 D256 none training"}, None),
        ({"spilled_bytes": 8, "target": "sm_80"}, None),
        ({"spilled_bytes": 8, "target": "sm_80", "variant": "float16 D80 1 row tile"}, "spills 8 bytes"),
        ({"spilled_bytes": 8, "kernel": "ranks_kernel", "variant": "bfloat16 D768 none ranks"}, "spills 8 bytes"),
        ({"spilled_bytes": 8, "kernel": "info_nce_kernel", "variant": "bfloat16 D768 place info_nce"}, "spills 8"),
        ({"spilled_bytes": 8, "kernel": "info_nce_kernel", "variant": "bfloat16 D768 everything info_nce"}, None),
        ({"spilled_bytes": 8, "kernel": "exact_info_nce_kernel", "variant": "bfloat16 D768 place info_nce"}, None),
        ({"shared_bytes": 228 << 10}, "needs 233472 bytes of shared memory, there are 232448"),
        ({"shared_bytes": 65 << 10, "target": "gfx942"}, "there are 65536"),
        ({"shared_bytes": 228 << 10, "target": "sm_100a"}, "there are 232448"),
    ],
)  # fmt: skip
def test_what_is_wrong(changes: dict[str, object], message: str | None) -> None:
    problems = gate.check([Resources(**{**vars(GOOD), **changes})])
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_the_table_is_written_read_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TABLE", tmp_path / "table.csv")
    by_hand = Resources("decode_kernel", "float16 D80 1 row tile", "sm_80", 100, 0, 1, 2)
    assert "run python -m mmkernels.aot --update" in gate.differences([GOOD], COMPILERS)[0]
    gate.write_table([by_hand, GOOD], COMPILERS)
    assert gate.read_table() == (COMPILERS, [by_hand, GOOD])
    assert gate.differences([by_hand, GOOD], COMPILERS) == []
    grown = Resources(**{**vars(GOOD), "registers": 201})
    problems = gate.differences([by_hand, grown], COMPILERS)
    assert len(problems) == 2 and "'registers': 200" in problems[0] and "'registers': 201" in problems[0]
    assert "now None" in gate.differences([GOOD], COMPILERS)[0]  # a kernel that is no longer there
    assert gate.differences([grown], {"triton": "3"}) == []  # made by other compilers
    assert gate.differences([GOOD], {"triton": "1"}) == []  # without nvcc its kernels are not asked about


def test_without_nvcc_the_cuda_part_is_skipped_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(gate.cuda, "why_not", lambda: "nvcc not found")
    monkeypatch.setattr(gate, "compile_all", lambda compilers: [GOOD] if "nvcc" not in compilers else [])
    assert gate.main(["--update"]) == 0 and gate.main([]) == 0
    said = capsys.readouterr()
    assert "skipped: the CUDA C++ kernels are not compiled: nvcc not found" in said.out
    assert "forward_kernel" in said.out and "1 kernels compiled" in said.out


def test_problems_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "TABLE", tmp_path / "table.csv")
    spilling = Resources(**{**vars(GOOD), "spilled_bytes": 16})
    monkeypatch.setattr(gate, "compile_all", lambda compilers: [spilling])
    assert gate.main(["--update"]) == 1
    assert "error: forward_kernel, bfloat16 D64 spans training, sm_90 spills 16 bytes" in capsys.readouterr().err


def test_what_was_compiled_is_kept_until_a_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.aot import variants as compiling

    (tmp_path / "mmkernels").mkdir()
    source = tmp_path / "mmkernels" / "kernel.py"
    source.write_text("1")
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    calls: list[int] = []
    monkeypatch.setattr(compiling, "compile_triton", lambda: calls.append(1) or [GOOD])
    for count in (1, 1):
        assert gate.compile_all({"triton": "1"}) == [GOOD] and len(calls) == count
    source.write_text("2")
    assert gate.compile_all({"triton": "1"}) == [GOOD] and len(calls) == 2


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.aot import variants as compiling

    variant, launch = next(iter(distinct("sm_90")))
    broken = gpu.Launch(launch.kernel, launch.grid, launch.args, launch.constants, Config(3, 64, 4, 1))
    broken.constants["BLOCK_Q"] = 3
    monkeypatch.setattr(compiling, "_launches", lambda target: [(variant, broken)])
    with pytest.raises(RuntimeError, match=r"forward_kernel, bfloat16 D64 none, .* does not compile for sm_90"):
        compiling._compile("sm_90", 0)
