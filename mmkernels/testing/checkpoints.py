"""Small checkpoints of image-text-to-text models in folders, each with a processor: no network is needed to try one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import Config, build, randomise, seeded
from mmkernels.testing.parts import IMAGE, IMAGE_END, IMAGE_START, VIDEO

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,?:\n"
_PLAIN = """{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}\
{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@dataclass(frozen=True)
class _Small:
    """A family whose processor is made here.

    Args:
        processor: makes it.
        changes: arguments of the configuration that differ from the family's in `FAMILIES`.
    """

    processor: Callable[[], Any]
    changes: Config = field(default_factory=dict)


def save(name: str, folder: Path, *, weights: bool = True) -> Path:
    """Writes a small checkpoint that `transformers.AutoModelForImageTextToText` and ``AutoProcessor`` load.

    Args:
        name: one of `SMALL`.
        folder: where to; it is made.
        weights: write weights too, all of them random; else only the configuration.

    Returns:
        the folder.

    Raises:
        ValueError: there is no such name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print((save("llava", Path(folder)) / "config.json").exists())
        True
    """
    if name not in SMALL:
        raise ValueError(f"name must be one of {', '.join(SMALL)}; got {name!r}")
    small, family = SMALL[name], FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    with seeded(0):
        model = randomise(build(family.model, _changed(family.config, small.changes)), 0, 0.08)
    if weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    small.processor().save_pretrained(folder)
    return folder


def _changed(config: Config, changes: Config) -> Config:
    """Returns a configuration with other values; those of a part are changed one by one."""
    found = copy.deepcopy(config)
    for name, value in changes.items():
        found[name] = _changed(found[name], value) if isinstance(value, dict) and name in found else value
    return found


# Processors. Pillow alone prepares the images, so that torchvision is not needed, but by those that take videos too.


def _tokenizer(special: dict[str, int], **options: Any) -> Any:
    """One token a letter, and these beside them."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {letter: 5 + number for number, letter in enumerate(_LETTERS)} | special
    taken = set(words.values())
    words |= {f"<unused_{number}>": number for number in range(max(taken)) if number not in taken}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named_too = options.pop("named", {})
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **named, extra_special_tokens=named_too, **options
    )
    fast.add_tokens([transformers.AddedToken(token, special=True, normalized=False) for token in special])
    return fast


def _chat(image: str) -> str:
    return _PLAIN.replace("IMAGE", image)


def _square(size: int, **more: Any) -> Config:
    return {"size": {"height": size, "width": size}, **more}


def _llava() -> Any:
    import transformers

    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.LlavaProcessor(
        images,
        _tokenizer({"<image>": IMAGE}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat("<image>"),
    )


def _paligemma() -> Any:
    import transformers

    images: Any = transformers.SiglipImageProcessorPil(**_square(32))
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, _tokenizer({"<image>": IMAGE}, named={"image_token": "<image>"}))


def _blip_2() -> Any:
    import transformers

    images = transformers.BlipImageProcessorPil(**_square(32))
    return transformers.Blip2Processor(images, _tokenizer({"<image>": IMAGE}), num_query_tokens=8)


def _janus() -> Any:
    import transformers

    special = {"<begin_of_image>": IMAGE_START, "<end_of_image>": IMAGE_END, "<image_placeholder>": IMAGE}
    names = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_placeholder>"}
    images = transformers.JanusImageProcessorPil(**_square(32), min_size=4)
    return transformers.JanusProcessor(
        images, _tokenizer(special, named=names), chat_template=_chat("<image_placeholder>"), num_image_tokens=16
    )


def _mllama() -> Any:
    import transformers

    images = transformers.MllamaImageProcessorPil(**_square(32), max_image_tiles=2)
    tokens = _tokenizer({"<|image|>": IMAGE, "<|python_tag|>": VIDEO}, named={"image_token": "<|image|>"})
    return transformers.MllamaProcessor(images, tokens, chat_template=_chat("<|image|>"))


def _idefics3() -> Any:
    import transformers

    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return transformers.Idefics3Processor(images, _idefics_tokens(), image_seq_len=4, chat_template=_chat("<image>"))


def _idefics_tokens(**options: Any) -> Any:
    special = {"<image>": IMAGE, "<fake_token_around_image>": IMAGE_START, "<global-img>": IMAGE_END}
    special |= {"<end_of_utterance>": VIDEO}
    special |= {f"<row_{i + 1}_col_{j + 1}>": 100 + 6 * i + j for i in range(6) for j in range(6)}
    return _tokenizer(special, **options)


def _smolvlm() -> Any:
    import transformers

    images = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    videos = transformers.SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    return transformers.SmolVLMProcessor(
        images, _idefics_tokens(), videos, image_seq_len=4, chat_template=_chat("<image>")
    )


def _qwen2_5_vl() -> Any:
    import transformers

    special = {"<|vision_end|>": IMAGE_END, "<|vision_start|>": IMAGE_START}
    special |= {"<|video_pad|>": VIDEO, "<|image_pad|>": IMAGE}
    sizes: Config = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    images = transformers.Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 256, "longest_edge": 2**20})
    template = _chat("<|vision_start|><|image_pad|><|vision_end|>")
    return transformers.Qwen2_5_VLProcessor(
        images, _tokenizer(special), transformers.Qwen2VLVideoProcessor(**sizes), chat_template=template
    )


def _internvl() -> Any:
    import transformers

    special = {"<img>": IMAGE_START, "</img>": IMAGE_END, "<IMG_CONTEXT>": IMAGE, "<video>": VIDEO}
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    images = transformers.GotOcr2ImageProcessorPil(**_square(32), crop_to_patches=True, max_patches=6)
    return transformers.InternVLProcessor(
        images,
        _tokenizer(special, named=names | {"video_token": "<video>"}),
        transformers.InternVLVideoProcessor(**_square(32)),
        image_seq_length=4,
        chat_template=_chat("<IMG_CONTEXT>"),
    )


_LONG = {"text_config": {"max_position_embeddings": 8192}}
_ROWS = {"text_config": {"vocab_size": 140}}  # tokens that name the rows and columns of a photograph's parts

SMALL: dict[str, _Small] = {
    "llava": _Small(_llava),
    "paligemma": _Small(_paligemma, {"text_config": {"vocab_size": 1300}}),
    "blip_2": _Small(_blip_2),
    "janus": _Small(_janus),
    "mllama": _Small(_mllama),
    "idefics3": _Small(_idefics3, _ROWS),
    "smolvlm": _Small(_smolvlm, _ROWS),
    "qwen2_5_vl": _Small(_qwen2_5_vl, _LONG),
    "internvl": _Small(_internvl, _LONG),
}
"""By the family's name. The last three have a processor of videos too, which needs torchvision."""
