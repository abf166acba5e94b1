"""The scenes of `read_digits.py`, the questions about them, and the words that questions and answers are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from clip_digits_data import augment
from sklearn.datasets import load_digits
from torch import Tensor

CELLS, CELL = 3, 32  # regions of a side of a scene, and the side of one, in pixels
SIDE = CELLS * CELL
STEP = 2  # boxes have even coordinates, in pixels
FEWEST, MOST = 2, 4  # digits of a scene, no two alike
DIGIT_SIDE, PATCH = 16, 16  # of a digit, enlarged twice, and of the model's patches, at which digits are aligned
INK = 0.3  # darker pixels belong to the digit: its box is the smallest that holds them

REGIONS = (
    "top-left", "top", "top-right", "left", "middle", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
KINDS = ("what is at a place", "what is at an empty place", "where is a digit", "where is an absent digit")
"""The questions about a scene, one of each kind; the answer to the second and fourth is the refusal."""

# The vocabulary: each token and what it spells. Text that belongs together is one token, as in any tokenizer that
# merges frequent pairs: so the token behind a question says which digit is there, and a comma belongs to the coordinate
# behind it.
_COORDINATES = [str(STEP * place) for place in range(SIDE // STEP + 1)]
SPELLED = (
    "<pad>", "<image>", "<end>",
    "digit at ", "where is ", "describe the ", "scene", *REGIONS,
    *map(str, range(10)),
    *(f'{{"digit":{digit},"box":[' for digit in range(10)), "]}", '{"absent":true}',
    *(f"I see {digit} at [" for digit in range(10)), *(f" and {digit} at [" for digit in range(10)), "]", ".",
    *_COORDINATES, *(f",{word}" for word in _COORDINATES),
)  # fmt: skip
PAD, IMAGE, END = range(3)
_AT, _WHERE, _DESCRIBE, _SCENE = range(3, 7)
_REGION = 7
_DIGIT = _REGION + len(REGIONS)
_ANSWERED = _DIGIT + 10  # answers begin with this token, of digit 0, or one of the nine behind it, or ABSENT
_CLOSE, ABSENT = _ANSWERED + 10, _ANSWERED + 11
_FIRST = ABSENT + 1  # begins the first claim, about digit 0; those of other claims are _AND and behind it
_AND = _FIRST + 10
_ENDED, _DOT = _AND + 10, _AND + 11
_COORDINATE = _DOT + 1  # of the first coordinate of a box; those of the others are _NEXT and behind it
_NEXT = _COORDINATE + len(_COORDINATES)

QUESTION, ANSWER = 2, 7  # tokens of a question and, with its end, of the longest answer
SENTENCE = 6 * MOST + 2  # tokens of the longest description: 6 a claim, the full stop, the end
_REFUSAL = [ABSENT, END] + [PAD] * (ANSWER - 2)


class Scenes(NamedTuple):
    """Scenes with digits, and questions about them.

    Attributes:
        pixels: [N, 1, SIDE, SIDE] from 0 to 1.
        shown: int64 [N, 9], the digit of each region, -1: none.
        boxes: int64 [N, 9, 4], (x0, y0, x1, y1) of each digit in pixels, x1 and y1 behind its last; 0 where none is.
        questions: tokens int64 [N, KINDS, QUESTION].
        answers: tokens int64 [N, KINDS, ANSWER], padded.
        regions: int64 [N, KINDS], where the answer is, -1: it is the refusal.
    """

    pixels: Tensor
    shown: Tensor
    boxes: Tensor
    questions: Tensor
    answers: Tensor
    regions: Tensor

    def part(self, rows: slice) -> Scenes:
        return Scenes(*(x[rows] for x in self))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns pixels [N, 8, 8] from 0 to 1 and digits [N]: for training, then held out, every fifth of the file.

    So all writers are in training, with other digits: a support vector machine classifies 98.3 % of those held out.
    """
    data = load_digits()
    pixels = torch.tensor(data.images / 16, dtype=torch.float32)
    digits = torch.tensor(data.target, dtype=torch.int64)
    held = torch.arange(len(digits)) % 5 == 4
    return pixels[~held], digits[~held], pixels[held], digits[held]


def draw_scenes(pixels: Tensor, digits: Tensor, count: int, draw: torch.Generator, *, vary: bool = True) -> Scenes:
    """Returns `count` random scenes of the given digits, each in a random corner of its region.

    Args:
        pixels, digits: [M, 8, 8] from 0 to 1 and [M]: the images to choose from, and what they show.
        vary: whether to rotate, scale and shift each digit a little.
    """
    regions = CELLS**2
    numbers = torch.randint(FEWEST, MOST + 1, (count,), generator=draw)
    rank = torch.rand(count, regions, generator=draw).argsort(1)  # a region ranked below the number of digits has one
    scene, region = (rank < numbers[:, None]).nonzero(as_tuple=True)
    kinds = torch.rand(count, 10, generator=draw).argsort(1)[scene, rank[scene, region]]  # no two alike
    order, amounts = digits.argsort(stable=True), torch.bincount(digits, minlength=10)
    drawn = (torch.rand(len(kinds), generator=draw) * amounts[kinds]).long()
    images = pixels[order[amounts.cumsum(0)[kinds] - amounts[kinds] + drawn]]

    tiles = torch.zeros(count, regions, CELL, CELL)
    tiles[scene, region] = _tiles(augment(images, draw) if vary else images, draw)
    shown = torch.full((count, regions), -1)
    shown[scene, region] = kinds
    boxes = _boxes(tiles) * (shown >= 0)[..., None]
    board = tiles.unflatten(1, (CELLS, CELLS)).transpose(2, 3).reshape(count, 1, SIDE, SIDE)
    return Scenes(board, shown, boxes, *_questions(shown, boxes, draw))


def _tiles(images: Tensor, draw: torch.Generator) -> Tensor:
    """Returns images [M, 8, 8], enlarged to [DIGIT_SIDE, DIGIT_SIDE], in corners of cells [M, CELL, CELL]."""
    large = F.interpolate(images[:, None], size=DIGIT_SIDE, mode="bilinear")[:, 0]
    first = PATCH * torch.randint((CELL - DIGIT_SIDE) // PATCH + 1, (2, len(images), 1, 1), generator=draw)
    rows, columns = torch.arange(DIGIT_SIDE)[:, None] + first[0], torch.arange(DIGIT_SIDE) + first[1]
    tiles = torch.zeros(len(images), CELL, CELL)
    tiles[torch.arange(len(images))[:, None, None], rows, columns] = large
    return tiles


def _boxes(tiles: Tensor) -> Tensor:
    """Returns the boxes int64 [N, 9, 4] of what is drawn in tiles [N, 9, CELL, CELL]."""
    ink = tiles > INK
    sides = []
    for axis in (2, 3):  # the columns that have ink, then the rows
        has = ink.any(axis).int()
        sides += [has.argmax(2), CELL - has.flip(2).argmax(2)]
    x0, x1, y0, y1 = sides
    row, column = torch.arange(CELLS**2) // CELLS * CELL, torch.arange(CELLS**2) % CELLS * CELL
    least = torch.stack([x0 + column, y0 + row], 2) // STEP * STEP
    most = -(-torch.stack([x1 + column, y1 + row], 2) // STEP) * STEP
    return torch.cat([least, most], 2)


def _questions(shown: Tensor, boxes: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns questions, answers and regions of scenes, one question of each of `KINDS`."""
    count, rows = len(shown), torch.arange(len(shown))
    there = shown >= 0

    def one_of(mask: Tensor) -> Tensor:
        return torch.rand(mask.shape, generator=draw).masked_fill(~mask, -1).argmax(1)

    full, empty, seen = one_of(there), one_of(~there), one_of(there)
    present = torch.zeros(count, 11, dtype=torch.bool).scatter(1, shown.masked_fill(~there, 10), True)[:, :10]
    missing = one_of(~present)
    none = torch.full_like(full, -1)
    regions = torch.stack([full, none, seen, none], 1)
    about = torch.stack([_REGION + full, _REGION + empty, _DIGIT + shown[rows, seen], _DIGIT + missing], 1)
    asked = torch.tensor([_AT, _AT, _WHERE, _WHERE]).expand(count, -1)
    at, where = (answers_of(shown[rows, place], boxes[rows, place]) for place in (full, seen))
    refusal = torch.tensor(_REFUSAL).expand(count, -1)
    return torch.stack([asked, about], 2), torch.stack([at, refusal, where, refusal], 1), regions


def patch_names(scenes: Scenes) -> Tensor:
    """Returns which digit each patch is a part of, int64 [N, patches], 10: none."""
    side = SIDE // PATCH
    ink = F.max_pool2d(scenes.pixels, PATCH).flatten(1) > INK
    along = torch.arange(side) * PATCH // CELL
    digits = scenes.shown[:, (along[:, None] * CELLS + along).flatten()]
    return torch.where(ink & (digits >= 0), digits, 10)


def box_sides(scenes: Scenes) -> Tensor:
    """Returns boxes within their regions, int64 [N, 9, 4], in steps."""
    region = torch.arange(CELLS**2)
    corner = CELL * torch.stack([region % CELLS, region // CELLS] * 2, 1)
    return (scenes.boxes - corner) // STEP


def answers_of(digits: Tensor, boxes: Tensor) -> Tensor:
    """Returns the answers, tokens int64 [N, ANSWER], of digits [N] and boxes [N, 4]."""
    close, end = (torch.full_like(digits, word) for word in (_CLOSE, END))
    return torch.stack([_ANSWERED + digits, *_coordinates(boxes), close, end], 1)


def _coordinates(boxes: Tensor) -> list[Tensor]:
    first, *others = (boxes // STEP).unbind(-1)
    return [_COORDINATE + first, *(_NEXT + x for x in others)]


def requests(count: int) -> Tensor:
    """Returns the request to describe a scene, tokens int64 [count, QUESTION]."""
    return torch.tensor([_DESCRIBE, _SCENE]).expand(count, -1)


def descriptions(scenes: Scenes) -> Tensor:
    """Returns sentences about scenes, tokens int64 [N, SENTENCE], padded.

    A sentence names all digits, row by row, each with its box: "I see 7 at [12,30,20,38] and 3 at [...]."
    """
    count = len(scenes.shown)
    there = scenes.shown >= 0
    number = there.cumsum(1) - 1  # of the claim
    scene, region = there.nonzero(as_tuple=True)
    place = number[scene, region]
    digits, boxes = scenes.shown[scene, region], scenes.boxes[scene, region]
    begin = torch.where(place == 0, _FIRST, _AND)
    claim = torch.stack([begin + digits, *_coordinates(boxes), torch.full_like(digits, _ENDED)], 1)
    sentences = torch.full((count, MOST + 1, claim.shape[1]), PAD)
    sentences[scene, place] = claim
    amount = there.sum(1)
    sentences[torch.arange(count), amount, :2] = torch.tensor([_DOT, END])
    return sentences.flatten(1)[:, :SENTENCE]


def spell(tokens: Tensor, words: tuple[str, ...] = SPELLED) -> list[str]:
    """Returns the texts of tokens [N, L], up to the end of each; `words` are what the tokens spell."""
    texts = []
    for row in tokens.tolist():
        kept = row[: row.index(END)] if END in row else row
        texts.append("".join(words[token] for token in kept))
    return texts


def prompts(questions: Tensor, queries: int) -> Tensor:
    """Returns questions int64 [..., QUESTION] as prompts [N, queries + QUESTION]: the tokens of the image are first."""
    text = questions.flatten(0, -2)
    return torch.cat([text.new_full((len(text), queries), IMAGE), text], 1)


def lessons(questions: Tensor, answers: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Returns texts int64 [N, L] of images' tokens, questions and answers, and labels [N, L]: only answers have one."""
    start, end = prompts(questions, queries), answers.flatten(0, -2)
    labels = torch.cat([torch.full_like(start, -100), end.masked_fill(end == PAD, -100)], 1)
    return torch.cat([start, end], 1), labels
