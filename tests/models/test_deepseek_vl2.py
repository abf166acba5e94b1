"""DeepSeek-VL2 against transformers' SigLIP and DeepSeek-V2, and the paper's definition of what lies between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Saved, check_gradients, distance, load
from deepseek_vl2_checkpoints import (
    FIRST,
    MARKER,
    SIGMOID,
    VARIANTS,
    Theirs,
    images,
    inputs,
    labels_of,
    prompt,
    released,
)
from internvl_checkpoints import in_float64
from safetensors.torch import save_file
from torch import Tensor

from mmkernels.models import ContextPolicy, DeepSeekVL2
from mmkernels.models.blocks.latent_decoder import Mixture

# Both models compute in another order: measured over all cases here. DeepSeek-V2 rotates in float32 in any dtype.
EXACT, TOLERANCE = 1e-12, 5e-6
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., DeepSeekVL2]


def loss_of(logits: Tensor, given: dict[str, Any]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_of(given)[:, 1:].flatten())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss(ours: Ours, theirs: Any, variant: str) -> None:
    """Of two prompts with padding, one with two images and one with one."""
    given = inputs()
    with torch.no_grad():
        out = ours(variant)(**given, labels=labels_of(given), return_logits=True)
        logits = theirs(variant)(**given)
    valid = given["attention_mask"].bool()
    assert distance(out.logits[valid], logits[valid]) < TOLERANCE
    assert distance(out.loss, loss_of(logits, given)) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_in_float64(ours: Ours, theirs: Any, variant: str) -> None:
    """The encoder, the merge of patches and the order of the tokens."""
    tiles = [(2, 1), (1, 1), (3, 2), (1, 2)]
    given = images(tiles, torch.float64)
    with torch.no_grad():
        visual = ours(variant, torch.float64).encode(**given)
        expected = in_float64(theirs(variant)).encode(**given)
    assert visual.lengths == visual.marked == tuple(map(len, expected))
    assert distance(visual.tokens, torch.cat(expected)) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(saved: Checkpoints, theirs: Any, variant: str, tmp_path: Path) -> None:
    """Of every parameter: those of the model to compare with are read as a checkpoint."""
    given, model, other = inputs(), load(saved(variant).folder), theirs(variant)
    other.zero_grad()
    model(**given, labels=labels_of(given)).loss.backward()
    loss_of(other(**given), given).backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    assert all(x is not None for x in gradients.values())
    for name in ("config.json", "tokenizer.json", "family.txt"):
        (tmp_path / name).write_bytes((saved(variant).folder / name).read_bytes())
    biases = {name: x for name, x in other.named_buffers() if name.endswith("correction_bias")}
    save_file(released(gradients | biases), tmp_path / "model.safetensors")
    check_gradients(model, load(tmp_path).state_dict(), 2e-5)


def continued(model: Theirs, given: dict[str, Any], count: int) -> Tensor:
    """Returns the most likely next tokens, computed without a cache."""
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        for _ in range(count):
            token = model(**(given | {"input_ids": ids, "attention_mask": mask}))[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids[:, -count:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(ours: Ours, theirs: Any, variant: str) -> None:
    """Greedy, in a batch with padding on the left; and a second turn equals one prompt with everything in it."""
    given, model = inputs(), ours(variant)
    length = given["input_ids"].shape[1]
    expected = continued(theirs(variant), given, 6)
    first = model.generate(**given, max_new_tokens=6, eos_token_id=())
    assert first.tokens.tolist() == expected.tolist()

    more, mask = prompt([[(1, 1)], [(2, 1)]])
    second_images = images([(1, 1), (2, 1)])
    second = model.generate(
        more, attention_mask=mask, **second_images, kv_cache=first.kv_cache, max_new_tokens=4, eos_token_id=()
    )
    new, old = second_images["pixel_values"], given["pixel_values"]
    whole: dict[str, Any] = {
        "input_ids": torch.cat([given["input_ids"], expected, more], 1),
        "attention_mask": torch.cat([given["attention_mask"], torch.ones_like(expected), mask], 1),
        "pixel_values": torch.cat([old[:5], new[:2], old[5:], new[2:]]),  # row by row
        "tiles": [(2, 1), (1, 1), (1, 1), (1, 2), (2, 1)],
    }
    assert whole["input_ids"].shape[1] == length + 6 + more.shape[1]
    assert second.tokens.tolist() == continued(theirs(variant), whole, 4).tolist()


def test_the_cache_holds_the_compressed_vectors_alone(ours: Ours) -> None:
    """The paper's ``(d_c + d_h^R) l`` numbers a token (DeepSeek-V2, table 1)."""
    model, given = ours(FIRST), inputs()
    cache = model.generate(**given, max_new_tokens=2, eos_token_id=()).kv_cache
    c, tokens = model.config, given["input_ids"].numel() + 2  # the last token is not processed yet
    held = [buffer.view() for layer in cache._layers for buffer in layer]
    assert [tuple(x.shape[1:]) for x in held] == [(1, tokens // 2, c.kv_rank + c.rope_dim)] * c.text_layers
    assert sum(x.numel() for x in held) == tokens * c.text_layers * (24 + 8)


@pytest.mark.parametrize("variant", [FIRST, SIGMOID])
def test_images_matter(ours: Ours, variant: str) -> None:
    """The whole and the tiles, each by itself. If they changed little, parity would prove little."""
    given, model = inputs(), ours(variant)
    with torch.no_grad():
        whole = model(**given).logits[0, -1]
        for tile in range(5):  # of the two images of the first row
            other = given["pixel_values"].clone()
            other[tile] = other[tile].flip(2)
            assert distance(model(**(given | {"pixel_values": other})).logits[0, -1], whole) > 0.05
        for parameter in (model.newline, model.separator):
            before = parameter.clone()
            parameter.zero_()
            changed = distance(model(**given).logits[0, -1], whole)
            parameter.copy_(before)
            assert changed > 0.01


def test_text_alone(ours: Ours, theirs: Any) -> None:
    ids, mask = prompt([[], []])
    with torch.no_grad():
        out = ours(FIRST)(ids, attention_mask=mask)
        expected = theirs(FIRST)(ids, mask, torch.zeros(0, 3, 28, 28), [])
        assert distance(out.logits, expected) < TOLERANCE
        nothing = {"pixel_values": torch.zeros(0, 3, 28, 28)}
        for tiles in (None, []):
            assert torch.equal(ours(FIRST)(ids, **nothing, tiles=tiles, attention_mask=mask).logits, out.logits)


def test_a_second_prompt_encodes_nothing(ours: Ours) -> None:
    model, given = ours(FIRST), inputs()
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        visual = model.encode(given["pixel_values"], given["tiles"])
        expected = model(**given).logits
        again = model(given["input_ids"], attention_mask=given["attention_mask"], images=visual).logits
    hook.remove()
    assert calls == [1, 1] and torch.equal(again, expected)


@pytest.mark.parametrize("shrink", [None, 0.5])
def test_a_policy_forgets_images(ours: Ours, shrink: float | None) -> None:
    """An image is what a whole and its tiles are together; keys and values are removed as one."""
    model, (ids, _) = ours(FIRST), prompt([[(2, 1), (1, 1)]])
    first = model.generate(ids, **images([(2, 1), (1, 1)]), max_new_tokens=2, eos_token_id=())
    assert first.kv_cache.visual_tokens().tolist() == [17 + 13]
    policy = ContextPolicy(max_visual_tokens=26, shrink=shrink)
    out = model(prompt([[(1, 1)]])[0], **images([(1, 1)]), kv_cache=first.kv_cache, policy=policy)
    assert int(out.kv_cache.visual_tokens()) <= 26 and 2 in out.kv_cache.image_ids


# The mixture.


def test_routing_ties_take_the_first_experts() -> None:
    model = DeepSeekVL2.from_size("tiny").eval()
    (mixture,) = [m for m in model.modules() if isinstance(m, Mixture)][:1]
    with torch.no_grad():
        mixture.router.weight.zero_()
        x = torch.randn(2, 5, 64)
        _, index, _ = mixture.router(x.flatten(0, 1))
        assert index.tolist() == [[0, 1]] * 10  # two experts get all tokens, the others none
        gate_up, down = mixture.experts.gate_up[:2], mixture.experts.down[:2]
        gate, up = torch.einsum("blc,efc->eblf", x, gate_up).chunk(2, dim=-1)
        each = torch.einsum("eblf,ecf->eblc", F.silu(gate) * up, down)
        assert mixture.shared is not None
        torch.testing.assert_close(mixture(x), each.sum(0) / 8 + mixture.shared(x))


def test_experts_without_a_token_have_no_gradient_and_nan_there_is_not_read() -> None:
    model = DeepSeekVL2.from_size("tiny")
    with torch.no_grad():
        for mixture in [m for m in model.modules() if isinstance(m, Mixture)]:
            mixture.router.weight.zero_()
            mixture.experts.gate_up[2:], mixture.experts.down[2:] = torch.nan, torch.nan
    ids = torch.arange(3, 13)[None]
    model(ids, labels=ids).loss.backward()
    for mixture in [m for m in model.modules() if isinstance(m, Mixture)]:
        for parameter in (mixture.experts.gate_up, mixture.experts.down):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
            assert not parameter.grad[2:].any() and parameter.grad[:2].any()


# Other ways to run.


@pytest.mark.parametrize("variant", [FIRST, "deepseek_vl2_plain"])
def test_autocast(ours: Ours, variant: str) -> None:
    given = inputs()
    with torch.no_grad():
        whole = ours(variant)(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(variant)(**given).logits
    assert out.dtype == torch.bfloat16
    assert distance(out.float(), whole) < 0.1  # a token whose experts are near ties may go to others


@pytest.mark.parametrize("size", ["tiny", "tiny_plain", "tiny_sigmoid"])
def test_nothing_waits_for_a_device(size: str) -> None:
    """On a device that has no values, which the use of one would show."""
    with torch.device("meta"), torch.no_grad():
        model = DeepSeekVL2(DeepSeekVL2.sizes[size]).eval()
        ids, given = torch.zeros(1, 40, dtype=torch.long), {"pixel_values": torch.rand(5, 3, 28, 28)}
        tiles = [(2, 1), (1, 1)]
        assert model(ids, **given, tiles=tiles).logits.shape == (1, 40, 128)
        assert model(ids, **given, tiles=tiles, labels=ids).loss.shape == ()


def test_compiled_code_is_one_graph() -> None:
    model = DeepSeekVL2.from_size("tiny").eval()
    ids, x = torch.tensor([[5, *[127] * 17, 6, 7]]), torch.rand(3, 3, 28, 28)
    call = lambda ids, x: model(ids, x, tiles=[(2, 1)]).logits
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(ids, x), call(ids, x)) < TOLERANCE


def test_the_marker_of_the_tokenizer(ours: Ours) -> None:
    assert ours(FIRST).config.image_token_id == MARKER
