"""The Triton linear kernels beyond the specs' cases: tiles, halves, strips, chunks, extremes, where work is skipped.

They run under Triton's interpreter (``TRITON_INTERPRET=1``), or on a GPU where there is one.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from harness import generator

from mmkernels.ops.linear import formula
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning

pytest.importorskip("triton")

from ops.linear.triton_tools import (
    check_gradients,
    check_loss,
    check_states,
    gradients_record,
    loss_record,
    lse_of,
    states_record,
)
from triton_tiling import DEVICE, tiled

from mmkernels.ops.linear.linear_cross_entropy import triton as cross_entropy
from mmkernels.ops.linear.linear_logprobs import triton as logprobs
from mmkernels.ops.linear.triton import call, gradients, products, states, stored
from mmkernels.ops.linear.triton.arguments import Buffer, Fields

interpreted = pytest.mark.interpreted  # and else on a GPU, or not at all
if not gpu.INTERPRETED:
    pytestmark = pytest.mark.gpu

NAN, INF = math.nan, math.inf
EVERYTHING = {"softcap": 5.0, "temperature": 0.7, "entropy": True, "best": True, "bias": True, "weighted": True}
"""Of states and gradients."""


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small tiles, two in a group or in a step of a merge; one group of rows, strip and chunk for each of them."""
    for module, name in ((states, "PARTIAL_BYTES"), (gradients, "STRIP_BYTES"), (stored, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(states, "_MERGE", tuning.Config(16, 2, 4, 1))
    monkeypatch.setattr(call, "_GROUP", 2)
    monkeypatch.setattr(call, "multiprocessors", lambda device: 3)
    with tiled(16, 32):
        yield


# Features.


@interpreted
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("more", [{}, {"entropy": True, "bias": True}, EVERYTHING], ids=["plain", "entropy", "all"])
def test_states_and_gradients(more: dict[str, Any], halved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if halved:
        monkeypatch.setattr(call, "WHOLE_TILE", 0)
    record = states_record(35, 70, 40 if more else 24, **more)
    check_states(record)
    check_gradients(gradients_record(record))


@interpreted
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"softcap": 5.0}, {"bias": True, "weighted": True}, {"bias": True, "weighted": True, "softcap": 5.0}],
    ids=["plain", "softcap", "weights", "weights-softcap"],
)
def test_losses(more: dict[str, Any], halved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows, of which the last have none that take part."""
    if halved:
        monkeypatch.setattr(call, "WHOLE_TILE", 0)
    check_loss(loss_record(states_record(50, 70, 24, ignored=0.7, **more)))


@interpreted
@pytest.mark.parametrize("more", [{}, {"softcap": 30.0, "bias": True}], ids=["plain", "softcap"])
def test_float16(more: dict[str, Any]) -> None:
    record = states_record(35, 70, 24, dtype=torch.float16, entropy=True, **more)
    check_states(record)
    check_gradients(gradients_record(record, wide=True))
    check_loss(loss_record(record))


@interpreted
def test_sums_beside_results_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bfloat16 gradients are kept. The last chunks have no row that takes part: one before writes the results."""
    monkeypatch.setattr(cross_entropy, "kept_dtype", lambda x: x.dtype)
    record = loss_record(states_record(70, 70, 24, dtype=torch.float16, bias=True, ignored=0.5))
    with gpu.recorded() as launches:
        cross_entropy.forward(record)
    products_ = [x for x in launches if x.kernel.__name__ == "weight_gradient_kernel"]
    assert [x.constants["FIRST"] for x in products_] == [True] + 4 * [False]
    assert {x.args[3].dtype for x in products_} == {torch.float32}
    check_loss(record)
    check_loss(record._replace(target=torch.full_like(record.target, formula.IGNORED), rows=record.rows * 0))


@interpreted
def test_only_what_is_wanted_is_computed() -> None:
    record = states_record(21, 40, 16, bias=True)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        names = dict(zip(("need_hidden", "need_weight", "need_bias"), needs, strict=True))
        found = logprobs.gradients(gradients_record(record, **names))
        assert [bool(x.numel()) for x in found] == list(needs)
        check_gradients(gradients_record(record)._replace(**names))
        keeps = dict(zip(("keep_input", "keep_linear_weight", "keep_linear_bias"), needs, strict=True))
        check_loss(loss_record(record, **keeps))
    loss = loss_record(record)
    plain = cross_entropy.forward(loss.without_gradients())
    for a, b in zip(plain, cross_entropy.forward(loss), strict=True):
        assert not a.numel() or torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_copy_engines_path(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last tiles that hang over, channels that do not fill the last step."""
    monkeypatch.setattr(call, "_TMA_TOKENS", 8)
    record = states_record(37, 92, 36, bias=True, transposed=layout == "columns")
    with gpu.recorded() as launches:
        logprobs.gradients(gradients_record(record))
    if call.has_copy_engine(record.weight):
        by_name = {x.kernel.__name__: x for x in launches}
        logits, of_hidden = by_name["gradients_kernel"], by_name["hidden_gradient_kernel"]
        assert logits.constants["TILE"].TMA and of_hidden.constants["TILE"].TMA
        assert (layout == "columns") == logits.constants["TILE"].TRANSPOSED
        assert logits.args[1].base.data_ptr() == of_hidden.args[2].base.data_ptr() == record.weight.data_ptr()
        turned = slice(None, None, -1 if layout == "columns" else 1)
        assert logits.args[1].block_shape == [32, 32][turned] and of_hidden.args[2].block_shape == [16, 32][turned]
        assert by_name["weight_gradient_kernel"].constants["TILE"].TMA
    check_states(record)
    check_gradients(gradients_record(record))


@interpreted
def test_tiles_shared_by_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and channels, many tokens: each program sums over some of the tokens."""
    monkeypatch.setattr(gradients, "STRIP_BYTES", 2**20)
    monkeypatch.setattr(products, "_LEAST_STEPS", 1)
    record = states_record(9, 150, 24)
    with gpu.recorded() as launches:
        logprobs.gradients(gradients_record(record))
    (launch,) = (x for x in launches if x.kernel.__name__ == "hidden_gradient_kernel")
    assert launch.grid == (6,) and launch.args[6:8] == (6, 32)  # the 6 splits' tokens
    check_gradients(gradients_record(record))
    check_loss(loss_record(record))


@interpreted
@pytest.mark.parametrize("products_tile", [(64, 16), (16, 64)])
def test_products_with_tiles_of_their_own(products_tile: tuple[int, int]) -> None:
    record = states_record(50, 70, 40, bias=True, dtype=torch.float16)
    with ExitStack() as stack:
        for op in ("linear_logprobs", "linear_cross_entropy"):
            stack.enter_context(tuning.use_config(op, "products", tuning.Config(*products_tile, 4, 1)))
        check_gradients(gradients_record(record))
        check_loss(loss_record(record))


@interpreted
def test_the_same_bits_from_any_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    record, found = states_record(35, 70, 24, **EVERYTHING), []
    for programs in (2, 7):
        monkeypatch.setattr(call, "multiprocessors", lambda device, programs=programs: programs)
        monkeypatch.setattr(products, "splits_of", lambda *_: 2)
        of_states, of_gradients = logprobs.states(record), logprobs.gradients(gradients_record(record))
        found.append((*of_states, *of_gradients, *cross_entropy.forward(loss_record(record._replace(softcap=0.0)))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Extremes.


@interpreted
def test_rows_without_finite_numbers_stay_alone() -> None:
    """NaN and inf in a row that takes part reach its own results alone; in an ignored row they reach nothing."""
    record = states_record(37, 70, 16, ignored=0.4, entropy=True, bias=True)
    target = record.target.clone()
    target[[3, 20]], target[[4, 5]] = formula.IGNORED, 7
    clean = record._replace(target=target)
    hidden = record.hidden.clone()
    hidden[3], hidden[20, 0], hidden[4], hidden[5, 1] = NAN, INF, NAN, INF
    dirty = clean._replace(hidden=hidden)
    for a, b in zip(logprobs.states(clean), logprobs.states(dirty), strict=True):
        if a.numel():
            others = [n for n in range(37) if n not in (4, 5)]
            assert torch.equal(a[:, others], b[:, others])
    assert bool(logprobs.states(dirty)[0][formula.SUM, [4, 5]].isnan().all())
    ignored = clean._replace(hidden=hidden.index_copy(0, torch.tensor([4, 5], device=DEVICE), record.hidden[4:6]))
    for a, b in zip(logprobs.gradients(gradients_record(clean)), logprobs.gradients(gradients_record(ignored))):
        assert torch.equal(a, b)
    given = loss_record(clean)
    for a, b in zip(cross_entropy.forward(given), cross_entropy.forward(given._replace(input=ignored.hidden))):
        assert torch.equal(a, b)
    of_hidden, of_weight, of_bias = logprobs.gradients(gradients_record(clean)._replace(hidden=hidden))
    finite = of_hidden.isfinite().all(1)
    assert finite.tolist() == [n not in (4, 5) for n in range(37)] and not bool(of_hidden[[4, 5]].isfinite().any())
    assert bool(of_weight.isnan().all()) and bool(of_bias.isnan().all())


@interpreted
def test_a_bias_of_minus_inf_hides_a_token() -> None:
    record = states_record(21, 70, 16, bias=True, entropy=True, best=True)
    assert record.bias is not None
    bias = record.bias.clone()
    bias[[0, 5, 69]], bias[32:64] = -INF, -INF  # a whole tile among them
    target = record.target.clone()
    target[0] = 40  # hidden
    record = record._replace(bias=bias, target=target)
    check_states(record)
    check_gradients(gradients_record(record))
    check_loss(loss_record(record._replace(target=torch.where(target == 40, 1, target)), keep_linear_bias=True))
    none = record._replace(bias=torch.full_like(bias, -INF))
    found, index = logprobs.states(none)
    assert torch.equal(index, torch.where(record.target == formula.IGNORED, -1, 0))
    found = found[:, record.target != formula.IGNORED]
    assert bool((found[formula.REFERENCE] == -INF).all()) and bool((found[formula.SUM] == 0).all())


@interpreted
@pytest.mark.parametrize("softcap", [0.0, 200.0])
def test_logits_far_apart(softcap: float) -> None:
    """Hundreds from token to token and from row to row; whole numbers, whose products are exact."""
    record = states_record(37, 70, 16, scale=40.0, softcap=softcap, entropy=True, best=not softcap)
    hidden = (record.hidden * 4).round() * (1 + torch.arange(37, device=DEVICE) % 7)[:, None]
    record = record._replace(hidden=hidden, weight=record.weight.round())
    check_states(record)
    check_gradients(gradients_record(record))
    check_loss(loss_record(record, best=not softcap))


@interpreted
def test_small_arguments_of_a_softcap() -> None:
    """tanh has a relative error of a few last digits, also near 0."""
    record = states_record(33, 64, 8, softcap=2.0, ignored=0.0)
    record = record._replace(hidden=record.hidden * torch.logspace(-9, 1, 33, device=DEVICE)[:, None])
    found = logprobs.states(record)[0][formula.PICKED].double().cpu()
    z = (record.hidden.double() @ record.weight.double().mT).cpu()
    y = 2 * torch.tanh(z / 2)
    inside = record.target.cpu() < 64
    want = y.gather(1, record.target.cpu().clamp(max=63)[:, None])[:, 0]
    units = (record.hidden.double().abs() @ record.weight.double().abs().mT).cpu().amax(1)  # what a product sums
    assert float(((found - want)[inside].abs() / units[inside]).max()) < 1e-6


@interpreted
def test_the_lowest_of_equal_logits_is_best() -> None:
    """Wherever in a tile and in which tile they stand."""
    hidden, rows = (torch.randint(-50, 51, (n, 16), generator=generator()).float().to(DEVICE) for n in (25, 7))
    record = states_record(25, 98, 16, best=True, ignored=0.0)
    record = record._replace(hidden=hidden, weight=rows.repeat(14, 1))  # whole numbers, whose products are exact
    first = formula.best_index(hidden @ rows.mT)
    states_, index = logprobs.states(record)
    assert torch.equal(index, first)
    torch.testing.assert_close(states_[formula.BEST], (record.hidden @ rows.mT).amax(1))
    check_loss(loss_record(record))


@interpreted
def test_the_gradients_of_certain_rows_are_precise() -> None:
    """Where p is 1 to within 1e-2, a float16 exponential says nothing about 1 - p: the target's logit does."""
    record = states_record(33, 70, 64, dtype=torch.float16, ignored=0.0)
    weight, hidden = record.weight * 0.05, record.hidden.float()
    weight[:33] = hidden * (10.0 / hidden.square().sum(1, keepdim=True))
    given = loss_record(record._replace(target=torch.arange(33, device=DEVICE), weight=weight))
    check_loss(given._replace(rows=given.rows * torch.tensor([[1.0], [0.0], [0.0]], device=DEVICE)))


@interpreted
def test_targets_that_are_no_token() -> None:
    record = states_record(6, 40, 8, ignored=0.0)
    target = torch.tensor([40, 41, 2**40, 2**62, 39, 0], device=DEVICE)
    found = logprobs.states(record._replace(target=target))[0]
    assert found[formula.PICKED, :4].tolist() == [-INF] * 4 and bool(found[formula.PICKED, 4:].isfinite().all())
    check_gradients(gradients_record(record._replace(target=target)))
    results = cross_entropy.forward(loss_record(record)._replace(target=target))
    assert bool(results[0].isnan()) and results[4].isnan().tolist() == [True] * 4 + [False] * 2
    assert bool(results[5].isfinite().all())


@interpreted
def test_small_gradients_of_rows_do_not_underflow() -> None:
    """In float16; a power of two changes no digit. A row whose gradient is not finite leaves the others as they are."""
    record = gradients_record(states_record(21, 40, 16, dtype=torch.float16), wide=True)
    plain = logprobs.gradients(record)[0]
    assert torch.equal(logprobs.gradients(record._replace(rows=record.rows * 2.0**-20))[0], plain * 2.0**-20)
    rows = record.rows.clone()
    rows[0, 0] = INF
    assert torch.equal(logprobs.gradients(record._replace(rows=rows))[0][2:], plain[2:])


# What is skipped.


@interpreted
def test_no_tile_without_a_row_that_takes_part_is_computed() -> None:
    record = states_record(64, 70, 16, ignored=0.0)
    target = torch.full_like(record.target, formula.IGNORED)
    target[[9, 30, 63]] = 1
    head = call.Head("linear_logprobs", record.hidden, record.weight, None, target, 0.0, 1.0)
    assert torch.equal(head.rows.order[:3].cpu(), torch.tensor([9, 30, 63])) and int(head.rows.count) == 3
    assert torch.equal(head.rows.hidden[:3, :16], record.hidden[[9, 30, 63]])
    assert not bool(head.rows.hidden[3:].any())
    kept = torch.full((64, 96), NAN, device=DEVICE)
    found = record.hidden.new_empty(6, 64)
    partials = states.add_states(head, head.all_rows, found, None, None, entropy=False, stored=Buffer(kept, 96))
    assert partials.shape == (2, 3, 64)
    assert bool(kept[:16].isfinite().all()) and bool(kept[16:].isnan().all())
    assert bool((found[:, 3:].mT == torch.tensor([0.0, 1, 0, 0, 0, 0], device=DEVICE)).all())


@interpreted
@pytest.mark.parametrize("rows", [0, 40])
def test_without_a_row_that_takes_part(rows: int) -> None:
    record = states_record(rows, 40, 8, ignored=1.0, bias=True)
    record = record._replace(target=torch.full_like(record.target, formula.IGNORED), hidden=record.hidden * NAN)
    results = cross_entropy.forward(loss_record(record))
    assert all(not bool(x.any()) for x in results[:6]) and results[2].shape == (40, 8)
    if rows:
        assert all(not bool(x.any()) for x in logprobs.gradients(gradients_record(record)))
        assert bool((lse_of(logprobs.states(record)[0]) == 0).all())


# Launches.


@interpreted
def test_parts_and_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    record = states_record(100, 200, 24, transposed=True)
    head = call.Head("linear_logprobs", record.hidden, record.weight, None, record.target, 0.0, 1.0)
    assert head.strides == (32, 1, 200)  # packed rows of whole steps; the weight's rows and channels
    assert [(x.start, x.stop) for x in head.split_rows(1, 40)] == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert [(x.start, x.stop) for x in head.split_rows(1, 64)] == [(0, 64), (64, 100)]
    assert [(x.start, x.stop) for x in head.split_tokens(1, 150)] == [(0, 128), (128, 200)]
    assert len(head.split_tokens(8, 1)) == 7 and head.width(70) == 96 and head.height(0) == 16
    assert head.grid(head.logits, 100, 200) == (6,) and head.grid(head.logits, 16, 33) == (2,)
    assert [products.splits_of(*x) for x in ((1, 132, 8), (132, 132, 8), (144, 132, 8), (1, 3, 1))] == [8, 1, 5, 1]
    assert Fields.of(moment=False, total=True, best=True) == (-1, 2, 3)


@interpreted
def test_one_chunk_where_it_takes_no_more_than_sums_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK_BYTES", 2**14)
    wanted = gradients.Wanted(torch.bfloat16, torch.bfloat16, None)

    def kept(rows: int, dtype: torch.dtype) -> stored.StoredGradients:
        hidden, weight = (torch.empty(n, 64, dtype=dtype, device=DEVICE) for n in (rows, 128))
        head = call.Head("linear_cross_entropy", hidden, weight, None, torch.zeros(rows, dtype=torch.int64), 0.0, 1.0)
        return stored.StoredGradients(head, None, wanted._replace(hidden=dtype, weight=dtype))

    with gpu.recorded():
        one, several, float32 = kept(192, torch.bfloat16), kept(256, torch.bfloat16), kept(192, torch.float32)
    assert len(one.chunks) == 1 and one.sums is None
    assert [x.stop for x in several.chunks] == [64, 128, 192, 256] and several.sums is not None
    assert several.sums.dtype == torch.float32 and several.buffer.data.shape == (64, 128)
    assert len(float32.chunks) == 6 and float32.sums is float32.of_weight
