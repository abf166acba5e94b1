"""Janus against transformers' model: images that are generated, and the tokenizer of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Saved, distance
from janus_checkpoints import BOS, CODES, MARKER, PAD, START, TOKENS, VARIANTS, drawing_prompt
from torch import Tensor, nn

from mmkernels.models import Janus
from mmkernels.models.janus_vq import VQ, VQSizes
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy

EXACT, TOLERANCE = 1e-12, 1e-5
DTYPES = (torch.float64, torch.float32)
PLAIN = "janus"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., Janus]


def tokens_of(batch: int) -> Tensor:
    return torch.randint(CODES, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))


def their_scores(theirs: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Returns the logits ``[B, N, codes]`` of image tokens behind prompts, in one call of transformers' model."""
    read = theirs.prepare_embeddings_for_image_generation(tokens[:, :-1])
    x = torch.cat([theirs.get_input_embeddings()(ids), read], dim=1)
    mask = torch.cat([mask, torch.ones_like(tokens[:, :-1])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = theirs.model.language_model(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    scores: Tensor = theirs.model.generation_head(hidden.last_hidden_state[:, ids.shape[1] - 1 :])
    return scores


# Training.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_image_tokens(ours: Ours, theirs: Any, variant: str, dtype: torch.dtype) -> None:
    """Logits, loss and the gradient of every parameter that takes part."""
    model, other = ours(variant, dtype), theirs(variant, dtype)
    (ids, mask), tokens = drawing_prompt([5, 2]), tokens_of(2)
    for each in (model, other):
        each.zero_grad()
    out = model(ids, attention_mask=mask, image_tokens=tokens, return_logits=True)
    logits = their_scores(other, ids, mask, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    tolerance = EXACT if dtype == torch.float64 else TOLERANCE
    assert distance(out.logits, logits) < tolerance and distance(out.loss, loss) < tolerance
    assert out.loss.dtype == dtype
    assert model(ids, attention_mask=mask, image_tokens=tokens).logits is None
    out.loss.backward()
    loss.backward()
    pairs = {
        "image_embed.weight": other.model.generation_embeddings.weight,
        "image_aligner.0.weight": other.model.generation_aligner.fc1.weight,
        "image_head.0.bias": other.model.generation_head.proj_out.bias,
        "image_head.2.weight": other.model.generation_head.vision_head.weight,
        "image_head.2.bias": other.model.generation_head.vision_head.bias,
        "decoder.embed.weight": other.model.language_model.embed_tokens.weight,
        "decoder.norm.weight": other.model.language_model.norm.weight,
    }
    for layer, theirs_layer in enumerate(other.model.language_model.layers):
        pairs |= {
            f"decoder.blocks.{layer}.attention.k_proj.weight": theirs_layer.self_attn.k_proj.weight,
            f"decoder.blocks.{layer}.mlp.down_proj.weight": theirs_layer.mlp.down_proj.weight,
            f"decoder.blocks.{layer}.attention_norm.weight": theirs_layer.input_layernorm.weight,
        }
    for name, parameter in pairs.items():
        assert distance(model.get_parameter(name).grad, parameter.grad) < 4 * tolerance, name
    unused = ("vision", "aligner.", "vq.", "head.")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name.startswith(unused)), name


def test_padding_changes_nothing(ours: Ours) -> None:
    """On the left, on the right, or none."""
    model, tokens, ids = ours(PLAIN), tokens_of(1), torch.tensor([[BOS, 5, 6, START]])
    with torch.no_grad():
        expected = model(ids, image_tokens=tokens, return_logits=True).logits
        for left, right in ((2, 0), (0, 3)):
            longer = F.pad(ids, (left, right), value=7)
            mask = F.pad(torch.ones_like(ids), (left, right))
            out = model(longer, attention_mask=mask, image_tokens=tokens, return_logits=True)
            assert distance(out.logits, expected) < TOLERANCE


def test_no_logits_exist_in_training(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer is called by no one but the loss; a layer in its place is."""
    model, tokens = Janus.from_size("tiny"), tokens_of(1) % 32
    ids = torch.tensor([[1, 5, 126]])
    seen: list[tuple[int, ...]] = []

    def counted(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(tuple(hidden.shape))
        return linear_cross_entropy(hidden, *args, **options)

    monkeypatch.setattr("mmkernels.models.janus_generation.linear_cross_entropy", counted)
    calls: list[int] = []
    hook = model.image_head[2].register_forward_hook(lambda *_: calls.append(1))
    expected = model(ids, image_tokens=tokens).loss
    assert seen == [(1, 16, 64)] and not calls
    hook.remove()

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    adapted = Adapted(64, 32)
    adapted.load_state_dict({name: x / 2 for name, x in model.image_head[2].state_dict().items()})
    model.image_head[2] = adapted
    assert distance(model(ids, image_tokens=tokens).loss, expected) < TOLERANCE


# Generation.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_image_tokens(ours: Ours, theirs: Any, variant: str, dtype: torch.dtype) -> None:
    """Greedy, with guidance, in a batch with padding on the left; and the image of them."""
    (ids, mask), model, other = drawing_prompt([5, 2]), ours(variant, dtype), theirs(variant, dtype)
    for scale in (5.0, 1.5):
        settings = {"generation_mode": "image", "do_sample": False, "guidance_scale": scale}
        expected = other.generate(ids, attention_mask=mask, **settings)
        tokens = model.generate_image(ids, attention_mask=mask, guidance_scale=scale, temperature=0.0)
        assert tokens.tolist() == expected.tolist()
        assert len(tokens.unique()) > 3
    image = other.decode_image_tokens(expected).permute(0, 3, 1, 2)
    assert distance(model.decode(tokens), image) < (EXACT if dtype == torch.float64 else TOLERANCE)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_from_the_same_probabilities(
    ours: Ours, theirs: Any, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every step; instead of a draw each model takes the least likely token that it may."""
    (ids, mask), found = drawing_prompt([5, 2]), []

    def noted(probabilities: Tensor, *args: Any, **options: Any) -> Tensor:
        found.append(probabilities.double() / probabilities.double().sum(-1, keepdim=True))  # as multinomial does
        return probabilities.masked_fill(probabilities == 0, 2.0).argmin(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", noted)
    settings = {"generation_mode": "image", "do_sample": True, "guidance_scale": 3.0, "top_k": 0}
    theirs(PLAIN, torch.float64).generate(ids, attention_mask=mask, **settings, temperature=0.7, top_p=top_p)
    expected, found[:] = list(found), []
    model = ours(PLAIN, torch.float64)
    model.generate_image(ids, attention_mask=mask, guidance_scale=3.0, temperature=0.7, top_p=top_p)
    assert len(found) == len(expected) == TOKENS
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a > 0, b > 0)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_by_hand(ours: Ours, theirs: Any, scale: float) -> None:
    """Every token is the likeliest by logits that are combined of two whole calls; 0 and 1 need one."""
    (ids, mask), model, other = drawing_prompt([4, 4]), ours(PLAIN, torch.float64), theirs(PLAIN, torch.float64)
    rows: list[int] = []
    hook = model.decoder.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    tokens = model.generate_image(ids, attention_mask=mask, guidance_scale=scale, temperature=0.0)
    hook.remove()
    assert rows == [2 if scale in (0.0, 1.0) else 4]
    nothing = torch.tensor([[BOS, *[PAD] * 4, START]] * 2)
    assert torch.equal(model.unconditional(ids), nothing)
    with torch.no_grad():
        with_prompt, without = (their_scores(other, x, mask, tokens) for x in (ids, nothing))
    assert torch.equal((without + scale * (with_prompt - without)).argmax(-1), tokens)
    assert not torch.equal(with_prompt.argmax(-1), without.argmax(-1))


def test_a_seed_fixes_the_draw(ours: Ours) -> None:
    (ids, mask), model = drawing_prompt([5, 2]), ours(PLAIN)
    draw = lambda seed: model.generate_image(ids, attention_mask=mask, seed=seed)
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_padding_changes_no_image(ours: Ours) -> None:
    model, ids = ours(PLAIN, torch.float64), torch.tensor([[BOS, 5, 6, START]])
    expected = model.generate_image(ids, temperature=0.0)
    for left, right in ((2, 0), (0, 3)):
        longer, mask = F.pad(ids, (left, right), value=PAD), F.pad(torch.ones_like(ids), (left, right))
        assert torch.equal(model.generate_image(longer, attention_mask=mask, temperature=0.0), expected)


def test_each_token_is_read_once(ours: Ours) -> None:
    """The cache's storage is allocated once."""
    model, lengths, storages = ours(PLAIN), [], set()
    block = model.decoder.blocks[0].attention
    attend = block.attend

    def noted(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        lengths.append((query.shape[2], key.shape[2]))
        storages.add(key.untyped_storage().data_ptr())
        return attend(query, key, *args, **options)

    block.attend = noted
    try:
        model.generate_image(torch.tensor([[BOS, 5, START]]), temperature=0.0)
    finally:
        del block.attend
    assert lengths == [(3, 3), *((1, 3 + step) for step in range(1, TOKENS))]
    assert len(storages) == 1


# The tokenizer.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer(ours: Ours, theirs: Any, variant: str, dtype: torch.dtype) -> None:
    """Tokens of images, images of tokens, and the codebook's loss."""
    vq, other = ours(variant, dtype).vq, theirs(variant, dtype).model.vqmodel
    tolerance = EXACT if dtype == torch.float64 else TOLERANCE
    s = vq.sizes
    shape = (2, s.channels, s.image_side, s.image_side)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with torch.no_grad():
        expected, out = other.encode(pixels, return_dict=True), vq(pixels)
        assert torch.equal(out.tokens.flatten(), expected.image_tokens.flatten())
        assert torch.equal(ours(variant, dtype).encode_tokens(pixels), out.tokens)
        assert distance(out.loss, expected.embedding_loss) < tolerance
        assert distance(out.pixels, other.decode(out.tokens)) < tolerance
        assert distance(vq.decode(tokens_of(3)), other.decode(tokens_of(3))) < tolerance
        assert distance(vq.decode(tokens_of(3)), vq.decode(tokens_of(3).roll(1, 1))) > 0.05
    assert len(out.tokens.unique()) > 3


@pytest.mark.parametrize("directions", [False, True])
def test_gradients_pass_the_codebook(directions: bool) -> None:
    """As if the encoder's values had not been rounded; by hand."""
    sizes = VQSizes(
        codes=8, code_width=4, latent=8, width=32, multipliers=(1,), blocks=1, side=3, directions=directions
    )
    torch.manual_seed(0)
    vq = VQ(sizes).double()
    pixels = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    out = vq(pixels)
    out.pixels.square().mean().backward()
    gradient = vq.quant_conv.weight.grad
    assert gradient is not None and vq.quantize["embedding"].weight.grad is None
    latents = vq.quant_conv(vq.encoder(pixels).flatten(2).transpose(1, 2))
    if directions:
        latents = F.normalize(latents, dim=-1)
    codebook = vq.quantize["embedding"].weight
    codebook = F.normalize(codebook, dim=-1) if directions else codebook
    nearest = torch.cdist(latents.detach(), codebook.detach()[None]).argmin(-1)
    assert torch.equal(nearest, out.tokens)
    codes = codebook[nearest].detach().requires_grad_()
    x = vq.post_quant_conv(F.normalize(codes, dim=-1)).transpose(1, 2).unflatten(2, (3, 3))
    (of_codes,) = torch.autograd.grad(vq.decoder(x).square().mean(), codes)
    (expected,) = torch.autograd.grad((latents * of_codes).sum(), vq.quant_conv.weight, retain_graph=True)
    assert distance(gradient, expected) < EXACT

    vq.zero_grad()
    vq(pixels).loss.backward()
    pulled = (latents - codes.detach()).square().mean() + 0.25 * (codebook[nearest] - latents.detach()).square().mean()
    wanted = (vq.quant_conv.weight, vq.quantize["embedding"].weight)
    for parameter, by_hand in zip(wanted, torch.autograd.grad(pulled, wanted), strict=True):
        assert distance(parameter.grad, by_hand) < EXACT


def test_of_equal_codes_the_first_is_taken() -> None:
    """Also where the codes are compared in several strips."""
    vq = VQ(VQSizes(codes=5000, code_width=2, latent=4, width=32, multipliers=(1,), blocks=1, side=2))
    with torch.no_grad():
        codes = vq.quantize["embedding"].weight.fill_(9.0)
        codes[[3, 7, 2048, 4999]] = torch.tensor([1.0, 2.0])
        codes[[2050, 4097]] = torch.tensor([-1.0, 0.5])
    latents = torch.tensor([[[1.0, 2.1], [-1.0, 0.4], [9.0, 9.0], [1.0, 2.0]]])
    assert vq._nearest(latents, vq.codebook).tolist() == [[3, 2050, 0, 3]]


def test_tokens_of_the_other_kind() -> None:
    """A released model, read as transformers computes its tokens, gives those that it was trained on, too."""
    raw, by_directions = (Janus.from_size("tiny", seed=1, vq_codes=1024, vq_directions=way) for way in (False, True))
    by_directions.load_state_dict(raw.state_dict())
    pixels = 2 * torch.rand(4, 3, 8, 8) - 1
    usual, other = raw.encode_tokens(pixels), by_directions.encode_tokens(pixels)
    assert float((usual != other).float().mean()) > 0.1
    assert torch.equal(raw.encode_tokens(pixels, directions=True), other)
    assert torch.equal(by_directions.encode_tokens(pixels, directions=False), usual)
    with pytest.raises(TypeError, match="directions must be a bool, got str"):
        raw.encode_tokens(pixels, directions="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("directions", [False, True])
def test_the_nearest_code_of_16_bit_latents(directions: bool) -> None:
    """They are training targets: of distances that are rounded to 16 bits one of twenty is another code's."""
    g = torch.Generator().manual_seed(0)
    sizes = VQSizes(codes=4096, code_width=8, latent=4, width=32, multipliers=(1,), blocks=1, side=16)
    vq = VQ(sizes._replace(directions=directions)).bfloat16()
    with torch.no_grad():
        vq.quantize["embedding"].weight.normal_(generator=g)
    latents = torch.randn(1, 256, 8, generator=g).bfloat16()
    found = vq._nearest(latents, vq.codebook)[0]
    distances = torch.cdist(latents[0].double(), vq.codebook.detach().double())
    torch.testing.assert_close(distances.gather(1, found[:, None])[:, 0], distances.amin(1), rtol=1e-5, atol=0.0)


# Inputs with errors.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"guidance_scale": -0.1}, "guidance_scale must be a number from 0 on, got -0.1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 0 on, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number from 0 on, got inf"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number from 0 on, got str"),
        ({"guidance_scale": None}, "guidance_scale must be a number from 0 on, got NoneType"),
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, got -1.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"input_ids": torch.tensor([[BOS, 500]])}, "input_ids must be from 0 to 127, got 1 to 500"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids must be \[B, L\], L from 1 to 497"),
        ({"input_ids": torch.zeros(1, 498, dtype=torch.long)}, r"L from 1 to 497 \(text_length, less an image\), got"),
        ({"input_ids": torch.tensor([[0.5]])}, "input_ids must be integers"),
        ({"input_ids": [[1, 2]]}, "input_ids must be integers"),
        ({"input_ids": torch.tensor([[BOS, MARKER, MARKER, START]])}, "must have 0 tokens .* for 0 images, got 2"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must be \[1, 4\] as input_ids, got shape \(1, 3\)"),
    ],
)
def test_bad_arguments_of_generation(ours: Ours, change: dict[str, Any], match: str) -> None:
    given = {"input_ids": torch.tensor([[BOS, 5, 6, START]])} | change
    with pytest.raises((TypeError, ValueError), match=match):
        ours(PLAIN).generate_image(**given)


def test_guidance_needs_to_know_what_stays_of_a_prompt() -> None:
    ids = torch.tensor([[1, 5, 126]])
    for name in ("bos_token_id", "image_start_token_id"):
        model = Janus(replace(Janus.sizes["tiny"], **{name: None})).eval()
        with pytest.raises(ValueError, match=f"{name} must be an integer in the configuration for guidance, got None"):
            model.generate_image(ids)
        assert model.generate_image(ids, guidance_scale=1.0).shape == (1, 16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_tokens": torch.full((1, TOKENS), CODES)}, "image_tokens must be from 0 to 47, got 48"),
        ({"image_tokens": torch.full((1, TOKENS), -100)}, "image_tokens must be from 0 to 47, got -100"),
        (
            {"image_tokens": torch.zeros(1, 15, dtype=torch.long)},
            r"image_tokens must be \[B, 16\], got shape \(1, 15\)",
        ),
        ({"image_tokens": torch.zeros(1, TOKENS)}, "image_tokens must be an int32 or int64 tensor, got torch.float32"),
        ({"image_tokens": [1]}, "image_tokens must be an int32 or int64 tensor, got list"),
        ({"image_tokens": tokens_of(2)}, "image_tokens must be of 1 images, one for each row of input_ids, got 2"),
        ({"pixel_values": torch.rand(1, 3, 32, 32)}, "pixel_values must be left out with image_tokens"),
        ({"labels": torch.tensor([[1, 2, 3, 4]])}, "labels must be left out with image_tokens"),
        ({"last_logits_only": True}, "last_logits_only must be left out with image_tokens"),
        ({"input_ids": torch.tensor([[BOS, 500]])}, "input_ids must be from 0 to 127"),
    ],
)
def test_bad_image_tokens(ours: Ours, change: dict[str, Any], match: str) -> None:
    given = {"input_ids": torch.tensor([[BOS, 5, 6, START]]), "image_tokens": tokens_of(1)} | change
    with pytest.raises((TypeError, ValueError), match=match):
        ours(PLAIN)(**given)


@pytest.mark.parametrize(
    ("call", "value", "match"),
    [
        ("decode", tokens_of(1)[:, :9], r"tokens must be \[B, 16\], got shape \(1, 9\)"),
        ("decode", tokens_of(1) + CODES, "tokens must be from 0 to 47"),
        ("decode", tokens_of(1).float(), "tokens must be an int32 or int64 tensor, got torch.float32"),
        ("encode_tokens", torch.rand(1, 3, 8, 9), r"pixels must be \[B, 3, 8, 8\], got shape \(1, 3, 8, 9\)"),
        ("encode_tokens", torch.rand(3, 8, 8), r"pixels must be \[B, 3, 8, 8\], got shape \(3, 8, 8\)"),
        ("encode_tokens", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "pixels must be a floating tensor, got"),
        ("encode", torch.rand(1, 3, 16, 16), r"pixel_values must be \[B, 3, 32, 32\], got shape \(1, 3, 16, 16\)"),
        ("encode", torch.ones(1, 3, 32, 32, dtype=torch.int32), "pixel_values must be a floating tensor"),
    ],
)
def test_bad_images(ours: Ours, call: str, value: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        getattr(ours(PLAIN), call)(value)


def test_int32_tokens_and_no_images(ours: Ours) -> None:
    model, tokens = ours(PLAIN), tokens_of(2)
    assert torch.equal(model.decode(tokens.int()), model.decode(tokens))
    ids = torch.tensor([[BOS, 5, START]] * 2)
    with torch.no_grad():
        expected = model(ids, image_tokens=tokens).loss
        assert torch.equal(model(ids.int(), image_tokens=tokens.int()).loss, expected)
    assert model.decode(tokens[:0]).shape == (0, 3, 8, 8)
    assert model.encode_tokens(torch.rand(0, 3, 8, 8)).shape == (0, TOKENS)
