"""Qwen-VL against transformers' three classes, on images and videos of mixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Saved, check_gradients, distance, load, their_gradients
from qwen_checkpoints import PLAIN, VARIANTS, labelled, other_pixels, prompts
from torch import Tensor

import mmkernels
from mmkernels.models import QwenVL

# Both models compute in float32, in another order.
TOLERANCE = 5e-6
NEW = 6  # tokens that are generated

# name -> padding, rows: tokens of text, or (t, h, w) of an image, or (-t, h, w) of a video.
PROMPTS: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "image": ("left", [(3, (1, 4, 6), 4)]),
    "images": ("left", [(5, (1, 4, 6), 2, (1, 2, 14), 3), (2, (1, 8, 4), 1, (1, 10, 6), 2), (2, (1, 2, 2), 1)]),
    "right": ("right", [(5, (1, 4, 6), 2), ((1, 6, 10), (1, 2, 4), 4)]),
    "video": ("left", [(3, (-3, 4, 4), 4), (1, (-1, 6, 8), 2)]),
    "long": ("left", [(2, (-4, 2, 2), 2), (3, (-5, 2, 4), 1, (1, 2, 2), 2)]),  # its times are behind the text's
    "both": ("left", [(2, (1, 4, 6), 1, (-2, 4, 4), 3), (4, (-3, 2, 8), 2, (1, 6, 2), 2, (-1, 4, 4), 1)]),
}
TEXT = ("left", [(7,), (4,)])

Ours = Callable[..., QwenVL]
Checkpoints = Callable[[str], Saved]


def inputs(variant: str, name: str) -> dict[str, Any]:
    padding, rows = TEXT if name == "text" else PROMPTS[name]
    return prompts(variant, *rows, padding=padding)


@pytest.fixture(scope="module")
def theirs(saved: Checkpoints) -> Callable[[str, str], tuple[Tensor, Tensor]]:
    """variant, prompts -> the logits of transformers' model, of these images and of others; computed once."""

    @cache
    def get(variant: str, name: str) -> tuple[Tensor, Tensor]:
        given = inputs(variant, name)
        with torch.no_grad():
            first, second = (saved(variant).theirs(**x).logits for x in (given, other_pixels(given)))
        return first, second

    return get


@pytest.mark.parametrize("name", [*PROMPTS, "text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(ours: Ours, theirs: Callable[..., tuple[Tensor, Tensor]], variant: str, name: str) -> None:
    given = inputs(variant, name)
    with torch.no_grad():
        logits = ours(variant)(**given).logits
    expected, other = theirs(variant, name)
    valid = given["attention_mask"].bool()
    assert distance(logits[valid], expected[valid]) < TOLERANCE
    if name != "text":
        assert distance(other[valid], expected[valid]) > 0.05, "the images hardly matter: parity would prove little"


@pytest.mark.parametrize("name", ["images", "both"])
@pytest.mark.parametrize("variant", PLAIN)
def test_naive_formulas(ours: Ours, theirs: Callable[..., tuple[Tensor, Tensor]], variant: str, name: str) -> None:
    given = inputs(variant, name)
    with torch.no_grad(), mmkernels.use_backend("reference"):
        logits = ours(variant)(**given).logits
    valid = given["attention_mask"].bool()
    assert distance(logits[valid], theirs(variant, name)[0][valid]) < TOLERANCE


@pytest.mark.parametrize("name", ["images", "long", "both", "text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation(saved: Checkpoints, ours: Ours, variant: str, name: str) -> None:
    given = inputs(variant, name)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    expected = saved(variant).theirs.generate(**given, **options)[:, given["input_ids"].shape[1] :]
    assert torch.equal(ours(variant).generate(**given, max_new_tokens=NEW, eos_token_id=()).tokens, expected)


@pytest.mark.parametrize("variant", PLAIN)
def test_padding_on_either_side(ours: Ours, variant: str) -> None:
    padded = [prompts(variant, *PROMPTS["both"][1], padding=side) for side in ("left", "right")]
    left, right = (ours(variant).generate(**given, max_new_tokens=NEW, eos_token_id=()).tokens for given in padded)
    assert torch.equal(left, right)


@pytest.mark.parametrize("variant", PLAIN)
def test_rows_that_end_early(saved: Checkpoints, ours: Ours, variant: str) -> None:
    """Padding follows the token that ends a row; the other rows go on."""
    given = inputs(variant, "images")
    free = ours(variant).generate(**given, max_new_tokens=NEW, eos_token_id=()).tokens
    ends = {"eos_token_id": [int(free[0, 1]), int(free[1, 3])], "pad_token_id": 0}
    expected = saved(variant).theirs.generate(**given, **ends, max_new_tokens=NEW, do_sample=False)
    expected = expected[:, given["input_ids"].shape[1] :]
    tokens = ours(variant).generate(**given, max_new_tokens=NEW, eos_token_id=ends["eos_token_id"]).tokens
    assert torch.equal(tokens, expected)
    assert bool((tokens == 0).any()) and not bool((free == 0).all(1).any())


@pytest.mark.parametrize("variant", PLAIN)
def test_turns(saved: Checkpoints, ours: Ours, variant: str) -> None:
    """A second question with further images: the same tokens as after one prompt that holds both turns."""
    first, more = (prompts(variant, row, seed=1) for row in ((3, (1, 4, 6), 2), (2, (-5, 2, 4), 1, (1, 2, 6), 3)))
    model = ours(variant)
    start = model.generate(**first, max_new_tokens=3, eos_token_id=())
    tokens = model.generate(**more, kv_cache=start.kv_cache, max_new_tokens=NEW, eos_token_id=()).tokens
    whole = {"input_ids": torch.cat([first["input_ids"], start.tokens, more["input_ids"]], 1)}
    whole["mm_token_type_ids"] = torch.cat(
        [first["mm_token_type_ids"], torch.zeros_like(start.tokens).int(), more["mm_token_type_ids"]], 1
    )
    for name in ("pixel_values", "image_grid_thw"):
        whole[name] = torch.cat([first[name], more[name]])
    videos = {name: x for name, x in more.items() if "video" in name or name == "second_per_grid_ts"}
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    expected = saved(variant).theirs.generate(**whole, **videos, **options)
    assert torch.equal(tokens, expected[:, whole["input_ids"].shape[1] :])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(saved: Checkpoints, variant: str, tmp_path: Path) -> None:
    checkpoint = saved(variant)
    model, theirs = load(checkpoint.folder), checkpoint.theirs
    given = labelled(inputs(variant, "both"))
    theirs.zero_grad()
    expected = theirs(**given).loss
    expected.backward()
    out = model(**given)
    out.loss.backward()
    assert out.kv_cache is None and out.logits is None
    assert distance(out.loss, expected) < TOLERANCE
    check_gradients(model, their_gradients(checkpoint, tmp_path), 2e-5, rotated=True)
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)  # markers are predicted too
    with torch.no_grad():
        assert distance(model(**given).loss, theirs(**given).loss) < TOLERANCE


@contextmanager
def float64_throughout(variant: str, monkeypatch: pytest.MonkeyPatch, theirs: Any) -> Iterator[None]:
    """Transformers' norms and the rotation of its image encoders compute in float32, whatever the model's dtype."""
    module = __import__(type(theirs).__module__, fromlist=["_"])
    norms = {type(layer) for layer in theirs.modules() if hasattr(layer, "variance_epsilon")}
    assert norms

    def norm(self: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        both = [x * cos[:, None] + module.rotate_half(x) * sin[:, None] for x in (query, key)]
        return both[0], both[1]

    with monkeypatch.context() as patch:
        for each in norms:
            patch.setattr(each, "forward", norm)
        patch.setattr(module, "apply_rotary_pos_emb_vision", rotate)
        yield


@pytest.mark.parametrize("variant", PLAIN)
def test_float64(saved: Checkpoints, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compute the angles in float32, and the weights of learned positions, which are exact for these sizes."""
    folder = saved(variant).folder
    given = prompts(variant, (2, (1, 8, 8), 1, (-2, 8, 2), 3), (4, (-3, 2, 8), 2, (1, 2, 2), 1, (1, 8, 2), 1))
    theirs = type(saved(variant).theirs).from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    with torch.no_grad(), float64_throughout(variant, monkeypatch, theirs):
        expected = theirs(**given).logits
        logits = load(folder, torch.float64)(**given).logits
    valid = given["attention_mask"].bool()
    assert logits.dtype == torch.float64
    assert distance(logits[valid], expected[valid]) < 1e-12


@pytest.mark.parametrize("variant", PLAIN)
def test_bfloat16_is_close(saved: Checkpoints, ours: Ours, variant: str) -> None:
    given = inputs(variant, "images")
    with torch.no_grad():
        exact = ours(variant)(**given).logits
        logits = load(saved(variant).folder, torch.bfloat16)(**given).logits
    valid = given["attention_mask"].bool()
    assert logits.dtype == torch.bfloat16
    assert distance(logits.float()[valid], exact[valid]) < 0.05


@pytest.mark.parametrize("variant", PLAIN)
def test_autocast(ours: Ours, variant: str) -> None:
    given, model = inputs(variant, "images"), ours(variant)
    with torch.no_grad():
        exact = model(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**given).logits
    valid = given["attention_mask"].bool()
    assert logits.dtype == torch.bfloat16
    assert distance(logits.float()[valid], exact[valid]) < 0.05


@pytest.mark.parametrize("variant", PLAIN)
def test_encoded_once(ours: Ours, variant: str) -> None:
    """Images and videos that are encoded beforehand give the same logits, in any number of prompts."""
    given, model = inputs(variant, "both"), ours(variant)
    grid, pixels = given["image_grid_thw"], given["pixel_values"]
    with torch.no_grad():
        expected = model(**given).logits
        images = model.encode(pixels, grid.tolist())
        seconds = given.get("second_per_grid_ts")
        videos = model.encode(given["pixel_values_videos"], given["video_grid_thw"], seconds=seconds)
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        for _ in range(2):
            assert distance(model(**text, images=images, videos=videos).logits, expected) < TOLERANCE
        mixed = {name: x for name, x in given.items() if name not in ("pixel_values", "image_grid_thw")}
        assert distance(model(**mixed, images=images).logits, expected) < TOLERANCE


@pytest.mark.parametrize("variant", PLAIN)
def test_one_attention_call_a_layer(ours: Ours, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images, windows and frames there are."""
    from mmkernels.models.blocks import packed_encoder

    calls = []
    whole = packed_encoder.cross_attention
    monkeypatch.setattr(packed_encoder, "cross_attention", lambda *x, **y: calls.append(x) or whole(*x, **y))
    given, model = inputs(variant, "both"), ours(variant)
    with torch.no_grad():
        model(**given)
    assert len(calls) == len(model.vision.blocks)


@pytest.mark.parametrize("size", ["tiny_qwen2", "tiny", "tiny_qwen3"])
def test_nothing_reads_values_of_the_device(size: str) -> None:
    """Tensors on the meta device have none to read."""
    model = QwenVL.from_size(size, device="meta")
    marker, grid = model.config.image_token_id, [(1, 4, 6), (1, 2, 4)]
    ids = torch.tensor([[5, *[marker] * 6, 7, *[marker] * 2, 8]], device="meta")
    pixels = torch.empty(32, 3 * 2 * 4 * 4, device="meta")
    for reduce in (None, "pool:2", "tome:0.5", "select:0.5"):
        model.set_reducer(reduce)
        out = model(ids, pixels, image_grid_thw=grid, labels=ids)
        out.loss.backward()
        assert model(ids, images=model.encode(pixels, grid)).logits.device.type == "meta"


@pytest.mark.parametrize("variant", PLAIN)
def test_no_images(ours: Ours, variant: str) -> None:
    """Empty images are none."""
    given, model = inputs(variant, "text"), ours(variant)
    empty = {"pixel_values": torch.zeros(0, 3 * 2 * 8 * 8), "image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(model(**given, **empty).logits, model(**given).logits)
        assert model.encode(empty["pixel_values"], empty["image_grid_thw"]).lengths == ()


@pytest.mark.parametrize("size", ["tiny_qwen2", "tiny", "tiny_qwen3"])
def test_one_graph(size: str) -> None:
    """The grid is a list: a graph has the images' sizes as constants."""
    model = QwenVL.from_size(size)
    marker, grid = model.config.image_token_id, [(1, 4, 6), (1, 2, 4)]
    ids = torch.tensor([[5, *[marker] * 6, 7, *[marker] * 2, 8, 9]])
    pixels = torch.rand(32, model.vision.sizes.inputs)

    def loss(ids: Tensor, pixels: Tensor) -> Tensor:
        return model(ids, pixels, image_grid_thw=grid, labels=ids).loss

    expected = loss(ids, pixels)
    found = torch.compile(loss, fullgraph=True, backend="eager")(ids, pixels)
    assert distance(found, expected) < TOLERANCE
    assert distance(loss(ids, pixels), expected) < TOLERANCE, "what the graph made is used outside of it"
