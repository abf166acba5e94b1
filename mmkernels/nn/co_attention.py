"""`CoAttention`: two sequences attend to each other, both directions in one call of the attention's kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_features, check_positive
from mmkernels.nn.self_attention import SelfAttention
from mmkernels.runtime.checks import broadcasts, can_look, check_tensor, is_known


def co_attention_mask(
    len_a: int,
    len_b: int,
    valid_a: Tensor | None = None,
    valid_b: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> SpanMask:
    """Returns the mask with which each of two sequences, one behind the other, sees the other one's tokens.

    Args:
        len_a, len_b: the numbers of their tokens; 0: the other sequence sees nothing.
        valid_a, valid_b: bool ``[B or 1, len_a]`` and ``[B or 1, len_b]``, False: padding, which nothing sees; None:
            there is none.
        device: of the mask; None: that of `valid_a` or `valid_b`, or the CPU.

    Raises:
        TypeError, ValueError: `valid_a` or `valid_b` has a wrong dtype or shape.

    Example:
        >>> co_attention_mask(2, 3).to_dense(5)[0, 0].int()
        tensor([[0, 0, 1, 1, 1],
                [0, 0, 1, 1, 1],
                [1, 1, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 0, 0, 0]], dtype=torch.int32)
    """
    sides = _checked("valid_a", valid_a, len_a), _checked("valid_b", valid_b, len_b)
    given = [x for x in sides if x is not None]
    device = given[0].device if device is None and given else device
    of_a = (torch.arange(len_a + len_b, device=device) < len_a).to(torch.int32)[None]  # [1, len_a + len_b]
    key_valid = None
    if given:
        batch = _batch([x.shape[0] for x in given])
        whole = (
            torch.ones(batch, size, dtype=torch.bool, device=device) if x is None else x.expand(batch, -1)
            for x, size in zip(sides, (len_a, len_b), strict=True)
        )
        key_valid = torch.cat(list(whole), dim=1)
    return SpanMask(of_a * len_a, of_a * len_b + len_a, key_valid)


def _batch(sizes: list[int]) -> int:
    """Returns the batch of `valid_a`, `valid_b` or both."""
    first, last = sizes[0], sizes[-1]
    if not broadcasts(first, last) and not broadcasts(last, first):
        raise ValueError(f"valid_a and valid_b must be of one batch, or 1, got {first} and {last}")
    return last if is_known(first == 1) else first


def _checked(name: str, valid: Tensor | None, size: int) -> Tensor | None:
    """Returns a mask of valid tokens; raises unless it is None or bool ``[B or 1, size]``."""
    if valid is None:
        return None
    check_tensor(name, valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {valid.dtype}")
    if valid.dim() != 2 or valid.shape[1] != size:
        raise ValueError(f"{name} must be [B or 1, {size}], got shape {tuple(valid.shape)}")
    return valid


def _check_mask(mask: SpanMask, len_a: int, len_b: int) -> None:
    """Raise if a mask on the CPU is for other lengths of the same sum, where each sequence would see its own tokens."""
    if mask.device.type != "cpu" or not can_look(mask.start) or mask.start.numel() == 0:
        return
    first = int(mask.start[0, 0])  # where `a` ends; what the last token sees ends there
    if first < len_a or int(mask.end[0, -1]) > len_a:
        got = f"one for {first} and {mask.shape[1] - first} tokens"
        raise ValueError(f"mask must be co_attention_mask({len_a}, {len_b}), got {got}")


class CoAttention(nn.Module):
    """Two sequences attend to each other, with query, key and value of each: two score matrices, one call.

    The sequences are put one behind the other, and a mask shows to each the other one's tokens, so that both directions
    run in one parallel region of a CPU, or one grid of a GPU. Query, key and value of a sequence are one product; with
    `shared` weights those of both sequences are.

    (Where both directions share one score matrix, as in GLIP and GroundingDINO, the op is `mmkernels.co_attention`.)

    Args:
        dim_a: width of the first sequence, `a`.
        dim_b: width of the second one, `b`; None: `dim_a`.
        num_heads: attention heads.
        head_dim: width of a head; None: ``dim_a / num_heads``.
        shared: whether both sequences have the same weights, as in LXMERT; else each has its own, as in ViLBERT.
        bias: whether the projections add a bias.
        dropout: the chance that an attention probability is dropped, in training mode.

    Raises:
        ValueError: a size is not positive or does not divide, or the widths differ where weights are shared; in
            `forward`, an input has the wrong shape.

    Source: Lu et al., "ViLBERT", 2019, section 2.1, figure 2b; Tan and Bansal, "LXMERT", 2019, section 2.2.

    Example:
        >>> import torch
        >>> from mmkernels.nn import CoAttention
        >>> attention = CoAttention(64, 32, num_heads=4)
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 32)
        >>> padding = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        >>> [x.shape for x in attention(text, image, valid_a=padding)]
        [torch.Size([2, 5, 64]), torch.Size([2, 9, 32])]
    """

    def __init__(
        self,
        dim_a: int,
        dim_b: int | None = None,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        shared: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("dim_a", dim_a), ("num_heads", num_heads)):
            check_positive(name, size)
        if head_dim is None and dim_a % num_heads:
            raise ValueError(f"dim_a must be a multiple of num_heads = {num_heads} where head_dim is None, got {dim_a}")
        self.a = SelfAttention(dim_a, num_heads, head_dim=head_dim, bias=bias, dropout=dropout)
        self.dim_a, self.dim_b = dim_a, dim_a if dim_b is None else dim_b
        check_positive("dim_b", self.dim_b)
        if shared and self.dim_b != dim_a:
            raise ValueError(f"dim_b must be dim_a = {dim_a} where weights are shared, got {self.dim_b}")
        self.b = None
        if not shared:
            self.b = SelfAttention(self.dim_b, num_heads, head_dim=self.a.head_dim, bias=bias, dropout=dropout)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        *,
        valid_a: Tensor | None = None,
        valid_b: Tensor | None = None,
        mask: SpanMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns what `a` got from `b`, ``[B, La, dim_a]``, and `b` from `a`, ``[B, Lb, dim_b]``.

        Where there is nothing to see, as with a sequence of length 0, that is the last projection's bias.

        Args:
            a, b: ``[B, La, dim_a]`` and ``[B, Lb, dim_b]``.
            valid_a, valid_b: bool ``[B or 1, La]`` and ``[B or 1, Lb]``, False: padding, which the other sequence does
                not see; None: there is none.
            mask: what `co_attention_mask` returned for them, which serves many layers; then neither is given.
        """
        check_features("a", a, self.dim_a)
        check_features("b", b, self.dim_b)
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"b must be of a's batch {a.shape[0]}, got {b.shape[0]}")
        if mask is None:
            mask = co_attention_mask(a.shape[1], b.shape[1], valid_a, valid_b, device=a.device)
            if mask.key_valid is not None and not broadcasts(mask.key_valid.shape[0], a.shape[0]):
                must = f"of batch 1 or a's {a.shape[0]}"
                raise ValueError(f"valid_a and valid_b must be {must}, got {mask.key_valid.shape[0]}")
        elif valid_a is not None or valid_b is not None:
            raise ValueError("give valid_a and valid_b, or mask, not both")
        else:
            _check_mask(mask, a.shape[1], b.shape[1])
        sizes = [a.shape[1], b.shape[1]]
        if self.b is None:
            out_a, out_b = self.a(torch.cat([a, b], dim=1), mask).split(sizes, dim=1)
            return out_a, out_b
        both = torch.cat([self.a.project(a), self.b.project(b)], dim=1)
        out_a, out_b = self.a.attend(both, mask).split(sizes, dim=1)
        return self.a.out_proj(out_a), self.b.out_proj(out_b)
