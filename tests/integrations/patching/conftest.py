"""What the tests of patched models share."""

from __future__ import annotations

import pytest

from mmkernels.integrations.patching import deferred


@pytest.fixture(autouse=True)
def few_logits_are_deferred_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of tests are small."""
    monkeypatch.setattr(deferred, "LEAST_LOGITS", 0)
