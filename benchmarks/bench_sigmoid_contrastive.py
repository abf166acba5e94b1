"""`sigmoid_contrastive` beside the peers of contrastive_peers.py."""

import contrastive_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import SPEC

test_sigmoid_contrastive = rows_of(SPEC, contrastive_peers.SIGMOID, counts_products=True)
