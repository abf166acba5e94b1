"""Sampling, rotary embeddings and caches."""

from __future__ import annotations

import pytest
import torch

from mmkernels.models.blocks.gated import _GatedDown, gated_down
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.sampling import sample
from mmkernels.models.blocks.text import SwiGLU, rotary_angles, rotate


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    assert sample(logits[:2]).tolist() == [1, 1]

    def shares(temperature: float, top_p: float) -> torch.Tensor:
        return torch.bincount(sample(logits, temperature, top_p, generator), minlength=4) / len(logits)

    torch.testing.assert_close(shares(1.0, 1.0), logits[0].softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(2.0, 1.0), (logits[0] / 2).softmax(0), atol=0.015, rtol=0)
    # The probabilities are 0.697, 0.256, 0.035 and 0.013: two of them reach 0.9, one reaches 0.69, three reach 0.98.
    kept = logits[0].softmax(0)
    for top_p, tokens in ((0.9, [1, 2]), (0.69, [1]), (0.98, [0, 1, 2]), (1e-9, [1])):
        expected = torch.zeros(4)
        expected[tokens] = kept[tokens] / kept[tokens].sum()
        torch.testing.assert_close(shares(1.0, top_p), expected, atol=0.015, rtol=0)
    for cold in (1e-3, 1e-40, 5e-324):
        assert sample(logits[:9], cold).tolist() == [1] * 9
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be >= 0 and finite"):
            sample(logits, bad)
    for bad in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="top_p must be above 0 and at most 1"):
            sample(logits, 1.0, bad)


def test_rotary_is_a_rotation_by_relative_position() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        rotated = [rotate(x, rotary_angles(torch.tensor([[at]]), 8, 100.0, x.dtype)) for x, at in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score(0, 0), (q * k).sum())
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-3
    # The channels (i, i + 4) are rotated by position / 100^(i/4): by hand, for i = 1.
    rotated = rotate(q, rotary_angles(torch.tensor([[2]]), 8, 100.0, q.dtype))[0, 0, 0]
    angle = torch.tensor(2 / 100**0.25, dtype=torch.float64)
    torch.testing.assert_close(
        rotated[1], q[0, 0, 0, 1] * angle.cos() - q[0, 0, 0, 5] * angle.sin(), rtol=1e-5, atol=1e-6
    )


def test_kv_cache_positions_and_masks() -> None:
    cache = KVCache(num_layers=1)
    positions, mask = cache.extend(torch.tensor([[False, True, True], [True, True, False]]))
    assert positions.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert mask.to_dense(3)[:, 0].int().tolist() == [
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 0]],
    ]
    positions, mask = cache.extend(torch.ones(2, 2, dtype=torch.bool), padded=False)
    assert positions.tolist() == [[2, 3], [2, 3]]
    assert mask.to_dense(5)[:, 0].int().tolist() == [
        [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
        [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
    ]
    assert (len(cache), cache.batch_size) == (5, 2)


def test_swiglu() -> None:
    layer, x = SwiGLU(4, 6), torch.randn(2, 4)
    gate = x @ layer.gate_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.up_proj.weight.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_down_has_the_gradients_of_the_formula_and_keeps_half(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    gate, up, down = draw(2, 3, 6), draw(2, 3, 6), torch.nn.Linear(6, 4, bias=bias).double()
    activation = torch.nn.SiLU()

    def fused(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _GatedDown.apply(gate, up, weight, down.bias, activation)

    weight = down.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(fused, (gate, up, weight))
    assert torch.autograd.gradgradcheck(fused, (gate, up, weight))
    assert torch.autograd.gradcheck(fused, (gate.detach(), up, weight))

    inputs = (gate, up, *down.parameters())
    kept: dict[str, int] = {}
    found = {}
    for name, call in (
        ("fused", lambda: gated_down(gate, up, activation, down)),
        ("naive", lambda: down(activation(gate) * up)),
    ):
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call()
        storages.pop(down.weight.untyped_storage().data_ptr(), None)
        kept[name] = sum(storages.values())
        found[name] = out, torch.autograd.grad(out, inputs, torch.ones_like(out))
    torch.testing.assert_close(found["fused"], found["naive"])
    assert kept["fused"] == 2 * gate.numel() * 8
    assert kept["naive"] == 4 * gate.numel() * 8


def test_gated_down_calls_a_layer_that_is_not_plain() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    gate, up, activation = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6), torch.nn.SiLU()
    down = Doubled(6, 4)
    torch.testing.assert_close(gated_down(gate, up, activation, down), down(activation(gate) * up))
    hooked = torch.nn.Linear(6, 4)
    hooked.register_forward_hook(lambda layer, inputs, out: out + 1)
    torch.testing.assert_close(gated_down(gate, up, activation, hooked), hooked(activation(gate) * up))
    with torch.autocast("cpu", torch.bfloat16):
        assert gated_down(gate, up, activation, torch.nn.Linear(6, 4)).dtype == torch.bfloat16
