"""InternVL: transformers' processor, fewer tokens, conversations, inputs with errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import Saved, distance
from internvl_checkpoints import MARKER, SIDE, inputs, labels_of, pixels, prompt
from PIL import Image
from torch import Tensor
from transformers.video_processing_utils import BaseVideoProcessor

from mmkernels.models import ContextPolicy, InternVL
from mmkernels.models.blocks.encoder import Heads

PLAIN, OTHER = "internvl_qwen2", "internvl_qwen3"
Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., InternVL]

# transformers' processor.


class Frames(BaseVideoProcessor):  # type: ignore[misc]
    """Takes frames of a tile's size as they are; transformers' own video processor needs torchvision."""

    model_input_names = ("pixel_values_videos",)

    def __call__(self, videos: list[Tensor], **options: Any) -> dict[str, Any]:
        return {"pixel_values_videos": torch.stack(videos)}


class Processor(transformers.InternVLProcessor):  # type: ignore[misc]
    """Takes `Frames` too: without torchvision transformers cannot check what kind of video processor it is."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        is_frames = argument_name == "video_processor"
        return Frames if is_frames else super().check_argument_for_proper_class(argument_name, argument)


@pytest.fixture(scope="module")
def processor() -> Any:
    """Of tiles of SIDE pixels; it knows the words w5 to w89."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<pad>": 0, "<unk>": 1, "<eos>": 2, "<img>": 97, "</img>": 98, "<IMG_CONTEXT>": MARKER, "<video>": 100}
    words = {f"w{number}": number for number in range(5, 90)} | {
        f"Frame{number}:": 100 + number for number in range(1, 9)
    }
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names |= {"video_token": "<video>"}
    ends = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=names, **ends)
    image_processor = transformers.GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=6)
    return Processor(image_processor, fast, Frames(), image_seq_length=16)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.mark.parametrize(
    ("photos", "tiles"),
    [
        ([[(64, 32)]], 3),  # two tiles and a thumbnail
        ([[(32, 32), (33, 97)], [(10, 10)]], 1 + 4 + 1),
        ([[(1, 10_000)]], 7),
        ([[(10_000, 1)], []], 7),
        ([[], [(32, 32)]], 1),
    ],
)
def test_the_processor_makes_the_inputs(
    ours: Ours, saved: Checkpoints, processor: Any, photos: list[list[tuple[int, int]]], tiles: int
) -> None:
    texts = [
        f"w{5 + row} " + "<IMG_CONTEXT> w7 " * len(sizes) + "w8 w9 " * (row + 1) for row, sizes in enumerate(photos)
    ]
    images = [photo(*size, seed) for seed, size in enumerate(size for sizes in photos for size in sizes)]
    given = processor(images=images, text=texts, return_tensors="pt", padding=True)
    assert given["pixel_values"].shape == (tiles, 3, SIDE, SIDE)
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    valid = given["attention_mask"].bool()
    with torch.no_grad():
        assert distance(model(**given).logits[valid], theirs(**given).logits[valid]) < 5e-6
        expected = theirs.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.generate(**given, max_new_tokens=4, eos_token_id=()).tokens.tolist() == expected[:, -4:].tolist()


@pytest.mark.parametrize("frames", [1, 5])
def test_a_video_is_an_image_for_each_frame(ours: Ours, saved: Checkpoints, processor: Any, frames: int) -> None:
    """A video between photos, in a batch with padding."""
    model, theirs, video = ours(PLAIN), saved(PLAIN).theirs, pixels(saved(PLAIN).theirs, frames)
    texts = ["w5 <IMG_CONTEXT> w6 <video> w7 <IMG_CONTEXT> w8", "w9 <IMG_CONTEXT> w5"]
    images = [photo(32, 32, seed) for seed in range(3)]
    given = dict(processor(images=images, videos=[video], text=texts, return_tensors="pt", padding=True))
    ids, valid = given["input_ids"], given["attention_mask"].bool()
    assert torch.equal(given["pixel_values"][1:-2], video)  # the images come in the order of the text
    assert int((ids == MARKER).sum()) == 16 * (3 + frames)
    assert ids[0, 19:21].tolist() == [6, 101] and int((ids > 100).sum()) == frames  # "Frame1:", ...
    with torch.no_grad():
        whole = model(**given).logits
        assert distance(whole[valid], theirs(**given).logits[valid]) < 5e-6
        if frames > 1:
            given["pixel_values"][1:-2] = video.flip(0)
            assert distance(model(**given).logits[0, -1], whole[0, -1]) > 0.05


# Fewer tokens.


def by_hand(model: InternVL, tiles: Tensor, kind: str) -> Tensor:
    """Returns what is left of each tile of 4 x 4 tokens, ``[T, n, C]``, computed token by token."""
    found: list[Heads] = []
    hook = model.vision.blocks[-1].register_forward_hook(lambda _, __, out: found.append(out[1]))
    visual = model.encode(tiles).tokens.view(len(tiles), 16, -1)
    hook.remove()
    if kind == "pool:2":
        return visual.view(len(tiles), 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    query, key = found[0]
    attention = (query[:, :, :1] @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:]  # [T, H, 64]
    scores = attention.mean(1).view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)  # [T, 16]
    best = scores.topk(4).indices.sort().values
    return visual[torch.arange(len(tiles))[:, None], best]


@pytest.mark.parametrize("kind", ["pool:2", "select:0.25"])
def test_reducers_by_hand(ours: Ours, saved: Checkpoints, kind: str) -> None:
    """Logits, loss and positions are those of the shorter prompt with the tokens that are left."""
    theirs, model = saved(PLAIN).theirs, ours(PLAIN)
    given = inputs(theirs)
    labels = labels_of(given)
    with torch.no_grad():
        expected = by_hand(model, given["pixel_values"], kind)
        model.set_reducer(kind)
        try:
            visual = model.encode(given["pixel_values"], tiles=[2, 1, 1])
            out = model(**given, tiles=[2, 1, 1], labels=labels, return_logits=True)
            tile_by_tile = model(**given, labels=labels, return_logits=True)
            again = model(**(given | {"pixel_values": None}), images=visual, labels=labels, return_logits=True)
        finally:
            model.set_reducer(None)
        torch.testing.assert_close(visual.tokens.view_as(expected), expected)
        assert visual.lengths == (8, 4, 4) and visual.marked == (32, 16, 16)

        ids = given["input_ids"].masked_select(given["attention_mask"].bool())
        embeds, targets = [], []
        for row, tiles in zip(ids.split(given["attention_mask"].sum(1).tolist()), ([0, 1, 2], [3]), strict=True):
            stays = torch.ones_like(row, dtype=torch.bool)
            stays[(row == MARKER).nonzero().flatten().view(len(tiles), 16)[:, 4:]] = False
            x = model.decoder.embed(row[stays])
            # Of an image with several tiles the first markers stay.
            x[row[stays] == MARKER] = expected[tiles].flatten(0, 1)
            embeds.append(x)
            targets.append(row[stays].masked_fill(row[stays] == MARKER, -100)[1:])
        logits = [theirs(inputs_embeds=x[None]).logits[0] for x in embeds]
    for row, one in enumerate(logits):
        for each in (out, tile_by_tile, again):
            assert distance(each.logits[row, -len(one) :], one) < 5e-6
    loss = F.cross_entropy(torch.cat([x[:-1] for x in logits]), torch.cat(targets))
    assert distance(out.loss, loss) < 5e-6
    assert torch.equal(tile_by_tile.loss, out.loss) and torch.equal(again.loss, out.loss)


@pytest.mark.parametrize("kind", ["tome:0.5", "diverse:0.5", "pool:<=5", "select:3", "none"])
def test_other_reducers(ours: Ours, saved: Checkpoints, kind: str) -> None:
    model, given = ours(PLAIN), inputs(saved(PLAIN).theirs)
    with torch.no_grad():
        whole = model(**given)
        model.set_reducer(kind)
        try:
            out, lengths = model(**given), model.encode(given["pixel_values"]).lengths
            tokens = model.generate(**given, max_new_tokens=3, eos_token_id=()).tokens
        finally:
            model.set_reducer(None)
    left = {"tome:0.5": 8, "diverse:0.5": 8, "pool:<=5": 4, "select:3": 3, "none": 16}[kind]
    assert lengths == (left,) * 4
    assert out.logits.shape[1] == whole.logits.shape[1] - 3 * (16 - left)
    assert tokens.shape == (2, 3)
    if kind == "none":
        assert torch.equal(out.logits, whole.logits)


def test_a_reducer_of_the_configuration() -> None:
    model = InternVL.from_size("tiny", reduce="pool:2")
    assert model.encode(torch.rand(2, 3, 32, 32)).lengths == (4, 4)
    with pytest.raises(ValueError, match="reduce must be a reducer without weights"):
        InternVL.from_size("tiny", reduce="shuffle:2")


# Conversations.


def test_a_second_turn_encodes_nothing(ours: Ours, saved: Checkpoints) -> None:
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    ids, _ = prompt(theirs, [[2]])
    more = torch.tensor([[8, 9, 10]])
    tiles = pixels(theirs, 2)
    try:
        first = model.generate(ids, tiles, max_new_tokens=3, eos_token_id=())
        second = model.generate(more, kv_cache=first.kv_cache, max_new_tokens=3, eos_token_id=())
        assert calls == [1]
        visual = model.encode(tiles, tiles=(2,))
        for _ in range(2):
            again = model.generate(ids, images=visual, max_new_tokens=3, eos_token_id=())
            assert torch.equal(again.tokens, first.tokens)
        assert calls == [1, 1]
    finally:
        hook.remove()
    whole = torch.cat([ids, first.tokens, more], 1)
    expected = theirs.generate(
        input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=tiles, max_new_tokens=3, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert second.tokens.tolist() == expected[:, -3:].tolist()


@pytest.mark.parametrize(("tiles", "left"), [(None, 16), ([2], 0)])
def test_a_policy_forgets_images_or_tiles(ours: Ours, saved: Checkpoints, tiles: Any, left: int) -> None:
    """A tile alone where each counts as an image, the image as a whole where it is one."""
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    policy = ContextPolicy(max_visual_tokens=32)
    first = model.generate(prompt(theirs, [[2]])[0], pixels(theirs, 2), tiles=tiles, max_new_tokens=2, policy=policy)
    assert first.kv_cache.visual_tokens().tolist() == [32]
    out = model(prompt(theirs, [[1]])[0], pixels(theirs, 1), kv_cache=first.kv_cache, policy=policy)
    assert out.kv_cache.visual_tokens().tolist() == [left + 16]


# Inputs with errors.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"pixel_values": torch.rand(3, 3, SIDE, SIDE)},
            r"input_ids must have 48 tokens 99 \(image\) for 3 images .*got 64",
        ),
        (
            {"pixel_values": torch.rand(5, 3, SIDE, SIDE)},
            r"input_ids must have 80 tokens 99 \(image\) for 5 images .*got 64",
        ),
        ({"pixel_values": None}, r"input_ids must have 0 tokens 99 \(image\) for 0 images, got 64"),
        (
            {"pixel_values": torch.rand(1, 3, 1, 10_000)},
            r"pixel_values must be square tiles \[T, 3, S, S\], S a multiple of 8",
        ),
        ({"pixel_values": torch.rand(4, 1, SIDE, SIDE)}, r"pixel_values must be square tiles \[T, 3, S, S\]"),
        ({"pixel_values": torch.rand(4, 3, 36, 36)}, r"S a multiple of 8, got shape \(4, 3, 36, 36\)"),
        ({"pixel_values": torch.rand(3, SIDE, SIDE)}, r"pixel_values must be square tiles"),
        ({"pixel_values": torch.ones(4, 3, SIDE, SIDE, dtype=torch.uint8)}, "pixel_values must be a floating tensor"),
        ({"pixel_values": [1.0]}, "pixel_values must be a floating tensor, got list"),
        (
            {"tiles": [2, 1]},
            r"tiles must be positive integers that add up to the 4 tiles of pixel_values, got \[2, 1\]",
        ),
        ({"tiles": [4, 0]}, r"tiles must be positive integers"),
        ({"tiles": [2, 2]}, r"input_ids must have the 32 tokens of image 1 in one row, got them in rows 0 to 1"),
        ({"pixel_values": None, "tiles": [4]}, "tiles must be None without pixel_values"),
        ({"image_sizes": None}, "image_sizes"),
    ],
)
def test_bad_inputs(ours: Ours, saved: Checkpoints, change: dict[str, Any], match: str) -> None:
    model, given = ours(PLAIN), inputs(saved(PLAIN).theirs)
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises((TypeError, ValueError), match=match):
        model(**(given | change))
    hook.remove()
    assert not calls  # found before anything is encoded


def test_two_hundred_images(ours: Ours, saved: Checkpoints) -> None:
    ids, _ = prompt(saved(PLAIN).theirs, [[1] * 200])
    tiles = torch.zeros(1, 3, SIDE, SIDE).expand(200, -1, -1, -1)
    with pytest.raises(ValueError, match=r"input_ids must have at most 512 tokens \(text_length\)"):
        ours(PLAIN)(ids, tiles)
    many = torch.zeros(1, 1, 1, 1).expand(2**18 + 1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="pixel_values must have at most 16777216 patches in all, got 16777280"):
        ours(PLAIN).encode(many)


def test_images_of_another_model(ours: Ours, saved: Checkpoints) -> None:
    given = inputs(saved(PLAIN).theirs)
    ids, tiles = given["input_ids"], given["pixel_values"]
    visual = InternVL.from_size("tiny").encode(torch.rand(4, 3, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \[tokens, 48\], as encode returns, got"):
        ours(PLAIN)(ids, images=visual)
    with pytest.raises(TypeError, match="images must be what encode returns, got Tensor"):
        ours(PLAIN)(ids, images=visual.tokens)
    with pytest.raises(ValueError, match="pixel_values must be None with images, got both"):
        ours(PLAIN)(ids, tiles, images=visual)
