"""LXMERT against transformers' models."""

from __future__ import annotations

import copy as copies
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Saved, check_gradients, distance, their_gradients
from lxmert_checkpoints import inputs, labels
from torch import Tensor

import mmkernels
from mmkernels.models import LXMERT

EXACT, TOLERANCE, ROUNDED = 1e-12, 5e-6, 1e-6
ALL, SHARDS, ALONE, ANSWERS = "lxmert", "lxmert_shards", "lxmert_alone", "lxmert_answers"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., LXMERT]


def in_dtype(theirs: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Returns a copy of transformers' model in another dtype, and inputs."""
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs(theirs).items()}
    return copies.deepcopy(theirs).to(dtype), given


@pytest.mark.parametrize(
    ("variant", "dtype"), [(ALL, torch.float64), (SHARDS, torch.float64), (ALL, torch.float32)], ids=str
)
def test_pretraining(ours: Ours, saved: Checkpoints, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits of all heads, the sum of the losses, and the gradient of every parameter, of inputs with padding."""
    theirs, given = in_dtype(saved(variant).theirs, dtype)
    model = ours(variant, dtype)
    model.zero_grad()
    wanted = labels(given, tuple(model.config.region_heads))
    if variant == SHARDS:
        assert wanted["obj_labels"].keys() == {"obj", "feat"}
        del wanted["ans"]
    out, expected = model(**given, **wanted, return_logits=True), theirs(**given, **wanted)
    tolerance = EXACT if dtype == torch.float64 else TOLERANCE
    assert distance(out.word_logits, expected.prediction_logits) < tolerance
    assert distance(out.matching_logits, expected.cross_relationship_score) < tolerance
    if variant == ALL:
        assert distance(out.answer_logits, expected.question_answering_score) < tolerance
    assert out.loss.dtype == dtype
    assert distance(out.loss, expected.loss) < ROUNDED  # transformers sums in float32
    out.loss.backward()
    expected.loss.backward()
    gradients = their_gradients(Saved(variant, saved(variant).folder, theirs), tmp_path / "gradients", dtype)
    check_gradients(model, gradients, 5e-12 if dtype == torch.float64 else 3e-5)


def test_each_loss(ours: Ours, saved: Checkpoints) -> None:
    """Those of labels that are given alone; and what is predicted of regions, which transformers does not return."""
    theirs, given = in_dtype(saved(ALL).theirs, torch.float64)
    model, wanted = ours(ALL, torch.float64), labels(given)
    with torch.no_grad():
        out = model(**given, **wanted)
        assert out.word_logits is None and model(**given).losses is None and model(**given).loss is None
        parts = {"labels": "words", "matched_label": "matching", "ans": "answers"}
        for name, part in parts.items():
            expected = theirs(**given, **{name: wanted[name]}).loss
            alone = model(**given, **{name: wanted[name]})
            assert distance(alone.loss, expected) < ROUNDED and torch.equal(alone.loss, getattr(out.losses, part))
        expected = theirs(**given, obj_labels=wanted["obj_labels"]).loss
        assert distance(sum(out.losses.regions.values()), expected) < ROUNDED
        regions = theirs.obj_predict_head(theirs.lxmert(**given).vision_output)
        for name, logits in model.predict_regions(out.vision).items():
            assert distance(logits, regions[name]) < EXACT


def test_answers(ours: Ours, saved: Checkpoints, tmp_path: Path) -> None:
    """The class that has no other head: transformers calls the answers labels."""
    theirs, given = in_dtype(saved(ANSWERS).theirs, torch.float64)
    model, answers = ours(ANSWERS, torch.float64), torch.tensor([3, 12])
    model.zero_grad()
    out, expected = model(**given, ans=answers), theirs(**given, labels=answers, output_hidden_states=True)
    assert distance(out.answer_logits, expected.question_answering_score) < EXACT
    assert distance(out.loss, expected.loss) < ROUNDED
    assert out.word_logits is None and out.matching_logits is None
    # The regions' last layer takes no part in the answers; without its features some parameters had no gradient.
    (out.loss + out.vision.square().mean()).backward()
    (expected.loss + expected.vision_hidden_states[-1].square().mean()).backward()
    gradients = their_gradients(Saved(ANSWERS, saved(ANSWERS).folder, theirs), tmp_path / "gradients", torch.float64)
    check_gradients(model, gradients, 5e-12)


@pytest.mark.parametrize("masked", [True, False])
def test_features(ours: Ours, saved: Checkpoints, masked: bool) -> None:
    """Those of each layer, with and without masks and token types, by every backend that runs here."""
    theirs, given = in_dtype(saved(ALONE).theirs, torch.float32)
    if not masked:
        given = {name: x for name, x in given.items() if "mask" not in name and "type" not in name}
    model = ours(ALONE)
    with torch.no_grad():
        expected = theirs(**given, output_hidden_states=True)
        for backend in ("cpu", "chunked", "reference"):
            with mmkernels.use_backend(backend):
                out = model(**given)
            pairs = [(out.text, expected.language_output), (out.vision, expected.vision_output)]
            pairs += [(out.pooled, expected.pooled_output)]
            pairs += zip(out.text_states, expected.language_hidden_states, strict=True)
            pairs += zip(out.vision_states, expected.vision_hidden_states, strict=True)
            assert max(distance(x, y) for x, y in pairs) < TOLERANCE
    assert out.word_logits is out.matching_logits is out.answer_logits is None


def test_text_and_regions_matter(ours: Ours, saved: Checkpoints) -> None:
    """If one of them changed little, parity would prove little."""
    given, model = inputs(saved(ALL).theirs), ours(ALL)
    with torch.no_grad():
        out = model(**given)
        for name in ("input_ids", "visual_feats", "visual_pos"):
            other = model(**given | {name: given[name].flip(1)})
            assert distance(other.text, out.text) > 0.05, name
            assert distance(other.answer_logits, out.answer_logits) > 0.05, name
        for name, x in (("visual_feats", out.text), ("input_ids", out.vision)):  # from one modality to the other
            other = model(**given | {name: given[name].flip(1)})
            assert distance(other.text if x is out.text else other.vision, x) > 0.05, name


def test_one_call_for_both_directions(ours: Ours, saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cross-modality layer makes three calls: of both directions, and of each modality's self-attention."""
    import mmkernels.nn.self_attention as module

    calls: list[Tensor] = []
    original = module.cross_attention
    monkeypatch.setattr(module, "cross_attention", lambda q, *x, **y: calls.append(q) or original(q, *x, **y))
    model, given = ours(ALL), inputs(saved(ALL).theirs)
    with torch.no_grad():
        model(**given)
    c = model.config
    assert len(calls) == c.text_layers + c.vision_layers + 3 * c.cross_layers
    assert {q.shape[2] for q in calls} == {8, 5, 13}


@pytest.mark.parametrize("hidden", ["attention_mask", "visual_attention_mask"])
def test_a_side_that_is_hidden(ours: Ours, saved: Checkpoints, hidden: str) -> None:
    """Of a text or an image that is padding altogether nothing reaches the other side, whatever it holds."""
    given, model = inputs(saved(ALL).theirs), ours(ALL)
    given[hidden] = torch.stack([torch.zeros_like(given[hidden][0]), given[hidden][1]])
    changed = "input_ids" if hidden == "attention_mask" else "visual_feats"
    other = given | {changed: given[changed].clone()}
    other[changed][0] = 5 if changed == "input_ids" else float("nan")
    with torch.no_grad():
        out, again = model(**given), model(**other)
    seen = "vision" if hidden == "attention_mask" else "text"
    assert torch.isfinite(getattr(out, seen)).all()
    assert torch.equal(getattr(out, seen), getattr(again, seen))


def test_no_regions(ours: Ours, saved: Checkpoints) -> None:
    """The text gets what it gets where all regions are hidden. (transformers' class fails.)"""
    theirs, model = saved(ALL).theirs, ours(ALL)
    given = inputs(theirs)
    given["visual_attention_mask"] = torch.zeros_like(given["visual_attention_mask"])
    none = given | {name: given[name][:, :0] for name in ("visual_feats", "visual_pos", "visual_attention_mask")}
    with torch.no_grad():
        out, expected = model(**none), model(**given)
    assert distance(out.text, expected.text) < TOLERANCE and distance(out.pooled, expected.pooled) < TOLERANCE
    assert out.vision.shape == (2, 0, 48)
    wanted = {name: (x[:, :0], weight[:, :0]) for name, (x, weight) in labels(given)["obj_labels"].items()}
    losses = model(**none, obj_labels=wanted).losses
    assert losses is not None and losses.regions is not None and not any(losses.regions.values())


def test_the_tied_head(ours: Ours) -> None:
    for variant, tied in ((ALL, True), (SHARDS, False)):
        model = ours(variant)
        assert model.head is not None and (model.head.last.weight is model.text.embed.weight) == tied
