"""`ClipLoss` and `SigLipLoss` against open_clip's formulas, signatures and errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from mmkernels.nn import ClipLoss, SigLipLoss
from mmkernels.runtime import cpu

BACKENDS = (
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))),
    "chunked",
    "reference",
)


def clip_formula(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Cross-entropy of the logits' rows and of their columns with the diagonal, and the mean of both."""
    logits = logit_scale * image @ text.T
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = torch.arange(len(image))
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(logits.T, labels)


def siglip_formula(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """``-log sigmoid`` of each pair's signed logit, summed over all pairs and divided by the number of images."""
    logits = logit_scale * image @ text.T
    if logit_bias is not None:
        logits = logits + logit_bias
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


LOSSES = [(ClipLoss, clip_formula), (SigLipLoss, siglip_formula)]


def features(n: int = 37, dim: int = 20, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns normalised images and texts, of which each pair is similar."""
    generator = torch.Generator().manual_seed(n)
    image = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    text = image + torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=-1).to(dtype), F.normalize(text, dim=-1).to(dtype)


def loss_and_grads(loss: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradient by each input that is given, scaled so that a missing factor would show."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    out = loss(*leaves)
    grads = torch.autograd.grad(3.0 * out, [x for x in leaves if x is not None])
    return (out.detach(), *grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scalar", [(), (1,)])  # open_clip's parameters have no dim, or one
@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize(("module", "formula"), LOSSES)
def test_against_the_formula(
    module: Any, formula: Any, bias: float | None, scalar: tuple[int, ...], backend: str
) -> None:
    dtype = torch.float32 if backend == "cpu" else torch.float64  # "cpu" has no float64
    rtol, atol = (1e-5, 1e-6) if backend == "cpu" else (1e-10, 1e-14)
    image, text = features(dtype=dtype)
    logit_scale = torch.full(scalar, 14.3, dtype=dtype)
    logit_bias = None if bias is None else torch.full(scalar, bias, dtype=dtype)
    inputs = (image, text, logit_scale, logit_bias)
    expected = loss_and_grads(formula, *(x if x is None else x.double() for x in inputs))
    with mmkernels.use_backend(backend):
        ours = loss_and_grads(module(), *inputs)
    assert ours[0].shape == ()
    for actual, theirs in zip(ours, expected, strict=True):
        assert actual.shape == theirs.shape
        torch.testing.assert_close(actual.double(), theirs, rtol=rtol, atol=atol)


def test_a_bias_changes_nothing_in_a_softmax_but_has_a_gradient() -> None:
    image, text = features()
    logit_bias = nn.Parameter(torch.tensor(-10.0, dtype=torch.float64))
    loss = ClipLoss()(image, text, 5.0, logit_bias)
    assert torch.equal(loss, ClipLoss()(image, text, 5.0))
    loss.backward()
    assert logit_bias.grad is not None and float(logit_bias.grad) == 0.0


def test_the_bias_of_siglip_counts() -> None:
    image, text = features()
    losses = [float(SigLipLoss()(image, text, 5.0, bias)) for bias in (None, 0.0, -1.0)]
    assert losses[0] == losses[1]
    assert abs(losses[2] - losses[0]) > 0.1 * losses[0]


@pytest.mark.parametrize(("module", "formula"), LOSSES)
def test_calls_as_in_training_code(module: Any, formula: Any) -> None:
    """open_clip's training loop passes what the model gives by name, and takes a dict."""
    image, text = features()
    given = {
        "image_features": image,
        "text_features": text,
        "logit_scale": torch.tensor(10.0, dtype=torch.float64),
        "logit_bias": torch.tensor(-10.0, dtype=torch.float64),
    }
    out = module(rank=0, world_size=1, cache_labels=True)(**given, output_dict=True)
    assert list(out) == ["contrastive_loss"]
    assert torch.equal(out["contrastive_loss"], module()(*given.values()))
    assert torch.equal(out["contrastive_loss"], module()(*given.values(), True)["contrastive_loss"])
    torch.testing.assert_close(out["contrastive_loss"], formula(*given.values()))
    torch.testing.assert_close(module()(image, text, 10.0, -10.0), formula(*given.values()))  # numbers


def test_signatures_are_open_clips() -> None:
    """As of open_clip 4.2 (its ClipLoss dropped use_horovod, which 2.x and 3.x have)."""

    def of(function: Any) -> list[tuple[str, Any]]:
        return [(x.name, x.default) for x in inspect.signature(function).parameters.values()]

    ranks = [("rank", 0), ("world_size", 1)]
    sharing = [("local_loss", False), ("gather_with_grad", False), ("cache_labels", False)]
    assert of(ClipLoss) == [*sharing, *ranks, ("use_horovod", False)]
    assert of(SigLipLoss) == [("cache_labels", False), *ranks, ("dist_impl", None), ("chunk_size", 0)]
    needed = [(name, inspect.Parameter.empty) for name in ("image_features", "text_features", "logit_scale")]
    assert of(ClipLoss().forward) == [*needed, ("logit_bias", None), ("output_dict", False)]
    assert of(SigLipLoss().forward) == [*needed, ("logit_bias", inspect.Parameter.empty), ("output_dict", False)]
    assert SigLipLoss().dist_impl == "bidir"
    bias = ("logit_bias", None)
    assert of(ClipLoss().get_logits) == of(SigLipLoss().get_logits) == [*needed, bias]
    count = ("num_logits", inspect.Parameter.empty)
    device, dtype = (("device", inspect.Parameter.empty), ("dtype", inspect.Parameter.empty))
    assert of(ClipLoss().get_ground_truth) == [device, count]
    assert of(SigLipLoss().get_ground_truth) == [device, dtype, count, ("negative_only", False)]
    assert of(SigLipLoss()._loss) == [*needed, bias, ("negative_only", False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("module", "formula"), LOSSES)
def test_other_dtypes(module: Any, formula: Any, dtype: torch.dtype) -> None:
    image, text = features(dtype=dtype)
    logit_scale, logit_bias = torch.tensor(14.3), torch.tensor(-3.0)
    inputs = (image, text, logit_scale, logit_bias)
    truth = loss_and_grads(formula, *(x.double() for x in inputs))  # of the features as they are rounded
    naive, ours = loss_and_grads(formula, *inputs), loss_and_grads(module(), *inputs)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)
    for actual, plain, true in zip(ours[1:], naive[1:], truth[1:], strict=True):
        errors = [float((x.double() - true).norm() / true.norm().clamp(min=1e-3)) for x in (actual, plain)]
        assert errors[0] < 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_ranks(module: Any) -> None:
    for bad in (0, -1, 1.0, True, None, "1"):
        with pytest.raises(ValueError, match=f"world_size must be a positive integer, got {bad!r}"):
            module(world_size=bad)
    for bad in (1, -1, None, 0.0):
        with pytest.raises(ValueError, match=f"rank must be 0 to 0, as world_size is 1; got {bad!r}"):
            module(rank=bad)


def test_other_arguments() -> None:
    assert SigLipLoss(dist_impl="gather", chunk_size=128).dist_impl == "gather"
    with pytest.raises(ValueError, match="dist_impl must be one of bidir, shift, reduce, gather, or None; got 'ring'"):
        SigLipLoss(dist_impl="ring")
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"chunk_size must be an integer >= 0, got {bad!r}"):
            SigLipLoss(chunk_size=bad)
    ClipLoss(local_loss=True, gather_with_grad=True, use_horovod=True)


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_bad_inputs(module: Any) -> None:
    image, text = features(dtype=torch.float32)
    loss = module()
    for inputs, error, match in (
        ((image, text[:-1], 1.0, 0.0), ValueError, "text must have as many rows as image, 37"),
        ((image, text[:, :-1], 1.0, 0.0), ValueError, r"text must be \[.*20\], .*got shape \(37, 19\)"),
        ((image, text.double(), 1.0, 0.0), TypeError, "text must have image's dtype torch.float32, got torch.float64"),
        ((image, None, 1.0, 0.0), TypeError, "text must be a tensor, got NoneType"),
        ((image, text, None, 0.0), TypeError, "logit_scale must be a tensor of one element or a number, got NoneType"),
        ((image, text, torch.ones(2), 0.0), ValueError, r"logit_scale must have one element, got shape \(2,\)"),
        ((image, text, 1.0, torch.ones(37)), ValueError, r"logit_bias must have one element, got shape \(37,\)"),
        ((image, text, 1.0, "0"), TypeError, "logit_bias must be a tensor of one element or a number, got str"),
        ((image[:0], text[:0], 1.0, 0.0), ValueError, "image must be .* with no dim of 0, got shape"),
    ):
        with pytest.raises(error, match=match):
            loss(*inputs)
    bad = image.clone()
    bad[3, 4] = torch.nan
    assert torch.isnan(loss(bad, text, 1.0, 0.0))


METHODS = ("get_logits", "get_ground_truth")


@pytest.mark.parametrize(("module", "formula"), LOSSES)
@pytest.mark.parametrize("replaced", [(), METHODS[:1], METHODS[1:], METHODS])
@pytest.mark.parametrize("bias", [None, -3.0])
def test_a_subclass_uses_and_replaces_open_clips_methods(
    module: Any, formula: Any, replaced: tuple[str, ...], bias: float | None
) -> None:
    """A loss for distillation, as in open_clip: it needs the logits, and `forward` of the class above."""
    called: list[str] = []

    class Distilled(module):
        def forward(self, image: Tensor, text: Tensor, scale: Tensor, logit_bias: Any = None) -> Tensor:  # type: ignore[override]
            logits = self.get_logits(image, text, scale)
            called.clear()
            return (
                super().forward(image, text, scale, logit_bias) + (logits[0] if module is ClipLoss else logits).mean()
            )

    def replace(name: str) -> None:
        def method(self: Any, *given: Any, **named: Any) -> Any:
            called.append(name)
            return getattr(super(Distilled, self), name)(*given, **named)

        setattr(Distilled, name, method)

    for name in replaced:
        replace(name)
    image, text = features()
    scale = torch.tensor(5.0, dtype=torch.float64)
    logit_bias = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    inputs = (image, text, scale, logit_bias)
    distilled = lambda *x: formula(*x) + (x[2] * x[0] @ x[1].T).mean()
    ours, theirs = loss_and_grads(Distilled(), *inputs), loss_and_grads(distilled, *inputs)
    assert sorted(called) == sorted(replaced)  # without them no logits are built
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_method_that_changes_the_loss_is_honoured() -> None:
    """Of the class, and of one object; `get_logits` of older versions takes no bias."""

    class Cooler(ClipLoss):
        def get_logits(self, image: Tensor, text: Tensor, logit_scale: Any) -> Any:  # type: ignore[override]
            return super().get_logits(image, text, logit_scale / 2)

    image, text = features()
    want = ClipLoss()(image, text, 5.0)
    torch.testing.assert_close(Cooler()(image, text, 10.0), want)
    loss = ClipLoss()
    loss.get_logits = lambda image, text, scale: ClipLoss.get_logits(loss, image, text, scale / 2)  # type: ignore[method-assign]
    torch.testing.assert_close(loss(image, text, 10.0, output_dict=True)["contrastive_loss"], want)


def test_what_the_methods_return() -> None:
    image, text = features(5)
    of_images, of_texts = ClipLoss().get_logits(image, text, 2.0, torch.tensor(-1.0))
    torch.testing.assert_close(of_images, 2 * image @ text.T - 1)
    assert torch.equal(of_texts, of_images.T)
    assert torch.equal(ClipLoss(cache_labels=True).get_ground_truth(image.device, 5), torch.arange(5))
    siglip = SigLipLoss()
    assert torch.equal(siglip.get_logits(image, text, 2.0, -1.0), of_images)
    signs = siglip.get_ground_truth("cpu", torch.float64, 5)
    assert torch.equal(signs, 2 * torch.eye(5, dtype=torch.float64) - 1)
    assert torch.equal(siglip.get_ground_truth("cpu", torch.half, 5, negative_only=True), -torch.ones(5, 5).half())
    negatives = siglip._loss(image, text, 2.0, -1.0, negative_only=True)
    torch.testing.assert_close(negatives, -F.logsigmoid(-of_images).sum() / 5)
    assert (siglip.prev_num_logits, siglip.labels) == (0, {})


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_compiled_with_a_scale_of_half_precision(module: Any) -> None:
    """A model in bfloat16 whose features are widened for the loss."""
    image, text = features(dtype=torch.float32)
    inputs = (image, text, torch.tensor(14.25).bfloat16(), torch.tensor(-3.0).half())
    compiled = torch.compile(module(), backend="aot_eager", fullgraph=True)
    for actual, expected in zip(loss_and_grads(compiled, *inputs), loss_and_grads(module(), *inputs), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_compiled_without_logits(module: Any) -> None:
    """Whether a subclass replaces a method is asked within the compiled code."""
    kernels: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        kernels.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    inputs = (*features(dtype=torch.float32), torch.tensor(10.0), torch.tensor(-3.0))
    for loss, built in (
        (module(), False),
        (type("Sub", (module,), {"get_logits": lambda *x: module.get_logits(*x)})(), True),
    ):
        kernels.clear()
        torch.testing.assert_close(torch.compile(loss, backend=backend, fullgraph=True)(*inputs), module()(*inputs))
        assert any("matmul" in name for name in kernels) == built
        assert any("mmkernels" in name for name in kernels) != built
