"""How Hugging Face's LXMERT classes name the fields and the tensors of an `LXMERT`."""

from __future__ import annotations

import re

from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.two_stream_names import (
    attention_names,
    block_names,
    head_names,
    merge_projections,
    text_names,
)

ARCHITECTURES = {"lxmert": ("LxmertModel", "LxmertForPreTraining", "LxmertForQuestionAnswering")}
"""Model type -> architectures."""

FIELDS = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "text_layers": "l_layers",
    "vision_layers": "r_layers",
    "cross_layers": "x_layers",
    "vocab_size": "vocab_size",
    "feature_width": "visual_feat_dim",
    "box_width": "visual_pos_dim",
    "text_length": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "activation": "hidden_act",
    "dropout": "attention_probs_dropout_prob",
    "residual_dropout": "hidden_dropout_prob",
    "vision_loss_weight": "visual_loss_normalizer",
}
"""Field of `LXMERTConfig` -> field of transformers' configuration."""


def _table(prefix: str) -> dict[str, str]:
    """Returns the start of a parameter's name in the model -> in a checkpoint, whose encoder's names have a prefix."""
    encoder, embeddings = prefix + "encoder.", prefix + "embeddings."
    cross = encoder + "x_layers.#."
    layers = {"text_blocks.#.": f"{encoder}layer.#.", "vision_blocks.#.": f"{encoder}r_layers.#."}
    parts = ("attention.", "intermediate.", "output.")
    blocks = {ours: tuple(theirs + part for part in parts) for ours, theirs in layers.items()}
    for ours, theirs in (("text", "lang"), ("vision", "visn")):
        names = (f"{cross}{theirs}_self_att.", f"{cross}{theirs}_inter.", f"{cross}{theirs}_output.")
        blocks[f"cross_blocks.#.{ours}."] = names
    return {
        **text_names(embeddings),
        "features.": encoder + "visn_fc.visn_fc.",
        "features_norm.": encoder + "visn_fc.visn_layer_norm.",
        "boxes.": encoder + "visn_fc.box_fc.",
        "boxes_norm.": encoder + "visn_fc.box_layer_norm.",
        **{name: start for ours, theirs in blocks.items() for name, start in block_names(ours, *theirs).items()},
        **attention_names(
            "cross_blocks.#.cross.a.", cross + "visual_attention.att.", cross + "visual_attention.output.dense."
        ),
        "cross_blocks.#.norm.": cross + "visual_attention.output.LayerNorm.",
        "pooler.0.": prefix + "pooler.dense.",
        **head_names("cls.predictions."),
        "matching_head.": "cls.seq_relationship.",
        "region_transform.0.": "obj_predict_head.transform.dense.",
        "region_transform.2.": "obj_predict_head.transform.LayerNorm.",
        "region_heads.": "obj_predict_head.decoder_dict.",
        "answer_head.": "answer_head.logit_fc.",
    }


_TABLES = {alone: _table("" if alone else "lxmert.") for alone in (True, False)}
_IGNORED = re.compile(r"\.position_ids$")


def names(*, alone: bool) -> Names:
    """Returns the names of checkpoints; `alone`: of the class without heads, else of those that have some."""
    return Names(_TABLES[alone], _IGNORED, merge_projections)
