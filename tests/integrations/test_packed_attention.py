"""Packed sequences in the attention function, and the keyword arguments that it obeys, passes over or refuses."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function

from mmkernels.integrations.transformers import NAME, counting, packed, register
from mmkernels.integrations.transformers.attention import attention
from mmkernels.integrations.transformers.keywords import REFUSED, WITHOUT_EFFECT
from mmkernels.integrations.transformers.masks import make_mask
from mmkernels.testing.families import FAMILIES

H, D = 2, 8


def module(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


MODULE = module(is_causal=False)
LENGTHS = [3, 0, 1, 4]


def ends(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def draw(length: int, heads: int = H) -> Tensor:
    return torch.randn(1, heads, length, D, dtype=torch.float64, requires_grad=True)


def given(name: str, value: Any) -> dict[str, Any]:
    return {name: value}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, k_lengths: list[int], causal: bool = False) -> Tensor:
    """Attention of each sequence alone, by the formula. [1, Lq, H, D]"""
    outs = []
    parts = (query.split(LENGTHS, 2), key.split(k_lengths, 2), value.split(k_lengths, 2))
    for q, k, v in zip(*parts, strict=True):
        scores = q @ k.mT / D**0.5
        if causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            scores = scores.masked_fill(~visible, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(1, 2))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("k_lengths", [LENGTHS, [5, 1, 1, 6]], ids=["self", "more keys"])
def test_each_sequence_sees_itself_alone(k_lengths: list[int], is_causal: bool, dtype: torch.dtype) -> None:
    query, key, value = draw(8), draw(sum(k_lengths)), draw(sum(k_lengths))
    q, k = ends(LENGTHS, dtype), ends(k_lengths, dtype)
    with counting() as calls:
        out, weights = attention(
            MODULE, query, key, value, None, is_causal=is_causal, cu_seq_lens_q=q, cu_seq_lens_k=k, max_length_q=4
        )
    truth = one_by_one(query, key, value, k_lengths, is_causal)
    torch.testing.assert_close(out, truth)
    assert weights is None and calls.spans == calls.total == 1
    leaves = [query, key, value]
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), leaves), torch.autograd.grad(truth.sin().sum(), leaves)
    )


def test_without_a_word_the_module_says_whether_packed_sequences_are_causal() -> None:
    query, key, value = draw(8), draw(8), draw(8)
    packs: dict[str, Any] = {"cu_seq_lens_q": ends(LENGTHS), "cu_seq_lens_k": ends(LENGTHS)}
    for is_causal in (False, True):
        out, _ = attention(module(is_causal=is_causal), query, key, value, None, **packs)
        torch.testing.assert_close(out, one_by_one(query, key, value, LENGTHS, is_causal))
    with pytest.raises(NotImplementedError, match="packs sequences and does not say whether they are causal"):
        attention(module(), query, key, value, None, **packs)


@pytest.mark.parametrize("kind", ["spans", "omitted", "matrix", "bias", "holes"])
def test_a_mask_beside_packed_sequences_hides_too(kind: str) -> None:
    query, key, value = draw(8), draw(8), draw(8)
    block = torch.block_diag(*[torch.ones(n, n) for n in LENGTHS]).bool()
    lower = torch.ones(8, 8, dtype=torch.bool).tril()
    holes = lower & (torch.arange(8)[:, None] != torch.arange(8) + 2)
    bias = torch.randn(8, 8, dtype=torch.float64)
    cases: dict[str, tuple[Any, Tensor, Any]] = {
        "spans": (make_mask(1, 8, 8), lower, 0.0),
        "omitted": (
            make_mask(1, 8, 8, mask_function=bidirectional_mask_function, allow_is_bidirectional_skip=True),
            block,
            0.0,
        ),
        "matrix": (lower[None, None], lower, 0.0),
        "bias": (bias[None, None], block, bias),
        "holes": (holes[None, None], holes, 0.0),
    }
    mask, shown, added = cases[kind]
    out, _ = attention(MODULE, query, key, value, mask, cu_seq_lens_q=ends(LENGTHS), cu_seq_lens_k=ends(LENGTHS))
    scores = (query @ key.mT / D**0.5 + added).masked_fill(~(block & shown), -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ value).transpose(1, 2))


def test_the_sequences_are_read_once_for_all_layers_and_again_when_they_change() -> None:
    query, key, value = draw(8), draw(8), draw(8)
    q = ends(LENGTHS)
    with counting() as calls:
        for _layer in range(3):
            attention(MODULE, query, key, value, None, cu_seq_lens_q=q, cu_seq_lens_k=q)
        assert calls.conversions == 1
        q[1:4] = 5
        out, _ = attention(MODULE, query, key, value, None, cu_seq_lens_q=q, cu_seq_lens_k=q)
        assert calls.conversions == 2
    query, key, value = (x[:, :, :5] for x in (query, key, value))  # the changed sequences: 5 tokens, none, none, 3
    torch.testing.assert_close(out[:, :5], attention(MODULE, query, key, value, None)[0])


def test_the_cache_lets_go_of_the_tensors() -> None:
    q = ends(LENGTHS)
    reference = weakref.ref(q)
    attention(MODULE, draw(8), draw(8), draw(8), None, cu_seq_lens_q=q, cu_seq_lens_k=q)
    assert len(packed._spans) >= 1
    del q
    gc.collect()
    assert reference() is None


def test_sequences_read_for_inference_serve_training() -> None:
    query, key, value = draw(8), draw(8), draw(8)
    q = ends(LENGTHS)
    with torch.inference_mode():
        attention(MODULE, query, key, value, None, cu_seq_lens_q=q, cu_seq_lens_k=q)
        made = ends(LENGTHS)
        attention(MODULE, query, key, value, None, cu_seq_lens_q=made, cu_seq_lens_k=made)
    attention(MODULE, query, key, value, None, cu_seq_lens_q=q, cu_seq_lens_k=q)[0].sum().backward()
    assert query.grad is not None


def test_a_compiled_graph_packs() -> None:
    torch._dynamo.reset()
    query, key, value = draw(8), draw(8), draw(8)
    call = torch.compile(attention, backend="eager", fullgraph=True)
    for lengths in (LENGTHS, [1, 1, 4, 2]):
        q = ends(lengths)
        packs: dict[str, Any] = {"cu_seq_lens_q": q, "cu_seq_lens_k": q, "is_causal": False}
        torch.testing.assert_close(
            call(torch.nn.Identity(), query, key, value, None, **packs)[0],
            attention(MODULE, query, key, value, None, **packs)[0],
        )


def test_on_meta_tensors_nothing_is_looked_at() -> None:
    query, key, value = (draw(8).to("meta") for _ in range(3))
    q = ends(LENGTHS).to("meta")
    out, _ = attention(MODULE, query, key, value, None, cu_seq_lens_q=q, cu_seq_lens_k=q)
    assert out.shape == (1, 8, H, D)


def test_text_that_the_caller_packed_is_kept_apart() -> None:
    """With a mask of its own, transformers does not look at the positions; only ``cu_seq_lens`` separates the texts."""
    register()
    model = FAMILIES["llama"].build()[0].double()
    model.set_attn_implementation(NAME)
    ids = torch.randint(5, 60, (1, 8))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    q = ends(LENGTHS)
    packs: dict[str, Any] = {"cu_seq_lens_q": q, "cu_seq_lens_k": q, "max_length_q": 4, "max_length_k": 4}
    with torch.no_grad():
        logits = model(
            ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False, labels=ids,
            num_items_in_batch=torch.tensor(7), **packs,
        ).logits  # fmt: skip
        for part, start in zip(ids.split(LENGTHS, 1), q.tolist(), strict=False):
            if part.shape[1]:
                torch.testing.assert_close(logits[:, start : start + part.shape[1]], model(part).logits)
        together = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(together, logits)


# Bad input.


@pytest.mark.parametrize(
    ("q", "k", "error", "message"),
    [
        (ends(LENGTHS), None, TypeError, "cu_seq_lens_k must be an int32 or int64 tensor, .* got NoneType"),
        (None, ends(LENGTHS), TypeError, "cu_seq_lens_q must be an int32 or int64 tensor, .* got NoneType"),
        ([0, 8], ends([8]), TypeError, "cu_seq_lens_q must be an int32 or int64 tensor, .* got list"),
        (ends([8]).float(), ends([8]), TypeError, r"cu_seq_lens_q must be .* got torch\.float32"),
        (ends([8])[None], ends([8]), ValueError, r"cu_seq_lens_q must be \[sequences \+ 1\], got shape \(1, 2\)"),
        (ends([8]), ends([3, 5]), ValueError, r"must have the shape of cu_seq_lens_q, \(2,\), got \(3,\)"),
        (ends([7]), ends([7]), ValueError, r"cu_seq_lens_q must rise from 0 to the 8 tokens of the row, got \[0, 7\]"),
        (ends([8]), ends([9]), ValueError, "cu_seq_lens_k must rise from 0 to the 8 tokens"),
        (ends([9, -1]), ends([8, 0]), ValueError, "cu_seq_lens_q must rise from 0"),
        (ends([8]) + 1, ends([8]), ValueError, "cu_seq_lens_q must rise from 0"),
    ],
)
def test_sequences_that_are_none(q: Any, k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(MODULE, draw(8), draw(8), draw(8), None, cu_seq_lens_q=q, cu_seq_lens_k=k)


def test_packed_sequences_in_several_rows_are_refused() -> None:
    rows = torch.randn(2, H, 4, D)
    with pytest.raises(NotImplementedError, match="in one row, got 2 rows from SimpleNamespace"):
        attention(MODULE, rows, rows, rows, None, cu_seq_lens_q=ends([8]), cu_seq_lens_k=ends([8]))


def test_every_other_keyword_is_refused_and_none_is_not_given() -> None:
    query, key, value = draw(8), draw(8), draw(8)
    mask = make_mask(1, 8, 8)
    plain, _ = attention(MODULE, query, key, value, mask)
    for name in WITHOUT_EFFECT:
        assert torch.equal(attention(MODULE, query, key, value, mask, **given(name, 3))[0], plain), name
    for name in (*REFUSED, "some_new_argument", "seq_idx"):
        assert torch.equal(attention(MODULE, query, key, value, mask, **given(name, None))[0], plain), name
        with pytest.raises(NotImplementedError, match=name):
            attention(MODULE, query, key, value, mask, **given(name, 3))
    with pytest.raises(NotImplementedError, match="SimpleNamespace: it passes some_new_argument=3, which mmkernels"):
        attention(MODULE, query, key, value, mask, some_new_argument=3)


def test_what_only_flash_attention_obeys_is_refused_beside_packed_sequences() -> None:
    query, key, value = draw(8), draw(8), draw(8)
    packs: dict[str, Any] = {"cu_seq_lens_q": ends(LENGTHS), "cu_seq_lens_k": ends(LENGTHS)}
    with pytest.raises(NotImplementedError, match="sliding_window=3"):
        attention(MODULE, query, key, value, None, sliding_window=3, **packs)
    attention(MODULE, query, key, value, None, seq_idx=torch.zeros(1, 8), **packs)
