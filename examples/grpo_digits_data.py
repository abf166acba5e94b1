"""The answers that `grpo_digits.py` learns from: as JSON, and as prose."""

from __future__ import annotations

import re

import torch
from read_digits_answers import parse
from read_digits_data import IMAGE, PAD, SPELLED, Scenes
from torch import Tensor
from torch.nn.functional import pad

WORDS = (*SPELLED, "I see none")
"""The vocabulary: that of `read_digits.py`, whose scenes and questions these are, and the refusal in prose."""

PROSE = re.compile(r"I see (?:none|(\d) at \[(\d+),(\d+),(\d+),(\d+)\])")
_AS_PROSE = {'{"absent":true}': "I see none", "]}": "]"} | {
    f'{{"digit":{digit},"box":[': f"I see {digit} at [" for digit in range(10)
}
_TOLD = torch.tensor([WORDS.index(_AS_PROSE.get(word, word)) for word in WORDS])  # of each token, what prose says


def told(answers: Tensor) -> Tensor:
    """Returns answers in JSON, tokens of any shape, in prose: "I see 7 at [12,30,20,38]" or "I see none"."""
    return _TOLD[answers]


def demonstrations(scenes: Scenes, share: float, draw: torch.Generator) -> Tensor:
    """Returns right answers, tokens int64 [N, KINDS, ANSWER]: a random `share` of them in prose, the others in JSON."""
    in_prose = torch.rand(scenes.answers.shape[:2], generator=draw) < share
    return torch.where(in_prose[..., None], told(scenes.answers), scenes.answers)


def conversations(scenes: Scenes, answers: Tensor, visual: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns texts int64 [N, L], of a scene, its questions in random order and their answers, and labels [N, L].

    Args:
        answers: tokens int64 [N, KINDS, ANSWER]; only they have a label.
        visual: tokens of a scene.
    """
    turns = torch.cat([scenes.questions, answers], 2)
    labels = torch.cat([torch.full_like(scenes.questions, -100), answers.masked_fill(answers == PAD, -100)], 2)
    order = torch.rand(turns.shape[:2], generator=draw).argsort(1)[..., None].expand_as(turns)
    turns, labels = turns.gather(1, order).flatten(1), labels.gather(1, order).flatten(1)
    last = (turns == PAD).sort(dim=1, stable=True).indices  # all padding behind the last turn
    turns, labels = (x.gather(1, last) for x in (turns, labels))
    return pad(turns, (visual, 0), value=IMAGE), pad(labels, (visual, 0), value=-100)


def read(text: str) -> dict[str, object] | None:
    """Returns what an answer says, in JSON or in prose; None: neither."""
    found = PROSE.fullmatch(text)
    if found is None:
        return parse(text)
    if found[1] is None:
        return {"absent": True}
    digit, *box = map(int, found.groups())
    return {"digit": digit, "box": box}
