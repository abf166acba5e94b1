"""Images made worse in a stated way: blurred, cropped, compressed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from mmkernels.evaluation.checks import imported, listed, share, whole
from mmkernels.nn.checks import check_choice
from mmkernels.runtime.checks import FINITE, check_number, check_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Images: TypeAlias = "Tensor | Image | Sequence[Image]"
T = TypeVar("T", bound=Images)


def blur(images: T, radius: float) -> T:
    """Returns images under a Gaussian blur.

    Args:
        images: a tensor ``[C, H, W]`` or ``[N, C, H, W]`` of 1 or 3 channels, uint8, or floats from 0 to 1; or a Pillow
            image of mode L or RGB, or a sequence of these.
        radius: the standard deviation, in pixels; 0 leaves images as they are.

    Returns:
        The same kind, shape, dtype and device. Values pass through 8 bits. No gradient.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or mode, no image, floats outside of 0 to 1, or a
            bad radius. ImportError: Pillow is not installed.

    Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    2019, Gaussian blur; computed by Pillow, which approximates the Gaussian by repeated box filters.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import blur
        >>> blur(torch.eye(3).expand(1, 3, 3), radius=0.5).shape
        torch.Size([1, 3, 3])
    """
    radius = check_number("radius", radius, "at least 0", 0.0, FINITE)
    chosen = imported("PIL.ImageFilter", "blur").GaussianBlur(radius)
    return _each(images, lambda image: image.filter(chosen))


def crop(images: T, part: float) -> T:
    """Returns the middle of images, enlarged to their size; `cropped_boxes` moves boxes along.

    Args:
        images: see `blur`.
        part: of each side what stays, above 0 and at most 1; 1 leaves images as they are.

    Returns:
        As `blur`.

    Raises:
        As `blur`; ValueError for a bad part.

    Source: centre crops as of image classifiers; resampled by Pillow, bilinearly.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import crop
        >>> crop(torch.arange(16, dtype=torch.uint8).view(1, 4, 4), part=0.5)[0, 1:3, 1:3].tolist()
        [[6, 7], [8, 9]]
    """
    part = share("part", part)
    bilinear = imported("PIL.Image", "crop").Resampling.BILINEAR

    def cropped(image: Image) -> Image:
        margin_x, margin_y = (side * (1 - part) / 2 for side in image.size)
        inner = (margin_x, margin_y, image.width - margin_x, image.height - margin_y)
        return image.resize(image.size, bilinear, box=inner)

    return _each(images, cropped)


def cropped_boxes(boxes: Tensor, size: tuple[int, int], part: float) -> Tensor:
    """Returns where boxes lie after `crop`, cut off at the edges of the image.

    Args:
        boxes: ``[..., 4]``, (x1, y1, x2, y2) in pixels.
        size: (height, width) of the image, which `crop` does not change.
        part: as of `crop`.

    Returns:
        ``[..., 4]``, float64 for integers, else boxes' dtype. A box that is cut away has no area.

    Raises:
        TypeError: a wrong type. ValueError: a wrong shape, or a bad size or part.

    Source: the linear map of the crop.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import cropped_boxes
        >>> cropped_boxes(torch.tensor([[2.0, 2, 4, 6], [0, 0, 1, 1]]), (8, 8), part=0.5)
        tensor([[0., 0., 4., 8.],
                [0., 0., 0., 0.]])
    """
    check_tensor("boxes", boxes)
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be [..., 4], got shape {tuple(boxes.shape)}")
    if not isinstance(size, tuple | list | torch.Size) or len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size!r}")
    height, width = (whole("size", side, 1) for side in size)
    part = share("part", part)
    moved = boxes if boxes.is_floating_point() else boxes.double()
    sides = moved.new_tensor([width, height, width, height])
    return ((moved - sides * ((1 - part) / 2)) / part).clamp(min=0).minimum(sides)


def jpeg(images: T, quality: int) -> T:
    """Returns images after JPEG compression, with its noise.

    Args:
        images: see `blur`.
        quality: from 1 (worst) to 95, as Pillow counts. Colours are stored at half the resolution (4:2:0).

    Returns:
        As `blur`.

    Raises:
        As `blur`; TypeError or ValueError for a bad quality.

    Source: Hendrycks & Dietterich, 2019, JPEG; computed by Pillow.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import jpeg
        >>> image = torch.rand(3, 16, 16)
        >>> bool((jpeg(image, 10) - image).abs().mean() > (jpeg(image, 90) - image).abs().mean())
        True
    """
    quality = whole("quality", quality, 1, 95)
    opened = imported("PIL.Image", "jpeg").open

    def compressed(image: Image) -> Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
        decoded: Image = opened(file)
        decoded.load()
        return decoded.copy()  # a plain image, not one of a file

    return _each(images, compressed)


@dataclass(frozen=True)
class Corruption:
    """A way to make images worse, and how much.

    Attributes:
        name: of the way.
        severity: from 1, the least.
        strength: the number that `apply` takes.
        apply: ``(images, strength) -> images``.
        move: ``(boxes, (height, width), strength) -> boxes`` where things move, else None.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import Corruption
        >>> darker = Corruption("darker", severity=1, strength=0.5, apply=lambda images, by: images * by)
        >>> darker(torch.ones(1, 1, 1))
        tensor([[[0.5000]]])
    """

    name: str
    severity: int
    strength: float
    apply: Callable[[Any, float], Any]
    move: Callable[[Tensor, tuple[int, int], float], Tensor] | None = None

    def __call__(self, images: T) -> T:
        """Returns the images made worse."""
        worse: T = self.apply(images, self.strength)
        return worse

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns where boxes ``[..., 4]`` lie afterwards, in images of (height, width)."""
        return boxes if self.move is None else self.move(boxes, size, self.strength)


def _scaled_blur(images: T, radius: float) -> T:
    """Returns images under a blur whose radius is in pixels of an image with a shorter side of 224."""
    chosen = imported("PIL.ImageFilter", "a corruption").GaussianBlur
    return _each(images, lambda image: image.filter(chosen(radius * min(image.size) / 224)))


def _whole_jpeg(images: T, quality: float) -> T:
    return jpeg(images, int(quality))


_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor] | None, tuple[float, ...]]] = {
    "blur": (_scaled_blur, None, (1, 2, 3, 4, 6)),
    "crop": (crop, cropped_boxes, (0.95, 0.9, 0.85, 0.8, 0.7)),
    "jpeg": (_whole_jpeg, None, (25, 18, 15, 10, 7)),
}


def standard_corruptions(
    names: Iterable[str] | None = None, severities: Iterable[int] = (1, 2, 3, 4, 5)
) -> list[Corruption]:
    """Returns the stated corruptions, each at each severity.

    | name | strengths of severities 1 to 5 | |
    |---|---|---|
    | "blur" | 1, 2, 3, 4, 6 | radius in pixels of an image whose shorter side has 224, in proportion for others |
    | "crop" | 0.95, 0.9, 0.85, 0.8, 0.7 | of each side what stays |
    | "jpeg" | 25, 18, 15, 10, 7 | quality |

    Args:
        names: some of "blur", "crop" and "jpeg"; None: all.
        severities: some of 1 to 5.

    Raises:
        TypeError: a wrong type. ValueError: an unknown name or severity, or none.

    Source: strengths of blur and JPEG are those that the authors' code gives ImageNet-C (Hendrycks & Dietterich, 2019);
    those of the crop are this package's: the last leaves half of the area.

    Example:
        >>> from mmkernels.evaluation import standard_corruptions
        >>> [(x.name, x.severity, x.strength) for x in standard_corruptions(["jpeg"], [1, 5])]
        [('jpeg', 1, 25), ('jpeg', 5, 7)]
    """
    chosen = list(_KINDS) if names is None else listed("names", names, "names of corruptions")
    for name in chosen:
        check_choice("names", name, tuple(_KINDS))
    levels = [whole("severities", level, 1, 5) for level in listed("severities", severities, "integers")]
    found = []
    for name in chosen:
        apply, move, strengths = _KINDS[name]
        found += [Corruption(name, level, strengths[level - 1], apply, move) for level in levels]
    return found


def _each(images: Any, change: Callable[[Image], Image]) -> Any:
    """Returns the images, each changed as a Pillow image of mode L or RGB."""
    if isinstance(images, Tensor):
        return _each_of_tensor(images, change)
    single = imported("PIL.Image", "a corruption").Image
    if isinstance(images, single):
        return change(_checked_image("images", images))
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise TypeError(f"images must be a tensor, a Pillow image or several, got {type(images).__name__}")
    if not images:
        raise ValueError("images must be at least one, got none")
    for n, image in enumerate(images):
        if not isinstance(image, single):
            raise TypeError(f"images must be Pillow images, got {type(image).__name__} at {n}")
    return [change(_checked_image(f"images[{n}]", image)) for n, image in enumerate(images)]


def _checked_image(name: str, image: Image) -> Image:
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"{name} must be of mode L or RGB, got {image.mode}")
    return image


def _each_of_tensor(images: Tensor, change: Callable[[Image], Image]) -> Tensor:
    check_tensor("images", images)
    if images.dim() not in (3, 4) or images.shape[-3] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            f"images must be [C, H, W] or [N, C, H, W] with 1 or 3 channels and at least one pixel, "
            f"got shape {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floats, got {images.dtype}")
    plain = images.detach().cpu()
    if images.dtype != torch.uint8:
        if not ((plain >= 0) & (plain <= 1)).all():
            low, high = plain.amin().item(), plain.amax().item()
            raise ValueError(f"images must be from 0 to 1 as floats, got {low:g} to {high:g}")
        plain = (plain.float() * 255).round().to(torch.uint8)
    changed = torch.stack([_changed(image, change) for image in plain.reshape(-1, *plain.shape[-3:])])
    if images.dtype != torch.uint8:
        changed = changed.float() / 255
    return changed.reshape(images.shape).to(images.device, images.dtype)


def _changed(image: Tensor, change: Callable[[Image], Image]) -> Tensor:
    """Returns uint8 [C, H, W]."""
    array = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    out = change(imported("PIL.Image", "a corruption").fromarray(array.contiguous().numpy()))
    channels = torch.frombuffer(bytearray(out.tobytes()), dtype=torch.uint8)
    return channels.view(image.shape[1], image.shape[2], image.shape[0]).permute(2, 0, 1)
