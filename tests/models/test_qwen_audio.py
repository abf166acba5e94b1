"""Qwen2-Audio against transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Saved, distance, their_gradients
from qwen_audio_checkpoints import MARKER, VARIANTS, inputs, labels_of, prompt, sounds, tokens
from torch import Tensor

from mmkernels.models import QwenAudio
from mmkernels.nn import cross_attention

# Both models compute in another order: measured over all cases here, see `test_logits_and_loss`.
EXACT, TOLERANCE = 1e-12, 5e-6
DTYPES = (torch.float64, torch.float32)
PLAIN = "qwen2_audio"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., QwenAudio]


def run(theirs: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns logits and loss of transformers' model.

    Padding does not count in the positions: angles of others differ by float32's rounding.
    """
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = theirs(**given, position_ids=positions).logits
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_of(given)[:, 1:].flatten())


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return given | {"input_features": given["input_features"].to(dtype)}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss(ours: Ours, theirs: Any, variant: str, dtype: torch.dtype, padding: str) -> None:
    """Of two prompts with padding, one with two sounds."""
    given = cast(inputs(theirs(variant, dtype), padding), dtype)
    with torch.no_grad():
        out = ours(variant, dtype)(**given, labels=labels_of(given), return_logits=True)
        logits, loss = run(theirs(variant, dtype), given)
        theirs_alone = theirs(variant, dtype)(**given, labels=labels_of(given)).loss  # it leaves padding out itself
    valid, tolerance = given["attention_mask"].bool(), EXACT if dtype == torch.float64 else TOLERANCE
    assert distance(out.logits[valid], logits[valid]) < tolerance
    assert distance(out.loss, loss) < tolerance
    assert distance(out.loss, theirs_alone) < 1e-5  # positions that count padding
    assert out.logits.dtype == out.loss.dtype == dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(ours: Ours, saved: Checkpoints, theirs: Any, variant: str, tmp_path: Path) -> None:
    """Of every parameter that is trained; transformers' are read by the names that the tensors have in its models."""
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 2e-5)):
        given = cast(inputs(theirs(variant, dtype)), dtype)
        for model in (ours(variant, dtype), theirs(variant, dtype)):
            model.zero_grad()
        ours(variant, dtype)(**given, labels=labels_of(given)).loss.backward()
        run(theirs(variant, dtype), given)[1].backward()
        not_trained = next(p for n, p in theirs(variant, dtype).named_parameters() if n.endswith("positions.weight"))
        assert not_trained.grad is None
        not_trained.grad = torch.zeros_like(not_trained)  # our folder must hold all
        checkpoint = Saved(variant, saved(variant).folder, theirs(variant, dtype))
        expected = their_gradients(checkpoint, tmp_path / str(dtype), dtype)
        not_trained.grad = None
        for name, parameter in ours(variant, dtype).named_parameters():
            if name == "audio.positions":
                assert parameter.grad is None and not parameter.requires_grad
                continue
            assert parameter.grad is not None, name
            assert distance(parameter.grad, expected[name]) < tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(ours: Ours, theirs: Any, variant: str) -> None:
    """Greedy, in a batch with padding on the left; and a second turn equals one prompt with everything in it."""
    given, model = inputs(theirs(variant)), ours(variant)
    length = given["input_ids"].shape[1]
    expected = theirs(variant).generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None)
    first = model.generate(**given, max_new_tokens=6, eos_token_id=())
    assert first.tokens.tolist() == expected[:, length:].tolist()

    more, new = prompt([[40], [40]], seed=1), sounds(theirs(variant), [40, 40], seed=1)
    second = model.generate(more["input_ids"], **new, kv_cache=first.kv_cache, max_new_tokens=5, eos_token_id=())
    again = torch.cat([expected, more["input_ids"]], 1)
    mask = torch.cat([given["attention_mask"], torch.ones_like(again[:, length:])], 1)
    order = lambda name: torch.cat([given[name][:2], new[name][:1], given[name][2:], new[name][1:]])  # row after row
    expected = theirs(variant).generate(
        input_ids=again,
        attention_mask=mask,
        input_features=order("input_features"),
        feature_attention_mask=order("feature_attention_mask"),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    assert second.tokens.tolist() == expected[:, again.shape[1] :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_sounds_matter(ours: Ours, theirs: Any, variant: str) -> None:
    """If they changed little, parity would prove little."""
    given, model = inputs(theirs(variant)), ours(variant)
    logits = lambda x: model(**(given | {"input_features": x})).logits[:, -1]
    with torch.no_grad():
        whole = logits(given["input_features"])
        for row in range(2):
            assert distance(logits(given["input_features"].roll(1, 0))[row], whole[row]) > 0.05
            assert distance(logits(given["input_features"].flip(1))[row], whole[row]) > 0.05


def test_text_alone(ours: Ours, theirs: Any) -> None:
    given = prompt([[], []])
    with torch.no_grad():
        out = ours(PLAIN)(**given)
        assert distance(out.logits, theirs(PLAIN)(**given).logits) < TOLERANCE
        nothing = sounds(theirs(PLAIN), [])
        assert torch.equal(ours(PLAIN)(**given, **nothing).logits, out.logits)


# The encoder reads as far as the sounds go.


@pytest.mark.parametrize("frames", range(1, 14))
def test_every_length(ours: Ours, theirs: Any, frames: int) -> None:
    """The result is that of the whole spectrogram; very short sounds have no token."""
    given = prompt([[frames, 7]]) | sounds(theirs(PLAIN), [frames, 7])
    read: list[int] = []
    hook = ours(PLAIN).audio.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[2]))
    with torch.no_grad():
        out = ours(PLAIN)(**given).logits
        assert distance(out, run(theirs(PLAIN), given)[0]) < TOLERANCE
    hook.remove()
    assert int((given["input_ids"] == MARKER).sum()) == (frames + 1) // 2 // 2 + 2 == tokens(frames) + 2
    assert read == [2 * ((max(frames, 7) + 1) // 2) + 1]


def test_what_is_behind_a_sound_changes_nothing(ours: Ours, theirs: Any) -> None:
    """But for the two frames that the convolutions reach, as in transformers' model."""
    given = prompt([[30]]) | sounds(theirs(PLAIN), [30])
    with torch.no_grad():
        whole = ours(PLAIN)(**given).logits
        given["input_features"][..., 31:] = torch.nan
        assert torch.equal(ours(PLAIN)(**given).logits, whole)
        short = given | {name: given[name][..., :31] for name in ("input_features", "feature_attention_mask")}
        assert torch.equal(ours(PLAIN)(**short).logits, whole)
        lengths = {"input_features": given["input_features"], "frame_lengths": (30,)}
        ids = {name: given[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(ours(PLAIN)(**ids, **lengths).logits, whole)


@pytest.mark.parametrize("reduce", [None, "pool:2", "tome:0.5", "diverse:0.25"])
def test_nothing_waits_for_a_device(reduce: str | None) -> None:
    """On a device that has no values, which the use of one would show."""
    with torch.device("meta"), torch.no_grad():
        model = QwenAudio(replace(QwenAudio.sizes["tiny"], reduce=reduce)).eval()
        ids, features = torch.zeros(1, 40, dtype=torch.long), torch.rand(2, 16, 100)
        out = model(ids, input_features=features, frame_lengths=[64, 40])
        left = sum(model.encode(features, [64, 40]).lengths)
        assert out.logits.shape == (1, 40 - 26 + left, 128)
        assert model(ids, input_features=features, frame_lengths=[64, 40], labels=ids).loss.shape == ()


def test_one_attention_call_a_layer(ours: Ours, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all sounds of a batch, over the frames of the longest one."""
    given = prompt([[33], [26]]) | sounds(theirs(PLAIN), [33, 26])
    calls: list[tuple[int, ...]] = []
    call = cross_attention.cross_attention

    def counted(query: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return call(query, *args, **options)

    monkeypatch.setattr(cross_attention, "cross_attention", counted)
    with torch.no_grad():
        ours(PLAIN)(**given)
    assert calls == [(2, 2, 18, 16)] * 2 + [(2, 4, given["input_ids"].shape[1], 12)] * 2


def test_autocast(ours: Ours, theirs: Any) -> None:
    given = inputs(theirs(PLAIN))
    with torch.no_grad():
        whole = ours(PLAIN)(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(PLAIN)(**given).logits
    assert distance(out.float(), whole) < 0.05


def test_compiled_code_is_one_graph() -> None:
    model = QwenAudio.from_size("tiny", reduce="pool:2").eval()
    ids, features = torch.tensor([[5, *[127] * 25, 6, 7]]), torch.rand(1, 16, 100)
    torch.compiler.reset()
    run = lambda ids, x: model(ids, input_features=x, frame_lengths=[100]).logits
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(ids, features), run(ids, features)) < TOLERANCE
