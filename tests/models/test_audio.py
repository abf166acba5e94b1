"""Sound files of every format and rate: the same sound, or an error that names the file; log-mel features."""

from __future__ import annotations

import io
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperFeatureExtractor

from mmkernels.models import AudioError, cut_sound, log_mel, read_audio, resample
from mmkernels.models.blocks import audio

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> NDArray[np.float32]:
    """A tone that swells and dies away, so that a resampler's edges don't count."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time) * np.sin(np.pi * time / seconds) ** 2).astype(np.float32)


def written(form: str, subtype: str, sound: Any = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone() if sound is None else sound, rate, format=form, subtype=subtype)
    return buffer.getvalue()


# Files.


@pytest.mark.parametrize(
    ("form", "subtype", "within"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-22),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("WAV", "ULAW", 0.02),
        ("AIFF", "PCM_S8", 2**-7),
        ("AIFF", "PCM_16", 2**-15),
        ("AU", "PCM_16", 2**-15),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-22),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_every_format_gives_the_same_sound(tmp_path: Path, form: str, subtype: str, within: float) -> None:
    """Whatever the file is called."""
    path = tmp_path / "sound"
    path.write_bytes(written(form, subtype))
    sound = read_audio(path)
    assert sound.dtype == torch.float32 and sound.shape == (8_000,)
    assert np.abs(sound.numpy() - tone()).max() <= within


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_every_rate_gives_the_same_sound(tmp_path: Path, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written("WAV", "FLOAT", tone(0.8, rate), rate))
    sound = read_audio(path)
    assert sound.shape == (12_800,)
    assert np.abs(sound.numpy() - tone(0.8)).max() < 1e-3
    monkeypatch.setattr(audio, "_BLOCK", 1_000)  # read and resampled in several blocks
    assert torch.equal(read_audio(path), sound)
    assert (resample(torch.from_numpy(tone(0.8, rate)), rate) - sound).abs().max() < 1e-5
    assert read_audio(path, rate).numpy() == pytest.approx(tone(0.8, rate))


def test_channels_become_their_mean(tmp_path: Path) -> None:
    path, pair = tmp_path / "a.wav", np.stack([tone(), np.zeros(8_000, np.float32)], axis=1)
    path.write_bytes(written("WAV", "FLOAT", pair))
    assert read_audio(path).numpy() == pytest.approx(tone() / 2)
    six = np.stack([tone() * n for n in range(6)], axis=1) / 5
    path.write_bytes(written("WAV", "PCM_24", six))
    assert read_audio(path).numpy() == pytest.approx(tone() / 2, abs=2**-20)


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.wav").write_bytes(written("WAV", "PCM_16"))
    assert read_audio("~/a.wav").shape == (8_000,)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got no such file: .*gone.wav"):
        read_audio(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match="must be a sound, got a folder"):
        read_audio(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"no sound at all", b"RIFF", b"fLaC", b"OggS", b"\xff\xfb\x90\x00", bytes(99)]
)
@pytest.mark.parametrize("name", ["sound", "sound.wav", "sound.raw", "sound.mp3"])
def test_files_that_are_not_sounds(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AudioError, match=f"{name}: must (?:be|have)"):
        read_audio(path)


@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU", "RF64", "W64", "CAF", "FLAC", "OGG", "MP3"])
def test_truncated_files(tmp_path: Path, form: str) -> None:
    """Half a sound is not taken for all of it."""
    path = tmp_path / "sound"
    content = written(form, {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(form, "PCM_16"))
    path.write_bytes(content)
    assert read_audio(path).shape == (8_000,)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"sound: must (?:be a whole sound|have)"):
        read_audio(path)


@pytest.mark.parametrize("front", [b"", b"ID3\x03\0\0\0\0\x10\0" + bytes(2048)], ids=["plain", "tagged"])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_that_does_not_say_its_length(tmp_path: Path, mode: str, front: bytes) -> None:
    """libsndfile guesses it by the first frame, which is wrong by far where later ones have other sizes."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * RATE)
    noise[10 * RATE :] = 0  # takes few bits
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    content, path = buffer.getvalue(), tmp_path / "a.mp3"
    second = content.index(content[:2], 1)
    path.write_bytes(front + content[second:] + b"TAG" + bytes(125))
    if mode == "VARIABLE":
        with pytest.raises(AudioError, match=r"a.mp3: must be an MP3 of one bitrate, or with a header .* not read"):
            read_audio(path)
    else:
        assert len(read_audio(path)) == pytest.approx(20 * RATE, abs=2 * 1152)
    path.write_bytes(front + content)
    assert len(read_audio(path)) == 20 * RATE


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_that_was_written_into_a_pipe(tmp_path: Path, size: int) -> None:
    """Its header could not be completed."""
    path, content = tmp_path / "a.wav", bytearray(written("WAV", "PCM_16"))
    content[4:8] = content[40:44] = struct.pack("<I", size)
    path.write_bytes(content)
    assert read_audio(path).shape == (8_000,)


def test_a_file_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written("WAV", "PCM_16", np.zeros(0, np.float32)))
    with pytest.raises(AudioError, match=r"a.wav: must have at least one sample, got none"):
        read_audio(path)
    path.write_bytes(written("WAV", "PCM_16", np.ones(1, np.float32) / 2))
    assert read_audio(path).tolist() == [0.5]
    path.write_bytes(written("WAV", "PCM_16", np.ones(1, np.float32) / 2, 96_000))  # less than a sample
    with pytest.raises(AudioError, match="must have at least one sample"):
        read_audio(path, 8_000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_files_with_nan(tmp_path: Path, value: float) -> None:
    path, sound = tmp_path / "a.wav", tone()
    sound[100] = value
    path.write_bytes(written("WAV", "FLOAT", sound))
    with pytest.raises(AudioError, match=r"a.wav: must have finite values, got NaN or infinity"):
        read_audio(path)


def test_long_files_are_refused_by_their_header(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written("WAV", "PCM_16"))
    with pytest.raises(AudioError, match=r"a.wav: must last at most 0.4 s, got 0.5 s"):
        read_audio(path, max_seconds=0.4)
    assert read_audio(path, max_seconds=0.5).shape == (8_000,)
    with pytest.raises(ValueError, match=r"sampling_rate must be a positive integer, got 16000.0"):
        read_audio(path, 16_000.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU", "FLAC", "OGG", "MP3", "CAF"])
def test_damaged_bytes_raise_no_other_error(tmp_path: Path, form: str) -> None:
    content = written(form, {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(form, "PCM_16"))
    draw, path = np.random.default_rng(0), tmp_path / "damaged"
    messages: list[str] = []
    for _ in range(30):
        damaged = bytearray(content)
        for at in draw.integers(0, min(200, len(damaged)), 6):
            damaged[at] = draw.integers(256)
        path.write_bytes(damaged[: draw.integers(1, len(damaged) + 1)])
        try:
            sound = read_audio(path, max_seconds=600)
        except AudioError as error:
            messages.append(str(error))
        else:
            assert sound.numel() and sound.isfinite().all()
    assert messages and all(message.startswith(f"{path}: must ") for message in messages)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_without_the_packages(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(written("WAV", "PCM_16"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'needs soundfile and soxr: pip install "mmkernels\[audio\]"'):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(ImportError, match=r"resampling needs soundfile and soxr"):
        resample(torch.zeros(9), 8_000)
    assert torch.equal(resample(torch.zeros(9), RATE), torch.zeros(9))  # nothing to do


# Arrays.


@pytest.mark.parametrize(
    ("sound", "error", "match"),
    [
        ([0.0], TypeError, "sounds must be a tensor or an array of floats, got float"),
        (None, TypeError, "sounds must be a tensor or an array of floats, got NoneType"),
        (torch.zeros(0), ValueError, "sounds must have at least one sample, got none"),
        (torch.zeros(2, 9), ValueError, r"sounds must be one channel, \[samples\], got shape \(2, 9\): take the mean"),
        (np.zeros((9, 2)), ValueError, r"sounds must be one channel, \[samples\], got shape \(9, 2\)"),
        (torch.tensor(0.5), ValueError, r"sounds must be one channel, \[samples\], got shape \(\)$"),
        (torch.tensor([0.0, torch.nan]), ValueError, "sounds must have finite values, got NaN or infinity"),
        (np.array([0.0, -np.inf]), ValueError, "sounds must have finite values, got NaN or infinity"),
        (np.zeros(9, np.int16), TypeError, "sounds must be floats from -1 to 1, got int16: divide 16-bit"),
        (torch.zeros(9, dtype=torch.uint8), TypeError, "sounds must be floats from -1 to 1, got torch.uint8"),
        (torch.full((9,), 127.0), ValueError, "sounds must be floats from -1 to 1, got values up to 127"),
        (torch.zeros(31 * RATE), ValueError, "sounds must last at most 30 s, got 31 s: cut it into windows"),
        (torch.zeros(600 * RATE), ValueError, "sounds must last at most 30 s, got 600 s: cut it into windows"),
    ],
)
def test_arrays_that_are_not_sounds(sound: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match.replace("sounds", r"sounds\[0\]") if isinstance(sound, list) else match):
        log_mel(sound, RATE)
    with pytest.raises(error, match=match.replace("sounds", r"sounds\[1\]")):
        log_mel([torch.zeros(9), sound[0] if isinstance(sound, list) else sound], RATE)


def test_other_arguments_of_log_mel() -> None:
    with pytest.raises(ValueError, match="sampling_rate must be 16000, got 44100: resample the sounds"):
        log_mel(torch.zeros(9), 44_100)
    with pytest.raises(ValueError, match="sounds must have at least one sound, got none"):
        log_mel([], RATE)
    with pytest.raises(ValueError, match="bands must be a positive integer, got 0"):
        log_mel(torch.zeros(9), RATE, bands=0)
    for seconds in (0, -1, float("nan"), True, "30"):
        with pytest.raises(ValueError, match="seconds must be a positive number of seconds"):
            log_mel(torch.zeros(9), RATE, seconds=seconds)  # type: ignore[arg-type]
    for seconds in (0.005, 0.105, 0.01):
        with pytest.raises(ValueError, match=r"seconds must be a multiple of 0.01 s above 0.0125 s, got"):
            log_mel(torch.zeros(9), RATE, seconds=seconds)


@pytest.mark.parametrize("bands", [80, 128])
def test_features_are_those_of_transformers(bands: int) -> None:
    sounds = [tone(0.5), tone(30.0, hertz=900.0), tone(0.3)[:1], tone(1.0)[: 160 * 7 + 1]]
    mel = log_mel(sounds, RATE, bands=bands)
    extractor = WhisperFeatureExtractor(feature_size=bands)
    expected = extractor(sounds, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    assert torch.equal(mel.features, expected["input_features"]) and mel.features.shape == (4, bands, 3000)
    assert mel.lengths == tuple(expected["attention_mask"].sum(1).tolist()) == (50, 3000, 1, 8)
    assert torch.equal(log_mel(sounds[0], RATE, extractor=extractor).features, mel.features[:1])
    assert torch.equal(log_mel(torch.from_numpy(sounds[0]).double(), RATE, bands=bands).features, mel.features[:1])


def test_shorter_features_are_those_of_the_sound() -> None:
    """Where it is: behind it, the shorter silence ends earlier."""
    short, whole = (log_mel([tone()], RATE, seconds=seconds).features for seconds in (1.0, 30.0))
    assert short.shape == (1, 80, 100)
    torch.testing.assert_close(short[..., :97], whole[..., :97], rtol=1e-4, atol=1e-4)


def test_one_sample_is_a_sound() -> None:
    mel = log_mel(torch.tensor([0.5]), RATE)
    assert mel.lengths == (1,) and mel.features.isfinite().all()


def test_silence_is_a_sound() -> None:
    assert log_mel(torch.zeros(RATE), RATE, seconds=1).features.unique().numel() == 1


def test_windows_put_together_are_the_sound() -> None:
    sound = torch.from_numpy(tone(10.0))
    parts = cut_sound(sound, seconds=3.0)
    assert [len(part) for part in parts] == [48_000] * 3 + [16_000]
    assert torch.equal(torch.cat(parts), sound)
    parts = cut_sound(sound, seconds=3.0, overlap=1.0)
    assert [len(part) for part in parts] == [48_000] * 4 + [32_000]
    for number, part in enumerate(parts):
        assert torch.equal(part, sound[32_000 * number :][: len(part)])
    assert len(cut_sound(sound[:9])) == len(cut_sound(sound, seconds=10.0)) == 1
    assert len(cut_sound(torch.zeros(600 * RATE))) == 20
    for arguments, match in (
        ({"seconds": 0.0}, "seconds must be a positive number of seconds, got 0.0"),
        ({"seconds": 1e-9}, "seconds must be a whole number of samples at 16000 Hz, got 1e-09 s"),
        ({"overlap": 30.0}, "overlap must be from 0 to below seconds = 30, got 30"),
        ({"overlap": -1.0}, "overlap must be from 0 to below seconds = 30, got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            cut_sound(sound, **arguments)


def test_arrays_of_any_memory() -> None:
    """Read-only, reversed, with strides, of other widths."""
    sound = tone()
    frozen = sound.copy()
    frozen.flags.writeable = False
    expected = log_mel(sound, RATE, seconds=1).features
    for other in (frozen, sound[::-1][::-1], np.stack([sound, sound], 1)[:, 0], sound.astype(np.float64)):
        assert torch.equal(log_mel(other, RATE, seconds=1).features, expected)
    half: Tensor = torch.from_numpy(sound).bfloat16()
    assert torch.equal(log_mel(half, RATE, seconds=1).features, log_mel(half.float(), RATE, seconds=1).features)


@pytest.mark.parametrize("share", [0.2, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_truncated_ogg(tmp_path: Path, subtype: str, share: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE).astype(np.float32)
    content, path = written("OGG", subtype, noise), tmp_path / "a.ogg"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AudioError):
        read_audio(path)
    path.write_bytes(content + b"\0" * 100)  # what follows the last page is none of the stream's
    assert abs(read_audio(path).shape[0] - 2 * RATE) < 1000
    last = content.rindex(b"OggS")
    path.write_bytes(content[:last])  # at the border of two pages
    with pytest.raises(AudioError, match=r"must be a whole Ogg file, got one without the page|must be"):
        read_audio(path)


def test_truncated_nist(tmp_path: Path) -> None:
    content, path = written("NIST", "PCM_16"), tmp_path / "a.wav"
    path.write_bytes(content)
    assert read_audio(path).shape[0] == RATE // 2
    path.write_bytes(content[:-100])
    with pytest.raises(AudioError, match="must have 16000 bytes, as its header says, got 15900"):
        read_audio(path)


@pytest.mark.parametrize("form", ["VOC", "SVX", "PVF", "IRCAM", "AVR", "PAF", "MPC2K", "MAT5", "XI"])
def test_formats_that_do_not_tell_whether_they_are_whole(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.any"
    path.write_bytes(written(form, "DPCM_16" if form == "XI" else "PCM_16", rate=44_100 if form == "XI" else RATE))
    with pytest.raises(AudioError, match=f"must be one of WAV, .*, got {form}"):
        read_audio(path)


def test_rates_and_lengths_that_make_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written("WAV", "PCM_16", rate=1))
    with pytest.raises(AudioError, match="must have at least 1000 samples a second, got 1"):
        read_audio(path)
    path.write_bytes(written("WAV", "PCM_16", np.zeros(1, dtype=np.float32), rate=44_100))
    with pytest.raises(AudioError, match="got 1 at 44100 Hz, of which none is left at 16000 Hz"):
        read_audio(path)
    with pytest.raises(ValueError, match="sound must be long enough to have a sample at 16000 Hz, got 1 at 44100 Hz"):
        resample(torch.zeros(1), 44_100)
    for wrong, error in (("a", TypeError), (math.nan, ValueError), (0, ValueError)):
        with pytest.raises(error, match="max_seconds must be a positive number, got"):
            read_audio(path, max_seconds=wrong)  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match="must be a file on a disk, got a pipe or a device"):
        read_audio(tmp_path / "pipe")


def test_log_mel_takes_no_memory_for_what_is_wrong() -> None:
    for options, error, match in (
        ({"extractor": 3}, TypeError, "extractor must be a WhisperFeatureExtractor or None, got int"),
        ({"seconds": 1e6}, ValueError, r"seconds must be at most 14400, got 1e\+06"),
        ({"bands": 10**6}, ValueError, "bands must be at most 1024, got 1000000"),
    ):
        with pytest.raises(error, match=match):
            log_mel(torch.zeros(100), RATE, **options)


def test_the_result_has_no_spare_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written("WAV", "PCM_16", rate=44_100, sound=tone(1.0, 44_100)))
    sound = read_audio(path)
    assert sound.shape == (RATE,) and sound.untyped_storage().nbytes() == 4 * RATE
