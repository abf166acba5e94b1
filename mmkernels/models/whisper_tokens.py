"""The special tokens of a `Whisper`: prompts, and the rules that say which token may come next.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, section 2.3 and figure 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.blocks.checkpoint import CheckpointError, read_json

TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class WhisperTokens:
    """What the special tokens of a vocabulary mean, as a ``generation_config.json`` says it.

    Args:
        languages: token's text, such as "<|en|>" -> token; empty: the model knows English alone.
        tasks: "transcribe" or "translate" -> token; empty: as `languages`.
        no_timestamps_token_id: says that no times are written; the tokens behind it are times, from 0 in steps of 0.02
            seconds. None: the vocabulary has no times.
        previous_token_id: begins the text that came before (<|startofprev|>); None: there is no such token.
        suppress, begin_suppress: tokens that are never written, and those that are not written first.
        max_initial_timestamp: the number of the largest time that may be written first; None: any.
        alignment_heads: (layer, head) of the decoder whose attention to the sound says when a word is spoken.
        prefix: further tokens of a prompt where neither language nor task is given; the first may be None: the language
            is detected.
        language, task: of texts for which none is given; they count more than `prefix`. None: none.
    """

    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    no_timestamps_token_id: int | None = None
    previous_token_id: int | None = None
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    max_initial_timestamp: int | None = None
    alignment_heads: tuple[tuple[int, int], ...] = ()
    prefix: tuple[int | None, ...] = ()
    language: str | None = None
    task: str | None = None

    @property
    def first_time(self) -> int | None:
        """The token of the time 0."""
        return None if self.no_timestamps_token_id is None else self.no_timestamps_token_id + 1

    def check(self, vocab_size: int, layers: int, heads: int) -> None:
        """Raises a ValueError unless tokens are in the vocabulary, heads in the decoder, and names known."""
        named = {
            "languages": tuple(self.languages.values()),
            "tasks": tuple(self.tasks.values()),
            "no_timestamps_token_id": (self.no_timestamps_token_id,),
            "previous_token_id": (self.previous_token_id,),
            "suppress": self.suppress,
            "begin_suppress": self.begin_suppress,
            "prefix": self.prefix,
        }
        for name, tokens in named.items():
            for token in tokens:
                missing = token is None and name in ("no_timestamps_token_id", "previous_token_id", "prefix")
                if not missing and (type(token) is not int or not 0 <= token < vocab_size):
                    raise ValueError(f"{name} must be integers below vocab_size = {vocab_size}, got {token!r}")
        for pair in self.alignment_heads:
            whole = len(pair) == 2 and all(type(number) is int for number in pair)
            if not whole or not (0 <= pair[0] < layers and 0 <= pair[1] < heads):
                must = f"alignment_heads must be pairs of a layer below {layers} and a head below {heads}"
                raise ValueError(f"{must}, got {pair!r}")
        most = self.max_initial_timestamp
        if most is not None and (type(most) is not int or most < 0):
            raise ValueError(f"max_initial_timestamp must be an integer >= 0 or None, got {most!r}")
        if self.language is not None and not isinstance(self.language, str):
            raise ValueError(f"language must be a string or None, got {self.language!r}")
        self.check_request(1, language=self.language, task=self.task, timestamps=False)

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> WhisperTokens:
        """Returns what a ``generation_config.json`` says; where there is none, what the ``config.json`` says.

        Args:
            config: the JSON object of the ``config.json``.
            path: of the ``generation_config.json``, which may be missing.

        Raises:
            CheckpointError: a value has another type than it must have.
        """
        values = read_json(path) if path.is_file() else _in_vocabulary(config)
        forced = values.get("forced_decoder_ids")
        where = path if path.is_file() else path.with_name("config.json")
        given = {ours: values[theirs] for ours, theirs in _FIELDS.items() if values.get(theirs) is not None}
        try:
            for name in ("suppress", "begin_suppress"):
                given[name] = tuple(given.get(name, ()))
            given["alignment_heads"] = tuple(tuple(pair) for pair in given.get("alignment_heads", ()))
            given["prefix"] = _forced(config.get("forced_decoder_ids") if forced is None else forced)
            for name in ("languages", "tasks"):
                given[name] = dict(given.get(name, {}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from error
        return cls(**given)

    # Prompts.

    def language_token(self, language: str) -> int:
        """Returns the token of a language.

        Args:
            language: as its token is written, or the code between the signs: "<|en|>", "en". English names such as
                "german" are known too.
        """
        if not isinstance(language, str):
            raise TypeError(f"language must be a string or a list of them, got {type(language).__name__}")
        name = language.lower()
        known = (name, f"<|{name}|>", f"<|{_codes().get(name, '')}|>")
        token = next((self.languages[key] for key in known if key in self.languages), None)
        if token is None:
            codes = ", ".join(key.strip("<|>") for key in list(self.languages)[:8])
            what = f"one of {codes}, ..." if codes else "None: the model has one language"
            raise ValueError(f"language must be {what}, got {language!r}")
        return token

    def check_request(
        self, batch: int, *, language: str | Sequence[str] | None, task: str | None, timestamps: bool
    ) -> None:
        """Raises unless the vocabulary has what `prompt` is asked for; the arguments are those of `prompt`."""
        if task is not None and task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)} or None, got {task!r}")
        if task is not None and task not in self.tasks:
            raise ValueError(f"task must be None: the model has no token for it, got {task!r}")
        if timestamps and self.first_time is None:
            raise ValueError("timestamps must be False: the model's vocabulary has no times, got True")
        if language is not None:
            self._language_column(language, batch, torch.device("cpu"))

    def prompt(
        self,
        start: int,
        batch: int,
        device: torch.device,
        *,
        language: str | Sequence[str] | None,
        task: str | None,
        timestamps: bool,
        detect: Callable[[], Tensor],
    ) -> Tensor:
        """Returns the prompt of each sound, int64 ``[B, P]``: what to do, in which language, with times or without.

        Args:
            start: the first token.
            batch: B.
            language: of all sounds, or one of each; None: the `language` of these tokens, what `prefix` says, or else
                what is detected.
            task: "transcribe" or "translate"; None: the `task` of these tokens, what `prefix` says, or "transcribe".
            timestamps: whether times are written.
            detect: returns the token of each sound's language, int64 ``[B]``; called where no language is given.
        """
        language = self.language if language is None else language
        task = self.task if task is None else task
        self.check_request(batch, language=language, task=task, timestamps=timestamps)
        column = lambda token: torch.full((batch, 1), token, dtype=torch.int64, device=device)
        columns = [column(start)]
        prefix = list(self.prefix) if language is None and task is None else []
        prefix = [token for token in prefix if token is None or token != self.no_timestamps_token_id]
        if language is not None:
            columns.append(self._language_column(language, batch, device))
        elif self.languages and (not prefix or prefix[0] is None):
            columns.append(detect()[:, None])
        elif prefix and prefix[0] is not None:
            columns.append(column(prefix[0]))
        rest = [token for token in prefix[1:] if token is not None]
        if task is not None:
            rest = [self.tasks[task]]
        elif language is not None and "transcribe" in self.tasks:
            rest = [self.tasks["transcribe"]]
        if not timestamps and self.no_timestamps_token_id is not None:
            rest.append(self.no_timestamps_token_id)
        return torch.cat([*columns, *(column(token) for token in rest)], dim=1)

    def _language_column(self, language: str | Sequence[str], batch: int, device: torch.device) -> Tensor:
        if isinstance(language, str):
            return torch.full((batch, 1), self.language_token(language), dtype=torch.int64, device=device)
        if not isinstance(language, list | tuple):
            raise TypeError(f"language must be a string or a list of them, got {type(language).__name__}")
        if len(language) != batch:
            raise ValueError(f"language must name one language or {batch}, one for each sound, got {len(language)}")
        return torch.tensor([[self.language_token(one)] for one in language], dtype=torch.int64, device=device)


class TokenRules:
    """Which token may come next: scores of those that may not become -inf.

    Nothing is looked at by the host, so that no call syncs with the device.

    Args:
        tokens: the special tokens.
        vocab_size, eos: the size of the vocabulary, and the token that ends a text.
        timestamps: whether times are written. They come in pairs, but for the last one before the end, never decrease,
            and a time is taken where all times together are more likely than any other token.
        device: of the scores.

    Source: Radford et al., 2022, section 4.5 and the authors' code.

    Example:
        >>> import torch
        >>> tokens = WhisperTokens(no_timestamps_token_id=4, suppress=(1,))  # 5, 6 and 7 are times
        >>> rules = TokenRules(tokens, vocab_size=8, eos=3, timestamps=True)
        >>> rules(torch.zeros(1, 8), torch.tensor([[6, 2]]))  # a time, a word: no earlier time
        tensor([[0., -inf, 0., 0., -inf, -inf, -inf, 0.]])
    """

    def __init__(
        self,
        tokens: WhisperTokens,
        *,
        vocab_size: int,
        eos: int,
        timestamps: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.eos, self.first_time = eos, tokens.first_time if timestamps else None
        never = torch.zeros(vocab_size, dtype=torch.bool)
        never[list(tokens.suppress)] = True
        if timestamps:
            never[tokens.no_timestamps_token_id] = True
        first = never.clone()
        first[list(tokens.begin_suppress)] = True
        if self.first_time is not None:
            first[: self.first_time] = True
            if tokens.max_initial_timestamp is not None:
                first[self.first_time + tokens.max_initial_timestamp + 1 :] = True
        self._never, self._first = never.to(device), first.to(device)
        self._ids = torch.arange(vocab_size, device=device)

    def __call__(self, scores: Tensor, written: Tensor) -> Tensor:
        """Returns the scores ``[R, vocab_size]`` of the next token.

        Args:
            scores: ``[R, vocab_size]``, logits or their log-softmax.
            written: the tokens behind the prompt, int64 ``[R, n]``.
        """
        hidden = (self._first if written.shape[1] == 0 else self._never)[None]
        if self.first_time is None:
            return scores.masked_fill(hidden, -torch.inf)
        scores = scores.masked_fill(hidden | self._out_of_order(written), -torch.inf)
        logprobs = scores.float().log_softmax(-1)
        of_times, of_words = logprobs[:, self.first_time :].logsumexp(-1), logprobs[:, : self.first_time].amax(-1)
        wanted = (of_times > of_words)[:, None]
        return scores.masked_fill(wanted & (self._ids < self.first_time), -torch.inf)

    def _out_of_order(self, written: Tensor) -> Tensor:
        """Returns which tokens would break the order of the times, bool ``[R or 1, vocab_size]``."""
        assert self.first_time is not None
        ids, count = self._ids, written.shape[1]
        if count == 0:
            return torch.zeros_like(ids[None], dtype=torch.bool)
        is_time = written >= self.first_time
        last = is_time[:, -1:]
        before = is_time[:, -2:-1] if count > 1 else torch.ones_like(last)
        latest = written.masked_fill(~is_time, self.first_time - 1).amax(-1, keepdim=True)  # times never decrease
        least = torch.where(last & ~before, latest, latest + 1)  # the second of a pair may repeat the first
        hidden = (ids >= self.first_time) & (ids < least)
        hidden = hidden | (last & before & (ids >= self.first_time))  # a word must follow a pair
        return hidden | (last & ~before & (ids < self.eos))  # the second of a pair, or the end


_FIELDS = {
    "languages": "lang_to_id",
    "tasks": "task_to_id",
    "no_timestamps_token_id": "no_timestamps_token_id",
    "previous_token_id": "prev_sot_token_id",
    "suppress": "suppress_tokens",
    "begin_suppress": "begin_suppress_tokens",
    "max_initial_timestamp": "max_initial_timestamp_index",
    "alignment_heads": "alignment_heads",
    "language": "language",
    "task": "task",
}
"""Field of `WhisperTokens` -> key of a ``generation_config.json``."""
assert _FIELDS.keys() | {"prefix"} == {each.name for each in fields(WhisperTokens)}


def _forced(pairs: Any) -> tuple[int | None, ...]:
    """Returns the tokens of ``forced_decoder_ids``, pairs of a place, from 1 on, and a token."""
    pairs = [] if pairs is None else [tuple(pair) for pair in pairs]
    if [place for place, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise ValueError(f"forced_decoder_ids must be pairs of a place, 1, 2, ..., and a token, got {pairs}")
    return tuple(token for _, token in pairs)


def _in_vocabulary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a ``config.json`` whose lists of suppressed tokens leave out those that the vocabulary does not have.

    Such a file may name tokens of the published vocabulary, which transformers writes whatever the vocabulary is.
    """
    size = config.get("vocab_size")
    lists = {name: config.get(name) for name in ("suppress_tokens", "begin_suppress_tokens")}
    known = lambda token: type(token) is int and type(size) is int and 0 <= token < size
    return {**config, **{name: [x for x in each if known(x)] for name, each in lists.items() if isinstance(each, list)}}


def _codes() -> dict[str, str]:
    """Returns the English name of a language -> its code."""
    try:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
    except ImportError:
        return {}
    return dict(TO_LANGUAGE_CODE)
