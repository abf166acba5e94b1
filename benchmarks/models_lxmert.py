"""Rows of bench_models.py about LXMERT: its cross-modality layer at the published sizes, beside transformers'."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from models_cases import Case
from models_pairs import Pair
from models_targets import CAP, NEVER_SLOWER
from models_work import MAIN, Results, Work

from mmkernels.models import LXMERT
from mmkernels.models.blocks.two_streams import Masks
from mmkernels.testing.models import Inputs, build, randomise, seeded

WORDS, BOXES = 20, 36
"""Of a text, as the authors' code cuts it, and of an image, as their detector finds them."""

_ONE_LAYER = {"l_layers": 1, "r_layers": 1, "x_layers": 1, "vocab_size": 100} | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""What differs from the published model: one layer of each kind, and no dropout, whose numbers would differ."""


def lxmert(**changes: Any) -> Pair:
    """Returns an LXMERT of one cross-modality layer; `changes`: arguments of the configuration that differ."""
    with seeded(0):
        theirs = randomise(build("LxmertModel", _ONE_LAYER | changes), std=0.02).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = LXMERT.from_pretrained(folder)
    return Pair(ours, theirs)


class CrossLayer(Work):
    """The cross-modality layer: both directions of cross-attention, then self-attention and feed-forward of each."""

    passes = "layer"

    def layers(self, config: Any) -> int:
        return 3  # cross-attention, and self-attention of both

    def use_attention(self, model: Any, name: str) -> None:
        """Transformers' class has its own formula, and no other implementation."""

    def ours(self, model: Any, inputs: Inputs) -> Results:
        text, vision, valid = inputs["text"], inputs["vision"], inputs["valid"]
        masks = Masks.of(text, vision, valid, None, text_first=True)
        return self._results(model.cross_blocks[0](text, vision, masks), inputs)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        text, vision, valid = inputs["text"], inputs["vision"], inputs["valid"]
        hidden = (1.0 - valid[:, None, None].to(text.dtype)) * torch.finfo(text.dtype).min
        return self._results(model.encoder.x_layers[0](text, hidden, vision, None), inputs)

    def _results(self, outputs: Results, inputs: Inputs) -> Results:
        """Returns the features of both; of the words those that are no padding."""
        text, vision = outputs
        return text[inputs["valid"]], vision


class CrossLayerStep(CrossLayer):
    """The same with the gradients of its inputs and of all its weights."""

    passes = "layer, training step"
    trains = True

    def resume(self, state: Any, inputs: Inputs) -> Inputs:
        return inputs | {name: inputs[name].detach().clone().requires_grad_() for name in ("text", "vision")}

    def _results(self, outputs: Results, inputs: Inputs) -> Results:
        """Returns the features, and the gradients of what they were made of."""
        text, vision = super()._results(outputs, inputs)
        torch.autograd.backward([text, vision], [inputs["text_gradient"][inputs["valid"]], inputs["vision_gradient"]])
        found = tuple(inputs[name].grad for name in ("text", "vision"))
        return text.detach(), vision.detach(), *found


def _pairs(config: Any, *, batch: int, words: int = WORDS, boxes: int = BOXES) -> dict[str, Inputs]:
    """Returns the features of texts, padded to `words`, and of images' boxes; and gradients of the same shapes."""
    lengths = torch.randint(words // 3, words + 1, (batch,))
    lengths[0] = words
    inputs: Inputs = {"valid": torch.arange(words) < lengths[:, None]}
    for name, length in (("text", words), ("vision", boxes)):
        for what in (name, f"{name}_gradient"):
            inputs[what] = torch.randn(batch, length, config.width)
    return {MAIN: inputs}


_TARGETS = (CAP, NEVER_SLOWER)

LXMERT_CASES = tuple(
    Case(f"LXMERT's cross-modality layer, batch {batch}", lxmert, partial(_pairs, batch=batch), work, _TARGETS)
    for batch, work in ((1, CrossLayer()), (32, CrossLayer()), (32, CrossLayerStep()))
)
