"""`scatter_tokens` beside PyTorch's own ways: `masked_scatter`, as in transformers' models, and others."""

import torch
from torch import Tensor

from mmkernels.bench.benchmark import rows_of
from mmkernels.bench.peers import Call, Peer
from mmkernels.ops.tokens.scatter_tokens.spec import SPEC
from mmkernels.spec import Inputs


def masked_scatter(inputs: Inputs) -> Call:
    """As transformers' LLaVA and Qwen-VL models; as DeepStack in Qwen3-VL, with a mask instead of positions."""
    embeddings, visual, positions = (inputs[name] for name in ("embeddings", "visual", "positions"))
    mask = torch.zeros(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    mask.view(-1)[positions] = True
    if inputs["mode"] == "replace":
        return lambda: embeddings.masked_scatter(mask[..., None].expand_as(embeddings), visual)

    def add() -> Tensor:
        out = embeddings.clone()
        out[mask] = out[mask] + visual
        return out

    return add


def index_put(inputs: Inputs) -> Call:
    embeddings, rows, visual, positions = _flat(inputs)
    add = inputs["mode"] == "add"
    return lambda: rows.index_put((positions,), visual, accumulate=add).view_as(embeddings)


def index_add(inputs: Inputs) -> Call:
    """Or `index_copy`."""
    embeddings, rows, visual, positions = _flat(inputs)
    if inputs["mode"] == "add":
        return lambda: rows.index_add(0, positions, visual).view_as(embeddings)
    return lambda: rows.index_copy(0, positions, visual).view_as(embeddings)


def _flat(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    embeddings = inputs["embeddings"]
    return embeddings, embeddings.flatten(0, -2), inputs["visual"], inputs["positions"]


PEERS = (Peer("masked_scatter", masked_scatter), Peer("index_put", index_put), Peer("index_add", index_add))
test_scatter_tokens = rows_of(SPEC, PEERS)
