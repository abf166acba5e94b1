"""What `clip_digits.py` needs for training in several processes (ranks): starting them, and a batch norm over all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def launch(script: str, ranks: int, arguments: list[str]) -> int:
    """Runs a script in several processes of this machine by torchrun, and returns its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script]
    # torchrun sets the same where nothing is set, and warns.
    return subprocess.run([*command, *arguments], env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode


class BatchNorm(nn.BatchNorm2d):
    """Batch norm by the statistics of all ranks' images, so that ranks train as one process does.

    `nn.SyncBatchNorm` does this for GPUs; this one runs on a CPU.

    Attributes:
        group: the ranks; None: this process alone, as `nn.BatchNorm2d`.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        if self.group is None or not self.training:
            return super().forward(x)
        count = _Sum.apply(x.new_tensor(x.numel() // x.shape[1]), self.group)
        mean = _Sum.apply(x.sum((0, 2, 3)), self.group) / count
        x = x - mean[:, None, None]
        variance = _Sum.apply(x.square().sum((0, 2, 3)), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return x * factor[:, None, None] + self.bias[:, None, None]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over ranks. It is part of every rank's loss, so its gradient is the sum over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
