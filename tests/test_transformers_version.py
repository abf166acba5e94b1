"""A version of transformers that mmkernels is not written for: one error, which names it and those that work."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmkernels.cli import main
from mmkernels.integrations.transformers import register
from mmkernels.models.blocks.config import read_config
from mmkernels.models.blocks.images import to_pixels
from mmkernels.transformers_version import RANGE, VersionError, import_transformers

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
USES: dict[str, Callable[[], object]] = {
    'attn_implementation="mmkernels"': register,
    "reading a checkpoint": lambda: read_config({"model_type": "clip"}, {"clip": "CLIPModel"}, "config.json"),
    "preparing images": lambda: to_pixels([Image.new("RGB", (8, 8))], 8),
}


def test_the_versions_are_those_of_pyproject() -> None:
    assert f'"transformers{RANGE}"' in PYPROJECT.read_text()


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1", "6.0.0", "6.1.0.dev0", "unknown"])
@pytest.mark.parametrize("what", USES)
def test_another_version_is_refused_by_both_versions(what: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", version)
    message = f'{what} needs transformers >=5.17,<6, got {version}: pip install "transformers>=5.17,<6"'
    with pytest.raises(VersionError, match=f"^{re.escape(message)}$"):
        USES[what]()


@pytest.mark.parametrize("version", ["5.17.0", "5.30.0.dev0", "5.100"])
def test_versions_in_between_are_not_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", version)
    assert import_transformers("this") is sys.modules["transformers"]


@pytest.mark.parametrize("arguments", [["support", "llama"], ["support", "--all", "llama"]])
def test_a_command_says_it_in_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", "5.16.1")
    monkeypatch.setattr(sys, "argv", ["mmkernels", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        'mmkernels: attn_implementation="mmkernels" needs transformers >=5.17,<6, got 5.16.1: '
        'pip install "transformers>=5.17,<6"'
    )


def test_an_import_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as with a version of huggingface_hub that transformers refuses."""

    class Refuses:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "transformers":
                raise ImportError("huggingface-hub>=1.5.0,<2.0 is required")

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.raises(ImportError, match=r'needs transformers: pip install "mmkernels\[models\]" \(.*hub>=1\.5\.0'):
        import_transformers("this")
