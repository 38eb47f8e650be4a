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
    last, count = len(order) - 1, min(count, len(order))
    places = [last * k // max(1, count - 1) for k in range(count)]
    names = {last: "worst", last // 2: "median", 0: "best"}
    return [(names.get(place, f"rank {place + 1}"), int(order[place])) for place in places]


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


# ---------------------------------------------------------------- pictures

# Viridis at 26 evenly spaced values; linear in between it is within 2/255 of the full table.
VIRIDIS = np.frombuffer(bytes.fromhex(
    "440154470f62481d6f472b7a4437814043873c4e8a37598c31648d2d6e8e29788e26818e228a8d"
    "1f958b1e9e8822a7842bb17d39b9764dc26b62ca5f79d15192d741addc30cae01ee4e318fde724"), np.uint8)
PANEL_SIDE, MARGIN = 360, 14  # pixels: the longer side of a picture in a panel, and around it
INK, OUTLINE = (60, 60, 60), (213, 94, 0)


def viridis(values) -> np.ndarray:
    """Colours of values in [0, 1] (clipped; NaN is 0) as uint8 `[..., 3]`."""
    place = 25 * np.nan_to_num(np.asarray(values, dtype=np.float32)).clip(0, 1)
    colours = [np.interp(place, np.arange(26), VIRIDIS[channel::3]) for channel in range(3)]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def colourise(labels, palette) -> np.ndarray:
    """Class ids `[H, W]` as uint8 RGB `[H, W, 3]`; void and padding are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table[np.asarray(labels, dtype=np.uint8)]


def panel(image, truth, rows, palette, names, anomaly=None, maximum=None) -> Image.Image:
    """The paper's five columns: image, ground truth, prediction, accuracy map, uncertainty.

    image: uint8 `[H, W, 3]`. truth: class ids `[H, W]` (254 and 255 are void), or None.
    rows: one `(model name, prediction [H, W], uncertainty [H, W])` a network, drawn below each
    other. anomaly: `[H, W]` with 0 normal, 1 anomaly, 255 void for an OOD image: it takes the
    place of the ground truth. maximum: the uncertainty at the upper end of the colour bar; without
    it the largest of these rows.
    """
    photo = Image.fromarray(np.asarray(image)).convert("RGB")
    size = tuple(max(1, round(side * PANEL_SIDE / max(photo.size))) for side in photo.size)
    width, height = max(size[0], 260) + MARGIN, size[1] + 40  # of a cell, with title and gap
    top = maximum or max([1e-6] + [float(np.nanmax(u)) for _, _, u in rows])
    maps = [np.asarray(m) for m in (truth, *(row[1] for row in rows)) if m is not None]
    legend = [(c, name) for c, name in (*enumerate(names), (255, "void"))
              if any((m == c).any() for m in maps)]
    strip = MARGIN + height * max(1, len(rows))  # where legend and colour bar begin
    bottom = strip + max(80, 28 * math.ceil(len(legend) / 4) + MARGIN)
    sheet = Image.new("RGB", (MARGIN + 5 * width, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(19)

    def put(row, column, title, pixels):
        x, y = MARGIN + column * width, MARGIN + row * height
        method = Image.NEAREST if 0 < column < 4 else Image.BILINEAR  # class colours do not blend
        draw.text((x, y - 4), title, fill=INK)
        sheet.paste(Image.fromarray(pixels).resize(size, method), (x, y + 24))
        draw.rectangle((x - 1, y + 23, x + size[0], y + 24 + size[1]), outline=(200, 200, 200))

    put(0, 0, "image", np.asarray(photo))
    if anomaly is not None:
        mask = Image.fromarray(255 * (np.asarray(anomaly) == 1).astype(np.uint8)).resize(size)
        edge = np.asarray(mask.filter(ImageFilter.MaxFilter(7))) > np.asarray(mask)
        outlined = np.where(edge[..., None], OUTLINE, np.asarray(photo.resize(size)))
        put(0, 1, "anomaly, outlined", outlined.astype(np.uint8))
    elif truth is not None:
        put(0, 1, "ground truth", colourise(truth, palette))
    for i, (name, prediction, uncertainty) in enumerate(rows):
        put(i, 2, f"{name}: prediction", colourise(prediction, palette))
        put(i, 4, f"{name}: uncertainty", viridis(np.asarray(uncertainty) / top))
        if anomaly is not None:
            put(i, 3, "white: anomaly or void", np.asarray(anomaly) != 0)
        elif truth is not None:  # void differs from every class
            put(i, 3, "white: wrong or void", np.asarray(prediction) != np.asarray(truth))
    for i, (c, name) in enumerate(legend):
        x, y = MARGIN + i % 4 * width, strip + 28 * (i // 4)
        draw.rectangle((x, y, x + 19, y + 19), fill=tuple(colourise(c, palette).tolist()))
        draw.text((x + 28, y), name, fill=INK)
    x, right = MARGIN + 4 * width, 5 * width
    ramp = viridis(np.tile(np.linspace(0, 1, right - x), (20, 1)))
    sheet.paste(Image.fromarray(ramp), (x, strip))
    draw.text((x, strip + 24), "0", fill=INK)
    draw.text((right, strip + 24), f"{top:.3g}", fill=INK, anchor="ra")
    draw.text(((x + right) / 2, strip + 46), "std of predicted class's prob.", INK, anchor="ma")
    return sheet


# ---------------------------------------------------------------- charts

# Okabe-Ito without its yellow: distinct to the colour-blind, visible on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a")
DASHES = ("none", "6 5", "1 5", "10 5 1 5")
CHART_WIDTH, LEFT, RIGHT, TOP, BOTTOM = 420, 44, 408, 50, 250  # of the SVG, and its plot's edges


def _ticks(values, low=None, high=None) -> list[float]:
    """About five round numbers that span low to high, or where they are None the values."""
    seen = [v for v in values if v is not None and math.isfinite(v)]
    low = min(seen, default=0) if low is None else low
    high = max(seen, default=1) if high is None else high
    raw = (high - low) / 5 or 0.2
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _text(x, y, text, anchor="start", weight="normal") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
            f'fill="currentColor">{html.escape(text)}</text>')


def line_chart(title, series, xlabel, ylabel, note="", limits=None, diagonal=False) -> str:
    """Curves as an SVG string.

    series: `(label, xs, ys)` or `(label, xs, ys, colour index, dash index)`; None and NaN break the
    line. limits: `(x0, x1, y0, y1)`, None where the data decide. diagonal: draw y = x. note: what
    good looks like, for screen readers.
    """
    limits = limits or (None,) * 4
    xticks = _ticks([x for item in series for x in item[1]], *limits[:2])
    yticks = _ticks([y for item in series for y in item[2]], *limits[2:])

    def point(x, y):
        right = LEFT + (x - xticks[0]) / (xticks[-1] - xticks[0]) * (RIGHT - LEFT)
        down = BOTTOM - (y - yticks[0]) / (yticks[-1] - yticks[0]) * (BOTTOM - TOP)
        return right, down

    parts = [_text(0, 14, title, weight="bold"), _text(0, 35, ylabel),
             _text(RIGHT, BOTTOM + 33, xlabel, "end")]
    parts += [_text(point(x, 0)[0], BOTTOM + 16, f"{x:g}", "middle") for x in xticks]
    for y in yticks:
        height = point(0, y)[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}H{RIGHT}" stroke="#8885"/>')
        parts.append(_text(LEFT - 7, height + 4, f"{y:g}", "end"))
    if diagonal:
        ends = max(xticks[0], yticks[0]), min(xticks[-1], yticks[-1])
        series = [*series, ("y = x", ends, ends, len(COLOURS) - 1, 2)]
    for i, (label, xs, ys, *style) in enumerate(series):
        colour, dash = style or (i % len(COLOURS), i // len(COLOURS) % len(DASHES))
        line = (f'stroke="{COLOURS[colour]}" stroke-dasharray="{DASHES[dash]}" stroke-width="2" '
                'stroke-linecap="round" stroke-linejoin="round"')
        path, joined = "", False
        for x, y in np.array([xs, ys], dtype=float).T:
            if known := np.isfinite(x + y):  # "h0" makes a dot of a point that stands alone
                path += ("L" if joined else "M") + "{:.1f} {:.1f}h0".format(*point(x, y))
            joined = known
        x, y = i % 2 * CHART_WIDTH / 2, BOTTOM + 57 + 18 * (i // 2)  # the legend, two in a line
        parts += [f'<path d="{path}" {line}/>', f'<path d="M{x + 1} {y - 4}h22" {line}/>',
                  _text(x + 30, y, label)]
    # The grey serves a file of its own; in the report the style sheet sets the page's text colour.
    return ('<svg xmlns="http://www.w3.org/2000/svg" role="img" fill="none" color="#777" '
            f'viewBox="0 0 {CHART_WIDTH} {BOTTOM + 65 + 18 * ((len(series) - 1) // 2)}" '
            'font-family="system-ui,sans-serif" font-size="11">'
            f"<title>{html.escape(title)}</title><desc>{html.escape(note)}</desc>"
            f"{''.join(parts)}</svg>")


# ---------------------------------------------------------------- tables

COLUMNS = {  # key in metrics.json: heading with the better side, factor, digits
    "miou": ("mIoU % ↑", 100, 2), "pixel_accuracy": ("pixel acc. % ↑", 100, 2),
    "nll": ("NLL ↓", 1, 4), "brier": ("Brier ↓", 1, 4), "ece": ("ECE % ↓", 100, 2),
    "auroc": ("AUROC % ↑", 100, 2), "ap": ("AP % ↑", 100, 2), "fpr95": ("FPR95 % ↓", 100, 2),
    "aurc": ("AURC ↓", 1, 4), "ause": ("AUSE ↓", 1, 4), "rmse": ("RMSE ↓", 1, 4),
    "rmsle": ("RMSLE ↓", 1, 4), "pearson": ("Pearson ↑", 1, 3), "spearman": ("Spearman ↑", 1, 3),
    "class_error": ("class error ↓", 1, 4), "parameters": ("parameters, M", 1e-6, 2),
    "ms_per_image": ("ms / image ↓", 1, 1), "images_per_second": ("images / s ↑", 1, 2),
    "peak_memory_mb": ("memory, MB ↓", 1, 0), "iou": ("IoU %", 100, 1),
    "uncertainty": ("uncertainty", 1, 4)}
MODELS = ("student", "teacher", "member")  # the place is the model's colour in every chart
DRAWN = {"": 0, "dudes": 0, "std": 0, "entropy": 1}  # the scores in the charts and their dashes


def _get(tree, *keys):
    """The part of nested dicts at `keys`; None where one is missing or the number is NaN."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _number(numbers, key: str) -> str:
    """A number as text, mean ± standard deviation where it has those, a dash if it is unknown."""
    _, factor, digits = COLUMNS[key]
    values = [_get(numbers, key + end) for end in ("", "_mean", "_std")]
    return " ± ".join(f"{v * factor:,.{digits}f}" for v in values if v is not None) or "–"


def _ordered(scores) -> list[tuple[str, str, dict]]:
    """(model, score or "", numbers) of `{"model/score" or "model": numbers}`, student first."""
    rows = [(*key.partition("/")[::2], numbers) for key, numbers in (scores or {}).items()
            if numbers and isinstance(numbers, dict)]
    return sorted(rows, key=lambda row: (*MODELS, row[0]).index(row[0]))


def _tables(metrics):
    """Yields (title, headings, rows) of the results, all of it text."""
    detection = ("auroc", "ap", "fpr95")
    tables = [
        ("Segmentation", ("miou", "pixel_accuracy", "nll", "brier", "ece"), "segmentation"),
        ("Finding errors", (*detection, "aurc", "ause"), "uncertainty"),
        *((f"Anomalies: {name}", detection, "ood", name) for name in _get(metrics, "ood") or ()),
        ("Fidelity", ("rmse", "rmsle", "pearson", "spearman", "class_error"), "fidelity"),
        ("Cost", ("parameters", "ms_per_image", "images_per_second", "peak_memory_mb"), "timing")]
    metrics = {**metrics, "fidelity": {"student": _get(metrics, "fidelity")}}
    for title, keys, *path in tables:
        rows = [[f"{model} {score}".replace("_", " "), *(_number(numbers, key) for key in keys)]
                for model, score, numbers in _ordered(_get(metrics, *path))]
        if rows:
            yield title, [COLUMNS[key][0] for key in keys], rows


def results_table(metrics: dict) -> str:
    """The results as aligned ASCII text, at most 100 columns wide; - is unknown."""
    plain, lines = str.maketrans({"±": "+-", "–": "-", "↑": "", "↓": ""}), []
    for title, headings, rows in _tables(metrics):
        for label, *cells in ([""], [title, *headings], *rows):
            cells = [cell.translate(plain).strip() for cell in cells]
            lines.append(f"{label:<28.28}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines[1:])


def _html_table(head, rows) -> str:
    """A table that scrolls inside its own box; nothing without rows."""
    lines = ["<th>" + "<th>".join(html.escape(cell) for cell in head)]
    lines += ["<th>" + "<td>".join(html.escape(cell) for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{"<tr>".join(lines)}</table></div>' if rows else ""


# ---------------------------------------------------------------- report

STYLE = """
:root{color-scheme:light dark}figure:has(img){width:100%;overflow-x:auto}
body{max-width:1000px;margin:auto;padding:24px 16px;font:15px/1.5 system-ui,sans-serif}
h1{font-size:15px;margin:0}h2{font-size:18px;margin:40px 0 4px}.lead{font-size:20px}p{margin:0}
figure{display:inline-block;width:min(100%,470px);margin:14px 20px 14px 0;vertical-align:top}
svg,img{width:100%;display:block;color:inherit}h2,p{break-after:avoid}tr,figure{break-inside:avoid}
figcaption,table{font-size:13.5px}.scroll{overflow-x:auto;margin:10px 0}img{min-width:820px}
table{border-collapse:collapse;min-width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 0 4px 18px;text-align:right;white-space:nowrap;border-bottom:1px solid #8885}
th:first-child,td:only-of-type{text-align:left;font-weight:400}th:first-child{padding:0}
th:nth-child(2):last-child{text-align:left}td:only-of-type{white-space:normal;overflow-wrap:anywhere}
@media print{body{font-size:11px}.scroll{overflow:visible}img{min-width:0}figure{width:45%}}
"""
FIGURES = {  # curve: title, number in its labels, keys of x and y, axes, limits, what is good
    "reliability": ("Reliability, with ECE in %", "ece", ("confidence", "accuracy"),
                    "confidence: largest probability, %", "accuracy, %", (0, 100, 0, 100),
                    "Good: on the diagonal. Below it the network is overconfident."),
    "rejection": ("mIoU without the most uncertain pixels", None, None,
                  "most uncertain pixels ignored, %", "mIoU of the rest, %", (0, 90, None, 100),
                  "Good: rises at once and steeply. Far right, few classes may be left."),
    "risk_coverage": ("Risk and coverage, with AURC", "aurc", ("coverage", "risk"),
                      "most certain pixels kept, %", "wrong among them, %", (0, 100, 0, None),
                      "Good: along the bottom for long. It ends at the network’s error rate."),
    "roc": ("ROC, with AUROC in %", "auroc", ("fpr", "tpr"),
            "false alarms: share of other pixels, %", "found: share of positive pixels, %",
            (0, 100, 0, 100), "Good: up the left edge at once. The diagonal is guessing."),
    "pr": ("Precision and recall, with AP in %", "ap", ("recall", "precision"),
           "recall: share of positive pixels found, %", "precision: right among the alarms, %",
           (0, 100, 0, 100), "Good: top right. Guessing is level at the share of positives.")}


def _curve(name, scores) -> str:
    """The chart of one kind of curve for every score that is drawn; empty where there is none."""
    title, number, keys, xlabel, ylabel, limits, note = FIGURES[name]
    series = []
    for model, score, values in _ordered(scores):
        points = _get(values, name)
        if points and model in MODELS and score in DRAWN:
            # a rejection curve is a bare list: a value for every tenth of the pixels ignored
            points = [points[key] for key in keys] if keys else [np.arange(10) / 10, points]
            label = f"{model} {score} {_number(values, number) if number else ''}"
            xs, ys = 100 * np.array(points, dtype=float)
            series.append((label, xs, ys, MODELS.index(model), DRAWN[score]))
    chart = line_chart(title, series, xlabel, ylabel, note, limits, name in ("reliability", "roc"))
    return _figure(chart, note) if series else ""


def _figure(picture, caption) -> str:
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _density(fidelity) -> str:
    """The joint histogram of both uncertainties as a picture inside an empty chart."""
    counts = np.array(fidelity["density"], dtype=float)  # [student's, teacher's], from 0 up
    shade = viridis(np.log1p(counts) / np.log1p(counts.max() or 1))
    pixels = np.dstack([shade, np.where(counts > 0, 255, 0).astype(np.uint8)])  # empty: transparent
    png, top = io.BytesIO(), _get(fidelity, "density_max") or 0.53
    Image.fromarray(pixels[::-1].copy()).save(png, "PNG")
    share = top / _ticks([0, top])[-1]  # of the axes, which end at a round number
    width, height = share * (RIGHT - LEFT), share * (BOTTOM - TOP)
    picture = (f'<image x="{LEFT}" y="{BOTTOM - height}" width="{width}" height="{height}" '
               'preserveAspectRatio="none" image-rendering="pixelated" '
               f'href="{_data_uri(png.getvalue())}"/>')
    note = "Good: a narrow ridge on the diagonal. Below it the student is surer than its teacher."
    chart = line_chart("Pixels by uncertainty, yellow where most are", [], "teacher: std",
                       "student: predicted std", note, (0, top, 0, top), diagonal=True)
    return _figure(chart.replace("</desc>", "</desc>" + picture), note)


def _headline(metrics) -> str:
    """The outcome in one sentence, made from the numbers that are there."""
    def listed(part, number, keys):
        values = {key.replace("/", " "): _get(metrics, part, key, number) for key in keys}
        return ", ".join(f"{100 * v:.1f}\u00a0% ({k})" for k, v in values.items() if v is not None)

    text = f"The mIoU is {listed('segmentation', 'miou', MODELS) or 'unknown'}"
    scores = ("student/dudes", "teacher/std", "student/entropy", "member/entropy")
    if auroc := listed("uncertainty", "auroc", scores):
        text += f"; wrong pixels are found with an AUROC of {auroc}"
    times = [_get(metrics, "timing", model, "ms_per_image") for model in ("student", "teacher")]
    if all(times):
        text += f"; the student takes {100 * times[0] / times[1]:.0f}\u00a0% of the teacher’s time"
    return text + "."


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _sections(metrics, panels):
    """Yields (heading, how to read it, HTML below the table of that title)."""
    segmentation, uncertainty = _get(metrics, "segmentation"), _get(metrics, "uncertainty")
    yield ("Segmentation", "Arrows point to the better side.", _curve("reliability", segmentation))
    yield ("Finding errors", "Positive is a wrong pixel; each network is asked for its own errors.",
           "".join(_curve(c, uncertainty) for c in ("rejection", "risk_coverage", "roc", "pr")))
    for name, scores in (_get(metrics, "ood") or {}).items():
        yield (f"Anomalies: {name}", "Positive is a pixel of an object that was never trained on.",
               _curve("roc", scores) + _curve("pr", scores))
    yield ("Fidelity", "How closely the student’s uncertainty follows its teacher’s, by pixel.",
           _density(metrics["fidelity"]) if _get(metrics, "fidelity", "density") else "")
    classes = _get(metrics, "classes") or []
    columns = [(kind, model) for kind in ("iou", "uncertainty") for model in MODELS
               if any(_get(row, kind, model) is not None for row in classes)]
    head = ["class", *(f"{model} {COLUMNS[kind][0]}" for kind, model in columns)]
    rows = [[str(row["name"])] + [_number({kind: _get(row, kind, model)}, kind)
                                  for kind, model in columns] for row in classes]
    yield ("Classes", "Uncertainty: mean over the pixels that a network predicts as the class.",
           _html_table(head, rows))
    yield "Cost", "From pixels to class and uncertainty.", ""
    images = [(title, _data_uri(Path(file).read_bytes())) for title, file in panels]
    yield ("Images", "Good: uncertainty is bright where the accuracy map is white.",
           "".join(_figure(f'<img alt="" src="{data}">', title) for title, data in images))
    rows = [[k, "–" if v is None else str(v)] for k, v in (_get(metrics, "protocol") or {}).items()]
    yield "Protocol", "What the numbers depend on.", _html_table(["setting", "value"], rows)


def write_report(metrics: dict, panels, path) -> None:
    """Write the report: one HTML file that needs nothing else, no script, no network.

    metrics: the content of metrics.json; whatever is missing there is left out here.
    panels: `(title, PNG file)`, in the order to show them.
    """
    tables = {title: _html_table(["", *head], rows) for title, head, rows in _tables(metrics)}
    title = html.escape(f"Uncertainty report: {_get(metrics, 'protocol', 'dataset') or ''}")
    body = ""
    for heading, line, content in _sections(metrics, panels):
        if content := tables.get(heading, "") + content:
            body += f"<h2>{html.escape(heading)}</h2><p>{line}</p>{content}"
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
        gaps = np.abs(np.subtract(*classwise))  # NaN where one of them never predicts the class
        results["fidelity"]["class_error"] = float(np.mean(gaps[~np.isnan(gaps)])) if (gaps >= 0).any() else math.nan
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
