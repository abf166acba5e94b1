"""Where in the image an answer of `read_digits.py` comes from."""

from __future__ import annotations

import math

import torch
from read_digits_answers import repeated
from read_digits_data import PAD, Scenes, prompts
from torch import Tensor, nn

from mmkernels import SpanMask, attention_received
from mmkernels.models import BLIP2
from mmkernels.nn import CrossAttention


@torch.no_grad()
def evidence(model: BLIP2, scenes: Scenes, answers: Tensor) -> Tensor:
    """Returns how much each patch contributed to each answer, [N, KINDS, rows, columns]; an answer's patches sum to 1.

    The answer's tokens attend to visual tokens in the language model, and these to patches in the Q-Former: the one's
    weights are multiplied with the other's, as means over heads and layers. That is where the model looks, and no proof
    of why it answers.

    Args:
        answers: tokens int64 [N, KINDS, ANSWER], padded.
    """
    count, kinds, _ = answers.shape
    queries = model.config.num_queries
    start = prompts(scenes.questions, queries)
    text = torch.cat([start, answers.flatten(0, 1)], 1)[:, :-1]
    predicts = torch.zeros(text.shape)  # 1 at the tokens behind which those of the answer come
    predicts[:, start.shape[1] - 1 :] = (answers.flatten(0, 1) != PAD).float()
    reading = [block.attention for block in model.decoder.blocks]
    looking = [block.cross.attention for block in model.qformer.blocks if block.cross is not None]
    with Heads(looking) as looked:
        images = model.encode(scenes.pixels)
    with Heads(reading) as read:
        model(text, images=repeated(images, kinds), return_logits=False)
    mask = SpanMask.causal(text.shape[1], text.shape[1])
    weights = [attention_received(*heads, mask, query_weights=predicts[:, None])[..., :queries] for heads in read.found]
    weight = torch.stack(weights).mean((0, 2))  # [N * KINDS, queries]
    found = []
    for query, key in looked.found:
        query, key = (x.repeat_interleave(kinds, 0) for x in (query, key))
        found.append(attention_received(query, key, query_weights=weight[:, None])[..., 1:])  # but the class token
    patches = torch.stack(found).mean((0, 2))  # [N * KINDS, patches]
    side = math.isqrt(patches.shape[1])
    return (patches / patches.sum(1, keepdim=True)).view(count, kinds, side, side)


class Heads:
    """Records query and key, each [B, H, L, D], of attention modules while it is open."""

    def __init__(self, modules: list[CrossAttention]) -> None:
        self.modules = modules
        self.kept: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> Heads:
        linears = [x for module in self.modules for x in (module.q_proj, module.k_proj)]
        self.hooks = [x.register_forward_hook(self._keep) for x in linears]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self.kept[module] = out

    @property
    def found(self) -> list[tuple[Tensor, Tensor]]:
        """Query and key of each module."""

        def heads(module: CrossAttention, linear: nn.Module) -> Tensor:
            return self.kept[linear].unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

        return [(heads(module, module.q_proj), heads(module, module.k_proj)) for module in self.modules]
