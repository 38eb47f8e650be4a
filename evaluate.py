"""Measure what the uncertainty is worth: calibration, error and OOD detection, fidelity, time.

    python evaluate.py --ood      # -> results/metrics.json, report.html, rejection.svg, panels/
    python evaluate.py --student ckpts/student.pt --teacher ckpts/ --ood pasted --benchmark
    python evaluate.py --student ckpts/student.pt --predict photos/     # maps of one's own pictures

Everything is pooled over all labelled pixels of the split at their native size (metrics.py has the
definitions); member 0, the teacher and the student see the same pixels in the same pass.
"""

import argparse
import base64
import contextlib
import ctypes
import fcntl
import html
import io
import itertools
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import data
import metrics
import model

# ---------------------------------------------------------------- what every script shares


class UsageError(ValueError):
    """Flags, or a state of the disk or of the training, that a user can mend; it says how."""


class Parser(argparse.ArgumentParser):
    """argparse with one line in place of a usage text and an error."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def run(main: Callable, parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """`main(args)`, and its exit code: 0; 2, with one line, for what a user can mend; or 130."""
    args = parser.parse_args(argv)
    try:
        main(args)
        return 0
    except (UsageError, data.DataError, model.ModelError, metrics.MetricError) as error:
        # from a loader's worker the message is the last line of the worker's traceback
        message = str(error).strip().splitlines()[-1].split("Error: ")[-1]
    except (MemoryError, RuntimeError) as error:
        if not (message := remedy(error)):
            raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = (error.strerror or str(error)).strip().splitlines()[-1]
        message = f"{reason}{place}; free the disk or the path, then run it again"
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2


def remedy(error: MemoryError | RuntimeError) -> str:
    """What to do about a fault of the machine; nothing for one of the program."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        return "the memory is full; use a smaller --batch-size or --image-size"
    if "DataLoader worker" in text:
        return "a process that loads images died, often for want of shared memory; use --workers 0"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = text.strip().splitlines()[0][:120]
        return f"torch.compile failed ({reason}); install a C++ compiler or use --no-compile"
    return ""


def choose_device(name: str) -> torch.device:
    """By name; "auto" is the GPU if there is one, under torchrun one a process. Raises UsageError
    if the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UsageError(f"--device {name} cannot be used ({reason}); try --device cpu") from None
    return device


def choose_amp(amp: str, device: torch.device) -> str:
    """What "auto" stands for: bf16 where the processor has it (measured on a CPU: 1.8 times as
    fast, but slower where it is emulated), else "off"."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # younger than our oldest torch
        bf16 = has.get("avx512_bf16") or has.get("amx_bf16")
    return "bf16" if bf16 else "off"


def autocast(device: torch.device, amp: str):
    """The arithmetic of the networks: bf16, fp16 or, with "off", float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For the one process at a time that may write `path`; a second one gets a UsageError.

    A record lock ends with its process, however that ends, and forked workers do not inherit it.
    """
    lock = path.with_suffix(".lock")
    while True:
        file = open(lock, "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise UsageError(f"another process is writing {path}; wait for it to end, or name "
                             "another --out") from None  # fmt: skip
        # who held the lock before may have removed the file since it was opened here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
                break
        file.close()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


@torch.inference_mode()
def validate(network: nn.Module, loader: DataLoader, device, amp: str, target=None) -> dict:
    """miou, iou, pixel_accuracy and mean_class_accuracy of `network` over `evaluation_loader`, in
    a process group over those of all processes. With target(images, (H, W), index), which returns
    its teacher's measure [B, H, W], also `metrics.Fidelity` of its first one as fidelity_*."""
    network.eval()
    confusion, fidelity = metrics.ConfusionMatrix(network.num_classes), metrics.Fidelity()
    for images, labels, index in itertools.chain.from_iterable(loader):
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        size = labels.shape[-2:]
        with autocast(device, amp):
            logits, uncertainty = network(images, size)
        confusion.update(model.predicted(logits), labels)
        if target:
            teacher = target(images, size, index)
            fidelity.update(uncertainty[:, 0], teacher, labels < data.IGNORED)
    confusion.all_reduce()
    fidelity.all_reduce()
    pairs = fidelity.compute().items() if target else ()
    return confusion.compute() | {f"fidelity_{key}": value for key, value in pairs}


# ---------------------------------------------------------------- networks and their scores

Networks = dict[str, nn.Module]  # "student", "teacher" or both


def distilled(measure: str) -> str:
    """The score by which the student's copy of a teacher's measure is known."""
    return "dudes" if measure == "std" else f"dudes_{measure}"


def unit(measure: str, num_classes: int) -> float:
    """What a student's output in [0, 1] counts in: entropies are learned divided by log C."""
    return math.log(num_classes) if measure in ("entropy", "mutual_information") else 1.0


class Output(NamedTuple):
    probs: Tensor  # float32 [B, C, H, W]
    scores: dict[str, Tensor]  # float32 [B, H, W] each; higher = more uncertain


def predict(networks: Networks, images: Tensor, size, args, tap=None) -> dict[str, Output]:
    """Probabilities and scores of every model at `size` (H, W), softmax after the upsampling.

    images: uint8 [B, 3, h, w]. `tap`, a generator, passes on the members' logits [B, C, H, W] one
    by one. Member 0 of an MC-dropout teacher is its first sample.
    """
    outputs = {}
    if "teacher" in networks:
        with autocast(images.device, args.amp):
            stream = networks["teacher"].stream(images, size)
            first = next(stream)
            stream = itertools.chain([first], stream)
            mean = model.predictive_statistics(tap(stream) if tap else stream, True)
        probs = first.softmax(dim=1)
        outputs["member"] = Output(probs, free_scores(first, probs))
        outputs["teacher"] = Output(mean.probs, teacher_scores(mean, MEASURES))
    if "student" in networks:
        with autocast(images.device, args.amp):
            logits, uncertainty = networks["student"](images, size)
        probs = logits.softmax(dim=1)
        names = map(distilled, args.measures)
        maps = [u * unit(m, logits.shape[1])
                for m, u in zip(args.measures, uncertainty.unbind(dim=1), strict=True)]  # fmt: skip
        learned = dict(zip(names, maps, strict=True))
        outputs["student"] = Output(probs, learned | free_scores(logits, probs))
    return outputs


MEASURES = ("std", "entropy", "mutual_information", "msp")


def teacher_scores(prediction: model.EnsemblePrediction, names) -> dict[str, Tensor]:
    """Those of `MEASURES` that are named, in this order, [B, H, W] each; entropies in nats."""
    probs, std, expected_entropy = prediction
    scores = {"std": lambda: std, "entropy": lambda: metrics.predictive_entropy(probs),
              "mutual_information": lambda: metrics.mutual_information(probs, expected_entropy),
              "msp": lambda: metrics.max_softmax(probs)}
    return {name: scores[name]() for name in names}


def free_scores(logits: Tensor, probs: Tensor) -> dict[str, Tensor]:
    """What any single network offers for nothing."""
    return {"entropy": metrics.predictive_entropy(probs), "msp": metrics.max_softmax(probs),
            "max_logit": metrics.max_logit(logits), "energy": metrics.energy(logits)}


def sweep(dataset: Dataset, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """One pass: images [B, 3, h, w] and labels [B, H, W] on the device, indices; a live line."""
    device, started, done = torch.device(args.device), time.monotonic(), 0
    torch.manual_seed(0)  # MC dropout: each pass draws the same
    loader = data.evaluation_loader(dataset, args.batch_size, args.workers, device)
    for images, labels, index in itertools.chain.from_iterable(loader):
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        yield images, labels, index.tolist()
        done += len(images)
        show_progress(done, len(dataset), started)


def show_progress(done: int, total: int, started: float) -> None:
    """A live line with rate and time left, on a terminal only."""
    if sys.stderr.isatty():
        rate = done / (time.monotonic() - started)
        line = f"{done}/{total} images  {rate:.1f} images/s  {(total - done) / rate:.0f} s left   "
        print("\r" + line, end="\n" * (done == total), file=sys.stderr, flush=True)


# ---------------------------------------------------------------- measurements


class Tracker:
    """The accumulators of one model."""

    def __init__(self, primary: str, num_classes: int):
        self.primary = primary  # the score that the classes are listed with
        self.confusion = metrics.ConfusionMatrix(num_classes)
        self.proper, self.calibration = metrics.ProperScores(), metrics.CalibrationError()
        self.classes = metrics.ClassUncertainty(num_classes)
        self.scores = defaultdict(lambda: metrics.RejectionCurve(num_classes))

    def update(self, output: Output, labels: Tensor) -> Tensor:
        """Takes in a batch; returns which labelled pixels it has right, bool [B, H, W]."""
        prediction = model.predicted(output.probs)
        self.confusion.update(prediction, labels)
        self.proper.update(output.probs, labels)
        self.calibration.update(output.probs, labels, prediction)
        self.classes.update(output.scores[self.primary], prediction, labels)
        for name, score in output.scores.items():
            self.scores[name].update(score, prediction, labels)
        return (prediction == labels) & (labels < data.IGNORED)

    def figures(self) -> tuple[dict, dict[str, dict], list[float]]:
        """Of the segmentation, of every score, and the mean uncertainty of each class."""
        segmentation = self.confusion.compute() | self.proper.compute() | self.calibration.compute()
        segmentation["reliability"] = segmentation.pop("bins")
        classes = self.classes.compute()
        scores = {}
        for name, rejection in self.scores.items():
            detection, selective = rejection.errors()
            scores[name] = selective.compute() | rejection.compute() | detection_figures(detection)
        return segmentation | {"munc": classes["munc"]}, scores, classes["uncertainty"]


def detection_figures(detection: metrics.Detection) -> dict:
    """AUROC, AP, FPR95, and both curves thinned to what a plot can show."""
    curves = detection.curves()
    fpr, tpr = (np.append(0.0, curves[key]) for key in ("fpr", "tpr"))
    recall, precision = curves["recall"], curves["precision"]
    roc, pr = metrics.thin_curve(fpr, tpr), metrics.thin_curve(recall, precision)
    return detection.compute() | {
        "roc": {"fpr": fpr[roc].tolist(), "tpr": tpr[roc].tolist()},
        "pr": {"recall": recall[pr].tolist(), "precision": precision[pr].tolist()}}


@torch.inference_mode()
def evaluate_split(networks: Networks, dataset, args) -> tuple[dict, list[float], dict]:
    """Everything that labels can tell, in one pass: the parts of metrics.json, each image's pixel
    accuracy (NaN where all is void) by the student or, without one, the teacher, and for --ood the
    `image_scores` of the images that show no held-out class.
    """
    num_classes, size = len(dataset.classes), len(networks.get("teacher", ()))
    trackers: dict[str, Tracker] = {}
    members = [metrics.ConfusionMatrix(num_classes) for _ in range(size)]
    normal: dict[str, list] = defaultdict(list)
    compare = len(networks) == 2
    fidelity, density, accuracy = metrics.Fidelity(), 0, []
    measure = args.primary["teacher"]
    # both axes of the density end at the largest unbiased std in [0, 1]: half are 0, half 1
    largest = math.sqrt(size // 2 * (size - size // 2) / (size * (size - 1))) if size else 0.0
    largest = largest if measure == "std" else unit(measure, num_classes)

    def tap(stream):
        for member, logits in zip(members, stream, strict=True):
            member.update(model.predicted(logits), labels)
            yield logits

    for images, labels, index in sweep(dataset, args):
        outputs = predict(networks, images, labels.shape[-2:], args, tap)
        save_scores(args, dataset, args.split, outputs, index)
        valid = labels < data.IGNORED
        for name, output in outputs.items():  # the student comes last
            if name not in trackers:
                trackers[name] = Tracker(args.primary[name], num_classes)
            correct = trackers[name].update(output, labels)
        accuracy += (correct.sum((1, 2)) / valid.sum((1, 2))).tolist()
        if args.ood is not None:
            known = ~(labels == data.IGNORED).flatten(1).any(dim=1)
            for key, scores in image_scores(outputs):
                normal[key] += scores[known].tolist()
        if compare:
            pair = [outputs[name].scores[args.primary[name]] for name in ("student", "teacher")]
            fidelity.update(*pair, valid)
            row, column = ((64 / largest * u[valid]).long().clamp(0, 63) for u in pair)
            density = density + torch.bincount(64 * row + column, minlength=64 * 64)
    results = gather(dataset.classes, trackers, members) | {"fidelity": {}, "ood": {}}
    if compare:
        by_class = [row["uncertainty"] for row in results["classes"]]
        gaps = [abs(u["student"] - u["teacher"]) for u in by_class]
        gaps = [gap for gap in gaps if not math.isnan(gap)]  # of classes that both predict
        results["fidelity"] = fidelity.compute() | {
            "density": density.view(64, 64).tolist(), "density_max": largest, "measure": measure,
            "class_error": float(np.mean(gaps)) if gaps else math.nan}
    return results, accuracy, normal


def gather(names: list[str], trackers: dict[str, Tracker], members: list) -> dict:
    """The accumulators' figures in the layout of metrics.json; names: of the classes."""
    segmentation, uncertainty, means = {}, {}, {}
    for name, tracker in trackers.items():
        segmentation[name], scores, means[name] = tracker.figures()
        uncertainty |= {f"{name}/{score}": figures for score, figures in scores.items()}
    means.pop("member", None)
    classes = [{"name": name, "iou": {m: figures["iou"][c] for m, figures in segmentation.items()},
                "uncertainty": {m: mean[c] for m, mean in means.items()}}
               for c, name in enumerate(names)]
    if members:
        mious = [member.compute()["miou"] for member in members]
        mean, std = float(np.mean(mious)), float(np.std(mious, ddof=1))
        segmentation["members"] = {"n": len(mious), "miou_mean": mean, "miou_std": std}
    return {"segmentation": segmentation, "uncertainty": uncertainty, "classes": classes}


def named(outputs: dict[str, Output]) -> dict[str, Tensor]:
    """Every score [B, H, W] of every model as "<model>/<score>"."""
    return {f"{name}/{score}": values for name, output in outputs.items()
            for score, values in output.scores.items()}


def image_scores(outputs: dict[str, Output]) -> Iterator[tuple[str, Tensor]]:
    """The mean and the 99th percentile of every score over each image: name, float32 [B, 2]."""
    for key, values in named(outputs).items():
        values = values.flatten(1)
        rank = math.ceil(0.99 * values.shape[1])
        percentile = values.kthvalue(rank, dim=1).values
        yield key, torch.stack([values.mean(dim=1), percentile], dim=1).cpu()


def image_level(found: list, anomalous: list[bool], normal: list) -> dict[str, float]:
    """AUROC of telling images with an anomaly from those without by their `image_scores`: those of
    the OOD set, and of more in-distribution images."""
    found, there = np.reshape(found, (-1, 2)), np.array(anomalous)
    others = np.concatenate([found[~there], np.reshape(normal, (-1, 2))])
    return {f"image_auroc_{name}": metrics.pairs_auroc(found[there, k], others[:, k])
            for k, name in enumerate(("mean", "p99"))}


@torch.inference_mode()
def image_scores_of(networks: Networks, dataset, args) -> dict[str, list]:
    """`image_scores` of all images of a data set."""
    found = defaultdict(list)
    for images, labels, _ in sweep(dataset, args):
        for key, scores in image_scores(predict(networks, images, labels.shape[-2:], args)):
            found[key] += scores.tolist()
    return found


WAITING = 2**30  # bytes of float16 scores: 40 million pixels of 13 scores


@torch.inference_mode()
def evaluate_ood(networks: Networks, ood: data.OODSet, normal: dict, args) -> tuple[dict, dict]:
    """Detection of the anomalies of one OOD set by every score of every model, as pixels, as
    components and as images; and the protocol. normal: `image_scores` of more in-distribution
    images. For the components a score is cut where the F1 of all pixels is best: the scores wait
    for it up to `WAITING` bytes; where they are more, a second pass computes them again.
    """
    detections, found = defaultdict(metrics.Detection), defaultdict(list)
    anomalous, sizes, waiting, size = [], Counter(), [], 0
    for images, mask, index in sweep(ood.dataset, args):
        outputs = predict(networks, images, mask.shape[-2:], args)
        scores = {key: values.half() for key, values in named(outputs).items()}
        for key, values in scores.items():
            detections[key].update(values, mask)
        size += sum(values.nbytes for values in scores.values())
        waiting.append((mask, scores))
        if size > WAITING:
            waiting.clear()
        for key, statistics in image_scores(outputs):
            found[key] += statistics.tolist()
        anomalous += (mask == 1).flatten(1).any(dim=1).tolist()
        sizes["x".join(map(str, images.shape[-2:]))] += len(images)
        save_scores(args, ood.dataset, ood.name, outputs, index)
    figures = {key: detection_figures(detection) | detection.best_f1()
               | image_level(found[key], anomalous, normal.get(key, []))
               for key, detection in detections.items()}
    some = next(iter(figures.values()))
    if some["positives"]:
        components = {key: metrics.ComponentDetection(ood.smallest) for key in figures}
        again = waiting or ((mask, named(predict(networks, images, mask.shape[-2:], args)))
                            for images, mask, _ in sweep(ood.dataset, args))  # fmt: skip
        for mask, scores in again:
            truth = [metrics.connected_components(one == 1) for one in mask.cpu().numpy()]
            for key, values in scores.items():
                above = values.half() > figures[key]["f1_threshold"]
                components[key].update(above, mask, truth)
        for key, component in components.items():
            figures[key] |= component.compute()
    else:
        text = f"the OOD set {ood.name} has no anomalous pixel; its figures are undefined"
        print(f"warning: {text}", file=sys.stderr)
    return figures, {
        "images": len(ood.dataset), "pixels": some["n"], "anomalous_pixels": some["positives"],
        "prevalence": some["positives"] / some["n"] if some["n"] else math.nan,
        "network_input": ", ".join(size for size, _ in sizes.most_common(3)),
        "smallest_components": list(ood.smallest), "anomalous_images": sum(anomalous),
        "normal_images": len(anomalous) - sum(anomalous) + len(next(iter(normal.values()), [])),
        "scores": "float16", "pooling": "all pixels at native size",
        "torch": str(torch.__version__)} | ood.protocol


def described(protocol: dict) -> str:
    """The protocol of an OOD set in a sentence."""
    p = {key: value for key, value in protocol.items() if value is not None}
    share = f"{100 * p['prevalence']:.2f}% anomalous" if p.get("prevalence") else "none anomalous"
    of = f" of {p['published']} published" if p.get("published") else ""
    skipped = "".join(f"; skipped {n} {reason}" for reason, n in p.get("skipped", {}).items())
    return (
        f"{p['images']} images{of}, {p['pixels']:,} pixels, {share}; void: {p['void']}{skipped}; "
        f"network input {p['network_input']}, pooled at native size, float16 scores; components "
        f"from {p['smallest_components'][0]} px (true: {p['smallest_components'][1]}); images: "
        f"{p['anomalous_images']} with an anomaly against {p['normal_images']} without; "
        f"torch {p['torch']}"
    )


def save_scores(args, dataset, which: str, outputs: dict[str, Output], index: list[int]) -> None:
    """--save-scores: float16 [H, W] maps as DIR/<set>/<model>-<score>/<image stem>.npy."""
    for name, output in outputs.items() if args.save_scores else ():
        for score, maps in output.scores.items():
            folder = args.save_scores / which / f"{name}-{score}"
            folder.mkdir(parents=True, exist_ok=True)
            for number, values in zip(index, maps.half().cpu().numpy(), strict=True):
                np.save(folder / f"{dataset.stem(number)}.npy", values)


@torch.inference_mode()
def benchmark(networks: Networks, image: Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """Cost of a forward pass from uint8 pixels to class and uncertainty: parameters, median
    milliseconds, images per second and peak memory (weights, and what the pass adds), after
    warm-up, the models taking turns, as they are and compiled (`compiled_...`)."""
    device = torch.device(args.device)
    images = image[None].repeat(args.batch_size, 1, 1, 1).to(device)
    candidates = dict(networks)
    if "teacher" in networks:
        candidates["member"] = networks["teacher"].members[0]
    weights = {name: sum(w.nbytes for w in network.state_dict().values()) / 1e6
               for name, network in candidates.items()}  # fmt: skip
    figures = {name: {"parameters": sum(w.numel() for w in network.parameters()),
                      "batch_size": len(images), "size": list(images.shape[-2:])}
               for name, network in candidates.items()}  # fmt: skip
    for prefix in ("", "compiled_") if args.compile else ("",):
        if prefix:
            print("compiling", flush=True)
            candidates = {name: compiled(network) for name, network in candidates.items()}
        seconds, added = defaultdict(list), {}
        for _ in range(13):
            for name, network in candidates.items():
                with peak_memory(device) as peak:
                    started = time.perf_counter()
                    with autocast(device, args.amp):
                        model.predicted(network(images)[0])
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds[name].append(time.perf_counter() - started)
                added[name] = peak[0]
        for name, times in seconds.items():
            per_image = float(np.median(times[3:])) / len(images)  # the first turns warm up
            memory = None if added[name] is None else weights[name] + added[name]
            measured = {"ms_per_image": 1000 * per_image, "images_per_second": 1 / per_image,
                        "peak_memory_mb": memory}  # fmt: skip
            figures[name] |= {prefix + key: value for key, value in measured.items()}
    return figures


def compiled(network: nn.Module) -> nn.Module:
    """torch.compile of a network; of an ensemble, of its members."""
    if not isinstance(network, model.Ensemble):
        return torch.compile(network)
    members = [torch.compile(member) for member in network.members]
    return model.Ensemble(members, network.mc_samples)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list]:
    """A list that gets the megabytes by which the memory grew meanwhile: the allocator's on a GPU,
    the process's on a CPU (None where there is no glibc and Linux to ask)."""

    def held(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key))

    peak = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append((torch.cuda.max_memory_allocated(device) - before) / 1e6)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would serve again unseen
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = held("VmRSS")
    except (OSError, AttributeError):
        yield peak
        peak.append(None)
    else:
        yield peak
        peak.append((held("VmHWM") - before) * 1024 / 1e6)


# ---------------------------------------------------------------- panels and predictions


@torch.inference_mode()
def draw_panels(networks: Networks, dataset, chosen, args, anomalies=False) -> list:
    """PNG panels of the images `chosen` as (title, index); returns (title, file) of each.

    With `anomalies` the data set's labels are masks of an OOD set.
    """
    files = []
    for title, index in chosen:
        image, labels, _ = dataset[index]
        outputs = predict(networks, image[None].to(args.device), labels.shape, args)
        rows = []
        for name in ("student", "teacher"):
            if name in outputs:
                maps = outputs[name].probs[0].argmax(0), outputs[name].scores[args.primary[name]][0]
                rows.append((name, *(values.cpu().numpy() for values in maps)))
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        photo = photo.resize(labels.shape[::-1], Image.BILINEAR)
        measure = args.primary["teacher"]
        shown = "std of predicted class's prob." if measure == "std" else measure.replace("_", " ")
        sheet = panel(photo, labels.numpy(), rows, args.palette, args.classes, anomalies, shown)
        path = args.out / "panels" / f"{title.replace(' ', '_')}_{dataset.stem(index)}.png"
        sheet.save(path)
        files.append((f"{title}: {dataset.stem(index)}", path))
    return files


def choose_images(accuracy: list[float], count: int) -> list[tuple[str, int]]:
    """(name, index) of images from the best to the worst by pixel accuracy, evenly spread."""
    order = [i for i in np.argsort(accuracy)[::-1] if not math.isnan(accuracy[i])]
    last, count = len(order) - 1, min(count, len(order))
    places = [last * k // max(1, count - 1) for k in range(count)]
    names = {last: "worst", last // 2: "median", 0: "best"}
    return [(names.get(place, f"rank {place + 1}"), int(order[place])) for place in places]


@torch.inference_mode()
def predict_files(networks: Networks, args: argparse.Namespace) -> None:
    """--predict: the maps of each image, subfolders kept; what is no image is skipped and counted.

    They have its name without the suffix, or with it where a neighbour differs in nothing else.
    """
    source, started, skipped = args.predict, time.monotonic(), []
    if not source.exists():
        raise UsageError(f"--predict {source}: no such file or folder; check the path")
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    taken = Counter([*files, *(path.with_suffix("") for path in files)])
    args.out.mkdir(parents=True, exist_ok=True)
    for done, path in enumerate(files, 1):
        try:
            image = data.read_image(path)
        except data.DataError:
            skipped.append(path.name)
        else:
            name = path.with_suffix("") if taken[path.with_suffix("")] == 1 else path
            name = name.relative_to(source if source.is_dir() else source.parent)
            save_maps(networks, image, args, args.out / name)
        show_progress(done, len(files), started)
    print(f"{len(files) - len(skipped)} images in {args.out}", end="")
    print(f"; {len(skipped)} skipped, not images: {', '.join(skipped[:5])}" if skipped else "")


LARGE = 2**22  # pixels at which all classes' probabilities are held at once
TILE, CONTEXT = 1024, 128  # pixels: side of a tile, and what it sees around itself


def predict_maps(networks: Networks, image: Image.Image, args) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers uint8 [H, W] and uncertainty float32 [H, W] in [0, 1] of an image of any size.

    A large one goes through the networks in tiles that see their surroundings; where --image-size
    reduces it anyway, a smaller map is enlarged instead.
    """
    name = "student" if "student" in networks else "teacher"
    networks = {name: networks[name]}
    width, height = image.size

    def maps(part: Image.Image, size: tuple[int, int]):
        pixels = data.to_input(part, data.in_proportion(part, args.image_size))
        pixels = pixels[None].to(args.device)
        output = predict(networks, pixels, size, args)[name]
        u = output.scores[args.primary[name]][0] / unit(args.primary["teacher"], len(args.classes))
        u = u.clamp(0, 1)
        return output.probs[0].argmax(dim=0).to(torch.uint8).cpu().numpy(), u.cpu().numpy()

    if height * width <= LARGE:
        return maps(image, (height, width))
    if args.image_size:
        factor = math.sqrt(LARGE / (height * width))
        small = maps(image, tuple(max(1, int(factor * side)) for side in (height, width)))
        methods = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
        return tuple(np.asarray(Image.fromarray(values).resize((width, height), method))
                     for values, method in zip(small, methods, strict=True))  # fmt: skip
    labels, u = np.zeros((height, width), np.uint8), np.zeros((height, width), np.float32)
    for top, left in itertools.product(range(0, height, TILE), range(0, width, TILE)):
        y, x = max(0, top - CONTEXT), max(0, left - CONTEXT)
        part = image.crop((x, y, min(width, left + TILE + CONTEXT),
                           min(height, top + TILE + CONTEXT)))  # fmt: skip
        inside = slice(top - y, top - y + TILE), slice(left - x, left - x + TILE)
        place = slice(top, top + TILE), slice(left, left + TILE)
        for whole, values in zip((labels, u), maps(part, part.size[::-1]), strict=True):
            whole[place] = values[inside]
    return labels, u


def save_maps(networks: Networks, image: Image.Image, args, path: Path) -> None:
    """<path>_classes.png (indexed), _overlay.png, _uncertainty.png (viridis, up to the image's
    maximum) and _uncertainty16.png (u * 65535, 16-bit grey)."""
    labels, u = predict_maps(networks, image, args)
    classes, colours = Image.fromarray(labels).convert("P"), colourise(labels, args.palette)
    classes.putpalette(np.array(args.palette, np.uint8).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    classes.save(f"{path}_classes.png")
    Image.blend(image, Image.fromarray(colours), 0.5).save(f"{path}_overlay.png")
    Image.fromarray(viridis(u / max(u.max(), 1e-6))).save(f"{path}_uncertainty.png")
    Image.fromarray((u * 65535).round().astype(np.uint16)).save(f"{path}_uncertainty16.png")


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
    table[: len(palette)] = palette
    return table[np.asarray(labels, dtype=np.uint8)]


def panel(photo: Image.Image, labels, rows, palette, names, anomalies: bool, shown: str):
    """The paper's five columns: image, ground truth, prediction, accuracy map, uncertainty.

    labels: `[H, W]`, class ids (254 and 255 are void) or, with `anomalies`, 0, 1 anomaly, 255 void.
    rows: one `(model name, prediction [H, W], uncertainty [H, W])` a network, one below the other.
    shown: what the colour bar tells. Returns an image.
    """
    size = tuple(max(1, round(side * PANEL_SIDE / max(photo.size))) for side in photo.size)
    width, height = max(size[0], 260) + MARGIN, size[1] + 40  # of a cell, with title and gap
    top = max(1e-6, *(float(np.nanmax(uncertainty)) for _, _, uncertainty in rows))
    maps = [prediction for _, prediction, _ in rows] + ([] if anomalies else [labels])
    legend = [(c, name) for c, name in (*enumerate(names), (data.VOID, "void"))
              if any((m == c).any() for m in maps)]
    strip = MARGIN + height * len(rows)  # where legend and colour bar begin
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
    if anomalies:
        mask = Image.fromarray(255 * (labels == 1).astype(np.uint8)).resize(size)
        edge = np.asarray(mask.filter(ImageFilter.MaxFilter(7))) > np.asarray(mask)
        outlined = np.where(edge[..., None], OUTLINE, np.asarray(photo.resize(size)))
        put(0, 1, "anomaly, outlined", outlined.astype(np.uint8))
    else:
        put(0, 1, "ground truth", colourise(labels, palette))
    for i, (name, prediction, uncertainty) in enumerate(rows):
        put(i, 2, f"{name}: prediction", colourise(prediction, palette))
        white = labels != (0 if anomalies else prediction)  # void differs from every class
        put(i, 3, f"white: {'anomaly' if anomalies else 'wrong'} or void", white)
        put(i, 4, f"{name}: uncertainty", viridis(uncertainty / top))
    for i, (c, name) in enumerate(legend):
        x, y = MARGIN + i % 4 * width, strip + 28 * (i // 4)
        draw.rectangle((x, y, x + 19, y + 19), fill=tuple(colourise(c, palette).tolist()))
        draw.text((x + 28, y), name, fill=INK)
    x, right = MARGIN + 4 * width, 5 * width
    ramp = viridis(np.tile(np.linspace(0, 1, right - x), (20, 1)))
    sheet.paste(Image.fromarray(ramp), (x, strip))
    draw.text((x, strip + 24), "0", fill=INK)
    draw.text((right, strip + 24), f"{top:.3g}", fill=INK, anchor="ra")
    draw.text(((x + right) / 2, strip + 46), shown, INK, anchor="ma")
    return sheet


# ---------------------------------------------------------------- charts

# Okabe-Ito without its yellow: distinct to the colour-blind, visible on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#8a8a8a")
DASHES = ("none", "6 5", "1 5")
CHART_WIDTH, LEFT, RIGHT, TOP, BOTTOM = 420, 44, 408, 50, 250  # of the SVG, and its plot's edges


def _ticks(values, low, high) -> list[float]:
    """About five round numbers that span low to high, or where they are None the values."""
    seen = [v for v in values if math.isfinite(v)]
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


def line_chart(title, series, xlabel, ylabel, limits, diagonal=False) -> str:
    """Curves as an SVG string.

    series: `(label, xs, ys, colour index, dash index)`; NaN breaks the line. limits: `(x0, x1, y0,
    y1)`, None where the data decide. diagonal: draw y = x.
    """
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
        series = [*series, ("y = x", ends, ends, 3, 2)]
    for i, (label, xs, ys, colour, dash) in enumerate(series):
        line = (f'stroke="{COLOURS[colour]}" stroke-dasharray="{DASHES[dash]}" stroke-width="2" '
                'stroke-linecap="round" stroke-linejoin="round"')
        path, joined = "", False
        for x, y in zip(xs, ys, strict=True):
            if known := math.isfinite(x + y):  # "h0" makes a dot of a point that stands alone
                path += ("L" if joined else "M") + "{:.1f} {:.1f}h0".format(*point(x, y))
            joined = known
        x, y = i % 2 * CHART_WIDTH / 2, BOTTOM + 57 + 18 * (i // 2)  # the legend, two in a line
        parts += [f'<path d="{path}" {line}/>', f'<path d="M{x + 1} {y - 4}h22" {line}/>',
                  _text(x + 30, y, label)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" role="img" fill="none" '
            f'viewBox="0 0 {CHART_WIDTH} {BOTTOM + 65 + 18 * ((len(series) - 1) // 2)}" '
            'font-family="system-ui,sans-serif" font-size="11">'
            f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>")


def chart_sheet(charts: list[str]) -> str:
    """Charts side by side as an SVG file of their own, on white."""
    heights = [int(chart.split('viewBox="0 0 ')[1].split('"')[0].split()[1]) for chart in charts]
    width, height = (CHART_WIDTH + 10) * len(charts) + 6, max(heights) + 16
    placed = "".join(chart.replace("<svg ", f'<svg x="{(CHART_WIDTH + 10) * i}" y="0" '
                                   f'width="{CHART_WIDTH}" height="{h}" ', 1)
                     for i, (chart, h) in enumerate(zip(charts, heights, strict=True)))  # fmt: skip
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {width} {height}" '
            f'width="{width}" color="#444" style="background:#fff">{placed}</svg>\n')


# ---------------------------------------------------------------- tables and report

COLUMNS = {  # key in metrics.json: heading with the better side, factor, digits
    "miou": ("mIoU % ↑", 100, 2), "pixel_accuracy": ("pixel acc. % ↑", 100, 2),
    "nll": ("NLL ↓", 1, 4), "brier": ("Brier ↓", 1, 4), "ece": ("ECE % ↓", 100, 2),
    "auroc": ("AUROC % ↑", 100, 2), "ap": ("AP % ↑", 100, 2), "fpr95": ("FPR95 % ↓", 100, 2),
    "component_f1": ("comp. F1 % ↑", 100, 2), "image_auroc_p99": ("image AUROC ↑", 100, 2),
    "aurc": ("AURC ↓", 1, 4), "ause": ("AUSE ↓", 1, 4), "rmse": ("RMSE ↓", 1, 4),
    "rmsle": ("RMSLE ↓", 1, 4), "pearson": ("Pearson ↑", 1, 3), "spearman": ("Spearman ↑", 1, 3),
    "class_error": ("class error ↓", 1, 4), "parameters": ("parameters, M", 1e-6, 2),
    "ms_per_image": ("ms / image ↓", 1, 1), "images_per_second": ("images / s ↑", 1, 2),
    "compiled_ms_per_image": ("compiled, ms ↓", 1, 1),
    "peak_memory_mb": ("memory, MB ↓", 1, 0), "iou": ("IoU %", 100, 1),
    "uncertainty": ("uncertainty", 1, 4)}
MODELS = ("student", "teacher", "member")  # the place is the model's colour in every chart
DRAWN = {"": 0, "dudes": 0, "std": 0, "entropy": 1}  # the scores in the charts and their dashes


def _number(figures: dict, key: str) -> str:
    """A number as text, mean ± standard deviation where it has those, a dash if it is unknown."""
    _, factor, digits = COLUMNS[key]
    values = [figures.get(key + end) for end in ("", "_mean", "_std")]
    return " ± ".join(f"{v * factor:,.{digits}f}" for v in values if v is not None) or "–"


def _ordered(scores: dict) -> list[tuple[str, str, dict]]:
    """(model, score or "", figures) of `{"model/score" or "model": figures}`, student first."""
    rows = [(*key.partition("/")[::2], figures) for key, figures in scores.items() if figures]
    return sorted(rows, key=lambda row: (*MODELS, row[0]).index(row[0]))


def _table(scores: dict, *keys: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, all of it text."""
    rows = [[f"{network} {score}".replace("_", " "), *(_number(figures, key) for key in keys)]
            for network, score, figures in _ordered(scores)]
    return ["", *(COLUMNS[key][0] for key in keys)], rows


def results_table(results: dict) -> str:
    """The results as aligned ASCII text, at most 100 columns wide; - is unknown."""
    plain, lines = str.maketrans({"±": "+-", "–": "-", "↑": "", "↓": ""}), []
    for title, _, (headings, rows), _ in _sections(results):
        if rows and title not in ("Classes", "Protocol"):
            for label, *cells in ([""], [title, *headings[1:]], *rows):
                cells = [cell.translate(plain).strip() for cell in cells]
                lines.append(f"{label:<34.34}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines[1:])


def _html_table(head, rows) -> str:
    """A table that scrolls inside its own box; nothing without rows."""
    lines = ["<th>" + "<th>".join(html.escape(cell) for cell in head)]
    lines += ["<th>" + "<td>".join(html.escape(cell) for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{"<tr>".join(lines)}</table></div>' if rows else ""


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


def _chart(name: str, scores: dict) -> str:
    """The SVG of one kind of curve for every score that is drawn; empty where there is none."""
    title, number, keys, xlabel, ylabel, limits, _ = FIGURES[name]
    series = []
    for network, score, figures in _ordered(scores):
        if name in figures and network in MODELS and score in DRAWN:
            points = figures[name]
            # a rejection curve is a bare list: a value for every tenth of the pixels ignored
            points = [points[key] for key in keys] if keys else [np.arange(10) / 10, points]
            label = f"{network} {score} {_number(figures, number) if number else ''}"
            xs, ys = 100 * np.array(points, dtype=float)
            series.append((label, xs, ys, MODELS.index(network), DRAWN[score]))
    diagonal = name in ("reliability", "roc")
    return line_chart(title, series, xlabel, ylabel, limits, diagonal) if series else ""


def _curve(name: str, scores: dict) -> str:
    """The chart with what is good about it."""
    chart = _chart(name, scores)
    return chart and _figure(chart, FIGURES[name][-1])


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _density(fidelity: dict) -> str:
    """The joint histogram of both uncertainties as a picture inside an empty chart."""
    counts = np.array(fidelity["density"], dtype=float)  # [student's, teacher's], from 0 up
    shade = viridis(np.log1p(counts) / np.log1p(counts.max() or 1))
    pixels = np.dstack([shade, np.where(counts > 0, 255, 0).astype(np.uint8)])  # empty: transparent
    png, top = io.BytesIO(), fidelity["density_max"]
    Image.fromarray(pixels[::-1].copy()).save(png, "PNG")
    share = top / _ticks([], 0, top)[-1]  # of the axes, which end at a round number
    width, height = share * (RIGHT - LEFT), share * (BOTTOM - TOP)
    picture = (f'<image x="{LEFT}" y="{BOTTOM - height}" width="{width}" height="{height}" '
               'preserveAspectRatio="none" image-rendering="pixelated" '
               f'href="{_data_uri(png.getvalue())}"/>')
    note = "Good: a narrow ridge on the diagonal. Below it the student is surer than its teacher."
    measure = fidelity["measure"].replace("_", " ")
    chart = line_chart("Pixels by uncertainty, yellow where most are", [], f"teacher: {measure}",
                       f"student: predicted {measure}", (0, top, 0, top), diagonal=True)
    return _figure(chart.replace("</title>", "</title>" + picture), note)


def _headline(results: dict) -> str:
    """The outcome in one sentence, made from the numbers that are there."""
    def listed(part, number, keys):
        values = {key.replace("/", " "): results[part].get(key, {}).get(number) for key in keys}
        return ", ".join(f"{100 * v:.1f}\u00a0% ({k})" for k, v in values.items() if v is not None)

    text = f"The mIoU is {listed('segmentation', 'miou', MODELS) or 'unknown'}"
    scores = ("student/dudes", "teacher/std", "student/entropy", "member/entropy")
    if auroc := listed("uncertainty", "auroc", scores):
        text += f"; wrong pixels are found with an AUROC of {auroc}"
    times = [results["timing"].get(name, {}).get("ms_per_image") for name in MODELS[:2]]
    if all(times):
        text += f"; the student takes {100 * times[0] / times[1]:.0f}\u00a0% of the teacher’s time"
    return text + "."


def _sections(results: dict, panels=()):
    """Yields (heading, how to read it, the table's (headings, rows), HTML below the table)."""
    segmentation, uncertainty = results["segmentation"], results["uncertainty"]
    fidelity, classes, detection = results["fidelity"], results["classes"], ("auroc", "ap", "fpr95")
    yield ("Segmentation", "Arrows point to the better side.",
           _table(segmentation, "miou", "pixel_accuracy", "nll", "brier", "ece"),
           _curve("reliability", segmentation))
    yield ("Finding errors", "Positive is a wrong pixel; each network is asked for its own errors.",
           _table(uncertainty, *detection, "aurc", "ause"),
           "".join(_curve(c, uncertainty) for c in ("rejection", "risk_coverage", "roc", "pr")))
    for name, scores in results["ood"].items():
        settings = described(results["protocol"]["ood"][name])
        yield (f"Anomalies: {name}", "Positive is a pixel, a connected component or an image of "
               f"what was never trained on. {settings}",
               _table(scores, *detection, "component_f1", "image_auroc_p99"),
               _curve("roc", scores) + _curve("pr", scores))
    yield ("Fidelity", "How closely the student’s uncertainty follows its teacher’s, by pixel.",
           _table({"student": fidelity}, "rmse", "rmsle", "pearson", "spearman", "class_error"),
           _density(fidelity) if fidelity else "")
    columns = [(kind, name) for kind in ("iou", "uncertainty") for name in MODELS
               if any(row[kind].get(name) is not None for row in classes)]
    head = ["class", *(f"{name} {COLUMNS[kind][0]}" for kind, name in columns)]
    rows = [[row["name"], *(_number({kind: row[kind][name]}, kind) for kind, name in columns)]
            for row in classes]
    yield ("Classes", "Uncertainty: mean over the pixels that a network predicts as the class.",
           (head, rows), "")
    cost = ("parameters", "ms_per_image", "images_per_second", "compiled_ms_per_image",
            "peak_memory_mb")  # fmt: skip
    yield "Cost", "From pixels to class and uncertainty.", _table(results["timing"], *cost), ""
    pictures = ((f'<img alt="" src="{_data_uri(file.read_bytes())}">', title)
                for title, file in panels)
    yield ("Images", "Good: uncertainty is bright where the accuracy map is white.",
           ([], []), "".join(_figure(*picture) for picture in pictures))
    rows = [[k, "–" if v is None else str(v)] for k, v in results["protocol"].items() if k != "ood"]
    yield "Protocol", "What the numbers depend on.", (["setting", "value"], rows), ""


def report(results: dict, panels: list[tuple[str, Path]]) -> str:
    """One HTML page that needs nothing else, no script, no network.

    results: the content of metrics.json. panels: `(title, PNG file)`, in the order to show them.
    """
    title = html.escape(f"Uncertainty report: {results['protocol']['dataset']}")
    body = ""
    for heading, line, table, content in _sections(results, panels):
        if content := _html_table(*table) + content:
            body += f"<h2>{html.escape(heading)}</h2><p>{line}</p>{content}"
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{title}</h1>'
            f'<p class="lead">{html.escape(_headline(results))}</p>{body}</body></html>\n')


# ---------------------------------------------------------------- command line


def open_networks(args: argparse.Namespace) -> tuple[Networks, dict]:
    """Student and teacher that are named or, without any name, those that are in ckpts/; and a
    checkpoint to take the defaults from."""
    networks, checkpoint = {}, None
    if not (args.student or args.teacher):
        path = Path("ckpts/student.pt")
        args.student = path if path.exists() else None
        args.teacher = ["ckpts"] if any(Path("ckpts").glob("member_[0-9]*.pt")) else None
    if args.teacher:
        networks["teacher"], checkpoint = model.load_ensemble(args.teacher, args.mc_samples)
    elif args.mc_samples:
        raise UsageError(f"--mc-samples {args.mc_samples} samples one network: name --teacher FILE")
    if path := args.student:
        other, checkpoint = checkpoint, model.read_checkpoint(path)
        networks["student"] = model.build_model(checkpoint, path)
        if not checkpoint["config"]["measures"]:
            raise UsageError(f"{path} is no student: it predicts no uncertainty; distil one, or "
                             "name it as --teacher FILE with --mc-samples N")
        for key in ("classes", "dataset"):
            if other and other["config"][key] != checkpoint["config"][key]:
                raise UsageError(f"the student {path} and the teacher know different {key}; "
                                 "evaluate them one by one")
    if not networks:
        raise UsageError("nothing to evaluate: no ckpts/student.pt and no ckpts/member_*.pt; "
                         "train first, or name --student FILE or --teacher DIR")
    for network in networks.values():
        network.to(args.device, memory_format=torch.channels_last)
    return networks, checkpoint


def resolve(args: argparse.Namespace, checkpoint: dict) -> None:
    """What the command leaves open is as the checkpoint was trained; refuses what cannot be."""
    trained, config, cuda = checkpoint["args"], checkpoint["config"], args.device.startswith("cuda")
    args.measures = config["measures"]  # the student's; the teacher's checkpoint has none
    told = ("views", "uncertainty_weight", "distill_probs", "strong_views", "extra")
    args.distilled = {key: trained[key] for key in told if key in trained} or None
    first = "std" if "std" in args.measures else (args.measures or ["std"])[0]
    # what each network is known by: in panels, in the report, by class
    args.primary = {"student": distilled(first), "teacher": first, "member": "entropy"}
    if args.dataset in (None, trained["dataset"]) and trained["data"]:
        args.data = args.data or Path(trained["data"])
    args.dataset = args.dataset or trained["dataset"]
    args.image_size = args.image_size or config["image_size"]
    args.classes, args.palette = config["classes"], [tuple(colour) for colour in config["palette"]]
    args.amp = choose_amp(args.amp, torch.device(args.device))
    if args.workers is None:
        args.workers = 4 if cuda else 0
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--workers", args.workers, 0),
                               ("--image-size", min(args.image_size or [1]), 1),
                               ("--panels", args.panels, 0)):
        if value < least:
            raise UsageError(f"{flag} {value}: has to be at least {least}")
    for flag, alone in (("--ood", args.ood is not None), ("--benchmark", args.benchmark),
                        ("--save-scores", args.save_scores)):
        if args.predict and alone:
            raise UsageError(f"--predict writes maps alone; run {flag} in a command of its own")
    if args.in_distribution and args.ood is None:
        raise UsageError("--in-distribution is for the images of --ood, which is missing")
    own = "held-out" if config["hold_out"] else "pasted"
    own = "synthetic" if args.dataset == "synthetic" else own
    args.ood_sets = [] if args.ood is None else list(dict.fromkeys(args.ood or [own]))
    if "held-out" in args.ood_sets and not config["hold_out"]:
        raise UsageError("--ood held-out: the checkpoint has no held-out classes; "
                         "train with --hold-out CLASS ...")


def protocol(args: argparse.Namespace, dataset, networks: Networks, pixels: int) -> dict:
    """What the figures depend on."""
    return {
        "dataset": args.dataset, "split": args.split, "images": len(dataset),
        "labelled_pixels": pixels, "classes": len(dataset.classes),
        "held_out": ", ".join(dataset.hold_out) or None,
        "network_input": "x".join(map(str, args.image_size or [])) or "native size",
        "evaluated_at": "native size of the labels, softmax after upsampling",
        "pooling": "all labelled pixels of the split", "void": "labels 255 never count",
        "scores": "rounded to float16, equal scores are one threshold",
        "members": len(networks.get("teacher", ())), "mc_samples": args.mc_samples,
        "teacher": " ".join(map(str, args.teacher)) if args.teacher else None,
        "student": str(args.student) if args.student else None, "distilled": args.distilled,
        "amp": args.amp, "device": args.device} | model.versions()


def open_ood_sets(args: argparse.Namespace, dataset) -> list[data.OODSet]:
    """What --ood names; UsageError where two of them would share a name."""
    ood_sets = [data.open_ood(spec, dataset) for spec in args.ood_sets]
    for name, count in Counter(ood.name for ood in ood_sets).items():
        if count > 1:
            raise UsageError(f"--ood names {count} sets {name}; evaluate them one by one")
    return ood_sets


def measure(networks: Networks, dataset, ood_sets, others, args) -> tuple[dict, list[float]]:
    """The content of metrics.json, and each image's pixel accuracy. others: in-distribution images
    for --ood, None for those of the evaluation split."""
    print(f"{args.dataset} {args.split}: {len(dataset)} images", flush=True)
    results, accuracy, normal = evaluate_split(networks, dataset, args)
    if others:
        normal = image_scores_of(networks, others, args)
    protocols = {}
    for ood in ood_sets:
        more = {} if ood.name == "held-out" and not others else normal  # they are the same images
        results["ood"][ood.name], protocols[ood.name] = evaluate_ood(networks, ood, more, args)
        print(f"OOD {ood.name}: {described(protocols[ood.name])}", flush=True)
    results["timing"] = benchmark(networks, dataset[0].image, args) if args.benchmark else {}
    pixels = next(iter(results["segmentation"].values()))["n"]
    settings = protocol(args, dataset, networks, pixels)
    results = {"protocol": settings | {"ood": protocols}} | results
    # JSON knows no NaN: null takes its place
    return json.loads(json.dumps(results), parse_constant=lambda name: None), accuracy


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- networks and data
    args.device = str(choose_device(args.device))
    networks, checkpoint = open_networks(args)
    resolve(args, checkpoint)
    json_file, html_file = args.out / "metrics.json", args.out / "report.html"
    if args.predict is not None:
        predict_files(networks, args)
        return
    hold_out = checkpoint["config"]["hold_out"]
    dataset = data.open_dataset(args.dataset, args.data, args.split, args.image_size, hold_out)
    if dataset.classes != args.classes:
        known, found = (", ".join(names) for names in (args.classes, dataset.classes))
        raise UsageError(f"the networks know the classes {known}, {args.dataset} has {found}; "
                         "evaluate on the data set they were trained on")
    ood_sets = open_ood_sets(args, dataset)
    folder = args.in_distribution
    others = folder and data.open_images("--in-distribution", folder, args.image_size)

    (args.out / "panels").mkdir(parents=True, exist_ok=True)
    with locked(json_file):
        # ------------------------------------------------------------ measurements
        results, accuracy = measure(networks, dataset, ood_sets, others, args)

        # ------------------------------------------------------------ report
        panels = draw_panels(networks, dataset, choose_images(accuracy, args.panels), args)
        for ood in ood_sets:
            chosen = [(f"OOD {ood.name}", i) for i in range(min(args.panels, len(ood.dataset), 3))]
            panels += draw_panels(networks, ood.dataset, chosen, args, anomalies=True)
        model.save_atomically(json_file, json.dumps(results, indent=1, allow_nan=False) + "\n")
        model.save_atomically(html_file, report(results, panels))
        charts = [_chart(name, results["uncertainty"]) for name in ("rejection", "risk_coverage")]
        model.save_atomically(args.out / "rejection.svg", chart_sheet(charts))
    print(results_table(results))
    print(f"\n{json_file}  {html_file}  {len(panels)} panels in {args.out / 'panels'}")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line; None is filled in by `resolve`."""
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument_group("networks").add_argument
    add("--student", type=Path, metavar="FILE", help="(default, where no network is named: "
        "ckpts/student.pt if it is there)")
    add("--teacher", nargs="+", metavar="DIR|FILE", help="(default, where no network is named: "
        "ckpts/member_*.pt if they are there)")
    add("--mc-samples", type=int, default=0, metavar="N", help="dropout samples of one --teacher")
    add = parser.add_argument_group("data (default: as the networks were trained)").add_argument
    add("--dataset", choices=data.DATASETS)
    add("--data", type=Path, metavar="DIR", help="folder of the data set")
    add("--split", default="val", help="(default: val)")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels of the networks' input")
    add = parser.add_argument_group("what to do").add_argument
    add("--ood", nargs="*", metavar="SPEC", help="anomaly detection on synthetic, held-out, "
        "pasted, a folder, or NAME:PATH with NAME one of " + ", ".join(data.OOD_LAYOUTS)
        + "; several may follow (none: what the data set offers)")
    add("--in-distribution", type=Path, metavar="DIR", help="images that no anomaly is in, as the "
        "negatives of image-level detection (default: the evaluation split)")
    add("--save-scores", type=Path, metavar="DIR", help="keep float16 maps of every score")
    add("--predict", type=Path, metavar="DIR|FILE", help="only write the maps of these images")
    add("--benchmark", action="store_true", help="time the networks as well, at --image-size and "
        "--batch-size")
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="time them compiled too, which takes a minute (default: on)")
    add("--panels", type=int, default=5, metavar="N", help="images, best to worst (default: 5)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=int, default=4, help="images a batch; changes no figure but "
        "those of MC dropout (default: 4)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    add("--workers", type=int, help="processes that load (default: 0 on a CPU, else 4)")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="arithmetic of the networks; logits, softmax and scores are float32 (default: bf16 "
             "where the processor has it, else float32)")
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
