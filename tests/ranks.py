"""Functions run on several ranks: real processes, joined by gloo on this machine.

Processes are forked from one that has imported torch and has started no thread, so that a rank begins in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
import torch.distributed as dist
from op_runs import watch_storage


class Outcome(NamedTuple):
    """How a rank ended.

    Args:
        value: what its function returned.
        error: of its function, None if there was none.
        trace: the error's traceback as text.
        seconds: that the function took.
        died: whether the process ended without an answer.
    """

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    seconds: float = 0.0
    died: bool = False


_CONTEXT = multiprocessing.get_context("forkserver")
# What ranks would import, some of it when first used.
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel", "mmkernels", "harness"]
)


def _start() -> None:
    """Start the process that is forked. It finds modules of the tests by the environment alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 20.0, limit: float = 120.0) -> list[Any]:
    """Returns what ``function(rank, *args)`` returns on each rank.

    Args:
        function: of a module, which the processes import.
        timeout: of the group, in seconds.
        limit: after so many seconds the processes are ended.

    Raises:
        AssertionError: a rank raised an error, died, or took longer than `limit`.
    """
    ended = outcomes(world, function, *args, timeout=timeout, limit=limit)
    for rank, outcome in enumerate(ended):
        assert not outcome.died, f"rank {rank} ended without an answer"
        assert outcome.error is None, f"rank {rank}: {outcome.trace}"
    return [outcome.value for outcome in ended]


def outcomes(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 20.0, limit: float = 120.0
) -> list[Outcome]:
    """Returns how ``function(rank, *args)`` ended on each rank; see `run`."""
    _start()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            values = (rank, world, Path(folder) / "store", timeout, theirs, harness.settings, function, args)
            process = _CONTEXT.Process(target=_rank, args=values, daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _answers([ours for _, ours in ranks], limit)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _answers(pipes: Sequence[Connection], limit: float) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    end = time.monotonic() + limit
    while len(found) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
        silent = [rank for rank in range(len(pipes)) if rank not in found]
        assert ready, f"ranks {silent} gave no answer within {limit} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                found[pipes.index(pipe)] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                found[pipes.index(pipe)] = Outcome(died=True)
    return [found[rank] for rank in range(len(pipes))]


def _rank(
    rank: int,
    world: int,
    store: Path,
    timeout: float,
    pipe: Connection,
    settings: harness.Settings,
    function: Callable[..., Any],
    args: Any,
) -> None:
    harness.settings.seed, harness.settings.thorough = settings.seed, settings.thorough
    torch.set_num_threads(1)
    watch_storage()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    begin = time.perf_counter()
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        begin = time.perf_counter()
        outcome = Outcome(value=function(rank, *args))
    except BaseException as error:
        outcome = Outcome(error=_plain(error), trace=traceback.format_exc())
    outcome = outcome._replace(seconds=time.perf_counter() - begin)
    pipe.send_bytes(pickle.dumps(outcome))
    if outcome.error is None:
        with suppress(RuntimeError, ValueError):  # another rank has ended with an error, or there is no group now
            dist.barrier()  # another rank may still read from this one
    os._exit(0)


def _plain(error: BaseException) -> BaseException:
    """Returns the error if another process can have it, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
