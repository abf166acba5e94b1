"""Runs a function on several ranks of this machine: processes of one gloo group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["on_ranks"]


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float) -> list[Any]:
    """Returns what the function returned on each rank.

    Each rank is a process with one thread. It inherits the packages from a server process that has loaded them, so that
    it starts in a fraction of a second.

    Args:
        count: ranks.
        function: of a module, called with `arguments` on every rank within the default group.
        timeout: seconds that a rank waits for another.

    Raises:
        RuntimeError: a rank failed; the message is its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(theirs, rank, count, str(Path(folder) / "store"), timeout, function, arguments),
                daemon=True,
            )  # fmt: skip
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            return _results(dict(enumerate(pipe for _, pipe in started)))
        finally:
            for process, pipe in started:
                pipe.close()
                process.join(0.1)
                process.terminate()
                process.join()


def _results(pipes: dict[int, Connection]) -> list[Any]:
    """Returns the ranks' results, in their order, or raises the first error."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in pipes.items() if rank not in results}
        for pipe in wait(list(waiting)):
            rank = waiting[pipe]  # type: ignore[index]
            try:
                fine, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                fine, value = False, "it ended"
            if not fine:
                raise RuntimeError(f"rank {rank} failed: {value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _run(
    pipe: Connection,
    rank: int,
    count: int,
    store: str,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's name may lead to an address that is not there
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
        )
        answer = pickle.dumps((True, function(*arguments)))  # not by the pipe: it would send handles of tensors
        dist.barrier()  # another rank may still read from this one
        dist.destroy_process_group()
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    with suppress(OSError):  # the caller has ended
        pipe.send_bytes(answer)
    os._exit(0)
