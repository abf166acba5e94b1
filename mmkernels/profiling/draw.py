"""Chooses the picture that suits a profile's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from mmkernels.profiling import plot, plot_reduce, plot_tradeoff


def draw(report: dict[str, Any], photo: Image.Image, path: Path, *, photos: bool = True) -> None:
    """Writes the picture of `report` as a PNG.

    Args:
        report: of the profile.
        photo: the photograph.
        path: of the picture.
        photos: whether it shows what reducers leave of the photograph.
    """
    settings = report["settings"]
    shown = photo if photos else None
    if not settings.get("reduce"):
        plot.draw(report, photo, path)
    elif len(settings.get("resolutions") or ()) > 1:
        plot_tradeoff.draw(report, shown, path)
    else:
        plot_reduce.draw(report, shown, path)
