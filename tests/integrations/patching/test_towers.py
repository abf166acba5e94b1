"""Attention of models that transformers gives no slot for: each class of the table against its own method."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import output_capturing

from mmkernels.integrations.patching import attend, classes
from mmkernels.integrations.patching.changes import Change, Known, by_class
from mmkernels.integrations.patching.tables import TABLE
from mmkernels.integrations.transformers.support_compare import float64
from mmkernels.testing.models import randomise

F64 = torch.float64


@pytest.fixture(autouse=True)
def _wide() -> Iterator[None]:
    """Also where a model asks for float32, as SAM's softmax does."""
    with float64():
        yield


WIDTH, HEADS = 24, 3
SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS}


def rows_hidden(*lengths: int, size: int) -> Tensor:
    """Returns what BERT adds to the scores where each text has a length of its own, [B, 1, 1, size]."""
    hidden = torch.arange(size) >= torch.tensor(lengths)[:, None]
    return torch.zeros(len(lengths), size, dtype=F64).masked_fill(hidden, torch.finfo(F64).min)[:, None, None]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@dataclass(frozen=True)
class Case:
    """One call of an attention of transformers.

    Args:
        make: makes the module of its class.
        draw: draws the arguments.
        dropout: the name of the module's dropout of probabilities, which is a layer or a number; "": it has none.
        weights: how one gets its weights: by an argument, by transformers' hooks, or "": not at all.
    """

    make: Callable[[Any], nn.Module]
    draw: Callable[[], dict[str, Any]]
    dropout: str = "dropout"
    weights: str = "argument"


def bert(config: str, **more: Any) -> Callable[[Any], nn.Module]:
    return lambda cls: cls(getattr(transformers, config)(**SIZES, **more))


def masked_text() -> dict[str, Any]:
    return {"hidden_states": normal(2, 7, WIDTH), "attention_mask": rows_hidden(7, 4, size=7)}


def sam(config: str, window: int, **more: Any) -> Case:
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    make = lambda cls: cls(getattr(importlib.import_module(cls.__module__), config)(**sizes), window)
    side = window or 4
    return Case(make, lambda: {"hidden_states": normal(2, side, side, WIDTH)}, **more)


def sizes_of_sam() -> Iterator[tuple[str, Case]]:
    for name, config in {
        "Sam": "SamVisionConfig",
        "SamHQ": "SamHQVisionConfig",
        "GotOcr2": "GotOcr2VisionConfig",
        "DeepseekOcr2Sam": "DeepseekOcr2SamVisionConfig",
        "UnlimitedOcrSam": "UnlimitedOcrSamVisionConfig",
        "PPFormulaNet": "PPFormulaNetVisionConfig",
        "SLANeXt": "SLANeXtVisionConfig",
    }.items():
        yield f"{name}VisionAttention", sam(config, 3 if name == "Sam" else 0, weights="hooks")
        yield f"{name}VisionSdpaAttention", sam(config, 0, dropout="", weights="")


def blip_text(cls: Any) -> nn.Module:
    return cls(transformers.BlipTextConfig(**SIZES, encoder_hidden_size=16), True, layer_idx=0)


def of_image() -> dict[str, Any]:
    mask = rows_hidden(9, 6, size=9)
    return {
        "hidden_states": normal(2, 7, WIDTH),
        "encoder_hidden_states": normal(2, 9, 16),
        "encoder_attention_mask": mask,
    }


def groupvit() -> dict[str, Any]:
    causal = torch.full((7, 7), torch.finfo(F64).min, dtype=F64).triu(1).expand(2, 1, 7, 7)
    return {"hidden_states": normal(2, 7, WIDTH), "attention_mask": causal}


def trocr(cls: Any) -> nn.Module:
    return cls(transformers.TrOCRConfig(), WIDTH, HEADS, kdim=16, vdim=16, is_cross_attention=True, layer_idx=0)


def swin(config: str) -> Case:
    """Two images of three windows, of 2 x 3 places each."""
    make = lambda cls: cls(getattr(transformers, config)(), WIDTH, HEADS, (2, 3))
    return Case(
        make, lambda: {"hidden_states": normal(6, 6, WIDTH), "attention_mask": -100.0 * normal(3, 6, 6).gt(0).double()}
    )


PERCEIVER = {"q_dim": WIDTH, "kv_dim": 10, "qk_channels": 18, "v_channels": 12, "num_heads": 3}
CASES = {
    "BlipAttention": Case(bert("BlipVisionConfig"), lambda: {"hidden_states": normal(2, 7, WIDTH)}, weights="hooks"),
    "BlipTextSelfAttention": Case(blip_text, of_image, weights="hooks"),
    "LxmertAttention": Case(
        lambda cls: cls(transformers.LxmertConfig(**SIZES), ctx_dim=16),
        lambda: {
            "hidden_states": normal(2, 7, WIDTH),
            "context": normal(2, 9, 16),
            "attention_mask": rows_hidden(9, 5, size=9),
        },
    ),
    "VisualBertSelfAttention": Case(bert("VisualBertConfig"), masked_text),
    "ViltSelfAttention": Case(bert("ViltConfig"), masked_text),
    "FlavaSelfAttention": Case(bert("FlavaTextConfig"), masked_text),
    "TvpAttention": Case(bert("TvpConfig", backbone_config={"model_type": "resnet"}), masked_text, "attn_dropout"),
    "OmDetTurboMultiheadAttention": Case(
        lambda cls: cls(None, WIDTH, HEADS, 0.0),
        lambda: {"queries": normal(2, 5, WIDTH), "keys": normal(2, 7, WIDTH), "values": normal(2, 7, WIDTH)},
    ),
    "LiltSelfAttention": Case(
        lambda cls: cls(transformers.LiltConfig(hidden_size=32, num_attention_heads=2)),
        lambda: {
            "hidden_states": normal(2, 7, 32),
            "layout_inputs": normal(2, 7, 8),
            "attention_mask": rows_hidden(7, 4, size=7),
        },
    ),
    "PerceiverSelfAttention": Case(
        lambda cls: cls(transformers.PerceiverConfig(), is_cross_attention=True, **PERCEIVER),
        lambda: {
            "hidden_states": normal(2, 5, WIDTH),
            "inputs": normal(2, 40, 10),
            "inputs_mask": rows_hidden(40, 23, size=40),
        },
    ),
    "IdeficsPerceiverAttention": Case(
        lambda cls: cls(WIDTH, HEADS, 8, True),
        lambda: {"context": normal(2, 9, WIDTH), "latents": normal(2, 4, WIDTH)},
        dropout="",
        weights="",
    ),
    "TrOCRAttention": Case(trocr, lambda: {"hidden_states": normal(2, 1, WIDTH), "key_value_states": normal(2, 9, 16)}),
    "GroupViTAttention": Case(bert("GroupViTTextConfig"), groupvit, weights="hooks"),
    "DonutSwinSelfAttention": swin("DonutSwinConfig"),
    "ClapAudioSelfAttention": swin("ClapAudioConfig"),
    "MaskFormerSwinSelfAttention": swin("MaskFormerSwinConfig"),
    **dict(sizes_of_sam()),
}


def installed() -> list[Known]:
    """Returns the rows whose classes this version of transformers has."""
    found = []
    for known in TABLE:
        try:
            importlib.import_module(known.module_name)
        except ModuleNotFoundError:
            continue
        found.append(known)
    return found


ROWS = {known.class_name: known for known in installed()}
FIRST = {known.methods["forward"]: known.class_name for known in reversed(installed())}
"""One class of each of our methods."""


def each(weights: bool = False) -> list[Any]:
    """Returns all classes as parameters; those that share a method with another are slow."""
    names = [name for name in ROWS if CASES[name].weights or not weights]
    return [pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.slow) for name in names]


def patch(model: nn.Module) -> list[str]:
    """Changes a model in place; returns the classes of what was changed."""
    changes = list(by_class(TABLE)(model))
    assert all(isinstance(change, Change) for change in changes)
    for change in changes:
        assert isinstance(change, Change)
        classes.swap(change.module, change.methods)
    return [type(change.module).__name__ for change in changes]


def both(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Returns a module as transformers has it, the same one patched, and arguments, in float64."""
    case, known = CASES[name], ROWS[name]
    torch.manual_seed(0)
    arguments = case.draw()
    cls = getattr(importlib.import_module(known.module_name), name)
    theirs = randomise(case.make(cls), std=0.3).double().eval()
    ours = copy.deepcopy(theirs)
    assert patch(ours) == [name]
    return theirs, ours, arguments


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [x for x in output if x is not None]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-12 * (1 + theirs.norm()))


@pytest.mark.parametrize("name", ROWS)
def test_results_and_gradients(name: str) -> None:
    theirs, ours, arguments = both(name)
    inputs = [x.requires_grad_() for key, x in arguments.items() if "mask" not in key]
    count = 2 if name == "LiltSelfAttention" else 1
    expected, got = (tensors(module(**arguments))[:count] for module in (theirs, ours))
    assert all(map(close, got, expected))
    grad = [torch.randn_like(x) for x in expected]
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(got, [*inputs, *ours.parameters()], grad),
        torch.autograd.grad(expected, [*inputs, *theirs.parameters()], grad),
        strict=True,
    ):
        assert close(ours_grad, theirs_grad)


@contextmanager
def recording() -> Iterator[None]:
    """What transformers does where a model is asked for ``output_attentions``."""
    token = output_capturing._active_collector.set({"attentions": [], "cross_attentions": []})
    try:
        yield
    finally:
        output_capturing._active_collector.reset(token)


def set_dropout(module: nn.Module, name: str, p: float) -> None:
    layer = getattr(module, name)
    if isinstance(layer, nn.Module):
        layer.p = p
    else:
        setattr(module, name, p)


@pytest.mark.parametrize("name", each(weights=True))
def test_weights(name: str) -> None:
    """Those that a model gives where it is asked for them, in training with dropout too."""
    theirs, ours, arguments = both(name)
    asked = {"output_attentions": True} if CASES[name].weights == "argument" else {}
    for p in (0.0, 0.25):
        for module in (theirs, ours):
            set_dropout(module.train(), CASES[name].dropout, p)
        with recording():
            torch.manual_seed(1)
            expected = theirs(**arguments, **asked)[-1]
            torch.manual_seed(1)
            got = ours(**arguments, **asked)[-1]
        if p and name == "BlipAttention":  # theirs too, by other random numbers
            assert (got == 0).any() and (expected == 0).any()
        else:
            assert close(got, expected)


@pytest.mark.parametrize("name", each())
def test_dropout_is_for_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, arguments = both(name)
    seen = set[float]()
    original = attend.attention

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.add(kwargs["dropout"])
        return original(*args, **kwargs)

    monkeypatch.setattr(attend, "attention", record)
    if CASES[name].dropout:
        set_dropout(ours, CASES[name].dropout, 0.25)
    out = ours(**arguments)
    assert seen == {0.0} and close(tensors(ours(**arguments))[0], tensors(out)[0])
    seen.clear()
    ours.train()(**arguments)
    assert seen == ({0.25} if CASES[name].dropout else {0.0})


def test_every_class_is_a_case() -> None:
    assert {known.class_name for known in TABLE} <= set(CASES)


def test_one_dropout_for_text_and_one_for_layout() -> None:
    """LiLT's two outputs have masks of their own: where one is dropped, the other need not be."""
    theirs, ours, arguments = both("LiltSelfAttention")
    for module in (theirs, ours):
        set_dropout(module.train(), "dropout", 0.9)
    text, layout = ours(**arguments)
    empty = lambda x: (x.unflatten(-1, (2, -1)) == 0).all(-1)  # a head of a token that read nothing
    assert (empty(text) != empty(layout)).any()


@pytest.mark.parametrize("name", ["PerceiverSelfAttention", "SamVisionAttention", "SamVisionSdpaAttention"])
def test_no_scores_are_kept(name: str) -> None:
    """In training, neither scores nor a table of positions lie in memory, as they do in theirs."""
    cls = getattr(importlib.import_module(ROWS[name].module_name), name)
    if name == "PerceiverSelfAttention":
        module = CASES[name].make(cls).double()
        arguments = {"hidden_states": normal(1, 40, WIDTH), "inputs": normal(1, 400, 10)}
        scores = 3 * 40 * 400
    else:
        module = cls(transformers.SamVisionConfig(**SIZES, image_size=128, patch_size=8), 0).double()
        arguments = {"hidden_states": normal(1, 16, 16, WIDTH)}
        scores = HEADS * 16**4

    def largest() -> int:
        kept = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            module(**arguments)
        return max(kept)

    assert largest() >= scores
    patch(module)
    assert largest() < scores / 3


@pytest.mark.parametrize(
    "name",
    [
        "BlipTextSelfAttention",
        "GroupViTAttention",
        "LiltSelfAttention",
        "LxmertAttention",
        "PerceiverSelfAttention",
        "TvpAttention",
        "VisualBertSelfAttention",
    ],
)
def test_a_text_without_tokens(name: str) -> None:
    """Theirs reads the mean of all keys there, and so does the patched one."""
    theirs, ours, arguments = both(name)
    mask = next(key for key in arguments if "mask" in key)
    arguments[mask] = arguments[mask].clone()
    arguments[mask][1] = torch.finfo(F64).min
    expected = tensors(theirs(**arguments))[0]
    assert close(tensors(ours(**arguments))[0], expected)
    arguments[mask][1] = 0.0  # what was read of a mask is not for another one
    assert not close(tensors(ours(**arguments))[0], expected)
