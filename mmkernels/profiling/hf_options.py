"""The options of `mmkernels profile hf`: any image-text-to-text model of transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmkernels.options import BadInput
from mmkernels.profiling.options import ORIGINAL, PATCHED, RESOLUTIONS, Settings, Side, checked_resolutions

HF = "hf"
"""The name by which ``mmkernels profile`` knows a model of transformers."""

QUESTION = "What is in this picture?"
"""What is asked where nothing else is."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class HFOptions(Settings):
    """Settings of a profile of a model that transformers loads.

    Args:
        model: ``"hf"``.
        folder: where the model and its processor are, or its name on the Hub, such as ``org/name``.
        image: the photograph.
        resolutions: sides of squares in pixels, each a row; the smallest comes first. None: `RESOLUTIONS`.
        question: what is asked about the photograph. None: `QUESTION`.
        random: whether the weights are random, so that a configuration and a processor are enough.

    The others are as of `Settings`. What is compared is always the model before and after `mmkernels.patch`.

    Raises:
        BadInput: as of `Settings`.

    Example:
        >>> HFOptions("hf", folder=Path("org/name"), image=Path("a.jpg"), resolutions=(448, 224)).rows
        (Side(resolution=224), Side(resolution=448))
    """

    image: Path
    resolutions: tuple[int, ...] | None = None
    question: str | None = None
    random: bool = False

    choices: ClassVar[tuple[str, ...]] = (ORIGINAL, PATCHED)

    def __post_init__(self) -> None:
        if self.folder is None:
            raise BadInput(f"--model must be given for {HF}: a folder, or a name on the Hub such as org/name; got none")
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInput(f"--model must be a folder, or a name on the Hub, got the file {self.folder}")
        if not self.folder.exists() and not _HUB_ID.fullmatch(str(self.folder)):
            raise BadInput(f"--model must be a folder, or a name on the Hub such as org/name; got {self.folder}")
        self._fill_with(backends=self.choices, question=QUESTION)
        self._set("resolutions", checked_resolutions(self.resolutions or RESOLUTIONS)[::-1])
        self._check_run()

    @property
    def rows(self) -> tuple[Side, ...]:
        """What the rows of the profile are about."""
        return tuple(Side(side) for side in self.resolutions or ())

    @property
    def source(self) -> str:
        """The folder, or the name on the Hub, as transformers takes it."""
        return str(self.folder)

    @property
    def is_local(self) -> bool:
        """Whether the model is in a folder."""
        return self.folder is not None and self.folder.is_dir()

    @property
    def name(self) -> str:
        """What reports call the model: the folder's own name, or the name on the Hub."""
        assert self.folder is not None
        return self.folder.resolve().name if self.is_local else self.source
