"""`retrieval_ranks` beside the peers of contrastive_peers.py."""

import contrastive_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.contrastive.retrieval_ranks.spec import SPEC

test_retrieval_ranks = rows_of(SPEC, contrastive_peers.RANKS, counts_products=True)
