"""Builds transformers models with random weights from tables: a class's name and the arguments of its configuration."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Config = dict[str, Any]
"""Arguments of a transformers configuration; those of its parts are dicts too."""

Inputs = dict[str, Any]
"""Keyword arguments of one forward pass."""


@dataclass(frozen=True)
class Family:
    """A model class of transformers with sizes so small that it can be checked.

    Args:
        name: as transformers names the folder, followed by what is special about this entry.
        model: the class's name, as `build` takes it.
        config: the arguments of its configuration.
        draw_inputs: draws inputs from PyTorch's global generator; call `build` instead.
        padded: the masks among the inputs whose zeros are padding, [B, L].
        only_forward: inputs that `generate` makes itself.
    """

    name: str
    model: str
    config: Config
    draw_inputs: Callable[[], Inputs]
    padded: tuple[str, ...] = ("attention_mask",)
    only_forward: tuple[str, ...] = ()
    seed: int = 0

    def build(self) -> tuple[Any, Inputs]:
        """Returns the model with random weights, in evaluation mode, and inputs for it: the same ones in each call."""
        with seeded(self.seed):
            inputs = self.draw_inputs()
            return randomise(build(self.model, self.config), self.seed).eval(), inputs


def build(model: str, config: Config, **arguments: Any) -> Any:
    """Returns a model of transformers with the weights that its class initialises.

    Args:
        model: the name of the class; of one that transformers does not export, with its module before it,
            ``models.qwen2_vl.modeling_qwen2_vl:Qwen2VisionTransformerPretrainedModel``.
        config: the arguments of its configuration.
        arguments: further arguments of the class.
    """
    model_class = pkgutil.resolve_name(f"transformers.{model}" if ":" in model else f"transformers:{model}")
    return model_class(model_class.config_class(**copy.deepcopy(config)), **arguments)  # some remove keys from dicts


def randomise(model: Any, seed: int = 0, std: float = 0.1) -> Any:
    """Redraws every parameter in place: some classes initialise gates to 0, and attention would change nothing.

    The values do not depend on what the class drew before.
    """
    with torch.no_grad(), seeded(seed):
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, std)
    return model.requires_grad_(True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's CPU generator inside the ``with`` block and restores its state after it."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield
