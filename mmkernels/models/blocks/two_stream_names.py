"""How checkpoints of LXMERT and ViLBERT name what `two_streams` has."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.models.blocks.checkpoint import CheckpointError

_PARTS = ("query", "key", "value")


def block_names(ours: str, attention: str, first: str, last: str) -> dict[str, str]:
    """Returns the start of the names of a `StreamBlock`'s parameters -> in a checkpoint.

    Args:
        ours: the start of all names in the model.
        attention, first, last: in a checkpoint those of the attention and of both halves of the feed-forward.
    """
    return {
        **attention_names(f"{ours}attention.", f"{attention}self.", f"{attention}output.dense."),
        f"{ours}norm.": f"{attention}output.LayerNorm.",
        **mlp_names(f"{ours}mlp.", first, last),
    }


def mlp_names(ours: str, first: str, last: str) -> dict[str, str]:
    """Returns the start of the names of a feed-forward's parameters -> in a checkpoint, of its two halves."""
    return {f"{ours}mlp.0.": f"{first}dense.", f"{ours}mlp.2.": f"{last}dense.", f"{ours}norm.": f"{last}LayerNorm."}


def head_names(prefix: str) -> dict[str, str]:
    """Returns the start of the names of the masked words' head -> in a checkpoint, whose names have a prefix."""
    return {
        "head.transform.0.": prefix + "transform.dense.",
        "head.transform.2.": prefix + "transform.LayerNorm.",
        "head.last.weight": prefix + "decoder.weight",
        "head.last.bias": prefix + "bias",
    }


def text_names(prefix: str) -> dict[str, str]:
    """Returns the start of the names of a `TextEmbeddings`, `text` -> in a checkpoint, whose names have a prefix."""
    return {
        "text.embed.": prefix + "word_embeddings.",
        "text.positions.": prefix + "position_embeddings.",
        "text.types.": prefix + "token_type_embeddings.",
        "text.norm.": prefix + "LayerNorm.",
    }


def attention_names(ours: str, theirs: str, output: str, number: str = "") -> dict[str, str]:
    """Returns the start of the names of a `SelfAttention`'s parameters -> in a checkpoint.

    Args:
        ours: the start of all names in the model.
        theirs: in a checkpoint that of query, key and value, a name of which `merge_projections` makes one tensor.
        output: in a checkpoint that of the last projection.
        number: follows the names of query, key and value there.
    """
    parts = {f"{ours}{part}.": f"{theirs}{part}{number}." for part in _PARTS}
    return parts | {f"{ours}qkv_proj.": f"{theirs}{{query,key,value}}{number}.", f"{ours}out_proj.": output}


def merge_projections(weights: dict[str, Tensor]) -> None:
    """Makes one tensor of the query's, the key's and the value's projection, which checkpoints keep apart.

    Raises:
        CheckpointError: their shapes differ.
    """
    for name in [name for name in weights if ".query." in name]:
        names = [name.replace(".query.", f".{part}.") for part in _PARTS]
        if any(other not in weights for other in names):
            continue  # the loader then names what is missing
        parts = [weights.pop(other) for other in names]
        if len({x.shape for x in parts}) > 1:
            got = ", ".join(str(list(x.shape)) for x in parts)
            raise CheckpointError(f"the weights must have query, key and value of one shape, got {got} for {name}")
        weights[name.replace(".query.", ".qkv_proj.")] = torch.cat(parts)
