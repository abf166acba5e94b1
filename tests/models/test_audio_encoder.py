"""The encoder of Whisper and Qwen2-Audio: against transformers' classes, and sounds with padding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.models.blocks.audio_encoder import AudioEncoder, sinusoids
from mmkernels.models.blocks.checkpoint import renamed
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.whisper_weights import encoder_names
from mmkernels.testing.models import build, randomise

SIZES = Sizes(width=32, layers=2, heads=4, mlp=48)
NAMES = encoder_names("", "")
"""The start of a parameter's name -> in transformers' encoders."""

CONFIG: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 12,
    "max_source_positions": 20,
}  # fmt: skip


def _sounds(batch: int = 2, frames: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 12, frames, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _encoder(**options: Any) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(SIZES, mel_bins=12, positions=20, **options).eval()


def _pair(kind: str) -> tuple[AudioEncoder, Any]:
    """Returns our encoder and transformers', with the same weights, in float64."""
    module = {"whisper": "whisper", "qwen2_audio": "qwen2_audio"}[kind]
    name = {"whisper": "WhisperEncoder", "qwen2_audio": "Qwen2AudioEncoder"}[kind]
    theirs: Any = build(f"models.{module}.modeling_{module}:{name}", CONFIG)
    theirs = randomise(theirs, 3).eval().double()
    theirs.embed_positions.requires_grad_(False)  # as its class has it
    ours = _encoder(pool=2 if kind == "qwen2_audio" else 1).double()
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[str(renamed(name, NAMES))] for name in ours.state_dict()})
    return ours, theirs


@pytest.mark.parametrize("kind", ["whisper", "qwen2_audio"])
def test_equals_transformers_with_gradients_of_every_parameter(kind: str) -> None:
    ours, theirs = _pair(kind)
    sounds = _sounds(dtype=torch.float64)
    found, expected = ours(sounds), theirs(sounds).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    other = ours(sounds.flip(0))
    assert (other - found).norm() > 0.05 * found.norm()  # the sound counts
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    compared = 0
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(renamed(name, NAMES)).grad
        assert (parameter.grad is None) == (reference is None) == (name == "positions"), name
        if reference is not None:
            torch.testing.assert_close(parameter.grad, reference, rtol=1e-8, atol=1e-8, msg=name)
            compared += 1
    assert compared == 4 + 2 * 15 + 2


def test_padding_as_qwen2_audio_hides_it() -> None:
    """There the convolutions see what a feature extractor left behind the sound, and the attention does not."""
    ours, theirs = _pair("qwen2_audio")
    sounds, lengths = _sounds(dtype=torch.float64), torch.tensor([27, 40])
    kept = (lengths + 1) // 2
    visible = torch.arange(20) < kept[:, None]
    bias = torch.zeros(2, 1, 20, 20, dtype=torch.float64).masked_fill(~visible[:, None, None], float("-inf"))
    expected = theirs(sounds, attention_mask=bias).last_hidden_state
    found = ours(sounds, lengths, mask_convolutions=False)
    assert ours.output_lengths(lengths).tolist() == [7, 10]
    for row, n in enumerate((7, 10)):
        torch.testing.assert_close(found[row, :n], expected[row, :n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("length", [5, 6, 7, 8, 39, 40])
def test_a_short_sound_has_the_features_that_it_has_alone(pool: int, length: int) -> None:
    encoder, sounds = _encoder(pool=pool).double(), _sounds(dtype=torch.float64)
    sounds[1, :, length:] = float("nan")  # nothing behind the end reaches it
    lengths = torch.tensor([40, length])
    found = encoder(sounds, lengths)
    assert found.shape == (2, 20 // pool, 32)
    kept = int(encoder.output_lengths(lengths)[1])
    alone = encoder(sounds[1:, :, :length])
    assert alone.shape == (1, kept, 32)
    torch.testing.assert_close(found[1:, :kept], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:1], encoder(sounds[:1]), rtol=1e-10, atol=1e-10)


def test_gradients_of_padding_are_zero() -> None:
    encoder, sounds = _encoder().double(), _sounds(dtype=torch.float64).requires_grad_()
    encoder(sounds, torch.tensor([40, 9]))[1, :5].square().sum().backward()
    assert sounds.grad is not None
    assert not sounds.grad[0].any()
    assert not sounds.grad[1, :, 9:].any()
    assert bool(sounds.grad[1, :, :9].any(0).all())


def test_positions_are_sines_then_cosines() -> None:
    positions = sinusoids(50, 8)
    assert positions.shape == (50, 8)
    for frame in (0, 1, 49):
        for i in range(4):
            angle = torch.tensor(frame / 10_000 ** (i / 3), dtype=torch.float64)
            assert abs(float(positions[frame, i] - angle.sin())) < 1e-5
            assert abs(float(positions[frame, 4 + i] - angle.cos())) < 1e-5
    assert torch.equal(AudioEncoder(SIZES, mel_bins=12, positions=20).positions, sinusoids(20, 32))


def test_training_drops_elements_and_layers() -> None:
    sounds = _sounds()
    plain = _encoder()
    for options in ({"residual_dropout": 0.5}, {"activation_dropout": 0.5}, {"layer_dropout": 1.0}):
        encoder = _encoder(**options)
        torch.testing.assert_close(encoder(sounds), plain(sounds))
        assert not torch.allclose(encoder.train()(sounds), plain(sounds), atol=1e-3), options
    embedded = plain.norm(plain.dropout(_before_blocks(plain, sounds)))
    torch.testing.assert_close(encoder(sounds), embedded)  # without all layers


def _before_blocks(encoder: AudioEncoder, sounds: Tensor) -> Tensor:
    gelu = torch.nn.functional.gelu
    x = gelu(encoder.conv2(gelu(encoder.conv1(sounds)))).transpose(1, 2)
    return x + encoder.positions


def test_float16_stays_finite() -> None:
    """A float16 result is held below the largest number, as in transformers."""
    encoder = _encoder().half()
    with torch.no_grad():
        for layer in range(2):
            encoder.get_parameter(f"blocks.{layer}.mlp.3.bias").fill_(65000.0)
        assert bool(encoder(_sounds(dtype=torch.float16)).isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 12, 41),), ValueError, "input_features must be [B, 12, T], T from 1 to 40 frames, got shape"),
        ((torch.zeros(2, 12, 41),), ValueError, "cut a longer sound in windows"),
        ((torch.zeros(2, 12, 0),), ValueError, "T from 1 to 40 frames, got shape (2, 12, 0)"),
        ((torch.zeros(2, 40, 12),), ValueError, "input_features must be [B, 12, T]"),
        ((torch.zeros(12, 40),), ValueError, "input_features must be [B, 12, T]"),
        ((torch.zeros(2, 12, 40, dtype=torch.long),), TypeError, "input_features must be"),
        ((torch.zeros(2, 12, 40), torch.tensor([40.0, 1.0])), TypeError, "frame_lengths must be an int32 or int64"),
        ((torch.zeros(2, 12, 40), [40, 1]), TypeError, "frame_lengths must be an int32 or int64 tensor, got list"),
        ((torch.zeros(2, 12, 40), torch.tensor([40])), ValueError, "frame_lengths must be [2] as input_features"),
        ((torch.zeros(2, 12, 40), torch.tensor([41, 1])), ValueError, "frame_lengths must be from 0 to 40"),
        ((torch.zeros(2, 12, 40), torch.tensor([-1, 1])), ValueError, "frame_lengths must be from 0 to 40"),
    ],
)
def test_wrong_inputs(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        _encoder()(*arguments)


def test_wrong_options() -> None:
    for options, message in (({"pool": 0}, "pool must be"), ({"layer_dropout": 2.0}, "dropout must be")):
        with pytest.raises(ValueError, match=message):
            _encoder(**options)
    with pytest.raises(ValueError, match=r"T from 5 to 40 frames"):
        _encoder(pool=3)(torch.zeros(1, 12, 4))


def test_a_sound_without_frames_gives_finite_features() -> None:
    encoder = _encoder()
    found = encoder(_sounds(), torch.tensor([40, 0]))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:1], encoder(_sounds()[:1]))


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    encoder = _encoder(pool=2)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=True)
    sounds, lengths = _sounds(3), torch.tensor([40, 31, 2])
    torch.testing.assert_close(compiled(sounds, lengths), encoder(sounds, lengths))
