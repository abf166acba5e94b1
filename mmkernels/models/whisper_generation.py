"""How a `Whisper` writes: greedily, by drawing tokens, or by a beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.models.blocks.beams import beam_search, check_beams
from mmkernels.models.blocks.generation import continue_text
from mmkernels.models.blocks.sampling import check_sampling
from mmkernels.models.whisper_decoder import SoundKeys, WhisperCache
from mmkernels.models.whisper_timestamps import head_index, token_times_of
from mmkernels.models.whisper_tokens import TokenRules
from mmkernels.nn.checks import check_positive
from mmkernels.runtime.checks import check_bool

if TYPE_CHECKING:
    from mmkernels.models.whisper import Whisper


@dataclass
class WhisperOutput:
    """The result of `Whisper.forward`.

    Attributes:
        logits: ``[R, L, vocab_size]``, or ``[R, 1, vocab_size]`` of the last token of each row; None with labels, where
            they were not asked for.
        loss: the mean cross-entropy of the next token; None without labels.
        cache: of the text so far, an argument of the next call; None with labels, if none was given.
    """

    logits: Tensor | None
    loss: Tensor | None
    cache: WhisperCache | None


@dataclass
class WhisperGeneration:
    """The result of `Whisper.generate`.

    Attributes:
        tokens: int64 ``[B, n]``, without the prompt; padding follows the end-of-text token of a row.
        lengths: the tokens of each row, the end-of-text token included, int64 ``[B]``.
        prompt: the prompts, int64 ``[B, P]``.
        scores: of a beam search, the mean log-probability of a row's tokens (with ``length_penalty=1``), ``[B]``; else
            None.
        token_times: when each token begins, in seconds from the start of its sound, float32 ``[B, n]``; None where it
            was not asked for. The last token of a row has the time of the one before it, as in transformers, and so has
            padding.
    """

    tokens: Tensor
    lengths: Tensor
    prompt: Tensor
    scores: Tensor | None = None
    token_times: Tensor | None = None


class Options(NamedTuple):
    """How texts are written: arguments of `Whisper.generate`, whose docstring describes them.

    Attributes:
        ends: the tokens that end a text.
    """

    timestamps: bool
    token_times: bool
    max_new_tokens: int | None
    num_beams: int
    length_penalty: float
    temperature: float
    top_p: float
    seed: int | None
    ends: tuple[int, ...]

    @classmethod
    def checked(cls, model: Whisper, *, eos_token_id: int | Sequence[int] | None, **options: Any) -> Options:
        """Returns options after a check; `options`: those of the class but `ends`."""
        given = model.config.eos_token_ids if eos_token_id is None else eos_token_id
        ends: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple) else (given,)
        vocab = model.config.vocab_size
        if not all(type(token) is int and 0 <= token < vocab for token in ends):
            raise ValueError(f"eos_token_id must be integers below vocab_size = {vocab}, got {eos_token_id!r}")
        found = cls(ends=ends, **options)
        check_bool("timestamps", found.timestamps)
        check_bool("token_times", found.token_times)
        check_beams(found.num_beams, found.length_penalty)
        if found.num_beams == 1 and found.length_penalty != 1.0:
            raise ValueError(f"length_penalty must be left out with num_beams = 1, got {found.length_penalty}")
        check_sampling(found.temperature, found.top_p)
        if found.max_new_tokens is not None:
            check_positive("max_new_tokens", found.max_new_tokens)
        if found.num_beams > 1 and (found.temperature != 0.0 or found.top_p != 1.0 or found.seed is not None):
            raise ValueError(
                f"temperature, top_p and seed must be left out with num_beams = {found.num_beams}, got one"
            )
        if found.token_times and not model.config.tokens.alignment_heads:
            raise ValueError("token_times must be False: the configuration has no alignment_heads, got True")
        return found


class _Written(NamedTuple):
    """Tokens ``[B, n]``, their number ``[B]``, and what a beam search adds."""

    tokens: Tensor
    lengths: Tensor
    scores: Tensor | None = None
    rows: Tensor | None = None


def prompts(
    model: Whisper,
    keys: SoundKeys,
    *,
    language: str | Sequence[str] | None,
    task: str | None,
    timestamps: bool,
    prompt_ids: Tensor | None,
) -> Tensor:
    """Returns the prompt of each sound, int64 ``[B, P]``; the arguments are those of `Whisper.generate`."""
    c = model.config
    prompt = c.tokens.prompt(
        c.start_token_id,
        keys.batch,
        model.decoder.embed.weight.device,
        language=language,
        task=task,
        timestamps=timestamps,
        detect=lambda: model.likeliest_language(keys),
    )
    if prompt_ids is not None:
        check_prompt_ids(prompt_ids)
        before = prompt_ids.to(prompt)[None].expand(prompt.shape[0], -1)
        prompt = torch.cat([before, prompt], dim=1)
    if prompt.shape[1] >= c.text_length:
        must = f"prompt_ids must leave room in text_length = {c.text_length}"
        raise ValueError(f"{must}, got a prompt of {prompt.shape[1]} tokens")
    return prompt


def generate(
    model: Whisper, keys: SoundKeys, prompt: Tensor, options: Options, frame_lengths: Tensor | None
) -> WhisperGeneration:
    """Returns what is written about sounds.

    Args:
        model: the model.
        keys: of the sounds, what `Whisper.project` returned.
        prompt: of each sound, int64 ``[B, P]``.
        options: how.
        frame_lengths: the lengths of the sounds in frames, for the times of tokens; None: all frames count.
    """
    c = model.config
    room = c.text_length - prompt.shape[1]
    most = room if options.max_new_tokens is None else min(options.max_new_tokens, room)
    cache = WhisperCache(c.text_layers, reserve=prompt.shape[1] + most)
    cache.sound = keys
    rules = TokenRules(
        c.tokens,
        vocab_size=c.vocab_size,
        eos=min(options.ends or c.eos_token_ids),
        timestamps=options.timestamps,
        device=prompt.device,
    )
    heads = head_index(c.tokens.alignment_heads, prompt.device) if options.token_times else {}
    writer = _Writer(model, cache, rules, heads)
    written = (writer.search if options.num_beams > 1 else writer.write)(prompt, most, options)
    times = None
    if options.token_times:
        times = token_times_of(cache, written.lengths, written.rows, frame_lengths, filter_width=c.median_filter)
    return WhisperGeneration(written.tokens, written.lengths, prompt, written.scores, times)


def check_prompt_ids(prompt_ids: Tensor | None) -> None:
    """Raises unless the text that came before is integers ``[n]``, or None."""
    if prompt_ids is None:
        return
    if not isinstance(prompt_ids, Tensor) or prompt_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"prompt_ids must be an int32 or int64 tensor, got {type(prompt_ids).__name__}")
    if prompt_ids.dim() != 1:
        raise ValueError(f"prompt_ids must be [n], got shape {tuple(prompt_ids.shape)}")


class _Writer:
    """Calls the model step by step.

    Args:
        model: the model.
        cache: has the sounds.
        rules: which token may come next.
        heads: layer -> the heads whose queries to the sound are kept, once the prompt was read.
    """

    def __init__(self, model: Whisper, cache: WhisperCache, rules: TokenRules, heads: dict[int, Tensor]) -> None:
        self.model, self.cache, self.rules, self.heads = model, cache, rules, heads

    def write(self, prompt: Tensor, most: int, options: Options) -> _Written:
        """Returns what one text for each sound says, in `most` tokens at most."""
        written = prompt[:, :0]

        def step(ids: Tensor) -> Tensor:
            nonlocal written
            if self.cache.pending is not None:
                written = torch.cat([written, self.cache.pending[0]], dim=1)
            return self.rules(self._scores(ids), written)

        tokens = continue_text(
            step,
            prompt,
            self.cache,
            max_new_tokens=most,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            eos_token_id=options.ends,
            pad_token_id=self.model.config.pad_token_id,
        )
        ended = torch.isin(tokens, tokens.new_tensor(options.ends)).long()
        return _Written(tokens, (ended.cumsum(1) == ended).sum(1))

    def search(self, prompt: Tensor, most: int, options: Options) -> _Written:
        """Returns the best of several texts for each sound. The prompt is read once for all of them."""

        def step(tokens: Tensor, rows: Tensor) -> Tensor:
            # The first beams continue the prompts, of which there is one for each sound.
            self.cache.take(rows // options.num_beams if tokens.shape[1] == 1 else rows)
            return self.rules(self._scores(tokens[:, -1:]).float().log_softmax(-1), tokens)

        first = self.rules(self._scores(prompt).float().log_softmax(-1), prompt[:, :0])
        found = beam_search(
            step,
            first,
            num_beams=options.num_beams,
            max_new_tokens=most,
            eos_token_id=options.ends,
            pad_token_id=self.model.config.pad_token_id,
            length_penalty=options.length_penalty,
        )
        return _Written(*found)

    def _scores(self, ids: Tensor) -> Tensor:
        """Returns the logits of the next token; from the second call on the queries are kept."""
        logits = self.model(ids, cache=self.cache, last_logits_only=True).logits
        self.cache.heads = self.heads
        assert isinstance(logits, Tensor)
        return logits[:, 0]
