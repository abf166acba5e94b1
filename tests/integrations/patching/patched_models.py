"""Small models that the tests of `patch` share, and what must be as it was after `unpatch`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.patching.interface import configs_of
from mmkernels.testing.models import build, randomise

LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def llama(seed: int = 0, **changes: Any) -> Any:
    return randomise(build("LlamaForCausalLM", LLAMA | changes), seed, std=0.3).eval()


def labels() -> Tensor:
    return IDS.masked_fill(IDS == 0, -100)


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(**TEXT, labels=labels()).loss
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    """Returns the loss and its gradient by every parameter."""
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return found | {"loss": loss.detach()}


def objects(model: nn.Module) -> list[Any]:
    """Returns all that `unpatch` is to restore, as objects that ``is`` can compare."""
    found = list[Any]()
    for module in model.modules():
        found += [type(module), *(x for pair in vars(module).items() for x in pair)]
    for config in configs_of(model):
        found += [config, type(config), config._attn_implementation_internal]
    return found


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(x is y for x, y in zip(found, expected))


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def pair(model: Any) -> tuple[Any, Any]:
    """Returns a model and a copy of it, which share nothing."""
    return model, copy.deepcopy(model)
