"""`select_tokens` beside the formulas of a user: top-k, sorted, and an index, image by image; VisionZip's merging."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.bench.benchmark import rows_of
from mmkernels.bench.peers import Call, CantRunError, Peer
from mmkernels.ops.tokens.keep import share_of
from mmkernels.ops.tokens.ranking import starts_of
from mmkernels.ops.tokens.select_tokens.spec import SPEC
from mmkernels.spec import Inputs


def topk(inputs: Inputs) -> Call:
    """Without the definition of ties and NaN."""
    x, lengths, keep, scores = (inputs[name] for name in ("x", "lengths", "keep", "scores"))
    if "merge_rest" in inputs:
        raise CantRunError("merges nothing")
    counts = share_of(keep, lengths)

    def call() -> tuple[Tensor, Tensor]:
        chosen = []
        for first, score, count in zip(starts_of(lengths), scores.split(list(lengths)), counts, strict=False):
            chosen.append(first + score.topk(count).indices.sort().values)
        index = torch.cat(chosen)
        return x[index], index

    return call


def visionzip(inputs: Inputs) -> Call:
    """VisionZip's merging of the tokens that are not kept, from the paper, for one image."""
    x, lengths, keep, scores = (inputs[name] for name in ("x", "lengths", "keep", "scores"))
    if "merge_rest" not in inputs or len(lengths) > 1:
        raise CantRunError("merges the tokens of one image")
    metric, count = inputs.get("metric", x), share_of(keep, lengths)[0]

    def call() -> tuple[Tensor, Tensor]:
        index = scores.topk(count).indices.sort().values
        rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, index, False)
        unit = metric / metric.norm(dim=1, keepdim=True)
        nearest = (unit[rest] @ unit[index].mT).argmax(1)
        one_hot = torch.zeros(len(nearest), count, dtype=x.dtype, device=x.device).scatter(1, nearest[:, None], 1.0)
        return x[index] + one_hot.mT @ x[rest] / one_hot.sum(0).clamp(min=1)[:, None], index

    return call


test_select_tokens = rows_of(SPEC, (Peer("topk", topk), Peer("VisionZip", visionzip)))
