"""Writes mmkernels as a kernel of the Hugging Face Hub, which the package `kernels` loads from the folder as it is.

The folder is a project of `kernel-builder` too: its sources are in torch-ext, its variants in build. All imports are
relative, and the ops are in a namespace of their own, which is the name that the kernel is loaded by. So it is of use
beside an installed mmkernels, and beside another version of itself.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, ENTRY = "mmkernels", Path("integrations", "hub", "entry.py")
VERSION = 0  # the Hub's for a kernel whose interface may still change
BACKENDS = ("cpu", "cuda", "rocm")  # Triton's GPUs, and PyTorch alone

BUILD = """\
[general]
name = "mmkernels"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repository}"

[torch-noarch]
pyext = ["json", "py"]
"""

FLAKE = """\
{
  description = "mmkernels: fused, memory-linear kernels for multimodal models";

  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };

  outputs =
    {
      self,
      kernel-builder,
    }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """\
---
license: apache-2.0
tags:
- kernels
---

# mmkernels

Fused, memory-linear ops for multimodal models: attention, contrastive and language-model losses, visual tokens.

```python
from pathlib import Path
from kernels import get_local_kernel

mmkernels = get_local_kernel(Path("."))
```
"""

OWN = '__name__.partition(".")[0]'
"""The kernel's name, in each of its modules."""
REWRITES = (
    # f"mmkernels::{name}" and its like: the namespace of the ops
    (re.compile(r'(?<![\w"])f"mmkernels(?=::|\.)'), "f\"{__name__.partition('.')[0]}"),
    # "mmkernels.ops..." and "mmkernels": a module, or the namespace
    (re.compile(r'(?<![\w"])"mmkernels((?:\.|::)[\w.]+)"(?!")'), rf'({OWN} + "\1")'),
    (re.compile(r'(?<![\w"])"mmkernels"(?!")'), OWN),
    (re.compile(r"(?<![\w`.])torch\.ops\.mmkernels\b(?![^\n]*``)"), f"getattr(torch.ops, {OWN})"),
)
LEFT = re.compile(
    r"^\s*(?:from mmkernels\b|import mmkernels\b)|(?<![\w`.])torch\.ops\.mmkernels\.|\"mmkernels(?=[\".:])", re.M
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is made, or emptied if it is one that this program made")
    parser.add_argument("--repository", default="mmkernels/mmkernels", help="OWNER/NAME on the Hub (%(default)s)")
    parser.add_argument(
        "--extension", action="store_true", help="compile the CPU kernels too, for this Python and torch"
    )
    options = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository):
        parser.error(f"--repository must be OWNER/NAME, got {options.repository!r}")
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()) and not (folder / "torch-ext" / PACKAGE).is_dir():
        parser.error(f"folder must be new or of this program, got {folder}, which holds something else")
    for line in build(folder, options.repository, options.extension):
        print(line)


def build(folder: Path, repository: str, extension: bool) -> Iterator[str]:
    """Writes the folder, and yields what a user should know of each variant."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = folder / "torch-ext" / PACKAGE
    for path in closure():
        target = sources / ("__init__.py" if path == ENTRY else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            target.write_text(relative(path, "__init__.py" if path == ENTRY else str(path)))
        else:
            shutil.copy(ROOT / PACKAGE / path, target)
    backends = ", ".join(f'"{x}"' for x in BACKENDS)
    (folder / "build.toml").write_text(BUILD.format(version=VERSION, backends=backends, repository=repository))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD)
    for backend in BACKENDS:
        yield f"build/{variant(folder, f'torch-{backend}', backend)}"
    if extension:
        yield f"build/{compiled(folder)}"


def closure() -> list[Path]:
    """Returns the package's files that the kernel is made of, relative to it: what `ENTRY` imports, and all ops."""
    package = ROOT / PACKAGE
    found, waiting = set[Path](), [ENTRY, *(x.relative_to(package) for x in package.glob("ops/**/*.py"))]
    waiting += [x.relative_to(package) for x in package.glob("ops/*/*/tuned.json")]
    while waiting:
        path = waiting.pop()
        if path in found or path == Path("__init__.py"):
            continue
        found.add(path)
        waiting += [x / "__init__.py" for x in path.parents if (package / x / "__init__.py").is_file()]
        if path.suffix == ".py":
            for module, names in imports((package / path).read_text()):
                parts = Path(*module.split(".")) if module else Path()
                for candidate in (parts, *(parts / name for name in names)):
                    for file in (candidate.with_suffix(".py"), candidate / "__init__.py"):
                        if candidate != Path() and (package / file).is_file():
                            waiting.append(file)
    return sorted(found)


IMPORT = re.compile(r"^(\s*)from mmkernels(?:\.([\w.]+))? import (\([^)]*\)|[^\n]*)", re.M)


def imports(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each module that a file imports from, without the package's name, and the names."""
    for match in IMPORT.finditer(text):
        yield match[2] or "", re.findall(r"(\w+)(?: as \w+)?\s*(?:,|\)|$)", match[3].split("#")[0])


def relative(path: Path, target: str) -> str:
    """Returns a file's text with imports relative to the kernel, and with the kernel's name where the package's is."""
    text = (ROOT / PACKAGE / path).read_text()
    dots = "." * len(Path(target).parts)
    text = IMPORT.sub(lambda match: f"{match[1]}from {dots}{match[2] or ''} import {match[3]}", text)
    lines = []
    for line in text.split("\n"):  # an example in a docstring stays
        if not line.lstrip().startswith((">>>", "...")):
            for pattern, replacement in REWRITES:
                line = pattern.sub(replacement, line)
        lines.append(line)
    text = "\n".join(lines)
    left = LEFT.search(text)
    if left:
        raise SystemExit(f"error: {path}: this program does not know how to rewrite {left[0]!r}")
    return text


def variant(folder: Path, name: str, backend: str, *more: Path) -> str:
    """Writes the sources and other files as a variant, with its metadata. Returns its name."""
    target = folder / "build" / name
    shutil.copytree(folder / "torch-ext" / PACKAGE, target)
    for file in more:
        shutil.copy(file, target)
    # Loaders before kernels 0.13 look for the package in a folder of this name.
    (target / PACKAGE).mkdir()
    (target / PACKAGE / "__init__.py").write_text("from .. import *  # noqa: F403\n")
    files = {str(x.relative_to(target)): digest(x) for x in sorted(target.rglob("*")) if x.is_file()}
    metadata = {
        "name": PACKAGE,
        "id": identifier(folder, backend),
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return name


def identifier(folder: Path, backend: str) -> str:
    """Returns the name that a variant is loaded by and has its ops in: another one for other sources."""
    hashed = hashlib.sha256()
    sources = folder / "torch-ext" / PACKAGE
    for path in sorted(sources.rglob("*")):
        if path.is_file():
            hashed.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes())
    return f"_{PACKAGE}_{backend}_{hashed.hexdigest()[:7]}"


def digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def compiled(folder: Path) -> str:
    """Compiles the CPU kernels for the Python and torch that run this, as a variant. Returns its name."""
    import platform

    import torch

    major, minor = torch.__version__.split(".")[:2]
    abi = "cxx11" if torch.compiled_with_cxx11_abi() else "cxx98"
    name = f"torch{major}{minor}-{abi}-cpu-{platform.machine()}-{platform.system().lower()}"
    namespace = identifier(folder, "cpu")
    csrc = folder / "torch-ext" / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copy(ROOT / "CMakeLists.txt", csrc.parent)
    for path in csrc.rglob("*.cpp"):
        text = path.read_text()
        path.write_text(text.replace("TORCH_LIBRARY_IMPL(mmkernels,", f"TORCH_LIBRARY_IMPL({namespace},"))
    objects = folder / "torch-ext" / "objects"
    # Beside this Python are the cmake and ninja of its environment.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]
    subprocess.run(["cmake", "-S", csrc.parent, "-B", objects, *options], check=True, env=environment)
    subprocess.run(["cmake", "--build", objects, "--target", "_cpu"], check=True, env=environment)
    library = objects / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    variant(folder, name, "cpu", library)
    shutil.rmtree(objects)
    return name


if __name__ == "__main__":
    main()
