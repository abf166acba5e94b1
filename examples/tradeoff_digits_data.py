"""The scenes and questions of `tradeoff_digits.py`: handwritten digits on a board, and what can be asked about it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from clip_digits_data import augment
from torch import Tensor

SQUARES = 3  # of a side of the board
SQUARE, DIGIT = 16, 8  # sides of a square and of a digit, which lies in one of its corners, in pixels
SIDE = SQUARES * SQUARE
PATCH, MERGE = 4, 2
GRID = (1, SIDE // PATCH, SIDE // PATCH)  # of a scene, in patches
TOKENS = (SIDE // PATCH // MERGE) ** 2  # of a scene
FEWEST, MOST = 3, 6  # digits on a board
PLACES, QUESTIONS = 6, 9  # questions about squares, and all, of a scene

NAMES = tuple(f"{column}{row}" for row in range(1, SQUARES + 1) for column in "abc")
"""Of the squares, row by row, as in chess, but with row 1 at the top."""
WORDS = (
    "<pad>", "<image>", "<video>", "digit", "digits", "at", "how", "many", "the", "largest", "nothing",
    *map(str, range(10)), *NAMES,
)  # fmt: skip
NUMBERS = {word: number for number, word in enumerate(WORDS)}
IMAGE, VIDEO = NUMBERS["<image>"], NUMBERS["<video>"]
KINDS = ("digit at a square", "how many digits", "how many of one", "the largest digit")


class Scenes(NamedTuple):
    """Boards with digits, and questions about them, each of three words with an answer of one word.

    Attributes:
        pixels: [N, SIDE, SIDE] from 0 to 1.
        questions: word numbers int64 [N, QUESTIONS, 3].
        answers: word numbers int64 [N, QUESTIONS].
        kinds: int64 [N, QUESTIONS], the place of each question's kind in `KINDS`.
    """

    pixels: Tensor
    questions: Tensor
    answers: Tensor
    kinds: Tensor

    def part(self, rows: slice) -> Scenes:
        return Scenes(*(x[rows] for x in self))


def draw_scenes(pixels: Tensor, digits: Tensor, count: int, draw: torch.Generator, *, vary: bool = True) -> Scenes:
    """Returns `count` random scenes of the given digits.

    Args:
        pixels, digits: [M, 8, 8] from 0 to 1 and [M]: the images to choose from, and what they show.
        vary: whether to rotate, scale and shift each digit a little.
    """
    numbers = torch.randint(FEWEST, MOST + 1, (count,), generator=draw)
    order = torch.rand(count, SQUARES**2, generator=draw).argsort(1)
    rank = order.argsort(1)  # a square with a rank below the number of digits has one
    scene, square = (rank < numbers[:, None]).nonzero(as_tuple=True)
    chosen = torch.randint(len(digits), scene.shape, generator=draw)
    images = augment(pixels[chosen], draw) if vary else pixels[chosen]

    first = DIGIT * torch.randint(SQUARE // DIGIT, (2, len(scene), 1, 1), generator=draw)  # of rows, of columns
    rows, columns = torch.arange(DIGIT)[:, None] + first[0], torch.arange(DIGIT) + first[1]
    tiles = torch.zeros(count, SQUARES**2, SQUARE, SQUARE)
    tiles[scene[:, None, None], square[:, None, None], rows, columns] = images
    boards = tiles.unflatten(1, (SQUARES, SQUARES)).transpose(2, 3).reshape(count, SIDE, SIDE)

    shown = torch.full((count, SQUARES**2), -1)  # -1: an empty square
    shown[scene, square] = digits[chosen]
    asked = [_questions(row, draw) for row in shown.tolist()]
    return Scenes(boards, *(torch.tensor([row[i] for row in asked]) for i in range(3)))


def _questions(shown: list[int], draw: torch.Generator) -> tuple[list[list[int]], list[int], list[int]]:
    """Returns questions, answers and kinds of one board in random order: all its digits are asked for."""
    full = [square for square, digit in enumerate(shown) if digit >= 0]
    empty = [square for square, digit in enumerate(shown) if digit < 0]
    some = torch.randperm(len(empty), generator=draw).tolist()[: PLACES - len(full)]
    asked = [(f"digit at {NAMES[square]}", str(shown[square]), 0) for square in full]
    asked += [(f"digit at {NAMES[empty[place]]}", "nothing", 0) for place in some]
    asked.append(("how many digits", str(len(full)), 1))
    there = [shown[square] for square in full]
    one = there[_below(len(there), draw)] if _below(4, draw) else _below(10, draw)
    asked.append((f"how many {one}", str(there.count(one)), 2))
    asked.append(("the largest digit", str(max(there)), 3))
    order = torch.randperm(len(asked), generator=draw).tolist()
    texts, answers, kinds = zip(*(asked[place] for place in order))
    return [tokenize(text) for text in texts], [NUMBERS[answer] for answer in answers], list(kinds)


def _below(number: int, draw: torch.Generator) -> int:
    return int(torch.randint(number, (1,), generator=draw))


def tokenize(text: str) -> list[int]:
    """Returns the number of each word."""
    return [NUMBERS[word] for word in text.split()]


def patches(pixels: Tensor) -> Tensor:
    """Returns the patches [N * patches of a scene, PATCH^2] of scenes [N, SIDE, SIDE].

    They lie in the order of Qwen's processors: the MERGE x MERGE patches of a token are neighbours.
    """
    side = SIDE // PATCH // MERGE
    x = pixels.view(-1, side, MERGE, PATCH, side, MERGE, PATCH)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH * PATCH)


def prompt(count: int) -> Tensor:
    """Returns the beginning of `count` texts, int64 [count, TOKENS]: a marker for each token of the scene."""
    return torch.full((count, TOKENS), IMAGE)


def lessons(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Returns texts int64 [N, L] of a scene, its questions and answers, and labels [N, L]: only answers have one."""
    text = torch.cat([scenes.questions, scenes.answers[..., None]], dim=2)  # [N, QUESTIONS, 4]
    labels = torch.full_like(text, -100)
    labels[..., -1] = scenes.answers
    start = prompt(len(text))
    return torch.cat([start, text.flatten(1)], 1), torch.cat([torch.full_like(start, -100), labels.flatten(1)], 1)


def chance(scenes: Scenes) -> float:
    """Returns the share that the most frequent answer of each kind of question gets right."""
    right = 0
    for kind in range(len(KINDS)):
        right += int(torch.bincount(scenes.answers[scenes.kinds == kind]).max())
    return right / scenes.answers.numel()
