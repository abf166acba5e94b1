"""diffusers on our attention: its own processors' results, masks that its fast backends refuse, its dispatcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations.dense_mask import read_mask
from mmkernels.integrations.diffusers import AttnProcessor, JointAttnProcessor, attention, register, set_attention
from mmkernels.masks import SpanMask

LEAST = torch.finfo(torch.float32).min
needs_diffusers = pytest.mark.integration("diffusers")


def bias_of(visible: Tensor, hides: float) -> Tensor:
    """Returns a bool mask as numbers that are added to the scores."""
    return (~visible).float() * hides


def per_sample() -> Tensor:
    """Returns what 2 prompts of 9 tokens show, bool ``[2, 1, 1, 9]``."""
    return (torch.arange(9) < torch.tensor([[4], [9]]))[:, None, None]


def per_query() -> Tensor:
    """Returns a mask in which each of 6 queries has keys of its own, bool ``[2, 1, 6, 9]``; one has holes."""
    visible = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(5)) < 0.5
    visible[..., 2] = True
    return visible


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "per sample, bool": per_sample,
    "per sample, -10000": lambda: bias_of(per_sample(), -10000.0),
    "per query, bool": per_query,
    "per query, least": lambda: bias_of(per_query(), LEAST),
    "a bias": lambda: torch.randn(1, 3, 6, 9, generator=torch.Generator().manual_seed(2)),
    "a bias and a mask": lambda: torch.randn(2, 1, 6, 9).where(per_query(), -10000.0),
    "all hidden alike": lambda: torch.full((2, 1, 6, 9), -10000.0),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_against_sdpa(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 3, 8, generator=generator)
    key, value = (torch.randn(2, 9, 3, 8, generator=generator) for _ in range(2))
    mask = MASKS[name]()
    theirs = None if name == "all hidden alike" else mask  # what is added to all scores only costs them digits
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = attention(query, key, value, attn_mask=mask)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), attn_mask=theirs).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    found = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_takes_what_the_dispatcher_passes() -> None:
    query, key = torch.randn(2, 6, 4, 8), torch.randn(2, 9, 2, 8)
    visible = per_sample()
    two = attention(query, key, key, attn_mask=visible[:, 0, 0], scale=0.2)  # [B, Lk]
    four = attention(query, key, key, attn_mask=visible, scale=0.2, enable_gqa=True)
    three = attention(query, key, key, attn_mask=visible[0, 0], scale=0.2)  # [1, Lk], as the first sample's
    assert torch.equal(two, four) and torch.equal(three[0], four[0])
    out, lse = attention(query, key, key, return_lse=True)
    assert out.shape == query.shape and lse.shape == (2, 6, 4)
    causal = attention(query, query, query, is_causal=True)
    expected = F.scaled_dot_product_attention(*[query.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(causal, expected, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="attn_mask must be None where is_causal is True"):
        attention(query, query, query, attn_mask=visible, is_causal=True)
    with pytest.raises(ValueError, match="must be used without context parallelism, got 'ring'"):
        attention(query, key, key, _parallel_config="ring")


def test_padding_is_not_computed() -> None:
    """Masks of padding become runs of keys and no bias, so that tiles are skipped; NaN in padding is harmless."""
    for mask in (per_sample(), bias_of(per_sample(), -10000.0)):
        found = read_mask(mask, torch.float32)
        assert isinstance(found.mask, SpanMask) and found.bias is None
    key = torch.randn(2, 9, 3, 8)
    key[0, 4:] = torch.nan
    assert attention(torch.randn(2, 6, 3, 8), key, key, attn_mask=bias_of(per_sample(), -10000.0)).isfinite().all()


def modules(**options: Any) -> tuple[Any, Any]:
    """Returns one of diffusers' attention modules twice, the second with our processor."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0

    torch.manual_seed(0)
    theirs = Attention(heads=3, dim_head=8, **options).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    joint = options.get("context_pre_only") is not None
    theirs.set_processor(JointAttnProcessor2_0() if joint else AttnProcessor2_0())
    ours = Attention(heads=3, dim_head=8, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.set_processor(JointAttnProcessor() if joint else AttnProcessor())
    return theirs, ours


def same(theirs: Any, ours: Any, *inputs: Tensor | None, **options: Any) -> None:
    """Compares results, and the gradients of inputs and parameters."""
    found = []
    for module in (theirs, ours):
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        out = module(*leaves, **options)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in leaves if x is not None] + list(module.parameters())
        grads = torch.autograd.grad(sum(x.square().sum() for x in out), wanted, allow_unused=True)
        found.append([*out, *(x for x in grads if x is not None)])
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-5)


KINDS: dict[str, dict[str, Any]] = {
    "self": {"query_dim": 20},
    "a picture with a group norm": {"query_dim": 24, "norm_num_groups": 4, "residual_connection": True, "bias": True,
                                    "rescale_output_factor": 1.5},
    "cross": {"query_dim": 20, "cross_attention_dim": 16},
    "cross with norms": {"query_dim": 20, "cross_attention_dim": 16, "qk_norm": "layer_norm",
                         "cross_attention_norm": "layer_norm"},
}  # fmt: skip


@needs_diffusers
@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_beside_diffusers(kind: str) -> None:
    options = KINDS[kind]
    theirs, ours = modules(**options)
    hidden = torch.randn(2, 24, 2, 3) if "norm_num_groups" in options else torch.randn(2, 6, 20)
    context = torch.randn(2, 9, 16) if "cross_attention_dim" in options else None
    same(theirs, ours, hidden, context)
    if context is None:
        return
    sample, query = per_sample()[:, 0], per_query()[:, 0]
    heads = torch.randn(6, 1, 9)  # [B H, 1, Lk]
    for mask in (bias_of(sample, -10000.0), bias_of(query, LEAST), sample, heads):
        same(theirs, ours, hidden, context, attention_mask=mask)


@needs_diffusers
def test_the_joint_processor_beside_diffusers() -> None:
    theirs, ours = modules(
        query_dim=20, added_kv_proj_dim=20, out_dim=24, context_pre_only=False, bias=True, qk_norm="rms_norm"
    )
    picture, prompt = torch.randn(2, 6, 20), torch.randn(2, 5, 20)
    same(theirs, ours, picture, prompt)
    shown = torch.ones(2, 1, 11, dtype=torch.bool)
    shown[0, 0, 8:] = False  # 2 tokens of padding in the first prompt
    short = ours(picture[:1], prompt[:1, :2])
    padded = ours(picture, prompt, attention_mask=shown)
    torch.testing.assert_close(padded[0][:1], short[0])
    torch.testing.assert_close(padded[1][:1, :2], short[1])


@needs_diffusers
def test_compiled() -> None:
    _, ours = modules(query_dim=20, cross_attention_dim=16)
    inputs = (torch.randn(2, 6, 20), torch.randn(2, 9, 16), bias_of(per_query()[:, 0], -10000.0))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), ours(*inputs))


def test_an_argument_that_is_not_known() -> None:
    with pytest.raises(TypeError, match="ip_adapter_masks must be left out: AttnProcessor does not know it"):
        AttnProcessor()(None, torch.zeros(1, 2, 3), ip_adapter_masks=torch.zeros(1))


def small_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, cross_attention_dim=12, attention_head_dim=8,
    ).eval()  # fmt: skip


@needs_diffusers
def test_a_unet_with_padded_prompts() -> None:
    unet, noise, prompt = small_unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 9, 12)
    shown = torch.arange(9) < torch.tensor([[4], [9]])
    results, before = [], unet.attn_processors
    for change in (lambda: None, lambda: set_attention(unet)):
        found = change()
        unet.zero_grad()
        out = unet(noise, 3, prompt, encoder_attention_mask=shown).sample
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad.clone() for x in unet.parameters() if x.grad is not None)])
    assert found == {
        "AttnProcessor": sum("attn" in name and name.endswith("to_q.weight") for name in unet.state_dict())
    }
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert set_attention(unet) == found
    unet.set_attn_processor(before)
    torch.testing.assert_close(unet(noise, 3, prompt, encoder_attention_mask=shown).sample, results[0][0])


def small_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@needs_diffusers
def test_through_the_dispatcher() -> None:
    """Flux has processors of its own, which ask diffusers' dispatcher."""
    from diffusers.models.attention_dispatch import attention_backend

    model, inputs = small_flux(), {
        "hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([0.3, 0.6]),
        "img_ids": torch.randn(6, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    before = model(**inputs).sample
    assert set_attention(model) == {"FluxAttnProcessor through mmkernels": 2}
    register()
    torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-4, atol=1e-5)
    calls = []
    kernel = __import__("mmkernels.integrations.diffusers", fromlist=["x"])
    original = kernel.cross_attention
    try:
        kernel.cross_attention = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
        model(**inputs)
        assert len(calls) == 2
        model.reset_attention_backend()
        model(**inputs)
        assert len(calls) == 2
        with attention_backend("mmkernels"):
            model(**inputs)
        assert len(calls) == 4
    finally:
        kernel.cross_attention = original


@needs_diffusers
def test_the_name_in_diffusers() -> None:
    register()
    model = small_flux()
    model.set_attention_backend("mmkernels")
    try:
        assert {
            module.processor._attention_backend.value for module in model.modules() if hasattr(module, "processor")
        } == {"mmkernels"}
        with pytest.raises(ValueError, match="must be one of the following"):
            model.set_attention_backend("mmkernel")
    finally:
        model.set_attention_backend("native")


def test_a_dispatcher_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("diffusers", "diffusers.models", "diffusers.models.attention_dispatch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(
        ImportError, match=r"the attention backend 'mmkernels' needs diffusers 0\.36 or later: cannot import"
    ):
        register()


def test_a_model_without_attention() -> None:
    with pytest.raises(ValueError, match="model must have attention modules with processors, got Linear"):
        set_attention(nn.Linear(2, 2))
