"""`TokenReducer`: one place to choose how many visual tokens go on, and which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.nn.checks import check_choice, check_positive, check_width
from mmkernels.nn.projectors import PixelShuffleProjector, square_window
from mmkernels.nn.resampler import PerceiverResampler
from mmkernels.nn.token_images import TokenImages, fit_grid, grid_tokens
from mmkernels.ops.tokens.inputs import (
    Grid,
    Lengths,
    check_grid,
    check_rows,
    check_values,
    check_window,
    grid_sizes,
    is_one,
    triples,
)
from mmkernels.ops.tokens.keep import check_keep, check_protect
from mmkernels.ops.tokens.merge_patches.spec import merged_grid
from mmkernels.ops.tokens.merge_tokens import merge_tokens
from mmkernels.ops.tokens.pool_tokens import pool_tokens
from mmkernels.ops.tokens.select_diverse import select_diverse
from mmkernels.ops.tokens.select_diverse.spec import check_method
from mmkernels.ops.tokens.select_tokens import select_tokens
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import in_graph

__all__ = ["Reduced", "TokenReducer"]

AMOUNTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "pool": ("window", "budget"),
    "shuffle": ("window", "budget"),
    "perceiver": ("keep", "budget"),
    "tome": ("keep", "budget"),
    "select": ("keep", "budget"),
}
"""The kinds, and what says how many tokens each leaves."""
OPTIONS: dict[str, tuple[str, ...]] = {"none": (), "pool": ("mode",), "tome": (), "select": ("merge_rest", "method")}
"""The options of kinds that have no weights; those of the others are their modules'."""
MODES = ("mean", "max", "bilinear", "bicubic")
"""Of "pool"; the last two with a budget."""


class Reduced(NamedTuple):
    """What `TokenReducer` returns.

    Example:
        >>> import torch
        >>> from mmkernels.nn import TokenReducer
        >>> TokenReducer("pool", window=2)(torch.randn(24, 8), [(1, 4, 6)]).lengths
        (6,)
    """

    x: Tensor
    """The tokens that go on: ``[tokens', C]``, or ``[images, tokens', C]`` of batched x."""
    lengths: Lengths
    """How many there are of each image: one integer of batched x, a tuple of packed x."""
    grid: Grid | None
    """Their grid, protected tokens left out, in the form of the grid that was given; None where they form none ("tome",
    "select", "perceiver")."""
    sizes: Tensor | None = None
    """Of "tome": how many patches each token stands for, ``[tokens']`` or ``[images, tokens']``, for proportional
    attention."""
    positions: Tensor | None = None
    """Of "select": the rows of x (of ``x.flatten(0, 1)``) that were kept, int64 ``[tokens']`` or
    ``[images, tokens']``."""
    assignment: Tensor | None = None
    """Of "tome": each token's row in the result (in its ``flatten(0, 1)``), int64 ``[tokens]`` or ``[images,
    tokens]``; `unmerge_tokens` takes it."""


class TokenReducer(nn.Module):
    """Leaves fewer visual tokens: none, pool, pixel shuffle, perceiver, ToMe or select, behind one call.

    How many tokens are left follows from the grid alone (`tokens`), so nothing waits for a device.

    Args:
        kind: how. "none": x as it is. "pool": means of windows (`mmkernels.pool_tokens`). "shuffle":
            `PixelShuffleProjector`, from `dim` to `dim`. "perceiver": `PerceiverResampler`. "tome": the most similar
            tokens become one (`mmkernels.merge_tokens`). "select": the best or the most diverse tokens are kept
            (`mmkernels.select_tokens`, `mmkernels.select_diverse`).
        dim: width of the tokens; "shuffle" and "perceiver", which have weights, need it.
        window: of "pool" and "shuffle": the side of a square window, or its (t, h, w). At the edge of a grid that it
            does not divide, "pool" takes smaller windows, and "shuffle" adds zeros.
        keep: how many tokens each image keeps, protected ones not counted: a number, at most the tokens of the smallest
            image ("perceiver": the latents, any number), or as a float a share of each image's tokens, rounded up
            ("tome", "select"). A share is a constant of compiled code.
        budget: the most tokens that an image may have, protected ones counted. "pool": a larger grid is pooled to one
            of the same aspect that fits, with all its frames if each can have a token; smaller grids stay as they are.
            "shuffle": windows of 2 x 2; a grid that would still be too large is pooled first. "perceiver": as many
            latents. "tome", "select": as many tokens, or all that an image has.
        scorer: of "select": "scores", the tokens with the best scores; or "diverse", the tokens that differ most from
            each other, weighted by scores if there are any (CDPruner).
        protect: so many tokens at the front of each image, such as a class token and registers, stay as they are. The
            grid does not count them; scores and metric have an entry for them, which is not used.
        options: of the kind: ``mode`` of "pool" ("mean", "max", and with a budget "bilinear" or "bicubic");
            ``merge_rest`` of "select", as in `select_tokens`, and ``method`` as in `select_diverse`; those of the two
            modules.

    Exactly one of window, keep and budget must be given; for "none" none of them.

    Raises:
        TypeError, ValueError: a wrong size or option; in `forward`, what the ops refuse. Each names the argument, what
            it must be and what it got.

    Source: that of each op and module.

    Example:
        >>> import torch
        >>> from mmkernels.nn import TokenReducer
        >>> x, grid = torch.randn(2 * 577, 64), [(1, 24, 24)] * 2  # two photos, each with a class token
        >>> for text in ("pool:2", "tome:0.25", "diverse:144", "pool:<=100"):
        ...     reducer = TokenReducer.parse(text, 64, protect=1)
        ...     print(text, reducer(x, grid).x.shape, reducer.tokens(grid))
        pool:2 torch.Size([290, 64]) (145, 145)
        tome:0.25 torch.Size([290, 64]) (145, 145)
        diverse:144 torch.Size([290, 64]) (145, 145)
        pool:<=100 torch.Size([182, 64]) (91, 91)
    """

    def __init__(
        self,
        kind: str = "none",
        dim: int | None = None,
        *,
        window: int | Sequence[int] | None = None,
        keep: float | None = None,
        budget: int | None = None,
        scorer: str = "scores",
        protect: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, tuple(AMOUNTS))
        _check_amounts(kind, {"window": window, "keep": keep, "budget": budget})
        check_choice("scorer", scorer, ("scores", "diverse") if kind == "select" else ("scores",))
        if dim is not None:
            check_positive("dim", dim)
        if keep is not None:
            _check_keep(kind, keep)
        self.kind, self.dim, self.scorer, self.keep, self.budget = kind, dim, scorer, keep, budget
        self.protect = check_protect(protect)
        if budget is not None and (type(budget) is not int or budget <= self.protect):
            raise ValueError(f"budget must be an integer above protect = {protect}, got {budget!r}")
        side = (2 if kind == "shuffle" else 1) if window is None else window
        self.window = check_window(square_window("window", side))
        self.options = options
        self.module = self._module(options)

    @classmethod
    def parse(cls, text: str, dim: int, *, protect: int = 0) -> TokenReducer:
        """Returns the reducer that a text names.

        Args:
            text: "none"; a kind and how much, "pool:2" and "shuffle:2" (windows), "perceiver:64", "tome:0.5",
                "select:0.25" and "diverse:144" (what is kept: a share if there is a point in it, else a number); or a
                kind and a budget, "pool:<=256".
            dim, protect: as of the class.

        Raises:
            ValueError: the text names none. TypeError, ValueError: it names a number that the kind does not take.
        """
        kind, _, amount = text.partition(":") if isinstance(text, str) else ("", "", "")
        scorer = "diverse" if kind == "diverse" else "scores"
        kind = "select" if kind == "diverse" else kind
        if kind not in AMOUNTS or bool(amount) == (kind == "none") or (kind == "none" and text != "none"):
            raise _not_a_reducer(text)
        if kind == "none":
            return cls("none", dim, protect=protect)
        try:
            if amount.startswith("<="):
                return cls(kind, dim, budget=int(amount[2:]), scorer=scorer, protect=protect)
            number: Any = float(amount) if "." in amount else int(amount)
        except ValueError as error:
            raise _not_a_reducer(text) from error
        return cls(kind, dim, scorer=scorer, protect=protect, **{AMOUNTS[kind][0]: number})

    @property
    def uses_scores(self) -> bool:
        """Whether `forward` takes scores; it must have them unless the scorer is "diverse"."""
        return self.kind == "select"

    @property
    def uses_metric(self) -> bool:
        """Whether `forward` takes a metric."""
        return self.kind == "tome" or (self.kind == "select" and (self.scorer == "diverse" or self._merges))

    @property
    def _merges(self) -> bool:
        return self.options.get("merge_rest", False) is not False

    @property
    def _latents(self) -> int:
        return int(self.keep or 0) if self.budget is None else self.budget - self.protect

    def tokens(self, grid: Grid) -> tuple[int, ...]:
        """Returns how many tokens are left of each image, protected ones counted.

        Args:
            grid: (t, h, w) of each image, or of one.
        """
        return tuple(count + self.protect for count in self._counts(grid_sizes(grid)))

    def forward(self, x: Tensor, grid: Grid, *, scores: Tensor | None = None, metric: Tensor | None = None) -> Reduced:
        """Returns the tokens that go on, and what is known of them.

        Args:
            x: ``[tokens, C]``, the images' tokens one after the other; or ``[images, tokens, C]``, all of one size.
                float16, bfloat16, float32 or float64. The result of "none" is x itself, and so (but in compiled code)
                is that of "pool" with a budget within which all images are.
            grid: (t, h, w) of each image, or one for all images of batched x. Audio is (frames, 1, 1).
            scores: ``[tokens]`` or ``[images, tokens]``, of "select": how much each token counts, such as the attention
                that it receives. No gradient.
            metric: ``[tokens, D]`` or ``[images, tokens, D]``: what tokens are compared by, such as an attention
                layer's keys, averaged over the heads. Of "tome", of the scorer "diverse", and with ``merge_rest``;
                None: x itself. No gradient.
        """
        sizes = check_grid(x, grid, protect=self.protect)
        if self.dim is not None:
            check_width(x, self.dim)
        self._check_use("scores", scores, self.uses_scores)
        self._check_use("metric", metric, self.uses_metric)
        if scores is not None:
            check_values("scores", scores, x)
        if metric is not None:
            check_rows("metric", metric, x)
        images = TokenImages(grid_tokens(sizes), x.dim() == 3, self.protect)
        counts = self._counts(sizes)
        if images.batched and any(count != counts[0] for count in counts):
            raise ValueError(f"grid must leave all images of [images, tokens, C] as many tokens, got {counts}")
        if self.kind == "tome":
            return self._tome(x, images, counts, metric)
        if self.kind == "select":
            return self._select(x, images, counts, scores, metric)
        if self.kind == "none" or (self.kind == "pool" and self._all_fit(sizes)):
            return Reduced(x, images.lengths(counts), grid)
        front, body = images.split(x)
        if self.kind == "perceiver":
            y, new_grid = self._resample(body, images), None
        else:
            y, new_grid = self._pool(body, grid, sizes) if self.kind == "pool" else self._shuffle(body, grid, sizes)
        return Reduced(images.join(front, y, counts), images.lengths(counts), new_grid)

    def _counts(self, sizes: Sizes) -> Sizes:
        """Returns how many tokens are left of each image, protected ones not counted."""
        counts = grid_tokens(sizes)
        if self.kind in ("pool", "shuffle"):
            return grid_tokens(merged_grid(self._fitted(sizes), self.window))
        if self.kind == "perceiver":
            return (self._latents,) * len(counts)
        if self.keep is not None:
            return check_keep(self.keep, counts)
        return counts if self.budget is None else tuple(min(count, self.budget - self.protect) for count in counts)

    def _fitted(self, sizes: Sizes) -> Sizes:
        """Returns the grids that "pool" and "shuffle" pool to for a budget; they are the images' without one."""
        if self.budget is None:
            return sizes
        return fit_grid(sizes, self.budget - self.protect, self.window)

    def _size(self, grid: Grid, sizes: Sizes) -> Sequence[int] | Sequence[Sequence[int]]:
        """Returns those grids for `pool_tokens`: one, where the images have one."""
        fitted = triples(self._fitted(sizes))
        return fitted[0] if is_one(grid) else fitted

    def _all_fit(self, sizes: Sizes) -> bool:
        """Whether a budget leaves all grids as they are. Not asked in a graph, which must serve other sizes too."""
        return self.budget is not None and not in_graph() and self._fitted(sizes) == sizes

    def _pool(self, x: Tensor, grid: Grid, sizes: Sizes) -> tuple[Tensor, Grid]:
        mode = self.options.get("mode", "mean")
        if self.budget is None:
            return pool_tokens(x, grid, self.window, mode=mode, edges="partial")
        return pool_tokens(x, grid, size=self._size(grid, sizes), mode=mode)

    def _shuffle(self, x: Tensor, grid: Grid, sizes: Sizes) -> tuple[Tensor, Grid]:
        if self.budget is not None and not self._all_fit(sizes):
            x, grid = pool_tokens(x, grid, size=self._size(grid, sizes))
        assert self.module is not None
        y: tuple[Tensor, Grid] = self.module(x, grid)
        return y

    def _resample(self, x: Tensor, images: TokenImages) -> Tensor:
        """Returns the latents of each image; images of several lengths are padded."""
        assert self.module is not None
        counts = images.counts
        if images.batched:
            y: Tensor = self.module(x)
        elif all(count == counts[0] for count in counts):
            y = self.module(x.reshape(len(counts), counts[0] if counts else 0, x.shape[-1])).flatten(0, 1)
        else:
            padded = nn.utils.rnn.pad_sequence(list(x.split(list(counts))), batch_first=True)  # [images, most, C]
            y = self.module(padded, torch.tensor(counts, device=x.device)).flatten(0, 1)
        return y

    def _tome(self, x: Tensor, images: TokenImages, counts: Sizes, metric: Tensor | None) -> Reduced:
        lengths, kept = images.lengths(images.counts), images.lengths(counts)
        y, _, sizes, assignment = merge_tokens(x, lengths, kept, metric=metric, protect=self.protect)
        return Reduced(y, kept, None, sizes=sizes, assignment=assignment)

    def _select(
        self, x: Tensor, images: TokenImages, counts: Sizes, scores: Tensor | None, metric: Tensor | None
    ) -> Reduced:
        if self.scorer == "diverse":
            scores = self._diversity(x if metric is None else metric, images, counts, scores)
        if scores is None:
            raise ValueError('scores must be given for the scorer "scores": a number for each token of x')
        lengths, kept = images.lengths(images.counts), images.lengths(counts)
        if self._merges:
            return self._select_and_merge(x, images, counts, scores, metric)
        front, rest = images.split(scores)  # protected tokens are the first of the best: they win ties
        scores = images.join(torch.full_like(front, torch.inf), rest, images.counts)
        y, _, positions = select_tokens(x, lengths, kept, scores)
        return Reduced(y, kept, None, positions=positions)

    def _select_and_merge(
        self, x: Tensor, images: TokenImages, counts: Sizes, scores: Tensor, metric: Tensor | None
    ) -> Reduced:
        """Protected tokens are apart meanwhile, so that nothing is merged into them."""
        rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
        (front, body), (front_rows, body_rows) = images.split(x), images.split(rows)
        bare = images._replace(protect=0)
        y, _, positions = select_tokens(
            body,
            bare.lengths(images.counts),
            bare.lengths(counts),
            images.split(scores)[1],
            merge_rest=self.options["merge_rest"],
            metric=None if metric is None else images.split(metric)[1],
        )
        positions = images.join(front_rows, body_rows.flatten()[positions], counts)
        return Reduced(images.join(front, y, counts), images.lengths(counts), None, positions=positions)

    def _diversity(self, metric: Tensor, images: TokenImages, counts: Sizes, quality: Tensor | None) -> Tensor:
        """Returns scores of all tokens: 1 of those that `select_diverse` chooses, 0 of the others."""
        bare = images._replace(protect=0)
        (front, body), quality = images.split(metric), None if quality is None else images.split(quality)[1]
        index = select_diverse(
            body,
            bare.lengths(images.counts),
            bare.lengths(counts),
            method=self.options.get("method", "determinant"),
            quality=quality,
        )
        chosen = torch.zeros(body.shape[:-1], device=body.device).scatter(-1, index, 1.0)
        return images.join(chosen.new_zeros(front.shape[:-1]), chosen, images.counts)

    def _module(self, options: dict[str, Any]) -> nn.Module | None:
        """Returns the module of a kind with weights; one without weights checks the options."""
        if self.kind not in ("shuffle", "perceiver"):
            for name in options:
                if name not in OPTIONS[self.kind] or (name == "method" and self.scorer != "diverse"):
                    raise TypeError(f"{name} must not be given for kind {self.kind!r}, got {options[name]!r}")
            if "method" in options:
                check_method(options["method"])
            check_choice("mode", options.get("mode", "mean"), MODES[: 2 if self.budget is None else 4])
            merges = (False, True, "mean", "visionzip", "prumerge")  # the last one weighs tokens by their scores
            check_choice("merge_rest", options.get("merge_rest", False), merges[: 4 if self.scorer == "diverse" else 5])
            return None
        if self.dim is None:
            raise ValueError(f"dim must be given for kind {self.kind!r}, which has weights")
        if self.kind == "shuffle":
            return PixelShuffleProjector(self.dim, self.dim, self.window, pad=True, **options)
        return PerceiverResampler(self.dim, num_latents=self._latents, **options)

    def _check_use(self, name: str, given: Tensor | None, used: bool) -> None:
        """Raise if scores or a metric are given that this reducer does not use."""
        if given is not None and not used:
            raise ValueError(f"{name} must be None for {self._get_name()}({self.extra_repr()}), which does not use it")

    def extra_repr(self) -> str:
        window = self.window if self.budget is None and "window" in AMOUNTS[self.kind] else None
        named = {"window": window, "keep": self.keep, "budget": self.budget, "protect": self.protect or None}
        named |= {"scorer": self.scorer if self.kind == "select" else None} | self.options
        return ", ".join(
            [repr(self.kind), *(f"{name}={value!r}" for name, value in named.items() if value is not None)]
        )


def _check_amounts(kind: str, amounts: dict[str, object]) -> None:
    """Raise unless one of those amounts is given that the kind takes."""
    given = [name for name, amount in amounts.items() if amount is not None]
    if kind == "none" and given:
        raise ValueError(f"{given[0]} must be None for kind 'none', got {amounts[given[0]]}")
    if kind != "none" and (len(given) != 1 or given[0] not in AMOUNTS[kind]):
        must = " or ".join(AMOUNTS[kind])
        raise ValueError(f"{must} must be given for kind {kind!r}, and nothing else, got {', '.join(given) or 'none'}")


def _check_keep(kind: str, keep: object) -> None:
    """Raise unless keep is a number of tokens, or, where the kind allows it, a share."""
    share = kind != "perceiver"
    if isinstance(keep, bool) or not isinstance(keep, (int, float) if share else int):
        must = "an integer, or a share as a float" if share else "an integer"
        raise TypeError(f"keep must be {must}, got {type(keep).__name__}")
    if not (0.0 < keep <= 1.0 if isinstance(keep, float) else keep >= 1):
        raise ValueError(f"keep must be 1 or more{', or a share above 0 and at most 1' * share}, got {keep}")


def _not_a_reducer(text: object) -> ValueError:
    return ValueError(
        'a reducer must be "none", "pool:2", "shuffle:2", "perceiver:64", "tome:0.5", "select:0.25", "diverse:0.25", '
        f'or have a budget, such as "pool:<=256", got {text!r}'
    )
