"""What is timed of a pair of models: each kind of work once, for both sides."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.context import ContextCache
from mmkernels.models.blocks.vision_language import VisionLanguageModel
from mmkernels.testing.models import Inputs

Results = tuple[Tensor, ...]

MAIN = ""
"""The key of a row's own inputs; others belong to what it is compared with."""


class Work:
    """Images are encoded, and a prompt with them is read up to its first new token.

    Attributes:
        passes: in tables.
        trains: whether it has a backward pass.
        attends: whether it calls attention.
    """

    passes = "encode + prefill"
    trains = False
    attends = True

    def layers(self, config: Any) -> int:
        """Returns how many layers attend."""
        return int(config.vision_layers + getattr(config, "sam_layers", 0) + config.text_layers)

    def encoder(self, model: Any) -> nn.Module | None:
        """Returns the part of our model whose calls are counted; None: it has none."""
        encoder: nn.Module | None = getattr(model, "vision", None)
        return encoder

    def head_shape(self, model: Any) -> torch.Size | None:
        """Returns the shape of the weights from which the loss is computed; None: there are none."""
        head = getattr(model, "head", None)
        return None if head is None else head.weight.shape

    def use_attention(self, model: Any, name: str) -> None:
        """Lets transformers' model attend by this implementation."""
        model.set_attn_implementation(name)

    def cache_share(self, model: Any, state: Any) -> float | None:
        """Returns the bytes that a token takes in our cache over those of its publication; None: they are no target.

        Args:
            model: ours.
            state: what `begin` returned for it.
        """
        return None

    def begin(self, model: Any, inputs: Inputs) -> Any:
        """Does what is done once before all runs; returns what `resume` needs."""

    def resume(self, state: Any, inputs: Inputs) -> Inputs:
        """Returns the arguments of one run, which is timed after this."""
        return inputs

    def ours(self, model: VisionLanguageModel, inputs: Inputs) -> Results:
        logits = model(**inputs, last_logits_only=True).logits
        assert logits is not None
        return (logits,)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        return (model(**inputs, logits_to_keep=1).logits,)


class Encode(Work):
    """Images are encoded, up to the tokens that the language model reads. For a Qwen-VL."""

    passes = "encode"

    def layers(self, config: Any) -> int:
        return int(config.vision_layers)

    def ours(self, model: Any, inputs: Inputs) -> Results:
        return (model.encode(inputs["pixel_values"], inputs["image_grid_thw"]).tokens,)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        (tokens,) = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        return (tokens,)


class TrainingStep(Work):
    """The loss and the gradients of every parameter, without the optimiser's update. For a Qwen-VL."""

    passes = "training step"
    trains = True

    def ours(self, model: Any, inputs: Inputs) -> Results:
        return self._step(model, inputs, model.head.weight, model.vision.blocks[0].qkv.weight)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        first = model.model.visual.blocks[0].attn.qkv.weight
        return self._step(model, inputs | {"use_cache": False}, model.lm_head.weight, first)

    def _step(self, model: Any, inputs: Inputs, last: Tensor, first: Tensor) -> Results:
        """Returns the loss, and the gradients of the last and the first layer's weights (of the head 1,000 rows)."""
        loss = model(**inputs).loss
        loss.backward()
        assert last.grad is not None and first.grad is not None
        return loss.detach(), last.grad[:1000].clone(), first.grad


class BridgeStep(Work):
    """BLIP-2's second stage: the loss, and the gradients of all that is trained, the Q-Former and its projection."""

    passes = "training step"
    trains = True

    def layers(self, config: Any) -> int:
        cross = -(-config.qformer_layers // config.qformer_cross_every)
        return int(config.vision_layers + config.qformer_layers + cross + config.text_layers)

    def ours(self, model: Any, inputs: Inputs) -> Results:
        loss = model(**inputs).loss
        return self._step(loss, model.projection.weight, model.qformer.queries)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        loss = model(**inputs, use_cache=False).loss
        return self._step(loss, model.language_projection.weight, model.query_tokens)

    def _step(self, loss: Tensor, last: Tensor, first: Tensor) -> Results:
        """Returns the loss, and the gradients of the projection's weight and of the queries."""
        loss.backward()
        assert last.grad is not None and first.grad is not None
        return loss.detach(), last.grad, first.grad.reshape(first.shape[-2:])


class SecondTurn(Work):
    """A second question about an image: new tokens after those in the cache. Inputs without a first turn have no cache.

    Inputs have the first turn's under "first".
    """

    passes = "second turn"

    def layers(self, config: Any) -> int:
        return int(config.text_layers)

    def begin(self, model: Any, inputs: Inputs) -> Any:
        """Reads the first turn; returns the name of the cache among the model's arguments, and the cache."""
        if "first" not in inputs:
            return None
        if isinstance(model, VisionLanguageModel):
            length = inputs["first"]["input_ids"].shape[1] + inputs["input_ids"].shape[1]
            cache = ContextCache(model.config.text_layers, reserve=length)  # as `generate` makes it
            return "kv_cache", model(**inputs["first"], kv_cache=cache, last_logits_only=True).kv_cache
        out = model(**inputs["first"], use_cache=True, logits_to_keep=1)
        name = next(name for name in ("cache", "past_key_values") if out.get(name) is not None)
        return name, out[name]

    def resume(self, state: Any, inputs: Inputs) -> Inputs:
        """Copies the cache, which a run changes."""
        rest = {name: x for name, x in inputs.items() if name != "first"}
        if state is None:
            return rest
        name, cache = state
        return rest | {name: copy.deepcopy(cache)}
