"""Results of compilers, kept in ``build/aot`` by what they were made from. Any number of processes may use it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmkernels.report import write_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "aot"


def key_of(*parts: object) -> str:
    """Returns a name for what is made from these parts, each given by its repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def read(name: str) -> Any:
    """Returns what was kept under a name; None: nothing, or a file that is damaged."""
    try:
        return json.loads((FOLDER / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None


def write(name: str, value: Any) -> None:
    """Keeps a value. A reader sees the old file or the new one, never a part."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / f"{name}.json", value)
