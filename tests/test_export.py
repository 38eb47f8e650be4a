"""A student that leaves home: `load_model`, `predict`, exported files, and the page about them."""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags_of
from PIL import Image

import data
import evaluate
import metrics
import model
import train_ensemble

ROOT = Path(__file__).parents[1]
MEASURES = ["std", "entropy", "error"]
SCORES = ["dudes", "dudes_entropy", "error", "entropy", "msp", "max_logit", "energy"]
SIZES = [(64, 96), (32, 32), (97, 131), (45, 300), (230, 33)]


def save_student(path, backbone="resnet18", measures=MEASURES, head="confidence", **config):
    """A checkpoint of a network with random weights."""
    torch.manual_seed(0)
    network = model.DeepLabV3(backbone, 5, tuple(measures), head=head)
    config = {
        "backbone": backbone,
        "classes": ["road", "sky", "tree", "car", "person"],
        "palette": [[10 * number, 0, 255] for number in range(5)],
        "dataset": "folder",
        "hold_out": [],
        "image_size": [48, 72],
        "measures": list(measures),
        "head": head,
    } | config
    args = {"crop_size": [40, 56], "image_size": None, "dataset": "folder", "data": None}
    content = {"model": network.state_dict(), "config": config, "args": args, "metrics": {}}
    torch.save(content | {"versions": {}}, path)
    return path


def images_of(batch, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)


def assert_same_outputs(exported, eager):
    """The values to 1e-4; the classes wherever the eager network is not undecided."""
    assert list(exported) == list(eager) == ["classes", "probabilities", *SCORES]
    for name, expected in eager.items():
        found = torch.as_tensor(exported[name])
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        if name == "classes":
            best = eager["probabilities"].topk(2, dim=1).values
            decided = best[:, 0] - best[:, 1] > 1e-4
            assert torch.equal(found[decided], expected[decided]) and decided.float().mean() > 0.9
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def fenced_blocks(page, language):
    """The fenced blocks in that language of a page of docs/, in their order."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def has_onnx():
    packages = ("onnx", "onnxscript", "onnxruntime")
    return all(importlib.util.find_spec(package) is not None for package in packages)


def run_commands(page):
    """Run the page's lines of evaluate.py in the current folder; without ONNX not those for it."""
    for block in fenced_blocks(page, "sh"):
        for line in block.splitlines():
            words = line.split()
            if words[:3] == ["python", "-m", "pip"] or (".onnx" in line and not has_onnx()):
                continue
            assert words[:2] == ["python", "evaluate.py"], line
            assert evaluate.run_main(evaluate.main, evaluate.get_args_parser(), words[2:]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with ckpts/student.pt, photo.jpg, and what the page's commands make of them."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "ckpts").mkdir()
    save_student(folder / "ckpts/student.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    with contextlib.chdir(folder):
        run_commands("EXPORT.md")
    return folder


@pytest.fixture(scope="module")
def student(home):
    return evaluate.load_model(home / "ckpts/student.pt")


# ------------------------------------------------------------------------------ load_model, predict


def test_a_loaded_network_knows_its_classes_measures_and_size(tmp_path, home, student):
    for network in (student, model.load_model(home / "ckpts/student.pt")):
        assert network.classes == ("road", "sky", "tree", "car", "person")
        assert network.palette[2] == (20, 0, 255)
        assert network.measures == tuple(MEASURES) and network.image_size == (48, 72)
        assert not network.training
    # An older checkpoint does not say. Its crop is the whole image of drawn scenes alone.
    older = save_student(tmp_path / "older.pt", image_size=None)
    assert model.load_model(older).image_size is None
    drawn = save_student(tmp_path / "drawn.pt", image_size=None, dataset="synthetic")
    assert model.load_model(drawn).image_size == (40, 56)


def test_a_checkpoint_tells_the_size_of_the_images_it_was_trained_for(folder):
    flags = flags_of(backbone="resnet18", dataset="x", hold_out=[], crop_size=(32, 32))
    for dataset, expected in (
        (data.open_dataset("synthetic", None, "val"), [80, 120]),
        (data.open_dataset("folder", folder, "val"), [40, 56]),
        (data.open_dataset("folder", folder, "val", image_size=[20, 30]), [20, 30]),
    ):
        assert train_ensemble.build_config(dataset, flags, members=1)["image_size"] == expected
    dataset.image_size = None
    dataset.mask_sizes = [(30, 40), (40, 30), (30, 44)]
    assert dataset.network_size() == (30, 40)


def test_members_from_before_the_size_was_kept_are_members_still(tmp_path):
    old = model.read_checkpoint(save_student(tmp_path / "old.pt", measures=[], image_size=None))
    new = model.read_checkpoint(save_student(tmp_path / "new.pt", measures=[]))
    model.refuse_unlike_members([Path("old.pt"), Path("new.pt")], [old, new])
    new["args"]["image_size"] = [48, 72]
    with pytest.raises(model.ModelError, match=r"new.pt has image_size \[48, 72\], but old.pt"):
        model.refuse_unlike_members([Path("old.pt"), Path("new.pt")], [old, new])


def test_float_images_outside_0_to_1_are_refused():
    network = model.DeepLabV3("resnet18", 3).eval()
    images = images_of(1, (32, 32))
    for wrong in (images.float(), images.float() / 127.5 - 1, images.long(), images / torch.nan):
        with pytest.raises(model.ModelError, match="pass RGB as uint8, or as float in"):
            network(wrong)
    network(images / 255 + 1e-6)  # what an interpolation may leave
    network.train()(images.float().expand(2, -1, -1, -1))  # training asks nothing


def test_predict_gives_maps_of_the_images_own_size(home, student):
    photo = Image.open(home / "photo.jpg")
    classes, scores = student.predict(photo)
    assert classes.shape == (50, 80) and classes.dtype == np.uint8
    assert list(scores) == SCORES
    assert all(score.shape == (50, 80) and score.dtype == np.float32 for score in scores.values())

    input_images = data.to_input(photo, (48, 77))[None]  # 77 = 80 * 48 / 50
    with torch.inference_mode():
        logits, uncertainty = student.network(input_images, (50, 80))
    probs = logits.softmax(dim=1)
    expected = {
        "dudes": uncertainty[:, 0],
        "dudes_entropy": uncertainty[:, 1] * np.log(5),
        "error": uncertainty[:, 2],
    } | metrics.free_scores(logits, probs)
    assert np.array_equal(classes, logits.argmax(dim=1)[0])
    for name, score in scores.items():
        np.testing.assert_allclose(score, expected[name][0], rtol=1e-6, atol=1e-6)


def test_predict_takes_arrays_and_pictures_of_any_mode(student):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = student.predict(pixels).scores["energy"]
    assert np.array_equal(student.predict(image).scores["energy"], expected)
    assert np.array_equal(student.predict(image.convert("RGBA")).scores["energy"], expected)
    exif = image.getexif()
    exif[data.ORIENTATION_TAG] = 6
    image.info["exif"] = exif.tobytes()
    assert student.predict(image.convert("L")).classes.shape in ((30, 20), (20, 30))
    for wrong in (pixels / 255, pixels[..., 0], pixels.transpose(2, 0, 1)):
        with pytest.raises(data.DataError, match=r"pass RGB as uint8 \[H, W, 3\]"):
            student.predict(wrong)
    with pytest.raises(data.DataError, match="the image holds fractions"):
        student.predict(Image.fromarray(pixels[..., 0] / np.float32(255)))  # white, at 1 of 255


def test_predict_equals_the_command(home, student, command, tmp_path):
    flags = ["--student", home / "ckpts/student.pt", "--predict", home / "photo.jpg"]
    flags += ["--score", *SCORES, "--amp", "off", "--device", "cpu", "--out", tmp_path]
    assert command("evaluate", *flags)[0] == 0
    classes, scores = student.predict(Image.open(home / "photo.jpg"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "photo_classes.png")), classes)
    for name, values in scores.items():
        written = evaluate.read_map(evaluate.map_file(tmp_path / "photo", name))
        np.testing.assert_allclose(written, values, atol=1e-4)


# ------------------------------------------------------------------------------ exported files


def test_a_pt2_file_is_right_at_every_size_or_refuses_it(home, student):
    exported = torch.export.load(home / "student.pt2").module()
    with torch.inference_mode():
        for size in SIZES:
            for batch in (1, 3):
                images = images_of(batch, size)
                assert_same_outputs(exported(images), student(images))
        for wrong in (images_of(1, (31, 64)), images_of(1, (64, 24)), images_of(1, (64, 64)) / 255):
            with pytest.raises((AssertionError, RuntimeError)):
                exported(wrong)


def test_an_onnx_file_is_right_at_every_size(home, student):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    file = home / "student.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    # ONNX refuses no size, so those below the range have to be right too.
    for size in [*SIZES, (31, 17), (8, 8), (1, 40)]:
        for batch in (1, 3):
            images = images_of(batch, size)
            outputs = session.run(None, {"images": images.numpy()})
            with torch.inference_mode():
                assert_same_outputs(dict(zip(names, outputs, strict=True)), student(images))
    metadata = session.get_modelmeta().custom_metadata_map["metadata.json"]
    assert json.loads(metadata)["classes"][1] == "sky"


def test_the_papers_head_with_one_measure_leaves_home_too(tmp_path):
    predictor = evaluate.load_model(save_student(tmp_path / "s.pt", measures=["std"], head="paper"))
    exported = evaluate.trace_for_any_size(predictor).module()
    images = images_of(1, (40, 100))
    with torch.inference_mode():
        eager = predictor(images)
        found = exported(images)
    assert list(found) == list(eager) and set(SCORES) - found.keys() == {"dudes_entropy", "error"}
    for name in list(eager)[1:]:
        torch.testing.assert_close(found[name], eager[name], rtol=1e-4, atol=1e-4)


def test_a_plain_member_has_the_free_scores(tmp_path):
    predictor = evaluate.load_model(save_student(tmp_path / "m.pt", measures=[]))
    assert list(predictor(images_of(1, (40, 56))))[2:] == list(metrics.FREE_SCORES)
    metadata = evaluate.export_metadata(predictor, {"config": {}}, {})
    assert list(metadata["outputs"])[2:] == list(metrics.FREE_SCORES)


def network_input(path):
    """The pixels [3, H, W] in which `Predictor.predict` shows the network of `home` a photo."""
    photo = Image.open(path).convert("RGB")
    return data.to_input(photo, data.proportional_size(photo, (48, 72)))


def test_a_pt2_file_needs_nothing_of_this_project(home):
    """The page's snippet in a process that cannot import the project."""
    snippet = fenced_blocks("EXPORT.md", "python")[2]
    checks = """
import sys
assert not {"model", "evaluate", "metrics"} & sys.modules.keys()
shapes = {name: list(values.shape) for name, values in outputs.items()}
print(json.dumps([shapes, metadata, images.tolist()]))
"""
    words = [sys.executable, "-I", "-W", "ignore", "-c", snippet + checks]
    answer = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    shapes, metadata, pixels = json.loads(answer.stdout.splitlines()[-1])
    assert pixels[0] == network_input(home / "photo.jpg").tolist()
    assert shapes["probabilities"] == [1, 5, 48, 77] and shapes["dudes"] == [1, 48, 77]
    assert list(shapes) == list(metadata["outputs"])
    assert metadata["classes"][0] == "road" and metadata["palette"][1] == [10, 0, 255]
    assert metadata["measures"] == MEASURES and metadata["image_size"] == [48, 72]
    assert metadata["config"]["head"] == "confidence"
    assert metadata["versions"]["exported"]["torch"] == str(torch.__version__)
    assert metadata["outputs"]["dudes_entropy"] == "float32 [B, H, W], entropy, nats"
    assert metadata["operating_points"] == {}
    assert metadata["operating_points_from"].startswith("none, no results/metrics.json")


def test_operating_points_are_those_of_this_student(trained, command, tmp_path):
    _, ckpts = trained
    student = ckpts / "student.pt"
    assert model.load_model(student).image_size == (40, 56)
    flags = ["--student", student, "--device", "cpu", "--panels", 0, "--out", tmp_path]
    assert command("evaluate", *flags)[0] == 0
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["protocol"]["network_input"] == "native size"  # as in training

    identity = model.identity_of([model.read_checkpoint(student)])
    found = evaluate.find_thresholds(tmp_path / "metrics.json", identity)
    assert found["operating_points"] == results["operating_points"]
    assert found["operating_points"]["msp"][0]["threshold"] > 0
    assert found["recommended"] == results["recommended"]
    where_from = found["operating_points_from"]
    assert where_from == f"{tmp_path / 'metrics.json'}: folder val, 3 images"

    other = evaluate.find_thresholds(tmp_path / "metrics.json", "another")
    assert other["operating_points"] == {}
    assert "is not of this student; evaluate" in other["operating_points_from"]
    (tmp_path / "metrics.json").write_text("[]")
    assert evaluate.find_thresholds(tmp_path / "metrics.json", identity) == other


def test_a_file_without_thresholds_is_warned_of(home, command, tmp_path):
    flags = ["--student", home / "ckpts/student.pt", "--export", tmp_path / "s.pt2"]
    code, out, err = command("evaluate", *flags, "--out", tmp_path / "elsewhere")
    assert code == 0 and "give --export the --out of that evaluation" in out
    assert err.startswith("warning: ") and "has no thresholds" in err and err.count("\n") == 1


def test_what_cannot_be_exported_is_one_line(home, command, monkeypatch, tmp_path):
    student = ["--student", home / "ckpts/student.pt"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags, words in (
        ([*student, "--export", "s.pt"], "s.pt: name a file that ends in .pt2 or .onnx"),
        ([*student, "--export", "s.onnx"], "python -m pip install onnx onnxscript"),
        ([*student, "--export", "s.pt2", "--ood"], "leave out --ood"),
        ([*student, "--export", "s.pt2", "--image-size", 8, 8], "leave out --image-size"),
        (["--student", tmp_path / "gone.pt", "--export", "s.pt2"], "no such checkpoint"),
    ):
        code, out, err = command("evaluate", *flags)
        assert code == 2 and words in err and err.count("\n") == 1 and out == ""


# ------------------------------------------------------------------------------ the page


def test_the_snippets_of_the_page_run(home):
    """All but that of the .pt2 file, which `test_a_pt2_file_needs_nothing_of_this_project` runs."""
    blocks = fenced_blocks("EXPORT.md", "python")
    assert len(blocks) == 4 and "torch.export.load" in blocks[2]
    predicted = {}
    read = {}
    with contextlib.chdir(home):
        exec(blocks[0], predicted)
        exec(blocks[1], read)
        if has_onnx():
            exported = {}
            exec(blocks[3], exported)
            assert (exported["images"][0] == network_input("photo.jpg").numpy()).all()
    assert np.abs(read["error"] - predicted["scores"]["error"]).max() < 0.02  # of --predict in bf16
