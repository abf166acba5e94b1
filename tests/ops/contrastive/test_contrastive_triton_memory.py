"""The Triton contrastive kernels' memory: nothing read or written outside, layouts, ranks; and what a GPU alone shows.

As test_contrastive_triton.py, under Triton's interpreter or on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, check, generator
from layouts import embedded, guarded
from ops.contrastive.tools import kernel_step
from torch import Tensor

from mmkernels import info_nce, retrieval_ranks
from mmkernels.ops.common.cases import normal
from mmkernels.ops.contrastive.cases import features, two_towers
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.spec import Case, Inputs, cast

pytest.importorskip("triton")

from triton_tiling import DEVICE, tiled

from mmkernels.ops.contrastive.retrieval_ranks import triton as ranks
from mmkernels.ops.contrastive.retrieval_ranks.spec import Arguments
from mmkernels.ops.contrastive.triton import call as triton_call
from mmkernels.ops.contrastive.triton.call import Block

interpreted = pytest.mark.interpreted  # and else on a GPU, or not at all
if not gpu.INTERPRETED:
    pytestmark = pytest.mark.gpu

NAN = math.nan
ALL = ("image", "text", "logit_scale")


# Layouts.


@interpreted
@pytest.mark.parametrize("queries", [0, 3])
@pytest.mark.parametrize("dim", [13, 40])
def test_nothing_outside_is_read_or_written(queries: int, dim: int) -> None:
    inputs = cast(two_towers(generator(), 21, 37, dim, queries), torch.float32, DEVICE)
    ids = {"image_ids": torch.arange(21, device=DEVICE), "text_ids": torch.arange(37, device=DEVICE) // 2}
    bias = {"logit_bias": torch.tensor(-3.0, device=DEVICE)}

    def all_calls(wrap: Any) -> list[Tensor]:
        given = {name: wrap(x) if x.dim() else x for name, x in inputs.items()}
        found = [*kernel_step("info_nce", given | ids | {"return_stats": True, "hard_texts": given["text"]}, *ALL)]
        found += kernel_step("sigmoid_contrastive", given | ids | bias, *ALL)
        if not queries:
            target = torch.arange(21, device=DEVICE)
            found.append(retrieval_ranks(given["image"], given["text"], target, backend="triton"))
        return found

    with tiled(16, 32):
        want = all_calls(lambda x: x)
        with guarded() as made:
            got = all_calls(embedded)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=False)
    assert len(made) > 20 and all(tensor.intact() for tensor in made)


@interpreted
@pytest.mark.parametrize("queries", [0, 2])
def test_the_copy_engines_path(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors of strided features, with last tiles that hang over and channels that do not fill the last step."""
    monkeypatch.setattr(triton_call, "_TMA_ROWS", 8)

    def make(g: torch.Generator) -> Inputs:
        inputs = two_towers(g, 40, 40, 36, queries)
        buffer = torch.full((40, *([queries] if queries else []), 44), NAN, dtype=torch.float64)
        inputs["image"] = buffer[..., 4:40].copy_(inputs["image"])
        return inputs | {"return_stats": True}

    with tiled(16, 32):
        inputs = cast(make(generator()), torch.float32, DEVICE)
        # Views stay views, but a conversion may change strides; here they are what descriptors want.
        assert inputs["image"].stride(-1) == 1
        with gpu.recorded() as launches:
            info_nce(**inputs, backend="triton")
        if tuning.architecture(torch.device(DEVICE)) in ("sm_90", "sm_100"):
            (first, *_) = [x for x in launches if x.kernel.__name__ == "info_nce_kernel"]
            assert first.constants["TILE"].TMA and first.args[0].block_shape == ([16, 1, 32] if queries else [16, 32])
            assert first.args[1].base.data_ptr() == inputs["text"].data_ptr()
        check(SPECS["info_nce"], Case("here", make, ALL), torch.float32, "triton", DEVICE)
        if not queries:
            query, gallery = inputs["image"], inputs["text"]
            target = torch.arange(40, device=DEVICE).flip(0)
            mine = retrieval_ranks(query, gallery, target, backend="triton")
            assert torch.equal(mine, retrieval_ranks(query.double(), gallery.double(), target, backend="reference"))


@interpreted
def test_where_a_descriptor_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "_TMA_ROWS", 8)
    x = torch.zeros(16, 64, device=DEVICE)

    def tma(image: Tensor, text: Tensor) -> bool:
        return bool(Block("info_nce", "contrastive", image, text, None).tile.TMA)

    with tuning.pretend("sm_90"):
        assert tma(x, x)
        assert tma(x[:, ::2], x[:, :32])  # copied: its channels do not lie side by side
        assert not tma(x[:, 1:], x[:, 1:]) and not tma(x[:, :20], x[:, :20])
        assert not tma(x[:4], x) and not tma(x, x[:4])
        assert not tma(x[:1].expand(16, -1), x)
    with tuning.pretend("sm_80"):
        assert not tma(x, x)


# Ranks.


@interpreted
def test_targets_outside_of_the_gallery_have_rank_m() -> None:
    query, gallery = torch.randn(6, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    target = torch.tensor([0, -1, 20, 2**40, -(2**40), 19], device=DEVICE)
    with tiled(16, 16):
        found = ranks.forward(Arguments(query, gallery, target))
    inside = [0, 5]
    want = retrieval_ranks(query[inside].double(), gallery.double(), target[inside], backend="reference")
    assert torch.equal(found[inside], want) and found[1:5].tolist() == [20] * 4


@interpreted
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 32), (32, 16)])
def test_equal_rows_of_a_gallery_have_equal_scores(block_q: int, block_k: int) -> None:
    """Wherever in a tile they stand: of k equal rows the n-th has rank n.

    Whole numbers: in the interpreter a library's products of others round equal rows apart.
    """
    g = generator()
    rows = (2 * normal(g, 7, 40)).round()
    gallery = rows.repeat(9, 1).to(DEVICE, torch.float32)  # row i is rows[i % 7]
    query = (2 * normal(g, 21, 40)).round().to(DEVICE, torch.float32)
    with tiled(block_q, block_k):
        for shift in range(0, 63, 10):
            target = (torch.arange(21, device=DEVICE) * 3 + shift) % 63
            found = retrieval_ranks(query, gallery, target, backend="triton")
            scores = query.double() @ gallery.double().mT
            own = scores.gather(1, target[:, None])
            before = torch.arange(63, device=DEVICE) < target[:, None]
            want = torch.where(scores == own, before, scores > own).sum(1)
            assert torch.equal(found, want)


@interpreted
def test_galleries_in_groups_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "PARTIAL_BYTES", 1)
    query, gallery = torch.randn(50, 24, device=DEVICE), torch.randn(70, 24, device=DEVICE)
    target = torch.randint(70, (50,), device=DEVICE)
    with tiled(16, 32):
        found = retrieval_ranks(query, gallery, target, backend="triton")
    assert torch.equal(found, retrieval_ranks(query.double(), gallery.double(), target, backend="reference"))


# What only a GPU can show.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["place", "code", "hidden", "queries"])
def test_thousands_of_pairs(kind: str, dtype: torch.dtype) -> None:
    """More tiles than a GPU works on at once, and last tiles that hang over."""

    def make(g: torch.Generator) -> Inputs:
        inputs = two_towers(g, 3000, 3000, 192, 3 if kind == "queries" else 0, scale=50.0)
        more = {"hard_texts": features(g, 500, 192), "label_smoothing": 0.1, "return_stats": True}
        if kind in ("code", "hidden"):
            ids = torch.randint(1500, (3000,), generator=g)
            more |= {"image_ids": ids, "same_id": "ignore" if kind == "hidden" else "positive"}
        return inputs | more

    check(SPECS["info_nce"], Case("here", make, (*ALL, "hard_texts")), dtype, "triton", "cuda")
    if kind != "hidden":
        options = ("image_ids",) if kind == "code" else ()

        def sigmoid_inputs(g: torch.Generator) -> Inputs:
            inputs = make(g)
            kept = {name: inputs[name] for name in (*ALL, *options)}
            return kept | {"logit_bias": torch.tensor(-10.0, dtype=torch.float64)}

        case = Case("here", sigmoid_inputs, (*ALL, "logit_bias"))
        check(SPECS["sigmoid_contrastive"], case, dtype, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
def test_a_cuda_graph_captures_akernel_step(op: str) -> None:
    inputs = cast(two_towers(generator(), 2000, 2000, 256), torch.bfloat16, "cuda")
    inputs["logit_scale"] = inputs["logit_scale"].float()
    ids = torch.randint(1000, (2000,), device="cuda")
    more = {"logit_bias": torch.tensor(-5.0, device="cuda")} if op == "sigmoid_contrastive" else {}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def step() -> tuple[Tensor, ...]:
        loss = SPECS[op].function(**leaves, **more, image_ids=ids, backend="triton")
        return (loss.detach(), *torch.autograd.grad(loss, list(leaves.values())))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.fill_(NAN)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
def test_memory_of_a_large_batch(op: str) -> None:
    """Above inputs and gradients: a strip, the texts' gradient in float32, and what the library's products need."""
    n, dim = 32768, 512
    image, text = (F.normalize(torch.randn(n, dim, device="cuda"), dim=1).bfloat16() for _ in range(2))
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(50.0, device="cuda", requires_grad=True)]
    more = (torch.tensor(-10.0, device="cuda"),) if op == "sigmoid_contrastive" else ()

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(SPECS[op].function(*leaves, *more, backend="triton"), leaves))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step()
    torch.cuda.synchronize()
    own = sum(x.numel() * x.element_size() for x in grads)
    extra = torch.cuda.max_memory_allocated() - before - own
    assert extra <= triton_call.STRIP_BYTES + 4 * n * dim + 100 * 2**20
