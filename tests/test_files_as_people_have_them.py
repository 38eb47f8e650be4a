"""Files as they lie on people's disks. The first line of each test is what a user saw."""

import errno
import fcntl
import json
import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from conftest import flags_of, scene, small, write_folder
from PIL import Image

import data
import evaluate
import model
import train_ensemble
from data import VOID, DataError, open_dataset

# ------------------------------------------------------------------------------ files


def save(path, array, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **settings)
    return path


def save_pair(root, name, suffix="png", mask_suffix="png", shade=None):
    """An image of the split `train` in the layout `folder` and its mask; of one shade, if given."""
    image, labels = scene(np.random.default_rng(1))
    if shade is not None:
        image[:] = shade
    save(root / f"labels/train/{name}.{mask_suffix}", labels)
    return save(root / f"images/train/{name}.{suffix}", image)


def write_voc(root, images, lines):
    """A data set in the layout of VOC: images by name with their shades, and the list's content."""
    for name, shade in images.items():
        image, labels = scene(np.random.default_rng(1), classes=21)
        image[:] = shade
        save(root / "JPEGImages" / name, image)
        save(root / "SegmentationClass" / f"{name.rpartition('.')[0]}.png", labels)
    listing = root / "ImageSets/Segmentation/train.txt"
    listing.parent.mkdir(parents=True)
    content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
    listing.write_bytes(content)
    return root


def shades(dataset):
    """The mean of each image, by which `write_voc` and `save_pair` tell them apart."""
    return [round(float(np.asarray(dataset.read(i)[0]).mean())) for i in range(len(dataset))]


def file_names(dataset):
    return [path.name for path in dataset.images]


def an_epoch(root, out, *flags):
    """Flags that train a member for an epoch."""
    return small(root, "--epochs", 1, "--members", 1, "--out", out, *flags)


def refused(call, *words):
    """What `call` raises is one line with all words."""
    with pytest.raises(DataError) as error:
        call()
    message = str(error.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ names


def test_a_voc_list_with_dots_in_its_names_trained_on_copies_of_one_image(tmp_path):
    """A list with cam.1, cam.2, cam.3 beside a cam.jpg trained on four copies of cam.jpg."""
    images = {"cam.jpg": 10, "cam.1.jpg": 60, "cam.2.jpg": 110, "cam.3.jpg": 160}
    write_voc(tmp_path, images, ["cam", "cam.1", "cam.2", "cam.3"])
    dataset = open_dataset("voc", tmp_path, "train")
    assert shades(dataset) == [10, 60, 110, 160]
    assert dataset.names == ["cam", "cam.1", "cam.2", "cam.3"]


def test_names_of_an_export_and_names_with_spaces_were_not_found(tmp_path):
    """`x_jpg.rf.0f3a` (an export of Roboflow) and `IMG 1` were "no mask" of half their name."""
    images = {"x_jpg.rf.0f3a.jpg": 10, "IMG 1.jpg": 60, "IMG  (2).jpg": 110, "a.jpg b.jpg": 160}
    images |= {"y.png.jpg": 190, "line\u2028end.jpg": 220}
    lines = ["x_jpg.rf.0f3a", "IMG 1", "IMG  (2)", "a.jpg b.jpg", "y.png", "line\u2028end"]
    write_voc(tmp_path / "a", images, lines)
    assert shades(open_dataset("voc", tmp_path / "a", "train")) == [10, 60, 110, 160, 190, 220]
    write_voc(tmp_path / "b", {"IMG 1.jpg": 10}, ["IMG 2"])
    refused(lambda: open_dataset("voc", tmp_path / "b", "train"), "no image", "IMG 2.jpg")


def test_a_line_is_split_where_it_names_two_files(tmp_path):
    """A list of image and mask in each line, as SBD's, whose names have spaces and dots."""
    lines = [
        "/JPEGImages/IMG 1.jpg /SegmentationClass/IMG 1.png",
        "JPEGImages/cam.1.jpg\tSegmentationClass/cam.1.png",
        "/data/VOC/JPEGImages/cam.2.jpg   /data/VOC/SegmentationClass/cam.2.png",
        r"JPEGImages\b.jpg SegmentationClass\b.png",
    ]
    images = {"IMG 1.jpg": 10, "cam.1.jpg": 60, "cam.2.jpg": 110, "b.jpg": 160}
    write_voc(tmp_path, images, lines)
    assert shades(open_dataset("voc", tmp_path, "train")) == [10, 60, 110, 160]


def test_suffixes_in_upper_case(tmp_path):
    """Masks called x.PNG were not found, though images called x.PNG were."""
    write_folder(tmp_path, train=1)
    save_pair(tmp_path, "DSC 1", suffix="JPG", mask_suffix="PNG")
    save_pair(tmp_path, "town/x.y", suffix="PNG", mask_suffix="Png")
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.names == ["0", "DSC 1", "town_x.y"]

    image, labels = scene(np.random.default_rng(0))
    for suffix in ("png", "PNG"):
        save(tmp_path / f"leftImg8bit/val/bonn/bonn_{suffix}_leftImg8bit.{suffix}", image)
        save(tmp_path / f"gtFine/val/bonn/bonn_{suffix}_gtFine_labelIds.{suffix}", labels)
    assert len(open_dataset("cityscapes", tmp_path, "val")) == 2

    write_voc(tmp_path, {"a.JPG": 10, "b.png": 60, "c.jpeg": 110}, ["a", "b", "c"])
    assert shades(open_dataset("voc", tmp_path, "train"))[:2] == [10, 60]


def test_accents_that_macos_writes_in_two_characters(tmp_path):
    """Masks zipped on a Mac: the "é" of their names is not the "é" of the images' names."""
    write_folder(tmp_path, train=1)
    image, labels = scene(np.random.default_rng(1))
    save(tmp_path / "images/train" / unicodedata.normalize("NFC", "café.png"), image)
    save(tmp_path / "labels/train" / unicodedata.normalize("NFD", "café.png"), labels)
    assert len(open_dataset("folder", tmp_path, "train")) == 2

    name = unicodedata.normalize("NFD", "Straße à la côte.jpg")
    write_voc(tmp_path, {name: 10}, [unicodedata.normalize("NFC", "Straße à la côte")])
    assert shades(open_dataset("voc", tmp_path, "train")) == [10]


def test_a_list_that_a_windows_shell_or_an_old_editor_wrote(tmp_path):
    """`dir /b > train.txt` of PowerShell is UTF-16; names in Latin-1 are no UTF-8."""
    write_voc(tmp_path / "a", {"é.1.jpg": 10}, "é.1.jpg\r\n".encode("utf-16"))
    assert shades(open_dataset("voc", tmp_path / "a", "train")) == [10]
    latin = os.fsdecode(b"caf\xe9.1.jpg")
    write_voc(tmp_path / "b", {latin: 10}, b"caf\xe9.1\n")
    assert file_names(open_dataset("voc", tmp_path / "b", "train")) == [latin]


def test_a_list_with_folders_in_its_names(tmp_path):
    """town1/1 and town2/1 of a list were both read as JPEGImages/1.jpg."""
    write_voc(tmp_path / "a", {"t1/1.jpg": 10, "t2/1.jpg": 60, "1.jpg": 110}, ["t1/1", "t2/1", "1"])
    dataset = open_dataset("voc", tmp_path / "a", "train")
    assert shades(dataset) == [10, 60, 110] and len(set(dataset.names)) == 3
    write_voc(tmp_path / "b", {"1.jpg": 10}, ["t1/1", "t2/1"])
    refused(lambda: open_dataset("voc", tmp_path / "b", "train"), "'t1/1'", "'t2/1'", "1.jpg")


def test_maps_of_files_without_a_suffix(tmp_path, trained, command):
    """--predict wrote the maps of `cam.1`, a photo without a suffix, as those of `cam`."""
    image, _ = scene(np.random.default_rng(0))
    for name in ("cam.1", "x.2.jpg"):
        save(tmp_path / "photos" / name, image, format="PNG")
    out = tmp_path / "out"
    student = trained[1] / "student.pt"
    code, _, err = command(
        "evaluate", "--student", student, "--predict", tmp_path / "photos", "--out", out
    )
    assert code == 0, err
    written = {path.name for path in out.glob("*_classes.png")}
    assert written == {"cam.1_classes.png", "x.2_classes.png"}


def test_images_of_a_kind_that_is_not_read_are_counted(tmp_path, command):
    """Images called .jfif (a Windows browser) or .gif were left out without a word."""
    root = write_folder(tmp_path / "data")
    image, _ = scene(np.random.default_rng(0))
    save(root / "images/train/x.jfif", image, format="JPEG")
    save(root / "images/train/y.GIF", image)
    (root / "images/train/notes.txt").write_text("no image")
    code, _, err = command("train", *an_epoch(root, tmp_path / "ckpts"))
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("warning: 2 files of the split train are left out, the first is ")
    assert "x.jfif; images end in .png, .jpg" in err


# ------------------------------------------------------------------------------ links


def linked_folder(tmp_path):
    """The layout `folder`, with a folder of images and one of masks that are links."""
    root = write_folder(tmp_path / "data", train=1)
    save_pair(tmp_path / "elsewhere", "far")
    for kind in ("images", "labels"):
        (root / kind / "train/town").symlink_to(tmp_path / f"elsewhere/{kind}/train")
    return root


def test_a_linked_folder_of_images_was_skipped_without_a_word(tmp_path):
    """A folder of images/train that is a link (one disk was full) was not trained on."""
    root = linked_folder(tmp_path)
    assert open_dataset("folder", root, "train").names == ["0", "town_far"]
    assert len(data.open_images("--in-distribution", root / "images/train", None)) == 2


def test_a_linked_folder_is_predicted(tmp_path, trained, command):
    """--predict of a folder with a link to a folder wrote no maps of what is in that."""
    root = linked_folder(tmp_path)
    (root / "images/train/loop").symlink_to(root / "images/train")
    flags = ("--predict", root / "images/train", "--out", tmp_path / "out")
    code, out, err = command("evaluate", "--student", trained[1] / "student.pt", *flags)
    assert code == 0 and "2 images in" in out, err
    assert (tmp_path / "out/town/far_classes.png").is_file()


def test_links_in_a_circle_end(tmp_path):
    """A link to the folder above it gave "Too many levels of symbolic links", files twice or, in
    the training, the validation images."""
    root = linked_folder(tmp_path)
    for kind in ("images", "labels"):
        (root / kind / "train/loop").symlink_to("..")
        (root / kind / "train/self").symlink_to(root / kind / "train")
    assert open_dataset("folder", root, "train").names == ["0", "town_far"]
    image, labels = scene(np.random.default_rng(0), classes=2)
    save(tmp_path / "ood/images/1.png", image)
    save(tmp_path / "ood/labels/1.png", labels)
    (tmp_path / "ood/images/loop").symlink_to(tmp_path / "ood/images")
    ood = data.open_ood(str(tmp_path / "ood"), open_dataset("folder", root, "val"))
    assert ood.dataset.names == ["1"]


def test_a_link_that_leads_nowhere_is_no_missing_image(tmp_path):
    """Images that git-annex or DVC has not fetched are links to nowhere: fewer were trained on."""
    root = write_folder(tmp_path / "data", train=2)
    gone = root / "images/train/gone.png"
    gone.symlink_to(tmp_path / "annex/gone.png")
    for call in (
        lambda: open_dataset("folder", root, "train"),
        lambda: data.open_images("--in-distribution", root / "images/train", None),
    ):
        refused(call, gone, tmp_path / "annex/gone.png", "mend or remove it")
    gone.unlink()
    mask = root / "labels/train/1.png"
    mask.unlink()
    mask.symlink_to(tmp_path / "annex/1.png")
    refused(lambda: open_dataset("folder", root, "train"), mask, "annex/1.png", "mend it")


# ------------------------------------------------------------------------------ hidden files


def hide_files(folder):
    """What macOS, Jupyter and editors leave in a folder of pictures."""
    picture = next(folder.glob("*.png"))
    (folder / f"._{picture.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    for name in (".ipynb_checkpoints", ".thumbnails", ".Trash-1000/files"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0-checkpoint.png").write_bytes(picture.read_bytes())
    (folder / ".#0.png").symlink_to("me@laptop.1234")
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


def test_hidden_files_are_no_images(tmp_path):
    """._0.png of a Mac's disk and .ipynb_checkpoints were images without a mask, or broken ones."""
    root = write_folder(tmp_path / ".cache/data", train=2)  # a folder that is named may be hidden
    hide_files(root / "images/train")
    assert open_dataset("folder", root, "train").names == ["0", "1"]
    assert len(data.open_images("--in-distribution", root / "images/train", None)) == 2

    image, labels = scene(np.random.default_rng(0), classes=2)
    save(tmp_path / "ood/images/1.png", image)
    save(tmp_path / "ood/labels/1.png", labels)
    hide_files(tmp_path / "ood/images")
    hide_files(tmp_path / "ood/labels")
    ood = data.open_ood(str(tmp_path / "ood"), open_dataset("folder", root, "val"))
    assert ood.dataset.names == ["1"] and ood.protocol["skipped"] == {}

    for kind in ("train", "trainannot"):
        save(tmp_path / "camvid" / kind / "1.png", labels if "annot" in kind else image)
        hide_files(tmp_path / "camvid" / kind)
    assert open_dataset("camvid", tmp_path / "camvid", "train").names == ["1"]


def test_hidden_files_are_not_predicted(tmp_path, trained, command):
    """--predict reported ._0.png as a skipped image and predicted .ipynb_checkpoints."""
    root = write_folder(tmp_path / "data", train=2)
    hide_files(root / "images/train")
    flags = ("--predict", root / "images/train", "--out", tmp_path / "out")
    code, out, err = command("evaluate", "--student", trained[1] / "student.pt", *flags)
    assert code == 0 and "2 images in" in out and "skipped" not in out, err


# ------------------------------------------------------------------------------ the same name twice


def test_two_images_of_one_line_or_one_mask(tmp_path):
    """a.png beside a.jpeg with one mask: which of them is the image?"""
    write_voc(tmp_path / "a", {"a.png": 10, "a.jpeg": 60}, ["a"])
    refused(lambda: open_dataset("voc", tmp_path / "a", "train"), "a.png", "a.jpeg", "remove one")
    write_voc(tmp_path / "b", {"a.png": 10, "a.jpg": 60}, ["a.png"])
    assert shades(open_dataset("voc", tmp_path / "b", "train")) == [10]

    write_folder(tmp_path / "c", train=1)
    files = [save_pair(tmp_path / "c", "x", suffix) for suffix in ("jpg", "JPG")]
    refused(lambda: open_dataset("folder", tmp_path / "c", "train"), *files, "both have the mask")
    files[0].unlink()
    masks = []
    (tmp_path / "c/labels/train/x.png").unlink()
    for suffix in ("PNG", "Png"):
        masks.append(
            save(tmp_path / f"c/labels/train/x.{suffix}", scene(np.random.default_rng(1))[1])
        )
    refused(lambda: open_dataset("folder", tmp_path / "c", "train"), *masks, "remove one of them")


def test_scores_of_an_ood_set_that_is_called_like_the_split(tmp_path, trained, command):
    """--save-scores wrote the maps of --ood photos/val over those of the split val."""
    image, labels = scene(np.random.default_rng(0), classes=2)
    save(tmp_path / "val/images/0.png", image)
    save(tmp_path / "val/labels/0.png", labels)
    flags = ("--ood", tmp_path / "val", "--out", tmp_path / "out", "--panels", 0)
    networks = ("--student", trained[1] / "student.pt")
    code, _, err = command("evaluate", *networks, *flags, "--save-scores", tmp_path / "scores")
    assert code == 2 and "both called val" in err and err.count("\n") == 1
    assert command("evaluate", *networks, *flags)[0] == 0


def test_two_ood_sets_whose_panels_have_one_name(tmp_path, trained, command):
    """The panel of b_1 in the set a was that of 1 in the set a_b, twice."""
    image, labels = scene(np.random.default_rng(0), classes=2)
    for path in ("a/images/b_1", "a_b/images/1"):
        save(tmp_path / f"{path}.png", image)
        save(tmp_path / f"{path.replace('images', 'labels')}.png", labels)
    flags = ("--ood", tmp_path / "a", tmp_path / "a_b", "--out", tmp_path / "out")
    code, _, err = command("evaluate", "--student", trained[1] / "student.pt", *flags)
    assert code == 2 and "2 sets have an image a_b_1" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------ masks, classes.txt


def masks_with(root, classes, values, pictures=False):
    """The layout `folder` with this classes.txt, and masks of these values, or RGB `pictures`."""
    write_folder(root, train=3, val=2)
    (root / "classes.txt").write_text(classes)
    for path in (root / "labels").rglob("*.png"):
        labels = np.asarray(Image.open(path)) % len(values)
        save(path, np.array(values, np.uint8)[labels])
    return root


def test_masks_of_0_and_255_trained_on_one_class(tmp_path, command):
    """Masks 0 / 255 for two classes: 255 is void, and the val mIoU was 100.00."""
    root = masks_with(tmp_path / "data", "background\ncrack\n", [0, 255])
    code, _, err = command("train", *an_epoch(root, tmp_path / "ckpts"))
    assert code == 0
    warnings = err.splitlines()
    assert len(warnings) == 2
    for warning, split in zip(warnings, ("train", "val"), strict=True):
        assert warning.startswith("warning: every labelled pixel is 'background' in the ")
        assert f"masks of the split {split}, which hold 0, 255;" in warning
        assert "255 is void here" in warning and "classes.txt can say with NAME = VALUE" in warning
    networks = ("--teacher", tmp_path / "ckpts/member_00.pt", "--mc-samples", 2)
    code, _, err = command("evaluate", *networks, "--out", tmp_path / "out")
    assert code == 0 and "warning: every labelled pixel is 'background'" in err


def test_masks_of_0_and_255_as_two_classes(tmp_path, command):
    """The same masks, read without converting them."""
    root = masks_with(tmp_path / "data", "background = 0\ncrack = 255\n", [0, 255])
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ["background", "crack"]
    assert set(np.unique(dataset[0].labels)) == {0, 1}
    code, _, err = command("train", *an_epoch(root, tmp_path / "ckpts"))
    assert code == 0 and err == ""


def test_values_of_any_numbering_in_classes_txt(tmp_path):
    """Masks in the numbers of another tool, several of which are one class, or void."""
    classes = "road = 7\nnot road=11\nVoid = 0\nroad =  200 \nvoid = 255\na = b = 9\n"
    root = masks_with(tmp_path, classes, [7, 11, 0, 200])
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ["road", "not road", "a = b"]
    assert dataset.palette == data.bit_palette(4)[1:]
    _, mask = dataset.read(0)
    raw, labels = np.asarray(mask), dataset[0].labels.numpy()
    for value, label in {7: 0, 11: 1, 0: VOID, 200: 0}.items():
        assert (labels[raw == value] == label).all()
    held_out = open_dataset("folder", root, "train", hold_out=["not road"])
    assert held_out.classes == ["road", "a = b"]

    warning = data.label_warnings(dataset, "train", training=True)
    assert len(warning) == 1 and warning[0].startswith("no pixel is 'a = b' in the 3 masks")
    assert "which hold 0, 7, 11, 200;" in warning[0] and "0, 255 is void here" in warning[0]
    assert data.label_warnings(dataset, "val", training=False) == []


def test_masks_in_colours(tmp_path, command):
    """CamVid's own masks are pictures: "mode RGB, not one class number a pixel; convert it"."""
    classes = "Sky = 128 128 128\nRoad = 128,64,128\nVoid = 0\nCar = 64 0 128\nCar = 64 128 192\n"
    colours = [(128, 128, 128), (128, 64, 128), (0, 0, 0), (64, 128, 192)]
    root = masks_with(tmp_path / "data", classes, colours)
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ["Sky", "Road", "Car"]
    assert dataset.palette == [(128, 128, 128), (128, 64, 128), (64, 0, 128)]
    picture = np.asarray(Image.open(dataset.masks[0]))
    labels = dataset[0].labels.numpy()
    for colour, label in zip(colours, (0, 1, VOID, 2), strict=True):
        assert (labels[(picture == colour).all(-1)] == label).all()
    Image.open(dataset.masks[0]).quantize(8).save(dataset.masks[0])  # the same with a palette
    assert (dataset[0].labels.numpy() == labels).all()

    flags = an_epoch(root, tmp_path / "ckpts", "--cache", tmp_path / "cache")
    assert command("train", *flags)[0] == 0
    lines = classes.splitlines()
    (root / "classes.txt").write_text("\n".join([lines[3], *lines]))
    refused(lambda: open_dataset("folder", root, "train"), "gives 64 0 128 to 'Car' and to 'Car'")
    (root / "classes.txt").write_text("\n".join([*lines[1:], lines[0]]))  # another order
    changed = open_dataset("folder", root, "train")
    data.cache_decoded(changed, tmp_path / "cache")
    assert set(changed[1].labels.unique().tolist()) <= {0, 1, 2, VOID}
    assert (changed[0].labels.numpy()[labels == 0] == 2).all()


def test_what_classes_txt_does_not_name_is_an_error(tmp_path):
    """A value or a colour that nobody named became an error that did not say where to name it."""
    root = masks_with(tmp_path / "a", "one = 1\ntwo = 2\n", [1, 2, 255, 0])
    dataset = open_dataset("folder", root, "train")
    message = refused(lambda: dataset[0], "holds 0, 255, no label of folder", "void = 0")
    assert "classes.txt has 1..2; give each value a line there" in message
    refused(lambda: data.label_warnings(dataset, "train", True), "no label of folder")

    root = masks_with(tmp_path / "b", "a = 1 2 3\nb = 4 5 6\n", [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    message = refused(lambda: open_dataset("folder", root, "train")[0], "NAME = 7 8 9")
    assert message.startswith("the mask ") and "classes.txt lacks, 1 in all: 7 8 9;" in message

    for content, words in {
        "a (1, 2, 3)\nb\n": ("the line 'a (1, 2, 3)'", "a colour is given as NAME = R G B"),
        "a = 1\nb\n": ("the line 'b'", "NAME = VALUE or NAME = R G B"),
        "a = 1\nb = 256\n": ("the line 'b = 256'", "0 to 255"),
        "a = 1\nb = 1 2\n": ("the line 'b = 1 2'",),
        "a = 1\nb = x\n": ("the line 'b = x'",),
        "a = 1\n= 2\n": ("the line '= 2'",),
        "a = 1\nb = 1\n": ("gives 1 to 'a' and to 'b'",),
        "a = 1\na = 2\nvoid = 3": ("names 1 classes",),
    }.items():
        (root / "classes.txt").write_text(content)
        refused(lambda: open_dataset("folder", root, "train"), *words)


def test_names_alone_are_numbered_as_ever(tmp_path):
    """Names alone: the number of the line, and a class may be called void."""
    root = write_folder(tmp_path, classes=4)
    (root / "classes.txt").write_text("void\nb\nclass 2\n7\n")
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ["void", "b", "class 2", "7"]
    assert set(np.unique(dataset[0].labels)) <= {0, 1, 2, 3, VOID}


def test_grey_masks_that_a_library_saved_as_pictures(tmp_path):
    """OpenCV and many tools save three equal channels, some with alpha: "has mode RGB"."""
    root = write_folder(tmp_path, train=3)
    dataset = open_dataset("folder", root, "train")
    before = [sample.labels.numpy() for sample in dataset]
    for path, mode in zip(dataset.masks, ("RGB", "RGBA", "LA"), strict=True):
        Image.open(path).convert(mode).save(path)
    after = [sample.labels.numpy() for sample in open_dataset("folder", root, "train")]
    assert all((one == other).all() for one, other in zip(before, after, strict=True))
    see_through = np.zeros((40, 56, 4), np.uint8)
    save(dataset.masks[1], see_through)
    refused(lambda: open_dataset("folder", root, "train"), "mode RGBA", "NAME = R G B")


def test_many_masks_are_counted_by_a_sample_that_is_stated(tmp_path, monkeypatch):
    """Counting every mask of a large data set would take minutes."""
    root = write_folder(tmp_path, train=9, classes=2)
    dataset = open_dataset("folder", root, "train")
    monkeypatch.setattr(data, "FEW_PIXELS", 3 * 40 * 56 - 1)
    monkeypatch.setattr(data, "MANY_PIXELS", 5 * 40 * 56 - 1)
    assert data.count_values(dataset).masks == 3
    (root / "classes.txt").write_text("a\nb\nc\n")
    dataset = open_dataset("folder", root, "train")
    (warning,) = data.label_warnings(dataset, "train", training=True)
    assert warning.startswith("no pixel is 'c' in a sample of 5 of the 9 masks of the split train")


def test_a_split_without_a_labelled_pixel(tmp_path):
    """All masks 255: the loss was 0 and the mIoU was no number."""
    root = write_folder(tmp_path)
    for path in (root / "labels/train").iterdir():
        save(path, np.full((40, 56), VOID, np.uint8))
    (warning,) = data.label_warnings(open_dataset("folder", root, "train"), "train", True)
    assert warning.startswith("no pixel has a class in the 5 masks of the split train")


# ------------------------------------------------------------------------------ before training


def test_a_bad_file_of_either_split_is_found_before_the_first_step(tmp_path, command):
    """A mask of the validation split that cannot be used was found after an epoch of training."""
    image, labels = scene(np.random.default_rng(0))
    bad = {
        "size": lambda path: save(path, labels[:20]),
        "mode": lambda path: save(path, image),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "value": lambda path: save(path, np.full_like(labels, 9)),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:90]),
        "gone": lambda path: path.unlink(),
    }
    for split in ("train", "val"):
        for name, spoil in bad.items():
            root = write_folder(tmp_path / split / name)
            mask = root / f"labels/{split}/2.png"
            spoil(mask)
            out = root / "ckpts"
            code, _, err = command("train", *an_epoch(root, out))
            assert code == 2 and str(mask) in err and err.count("\n") == 1, (split, name, err)
            assert not out.exists()


def test_a_bad_image_of_an_ood_set_is_found_before_the_evaluation(tmp_path, trained, command):
    """The OOD set comes last: its bad mask was found after hours."""
    image, labels = scene(np.random.default_rng(0), classes=2)
    save(tmp_path / "set/images/0.png", image)
    mask = save(tmp_path / "set/labels/0.png", labels[:20])
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos/0.png"
    photo.write_bytes(b"")
    student = ("--student", trained[1] / "student.pt", "--out", tmp_path / "out")
    code, _, err = command("evaluate", *student, "--ood", tmp_path / "set")
    assert code == 2 and str(mask) in err and not (tmp_path / "out").exists()
    flags = ("--ood", "pasted", "--in-distribution", tmp_path / "photos")
    code, _, err = command("evaluate", *student, *flags)
    assert code == 2 and str(photo) in err and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ metadata


def png_chunk(kind, content, broken=False):
    checksum = zlib.crc32(kind + content) ^ broken
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def insert_chunk(path, chunk, before):
    """Put a chunk into a PNG file before the first chunk of the kind `before`."""
    content = path.read_bytes()
    start = content.index(before) - 4
    path.write_bytes(content[:start] + chunk + content[start:])


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


DAMAGED = (b"\x01\x02 no EXIF", b"MM", b"II*\0\xff\xff\xff\x7f", b"")


def test_a_damaged_exif_block_does_not_spoil_an_image(tmp_path, trained, command, recwarn):
    """A good photo with a damaged EXIF block: "cannot read the image; restore or remove it"."""
    image, _ = scene(np.random.default_rng(0))
    folder = tmp_path / "photos"
    for number, content in enumerate(DAMAGED):
        path = save(folder / f"{number}.png", image)
        insert_chunk(path, png_chunk(b"eXIf", content), b"IDAT")
        path = save(folder / f"late{number}.png", image)
        insert_chunk(path, png_chunk(b"eXIf", content), b"IEND")
        path = save(folder / f"checksum{number}.png", image)
        insert_chunk(path, png_chunk(b"eXIf", content, broken=True), b"IDAT")
        save(folder / f"{number}.jpg", image, exif=b"Exif\0\0" + content)
    path = save(folder / "text.png", image)
    long_text = b"XML:com.adobe.xmp\0" + zlib.compress(b"x" * 2**21)
    insert_chunk(path, png_chunk(b"zTXt", long_text), b"IDAT")
    for path in sorted(folder.glob("*.png")):
        assert (np.asarray(data.read_image(path)) == image).all(), path
    flags = ("--predict", folder, "--out", tmp_path / "out")
    code, out, err = command("evaluate", "--student", trained[1] / "student.pt", *flags)
    assert code == 0 and "17 images in" in out and "skipped" not in out, err


@pytest.mark.parametrize("number", range(1, 9))
def test_a_mask_with_an_orientation_is_turned_like_its_image(tmp_path, number):
    """Image and mask of a phone, both with its orientation: "a mask has the size of its image"."""
    root = write_folder(tmp_path, train=2)
    image, labels = scene(np.random.default_rng(0))
    save(root / "images/train/1.png", image, exif=orientation(number))
    mask = save(root / "labels/train/1.png", labels, exif=orientation(number))
    dataset = open_dataset("folder", root, "train")
    shown, shown_mask = dataset.read(1)
    colour_of = {label: image[labels == label].mean(0) for label in np.unique(labels)}
    for label, colour in colour_of.items():
        assert np.allclose(np.asarray(shown)[np.asarray(shown_mask) == label].mean(0), colour)
    height, width = (56, 40) if number > 4 else (40, 56)
    assert shown.size == shown_mask.size == (width, height)
    assert dataset.mask_sizes == [(40, 56), (height, width)]
    assert dataset.largest_mask() == (max(40, height), 56)

    if number > 4:  # of one file alone the sizes differ, which the headers tell
        save(mask, labels)
        refused(lambda: open_dataset("folder", root, "train"), mask, "EXIF tag")
        save(mask, np.asarray(shown_mask))
        assert open_dataset("folder", root, "train").mask_sizes[1] == (height, width)


def test_damaged_pixels_are_no_damaged_exif(tmp_path):
    """A picture that was copied by half is still refused, with or without EXIF."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in ("a.png", "b.jpg"):
        path = save(tmp_path / name, noise, exif=orientation(6))
        path.write_bytes(path.read_bytes()[:3000])
        refused(lambda path=path: data.read_image(path), "cannot read the image", path)


def test_metadata_change_no_pixel(tmp_path):
    """What PIL turns by itself is what is read here."""
    from PIL import ImageOps

    image, _ = scene(np.random.default_rng(0))
    for number in range(10):
        for suffix in ("png", "jpg", "webp", "tif"):
            path = save(tmp_path / f"{number}.{suffix}", image, exif=orientation(number))
            with Image.open(path) as opened:
                expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
            assert (np.asarray(data.read_image(path)) == expected).all()
            header = data.read_header("image", path)
            assert (header.height, header.width) == expected.shape[:2]


def test_the_report_of_metrics_still_has_every_image(tmp_path, trained, command):
    """Names with dots and spaces get as many score maps as there are images."""
    root = write_folder(tmp_path / "data", val=1)
    for name in ("cam.1", "cam.2", "a/cam", "b/cam 1"):
        image, labels = scene(np.random.default_rng(1))
        save(root / f"images/val/{name}.png", image)
        save(root / f"labels/val/{name}.png", labels)
    flags = ("--data", root, "--save-scores", tmp_path / "scores", "--out", tmp_path / "out")
    code, _, err = command("evaluate", "--student", trained[1] / "student.pt", *flags)
    assert code == 0, err
    maps = {path.stem for path in (tmp_path / "scores/val/student-dudes").iterdir()}
    assert maps == {"0", "cam.1", "cam.2", "a_cam", "b_cam 1"}
    assert len(list((tmp_path / "out/panels").glob("*.png"))) == 5
    assert json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]["images"] == 5


# ------------------------------------------------------------------------------ further files


def test_folders_of_network_disks_and_recycle_bins_hold_no_images(tmp_path, trained, command):
    """Synology's thumbnails and deleted pictures were predicted, or were images without a mask."""
    root = write_folder(tmp_path / "data", train=2)
    image, _ = scene(np.random.default_rng(0))
    folder = root / "images/train"
    for below in ("@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "#recycle/a.png", "__MACOSX/0.png"):
        save(folder / below, image)
    save(folder / "$RECYCLE.BIN/S-1-5/$R1.png", image)
    assert open_dataset("folder", root, "train").names == ["0", "1"]
    assert len(data.open_images("--in-distribution", folder, None)) == 2
    flags = ("--predict", folder, "--out", tmp_path / "out")
    code, out, err = command("evaluate", "--student", trained[1] / "student.pt", *flags)
    assert code == 0 and "\n2 images in" in out, err
    # Who names such a folder means it.
    assert len(data.open_images("--in-distribution", folder / "#recycle", None)) == 1


def test_a_link_to_a_folder_above_all_others_ends(tmp_path):
    """images/train/up led to the data folder itself: masks were trained on as images."""
    root = write_folder(tmp_path / "data", train=2)
    for kind in ("images", "labels"):
        (root / kind / "train/up").symlink_to(root)
    assert open_dataset("folder", root, "train").names == ["0", "1"]


def test_a_pipe_called_like_an_image_is_refused(tmp_path):
    """A link x.png to /dev/null, or a pipe: one image less, without a word."""
    root = write_folder(tmp_path, train=2)
    image = root / "images/train/1.png"
    image.unlink()
    os.mkfifo(image)
    refused(lambda: open_dataset("folder", root, "train"), image, "no image", "remove it")
    image.unlink()
    image.symlink_to("/dev/null")
    refused(lambda: open_dataset("folder", root, "train"), image, "no image", "remove it")
    image.unlink()
    mask = root / "labels/train/0.png"
    mask.unlink()
    mask.mkdir()
    refused(lambda: open_dataset("folder", root, "train"), mask, "what is there is no file")


def test_names_of_the_longest_length(tmp_path, trained, command):
    """A name of 255 bytes: the maps and panels of it and of all later images were not written."""
    root = write_folder(tmp_path / "data", val=1)
    image, labels = scene(np.random.default_rng(1))
    for name in ("x" * 251, "é" * 125 + "1", "é" * 125 + "2", "/".join(3 * ["town" * 20])):
        save(root / f"images/val/{name}.png", image)
        save(root / f"labels/val/{name}.png", labels)
    student = ("--student", trained[1] / "student.pt")
    flags = ("--data", root, "--save-scores", tmp_path / "scores", "--out", tmp_path / "out")
    code, _, err = command("evaluate", *student, *flags)
    assert code == 0, err
    assert len(list((tmp_path / "scores/val/student-dudes").iterdir())) == 5
    assert len(list((tmp_path / "out/panels").iterdir())) == 5
    flags = ("--predict", root / "images/val", "--out", tmp_path / "maps")
    code, _, err = command("evaluate", *student, *flags)
    assert code == 0, err
    assert len(list((tmp_path / "maps").rglob("*_classes.png"))) == 5


def test_maps_are_not_the_next_runs_images(tmp_path, trained, command):
    """--predict photos --out photos/maps, twice: the second run made maps of the maps."""
    image, _ = scene(np.random.default_rng(0))
    photos = tmp_path / "photos"
    save(photos / "1.png", image)
    student = ("--student", trained[1] / "student.pt", "--predict", photos)
    for _ in range(2):
        code, out, err = command("evaluate", *student, "--out", photos / "maps")
        assert code == 0 and "\n1 image in" in out, err
    code, _, err = command("evaluate", *student, "--out", photos)
    assert code == 2 and f"--out {photos} is the folder of the images" in err


def test_a_picture_of_the_user_stays_among_the_panels(tmp_path, trained, command):
    """Every PNG file in OUT/panels was taken for an old panel, and removed."""
    image, _ = scene(np.random.default_rng(0))
    mine = save(tmp_path / "panels/best_of_my_holiday.png", image)
    flags = ("--student", trained[1] / "student.pt", "--out", tmp_path)
    for count in (2, 1):
        assert command("evaluate", *flags, "--panels", count)[0] == 0
        assert mine.exists() and len(list((tmp_path / "panels").iterdir())) == count + 1


def test_a_colon_in_the_path_of_an_ood_set(tmp_path, trained):
    """--ood of a folder called 12:30 was "no folder 12"."""
    dataset = open_dataset("folder", trained[0], "val")
    image, labels = scene(np.random.default_rng(0), classes=2)
    save(tmp_path / "12:30/images/0.png", image)
    save(tmp_path / "12:30/labels/0.png", labels)
    assert len(data.open_ood(str(tmp_path / "12:30"), dataset).dataset) == 1


def test_images_that_nothing_is_called_after_may_share_names(tmp_path):
    """--in-distribution refused a.jpg beside a.png, though no file is called after them."""
    image, _ = scene(np.random.default_rng(0))
    for name in ("a.jpg", "a.png", "b/c.png", "b_c.png"):
        save(tmp_path / name, image)
    assert len(data.open_images("--in-distribution", tmp_path, None)) == 4


def test_a_comment_in_classes_txt_is_no_class(tmp_path):
    """A line "# my classes" became class 0, and every other class the next one's name."""
    root = write_folder(tmp_path)
    (root / "classes.txt").write_text("# my classes\na\nb\nc\nd\n")
    refused(lambda: open_dataset("folder", root, "train"), "'# my classes'", "remove it")


def test_photos_of_phones_that_are_not_read_are_counted(tmp_path):
    """images/train with .HEIC photos beside .jpg ones: the former were left out silently."""
    root = write_folder(tmp_path, train=2)
    (root / "images/train/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    dataset = open_dataset("folder", root, "train")
    (warning,) = data.split_warnings(dataset, "train", True)
    assert "IMG_1.HEIC" in warning and "1 files" in warning


def test_a_jpeg_is_no_mask(tmp_path):
    """JPEG masks renamed to .png: a tenth of the labels were others, without a word."""
    root = write_folder(tmp_path, train=1)
    mask = root / "labels/train/0.png"
    with Image.open(mask) as opened:
        opened.convert("L").save(mask, format="JPEG")
    refused(lambda: open_dataset("folder", root, "train"), mask, "JPEG", "export")
    refused(lambda: data.read_mask(mask), mask, "JPEG", "export")


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_two_or_four_bits_a_pixel(tmp_path, bits):
    """Of 4 bits, PIL makes 17 of a 1, which is another class where there are more than 17."""
    path = tmp_path / "0.png"
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0\x01\x01"))
    path.write_bytes(data.PNG_SIGNATURE + header + pixels + png_chunk(b"IEND", b""))
    refused(lambda: data.read_mask(path), path, f"{bits} bits", "8 bits")
    assert data.read_mask(path, [(0, 0, 0), (17, 17, 17), (85, 85, 85)]).size == (4, 1)


def test_an_image_of_fractions_is_not_black(tmp_path):
    """A float TIFF with values from 0 to 1 was trained on as a black image."""
    path = save(tmp_path / "0.tif", np.full((4, 4), 0.5, np.float32))
    refused(lambda: data.read_image(path), path, "fractions", "8 or 16 bits")


def test_what_turns_a_png_may_lie_in_xmp_or_behind_the_pixels(tmp_path):
    """The header said 56x40, the pixels 40x56: found in the middle of the training."""
    image, _ = scene(np.random.default_rng(0))
    tags = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    for number, before in enumerate((b"IDAT", b"IEND")):
        path = save(tmp_path / f"xmp{number}.png", image)
        insert_chunk(path, png_chunk(b"iTXt", tags), before)
    path = save(tmp_path / "exif.png", image)
    insert_chunk(
        path, png_chunk(b"eXIf", orientation(6).tobytes().removeprefix(b"Exif\0\0")), b"IEND"
    )
    for path in tmp_path.iterdir():
        header = data.read_header("image", path)
        upright = data.read_image(path)
        assert (header.height, header.width) == (upright.height, upright.width) == (56, 40), path


def resized(path, width, height):
    """Let a PNG file say another size of itself; returns its path."""
    before, _, after = path.read_bytes().partition(b"IHDR")
    header = png_chunk(b"IHDR", struct.pack(">II", width, height) + after[8:13])
    path.write_bytes(before[:-4] + header + after[17:])
    return path


def test_a_map_of_too_many_pixels_says_so(tmp_path):
    """A drone's map: "could be decompression bomb DOS attack; restore or remove the file"."""
    path = save(tmp_path / "0.png", np.zeros((4, 4), bool))
    resized(path, 20000, 10000)
    refused(lambda: data.read_header("image", path), path, "178,956,970 pixels", "cut it")


def test_words_of_pil_are_not_the_users(tmp_path, recwarn):
    """Two lines about a "decompression bomb DOS attack" for an image that is read well."""
    path = save(tmp_path / "0.png", np.zeros((4, 4), bool))
    assert data.read_header("image", resized(path, 10000, 10000)).height == 10000
    data.read_image(save(tmp_path / "1.jpg", np.zeros((4, 4), np.uint8), exif=b"Exif\0\0II*\0\x08"))
    assert not recwarn.list


def test_a_large_file_that_is_no_image_is_refused_at_once(tmp_path, monkeypatch):
    """A gigabyte of zeros called x.png was read as a whole to say that it is no image."""
    path = tmp_path / "x.png"
    with open(path, "wb") as file:
        file.truncate(2**30)
    monkeypatch.setattr(data.Path, "read_bytes", None)
    refused(lambda: data.read_header("image", path), path, "cannot identify")


def test_a_cache_on_a_disk_without_locks(tmp_path, monkeypatch):
    """--cache on a network disk: "No locks available"."""
    root = write_folder(tmp_path / "data")

    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    plain = open_dataset("folder", root, "train")
    for _ in range(2):
        cached = open_dataset("folder", root, "train")
        data.cache_decoded(cached, tmp_path / "cache")
        assert (plain[4].image == cached[4].image).all()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".bin", ".npy", ".lock"}


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_half_a_cache_is_made_anew(tmp_path, suffix):
    """After a loss of power: "EOF: reading array header", or a memory map that is too short."""
    root = write_folder(tmp_path / "data")
    plain = open_dataset("folder", root, "train")
    for _ in range(2):
        cached = open_dataset("folder", root, "train")
        data.cache_decoded(cached, tmp_path / "cache")
        assert (plain[4].image == cached[4].image).all()
        (kept,) = (tmp_path / "cache").glob(f"*{suffix}")
        os.truncate(kept, kept.stat().st_size // 2)


def test_names_cannot_break_a_line(tmp_path, capsys):
    """A name of a file with a line break or an escape code, in an error or a warning."""

    def refuse():
        raise DataError("no mask a\nb\x1b[2J\tc.png; add it")

    assert evaluate.exit_code_of(refuse) == 2
    assert capsys.readouterr().err == "error: no mask a b\\x1b[2J\\tc.png; add it\n"


def test_a_training_does_not_go_on_with_other_images(tmp_path):
    """Images were removed while a training was interrupted: it continued on what was left."""
    flags = flags_of()
    path = tmp_path / "member_00.state"
    model.save_atomically(path, {"args": flags.recorded, "training_images": 6})
    with pytest.raises(model.UsageError, match="begun with 6 training images, now there are 4"):
        train_ensemble.load_state(path, None, None, None, flags, 4)
    # and before a student's stored targets, which are of other images then, are made anew
    with pytest.raises(model.UsageError, match="begun with 6 training images, now there are 4"):
        train_ensemble.refuse_other_command(path.with_suffix(".pt"), flags.recorded, 4)
    train_ensemble.refuse_other_command(path.with_suffix(".pt"), flags.recorded, 6)
