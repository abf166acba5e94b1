"""The Triton contrastive kernels beyond the specs' cases: tiles, groups of rows, strips, tiles that are computed again.

They run under Triton's interpreter (``TRITON_INTERPRET=1``), or on a GPU where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, check, draw, generator
from ops.contrastive.tools import kernel_step
from pairwise import parametrize, traits

from mmkernels import info_nce, sigmoid_contrastive
from mmkernels.ops.contrastive.cases import features, two_towers
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.spec import Case, Inputs, OpSpec, cast

pytest.importorskip("triton")

from triton_tiling import DEVICE, tiled

from mmkernels.ops.contrastive.info_nce.triton import backward, forward
from mmkernels.ops.contrastive.info_nce.triton.states import DirectionState, Fields
from mmkernels.ops.contrastive.sigmoid_contrastive import triton as sigmoid
from mmkernels.ops.contrastive.triton import call as triton_call
from mmkernels.ops.contrastive.triton.arguments import Codes
from mmkernels.ops.contrastive.triton.call import Block, pairing

interpreted = pytest.mark.interpreted  # and else on a GPU, or not at all
if not gpu.INTERPRETED:
    pytestmark = pytest.mark.gpu

OPS = [SPECS[name] for name in ("info_nce", "sigmoid_contrastive", "retrieval_ranks")]
NAN = math.nan


def _cases(most: int) -> list[tuple[OpSpec, Case]]:
    """The specs' cases with few enough pairs of queries and texts for the interpreter."""

    def pairs(case: Case) -> int:
        first, second, *_ = draw(case).values()
        return int(first.numel() // first.shape[-1] * second.shape[0])

    return [(spec, case) for spec in OPS for case in spec.cases if pairs(case) <= most]


def _each(cases: list[tuple[OpSpec, Case]]) -> Any:
    return parametrize(
        "spec, case",
        cases,
        lambda row: {"op": row[0].name} | traits(draw(row[1])),
        ids=lambda row: f"{row[0].name}-{row[1].id}".replace(" ", "_"),
    )


def _check(op: str, make: Any, *grads: str) -> None:
    check(SPECS[op], Case("here", make, grads), torch.float32, "triton", DEVICE)


ALL = ("image", "text", "logit_scale")

# Tiles, groups of rows, strips.


@interpreted
@_each(_cases(1500))
def test_small_tiles_groups_and_strips(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of rows at a time in the forward and in the backward pass."""
    for name in ("PARTIAL_BYTES", "STRIP_BYTES"):
        monkeypatch.setattr(triton_call, name, 1)
    with tiled(16, 32):
        check(spec, case, torch.float32, "triton", DEVICE)


def _losses(most: int, start: str = "") -> list[tuple[OpSpec, Case]]:
    return [(s, c) for s, c in _cases(most) if s.name != "retrieval_ranks" and c.id.startswith(start)]


@interpreted
@_each([*_losses(500), *_losses(650, "queries, captions")])
def test_epilogues_in_halves(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "WHOLE_TILE", 0)
    with tiled(16, 32):
        check(spec, case, torch.float32, "triton", DEVICE)


@interpreted
def test_groups_of_rows_and_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "multiprocessors", lambda device: 3)
    image, text = torch.empty(100, 8, device=DEVICE), torch.empty(70, 8, device=DEVICE)
    with tiled(32, 16):
        block = Block("info_nce", "contrastive", image, text, pairing(None, None, False))
        assert [(at.start, at.stop) for at in block.groups(10, 25)] == [(0, 64), (64, 100)]
        assert [at.stop for at in block.groups(10, 9)] == [32, 64, 96, 100]  # one tile at least
        assert block.tiles(slice(64, 100)) == (2, 5) and block.grid(slice(64, 100)) == (6,)
        assert block.grid(slice(96, 100)) == (5,)
        queries = Block("info_nce", "contrastive", torch.empty(4, 3, 8, device=DEVICE), text, None)
        assert (queries.config.block_k, queries.pairs) == (16, "none")
    with tuning.pretend("sm_90"):
        bf16 = (x.to(torch.bfloat16) for x in (torch.empty(4, 3, 8), torch.empty(9, 8)))
        assert Block("info_nce", "contrastive", *bf16, None).config.block_k == 64  # half of what one query has


@interpreted
@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
def test_the_same_bits_from_any_number_of_programs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = two_towers(generator(), 40, 40, 16)
    inputs |= {"logit_bias": torch.tensor(-3.0)} if op == "sigmoid_contrastive" else {"return_stats": True}
    inputs = cast(inputs, torch.float32, DEVICE)
    found = []
    for programs in (1, 7):
        monkeypatch.setattr(triton_call, "multiprocessors", lambda device, programs=programs: programs)
        with tiled(16, 16):
            found.append(kernel_step(op, inputs, *ALL))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@interpreted
@pytest.mark.parametrize("hidden", [False, True])
def test_blocks_of_texts_may_arrive_one_by_one(hidden: bool) -> None:
    """Each with the number of its first text; the images' states are those of all texts."""
    g = generator()
    image, text = (features(g, 40, 16).to(DEVICE, torch.float32) for _ in range(2))
    scale, ids = torch.tensor(20.0, device=DEVICE), torch.arange(40, device=DEVICE) % 9
    with tiled(16, 16):
        want = info_nce(
            image, text, scale, reduction="none", image_ids=ids if hidden else None, backend="triton",
            same_id="ignore" if hidden else "positive",
        )  # fmt: skip
        products = image.new_full((40,), NAN)
        images, text_losses, hides = DirectionState(40, image, Fields(), products), [], []
        for first, last in ((0, 17), (17, 40)):
            part, own = text[first:last], products[first:last]
            pairs = pairing(None, None, False)
            if hidden:  # what ids hide is counted, and coded, for each block
                codes = Codes(ids.int(), ids[first:last].int())
                other = ids[:, None] == ids[first:last]
                other &= torch.arange(40, device=DEVICE)[:, None] != torch.arange(first, last, device=DEVICE)
                pairs = pairs._replace(kind="hidden", codes=codes)
                hides.append((other.sum(1), other.sum(0)))
            block = Block("info_nce", "contrastive", image, part, pairs._replace(diagonal=first))
            texts = DirectionState(last - first, image, Fields(), own)
            forward.add_block(block, images, texts, scale, products)
            text_losses.append(texts.finish(scale, 0.0, None, hides[-1][1] if hidden else None, 40)[0])
        of_images = images.finish(scale, 0.0, None, sum(x for x, _ in hides) if hidden else None, 40)
    torch.testing.assert_close(of_images[0], want[0])
    torch.testing.assert_close(torch.cat(text_losses), want[1])


# Tiles that are computed again, exactly.


@contextmanager
def _without_exact_kernels() -> Iterator[None]:
    """Tiles are not computed again."""

    def launch(kernel: Any, *args: Any, **constants: Any) -> None:
        if not kernel.__name__.startswith("exact_"):
            gpu.launch(kernel, *args, **constants)

    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward, sigmoid):
            patch.setattr(module, "launch", launch)
        yield


def _far_apart(g: torch.Generator) -> Inputs:
    """Rows and columns whose logits lie hundreds from each other in every tile."""
    inputs = two_towers(g, 48, 48, 16, scale=1.0)
    inputs["image"] *= 20.0 * (1 + torch.arange(48) % 8)[:, None]
    inputs["text"] *= (1 + torch.arange(48) % 5)[:, None]
    return inputs


@interpreted
@pytest.mark.parametrize("kind", ["place", "code", "hidden", "hard", "queries"])
def test_logits_far_apart_in_a_tile(kind: str) -> None:
    def make(g: torch.Generator) -> Inputs:
        inputs = _far_apart(g) | {"reduction": "none"}
        if kind in ("code", "hidden"):
            inputs |= {"image_ids": torch.arange(48) // 3, "same_id": "ignore" if kind == "hidden" else "positive"}
        if kind == "hard":
            inputs["hard_texts"] = 3 * features(g, 32, 16)
        if kind == "queries":
            inputs["image"] = torch.stack([inputs["image"], inputs["image"].flip(0)], 1)
        return inputs

    grads = (*ALL, "hard_texts") if kind == "hard" else ALL
    with tiled(16, 32):
        _check("info_nce", make, *grads)
        inputs = cast(make(generator()), torch.float32, DEVICE)
        right = kernel_step("info_nce", inputs, *grads)
        with _without_exact_kernels():
            wrong = kernel_step("info_nce", inputs, *grads)
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(right, wrong, strict=True))


@interpreted
def test_tiles_of_close_logits_are_computed_once() -> None:
    """Positives by id, tiles that nothing hangs over, logits within a few: nothing is computed twice."""
    inputs = cast(two_towers(generator(), 32, 64, 16), torch.float32, DEVICE)
    inputs |= {"image_ids": torch.arange(32, device=DEVICE), "text_ids": torch.arange(64, device=DEVICE) // 2}
    more = {"label_smoothing": 0.1, "hard_texts": features(generator(1), 32, 16).to(inputs["text"])}
    bias = {"logit_bias": torch.tensor(-3.0, device=DEVICE)}
    calls = [("info_nce", inputs | more, (*ALL, "hard_texts")), ("sigmoid_contrastive", inputs | bias, ALL)]
    with tiled(16, 32):
        for op, given, grads in calls:
            right = kernel_step(op, given, *grads)
            with _without_exact_kernels():
                again = kernel_step(op, given, *grads)
            assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True)), op


@interpreted
def test_by_place_only_tiles_with_positives_are_computed_twice() -> None:
    inputs = cast(two_towers(generator(), 64, 64, 16), torch.float32, DEVICE)
    sums = []
    with tiled(16, 16):
        image = inputs["image"]
        block = Block("info_nce", "contrastive", image, inputs["text"], pairing(None, None, False))
        for exact in (True, False):
            parts = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(DirectionState, "add", lambda self, part, *_: parts.append(part.clone()))  # noqa: B023
                images, texts = (DirectionState(64, image, Fields(), image.new_empty(64)) for _ in range(2))
                if exact:
                    forward.add_block(block, images, texts, inputs["logit_scale"], images.sums.positive)
                else:
                    with _without_exact_kernels():
                        forward.add_block(block, images, texts, inputs["logit_scale"], images.sums.positive)
            sums.append(parts[0][0])  # references [tiles across, rows]
    tiles = torch.eye(4, dtype=torch.bool, device=DEVICE).repeat_interleave(16, 1)
    same = sums[0] == sums[1]
    assert bool(same[~tiles].all()) and not bool(same[tiles].all())


@interpreted
@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_the_loss_of_aligned_pairs_is_0_to_the_last_digit(scale: float) -> None:
    image = F.normalize(torch.randn(64, 24, device=DEVICE), dim=1)
    text = image.sign() if scale > 0 else -image
    with tiled(16, 16):
        for given in (image, 3.0 * image):
            losses = info_nce(given, given if scale > 0 else text, scale, reduction="none", backend="triton")
            assert all(float(x.abs().max()) < 1e-6 and float(x.min()) >= 0 for x in losses)


@interpreted
@pytest.mark.parametrize("bias", [-10.0, -40.0, 10.0])
def test_small_terms_of_the_sigmoid_loss_are_not_lost(bias: float) -> None:
    """As training begins nearly all of the loss is terms of exp(-10)."""
    inputs = cast(two_towers(generator(), 40, 70, 16), torch.float32, DEVICE)
    # Of another id than all texts: no pair is a positive.
    ids = {"image_ids": torch.arange(40, device=DEVICE), "text_ids": torch.arange(70, device=DEVICE) + 100}
    given = inputs | ids | {"logit_bias": torch.tensor(bias, device=DEVICE), "logit_scale": inputs["logit_scale"] * 0.5}
    with tiled(16, 32):
        mine = sigmoid_contrastive(**given, backend="triton")
    true = sigmoid_contrastive(**cast(given, torch.float64), backend="reference")
    torch.testing.assert_close(mine.double(), true, rtol=3e-6, atol=0.0)


@interpreted
@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
def test_small_upstream_gradients_do_not_underflow(op: str) -> None:
    """In float16 a batch's gradients of logits are far below the least number; a power of two changes no digit."""
    inputs = cast(two_towers(generator(), 40, 40, 16), torch.float16, DEVICE)
    scale = {"logit_scale": inputs.pop("logit_scale").float().requires_grad_()}
    features_ = {name: x.requires_grad_() for name, x in inputs.items()}
    more = {"logit_bias": torch.tensor(-3.0, device=DEVICE)} if op == "sigmoid_contrastive" else {}
    loss = SPECS[op].function(**features_, **scale, **more, backend="triton")
    leaves = [*features_.values(), *scale.values()]
    plain = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    small = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0**-16), retain_graph=True)
    assert torch.equal(plain[2] * 2.0**-16, small[2])
    for a, b in zip(plain[:2], small[:2], strict=True):
        torch.testing.assert_close(a.float() * 2.0**-16, b.float(), rtol=1e-2, atol=2.0**-24)
    large = torch.autograd.grad(loss, leaves, torch.full_like(loss, 4096.0))  # within float16, as a scaled loss is
    for a, b in zip(plain[:2], large[:2], strict=True):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a.float() * 4096.0, b.float(), rtol=2e-3, atol=2e-3 * 4096 * float(a.abs().max()))


# Ids.


@interpreted
@pytest.mark.parametrize("ignore", [False, True])
def test_codes_and_counts_of_ids(ignore: bool) -> None:
    g = generator()
    for n, m, most in ((9, 9, 4), (30, 30, 1), (17, 17, 10**12)):
        image_ids, text_ids = (torch.randint(-most, most, (k,), generator=g) for k in (n, m))
        text_ids[:2] = image_ids[[-1, 0]]
        found = pairing(image_ids.to(DEVICE), text_ids.to(DEVICE), ignore)
        codes = [x.cpu() for x in found.codes if x is not None]
        same = image_ids[:, None] == text_ids
        assert torch.equal(codes[0][:, None] == codes[1], same) and bool((codes[1] >= 0).all())
        counted = (same & ~torch.eye(n, dtype=torch.bool)) if ignore else same
        for dim, count in zip((1, 0), found.hidden if ignore else found.positives, strict=True):
            assert count is not None and torch.equal(count.cpu(), counted.sum(dim))
