"""Few logits are computed at once, many are deferred."""

from __future__ import annotations

import pytest
import torch
from patched import patched
from torch import Tensor

from mmkernels.integrations.patching import deferred
from mmkernels.integrations.patching.deferred import DeferredLogits
from mmkernels.integrations.patching.language_loss import language_loss
from mmkernels.testing.families import FAMILIES


@pytest.mark.parametrize(("least", "kind"), [(2 * 13 * 128, DeferredLogits), (2 * 13 * 128 + 1, Tensor)])
def test_least_logits(least: int, kind: type[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "LEAST_LOGITS", least)
    model, inputs = FAMILIES["llama"].build()
    with torch.no_grad():
        assert type(patched(model, language_loss)(**inputs).logits) is kind
