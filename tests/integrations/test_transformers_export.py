"""`torch.export` and `torch.jit.trace` of transformers models on "mmkernels": a program serves any batch and length."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mmkernels.integrations.transformers import register

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": 32, "vocab_size": 99} | {
    f"{side}_{size}": count
    for side in ("encoder", "decoder")
    for size, count in {"layers": 1, "attention_heads": 4, "ffn_dim": 64}.items()
}
MODELS: dict[str, dict[str, Any]] = {
    "BertModel": {"vocab_size": 99, **SMALL},  # each token sees all
    "LlamaForCausalLM": {"vocab_size": 99, **SMALL},  # causal
    "MistralForCausalLM": {"vocab_size": 99, "sliding_window": 4, "num_key_value_heads": 2, **SMALL},
    "BartModel": BART,  # attention to an encoder
    "CLIPVisionModel": {"image_size": 32, "patch_size": 8, **SMALL},  # no mask
}


class Call(nn.Module):
    """The first output of a model of random weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        model_class = getattr(transformers, name)
        register()
        self.model = model_class(model_class.config_class(**MODELS[name])).eval()
        self.model.set_attn_implementation("mmkernels")

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return self.model(x)[0]
        return self.model(x, attention_mask=attention_mask, use_cache=False)[0]


def inputs(name: str, batch: int, length: int) -> tuple[Tensor, ...]:
    if name == "CLIPVisionModel":
        return (torch.rand(batch, 3, 32, 32),)
    lengths = torch.randint(1, length + 1, (batch, 1))
    return torch.randint(3, 99, (batch, length)), (torch.arange(length) < lengths).long()


@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_serves_any_batch_and_length(name: str, how: str) -> None:
    call, example = Call(name), inputs(name, 4, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on shapes in Python
        if how == "trace":
            program: Any = torch.jit.trace(call, example, check_trace=False)
        else:
            sizes = tuple(dict.fromkeys(range(2 if x.dim() == 2 else 1), torch.export.Dim.AUTO) for x in example)
            program = torch.export.export(call, example, dynamic_shapes=sizes).module()
        for size in ((7, 9), (1, 5)):
            given = inputs(name, *size)
            torch.testing.assert_close(program(*given), call(*given))
