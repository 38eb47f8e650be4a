"""Data sets in their publishers' layouts, written small, and the commands run in this process."""

import os

# One thread here and in every process that the tests start: the number of threads decides the last
# bits of a sum, and tests compare weights bit for bit. Set before torch counts the processors.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import evaluate
import train_ensemble
from model import read_checkpoint

# No test looks at how many milliseconds a benchmark has found: one pass, and one to warm up.
evaluate.TURNS = 2
evaluate.WARM_UP = 1


def scene(rng, size=(40, 56), classes=4):
    """A picture whose colours tell the class, in blocks of 8 x 8 pixels: uint8 image, labels."""
    blocks = rng.integers(classes, size=(-(-size[0] // 8), -(-size[1] // 8)))
    labels = np.kron(blocks, np.ones((8, 8), int))[: size[0], : size[1]].astype(np.uint8)
    image = 40 + 50 * labels[..., None] + np.array([0, 20, 40]) + rng.integers(-10, 10, (*size, 3))
    return image.clip(0, 255).astype(np.uint8), labels


def write_folder(root, train=5, val=3, size=(40, 56), classes=4):
    """The layout `folder`; a pixel row of every mask is void."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image, labels = scene(rng, size, classes)
            labels[0] = 255
            Image.fromarray(image).save(root / "images" / split / f"{number}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{number}.png")
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(classes)))
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


COMMANDS = {"train": train_ensemble, "distill": distill, "evaluate": evaluate}


@pytest.fixture
def command(capsys, request):
    """command("train", "--members", 2) -> (exit code, stdout, stderr), in this process.

    Where a test fails, pytest's report has what every command of it said on stderr.
    """

    def call(name, *flags):
        module = COMMANDS[name]
        try:
            words = [str(flag) for flag in flags]
            code = evaluate.run_main(module.main, module.get_args_parser(), words)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        if err:
            request.node.add_report_section("call", f"stderr of {name}", err)
        return code, out, err

    return call


def small(folder, *more):
    """Flags for a training of seconds."""
    flags = ["--dataset", "folder", "--data", folder]
    flags += ["--backbone", "resnet18", "--weights", "none", "--crop-size", 32, 32]
    flags += ["--batch-size", 2, "--epochs", 2, "--validate-every", 1]
    flags += ["--warmup", 0, "--lr", 0.002]  # four steps leave no room for a warm-up
    flags += ["--device", "cpu", "--parallel", 1]
    return (*flags, *more)


def weights(path):
    """All weights of a checkpoint in one row."""
    return torch.cat([v.flatten().double() for v in read_checkpoint(path)["model"].values()])


def train_and_distil(root, *flags):
    """(data folder, checkpoint folder) of two members and a student, made in `root`."""
    data = write_folder(root / "data")
    for module, words in (
        (train_ensemble, [*small(data, *flags), "--members", 2, "--out", root / "ckpts"]),
        (distill, ["--teacher", root / "ckpts", "--device", "cpu"]),
    ):
        words = [str(word) for word in words]
        assert evaluate.run_main(module.main, module.get_args_parser(), words) == 0
    return data, root / "ckpts"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(data folder, checkpoint folder) of two members and a student."""
    return train_and_distil(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained_without_a_class(tmp_path_factory):
    """The same, of networks that do not know `class 1`, after an epoch."""
    root = tmp_path_factory.mktemp("trained_without_a_class")
    return train_and_distil(root, "--hold-out", "class 1", "--epochs", 1)


def flags_of(**changes):
    """`TrainingFlags` of a tiny training on the CPU, without a command line."""
    flags = {name: None for name in train_ensemble.TrainingFlags._fields}
    flags |= train_ensemble.TrainingFlags._field_defaults
    flags |= {
        "device": torch.device("cpu"),
        "amp": "off",
        "accumulate": 1,
        "save_every": 5.0,
        "validate_every": 1,
    }
    flags |= {"recorded": {"device": "cpu"}}
    return train_ensemble.TrainingFlags(**(flags | changes))
