"""`merge_attention` beside the naive formula."""

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.attention.merge_attention.spec import SPEC

test_merge_attention = rows_of(SPEC)
