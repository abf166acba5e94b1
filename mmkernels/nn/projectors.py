"""`PatchMerger` and `PixelShuffleProjector`: windows of visual tokens become one token each, of the text's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor, nn

from mmkernels.nn.checks import check_choice, check_positive, check_width
from mmkernels.ops.tokens.inputs import Grid, check_window
from mmkernels.ops.tokens.merge_patches import ORDERS, merge_patches
from mmkernels.runtime.checks import check_bool, check_number

__all__ = ["PatchMerger", "PixelShuffleProjector"]


class _Projector(nn.Module):
    """`merge_patches` with its norm, then one or two linear layers.

    Args:
        hidden: the width between the two linear layers; 0: there is one.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        window: Sequence[int],
        *,
        order: str,
        norm: str | None,
        norm_first: bool,
        hidden: int,
        activation: Callable[[], nn.Module],
        bias: bool,
        eps: float,
        pad: bool,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("out_dim", out_dim)
        check_choice("order", order, ORDERS)
        self.dim, self.out_dim = dim, out_dim
        self.window = check_window(window)
        check_bool("norm_first", norm_first)
        check_bool("pad", pad)
        self.order, self.norm_first, self.pad = order, norm_first, pad
        self.eps = check_number("eps", eps, "a number from 0 on", 0.0)
        self.norm_kind = norm
        merged = dim * prod(self.window)
        self.norm = _norm(norm, dim if norm_first else merged, eps)
        self.mlp = nn.Sequential(
            *(nn.Linear(merged, hidden, bias=bias), activation(), nn.Linear(hidden, out_dim, bias=bias))
            if hidden
            else (nn.Linear(merged, out_dim, bias=bias),)
        )

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Returns the new tokens, ``[tokens', out_dim]`` or ``[images, tokens', out_dim]``, and their grid.

        Args:
            x: ``[tokens, dim]``, the images' tokens one after the other; or ``[images, tokens, dim]``, all of one size.
            grid: (t, h, w) of each image, or one for all images of batched x.
        """
        check_width(x, self.dim)
        merged, grid = merge_patches(
            x,
            grid,
            self.window,
            order=self.order,
            norm=self.norm_kind,
            weight=None if self.norm is None else self.norm.weight,
            bias=getattr(self.norm, "bias", None),
            eps=self.eps,
            norm_first=self.norm_first and self.norm is not None,
            pad=self.pad,
        )
        return self.mlp(merged), grid

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.out_dim}, window={tuple(self.window)}, order={self.order!r}"


def _norm(kind: str | None, width: int, eps: float) -> nn.LayerNorm | nn.RMSNorm | None:
    """Returns the module that holds a norm's parameters, which `merge_patches` applies."""
    check_choice("norm", kind, (None, "layer", "rms"))
    if kind is None:
        return None
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else nn.RMSNorm(width, eps=eps)


class PatchMerger(_Projector):
    """Qwen-VL's patch merger: a norm, windows of tokens joined into one, a linear layer, an activation, a linear layer.

    The norm is computed by `mmkernels.merge_patches`, in the one pass that gathers the windows.

    Args:
        dim: width of the patches' tokens.
        out_dim: width of the new tokens, that of the language model.
        window: (t, h, w) of the patches that become one token.
        order: how the tokens of a window lie in x and in a merged token, as in `merge_patches`: "grouped", "spatial" or
            "channel". Qwen's processors order patches window by window: "grouped".
        norm: "layer" (Qwen2-VL, Qwen3-VL), "rms" (Qwen2.5-VL) or None.
        norm_first: True: each patch is normalized (all three models); False: each merged token is (the mergers of
            Qwen3-VL's DeepStack features).
        hidden: width between the linear layers; None: that of a merged token, ``dim * t * h * w``.
        activation: makes the activation.
        bias: whether the linear layers add a bias.
        eps: of the norm.

    Parameters must have x's dtype, except under autocast, as in PyTorch's modules.

    Raises:
        TypeError, ValueError: a wrong size or option; in `forward`, what `merge_patches` refuses.

    Source: Wang et al., "Qwen2-VL", 2024, section 2.1; Bai et al., "Qwen2.5-VL Technical Report", 2025, section 2.1.

    Example:
        >>> import torch
        >>> from mmkernels.nn import PatchMerger
        >>> merger = PatchMerger(32, 64)
        >>> y, grid = merger(torch.randn(2 * 4 + 4 * 6, 32), [(1, 2, 4), (1, 4, 6)])  # two photos
        >>> y.shape, grid
        (torch.Size([8, 64]), ((1, 1, 2), (1, 2, 3)))
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        window: Sequence[int] = (1, 2, 2),
        *,
        order: str = "grouped",
        norm: str | None = "layer",
        norm_first: bool = True,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        check_positive("dim", dim)
        hidden = dim * prod(check_window(window)) if hidden is None else hidden
        check_positive("hidden", hidden)
        super().__init__(
            dim,
            out_dim,
            window,
            order=order,
            norm=norm,
            norm_first=norm_first,
            hidden=hidden,
            activation=activation,
            bias=bias,
            eps=eps,
            pad=False,
        )


class PixelShuffleProjector(_Projector):
    """InternVL's and Idefics3's projector: windows of tokens joined into one (pixel shuffle), then linear layers.

    The default is InternVL's: a LayerNorm of the merged tokens (computed as they are gathered, by
    `mmkernels.merge_patches`), Linear, GELU, Linear. Idefics3 and SmolVLM have one linear layer:
    ``PixelShuffleProjector(dim, out_dim, factor, norm=None, layers=1, bias=False)``.

    Args:
        dim: width of the patches' tokens.
        out_dim: width of the new tokens, that of the language model, and between two linear layers.
        factor: the side of a square window whose tokens become one (2 leaves a quarter of them), or its (t, h, w).
        norm: of the merged tokens, "layer", "rms" or None.
        layers: 2 linear layers, with the activation between them, or 1.
        bias: whether the linear layers add a bias.
        activation: makes the activation.
        order: how tokens lie in a merged one, as in `merge_patches`: "spatial" (InternVL, Idefics3) or "channel".
        eps: of the norm.
        pad: where the factor does not divide a grid, tokens of zeros are added at its end; False: that is an error.

    Parameters must have x's dtype, except under autocast, as in PyTorch's modules.

    Raises:
        TypeError, ValueError: a wrong size or option; in `forward`, what `merge_patches` refuses.

    Source: Chen et al., "How Far Are We to GPT-4V?" (InternVL 1.5), 2024, section 3.1; Laurençon et al., "Building and
    better understanding vision-language models" (Idefics3), 2024, section 3.1.

    Example:
        >>> import torch
        >>> from mmkernels.nn import PixelShuffleProjector
        >>> projector = PixelShuffleProjector(32, 64)
        >>> y, grid = projector(torch.randn(3, 16 * 16, 32), (1, 16, 16))  # three tiles
        >>> y.shape, grid
        (torch.Size([3, 64, 64]), (1, 8, 8))
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        factor: int | Sequence[int] = 2,
        *,
        norm: str | None = "layer",
        layers: int = 2,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
        order: str = "spatial",
        eps: float = 1e-5,
        pad: bool = False,
    ) -> None:
        check_choice("layers", layers, (1, 2))
        super().__init__(
            dim,
            out_dim,
            square_window("factor", factor),
            order=order,
            norm=norm,
            norm_first=False,
            hidden=out_dim if layers == 2 else 0,
            activation=activation,
            bias=bias,
            eps=eps,
            pad=pad,
        )


def square_window(name: str, window: int | Sequence[int]) -> Sequence[int]:
    """Returns (t, h, w) of a window that is given as such, or as the side of a square."""
    if isinstance(window, Sequence):
        return window
    check_positive(name, window)
    return (1, window, window)
