"""CLIP and SigLIP against transformers' models."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Saved, configure, distance
from clip_checkpoints import EOS, VARIANTS, inputs
from pairs import parametrize
from safetensors.torch import save_file
from torch import Tensor

import mmkernels
from mmkernels.models import CLIP
from mmkernels.models.clip import SIZES
from mmkernels.runtime import cpu

BACKENDS = ("cpu", "chunked", "reference")
# Both models compute in another order: measured over all cases here, in float64 at most 2e-15 (gradients 3e-14, of the
# bias, a sum that cancels), in float32 9e-7 (gradients of "cpu" 4e-6, of the bias 8e-6). The smallest real difference
# tried (the norms of SigLIP's image tower with epsilon 1e-5 for 1e-6) gives 2e-6, another activation from 2e-4.
EXACT = 1e-12
TOLERANCE = 5e-6
TOLERANCES = ((torch.float64, EXACT), (torch.float32, TOLERANCE))  # "cpu" has no float64


def skip_unless_it_runs(backend: str) -> None:
    if backend == "cpu" and cpu.why_not() is not None:
        pytest.skip(str(cpu.why_not()))


@pytest.fixture(scope="module")
def ours(saved: Callable[[str], Saved]) -> Callable[..., CLIP]:
    """variant, dtype -> our model, which is loaded once."""
    return cache(lambda variant, dtype=torch.float32: CLIP.from_pretrained(saved(variant).folder, dtype=dtype))


def run(model: Any, saved: Saved, dtype: torch.dtype, padding: str | None) -> Any:
    """Returns the output, with the loss, of our model or of transformers'."""
    ids, mask, pixels = inputs(saved.theirs, padding=padding)
    mask = mask if padding else None
    model.to(dtype).zero_grad()
    return model(input_ids=ids, pixel_values=pixels.to(dtype), attention_mask=mask, return_loss=True)


@pytest.fixture(scope="module")
def theirs(saved: Callable[[str], Saved]) -> Callable[..., Any]:
    """variant, dtype, padding -> the output of transformers' model, which is computed once."""

    @cache
    def get(variant: str, dtype: torch.dtype, padding: str | None) -> Any:
        with torch.no_grad():
            return run(saved(variant).theirs, saved(variant), dtype, padding)

    return get


@pytest.fixture(scope="module")
def their_gradients(
    saved: Callable[[str], Saved], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Tensor]]:
    """variant, dtype -> the gradient of every parameter, by our names, which is computed once.

    transformers' gradients are saved as a checkpoint, which our model reads as its weights.
    """

    @cache
    def get(variant: str, dtype: torch.dtype) -> dict[str, Tensor]:
        checkpoint, folder = saved(variant), tmp_path_factory.mktemp("gradients")
        run(checkpoint.theirs, checkpoint, dtype, "right").loss.backward()
        shutil.copy(checkpoint.folder / "config.json", folder)
        grads = {name: p.grad.contiguous() for name, p in checkpoint.theirs.named_parameters()}
        save_file(grads, folder / "model.safetensors")
        return CLIP.from_pretrained(folder, dtype=dtype).state_dict()

    return get


@parametrize("variant, padding, backend", list(itertools.product(VARIANTS, [None, "left", "right"], BACKENDS)))
def test_features_logits_and_loss(
    saved: Callable[[str], Saved],
    ours: Callable[..., CLIP],
    theirs: Callable[..., Any],
    variant: str,
    padding: str | None,
    backend: str,
) -> None:
    skip_unless_it_runs(backend)
    for dtype, tolerance in TOLERANCES[backend == "cpu" :]:
        with torch.no_grad(), mmkernels.use_backend(backend):
            out = run(ours(variant, dtype), saved(variant), dtype, padding)
        expected = theirs(variant, dtype, padding)
        assert out.loss is not None
        for name, actual, other in (
            ("image", out.image_features, expected.image_embeds),
            ("text", out.text_features, expected.text_embeds),
            ("logits", out.logits_per_image, expected.logits_per_image),
            ("transposed", out.logits_per_text, expected.logits_per_text),
            ("loss", out.loss, expected.loss),
        ):
            assert actual.dtype == dtype
            assert distance(actual, other) < tolerance, (name, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(
    saved: Callable[[str], Saved],
    ours: Callable[..., CLIP],
    their_gradients: Callable[..., dict[str, Tensor]],
    variant: str,
    backend: str,
) -> None:
    skip_unless_it_runs(backend)
    dtype, tolerance = (torch.float32, 2e-5) if backend == "cpu" else (torch.float64, EXACT)
    model, expected = ours(variant, dtype), their_gradients(variant, dtype)
    with mmkernels.use_backend(backend):
        run(model, saved(variant), dtype, "right").loss.backward()
    largest = max(float(x.norm()) for x in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name.endswith("attention.k_proj.bias"):  # every logit of a row shifts alike
            assert float(parameter.grad.norm()) < tolerance * largest
            assert float(expected[name].norm()) < tolerance * largest
        else:
            assert distance(parameter.grad, expected[name]) < tolerance, name
    assert float(model.logit_scale.grad.abs()) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_matter(saved: Callable[[str], Saved], variant: str) -> None:
    """Else parity would prove little."""
    checkpoint = saved(variant)
    ours = CLIP.from_pretrained(checkpoint.folder)
    ids, mask, pixels = inputs(checkpoint.theirs)
    with torch.no_grad():
        image, text = ours.encode_image(pixels), ours.encode_text(ids)
        assert distance(ours.encode_image(pixels.flip(0)), image) > 0.05
        assert distance(ours.encode_image(pixels.flip(3)), image) > 0.05
        assert distance(ours.encode_text(ids.flip(0)), text) > 0.05
        swapped = ids.clone()
        swapped[:, [0, 1]] = ids[:, [1, 0]]
        assert distance(ours.encode_text(swapped), text) > 0.01
        mask[:, 1] = 0
        assert distance(ours.encode_text(ids, mask), text) > 0.01
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(len(image)))
    raw = ours.encode_image(pixels, normalize=False), ours.encode_text(ids, normalize=False)
    for features, unit in zip(raw, (image, text), strict=True):
        assert float((features.detach().norm(dim=-1) - 1).abs().min()) > 0.05
        torch.testing.assert_close(features / features.norm(dim=-1, keepdim=True), unit)


def test_a_mask_of_ones_changes_nothing(saved: Callable[[str], Saved]) -> None:
    for variant in ("clip", "siglip"):
        checkpoint = saved(variant)
        ours = CLIP.from_pretrained(checkpoint.folder)
        ids, mask, _ = inputs(checkpoint.theirs)
        assert torch.equal(ours.encode_text(ids, mask.bool()), ours.encode_text(ids))
        assert torch.equal(ours.encode_text(ids.int(), mask), ours.encode_text(ids))


def test_which_token_a_text_ends_with(saved: Callable[[str], Saved]) -> None:
    """In a CLIP what stands after the first end-of-text token changes nothing; in a SigLIP the last token counts."""
    ids, _, _ = inputs(saved("clip").theirs)
    after = ids.clone()
    after[:, -1] = 5
    clip, siglip = (CLIP.from_pretrained(saved(variant).folder) for variant in ("clip", "siglip"))
    assert clip.config.eos_token_id == EOS
    assert torch.equal(clip.encode_text(ids), clip.encode_text(after))
    assert distance(siglip.encode_text(ids), siglip.encode_text(after)) > 0.01
    early = CLIP.from_pretrained(saved("clip_early").folder)
    assert early.config.eos_token_id is None
    after[:, 3] = 99  # the highest
    changed = after.clone()
    changed[:, 4:] = 7
    assert torch.equal(early.encode_text(after), early.encode_text(changed))


def test_texts_without_an_end(saved: Callable[[str], Saved]) -> None:
    model = CLIP.from_pretrained(saved("clip").folder)
    ids, _, _ = inputs(saved("clip").theirs)
    ids[2, ids[2] == EOS] = 7
    with pytest.raises(ValueError, match="input_ids must hold eos_token_id = 90 in every row, got none in row 2"):
        model.encode_text(ids)


def test_early_configurations(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """Where ``text_config_dict`` is there it counts, with the defaults of what it leaves out, as in transformers."""
    folder = shutil.copytree(saved("clip_gelu").folder, tmp_path / "copy")
    ids, _, pixels = inputs(saved("clip_gelu").theirs)
    text, vision = (saved("clip_gelu").theirs.config.to_dict()[f"{tower}_config"] for tower in ("text", "vision"))
    del text["hidden_act"]
    configure(folder, text_config_dict=text, vision_config_dict=vision, vision_config=...)
    ours, theirs = CLIP.from_pretrained(folder), transformers.CLIPModel.from_pretrained(folder)
    assert (ours.config.text_activation, ours.config.vision_activation) == ("quick_gelu", "gelu_pytorch_tanh")
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=pixels)
        assert distance(ours.encode_text(ids), out.text_embeds) < TOLERANCE
        assert distance(ours.encode_image(pixels), out.image_embeds) < TOLERANCE
    configure(folder, text_config_dict=None, vision_config=vision)
    assert CLIP.from_pretrained(folder).config.text_activation == "gelu"


def test_ids_of_several_captions(saved: Callable[[str], Saved]) -> None:
    """Ids reach the losses; more texts than images."""
    for variant in ("clip", "siglip"):
        checkpoint = saved(variant)
        model = CLIP.from_pretrained(checkpoint.folder, dtype=torch.float64)
        ids, _, pixels = inputs(checkpoint.theirs)
        pixels, about = pixels[:3].double(), {"image_ids": torch.arange(3), "text_ids": torch.tensor([0, 0, 1, 2, 2])}
        out = model(ids, pixels, return_loss=True, **about)
        logits, same = out.logits_per_image, about["image_ids"][:, None] == about["text_ids"]
        if variant == "siglip":
            expected = -torch.nn.functional.logsigmoid(logits * (2.0 * same - 1)).sum() / 3
        else:
            rows = [
                -((log * same).sum(d) / same.sum(d)).mean()
                for d, log in ((1, logits.log_softmax(1)), (0, logits.log_softmax(0)))
            ]
            expected = (rows[0] + rows[1]) / 2
        torch.testing.assert_close(out.loss, expected)
        with pytest.raises(ValueError, match="text must have as many rows as image, 3"):
            model(ids, pixels, return_loss=True)
        with pytest.raises(ValueError, match="return_loss must be True, got False"):
            model(ids, pixels, **about)
        assert model(ids, pixels).loss is None
        assert model(ids, pixels).logits_per_image.shape == (3, 5)


@pytest.mark.parametrize("size", ["tiny", "siglip_tiny"])
def test_from_size(size: str) -> None:
    model, again, other = CLIP.from_size(size), CLIP.from_size(size), CLIP.from_size(size, seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.isfinite(parameter).all()
    assert not torch.equal(model.text.embed.weight, other.text.embed.weight)
    scale, bias = (10.0, -10.0) if size == "siglip_tiny" else (1 / 0.07, None)
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(scale))
    assert (None if model.logit_bias is None else float(model.logit_bias.detach())) == bias
    with pytest.raises(ValueError, match=r"size must be one of tiny, small, base, .*, got 'huge'"):
        CLIP.from_size("huge")
    with pytest.raises(ValueError, match=r"size must be one of tiny, small, base, .*, got \['tiny'\]"):
        CLIP.from_size(["tiny"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a floating dtype, got torch.int32"):
        CLIP.from_size("tiny", dtype=torch.int32)


def test_sizes_are_those_of_the_papers() -> None:
    """Parameters in millions: ViT-B/16 has 149.6 (open_clip's table), SigLIP B/16 203.2 (its model card)."""
    for size, millions in (("base", 149.6), ("siglip_base", 203.2)):
        with torch.device("meta"):
            model = CLIP(SIZES[size])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_sixteen_bits(saved: Callable[[str], Saved]) -> None:
    for variant in ("clip", "siglip"):
        ids, mask, pixels = inputs(saved(variant).theirs, padding="right")
        wide = CLIP.from_pretrained(saved(variant).folder)
        model = CLIP.from_pretrained(saved(variant).folder, dtype=torch.bfloat16)
        expected, out = (m(ids, pixels, attention_mask=mask, return_loss=True) for m in (wide, model))
        assert (out.image_features.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.loss, expected.loss, rtol=0.02, atol=0)
        out.loss.backward()
        assert model.logit_scale.grad.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = wide(ids, pixels, attention_mask=mask, return_loss=True)
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss, expected.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("variant", ["clip", "siglip"])
def test_compile(saved: Callable[[str], Saved], variant: str) -> None:
    ids, mask, pixels = inputs(saved(variant).theirs, padding="right")
    model = CLIP.from_pretrained(saved(variant).folder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(ids, pixels, attention_mask=mask, return_loss=True)
    out = compiled(ids, pixels, attention_mask=mask, return_loss=True)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    assert model.logit_scale.grad is not None


def refused(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_bad_images(saved: Callable[[str], Saved]) -> None:
    model = CLIP.from_pretrained(saved("siglip").folder)
    encode: Callable[[Any], Callable[[], Tensor]] = lambda pixels: lambda: model.encode_image(pixels)
    shape = r"pixel_values must be \[B, 3, 32, 32\], got shape "
    for bad in ((2, 3, 40, 40), (2, 3, 32, 24), (2, 1, 32, 32), (3, 32, 32), (1, 2, 3, 32, 32)):
        refused(encode(torch.zeros(bad)), ValueError, shape + str(bad).replace("(", r"\(").replace(")", r"\)"))
    refused(encode(torch.zeros(2, 3, 32, 32).byte()), TypeError, "must be a floating tensor, got torch.uint8")
    refused(encode([[0.0]]), TypeError, "pixel_values must be a floating tensor, got list")
    assert torch.isnan(model.encode_image(torch.full((1, 3, 32, 32), torch.nan))).all()


def test_bad_texts(saved: Callable[[str], Saved]) -> None:
    for variant in ("clip", "siglip"):
        model = CLIP.from_pretrained(saved(variant).folder)
        ids = torch.full((2, 5), EOS)

        def encode(ids: Any, mask: Any = None, model: CLIP = model) -> Callable[[], Tensor]:
            return lambda: model.encode_text(ids, mask)

        refused(encode(ids.float()), TypeError, "input_ids must be an int32 or int64 tensor, got torch.float32")
        refused(encode([[1]]), TypeError, "input_ids must be an int32 or int64 tensor, got list")
        refused(encode(ids[0]), ValueError, r"input_ids must be \[B, L\], L from 1 to 12, got shape \(5,\)")
        refused(encode(ids[:, :0]), ValueError, r"L from 1 to 12, got shape \(2, 0\)")
        refused(encode(ids.repeat(1, 3)), ValueError, r"L from 1 to 12, got shape \(2, 15\)")
        refused(encode(ids + 10), ValueError, "input_ids must be from 0 to 99, got 100$")
        refused(encode(-ids), ValueError, "input_ids must be from 0 to 99, got -90")
        refused(
            encode(ids, ids[:, :3]), ValueError, r"attention_mask must be \[2, 5\] as input_ids, got shape \(2, 3\)"
        )
        refused(encode(ids, torch.zeros(2, 5)), TypeError, "attention_mask must be a bool or integer tensor, got")
        refused(encode(ids, [[1] * 5] * 2), TypeError, "attention_mask must be a bool or integer tensor, got list")
        # Nothing but padding: attention sees nothing, and the result is finite.
        assert torch.isfinite(model.encode_text(ids, torch.zeros_like(ids))).all()
