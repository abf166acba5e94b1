"""Rows of bench_models.py about the DeepSeek line: the hybrid encoder, Janus' image tokens, latent attention, experts.

Widths are published ones, layers are fewer.
"""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

import torch
from models_cases import Case
from models_pairs import Pair, deepseek_vl, janus
from models_targets import CACHE, CAP, FASTER, GROUPED, GROUPED_MM, LOOP, NEVER_SLOWER, READ, SDPA
from models_work import MAIN, Results, Work
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn import Experts, LatentAttention, LatentSizes
from mmkernels.testing.models import Inputs, randomise, seeded
from mmkernels.testing.parts import prompt

_FEW = 1000  # tokens of the vocabulary
_THEIRS = "transformers.models.deepseek_v2.modeling_deepseek_v2"

# DeepSeek-VL with both encoders.


def _question(config: Any, *, text: int = 60) -> dict[str, Inputs]:
    """Returns a prompt with one image before its text."""
    ids = prompt([config.image_tokens], before=4, after=text - 4, padding=0, batch=1, marker=config.image_token_id)
    draw = lambda side: torch.randn(1, config.channels, side, side)
    large = {"high_res_pixel_values": draw(config.sam_image_size)} if config.sam_layers else {}
    return {MAIN: ids | {"pixel_values": draw(config.image_size)} | large}


# Janus.

GUIDANCE = 5.0


class WriteImage(Work):
    """All tokens of an image are generated, with guidance: two rows a token. For a Janus. Only tokens are compared."""

    passes = "image tokens"

    def layers(self, config: Any) -> int:
        return int(config.text_layers * config.image_tokens)

    def ours(self, model: Any, inputs: Inputs) -> Results:
        return (model.generate_image(inputs["input_ids"], guidance_scale=GUIDANCE, temperature=0.0).float(),)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        ids = inputs["input_ids"]
        options = {"generation_mode": "image", "do_sample": False, "guidance_scale": GUIDANCE}
        return (model.generate(ids, attention_mask=torch.ones_like(ids), **options).float(),)


def _to_draw(config: Any, *, words: int = 30) -> dict[str, Inputs]:
    """Returns a prompt that an image follows."""
    ids = torch.randint(2, _FEW // 2, (1, words)).clamp(max=config.image_start_token_id - 1)
    return {MAIN: {"input_ids": torch.cat([_token(config.bos_token_id), ids, _token(config.image_start_token_id)], 1)}}


def _token(number: int) -> Tensor:
    return torch.tensor([[number]])


# Latent attention.

_V2_LITE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
}
"""DeepSeek-V2-Lite's, whose widths the language model of DeepSeek-VL2-small has."""

_NO_ATTENTION = "zeros"  # as a name of transformers' implementations
_BLOCK = 4096  # tokens that are read at once


def _v2(name: str, sizes: dict[str, Any], *args: Any) -> Any:
    """Returns a module of transformers' DeepSeek-V2."""
    config = importlib.import_module("transformers").DeepseekV2Config(**(_V2_LITE | sizes))
    return getattr(importlib.import_module(_THEIRS), name)(config, *args)


def latent_attention(**changes: Any) -> Pair:
    """Returns one attention of DeepSeek-V2-Lite; `changes`: arguments of the configuration that differ."""
    with seeded(0):
        theirs = randomise(_v2("DeepseekV2Attention", changes, 0).eval(), std=0.02)
    c = theirs.config
    sizes = LatentSizes(c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
    ours = LatentAttention(c.hidden_size, sizes, scale=theirs.scaling).eval()
    names = {
        "q_proj.weight": "q_proj.weight",
        "kv_proj.weight": "kv_a_proj_with_mqa.weight",
        "kv_norm.weight": "kv_a_layernorm.weight",
        "expand_proj.weight": "kv_b_proj.weight",
        "out_proj.weight": "o_proj.weight",
    }
    weights = dict(theirs.named_parameters())
    ours.load_state_dict({name: weights[other].detach().clone() for name, other in names.items()})
    ours.config = c  # type: ignore[assignment]
    return Pair(ours, theirs)  # type: ignore[arg-type]


class LatentStep(Work):
    """One more token of one layer, behind a long text whose keys and values are in a cache in compressed form."""

    passes = "decode step"

    def layers(self, config: Any) -> int:
        return 1

    def encoder(self, model: Any) -> nn.Module | None:
        return None

    def use_attention(self, model: Any, name: str) -> None:
        model.config._attn_implementation = name

    def begin(self, model: Any, inputs: Inputs) -> Any:
        """Returns the cache of the text; transformers' is filled without attending."""
        blocks = list(zip(inputs["text"].split(_BLOCK, 1), inputs["angles"][:, :-1].split(_BLOCK, 1), strict=True))
        if isinstance(model, LatentAttention):
            kept = KVCache(1, reserve=inputs["text"].shape[1] + 1)
            for x, angles in blocks:
                kept.append_compressed(0, model.compress(x, _parts(angles)), model.sizes.kv_rank)
            return kept
        AttentionInterface.register(_NO_ATTENTION, _zeros)
        implementation, cache = model.config._attn_implementation, DynamicCache()
        self.use_attention(model, _NO_ATTENTION)
        for x, angles in blocks:
            _call(model, x, cache, angles)
        self.use_attention(model, implementation)
        return cache

    def cache_share(self, model: Any, state: Any) -> float | None:
        """The paper's numbers a token are those of the compressed vector and of one key with a position."""
        kept = [buffer.view() for buffers in state._layers for buffer in buffers]
        c = model.config
        return sum(x.numel() / x.shape[2] for x in kept) / (c.kv_lora_rank + c.qk_rope_head_dim)

    def resume(self, state: Any, inputs: Inputs) -> Inputs:
        """Copies the cache."""
        return {"token": inputs["token"], "angles": inputs["angles"][:, -1:], "cache": copy.deepcopy(state)}

    def ours(self, model: Any, inputs: Inputs) -> Results:
        keep = lambda tokens: inputs["cache"].append_compressed(0, tokens, model.sizes.kv_rank)
        return (model(inputs["token"], _parts(inputs["angles"]), keep=keep),)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        return (_call(model, inputs["token"], inputs["cache"], inputs["angles"]),)


def _parts(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine ``[1, 1, L, D]`` of ``[1, L, D, 2]``."""
    cos, sin = angles[:, None].unbind(-1)
    return cos, sin


def _call(model: Any, x: Tensor, cache: DynamicCache, angles: Tensor) -> Tensor:
    """Calls transformers' attention, whose angles are complex; their precision is float32."""
    name = "cache" if "cache" in _arguments(model) else "past_key_values"  # the newer one first
    rotary = torch.view_as_complex(angles.float().contiguous())
    out: Tensor = model(x, attention_mask=None, position_embeddings=rotary, **{name: cache})[0]
    return out


def _arguments(model: Any) -> set[str]:
    function = type(model).forward
    return set(getattr(function, "__wrapped__", function).__code__.co_varnames)


def _zeros(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _long_text(config: Any, *, length: int) -> dict[str, Inputs]:
    """Returns the hidden states of a text and of its next token, and cosine and sine of their positions' angles."""
    rates = 1e4 ** -(torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim)
    angles = torch.arange(length + 1)[:, None] * rates
    text, token = (torch.randn(1, size, config.hidden_size) for size in (length, 1))
    return {MAIN: {"text": text, "token": token, "angles": torch.stack([angles.cos(), angles.sin()], -1)[None]}}


# Experts.


def experts(**changes: Any) -> Pair:
    """Returns the routed experts of a layer of DeepSeek-VL2-small, one set of weights for both sides."""
    with seeded(0):
        theirs = randomise(_v2("DeepseekV2Experts", changes).eval(), std=0.02)
    count, width, mlp = theirs.down_proj.shape
    with torch.device("meta"):
        ours = Experts(width, mlp, count)
    ours.gate_up, ours.down = theirs.gate_up_proj, theirs.down_proj
    ours.config = theirs.config
    return Pair(ours, theirs)  # type: ignore[arg-type]


class RunExperts(Work):
    """The routed experts of one layer: transformers' as a loop under the name "sdpa", and on PyTorch's grouped product.

    The router, which is the same work on all sides, is not in it.
    """

    passes = "experts"
    attends = False

    def layers(self, config: Any) -> int:
        return 1

    def encoder(self, model: Any) -> nn.Module | None:
        return None

    def use_attention(self, model: Any, name: str) -> None:
        model.config._experts_implementation = "eager" if name == SDPA else name

    def ours(self, model: Any, inputs: Inputs) -> Results:
        return (model(inputs["x"], inputs["index"], inputs["weight"]),)

    theirs = ours


def _routed(config: Any, *, tokens: int) -> dict[str, Inputs]:
    """Returns tokens, and experts and weights of each as a softmax of random scores has them."""
    scores = torch.randn(tokens, config.n_routed_experts).softmax(-1)
    weight, index = scores.topk(config.num_experts_per_tok, -1)
    return {MAIN: {"x": torch.randn(tokens, config.hidden_size), "index": index, "weight": weight}}


# Rows.

_HYBRID = {"vision_layers": 2, "sam_layers": 3, "text_layers": 2, "vocab_size": _FEW}  # one global layer of SAM
_PRO = {"vision_layers": 1, "text_layers": 2, "vocab_size": _FEW, "bos_token_id": 1, "vq_width": 32, "vq_blocks": 1}

DEEPSEEK_CASES = (
    Case("DeepSeek-VL-7B, both encoders", partial(deepseek_vl, "deepseek_vl_7b", **_HYBRID), _question, Work(), (CAP,)),
    Case("Janus-Pro-1B, 576 image tokens", partial(janus, "janus_pro_1b", **_PRO), _to_draw, WriteImage(), (FASTER,)),
    Case(
        "DeepSeek-V2-Lite's attention, 32,768 tokens",
        latent_attention,
        partial(_long_text, length=32768),
        LatentStep(),
        (CACHE, READ, NEVER_SLOWER),
    ),
    *(
        Case(
            f"DeepSeek-VL2-small's experts, {tokens} tokens",
            experts,
            partial(_routed, tokens=tokens),
            RunExperts(),
            (LOOP, GROUPED),
            others=(GROUPED_MM,),
        )
        for tokens in (1, 16, 64)
    ),
)
