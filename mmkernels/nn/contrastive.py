"""`ClipLoss` and `SigLipLoss`: open_clip's contrastive losses, over the ops that never build the logits."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.ops.contrastive.inputs import check_scalar
from mmkernels.ops.contrastive.sigmoid_contrastive import sigmoid_contrastive

_EXCHANGES = ("bidir", "shift", "reduce", "gather")
"""The ways in which open_clip passes text features from rank to rank."""


class _OpenClipLoss(nn.Module):
    """The arguments that both losses share."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int) -> None:
        super().__init__()
        if not _is_integer(world_size) or world_size < 1:
            raise ValueError(f"world_size must be a positive integer, got {world_size!r}")
        if world_size > 1:
            raise NotImplementedError(
                f"world_size must be 1, got {world_size}: losses over several ranks come with a later version"
            )
        if not _is_integer(rank) or rank != 0:
            raise ValueError(f"rank must be 0 where world_size is 1, got {rank!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size


class ClipLoss(_OpenClipLoss):
    """CLIP's loss, called as ``open_clip.ClipLoss``: the mean of both directions' cross-entropy.

    Args:
        local_loss, gather_with_grad, use_horovod: how ranks share features; no effect on one rank.
        cache_labels: accepted without effect: there are no labels to cache.
        rank: the rank of this process; must be 0.
        world_size: the number of ranks; must be 1.

    Raises:
        NotImplementedError: `world_size` is above 1: distributed losses come with a later version.
        ValueError: `world_size` is not a positive integer, or `rank` is not 0.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.

    Example:
        >>> import torch
        >>> from mmkernels.nn import ClipLoss  # instead of: from open_clip import ClipLoss
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=-1) for _ in range(2))
        >>> logit_scale = torch.tensor(14.3, requires_grad=True)
        >>> ClipLoss()(image, text, logit_scale).backward()
        >>> ClipLoss()(image, text, logit_scale, output_dict=True).keys()
        dict_keys(['contrastive_loss'])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss, or ``{"contrastive_loss": loss}`` with `output_dict`.

        Args:
            image_features, text_features: ``[N, d]`` of one dtype, normalised; text i belongs to image i.
            logit_scale: the multiplier itself, already exponentiated: a number or a tensor of one element.
            logit_bias: a number or a tensor of one element. It shifts all logits equally, which changes neither the
                loss nor any other gradient; the gradient of `logit_bias` is 0.

        Returns:
            A scalar, fp64 for fp64 features and fp32 for all others. (open_clip's loss has the dtype of the logits.)

        Raises:
            TypeError, ValueError: as `mmkernels.info_nce`.
        """
        loss: Tensor = info_nce(image_features, text_features, logit_scale)
        if logit_bias is not None:
            # Kept in the graph, so that a parameter gets a gradient of 0: DDP waits for every gradient.
            loss = loss + 0.0 * check_scalar("logit_bias", logit_bias, image_features).reshape(())
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_OpenClipLoss):
    """SigLIP's loss, called as ``open_clip.SigLipLoss``: the sum over all pairs, divided by the number of images.

    Args:
        cache_labels: accepted without effect: there are no labels to cache.
        rank: the rank of this process; must be 0.
        world_size: the number of ranks; must be 1.
        dist_impl: how ranks pass text features on, "bidir", "shift", "reduce" or "gather"; None: "bidir". No effect on
            one rank.
        chunk_size: accepted without effect: memory is always linear in the features.

    Raises:
        NotImplementedError: `world_size` is above 1: distributed losses come with a later version.
        ValueError: `world_size` is not a positive integer, `rank` is not 0, `dist_impl` is unknown, or `chunk_size` is
            negative.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, algorithm 1.

    Example:
        >>> import torch
        >>> from mmkernels.nn import SigLipLoss  # instead of: from open_clip import SigLipLoss
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=-1) for _ in range(2))
        >>> logit_scale, logit_bias = torch.tensor(10.0), torch.tensor(-10.0)
        >>> SigLipLoss()(image, text, logit_scale, logit_bias).shape
        torch.Size([])
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        self.dist_impl = _EXCHANGES[0] if dist_impl is None else dist_impl
        if self.dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(_EXCHANGES)}, or None; got {dist_impl!r}")
        if not _is_integer(chunk_size) or chunk_size < 0:
            raise ValueError(f"chunk_size must be an integer >= 0, got {chunk_size!r}")
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss, or ``{"contrastive_loss": loss}`` with `output_dict`.

        Args:
            image_features, text_features: ``[N, d]`` of one dtype, normalised; text i belongs to image i.
            logit_scale: the multiplier itself, already exponentiated: a number or a tensor of one element.
            logit_bias: added to each logit; a number or a tensor of one element; None: 0.

        Returns:
            A scalar, fp64 for fp64 features and fp32 for all others. (open_clip's loss has the dtype of the logits.)

        Raises:
            TypeError, ValueError: as `mmkernels.sigmoid_contrastive`.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        loss = sigmoid_contrastive(image_features, text_features, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _is_integer(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
