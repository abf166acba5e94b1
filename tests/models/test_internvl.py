"""InternVL against transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import Saved, configure, distance, their_gradients
from internvl_checkpoints import MARKER, SIDE, VARIANTS, inputs, labels_of, pixels, prompt, tokens
from torch import Tensor

from mmkernels.models import InternVL
from mmkernels.nn import cross_attention

# Both models compute in another order: measured over all cases here, see `test_logits_and_loss`.
EXACT, TOLERANCE = 1e-12, 5e-6
DTYPES = (torch.float64, torch.float32)
PLAIN = "internvl_qwen2"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., InternVL]


def run(theirs: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns logits and loss of transformers' model; it would compute the loss in float32.

    Padding does not count in the positions: angles of others differ by float32's rounding.
    """
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = theirs(**given, position_ids=positions).logits
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_of(given)[:, 1:].flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss(ours: Ours, theirs: Any, variant: str, dtype: torch.dtype) -> None:
    """Of two prompts with padding, an image of two tiles and two of one."""
    given = inputs(theirs(variant, dtype))
    given["pixel_values"] = given["pixel_values"].to(dtype)
    with torch.no_grad():
        out = ours(variant, dtype)(**given, labels=labels_of(given), return_logits=True)
        logits, loss = run(theirs(variant, dtype), given)
    valid, tolerance = given["attention_mask"].bool(), EXACT if dtype == torch.float64 else TOLERANCE
    assert distance(out.logits[valid], logits[valid]) < tolerance
    assert distance(out.loss, loss) < tolerance
    assert out.logits.dtype == out.loss.dtype == dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(ours: Ours, saved: Checkpoints, theirs: Any, variant: str, tmp_path: Path) -> None:
    """Of every parameter; transformers' are read by the names that the tensors have in its models."""
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 2e-5)):
        given = inputs(theirs(variant, dtype))
        given["pixel_values"] = given["pixel_values"].to(dtype)
        for model in (ours(variant, dtype), theirs(variant, dtype)):
            model.zero_grad()
        ours(variant, dtype)(**given, labels=labels_of(given)).loss.backward()
        run(theirs(variant, dtype), given)[1].backward()
        checkpoint = Saved(variant, saved(variant).folder, theirs(variant, dtype))
        expected = their_gradients(checkpoint, tmp_path / str(dtype), dtype)
        largest = max(float(x.norm()) for x in expected.values())
        for name, parameter in ours(variant, dtype).named_parameters():
            assert parameter.grad is not None, name
            if name.startswith("vision") and name.endswith("k_proj.bias"):  # all scores of a query shift alike
                assert float(parameter.grad.norm()) < tolerance * largest
            else:
                assert distance(parameter.grad, expected[name]) < tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(ours: Ours, theirs: Any, variant: str) -> None:
    """Greedy, in a batch with padding on the left; and a second turn equals one prompt with everything in it."""
    given, model = inputs(theirs(variant)), ours(variant)
    length = given["input_ids"].shape[1]
    expected = theirs(variant).generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None)
    first = model.generate(**given, max_new_tokens=6, eos_token_id=())
    assert first.tokens.tolist() == expected[:, length:].tolist()

    more, mask = prompt(theirs(variant), [[1], [1]])
    again = torch.cat([expected, more], 1), torch.cat([torch.ones_like(expected), mask], 1)
    again[1][:, :length] = given["attention_mask"]
    new = pixels(theirs(variant), 2)
    second = model.generate(more, new, kv_cache=first.kv_cache, max_new_tokens=5, eos_token_id=())
    order = torch.cat([given["pixel_values"][:3], new[:1], given["pixel_values"][3:], new[1:]])  # row after row
    expected = theirs(variant).generate(
        input_ids=again[0],
        attention_mask=again[1],
        pixel_values=order,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    assert second.tokens.tolist() == expected[:, again[0].shape[1] :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_matter(ours: Ours, theirs: Any, variant: str) -> None:
    """If they changed little, parity would prove little."""
    given, model = inputs(theirs(variant)), ours(variant)
    logits = lambda x: model(given["input_ids"], x, attention_mask=given["attention_mask"]).logits[:, -1]
    with torch.no_grad():
        whole = logits(given["pixel_values"])
        assert distance(logits(given["pixel_values"].roll(1, 0)), whole) > 0.05
        assert distance(logits(given["pixel_values"].flip(3)), whole) > 0.05


def test_text_alone(ours: Ours, theirs: Any) -> None:
    ids, mask = prompt(theirs(PLAIN), [[], []])
    with torch.no_grad():
        out = ours(PLAIN)(ids, attention_mask=mask)
        assert distance(out.logits, theirs(PLAIN)(ids, attention_mask=mask).logits) < TOLERANCE
        nothing = pixels(theirs(PLAIN), 0)
        assert torch.equal(ours(PLAIN)(ids, nothing, attention_mask=mask).logits, out.logits)


@pytest.mark.parametrize("variant", [PLAIN, "internvl_early"])
@pytest.mark.parametrize("side", [SIDE // 2, SIDE + 16])
def test_tiles_of_another_size(ours: Ours, theirs: Any, variant: str, side: int) -> None:
    """Positions are interpolated, as transformers does."""
    ids, mask = prompt(theirs(variant), [[2]], side)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(theirs(variant), 2, side)}
    with torch.no_grad():
        out = ours(variant)(**given)
        assert distance(out.logits, theirs(variant)(**given).logits) < TOLERANCE
    assert ids.eq(MARKER).sum() == 2 * tokens(theirs(variant), side)


@pytest.mark.parametrize("reduce", [None, "pool:2", "select:0.25", "tome:0.5"])
def test_nothing_waits_for_a_device(reduce: str | None) -> None:
    """On a device that has no values, which the use of one would show."""
    with torch.device("meta"), torch.no_grad():
        model = InternVL(replace(InternVL.sizes["tiny"], reduce=reduce)).eval()
        ids, tiles = torch.zeros(1, 40, dtype=torch.long), torch.rand(2, 3, 32, 32)
        out = model(ids, tiles)
        assert out.logits.shape == (1, 40 - 32 + sum(model.encode(tiles).lengths), 128)
        assert model(ids, tiles, labels=ids, tiles=[2]).loss.shape == ()


def test_one_attention_call_a_layer(ours: Ours, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tiles of a batch, and the class token is dropped without a copy of the features."""
    model, given = ours(PLAIN), inputs(theirs(PLAIN))
    calls: list[tuple[int, ...]] = []
    call = cross_attention.cross_attention

    def counted(query: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return call(query, *args, **options)

    monkeypatch.setattr(cross_attention, "cross_attention", counted)
    seen: list[Tensor] = []
    hook = model.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**given)
    hook.remove()
    length = given["input_ids"].shape[1]
    assert calls == [(4, 2, 65, 16)] * 3 + [(2, 4, length, 12)] * 2
    assert seen[0].storage_offset() == seen[0].shape[2] and seen[0].stride(0) == 65 * seen[0].shape[2]


def test_autocast(ours: Ours, theirs: Any) -> None:
    given = inputs(theirs(PLAIN))
    with torch.no_grad():
        whole = ours(PLAIN)(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(PLAIN)(**given).logits
    assert distance(out.float(), whole) < 0.05


def test_compiled_code_is_one_graph() -> None:
    model = InternVL.from_size("tiny", reduce="pool:2").eval()
    ids, tiles = torch.tensor([[5, *[127] * 32, 6, 7]]), torch.rand(2, 3, 32, 32)
    torch.compiler.reset()
    compiled = torch.compile(lambda ids, tiles: model(ids, tiles).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(ids, tiles), model(ids, tiles).logits) < TOLERANCE


@pytest.mark.parametrize("layer", [1, 3, -3])
def test_features_of_other_layers(copy: Callable[[str], Path], layer: int) -> None:
    """A norm follows the last layer if it is counted as -1, not as 3."""
    folder = copy("internvl_llama")
    configure(folder, vision_feature_layer=layer)
    model = InternVL.from_pretrained(folder)
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(folder).eval()
    assert len(model.vision.blocks) == layer % 4
    given = inputs(theirs)
    with torch.no_grad():
        assert distance(model(**given).logits[:, -1], theirs(**given).logits[:, -1]) < TOLERANCE
