"""Janus against transformers' model: images that are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Saved, check_gradients, distance, their_gradients
from janus_checkpoints import MARKER, TOKENS, VARIANTS, inputs, labels_of, pixels, prompt
from torch import Tensor

from mmkernels.models import Janus
from mmkernels.models.blocks.encoder import Heads

# Both models compute in another order: measured over all cases here.
EXACT, TOLERANCE = 1e-12, 5e-6
DTYPES = (torch.float64, torch.float32)
PLAIN = "janus"
GENERATION = ("vq.", "image_embed.", "image_aligner.", "image_head.")
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., Janus]


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
    """Of two prompts with padding, one with two images and one with one."""
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
    """Of every parameter that takes part; transformers' are read by the names that the tensors have in its models."""
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 2e-5)):
        given = inputs(theirs(variant, dtype))
        given["pixel_values"] = given["pixel_values"].to(dtype)
        for model in (ours(variant, dtype), theirs(variant, dtype)):
            model.zero_grad()
        ours(variant, dtype)(**given, labels=labels_of(given)).loss.backward()
        run(theirs(variant, dtype), given)[1].backward()
        for name, parameter in (*ours(variant, dtype).named_parameters(), *theirs(variant, dtype).named_parameters()):
            if name.startswith((*GENERATION, "model.generation_", "model.vqmodel.")):
                assert parameter.grad is None, name
                parameter.grad = torch.zeros_like(parameter)  # so that transformers' gradients are a whole checkpoint
        checkpoint = Saved(variant, saved(variant).folder, theirs(variant, dtype))
        expected = their_gradients(checkpoint, tmp_path / str(dtype), dtype)
        model = ours(variant, dtype)
        for name in expected:
            if name.startswith(GENERATION):
                assert not expected[name].any()
        reads = torch.nn.ModuleDict(
            {name: part for name, part in model.named_children() if not f"{name}.".startswith(GENERATION)}
        )
        check_gradients(reads, expected, tolerance, rotated=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(ours: Ours, theirs: Any, variant: str) -> None:
    """Greedy, in a batch with padding on the left; and a second turn equals one prompt with everything in it."""
    given, model = inputs(theirs(variant)), ours(variant)
    length = given["input_ids"].shape[1]
    settings = {"do_sample": False, "eos_token_id": None, "generation_mode": "text"}
    expected = theirs(variant).generate(**given, **settings, max_new_tokens=6)
    first = model.generate(**given, max_new_tokens=6, eos_token_id=())
    assert first.tokens.tolist() == expected[:, length:].tolist()

    more, mask = prompt([1, 1])
    again = torch.cat([expected, more], 1), torch.cat([torch.ones_like(expected), mask], 1)
    again[1][:, :length] = given["attention_mask"]
    new = pixels(theirs(variant), 2)
    second = model.generate(more, new, kv_cache=first.kv_cache, max_new_tokens=5, eos_token_id=())
    order = torch.cat([given["pixel_values"][:2], new[:1], given["pixel_values"][2:], new[1:]])  # row after row
    whole = {"input_ids": again[0], "attention_mask": again[1], "pixel_values": order}
    expected = theirs(variant).generate(**whole, **settings, max_new_tokens=5)
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
    ids, mask = prompt([0, 0])
    with torch.no_grad():
        out = ours(PLAIN)(ids, attention_mask=mask)
        assert distance(out.logits, theirs(PLAIN)(ids, attention_mask=mask).logits) < TOLERANCE
        nothing = pixels(theirs(PLAIN), 0)
        assert torch.equal(ours(PLAIN)(ids, nothing, attention_mask=mask).logits, out.logits)


def test_a_second_prompt_encodes_nothing(ours: Ours, theirs: Any) -> None:
    model, given = ours(PLAIN), inputs(theirs(PLAIN))
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        visual = model.encode(given["pixel_values"])
        expected = model(**given).logits
        again = model(given["input_ids"], attention_mask=given["attention_mask"], images=visual).logits
    hook.remove()
    assert visual.lengths == visual.marked == (TOKENS,) * 3
    assert calls == [1, 1] and torch.equal(again, expected)


@pytest.mark.parametrize(("reduce", "left"), [("pool:2", 4), ("tome:0.5", 8), ("select:0.25", 4), ("none", 16)])
def test_reducers(ours: Ours, theirs: Any, reduce: str, left: int) -> None:
    """Logits are those of the shorter prompt with the tokens that are left."""
    model, given = ours(PLAIN), inputs(theirs(PLAIN))
    with torch.no_grad():
        whole = model.encode(given["pixel_values"])
        model.set_reducer(reduce)
        try:
            visual, out = model.encode(given["pixel_values"]), model(**given)
        finally:
            model.set_reducer(None)
        assert visual.lengths == (left,) * 3 and visual.marked == (TOKENS,) * 3
        if reduce == "select:0.25":  # the patches that receive the most attention in the last layer
            _, heads = model.vision.with_heads(given["pixel_values"])
            best = received(heads).topk(left, dim=1)[1].sort(1)[0]
            expected = whole.tokens.view(3, TOKENS, -1)[torch.arange(3)[:, None], best].flatten(0, 1)
            torch.testing.assert_close(visual.tokens, expected)
        ids = given["input_ids"][0]  # two images, no padding
        first = (ids == MARKER).nonzero().flatten().view(2, TOKENS)
        stays = torch.ones_like(ids, dtype=torch.bool)
        stays[first[:, left:]] = False
        x = model.decoder.embed(ids[stays])
        x[ids[stays] == MARKER] = visual.tokens[: 2 * left]
        logits = theirs(PLAIN)(inputs_embeds=x[None]).logits[0]
    assert distance(out.logits[0], logits) < TOLERANCE


def received(heads: Heads) -> Tensor:
    """Returns the attention that each patch receives, ``[N, patches]``."""
    scores = heads.query @ heads.key.transpose(2, 3) * heads.query.shape[-1] ** -0.5
    return scores.softmax(-1).mean((1, 2))


def test_autocast(ours: Ours, theirs: Any) -> None:
    given = inputs(theirs(PLAIN))
    with torch.no_grad():
        whole = ours(PLAIN)(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(PLAIN)(**given).logits
    assert distance(out.float(), whole) < 0.05


@pytest.mark.parametrize("reduce", [None, "select:0.25"])
def test_nothing_waits_for_a_device(reduce: str | None) -> None:
    """On a device that has no values, which the use of one would show."""
    with torch.device("meta"), torch.no_grad():
        model = Janus(replace(Janus.sizes["tiny"], reduce=reduce)).eval()
        ids, photos = torch.zeros(1, 40, dtype=torch.long), torch.rand(2, 3, 32, 32)
        assert model(ids, photos).logits.shape == (1, 40 - 32 + sum(model.encode(photos).lengths), 128)
        assert model(ids, photos, labels=ids).loss.shape == ()
        tokens = model.encode_tokens(torch.rand(1, 3, 8, 8))
        assert model(ids, image_tokens=tokens).loss.shape == ()
        assert model.decode(tokens).shape == (1, 3, 8, 8)
        mask = torch.ones(1, 40, dtype=torch.long)
        assert model.generate_image(ids, attention_mask=mask, temperature=0.0).shape == (1, 16)


def test_compiled_code_is_one_graph() -> None:
    model = Janus.from_size("tiny").eval()
    ids, photos = torch.tensor([[5, *[127] * 16, 6, 7]]), torch.rand(1, 3, 32, 32)
    torch.compiler.reset()
    compiled = torch.compile(lambda ids, x: model(ids, x).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(ids, photos), model(ids, photos).logits) < TOLERANCE
        tokens = torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(0))
        trained = torch.compile(lambda ids, x: model(ids, image_tokens=x).loss, fullgraph=True, backend="eager")
        assert distance(trained(ids[:, -2:], tokens), model(ids[:, -2:], image_tokens=tokens).loss) < TOLERANCE
