"""A package with one more op in its folder: what the tools find with no other edit."""

from __future__ import annotations

from pathlib import Path

import mmkernels

_FILES = {
    "__init__.py": '''
from torch import Tensor


def gram(x: Tensor, backend: str | None = None) -> Tensor:
    """x x'"""
    if backend != "triton":
        return x @ x.T
    from .triton import launch_gram

    return launch_gram(x)
''',
    "spec.py": """
from mmkernels.spec import Cost, OpSpec

SPEC = OpSpec("gram", cases=(), cost=lambda inputs, backward: Cost(1.0, 1.0))
""",
    "plan.py": """
import torch

from mmkernels.ops.toys.gram.spec import SPEC
from mmkernels.plan import TARGETS, Limit, Plan, Problem, Search, Variant


def _make(g, dim):
    return {"x": torch.randn(32, dim, generator=g, dtype=torch.float64)}


PLAN = Plan(
    tiles=dict.fromkeys(TARGETS, {"gram": ((SIZES),)}),
    float32=(16, 16, 16),
    variants=(Variant("float16 D64 gram", lambda: {"x": torch.empty(512, 64, dtype=torch.float16)}),),
    limits=(Limit(("gram_kernel",), targets=("sm_*",)),),
    searches={"gram": Search((16, 32), (16, 32), (4,), (1,), (Problem(_make),), Problem(_make))},
)
""",
    "triton.py": """
import torch
import triton
import triton.language as tl

from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

SCALE = tl.constexpr(1.0)


@triton.jit
def load_tile(x, rows, DIM: tl.constexpr):
    return tl.load(x + rows[:, None] * DIM + tl.arange(0, DIM)[None, :])


@triton.jit
def gram_kernel(x, out, n, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    dots = tl.dot(load_tile(x, rows, DIM), load_tile(x, columns, DIM).T)
    tl.store(out + rows[:, None] * n + columns[None, :], dots * SCALE)


def launch_gram(x):
    plan = config("gram", "gram", x.device, x.dtype, x.shape[1])
    out = torch.empty(len(x), len(x))
    launch(
        gram_kernel, (1,), plan, x, out, len(x), DIM=x.shape[1], BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k
    )
    return out
""",
}


def make_package(folder: Path, sizes: tuple[int, int, int, int] = (16, 16, 4, 1)) -> Path:
    """Returns a folder for PYTHONPATH with this checkout's mmkernels, which has the op ``gram`` in a new family.

    Args:
        sizes: the op's default tiles.
    """
    original, copy = Path(mmkernels.__file__).parent, folder / "mmkernels"
    (copy / "ops" / "toys" / "gram").mkdir(parents=True)
    for path in original.iterdir():
        if path.name not in ("ops", "__pycache__"):
            (copy / path.name).symlink_to(path)
    for path in (original / "ops").iterdir():
        if path.name != "__pycache__":
            (copy / "ops" / path.name).symlink_to(path)
    (copy / "ops" / "toys" / "__init__.py").touch()
    for name, text in _FILES.items():
        (copy / "ops" / "toys" / "gram" / name).write_text(text.replace("(SIZES)", repr(sizes)))
    return folder
