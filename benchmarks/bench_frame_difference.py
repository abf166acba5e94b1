"""`frame_difference` beside the formula of Efficient Video Sampling: `F.cosine_similarity` of frames."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.benchmark import rows_of
from mmkernels.bench.peers import Call, Peer
from mmkernels.ops.tokens.frame_difference.spec import SPEC
from mmkernels.spec import Inputs


def evs(inputs: Inputs) -> Call:
    """Videos of one size that follow each other are computed together."""
    x = inputs["x"]
    runs = [(size, len(list(same))) for size, same in groupby(inputs["grid"])]

    def call() -> Tensor:
        parts, first = [], 0
        for (t, h, w), videos in runs:
            frames = x[first : first + videos * t * h * w].view(videos, t, h * w, -1)
            first += videos * t * h * w
            changes = 1 - F.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1)
            parts.append(torch.cat([torch.full_like(changes[:, :1], torch.inf), changes], 1).flatten())
        return torch.cat(parts).float()

    return call


test_frame_difference = rows_of(SPEC, (Peer("EVS", evs),))
