"""The evaluation: metrics.json against brute force, panels, predictions, what is refused; and what
the three command lines share: exit codes, remedies, ranges of flags, the live line."""

import contextlib
import copy
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image
from processes import ROOT, SERVER, Forked

import distill
import evaluate
import metrics
from data import DataError, open_dataset
from metrics import MetricError
from model import ModelError, UsageError, load_ensemble, load_model

CPU = torch.device("cpu")


def both(ckpts, *flags):
    """Flags that evaluate the student and its teacher."""
    student = ckpts / "student.pt"
    return ["--student", student, "--teacher", ckpts, "--device", "cpu", *flags]


class Evaluated(NamedTuple):
    """An evaluation of student and teacher that several tests look at."""

    folder: Path  # r, the results, and s, the saved scores
    stdout: str
    results: dict  # of metrics.json


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    flags = both(trained[1], "--amp", "off", "--batch-size", 2, "--benchmark", "--no-compile")
    flags += ["--ood", "--out", folder / "r", "--save-scores", folder / "s"]
    words = [str(flag) for flag in flags]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert evaluate.run_main(evaluate.main, evaluate.get_args_parser(), words) == 0
    results = json.loads((folder / "r" / "metrics.json").read_text())
    return Evaluated(folder, stdout.getvalue(), results)


def test_metrics_json_equals_brute_force(trained, evaluated):
    data, ckpts = trained
    folder, out, results = evaluated
    assert "mIoU" in out

    # the same figures from whole arrays
    dataset = open_dataset("folder", data, "val")
    student = load_model(ckpts / "student.pt")
    teacher, _ = load_ensemble([ckpts])
    images = torch.stack([dataset[i].image for i in range(len(dataset))])
    labels = torch.stack([dataset[i].labels for i in range(len(dataset))]).numpy()
    with torch.inference_mode():
        probs = student(images).logits.softmax(1).numpy()
        mine = student(images).uncertainty[:, 0].numpy()
        theirs = teacher(images).std.numpy()
    valid = labels != 255
    wrong = (probs.argmax(1) != labels)[valid]
    scores = mine[valid].astype(np.float16).astype(float)
    pairs = scores[wrong][:, None] - scores[~wrong][None]
    auroc = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    assert results["uncertainty"]["student/dudes"]["auroc"] == pytest.approx(auroc, abs=1e-3)
    assert results["segmentation"]["student"]["pixel_accuracy"] == pytest.approx(
        1 - wrong.mean(), abs=1e-3
    )
    index = np.where(valid, labels, 0)[:, None].astype(int)
    nll = -np.log(np.take_along_axis(probs, index, 1)[:, 0][valid])
    assert results["segmentation"]["student"]["nll"] == pytest.approx(nll.mean(), rel=1e-3)
    pearson = np.corrcoef(mine[valid], theirs[valid])[0, 1]
    assert results["fidelity"]["pearson"] == pytest.approx(pearson, abs=1e-3)
    assert results["segmentation"]["members"]["n"] == 2

    # every key of the contract
    free = {"entropy", "msp", "max_logit", "energy"}
    measures = {"std", "entropy", "mutual_information", "msp"}
    learned = {"dudes", "dudes_entropy", "dudes_mutual_information", "dudes_msp", "error"}
    models = {"member": free, "teacher": measures, "student": learned | free}
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
    saved = np.load(folder / "s" / "val" / "student-dudes" / "0.npy")
    assert saved.dtype == np.float16 and saved.shape == labels.shape[1:]
    np.testing.assert_allclose(saved, mine[0], atol=1e-3)
    assert len(list((folder / "s" / "pasted" / "teacher-std").glob("*.npy"))) == len(dataset)
    panels = list((folder / "r" / "panels").glob("*.png"))
    assert len(panels) == 3 + 3 and all(Image.open(p).width > 500 for p in panels)
    report = (folder / "r" / "report.html").read_text()
    assert "<script" not in report and "http-equiv" not in report and "data:image/png" in report


class Tables(HTMLParser):
    """The tables of a page by their heading: rows of texts. The name of a network, which stands
    above the rows of its scores, is put before the first text of each."""

    def __init__(self):
        super().__init__()
        self.tables, self.tag, self.title, self.network = {}, "", "", ""

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "table":
            self.network = ""
        elif tag == "tr" and ("class", "network") in attributes:
            self.tag = "network"
        elif tag == "tr":
            self.tables.setdefault(self.title, []).append([])
        elif tag == "th" and self.in_network_row:
            self.tag = "network"
        elif tag in ("th", "td") and not self.in_network_row:
            self.tables[self.title][-1].append("")
        if tag == "tr":
            self.in_network_row = self.tag == "network"

    def handle_data(self, text):
        if self.tag == "h2":
            self.title = text
        elif self.tag == "network":
            self.network = text + " "
        elif self.tag in ("th", "td"):
            row = self.tables[self.title][-1]
            row[-1] += self.network + text if len(row) == 1 else text

    def handle_endtag(self, tag):
        self.tag = ""


def test_every_number_of_the_report_is_that_of_metrics_json(evaluated):
    results = evaluated.results
    page = Tables()
    page.feed((evaluated.folder / "r" / "report.html").read_text())
    keys = {}
    for key, column in evaluate.COLUMNS.items():
        keys[column.heading] = (key, column.factor)
    parts = {
        "Segmentation": results["segmentation"],
        "Finding errors": results["uncertainty"],
        "Anomalies: pasted": results["ood"]["pasted"],
        "Cost": results["timing"],
        "Fidelity": {"student": results["fidelity"]},
    }
    compared = 0
    for title, part in parts.items():
        head, *rows = page.tables[title]
        labels = {key.replace("/", " ").replace("_", " "): key for key in part}
        assert {row[0].strip() for row in rows} == set(labels)
        for label, *cells in rows:
            for heading, cell in zip(head[1:], cells, strict=True):
                key, factor = keys[heading]
                value = part[labels[label.strip()]].get(key)
                if value is not None:
                    shown = float(cell.replace(",", ""))
                    assert shown == pytest.approx(factor * value, rel=5.1e-3), (title, label)
                    assert cell == evaluate.three_digits(factor * value), (title, label, heading)
                    compared += 1
    assert compared > 100
    head, *rows = page.tables["Classes"]
    for row, source in zip(rows, results["classes"], strict=True):
        assert row[0] == source["name"]
        for heading, cell in zip(head[1:], row[1:], strict=True):
            network, kind = heading.split()[:2]
            value = source["iou" if kind == "IoU" else "uncertainty"][network]
            factor = 100 if kind == "IoU" else 1
            assert cell == ("–" if value is None else evaluate.three_digits(factor * value))


def cells_of(scores):
    """Scores as coarse as those of the bootstrap."""
    return (metrics.float16_bucket(scores) >> metrics.PairedBootstrap.CELL_BITS).numpy()


def test_the_comparison_equals_drawing_images(trained, command, tmp_path):
    ckpts, images = trained[1], 7
    folder = write_folder(tmp_path / "data", train=1, val=images)
    flags = both(ckpts, "--data", folder, "--amp", "off", "--panels", 0, "--batch-size", 3)
    flags += ["--save-scores", tmp_path / "s", "--out", tmp_path / "r", "--ood", "pasted"]
    code, out, _ = command("evaluate", *flags)
    assert code == 0
    comparison = json.loads((tmp_path / "r/metrics.json").read_text())["comparison"]
    assert set(comparison) == {"draws", "seed", "errors", "ood"}
    assert set(comparison["ood"]["pasted"]) == {"auroc"}

    # the student's errors, and the scores as float16 maps
    dataset = open_dataset("folder", folder, "val")
    student = load_model(ckpts / "student.pt")
    wrong, valid = [], []
    for image, labels, _ in dataset:
        with torch.inference_mode():
            prediction = student(image[None]).logits[0].argmax(0)
        valid.append(labels < 254)
        wrong.append((prediction != labels)[valid[-1]].numpy())
    cells = {}  # of each score, for each image those of its labelled pixels
    for path in sorted((tmp_path / "s/val").iterdir()):
        maps = [torch.from_numpy(np.load(path / f"{name}.npy")) for name in dataset.names]
        pixels = [cells_of(values[mask]) for values, mask in zip(maps, valid, strict=True)]
        cells[path.name.replace("-", "/", 1)] = pixels

    def auroc(key, chosen):
        values = np.concatenate([cells[key][image] for image in chosen])
        positives = np.concatenate([wrong[image] for image in chosen])
        return metrics.pairs_auroc(values[positives], values[~positives])

    results = comparison["errors"]["auroc"]
    free = [f"student/{name}" for name in metrics.FREE_SCORES]
    whole = {key: auroc(key, range(images)) for key in cells}
    best = max(free, key=lambda key: whole[key])
    assert results["best_free"] == best and results["value"] == pytest.approx(whole[best])
    learned = set(whole) - set(free) - {key for key in whole if key.startswith("member/")}
    assert "student/error" in learned
    assert set(results["scores"]) == learned == set(comparison["errors"]["aurc"]["scores"])

    draws = comparison["draws"]
    generator = np.random.default_rng(comparison["seed"])
    drawn = []
    for times in generator.multinomial(images, np.full(images, 1 / images), size=draws):
        drawn.append(np.repeat(np.arange(images), times))
    best_of_draws = [auroc(best, chosen) for chosen in drawn]
    for key in ("student/dudes", "teacher/entropy"):
        row = results["scores"][key]
        assert row["value"] == pytest.approx(whole[key])
        assert row["gain"] == pytest.approx(whole[key] - whole[best])
        gains = []
        for chosen, value in zip(drawn, best_of_draws, strict=True):
            gains.append(auroc(key, chosen) - value)
        assert row["low"] == pytest.approx(np.percentile(gains, 2.5), abs=1e-9)
        assert row["high"] == pytest.approx(np.percentile(gains, 97.5), abs=1e-9)
        assert row["worth_more"] == evaluate.verdict(row["low"], row["high"])

    # AURC is better when lower, so its gain has the other sign.
    results = comparison["errors"]["aurc"]
    row = results["scores"]["student/dudes"]
    assert row["gain"] == pytest.approx(results["value"] - row["value"])

    # The terminal and the report show it as one table.
    assert "Worth more than free?" in out
    page = Tables()
    page.feed((tmp_path / "r/report.html").read_text())
    head, best_row, *rows = page.tables["Worth more than free?"]
    assert head == ["", "errors AUROC", "errors AURC", "pasted"]
    assert best_row[1] == best.removeprefix("student/").replace("_", " ")
    figures = [comparison["errors"]["auroc"], results, comparison["ood"]["pasted"]["auroc"]]
    labels = {key.replace("/", " ").replace("_", " "): key for key in learned}
    assert {row[0] for row in rows} == set(labels)
    for label, *cells in rows:
        for cell, figure, factor in zip(cells, figures, (100, 1, 100), strict=True):
            gain = figure["scores"][labels[label]]
            decided = f"{gain['worth_more']} {evaluate.three_digits(factor * gain['gain'], '+')}"
            undecided = gain["worth_more"] == "undecided"
            assert cell == ("undecided" if undecided else decided)


def test_a_verdict_follows_from_the_interval():
    nan = float("nan")
    intervals = {(0.1, 0.2): "yes", (-0.2, -0.1): "no", (-0.1, 0.1): "undecided"}
    intervals |= {(0.0, 0.1): "undecided", (nan, nan): "undecided"}
    for interval, expected in intervals.items():
        assert evaluate.verdict(*interval) == expected


def test_few_images_decide_nothing_and_without_a_student_nothing_is_compared(
    trained, evaluated, command, tmp_path
):
    comparison = evaluated.results["comparison"]
    row = comparison["errors"]["auroc"]["scores"]["teacher/std"]  # of three images
    assert row["low"] is row["high"] is None and row["worth_more"] == "undecided"
    assert row["gain"] is not None
    flags = ["--teacher", trained[1], "--device", "cpu", "--panels", 0, "--out", tmp_path]
    code, out, _ = command("evaluate", *flags)
    assert code == 0 and "Worth more" not in out
    assert json.loads((tmp_path / "metrics.json").read_text())["comparison"] == {}


@pytest.fixture(scope="module")
def student_of_errors(trained, tmp_path_factory):
    """A student with a confidence head that also learned the error."""
    path = tmp_path_factory.mktemp("errors") / "student.pt"
    words = ["--teacher", trained[1], "--device", "cpu", "--epochs", 1, "--head-epochs", 1]
    words += ["--targets", "std", "entropy", "error", "--out", path]
    parser = distill.get_args_parser()
    assert evaluate.run_main(distill.main, parser, [str(word) for word in words]) == 0
    return path


def test_the_predicted_error_is_a_score_with_a_reliability_diagram(
    trained, student_of_errors, command, tmp_path
):
    flags = ["--student", student_of_errors, "--teacher", trained[1], "--device", "cpu"]
    flags += ["--amp", "off", "--panels", 1, "--ood", "pasted", "--batch-size", 1]
    flags += ["--save-scores", tmp_path / "s", "--out", tmp_path / "r"]
    code, out, _ = command("evaluate", *flags)
    assert code == 0 and "student error" in out
    results = json.loads((tmp_path / "r/metrics.json").read_text())
    learned = {key for key in results["ood"]["pasted"] if key.startswith("student/")}
    learned -= {f"student/{name}" for name in metrics.FREE_SCORES}
    assert learned == {"student/dudes", "student/dudes_entropy", "student/error"}
    assert "teacher/error" not in results["uncertainty"]
    assert results["fidelity"]["measure"] == "std"
    assert "student/error" in results["comparison"]["errors"]["aurc"]["scores"]
    assert results["protocol"]["distilled"]["head"] == "confidence"

    # what its probability says, from whole maps
    dataset = open_dataset("folder", trained[0], "val")
    # in evaluate.py's memory layout: a pixel at the edge of a bin follows the last bits
    student = load_model(student_of_errors).to(memory_format=torch.channels_last)
    calibration = metrics.ErrorCalibration()
    for image, labels, _ in dataset:
        with torch.inference_mode():
            logits, uncertainty = student(image[None])
        calibration.update(uncertainty[0, 2], logits[0].argmax(0) != labels, labels < 254)
    expected = calibration.compute()
    error = results["uncertainty"]["student/error"]
    assert error["error_ece"] == pytest.approx(expected["ece"], abs=1e-5)
    assert sum(error["error_reliability"]["count"]) == error["n"] == expected["n"]
    report = (tmp_path / "r/report.html").read_text()
    assert "Reliability of predicted errors" in report

    out = tmp_path / "maps"
    flags = ["--predict", trained[0] / "images/val", "--device", "cpu", "--out", out]
    assert command("evaluate", "--student", student_of_errors, *flags)[0] == 0
    assert len(list(out.glob("*_dudes16.png"))) == 3


def test_the_benchmark_measures_eager_and_compiled_networks(trained, monkeypatch):
    student = load_model(trained[1] / "student.pt")
    teacher, _ = load_ensemble([trained[1]])
    seen = []

    def compile_nothing(network):
        seen.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_nothing)
    networks = evaluate.Networks(student, teacher)
    inference = evaluate.InferenceSettings(CPU, "off", batch_size=2)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    costs = evaluate.benchmark(networks, image, inference)
    assert len(costs) == 3
    assert seen == [*teacher.members, student, teacher.members[0]]
    for name, row in costs.items():
        assert row["batch_size"] == 2 and row["size"] == [64, 64]
        for prefix in ("", "compiled_"):
            rate = row[prefix + "images_per_second"] * row[prefix + "ms_per_image"]
            assert rate == pytest.approx(1000) and row[prefix + "peak_memory_mb"] > 1, name
    assert costs["teacher"]["parameters"] == 2 * costs["member"]["parameters"]


def test_peak_memory_sees_what_was_freed():
    with evaluate.peak_memory(CPU) as peak:
        torch.ones(20_000_000)
    assert 75 < peak.megabytes < 100


def test_peak_memory_is_measured_where_the_pass_fails():
    with contextlib.suppress(RuntimeError), evaluate.peak_memory(CPU) as peak:
        torch.ones(20_000_000)
        raise RuntimeError("out of memory")
    assert 75 < peak.megabytes < 100


def test_batch_size_changes_no_count(trained, evaluated, command, tmp_path):
    flags = both(trained[1], "--amp", "off", "--panels", 0, "--out", tmp_path)
    assert command("evaluate", *flags, "--batch-size", 3)[0] == 0
    three = json.loads((tmp_path / "metrics.json").read_text())
    two = evaluated.results  # a batch of two images and one of one
    assert two["segmentation"]["student"]["miou"] == pytest.approx(
        three["segmentation"]["student"]["miou"], abs=2e-3
    )
    assert two["uncertainty"]["teacher/std"]["n"] == three["uncertainty"]["teacher/std"]["n"]


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
    flags = ["--student", ckpts / "student.pt", "--dataset", "synthetic", "--out", tmp_path / "r"]
    code, _, err = command("evaluate", *flags)
    assert code == 2 and "know the classes" in err


def test_held_out_classes_are_anomalies(trained_without_a_class, command, tmp_path):
    folder, ckpts = trained_without_a_class
    student = load_model(ckpts / "student.pt")
    assert student.classifier[-1].out_channels == 3
    flags = both(ckpts, "--ood", "--panels", 0, "--out", tmp_path / "r")
    assert command("evaluate", *flags)[0] == 0
    results = json.loads((tmp_path / "r" / "metrics.json").read_text())
    whole = open_dataset("folder", folder, "val")
    labels = np.stack([whole[i].labels.numpy() for i in range(len(whole))])
    found = results["ood"]["held-out"]["student/dudes"]
    assert found["positives"] == (labels == 1).sum() and found["n"] == (labels != 255).sum()
    assert results["segmentation"]["student"]["n"] == ((labels != 255) & (labels != 1)).sum()


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
        ([*student, "--batch-size", 0], "--batch-size 0: has to be positive"),
        ([*student, "--batch-size", 2.5], "--batch-size: invalid int value: '2.5'"),
        ([*student, "--image-size", 32, -1], "--image-size -1: has to be positive"),
        ([*student, "--workers", -1], "--workers -1: cannot be negative"),
        ([*student, "--panels", -1], "--panels -1: cannot be negative"),
        ([*student, "--mc-samples", -2], "--mc-samples -2: cannot be negative"),
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


def test_panels_of_an_earlier_run_are_removed(trained, evaluated, command, tmp_path):
    shutil.copytree(evaluated.folder / "r", tmp_path, dirs_exist_ok=True)
    panels = tmp_path / "panels"
    assert len(list(panels.glob("*.png"))) == 6
    kept = [panels / "notes.txt", panels / "mine" / "a.png"]
    kept[1].parent.mkdir()
    for path in kept:
        path.write_text("not of this program")
    flags = ["--student", trained[1] / "student.pt", "--device", "cpu", "--out", tmp_path]
    assert command("evaluate", *flags, "--panels", 2)[0] == 0
    names = {path.name for path in panels.glob("*.png")}
    assert {name.split("_")[0] for name in names} == {"best", "worst"} and len(names) == 2
    assert all(path.exists() for path in kept)


def test_further_keys_of_a_checkpoint_do_not_matter(trained, command, tmp_path):
    checkpoint = torch.load(trained[1] / "student.pt", weights_only=True)
    checkpoint["config"]["normalisation"] = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    torch.save(checkpoint, tmp_path / "student.pt")
    flags = ["--student", tmp_path / "student.pt", "--out", tmp_path / "r", "--device", "cpu"]
    assert command("evaluate", *flags, "--panels", 0)[0] == 0


def test_resolving_leaves_the_command_line_as_it_is(trained):
    words = [str(word) for word in both(trained[1], "--ood")]
    args = evaluate.get_args_parser().parse_args(words)
    before = dict(vars(args))
    files = evaluate.find_networks(args.student, args.teacher, args.mc_samples)
    networks, checkpoint = evaluate.open_networks(files, CPU)
    settings = evaluate.resolve(args, checkpoint, CPU)
    assert vars(args) == before
    assert settings.dataset == "folder" and settings.data == trained[0]
    assert settings.ood == ["pasted"] and settings.inference.workers == 0
    assert settings.inference.amp in ("bf16", "off") and networks.shown_measure == "std"
    assert settings.inference.batch_size == 4 and settings.inference.fill_passes
    args.batch_size = 1
    inference = evaluate.resolve(args, checkpoint, CPU).inference
    assert inference.batch_size == 1 and not inference.fill_passes


def test_json_gets_none_for_what_is_no_number():
    nan, infinity = float("nan"), float("inf")
    value = {"a": nan, "b": {"c": [1, -infinity, (0.5, np.float64(nan))], "d": "nan"}, "e": None}
    expected = {"a": None, "b": {"c": [1, None, [0.5, None]], "d": "nan"}, "e": None}
    assert evaluate.without_nan(value) == expected


# ------------------------------------------------------------------ tables and charts


def test_the_report_escapes_its_explanations(evaluated):
    results = copy.deepcopy(evaluated.results)
    results["protocol"]["ood"]["pasted"]["void"] = "masks of <b>R&D</b>"
    page = evaluate.report(results, evaluate.Pictures([], None, {}))
    assert "void: masks of &lt;b&gt;R&amp;D&lt;/b&gt;" in page and "<b>" not in page


def test_terminal_and_report_agree_on_a_set_without_a_valid_pixel(trained, command, tmp_path):
    for kind, pixels in (
        ("images", np.full((40, 56, 3), 128, np.uint8)),
        ("labels", np.full((40, 56), 255, np.uint8)),
    ):
        (tmp_path / "empty" / kind).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "empty" / kind / "0.png")
    flags = ["--ood", tmp_path / "empty", "--panels", 0, "--out", tmp_path / "r"]
    code, out, _ = command("evaluate", *both(trained[1], *flags))
    assert code == 0
    results = json.loads((tmp_path / "r" / "metrics.json").read_text())
    protocol = results["protocol"]["ood"]["empty"]
    assert protocol["pixels"] == 0 and protocol["prevalence"] is None
    sentence = evaluate.protocol_sentence(protocol)
    assert ", 0 pixels, none anomalous; " in sentence
    assert f"OOD empty: {sentence}\n" in out
    assert sentence in (tmp_path / "r" / "report.html").read_text()


def test_the_table_of_the_terminal_draws_nothing(evaluated, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("the table drew a chart")

    monkeypatch.setattr(evaluate, "line_chart", refuse)
    table = evaluate.results_table(evaluated.results)
    assert table in evaluated.stdout and max(map(len, table.splitlines())) <= 100


def test_charts_know_their_height():
    charts = []
    for count in (1, 2, 5):
        curve = evaluate.Series("a curve", [0, 1], [0.5, float("nan")], colour=0, dash=1)
        limits = evaluate.Limits(y0=0)
        charts.append(evaluate.line_chart("title", [curve] * count, "x", "y", limits))
    for chart in charts:
        assert f'viewBox="0 0 420 {chart.height}"' in chart.svg
    assert charts[0].height == charts[1].height < charts[2].height
    sheet = evaluate.chart_sheet(charts)
    assert sheet.count("<svg ") == 4 and f'height="{charts[2].height}"' in sheet


# ------------------------------------------------------------------ exit codes


def raise_it(error):
    raise error


def test_exit_codes(capsys):
    assert evaluate.exit_code_of(len, "abc") == 0
    assert evaluate.exit_code_of(raise_it, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    for error in (UsageError, DataError, ModelError, MetricError):
        assert evaluate.exit_code_of(raise_it, error("--lr 0: no")) == 2
        assert capsys.readouterr().err == "error: --lr 0: no\n"
    for error in (ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error)):
            evaluate.exit_code_of(raise_it, error)
    with pytest.raises(SystemExit):
        evaluate.exit_code_of(raise_it, SystemExit(143))


def test_run_parses_and_calls(capsys):
    parser = evaluate.Parser(prog="test.py")
    parser.add_argument("--lr", type=evaluate.positive(float))
    seen = []
    assert evaluate.run_main(seen.append, parser, ["--lr", "0.5"]) == 0
    assert seen[0].lr == 0.5


def test_ranges_of_numbers(capsys):
    parser = evaluate.Parser(prog="test.py")
    parser.add_argument("--lr", type=evaluate.positive(float))
    parser.add_argument("--epochs", type=evaluate.positive(int))
    parser.add_argument("--decay", type=evaluate.non_negative(float))
    parser.add_argument("--seed", type=evaluate.non_negative(int))
    args = parser.parse_args("--lr 1e-3 --epochs 1 --decay 0 --seed 0".split())
    assert vars(args) == {"lr": 1e-3, "epochs": 1, "decay": 0.0, "seed": 0}
    assert type(args.epochs) is int and type(args.decay) is float
    for flag, value, rule in (
        ("--lr", "0", "0: has to be positive"),
        ("--lr", "inf", "inf: has to be finite"),
        ("--lr", "nan", "nan: has to be finite"),
        ("--epochs", "-3", "-3: has to be positive"),
        ("--decay", "-0.1", "-0.1: cannot be negative"),
        ("--decay", "-inf", "-inf: has to be finite"),
        ("--seed", "-1", "-1: cannot be negative"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"{flag}={value}"])
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err == f"error: {flag} {rule}; see python test.py --help\n"


def test_what_the_system_refuses_has_a_remedy_of_its_own(capsys):
    remedies = set()
    for number in evaluate.REMEDIES:
        error = OSError(number, os.strerror(number), "some/path")
        assert evaluate.exit_code_of(raise_it, error) == 2
        err = capsys.readouterr().err
        start = f"error: {os.strerror(number)} (some/path); "
        assert err.startswith(start) and err.count("\n") == 1
        remedies.add(err.removeprefix(start))
    assert len(remedies) == len(evaluate.REMEDIES) >= 20
    for name in (
        "ENOSPC EDQUOT EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG EMFILE ENFILE "
        "EIO ENOTEMPTY EFBIG ESTALE ELOOP EBUSY ETXTBSY ENOLCK"
    ).split():
        assert getattr(errno, name) in evaluate.REMEDIES


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "Bad file descriptor"),
        OSError(errno.EINVAL, "Invalid argument"),  # of no file
        OSError("no number at all"),
        io.UnsupportedOperation("fileno"),
    ],
)
def test_what_no_user_causes_is_a_traceback(error):
    with pytest.raises(OSError):
        evaluate.exit_code_of(raise_it, error)


@pytest.mark.parametrize(
    "text",
    [
        "cannot read the image a.png (OSError: broken); restore the file",
        "Error: ends in Error: nothing",
        "the file is Caught Error: b.png",
    ],
)
def test_an_error_text_is_shown_whole(capsys, text):
    assert evaluate.exit_code_of(raise_it, DataError(text)) == 2
    assert capsys.readouterr().err == f"error: {text}\n"


def test_an_error_text_of_several_lines_is_one_line(capsys):
    assert evaluate.exit_code_of(raise_it, DataError("first\n  second \n\nthird\n")) == 2
    assert capsys.readouterr().err == "error: first second third\n"


class Broken(torch.utils.data.Dataset):
    """A data set that cannot be read."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    "error, line",
    [
        (DataError("cannot read a.png (ValueError: x)"), "cannot read a.png (ValueError: x)"),
        (DataError("cannot read DataError: a.png"), "cannot read DataError: a.png"),
        (
            OSError(errno.EMFILE, "Too many open files", "a.npy"),
            f"Too many open files; {evaluate.REMEDIES[errno.EMFILE]}",
        ),
    ],
)
def test_an_error_met_by_a_worker_is_its_last_line(capsys, error, line):
    loader = torch.utils.data.DataLoader(Broken(error), num_workers=1)
    assert evaluate.exit_code_of(list, loader) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_fault_of_the_program_in_a_worker_is_a_traceback():
    loader = torch.utils.data.DataLoader(Broken(RuntimeError("a bug")), num_workers=1)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate.exit_code_of(list, loader)


@pytest.mark.parametrize(
    "text, remedy",
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error.",
            "a process that loads images died, often for want of shared memory; give it more (in "
            "a container --shm-size=8g), or use --workers 0",
        ),
        (
            "[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:2",
            "the group of processes broke (Connection closed by peer [::1]:2); look at what the "
            "others say, then give every node the same command again: it continues",
        ),
    ],
)
def test_the_end_of_another_process_is_one_line(capsys, text, remedy):
    def fail():
        raise RuntimeError(text)

    assert evaluate.exit_code_of(fail) == 2
    assert capsys.readouterr().err == f"error: {remedy}\n"


def speak_twice(is_alone, lines):
    """Print a line, and more of them when nobody listens any longer."""

    def speak():
        print("one line", flush=True)
        is_alone.wait()
        for _ in range(lines):
            print("another line")

    return evaluate.exit_code_of(speak)


def speak_twice_in_one_pipe(is_alone, lines):
    os.dup2(1, 2)
    return speak_twice(is_alone, lines)


NOTE = "note: the program that read the output has ended; the work goes on without it\n"


@pytest.mark.parametrize("lines", [1, 100_000])  # what a buffer holds, and what it does not
@pytest.mark.parametrize("with_stderr", [False, True])  # as `2>&1 | head -1`
def test_a_closed_pipe_loses_no_work(lines, with_stderr):
    is_alone = SERVER.Event()
    process = Forked(speak_twice_in_one_pipe if with_stderr else speak_twice, is_alone, lines)
    assert process.stdout.readline() == "one line\n"
    process.stdout.close()
    is_alone.set()
    code, _, err = process.finish()
    assert code == 0 and err == ("" if with_stderr else NOTE)


def test_an_interpreter_that_ends_repeats_no_refusal():
    """It flushes its streams once more, which a closed pipe and a full disk refuse."""
    line = "import evaluate, sys; sys.exit(evaluate.exit_code_of(print, 'a line'))"
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    unread = subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, **options)
    unread.stdout.close()
    with open("/dev/full", "w") as full:
        refused = subprocess.Popen([sys.executable, "-c", line], stdout=full, **options)
    assert unread.communicate()[1] == NOTE
    assert unread.returncode == 0
    remedy = evaluate.REMEDIES[errno.ENOSPC]
    assert refused.communicate()[1] == f"error: No space left on device; {remedy}\n"
    assert refused.returncode == 2


# ------------------------------------------------------------------ the live line


class Terminal(io.StringIO):
    """A stderr that is a terminal, and what each of its rows shows in the end."""

    def isatty(self):
        return True

    def rows(self, columns):
        rows = [[" "] * columns]
        column = 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
            elif character == "\n" or column == columns:
                rows.append([" "] * columns)
                column = 0
            if character not in "\r\n":
                rows[-1][column] = character
                column += 1
        return ["".join(row).rstrip() for row in rows]


@pytest.mark.parametrize("columns", [80, 33])
def test_the_live_line_leaves_no_row_behind(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(evaluate.shutil, "get_terminal_size", lambda *fallback: size)
    line = evaluate.LiveLine()
    line.show("a long line " * 20)
    assert terminal.rows(columns) == [("a long line " * 20)[: columns - 1].rstrip()]
    line.show("short")
    assert terminal.rows(columns) == ["short"]
    line.show("x" * (columns - 6) + "  part  left out")
    assert terminal.rows(columns) == ["x" * (columns - 6)]  # "  par" would fit
    line.show("x" * columns)
    line.clear()
    line.clear()
    print("epoch 1", file=terminal)
    assert terminal.rows(columns) == ["epoch 1", ""]


def test_the_live_line_is_due_every_half_second(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    line = evaluate.LiveLine()
    due = []
    for _ in range(16):
        due.append(line.is_due())
        if due[-1]:
            line.show("text")
        now[0] += 0.125
    assert [k for k, is_due in enumerate(due) if is_due] == [4, 8, 12]


def test_the_live_line_is_for_terminals_and_may_be_silent(monkeypatch):
    for stream, silent in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        line = evaluate.LiveLine(silent)
        line.show("text")
        line.clear()
        assert not line.is_due() and stream.getvalue() == ""


def test_a_pass_shows_its_progress_and_takes_it_away(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(evaluate.LiveLine, "PAUSE", 0)
    with evaluate.ImageProgress(4) as progress:
        progress.advance(1)
        assert re.match(r"1/4 images  [\d.]+ images/s  \d+ s left$", terminal.rows(80)[0])
    assert terminal.rows(80) == [""]
