"""Every command of README and docs, run at toy size, and every link between them.

A command keeps its flags; those of `TOY` are put behind them, so that it takes seconds. The data
that a page names are written small. What needs several processes, or measures speed, is parsed.
"""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMANDS, scene
from PIL import Image

import data
from evaluate import run_main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SCRIPTS = {"train_ensemble.py": "train", "distill.py": "distill", "evaluate.py": "evaluate"}
PARSED_ONLY = {
    "tests/study.py": "study",
    "tests/benchmarks.py": "benchmarks",
    "tests/same_results.py": "same_results",
}
# Words after which another program's flags stand.
LAUNCHERS = ("torchrun", "srun")

TOY = {
    "train": "--epochs 1 --backbone resnet18 --weights none --image-size 32 48 --crop-size 32 48 "
    "--batch-size 2 --parallel 1 --device cpu --workers 0 --overwrite",
    "distill": "--epochs 1 --weights none --crop-size 32 48 --batch-size 2 --device cpu "
    "--workers 0 --overwrite",
    "evaluate": "--device cpu --workers 0 --panels 1",
}


def commands_of(page):
    """Each command of a page's shell blocks, as words, without comments."""
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words:
                    commands.append(words)
    return commands


def script_of(words):
    """(name of a script of this project, its flags) of a command, or None."""
    for position, word in enumerate(words):
        if word in SCRIPTS or word in PARSED_ONLY:
            return word, words[position + 1 :]
    return None


def parser_of(script):
    """The parser of one of this project's scripts."""
    if script in SCRIPTS:
        return COMMANDS[SCRIPTS[script]].get_args_parser()
    sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module(PARSED_ONLY[script]).get_args_parser()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_command_is_known(page):
    for words in commands_of(page):
        script = script_of(words)
        if script is not None and "..." not in words:
            name, flags = script
            parser_of(name).parse_args(flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in headings]
            assert anchor in anchors, target


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the data that the pages name, tiny, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SYNTHETIC_SPLITS", {"train": 4, "val": 2, "ood": 2})
    write_camvid(tmp_path / "camvid")
    write_road_anomaly(tmp_path / "road_anomaly")
    write_flat_folder(tmp_path / "my_data")
    write_cityscapes(tmp_path / "DIR")
    write_voc(tmp_path / "DIR")
    return tmp_path


def write_pair(image_path, mask_path, labels, image):
    for path, pixels in ((image_path, image), (mask_path, labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def scenes(seed, classes, **counts):
    """(split, number, image, labels) of so many scenes in each split."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for number in range(count):
            image, labels = scene(rng, (36, 48), classes)
            yield split, number, image, labels


def write_camvid(root):
    for split, number, image, labels in scenes(0, 11, train=4, val=2):
        name = f"{number}.png"
        write_pair(root / split / name, root / f"{split}annot" / name, labels, image)


def write_road_anomaly(root):
    image, labels = scene(np.random.default_rng(1), (36, 48), 2)
    mask = root / "frames" / "road.labels" / "labels_semantic.png"
    write_pair(root / "frames" / "road.png", mask, 2 * labels, image)


def write_flat_folder(root):
    root.mkdir()
    (root / "classes.txt").write_text("floor\nwall\n")
    for place, number, image, labels in scenes(4, 2, hall=2, yard=2, roof=2):
        name = f"{place}_{number}.png"
        write_pair(root / "images" / name, root / "labels" / name, labels, image)


def write_cityscapes(root):
    for split, number, image, labels in scenes(2, 3, train=3, val=2):
        name = f"aachen_{number:06d}_000019"
        image_path = root / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png"
        mask_path = root / "gtFine" / split / "aachen" / f"{name}_gtFine_labelIds.png"
        write_pair(image_path, mask_path, labels + 7, image)


def write_voc(root):
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, number, image, labels in scenes(3, 3, train=3, val=2):
        name = f"{split}_{number}"
        with open(lists / f"{split}.txt", "a") as names:
            names.write(f"{name}\n")
        mask_path = root / "SegmentationClass" / f"{name}.png"
        write_pair(root / "JPEGImages" / f"{name}.jpg", mask_path, labels, image)


PAGES_TO_RUN = ["README.md", "docs/PAPER.md", "docs/RESULTS.md"]


@pytest.mark.parametrize("name", PAGES_TO_RUN)
def test_the_commands_run(name, workplace, capsys):
    done = []
    for words in commands_of(ROOT / name):
        script = script_of(words)
        is_launched = any(launcher in words for launcher in LAUNCHERS)
        if script is None or script[0] not in SCRIPTS or is_launched:
            continue
        command = SCRIPTS[script[0]]
        if words[0].startswith(".venv/"):  # the one line that installs and does all
            assert ["python", *words[1:]] in done
            continue
        done.append(words)
        flags = fewer_members([*script[1], *shlex.split(TOY[command])])
        module = COMMANDS[command]
        code = run_main(module.main, module.get_args_parser(), flags)
        assert code == 0, (words, capsys.readouterr().err)
    assert len(done) >= 5

    if name == "README.md":  # what stands there uses the student that the commands made
        image, _ = scene(np.random.default_rng(5), (50, 70))
        Image.fromarray(image).save("photo.jpg")
        snippets = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
        results = {}
        for snippet in snippets:
            exec(snippet, results)
        assert len(snippets) == 2
        assert results["classes"].shape == results["rejected"].shape == (50, 70)


def fewer_members(flags):
    """The flags with two members where they ask for more."""
    if "--members" in flags and int(flags[flags.index("--members") + 1]) > 2:
        flags[flags.index("--members") + 1] = "2"
    return flags
