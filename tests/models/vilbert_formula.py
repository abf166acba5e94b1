"""ViLBERT from its papers, of a dict of weights by the names of the authors' checkpoints; and such weights.

Sources: Lu et al., "ViLBERT", 2019, sections 2 and 3.1; "12-in-1", 2020, section 3; the names, and what the papers
leave open (post-norm layers, the fusion, the heads' shapes), from the repository facebookresearch/vilbert-multi-task.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 80,
    "max_position_embeddings": 16, "type_vocab_size": 2, "v_feature_size": 20, "v_target_size": 11, "v_hidden_size": 32,
    "v_num_hidden_layers": 3, "v_num_attention_heads": 4, "v_intermediate_size": 56, "bi_hidden_size": 40,
    "bi_num_attention_heads": 5, "t_biattention_id": [1, 3], "v_biattention_id": [0, 2], "hidden_act": "gelu",
    "v_hidden_act": "gelu", "pooling_method": "mul", "num_answers": 13, "num_gqa_answers": 7,
}  # fmt: skip
"""As a file of the authors' code, with sizes that are not equal by chance."""

TASKS = "VILBertForVLTasks"
PRETRAINING = "BertForMultiModalPreTraining"


def draw_weights(config: dict[str, Any], architecture: str) -> Weights:
    """Returns random float64 weights by the checkpoint's names, those that nothing uses among them."""
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}
    t, v, both = config["hidden_size"], config["v_hidden_size"], config["bi_hidden_size"]

    def table(name: str, *shape: int, mean: float = 0.0) -> None:
        weights[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2 + mean

    def dense(name: str, inner: int, outer: int) -> None:
        table(f"{name}.weight", outer, inner)
        table(f"{name}.bias", outer)

    def norm(name: str, width: int) -> None:
        table(f"{name}.weight", width, mean=1.0)
        table(f"{name}.bias", width)

    def layer(name: str, width: int, mlp: int) -> None:
        for part in ("query", "key", "value"):
            dense(f"{name}.attention.self.{part}", width, width)
        dense(f"{name}.attention.output.dense", width, width)
        norm(f"{name}.attention.output.LayerNorm", width)
        halves(f"{name}.intermediate", f"{name}.output", width, mlp)

    def halves(first: str, last: str, width: int, mlp: int) -> None:
        dense(f"{first}.dense", width, mlp)
        dense(f"{last}.dense", mlp, width)
        norm(f"{last}.LayerNorm", width)

    words = "bert.embeddings."
    for name, count in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        table(f"{words}{name}_embeddings.weight", config[count], t)
    if config.get("task_specific_tokens"):
        table(f"{words}task_embeddings.weight", 20, t)
    norm("bert.embeddings.LayerNorm", t)
    dense("bert.v_embeddings.image_embeddings", config["v_feature_size"], v)
    dense("bert.v_embeddings.image_location_embeddings", 5, v)
    norm("bert.v_embeddings.LayerNorm", v)
    for index in range(config["num_hidden_layers"]):
        layer(f"bert.encoder.layer.{index}", t, config["intermediate_size"])
    for index in range(config["v_num_hidden_layers"]):
        layer(f"bert.encoder.v_layer.{index}", v, config["v_intermediate_size"])
    for index in range(len(config["t_biattention_id"])):
        name = f"bert.encoder.c_layer.{index}"
        for number, width in (("1", v), ("2", t)):
            for part in ("query", "key", "value"):
                dense(f"{name}.biattention.{part}{number}", width, both)
            dense(f"{name}.biOutput.dense{number}", both, width)
            dense(f"{name}.biOutput.q_dense{number}", both, width)
            norm(f"{name}.biOutput.LayerNorm{number}", width)
        halves(f"{name}.v_intermediate", f"{name}.v_output", v, config["v_intermediate_size"])
        halves(f"{name}.t_intermediate", f"{name}.t_output", t, config["intermediate_size"])
    dense("bert.t_pooler.dense", t, both)
    dense("bert.v_pooler.dense", v, both)
    dense("cls.predictions.transform.dense", t, t)
    norm("cls.predictions.transform.LayerNorm", t)
    table("cls.predictions.bias", config["vocab_size"])
    dense("cls.bi_seq_relationship", both, 2)
    dense("cls.imagePredictions.transform.dense", v, v)
    norm("cls.imagePredictions.transform.LayerNorm", v)
    dense("cls.imagePredictions.decoder", v, config["v_target_size"])
    if architecture == TASKS:
        for name, inner, outer in (
            ("vil_prediction", both, config["num_answers"]),
            ("vil_prediction_gqa", both, config["num_gqa_answers"]),
            ("vil_binary_prediction", 2 * both, 2),
        ):  # fmt: skip
            dense(f"{name}.logit_fc.0", inner, 2 * both)
            norm(f"{name}.logit_fc.2", 2 * both)
            dense(f"{name}.logit_fc.3", 2 * both, outer)
        for name, inner, outer in (
            ("vil_logit", both, 1), ("vil_tri_prediction", both, 3), ("vision_logit", v, 1), ("linguisic_logit", t, 1),
        ):  # fmt: skip
            dense(name, inner, outer)
    return weights


class Formula:
    """Computes every result of a text and regions, with padding.

    Args:
        weights: by the checkpoint's names.
        config: as `CONFIG`.
    """

    def __init__(self, weights: Weights, config: dict[str, Any]) -> None:
        self.w, self.config = weights, config

    def dense(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int, seen: Tensor) -> Tensor:
        """softmax(Q K' / sqrt(d)) V of each head, over the keys that are seen, bool ``[B, Lk]``."""
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def feed_forward(self, first: str, last: str, x: Tensor) -> Tensor:
        hidden = F.gelu(self.dense(f"{first}.dense", x))
        return self.norm(f"{last}.LayerNorm", x + self.dense(f"{last}.dense", hidden))

    def layer(self, name: str, x: Tensor, heads: int, seen: Tensor) -> Tensor:
        """One transformer layer of one modality: figure 2a."""
        own = f"{name}.attention.self."
        attended = self.attention(*(self.dense(own + part, x) for part in ("query", "key", "value")), heads, seen)
        x = self.norm(f"{name}.attention.output.LayerNorm", x + self.dense(f"{name}.attention.output.dense", attended))
        return self.feed_forward(f"{name}.intermediate", f"{name}.output", x)

    def co_layer(self, name: str, vision: Tensor, text: Tensor, seen: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """One co-attentional layer: the queries of each modality meet the keys and values of the other: figure 2b."""
        heads, own, out = self.config["bi_num_attention_heads"], f"{name}.biattention.", f"{name}.biOutput."
        of_vision = [self.dense(f"{own}{part}1", vision) for part in ("query", "key", "value")]
        of_text = [self.dense(f"{own}{part}2", text) for part in ("query", "key", "value")]
        to_vision = self.attention(of_vision[0], of_text[1], of_text[2], heads, valid)
        to_text = self.attention(of_text[0], of_vision[1], of_vision[2], heads, seen)
        vision = self.norm(f"{out}LayerNorm1", vision + self.dense(f"{out}dense1", to_vision))
        text = self.norm(f"{out}LayerNorm2", text + self.dense(f"{out}dense2", to_text))
        vision = self.feed_forward(f"{name}.v_intermediate", f"{name}.v_output", vision)
        return vision, self.feed_forward(f"{name}.t_intermediate", f"{name}.t_output", text)

    def embed(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the embeddings of text and regions, and which tokens are valid."""
        ids, name = given["input_ids"], "bert.embeddings."
        # A token of number 0 is looked up without a gradient: the padding of the embeddings.
        words = F.embedding(ids, self.w[f"{name}word_embeddings.weight"], padding_idx=0)
        text = words + self.w[f"{name}position_embeddings.weight"][: ids.shape[1]]
        text = text + self.w[f"{name}token_type_embeddings.weight"][given["token_type_ids"]]
        valid = given["attention_mask"].bool()
        if "task_ids" in given:
            task = self.w[f"{name}task_embeddings.weight"][given["task_ids"]][:, None]
            text = torch.cat([text[:, :1], task, text[:, 1:]], dim=1)
            valid = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
        name = "bert.v_embeddings."
        vision = self.dense(f"{name}image_embeddings", given["visual_feats"])
        vision = vision + self.dense(f"{name}image_location_embeddings", given["visual_pos"])
        return self.norm("bert.embeddings.LayerNorm", text), self.norm(f"{name}LayerNorm", vision), valid

    def __call__(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Returns all results by the names of `ViLBERTOutput` and `ViLBERTTasks`, and each layer's in "states"."""
        c, seen = self.config, given["visual_attention_mask"].bool()
        text, vision, valid = self.embed(given)
        texts, visions = [], []
        places = list(zip(c["t_biattention_id"], c["v_biattention_id"], strict=True))
        places.append((c["num_hidden_layers"], c["v_num_hidden_layers"]))
        start = (0, 0)
        for index, place in enumerate(places):
            for number in range(start[0], place[0]):
                text = self.layer(f"bert.encoder.layer.{number}", text, c["num_attention_heads"], valid)
                texts.append(text)
            for number in range(start[1], place[1]):
                vision = self.layer(f"bert.encoder.v_layer.{number}", vision, c["v_num_attention_heads"], seen)
                visions.append(vision)
            start = place
            if index < len(places) - 1:
                vision, text = self.co_layer(f"bert.encoder.c_layer.{index}", vision, text, seen, valid)
                texts.append(text)
                visions.append(vision)
        return {"text": text, "vision": vision, "states": (texts, visions)} | self.heads(text, vision, seen)

    def heads(self, text: Tensor, vision: Tensor, seen: Tensor) -> dict[str, Tensor]:
        pooled_text = self.dense("bert.t_pooler.dense", text[:, 0]).relu()
        pooled_vision = self.dense("bert.v_pooler.dense", vision[:, 0]).relu()
        fused = (
            pooled_text * pooled_vision
            if self.config.get("fusion_method", "mul") == "mul"
            else pooled_text + pooled_vision
        )
        found = {"text_pooled": pooled_text, "vision_pooled": pooled_vision}
        found["matching_logits"] = self.dense("cls.bi_seq_relationship", fused)
        hidden = F.gelu(self.dense("cls.predictions.transform.dense", text))
        hidden = self.norm("cls.predictions.transform.LayerNorm", hidden)
        found["word_logits"] = (
            hidden @ self.w["bert.embeddings.word_embeddings.weight"].T + self.w["cls.predictions.bias"]
        )
        hidden = F.gelu(self.dense("cls.imagePredictions.transform.dense", vision))
        hidden = self.norm("cls.imagePredictions.transform.LayerNorm", hidden)
        found["region_logits"] = self.dense("cls.imagePredictions.decoder", hidden)
        if "vil_logit.weight" in self.w:
            classify = lambda name, x: self.dense(
                f"{name}.logit_fc.3", self.norm(f"{name}.logit_fc.2", F.gelu(self.dense(f"{name}.logit_fc.0", x)))
            )
            found["answers"] = classify("vil_prediction", fused)
            found["gqa_answers"] = classify("vil_prediction_gqa", fused)
            found["pairs"] = classify("vil_binary_prediction", fused.reshape(len(fused) // 2, -1))
            found["score"] = self.dense("vil_logit", fused)[:, 0]
            found["entailment"] = self.dense("vil_tri_prediction", fused)
            found["regions"] = self.dense("vision_logit", vision)[..., 0] - 10_000.0 * ~seen
            found["words"] = self.dense("linguisic_logit", text)[..., 0]
        return found


def losses(found: dict[str, Tensor], labels: dict[str, Tensor], target: str = "classes") -> dict[str, Tensor]:
    """Returns the losses of section 2.2: of masked words, of masked regions, and of alignment."""
    predicted, chosen = found["region_logits"][:, 1:], labels["region_label"] == 1
    wanted = labels["region_target"]
    if target == "classes":  # the KL divergence of the detector's classes and the predicted ones
        each = (wanted * (wanted.log() - predicted.log_softmax(-1))).sum(-1)
    else:
        each = (predicted - wanted).square().mean(-1)
    words = F.cross_entropy(found["word_logits"].flatten(0, 1), labels["labels"].flatten())
    matching = F.cross_entropy(found["matching_logits"], labels["matched_label"])
    return {"words": words, "matching": matching, "regions": each[chosen].sum() / chosen.sum()}


def inputs(config: dict[str, Any], rows: int = 2, regions: int = 5, length: int = 7) -> dict[str, Tensor]:
    """Returns texts and regions; only those of the first row have no padding."""
    generator = torch.Generator().manual_seed(rows)
    row = torch.arange(rows)[:, None]
    draw = lambda width: torch.rand(rows, regions, width, generator=generator, dtype=torch.float64)
    given = {
        "input_ids": torch.randint(config["vocab_size"], (rows, length), generator=generator),
        "visual_feats": draw(config["v_feature_size"]),
        "visual_pos": draw(5),
        "attention_mask": (torch.arange(length) < length - 2 * row).long(),
        "visual_attention_mask": (torch.arange(regions) < regions - row).long(),
        "token_type_ids": torch.randint(config["type_vocab_size"], (rows, length), generator=generator),
    }
    given["input_ids"][0, 2] = 0
    if config.get("task_specific_tokens"):
        given["task_ids"] = torch.randint(20, (rows,), generator=generator)
    return given


def labels(config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns labels of pre-training; some words are ignored."""
    generator = torch.Generator().manual_seed(5)
    rows, regions = given["visual_feats"].shape[:2]
    size = (rows, regions - 1)
    target = torch.randn(*size, config["v_target_size"], generator=generator, dtype=torch.float64).softmax(-1)
    ignored = torch.rand(given["input_ids"].shape, generator=generator) < 0.5
    return {
        "labels": given["input_ids"].masked_fill(ignored, -100),
        "matched_label": torch.arange(rows) % 2,
        "region_label": torch.randint(-1, 2, size, generator=generator),
        "region_target": target,
    }
