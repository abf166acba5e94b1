"""Folders as they occur: saved again, in other shards, as links, beside other files. Transformers says what is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import configure, load, refused
from clip_checkpoints import build

from mmkernels.models import CLIP

Copy = Callable[[str], Path]
SHARDS, FEWER, WHOLE = "10KB", "60KB", "1GB"


def save(folder: Path, size: str = WHOLE) -> None:
    """Saves a model with new weights."""
    model = build("clip")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=size)


def same_as_theirs(folder: Path) -> None:
    """Our model of the folder has the weights that transformers loads."""
    theirs, ours = transformers.CLIPModel.from_pretrained(folder), load(folder)
    assert torch.equal(ours.text.embed.weight, theirs.text_model.embeddings.token_embedding.weight)
    assert torch.equal(ours.vision.positions, theirs.vision_model.embeddings.position_embedding.weight)
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize(
    "sizes",
    [(SHARDS, WHOLE), (WHOLE, SHARDS), (SHARDS, FEWER), (FEWER, SHARDS), (SHARDS, WHOLE, FEWER)],
    ids=lambda sizes: ", ".join(sizes),
)
def test_saved_again(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    """What an earlier save left stays in the folder: an index without its shards, or a whole file beside shards."""
    for size in sizes:
        save(tmp_path, size)
    same_as_theirs(tmp_path)


def test_leftovers_are_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path)
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text('{"weight_map": {"logit_scale": "gone.safetensors"}}')
    for name in ("pytorch_model.bin", "adapter_model.safetensors", "model.fp16.safetensors", "optimizer.pt"):
        (tmp_path / name).write_bytes(b"neither weights nor a pickle")
    (tmp_path / "text_encoder").mkdir()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "text_encoder")
    same_as_theirs(tmp_path)


@pytest.mark.parametrize("size", [WHOLE, SHARDS])
def test_links_as_in_the_hubs_cache(tmp_path: Path, size: str) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1f2e"
    save(blobs, size)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:040}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    same_as_theirs(snapshot)
    refused(tmp_path, rf"a snapshot in the hub's cache, such as \['{snapshot}'\], got {tmp_path}", FileNotFoundError)
    lost = next(path for path in snapshot.glob("*.safetensors"))
    lost.resolve().unlink()
    refused(snapshot, f"a link to a missing file.* {re.escape(str(lost))} -> ../../blobs/", FileNotFoundError)


def test_paths_as_users_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "model")
    assert torch.equal(CLIP.from_pretrained("~/model").logit_scale, load(tmp_path / "model").logit_scale)
    with pytest.raises(FileNotFoundError, match=r"openai/clip, which is no folder; .*snapshot_download"):
        CLIP.from_pretrained("openai/clip")


@pytest.mark.parametrize("name", ["more.safetensors", "more.safetensors.index.json"])
def test_the_configuration_names_the_file(tmp_path: Path, name: str) -> None:
    save(tmp_path, SHARDS if name.endswith(".json") else WHOLE)
    (tmp_path / name.replace("more", "model")).rename(tmp_path / name)
    save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    configure(tmp_path, transformers_weights=name)
    same_as_theirs(tmp_path)
    (tmp_path / name).unlink()
    refused(tmp_path, f"must hold {name}, got no such file", FileNotFoundError)
    for other in ("../more.safetensors", "pytorch_model.bin", 7):
        configure(tmp_path, transformers_weights=other)
        refused(tmp_path, f"config.json: transformers_weights must be the name of .* beside it, got {other!r}")


def test_an_adapter_is_refused(copy: Copy) -> None:
    """transformers applies it if peft is installed, and ignores it if not."""
    folder = copy("clip")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(folder, "must not hold an adapter, .*merge it .*; got adapter_config.json")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "open_clip_model.safetensors"])
def test_weights_by_another_name(copy: Copy, name: str) -> None:
    folder = copy("clip")
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"must hold model.safetensors, .*, got {name}: .*transformers_weights", FileNotFoundError)
    configure(folder, transformers_weights=name)
    load(folder)


def test_no_file_by_the_name(copy: Copy) -> None:
    folder = copy("clip")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"logit_scale": "gone.safetensors"}}')
    refused(folder, "must hold gone.safetensors, got no such file", FileNotFoundError)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "must hold model.safetensors, or .* got neither", FileNotFoundError)
    (folder / "model.safetensors").rmdir()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    refused(folder, "model.safetensors: must be a whole safetensors file, got a Git LFS pointer: run git lfs pull")
    (folder / "model.safetensors").write_bytes(content)
    load(folder)
