"""Small BLIP-2 and InstructBLIP models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import decoder, layers, opt, qformer, reads_images, rope, vision

MARKER, VOCAB, QFORMER_VOCAB, QUERIES, SIDE = 99, 128, 96, 4, 16
_LLAMA = decoder(model_type="llama", max_position_embeddings=64, rms_norm_eps=1e-4, tie_word_embeddings=False)

# Changes to the configuration below: `text__x` sets x of the language model, `qformer__x` of the Q-Former.
VARIANTS: dict[str, dict[str, Any]] = {
    "blip2_opt": {},
    "instruct_llama": {"instruct": True, "text": _LLAMA | rope(5000.0)},  # as with Vicuna
    "blip2_llama": {
        "shard": True,
        "text": _LLAMA | rope(),
        "qformer__num_hidden_layers": 4,
        "qformer__cross_attention_frequency": 3,
        "qformer__hidden_act": "gelu_new",
        "vision__hidden_act": "quick_gelu",
        "vision__layer_norm_eps": 1e-3,
    },
    "instruct_opt": {
        "instruct": True,
        "text__activation_function": "gelu",
        "text__tie_word_embeddings": False,
        "qformer__cross_attention_frequency": 1,
    },
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    changes = VARIANTS[variant]
    text = changes.get("text", opt(model_type="opt", positions=64))
    between = qformer(vocabulary=QFORMER_VOCAB, positions=32)
    images = vision(image=SIDE, patch=8, depth=1, heads=2)
    parts = {"vision": images, "qformer": between | layers(width=48), "text": dict(text)}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
    more = {"qformer_config": parts["qformer"], "num_query_tokens": QUERIES}
    return reads_images(parts["vision"], parts["text"], marker="image_token_index", **more)


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    name = "InstructBlip" if VARIANTS[variant].get("instruct") else "Blip2"
    return randomise(build_model(f"{name}ForConditionalGeneration", config(variant)).eval(), std=0.2)


def pixels(images: int) -> Tensor:
    """Returns random images ``[images, 3, S, S]``."""
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(images))


def prompt(images: list[int], start: int = 5) -> tuple[Tensor, Tensor]:
    """Returns prompts and their attention mask ``[B, L]``, padded on the left.

    Args:
        images: how many images each row has; text stands between them.
        start: the first token of the text; the others differ from it and from each other.
    """
    rows = []
    for row, count in enumerate(images):
        tokens = [start + 7 * row + column for column in range(4 + 3 * count)]
        for image in range(count):
            at = 2 + image * (QUERIES + 3)
            tokens[at:at] = [MARKER] * QUERIES
        rows.append(tokens)
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def instructions(count: int, length: int = 5) -> dict[str, Tensor]:
    """Returns texts for the Q-Former, of which the last one is padded on the right."""
    ids = torch.randint(5, QFORMER_VOCAB, (count, length), generator=torch.Generator().manual_seed(count))
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"qformer_input_ids": ids * mask, "qformer_attention_mask": mask}


def inputs(variant: str, images: tuple[int, ...] = (2, 1)) -> dict[str, Tensor]:
    """Returns two prompts: one with two images, one with one."""
    ids, mask = prompt(list(images))
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(sum(images))}
    return given | (instructions(sum(images)) if VARIANTS[variant].get("instruct") else {})


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """Returns labels of the text, but for the first token, which padding would predict."""
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) < 2) | (ids == MARKER), -100)


# Parts of transformers' processors.


def image_processor() -> Any:
    return transformers.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def tokenizer(start: str, image: int, side: str) -> Any:
    """Knows the words w5 to w89; a text begins with the token `start`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": image}
    words = {f"w{number}": number for number in range(5, 90)}
    made = Tokenizer(models.WordLevel(special | words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(f"{start} $A", special_tokens=[(start, special[start])])
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, **ends)


def photos(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(count)
    draw = lambda: torch.randint(256, (20, 30, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(draw()) for _ in range(count)]
