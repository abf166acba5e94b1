"""How many runs of an op ``make test`` may make: a count, which does not depend on the machine.

22 ops fit into 15 minutes on two cores. In seconds, as runs from a clean clone took them on two cores of a Zen 5:

    set-up 162 + lint, types and GPU kernels compiled 90 + tests that run no op 193            = 445
    left for two processes:                                               2 (900 - 445)        = 910
    the budgets of the 22 ops below:     70,320 runs of 8.5 ms + 2,821 interpreted of 0.07 s  = 795
    spare: slower machines take more                                                           = 115
"""

from __future__ import annotations

from typing import NamedTuple

FIXED_SECONDS = 445
RUN_SECONDS, INTERPRETED_SECONDS = 0.0085, 0.07


class Budget(NamedTuple):
    """Runs of one op, each a forward pass with or without a backward pass, on any backend, the reference's too.

    Args:
        native: in the main pass of the tests, and in the one of tests that run alone.
        interpreted: in the pass where Triton's kernels run in their interpreter.
    """

    native: int
    interpreted: int

    @property
    def seconds(self) -> float:
        return self.native * RUN_SECONDS + self.interpreted * INTERPRETED_SECONDS


# What an op's spec is tested by in test_specs.py and test_calls.py takes half of it.
DEFAULT = Budget(native=1_000, interpreted=60)
# The first op of each family pays for what the family shares: models, integrations, every instruction set and mask.
BUDGET = {
    "cross_attention": Budget(native=38_500, interpreted=560),
    "attention_received": Budget(native=1_400, interpreted=165),
    "attention_weights": Budget(native=1_300, interpreted=160),
    "co_attention": Budget(native=1_150, interpreted=96),
    "merge_attention": Budget(native=700, interpreted=20),
    "info_nce": Budget(native=4_100, interpreted=400),
    "sigmoid_contrastive": Budget(native=1_900, interpreted=130),
    "retrieval_ranks": Budget(native=1_000, interpreted=100),
    "max_sim": Budget(native=900, interpreted=160),
    "scatter_tokens": Budget(native=3_100, interpreted=60),
    # What merges tokens matches them first; a mixture of experts gathers its rows by the last of the three.
    "match_tokens": Budget(native=1_350, interpreted=95),
    "merge_tokens": Budget(native=820, interpreted=45),
    "unmerge_tokens": Budget(native=1_350, interpreted=40),
    "merge_patches": Budget(native=2_450, interpreted=110),
    "pool_tokens": Budget(native=1_550, interpreted=110),
    # Together as two defaults: what asks for a loss calls the second.
    "linear_logprobs": Budget(native=950, interpreted=75),
    "linear_cross_entropy": Budget(native=1_850, interpreted=75),
    "grouped_linear": Budget(native=1_900, interpreted=90),
    # Together as two defaults: three reductions against none.
    "frame_difference": Budget(native=600, interpreted=85),
    "select_tokens": Budget(native=1_500, interpreted=60),
    "token_similarity": Budget(native=1_100, interpreted=125),
    "select_diverse": Budget(native=850, interpreted=60),
}
