"""`CachedContrastive` against one pass over the same chunks, and what it does with bad input."""

from __future__ import annotations

import random
from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from cached_tools import WIDTH, Model, assert_equal, batch, grads, one_pass
from harness import no_old_graphs, peak_of
from torch import Tensor, nn

from mmkernels.nn import CachedContrastive


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("chunks", [(23, 23), (8, 8), (1, 4), (50, 7)])
def test_gradients_are_those_of_one_pass(chunks: tuple[int, int], loss: str) -> None:
    """With dropout: the same random numbers in the same order, and as many."""
    torch.manual_seed(0)
    model, inputs = Model(), batch()
    encoders, function = [model.encode_image, model.encode_text], getattr(model, loss)
    torch.manual_seed(1)
    expected, after = one_pass(encoders, function, inputs, chunks), torch.rand(3)
    want = grads(model)
    model.zero_grad()
    torch.manual_seed(1)
    value = CachedContrastive(encoders, function, chunk_size=chunks)(*inputs)
    assert torch.equal(after, torch.rand(3))
    assert not value.requires_grad and abs(float(value - expected)) <= 1e-12 * float(expected)
    assert_equal(grads(model), want)
    assert ("bias" in want) == (loss == "sigmoid") and "log_scale" in want and want["image.0.weight"].abs().min() > 0


def test_steps_accumulate_and_a_loss_can_be_scaled() -> None:
    model, (pixels, tokens) = Model(0.0), batch(24)
    step = CachedContrastive([model.encode_image, model.encode_text], model.info_nce, chunk_size=5)
    want: dict[str, Tensor] = {}
    for rows in (slice(0, 11), slice(11, 24)):
        loss = model.info_nce(model.encode_image(pixels[rows]), model.encode_text(tokens[rows]))
        (loss / 2).backward()
    want = grads(model)
    for scale in (0.5, torch.tensor(0.5), lambda loss: loss / 2):
        model.zero_grad()
        for rows in (slice(0, 11), slice(11, 24)):
            value = step(pixels[rows], tokens[rows], scale_loss=scale)
        assert_equal(grads(model), want)
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0.0)  # the value is not scaled


def test_a_loss_that_draws_random_numbers() -> None:
    """After a call the generator is where one pass leaves it, although second passes draw after the loss."""
    model, inputs = Model(), batch()
    encoders = [model.encode_image, model.encode_text]
    loss = lambda image, text: model.info_nce(nn.functional.dropout(image, 0.2), text)
    torch.manual_seed(1)
    one_pass(encoders, loss, inputs, (8, 8))
    want, after = grads(model), torch.rand(3)
    model.zero_grad()
    torch.manual_seed(1)
    CachedContrastive(encoders, loss, chunk_size=8)(*inputs)
    assert torch.equal(after, torch.rand(3))
    assert_equal(grads(model), want)


def test_an_optimizer_in_a_hook_is_an_error() -> None:
    """It would step in every chunk."""
    model, inputs = Model(0.0), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.text[0].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    step = CachedContrastive([model.image, model.text], model.info_nce, chunk_size=8)
    with pytest.raises(RuntimeError, match="parameters must not change in a backward pass, as each chunk has one"):
        step(*inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_step(dtype: torch.dtype) -> None:
    """Both passes use one cache of weights; before PyTorch 2.10 it lost their graph where the first had none."""
    torch.manual_seed(0)
    model, inputs = Model(dtype=torch.float32), batch(dtype=torch.float32)
    encoders, scaler = [model.encode_image, model.encode_text], torch.amp.GradScaler("cpu", init_scale=1024.0)
    dtypes = []

    def loss(image: Tensor, text: Tensor) -> Tensor:
        dtypes.append((image.dtype, torch.is_autocast_enabled("cpu")))
        return model.info_nce(image, text)

    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        features = [torch.cat([f(x) for x in rows.split(8)]) for f, rows in zip(encoders, inputs, strict=True)]
        expected = loss(*features)
    scaler.scale(expected).backward()
    want = grads(model)
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        value = CachedContrastive(encoders, loss, chunk_size=8)(*inputs, scale_loss=scaler.scale)
    assert dtypes[0] == dtypes[1] and dtypes[0][1]
    assert torch.equal(value, expected.detach())
    # Weights' gradients are rounded to the dtype for each chunk, not for the sum of all.
    assert_equal(grads(model), want, 4 * torch.finfo(dtype).eps)
    assert float(grads(model)["image.0.weight"].abs().max()) > 1  # scaled


def test_backward_passes_are_not_autocast() -> None:
    """An encoder that computes in float32 within autocast has float32 gradients, and so has a loss."""
    encoder, x = nn.Linear(10, WIDTH), batch(9, torch.float32)[0]
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def plain(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return encoder(x)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (x @ weight).square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        CachedContrastive(plain, loss, chunk_size=4)(x)
    found = {**grads(encoder), "of the loss": weight.grad}
    encoder.zero_grad()
    weight.grad = None
    one_pass([plain], loss, [x], [4])
    assert_equal(found, {**grads(encoder), "of the loss": weight.grad}, 1e-5)


def test_one_encoder_may_serve_twice_and_alone() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(9, 10, dtype=torch.float64)
    both = CachedContrastive([model.encode_image] * 2, model.info_nce, chunk_size=4)
    torch.manual_seed(1)
    one_pass([model.encode_image] * 2, model.info_nce, (x, x + 1), (4, 4))
    want = grads(model)
    model.zero_grad()
    torch.manual_seed(1)
    both(x, x + 1)
    assert_equal(grads(model), want)
    model.zero_grad()
    alone = CachedContrastive(model.image, lambda features: features.square().mean(), chunk_size=4)
    torch.manual_seed(1)
    alone(x)
    found = grads(model)
    model.zero_grad()
    torch.manual_seed(1)
    one_pass([model.image], lambda features: features.square().mean(), [x], [4])
    assert_equal(found, grads(model))


def test_statistics_and_several_captions() -> None:
    """What the loss takes, it is given: ids of all rows, and more texts than images; what it returns comes back."""
    model, (pixels, tokens) = Model(0.0), batch(24)
    options = {"image_ids": torch.arange(12), "text_ids": torch.arange(24) // 2, "return_stats": True}
    step = CachedContrastive([model.encode_image, model.encode_text], model.info_nce, chunk_size=[5, 7])
    loss, stats = step(pixels[:12], tokens, **options)
    found = grads(model)
    model.zero_grad()
    expected, theirs = model.info_nce(model.encode_image(pixels[:12]), model.encode_text(tokens), **options)
    expected.backward()
    assert_equal(found, grads(model))
    assert type(stats) is type(theirs)
    torch.testing.assert_close((loss, *stats), (expected.detach(), *theirs), rtol=1e-12, atol=1e-12)


class Named(NamedTuple):
    pixels: Tensor
    mode: str


def test_inputs_of_every_kind() -> None:
    """Tensors are cut, at any depth, everything else is passed on as it is."""
    model, (pixels, _) = Model(0.0), batch(7)
    seen: list[Any] = []

    def encoder(pixels: Tensor, mode: str = "", more: Any = None, scale: Any = None) -> Tensor:
        seen.append((mode, more))
        return model.encode_image(pixels)

    step = CachedContrastive(encoder, lambda x: x[0].sum(), chunk_size=3)
    ids = torch.arange(7)
    for given in (
        {"pixels": pixels, "mode": "dense", "more": {"ids": ids, "names": ["a", "b"]}, "scale": torch.tensor(2.0)},
        UserDict(pixels=pixels, mode="dense", more={"ids": ids, "names": ["a", "b"]}),
        (pixels, "dense", {"ids": ids, "names": ["a", "b"]}),
        [pixels, "dense", {"ids": ids, "names": ["a", "b"]}],
    ):
        seen.clear()
        step(given)
        assert [mode for mode, _ in seen] == ["dense"] * 6
        assert [more["ids"].tolist() for _, more in seen] == 2 * [[0, 1, 2], [3, 4, 5], [6]]
        assert all(more["names"] == ["a", "b"] for _, more in seen)
    step(Named(pixels, "named"))
    step({"pixels": pixels, "more": (Named(ids, "nested"), None)})
    assert seen[-1][1][0].mode == "nested" and seen[-1][1][0].pixels.tolist() == [6]


def test_without_gradients_only_the_loss() -> None:
    model, inputs = Model(0.0), batch()
    step = CachedContrastive([model.encode_image, model.encode_text], model.info_nce, chunk_size=5)
    expected = model.info_nce(model.encode_image(inputs[0]), model.encode_text(inputs[1]))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(step(*inputs), expected)
        assert not grads(model)


def test_a_frozen_encoder_is_run_once() -> None:
    """A locked image tower: a module without trained parameters, and a function, whose first chunk shows it."""
    model, inputs = Model(0.0), batch(9)
    model.image.requires_grad_(False)
    calls = []
    model.image.register_forward_hook(lambda *_: calls.append(1))
    for encoder, runs in ((model.image, 3), (lambda x: model.image(x), 6)):
        model.zero_grad()
        calls.clear()
        CachedContrastive([encoder, model.encode_text], model.info_nce, chunk_size=3)(*inputs)
        assert len(calls) == runs
        found = grads(model)
        model.zero_grad()
        one_pass([encoder, model.encode_text], model.info_nce, inputs, (3, 3))
        assert_equal(found, grads(model))
    trained = inputs[0].clone().requires_grad_()  # an input that is trained itself
    CachedContrastive([model.image, model.encode_text], model.info_nce, chunk_size=3)(trained, inputs[1])
    assert trained.grad is not None and bool((trained.grad.abs().sum(1) > 0).all())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_counts_each_chunk_once(momentum: float | None) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(10, WIDTH), nn.BatchNorm1d(WIDTH, momentum=momentum)).double()
    x = batch(12)[0]
    target = torch.randn(12, WIDTH, dtype=torch.float64)
    loss = lambda features: (features * target).sum()
    before = {name: y.clone() for name, y in encoder.state_dict().items()}
    one_pass([encoder], loss, [x], [4])
    want, state = grads(encoder), {name: y.clone() for name, y in encoder.state_dict().items()}
    for given, modules in ((encoder, ()), (encoder.forward, ()), (lambda x: encoder(x), [encoder])):
        encoder.zero_grad()
        encoder.load_state_dict(before)
        CachedContrastive(given, loss, chunk_size=4, modules=modules)(x)
        assert_equal(grads(encoder), want)
        assert encoder[1].num_batches_tracked == 3 and encoder[1].track_running_stats
        for name, y in encoder.state_dict().items():
            torch.testing.assert_close(y, state[name], rtol=1e-12, atol=1e-12)


def test_encoders_that_differ_from_pass_to_pass_are_found() -> None:
    model, inputs = Model(), batch()
    noisy = lambda x: model.encode_image(x) * (1 + 0.1 * random.random())
    torch.manual_seed(0)
    step = CachedContrastive([noisy, model.encode_text], model.info_nce, chunk_size=8, verify=True)
    with pytest.raises(RuntimeError, match=r"encoders\[0\] must return the same features in both passes, got"):
        step(*inputs)
    CachedContrastive([model.encode_image, model.encode_text], model.info_nce, chunk_size=8, verify=True)(*inputs)
    inputs[0][3, 2] = torch.nan  # the same in both passes
    loss = CachedContrastive([model.encode_image, model.encode_text], model.info_nce, chunk_size=8, verify=True)
    assert torch.isnan(loss(*inputs)) and torch.isnan(grads(model)["image.0.weight"]).any()


@pytest.mark.slow  # a minute of compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_encoders_with_dropout(backend: str) -> None:
    torch.manual_seed(0)
    model, inputs = Model(dtype=torch.float32), batch(24, torch.float32)
    with no_old_graphs():
        encoders = [torch.compile(x, backend=backend) for x in (model.image, model.text)]
        torch.manual_seed(1)
        one_pass(encoders, model.info_nce, inputs, (8, 8))
        want = grads(model)
        model.zero_grad()
        torch.manual_seed(1)
        CachedContrastive(encoders, model.info_nce, chunk_size=8, verify=True)(*inputs)
    assert_equal(grads(model), want, 1e-5)


@pytest.mark.alone
def test_memory_is_that_of_a_chunk() -> None:
    """Features and their gradient beside 1/16 of the 16 activations of a row. The loss takes little."""
    encoder = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.GELU())])
    x = torch.randn(4096, 256)
    loss = lambda features: torch.dot(features.flatten(), x.flatten())
    step = CachedContrastive(encoder, loss, chunk_size=256)
    cached, plain = (peak_of(run) / x.nbytes for run in (lambda: step(x), lambda: loss(encoder(x)).backward()))
    assert plain >= 16
    assert cached <= 2.6


def test_bad_arguments() -> None:
    encoder, loss = nn.Linear(4, 2), lambda x: x.sum()
    x = torch.randn(6, 4)
    for arguments, error, match in (
        ({"encoders": [1]}, TypeError, r"encoders\[0\] must be callable, got int"),
        ({"encoders": []}, ValueError, "encoders must hold at least one encoder, got none"),
        ({"loss": 1}, TypeError, "loss must be callable, got int"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer, got 0"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size must be a positive integer, got 2.0"),
        ({"chunk_size": [4, -1], "encoders": [encoder] * 2}, ValueError, "chunk_size must be .* got -1"),
        ({"chunk_size": [4, 4]}, ValueError, "chunk_size must have one size for each of 1 encoders, got 2"),
        ({"modules": [lambda: None]}, TypeError, "modules must be modules, got function"),
    ):
        with pytest.raises(error, match=match):
            CachedContrastive(**{"encoders": encoder, "loss": loss, "chunk_size": 2, **arguments})
    step = CachedContrastive(encoder, loss, chunk_size=4)
    for inputs, error, match in (
        ((), ValueError, "inputs must be one for each of 1 encoders, got 0"),
        ((x, x), ValueError, "inputs must be one for each of 1 encoders, got 2"),
        (("words",), TypeError, r"inputs\[0\] must be a tensor, or a tuple, list or mapping of them, got str"),
        ((["a", "b"],), ValueError, r"inputs\[0\] must hold a tensor with a dim of rows, got none"),
        (((x, x[:5]),), ValueError, r"inputs\[0\] must hold tensors of as many rows, got 6 and 5"),
        ((x.clone().requires_grad_() + 1,), ValueError, r"inputs\[0\] must not be the result of something diff"),
    ):
        with pytest.raises(error, match=match):
            step(*inputs)
    for result, error, match in (
        (lambda x: None, TypeError, r"encoders\[0\] must return a tensor of features, got NoneType"),
        (lambda x: {"features": x}, TypeError, r"encoders\[0\] must return a tensor of features, got dict"),
        (lambda x: x.long(), TypeError, r"encoders\[0\] must return floating-point features, got torch.int64"),
        (lambda x: x[1:], ValueError, r"encoders\[0\] must return a row for each of 4 rows, got shape \(3, 4\)"),
        (lambda x: x.sum(), ValueError, r"encoders\[0\] must return a row for each of 4 rows, got shape \(\)"),
        (lambda x: x[:, : len(x)], ValueError, r"one shape and dtype, got rows of \(4,\) in .*, then of \(2,\) in"),
    ):
        with pytest.raises(error, match=match):
            CachedContrastive(result, loss, chunk_size=4)(x)
    for result, got in (
        (lambda x: x, r"shape \(6, 2\)"),
        (lambda x: {"loss": x.sum()}, "dict"),
        (lambda x: (), "tuple"),
    ):
        with pytest.raises(TypeError, match=f"loss must return a tensor of one element, or a tuple .*, got {got}"):
            CachedContrastive(encoder, result, chunk_size=4)(x)
    assert not grads(encoder)
