"""The cases of bench_integrations.py: published widths, random weights, one or two layers.

What only repeats (layers) is small, and so are vocabularies where no loss is computed, so that a run takes seconds on
two cores. The name of the published model stands beside its widths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from integrations_targets import AS_FAST, AT_PEAK, CAP, EAGER, PEAK, SDPA, THIRD_MEMORY, Limit
from models_cases import qwen_prompt
from models_pairs import qwen_config
from torch import Tensor, nn
from transformers_models import MODELS

from mmkernels.models import QwenVL
from mmkernels.testing import parts
from mmkernels.testing.models import Inputs, build
from mmkernels.testing.parts import pixels, right_padded, tokens, vision

Outputs = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A model that is patched, and its targets.

    Args:
        id: in tables and JSON.
        build: makes the model with random weights, in float32.
        inputs: draws its keyword arguments from PyTorch's global generator, floats in float32.
        outputs: of a forward pass, what is compared; of a training step the loss is, and `gradients`.
        own: the model's own implementations of attention, the fastest of which is the peer.
        attention: the class of the attention modules with a target; "": none has one.
        trains: a training step is timed, without the optimiser's update; else a forward pass without gradients.
        gradients: parameters of which the gradients are compared, by their name.
        head: the parameter whose gradient the loss may compute at once: it is no activation.
        products: FLOP of the loss alone, where its time has a target.
        targets: on a CPU.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    outputs: Outputs = lambda out: (out[0],)
    own: tuple[str, ...] = (EAGER, SDPA)
    attention: str = ""
    trains: bool = False
    gradients: tuple[str, ...] = ()
    head: str = ""
    products: float = 0.0
    targets: tuple[Limit, ...] = (AS_FAST,)

    @property
    def passes(self) -> str:
        return "training step" if self.trains else "forward"


def _make(model: str, **config: Any) -> Callable[[], nn.Module]:
    return functools.partial(build, model, config)


def _served(name: str) -> Case:
    """Returns a model of bench_transformers.py, whose attention transformers has a slot for."""
    (model,) = (model for model in MODELS if model.id == name)
    return Case(model.id, model.build, model.inputs, model.outputs)


# Models whose attention transformers has no slot for.

_BASE = {"width": 768, "mlp": 3072, "heads": 12}  # BERT base, ViT-B
_OF_ATTENTION = (AS_FAST, *PEAK)


def _pairs(batch: int, length: int, size: int, lengths: tuple[int, ...]) -> Inputs:
    return right_padded(tokens(batch, length), lengths) | {"pixel_values": pixels(batch, size=size)}


_BLIP = {  # Salesforce/blip-image-captioning-base
    "text_config": parts.encoder(positions=512, encoder_hidden_size=768, projection_dim=768, **_BASE),
    "vision_config": vision(image=384, patch=16, **_BASE),
}
_LXMERT = parts.encoder(  # unc-nlp/lxmert-base-uncased
    positions=512, l_layers=1, x_layers=1, r_layers=1, num_qa_labels=2, num_object_labels=2, num_attr_labels=2, **_BASE
)
_PERCEIVER = {  # deepmind/vision-perceiver-fourier: 512 latents read 50,176 pixels, of which 12,544 are here
    "d_model": 261,
    "num_latents": 512,
    "d_latents": 1024,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1,
}


def _lxmert_inputs() -> Inputs:
    """36 regions, as LXMERT reads, and questions of up to 20 words."""
    boxes = torch.rand(32, 36, 4)
    return right_padded(tokens(32, 20), tuple(range(5, 21)) * 2) | {
        "visual_feats": torch.randn(32, 36, 2048),
        "visual_pos": boxes,
    }


def _visual_bert_inputs() -> Inputs:
    return right_padded(tokens(8, 128), (128, 100, 90, 80, 60, 40, 30, 20)) | {
        "visual_embeds": torch.randn(8, 100, 2048),
        "visual_attention_mask": torch.ones(8, 100, dtype=torch.long),
        "visual_token_type_ids": torch.ones(8, 100, dtype=torch.long),
    }


NO_SLOT = (
    Case(
        "BLIP base, 2 images of 384",
        _make("BlipVisionModel", **vision(image=384, patch=16, **_BASE)),
        lambda: {"pixel_values": pixels(2, size=384)},
        own=(EAGER,),
        attention="BlipAttention",
        targets=_OF_ATTENTION,
    ),
    Case(
        "BLIP base, captions of 2 images",
        _make("BlipForConditionalGeneration", **_BLIP),
        lambda: _pairs(2, 32, 384, (32, 20)),
        outputs=lambda out: (out.logits,),
        own=(EAGER,),
    ),
    Case(
        "LXMERT base, 32 questions",
        _make("LxmertModel", **_LXMERT),
        _lxmert_inputs,
        outputs=lambda out: (out[0], out[1]),
        own=(EAGER,),
        attention="LxmertAttention",
        targets=_OF_ATTENTION,
    ),
    Case(
        "Perceiver, 512 latents of 12,544 pixels",
        _make("PerceiverModel", **_PERCEIVER),
        lambda: {"inputs": torch.randn(1, 12544, 261)},
        own=(EAGER,),
        attention="PerceiverSelfAttention",
        targets=_OF_ATTENTION,
    ),
    Case(
        "ViLT B/32, 4 pairs",
        _make("ViltModel", **vision(image=384, patch=32, max_position_embeddings=40, vocab_size=100, **_BASE)),
        lambda: _pairs(4, 40, 384, (40, 30, 20, 10)),
        own=(EAGER,),
    ),
    Case(  # uclanlp/visualbert-vqa-coco-pre
        "VisualBERT, 8 questions of 100 regions",
        _make("VisualBertModel", **parts.encoder(positions=512, visual_embedding_dim=2048, **_BASE)),
        _visual_bert_inputs,
        own=(EAGER,),
    ),
    Case(  # stepfun-ai/GOT-OCR-2.0-hf: one layer of windows, one of the whole page
        "GOT-OCR2's encoder, a page of 1024",
        _make(
            "models.got_ocr2.modeling_got_ocr2:GotOcr2VisionEncoder",
            **vision(
                width=768,
                heads=12,
                image=1024,
                mlp_dim=3072,
                patch=16,
                window_size=14,
                output_channels=256,
                global_attn_indexes=[1],
            ),
        ),
        lambda: {"pixel_values": pixels(1, size=1024)},
        own=(EAGER,),
    ),
)

# Training steps.

_QWEN = QwenVL.sizes["qwen2_5_3b"]


def _qwen_step() -> nn.Module:
    name, config = qwen_config(replace(_QWEN, vision_layers=2, full_layers=(1,), text_layers=3))
    return build(name, config)


def _supervised() -> Inputs:
    """Returns a prompt of 1,024 tokens with an image of 448 x 448, of which the last 10 % are to be predicted."""
    inputs = qwen_prompt(_QWEN, (1, 32, 32), 1024 - 256)
    labels = inputs["input_ids"].clone()
    labels[:, :-102] = -100
    return inputs | {"labels": labels, "use_cache": False}


_PAIRS, _FEATURES = 4096, 512


def _clip() -> nn.Module:
    """CLIP's loss at the batch and width of ViT-B/32's training, behind towers that cost next to nothing."""
    tiny = {"width": 32, "mlp": 32, "depth": 1, "heads": 1}
    towers = {"text_config": parts.encoder(positions=4, **tiny), "vision_config": vision(image=8, patch=8, **tiny)}
    return build("CLIPModel", towers | {"projection_dim": _FEATURES})


STEPS = (
    Case(
        "Qwen2.5-VL-3B, 10 % of 1,024 supervised",
        _qwen_step,
        _supervised,
        own=(SDPA,),
        trains=True,
        gradients=("lm_head.weight", "model.visual.blocks.0.attn.qkv.weight"),
        head="lm_head.weight",
        targets=(CAP, THIRD_MEMORY),
    ),
    Case(
        f"CLIP's loss, {_PAIRS:,} pairs",
        _clip,
        lambda: {"input_ids": tokens(_PAIRS, 4), "pixel_values": pixels(_PAIRS, size=8), "return_loss": True},
        own=(SDPA,),
        trains=True,
        gradients=("logit_scale", "text_projection.weight"),
        products=8.0 * _PAIRS * _PAIRS * _FEATURES,
        targets=(AT_PEAK,),
    ),
)

SERVED = tuple(
    _served(name)
    for name in (
        "CLIP ViT-L/14, 8 images and texts",
        "Llama-3.2-1B, 1024 tokens",
        "Gemma3-4B, 4 images of 256 tokens",
        "Qwen2.5-VL-3B, 2 images",
        "InternVL3-1B, 2 images",
        "LLaVA-1.5-7B, 1 image",
        "SmolVLM-2B, 2 images",
        "BLIP-2 OPT-2.7B, 2 images",
        "Whisper-large, 30 s, 64 tokens",
    )
)

CASES = (*NO_SLOT, *STEPS, *SERVED)
