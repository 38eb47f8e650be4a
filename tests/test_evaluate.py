"""The evaluation: metrics.json against brute force, panels, predictions, what is refused."""

import argparse
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from data import open_dataset
from model import load_ensemble, load_model


def both(ckpts, *more):
    """Flags that evaluate the student and its teacher."""
    student = ckpts / "student.pt"
    return ["--student", student, "--teacher", ckpts, "--device", "cpu", *more]


def test_metrics_json_equals_brute_force(trained, command, tmp_path):
    data, ckpts = trained
    flags = both(ckpts, "--amp", "off")
    flags += ["--ood", "pasted", "--out", tmp_path / "r", "--save-scores", tmp_path / "s"]
    flags += ["--batch-size", 2, "--benchmark", "--no-compile"]
    code, out, _ = command("evaluate", *flags)
    assert code == 0 and "mIoU" in out
    results = json.loads((tmp_path / "r" / "metrics.json").read_text())

    # the same figures from whole arrays
    dataset, student = open_dataset("folder", data, "val"), load_model(ckpts / "student.pt")
    teacher, _ = load_ensemble([ckpts])
    images = torch.stack([dataset[i].image for i in range(len(dataset))])
    labels = torch.stack([dataset[i].labels for i in range(len(dataset))]).numpy()
    with torch.inference_mode():
        probs = student(images).logits.softmax(1).numpy()
        mine, theirs = student(images).uncertainty[:, 0].numpy(), teacher(images).std.numpy()
    valid = labels != 255
    wrong = (probs.argmax(1) != labels)[valid]
    scores = mine[valid].astype(np.float16).astype(float)
    pairs = scores[wrong][:, None] - scores[~wrong][None]
    auroc = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    assert results["uncertainty"]["student/dudes"]["auroc"] == pytest.approx(auroc, abs=1e-3)
    assert results["segmentation"]["student"]["pixel_accuracy"] == pytest.approx(
        1 - wrong.mean(), abs=1e-3
    )
    nll = -np.log(
        np.take_along_axis(probs, np.where(valid, labels, 0)[:, None].astype(int), 1)[:, 0][valid]
    )
    assert results["segmentation"]["student"]["nll"] == pytest.approx(nll.mean(), rel=1e-3)
    pearson = np.corrcoef(mine[valid], theirs[valid])[0, 1]
    assert results["fidelity"]["pearson"] == pytest.approx(pearson, abs=1e-3)
    assert results["segmentation"]["members"]["n"] == 2

    # every key of the contract
    models = {"member": {"entropy", "msp", "max_logit", "energy"},
              "teacher": {"std", "entropy", "mutual_information", "msp"},
              "student": {"dudes", "dudes_entropy", "dudes_mutual_information", "dudes_msp",
                          "entropy", "msp", "max_logit", "energy"}}  # fmt: skip
    keys = {f"{model}/{score}" for model, scores in models.items() for score in scores}
    assert set(results["uncertainty"]) == keys == set(results["ood"]["pasted"])
    for value in results["uncertainty"].values():
        assert {"auroc", "ap", "fpr95", "aurc", "eaurc", "ause", "rejection"} <= set(value)
        assert len(value["rejection"]) == 10
    assert {"rmse", "rmsle", "pearson", "spearman", "class_error"} <= set(results["fidelity"])
    assert [row["name"] for row in results["classes"]] == dataset.classes
    assert set(results["timing"]) == set(models)
    for model in models:
        assert {"miou", "pixel_accuracy", "nll", "brier", "ece"} <= set(
            results["segmentation"][model]
        )

    # the saved maps, the panels, the report
    saved = np.load(tmp_path / "s" / "val" / "student-dudes" / "0.npy")
    assert saved.dtype == np.float16 and saved.shape == labels.shape[1:]
    np.testing.assert_allclose(saved, mine[0], atol=1e-3)
    assert len(list((tmp_path / "s" / "pasted" / "teacher-std").glob("*.npy"))) == len(dataset)
    panels = list((tmp_path / "r" / "panels").glob("*.png"))
    assert len(panels) == 3 + 3 and all(Image.open(p).width > 500 for p in panels)
    report = (tmp_path / "r" / "report.html").read_text()
    assert "<script" not in report and "http-equiv" not in report and "data:image/png" in report


class Tables(HTMLParser):
    """The tables of a page by their heading: rows of texts."""

    def __init__(self):
        super().__init__()
        self.tables, self.tag, self.title = {}, "", ""

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "tr":
            self.tables.setdefault(self.title, []).append([])
        elif tag in ("th", "td"):
            self.tables[self.title][-1].append("")

    def handle_data(self, text):
        if self.tag == "h2":
            self.title = text
        elif self.tag in ("th", "td"):
            self.tables[self.title][-1][-1] += text

    def handle_endtag(self, tag):
        self.tag = ""


def test_every_number_of_the_report_is_that_of_metrics_json(trained, command, tmp_path):
    flags = both(trained[1], "--ood", "--out", tmp_path, "--benchmark", "--no-compile")
    assert command("evaluate", *flags)[0] == 0
    results = json.loads((tmp_path / "metrics.json").read_text())
    page = Tables()
    page.feed((tmp_path / "report.html").read_text())
    keys = {heading: (key, factor, digits)
            for key, (heading, factor, digits) in evaluate.COLUMNS.items()}  # fmt: skip
    parts = {"Segmentation": results["segmentation"], "Finding errors": results["uncertainty"],
             "Anomalies: pasted": results["ood"]["pasted"], "Cost": results["timing"],
             "Fidelity": {"student": results["fidelity"]}}  # fmt: skip
    compared = 0
    for title, part in parts.items():
        head, *rows = page.tables[title]
        labels = {key.replace("/", " ").replace("_", " "): key for key in part}
        assert {row[0].strip() for row in rows} == set(labels)
        for label, *cells in rows:
            for heading, cell in zip(head[1:], cells, strict=True):
                key, factor, digits = keys[heading]
                value = part[labels[label.strip()]].get(key)
                if value is not None:
                    assert cell == f"{factor * value:,.{digits}f}", (title, label, heading)
                    compared += 1
    assert compared > 100
    head, *rows = page.tables["Classes"]
    for row, source in zip(rows, results["classes"], strict=True):
        assert row[0] == source["name"]
        for heading, cell in zip(head[1:], row[1:], strict=True):
            network, kind = heading.split()[:2]
            value = source["iou" if kind == "IoU" else "uncertainty"][network]
            factor, digits = (100, 1) if kind == "IoU" else (1, 4)
            assert cell == ("–" if value is None else f"{factor * value:.{digits}f}")


def test_the_benchmark_measures_eager_and_compiled_networks(trained, monkeypatch):
    student, (teacher, _) = load_model(trained[1] / "student.pt"), load_ensemble([trained[1]])
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network: (seen.append(network), network)[1])
    args = argparse.Namespace(device="cpu", amp="off", batch_size=2, compile=True)
    networks = {"student": student, "teacher": teacher}
    figures = evaluate.benchmark(networks, torch.zeros(3, 64, 64, dtype=torch.uint8), args)
    assert seen == [student, *teacher.members, teacher.members[0]] and len(figures) == 3
    for name, row in figures.items():
        assert row["batch_size"] == 2 and row["size"] == [64, 64]
        for prefix in ("", "compiled_"):
            rate = row[prefix + "images_per_second"] * row[prefix + "ms_per_image"]
            assert rate == pytest.approx(1000) and row[prefix + "peak_memory_mb"] > 1, name
    assert figures["teacher"]["parameters"] == 2 * figures["member"]["parameters"]


def test_peak_memory_sees_what_was_freed():
    with evaluate.peak_memory(torch.device("cpu")) as peak:
        torch.ones(20_000_000)
    assert 75 < peak[0] < 100


def test_batch_size_changes_no_count(trained, command, tmp_path):
    _, ckpts = trained
    for size in (1, 3):
        flags = both(ckpts, "--out", tmp_path / str(size))
        assert command("evaluate", *flags, "--batch-size", size)[0] == 0
    one, three = (json.loads((tmp_path / s / "metrics.json").read_text()) for s in "13")
    assert one["segmentation"]["student"]["miou"] == pytest.approx(
        three["segmentation"]["student"]["miou"], abs=2e-3
    )
    assert one["uncertainty"]["teacher/std"]["n"] == three["uncertainty"]["teacher/std"]["n"]


def test_student_alone_is_enough(trained, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, ckpts = trained
    assert command("evaluate", "--student", ckpts / "student.pt", "--device", "cpu")[0] == 0
    results = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert set(results["segmentation"]) == {"student"} and results["fidelity"] == {}


def test_nothing_to_evaluate(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("evaluate")
    assert code == 2 and err.startswith("error: nothing to evaluate") and err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_other_classes_are_refused(trained, command, tmp_path):
    _, ckpts = trained
    code, _, err = command(
        "evaluate",
        "--student",
        ckpts / "student.pt",
        "--dataset",
        "synthetic",
        "--out",
        tmp_path / "r",
    )
    assert code == 2 and "know the classes" in err


def test_held_out_classes_are_anomalies(folder, command, tmp_path):
    from conftest import small

    ckpts = tmp_path / "ckpts"
    assert (
        command(
            "train",
            *small(folder, "--epochs", 1),
            "--members",
            2,
            "--out",
            ckpts,
            "--hold-out",
            "class 1",
        )[0]
        == 0
    )
    assert command("distill", "--teacher", ckpts, "--device", "cpu")[0] == 0
    student = load_model(ckpts / "student.pt")
    assert student.classifier[-1].out_channels == 3
    flags = both(ckpts, "--ood", "--out", tmp_path / "r")
    assert command("evaluate", *flags)[0] == 0
    results = json.loads((tmp_path / "r" / "metrics.json").read_text())
    whole = open_dataset("folder", folder, "val")
    labels = np.stack([whole[i].labels.numpy() for i in range(len(whole))])
    found = results["ood"]["held-out"]["student/dudes"]
    assert found["positives"] == (labels == 1).sum() and found["n"] == (labels != 255).sum()
    assert results["segmentation"]["student"]["n"] == ((labels != 255) & (labels != 1)).sum()


def test_predict(trained, command, tmp_path):
    data, ckpts = trained
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(30, 50, 3)).astype(np.uint8)).save(photos / "a.jpg")
    Image.fromarray(rng.integers(256, size=(1, 1)).astype(np.uint8)).save(photos / "b.png")
    (photos / "c.txt").write_text("no image")
    code, text, _ = command(
        "evaluate",
        "--student",
        ckpts / "student.pt",
        "--predict",
        photos,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert code == 0 and "1 skipped" in text and "c.txt" in text
    classes = Image.open(out / "a_classes.png")
    assert classes.mode == "P" and classes.size == (50, 30) and np.asarray(classes).max() < 4
    raw = Image.open(out / "a_uncertainty16.png")
    assert raw.mode.startswith("I") and raw.size == (50, 30)
    assert Image.open(out / "b_overlay.png").size == (1, 1)


def test_large_images_are_predicted_in_tiles(monkeypatch):
    def pointwise(networks, pixels, size, args):  # a network without context
        values = pixels.float().mean(dim=1)
        values = torch.nn.functional.interpolate(values[None], size, mode="nearest")[0]
        probs = torch.stack([values < 128, values >= 128], dim=1).float()
        return {"student": evaluate.Output(probs, {"dudes": values / 255})}

    monkeypatch.setattr(evaluate, "predict", pointwise)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 67, 3)).astype(np.uint8)
    args = argparse.Namespace(image_size=None, device="cpu", classes=["a", "b"],
                              primary={"student": "dudes", "teacher": "std"})  # fmt: skip
    image, networks = Image.fromarray(pixels), {"student": None}
    labels, u = evaluate.predict_maps(networks, image, args)
    np.testing.assert_allclose(u, pixels.mean(axis=2) / 255, atol=1e-6)
    monkeypatch.setattr(evaluate, "LARGE", 1000)
    for tile, context in ((16, 4), (50, 1), (7, 0), (100, 9)):
        monkeypatch.setattr(evaluate, "TILE", tile)
        monkeypatch.setattr(evaluate, "CONTEXT", context)
        tiled = evaluate.predict_maps(networks, image, args)
        np.testing.assert_array_equal(tiled[0], labels)
        np.testing.assert_array_equal(tiled[1], u)
    args.image_size = (8, 12)  # reduced anyway: one small map, enlarged
    labels, u = evaluate.predict_maps(networks, image, args)
    assert labels.shape == u.shape == (45, 67) and labels.dtype == np.uint8 and u.max() <= 1


def test_errors_are_one_line_with_code_2(trained, command, tmp_path):
    _, ckpts = trained
    student = ["--student", ckpts / "student.pt", "--out", tmp_path / "r", "--device", "cpu"]
    for flags, words in (
        (["--student", tmp_path / "none.pt"], "no such checkpoint"),
        (["--teacher", tmp_path], "no member_"),
        ([*student, "--data", tmp_path / "gone"], "no such folder"),
        ([*student, "--data", tmp_path], "no folder images/val"),
        ([*student, "--ood", "elsewhere"], "no such set"),
        ([*student, "--ood", "held-out"], "no held-out classes"),
        ([*student, "--batch-size", 0], "--batch-size 0"),
        ([*student, "--device", "cuda:7"], "--device cuda:7"),
        (["--nonsense"], "unrecognized arguments"),
    ):
        code, out, err = command("evaluate", *flags)
        assert code == 2 and words in err and err.count("\n") == 1, (flags, err)
        assert err.startswith("error: ") and not (tmp_path / "r").exists()


def test_choose_images_spans_best_to_worst():
    chosen = evaluate.choose_images([0.5, float("nan"), 0.9, 0.1, 0.7], 3)
    assert chosen == [("best", 2), ("median", 4), ("worst", 3)]
    assert evaluate.choose_images([float("nan")], 3) == []
