"""The ahead-of-time gate: what it compiles, what it calls wrong, and what it keeps."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from toy_op import make_package

from mmkernels.aot import __main__ as gate
from mmkernels.aot import cache
from mmkernels.aot.resources import Row, Usage
from mmkernels.ops import NAMES, folder
from mmkernels.plan import TARGETS, Limit, Variant
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.runtime.tuning import Config

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels.aot import build
from mmkernels.aot import triton as aot
from mmkernels.aot.launches import Entry, launches

pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="compiles, and the interpreter does not")

ROOT = Path(__file__).parents[1]
GOOD = Row("cross_attention", "forward_kernel", "bfloat16 D64 spans training", "sm_90", Usage(200, 0, 1000, 5000))
COMPILERS = {"triton": "1", "nvcc": "2"}


@pytest.fixture(autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "aot")


def changed(**changes: Any) -> Row:
    """`GOOD` with other fields."""
    usage = GOOD.usage._replace(**{name: changes.pop(name) for name in Usage._fields if name in changes})
    return GOOD._replace(usage=usage, **changes)


def variant_of(op: str, name: str) -> Variant:
    plan = tuning.plan(op)
    assert plan is not None
    (variant,) = [variant for variant in plan.variants if variant.name == name]
    return variant


# Plans.


def test_every_op_with_triton_kernels_has_a_plan() -> None:
    with_kernels = {op for op in NAMES if list(folder(op).glob("triton*"))}
    assert with_kernels == set(tuning.plans())


def test_defaults_exist_for_everything() -> None:
    for op, plan in tuning.plans().items():
        assert set(plan.tiles) == set(TARGETS)
        for target, kernel, dim, dtype in itertools.product(
            TARGETS, plan.kernels, (1, 64, 65, 128, 256), (torch.float32, torch.bfloat16)
        ):
            found = tuning.default(op, kernel, target, dtype, dim)
            # Matrix products take tiles of 16 and more; some kernels without one take row by row.
            assert all(n & (n - 1) == 0 for n in (found.block_q, found.block_k))
            assert found.block_k >= 16 and (found.block_q >= 16 or found.block_q == 1)
            assert found.warps in (4, 8) and 1 <= found.stages <= 4


def configs_of(op: str, target: str) -> set[tuple[str, Config]]:
    plan = tuning.plan(op)
    assert plan is not None
    variants = [variant for variant in plan.variants if target in variant.targets]
    return {(x.kernel.__name__, x.config) for variant in variants for x in launches(op, variant, target)}


def test_every_default_configuration_is_compiled() -> None:
    """Of each target: every kernel's tiles for every bucket of head dims that the op is trained with."""
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        compiled = configs_of("cross_attention", target)
        for kernel, dim in itertools.product(("forward", "grad_query", "grad_key_value_masked"), (64, 128, 256)):
            name = kernel.removesuffix("_masked") + "_kernel"
            config = tuning.default("cross_attention", kernel, target, torch.bfloat16, dim)
            assert (name, config) in compiled, (target, kernel, dim)
    for target in TARGETS:
        compiled = configs_of("info_nce", target)
        for kernel, name in (("contrastive", "info_nce_kernel"), ("contrastive_grad", "info_nce_gradient_kernel")):
            config = tuning.default("info_nce", kernel, target, torch.bfloat16, 768)
            assert {(name, config), (f"exact_{name}", config)} <= compiled, (target, kernel)


# Launches.


def test_launches_are_recorded_not_made() -> None:
    before = gpu.launches()
    variant = variant_of("cross_attention", "bfloat16 D64 everything training")
    names = [x.kernel.__name__ for x in launches("cross_attention", variant, "sm_90")]
    assert names.count("forward_kernel") == names.count("grad_query_kernel") == 1
    assert names.count("grad_key_value_kernel") == 1 and "tile_status" in names
    assert gpu.launches() == before


def test_contrastive_launches() -> None:
    """Each kernel for what is asked of it: descriptors on Hopper, none elsewhere; a pass more where ranks are."""
    place = variant_of("info_nce", "bfloat16 D768 place info_nce")
    for target, tma in (("sm_90", True), ("sm_80", False), ("gfx942", False)):
        found = {x.kernel.__name__: x for x in launches("info_nce", place, target)}
        assert "best_positives_kernel" not in found
        assert {found[name].constants["TILE"].TMA for name in ("info_nce_kernel", "info_nce_gradient_kernel")} == {tma}
        assert found["info_nce_kernel"].constants["FLATTEN_LOOP"] == (target != "gfx942")
    everything = variant_of("info_nce", "bfloat16 D768 everything info_nce")
    names = [x.kernel.__name__ for x in launches("info_nce", everything, "sm_90")]
    assert names.count("info_nce_kernel") == 2 and names.count("best_positives_kernel") == 1  # hard texts: one more
    assert names.count("info_nce_gradient_kernel") == names.count("exact_info_nce_gradient_kernel") == 2


def test_linear_launches() -> None:
    """Three products of a loss, in one chunk without sums; four of log-probabilities."""
    for op, logits in (("linear_cross_entropy", "states_kernel"), ("linear_logprobs", "gradients_kernel")):
        variant = variant_of(op, f"bfloat16 D4096 {op}")
        for target, tma in (("sm_90", True), ("sm_80", False), ("gfx942", False)):
            found = {x.kernel.__name__: x for x in launches(op, variant, target)}
            products = [found[name] for name in (logits, "hidden_gradient_kernel", "weight_gradient_kernel")]
            assert {x.constants["TILE"].TMA for x in products} == {tma}
            assert found[logits].constants["FLATTEN"] == (target != "gfx942")
            assert products[2].constants["FIRST"] and products[2].args[3] is None
            assert ("gradients_kernel" in found) == (op == "linear_logprobs")


def test_a_machine_without_a_gpu_is_refused_only_outside_a_recording() -> None:
    x = torch.empty(1, 1, 256, 64)
    reason = gpu.why_not_of("cross_attention")
    if not torch.cuda.is_available():
        assert reason(Record(x, x, x)) == "there is no GPU"
    with gpu.recorded():
        assert reason(Record(x, x, x)) is None and reason() is None
        assert reason(Record(x.double(), x, x)) == "torch.float64 is not computed: sums are kept in float32"
        wide = torch.empty(1, 1, 256, 264)
        limit = "head dims above 256 do not fit into a multiprocessor, got 264"
        assert reason(Record(wide, wide, x)) == reason(Record(x, x, wide)) == limit
        assert gpu.why_not_of("info_nce")(Record(wide, wide, x)) is None


class Record(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def test_a_launch_is_specialised_by_alignment_ones_and_none() -> None:
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    value = (torch.empty(2, dtype=torch.bfloat16), None, 1, 32, 33, 2**40, 0.5)
    kinds = aot._type_of(value, (3,), constants, attributes)
    assert kinds == ("*bf16", "constexpr", "constexpr", "i32", "i32", "i64", "fp32")
    assert constants == {(3, 1): None, (3, 2): 1}
    assert set(attributes) == {(3, 0), (3, 3), (3, 5)}
    record = aot._type_of(Record(value[0], None, value[0]), (0,), constants, attributes)
    assert record == Record("*bf16", "constexpr", "*bf16") and type(record) is Record
    descriptor = TensorDescriptor(torch.empty(64, 64, dtype=torch.bfloat16), [64, 64], [64, 1], [16, 32])
    assert aot._type_of(descriptor, (0,), constants, attributes) == "tensordesc<bf16[16, 32]>"
    with pytest.raises(TypeError, match="must be an argument of its own"):
        aot._type_of(Record(descriptor, None, None), (0,), constants, attributes)


def small_entry(target: str = "sm_90") -> Entry:
    variant = variant_of("attention_received", "bfloat16 D64 spans received")
    found = (aot.describe(x, target) for x in launches("attention_received", variant, target))
    return Entry("attention_received", variant.name, next(job for job in found if job.kernel == "list_tiles"))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_resources_of_a_small_kernel(target: str) -> None:
    usage = aot.measure(small_entry(target).job)
    assert 0 < usage.registers < 64 and usage.spilled_bytes == 0
    assert 0 < usage.code_bytes < 2**16 and usage.shared_bytes < 2**14


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = small_entry()
    name = next(name for name in entry.job.signature if name == "BLOCK")
    place = (list(entry.job.signature).index(name),)
    entry.job.constants[place] = 3  # no power of two
    with pytest.raises(RuntimeError, match=r"^list_tiles, bfloat16 D64 spans received, sm_90 does not compile: "):
        build._compile(entry)


# The cache.


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, made = small_entry(), []
    monkeypatch.setattr(build, "ProcessPoolExecutor", lambda *args, **options: ThreadPoolExecutor(1))
    monkeypatch.setattr(build.triton, "measure", lambda job: made.append(job) or Usage(1, 2, 3, 4))
    first, second = build.compile_entries([entry, entry]), build.compile_entries([entry])
    assert first[1] == 1 and second[1] == 0 and len(made) == 1
    row = Row("attention_received", "list_tiles", entry.variant, "sm_90", Usage(1, 2, 3, 4))
    assert first[0] == [row, row] and second[0] == [row]
    (cache.FOLDER / f"{entry.job.key}.json").write_text("[1, 2")  # as a full disk leaves it
    assert build.compile_entries([entry])[1] == 1
    monkeypatch.setattr(build.triton, "translate", lambda job: None)
    assert build.translate_entries([entry]) == 1 and build.translate_entries([entry]) == 0


def test_two_processes_write_one_name_at_once() -> None:
    def write() -> None:
        for n in range(300):
            cache.write("name", [n] * 2000)
            assert len(cache.read("name")) == 2000

    both = [multiprocessing.get_context("fork").Process(target=write) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in cache.FOLDER.iterdir()] == ["name.json"]


def test_a_key_is_of_the_kernel_s_own_sources(tmp_path: Path) -> None:
    """A function and a constant that the kernel reaches are among them; what else its file holds is not."""
    text = (make_package(tmp_path) / "mmkernels" / "ops" / "toys" / "gram" / "triton.py").read_text()

    def key_of(name: str, text: str, target: str = "sm_90", warps: int = 4, size: int = 512) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x = torch.empty(size, 64, dtype=torch.float16)
        with tuning.use_config("gram", "gram", Config(16, 16, warps, 1)), gpu.recorded() as found:
            module.launch_gram(x)
        return aot.describe(found[0], target).key

    key = key_of("first", text)
    assert key == key_of("second", text + "\nLATER = 1\n") == key_of("third", text, size=1024)
    different = [
        key_of("callee", text.replace("DIM + tl", "DIM + 0 + tl")),
        key_of("constant", text.replace("SCALE = tl.constexpr(1.0)", "SCALE = tl.constexpr(2.0)")),
        key_of("kernel", text.replace("dots * SCALE", "SCALE * dots")),
        key_of("target", text, target="sm_80"),
        key_of("warps", text, warps=8),
        key_of("alignment", text, size=513),
    ]
    assert len({key, *different}) == 1 + len(different)


def run_in(package: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "benchmarks")])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# An op in a folder.


def test_an_op_in_a_new_folder_is_compiled_tuned_and_judged(tmp_path: Path) -> None:
    """With no edit elsewhere; tiles of 256 x 256 with 4 warps spill, and more than they have in shared memory."""
    package = make_package(tmp_path, sizes=(256, 256, 4, 1))
    said = run_in(
        package,
        """
        import torch
        from pathlib import Path
        from mmkernels import doctor
        from mmkernels.aot import __main__ as gate, build, cache
        from mmkernels.aot.launches import entries
        from mmkernels.runtime import tuning

        cache.FOLDER = Path("kept")
        wanted = [entry for entry in entries(["sm_89"]) if entry.op == "gram"]
        rows = [build.triton.measure(entry.job) for entry in wanted]
        rows = [gate.Row("gram", e.job.kernel, e.variant, e.job.target, x) for e, x in zip(wanted, rows)]
        print(*gate.check(rows), sep="\\n")
        gate.print_table(rows)
        config = tuning.config("gram", "gram", torch.device("cpu"), torch.float16, 64)
        print("default", config.block_q, config.warps)

        import tune
        tuner = tune.Tuner("gram", "gram", "fp32", 64, torch.device("cpu"), clock=lambda call: 1.0, backend="chunked")
        print(len(tuner.candidates()), "candidates")
        print("exit code", tune.main(["gram"]) if not torch.cuda.is_available() else 2)
        """,
    )
    assert "gram_kernel, float16 D64 gram, sm_89 spills" in said
    assert "gram: registers/spilled bytes/KiB shared/KiB code" in said
    assert "default 256 4" in said and "5 candidates" in said and "exit code 2" in said


# The gate.


PLACE, EVERYTHING = "bfloat16 D768 place info_nce", "bfloat16 D768 everything info_nce"


@pytest.mark.parametrize(
    ("op", "kernel", "variant", "target", "is_error"),
    [
        (GOOD.op, GOOD.kernel, GOOD.variant, "sm_90", True),
        (GOOD.op, GOOD.kernel, GOOD.variant, "sm_80", False),
        (GOOD.op, GOOD.kernel, "bfloat16 D128 none training", "sm_90", True),
        (GOOD.op, GOOD.kernel, "bfloat16 D256 none training", "sm_90", False),
        (GOOD.op, "decode_kernel", "float16 D80 1 row tile", "sm_80", True),
        ("attention_received", "received_kernel", GOOD.variant, "sm_90", True),
        ("attention_weights", "weights_kernel", GOOD.variant, "sm_90", True),
        ("retrieval_ranks", "ranks_kernel", "bfloat16 D768 none ranks", "sm_90", True),
        ("sigmoid_contrastive", "sigmoid_kernel", "bfloat16 D768 place sigmoid", "sm_90", True),
        ("info_nce", "info_nce_kernel", PLACE, "sm_90", True),
        ("info_nce", "info_nce_gradient_kernel", PLACE, "sm_90", True),
        ("info_nce", "info_nce_kernel", EVERYTHING, "sm_90", False),
        ("linear_logprobs", "gradients_kernel", "bfloat16 D4096 linear_logprobs", "sm_90", True),
        ("linear_cross_entropy", "weight_gradient_kernel", "bfloat16 D4096 linear_cross_entropy", "sm_90", True),
        ("linear_cross_entropy", "pack_rows_kernel", "bfloat16 D4096 linear_cross_entropy", "sm_90", False),
        ("info_nce", "exact_info_nce_kernel", PLACE, "sm_90", False),
    ],
)
def test_where_spilling_is_an_error(op: str, kernel: str, variant: str, target: str, is_error: bool) -> None:
    assert gate.check([Row(op, kernel, variant, target, GOOD.usage)]) == []
    problems = gate.check([Row(op, kernel, variant, target, GOOD.usage._replace(spilled_bytes=8))])
    assert len(problems) == is_error and all("spills 8 bytes" in problem for problem in problems)


@pytest.mark.parametrize(
    ("shared", "target", "there_are"),
    [(228 << 10, "sm_90", 232448), (65 << 10, "gfx942", 65536), (228 << 10, "sm_100a", 232448)],
)
def test_more_shared_memory_than_there_is(shared: int, target: str, there_are: int) -> None:
    (problem,) = gate.check([changed(shared_bytes=shared, target=target)])
    assert problem.endswith(f"needs {shared} bytes of shared memory, there are {there_are}")


def test_limits_on_registers_and_allowed_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuning.plan("cross_attention")
    assert plan is not None
    limits = (Limit(("forward_*",), spilled_bytes=16, registers=168), Limit(("other",), registers=1))
    limited = replace(plan, limits=limits)
    monkeypatch.setattr(gate.tuning, "plan", lambda op: limited)
    assert gate.check([changed(spilled_bytes=16, registers=168)]) == []
    spills, takes = gate.check([changed(spilled_bytes=20, registers=170)])
    assert spills.endswith("spills 20 bytes, 16 are allowed") and takes.endswith("takes 170 registers, 168 are allowed")


def test_what_changed_since_the_last_run_is_told() -> None:
    by_hand = changed(kernel="decode_kernel", variant="float16 D80 1 row tile", target="sm_80")
    assert gate.changes([GOOD, by_hand], COMPILERS) == []  # there was no run before
    assert gate.changes([GOOD], COMPILERS) == []  # sm_80 was left out, and stays known
    grown = changed(registers=201, code_bytes=5010)
    (line,) = gate.changes([grown, by_hand], COMPILERS)
    assert line == (
        "changed: cross_attention; forward_kernel; bfloat16 D64 spans training; sm_90; 1: "
        "registers 200 -> 201, code_bytes 5000 -> 5010"
    )
    assert gate.changes([grown, grown, by_hand], COMPILERS) == ["since the last run: 1 new, 0 gone"]
    (line,) = gate.changes([GOOD], {"triton": "3"})
    assert line.startswith("not compared with the last run, which used {'triton': '1'")
    assert gate.changes([grown], {"triton": "3"})[0].startswith("changed: ")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled, without compiling it: `GOOD`, and nothing of CUDA C++."""
    targets: list[Any] = []
    monkeypatch.setattr("mmkernels.aot.launches.entries", lambda wanted: targets.append(wanted) or [])
    monkeypatch.setattr(build, "compile_entries", lambda wanted: ([GOOD], 1))
    monkeypatch.setattr(gate.cuda, "compile_all", lambda wanted: targets.append(wanted) or ([], 0))
    return targets


def test_the_command(asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without nvcc its part is skipped, and says so; what is wrong is an error, and the exit code."""
    monkeypatch.setattr(gate.cuda, "why_not", lambda: "nvcc not found")
    assert gate.main(["--table"]) == 0
    said = capsys.readouterr()
    assert "skipped: the CUDA C++ kernels are not compiled: nvcc not found" in said.out
    assert "forward_kernel" in said.out and "200/0/1/5" in said.out and "1 of them compiled now" in said.out
    monkeypatch.setattr(build, "compile_entries", lambda wanted: ([changed(spilled_bytes=16)], 1))
    assert gate.main(["--all"]) == 1
    said = capsys.readouterr()
    assert "error: forward_kernel, bfloat16 D64 spans training, sm_90 spills 16 bytes" in said.err
    assert "changed: " in said.out and said.out.endswith(": 1 problem\n") and "200/0" not in said.out
    assert asked == [gate.QUICK, TARGETS]


def test_one_op_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its Triton kernels are compiled; nothing is compared with the last run of all."""
    ops = ("retrieval_ranks", "info_nce")
    asked = []
    monkeypatch.setattr("mmkernels.aot.launches.entries", lambda targets: [Entry(op, "", None) for op in ops])
    monkeypatch.setattr(build, "compile_entries", lambda wanted: asked.extend(x.op for x in wanted) or ([GOOD], 1))
    monkeypatch.setattr(gate.cuda, "compile_all", lambda targets: pytest.fail("compiled CUDA C++"))
    assert gate.main(["--op", "retrieval_ranks"]) == 0
    assert asked == ["retrieval_ranks"] and cache.read("last") is None
    with pytest.raises(SystemExit):
        gate.main(["--op", "merge_attention"])
    assert "invalid choice: 'merge_attention'" in capsys.readouterr().err


def test_cuda_kernels_are_compiled_for_the_same_targets(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "versions", lambda: COMPILERS)
    assert gate.main([]) == gate.main(["--all"]) == 0
    assert asked == [gate.QUICK, ["sm_90a"], TARGETS, list(gate.cuda.TARGETS)]
