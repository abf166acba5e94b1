"""The model of `spoken_digits.py`: a tower for sounds, one for images, and a head that compares the two closely."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from spoken_digits_data import BANDS, FRAMES, Batch, Recordings
from torch import Tensor, nn

from mmkernels import SpanMask, attention_received, co_attention, info_nce
from mmkernels.models.blocks.audio_encoder import AudioEncoder
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.nn import AttentionPool

WIDTH, HEADS, LAYERS = 64, 4, 2
SIDE, PATCH = 8, 2  # of an image and of a patch, in pixels
GAIN = 4.0  # of patches over PyTorch's initial weights, or all images would look alike at first
LEAST_VARIANCE = 1e-2  # that features are divided by: less would enlarge rounding errors before the towers have learned


class Encoded(NamedTuple):
    """What a tower makes of sounds or images.

    Attributes:
        tokens: [B, L, WIDTH], one for two frames or for a patch.
        lengths: int64 [B], tokens that are not padding; None: all.
        features: [B, WIDTH], unit vectors, in one space for sounds and images.
    """

    tokens: Tensor
    lengths: Tensor | None
    features: Tensor

    def part(self, rows: Tensor) -> Encoded:
        return Encoded(self.tokens[rows], None if self.lengths is None else self.lengths[rows], self.features[rows])


class Pool(nn.Module):
    """Makes unit vectors [B, WIDTH] of tokens [B, L, WIDTH]: by a learned query, then a norm over the batch.

    Without this norm, features are nearly equal before a tower has learned, and where all are equal the contrastive
    loss has no slope.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPool(WIDTH, num_heads=HEADS, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH, eps=LEAST_VARIANCE, affine=False)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        return F.normalize(self.norm(self.pool(tokens, lengths)[:, 0]), dim=-1)


class Match(nn.Module):
    """Tells how well a sound and an image belong together: each frame attends to all patches, and each patch to all
    frames, by one matrix of scores (`co_attention`)."""

    def __init__(self) -> None:
        super().__init__()
        self.of_frames, self.of_patches = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.to_frames, self.to_patches = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.compare = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()) for _ in range(2)
        )
        self.judge = nn.Linear(6 * WIDTH, 1)

    def forward(self, sounds: Encoded, images: Encoded) -> Tensor:
        """Returns logits [B]: above 0, the sound i and the image i are of the same digit."""
        (a, value_a), (b, value_b) = self.heads(sounds, images)
        assert sounds.lengths is not None
        there = torch.arange(a.shape[2]) < sounds.lengths[:, None]  # [B, frames]
        frames, patches = co_attention(a, b, value_a, value_b, valid_a=there)
        frames = sounds.tokens + self.to_frames(frames.transpose(1, 2).flatten(2))
        patches = images.tokens + self.to_patches(patches.transpose(1, 2).flatten(2))
        heard, seen = (layer(x) for layer, x in zip(self.compare, (frames, patches)))
        heard, seen = (heard * there[..., None]).sum(1) / sounds.lengths[:, None], seen.mean(1)
        return self.judge(torch.cat([heard, seen, heard * seen], dim=1))[:, 0]

    def heads(self, sounds: Encoded, images: Encoded) -> list[list[Tensor]]:
        """Returns keys and values of frames and of patches, each [B, HEADS, L, D]."""
        found = self.of_frames(sounds.tokens), self.of_patches(images.tokens)
        return [list(x.unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)) for x in found]

    @torch.no_grad()
    def looks(self, sounds: Encoded, images: Encoded) -> tuple[Tensor, Tensor]:
        """Returns how much frames attend to each patch, and patches to each frame: [B, patches], [B, frames]."""
        (a, _), (b, _) = self.heads(sounds, images)
        there = torch.arange(a.shape[2]) < sounds.lengths[:, None]
        weights = there[:, None] / sounds.lengths[:, None, None]
        patches = attention_received(a, b, query_weights=weights)
        frames = attention_received(b, a, SpanMask.key_padding(sounds.lengths)) / b.shape[2]
        return patches.mean(1), frames.mean(1)


class SpokenDigits(nn.Module):
    """The whole model. A sound's tower is Whisper's encoder, an image's a ViT, both of small sizes."""

    def __init__(self) -> None:
        super().__init__()
        sizes = Sizes(width=WIDTH, layers=LAYERS, heads=HEADS, mlp=2 * WIDTH)
        self.sound = AudioEncoder(sizes, mel_bins=BANDS, positions=FRAMES // 2)
        self.image = VisionTransformer(sizes, image_size=SIDE, patch_size=PATCH, channels=1, class_token=False)
        self.image_norm = nn.LayerNorm(WIDTH)
        self.sound_pool, self.image_pool = Pool(), Pool()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.match = Match()
        with torch.no_grad():
            self.image.patch.weight.mul_(GAIN)
            self.image.positions.mul_(0.5)

    def encode_sound(self, recordings: Recordings) -> Encoded:
        tokens = self.sound(recordings.mel, recordings.frames)
        lengths = self.sound.output_lengths(recordings.frames)
        return Encoded(tokens, lengths, self.sound_pool(tokens, lengths))

    def encode_image(self, pixels: Tensor) -> Encoded:
        """Encodes images [B, 8, 8], from 0 to 1."""
        tokens = self.image_norm(self.image(pixels[:, None]))
        return Encoded(tokens, None, self.image_pool(tokens))

    def losses(self, batch: Batch, *, hard: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the contrastive loss of a batch, and that of the head, of right and wrong pairs.

        Args:
            hard: whether every other wrong image is the most similar one to the sound, in place of a random one.
        """
        sounds, images = self.encode_sound(batch.recordings), self.encode_image(batch.pixels)
        contrastive = info_nce(
            images.features,  # [N, WIDTH]
            sounds.features,  # [N, WIDTH]
            self.log_scale.exp().clamp(max=100.0),
            image_ids=batch.digits,  # an image and a sound of one digit belong together,
            text_ids=batch.digits,  # whichever pair they came with
        )
        wrong = batch.wrong.clone()
        if hard:
            same = batch.digits[::2, None] == batch.digits
            wrong[::2] = (sounds.features[::2] @ images.features.mT).masked_fill(same, -2.0).argmax(1)
        right, other = self.match(sounds, images), self.match(sounds, images.part(wrong))
        return contrastive, F.softplus(-right).mean() + F.softplus(other).mean()
