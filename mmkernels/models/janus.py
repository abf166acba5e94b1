"""Janus: one language model that reads images as tokens of its text, and writes images as tokens of a codebook.

Source: Wu et al., "Janus: Decoupling Visual Encoding for Unified Multimodal Understanding and Generation", 2024,
figure 2; Chen et al., "Janus-Pro", 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models import janus_generation, janus_weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.decoder import Decoder, decoder_sizes
from mmkernels.models.blocks.patch_tokens import PatchTokenModel
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageOutput
from mmkernels.models.blocks.visual import Media, Visual
from mmkernels.models.janus_config import SIZES, JanusConfig, with_image_tokens
from mmkernels.models.janus_vq import VQ, check_image_tokens
from mmkernels.nn.linear_layer import linear
from mmkernels.runtime.checks import check_bool


class Janus(PatchTokenModel):
    """Predicts the next token from images and text, and the tokens of an image from text.

    Inputs are those of transformers' processor: ``model(**processor(text=..., images=..., return_tensors="pt"))``, and
    with ``generation_mode="image"`` for `generate_image`.

    `from_pretrained` reads the folder of a Hugging Face ``JanusForConditionalGeneration`` (Janus and Janus-Pro).

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Attributes:
        vq: the tokenizer of generated images. Janus is trained on its tokens, and leaves it as it is.
        image_embed, image_aligner: from image tokens to the language model's inputs.
        image_head: from the language model's hidden states to the scores of the next image token.

    Example:
        >>> import torch
        >>> from mmkernels.models import Janus
        >>> model = Janus.from_size("tiny").eval()
        >>> marker, photos = model.config.image_token_id, torch.rand(1, 3, 32, 32)
        >>> prompt = torch.tensor([[1, *[marker] * 16, 7]])  # a photo of 4 x 4 patches
        >>> model.generate(prompt, photos, max_new_tokens=3).tokens.shape
        torch.Size([1, 3])
        >>> prompt = torch.tensor([[1, 5, 6, model.config.image_start_token_id]])
        >>> tokens = model.generate_image(prompt, guidance_scale=5.0, seed=0)
        >>> tokens.shape, model.decode(tokens).shape
        (torch.Size([1, 16]), torch.Size([1, 3, 8, 8]))
    """

    sizes = SIZES
    config: JanusConfig

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        c = config
        self._make_vision(c)
        self.aligner = _aligner(c.vision_width, c.text_width, c.aligner_layers, ACTIVATIONS[c.aligner_activation])
        sizes = decoder_sizes(
            c, vocab=c.vocab_size, eps=c.rms_norm_eps, rope_theta=c.rope_theta, bias=False, dropout=c.dropout
        )
        self._make_decoder(Decoder(sizes), c.tie_embeddings)
        activation = ACTIVATIONS[c.image_activation]
        self.image_embed = nn.Embedding(c.vq_codes, c.vq_code_width)
        self.image_aligner = _aligner(c.vq_code_width, c.text_width, c.image_aligner_layers, activation)
        hidden = nn.Linear(c.text_width, c.text_width)
        self.image_head = nn.Sequential(hidden, activation(), nn.Linear(c.text_width, c.vq_codes))
        self.vq = VQ(c.vq_sizes)
        self.set_reducer(c.reduce)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> JanusConfig:
        config = JanusConfig.from_hf(values, str(path))
        return with_image_tokens(config, path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: JanusConfig) -> Names:
        return janus_weights.names(config.aligner_layers, config.image_aligner_layers)

    # Images that are read.

    def encode(self, pixel_values: Tensor) -> Visual:
        """Returns images as tokens of the text: what `forward` takes as `images`.

        Args:
            pixel_values: images ``[N, channels, image_size, image_size]``, floating.
        """
        self.vision.check(pixel_values)
        return self._encode(pixel_values)

    def _encode(self, pixel_values: Tensor) -> Visual:
        if not pixel_values.shape[0]:
            return self._nothing()
        features, heads = self._features(pixel_values)
        return self._visual(self.aligner(features), heads)

    def _media(  # type: ignore[override]
        self, input_ids: Tensor, *, pixel_values: Tensor | None = None, images: Visual | None = None
    ) -> tuple[list[Media], Encode]:
        """Checks the visual inputs of `forward`.

        Args:
            pixel_values: new images, as in `encode`; or
            images: what `encode` returned for them.
        """
        if pixel_values is not None:
            self.vision.check(pixel_values)
        return self._new_or_encoded(pixel_values, images, self._encode)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        image_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_logits: bool | None = None,
        **options: Any,
    ) -> VisionLanguageOutput:
        """Returns the logits of the next token, or the loss: as `VisionLanguageModel.forward`, or of image tokens.

        Args:
            input_ids, pixel_values, attention_mask, return_logits, options: as in `VisionLanguageModel.forward`; or,
                with `image_tokens`, prompts without images, as in `generate_image`, and no options.
            image_tokens: of the image that follows each prompt, integers ``[B, N]``, as `encode_tokens` returns them.
                The result's `loss` is their mean cross-entropy, each given the prompt and the tokens before it. No
                logits are built for it (see `mmkernels.linear_cross_entropy`); with ``return_logits=True`` the result
                also has them, ``[B, N, vq_codes]``.

        Raises:
            TypeError, ValueError: as in `VisionLanguageModel.forward`; `image_tokens` has the wrong shape, dtype or
                values, or comes with images or options.
        """
        if image_tokens is None:
            return super().forward(
                input_ids, pixel_values, attention_mask=attention_mask, return_logits=return_logits, **options
            )
        given = {name: x for name, x in ({"pixel_values": pixel_values} | options).items() if x is not None}
        if given:
            raise ValueError(f"{next(iter(given))} must be left out with image_tokens, got it too")
        check_image_tokens("image_tokens", image_tokens, self.vq.sizes)
        image_tokens = image_tokens.long()
        hidden = janus_generation.image_hidden(self, input_ids, image_tokens, attention_mask)
        loss = janus_generation.image_loss(self.image_head, hidden, image_tokens)
        return VisionLanguageOutput(self.image_head(hidden) if return_logits else None, loss, None)

    # Images that are generated.

    @torch.no_grad()
    def generate_image(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Returns the tokens of an image for each prompt, int64 ``[B, N]``: what `decode` makes an image of.

        Each token is drawn from ``u + guidance_scale * (c - u)``, where c are its logits with the prompt and u those
        with `unconditional` of it. Both are rows of one batch, with one cache of keys and values, which is allocated
        once. The last layer is computed once for both, of hidden states that are combined in the same way.

        Args:
            input_ids: prompts, integers ``[B, L]``, which end with the token behind which an image starts.
            attention_mask: ``[B, L]``, 0: padding, on either side.
            guidance_scale: how far the prompt is exaggerated, from 0 on. 1: not at all, 0: it is ignored; in these
                two cases there is only one row for each prompt.
            temperature, top_p: as in `blocks.sampling.sample`; temperature 0 takes the most likely token.
            seed: for a reproducible draw; None: PyTorch's global generator.

        Raises:
            TypeError, ValueError: an input has the wrong shape, dtype or values (values are checked on a CPU only), the
                tokens of text and image are more than `text_length`, or the configuration does not say what starts
                a text or an image, which guidance needs.

        Source: Wu et al., "Janus", 2024, section 3.3; Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022.
        """
        options = janus_generation.Options(guidance_scale, temperature, top_p, seed)
        return janus_generation.generate_image(self, input_ids, attention_mask, options)

    def unconditional(self, input_ids: Tensor) -> Tensor:
        """Returns prompts that say nothing: all but the tokens that start a text or an image become padding tokens.

        Padding tokens are seen like others. Training replaces some prompts by theirs, 10 % in Janus, for guidance.

        Args:
            input_ids: integers ``[B, L]``.
        """
        c = self.config
        stays = torch.zeros_like(input_ids, dtype=torch.bool)
        for name, token in (("bos_token_id", c.bos_token_id), ("image_start_token_id", c.image_start_token_id)):
            if token is None:
                raise ValueError(f"{name} must be an integer in the configuration for guidance, got None")
            stays |= input_ids == token
        return input_ids.masked_fill(~stays, c.pad_token_id)

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """Returns image tokens ``[..., n]`` as inputs of the language model, ``[..., n, text_width]``."""
        x: Tensor = self.image_embed(image_tokens)
        for layer in self.image_aligner:
            x = linear(layer, x)
        return x

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Returns images ``[B, channels, S, S]``, about from -1 to 1.

        Args:
            image_tokens: integers ``[B, N]``, as `generate_image` returns them.
        """
        return self.vq.decode(image_tokens)

    @torch.no_grad()
    def encode_tokens(self, pixels: Tensor, directions: bool | None = None) -> Tensor:
        """Returns the tokens of images that `forward` can learn to generate, int64 ``[B, N]``.

        Args:
            pixels: floating ``[B, channels, S, S]`` from -1 to 1; S is `VQSizes.image_side`.
            directions: whether tokens are the codes nearest in direction, as the released models were trained, or in
                distance, as transformers computes them; None: as `config.vq_directions` says. To train a released
                model further, take True.
        """
        if directions is not None:
            check_bool("directions", directions)
        return self.vq.encode(pixels, directions)


def _aligner(width: int, out: int, layers: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Returns linear layers with activations between them."""
    parts: list[nn.Module] = [nn.Linear(width, out)]
    for _ in range(layers - 1):
        parts += [activation(), nn.Linear(out, out)]
    return nn.Sequential(*parts)
