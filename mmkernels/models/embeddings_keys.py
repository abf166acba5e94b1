"""The key of an embedding, a hash of the content that was encoded, and a hash of the model that encoded it."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_KEY = re.compile(r"[0-9a-f]{64}")
_ORIENTATION = 0x0112  # the EXIF tag


def content_key(item: Any) -> str:
    """The key of an item in an `EmbeddingCache`: SHA-256 of its content, and of what kind of content that is.

    Equal content has the same key in every process and on every machine. A text never has the key of a file or of
    bytes: hash the same content the same way each time.

    Args:
        item: a text (str: its UTF-8; never read as a path); a `pathlib.Path` (the file's bytes); bytes; a PIL image
            (its mode, size and pixels, with palette and transparency applied, and an EXIF orientation that turns it);
            a tensor or NumPy array (dtype, shape and elements, wherever it lies).

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: another type; an array that is masked or holds objects.
        ValueError: a text that is not valid Unicode.
        OSError: a file that can't be read.

    Example:
        >>> import torch
        >>> from mmkernels.models.embeddings import content_key
        >>> content_key("a cat") == content_key("a " + "cat"), content_key("a cat") == content_key(b"a cat")
        (True, False)
        >>> content_key(torch.zeros(2, 3)) == content_key(torch.zeros(3, 2))
        False
    """
    if isinstance(item, Path):
        digest = hashlib.sha256(b"bytes\0")
        with item.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    kind, content = _content(item)
    digest = hashlib.sha256(kind.encode() + b"\0")
    digest.update(content)
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights, to be the `model_id` of an `EmbeddingCache`.

    Every parameter and buffer of `state_dict` counts: name, dtype, shape and bytes. What is not in there (an activation
    function, how images are resized) does not: where that may change, put it into `model_id` beside the fingerprint.

    Args:
        model: its tensors may lie on any device; one at a time is copied to the CPU.

    Returns:
        64 hexadecimal digits (SHA-256), the same in every process.

    Raises:
        TypeError: not a module, or a `state_dict` that holds more than dense tensors.
        ValueError: tensors without values (on the meta device).

    Example:
        >>> import torch
        >>> from mmkernels.models.embeddings import fingerprint
        >>> model = torch.nn.Linear(4, 2)
        >>> before = fingerprint(model)
        >>> _ = model.bias.data.add_(1)
        >>> len(before), fingerprint(model) == before
        (64, False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            raise TypeError(f"model must hold only tensors in its state_dict, got {type(value).__name__} as {name}")
        kind, content = _content(value)
        digest.update(f"{name}\0{kind}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def key_bytes(name: str, key: str) -> bytes:
    """The 32 bytes of a key; `name` is the argument's, for the error."""
    if not isinstance(key, str):
        raise TypeError(f"{name} must be texts, as content_key returns them, got {type(key).__name__}")
    if not _KEY.fullmatch(key):
        raise ValueError(f"{name} must be 64 hexadecimal digits each, as content_key returns them, got {key[:80]!r}")
    return bytes.fromhex(key)


def _content(item: Any) -> tuple[str, Any]:
    """Returns the kind of content, with all that its bytes do not tell, and the bytes."""
    if isinstance(item, str):
        try:
            return "text", item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"item must be valid Unicode, got {error}") from error
    if isinstance(item, (bytes, bytearray, memoryview)):
        return "bytes", item if isinstance(item, bytes) else bytes(item)
    if isinstance(item, Tensor):
        return f"tensor {item.dtype} {tuple(item.shape)}", _tensor_bytes(item)
    if isinstance(item, np.ndarray):
        if isinstance(item, np.ma.MaskedArray):
            raise TypeError("item must be an array without a mask (or give keys), got a MaskedArray")
        if item.dtype.hasobject:
            raise TypeError(f"item must hold numbers, got an array of {item.dtype}")
        elements = np.ascontiguousarray(item).reshape(-1)
        return f"array {item.dtype.str} {item.shape}", elements.view(np.uint8) if elements.size else b""
    pillow = sys.modules.get("PIL.Image")  # an image can't be there without it
    if pillow is not None and isinstance(item, pillow.Image):
        orientation = _orientation(item)
        if item.mode in ("P", "PA") or "transparency" in item.info:
            item = item.convert("RGBA")
        return f"image {item.mode} {item.size}{orientation}", item.tobytes()
    raise TypeError(
        "item must be a text, bytes, a pathlib.Path, a PIL image, a tensor or an array (or give keys), "
        f"got {type(item).__name__}"
    )


def _orientation(image: Any) -> str:
    """Returns the EXIF orientation of an image as a text, "" if it has none."""
    image.load()  # some formats are rotated when they are loaded
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF has no orientation; Pillow raises many kinds of errors
        return ""
    return "" if orientation == 1 else f" orientation {orientation}"


def _tensor_bytes(x: Tensor) -> Any:
    if x.layout != torch.strided or x.is_quantized:
        raise TypeError(
            f"a tensor must be dense, to be hashed, got {'a quantized one' if x.is_quantized else x.layout}"
        )
    if x.is_meta:
        raise ValueError("a tensor must have values, to be hashed, got one on the meta device")
    x = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return x.view(torch.uint8).numpy() if x.numel() else b""
