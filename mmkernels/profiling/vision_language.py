"""Models in which images are tokens of the text, for the profiler: one prompt with images, and text behind each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkernels.models.blocks.checkpoint import CheckpointError, existing, read_json
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.reduction import token_of
from mmkernels.models.blocks.vision_language import VisionLanguageModel
from mmkernels.models.blocks.visual import Visual, shorten
from mmkernels.models.blocks.visual_reduction import VisualReducer
from mmkernels.nn.reducer import Reduced, TokenReducer
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import Reduction, Stage
from mmkernels.profiling.encoder import output_of, returning
from mmkernels.profiling.options import MOST_TOKENS, Choice, Options, Row, Settings
from mmkernels.profiling.reading import DECODE, DECODE_TOKENS, PREFILL, Prompt, random_text, with_markers
from mmkernels.transformers_version import import_transformers


class Layout(NamedTuple):
    """How an image becomes tokens, before a reducer.

    Attributes:
        rows, columns: tokens of a tile; of the image, where it is not cut into tiles.
        down, across: tiles of an image.
        thumbnail: whether one more tile shows all of the image.
        others: tokens of the image beside those of its tiles, such as the ends of rows.
        side: the image has about as many pixels as a square of this side; None: as many as its tiles.
    """

    rows: int
    columns: int
    down: int = 1
    across: int = 1
    thumbnail: bool = False
    others: int = 0
    side: int | None = None

    @property
    def tiles(self) -> int:
        return self.down * self.across + self.thumbnail

    @property
    def tokens(self) -> int:
        return self.tiles * self.rows * self.columns + self.others

    def picture(self, token_of: Tensor) -> list[int]:
        """Returns the token of each place of the image, row by row, without those of a thumbnail.

        Args:
            token_of: of each place of each tile, ``[tiles, rows * columns]``; the thumbnail is the last one.
        """
        tiles = token_of[: self.down * self.across].view(self.down, self.across, self.rows, self.columns)
        places: list[int] = tiles.transpose(1, 2).flatten().tolist()
        return places


class Size(NamedTuple):
    """A size that ``--size`` takes: a size of the model class, and fields of its configuration that differ.

    Attributes:
        about: what must be said of it.
    """

    name: str
    changes: Mapping[str, Any] = {}
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Inputs(Prompt):
    """What the stages take.

    Args:
        images: what the model's `encode` takes, all images.
        first: the same of the first image alone.
        layout: of each image.
    """

    images: tuple[Any, ...]
    first: tuple[Any, ...]
    layout: Layout


def _encode(model: Any, inputs: Inputs, state: None) -> Any:
    """Returns what the encoder alone makes of the images."""
    return output_of(model.vision, lambda: model.encode(*inputs.images))


def _merge(model: Any, inputs: Inputs, state: Any) -> Visual:
    with returning(model.vision, state):
        visual: Visual = model.encode(*inputs.images)
    return visual


class VisionLanguageAdapter(ABC):
    """A `VisionLanguageModel`, whose encoder is its module `vision`.

    Attributes:
        model_class: the model's class.
        named: by the names that ``--size`` takes.
    """

    model_class: type[VisionLanguageModel]
    named: Mapping[str, Size]

    total = "first token"
    square = False
    stages: tuple[Stage, ...] = (
        Stage("encode", "the image encoder, all images", _encode, shared=True),
        Stage("merge", "the merger, and the reducer with its scores", _merge),
        PREFILL,
        DECODE,
    )

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(self.named)

    @property
    def about(self) -> dict[str, str]:
        return {name: size.about for name, size in self.named.items()}

    # What a model brings.

    @abstractmethod
    def config(self, options: Options) -> Any:
        """Returns the model's configuration, before any weight is made or read."""

    @abstractmethod
    def layout(self, config: Any, photo: Image.Image, resolution: int | None) -> Layout:
        """Returns how images of the shape of `photo` become tokens.

        Raises:
            BadInput: they can't.
        """

    @abstractmethod
    def pixels(self, options: Options, config: Any, photos: list[Image.Image], layout: Layout) -> tuple[Any, ...]:
        """Returns what the model's `encode` takes for images that are scaled to `layout`."""

    @abstractmethod
    def text_ids(self, config: Any) -> int:
        """Returns below which number every token is text."""

    # The adapter.

    def check(self, options: Options) -> None:
        config = self.config(options)
        for text in options.reduce or ():
            try:
                VisualReducer(text, config.text_width)
            except (ValueError, TypeError) as error:
                raise BadInput(f"--reduce {text}: {error}") from None
        self._text(options, config)

    def check_photo(self, options: Options, photo: Image.Image) -> None:
        config = self.config(options)
        images, text_length = options.images or 0, len(self._text(options, config))  # one marker for each image
        for side in options.resolutions or (None,):
            of = "images of the model's size" if side is None else str(side)
            layout = self.layout(config, photo, side)
            tokens = layout.tokens
            if tokens > MOST_TOKENS:
                raise BadInput(f"--resolutions must leave at most {MOST_TOKENS} tokens per image, got {tokens} by {of}")
            length = images * (tokens - 1) + text_length + DECODE_TOKENS
            if length > config.text_length:
                options_of = "--images and --text-length" if side is None else "--resolutions"
                raise BadInput(
                    f"{options_of} must leave the prompt and {DECODE_TOKENS} tokens more within {config.text_length}, "
                    f"got {length} by {of} and --images {images}"
                )
            for text in options.reduce or ():
                try:
                    VisualReducer(text, config.text_width).reducer.tokens([(1, layout.rows, layout.columns)])
                except (ValueError, TypeError) as error:
                    at = "" if side is None else f" with --resolutions {side}"
                    raise BadInput(f"--reduce {text}{at}: {error}") from None

    def build(self, options: Options, row: Row) -> nn.Module:
        assert isinstance(row, Choice)
        if options.folder is not None:
            return self.with_reducer(self.model_class.from_pretrained(options.folder), row)
        size = self.named[options.size or ""]
        changes = dict(size.changes) | self.reducer_changes(row)
        return self.model_class.from_size(size.name, seed=options.seed, **changes)

    def exchange(self, options: Options, model: Any, choice: Choice) -> nn.Module:
        return self.with_reducer(copy.copy(model), choice)  # its modules are the same ones

    def with_reducer(self, model: Any, choice: Choice) -> nn.Module:
        """Returns the model, after it was given the reducer."""
        model.set_reducer(choice.reducer)
        built: nn.Module = model
        return built

    def reducer_changes(self, choice: Choice) -> dict[str, Any]:
        """Returns the field of a configuration that says the reducer."""
        return {"reduce": choice.reducer}

    def inputs(self, options: Options, model: Any, photos: list[Image.Image], row: Row) -> Inputs:
        assert isinstance(row, Choice)
        config, weight = model.config, model.head.weight
        layout = self.layout(config, photos[0], row.resolution)
        every, first = (self.pixels(options, config, part, layout) for part in (photos, photos[:1]))
        ids = with_markers(self._text(options, config), config.image_token_id, layout.tokens)
        images, first = (tuple(x.to(weight) if _is_floating(x) else x for x in part) for part in (every, first))
        return Inputs(
            input_ids=ids.to(weight.device),
            text_ids=self.text_ids(config),
            images=images,
            first=first,
            layout=layout,
        )

    def _text(self, options: Options, config: Any) -> list[int]:
        """Returns the prompt with one marker for each image."""
        assert options.images is not None and options.text_length is not None
        marker = config.image_token_id
        if options.prompt is not None:
            return _tokenized(options, options.images, marker)
        return random_text(
            self.text_ids(config), marker, length=options.text_length, images=options.images, seed=options.seed
        )

    def reduction(self, model: Any, inputs: Inputs) -> Reduction:
        assert model.reducer is not None
        found: list[Reduced] = []
        reducer = model.reducer.reducer
        handle = reducer.register_forward_hook(lambda module, args, reduced: found.append(reduced))
        try:
            visual = model.encode(*inputs.first)
        finally:
            handle.remove()
        layout = inputs.layout
        return Reduction(
            sum(visual.lengths),
            layout.down * layout.rows,
            layout.across * layout.columns,
            layout.picture(_token_of_places(reducer, found[0], layout)),  # later calls move positions
            learned=False,
            side=getattr(model.config, "merge", 1),
        )

    def logits(self, model: Any, inputs: Inputs) -> Tensor:
        """Returns the scores after each text token: there are as many of them whatever became of the images."""
        visual = model.encode(*inputs.images)
        text = self._left(model, inputs, visual)[0] != model.config.image_token_id
        handle = model.head.register_forward_pre_hook(lambda module, args: (args[0][:, text],))
        try:
            out: Tensor = model(inputs.input_ids, images=visual).logits
        finally:
            handle.remove()
        return out

    def _left(self, model: Any, inputs: Inputs, visual: Visual) -> Tensor:
        """Returns the prompt ``[1, L']`` without the markers whose tokens a reducer left out."""
        ids = inputs.input_ids
        short = shorten(torch.ones_like(ids, dtype=torch.bool), [ids == model.config.image_token_id], [visual])
        return ids if short is None else ids.gather(1, short.columns)

    def _labels(self, model: Any, ids: Tensor) -> Tensor:
        """Every token is learned but the images' markers."""
        return ids.masked_fill(ids == model.config.image_token_id, -100)

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        visual = model.encode(*inputs.images)
        loss: Tensor = model(inputs.input_ids, images=visual, labels=self._labels(model, inputs.input_ids)).loss
        return loss

    def naive_loss(self, model: Any, inputs: Inputs) -> Tensor:
        visual = model.encode(*inputs.images)
        logits = model(inputs.input_ids, images=visual).logits
        labels = self._labels(model, self._left(model, inputs, visual))
        return F.cross_entropy(logits[0, :-1].float(), labels[0, 1:])


def _token_of_places(reducer: TokenReducer, reduced: Reduced, layout: Layout) -> Tensor:
    """Returns the token of each place of each tile of one image, ``[tiles, rows * columns]``; -1: it has none."""
    left = reduced.x.shape[0] // layout.tiles
    of_tiles = {name: getattr(reduced, name) for name in ("x", "positions", "assignment")}
    of_tiles = {name: None if x is None else x.unflatten(0, (layout.tiles, -1)) for name, x in of_tiles.items()}
    places = token_of(reducer, reduced._replace(**of_tiles), (1, layout.rows, layout.columns))
    assert places is not None
    first = torch.arange(layout.tiles, device=places.device)[:, None] * left
    return torch.where(places < 0, -1, places + first)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _tokenized(options: Options, images: int, marker: int) -> list[int]:
    """Returns ``--prompt`` behind the images, in the form of the checkpoint's chats, with one marker for each image."""
    transformers = import_transformers("reading --prompt")
    assert options.folder is not None and options.prompt is not None
    if not any((options.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise BadInput(f"--prompt needs a tokenizer in --model, got none in {options.folder}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(options.folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"--prompt needs a tokenizer in --model, got an error: {error}") from None
    if tokenizer.chat_template is None:
        return [marker] * images + list(tokenizer(options.prompt)["input_ids"])
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": options.prompt}]
    messages = [{"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    found = list(ids).count(marker)
    if found != images:
        raise BadInput(
            f"--prompt must be put behind {images} images by the checkpoint's chat template, got {found} markers"
        )
    return list(ids)


def read_config(model_class: type[Model], options: Settings) -> Any:
    """Returns the configuration in a checkpoint's folder, before any weight is read.

    Raises:
        BadInput: the folder is none, or the model can't be read from it.
    """
    assert options.folder is not None
    try:
        path = existing(options.folder / "config.json")
        return model_class._read_config(read_json(path), path)
    except (CheckpointError, FileNotFoundError) as error:
        raise BadInput(f"--model: {error}") from None
