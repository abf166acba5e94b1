"""The benchmarks of `max_sim`: peers compute the same, and the check of large problems finds what is wrong."""

from __future__ import annotations

from functools import partial

import late_interaction_peers
import pytest
import torch
from harness import SPECS, generator
from torch import Tensor

from mmkernels import max_sim
from mmkernels.bench.first_run import count
from mmkernels.bench.gate import Gate, draw_cotangents, with_gradients
from mmkernels.bench.peers import CantRunError
from mmkernels.ops.contrastive.max_sim.cases import alike
from mmkernels.runtime import cpu
from mmkernels.spec import Inputs, cast

SPEC = SPECS["max_sim"]
GRADS = ("query", "document")


def problem(*, ragged: bool = False, sizes: tuple[int, int, int, int] = (3, 4, 6, 9)) -> Inputs:
    inputs = cast(alike(generator(), sizes, 16), torch.float32)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    return inputs | ({"document_lengths": torch.tensor([9, 2, 7, 5])} if ragged else {})


@pytest.mark.parametrize("ragged", [False, True])
def test_parts_tell_right_from_wrong(ragged: bool) -> None:
    """Of the last query and the last document every output and gradient is compared."""
    inputs = problem(ragged=ragged)
    scores = max_sim(**inputs)
    flows = draw_cotangents([scores.detach()])
    gate = Gate(SPEC, inputs, GRADS, flows, parts_only=True)
    assert gate.partial
    found = [x.detach() for x in with_gradients(lambda: max_sim(**inputs), [inputs[x] for x in GRADS], flows)()]
    assert gate.problem(found) is None and gate.distance(found) < 1e-5
    names = ["output 0", *(f"gradient of {name}" for name in GRADS)]
    for number, (name, x) in enumerate(zip(names, found, strict=True)):
        wrong = x.clone()
        wrong[-1, 0] += 0.01
        said = gate.problem([*found[:number], wrong, *found[number + 1 :]])
        assert said is not None and said.startswith(name), said


@pytest.mark.parametrize("ragged", [False, True])
def test_peers_compute_the_same(ragged: bool) -> None:
    """Those that are installed; what compiles is left to the benchmark."""
    inputs, ran = problem(ragged=ragged), []
    leaves = [inputs[name] for name in GRADS]
    ours = _step(partial(max_sim, **inputs), leaves)
    for peer in late_interaction_peers.PEERS:
        try:
            call = None if peer.slow or peer.device else peer.prepare(inputs)
        except CantRunError:
            continue
        if call is not None:
            ran.append(peer.name)
            for x, y in zip(ours, _step(call, leaves), strict=True):
                torch.testing.assert_close(x, y)
    assert "loop" in ran


def _step(call: late_interaction_peers.Call, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    scores: Tensor = call()
    return (scores.detach(), *torch.autograd.grad(scores.sin().sum(), leaves))


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
@pytest.mark.parametrize("backward", [False, True])
def test_cost_is_what_the_kernel_multiplies(backward: bool) -> None:
    """It makes the products once, and none for its gradients, which add rows."""
    inputs = problem(sizes=(2, 3, 32, 64))  # whole tiles
    leaves = [inputs[name] for name in GRADS] if backward else []
    call = partial(max_sim, **inputs, backend="cpu")
    products = count(partial(_step, call, leaves) if leaves else call).flops
    assert products == SPEC.cost(inputs, False).flops == 2 * 2 * 3 * 32 * 64 * 16
    assert SPEC.cost(inputs, True).flops == products + 4 * 2 * 3 * 32 * 16
