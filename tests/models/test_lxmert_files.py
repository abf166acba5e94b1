"""LXMERT: folders of checkpoints, those with errors too, configurations, inputs with errors, devices without values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_weights, configure, distance, refused
from lxmert_checkpoints import LENGTH, VOCAB

from mmkernels.models import LXMERT, LXMERTConfig

ALL, SHARDS, ALONE, ANSWERS = "lxmert", "lxmert_shards", "lxmert_alone", "lxmert_answers"
Copy = Callable[[str], Path]
Ours = Callable[..., LXMERT]


def same(model: LXMERT, other: LXMERT) -> bool:
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_names_of_hub_checkpoints(copy: Copy, ours: Ours) -> None:
    """They have positions' numbers, and the words' last layer beside the embeddings whose weight it shares."""
    folder = copy(ALL)
    embed, last = "lxmert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        tensors[last] = tensors[embed].clone()
        tensors["lxmert.embeddings.position_ids"] = torch.arange(LENGTH)[None]

    change_weights(folder, as_on_the_hub)
    model = LXMERT.from_pretrained(folder)
    assert same(model, ours(ALL)) and model.head is not None
    assert model.head.last.weight is model.text.embed.weight


def test_what_the_configuration_says(ours: Ours) -> None:
    config = ours(ALL).config
    assert (config.text_layers, config.vision_layers, config.cross_layers) == (3, 1, 2)
    assert config.region_heads == {"obj": 11, "attr": 7, "feat": 20} and config.num_answers == 13
    assert config.dropout == config.residual_dropout == 0.1 and config.vision_loss_weight == 6.67
    config = ours(SHARDS).config
    assert config.region_heads == {"obj": 11, "feat": 20} and config.num_answers is None
    assert config.activation == "gelu_pytorch_tanh" and config.vision_loss_weight == 1.5
    config = ours(ALONE).config
    assert not config.pretraining and config.region_heads == {} and config.num_answers is None
    assert (config.token_types, config.box_width) == (3, 5)
    config = ours(ANSWERS).config
    assert not config.pretraining and config.region_heads == {} and config.num_answers == 13


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        (ALL, {"architectures": ["LxmertEncoder"]}, r"architectures must be .* got \['LxmertEncoder'\]"),
        (ALL, {"architectures": ...}, "architectures must name LxmertModel or .*, got None"),
        (ALL, {"model_type": "bert"}, "model_type must be one of lxmert, got 'bert'"),
        (ALL, {"hidden_size": 50}, "hidden_size: width must be a multiple of heads = 3, got 50"),
        (ALL, {"hidden_size": 2**40}, "width must be an integer from 1 to 65536"),
        (ALL, {"l_layers": 10**6}, "text_layers must be an integer from 1 to 512|num_hidden_layers"),
        (ALL, {"x_layers": 0}, "x_layers: cross_layers must be an integer from 1 to 512, got 0"),
        (ALL, {"num_qa_labels": 0}, "num_answers must be an integer from 1 to"),
        (ALL, {"hidden_act": "swish9"}, "activation must be one of gelu, .*got 'swish9'"),
        (ALL, {"hidden_dropout_prob": 2.0}, "residual_dropout must be a number between 0 and 1, got 2.0"),
        (ALL, {"visual_loss_normalizer": -1.0}, "vision_loss_weight must be a number, positive and finite"),
    ],
)  # fmt: skip
def test_wrong_configurations(copy: Copy, variant: str, values: dict[str, Any], match: str) -> None:
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, f"config.json.*({match})")


def test_wrong_weights(copy: Copy) -> None:
    folder = copy(ALL)
    query = "lxmert.encoder.x_layers.1.visual_attention.att.query.weight"
    change_weights(folder, lambda tensors: tensors.update({query: tensors[query][:, :-1].contiguous()}))
    refused(folder, r"query, key and value of one shape, got \[48, 47\], \[48, 48\], \[48, 48\]")
    change_weights(folder, lambda tensors: tensors.pop(query))
    refused(folder, r"must hold lxmert.encoder.x_layers.1.visual_attention.att.\{query,key,value\}.weight \[144, 48\]")
    folder = copy(ALL)
    configure(folder, architectures=["LxmertForQuestionAnswering"])
    refused(folder, "model.safetensors: must hold only the model's tensors, got (cls|obj_predict_head)")
    configure(folder, architectures=["LxmertModel"])
    refused(folder, "model.safetensors: must hold only the model's tensors, got ")
    folder = copy(SHARDS)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    refused(folder, f"{shard.name}: must be a whole safetensors file, got an error")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cross_layers": 0}, "cross_layers must be an integer from 1 to 512, got 0"),
        ({"num_objects": 0}, "num_objects must be an integer from 1 to"),
        ({"pretraining": 1}, "pretraining must be a bool, got 1"),
        ({"predict_features": "no"}, "predict_features must be a bool, got 'no'"),
        ({"heads": 5}, "width must be a multiple of heads = 5, got 32"),
    ],
)
def test_configurations(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(LXMERT.sizes["tiny"], **change)
    assert isinstance(LXMERT.sizes["tiny"], LXMERTConfig)


def tiny(**changes: Any) -> LXMERT:
    return LXMERT.from_size("tiny", text_layers=1, cross_layers=1, **changes).eval()


IDS, FEATURES, BOXES = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.zeros(2, 4, 24), torch.zeros(2, 4, 4)
SEEN, CLASSES = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.long)


def regions(**changes: Any) -> dict[str, Any]:
    return {"obj": (CLASSES, SEEN), "attr": (CLASSES, SEEN), "feat": (FEATURES, SEEN)} | changes


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input_ids": IDS[:, :0]}, "input_ids must have 1 to 32 tokens, got 0"),
        ({"input_ids": IDS.repeat(1, 11)}, "input_ids must have 1 to 32 tokens, got 33"),
        ({"input_ids": IDS.float()}, r"input_ids must be integers \[B, L\], got torch.float32"),
        ({"input_ids": IDS + 120}, "input_ids must be from 0 to 127, got 123 to 129"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[2, 3\] as input_ids, got shape \(2, 4\)"),
        ({"token_type_ids": IDS}, "token_type_ids must be from 0 to 1, got 3 to 9"),
        ({"token_type_ids": IDS.float()}, r"token_type_ids must be integers \[2, 3\] as input_ids, got torch.float32"),
        ({"token_type_ids": IDS[:1]}, r"token_type_ids must be integers .* as input_ids, got torch.int64 \(1, 3\)"),
        ({"visual_feats": FEATURES[..., :9]}, r"visual_feats must be \[2, R, 24\], got shape \(2, 4, 9\)"),
        ({"visual_feats": FEATURES[:1]}, r"visual_feats must be \[2, R, 24\], got shape \(1, 4, 24\)"),
        ({"visual_feats": FEATURES[0]}, r"visual_feats must be \[2, R, 24\], got shape \(4, 24\)"),
        ({"visual_feats": FEATURES.long()}, "visual_feats must be float16, .* got torch.int64"),
        ({"visual_feats": None}, "visual_feats must be a tensor, got NoneType"),
        ({"visual_pos": BOXES[:, :3]}, r"visual_pos must be \[2, 4, 4\] as visual_feats, got shape \(2, 3, 4\)"),
        ({"visual_pos": BOXES[..., :3]}, r"visual_pos must be \[2, 4, 4\] as visual_feats, got shape \(2, 4, 3\)"),
        ({"visual_attention_mask": SEEN[:, :3]}, r"visual_attention_mask must be \[2, 4\], got shape \(2, 3\)"),
        ({"visual_attention_mask": [1]}, "visual_attention_mask must be a tensor, got list"),
        ({"labels": IDS + 125}, "labels other than -100 must be from 0 to 127, got 128 to 134"),
        ({"labels": IDS[:, :2]}, r"labels must be \[2, 3\] as input_ids, got shape \(2, 2\)"),
        ({"matched_label": torch.tensor([0, 2])}, "matched_label other than -100 must be from 0 to 1, got 0 to 2"),
        ({"matched_label": torch.tensor([0])}, r"matched_label must be \[2\], got shape \(1,\)"),
        ({"ans": torch.tensor([0, 13])}, "ans other than -100 must be from 0 to 12, got 0 to 13"),
        ({"obj_labels": {"obj": (CLASSES, SEEN)}}, "labels of obj, attr, feat, got obj"),
        ({"obj_labels": regions(obj=CLASSES)}, r"obj_labels\['obj'\] must be \(targets, weights\), got Tensor"),
        ({"obj_labels": [1]}, "obj_labels must be a dict with the labels of obj, attr, feat, got list"),
        ({"obj_labels": regions(obj=(CLASSES[:1], SEEN))}, r"obj_labels\['obj'\]\[0\] must be \[2, 4\], got shape"),
        ({"obj_labels": regions(obj=(SEEN, SEEN))}, r"obj_labels\['obj'\]\[0\] must be integers, got torch.float32"),
        ({"obj_labels": regions(attr=(CLASSES, SEEN[0]))}, r"obj_labels\['attr'\]\[1\] must be \[2, 4\], got shape"),
        ({"obj_labels": regions(attr=(CLASSES * 7, SEEN))}, "other than -100 must be from 0 to 6, got 7"),
        ({"obj_labels": regions(feat=(SEEN, SEEN))}, r"obj_labels\['feat'\]\[0\] must be \[2, 4, 24\], got shape"),
        ({"obj_labels": regions(feat=(CLASSES, SEEN))}, r"obj_labels\['feat'\]\[0\] must be float16.* got torch.int64"),
    ],
)  # fmt: skip
def test_bad_inputs(given: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        tiny()(**{"input_ids": IDS, "visual_feats": FEATURES, "visual_pos": BOXES} | given)


def test_labels_of_heads_that_a_model_does_not_have() -> None:
    model = tiny(pretraining=False, predict_features=False)
    model = LXMERT(replace(model.config, num_answers=None, num_objects=None, num_attributes=None))
    for given, match in (
        ({"labels": IDS}, "made with pretraining=True"),
        ({"matched_label": torch.tensor([0, 1])}, "made with pretraining=True"),
        ({"obj_labels": regions()}, "made with num_objects, num_attributes or predict_features"),
        ({"ans": torch.tensor([0, 1])}, "made with num_answers"),
    ):
        with pytest.raises(ValueError, match=f"the model must have been {match} for these labels, got none"):
            model(IDS, FEATURES, BOXES, **given)


def test_nothing_waits_for_a_device() -> None:
    """On a device that has no values, which the use of one would show."""
    config = tiny().config
    with torch.device("meta"):
        model = LXMERT(config)
        ids, seen = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 4)
        classes, features = torch.zeros(2, 4, dtype=torch.long), torch.rand(2, 4, 24)
        labels = {"obj": (classes, seen), "attr": (classes, seen), "feat": (features, seen)}
        out = model(
            ids, features, torch.rand(2, 4, 4), attention_mask=ids, visual_attention_mask=seen, labels=ids,
            obj_labels=labels, matched_label=ids[:, 0], ans=ids[:, 0],
        )  # fmt: skip
        assert out.loss is not None and out.loss.shape == () and out.loss.is_meta


def test_padding_changes_nothing() -> None:
    """A row of a batch gives what it gives alone."""
    model = tiny()
    ids, regions, boxes = torch.randint(1, 128, (2, 6)), torch.rand(2, 5, 24), torch.rand(2, 5, 4)
    mask, seen = torch.ones(2, 6), torch.ones(2, 5)
    mask[1, 4:] = seen[1, 3:] = 0
    with torch.no_grad():
        out = model(ids, regions, boxes, attention_mask=mask, visual_attention_mask=seen)
        alone = model(ids[1:, :4], regions[1:, :3], boxes[1:, :3])
    assert distance(out.text[1:, :4], alone.text) < 5e-6 and distance(out.vision[1:, :3], alone.vision) < 5e-6
    assert distance(out.answer_logits[1:], alone.answer_logits) < 5e-6


@pytest.mark.parametrize("field", ["dropout", "residual_dropout"])
def test_dropout(field: str) -> None:
    """Of probabilities and of branches' results, in training mode alone."""
    model = tiny(**{field: 0.5})
    given = IDS, torch.rand(2, 4, 24), torch.rand(2, 4, 4)
    with torch.no_grad():
        expected = model(*given).answer_logits
        assert torch.equal(model(*given).answer_logits, expected)
        model.train()
        assert not torch.equal(model(*given).answer_logits, model(*given).answer_logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    model, given = tiny(), (IDS, torch.rand(2, 4, 24), torch.rand(2, 4, 4))
    with torch.no_grad():
        expected = model(*given, labels=IDS, ans=torch.tensor([1, 2]))
        with torch.autocast("cpu", dtype):
            mixed = model(*given, labels=IDS, ans=torch.tensor([1, 2]))
        narrow = model.to(dtype)(*given, labels=IDS, ans=torch.tensor([1, 2]))
    assert narrow.text.dtype == dtype and narrow.loss.dtype == mixed.loss.dtype == torch.float32
    for out in (mixed, narrow):
        assert distance(out.loss, expected.loss) < 0.03 and distance(out.text.float(), expected.text) < 0.05


def test_the_vocabulary_of_the_checkpoint(ours: Ours) -> None:
    assert ours(ALL).text.embed.num_embeddings == VOCAB
