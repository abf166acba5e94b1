"""How a command ends that is interrupted: with one line that says so, and with the exit code that shells expect."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "ends_well", "interruptible"]


class Interrupted(Exception):
    """A command was interrupted, and has written what it had measured; the message says what is kept."""


def interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a command that raises `Interrupted` in place of KeyboardInterrupt, which parsers of arguments catch."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted from None

    return run


@contextmanager
def ends_well(program: str, kept: str = "") -> Iterator[None]:
    """Ends the process with one line and exit code 130 if Ctrl-C comes inside of the block, and 143 if SIGTERM does.

    SIGTERM raises KeyboardInterrupt too, so that code which keeps its results has one kind of end to care for.

    Args:
        program: the start of the line.
        kept: what is kept, where no `Interrupted` says it.
    """
    code = 128 + signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal code
        code = 128 + number
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # only there Python sets handlers
    handled = in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if handled:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        print("; ".join(filter(None, (f"{program}: interrupted", str(error) or kept))), file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
