"""The linear benchmarks: their peers compute the same, and their check of large problems finds what is wrong."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import linear_peers
import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, generator
from torch import Tensor

from mmkernels.bench import command, gate, peers
from mmkernels.bench.first_run import count
from mmkernels.bench.gate import Gate, draw_cotangents, flat, with_gradients
from mmkernels.bench.peers import CantRunError, Peer
from mmkernels.ops.linear import parts as linear_parts
from mmkernels.ops.linear.cases import large
from mmkernels.runtime import cpu
from mmkernels.spec import Inputs, OpSpec, cast
from mmkernels.targets import OURS, Measured, MemoryRatio

ROWS, TOKENS, DIM = 90, 700, 24
OPS = {
    "linear_logprobs": linear_peers.LOGPROBS,
    "entropy": linear_peers.LOGPROBS,
    "linear_cross_entropy": linear_peers.CROSS_ENTROPY,
}
GPU = [(op, peer) for op in ("entropy", "linear_cross_entropy") for peer in OPS[op] if peer.device == "cuda"]


def problem(
    op: str, dtype: torch.dtype = torch.float32, ignored: float = 0.0, draw: torch.Generator | None = None
) -> tuple[OpSpec, Inputs, list[str]]:
    """Spec, inputs, and the names of those to differentiate by."""
    hidden, weight, target = large(draw or generator(), ROWS, TOKENS, DIM, ignored)
    if op == "linear_cross_entropy":
        spec, inputs = SPECS[op], {"input": hidden, "linear_weight": weight, "target": target}
    else:
        spec, inputs = SPECS["linear_logprobs"], {"hidden": hidden, "weight": weight, "target": target}
        inputs |= {"return_entropy": True} if op == "entropy" else {}
    inputs, grads = cast(inputs, dtype), list(inputs)[:2]
    return spec, {name: x.requires_grad_() if name in grads else x for name, x in inputs.items()}, grads


def make_gate(spec: OpSpec, inputs: Inputs, grads: list[str], *, parts: bool) -> tuple[Gate, Any]:
    """A gate, and what makes a call one with gradients."""
    outputs = flat(spec.function(**inputs))
    cotangents = draw_cotangents(outputs) if grads else []
    judge = Gate(spec, inputs, grads, cotangents, parts_only=parts)
    assert judge.partial == parts
    return judge, partial(with_gradients, leaves=[inputs[name] for name in grads], cotangents=cotangents)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, not all rows and tokens in the sample."""
    monkeypatch.setattr(linear_parts, "_BLOCK", 128)
    monkeypatch.setattr(linear_parts, "_SAMPLE", 20)
    monkeypatch.setattr(linear_peers, "_CHUNK", 32)


# The check.


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_parts_say_what_the_definition_says(op: str, dtype: torch.dtype, backward: bool) -> None:
    spec, inputs, grads = problem(op, dtype, ignored=0.3)
    grads = grads if backward else []
    judge, passes = make_gate(spec, inputs, grads, parts=True)
    wide = {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    leaves = [wide[name].requires_grad_() for name in grads]
    call = partial(spec.function, **wide, backend="reference")
    assert judge.distance(flat(with_gradients(call, leaves, passes.keywords["cotangents"])())) < 1e-12
    for backend in ("reference", "chunked", None):
        assert judge.problem(flat(passes(partial(spec.function, **inputs, backend=backend))())) is None


@pytest.mark.parametrize("op", OPS)
def test_parts_find_what_is_wrong(op: str) -> None:
    """In any output or gradient: a thousandth too large; and NaN anywhere, in the sample or not."""
    spec, inputs, grads = problem(op)
    judge, passes = make_gate(spec, inputs, grads, parts=True)
    results = flat(passes(partial(spec.function, **inputs))())
    assert judge.problem(results) is None
    outputs = len(results) - 2
    names = [*(f"output {n}" for n in range(outputs)), *(f"gradient of {name}" for name in grads)]
    for place, (name, right) in enumerate(zip(names, results, strict=True)):
        wrong = [*results[:place], right * 1.001, *results[place + 1 :]]
        assert (judge.problem(wrong) or "").startswith(f"{name}: ")
    for place, row in itertools.product((outputs, outputs + 1), range(0, TOKENS, 7)):
        spoiled = results[place].clone()
        spoiled[row % len(spoiled), 3] = torch.nan
        assert judge.problem([*results[:place], spoiled, *results[place + 1 :]]) == f"{names[place]}: not finite"


@pytest.mark.parametrize("op", OPS)
def test_parts_find_wrong_rows_outside_of_the_sample(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tile that was left out, or is there twice."""
    monkeypatch.setattr(linear_parts, "_SAMPLE", 2)
    spec, inputs, grads = problem(op)
    judge, passes = make_gate(spec, inputs, grads, parts=True)
    results = flat(passes(partial(spec.function, **inputs))())
    for place, right in enumerate(results):
        for first, factor in itertools.product(range(1, len(right) - 16, 16) if right.dim() else (), (0.0, 2.0)):
            wrong = right.clone()
            wrong[first : first + 16] *= factor
            assert judge.problem([*results[:place], wrong, *results[place + 1 :]]) is not None


def test_parts_find_a_token_whose_gradient_is_small() -> None:
    """The last token's, a small part of a target's, is wrong by a hundredth. (Of these inputs: not any seed's is.)"""
    spec, inputs, grads = problem("linear_cross_entropy", draw=torch.Generator().manual_seed(0))
    inputs["target"] = inputs["target"] // 2
    judge, passes = make_gate(spec, inputs, grads, parts=True)
    results = flat(passes(partial(spec.function, **inputs))())
    assert judge.problem(results) is None
    results[2][-1] *= 1.01
    assert results[2][-1].abs().max() < results[2].abs().max() / 20
    assert (judge.problem(results) or "").startswith("gradient of linear_weight: ")


def test_a_frozen_weight_is_checked_by_hidden_alone() -> None:
    spec, inputs, _ = problem("entropy")
    inputs["weight"].requires_grad_(False)
    judge, passes = make_gate(spec, inputs, ["hidden"], parts=True)
    results = flat(passes(partial(spec.function, **inputs))())
    assert judge.problem(results) is None
    assert judge.problem([*results[:2], 1.001 * results[2]]) is not None


def test_parts_refuse_what_they_know_nothing_of() -> None:
    spec, inputs, _ = problem("linear_logprobs")
    with pytest.raises(NotImplementedError, match=r"only plain rows \[T, d\] are checked in parts, got .*softcap"):
        make_gate(spec, inputs | {"softcap": 30.0}, [], parts=True)


def test_a_large_weight_counts_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition in float64 keeps eight tensors of the logits' size, and the weight three times."""
    spec, inputs, _ = problem("linear_cross_entropy")
    given = ROWS * DIM + TOKENS * DIM + ROWS
    need = 8 * (8 * ROWS * TOKENS + 3 * given)
    for room, partial_ in ((need, False), (need - 1, True)):
        monkeypatch.setattr(gate, "room", lambda device, room=room: room)
        assert Gate(spec, inputs, [], []).partial == partial_


# Peers.


def _name(x: Any) -> str:
    return getattr(x, "name", x)


@pytest.mark.parametrize(
    ("op", "peer"), [(op, x) for op in OPS for x in OPS[op] if x.checked and not x.device], ids=_name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_peer_computes_the_same(op: str, peer: Peer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_compile", lambda function: function)  # what it compiles is what is tested
    if peer.name == "HF loss":
        pytest.importorskip("transformers")
    if peer.name == "torch chunked" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has none")
    ignored = 0.3 if op == "linear_cross_entropy" else 0.0
    spec, inputs, grads = problem(op, dtype, ignored)
    judge, passes = make_gate(spec, inputs, grads, parts=False)
    distance = judge.distance(flat(passes(peer.prepare(inputs))()))
    assert distance < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    ("op", "products", "ignored"),
    [
        ("linear_logprobs", 4, 0.0),
        ("entropy", 4, 0.0),
        ("linear_cross_entropy", 3, 0.0),
        ("linear_cross_entropy", 3, 0.5),
    ],
)
def test_products_are_counted(op: str, products: int, ignored: float) -> None:
    """The logits once or more, and a gradient of each side; by the products alone as by ours."""
    spec, inputs, grads = problem(op, ignored=ignored)
    _, passes = make_gate(spec, inputs, grads, parts=False)
    once = spec.cost(inputs, False).flops
    (alone,) = (peer for peer in OPS[op] if peer.name == "mm alone")
    for call in (alone.prepare(inputs), partial(spec.function, **inputs, backend="chunked")):
        result, flops = count(passes(call))
        assert flops == products * once == spec.cost(inputs, True).flops
        assert [x.shape for x in flat(result)] == [x.shape for x in flat(passes(partial(spec.function, **inputs))())]
    with torch.no_grad():
        frozen = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        assert count(alone.prepare(frozen)).flops == once
    if cpu.why_not() is None:
        ours = count(passes(partial(spec.function, **inputs, backend="cpu"))).flops
        assert ours is not None and products * once <= ours < 1.5 * products * once  # tiles may be fuller


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "memory_of", lambda device: 1000)
    for op in OPS:
        _, inputs, _ = problem(op)
        for peer in OPS[op]:
            if not peer.device and peer.name != "torch chunked":
                with pytest.raises(CantRunError, match=r"would take .* GB or more of .* GB: left out"):
                    peer.prepare(inputs)


def test_the_causal_loss_is_left_out_where_it_is_the_eager_one() -> None:
    with pytest.raises(CantRunError, match=r"is eager, in float32, where all rows are supervised"):
        linear_peers.causal_lm_loss(problem("linear_cross_entropy")[1])


@pytest.mark.parametrize(
    ("op", "peer"), [*GPU, ("linear_cross_entropy", Peer("HF", linear_peers.causal_lm_loss))], ids=_name
)
def test_a_package_that_is_not_there_is_named(op: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "quack", "cut_cross_entropy", "verl", "transformers.loss.loss_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    ignored = 0.5 if op == "linear_cross_entropy" else 0.0
    with pytest.raises(CantRunError, match=r"^is not installed: pip install [a-z-]+"):
        peer.prepare(problem(op, ignored=ignored)[1])


@pytest.mark.parametrize(("op", "peer"), GPU, ids=_name)
def test_a_package_is_called_with_its_arguments(op: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures, which compute the same."""

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def rows(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str) -> Any:
        assert temperature == 1.0 and reduction == "none"
        return linear_peers.naive_rows(hidden, weight, labels, True)

    module = SimpleNamespace(
        LigerFusedLinearCrossEntropyFunction=SimpleNamespace(apply=lambda *args: (loss(*args), None, None, None)),
        chunked_linear_cross_entropy=loss,
        linear_cross_entropy=rows if op == "entropy" else loss,
    )
    monkeypatch.setattr(linear_peers, "_imported", lambda name, package: module)
    spec, inputs, grads = problem(op)
    judge, passes = make_gate(spec, inputs, grads, parts=False)
    assert judge.distance(flat(passes(peer.prepare(inputs))())) < 1e-5


def test_peers_of_plain_rows_refuse_the_rest() -> None:
    for op in OPS:
        _, inputs, _ = problem(op)
        for peer in OPS[op]:
            with pytest.raises(CantRunError, match=r"only rows \[T, d\]"):
                peer.prepare(inputs | {"softcap": 30.0})
    ignored = problem("entropy", ignored=0.5)[1]
    for peer in OPS["entropy"]:
        with pytest.raises(CantRunError, match="only where no row is ignored"):
            peer.prepare(ignored)


# Targets and rows.


def test_every_target_has_its_peer() -> None:
    for op in ("linear_logprobs", "linear_cross_entropy"):
        names = {peer.name: peer.device for peer in OPS[op]}
        for config in SPECS[op].benchmarks:
            for target in config.targets:
                peer = getattr(target, "peer", None)
                assert peer is None or peer in names
                assert target.device == "gpu" or not names.get(peer or "")
                assert target.device in config.devices and (config.grads or not target.backward)


def test_an_accumulator_in_float32_does_not_count() -> None:
    """In float32 it is the gradient itself, which the harness leaves out; in bfloat16 it is beside it."""
    (config,) = (x for x in SPECS["linear_cross_entropy"].benchmarks if x.id == "152k tokens")
    wide, narrow = (x for x in config.targets if isinstance(x, MemoryRatio) and x.peer == "eager")
    row = Measured(1e9, 1e6, {OURS: 1.0}, {OURS: 650e6, "eager": 2e9}, 1e9, 1e9)
    assert (wide.dtype, narrow.dtype) == ("fp32", "bf16")
    assert wide.reached(row) == pytest.approx(2e9 / 650e6)
    assert narrow.reached(row) == pytest.approx(2e9 / (650e6 - 4 * 151_936 * 1024))


def test_rows_of_both_ops_are_shown_together() -> None:
    groups = command._groups(["info_nce", "linear_cross_entropy", "linear_logprobs"])
    assert groups["linear_logprobs"] == ["linear_logprobs", "linear_cross_entropy"]
    assert groups["linear_cross_entropy"] == ["linear_cross_entropy"]
    assert sorted(groups["linear"]) == ["linear_cross_entropy", "linear_logprobs"]
