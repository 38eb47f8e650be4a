"""Readers on files in the publishers' layouts, training views, loaders, the drawn scenes."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scene, write_folder
from PIL import Image
from processes import in_two_processes

import data
from data import IGNORED, VOID, DataError, EpochBatches, TrainingViews, open_dataset


def save(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image = image.convert("L")
        image.putpalette(palette)  # mode P, as the publisher's masks
    image.save(path)
    return path


# ------------------------------------------------------------------------------ layouts


def test_camvid(tmp_path):
    image, labels = scene(np.random.default_rng(0), (360, 480), 12)  # 11 is void
    for split, suffix in (("train", "png"), ("val", "jpg")):
        save(tmp_path / split / f"0001TP_006690.{suffix}", image)
        save(tmp_path / f"{split}annot" / "0001TP_006690.png", labels)
    dataset = open_dataset("camvid", tmp_path, "train")
    assert dataset.classes[0] == "sky" and dataset.classes[-1] == "bicyclist"
    assert len(dataset.classes) == 11 and dataset.names == ["0001TP_006690"]
    sample = dataset[0]
    assert sample.image.shape == (3, 360, 480) and sample.image.dtype == torch.uint8
    np.testing.assert_array_equal(sample.labels, np.where(labels == 11, VOID, labels))
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0), image)
    assert len(open_dataset("camvid", tmp_path, "val")) == 1
    for unknown in (12, 254):
        mask = Image.fromarray(np.full((4, 4), unknown, np.uint8))
        with pytest.raises(DataError, match=f"holds {unknown}, no label of camvid"):
            dataset.to_labels(mask, 0)
    assert (dataset.to_labels(Image.new("L", (4, 4), VOID), 0) == VOID).all()


def test_cityscapes_at_its_size_and_mapping(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 34, (8, 16)), np.ones((128, 128), int)).astype(np.uint8)
    image = rng.integers(0, 256, (1024, 2048, 3)).astype(np.uint8)
    stem = "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png"
    save(tmp_path / stem, image)
    save(tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", ids)
    save(tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_color.png", image)
    dataset = open_dataset("cityscapes", tmp_path, "val", image_size=(512, 1024))
    sample = dataset[0]
    assert sample.image.shape == (3, 512, 1024) and sample.labels.shape == (1024, 2048)
    # the publisher's table: 7 road, 8 sidewalk, 11 building, 24 person, 26 car, 33 bicycle
    trained = {7: 0, 8: 1, 11: 2, 24: 11, 26: 13, 33: 18}
    for number, train_id in (trained | dict.fromkeys((0, 29, 30, 6), VOID)).items():
        assert (sample.labels.numpy()[ids == number] == train_id).all()
    assert dataset.classes[0] == "road" and dataset.classes[18] == "bicycle"
    assert len(dataset.classes) == 19
    assert dataset.names == ["lindau_000000_000019_leftImg8bit"]

    for unknown in (34, 254, 255):  # the licence plate is -1, which a mask holds as 255 at most
        mask = Image.fromarray(np.full((4, 4), unknown, np.uint8))
        if unknown == VOID:
            assert (dataset.to_labels(mask, 0) == VOID).all()
        else:
            with pytest.raises(DataError, match=f"holds {unknown}, no label of cityscapes"):
                dataset.to_labels(mask, 0)


def test_cityscapes_table():
    ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    values = dict.fromkeys((*range(34), 255), VOID)
    for train_id, number in enumerate(ids):
        values[number] = train_id
    assert data.LAYOUTS["cityscapes"].values == values
    assert " ".join(data.CITYSCAPES_CLASSES) == (
        "road sidewalk building wall fence pole traffic light traffic sign vegetation terrain sky "
        "person rider car truck bus train motorcycle bicycle"
    )
    assert data.CITYSCAPES_CLASSES["road"] == (128, 64, 128)
    assert data.CITYSCAPES_CLASSES["bicycle"] == (119, 11, 32)


@pytest.mark.parametrize("prefix", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_palette_masks(tmp_path, prefix):
    root = tmp_path / prefix
    image, labels = scene(np.random.default_rng(0), (366, 500), 21)
    labels[:5] = 255
    palette = np.array(data.bit_palette(256), np.uint8).tobytes()
    for stem in ("2007_000032", "2007_000039"):
        save(root / "JPEGImages" / f"{stem}.jpg", image)
    save(root / "SegmentationClass" / "2007_000032.png", labels, palette)
    save(root / "SegmentationClassAug" / "2007_000039.png", labels)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2007_000039.jpg /SegmentationClassAug/2007_000039.png\n"
    )
    assert Image.open(root / "SegmentationClass" / "2007_000032.png").mode == "P"
    for split in ("train", "trainaug"):
        dataset = open_dataset("voc", tmp_path, split)
        np.testing.assert_array_equal(dataset[0].labels, labels)
    assert dataset.palette[:3] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    assert dataset.palette[15] == (192, 128, 128)


def test_folder_with_subfolders_and_16_bit_masks(tmp_path):
    write_folder(tmp_path, train=2, val=1)
    image, labels = scene(np.random.default_rng(1))
    save(tmp_path / "images/train/town/x.jpg", image)
    save(tmp_path / "labels/train/town/x.png", labels.astype(np.uint16))
    dataset = open_dataset("folder", tmp_path, "train")
    assert len(dataset) == 3 and dataset.classes == [f"class {c}" for c in range(4)]
    assert dataset.names == ["0", "1", "town_x"]
    np.testing.assert_array_equal(dataset[2].labels, labels)


def test_images_of_any_mode(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    picture = Image.fromarray(grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    picture.save(tmp_path / "grey.png")
    picture.convert("RGBA").save(tmp_path / "rgba.png")
    picture.convert("P").save(tmp_path / "palette.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "picture.webp")
    for path in tmp_path.iterdir():
        image = data.read_image(path)
        assert image.mode == "RGB" and image.size == ((3, 4) if path.stem == "turned" else (4, 3))


# ------------------------------------------------------------------------------ names


def save_pair(root, name, suffix="png"):
    """An image of the split `train` in the layout `folder`, and its mask."""
    image, labels = scene(np.random.default_rng(1))
    image_file = save(root / f"images/train/{name}.{suffix}", image)
    save(root / f"labels/train/{name}.png", labels)
    return image_file


def refused_naming(files, open_it):
    """What `open_it` raises is one line with both files."""
    with pytest.raises(DataError) as error:
        open_it()
    message = str(error.value)
    assert all(str(file) in message for file in files) and "\n" not in message
    return message


def test_a_name_is_the_whole_path_below_the_folder_of_the_images(tmp_path):
    write_folder(tmp_path, train=1)
    for name in ("a/x/1", "b/x/1", "b/1"):
        save_pair(tmp_path, name)
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.names == ["0", "a_x_1", "b_1", "b_x_1"]


def test_images_of_one_name_are_refused(tmp_path):
    write_folder(tmp_path, train=1)
    files = [save_pair(tmp_path, name) for name in ("a/b_c", "a_b/c")]
    message = refused_naming(files, lambda: open_dataset("folder", tmp_path, "train"))
    assert "a_b_c" in message and "rename" in message


def test_names_of_cityscapes_are_the_publishers(tmp_path):
    image, labels = scene(np.random.default_rng(0))

    def save_frame(city, stem):
        save(tmp_path / f"gtFine/val/{city}/{stem}_gtFine_labelIds.png", labels)
        return save(tmp_path / f"leftImg8bit/val/{city}/{stem}_leftImg8bit.png", image)

    save_frame("bonn", "bonn_1")
    save_frame("ulm", "ulm_1")
    names = open_dataset("cityscapes", tmp_path, "val").names
    assert names == ["bonn_1_leftImg8bit", "ulm_1_leftImg8bit"]
    save_frame("ulm", "bonn_1")  # no longer told apart by the stem
    names = open_dataset("cityscapes", tmp_path, "val").names
    assert names == [
        "bonn_bonn_1_leftImg8bit",
        "ulm_bonn_1_leftImg8bit",
        "ulm_ulm_1_leftImg8bit",
    ]


def test_names_of_ood_sets_and_of_images_without_labels(tmp_path, folder):
    split = open_dataset("folder", folder, "val")
    image, labels = scene(np.random.default_rng(0), classes=2)

    def save_anomaly(name):
        save(tmp_path / f"set/labels/{name}.png", labels)
        return save(tmp_path / f"set/images/{name}.png", image)

    def names():
        return data.open_ood(str(tmp_path / "set"), split).dataset.names

    save_anomaly("a/x/1")
    save_anomaly("b/x/2")
    assert names() == ["1", "2"]
    save_anomaly("b/x/1")
    assert names() == ["a_x_1", "b_x_1", "b_x_2"]
    files = [save_anomaly(name) for name in ("a/x/b_1", "a/x_b/1")]
    message = refused_naming(files, lambda: data.open_ood(str(tmp_path / "set"), split))
    assert "a_x_b_1" in message and "rename" in message
    # No file is called after an image without labels.
    images = data.open_images("--in-distribution", tmp_path / "set/images", None)
    assert len(images) == len(set(images.names)) == 5


def test_names_of_images_in_two_folders(tmp_path, folder):
    split = open_dataset("folder", folder, "val")
    image, labels = scene(np.random.default_rng(0), classes=2)
    for town, number in (("t5", 1), ("t5", 2), ("t6", 1)):
        place = f"{town}/{number}.png"
        save(tmp_path / "one/test/images/test" / place, image)
        save(tmp_path / "two/test/annotations/test" / place, np.minimum(labels + 1, 14))
    spec = f"streethazards:{tmp_path / 'one'}:{tmp_path / 'two'}"
    assert data.open_ood(spec, split).dataset.names == ["t5_1", "t5_2", "t6_1"]


def test_every_data_set_has_names(folder):
    split = open_dataset("folder", folder, "val", hold_out=["class 1"])
    for spec in ("pasted", "held-out", "synthetic"):
        ood = data.open_ood(spec, split)
        assert len(set(ood.dataset.names)) == len(ood.dataset)
    assert data.open_ood("pasted", split).dataset.names == split.names == ["0", "1", "2"]
    assert data.SyntheticScenes("val").names[7] == "val_0007"


def test_two_images_with_one_mask_are_refused(tmp_path):
    write_folder(tmp_path / "folder", train=1)
    files = [save_pair(tmp_path / "folder", "town/x", suffix) for suffix in ("png", "jpg")]
    message = refused_naming(files, lambda: open_dataset("folder", tmp_path / "folder", "train"))
    assert "both have the mask" in message and "remove" in message

    image, labels = scene(np.random.default_rng(0))
    files = [save(tmp_path / f"train/0001.{suffix}", image) for suffix in ("png", "jpg")]
    save(tmp_path / "trainannot/0001.png", labels)
    refused_naming(files, lambda: open_dataset("camvid", tmp_path, "train"))


def test_an_image_that_is_listed_twice_is_no_two_images(tmp_path):
    image, labels = scene(np.random.default_rng(0), classes=21)
    save(tmp_path / "JPEGImages/1.jpg", image)
    save(tmp_path / "SegmentationClass/1.png", labels)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("1\n1\n")
    assert open_dataset("voc", tmp_path, "train").names == ["1", "1"]


# ------------------------------------------------------------------------------ bad input


def test_every_bad_file_is_named(tmp_path):
    def broken(change, words):
        root = write_folder(tmp_path / words[0].replace("/", "_"), train=2, val=1)
        change(root)
        with pytest.raises(DataError) as error:
            dataset = open_dataset("folder", root, "train")
            [dataset[i] for i in range(len(dataset))]
        message = str(error.value)
        assert all(word in message for word in words) and "\n" not in message

    image, labels = scene(np.random.default_rng(0))
    mask = "labels/train/1.png"
    broken(lambda r: (r / mask).unlink(), ["no mask", "1.png"])
    broken(lambda r: save(r / mask, labels[:20]), ["is 56x20", "1.png", "56x40"])
    broken(lambda r: save(r / mask, np.full_like(labels, 9)), ["holds 9", "1.png"])
    broken(lambda r: save(r / mask, image), ["mode RGB", "1.png"])
    broken(
        lambda r: (r / mask).write_bytes((r / mask).read_bytes()[:60]),
        ["cannot read the mask", "1.png"],
    )
    broken(
        lambda r: (r / "images/train/0.png").write_bytes(b"no image"),
        ["cannot read the image", "0.png"],
    )
    broken(lambda r: (r / "classes.txt").unlink(), ["classes.txt", "a name a line"])
    broken(lambda r: (r / "classes.txt").write_text("one\n"), ["names 1 classes", "classes.txt"])
    broken(lambda r: [p.unlink() for p in (r / "images/train").iterdir()], ["no images"])


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "voc", "folder"])
def test_a_wrong_folder_shows_the_layout(tmp_path, name):
    with pytest.raises(DataError, match="needs --data DIR"):
        open_dataset(name, None, "train")
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(name, tmp_path / "gone", "train")
    with pytest.raises(DataError, match="has no folder"):
        open_dataset(name, tmp_path, "train")


def test_hold_out(folder):
    whole = open_dataset("folder", folder, "train")
    dataset = open_dataset("folder", folder, "train", hold_out=["class 1"])
    assert dataset.classes == ["class 0", "class 2", "class 3"]
    assert dataset.palette[1] == whole.palette[2]
    before, after = whole[0].labels, dataset[0].labels
    for old, new in {0: 0, 1: IGNORED, 2: 1, 3: 2, VOID: VOID}.items():
        assert (after[before == old] == new).all()
    with pytest.raises(DataError, match="no such class.*class 0, class 1"):
        open_dataset("folder", folder, "train", hold_out=["cat"])
    with pytest.raises(DataError, match="leaves 1 classes"):
        open_dataset("folder", folder, "train", hold_out=["class 1", "class 2", "class 0"])


# ------------------------------------------------------------------------------ training views


def views(dataset, crop=(32, 32), scale=(0.5, 2.0), stream=(1, 2, 3), repeat=0, jitter=0.0):
    return TrainingViews(dataset, crop, scale, list(stream), repeat, jitter)


def test_views_are_a_function_of_stream_epoch_and_index(folder):
    dataset = open_dataset("folder", folder, "train")
    one, same, other = views(dataset), views(dataset), views(dataset, stream=(4, 5, 6))
    for key in ((0, 0), (3, 1)):
        assert torch.equal(one[key].images, same[key].images)
        assert torch.equal(one[key].labels, same[key].labels)
        assert not torch.equal(one[key].images, other[key].images)
    assert not torch.equal(one[0, 0].images, one[1, 0].images)


def test_views_repeat_scale_and_crop_but_not_the_flip(folder):
    dataset = open_dataset("folder", folder, "train")
    repeating, free = views(dataset, repeat=2), views(dataset, repeat=10)
    flips = set()
    for epoch in range(8):
        now, first = repeating[epoch, 0], repeating[epoch % 2, 0]
        assert now.view == epoch % 2
        flips.add(now.flip != first.flip)
        back = now.images.flip(-1) if now.flip != first.flip else now.images
        assert torch.equal(back, first.images)
        # K >= epochs: the batches of --views 0, bit for bit
        assert torch.equal(free[epoch, 0].images, views(dataset)[epoch, 0].images)
    assert flips == {True, False}


def test_crop_before_resize_equals_resize_before_crop():
    rng = np.random.default_rng(0)
    image, labels = scene(rng, (60, 90), 4)
    image, labels = Image.fromarray(image), Image.fromarray(labels)
    for scale in (0.5, 0.8, 1.0, 1.7):
        seed = np.random.default_rng(5)
        source = data.ImageAndMask(image, labels)
        part, mask = data.random_crop(source, (60, 90), scale, (32, 40), seed)
        full = (round(60 * scale), round(90 * scale))
        seed = np.random.default_rng(5)
        top = int(seed.integers(full[0] - part.height + 1))
        left = int(seed.integers(full[1] - part.width + 1))
        window = (left, top, left + part.width, top + part.height)
        expected = image.resize(full[::-1], Image.Resampling.BILINEAR).crop(window)
        difference = np.abs(np.asarray(part, int) - np.asarray(expected, int))[2:-2, 2:-2]
        assert difference.max() <= 2, scale  # the border's filter sees the crop alone
        expected = labels.resize(full[::-1], Image.Resampling.NEAREST).crop(window)
        assert (np.asarray(mask) == np.asarray(expected)).mean() > 0.99


def test_padding_is_told_from_void(folder):
    dataset = open_dataset("folder", folder, "train")
    sample = views(dataset, crop=(64, 64), scale=(1.0, 1.0))[0, 0]
    assert (sample.labels == IGNORED).sum() == 64 * 64 - 40 * 56
    assert (sample.labels == VOID).sum() == 56
    columns = slice(8, 64) if sample.flip else slice(0, 56)
    assert (sample.labels[:40, columns] != IGNORED).all()


def test_image_size_is_the_size_that_scales_refer_to(folder):
    dataset = open_dataset("folder", folder, "train", image_size=(20, 28))
    sample = views(dataset, crop=(20, 28), scale=(1.0, 1.0))[0, 0]
    assert (sample.labels != IGNORED).all()
    back = sample.images.flip(-1) if sample.flip else sample.images
    assert torch.equal(back, dataset[0].image)


def test_scales_are_half_below_and_half_above_one():
    dataset = data.SyntheticScenes("train")
    seen = []
    original = data.random_crop

    def spy(source, image_size, scale, crop_size, rng):
        seen.append(scale)
        return original(source, image_size, scale, crop_size, rng)

    try:
        data.random_crop = spy
        for epoch in range(200):
            views(dataset)[epoch, 0]
    finally:
        data.random_crop = original
    seen = np.array(seen)
    assert 0.5 <= seen.min() < 0.6 and 1.9 < seen.max() <= 2.0
    assert 70 <= (seen < 1).sum() <= 130 and abs(np.median(seen[seen > 1]) - 1.5) < 0.15


def test_colour_jitter_changes_colours_alone(folder):
    dataset = open_dataset("folder", folder, "train")
    plain, jittered = views(dataset)[0, 0], views(dataset, jitter=0.2)[0, 0]
    assert torch.equal(plain.labels, jittered.labels)
    assert not torch.equal(plain.images, jittered.images)


def test_images_without_labels_keep_their_proportions(tmp_path):
    Image.new("RGB", (60, 20)).save(tmp_path / "wide.png")
    sample = data.open_images("--in-distribution", tmp_path, (10, 12))[0]
    assert sample.image.shape == (3, 10, 30)
    assert sample.labels.shape == (20, 60) and (sample.labels == VOID).all()
    with pytest.raises(DataError, match="--in-distribution .*: no image is there"):
        data.open_images("--in-distribution", tmp_path / "none", None)


# ------------------------------------------------------------------------------ loaders


def same_fields(one, other):
    """Whether two samples or batches agree in every field."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def batches(dataset, workers, epochs=2, start=0):
    loader = data.training_loader(views(dataset), 2, workers, torch.device("cpu"))
    result = []
    for epoch in range(epochs):
        loader.batch_sampler.epoch = epoch
        loader.batch_sampler.start = start
        result += [(batch.images, batch.labels, batch.index, batch.flip) for batch in loader]
    return result


def test_workers_and_restarts_change_no_batch(folder):
    dataset = open_dataset("folder", folder, "train")
    alone = batches(dataset, 0)
    for one, other in zip(alone, batches(dataset, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    late = batches(dataset, 0, epochs=1, start=1)
    assert torch.equal(late[0][0], alone[1][0])
    assert alone[0][0].dtype == alone[0][1].dtype == torch.uint8


def test_a_process_ends_although_its_workers_are_still_there(folder):
    script = f"""
import torch, data
views = data.TrainingViews(data.open_dataset("folder", {str(folder)!r}, "train"), (32, 32),
                           (1.0, 1.0), [1, 2, 3])
batches = iter(data.training_loader(views, 2, 1, torch.device("cpu")))
next(batches)
data.kept = [batches]  # as a traceback keeps it
data.kept.append(data.kept)
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=60)


def test_loaders_leave_the_global_generator_alone(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batches(open_dataset("folder", folder, "train"), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "length, size, expected", [(5, 2, [2, 2]), (6, 4, [4, 2]), (3, 8, [3]), (2, 2, [2])]
)
def test_batches(length, size, expected):
    sampler = EpochBatches(length, size, [1])
    drawn = list(sampler)
    assert [len(batch) for batch in drawn] == expected and len(sampler) == len(expected)
    indices = [index for batch in drawn for _, index in batch]
    assert len(set(indices)) == len(indices)
    sampler.epoch = 1
    assert list(sampler) != drawn and all(epoch == 1 for batch in sampler for epoch, _ in batch)


def test_a_single_image_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        EpochBatches(1, 8, [1])
    with pytest.raises(DataError, match="a batch of 3 of the 9 training images.*2 processes"):
        EpochBatches(9, 3, [1], rank=0, world=2)


def test_processes_share_each_batch(folder):
    whole = list(EpochBatches(11, 4, [1]))
    shares = [list(EpochBatches(11, 4, [1], rank, 2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 2  # three images are too few for two processes
    for batch, first, second in zip(whole[:2], *shares, strict=True):
        assert first == batch[::2] and second == batch[1::2]

    dataset = open_dataset("folder", folder, "train")
    seen = []
    for rank in range(2):
        loader = data.evaluation_loader(dataset, 2, 0, torch.device("cpu"), rank, 2)
        seen.append([index for runs in loader for run in runs for index in run.index.tolist()])
    assert seen == [[0, 2, 4], [1, 3]]
    loader = data.training_loader(views(dataset), 4, 0, torch.device("cpu"), 1, 2)
    assert [len(batch.index) for batch in loader] == [2]


def test_small_images_pass_several_at_a_time():
    assert data.images_per_pass(4, 80 * 120) == 16  # the drawn scenes
    assert data.images_per_pass(4, 120 * 180) == 7
    assert data.images_per_pass(4, 180 * 240) == 4
    assert data.images_per_pass(4, 8 * 8) == 16
    assert data.images_per_pass(2, 1024 * 2048) == 2


@pytest.mark.parametrize("device, labels, sizes", [
    ("cpu", (40, 60), [16, 4]), ("cpu", (120, 180), [7, 7, 2, 4]), ("cpu", (480, 720), 10 * [2]),
    ("cuda", (40, 60), 10 * [2]),
])  # fmt: skip
def test_passes_are_filled_by_what_is_larger_of_image_and_labels(device, labels, sizes):
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    dataset = [data.EvalSample(image, torch.zeros(labels), number) for number in range(20)]
    loader = data.evaluation_loader(dataset, 2, 0, torch.device(device), fill_passes=True)
    loader = data.DataLoader(dataset, loader.batch_size, collate_fn=loader.collate_fn)
    batches = [batch for run in loader for batch in run]
    assert [len(batch.index) for batch in batches] == sizes
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(20))


def test_evaluation_batches_hold_equal_sizes(tmp_path):
    write_folder(tmp_path, train=1, val=2)
    image, labels = scene(np.random.default_rng(1), (24, 32))
    save(tmp_path / "images/val/1b.png", image)
    save(tmp_path / "labels/val/1b.png", labels)
    loader = data.evaluation_loader(
        open_dataset("folder", tmp_path, "val"), 8, 0, torch.device("cpu")
    )
    runs = [run for batch in loader for run in batch]
    assert [tuple(run.labels.shape) for run in runs] == [(2, 40, 56), (1, 24, 32)]
    assert [i for run in runs for i in run.index.tolist()] == [0, 1, 2]


# ------------------------------------------------------------------------------ drawn scenes


def test_scenes_are_the_same_for_the_same_index():
    one, other = data.SyntheticScenes("train"), data.SyntheticScenes("train")
    other[1]  # the order of drawing does not matter
    assert torch.equal(one[0].image, other[0].image) and torch.equal(one[0].labels, other[0].labels)
    assert not torch.equal(one[0].image, data.SyntheticScenes("val")[0].image)


def test_scenes_show_every_class():
    dataset = data.SyntheticScenes("train")
    labels = np.stack([dataset[i].labels.numpy() for i in range(40)])
    present = [(labels == c).any(axis=(1, 2)).mean() for c in range(11)]
    assert min(present) > 0.35 and set(np.unique(labels)) <= {*range(11), VOID}


@pytest.mark.parametrize("size", [(32, 48), (97, 65), (180, 240)])
def test_scenes_of_any_size(size):
    image, labels = data.draw_scene(np.random.default_rng(0), size)
    assert image.shape == (*size, 3) and labels.shape == size
    assert image.dtype == labels.dtype == np.uint8


def test_ood_scenes_have_masks():
    dataset = data.SyntheticScenes("ood")
    masks = np.stack([dataset[i].labels.numpy() for i in range(20)])
    assert set(np.unique(masks)) == {0, 1, 255} and 0.01 < (masks == 1).mean() < 0.2


def test_pasted_objects_are_where_the_mask_says(folder):
    dataset = open_dataset("folder", folder, "val", hold_out=["class 1"])
    pasted = data.open_ood("pasted", dataset).dataset
    for index in range(len(dataset)):
        plain, labels, _ = dataset[index]
        image, mask, _ = pasted[index]
        assert torch.equal(image, pasted[index].image)
        assert (mask == 1).any() and ((mask == VOID) == ((labels >= IGNORED) & (mask != 1))).all()
        changed = (image != plain).any(dim=0)
        assert changed[mask == 1].float().mean() > 0.8


# ------------------------------------------------------------------------------ cache


def test_decoded_files_change_no_sample(tmp_path, folder):
    image, labels = scene(np.random.default_rng(1), (61, 33))
    save(folder / "images/train/odd.png", image)
    save(folder / "labels/train/odd.png", labels)
    plain = open_dataset("folder", folder, "train", image_size=(50, 70))
    cached = open_dataset("folder", folder, "train", image_size=(50, 70))
    data.cache_decoded(cached, tmp_path / "cache")
    size = 0
    for path in plain.images:
        width, height = Image.open(path).size
        size += 4 * width * height
    (kept,) = (tmp_path / "cache").glob("*.bin")
    assert kept.stat().st_size == size
    assert cached[0].index == 0 and cached.decoded.bytes is not None
    cached = pickle.loads(pickle.dumps(cached))  # as for a worker
    assert cached.decoded.bytes is None
    for index in range(len(plain)):
        assert same_fields(plain[index], cached[index])
        assert same_fields(views(plain, (24, 40))[3, index], views(cached, (24, 40))[3, index])
        for one, other in zip(plain.read(index), cached.read(index), strict=True):
            assert one.mode == other.mode and one.size == other.size
            np.testing.assert_array_equal(one, other)


def test_a_changed_file_makes_the_cache_anew(tmp_path, folder):
    def sample():
        dataset = open_dataset("folder", folder, "val")
        data.cache_decoded(dataset, tmp_path)
        return dataset[0]

    def stamps():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.bin")}

    before = sample().image
    stamp = stamps()
    assert len(stamp) == 1
    assert torch.equal(sample().image, before)  # read, not made again
    assert stamps() == stamp
    image = np.asarray(Image.open(folder / "images/val/0.png"))
    save(folder / "images/val/0.png", 255 - image)
    assert torch.equal(sample().image, 255 - before)
    mask = np.array(Image.open(folder / "labels/val/0.png"))
    mask[-1] = VOID
    save(folder / "labels/val/0.png", mask)
    assert (sample().labels[-1] == VOID).all()


def test_a_cache_that_could_not_be_finished_leaves_nothing(tmp_path, folder):
    dataset = open_dataset("folder", folder, "val")
    (folder / "images/val/2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2.png"):
        data.cache_decoded(dataset, tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    assert dataset.decoded is None
    with pytest.raises(DataError, match="drawn scenes"):
        data.cache_decoded(data.SyntheticScenes("val"), tmp_path)


def test_a_fingerprint_tells_path_size_and_time(tmp_path):
    first = tmp_path / "a"
    first.write_text("one")
    before = data.fingerprint([first])
    assert len(before) == 16 and data.fingerprint([first]) == before
    os.utime(first, (0, 0))
    assert data.fingerprint([first]) != before
    first.rename(tmp_path / "b")
    assert len({before, data.fingerprint([tmp_path / "b"]), data.fingerprint([])}) == 3
    assert data.fingerprint(data.SyntheticScenes("train").images) == data.fingerprint([])


def fill(number, folder, cache):
    dataset = open_dataset("folder", folder, "train")
    data.cache_decoded(dataset, cache)
    np.save(cache / f"process{number}.npy", dataset[4].image.numpy())


def test_two_processes_share_a_cache(tmp_path, folder):
    cache = tmp_path / "cache"
    in_two_processes(fill, folder, cache)
    assert len(list(cache.glob("folder-*.bin"))) == len(list(cache.glob("folder-*.npy"))) == 1
    expected = open_dataset("folder", folder, "train")[4].image.numpy()
    for number in range(2):
        np.testing.assert_array_equal(np.load(cache / f"process{number}.npy"), expected)
