"""Qwen-VL: images and videos of any size become tokens of the text that a language model continues.

Source: Wang et al., "Qwen2-VL", 2024, figure 2; Bai et al., "Qwen2.5-VL Technical Report", 2025, figure 1; Bai et al.,
"Qwen3-VL Technical Report", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models import qwen_vl_weights
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.config import with_generation
from mmkernels.models.blocks.decoder import Decoder, decoder_sizes
from mmkernels.models.blocks.packed_encoder import GridSizes, PackedEncoder, PackedSizes
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageModel
from mmkernels.models.blocks.visual import Media, Visual, grid_places, split
from mmkernels.models.blocks.visual_reduction import head_scores
from mmkernels.models.qwen_vl_config import SIZES, QwenVLConfig
from mmkernels.nn import PatchMerger
from mmkernels.nn.checks import described
from mmkernels.ops.tokens.inputs import Grid, check_integers
from mmkernels.ops.tokens.ranking import to_device
from mmkernels.runtime.checks import can_look

MOST_PATCHES = 2**24
"""Of one call: more are refused before memory is taken."""


class QwenVL(VisionLanguageModel):
    """Predicts the next token from images, videos and text.

    Inputs are those of transformers' processor: ``model(**processor(text=..., images=..., return_tensors="pt"))``. The
    stages can be called one by one: `encode`, then `forward` with ``images=``, any number of times.

    A grid is needed on the host. One on a GPU is read once a call, before anything is encoded, which waits for the GPU;
    no layer waits. Code that `torch.compile` or `torch.export` reads needs it as a list: a program serves the images'
    sizes that it was made with, and any text.

    `from_pretrained` reads the folder of a Hugging Face ``Qwen2VLForConditionalGeneration``,
    ``Qwen2_5_VLForConditionalGeneration`` or ``Qwen3VLForConditionalGeneration``.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import QwenVL
        >>> model = QwenVL.from_size("tiny").eval()
        >>> marker, grid = model.config.image_token_id, torch.tensor([[1, 4, 6]])  # 6 tokens of 2 x 2 patches
        >>> pixels = torch.rand(24, 3 * 2 * 4 * 4)
        >>> prompt = torch.tensor([[5, *[marker] * 6, 7]])
        >>> first = model.generate(prompt, pixels, image_grid_thw=grid, max_new_tokens=3)
        >>> more = torch.tensor([[8, 9]])  # a second question: nothing is encoded again
        >>> model.generate(more, kv_cache=first.kv_cache, max_new_tokens=2).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: QwenVLConfig

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = PackedEncoder(
            PackedSizes(
                width=c.vision_width,
                layers=c.vision_layers,
                heads=c.vision_heads,
                mlp=c.vision_mlp,
                inputs=c.channels * c.patch_frames * c.patch_size**2,
                merge=c.merge,
                activation=c.vision_activation,
                norm="rms" if c.variant == "qwen2_5" else "layer",
                gated=c.variant == "qwen2_5",
                patch_bias=c.variant == "qwen3",
                window=c.window // (c.merge * c.patch_size),
                full_layers=c.full_layers,
                positions=c.position_side,
            )
        )
        window = (1, c.merge, c.merge)
        norm = "rms" if c.variant == "qwen2_5" else "layer"
        self.merger = PatchMerger(c.vision_width, c.text_width, window, norm=norm)
        self.deep_mergers = nn.ModuleList(
            PatchMerger(c.vision_width, c.text_width, window, norm_first=False) for _ in c.deep_layers
        )
        sizes = decoder_sizes(
            c,
            vocab=c.vocab_size,
            eps=c.rms_norm_eps,
            rope_theta=c.rope_theta,
            bias=c.variant != "qwen3",
            qk_norm=c.variant == "qwen3",
            sections=c.rope_sections,
            interleaved=c.variant == "qwen3",
            dropout=c.dropout,
        )
        self._make_decoder(Decoder(sizes), c.tie_embeddings)
        self.set_reducer(c.reduce)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> QwenVLConfig:
        return with_generation(QwenVLConfig.from_hf(values, str(path)), path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: QwenVLConfig) -> Names:
        return qwen_vl_weights.names(config.variant)

    # The stages.

    def encode(self, pixel_values: Tensor, grid: Grid, *, seconds: Sequence[float] | Tensor | None = None) -> Visual:
        """Returns images or videos as tokens: what `forward` takes as `images` or `videos`.

        Args:
            pixel_values: patches ``[N, channels * frames * side^2]``, floating, as transformers' processor orders them.
            grid: (t, h, w) of each image, in patches: integers ``[images, 3]``, or a list of tuples.
            seconds: how long each step of a video's grid lasts ("qwen2_5" only); None: images.

        Returns:
            One entry for each image or video; of a "qwen3" for each step of a video, as its prompts mark them.
        """
        sizes = self._checked_grid("grid", "pixel_values", pixel_values, grid)
        times = self._times("seconds", seconds, len(sizes))
        if self.config.variant == "qwen3":
            sizes = _steps(sizes)
        return self._encode(pixel_values, sizes, [1.0] * len(sizes) if times is None else self._intervals(times))

    def _encode(self, pixel_values: Tensor, grid: GridSizes, intervals: list[float]) -> Visual:
        """Returns images and videos as tokens.

        Args:
            intervals: by how many positions two steps of each grid are apart.
        """
        if not grid:
            return self._nothing()
        m, reducer = self.config.merge, self.reducer
        sizes = [(t, h // m, w // m) for t, h, w in grid]
        if reducer is not None:
            reducer.reducer.tokens(sizes)  # raises where an image has too few
        encoded = self.vision(pixel_values, grid, self.config.deep_layers)
        merged = [self.merger(encoded.x, grid)[0]]
        merged += [merger(x, grid)[0] for merger, x in zip(self.deep_mergers, encoded.kept, strict=True)]
        scored = reducer is not None and reducer.needs_scores
        scores = head_scores(encoded.heads, encoded.mask, m * m) if scored else None
        if encoded.order is not None:
            inverse = torch.empty_like(encoded.order)
            inverse[encoded.order] = torch.arange(inverse.shape[0], device=inverse.device)
            merged = [x[inverse] for x in merged]
            scores = None if scores is None else scores[inverse]
        lengths = tuple(map(prod, sizes))
        where = to_device(grid_places(sizes, intervals), merged[0].device)
        advances = tuple(max(h, w) for _, h, w in sizes)
        visual = Visual(merged[0], lengths, lengths, where, advances, tuple(merged[1:]))
        return visual if reducer is None else reducer.reduce(visual, sizes, scores)

    def _intervals(self, seconds: list[float]) -> list[float]:
        if self.config.variant != "qwen2_5":
            return [1.0] * len(seconds)
        return [self.config.tokens_per_second * each for each in seconds]

    def _times(self, name: str, seconds: Sequence[float] | Tensor | None, videos: int) -> list[float] | None:
        """Returns the checked seconds of each step of new videos."""
        if seconds is None:
            return None
        if self.config.variant != "qwen2_5":
            raise ValueError(f'{name} must be None: positions follow seconds in a "qwen2_5" only, got {seconds}')
        times = torch.as_tensor(seconds, dtype=torch.float64).reshape(-1).tolist()
        if len(times) != videos:
            raise ValueError(f"{name} must have one number a video, {videos}, got {len(times)}")
        if not all(0 <= each < 2**20 for each in times):
            raise ValueError(f"{name} must be numbers from 0 to {2**20}, got {times}")
        return times

    # Inputs of `forward`.

    def _media(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Grid | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Grid | None = None,
        second_per_grid_ts: Sequence[float] | Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        images: Visual | None = None,
        videos: Visual | None = None,
    ) -> tuple[list[Media], Encode]:
        """Checks the visual inputs of `forward`.

        Args:
            pixel_values, image_grid_thw: new images, as in `encode`, row after row; or
            images: what `encode` returned for them.
            pixel_values_videos, video_grid_thw, second_per_grid_ts: new videos, as in `encode`; or
            videos: what `encode` returned for them.
            mm_token_type_ids: what processors return beside the tokens, ``[B, L]``: it must be as the markers tell.
        """
        c = self.config
        given = [images, videos]
        pixels = [pixel_values, pixel_values_videos]
        grids = [
            self._new_grid("images", "image_grid_thw", "pixel_values", image_grid_thw, pixels[0], images),
            self._new_grid("videos", "video_grid_thw", "pixel_values_videos", video_grid_thw, pixels[1], videos),
        ]
        times = self._times("second_per_grid_ts", second_per_grid_ts, len(grids[1]))
        if c.variant == "qwen3":
            grids[1] = _steps(grids[1])
        intervals = [1.0] * len(grids[0]) + self._intervals([1.0] * len(grids[1]) if times is None else times)
        marked = [
            tuple(prod(size) // c.merge**2 for size in grid) if visual is None else visual.marked
            for grid, visual in zip(grids, given, strict=True)
        ]
        media = [Media("image", c.image_token_id, marked[0]), Media("video", c.video_token_id, marked[1])]
        _check_types(input_ids, mm_token_type_ids, media)

        def encode() -> list[Visual]:
            new = [x for x in pixels if x is not None]
            both = self._nothing()
            if new:
                both = self._encode(torch.cat(new) if len(new) > 1 else new[0], grids[0] + grids[1], intervals)
            found = split(both, len(grids[0]))
            return [one if visual is None else visual for visual, one in zip(given, found, strict=True)]

        return media, encode

    def _nothing(self) -> Visual:
        """Returns no images."""
        weight = self.head.weight
        nothing = weight.new_zeros(0, weight.shape[1])
        return Visual(nothing, (), (), None, (), (nothing,) * len(self.deep_mergers))

    def _new_grid(
        self, kind: str, grid_name: str, name: str, grid: Grid | None, pixels: Tensor | None, given: Visual | None
    ) -> GridSizes:
        """Returns the checked grid of new images or videos; () if there are none."""
        if (pixels is None) != (grid is None):
            raise ValueError(f"{name} and {grid_name} must be given together, got one of them")
        if given is not None:
            self._check_encoded(kind, given)
            if pixels is not None:
                raise ValueError(f"{name} must be None with {kind}, got both")
        return () if pixels is None or grid is None else self._checked_grid(grid_name, name, pixels, grid)

    def _check_encoded(self, kind: str, visual: Visual) -> None:
        """Raises unless images are what `encode` of a model with these sizes returns."""
        if not isinstance(visual, Visual):
            raise TypeError(f"{kind} must be what encode returns, got {type(visual).__name__}")
        width, deep = self.decoder.sizes.width, len(self.deep_mergers)
        placed = visual.places is not None or not visual.lengths
        if visual.tokens.shape[1:] != (width,) or len(visual.deep) != deep or not placed:
            must = f"[tokens, {width}] with places and features of {deep} layers, as encode returns"
            raise ValueError(f"{kind} must be {must}, got {list(visual.tokens.shape)} with {len(visual.deep)}")

    def _checked_grid(self, grid_name: str, name: str, pixels: Tensor, grid: Grid) -> GridSizes:
        c = self.config
        sizes = check_integers(grid_name, grid, "(t, h, w) for each image", row=3)
        found = tuple(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
        for number, (_, h, w) in enumerate(found):
            if h % c.merge or w % c.merge:
                must = f"h and w divisible by {c.merge}"
                raise ValueError(f"{grid_name} must have {must}, got {(h, w)} of image {number}")
        patches = sum(map(prod, found))
        if patches > MOST_PATCHES:
            raise ValueError(f"{grid_name} must have at most {MOST_PATCHES} patches in all, got {patches}")
        shape = (patches, self.vision.sizes.inputs)
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.shape != shape:
            got = f"{described(pixels)} {list(getattr(pixels, 'shape', ()))}"
            raise ValueError(f"{name} must be floating {list(shape)} by {grid_name}, got {got}")
        return found


def _check_types(input_ids: Tensor, types: Tensor | None, media: list[Media]) -> None:
    """Raises unless token types are what the markers tell: 1 image, 2 video, 0 text. Looks at values on a CPU only."""
    if types is None:
        return
    if not isinstance(types, Tensor) or types.shape != input_ids.shape:
        raise ValueError(f"mm_token_type_ids must be {list(input_ids.shape)} as input_ids, got {described(types)}")
    if types.is_cpu and can_look(types):
        told = torch.zeros_like(input_ids)
        for number, kind in enumerate(media, 1):
            told = torch.where(input_ids == kind.marker, number, told)
        if not torch.equal(told, types.to(told.dtype)):
            images, videos = (kind.marker for kind in media)
            raise ValueError(f"mm_token_type_ids must be 1 at tokens {images} and 2 at {videos}, else 0")


def _steps(grid: GridSizes) -> GridSizes:
    """Returns the grid of each step of videos: a "qwen3" marks each on its own, behind its time in the text."""
    return tuple((1, h, w) for t, h, w in grid for _ in range(t))
