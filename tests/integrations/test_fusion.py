"""`co_attention` in transformers' GroundingDINO and MM-GroundingDINO: the same results as with their own formula."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import MMGroundingDinoFusionLayer

import mmkernels
from mmkernels.integrations.patching import grounding_dino
from mmkernels.integrations.transformers import fuse_co_attention, restore_co_attention
from mmkernels.testing.models import build, randomise
from mmkernels.transformers_version import VersionError

SWIN: dict[str, Any] = {
    "model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1],
    "num_heads": [1, 2, 2], "window_size": 2, "out_features": ["stage2", "stage3"],
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 32, "num_queries": 5, "num_feature_levels": 3, "max_text_len": 16,
    "disable_custom_kernels": True, "fusion_droppath": 0.0, "fusion_dropout": 0.0, "encoder_n_points": 2,
}  # fmt: skip
LAYERS = {"GroundingDino": GroundingDinoFusionLayer, "MMGroundingDino": MMGroundingDinoFusionLayer}
F64 = torch.float64


def fusion_layer(name: str = "GroundingDino", **changes: Any) -> nn.Module:
    """Returns a layer of transformers in float64, with random weights; its own scale of 0.0001 would hide all."""
    config = getattr(transformers, f"{name}Config")(**CONFIG | changes)
    return randomise(LAYERS[name](config), std=0.3).double().eval()


def features(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, size, 32, generator=generator, dtype=F64) for size in (45, 7))  # type: ignore[return-value]


def padding(size: int, *lengths: int) -> Tensor:
    """True: padding, as the layers take it."""
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


MASKS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "none": (None, None),
    "text": (None, padding(7, 7, 3)),
    "image": (padding(45, 30, 45), None),
    "both": (padding(45, 45, 20), padding(7, 4, 7)),
}


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, masks: str, backend: str) -> None:
    """Results and all gradients, in evaluation and in training."""
    theirs = fusion_layer(name)
    ours = copy.deepcopy(theirs)
    assert fuse_co_attention(ours) == 1
    for mode in (False, True):
        found = []
        for layer in (theirs.train(mode), ours.train(mode)):
            inputs = [x.requires_grad_() for x in features()]
            with mmkernels.use_backend(backend):
                (vision, _), (text, weights) = layer(*inputs, *MASKS[masks])
                assert (weights is None) == (layer is ours)
                loss = vision.cos().sum() + text.cos().sum()
                found.append([vision, text, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_scores_that_are_clamped() -> None:
    """Weights so large that scores lie more than 50,000 below the largest one: they are raised as in transformers."""
    theirs = fusion_layer()
    with torch.no_grad():
        theirs.attn.vision_proj.weight *= 3e3  # type: ignore[union-attr, operator]
        theirs.attn.text_proj.weight *= 3e3  # type: ignore[union-attr, operator]
    ours = copy.deepcopy(theirs)
    fuse_co_attention(ours)
    (vision, _), (text, _) = theirs(*features())
    (fused, _), (other, _) = ours(*features())
    torch.testing.assert_close(fused, vision, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other, text, rtol=1e-9, atol=1e-9)
    attn: Any = ours.attn
    layer_norms = ours.layer_norm_vision(features()[0]), ours.layer_norm_text(features()[1])  # type: ignore[operator]
    q, k = attn.vision_proj(layer_norms[0]), attn.text_proj(layer_norms[1])
    assert float((q @ k.transpose(1, 2)).detach().abs().max()) > 1e6  # or nothing would have been raised


def test_dropout() -> None:
    """Of probabilities, in training mode alone: on average it changes nothing."""
    layer = fusion_layer(fusion_dropout=0.3)
    fuse_co_attention(layer)
    attn: Any = layer.attn
    image, text = (x[:1] for x in features())
    expected = attn(image, text)
    assert torch.equal(attn(image, text)[0][0], expected[0][0])
    layer.train()
    with torch.no_grad():
        drawn = attn(image.expand(300, -1, -1), text.expand(300, -1, -1))
    for (found, _), (whole, _) in zip(drawn, expected, strict=True):
        assert not torch.equal(found[0], found[1])
        assert float(((found.mean(0) - whole[0]).norm() / whole[0].norm()).detach()) < 0.1


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_is_hidden(side: int) -> None:
    """The other one gets nothing but its last layer's bias (transformers: NaN); what is hidden may be NaN."""
    layer = fusion_layer()
    fuse_co_attention(layer)
    attn: Any = layer.attn
    inputs, masks = list(features()), [None, None]
    sizes = [x.shape[1] for x in inputs]
    masks[side] = padding(sizes[side], 0, sizes[side])  # type: ignore[call-overload]
    inputs[side][0] = torch.nan
    out = attn(*inputs, *masks)[1 - side][0]
    bias = (attn.out_text_proj, attn.out_vision_proj)[side].bias
    torch.testing.assert_close(out[0], bias.expand_as(out[0]))
    assert torch.isfinite(out).all()
    empty = list(features())
    empty[side] = empty[side][:, :0]
    out = attn(*empty)[1 - side][0]
    torch.testing.assert_close(out, bias.expand_as(out))


@cache
def model(name: str) -> Any:
    config = CONFIG | {"backbone_config": SWIN, "text_config": BERT}
    return randomise(build(f"{name}ForObjectDetection", config), std=0.3).eval()


@cache
def inputs() -> dict[str, Tensor]:
    """Two images, one of them padded, and texts of two phrases."""
    ids = torch.tensor([[2, 10, 11, 4, 12, 3], [2, 15, 4, 3, 0, 0]])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 32, 32, dtype=torch.long)
    seen[1, 20:] = seen[1, :, 25:] = 0
    return {"pixel_values": pixels, "pixel_mask": seen, "input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("name", LAYERS)
def test_a_model(name: str) -> None:
    """Boxes and logits of a whole detector."""
    theirs = model(name)
    ours = copy.deepcopy(theirs)
    assert fuse_co_attention(ours) == 2 == fuse_co_attention(ours)
    with torch.no_grad():
        expected, found = theirs(**inputs()), ours(**inputs())
        changed = ours(**inputs() | {"input_ids": inputs()["input_ids"].flip(0)})
    for part in ("pred_boxes", "encoder_last_hidden_state_vision", "encoder_last_hidden_state_text"):
        torch.testing.assert_close(found[part], expected[part], rtol=2e-5, atol=2e-5)
    finite = expected.logits.isfinite()
    torch.testing.assert_close(found.logits[finite], expected.logits[finite], rtol=2e-5, atol=2e-5)
    vision = found.encoder_last_hidden_state_vision
    assert float((changed.encoder_last_hidden_state_vision - vision).norm() / vision.norm()) > 0.05


def test_the_op_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = grounding_dino.co_attention
    monkeypatch.setattr(grounding_dino, "co_attention", lambda *x, **y: calls.append(y["clamp"]) or original(*x, **y))
    ours = copy.deepcopy(model("GroundingDino"))
    fuse_co_attention(ours)
    with torch.no_grad():
        ours(**inputs())
        assert calls == [50_000.0] * 2
        model("GroundingDino")(**inputs())  # which was not changed
    assert len(calls) == 2


def test_copies_pickles_and_the_way_back() -> None:
    ours = fusion_layer()
    (expected, weights), _ = ours(*features())
    fuse_co_attention(ours)
    for fused in (copy.deepcopy(ours), ours):
        (vision, nothing), _ = fused(*features())
        assert nothing is None
        torch.testing.assert_close(vision, expected)
        loaded = pickle.loads(pickle.dumps(fused))  # as transformers wrote it: it loads where mmkernels is missing
        for layer in (loaded, fused):
            assert restore_co_attention(layer) == int(layer is fused) and restore_co_attention(layer) == 0
            (vision, again), _ = layer(*features())
            assert torch.equal(vision, expected) and torch.equal(again, weights)


@pytest.mark.parametrize("how", ["argument", "configuration"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_weights_are_as_before(name: str, how: str) -> None:
    theirs = copy.deepcopy(model(name))
    if how == "configuration":
        for part in theirs.modules():
            if hasattr(part, "config"):
                part.config._output_attentions = True
    ours = copy.deepcopy(theirs)
    fuse_co_attention(ours)
    asked = {"output_attentions": True} if how == "argument" else {}
    with torch.no_grad():
        expected, found = (x(**inputs(), **asked).encoder_attentions for x in (theirs, ours))
        assert len(found[0]) == 2
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
        if how == "argument":
            assert ours(**inputs()).encoder_attentions is None


def test_other_layers_are_refused() -> None:
    for call in (fuse_co_attention, restore_co_attention):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            call("grounding_dino")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must contain a GroundingDinoBi.* or MM.*, got a Linear without one"):
        fuse_co_attention(nn.Linear(2, 2))
    assert restore_co_attention(nn.Linear(2, 2)) == 0

    layer = fusion_layer()
    attn: Any = layer.attn
    del attn.values_text_proj
    with pytest.raises(VersionError, match=r"GroundingDinoBiMultiHeadAttention without values_text_proj"):
        fuse_co_attention(layer)

    class Changed(type(attn)):  # type: ignore[misc]
        def forward(self, vision_features: Tensor, text_features: Tensor) -> None: ...

    layer = fusion_layer()
    attn = layer.attn
    attn.__class__ = Changed
    with pytest.raises(ValueError, match=r"got one where Changed has a forward of its own"):
        fuse_co_attention(layer)
    assert type(attn) is Changed


def test_masks_must_be_bool() -> None:
    layer: Any = fusion_layer()
    fuse_co_attention(layer)
    vision, text = features()
    for name, x in (("vision_attention_mask", vision), ("text_attention_mask", text)):
        for dtype in (torch.int64, torch.float32):
            with pytest.raises(TypeError, match=rf"{name} must be bool \(True = padding\), got {dtype}"):
                layer.attn(vision, text, **{name: torch.zeros(x.shape[:2], dtype=dtype)})


def test_compiles_whole() -> None:
    layer = fusion_layer().float()
    fuse_co_attention(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    given = [x.float() for x in features()]
    torch.testing.assert_close(compiled(*given, *MASKS["both"]), layer(*given, *MASKS["both"]))


def test_sixteen_bits() -> None:
    layer = fusion_layer()
    (expected, _), (other, _) = layer(*features())
    fuse_co_attention(layer.bfloat16())
    (vision, _), (text, _) = layer(*(x.bfloat16() for x in features()))
    for found, want in ((vision, expected), (text, other)):
        assert found.dtype == torch.bfloat16 and float((found - want).norm() / want.norm()) < 0.02
