"""BLIP's losses, the momentum model and its queues."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import blip_on_ranks
import pytest
import ranks
import torch
import torch.nn.functional as F
from checkpoints import distance
from torch import Generator, Tensor

from mmkernels.models import BLIP, BLIPPretraining
from mmkernels.models.blip_losses import MomentumFeatures, contrastive_loss
from mmkernels.objectives import matching_pairs

ONE_LAYER: dict[str, Any] = {"vision_layers": 1, "text_layers": 1}
EXACT = 1e-12


def drawn(n: int = 3, length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Returns texts, of which the second has padding, their mask, and images."""
    generator = Generator().manual_seed(n)
    ids = torch.randint(5, 128, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:] = mask[1, 4:] = 0
    return ids, mask, torch.rand(n, 3, 32, 32, generator=generator, dtype=torch.float64)


def naive_info_nce(image: Tensor, text: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    """Returns the cross-entropy of images ``[N, d]`` over texts ``[M, d]``; `positive`: bool ``[N, M]``."""
    target = positive.double() / positive.sum(1, keepdim=True)
    return -((scale * image @ text.T).log_softmax(1) * target).sum(1).mean()


def test_losses_and_their_gradients() -> None:
    """Of all parameters: each loss by its formula from what the heads return, pair by pair."""
    model = BLIP.from_size("tiny", dtype=torch.float64, label_smoothing=0.1, **ONE_LAYER)
    ids, mask, pixels = drawn()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    found = model.losses(ids, pixels, mask, labels=labels, generator=Generator().manual_seed(1))
    found.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    scale = model.logit_scale.exp()  # type: ignore[union-attr]
    own = torch.eye(3, dtype=torch.bool)
    contrastive = (naive_info_nce(image, text, scale, own) + naive_info_nce(text, image, scale, own)) / 2
    pairs = matching_pairs(image, text, scale, generator=Generator().manual_seed(1))
    logits = model.match(ids[pairs.texts], pixels[pairs.images], mask[pairs.texts])
    matching = F.cross_entropy(logits, pairs.labels)
    words = ids.clone()
    words[:, 0] = model.config.bos_token_id
    logits = model(words, pixels, attention_mask=mask).logits
    targets = labels[:, 1:].flatten()
    generation = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, label_smoothing=0.1)
    assert found.generation is not None
    for ours, theirs in zip(found, (contrastive, matching, generation), strict=True):
        assert ours is not None and distance(ours, theirs) < EXACT
    (contrastive + matching + generation).backward()
    largest = max(float(p.grad.norm()) for p in model.parameters())  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None and parameter.grad is not None, name
        assert float((gradient - parameter.grad).norm()) < 1e-12 * largest, name


@pytest.mark.parametrize("with_ids", [False, True])
def test_contrast_with_a_queue(with_ids: bool) -> None:
    """By the formula: pairs of the batch and of the queue that are about the same are positives."""
    generator = Generator().manual_seed(0)
    image, text, images, texts = (F.normalize(torch.randn(4, 8, generator=generator).double(), dim=1) for _ in range(4))
    more_images, more_texts = (F.normalize(torch.randn(5, 8, generator=generator).double(), dim=1) for _ in range(2))
    ids, more_ids = (torch.tensor([0, 1, 1, 2]), torch.tensor([7, 1, 2, 8, 9])) if with_ids else (None, None)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    momentum = MomentumFeatures(images, texts, more_images, more_texts, more_ids)
    loss = contrastive_loss(image, text, scale, ids=ids, momentum=momentum)
    positive = torch.eye(4, 9, dtype=torch.bool)
    if ids is not None and more_ids is not None:
        positive = ids[:, None] == torch.cat([ids, more_ids])
    expected = (
        naive_info_nce(image, torch.cat([texts, more_texts]), scale, positive)
        + naive_info_nce(text, torch.cat([images, more_images]), scale, positive)
    ) / 2
    assert distance(loss, expected) < EXACT
    assert distance(*torch.autograd.grad(loss, scale), *torch.autograd.grad(expected, scale)) < EXACT


def test_pretraining_step_by_step() -> None:
    """Against a momentum model and a queue by hand; what is saved goes on as if nothing had happened."""
    model = BLIP.from_size("tiny", dtype=torch.float64, **ONE_LAYER)
    pretraining = BLIPPretraining(model, queue_size=5, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = copy.deepcopy(model).requires_grad_(False)
    ids, mask, pixels = drawn()
    queue: list[tuple[Tensor, Tensor]] = []
    for step in range(2):
        losses = pretraining(ids, pixels, mask, generator=Generator().manual_seed(step))
        own = average.encode_image(pixels), average.encode_text(ids, mask)
        more = [torch.cat([batch[kind] for batch in queue] or [own[kind][:0]]) for kind in (0, 1)]
        expected = contrastive_loss(
            model.encode_image(pixels),
            model.encode_text(ids, mask),
            model.logit_scale.exp(),  # type: ignore[union-attr]
            momentum=MomentumFeatures(*own, *more),
        )
        assert distance(losses.contrastive, expected) < EXACT
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        pretraining.update()
        queue.append(own)
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.5)
    assert pretraining.texts.pushed == 6 and pretraining.texts.features.shape == (5, 24)
    assert all(p.grad is None and not p.requires_grad for p in pretraining.momentum.parameters())  # type: ignore[union-attr]

    other = BLIPPretraining(BLIP.from_size("tiny", dtype=torch.float64, seed=1, **ONE_LAYER), queue_size=5, decay=0.5)
    other.load_state_dict(pretraining.state_dict())
    pair = [m.eval()(ids, pixels, mask, generator=Generator().manual_seed(0)) for m in (pretraining, other)]
    assert all(torch.equal(*both) for both in zip(*pair, strict=True))
    other.update()
    assert other.texts.pushed == 6  # in evaluation mode nothing waits


def test_pretraining_is_pickled() -> None:
    pretraining = BLIPPretraining(BLIP.from_size("tiny", **ONE_LAYER), queue_size=5, decay=0.5)
    with torch.no_grad():
        pretraining.model.get_parameter("text.norm.weight").add_(1)
    whole = pickle.loads(pickle.dumps(pretraining))
    whole.update()
    assert torch.equal(whole.momentum.module.text.norm.weight, torch.full((48,), 1.5))


@pytest.mark.slow
def test_pretraining_on_ranks() -> None:
    """Under DDP, the queue filled by both ranks: losses, weights and queue are those of one process with all pairs."""
    for found in ranks.run(2, blip_on_ranks.as_one_process):
        assert max(found.values()) < 1e-12, found


def test_pretraining_without_a_queue_and_without_a_decoder() -> None:
    model = BLIP.from_size("tiny", generation=False, **ONE_LAYER)
    pretraining = BLIPPretraining(model, queue_size=None)
    ids, mask, pixels = drawn()
    losses = pretraining(ids, pixels.float(), mask, ids=torch.tensor([0, 0, 0]))
    pretraining.update()
    assert losses.generation is None and pretraining.momentum is None
    with torch.no_grad():  # none of the pairs has a negative
        own = F.cross_entropy(model.match(ids, pixels.float(), mask), torch.ones(3, dtype=torch.long))
    assert distance(losses.matching, own) < 1e-5
    assert losses.total == losses.contrastive + losses.matching


def test_bad_arguments() -> None:
    model = BLIP.from_size("tiny", **ONE_LAYER)
    ids, mask, pixels = drawn()
    with pytest.raises(ValueError, match="images must be as many as texts, 3, got 1"):
        model.losses(ids, pixels[:1], mask)
    with pytest.raises(ValueError, match=r"labels must be \[3, 6\] as input_ids, got shape \(3, 5\)"):
        model.losses(ids, pixels, mask, labels=ids[:, :5])
    with pytest.raises(ValueError, match="retrieval=True, got False: its checkpoint has no such head"):
        BLIP.from_size("tiny", retrieval=False).losses(ids, pixels)
    for given, match in (
        ({"queue_size": 0}, "size must be a positive integer, got 0"),
        ({"decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ({"decay": "x"}, "decay must be between 0 and 1, got"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a BLIP, got Linear"),
        ({"model": BLIP.from_size("tiny", dtype=torch.bfloat16)}, "float32 or float64 weights .*; got torch.bfloat16"),
        ({"model": BLIP.from_size("tiny", retrieval=False)}, "model must have been made with retrieval=True"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            BLIPPretraining(**{"model": model, "queue_size": 4} | given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids must be given where ids=True, got None"):
        BLIPPretraining(model, queue_size=4, ids=True)(ids, pixels)
    with pytest.raises(ValueError, match="ids must be None where ids=False, got a tensor"):
        BLIPPretraining(model, queue_size=4)(ids, pixels, ids=torch.arange(3))
