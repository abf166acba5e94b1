"""`mmkernels support --all`: its rule, its rows, and classes that hang or crash."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from mmkernels.integrations.transformers import NAME, register, sweep_table
from mmkernels.integrations.transformers.support import quiet
from mmkernels.integrations.transformers.sweep import (
    DIFFERS,
    EAGER_FAILS,
    ENDED,
    EQUAL,
    NO_ATTENTION,
    NOT_BUILT,
    REFUSED,
    RESULTS,
    Row,
    check_class,
    model_types,
    sweep,
)
from mmkernels.integrations.transformers.sweep_table import page, run_sweep
from mmkernels.interrupts import Interrupted
from mmkernels.options import BadInput
from mmkernels.testing.any_inputs import LENGTH, SHORT, candidates, padded
from mmkernels.testing.shrink import HEADS, VOCABULARY, WIDTH, shrink

DOCS = Path(__file__).parents[2] / "docs" / "support.md"


def test_the_rule_shrinks_by_name_in_every_part() -> None:
    small = shrink(
        {
            "vocab_size": 30000,
            "pad_token_id": 0,
            "image_token_id": 29999,
            "num_hidden_layers": 12,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
            "hidden_dropout_prob": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]},
            "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "num_heads": None, "fullatt": [7, 15]},
        }
    )
    assert small["vocab_size"] == VOCABULARY > small["image_token_id"] > 60 and small["pad_token_id"] == 0
    assert small["layer_types"] == ["sliding_attention", "full_attention"], "each kind stays"
    assert small["num_hidden_layers"] == 2 and small["hidden_dropout_prob"] == 0.1
    assert small["rope_parameters"]["mrope_section"] == [2, 2, 4], "as many frequencies as half a small head"
    assert small["vision_config"]["hidden_size"] == WIDTH and small["vision_config"]["num_attention_heads"] == HEADS
    assert small["vision_config"]["num_heads"] is None and small["vision_config"]["fullatt"] == [7, 15]


@pytest.mark.parametrize(("heads", "kv_heads", "expected"), [(32, 32, HEADS), (32, 8, 2)])
def test_grouped_queries_stay_grouped(heads: int, kv_heads: int, expected: int) -> None:
    small = shrink({"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    assert small == {"num_attention_heads": HEADS, "num_key_value_heads": expected}


def test_inputs_follow_from_the_names_of_arguments() -> None:
    config = transformers.LlamaConfig(**shrink(transformers.LlamaConfig().to_dict()))
    (inputs,) = candidates(transformers.LlamaForCausalLM(config))
    assert inputs["input_ids"].shape == (2, LENGTH) and bool((inputs["input_ids"][:, -1] == config.eos_token_id).all())
    for side, first in (("left", 0), ("right", 1)):
        mask = padded(inputs, side)["attention_mask"]
        assert mask.sum(1).tolist() == [LENGTH, SHORT] and int(mask[1, 0]) == first
    images = next(
        candidates(transformers.ViTModel(transformers.ViTConfig(**shrink(transformers.ViTConfig().to_dict()))))
    )
    assert images["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("model_type", "result", "note"),
    [
        ("llama", EQUAL, ""),
        ("bart", EQUAL, ""),
        ("splinter", EQUAL, ""),  # its modules don't say whether they are causal
        ("gemma2", REFUSED, "no cap on the scores"),
        ("git", REFUSED, "applies the attention mask itself (add)"),
        ("bloom", REFUSED, "BloomAttention of transformers.models.bloom: it has no attention interface"),
        ("longcat_flash", EQUAL, ""),  # its attention is called LongcatFlashMLA
        ("mamba", NO_ATTENTION, ""),
        ("bros", EAGER_FAILS, "bbox"),
        ("bit", NOT_BUILT, "num_groups"),
    ],
)
def test_a_class_is_found_to_be(model_type: str, result: str, note: str) -> None:
    ((model_type, name),) = model_types([model_type])
    row = check_class(model_type, name)
    assert (row.result, row.model) == (result, name) and note in row.note
    cells = {row.forward, row.gradients}
    assert cells == ({"yes"} if result == EQUAL else {"-"})
    if model_type in ("llama", "longcat_flash"):
        assert {row.left, row.right, row.loading, row.generation} == {"yes"}


def test_a_wrong_attention_is_a_row_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    mapping = transformers.AttentionInterface._global_mapping
    right = mapping[NAME]

    def wrong(*args, **kwargs):  # type: ignore[no-untyped-def]
        out, weights = right(*args, **kwargs)
        return out * 1.001, weights

    monkeypatch.setattr("mmkernels.integrations.transformers.support.register", lambda: None)
    monkeypatch.setitem(mapping, NAME, wrong)
    row = check_class("vit", "ViTModel")
    assert row.result == DIFFERS and (row.forward, row.gradients) == ("no", "no")
    assert "error" in row.note and "allowed" in row.note


def test_every_model_type_has_a_class() -> None:
    known = model_types()
    assert len(known) > 300 and known == sorted(known)
    assert ("llama", "LlamaForCausalLM") in known and ("vit", "ViTModel") in known
    with pytest.raises(BadInput, match=r"model type must be one that transformers .* has, got 'lama'"):
        model_types(["llama", "lama"])


# In processes.


def pretend(model_type: str, name: str) -> Row:
    """Behaves as the model type says, in a process of its own."""
    if model_type == "hangs":
        time.sleep(600)
    if model_type == "crashes":
        os.abort()
    if model_type == "takes all memory":
        torch.ones(2**40)
    if model_type == "talks":
        print("out of place")
    return Row(model_type, name, EQUAL)


@pytest.mark.slow  # five processes that import transformers, and half a minute of hanging
def test_a_class_that_hangs_crashes_or_takes_all_memory_is_a_row(capfd: pytest.CaptureFixture[str]) -> None:
    kinds = ["hangs", "crashes", "takes all memory", "talks", "works"]
    begun: list[str] = []
    rows = list(sweep([(kind, "Model") for kind in kinds], begun.append, workers=5, seconds=30.0, check=pretend))
    found = {row.model_type: row for row in rows}
    assert begun == kinds and found.keys() == set(kinds)
    assert {kind: row.result for kind, row in found.items()} == dict.fromkeys(kinds[:3], ENDED) | {
        "talks": EQUAL,
        "works": EQUAL,
    }
    assert found["hangs"].note == "took more than 30 seconds"
    assert "exit code -6" in found["crashes"].note and "exit code 1" in found["takes all memory"].note
    assert "out of place" not in capfd.readouterr().out


def test_leaving_the_loop_ends_the_processes() -> None:
    started = time.monotonic()
    rows = sweep([("works", "Model"), ("hangs", "Model")], workers=2, seconds=300.0, check=pretend)
    assert next(rows).model_type == "works"
    rows.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 200


# The page.

ROWS = [
    Row("zeta", "ZetaModel", REFUSED, note="of a | b"),
    Row("alpha", "AlphaForCausalLM", EQUAL, *["yes"] * 6),
    Row("beta", "BetaModel", DIFFERS, "no", note="forward: error 1, allowed 0"),
]


def test_the_page_is_sorted_and_counted() -> None:
    text = page(ROWS, len(ROWS))
    cells = ["yes"] * 6 + ["-"] * 8
    assert f"| alpha | AlphaForCausalLM | equal | {' | '.join(cells)} |  |" in text
    assert f"| zeta | ZetaModel | refused | {' | '.join(['-'] * 14)} | of a \\| b |" in text
    assert text.index("| alpha |") < text.index("| beta |") < text.index("| zeta |")
    assert "| equal | 1 |" in text and "| ended | 0 |" in text and "Interrupted" not in text
    assert f"transformers {transformers.__version__}" in text and "mmkernels support --all --out" in text
    assert "times as fast" not in text.split("Found on")[1], "nothing was measured"


def test_the_page_has_the_middle_of_the_speeds() -> None:
    speeds = ("0.50, 1.00", "1.25, 1.50", "9.00, 2.00")
    text = page([replace(ROWS[1], model_type=speed, speed=speed) for speed in speeds] + ROWS, 6)
    assert "Half of the 3 measured types are at least 1.25 times as fast after `patch` in a forward pass, and" in text
    assert "1.50 times in a training step" in text and "mmkernels support --all --measure --out" in text


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_command_writes_what_it_has(interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(chosen: object, advance: object, check: object) -> Iterator[Row]:
        yield from ROWS[:2]
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep_table, "sweep", found)
    out = tmp_path / "new" / "support.md"
    if interrupted:
        with pytest.raises(Interrupted, match=f"^2 of 3 model types are in {out}$"):
            run_sweep(["llama", "vit", "bert"], out)
        assert "Interrupted after 2 of 3 model types" in out.read_text()
    else:
        assert run_sweep(["llama", "vit"], out)
    assert "| alpha |" in out.read_text() and "| zeta |" in out.read_text()


def test_the_page_of_the_docs_is_whole_and_nothing_in_it_differs() -> None:
    text = DOCS.read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.count(" | ") >= 9]
    rows = [line for line in lines if line[0] not in ("| model type", "| ---")]
    counted = Counter(line[2] for line in rows)
    said = {name: int(number) for name, number in re.findall(r"^\| ([a-z ]+) \| (\d+) \|", text, re.MULTILINE)}
    assert said == {result: counted[result] for result in RESULTS} and said[DIFFERS] == 0
    assert said[EQUAL] > 300 and "Interrupted" not in text
    assert [line[0] for line in rows] == sorted(line[0] for line in rows)
    others = {line[0].strip("| "): line[9:11] for line in rows if line[2] == "equal" and line[9:11] != ["1", "0"]}
    assert others == {"diffllama": ["2", "0"], "jetmoe": ["1", "1"]}, "two attentions by design; experts in attention"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield
