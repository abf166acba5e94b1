"""BLIP-2's first stage: against transformers' model for retrieval, and its three losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from blip2_checkpoints import QUERIES, image_processor, photos, tokenizer
from blip2_retrieval_checkpoints import MARKER, inputs
from checkpoints import Saved, distance, their_gradients
from torch import Generator, Tensor

from mmkernels.models import BLIP2Retrieval
from mmkernels.models.blip_losses import BLIPLosses
from mmkernels.objectives import matching_pairs
from mmkernels.testing.models import randomise

EXACT = 1e-12
PLAIN, MARKED = "blip2_itm", "blip2_itm_marked"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., BLIP2Retrieval]


def doubled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return given | {"pixel_values": given["pixel_values"].double()}


@pytest.mark.parametrize("variant", [pytest.param(PLAIN, marks=pytest.mark.slow), MARKED])
def test_features_and_matching(ours: Ours, saved: Checkpoints, variant: str) -> None:
    """With the markers of newer processors and without; in float64."""
    given, model = doubled(inputs(variant)), ours(variant, torch.float64)
    ids, mask, images = given["input_ids"], given["attention_mask"], given["pixel_values"]
    reference = copy.deepcopy(saved(variant).theirs).double()
    with torch.no_grad():
        compared = reference(**given)
        matched = reference(**given, use_image_text_matching_head=True).logits_per_image
        image, text = model.encode_image(images), model.encode_text(ids, mask)
        assert distance(image, compared.image_embeds) < EXACT and distance(text, compared.text_embeds) < EXACT
        assert distance((image @ text.T).amax(1), compared.logits_per_image) < EXACT
        logits = model.match(ids, images, mask)
        assert distance(logits, matched) < EXACT
        assert distance(model.match(ids, images.flip(0), mask), logits) > 0.05
        assert distance(model.match(ids, images[:1], mask)[0], logits[0]) < EXACT  # one image, three texts


def test_the_processor_makes_the_inputs(ours: Ours, saved: Checkpoints) -> None:
    """Which writes markers before a text, and pads it on the right."""
    processor = transformers.Blip2Processor(image_processor(), tokenizer("<s>", MARKER, "right"), QUERIES)
    given = dict(processor(photos(2), ["w5 w6 w7", "w8"], return_tensors="pt", padding=True))
    assert given["input_ids"][1].tolist() == [MARKER] * QUERIES + [1, 8, 0, 0]
    with torch.no_grad():
        matched = saved(MARKED).theirs(**given, use_image_text_matching_head=True).logits_per_image
        assert distance(ours(MARKED).match(**given), matched) < 5e-6


def with_heads(model: BLIP2Retrieval, label_smoothing: float = 0.0) -> BLIP2Retrieval:
    """Returns a copy with a head for generation, of which nothing is frozen."""
    more = {"generation": True, "bos_token_id": 2, "freeze_vision": False, "label_smoothing": label_smoothing}
    config = replace(model.config, **more)
    whole = randomise(BLIP2Retrieval(config).to(model.logit_scale.dtype))
    whole.load_state_dict(model.state_dict(), strict=False)
    return whole.eval()


def test_losses_and_gradients(ours: Ours, saved: Checkpoints, tmp_path: Path) -> None:
    """In float64, of every parameter; generation by transformers' Q-Former with a dense mask."""
    model, given = with_heads(ours(PLAIN, torch.float64), label_smoothing=0.1), doubled(inputs(PLAIN))
    drawn = torch.Generator().manual_seed(0)
    losses = model(**given, generator=drawn)
    sum(losses).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    reference = copy.deepcopy(saved(PLAIN).theirs).double()
    expected = expected_losses(model, reference, given, drawn.manual_seed(0))
    for name, loss in expected._asdict().items():
        assert distance(getattr(losses, name), loss) < EXACT, name
    sum(expected).backward()
    theirs = their_gradients(Saved(PLAIN, saved(PLAIN).folder, reference), tmp_path / "gradients", torch.float64)
    # What transformers' model lacks took part in both.
    lacks = {name: model.get_parameter(name).grad - x for name, x in gradients.items() if name not in theirs}
    assert len(lacks) == 5 and all(name.startswith("head.") for name in lacks)
    del gradients["logit_scale"]  # transformers has none
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):  # all scores of a query shift alike
            assert float(gradient.norm()) < EXACT
        else:
            assert distance(gradient, lacks.get(name, theirs.get(name))) < EXACT, name


def expected_losses(model: BLIP2Retrieval, theirs: Any, given: dict[str, Tensor], drawn: Generator) -> BLIPLosses:
    """Returns the formulas over transformers' features."""
    ids, mask, images = given["input_ids"], given["attention_mask"], given["pixel_values"]
    scale, compared, own = model.logit_scale.detach().exp(), theirs(**given), torch.arange(3)
    scores = compared.logits_per_image * scale
    smoothed = partial(F.cross_entropy, label_smoothing=model.config.label_smoothing)
    contrastive = (smoothed(scores, own) + smoothed(scores.T, own)) / 2
    pairs = matching_pairs(compared.image_embeds.detach(), compared.text_embeds.detach(), scale, generator=drawn)
    assert pairs.labels.tolist() == [1] * 3 + [0] * 6
    chosen = {"pixel_values": images[pairs.images], "input_ids": ids[pairs.texts], "attention_mask": mask[pairs.texts]}
    matched = theirs(**chosen, use_image_text_matching_head=True).logits_per_image
    generation = smoothed(*written(model, theirs, given))
    return BLIPLosses(contrastive, F.cross_entropy(matched, pairs.labels), generation)


def written(model: BLIP2Retrieval, theirs: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns logits and targets of the texts' tokens but the first, by transformers' Q-Former."""
    ids, mask = given["input_ids"], given["attention_mask"]
    begun = torch.cat([torch.full_like(ids[:, :1], 2), ids[:, 1:]], dim=1)
    count, length = ids.shape
    sees = torch.zeros(QUERIES + length, QUERIES + length, dtype=torch.bool)
    sees[:QUERIES, :QUERIES] = True
    sees[QUERIES:] = torch.ones(length, QUERIES + length, dtype=torch.bool).tril(QUERIES)
    visible = sees & torch.cat([torch.ones(count, QUERIES, dtype=torch.bool), mask.bool()], 1)[:, None]
    queries = theirs.query_tokens.expand(count, -1, -1)
    hidden = theirs.qformer(
        query_embeds=theirs.embeddings(input_ids=begun, query_embeds=queries),
        query_length=QUERIES,
        attention_mask=visible[:, None],
        encoder_hidden_states=theirs.vision_model(given["pixel_values"]).last_hidden_state,
    ).last_hidden_state[:, QUERIES:]
    logits = F.linear(model.head.transform(hidden), theirs.embeddings.word_embeddings.weight, model.head.last.bias)
    keep = mask[:, 1:].bool()
    return logits[:, :-1][keep], ids[:, 1:][keep]


@pytest.mark.slow
def test_losses_of_cached_features_and_without_generation(ours: Ours) -> None:
    """Without that head the queries alone are the same; features that were encoded before serve as pixels do."""
    model, given = ours(MARKED), inputs(MARKED)
    drawn = torch.Generator()
    with torch.no_grad():
        losses = model.losses(**given, generator=drawn.manual_seed(0))
        features = model.encode_vision(given.pop("pixel_values"))
        again = model(**given, image_features=features, generator=drawn.manual_seed(0))
    assert losses == again and losses.generation is None
    plain = {name: x[:, QUERIES:] for name, x in given.items()}
    whole = with_heads(ours(PLAIN))
    whole.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        generated = whole(**plain, image_features=features, generator=drawn.manual_seed(0))
    torch.testing.assert_close(generated[:2], losses[:2])


def test_ranks_compare_their_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `info_nce`, whose own tests show that it does."""
    model, group, got = BLIP2Retrieval.from_size("tiny", vision_layers=1, qformer_layers=1), object(), []

    def loss(image: Tensor, *_: Any, group: Any, **__: Any) -> Tensor:
        got.append(group)
        return image.sum()

    monkeypatch.setattr("mmkernels.models.blip2_retrieval.info_nce", loss)
    model(torch.ones(2, 3).long(), torch.ones(2, 3, 32, 32), group=group)
    assert got == [group]


def test_the_multiplier_of_a_model_in_16_bits() -> None:
    """It is not rounded to bfloat16, in which 14.24 is 14.25."""
    model = BLIP2Retrieval.from_size("tiny", vision_layers=1, qformer_layers=1, dtype=torch.bfloat16)
    assert torch.equal(model._scale(), model.logit_scale.float().exp())


def test_padding_on_the_left() -> None:
    """A text is the same on either side of its padding."""
    model = BLIP2Retrieval.from_size("tiny", vision_layers=1, qformer_layers=1, generation=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    right, mask = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    left, left_mask = right.clone(), mask.clone()
    left[1], left_mask[1] = right[1].roll(2), mask[1].roll(2)
    drawn = torch.Generator()
    with torch.no_grad():
        losses = [model(*x, generator=drawn.manual_seed(1)) for x in ((right, images, mask), (left, images, left_mask))]
    for one, other in zip(*losses, strict=True):
        assert distance(one, other) < 1e-5


def test_pairs_of_one_id_are_positives_and_no_negatives() -> None:
    """Each text of an image is a target of it as likely as the others."""
    model = BLIP2Retrieval.from_size("tiny", vision_layers=1, qformer_layers=1, generation=False)
    drawn = torch.Generator().manual_seed(0)
    images, texts = torch.rand(3, 3, 32, 32, generator=drawn), torch.randint(2, 96, (3, 5), generator=drawn)
    with torch.no_grad():
        losses = model(texts, images, ids=torch.tensor([4, 4, 4]))
        scores = model.logit_scale.exp() * (model.encode_image(images) @ model.encode_text(texts).T).amax(1)
        logits = model.match(texts, images)
    contrastive = -(scores.log_softmax(0) + scores.log_softmax(1)).mean() / 2
    assert distance(losses.contrastive, contrastive) < 1e-5
    assert distance(losses.matching, F.cross_entropy(logits, torch.ones(3, dtype=torch.long))) < 1e-5


@pytest.mark.parametrize(
    ("variant", "change", "match"),
    [
        (PLAIN, {"pixel_values": None}, "pixel_values or image_features must be given, got neither"),
        (PLAIN, {"image_features": torch.rand(3, 5, 32)}, "pixel_values must be None with image_features, got both"),
        (PLAIN, {"pixel_values": torch.rand(2, 3, 16, 16)}, "input_ids must be one text for each of 2 images, got 3"),
        (PLAIN, {"pixel_values": torch.rand(3, 3, 16, 8)}, r"pixel_values must be \[B, 3, 16, 16\], got shape"),
        (PLAIN, {"input_ids": torch.ones(3, 17).long(), "attention_mask": None}, "L from 1 to 16, got shape"),
        (PLAIN, {"input_ids": torch.ones(3, 0).long(), "attention_mask": None}, "L from 1 to 16, got shape"),
        (PLAIN, {"input_ids": torch.full((3, 6), 96)}, "input_ids must be .*96"),
        (PLAIN, {"input_ids": torch.ones(3, 6)}, "input_ids must be an int32 or int64 tensor, got torch.float32"),
        (PLAIN, {"attention_mask": torch.ones(3, 5)}, "attention_mask must be a bool or integer tensor, got"),
        (PLAIN, {"attention_mask": torch.ones(3, 5).bool()}, r"attention_mask must be \[3, 6\] as input_ids"),
        (MARKED, {"attention_mask": torch.ones(3, 6).bool()}, r"attention_mask must be \[3, 10\] as input_ids"),
        (MARKED, {"input_ids": torch.ones(3, 10).long()}, "must begin with 4 tokens 99 .marker_token_id., got others"),
        (MARKED, {"input_ids": torch.full((3, 4), MARKER), "attention_mask": None}, r"got shape \(3, 4\)"),
    ],
)  # fmt: skip
def test_bad_inputs(ours: Ours, variant: str, change: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        ours(variant)(**(inputs(variant) | change))


def test_one_image_serves_all_texts_or_each_has_its_own(ours: Ours) -> None:
    given = inputs(PLAIN)
    with pytest.raises(ValueError, match="input_ids must be 2 texts, one for each image, got 3"):
        ours(PLAIN).match(given["input_ids"], given["pixel_values"][:2])
