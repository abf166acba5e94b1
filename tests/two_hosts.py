"""Two hosts on one machine: network namespaces joined by a link whose bandwidth is limited. Needs no privileges.

A function of a test module runs on both, as the two ranks of a gloo group, and on rank 0 is given the `Link`:

    python two_hosts.py test_module:function '[1, 2]'

runs it in this process' network namespace as rank 0, and in another as rank 1. `run` does so within a user namespace.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

NAMES, ADDRESSES, PORT = ("host0", "host1"), ("10.9.8.1", "10.9.8.2"), 29_400
BURST, QUEUE = 2**17, "100ms"  # bytes that may pass at once; the longest that a packet waits before it is dropped
PROBE = (
    "ip link set lo up && ip link add host0 type veth peer name host1 && "
    "tc qdisc add dev host0 root tbf rate 1mbit burst 32kb latency 50ms"
)
_NAMESPACES = ["unshare", "--user", "--map-root-user", "--net"]


@functools.cache
def why_not() -> str | None:
    """Returns why this machine permits no such hosts, or None."""
    try:
        probe = subprocess.run([*_NAMESPACES, "sh", "-c", PROBE], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"network namespaces: {error}"
    return None if probe.returncode == 0 else f"network namespaces, veth and tc tbf: {probe.stderr.strip()}"


def run(function: str, *arguments: Any, timeout: float) -> Any:
    """Returns what "module:function" returned on rank 0, as JSON carries it; its arguments come after the link."""
    here = Path(__file__)
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [*_NAMESPACES, sys.executable, str(here), function, json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


class Link:
    """The link between both hosts.

    Args:
        other: process id of rank 1, whose namespace is the other host.
    """

    def __init__(self, other: int) -> None:
        self._prefixes = ([], ["nsenter", "--target", str(other), "--net"])
        _call("ip", "link", "add", NAMES[0], "type", "veth", "peer", "name", NAMES[1], "netns", str(other))
        for prefix, name, address in zip(self._prefixes, NAMES, ADDRESSES, strict=True):
            _call(*prefix, "ip", "link", "set", "lo", "up")
            _call(*prefix, "ip", "addr", "add", f"{address}/24", "dev", name)
            _call(*prefix, "ip", "link", "set", name, "up")

    def limit(self, bytes_per_second: float | None) -> None:
        """Makes each direction pass no more than this; None: as much as it can."""
        for prefix, name in zip(self._prefixes, NAMES, strict=True):
            if bytes_per_second is None:
                _call(*prefix, "tc", "qdisc", "replace", "dev", name, "root", "pfifo")
                continue
            rate = ["rate", f"{round(bytes_per_second * 8)}bit", "burst", str(BURST), "latency", QUEUE]
            _call(*prefix, "tc", "qdisc", "replace", "dev", name, "root", "tbf", *rate)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _join(rank: int) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = NAMES[rank]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{ADDRESSES[0]}:{PORT}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300),
    )


def _main() -> None:
    rank = int(os.environ.pop("HOST", "0"))
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    arguments = json.loads(sys.argv[2])
    if rank == 1:
        print("ready", flush=True)
        sys.stdin.readline()  # the link is there
        _join(1)
        function(None, *arguments)
        return
    command = ["unshare", "--net", sys.executable, *sys.argv]
    other = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"HOST": "1"}
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == "ready\n"
        link = Link(other.pid)
        other.stdin.write("go\n")
        other.stdin.flush()
        _join(0)
        result = function(link, *arguments)
        assert other.wait(60) == 0
    finally:
        other.kill()
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
