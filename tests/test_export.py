"""`torch.export` and `torch.jit.trace` of every model and module: the program serves any batch and length."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels
import mmkernels.models
import mmkernels.nn
from mmkernels import SpanMask
from mmkernels.models import (
    BLIP,
    BLIP2,
    CLIP,
    LXMERT,
    BLIP2Retrieval,
    DeepSeekVL,
    DeepSeekVL2,
    Flamingo,
    InternVL,
    Janus,
    QwenAudio,
    QwenVL,
    ViLBERT,
    Whisper,
    WhisperTokens,
)
from mmkernels.nn import (
    AttentionPool,
    BiAttention,
    ClipLoss,
    CoAttention,
    CrossAttention,
    Experts,
    FeatureQueue,
    GatedCrossAttention,
    LateInteractionLoss,
    LatentAttention,
    LatentSizes,
    LinearCrossEntropyLoss,
    PatchMerger,
    PerceiverResampler,
    PixelShuffleProjector,
    PostNormAttention,
    PostNormMLP,
    QFormer,
    SelfAttention,
    SigLipLoss,
    TokenBuffer,
    TokenReducer,
    TopKRouter,
    VisualCache,
)

Inputs = tuple[Tensor, ...]
EXAMPLE, OTHERS = (4, 6), ((7, 9), (1, 5))  # batch and length: of the example, and of the calls of the program
MARKER = 127  # of an image, in the vocabulary of the tiny models


class Case(nn.Module):
    """What is exported: a call of modules.

    Args:
        modules: those whose parameters the program holds.
        call: takes these modules, then the inputs; returns a tensor or several.
        inputs: takes the batch and the length.
        sizes: for each input, its dims that are the batch or a length; others are fixed.
    """

    def __init__(
        self, *modules: nn.Module, call: Callable[..., Any], inputs: Callable[[int, int], Inputs], sizes: list[str]
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.call, self.inputs = call, inputs
        self.sizes = tuple({int(dim): torch.export.Dim.DYNAMIC for dim in dims} for dims in sizes)
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*self.parts, *inputs)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, MARKER, (batch, length))


def images(batch: int, count: int | None = None) -> Tensor:
    return torch.rand(*((batch,) if count is None else (batch, count)), 3, 32, 32)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, 16)


def padding(batch: int, length: int, least: int = 1) -> Tensor:
    """An attention mask, padded on the right."""
    return (torch.arange(length) < torch.randint(least, length + 1, (batch, 1))).long()


def prompt(batch: int, length: int) -> Tensor:
    """Tokens with two images."""
    ids = tokens(batch, length)
    ids[:, 0] = ids[:, 2] = MARKER
    return ids


# The models.


def clip(size: str) -> dict[str, Case]:
    def towers(model: CLIP, ids: Tensor, pixels: Tensor) -> tuple[Any, ...]:
        out = model(ids, pixels, return_loss=True)
        return out.loss, out.logits_per_image

    model = CLIP(replace(CLIP.sizes[size], vision_layers=1, text_layers=1))
    padded = lambda b, l: (tokens(b, l), padding(b, l))
    cases = {
        "both, loss": Case(model, call=towers, inputs=lambda b, l: (tokens(b, l), images(b)), sizes=["01", "0"]),
        "padded texts": Case(model, call=CLIP.encode_text, inputs=padded, sizes=["01", "01"]),
    }
    return {f"CLIP {size}: {name}": case for name, case in cases.items()}


def blip() -> dict[str, Case]:
    def compares(model: BLIP, ids: Tensor, valid: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        vision = model.encode_vision(pixels)
        similar = model.encode_image(vision=vision) @ model.encode_text(ids, valid).T
        return similar, model.match(ids, attention_mask=valid, vision=vision)

    def writes(model: BLIP, ids: Tensor, more: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, pixels)
        return model(more, kv_cache=out.kv_cache).logits, model(ids, pixels, labels=ids).loss

    model = BLIP.from_size("tiny", vision_layers=1, text_layers=1)
    padded = lambda b, l: (tokens(b, l), padding(b, l), images(b))
    turns = lambda b, l: (tokens(b, l), tokens(b, 2), images(b))
    cases = [
        Case(model, call=compares, inputs=padded, sizes=["01", "01", "0"]),
        Case(model, call=writes, inputs=turns, sizes=["01", "0", "0"]),
    ]
    return {f"BLIP: {case.call.__name__}": case for case in cases}


def flamingo(variant: str, **changes: Any) -> dict[str, Case]:
    def labels(model: Flamingo, ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, pixels, labels=ids, return_logits=True)
        return out.logits, out.loss

    def padded(model: Flamingo, ids: Tensor, valid: Tensor, pixels: Tensor) -> Tensor:
        return model(ids, pixels, attention_mask=valid, last_logits_only=True).logits

    def one_photo(model: Flamingo, ids: Tensor, media: Tensor, pixels: Tensor) -> Tensor:
        return model(ids, pixels, media_index=media).logits

    def image_mask(model: Flamingo, ids: Tensor, sees: Tensor, pixels: Tensor) -> Tensor:
        return model(ids, pixels, image_attention_mask=sees).logits

    def two_turns(model: Flamingo, ids: Tensor, more: Tensor, pixels: Tensor) -> Tensor:
        out = model(ids, pixels)
        return model(more, visual_cache=out.visual_cache, kv_cache=out.kv_cache).logits

    model = Flamingo.from_size("tiny", vision_layers=1, text_layers=1, cross_every=1, resampler_depth=1, **changes)
    index = lambda b, l: (tokens(b, l), torch.randint(-1, 2, (b, l)), images(1, 2))
    masked = lambda b, l: (tokens(b, l), torch.randint(2, (b, l, 2)), images(b, 2))
    cases = {
        labels: Case(model, call=labels, inputs=lambda b, l: (prompt(b, l), images(b, 2)), sizes=["01", "0"]),
        padded: Case(
            model,
            call=padded,
            inputs=lambda b, l: (prompt(b, l), padding(b, l, least=3), images(b, 2)),
            sizes=["01", "01", "0"],
        ),
        one_photo: Case(model, call=one_photo, inputs=index, sizes=["01", "01", ""]),
        image_mask: Case(model, call=image_mask, inputs=masked, sizes=["01", "01", "0"]),
        two_turns: Case(
            model,
            call=two_turns,
            inputs=lambda b, l: (prompt(b, l), tokens(b, 2), images(b, 2)),
            sizes=["01", "0", "0"],
        ),
    }
    chosen = cases if changes == {} else [labels]
    return {f"Flamingo, {variant}: {call.__name__}": cases[call] for call in chosen}


def qwen_vl(size: str) -> dict[str, Case]:
    """A program has the images' sizes of the example; the text, and how many rows there are, may differ."""
    model = QwenVL.from_size(size, vision_layers=1, full_layers=(), deep_layers=(0,) * (size == "tiny_qwen3"))
    grid = [(1, 2, 4), (1, 2, 2)]
    images = model.encode(pixels := torch.rand(12, model.vision.sizes.inputs), grid)
    images = images._replace(tokens=images.tokens.detach(), deep=tuple(x.detach() for x in images.deep))

    def photos(model: QwenVL, ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, pixels, image_grid_thw=grid, labels=ids, return_logits=True)
        return out.logits, out.loss

    def encoded(model: QwenVL, ids: Tensor, valid: Tensor) -> Tensor:
        return model(ids, images=images, attention_mask=valid, last_logits_only=True).logits

    def two_turns(model: QwenVL, ids: Tensor, more: Tensor, pixels: Tensor) -> Tensor:
        return model(more, kv_cache=model(ids, pixels, image_grid_thw=grid).kv_cache).logits

    def marked(batch: int, length: int) -> Tensor:
        ids = torch.randint(1, model.config.video_token_id, (batch, length))
        ids[0, [0, 1, 3]] = model.config.image_token_id
        return ids

    padded = lambda b, l: (marked(b, l), padding(b, l, least=4))
    turns = lambda b, l: (marked(b, l), tokens(b, 2) % model.config.video_token_id, pixels)
    cases = {
        photos: Case(model, call=photos, inputs=lambda b, l: (marked(b, l), pixels), sizes=["01", ""]),
        encoded: Case(model, call=encoded, inputs=padded, sizes=["01", "01"]),
        two_turns: Case(model, call=two_turns, inputs=turns, sizes=["01", "0", ""]),
    }
    chosen = cases if size == "tiny_qwen3" else [photos]
    return {f"QwenVL, {size}: {call.__name__}": cases[call] for call in chosen}


def internvl() -> dict[str, Case]:
    """A program has the example's number of tiles; fewer tokens of them are served in one row."""
    changes = {"vision_layers": 1, "text_layers": 1, "image_size": 16}  # 4 tokens a tile
    model, fewer = InternVL.from_size("tiny", **changes), InternVL.from_size("tiny", reduce="select:0.5", **changes)
    tile = torch.rand(1, 3, 16, 16)

    def tiles(model: InternVL, ids: Tensor, tile: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, tile, labels=ids, return_logits=True)
        return out.logits, out.loss

    def two_turns(model: InternVL, ids: Tensor, more: Tensor, tile: Tensor) -> Tensor:
        return model(more, kv_cache=model(ids, tile).kv_cache).logits

    def reduced(model: InternVL, ids: Tensor, tile: Tensor) -> Tensor:
        return model(ids, tile).logits

    def marked(batch: int, length: int) -> Tensor:
        ids = tokens(batch, length)
        ids[0, :4] = MARKER
        return ids

    cases = [
        Case(model, call=tiles, inputs=lambda b, l: (marked(b, l), tile), sizes=["01", ""]),
        Case(model, call=two_turns, inputs=lambda b, l: (marked(b, l), tokens(b, 2), tile), sizes=["01", "0", ""]),
        Case(fewer, call=reduced, inputs=lambda b, l: (marked(1, l), tile), sizes=["1", ""]),
    ]
    return {f"InternVL: {case.call.__name__}": case for case in cases}


def deepseek_vl() -> dict[str, Case]:
    """A program has the example's number of images; fewer tokens of them are served in one row."""
    plain, both, changes = "tiny", "tiny_hybrid", {"vision_layers": 1, "text_layers": 1, "image_size": 16}
    model, hybrid = DeepSeekVL.from_size(plain, **changes), DeepSeekVL.from_size(both, sam_layers=2, **changes)
    fewer = DeepSeekVL.from_size(plain, reduce="select:0.5", **changes)
    small, large = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 64, 64)  # 4 tokens

    def images(model: DeepSeekVL, ids: Tensor, small: Tensor, large: Tensor | None = None) -> tuple[Tensor, ...]:
        out = model(ids, small, high_res_pixel_values=large, labels=ids, return_logits=True)
        return out.logits, out.loss

    def two_resolutions(model: DeepSeekVL, ids: Tensor, small: Tensor, large: Tensor) -> tuple[Tensor, ...]:
        return images(model, ids, small, large)

    def two_turns(model: DeepSeekVL, ids: Tensor, more: Tensor, small: Tensor) -> Tensor:
        return model(more, kv_cache=model(ids, small).kv_cache).logits

    def reduced(model: DeepSeekVL, ids: Tensor, small: Tensor) -> Tensor:
        return model(ids, small).logits

    def marked(batch: int, length: int) -> Tensor:
        ids = tokens(batch, length)
        ids[0, :4] = MARKER
        return ids

    cases = [
        Case(model, call=images, inputs=lambda b, l: (marked(b, l), small), sizes=["01", ""]),
        Case(hybrid, call=two_resolutions, inputs=lambda b, l: (marked(b, l), small, large), sizes=["01", "", ""]),
        Case(model, call=two_turns, inputs=lambda b, l: (marked(b, l), tokens(b, 2), small), sizes=["01", "0", ""]),
        Case(fewer, call=reduced, inputs=lambda b, l: (marked(1, l), small), sizes=["1", ""]),
    ]
    return {f"DeepSeekVL: {case.call.__name__}": case for case in cases}


def deepseek_vl2() -> dict[str, Case]:
    """A program has the example's images and their tiles, in one row of any length."""
    changes = {"vision_layers": 1, "text_layers": 1, "dense_layers": 0}
    latent, plain, sigmoid = (DeepSeekVL2.from_size(f"tiny{kind}", **changes) for kind in ("", "_plain", "_sigmoid"))
    pixels, tiles = torch.rand(3, 3, 28, 28), [(2, 1)]  # 17 tokens

    def images(model: DeepSeekVL2, ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, pixels, tiles=tiles, labels=ids, return_logits=True)
        return out.logits, out.loss

    def words(model: DeepSeekVL2, ids: Tensor) -> Tensor:
        return model(ids).logits

    def two_turns(model: DeepSeekVL2, ids: Tensor, more: Tensor) -> Tensor:
        return model(more, kv_cache=model(ids).kv_cache).logits

    def marked(length: int) -> Tensor:
        return torch.cat([torch.full((1, 17), MARKER), tokens(1, length)], 1)

    cases = {
        "images": Case(latent, call=images, inputs=lambda b, l: (marked(l), pixels), sizes=["1", ""]),
        "keys and values": Case(plain, call=words, inputs=lambda b, l: (tokens(b, l),), sizes=["01"]),
        "sigmoid": Case(sigmoid, call=words, inputs=lambda b, l: (tokens(b, l),), sizes=["01"]),
        "two turns": Case(latent, call=two_turns, inputs=lambda b, l: (tokens(b, l), tokens(b, 2)), sizes=["01", "0"]),
    }
    return {f"DeepSeekVL2: {name}": case for name, case in cases.items()}


def janus() -> dict[str, Case]:
    """A program of images that are read has the example's number of them."""
    changes = {"vision_layers": 1, "text_layers": 1, "image_size": 16, "vq_multipliers": (1,)}  # 4 tokens an image
    model, photo = Janus.from_size("tiny", **changes), torch.rand(1, 3, 16, 16)

    def read(model: Janus, ids: Tensor, photo: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, photo, labels=ids, return_logits=True)
        return out.logits, out.loss

    def trained(model: Janus, ids: Tensor, valid: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, attention_mask=valid, image_tokens=images, return_logits=True)
        return out.logits, out.loss

    def drawn(model: Janus, ids: Tensor, valid: Tensor) -> Tensor:
        return model.decode(model.generate_image(ids, attention_mask=valid, temperature=0.0))

    def tokenized(model: Janus, pixels: Tensor) -> Tensor:
        return model.encode_tokens(pixels)

    def marked(batch: int, length: int) -> Tensor:
        ids = tokens(batch, length)
        ids[0, :4] = MARKER
        return ids

    images = lambda b, l: (tokens(b, l), padding(b, l), tokens(b, 4) % 32)
    cases = [
        Case(model, call=read, inputs=lambda b, l: (marked(b, l), photo), sizes=["01", ""]),
        Case(model, call=trained, inputs=images, sizes=["01", "01", "0"]),
        Case(model, call=drawn, inputs=lambda b, l: (tokens(b, l), padding(b, l)), sizes=["01", "01"]),
        Case(model, call=tokenized, inputs=lambda b, l: (torch.rand(b, 3, 2, 2),), sizes=["0"]),
    ]
    return {f"Janus: {case.call.__name__}": case for case in cases}


def qwen_audio() -> dict[str, Case]:
    """A program has the example's number of sounds and their lengths."""
    changes = {"audio_layers": 1, "text_layers": 1}
    model, fewer = QwenAudio.from_size("tiny", **changes), QwenAudio.from_size("tiny", reduce="pool:2", **changes)
    sound = torch.rand(1, 16, 40)

    def sounds(model: QwenAudio, ids: Tensor, sound: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, input_features=sound, frame_lengths=[16], labels=ids, return_logits=True)
        return out.logits, out.loss

    def two_turns(model: QwenAudio, ids: Tensor, more: Tensor, sound: Tensor) -> Tensor:
        return model(more, kv_cache=model(ids, input_features=sound, frame_lengths=[16]).kv_cache).logits

    def reduced(model: QwenAudio, ids: Tensor, sound: Tensor) -> Tensor:
        return model(ids, input_features=sound, frame_lengths=[16]).logits

    def marked(batch: int, length: int) -> Tensor:
        ids = tokens(batch, length)
        ids[0, :4] = MARKER
        return ids

    cases = [
        Case(model, call=sounds, inputs=lambda b, l: (marked(b, l), sound), sizes=["01", ""]),
        Case(model, call=two_turns, inputs=lambda b, l: (marked(b, l), tokens(b, 2), sound), sizes=["01", "0", ""]),
        Case(fewer, call=reduced, inputs=lambda b, l: (marked(1, l), sound), sizes=["1", ""]),
    ]
    return {f"QwenAudio: {case.call.__name__}": case for case in cases}


def blip2() -> dict[str, Case]:
    """A program has the example's number of images, or as many as the language model does not count."""
    changes = {"vision_layers": 1, "qformer_layers": 1, "text_layers": 1, "num_queries": 3}
    model, instruct = (BLIP2.from_size(size, **changes) for size in ("tiny", "tiny_instruct"))
    compared = BLIP2Retrieval.from_size("tiny", vision_layers=1, qformer_layers=1)
    pixels = images(1)

    def describes(model: BLIP2, ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, pixels, labels=ids, return_logits=True)
        return out.logits, out.loss

    def asked(model: BLIP2, ids: Tensor, question: Tensor, pixels: Tensor) -> Tensor:
        out = model(ids[:, :-2], pixels, qformer_input_ids=question)
        return model(ids[:, -2:], kv_cache=out.kv_cache).logits

    def compares(model: BLIP2Retrieval, ids: Tensor, valid: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        text = model.encode_text(ids, valid)
        return model.encode_image(pixels), text, model.match(ids, pixels, valid)

    def marked(batch: int, length: int) -> Tensor:
        ids = tokens(batch, length + 2)
        ids[0, :3] = MARKER
        return ids

    words = lambda b, l: torch.randint(2, 96, (b, l))
    pairs = lambda b, l: (words(b, l), padding(b, l), images(b))
    cases = [
        Case(model, call=describes, inputs=lambda b, l: (marked(b, l), pixels), sizes=["01", ""]),
        Case(instruct, call=asked, inputs=lambda b, l: (marked(b, l), words(1, l), pixels), sizes=["01", "1", ""]),
        Case(compared, call=compares, inputs=pairs, sizes=["01", "01", "0"]),
    ]
    return {f"{type(case.parts[0]).__name__}: {case.call.__name__}": case for case in cases}


def lxmert() -> dict[str, Case]:
    def reads(
        model: LXMERT, ids: Tensor, valid: Tensor, regions: Tensor, boxes: Tensor, seen: Tensor
    ) -> tuple[Any, ...]:
        out = model(
            ids, regions, boxes, attention_mask=valid, visual_attention_mask=seen, labels=ids, return_logits=True
        )
        return out.word_logits, out.answer_logits, out.loss, *model.predict_regions(out.vision).values()

    model = LXMERT.from_size("tiny", text_layers=1, cross_layers=1, feature_width=16)
    both = lambda b, l: (tokens(b, l), padding(b, l), features(b, l + 2), torch.rand(b, l + 2, 4), padding(b, l + 2))
    return {"LXMERT": Case(model, call=reads, inputs=both, sizes=["01", "01", "01", "01", "01"])}


def vilbert() -> dict[str, Case]:
    def reads(
        model: ViLBERT, ids: Tensor, valid: Tensor, regions: Tensor, boxes: Tensor, seen: Tensor
    ) -> tuple[Any, ...]:
        out = model(
            ids, regions, boxes, attention_mask=valid, visual_attention_mask=seen, labels=ids, return_logits=True
        )
        return out.word_logits, out.region_logits, out.loss, out.tasks.answers, out.tasks.regions

    model = ViLBERT.from_size("tiny", text_layers=2, cross_text=(1,), cross_vision=(0,), feature_width=16)
    both = lambda b, l: (tokens(b, l), padding(b, l), features(b, l + 2), torch.rand(b, l + 2, 5), padding(b, l + 2))
    return {"ViLBERT": Case(model, call=reads, inputs=both, sizes=["01", "01", "01", "01", "01"])}


def whisper() -> dict[str, Case]:
    def writes(model: Whisper, ids: Tensor, more: Tensor, sounds: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        out = model(ids, sounds, frame_lengths=lengths)
        return model(more, cache=out.cache).logits, model(ids, sounds, labels=ids).loss

    def beams(model: Whisper, ids: Tensor, valid: Tensor, sounds: Tensor) -> Tensor:
        """Two texts for each sound."""
        twice = lambda x: torch.cat([x, x])
        return model(twice(ids), sounds, attention_mask=twice(valid), last_logits_only=True).logits

    model = Whisper.from_size("tiny", audio_layers=1, text_layers=1, tokens=WhisperTokens())
    sounds = lambda b, l: torch.randn(b, 80, 2 * l + 3)
    turns = lambda b, l: (tokens(b, l), tokens(b, 2), sounds(b, l), torch.randint(1, 2 * l, (b,)))
    padded = lambda b, l: (tokens(b, l), padding(b, l), sounds(b, l))
    cases = [
        Case(model, call=writes, inputs=turns, sizes=["01", "0", "02", "0"]),
        Case(model, call=beams, inputs=padded, sizes=["01", "01", "02"]),
    ]
    return {f"Whisper: {case.call.__name__}": case for case in cases}


# The modules.


def co_attention() -> dict[str, Case]:
    def attends(module: nn.Module, a: Tensor, b: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return module(a, b, valid_a=valid.bool())

    def causal(module: SelfAttention, x: Tensor) -> Tensor:
        return module(x, SpanMask.causal(x.shape[1], x.shape[1]))

    both = lambda b, l: (features(b, l), features(b, l + 3), padding(b, l))
    alone = lambda b, l: (features(b, l),)
    cases = {f"CoAttention: {shared=}": CoAttention(16, num_heads=2, shared=shared) for shared in (True, False)}
    cases |= {"BiAttention": BiAttention(16, num_heads=2)}
    return {
        name: Case(module, call=attends, inputs=both, sizes=["01", "01", "01"]) for name, module in cases.items()
    } | {"SelfAttention": Case(SelfAttention(16, 2), call=causal, inputs=alone, sizes=["01"])}


def experts() -> dict[str, Case]:
    def routed(modules: nn.ModuleList, x: Tensor) -> tuple[Tensor, ...]:
        router, experts = modules
        weight, index, logits = router(x.flatten(0, 1))
        return experts(x.flatten(0, 1), index, weight), logits

    inputs = lambda b, l: (features(b, l),)
    grouped = TopKRouter(16, 6, 2, "sigmoid", groups=3, top_groups=2, method="noaux_tc", normalise=True)
    pairs = {"Experts": TopKRouter(16, 6, 2), "TopKRouter: of groups": grouped}
    return {
        name: Case(nn.ModuleList([router, Experts(16, 8, 6)]), call=routed, inputs=inputs, sizes=["01"])
        for name, router in pairs.items()
    }


def latent_attention() -> dict[str, Case]:
    def causal(module: LatentAttention, x: Tensor) -> Tensor:
        length = x.shape[1]
        angles = torch.arange(length)[None, None, :, None] / torch.tensor([1.0, 10.0])
        return module(x, (angles.cos(), angles.sin()), SpanMask.causal(length, length))

    sizes = LatentSizes(heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)
    return {
        "LatentAttention": Case(
            LatentAttention(16, sizes), call=causal, inputs=lambda b, l: (features(b, l),), sizes=["01"]
        )
    }


def qformer() -> dict[str, Case]:
    def captions(module: QFormer, x: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x, ids, valid, causal=True))

    module = QFormer(16, 16, num_queries=3, depth=1, num_heads=2, vocab_size=MARKER)
    texts = lambda b, l: (features(b, l + 2), tokens(b, l), padding(b, l))
    return {"QFormer": Case(module, call=captions, inputs=texts, sizes=["01", "01", "01"])}


def cross_attention() -> dict[str, Case]:
    def masked(layer: CrossAttention, x: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
        return layer(x, context, mask=SpanMask.key_padding(lengths))

    def causal(layer: CrossAttention, x: Tensor) -> Tensor:
        return layer(x, mask=SpanMask.causal(x.shape[1], x.shape[1]))

    def dense(layer: CrossAttention, x: Tensor, context: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return layer(x, context, mask=mask, bias=bias)

    layer = CrossAttention(16, num_heads=4, num_kv_heads=2, bias=True, qk_norm=nn.LayerNorm)
    matrix = lambda b, l: (torch.rand(b, 1, l, l + 2) > 0.3, torch.randn(1, 4, l, l + 2))
    cases = {
        causal: Case(layer, call=causal, inputs=lambda b, l: (features(b, l),), sizes=["01"]),
        masked: Case(
            layer,
            call=masked,
            inputs=lambda b, l: (features(b, l), features(b, l + 2), torch.randint(1, l, (b,))),
            sizes=["01", "01", "0"],
        ),
        dense: Case(
            layer,
            call=dense,
            inputs=lambda b, l: (features(b, l), features(1, l + 2), *matrix(b, l)),
            sizes=["01", "1", "023", "23"],
        ),
    }
    return {f"CrossAttention: {call.__name__}": case for call, case in cases.items()}


def gated_cross_attention() -> dict[str, Case]:
    def media(block: GatedCrossAttention, x: Tensor, context: Tensor, sees: Tensor) -> Tensor:
        return block(x, context, mask=SpanMask.media(sees, tokens_per_media=4))

    inputs = lambda b, l: (features(b, l), features(b, 12), torch.randint(-1, 3, (b, l)))
    return {
        f"GatedCrossAttention: {gate}": Case(
            GatedCrossAttention(16, num_heads=2, gate=gate, gate_init=0.5),  # type: ignore[arg-type]
            call=media,
            inputs=inputs,
            sizes=["01", "0", "01"],
        )
        for gate in ("scalar", "vector")
    }


def resampler() -> dict[str, Case]:
    def lengths(module: PerceiverResampler, media: Tensor, lengths: Tensor) -> Tensor:
        return module(media, lengths)

    module = PerceiverResampler(16, depth=1, num_latents=3, num_heads=2)
    media = lambda b, l: (features(b, 2, l), torch.randint(1, l, (b, 2)))
    return {
        "PerceiverResampler": Case(
            module, call=lambda *x: x[0](x[1]), inputs=lambda b, l: (features(b, l),), sizes=["01"]
        ),
        "PerceiverResampler: lengths": Case(module, call=lengths, inputs=media, sizes=["02", "0"]),
    }


def attention_pool() -> dict[str, Case]:
    padded = lambda b, l: (features(b, l), torch.randint(1, l, (b,)))
    pool = AttentionPool(16, num_queries=2, num_heads=2)
    return {"AttentionPool": Case(pool, call=lambda pool, *x: pool(*x), inputs=padded, sizes=["01", "0"])}


def post_norm() -> dict[str, Case]:
    alone = lambda b, l: (features(b, l),)
    return {
        "PostNormAttention": Case(
            PostNormAttention(16, num_heads=2), call=lambda module, x: module(x), inputs=alone, sizes=["01"]
        ),
        "PostNormMLP": Case(PostNormMLP(16, 32), call=lambda module, x: module(x), inputs=alone, sizes=["01"]),
    }


def fewer_tokens() -> dict[str, Case]:
    """What cuts tokens by sizes that the host knows serves the number of images that it was traced with."""
    two_images = lambda b, l: (features(2, 24),)
    cases = {
        "PatchMerger": PatchMerger(16, 8, order="spatial"),
        "PixelShuffleProjector": PixelShuffleProjector(16, 8),
        **{f"TokenReducer: {text}": TokenReducer.parse(text, 16) for text in ("pool:2", "tome:0.5", "diverse:0.25")},
    }
    call = lambda module, x: module(x, (1, 4, 6))[0]
    return {name: Case(module, call=call, inputs=two_images, sizes=[""]) for name, module in cases.items()}


def caches() -> dict[str, Case]:
    def visual(layer: CrossAttention, x: Tensor, photos: Tensor, sees: Tensor) -> Tensor:
        """Two images, of which the first is dropped when a third comes."""
        cache = VisualCache(1, max_tokens=8)
        for part in (photos[:, :8], photos[:, 8:]):
            cache.append([layer.project(part)], [4] * (part.shape[1] // 4))
        return layer(x, key_value=cache[0], mask=cache.mask(sees))

    def buffer(x: Tensor, more: Tensor) -> Tensor:
        kept = TokenBuffer()
        kept.append(x)
        kept.append(more)
        kept.remove(1, 2)
        return kept.view()

    queue = FeatureQueue(8, 16)
    queue.push(features(5))
    pair = lambda b, l: (torch.randn(b, 2, l, 4), torch.randn(b, 2, l + 1, 4))
    return {
        "FeatureQueue": Case(
            queue,
            call=lambda queue, x, y: mmkernels.info_nce(x, y, 3.0, hard_texts=queue.features),
            inputs=lambda b, l: (features(b), features(b)),
            sizes=["0", "0"],
        ),
        "VisualCache": Case(
            CrossAttention(16, num_heads=2),
            call=visual,
            inputs=lambda b, l: (features(b, l), features(b, 12), torch.randint(-1, 3, (b, l))),
            sizes=["01", "0", "01"],
        ),
        "TokenBuffer": Case(call=buffer, inputs=pair, sizes=["02", "02"]),
    }


def losses() -> dict[str, Case]:
    pairs = lambda b, l: (features(b), features(b), torch.tensor(9.0), torch.tensor(-3.0))
    found = {
        type(loss).__name__: Case(loss, call=lambda loss, *x: loss(*x), inputs=pairs, sizes=["0", "0", "", ""])
        for loss in (ClipLoss(), SigLipLoss())
    }
    rows = lambda b, l: (torch.randn(32, 8), torch.randn(b, 8), torch.randint(32, (b,)))
    late = Case(
        LateInteractionLoss(), call=lambda loss, *x: loss(*x), inputs=lambda b, l: (features(b, l), features(b, 12)),
        sizes=["01", "0"],
    )  # fmt: skip
    head = Case(LinearCrossEntropyLoss(), call=lambda loss, *x: loss(*x), inputs=rows, sizes=["", "0", "0"])
    return found | {"LateInteractionLoss": late, "LinearCrossEntropyLoss": head}


def masks() -> dict[str, Case]:
    """What constructors make of tensors and of sizes, as dense masks."""

    def made(x: Tensor, lengths: Tensor, sees: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        length = x.shape[1]
        made = [
            SpanMask.causal(length, length) & SpanMask.key_padding(lengths),
            SpanMask.window(2, 1, length, length) & SpanMask.from_key_mask(keys),
            SpanMask.left_padding(lengths, length),
            SpanMask.prefix_lm(lengths, length, length),
            SpanMask.media(sees, media_offsets=torch.tensor([0, 2, 4])),
            SpanMask.packed(lengths, lengths, q_len=2 * length),
        ]
        return tuple(mask.to_dense(length) for mask in made)

    inputs = lambda b, l: (
        torch.zeros(b, l),
        torch.randint(1, l, (b,)),
        torch.randint(-1, 2, (b, l)),
        torch.rand(b, l) > 0.5,
    )
    return {"SpanMask": Case(call=made, inputs=inputs, sizes=["01", "0", "01", "01"])}


def ops() -> dict[str, Case]:
    def attention(query: Tensor, key: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Two halves of the keys, merged; and what reads the scores."""
        mask = SpanMask.key_padding(lengths)
        halves = [mmkernels.cross_attention(query, key, key, mask, return_lse=True) for _ in range(2)]
        merged, lse = mmkernels.merge_attention(*halves[0], *halves[1])
        received = mmkernels.attention_received(query, key, mask)
        return merged, lse, received, mmkernels.attention_weights(query, key, mask)

    def contrastive(image: Tensor, text: Tensor, ids: Tensor, hard: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        loss, stats = mmkernels.info_nce(image, text, scale, image_ids=ids, hard_texts=hard, return_stats=True)
        pairwise = mmkernels.sigmoid_contrastive(image, text, scale, -10.0, text_ids=ids)
        return loss, *stats, pairwise, mmkernels.retrieval_ranks(image, text, torch.zeros_like(ids))

    def linear(hidden: Tensor, weight: Tensor, target: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        rows = mmkernels.linear_logprobs(hidden, weight, target, return_entropy=True, return_correct=True)
        loss = mmkernels.linear_cross_entropy(hidden, weight, target, softcap=9.0)
        options = {"weight": classes, "label_smoothing": 0.1, "z_loss": 1e-3}
        smooth = [
            mmkernels.linear_cross_entropy(hidden, weight, target, reduction=x, **options) for x in ("sum", "none")
        ]
        return *rows, loss, *smooth

    heads = lambda b, l: (torch.randn(b, 4, l, 8), torch.randn(b, 2, l + 2, 8), torch.randint(1, l, (b,)))
    pairs = lambda b, l: (features(b), features(b), torch.arange(b) // 2, features(l), torch.tensor(9.0))
    rows = lambda b, l: (torch.randn(b, l, 8), torch.randn(32, 8), tokens(b, l) % 32, torch.rand(32))
    return {
        "ops: linear": Case(call=linear, inputs=rows, sizes=["01", "", "01", ""]),
        "ops: attention": Case(call=attention, inputs=heads, sizes=["02", "02", "0"]),
        "ops: contrastive": Case(call=contrastive, inputs=pairs, sizes=["0", "0", "0", "0", ""]),
    }


MADE = [
    clip("tiny"),
    clip("siglip_tiny"),
    blip(),
    flamingo("resampler"),
    flamingo("patches", num_latents=None, gate="vector", qk_norm=True),  # as Idefics without a resampler
    *map(qwen_vl, ("tiny_qwen2", "tiny", "tiny_qwen3")),
    internvl(),
    deepseek_vl(),
    deepseek_vl2(),
    janus(),
    qwen_audio(),
    blip2(),
    lxmert(),
    vilbert(),
    co_attention(),
    experts(),
    latent_attention(),
    whisper(),
    qformer(),
    cross_attention(),
    gated_cross_attention(),
    resampler(),
    attention_pool(),
    post_norm(),
    fewer_tokens(),
    caches(),
    losses(),
    masks(),
    ops(),
]
CASES = {name: case for made in MADE for name, case in made.items()}
NOT_CALLED = {
    "BLIPConfig",
    "BLIPPretraining",  # draws which pairs are matched
    "CachedContrastive",
    "CrossEntropyOutput",
    "QFormerOutput",
    "Reduced",
    "BLIP2Config",
    "BLIP2RetrievalConfig",
    "CLIPConfig",
    "LXMERTConfig",
    "ViLBERTConfig",
    "FlamingoConfig",
    "DeepSeekVLConfig",
    "DeepSeekVL2Config",
    "TiledImages",
    "InternVLConfig",
    "JanusConfig",
    "QwenAudioConfig",
    "QwenVLConfig",
    "AudioError",
    "LatentSizes",
    "LogMel",
    "WhisperConfig",
    "WhisperTokens",
    "ContextCache",
    "ContextPolicy",
    "Visual",
    "EmbeddingCache",
    "EmbeddingCacheError",
    "SearchResult",
}


def test_every_model_and_module_has_a_case() -> None:
    names = {
        name
        for package in (mmkernels.nn, mmkernels.models)
        for name in package.__all__
        if isinstance(getattr(package, name), type)
    }
    assert names - NOT_CALLED == {re.match(r"\w+", name)[0] for name in CASES} - {"SpanMask", "ops"}  # type: ignore[index]


def served(program: Any, case: Case) -> None:
    """The program gives what the module gives, for sizes other than the example's."""
    for sizes in OTHERS:
        inputs = case.inputs(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), case(*inputs))


def exported(case: Case) -> Any:
    with torch.no_grad():
        return torch.export.export(case, case.inputs(*EXAMPLE), dynamic_shapes=(case.sizes,)).module()


def traced(case: Case) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(case, case.inputs(*EXAMPLE), check_trace=False)


@pytest.mark.parametrize("name", CASES)
def test_exported(name: str) -> None:
    served(exported(CASES[name]), CASES[name])


class Chosen(nn.Module):
    """Calls a case with the rows of a batch that values choose: their number is known to no graph."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.sizes = ({0: torch.export.Dim.DYNAMIC}, *case.sizes)

    def forward(self, *inputs: Tensor) -> Any:
        keep, *given = inputs
        rows = keep.nonzero()[:, 0]
        return self.case(*(x[rows] if 0 in dims else x for x, dims in zip(given, self.case.sizes, strict=True)))

    def inputs(self, batch: int, length: int) -> Inputs:
        return torch.ones(batch, dtype=torch.bool), *self.case.inputs(batch, length)


def by_values() -> list[Any]:
    """Returns the cases of a batch; the models are slow."""
    quick = ("ops", "SpanMask", "BLIP: w", "CoAttention")
    names = [name for name, case in CASES.items() if any(0 in dims for dims in case.sizes)]
    return [pytest.param(x, marks=() if x.startswith(quick) else pytest.mark.slow) for x in names]


@pytest.mark.parametrize("name", by_values())
def test_exported_with_a_batch_that_depends_on_values(name: str) -> None:
    case: Any = Chosen(CASES[name])
    served(exported(case), case)


@pytest.mark.parametrize("name", CASES)
def test_traced(name: str) -> None:
    served(traced(CASES[name]), CASES[name])


@pytest.mark.parametrize("name", ["CrossAttention: dense", "ops: contrastive", "ClipLoss", "SigLipLoss"])
def test_traced_with_the_naive_formulas(name: str) -> None:
    with mmkernels.use_backend("reference"):
        served(traced(CASES[name]), CASES[name])


@pytest.mark.parametrize("program", [exported, traced])
def test_a_program_refuses_another_number_of_images(program: Any) -> None:
    """The places of images are Python numbers, so that a program has those of the example."""
    case = CASES["Flamingo, resampler: labels"]
    ids, pixels = case.inputs(*EXAMPLE)
    made = program(case)
    made(ids, pixels)
    with pytest.raises(Exception, match=r"shape|size|Guard"):
        made(ids, torch.cat([pixels, pixels], dim=1))
