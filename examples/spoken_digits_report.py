"""What `spoken_digits.py` measures: retrieval, names without training, voices, noises, and the head that compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from clip_digits import Recall, percent, recall
from spoken_digits_data import LEVELS, NEW_NOISE, NOISES, Sounds, Voice, hear, noisy
from spoken_digits_model import Encoded, SpokenDigits
from torch import Tensor

from mmkernels.evaluation import BinaryScores, Corruption, Robustness, binary_scores, measure_robustness

RERANKED = 10  # images of a sound that the head puts in a new order
COMPARED = 4096  # pairs that the head compares at once


class Held(NamedTuple):
    """Sounds and images that were not in training.

    Attributes:
        sounds: without noise, ten of each voice.
        voices: who speaks: sound `i` is of voice ``i % len(voices)``.
        pixels, digits: [M, 8, 8] from 0 to 1, and int64 [M].
    """

    sounds: Sounds
    voices: list[Voice]
    pixels: Tensor
    digits: Tensor


class Findings(NamedTuple):
    """The report.

    Attributes:
        sounds, images: what the model makes of the held-out ones.
        sound_names, image_names: int64 [N] and [M], the digits that it takes them for.
        by_one_voice: the share of images that the ten words of one voice name rightly; the mean over voices.
        by_voice: the share of sounds that are named rightly, of each accent, speaker and speed.
        noise: accuracy of names and recall@1 of sounds with each kind of noise.
        to_image, to_sound: recall of images by sounds, and of sounds by images.
        match, hard_match: decisions of the head on right and wrong pairs, the wrong ones random, or the most similar.
        reranked: recall@1 of images by sounds, where the head orders the first `RERANKED`.
    """

    sounds: Encoded
    images: Encoded
    sound_names: Tensor
    image_names: Tensor
    by_one_voice: float
    by_voice: dict[str, dict[str, float]]
    noise: Robustness
    to_image: Recall
    to_sound: Recall
    match: BinaryScores
    hard_match: BinaryScores
    reranked: float


@torch.no_grad()
def investigate(model: SpokenDigits, held: Held) -> Findings:
    """Measures a model on sounds and images that were not in training."""
    heard, said = model.encode_sound(hear(held.sounds)), held.sounds.digits
    seen = model.encode_image(held.pixels)
    classes = means(seen.features, held.digits)
    sound_names = named(heard.features, classes)
    voices = [
        right(named(seen.features, words), held.digits) for words in heard.features.unflatten(0, (10, -1)).unbind(1)
    ]
    match, hard_match = decisions(model, heard, said, seen, held.digits)
    return Findings(
        sounds=heard,
        images=seen,
        sound_names=sound_names,
        image_names=named(seen.features, means(heard.features, said)),
        by_one_voice=sum(voices) / len(voices),
        by_voice=shares(sound_names == said, held.voices),
        noise=with_noise(model, held, seen, classes),
        to_image=recall(heard.features, said, seen.features, held.digits),
        to_sound=recall(seen.features, held.digits, heard.features, said),
        match=match,
        hard_match=hard_match,
        reranked=reranked(model, heard, said, seen, held.digits),
    )


def means(features: Tensor, digits: Tensor) -> Tensor:
    """Returns the direction of the mean feature of each digit, [10, WIDTH], of features [N, WIDTH]."""
    total = features.new_zeros(10, features.shape[1]).index_add(0, digits, features)
    return F.normalize(total, dim=-1)


def named(features: Tensor, classes: Tensor) -> Tensor:
    """Returns which class [10, WIDTH] each feature [N, WIDTH] is nearest to, int64 [N]."""
    return (features @ classes.mT).argmax(1)


def right(found: Tensor, truth: Tensor) -> float:
    return (found == truth).double().mean().item()


def shares(correct: Tensor, voices: Sequence[Voice]) -> dict[str, dict[str, float]]:
    """Returns the share of correct ones, bool [10 * voices], by each property of a voice."""
    of_voice = correct.unflatten(0, (10, -1)).double().mean(0)
    found: dict[str, dict[str, float]] = {}
    for place, field in enumerate(Voice._fields):
        values = [voice[place] for voice in voices]
        found[field] = {
            str(value): of_voice[torch.tensor([x == value for x in values])].mean().item()
            for value in dict.fromkeys(values)
        }
    return found


def with_noise(model: SpokenDigits, held: Held, seen: Encoded, classes: Tensor) -> Robustness:
    """Returns what noise costs: of each kind at each of `LEVELS`, the same noise in every run."""

    def evaluate(samples: Tensor, corruption: Corruption | None) -> dict[str, float]:
        features = model.encode_sound(hear(held.sounds._replace(samples=samples))).features
        first = held.digits[(features @ seen.features.mT).argmax(1)]
        said = held.sounds.digits
        return {"accuracy": right(named(features, classes), said), "recall@1": right(first, said)}

    def worse(samples: Tensor, level: float, kind: str) -> Tensor:
        return with_kind(held.sounds._replace(samples=samples), kind, level).samples

    corruptions = [
        Corruption(kind, severity, level, partial(worse, kind=kind))
        for kind in (*NOISES, NEW_NOISE)
        for severity, level in enumerate(LEVELS, 1)
    ]
    return measure_robustness(evaluate, held.sounds.samples, corruptions)


def with_kind(sounds: Sounds, kind: str, level: float) -> Sounds:
    """Returns sounds with noise; babble is of the same sounds' voices."""
    return noisy(sounds, kind, level, torch.Generator().manual_seed(1), sounds.samples)


# The head.


def compared(model: SpokenDigits, sounds: Encoded, images: Encoded, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the head's logits of pairs, float32 [P]: of sounds `rows` and images `columns`, int64 [P] each."""
    parts = zip(rows.split(COMPARED), columns.split(COMPARED))
    return torch.cat([model.match(sounds.part(row), images.part(column)) for row, column in parts])


def decisions(
    model: SpokenDigits, sounds: Encoded, said: Tensor, images: Encoded, shown: Tensor
) -> tuple[BinaryScores, BinaryScores]:
    """Returns how well the head tells a right image of each sound from a wrong one: a random and the most similar."""
    same = said[:, None] == shown
    order = torch.rand(same.shape, generator=torch.Generator().manual_seed(1))
    similar = sounds.features @ images.features.mT
    rows = torch.arange(len(said))
    found = []
    for score in (order, similar):
        columns = torch.cat([order.masked_fill(~same, -2.0).argmax(1), score.masked_fill(same, -2.0).argmax(1)])
        logits = compared(model, sounds, images, rows.repeat(2), columns)
        found.append(binary_scores(logits > 0, torch.arange(2 * len(said)) < len(said)))
    return found[0], found[1]


def reranked(model: SpokenDigits, sounds: Encoded, said: Tensor, images: Encoded, shown: Tensor) -> float:
    """Returns recall@1 of images by sounds, where the head orders the images that are most similar to each."""
    first = (sounds.features @ images.features.mT).topk(min(RERANKED, len(shown))).indices  # [N, RERANKED]
    rows = torch.arange(len(said)).repeat_interleave(first.shape[1])
    logits = compared(model, sounds, images, rows, first.flatten()).view(first.shape)
    return right(shown[first.gather(1, logits.argmax(1, keepdim=True))[:, 0]], said)


# What is printed and written.


def lines(found: Findings, held: Held) -> list[str]:
    """Returns the report as lines of text."""
    sounds, images = len(held.sounds.digits), len(held.digits)
    text = [
        "names without training, each digit's class being the mean feature of what was held out on the other side:",
        f"  sounds by images {percent(right(found.sound_names, held.sounds.digits))}, "
        f"images by sounds {percent(right(found.image_names, held.digits))}, "
        f"by the ten words of one voice {percent(found.by_one_voice)}",
        f"retrieval, {sounds} sounds and {images} images; right: the same digit",
        "                  some right one among            each right one with fewer",
        "                  the first k (by chance)         than k wrong ones before it",
        "  recall@k        k = 1           k = 5           k = 1      k = 5",
    ]
    for name, result in (("sound to image", found.to_image), ("image to sound", found.to_sound)):
        some = [f"{percent(share)} ({100 * chance:.0f} %)" for share, chance in zip(result.any_right, result.chance)]
        text.append(f"  {name}  {'  '.join(some)}  {'   '.join(percent(share) for share in result.each_right)}")
    text.append(f"  sound to image, the first {RERANKED} ordered by the head: k = 1 {percent(found.reranked)}")
    for field, values in found.by_voice.items():
        unit = " words a minute" if field == "speed" else ""
        text.append(f"sounds by {field}: " + ", ".join(f"{x}{unit} {percent(y).strip()}" for x, y in values.items()))
    text.append(f"sounds without noise {percent(found.noise.clean['accuracy'])}, and with, by decibels above it:")
    text.append("  noise    " + "  ".join(f"{level} dB".rjust(7) for level in LEVELS))
    for kind, levels in found.noise.corrupted.items():
        text.append(f"  {kind:7}  " + "  ".join(percent(x["accuracy"]) for x in levels.values()))
    for name, scores in (("random", found.match), ("most similar", found.hard_match)):
        text.append(
            f"the head on right and {name} wrong pairs: {percent(scores.accuracy).strip()} right, "
            f"precision {percent(scores.precision).strip()}, recall {percent(scores.recall).strip()}"
        )
    return text


def numbers(found: Findings, held: Held) -> dict[str, Any]:
    """Returns the report as what JSON can hold; a share of nothing is None."""
    values = {
        "sounds named by images": right(found.sound_names, held.sounds.digits),
        "images named by sounds": right(found.image_names, held.digits),
        "images named by one voice": found.by_one_voice,
        "sound to image": found.to_image._asdict(),
        "image to sound": found.to_sound._asdict(),
        "reranked": found.reranked,
        "by voice": found.by_voice,
        "noise": found.noise._asdict(),
        "match": found.match._asdict(),
        "hard match": found.hard_match._asdict(),
    }
    plain: dict[str, Any] = _finite(values)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
