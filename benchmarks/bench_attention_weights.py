"""`attention_weights` beside the naive formula."""

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.attention.attention_weights.spec import SPEC

test_attention_weights = rows_of(SPEC)
