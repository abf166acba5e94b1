"""What stated corruptions of the images cost in any metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mmkernels.evaluation.checks import listed
from mmkernels.evaluation.corruptions import Corruption, Images, standard_corruptions


class Robustness(NamedTuple):
    """Metrics of clean and of corrupted images.

    Attributes:
        clean: metric -> value, of the images as they are.
        corrupted: corruption -> severity -> metric -> value.
        drop: corruption -> metric -> the mean over severities of (clean - corrupted) / clean. 0: nothing is lost; 1:
            everything; NaN where the clean value is 0. Of a metric where less is better a loss is negative.
        mean_drop: metric -> the mean of `drop` over corruptions.
    """

    clean: dict[str, float]
    corrupted: dict[str, dict[int, dict[str, float]]]
    drop: dict[str, dict[str, float]]
    mean_drop: dict[str, float]


def measure_robustness(
    evaluate: Callable[[Any, Corruption | None], Mapping[str, float]],
    images: Images,
    of: Iterable[Corruption] | None = None,
) -> Robustness:
    """Returns metrics of clean images and of the same images corrupted, and the mean relative drop.

    Args:
        evaluate: ``(images, corruption) -> {metric: value}``; called with None for the images as they are, then with
            each corruption, whose `Corruption.boxes` moves boxes of the truth along.
        images: what the corruptions take: see `blur`.
        of: the corruptions; None: `standard_corruptions`, blur, crop and JPEG at five severities each.

    Raises:
        TypeError: a wrong type, or `evaluate` returns no mapping of numbers. ValueError: no corruption, the same one
            twice, or `evaluate` returns other metrics than before.

    Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    2019; 1 - `mean_drop` is the relative performance under corruption of Michaelis et al., "Benchmarking
    Robustness in Object Detection", 2019, where the mean over corruptions comes before the quotient, which is the same.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import measure_robustness, standard_corruptions
        >>> images = torch.rand(4, 1, 16, 16)
        >>> def contrast(images, corruption):
        ...     return {"contrast": images.std().item()}
        >>> found = measure_robustness(contrast, images, standard_corruptions(["blur"], [1, 5]))
        >>> found.clean["contrast"] > found.corrupted["blur"][5]["contrast"], 0 < found.mean_drop["contrast"] < 1
        (True, True)
    """
    chosen = standard_corruptions() if of is None else listed("of", of, "Corruptions")
    _check_corruptions(chosen)
    clean = _metrics(evaluate(images, None))
    corrupted: dict[str, dict[int, dict[str, float]]] = {}
    for corruption in chosen:
        found = _metrics(evaluate(corruption(images), corruption))
        if found.keys() != clean.keys():
            raise ValueError(f"evaluate must return the metrics {sorted(clean)} each time, got {sorted(found)}")
        corrupted.setdefault(corruption.name, {})[corruption.severity] = found
    drop = {
        name: {metric: _drop(value, [found[metric] for found in levels.values()]) for metric, value in clean.items()}
        for name, levels in corrupted.items()
    }
    mean = {metric: math.fsum(found[metric] for found in drop.values()) / len(drop) for metric in clean}
    return Robustness(clean, corrupted, drop, mean)


def _check_corruptions(chosen: list[Corruption]) -> None:
    seen = set()
    for place, corruption in enumerate(chosen):
        if not isinstance(corruption, Corruption):
            raise TypeError(f"of must be Corruptions, got {type(corruption).__name__} at {place}")
        if (corruption.name, corruption.severity) in seen:
            raise ValueError(f"of must differ in name or severity, got {corruption.name} {corruption.severity} twice")
        seen.add((corruption.name, corruption.severity))


def _metrics(found: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise TypeError(f"evaluate must return a mapping of metrics, got {type(found).__name__}")
    try:
        return {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate must return numbers, got {dict(found)!r:.200}") from error


def _drop(clean: float, values: list[float]) -> float:
    return math.nan if clean == 0 else math.fsum((clean - value) / clean for value in values) / len(values)
