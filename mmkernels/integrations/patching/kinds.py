"""The kinds of patch, beside attention by name: `kinds`."""

from __future__ import annotations

from mmkernels.integrations.patching import grounding_dino, mergers, pooling, tables
from mmkernels.integrations.patching.changes import Kind, by_class
from mmkernels.integrations.patching.contrastive_loss import contrastive_loss
from mmkernels.integrations.patching.language_loss import language_loss


def kinds() -> tuple[Kind, ...]:
    """Returns the kinds of patch, in the order in which the report lists what they find.

    Where two of them have the same method for a module, the first one's counts.
    """
    return (
        language_loss,
        contrastive_loss,
        by_class(tables.TABLE),
        grounding_dino.find,
        by_class(mergers.TABLE),
        pooling.find,
    )
