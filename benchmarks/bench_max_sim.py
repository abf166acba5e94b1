"""`max_sim` beside the peers of late_interaction_peers.py."""

import late_interaction_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.contrastive.max_sim.spec import SPEC

test_max_sim = rows_of(SPEC, late_interaction_peers.PEERS, counts_products=True)
