"""How many runs of an op ``make test`` may make: a count, which does not depend on the machine."""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """Runs of one op, each a forward pass with or without a backward pass, on any backend, the reference's too.

    Args:
        native: in the main pass of the tests, and in the one of tests that run alone.
        interpreted: in the pass where Triton's kernels run in their interpreter.
    """

    native: int
    interpreted: int


DEFAULT = Budget(native=3000, interpreted=300)
# The first op of each family pays for what the family shares: models, integrations, every instruction set and mask.
BUDGET = {
    "cross_attention": Budget(native=13_000, interpreted=700),
    "info_nce": Budget(native=4_000, interpreted=520),
}
