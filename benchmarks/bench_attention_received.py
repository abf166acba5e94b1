"""`attention_received` beside the naive formula."""

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.attention.attention_received.spec import SPEC

test_attention_received = rows_of(SPEC)
