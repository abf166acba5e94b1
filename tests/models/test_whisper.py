"""Whisper: logits, loss and gradients of transformers' class, its cache, and sounds with padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Saved, check_gradients, distance, their_gradients
from torch import Tensor
from whisper_checkpoints import FRAMES, sounds, texts

from mmkernels.models import Whisper, log_mel
from mmkernels.models.whisper_decoder import Sound, WhisperCache

VARIANTS = ["whisper", "whisper_shards"]
Store = Callable[[str], Saved]
Ours = Callable[..., Whisper]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, saved: Store, ours: Ours) -> None:
    theirs, model = saved(variant).theirs, ours(variant)
    features, (ids, valid) = sounds(theirs), texts()
    with torch.no_grad():
        expected = theirs(features, decoder_input_ids=ids, decoder_attention_mask=valid.long()).logits
        found = model(ids, features, attention_mask=valid).logits
        other = model(ids, features.flip(0), attention_mask=valid).logits
    assert distance(found[valid], expected[valid]) < 2e-6
    assert distance(other[valid], found[valid]) > 0.05  # the sound counts
    encoded = theirs.model.encoder(features).last_hidden_state
    assert distance(model.encode(features).features, encoded) < 2e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_transformers(variant: str, saved: Store, tmp_path: Path) -> None:
    """Those of the encoder's positions too, which neither model trains: here both are told to."""
    checkpoint = saved(variant)
    model = Whisper.from_pretrained(checkpoint.folder, dtype=torch.float64)
    assert [name for name, x in model.named_parameters() if not x.requires_grad] == ["encoder.positions"]
    model.encoder.positions.requires_grad_(True)
    theirs = checkpoint.theirs.double()
    try:
        features, (ids, valid) = sounds(theirs).double(), texts()
        labels = ids.masked_fill(~valid, -100)
        theirs.zero_grad()
        expected = theirs(features, decoder_input_ids=ids[:, :-1], labels=labels[:, 1:]).loss
        found = model(ids, features, labels=labels)
        assert found.logits is None and found.cache is None
        torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=0)
        expected.backward()
        found.loss.backward()
        check_gradients(model, their_gradients(checkpoint, tmp_path / "gradients", torch.float64), 1e-8)
    finally:
        theirs.float()


def test_padding_of_texts_changes_nothing(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    ids, valid = texts()
    alone = model(ids[1:, :7], features[1:]).logits
    left = torch.cat([ids[1:, 7:], ids[1:, :7]], dim=1)
    for row, mask, at in ((ids[1:], valid[1:], slice(0, 7)), (left, valid[1:].flip(1), slice(2, 9))):
        found = model(row, features[1:], attention_mask=mask).logits
        torch.testing.assert_close(found[:, at], alone, rtol=1e-5, atol=1e-5)


def test_turns_with_a_cache_equal_one_call(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    ids, valid = texts()
    whole = model(ids, features, attention_mask=valid).logits
    cache = None
    for start, end in ((0, 4), (4, 5), (5, 9)):
        first = {"input_features": features} if cache is None else {"cache": cache}
        out = model(ids[:, start:end], attention_mask=valid[:, start:end], **first)
        cache = out.cache
        kept = valid[:, start:end]
        torch.testing.assert_close(out.logits[kept], whole[:, start:end][kept], rtol=1e-5, atol=1e-5)
    assert cache is not None and cache.num_tokens == 9


def test_texts_of_one_sound_read_its_keys_once(saved: Store, ours: Ours) -> None:
    """Three texts for each sound, one behind the other: the keys have the batch of the sounds."""
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    ids, valid = texts(6)
    ids, valid = ids[:, :7], valid[:, :7] | (torch.arange(7) < 4)
    expected = model(ids, features.repeat_interleave(3, 0), attention_mask=valid).logits
    out = model(ids, features, attention_mask=valid)
    torch.testing.assert_close(out.logits[valid], expected[valid], rtol=1e-5, atol=1e-5)
    assert {x.shape[0] for pair in out.cache.sound.layers for x in pair} == {2}


@pytest.mark.parametrize("length", [1, 30, 31, 99])
def test_nothing_behind_a_short_sound_reaches_the_text(length: int, saved: Store) -> None:
    model = Whisper.from_pretrained(saved("whisper").folder, dtype=torch.float64)
    features, (ids, _) = sounds(saved("whisper").theirs).double(), texts()
    features[1, :, length:] = float("nan")
    lengths = torch.tensor([FRAMES, length])
    found = model(ids, features, frame_lengths=lengths).logits
    alone = model(ids[1:], features[1:, :, :length]).logits
    torch.testing.assert_close(found[1:], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:1], model(ids[:1], features[:1]).logits, rtol=1e-9, atol=1e-9)
    only = model.encode(features[1:], lengths[1:])
    assert only.features.shape[1] == (length + 1) // 2  # what no sound needs is not computed
    torch.testing.assert_close(model(ids[1:], sound=only).logits, alone, rtol=1e-9, atol=1e-9)


def test_a_sound_without_frames_is_not_heard(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    ids, _ = texts()
    out = model(ids, features, frame_lengths=torch.zeros(2, dtype=torch.int64)).logits
    torch.testing.assert_close(
        out, model(ids, features.flip(0), frame_lengths=torch.zeros(2, dtype=torch.int64)).logits
    )
    assert bool(out.isfinite().all())


def test_last_logits_and_loss_at_once(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    ids, valid = texts()
    whole = model(ids, features, attention_mask=valid, labels=ids, return_logits=True)
    last = model(ids, features, attention_mask=valid, last_logits_only=True).logits
    assert last.shape == (2, 1, model.config.vocab_size)
    torch.testing.assert_close(last[:, 0], whole.logits[[0, 1], [8, 6]], rtol=1e-5, atol=1e-5)


def test_bfloat16_and_naive_attention(saved: Store, ours: Ours) -> None:
    import mmkernels

    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    ids, _ = texts()
    expected = model(ids, features).logits
    assert distance(ours("whisper", torch.bfloat16)(ids, features.bfloat16()).logits.float(), expected) < 0.05
    with mmkernels.use_backend("reference"):
        assert distance(model(ids, features).logits, expected) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_spoken_words(variant: str, saved: Store, ours: Ours) -> None:
    """From the sound to the logits as transformers: features of 80 and 128 frequencies of its extractor."""
    pytest.importorskip("espeakng_loader")
    from mmkernels.testing.speech import speak

    theirs = saved(variant).theirs
    spoken = [speak(word, speed=260)[:16_000] for word in ("seven", "two")]
    mel = log_mel(spoken, 16_000, bands=theirs.config.num_mel_bins, seconds=1.0)
    ids, _ = texts()
    with torch.no_grad():
        expected = theirs(mel.features, decoder_input_ids=ids).logits
        found = ours(variant)(ids, mel.features).logits
        other = ours(variant)(ids, mel.features.flip(0)).logits
        alone = ours(variant)(ids, mel.features, frame_lengths=torch.tensor(mel.lengths)).logits
    assert distance(found, expected) < 2e-6
    assert distance(other, found) > 0.05
    assert distance(alone, found) > 0.01  # the silence counts where it is heard


Wrong = tuple[Callable[[Whisper, Tensor, Tensor], Any], type[Exception], str]
WRONG: dict[str, Wrong] = {
    "no sound": (lambda m, i, s: m(i), ValueError, "input_features or sound must be given, got neither"),
    "two sounds": (lambda m, i, s: m(i, s, sound=m.encode(s)), ValueError, "must be given, got both"),
    "features": (lambda m, i, s: m(i, sound=s), TypeError, "sound must be what encode returns, got Tensor"),
    "width": (lambda m, i, s: m(i, sound=Sound(s, None)), ValueError, r"sound.features must be \[B, L, 32\]"),
    "mel": (lambda m, i, s: m(i, s[:, :40]), ValueError, r"input_features must be \[B, 80, T\]"),
    "long": (lambda m, i, s: m(i, s.repeat(1, 1, 2)), ValueError, "T from 1 to 100 frames.*cut a longer sound"),
    "rows": (
        lambda m, i, s: m(i[:1], s),
        ValueError,
        "as many rows as there are sounds, 2, or a multiple, got 1",
    ),
    "no rows": (lambda m, i, s: m(i[:0], s), ValueError, "as many rows as there are sounds"),
    "tokens": (lambda m, i, s: m(i + 200, s), ValueError, "input_ids must be from 0 to 118"),
    "empty": (lambda m, i, s: m(i[:, :0], s), ValueError, "input_ids must have 1 to 24 tokens, got 0"),
    "too many": (lambda m, i, s: m(i.repeat(1, 3), s), ValueError, "input_ids must have 1 to 24 tokens, got 27"),
    "last": (lambda m, i, s: m(i, s, labels=i, last_logits_only=True), ValueError, "last_logits_only must be False"),
    "cache": (lambda m, i, s: m(i, s, cache=3), TypeError, "cache must be a WhisperCache or None, got int"),
    "layers": (lambda m, i, s: m(i, s, cache=WhisperCache(1)), ValueError, "cache must have 2 layers, got 1"),
    "again": (lambda m, i, s: m(i, s, cache=m(i, s).cache), ValueError, "the cache has the sounds"),
    "batch": (lambda m, i, s: m(i[:1], cache=m(i, s).cache), ValueError, "for kv_cache's batch 2, got 1"),
    "lengths": (
        lambda m, i, s: m(i, sound=m.encode(s), frame_lengths=torch.tensor([1, 1])),
        ValueError,
        "frame_lengths must be None with sound",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name: str, saved: Store, ours: Ours) -> None:
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call(ours("whisper"), texts()[0], sounds(saved("whisper").theirs))


def test_spec_augment_is_refused_where_it_would_be_left_out(saved: Store) -> None:
    tiny = Whisper(replace(Whisper.sizes["tiny"], spec_augment=True))
    ids, features = torch.randint(60, (1, 5)), torch.randn(1, 80, 100)
    assert tiny.eval()(ids, features, labels=ids).loss is not None
    with pytest.raises(ValueError, match="labels must be None in training mode, because the checkpoint asks for Spec"):
        tiny.train()(ids, features, labels=ids)
