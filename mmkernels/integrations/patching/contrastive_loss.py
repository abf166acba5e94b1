"""The loss of models that compare images, sounds or texts (CLIP, SigLIP), without the logits' matrix."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmkernels.integrations.patching.changes import Change, Known, Left, by_class
from mmkernels.integrations.patching.classes import original_method
from mmkernels.integrations.patching.deferred import DeferredLogits, can_defer, defer
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.ops.contrastive.sigmoid_contrastive import sigmoid_contrastive

WHAT = "contrastive loss"
_EFFECT = "no logits in training: memory linear in the batch"
_PRODUCTS = frozenset((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm))


class Compared(NamedTuple):
    """A model class with a contrastive loss.

    Args:
        path: the class, below ``transformers.models``.
        op: what computes the loss from the embeddings: "info_nce" or "sigmoid_contrastive"; "linear_cross_entropy": its
            two directions have scales of their own, and the model's code computes each.
        label_smoothing: of the loss.
    """

    path: str
    op: str = "info_nce"
    label_smoothing: float = 0.0


COMPARED = (
    Compared("clip.modeling_clip.CLIPModel"),
    Compared("siglip.modeling_siglip.SiglipModel", "sigmoid_contrastive"),
    Compared("siglip2.modeling_siglip2.Siglip2Model", "sigmoid_contrastive"),
    Compared("altclip.modeling_altclip.AltCLIPModel"),
    Compared("chinese_clip.modeling_chinese_clip.ChineseCLIPModel"),
    Compared("metaclip_2.modeling_metaclip_2.MetaClip2Model"),
    Compared("vision_text_dual_encoder.modeling_vision_text_dual_encoder.VisionTextDualEncoderModel"),
    Compared("align.modeling_align.AlignModel", label_smoothing=0.1),
    Compared("blip.modeling_blip.BlipModel"),
    Compared("clap.modeling_clap.ClapModel", "linear_cross_entropy"),
    Compared("clipseg.modeling_clipseg.CLIPSegModel"),
    Compared("clvp.modeling_clvp.ClvpModelForConditionalGeneration"),
    Compared("groupvit.modeling_groupvit.GroupViTModel"),
    Compared("owlvit.modeling_owlvit.OwlViTModel"),
    Compared("owlv2.modeling_owlv2.Owlv2Model"),
)


def contrastive_loss(model: nn.Module) -> Iterator[Change | Left]:
    """Finds the models in a model that have a contrastive loss; a kind of patch."""
    there = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    table = [_known(each) for each in COMPARED if f"transformers.models.{each.path}".rpartition(".")[0] in there]
    yield from by_class(table)(model)


@functools.cache
def _known(compared: Compared) -> Known:
    path = f"transformers.models.{compared.path}"
    theirs = getattr(sys.modules[path.rpartition(".")[0]], path.rpartition(".")[2], None)
    arguments = list(inspect.signature(theirs.forward).parameters)[1:] if theirs is not None else ["return_loss"]
    if "return_loss" not in arguments:
        arguments.append("return_loss")  # `by_class` tells that it is gone
    forward = _forward(theirs.forward if theirs is not None else None, compared)
    return Known(path, {"forward": forward}, {"forward": arguments}, WHAT, compared.op, _EFFECT)


def _forward(theirs: Callable[..., Any] | None, compared: Compared) -> Callable[..., Any]:
    """Returns the forward pass of a class, with another way to its loss; in all else it is theirs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = original_method(self, "forward")
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if not given.get("return_loss") or _wants_tuple(self, given) or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        if compared.op == "linear_cross_entropy":
            with _DeferredProducts():
                return original(*args, **kwargs)
        with _DeferredProducts():
            outputs = original(**{**given, "return_loss": False})
        loss = _loss(outputs.logits_per_text, compared)
        return original(*args, **kwargs) if loss is None else type(outputs)(**{**outputs, "loss": loss})

    return forward if theirs is None else functools.wraps(theirs)(forward)


def _wants_tuple(model: Any, given: Mapping[str, Any]) -> bool:
    asked = given.get("return_dict")
    return not (getattr(model.config, "return_dict", True) if asked is None else asked)


class _DeferredProducts(TorchFunctionMode):
    """Inside, the product of a matrix and another one transposed is deferred, as that of two sides' embeddings is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            left, right = args
            if left.dim() == right.dim() == 2 and right.stride(0) == 1 and can_defer(left, right.t(), None):
                return defer(left, right.t())
        return func(*args, **(kwargs or {}))


def _loss(logits: Any, compared: Compared) -> Tensor | None:
    """Returns the loss of deferred logits of texts and images; None: they are not the pairs that the op takes."""
    if not isinstance(logits, DeferredLogits) or not logits.pending or logits.shape[0] != logits.shape[1]:
        return None
    source, scale, bias = logits.source, torch.ones((), device=logits.device), None
    for step in source.steps:
        if step.kind == "cast":
            continue
        if bias is not None or step.kind not in ("mul", "div", "add"):
            return None
        if step.kind == "add":
            bias = step.value
        else:
            scale = scale * step.value if step.kind == "mul" else scale / step.value
    if source.order is not None or scale.numel() != 1 or (bias is None) != (compared.op == "info_nce"):
        return None
    with source.autocasting():
        if compared.op == "info_nce":
            smoothing = compared.label_smoothing
            loss, dtype = info_nce(source.hidden, source.weight, scale, label_smoothing=smoothing), logits.dtype
        else:
            assert bias is not None
            loss, dtype = sigmoid_contrastive(source.hidden, source.weight, scale, bias), torch.float32
    narrow = dtype.itemsize < 4 and not torch.is_autocast_enabled(logits.device.type)
    return loss.to(dtype) if narrow else loss  # as theirs: cross-entropies are float32 under autocast
