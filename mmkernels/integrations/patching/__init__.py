"""`patch`: mmkernels in models that other people wrote, by one line; and `unpatch`."""

from mmkernels.integrations.patching.apply import patch, unpatch
from mmkernels.integrations.patching.report import Kept, PatchReport, Replaced

__all__ = ["Kept", "PatchReport", "Replaced", "patch", "unpatch"]
