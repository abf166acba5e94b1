"""What the host CPU offers: `isa()`, `cache_sizes()`, `physical_cores()`, `compiler()`.

The C++ extension answers; where it is not built, Python does, and `why_not` says why it isn't (else it is None).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["cache_sizes", "compiler", "isa", "physical_cores", "why_not"]

why_not: str | None = None

try:
    from mmkernels._host import cache_sizes, compiler, isa, physical_cores
except ImportError as error:
    from mmkernels.runtime.host_fallback import cache_sizes, compiler, isa, physical_cores

    _reason = Path(__file__).parents[1] / "_host_why_not.txt"  # left by setup.py
    why_not = (
        f"the host extension is not built: {_reason.read_text().strip() if _reason.exists() else error}; "
        "install again with a C++ compiler to build it"
    )
