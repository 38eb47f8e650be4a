"""The walks of docs/EXTEND.md, taken through public names: a data set, scores, a loss."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import flags_of, write_folder
from PIL import Image

import data
import distill
import evaluate
import metrics
import model
import train_ensemble
from metrics import FREE_SCORES, MEASURES, Measure

MODULES = {
    "data": data,
    "distill": distill,
    "evaluate": evaluate,
    "metrics": metrics,
    "model": model,
    "train_ensemble": train_ensemble,
}


def test_every_place_that_the_page_names_is_there():
    page = (Path(__file__).parents[1] / "docs" / "EXTEND.md").read_text()
    places = re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?`", page)
    checked = 0
    for module, name, attribute in places:
        if module in MODULES and name not in ("py", "json"):
            place = getattr(MODULES[module], name)
            assert not attribute or hasattr(place, attribute), (module, name, attribute)
            checked += 1
    assert checked >= 25


def test_a_data_set_is_an_entry_for_its_files_and_a_recipe(tmp_path, command, monkeypatch):
    folder = tmp_path / "Rooms"
    write_folder(tmp_path / "plain", train=4, val=2, classes=2)
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for path in (tmp_path / "plain/images" / split).iterdir():
            Image.open(path).save(folder / split / f"{path.stem}.jpg")
        for path in (tmp_path / "plain/labels" / split).iterdir():
            mask = Image.open(path).point(lambda value: value + 10 if value < 255 else 255)
            mask.save(folder / split / f"{path.stem}_mask.png")

    layout = data.Layout(
        images="{split}",
        glob="*.jpg",
        masks="{split}/{stem}_mask.png",
        classes={"floor": (90, 60, 30), "wall": (200, 200, 190)},
        values={10: 0, 11: 1, 255: 255},
    )
    monkeypatch.setitem(data.LAYOUTS, "rooms", layout)
    monkeypatch.setattr(data, "DATASETS", (*data.DATASETS, "rooms"))
    recipe = train_ensemble.RECIPES["folder"] | {"crop_size": (32, 32), "epochs": 1}
    monkeypatch.setitem(train_ensemble.RECIPES, "rooms", recipe)

    ckpts = tmp_path / "ckpts"
    flags = ["--dataset", "rooms", "--data", folder, "--backbone", "resnet18", "--weights", "none"]
    flags += ["--batch-size", 2, "--members", 2, "--parallel", 1, "--device", "cpu", "--out", ckpts]
    assert command("train", *flags)[0] == 0
    flags = ["--teacher", ckpts, "--device", "cpu", "--head-epochs", 1]
    assert command("distill", *flags)[0] == 0
    flags = ["--student", ckpts / "student.pt", "--teacher", ckpts, "--device", "cpu"]
    flags += ["--ood", "--panels", 0]
    assert command("evaluate", *flags, "--out", tmp_path / "results")[0] == 0
    results = json.loads((tmp_path / "results/metrics.json").read_text())
    assert [row["name"] for row in results["classes"]] == ["floor", "wall"]

    Image.new("L", (56, 40), 0).save(folder / "val/0_mask.png")
    with pytest.raises(data.DataError, match="holds 0, no label of rooms"):
        data.open_dataset("rooms", folder, "val")[0]


def test_a_free_score_and_a_measure_are_an_entry_each(trained, command, tmp_path, monkeypatch):
    def margin(logits, probs):
        """1 - (largest - second largest probability)."""
        largest = probs.topk(2, dim=1).values
        return 1 - (largest[:, 0] - largest[:, 1])

    def variance(prediction):
        return prediction.std.square()

    monkeypatch.setitem(FREE_SCORES, "margin", margin)
    monkeypatch.setitem(MEASURES, "variance", Measure(variance, largest=0.5))
    student = tmp_path / "s.pt"
    flags = ["--teacher", trained[1], "--device", "cpu", "--targets", "std", "variance"]
    flags += ["--head-epochs", 1]
    assert command("distill", *flags, "--out", student)[0] == 0
    flags = ["--student", student, "--teacher", trained[1], "--device", "cpu", "--panels", 0]
    code, out, _ = command("evaluate", *flags, "--ood", "--out", tmp_path / "r")
    assert code == 0 and "student dudes variance" in out
    results = json.loads((tmp_path / "r/metrics.json").read_text())
    new = {"student/margin", "member/margin", "teacher/variance", "student/dudes_variance"}
    assert new <= results["uncertainty"].keys()
    assert new <= results["ood"]["pasted"].keys()
    std, squared = (results["uncertainty"][f"teacher/{name}"] for name in ("std", "variance"))
    assert squared["auroc"] == pytest.approx(std["auroc"], abs=1e-3)  # the same order of pixels


def test_a_loss_is_a_function_of_network_and_batch(trained, tmp_path):
    calls = []

    def loss_fn(network, batch):
        """Cross-entropy with labels that are smoothed."""
        logits = network(batch.images).logits
        loss = train_ensemble.cross_entropy(logits, batch.labels)
        smooth = -logits.float().log_softmax(dim=1).mean()
        calls.append(smooth.item())
        return 0.9 * loss + 0.1 * smooth, {"smooth": smooth}

    train_set = data.open_dataset("folder", trained[0], "train")
    val_set = data.open_dataset("folder", trained[0], "val")
    cpu = torch.device("cpu")
    views = data.TrainingViews(train_set, (32, 32), (1.0, 1.0), stream=[1, 2, 3])
    network = model.DeepLabV3("resnet18", len(train_set.classes))
    weights, entry = train_ensemble.fit(
        network,
        train_ensemble.build_optimizer(network, lr=0.05, head_lr_mult=1.0, weight_decay=0.0),
        loss_fn,
        data.training_loader(views, batch_size=2, workers=0, device=cpu),
        functools.partial(
            evaluate.validate,
            loader=data.evaluation_loader(val_set, 2, 0, cpu),
            device=cpu,
            amp="off",
        ),
        flags_of(epochs=2, lr=0.05, warmup=0, select="last"),
        tmp_path / "m.pt",
    )
    assert entry["epoch"] == 2 and len(calls) == 4
    assert entry["smooth"] == pytest.approx(sum(calls[2:]) / 2)
    assert weights.keys() == network.state_dict().keys()
