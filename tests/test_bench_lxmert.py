"""The rows of the models' benchmark about LXMERT, on tiny layers."""

from dataclasses import replace
from functools import partial

import models_lxmert as lxmert
import pytest
import torch
from models_measure import Row, Trial
from models_targets import SDPA
from test_bench_models import _quick, measured

from mmkernels.targets import OURS

__all__ = ["_quick"]  # a fixture that every test here uses

TINY = partial(lxmert.lxmert, hidden_size=32, num_attention_heads=4, intermediate_size=64)
INPUTS = partial(lxmert._pairs, batch=3, words=6, boxes=5)
FORWARD, _, STEP = (replace(case, pair=TINY, inputs=INPUTS) for case in lxmert.LXMERT_CASES)


@pytest.mark.parametrize("case", [FORWARD, STEP], ids=["forward", "training step"])
def test_a_layer_is_compared_by_its_features_and_gradients(case: lxmert.Case) -> None:
    info = measured(case)
    assert len(info["distances"][OURS]) == (4 if case is STEP else 2) and max(info["distances"][OURS]) < 1e-5
    attention = info["attention"]
    assert attention["calls"] == attention["layers"] == 3 and attention["sdpa_calls"] == 0
    assert "ratio" not in attention  # transformers' class has no call that could be timed
    found = {target["than"]: target["found"] for target in info["targets"]}
    assert found == {
        "share of cap": info["amdahl"]["share_of_cap"],
        "time, transformers'": info["peers"][SDPA]["ratio"],
    }


def test_words_are_padded_and_both_models_hide_the_padding() -> None:
    trial = Trial(Row(FORWARD, "fp32"))
    inputs = trial._inputs[""]
    assert inputs["valid"].sum(1).tolist()[0] == 6 and not inputs["valid"].all()
    results = trial.results(OURS), trial.results(SDPA)
    inputs["text"][~inputs["valid"]] = 1e3
    for before, name in zip(results, (OURS, SDPA), strict=True):
        for x, y in zip(before, trial.results(name), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_a_step_computes_the_gradient_of_every_weight_of_the_layer() -> None:
    trial = Trial(Row(STEP, "fp32"))
    for name, net in ((OURS, trial.ours), (SDPA, trial.theirs)):
        trial.results(name)
        trained = {part for part, x in net.named_parameters() if x.grad is not None}
        assert trained == {
            part for part, _ in net.named_parameters() if part.startswith(("cross_blocks", "encoder.x_"))
        }


def test_rows_have_the_published_sizes() -> None:
    from transformers import LxmertConfig

    config = LxmertConfig(**lxmert._ONE_LAYER)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 12, 3072)
    names = [str(Row(case, "fp32")) for case in lxmert.LXMERT_CASES]
    assert len(set(names)) == len(names) == 3
