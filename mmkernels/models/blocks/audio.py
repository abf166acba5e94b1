"""Reads sound files, checks and cuts sounds, and computes the log-mel features that Whisper's encoders read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mmkernels.nn.checks import check_positive, described
from mmkernels.runtime.checks import as_float
from mmkernels.transformers_version import import_transformers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Sound = Tensor | NDArray[np.floating[Any]]

SAMPLING_RATE = 16_000
"""Samples a second of the sounds that Whisper's encoders were trained on (Radford et al., 2022, section 2.2)."""
HOP = 160
"""Samples from one frame of features to the next: 100 frames a second (Radford et al., 2022, section 2.2)."""
MAX_SECONDS = 4 * 3600.0
"""Longer files are refused before they are decoded. At 16 kHz four hours take 0.9 GB."""
_LOUDEST = 16.0
"""No sound between -1 and 1 comes near it, however much it is overdriven; 8-bit integers that became floats pass it."""
_LEAST_RATE = 1000  # Hz: of files; a header with less would make a huge sound of a small file
_MOST_BANDS = 1024
_WHOLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3", "OGG", "NIST")
"""Formats whose files tell whether they are whole."""
_BLOCK = 1 << 18  # frames of a file that are decoded at once
_SIZE_FIELDS = ("data", "SSND", "Data Size", "Riff size", "riff")  # of WAV, AIFF, AU, RF64, W64, in libsndfile's log
_UNKNOWN_SIZES = (0x7FFFFFFF, 0xFFFFFFFF)  # what programs that write a WAV into a pipe give for its size


class AudioError(ValueError):
    """A file cannot be read as sound; the message names the file and the reason."""


class LogMel(NamedTuple):
    """Features of sounds.

    Attributes:
        features: float32 ``[N, bands, frames]``, of the sounds with silence behind them.
        lengths: how many frames each sound has; those behind them are of silence alone.
    """

    features: Tensor
    lengths: tuple[int, ...]


def read_audio(path: str | Path, sampling_rate: int = SAMPLING_RATE, *, max_seconds: float = MAX_SECONDS) -> Tensor:
    """Returns the sound in a file, float32 ``[samples]``, the mean of its channels, at a sampling rate.

    Full scale is from -1 to 1, whatever the file holds: integers of 8 to 32 bits, floats, or what FLAC, Ogg or MP3
    compress. The file is decoded in blocks, into the result: beside it little memory is taken.

    Args:
        path: a WAV, RF64, W64, AIFF, AU, CAF, FLAC, MP3, Ogg (Vorbis, Opus) or NIST file. libsndfile reads others too,
            but does not tell whether they are whole.
        sampling_rate: of the result, in samples a second. A file with another one is resampled (soxr, "HQ").
        max_seconds: the longest sound that is read.

    Raises:
        ImportError: soundfile or soxr is not installed.
        FileNotFoundError: there is no such file.
        AudioError: the file is not sound, is empty, truncated or corrupt, holds NaN or infinity, is longer than
            `max_seconds`, by its header, has less than 1,000 samples a second, or is of another format.

    Example:
        >>> import tempfile, soundfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     soundfile.write(f"{folder}/a.wav", torch.zeros(8_000, 2).numpy(), 8_000)
        ...     read_audio(f"{folder}/a.wav").shape
        torch.Size([16000])
    """
    check_positive("sampling_rate", sampling_rate)
    if not as_float("max_seconds", max_seconds, "a positive number") > 0:
        raise ValueError(f"max_seconds must be a positive number, got {max_seconds!r}")
    soundfile = _import_soundfile("reading sound")
    path = Path(path).expanduser()
    if path.is_dir():
        raise AudioError(f"{path}: must be a sound, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"sound must be a file, got no such file: {path}")
    if not path.is_file():
        raise AudioError(f"{path}: must be a file on a disk, got a pipe or a device")
    if not path.stat().st_size:
        raise AudioError(f"{path}: must be a sound, got an empty file")
    try:
        # By its number: of a name soundfile would believe the ending, and errors in its callbacks would be printed.
        with path.open("rb") as stream, soundfile.SoundFile(stream.fileno(), closefd=False) as file:
            rate = file.samplerate
            if file.format not in _WHOLE:
                raise AudioError(f"{path}: must be one of {', '.join(_WHOLE)}, got {file.format}")
            if rate < _LEAST_RATE:
                raise AudioError(f"{path}: must have at least {_LEAST_RATE} samples a second, got {rate}")
            seconds = file.frames / rate
            if seconds > max_seconds:
                raise AudioError(f"{path}: must last at most {max_seconds:g} s, got {seconds:g} s")
            _refuse_truncated(file, path)
            if file.format in ("OGG", "NIST"):
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    (_refuse_open_ogg if file.format == "OGG" else _refuse_short_nist)(content, path)
            sound, read = _decoded(file, sampling_rate)
            _refuse_unread(file, read, stream, path)
    except (AudioError, ImportError, MemoryError):
        raise
    except Exception as error:  # on damaged files libsndfile and its wrapper raise almost any error
        raise AudioError(f"{path}: must be a whole sound, got an error: {error}") from error
    if not sound.numel():
        got = f"{read} at {rate} Hz, of which none is left at {sampling_rate} Hz" if read else "none"
        raise AudioError(f"{path}: must have at least one sample, got {got}")
    if not sound.isfinite().all():
        raise AudioError(f"{path}: must have finite values, got NaN or infinity")
    return sound


def _import_soundfile(what: str) -> Any:
    try:
        import soundfile
        import soxr  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{what} needs soundfile and soxr: pip install "mmkernels[audio]"') from error
    return soundfile


def _refuse_truncated(file: Any, path: Path) -> None:
    """Raises where a header gives more bytes than the file has: libsndfile would read those that are there."""
    for line in file.extra_info.splitlines():  # such as "data : 64000 (should be 31956)"
        name, _, sizes = line.partition(":")
        if name.strip() in _SIZE_FIELDS and "(should be" in sizes:
            must, got = (int(size.strip(" )"), 0) for size in sizes.split("(should be"))
            if must > got and must not in _UNKNOWN_SIZES:
                raise AudioError(f"{path}: must have {must} bytes, as its header says, got {got}")


def _refuse_open_ogg(content: mmap.mmap, path: Path) -> None:
    """Raises unless each stream of an Ogg file has its last page: libsndfile takes the last one that is there for it.

    Source: RFC 3533, section 6: 27 bytes, of which byte 5 has the flags and byte 26 the number of segments, then the
    sizes of these, then their contents.
    """
    streams: set[bytes] = set()
    place = content.find(b"OggS")
    while place >= 0 and content[place : place + 4] == b"OggS":
        header = content[place : place + 27]
        sizes = content[place + 27 : place + 27 + header[-1]] if len(header) == 27 else b""
        begin = place + 27 + len(sizes)
        place = begin + sum(sizes)
        if len(header) < 27 or len(sizes) < header[26] or place > len(content):
            raise AudioError(f"{path}: must be a whole Ogg file, got one that ends within a page")
        flags, serial = header[5], header[14:18]
        streams = streams - {serial} if flags & 4 else streams | {serial}
    if streams:
        raise AudioError(f"{path}: must be a whole Ogg file, got one without the page that ends its stream")


def _refuse_short_nist(content: mmap.mmap, path: Path) -> None:
    """Raises where a NIST file has fewer bytes than its header says."""
    fields = (line.split() for line in content[:1024].decode("latin-1").splitlines())
    said = {words[0]: int(words[2]) for words in fields if len(words) == 3 and words[1] == "-i"}
    frame = said.get("channel_count", 1) * said.get("sample_n_bytes", 1)
    must, got = said.get("sample_count", 0) * frame, len(content) - 1024
    if must > got:
        raise AudioError(f"{path}: must have {must} bytes, as its header says, got {got}")


def _decoded(file: Any, sampling_rate: int) -> tuple[Tensor, int]:
    """Returns the mean of the channels of an open file, float32 ``[samples]``, and how many frames were read."""
    import numpy as np
    import soxr

    resampler = None
    if file.samplerate != sampling_rate:
        resampler = soxr.ResampleStream(file.samplerate, sampling_rate, 1, dtype="float32", quality="HQ")
    # Not a list of parts, which would take the memory of the result once more.
    sound = np.empty(math.ceil(file.frames * sampling_rate / file.samplerate) + 1, dtype=np.float32)
    filled, read = 0, 0
    while True:
        block = file.read(_BLOCK, dtype="float32", always_2d=True)  # [frames, channels]
        read += block.shape[0]
        last = block.shape[0] < _BLOCK
        mono = block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0]
        part = mono if resampler is None else resampler.resample_chunk(mono, last=last)
        if filled + len(part) > len(sound):  # a header said too little
            sound.resize(filled + len(part) + _BLOCK, refcheck=False)
        sound[filled : filled + len(part)] = part
        filled += len(part)
        if last:
            sound.resize(filled, refcheck=False)
            return torch.from_numpy(sound), read


def _refuse_unread(file: Any, read: int, stream: BinaryIO, path: Path) -> None:
    """Raises where a file holds more than was decoded.

    libsndfile guesses the length of an MP3 without a header that says it, as if all frames had the first one's bitrate.
    A guess that is too long does no harm; one that is too short leaves bytes behind.
    """
    if file.format != "MP3" or _says_length(stream):
        if read < file.frames:
            raise AudioError(f"{path}: must have {file.frames} samples, as its header says, got {read}")
        return
    size = path.stat().st_size
    left = size - os.lseek(stream.fileno(), 0, os.SEEK_CUR)
    if left > 4096 + size // 50:  # more than tags
        must = "an MP3 of one bitrate, or with a header that says its length (Xing)"
        raise AudioError(f"{path}: must be {must}, got one of {size} bytes of which {left} were not read")


def _says_length(stream: BinaryIO) -> bool:
    """Whether an MP3 has a header that says how many frames it has."""
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(tag) >= 0 for tag in (b"Xing", b"Info", b"VBRI"))


def resample(sound: Sound, from_rate: int, to_rate: int = SAMPLING_RATE) -> Tensor:
    """Returns a sound at another sampling rate, float32 ``[samples * to_rate / from_rate]`` (soxr, "HQ").

    Args:
        sound: as of `log_mel`.
        from_rate: of `sound`, in samples a second.
        to_rate: of the result.

    Raises:
        TypeError, ValueError: as of `check_sound`; or the sound is too short to have a sample at the new rate.

    Example:
        >>> resample(torch.zeros(44_100), 44_100).shape
        torch.Size([16000])
    """
    check_positive("from_rate", from_rate)
    check_positive("to_rate", to_rate)
    values = check_sound("sound", sound)
    if from_rate == to_rate:
        return values
    _import_soundfile("resampling")
    import soxr

    resampled = torch.from_numpy(soxr.resample(values.numpy(), from_rate, to_rate, quality="HQ"))
    if not resampled.shape[0]:
        got = f"{values.shape[0]} at {from_rate} Hz"
        raise ValueError(f"sound must be long enough to have a sample at {to_rate} Hz, got {got}")
    return resampled


def check_sound(name: str, sound: object) -> Tensor:
    """Returns a sound as float32 ``[samples]`` on the CPU.

    Args:
        name: of the argument, for errors.
        sound: a tensor or an array.

    Raises:
        TypeError: it is not of floats.
        ValueError: it has more than one channel or no sample, or holds NaN, infinity, or values on another scale than
            -1 to 1.

    Example:
        >>> check_sound("sound", torch.zeros(2, 100))
        Traceback (most recent call last):
        ValueError: sound must be one channel, [samples], got shape (2, 100): take the mean over its channels
    """
    import numpy as np

    if isinstance(sound, np.ndarray):
        floating = np.issubdtype(sound.dtype, np.floating)
    elif isinstance(sound, Tensor):
        floating = sound.is_floating_point()
    else:
        raise TypeError(f"{name} must be a tensor or an array of floats, got {described(sound)}")
    if not floating:
        hint = ": divide 16-bit integers by 32768, and 8-bit ones, less 128, by 128"
        raise TypeError(f"{name} must be floats from -1 to 1, got {sound.dtype}{hint}")
    if sound.ndim != 1:
        hint = ": take the mean over its channels" if sound.ndim == 2 else ""
        raise ValueError(f"{name} must be one channel, [samples], got shape {tuple(sound.shape)}{hint}")
    if not sound.shape[0]:
        raise ValueError(f"{name} must have at least one sample, got none")
    if isinstance(sound, Tensor):
        values = sound.detach().float().cpu()
    else:  # a copy: PyTorch takes no read-only memory and no negative strides
        values = torch.from_numpy(np.array(sound, dtype=np.float32))
    loudest = values.abs().amax()
    if not loudest.isfinite():
        raise ValueError(f"{name} must have finite values, got NaN or infinity")
    if loudest > _LOUDEST:
        raise ValueError(f"{name} must be floats from -1 to 1, got values up to {float(loudest):g}")
    return values


def cut_sound(
    sound: Sound, sampling_rate: int = SAMPLING_RATE, *, seconds: float = 30.0, overlap: float = 0.0
) -> list[Tensor]:
    """Returns a sound in windows, float32 ``[samples]`` each; only the last one may be shorter.

    Window i begins ``i * (seconds - overlap)`` seconds behind the beginning.

    Args:
        sound: as of `log_mel`.
        sampling_rate: of `sound`, in samples a second.
        seconds: how long the windows are.
        overlap: by how many seconds a window begins before its predecessor ends.

    Raises:
        ValueError: the windows hold no whole number of samples, or `overlap` is not from 0 to below `seconds`.

    Example:
        >>> [part.shape[0] for part in cut_sound(torch.zeros(70 * 16_000))]
        [480000, 480000, 160000]
    """
    values = check_sound("sound", sound)
    length = _samples("seconds", seconds, sampling_rate)
    if isinstance(overlap, int | float) and overlap < 0:
        raise ValueError(f"overlap must be from 0 to below seconds = {seconds:g}, got {overlap:g}")
    shared = 0 if overlap == 0 else _samples("overlap", overlap, sampling_rate)
    if shared >= length:
        raise ValueError(f"overlap must be from 0 to below seconds = {seconds:g}, got {overlap:g}")
    starts = range(0, max(1, values.shape[0] - shared), length - shared)
    return [values[start : start + length] for start in starts]


def _samples(name: str, seconds: float, sampling_rate: int) -> int:
    """Returns how many samples a time has."""
    check_positive("sampling_rate", sampling_rate)
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{name} must be a positive number of seconds, got {seconds!r}")
    samples = round(seconds * sampling_rate)
    if not samples or abs(samples - seconds * sampling_rate) > 1e-6 * samples:
        raise ValueError(f"{name} must be a whole number of samples at {sampling_rate} Hz, got {seconds!r} s")
    return samples


def mel_frames(samples: int, hop: int = HOP) -> int:
    """Returns how many frames of features a sound of so many samples has: its last frame may be part silence.

    Example:
        >>> mel_frames(16_000), mel_frames(1)
        (100, 1)
    """
    return -(-samples // hop)


def log_mel(
    sounds: Sound | Sequence[Sound],
    sampling_rate: int,
    *,
    bands: int = 80,
    seconds: float = 30.0,
    extractor: Any = None,
) -> LogMel:
    """Returns the log-mel features of sounds, each with silence behind it up to a length: transformers' Whisper ones.

    Args:
        sounds: one sound, ``[samples]``, a tensor or an array of floats from -1 to 1, or several.
        sampling_rate: of the sounds, in samples a second; it must be that of the features, 16,000. Stated by the
            caller, since samples do not tell: see `resample` for other ones.
        bands: 80, or 128 for Whisper large-v3 and Qwen2-Audio, at most 1,024; without `extractor`.
        seconds: how long the padded sounds are, a multiple of 10 ms, at most `MAX_SECONDS`.
        extractor: transformers' `WhisperFeatureExtractor`, as a model's folder describes it; None: the one of Whisper.

    Returns:
        `LogMel`: float32 ``[N, bands, 100 * seconds]``, and the number of frames of each sound without the silence.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: a sound is not one that `check_sound` takes, or has another sampling rate.
        ValueError: a sound is longer than `seconds`, see `cut_sound`.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (Whisper), 2022, section 2.2.

    Example:
        >>> mel = log_mel([torch.rand(16_000), torch.rand(100)], 16_000, seconds=2)
        >>> mel.features.shape, mel.lengths
        (torch.Size([2, 80, 200]), (100, 1))
    """
    if extractor is None:
        check_positive("bands", bands)
        if bands > _MOST_BANDS:
            raise ValueError(f"bands must be at most {_MOST_BANDS}, got {bands}")
        extractor = import_transformers("computing features").WhisperFeatureExtractor(feature_size=bands)
    if not all(hasattr(extractor, name) for name in ("sampling_rate", "hop_length", "n_fft")):
        raise TypeError(f"extractor must be a WhisperFeatureExtractor or None, got {type(extractor).__name__}")
    rate, hop = extractor.sampling_rate, extractor.hop_length
    if sampling_rate != rate:
        raise ValueError(f"sampling_rate must be {rate}, got {sampling_rate!r}: resample the sounds")
    length = _samples("seconds", seconds, rate)
    if seconds > MAX_SECONDS:
        raise ValueError(f"seconds must be at most {MAX_SECONDS:g}, got {seconds:g}")
    if length % hop or length <= extractor.n_fft // 2:
        must = f"a multiple of {hop / rate:g} s above {extractor.n_fft / 2 / rate:g} s"
        raise ValueError(f"seconds must be {must}, got {seconds!r}")
    several = isinstance(sounds, list | tuple)
    named = [(f"sounds[{i}]", x) for i, x in enumerate(sounds)] if several else [("sounds", sounds)]
    if not named:
        raise ValueError("sounds must have at least one sound, got none")
    checked = []
    for name, sound in named:
        checked.append(check_sound(name, sound))
        if checked[-1].shape[0] > length:
            got = f"{checked[-1].shape[0] / rate:g} s"
            raise ValueError(f"{name} must last at most {seconds:g} s, got {got}: cut it into windows (cut_sound)")
    values: Any = extractor(
        [x.numpy() for x in checked], sampling_rate=rate, max_length=length, padding="max_length", return_tensors="pt"
    )
    features = torch.as_tensor(values["input_features"], dtype=torch.float32)
    return LogMel(features, tuple(mel_frames(x.shape[0], hop) for x in checked))
