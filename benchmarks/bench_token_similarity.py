"""`token_similarity` beside the formula of a user: rows normalised, multiplied, and reduced, image by image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.benchmark import rows_of
from mmkernels.bench.peers import Call, Peer
from mmkernels.ops.tokens.token_similarity.spec import SPEC
from mmkernels.spec import Inputs


def formula(inputs: Inputs) -> Call:
    """Normalised in one call, multiplied and reduced image by image."""
    x, others, reduce = inputs["x"], inputs["others"], inputs["reduce"]
    lengths, counts = list(inputs["lengths"]), list(inputs["other_lengths"])
    of = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[reduce]

    def call() -> Tensor:
        tokens, words = F.normalize(x, dim=1).split(lengths), F.normalize(others, dim=1).split(counts)
        return torch.cat([of(a @ b.mT, 1) for a, b in zip(tokens, words, strict=True)]).float()

    return call


test_token_similarity = rows_of(SPEC, (Peer("formula", formula),))
