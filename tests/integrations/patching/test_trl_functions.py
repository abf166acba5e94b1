"""TRL's functions of logits, of patched models: none is computed."""

from __future__ import annotations

import pytest
import torch
from patched import no_logits, patched
from torch import Tensor, nn

from mmkernels.integrations.patching.language_loss import language_loss
from mmkernels.testing.families import FAMILIES


@pytest.mark.integration("trl")
def test_trl_reads_no_logits() -> None:
    """What TRL's trainers compute of logits: log-probabilities of chosen tokens, entropies, the best tokens."""
    trl = pytest.importorskip("trl.trainer.utils")
    model, inputs = FAMILIES["llama"].build()
    ours = patched(model, language_loss)
    index = inputs["input_ids"][:, 1:]

    def policy(m: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        logits = m(**inputs).logits[:, :-1, :].to(dtype) / 0.7
        logprobs = trl.selective_log_softmax(logits, index)
        with torch.no_grad():
            return logprobs, trl.entropy_from_logits(logits), logits.argmax(-1)

    for dtype in (torch.float32, torch.bfloat16):
        with no_logits():
            found = policy(ours, dtype)
        expected = policy(model, dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[:2], expected[:2], rtol=tolerance, atol=tolerance)
        assert dtype == torch.bfloat16 or torch.equal(found[2], expected[2])
        grads = []
        for m, logprobs in ((ours, found[0]), (model, expected[0])):
            grads.append(torch.autograd.grad(logprobs.float().sum(), m.model.embed_tokens.weight)[0])
        torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
