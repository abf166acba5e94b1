"""Reducers in a model: what they choose by, where each patch goes, and Flamingo with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels
from mmkernels.models import Flamingo
from mmkernels.models.blocks.encoder import Heads, Sizes
from mmkernels.models.blocks.reduction import PatchReducer, class_attention
from mmkernels.models.blocks.vision import VisionTransformer

WIDTH, HEADS, IMAGES = 16, 4, 3


def encoder(class_token: bool = True) -> VisionTransformer:
    """One with 5 x 5 patches, which windows of 2 do not divide."""
    sizes = Sizes(width=WIDTH, layers=2, heads=HEADS, mlp=32)
    return VisionTransformer(sizes, image_size=20, patch_size=4, class_token=class_token)


@pytest.fixture
def encoded() -> tuple[VisionTransformer, Tensor, Heads]:
    vision = encoder()
    with torch.no_grad():
        return vision, *vision.with_heads(torch.randn(IMAGES, 3, 20, 20))


def test_heads_are_those_of_the_last_layer() -> None:
    vision, pixels = encoder(), torch.randn(IMAGES, 3, 20, 20)
    features, heads = vision.with_heads(pixels)
    torch.testing.assert_close(features, vision(pixels))
    normed: list[Tensor] = []
    vision.blocks[-1].attention_norm.register_forward_hook(lambda module, args, out: normed.append(out))
    vision(pixels)
    for name in ("q_proj", "k_proj"):
        expected = getattr(vision.blocks[-1].attention, name)(normed[0]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        torch.testing.assert_close(heads.query if name == "q_proj" else heads.key, expected)


@pytest.mark.parametrize("class_token", [True, False])
def test_class_attention_is_the_mean_of_the_softmax(class_token: bool) -> None:
    heads = Heads(torch.randn(2, HEADS, 7, 5), torch.randn(2, HEADS, 7, 5))
    probabilities = (heads.query @ heads.key.mT * 5**-0.5).softmax(-1).mean(1)  # [2, queries, keys]
    expected = probabilities[:, 0] if class_token else probabilities.mean(1)
    torch.testing.assert_close(class_attention(heads, class_token=class_token), expected)


def test_by_what_patches_are_chosen(encoded: tuple[VisionTransformer, Tensor, Heads]) -> None:
    vision, features, heads = encoded
    kept = PatchReducer("select:4", vision)(features, heads)
    best = class_attention(heads)[:, 1:].topk(4).indices.sort().values
    torch.testing.assert_close(kept.x[:, 1:], features[:, 1:].gather(1, best[..., None].expand(-1, -1, WIDTH)))
    merged = PatchReducer("tome:15", vision)(features, heads)
    expected, *_, assignment = mmkernels.merge_tokens(features, 26, 16, metric=heads.key.mean(1), protect=1)
    torch.testing.assert_close(merged.x, expected)
    assert torch.equal(merged.assignment, assignment)


KINDS = ["none", "pool:2", "pool:3", "pool:<=10", "pool:<=100", "tome:0.4", "tome:24", "select:0.25", "diverse:6"]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("text", KINDS)
def test_each_token_is_the_mean_of_the_patches_that_went_to_it(text: str, class_token: bool) -> None:
    vision = encoder(class_token)
    first = int(class_token)
    with torch.no_grad():
        features, heads = vision.with_heads(torch.randn(IMAGES, 3, 20, 20))
        reducer = PatchReducer(text, vision)
        reduced = reducer(features, heads)
    token_of = reducer.token_of(reduced)
    assert reduced.x.shape == (IMAGES, reducer.tokens, WIDTH)
    assert torch.equal(reduced.x[:, :first], features[:, :first])
    assert token_of.shape == (IMAGES, 25) and token_of.dtype == torch.int64
    assert (token_of.min() < 0) == ("select" in text or "diverse" in text)
    for image in range(IMAGES):
        assert set(token_of[image].tolist()) - {-1} == set(range(reducer.tokens - first))
        for token in range(reducer.tokens - first):
            if text == "pool:<=10":  # windows overlap
                continue
            mean = features[image, first:][token_of[image] == token].mean(0)
            torch.testing.assert_close(reduced.x[image, first + token], mean)


def test_windows_that_overlap_have_their_first_patch(encoded: tuple[VisionTransformer, Tensor, Heads]) -> None:
    vision, features, _ = encoded
    reducer = PatchReducer("pool:<=10", vision)
    token_of = reducer.token_of(reducer(features))[0].view(5, 5)
    assert token_of[:, 0].tolist() == [0, 0, 3, 3, 6] and token_of[0].tolist() == [0, 0, 1, 1, 2]


def test_a_perceiver_has_any_patch_in_any_token(encoded: tuple[VisionTransformer, Tensor, Heads]) -> None:
    vision, features, _ = encoded
    reducer = PatchReducer("perceiver:4", vision)
    assert reducer.tokens == 5 and reducer.token_of(reducer(features)) is None


def test_heads_that_are_missing(encoded: tuple[VisionTransformer, Tensor, Heads]) -> None:
    vision, features, _ = encoded
    for text in ("select:0.5", "tome:0.5"):
        with pytest.raises(ValueError, match="heads must be query and key of the last layer for"):
            PatchReducer(text, vision)(features)


# Flamingo.

IDS = torch.tensor([[5, 127, 6, 127, 7]])
PIXELS = torch.randn(1, 2, 3, 32, 32)


def flamingo(text: str) -> Flamingo:
    return Flamingo.from_size("tiny", reduce=text).eval()


def test_all_weights_but_the_reducers_are_the_same() -> None:
    whole = dict(flamingo("none").named_parameters())
    for text in ("pool:2", "perceiver:4", "shuffle:2"):
        weights = dict(flamingo(text).named_parameters())
        assert all(torch.equal(weights[name], weight) for name, weight in whole.items())
        assert {name.split(".")[0] for name in weights.keys() - whole.keys()} <= {"reducer"}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("none", 17), ("pool:2", 5), ("tome:0.5", 9), ("select:0.25", 5), ("perceiver:4", 5), ("shuffle:2", 5)],
)
def test_flamingo_sees_what_the_reducer_leaves(text: str, tokens: int) -> None:
    model = flamingo(text)
    with torch.no_grad():
        features, heads = model.encode_with_heads(PIXELS)
        visual = model.resample(features, heads)
        assert visual.shape == (1, 2, tokens, 32)
        assert (heads is not None) == (text[:4] in ("tome", "sele"))
        torch.testing.assert_close(features, model.encode_images(PIXELS))
        by_stages = model(IDS, media_index=torch.tensor([[-1, 0, 0, 1, 1]]), visual_cache=model.cache_images(visual))
        whole = model(IDS, PIXELS)
    torch.testing.assert_close(by_stages.logits, whole.logits)
    assert whole.visual_cache.lengths == [tokens, tokens]
    assert model.generate(IDS, PIXELS, max_new_tokens=3, eos_token_id=()).tokens.shape == (1, 3)


def test_without_a_reducer_all_features_are_visual_tokens() -> None:
    model = flamingo("none")
    features = model.encode_images(PIXELS)
    assert torch.equal(model.resample(features), features)


@pytest.mark.parametrize("text", ["pool:2", "tome:0.5", "select:0.25"])
def test_a_training_step_reaches_the_encoder(text: str) -> None:
    model = flamingo(text)
    model(IDS, PIXELS, labels=IDS).loss.backward()
    for parameter in (model.vision.patch.weight, model.vision.class_token):
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("text", ["tome:0.5", "select:0.25"])
def test_one_graph(text: str) -> None:
    model = flamingo(text)

    def visual(pixels: Tensor) -> Tensor:
        return model.resample(*model.encode_with_heads(pixels))

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(visual, fullgraph=True, backend="eager")(PIXELS), visual(PIXELS))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"reduce": "pool:2", "num_latents": 4}, "num_latents must be None with reduce = 'pool:2', got 4"),
        ({"reduce": "pool"}, "a reducer must be .*, got 'pool'"),
        ({"reduce": "select:17"}, "keep must be .* 16.* got 17"),
    ],
)
def test_bad_reducers(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Flamingo.from_size("tiny", **changes)
