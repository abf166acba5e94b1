"""Whisper: an encoder of sounds, and a decoder that writes what is said in them.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models import whisper_weights
from mmkernels.models.blocks.audio_encoder import AudioEncoder
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.generation import next_token_loss
from mmkernels.models.blocks.media import last_of
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.text import check_tokens
from mmkernels.models.whisper_config import SIZES, WhisperConfig
from mmkernels.models.whisper_decoder import Sound, SoundKeys, WhisperCache, WhisperDecoder
from mmkernels.models.whisper_generation import Options, WhisperGeneration, WhisperOutput, generate, prompts
from mmkernels.models.whisper_long import Segment, transcribe
from mmkernels.models.whisper_timestamps import check_finite, check_frame_lengths
from mmkernels.nn.checks import check_features
from mmkernels.runtime.checks import can_look, check_bool, check_range, is_known


class Whisper(Model):
    """Writes what is said in a sound, in its language or in English, with the times at which it is said.

    `from_pretrained` reads the folder of a Hugging Face ``WhisperForConditionalGeneration``, with the special tokens of
    its ``generation_config.json``.

    The features of a sound are computed once, and so are their keys and values in each layer of the decoder. All beams
    of a search are queries to the same keys, which are read once for all of them.

    Whisper was trained on sounds that are filled up to 30 seconds with silence, to which it attends, as it does in
    transformers. With the lengths of the sounds nothing sees the silence: a short sound then costs less.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import Whisper
        >>> model = Whisper.from_size("tiny").eval()
        >>> sounds = torch.randn(2, 80, 100)  # log-mel spectrograms
        >>> ids = torch.randint(60, (2, 6))
        >>> model(ids, sounds).logits.shape, model(ids, sounds, labels=ids).loss.shape
        (torch.Size([2, 6, 128]), torch.Size([]))
        >>> model.generate(sounds, max_new_tokens=5, num_beams=3, eos_token_id=()).tokens.shape
        torch.Size([2, 5])
    """

    sizes = SIZES
    config: WhisperConfig

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        c = config
        self.encoder = AudioEncoder(
            c.audio,
            mel_bins=c.mel_bins,
            positions=c.audio_positions,
            residual_dropout=c.audio_residual_dropout,
            activation_dropout=c.audio_activation_dropout,
            layer_dropout=c.audio_layer_dropout,
        )
        self.decoder = WhisperDecoder(
            c.text,
            vocab_size=c.vocab_size,
            length=c.text_length,
            pad=c.pad_token_id,
            residual_dropout=c.text_residual_dropout,
            activation_dropout=c.text_activation_dropout,
            layer_dropout=c.text_layer_dropout,
        )
        self.head = nn.Linear(c.text_width, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.decoder.embed.weight

    def _set_constants(self) -> None:
        self.encoder.set_positions()

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> WhisperConfig:
        return WhisperConfig.from_hf(values, str(path))

    @classmethod
    def _names(cls, config: WhisperConfig) -> Names:
        return whisper_weights.NAMES

    # The stages.

    def encode(self, input_features: Tensor, frame_lengths: Tensor | None = None) -> Sound:
        """Returns the features of sounds.

        Args:
            input_features: log-mel spectrograms, floating ``[B, mel_bins, T]``; T is at most twice `audio_positions`,
                3,000 in published models. (Those were trained at this T alone.)
            frame_lengths: integers ``[B]``, 0 to T: nothing sees the frames behind them; None: all T are seen. Lengths
                on a CPU also cut off what no sound needs.
        """
        input_features = _needed(input_features, frame_lengths)
        features = self.encoder(input_features, frame_lengths)
        lengths = None if frame_lengths is None else self.encoder.output_lengths(frame_lengths).to(features.device)
        return Sound(features, lengths)

    def project(self, sound: Sound) -> SoundKeys:
        """Returns the keys and values of sounds for each layer of the decoder; computed once, they serve all texts."""
        return self.decoder.project(sound)

    def forward(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        *,
        frame_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sound: Sound | None = None,
        cache: WhisperCache | None = None,
        labels: Tensor | None = None,
        last_logits_only: bool = False,
        return_logits: bool | None = None,
    ) -> WhisperOutput:
        """Returns the logits of the next token of texts about sounds, or of their continuation; or the loss.

        Args:
            input_ids: the new tokens, integers ``[R, L]``, behind their prompt (<|startoftranscript|>, language, task).
                R is the number of sounds B, or a multiple of it: the texts of a sound are one behind the other.
            input_features, frame_lengths: as in `encode`; or
            sound: what `encode` returned for them. Neither with a cache that has the sounds.
            attention_mask: bool or integers ``[R, L]``, 0: padding, on either side.
            cache: from earlier calls; it is updated. No layer of the decoder is then dropped in training.
            labels: ``[R, L]``, -100: ignored. Token i is predicted from the tokens before i. (Labels of transformers'
                class are those without the first token: here they are the same as `input_ids`, where nothing is
                ignored.) The loss builds no logits: see `mmkernels.linear_cross_entropy`.
            last_logits_only: whether to compute the logits of the last token of each row only.
            return_logits: whether to compute logits at all; None: unless labels are given.

        Raises:
            TypeError, ValueError: an input has a wrong type or shape, or another batch than the others; a text is
                empty or longer than `text_length`; there is no sound, or one that a cache has already.
        """
        if labels is not None and last_logits_only:
            raise ValueError("labels need the logits of every token: last_logits_only must be False")
        if labels is not None and self.training and self.config.spec_augment:
            must = "labels must be None in training mode, because the checkpoint asks for SpecAugment"
            raise ValueError(f"{must}: mask the spectrograms yourself, with spec_augment=False, got labels")
        store = WhisperCache(len(self.decoder.blocks)) if cache is None else cache
        ids, valid, padded = self._texts(input_ids, attention_mask, labels, store)
        if store.sound is None:
            store.sound = self.project(self._sound(input_features, frame_lengths, sound))
        elif input_features is not None or sound is not None or frame_lengths is not None:
            raise ValueError("input_features, frame_lengths and sound must be None: the cache has the sounds, got one")
        _check_rows(ids.shape[0], store.sound.batch)
        x = self.decoder(ids, valid, padded, sound=store.sound, cache=store, drop_layers=cache is None)
        store.pending = None
        x = last_of(x, valid)[:, None] if last_logits_only else x[:, x.shape[1] - input_ids.shape[1] :]
        loss = None if labels is None else next_token_loss(self.head, x, labels)
        wanted = labels is None if return_logits is None else return_logits
        kept = store if cache is not None or labels is None else None
        return WhisperOutput(self.head(x) if wanted else None, loss, kept)

    def _sound(self, input_features: Tensor | None, frame_lengths: Tensor | None, sound: Sound | None) -> Sound:
        """Returns the features of sounds; raises unless they are given in one way."""
        if (input_features is None) == (sound is None):
            got = "neither" if sound is None else "both"
            raise ValueError(f"input_features or sound must be given, got {got}")
        if sound is None:
            assert input_features is not None
            return self.encode(input_features, frame_lengths)
        if frame_lengths is not None:
            raise ValueError("frame_lengths must be None with sound, which has lengths, got a tensor")
        if not isinstance(sound, Sound):
            raise TypeError(f"sound must be what encode returns, got {type(sound).__name__}")
        check_features("sound.features", sound.features, self.config.audio_width)
        return sound

    def _texts(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, cache: WhisperCache
    ) -> tuple[Tensor, Tensor, bool]:
        """Returns checked tokens behind the one that is pending, which are valid, and whether any may be padding."""
        if not isinstance(cache, WhisperCache):
            raise TypeError(f"cache must be a WhisperCache or None, got {type(cache).__name__}")
        if cache.num_layers != len(self.decoder.blocks):
            raise ValueError(f"cache must have {len(self.decoder.blocks)} layers, got {cache.num_layers}")
        valid, padded = check_tokens(input_ids, attention_mask, labels, self.config.vocab_size, cache)
        pending, new = cache.pending, input_ids.shape[1]
        least, most = 0 if pending is not None else 1, self.config.text_length - cache.num_tokens
        if not least <= new <= most - (1 - least):
            raise ValueError(f"input_ids must have {least} to {most - (1 - least)} tokens, got {new}")
        if pending is None:
            return input_ids, valid, padded
        ids, valid = torch.cat([pending[0], input_ids], dim=1), torch.cat([pending[1], valid], dim=1)
        return ids, valid, padded or ids.shape[0] > 1  # a row may have ended before the others

    @torch.no_grad()
    def detect_language(self, sound: Sound) -> Tensor:
        """Returns the token of the language of each sound, int64 ``[B]``: the likeliest behind the first token.

        Args:
            sound: what `encode` returned.

        Raises:
            ValueError: the model has no tokens of languages.
        """
        heard = self._sound(None, None, sound)
        check_finite("sound.features", heard.features.transpose(1, 2), heard.lengths)
        return self.likeliest_language(self.project(heard))

    def likeliest_language(self, keys: SoundKeys) -> Tensor:
        """Returns what `detect_language` does; `keys`: what `project` returned."""
        c = self.config
        if not c.tokens.languages:
            raise ValueError("the model must have tokens of languages to detect one, got none")
        cache = WhisperCache(len(self.decoder.blocks))
        cache.sound = keys
        device = self.decoder.embed.weight.device
        languages = torch.tensor(list(c.tokens.languages.values()), device=device)
        logits = self(torch.full((keys.batch, 1), c.start_token_id, device=device), cache=cache).logits[:, 0]
        return languages[logits[:, languages].argmax(-1)]

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor | None = None,
        *,
        frame_lengths: Tensor | None = None,
        hide_padding: bool = False,
        sound: Sound | None = None,
        language: str | Sequence[str] | None = None,
        task: str | None = None,
        timestamps: bool = False,
        token_times: bool = False,
        prompt_ids: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> WhisperGeneration:
        """Writes what is said in sounds. They are encoded, and their keys and values computed, once.

        Args:
            input_features: as in `encode`; or
            sound: what `encode` returned.
            frame_lengths: the lengths of the sounds in frames, integers ``[B]``, for `hide_padding` and `token_times`;
                None: those with which `sound` was encoded, if any.
            hide_padding: whether nothing sees the frames behind the lengths. False: the decoder attends to them, as in
                transformers and in training.
            language: of all sounds, such as "en", or a list with one of each; None: the configuration's, or else it is
                detected.
            task: "transcribe", or "translate" to English; None: the configuration's, or "transcribe".
            timestamps: whether times are written between the words, whatever the configuration says.
            token_times: whether to compute when each token is spoken, in seconds: see `WhisperGeneration.token_times`.
                Needs `alignment_heads` in the configuration.
            prompt_ids: text that came before, integers ``[n]``, with <|startofprev|> in front, as the tokenizer's
                ``get_prompt_ids`` returns it.
            max_new_tokens: the largest number of tokens to write; a text ends too where it has `text_length` tokens.
                None: as many as fit.
            num_beams: how many texts a beam search keeps; 1: none. See `blocks.beams.beam_search`.
            length_penalty: of a beam search, from -10 to 10: above 1 longer texts are preferred.
            temperature, top_p: as in `blocks.sampling.sample`; temperature 0 takes the most likely token.
            seed: for a reproducible draw; None: PyTorch's global generator.
            eos_token_id: the tokens that end a row; None: the configuration's; (): none.

        Raises:
            TypeError, ValueError: as `forward`; an option is unknown, or the model has no token for it; a sound holds
                NaN or infinity (looked at on a CPU only).
        """
        check_bool("hide_padding", hide_padding)
        if frame_lengths is not None and not (hide_padding or token_times):
            raise ValueError("frame_lengths must be None without hide_padding and token_times, got a tensor")
        if hide_padding and frame_lengths is None:
            raise ValueError("frame_lengths must be given with hide_padding, got None")
        options = Options.checked(
            self,
            timestamps=timestamps,
            token_times=token_times,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=eos_token_id,
        )
        seen = frame_lengths if hide_padding else None
        heard = self._sound(input_features, seen, sound)
        batch = heard.features.shape[0]
        if not batch:
            raise ValueError("input_features or sound must have at least one sound, got none")
        check_frame_lengths(frame_lengths, batch)
        if input_features is not None:
            check_finite("input_features", input_features, seen)
        else:
            check_finite("sound.features", heard.features.transpose(1, 2), heard.lengths)
        if frame_lengths is not None:
            most = 2 * heard.features.shape[1] if input_features is None else input_features.shape[2]
            check_range("frame_lengths", frame_lengths, 0, most)
        if frame_lengths is None and heard.lengths is not None:
            frame_lengths = 2 * heard.lengths
        keys = self.project(heard)
        prompt = prompts(self, keys, language=language, task=task, timestamps=timestamps, prompt_ids=prompt_ids)
        return generate(self, keys, prompt, options, frame_lengths)

    @torch.no_grad()
    def transcribe(
        self,
        input_features: Tensor,
        frame_lengths: Tensor | None = None,
        *,
        hide_padding: bool = False,
        language: str | Sequence[str] | None = None,
        task: str | None = None,
        token_times: bool = False,
        prompt_ids: Tensor | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> list[list[Segment]]:
        """Writes what is said in sounds of any length: no part of a sound is left out.

        A sound is read in windows of 30 seconds (twice `audio_positions` frames). The model writes times between its
        sentences; the next window begins at the last time behind which a sentence was cut off, or else where the window
        ends. What decides this is looked at by the host, once for each window of all sounds that are not at their end.

        Args:
            input_features: log-mel spectrograms, floating ``[B, mel_bins, T]``, of any T: those of `log_mel` with the
                `seconds` of the longest sound.
            frame_lengths: the lengths of the sounds in frames, integers ``[B]``; None: all have T frames.
            hide_padding: whether nothing sees the padding of the last window; see `generate`.
            language, task, prompt_ids, token_times, num_beams, length_penalty: as in `generate`; a language that is not
                given is detected in the first window. `prompt_ids` precede each window.

        Returns:
            The segments of each sound, in their order.

        Raises:
            TypeError, ValueError: as `generate`; the model has no times.

        Source: Radford et al., 2022, section 3.8: the windows, without the further heuristics (temperatures, and the
        text before a window as its prompt).
        """
        check_bool("hide_padding", hide_padding)
        options = Options.checked(
            self,
            timestamps=True,
            token_times=token_times,
            max_new_tokens=None,
            num_beams=num_beams,
            length_penalty=length_penalty,
            temperature=0.0,
            top_p=1.0,
            seed=None,
            eos_token_id=None,
        )
        return transcribe(
            self,
            input_features,
            frame_lengths,
            options,
            hide_padding=hide_padding,
            language=language,
            task=task,
            prompt_ids=prompt_ids,
        )


def _needed(input_features: Tensor, frame_lengths: Tensor | None) -> Tensor:
    """Returns the spectrograms without the frames behind the longest sound, where the host knows its length."""
    if not isinstance(frame_lengths, Tensor) or frame_lengths.device.type != "cpu" or not can_look(frame_lengths):
        return input_features
    if not frame_lengths.numel() or not isinstance(input_features, Tensor) or input_features.dim() != 3:
        return input_features  # the encoder refuses it
    longest = max(int(frame_lengths.max()), 1)
    return input_features[:, :, :longest] if longest < input_features.shape[2] else input_features


def _check_rows(rows: int, sounds: int) -> None:
    """Raises unless there are as many texts for each sound. (Equal numbers first: a graph then takes them for one.)"""
    uneven = is_known(rows == 0) or is_known(sounds == 0) or is_known(rows % sounds != 0)
    if is_known(rows != sounds) and uneven:
        raise ValueError(f"input_ids must have as many rows as there are sounds, {sounds}, or a multiple, got {rows}")
