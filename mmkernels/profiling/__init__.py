"""Where a model's time and memory go: the profiler, and the meters and harness that it shares with the benchmarks."""

__all__ = ["BadInput"]


class BadInput(ValueError):
    """Something that a user asked for can't be done; the message is one line, for people."""
