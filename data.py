"""Data sets, training views, loaders and out-of-distribution sets; street scenes drawn on the spot.

A training batch is uint8: images [B, 3, H, W] and labels [B, H, W]. A label is a class
0..C-1, `VOID` (255) where nobody labelled, or `IGNORED` (254) where no class of the
network applies: in the padding of a view and on held-out classes. `IGNORED` pixels
enter no loss and no metric; `VOID` pixels carry an uncertainty target, but no class.

Every random choice is a function of (stream, epoch, index), where a stream is a list of
integers made of the seed. So neither the number of workers nor a restart changes a
batch.

Outline, in this order:

    image files           read images and masks, make them the network's input
    layouts               where the files of a data set lie: add a data set here, in `LAYOUTS`
    flat folders          which images of a folder without splits are for validation
    data sets             `open_dataset`, `SegmentationDataset`
    classes.txt           `read_classes`: what the masks of a user's folder hold
    decode cache          `cache_decoded`: decoded samples in a memory map
    training views        `TrainingViews`: random scale, crop, flip and colour jitter
    loaders               `training_loader`, `evaluation_loader`
    anomalies             `open_ood`: add an out-of-distribution set here, in `OOD_LAYOUTS`
    drawn scenes          `SyntheticScenes`, and the unknown objects that are pasted into images
"""

import bisect
import codecs
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import struct
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, TiffImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torchvision.datasets import Cityscapes

VOID = 255
IGNORED = 254

Size = tuple[int, int]  # height, width


class DataError(ValueError):
    """A file, folder or value that cannot be used; the message names it and says what to do."""


# -------------------------------------------------------------------------------------- image files

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")
ORIENTATION_TAG = 0x0112  # of EXIF
TURNS = {  # what sets an image upright, by its orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)  # these exchange height and width
ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")  # PIL's modes of whole numbers
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA_KEYS = ("exif", "xmp", "XML:com.adobe.xmp")  # where PIL keeps what may turn an image
LATE_METADATA = 2**16  # bytes at the end of a PNG file in which its last metadata begin
UNREAD_SUFFIXES = tuple(
    ".heic .heif .avif .jxl .jxr .dng .cr2 .cr3 .nef .arw .raf .rw2 .exr".split()
)
SYSTEM_FOLDERS = (  # of network disks, recycle bins, disk checks and archives, in small letters
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "__macosx",
)
LONGEST_NAME = 200  # bytes; a file system takes 255, and endings such as _uncertainty16.png follow


def is_image(path: Path) -> bool:
    """Whether the name of a file has the suffix of an image, in any case."""
    return path.suffix.lower().removeprefix(".") in SUFFIXES


def without_suffix(name: str) -> str:
    """The name of a file without the suffix of an image. Any other dot belongs to the name."""
    stem, _, suffix = name.rpartition(".")
    return stem if suffix.lower() in SUFFIXES else name


def walk_files(folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """Every file in a folder and its subfolders, in no order. Links are followed.

    What begins with a dot is left out: the system and editors put it there, as ._x.png
    and .ipynb_checkpoints; `SYSTEM_FOLDERS` are, too. `above` are the folders that the
    walk came through: a link to one of them, or to a folder that holds it, is not
    followed. DataError at a link that leads nowhere, and at a device or a pipe with the
    name of an image.
    """
    real_folder = os.path.realpath(folder)
    if any(Path(passed).is_relative_to(real_folder) for passed in above):
        return []
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(path):
                target = os.readlink(path)
                raise DataError(
                    f"the link {path} leads to {target}, which is not there; mend or remove it"
                )
            if entry.is_dir():
                if entry.name.lower() not in SYSTEM_FOLDERS:
                    files += walk_files(path, (*above, real_folder))
            elif entry.is_file():
                files.append(path)
            elif is_image(path):
                raise DataError(f"{path} is a device, a pipe or a socket, no image; remove it")
    return files


def shortened(name: str) -> str:
    """`name` as the beginning of a file's name: a long one is cut, and gets digits of its own."""
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    digits = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    kept = name
    while len(os.fsencode(kept)) > LONGEST_NAME - len(digits) - 1:
        kept = kept[:-1]
    return f"{kept}-{digits}"


@contextmanager
def open_with_pil(kind: str, path: Path) -> Iterator[Image.Image]:
    """An opened image file; what PIL answers to a bad one becomes a DataError that names it.

    `kind` is what the message calls the file: "image" or "mask".
    """
    try:
        with warnings.catch_warnings():
            # PIL warns of damaged metadata, which say nothing about the pixels, and of large files.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with open_any_png(path) as image:
                yield image
    except Image.DecompressionBombError:
        raise DataError(
            f"the {kind} {path} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; cut it into "
            "smaller ones"
        ) from None
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        message = f"cannot read the {kind} {path} ({error}); restore or remove the file"
        raise DataError(message) from error


def open_any_png(path: Path) -> Image.Image:
    """`Image.open`, also of a PNG file whose metadata are damaged or too long for PIL."""
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError):
        if not path.is_file():
            raise
        with open(path, "rb") as file:
            if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
                raise
    return Image.open(io.BytesIO(png_without_metadata(path.read_bytes())))


def png_without_metadata(content: bytes) -> bytes:
    """A PNG file with nothing but the chunks that its pixels depend on."""
    kept = [PNG_SIGNATURE]
    start = len(PNG_SIGNATURE)
    while start < len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        kind = content[start + 4 : start + 8]
        end = start + 12 + length  # length, kind and checksum have four bytes each
        if kind[:1].isupper() or kind == b"tRNS":  # a small letter: not needed for the pixels
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def orientation_of(image: Image.Image) -> int:
    """How an opened image is turned, 1 to 8 as EXIF counts; 1 where its EXIF data are damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """An opened image as its EXIF tag says that it is to be seen."""
    image.load()  # here, so that damaged pixels are not taken for damaged EXIF data
    orientation = orientation_of(image)
    if orientation == 1:
        return image
    return image.transpose(TURNS[orientation])


class Header(NamedTuple):
    """What an image file says of itself at its beginning."""

    height: int  # upright
    width: int
    mode: str  # PIL's


def read_header(kind: str, path: Path) -> Header:
    """The size and mode of an image file; its pixels are not read. `kind` as in `open_with_pil`."""
    with open_with_pil(kind, path) as image:
        if kind == "mask":
            check_mask_format(image, path)
        width, height = image.size
        if image.format == "TIFF":  # newer versions of PIL give the size of the upright image
            width = image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
            height = image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        # To look for EXIF data behind the pixels of a PNG file, PIL would read all of it.
        tag_matters = image.format != "PNG" or has_metadata(image, path)
        if tag_matters and orientation_of(image) in QUARTER_TURNS:
            height, width = width, height
        return Header(height, width, image.mode)


def has_metadata(image: Image.Image, path: Path) -> bool:
    """Whether an opened PNG file may say how it is turned, before its pixels or behind them."""
    if any(key in image.info for key in METADATA_KEYS):
        return True
    with open(path, "rb") as file:
        file.seek(-min(LATE_METADATA, path.stat().st_size), os.SEEK_END)
        end = file.read()
    return b"eXIf" in end or b"XML:com.adobe.xmp" in end


def check_mask_format(mask: Image.Image, path: Path) -> None:
    """DataError where an opened file cannot be trusted to hold the numbers that were put in."""
    if mask.format in ("JPEG", "MPO"):
        raise DataError(
            f"the mask {path} is a JPEG file, whatever its name: its numbers are smeared; export "
            "the masks anew as PNG"
        )


def read_image(path: Path) -> Image.Image:
    """An image file of any mode of whole numbers as RGB, upright as its EXIF tag says."""
    with open_with_pil("image", path) as image:
        return to_rgb(image, f"the image {path}")


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """An opened image of any mode of whole numbers as RGB, upright as its EXIF tag says.

    DataError at an image of fractions; `name` is what the message calls it.
    """
    if image.mode == "F":
        raise DataError(
            f"{name} holds fractions, of which nobody says what is black and what white; save it "
            "with 8 or 16 bits"
        )
    image = upright(image)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        grey = (np.asarray(image) >> 8).clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def from_array(pixels: np.ndarray) -> Image.Image:
    """The image of RGB values uint8 [H, W, 3]; DataError at any other array."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        shape = list(pixels.shape)
        raise DataError(
            f"an array of {pixels.dtype} {shape} is no image; pass RGB as uint8 [H, W, 3], or a "
            "PIL image"
        )
    return Image.fromarray(pixels)


def read_mask(path: Path, colours: Sequence[tuple] = ()) -> Image.Image:
    """A label file as raw values, one byte per pixel, upright as its EXIF tag says.

    Of a palette image these are the indices. With `colours`, RGB, the mask is a picture
    in these colours, and the raw values are their numbers in the list. DataError at any
    other colour.
    """
    with open_with_pil("mask", path) as mask:
        check_mask_format(mask, path)
        if not colours:
            check_mask_bits(mask, path)
        mask = upright(mask)
        values = np.array(mask)
        mode = mask.mode
        if colours:
            mask = mask.convert("RGB")
    if colours:
        return numbers_of_colours(mask, colours, path)
    if mode in ("LA", "RGB", "RGBA"):
        values = grey_values(values)
    if values.ndim == 2 and values.dtype.kind in "bui":
        if values.min() < 0 or values.max() > 255:
            raise DataError(
                f"the mask {path} (mode {mode}) holds values from {values.min()} to "
                f"{values.max()}; a mask has 0 to 255: convert it"
            )
    else:
        raise DataError(
            f"the mask {path} has mode {mode}, not one class number a pixel{colours_text(values)}; "
            "convert it, or in --dataset folder give the classes in classes.txt their colours, as "
            "NAME = R G B"
        )
    return Image.fromarray(values.astype(np.uint8))


def colours_text(values: np.ndarray) -> str:
    """How many colours a picture [H, W, 3 or 4] has, and the first ones; empty for any other."""
    if values.ndim != 3 or values.shape[2] < 3:
        return ""
    colours = np.unique(values[..., :3].reshape(-1, 3), axis=0).tolist()
    texts = [" ".join(str(part) for part in colour) for colour in colours[:4]]
    if len(colours) > 4:
        texts.append("...")
    return f" but {len(colours)} colours ({', '.join(texts)})"


def check_mask_bits(mask: Image.Image, path: Path) -> None:
    """DataError at an opened grey PNG file of 2 or 4 bits a pixel: PIL makes 85 or 17 of a 1."""
    for tile in mask.tile:
        if tile[3] in ("L;2", "L;4"):
            raise DataError(
                f"the mask {path} has {tile[3][-1]} bits a pixel, which are read as shades of grey "
                "and not as numbers; save it with 8 bits"
            )


def grey_values(values: np.ndarray) -> np.ndarray:
    """[H, W] of an opaque picture [H, W, 2 to 4] in shades of grey; any other as it is."""
    channels = values.shape[2]
    if channels in (2, 4) and values[..., -1].min() < 255:
        return values
    if channels > 2 and (values[..., :1] != values[..., 1:3]).any():
        return values
    return values[..., 0]


def numbers_of_colours(picture: Image.Image, colours: Sequence[tuple], path: Path) -> Image.Image:
    """The number in `colours` of the RGB of each pixel, one byte per pixel.

    DataError at a colour that is not there; `path` is the file of the picture.
    """
    pixels = np.asarray(picture.convert("RGBA"))  # four bytes, which one integer can hold
    packed = pixels.view("<u4")[..., 0] & 0xFFFFFF  # uint32 [H, W], red in the lowest byte
    numbers = colour_table(tuple(colours))[packed]
    unknown = np.unique(packed[numbers == NO_COLOUR]).tolist()
    if unknown:
        texts = []
        for key in unknown[:8]:
            texts.append(f"{key & 255} {key >> 8 & 255} {key >> 16}")
        raise DataError(
            f"the mask {path} holds colours that classes.txt lacks, {len(unknown)} in all: "
            f"{', '.join(texts)}; name them there, as NAME = {texts[0]} or void = {texts[0]}"
        )
    return Image.fromarray(numbers)


NO_COLOUR = 255  # in a `colour_table`


@lru_cache(maxsize=2)
def colour_table(colours: tuple[tuple, ...]) -> np.ndarray:
    """uint8 [2^24], from a packed colour to its number in `colours`, or `NO_COLOUR`.

    It has 16 MB, and looking up is ten times as fast as searching for each pixel.
    """
    table = np.full(2**24, NO_COLOUR, np.uint8)
    for number, (red, green, blue) in enumerate(colours):
        table[red | green << 8 | blue << 16] = number
    return table


def read_lines(path: Path, content: str, errors: str = "replace") -> list[str]:
    """The lines of a text file that are not blank; `content` says in the error what it holds.

    `errors` is what becomes of bytes that are no UTF-8, as in `bytes.decode`.
    """
    if not path.is_file():
        raise DataError(
            f"no file {path}, which holds {content}; add it or check --data and --split"
        )
    text = path.read_bytes()
    encoding = "utf-8-sig"
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # of a Windows shell
        encoding = "utf-16"
        errors = "replace"
    # Not `splitlines`, which also cuts at characters that a name may have.
    lines = re.split(r"\r\n|\r|\n", text.decode(encoding, errors))
    stripped = [line.strip() for line in lines]
    return [line for line in stripped if line]


def to_input(image: Image.Image, image_size: Size | None) -> Tensor:
    """An RGB image as uint8 [3, h, w], resized to `image_size` (H, W) where that is given."""
    if image_size is not None:
        height, width = image_size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    channels = [np.asarray(channel) for channel in image.split()]
    return torch.from_numpy(np.stack(channels))


def proportional_size(image, image_size: Size | None) -> Size:
    """(H, W) at which an image of any shape enters a network that is used to `image_size`.

    It gets the height of `image_size` and keeps its proportions, but becomes no more
    than four times as wide as `image_size`. None: the image's own size. `image` has a
    height and a width.
    """
    if image_size is None:
        return image.height, image.width
    factor = min(image_size[0] / image.height, 4 * image_size[1] / image.width)
    height = max(1, round(image.height * factor))
    width = max(1, round(image.width * factor))
    return height, width


# ------------------------------------------------------------------------------------------ layouts


class Layout(NamedTuple):
    """Where the files of a data set lie below --data, and what its masks hold.

    In the paths, {split} is --split, {stem} the name of an image without
    `image_suffix`, {folder} what lies between `images` and the image, and {aug} is
    "Aug" for a split whose name ends with "aug". Upper and lower case are the same in
    the suffixes of all files.
    """

    images: str  # the folder of the images
    glob: str  # the images in it
    masks: str  # the mask of an image
    classes: dict[str, tuple] | None = None  # name: RGB; None: named in classes.txt
    # Every raw value that a mask may hold, with its label: 0..C-1, or 255 where void.
    # None: a mask holds the labels themselves.
    values: dict[int, int] | None = None
    image_suffix: str = ""  # what follows the stem in the name of an image; empty: .png, .jpg, ...
    # A text file with the stems of the split's images, one per line; the images are
    # then <images>/<stem>.jpg, or of another suffix where there is no such file, and
    # `glob` only describes them. Empty: all images that `glob` matches.
    listing: str = ""
    roots: tuple[str, ...] = ("",)  # folders below --data that all of this may lie in
    # Whether the user names files and folders: the masks may then end otherwise, see
    # `find_mask_ending`, and there may be no folder for each split, see
    # `divide_images`.
    named_by_user: bool = False

    def describe(self) -> str:
        if self.named_by_user:
            return (
                "classes.txt, the folder images and the folder labels with a PNG mask of the same "
                "name for each image, or both folders with train and val below them; docs/DATA.md "
                "has an example"
            )
        return f"images as {self.images}/{self.glob} and masks as {self.masks}"


def bit_palette(count: int) -> list[tuple[int, int, int]]:
    """The colours of Pascal VOC: the bits of the class number dealt out to red, green and blue."""
    palette = []
    for number in range(count):
        rgb = []
        for channel in range(3):
            high = number >> channel & 1
            middle = number >> (channel + 3) & 1
            low = number >> (channel + 6) & 1
            rgb.append(high << 7 | middle << 6 | low << 5)
        palette.append(tuple(rgb))
    return palette


def cityscapes_tables() -> tuple[dict[str, tuple], dict[int, int]]:
    """The 19 classes that are trained with their colours, and the label of each raw value.

    torchvision carries the publisher's table; there a class that is not trained is 255, `VOID`.
    """
    classes = {}
    values = {}
    for entry in Cityscapes.classes:
        if entry.id < 0:  # the licence plate, which no mask holds
            continue
        values[entry.id] = entry.train_id
        if entry.train_id != VOID:
            classes[entry.name] = entry.color
    values[VOID] = VOID  # the licence plate has -1, which a mask of bytes holds as 255
    return classes, values


CAMVID_CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
CAMVID_VALUES = {label: label for label in range(11)} | {11: VOID, VOID: VOID}
CITYSCAPES_CLASSES, CITYSCAPES_VALUES = cityscapes_tables()
VOC_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
VOC_CLASSES = dict(zip(VOC_NAMES, bit_palette(21), strict=True))

LAYOUTS = {
    "camvid": Layout(
        images="{split}",
        glob="*",
        masks="{split}annot/{stem}.png",
        classes=CAMVID_CLASSES,
        values=CAMVID_VALUES,
    ),
    "cityscapes": Layout(
        images="leftImg8bit/{split}",
        glob="*/*_leftImg8bit.png",
        masks="gtFine/{split}/{folder}/{stem}_gtFine_labelIds.png",
        classes=CITYSCAPES_CLASSES,
        values=CITYSCAPES_VALUES,
        image_suffix="_leftImg8bit.png",
    ),
    "voc": Layout(
        images="JPEGImages",
        glob="*",
        masks="SegmentationClass{aug}/{folder}/{stem}.png",
        classes=VOC_CLASSES,
        listing="ImageSets/Segmentation/{split}.txt",
        roots=("", "VOC2012", "VOCdevkit/VOC2012"),
    ),
    # What the masks of this one hold is said in classes.txt: see `read_classes`.
    "folder": Layout(
        images="images/{split}",
        glob="**/*",
        masks="labels/{split}/{folder}/{stem}.png",
        named_by_user=True,
    ),
}
DATASETS = ("synthetic", *LAYOUTS)
# The layout `folder` without a folder for each split.
FLAT_FOLDER = LAYOUTS["folder"]._replace(images="images", masks="labels/{folder}/{stem}.png")


class SplitFiles(NamedTuple):
    """The files of one split of a data set."""

    folder: Path  # of the images
    images: list[Path]  # in order
    masks: list[Path]  # one for each image, whether it exists or not
    left_out: list[Path]  # files among the images that may be images of a kind that is not read
    mask_ending: str = ""  # what follows an image's stem in the name of its mask, if not ".png"
    found_instead: str = ""  # of masks that were not found: what is there in their place


Listings = dict[Path, dict[str, list[Path]]]  # by folder, the files of each `spelling`


def find_files(layout: Layout, data: Path, split: str) -> SplitFiles:
    """The images of a split below the folder `data`, and where the mask of each has to be."""
    root = find_root(layout, data, split)
    folder = root / layout.images.format(split=split)
    listings: Listings = {}
    left_out = []
    if layout.listing:
        images = read_listing(root / layout.listing.format(split=split), folder, listings)
    else:
        images = []
        for path in sorted(walk_files(folder)):
            if is_image(path) and matches(path.relative_to(folder), layout.glob):
                images.append(path)
            elif not is_image(path) and may_be_image(path):
                left_out.append(path)

    aug = "Aug" if split.endswith("aug") else ""
    masks = []
    for path in images:
        stem = path.name[: -len(layout.image_suffix or path.suffix)]
        below = path.parent.relative_to(folder)
        mask = layout.masks.format(split=split, folder=below, stem=stem, aug=aug)
        masks.append(find_spelling(root / mask, listings))
    files = SplitFiles(folder, images, masks, left_out)
    if layout.named_by_user and not all(mask.is_file() for mask in masks):
        return find_mask_ending(files)
    return files


# What the name of an image may end with that the name of its mask lacks.
IMAGE_ENDINGS = ("_leftImg8bit", "_image", "_img", "_rgb")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")


def without_image_ending(stem: str) -> str:
    """The stem of an image without one of `IMAGE_ENDINGS`."""
    for ending in IMAGE_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def find_mask_ending(files: SplitFiles) -> SplitFiles:
    """The files with masks called <stem>_mask.png, <stem>.jpg.png or the like, not <stem>.png.

    Every ending will do that begins with neither a letter nor a digit and that all
    masks share. Where none is, the files come back as they were, but for
    `found_instead`. DataError where two endings fit all images, or where the masks are
    of a kind that changes their values.
    """
    names_in: dict[Path, list[tuple[str, str]]] = {}
    masks_of_ending: dict[str, dict[Path, Path]] = {}  # the mask of each image that has one
    for image, mask in zip(files.images, files.masks, strict=True):
        stem = image.stem
        endings = endings_after(stem, mask.parent, names_in)
        if not endings:
            endings = endings_after(without_image_ending(stem), mask.parent, names_in)
        for ending, path in endings.items():
            masks_of_ending.setdefault(ending, {})[image] = path

    shared = []
    for ending, masks in masks_of_ending.items():
        if len(masks) == len(files.images):
            shared.append(ending)
    if len(shared) > 1:
        found = " and ".join(f"...{ending}" for ending in shared)
        raise DataError(
            f"the image {files.images[0]} has several masks in {files.masks[0].parent}, found "
            f"{found}; keep one kind there"
        )
    if not shared:
        return expect_commonest(files, masks_of_ending)
    ending = shared[0]
    masks = list(masks_of_ending[ending].values())
    if ending.endswith(LOSSY_SUFFIXES):
        raise DataError(
            f"the masks are called ...{ending}, as {masks[0]}, and this kind of file changes the "
            "values of pixels; save them as PNG"
        )
    return files._replace(masks=masks, mask_ending=ending)


def endings_after(
    stem: str, folder: Path, names_in: dict[Path, list[tuple[str, str]]]
) -> dict[str, Path]:
    """What follows `stem` in the names of the pictures in `folder`, each with its file.

    `names_in` keeps, of each folder, the names in order: their `spelling`, and as they are.
    """
    if folder not in names_in:
        names = os.listdir(folder) if folder.is_dir() else []
        names_in[folder] = sorted((spelling(name), name) for name in names)
    names = names_in[folder]
    stem = unicodedata.normalize("NFC", stem)
    endings = {}
    first = bisect.bisect_left(names, (stem,))
    for position in range(first, len(names)):
        spelled, name = names[position]
        if not spelled.startswith(stem):
            break
        ending = spelled.removeprefix(stem)
        begins_apart = bool(ending) and not ending[0].isalnum()
        if begins_apart and is_image(Path(name)) and (folder / name).is_file():
            endings[ending] = folder / name
    return endings


def expect_commonest(files: SplitFiles, masks_of_ending: dict[str, dict[Path, Path]]) -> SplitFiles:
    """The files with the masks that the commonest ending gives, and what there is of others."""
    for mask in files.masks:
        if not mask.parent.is_dir():
            return files._replace(found_instead=describe_missing_folder(mask.parent))
    if not masks_of_ending:
        found = f"no name in {files.masks[0].parent} begins as that of an image"
        return files._replace(found_instead=found)

    by_number = sorted(masks_of_ending, key=lambda ending: -len(masks_of_ending[ending]))
    parts = []
    for ending in by_number[:4]:
        parts.append(f"...{ending} for {len(masks_of_ending[ending])}")
    found = f"found {', '.join(parts)} of {len(files.images)} images"
    if len(by_number) > 1:
        found += "; one ending for all will do"
    commonest = by_number[0]
    masks = []
    for image, mask in zip(files.images, files.masks, strict=True):
        expected = mask.with_name(image.stem + commonest)
        masks.append(masks_of_ending[commonest].get(image, expected))
    return files._replace(masks=masks, found_instead=found)


def describe_missing_folder(folder: Path) -> str:
    """Which folder on the way to `folder` is not there, and what is beside it."""
    while not folder.parent.is_dir():
        folder = folder.parent
    beside = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    return f"there is no folder {folder}, but {', '.join(beside) or 'no other'} beside it"


def may_be_image(path: Path) -> bool:
    """Whether a file that is not read by its name is perhaps a picture."""
    known = ("", *UNREAD_SUFFIXES, *Image.registered_extensions())
    return path.suffix.lower() in known


def matches(path: Path, glob: str) -> bool:
    """Whether a path below the folder of the images is one of those that `Layout.glob` means."""
    if glob == "**/*":
        return True
    below = path.as_posix().lower()
    return below.count("/") == glob.count("/") and fnmatchcase(below, glob.lower())


def read_listing(listing: Path, folder: Path, listings: Listings) -> list[Path]:
    """The images in `folder` that the lines of a text file name.

    DataError where two lines that differ name one file: something would be trained on twice.
    """
    images = []
    line_of_image = {}
    # A name that is no UTF-8 comes out of the file as the system itself writes it.
    for line in read_lines(listing, "the images of the split", errors="surrogateescape"):
        image = find_listed(line, folder, listings)
        other = line_of_image.setdefault(image, line)
        if other != line:
            raise DataError(
                f"{listing} has the lines {other!r} and {line!r}, which both name {image}; remove "
                "one of them"
            )
        images.append(image)
    return images


def find_listed(line: str, folder: Path, listings: Listings) -> Path:
    """The image in `folder` that a line names; `folder`/<stem>.jpg where it is not there.

    A line may also have the paths of image and mask, as SBD's lists do: that is so
    where nothing has the whole line as its name, and a gap in it stands between two
    files.
    """
    name = line.replace("\\", "/")
    image = find_image(name, folder, listings)
    if image is not None:
        return image
    for gap in re.finditer(r"\s+", name):
        first = name[: gap.start()]
        second = name[gap.end() :]
        both_are_images = is_image(Path(first)) and is_image(Path(second))
        if both_are_images or stem_of(first) == stem_of(second):
            name = first
            image = find_image(name, folder, listings)
            break
    if image is None:
        return folder / f"{stem_of(name)}.jpg"
    return image


def find_image(name: str, folder: Path, listings: Listings) -> Path | None:
    """The image in `folder` with this stem, file name or path; None where there is none.

    DataError where several files fit and none of them is a .jpg.
    """
    # Below the folder of the images the whole path counts, of any other folder the name alone.
    below = name.rpartition(f"/{folder.name}/")[2].removeprefix(f"{folder.name}/")
    for place in (below.lstrip("/"), Path(name).name):
        path = folder / place
        if is_image(path) and path.is_file():
            return path
        for stem in (place, without_suffix(place)):
            usual = folder / f"{stem}.jpg"
            if usual.is_file():
                return usual
        found = []
        for suffix in SUFFIXES:
            path = find_spelling(folder / f"{without_suffix(place)}.{suffix}", listings)
            if path.is_file():
                found.append(path)
        if len(found) > 1:
            raise DataError(f"{found[0]} and {found[1]} are both {name} of the list; remove one")
        if found:
            return found[0]
    return None


def stem_of(path: str) -> str:
    """The name of a file without its folder and the suffix of an image."""
    return without_suffix(Path(path).name)


def spelling(name: str) -> str:
    """What is equal for two names that differ in the case of the suffix or in how
    Unicode writes an accent: macOS writes some letters as two characters, others as
    one."""
    stem, suffix = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def find_spelling(path: Path, listings: Listings) -> Path:
    """The file `path`, or the one beside it with the same `spelling`; `path` without either.

    DataError where two have it. `listings` keeps what was read of the folders.
    """
    if path.is_file():
        return path
    folder = path.parent
    if folder not in listings:
        names = os.listdir(folder) if folder.is_dir() else []
        listings[folder] = {}
        for name in names:
            listings[folder].setdefault(spelling(name), []).append(folder / name)
    found = listings[folder].get(spelling(path.name), [path])
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} both stand for {path.name}; remove one of them")
    return found[0]


def find_root(layout: Layout, data: Path, split: str) -> Path:
    """The first of the layout's roots below `data` that holds the folder of the images."""
    images = layout.images.format(split=split)
    for root in layout.roots:
        if (data / root / images).is_dir():
            return data / root
    nearest = (data / images).parent
    while not nearest.is_dir():
        nearest = nearest.parent
    present = sorted(path.name for path in nearest.iterdir() if path.is_dir())
    holds = f"{nearest} holds the folders {', '.join(present[:8]) or '(none)'}"
    raise DataError(f"{data} has no folder {images}; {holds}; it should have {layout.describe()}")


def check_pairs(files: SplitFiles) -> None:
    """DataError where an image or a mask is missing, or where two images have the same mask."""
    image_of_mask = {}
    for image, mask in zip(files.images, files.masks, strict=True):
        if not image.is_file():
            raise DataError(f"no image {image} for the mask {mask}; add it or shorten the list")
        if not mask.is_file():
            if mask.exists():
                raise DataError(
                    f"no mask {mask} for the image {image}: what is there is no file; put the mask "
                    "there or remove the image"
                )
            if mask.is_symlink():
                raise DataError(
                    f"the mask {mask} is a link to {os.readlink(mask)}, which is not there; mend it"
                )
            found = f" ({files.found_instead})" if files.found_instead else ""
            raise DataError(
                f"no mask {mask} for the image {image}{found}; add it or remove the image"
            )
        other = image_of_mask.setdefault(mask, image)
        if other != image:
            raise DataError(f"{other} and {image} both have the mask {mask}; remove one of them")


def masks_left_over(files: SplitFiles) -> list[Path]:
    """The pictures beside the masks whose names do not begin as that of an image."""
    beginnings = set()
    for image in files.images:
        stem = unicodedata.normalize("NFC", image.stem)
        beginnings |= {stem, without_image_ending(stem)}
    beginnings_to_try = tuple(beginnings)
    masks = set(files.masks)
    left_over = []
    for folder in sorted({mask.parent for mask in files.masks}):
        for path in sorted(folder.iterdir()):
            if path in masks or not is_image(path):
                continue
            if not spelling(path.name).startswith(beginnings_to_try):
                left_over.append(path)
    return left_over


def names_below(folder: Path, files: Sequence[Path]) -> list[str]:
    """The path of each file below `folder` as a name for other files: town/x.png is town_x.

    DataError where two files get the same name: the scores of one would overwrite the other's.
    """
    names = []
    file_of_name = {}
    for path in files:
        name = shortened("_".join(path.relative_to(folder).with_suffix("").parts))
        other = file_of_name.setdefault(name, path)
        if other != path:
            raise DataError(
                f"{other} and {path} would both be called {name} in the results; rename one of them"
            )
        names.append(name)
    return names


def short_names(files: Sequence[Path]) -> list[str]:
    """The stems of the files where all of these differ, else their paths below the
    folder that they share, as `names_below` makes them."""
    stems = [shortened(path.stem) for path in files]
    if len(set(stems)) == len(set(files)):
        return stems
    absolute = [Path(os.path.abspath(path)) for path in files]
    shared = os.path.commonpath([path.parent for path in absolute])
    return names_below(Path(shared), absolute)


# ------------------------------------------------------------------------------------- flat folders

DEFAULT_VAL_SHARE = 0.2


def is_flat(name: str, data: Path | None, split: str = "val") -> bool:
    """Whether the images of a data set `folder` lie in images/, not in a folder for each split."""
    if name != "folder" or data is None:
        return False
    images = Path(data) / "images"
    has_splits = any((images / folder).is_dir() for folder in ("train", "val", split))
    return images.is_dir() and not has_splits


def choose_val_share(name: str, data: Path | None, share: float | None) -> float | None:
    """The part of the images that validates: --val, or its default, of folders without splits.

    None for any other data set; DataError where --val is given for one.
    """
    if is_flat(name, data):
        return DEFAULT_VAL_SHARE if share is None else share
    if share is not None:
        raise DataError(
            f"--val {share:g} is for --dataset folder with images/ and labels/ that have no folder "
            "for each split; leave it out"
        )
    return None


class Division(NamedTuple):
    """Which images of a folder without splits are for validation."""

    validates: list[bool]  # of each image
    note: str
    warning: str  # empty where there is nothing to warn of

    def digits(self, paths: Sequence[Path]) -> str:
        """Sixteen digits that change with the paths of the images that validate."""
        names = []
        for path, validates in zip(paths, self.validates, strict=True):
            if validates:
                names.append(unicodedata.normalize("NFC", path.as_posix()))
        return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:16]


def sequence_and_frame(path: Path) -> tuple[str, int]:
    """What the frames of one video share, and the number of this one: ("town/clip_",
    12) of the path town/clip_0012.jpg below the folder of the images. Without a number
    the frame is 0."""
    name = path.with_name(without_image_ending(path.stem)).as_posix()
    name = unicodedata.normalize("NFC", name)
    sequence = name.rstrip("0123456789")
    digits = name.removeprefix(sequence)
    return sequence, int(digits or 0)


def divide_images(paths: Sequence[Path], share: float) -> Division:
    """Divide images into training and validation by their paths below their folder.

    Images whose paths differ in the last number alone are a group, such as the frames
    of a video, and stay together. The groups are taken in the order of a hash of their
    names, each that brings the validation split nearer to `share` of all images: so the
    result depends on nothing but the names, and changes little where some are added.
    Where all images are one group, its last frames validate. DataError at less than
    three images.
    """
    if len(paths) < 3:
        raise DataError(
            f"{len(paths)} images in a folder without splits; it takes at least 3, two to train on"
        )
    frames = [sequence_and_frame(path) for path in paths]
    sizes: dict[str, int] = {}
    for sequence, _ in frames:
        sizes[sequence] = sizes.get(sequence, 0) + 1
    if len(sizes) == 1:
        return divide_sequence(paths, frames, share)

    chosen = choose_groups(sizes, share)
    validates = [sequence in chosen for sequence, _ in frames]
    count = sum(validates)
    note = (
        f"--val {share:g}: by their names the {len(paths)} images are {len(sizes)} groups; "
        f"{len(chosen)} with {count} images ({group_names(sorted(chosen))}) for validation, "
        f"{len(sizes) - len(chosen)} with {len(paths) - count} images for training"
    )
    return Division(validates, note, "")


def divide_sequence(paths: Sequence[Path], frames: list[tuple[str, int]], share: float) -> Division:
    """The `Division` of images that are one group: the last frames are for validation."""
    order = sorted(range(len(paths)), key=lambda index: (frames[index][1], paths[index]))
    count = min(max(1, round(share * len(paths))), len(paths) - 2)
    last = order[-count:]
    validates = [index in set(last) for index in range(len(paths))]
    note = (
        f"--val {share:g}: the last {count} of {len(paths)} images, {paths[last[0]].name} to "
        f"{paths[last[-1]].name}, are for validation"
    )
    warning = (
        f"by their names all {len(paths)} images are one group ({group_names([frames[0][0]])}), so "
        "its end is for validation: if it is one video, the figures flatter, for neighbouring "
        "frames are alike; if it is several, put each into a folder of its own below images/ and "
        "labels/, or begin their names with different words"
    )
    return Division(validates, note, warning)


def choose_groups(sizes: dict[str, int], share: float) -> set[str]:
    """The groups for validation, at least one and not all; `sizes` has the images of each.

    Their images are about `share` of all. A closer fit is possible with few groups, but
    then one image more could turn training and validation around.
    """

    def hash_of(group: str) -> bytes:
        return hashlib.sha256(group.encode("utf-8", errors="surrogateescape")).digest()

    wanted = share * sum(sizes.values())
    order = sorted(sizes, key=hash_of)
    chosen: set[str] = set()
    count = 0
    for group in order:
        is_nearer = abs(count + sizes[group] - wanted) < abs(count - wanted)
        if is_nearer and len(chosen) + 1 < len(sizes):
            chosen.add(group)
            count += sizes[group]
    if not chosen:  # each is larger than twice what is wanted
        chosen.add(min(order, key=lambda group: sizes[group]))
    return chosen


def group_names(groups: list[str]) -> str:
    """The first names of groups as text: a*, b*, c*, ..."""
    text = ", ".join(f"{group}*" for group in groups[:3])
    return f"{text}, ..." if len(groups) > 3 else text


def take_split(files: SplitFiles, division: Division, split: str) -> SplitFiles:
    """The files of one split, "train" or "val", of a folder without splits."""
    images = []
    masks = []
    for image, mask, validates in zip(files.images, files.masks, division.validates, strict=True):
        if validates == (split == "val"):
            images.append(image)
            masks.append(mask)
    return files._replace(images=images, masks=masks)


# ---------------------------------------------------------------------------------------- data sets


class EvalSample(NamedTuple):
    """One sample for evaluation; collated, every field gets a leading dimension B."""

    image: Tensor  # uint8 [3, h, w], at the network's input size
    labels: Tensor  # uint8 [H, W], at native size
    index: int


class ImageAndMask(NamedTuple):
    """A decoded sample, of which a part can be cut out."""

    image: Image.Image
    mask: Image.Image

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def width(self) -> int:
        return self.image.width

    def crop(self, box: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
        """The image and the mask inside (left, top, right, bottom)."""
        return self.image.crop(box), self.mask.crop(box)


class SegmentationDataset(Dataset):
    """Images and masks of one split, and what their values mean. Indexing gives an `EvalSample`.

    Attributes:
        name: of the data set, for messages.
        classes, palette: names of the C classes of the network, and their RGB.
        images, masks: the files, in order; both empty for drawn scenes.
        names: a unique name for each sample, for the files that are made from it.
        hold_out: names of the classes that were taken out, see `remove_classes`.
        image_size: (H, W) of the network's input; None for each image's own size.
        mask_colours: of masks that are colour pictures, the RGB of each raw value; else empty.
        mask_sizes: (H, W) of every mask, once `check_headers` has looked at the files; of drawn
            scenes from the beginning.
        left_out: see `SplitFiles`.
        notes: what was found and decided about the files, a sentence each.
        doubts: what makes the split less trustworthy than it should be, a sentence each.
        division: of a folder without splits, the `Division.digits`; else empty.
        class_file: the file that names the classes; None where the layout does.
        allowed_values: bool [256], which raw values may occur in a mask.
        label_of_value: uint8 [256], from the raw value in a mask to 0..C-1, `VOID` or `IGNORED`.
        decoded: the samples of `cache_decoded`, None without a cache.

    The argument `classes` has the RGB of each class, and `values` the label of each raw
    value that a mask may hold; None where a mask holds the labels themselves: 0..C-1
    and `VOID`.
    """

    def __init__(
        self,
        name: str,
        classes: dict[str, tuple],
        values: dict[int, int] | None,
        images: Sequence[Path],
        masks: Sequence[Path],
        names: list[str],
        image_size: Size | None = None,
    ):
        self.name = name
        self.classes = list(classes)
        self.palette = [tuple(rgb) for rgb in classes.values()]
        self.images = images
        self.masks = masks
        self.names = names
        self.hold_out: list[str] = []
        self.image_size = image_size
        self.decoded: DecodedFiles | None = None
        self.mask_colours: list[tuple] = []
        self.mask_sizes: list[Size] = []
        self.left_out: list[Path] = []
        self.notes: list[str] = []
        self.doubts: list[str] = []
        self.division = ""
        self.class_file: Path | None = None

        if values is None:
            values = {label: label for label in range(len(classes))}
            values[VOID] = VOID
        self.allowed_values = np.zeros(256, bool)
        self.label_of_value = np.full(256, VOID, np.uint8)
        for value, label in values.items():
            self.allowed_values[value] = True
            self.label_of_value[value] = label

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> EvalSample:
        image, mask = self.read(index)
        labels = torch.from_numpy(self.to_labels(mask, index))
        return EvalSample(to_input(image, self.input_size(image)), labels, index)

    def input_size(self, image) -> Size:
        """(H, W) of the network's input for an image, which has a height and a width."""
        if self.image_size is None:
            return image.height, image.width
        return self.image_size

    def check_headers(self) -> None:
        """DataError where a file is no image, or a mask has not the size of its image.

        Only the headers are read, in seconds for thousands of files; both files of a
        pair are read as a whole where the headers do not settle it.
        """
        self.mask_sizes = []
        first_mode = ""
        for index, mask_path in enumerate(self.masks):
            image = read_header("image", self.images[index])
            mask = read_header("mask", mask_path)
            size = (mask.height, mask.width)
            settled = size == (image.height, image.width)
            if mask.mode not in ONE_CHANNEL and not self.mask_colours:
                # A picture is fine where it is grey. The first one answers for all others.
                settled = settled and mask.mode == first_mode
            if not settled:
                _, whole_mask = self.read(index)
                size = (whole_mask.height, whole_mask.width)
            if not first_mode:
                first_mode = mask.mode
            self.mask_sizes.append(size)

    def largest_mask(self) -> Size:
        """(H, W) that holds every mask of the split."""
        if not self.mask_sizes:
            self.check_headers()
        heights = [height for height, _ in self.mask_sizes]
        widths = [width for _, width in self.mask_sizes]
        return max(heights), max(widths)

    def network_size(self) -> Size:
        """(H, W) at which a network gets to know the things in this split's images.

        That is `image_size` or, where the images keep their own sizes, the median of
        their heights and that of their widths. Random scales are around it, and crops
        are parts of it.
        """
        if self.image_size is not None:
            height, width = self.image_size
            return height, width
        if not self.mask_sizes:
            self.check_headers()
        heights = sorted(height for height, _ in self.mask_sizes)
        widths = sorted(width for _, width in self.mask_sizes)
        middle = len(self.mask_sizes) // 2
        return heights[middle], widths[middle]

    def has_one_size(self) -> bool:
        """Whether all masks of the split have the same size, and so all inputs of the network."""
        if not self.mask_sizes:
            self.check_headers()
        return len(set(self.mask_sizes)) == 1

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Sample `index` at native size: the RGB image and the mask's raw values."""
        if self.decoded is not None:
            sample = self.decoded[index]
            return sample.crop((0, 0, sample.width, sample.height))
        image = read_image(self.images[index])
        mask = read_mask(self.masks[index], self.mask_colours)
        if image.size != mask.size:
            hint = ""
            if image.size == mask.size[::-1]:
                hint = ", and one of them may have an EXIF tag that turns it"
            raise DataError(
                f"the mask {self.masks[index]} is {mask.width}x{mask.height}, but "
                f"{self.images[index]} is {image.width}x{image.height}; a mask has the size of its "
                f"image{hint}"
            )
        return image, mask

    def read_values(self, index: int) -> Image.Image:
        """The raw values of mask `index` alone."""
        if self.decoded is not None:
            return Image.fromarray(np.asarray(self.decoded[index].mask))
        return read_mask(self.masks[index], self.mask_colours)

    def open_for_cropping(self, index: int) -> "ImageAndMask | CachedSample":
        """Sample `index` as something with `height`, `width` and `crop(box)`. With a
        cache, only the part that is cropped is read."""
        if self.decoded is not None:
            return self.decoded[index]
        image, mask = self.read(index)
        return ImageAndMask(image, mask)

    def to_labels(self, mask: Image.Image, index: int) -> np.ndarray:
        """uint8 labels [H, W] of (a part of) the mask `index`; DataError at unknown raw values."""
        self.check_values(np.array(mask.histogram()), index)
        # `point` looks up in C, in a third of the time of indexing `label_of_value` with the mask.
        return np.array(mask.point(self.label_of_value.tolist()))

    def check_values(self, counts: np.ndarray, index: int) -> None:
        """DataError where the mask `index` has pixels of unknown values; `counts` is of each."""
        unknown = np.flatnonzero((counts > 0) & ~self.allowed_values)
        if len(unknown):
            values = ", ".join(str(value) for value in unknown[:8])
            remedy = "is it the right kind of file?"
            if self.class_file is not None:
                known = np.flatnonzero(self.allowed_values)
                remedy = (
                    f"{self.class_file} has {self.values_text(known)}; give each value a line "
                    f"there, as NAME = {unknown[0]} or void = {unknown[0]}"
                )
            raise DataError(
                f"the mask {self.masks[index]} holds {values}, no label of {self.name}; {remedy}"
            )

    def values_text(self, values: Sequence[int]) -> str:
        """Raw values in rising order as text: their colours, where the masks are pictures."""
        if not self.mask_colours:
            return number_ranges(values)
        colours = []
        for value in values:
            red, green, blue = self.mask_colours[value]
            colours.append(f"{red} {green} {blue}")
        return ", ".join(colours)

    def remove_classes(self, hold_out: list[str]) -> None:
        """Take classes out of the network: their pixels become 254, the others are renumbered.

        DataError at a class that is not there, or where less than two are left.
        """
        unknown = [name for name in hold_out if name not in self.classes]
        if unknown:
            raise DataError(
                f"--hold-out {' '.join(unknown)}: no such class; choose from "
                f"{', '.join(self.classes)}"
            )
        classes = []
        palette = []
        new_labels = np.arange(256, dtype=np.uint8)
        for label, name in enumerate(self.classes):
            if name in hold_out:
                new_labels[label] = IGNORED
            else:
                new_labels[label] = len(classes)
                classes.append(name)
                palette.append(self.palette[label])
        if len(classes) < 2:
            raise DataError(f"--hold-out leaves {len(classes)} classes; a network needs at least 2")
        self.label_of_value = new_labels[self.label_of_value]
        self.classes = classes
        self.palette = palette
        self.hold_out = list(hold_out)


def number_ranges(numbers: Sequence[int]) -> str:
    """Numbers in rising order as text: 0..3, 255."""
    ranges = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    parts = []
    for first, last in ranges:
        parts.append(str(first) if first == last else f"{first}..{last}")
    return ", ".join(parts)


# How many pixels of masks `count_values` counts, where a split has more: a second's
# work, and a few seconds' where a class was not seen until then.
FEW_PIXELS = 5 * 10**7
MANY_PIXELS = 5 * 10**8


class ValueCounts(NamedTuple):
    """What `count_values` found."""

    pixels: np.ndarray  # int64 [256], of each raw value
    masks: int  # how many were counted


def count_values(dataset: SegmentationDataset) -> ValueCounts:
    """The raw values of all masks of a data set or, where they are many, of a random sample.

    DataError at values that are no label.
    """
    pixels = np.zeros(256, np.int64)
    num_masks = 0
    unseen = set(range(len(dataset.classes)))
    for index in np.random.default_rng(0).permutation(len(dataset)).tolist():
        limit = MANY_PIXELS if unseen else FEW_PIXELS
        if pixels.sum() > limit:
            break
        counts = np.array(dataset.read_values(index).histogram())
        dataset.check_values(counts, index)
        pixels += counts
        num_masks += 1
        unseen -= set(dataset.label_of_value[pixels > 0].tolist())
    return ValueCounts(pixels, num_masks)


def split_warnings(dataset: SegmentationDataset, split: str, training: bool) -> list[str]:
    """What is odd about a split, in a line each: `label_warnings`, and files that are not read."""
    warnings = label_warnings(dataset, split, training)
    if training:
        warnings += dataset.doubts
    if dataset.left_out:
        warnings.append(
            f"{len(dataset.left_out)} files of the split {split} are left out, the first is "
            f"{dataset.left_out[0]}; images end in .{', .'.join(SUFFIXES)}: convert or move them"
        )
    return warnings


def label_warnings(dataset: SegmentationDataset, split: str, training: bool) -> list[str]:
    """What is odd about the labels of a split, in a line each: a single class or none
    and, for `training`, classes without a pixel. Of drawn scenes nothing is."""
    if not dataset.masks:
        return []
    counts = count_values(dataset)
    values = np.flatnonzero(counts.pixels)
    labels = set(dataset.label_of_value[values].tolist())
    seen = [name for label, name in enumerate(dataset.classes) if label in labels]
    missing = [name for name in dataset.classes if name not in seen]

    masks = f"the {counts.masks} masks"
    if counts.masks < len(dataset):
        masks = f"a sample of {counts.masks} of the {len(dataset)} masks"
    where = f"in {masks} of the split {split}, which hold {dataset.values_text(values)}"
    is_void = dataset.allowed_values & (dataset.label_of_value == VOID)
    void = "nothing"
    if is_void.any():
        void = dataset.values_text(np.flatnonzero(is_void))
    reasons = f"usual reasons: masks that are numbered otherwise ({void} is void here)"
    if dataset.class_file is not None:
        reasons += f", which {dataset.class_file} can say with NAME = VALUE"

    if not seen:
        return [f"no pixel has a class {where}; {reasons}"]
    if len(seen) == 1:
        return [
            f"every labelled pixel is {seen[0]!r} {where}; the mIoU of a single class says "
            f"nothing; {reasons}"
        ]
    if missing and training:
        names = ", ".join(repr(name) for name in missing)
        return [
            f"no pixel is {names} {where}; nothing can be learned about it; {reasons}, or a class "
            "that these images do not show"
        ]
    return []


def open_dataset(
    name: str,
    data: str | Path | None,
    split: str,
    image_size: Size | None = None,
    hold_out: Sequence[str] = (),
    val_share: float | None = None,
) -> SegmentationDataset:
    """One split of the data set `name` in the folder `data`, without the classes in `hold_out`.

    `name` is one of `DATASETS`; "synthetic" has no folder. `image_size` (H, W) is that
    of the network's input. `val_share`, in (0, 1), is the part of the images that is
    the split "val" of a folder without splits; its split "all" needs none. DataError
    where the files do not fit.
    """
    if data is not None and not Path(data).is_dir():
        raise DataError(f"no such folder: {data}; --data names the folder of the data set")
    if name == "synthetic":
        if data is not None:
            raise DataError(
                f"--data {data}: the synthetic scenes are drawn; leave it out, or name the "
                "--dataset that the folder holds"
            )
        if split == "ood":
            raise DataError("the split 'ood' has masks, no labels; score it with --ood synthetic")
        dataset = SyntheticScenes(split, image_size)
    elif data is None:
        layout = LAYOUTS[name].describe()
        raise DataError(f"--dataset {name} needs --data DIR, a folder with {layout}")
    else:
        dataset = open_files(name, Path(data), split, image_size, val_share)
    if len(dataset) == 0:
        raise DataError(f"no images in the split {split!r} of {data}; check the layout")
    if hold_out:
        dataset.remove_classes(list(hold_out))
    return dataset


def open_files(
    name: str, data: Path, split: str, image_size: Size | None, val_share: float | None
) -> SegmentationDataset:
    """One split of a data set of `LAYOUTS`; each image has to have its mask."""
    layout = LAYOUTS[name]
    flat = is_flat(name, data, split)
    if flat:
        layout = FLAT_FOLDER
        if split not in ("train", "val", "all") or (val_share is None and split != "all"):
            raise DataError(
                f"{data / 'images'} has no folder {split}; --split all takes all its images, "
                "--split train and val what a training with --val SHARE made of them"
            )
    files = find_files(layout, data, split)
    check_pairs(files)
    notes = []
    doubts = []
    digits = ""
    if files.mask_ending:
        example = f"{files.masks[0].name} is that of {files.images[0].name}"
        notes.append(f"the masks are called ...{files.mask_ending}: {example}")
    left_over = masks_left_over(files) if name == "folder" else []
    if left_over:
        doubts.append(
            f"masks without an image: {len(left_over)}, as {left_over[0]}; they are left out"
        )
    if flat and files.images and split != "all":
        below = [path.relative_to(files.folder) for path in files.images]
        division = divide_images(below, val_share)
        digits = division.digits(below)
        files = take_split(files, division, split)
        notes.append(division.note)
        if division.warning:
            doubts.append(division.warning)
    classes = layout.classes
    values = layout.values
    class_list = None
    if classes is None:
        class_list = read_classes(data / "classes.txt")
        classes = class_list.classes
        values = class_list.values
        doubts += doubts_about_names(class_list, data / "classes.txt")
    if "**" in layout.glob:  # folders as the user likes them: each may have an image 1.png
        names = names_below(files.folder, files.images)
    else:
        names = short_names(files.images)
    dataset = SegmentationDataset(
        name, classes, values, files.images, files.masks, names, image_size
    )
    if class_list is not None:
        dataset.class_file = data / "classes.txt"
        dataset.mask_colours = class_list.colours
    dataset.left_out = files.left_out
    dataset.notes = notes
    dataset.doubts = doubts
    dataset.division = digits
    dataset.check_headers()
    return dataset


# -------------------------------------------------------------------------------------- classes.txt

CLASS_FILE_HELP = (
    "classes.txt of --dataset folder names a class a line, numbered from 0, where 255 is void; or "
    "with the value that the masks have for it (road = 7, crack = 255, void = 11) or its colour "
    "(sky = 128 128 128), for every value that occurs; a name may stand in several lines"
)


class ClassList(NamedTuple):
    """What classes.txt says."""

    classes: dict[str, tuple]  # name: RGB
    values: dict[int, int] | None  # as in `Layout`
    colours: list[tuple]  # RGB of each raw value, where the masks are colour pictures; else empty


def read_classes(path: Path) -> ClassList:
    """The classes of the layout `folder`, with the colours of Pascal VOC or those of the masks.

    The file has a class in each line, in the order of the labels. Names alone mean that
    the masks hold the labels: 0 for the first line, and 255 for void. Or each line says
    what the masks hold:

        road = 7                a value, 0 to 255
        crack = 255             without this line or a line of void, 255 is refused like any value
        sky = 128 128 128       or red, green and blue: then the masks are colour pictures, and
                                one number is a shade of grey, 7 for 7 7 7
        void = 11               not labelled, which is no class

    Several lines may have the same name: their values become one class. DataError at
    lines that cannot be understood or contradict each other.
    """
    lines = read_lines(
        path, "the classes, a name a line, or NAME = VALUE, or NAME = R G B for masks in colours"
    )
    for line in lines:
        if line.startswith("#"):
            raise DataError(f"{path} has the line {line!r}; every line is a class: remove it")
    if any("=" in line for line in lines):
        return read_class_values(path, lines)
    for line in lines:
        if COLOUR_WITHOUT_SIGN.search(line):
            raise DataError(f"{path} has the line {line!r}; a colour is given as NAME = R G B")
    check_class_names(path, lines)
    return ClassList(with_palette(lines), None, [])


def check_class_names(path: Path, names: list[str]) -> None:
    """DataError where these cannot be the classes of a network; `path` is the file with them."""
    if not 2 <= len(names) <= 254 or len(set(names)) < len(names):
        raise DataError(f"{path} names {len(names)} classes; it needs 2 to 254 different ones")


# As "sky 128 128 128" or "sky (128, 128, 128)", which would be names of classes.
COLOUR_WITHOUT_SIGN = re.compile(r"\d+[\s,]+\d+[\s,]+\d+\W*$")
CLASS_LINE = re.compile(r"(?P<name>.+?)\s*=\s*(?P<value>\d+|\d+[\s,]+\d+[\s,]+\d+)")


def read_class_values(path: Path, lines: list[str]) -> ClassList:
    """The classes of a file `path` with lines NAME = VALUE or NAME = R G B."""
    entries = [read_class_line(path, line) for line in lines]
    in_colour = any(len(numbers) == 3 for _, numbers in entries)

    name_of_value: dict[tuple, str] = {}  # in the order of the lines
    for name, numbers in entries:
        if in_colour and len(numbers) == 1:
            numbers = 3 * numbers  # a shade of grey
        if numbers in name_of_value:
            text = " ".join(str(number) for number in numbers)
            raise DataError(
                f"{path} gives {text} to {name_of_value[numbers]!r} and to {name!r}; remove one"
            )
        name_of_value[numbers] = name
    if in_colour and len(name_of_value) > NO_COLOUR:
        raise DataError(
            f"{path} has {len(name_of_value)} colours; at most {NO_COLOUR} are possible"
        )

    colour_of_name = {}
    for numbers, name in name_of_value.items():
        if not means_void(name):
            colour_of_name.setdefault(name, numbers)  # the first of its colours
    names = list(colour_of_name)
    check_class_names(path, names)
    values = {}
    for line_number, (numbers, name) in enumerate(name_of_value.items()):
        value = line_number if in_colour else numbers[0]
        values[value] = VOID if means_void(name) else names.index(name)
    if in_colour:
        return ClassList(colour_of_name, values, list(name_of_value))
    return ClassList(with_palette(names), values, [])


def with_palette(names: list[str]) -> dict[str, tuple]:
    """The names with the colours of Pascal VOC but black, the first one."""
    palette = bit_palette(len(names) + 1)[1:]
    return dict(zip(names, palette, strict=True))


def read_class_line(path: Path, line: str) -> tuple[str, tuple[int, ...]]:
    """The name in a line of classes.txt, and its value or its red, green and blue."""
    match = CLASS_LINE.fullmatch(line)
    numbers: tuple[int, ...] = ()
    if match is not None:
        numbers = tuple(int(digits) for digits in re.findall(r"\d+", match["value"]))
    if not numbers or max(numbers) > 255:
        raise DataError(
            f"{path} has the line {line!r}; each has to be NAME = VALUE or NAME = R G B, with "
            "numbers from 0 to 255"
        )
    return match["name"], numbers


def means_void(name: str) -> bool:
    """Whether a name in classes.txt says that what has this value is not labelled."""
    return name.lower() == "void"


# Names that others give to void. They may as well be a class, so they are only asked about. `void`
# itself is among them for a file of names alone, in which it is a class.
NAMES_LIKE_VOID = {
    "void",
    "unlabelled",
    "unlabeled",
    "undefined",
    "unknown",
    "ignore",
    "ignored",
    "don't care",
    "none",
}


def doubts_about_names(class_list: ClassList, path: Path) -> list[str]:
    """A sentence for each class of a classes.txt that may be meant as void."""
    remedy = "call it void there"
    if class_list.values is None:  # names alone, and their lines' numbers
        remedy = "give every line its value, NAME = VALUE, and call this one void"
    doubts = []
    for name in class_list.classes:
        if name.lower() in NAMES_LIKE_VOID:
            doubts.append(
                f"{name!r} in {path} is a class like any other; if nobody labelled its pixels, "
                f"{remedy}"
            )
    return doubts


# ------------------------------------------------------------------------------------- decode cache
#
# All samples of a data set lie in one file, one after the other, so that one memory map
# serves them all. Measured: a file for each sample, mapped anew at each use, loads 5 to
# 15 % slower.


class CachedSample(NamedTuple):
    """A decoded sample in a memory map, of which only what is cropped is read."""

    image: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray  # uint8 [H, W], raw values

    @property
    def height(self) -> int:
        return self.mask.shape[0]

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def crop(self, box: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
        """The image and the mask inside (left, top, right, bottom)."""
        left, top, right, bottom = box
        image = np.ascontiguousarray(self.image[top:bottom, left:right])
        mask = np.ascontiguousarray(self.mask[top:bottom, left:right])
        return Image.fromarray(image), Image.fromarray(mask)


class DecodedFiles:
    """The samples of a data set in one file of raw bytes, which is mapped when it is first used.

    `path` is that file. Beside it lies the index, int [N, 3]: height, width and first
    byte of each sample. A sample is its image, uint8 [H, W, 3], and then its mask,
    uint8 [H, W].
    """

    def __init__(self, path: Path):
        self.path = path
        self.index = np.load(path.with_suffix(".npy"))
        self.bytes: np.memmap | None = None

    def __getitem__(self, number: int) -> CachedSample:
        if self.bytes is None:
            self.bytes = np.memmap(self.path, np.uint8, "r")
        height, width, start = self.index[number].tolist()
        mask_start = start + 3 * height * width
        end = start + 4 * height * width
        image = self.bytes[start:mask_start].reshape(height, width, 3)
        mask = self.bytes[mask_start:end].reshape(height, width)
        return CachedSample(image, mask)

    def __getstate__(self) -> dict:
        """What a worker gets: it maps the file anew, for a map would be sent as a copy."""
        return self.__dict__ | {"bytes": None}


def fingerprint(files: Sequence[Path]) -> str:
    """Sixteen digits that change with a path, a size or a time of the files."""
    key = []
    for path in files:
        status = path.stat()
        key.append([str(path), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def cache_decoded(dataset: SegmentationDataset, folder: Path) -> None:
    """Let `dataset` read its samples from a file in `folder`, which is made where it is missing.

    The file's name depends on path, size and time of all source files: after a change a
    new one is made, for masks in colours also after a change of classes.txt. It is
    complete or not there, also if several processes make it at once. DataError for
    drawn scenes, which have no files.
    """
    if not dataset.images:
        raise DataError(f"--cache {folder}: drawn scenes are not read from files; leave it out")
    sources = [*dataset.images, *dataset.masks]
    if dataset.mask_colours:
        sources.append(dataset.class_file)  # whose lines number the colours that are kept
    path = folder / f"{dataset.name}-{fingerprint(sources)}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # a second process waits here, then finds the file
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            # Every process that comes now makes the file for itself, and the last one's stays.
            partial = path.with_suffix(f".{os.getpid()}.tmp")
        if not is_complete(path):
            print(f"decoding {len(dataset)} images of {dataset.name} into {path}", flush=True)
            decode_files(dataset, path, partial)
    dataset.decoded = DecodedFiles(path)


# What a file system answers that has no locks, as some network disks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def is_complete(path: Path) -> bool:
    """Whether `DecodedFiles` can read `path` and its index to their end: a machine that
    lost its power may have kept a part of them."""
    try:
        index = np.load(path.with_suffix(".npy"))
        height, width, start = index[-1].tolist()
        return path.stat().st_size == start + 4 * height * width
    except (OSError, ValueError, EOFError, LookupError):
        return False


def decode_files(dataset: SegmentationDataset, path: Path, partial: Path) -> None:
    """Write what `DecodedFiles` reads: the bytes, and last the index that makes them valid.

    `partial` is the file of the bytes until they are complete.
    """
    index = []
    partial_index = Path(f"{partial}.npy")
    try:
        with open(partial, "wb") as file:
            for number in range(len(dataset)):
                image, mask = dataset.read(number)
                index.append((image.height, image.width, file.tell()))
                file.write(image.tobytes())
                file.write(mask.tobytes())
            file.flush()
            os.fsync(file.fileno())
        np.save(partial_index, np.array(index))
        os.replace(partial, path)
        os.replace(partial_index, path.with_suffix(".npy"))
    except BaseException:
        partial.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------- training views

# What a random draw of a stream is for. The numbers keep the draws apart; another
# number gives other batches, and so other weights.
CROP_DRAWS = 0
FLIP_DRAWS = 1
ORDER_DRAWS = 2


MISSING = 255  # in stored targets, whose values are 0..254
NO_TARGET = torch.empty(0, dtype=torch.uint8)


class Sample(NamedTuple):
    """One training sample; collated, every field gets a leading dimension B.

    Other modules see only batches: hence the name `images`.
    """

    images: Tensor  # uint8 [3, H, W]
    labels: Tensor  # uint8 [H, W]: class, VOID or IGNORED
    index: int  # of the image in its data set
    view: int  # which scale and crop of it; the epoch unless views repeat
    flip: bool  # mirrored left to right
    # uint8 [T, H, W], what is stored of a student's targets for the view before its
    # flip. `NO_TARGET` where nothing is, or not all; of a batch, where that is so for
    # one of its samples.
    stored_target: Tensor = NO_TARGET


def collate_samples(samples: list[Sample]) -> Sample:
    """One batch."""
    batch = default_collate([sample._replace(stored_target=0) for sample in samples])
    # Apart from the rest, for loading processes cannot share a tensor without elements.
    target = NO_TARGET
    if all(sample.stored_target.numel() > 0 for sample in samples):
        target = default_collate([sample.stored_target for sample in samples])
    return batch._replace(stored_target=target)


class StoredTargets:
    """A student's targets by view and image, uint8 [K, N, T, H, W] in an .npy file.

    Whoever trains the student writes them, while these are read in its loading
    processes. The file is mapped when it is first used.
    """

    def __init__(self, path: Path):
        self.path = path
        self.targets: np.memmap | None = None

    def read(self, view: int, index: int) -> Tensor:
        """One target, uint8 [T, H, W]; `NO_TARGET` where a part of it is missing."""
        if self.targets is None:
            self.targets = np.load(self.path, mmap_mode="r")
        target = np.array(self.targets[view, index])
        if target.max() == MISSING:
            return NO_TARGET
        return torch.from_numpy(target)

    def __getstate__(self) -> dict:
        """What a worker gets: it maps the file anew, for a map would be sent as a copy."""
        return self.__dict__ | {"targets": None}


class TrainingViews(Dataset):
    """Random scale, crop, flip (and colour jitter) of a data set. Indexing by (epoch,
    index) gives a `Sample`.

    Args:
        dataset: the images and masks.
        crop_size: (H, W) of a view.
        scale: (lowest, highest), around 1; half of the scales are below 1, half above, uniform.
        stream: integers that key all draws, together with epoch and index.
        num_views: K repeats the scale and crop of epoch e in epoch e + K, but not the flip; 0 draws
            a new view every epoch.
        jitter: strength of `colour_jitter`, 0 for none.
        targets_path: the file of `StoredTargets`, which come with the views; None without one.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        crop_size: Size,
        scale: tuple[float, float],
        stream: Sequence[int],
        num_views: int = 0,
        jitter: float = 0.0,
        targets_path: Path | None = None,
    ):
        self.dataset = dataset
        self.crop_size = crop_size
        self.scale = scale
        self.stream = stream
        self.num_views = num_views
        self.jitter = jitter
        self.stored_targets = None if targets_path is None else StoredTargets(targets_path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        view = epoch % self.num_views if self.num_views else epoch
        pixels, labels = self.read_view(view, index)
        flip = self.draw_flip(epoch, index)
        if flip:
            pixels = pixels.flip(-1)
            labels = labels.flip(-1)
        target = NO_TARGET
        if self.stored_targets is not None:
            target = self.stored_targets.read(view, index)
        return Sample(pixels, labels, index, view, flip, target)

    def draw_flip(self, epoch: int, index: int) -> bool:
        """Whether the image is mirrored in this epoch."""
        rng = np.random.default_rng([*self.stream, FLIP_DRAWS, epoch, index])
        return bool(rng.integers(2))

    def read_view(self, view: int, index: int) -> tuple[Tensor, Tensor]:
        """The images and labels of a `Sample`, not flipped."""
        rng = np.random.default_rng([*self.stream, CROP_DRAWS, view, index])
        lowest, highest = self.scale
        if rng.random() < 0.5:
            scale = rng.uniform(lowest, 1)
        else:
            scale = rng.uniform(1, highest)
        source = self.dataset.open_for_cropping(index)
        image, mask = random_crop(
            source, self.dataset.input_size(source), scale, self.crop_size, rng
        )
        if self.jitter:
            image = colour_jitter(image, self.jitter, rng)
        pixels = to_input(image, None)
        labels = torch.from_numpy(self.dataset.to_labels(mask, index))

        # Where the scaled image is smaller than the crop, it is padded to the right and below.
        rows = self.crop_size[0] - image.height
        columns = self.crop_size[1] - image.width
        if rows or columns:
            pixels = F.pad(pixels, (0, columns, 0, rows))
            labels = F.pad(labels, (0, columns, 0, rows), value=IGNORED)
        return pixels, labels


def random_crop(
    source: ImageAndMask | CachedSample,
    image_size: Size,
    scale: float,
    crop_size: Size,
    rng: np.random.Generator,
) -> tuple[Image.Image, Image.Image]:
    """Image and mask, resized to `image_size` times `scale` and cropped to `crop_size`.

    Where the resized image is smaller than `crop_size`, so is the result. Only what
    survives the crop is read and resized.
    """
    scaled_height = max(1, round(image_size[0] * scale))
    scaled_width = max(1, round(image_size[1] * scale))
    height = min(scaled_height, crop_size[0])
    width = min(scaled_width, crop_size[1])
    top = int(rng.integers(scaled_height - height + 1))
    left = int(rng.integers(scaled_width - width + 1))

    # The crop in pixels of the source, with fractions.
    rows = source.height / scaled_height  # of the source in one row of the result
    columns = source.width / scaled_width
    box_left = left * columns
    box_top = top * rows
    box_right = min((left + width) * columns, source.width)
    box_bottom = min((top + height) * rows, source.height)

    # The whole pixels that the filter of the resizing sees around it.
    margin = math.ceil(max(1, columns, rows)) + 1
    region_left = max(0, math.floor(box_left) - margin)
    region_top = max(0, math.floor(box_top) - margin)
    region_right = min(source.width, math.ceil(box_right) + margin)
    region_bottom = min(source.height, math.ceil(box_bottom) + margin)
    image, mask = source.crop((region_left, region_top, region_right, region_bottom))

    box = (
        box_left - region_left,
        box_top - region_top,
        box_right - region_left,
        box_bottom - region_top,
    )
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    mask = mask.resize((width, height), Image.Resampling.NEAREST, box=box)
    return image, mask


def colour_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation in random order, each times 1 +- `strength`."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(3):
        factor = rng.uniform(1 - strength, 1 + strength)
        image = enhancers[number](image).enhance(factor)
    return image


# ------------------------------------------------------------------------------------------ loaders


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order that is a function of (stream, epoch).

    Process `rank` of `world` gets every `world`-th image of each batch. `epoch` and
    `start` (the first batch) are set before each pass. A last batch of less than two
    images per process is dropped, for batch norm needs two. A data set that is smaller
    than a batch becomes one batch; DataError where even that is too small.
    """

    def __init__(
        self, length: int, batch_size: int, stream: Sequence[int], rank: int = 0, world: int = 1
    ):
        self.length = length
        self.batch_size = min(batch_size, length)
        self.stream = stream
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0
        if self.batch_size < 2 * world:
            raise DataError(
                f"a batch of {self.batch_size} of the {length} training images is too small for "
                f"{world} processes; batch norm needs at least 2 each"
            )

    def __len__(self) -> int:
        full_batches, remainder = divmod(self.length, self.batch_size)
        if remainder >= 2 * self.world:
            return full_batches + 1
        return full_batches

    def is_full(self, number: int) -> bool:
        """Whether batch `number` of an epoch has `batch_size` images; the last may have fewer."""
        return (number + 1) * self.batch_size <= self.length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([*self.stream, ORDER_DRAWS, self.epoch])
        order = rng.permutation(self.length)
        for number in range(self.start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.world]]


def training_loader(
    views: TrainingViews,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Batches of `Sample`; set `loader.batch_sampler.epoch` before each pass.

    `batch_size` is that of all `world` processes together. `workers` is the number of
    processes that load, 0 to load in this one.
    """
    batches = EpochBatches(len(views), batch_size, views.stream, rank, world)
    settings = worker_settings(workers, device)
    return DataLoader(views, batch_sampler=batches, collate_fn=collate_samples, **settings)


# Of what passes through a network at once without gradients. Small images keep two CPU cores busy
# only several at a time: of 80x120, sixteen take 2.7 times as long as four with a ResNet-18.
PIXELS_PER_PASS = 160_000
MOST_PER_PASS = 16  # images


def images_per_pass(batch_size: int, pixels: int) -> int:
    """`batch_size` or, if that is more, as many images of `pixels` each as fit into
    `PIXELS_PER_PASS`, but at most `MOST_PER_PASS`."""
    return max(batch_size, min(MOST_PER_PASS, PIXELS_PER_PASS // pixels))


def evaluation_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    fill_passes: bool = False,
) -> DataLoader:
    """Lists of `EvalSample` batches of one size each, in order: [B, 3, h, w], [B, H, W] and [B].

    Process `rank` of `world` gets every `world`-th image, without padding. fill_passes: on a CPU,
    small images come in batches of more than `batch_size`, see `images_per_pass`.
    """
    if world > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world))
    settings = worker_settings(workers, device)
    loaded_together = batch_size
    if fill_passes and device.type == "cpu":
        # what `collate_runs` divides again: large images into whole batches
        loaded_together = batch_size * max(1, MOST_PER_PASS // batch_size)
    collate = functools.partial(collate_runs, batch_size=batch_size)
    return DataLoader(dataset, batch_size=loaded_together, collate_fn=collate, **settings)


def collate_runs(samples: list[EvalSample], batch_size: int) -> list[EvalSample]:
    """Batches of neighbours whose images and labels have equal shapes: up to `batch_size` or, of
    small ones, as many of the samples as pass through a network at once."""
    batches = []
    for (image_shape, labels_shape), run in groupby(samples, key=shapes):
        neighbours = list(run)
        pixels = max(image_shape[-2:].numel(), labels_shape.numel())
        count = images_per_pass(batch_size, pixels)
        for start in range(0, len(neighbours), count):
            batches.append(default_collate(neighbours[start : start + count]))
    return batches


def shapes(sample: EvalSample) -> tuple[torch.Size, torch.Size]:
    """The shapes of image and labels: inputs of one size may have labels of several sizes."""
    return sample.image.shape, sample.labels.shape


def worker_settings(workers: int, device: torch.device) -> dict:
    """The arguments of a DataLoader that concern its processes."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        # Without a generator it draws from the global one, which dropout uses.
        "generator": torch.Generator(),
        "worker_init_fn": leave_signals_to_parent,
    }


def leave_signals_to_parent(worker_id: int) -> None:
    """Ignore SIGINT and SIGHUP in a worker: one that dies of Ctrl-C, or with its
    terminal, breaks the loop that its parent is about to end in order. But SIGTERM is
    how the parent ends it: were that ignored, the parent would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------- anomalies

ANY_FOLDERS = r"(?:.*/)?"
ANY_IMAGE = rf"\.(?:{'|'.join(SUFFIXES)})"  # the suffix of an image
BINARY = {0: 0, 1: 1, VOID: VOID}
# Of Lost and Found: the background, and objects that are no hazard.
NO_HAZARDS = (0, 31, 33, 34, 36, 37, 38, 39)
LOST_AND_FOUND = {1: 0}  # the road
LOST_AND_FOUND |= dict.fromkeys(range(2, 44), 1)  # objects on it
LOST_AND_FOUND |= dict.fromkeys(NO_HAZARDS, VOID)


def path_pattern(expression: str) -> re.Pattern:
    """A pattern of the paths below the folder of a set; upper and lower case are the same."""
    return re.compile(expression, re.IGNORECASE)


class ComponentSizes(NamedTuple):
    """The fewest pixels of a component that counts; smaller ones are left out."""

    predicted: int = 500
    true: int = 100


class AnomalyLayout(NamedTuple):
    """An OOD set as its publisher ships it.

    `images` and `masks` are regular expressions of whole paths below the folder of the
    set. Each has a group `id`, and an image belongs to the mask with the same `id`:
    images/(?P<id>[^/]+).png matches images/7.png with the id 7.

    Where a set has only the differences to photographs of another set, `images` are the
    files of the differences and `photographs` the photographs. The id of a photograph
    is then that of its difference without the number in front: frankfurt_1 for
    0003_frankfurt_1.
    """

    description: str  # of the files, for a message
    images: re.Pattern
    masks: re.Pattern
    values: dict[int, int]  # all that a mask may hold: raw value, 0 normal, 1 anomaly or 255 void
    published: int | None = None  # how many images have a public mask
    smallest: ComponentSizes = ComponentSizes()
    photographs: re.Pattern | None = None


SMALL_OBSTACLES = ComponentSizes(predicted=50, true=10)

OOD_LAYOUTS = {
    "roadanomaly21": AnomalyLayout(
        description="images as images/{id}.jpg and masks as labels_masks/{id}_labels_semantic.png, "
        "in dataset_AnomalyTrack or without that folder",
        images=path_pattern(rf"(?:dataset_AnomalyTrack/)?images/(?P<id>[^/]+){ANY_IMAGE}"),
        masks=path_pattern(
            r"(?:dataset_AnomalyTrack/)?labels_masks/(?P<id>[^/]+)_labels_semantic\.png"
        ),
        values=BINARY,
        published=10,
    ),
    "roadobstacle21": AnomalyLayout(
        description="images as images/{id}.webp and masks as "
        "labels_masks/{id}_labels_semantic.png, in dataset_ObstacleTrack or without that folder",
        images=path_pattern(rf"(?:dataset_ObstacleTrack/)?images/(?P<id>[^/]+){ANY_IMAGE}"),
        masks=path_pattern(
            r"(?:dataset_ObstacleTrack/)?labels_masks/(?P<id>[^/]+)_labels_semantic\.png"
        ),
        values=BINARY,
        published=30,
        smallest=SMALL_OBSTACLES,
    ),
    "roadanomaly": AnomalyLayout(
        description="images as frames/{id}.jpg and masks as frames/{id}.labels/labels_semantic.png",
        images=path_pattern(rf"frames/(?P<id>[^/]+){ANY_IMAGE}"),
        masks=path_pattern(r"frames/(?P<id>[^/]+)\.labels/labels_semantic\.png"),
        values={0: 0, 2: 1},
        published=60,
    ),
    "fishyscapes-laf": AnomalyLayout(
        description="images as {id}_leftImg8bit.png and masks as 0000_{id}_labels.png, in any "
        "folders",
        images=path_pattern(rf"{ANY_FOLDERS}(?P<id>[^/]+)_leftImg8bit\.png"),
        masks=path_pattern(rf"{ANY_FOLDERS}\d\d\d\d_(?P<id>[^/]+)_labels\.png"),
        values=BINARY,
        published=100,
    ),
    "fishyscapes-static": AnomalyLayout(
        description="images as 0000_{id}_rgb.npz, masks as 0000_{id}_labels.png and the "
        "photographs of Cityscapes as {id}_leftImg8bit.png, in any folders",
        images=path_pattern(rf"{ANY_FOLDERS}(?P<id>[^/]+)_rgb\.npz"),
        masks=path_pattern(rf"{ANY_FOLDERS}(?P<id>[^/]+)_labels\.png"),
        values=BINARY,
        published=30,
        photographs=path_pattern(rf"{ANY_FOLDERS}(?P<id>[^/]+)_leftImg8bit\.png"),
    ),
    "lost-and-found": AnomalyLayout(
        description="images as leftImg8bit/test/{id}_leftImg8bit.png and masks as "
        "gtCoarse/test/{id}_gtCoarse_labelIds.png",
        images=path_pattern(r"leftImg8bit/test/(?P<id>.+)_leftImg8bit\.png"),
        masks=path_pattern(r"gtCoarse/test/(?P<id>.+)_gtCoarse_labelIds\.png"),
        values=LOST_AND_FOUND,
        published=1203,
        smallest=SMALL_OBSTACLES,
    ),
    "streethazards": AnomalyLayout(
        description="images as test/images/test/{id}.png and masks as "
        "test/annotations/test/{id}.png",
        images=path_pattern(r"test/images/test/(?P<id>.+)\.png"),
        masks=path_pattern(r"test/annotations/test/(?P<id>.+)\.png"),
        values=dict.fromkeys(range(1, 14), 0) | {14: 1},
        published=1500,
    ),
    "folder": AnomalyLayout(
        description="images as original/{id}.jpg or images/{id}.jpg and masks as labels/{id}.png "
        "or labels_masks/{id}.png",
        images=path_pattern(rf"(?:original|images)/(?P<id>.+){ANY_IMAGE}"),
        masks=path_pattern(r"(?:labels|labels_masks)/(?P<id>.+)\.png"),
        values=BINARY,
    ),
}


class OODSet(NamedTuple):
    """What `open_ood` returns."""

    name: str
    dataset: Dataset  # of `EvalSample`, the labels 0 normal, 1 anomaly, 255 void; has `names`
    smallest: ComponentSizes
    protocol: dict  # what was read, skipped and taken as void


def open_ood(spec: str, dataset: SegmentationDataset) -> OODSet:
    """The OOD set that `spec` names, at the input size of the evaluation set `dataset`.

    "pasted": unknown objects in its images; "held-out": its held-out classes;
    "synthetic": the split `ood` of the drawn scenes; NAME:PATH with a name of
    `OOD_LAYOUTS`; or a folder. DataError where the files do not fit.
    """
    if spec in ("pasted", "held-out"):
        anomalies = EvaluationAnomalies(dataset, paste=spec == "pasted")
        protocol = {"source": "the evaluation split", "void": "its void"}
        return OODSet(spec, anomalies, ComponentSizes(), protocol)
    if spec == "synthetic":
        scenes = SyntheticScenes("ood", dataset.image_size)
        protocol = {"source": "drawn", "void": "masks 255"}
        return OODSet(spec, scenes, SMALL_OBSTACLES, protocol)

    if Path(spec).is_dir():
        name = "folder"
        paths = spec
    else:
        name, _, paths = spec.partition(":")
    if name not in OOD_LAYOUTS:
        raise DataError(
            f"--ood {spec}: no such set or folder; choose synthetic, held-out, pasted, a folder, "
            f"or NAME:PATH with NAME one of {', '.join(OOD_LAYOUTS)}"
        )
    folders = [Path(path) for path in paths.split(os.pathsep) if path]
    if paths and Path(paths).is_dir():  # a folder whose name has a colon
        folders = [Path(paths)]
    if not folders:
        raise DataError(f"--ood {spec}: no folder was named; use {name}:PATH")
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"--ood {spec}: no folder {folder}; use {name}:PATH")
    return open_anomalies(spec, name, folders, dataset.image_size)


def open_anomalies(spec: str, name: str, folders: list[Path], image_size: Size | None) -> OODSet:
    """The set `name` of `OOD_LAYOUTS`, whose files lie in one or several folders.

    What lacks its other half is skipped and counted, never scored as all normal.
    """
    layout = OOD_LAYOUTS[name]
    files = list_files(folders)
    images = files_by_id(files, layout.images, "images")
    masks = files_by_id(files, layout.masks, "masks")
    ids = sorted(images.keys() & masks.keys())
    skipped = {
        "images without a mask": len(images) - len(ids),
        "masks without an image": len(masks) - len(ids),
    }
    photographs = {}
    if layout.photographs is not None:
        every_photograph = files_by_id(files, layout.photographs, "photographs")
        for image_id in ids:
            photograph_id = image_id.partition("_")[2]  # without the number in front
            if photograph_id in every_photograph:
                photographs[image_id] = every_photograph[photograph_id]
        skipped["images without their photograph"] = len(ids) - len(photographs)
        ids = list(photographs)
    if not ids:
        raise DataError(f"--ood {spec}: no image with a mask; needs {layout.description}")

    image_files = [images[image_id] for image_id in ids]
    mask_files = [masks[image_id] for image_id in ids]
    names = short_names(image_files)
    title = folders[0].resolve().name if name == "folder" else name
    differences = []
    if photographs:
        differences = image_files
        image_files = list(photographs.values())
    anomalies = AnomalyImages(
        title, layout.values, image_files, mask_files, differences, names, image_size
    )

    anomalies.check_headers()

    void = [str(value) for value, label in layout.values.items() if label == VOID]
    protocol = {
        "source": " ".join(str(folder) for folder in folders),
        "void": f"masks {', '.join(void)}" if void else "none",
        "skipped": {reason: count for reason, count in skipped.items() if count},
    }
    if layout.published is not None:
        protocol["published"] = layout.published
    return OODSet(title, anomalies, layout.smallest, protocol)


def list_files(folders: list[Path]) -> list[tuple[Path, str]]:
    """The files that `walk_files` finds in the folders, each with its path below the folder."""
    files = []
    for folder in folders:
        for path in walk_files(folder):
            files.append((path, path.relative_to(folder).as_posix()))
    return files


def files_by_id(files: list[tuple[Path, str]], pattern: re.Pattern, kind: str) -> dict[str, Path]:
    """The files of `list_files` whose paths match the pattern, by its group `id`.

    DataError where two share one; `kind` is what the message calls these files.
    """
    path_of_id = {}
    for path, below in files:
        # Image and mask may write an accent in two ways, see `spelling`.
        match = pattern.fullmatch(unicodedata.normalize("NFC", below))
        if match is None:
            continue
        image_id = match["id"]
        other = path_of_id.setdefault(image_id, path)
        if other != path:
            raise DataError(
                f"{other} and {path} are both the file of {image_id} among the {kind}; keep one of "
                "them"
            )
    return path_of_id


class AnomalyImages(SegmentationDataset):
    """Images of any size with masks: 1 anomaly, 0 none, 255 void.

    The network's input has the height of `image_size` and keeps an image's proportions.
    `values` has the label of each raw value that a mask may hold. `differences` is
    empty, or has a file for each image: then `images` are photographs, to which the
    differences are added.
    """

    def __init__(
        self,
        name: str,
        values: dict[int, int],
        images: Sequence[Path],
        masks: Sequence[Path],
        differences: Sequence[Path],
        names: list[str],
        image_size: Size | None,
    ):
        super().__init__(name, {}, values, images, masks, names, image_size)
        self.differences = differences

    def input_size(self, image) -> Size:
        return proportional_size(image, self.image_size)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, mask = super().read(index)
        if self.differences:
            image = add_difference(image, self.differences[index])
        return image, mask


class UnlabelledImages(SegmentationDataset):
    """Images of any size without masks: every pixel is `VOID`.

    The network's input has the height of `image_size` and keeps an image's proportions.
    """

    def __init__(self, name: str, images: Sequence[Path], image_size: Size | None):
        super().__init__(
            name,
            classes={},
            values={VOID: VOID},
            images=images,
            masks=[],
            names=[str(path) for path in images],  # no file is called after these images
            image_size=image_size,
        )

    def input_size(self, image) -> Size:
        return proportional_size(image, self.image_size)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        image = read_image(self.images[index])
        return image, Image.new("L", image.size, VOID)


def open_images(flag: str, folder: Path, image_size: Size | None) -> UnlabelledImages:
    """The images of the folder that `flag` names, and of its subfolders."""
    files = walk_files(folder) if folder.is_dir() else []
    images = [path for path in sorted(files) if is_image(path)]
    if not images:
        raise DataError(f"{flag} {folder}: no image is there; name a folder of images")
    for path in images:
        read_header("image", path)  # a file that is none is refused now, not an hour later
    return UnlabelledImages(flag.removeprefix("--"), images, image_size)


def add_difference(photograph: Image.Image, path: Path) -> Image.Image:
    """The photograph plus the signed array `rgb` [H, W, 3] of an npz file."""
    try:
        with np.load(path) as file:
            difference = file["rgb"]
        if difference.shape != (photograph.height, photograph.width, 3):
            size = (photograph.height, photograph.width)
            raise ValueError(f"its shape is {difference.shape}, the photo's {size}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the overlay {path} ({error}); restore it") from error
    pixels = np.asarray(photograph).astype(np.int32) + difference
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


PASTED_STREAM = 3  # of the draws of pasted objects, the same for every seed


class EvaluationAnomalies(Dataset):
    """The evaluation set with masks of anomalies: 0 normal, 1 anomaly, 255 void.

    The anomalies are its held-out classes or, with `paste`, unknown objects that are
    pasted into its images, the same for an index; what is held out is void then.
    """

    def __init__(self, dataset: SegmentationDataset, paste: bool):
        self.dataset = dataset
        self.names = dataset.names
        self.paste = paste

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EvalSample:
        image, mask = self.dataset.read(index)
        labels = self.dataset.to_labels(mask, index)
        anomaly = np.where(labels < IGNORED, 0, VOID).astype(np.uint8)
        if self.paste:
            rng = np.random.default_rng([PASTED_STREAM, index])
            pasted, objects = paste_unknowns(np.array(image), rng)
            image = Image.fromarray(pasted)
            anomaly[objects == 1] = 1
        else:
            anomaly[labels == IGNORED] = 1
        pixels = to_input(image, self.dataset.image_size)
        return EvalSample(pixels, torch.from_numpy(anomaly), index)


# ------------------------------------------------------------------------------------- drawn scenes
#
# Street scenes that are drawn on the spot, so that everything runs with nothing
# downloaded, and the unknown objects that are pasted into images. Nothing above needs
# to know how they are drawn.

SYNTHETIC_SPLITS = {"train": 200, "val": 48, "ood": 48}  # images of each
SYNTHETIC_SIZE = (80, 120)  # height, width


class SyntheticScenes(SegmentationDataset):
    """Drawn street scenes, the same for the same split and index; the masks of the
    split "ood" tell unknown objects. DataError at a split that is not in
    `SYNTHETIC_SPLITS`."""

    def __init__(self, split: str, image_size: Size | None = None):
        if split not in SYNTHETIC_SPLITS:
            raise DataError(f"the synthetic data set has no split {split!r}; choose train or val")
        names = [f"{split}_{index:04d}" for index in range(SYNTHETIC_SPLITS[split])]
        super().__init__("synthetic", CAMVID_CLASSES, None, [], [], names, image_size)
        self.mask_sizes = [SYNTHETIC_SIZE] * len(names)
        self.split = split
        self.drawn = {}  # what was drawn once is kept

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a loop over the data set
        if index not in self.drawn:
            split_number = list(SYNTHETIC_SPLITS).index(self.split)
            rng = np.random.default_rng([split_number, index])
            if self.split == "ood":
                image, labels = draw_ood_scene(rng, SYNTHETIC_SIZE)
            else:
                image, labels = draw_scene(rng, SYNTHETIC_SIZE)
            self.drawn[index] = (Image.fromarray(image), Image.fromarray(labels))
        return self.drawn[index]


SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)

# Contrast of the grain of each class's surface.
ROUGHNESS = (0.01, 0.05, 0.03, 0.06, 0.05, 0.16, 0.02, 0.05, 0.02, 0.04, 0.04)

# The colours of each material. The last one of most looks like another material's: nothing is sure.
TONES = {
    "wall": "b05c46 cea068 debe96 be7854 cc8e7a 807e80",
    "road": "4e5058 464850 585a62 7a7674",
    "slab": "bab4ac aeaaa6 c4baac 807e80",
    "leaf": "3e7c2c 4e8834 346c2a 608a30 3a4828",
    "board": "dcd8cc ccd4d8 e4e0d0 8e5e32",
    "metal": "262a2e 2e3234 202228 686a6c",
    "coat": "2c54b0 b22228 246eaa d6d8de 42703e",
    "shirt": "a03c98 c85cb0 8640b0 dcb0dc 3c5aa0",
    "vest": "f6d628 fa961e ece83c b0b050",
    "face": "d61e28 ce2224 1c4ac4 de282c f0c428",
    "skin": "e0b496 b07e60 785440",
    "jeans": "3c4468 344c60",
    "glass": "283040 404c60",
    "white": "f0f0f0",
    "black": "1a1a1c",
    "grey": "84868a",
    "lamp": "e82a1e",
    "hair": "604832",
}


class Weather(NamedTuple):
    """The colours of the sky, and what the light does to red, green and blue."""

    zenith: tuple[int, int, int]
    skyline: tuple[int, int, int]  # also of the haze
    light: tuple[float, float, float]


WEATHERS = (
    Weather(zenith=(84, 146, 222), skyline=(206, 226, 240), light=(1.05, 1.0, 0.95)),  # sunny
    Weather(zenith=(176, 182, 190), skyline=(218, 220, 222), light=(0.9, 0.92, 0.95)),  # overcast
    Weather(zenith=(120, 128, 184), skyline=(250, 196, 150), light=(0.96, 0.82, 0.74)),  # evening
)
WEATHER_WEIGHTS = (5, 4, 2)

# What stands in the street and faces the camera, as parts from back to front: class
# (None keeps the one that is there), material, and x, y, x, y, ... in centimetres. Two
# points are the corners of an ellipse.
SHADOW = (None, "black", -45, -7, 45, 7)
POST = (POLE, "metal", -24, 0, -24, 230, 24, 230, 24, 0)
LAMP_POST = [SHADOW, (POLE, "metal", -24, 0, -24, 600, 24, 600, 24, 0)]
SIGN_POST = [
    SHADOW,
    POST,
    (SIGN, "face", -54, 176, 54, 284),
    (None, "white", -38, 221, -38, 241, 38, 241, 38, 221),
]
WARNING = [
    SHADOW,
    POST,
    (SIGN, "face", -64, 190, 0, 300, 64, 190),
    (None, "white", -30, 210, 0, 262, 30, 210),
]
MOTOR = [
    (CAR, "black", -85, 0, -85, 40, 85, 40, 85, 0),
    (CAR, "coat", -88, 25, -88, 95, -68, 150, 68, 150, 88, 95, 88, 25),
    (None, "glass", -74, 98, -60, 142, 60, 142, 74, 98),
    (None, "lamp", -84, 64, -58, 88),
    (None, "lamp", 58, 64, 84, 88),
    (None, "white", -24, 45, -24, 60, 24, 60, 24, 45),
]
WALKER = [
    SHADOW,
    (PEDESTRIAN, "jeans", -27, 92, 27, 92, 36, 0, 14, 0, 0, 60, -6, 0, -28, 0),
    (PEDESTRIAN, "shirt", -24, 152, -50, 85, -36, 80, 36, 80, 50, 85, 24, 152),
    (PEDESTRIAN, "hair", -18, 152, 18, 190),
    (PEDESTRIAN, "skin", -13, 148, 17, 182),
]
RIDER = [
    (BICYCLIST, "black", -94, 0, -14, 78),
    (BICYCLIST, "black", 14, 0, 94, 78),
    (None, "grey", -80, 13, -28, 65),
    (None, "grey", 28, 13, 80, 65),
    (BICYCLIST, "face", -60, 34, -22, 90, 38, 90, 60, 34, 46, 34, 24, 76, -14, 76, -44, 34),
    (BICYCLIST, "jeans", -32, 100, 16, 84, -2, 20, 16, 20, 36, 92, -10, 116),
    (BICYCLIST, "vest", -36, 95, -10, 154, 30, 150, 58, 110, 48, 102, 24, 122, 8, 95),
    (BICYCLIST, "skin", 4, 148, 38, 184),
    (BICYCLIST, "vest", -2, 166, 38, 192),
]
NOTHING = []

EYE_HEIGHT = 1.4  # metres


@dataclass
class Scene:
    """Camera and weather of one street, and the two pictures that are painted together.

    Points are (x, y, z) in metres: x to the right of the camera, y above the ground, z
    ahead of it. Each call paints over what is there; with the label None it leaves the
    labels as they are.
    """

    image: ImageDraw.ImageDraw
    labels: ImageDraw.ImageDraw
    focal_length: float  # pixels
    vanishing_column: float  # pixels
    horizon: float  # row, pixels
    light: tuple[float, float, float]
    fog: tuple[int, int, int]
    haze: float  # how much of the fog a metre brings
    shades: tuple[float, float]  # light on the walls to the left and to the right

    def project(self, point: tuple[float, float, float]) -> tuple[float, float]:
        """The column and the row of a point in the pictures."""
        x, y, z = point
        column = self.vanishing_column + self.focal_length * x / z
        row = self.horizon + self.focal_length * (EYE_HEIGHT - y) / z
        return column, row

    def ink(self, rgb: Sequence[float], distance: float) -> tuple[int, ...]:
        """A colour in the light of the scene, behind the haze of so many metres."""
        clear = math.exp(-self.haze * distance)
        ink = []
        for value, light, fog in zip(rgb, self.light, self.fog, strict=True):
            ink.append(int(value * clear * light + fog * (1 - clear)))
        return tuple(ink)

    def polygon(self, label: int | None, rgb: Sequence[float], corners: list[tuple]) -> None:
        """A polygon, as hazy as its last corner is far."""
        outline = [self.project(corner) for corner in corners]
        self.image.polygon(outline, fill=self.ink(rgb, corners[-1][2]))
        if label is not None:
            self.labels.polygon(outline, fill=label)

    def ellipse(self, label: int | None, rgb: Sequence[float], corners: list[tuple]) -> None:
        """An ellipse that faces the camera, between two opposite corners."""
        first_column, first_row = self.project(corners[0])
        last_column, last_row = self.project(corners[1])
        left, right = sorted((first_column, last_column))
        top, bottom = sorted((first_row, last_row))
        box = [left, top, right, bottom]
        self.image.ellipse(box, fill=self.ink(rgb, corners[1][2]))
        if label is not None:
            self.labels.ellipse(box, fill=label)

    def rectangle(self, label: int | None, rgb: Sequence[float], near: tuple, far: tuple) -> None:
        """A rectangle along the street, upright or lying, between two opposite corners."""
        near_x, near_y, near_z = near
        far_x, far_y, far_z = far
        corners = [near, (far_x, far_y, near_z), far, (near_x, near_y, far_z)]
        self.polygon(label, rgb, corners)


def draw_scene(rng: np.random.Generator, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """A street as (image uint8 [H, W, 3], labels uint8 [H, W], 0..10 and 255) for size (H, W).

    What stands where, and its colours, are draws of Python's generator, seeded by
    `rng`; clouds, grain and void are draws of `rng` itself.
    """
    street_rng = random.Random(int(rng.integers(2**62)))
    height = 2 * size[0]  # drawn at twice the size: halving smooths the edges
    width = 2 * size[1]
    weather = street_rng.choices(WEATHERS, WEATHER_WEIGHTS)[0]
    image = Image.new("RGB", (width, height))
    label_image = Image.new("L", (width, height), SKY)
    scene = Scene(
        image=ImageDraw.Draw(image),
        labels=ImageDraw.Draw(label_image),
        focal_length=0.9 * height,
        vanishing_column=width * street_rng.uniform(0.44, 0.56),
        horizon=height * street_rng.uniform(0.42, 0.48),
        light=weather.light,
        fog=weather.skyline,
        haze=street_rng.uniform(0.01, 0.03),
        shades=street_rng.choice(((0.8, 1), (1, 0.8))),
    )
    sky = draw_sky(rng, weather)
    image.paste(sky.resize((width, int(scene.horizon) + 2), Image.Resampling.BICUBIC))
    draw_street(scene, street_rng)

    labels = np.asarray(label_image)[::2, ::2].copy()
    exposure = street_rng.uniform(0.85, 1.15)
    sensor_noise = np.float32(street_rng.uniform(1.5, 4))
    grain = smooth_noise(rng, size, size[0]) + smooth_noise(rng, size, size[0] // 4)
    surface = 1 + np.float32(ROUGHNESS)[labels] * grain
    pixels = np.asarray(image.reduce(2)) * (surface * exposure)[..., None]
    pixels += sensor_noise * rng.standard_normal(pixels.shape, np.float32)
    mark_void_borders(labels, rng)
    return pixels.clip(0, 255).astype(np.uint8), labels


def smooth_noise(rng: np.random.Generator, size: Size, cells: int) -> np.ndarray:
    """Smooth noise [H, W] of about unit variance, `cells` grains high whatever the size."""
    height, width = size
    grid = rng.standard_normal((cells, cells * width // height), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def draw_sky(rng: np.random.Generator, weather: Weather) -> Image.Image:
    """A small picture of the sky, from the zenith to the skyline, with clouds."""
    clear = np.linspace(weather.zenith, weather.skyline, 12)[:, None]  # [12, 1, 3]
    clouds = np.clip(0.4 * smooth_noise(rng, (12, 18), 6), 0, 1)[..., None]  # [12, 18, 1]
    sky = clear + (244 - clear) * clouds
    return Image.fromarray(sky.clip(0, 255).astype(np.uint8))


def mark_void_borders(labels: np.ndarray, rng: np.random.Generator) -> None:
    """Make stretches of the borders between classes void: nobody can tell who owns them."""
    inner = labels[1:, 1:]
    border = (inner != labels[:-1, 1:]) | (inner != labels[1:, :-1])
    inner[border & (smooth_noise(rng, border.shape, 6) > -0.6)] = VOID


def choose_tone(rng: random.Random, material: str) -> list[float]:
    """A colour of the material, a little off."""
    tone = bytes.fromhex(rng.choice(TONES[material].split()))
    return [value * rng.uniform(0.93, 1.07) for value in tone]


def draw_street(scene: Scene, rng: random.Random) -> None:
    """The ground, both sides of the street, then what stands on it: far to near."""
    half_width = rng.uniform(1.35, 1.65)  # of the road, metres
    side = rng.uniform(2.8, 3.3)  # where the buildings are
    draw_ground(scene, rng, half_width)
    for near, far in ((13, 24), (7.5, 13), (1.3, 7.5)):
        for x in (-side, side):
            # Only the nearest plots may be gardens, and six in ten of them are.
            if near > 2 or rng.random() < 0.4:
                draw_building(scene, rng, x, near, far)
            else:
                draw_garden(scene, rng, x, near, far)

    # Where things stand, in metres: nearest, farthest, inner, outer; and what may stand there.
    lane = (3.0, 4.8, 0.6, 0.8, (MOTOR, MOTOR, RIDER, RIDER, NOTHING))
    pavement = (2.6, 3.8, half_width + 0.4, half_width + 0.9, (WALKER, NOTHING))
    signs = (SIGN_POST, SIGN_POST, WARNING, LAMP_POST, NOTHING, NOTHING)
    kerb = (3.0, 4.6, half_width, half_width + 0.2, signs)
    figures = []
    for sign in (-1, 1):
        for nearest, farthest, inner, outer, kinds in (lane, pavement, kerb):
            z = rng.uniform(nearest, farthest)
            x = sign * rng.uniform(inner, outer)
            figures.append((z, x, rng.choice(kinds)))
    figures.sort(key=lambda figure: -figure[0])
    for z, x, parts in figures:
        draw_figure(scene, rng, parts, x, z)


def draw_ground(scene: Scene, rng: random.Random, half_width: float) -> None:
    """Pavement and road with joints across and a broken line in the middle, piece by piece."""
    slab = choose_tone(rng, "slab")
    road = choose_tone(rng, "road")
    joint = choose_tone(rng, "grey")
    white = (220, 220, 214)
    depths = (99, 30, 15, 9, 6, 4, 3, 2, 1)
    for piece in range(len(depths) - 1):
        far = depths[piece]
        near = depths[piece + 1]
        dash = 0.07 if piece % 2 else 0.0  # without a width it is still a thin line
        for label, rgb, x, end in (
            (PAVEMENT, slab, 60, far),
            (None, joint, 60, near * 1.02),
            (None, joint, half_width + 0.1, far),
            (ROAD, road, half_width, far),
            (None, white, dash, far),
        ):
            scene.rectangle(label, rgb, (-x, 0, near), (x, 0, end))


def draw_building(scene: Scene, rng: random.Random, x: float, near: float, far: float) -> None:
    """A house at the side of the street, from `near` to `far`, with rows of windows."""
    wall = choose_tone(rng, "wall")
    glass = choose_tone(rng, "glass")
    height = rng.uniform(4.5, 8)
    front = [(x, 0, near), (x, height, near), (5 * x, height, near), (5 * x, 0, near)]
    scene.polygon(BUILDING, wall, front)
    shade = scene.shades[1] if x > 0 else scene.shades[0]
    shaded_wall = [shade * value for value in wall]
    scene.rectangle(BUILDING, shaded_wall, (x, 0, near), (x, height, far))

    columns = int((far - near) / (1.4 + near / 8))
    for row in range(int(height / 2.1)):
        for column in range(columns):
            y = 0.7 + 2.1 * row
            z = near + (column + 0.25) * (far - near) / columns
            end = z + 0.5 * (far - near) / columns
            scene.rectangle(None, glass, (x, y, z), (x, y + 1.1, end))


def draw_garden(scene: Scene, rng: random.Random, x: float, near: float, far: float) -> None:
    """Two trees behind a fence at the side of the street."""
    second_tree = far - rng.uniform(2, 3)
    for z in (far, second_tree):
        trunk = x * rng.uniform(1.1, 1.6)
        height = rng.uniform(2.6, 3.2)
        draw_tree(scene, rng, trunk, height, z)

    board = choose_tone(rng, "board")
    height = rng.uniform(1.5, 2.0)
    dark = [0.4 * value for value in board]
    scene.rectangle(FENCE, dark, (x, 0, near), (x, height, far))
    z = near
    while z < far:
        end = z + max(0.18, 0.022 * z * z)  # boards no finer than can be seen
        rgb = [value * rng.uniform(0.9, 1.08) for value in board]
        scene.rectangle(None, rgb, (x, 0, z), (x, height, end))
        z = end + 0.5 * (end - z)


def draw_tree(scene: Scene, rng: random.Random, x: float, height: float, z: float) -> None:
    """A crown of nine round bunches of leaves around (x, height, z), the upper ones lighter."""
    leaf = choose_tone(rng, "leaf")
    for _ in range(9):
        bunch_x = x + rng.gauss(0, 0.5)
        above = rng.gauss(0, 0.4)
        radius = rng.uniform(0.55, 0.85)
        rgb = [value * min(1.6, 1 + 0.4 * above + rng.uniform(-0.2, 0.2)) for value in leaf]
        lower = (bunch_x - radius, height + above - radius, z)
        upper = (bunch_x + radius, height + above + radius, z)
        scene.ellipse(TREE, rgb, [lower, upper])


def draw_figure(scene: Scene, rng: random.Random, parts: list, x: float, z: float) -> None:
    """What stands at (x, 0, z) and faces the camera, in tones and a size of its own."""
    tones = {}
    for _, material, *_ in parts:
        tones[material] = choose_tone(rng, material)
    scale = rng.uniform(0.0092, 0.0108)  # metres per centimetre
    mirrored_scale = scale * rng.choice((-1, 1))
    for label, material, *numbers in parts:
        corners = []
        for part_x, part_y in zip(numbers[::2], numbers[1::2], strict=True):
            corners.append((x + mirrored_scale * part_x, scale * part_y, z))
        if len(corners) == 2:
            scene.ellipse(label, tones[material], corners)
        else:
            scene.polygon(label, tones[material], corners)


INKS = ((10, 10, 20), (245, 245, 245), (20, 60, 230), (110, 20, 220))  # of unknown objects


class Plane(NamedTuple):
    """The coordinates of the pixels of an object, about -1..1; each is float [H, W]."""

    x: np.ndarray  # to the right or to the left
    y: np.ndarray  # downwards
    radius: np.ndarray
    angle: np.ndarray


def draw_unknown(rng: np.random.Generator, height: float) -> tuple[np.ndarray, np.ndarray]:
    """An object `height` pixels high: (rgb float [h, w, 3], alpha float [h, w]), both in [0, 1]."""
    rows = 2 * max(6, int(height))  # drawn at twice the size: halving smooths the edges
    turn = rng.uniform(0, np.pi)
    count = rng.integers(4, 8)
    line = np.linspace(-1.1, 1.1, rows) * rng.choice((-1, 1))
    x, y = np.meshgrid(line, np.linspace(-1, 1, rows))
    plane = Plane(x, y, np.hypot(x, y), np.arctan2(y, x))

    distance = unknown_shape(rng, plane, count)
    alpha = np.clip(0.5 - distance * rows / 4, 0, 1)
    pattern = unknown_pattern(rng, plane, turn)[..., None]
    inks = rng.permutation(INKS) / 255
    shading = unknown_shading(plane)[..., None]
    rgb = np.clip((inks[0] * pattern + inks[1] * (1 - pattern)) * shading, 0, 1)
    return halve(rgb), halve(alpha[..., None])[..., 0]


def unknown_shape(rng: np.random.Generator, plane: Plane, count: int) -> np.ndarray:
    """The signed distance of each pixel from the outline of a random shape, negative inside.

    `count` is how many lobes, rays or legs it has.
    """
    radius = plane.radius
    angle = plane.angle
    kind = rng.integers(4)
    if kind == 0:  # a blob
        lobes = 0.14 * np.sin(2 * angle + count)
        return radius - 0.74 - lobes - 0.1 * np.sin((count - 1) * angle - count)
    if kind == 1:  # a star
        return radius - 0.45 - 0.5 * np.abs(np.cos(count * angle / 2))
    if kind == 2:  # a ring
        return np.abs(radius - 0.64) - 0.34
    return creature(plane, count)


def creature(plane: Plane, legs: int) -> np.ndarray:
    """The signed distance from a trunk, a neck and so many legs: lines of some thickness."""
    trunk = (-0.5, 0, 1, 0, 0.36)  # x, y, length in x, length in y, thickness
    neck = (0.5, 0, 0.25, -0.8, 0.18)
    limbs = [trunk, neck]
    for x in np.linspace(-0.6, 0.6, legs):
        limbs.append((x, 0, 0.2 * x, 0.88, 0.13))

    distance = np.full(plane.x.shape, 9.0)
    for x, y, length_x, length_y, thickness in limbs:
        along = (plane.x - x) * length_x + (plane.y - y) * length_y
        along = np.clip(along / (length_x * length_x + length_y * length_y), 0, 1)
        aside = np.hypot(plane.x - x - along * length_x, plane.y - y - along * length_y)
        distance = np.minimum(distance, aside - thickness)
    return distance


def unknown_pattern(rng: np.random.Generator, plane: Plane, turn: float) -> np.ndarray:
    """How much of the first ink each pixel has, in 0..1: a random pattern, turned by an angle."""
    p = 2.4 * (plane.x * np.cos(turn) + plane.y * np.sin(turn))
    q = 2.4 * (plane.y * np.cos(turn) - plane.x * np.sin(turn))
    kind = rng.integers(5)
    if kind == 0:  # checks
        pattern = (np.floor(p) + np.floor(q)) % 2
    elif kind == 1:  # dots
        pattern = 4 * np.hypot(p % 1 - 0.5, q % 1 - 0.5) - 1
    elif kind == 2:  # stripes of a zebra
        pattern = 0.5 + 3 * np.sin(5 * p + np.sin(2 * q))
    elif kind == 3:  # a spiral
        pattern = 0.5 + 3 * np.sin(3 * plane.angle + 9 * plane.radius)
    else:  # plasma
        pattern = 0.5 + 0.6 * np.sin(2 * p + 2 * np.sin(2 * q) + 3 * plane.radius)
    return pattern.clip(0, 1)


def unknown_shading(plane: Plane) -> np.ndarray:
    """The light on each pixel, as on a ball that is lit from above."""
    ball = np.sqrt(np.clip(1 - plane.radius**2 / 2, 0, 1))
    return 0.7 + 0.3 * ball - 0.15 * plane.y


def halve(values: np.ndarray) -> np.ndarray:
    """[2H, 2W, C] to [H, W, C], the means of 2 x 2 pixels."""
    rows, columns, channels = values.shape
    return values.reshape(rows // 2, 2, columns // 2, 2, channels).mean((1, 3))


def paste_unknowns(
    image: np.ndarray, rng: np.random.Generator, horizon: float = 0.45
) -> tuple[np.ndarray, np.ndarray]:
    """One to three unknown objects in a street image, uint8 [H, W, 3]: (image, mask uint8 [H, W]).

    The mask is 1 on them. `horizon` is a fraction of the height, from the top. Size,
    light and grain follow the image. An image less than 16 pixels high or wide has no
    room for an object.
    """
    height, width = image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    if min(height, width) < 16:
        return image.astype(np.uint8), mask
    pixels = image.astype(np.float32)
    street = pixels[int(horizon * height) :: max(1, height // 64), :: max(1, width // 64)]
    dark, bright = np.percentile(street.reshape(-1, 3), (2, 99), axis=0)
    differences = np.abs(np.diff(pixels[height // 3 : height // 2], axis=1))
    noise = min(4.0, float(np.median(differences)))

    count = rng.integers(1, 4)
    drops = rng.uniform(0.25, 0.85, count) * (1 - horizon)  # of the feet below the horizon
    for drop in np.sort(drops):  # far first
        foot = int((horizon + drop) * height)
        # An eye at 1.4 m sees m metres m / 1.4 times as high as their foot is below the horizon.
        side = np.clip(drop * rng.uniform(1.2, 1.8), 0.3, 0.65) * height
        side = max(6, int(min(side, foot, width)))
        rgb, alpha = draw_unknown(rng, side)
        left = int(rng.uniform(0, width - side))
        lowest = np.flatnonzero(alpha.max(1) > 0.5)[-1]
        alpha = np.roll(alpha, side - 1 - lowest, axis=0)  # it stands on the ground

        cast_shadow(pixels, left, foot, side)
        rgb = dark + rgb * (bright - dark) + rng.normal(0, noise, rgb.shape)
        rows = slice(foot - side, foot)
        columns = slice(left, left + side)
        pixels[rows, columns] += alpha[..., None] * (rgb - pixels[rows, columns])
        mask[rows, columns] |= alpha > 0.5
    return (pixels + 0.5).clip(0, 255).astype(np.uint8), mask


def cast_shadow(pixels: np.ndarray, left: int, foot: int, side: int) -> None:
    """Darken the ground around the foot of an object that is `side` pixels wide."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width]
    distance = ((x - left - side / 2) ** 2 + 16 * (y - foot) ** 2) / side**2
    pixels *= 1 - 0.45 * np.exp(-8 * distance)[..., None]


def draw_ood_scene(rng: np.random.Generator, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """A scene with unknown objects: (image, mask uint8 [H, W]), 1 on them, 255 where it is void."""
    image, labels = draw_scene(rng, size)
    image, mask = paste_unknowns(image, rng)
    mask[(labels == VOID) & (mask == 0)] = VOID
    return image, mask
