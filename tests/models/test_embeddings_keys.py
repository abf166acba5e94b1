"""Equal content has the same key, and nothing else has it; a model's fingerprint is its weights'."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn

from mmkernels.models.embeddings import content_key, fingerprint


def test_keys_of_images(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3), "RGB")
    image.save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as opened:
        assert content_key(opened) == content_key(image)
    assert content_key(tmp_path / "image.png") == content_key((tmp_path / "image.png").read_bytes())
    assert content_key(tmp_path / "image.png") != content_key(image)
    others = [image.convert("L"), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.crop((0, 0, 4, 4))]
    others += [image.resize((4, 5)), image.quantize(4)]
    recoloured = image.quantize(4)
    recoloured.putpalette([9] * 12)
    assert len({content_key(one) for one in [image, *others, recoloured]}) == 7


def test_keys_of_images_that_are_turned(tmp_path: Path) -> None:
    """An orientation counts, except for 1, which is none; so do pixels alone once they are rotated."""
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3), "RGB")
    plain = hashlib.sha256(b"image RGB (5, 4)\0" + image.tobytes()).hexdigest()  # must never change: caches hold it
    keys = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "image.png", exif=exif)
        with Image.open(tmp_path / "image.png") as opened:
            keys.append(content_key(opened))
            assert content_key(opened) == keys[-1]
            rotated = ImageOps.exif_transpose(opened)
        assert (
            content_key(rotated)
            == hashlib.sha256(f"image RGB {rotated.size}\0".encode() + rotated.tobytes()).hexdigest()
        )
    assert keys[0] == content_key(image) == plain
    assert len(set(keys)) == 8
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image.save(tmp_path / "image.png", exif=exif)
    assert content_key(Image.open(tmp_path / "image.png")) == plain
    damaged = image.copy()
    damaged.info["exif"] = b"Exif\0\0 no header"
    assert content_key(damaged) == plain
    image.save(tmp_path / "image.tiff", exif={0x0112: 6})
    opened = Image.open(tmp_path / "image.tiff")
    assert content_key(opened) == content_key(opened)


def test_keys_of_numbers(tmp_path: Path) -> None:
    x = torch.arange(6, dtype=torch.float32)
    kinds = [
        *(x, x.view(2, 3), x.view(3, 2), x.int(), x.bfloat16(), x + 1, x.bool(), x.to(torch.complex64)),
        *(x[:0], x.view(1, 6)[:0], torch.tensor(1.0), x.numpy(), x.view(2, 3).numpy(), x.double().numpy()),
        *(x.numpy()[:0], np.array("a"), b"", "", b"a", "a", Path(__file__)),
        *(x.view(torch.int32), x.view(torch.int32).numpy()),  # the same bytes in another dtype
    ]
    assert len({content_key(kind) for kind in kinds}) == len(kinds)
    strided = x.view(2, 3).T.contiguous().T
    assert content_key(strided) == content_key(x.view(2, 3).clone().requires_grad_())
    assert content_key(strided.numpy()) == content_key(x.view(2, 3).numpy())
    assert content_key(bytearray(b"ab")) == content_key(memoryview(b"ab")) == content_key(b"ab")
    z = torch.tensor([1 + 2j])
    assert content_key(z.conj()) == content_key(torch.tensor([1 - 2j]))
    assert content_key("text") == hashlib.sha256(b"text\0text").hexdigest()  # must never change: caches hold it


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_keys_of_texts(texts: list[str]) -> None:
    assert content_key(texts[0]) != content_key(texts[1])
    assert content_key(texts[0]) != content_key(texts[0].encode())


@pytest.mark.parametrize(
    ("item", "error", "match"),
    [
        ("\ud800", ValueError, "item must be valid Unicode"),
        (3, TypeError, "item must be a text, bytes, .* got int"),
        (["a"], TypeError, "got list"),
        (np.array(["a", None]), TypeError, "item must hold numbers, got an array of object"),
        (np.ma.MaskedArray([1.0, 2.0], [0, 1]), TypeError, "item must be an array without a mask .* got a MaskedArray"),
        (torch.ones(2, device="meta"), ValueError, "a tensor must have values, .* on the meta device"),
        (torch.ones(2).to_sparse(), TypeError, "a tensor must be dense, .* got torch.sparse_coo"),
        (Path("nowhere"), FileNotFoundError, "nowhere"),
    ],
)
def test_items_without_a_key(item: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        content_key(item)


def test_fingerprints() -> None:
    def model(**options: Any) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 3, **options), nn.BatchNorm1d(3))

    same = fingerprint(model())
    assert same == fingerprint(model()) and len(same) == 64
    models = [model() for _ in range(3)]
    models[0][0].weight.data[0, 0] += 1e-6
    models[1][1].running_mean[0] = 1e-6
    models[2].bfloat16()
    models += [model(bias=False), nn.ModuleDict({"0": model()[0], "2": model()[1]})]
    assert len({same, *(fingerprint(other) for other in models)}) == 6
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fingerprint("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a tensor must have values"):
        fingerprint(nn.Linear(2, 2, device="meta"))
