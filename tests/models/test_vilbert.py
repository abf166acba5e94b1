"""ViLBERT against formulas from its papers; folders of checkpoints, inputs with errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_weights, check_gradients, distance
from safetensors.torch import save_file
from torch import Tensor
from vilbert_formula import CONFIG, PRETRAINING, TASKS, Formula, Weights, draw_weights, inputs, labels, losses

import mmkernels
from mmkernels.models import ViLBERT
from mmkernels.models.blocks.checkpoint import CheckpointError

EXACT, TOLERANCE = 1e-12, 5e-6

VARIANTS: dict[str, dict[str, Any]] = {
    "pretraining": {"architectures": [PRETRAINING]},
    "features": {"architectures": [PRETRAINING], "visual_target": 1, "fusion_method": "sum"},
    "tasks": {"architectures": [TASKS]},
    "task tokens": {"architectures": [TASKS], "task_specific_tokens": True, "t_biattention_id": [0, 2]},
}
Folders = Callable[[str], Path]


def config_of(variant: str) -> dict[str, Any]:
    return CONFIG | VARIANTS[variant]


@cache
def weights_of(variant: str) -> Weights:
    return draw_weights(config_of(variant), VARIANTS[variant]["architectures"][0])


def write(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Folders:
    """variant -> the folder of its checkpoint."""
    return lambda variant: write(tmp_path / variant, config_of(variant), weights_of(variant))


def load(folder: Path, dtype: torch.dtype = torch.float64) -> ViLBERT:
    return ViLBERT.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_result(folder: Folders, variant: str) -> None:
    """Layer by layer, and every head, in float64, by each backend; of inputs with padding."""
    config, model = config_of(variant), load(folder(variant))
    given = inputs(config)
    expected = Formula(weights_of(variant), config)(given)
    for backend in ("chunked", "reference"):
        with torch.no_grad(), mmkernels.use_backend(backend):
            out = model(**given, paired=config_of(variant)["architectures"] == [TASKS])
        for name, want in zip(("text", "vision"), expected["states"], strict=True):
            found = getattr(out.states, name)
            assert len(found) == len(want)
            assert max(map(distance, found, want)) < EXACT, name
        results = vars(out) | ({} if out.tasks is None else out.tasks._asdict())
        names = expected.keys() - {"states"}
        assert names >= {"text_pooled", "word_logits", "region_logits"}
        assert ("answers" in names) == (VARIANTS[variant]["architectures"] == [TASKS])
        for name in names:
            assert distance(results[name], expected[name]) < EXACT, name
    assert out.losses is None and out.loss is None


@pytest.mark.parametrize(("variant", "dtype"), [("pretraining", torch.float64), ("features", torch.float32)], ids=str)
def test_pretraining(folder: Folders, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Losses, and the gradient of every parameter."""
    config = config_of(variant)
    model = load(folder(variant), dtype)
    weights = {name: x.clone().requires_grad_() for name, x in weights_of(variant).items()}
    given = inputs(config)
    wanted = labels(config, given)
    out = model(**given, **wanted)
    expected = losses(Formula(weights, config)(given), wanted, "features" if variant == "features" else "classes")
    tolerance = EXACT if dtype == torch.float64 else TOLERANCE
    assert out.losses is not None and out.word_logits is None and out.loss is not None
    for name, want in expected.items():
        assert distance(getattr(out.losses, name), want) < tolerance, name
    assert out.loss.dtype == dtype
    out.loss.backward()
    total: Any = sum(expected.values())
    total.backward()
    gradients = {name: x.grad for name, x in weights.items() if x.grad is not None}
    assert {name for name in weights if name not in gradients} == {name for name in weights if ".q_dense" in name}
    found = load(write(tmp_path / "gradients", config, gradients), dtype).state_dict()
    check_gradients(model, found, 1e-11 if dtype == torch.float64 else 5e-5)


def test_labels_with_task_tokens(folder: Folders) -> None:
    """The task's token is predicted by nothing; labels keep the text's length."""
    variant = "task tokens"
    config, model = config_of(variant), load(folder(variant))
    given = inputs(config)
    wanted = labels(config, given)["labels"]
    found = Formula(weights_of(variant), config)(given)
    logits = torch.cat([found["word_logits"][:, :1], found["word_logits"][:, 2:]], dim=1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    with torch.no_grad():
        loss = model(**given, labels=wanted).loss
    assert loss is not None and distance(loss, expected) < EXACT


def test_one_text_for_many_images(folder: Folders) -> None:
    """And the reverse; what each reads alone, the side of batch 1 reads once."""
    config, model = config_of("tasks"), load(folder("tasks"))
    given = inputs(config, rows=4)
    texts, images = ("input_ids", "attention_mask", "token_type_ids"), ("visual_feats", "visual_pos")
    for names in (texts, (*images, "visual_attention_mask")):
        one = given | {name: given[name][:1] for name in names}
        every = given | {name: given[name][:1].expand_as(given[name]) for name in names}
        with torch.no_grad():
            out, expected = model(**one), model(**every)
        assert out.tasks is not None and expected.tasks is not None
        assert distance(out.tasks.score, expected.tasks.score) < EXACT
        assert distance(out.text, expected.text) < EXACT and distance(out.vision, expected.vision) < EXACT
        assert (out.states.text[0].shape[0], out.text.shape[0]) == (1 if names is texts else 4, 4)


@pytest.mark.parametrize("one", ["text", "image"])
def test_labels_of_one_for_all(folder: Folders, one: str) -> None:
    """Labels have the rows of what they label; whether both belong together is said of each pair."""
    config, model = config_of("pretraining"), load(folder("pretraining"))
    given = inputs(config, rows=3)
    wanted = labels(config, given)
    of_text = one == "text"
    alone = {"input_ids", "attention_mask", "token_type_ids", "labels"}
    alone = alone if of_text else (given.keys() | wanted.keys()) - alone - {"matched_label"}
    some = {name: x[:1] if name in alone else x for name, x in (given | wanted).items()}
    every = {name: x[:1].expand_as(x) if name in alone else x for name, x in (given | wanted).items()}
    with torch.no_grad():
        found, expected = (model(**x).losses for x in (some, every))
    assert found is not None and expected is not None
    assert max(map(distance, found, expected)) < EXACT


def test_text_and_regions_matter(folder: Folders) -> None:
    """If one of them changed little, parity would prove little."""
    config, model = config_of("tasks"), load(folder("tasks"))
    given = inputs(config)
    with torch.no_grad():
        out = model(**given)
        for name in ("input_ids", "visual_feats", "visual_pos"):
            other = model(**given | {name: given[name].flip(1)})
            for part in ("text", "vision"):
                assert distance(getattr(other, part), getattr(out, part)) > 0.05, (name, part)
            assert other.tasks is not None and out.tasks is not None
            assert distance(other.tasks.answers, out.tasks.answers) > 0.05, name


def test_one_call_for_both_directions(folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmkernels.nn.self_attention as module

    calls: list[Tensor] = []
    original = module.cross_attention
    monkeypatch.setattr(module, "cross_attention", lambda q, *x, **y: calls.append(q) or original(q, *x, **y))
    model = load(folder("pretraining"))
    with torch.no_grad():
        model(**inputs(CONFIG))
    assert len(calls) == 4 + 3 + 2 and {q.shape[2] for q in calls} == {7, 5, 12}


@pytest.mark.parametrize("hidden", ["attention_mask", "visual_attention_mask"])
def test_a_side_that_is_hidden(folder: Folders, hidden: str) -> None:
    """Of a text or an image that is padding altogether nothing reaches the other side, whatever it holds."""
    given, model = inputs(CONFIG), load(folder("pretraining"))
    given[hidden] = given[hidden].clone()
    given[hidden][0] = 0
    changed = "input_ids" if hidden == "attention_mask" else "visual_feats"
    other = given | {changed: given[changed].clone()}
    other[changed][0] = 5 if changed == "input_ids" else float("nan")
    seen = "vision" if hidden == "attention_mask" else "text"
    with torch.no_grad():
        out, again = (getattr(model(**x), seen) for x in (given, other))
    assert torch.isfinite(out).all() and torch.equal(out, again)


def test_names_of_released_checkpoints(folder: Folders) -> None:
    """A name may begin with "module."; the words' last layer may stand beside the embeddings, as it does there."""
    path = folder("pretraining")
    expected = load(path)

    def as_released(tensors: dict[str, Tensor]) -> None:
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    change_weights(path, as_released)
    model = load(path)
    assert model.head.last.weight is model.text.embed.weight
    for (name, x), (other, y) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other and torch.equal(x, y)


def test_what_the_configuration_says(folder: Folders) -> None:
    config = load(folder("task tokens")).config
    assert (config.cross_text, config.cross_vision) == ((0, 2), (0, 2)) and config.task_tokens == 20 and config.tasks
    assert config.text_dropout == config.vision_dropout == config.fusion_dropout == 0.1
    config = load(folder("features")).config
    assert (config.region_target, config.fusion, config.tasks) == ("features", "sum", False)
    assert ViLBERT.sizes["base_12_in_1"].num_answers == 3129


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"architectures": None}, r"must be \['BertForMultiModalPreTraining'\] or \['VILBertForVLTasks'\], got None"),
        ({"architectures": ["BertModel"]}, r"architectures must be .*got \['BertModel'\]"),
        ({"model_type": "bert"}, "must be the configuration of a ViLBERT, got 'bert'"),
        ({"v_hidden_size": ...}, "must be the configuration of a ViLBERT, got none of its fields"),
        ({"dynamic_attention": True}, "dynamic_attention must be False, got True"),
        ({"with_coattention": False}, "with_coattention must be True, got False"),
        ({"model": "roberta"}, "model must be 'bert', got 'roberta'"),
        ({"fixed_t_layer": 3}, "fixed_t_layer must be 0, got 3"),
        ({"hidden_size": 50}, "hidden_size: text_width must be a multiple of text_heads = 3, got 50"),
        ({"v_hidden_size": 2**40}, "v_hidden_size: vision_width must be an integer from 1 to 65536"),
        ({"bi_hidden_size": 42}, "bi_hidden_size: shared_width must be a multiple of shared_heads = 5, got 42"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: text_layers must be an integer from 1 to 512"),
        ({"hidden_act": "swish9"}, "hidden_act: text_activation must be one of gelu"),
        ({"v_attention_probs_dropout_prob": 0.3}, "vision_dropout must be text_dropout = 0.1, .* got 0.3"),
        ({"hidden_dropout_prob": "no"}, "text_residual_dropout must be a number between 0 and 1, got 'no'"),
        ({"t_biattention_id": [3, 1]}, "cross_text must be integers from 0 to 3, in rising order"),
        ({"t_biattention_id": [1, 4]}, r"cross_text must be integers from 0 to 3, in rising order, got \(1, 4\)"),
        ({"v_biattention_id": [1]}, r"cross_text and cross_vision must have one length, at least 1, got \(2, 1\)"),
        ({"v_biattention_id": 1}, "cross_vision must be integers from 0 to 2, in rising order, got 1"),
        ({"visual_target": 7}, "visual_target must be 0, 1 or 2, got 7"),
        ({"fusion_method": "cat"}, "fusion must be one of mul, sum, got 'cat'"),
    ],
)  # fmt: skip
def test_wrong_configurations(tmp_path: Path, values: dict[str, Any], match: str) -> None:
    config = {name: value for name, value in (config_of("pretraining") | values).items() if value is not ...}
    with pytest.raises(CheckpointError, match=f"config.json.*{match}"):
        load(write(tmp_path / "wrong", config, {}))


def test_wrong_weights(folder: Folders) -> None:
    path = folder("pretraining")
    key = "bert.encoder.c_layer.1.biattention.key2.weight"
    change_weights(path, lambda tensors: tensors.pop(key))
    with pytest.raises(
        CheckpointError, match=r"must hold bert.*c_layer.1.biattention.\{query,key,value\}2.weight \[120, 48\]"
    ):
        load(path)
    path = folder("tasks")
    change_weights(path, lambda tensors: tensors.update({"vil_prediction.main.0.weight_g": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"must hold only .* got vil_prediction\.main\.0\.weight_g"):
        load(path)


def tiny(**changes: Any) -> ViLBERT:
    return ViLBERT.from_size("tiny", **changes).eval()


IDS, FEATURES, BOXES = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.zeros(2, 4, 20), torch.zeros(2, 4, 5)
LABEL, TARGET = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, 11) / 11


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input_ids": IDS[:, :0]}, "input_ids must have 1 to 32 tokens, got 0"),
        ({"input_ids": IDS + 120}, "input_ids must be from 0 to 127, got 123 to 129"),
        ({"token_type_ids": IDS}, "token_type_ids must be from 0 to 1, got 3 to 9"),
        ({"visual_feats": FEATURES[..., :9]}, r"visual_feats must be \[2 or 1, R, 20\], got shape \(2, 4, 9\)"),
        ({"visual_feats": FEATURES.repeat(2, 1, 1)}, r"visual_feats must be \[2 or 1, R, 20\], got shape \(4, 4, 20\)"),
        ({"visual_feats": FEATURES[0]}, r"visual_feats must be \[2 or 1, R, 20\], got shape \(4, 20\)"),
        ({"visual_feats": FEATURES[:, :0], "visual_pos": BOXES[:, :0]}, "visual_feats must have a region at least"),
        ({"visual_pos": BOXES[..., :4]}, r"visual_pos must be \[2, 4, 5\] as visual_feats, got shape \(2, 4, 4\)"),
        ({"visual_pos": BOXES[:1]}, r"visual_pos must be \[2, 4, 5\] as visual_feats, got shape \(1, 4, 5\)"),
        ({"visual_attention_mask": LABEL}, r"visual_attention_mask must be \[2, 4\], got shape \(2, 3\)"),
        ({"task_ids": IDS[:, 0]}, "task_ids must be None where task_tokens is None, got a tensor"),
        ({"matched_label": torch.tensor([0, 2])}, "matched_label other than -100 must be from 0 to 1, got 0 to 2"),
        ({"matched_label": torch.tensor([0])}, r"matched_label must be \[2\], got shape \(1,\)"),
        ({"region_label": LABEL}, "region_label and region_target must be given together, got region_label alone"),
        ({"region_target": TARGET}, "region_label and region_target must be given together, got region_target alone"),
        ({"region_label": LABEL[:, :2], "region_target": TARGET}, r"region_label must be \[2, 3\], got \(?.*\(2, 2\)"),
        ({"region_label": LABEL, "region_target": TARGET[..., :2]}, r"region_target must be \[2, 3, 11\], got shape"),
        ({"region_label": LABEL, "region_target": LABEL}, "region_target must be float16, .* got torch.int64"),
    ],
)  # fmt: skip
def test_bad_inputs(given: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        tiny()(**{"input_ids": IDS, "visual_feats": FEATURES, "visual_pos": BOXES} | given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tasks": 1}, "tasks must be a bool, got 1"),
        ({"task_tokens": 0}, "task_tokens must be an integer from 1 to 512, got 0"),
        ({"fusion_dropout": -1.0}, "fusion_dropout must be a number between 0 and 1, got -1.0"),
        ({"region_target": "pixels"}, "region_target must be one of classes, features, contrast, got 'pixels'"),
        ({"num_answers": 2.5}, "num_answers must be an integer from 1 to 262144, got 2.5"),
        ({"cross_text": (), "cross_vision": ()}, r"must have one length, at least 1, got \(0, 0\)"),
    ],
)
def test_configurations(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny(**change)


def test_bad_tasks_and_targets() -> None:
    model = tiny(task_tokens=20, region_target="contrast")
    for given, match in (
        ({}, "task_ids must be given where task_tokens is 20, got None"),
        ({"task_ids": IDS}, r"task_ids must be integers \[2\], got torch.int64 \(2, 3\)"),
        ({"task_ids": torch.tensor([3, 20])}, "task_ids must be from 0 to 19, got 3 to 20"),
        ({"task_ids": IDS[:, 0], "region_label": LABEL, "region_target": TARGET}, "region_label must be None where"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            model(IDS, FEATURES, BOXES, **given)


def test_odd_batches_and_no_chosen_region() -> None:
    model = tiny()
    out = model(IDS[:1], FEATURES[:1], BOXES[:1], region_label=0 * LABEL[:1], region_target=TARGET[:1])
    assert out.tasks is not None and out.tasks.pairs is None and float(out.loss.detach()) == 0.0  # type: ignore[union-attr]
    assert model(IDS, FEATURES, BOXES, paired=True).tasks.pairs.shape == (1, 2)
    for other, given in ((model, (IDS[:1], FEATURES[:1], BOXES[:1])), (tiny(tasks=False), (IDS, FEATURES, BOXES))):
        with pytest.raises(ValueError, match="paired must be False where the batch is odd or empty"):
            other(*given, paired=True)


def test_nothing_waits_for_a_device() -> None:
    """On a device that has no values, which the use of one would show."""
    config = tiny(task_tokens=20).config
    with torch.device("meta"):
        model = ViLBERT(config)
        ids, seen = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 4)
        out = model(
            ids, torch.rand(2, 4, 20), torch.rand(2, 4, 5), attention_mask=ids, visual_attention_mask=seen,
            task_ids=ids[:, 0], labels=ids, matched_label=ids[:, 0], region_label=ids[:, :3],
            region_target=torch.rand(2, 3, 11),
        )  # fmt: skip
        assert out.loss is not None and out.loss.is_meta


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"text_dropout": 0.5, "vision_dropout": 0.5}, "text"),
        ({"text_residual_dropout": 0.5}, "text"),
        ({"vision_residual_dropout": 0.5}, "vision"),
        ({"fusion_dropout": 0.5}, "matching_logits"),
    ],
)
def test_dropout(changes: dict[str, float], part: str) -> None:
    """Of probabilities, of branches' results, and of what joins both modalities; in training mode alone."""
    model = tiny(**changes)
    given = IDS, torch.rand(2, 4, 20), torch.rand(2, 4, 5)
    with torch.no_grad():
        expected = getattr(model(*given), part)
        assert torch.equal(getattr(model(*given), part), expected)
        model.train()
        first, second = (getattr(model(*given), part) for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    model, given = tiny(), (IDS, torch.rand(2, 4, 20), torch.rand(2, 4, 5))
    with torch.no_grad():
        expected = model(*given, labels=IDS)
        with torch.autocast("cpu", dtype):
            mixed = model(*given, labels=IDS)
        narrow = model.to(dtype)(*given, labels=IDS)
    assert narrow.text.dtype == dtype and narrow.loss.dtype == mixed.loss.dtype == torch.float32
    for out in (mixed, narrow):
        assert distance(out.loss, expected.loss) < 0.03 and distance(out.text.float(), expected.text) < 0.05
