"""Data sets, augmentation, loaders and out-of-distribution sets; street scenes drawn on the spot.

A training batch is uint8: images [B, 3, H, W] and labels [B, H, W], 0..C-1, `VOID` 255 where nobody
labelled and `IGNORED` 254 where no class of the network applies (augmentation padding, held-out
classes). 254 enters no loss and no metric; void pixels carry an uncertainty target, but no class.

Every random choice is a function of (stream, epoch, index), so neither the number of workers nor
a restart changes a batch.
"""

import fcntl
import hashlib
import json
import math
import os
import random
import re
import signal
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

VOID, IGNORED = 255, 254
SYNTHETIC_SPLITS = {"train": 240, "val": 48, "ood": 48}
SYNTHETIC_SIZE = (96, 144)  # height, width
SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")  # of image files
PASTED = 3  # stream of the pasted objects


class DataError(ValueError):
    """A file, folder or value that cannot be used; the message names it and says what to do."""


# ------------------------------------------------------------ files and their layouts


def is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in SUFFIXES and path.is_file()


@contextmanager
def decoded(kind: str, path: Path) -> Iterator[Image.Image]:
    """An opened image file; what PIL answers to a bad one becomes a DataError that names it."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"cannot read the {kind} {path} ({error}); restore or remove the file"
        raise DataError(message) from error


def read_image(path: Path) -> Image.Image:
    """An image file of any mode, upright as its EXIF tag says, as RGB."""
    with decoded("image", path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """A label file as raw values, one byte a pixel; a palette image's indices, not its colours."""
    with decoded("mask", path) as mask:
        values, mode = np.array(mask), mask.mode
    if values.ndim == 2 and values.dtype.kind in "bui" and 0 <= values.min() <= values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    raise DataError(f"the mask {path} has mode {mode}, not one class number a pixel; convert it")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not blank."""
    if not path.is_file():
        raise DataError(f"no file {path}, which holds {what}; add it or check --data and --split")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


class Layout(NamedTuple):
    """Where the files of a data set lie and what its masks hold. In the path of a mask, {stem} is
    what the last * of `glob` matched, {folder} what lies between `images` and the file."""

    images: str  # folder of the images
    glob: str  # the images in it
    masks: str  # the mask of an image
    classes: dict | None = None  # name: RGB; None: named in classes.txt
    values: dict = {}  # what a mask holds beside the labels 0..C-1 and 255: raw value, label
    listing: str = ""  # a file that names the images <stem>.jpg of the split
    roots: tuple = ("",)  # what all these are relative to, below --data

    def __str__(self) -> str:
        return f"images as {self.images}/{self.glob} and masks as {self.masks}"


def bit_palette(count: int) -> list[tuple[int, int, int]]:
    """The colours of Pascal VOC: the bits of the class number dealt out to red, green and blue."""
    bits = [[number >> bit & 1 for bit in range(9)] for number in range(count)]
    return [tuple(b[c] << 7 | b[c + 3] << 6 | b[c + 6] << 5 for c in range(3)) for b in bits]


CAMVID_CLASSES = {
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128),
    "road": (128, 64, 128), "pavement": (60, 40, 222), "tree": (128, 128, 0),
    "sign": (192, 128, 128), "fence": (64, 64, 128), "car": (64, 0, 128),
    "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192),
}  # fmt: skip
CITYSCAPES_CLASSES = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70),
    "wall": (102, 102, 156), "fence": (190, 153, 153), "pole": (153, 153, 153),
    "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
    "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
LAYOUTS = {
    "camvid": Layout("{split}", "*", "{split}annot/{stem}.png", CAMVID_CLASSES, {11: VOID}),
    "cityscapes": Layout(
        "leftImg8bit/{split}", "*/*_leftImg8bit.png",
        "gtFine/{split}/{folder}/{stem}_gtFine_labelIds.png", CITYSCAPES_CLASSES,
        dict.fromkeys(range(34), VOID) | {raw: c for c, raw in enumerate(CITYSCAPES_IDS)},
    ),
    "voc": Layout(
        "JPEGImages", "*", "SegmentationClass{aug}/{stem}.png",
        dict(zip(VOC_CLASSES, bit_palette(21), strict=True)),
        listing="ImageSets/Segmentation/{split}.txt", roots=("", "VOC2012", "VOCdevkit/VOC2012"),
    ),
    "folder": Layout("images/{split}", "**/*", "labels/{split}/{folder}/{stem}.png"),
}  # fmt: skip
DATASETS = ("synthetic", *LAYOUTS)


def find_files(layout: Layout, data: Path, split: str) -> tuple[Path, list[Path], list[Path]]:
    """The images' folder, the images in order, and the mask of each (whether it exists or not)."""
    inside = layout.images.format(split=split)
    root = next((data / path for path in layout.roots if (data / path / inside).is_dir()), None)
    if root is None:
        raise DataError(f"{data} has no folder {inside}; it should have {layout}")
    folder, tail = root / inside, layout.glob.rpartition("*")[2]
    if layout.listing:  # SBD's holds the paths of both files of a pair; the stem is what they share
        lines = read_lines(root / layout.listing.format(split=split), "the images of the split")
        images = [folder / f"{Path(line.split()[0]).stem}.jpg" for line in lines]
    else:
        images = sorted(path for path in folder.glob(layout.glob) if is_image(path))
    masks = []
    for path in images:
        stem = path.name.removesuffix(tail) if tail else path.stem
        below, aug = path.parent.relative_to(folder), "Aug" if split.endswith("aug") else ""
        masks.append(layout.masks.format(split=split, folder=below, stem=stem, aug=aug))
    return folder, images, [root / mask for mask in masks]


# ------------------------------------------------------------ data sets


class EvalSample(NamedTuple):
    image: Tensor  # uint8 [3, h, w], at the network's input size
    labels: Tensor  # uint8 [H, W], at native size
    index: int


class SegmentationDataset(Dataset):
    """Images and masks of one split, and what their values mean. Indexing gives an `EvalSample`.

    Attributes: `classes` names of the C classes of the network; `palette` their RGB; `table` uint8
    [256] from a mask's value to 0..C-1, 255 or 254, with `valid` bool [256] the values that may
    occur; `images`, `masks` files; `names` of the samples, for files made from them; `image_size`
    (H, W) of the network's input, None for native size.
    """

    def __init__(self, name: str, classes: dict, values: dict[int, int], image_size=None):
        self.name, self.image_size = name, image_size
        self.classes, self.palette = list(classes), [tuple(rgb) for rgb in classes.values()]
        self.images, self.masks, self.names, self.hold_out = [], [], [], []
        self.decoded: DecodedFiles | None = None  # see `keep_decoded`
        self.table, self.valid = np.full(256, VOID, np.uint8), np.zeros(256, bool)
        for raw, label in ({c: c for c in (*range(len(classes)), VOID)} | values).items():
            self.table[raw], self.valid[raw] = label, True

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> EvalSample:
        image, mask = self.read(index)
        labels = torch.from_numpy(self.labels(mask, index))
        return EvalSample(to_input(image, self.input_size(image)), labels, index)

    def input_size(self, image) -> tuple[int, int]:
        """(H, W) of the network's input for an image."""
        return self.image_size or (image.height, image.width)

    def stem(self, index: int) -> str:
        return self.names[index]

    def largest_mask(self) -> tuple[int, int]:
        """(H, W) that holds every mask of the split."""
        sizes = []
        for path in self.masks:
            with decoded("mask", path) as mask:
                sizes.append(mask.size)
        return max(height for _, height in sizes), max(width for width, _ in sizes)

    def crops(self, index: int) -> tuple:
        """Sample `index` as `read` has it, as two objects with width, height and crop(box)."""
        return self.decoded[index] if self.decoded else self.read(index)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Sample `index` at native size: the RGB image and the mask's raw values."""
        if self.decoded:
            return tuple(kept.crop((0, 0, kept.width, kept.height)) for kept in self.crops(index))
        image, mask = read_image(self.images[index]), read_mask(self.masks[index])
        if image.size != mask.size:
            sizes = [f"{one.width}x{one.height}" for one in (mask, image)]
            raise DataError(f"the mask {self.masks[index]} is {sizes[0]}, but {self.images[index]} "
                            f"is {sizes[1]}; a mask has the size of its image")  # fmt: skip
        return image, mask

    def labels(self, mask: Image.Image, index: int) -> np.ndarray:
        """Raw values of (a part of) the mask `index` to uint8 labels; DataError at unknown ones."""
        wrong = np.flatnonzero(np.array(mask.histogram()) * ~self.valid)
        if len(wrong):
            wrong = ", ".join(map(str, wrong[:8]))
            raise DataError(f"the mask {self.masks[index]} holds {wrong}, no label of {self.name}; "
                            "is it the right kind of file?")  # fmt: skip
        return np.array(mask.point(self.table.tolist()))  # in C: a third of an indexed table's time

    def remove_classes(self, hold_out: list[str]) -> None:
        """Take classes out of the network: their pixels become 254, the rest is numbered anew."""
        if unknown := " ".join(name for name in hold_out if name not in self.classes):
            known = ", ".join(self.classes)
            raise DataError(f"--hold-out {unknown}: no such class; choose from {known}")
        kept = {n: c for n, c in zip(self.classes, self.palette, strict=True) if n not in hold_out}
        if len(kept) < 2:
            raise DataError(f"--hold-out leaves {len(kept)} classes; a network needs at least 2")
        number = {name: label for label, name in enumerate(kept)}
        renumber = np.arange(256, dtype=np.uint8)
        renumber[: len(self.classes)] = [number.get(name, IGNORED) for name in self.classes]
        self.table = renumber[self.table]
        self.classes, self.palette, self.hold_out = [*kept], [*kept.values()], list(hold_out)


class Decoded(NamedTuple):
    """An image in a memory map, of which only what is cropped is read."""

    pixels: np.ndarray  # uint8 [H, W] or [H, W, 3]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        return Image.fromarray(np.ascontiguousarray(self.pixels[top:bottom, left:right]))


class DecodedFiles:
    """The images and masks of a data set as raw bytes in one file, memory-mapped when used."""

    def __init__(self, path: Path):
        self.path, self.index, self.bytes = path, np.load(path.with_suffix(".npy")), None

    def __getitem__(self, number: int) -> tuple[Decoded, Decoded]:
        if self.bytes is None:
            self.bytes = np.memmap(self.path, np.uint8, "r")
        height, width, start = self.index[number].tolist()
        size = height * width
        pixels = self.bytes[start : start + 4 * size]
        return (Decoded(pixels[: 3 * size].reshape(height, width, 3)),
                Decoded(pixels[3 * size :].reshape(height, width)))  # fmt: skip

    def __getstate__(self) -> dict:  # a worker maps the file anew
        return self.__dict__ | {"bytes": None}


def fingerprint(files: list[Path]) -> str:
    """Sixteen digits that change with a path, a size or a time of the files."""
    key = [[str(path), stat.st_size, stat.st_mtime_ns] for path in files for stat in (path.stat(),)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def keep_decoded(dataset: SegmentationDataset, folder: Path) -> None:
    """Let `dataset` read its samples from a file in `folder`, which is made where it is missing.

    Its name tells path, size and time of all source files: after a change it is made anew. It is
    there as a whole or not at all, also if several processes make it at once.
    """
    if not dataset.images:
        raise DataError(f"--cache {folder}: drawn scenes are not read from files; leave it out")
    path = folder / f"{dataset.name}-{fingerprint([*dataset.images, *dataset.masks])}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # a second process waits here, then finds the file
        if not path.with_suffix(".npy").exists():
            print(f"decoding {len(dataset)} images of {dataset.name} into {path}", flush=True)
            decode_files(dataset, path)
    dataset.decoded = DecodedFiles(path)


def decode_files(dataset: SegmentationDataset, path: Path) -> None:
    """Write what `DecodedFiles` reads: the bytes, and last the index that makes them valid."""
    index, partial = [], path.with_suffix(".tmp.npy")
    try:
        with open(path, "wb") as file:
            for number in range(len(dataset)):
                image, mask = dataset.read(number)
                index.append((image.height, image.width, file.tell()))
                file.write(image.tobytes())
                file.write(mask.tobytes())
            file.flush()
            os.fsync(file.fileno())
        np.save(partial, np.array(index))
        os.replace(partial, path.with_suffix(".npy"))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def in_proportion(image, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) of an image of any shape as input of a network that is used to `image_size`: of its
    height, but no more than four times as wide."""
    if image_size is None:
        return image.height, image.width
    factor = min(image_size[0] / image.height, 4 * image_size[1] / image.width)
    return max(1, round(image.height * factor)), max(1, round(image.width * factor))


def to_input(image: Image.Image, image_size: tuple[int, int] | None) -> Tensor:
    """An RGB image as uint8 [3, h, w], resized to `image_size` (H, W) where that is given."""
    if image_size is not None and image.size != (image_size[1], image_size[0]):
        image = image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


class SyntheticScenes(SegmentationDataset):
    """Drawn street scenes, the same for the same split and index; `ood` has masks of objects."""

    def __init__(self, split: str, image_size=None):
        if split not in SYNTHETIC_SPLITS:
            raise DataError(f"the synthetic data set has no split {split!r}; choose train or val")
        super().__init__("synthetic", CAMVID_CLASSES, {}, image_size)
        self.split, self.drawn = split, {}
        self.names = [f"{split}_{index:04d}" for index in range(SYNTHETIC_SPLITS[split])]

    def largest_mask(self) -> tuple[int, int]:
        return SYNTHETIC_SIZE

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a loop over the data set
        if index not in self.drawn:
            rng = np.random.default_rng([list(SYNTHETIC_SPLITS).index(self.split), index])
            draw = draw_ood_scene if self.split == "ood" else draw_scene
            image, labels = draw(rng, SYNTHETIC_SIZE)
            self.drawn[index] = (Image.fromarray(image), Image.fromarray(labels))
        return self.drawn[index]


def open_files(name: str, data: Path, split: str, image_size) -> SegmentationDataset:
    """One split of a data set of `LAYOUTS`; each image has to have its mask."""
    layout, classes = LAYOUTS[name], LAYOUTS[name].classes
    folder, images, masks = find_files(layout, data, split)
    for image, mask in zip(images, masks, strict=True):
        if not mask.is_file():
            raise DataError(f"no mask {mask} for the image {image}; add it or remove the image")
        if not image.is_file():
            raise DataError(f"no image {image} for the mask {mask}; add it or shorten the list")
    if classes is None:
        names = read_lines(path := data / "classes.txt", "the names of the classes, a name a line")
        if not 2 <= len(names) <= 254 or len(set(names)) < len(names):
            raise DataError(f"{path} names {len(names)} classes; it needs 2 to 254 different ones")
        classes = dict(zip(names, bit_palette(len(names) + 1)[1:], strict=True))
    dataset = SegmentationDataset(name, classes, layout.values, image_size)
    dataset.images, dataset.masks = images, masks
    # <folders>_<stem> where folders may repeat a name
    paths = [path.relative_to(folder if "**" in layout.glob else path.parent) for path in images]
    dataset.names = ["_".join(path.with_suffix("").parts) for path in paths]
    return dataset


def open_dataset(name: str, data, split: str, image_size=None, hold_out=()) -> SegmentationDataset:
    """One split of the data set `name` in the folder `data`, without the classes in `hold_out`.

    `image_size` (H, W) is that of the network's input. DataError where the files do not fit.
    """
    if data is not None and not Path(data).is_dir():
        raise DataError(f"no such folder: {data}; --data names the folder of the data set")
    if name == "synthetic":
        if data is not None:
            raise DataError(f"--data {data}: the synthetic scenes are drawn; leave it out, or name "
                            "the --dataset that the folder holds")  # fmt: skip
        if split == "ood":
            raise DataError("the split 'ood' has masks, no labels; score it with --ood synthetic")
        dataset = SyntheticScenes(split, image_size)
    elif data is None:
        raise DataError(f"--dataset {name} needs --data DIR, a folder with {LAYOUTS[name]}")
    else:
        dataset = open_files(name, Path(data), split, image_size)
    if len(dataset) == 0:
        raise DataError(f"no images in the split {split!r} of {data}; check the layout")
    if hold_out:
        dataset.remove_classes(list(hold_out))
    return dataset


# ------------------------------------------------------------ views and loaders


class Sample(NamedTuple):
    """One training sample; collated, a batch with a leading dimension B on every field."""

    images: Tensor  # uint8 [3, H, W]
    labels: Tensor  # uint8 [H, W]: class, VOID or IGNORED
    index: int  # of the image in its data set
    view: int  # which scale and crop of it; the epoch unless views repeat
    flip: bool  # mirrored left to right


class TrainingViews(Dataset):
    """Random scale, crop, flip (and colour jitter) of a data set, keyed by (stream, epoch, index).

    A view is `crop_size` (H, W). Of the scales in (lo, hi) half are below 1, half above, uniform.
    The integers of `stream` key all draws. `views` = K repeats the scale and crop of epoch e in
    epoch e + K, but not the flip (0: no repeats). `jitter` is the strength of `colour_jitter`.
    """

    def __init__(self, dataset, crop_size, scale, stream: list[int], views=0, jitter=0.0):
        self.dataset, self.crop_size, self.scale = dataset, crop_size, scale
        self.stream, self.views, self.jitter = stream, views, jitter

    def __len__(self) -> int:
        return len(self.dataset)

    def indices(self) -> int:
        """How many a sample's `index` can have."""
        return len(self)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        view = epoch % self.views if self.views else epoch
        flip = bool(np.random.default_rng([*self.stream, 1, epoch, index]).integers(2))
        pixels, labels = self.view(view, index)
        if flip:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return Sample(pixels, labels, index, view, flip)

    def view(self, view: int, index: int) -> tuple[Tensor, Tensor]:
        """The images and labels of a `Sample`, not flipped."""
        rng = np.random.default_rng([*self.stream, 0, view, index])
        lo, hi = self.scale
        scale = rng.uniform(lo, 1) if rng.random() < 0.5 else rng.uniform(1, hi)
        image, mask = self.dataset.crops(index)
        size = self.dataset.input_size(image)
        image, mask, (h, w) = random_crop(image, mask, size, scale, self.crop_size, rng)
        if self.jitter:
            image = colour_jitter(image, self.jitter, rng)
        pixels, labels = to_input(image, None), torch.from_numpy(self.dataset.labels(mask, index))
        if any(missing := (0, self.crop_size[1] - w, 0, self.crop_size[0] - h)):
            pixels, labels = F.pad(pixels, missing), F.pad(labels, missing, value=IGNORED)
        return pixels, labels


class PairedViews(TrainingViews):
    """Training views, each with a second `Sample` whose image has no labels: `VOID` everywhere,
    `IGNORED` in the padding. What a network learns from it is its uncertainty alone.

    The second is a `strong_view` of the first, or a view of one of the images `extra`, drawn by
    lot; with both, one or the other. It comes again with its view, as index + N of N images.
    """

    def __init__(self, *settings, strong: bool, extra: SegmentationDataset | None):
        super().__init__(*settings)
        self.strong = strong
        self.extra = extra and TrainingViews(extra, *settings[1:])

    def indices(self) -> int:
        return 2 * len(self)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sample, Sample]:
        first, index = super().__getitem__(key), key[1]
        rng = np.random.default_rng([*self.stream, 3, first.view, index])
        if self.strong and not (self.extra and rng.integers(2)):
            pixels, labels = ((x.flip(-1) if first.flip else x) for x in first[:2])
            rng = np.random.default_rng([*self.stream, 4, first.view, index])
            pixels, labels = strong_view(pixels, labels, rng)
        else:
            pixels, labels = self.extra.view(first.view, int(rng.integers(len(self.extra))))
        labels = torch.where(labels == IGNORED, IGNORED, VOID).to(torch.uint8)
        if first.flip:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return first, Sample(pixels, labels, len(self) + index, first.view, first.flip)


def strong_view(pixels: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """uint8 [3, H, W] in other colours, blurred, noisy, half of them with a shape that is cut from
    the upturned image: not one of the unknown objects that OOD detection is measured on. The labels
    [H, W] of that piece come along: what is held out stays out."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if rng.integers(2):
        shape, corners = Image.new("L", image.size), rng.uniform(-0.3, 0.3, (6, 2))
        corners = (corners + rng.uniform(0.2, 0.8, 2)) * image.size
        ImageDraw.Draw(shape).polygon([tuple(corner) for corner in corners], fill=255)
        image.paste(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), mask=shape)
        labels = torch.where(torch.from_numpy(np.array(shape)) > 0, labels.flip(0), labels)
    image = colour_jitter(image, 0.5, rng)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.02) * image.height ** 0.75))
    noise = rng.normal(0, rng.uniform(0, 20), (*image.size[::-1], 1 + 2 * rng.integers(2)))
    noisy = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(noisy).permute(2, 0, 1).contiguous(), labels


def random_crop(image, mask, image_size, scale: float, crop_size, rng) -> tuple:
    """Resize to `image_size` x `scale` and crop, resizing only what survives the crop.

    Returns the image, the mask and their size (h, w): `crop_size` or that of a smaller image.
    """
    height, width = image_size
    full = max(1, round(height * scale)), max(1, round(width * scale))  # before the crop
    h, w = min(full[0], crop_size[0]), min(full[1], crop_size[1])
    top, left = int(rng.integers(full[0] - h + 1)), int(rng.integers(full[1] - w + 1))
    y, x = image.height / full[0], image.width / full[1]
    box = left * x, top * y, min((left + w) * x, image.width), min((top + h) * y, image.height)
    # what the filter sees around the box; from a memory map no more than that is read
    margin = math.ceil(max(1, x, y)) + 1
    region = [max(0, math.floor(box[0]) - margin), max(0, math.floor(box[1]) - margin),
              min(image.width, math.ceil(box[2]) + margin),
              min(image.height, math.ceil(box[3]) + margin)]  # fmt: skip
    box = [place - region[axis % 2] for axis, place in enumerate(box)]
    image, mask = image.crop(region), mask.crop(region)
    image = image.resize((w, h), Image.Resampling.BILINEAR, box=box)
    return image, mask.resize((w, h), Image.Resampling.NEAREST, box=box), (h, w)


def colour_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation in random order, each times 1 +- `strength`."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(3):
        image = enhancers[number](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many share the work: 0 and 1 outside of a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order that is a function of (stream, epoch); a process of a
    group gets its share of each.

    `epoch` and `start` (first batch) are set before each pass. A last batch of less than two images
    a process is dropped, for batch norm needs two; a data set smaller than a batch makes one of it.
    """

    def __init__(self, length: int, batch_size: int, stream: list[int]):
        self.rank, self.world = rank_and_world()
        self.length, self.batch_size, self.stream = length, min(batch_size, length), stream
        self.epoch = self.start = 0
        if self.batch_size < 2 * self.world:
            raise DataError(f"a batch of {self.batch_size} of the {length} training images is too "
                            f"small for {self.world} processes; batch norm needs at least 2 each")

    def __len__(self) -> int:
        return self.length // self.batch_size + (self.length % self.batch_size >= 2 * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([*self.stream, 2, self.epoch]).permutation(self.length)
        for number in range(self.start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.world]]


def leave_ctrl_c_to_parent(_: int) -> None:
    """A worker that dies of Ctrl-C breaks the loop that its parent is about to end in order. But
    SIGTERM is how the parent ends it: were that ignored, the parent would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_settings(workers: int, device: torch.device) -> dict:
    # a generator of its own: the default one would draw from the stream that dropout uses
    own, pin = torch.Generator(), device.type == "cuda"
    return dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=pin, generator=own,
                worker_init_fn=leave_ctrl_c_to_parent)  # fmt: skip


def training_loader(views: TrainingViews, batch_size: int, workers: int, device) -> DataLoader:
    """Batches of `Sample`, of `PairedViews` first all the labelled ones, then as many others; set
    `loader.batch_sampler.epoch` before each pass."""
    batches = EpochBatches(len(views), batch_size, views.stream)
    collate = collate_pairs if isinstance(views, PairedViews) else default_collate
    return DataLoader(views, batch_sampler=batches, collate_fn=collate,
                      **worker_settings(workers, device))  # fmt: skip


def collate_pairs(pairs: list[tuple[Sample, Sample]]) -> Sample:
    return default_collate([sample for half in zip(*pairs, strict=True) for sample in half])


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int, device) -> DataLoader:
    """Lists of equally sized `EvalSample` batches, in order: [B, 3, h, w], [B, H, W] and [B]; to a
    process of a group every so many images, without padding."""
    rank, world = rank_and_world()
    if world > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world))
    settings = worker_settings(workers, device)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_runs, **settings)


def collate_runs(samples: list[EvalSample]) -> list[EvalSample]:
    """Neighbours of equal shapes become one batch; one size of image with two of masks does not."""
    runs = groupby(samples, key=lambda sample: (sample.image.shape, sample.labels.shape))
    return [default_collate(list(run)) for _, run in runs]


# ------------------------------------------------------------ street scenes drawn on the spot

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
# A family of colours for each material; the last of most looks like another one's: nothing is sure.
TONES = {
    "wall": "b05c46 cea068 debe96 be7854 cc8e7a 807e80", "road": "4e5058 464850 585a62 7a7674",
    "slab": "bab4ac aeaaa6 c4baac 807e80", "leaf": "3e7c2c 4e8834 346c2a 608a30 3a4828",
    "board": "dcd8cc ccd4d8 e4e0d0 8e5e32", "metal": "262a2e 2e3234 202228 686a6c",
    "coat": "2c54b0 b22228 246eaa d6d8de 42703e", "shirt": "a03c98 c85cb0 8640b0 dcb0dc 3c5aa0",
    "vest": "f6d628 fa961e ece83c b0b050", "face": "d61e28 ce2224 1c4ac4 de282c f0c428",
    "skin": "e0b496 b07e60 785440", "jeans": "3c4468 344c60", "glass": "283040 404c60",
    "white": "f0f0f0", "black": "1a1a1c", "grey": "84868a", "lamp": "e82a1e", "hair": "604832",
}  # fmt: skip
INKS = ((10, 10, 20), (245, 245, 245), (20, 60, 230), (110, 20, 220))  # of unknown objects
MOODS = [((84, 146, 222), (206, 226, 240), (1.05, 1.0, 0.95)),  # zenith, skyline, light on things
         ((176, 182, 190), (218, 220, 222), (0.9, 0.92, 0.95)),  # overcast
         ((120, 128, 184), (250, 196, 150), (0.96, 0.82, 0.74))]  # evening  # fmt: skip
# What faces the camera, back to front: class (None keeps what is there), material, and x, y, ... in
# centimetres; two points are the corners of an ellipse.
SHADOW, POST = (None, "black", -45, -7, 45, 7), (POLE, "metal", -24, 0, -24, 230, 24, 230, 24, 0)
LAMP_POST = [SHADOW, (POLE, "metal", -24, 0, -24, 600, 24, 600, 24, 0)]
SIGN_POST = [SHADOW, POST, (SIGN, "face", -54, 176, 54, 284),
             (None, "white", -38, 221, -38, 241, 38, 241, 38, 221)]
WARNING = [SHADOW, POST, (SIGN, "face", -64, 190, 0, 300, 64, 190),
           (None, "white", -30, 210, 0, 262, 30, 210)]
MOTOR = [(CAR, "black", -85, 0, -85, 40, 85, 40, 85, 0),
         (CAR, "coat", -88, 25, -88, 95, -68, 150, 68, 150, 88, 95, 88, 25),
         (None, "glass", -74, 98, -60, 142, 60, 142, 74, 98),
         (None, "lamp", -84, 64, -58, 88), (None, "lamp", 58, 64, 84, 88),
         (None, "white", -24, 45, -24, 60, 24, 60, 24, 45)]
WALKER = [SHADOW, (PEDESTRIAN, "jeans", -27, 92, 27, 92, 36, 0, 14, 0, 0, 60, -6, 0, -28, 0),
          (PEDESTRIAN, "shirt", -24, 152, -50, 85, -36, 80, 36, 80, 50, 85, 24, 152),
          (PEDESTRIAN, "hair", -18, 152, 18, 190), (PEDESTRIAN, "skin", -13, 148, 17, 182)]
RIDER = [(BICYCLIST, "black", -94, 0, -14, 78), (BICYCLIST, "black", 14, 0, 94, 78),
         (None, "grey", -80, 13, -28, 65), (None, "grey", 28, 13, 80, 65),
         (BICYCLIST, "face", -60, 34, -22, 90, 38, 90, 60, 34, 46, 34, 24, 76, -14, 76, -44, 34),
         (BICYCLIST, "jeans", -32, 100, 16, 84, -2, 20, 16, 20, 36, 92, -10, 116),
         (BICYCLIST, "vest", -36, 95, -10, 154, 30, 150, 58, 110, 48, 102, 24, 122, 8, 95),
         (BICYCLIST, "skin", 4, 148, 38, 184), (BICYCLIST, "vest", -2, 166, 38, 192)]  # fmt: skip


def _paint(s, label, rgb, corners):
    """A polygon of world points (x right, y up, z away, in metres), lit and hazy; two points span
    a rectangle along the street or, equally far, an ellipse."""
    if len(corners) == 2 and corners[0][2] != corners[1][2]:
        (x, y, z), (x1, y1, z1) = corners
        corners = [(x, y, z), (x1, y1, z), (x1, y1, z1), (x, y, z1)]
    xy = [(s.cx + s.f * x / z, s.horizon + s.f * (1.4 - y) / z) for x, y, z in corners]
    near = math.exp(-s.haze * corners[-1][2])
    ink = [int(c * near * a + b * (1 - near)) for c, a, b in zip(rgb, s.light, s.fog, strict=True)]
    for canvas, fill in ((s.paint, tuple(ink)), (s.annotate, label)):
        if fill is not None and len(xy) == 2:
            canvas.ellipse([*map(min, *xy), *map(max, *xy)], fill=fill)
        elif fill is not None:
            canvas.polygon(xy, fill=fill)


def _tone(r, name):
    return [c * r.uniform(0.93, 1.07) for c in bytes.fromhex(r.choice(TONES[name].split()))]


def _figure(s, r, parts, x, z):
    """Paint what stands at (x, 0, z) facing the camera, in tones and a size of its own."""
    tones, scale = {part[1]: _tone(r, part[1]) for part in parts}, r.uniform(0.0092, 0.0108)
    flip = scale * r.choice((-1, 1))
    for label, name, *xy in parts:
        points = [(x + flip * u, scale * v, z) for u, v in zip(xy[::2], xy[1::2], strict=True)]
        _paint(s, label, tones[name], points)


def _building(s, r, x, z0, z1):
    wall, glass, height = _tone(r, "wall"), _tone(r, "glass"), r.uniform(4.5, 8)
    front = [(x, 0, z0), (x, height, z0), (5 * x, height, z0), (5 * x, 0, z0)]
    _paint(s, BUILDING, wall, front)
    _paint(s, BUILDING, [s.shade[x > 0] * c for c in wall], [(x, 0, z0), (x, height, z1)])
    columns = int((z1 - z0) / (1.4 + z0 / 8))
    for k in range(columns * int(height / 2.1)):
        y, z = 0.7 + 2.1 * (k // columns), z0 + (k % columns + 0.25) * (z1 - z0) / columns
        _paint(s, None, glass, [(x, y, z), (x, y + 1.1, z + 0.5 * (z1 - z0) / columns)])


def _garden(s, r, x, z0, z1):
    for z in (z1, z1 - r.uniform(2, 3)):  # two trees behind a fence
        at, up, leaf = x * r.uniform(1.1, 1.6), r.uniform(2.6, 3.2), _tone(r, "leaf")
        for _ in range(9):
            u, v, a = at + r.gauss(0, 0.5), r.gauss(0, 0.4), r.uniform(0.55, 0.85)
            rgb = [c * min(1.6, 1 + 0.4 * v + r.uniform(-0.2, 0.2)) for c in leaf]
            _paint(s, TREE, rgb, [(u - a, up + v - a, z), (u + a, up + v + a, z)])
    board, height, z = _tone(r, "board"), r.uniform(1.5, 2.0), z0
    _paint(s, FENCE, [0.4 * c for c in board], [(x, 0, z0), (x, height, z1)])
    while z < z1:  # boards no finer than can be seen
        b = z + max(0.18, 0.022 * z * z)
        _paint(s, None, [c * r.uniform(0.9, 1.08) for c in board], [(x, 0, z), (x, height, b)])
        z = b + 0.5 * (b - z)


def _street(s, r):
    """The ground, both sides of the street, then what stands on it: far to near."""
    half, edge, depths = r.uniform(1.35, 1.65), r.uniform(2.8, 3.3), (99, 30, 15, 9, 6, 4, 3, 2, 1)
    slab, road, joint = _tone(r, "slab"), _tone(r, "road"), _tone(r, "grey")
    for k, (z1, z0) in enumerate(zip(depths, depths[1:], strict=False)):
        for label, rgb, x, z in ((PAVEMENT, slab, 60, z1), (None, joint, 60, z0 * 1.02),
                                 (None, joint, half + 0.1, z1), (ROAD, road, half, z1),
                                 (None, (220, 220, 214), 0.07 * (k % 2), z1)):  # fmt: skip
            _paint(s, label, rgb, [(-x, 0, z0), (x, 0, z)])
    for z0, z1 in ((13, 24), (7.5, 13), (1.3, 7.5)):
        for x in (-edge, edge):
            (_building if z0 > 2 or r.random() < 0.4 else _garden)(s, r, x, z0, z1)
    things = []
    for side in (-1, 1):
        for low, high, inner, outer, kinds in (
            (3.0, 4.8, 0.6, 0.8, (MOTOR, MOTOR, RIDER, RIDER, [])),
            (2.6, 3.8, half + 0.4, half + 0.9, (WALKER, [])),
            (3.0, 4.6, half, half + 0.2, (SIGN_POST, SIGN_POST, WARNING, LAMP_POST, [], [])),
        ):
            things.append((r.uniform(low, high), side * r.uniform(inner, outer), r.choice(kinds)))
    for z, x, parts in sorted(things, key=lambda thing: -thing[0]):
        _figure(s, r, parts, x, z)


def _noise(rng, size, cells):
    """Smooth noise [H, W] of about unit variance, `cells` grains high whatever the size."""
    grid = rng.standard_normal((cells, cells * size[1] // size[0]), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize(size[::-1], Image.Resampling.BICUBIC))


def draw_scene(rng, size):
    """A street as (image uint8 [H, W, 3], labels uint8 [H, W], 0..10 and 255) for size (H, W)."""
    r, (height, width) = random.Random(int(rng.integers(2**62))), (2 * size[0], 2 * size[1])
    zenith, low, light = r.choices(MOODS, (5, 4, 2))[0]
    image, canvas = Image.new("RGB", (width, height)), Image.new("L", (width, height), SKY)
    s = SimpleNamespace(  # drawn at twice the size: halving smooths the edges
        f=0.9 * height, cx=width * r.uniform(0.44, 0.56), horizon=height * r.uniform(0.42, 0.48),
        light=light, fog=low, haze=r.uniform(0.01, 0.03), shade=r.choice(((0.8, 1), (1, 0.8))),
        paint=ImageDraw.Draw(image), annotate=ImageDraw.Draw(canvas),
    )  # fmt: skip
    sky = np.linspace(zenith, low, 12)[:, None]  # [12, 1, 3]
    sky = sky + (244 - sky) * np.clip(0.4 * _noise(rng, (12, 18), 6), 0, 1)[..., None]  # clouds
    sky = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    image.paste(sky.resize((width, int(s.horizon) + 2), Image.Resampling.BICUBIC))
    _street(s, r)
    labels = np.asarray(canvas)[::2, ::2].copy()
    rough = np.float32([0.01, 0.05, 0.03, 0.06, 0.05, 0.16, 0.02, 0.05, 0.02, 0.04, 0.04])[labels]
    grain = _noise(rng, size, size[0]) + _noise(rng, size, size[0] // 4)
    pixels = np.asarray(image.reduce(2)) * ((1 + rough * grain) * r.uniform(0.85, 1.15))[..., None]
    pixels += np.float32(r.uniform(1.5, 4)) * rng.standard_normal(pixels.shape, np.float32)
    here = labels[1:, 1:]
    edge = (here != labels[:-1, 1:]) | (here != labels[1:, :-1])
    here[edge & (_noise(rng, edge.shape, 6) > -0.6)] = VOID  # nobody can tell who owns some borders
    return pixels.clip(0, 255).astype(np.uint8), labels


def draw_unknown(rng, height):
    """An object `height` pixels high: (rgb float [h, w, 3], alpha float [h, w]), both in [0, 1]."""
    rows, a, n = 2 * max(6, int(height)), rng.uniform(0, np.pi), rng.integers(4, 8)
    u, v = np.meshgrid(np.linspace(-1.1, 1.1, rows) * rng.choice((-1, 1)), np.linspace(-1, 1, rows))
    p, q = 2.4 * (u * np.cos(a) + v * np.sin(a)), 2.4 * (v * np.cos(a) - u * np.sin(a))
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    creature = np.full(u.shape, 9.0)  # a trunk, a neck and n legs, in signed distance
    legs = [(x, 0, 0.2 * x, 0.88, 0.13) for x in np.linspace(-0.6, 0.6, n)]
    for x, y, dx, dy, thick in ((-0.5, 0, 1, 0, 0.36), (0.5, 0, 0.25, -0.8, 0.18), *legs):
        t = np.clip(((u - x) * dx + (v - y) * dy) / (dx * dx + dy * dy), 0, 1)
        creature = np.minimum(creature, np.hypot(u - x - t * dx, v - y - t * dy) - thick)
    blob = rho - 0.74 - 0.14 * np.sin(2 * theta + n) - 0.1 * np.sin((n - 1) * theta - n)
    star, torus = rho - 0.45 - 0.5 * np.abs(np.cos(n * theta / 2)), np.abs(rho - 0.64) - 0.34
    alpha = np.clip(0.5 - (blob, star, torus, creature)[rng.integers(4)] * rows / 4, 0, 1)
    checks, dots = (np.floor(p) + np.floor(q)) % 2, 4 * np.hypot(p % 1 - 0.5, q % 1 - 0.5) - 1
    zebra, spiral = 0.5 + 3 * np.sin(5 * p + np.sin(2 * q)), 0.5 + 3 * np.sin(3 * theta + 9 * rho)
    plasma = 0.5 + 0.6 * np.sin(2 * p + 2 * np.sin(2 * q) + 3 * rho)
    pattern = (checks, dots, zebra, spiral, plasma)[rng.integers(5)].clip(0, 1)[..., None]
    first, second = rng.permutation(INKS)[:2] / 255
    light = 0.7 + 0.3 * np.sqrt(np.clip(1 - rho**2 / 2, 0, 1)) - 0.15 * v
    rgb = np.clip((first * pattern + second * (1 - pattern)) * light[..., None], 0, 1)
    return [x.reshape(rows // 2, 2, rows // 2, 2, -1).mean((1, 3)).squeeze() for x in (rgb, alpha)]


def paste_unknowns(image, rng, horizon=0.45):
    """One to three unknown objects in a street image, uint8 [H, W, 3], its horizon a fraction from
    the top: (image, mask uint8 [H, W]), 1 on them; size, light and grain follow the image."""
    (height, width), image = image.shape[:2], image.astype(np.float32)
    if min(height, width) < 16:  # no room
        return image.astype(np.uint8), np.zeros((height, width), np.uint8)
    mask, (yy, xx) = np.zeros((height, width), np.uint8), np.mgrid[:height, :width]
    street = image[int(horizon * height) :: max(1, height // 64), :: max(1, width // 64)]
    dark, bright = np.percentile(street.reshape(-1, 3), (2, 99), axis=0)
    noise = min(4.0, float(np.median(np.abs(np.diff(image[height // 3 : height // 2], axis=1)))))
    for drop in np.sort(rng.uniform(0.25, 0.85, rng.integers(1, 4)) * (1 - horizon)):  # far first
        foot = int((horizon + drop) * height)
        # an eye at 1.4 m sees m metres m / 1.4 times as high as their foot is below the horizon
        tall = np.clip(drop * rng.uniform(1.2, 1.8), 0.3, 0.65) * height
        tall = max(6, int(min(tall, foot, width)))
        rgb, alpha = draw_unknown(rng, tall)
        left = int(rng.uniform(0, width - tall))
        alpha = np.roll(alpha, tall - 1 - np.flatnonzero(alpha.max(1) > 0.5)[-1], axis=0)
        away = ((xx - left - tall / 2) ** 2 + 16 * (yy - foot) ** 2) / tall**2
        image *= 1 - 0.45 * np.exp(-8 * away)[..., None]  # its shadow
        place = slice(foot - tall, foot), slice(left, left + tall)
        rgb = dark + rgb * (bright - dark) + rng.normal(0, noise, rgb.shape)
        image[place] += alpha[..., None] * (rgb - image[place])
        mask[place] |= alpha > 0.5
    return (image + 0.5).clip(0, 255).astype(np.uint8), mask


def draw_ood_scene(rng, size):
    """A scene with unknown objects: (image, mask uint8 [H, W]), 1 on them, 255 where it is void."""
    image, labels = draw_scene(rng, size)
    image, mask = paste_unknowns(image, rng)
    mask[(labels == VOID) & (mask == 0)] = VOID
    return image, mask


# ------------------------------------------------------------ out-of-distribution sets


class AnomalyLayout(NamedTuple):
    """An OOD set as its publisher ships it: patterns of the paths below its folder, in which {id}
    (one name) or {path} (with folders) is what an image and its mask share, # is a digit, * a part
    of a name, **/ any folders, [ ] may be missing and | is "or"."""

    images: str
    masks: str
    values: dict  # all that a mask may hold: raw value, 0 normal, 1 anomaly or 255 void
    published: int | None = None  # images that have a public mask
    smallest: tuple[int, int] = (500, 100)  # pixels of a predicted and of a true component
    bases: str = ""  # photographs, to which `images` are the differences

    def find(self, folders: list[Path]) -> dict[str, dict[str, Path]]:
        """The files of each kind by what they share; DataError where two share the same."""
        found = {"images": {}, "masks": {}, "bases": {}}
        patterns = {kind: self.pattern(getattr(self, kind)) for kind in found}
        paths = [(folder, Path(place, name)) for folder in folders
                 for place, _, names in os.walk(folder, followlinks=True) for name in names]
        for (folder, path), kind in product(paths, found):
            if match := patterns[kind].fullmatch(path.relative_to(folder).as_posix()):
                key = next(filter(None, match.groups()))
                if (other := found[kind].setdefault(key, path)) != path:
                    raise DataError(f"{other} and {path} are both the file of {key} among the "
                                    f"{kind}; keep one of them")  # fmt: skip
        return found

    @staticmethod
    def pattern(text: str) -> re.Pattern:
        text = re.escape(text)
        for sign, meaning in (("{id}", "([^/]+)"), ("{path}", "(.+)"), ("#", r"\d"), ("|", "|"),
                              ("**/", "(?:.*/)?"), (".*", rf"\.(?:{'|'.join(SUFFIXES)})"),
                              ("*", "[^/]*"), ("[", "(?:"), ("]", ")?")):  # fmt: skip
            text = text.replace(re.escape(sign), meaning)
        return re.compile(text, re.IGNORECASE)


BINARY = {0: 0, 1: 1, VOID: VOID}
LAF_VOID = (0, 31, 33, 34, 36, 37, 38, 39)  # background, and objects that are no hazard
OOD_LAYOUTS = {
    "roadanomaly21": AnomalyLayout(
        "[dataset_AnomalyTrack/]images/{id}.*",
        "[dataset_AnomalyTrack/]labels_masks/{id}_labels_semantic.png", BINARY, 10),
    "roadobstacle21": AnomalyLayout(
        "[dataset_ObstacleTrack/]images/{id}.*",
        "[dataset_ObstacleTrack/]labels_masks/{id}_labels_semantic.png", BINARY, 30, (50, 10)),
    "roadanomaly": AnomalyLayout(
        "frames/{id}.*", "frames/{id}.labels/labels_semantic.png", {0: 0, 2: 1}, 60),
    "fishyscapes-laf": AnomalyLayout(
        "**/{id}_leftImg8bit.png", "**/####_{id}_labels.png", BINARY, 100),
    "fishyscapes-static": AnomalyLayout(
        "**/{id}_rgb.npz", "**/{id}_labels.png", BINARY, 30, bases="**/{id}_leftImg8bit.png"),
    "lost-and-found": AnomalyLayout(
        "leftImg8bit/test/{path}_leftImg8bit.png", "gtCoarse/test/{path}_gtCoarse_labelIds.png",
        {1: 0} | dict.fromkeys(range(2, 44), 1) | dict.fromkeys(LAF_VOID, VOID), 1203, (50, 10)),
    "streethazards": AnomalyLayout(
        "test/images/test/{path}.png", "test/annotations/test/{path}.png",
        dict.fromkeys(range(1, 14), 0) | {14: 1}, 1500),
    "folder": AnomalyLayout(
        "original/{path}.*|images/{path}.*", "labels/{path}.png|labels_masks/{path}.png", BINARY),
}  # fmt: skip


class AnomalyImages(SegmentationDataset):
    """Images of any size with masks: 1 anomaly, 0 none, 255 void; without `masks` 0 everywhere.
    The network's input has the height of `image_size` and keeps an image's proportions."""

    def __init__(self, name, image_size, images, masks=(), values=None, differences=()):
        super().__init__(name, {}, values or {0: 0}, image_size)
        self.valid[VOID] = VOID in (values or ())
        self.images, self.masks, self.differences = images, masks, differences
        shown = differences or images
        count = Counter(path.stem for path in shown)
        self.names = [f"{path.parent.name}_" * (count[path.stem] > 1) + path.stem for path in shown]

    def input_size(self, image) -> tuple[int, int]:
        return in_proportion(image, self.image_size)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        if not self.masks:
            image = read_image(self.images[index])
            return image, Image.new("L", image.size)
        image, mask = super().read(index)
        return (add_difference(image, self.differences[index]) if self.differences else image), mask


def add_difference(photo: Image.Image, path: Path) -> Image.Image:
    """`photo` plus the signed array `rgb` [H, W, 3] of an npz file."""
    try:
        with np.load(path) as file:
            difference = file["rgb"]
        if difference.shape != (photo.height, photo.width, 3):
            raise ValueError(f"its shape is {difference.shape}, the photo's {photo.size[::-1]}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the overlay {path} ({error}); restore it") from error
    pixels = np.asarray(photo).astype(np.int32) + difference
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class OwnAnomalies(Dataset):
    """The evaluation set with masks of anomalies, 255 void: its held-out classes or, with `paste`,
    unknown objects pasted into it, the same for an index (held-out classes are void then)."""

    def __init__(self, dataset: SegmentationDataset, paste: bool):
        self.dataset, self.stem, self.paste = dataset, dataset.stem, paste

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EvalSample:
        image, mask = self.dataset.read(index)
        labels = self.dataset.labels(mask, index)
        anomaly = np.where(labels < IGNORED, 0, VOID).astype(np.uint8)
        if self.paste:
            rng = np.random.default_rng([PASTED, index])
            pixels, objects = paste_unknowns(np.array(image), rng)
            image, anomaly[objects == 1] = Image.fromarray(pixels), 1
        else:
            anomaly[labels == IGNORED] = 1
        image = to_input(image, self.dataset.image_size)
        return EvalSample(image, torch.from_numpy(anomaly), index)


class OODSet(NamedTuple):
    """What `open_ood` returns."""

    name: str
    dataset: Dataset  # of `EvalSample`, the labels 0 normal, 1 anomaly, 255 void
    smallest: tuple[int, int]  # pixels of a predicted and of a true component
    protocol: dict  # what was read, skipped and taken as void


def open_ood(spec: str, dataset: SegmentationDataset) -> OODSet:
    """The OOD set that `spec` names, at the input size of the evaluation set `dataset`.

    "pasted" into its images, its "held-out" classes, the split `ood` of the "synthetic" scenes,
    NAME:PATH with a name of `OOD_LAYOUTS`, or a folder. DataError where the files do not fit.
    """
    own = {"source": "the evaluation split", "void": "its void"}
    if spec in ("pasted", "held-out"):
        return OODSet(spec, OwnAnomalies(dataset, spec == "pasted"), (500, 100), own)
    if spec == "synthetic":
        own = {"source": "drawn", "void": "masks 255"}
        return OODSet(spec, SyntheticScenes("ood", dataset.image_size), (50, 10), own)
    name, _, folders = ("folder", "", spec) if Path(spec).is_dir() else spec.partition(":")
    if name not in OOD_LAYOUTS:
        raise DataError(f"--ood {spec}: no such set or folder; choose synthetic, held-out, pasted, "
                        f"a folder, or NAME:PATH with NAME one of {', '.join(OOD_LAYOUTS)}")
    layout, folders = OOD_LAYOUTS[name], [Path(f) for f in folders.split(os.pathsep) if f]
    if missing := [str(folder) for folder in folders if not folder.is_dir()] or not folders:
        which = missing[0] if folders else "was named"
        raise DataError(f"--ood {spec}: no folder {which}; use {name}:PATH")
    found = layout.find(folders)
    images, masks, bases = found.values()
    keys = sorted(images.keys() & masks.keys())
    skipped = {"images without a mask": len(images) - len(keys),
               "masks without an image": len(masks) - len(keys)}
    if layout.bases:
        base = {key: bases.get(key.partition("_")[2]) for key in keys}  # NNNN_ goes before its name
        skipped["images without their photograph"] = sum(path is None for path in base.values())
        keys = [key for key in keys if base[key]]
    if not keys:
        raise DataError(f"--ood {spec}: no image with a mask; needs images as {layout.images} and "
                        f"masks as {layout.masks}" + f" and {layout.bases}" * bool(layout.bases))
    files = [images[key] for key in keys]
    photos, differences = ([base[key] for key in keys], files) if layout.bases else (files, [])
    title = folders[0].resolve().name if name == "folder" else name
    masks = [masks[key] for key in keys]
    opened = AnomalyImages(
        title, dataset.image_size, photos, masks, layout.values, differences
    )
    void = ", ".join(str(raw) for raw, label in layout.values.items() if label == VOID)
    protocol = {"source": " ".join(map(str, folders)), "void": f"masks {void}" if void else "none"}
    protocol |= {"skipped": {reason: n for reason, n in skipped.items() if n}}
    protocol |= {"published": layout.published} if layout.published else {}
    return OODSet(title, opened, layout.smallest, protocol)


def open_images(flag: str, folder: Path, image_size) -> AnomalyImages:
    """The images of the folder, subfolders too, that `flag` names: without labels or anomalies."""
    images = [path for path in sorted(folder.rglob("*")) if is_image(path)]
    if not images:
        raise DataError(f"{flag} {folder}: no image is there; name a folder of images")
    return AnomalyImages(flag.removeprefix("--"), image_size, images)
