"""The contrastive losses beyond their definition: layouts, gradients of some inputs, how a call travels, memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import backends
from test_contrastive_definition import SPECS, check_gradients, check_rows, dtype_of, each_backend, features, scores_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkernels import BackendError, info_nce, retrieval_ranks, sigmoid_contrastive, use_backend
from mmkernels.ops._contrastive import strips
from mmkernels.ops.retrieval_ranks import chunked as ranks_chunked
from mmkernels.profiling.meters import memory_why_not, peak_memory
from mmkernels.spec import Inputs, cast

LOSSES: dict[str, Callable[..., Any]] = {"info_nce": info_nce, "sigmoid_contrastive": sigmoid_contrastive}
EXACT = [name for name in ("chunked", "reference") if name in backends(SPECS["info_nce"])]
HARD = {"hard_texts": features(4, seed=1)["text"]}
BIAS = {"logit_bias": torch.tensor(-2.0, dtype=torch.float64)}

each_exact_backend = pytest.mark.parametrize("backend", EXACT)


each_loss_and_backend = pytest.mark.parametrize(
    ("op", "backend"), [(op, x) for op in LOSSES for x in backends(SPECS[op])]
)


def each_loss(test: Callable[..., None]) -> Callable[..., None]:
    """The test runs for both losses on each of their backends, under Triton's interpreter too."""
    return pytest.mark.interpreted(each_loss_and_backend(test))


def inputs_of(op: str, backend: str | None = None, n: int = 7, **more: Any) -> Inputs:
    """Floating tensors by name, in the widest dtype that the backend computes in."""
    inputs = features(n, **more) | (HARD if op == "info_nce" else BIAS)
    return inputs if backend is None else cast(inputs, dtype_of(op, backend))


def step(op: str, inputs: Inputs, wanted: tuple[str, ...] | None = None, **options: Any) -> tuple[Tensor, ...]:
    """The loss, and its gradients by the inputs named."""
    wanted = tuple(inputs) if wanted is None else wanted
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss = LOSSES[op](**leaves, **options)
    return (loss.detach(), *torch.autograd.grad(3.0 * loss, [leaves[name] for name in wanted]))


# Derivatives.


@each_loss
def test_only_the_gradients_that_are_wanted(op: str, backend: str) -> None:
    inputs = inputs_of(op, backend)
    loss, *grads = step(op, inputs, backend=backend)
    full = dict(zip(inputs, grads, strict=True))
    for some in itertools.product([False, True], repeat=len(inputs)):
        leaves = {n: x.detach().requires_grad_(need) for (n, x), need in zip(inputs.items(), some, strict=True)}
        found = LOSSES[op](**leaves, backend=backend)
        torch.testing.assert_close(found.detach(), loss)
        assert found.requires_grad == any(some)
        if any(some):
            (3.0 * found).backward()
        for name, x in leaves.items():
            assert (x.grad is not None) == x.requires_grad
            if x.grad is not None:
                torch.testing.assert_close(x.grad, full[name])


@each_loss
def test_without_a_graph(op: str, backend: str) -> None:
    inputs = inputs_of(op, backend)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    want = LOSSES[op](**leaves, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = LOSSES[op](**leaves, backend=backend)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, want.detach())


@each_loss
def test_a_graph_may_be_walked_twice(op: str, backend: str) -> None:
    leaves = [x.requires_grad_() for x in inputs_of(op, backend).values()]
    loss = LOSSES[op](**dict(zip(inputs_of(op), leaves, strict=True)), backend=backend)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=again) for again in (True, False))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(float(x.abs().max()) > 0 for x in first)


@each_loss
def test_inputs_are_left_as_they_were(op: str, backend: str) -> None:
    inputs = inputs_of(op, backend)
    ids = {"image_ids": torch.arange(7) % 3, "text_ids": torch.arange(7) % 4}
    before = {name: x.clone() for name, x in (inputs | ids).items()}
    step(op, inputs, **ids, backend=backend)
    for name, x in (inputs | ids).items():
        assert torch.equal(x, before[name])


@each_loss
def test_checkpointing_gives_the_same(op: str, backend: str) -> None:
    names, leaves = zip(*((name, x.requires_grad_()) for name, x in inputs_of(op, backend).items()), strict=True)
    call = lambda *x: LOSSES[op](**dict(zip(names, x, strict=True)), backend=backend)
    want = torch.autograd.grad(call(*leaves), leaves)
    again = checkpoint(call, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, leaves), want, rtol=0, atol=0)  # type: ignore[arg-type]


def _differentiable(op: str, backend: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    inputs = features(3, 4, 2) | (BIAS if op != "info_nce" else {"hard_texts": features(2, dim=2, seed=1)["text"]})
    ids = {"image_ids": torch.tensor([0, 1, 9]), "text_ids": torch.tensor([0, 0, 1, 2])}
    names = tuple(inputs)
    options: Inputs = {} if op != "info_nce" else {"label_smoothing": 0.1, "reduction": "none"}

    def call(*x: Tensor) -> Any:
        return LOSSES[op](**dict(zip(names, x, strict=True)), **ids, **options, backend=backend)

    return call, tuple(x.requires_grad_() for x in inputs.values())


@each_exact_backend
@pytest.mark.parametrize("op", LOSSES)
def test_first_and_second_derivatives(op: str, backend: str) -> None:
    call, inputs = _differentiable(op, backend)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@each_exact_backend
def test_one_direction_s_rows_alone_and_their_derivatives(backend: str) -> None:
    call, inputs = _differentiable("info_nce", backend)
    for place in range(2):
        some = inputs[:3] if place else inputs  # texts have no part in hard texts
        whole = lambda *x: call(*x, *inputs[len(some) :])[place]  # noqa: B023
        assert torch.autograd.gradcheck(whole, some)
        assert torch.autograd.gradgradcheck(whole, some)


# Layouts and dtypes.


@each_loss
def test_strided_transposed_and_expanded_features(op: str, backend: str) -> None:
    inputs = inputs_of(op, backend)
    want = step(op, inputs, backend=backend)
    for view in (
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch.cat([x, x])[: len(x)].flip(0).flip(0),
        lambda x: torch.nn.functional.pad(x, (3, 2))[:, 3:-2],
    ):
        strided = {name: view(x) if x.dim() == 2 else x for name, x in inputs.items()}
        torch.testing.assert_close(step(op, strided, backend=backend), want)
    one = inputs | {"image": inputs["image"][:1].expand(7, 5), "text": inputs["text"][:1].expand(7, 5)}
    whole = {name: x.contiguous() for name, x in one.items()}
    torch.testing.assert_close(step(op, one, backend=backend), step(op, whole, backend=backend))


@each_loss
def test_strided_queries(op: str, backend: str) -> None:
    inputs = inputs_of(op, backend, queries=3)
    want = step(op, inputs, backend=backend)
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        turned = inputs["image"].permute(order).contiguous().permute(*torch.tensor(order).argsort().tolist())
        torch.testing.assert_close(step(op, inputs | {"image": turned}, backend=backend), want)


@each_backend("info_nce")
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (6, 1), (2, 9)])
@pytest.mark.parametrize("dim", [1, 3])
def test_few_rows(backend: str, n: int, m: int, dim: int) -> None:
    ids = {"image_ids": torch.arange(n) % 2, "text_ids": torch.arange(m) % 2}
    check_rows(backend, features(n, m, dim), **ids)


@each_backend("info_nce")
def test_no_hard_text_is_none(backend: str) -> None:
    inputs = features(7)
    none = cast(inputs, dtype_of("info_nce", backend)) | {
        "hard_texts": torch.zeros(0, 5, dtype=dtype_of("info_nce", backend))
    }
    *without, of_none = step("info_nce", none, backend=backend)
    torch.testing.assert_close(without, list(step("info_nce", cast(inputs, none["image"].dtype), backend=backend)))
    assert of_none.shape == (0, 5)


@each_backend("info_nce")
def test_hard_texts_may_be_the_texts(backend: str) -> None:
    """One tensor as both: its gradients add up."""
    inputs = features(6)
    leaves = {name: x.to(dtype_of("info_nce", backend)).requires_grad_() for name, x in inputs.items()}
    true = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    loss = info_nce(**leaves, hard_texts=leaves["text"], backend=backend)
    logits = true["logit_scale"] * scores_of(true["image"], true["text"])
    rows = torch.cat([logits, logits], 1).logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
    check_gradients((loss,), list(leaves.values()), (rows.mean() / 2,), list(true.values()))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_features_with_a_wide_scale(op: str, backend: str, dtype: torch.dtype) -> None:
    """The loss and the gradient of the scale are float32, and better than what the features' dtype could hold."""
    if backend not in backends(SPECS[op], dtype):
        pytest.skip(f"{backend} does not compute {dtype}")
    inputs = {name: x.to(torch.float32 if x.dim() == 0 else dtype) for name, x in inputs_of(op, n=40).items()}
    found, naive = (step(op, inputs, backend=name) for name in (backend, "reference"))
    truth = step(op, cast(inputs, torch.float64), backend="reference")
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in inputs.values())]
    for mine, other, true in zip(found, naive, truth, strict=True):
        assert SPECS[op].over_budget(mine, other, true) is None
    if backend != "reference":  # which sums in the features' dtype
        torch.testing.assert_close(found[0], truth[0].float())


@each_loss
def test_a_scale_may_be_a_number_or_have_one_element(op: str, backend: str) -> None:
    inputs = cast(inputs_of(op), torch.float32)
    loss, *grads = step(op, inputs, backend=backend)
    names = [name for name, x in inputs.items() if x.dim() == 0]
    others = {name: x for name, x in inputs.items() if name not in names}
    for kind in (lambda x: x.item(), lambda x: x.reshape(1), lambda x: torch.nn.Parameter(x.clone())):
        changed = {name: kind(inputs[name]) for name in names}
        torch.testing.assert_close(LOSSES[op](**others, **changed, backend=backend), loss)
    one = inputs | {name: inputs[name].reshape(1) for name in names}
    for mine, name, want in zip(step(op, one, backend=backend)[1:], inputs, grads, strict=True):
        assert mine.shape == one[name].shape
        torch.testing.assert_close(mine, want.reshape(mine.shape))
    whole = LOSSES[op](**others, **{name: int(inputs[name].item()) for name in names}, backend=backend)
    torch.testing.assert_close(whole, loss)


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("queries", [0, 2])
def test_strips_of_any_height_give_the_same(op: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ids = inputs_of(op, "chunked", n=20, queries=queries), torch.arange(20) % 6
    want = step(op, inputs, image_ids=ids, backend="chunked")
    for rows in (1, 7, 19):
        monkeypatch.setattr(strips, "STRIP_BYTES", rows * 20 * max(queries, 1) * 8)
        torch.testing.assert_close(step(op, inputs, image_ids=ids, backend="chunked"), want)


@pytest.mark.parametrize(("op", "backend"), [(op, x) for op in LOSSES for x in backends(SPECS[op]) if x != "reference"])
def test_second_derivatives_under_autocast(op: str, backend: str) -> None:
    """What was computed outside of it is differentiated as exactly inside."""
    leaves = {name: x.detach().requires_grad_() for name, x in cast(inputs_of(op), torch.float32).items()}

    def product() -> list[Tensor]:
        with torch.autocast("cpu", enabled=False):
            loss = LOSSES[op](**leaves, backend=backend)
        (first,) = torch.autograd.grad(loss, leaves["image"], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [leaves["image"], leaves["text"]]))

    want = product()
    with torch.autocast("cpu", torch.bfloat16):
        found = product()
    for x, y in zip(found, want, strict=True):
        assert float((x - y).norm()) <= 1e-5 * float(y.norm())


@each_loss
def test_a_loss_scale_of_float16(op: str, backend: str) -> None:
    """As `torch.amp.GradScaler` begins: the scaled gradients fit, their factor alone does not."""
    if backend == "reference" or backend not in backends(SPECS[op], torch.float16):
        pytest.skip(f"{backend} does not compute float16")
    inputs = features(64, dim=32, scale=5.0) | (BIAS if op == "sigmoid_contrastive" else {})
    inputs = cast(inputs, torch.float16, always_wide=frozenset({"logit_scale", "logit_bias"}))
    wanted, factor = ("image", "text", "logit_scale"), 2.0**16
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss = LOSSES[op](**leaves, backend=backend)
    found = torch.autograd.grad(factor * loss, [leaves[name] for name in wanted])
    exact = {name: x.detach().double().requires_grad_(name in wanted) for name, x in inputs.items()}
    want = torch.autograd.grad(LOSSES[op](**exact, backend="reference"), [exact[name] for name in wanted])
    for x, y in zip(found, want, strict=True):
        assert bool(x.isfinite().all()), backend
        assert float((x.double() / factor - y).norm()) <= 2e-3 * float(y.norm()), backend


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


@pytest.mark.parametrize("op", [*LOSSES, "retrieval_ranks"])
def test_use_backend_and_the_argument(op: str) -> None:
    function = LOSSES.get(op, retrieval_ranks)
    image, text, _ = features(7).values()
    inputs = inputs_of(op) if op in LOSSES else {"query": image, "gallery": text, "target": torch.arange(7)}
    with use_backend("reference"):
        inside = function(**inputs)
        overruled = function(**inputs, backend="chunked")
    assert torch.equal(inside, function(**inputs, backend="reference"))
    assert torch.equal(overruled, function(**inputs, backend="chunked"))
    assert torch.equal(overruled, function(**inputs))  # what float64 is computed by
    with pytest.raises(BackendError, match=f"{op} has no backend 'cuda'; it has .*chunked, reference"):
        function(**inputs, backend="cuda")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'fast'"):
        function(**inputs, backend="fast")


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


@pytest.mark.parametrize("op", LOSSES)
def test_differentiating_by_torch_func_is_refused_or_right(op: str) -> None:
    inputs = inputs_of(op)
    loss = lambda image, backend: LOSSES[op](**{**inputs, "image": image}, backend=backend)
    with pytest.raises(NotImplementedError, match=f"{op} can.t be differentiated by torch.func"):
        torch.func.grad(loss)(inputs["image"], "chunked")
    got = torch.func.grad(loss)(inputs["image"], "reference")
    torch.testing.assert_close(3.0 * got, step(op, inputs, ("image",))[1])


@pytest.mark.slow
@pytest.mark.parametrize("op", LOSSES)
def test_compiled_by_inductor_with_gradients(op: str) -> None:
    """With what a training loop has around it: normalising, and a scale that is the exponential of a parameter."""
    inputs = inputs_of(op)
    leaves = [x.requires_grad_() for x in inputs.values()]
    ids = torch.arange(7) % 4

    def call(image: Tensor, text: Tensor, scale: Tensor, more: Tensor, ids: Tensor) -> Tensor:
        image, text = (torch.nn.functional.normalize(x + 1.0, dim=-1) for x in (image, text))
        tensors = dict(zip(inputs, (image, text, scale.exp(), more), strict=True))
        return 2 * LOSSES[op](**tensors, image_ids=ids, text_ids=ids)

    leaves[2] = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    want = call(*leaves, ids)
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True)(*leaves, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("op", LOSSES)
def test_a_compiled_function_serves_other_batch_sizes(op: str) -> None:
    call = torch.compile(lambda x: LOSSES[op](**x), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 9, 17):
        inputs = inputs_of(op, n=n)
        torch.testing.assert_close(call(inputs), LOSSES[op](**inputs))


@each_loss_and_backend  # Triton's interpreter is for one thread
def test_calls_from_several_threads_at_once(op: str, backend: str) -> None:
    many = [inputs_of(op, backend, n=20 + n, seed=n) for n in range(4)]
    want = [step(op, inputs, backend=backend) for inputs in many]
    found: list[tuple[Tensor, ...] | None] = [None] * len(many)

    def work(place: int) -> None:
        torch.set_num_threads(1)
        with use_backend(backend):
            for _ in range(3):
                found[place] = step(op, many[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(many))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    torch.testing.assert_close(found, want, rtol=0, atol=0)


@each_loss
def test_threads_of_one_call_agree(op: str, backend: str) -> None:
    """However many cores share a call, twice the same is exactly the same."""
    inputs = cast(features(90, dim=24) | (BIAS if op != "info_nce" else {}), dtype_of(op, backend))
    one = step(op, inputs, backend=backend)
    torch.set_num_threads(3)
    several = [step(op, inputs, backend=backend) for _ in range(3)]
    torch.testing.assert_close(several[0], one)
    for other in several[1:]:
        torch.testing.assert_close(other, several[0], rtol=0, atol=0)


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
