"""`mmkernels.co_attention` in transformers' GroundingDINO and MM-GroundingDINO: a part of `mmkernels.patch` alone."""

from __future__ import annotations

from torch import nn

from mmkernels.integrations.patching import classes
from mmkernels.integrations.patching.changes import Change, Left, by_class
from mmkernels.integrations.patching.grounding_dino import TABLE, is_fused

_NAMES = tuple(known.class_name for known in TABLE if "Attention" in known.class_name)


def fuse_co_attention(model: nn.Module) -> int:
    """Lets a GroundingDINO's fusion layers run on `mmkernels.co_attention`, which never builds their score matrix.

    In these layers the image's features and the text's attend to each other by one matrix of scores, of which
    transformers keeps several copies of ``batch * heads * 13,294 * 256`` for an image of usual size. The results are
    the same, in training too, with the layers' masks, dropout, and clamping of scores; where a mask hides a whole side,
    what the other one gets is 0 and not NaN. Weights, configuration and checkpoints stay as they are, and copies of
    the model are fused too. A second call does nothing. `restore_co_attention` is the way back. `mmkernels.patch` does
    this and more.

    A call with ``output_attentions=True``, or of a model whose configuration says so, runs these layers as transformers
    wrote them.

    Args:
        model: a ``GroundingDinoForObjectDetection``, an ``MMGroundingDinoForObjectDetection``, or any module that
            contains their fusion layers. It is changed in place.

    Returns:
        how many layers run on the op now.

    Raises:
        TypeError: `model` is no module. ValueError: it has no such layer, or one that has another ``forward``.
        VersionError: (an ImportError) the layer is not the one that this function is written for.

    Source: Liu et al., "Grounding DINO", 2023, section 3.1, the feature enhancer; Li et al., "Grounded Language-Image
    Pre-training" (GLIP), 2022, equation 4.

    Example:
        >>> import torch, transformers
        >>> from mmkernels.integrations.transformers import fuse_co_attention
        >>> from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
        >>> layer = GroundingDinoFusionLayer(transformers.GroundingDinoConfig(d_model=64, encoder_ffn_dim=128))
        >>> fuse_co_attention(layer)
        1
        >>> (vision, _), (text, _) = layer(torch.randn(1, 300, 64), torch.randn(1, 7, 64))
        >>> vision.shape, text.shape
        (torch.Size([1, 300, 64]), torch.Size([1, 7, 64]))
    """
    _check(model)
    found = list(by_class(TABLE)(model))
    left = [x for x in found if isinstance(x, Left)]
    changes = [x for x in found if isinstance(x, Change)]
    if left or not changes:
        got = f"one where {left[0].why}" if left else f"a {type(model).__name__} without one"
        raise ValueError(f"model must contain a {' or '.join(_NAMES)}, got {got}")
    for change in changes:
        classes.check_restorable(change.module)
    for change in changes:
        classes.swap(change.module, change.methods)
    return sum(map(is_fused, model.modules()))


def restore_co_attention(model: nn.Module) -> int:
    """Undoes `fuse_co_attention`: the layers run as transformers wrote them.

    Args:
        model: as there; one that is not fused stays as it is.

    Returns:
        how many layers ran on the op.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: the layers were wrapped by ``fully_shard`` since.

    Example:
        >>> import transformers
        >>> from mmkernels.integrations.transformers import fuse_co_attention, restore_co_attention
        >>> from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
        >>> layer = GroundingDinoFusionLayer(transformers.GroundingDinoConfig(d_model=64, encoder_ffn_dim=128))
        >>> restore_co_attention(layer), fuse_co_attention(layer), restore_co_attention(layer)
        (0, 1, 1)
    """
    _check(model)
    fused = [module for module in model.modules() if is_fused(module)]
    ours = [x.module for x in by_class(TABLE)(model) if isinstance(x, Change)] if fused else []
    for module in ours:
        classes.restore(module)
    return len(fused)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
