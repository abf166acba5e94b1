"""`FeatureQueue`: a ring of the latest rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmkernels
from mmkernels.nn import FeatureQueue


def rows(first: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns rows ``[count, 2]`` that are their numbers, and the numbers."""
    ids = torch.arange(first, first + count)
    return ids[:, None].expand(-1, 2).to(dtype), ids


@pytest.mark.parametrize("pushes", [[2], [0, 2, 0], [5], [3, 3], [2, 2, 2, 2], [1, 12], [7, 1, 4, 5, 13, 2], [5, 5]])
def test_the_latest_rows_are_held(pushes: list[int]) -> None:
    queue, total = FeatureQueue(5, 2, ids=True), 0
    for count in pushes:
        queue.push(*rows(total, count))
        total += count
        assert queue.ids is not None
        assert sorted(queue.ids.tolist()) == list(range(max(0, total - 5), total))
        assert torch.equal(queue.features, queue.ids[:, None].expand(-1, 2).float())
    assert queue.pushed == total and queue.num_rows == min(total, 5)


def test_a_copy_and_a_file_go_on(tmp_path: Path) -> None:
    queue = FeatureQueue(5, 2)
    queue.push(rows(0, 7, torch.bfloat16)[0])
    save_file({name: x.clone() for name, x in queue.state_dict().items()}, tmp_path / "queue.safetensors")
    loaded = FeatureQueue(5, 2)
    loaded.load_state_dict(load_file(tmp_path / "queue.safetensors"))
    for other in (loaded, copy.deepcopy(queue)):
        other.push(rows(7, 2)[0])
        assert sorted(other.features[:, 0].tolist()) == [4, 5, 6, 7, 8]
    assert queue.pushed == 7 and queue.ids is None and queue.features.dtype == torch.float32
    assert FeatureQueue(5, 2).to(torch.float64).features.dtype == torch.float64


def test_an_empty_queue_changes_no_loss_and_a_push_is_seen_by_autograd() -> None:
    image, text = (torch.randn(3, 4, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (0, 1))
    queue = FeatureQueue(5, 4)
    loss = mmkernels.info_nce(image, text, 1.0, hard_texts=queue.features)
    assert torch.equal(loss, mmkernels.info_nce(image, text, 1.0))
    queue.push(text)
    assert not queue.features.requires_grad
    loss = mmkernels.info_nce(image, text, 1.0, hard_texts=queue.features)
    queue.push(text)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_waits_for_a_device() -> None:
    queue = FeatureQueue(5, 2, ids=True, device="meta")
    queue.push(torch.ones(3, 2, device="meta"), torch.ones(3, dtype=torch.long, device="meta"))
    assert queue.features.shape == (3, 2) and queue.features.is_meta


@pytest.mark.parametrize(
    ("ids", "given", "error", "message"),
    [
        (False, (torch.ones(2, 3),), ValueError, r"features must be \[K, 2\], as the queue has 2 channels, got shape"),
        (False, (torch.ones(2, 2, dtype=torch.long),), TypeError, "features must be float16"),
        (False, ([[1.0, 2.0]],), TypeError, "features must be a tensor, got list"),
        (False, (torch.ones(2, 2), torch.ones(2).long()), ValueError, "ids must be None, as .* ids=False; got"),
        (True, (torch.ones(2, 2),), ValueError, "ids must be given, as the queue was made with ids=True; got None"),
        (True, (torch.ones(2, 2), torch.ones(2)), ValueError, r"ids must be integers \[2\], one for each row, got"),
        (True, (torch.ones(2, 2), torch.ones(3).long()), ValueError, r"ids must be integers \[2\], .*int64 \(3,"),
    ],
)  # fmt: skip
def test_bad_input(ids: bool, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureQueue(5, 2, ids=ids).push(*given)


def test_bad_sizes() -> None:
    for sizes, message in (((0, 2), "size must be a positive integer, got 0"), ((2, 1.5), "dim must be .* got 1.5")):
        with pytest.raises(ValueError, match=message):
            FeatureQueue(*sizes)
