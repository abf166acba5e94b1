"""`select_diverse` beside the formulas that keep every similarity, which are its own naive ones."""

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.tokens.select_diverse.spec import SPEC

test_select_diverse = rows_of(SPEC)
