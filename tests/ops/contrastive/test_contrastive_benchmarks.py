"""The contrastive benchmarks: their peers compute the same, and their check of large problems finds what is wrong."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from typing import Any

import contrastive_peers
import pytest
import torch
from harness import SPECS, backends, generator
from torch import Tensor

from mmkernels.bench import gate, peers
from mmkernels.bench.first_run import count
from mmkernels.bench.gate import Gate, draw_cotangents, flat, with_gradients
from mmkernels.bench.peers import CantRunError, Peer
from mmkernels.ops.contrastive import parts as contrastive_parts
from mmkernels.ops.contrastive.cases import two_towers
from mmkernels.runtime import cpu
from mmkernels.spec import Inputs, OpSpec, cast

PAIRS, DIM = 300, 24
OPS = {
    "info_nce": contrastive_peers.INFO_NCE,
    "sigmoid_contrastive": contrastive_peers.SIGMOID,
    "retrieval_ranks": contrastive_peers.RANKS,
}
LOSSES = ("info_nce", "sigmoid_contrastive")


def problem(op: str, dtype: torch.dtype = torch.float32, queries: int = 0) -> tuple[OpSpec, Inputs, list[Tensor]]:
    """Spec, inputs, and those of them to differentiate by."""
    inputs = two_towers(generator(), PAIRS, PAIRS, DIM, queries)
    if op == "sigmoid_contrastive":
        inputs["logit_bias"] = torch.tensor(-6.0)
    if op == "retrieval_ranks":
        inputs = {"query": inputs["image"], "gallery": inputs["text"], "target": torch.arange(PAIRS)}
    spec = SPECS[op]
    inputs = cast(inputs, dtype, always_wide=spec.always_wide)
    leaves = list(inputs.values()) if op in LOSSES else []
    return spec, inputs, [x.requires_grad_() for x in leaves]


def make_gate(op: str, inputs: Inputs, spec: OpSpec, leaves: list[Tensor], *, parts: bool) -> tuple[Gate, Any]:
    """A gate, and what makes a call one with gradients; `parts`: as if nothing fitted into memory."""
    outputs = flat(spec.function(**inputs))
    cotangents = draw_cotangents(outputs) if leaves else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "room", lambda device: 0.0 if parts else float("inf"))
        judge = Gate(spec, inputs, tuple(inputs) if leaves else (), cotangents)
    assert judge.partial == parts
    return judge, partial(with_gradients, leaves=leaves, cotangents=cotangents)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, not all rows in the sample, and not all sums in float64."""
    monkeypatch.setattr(contrastive_parts, "_BLOCK", 128)
    monkeypatch.setattr(contrastive_parts, "_SAMPLE", 20)
    monkeypatch.setattr(contrastive_parts, "_SHARPENED", 100)
    monkeypatch.setattr(contrastive_peers, "_BLOCK", 128)


# The check.


@pytest.mark.parametrize(("op", "queries"), [*((op, 0) for op in LOSSES), ("info_nce", 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_parts_say_what_the_definition_says(op: str, queries: int, dtype: torch.dtype, backward: bool) -> None:
    spec, inputs, leaves = problem(op, dtype, queries)
    judge, passes = make_gate(op, inputs, spec, leaves if backward else [], parts=True)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    call = partial(spec.function, **wide, backend="reference")
    truth = flat(with_gradients(call, list(wide.values()) if backward else [], passes.keywords["cotangents"])())
    assert judge.distance(truth) < 2e-6
    assert judge.problem(flat(passes(partial(spec.function, **inputs))())) is None


@pytest.mark.parametrize("op", LOSSES)
def test_parts_find_what_is_wrong(op: str) -> None:
    """In any output or gradient: a thousandth too large; and NaN anywhere, in the sample or not."""
    spec, inputs, leaves = problem(op)
    judge, passes = make_gate(op, inputs, spec, leaves, parts=True)
    results = flat(passes(partial(spec.function, **inputs))())
    assert judge.problem(results) is None
    names = ["output 0", *(f"gradient of {name}" for name in inputs)]
    for place, (name, right) in enumerate(zip(names, results, strict=True)):
        wrong = [*results[:place], right * 1.001, *results[place + 1 :]]
        assert (judge.problem(wrong) or "").startswith(f"{name}: ")
    for place in (1, 2):
        for row in range(PAIRS):
            spoiled = results[place].clone()
            spoiled[row, 3] = torch.nan
            assert judge.problem([*results[:place], spoiled, *results[place + 1 :]]) == f"{names[place]}: not finite"


@pytest.mark.parametrize("op", LOSSES)
def test_parts_find_wrong_rows_outside_of_the_sample(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tile that was left out, or is there twice."""
    monkeypatch.setattr(contrastive_parts, "_SAMPLE", 2)
    spec, inputs, leaves = problem(op)
    judge, passes = make_gate(op, inputs, spec, leaves, parts=True)
    results = flat(passes(partial(spec.function, **inputs))())
    for place, first, factor in itertools.product((1, 2), range(1, PAIRS - 16, 16), (0.0, 2.0)):
        wrong = results[place].clone()
        wrong[first : first + 16] *= factor
        assert judge.problem([*results[:place], wrong, *results[place + 1 :]]) is not None


def test_ranks_are_checked_on_some_queries() -> None:
    spec, inputs, leaves = problem("retrieval_ranks")
    judge, _ = make_gate("retrieval_ranks", inputs, spec, leaves, parts=True)
    ranks = spec.function(**inputs)
    assert judge.problem([ranks]) is None and judge.distance([ranks]) == 0
    for row in (0, PAIRS - 1):
        wrong = ranks.clone()
        wrong[row] += 1
        assert judge.problem([wrong]) is not None and judge.distance([wrong]) > 0


def test_parts_refuse_what_they_know_nothing_of() -> None:
    spec, inputs, _ = problem("info_nce")
    with pytest.raises(NotImplementedError, match=r"only plain features are checked in parts, got .*image_ids"):
        make_gate("info_nce", inputs | {"image_ids": torch.arange(PAIRS)}, spec, [], parts=True)


def test_what_queries_cost() -> None:
    """Both passes need the scores of all of them, gradients only those of each pair's best."""
    spec, inputs, _ = problem("info_nce", queries=5)
    of_one = 2.0 * PAIRS * PAIRS * DIM
    assert [spec.cost(inputs, backward).flops / of_one for backward in (False, True)] == [5, 12]
    assert contrastive_parts.elements(inputs) == 5 * PAIRS * PAIRS


# Peers.


def _prepared(peer: Peer, inputs: Inputs) -> Any:
    if peer.name.startswith("cached"):
        pytest.importorskip("sentence_transformers")
    return peer.prepare(inputs)


@pytest.mark.parametrize(("op", "peer"), [(op, x) for op in OPS for x in OPS[op]], ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_peer_computes_the_same(op: str, peer: Peer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_compile", lambda function: function)  # what it compiles is what is tested
    spec, inputs, leaves = problem(op, dtype)
    judge, passes = make_gate(op, inputs, spec, leaves, parts=False)
    distance = judge.distance(flat(passes(_prepared(peer, inputs))()))
    assert distance < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_peer_takes_the_best_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_compile", lambda function: function)
    spec, inputs, leaves = problem("info_nce", queries=5)
    judge, passes = make_gate("info_nce", inputs, spec, leaves, parts=False)
    for peer in contrastive_peers.INFO_NCE:
        if peer.name == "compiled":
            assert judge.distance(flat(passes(peer.prepare(inputs))())) < 1e-5
        else:
            with pytest.raises(CantRunError, match=r"only features \[N, d\]"):
                peer.prepare(inputs)


@pytest.mark.parametrize("op", LOSSES)
def test_products_are_counted(op: str) -> None:
    """Of ours as of peers: the scores once or more, and a gradient of each side."""
    spec, inputs, leaves = problem(op)
    _, passes = make_gate(op, inputs, spec, leaves, parts=False)
    once = spec.cost(inputs, False).flops
    chunked = partial(spec.function, **inputs, backend="chunked")
    naive = partial(spec.function, **inputs, backend="reference")
    (open_clip,) = (peer.prepare(inputs) for peer in OPS[op] if peer.name == "open_clip")
    expected = (4, 3, 6) if op == "info_nce" else (3, 3, 3)
    for call, products in zip((chunked, naive, open_clip), expected, strict=True):
        result, flops = count(passes(call))
        assert len(result) == 1 + len(leaves) and flops == products * once
    if cpu.why_not() is None:
        ours = count(passes(partial(spec.function, **inputs, backend="cpu"))).flops
        assert ours is not None and expected[0] * once <= ours < 1.5 * expected[0] * once  # tiles may be fuller


@pytest.mark.interpreted
@pytest.mark.parametrize("op", LOSSES)
def test_what_triton_multiplies_is_not_counted(op: str) -> None:
    """PyTorch's products beside it would be less than the whole."""
    if "triton" not in backends(SPECS[op]):
        pytest.skip("there is no GPU")
    spec, inputs, leaves = problem(op)
    _, passes = make_gate(op, inputs, spec, leaves, parts=False)
    call = passes(partial(spec.function, **inputs, backend="triton"))
    assert count(call).flops is None and count(call, pytorch=False).flops is None


def test_no_product_is_no_count() -> None:
    result, flops = count(lambda: torch.ones(3) + 1)
    assert result.tolist() == [2, 2, 2] and flops is None


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "memory_of", lambda device: 1000)
    for op in OPS:
        _, inputs, _ = problem(op)
        for peer in OPS[op]:
            if peer.name.startswith("cached") or peer.name == "matmul":
                continue
            with pytest.raises(CantRunError, match=r"would take .* GB or more of .* GB: left out"):
                peer.prepare(inputs)


def test_a_cached_step_of_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_peers, "matmul_rate", lambda dtype, device: 1e3)
    with pytest.raises(CantRunError, match=r"would take .* s a step at the measured peak: left out"):
        contrastive_peers.cached(problem("info_nce")[1])


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sentence_transformers", "sentence_transformers.util"):
        monkeypatch.setitem(sys.modules, name, None)
    contrastive_peers._cached_loss.cache_clear()
    with pytest.raises(CantRunError, match=r'^is not installed: pip install "mmkernels\[peers\]"'):
        contrastive_peers.cached(problem("info_nce")[1])


@pytest.mark.parametrize("op", LOSSES)
def test_peers_of_plain_features_refuse_the_rest(op: str) -> None:
    _, inputs, _ = problem(op)
    for peer in OPS[op]:
        with pytest.raises(CantRunError, match=r"only features .* without ids"):
            peer.prepare(inputs | {"image_ids": torch.arange(PAIRS)})
