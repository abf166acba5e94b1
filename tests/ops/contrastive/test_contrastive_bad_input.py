"""Bad input to the contrastive ops: each message names the argument, what it must be and what it got."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from harness import SPECS, backends

import mmkernels
from mmkernels.ops.common.dtypes import wide_dtype

NAN = math.nan
THREE, FIVE, META = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, 8, device="meta")
IDS = torch.arange(3)
TARGET = torch.tensor([0, 4, 2])

GOOD: dict[str, dict[str, Any]] = {
    "info_nce": {"image": THREE, "text": THREE, "logit_scale": 10.0},
    "sigmoid_contrastive": {"image": THREE, "text": THREE, "logit_scale": 10.0, "logit_bias": -10.0},
    "retrieval_ranks": {"query": THREE, "gallery": FIVE, "target": TARGET},
}

Bad = tuple[dict[str, Any], type[Exception], str]
"""What differs from a good call, what that raises, and what the message is."""

BACKEND: Bad = ({"backend": "gpu"}, ValueError, r"backend must be one of .*, or None; got 'gpu'")

FEATURES: dict[str, Bad] = {
    "image a list": ({"image": [1.0]}, TypeError, r"image must be a tensor, got list"),
    "image 1-D": ({"image": THREE[0]}, ValueError, r"image must be \[N, d\] or \[N, Q, d\].*got shape \(8,\)"),
    "image 4-D": ({"image": THREE[None, None]}, ValueError, r"image must be .*got shape \(1, 1, 3, 8\)"),
    "no images": ({"image": THREE[:0]}, ValueError, r"image must be .*no dim of 0, got shape \(0, 8\)"),
    "no channels": ({"image": THREE[:, :0]}, ValueError, r"image must be .*no dim of 0, got shape \(3, 0\)"),
    "no queries": ({"image": torch.zeros(3, 0, 8)}, ValueError, r"image must be .*got shape \(3, 0, 8\)"),
    "image integers": ({"image": THREE.long()}, TypeError, r"image must be float16.*got torch.int64"),
    "image complex": ({"image": THREE.cfloat()}, TypeError, r"image must be float16.*got torch.complex64"),
    "text None": ({"text": None}, TypeError, r"text must be a tensor, got NoneType"),
    "text 3-D": ({"text": THREE[None]}, ValueError, r"text must be \[M >= 1, 8\].*got shape \(1, 3, 8\)"),
    "text channels": ({"text": THREE[:, :5]}, ValueError, r"text must be .*has 8 channels, got shape \(3, 5\)"),
    "no texts": ({"text": THREE[:0]}, ValueError, r"text must be \[M >= 1, 8\].*got shape \(0, 8\)"),
    "text dtype": (
        {"text": THREE.double()},
        TypeError,
        r"text must have image's dtype torch.float32, got torch.float64",
    ),
    "sparse text": (
        {"text": THREE.to_sparse()},
        TypeError,
        r"text must be a dense tensor, got one of layout torch.sparse_coo",
    ),
    "text device": ({"text": META}, ValueError, r"text must be on image's device cpu, got meta"),
    "image device": ({"image": META}, ValueError, r"text must be on image's device meta, got cpu"),
    "as many texts": ({"text": FIVE}, ValueError, r"text must have as many rows as image, 3, .*; got 5"),
    "ids of one side": ({"text": FIVE, "image_ids": IDS}, ValueError, r"text must have as many .*without .*; got 5"),
    "ids a list": ({"image_ids": [0, 1, 2]}, TypeError, r"image_ids must be a tensor, got list"),
    "ids a number": ({"text_ids": 3}, TypeError, r"text_ids must be a tensor, got int"),
    "float ids": ({"text_ids": IDS.float()}, TypeError, r"text_ids must be integers, got torch.float32"),
    "bool ids": ({"image_ids": IDS.bool()}, TypeError, r"image_ids must be integers, got torch.bool"),
    "few ids": ({"image_ids": IDS[:2]}, ValueError, r"image_ids must be \[3\], an id for each row, got shape \(2,\)"),
    "many ids": (
        {"text": FIVE, "image_ids": IDS, "text_ids": torch.arange(6)},
        ValueError,
        r"text_ids must be \[5\], an id for each row, got shape \(6,\)",
    ),
    "ids 2-D": ({"text_ids": IDS[:, None]}, ValueError, r"text_ids must be \[3\].*got shape \(3, 1\)"),
    "ids' device": ({"image_ids": IDS.to("meta")}, ValueError, r"image_ids must be on image's device cpu, got meta"),
    "backend": BACKEND,
}


HARD = {"image_ids": IDS, "hard_texts": FIVE}
_HARD_IDS = torch.arange(5)
HARD_IDS: dict[str, Bad] = {
    "hard ids a list": (HARD | {"hard_text_ids": [0]}, TypeError, r"hard_text_ids must be a tensor, got list"),
    "float hard ids": (
        HARD | {"hard_text_ids": _HARD_IDS.float()},
        TypeError,
        r"hard_text_ids must be integers, got torch.float32",
    ),
    "few hard ids": (
        HARD | {"hard_text_ids": IDS},
        ValueError,
        r"hard_text_ids must be \[5\], an id for each row, got shape \(3,\)",
    ),
    "hard ids' device": (
        HARD | {"hard_text_ids": _HARD_IDS.to("meta")},
        ValueError,
        r"hard_text_ids must be on image's device cpu, got meta",
    ),
    "hard ids without hard texts": (
        {"image_ids": IDS, "hard_text_ids": IDS},
        ValueError,
        r"hard_texts must be given with hard_text_ids, got None",
    ),
    "hard ids alone": (
        {"hard_texts": FIVE, "hard_text_ids": _HARD_IDS},
        ValueError,
        r"image_ids or text_ids must be given with hard_text_ids, .*; got None",
    ),
}


def number(name: str) -> dict[str, Bad]:
    """What a scale or bias can't be."""
    real = f"{name} must be a tensor of a real dtype, got"
    return {
        f"{name} None": ({name: None}, TypeError, rf"{name} must be a tensor of one element or a number, got NoneType"),
        f"{name} a string": ({name: "20"}, TypeError, rf"{name} must be a tensor .* or a number, got str"),
        f"{name} a bool": ({name: True}, TypeError, rf"{name} must be a tensor .* or a number, got bool"),
        f"{name} complex": ({name: 1j}, TypeError, rf"{name} must be a tensor .* or a number, got complex"),
        f"{name} huge": (
            {name: 10**400},
            ValueError,
            rf"{name} must be a number that a float can hold, got .* 1329 bits",
        ),
        f"{name} of two": ({name: torch.ones(2)}, ValueError, rf"{name} must have one element, got shape \(2,\)"),
        f"{name} of none": ({name: torch.ones(0)}, ValueError, rf"{name} must have one element, got shape \(0,\)"),
        f"{name} 2-D": ({name: torch.ones(1, 1)}, ValueError, rf"{name} must have one element, got shape \(1, 1\)"),
        f"{name} a bool tensor": ({name: torch.tensor(True)}, TypeError, f"{real} torch.bool"),
        f"{name} a complex tensor": ({name: torch.tensor(1j)}, TypeError, f"{real} torch.complex64"),
        f"{name} device": ({name: META[0, :1]}, ValueError, rf"{name} must be on image's device cpu, or .*; got meta"),
        f"{name} device, no dim": ({name: META[0, 0]}, ValueError, rf"{name} must be on image's device cpu.* got meta"),
    }


def share(name: str) -> dict[str, Bad]:
    """What a number from 0 to 1 can't be."""
    must = rf"{name} must be a number from 0 to 1, got"
    return {
        f"{name} above": ({name: 1.5}, ValueError, f"{must} 1.5"),
        f"{name} below": ({name: -1e-9}, ValueError, f"{must} -1e-09"),
        f"{name} NaN": ({name: NAN}, ValueError, f"{must} nan"),
        f"{name} a tensor": ({name: torch.tensor(0.1)}, TypeError, f"{must} Tensor"),
        f"{name} a string": ({name: "0.1"}, TypeError, f"{must} str"),
        f"{name} None": ({name: None}, TypeError, f"{must} NoneType"),
    }


BAD: dict[str, dict[str, Bad]] = {
    "info_nce": {
        **FEATURES,
        **HARD_IDS,
        **number("logit_scale"),
        **share("label_smoothing"),
        **share("image_weight"),
        "same_id": ({"same_id": "both"}, ValueError, r"""same_id must be "positive" or "ignore", got 'both'"""),
        "same_id None": ({"same_id": None}, ValueError, r"same_id must be .*, got None"),
        "reduction": ({"reduction": "avg"}, ValueError, r"""reduction must be "mean", "sum" or "none", got 'avg'"""),
        "reduction None": ({"reduction": None}, ValueError, r"reduction must be .*, got None"),
        "ignore, M != N": (
            {"text": FIVE, "image_ids": IDS, "text_ids": torch.arange(5), "same_id": "ignore"},
            ValueError,
            r"text must have as many rows as image, 3, as text i is image i's positive; got 5",
        ),
        "hard a list": ({"hard_texts": [FIVE]}, TypeError, r"hard_texts must be a tensor, got list"),
        "hard 3-D": ({"hard_texts": FIVE[None]}, ValueError, r"hard_texts must be \[\w, 8\].*got shape \(1, 5, 8\)"),
        "hard channels": ({"hard_texts": FIVE[:, :4]}, ValueError, r"hard_texts must be .*8 channels, got .*\(5, 4\)"),
        "hard dtype": (
            {"hard_texts": FIVE.half()},
            TypeError,
            r"hard_texts must have image's dtype.*got torch.float16",
        ),
        "hard device": ({"hard_texts": META}, ValueError, r"hard_texts must be on image's device cpu, got meta"),
    },
    "sigmoid_contrastive": {**FEATURES, **number("logit_scale"), **number("logit_bias")},
    "retrieval_ranks": {
        "query a list": ({"query": [1.0]}, TypeError, r"query must be a tensor, got list"),
        "query 1-D": ({"query": THREE[0]}, ValueError, r"query must be \[N, d\] .*got shape \(8,\)"),
        "query 3-D": ({"query": THREE[None]}, ValueError, r"query must be \[N, d\] .*got shape \(1, 3, 8\)"),
        "no channels": ({"query": THREE[:, :0]}, ValueError, r"query must be .*one channel, got shape \(3, 0\)"),
        "query integers": ({"query": THREE.long()}, TypeError, r"query must be float16.*got torch.int64"),
        "gallery None": ({"gallery": None}, TypeError, r"gallery must be a tensor, got NoneType"),
        "gallery 1-D": ({"gallery": FIVE[0]}, ValueError, r"gallery must be \[M >= 1, 8\].*got shape \(8,\)"),
        "gallery channels": ({"gallery": FIVE[:, :3]}, ValueError, r"gallery must be .*query has 8 channels.*\(5, 3\)"),
        "no gallery": ({"gallery": FIVE[:0]}, ValueError, r"gallery must be \[M >= 1, 8\].*got shape \(0, 8\)"),
        "gallery dtype": ({"gallery": FIVE.half()}, TypeError, r"gallery must have query's dtype.*got torch.float16"),
        "gallery device": ({"gallery": META}, ValueError, r"gallery must be on query's device cpu, got meta"),
        "target a list": ({"target": [0, 1, 2]}, TypeError, r"target must be a tensor, got list"),
        "target int32": ({"target": TARGET.int()}, TypeError, r"target must be int64, got torch.int32"),
        "target float": ({"target": TARGET.float()}, TypeError, r"target must be int64, got torch.float32"),
        "target length": ({"target": TARGET[:2]}, ValueError, r"target must be \[3\], one for .*, got shape \(2,\)"),
        "target 2-D": ({"target": TARGET[:, None]}, ValueError, r"target must be \[3\].*got shape \(3, 1\)"),
        "target device": ({"target": TARGET.to("meta")}, ValueError, r"target must be on query's device cpu, got meta"),
        "target too large": ({"target": TARGET + 1}, ValueError, r"target must be from 0 to 4, got 1 to 5"),
        "target negative": ({"target": TARGET - 1}, ValueError, r"target must be from 0 to 4, got -1 to 3"),
        "target of 33 bits": ({"target": TARGET + 2**32}, ValueError, r"target must be from 0 to 4, got 4294967296 to"),
        "backend": BACKEND,
    },
}

each_op = pytest.mark.parametrize("op", BAD)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, table in BAD.items() for name in table])
def test_bad_input(op: str, name: str) -> None:
    changes, error, message = BAD[op][name]
    with pytest.raises(error, match=f"^{message}"):
        getattr(mmkernels, op)(**GOOD[op] | changes)


@each_op
def test_what_surrounds_the_bad_input_is_good(op: str) -> None:
    assert bool(getattr(mmkernels, op)(**GOOD[op]).isfinite().all())


@each_op
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_bad_input_is_refused_before_a_backend_sees_it(op: str, backend: str) -> None:
    """A target outside of the gallery, ids that are too few: a kernel would read beyond a tensor's end."""
    changes, error, message = BAD[op]["target too large" if op == "retrieval_ranks" else "few ids"]
    with pytest.raises(error, match=f"^{message}"):
        getattr(mmkernels, op)(**GOOD[op] | changes, backend=backend)


@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
@pytest.mark.parametrize(
    "number", [7, 7.0, np.float32(7.0), np.float64(7.0), np.int64(7)], ids=lambda x: type(x).__name__
)
def test_any_number_is_a_scale(op: str, number: Any) -> None:
    good = GOOD[op] | {"image": torch.eye(3, 8), "text": torch.eye(3, 8)}
    want = getattr(mmkernels, op)(**good | {"logit_scale": torch.tensor(7.0)})
    assert torch.equal(getattr(mmkernels, op)(**good | {"logit_scale": number}), want)


ODD = [(torch.float16, ()), (torch.bfloat16, (1,)), (torch.float64, ()), (torch.float64, (1,)), (torch.int32, ())]


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("dtype", "shape"), ODD)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, of in GOOD.items() for name in of if "logit" in name])
def test_a_scale_of_another_dtype_widens_nothing(
    op: str, name: str, dtype: torch.dtype, shape: tuple[int, ...], features: torch.dtype
) -> None:
    """The value of the loss, and its dtype, are those of the number; the gradient has the scale's own dtype."""
    number = -3.0 if name == "logit_bias" else 7.0
    good = GOOD[op] | {"image": torch.eye(3, 8, dtype=features), "text": torch.eye(3, 8, dtype=features)}
    scalar = torch.full(shape, number, dtype=dtype, requires_grad=dtype.is_floating_point)
    plain = torch.tensor(number, dtype=wide_dtype(good["image"]), requires_grad=True)
    found, want = (getattr(mmkernels, op)(**good | {name: x}) for x in (scalar, plain))
    assert found.dtype == want.dtype and torch.equal(found, want)
    if dtype.is_floating_point:
        found.backward()
        want.backward()
        assert scalar.grad is not None and plain.grad is not None
        assert scalar.grad.dtype == dtype and torch.equal(scalar.grad, plain.grad.to(dtype).reshape(shape))


@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
def test_a_scale_without_a_dim_may_lie_on_the_cpu(op: str) -> None:
    """As in PyTorch's own arithmetic with tensors on a device."""
    good = GOOD[op] | {"image": META, "text": META, "logit_scale": torch.tensor(7.0)}
    assert getattr(mmkernels, op)(**good).device.type == "meta"


@pytest.mark.parametrize("backend", [x for x in backends(SPECS["retrieval_ranks"]) if x != "triton"])
def test_a_target_outside_of_the_gallery_in_compiled_code(backend: str) -> None:
    compiled = torch.compile(mmkernels.retrieval_ranks, backend="aot_eager", fullgraph=True)
    for shift in (1, -1):
        with pytest.raises(ValueError, match="target must be from 0 to 4, got"):
            compiled(**GOOD["retrieval_ranks"] | {"target": TARGET + shift}, backend=backend)


@pytest.mark.parametrize("op", ["info_nce", "sigmoid_contrastive"])
def test_unknown_arguments_are_refused(op: str) -> None:
    function, good = getattr(mmkernels, op), GOOD[op]
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        function(**good, temperature=0.1)
    with pytest.raises(TypeError, match="positional argument"):
        function(*good.values(), IDS)
