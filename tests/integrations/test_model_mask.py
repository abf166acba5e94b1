"""What models do with a mask beside passing it to their attention: understood, or refused; never misread."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from mmkernels.integrations.transformers import counting, register
from mmkernels.integrations.transformers.model_mask import ModelMask, Visible
from mmkernels.masks import SpanMask

SHAPE = (2, 1, 3, 4)
TRUTH = SpanMask.causal(3, 4).to_dense(4).expand(SHAPE)
OTHER = torch.eye(3, 4).bool()
SCORES = torch.randn(2, 2, 3, 4)

MASKS: dict[str, tuple[Visible, Tensor]] = {
    "spans": (SpanMask.causal(3, 4), TRUTH),
    "matrix": (TRUTH[:1], TRUTH),
    "everything": (None, torch.ones(SHAPE, dtype=torch.bool)),
}


@pytest.fixture(params=MASKS)
def pair(request: pytest.FixtureRequest) -> tuple[ModelMask, Tensor]:
    visible, truth = MASKS[request.param]
    return ModelMask(visible, SHAPE, "cpu"), truth


def test_looks_like_the_matrix(pair: tuple[ModelMask, Tensor]) -> None:
    mask, truth = pair
    assert (mask.shape, mask.ndim, mask.dim(), len(mask)) == (truth.shape, 4, 4, 2)
    assert (mask.size(-1), mask.dtype, mask.device) == (4, torch.bool, torch.device("cpu"))
    assert mask.size() == truth.shape and not mask.requires_grad
    assert hasattr(mask, "to") and not hasattr(mask, "__array__") and not hasattr(mask, "nothing")
    assert copy.copy(mask).shape == mask.shape and {mask: 1}[mask] == 1


@pytest.mark.parametrize("name", ["contiguous", "clone", "detach", "to", "type_as"])
def test_copies_stay_as_they_are(pair: tuple[ModelMask, Tensor], name: str) -> None:
    arguments = {"to": (torch.float32,), "type_as": (SCORES,)}.get(name, ())
    with counting() as calls:
        assert getattr(pair[0], name)(*arguments) is pair[0]
        assert pair[0].to("cpu", torch.bfloat16) is pair[0]
    assert not calls.reasons


def test_moves(pair: tuple[ModelMask, Tensor]) -> None:
    for moved in (pair[0].to(device="meta"), pair[0].to(SCORES.to("meta"))):
        assert isinstance(moved, ModelMask) and moved.device.type == "meta"


CUTS: dict[str, Callable[[Any], Any]] = {
    "slice": lambda x: x[:, :, 1:, :2],
    "None": lambda x: x[:, 0, None],
    "expand": lambda x: x.expand(2, 2, 3, 4),
    "squeeze": lambda x: x.squeeze(1).unsqueeze(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "rows": lambda x: torch.repeat_interleave(x, 2, dim=0),
    "transpose": lambda x: x.transpose(2, 3),
    "cat": lambda x: torch.cat([x, x], dim=-1),
    "chunk": lambda x: x.chunk(2, dim=-1)[1],
}


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_cut_out_of_a_mask_is_a_mask(pair: tuple[ModelMask, Tensor], cut: str) -> None:
    mask, truth = pair
    with counting() as calls:
        out = CUTS[cut](mask)
    assert calls.reasons["the model changes the mask itself"] >= 1
    assert isinstance(out, ModelMask) and out.shape == CUTS[cut](truth).shape
    assert torch.equal(out.dense(), CUTS[cut](truth))
    with pytest.raises(NotImplementedError, match="changes or applies the attention mask itself"):
        _ = torch.zeros(1) + out


AS_BOOL: dict[str, Callable[[Any], Tensor]] = {
    "not": lambda x: ~x,
    "and": lambda x: x & OTHER,
    "or": lambda x: OTHER | x,
    "where": lambda x: torch.where(x, 0.0, -1e9),
    "fill": lambda x: SCORES.masked_fill(~x, -1e9),
    "fill by it": lambda x: SCORES.masked_fill(x, -1e9),
    "sdpa": lambda x: F.scaled_dot_product_attention(SCORES, SCORES.mT @ SCORES, SCORES.mT @ SCORES, attn_mask=x),
}


@pytest.mark.parametrize("use", AS_BOOL)
def test_where_pytorch_takes_no_numbers_it_is_a_bool(pair: tuple[ModelMask, Tensor], use: str) -> None:
    out = AS_BOOL[use](pair[0])
    assert type(out) is Tensor and torch.equal(out, AS_BOOL[use](pair[1]))


MISREAD: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: SCORES + x,
    "added": lambda x: x + SCORES,
    "in place": lambda x: SCORES.clone().add_(x),
    "torch.add": lambda x: torch.add(SCORES, x),
    "subtract": lambda x: 1.0 - x,
    "multiply": lambda x: SCORES * x,
    "product": lambda x: x @ SCORES.mT,
    "equal": lambda x: x == 0,
    "unequal": lambda x: x != 0,
    "below": lambda x: x < 0,
    "float": lambda x: x.float(),
    "bool": lambda x: x.bool(),
    "to bool": lambda x: x.to(torch.bool),
    "to bool by name": lambda x: x.to(device="cpu", dtype=torch.bool),
    "fill it": lambda x: x.masked_fill(OTHER, -1e9),
    "choose it": lambda x: torch.where(OTHER, x, False),
    "pad": lambda x: F.pad(x, (0, 2), value=0.0),
    "lengthen": lambda x: torch.cat([x, torch.zeros(SHAPE).bool()], -1),
    "zeros": lambda x: torch.zeros_like(x),
    "new": lambda x: x.new_zeros(2),
    "logical_not": lambda x: x.logical_not(),
    "all": lambda x: x.all(),
    "sum": lambda x: torch.sum(x),
    "branch": lambda x: 1 if x else 0,
    "write": lambda x: x.__setitem__(0, True),
    "negative": lambda x: -x,
    "torch's attention": lambda x: torch.nn.MultiheadAttention(4, 1)(*[torch.zeros(3, 2, 4)] * 3, attn_mask=x),
}


@pytest.mark.parametrize("use", MISREAD)
def test_where_a_bool_would_be_misread_it_is_refused(pair: tuple[ModelMask, Tensor], use: str) -> None:
    for mask in (pair[0], pair[0][:, :, :2]) if use == "add" else pair[:1]:
        with pytest.raises(NotImplementedError, match=r'changes or applies .*use attn_implementation="eager" there'):
            MISREAD[use](mask)


class _Config(transformers.PreTrainedConfig):
    model_type = "of_the_hub"
    hidden_size, num_attention_heads, num_hidden_layers, vocab_size = 32, 4, 1, 50


Apply = Callable[[Tensor, Any], Tensor]

OWN: dict[str, tuple[Any, Apply]] = {
    "adds": (create_causal_mask, lambda scores, mask: scores + mask),
    "cuts and adds": (create_causal_mask, lambda scores, mask: scores + mask[:, :, :, : scores.shape[-1]]),
    "adds if there is one": (create_causal_mask, lambda scores, mask: scores if mask is None else scores + mask),
    "moves and adds": (create_causal_mask, lambda scores, mask: scores + mask.to(scores.device).to(scores.dtype)),
    "compares": (create_causal_mask, lambda scores, mask: scores.masked_fill(mask != 0, -1e9)),
    "hides what is not 0": (create_causal_mask, lambda scores, mask: scores.masked_fill(mask.bool(), -1e9)),
    "multiplies": (create_causal_mask, lambda scores, mask: scores.exp() * (mask + 1).clamp(min=0)),
    "pads": (create_causal_mask, lambda scores, mask: scores + F.pad(mask, (0, 0))),
    "both ways": (create_bidirectional_mask, lambda scores, mask: scores if mask is None else scores + mask),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use", OWN)
def test_a_model_with_an_attention_of_its_own_is_equal_to_eager_or_refused(use: str, padded: bool) -> None:
    """A model of the hub's kind: it makes its mask by transformers' function and applies it itself."""
    register()
    make, apply = OWN[use]

    class Model(transformers.PreTrainedModel):
        config_class = _Config

        def __init__(self, config: _Config) -> None:
            super().__init__(config)
            self.embed, self.qkv = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 96)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            no_cache = (None,) if make is create_causal_mask else ()
            mask = make(self.config, x, attention_mask, *no_cache)
            query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            scores: Tensor = query @ key.mT
            return apply(scores, mask).softmax(-1) @ value

    ids, padding = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padding[0, 6:] = 0
    model = Model._from_config(_Config(), attn_implementation="eager")
    expected = model(ids, padding if padded else None)
    assert expected.isfinite().all()
    ours = Model._from_config(_Config(), attn_implementation="mmkernels")
    with pytest.raises(NotImplementedError, match=r"the attention mask itself .*use attn_implementation"):
        ours(ids, padding if padded else None)
