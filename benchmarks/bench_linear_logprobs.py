"""`linear_logprobs` beside the peers of linear_peers.py."""

import linear_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.linear.linear_logprobs.spec import SPEC

test_linear_logprobs = rows_of(SPEC, linear_peers.LOGPROBS, counts_products=True)
