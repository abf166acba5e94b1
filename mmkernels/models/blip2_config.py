"""`BLIP2Config` and `BLIP2RetrievalConfig`: the sizes of BLIP-2's two stages, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmkernels.models import blip2_weights as weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields, token_ids
from mmkernels.models.blocks.decoder import Decoder, decoder_sizes
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.blocks.opt import OPTDecoder
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.nn import QFormer
from mmkernels.nn.checks import check_positive

TEXT_MODELS = ("opt", "llama")


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The sizes of an image encoder and a Q-Former, which both stages have.

    Args:
        vision_*: of the image encoder; `vision_mlp` is the width of its feed-forward.
        image_size, patch_size, channels: of an image, and its patches, in pixels.
        qformer_*: of the Q-Former; every `qformer_cross_every`-th layer attends to the image.
        qformer_vocab, qformer_length: the number of different tokens of its text, and the most tokens of one; None: it
            reads no text.
        num_queries: the visual tokens of an image.
        freeze_vision: whether training leaves the image encoder as it is.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    image_size: int
    patch_size: int
    qformer_width: int
    qformer_layers: int
    qformer_heads: int
    qformer_mlp: int
    num_queries: int
    qformer_cross_every: int = 2
    qformer_vocab: int | None = None
    qformer_length: int = 512
    channels: int = 3
    vision_activation: str = "gelu"
    vision_eps: float = 1e-6
    vision_dropout: float = 0.0
    qformer_activation: str = "gelu"
    qformer_eps: float = 1e-12
    qformer_dropout: float = 0.0
    qformer_residual_dropout: float = 0.0
    freeze_vision: bool = True

    def __post_init__(self) -> None:
        check_config(self)
        check_positive("qformer_cross_every", self.qformer_cross_every)

    def make_vision(self) -> tuple[VisionTransformer, nn.LayerNorm]:
        """Returns the image encoder and the norm behind it."""
        vision = VisionTransformer.of(self, Sizes.of(self, "vision"), first_norm=False, patch_bias=True)
        return vision, nn.LayerNorm(self.vision_width, eps=self.vision_eps)

    def make_qformer(self) -> QFormer:
        return QFormer(
            self.qformer_width,
            self.vision_width,
            num_queries=self.num_queries,
            depth=self.qformer_layers,
            num_heads=self.qformer_heads,
            hidden=self.qformer_mlp,
            cross_every=self.qformer_cross_every,
            vocab_size=self.qformer_vocab,
            text_length=self.qformer_length,
            activation=ACTIVATIONS[self.qformer_activation],
            eps=self.qformer_eps,
            dropout=self.qformer_dropout,
            residual_dropout=self.qformer_residual_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class BLIP2Config(BridgeConfig):
    """The sizes of a BLIP-2 that generates: those of `BridgeConfig`, and of the language model.

    Args:
        qformer_vocab: not None in an InstructBLIP, whose Q-Former reads the instruction.
        text_model: "opt": learned positions, layer norms. "llama": rotary positions, RMS norms, gated feed-forward.
        text_*: of the language model; `text_length`: the most tokens of a text.
        image_token_id: the token that marks a visual token in a prompt.
        bos_token_id: the first token of a text without a prompt.
        eos_token_ids: the tokens that end a generated text.
        freeze_text: whether training leaves the language model as it is.
    """

    text_width: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_mlp: int
    vocab_size: int
    image_token_id: int
    text_length: int = 2048
    text_model: str = "opt"
    text_activation: str = "relu"
    text_eps: float = 1e-5
    text_dropout: float = 0.0
    text_residual_dropout: float = 0.0
    rope_theta: float = 1e4
    tie_embeddings: bool = True
    bos_token_id: int = 2
    pad_token_id: int = 1
    eos_token_ids: tuple[int, ...] = ()
    freeze_text: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_token_id", "bos_token_id"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be an integer below vocab_size = {self.vocab_size}, got None")
        if self.text_model not in TEXT_MODELS:
            raise ValueError(f"text_model must be one of {', '.join(TEXT_MODELS)}, got {self.text_model!r}")
        if self.text_model == "opt" and self.text_kv_heads != self.text_heads:
            raise ValueError(f"text_kv_heads must be text_heads = {self.text_heads} in OPT, got {self.text_kv_heads}")
        if self.text_model == "llama" and self.text_width // self.text_heads % 2:
            head = self.text_width // self.text_heads
            raise ValueError(f"text_width / text_heads must be even in Llama, whose positions are rotary, got {head}")

    @property
    def instruct(self) -> bool:
        """Whether the Q-Former reads instructions."""
        return self.qformer_vocab is not None

    def make_decoder(self) -> Decoder:
        """Returns the language model without its last layer."""
        sizes = decoder_sizes(
            self,
            head_dim=self.text_width // self.text_heads,
            vocab=self.vocab_size,
            rope_theta=self.rope_theta,
        )
        return OPTDecoder(sizes, length=self.text_length) if self.text_model == "opt" else Decoder(sizes)

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> BLIP2Config:
        """Returns the configuration that a Hugging Face ``config.json``, as a dict, describes.

        Args:
            config: the dict, of a ``Blip2ForConditionalGeneration`` or an ``InstructBlipForConditionalGeneration``.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        text = theirs.text_config
        if text.model_type not in TEXT_MODELS:
            must = f"model_type must be one of {', '.join(TEXT_MODELS)}"
            raise CheckpointError(f"{where}, text_config: {must}, got {text.model_type!r}")
        _check_vision(theirs, where)
        opt = text.model_type == "opt"
        if opt:
            _check_opt(text, f"{where}, text_config")
        else:
            _check_llama(text, f"{where}, text_config")
        instruct = theirs.model_type == "instructblip"
        pad = text.pad_token_id
        return read_fields(
            cls,
            theirs,
            weights.FIELDS | weights.TEXT_FIELDS[text.model_type],
            where,
            text_model=text.model_type,
            qformer_vocab=theirs.qformer_config.vocab_size if instruct else None,
            rope_theta=1e4 if opt else text.rope_parameters["rope_theta"],
            tie_embeddings=text.tie_word_embeddings,
            bos_token_id=text.bos_token_id,
            pad_token_id=0 if pad is None or pad < 0 else pad,
            eos_token_ids=token_ids(text.eos_token_id),
        )


@dataclass(frozen=True, kw_only=True)
class BLIP2RetrievalConfig(BridgeConfig):
    """The sizes of the first stage: those of `BridgeConfig`, and of its heads.

    Args:
        embed_dim: the width of the contrastive features.
        generation: whether there is the language model's head, which checkpoints for retrieval lack.
        marker_token_id: what stands for a visual token at the start of a text, as newer processors write `num_queries`
            of them, which the model leaves out; it may lie outside of the vocabulary. None: texts have none.
        bos_token_id: the first token of a text that is generated; None: the text stays as it is.
        label_smoothing: of the contrastive loss and of the language model's.
    """

    embed_dim: int
    generation: bool = False
    marker_token_id: int | None = None
    bos_token_id: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.qformer_vocab is None:
            raise ValueError("qformer_vocab must be a positive integer, got None: the Q-Former reads texts here")
        super().__post_init__()
        marker = self.marker_token_id
        if marker is not None and (type(marker) is not int or marker < 0):
            raise ValueError(f"marker_token_id must be an integer >= 0 or None, got {marker!r}")

    @property
    def vocab_size(self) -> int:
        assert self.qformer_vocab is not None
        return self.qformer_vocab

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> BLIP2RetrievalConfig:
        """Returns the configuration that a ``config.json`` of a ``Blip2ForImageTextRetrieval``, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.RETRIEVAL_ARCHITECTURES, where)
        _check_vision(theirs, where)
        if not theirs.qformer_config.use_qformer_text_input:
            must = "use_qformer_text_input must be true in a checkpoint for retrieval"
            raise CheckpointError(f"{where}, qformer_config: {must}, got false")
        fields = {"embed_dim": "image_text_hidden_size", "qformer_vocab": "qformer_config.vocab_size"}
        fields |= {"marker_token_id": "image_token_index"}
        return read_fields(cls, theirs, weights.BRIDGE_FIELDS | fields, where)


def _check_vision(theirs: Any, where: str) -> None:
    if not theirs.vision_config.qkv_bias:
        raise CheckpointError(f"{where}, vision_config: qkv_bias must be true, got false")


def _check_opt(text: Any, where: str) -> None:
    """Raises unless the language model is one that `OPTDecoder` computes."""
    must: dict[str, Any] = {"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True}
    must |= {"_remove_final_layer_norm": False, "layerdrop": 0.0, "word_embed_proj_dim": text.hidden_size}
    for name, value in must.items():
        if getattr(text, name) != value:
            raise CheckpointError(f"{where}: {name} must be {value}, got {getattr(text, name)!r}")


def _check_llama(text: Any, where: str) -> None:
    """Raises unless the language model is one that `Decoder` computes."""
    rope = text.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise CheckpointError(f"{where}: rope_type must be default, got {rope!r}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(text, name, False):
            raise CheckpointError(f"{where}: {name} must be false, got {getattr(text, name)!r}")
    if text.head_dim not in (None, text.hidden_size // max(1, text.num_attention_heads)):
        raise CheckpointError(f"{where}: head_dim must be hidden_size / num_attention_heads, got {text.head_dim}")


_TINY: dict[str, Any] = {
    "vision_width": 32, "vision_layers": 2, "vision_heads": 4, "vision_mlp": 64, "image_size": 32, "patch_size": 8,
    "qformer_width": 48, "qformer_layers": 3, "qformer_heads": 4, "qformer_mlp": 96, "num_queries": 4,
}  # fmt: skip
# ViT-S/16 (Touvron et al., "Training data-efficient image transformers", 2021, table 1), a Q-Former of equal width.
_SMALL: dict[str, Any] = {
    "vision_width": 384, "vision_layers": 12, "vision_heads": 6, "vision_mlp": 1536, "image_size": 224,
    "patch_size": 16, "qformer_width": 384, "qformer_layers": 6, "qformer_heads": 6, "qformer_mlp": 1536,
    "num_queries": 32,
}  # fmt: skip
# EVA-CLIP's ViT-g/14 without its last layer, and a Q-Former of BERT base (Li et al., "BLIP-2", 2023, section 3).
_PUBLISHED: dict[str, Any] = {
    "vision_width": 1408, "vision_layers": 39, "vision_heads": 16, "vision_mlp": 6144, "image_size": 224,
    "patch_size": 14, "qformer_width": 768, "qformer_layers": 12, "qformer_heads": 12, "qformer_mlp": 3072,
    "num_queries": 32,
}  # fmt: skip
_OPT: dict[str, Any] = {"vocab_size": 50304, "image_token_id": 50265, "eos_token_ids": (50118,)}
_VICUNA: dict[str, Any] = {
    "text_model": "llama", "text_activation": "silu", "text_eps": 1e-6, "tie_embeddings": False, "bos_token_id": 1,
    "pad_token_id": 0, "eos_token_ids": (2,),
}  # fmt: skip
SIZES = {
    # For tests.
    "tiny": BLIP2Config(
        **_TINY, text_width=64, text_layers=2, text_heads=4, text_kv_heads=4, text_mlp=128, text_length=128,
        vocab_size=128, image_token_id=127,
    ),
    "tiny_instruct": BLIP2Config(
        **_TINY, **_VICUNA, qformer_vocab=96, qformer_length=32, text_width=64, text_layers=2, text_heads=4,
        text_kv_heads=2, text_mlp=128, text_length=128, vocab_size=128, image_token_id=127,
    ),
    # A language model that is narrower than OPT-125M, the smallest one (width 768), with OPT's vocabulary.
    "small": BLIP2Config(
        **_SMALL, **_OPT, text_width=512, text_layers=6, text_heads=8, text_kv_heads=8, text_mlp=2048,
    ),
    # Published: ViT-g with OPT-2.7B (Li et al., 2023, table 2) and Vicuna-7B (Dai et al., 2023, section 3).
    "opt_2.7b": BLIP2Config(
        **_PUBLISHED, **_OPT, text_width=2560, text_layers=32, text_heads=32, text_kv_heads=32, text_mlp=10240,
    ),
    "vicuna_7b": BLIP2Config(
        **_PUBLISHED, **_VICUNA, qformer_vocab=30523, text_width=4096, text_layers=32, text_heads=32, text_kv_heads=32,
        text_mlp=11008,
        vocab_size=32001, image_token_id=32000,
    ),
}  # fmt: skip
"""The sizes that `BLIP2.from_size` accepts. Layers can be changed: ``from_size("opt_2.7b", text_layers=2)``."""

_BERT: dict[str, Any] = {"qformer_vocab": 30523, "bos_token_id": 30522, "embed_dim": 256, "label_smoothing": 0.1}
RETRIEVAL_SIZES = {
    "tiny": BLIP2RetrievalConfig(
        **_TINY, qformer_vocab=96, qformer_length=32, embed_dim=24, generation=True, bos_token_id=1
    ),
    "small": BLIP2RetrievalConfig(**_SMALL, **_BERT, generation=True),
    "vit_g": BLIP2RetrievalConfig(**_PUBLISHED, **_BERT, generation=True),
}
"""The sizes that `BLIP2Retrieval.from_size` accepts."""
