"""`patch` under what wraps models: DDP, FSDP2, PEFT, the Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import patched_on_ranks
import pytest
import ranks
import torch
import transformers
from patched_models import IDS, TEXT, close, gradients, labels, llama, objects, pair, same

from mmkernels import patch, unpatch


def test_ddp() -> None:
    assert ranks.run(2, patched_on_ranks.ddp) == [True, True]


def test_fsdp2() -> None:
    for said in ranks.run(2, patched_on_ranks.fsdp2):
        assert said.startswith("patch and unpatch must come before what made a patched module a FSDP")


def test_fsdp1() -> None:
    assert ranks.run(2, patched_on_ranks.fsdp1) == [True, True]


def _lora(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # begins as 0
                parameter.normal_()
    return wrapped


@pytest.mark.integration("peft", "accelerate")
def test_lora_before_and_after(tmp_path: Path) -> None:
    theirs, ours = pair(llama())
    after = copy.deepcopy(ours)
    expected = gradients(_lora(theirs))
    patch(ours, verbose=False)
    ours = _lora(ours)
    after = _lora(after)
    before = objects(after)
    patch(after, verbose=False)
    for model in (ours, after):
        close(gradients(model), expected, 1e-4)
        assert sum("lora" in name for name in expected) == 8
    after.zero_grad()
    after.save_pretrained(tmp_path)
    unpatch(after, verbose=False)
    assert same(objects(after), before)
    merged = ours.merge_and_unload()
    close(merged(**TEXT, labels=labels()).loss, expected["loss"], 1e-4)


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: x[index] for name, x in (TEXT | {"labels": labels()}).items()}


@pytest.mark.integration("accelerate")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_trainer(tmp_path: Path, compiled: bool) -> None:
    """The same losses, gradient norms, evaluation and weights as without `patch`."""

    def train(model: Any) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, max_steps=3, logging_steps=1, report_to=[], use_cpu=True,
            gradient_checkpointing=True, seed=0, disable_tqdm=True, eval_strategy="steps", eval_steps=3,
            torch_compile=compiled, torch_compile_backend="eager" if compiled else None, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        kinds = ("loss", "grad_norm", "eval_loss")
        history = [{kind: x[kind] for kind in kinds if kind in x} for x in trainer.state.log_history]
        return history, dict(model.state_dict()), trainer

    theirs, ours = pair(llama(num_hidden_layers=1))
    patch(ours, verbose=False)
    (expected, weights, _), (found, our_weights, trainer) = train(theirs), train(ours)
    close(found, expected, 1e-4)
    close(our_weights, weights, 1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config._attn_implementation == "sdpa"
    torch._dynamo.reset()
