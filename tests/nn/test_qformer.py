"""QFormer beside transformers' module, with its masks, and on bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from module_checks import equal_to
from torch import Tensor, nn

from mmkernels.nn import QFormer
from mmkernels.testing.models import randomise

WIDTH, CONTEXT, QUERIES, VOCAB = 24, 16, 3, 20
_PARTS = {"attention.": "attention.", "cross.": "crossattention."}
_PROJECTIONS = {
    f"attention.{ours}_proj.": f"attention.{theirs}." for ours, theirs in zip("qkv", ("query", "key", "value"))
}
_PROJECTIONS |= {"attention.out_proj.": "output.dense.", "norm.": "output.LayerNorm."}
_MLP = {"mlp.0.": "intermediate{}.dense.", "mlp.2.": "output{}.dense.", "norm.": "output{}.LayerNorm."}


class Theirs(nn.Module):
    """transformers' Q-Former with its queries, and its text's embeddings if it reads text."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
        sizes |= {"encoder_hidden_size": CONTEXT, "vocab_size": VOCAB, "max_position_embeddings": 8}
        config = Blip2QFormerConfig(**sizes, use_qformer_text_input=text)
        self.qformer = Blip2QFormerModel(config).eval()
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.embeddings = Blip2TextEmbeddings(config) if text else None

    def forward(self, context: Tensor | None, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        queries = None if context is None else self.queries.expand(context.shape[0], -1, -1)
        x = queries if ids is None else self.embeddings(input_ids=ids, query_embeds=queries)
        count = 0 if context is None else QUERIES
        if mask is not None and mask.dim() == 2:
            mask = torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
        given = {"query_length": count, "attention_mask": mask, "encoder_hidden_states": context}
        return self.qformer(query_embeds=x, **given).last_hidden_state


def names(text: bool) -> dict[str, str]:
    """Start of a parameter's name -> in `Theirs`."""
    found = {"queries": "queries", "norm.": "qformer.layernorm."}
    if text:
        found |= {"embed.": "embeddings.word_embeddings.", "positions.": "embeddings.position_embeddings."}
    for layer in range(2):
        start = f"qformer.encoder.layer.{layer}."
        for ours, theirs in _PARTS.items():
            found |= {f"blocks.{layer}.{ours}{a}": f"{start}{theirs}{b}" for a, b in _PROJECTIONS.items()}
        for ours, ending in (("query_mlp.", "_query"), ("text_mlp.", "")):
            found |= {f"blocks.{layer}.{ours}{a}": start + b.format(ending) for a, b in _MLP.items()}
    return found


def made(text: bool = True, **more: Any) -> QFormer:
    vocab = VOCAB if text else None
    return QFormer(
        WIDTH, CONTEXT, num_queries=QUERIES, depth=2, num_heads=3, hidden=40, vocab_size=vocab, text_length=8, **more
    ).eval()


def text(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Token 0 is left out: transformers gives its embedding no gradient."""
    ids = torch.randint(1, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return ids, mask


def context(batch: int = 2) -> Tensor:
    return torch.randn(batch, 7, CONTEXT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_equals_transformers_with_images_alone() -> None:
    ours = lambda module, x: module(x).queries
    equal_to(made(False), randomise(Theirs(False)), names(False), ours, lambda module, x: module(x), context())


def test_equals_transformers_with_a_text() -> None:
    ids, mask = text()

    def ours(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x, ids, mask)
        return torch.cat([out.queries, out.text], dim=1)[:, :-2]  # what stands for padding differs in no use

    theirs = lambda module, x: module(x, ids, mask)[:, :-2]
    equal_to(made(), randomise(Theirs(True)), names(True), ours, theirs, context())


def test_a_text_alone_and_queries_under_a_causal_mask() -> None:
    """Queries see only each other, a token also what stands before it: as a dense mask says it to transformers."""
    module, theirs = made().double(), randomise(Theirs(True)).double()
    mine = dict(module.named_parameters())
    by_name = dict(theirs.named_parameters())
    table = names(True)
    with torch.no_grad():
        for name, parameter in mine.items():
            start = next(start for start in table if name.startswith(start))
            parameter.copy_(by_name[table[start] + name.removeprefix(start)])
    ids, mask = text()
    sees = torch.ones(QUERIES + 5, QUERIES + 5).tril().bool()
    sees[:QUERIES, :QUERIES] = True
    padded = torch.cat([mask.new_ones(2, QUERIES), mask], 1).bool()
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    valid = mask.bool()
    with torch.no_grad():
        out = module(context(), ids, mask, causal=True)
        expected = theirs(context(), ids, (sees & padded[:, None])[:, None])
        close(out.queries, expected[:, :QUERIES])
        close(out.text[valid], expected[:, QUERIES:][valid])
        close(out.queries, module(context()).queries)
        alone = module(None, ids, mask).text
        close(alone[valid], theirs(None, ids, mask)[valid])
        causal = module(None, ids, mask, causal=True).text
        one = module(None, ids[:, :1], causal=True).text
        close(causal[:, :1], one)
        assert not torch.allclose(alone[:, 0], causal[:, 0])


def test_keys_and_values_are_computed_once_for_any_number_of_texts() -> None:
    module, (ids, mask) = made().double(), text(4)
    with torch.no_grad():
        key_values = module.project(context(1))
        assert len(key_values) == 1 and key_values[0][0].shape == (1, 3, 7, 8)  # of every second layer
        out = module(None, ids, mask, key_values=key_values)
        each = module(context(1).expand(4, -1, -1), ids, mask)
    torch.testing.assert_close(out, each)
    assert out.queries.shape == (4, QUERIES, WIDTH) and out.text.shape == (4, 5, WIDTH)


def test_features_that_queries_do_not_see() -> None:
    module, x = made(False, cross_every=1).double(), context()
    sees = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    sees[0, ..., 4:] = False
    with torch.no_grad():
        out = module(x, context_mask=sees).queries
        torch.testing.assert_close(out[:1], module(x[:1, :4]).queries)
        torch.testing.assert_close(out[1:], module(x[1:]).queries)


def test_dropout_in_training_only() -> None:
    module = made(False, dropout=0.5, residual_dropout=0.5).double()
    with torch.no_grad():
        still = module(context()).queries
        assert torch.equal(module(context()).queries, still)
        assert not torch.equal(module.train()(context()).queries, still)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_queries": 0}, "num_queries must be a positive integer, got 0"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"cross_every": 0}, "cross_every must be a positive integer"),
        ({"hidden": 0}, "hidden must be a positive integer"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"text_length": 0}, "text_length must be a positive integer"),
        ({"num_heads": 5}, "num_heads"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
        ({"residual_dropout": -1.0}, "dropout must be between 0 and 1"),
    ],
)
def test_bad_sizes(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QFormer(**{"dim": 24, "context_dim": 16, "depth": 1, "num_heads": 2} | options)


def test_bad_inputs() -> None:
    module, (ids, mask), x = made(), text(), context().float()
    key_values = [tuple(part.detach() for part in pair) for pair in module.project(x)]
    for given, match in (
        ({}, "context or input_ids must be given, got neither"),
        ({"context": x, "key_values": key_values}, "context must be None with key_values, got both"),
        ({"context": x[..., :8]}, r"context must be \[B, L, 16\], got shape"),
        ({"context": [1]}, "context must be a tensor, got list"),
        ({"key_values": key_values * 2}, "key_values must be of 1 layers, as project returns, got 2"),
        ({"input_ids": ids, "context_mask": mask}, "context_mask must be None without context and key_values"),
        ({"context": x, "attention_mask": mask}, "attention_mask must be None without input_ids, got both"),
        ({"input_ids": ids.float()}, "input_ids must be an int32 or int64 tensor, got torch.float32"),
        ({"input_ids": ids[0]}, r"input_ids must be \[B, L\], L from 1 to 8, got shape \(5,\)"),
        ({"input_ids": ids[:, :0]}, "L from 1 to 8, got shape"),
        ({"input_ids": ids.repeat(1, 2)}, "L from 1 to 8, got shape"),
        ({"input_ids": ids + VOCAB}, "input_ids must be .*19"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"attention_mask must be \[2, 5\] as input_ids, got shape"),
        ({"input_ids": ids, "attention_mask": mask.float()}, "attention_mask must be a bool or integer tensor, got"),
        ({"context": x, "input_ids": ids.repeat(2, 1)}, "context must have batch 1 or input_ids' 4, got 2"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            module(**given)
    with pytest.raises(ValueError, match="input_ids must be None: this Q-Former was made without vocab_size"):
        made(False)(x, ids)
