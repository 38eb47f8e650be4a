"""Measure what the uncertainty is worth: calibration, error and OOD detection, fidelity, time.

    python evaluate.py --ood      # -> results/: metrics.json, report.html, panels/, two pictures
    python evaluate.py --student ckpts/student.pt --teacher ckpts/ --ood pasted --benchmark
    python evaluate.py --student ckpts/student.pt --predict photos/     # maps of one's own pictures
    python evaluate.py --predict photo.jpg --score msp entropy          # of these scores
    python evaluate.py --export student.pt2      # a network that needs nothing of this project

Everything is pooled over all labelled pixels of the split at their native size
(metrics.py has the definitions); member 0, the teacher and the student see the same
pixels in the same pass.

Outline, one section per line:

    networks and their scores             Networks, predict: probabilities and scores by name;
                                          load_model: a student for a program of one's own
    measure: the labelled split           validate (for training), evaluate_split
    measure: anomalies                    evaluate_ood: by pixels, by components, by images
    measure: worth more than free?        compare_with_free: distilled scores and free ones
    measure: time and memory              benchmark
    predict: maps of one's own images     predict_files, in tiles where an image is large
    export: a network for other programs  export_network: .pt2 and .onnx
    pictures                              colours, panels, what is rejected
    charts                                line_chart, confusion_chart, chart_sheet: SVG by hand
    report: tables                        what the terminal and the page both show
    report: pictures and the page         report: one HTML file that needs nothing else
    what the three command lines share    exit codes, remedies, argparse types, the live line
    command line                          find and open the networks, resolve, main
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036, an older Python reads until here
    version = sys.version.split()[0]
    remedy = "make the virtual environment with Python 3.11 or newer"
    print(f"error: this is Python {version}; {remedy}", file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import contextlib
import ctypes
import errno
import html
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset

import data
import metrics
import model
from metrics import ERROR, FREE_SCORES, MEASURES
from model import (
    RGB,
    UsageError,
    autocast,
    choose_amp,
    choose_device,
    locked,
    speaks_for_command,
    torchrun_rank,
)

# ------------------------------------------------------------------------ networks and their scores


class Networks(NamedTuple):
    """The networks to evaluate, in eval mode on their device, and what their outputs mean."""

    student: model.DeepLabV3 | None = None
    teacher: model.Ensemble | None = None
    measures: Sequence[str] = ()  # what the student learned, one channel each; `ERROR` is last
    classes: Sequence[str] = ()  # names of the C classes
    palette: Sequence[RGB] = ()  # colours of the classes

    def by_name(self) -> dict[str, nn.Module]:
        """The networks that are not None, as "teacher" and "student"."""
        networks = {}
        if self.teacher is not None:
            networks["teacher"] = self.teacher
        if self.student is not None:
            networks["student"] = self.student
        return networks

    @property
    def main_name(self) -> str:
        """The network whose prediction is used where only one is shown: the student or,
        if there is none, the teacher."""
        return "teacher" if self.student is None else "student"

    @property
    def shown_measure(self) -> str:
        """The teacher's measure that panels, the class table and fidelity show: the
        paper's std, or the student's first measure where it did not learn the std.

        `validate` differs on purpose: while a student is trained, only its first
        measure is compared, which is the one that the user named first.
        """
        if not self.measures or "std" in self.measures:
            return "std"
        return self.measures[0]

    def shown_score(self, name: str) -> str:
        """The score of "student", "teacher" or "member" that panels and the class table show."""
        if name == "student":
            return student_score(self.shown_measure)
        if name == "teacher":
            return self.shown_measure
        return "entropy"


class InferenceSettings(NamedTuple):
    """How images run through the networks."""

    device: torch.device
    amp: str  # bf16, fp16 or off
    batch_size: int = 1  # images
    workers: int = 0  # processes that load them
    fill_passes: bool = False  # as `data.evaluation_loader` has it


class Output(NamedTuple):
    """What one network predicts for a batch."""

    probs: Tensor  # float32 [B, C, H, W]
    scores: dict[str, Tensor]  # float32 [B, H, W] each; higher = more uncertain


def student_score(measure: str) -> str:
    """The name of what the student predicts for a measure: "dudes" is the distilled
    std. `ERROR` keeps its name, as it is nothing that a teacher distilled."""
    if measure == "std":
        return "dudes"
    if measure == ERROR:
        return ERROR
    return f"dudes_{measure}"


class MemberStream:
    """The members' logits [B, C, H, W], one member at a time, for `predictive_statistics`.

    Holding the logits of all members at once would need too much memory. So this
    iterator has side effects: while the logits pass, it keeps those of the first member
    (`first`) and, if it is given labels [B, H, W] and one confusion matrix per member,
    updates these matrices.
    """

    def __init__(
        self,
        member_logits: Iterable[Tensor],
        labels: Tensor | None = None,
        confusions: Sequence[metrics.ConfusionMatrix] = (),
    ):
        self.member_logits = member_logits
        self.labels = labels
        self.confusions = confusions
        self.first: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        for number, logits in enumerate(self.member_logits):
            if number == 0:
                self.first = logits
            if self.confusions:
                prediction = model.predicted_class(logits)
                self.confusions[number].update(prediction, self.labels)
            yield logits


def predict(
    networks: Networks,
    images: Tensor,
    size: tuple[int, int],
    amp: str,
    labels: Tensor | None = None,
    confusions: Sequence[metrics.ConfusionMatrix] = (),
) -> dict[str, Output]:
    """Probabilities and scores of every network at `size` (H, W), softmax after the upsampling.

    images: uint8 [B, 3, h, w]. Returns "member" and "teacher" if there is a teacher,
    then "student" if there is one. "member" is the teacher's first member, or the first
    sample of an MC-dropout teacher. With labels [B, H, W] and one confusion matrix per
    member, these matrices are updated too: each member's logits exist only during this
    call.
    """
    outputs = {}
    if networks.teacher is not None:
        with autocast(images.device, amp):
            member_logits = networks.teacher.member_logits(images, size)
            stream = MemberStream(member_logits, labels, confusions)
            # This runs the members, and the side effects of `stream` with them.
            ensemble_prediction = model.predictive_statistics(stream, with_expected_entropy=True)
        probs = stream.first.softmax(dim=1)
        outputs["member"] = Output(probs, metrics.free_scores(stream.first, probs))
        scores = metrics.ensemble_measures(ensemble_prediction, MEASURES)
        outputs["teacher"] = Output(ensemble_prediction.probs, scores)
    if networks.student is not None:
        with autocast(images.device, amp):
            logits, uncertainty = networks.student(images, size)
        outputs["student"] = student_output(logits, uncertainty, networks.measures)
    return outputs


def student_output(logits: Tensor, uncertainty: Tensor | None, measures: Sequence[str]) -> Output:
    """A student's probabilities, and its scores: of each measure that it learned, in
    the measure's own unit, and the free ones.

    logits [B, C, H, W]; uncertainty [B, T, H, W], a channel per measure, None without measures.
    """
    probs = logits.softmax(dim=1)
    scores = {}
    for channel, measure in enumerate(measures):
        scale = 1.0
        if measure != ERROR:
            scale = MEASURES[measure].scale(logits.shape[1])
        scores[student_score(measure)] = uncertainty[:, channel] * scale
    return Output(probs, scores | metrics.free_scores(logits, probs))


class Predictor(nn.Module):
    """A network, in eval mode, with a name for everything that it predicts: see `load_model`.

    Attributes: classes, palette, measures and image_size, those of `model.DeepLabV3`.
    """

    def __init__(self, network: model.DeepLabV3):
        super().__init__()
        self.network = network
        self.classes = network.classes
        self.palette = network.palette
        self.measures = network.measures
        self.image_size = network.image_size
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What the network predicts for RGB images [B, 3, H, W], uint8 or float in [0, 1].

        `classes` uint8 [B, H, W], `probabilities` float32 [B, C, H, W], and every score
        of `student_output` float32 [B, H, W]. --export writes this function.
        """
        logits, uncertainty = self.network(images)
        output = student_output(logits, uncertainty, self.measures)
        classes = model.predicted_class(output.probs).to(torch.uint8)
        return {"classes": classes, "probabilities": output.probs} | output.scores

    def as_student(self) -> Networks:
        """This network as that which the functions of this module evaluate."""
        return Networks(self.network, None, self.measures, self.classes, self.palette)

    @torch.inference_mode()
    def predict(self, image: Image.Image | np.ndarray) -> "Maps":
        """The classes uint8 [H, W] and, by name, the scores float32 [H, W] of one image.

        image: a PIL image of any mode of whole numbers, which is set upright as its
        EXIF tag says, or RGB values uint8 [H, W, 3]. Of any size: it is resized in
        proportion to what the network was trained for, and the maps have its own size,
        all as `evaluate.py --predict` does. Raises DataError where it is no such image.
        """
        if isinstance(image, Image.Image):
            image = data.to_rgb(image)
        else:
            image = data.from_array(image)
        networks = self.as_student()
        inference = InferenceSettings(self.network.rgb_mean.device, amp="off")
        return predict_maps(networks, image, self.image_size, inference, scores_of(networks))


def load_model(path: str | Path) -> Predictor:
    """The network of a checkpoint, in eval mode, on the CPU, with a name for what it predicts.

        student = load_model("ckpts/student.pt")
        classes, scores = student.predict(Image.open("photo.jpg"))

    It is that of `model.load_model`, which knows logits and channels alone: what they
    stand for is in metrics.py, of which model.py knows nothing. Raises ModelError if it
    is unusable.
    """
    return Predictor(model.load_model(path))


def scores_by_key(outputs: dict[str, Output]) -> dict[str, Tensor]:
    """Every score [B, H, W] of every network as "<network>/<score>"."""
    scores = {}
    for name, output in outputs.items():
        for score, values in output.scores.items():
            scores[f"{name}/{score}"] = values
    return scores


class ImageStatistics(NamedTuple):
    """One score over all pixels of one image, by which whole images are told apart."""

    mean: float
    p99: float  # 99th percentile


def image_statistics(outputs: dict[str, Output]) -> dict[str, list[ImageStatistics]]:
    """The statistics of each of the B images, by "<network>/<score>"."""
    statistics = {}
    for key, values in scores_by_key(outputs).items():
        values = values.flatten(1)  # [B, H * W]
        rank = math.ceil(0.99 * values.shape[1])
        percentile = values.kthvalue(rank, dim=1).values
        pairs = torch.stack([values.mean(dim=1), percentile], dim=1).tolist()  # [B, 2]
        statistics[key] = [ImageStatistics(mean, p99) for mean, p99 in pairs]
    return statistics


def evaluation_batches(
    dataset: Dataset, inference: InferenceSettings
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """One pass over a data set, with a live line: images uint8 [B, 3, h, w] and labels
    uint8 [B, H, W] on the device, and the B indices."""
    torch.manual_seed(0)  # so that MC dropout draws the same samples in every pass
    loader = data.evaluation_loader(
        dataset,
        inference.batch_size,
        inference.workers,
        inference.device,
        fill_passes=inference.fill_passes,
    )
    with ImageProgress(len(dataset)) as progress:
        for images, labels, index in itertools.chain.from_iterable(loader):
            images = images.to(inference.device, non_blocking=True)
            labels = labels.to(inference.device, non_blocking=True)
            yield images, labels, index.tolist()
            progress.advance(len(images))


def save_scores(folder: Path, outputs: dict[str, Output], names: list[str]) -> None:
    """Save every score as float16 [H, W]: folder/<network>-<score>/<name of the image>.npy."""
    for key, values in scores_by_key(outputs).items():
        score_folder = folder / key.replace("/", "-")
        score_folder.mkdir(parents=True, exist_ok=True)
        for name, score in zip(names, values.half().cpu().numpy(), strict=True):
            content = io.BytesIO()  # np.save on a file does not always say that the disk is full
            np.save(content, score)
            (score_folder / f"{name}.npy").write_bytes(content.getbuffer())


# ---------------------------------------------------------------------- measure: the labelled split


@torch.inference_mode()
def validate(
    network: nn.Module,
    loader: DataLoader,
    device: torch.device,
    amp: str,
    teacher_target: Callable | None = None,
    one_size: bool = False,
) -> dict:
    """How well `network` does on the images of an `evaluation_loader`, while it is trained.

    Returns miou, iou, pixel_accuracy, mean_class_accuracy and n of
    `metrics.ConfusionMatrix`, in a process group over the images of all processes.
    teacher_target(images, (H, W), index) returns the teacher's measure [B, H, W]; if it
    is given, the result also has `metrics.Fidelity` of the student's first uncertainty,
    as fidelity_rmse, fidelity_pearson and so on.

    A compiled network runs compiled where all images and labels have one size, and
    eagerly otherwise: every size would be compiled anew, which takes longer than it
    saves.
    """
    network.eval()
    confusion = metrics.ConfusionMatrix(network.num_classes)
    fidelity = metrics.Fidelity()
    for images, labels, index in itertools.chain.from_iterable(loader):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        size = labels.shape[-2:]
        # The last, smaller batch has another size too.
        run_compiled = one_size and len(images) == loader.batch_size
        stance = "default" if run_compiled else "force_eager"
        with torch.compiler.set_stance(stance), autocast(device, amp):
            logits, uncertainty = network(images, size)
        confusion.update(model.predicted_class(logits), labels)
        if teacher_target is not None:
            teacher = teacher_target(images, size, index)
            fidelity.update(uncertainty[:, 0], teacher, labels < data.IGNORED)
    confusion.all_reduce()
    fidelity.all_reduce()
    results = confusion.compute()
    if teacher_target is not None:
        for key, value in fidelity.compute().items():
            results[f"fidelity_{key}"] = value
    return results


class SplitTracker:
    """The accumulators of one network over the labelled split."""

    def __init__(self, shown_score: str, num_classes: int):
        self.shown_score = shown_score  # the score in the class table
        self.confusion = metrics.ConfusionMatrix(num_classes)
        self.proper = metrics.ProperScores()
        self.calibration = metrics.CalibrationError()
        self.error_calibration = metrics.ErrorCalibration()  # where `ERROR` is among the scores
        self.class_uncertainty = metrics.ClassUncertainty(num_classes)
        self.rejection: dict[str, metrics.RejectionCurve] = {}  # of each score
        self.num_classes = num_classes

    def update(self, output: Output, labels: Tensor) -> Tensor:
        """Count a batch; returns which pixels are predicted correctly, bool [B, H, W]."""
        prediction = model.predicted_class(output.probs)  # [B, H, W]
        self.confusion.update(prediction, labels)
        self.proper.update(output.probs, labels)
        self.calibration.update(output.probs, labels, prediction)
        self.class_uncertainty.update(output.scores[self.shown_score], prediction, labels)
        for name, score in output.scores.items():
            if name not in self.rejection:
                self.rejection[name] = metrics.RejectionCurve(self.num_classes)
            self.rejection[name].update(score, prediction, labels)
        correct = prediction == labels  # False for void: a class never equals 254 or 255
        if ERROR in output.scores:
            self.error_calibration.update(output.scores[ERROR], ~correct, labels < data.IGNORED)
        return correct

    def segmentation_results(self) -> dict:
        """Accuracy, proper scores, calibration, and the mean uncertainty over the classes."""
        results = self.confusion.compute() | self.proper.compute() | self.calibration.compute()
        results["reliability"] = results.pop("bins")
        results["munc"] = self.class_uncertainty.compute()["munc"]
        return results

    def score_results(self) -> dict[str, dict]:
        """How well each score finds the network's own errors."""
        results = {}
        for name, rejection in self.rejection.items():
            # The numbers of correct and of wrong pixels by score are all that the three need.
            detection, selective = rejection.error_metrics()
            results[name] = selective.compute() | rejection.compute() | detection_results(detection)
        if ERROR in results:
            calibration = self.error_calibration.compute()
            results[ERROR]["error_ece"] = calibration["ece"]
            results[ERROR]["error_reliability"] = calibration["bins"]
        return results

    def operating_points(self) -> dict[str, list[dict]]:
        """`metrics.SelectivePrediction.operating_points` of each score."""
        points = {}
        for name, rejection in self.rejection.items():
            _, selective = rejection.error_metrics()
            points[name] = selective.operating_points()
        return points


def detection_results(detection: metrics.Detection) -> dict:
    """AUROC, AP, FPR95, and both curves thinned to what a plot can show; where there
    are any, the share of the scores that float16 cannot hold."""
    curves = detection.curves()
    fpr = np.append(0.0, curves["fpr"])
    tpr = np.append(0.0, curves["tpr"])
    recall = curves["recall"]
    precision = curves["precision"]
    roc_points = metrics.thin_curve(fpr, tpr)
    pr_points = metrics.thin_curve(recall, precision)
    results = detection.compute()
    results["roc"] = {"fpr": fpr[roc_points].tolist(), "tpr": tpr[roc_points].tolist()}
    results["pr"] = {
        "recall": recall[pr_points].tolist(),
        "precision": precision[pr_points].tolist(),
    }
    beyond = share_beyond_float16(detection)
    if beyond > 0:
        results["beyond_float16"] = beyond
    return results


def share_beyond_float16(detection: metrics.Detection) -> float:
    """Which part of the scores is infinite as float16: their differences are lost."""
    pixels = detection.state["histogram"][:2].sum(0)  # [BUCKETS], without void
    beyond = pixels[metrics.LOWEST_BUCKET] + pixels[metrics.HIGHEST_BUCKET]
    return float(beyond / pixels.sum().clamp(min=1))


def warn_beyond_float16(name: str, results: dict[str, dict]) -> None:
    """Say of which scores, by "<network>/<score>", a part of the set `name` exceeds float16."""
    texts = []
    for key, score_results in results.items():
        share = score_results.get("beyond_float16", 0)
        if share > 0:
            texts.append(f"{key} {100 * share:.3g} %")
    if texts:
        warn(
            f"{name}: scores beyond float16, +-65,504, count as equal: {', '.join(texts)}; divide "
            "them by a constant in metrics.FREE_SCORES"
        )


class FidelityTracker:
    """How closely the student's uncertainty follows its teacher's: `metrics.Fidelity`,
    and a joint histogram of both over all labelled pixels for the report's picture
    (with linear bins and far fewer of them than that metric has)."""

    BINS = 64  # along each axis of the histogram, from 0 to `largest`

    def __init__(self, measure: str, num_classes: int, num_members: int):
        self.measure = measure
        self.largest = MEASURES[measure].scale(num_classes)
        if measure == "std":
            self.largest = metrics.largest_std(num_members)
        self.fidelity = metrics.Fidelity()
        self.density: Tensor | int = 0  # becomes a tensor with the first batch, on its device

    def update(self, student: Tensor, teacher: Tensor, valid: Tensor) -> None:
        """student, teacher: uncertainties [B, H, W]; valid: bool [B, H, W]."""
        self.fidelity.update(student, teacher, valid)
        student_bin = self.bin_of(student[valid])
        teacher_bin = self.bin_of(teacher[valid])
        bin_index = student_bin * self.BINS + teacher_bin
        self.density = self.density + torch.bincount(bin_index, minlength=self.BINS**2)

    def bin_of(self, uncertainty: Tensor) -> Tensor:
        """The bin of each value along its axis, 0 to BINS - 1."""
        return (self.BINS / self.largest * uncertainty).long().clamp(0, self.BINS - 1)

    def compute(self, classes: list[dict]) -> dict:
        """The part "fidelity" of metrics.json; classes: its part "classes"."""
        gaps = []  # one per class that both networks predict
        for row in classes:
            uncertainty = row["uncertainty"]
            gap = abs(uncertainty["student"] - uncertainty["teacher"])
            if not math.isnan(gap):
                gaps.append(gap)
        results = self.fidelity.compute()
        results["density"] = self.density.view(self.BINS, self.BINS).tolist()
        results["density_max"] = self.largest
        results["measure"] = self.measure
        results["class_error"] = float(np.mean(gaps)) if gaps else math.nan
        return results


class SplitResults(NamedTuple):
    """What `evaluate_split` returns."""

    # The parts segmentation, uncertainty, classes, confusion, operating_points,
    # recommended and fidelity of metrics.json
    results: dict
    comparison: dict  # of finding errors, as `compare_with_free` returns it; {} without a student
    accuracy: list[float]  # pixel accuracy of each image, by the network `Networks.main_name`
    # Of the images that show no held-out class: the negatives of image-level OOD detection.
    image_statistics: dict[str, list[ImageStatistics]]


@torch.inference_mode()
def evaluate_split(
    networks: Networks,
    dataset: data.SegmentationDataset,
    inference: InferenceSettings,
    score_folder: Path | None = None,
    with_image_statistics: bool = False,
) -> SplitResults:
    """Everything that is measured against labels, in one pass over the images.

    score_folder: where `save_scores` writes the score maps. with_image_statistics:
    collect `image_statistics`. The accuracy of an image that is all void is NaN.
    """
    num_classes = len(dataset.classes)
    num_members = 0
    if networks.teacher is not None:
        num_members = len(networks.teacher)
    confusions = [metrics.ConfusionMatrix(num_classes) for _ in range(num_members)]
    trackers: dict[str, SplitTracker] = {}
    fidelity = None
    if networks.student is not None and networks.teacher is not None:
        fidelity = FidelityTracker(networks.shown_measure, num_classes, num_members)
    bootstrap = metrics.PairedBootstrap()
    accuracy: list[float] = []
    collected: dict[str, list[ImageStatistics]] = defaultdict(list)

    for images, labels, index in evaluation_batches(dataset, inference):
        size = labels.shape[-2:]
        outputs = predict(networks, images, size, inference.amp, labels, confusions)
        if score_folder is not None:
            save_scores(score_folder, outputs, names_of(dataset, index))
        valid = labels < data.IGNORED
        for name, output in outputs.items():
            if name not in trackers:
                trackers[name] = SplitTracker(networks.shown_score(name), num_classes)
            correct = trackers[name].update(output, labels)  # [B, H, W]
            if name == networks.main_name:
                accuracy += (correct.sum((1, 2)) / valid.sum((1, 2))).tolist()
        if with_image_statistics:
            held_out = (labels == data.IGNORED).flatten(1).any(dim=1).tolist()  # B booleans
            for key, statistics in image_statistics(outputs).items():
                for image, shows_held_out in zip(statistics, held_out, strict=True):
                    if not shows_held_out:
                        collected[key].append(image)
        if fidelity is not None:
            student_map = outputs["student"].scores[networks.shown_score("student")]
            teacher_map = outputs["teacher"].scores[networks.shown_score("teacher")]
            fidelity.update(student_map, teacher_map, valid)
        if networks.student is not None:
            # All scores are asked for the student's errors, the teacher's measures too.
            wrong = model.predicted_class(outputs["student"].probs) != labels
            bootstrap.update(compared_scores(outputs), wrong, valid)

    results = results_of_trackers(dataset.classes, trackers, confusions)
    main_name = networks.main_name
    results["operating_points"] = trackers[main_name].operating_points()
    results["recommended"] = recommended_score(main_name, results["uncertainty"])
    results["fidelity"] = {}
    if fidelity is not None:
        results["fidelity"] = fidelity.compute(results["classes"])
    comparison = compare_with_free(bootstrap, ["auroc", "aurc"])
    return SplitResults(results, comparison, accuracy, collected)


def names_of(dataset: Dataset, index: list[int]) -> list[str]:
    """The names of the samples with these indices, for the files that are written of them."""
    return [dataset.names[i] for i in index]


def results_of_trackers(
    classes: list[str],
    trackers: dict[str, SplitTracker],
    confusions: list[metrics.ConfusionMatrix],
) -> dict:
    """The parts segmentation, uncertainty, classes and confusion of metrics.json.

    classes: names of the classes; trackers: by network; confusions: one per member.
    """
    segmentation = {}
    uncertainty = {}
    confusion = {}
    for name, tracker in trackers.items():
        segmentation[name] = tracker.segmentation_results()
        confusion[name] = tracker.confusion.pixels_by_class()
        for score, results in tracker.score_results().items():
            uncertainty[f"{name}/{score}"] = results
    class_rows = class_results(classes, trackers, segmentation)
    if confusions:
        mious = [confusion.compute()["miou"] for confusion in confusions]
        segmentation["members"] = {
            "n": len(mious),
            "miou_mean": float(np.mean(mious)),
            "miou_std": float(np.std(mious, ddof=1)),
        }
    return {
        "segmentation": segmentation,
        "uncertainty": uncertainty,
        "classes": class_rows,
        "confusion": confusion,
    }


def recommended_score(network: str, uncertainty: dict[str, dict]) -> dict[str, str]:
    """Which score of a network to reject pixels by: the one with the lowest AURC.

    uncertainty: that part of metrics.json. Of equal ones, as where nothing is wrong,
    and where no AURC is defined, it is `msp`, which any network has. Keys: network,
    score, reason.
    """
    aurc = {}
    for key, results in uncertainty.items():
        key_network, _, score = key.partition("/")
        if key_network == network and not math.isnan(results["aurc"]):
            aurc[score] = results["aurc"]
    if not aurc:
        reason = "no pixel is labelled, so that no score is better than another"
        return {"network": network, "score": "msp", "reason": reason}
    best = min(aurc, key=lambda score: (aurc[score], score != "msp"))
    reason = f"the lowest AURC, {three_digits(aurc[best])}, of its {len(aurc)} scores"
    return {"network": network, "score": best, "reason": reason}


def class_results(
    classes: list[str], trackers: dict[str, SplitTracker], segmentation: dict[str, dict]
) -> list[dict]:
    """IoU and mean uncertainty of each class by every network; of "member" only the IoU."""
    means = {}
    for name, tracker in trackers.items():
        if name != "member":
            means[name] = tracker.class_uncertainty.compute()["uncertainty"]
    rows = []
    for number, class_name in enumerate(classes):
        iou = {name: results["iou"][number] for name, results in segmentation.items()}
        uncertainty = {name: values[number] for name, values in means.items()}
        rows.append({"name": class_name, "iou": iou, "uncertainty": uncertainty})
    return rows


# ------------------------------------------------------------------------------- measure: anomalies

# Scores are kept for the components up to so many bytes: 40 million pixels of 13 float16 scores.
MAX_WAITING_BYTES = 2**30


class AnomalyTracker:
    """What one pass over an OOD set collects about every score of every network."""

    def __init__(self):
        self.detections: dict[str, metrics.Detection] = defaultdict(metrics.Detection)
        self.bootstrap = metrics.PairedBootstrap()
        self.image_statistics: dict[str, list[ImageStatistics]] = defaultdict(list)
        self.anomalous: list[bool] = []  # whether an image shows an anomaly
        self.input_sizes: Counter = Counter()  # number of images by HxW of the networks' input
        self.pixels = 0  # anomalous or not; void pixels do not count
        self.anomalous_pixels = 0
        # The masks and scores of all batches, for the components, unless they are too many.
        self.kept_batches: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.kept_bytes = 0
        self.too_many_to_keep = False

    def update(self, outputs: dict[str, Output], images: Tensor, mask: Tensor) -> None:
        """Count a batch; mask: uint8 [B, H, W], 1 anomaly, 0 none, anything else void."""
        scores = {key: values.half() for key, values in scores_by_key(outputs).items()}
        for key, values in scores.items():
            self.detections[key].update(values, mask)
        self.bootstrap.update(compared_scores(outputs), mask)
        self.keep(mask, scores)
        for key, statistics in image_statistics(outputs).items():
            self.image_statistics[key] += statistics

        anomalous = mask == 1  # [B, H, W]
        self.anomalous += anomalous.flatten(1).any(dim=1).tolist()
        self.anomalous_pixels += int(anomalous.sum())
        self.pixels += int((mask <= 1).sum())
        height, width = images.shape[-2:]
        self.input_sizes[f"{height}x{width}"] += len(images)

    def keep(self, mask: Tensor, scores: dict[str, Tensor]) -> None:
        """Keep a batch for the components; drop all batches where they are too many."""
        if self.too_many_to_keep:
            return
        self.kept_batches.append((mask, scores))
        self.kept_bytes += sum(values.nbytes for values in scores.values())
        if self.kept_bytes > MAX_WAITING_BYTES:
            self.too_many_to_keep = True
            self.kept_batches.clear()

    def compute(self, in_distribution: dict[str, list[ImageStatistics]]) -> dict[str, dict]:
        """Detection by pixels and by images, for every score.

        in_distribution: statistics of further images without an anomaly.
        """
        results = {}
        for key, detection in self.detections.items():
            results[key] = detection_results(detection) | detection.best_f1()
            results[key] |= image_level(
                self.image_statistics[key], self.anomalous, in_distribution.get(key, [])
            )
        return results


def image_level(
    statistics: list[ImageStatistics],
    anomalous: list[bool],
    in_distribution: list[ImageStatistics],
) -> dict[str, float]:
    """AUROC of telling images with an anomaly from images without one, by the mean and
    by the 99th percentile of a score.

    statistics: of the OOD set, one per image; anomalous: whether each of these images
    shows an anomaly; in_distribution: statistics of further images without an anomaly.
    """
    positives = []
    negatives = []
    for image, shows_anomaly in zip(statistics, anomalous, strict=True):
        if shows_anomaly:
            positives.append(image)
        else:
            negatives.append(image)
    negatives += in_distribution

    results = {}
    for name in ImageStatistics._fields:
        positive_values = [getattr(image, name) for image in positives]
        negative_values = [getattr(image, name) for image in negatives]
        results[f"image_auroc_{name}"] = metrics.pairs_auroc(positive_values, negative_values)
    return results


@torch.inference_mode()
def collect_image_statistics(
    networks: Networks, dataset: Dataset, inference: InferenceSettings
) -> dict[str, list[ImageStatistics]]:
    """`image_statistics` of all images of a data set."""
    collected = defaultdict(list)
    for images, labels, _ in evaluation_batches(dataset, inference):
        outputs = predict(networks, images, labels.shape[-2:], inference.amp)
        for key, statistics in image_statistics(outputs).items():
            collected[key] += statistics
    return collected


class OODResults(NamedTuple):
    """What `evaluate_ood` returns."""

    results: dict  # by "<network>/<score>", as in metrics.json
    comparison: dict  # as `compare_with_free` returns it; {} without a student
    protocol: dict  # what the results depend on


@torch.inference_mode()
def evaluate_ood(
    networks: Networks,
    ood: data.OODSet,
    in_distribution: dict[str, list[ImageStatistics]],
    inference: InferenceSettings,
    score_folder: Path | None = None,
) -> OODResults:
    """How well every score of every network detects the anomalies of one OOD set, by
    pixels, by components and by images.

    in_distribution: statistics of further images without an anomaly. Components need
    each score's threshold of the best pixel F1, which is known only after a whole pass.
    Scores of up to `MAX_WAITING_BYTES` are kept until then; if there are more, a second
    pass recomputes them.
    """
    tracker = AnomalyTracker()
    for images, mask, index in evaluation_batches(ood.dataset, inference):
        outputs = predict(networks, images, mask.shape[-2:], inference.amp)
        tracker.update(outputs, images, mask)
        if score_folder is not None:
            save_scores(score_folder, outputs, names_of(ood.dataset, index))

    results = tracker.compute(in_distribution)
    if tracker.anomalous_pixels > 0:
        batches = tracker.kept_batches
        if tracker.too_many_to_keep:
            batches = recompute_scores(networks, ood.dataset, inference)
        thresholds = {key: score_results["f1_threshold"] for key, score_results in results.items()}
        for key, components in component_results(batches, thresholds, ood.smallest).items():
            results[key] |= components
    else:
        warn(
            f"the OOD set {ood.name} has no anomalous pixel; its figures are undefined (void: "
            f"{ood.protocol['void']})"
        )
    further_images = len(next(iter(in_distribution.values()), []))  # the same for every score
    protocol = ood_protocol(ood, tracker, further_images)
    comparison = compare_with_free(tracker.bootstrap, ["auroc"])
    return OODResults(results, comparison, protocol)


def recompute_scores(
    networks: Networks, dataset: Dataset, inference: InferenceSettings
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """A second pass: the mask and the scores of each batch, as they were in the first."""
    for images, mask, _ in evaluation_batches(dataset, inference):
        outputs = predict(networks, images, mask.shape[-2:], inference.amp)
        yield mask, scores_by_key(outputs)


def component_results(
    batches: Iterable[tuple[Tensor, dict[str, Tensor]]],
    thresholds: dict[str, float],
    smallest: data.ComponentSizes,
) -> dict[str, dict]:
    """`metrics.ComponentDetection` of every score (as float16), cut at its threshold.

    smallest: pixels of the smallest predicted and of the smallest true component that count.

    Threads work on the scores of a batch, side by side, while the next batch is
    computed: nearly all of their time is numpy's, which lets other threads run.
    """
    trackers = {key: metrics.ComponentDetection(*smallest) for key in thresholds}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        updates: list[Future] = []
        for mask, scores in batches:
            mask = mask.cpu()
            truth = [metrics.connected_components(frame == 1) for frame in mask.numpy()]
            finish(updates)
            updates = []
            for key, values in scores.items():
                # `>`, as the code of SegmentMeIfYouCan cuts, although best_f1 counts
                # the threshold itself as positive.
                above = (values.half() > thresholds[key]).cpu()
                updates.append(threads.submit(trackers[key].update, above, mask, truth))
        finish(updates)
    return {key: tracker.compute() for key, tracker in trackers.items()}


def finish(updates: list[Future]) -> None:
    """Wait for all of them; what one of them raised is raised here."""
    for update in updates:
        update.result()


def ood_protocol(ood: data.OODSet, tracker: AnomalyTracker, further_images: int) -> dict:
    """What the results of an OOD set depend on; further_images: in-distribution images."""
    prevalence = math.nan
    if tracker.pixels > 0:
        prevalence = tracker.anomalous_pixels / tracker.pixels
    anomalous_images = sum(tracker.anomalous)
    sizes = [size for size, _ in tracker.input_sizes.most_common(3)]
    return {
        "images": len(ood.dataset),
        "pixels": tracker.pixels,
        "anomalous_pixels": tracker.anomalous_pixels,
        "prevalence": prevalence,
        "network_input": ", ".join(sizes),
        "smallest_components": list(ood.smallest),
        "anomalous_images": anomalous_images,
        "normal_images": len(tracker.anomalous) - anomalous_images + further_images,
        "scores": "float16",
        "pooling": "all pixels at native size",
        "torch": str(torch.__version__),
    } | ood.protocol


def protocol_sentence(protocol: dict) -> str:
    """The protocol of an OOD set in a sentence."""
    share = "none anomalous"  # also where no pixel is valid, so that the prevalence is NaN
    if protocol["anomalous_pixels"] > 0:
        share = f"{100 * protocol['prevalence']:.2f}% anomalous"
    images = f"{protocol['images']} images"
    if protocol.get("published"):
        images += f" of {protocol['published']} published"
    void = f"void: {protocol['void']}"
    if protocol["void"] == "its void":
        void = "void: that of the evaluation split"
    for reason, number in protocol.get("skipped", {}).items():
        void += f"; skipped {number} {reason}"
    smallest_predicted, smallest_true = protocol["smallest_components"]
    return (
        f"{images}, {protocol['pixels']:,} pixels, {share}; {void}; "
        f"network input {protocol['network_input']}, pooled at native size, float16 scores; "
        f"components from {smallest_predicted} px (true: {smallest_true}); "
        f"images: {protocol['anomalous_images']} with an anomaly "
        f"against {protocol['normal_images']} without; torch {protocol['torch']}."
    )


# ------------------------------------------------------------------- measure: worth more than free?


def compared_scores(outputs: dict[str, Output]) -> dict[str, Tensor]:
    """The scores [B, H, W] that `compare_with_free` compares, by "<network>/<score>":
    the student's, and the teacher's measures; none without a student."""
    if "student" not in outputs:
        return {}
    compared = {name: output for name, output in outputs.items() if name != "member"}
    return scores_by_key(compared)


def compare_with_free(bootstrap: metrics.PairedBootstrap, figures: Sequence[str]) -> dict:
    """Does a score of the student find more than what its softmax gives for nothing?

    bootstrap: has seen the `compared_scores` of all images; figures: "auroc", "aurc".
    Returns one task of the part "comparison" of metrics.json, which is, if there is a
    student,

        "comparison": {"draws": 1000, "seed": 0, "errors": task, "ood": {"<set>": task}}
        task: {"auroc": figure, "aurc": figure}      an OOD set has the AUROC alone
        figure: {"best_free": "student/<score>", "value": x,
                 "scores": {"<network>/<score>": {"value", "gain", "low", "high", "worth_more"}}}

    best_free: the best of `metrics.FREE_SCORES` by its value on these very images,
    which favours it over the others. scores: all that the student learned and, as
    "teacher/<measure>", what a perfect copy of the teacher would reach when it is asked
    for the student's errors or for the anomalies. gain: how much better than the best
    free score, above 0 is better for both figures; low, high: its 95 % interval.
    worth_more: `verdict` of the interval. All are figures of `metrics.PairedBootstrap`,
    whose cells are coarse: a value may differ from the same figure elsewhere in
    metrics.json by a few units of its fifth digit.
    """
    results = {}
    if not bootstrap.images:
        return results
    free = [f"student/{name}" for name in FREE_SCORES]
    for figure in figures:
        values = {}  # of each score [1 + draws], the higher the better
        for key in bootstrap.images:
            values[key] = bootstrap.auroc(key) if figure == "auroc" else -bootstrap.aurc(key)
        best_free = max(free, key=lambda key: values[key][0])
        scores = {}
        for key, score_values in values.items():
            if key not in free:
                gain = score_values - values[best_free]
                low, high = bootstrap.interval(gain)
                scores[key] = {
                    "value": float(abs(score_values[0])),
                    "gain": float(gain[0]),
                    "low": low,
                    "high": high,
                    "worth_more": verdict(low, high),
                }
        best_value = float(abs(values[best_free][0]))
        results[figure] = {"best_free": best_free, "value": best_value, "scores": scores}
    return results


def verdict(low: float, high: float) -> str:
    """Is a score worth more? "yes" where the interval of its gain lies above 0, "no"
    where it lies below, "undecided" around 0 and where there is no interval."""
    if low > 0:
        return "yes"
    if high < 0:
        return "no"
    return "undecided"


# ------------------------------------------------------------------------- measure: time and memory

TURNS = 13  # passes of every network, of which the first WARM_UP do not count
WARM_UP = 3


def benchmark(
    networks: Networks, image: Tensor, inference: InferenceSettings, with_compiled: bool = True
) -> dict[str, dict]:
    """`compare_costs` of "student", "teacher" and the teacher's first member, "member"."""
    candidates = networks.by_name()
    if networks.teacher is not None:
        candidates["member"] = networks.teacher.members[0]
    return compare_costs(candidates, image, inference, with_compiled)


@torch.inference_mode()
def compare_costs(
    candidates: dict[str, nn.Module],
    image: Tensor,
    inference: InferenceSettings,
    with_compiled: bool = True,
) -> dict[str, dict]:
    """Cost of a forward pass from uint8 pixels to class and uncertainty, for each network.

    image: uint8 [3, h, w], repeated to a batch. Returns the number of parameters and,
    after a warm-up, the median milliseconds per image, the images per second and the
    peak memory in MB (the weights, and what the pass adds); the networks take turns.
    with_compiled: measure again under torch.compile, as compiled_ms_per_image and so
    on.
    """
    images = image[None].repeat(inference.batch_size, 1, 1, 1).to(inference.device)
    results = {}
    for name, network in candidates.items():
        results[name] = {
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "batch_size": len(images),
            "size": list(images.shape[-2:]),
        }
    for name, cost in cost_of_passes(candidates, images, inference).items():
        results[name] |= cost
    if with_compiled:
        print("compiling", flush=True)
        candidates = {name: compiled(network) for name, network in candidates.items()}
        for name, cost in cost_of_passes(candidates, images, inference).items():
            for key, value in cost.items():
                results[name][f"compiled_{key}"] = value
    return results


def cost_of_passes(
    candidates: dict[str, nn.Module], images: Tensor, inference: InferenceSettings
) -> dict[str, dict]:
    """ms_per_image, images_per_second and peak_memory_mb (None if unknown) of each network."""
    seconds: dict[str, list[float]] = defaultdict(list)
    added_mb: dict[str, float | None] = {}
    for _ in range(TURNS):
        for name, network in candidates.items():
            with peak_memory(inference.device) as peak:
                started = time.perf_counter()
                with autocast(inference.device, inference.amp):
                    model.predicted_class(network(images)[0])
                if inference.device.type == "cuda":
                    torch.cuda.synchronize(inference.device)
                seconds[name].append(time.perf_counter() - started)
            added_mb[name] = peak.megabytes
    results = {}
    for name, network in candidates.items():
        seconds_per_image = float(np.median(seconds[name][WARM_UP:])) / len(images)
        memory = None
        if added_mb[name] is not None:
            weights = sum(weight.nbytes for weight in network.state_dict().values())
            memory = weights / 1e6 + added_mb[name]
        results[name] = {
            "ms_per_image": 1000 * seconds_per_image,
            "images_per_second": 1 / seconds_per_image,
            "peak_memory_mb": memory,
        }
    return results


def compiled(network: nn.Module) -> nn.Module:
    """torch.compile of a network; of an ensemble, of its members and of the sums over them."""
    if not isinstance(network, model.Ensemble):
        return torch.compile(network)
    members = [torch.compile(member) for member in network.members]
    teacher = model.Ensemble(members, network.mc_samples)
    teacher.compile_sums()
    return teacher


@dataclass
class PeakMemory:
    """What `peak_memory` measures."""

    megabytes: float | None = None  # None before the end, and where it is unknown


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak growth of memory inside the `with`: the allocator's memory on a
    GPU, the process's on a CPU (unknown unless this is Linux with glibc)."""
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        try:
            yield peak
        finally:
            peak.megabytes = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return

    before_kb = forget_peak_of_process()
    try:
        yield peak
    finally:
        if before_kb is not None:
            peak.megabytes = (process_memory_kb("VmHWM") - before_kb) * 1024 / 1e6


def forget_peak_of_process() -> int | None:
    """Reset the peak of this process's memory; returns its memory in kB, None if it is unknown."""
    try:
        # Give freed memory back first: a pass that used it again would not seem to grow.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return process_memory_kb("VmRSS")
    except (OSError, AttributeError):
        return None


def process_memory_kb(key: str) -> int:
    """A line of /proc/self/status: VmRSS is what the process holds now, VmHWM the peak."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1])
    raise OSError(f"/proc/self/status has no line {key}")


# ---------------------------------------------------------------- predict: maps of one's own images

LARGE_IMAGE = 2**22  # pixels: more are not predicted in one piece, which holds all probabilities
TILE = 1024  # pixels: the side of a tile
CONTEXT = 128  # pixels: the margin around a tile that the network sees too

VIDEO_SUFFIXES = set(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .webm .wmv".split())


class Maps(NamedTuple):
    """What is predicted for one image, at its own size."""

    classes: np.ndarray  # uint8 [H, W]
    scores: dict[str, np.ndarray]  # float32 [H, W] each, in the score's own unit


class MapScale(NamedTuple):
    """What the whole numbers of a 16-bit map stand for: value = offset + u16 / 65535 * scale."""

    offset: float  # 0 for a score that is never negative
    scale: float

    @property
    def end(self) -> float:
        """The largest value."""
        return self.offset + self.scale

    def shares(self, values: np.ndarray) -> np.ndarray:
        """Where values lie on the scale, 0..1."""
        return ((values - self.offset) / self.scale).clip(0, 1)


@dataclass
class ValueRange:
    """The smallest and the largest value of the maps that were seen."""

    lowest: float = math.inf
    highest: float = -math.inf

    def include(self, values: np.ndarray) -> None:
        """See one more map."""
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, float(values.max()))

    def scale(self) -> MapScale:
        """The scale on which all maps fit; it begins at 0, or below where a value is negative."""
        offset = min(self.lowest, 0.0)
        if self.highest <= offset:  # all values are the same
            return MapScale(offset, 1.0)
        return MapScale(offset, self.highest - offset)


def scores_of(networks: Networks) -> list[str]:
    """The names of the scores of the network that --predict runs."""
    if networks.main_name == "teacher":
        return list(MEASURES)
    return [student_score(measure) for measure in networks.measures] + list(FREE_SCORES)


def choose_scores(named: list[str] | None, networks: Networks) -> list[str]:
    """The scores whose maps --predict writes: those that --score names or, without it,
    the one to find errors by and `Networks.shown_score`, the std as a rule.

    Errors are found by `error` or, where that was not learned, by the best of the free scores.
    UsageError at a name that is none.
    """
    valid = scores_of(networks)
    if named is None:
        finds_errors = ERROR if ERROR in valid else "msp"
        named = [finds_errors, networks.shown_score(networks.main_name)]
    for name in named:
        if name not in valid:
            raise UsageError(
                f"--score {name}: the {networks.main_name} has no such score; "
                f"choose of {', '.join(valid)}"
            )
    return list(dict.fromkeys(named))  # each once


@torch.inference_mode()
def predict_files(
    networks: Networks,
    source: Path,
    out: Path,
    image_size: tuple[int, int] | None,
    inference: InferenceSettings,
    score_names: Sequence[str],
) -> None:
    """--predict: write the maps of one image, or of all images in a folder and its subfolders.

    Files that are no images are skipped and counted; UsageError where there is no image
    at all. All maps of a score share one scale, which is known when the last image was
    predicted. Until then the maps lie on the disk, each on a scale of its own, so that
    memory does not grow with the number of images. `finish_maps` brings them to one
    scale.
    """
    files, root = files_to_predict(source, out)
    names = map_names(files)
    ranges = {score: ValueRange() for score in score_names}
    input_sizes = Counter()  # number of images by HxW of the network's input
    output_paths = []
    skipped = []
    with ImageProgress(len(files)) as progress:
        for path in files:
            try:
                image = data.read_image(path)
            except data.DataError as error:
                if path == source:  # the one file that was asked for
                    raise
                skipped.append((path, error))
                progress.advance(1)
                continue
            maps = predict_maps(networks, image, image_size, inference, score_names)
            refuse_infinite_scores(path, maps.scores)
            output_path = out / names[path].relative_to(root)
            if not output_paths:  # an earlier run's scales are not those of these maps
                (out / "scales.json").unlink(missing_ok=True)
            save_classes(output_path, image, maps.classes, networks.palette)
            for score, values in maps.scores.items():
                ranges[score].include(values)
                save_unfinished_map(map_file(output_path, score), values)
            height, width = data.proportional_size(image, image_size)
            input_sizes[f"{height}x{width}"] += 1
            output_paths.append(output_path)
            progress.advance(1)
    if not output_paths:
        raise no_image(source, skipped)

    scales = {score: value_range.scale() for score, value_range in ranges.items()}
    finish_maps(output_paths, scales)
    write_scales(out / "scales.json", networks.main_name, scales)
    print(prediction_summary(out, input_sizes, [path for path, _ in skipped]))
    for score, scale in scales.items():
        ends = f"{three_digits(scale.offset)} to {three_digits(scale.end)}"
        print(f"  {score}: {ends} ({score_unit(score)})")


def prediction_summary(out: Path, input_sizes: Counter, skipped: list[Path]) -> str:
    """How many images were predicted, at which sizes, and what was skipped;
    input_sizes: number of images by HxW of the network's input."""
    sizes = [f"{size} ({count})" for size, count in input_sizes.most_common(3)]
    if len(input_sizes) > 3:
        sizes.append("...")
    count = input_sizes.total()
    images = "1 image" if count == 1 else f"{count} images"
    text = f"{images} in {out}; network input {', '.join(sizes)}"
    if skipped:
        names = [path.name for path in skipped[:5]]
        text += f"; {len(skipped)} skipped, not images: {', '.join(names)}"
    return text


def files_to_predict(source: Path, out: Path) -> tuple[list[Path], Path]:
    """The files that --predict names, and the folder that their maps' paths are
    relative to. UsageError for what is not there, is a video or is a camera."""
    if source.is_dir():
        return images_below(source, out), source
    is_address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(source))  # rtsp://camera/1
    is_number = str(source).isdecimal() and not source.exists()  # as OpenCV counts cameras
    if is_address or is_number or source.is_char_device():
        raise UsageError(
            f"--predict {source}: it works on image files, not on a camera or an address; save "
            "frames first: mkdir frames && ffmpeg -i SOURCE -vf fps=1 frames/%06d.png"
        )
    if not source.exists():
        raise UsageError(f"--predict {source}: no such file or folder; check the path")
    if source.suffix.lower() in VIDEO_SUFFIXES:
        raise UsageError(
            f"--predict {source}: it works on images, not on a video; extract the frames first: "
            f"mkdir frames && ffmpeg -i {source} -vf fps=1 frames/%06d.png"
        )
    return [source], source.parent


def refuse_infinite_scores(path: Path, values: dict[str, np.ndarray]) -> None:
    """UsageError where a score of an image is infinite or no number."""
    for score, score_map in values.items():
        if not np.isfinite(score_map).all():
            raise UsageError(
                f"the score {score} of {path} is not finite; check the network's weights, or use "
                "--amp off"
            )


def no_image(folder: Path, skipped: list[tuple[Path, Exception]]) -> UsageError:
    """The error of a folder in which --predict found no image; skipped: files and their errors."""
    for path, error in skipped:
        if data.is_image(path):
            return UsageError(
                f"--predict {folder}: no image of {len(skipped)} files can be read; the first: "
                f"{error}"
            )
    if skipped:
        path = skipped[0][0]
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return UsageError(
                f"--predict {folder}: no image among its {len(skipped)} files, and {path.name} is "
                f"a video; extract its frames first: ffmpeg -i {path} -vf fps=1 frames/%06d.png"
            )
        content = f"no image among its {len(skipped)} files, the first is {path.name}"
    else:
        content = "an empty folder"
    return UsageError(f"--predict {folder}: {content}; name an image or a folder of images")


def images_below(source: Path, out: Path) -> list[Path]:
    """The files in a folder in order, but for the maps of an earlier run, in the folder `out`.

    UsageError where both are one folder: the maps would be the next run's images.
    """
    source_folder = source.resolve()
    out_folder = out.resolve()
    if out_folder == source_folder:
        raise UsageError(f"--out {out} is the folder of the images; name one for their maps alone")
    files = sorted(data.walk_files(source))
    if not out_folder.is_relative_to(source_folder):
        return files
    maps = source / out_folder.relative_to(source_folder)
    return [path for path in files if not path.is_relative_to(maps)]


def map_names(files: list[Path]) -> dict[Path, Path]:
    """What the names of each file's maps begin with: the file's name without its
    suffix; with it where two files share the stem, and where it is none of an image, as
    in cam.1."""
    taken = Counter(files)
    taken.update(path.with_suffix("") for path in files)
    known_suffixes = Image.registered_extensions()
    names = {}
    for path in files:
        short = path.with_suffix("")
        has_suffix = path.suffix.lower() in known_suffixes
        name = short if has_suffix and taken[short] == 1 else path
        names[path] = name.parent / data.shortened(name.name)
    return names


def predict_maps(
    networks: Networks,
    image: Image.Image,
    image_size: tuple[int, int] | None,
    inference: InferenceSettings,
    score_names: Sequence[str],
) -> Maps:
    """Classes and scores of an image of any size, by the student or, without one, the teacher.

    Of a large image that image_size makes small, a small map is predicted and enlarged.
    One that stays large is predicted in tiles that overlap.
    """
    if networks.student is not None:
        networks = networks._replace(teacher=None)
    size = (image.height, image.width)
    if math.prod(size) <= LARGE_IMAGE:
        return maps_at(networks, image, size, image_size, inference, score_names)
    input_size = data.proportional_size(image, image_size)
    if math.prod(input_size) > LARGE_IMAGE:
        height, width = input_size
        network_input = image.resize((width, height), Image.Resampling.BILINEAR)
        maps = tiled_maps(networks, network_input, inference, score_names)
    else:
        # More than `LARGE_IMAGE` pixels would not show more than the network saw.
        factor = math.sqrt(LARGE_IMAGE / math.prod(size))
        map_size = (max(1, int(factor * image.height)), max(1, int(factor * image.width)))
        maps = maps_at(networks, image, map_size, image_size, inference, score_names)
    return resized_maps(maps, size)


def maps_at(
    networks: Networks,
    image: Image.Image,
    size: tuple[int, int],
    image_size: tuple[int, int] | None,
    inference: InferenceSettings,
    score_names: Sequence[str],
) -> Maps:
    """The maps of an image at `size` (H, W) in one piece, from a `proportional_size` input."""
    pixels = data.to_input(image, data.proportional_size(image, image_size))
    outputs = predict(networks, pixels[None].to(inference.device), size, inference.amp)
    output = outputs[networks.main_name]
    classes = model.predicted_class(output.probs)[0].to(torch.uint8)  # [H, W]
    scores = {name: output.scores[name][0].cpu().numpy() for name in score_names}
    return Maps(classes.cpu().numpy(), scores)


def resized_maps(maps: Maps, size: tuple[int, int]) -> Maps:
    """The same maps at `size` (H, W)."""
    if maps.classes.shape == size:
        return maps
    height, width = size
    classes = Image.fromarray(maps.classes).resize((width, height), Image.Resampling.NEAREST)
    scores = {}
    for name, values in maps.scores.items():
        resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
        scores[name] = np.asarray(resized)
    return Maps(np.asarray(classes), scores)


def tiled_maps(
    networks: Networks,
    image: Image.Image,
    inference: InferenceSettings,
    score_names: Sequence[str],
) -> Maps:
    """The maps of a large image at its own size, tile by tile."""
    width, height = image.size
    classes = np.zeros((height, width), np.uint8)
    scores = {name: np.zeros((height, width), np.float32) for name in score_names}
    for top, left in itertools.product(range(0, height, TILE), range(0, width, TILE)):
        # The network sees the tile and CONTEXT pixels around it, as far as the image goes.
        y0 = max(0, top - CONTEXT)
        x0 = max(0, left - CONTEXT)
        y1 = min(height, top + TILE + CONTEXT)
        x1 = min(width, left + TILE + CONTEXT)
        part = image.crop((x0, y0, x1, y1))
        part_size = (part.height, part.width)
        part_maps = maps_at(networks, part, part_size, None, inference, score_names)
        # Only the tile itself is kept.
        inside = (slice(top - y0, top - y0 + TILE), slice(left - x0, left - x0 + TILE))
        tile = (slice(top, top + TILE), slice(left, left + TILE))
        classes[tile] = part_maps.classes[inside]
        for name, values in part_maps.scores.items():
            scores[name][tile] = values[inside]
    return Maps(classes, scores)


def save_classes(
    path: Path, image: Image.Image, classes: np.ndarray, palette: Sequence[RGB]
) -> None:
    """Write <path>_classes.png (indexed, in the colours of the classes) and <path>_overlay.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(classes).convert("P")
    indexed.putpalette(np.array(palette, np.uint8).tobytes())
    indexed.save(f"{path}_classes.png")
    colours = Image.fromarray(colourise(classes, palette))
    Image.blend(image, colours, 0.5).save(f"{path}_overlay.png")


def write_map(path: Path, values: np.ndarray, scale: MapScale, compress_level: int = 6) -> None:
    """Write a score [H, W] as a PNG of 16-bit grey, u16 = (value - offset) / scale *
    65535, which tells offset and scale in its text; `scales.json` has them too."""
    text = PngInfo()
    text.add_text("offset", repr(scale.offset))
    text.add_text("scale", repr(scale.scale))
    grey = (65535 * scale.shares(values)).round().astype(np.uint16)
    Image.fromarray(grey).save(path, pnginfo=text, compress_level=compress_level)


def map_file(output_path: Path, score: str) -> Path:
    """The 16-bit map of a score."""
    return output_path.with_name(f"{output_path.name}_{score}16.png")


def save_unfinished_map(path: Path, values: np.ndarray) -> None:
    """Write a map on a scale of its own. It is written again, so it need not be small."""
    value_range = ValueRange()
    value_range.include(values)
    write_map(path, values, value_range.scale(), compress_level=1)


def finish_maps(output_paths: Sequence[Path], scales: dict[str, MapScale]) -> None:
    """Bring all maps of a score to its scale, and draw them in colours with a scale bar."""
    with ImageProgress(len(output_paths)) as progress:
        for output_path in output_paths:
            for score, scale in scales.items():
                path = map_file(output_path, score)
                values = read_map(path)
                write_map(path, values, scale)
                heat = with_scale_bar(viridis(scale.shares(values)), scale, score)
                heat.save(f"{output_path}_{score}.png")
            progress.advance(1)


def read_map(path: Path) -> np.ndarray:
    """The score, float32 [H, W], that `write_map` wrote."""
    with Image.open(path) as image:
        grey = np.asarray(image).astype(np.float32)
        offset = float(image.text["offset"])
        scale = float(image.text["scale"])
    return offset + grey / 65535 * scale


def write_scales(path: Path, network: str, scales: dict[str, MapScale]) -> None:
    """Write scales.json: how the 16-bit maps of each score become values again."""
    content = {"formula": "value = offset + u16 / 65535 * scale", "network": network, "scores": {}}
    for score, scale in scales.items():
        content["scores"][score] = scale._asdict() | {"unit": score_unit(score)}
    model.save_atomically(path, json.dumps(content, indent=1) + "\n")


def with_scale_bar(pixels: np.ndarray, scale: MapScale, score: str) -> Image.Image:
    """A map, uint8 [H, W, 3], above a bar with its colours, their values and the
    score's unit. The picture is as wide as the map, at least 320 pixels."""
    height, width = pixels.shape[:2]
    sheet_width = max(width, 320)
    text_height = max(13, sheet_width // 55)  # pixels: legible also where the picture is reduced
    margin = text_height // 2
    sheet_height = height + 3 * margin + 3 * text_height
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    sheet.paste(Image.fromarray(pixels), (0, 0))

    bar_width = sheet_width - 2 * margin
    ramp = viridis(np.tile(np.linspace(0, 1, bar_width), (text_height, 1)))
    sheet.paste(Image.fromarray(ramp), (margin, height + margin))
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(text_height)
    top = height + margin + text_height + margin // 2
    right = margin + bar_width
    draw.text((margin, top), three_digits(scale.offset), fill=INK)
    draw.text((right, top), three_digits(scale.end), fill=INK, anchor="ra")
    draw.text((sheet_width / 2, top), score.replace("_", " "), fill=INK, anchor="ma")
    unit_top = top + text_height + margin // 2
    draw.text((sheet_width / 2, unit_top), score_unit(score), fill=INK, anchor="ma")
    return sheet


# ------------------------------------------------------------- export: a network for other programs

EXPORT_SUFFIXES = (".pt2", ".onnx")
METADATA = "metadata.json"  # the name of the metadata in a .pt2 file, and of ONNX's property
LARGEST_BATCH = 1024  # images
SMALLEST_SIDE = 32  # pixels
LARGEST_SIDE = 8192  # pixels


def export_network(student: Path, path: Path, results_file: Path) -> None:
    """--export: write a checkpoint's network to a file that needs nothing of this project.

    A .pt2 file is what torch.export.load reads, an .onnx file is for every runtime of
    ONNX. Both are the graph of `Predictor.forward`. results_file: metrics.json, whose
    operating points go into the metadata if they are this network's.
    """
    check_export_path(path)
    checkpoint = model.read_checkpoint(student)
    predictor = Predictor(model.build_model(checkpoint, student))
    thresholds = find_thresholds(results_file, model.identity_of([checkpoint]))
    metadata = export_metadata(predictor, checkpoint, thresholds)
    text = json.dumps(metadata, indent=1)

    program = trace_for_any_size(predictor)
    if path.suffix == ".pt2":
        content = pt2_file(program, text)
    else:
        content = onnx_file(program, list(metadata["outputs"]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_atomically(path, content)
    print(f"{path}: {len(content) / 1e6:.0f} MB")
    print(f"  in: {metadata['input']}")
    print(f"  out: {', '.join(metadata['outputs'])}")
    if predictor.image_size is not None:
        height, width = predictor.image_size
        print(f"  trained for images of {height}x{width}: resize yours to about that height")
    print(f"  operating points: {thresholds['operating_points_from']}")
    if not thresholds["operating_points"]:
        warn(f"{path} has no thresholds: see its operating points above")


def check_export_path(path: Path) -> None:
    """Raise UsageError where no network can be exported to that file."""
    if path.suffix not in EXPORT_SUFFIXES:
        raise UsageError(
            f"--export {path}: name a file that ends in {' or '.join(EXPORT_SUFFIXES)}"
        )
    if path.suffix == ".onnx":
        packages = ("onnx", "onnxscript")
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(
                f"--export {path} needs {' and '.join(missing)}, which this Python lacks; run "
                "python -m pip install onnx onnxscript, or export a .pt2 file"
            )


def trace_for_any_size(predictor: Predictor) -> torch.export.ExportedProgram:
    """The graph of `Predictor.forward` for uint8 images, of any batch, height and width."""
    dims = {
        0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
        2: torch.export.Dim("height", min=SMALLEST_SIDE, max=LARGEST_SIDE),
        3: torch.export.Dim("width", min=SMALLEST_SIDE, max=LARGEST_SIDE),
    }
    # A batch of one, or a square, would be taken for the only possibility.
    example = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(predictor, (example,), dynamic_shapes=(dims,))


def pt2_file(program: torch.export.ExportedProgram, metadata: str) -> bytes:
    """The content of a .pt2 file; its extra file `METADATA` holds the metadata."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: metadata})
    return buffer.getvalue()


def onnx_file(program: torch.export.ExportedProgram, outputs: list[str], metadata: str) -> bytes:
    """The content of an .onnx file; its metadata property `METADATA` holds the metadata."""
    exported = torch.onnx.export(
        program, input_names=["images"], output_names=outputs, verbose=False
    )
    exported.model.metadata_props[METADATA] = metadata
    return exported.model_proto.SerializeToString()


def export_metadata(predictor: Predictor, checkpoint: dict, thresholds: dict) -> dict:
    """What a user of an exported network has to know, for JSON; thresholds: `find_thresholds`."""
    outputs = {
        "classes": "uint8 [B, H, W], the number of the most probable class",
        "probabilities": "float32 [B, C, H, W], 0 to 1",
    }
    for score in scores_of(predictor.as_student()):
        outputs[score] = f"float32 [B, H, W], {score_unit(score)}"
    return {
        "input": f"uint8 RGB [B, 3, H, W], B 1 to {LARGEST_BATCH}, H and W {SMALLEST_SIDE} to "
        f"{LARGEST_SIDE}",
        "outputs": outputs,
        "image_size": predictor.image_size,
        "classes": predictor.classes,
        "palette": predictor.palette,
        "measures": predictor.measures,
        "config": checkpoint["config"],
        "versions": {"trained": checkpoint.get("versions"), "exported": model.versions()},
    } | thresholds


def find_thresholds(results_file: Path, identity: str) -> dict:
    """What a metrics.json says about thresholds on the scores of the student of this identity.

    Keys: operating_points and recommended, as there; operating_points_from, the file
    and the images that they were chosen on or, where the file is missing or another
    student's, why there are none.
    """
    nothing = {"operating_points": {}, "recommended": None}
    advice = "evaluate this student first, and give --export the --out of that evaluation"
    if not results_file.is_file():
        return nothing | {"operating_points_from": f"none, no {results_file}; {advice}"}
    try:
        results = json.loads(results_file.read_text(encoding="utf-8"))
        protocol = results["protocol"]
        points = results["operating_points"]
        is_of_student = protocol["student_identity"] == identity
    except (ValueError, KeyError, TypeError):
        is_of_student = False
    if not is_of_student:
        return nothing | {
            "operating_points_from": f"none, {results_file} is not of this student; {advice}"
        }
    images = f"{protocol['dataset']} {protocol['split']}, {protocol['images']} images"
    return {
        "operating_points": points,
        "recommended": results.get("recommended"),
        "operating_points_from": f"{results_file}: {images}",
    }


def refuse_beside_export(args: argparse.Namespace) -> None:
    """Raise UsageError at a flag that would have no effect beside --export."""
    parser = get_args_parser()
    for name, value in vars(args).items():
        without_effect = name not in ("export", "student", "out")
        if name == "device":
            without_effect = value not in ("auto", "cpu")
        if without_effect and value != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"--export writes the network of --student, on the CPU; leave out {flag}"
            )


# ----------------------------------------------------------------------------------------- pictures

# Viridis at 26 evenly spaced values; linear in between it is within 2/255 of the full table.
VIRIDIS = np.frombuffer(
    bytes.fromhex(
        "440154470f62481d6f472b7a4437814043873c4e8a37598c31648d2d6e8e29788e26818e228a8d"
        "1f958b1e9e8822a7842bb17d39b9764dc26b62ca5f79d15192d741addc30cae01ee4e318fde724"
    ),
    np.uint8,
)
OOD_PANELS = 3  # panels of each OOD set, at most
PANEL_SOFTWARE = "evaluate.py of dudes"
PANEL_SIDE = 360  # pixels: the longer side of a picture in a panel
PANEL_MARGIN = 14  # pixels: around it
PANEL_TITLE = 24  # pixels: from the top of a cell to its picture
PANEL_COLUMNS = 5
LEGEND_COLUMNS = 3  # the other two have a legend and a colour bar of their own
COLOUR_BAR = 72  # pixels: the height of a colour bar with its texts
SHOWN_REJECT = 0.1  # the operating point that is drawn
LEGEND_ROW = 28  # pixels
INK = (60, 60, 60)
FRAME = (200, 200, 200)
BLACK = (0, 0, 0)
WHITE = (255, 255, 255)
GREY = (140, 140, 140)  # void: no truth is known
ORANGE = (213, 94, 0)  # outlines of anomalies, errors that were caught
BLUE = (0, 114, 178)  # right pixels that were rejected

# What the numbers of a score are; `dudes_<measure>` has the unit of its measure.
SCORE_UNITS = {
    "std": "std of the predicted class's probability",
    "entropy": "entropy, nats",
    "mutual_information": "mutual information, nats",
    "msp": "1 - largest probability",
    "max_logit": "-largest logit",
    "energy": "energy: -log of the summed exp(logits)",
    ERROR: "probability that the class is wrong",
}


def score_unit(score: str) -> str:
    """What the numbers of a score are; its name where `SCORE_UNITS` does not have it."""
    measure = "std" if score == "dudes" else score.removeprefix("dudes_")
    return SCORE_UNITS.get(measure, score)


def viridis(values) -> np.ndarray:
    """Colours of values in [0, 1] (clipped; NaN is 0) as uint8 [..., 3]."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float32)).clip(0, 1)
    position = 25 * values  # between the 26 colours of the table
    colours = [np.interp(position, np.arange(26), VIRIDIS[channel::3]) for channel in range(3)]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def colourise(labels, palette: Sequence[RGB]) -> np.ndarray:
    """Class numbers [H, W] as uint8 RGB [H, W, 3]; void and padding are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[np.asarray(labels, dtype=np.uint8)]


def choose_images(accuracy: list[float], count: int) -> list[tuple[str, int]]:
    """(title, index) of images from the best to the worst by pixel accuracy, evenly spread."""
    order = [i for i in np.argsort(accuracy)[::-1] if not math.isnan(accuracy[i])]
    last = len(order) - 1
    count = min(count, len(order))
    chosen = []
    for k in range(count):
        rank = last * k // max(1, count - 1)
        if rank == 0:
            title = "best"
        elif rank == last // 2:
            title = "median"
        elif rank == last:
            title = "worst"
        else:
            title = f"rank {rank + 1}"
        chosen.append((title, int(order[rank])))
    return chosen


def median_image(accuracy: list[float]) -> int | None:
    """The index of the image in the middle by pixel accuracy; None where all are void."""
    chosen = choose_images(accuracy, 3)
    if not chosen:
        return None
    _, index = chosen[len(chosen) // 2]
    return index


class PanelRow(NamedTuple):
    """What one network predicts for an image."""

    name: str  # of the network
    prediction: np.ndarray  # classes [H, W]
    uncertainty: np.ndarray  # float32 [H, W]


class ScoreMap(NamedTuple):
    """A score of an image, by its name."""

    score: str
    values: np.ndarray  # float32 [H, W]


@torch.inference_mode()
def draw_panels(
    networks: Networks,
    dataset: Dataset,
    chosen: list[tuple[str, int]],
    folder: Path,
    inference: InferenceSettings,
    anomalies: bool = False,
    best_free: str | None = None,
) -> list[tuple[str, Path]]:
    """Draw one PNG panel in `folder` for each (title, index) of `chosen`; returns
    (title, file) of each. With `anomalies` the data set's labels are the masks of an
    OOD set, and best_free is the "student/<score>" that finds its anomalies best of
    what is free."""
    panel_mark = PngInfo()
    panel_mark.add_text("Software", PANEL_SOFTWARE)  # by which `remove_old_panels` knows them
    panels = []
    for title, index in chosen:
        image, labels, _ = dataset[index]
        outputs = predict(networks, image[None].to(inference.device), labels.shape, inference.amp)
        rows = []
        for name in ("student", "teacher"):
            if name not in outputs:
                continue
            prediction = model.predicted_class(outputs[name].probs)[0].cpu().numpy()
            uncertainty = outputs[name].scores[networks.shown_score(name)][0].cpu().numpy()
            rows.append(PanelRow(name, prediction, uncertainty))
        free = None
        if best_free is not None:
            values = scores_by_key(outputs)[best_free][0].cpu().numpy()
            free = ScoreMap(best_free.partition("/")[2], values)
        photo = photo_of(image, labels)
        sheet = draw_panel(photo, labels.numpy(), rows, networks, anomalies, free)
        image_name = dataset.names[index]
        file_name = data.shortened(f"{title.replace(' ', '_')}_{image_name}")
        path = folder / f"{file_name}.png"
        sheet.save(path, pnginfo=panel_mark)
        panels.append((f"{title}: {image_name}", path))
    return panels


def photo_of(image: Tensor, labels: Tensor) -> Image.Image:
    """The network's input, uint8 [3, h, w], as a picture of the size of the labels [H, W]."""
    height, width = labels.shape
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    return photo.resize((width, height), Image.BILINEAR)


def remove_old_panels(folder: Path, panels: list[tuple[str, Path]]) -> None:
    """Remove the panels that an earlier run left among those of this one, and no other file."""
    written = {path for _, path in panels}
    for path in folder.glob("*.png"):
        if path not in written and is_panel(path):
            path.unlink()


def is_panel(path: Path) -> bool:
    """Whether a PNG file says that `draw_panels` wrote it."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == PANEL_SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False


def draw_panel(
    photo: Image.Image,
    labels: np.ndarray,
    rows: list[PanelRow],
    networks: Networks,
    anomalies: bool,
    free: ScoreMap | None = None,
) -> Image.Image:
    """The paper's five columns: image, ground truth, prediction, accuracy map, uncertainty.

    labels: [H, W], classes (254 and 255 are void) or, with `anomalies`, 0, 1 anomaly,
    255 void. One row per network; below the rows are legends and a colour bar. Of
    anomalies the accuracy map is the same for every network: in its second row stands
    `free`, if it is given.
    """
    palette = networks.palette
    class_maps = [row.prediction for row in rows]
    if not anomalies:
        class_maps.append(labels)
    legend = classes_seen(class_maps, networks.classes)
    with_free = free is not None and len(rows) > 1
    sheet = PanelSheet(photo, len(rows), PANEL_COLUMNS, legend_heights(legend, with_free))

    sheet.put(0, 0, "image", np.asarray(photo), smooth=True)
    if anomalies:
        sheet.put(0, 1, "anomaly, outlined", outlined(photo, labels == 1, sheet.picture_size))
    else:
        sheet.put(0, 1, "ground truth", colourise(labels, palette))
    highest = 1e-6  # the largest uncertainty of all rows, which share the colour bar
    for row in rows:
        highest = max(highest, float(np.nanmax(row.uncertainty)))
    for number, row in enumerate(rows):
        sheet.put(number, 2, f"{row.name}: prediction", colourise(row.prediction, palette))
        if not anomalies:
            wrong = labels != row.prediction
            marked = marked_map(wrong, void=labels >= data.IGNORED)
            sheet.put(number, 3, f"{row.name}: accuracy", marked)
        elif number == 0 or not with_free:
            sheet.put(number, 3, "truth", marked_map(labels == 1, void=labels > 1))
        heat = viridis(row.uncertainty / highest)
        sheet.put(number, 4, f"{row.name}: uncertainty", heat, smooth=True)

    sheet.draw_legend(legend, palette)
    marks = [(WHITE, "wrong"), (BLACK, "right"), (GREY, "void")]
    if anomalies:
        marks = [(WHITE, "anomaly"), (BLACK, "no anomaly"), (GREY, "void")]
    sheet.draw_marks(3, marks)
    unit = score_unit(networks.shown_measure)
    sheet.draw_colour_bar(4, 0, MapScale(0.0, highest), unit)
    if with_free:
        values = np.nan_to_num(free.values)
        lowest = float(values.min())
        scale = MapScale(lowest, max(float(values.max()) - lowest, 1e-6))
        name = free.score.replace("_", " ")
        sheet.put(1, 3, f"student: {name}, free", viridis(scale.shares(values)), smooth=True)
        sheet.draw_colour_bar(3, len(marks), scale, score_unit(free.score))
    return sheet.image


def marked_map(marked: np.ndarray, void: np.ndarray) -> np.ndarray:
    """Marked pixels white, the others black, void ones grey: uint8 [H, W, 3]; both bool [H, W]."""
    pixels = np.zeros((*marked.shape, 3), np.uint8)
    pixels[marked] = WHITE
    pixels[void] = GREY
    return pixels


def classes_seen(class_maps: list[np.ndarray], classes: Sequence[str]) -> list[tuple[int, str]]:
    """(number, name) of the classes that occur in a map, and of void."""
    seen = []
    for number, name in [*enumerate(classes), (data.VOID, "void")]:
        if any((class_map == number).any() for class_map in class_maps):
            seen.append((number, name))
    return seen


def legend_heights(legend: list[tuple[int, str]], with_free: bool) -> int:
    """The pixels that a panel needs below its pictures; with_free: for a second colour bar."""
    classes = LEGEND_ROW * math.ceil(len(legend) / LEGEND_COLUMNS)
    marks = 3 * LEGEND_ROW
    if with_free:
        marks += COLOUR_BAR
    return max(classes, marks, COLOUR_BAR)


def outlined(photo: Image.Image, anomaly: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The photo at `size` (width, height) with a line around the anomalies, bool [H, W]."""
    mask = Image.fromarray(255 * anomaly.astype(np.uint8)).resize(size)
    edge = np.asarray(mask.filter(ImageFilter.MaxFilter(7))) > np.asarray(mask)
    return np.where(edge[..., None], ORANGE, np.asarray(photo.resize(size))).astype(np.uint8)


class PanelSheet:
    """A white sheet with cells for titled pictures, and a strip for legends and colour bars."""

    def __init__(self, photo: Image.Image, rows: int, columns: int, strip_height: int):
        longer_side = max(photo.size)
        width = max(1, round(photo.width * PANEL_SIDE / longer_side))
        height = max(1, round(photo.height * PANEL_SIDE / longer_side))
        self.picture_size = (width, height)
        self.cell_width = max(width, 260) + PANEL_MARGIN
        self.cell_height = height + 40
        self.strip_top = PANEL_MARGIN + self.cell_height * rows
        bottom = self.strip_top + strip_height + PANEL_MARGIN
        right = PANEL_MARGIN + columns * self.cell_width
        self.image = Image.new("RGB", (right, bottom), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.draw.font = ImageFont.load_default(19)

    def left_of(self, column: int) -> int:
        """The left edge of a column, in pixels."""
        return PANEL_MARGIN + column * self.cell_width

    def put(
        self, row: int, column: int, title: str, pixels: np.ndarray, smooth: bool = False
    ) -> None:
        """Draw a picture, uint8 [H, W, 3], with its title in a cell.

        smooth: blend pixels when the picture is resized, as class colours must not be.
        """
        x = self.left_of(column)
        y = PANEL_MARGIN + row * self.cell_height
        method = Image.BILINEAR if smooth else Image.NEAREST
        picture = Image.fromarray(pixels).resize(self.picture_size, method)
        width, height = self.picture_size
        frame = (x - 1, y + PANEL_TITLE - 1, x + width, y + PANEL_TITLE + height)
        self.draw.text((x, y - 4), title, fill=INK)
        self.image.paste(picture, (x, y + PANEL_TITLE))
        self.draw.rectangle(frame, outline=FRAME)

    def draw_legend(self, legend: list[tuple[int, str]], palette: Sequence[RGB]) -> None:
        """Draw the colour and name of each class, (number, name), below the first columns."""
        for i, (number, name) in enumerate(legend):
            colour = tuple(colourise(number, palette).tolist())
            self.draw_mark(i % LEGEND_COLUMNS, i // LEGEND_COLUMNS, colour, name)

    def draw_marks(self, column: int, marks: list[tuple[RGB, str]]) -> None:
        """Draw colours and what they mean below one column."""
        for row, (colour, name) in enumerate(marks):
            self.draw_mark(column, row, colour, name)

    def draw_mark(self, column: int, row: int, colour: RGB, name: str) -> None:
        """Draw one entry of a legend in a row of the strip."""
        x = self.left_of(column)
        y = self.strip_top + LEGEND_ROW * row
        self.draw.rectangle((x, y, x + 19, y + 19), fill=colour, outline=FRAME)
        self.draw.text((x + 28, y), name, fill=INK)

    def draw_colour_bar(self, column: int, row: int, scale: MapScale, unit: str) -> None:
        """Draw the colours of a scale, its ends and its unit below a column, from a row
        of the strip on."""
        left = self.left_of(column)
        right = left + self.cell_width - PANEL_MARGIN
        top = self.strip_top + LEGEND_ROW * row
        ramp = viridis(np.tile(np.linspace(0, 1, right - left), (20, 1)))
        self.image.paste(Image.fromarray(ramp), (left, top))
        self.draw.text((left, top + 24), three_digits(scale.offset), fill=INK)
        self.draw.text((right, top + 24), three_digits(scale.end), fill=INK, anchor="ra")
        font = ImageFont.load_default(15)
        self.draw.text(((left + right) / 2, top + 48), unit, INK, font, anchor="ma")


class Rejection(NamedTuple):
    """A score, and the threshold above which its pixels are rejected."""

    network: str
    score: str
    threshold: float
    asked: float  # the share of all pixels that it rejects, as it was asked for


def chosen_rejection(results: dict) -> Rejection | None:
    """The operating point "reject 10 %" of the recommended score; None where it has no threshold.
    results: the content of metrics.json."""
    network = results["recommended"]["network"]
    score = results["recommended"]["score"]
    for point in results["operating_points"].get(score, []):
        if point["reject"] == SHOWN_REJECT and point["threshold"] is not None:
            return Rejection(network, score, point["threshold"], point["reject"])
    return None


@torch.inference_mode()
def draw_rejection(
    networks: Networks,
    dataset: Dataset,
    index: int,
    rejection: Rejection,
    inference: InferenceSettings,
) -> tuple[str, Image.Image]:
    """What rejecting means in one image: the picture, and its caption.

    Three columns: the image, the prediction with the rejected pixels hatched, and which
    pixels are right, wrong, rejected or not.
    """
    image, labels, _ = dataset[index]
    outputs = predict(networks, image[None].to(inference.device), labels.shape, inference.amp)
    output = outputs[rejection.network]
    prediction = model.predicted_class(output.probs)[0].cpu().numpy()  # [H, W]
    score = output.scores[rejection.score][0].half().float()
    rejected = score.cpu().numpy() > rejection.threshold  # [H, W]
    labels = labels.numpy()
    wrong = prediction != labels

    photo = photo_of(image, torch.from_numpy(labels))
    legend = classes_seen([prediction], networks.classes)
    strip_height = max(5, math.ceil(len(legend) / 2)) * LEGEND_ROW
    sheet = PanelSheet(photo, 1, 3, strip_height)
    sheet.put(0, 0, "image", np.asarray(photo), smooth=True)
    colours = hatched(colourise(prediction, networks.palette), rejected, sheet.picture_size)
    sheet.put(0, 1, "prediction, rejected hatched", colours)
    decisions = np.zeros((*labels.shape, 3), np.uint8)
    decisions[wrong & ~rejected] = WHITE
    decisions[wrong & rejected] = ORANGE
    decisions[~wrong & rejected] = BLUE
    decisions[labels >= data.IGNORED] = GREY
    sheet.put(0, 2, "what is rejected", decisions)
    for i, (number, name) in enumerate(legend):
        colour = tuple(colourise(number, networks.palette).tolist())
        sheet.draw_mark(i % 2, i // 2, colour, name)
    marks = [
        (ORANGE, "wrong, rejected"),
        (WHITE, "wrong, kept"),
        (BLUE, "right, rejected"),
        (BLACK, "right, kept"),
        (GREY, "void"),
    ]
    sheet.draw_marks(2, marks)
    name = rejection.score.replace("_", " ")
    caption = (
        f"Reject {100 * rejection.asked:.0f} %: {dataset.names[index]}, pixels with {name} above "
        f"{three_digits(rejection.threshold)}, {100 * rejected.mean():.1f} % of this image"
    )
    return caption, sheet.image


def hatched(pixels: np.ndarray, rejected: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture [H, W, 3] at `size` (width, height) with diagonal lines over the
    rejected pixels, bool [H, W]: uint8."""
    large = np.asarray(Image.fromarray(pixels).resize(size, Image.NEAREST)).copy()
    mask = np.asarray(Image.fromarray(rejected).resize(size, Image.NEAREST))
    width, height = size
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % 8
    large[mask & (diagonal < 4)] = WHITE
    large[mask & (diagonal == 4)] = BLACK  # an edge, so that white classes show it too
    return large


# ------------------------------------------------------------------------------------------- charts

# Okabe-Ito without its yellow: distinct to the colour-blind, visible on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#8a8a8a")
DASHES = ("none", "6 5", "1 5")
CHART_WIDTH = 420
LEFT = 44  # edges of a chart's plot
RIGHT = 408
TOP = 50
BOTTOM = 250
CHART_GAP = 10  # between the charts of a sheet


class Series(NamedTuple):
    """One curve of a chart."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]  # NaN breaks the line
    colour: int  # index into COLOURS
    dash: int  # index into DASHES
    pale_from: int | None = None  # the point from which on it is drawn pale; None: nowhere


class Chart(NamedTuple):
    """A drawn chart, `CHART_WIDTH` wide."""

    svg: str
    height: int
    caption: str = ""  # what to look for


class Limits(NamedTuple):
    """The values at the ends of both axes; None: as far as the data reach."""

    x0: float | None = None
    x1: float | None = None
    y0: float | None = None
    y1: float | None = None


def round_ticks(values: Sequence[float], low: float | None, high: float | None) -> list[float]:
    """About five round numbers from low to high; None: the smallest or the largest value."""
    finite = [value for value in values if math.isfinite(value)]
    if low is None:
        low = min(finite, default=0)
    if high is None:
        high = max(finite, default=1)
    raw_step = (high - low) / 5
    if raw_step == 0:
        raw_step = 0.2
    power = 10 ** math.floor(math.log10(raw_step))
    steps = [multiple * power for multiple in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step >= raw_step * 0.999)
    first = math.floor(low / step + 1e-6)
    last = max(math.ceil(high / step - 1e-6), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Axes:
    """The ticks of both axes, and where a point lies in the plot."""

    def __init__(self, series: Sequence[Series], limits: Limits):
        xs = itertools.chain.from_iterable(curve.xs for curve in series)
        ys = itertools.chain.from_iterable(curve.ys for curve in series)
        self.xticks = round_ticks(list(xs), limits.x0, limits.x1)
        self.yticks = round_ticks(list(ys), limits.y0, limits.y1)

    def right(self, x: float) -> float:
        """Pixels from the left edge of the chart."""
        first = self.xticks[0]
        last = self.xticks[-1]
        return LEFT + (x - first) / (last - first) * (RIGHT - LEFT)

    def down(self, y: float) -> float:
        """Pixels from the top edge of the chart."""
        first = self.yticks[0]
        last = self.yticks[-1]
        return BOTTOM - (y - first) / (last - first) * (BOTTOM - TOP)

    def diagonal(self) -> Series:
        """The line y = x from one end of the plot to the other."""
        low = max(self.xticks[0], self.yticks[0])
        high = min(self.xticks[-1], self.yticks[-1])
        return Series("y = x", (low, high), (low, high), colour=3, dash=2)

    def path(self, curve: Series) -> str:
        """The curve as the "d" of an SVG path, up to where it is pale."""
        end = len(curve.xs)
        if curve.pale_from is not None:
            end = curve.pale_from
        return self.path_of_points(curve.xs[:end], curve.ys[:end])

    def pale_path(self, curve: Series) -> str:
        """The rest of the curve, from its last point before; "" where there is none."""
        if curve.pale_from is None:
            return ""
        start = max(0, curve.pale_from - 1)
        return self.path_of_points(curve.xs[start:], curve.ys[start:])

    def path_of_points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Points as the "d" of an SVG path."""
        path = ""
        joined = False
        for x, y in zip(xs, ys, strict=True):
            known = math.isfinite(x + y)
            if known:
                command = "L" if joined else "M"
                # "h0" makes a dot of a point that stands alone
                path += f"{command}{self.right(x):.1f} {self.down(y):.1f}h0"
            joined = known
        return path


def svg_text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    """An SVG text in the text colour of the page."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="currentColor">{html.escape(text)}</text>'
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    limits: Limits,
    diagonal: bool = False,
    background: str = "",
) -> Chart:
    """Draw curves. diagonal: draw the line y = x too; background: SVG to draw below everything."""
    axes = Axes(series, limits)
    parts = [
        background,
        svg_text(0, 14, title, weight="bold"),
        svg_text(0, 35, ylabel),
        svg_text(RIGHT, BOTTOM + 33, xlabel, "end"),
    ]
    for x in axes.xticks:
        parts.append(svg_text(axes.right(x), BOTTOM + 16, f"{x:g}", "middle"))
    for y in axes.yticks:
        down = axes.down(y)
        parts.append(f'<path d="M{LEFT} {down:.1f}H{RIGHT}" stroke="#8885"/>')
        parts.append(svg_text(LEFT - 7, down + 4, f"{y:g}", "end"))

    series = list(series)
    if diagonal:
        series.append(axes.diagonal())
    for i, curve in enumerate(series):
        line = (
            f'stroke="{COLOURS[curve.colour]}" stroke-dasharray="{DASHES[curve.dash]}" '
            'stroke-width="2" stroke-linecap="round" stroke-linejoin="round"'
        )
        parts.append(f'<path d="{axes.path(curve)}" {line}/>')
        pale = axes.pale_path(curve)
        if pale:
            parts.append(f'<path d="{pale}" {line} stroke-opacity="0.3"/>')
        # the legend, two entries per row
        x = i % 2 * CHART_WIDTH / 2
        y = BOTTOM + 57 + 18 * (i // 2)
        parts.append(f'<path d="M{x + 1} {y - 4}h22" {line}/>')
        parts.append(svg_text(x + 30, y, curve.label))

    height = BOTTOM + 65 + 18 * ((len(series) - 1) // 2)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" fill="none" '
        f'viewBox="0 0 {CHART_WIDTH} {height}" '
        'font-family="system-ui,sans-serif" font-size="11">'
    )
    return Chart(f"{head}<title>{html.escape(title)}</title>{''.join(parts)}</svg>", height)


HEAD_ENDING = "-head"  # of the name under which an uncertainty head that learns alone is logged


def learning_charts(logs: dict[str, list[dict]]) -> list[Chart]:
    """Loss and validation mIoU by epoch. logs: by the name of a network, the lines of
    its .jsonl; an epoch after which nothing was validated has no mIoU. The loss of a head
    that learned alone is another one than its network's, and has a chart of its own.
    Each chart has its caption."""
    networks = {}
    heads = {}
    for name, entries in logs.items():
        kind = heads if name.endswith(HEAD_ENDING) else networks
        kind[name] = entries
    drawn = [
        (
            "loss",
            "Training loss",
            networks,
            "Good: falls to the end. A student’s loss may have more terms than a member’s.",
        ),
        (
            "miou",
            "Validation mIoU",
            networks,
            "Good: level in the end. Where it still rises, more epochs would help.",
        ),
    ]
    if heads:
        drawn.append(
            (
                "loss",
                "Training loss of the uncertainty head",
                heads,
                "Good: falls, ever more slowly. The network is finished by then and does not "
                "change.",
            )
        )

    charts = []
    for key, title, logs_of_kind, caption in drawn:
        series = []
        for number, (name, entries) in enumerate(logs_of_kind.items()):
            known = [entry for entry in entries if entry.get(key) is not None]
            epochs = [entry["epoch"] for entry in known]
            values = [entry[key] for entry in known]
            colour = number % len(COLOURS)
            dash = number // len(COLOURS) % len(DASHES)
            series.append(Series(name, epochs, values, colour, dash))
        chart = line_chart(title, series, "epoch", key, Limits(y0=0))
        charts.append(chart._replace(caption=caption))
    return charts


CELL = 26  # pixels: the side of a cell of a confusion matrix
CELL_LABELS = 114  # pixels: beside and above the cells


def confusion_chart(matrix: list[list[int]], classes: Sequence[str]) -> Chart:
    """A confusion matrix as SVG: a row per true class, a column per predicted one, both
    in the order of the classes. A cell tells which part of the true class it is, in %,
    from 0.5 % on."""
    parts = [
        svg_text(0, CELL_LABELS - 8, "truth \N{DOWNWARDS ARROW}  predicted \N{RIGHTWARDS ARROW}"),
    ]
    for number, name in enumerate(classes):
        label = name if len(name) <= 16 else f"{name[:15]}…"
        middle = CELL_LABELS + CELL * number + CELL / 2
        parts.append(svg_text(CELL_LABELS - 6, middle + 4, label, "end"))
        parts.append(
            f'<text transform="translate({middle + 4} {CELL_LABELS - 6}) rotate(-90)" '
            f'fill="currentColor">{html.escape(label)}</text>'
        )
    for row, counts in enumerate(matrix):
        pixels = sum(counts)
        for column, count in enumerate(counts):
            if count < 0.005 * pixels or count == 0:
                continue
            share = count / pixels
            x = CELL_LABELS + CELL * column
            y = CELL_LABELS + CELL * row
            colour = "#fff" if share > 0.5 else "currentColor"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{COLOURS[0]}" '
                f'fill-opacity="{share:.3f}"/>'
            )
            parts.append(
                f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" text-anchor="middle" '
                f'fill="{colour}">{100 * share:.0f}</text>'
            )
    side = CELL_LABELS + CELL * len(classes) + 1
    for number in range(len(classes) + 1):
        line = CELL_LABELS + CELL * number
        parts.append(f'<path d="M{CELL_LABELS} {line}H{side}" stroke="#8885"/>')
        parts.append(f'<path d="M{line} {CELL_LABELS}V{side}" stroke="#8885"/>')
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" fill="none" '
        f'viewBox="0 0 {side} {side}" style="width:{side}px" '
        'font-family="system-ui,sans-serif" font-size="11">'
    )
    return Chart(f"{head}<title>Confusion matrix</title>{''.join(parts)}</svg>", side)


def chart_sheet(charts: Sequence[Chart]) -> str:
    """The text of an SVG file with charts side by side, on white."""
    step = CHART_WIDTH + CHART_GAP
    placed = ""
    for i, chart in enumerate(charts):
        opening = f'<svg x="{step * i}" y="0" width="{CHART_WIDTH}" height="{chart.height}" '
        placed += chart.svg.replace("<svg ", opening, 1)
    width = step * len(charts) + 6
    height = max(chart.height for chart in charts) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {width} {height}" '
        f'width="{width}" color="#444" style="background:#fff">{placed}</svg>\n'
    )


# ----------------------------------------------------------------------------------- report: tables


class Column(NamedTuple):
    """How a number of metrics.json is printed, with three digits."""

    heading: str  # with an arrow to the better side
    factor: float


COLUMNS = {  # by the key in metrics.json
    "miou": Column("mIoU % ↑", 100),
    "pixel_accuracy": Column("pixel acc. % ↑", 100),
    "nll": Column("NLL ↓", 1),
    "brier": Column("Brier ↓", 1),
    "ece": Column("ECE % ↓", 100),
    "error_ece": Column("ECE % ↓", 100),
    "auroc": Column("AUROC % ↑", 100),
    "ap": Column("AP % ↑", 100),
    "fpr95": Column("FPR95 % ↓", 100),
    "component_f1": Column("comp. F1 % ↑", 100),
    "image_auroc_p99": Column("image AUROC ↑", 100),
    "aurc": Column("AURC ↓", 1),
    "ause": Column("AUSE ↓", 1),
    "threshold": Column("score above", 1),
    "rejected": Column("pixels %", 100),
    "errors_caught": Column("errors %", 100),
    "accuracy_kept": Column("rest right %", 100),
    "rmse": Column("RMSE ↓", 1),
    "rmsle": Column("RMSLE ↓", 1),
    "pearson": Column("Pearson ↑", 1),
    "spearman": Column("Spearman ↑", 1),
    "class_error": Column("class error ↓", 1),
    "parameters": Column("parameters, M", 1e-6),
    "ms_per_image": Column("ms / image ↓", 1),
    "images_per_second": Column("images / s ↑", 1),
    "compiled_ms_per_image": Column("compiled, ms ↓", 1),
    "peak_memory_mb": Column("memory, MB ↓", 1),
    "iou": Column("IoU %", 100),
    "uncertainty": Column("uncertainty", 1),
}
TERMS = {  # what the headings mean, for the page; docs/METRICS.md has the definitions
    "segmentation": "mIoU: overlap of predicted and true pixels, mean over the classes; NLL: mean "
    "-log of the true class’s probability; Brier: squared error of the probabilities; ECE: gap "
    "between confidence and accuracy.",
    "uncertainty": "AUROC: the chance that a wrong pixel scores above a right one; AP: precision, "
    "averaged over the recall; FPR95: right pixels among the alarms, in % of all right ones, where "
    "95 % of the wrong ones are found; AURC: error rate of the pixels that are kept, averaged over "
    "how many are kept; AUSE: what of that a perfect score would save, relative to the error rate.",
    "ood": "comp. F1: of connected regions, by their overlap; image AUROC: does the 99th "
    "percentile of an image’s scores tell that it shows an anomaly.",
}
NETWORKS = ("student", "teacher", "member")  # in the order of COLOURS, in every chart


class Section(NamedTuple):
    """A part of the report; its pictures, if it has any, are made by `pictures_html`."""

    key: str  # of its part of metrics.json; of an OOD set "ood/<name>", of the panels "images"
    heading: str
    explanation: str  # how to read it, plain text
    headings: Sequence[str] = ()  # of the table's columns
    rows: Sequence[list[str]] = ()
    groups: Sequence[str] = ()  # the network of each row, where a network has several
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells in bold


def three_digits(value: float, sign: str = "") -> str:
    """A number with three digits that count, whole from 100 on; sign: "+" to show that
    of positive numbers too."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded number
    if exponent < -4:
        return f"{value:{sign}.2e}"
    return f"{value:{sign},.{max(0, 2 - exponent)}f}"


def number_text(results: dict, key: str) -> str:
    """A number as text, mean ± standard deviation where it has those, a dash if it is unknown."""
    factor = COLUMNS[key].factor
    mean = results.get(key, results.get(f"{key}_mean"))
    if mean is None:
        return "–"
    text = three_digits(factor * mean)
    spread = results.get(f"{key}_std")
    if spread is None:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {factor * spread:.{decimals}f}"


def in_order(results: dict[str, dict]) -> list[tuple[str, str, dict]]:
    """The results by "<network>" or "<network>/<score>" as rows (network, score or "",
    results), in the order of `NETWORKS`."""

    def sort_key(row: tuple[str, str, dict]) -> int:
        network = row[0]
        return NETWORKS.index(network) if network in NETWORKS else len(NETWORKS)

    rows = []
    for key, row_results in results.items():
        if row_results:
            network, _, score = key.partition("/")
            rows.append((network, score, row_results))
    return sorted(rows, key=sort_key)


def table_section(
    key: str,
    heading: str,
    explanation: str,
    results: dict[str, dict],
    columns: Sequence[str],
) -> Section:
    """A section with a table: the named `COLUMNS`, one row per network or score of
    `results`. Where the rows are scores, they are grouped by network."""
    headings = [""]
    for column in columns:
        headings.append(COLUMNS[column].heading)
    rows = []
    groups = []
    values = []
    for network, score, row_results in in_order(results):
        label = f"{network} {score}".replace("_", " ").strip()
        rows.append([label, *(number_text(row_results, column) for column in columns)])
        groups.append(network if score else "")
        values.append([row_results.get(column) for column in columns])
    best = best_cells(columns, rows, groups, values)
    if not any(groups):
        groups = []
    return Section(key, heading, explanation, headings, rows, groups, best)


def best_cells(
    columns: Sequence[str],
    rows: list[list[str]],
    groups: list[str],
    values: list[list[float | None]],
) -> frozenset[tuple[int, int]]:
    """The cells of a table that show the best number of their column in their group,
    where it has several. values: the number of each cell but the label's; None where it
    is unknown."""
    best = set()
    for column, key in enumerate(columns):
        heading = COLUMNS[key].heading
        if not heading.endswith(("↑", "↓")):  # neither side is better
            continue
        for group in set(groups):
            known = []
            for row, row_values in enumerate(values):
                if groups[row] == group and row_values[column] is not None:
                    known.append(row)
            if len(known) < 2:
                continue
            choose = max if heading.endswith("↑") else min
            best_row = choose(known, key=lambda row: values[row][column])
            for row in known:  # those that look the same are as good
                if rows[row][column + 1] == rows[best_row][column + 1]:
                    best.add((row, column + 1))
    return frozenset(best)


OPERATING_COLUMNS = ("threshold", "rejected", "errors_caught", "accuracy_kept")


def operating_section(results: dict) -> Section:
    """What rejecting the most uncertain pixels buys, at each threshold of the recommended score."""
    network = results["recommended"]["network"]
    score = results["recommended"]["score"]
    name = score.replace("_", " ")
    explanation = (
        f"To reject uncertain pixels, use {network} {name}: {results['recommended']['reason']}. "
    )
    rows = []
    for point in results["operating_points"].get(score, []):
        label = f"reject {100 * point['reject']:.0f} %"
        rows.append([label, *(number_text(point, column) for column in OPERATING_COLUMNS)])
        if point["reject"] == SHOWN_REJECT:
            explanation += operating_sentence(point)
    explanation += (
        " The thresholds were chosen on these very images; a score counts rounded to float16, and "
        "equal scores are rejected together. metrics.json has those of every score."
    )
    headings = ["", *(COLUMNS[column].heading for column in OPERATING_COLUMNS)]
    return Section("operating_points", f"Reject by {name}", explanation, headings, rows)


def operating_sentence(point: dict) -> str:
    """An operating point in words."""
    rejected = percent_text(point["rejected"])
    errors = percent_text(point["errors_caught"])
    right = percent_text(point["accuracy_kept"])
    return (
        f"Above {number_text(point, 'threshold')} lie {rejected} of the pixels and {errors} of the "
        f"errors; what is left is right at {right}."
    )


def class_section(classes: list[dict]) -> Section:
    """IoU and mean uncertainty of each class by each network that has them."""
    columns = []
    for kind in ("iou", "uncertainty"):
        for network in NETWORKS:
            if any(row[kind].get(network) is not None for row in classes):
                columns.append((kind, network))
    rows = []
    for row in classes:
        cells = [number_text({kind: row[kind][network]}, kind) for kind, network in columns]
        rows.append([row["name"], *cells])
    headings = ["class", *(f"{network} {COLUMNS[kind].heading}" for kind, network in columns)]
    explanation = "Uncertainty: mean over the pixels that a network predicts as the class."
    return Section("classes", "Classes", explanation, headings, rows)


class ComparedTask(NamedTuple):
    """A column of the table "worth more than free?"."""

    heading: str
    figure: str  # "auroc" or "aurc"
    comparison: dict  # of the figure, as `compare_with_free` has it


def comparison_section(comparison: dict) -> Section:
    """Which scores are worth more than the best free one: one row per score, one column
    per task and figure. comparison: that part of metrics.json."""
    explanation = (
        "Compared with the best score that the student’s softmax gives for nothing, chosen on "
        "these very images. yes: better, the 95 % interval of the gain lies above 0 (paired "
        "bootstrap over images); no: worse; undecided: 0 is in the interval. The number is the "
        "gain, in % for AUROC. The teacher’s rows show what a perfect copy of its measure could "
        "reach: for errors, its measure is asked for those of the student."
    )
    headings = [""]
    rows = []
    groups = []
    best = set()
    if comparison:
        tasks = compared_tasks(comparison)
        headings += [task.heading for task in tasks]
        best_free = ["best free score"]
        for task in tasks:
            name = task.comparison["best_free"].removeprefix("student/")
            best_free.append(name.replace("_", " "))
        rows.append(best_free)
        groups.append("")
        for network, score, _ in in_order(tasks[0].comparison["scores"]):
            row = [f"{network} {score}".replace("_", " ")]
            for column, task in enumerate(tasks, start=1):
                gain = task.comparison["scores"][f"{network}/{score}"]
                row.append(gain_text(gain, task.figure))
                if gain["worth_more"] == "yes":
                    best.add((len(rows), column))
            rows.append(row)
            groups.append(network)
    heading = "Worth more than free?"
    return Section("comparison", heading, explanation, headings, rows, groups, frozenset(best))


def compared_tasks(comparison: dict) -> list[ComparedTask]:
    """The tasks of the part "comparison" of metrics.json: errors first, then the OOD sets."""
    tasks = [
        ComparedTask("errors AUROC", "auroc", comparison["errors"]["auroc"]),
        ComparedTask("errors AURC", "aurc", comparison["errors"]["aurc"]),
    ]
    for name, task in comparison["ood"].items():
        tasks.append(ComparedTask(name[:12], "auroc", task["auroc"]))
    return tasks


def gain_text(gain: dict, figure: str) -> str:
    """The verdict on a score with its gain where it is decided; a dash where it is unknown."""
    if gain["gain"] is None:
        return "–"
    if gain["worth_more"] == "undecided":
        return "undecided"
    return f"{gain['worth_more']} {three_digits(COLUMNS[figure].factor * gain['gain'], '+')}"


def protocol_section(protocol: dict) -> Section:
    """What the results depend on, one row per setting."""
    rows = []
    for setting, value in protocol.items():
        if setting != "ood":
            rows.append([setting, "–" if value is None else str(value)])
    headings = ["setting", "value"]
    return Section("protocol", "Protocol", "What the numbers depend on.", headings, rows)


def sections(results: dict) -> list[Section]:
    """The report's words and tables; results: the content of metrics.json."""
    detection_columns = ["auroc", "ap", "fpr95"]
    parts = [
        table_section(
            "segmentation",
            "Segmentation",
            f"Arrows point to the better side; the best is bold. {TERMS['segmentation']}",
            results["segmentation"],
            ["miou", "pixel_accuracy", "nll", "brier", "ece"],
        ),
        table_section(
            "uncertainty",
            "Finding errors",
            "Positive is a wrong pixel; each network is asked for its own errors. The best of each "
            f"network is bold. {TERMS['uncertainty']} {drawn_scores_sentence()}",
            results["uncertainty"],
            [*detection_columns, "aurc", "ause"],
        ),
        operating_section(results),
    ]
    for name, ood_results in results["ood"].items():
        protocol = protocol_sentence(results["protocol"]["ood"][name])
        part = table_section(
            f"ood/{name}",
            f"Anomalies: {name}",
            "Positive is a pixel, a connected component or an image of what was never trained on; "
            f"{TERMS['ood']} {protocol}",
            ood_results,
            [*detection_columns, "component_f1", "image_auroc_p99"],
        )
        parts.append(part)
    parts += [
        comparison_section(results["comparison"]),
        table_section(
            "fidelity",
            "Fidelity",
            "How closely the student’s uncertainty follows its teacher’s, by pixel.",
            {"student": results["fidelity"]},
            ["rmse", "rmsle", "pearson", "spearman", "class_error"],
        ),
        class_section(results["classes"]),
        table_section(
            "timing",
            "Cost",
            "From pixels to class and uncertainty.",
            results["timing"],
            [
                "parameters",
                "ms_per_image",
                "images_per_second",
                "compiled_ms_per_image",
                "peak_memory_mb",
            ],
        ),
        Section("training", "Training", "What the networks’ logs tell of their training."),
        Section("images", "Images", "Good: uncertainty is bright where the accuracy map is white."),
        protocol_section(results["protocol"]),
    ]
    return parts


def results_table(results: dict) -> str:
    """The results as aligned ASCII text, at most 100 columns wide; - is unknown."""
    to_ascii = str.maketrans({"±": "+-", "–": "-", "↑": "", "↓": ""})
    lines = []
    for section in sections(results):
        if not section.rows or section.key in ("classes", "protocol"):
            continue
        head = [section.heading, *section.headings[1:]]
        if lines:
            lines.append("")
        for label, *cells in [head, *section.rows]:
            line = f"{label:<34.34}"
            for cell in cells:
                line += f"{cell.translate(to_ascii).strip():>13}"
            lines.append(line.rstrip())
    return "\n".join(lines)


# -------------------------------------------------------------------- report: pictures and the page

# The selectors know the tables by their shape: `td:only-of-type` and
# `th:nth-child(2):last-child` are the second column of a table with two, which is the
# protocol's; its text may wrap.
#
# What is wider than the screen scrolls inside `.scroll`. At an edge behind which there
# is more, a shadow shows: it is fixed to the box, and a patch of the page's colour that
# is fixed to the content covers it at the very end. Panels would hide it, so they have
# a line of text instead.
STYLE = """
:root{color-scheme:light dark}
body{max-width:1000px;margin:auto;padding:24px 16px;font:15px/1.5 system-ui,sans-serif}
h1{font-size:15px;margin:0}
h2{font-size:18px;margin:40px 0 4px}
.lead{font-size:19px;margin:8px 0}
p{margin:0}
figure{display:inline-block;width:min(100%,470px);margin:14px 20px 14px 0;vertical-align:top}
figure.wide{display:block;width:100%;margin:14px 0 26px}
.wide figcaption{font-weight:600}
svg,img{width:100%;display:block;color:inherit}
.wide svg{margin-top:6px}
h2,p{break-after:avoid}
tr,figure{break-inside:avoid}
figcaption,table{font-size:13.5px}
.scroll{overflow-x:auto;margin:6px 0;background:
linear-gradient(to right,Canvas 30%,transparent) 0 0/48px 100% no-repeat local,
linear-gradient(to left,Canvas 30%,transparent) 100% 0/48px 100% no-repeat local,
linear-gradient(to right,#8889,transparent) 0 0/16px 100% no-repeat scroll,
linear-gradient(to left,#8889,transparent) 100% 0/16px 100% no-repeat scroll}
img{min-width:820px}
table{border-collapse:collapse;min-width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 0 4px 18px;text-align:right;white-space:nowrap;border-bottom:1px solid #8885}
th:first-child,td:only-of-type{text-align:left;font-weight:400}
th:first-child{padding:0;position:sticky;left:0;background:Canvas}
.network th:first-child{font-weight:600;padding-top:12px}
.best{font-weight:700}
th:nth-child(2):last-child{text-align:left}
td:only-of-type{white-space:normal;overflow-wrap:anywhere}
@media(max-width:850px){
figure{margin-right:0}
.panel figcaption::after{content:" – wider than the screen: scroll it sideways →";font-weight:400}
}
@media print{
body{font-size:11px}
.scroll{overflow:visible;background:none}
img{min-width:0}
figure{width:45%}
}
"""


class Curve(NamedTuple):
    """A kind of curve in metrics.json and the chart that shows it, all numbers in %."""

    title: str
    number: str | None  # key of the number in each curve's label
    points: tuple[str, str] | None  # keys of x and y; None: see `curve_points`
    xlabel: str
    ylabel: str
    limits: Limits
    caption: str  # what is good
    diagonal: bool = False  # whether y = x is drawn


CURVES = {  # by the key in metrics.json
    "reliability": Curve(
        title="Reliability, with ECE in %",
        number="ece",
        points=("confidence", "accuracy"),
        xlabel="confidence: largest probability, %",
        ylabel="accuracy, %",
        limits=Limits(0, 100, 0, 100),
        caption="Good: on the diagonal. Below it the network is overconfident.",
        diagonal=True,
    ),
    "error_reliability": Curve(
        title="Reliability of predicted errors, with ECE in %",
        number="error_ece",
        points=("probability", "error_rate"),
        xlabel="predicted probability of error, %",
        ylabel="wrong pixels, %",
        limits=Limits(0, 100, 0, 100),
        caption="Good: on the diagonal. Above it errors are more frequent than predicted.",
        diagonal=True,
    ),
    "rejection": Curve(
        title="mIoU without the most uncertain pixels",
        number=None,
        points=None,
        xlabel="most uncertain pixels ignored, %",
        ylabel="mIoU of the rest, %",
        limits=Limits(0, 90, None, 100),
        caption="Good: rises at once and steeply. Pale: classes have died out, no pixel of them is "
        "left, and the mIoU is of fewer classes.",
    ),
    "risk_coverage": Curve(
        title="Risk and coverage, with AURC",
        number="aurc",
        points=("coverage", "risk"),
        xlabel="most certain pixels kept, %",
        ylabel="wrong among them, %",
        limits=Limits(0, 100, 0, None),
        caption="Good: along the bottom for long. It ends at the network’s error rate.",
    ),
    "roc": Curve(
        title="ROC, with AUROC in %",
        number="auroc",
        points=("fpr", "tpr"),
        xlabel="false alarms: share of other pixels, %",
        ylabel="found: share of positive pixels, %",
        limits=Limits(0, 100, 0, 100),
        caption="Good: up the left edge at once. The diagonal is guessing.",
        diagonal=True,
    ),
    "pr": Curve(
        title="Precision and recall, with AP in %",
        number="ap",
        points=("recall", "precision"),
        xlabel="recall: share of positive pixels found, %",
        ylabel="precision: right among the alarms, %",
        limits=Limits(0, 100, 0, 100),
        caption="Good: top right. Guessing is level at the share of positives. Drawn from 1 % "
        "recall on: before, a handful of pixels decides.",
    ),
}

# The charts draw these scores only, so that they can be read; the tables list every
# score. To draw another one, name it here with an index into DASHES. "" is for the
# curves that belong to a network and not to a score.
DRAWN_SCORES = {"": 0, "dudes": 0, "std": 0, "entropy": 1, ERROR: 2}


LOWEST_RECALL = 0.01  # from which on precision is drawn


def drawn_scores_sentence() -> str:
    """Which scores the charts leave to the table."""
    names = [score for score in DRAWN_SCORES if score]
    return f"The charts draw {', '.join(names[:-1])} and {names[-1]} alone."


def curve_chart(kind: str, results: dict[str, dict]) -> Chart | None:
    """One of `CURVES` for every network and every one of `DRAWN_SCORES`; None if there are none."""
    curve = CURVES[kind]
    series = []
    for network, score, row_results in in_order(results):
        if kind not in row_results or network not in NETWORKS or score not in DRAWN_SCORES:
            continue
        number = "" if curve.number is None else number_text(row_results, curve.number)
        xs, ys = curve_points(curve, row_results[kind])
        colour = NETWORKS.index(network)
        label = f"{network} {score} {number}"
        pale_from = None
        if kind == "rejection":
            pale_from = first_with_fewer_classes(row_results["rejection_classes"])
        series.append(Series(label, xs, ys, colour, DRAWN_SCORES[score], pale_from))
    if not series:
        return None
    return line_chart(curve.title, series, curve.xlabel, curve.ylabel, curve.limits, curve.diagonal)


def curve_points(curve: Curve, values) -> tuple[np.ndarray, np.ndarray]:
    """x and y in %. A rejection curve is a bare list with one value per tenth of the
    pixels that is ignored; the others are {"<x>": list, "<y>": list}. Of precision and
    recall the points below `LOWEST_RECALL` are left out: there the precision jumps
    between 0 and 1."""
    if curve.points is None:
        xs = np.arange(10) / 10
        ys = values
    else:
        x_key, y_key = curve.points
        xs = values[x_key]
        ys = values[y_key]
    xs = np.array(xs, dtype=float)
    ys = np.array(ys, dtype=float)
    if curve.points == ("recall", "precision"):
        # `~`, so that points that are NaN stay
        shown = ~(xs < LOWEST_RECALL)
        xs = xs[shown]
        ys = ys[shown]
    return 100 * xs, 100 * ys


def first_with_fewer_classes(classes: list[int]) -> int | None:
    """The index of the first point of a rejection curve whose mIoU is of fewer classes
    than that of all pixels; None where there is none. classes: how many classes are in
    each point."""
    for number, count in enumerate(classes):
        if count < classes[0]:
            return number
    return None


def curves_html(kinds: Sequence[str], results: dict[str, dict]) -> str:
    """HTML of the named `CURVES`, each with its caption."""
    text = ""
    for kind in kinds:
        chart = curve_chart(kind, results)
        if chart is not None:
            text += figure_html(chart.svg, CURVES[kind].caption)
    return text


def density_html(fidelity: dict) -> str:
    """HTML of the joint histogram of both uncertainties, a picture inside a chart. Its
    axes end where all but 0.1 % of the pixels lie below."""
    counts = np.array(fidelity["density"], dtype=float)  # [student's, teacher's], from 0 up
    bin_width = fidelity["density_max"] / len(counts)
    rows = bins_of_most(counts.sum(axis=1))
    columns = bins_of_most(counts.sum(axis=0))
    counts = counts[:rows, :columns]
    shade = viridis(np.log1p(counts) / np.log1p(max(counts.max(), 1)))
    opacity = np.where(counts > 0, 255, 0).astype(np.uint8)  # empty bins are transparent
    pixels = np.dstack([shade, opacity])[::-1].copy()  # 0 is at the bottom
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")

    # The axes end at round numbers, the picture at the last bins.
    limits = Limits(0, bin_width * columns, 0, bin_width * rows)
    axes = Axes([], limits)
    right = axes.right(limits.x1)
    top = axes.down(limits.y1)
    picture = (
        f'<image x="{LEFT}" y="{top}" width="{right - LEFT}" height="{BOTTOM - top}" '
        'preserveAspectRatio="none" image-rendering="pixelated" '
        f'href="{data_uri(png.getvalue())}"/>'
    )
    measure = fidelity["measure"].replace("_", " ")
    chart = line_chart(
        "Pixels by uncertainty, yellow where most are",
        [],
        f"teacher: {measure}",
        f"student: predicted {measure}",
        limits,
        diagonal=True,
        background=picture,
    )
    caption = (
        "Good: a narrow ridge on the diagonal. Below it the student is surer than its teacher. "
        "The axes end where all but 0.1 % of the pixels lie below."
    )
    return figure_html(chart.svg, caption)


def bins_of_most(counts: np.ndarray) -> int:
    """How many bins from 0 up, at least one, hold 99.9 % of what is counted."""
    up_to = np.cumsum(counts)
    return int(np.searchsorted(up_to, 0.999 * up_to[-1])) + 1


class Pictures(NamedTuple):
    """What the report shows that is not in metrics.json."""

    panels: Sequence[tuple[str, Path]]  # (title, PNG file), in the order to show them
    rejection: tuple[str, Path] | None  # caption and PNG file of `draw_rejection`
    logs: dict[str, list[dict]]  # see `training_logs`


def pictures_html(results: dict, pictures: Pictures) -> dict[str, str]:
    """The HTML of the pictures of each section, by `Section.key`; arguments as for `report`."""
    error_curves = ["rejection", "risk_coverage", "roc", "pr", "error_reliability"]
    parts = {
        "segmentation": curves_html(["reliability"], results["segmentation"]),
        "uncertainty": curves_html(error_curves, results["uncertainty"]),
        "classes": confusion_html(results),
    }
    for name, ood_results in results["ood"].items():
        parts[f"ood/{name}"] = curves_html(["roc", "pr"], ood_results)
    if results["fidelity"]:
        parts["fidelity"] = density_html(results["fidelity"])
    if pictures.rejection is not None:
        parts["operating_points"] = panel_html(*pictures.rejection)
    if pictures.logs:
        parts["training"] = ""
        for chart in learning_charts(pictures.logs):
            parts["training"] += figure_html(chart.svg, chart.caption)
    parts["images"] = ""
    for title, file in pictures.panels:
        parts["images"] += panel_html(title, file)
    return parts


def confusion_html(results: dict) -> str:
    """HTML of the confusion matrix of the student or, without one, of the teacher."""
    network = results["recommended"]["network"]
    classes = [row["name"] for row in results["classes"]]
    chart = confusion_chart(results["confusion"][network], classes)
    caption = (
        f"What the {network} takes each class for, in % of the true class. Good: dark on the "
        "diagonal alone."
    )
    return (
        f'<figure class="wide"><figcaption>{html.escape(caption)}</figcaption>'
        f'<div class="scroll">{chart.svg}</div></figure>'
    )


def panel_html(title: str, file: Path) -> str:
    """A PNG file as a figure of the page's width, which scrolls on a narrow screen."""
    image = f'<img alt="" src="{data_uri(file.read_bytes())}">'
    return (
        f'<figure class="wide panel"><figcaption>{html.escape(title)}</figcaption>'
        f'<div class="scroll">{image}</div></figure>'
    )


def figure_html(picture: str, caption: str) -> str:
    """A picture, given as HTML or SVG, with a caption below."""
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def table_html(section: Section) -> str:
    """The table of a section in a box that scrolls; "" where it has no rows. A network
    whose rows are grouped has a row of its own above them."""
    if not section.rows:
        return ""
    text = "<tr><th>" + "<th>".join(html.escape(cell) for cell in section.headings)
    group = ""
    for number, (label, *cells) in enumerate(section.rows):
        if section.groups and section.groups[number] != group:
            group = section.groups[number]
            others = len(section.headings) - 1
            text += f'<tr class="network"><th>{html.escape(group)}<td colspan="{others}">'
        text += f"<tr><th>{html.escape(label.removeprefix(f'{group} '))}"
        for column, cell in enumerate(cells, start=1):
            opening = '<td class="best">' if (number, column) in section.best else "<td>"
            text += opening + html.escape(cell)
    return f'<div class="scroll"><table>{text}</table></div>'


def data_uri(png: bytes) -> str:
    """A PNG as a data URI, which needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def lead(results: dict) -> list[str]:
    """The outcome in three paragraphs: the classes, errors, unknown objects."""
    return [
        segmentation_sentences(results),
        errors_sentence(results),
        anomalies_sentence(results),
    ]


def percent_text(value: float | None) -> str:
    """A share in %, with three digits."""
    return "unknown" if value is None else f"{three_digits(100 * value)}\u00a0%"


def data_name(protocol: dict) -> str:
    """What a reader calls the data: the name of the data set, of one's own that of its folder."""
    if protocol["dataset"] == "folder" and protocol["data"]:
        return protocol["data"]
    return protocol["dataset"]


def segmentation_sentences(results: dict) -> str:
    """How well the student or, without one, the teacher segments, what the others reach, which
    classes it misses altogether, and whether the images are few."""
    protocol = results["protocol"]
    network = results["recommended"]["network"]
    miou = results["segmentation"][network]["miou"]
    text = (
        f"The {network} segments the {protocol['images']} images of {data_name(protocol)} "
        f"{protocol['split']} with an mIoU of {percent_text(miou)}"
    )
    others = []
    for name in NETWORKS:
        if name != network and name in results["segmentation"]:
            called = "one member" if name == "member" else f"its {name}"
            others.append(f"{called} with {percent_text(results['segmentation'][name]['miou'])}")
    if others:
        text += f" ({', '.join(others)})"
    student_ms = results["timing"].get("student", {}).get("ms_per_image")
    teacher_ms = results["timing"].get("teacher", {}).get("ms_per_image")
    if student_ms and teacher_ms:
        text += f", in {percent_text(student_ms / teacher_ms)} of the teacher’s time"
    text += "."
    missed = classes_never_found(results)
    if missed:
        text += f" The {network} finds no pixel of {', '.join(missed)}."
    if protocol["images"] < FEW_IMAGES:
        text += f" So few images as {protocol['images']} decide little."
    return text


FEW_IMAGES = 20  # a round number: of fewer, a single image moves every figure by points


def classes_never_found(results: dict) -> list[str]:
    """The classes that are in the labels and of which the recommended network finds no pixel."""
    confusion = results["confusion"][results["recommended"]["network"]]
    missed = []
    for number, row in enumerate(results["classes"]):
        pixels_of_class = confusion[number]  # by what they are taken for
        if sum(pixels_of_class) > 0 and pixels_of_class[number] == 0:
            missed.append(row["name"])
    return missed


def errors_sentence(results: dict) -> str:
    """Which score finds errors best, and whether it paid to learn one."""
    network = results["recommended"]["network"]
    score = results["recommended"]["score"]
    figures = results["uncertainty"].get(f"{network}/{score}", {})
    numbers = f"AURC {number_text(figures, 'aurc')}, AUROC {percent_text(figures.get('auroc'))}"
    text = f"Wrong pixels are found best by its {score.replace('_', ' ')} ({numbers})"
    learned = {}  # figures of each score that the student learned
    if results["comparison"]:
        task = results["comparison"]["errors"]["aurc"]
        for key, gain in task["scores"].items():
            if key.startswith("student/") and gain["value"] is not None:
                learned[key] = gain
    if not learned:
        return text + "."

    best = min(learned, key=lambda key: learned[key]["value"])
    # `metrics.ERROR` is learned from the labels, not distilled.
    outcome = {
        "yes": "learning it paid",
        "no": "learning a score did not pay",
        "undecided": "whether learning a score paid is undecided on these images",
    }[learned[best]["worth_more"]]
    if best == f"{network}/{score}":  # nothing is better, so what it is better than is told
        other = f"the best free score, {task['best_free'].removeprefix('student/')}"
        value = task["value"]
    else:
        other = f"the best learned score, {best.removeprefix('student/')}"
        value = learned[best]["value"]
    return f"{text}; {outcome}: {other.replace('_', ' ')}, has an AURC of {three_digits(value)}."


def kind_of_score(results: dict, ood_name: str, score: str) -> list[str]:
    """In words: whether the student's score is free or learned, and then how it compares."""
    if score in FREE_SCORES:
        return ["free"]
    figure = {}  # of a set without images, or where nothing was compared
    if results["comparison"]:
        figure = results["comparison"]["ood"][ood_name].get("auroc", {})
    gain = figure.get("scores", {}).get(f"student/{score}")
    if gain is None:
        return ["learned"]
    against_free = {
        "yes": "better than the free ones",
        "no": "worse than the free ones",
        "undecided": "undecided against the free ones",
    }
    return ["learned", against_free[gain["worth_more"]]]


def anomalies_sentence(results: dict) -> str:
    """Which score of the student or, without one, of the teacher finds unknown objects best."""
    network = results["recommended"]["network"]
    texts = []
    for name, ood_results in results["ood"].items():
        auroc = {}
        for key, figures in ood_results.items():
            if key.startswith(f"{network}/") and figures["auroc"] is not None:
                auroc[key] = figures["auroc"]
        if auroc:
            best = max(auroc, key=lambda key: auroc[key])
            score = best.partition("/")[2]
            words = [f"AUROC {percent_text(auroc[best])}"]
            if network == "student":
                words = [*kind_of_score(results, name, score), *words]
            texts.append(f"by its {score.replace('_', ' ')} on {name} ({', '.join(words)})")
    if not results["ood"]:
        return "Unknown objects were not looked for (--ood)."
    if not texts:
        return "There were no unknown objects to find."
    return f"Unknown objects are found best {', '.join(texts)}; guessing has 50 %."


def training_logs(checkpoints: Sequence[Path]) -> dict[str, list[dict]]:
    """The lines of the .jsonl beside each checkpoint, by its name, and those of a head that
    learned alone; a network without one is left out, and one that cannot be read is left
    out with a warning."""
    logs = {}
    for checkpoint in checkpoints:
        for name in (checkpoint.stem, checkpoint.stem + HEAD_ENDING):
            path = checkpoint.with_name(f"{name}.jsonl")
            if not path.exists():  # a checkpoint may come from elsewhere, or learn in one go
                continue
            try:
                logs[name] = read_log(path)
            except ValueError as error:
                warn(f"{path} is no log of a training ({error}); its curves are left out")
    return logs


def read_log(path: Path) -> list[dict]:
    """The entries of a training's .jsonl, one an epoch; ValueError where it is none."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        if not isinstance(entry, dict) or "epoch" not in entry:
            raise ValueError("a line without an epoch")
    return entries


def report(results: dict, pictures: Pictures) -> str:
    """One HTML page that needs nothing else, no script, no network.

    results: the content of metrics.json; pictures: what it shows beside that.
    """
    title = html.escape(f"Uncertainty report: {data_name(results['protocol'])}")
    parts = pictures_html(results, pictures)
    body = ""
    for sentence in lead(results):
        body += f'<p class="lead">{html.escape(sentence)}</p>'
    for section in sections(results):
        content = table_html(section) + parts.get(section.key, "")
        if content:
            heading = html.escape(section.heading)
            explanation = html.escape(section.explanation)
            body += f"<h2>{heading}</h2><p>{explanation}</p>{content}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f"{body}</body></html>\n"
    )


# --------------------------------------------------------------- what the three command lines share

# A traceback (code 1) is a fault of the program; training leaves with 143 after SIGTERM
# and 129 after SIGHUP.
EXIT_DONE = 0
EXIT_REFUSED = 2  # with one line for what a user, a disk or a machine can cause
EXIT_INTERRUPTED = 130  # 128 + SIGINT

# Exceptions whose text already names the value and the remedy.
EXPLAINED = (UsageError, data.DataError, model.ModelError, metrics.MetricError)

# What the system refuses for reasons that lie with the user, and what to do about each.
# An OSError with any other number is a fault of the program.
REMEDIES = {
    errno.ENOSPC: "free space on that disk, then run it again",
    errno.EDQUOT: "your share of that disk is used up: free some of it, then run it again",
    errno.EFBIG: "the file system or ulimit -f allows no larger file: name a path elsewhere",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "only its owner may do that: name a path of your own",
    errno.EROFS: "name a path on a disk that can be written",
    errno.ENOENT: "check the path: it is not there, or was removed meanwhile",
    errno.ENOTDIR: "a part of the path is a file: name another path",
    errno.EISDIR: "a folder is where a file belongs: name another path, or move it away",
    errno.EEXIST: "a file is where a folder belongs: name another path, or move it away",
    errno.ENOTEMPTY: "something else writes into that folder: stop it, or name another path",
    errno.ENAMETOOLONG: "use shorter names of files and folders",
    errno.ELOOP: "its symbolic links lead in a circle: mend them",
    errno.EBUSY: "another program uses it: end that program, or name another path",
    errno.ETXTBSY: "it is a program that runs at this moment: name another path",
    errno.EMFILE: "raise the limit of open files with ulimit -n, or use fewer --workers",
    errno.ENFILE: "the whole machine has too many files open: close other programs",
    errno.ENOMEM: "the memory is full: use fewer --workers or a smaller --batch-size",
    errno.EIO: "the disk fails: look into the system's log, and use another disk",
    errno.EUCLEAN: "that file system is damaged: check it with fsck, or use another disk",
    errno.EBADMSG: "what lies there fails its checksum: restore it, and look after the disk",
    errno.ENOMEDIUM: "the drive is empty: put the medium in, or name another path",
    errno.ENOLCK: "that file system has no locks: name a path on a local disk",
    errno.ENODEV: "that file system cannot map files into memory: name a path on a local disk",
    errno.EOPNOTSUPP: "that file system cannot do this: name a path on a local disk",
    errno.ENOSYS: "the system or its sandbox cannot do this: name a path on a local disk",
    errno.EXDEV: "it would have to move to another disk: name a path that is no mounted file",
    errno.ENXIO: "it is no ordinary file: name another path",
    errno.EINVAL: "that file system takes no such name: use letters, digits, - and _",
    errno.EILSEQ: "that file system takes no name in this encoding: rename it",
    errno.EAGAIN: "the limit of processes is reached: use fewer --workers, or raise ulimit -u",
    errno.EPIPE: "a process that it works with has ended: run it again, with fewer --workers",
    errno.ESTALE: "the network drive has lost the file: mount it again, then run it again",
    errno.ENOTCONN: "the drive is no longer connected: mount it again, then run it again",
    errno.ENOLINK: "the link to the drive is cut: mount it again, then run it again",
    errno.EREMOTEIO: "the other side of the network drive fails: look there",
    errno.ECONNREFUSED: "nobody answers at that address: start the server, or check the port",
    errno.ECONNRESET: "the other side closed the connection: run it again",
    errno.ECONNABORTED: "the connection was given up: run it again",
    errno.ETIMEDOUT: "the other side does not answer: check the network, then run it again",
    errno.EHOSTDOWN: "that machine is down: start it, then run it again",
    errno.EHOSTUNREACH: "no way leads to that machine: check the network, then run it again",
    errno.ENETUNREACH: "there is no network: connect it, or name a path on a local disk",
    errno.ENETDOWN: "the network is down: start it, then run it again",
    errno.ENOKEY: "that folder is encrypted: unlock it, then run it again",
    errno.EKEYEXPIRED: "your ticket for that drive has expired: log in anew, as with kinit",
    errno.ESHUTDOWN: "the drive was shut down: mount it again, then run it again",
    errno.EKEYREVOKED: "your key for that drive was withdrawn: log in anew",
    errno.EKEYREJECTED: "your key for that drive is not accepted: log in anew",
}


class Parser(argparse.ArgumentParser):
    """argparse with one line in place of a usage text and an error, which refuses empty words."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse, but --out "$NOWHERE" of a shell is not the folder in which it runs."""
        words = sys.argv[1:] if args is None else args
        for before, word in itertools.pairwise([self.prog, *words]):
            if word == "" or re.fullmatch(r"--[\w-]+=", word):
                place = word.removesuffix("=") or before
                self.error(f"an empty word after {place}; is a variable of the shell unset?")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        """Print the line, under torchrun once, and leave with code 2."""
        if not speaks_for_command():
            self.exit(EXIT_REFUSED)
        # argparse writes "argument --lr: " before what `positive` says, "0: has to be positive".
        message = re.sub(r"^argument (\S+): (\S+): ", r"\1 \2: ", message)
        self.exit(EXIT_REFUSED, f"error: {one_line(message)}; see python {self.prog} --help\n")


def positive(kind: type) -> Callable[[str], float]:
    """An argparse type: a finite number above 0 of the given kind, int or float."""

    def convert(text: str) -> float:
        number = finite_number(kind, text)
        if number <= 0:
            raise argparse.ArgumentTypeError(f"{text}: has to be positive")
        return number

    return convert


def non_negative(kind: type) -> Callable[[str], float]:
    """An argparse type: a finite number of at least 0 of the given kind, int or float."""

    def convert(text: str) -> float:
        number = finite_number(kind, text)
        if number < 0:
            raise argparse.ArgumentTypeError(f"{text}: cannot be negative")
        return number

    return convert


def finite_number(kind: type, text: str) -> float:
    """`text` as a number of that kind; ArgumentTypeError where it is none, infinite or NaN."""
    try:
        number = kind(text)
    except ValueError:
        message = f"invalid {kind.__name__} value: {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    if kind is float and not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text}: has to be finite")
    return number


def run_main(main: Callable, parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Parse the command line, call `main(args)` and return the exit code (see `exit_code_of`)."""

    def parse_and_run() -> None:
        main(parser.parse_args(argv))

    reopen_closed_streams()
    return exit_code_of(parse_and_run)


def exit_code_of(function: Callable, *arguments) -> int:
    """Call `function(*arguments)` and return the exit code of the program.

    0 when it is done; 2 after one line "error: ..." for anything that a user, a disk or
    a machine can cause; 130 after Ctrl-C. Every other exception is a fault of the
    program and passes through, SystemExit too. Where nobody reads the output any more,
    as after `| head -1`, the work goes on.
    """
    try:
        with lasting_output():
            function(*arguments)
            sys.stdout.flush()  # so that a full disk raises here, not when the interpreter ends
        return EXIT_DONE
    except KeyboardInterrupt:
        print_to_stderr("\ninterrupted")
        return EXIT_INTERRUPTED
    except (*EXPLAINED, OSError, MemoryError, RuntimeError) as error:
        message = explain(error)
        if message is None:
            raise
        print_to_stderr(f"error: {message}")
        drop_unread_output()  # which flushes what is read
        model.end_with_open_group(EXIT_REFUSED)
        return EXIT_REFUSED
    finally:
        drop_unread_output()


def warn(text: str) -> None:
    """Print a warning on stderr, in one line."""
    print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)


def reopen_closed_streams() -> None:
    """Give the standard streams that a shell closed (`2>&-`) a place: /dev/null or, for
    stderr, the standard output, so that an error is seen.

    Python has None for them, which cannot be written to. And the next file that is
    opened, perhaps a checkpoint, would take the number 2, to which libraries write
    their messages.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # the lowest number that is free, so 0
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)  # for processes that are started
    if sys.stderr is None:
        sys.stderr = sys.stdout
        os.dup2(sys.stdout.fileno(), 2)


class LastingOutput:
    """stdout or stderr of a program whose work counts more than its words.

    Once nobody can read them (`| head -1` has ended, a terminal is closed), they go
    nowhere, and `note`, if there is one, to stderr. Everything else is as `stream` has
    it.
    """

    def __init__(self, stream: TextIO, note: str = ""):
        self.stream = stream
        self.note = note

    def write(self, text: str) -> int:
        """Write as print does."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush as print does."""
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Send the stream nowhere, if its reader is gone; else raise the error again."""
        is_file = stat.S_ISREG(os.fstat(self.stream.fileno()).st_mode)
        if is_file or error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        send_nowhere(self.stream)
        if self.note:
            print_to_stderr(self.note)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the `with`, no print fails because nobody reads it, or at a name of a file
    that the terminal's encoding lacks."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it
    note = ""
    if speaks_for_command():
        note = "note: the program that read the output has ended; the work goes on without it"
    stdout = LastingOutput(sys.stdout, note)
    stderr = LastingOutput(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


def send_nowhere(stream: TextIO) -> None:
    """Let what is written to a stream from now on, and what it still holds, go to /dev/null."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, stream.fileno())
    os.close(null_device)


def print_to_stderr(text: str) -> None:
    """Print a line on stderr; do nothing if stderr is closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def drop_unread_output() -> None:
    """Redirect stdout and stderr to /dev/null if they can no longer be written.

    The interpreter flushes both once more when it ends. A closed pipe (or a full disk)
    would then make it print "Exception ignored in ... BrokenPipeError" and change the
    exit code to 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            send_nowhere(stream)


def explain(error: Exception) -> str | None:
    """One line that says what is wrong and what to do, or None for a fault of the program."""
    if isinstance(error, EXPLAINED):
        return one_line(message_of(error))
    if isinstance(error, OSError):
        return explain_refusal(error)

    text = str(error)
    memory_errors = (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, memory_errors) or "DefaultCPUAllocator" in text:
        return "the memory is full; use a smaller --batch-size or --image-size"
    if "DataLoader worker (pid" in text:
        return (
            "a process that loads images died, often for want of shared memory; give it more (in "
            "a container --shm-size=8g), or use --workers 0"
        )
    if isinstance(error, dist.DistError) or "/gloo/" in text:
        # "[file of gloo:line] Connection closed by peer [address]. This is typically ..."
        reason = text.strip().splitlines()[0].split("] ", 1)[-1][:80]
        return (
            f"the group of processes broke ({reason}); look at what the others say, then give "
            "every node the same command again: it continues"
        )
    if "shared memory" in text or "</torch_" in text:
        return "the shared memory is full; use fewer --workers, or docker run --shm-size 8g"
    if "Too many open files" in text:
        return f"too many files are open; {REMEDIES[errno.EMFILE]}"
    if "can't start new thread" in text:
        return "the limit of threads is reached; use fewer --workers, or raise ulimit -u"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = text.strip().splitlines()[0][:120]
        return f"torch.compile failed ({reason}); install a C++ compiler or use --no-compile"
    return None


def explain_refusal(error: OSError) -> str | None:
    """What the system refused, where, and the remedy; None where `REMEDIES` knows none."""
    number = error.errno
    if number is None:
        # An OSError of a DataLoader worker arrives as a text with its number.
        match = re.search(r"\[Errno (\d+)\]", message_of(error))
        if match is None:
            return None
        number = int(match[1])
    if number not in REMEDIES:
        return None
    if number == errno.EINVAL and not error.filename:  # no name of a file is to blame
        return None
    reason = error.strerror or os.strerror(number)
    location = ""
    if error.filename:
        location = f" ({error.filename})"
    return one_line(f"{reason}{location}; {REMEDIES[number]}")


def message_of(error: Exception) -> str:
    """The text of an exception, also of one that was raised in a DataLoader worker.

    The latter arrives as "Caught DataError in DataLoader worker process 0." with the
    worker's traceback below it, whose last line is "data.DataError: " and the original
    text.
    """
    text = str(error)
    if not text.startswith("Caught "):
        return text
    class_name = rf"^(?:\w+\.)*{type(error).__name__}: "
    return re.split(class_name, text, flags=re.MULTILINE)[-1]


def one_line(text: str) -> str:
    """All lines of a text joined into one, in which no name of a file can move the cursor."""
    lines = [line.strip() for line in text.splitlines()]
    joined = " ".join(line for line in lines if line)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: ascii(control[0])[1:-1], joined)


class LiveLine:
    """A line on stderr that is overwritten again and again; nothing if stderr is no terminal.

    Ask `is_due` before composing the text: the line changes at most every half second.
    silent: show nothing at all, as in every process of a group but the first.
    """

    PAUSE = 0.5  # seconds

    def __init__(self, silent: bool = False):
        self.active = sys.stderr.isatty() and not silent
        self.shown_at = time.monotonic()
        self.text = ""  # what the terminal shows now

    def is_due(self) -> bool:
        """Whether it is time to show the line, the first time half a second after the start."""
        return self.active and time.monotonic() - self.shown_at >= self.PAUSE

    def show(self, text: str) -> None:
        """Write `text` over what is there, as many of its parts as the terminal is wide.

        Two spaces separate parts: half a number would be another number.
        """
        if not self.active:
            return
        # So that a character is a column: a name may have wide ones, or some that are escaped.
        text = text.encode("ascii", errors="replace").decode()
        # A full row would move the cursor to the next one, and leave this one behind.
        columns = terminal_width() - 1
        if len(text) > columns:
            whole_parts, _, _ = text[: columns + 2].rpartition("  ")
            text = whole_parts or text[:columns]
        covering = text.ljust(min(len(self.text), columns))
        print("\r" + covering, end="", file=sys.stderr, flush=True)
        self.text = text
        self.shown_at = time.monotonic()

    def clear(self) -> None:
        """Leave an empty row with the cursor at its beginning, for other output."""
        if self.text:
            self.show("")
            print("\r", end="", file=sys.stderr, flush=True)


def terminal_width() -> int:
    """The columns of the terminal that stderr goes to."""
    width = columns_of(sys.stderr)
    # shutil asks the variable COLUMNS and stdout, which may be a file, and else answers 80.
    return width or shutil.get_terminal_size().columns


def columns_of(stream: TextIO) -> int:
    """The columns of the terminal that a stream goes to; 0 where it goes elsewhere."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def print_settings(groups: dict[str, dict[str, Any]]) -> None:
    """Print `settings_table` as wide as the terminal, or 80 columns where stdout is none."""
    print(settings_table(groups, columns_of(sys.stdout) or 80), flush=True)


def settings_table(groups: dict[str, dict[str, Any]], columns: int) -> str:
    """What a command works with: of each group its values with their names, in wrapped rows.

    None, False and empty lists are left out. What is wider than a row has one of its
    own, and goes over its end.
    """
    indent = 2 + max(len(group) for group in groups)
    rows = []
    for group, values in groups.items():
        row = group.ljust(indent)
        for name, value in values.items():
            pair = setting_text(name, value)
            if not pair:
                continue
            if len(row) > indent and len(row) + len(pair) >= columns:
                rows.append(row.rstrip())
                row = " " * indent
            row += pair + "   "
        if row.strip() != group:
            rows.append(row.rstrip())
    return "\n".join(rows)


def setting_text(name: str, value: Any) -> str:
    """A setting as its flag is written, "crop-size 96 144"; empty where there is nothing to say."""
    if value is None or value is False or value == []:
        return ""
    name = name.replace("_", "-")
    if value is True:
        return f"{name} on"
    if isinstance(value, list | tuple):
        value = " ".join(str(item) for item in value)
    return f"{name} {value}"


class ImageProgress:
    """A live line inside a `with`, for a pass over images: how many are done, the rate,
    and the time left. Where stderr is no terminal but a log, a line a minute."""

    LOG_PAUSE = 60.0  # seconds between two lines of a log

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.started = time.monotonic()
        self.logged_at = self.started
        self.line = LiveLine()

    def __enter__(self) -> "ImageProgress":
        return self

    def __exit__(self, *exception) -> None:
        self.line.clear()

    def advance(self, images: int) -> None:
        """Count `images` more as done."""
        self.done += images
        if self.line.is_due():
            self.line.show(self.text())
        elif not self.line.active and time.monotonic() - self.logged_at >= self.LOG_PAUSE:
            print(self.text(), file=sys.stderr, flush=True)
            self.logged_at = time.monotonic()

    def text(self) -> str:
        """How far the pass is."""
        rate = self.done / (time.monotonic() - self.started)
        seconds_left = (self.total - self.done) / rate
        return f"{self.done}/{self.total} images  {rate:.1f} images/s  {seconds_left:.0f} s left"


# ------------------------------------------------------------------------------------- command line


class NetworkFiles(NamedTuple):
    """What the networks are read from."""

    student: Path | None  # a checkpoint
    teacher: list[str] | None  # a folder, or checkpoints
    mc_samples: int  # dropout samples of a single checkpoint; 0: an ensemble


class Settings(NamedTuple):
    """The command line; flags that were not given are taken from the checkpoint."""

    dataset: str  # name of the data set
    data: Path | None  # its folder; None: it needs none
    val_share: float | None  # of a folder without splits, the part that is the split "val"
    split: str
    image_size: tuple[int, int] | None  # (H, W) of the networks' input; None: native size
    hold_out: list[str]  # classes of the data set that the networks do not know
    ood: list[str]  # names of OOD sets, as `data.open_ood` takes them
    distillation: dict | None  # how the student was distilled, for the protocol
    inference: InferenceSettings


def find_networks(student: Path | None, teacher: list[str] | None, mc_samples: int) -> NetworkFiles:
    """The networks that the flags name or, if they name none, those in ckpts/."""
    if student is None and not teacher:
        path = Path("ckpts/student.pt")
        if path.exists():
            student = path
        if model.find_members(Path("ckpts")):
            teacher = ["ckpts"]
    return NetworkFiles(student, teacher, mc_samples)


def checkpoints_of(files: NetworkFiles) -> list[Path]:
    """The files of all networks, the student's first."""
    checkpoints = []
    if files.student is not None:
        checkpoints.append(files.student)
    if files.teacher:
        checkpoints += model.member_files(files.teacher)
    return checkpoints


def open_networks(files: NetworkFiles, device: torch.device) -> tuple[Networks, dict]:
    """The networks on the device, and the checkpoint that the defaults are taken from:
    the student's or, without one, the teacher's first. Raises UsageError where they do
    not fit."""
    student = None
    teacher = None
    checkpoint = None
    if files.teacher:
        teacher, checkpoint = model.load_ensemble(files.teacher, files.mc_samples)
    elif files.mc_samples:
        raise UsageError(
            f"--mc-samples {files.mc_samples} samples one network: name --teacher FILE"
        )
    if files.student is not None:
        teacher_checkpoint = checkpoint
        checkpoint = model.read_checkpoint(files.student)
        student = model.build_model(checkpoint, files.student)
        if not checkpoint["config"]["measures"]:
            raise UsageError(
                f"{files.student} is no student: it predicts no uncertainty; distil one, or "
                "name it as --teacher FILE with --mc-samples N"
            )
        if teacher_checkpoint is not None:
            check_comparable(files.student, checkpoint, teacher_checkpoint)
    if checkpoint is None:
        raise UsageError(
            "nothing to evaluate: no ckpts/student.pt and no ckpts/member_*.pt; "
            "train first, or name --student FILE or --teacher DIR"
        )
    config = checkpoint["config"]
    palette = [tuple(colour) for colour in config["palette"]]
    networks = Networks(student, teacher, config["measures"], config["classes"], palette)
    for network in networks.by_name().values():
        network.to(device, memory_format=torch.channels_last)
    return networks, checkpoint


def check_comparable(path: Path, student: dict, teacher: dict) -> None:
    """Raise UsageError where the checkpoints of student and teacher cannot be compared."""
    for key in ("classes", "dataset"):
        if student["config"][key] != teacher["config"][key]:
            raise UsageError(
                f"the student {path} and the teacher know different {key}; evaluate them one by one"
            )


DEFAULT_BATCH = 4  # images


def resolve(args: argparse.Namespace, checkpoint: dict, device: torch.device) -> Settings:
    """Take the flags that were not given from the checkpoint; refuse those that contradict."""
    # ---------------------------------------------------------------- flags that exclude others
    not_with_predict = {
        "--ood": args.ood is not None,
        "--benchmark": args.benchmark,
        "--save-scores": args.save_scores is not None,
    }
    for flag, given in not_with_predict.items():
        if args.predict is not None and given:
            raise UsageError(f"--predict writes maps alone; run {flag} in a command of its own")
    if args.score is not None and args.predict is None:
        raise UsageError("--score names the maps that --predict writes, which is missing")
    if args.in_distribution is not None and args.ood is None:
        raise UsageError("--in-distribution is for the images of --ood, which is missing")

    # ---------------------------------------------------------------- data
    trained = checkpoint["args"]
    config = checkpoint["config"]
    dataset = args.dataset or trained["dataset"]
    folder = args.data
    if folder is None and dataset == trained["dataset"] and trained["data"]:
        folder = Path(trained["data"])
    val_share = None
    if data.is_flat(dataset, folder, args.split) and args.split != "all":
        val_share = trained.get("val")  # so that nothing is evaluated on what was trained on

    # ---------------------------------------------------------------- OOD sets
    ood = []
    if args.ood is not None:
        ood = list(dict.fromkeys(args.ood))  # each once, in the order of the command
        if not ood:
            ood = [default_ood(dataset, config["hold_out"])]
    if "held-out" in ood and not config["hold_out"]:
        raise UsageError(
            "--ood held-out: the checkpoint has no held-out classes; "
            "train with --hold-out CLASS ..."
        )

    # ---------------------------------------------------------------- how the student was distilled
    distillation = {}
    recorded = ["head", "views", "distill_probs"]
    # The head that learns alone has epochs of its own; another is weighed against the rest.
    recorded.append("head_epochs" if trained.get("head_epochs") else "uncertainty_weight")
    for key in recorded:
        if key in trained:
            distillation[key] = trained[key]

    workers = args.workers
    if workers is None:  # on a CPU the networks need every core
        workers = 4 if device.type == "cuda" else 0
    inference = InferenceSettings(
        device,
        choose_amp(args.amp, device),
        args.batch_size or DEFAULT_BATCH,
        workers,
        fill_passes=args.batch_size is None,
    )
    return Settings(
        dataset=dataset,
        data=folder,
        val_share=val_share,
        split=args.split,
        image_size=args.image_size or trained.get("image_size"),
        hold_out=config["hold_out"],
        ood=ood,
        distillation=distillation or None,
        inference=inference,
    )


def refuse_moved_data(folder: Path | None) -> None:
    """UsageError where the folder that a checkpoint names as its data set is not there."""
    if folder is not None and not folder.is_dir():
        raise UsageError(
            f"no such folder: {folder}, with which the networks were trained; if the data set has "
            "moved, name its folder with --data DIR"
        )


def division_warnings(
    dataset: data.SegmentationDataset, folder: Path, checkpoint: dict
) -> list[str]:
    """A line where the images of a folder without splits are divided otherwise than they
    were when the network of a checkpoint was trained on that folder."""
    trained = checkpoint["config"].get("division")
    if os.path.abspath(folder) != checkpoint["args"]["data"]:
        return []
    if not trained or not dataset.division or dataset.division == trained:
        return []
    return [
        f"since the networks were trained, images of {folder} were added, removed or renamed, and "
        "other ones are for validation now: the networks may have learned from them, and figures "
        "flatter; train anew"
    ]


def training_images_warnings(
    dataset: str, folder: Path | None, split: str, trained_folder: str | None
) -> list[str]:
    """A line where --split all takes the very folder that the networks were trained on."""
    if split != "all" or trained_folder is None or not data.is_flat(dataset, folder, split):
        return []
    if folder.resolve() != Path(trained_folder).resolve():
        return []
    return [
        f"--split all takes every image of {folder}, also those that the networks were trained "
        "on, so that the figures flatter; leave it out, or name other images with --data DIR"
    ]


def default_ood(dataset: str, hold_out: list[str]) -> str:
    """The OOD set of --ood without a name: the best one that the data set offers."""
    if dataset == "synthetic":
        return "synthetic"
    return "held-out" if hold_out else "pasted"


def prediction_sentence(flag: tuple[int, int] | None, image_size: tuple[int, int] | None) -> str:
    """At which size --predict runs the network, and why; flag: --image-size, if it was given."""
    if image_size is None:
        return "network input: each image at its own size (--image-size H W for another)"
    height, width = image_size
    reason = f"--image-size {height} {width}"
    if flag is None:
        reason = f"trained at {height}x{width}, --image-size H W for another"
    return f"network input: {height} pixels high, proportions kept ({reason})"


def run_protocol(
    settings: Settings,
    files: NetworkFiles,
    networks: Networks,
    dataset: data.SegmentationDataset,
    labelled_pixels: int,
) -> dict:
    """What the results depend on, for metrics.json."""
    network_input = "native size"
    if settings.image_size:
        height, width = settings.image_size
        network_input = f"{height}x{width}"
    return {
        "dataset": settings.dataset,
        "data": None if settings.data is None else settings.data.resolve().name,
        "split": settings.split,
        "val_share": settings.val_share,
        "images": len(dataset),
        "labelled_pixels": labelled_pixels,
        "classes": len(dataset.classes),
        "held_out": ", ".join(dataset.hold_out) or None,
        "network_input": network_input,
        "evaluated_at": "native size of the labels, softmax after upsampling",
        "pooling": "all labelled pixels of the split",
        "void": "labels 255 never count",
        "scores": "rounded to float16, equal scores are one threshold",
        "members": 0 if networks.teacher is None else len(networks.teacher),
        "mc_samples": files.mc_samples,
        "teacher": " ".join(str(path) for path in files.teacher) if files.teacher else None,
        "student": str(files.student) if files.student else None,
        "distilled": settings.distillation,
        "amp": settings.inference.amp,
        "device": str(settings.inference.device),
    } | model.versions()


def shown_settings(settings: Settings, files: NetworkFiles, out: Path) -> dict[str, dict]:
    """What an evaluation works with, in groups for `print_settings`."""
    inference = settings.inference
    return {
        "data": {
            "dataset": settings.dataset,
            "data": settings.data,
            "val": settings.val_share,
            "split": settings.split,
            "hold_out": settings.hold_out,
            "image_size": settings.image_size,
            "ood": settings.ood,
        },
        "networks": {
            "student": files.student,
            "teacher": files.teacher,
            "mc_samples": files.mc_samples or None,
        },
        "machine": {
            "device": inference.device,
            "amp": inference.amp,
            "batch_size": inference.batch_size,
            "workers": inference.workers,
            "out": out,
        },
    }


def open_ood_sets(specs: list[str], dataset: data.SegmentationDataset) -> list[data.OODSet]:
    """The OOD sets that --ood names; UsageError where two of them would share a name,
    or the file of a panel."""
    ood_sets = [data.open_ood(spec, dataset) for spec in specs]
    for name, count in Counter(ood.name for ood in ood_sets).items():
        if count > 1:
            raise UsageError(f"--ood names {count} sets {name}; evaluate them one by one")
    panels = Counter()
    for ood in ood_sets:
        for image_name in ood.dataset.names[:OOD_PANELS]:
            panels[f"{ood.name.replace(' ', '_')}_{image_name}"] += 1
    for name, count in panels.items():
        if count > 1:
            raise UsageError(f"--ood: {count} sets have an image {name}; evaluate them one by one")
    return ood_sets


def subfolder(folder: Path | None, name: str) -> Path | None:
    """The folder `name` inside `folder`; None where that is None."""
    return None if folder is None else folder / name


def without_nan(value: Any) -> Any:
    """A copy of a value for JSON, which knows neither NaN nor infinity: both become
    None, also inside dictionaries and lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_results(path: Path, protocol: dict, results: dict, steps_left: list[str]) -> None:
    """Write metrics.json. Its protocol names the steps that are still to come, if there
    are any: where one of them fails, that is what the file lacks."""
    if steps_left:
        protocol = protocol | {"unfinished": ", ".join(steps_left)}
    content = without_nan({"protocol": protocol} | results)
    model.save_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- torchrun
    world = int(os.environ.get("WORLD_SIZE", 1))
    if torchrun_rank() > 0:
        return
    if world > 1:
        text = f"evaluate.py works in one process: of torchrun's {world} the others have ended"
        print(f"note: {text}", file=sys.stderr)

    # ---------------------------------------------------------------- a network for other programs
    if args.export is not None:
        refuse_beside_export(args)
        student = args.student or Path("ckpts/student.pt")
        export_network(student, args.export, args.out / "metrics.json")
        return

    # ---------------------------------------------------------------- networks and data
    device = choose_device(args.device)
    files = find_networks(args.student, args.teacher, args.mc_samples)
    if args.predict is not None and files.student is not None:
        # It alone is asked, so the teacher's members need not be read.
        files = NetworkFiles(files.student, teacher=None, mc_samples=0)
    networks, checkpoint = open_networks(files, device)
    settings = resolve(args, checkpoint, device)
    inference = settings.inference
    image_size = settings.image_size

    if args.predict is not None:
        score_names = choose_scores(args.score, networks)
        image_size = args.image_size or model.trained_size(checkpoint)
        print(prediction_sentence(args.image_size, image_size), flush=True)
        predict_files(networks, args.predict, args.out, image_size, inference, score_names)
        return

    if args.data is None:
        refuse_moved_data(settings.data)
    dataset = data.open_dataset(
        settings.dataset,
        settings.data,
        settings.split,
        image_size,
        settings.hold_out,
        settings.val_share,
    )
    if dataset.classes != networks.classes:
        raise UsageError(
            f"the networks know the classes {', '.join(networks.classes)}, "
            f"{settings.dataset} has {', '.join(dataset.classes)}; "
            "evaluate on the data set they were trained on"
        )
    warnings = data.split_warnings(dataset, settings.split, training=False)
    if settings.data is not None:
        warnings += division_warnings(dataset, settings.data, checkpoint)
    warnings += training_images_warnings(
        settings.dataset, settings.data, settings.split, checkpoint["args"]["data"]
    )
    for warning in warnings:
        warn(warning)
    ood_sets = open_ood_sets(settings.ood, dataset)
    if args.save_scores is not None and settings.split in [ood.name for ood in ood_sets]:
        raise UsageError(
            f"--save-scores: the split and the OOD set are both called {settings.split}, and would "
            "have the same folder; rename that of the OOD set, or evaluate it without --save-scores"
        )
    in_distribution_set = None
    if args.in_distribution is not None:
        in_distribution_set = data.open_images(
            "--in-distribution", args.in_distribution, image_size
        )

    json_file = args.out / "metrics.json"
    html_file = args.out / "report.html"
    panel_folder = args.out / "panels"
    panel_folder.mkdir(parents=True, exist_ok=True)
    with locked(json_file):
        # ------------------------------------------------------------ the labelled split
        print(f"{settings.dataset} {settings.split}: {len(dataset)} images", flush=True)
        for note in dataset.notes:
            print(note)
        print_settings(shown_settings(settings, files, args.out))
        split_scores = subfolder(args.save_scores, settings.split)
        with_ood = args.ood is not None
        split = evaluate_split(networks, dataset, inference, split_scores, with_ood)
        results = split.results
        results["ood"] = {}
        results["comparison"] = {}
        results["timing"] = {}
        warn_beyond_float16(settings.split, results["uncertainty"])
        labelled_pixels = results["segmentation"][networks.main_name]["n"]
        protocol = run_protocol(settings, files, networks, dataset, labelled_pixels)
        if networks.student is not None:
            protocol["student_identity"] = model.identity_of([checkpoint])
        protocol["ood"] = {}

        # metrics.json is written now and after each of these steps, which may take hours and fail.
        steps_left = [f"ood {ood.name}" for ood in ood_sets]
        if args.benchmark:
            steps_left.append("timing")
        write_results(json_file, protocol, results, steps_left)

        # ------------------------------------------------------------ anomalies
        # Images without an anomaly are the negatives of image-level detection.
        in_distribution = split.image_statistics
        if in_distribution_set is not None:
            in_distribution = collect_image_statistics(networks, in_distribution_set, inference)
        ood_comparisons = {}
        for ood in ood_sets:
            negatives = in_distribution
            if ood.name == "held-out" and in_distribution_set is None:
                negatives = {}  # this OOD set consists of the images of the split
            ood_scores = subfolder(args.save_scores, ood.name)
            measured = evaluate_ood(networks, ood, negatives, inference, ood_scores)
            results["ood"][ood.name] = measured.results
            protocol["ood"][ood.name] = measured.protocol
            ood_comparisons[ood.name] = measured.comparison
            print(f"OOD {ood.name}: {protocol_sentence(measured.protocol)}", flush=True)
            warn_beyond_float16(f"OOD {ood.name}", measured.results)
            steps_left.remove(f"ood {ood.name}")
            write_results(json_file, protocol, results, steps_left)

        # ------------------------------------------------------------ worth more than free?
        if networks.student is not None:
            results["comparison"] = {
                "draws": metrics.PairedBootstrap.DRAWS,
                "seed": metrics.PairedBootstrap.SEED,
                "errors": split.comparison,
                "ood": ood_comparisons,
            }
            write_results(json_file, protocol, results, steps_left)

        # ------------------------------------------------------------ time and memory
        if args.benchmark:
            results["timing"] = benchmark(networks, dataset[0].image, inference, args.compile)
            steps_left.remove("timing")
            write_results(json_file, protocol, results, steps_left)
        results = without_nan({"protocol": protocol} | results)
        print(results_table(results), flush=True)

        # ------------------------------------------------------------ panels
        chosen = choose_images(split.accuracy, args.panels)
        panels = draw_panels(networks, dataset, chosen, panel_folder, inference)
        for ood in ood_sets:
            count = min(args.panels, len(ood.dataset), OOD_PANELS)
            chosen = [(f"OOD {ood.name}", index) for index in range(count)]
            best_free = ood_comparisons[ood.name].get("auroc", {}).get("best_free")
            panels += draw_panels(
                networks, ood.dataset, chosen, panel_folder, inference, True, best_free
            )
        remove_old_panels(panel_folder, panels)

        # ------------------------------------------------------------ what rejecting means
        rejection_file = args.out / "reject.png"
        rejection_file.unlink(missing_ok=True)  # of an earlier run
        rejection_picture = None
        rejection = chosen_rejection(results)
        index = median_image(split.accuracy)
        if args.panels > 0 and index is not None and rejection is not None:
            caption, sheet = draw_rejection(networks, dataset, index, rejection, inference)
            sheet.save(rejection_file)
            rejection_picture = (caption, rejection_file)

        # ------------------------------------------------------------ report
        logs = training_logs(checkpoints_of(files))
        pictures = Pictures(panels, rejection_picture, logs)
        model.save_atomically(html_file, report(results, pictures))
        charts = [
            curve_chart("rejection", results["uncertainty"]),
            curve_chart("risk_coverage", results["uncertainty"]),
        ]
        model.save_atomically(args.out / "rejection.svg", chart_sheet(charts))
    print(f"\n{json_file}  {html_file}  {len(panels)} panels in {panel_folder}")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line; None is filled in by `resolve`."""
    parser = Parser(prog="evaluate.py", description=(__doc__ or "").partition("\n")[0])

    group = parser.add_argument_group("networks")
    group.add_argument(
        "--student",
        type=Path,
        metavar="FILE",
        help="(default, where no network is named: ckpts/student.pt if it is there)",
    )
    group.add_argument(
        "--teacher",
        nargs="+",
        metavar="DIR|FILE",
        help="(default, where no network is named: ckpts/member_*.pt if they are there)",
    )
    group.add_argument(
        "--mc-samples",
        type=non_negative(int),
        default=0,
        metavar="N",
        help="dropout samples of one --teacher",
    )

    group = parser.add_argument_group("data (default: as the networks were trained)")
    group.add_argument("--dataset", choices=data.DATASETS)
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder of the data set; {data.CLASS_FILE_HELP}",
    )
    group.add_argument("--split", default="val", help="(default: val)")
    group.add_argument(
        "--image-size",
        type=positive(int),
        nargs=2,
        metavar=("H", "W"),
        help="pixels of the networks' input",
    )

    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--ood",
        nargs="*",
        metavar="SPEC",
        help="anomaly detection on synthetic, held-out, pasted, a folder, or NAME:PATH with NAME "
        f"one of {', '.join(data.OOD_LAYOUTS)}; several may follow (none: what the data set "
        "offers)",
    )
    group.add_argument(
        "--in-distribution",
        type=Path,
        metavar="DIR",
        help="images that no anomaly is in, as the negatives of image-level detection (default: "
        "the evaluation split)",
    )
    group.add_argument(
        "--save-scores", type=Path, metavar="DIR", help="keep float16 maps of every score"
    )
    group.add_argument(
        "--predict",
        type=Path,
        metavar="DIR|FILE",
        help="only write maps of these images: NAME_classes.png, NAME_overlay.png and, of each "
        "score, NAME_SCORE.png (colours) and NAME_SCORE16.png (16-bit grey: value = offset + u16 "
        "/ 65535 * scale, both of them in scales.json); the network runs at the size it was "
        "trained at, or at --image-size",
    )
    group.add_argument(
        "--score",
        nargs="+",
        metavar="NAME",
        help="the scores that --predict maps, as metrics.json calls them (default: error or, where "
        "that was not learned, msp, and the std: dudes of the student, std of the teacher; of a "
        "student that did not learn it, its first measure)",
    )
    group.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="only write the student, for use without this project: FILE.pt2 for PyTorch, "
        "FILE.onnx for ONNX, which needs the packages onnx and onnxscript",
    )
    group.add_argument(
        "--benchmark",
        action="store_true",
        help="time the networks as well, at --image-size and --batch-size",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time them compiled too, which takes a minute (default: on)",
    )
    group.add_argument(
        "--panels",
        type=non_negative(int),
        default=5,
        metavar="N",
        help="images, best to worst (default: 5)",
    )
    group.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="(default: results)"
    )

    group = parser.add_argument_group("machine")
    group.add_argument(
        "--batch-size",
        type=positive(int),
        help="images per batch; changes no figure but those of MC dropout (default: "
        f"{DEFAULT_BATCH}; on a CPU more of small images)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)",
    )
    group.add_argument(
        "--workers",
        type=non_negative(int),
        help="processes that load (default: 0 on a CPU, else 4)",
    )
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="arithmetic of the networks; logits, softmax and scores are float32 (default: bf16 "
        "where the processor has it, else float32)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main, get_args_parser()))
