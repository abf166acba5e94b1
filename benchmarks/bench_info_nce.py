"""`info_nce` beside the peers of contrastive_peers.py."""

import contrastive_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.contrastive.info_nce.spec import SPEC

test_info_nce = rows_of(SPEC, contrastive_peers.INFO_NCE, counts_products=True)
