"""Groups of processes (torch.distributed) that compute one result: what they must agree on, and how tensors pass.

Every call over a group begins with `agree`, where each rank says what it is about to do. So ranks that disagree, and
ranks whose partner has bad input, all raise an error instead of waiting for each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MESSAGE_BYTES = 2048  # what one rank says in `agree`
_OPERATION = "call"  # the name under which ranks agree on what they call


class GroupError(RuntimeError):
    """A rank of a group did not answer: it has died, is late by more than the group's timeout, or made another call.
    Or the group itself was destroyed between forward and backward.

    The group can't be used any more: messages of the call that failed may still be under way.
    """


def check_group(group: object, device: torch.device | None = None) -> str:
    """Returns the name of a process group, by which it crosses an op's boundary.

    Args:
        group: a ``torch.distributed.ProcessGroup``.
        device: of the tensors that are to be passed; None: not known yet.

    Raises:
        TypeError: it is no process group. ValueError: it is not initialised, this process is not in it, or it can't
            pass tensors of the device.
    """
    dist = torch.distributed
    must = "a torch.distributed.ProcessGroup that this process belongs to, or None for this process alone"
    if not dist.is_available():
        raise ValueError(f"group must be None: this torch {torch.__version__} is built without torch.distributed")
    if group is dist.GroupMember.NON_GROUP_MEMBER or (isinstance(group, int) and group == -100):
        raise ValueError(f"group must be {must}; this process is not a member of the one that was given")
    if not isinstance(group, dist.ProcessGroup):
        hint = ": pass mesh.get_group()" if type(group).__name__ == "DeviceMesh" else ""
        raise TypeError(f"group must be {must}, got {type(group).__name__}{hint}")
    if not dist.is_initialized():
        raise ValueError("group must be initialised, by torch.distributed.init_process_group")
    name: str = group.group_name
    if device is not None and not torch.compiler.is_compiling():
        try:
            group._get_backend(device)
        except (RuntimeError, KeyError):
            raise ValueError(
                f"group must have a backend that passes tensors on {device.type}, as the features are there; "
                f"it has {dist.get_backend_config(group)}"
            ) from None
    return name


def told_to_group(error: Exception, name: str, call: str, like: object) -> None:
    """Tell the other ranks, which wait in `Group.agree`, that this rank's arguments are bad.

    Args:
        error: which the caller then raises.
        name: of the group.
        call: what the others compute.
        like: a tensor on the device of theirs, if it is one.
    """
    if torch.compiler.is_compiling():
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():  # transforms would wrap the message's tensors
        Group(name, call, like.device if isinstance(like, Tensor) else None).report(error)


class Group:
    """A process group at work on one call.

    Args:
        name: as `check_group` returns it.
        call: what is computed, for errors.
        device: of the tensors; None: one whose tensors the group can pass.
    """

    def __init__(self, name: str, call: str, device: torch.device | None = None) -> None:
        from torch.distributed import distributed_c10d

        self.call = call
        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        try:
            self.process_group = resolve(name)
        except (RuntimeError, LookupError):
            raise GroupError(f"{call}: the process group {name!r} has been destroyed since forward") from None
        able = self.process_group._device_types
        self.device = device if device is not None and torch.device(device.type) in able else able[-1]
        self.rank, self.size = self.process_group.rank(), self.process_group.size()
        self._exchanges = 0

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.size

    # What all ranks say.

    def agree(self, same: Mapping[str, Any], own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns what each rank says in `own`, in the order of ranks.

        On an accelerator this waits for the device.

        Args:
            same: what must be the same on every rank, by the name of the argument: numbers, strings, booleans, None.
            own: what may differ.

        Raises:
            ValueError: ranks differ in `same`, or a rank reported an error of its own. All ranks raise it.
            GroupError: a rank did not answer.
        """
        said = self._gather({"same": {_OPERATION: self.call, **same}, "own": dict(own)})
        for rank, message in enumerate(said):
            if "error" in message:
                raise ValueError(f"{self.call}: rank {rank} of the group has bad input: {message['error']}")
        for rank, message in enumerate(said[1:], 1):
            first, other = said[0]["same"], message["same"]
            for name in (_OPERATION, *first):
                # As text: NaN is the same as NaN.
                if repr(first[name]) != repr(other.get(name)):
                    raise ValueError(
                        f"{self.call}: {name} must be the same on every rank of the group, got {first[name]!r} on "
                        f"rank 0 and {other.get(name)!r} on rank {rank}"
                    )
        return [message["own"] for message in said]

    def _gather(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(message, ensure_ascii=False).encode(errors="replace")
        assert len(text) <= _MESSAGE_BYTES, "what is said must be short"
        mine = torch.frombuffer(bytearray(text.ljust(_MESSAGE_BYTES)), dtype=torch.uint8).to(self.device)
        return [json.loads(x.tobytes()) for x in self.gather(mine).cpu().numpy()]

    def report(self, error: Exception) -> None:
        """Say in place of `agree` that this rank's arguments are bad. The caller then raises the error."""
        text = f"{type(error).__name__}: {error}"
        with suppress(GroupError):  # this rank's own error says more
            self._gather({"error": text[: _MESSAGE_BYTES // 8]})  # a letter takes up to six bytes

    # What is summed.

    def gather(self, x: Tensor) -> Tensor:
        """Returns [ranks, ...], each rank's x, in the order of ranks."""
        found = x.new_empty(self.size, *x.shape)
        with self._waits("all ranks"):
            torch.distributed.all_gather(list(found.unbind()), x.contiguous(), group=self.process_group)
        return found

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of each rank's x, by the order of ranks, so that all ranks get the same bits."""
        return self.gather(x).sum(0)

    # What passes round the ring.

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Exchange:
        """Begin to send tensors to the next rank and to receive tensors from the previous one.

        Every rank must make the same number of exchanges, in the same order. Empty tensors are not passed.

        Args:
            send: contiguous; must not be written until the exchange has ended.
            receive: contiguous, which the exchange writes.
        """
        dist = torch.distributed
        self._exchanges += 1
        gloo = not self.process_group._get_backend(self.device).supports_coalescing
        tag = self._exchanges % 2**16 * 16 if gloo else 0
        # Receives first: of 2 ranks both directions share gloo's one connection, and where sends come first "ready to
        # receive" waits behind their data, at half the bandwidth.
        plan = [
            dist.P2POp(kind, x, group=self.process_group, group_peer=peer, tag=tag + place if gloo else 0)
            for kind, tensors, peer in ((dist.irecv, receive, self.previous), (dist.isend, send, self.next))
            for place, x in enumerate(tensors)
            if x.numel()
        ]
        with self._waits(f"ranks {self.previous} and {self.next}"):
            works = dist.batch_isend_irecv(plan) if plan else []
        return Exchange(self, works, [op.group_peer for op in plan], (*send, *receive))

    @contextmanager
    def _waits(self, whom: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise GroupError(
                f"{self.call}: rank {self.rank} of {self.size} waited for {whom} in vain. A rank has died, is late by "
                "more than the group's timeout, or did not make the same call, forward or backward. Begin again with "
                f"a new group. ({reason})"
            ) from error


class Exchange:
    """Tensors that are under way; see `Group.exchange`."""

    def __init__(self, group: Group, works: Sequence[Any], peers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self._group, self._works, self._peers = group, works, peers
        self._tensors = tensors  # kept alive

    def wait(self) -> None:
        """Wait until what was sent may be written and what was received may be read.

        Raises:
            GroupError: a neighbour did not answer.
        """
        for n, work in enumerate(self._works):
            whom = f"rank {self._peers[n]}" if len(self._works) == len(self._peers) else "its neighbours"
            with self._group._waits(whom):
                work.wait()
        self._works, self._tensors = (), ()


# Pieces of every rank's rows that visit every rank.


class Piece(NamedTuple):
    """Rows of one rank, `start` to `stop` of its own, which visit this rank."""

    owner: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


Visit = Callable[[Piece, list[Tensor]], list[Tensor] | None]
"""(a piece, its tensors) -> what this rank adds to the piece's results; None: nothing."""


def circulate(
    group: Group,
    counts: Sequence[int],
    rows: int,
    tensors: Sequence[Tensor],
    visit: Visit,
    *,
    empty: Callable[[int], list[Tensor]] = lambda count: [],
    merge: Callable[[list[Tensor], list[Tensor]], list[Tensor]] | None = None,
    home: Callable[[slice, list[Tensor]], None] | None = None,
) -> None:
    """Let each piece of all ranks' rows visit every rank once; transfers overlap with what `visit` computes.

    Of a piece the tensors pass on while it is computed with, and what ranks add to its results follows; at last the
    results return to the piece's owner. A rank holds three pieces at a time, whatever its own rows are.

    Args:
        counts: each rank's rows.
        rows: of a piece.
        tensors: this rank's, [its rows, ...]; the same dtypes and further sizes on every rank.
        empty: rows of a piece -> its results where nothing has been added, of shapes and dtypes as `visit` returns.
        merge: (results, what is added) -> results.
        home: called with some of this rank's rows and their results.
    """
    for start in range(0, max(counts, default=0), rows):
        _circulate(group, counts, slice(start, start + rows), tensors, visit, empty, merge, home)


def _circulate(
    group: Group,
    counts: Sequence[int],
    at: slice,
    tensors: Sequence[Tensor],
    visit: Visit,
    empty: Callable[[int], list[Tensor]],
    merge: Callable[[list[Tensor], list[Tensor]], list[Tensor]] | None,
    home: Callable[[slice, list[Tensor]], None] | None,
) -> None:
    """One piece of each rank, the rows `at`."""

    def piece(step: int) -> Piece:
        owner = (group.rank - step) % group.size
        return Piece(owner, min(at.start, counts[owner]), min(at.stop, counts[owner]))

    now = piece(0)
    held = [x[now.start : now.stop].contiguous() for x in tensors]
    results, coming = empty(now.rows), None
    for step in range(group.size):
        after = piece(step + 1)
        passing, following = None, held
        if step + 1 < group.size:
            following = [x.new_empty(after.rows, *x.shape[1:]) for x in held]
            passing = group.exchange(held, following)
        added = visit(now, held) if now.rows else None
        if coming is not None:
            coming.wait()
        if added is not None and merge is not None:
            results = merge(results, added)
        if group.size > 1:
            received = empty(after.rows)
            coming = group.exchange(results, received)
            results = received
        if passing is not None:
            passing.wait()
        now, held = after, following
    if coming is not None:
        coming.wait()
    if home is not None and now.rows:
        home(slice(now.start, now.stop), results)
