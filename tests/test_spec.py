"""An op's spec: an error budget that can fail, costs, inputs in another dtype."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmkernels.ops import specs
from mmkernels.spec import cast

SPEC = specs()["cross_attention"]
TRUE = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_within_budget() -> None:
    naive = TRUE.bfloat16()
    assert SPEC.over_budget(naive, naive, TRUE) is None
    assert SPEC.over_budget(TRUE.bfloat16().float(), naive, TRUE) is None
    assert SPEC.over_budget(torch.zeros(0), torch.zeros(0), torch.zeros(0)) is None


def test_one_wrong_element_or_a_small_error_everywhere_is_seen() -> None:
    naive = TRUE.float()
    wrong = naive.clone()
    wrong[3] += 1e-3
    assert "largest error" in (SPEC.over_budget(wrong, naive, TRUE) or "")
    assert SPEC.over_budget(naive + 1e-5, naive, TRUE) is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_and_shapes(bad: float) -> None:
    naive, infinite = TRUE.float(), TRUE.clone()
    wrong = naive.clone()
    wrong[3] = bad
    assert "not finite" in (SPEC.over_budget(wrong, naive, TRUE) or "")
    infinite[3] = -torch.inf
    assert "not finite" in (SPEC.over_budget(naive, naive, infinite) or "")
    assert SPEC.over_budget(infinite.float(), infinite.float(), infinite) is None
    assert "shape" in (SPEC.over_budget(naive[1:], naive, TRUE) or "")


def test_the_cost_of_chosen_rows_is_theirs_alone() -> None:
    spec = specs()["attention_weights"]
    inputs = {"query": torch.zeros(1, 2, 8, 4), "key": torch.zeros(1, 2, 16, 4), "rows": torch.tensor([0, 5])}
    assert spec.cost(inputs, False).flops == 2.0 * 4 * 2 * 2 * 16
    assert spec.cost({name: inputs[name] for name in ("query", "key")}, False).flops == 2.0 * 4 * 2 * 8 * 16


@pytest.mark.parametrize("view", [lambda x: x[:, 1::2], lambda x: x[:, 1:].mT, lambda x: x[:, None].expand(4, 3, 6)])
def test_views_keep_their_strides_in_another_dtype(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.arange(24.0, dtype=torch.float64).view(4, 6))
    y = cast({"x": x}, torch.bfloat16)["x"]
    assert y.stride() == x.stride() and torch.equal(y.double(), x)
