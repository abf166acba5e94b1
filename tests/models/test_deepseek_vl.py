"""DeepSeek-VL, plain and hybrid, against transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Saved, check_gradients, distance, their_gradients
from deepseek_vl_checkpoints import HYBRID, MARKER, PLAIN, TOKENS, VARIANTS, inputs, labels_of, pixels, prompt
from torch import Tensor

from mmkernels.models import DeepSeekVL
from mmkernels.models.blocks.encoder import Heads

# Both models compute in another order: measured over all cases here.
EXACT, TOLERANCE = 1e-12, 5e-6
DTYPES = (torch.float64, torch.float32)
BOTH = pytest.mark.parametrize("variant", [PLAIN, HYBRID])
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., DeepSeekVL]


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
    given = inputs(theirs(variant, dtype), dtype)
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
        given, model = inputs(theirs(variant, dtype), dtype), ours(variant, dtype)
        for each in (model, theirs(variant, dtype)):
            each.zero_grad()
        model(**given, labels=labels_of(given)).loss.backward()
        run(theirs(variant, dtype), given)[1].backward()
        checkpoint = Saved(variant, saved(variant).folder, theirs(variant, dtype))
        check_gradients(model, their_gradients(checkpoint, tmp_path / str(dtype), dtype), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(ours: Ours, theirs: Any, variant: str) -> None:
    """Greedy, in a batch with padding on the left; and a second turn equals one prompt with everything in it."""
    given, model = inputs(theirs(variant)), ours(variant)
    length = given["input_ids"].shape[1]
    settings = {"do_sample": False, "eos_token_id": None}
    expected = theirs(variant).generate(**given, **settings, max_new_tokens=6)
    first = model.generate(**given, max_new_tokens=6, eos_token_id=())
    assert first.tokens.tolist() == expected[:, length:].tolist()

    more, mask = prompt([1, 1])
    ids, valid = torch.cat([expected, more], 1), torch.cat([torch.ones_like(expected), mask], 1)
    valid[:, :length] = given["attention_mask"]
    new = pixels(theirs(variant), 2)
    second = model.generate(more, **new, kv_cache=first.kv_cache, max_new_tokens=5, eos_token_id=())
    whole = {name: torch.cat([given[name][:2], x[:1], given[name][2:], x[1:]]) for name, x in new.items()}  # by rows
    expected = theirs(variant).generate(input_ids=ids, attention_mask=valid, **whole, **settings, max_new_tokens=5)
    assert second.tokens.tolist() == expected[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_matter(ours: Ours, theirs: Any, variant: str) -> None:
    """At each resolution by itself. If they changed little, parity would prove little."""
    given, model = inputs(theirs(variant)), ours(variant)
    with torch.no_grad():
        whole = model(**given).logits[:, -1]
        for name in pixels(theirs(variant), 1):
            for other in (given[name].roll(1, 0), given[name].flip(3)):
                assert distance(model(**(given | {name: other})).logits[:, -1], whole) > 0.05


def test_relative_positions_and_the_tapped_layer_matter(ours: Ours, theirs: Any) -> None:
    given, model = inputs(theirs(HYBRID)), ours(HYBRID)
    with torch.no_grad():
        whole = model(**given).logits[:, -1]
        for name in ("sam.blocks.0.attention.row_positions", "sam.blocks.1.attention.column_positions", "global_scale"):
            parameter = model.get_parameter(name)
            before = parameter.clone()
            try:
                parameter.zero_()
                assert distance(model(**given).logits[:, -1], whole) > 1e-3, name
            finally:
                parameter.copy_(before)


@BOTH
def test_text_alone(ours: Ours, theirs: Any, variant: str) -> None:
    ids, mask = prompt([0, 0])
    with torch.no_grad():
        out = ours(variant)(ids, attention_mask=mask)
        assert distance(out.logits, theirs(variant)(input_ids=ids, attention_mask=mask).logits) < TOLERANCE
        nothing = pixels(theirs(variant), 0)
        assert torch.equal(ours(variant)(ids, **nothing, attention_mask=mask).logits, out.logits)


@BOTH
def test_a_second_prompt_encodes_nothing(ours: Ours, theirs: Any, variant: str) -> None:
    model, given = ours(variant), inputs(theirs(variant))
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    images = {name: given[name] for name in pixels(theirs(variant), 1)}
    with torch.no_grad():
        visual = model.encode(**images)
        expected = model(**given).logits
        again = model(given["input_ids"], attention_mask=given["attention_mask"], images=visual).logits
    hook.remove()
    assert visual.lengths == visual.marked == (TOKENS,) * 3
    assert calls == [1, 1] and torch.equal(again, expected)


# Fewer tokens.


@pytest.mark.parametrize(("reduce", "left"), [("pool:2", 4), ("tome:0.5", 8), ("select:0.25", 4), ("none", 16)])
@BOTH
def test_reducers(ours: Ours, theirs: Any, variant: str, reduce: str, left: int) -> None:
    """Logits are those of the shorter prompt with the tokens that are left."""
    model, given = ours(variant), inputs(theirs(variant))
    images = {name: given[name] for name in pixels(theirs(variant), 1)}
    with torch.no_grad():
        whole = model.encode(**images)
        model.set_reducer(reduce)
        try:
            visual, out = model.encode(**images), model(**given)
        finally:
            model.set_reducer(None)
        assert visual.lengths == (left,) * 3 and visual.marked == (TOKENS,) * 3
        if reduce == "select:0.25":  # the patches that receive the most attention in SigLIP's last layer
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
        logits = theirs(variant)(inputs_embeds=x[None]).logits[0]
    assert distance(out.logits[0, -len(logits) :], logits) < TOLERANCE


def received(heads: Heads) -> Tensor:
    """Returns the attention that each patch receives, ``[N, patches]``."""
    scores = heads.query @ heads.key.transpose(2, 3) * heads.query.shape[-1] ** -0.5
    return scores.softmax(-1).mean((1, 2))


# Other ways to run.


@BOTH
def test_autocast(ours: Ours, theirs: Any, variant: str) -> None:
    given = inputs(theirs(variant))
    with torch.no_grad():
        whole = ours(variant)(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(variant)(**given).logits
    assert distance(out.float(), whole) < 0.05


@pytest.mark.parametrize("reduce", [None, "select:0.25"])
@pytest.mark.parametrize("size", ["tiny", "tiny_hybrid"])
def test_nothing_waits_for_a_device(size: str, reduce: str | None) -> None:
    """On a device that has no values, which the use of one would show."""
    with torch.device("meta"), torch.no_grad():
        model = DeepSeekVL(replace(DeepSeekVL.sizes[size], reduce=reduce)).eval()
        ids, images = torch.zeros(1, 40, dtype=torch.long), {"pixel_values": torch.rand(2, 3, 32, 32)}
        if model.config.sam_layers:
            images["high_res_pixel_values"] = torch.rand(2, 3, 64, 64)
        assert model(ids, **images).logits.shape == (1, 40 - 32 + sum(model.encode(**images).lengths), 128)
        assert model(ids, **images, labels=ids).loss.shape == ()


def test_compiled_code_is_one_graph() -> None:
    model = DeepSeekVL.from_size("tiny_hybrid").eval()
    ids, small, large = torch.tensor([[5, *[127] * 16, 6, 7]]), torch.rand(1, 3, 32, 32), torch.rand(1, 3, 64, 64)
    call = lambda ids, x, y: model(ids, x, high_res_pixel_values=y).logits
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(ids, small, large), call(ids, small, large)) < TOLERANCE
