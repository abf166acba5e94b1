"""`Model`: what all models share. One is made from a configuration, from a named size, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.checkpoint import Names, existing, load_weights, read_json

if TYPE_CHECKING:
    from typing_extensions import Self


class Model(nn.Module):
    """Base class of the models.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Attributes:
        config: the sizes.
        sizes: the configurations that `from_size` accepts, by name.
    """

    sizes: ClassVar[Mapping[str, Any]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_size(
        cls,
        size: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> Self:
        """Returns a model with random weights: norms are identities, gates are open, all other layers have unit gain.

        Args:
            size: a name in `sizes`.
            seed: the same seed gives the same weights on every device.
            dtype: of the parameters.
            device: of the parameters.
            changes: fields of the configuration that differ from the size, such as ``num_latents=32``; None: those of
                the size.

        Raises:
            ValueError: there is no such size, or the configuration refuses a field.
            TypeError: `dtype` is not a floating dtype.
        """
        if not isinstance(size, str) or size not in cls.sizes:
            raise ValueError(f"size must be one of {', '.join(cls.sizes)}, got {size!r}")
        _check_dtype(dtype)
        given = {name: value for name, value in changes.items() if value is not None}
        config = replace(cls.sizes[size], **cls._implied(given), **given)
        with torch.device("meta"):
            model = cls(config)
        names: dict[int, list[str]] = {}  # of each parameter
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        model = model.to_empty(device=device).to(dtype)
        for first, *others in names.values():  # `to_empty` makes two parameters of one that two layers share
            for name in others:
                layer, _, own = name.rpartition(".")
                setattr(model.get_submodule(layer), own, model.get_parameter(first))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_draw(name, parameter, generator))
            model._set_constants()
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Returns the model in a Hugging Face checkpoint folder, in evaluation mode.

        Tensors are mapped from the files until everything is checked: a configuration that promises absurd sizes fails
        before anything of that size is allocated. Parameters may stay mapped: do not overwrite the files in place while
        the model exists.

        Args:
            folder: with ``config.json`` and ``model.safetensors``, or its shards and their index. If it holds more, as
                after several saves, the files are chosen as transformers chooses them: those that ``config.json`` names
                in ``transformers_weights``, or else ``model.safetensors``, or else the shards. An adapter beside them
                is refused.
            dtype: of the parameters, whatever the files hold; routers of experts (`TopKRouter`) stay float32.
            device: of the parameters.

        Raises:
            ImportError: transformers or safetensors is not installed.
            TypeError: `dtype` is not a floating dtype.
            FileNotFoundError: the folder or a file in it is missing. Pickled weights are not read; the message names
                them.
            CheckpointError: the content of a file is wrong; the message names the file and the tensor, what was
                expected and what was found.
        """
        _check_dtype(dtype)
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            hint = "a model of the hub is downloaded by huggingface_hub.snapshot_download, which returns its folder"
            raise FileNotFoundError(f"folder must be a checkpoint's folder, got {folder}, which is no folder; {hint}")
        if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
            inner = sorted(str(path) for path in (folder / "snapshots").iterdir())
            raise FileNotFoundError(f"folder must be a snapshot in the hub's cache, such as {inner[:2]}, got {folder}")
        path = existing(folder / "config.json")
        values = read_json(path)
        config = cls._read_config(values, path)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, cls._names(config), values.get("transformers_weights"))
        return model.to(device=device, dtype=dtype).eval()

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> Any:
        """Returns the configuration that a ``config.json`` describes.

        Args:
            values: what the file holds.
            path: of the file, for errors.
        """
        raise NotImplementedError

    @classmethod
    def _names(cls, config: Any) -> Names:
        """Returns how a checkpoint names the tensors of a model with this configuration."""
        raise NotImplementedError

    @classmethod
    def _implied(cls, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns other fields that `changes` of a named size change with them."""
        return {}

    def _set_constants(self) -> None:
        """Gives the parameters that have a fixed first value this value."""


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}")


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if name.endswith("_gate") or (parameter.dim() == 1 and name.endswith("weight")):
        return torch.ones(parameter.shape)
    if name.endswith("bias"):
        return torch.zeros(parameter.shape)
    fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
    return torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
