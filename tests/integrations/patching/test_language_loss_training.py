"""Patched language models in other people's training code: the Trainer, LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patched import no_logits, patched
from torch import Tensor

from mmkernels.integrations.patching.changes import Change
from mmkernels.integrations.patching.language_loss import language_loss
from mmkernels.testing.families import FAMILIES


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build()


def rows() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (6, 10), generator=g)
    return [{"input_ids": x, "labels": x.masked_fill(torch.arange(10) < 4, -100)} for x in ids]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(llama: Any, tmp_path: Path, smoothing: float) -> None:
    """Three steps with accumulated gradients, then an evaluation with metrics of the logits."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=1e-2, optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
        label_smoothing_factor=smoothing, per_device_eval_batch_size=2,
    )  # fmt: skip

    def accuracy(prediction: Any) -> dict[str, float]:
        shape = np.asarray(prediction.predictions).shape
        assert shape == (6, 10, 128)
        return {"best": float(np.asarray(prediction.predictions).argmax(-1).mean())}

    found = []
    for model in (patched(llama[0], language_loss), copy.deepcopy(llama[0])):
        trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(), compute_metrics=accuracy)
        loss = trainer.train().training_loss
        metrics = trainer.evaluate()
        found.append([loss, metrics["eval_loss"], metrics["eval_best"]])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_trainer_computes_no_logits_where_none_are_asked_for(llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        prediction_loss_only=True, bf16=True,
    )  # fmt: skip
    trainer = Trainer(patched(llama[0], language_loss), arguments, train_dataset=rows(), eval_dataset=rows())
    with no_logits():
        trainer.train()
        trainer.evaluate()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora(llama: Any, before: bool, targets: list[str]) -> None:
    """LoRA added before the patch or after it, on the head too; a trained copy of the head is patched as well."""
    peft = pytest.importorskip("peft")
    more = {"modules_to_save": ["lm_head"]} if "lm_head" not in targets else {}
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)
    inputs = llama[1] | {"labels": llama[1]["input_ids"]}
    grads = []
    for patches in (True, False):
        torch.manual_seed(0)
        model = copy.deepcopy(llama[0])
        if patches and before:
            model = patched(model, language_loss)
        model = peft.get_peft_model(model, config)
        if patches and not before and "lm_head" not in targets:
            model = patched(model, language_loss)
        assert all(isinstance(each, Change) for each in language_loss(model)) == ("lm_head" not in targets)
        model(**inputs).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)
