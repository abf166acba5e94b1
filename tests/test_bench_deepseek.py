"""The rows of the models' benchmark that are about the DeepSeek line, on tiny models."""

from dataclasses import replace
from functools import partial
from typing import Any

import models_deepseek as deepseek
import models_pairs
import pytest
import torch
import transformers
from models_deepseek import DEEPSEEK_CASES
from models_measure import Row, Trial
from models_pairs import deepseek_vl_config, janus_config
from models_targets import GROUPED_MM, SDPA
from test_bench_models import _quick, measured

from mmkernels.models import DeepSeekVL, Janus
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.targets import OURS

__all__ = ["_quick"]  # a fixture that every test here uses

HYBRID, WRITE, LATENT, *EXPERTS = DEEPSEEK_CASES
TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
SMALL_LATENT = replace(
    LATENT, pair=partial(deepseek.latent_attention, **TINY), inputs=partial(deepseek._long_text, length=40)
)
SMALL_EXPERTS = replace(EXPERTS[1], pair=partial(deepseek.experts, **TINY), inputs=partial(deepseek._routed, tokens=16))


def found_of(info: dict[str, Any]) -> dict[str, Any]:
    return {target["than"]: target["found"] for target in info["targets"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_encoders_and_a_prompt(dtype: str) -> None:
    case = replace(HYBRID, pair=partial(models_pairs.deepseek_vl, "tiny_hybrid"))
    info = measured(case, dtype)
    attention = info["attention"]
    assert attention["layers"] == 2 + 3 + 2 and attention["calls"] == 7 and info["encoder_calls"] == 1
    assert max(info["distances"][OURS]) < (1e-5 if dtype == "fp32" else 0.1)
    assert found_of(info) == {"share of cap": info["amdahl"]["share_of_cap"]}


def test_the_tokens_of_an_image_are_those_of_transformers() -> None:
    pair = partial(models_pairs.janus, "tiny")
    info = measured(replace(WRITE, pair=pair, inputs=partial(deepseek._to_draw, words=5)))
    assert info["distances"][OURS] == [0.0] and info["encoder_calls"] == 0
    assert info["attention"]["calls"] == info["attention"]["layers"] == 2 * 16
    assert found_of(info) == {"time, transformers'": info["peers"][SDPA]["ratio"]}


def test_guidance_is_on_both_sides() -> None:
    pair = partial(models_pairs.janus, "tiny")
    trial = Trial(Row(replace(WRITE, pair=pair, inputs=partial(deepseek._to_draw, words=5)), "fp32"))
    with torch.no_grad():
        ours = trial.results(OURS)[0]
        other = trial.ours.generate_image(trial._inputs[""]["input_ids"], guidance_scale=1.0, temperature=0.0)
    assert ours.shape == other.shape == (1, 16) and not torch.equal(ours, other.float())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_reads_the_compressed_cache_once(dtype: str) -> None:
    info = measured(SMALL_LATENT, dtype)
    size = 4 if dtype == "fp32" else 2
    assert info["attention"]["calls"] == info["attention"]["layers"] == 1
    moved = 41 * 20 + 2 * 20 + 2 * 16  # the cache, whose first channels are the values; two heads' queries and outputs
    assert info["attention"]["bytes"] == size * moved
    assert max(info["distances"][OURS]) < (1e-5 if dtype == "fp32" else 0.05)
    found = found_of(info)
    assert found["cache a token, of the paper's"] == info["cache_share"] == 1.0
    assert (
        found["attention, of read bandwidth"] == info["attention"]["bytes"] / info["attention"]["seconds"][OURS] / 2e9
    )


@torch.no_grad()
def test_a_step_is_that_of_the_whole_text() -> None:
    """And each run begins with the same cache."""
    trial = Trial(Row(SMALL_LATENT, "fp32"))
    inputs = trial._inputs[""]
    x = torch.cat([inputs["text"], inputs["token"]], dim=1)
    whole = trial.ours(x, deepseek._parts(inputs["angles"]))[:, -1:]
    for name in (SDPA, OURS):
        first, again = (trial.results(name)[0] for _ in range(2))
        assert torch.equal(first, again)
        torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-6)


def test_a_larger_cache_misses_its_target() -> None:
    model, cache = deepseek.latent_attention(**TINY).ours, KVCache(1)
    cache.append(0, torch.zeros(1, 2, 10, 12), torch.zeros(1, 2, 10, 8))
    assert deepseek.LatentStep().cache_share(model, cache) == 2 * (12 + 8) / (16 + 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_experts_are_compared_with_a_loop_and_a_grouped_product(dtype: str) -> None:
    info = measured(SMALL_EXPERTS, dtype)
    assert set(info["peers"]) == {SDPA, GROUPED_MM} and info["attention"]["calls"] == 0
    assert max(info["distances"][OURS] + info["distances"][GROUPED_MM]) < (1e-5 if dtype == "fp32" else 0.05)
    assert found_of(info) == {
        "time, of a loop": info["peers"][SDPA]["ratio"],
        "time, grouped_mm's": info["peers"][GROUPED_MM]["ratio"],
    }


def test_all_candidates_read_the_same_weights() -> None:
    trial = Trial(Row(SMALL_EXPERTS, "bf16"))
    ours, theirs = trial.ours, trial.theirs
    assert ours.gate_up.data_ptr() == theirs.gate_up_proj.data_ptr() and ours.down.dtype == torch.bfloat16
    with torch.no_grad():
        trial.results(SDPA)
        assert theirs.config._experts_implementation == "eager"
        trial.results(GROUPED_MM)
        assert theirs.config._experts_implementation == GROUPED_MM
    index = trial._inputs[""]["index"]
    assert index.shape == (16, 2) and int(index.max()) < 8


@pytest.mark.parametrize(
    ("translate", "config"),
    [
        pytest.param(translate, config, id=f"{model.__name__} {size}")
        for translate, model in ((deepseek_vl_config, DeepSeekVL), (janus_config, Janus))
        for size, config in model.sizes.items()
    ],
)
def test_both_models_have_the_published_sizes(translate: Any, config: Any) -> None:
    architecture, theirs = translate(config)
    made = getattr(transformers, architecture).config_class(**theirs)
    found = type(config).from_hf(made.to_dict() | {"architectures": [architecture]})
    outside = ("image_start_token_id",)  # in generation_config.json
    assert replace(found, **{name: getattr(config, name) for name in outside if hasattr(config, name)}) == config


def test_rows_have_published_widths_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of that size is run."""
    monkeypatch.setattr(models_pairs, "_pair", lambda *made, **more: made)
    _, config, translate = HYBRID.pair()
    inputs = HYBRID.inputs(config)[""]
    assert inputs["pixel_values"].shape == (1, 3, 384, 384) and inputs["high_res_pixel_values"].shape[-1] == 1024
    assert (inputs["input_ids"] == config.image_token_id).sum() == 576 and inputs["input_ids"].shape == (1, 636)
    assert (config.text_width, config.sam_width, config.sam_global[0]) == (4096, 768, 2) and config.sam_layers == 3
    for found, made in ((config, translate(config)), (WRITE.pair()[1], janus_config(WRITE.pair()[1]))):
        values = getattr(transformers, made[0]).config_class(**made[1]).to_dict() | {"architectures": [made[0]]}
        assert type(found).from_hf(values).text_width == found.text_width
    config = WRITE.pair()[1]
    ids = WRITE.inputs(config)[""]["input_ids"][0].tolist()
    assert (ids[0], ids[-1]) == (config.bos_token_id, config.image_start_token_id) and config.image_tokens == 576
    assert config.image_start_token_id not in ids[1:-1] and max(ids) < config.vocab_size == 1000
    text = LATENT.inputs(transformers.DeepseekV2Config(**(deepseek._V2_LITE | {"hidden_size": 16})))[""]["text"]
    assert text.shape == (1, 32768, 16)
    assert deepseek._V2_LITE["hidden_size"] == 2048 and deepseek._V2_LITE["moe_intermediate_size"] == 1408


def test_every_row_has_its_own_name_and_targets() -> None:
    names = [str(Row(case, "fp32")) for case in DEEPSEEK_CASES]
    assert len(set(names)) == len(names) and all(case.targets for case in DEEPSEEK_CASES)
    tokens = [case.inputs.keywords["tokens"] for case in EXPERTS]  # type: ignore[attr-defined]
    assert tokens == [1, 16, 64]
