"""Janus for the profiler: images that are read. (`mmkernels bench models` measures those that are drawn.)"""

from __future__ import annotations

from mmkernels.models.janus import Janus
from mmkernels.profiling.deepseek_vl import FixedSizeAdapter
from mmkernels.profiling.vision_language import Size

_NAMED = {
    "tiny": Size("tiny"),
    "small": Size(
        "janus_pro_1b",
        {"vision_layers": 2, "text_layers": 2},
        "published widths, 2 layers each of encoder and text",
    ),
    "base": Size("janus_pro_1b"),
}


class JanusAdapter(FixedSizeAdapter):
    model_class = Janus
    named = _NAMED
    processor = "JanusImageProcessorPil"
