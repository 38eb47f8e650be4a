"""Your own images in flat folders: docs/DATA.md, masks of any ending, the division by groups."""

import argparse
import re
import shlex
import shutil
import sys
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags_of, scene, small, write_folder
from PIL import Image
from test_evaluation_and_report import Terminal
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import distill
import evaluate
import train_ensemble
from data import DataError, open_dataset
from model import BACKBONES, DeepLabV3, UsageError, read_checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "DATA.md").read_text(encoding="utf-8")


def write_flat(root, names, ending=".png", classes=4):
    """Images <name>.jpg and masks <name><ending> in images/ and labels/."""
    rng = np.random.default_rng(0)
    for name in names:
        image, labels = scene(rng, classes=classes)
        for folder, file, array in (
            ("images", f"{name}.jpg", image),
            ("labels", f"{name}{ending}", labels),
        ):
            path = root / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(classes)))
    return root


def refused(open_it, *words):
    """The one line of the DataError, which has all the words."""
    with pytest.raises(DataError) as error:
        open_it()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def stems(dataset):
    return sorted(path.stem for path in dataset.images)


# ------------------------------------------------------------------------------ the page


def blocks(language):
    """The code blocks of docs/DATA.md with that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_of_the_page_runs(tmp_path, command, monkeypatch):
    """The five photographs, their classes.txt, and the three commands below them."""
    files, classes = blocks("")[:2]
    colours = [line.split(" = ")[1].split() for line in classes.splitlines()]
    palette = np.array(colours, np.uint8)
    for place in files.split():
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        image, labels = scene(np.random.default_rng(len(place)), classes=len(palette))
        if path.suffix == ".txt":
            path.write_text(classes)
        else:
            Image.fromarray(image if path.suffix == ".jpg" else palette[labels]).save(path)

    monkeypatch.chdir(tmp_path)
    outputs = []
    for line in blocks("sh")[0].splitlines():
        _, script, *flags = shlex.split(line)
        flags += ["--device", "cpu"]
        if script != "evaluate.py":
            flags += ["--epochs", "1", "--crop-size", "32", "32"]
        if script == "train_ensemble.py":
            flags += ["--parallel", "1"]
        name = script.removesuffix(".py").removesuffix("_ensemble")
        code, out, err = command(name, *flags)
        assert code == 0, err
        outputs.append(out)
    assert "2 groups; 1 with 2 images (south_*) for validation, 1 with 3" in outputs[0]
    assert "3 training and 2 validation images, 3 classes" in outputs[0]
    assert "3 training and 2 validation images, 3 classes" in outputs[1]
    assert "folder val: 2 images" in outputs[2]
    member = read_checkpoint(tmp_path / "ckpts-orchard/member_00.pt")
    assert member["args"]["val"] == 0.2
    assert member["args"]["data"] == str(tmp_path / "orchard")
    here = ("folder", Path("orchard"))
    trained_folder = member["args"]["data"]
    [warning] = evaluate.training_images_warnings(*here, "all", trained_folder)
    assert "every image of orchard, also those that the networks were trained on" in warning
    assert evaluate.training_images_warnings(*here, "val", trained_folder) == []

    # ---- the data set moves
    (tmp_path / "orchard").rename(tmp_path / "moved")
    flags = ("--student", "ckpts-orchard/student.pt", "--device", "cpu", "--panels", 0)
    code, _, err = command("evaluate", *flags)
    assert code == 2 and "no such folder: " in err and "name its folder with --data DIR" in err
    code, _, err = command("distill", "--teacher", "ckpts-orchard", "--device", "cpu")
    assert code == 2 and "name its folder with --data DIR" in err
    code, _, err = command("distill", "--teacher", "ckpts-orchard", "--val", 0.5, "--data", "moved")
    assert code == 2 and "the teacher was trained with 0.2" in err

    code, out, err = command("evaluate", *flags, "--data", "moved", "--split", "all", "--out", "r")
    assert code == 0 and "folder all: 5 images" in out and "were trained" not in err


def test_the_page_has_what_the_readme_had_of_layouts_and_ood_sets():
    for name in data.DATASETS:
        assert f"| `{name}` |" in PAGE
    for name in data.OOD_LAYOUTS:
        assert name == "folder" or f"`{name}:PATH`" in PAGE
    for spec in ("synthetic", "held-out", "pasted"):
        assert f"| `{spec}` |" in PAGE


# ------------------------------------------------------------------------------ the division


def divide(names, share=0.2):
    paths = [Path(f"{name}.jpg") for name in names]
    division = data.divide_images(paths, share)
    chosen = {name for name, validates in zip(names, division.validates, strict=True) if validates}
    return chosen, division


VIDEOS = [f"{video}_{frame:03}" for video in "abcdefghij" for frame in range(4)]


def test_frames_of_a_video_stay_together():
    """With frame 12 in training, frame 13 says nothing about new streets."""
    chosen, division = divide(VIDEOS)
    assert len(chosen) == 8 and len({name[0] for name in chosen}) == 2
    assert "40 images are 10 groups; 2 with 8 images" in division.note
    assert division.warning == ""
    assert divide([f"town/{name}_leftImg8bit" for name in VIDEOS])[1].note.count("10 groups") == 1


def test_the_order_of_the_files_does_not_matter():
    assert divide(VIDEOS)[0] == divide(VIDEOS[::-1])[0]


def test_added_images_change_little():
    """A video more: what validated before still does, but for one video at most."""
    before = divide(VIDEOS)[0]
    for number in range(20):
        more = VIDEOS + [f"new{number}_{frame}" for frame in range(4)]
        assert len({name[0] for name in before - divide(more)[0]}) <= 1
    longer = [*VIDEOS, "a_004"]
    assert {name for name in divide(longer)[0] if name != "a_004"} == before


@pytest.mark.parametrize(
    "sizes, share, expected",
    [
        ((62, 101, 204), 0.25, 62),
        ((5, 5), 0.2, 5),
        ((1, 99), 0.5, 1),
        ((3, 2), 0.9, 3),
    ],
)
def test_the_share_is_met_about(sizes, share, expected):
    groups = {f"group {number}_": size for number, size in enumerate(sizes)}
    chosen = data.choose_groups(groups, share)
    assert 0 < len(chosen) < len(groups)
    assert sum(groups[group] for group in chosen) == expected


def test_a_single_group_is_cut_near_its_end():
    """IMG_0001 ... : one camera's numbers, 9 before 10."""
    names = [f"IMG_{number}" for number in (10, 9, 11, 12, 8, 7)]
    chosen, division = divide(names, 0.3)
    assert chosen == {"IMG_11", "IMG_12"}
    assert "all 6 images are one group (IMG_*)" in division.warning
    assert "a folder of its own" in division.warning
    assert len(divide(names, 0.99)[0]) == 4  # two are left to train on
    refused(lambda: divide(names[:2]), "2 images", "at least 3")


def test_both_splits_and_the_share_of_a_flat_folder(tmp_path):
    root = write_flat(tmp_path, [f"{video}/{frame}" for video in "abc" for frame in range(2)])
    splits = [open_dataset("folder", root, name, val_share=0.3) for name in ("train", "val")]
    assert [len(split) for split in splits] == [4, 2]
    assert not set(splits[0].images) & set(splits[1].images)
    assert len(open_dataset("folder", root, "all")) == 6
    assert data.choose_val_share("folder", root, None) == data.DEFAULT_VAL_SHARE
    refused(lambda: open_dataset("folder", root, "val"), "has no folder val", "--split all")
    refused(lambda: open_dataset("folder", root, "test", val_share=0.3), "has no folder test")


def test_training_on_images_that_validate_is_said(tmp_path):
    """--split all, or a folder of some images, trained on validation images in silence."""
    root = write_flat(tmp_path, [f"{video}/{frame}" for video in "abc" for frame in range(2)])
    val_set = open_dataset("folder", root, "val", val_share=0.3)
    folder = val_set.images[0].parent.name
    for split, count in (("train", 4), ("all", 6), (folder, 2)):
        train_set = open_dataset("folder", root, split, val_share=0.3)
        assert len(train_set) == count
        warnings = train_ensemble.overlap_warnings(train_set, val_set, split)
        if split == "train":
            assert warnings == []
        else:
            assert warnings[0].startswith(f"2 of the {count} images of --split {split} are valid")
    scenes = [data.SyntheticScenes(split) for split in ("train", "val")]
    assert train_ensemble.overlap_warnings(*scenes, "train") == []
    assert len(train_ensemble.overlap_warnings(scenes[1], scenes[1], "val")) == 1


def test_images_that_validate_now_but_did_not_are_said(tmp_path):
    """A folder grew after the training: figures of images that were learned from, in silence."""
    names = [f"{video}/{frame}" for video in "abc" for frame in range(2)]

    def warnings(root, names):
        dataset = open_dataset("folder", write_flat(root, names), "val", val_share=0.3)
        return evaluate.division_warnings(dataset, root, checkpoint)

    root = write_flat(tmp_path / "x", names)
    splits = [open_dataset("folder", root, name, val_share=0.3) for name in ("train", "val")]
    assert splits[0].division == splits[1].division
    config = {"division": splits[0].division}
    checkpoint = {"config": config, "args": {"data": str(root)}}
    assert warnings(root, names) == []
    video = splits[1].images[0].parent.name
    (warning,) = warnings(root, [f"{video}/{frame}" for frame in range(2, 30)])
    assert warning.startswith(f"since the networks were trained, images of {root} were added")
    assert warnings(tmp_path / "y", ["a_1", "b_1", "c_1"]) == []  # another folder
    config.pop("division")  # an older checkpoint
    assert warnings(root, []) == []


def test_val_is_for_folders_without_splits(folder, command, tmp_path):
    flags = (*small(folder), "--members", 1, "--out", tmp_path / "c")
    code, _, err = command("train", *flags, "--val", 0.2)
    assert code == 2 and "--val 0.2 is for --dataset folder with images/ and labels/ that" in err
    code, _, err = command("train", *flags, "--val", 20)
    assert code == 2 and "--val 20: has to lie between 0 and 1" in err


def test_a_relative_folder_of_an_older_checkpoint_still_leads_there(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    evaluate.refuse_moved_data(Path(folder.name))
    evaluate.refuse_moved_data(None)
    monkeypatch.chdir("/")
    with pytest.raises(UsageError, match="if the data set has moved, name its folder with --data"):
        evaluate.refuse_moved_data(Path(folder.name))


# ------------------------------------------------------------------------------ names of masks


@pytest.mark.parametrize(
    "ending", ["_mask.png", "_label.PNG", "_gt.png", ".jpg.png", "_labelIds.png", "-seg.tif"]
)
def test_one_ending_of_all_masks_is_found_and_said(tmp_path, ending):
    root = write_flat(tmp_path, ["a_1", "a_10", "b_1"], ending)
    dataset = open_dataset("folder", root, "train", val_share=0.3)
    for image, mask in zip(dataset.images, dataset.masks, strict=True):
        assert mask.name == f"{image.stem}{ending}"
    name, suffix = ending.rsplit(".", 1)
    assert dataset.notes[0].startswith(f"the masks are called ...{name}.{suffix.lower()}: ")


def test_endings_of_images_and_of_a_set_with_splits(tmp_path):
    root = write_folder(tmp_path)
    for split in ("train", "val"):
        for path in (root / "images" / split).iterdir():
            path.rename(path.with_name(f"{path.stem}_image.png"))
        for path in (root / "labels" / split).iterdir():
            path.rename(path.with_name(f"{path.stem}_mask.png"))
    dataset = open_dataset("folder", root, "train")
    assert [path.name for path in dataset.masks] == [f"{number}_mask.png" for number in range(5)]
    assert stems(dataset)[0] == "0_image"


def test_masks_without_an_image_are_said(tmp_path):
    """They were left out in silence; what begins as an image's name may lie beside its mask."""
    root = write_flat(tmp_path, ["a_1", "a_2", "b_1", "b_2", "c_1"])
    (root / "labels/a_1_colours.png").write_bytes((root / "labels/a_1.png").read_bytes())
    assert open_dataset("folder", root, "all").doubts == []
    (root / "images/b_2.jpg").unlink()
    (root / "images/c_1.jpg").unlink()
    [doubt] = open_dataset("folder", root, "all").doubts
    assert doubt == f"masks without an image: 2, as {root / 'labels/b_2.png'}; they are left out"


def test_a_class_that_may_be_void_is_asked_about(tmp_path):
    """Pixels called "unlabelled" became a class in silence, which was learned and counted."""
    root = write_flat(tmp_path, ["a_1", "a_2", "b_1"])
    path = root / "classes.txt"
    for name in ("Unlabelled", "void"):  # in a file of names alone void is a class, too
        path.write_text(f"a\n{name}\nc\nd\n")
        [doubt] = open_dataset("folder", root, "all").doubts
        assert doubt.startswith(f"{name!r} in {path} is a class like any other; ")
        assert "NAME = VALUE, and call this one void" in doubt
    path.write_text("a = 0\nunlabelled = 1\nc = 2\nd = 3\n")
    [doubt] = open_dataset("folder", root, "all").doubts
    assert doubt.endswith("call it void there")
    path.write_text("a = 0\nvoid = 1\nc = 2\nd = 3\n")  # what both sentences lead to
    dataset = open_dataset("folder", root, "all")
    assert dataset.doubts == [] and list(dataset.classes) == ["a", "c", "d"]
    assert dataset.label_of_value[1] == data.VOID


def test_what_is_found_in_place_of_masks_is_said(tmp_path):
    """A mask called otherwise was "no mask x.png", and no word of the x_mask.png beside it."""
    names = ["a_1", "a_2", "b_1"]

    def flat(number, ending="_mask.png"):
        return write_flat(tmp_path / str(number), names, ending)

    def opened(root):
        return lambda: open_dataset("folder", root, "train", val_share=0.3)

    root = flat(1)
    (root / "labels/a_2_mask.png").rename(root / "labels/a_2.png")
    found = "found ..._mask.png for 2, ....png for 1 of 3 images"
    refused(opened(root), "no mask ", "a_2_mask.png", found, "one ending for all will do")
    (root / "labels/a_2.png").unlink()
    refused(opened(root), "no mask ", "a_2_mask.png", "found ..._mask.png for 2 of 3 images)")
    root = flat(2)
    for name in names:
        shutil.copy(root / f"labels/{name}_mask.png", root / f"labels/{name}_color.png")
    refused(opened(root), "several masks", "found ..._color.png and ..._mask.png", "keep one kind")
    refused(opened(flat(3, "_mask.jpg")), "called ..._mask.jpg", "save them as PNG")
    root = flat(4)
    (root / "labels").rename(root / "masks")
    refused(opened(root), "no mask ", "there is no folder", "labels, but images, masks beside it")
    root = flat(5)
    for path in (root / "labels").iterdir():
        path.rename(path.with_name(f"seg{path.name}"))
    refused(opened(root), "no name in", "begins as that of an image")
    root = flat(7, ".png")
    Image.open(root / "images/a_1.jpg").save(root / "labels/a_1.png")
    refused(opened(root), "a_1.png has mode RGB", " colours (", "as NAME = R G B")
    root = flat(6, ".png")
    (root / "images").rename(root / "pictures")
    refused(opened(root), "has no folder images/train", "holds the folders labels, pictures")


# ------------------------------------------------------------------------------ what is said


def test_settings_are_a_table_in_rows_of_the_terminal():
    """All flags stood in one line of 600 characters."""
    groups = {
        "data": {"dataset": "folder", "crop_size": [80, 120], "cache": None, "hold_out": []},
        "nothing": {"overwrite": False},
        "machine": {"seed": 0, "compile": True, "out": Path("x" * 30)},
    }
    assert evaluate.settings_table(groups, 80).splitlines() == [
        "data     dataset folder   crop-size 80 120",
        f"machine  seed 0   compile on   out {'x' * 30}",
    ]
    assert evaluate.settings_table(groups, 40).splitlines() == [
        "data     dataset folder",
        "         crop-size 80 120",
        "machine  seed 0   compile on",
        f"         out {'x' * 30}",
    ]


def test_a_warm_up_that_outlasts_the_run_is_said():
    """Twelve images from scratch: the learning rate never came near its base."""
    flags = flags_of(batch_size=2, epochs=4, warmup=8, lr=0.05)
    assert train_ensemble.warmup_warnings(flags, 4) == []
    (warning,) = train_ensemble.warmup_warnings(flags._replace(accumulate=2), 4)
    assert warning.startswith("--warmup 8 is longer than this run of 4 steps")


def test_a_network_that_learns_nothing_is_said_once():
    def history(*accuracies):
        return [{"mean_class_accuracy": value} for value in accuracies]

    nan = float("nan")
    stuck = (0.25, 0.26, 0.25, 0.25, 0.27)
    assert train_ensemble.learns_nothing(history(*stuck), [0.1, 0.0, 0.0, 0.0])
    assert train_ensemble.learns_nothing([{}, *history(*stuck)], [0.1, 0.0, 0.0, 0.0, nan])
    assert not train_ensemble.learns_nothing(history(*stuck[:4]), [0.1, 0.0, 0.0, 0.0])
    assert not train_ensemble.learns_nothing(history(*stuck, 0.25), [0.1, 0.0, 0.0, 0.0])
    assert not train_ensemble.learns_nothing(history(*stuck[:4], 0.5), [0.1, 0.0, 0.0, 0.0])
    assert not train_ensemble.learns_nothing(history(*stuck), [0.25, nan])


def test_hours_on_a_cpu_are_said_before_the_first_step(monkeypatch, capsys):
    """The default ResNet-101 on a laptop: days, and nothing said so."""
    measured = []

    def time_of_work(amp):
        measured.append(amp)
        return 2e-11

    monkeypatch.setattr(train_ensemble, "time_of_work", time_of_work)
    flags = flags_of(backbone="resnet101", crop_size=(360, 480))
    train_ensemble.warn_of_hours(flags, (360, 480), 100)
    assert measured == []  # nothing is measured where no CPU takes long
    train_ensemble.warn_of_hours(flags, (360, 480), 40000)
    assert capsys.readouterr().out == (
        "this will take about 36 h on this CPU with nothing else to do; "
        "--backbone resnet18 --image-size 180 240 takes about 48 min\n"
    )
    flags = flags._replace(crop_size=(180, 240))
    train_ensemble.warn_of_hours(flags, (180, 240), 40000)
    assert (
        "about 9.0 h on this CPU with nothing else to do; --backbone resnet18 takes"
        in capsys.readouterr().out
    )
    train_ensemble.warn_of_hours(flags._replace(backbone="resnet18"), (180, 240), 400000)
    assert (
        "about 8.0 h on this CPU with nothing else to do; fewer --epochs" in capsys.readouterr().out
    )
    assert train_ensemble.rough_time(100 * 3600) == "4 days"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_work_of_each_backbone_is_that_of_its_convolutions(backbone):
    total = []

    def count(layer, images, output):
        total.append(output.numel() * layer.weight[0].numel())

    with FakeTensorMode():
        network = DeepLabV3(backbone, 11)
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(count)
        network(torch.zeros(2, 3, 180, 240, dtype=torch.uint8))
    thousands = sum(total) / (2 * 180 * 240) / 1000
    assert thousands == pytest.approx(train_ensemble.WORK_PER_PIXEL[backbone], rel=0.02)


def test_the_time_of_work_is_measured():
    threads = torch.get_num_threads()
    assert 1e-14 < train_ensemble.time_of_work("off") < 1e-7
    assert torch.get_num_threads() == threads


def test_members_side_by_side_share_one_live_line(monkeypatch):
    """Two processes wrote over each other's live line, and into it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    texts = [RawArray("c", train_ensemble.TEXT_BYTES) for _ in range(2)]
    lines = [
        train_ensemble.SharedLiveLine(train_ensemble.SideBySide(texts, number))
        for number in range(2)
    ]
    stdout = train_ensemble.RowOutput(terminal)
    lines[0].show("member_00 1/2")
    lines[1].show("member_01 1/2 and so on")
    assert terminal.rows(80) == ["member_00 1/2 | member_01 1/2 and so on"]
    lines[1].clear()
    lines[0].show("member_00 2/2")
    assert terminal.rows(80) == ["member_00 2/2"]
    lines[1].show("member_01 2/2")
    print("member_01  epoch", "1/2", file=stdout)  # while the line is there
    assert terminal.rows(80) == ["member_01  epoch 1/2", ""]
    lines[0].show("x" * 100)
    shown = f"{'x' * (train_ensemble.TEXT_BYTES - 1)} | member_01 2/2"
    assert terminal.rows(80) == ["member_01  epoch 1/2", shown]
    monkeypatch.setattr(sys, "stderr", train_ensemble.RowOutput(terminal))
    lines[1].show("member_01 2/2")
    evaluate.warn("it learns nothing")
    assert terminal.rows(80)[1:] == ["warning: it learns nothing", ""]
    lines[0].clear()
    lines[1].clear()
    assert terminal.rows(80)[2:] == [""]
    print("2 members", file=terminal)  # the parent process, in the end
    assert terminal.rows(80)[2:] == ["2 members", ""]


def test_the_live_line_says_that_it_validates(monkeypatch):
    """A long validation looked like a training that hangs."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = train_ensemble.Progress("member_00", train_ensemble.RunState(), 2, 3)
    progress.show_validation()
    assert terminal.rows(80) == ["member_00  epoch 1/2  validating"]
    place = train_ensemble.SideBySide([RawArray("c", train_ensemble.TEXT_BYTES)], 0)
    progress = train_ensemble.Progress("member_00", train_ensemble.RunState(), 2, 3, place)
    progress.show_validation()
    assert terminal.rows(80) == ["member_00 1/2  validating"]
    # of torchrun's processes the first alone has a line, whether they form a group or not
    monkeypatch.setenv("RANK", "1")
    for place_of_other in (None, place):
        progress = train_ensemble.Progress(
            "member_01", train_ensemble.RunState(), 2, 3, place_of_other
        )
        progress.show_validation()
    assert terminal.rows(80) == ["member_00 1/2  validating"]


def test_an_error_has_a_row_of_its_own(monkeypatch):
    """What went wrong stood behind the live line, in its row."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def fail():
        with train_ensemble.Progress("member_00", train_ensemble.RunState(), 2, 3) as progress:
            progress.show_validation()
            raise UsageError("the loss is nan")

    assert evaluate.exit_code_of(fail) == 2
    assert terminal.rows(80) == ["error: the loss is nan", ""]


@pytest.mark.parametrize("module", [train_ensemble, distill])
def test_help_has_the_defaults_of_flags_and_recipes(module):
    """--lr, --epochs and others had no default in --help: it differs by data set."""
    parser = module.get_args_parser()
    for action in parser._actions:
        is_switch = isinstance(action, argparse._StoreTrueAction | argparse._HelpAction)
        assert is_switch or "default:" in action.help, action.option_strings
    recipes = parser.format_help().split("recipes, the defaults of each --dataset:\n")[1]
    rows = [line.split("  ") for line in recipes.splitlines()]
    assert max(map(len, recipes.splitlines())) < 80
    assert [cell.strip() for cell in rows[0] if cell] == list(train_ensemble.RECIPES)
    words = " ".join(recipes.split())
    if module is train_ensemble:
        assert "crop-size 80 120 360 480 768 768 512 512 512 512" in words
        assert "lr 0.2 0.01 0.01 0.001 0.01" in words and "--lr 0.05" in words
    else:
        assert "views 1 5 5 5 5" in words
        assert "lr, times a member's 0.5 1.0 1.0 1.0 1.0" in words
