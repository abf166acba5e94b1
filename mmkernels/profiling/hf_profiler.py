"""Profiles a model of transformers over sizes of a photograph, before and after `mmkernels.patch`."""

from __future__ import annotations

import copy
import shlex
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkernels.meters import peak_memory, time_alternating
from mmkernels.options import BadInput
from mmkernels.profiling.hf_inputs import NEW_TOKENS, Prepared, Rows, prepare, to_device
from mmkernels.profiling.hf_model import Source, load_model, open_source, quiet
from mmkernels.profiling.hf_options import HFOptions
from mmkernels.profiling.hf_parts import DECODE, Division, Parts, Watch, answer, divide, find_parts, watching
from mmkernels.profiling.options import ORIGINAL, PATCHED, Side, name_of
from mmkernels.profiling.point import Cell, fits, not_measured
from mmkernels.profiling.profiler import common, marginal
from mmkernels.transformers_version import VersionError

_BUDGET = 2.0  # seconds of counted rounds for one row, both candidates together
_LEAST_ROUNDS = 5
_LIMIT = 30.0  # seconds after which one round is enough, on a slow or busy machine
_STEPS = 5  # of progress, by row


class HFProfile:
    """A profile: what is known of the model before its weights are loaded.

    Args:
        options: what to run.
        photo: the photograph, RGB.

    Raises:
        BadInput: the model can't be loaded, or its processor makes no prompt of the photograph and the question.
    """

    def __init__(self, options: HFOptions, photo: Image.Image) -> None:
        self.options = options
        self.source: Source = open_source(options)
        self.rows: Rows = prepare(options, self.source, photo)
        if options.train and not _takes_labels(self.source.model_class):
            raise BadInput(f"--train must be for a model whose forward takes labels, got {self.source.model_class}")

    def steps(self) -> int:
        """Returns how often `reports` reports progress."""
        return 1 + len(self.rows.prepared) * (_STEPS + 2 * self.options.train)

    def reports(self, progress: Callable[[str], None] = lambda what: None) -> Iterator[dict[str, Any]]:
        """Measures, and yields after each row what is known by then: a dictionary that is ready for JSON.

        Args:
            progress: called with the name of each step before it begins.
        """
        progress("weights")
        model, notes = load_model(self.options, self.source)
        measured = _Model(self.options, self.source, model)
        cells: list[Cell] = []
        with quiet():
            for row in self.rows.prepared:
                cells += measured.measure(row, progress)
                yield self._report(measured, cells, [*self.rows.notes, *notes])

    def _report(self, measured: _Model, cells: list[Cell], notes: list[str]) -> dict[str, Any]:
        options = self.options
        assert measured.division is not None
        found = common(options, measured.division, command(options), cells)
        tokens = sorted({cell["tokens_per_image"] for cell in cells})
        changed = {
            "image": options.image.name,
            "folder": options.name,
            "images": 1,
            "tokens": tokens,
            "prompt": options.question,
            "class": self.source.model_class.__name__,
            "backends": list(measured.models),
        }
        return found | {
            "settings": found["settings"] | changed,
            "rows": [str(Side(row.side)) for row in self.rows.prepared],
            "square": False,
            "reducers": {},
            "pareto": [],
            "parts": measured.division.parts,
            "not_found": list(measured.division.not_found),
            "about_tokens": measured.about_tokens,
            "about_sides": self.rows.how,
            "replaced": measured.replaced,
            "left": measured.left,
            "patch_why_not": measured.why_not,
            "notes": notes,
            "marginal_seconds_per_visual_token": marginal(cells),
        }


class _Model:
    """A loaded model that is measured row by row, beside a patched copy that shares its weights.

    With two copies, nothing is patched between calls that are timed.
    """

    def __init__(self, options: HFOptions, source: Source, model: Any) -> None:
        self.options, self.source = options, source
        self.device = torch.device(options.device)
        self.models: dict[str, Any] = {ORIGINAL: model}
        self.division: Division | None = None
        self.about_tokens = ""
        self.replaced: list[dict[str, Any]] = []
        self.left: list[dict[str, Any]] = []
        self.why_not = ""
        self._add_patched()
        self.parts: dict[str, Parts] = {name: find_parts(each) for name, each in self.models.items()}
        self.more: dict[str, Any] = {"suppress_tokens": _markers(source)} if options.random else {}

    def measure(self, row: Prepared, progress: Callable[[str], None]) -> list[Cell]:
        """Returns the cells of a row, one before and one after the patch."""
        named = f"{row.side:,} px"
        inputs = to_device(row, self.models[ORIGINAL])
        cells = {name: _empty(row, name) for name in self.models}
        answers: dict[str, Any] = {}
        for name in cells:
            progress(f"{named}: warm-up, {name_of(name)}")
            answers[name] = self._warm_up(name, row, inputs, cells)
        able = [name for name, cell in cells.items() if cell["failed"] is None]
        if PATCHED in able and ORIGINAL in able:
            cells[PATCHED]["drift"] = drift(answers[ORIGINAL], answers[PATCHED])
        answers.clear()
        for name in cells:
            progress(f"{named}: peak memory, {name_of(name)}")
            if name in able:
                run = partial(self._answer, name, inputs)
                cells[name]["peak_memory_bytes"] = peak_memory(run, self.device)
        progress(f"{named}: time")
        self._time(able, inputs, cells)
        if self.options.train:
            self._train(named, able, inputs, cells, progress)
        for cell in cells.values():
            cell["amdahl"] = _gains(cells, cell)
        return list(cells.values())

    def _add_patched(self) -> None:
        """Makes the patched copy; none, where there is nothing to patch."""
        from mmkernels.integrations.patching import patch

        model = self.models[ORIGINAL]
        shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
        copied = copy.deepcopy(model, shared)
        try:
            report = patch(copied, verbose=False)
        except (ValueError, VersionError) as error:
            self.why_not = str(error)
            return
        self.models[PATCHED] = copied
        self.replaced = [asdict(row) for row in report.replaced]
        self.left = [asdict(row) for row in report.left]

    def _answer(self, name: str, inputs: dict[str, Any], *, naming: bool = False) -> tuple[Any, Watch]:
        model = self.models[name]
        with torch.inference_mode(), watching(model, self.parts[name], naming=naming) as clock:
            return answer(model, inputs, clock, self.more), clock.watch

    def _warm_up(self, name: str, row: Prepared, inputs: dict[str, Any], cells: dict[str, Cell]) -> Any:
        """Returns the first answer; that before the patch shows how the model's time is divided."""
        found: list[tuple[Any, Watch]] = []
        naming = name == ORIGINAL and self.division is None
        try:
            enough = fits(lambda: found.append(self._answer(name, inputs, naming=naming)))
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            if name == ORIGINAL:
                kind = self.source.model_class.__name__
                raise BadInput(f"--model: {kind} can't answer a photograph of {row.side} px: {line}") from error
            cells[name]["failed"] = f"{type(error).__name__}: {line}"
            return None
        if not enough:
            cells[name]["failed"] = "out of memory"
            return None
        out, watch = found[0]
        if name == ORIGINAL:
            self._count(row, watch, cells)
        return out

    def _count(self, row: Prepared, watch: Watch, cells: dict[str, Cell]) -> None:
        """Writes down how the time is divided, and how many tokens the photograph has."""
        if self.division is None:
            self.division = divide(self.parts[ORIGINAL], watch)
        tokens = row.markers
        self.about_tokens = "the tokens of the prompt that stand for the photograph"
        if tokens <= 1:
            self.about_tokens = (
                "the vectors that the vision tower makes, padding too; the prompt has no tokens for them"
            )
            tokens = watch.vectors or 0
        if not tokens:
            kind = self.source.model_class.__name__
            raise BadInput(
                f"--model must show how many tokens a photograph has: {kind} has no token for it in the prompt, and "
                "neither get_image_features nor get_encoder(modality='image') is called and returns vectors"
            )
        for cell in cells.values():
            cell["tokens_per_image"] = cell["visual_tokens"] = tokens

    def _time(self, names: list[str], inputs: dict[str, Any], cells: dict[str, Cell]) -> None:
        assert self.division is not None or not names
        watched: dict[str, list[dict[str, float]]] = {name: [] for name in names}

        def run(name: str) -> None:
            assert self.division is not None
            watched[name].append(self.division.seconds(self._answer(name, inputs)[1]))

        if names:
            self._alternate(names, run)
        for name, rounds in watched.items():
            cell = cells[name]
            for stage in rounds[0]:
                samples = [seconds[stage] for seconds in rounds]
                cell["samples_seconds"][stage], cell["seconds"][stage] = samples, statistics.median(samples)
            cell["seconds"]["total"] = sum(cell["seconds"][stage] for stage in rounds[0] if stage != DECODE)

    def _alternate(self, names: list[str], run: Callable[[str], None]) -> dict[str, Any]:
        return time_alternating(
            {name: partial(run, name) for name in names},
            budget=_BUDGET,
            least=_LEAST_ROUNDS,
            limit=_LIMIT,
            warm=True,
            device=self.device,
        )

    def _train(
        self,
        named: str,
        names: list[str],
        inputs: dict[str, Any],
        cells: dict[str, Cell],
        progress: Callable[[str], None],
    ) -> None:
        """Measures a step's peak memory and time, gradients included, without the optimiser's update."""
        labels = inputs["input_ids"].clone()
        for token in _markers(self.source):
            labels[labels == token] = -100

        def step(name: str) -> None:
            self.models[name](**inputs, labels=labels).loss.backward()
            self.models[name].zero_grad(set_to_none=True)

        progress(f"{named}: training step's peak memory")
        able = []
        for name in names:
            run = partial(step, name)
            if fits(run):
                able.append(name)
                cells[name]["train_peak_memory_bytes"] = peak_memory(run, self.device)
            self.models[name].zero_grad(set_to_none=True)
        progress(f"{named}: time of a training step")
        if able:
            for name, timing in self._alternate(able, step).items():
                cells[name]["seconds"]["train_step"] = timing.seconds
                cells[name]["samples_seconds"]["train_step"] = list(timing.samples)


def _empty(row: Prepared, name: str) -> Cell:
    return {
        "reducer": None,
        "resolution": row.side,
        "tokens_per_image": 0,
        "visual_tokens": 0,
        "text_tokens": row.text_tokens,
        **not_measured(name),
    }


def _gains(cells: dict[str, Cell], cell: Cell) -> dict[str, dict[str, float]]:
    """Returns how much faster than before the patch each stage is."""
    if cell["backend"] == ORIGINAL:
        return {}
    before = cells[ORIGINAL]["seconds"]
    return {
        name: {"speedup": before[name] / seconds}
        for name, seconds in cell["seconds"].items()
        if name in before and seconds > 0
    }


def drift(before: Any, after: Any) -> dict[str, float]:
    """Returns how far two answers are apart: of the scores of each token, up to the first that differs.

    Behind a token that differs the two have other prompts, so that their scores are not to be compared.

    Args:
        before, after: what ``generate`` returned, with its scores before any processing, ``logits``.

    Returns:
        ``max_abs``, the largest difference; ``relative_l2``, the distance as a share; ``same_tokens`` of ``tokens``,
        how many first tokens are the same; ``top1_agreement``, their share.
    """
    steps = min(len(before.logits), len(after.logits))
    old, new = (out.sequences[0, out.sequences.shape[1] - len(out.logits) :][:steps] for out in (before, after))
    same = int((old == new).long().cumprod(0).sum())
    compared = slice(0, min(same + 1, steps))
    first, second = (torch.cat(out.logits[compared]).double() for out in (before, after))
    return {
        "max_abs": float((first - second).abs().max()),
        "relative_l2": _share(first, second),
        "same_tokens": same,
        "tokens": steps,
        "top1_agreement": same / steps,
    }


def _share(first: Tensor, second: Tensor) -> float:
    return float(torch.linalg.vector_norm(first - second) / torch.linalg.vector_norm(first))


def _markers(source: Source) -> list[int]:
    """Returns the tokens that stand for media: random weights may like them, but they would need an image."""
    names = ("image_token_id", "video_token_id", "audio_token_id")
    found = [getattr(owner, name, None) for owner in (source.config, source.processor) for name in names]
    return sorted({token for token in found if isinstance(token, int)})


def _takes_labels(model_class: Any) -> bool:
    import inspect

    return "labels" in inspect.signature(model_class.forward).parameters


def profile(
    options: HFOptions, photo: Image.Image, progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measures, and returns the last of the reports, which has everything."""
    *_, report = HFProfile(options, photo).reports(progress)
    return report


def command(options: HFOptions) -> str:
    """Returns the command that repeats this profile; it has no path but the file's and the folder's own names."""
    words = ["mmkernels", "profile", options.model, "--model", options.name, "--image", options.image.name]
    words += ["--resolutions", ",".join(map(str, options.resolutions or ()))]
    words += ["--question", options.question or "", "--dtype", options.dtype, "--device", options.device]
    return shlex.join(words + ["--random"] * options.random + ["--train"] * options.train)


__all__ = ["NEW_TOKENS", "HFProfile", "command", "drift", "profile"]
