"""Data sets, augmentation, loaders and out-of-distribution sets; street scenes drawn on the spot.

A training batch is uint8: images [B, 3, H, W] and labels [B, H, W] with 0..C-1, `VOID` 255 where nobody labelled and
`IGNORED` 254 where no class of the network applies (augmentation padding, held-out classes). 254 enters no loss and
no metric; void pixels carry an uncertainty target, but no class.

Every random choice is a function of (stream, epoch, index), so neither the number of workers nor a restart changes
a batch.
"""

import math
import os
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

VOID, IGNORED = 255, 254
SYNTHETIC_SPLITS = {"train": 256, "val": 48, "ood": 48}
SYNTHETIC_SIZE = (96, 144)  # height, width
PASTED = 3  # stream of the pasted objects

CAMVID_CLASSES = {
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
    "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign": (192, 128, 128), "fence": (64, 64, 128),
    "car": (64, 0, 128), "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192),
}  # fmt: skip
CITYSCAPES_CLASSES = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180),
    "person": (220, 20, 60), "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
    "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # train id -> id
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class DataError(ValueError):
    """A file, folder or value that cannot be used; the message names it and says what to do."""


def bit_palette(count: int) -> list[tuple[int, int, int]]:
    """The colours of Pascal VOC: the bits of the class number dealt out to red, green and blue."""
    colours = []
    for number in range(count):
        bits = [(number >> bit) & 1 for bit in range(8)]
        colours.append(tuple(sum(bits[3 * k + channel] << (7 - k) for k in range(2)) for channel in range(3)))
    return colours


# ------------------------------------------------------------------------------ files


def read_image(path: Path) -> Image.Image:
    """An image file of any mode, upright as its EXIF tag says, as RGB."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's answers to a bad file
        raise DataError(f"cannot read the image {path} ({error}); restore or remove the file") from error


def read_mask(path: Path) -> Image.Image:
    """A label file as its raw values, one byte a pixel; the indices of a palette image, not its colours."""
    try:
        with Image.open(path) as mask:
            mask.load()
            if mask.mode in ("L", "P"):
                return Image.fromarray(np.array(mask, np.uint8))
            if mask.mode.startswith("I"):  # 16-bit PNG
                values = np.asarray(mask, np.int32)
                if 0 <= values.min() and values.max() <= 255:
                    return Image.fromarray(values.astype(np.uint8))
            mode = mask.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the mask {path} ({error}); restore or remove the file") from error
    raise DataError(f"the mask {path} has mode {mode}, not one class number a pixel; save it as 8-bit grey or palette")


def pair_files(root: Path, image_glob: str, mask_of) -> tuple[list[Path], list[Path]]:
    """Images under `root` in name order, and the mask of each: `mask_of(image)`. Both have to exist."""
    images = sorted(p for p in root.glob(image_glob) if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    masks = [mask_of(path) for path in images]
    have = {folder: set(os.listdir(folder)) for folder in {m.parent for m in masks} if folder.is_dir()}
    for image, mask in zip(images, masks, strict=True):
        if mask.name not in have.get(mask.parent, ()):
            raise DataError(f"no mask {mask} for the image {image}; add it or remove the image")
    return images, masks


# ------------------------------------------------------------------------------ data sets


class EvalSample(NamedTuple):
    image: Tensor  # uint8 [3, h, w], at the network's input size
    labels: Tensor  # uint8 [H, W], at native size
    index: int


class SegmentationDataset(Dataset):
    """Images and masks of one split, and what their values mean.

    Attributes: `classes` names of the C classes of the network; `palette` their RGB; `table` uint8 [256] from a raw
    value of the mask to 0..C-1, 255 or 254, with `valid` bool [256] the values that may occur; `images`, `masks`
    files; `image_size` (H, W) of the network's input, None for native size.
    Indexing gives an `EvalSample`.
    """

    def __init__(self, name: str, classes: dict, values: dict[int, int], image_size=None):
        self.name, self.image_size = name, image_size
        self.classes, self.palette = list(classes), [tuple(colour) for colour in classes.values()]
        self.images: list[Path] = []
        self.masks: list[Path] = []
        self.hold_out: list[str] = []
        self.table, self.valid = np.full(256, VOID, np.uint8), np.zeros(256, bool)
        self.valid[list(values)] = True
        self.table[list(values)] = list(values.values())

    def __len__(self) -> int:
        return len(self.images)

    def remove_classes(self, hold_out: list[str]) -> None:
        """Take classes out of the network: their pixels become 254, the others are numbered anew."""
        if unknown := [name for name in hold_out if name not in self.classes]:
            raise DataError(f"--hold-out {' '.join(unknown)}: no such class; choose from {', '.join(self.classes)}")
        keep = [name for name in self.classes if name not in hold_out]
        if len(keep) < 2:
            raise DataError(f"--hold-out leaves {len(keep)} classes; a network needs at least 2")
        renumber = np.arange(256, dtype=np.uint8)
        renumber[: len(self.classes)] = [keep.index(name) if name in keep else IGNORED for name in self.classes]
        self.table = renumber[self.table]
        self.palette = [colour for name, colour in zip(self.classes, self.palette, strict=True) if name in keep]
        self.classes, self.hold_out = keep, list(hold_out)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Sample `index` at native size: the RGB image and the mask's raw values."""
        image, mask = read_image(self.images[index]), read_mask(self.masks[index])
        if image.size != mask.size:
            raise DataError(
                f"the mask {self.masks[index]} is {mask.width}x{mask.height}, but {self.images[index]} is "
                f"{image.width}x{image.height}; a mask has the size of its image"
            )
        return image, mask

    def stem(self, index: int) -> str:
        """Name of a sample, for files made from it."""
        return self.images[index].stem

    def labels(self, mask: Image.Image, index: int) -> np.ndarray:
        """Raw values of (a part of) the mask `index` to uint8 labels. Raises DataError at a value not in the table."""
        raw = np.asarray(mask)
        if not self.valid[raw].all():
            wrong = ", ".join(map(str, np.unique(raw[~self.valid[raw]])[:8]))
            raise DataError(f"the mask {self.masks[index]} holds {wrong}, which {self.name} labels do not have; "
                            "check that it is the right kind of label file")  # fmt: skip
        return self.table[raw]

    def __getitem__(self, index: int) -> EvalSample:
        image, mask = self.read(index)
        return EvalSample(to_input(image, self.image_size), torch.from_numpy(self.labels(mask, index)), index)


def to_input(image: Image.Image, image_size: tuple[int, int] | None) -> Tensor:
    """An RGB image as uint8 [3, h, w], resized to `image_size` (H, W) where that is given."""
    if image_size is not None and image.size != (image_size[1], image_size[0]):
        image = image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def find_root(data: Path | None, name: str, marks: tuple[str, ...], hint: str) -> Path:
    """The first of `data/<mark parent>` that exists, or a DataError that shows the layout."""
    if data is None:
        raise DataError(f"--dataset {name} needs --data DIR, a folder with {hint}")
    for mark in marks:
        if (data / mark).is_dir():
            return data / mark
    raise DataError(f"{data} has no folder {' or '.join(marks)}; --dataset {name} wants {hint}")


def open_camvid(data: Path | None, split: str, image_size) -> SegmentationDataset:
    root = find_root(data, "camvid", (split,), "train/ trainannot/ val/ valannot/ test/ testannot/")
    values = {number: number for number in range(11)} | {11: VOID, VOID: VOID}
    dataset = SegmentationDataset("camvid", CAMVID_CLASSES, values, image_size)
    annotations = root.with_name(split + "annot")
    dataset.images, dataset.masks = pair_files(root, "*", lambda p: annotations / f"{p.stem}.png")
    return dataset


def open_cityscapes(data: Path | None, split: str, image_size) -> SegmentationDataset:
    hint = "leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png"
    root = find_root(data, "cityscapes", (f"leftImg8bit/{split}",), hint)
    values = {number: VOID for number in (*range(34), VOID)}  # 255: -1 (license plate) in a byte
    values |= {number: train_id for train_id, number in enumerate(CITYSCAPES_LABEL_IDS)}
    dataset = SegmentationDataset("cityscapes", CITYSCAPES_CLASSES, values, image_size)
    fine = data / "gtFine" / split
    dataset.images, dataset.masks = pair_files(
        root, "*/*_leftImg8bit.png",
        lambda p: fine / p.parent.name / p.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png"),
    )  # fmt: skip
    return dataset


def open_voc(data: Path | None, split: str, image_size) -> SegmentationDataset:
    hint = "JPEGImages/ SegmentationClass/ ImageSets/Segmentation/, itself or as VOC2012 or VOCdevkit/VOC2012"
    marks = tuple(f"{prefix}ImageSets/Segmentation" for prefix in ("", "VOC2012/", "VOCdevkit/VOC2012/"))
    lists = find_root(data, "voc", marks, hint)
    root = lists.parent.parent
    dataset = SegmentationDataset(
        "voc", dict(zip(VOC_CLASSES, bit_palette(21), strict=True)),
        {number: number for number in (*range(21), VOID)}, image_size,
    )  # fmt: skip
    names = lists / f"{split}.txt"
    if not names.is_file():
        raise DataError(f"no file {names}, the list of the split's images; check the split or add the list")
    masks = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    stems = [line.split()[0] for line in names.read_text().splitlines() if line.strip()]
    # SBD's list names both files of a line with a path; the stem is what they share
    stems = [Path(stem).stem for stem in stems]
    dataset.images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    dataset.masks = [masks / f"{stem}.png" for stem in stems]
    for folder, files in ((root / "JPEGImages", dataset.images), (masks, dataset.masks)):
        have = set(os.listdir(folder)) if folder.is_dir() else set()
        if missing := [path for path in files if path.name not in have]:
            raise DataError(f"{names} lists {len(missing)} files that are missing, the first is {missing[0]}")
    return dataset


def open_folder(data: Path | None, split: str, image_size) -> SegmentationDataset:
    hint = "images/<split>/, labels/<split>/ (8-bit PNG, class number a pixel, 255 void) and classes.txt (a name a line)"
    root = find_root(data, "folder", (f"images/{split}",), hint)
    if not (names := data / "classes.txt").is_file():
        raise DataError(f"no file {names}; --dataset folder wants {hint}")
    classes = [line.strip() for line in names.read_text().splitlines() if line.strip()]
    if not 2 <= len(classes) <= 254 or len(set(classes)) < len(classes):
        raise DataError(f"{names} names {len(classes)} classes; it has to name 2 to 254 different ones, one a line")
    values = {number: number for number in (*range(len(classes)), VOID)}
    palette = bit_palette(len(classes) + 1)[1:]
    dataset = SegmentationDataset("folder", dict(zip(classes, palette, strict=True)), values, image_size)
    labels = data / "labels" / split
    dataset.images, dataset.masks = pair_files(
        root, "**/*", lambda p: labels / p.relative_to(root).with_suffix(".png")
    )  # fmt: skip
    return dataset


class SyntheticScenes(SegmentationDataset):
    """Street scenes drawn by `draw_scene`, the same for the same split and index; kept once they are drawn.

    The split `ood` has masks of unknown objects (0 / 1 / 255) in place of labels.
    """

    def __init__(self, split: str, image_size=None):
        if split not in SYNTHETIC_SPLITS:
            raise DataError(f"the synthetic data set has no split {split!r}; choose {', '.join(SYNTHETIC_SPLITS)}")
        super().__init__("synthetic", CAMVID_CLASSES, {n: n for n in (*range(11), VOID)}, image_size)
        self.split, self.drawn = split, {}

    def __len__(self) -> int:
        return SYNTHETIC_SPLITS[self.split]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        if index not in self.drawn:
            rng = np.random.default_rng([list(SYNTHETIC_SPLITS).index(self.split), index])
            draw = draw_ood_scene if self.split == "ood" else draw_scene
            image, labels = draw(rng, SYNTHETIC_SIZE)
            self.drawn[index] = (Image.fromarray(image), Image.fromarray(labels))
        return self.drawn[index]

    def stem(self, index: int) -> str:
        return f"{self.split}_{index:04d}"


READERS = {"camvid": open_camvid, "cityscapes": open_cityscapes, "voc": open_voc, "folder": open_folder}
DATASETS = ("synthetic", *READERS)


def open_dataset(
    name: str, data: str | Path | None, split: str, image_size: tuple[int, int] | None = None, hold_out=()
) -> SegmentationDataset:
    """One split of a data set, without the classes in `hold_out`. Raises DataError where the files do not fit."""
    data = None if data is None else Path(data)
    if data is not None and not data.is_dir():
        raise DataError(f"no such folder: {data}; --data names the folder of the data set")
    dataset = SyntheticScenes(split, image_size) if name == "synthetic" else READERS[name](data, split, image_size)
    if len(dataset) == 0:
        raise DataError(f"no images in the split {split!r} of {data}; check the layout")
    if hold_out:
        dataset.remove_classes(list(hold_out))
    return dataset


# ------------------------------------------------------------------------------ training views


class Sample(NamedTuple):
    """One training sample; collated, a batch with a leading dimension B on every field."""

    images: Tensor  # uint8 [3, H, W]
    labels: Tensor  # uint8 [H, W]: class, VOID or IGNORED
    index: int  # of the image in its data set
    view: int  # which scale and crop of it; the epoch unless views repeat
    flip: bool  # mirrored left to right


class TrainingViews(Dataset):
    """Random scale, crop, flip (and colour jitter) of a data set, keyed by (stream, epoch, index).

    Args:
        crop_size: (H, W) of a view.
        scale: (lo, hi) around 1; half of the draws are uniform in [lo, 1], half in [1, hi].
        stream: integers that key all draws.
        views: K repeats the scale and crop of epoch e in epoch e + K, the flip stays free; 0 never repeats.
        jitter: brightness, contrast and saturation factors are uniform in [1 - jitter, 1 + jitter].
    """

    def __init__(self, dataset: SegmentationDataset, crop_size, scale, stream: list[int], views=0, jitter=0.0):
        self.dataset, self.crop_size, self.scale = dataset, crop_size, scale
        self.stream, self.views, self.jitter = stream, views, jitter

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        view = epoch % self.views if self.views else epoch
        rng = np.random.default_rng([*self.stream, 0, view, index])
        flip = bool(np.random.default_rng([*self.stream, 1, epoch, index]).integers(2))
        lo, hi = self.scale
        scale = rng.uniform(lo, 1) if rng.random() < 0.5 else rng.uniform(1, hi)
        image, mask = self.dataset.read(index)
        image, mask, fill = random_crop(image, mask, self.dataset.image_size, scale, self.crop_size, rng)
        if self.jitter:
            image = colour_jitter(image, self.jitter, rng)
        h, w = self.crop_size
        pixels, labels = np.zeros((h, w, 3), np.uint8), np.full((h, w), IGNORED, np.uint8)
        pixels[: fill[0], : fill[1]] = np.asarray(image)
        labels[: fill[0], : fill[1]] = self.dataset.labels(mask, index)
        if flip:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return Sample(images, torch.from_numpy(np.ascontiguousarray(labels)), index, view, flip)


def random_crop(image, mask, image_size, scale: float, crop_size, rng) -> tuple[Image.Image, Image.Image, tuple]:
    """Resize to `image_size` x `scale` and crop, in the order that resizes only what survives the crop.

    Returns the image, the mask and their size (h, w), smaller than `crop_size` where the scaled image is.
    """
    height, width = image_size or (image.height, image.width)
    full = max(1, round(height * scale)), max(1, round(width * scale))  # size of the whole image after scaling
    size = min(full[0], crop_size[0]), min(full[1], crop_size[1])
    top, left = (int(rng.integers(full[k] - size[k] + 1)) for k in (0, 1))
    y, x = image.height / full[0], image.width / full[1]
    box = (left * x, top * y, min((left + size[1]) * x, image.width), min((top + size[0]) * y, image.height))
    target = (size[1], size[0])
    return (
        image.resize(target, Image.Resampling.BILINEAR, box=box),
        mask.resize(target, Image.Resampling.NEAREST, box=box),
        size,
    )


def colour_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(3):
        image = enhancers[number](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order that is a function of (stream, epoch).

    `epoch` and `start` (first batch) are set before each pass, so a restart takes up where it stopped. A single
    image left over is dropped, for batch norm needs two; a data set smaller than a batch makes one batch of all.
    """

    def __init__(self, length: int, batch_size: int, stream: list[int]):
        if length < 2:
            raise DataError(f"the training split has {length} image; batch norm needs at least 2")
        self.length, self.batch_size, self.stream = length, min(batch_size, length), stream
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.length // self.batch_size + (self.length % self.batch_size > 1)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([*self.stream, 2, self.epoch]).permutation(self.length)
        for number in range(self.start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch]


def worker_settings(workers: int, device: torch.device) -> dict:
    # a generator of its own: the default one would draw from the stream that dropout uses
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),
    }


def training_loader(views: TrainingViews, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Batches of `Sample`; set `loader.batch_sampler.epoch` before each pass."""
    batches = EpochBatches(len(views), batch_size, views.stream)
    return DataLoader(views, batch_sampler=batches, **worker_settings(workers, device))


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Lists of equally sized `EvalSample` batches (images [B, 3, h, w], labels [B, H, W], index [B]), in order."""
    settings = worker_settings(workers, device)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_runs, **settings)


def collate_runs(samples: list[EvalSample]) -> list[EvalSample]:
    """Neighbours of equal shapes become one batch; images of one size with masks of another do not."""
    runs: list[list[EvalSample]] = []
    for sample in samples:
        same = runs and all(runs[-1][0][k].shape == sample[k].shape for k in (0, 1))
        if not same:
            runs.append([])
        runs[-1].append(sample)
    return [
        EvalSample(
            torch.stack([s.image for s in run]), torch.stack([s.labels for s in run]),
            torch.tensor([s.index for s in run]),
        )
        for run in runs
    ]  # fmt: skip


# ---- synthetic street scenes ---------------------------------------------------------------
# A pinhole camera looks down a street, in metres: x to the right, y up from the ground, z away.
# Every shape is painted twice, far to near: its colour on `paint` and its class on `annotate`,
# both at twice the size; halving the first smooths its edges, every second pixel is the label.
# Colours overlap between classes on purpose: form and place must tell them apart.

(SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST) = range(11)
VOID = 255
WALLS = [(150, 88, 68), (188, 164, 128), (205, 196, 180), (136, 88, 62), (176, 140, 110),
         (150, 146, 140)]
ROADS = [(92, 92, 96), (78, 78, 84), (104, 100, 98), (122, 122, 124)]
PAVINGS = [(170, 166, 158), (150, 146, 142), (176, 150, 128), (124, 122, 122)]
LEAVES = [(64, 112, 44), (50, 92, 40), (92, 122, 50), (78, 106, 40), (150, 100, 36), (52, 66, 34)]
METALS = [(70, 72, 74), (120, 122, 122), (44, 52, 46), (160, 160, 156), (96, 80, 62)]
BOARDS = [(106, 72, 40), (120, 84, 50), (76, 84, 80), (52, 84, 66), (86, 58, 38)]
CARS = [(205, 205, 208), (40, 42, 46), (150, 30, 34), (40, 66, 128), (128, 132, 136), (52, 92, 54),
        (196, 164, 60), (92, 80, 68)]
SIGNS = [(208, 30, 36), (30, 70, 190), (236, 200, 40), (236, 236, 232), (208, 30, 36)]
SKINS = [(224, 180, 150), (186, 136, 104), (120, 84, 62)]
# name: zenith, skyline, light on things, haze per metre, strength of shadows; one is drawn a scene
SKIES = [((96, 150, 216), (206, 222, 236), (1.05, 1.0, 0.94), 0.006, 0.55),   # clear
         ((168, 172, 178), (212, 214, 214), (0.86, 0.88, 0.9), 0.010, 0.10),  # overcast
         ((92, 98, 150), (246, 178, 122), (0.84, 0.68, 0.6), 0.010, 0.40),    # dusk
         ((16, 20, 42), (62, 58, 72), (0.36, 0.36, 0.44), 0.008, 0.15),       # night
         ((182, 186, 190), (204, 206, 206), (0.82, 0.83, 0.84), 0.040, 0.0)]  # fog


def _tone(r, palette, spread=0.1):
    """A colour of the palette, a little lighter or darker and off in hue."""
    gain = r.uniform(1 - 2 * spread, 1 + 2 * spread)
    return tuple(c * gain * r.uniform(1 - spread, 1 + spread) for c in r.choice(palette))


def _at(s, x, y, z):
    """World (metres) to canvas (pixels); the street bends sideways with the distance."""
    return s.cx + s.f * (x / z + s.bend * z), s.horizon + s.f * (s.eye - y) / z


def _ink(s, rgb, z, gain=1.0, glow=False):
    """The colour as it arrives: lit, then faded into the haze by distance."""
    keep = math.exp(-z * s.haze)
    away = 1 - keep
    (r, g, b), (fr, fg, fb) = rgb, s.fog
    lr, lg, lb = (1, 1, 1) if glow else s.light
    keep *= 1 if glow else gain
    return (min(255, int(r * lr * keep + fr * away)), min(255, int(g * lg * keep + fg * away)),
            min(255, int(b * lb * keep + fb * away)))


def _fill(s, corners, rgb, label=None, gain=1.0, glow=False):
    """Paint a polygon of world points."""
    xy = [_at(s, *p) for p in corners]
    s.paint.polygon(xy, fill=_ink(s, rgb, 0.5 * (corners[0][2] + corners[-1][2]), gain, glow))
    if label is not None:
        s.annotate.polygon(xy, fill=label)


def _flat(s, x, z, points, rgb, label=None, gain=1.0, glow=False):
    """Paint a polygon that faces the camera, its points (dx, y) in metres about (x, 0, z)."""
    _fill(s, [(x + dx, y, z) for dx, y in points], rgb, label, gain, glow)


def _disc(s, x, y, z, rx, ry, rgb, label=None, gain=1.0, glow=False):
    (u, v), k = _at(s, x, y, z), s.f / z
    box = [u - rx * k, v - ry * k, u + rx * k, v + ry * k]
    s.paint.ellipse(box, fill=_ink(s, rgb, z, gain, glow))
    if label is not None:
        s.annotate.ellipse(box, fill=label)


def _shadow(s, x, z, width, height):
    """A shadow on the ground, away from the sun; it is laid over the ground in `_develop`."""
    dx, dz = s.sun[0] * height, max(s.sun[1] * height, 0.7 - z)
    s.shade.polygon([_at(s, x - width / 2, 0, z), _at(s, x + width / 2, 0, z),
                     _at(s, x + width / 2 + dx, 0, z + dz), _at(s, x - width / 2 + dx, 0, z + dz)],
                    fill=255)


def _building(s, r, x, z0, z1):
    side, height, wall = math.copysign(1, x), r.uniform(4, 13), _tone(r, WALLS)
    gain = s.facing[side]
    deep = x + side * 14
    if s.strength and s.sun[0] * side < 0:  # its shadow falls over the street
        reach = x + s.sun[0] * height * 0.5
        s.shade.polygon([_at(s, x, 0, z0), _at(s, x, 0, z1), _at(s, reach, 0, z1),
                         _at(s, reach, 0, z0)], fill=255)
    _flat(s, 0, z0, [(x, 0), (x, height), (deep, height), (deep, 0)], wall, BUILDING, s.facing[0])
    _fill(s, [(x, 0, z0), (x, height, z0), (x, height, z1), (x, 0, z1)], wall, BUILDING, gain)
    if r.random() < 0.5:  # a roof
        top, back = height + r.uniform(1, 2.5), x + side * 3
        _fill(s, [(x, height, z0), (back, top, z0), (back, top, z1), (x, height, z1)],
              _tone(r, WALLS), BUILDING, 0.6)
    floors, pitch = max(1, int(height / 3)), r.uniform(2.2, 3.6)
    glass = _tone(r, [(52, 60, 74), (30, 32, 38), (150, 165, 180), (90, 96, 104)])
    low, high, columns = r.uniform(0.7, 1.1), r.uniform(2.2, 2.6), max(1, int((z1 - z0) / pitch))
    for column in range(columns):
        a = z0 + (column + 0.25) * (z1 - z0) / columns
        b = a + 0.5 * (z1 - z0) / columns
        if abs(x) * (b - a) < 0.014 * a * b or abs(x) > s.wide * b:
            continue  # too narrow to be seen, or beside the view
        for floor in range(floors):
            lit = r.random() < s.lamps
            y = floor * height / floors
            _fill(s, [(x, y + low, a), (x, y + high, a), (x, y + high, b), (x, y + low, b)],
                  (236, 200, 130) if lit else glass, None, gain * r.uniform(0.85, 1.1), lit)
    if r.random() < 0.35:  # a shop's panel: bright, but no sign
        _fill(s, [(x, 2.7, z0), (x, 3.4, z0), (x, 3.4, z1), (x, 2.7, z1)], _tone(r, SIGNS),
              None, gain)


def _fence(s, r, x, z0, z1, style):
    kind, height, rgb = style
    gain = s.facing[math.copysign(1, x)]
    quad = [(x, 0, z0), (x, height, z0), (x, height, z1), (x, 0, z1)]
    s.annotate.polygon([_at(s, *p) for p in quad], fill=FENCE)
    if kind == "wall":
        _fill(s, quad, rgb, None, gain)
        low = height * 0.88
        _fill(s, [(x, low, z0), *quad[1:3], (x, low, z1)], rgb, None, gain * 1.25)
        return
    for y in (0.12, 0.52, 0.92):  # rails
        _fill(s, [(x, height * y, z0), (x, height * y + 0.08, z0), (x, height * y + 0.08, z1),
                  (x, height * y, z1)], rgb, None, gain)
    share, z = (0.8 if kind == "boards" else 0.45), z0
    while z < z1:
        step = max(0.22, 0.02 * z * z / abs(x))  # not finer than can be seen
        b = z + step * share
        if abs(x) < s.wide * b:
            _fill(s, [(x, 0, z), (x, height, z), (x, height, b), (x, 0, b)], rgb, None,
                  gain * r.uniform(0.85, 1.1))
        z += step


def _tree(s, r, x, z, height):
    if abs(x) - 0.36 * height > s.wide * z:
        return  # beside the view
    leaf, bare, trunk = _tone(r, LEAVES), r.random() < 0.08, _tone(r, [(84, 66, 50), (60, 54, 48)])
    wide, crown = height * r.uniform(0.22, 0.36), height * r.uniform(0.3, 0.5)
    _flat(s, x, z, [(-0.17, 0), (-0.12, crown + 1), (0.12, crown + 1), (0.17, 0)], trunk, TREE)
    middle, tall = 0.5 * (crown + height), 0.5 * (height - crown)
    if bare:  # twigs that let the sky through; people label the whole crown
        (u, v), k = _at(s, x, middle, z), s.f / z
        s.annotate.ellipse([u - wide * k, v - tall * k, u + wide * k, v + tall * k], fill=TREE)
        ink, (u0, v0) = _ink(s, trunk, z), _at(s, x, crown * 0.8, z)
        for _ in range(26):
            a, q = r.uniform(0, 2 * math.pi), r.uniform(0.6, 1) * k
            s.paint.line([u0, v0, u + wide * q * math.cos(a), v + tall * q * math.sin(a)], ink,
                         max(1, int(0.09 * k)))
        return
    for _ in range(14 if z < 15 else 7):
        a, q = r.uniform(0, 2 * math.pi), math.sqrt(r.random()) * 0.75
        up = math.sin(a) * q
        size = r.uniform(0.4, 0.6)
        _disc(s, x + wide * math.cos(a) * q, middle + tall * up, z, wide * size, tall * size, leaf,
              TREE, 0.85 + 0.3 * up + r.uniform(-0.15, 0.15))


PROFILE = [(0, .28), (0, .85), (.06, .95), (.16, 1.45), (.62, 1.45), (.78, .98), (1, .82), (1, .28)]
VAN = [(0, .3), (0, 2.1), (.05, 2.2), (.8, 2.2), (.9, 1.3), (1, 1.1), (1, .3)]


def _car(s, r, x, z, across=False):
    """A car along the street, seen from its end and one side, or across it."""
    rgb, van = _tone(r, CARS), r.random() < 0.2
    width, length, glass = 1.8, (5.2 if van else 4.2), _tone(r, [(44, 50, 58), (110, 124, 136)])
    profile, turned = (VAN if van else PROFILE), r.random() < 0.5
    roof, waist, (t0, t1) = (2.2, 1.25, (.1, .8)) if van else (1.45, 0.93, (.16, .72))
    if turned:
        profile, (t0, t1) = [(1 - t, y) for t, y in profile], (1 - t1, 1 - t0)
    side = x - math.copysign(width / 2, x)

    def place(t, y):
        return (x + (t - 0.5) * length, y, z) if across else (side, y, z + t * length)
    under = [place(0, 0), place(1, 0)]
    under += [(p[0], 0, p[2] + width) if across else (p[0] + math.copysign(width, x), 0, p[2])
              for p in under[::-1]]
    _fill(s, under, (22, 22, 24))  # the dark below any car, its class stays the ground's
    if not across:
        ends = sorted(t for t, y in profile if y == roof)
        _fill(s, [(x + dx * width / 2, roof, z + t * length) for dx, t in
                  ((-1, ends[0]), (1, ends[0]), (1, ends[-1]), (-1, ends[-1]))], rgb, CAR, 1.1)
    _fill(s, [place(t, y) for t, y in profile], rgb, CAR, s.facing[0] if across else 0.85)
    _fill(s, [place(t0, waist), place(t0 + .05, roof - .1), place(t1 - .08, roof - .1),
              place(t1, waist)], glass)
    for t in (0.18, 0.8):
        wheel = [(t + .34 / length * math.cos(a), .33 + .33 * math.sin(a))
                 for a in (0, .8, 1.6, 2.4, 3.1, 3.9, 4.7, 5.5)]
        _fill(s, [place(*p) for p in wheel], (26, 26, 28), CAR)
    if across:
        return
    w, lamp = width / 2, (190, 30, 26) if r.random() < 0.6 else (240, 236, 210)
    back = [(-w, .28), (-w, waist), (-w * .82, roof), (w * .82, roof), (w, waist), (w, .28)]
    _flat(s, x, z, back, rgb, CAR, s.facing[0])
    _flat(s, x, z, [(.9 * dx, min(y, roof - .1)) for dx, y in back[1:5]], glass)
    for e in (-1, 1):
        _flat(s, x, z, [(e * w, 0), (e * w, .3), (e * (w - .25), .3), (e * (w - .25), 0)],
              (24, 24, 26), CAR)
        _flat(s, x, z, [(e * w, .6), (e * w, .8), (e * (w - .3), .8), (e * (w - .3), .6)], lamp,
              glow=s.lamps > 0.2)


def _clothes(r, bright=0.0):
    if r.random() < bright:
        return _tone(r, [(226, 236, 40), (250, 130, 30), (240, 60, 90)])
    if r.random() < 0.2:
        return _tone(r, CARS + LEAVES + WALLS)
    g = r.uniform(20, 190)
    return tuple(min(250, max(10, g + r.gauss(0, 40))) for _ in range(3))


def _person(s, r, x, z):
    h, top, legs, step = r.uniform(1.5, 1.95), _clothes(r), _clothes(r), r.uniform(0.02, 0.3)
    for e in (-1, 1):
        _flat(s, x, z, [(e * .02, .52 * h), (e * .2, .52 * h), (e * (step + .12), 0),
                        (e * (step - .08), 0)], legs, PEDESTRIAN, 1 - 0.1 * e)
        swing = r.uniform(0.24, 0.42)
        _flat(s, x, z, [(e * .18, .82 * h), (e * .3, .8 * h), (e * (swing + .06), .45 * h),
                        (e * (swing - .08), .45 * h)], top, PEDESTRIAN, 0.85)
    hem = r.choice([.48, .48, .3]) * h
    _flat(s, x, z, [(-.25, .83 * h), (.25, .83 * h), (.23, hem), (-.23, hem)], top, PEDESTRIAN)
    _disc(s, x, .91 * h, z, .13, .09 * h, _tone(r, SKINS), PEDESTRIAN)
    _disc(s, x, .95 * h, z, .135, .055 * h, _tone(r, [(40, 30, 24), (150, 120, 70), (90, 88, 86)]))


def _cyclist(s, r, x, z):
    top, legs, bike, e = _clothes(r, 0.6), _clothes(r), _tone(r, CARS), r.choice((-1, 1))
    (u, v), k = _at(s, x, .36, z), s.f / z
    if r.random() < 0.35:  # from the front or behind: a person on one thin wheel
        _flat(s, x, z, [(-.07, 0), (-.07, .75), (.07, .75), (.07, 0)], (28, 28, 30), BICYCLIST)
        for e in (-1, 1):
            _flat(s, x, z, [(e * .06, 1.0), (e * .24, 1.0), (e * .24, .4), (e * .1, .3)], legs,
                  BICYCLIST, 1 - .1 * e)
        _flat(s, x, z, [(-.4, 1.0), (-.24, 1.5), (.24, 1.5), (.4, 1.0), (.2, .95), (-.2, .95)], top,
              BICYCLIST)
        _flat(s, x, z, [(-.45, 1.0), (-.45, 1.07), (.45, 1.07), (.45, 1.0)], bike, BICYCLIST)
        _disc(s, x, 1.66, z, .13, .17, _tone(r, SKINS + SIGNS), BICYCLIST)
        return
    for dx in (-.52, .52):  # the label of a wheel is its disc
        box = [u + (dx - .36) * k, v - .36 * k, u + (dx + .36) * k, v + .36 * k]
        s.annotate.ellipse(box, fill=BICYCLIST)
        s.paint.ellipse(box, outline=_ink(s, (30, 30, 32), z), width=max(1, int(.09 * k)))
    for a, b in (((-.52, .36), (-.15, .85)), ((-.15, .85), (.4, .8)), ((.4, .8), (.52, .36)),
                 ((-.05, .36), (.4, .8)), ((-.52, .36), (-.05, .36)), ((.4, .8), (.36, 1.08))):
        line = [_at(s, x + e * a[0], a[1], z), _at(s, x + e * b[0], b[1], z)]
        for canvas, ink in ((s.paint, _ink(s, bike, z)), (s.annotate, BICYCLIST)):
            canvas.line(line, fill=ink, width=max(1, int(.09 * k)))
    for rgb, points in (
            (legs, [(-.26, .98), (.16, .8), (.0, .28), (.14, .28), (.3, .86), (-.1, 1.1)]),
            (top, [(-.28, .92), (.0, 1.52), (.26, 1.46), (.02, .92)]),
            (top, [(.1, 1.45), (.24, 1.42), (.45, 1.05), (.34, 1.02)])):
        _flat(s, x, z, [(e * dx, y) for dx, y in points], rgb, BICYCLIST)
    _disc(s, x + e * .22, 1.66, z, .14, .17, _tone(r, SKINS + SIGNS), BICYCLIST)


def _pole(s, r, x, z, sign):
    rgb, w, h = _tone(r, METALS), r.uniform(.17, .26), r.uniform(*((2.5, 3.2) if sign else (4, 8)))
    _flat(s, x, z, [(-w, 0), (-w * .8, h), (w * .8, h), (w, 0)], rgb, POLE)
    _flat(s, x, z, [(w * .2, 0), (w * .2, h), (w * .7, h), (w * .9, 0)], rgb, None, 1.3)
    if not sign:
        arm = -math.copysign(r.uniform(.8, 1.8), x)
        if r.random() < 0.7:
            _flat(s, x, z, [(0, h), (0, h - .25), (arm, h - .05), (arm, h + .2)], rgb, POLE)
            _disc(s, x + arm, h, z, .4, .17, (250, 226, 170), POLE, 1, s.lamps > 0.2)
        return
    a, face, edge = r.uniform(.6, .85), _tone(r, SIGNS), _tone(r, SIGNS)
    kind = r.choice(["disc", "disc", "triangle", "board", "diamond", "lights"])
    y = h - a * .6
    if kind == "disc":
        _disc(s, x, y, z, a, a, edge, SIGN)
        _disc(s, x, y, z, a * .7, a * .7, face)
    elif kind == "lights":
        box = [(-.3, y - .7), (-.3, y + .7), (.3, y + .7), (.3, y - .7)]
        _flat(s, x, z, box, (30, 32, 30), SIGN)
        up, lamp = r.choice(((-.42, (40, 210, 110)), (0, (240, 180, 40)), (.42, (230, 40, 40))))
        _disc(s, x, y + up, z, .2, .2, lamp, glow=True)
    else:
        points = {"triangle": [(-1, -.8), (0, 1), (1, -.8)],
                  "diamond": [(-1, 0), (0, 1), (1, 0), (0, -1)],
                  "board": [(-1.1, -.7), (-1.1, .7), (1.1, .7), (1.1, -.7)]}[kind]
        _flat(s, x, z, [(a * dx, y + a * dy) for dx, dy in points], edge, SIGN)
        _flat(s, x, z, [(a * .68 * dx, y + a * .68 * dy) for dx, dy in points], face)


def _noise(rng, size, cells):
    """Smooth noise [H, W] of about unit variance, `cells` grains high whatever the size."""
    rows = min(size[0], cells)
    grid = rng.standard_normal((rows, max(2, rows * size[1] // size[0])), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize(size[::-1], Image.Resampling.BICUBIC))


def _ground(s, r, width, height):
    """Pavement everywhere, on it the road, a side street, kerbs and markings (which are road)."""
    road, pave = _tone(r, ROADS, 0.08), _tone(r, PAVINGS, 0.08)
    left, right, depths = s.left, s.right, (0.8, 2, 4, 7, 12, 20, 36, 90)
    box = [0, s.horizon, width, height]
    s.paint.rectangle(box, fill=_ink(s, pave, 0))
    s.annotate.rectangle(box, fill=PAVEMENT)

    def strip(a, b, rgb, label=None, zs=depths):
        xy = [_at(s, a, 0, z) for z in zs] + [_at(s, b, 0, z) for z in zs[::-1]]
        s.paint.polygon(xy, fill=_ink(s, rgb, 0))
        if label is not None:
            s.annotate.polygon(xy, fill=label)
    if r.random() < 0.3:  # lawns beyond the pavement, vegetation to who labels streets
        for a, b in ((left - s.verge[-1] - 40, left - s.verge[-1]),
                     (right + s.verge[1], right + s.verge[1] + 40)):
            strip(a, b, _tone(r, LEAVES[:3]), TREE)
    kerb = tuple(c * r.uniform(0.7, 1.4) for c in pave)
    strip(left - 0.25, right + 0.25, kerb)
    strip(left, right, road, ROAD)
    if r.random() < 0.4:
        z = r.uniform(6, 25)
        strip(-60, 60, road, ROAD, (z, z + r.uniform(5, 8)))
    paintwork = tuple(c * r.uniform(0.7, 1) for c in (235, 232, 220))
    middle, dash, z = 0.5 * (left + right), r.uniform(1.5, 3), r.uniform(1, 3)
    if r.random() < 0.75:
        while z < 40:
            strip(middle - 0.09, middle + 0.09, paintwork, None, (z, z + dash))
            z += dash * 2
    for x in (left + 0.35, right - 0.35):
        if r.random() < 0.4:
            strip(x - 0.07, x + 0.07, paintwork)
    if r.random() < 0.25:  # a crossing
        z, x = r.uniform(4, 12), left + 0.4
        while x < right - 0.5:
            strip(x, x + 0.5, paintwork, None, (z, z + 2.5))
            x += 1.0


def _sides(s, r):
    """What lines the street: facades, fences with trees behind them, gaps; far to near."""
    for _ in range(10):  # the skyline
        x, z = r.uniform(-70, 70), r.uniform(70, 110)
        if r.random() < 0.5:
            _disc(s, x, 3, z, r.uniform(6, 14), r.uniform(4, 9), _tone(r, LEAVES), TREE)
        else:
            w, h = r.uniform(4, 10), r.uniform(5, 18)
            _flat(s, x, z, [(-w, 0), (-w, h), (w, h), (w, 0)], _tone(r, WALLS), BUILDING)
    if r.random() < 0.3:  # the street ends at a row of houses
        x, z = -30, r.uniform(28, 60)
        while x < 30:
            w, h = r.uniform(6, 12), r.uniform(5, 13)
            _flat(s, x, z, [(0, 0), (0, h), (w, h), (w, 0)], _tone(r, WALLS), BUILDING, s.facing[0])
            x += w
    for side in (-1, 1):
        edge = (s.right if side > 0 else s.left) + side * s.verge[side]
        built, z, parts = r.choice((0.1, 0.5, 0.9)), 0.6, []
        kind = r.choice(("wall", "bars", "boards", "boards"))
        style = (kind, r.uniform(1.1, 2.1), _tone(r, BOARDS))
        while z < 75:
            long = r.uniform(6, 14)
            parts.append((z, z + long, r.random()))
            z += long
        for z0, z1, pick in parts[::-1]:
            if pick < built:
                _building(s, r, edge, z0, z1)
            elif pick < built + (1 - built) * 0.85:
                for _ in range(r.choice((1, 2, 2, 3))):
                    _tree(s, r, edge + side * r.uniform(1.5, 6), max(2.0, r.uniform(z0, z1)),
                          r.uniform(4, 9))
                _fence(s, r, edge, z0, z1, style)


def _things(s, r):
    """Cars, people, poles and street trees, far to near, with their shadows on the ground."""
    def depth(low=3.2, high=24):
        return low * (high / low) ** (r.random() ** 1.6)

    def kerb(inside, outside):
        side = r.choice((-1, 1))
        return (s.right if side > 0 else s.left) + side * r.uniform(-inside, outside)
    things = []
    for _ in range(r.choice((0, 1, 1, 2, 2, 3, 4))):
        across = r.random() < 0.15
        x = r.uniform(s.left, s.right) if across else r.choice((s.left + 1.1, s.right - 1.1))
        things.append((depth(4.5, 24), lambda x, z, a=across: _car(s, r, x, z, a), x, 1.8, 1.5))
    for _ in range(r.choice((0, 1, 2, 2, 3, 4))):
        x = kerb(0.4, 1.8) if r.random() < 0.75 else r.uniform(s.left, s.right)
        things.append((depth(3.2, 14), lambda x, z: _person(s, r, x, z), x, 0.5, 1.7))
    for _ in range(r.choice((0, 0, 1, 1, 2, 3))):
        things.append((depth(3.4, 12), lambda x, z: _cyclist(s, r, x, z),
                       r.uniform(s.left + .3, s.right - .3), 1.0, 1.6))
    for _ in range(r.choice((2, 3, 3, 4))):
        sign = r.random() < 0.6
        x = kerb(-0.3, 0.9)
        things.append((depth(3.8, 14), lambda x, z, a=sign: _pole(s, r, x, z, a), x, 0.3, 4))
    for _ in range(r.choice((0, 0, 1, 2))):
        h = r.uniform(4, 8)
        things.append((depth(5, 30), lambda x, z, h=h: _tree(s, r, x, z, h), kerb(-0.5, 1.6), 3, 6))
    if r.random() < 0.25:  # a railing along the kerb
        x, z = r.choice((s.left - 0.3, s.right + 0.3)), r.uniform(3, 8)
        style = ("bars", r.uniform(0.9, 1.2), _tone(r, METALS))
        for i in range(r.randint(1, 4)):
            things.append((z + 3 * i, lambda x, z, q=style: _fence(s, r, x, z, z + 3, q), x, .1, 1))
    things.sort(key=lambda t: -t[0])
    for z, draw, x, width, height in things:
        if s.strength:
            _shadow(s, x, z, width, height)
        draw(x, z)


def _develop(s, rng, image, labels, shade, size):
    """Shadows, haze and grain of the ground, textures by class, then lens, exposure and noise."""
    image = np.array(image.reduce(2), dtype=np.float32)                         # [H, W, 3]
    shade = np.asarray(shade.reduce(2), dtype=np.float32) / 255                 # [H, W]
    ground = ((labels == ROAD) | (labels == PAVEMENT)).astype(np.float32)
    amp = np.array([.01, .05, .05, .06, .06, .14, .03, .05, .03, .05, .05], np.float32)
    amp *= rng.uniform(0.4, 1.2, 11) / (1 + 30 * s.haze)  # haze hides grain
    amp = amp[labels]
    gain = 1 + amp * (_noise(rng, size, 96) + 0.8 * _noise(rng, size, 20))
    gain -= s.strength * shade * ground
    rows = np.arange(size[0], dtype=np.float32) - s.horizon / 2
    haze = ground * (1 - np.exp(-s.haze * s.eye * s.f / 2 / np.maximum(rows, 0.5)))[:, None]
    image *= (gain * (1 - haze))[..., None]
    image += haze[..., None] * np.asarray(s.fog, np.float32)
    image *= np.exp(rng.normal(0, 0.1) + rng.normal(0, 0.02, 3)).astype(np.float32)
    if (blur := rng.uniform(-0.4, 0.8) * size[0] / 96) > 0.2:
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        image = np.array(image.filter(ImageFilter.BoxBlur(blur)), dtype=np.float32)
    noise = rng.standard_normal(image.shape, np.float32)
    noise *= np.float32(rng.uniform(1.5, 5))
    image += noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _void(rng, labels):
    """Some borders between classes are nobody's, as in labels drawn by hand."""
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, :-1] |= edge[:, 1:]
    edge[:-1] |= edge[1:]
    labels[edge & (_noise(rng, labels.shape, 6) > 0.5)] = VOID


def _scene(rng, size):
    """`draw_scene` and, third, the height of the horizon as a fraction of the image's."""
    r, (height, width) = random.Random(int(rng.integers(2 ** 62))), (2 * size[0], 2 * size[1])
    zenith, low, light, haze, strength = r.choices(SKIES, (6, 5, 2, 1, 1))[0]
    s = SimpleNamespace(
        f=height * r.uniform(0.85, 1.2), cx=width * r.uniform(0.38, 0.62), eye=r.uniform(1.3, 1.9),
        horizon=height * r.uniform(0.36, 0.52), bend=r.gauss(0, 0.0015), left=-r.uniform(1.4, 4.2),
        right=r.uniform(1.4, 4.2), verge={-1: r.uniform(1.5, 5), 1: r.uniform(1.5, 5)},
        light=[c * r.uniform(0.9, 1.1) for c in light], haze=haze * r.uniform(0.5, 1.6),
        fog=[c * r.uniform(0.93, 1.05) for c in low], strength=strength * r.uniform(0.6, 1.1),
        sun=(r.uniform(-2, 2), r.uniform(-0.5, 1.2)), lamps=0.4 if light[0] < 0.5 else 0.03)
    s.wide = 0.62 * width / s.f
    s.facing = {-1: 0.85 + 0.12 * s.sun[0] * -1, 1: 0.85 + 0.12 * s.sun[0], 0: 0.85}
    t = np.linspace(0, 1, 12, dtype=np.float32)[:, None, None] ** 0.8
    sky = np.asarray(zenith, np.float32) * (1 - t) + np.asarray(s.fog, np.float32) * t
    cloud = np.clip(_noise(rng, (12, 18), 6) * r.uniform(0, 0.5), 0, 1)[..., None]
    sky = sky + (np.asarray(s.light, np.float32) * 235 - sky) * cloud
    sky = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    image = Image.new("RGB", (width, height))
    image.paste(sky.resize((width, int(s.horizon) + 2), Image.Resampling.BICUBIC))
    canvas, shade = Image.new("L", image.size, SKY), Image.new("L", image.size)
    s.paint, s.annotate, s.shade = map(ImageDraw.Draw, (image, canvas, shade))
    _ground(s, r, width, height)
    _sides(s, r)
    _things(s, r)
    labels = np.asarray(canvas)[::2, ::2].copy()
    image = _develop(s, rng, image, labels, shade, size)
    _void(rng, labels)
    return image, labels, s.horizon / height


def draw_scene(rng, size):
    """A street as (image uint8 [H, W, 3], labels uint8 [H, W], 0..10 and 255) for size (H, W)."""
    return _scene(rng, size)[:2]


# ---- unknown objects -----------------------------------------------------------------------

def _unknown_shape(rng, u, v):
    """A signed distance (negative inside, half heights) and a shading about 1, on the grid u, v."""
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    kind, turn = rng.integers(8), rng.uniform(0, 2 * np.pi)
    ball = 0.75 + 0.45 * np.sqrt(np.clip(1 - rho ** 2, 0, 1)) - 0.25 * v - 0.15 * u
    if kind == 0:  # a lump
        radius = 0.74 + 0.15 * np.sin(rng.integers(2, 4) * theta + turn)
        return rho - radius - 0.1 * np.sin(rng.integers(4, 8) * theta - turn), ball
    if kind == 1:  # a star or a flower
        n, sharp = rng.integers(4, 9), rng.uniform(0.6, 2)
        return rho - 0.4 - 0.55 * np.abs(np.cos(n * theta / 2 + turn)) ** sharp, ball
    if kind == 2:  # a ring, seen askew
        off = np.hypot(u, v * rng.uniform(1.0, 1.4)) - 0.68
        return np.abs(off) - 0.27, 1.1 - 3 * off ** 2 - 0.2 * v
    if kind == 3:
        return rho - 0.96, ball
    if kind == 4:  # a pyramid and its two lit faces
        ridge = rng.uniform(-0.3, 0.3) * (v + 1) / 2
        return np.abs(u) - 0.5 * (v + 1), np.where(u < ridge, 1.15, 0.65)
    if kind == 5:  # a crate on one corner, or flat
        a = rng.choice([0, rng.uniform(0.2, 0.7)])
        p, q = u * np.cos(a) + v * np.sin(a), v * np.cos(a) - u * np.sin(a)
        return np.maximum(np.abs(p), np.abs(q)) - 0.72, np.where(p < 0.25, 1.1, 0.7)
    if kind == 6:  # a coil that stands up
        swing = rng.uniform(0.3, 0.5) * np.sin(rng.uniform(3, 6) * v + turn)
        return np.maximum(np.abs(u - swing) - 0.24, np.abs(v) - 0.98), 1.1 - 4 * (u - swing) ** 2
    return _creature(rng, u, v), 1.0 - 0.25 * v


def _creature(rng, u, v):
    """A body on four to eight legs with a long neck: the union of thick line segments."""
    side, tall = rng.choice([-1, 1]), rng.uniform(-0.1, 0.3)
    legs = np.linspace(-0.5, 0.5, rng.integers(4, 9))
    bones = [(-0.45, tall, 0.45, tall - 0.05, rng.uniform(0.2, 0.32)),
             (side * 0.45, tall, side * 0.68, -0.75, 0.12),
             (side * 0.62, -0.82, side * 0.85, -0.74, 0.14)]
    bones += [(x, tall, x * 1.15 + rng.uniform(-0.1, 0.1), 0.94, 0.06) for x in legs]
    distance = np.full(u.shape, 9.0)
    for x0, y0, x1, y1, thick in bones:
        t = ((u - x0) * (x1 - x0) + (v - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
        t = np.clip(t, 0, 1)
        bone = np.hypot(u - x0 - t * (x1 - x0), v - y0 - t * (y1 - y0)) - thick
        distance = np.minimum(distance, bone)
    return distance


def _unknown_texture(rng, u, v):
    """A pattern in [0, 1] that no surface of `draw_scene` has."""
    kind, a, turn = rng.integers(7), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    k = rng.uniform(1.5, 3.2)
    p, q = k * (u * np.cos(a) + v * np.sin(a)), k * (v * np.cos(a) - u * np.sin(a))
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    if kind == 0:
        return (np.floor(p) + np.floor(q)) % 2                                   # checks
    if kind == 1:
        return np.clip(0.5 + 3 * np.sin(4 * p + 1.2 * np.sin(2 * q + turn)), 0, 1)  # zebra
    if kind == 2:
        return np.clip(4 * (np.hypot(p % 1 - 0.5, q % 1 - 0.5) - 0.25), 0, 1)    # dots
    if kind == 3:
        return np.clip(0.5 + 3 * np.sin(rng.integers(2, 6) * theta + 9 * rho), 0, 1)  # spiral
    if kind == 4:
        return np.clip(0.5 + 3 * np.sin(14 * rho + turn), 0, 1)                  # rings
    if kind == 5:
        return 0.5 + 0.5 * np.sin(2 * p + 2 * np.sin(2 * q + turn) + 3 * rho)    # plasma
    seeds = rng.uniform(-1.1, 1.1, (14, 2))                                      # a giraffe's net
    away = np.stack([np.hypot(u - x, v - y) for x, y in seeds.astype(np.float32)])
    away.partition(1, axis=0)
    return np.clip(9 * (away[1] - away[0]) - 0.5, 0, 1)


def draw_unknown(rng, height):
    """An object that no scene has, about `height` pixels high: (rgb float [h, w, 3] in [0, 1],
    alpha float [h, w] in [0, 1]); its foot is the lower border."""
    fine = 2 if height < 100 else 1  # small ones are drawn at twice the size against jagged edges
    rows = max(6, int(height)) * fine
    half = np.linspace(-1, 1, rows, dtype=np.float32)
    u, v = np.meshgrid(half / rng.uniform(0.75, 1.35), half)
    distance, shading = _unknown_shape(rng, u, v)
    if rng.random() < 0.6:  # vivid, else the tones of earth and skin
        hues = rng.uniform(0, 1, (3, 3))
    else:
        hues = rng.uniform(0.1, 0.9, (3, 1)) * rng.uniform([1, 0.75, 0.5], [1.1, 1.0, 0.9], (3, 3))
    hues[1] = np.where(np.abs(hues[1] - hues[0]).max() < 0.35, 1 - hues[0], hues[1])
    t = _unknown_texture(rng, u, v)[..., None]
    rgb = hues[0] * (1 - t) + hues[1] * t
    rgb += 0.15 * (hues[2] - hues[1]) * np.sin(3 * u + 2 * v)[..., None]
    rgb = np.clip(rgb * np.clip(shading, 0.4, 1.3)[..., None], 0, 1)
    alpha = np.clip(0.5 - distance * rows / 2 / fine, 0, 1)
    if fine == 2:
        rgb, alpha = (x.reshape(rows // 2, 2, rows // 2, 2, -1).mean((1, 3)) for x in (rgb, alpha))
    alpha = alpha.reshape(alpha.shape[:2]).astype(np.float32)
    (top, *_, foot), (left, *_, right) = (np.flatnonzero((alpha > 0.5).any(i)) for i in (1, 0))
    box = slice(max(0, top - 1), foot + 1), slice(max(0, left - 1), right + 2)
    return rgb[box].astype(np.float32), alpha[box]


def _stand(rng, size, horizon, labels):
    """Foot (x, y), height in pixels, and whether it stands behind what is known there."""
    height, width = size
    x, drop = rng.uniform(0.12, 0.88) * width, rng.triangular(0.12, 0.5, 0.92) * (1 - horizon)
    behind = False
    if labels is not None and rng.random() < 0.5:  # at a car's or a person's side, before or behind
        rows, columns = np.nonzero((labels >= CAR) & (labels <= BICYCLIST))
        near = rows > (horizon + 0.1) * height
        rows, columns = rows[near], columns[near]
        if len(rows):
            x = columns[rng.integers(len(rows))]
            foot = rows[columns == x].max() / height
            x, behind = x + rng.normal(0, 0.06) * width, rng.random() < 0.4
            drop = max(0.08, foot - horizon + (-0.03 if behind else 0.05))
    # an eye 1.5 m above the ground sees an object of m metres m / 1.5 times as high as its foot is
    # below the horizon
    tall = min(0.7, drop * rng.uniform(0.7, 2.0) / 1.5) * height
    return x, (horizon + drop) * height, max(8.0, 0.09 * height, tall), behind


def paste_unknowns(image, rng, horizon=0.45, labels=None):
    """Composite one to three unknown objects into any street image.

    image: uint8 [H, W, 3]; horizon: its height from the top as a fraction. Their size follows the
    perspective, their light and grain the image's. With labels (uint8 [H, W]) some stand at, or
    half behind, known objects. Returns a new image and the mask uint8 [H, W], 1 on the objects.
    """
    image, mask = image.copy(), np.zeros(image.shape[:2], np.uint8)
    height, width = mask.shape
    street = image[int(horizon * height):]  # without the sky, which is too bright to match
    coarse = street[::max(1, height // 64), ::max(1, width // 64)].reshape(-1, 3).astype(np.float32)
    dark, bright = np.percentile(coarse, (3, 97), axis=0)
    patch = image[height // 4:height // 4 + 256, width // 4:width // 4 + 256].astype(np.float32)
    grain = min(10.0, float(np.median(np.abs(np.diff(patch, axis=1)))))  # about the noise's sigma
    places = [_stand(rng, (height, width), horizon, labels) for _ in range(rng.integers(1, 4))]
    for x, foot, tall, behind in sorted(places, key=lambda place: place[1]):  # far ones first
        rgb, alpha = draw_unknown(rng, tall)
        top, left = int(foot) - alpha.shape[0], int(x) - alpha.shape[1] // 2
        y0, y1 = max(0, top), min(height, int(foot))
        x0, x1 = max(0, left), min(width, left + alpha.shape[1])
        if y1 - y0 < 3 or x1 - x0 < 3:
            continue
        rgb, alpha = (a[y0 - top:y1 - top, x0 - left:x1 - left] for a in (rgb, alpha))
        window = image[y0:y1, x0:x1].astype(np.float32)
        if behind and labels is not None:
            known = (labels[y0:y1, x0:x1] >= CAR) & (labels[y0:y1, x0:x1] <= BICYCLIST)
            alpha = alpha * (~known if (alpha * ~known).mean() > 0.25 * alpha.mean() else 1)
        _contact(image, x, foot, tall)
        local = window.mean() / max(1.0, float(coarse.mean()))
        rgb = (dark + rgb * (bright - dark)) * np.clip(local, 0.5, 1.5) ** 0.5
        rgb = rgb + rng.normal(0, grain, rgb.shape)
        alpha = alpha[..., None]
        window = image[y0:y1, x0:x1] * (1 - alpha) + rgb * alpha
        image[y0:y1, x0:x1] = np.clip(window + 0.5, 0, 255)
        mask[y0:y1, x0:x1] |= alpha[..., 0] > 0.5
    return image, mask


def _contact(image, x, foot, tall):
    """Darken the ground at a foot, softly, in place."""
    rx, ry = 0.55 * tall, max(1.5, 0.1 * tall)
    y0, y1 = max(0, int(foot - 2 * ry)), min(image.shape[0], int(foot + 2 * ry) + 1)
    x0, x1 = max(0, int(x - 2 * rx)), min(image.shape[1], int(x + 2 * rx) + 1)
    dy, dx = (np.arange(y0, y1) - foot) / ry, (np.arange(x0, x1) - x) / rx
    fade = 1 - 0.5 * np.exp(-2 * (dy[:, None] ** 2 + dx ** 2))
    image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * fade[..., None]


def draw_ood_scene(rng, size):
    """A scene with unknown objects: (image uint8 [H, W, 3], mask uint8 [H, W]), 1 on them, 0 on
    the known, 255 where the scene is void."""
    image, labels, horizon = _scene(rng, size)
    image, mask = paste_unknowns(image, rng, horizon, labels)
    mask[(labels == VOID) & (mask == 0)] = VOID
    return image, mask


# ------------------------------------------------------------------------------ out-of-distribution sets


class PastedObjects(Dataset):
    """Unknown objects of the synthetic set composited into the images of `dataset`, the same for the same index.

    Indexing gives an `EvalSample` whose labels are the mask: 1 on an object, 255 where the image is void, else 0.
    """

    def __init__(self, dataset: SegmentationDataset):
        self.dataset, self.stem = dataset, dataset.stem

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EvalSample:
        image, mask = self.dataset.read(index)
        pasted, objects = paste_unknowns(np.array(image), np.random.default_rng([PASTED, index]))
        void = self.dataset.labels(mask, index) >= IGNORED  # held-out classes are unknown too: no negatives
        anomaly = np.where(objects == 1, 1, np.where(void, VOID, 0)).astype(np.uint8)
        image = to_input(Image.fromarray(pasted), self.dataset.image_size)
        return EvalSample(image, torch.from_numpy(anomaly), index)


def open_ood(spec: str, dataset: SegmentationDataset) -> Dataset:
    """The OOD set that `spec` names, its images at the input size of the evaluation set `dataset`.

    "pasted": unknown objects in the images of `dataset`; "synthetic": the split `ood` of the drawn scenes.
    """
    if spec == "pasted":
        return PastedObjects(dataset)
    if spec == "synthetic":
        return SyntheticScenes("ood", dataset.image_size)
    raise DataError(f"--ood {spec}: no such set; choose synthetic, held-out or pasted")
