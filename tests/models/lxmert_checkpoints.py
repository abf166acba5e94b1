"""Small LXMERT models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise

VOCAB, LENGTH, FEATURES, OBJECTS, ATTRIBUTES, ANSWERS = 90, 16, 20, 11, 7, 13

# Changes to the configuration below; `model`: transformers' class, "LxmertForPreTraining" if it is not named.
VARIANTS: dict[str, dict[str, Any]] = {
    "lxmert": {},
    "lxmert_shards": {
        "shard": True,
        "hidden_act": "gelu_pytorch_tanh",
        "visual_attr_loss": False,
        "task_qa": False,
        "tie_word_embeddings": False,
        "visual_loss_normalizer": 1.5,
        "l_layers": 1,
        "r_layers": 2,
        "x_layers": 1,
    },
    "lxmert_alone": {"model": "LxmertModel", "type_vocab_size": 3, "visual_pos_dim": 5},
    "lxmert_answers": {"model": "LxmertForQuestionAnswering"},
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration. No two sizes are equal by chance."""
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "l_layers": 3, "r_layers": 1}
    sizes |= {"x_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "visual_feat_dim": FEATURES}
    sizes |= {"num_object_labels": OBJECTS, "num_attr_labels": ATTRIBUTES, "num_qa_labels": ANSWERS}
    return sizes | {name: value for name, value in VARIANTS[variant].items() if name not in ("shard", "model")}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    name = VARIANTS[variant].get("model", "LxmertForPreTraining")
    return randomise(build_model(name, config(variant)).eval(), std=0.2)


def inputs(theirs: Any, rows: int = 2, regions: int = 5) -> dict[str, Tensor]:
    """Returns texts and regions; only those of the first row have no padding."""
    sizes, length = theirs.config, 8
    generator = torch.Generator().manual_seed(rows)
    row = torch.arange(rows)[:, None]
    draw = lambda *shape: torch.rand(rows, regions, *shape, generator=generator)
    return {
        "input_ids": torch.randint(1, VOCAB, (rows, length), generator=generator),
        "visual_feats": draw(sizes.visual_feat_dim),
        "visual_pos": draw(sizes.visual_pos_dim),
        "attention_mask": (torch.arange(length) < length - 3 * row).long(),
        "visual_attention_mask": (torch.arange(regions) < regions - 2 * row).long(),
        "token_type_ids": torch.randint(sizes.type_vocab_size, (rows, length), generator=generator),
    }


def labels(given: dict[str, Tensor], heads: tuple[str, ...] = ("obj", "attr", "feat")) -> dict[str, Any]:
    """Returns labels of all heads of pre-training; some words, objects and answers are ignored."""
    rows, regions = given["visual_feats"].shape[:2]
    generator = torch.Generator().manual_seed(7)
    draw = lambda most: torch.randint(most, (rows, regions), generator=generator)
    chance = lambda: torch.rand(rows, regions, generator=generator, dtype=given["visual_feats"].dtype)
    features = torch.rand(given["visual_feats"].shape, generator=generator, dtype=given["visual_feats"].dtype) * 3
    regional = {"obj": draw(OBJECTS), "attr": draw(ATTRIBUTES), "feat": features}
    regional["obj"][0, 1] = -100
    return {
        "labels": given["input_ids"].masked_fill(torch.rand(given["input_ids"].shape, generator=generator) < 0.6, -100),
        "matched_label": torch.arange(rows) % 2,
        "obj_labels": {name: (regional[name], chance()) for name in heads},
        "ans": torch.randint(ANSWERS, (rows,), generator=generator),
    }
