"""The language-model loss without logits: output layers return logits that are computed when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.patching.changes import Change, Left
from mmkernels.integrations.patching.classes import original_class, original_method
from mmkernels.integrations.patching.deferred import can_defer, defer, is_worthwhile
from mmkernels.runtime.checks import PLAIN

WHAT = "language-model loss"
_OP = "linear_cross_entropy"
_EFFECT = "no logits in training, ignored rows skipped"


def forward(self: Any, input: Tensor) -> Tensor:
    """``nn.Linear.forward``, whose result is not computed where it is of several positions; see `DeferredLogits`."""
    # A parameter may be exchanged, quantised or distributed after the patch: each call looks.
    if torch.compiler.is_compiling() or input.dim() < 2 or input.shape[-2] < 2 or _is_freed(self):
        return _linear(self, input)
    if not is_worthwhile(input.shape[:-1].numel(), self.weight.shape[0]):
        return _linear(self, input)
    return defer(input, self.weight, self.bias) if can_defer(input, self.weight, self.bias) else _linear(self, input)


def _linear(module: nn.Module, input: Tensor) -> Tensor:
    result: Tensor = original_method(module, "forward")(input)
    return result


def language_loss(model: nn.Module) -> Iterator[Change | Left]:
    """Finds the output layers of the language models in a model; a kind of patch."""
    from transformers import PreTrainedModel

    seen = set[int]()
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        for part in _layers(head):
            if id(part) not in seen:
                seen.add(id(part))
                why = _why_not(part)
                yield Left(part, WHAT, why) if why else Change(part, {"forward": forward}, WHAT, _OP, _EFFECT)


def _layers(head: Any) -> Iterator[nn.Module]:
    """Returns the layers of an output layer: PEFT keeps one beside the original where it trains a copy."""
    if not isinstance(head, nn.Module):
        return
    copies = getattr(head, "modules_to_save", None)
    original = getattr(head, "original_module", None)
    if isinstance(copies, nn.ModuleDict) and isinstance(original, nn.Module):
        yield from (original, *copies.values())
    else:
        yield head


def _why_not(layer: nn.Module) -> str:
    own = original_class(layer)
    name = own.__name__ if own.__name__ != "Linear" else f"{own.__module__}.{own.__name__}"  # PEFT's, a quantised one
    if not isinstance(layer, nn.Linear):
        return f"its output layer is a {name}, not torch's linear layer"
    if own.forward is not nn.Linear.forward:
        return f"its output layer is a {name}, whose forward is its own"
    if "forward" in vars(layer):
        return "the forward of its output layer was set on the layer, as accelerate's hooks do"
    weight = layer.weight
    if type(weight) not in PLAIN:
        return f"the weight of its output layer is a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"the weight of its output layer is {weight.dtype}"
    return ""


def _is_freed(module: nn.Module) -> bool:
    """Returns whether the layer's weight may be freed before its logits are read.

    FSDP2 and DeepSpeed free it when a layer that is a unit of its own returns, FSDP1 when any unit around the layer
    does. FSDP1 alone puts a plain tensor, a piece of the unit's parameters, in the weight's place for the forward pass.
    """
    if getattr(module, "_is_fsdp_managed_module", False) and not isinstance(module.weight, nn.Parameter):
        return True
    return hasattr(module, "set_reshard_after_forward") or hasattr(module, "ds_grads_remaining")
