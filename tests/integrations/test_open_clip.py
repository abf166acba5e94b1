"""open_clip's losses by their names: CoCa's beside open_clip's own, and what a training script imports."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip_on_ranks as on_ranks
import pytest
import ranks
import torch
import torch.nn.functional as F
from nn.open_clip_loss import open_clip, why_not
from torch import nn

from mmkernels.integrations.open_clip import ClipLoss, CoCaLoss, SigLipLoss, create_loss, create_task, replace_loss

needs_open_clip = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("pad", [0, 3])
def test_coca_against_the_formula(pad: int) -> None:
    (image, text, logits, scale), labels = on_ranks.inputs(1)
    found = CoCaLoss(2.0, 0.5, pad_id=pad)(image, text, logits, labels, scale)
    scores, rows = scale * image @ text.T, torch.arange(on_ranks.PAIRS)
    contrastive = (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2
    words = labels != pad
    caption = -logits.log_softmax(-1).gather(2, labels[..., None])[..., 0][words].mean()
    torch.testing.assert_close(found, (0.5 * contrastive, 2.0 * caption))


def test_coca_without_a_contrastive_loss() -> None:
    (image, text, logits, scale), labels = on_ranks.inputs(1)
    contrastive, caption = CoCaLoss(1.0, 0.0)(image, text, logits, labels, scale)
    assert contrastive.dtype == torch.int64 and int(contrastive) == 0 and float(caption) > 0


def test_cocas_signature_is_open_clips() -> None:
    """As of open_clip 4.2, and `use_horovod`, which 3.x has."""
    names = list(inspect.signature(CoCaLoss).parameters)
    assert names == [
        "caption_loss_weight", "clip_loss_weight", "pad_id", "local_loss", "gather_with_grad", "cache_labels", "rank",
        "world_size", "use_horovod",
    ]  # fmt: skip
    forward = list(inspect.signature(CoCaLoss(1.0, 1.0).forward).parameters)
    assert forward == ["image_features", "text_features", "logits", "labels", "logit_scale", "output_dict"]


@needs_open_clip
def test_cocas_arguments_are_those_of_the_release() -> None:
    for method in ("__init__", "forward"):
        theirs, ours = (
            [(x.name, x.default) for x in inspect.signature(getattr(module, method)).parameters.values()]
            for module in (open_clip().CoCaLoss, CoCaLoss)
        )
        assert ours == theirs


@needs_open_clip
@pytest.mark.parametrize("world", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))])
def test_coca_beside_open_clip(world: int) -> None:
    if world == 1:
        on_ranks.beside_open_clip(0, 1)
    else:
        ranks.run(world, on_ranks.beside_open_clip, world)


def options(**changed: Any) -> SimpleNamespace:
    """Returns options as open_clip 4.x parses them; 3.x has `horovod` too."""
    return SimpleNamespace(
        **{
            "model": "ViT-B-32", "distill": False, "siglip": False, "local_loss": True, "gather_with_grad": True,
            "rank": 1, "world_size": 2, "loss_dist_impl": "gather", "coca_caption_loss_weight": 2.0,
            "coca_contrastive_loss_weight": 0.5, **changed,
        }
    )  # fmt: skip


@needs_open_clip
@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, ClipLoss),
        ({"siglip": True}, SigLipLoss),
        ({"model": "coca_ViT-B-32"}, CoCaLoss),
        ({"horovod": False}, ClipLoss),
    ],
)
def test_create_loss_has_the_options_of_open_clips(changed: dict[str, Any], kind: type[nn.Module]) -> None:
    """It and the replacement of the module that open_clip would make have the same options."""
    args = options(**changed)
    loss = create_loss(args)
    theirs = getattr(open_clip(), kind.__name__)
    shared = {name: getattr(args, name) for name in ("local_loss", "gather_with_grad", "rank", "world_size")}
    if kind is SigLipLoss:
        made = theirs(rank=1, world_size=2, dist_impl="gather")
    elif kind is CoCaLoss:
        made = theirs(caption_loss_weight=2.0, clip_loss_weight=0.5, cache_labels=True, **shared)
    else:
        made = theirs(cache_labels=True, **shared)
    replaced = replace_loss(made.eval())
    assert type(loss) is type(replaced) is kind and not replaced.training
    kept = [name for name, value in vars(loss).items() if isinstance(value, (bool, int, float, str))]
    assert {"rank", "world_size"} < set(kept)
    for name in set(kept) - {"training"}:
        assert getattr(replaced, name) == getattr(loss, name) == getattr(made, name, getattr(loss, name)), name


def test_what_stays() -> None:
    """Others' modules, a class derived from open_clip's, and its losses that need the logits."""

    class Derived(nn.Module):
        pass

    Derived.__module__ = "open_clip.loss"
    for loss in (nn.MSELoss(), ClipLoss(), Derived()):
        assert replace_loss(loss) is loss


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for the package open_clip, of which a training script imports its two functions."""
    stub = ModuleType("open_clip")
    monkeypatch.setitem(sys.modules, "open_clip", stub)
    return stub


def test_losses_that_stay_open_clips(package: ModuleType) -> None:
    package.create_loss = lambda args: nn.Identity()  # type: ignore[attr-defined]
    for args in (options(distill=True), options(model="genlip_vit_b"), options(model="genlap_vit_b")):
        assert type(create_loss(args)) is nn.Identity


@needs_open_clip
def test_create_task(package: ModuleType) -> None:
    """open_clip 4.x makes a task that holds the loss; one for evaluation holds none."""
    theirs = open_clip()

    def task(args: Any, model: nn.Module, dist_model: Any = None, **kwargs: Any) -> nn.Module:
        made = nn.Module()
        made.model, made.asked = model, (dist_model, kwargs)
        if args is not None:
            made.loss = theirs.ClipLoss(local_loss=args.local_loss)
        return made

    package.create_task = task  # type: ignore[attr-defined]
    made = create_task(options(), nn.Identity(), None, naflex_data_config="data")
    assert type(made.loss) is ClipLoss and made.loss.local_loss and made.asked == (None, {"naflex_data_config": "data"})
    assert not hasattr(create_task(None, nn.Identity()), "loss")
    del package.create_task
    with pytest.raises(ImportError, match="create_task needs open_clip 4, got an older one"):
        create_task(options(), nn.Identity())
