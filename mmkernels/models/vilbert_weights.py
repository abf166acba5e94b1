"""How the authors' code names the fields and the tensors of a `ViLBERT`.

Source: the repository facebookresearch/vilbert-multi-task, ``vilbert/vilbert.py``; its names are those of the released
checkpoints, of ViLBERT and of "12-in-1".
"""

from __future__ import annotations

import re
from typing import Any

from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.two_stream_names import (
    attention_names,
    block_names,
    head_names,
    merge_projections,
    mlp_names,
    text_names,
)

ARCHITECTURES = ("BertForMultiModalPreTraining", "VILBertForVLTasks")
"""The classes of the authors' code that are read."""

FIELDS = {
    "text_width": "hidden_size",
    "text_layers": "num_hidden_layers",
    "text_heads": "num_attention_heads",
    "text_mlp": "intermediate_size",
    "text_length": "max_position_embeddings",
    "text_activation": "hidden_act",
    "text_dropout": "attention_probs_dropout_prob",
    "text_residual_dropout": "hidden_dropout_prob",
    "vision_width": "v_hidden_size",
    "vision_layers": "v_num_hidden_layers",
    "vision_heads": "v_num_attention_heads",
    "vision_mlp": "v_intermediate_size",
    "vision_activation": "v_hidden_act",
    "vision_dropout": "v_attention_probs_dropout_prob",
    "vision_residual_dropout": "v_hidden_dropout_prob",
    "shared_width": "bi_hidden_size",
    "shared_heads": "bi_num_attention_heads",
    "cross_text": "t_biattention_id",
    "cross_vision": "v_biattention_id",
    "vocab_size": "vocab_size",
    "token_types": "type_vocab_size",
    "feature_width": "v_feature_size",
    "target_width": "v_target_size",
    "fusion": "fusion_method",
    "num_answers": "num_answers",
    "num_gqa_answers": "num_gqa_answers",
}
"""Field of `ViLBERTConfig` -> field of the file."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "type_vocab_size": 2, "v_feature_size": 2048, "v_target_size": 1601,
    "v_num_hidden_layers": 3, "v_num_attention_heads": 12, "v_intermediate_size": 3072, "bi_hidden_size": 1024,
    "bi_num_attention_heads": 16, "v_attention_probs_dropout_prob": 0.1, "v_hidden_act": "gelu",
    "v_hidden_dropout_prob": 0.1, "v_biattention_id": [0, 1], "t_biattention_id": [10, 11], "visual_target": 0,
    "fusion_method": "mul", "task_specific_tokens": False, "dynamic_attention": False, "with_coattention": True,
    "in_batch_pairs": False, "fixed_t_layer": 0, "fixed_v_layer": 0, "model": "bert",
    "num_answers": 3129, "num_gqa_answers": 1533,
}  # fmt: skip
"""What the authors' code takes for a field that a file leaves out."""

ONLY: dict[str, Any] = {
    "dynamic_attention": False, "with_coattention": True, "in_batch_pairs": False, "fixed_t_layer": 0,
    "fixed_v_layer": 0, "model": "bert",
}  # fmt: skip
"""Options of the authors' code of which one value is served."""

FUSION_DROPOUT = 0.1
TASKS = 20
"""How many task tokens the authors' code has."""


def _cross(layer: str) -> dict[str, str]:
    """Returns the names of a layer in which each modality attends to the other; 1: the image, 2: the text."""
    names: dict[str, str] = {}
    for side, ours, theirs, number in (("a", "vision", "v", "1"), ("b", "text", "t", "2")):
        start, output = "cross_blocks.#.", layer + "biOutput."
        names |= attention_names(f"{start}cross.{side}.", f"{layer}biattention.", f"{output}dense{number}.", number)
        names[f"{start}{ours}_norm."] = f"{output}LayerNorm{number}."
        names |= mlp_names(f"{start}{ours}_mlp.", f"{layer}{theirs}_intermediate.", f"{layer}{theirs}_output.")
    return names


def _block(ours: str, layer: str) -> dict[str, str]:
    return block_names(ours, f"{layer}attention.", f"{layer}intermediate.", f"{layer}output.")


_TABLE = {
    **text_names("bert.embeddings."),
    "tasks.": "bert.embeddings.task_embeddings.",
    "features.": "bert.v_embeddings.image_embeddings.",
    "boxes.": "bert.v_embeddings.image_location_embeddings.",
    "vision_norm.": "bert.v_embeddings.LayerNorm.",
    **_block("text_blocks.#.", "bert.encoder.layer.#."),
    **_block("vision_blocks.#.", "bert.encoder.v_layer.#."),
    **_cross("bert.encoder.c_layer.#."),
    "text_pooler.0.": "bert.t_pooler.dense.",
    "vision_pooler.0.": "bert.v_pooler.dense.",
    **head_names("cls.predictions."),
    "matching_head.": "cls.bi_seq_relationship.",
    "region_head.0.": "cls.imagePredictions.transform.dense.",
    "region_head.2.": "cls.imagePredictions.transform.LayerNorm.",
    "region_head.3.": "cls.imagePredictions.decoder.",
    "task_heads.answers.": "vil_prediction.logit_fc.",
    "task_heads.gqa_answers.": "vil_prediction_gqa.logit_fc.",
    "task_heads.pairs.": "vil_binary_prediction.logit_fc.",
    "task_heads.score.": "vil_logit.",
    "task_heads.entailment.": "vil_tri_prediction.",
    "task_heads.regions.": "vision_logit.",
    "task_heads.words.": "linguisic_logit.",
}
# Of the co-attention's results the code keeps a second projection, which it never uses.
_IGNORED = re.compile(r"\.position_ids$|\.biOutput\.q_dense[12]\.")

NAMES = Names(_TABLE, _IGNORED, merge_projections, {"module.": ""})
"""Checkpoints of both classes; a name may begin with "module.", as of a model that was trained on several GPUs."""
