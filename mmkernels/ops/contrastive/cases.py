"""Inputs of the contrastive ops' cases and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.spec import Cost, Inputs


def features(g: Generator, *shape: int) -> Tensor:
    """Returns random float64 features, normalised along the last dim."""
    return F.normalize(normal(g, *shape), dim=-1)


def two_towers(g: Generator, n: int, m: int, dim: int, queries: int = 0, scale: float = 20.0) -> Inputs:
    """Returns image features, text features and the scale; image i is a little like text i (modulo m)."""
    text = features(g, m, dim)
    shape = (n, queries, dim) if queries else (n, dim)
    image = normal(g, *shape) * dim**-0.5
    partner = text[torch.arange(n) % m]
    image = F.normalize(image + 0.3 * (partner[:, None] if queries else partner), dim=-1)
    return {"image": image, "text": text, "logit_scale": torch.tensor(scale, dtype=torch.float64)}


def contrastive_cost(products_backward: int) -> Callable[[Inputs, bool], Cost]:
    """Returns the cost of an op with one matrix product forward and `products_backward` more for its gradients.

    Of several queries of an image only the best takes part in a pair's gradients: the last two products.
    """

    def cost(inputs: Inputs, backward: bool) -> Cost:
        image, text = inputs["image"], inputs["text"]
        hard: Any = inputs.get("hard_texts")
        columns = text.shape[0] + (0 if hard is None else hard.shape[0])
        of_one_query = 2.0 * image.shape[0] * columns * text.shape[-1]
        product = of_one_query * (image.numel() // (image.shape[0] * image.shape[-1]))
        read = (image.numel() + text.numel()) * image.element_size()
        if not backward:
            return Cost(product, read)
        return Cost(product * (products_backward - 1) + 2 * of_one_query, 2 * read + read)

    return cost
