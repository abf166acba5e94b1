"""What a model family is, and the small weights and inputs that every family is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Built = tuple[Any, Inputs]
"""A transformers model and the keyword arguments of one forward pass."""

IMAGE, VIDEO, IMAGE_START, IMAGE_END = 99, 98, 97, 96
"""Ids of the tokens that stand for images; text is drawn from the ids below `_TEXT_IDS`."""

_TEXT_IDS = 60


@dataclass(frozen=True)
class Family:
    """A model class of transformers that is small enough to be checked.

    Args:
        name: as transformers names the folder, with what is special about this one after it.
        make: draws the model and its inputs; call `build` instead.
        padded: masks among the inputs whose zeros are padding, [B, L].
        only_forward: inputs that `generate` makes itself.
    """

    name: str
    make: Callable[[], Built]
    padded: tuple[str, ...]
    only_forward: tuple[str, ...]

    def build(self) -> Built:
        """The model with random weights, in evaluation mode, and inputs for it: the same ones each time."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model, inputs = self.make()
            return randomise(model).requires_grad_(True).eval(), inputs


def family(
    *, padded: tuple[str, ...] = ("attention_mask",), only_forward: tuple[str, ...] = ()
) -> Callable[[Callable[[], Built]], Family]:
    """A function that draws a model and its inputs, as the `Family` of its name."""
    return lambda make: Family(make.__name__, make, padded, only_forward)


def randomise(model: Any, std: float = 0.1) -> Any:
    """Redraw every parameter in place: several classes start gates at 0, where attention would change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0  # a norm's
            parameter.normal_(mean, std)
    return model


# Sizes of the parts, with the names that transformers' configurations give them.


def text_config(**more: Any) -> dict[str, Any]:
    """Of a language model in the fashion of Llama."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def vision_config(**more: Any) -> dict[str, Any]:
    """Of a vision transformer: an image of 32 x 32 pixels is 16 patches."""
    return layers_config(image_size=32, patch_size=8, **more)


def short_text_config(**more: Any) -> dict[str, Any]:
    """Of the text tower of a two-tower model, or of an encoder."""
    tokens = {"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return layers_config(**tokens, **more)


def layers_config(**more: Any) -> dict[str, Any]:
    """Of two small layers."""
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | more


def opt_config(**more: Any) -> dict[str, Any]:
    """Of OPT, which BLIP-2 speaks through."""
    return {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


# Inputs.


def tokens(batch: int, length: int) -> Tensor:
    """Text, of ids that mean nothing special: [batch, length]."""
    return torch.randint(5, _TEXT_IDS, (batch, length))


def pixels(*shape: int, size: int = 32) -> Tensor:
    """Images: [*shape, 3, size, size]."""
    return torch.randn(*shape, 3, size, size)


def left_padded(ids: Tensor, lengths: tuple[int, ...]) -> Inputs:
    """`ids` [B, L] with all but the last `lengths` of each row turned into padding, and the mask that says so."""
    places = torch.arange(ids.shape[1])
    return _masked(ids, places >= ids.shape[1] - torch.tensor(lengths)[:, None])


def right_padded(ids: Tensor, lengths: tuple[int, ...]) -> Inputs:
    """`ids` [B, L] with all but the first `lengths` of each row turned into padding, and the mask that says so."""
    return _masked(ids, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


def _masked(ids: Tensor, seen: Tensor) -> Inputs:
    return {"input_ids": ids.where(seen, 0), "attention_mask": seen.long()}


def prompt(images: tuple[int, ...], padding: int = 3, marker: int = IMAGE) -> Inputs:
    """Text around images, of the same length for each row but for the padding to the left of the second.

    Args:
        images: tokens of each image in a row, at least one text token before each.
    """
    parts = [tokens(2, padding + 1)]
    for count in images:
        parts += [torch.full((2, count), marker), tokens(2, 2)]
    ids = torch.cat(parts, 1)
    return left_padded(ids, (ids.shape[1], ids.shape[1] - padding))
