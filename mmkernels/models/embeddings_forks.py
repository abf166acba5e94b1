"""An `EmbeddingCache` in a forked process.

LanceDB crashes or hangs now and then in a process that was forked from one that had loaded it (0.40: in 1 to 17 of 100
forks, also where the parent makes no call). So there its calls are made in a fresh process, which is started at the
first of them and ends with the process that uses it. OpenMP has none of its threads after a fork, and PyTorch would
wait for them for good: it uses one thread there.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import mmkernels.models.embeddings_forks as m; m.serve()"
)
_forked = False
_without_lance = False
_other: Connection | None = None  # the fresh process


def _in_child() -> None:
    global _forked, _without_lance, _other
    _forked, _without_lance, _other = True, _without_lance or "lancedb" in sys.modules, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class one_thread_if_forked:
    """PyTorch on one thread in a forked process."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        if _forked and self._threads > 1:
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if _forked and self._threads > 1:
            torch.set_num_threads(self._threads)


def calls_lance(method: F) -> F:
    """A method that runs in a fresh process if this one can't call LanceDB; with its object, whose state comes back."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any) -> Any:
        global _other
        if not _without_lance:
            return method(self, *arguments)
        if _other is None:
            _other, theirs = multiprocessing.Pipe()
            command = [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)]
            subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
        try:
            _other.send_bytes(pickle.dumps((self, method.__name__, arguments)))
            result, error, state = pickle.loads(_other.recv_bytes())
        except (EOFError, OSError) as lost:
            _other = None
            raise RuntimeError("the process that calls LanceDB for this forked one has ended") from lost
        self.__setstate__(state)
        if error is not None:
            raise error
        return result

    return run  # type: ignore[return-value]


def serve() -> None:
    """Makes calls for the process at the other end of the pipe, until that ends."""
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            store, name, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        result, error = None, None
        try:
            result = getattr(store, name)(*arguments)
        except Exception as raised:
            error = raised
        pipe.send_bytes(pickle.dumps((result, error, store.__getstate__())))
