"""The attention function that transformers calls in each layer, against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from threads import in_threads
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from mmkernels.integrations.transformers import NAME, counting, register
from mmkernels.integrations.transformers.attention import attention
from mmkernels.integrations.transformers.masks import make_mask

B, H, L, D = 2, 4, 6, 8
MODULE: Any = SimpleNamespace(is_causal=False)
CAUSAL: Any = SimpleNamespace(is_causal=True)
UNKNOWN: Any = SimpleNamespace()
LOWEST = torch.finfo(torch.float64).min


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def inputs(k_len: int = L, kv_heads: int = H, q_batch: int = B, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    keys = (B, kv_heads, k_len, D)
    return draw(q_batch, H, L, D, grad=grad), draw(*keys, grad=grad), draw(*keys, grad=grad)


def formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(query key' / sqrt(D) + bias), with one more score for each query if there is a sink."""
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT / D**0.5 + bias
    if sink is not None:
        scores = torch.cat([scores, sink.reshape(1, H, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].nan_to_num(0.0)
    return (weights @ value).transpose(1, 2), weights


def hidden(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, -torch.inf).to(torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


LOWER = torch.ones(L, L, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("module", "is_causal", "k_len", "bias"),
    [
        (MODULE, None, L, torch.zeros(L, L)),
        (MODULE, True, L, hidden(LOWER)),
        (UNKNOWN, True, L, hidden(LOWER)),
        (CAUSAL, False, L, torch.zeros(L, L)),
        # more keys than queries, as in an empty static cache: causal from the first key on
        (CAUSAL, True, L + 3, hidden(torch.ones(L, L + 3, dtype=torch.bool).tril())),
    ],
)
def test_without_a_mask_the_call_says_whether_it_is_causal(
    module: Any, is_causal: bool | None, k_len: int, bias: Tensor
) -> None:
    query, key, value = inputs(k_len)
    out, weights = attention(module, query, key, value, None, is_causal=is_causal)
    torch.testing.assert_close(out, formula(query, key, value, bias)[0])
    assert weights is None and out.is_contiguous() and out.shape == (B, L, H, D)


@pytest.mark.parametrize("module", [UNKNOWN, CAUSAL])
def test_without_a_mask_a_module_that_may_be_causal_is_refused(module: Any) -> None:
    """transformers' "sdpa" takes it for causal, its "eager" for not: BridgeTower's cross-modal layers of images."""
    query, key, value = inputs()
    with pytest.raises(NotImplementedError, match=r"SimpleNamespace: it passes neither a mask nor `is_causal`"):
        attention(module, query, key, value, None)
    for is_causal, mask in ((False, None), (True, None), (None, make_mask(B, L, L))):
        attention(module, query, key, value, mask, is_causal=is_causal)


@pytest.mark.parametrize("q_len", [L, L + 5])
def test_a_mask_that_eager_leaves_out_needs_no_word_of_the_module_and_no_size(q_len: int) -> None:
    """BLIP-2 makes its mask for queries and text, and gives it to the attention of the queries alone."""
    query, key, value = inputs()
    both_ways = masking_utils.bidirectional_mask_function
    mask = make_mask(B, q_len, L, mask_function=both_ways, allow_is_bidirectional_skip=True)
    for module in (UNKNOWN, CAUSAL):
        torch.testing.assert_close(attention(module, query, key, value, mask)[0], formula(query, key, value)[0])


def test_a_mask_of_one_new_token_is_for_its_keys_alone() -> None:
    """DeepSeek-V4 adds keys of its own, of which some are hidden."""
    query, key, value = inputs()
    mask = make_mask(B, 1, L - 2, q_offset=L - 3)
    with pytest.raises(NotImplementedError, match="its mask was made for"):
        attention(CAUSAL, query[:, :, :1], key, value, mask)


def test_one_query_sees_every_key() -> None:
    query, key, value = inputs()
    out, _ = attention(CAUSAL, query[:, :, :1], key, value, None)
    torch.testing.assert_close(out, formula(query[:, :, :1], key, value)[0])


def test_grouped_queries_scaling_and_learned_queries() -> None:
    query, key, value = inputs(kv_heads=2, q_batch=1)
    out, _ = attention(MODULE, query, key, value, None, scaling=1.0)
    torch.testing.assert_close(out, formula(query.expand(B, -1, -1, -1) * D**0.5, key, value)[0])


VISIBLE = {
    "padding": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()[:, None, None].expand(B, 1, L, L),
    "causal": LOWER.expand(B, 1, L, L),
    "images": torch.block_diag(*[torch.ones(2, 2)] * 3).bool()[None, None],
    "holes": (torch.arange(L)[:, None] != torch.arange(L)).expand(1, 1, L, L),
    "by head": torch.rand(1, H, L, L, generator=torch.Generator().manual_seed(1)) < 0.7,
    "nothing hidden": torch.ones(1, 1, L, L, dtype=torch.bool),
    "everything hidden for some": torch.tensor([0, 1, 1, 0, 1, 1]).bool()[None, None, :, None].expand(1, 1, L, L),
}
KINDS = {"holes": "dense", "by head": "dense", "nothing hidden": "unmasked"}  # of attention calls; the others: spans


@pytest.mark.parametrize("written", ["bool", "lowest", "-inf", "twice the lowest"])
@pytest.mark.parametrize("name", VISIBLE)
def test_a_models_own_matrix(name: str, written: str) -> None:
    """It is read once, as spans if possible; numbers that mean "hidden" are no bias."""
    visible, (query, key, value) = VISIBLE[name], inputs()
    mask: Tensor = visible
    if written != "bool":
        number = {"lowest": LOWEST, "-inf": -torch.inf, "twice the lowest": LOWEST * 2}[written]
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, number)
    with counting() as calls:
        for _layer in range(3):
            out, _ = attention(MODULE, query, key, value, mask)
    torch.testing.assert_close(out, formula(query, key, value, hidden(visible))[0])
    assert getattr(calls, KINDS.get(name, "spans")) == calls.total == 3
    assert calls.conversions == 1


def test_other_numbers_are_a_bias() -> None:
    query, key, value = inputs()
    alibi = -torch.arange(L).sub(torch.arange(L)[:, None]).abs().to(torch.float64).expand(1, H, L, L)
    with counting() as calls:
        out, _ = attention(MODULE, query, key, value, alibi)
    torch.testing.assert_close(out, formula(query, key, value, alibi)[0])
    assert calls.bias == calls.total == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_that_hide_among_others(compiled: bool) -> None:
    """A matrix may contain both. A row that is hidden completely gives 0, as with a mask; NaN does not hide."""
    torch._dynamo.reset()
    call = torch.compile(attention, backend="eager", fullgraph=True) if compiled else attention
    query, key, value = inputs()
    numbers = draw(B, H, L, L)
    matrix = numbers.masked_fill(~LOWER, LOWEST)
    matrix[:, :, 2] = LOWEST
    out, _ = call(torch.nn.Identity(), query, key, value, matrix)
    truth = formula(query, key, value, numbers + hidden(LOWER))[0]
    truth[:, 2] = 0.0
    torch.testing.assert_close(out, truth)
    matrix[0, 0, 4, 1] = torch.nan
    out, _ = call(torch.nn.Identity(), query, key, value, matrix)
    assert out[0, 4, 0].isnan().all() and out.isnan().sum() == D


def test_a_trained_bias_gets_its_gradient() -> None:
    query, key, value = inputs()
    bias = draw(1, H, L, L, grad=True)
    position = draw(1, H, L, L, grad=True)
    attention(MODULE, query, key, value, bias, position_bias=position)[0].sin().sum().backward()
    other = bias.detach() + position.detach()
    other.requires_grad_()
    formula(query, key, value, other)[0].sin().sum().backward()
    torch.testing.assert_close(bias.grad, other.grad)
    torch.testing.assert_close(position.grad, other.grad)


@pytest.mark.parametrize("inference", [False, True])
def test_a_matrix_changed_in_place_is_read_again(inference: bool) -> None:
    query, key, value = inputs()
    with torch.inference_mode(inference):
        mask = hidden(VISIBLE["causal"].clone())
        with counting() as calls:
            attention(MODULE, query, key, value, mask)
            mask.zero_()
            out, _ = attention(MODULE, query, key, value, mask)
        torch.testing.assert_close(out, formula(query, key, value)[0])
        assert (calls.spans, calls.unmasked, calls.conversions) == (1, 1, 2)


@pytest.mark.parametrize("name", ["padding", "holes"])
@pytest.mark.parametrize("written", ["bool", "numbers", "bias"])
def test_a_matrix_read_for_inference_serves_training(name: str, written: str) -> None:
    visible = VISIBLE[name]
    mask = {"bool": visible.clone(), "numbers": hidden(visible), "bias": hidden(visible) + 0.5}[written]
    query, key, value = inputs()
    with torch.inference_mode():
        attention(MODULE, query, key, value, mask)
    query.requires_grad_()
    attention(MODULE, query, key, value, mask)[0].sum().backward()
    assert query.grad is not None


def test_a_matrix_serves_queries_of_several_dtypes_and_is_saved_as_it_was(tmp_path: Path) -> None:
    query, key, value = inputs()
    bias = draw(B, H, L, L)
    attention(MODULE, *(x.bfloat16() for x in (query, key, value)), bias)
    torch.testing.assert_close(attention(MODULE, query, key, value, bias)[0], formula(query, key, value, bias)[0])
    torch.save(bias, tmp_path / "bias.pt")
    assert torch.equal(torch.load(tmp_path / "bias.pt"), bias)


def test_no_queries_and_a_matrix() -> None:
    query, key, value = inputs()
    out, _ = attention(MODULE, query[:, :, :0], key, value, torch.zeros(B, 1, 0, L))
    assert out.shape == (B, 0, H, D)


def test_position_bias_with_spans() -> None:
    query, key, value = inputs()
    position = draw(1, H, L, L)
    out, _ = attention(MODULE, query, key, value, make_mask(B, L, L), position_bias=position)
    torch.testing.assert_close(out, formula(query, key, value, position + hidden(LOWER))[0])


def check(ours: tuple[Any, ...], truth: tuple[Any, ...], leaves: list[Tensor]) -> None:
    """Compares outputs, weights and their gradients."""
    torch.testing.assert_close(ours, truth)
    losses = [(out * out).sum() + weights.sin().sum() for out, weights in (ours, truth)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


def test_sinks_and_their_gradient() -> None:
    query, key, value = inputs(kv_heads=2, grad=True)
    sink = draw(H, grad=True)
    ours = attention(MODULE, query, key, value, make_mask(B, L, L), s_aux=sink, output_attentions=True)
    check(ours, formula(query, key, value, hidden(LOWER), sink), [query, key, value, sink])


@pytest.mark.parametrize("grad", [False, True])
def test_weights_are_the_probabilities(grad: bool) -> None:
    query, key, value = inputs(kv_heads=2, grad=grad)
    ours = attention(MODULE, query, key, value, make_mask(B, L, L), output_attentions=True)
    truth = formula(query, key, value, hidden(LOWER))
    torch.testing.assert_close(ours, truth)
    assert ours[1].requires_grad == grad
    if grad:
        check(ours, truth, [query, key, value])
    narrow = (x.bfloat16() for x in (query, key, value))
    assert attention(MODULE, *narrow, None, output_attentions=True)[1].dtype == torch.bfloat16


def test_dropout_drops() -> None:
    query, key, _ = inputs()
    ones = torch.ones(B, H, L, D, dtype=torch.float64)
    torch.manual_seed(1)
    out, _ = attention(MODULE, query, key, ones, None, dropout=0.5)
    torch.manual_seed(1)
    again, _ = attention(MODULE, query, key, ones, None, dropout=0.5)
    assert torch.equal(out, again) and out.std() > 0.1
    torch.testing.assert_close(attention(MODULE, query, key, ones, None, dropout=0.0)[0], torch.ones_like(out))


# Bad input.


@pytest.mark.parametrize("name", ["softcap", "cache", "indices", "block_indices", "sinks"])
def test_arguments_that_would_change_the_result_are_refused(name: str) -> None:
    query, key, value = inputs()
    with pytest.raises(NotImplementedError, match=rf"has no .* \({name}\), which SimpleNamespace needs"):
        attention(MODULE, query, key, value, None, **{name: torch.ones(1)})
    attention(MODULE, query, key, value, None, **{name: None}, sliding_window=3, position_ids=torch.arange(L))


def test_masks_of_a_wrong_kind() -> None:
    query, key, value = inputs()
    with pytest.raises(TypeError, match=r"attention_mask must be bool or a floating dtype, got torch\.int64"):
        attention(MODULE, query, key, value, torch.ones(B, 1, L, L, dtype=torch.int64))
    with pytest.raises(TypeError, match="attention_mask must be a tensor, None or made for 'mmkernels', got list"):
        attention(MODULE, query, key, value, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must broadcast to"):
        attention(MODULE, query, key, value, torch.zeros(B, H, L, L + 1) - 0.5)
    for batch, q_len, k_len in ((B, L + 1, L), (B, L, L + 2), (B + 1, L, L)):
        made, scores = rf"\[{batch}, 1, {q_len}, {k_len}\]", r"\[2, 4, 6, 6\]"
        refused = rf"SimpleNamespace: its mask was made for {made} and its scores are {scores}"
        with pytest.raises(NotImplementedError, match=refused):
            attention(MODULE, query, key, value, make_mask(batch, q_len, k_len))


def test_meta_tensors_have_shapes() -> None:
    query, key, value = (x.to("meta") for x in inputs())
    for mask in (None, make_mask(B, L, L, device="meta"), VISIBLE["holes"].to("meta"), hidden(LOWER).to("meta")):
        out, weights = attention(MODULE, query, key, value, mask, output_attentions=True)
        assert out.shape == (B, L, H, D) and weights is not None and weights.shape == (B, H, L, L)


def test_threads_count_separately_and_agree() -> None:
    query, key, value = inputs()
    masks = [make_mask(B, L, L), hidden(VISIBLE["images"])]
    truth = [attention(MODULE, query, key, value, mask)[0] for mask in masks]
    results: list[tuple[bool, int]] = []

    def work(number: int) -> None:
        with counting() as calls:
            outs = [attention(MODULE, query, key, value, masks[number % 2])[0] for _ in range(50)]
        results.append((all(torch.equal(out, truth[number % 2]) for out in outs), calls.total))

    in_threads(4, work)
    assert results == [(True, 50)] * 4


# Registering.


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        interface._global_mapping.pop(NAME, None)


@pytest.mark.usefixtures("clean")
class TestRegister:
    def test_twice_is_once(self) -> None:
        register()
        before = AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]
        register()
        assert before == (AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME])
        assert before == (attention, make_mask)

    def test_a_registered_name_is_not_replaced(self) -> None:
        AttentionInterface.register(NAME, torch.nn.functional.relu)
        with pytest.raises(ValueError, match=r"AttentionInterface already has another 'mmkernels'.*relu"):
            register()

    def test_from_two_threads(self) -> None:
        in_threads(8, lambda number: register())
        assert AttentionInterface._global_mapping[NAME] is attention

    @pytest.mark.parametrize("moved", ["name", "argument", "module"])
    def test_an_interface_that_moved_is_an_import_error(self, moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if moved == "name":
            monkeypatch.delattr(transformers.modeling_utils.AttentionInterface, "_global_mapping")
        elif moved == "argument":
            other = lambda layer, q, k, v, mask: None
            monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", other)
        else:
            monkeypatch.delattr(masking_utils, "causal_mask_function")
        with pytest.raises(ImportError, match=r"transformers .* has another attention interface"):
            register()

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
        with pytest.raises(ImportError, match=r'pip install "mmkernels\[models\]"'):
            register()
