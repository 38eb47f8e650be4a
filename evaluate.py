"""Measure what the uncertainty is worth: segmentation, calibration, error and OOD detection, fidelity, time.

    python evaluate.py --ood                                     # -> results/metrics.json, report.html, panels/*.png
    python evaluate.py --student ckpts/student.pt --teacher ckpts/ --ood pasted --benchmark
    python evaluate.py --student ckpts/student.pt --predict photos/          # maps for one's own pictures

Everything is pooled over all labelled pixels of the split at their native size (metrics.py has the definitions);
member 0, the teacher and the student see the same pixels in the same pass.
"""

import argparse
import base64
import contextlib
import html
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import metrics
from data import (
    DATASETS, IGNORED, VOID, DataError, evaluation_loader, open_dataset, open_ood, read_image,
    to_input,
)  # fmt: skip
from model import (
    DeepLabV3, Ensemble, ModelError, build_model, load_ensemble, predictive_statistics, read_checkpoint,
    save_atomically, versions,
)  # fmt: skip


# ------------------------------------------------------------------------------ what every script shares


class UsageError(ValueError):
    """Flags, or a state of the disk or of the training, that a user can mend; the message says how."""


class Parser(argparse.ArgumentParser):
    """argparse with one line in place of a usage text and an error."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def run(main, parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """`main(args)` with the exit code and the one line that DESIGN promises: 0, 2 for what a user can mend, 130."""
    args = parser.parse_args(argv)
    try:
        main(args)
        return 0
    except (UsageError, DataError, ModelError) as error:
        # from a loader's worker the message is the last line of the worker's traceback
        message = str(error).strip().splitlines()[-1].split("Error: ")[-1]
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full; use a smaller --batch-size or --crop-size"
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror or error}{place}; free the disk or the path, then run the same command again"
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2


def choose_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used ({str(error).splitlines()[0][:80]}); try --device cpu") from None
    return device


def autocast(device: torch.device, amp: str):
    """The arithmetic of the networks: bf16, fp16 or, with "off", float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


# ------------------------------------------------------------------------------ validation


@torch.inference_mode()
def validate(network: nn.Module, loader: DataLoader, num_classes: int, device: torch.device, amp: str) -> dict:
    """miou, iou, pixel_accuracy and mean_class_accuracy of `network` over the batches of `evaluation_loader`."""
    network.eval()
    confusion = metrics.ConfusionMatrix(num_classes)
    for run in loader:
        for images, labels, _ in run:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast(device, amp):
                logits = network(images, labels.shape[-2:]).logits
            confusion.update(logits.argmax(dim=1), labels)
    return confusion.compute()


# ------------------------------------------------------------------------------ networks and their scores

PRIMARY = {"student": "dudes", "teacher": "std", "member": "entropy"}  # the uncertainty that a model is known by


class Output(NamedTuple):
    probs: Tensor  # float32 [B, C, H, W]
    scores: dict[str, Tensor]  # float32 [B, H, W] each; higher = more uncertain


class Networks(NamedTuple):
    """What is evaluated: one of the two may be missing."""

    student: DeepLabV3 | None
    measures: tuple[str, ...]  # the student's distilled uncertainties
    teacher: Ensemble | None


def free_scores(logits: Tensor, probs: Tensor) -> dict[str, Tensor]:
    """What any single network offers for nothing."""
    return {
        "entropy": metrics.predictive_entropy(probs), "msp": metrics.max_softmax(probs),
        "max_logit": metrics.max_logit(logits), "energy": metrics.energy(logits),
    }  # fmt: skip


def predict(networks: Networks, images: Tensor, size: tuple[int, int], amp: str, watch=None) -> dict[str, Output]:
    """Probabilities and scores of every model at `size` (H, W), softmax after the upsampling.

    `watch(m, logits)` sees each member's logits go by. Member 0 of an MC-dropout teacher is its first sample.
    """
    outputs = {}
    if networks.teacher is not None:
        first = []

        def stream():
            for number, logits in enumerate(networks.teacher.stream(images, size)):
                if number == 0:
                    first.append(logits)
                if watch:
                    watch(number, logits)
                yield logits

        with autocast(images.device, amp):
            mean = predictive_statistics(stream(), expected_entropy=True)
        probs = first[0].softmax(dim=1)
        outputs["member"] = Output(probs, free_scores(first[0], probs))
        outputs["teacher"] = Output(mean.probs, {
            "std": mean.std, "entropy": metrics.predictive_entropy(mean.probs),
            "mutual_information": metrics.mutual_information(mean.probs, mean.expected_entropy),
            "msp": metrics.max_softmax(mean.probs),
        })  # fmt: skip
    if networks.student is not None:
        with autocast(images.device, amp):
            logits, uncertainty = networks.student(images, size)
        probs = logits.softmax(dim=1)
        distilled = {}
        for channel, measure in enumerate(networks.measures):
            distilled["dudes" if measure == "std" else f"dudes_{measure}"] = uncertainty[:, channel]
        outputs["student"] = Output(probs, distilled | free_scores(logits, probs))
    return outputs


def sweep(networks: Networks, dataset: Dataset, args: argparse.Namespace, watch=None):
    """One pass: yields (labels [B, H, W] on the device, index list, outputs) of every batch, with a live line."""
    device = torch.device(args.device)
    loader = evaluation_loader(dataset, args.batch_size, args.workers, device)
    started, done = time.monotonic(), 0
    for run in loader:
        for images, labels, index in run:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            look = (lambda number, logits, labels=labels: watch(number, logits, labels)) if watch else None
            yield labels, index.tolist(), predict(networks, images, labels.shape[-2:], args.amp, look)
            done += len(images)
            if sys.stderr.isatty():
                rate = done / (time.monotonic() - started)
                print(f"\r{done}/{len(dataset)} images  {rate:.1f} images/s  {(len(dataset) - done) / rate:.0f} s left ",
                      end="\n" if done == len(dataset) else "", file=sys.stderr, flush=True)  # fmt: skip


# ------------------------------------------------------------------------------ the measurements


class Tracker:
    """The accumulators of one model."""

    def __init__(self, model: str, num_classes: int):
        self.primary = PRIMARY[model]
        self.confusion, self.proper = metrics.ConfusionMatrix(num_classes), metrics.ProperScores()
        self.calibration, self.classes = metrics.CalibrationError(), metrics.ClassUncertainty(num_classes)
        self.scores: dict[str, tuple[metrics.Detection, metrics.SelectivePrediction, metrics.RejectionCurve]] = {}

    def update(self, output: Output, labels: Tensor) -> Tensor:
        """Takes in a batch; returns where the prediction is right, bool [B, H, W]."""
        prediction = output.probs.argmax(dim=1)
        correct, valid = prediction == labels, labels < IGNORED
        self.confusion.update(prediction, labels)
        self.proper.update(output.probs, labels)
        self.calibration.update(output.probs, labels, prediction)
        self.classes.update(output.scores[self.primary], prediction, labels)
        for name, score in output.scores.items():
            if name not in self.scores:
                self.scores[name] = metrics.Detection(), metrics.SelectivePrediction(), metrics.RejectionCurve(self.confusion.num_classes)
            detection, selective, rejection = self.scores[name]
            detection.update(score, ~correct, valid)
            selective.update(score, correct, valid)
            rejection.update(score, prediction, labels)
        return correct

    def segmentation(self) -> dict:
        result = self.confusion.compute() | self.proper.compute() | self.calibration.compute()
        return result | {"reliability": result.pop("bins"), "munc": self.classes.compute()["munc"]}

    def uncertainty(self) -> dict[str, dict]:
        return {
            name: detection.compute() | selective.compute() | rejection.compute() | detection_curves(detection)
            for name, (detection, selective, rejection) in self.scores.items()
        }


def detection_curves(detection: metrics.Detection) -> dict:
    """ROC and precision-recall curves thinned to what a plot can show."""
    curves = detection.curves()
    fpr, tpr = (np.concatenate([[0.0], curves[key]]) for key in ("fpr", "tpr"))
    roc, pr = metrics.thin_curve(fpr, tpr), metrics.thin_curve(curves["recall"], curves["precision"])
    return {
        "roc": {"fpr": fpr[roc].tolist(), "tpr": tpr[roc].tolist()},
        "pr": {"recall": curves["recall"][pr].tolist(), "precision": curves["precision"][pr].tolist()},
    }


@torch.inference_mode()
def evaluate_split(networks: Networks, dataset, args: argparse.Namespace) -> tuple[dict, list[float]]:
    """Everything that labels can tell, in one pass: the parts of metrics.json, and each image's pixel accuracy.

    Where the data set has held-out classes and --ood asks for them, their pixels are scored as anomalies.
    """
    num_classes = len(dataset.classes)
    trackers: dict[str, Tracker] = {}
    members = [metrics.ConfusionMatrix(num_classes) for _ in range(len(networks.teacher) if networks.teacher else 0)]
    fidelity, density = metrics.Fidelity(), Density(networks)
    held_out, accuracy = OodTracker(), []

    def watch(number: int, logits: Tensor, labels: Tensor) -> None:
        members[number].update(logits.argmax(dim=1), labels)

    for labels, index, outputs in sweep(networks, dataset, args, watch):
        valid = labels < IGNORED
        for model, output in outputs.items():
            tracker = trackers.setdefault(model, Tracker(model, num_classes))
            correct = tracker.update(output, labels) & valid
            save_scores(args, dataset, args.split, model, output, index)
        accuracy += (correct.sum((1, 2)) / valid.sum((1, 2))).tolist()  # the student's, if there is one
        if "held-out" in args.ood_sets:
            held_out.update(outputs, torch.where(labels == IGNORED, 1, torch.where(valid, 0, VOID)))
        if density.wanted:
            student, teacher = outputs["student"].scores["dudes"], outputs["teacher"].scores["std"]
            fidelity.update(student, teacher, valid)
            density.update(student, teacher, valid)
    return gather(dataset, trackers, members) | {
        "fidelity": (fidelity.compute() | density.compute()) if density.wanted else {},
        "ood": {"held-out": held_out.compute()} if "held-out" in args.ood_sets else {},
    }, accuracy  # fmt: skip


def gather(dataset, trackers: dict[str, Tracker], members: list[metrics.ConfusionMatrix]) -> dict:
    """The accumulators' figures in the layout of metrics.json."""
    segmentation = {model: tracker.segmentation() for model, tracker in trackers.items()}
    classwise = {model: tracker.classes.compute()["uncertainty"] for model, tracker in trackers.items()}
    result = {"segmentation": segmentation, "uncertainty": {}}
    for model, tracker in trackers.items():
        result["uncertainty"] |= {f"{model}/{name}": v for name, v in tracker.uncertainty().items()}
    result["classes"] = [
        {"name": name, "iou": {m: segmentation[m]["iou"][c] for m in trackers},
         "uncertainty": {m: classwise[m][c] for m in trackers if m != "member"}}
        for c, name in enumerate(dataset.classes)
    ]  # fmt: skip
    if members:
        mious = [member.compute()["miou"] for member in members]
        spread = float(np.std(mious, ddof=1)) if len(mious) > 1 else math.nan
        segmentation["members"] = {"n": len(mious), "miou_mean": float(np.mean(mious)), "miou_std": spread}
    return result


class Density:
    """Counts of (student's, teacher's) uncertainty on a 64 x 64 grid over [0, largest std of M members]."""

    def __init__(self, networks: Networks):
        self.wanted = networks.teacher is not None and networks.student is not None and "std" in networks.measures
        size = len(networks.teacher) if networks.teacher else 2
        self.maximum = 0.5 * math.sqrt(size / (size - 1)) if size % 2 == 0 else 0.5 * math.sqrt((size + 1) / size)
        self.counts = 0

    def update(self, student: Tensor, teacher: Tensor, valid: Tensor) -> None:
        row, column = ((64 / self.maximum * u).long().clamp(0, 63) for u in (student, teacher))
        place = torch.where(valid, 64 * row + column, 64 * 64).flatten()
        self.counts = self.counts + torch.bincount(place, minlength=64 * 64 + 1)[:-1]

    def compute(self) -> dict:
        return {"density": self.counts.view(64, 64).tolist(), "density_max": self.maximum}


# ------------------------------------------------------------------------------ out-of-distribution sets


class OodTracker:
    """AUROC, AP and FPR95 of every score for anomalous pixels: mask 1, against 0; 255 is void."""

    def __init__(self):
        self.scores: dict[str, metrics.Detection] = {}

    def update(self, outputs: dict[str, Output], mask: Tensor) -> None:
        for model, output in outputs.items():
            for name, score in output.scores.items():
                detection = self.scores.setdefault(f"{model}/{name}", metrics.Detection())
                detection.update(score, mask == 1, mask != VOID)

    def compute(self) -> dict:
        return {key: detection.compute() | detection_curves(detection) for key, detection in self.scores.items()}


@torch.inference_mode()
def evaluate_ood(networks: Networks, name: str, dataset, args: argparse.Namespace) -> dict:
    """Pixel-wise detection of the anomalies of one OOD set by every score of every model."""
    tracker = OodTracker()
    for mask, index, outputs in sweep(networks, dataset, args):
        tracker.update(outputs, mask)
        for model, output in outputs.items():
            save_scores(args, dataset, name, model, output, index)
    result = tracker.compute()
    if result and not next(iter(result.values()))["positives"]:
        print(f"warning: the OOD set {name} has no anomalous pixel; its figures are undefined", file=sys.stderr)
    return result


def save_scores(args, dataset, name: str, model: str, output: Output, index: list[int]) -> None:
    """--save-scores: float16 [H, W] maps as DIR/<set>/<model>-<score>/<image stem>.npy."""
    if args.save_scores is None:
        return
    for score, maps in output.scores.items():
        folder = args.save_scores / name / f"{model}-{score}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, values in zip(index, maps.half().cpu().numpy(), strict=True):
            np.save(folder / f"{dataset.stem(number)}.npy", values)


# ------------------------------------------------------------------------------ timing


@torch.inference_mode()
def benchmark(networks: Networks, image: Tensor, args: argparse.Namespace) -> dict:
    """Parameters, median milliseconds, images per second and peak memory of a forward pass from uint8 pixels to class
    and uncertainty, after warm-up, the models taking turns."""
    device = torch.device(args.device)
    images = image[None].repeat(args.batch_size, 1, 1, 1).to(device)
    candidates = {}
    if networks.student is not None:
        candidates["student"] = networks.student
    if networks.teacher is not None:
        candidates |= {"member": networks.teacher.members[0], "teacher": networks.teacher}
    seconds, memory = {model: [] for model in candidates}, dict.fromkeys(candidates)
    for turn in range(13):
        for model, network in candidates.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            with autocast(device, args.amp):
                prediction = network(images)
            prediction[0].argmax(dim=1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                memory[model] = torch.cuda.max_memory_allocated(device) / 2**20
            if turn >= 3:  # the first turns warm up
                seconds[model].append(time.perf_counter() - started)
    return {
        model: {
            "parameters": sum(p.numel() for p in network.parameters()),
            "ms_per_image": 1000 * float(np.median(seconds[model])) / len(images),
            "images_per_second": len(images) / float(np.median(seconds[model])),
            "peak_memory_mb": memory[model], "batch_size": len(images), "size": list(images.shape[-2:]),
        }
        for model, network in candidates.items()
    }  # fmt: skip


# ------------------------------------------------------------------------------ panels and predictions


@torch.inference_mode()
def draw_panels(networks: Networks, dataset, chosen: list[tuple[str, int]], args, anomalies=False) -> list:
    """PNG panels of the images `chosen` as (name, index); returns (title, file). With `anomalies` the data set's
    labels are masks of an OOD set."""
    device, files = torch.device(args.device), []
    for name, index in chosen:
        image, labels, _ = dataset[index]
        labels = labels.numpy()
        outputs = predict(networks, image[None].to(device), labels.shape, args.amp)
        rows = [
            (model, outputs[model].probs[0].argmax(dim=0).cpu().numpy(), outputs[model].scores[PRIMARY[model]][0].cpu().numpy())
            for model in ("student", "teacher") if model in outputs
        ]  # fmt: skip
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(labels.shape[::-1], Image.Resampling.BILINEAR)
        truth, anomaly = (None, labels) if anomalies else (labels, None)
        sheet = panel(np.asarray(picture), truth, rows, args.palette, args.classes, anomaly)
        path = args.out / "panels" / f"{name.replace(' ', '_')}_{dataset.stem(index)}.png"
        sheet.save(path)
        files.append((f"{name}: {dataset.stem(index)}", path))
    return files


def choose_images(accuracy: list[float], count: int) -> list[tuple[str, int]]:
    """Indices from the best to the worst image by pixel accuracy, the median one among them."""
    order = [i for i in np.argsort(accuracy)[::-1] if not math.isnan(accuracy[i])]
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)) if order else []
    names = {0: "best", (len(order) - 1) // 2: "median", len(order) - 1: "worst"}
    return [(names.get(int(p), f"rank {p + 1}"), int(order[p])) for p in places]


@torch.inference_mode()
def predict_files(networks: Networks, args: argparse.Namespace) -> None:
    """--predict: for each image <stem>_classes.png (indexed), _overlay.png, _uncertainty.png (viridis) and
    _uncertainty16.png (u * 65535, 16-bit grey) in --out; what is no image is skipped and counted."""
    files = sorted(p for p in args.predict.rglob("*") if p.is_file()) if args.predict.is_dir() else [args.predict]
    if not args.predict.exists():
        raise UsageError(f"--predict {args.predict}: no such file or folder")
    args.out.mkdir(parents=True, exist_ok=True)
    model, skipped = ("student" if networks.student else "teacher"), []
    for path in files:
        try:
            image = read_image(path)
        except DataError:
            skipped.append(path.name)
            continue
        pixels = to_input(image, args.image_size)[None].to(args.device)
        output = predict(networks, pixels, (image.height, image.width), args.amp)[model]
        labels = output.probs[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        u = output.scores[PRIMARY[model]][0].clamp(0, 1).cpu().numpy()
        classes = Image.fromarray(labels).convert("P")
        classes.putpalette(np.array(args.palette, np.uint8).tobytes())
        classes.save(args.out / f"{path.stem}_classes.png")
        Image.blend(image, Image.fromarray(colourise(labels, args.palette)), 0.5).save(args.out / f"{path.stem}_overlay.png")
        Image.fromarray(viridis(u / max(u.max(), 1e-6))).save(args.out / f"{path.stem}_uncertainty.png")
        Image.fromarray((u * 65535).round().astype(np.uint16)).save(args.out / f"{path.stem}_uncertainty16.png")
    print(f"{len(files) - len(skipped)} images in {args.out}" + (f"; {len(skipped)} skipped, not images: {', '.join(skipped[:5])}" if skipped else ""))


# ---------------------------------------------------------------------------------------------
# Pictures: colour maps and the paper's five columns
# ---------------------------------------------------------------------------------------------

# Viridis at 26 evenly spaced values; linear in between it is within 2/255 of the full table.
VIRIDIS = np.frombuffer(bytes.fromhex(
    "440154470f62481d6f472b7a4437814043873c4e8a37598c31648d2d6e8e29788e26818e228a8d"
    "1f958b1e9e8822a7842bb17d39b9764dc26b62ca5f79d15192d741addc30cae01ee4e318fde724"
), np.uint8).reshape(26, 3)
VIRIDIS_256 = np.stack([np.interp(np.linspace(0, 25, 256), np.arange(26), channel)
                        for channel in VIRIDIS.T], axis=1).round().astype(np.uint8)
PANEL_CELL = 360  # pixels: the side that one picture of a panel is scaled towards
OUTLINE, GREY = (213, 94, 0), (60, 60, 60)


def viridis(values) -> np.ndarray:
    """Colours of values in [0, 1] (clipped; NaN is 0) as uint8 `[..., 3]`."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0)
    return VIRIDIS_256[(values.clip(0, 1) * 255).round().astype(np.uint8)]


def colourise(labels, palette) -> np.ndarray:
    """Class ids `[H, W]` as uint8 RGB `[H, W, 3]`; void and padding are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table[np.asarray(labels, dtype=np.uint8)]


def panel(image, truth, rows, palette, names, anomaly=None, maximum=None) -> Image.Image:
    """The paper's five columns: image, ground truth, prediction, accuracy map, uncertainty.

    image: uint8 `[H, W, 3]`. truth: class ids `[H, W]` (254 and 255 are void), or None.
    rows: one `(model name, prediction [H, W], uncertainty [H, W])` a network, drawn below each
    other. anomaly: `[H, W]` with 0 normal, 1 anomaly, 255 void for an OOD image: its outline over
    the image takes the place of the ground truth. maximum: the uncertainty at the upper end of the
    colour bar; without it the largest of these rows. White in the accuracy map is wrong or void.
    """
    photo = Image.fromarray(np.asarray(image)).convert("RGB")
    scale = PANEL_CELL / max(photo.size)
    scale = max(1, round(scale)) if scale > 0.75 else scale  # whole factors keep pixels square
    size = tuple(max(1, round(side * scale)) for side in photo.size)
    photo, margin, pitch = photo.resize(size, Image.BILINEAR), 16, max(size[0], 200) + 10
    letter = pitch // 18  # font size: still readable when the sheet is shrunk to a page's width
    header = 2 * letter - 6
    drop = size[1] + header + 10
    foot = margin + drop * len(rows) + 4
    top = maximum or max([1e-6] + [float(np.nanmax(row[2])) for row in rows])
    legend = _legend([truth, *(row[1] for row in rows)], palette, names, (2 * pitch - 30, letter))
    place = (margin, margin + drop + header - 2)  # below the photo, where a second row leaves room
    bottom = max(foot + 4 * letter, place[1] + legend.height) + margin - 4
    sheet = Image.new("RGB", (2 * margin + 5 * pitch - 10, bottom), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(letter)

    def put(row, column, title, pixels, method=Image.NEAREST):
        x, y = margin + column * pitch, margin + row * drop + header
        draw.text((x, y - header), title, fill=GREY, font=font)
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        sheet.paste(picture.resize(size, method), (x, y))
        draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=(200, 200, 200))

    put(0, 0, "image", photo)
    if anomaly is not None:
        put(0, 1, "anomaly, outlined", _outlined(photo, np.asarray(anomaly) == 1))
    elif truth is not None:
        put(0, 1, "ground truth", colourise(truth, palette))
    for i, (name, prediction, uncertainty) in enumerate(rows):
        title, white = _accuracy_map(np.asarray(prediction), truth, anomaly)
        put(i, 2, f"{name}: prediction", colourise(prediction, palette))
        put(i, 3, title, np.where(white, 255, 0).astype(np.uint8))
        put(i, 4, f"{name}: uncertainty", viridis(np.asarray(uncertainty) / top),
            Image.BILINEAR if scale < 1 else Image.NEAREST)
    sheet.paste(legend, place)
    sheet.paste(_colour_bar(top, pitch - 10, letter), (margin + 4 * pitch, foot))
    return sheet


def _accuracy_map(prediction, truth, anomaly):
    """Column title and bool `[H, W]`: wrong or void, and on an OOD image anomalous or void."""
    white, title = np.zeros(prediction.shape, bool), ""
    if truth is not None:
        truth = np.asarray(truth)
        valid = truth < 254
        wrong = valid & (prediction != truth)
        white = wrong | ~valid
        title = f"white: void or wrong ({100 * wrong.sum() / max(1, valid.sum()):.1f} %)"
    if anomaly is not None:
        white, title = white | (np.asarray(anomaly) != 0), "white: anomaly, wrong or void"
    return title, white


def _outlined(photo: Image.Image, mask) -> Image.Image:
    """The photo with the mask's outline drawn around it, white outside so that it shows on any."""
    inner = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize(photo.size)
    result = photo.copy()
    for width, colour in ((9, (255, 255, 255)), (7, OUTLINE)):
        result.paste(colour, mask=inner.filter(ImageFilter.MaxFilter(width)))
    result.paste(photo, mask=inner)
    return result


def _legend(maps, palette, names, measures) -> Image.Image:
    """Colour and name of every class in the label maps; measures: line width and font size."""
    width, letter = measures
    line, font = round(1.6 * letter), ImageFont.load_default(letter)
    seen = sorted({int(c) for m in maps if m is not None for c in np.unique(m)})
    entries = [(tuple(int(v) for v in palette[c]), names[c]) for c in seen if c < len(names)]
    entries += [((0, 0, 0), "void")] if seen and seen[-1] >= 254 else []
    block, x, y = Image.new("RGB", (width, line * max(1, len(entries))), "white"), 0, 0
    draw = ImageDraw.Draw(block)
    for colour, name in entries:
        length = line + font.getlength(name)
        x, y = (0, y + line) if x and x + length > width else (x, y)
        draw.rectangle((x, y + 3, x + letter, y + letter + 3), fill=colour)
        draw.text((x + line, y + 1), name, fill=GREY, font=font)
        x += length + letter
    return block.crop((0, 0, width, y + line))


def _colour_bar(top: float, width: int, letter: int) -> Image.Image:
    """Viridis from 0 to `top` with its unit."""
    block, font = Image.new("RGB", (width, 4 * letter), "white"), ImageFont.load_default(letter)
    ramp = viridis(np.tile(np.linspace(0, 1, width), (letter, 1)))
    block.paste(Image.fromarray(ramp), (0, 2))
    draw = ImageDraw.Draw(block)
    for x, line, text, anchor in ((0, 1.3, "0", "la"), (width, 1.3, f"{top:.3g}", "ra"),
                                  (width / 2, 2.5, "std of predicted class's prob.", "ma")):
        draw.text((x, line * letter), text, fill=GREY, font=font, anchor=anchor)
    return block


# ---------------------------------------------------------------------------------------------
# Charts: inline SVG. Colours are CSS variables, so that one drawing serves light, dark and print;
# the fallback values make the same text a valid file of its own.
# ---------------------------------------------------------------------------------------------

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a")  # Okabe-Ito
DASHES = ("", "6 3", "1.5 3", "9 3 2 3")
CHART_WIDTH, PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 440, 44, 428, 52, 262


def _known(value) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at most low to at least high."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _text(x, y, text, anchor="start", style="fill:var(--quiet,#777)") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">'
            f"{html.escape(str(text))}</text>")


def _axes(title, xticks, yticks, labels):
    """Grid, ticks and titles as SVG parts, and the two functions from data to picture."""
    def px(x):
        return PLOT_LEFT + (x - xticks[0]) / (xticks[-1] - xticks[0]) * (PLOT_RIGHT - PLOT_LEFT)

    def py(y):
        return PLOT_BOTTOM - (y - yticks[0]) / (yticks[-1] - yticks[0]) * (PLOT_BOTTOM - PLOT_TOP)

    parts = [_text(0, 14, title, style="fill:var(--ink,#555);font-weight:600;font-size:13px"),
             _text(0, 36, labels[1])]
    for y in yticks:
        stroke = "var(--axis,#999)" if y == yticks[0] else "var(--grid,#bbb6)"
        parts.append(f'<path d="M{PLOT_LEFT} {py(y):.1f}H{PLOT_RIGHT}" style="stroke:{stroke}"/>')
        parts.append(_text(PLOT_LEFT - 7, py(y) + 4, f"{y:g}", "end"))
    parts += [_text(px(x), PLOT_BOTTOM + 16, f"{x:g}", "middle") for x in xticks]
    parts.append(_text(PLOT_RIGHT, PLOT_BOTTOM + 33, labels[0], "end"))
    return parts, px, py


def _svg(title, note, height, parts) -> str:
    return ('<svg xmlns="http://www.w3.org/2000/svg" role="img" fill="none" '
            f'viewBox="0 0 {CHART_WIDTH} {height}" style="font:11px system-ui,sans-serif">'
            f"<title>{html.escape(title)}</title><desc>{html.escape(note)}</desc>"
            f"{''.join(parts)}</svg>")


def line_chart(title, series, xlabel, ylabel, note="", limits=None, diagonal=False) -> str:
    """Curves as an SVG string.

    series: `(label, xs, ys)` or `(label, xs, ys, colour index, dash index)`; None and NaN break the
    line; up to 20 points are marked. limits: `(x0, x1, y0, y1)`, None where the data decide.
    diagonal: draw y = x. note: what good looks like, for screen readers.
    """
    spans = list(limits or (None,) * 4)
    for axis in (0, 1):
        seen = [v for item in series for v in item[1 + axis] if _known(v)]
        for end, pick in ((0, min), (1, max)):
            if spans[2 * axis + end] is None:
                spans[2 * axis + end] = pick(seen, default=float(end))
    parts, px, py = _axes(title, _ticks(*spans[:2]), _ticks(*spans[2:]), (xlabel, ylabel))
    if diagonal:
        low, high = max(spans[0], spans[2]), min(spans[1], spans[3])
        parts.append(f'<path d="M{px(low):.1f} {py(low):.1f}L{px(high):.1f} {py(high):.1f}" '
                     'style="stroke:var(--axis,#999);stroke-dasharray:2 4"/>')
    for i, (label, xs, ys, *style) in enumerate(series):
        colour, dash = style or (i % len(COLOURS), i // len(COLOURS) % len(DASHES))
        paint = f"var(--c{colour},{COLOURS[colour]})"
        line = f'style="stroke:{paint};stroke-width:2;stroke-dasharray:{DASHES[dash] or "none"}"'
        points = [(px(x), py(y)) if _known(x) and _known(y) else None
                  for x, y in zip(xs, ys, strict=True)]
        path = "".join(f"{'L' if before else 'M'}{point[0]:.1f} {point[1]:.1f}"
                       for before, point in zip([None, *points], points, strict=False) if point)
        parts.append(f'<path d="{path}" stroke-linejoin="round" {line}/>')
        if len(points) <= 20:
            parts += [f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.6" style="fill:{paint}"/>'
                      for p in points if p]
        x, y = (i % 2) * CHART_WIDTH / 2, PLOT_BOTTOM + 58 + 18 * (i // 2)
        parts.append(f'<path d="M{x} {y - 4}h22" {line}/>')
        parts.append(_text(x + 28, y, label, style="fill:var(--ink,#555)"))
    return _svg(title, note, PLOT_BOTTOM + 66 + 18 * ((len(series) - 1) // 2), parts)


def density_chart(title, counts, maximum, xlabel, ylabel, note="") -> str:
    """A 2D histogram as an SVG string, colours by the logarithm of the count.

    counts: `[N][N]`, `counts[y][x]` over [0, maximum] on both axes, the smallest values first.
    """
    counts = np.asarray(counts, dtype=np.float64)
    shade = viridis(np.log1p(counts) / max(np.log1p(counts.max()), 1e-9))
    pixels = np.dstack([shade, np.where(counts > 0, 255, 0).astype(np.uint8)])[::-1]
    ticks = _ticks(0, maximum)
    parts, px, py = _axes(title, ticks, ticks, (xlabel, ylabel))
    x, y, right, bottom = px(0), py(maximum), px(maximum), py(0)
    parts.append(f'<image x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" '
                 f'height="{bottom - y:.1f}" preserveAspectRatio="none" '
                 'style="image-rendering:pixelated" '
                 f'href="{_data_uri(Image.fromarray(np.ascontiguousarray(pixels)))}"/>')
    parts.append(f'<path d="M{x:.1f} {bottom:.1f}L{right:.1f} {y:.1f}" '
                 'style="stroke:var(--ink,#555);stroke-dasharray:2 4"/>')
    parts.append(_text(PLOT_LEFT, PLOT_BOTTOM + 56, "pixels in a cell, logarithmic: dark 1, "
                       f"bright {int(counts.max()):,}"))
    return _svg(title, note, PLOT_BOTTOM + 64, parts)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------------------------
# Tables and the report
# ---------------------------------------------------------------------------------------------

COLUMNS = {  # key in metrics.json: heading, factor, digits, +1 more is better, -1 less, 0 neither
    "miou": ("mIoU %", 100, 2, 1), "pixel_accuracy": ("pixel acc. %", 100, 2, 1),
    "nll": ("NLL", 1, 4, -1), "brier": ("Brier", 1, 4, -1), "ece": ("ECE %", 100, 2, -1),
    "auroc": ("AUROC %", 100, 2, 1), "ap": ("AP %", 100, 2, 1), "fpr95": ("FPR95 %", 100, 2, -1),
    "aurc": ("AURC", 1, 4, -1), "ause": ("AUSE", 1, 4, -1),
    "rmse": ("RMSE", 1, 4, -1), "rmsle": ("RMSLE", 1, 4, -1), "pearson": ("Pearson", 1, 3, 1),
    "spearman": ("Spearman", 1, 3, 1), "class_error": ("class error", 1, 4, -1),
    "parameters": ("parameters, M", 1e-6, 2, 0), "ms_per_image": ("ms / image", 1, 1, -1),
    "images_per_second": ("images / s", 1, 2, 1), "peak_memory_mb": ("memory, MB", 1, 0, -1)}
MODELS = ("student", "teacher", "member")  # the place is the model's colour, the same in all charts
SCORES = ("dudes", "std", "entropy", "mutual_information", "msp", "max_logit", "energy")
DRAWN = {"dudes": 0, "std": 0, "entropy": 1}  # the scores in the charts and their dashes


def _get(tree, *keys):
    """The part of nested dicts at `keys`; None where one is missing or the number is NaN."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _ordered(scores) -> list[tuple[str, str, dict]]:
    """(model, score, numbers) of `{"model/score": numbers}`, the unknown last."""
    order = [f"{model}/{score}" for model in MODELS for score in SCORES]
    keys = [key for key in scores or {} if "/" in key]
    keys.sort(key=lambda k: order.index(k) if k in order else len(order))
    return [(*key.partition("/")[::2], scores[key]) for key in keys]


def _label(model: str, score: str) -> str:
    return f"{model} {score}".replace("_", " ")


def _tables(metrics):
    """The results as (title, keys of its columns, rows of (label, numbers))."""
    rows = [(m, _get(metrics, "segmentation", m)) for m in MODELS]
    members = _get(metrics, "segmentation", "members") or {}
    rows.append((f"mean of {members.get('n')} members", members))
    yield "Segmentation", ("miou", "pixel_accuracy", "nll", "brier", "ece"), rows
    sets = {"Finding errors": _get(metrics, "uncertainty")}
    sets.update({f"Anomalies: {n}": scores for n, scores in (_get(metrics, "ood") or {}).items()})
    for title, scores in sets.items():
        keys = ("auroc", "ap", "fpr95", "aurc", "ause")[:5 if title == "Finding errors" else 3]
        yield title, keys, [(_label(m, s), numbers) for m, s, numbers in _ordered(scores)]
    yield ("Fidelity", ("rmse", "rmsle", "pearson", "spearman", "class_error"),
           [("student to teacher", _get(metrics, "fidelity"))])
    yield ("Cost", ("parameters", "ms_per_image", "images_per_second", "peak_memory_mb"),
           [(m, _get(metrics, "timing", m)) for m in MODELS])


def _cell(numbers, key: str, plus_minus: str, none: str) -> str:
    """A number as text; where there are `key_mean` and `key_std`, those."""
    _, factor, digits, _ = COLUMNS[key]
    parts = [_get(numbers, name) for name in (key, f"{key}_mean", f"{key}_std")]
    parts = [f"{v * factor:,.{digits}f}" for v in parts if v is not None]
    return f" {plus_minus} ".join(parts) or none


def results_table(metrics: dict) -> str:
    """The results as aligned plain text, at most 100 columns wide; `-` is undefined."""
    blocks = []
    for title, keys, rows in _tables(metrics):
        lines = [[label, *(_cell(numbers, key, "+-", "-") for key in keys)]
                 for label, numbers in rows if numbers]
        lines = [[title, *(COLUMNS[key][0] for key in keys)], *lines] if lines else []
        blocks.append("\n".join(f"{line[0][:30]:<30}" + "".join(f"{c:>14}" for c in line[1:])
                                for line in lines))
    return "\n\n".join(block for block in blocks if block)


def _html_table(head, rows, box="scroll") -> str:
    """A table that scrolls inside its own box; head and cells are HTML already."""
    body = "".join(f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:])
                   + "</tr>" for row in rows)
    head = "".join(f"<th>{cell}</th>" for cell in head)
    return (f'<div class="{box}"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>") if rows else ""


def _results(title, keys, rows) -> str:
    """A results table: an arrow to the better side, the best of several in bold."""
    cells = [[html.escape(label)] + [_cell(numbers, key, "±", "–") for key in keys]
             for label, numbers in rows if numbers]
    for column, key in enumerate(keys, 1):
        values = [_get(numbers, key) for _, numbers in rows if numbers]
        known = [v * COLUMNS[key][3] for v in values if v is not None]
        for row, value in zip(cells, values, strict=True):
            if COLUMNS[key][3] and len(known) > 1 and value == max(known) * COLUMNS[key][3]:
                row[column] = f"<b>{row[column]}</b>"
    head = [COLUMNS[key][0] + ("", " ↑", " ↓")[COLUMNS[key][3]] for key in keys]
    return _html_table([html.escape(title)] + [h.replace(" ", "&nbsp;") for h in head], cells)


def _figure(title, series, labels, note, limits=(0, 100, 0, 100), diagonal=False) -> str:
    """A chart with its caption; nothing where there is no curve."""
    chart = line_chart(title, series, *labels, note, limits, diagonal) if series else ""
    return chart and f"<figure>{chart}<figcaption>{html.escape(note)}</figcaption></figure>"


def _series(scores, curve, names, number) -> list:
    """The curve of every score that is drawn, in percent, labelled with its number."""
    series = []
    for model, score, values in _ordered(scores):
        points = _get(values, curve)
        if points and model in MODELS and score in DRAWN:
            xs, ys = (_percent(points[name]) for name in names)
            label = f"{_label(model, score)}  {_cell(values, number, '', '')}"
            series.append((label, xs, ys, MODELS.index(model), DRAWN[score]))
    return series


def _percent(values) -> list:
    return [None if v is None else 100 * v for v in values]


def _detection(scores, what) -> str:
    """ROC and precision-recall curves."""
    return _figure(
        "ROC, with AUROC in %", _series(scores, "roc", ("fpr", "tpr"), "auroc"),
        ("false alarms: share of other pixels, %", f"found: share of {what} pixels, %"),
        "Good: up the left edge at once. The diagonal is guessing.", diagonal=True) + _figure(
        "Precision and recall, with AP in %", _series(scores, "pr", ("recall", "precision"), "ap"),
        (f"recall: share of {what} pixels found, %", "precision: right among the alarms, %"),
        f"Good: towards the top right. Guessing is level at the share of {what} pixels.")


def _rejection(metrics) -> str:
    """The paper's curve and its numbers."""
    series, rows = [], []
    for model, score, values in _ordered(_get(metrics, "uncertainty")):
        if model in MODELS and score in DRAWN and _get(values, "rejection"):
            ys, label = _percent(values["rejection"]), _label(model, score)
            classes = _get(values, "rejection_classes") or [None] * len(ys)
            series.append((label, list(range(0, 100, 10)), ys, MODELS.index(model), DRAWN[score]))
            rows.append([html.escape(label)] + [
                (f"{y:.1f}" if _known(y) else "–") + (f" <i>{n}</i>" if n is not None else "")
                for y, n in zip(ys, classes, strict=True)])
    chart = _figure(
        "mIoU without the most uncertain pixels", series,
        ("most uncertain pixels ignored, %", "mIoU, %"),
        "Good: rises at once and steeply. Every curve starts at its network’s mIoU. Far right, "
        "few classes are left and the mean is over those alone.", (0, 90, None, 100))
    head = ["mIoU % <i>classes left</i>"] + [f"{x}&nbsp;%" for x in range(0, 100, 10)]
    return chart + _html_table(head, rows)


def _classes(metrics) -> str:
    """IoU and mean uncertainty of every class, as numbers over bars."""
    rows = _get(metrics, "classes") or []
    columns = [(kind, m) for kind in ("iou", "uncertainty") for m in MODELS
               if any(_get(row, kind, m) is not None for row in rows)]
    top = max([_get(row, "uncertainty", m) or 0 for row in rows for m in MODELS], default=0) or 1
    body = []
    for row in rows:
        cells = [html.escape(str(row.get("name")))]
        for kind, model in columns:
            value, most = _get(row, kind, model), {"iou": 1, "uncertainty": top}[kind]
            text = "–" if value is None else (f"{100 * value:.1f}", f"{value:.4f}")[most != 1]
            cells.append(f'<div class="bar" style="--w:{100 * (value or 0) / most:.1f}%;'
                         f'--c:var(--c{MODELS.index(model)})">{text}</div>')
        body.append(cells)
    names = {"iou": "IoU&nbsp;%", "uncertainty": "uncertainty"}
    return _html_table(["class"] + [f"{names[kind]}<br>{m}" for kind, m in columns], body)


def _headline(metrics) -> str:
    """The outcome in one sentence, whichever way it went."""
    def auroc(model, score):
        return _get(metrics, "uncertainty", f"{model}/{score}", "auroc")

    model = next((m for m in MODELS if _get(metrics, "segmentation", m)), None)
    if model is None:
        return "Nothing was evaluated."
    miou = {m: _get(metrics, "segmentation", m, "miou") for m in MODELS}
    miou = {m: f"{100 * v:.1f} %" for m, v in miou.items() if v is not None}
    text = "In a single forward pass the student" if model == "student" else f"The {model}"
    text += f" reaches {miou.pop(model, '–')} mIoU"
    text += f" ({', '.join(f'{m} {v}' for m, v in miou.items())})" if miou else ""
    own = auroc(model, {"student": "dudes", "teacher": "std", "member": "entropy"}[model])
    if own is not None:
        text += f" and ranks its own errors with an AUROC of {100 * own:.1f} %"
        rivals = {"the teacher’s std": auroc("teacher", "std") if model == "student" else None,
                  "its own entropy": auroc(model, "entropy") if model != "member" else None}
        gaps = {k: round(100 * (own - v), 1) for k, v in rivals.items() if v is not None}
        text += ": " * bool(gaps) + " and ".join(
            f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'} {name}" if gap else
            f"level with {name}" for name, gap in gaps.items())
    cost = [_get(metrics, "timing", m, "ms_per_image") for m in ("student", "teacher")]
    if model == "student" and all(cost):
        text += f", in {100 * cost[0] / cost[1]:.0f} % of the teacher’s time"
    text += "." if model == "student" else "; this run has no student."
    return text.replace(" %", "\u00a0%")  # a number and its unit stay on one line


STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2126;--quiet:#646c76;--grid:#e6e8eb;
--axis:#9aa1a9;--c0:#0072b2;--c1:#d55e00;--c2:#009e73}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e4e7ea;--quiet:#9ba3ac;
--grid:#2a2f35;--axis:#606871;--c0:#56b4e9;--c1:#f0803c;--c2:#2dc39a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:40px 20px 64px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:15px;font-weight:600;color:var(--quiet);margin:0 0 8px}
h2{font-size:18px;margin:48px 0 4px}p{margin:0 0 14px;color:var(--quiet);max-width:46em}
.lead{color:inherit;font-size:clamp(18px,3.4vw,22px);line-height:1.4;margin:0;text-wrap:pretty}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
gap:28px 40px;margin:18px 0}
figure{margin:0;max-width:520px;break-inside:avoid}svg,img{width:100%;height:auto;display:block}
figcaption,td i,th i{font-size:13px;color:var(--quiet)}
.scroll{overflow-x:auto;margin:10px 0 22px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:5px 0 5px 20px;text-align:right;border-bottom:1px solid var(--grid)}
th,.scroll td{white-space:nowrap;font-weight:400}
th:first-child{text-align:left;padding-left:0}
thead th{color:var(--quiet);border-color:var(--axis);vertical-align:bottom}
thead th:first-child{color:var(--ink);font-weight:600}i{font-style:normal;font-weight:400}
td i,th i{font-size:11px}.protocol *{text-align:left}.protocol td{overflow-wrap:anywhere}
.bar{min-width:72px;padding-bottom:4px;background:linear-gradient(var(--c),var(--c)) no-repeat
0 100%/var(--w) 3px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.panel{max-width:none}.panel img{min-width:820px}
@media print{body,table,figcaption{max-width:none;padding:0;font-size:11px}.panel img{min-width:0}
.scroll{overflow:visible}th,td{padding:3px 0 3px 10px}h2,p{break-after:avoid}
tr{break-inside:avoid}.pair{grid-template-columns:1fr 1fr;gap:14px 24px}}
"""


def _calibration(metrics) -> str:
    """Reliability diagrams and risk-coverage curves."""
    bins = [(m, _get(metrics, "segmentation", m, "reliability")) for m in MODELS]
    bins = [(f"{m}  {_cell(metrics['segmentation'][m], 'ece', '', '')}", _percent(b["confidence"]),
             _percent(b["accuracy"]), MODELS.index(m), 0) for m, b in bins if b]
    return _figure(
        "Reliability, with ECE in %", bins, ("confidence: largest probability, %", "accuracy, %"),
        "Good: on the diagonal. Below it the network is overconfident, above it too cautious.",
        diagonal=True) + _figure(
        "Risk and coverage, with AURC",
        _series(_get(metrics, "uncertainty"), "risk_coverage", ("coverage", "risk"), "aurc"),
        ("coverage: most certain pixels kept, %", "risk: wrong among the kept, %"),
        "Good: along the bottom for as long as possible. All end at the network’s error rate.",
        (0, 100, 0, None))


def _density(fidelity) -> str:
    if not _get(fidelity, "density"):
        return ""
    note = "Good: a narrow ridge along the diagonal. Below it the student is too sure of itself."
    chart = density_chart("Uncertainty of student and teacher, per pixel", fidelity["density"],
                          _get(fidelity, "density_max") or 0.53, "teacher: std over its members",
                          "student: predicted std", note)
    return f"<figure>{chart}<figcaption>{note}</figcaption></figure>"


def _sections(metrics, panels) -> list[tuple[str, str, str]]:
    """The report as (heading, a line on how to read it, HTML); what is missing has empty HTML."""
    tables = {title: _results(title, keys, rows) for title, keys, rows in _tables(metrics)}
    anomalies = [(f"Anomalies: {name}", "Positive is a pixel of an object never trained on.",
                  tables[f"Anomalies: {name}"] + _pair(_detection(scores, "anomalous")))
                 for name, scores in (_get(metrics, "ood") or {}).items()]
    pictures = "".join(
        f'<figure class="panel"><figcaption>{html.escape(title)}</figcaption><div class="scroll">'
        f'<img alt="{html.escape(title)}" src="{_data_uri(Image.open(file))}"></div></figure>'
        for title, file in panels)
    protocol = [[html.escape("–" if v is None else str(v)) for v in item]
                for item in (_get(metrics, "protocol") or {}).items()]
    return [
        ("Results", "The arrow points to the better side; the best of each column is bold.",
         tables["Segmentation"] + tables["Finding errors"]),
        ("Rejection", "The paper’s question: is the network better where it is sure?",
         _rejection(metrics)),
        ("Calibration and selective prediction", "", _pair(_calibration(metrics))),
        ("Finding errors", "Positive is a wrong pixel; each network is asked for its own errors.",
         _pair(_detection(_get(metrics, "uncertainty"), "wrong"))),
        *anomalies,
        ("Classes", "Mean uncertainty is over the pixels that a network predicts as the class.",
         _classes(metrics)),
        ("Fidelity", "How closely the student’s uncertainty follows its teacher’s, pixel by pixel.",
         tables["Fidelity"] + _pair(_density(_get(metrics, "fidelity")))),
        ("Cost", "One image, from pixels to class and uncertainty.", tables["Cost"]),
        ("Images", "White in the accuracy map is wrong or void. Good: bright where it is white.",
         pictures),
        ("Protocol", "", _html_table(["setting", "value"], protocol, "protocol"))]


def _pair(charts: str) -> str:
    return charts and f'<div class="pair">{charts}</div>'


def write_report(metrics: dict, panels, path) -> None:
    """Write the report: one HTML file that needs nothing else, no script, no network.

    metrics: the content of metrics.json; whatever is missing there is left out here.
    panels: `(title, file of a picture)`, in the order to show them.
    """
    data = _get(metrics, "protocol", "dataset")
    title = html.escape(f"Uncertainty report: {data}" if data else "Uncertainty report")
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>"
                   + (f"<p>{html.escape(line)}</p>" if line else "") + content + "</section>"
                   for heading, line, content in _sections(metrics, panels) if content)
    Path(path).write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f'<p class="lead">{html.escape(_headline(metrics))}</p>{body}</body></html>\n',
        encoding="utf-8")


# ------------------------------------------------------------------------------ command line


def open_networks(args: argparse.Namespace) -> tuple[Networks, dict]:
    """Student and teacher as far as they are there, and a checkpoint to take the defaults from."""
    student, teacher, checkpoint, measures = None, None, None, ()
    if args.teacher or member_files_exist(Path("ckpts")):
        teacher, checkpoint = load_ensemble(args.teacher or ["ckpts"], args.mc_samples)
    elif args.mc_samples:
        raise UsageError(f"--mc-samples {args.mc_samples} samples a checkpoint: name it with --teacher FILE")
    path = args.student or Path("ckpts/student.pt")
    if args.student or path.exists():
        other, checkpoint = checkpoint, read_checkpoint(path)
        student, measures = build_model(checkpoint, path), tuple(checkpoint["config"]["measures"])
        if other and other["config"]["classes"] != checkpoint["config"]["classes"]:
            raise UsageError(f"the student {path} and the teacher know different classes; evaluate them one by one")
    if checkpoint is None:
        raise UsageError("nothing to evaluate: no ckpts/student.pt and no ckpts/member_*.pt; train first, or name "
                         "--student FILE or --teacher DIR")  # fmt: skip
    for network in (student, teacher):
        if network is not None:
            network.to(args.device, memory_format=torch.channels_last)
    return Networks(student, measures, teacher), checkpoint


def member_files_exist(folder: Path) -> bool:
    return any(folder.glob("member_[0-9]*.pt"))


def resolve(args: argparse.Namespace, checkpoint: dict) -> None:
    """What the command leaves open is as the checkpoint was trained."""
    trained, config = checkpoint["args"], checkpoint["config"]
    if args.dataset is None or args.dataset == trained["dataset"]:
        args.data = args.data or (Path(trained["data"]) if trained["data"] else None)
    args.dataset = args.dataset or trained["dataset"]
    args.image_size = args.image_size or config["image_size"]
    args.classes, args.palette = config["classes"], [tuple(colour) for colour in config["palette"]]
    if args.amp == "auto":
        args.amp = "bf16" if args.device.startswith("cuda") and torch.cuda.is_bf16_supported() else "off"
    if args.workers is None:
        args.workers = 4 if args.device.startswith("cuda") else 0
    if args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size}: has to be positive")
    own = "synthetic" if args.dataset == "synthetic" else "held-out" if config["hold_out"] else "pasted"
    args.ood_sets = [] if args.ood is None else list(dict.fromkeys(args.ood or [own]))
    if "held-out" in args.ood_sets and not config["hold_out"]:
        raise UsageError("--ood held-out: the checkpoint has no held-out classes; train with --hold-out CLASS ...")


def protocol(args: argparse.Namespace, dataset, networks: Networks, results: dict) -> dict:
    """What the figures depend on."""
    n = next(iter(results["segmentation"].values()))["n"]
    return {
        "dataset": args.dataset, "split": args.split, "images": len(dataset), "labelled_pixels": n,
        "classes": len(dataset.classes), "held_out": ", ".join(dataset.hold_out) or None,
        "network_input": "x".join(map(str, args.image_size)) if args.image_size else "native size",
        "evaluated_at": "native size of the labels, softmax after upsampling", "pooling": "all labelled pixels of the split",
        "void": "labels 255 never count", "scores": "rounded to float16, equal scores are one threshold",
        "members": len(networks.teacher) if networks.teacher else 0, "mc_samples": args.mc_samples,
        "teacher": " ".join(map(str, args.teacher or ["ckpts"])) if networks.teacher else None,
        "student": str(args.student or "ckpts/student.pt") if networks.student else None,
        "amp": args.amp, "device": args.device,
    } | versions()  # fmt: skip


def clean(value):
    """JSON knows no NaN: null takes its place."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- networks and data
    args.device = str(choose_device(args.device))
    networks, checkpoint = open_networks(args)
    resolve(args, checkpoint)
    torch.manual_seed(0)  # MC dropout
    if args.predict is not None:
        predict_files(networks, args)
        return
    hold_out = checkpoint["config"]["hold_out"]
    dataset = open_dataset(args.dataset, args.data, args.split, args.image_size, hold_out)
    if dataset.classes != args.classes:
        raise UsageError(f"the networks know the classes {', '.join(args.classes)}, {args.dataset} has "
                         f"{', '.join(dataset.classes)}; evaluate on the data set they were trained on")  # fmt: skip
    ood_sets = {name: open_ood(name, dataset) for name in args.ood_sets if name != "held-out"}
    (args.out / "panels").mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- measurements
    print(f"{args.dataset} {args.split}: {len(dataset)} images", flush=True)
    results, accuracy = evaluate_split(networks, dataset, args)
    for name, ood_set in ood_sets.items():
        print(f"OOD {name}: {len(ood_set)} images", flush=True)
        results["ood"][name] = evaluate_ood(networks, name, ood_set, args)
    if results["fidelity"]:
        classwise = [[row["uncertainty"][model] for row in results["classes"]] for model in ("student", "teacher")]
        results["fidelity"]["class_error"] = float(np.nanmean(np.abs(np.subtract(*classwise))))
    results["timing"] = benchmark(networks, dataset[0].image, args) if args.benchmark else {}
    results = clean({"protocol": protocol(args, dataset, networks, results)} | results)

    # ---------------------------------------------------------------- report
    panels = draw_panels(networks, dataset, choose_images(accuracy, args.panels), args)
    for name, ood_set in ood_sets.items():
        chosen = [(f"OOD {name}", i) for i in range(min(args.panels, len(ood_set), 3))]
        panels += draw_panels(networks, ood_set, chosen, args, anomalies=True)
    save_atomically(args.out / "metrics.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_report(results, panels, args.out / "report.html")
    print(results_table(results))
    print(f"\n{args.out / 'metrics.json'}  {args.out / 'report.html'}  {len(panels)} panels in {args.out / 'panels'}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("networks")
    group.add_argument("--student", type=Path, metavar="FILE", help="(default: ckpts/student.pt if it is there)")
    group.add_argument("--teacher", nargs="+", metavar="DIR|FILE", help="(default: the ensemble in ckpts if it is there)")
    group.add_argument("--mc-samples", type=int, default=0, metavar="N", help="dropout samples of a single --teacher FILE")
    group = parser.add_argument_group("data; what is left open is as the networks were trained")
    group.add_argument("--dataset", choices=DATASETS)
    group.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    group.add_argument("--split", default="val", help="(default: val)")
    group.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels of the networks' input")
    group = parser.add_argument_group("what to do")
    group.add_argument("--ood", nargs="*", metavar="SPEC",
                       help="anomaly detection on synthetic, held-out or pasted objects (alone: what the data set offers)")
    group.add_argument("--save-scores", type=Path, metavar="DIR", help="float16 maps of every score, DIR/<set>/<model>-<score>/")
    group.add_argument("--predict", type=Path, metavar="DIR|FILE", help="no evaluation: class and uncertainty maps of these images")
    group.add_argument("--benchmark", action="store_true", help="time the networks as well")
    group.add_argument("--panels", type=int, default=5, metavar="N", help="images to show, from best to worst (default: 5)")
    group.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=4, help="images a batch; changes no figure (default: 4)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    group.add_argument("--workers", type=int, help="processes that load (default: 0 on a CPU, else 4)")
    group.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                       help="arithmetic of the networks (default: bf16 on a GPU, float32 on a CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
