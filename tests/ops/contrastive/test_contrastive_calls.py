"""How a call of a contrastive loss travels: autocast, backends, transforms, compiled code, threads; and its memory."""

from __future__ import annotations

import pytest
import torch
from harness import SPECS, backends, dtype_of
from ops.contrastive.tools import (
    BIAS,
    LOSSES,
    each_exact_backend,
    each_loss,
    features,
    inputs_of,
    step,
)

from mmkernels import retrieval_ranks
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.ops.contrastive import strips
from mmkernels.ops.contrastive.retrieval_ranks import chunked as ranks_chunked
from mmkernels.spec import cast

# How a call travels.


@each_loss
def test_autocast(op: str, backend: str) -> None:
    if backend not in backends(SPECS[op], torch.bfloat16):
        pytest.skip(f"{backend} does not compute bfloat16")
    inputs = {name: x.requires_grad_() for name, x in cast(inputs_of(op), torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[op](**inputs, backend=backend)
    narrow = {name: x.bfloat16() if x.dim() else x for name, x in inputs.items()}
    assert loss.dtype == torch.float32 and torch.equal(loss, LOSSES[op](**narrow, backend=backend))
    for grad, x in zip(torch.autograd.grad(loss, list(inputs.values())), inputs.values(), strict=True):
        assert grad.dtype == torch.float32 and grad.shape == x.shape and float(grad.abs().max()) > 0
    for dtype in (torch.bfloat16, torch.float16):  # a scale that another module made under autocast
        with torch.autocast("cpu", torch.bfloat16):
            other = LOSSES[op](**inputs | {"logit_scale": inputs["logit_scale"].detach().to(dtype)}, backend=backend)
        torch.testing.assert_close(other, loss, rtol=0.02, atol=0.0)
    if dtype_of(op, backend) == torch.float64:
        with torch.autocast("cpu", torch.bfloat16):  # float64 stays: it was chosen on purpose
            assert LOSSES[op](**inputs_of(op), backend=backend).dtype == torch.float64


@each_exact_backend
@pytest.mark.parametrize("op", LOSSES)
def test_vmap_over_batches_that_share_ids_and_scale(op: str, backend: str) -> None:
    batches = [inputs_of(op, seed=seed) for seed in range(3)]
    ids = torch.arange(7) % 3
    call = lambda image, text: LOSSES[op](
        **{**batches[0], "image": image, "text": text}, image_ids=ids, backend=backend
    )
    images, texts = (torch.stack([x[name] for x in batches]) for name in ("image", "text"))
    leaves = [images.transpose(0, 1).requires_grad_(), texts.requires_grad_(), batches[0]["logit_scale"]]
    leaves[2].requires_grad_()
    together = torch.func.vmap(call, in_dims=(1, 0))(*leaves[:2])
    apart = torch.stack([call(leaves[0][:, n], leaves[1][n]) for n in range(3)])
    torch.testing.assert_close(together, apart)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=apart.dtype)
    got, want = (torch.autograd.grad(x, leaves, weights) for x in (together, apart))
    torch.testing.assert_close(got, want)
    shared = torch.func.vmap(call, in_dims=(1, None))(leaves[0], batches[0]["text"])  # one side alone is batched
    assert bool(torch.autograd.grad(shared.sum(), leaves[0])[0].any())


# Memory.

_PAIRS, _MIB = 4096, 2**20


@pytest.mark.parametrize(
    ("op", "backend"), [(op, x) for op in (*LOSSES, "retrieval_ranks") for x in backends(SPECS[op]) if x != "reference"]
)
def test_memory_is_linear(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of this call are 64 MiB, features and their gradients 4 MiB."""
    if memory_why_not() is not None:  # asked here: the answer takes an allocator that gives memory back
        pytest.skip(str(memory_why_not()))
    _smaller_strips(monkeypatch)
    inputs = cast(features(_PAIRS, dim=64, scale=20.0) | BIAS, torch.float32)
    ids = torch.arange(_PAIRS) // 2

    def run() -> None:
        if op == "retrieval_ranks":
            retrieval_ranks(inputs["image"], inputs["text"], ids, backend=backend)
        elif op == "info_nce":
            features_and_scale = {name: x for name, x in inputs.items() if name != "logit_bias"}
            step(op, features_and_scale, image_ids=ids, text_ids=ids, backend=backend)
        else:
            step(op, inputs, image_ids=ids, text_ids=ids, backend=backend)

    run()
    peak = peak_memory(run)
    assert peak is not None and peak < 12 * _MIB


@pytest.mark.parametrize("backend", [x for x in backends(SPECS["info_nce"]) if x != "reference"])
def test_memory_does_not_know_how_long_a_queue_is(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are 64 MiB, its features 4 MiB (8 in a wide copy)."""
    if memory_why_not() is not None:
        pytest.skip(str(memory_why_not()))
    _smaller_strips(monkeypatch)
    inputs = cast(features(256, dim=16) | {"hard_texts": features(2**16, dim=16, seed=1)["text"]}, torch.float32)

    def run() -> None:
        step("info_nce", inputs, ("image", "text"), backend=backend)

    run()
    peak = peak_memory(run)
    assert peak is not None and peak < 16 * _MIB


def _smaller_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the problems here are smaller than what strips are for."""
    for module in (strips, ranks_chunked):
        monkeypatch.setattr(module, "STRIP_BYTES", _MIB)
