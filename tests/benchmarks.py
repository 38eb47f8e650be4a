"""Benchmarks: what the project costs, beside the published way to do the same.

    python tests/benchmarks.py                    # all sections
    python tests/benchmarks.py loader metrics     # some of them

Outline, a section each: loader, teacher, distill, inference, heads, train, metrics, gpu, small.

Not collected by pytest. Each section prints a table. Project and published way run in one process
and take turns; times are medians. Figures hold for one machine and its state: compare only what one
run prints.
"""

import argparse
import contextlib
import gc
import math
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters as compiler_counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import Cityscapes
from torchvision.models.segmentation import deeplabv3_resnet101
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import distill
import evaluate
import metrics
import train_ensemble
from model import (
    BACKBONES,
    DeepLabV3,
    Ensemble,
    autocast,
    build_model,
    choose_amp,
    choose_device,
    keep_freed_memory,
    predicted_class,
    predictive_statistics,
    upsample,
)

NUM_CLASSES = 19  # of Cityscapes

# ------------------------------------------------------------------ measuring


def seconds(function: Callable, device: torch.device, repeats: int = 1, warmup: int = 0) -> float:
    """Mean wall-clock seconds of a call, the device's work included."""
    for _ in range(warmup):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def run_once(candidates: dict[str, Callable], device: torch.device) -> tuple[dict, dict]:
    """What each candidate returns, and the megabytes by which the memory grew meanwhile."""
    results = {}
    memory = {}
    for name, function in candidates.items():
        with evaluate.peak_memory(device) as peak:
            results[name] = function()
        memory[name] = peak.megabytes
    return results, memory


def take_turns(
    candidates: dict[str, Callable], device: torch.device, turns: int
) -> dict[str, list[float]]:
    """Seconds of each of `turns` calls of every candidate, after one call to warm up."""
    spent = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, function in candidates.items():
            duration = seconds(function, device)
            if turn > 0:
                spent[name].append(duration)
    return spent


def print_comparison(
    title: str, spent: dict[str, list[float]], memory: dict[str, float], note: str
) -> None:
    """Median and spread of the times, the ratio to the published way, and peak memory."""
    published = statistics.median(spent["published"])
    rows = []
    for name, times in spent.items():
        median = statistics.median(times)
        spread = f"{1000 * min(times):,.1f}-{1000 * max(times):,.1f}"
        faster = f"{published / median:.2f}x"
        peak = memory.get(name, "")  # not every candidate's memory is measured
        rows.append([name, 1000 * median, spread, faster, peak])
    turns = len(spent["published"])
    print_table(title, ["", "ms", f"of {turns}", "faster", "peak MB"], rows)
    print(note)


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    """First column to the left, the others to the right; numbers with two digits."""
    cells = [header]
    for row in rows:
        cells.append([x if isinstance(x, str) else f"{x:,.2f}" for x in row])
    widths = []
    for column in range(len(header)):
        widths.append(max(len(row[column]) for row in cells))
    print(f"\n{title}")
    for row in cells:
        line = f"{row[0]:<{widths[0]}}"
        for cell, width in zip(row[1:], widths[1:], strict=True):
            line += f"  {cell:>{width}}"
        print(line, flush=True)


# ------------------------------------------------------------------ loader

# The raw values of the 19 classes, by label.
CITYSCAPES_CLASSES = [c for c in Cityscapes.classes if 0 <= c.train_id < 19]
CITYSCAPES_IDS = [c.id for c in sorted(CITYSCAPES_CLASSES, key=lambda c: c.train_id)]
FRAMES = 16
CROP = 768


def write_cityscapes(root: Path, count: int) -> None:
    """Frames of 1024 x 2048 in the publisher's layout, as smooth and as noisy as photographs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 32, 3)).astype(np.uint8))
        smooth = coarse.resize((2048, 1024), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth).astype(int)
        pixels = (pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8)
        blocks = rng.integers(0, 34, (16, 32))
        ids = np.kron(blocks, np.ones((64, 64), int)).astype(np.uint8)

        stem = f"train/city/city_{number:06d}_000000"
        image_path = root / f"leftImg8bit/{stem}_leftImg8bit.png"
        mask_path = root / f"gtFine/{stem}_gtFine_labelIds.png"
        image_path.parent.mkdir(parents=True, exist_ok=True)
        mask_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image_path)
        Image.fromarray(ids).save(mask_path)


def published_sample(
    image: Path, mask: Path, rng: np.random.Generator, crop: int
) -> tuple[Tensor, Tensor]:
    """A training sample as the paper's public loader makes it.

    Floats first, every label of the table in turn, the whole frame resized, padded on both sides,
    flipped, cropped last.
    """
    pixels = to_tensor(Image.open(image))
    labels = np.array(Image.open(mask))
    ignored = [raw for raw in range(34) if raw not in CITYSCAPES_IDS]
    for raw in [*ignored, -1]:
        labels[labels == raw] = 255
    for label, raw in enumerate(CITYSCAPES_IDS):
        labels[labels == raw] = label
    labels = torch.tensor(labels, dtype=torch.long)

    scale = rng.uniform(0.5, 1) if rng.random() < 0.5 else rng.uniform(1, 2)
    height = int(scale * labels.shape[0])
    width = int(scale * labels.shape[1])
    size = [height, width]
    pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
    labels = F.interpolate(labels[None, None].float(), size, mode="nearest")[0].long()

    rows = max(0, crop - height)
    columns = max(0, crop - width)
    border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    pixels = F.pad(pixels, border)
    labels = F.pad(labels, border, value=255)

    if rng.random() < 0.5:
        pixels = pixels.flip(-1)
        labels = labels.flip(-1)
    top = int(rng.integers(labels.shape[1] - crop + 1))
    left = int(rng.integers(labels.shape[2] - crop + 1))
    rows = slice(top, top + crop)
    columns = slice(left, left + crop)
    return pixels[:, rows, columns], labels[:, rows, columns]


def equal_samples(first: data.Sample, second: data.Sample) -> bool:
    """Whether all fields of two training samples are the same."""
    for a, b in zip(first, second, strict=True):
        if not torch.equal(torch.as_tensor(a), torch.as_tensor(b)):
            return False
    return True


def bench_loader(args: argparse.Namespace) -> None:
    """A training sample of 768 x 768 from PNG frames of 1024 x 2048, by one thread, as in a process
    of a DataLoader.

    The mean of an epoch with equal scales: the published way's time goes with their square.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stream = [1, 2, 3]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_cityscapes(root, FRAMES)
        plain = data.open_dataset("cityscapes", root, "train")
        cached = data.open_dataset("cityscapes", root, "train")
        data.cache_decoded(cached, root / "cache")

        def published(key: tuple[int, int]) -> tuple[Tensor, Tensor]:
            epoch, index = key
            rng = np.random.default_rng([*stream, 0, epoch, index])
            return published_sample(plain.images[index], plain.masks[index], rng, CROP)

        scale = (0.5, 2)
        ways = {
            "published": published,
            "from files": data.TrainingViews(plain, (CROP, CROP), scale, stream).__getitem__,
            "from --cache": data.TrainingViews(cached, (CROP, CROP), scale, stream).__getitem__,
        }
        spent = {name: [] for name in ways}
        agree = True
        for epoch in range(9):
            times = dict.fromkeys(ways, 0.0)
            for index in range(FRAMES):
                samples = {}
                for name, way in ways.items():
                    start = time.perf_counter()
                    samples[name] = way((epoch, index))
                    times[name] += (time.perf_counter() - start) / FRAMES
                agree &= equal_samples(samples["from files"], samples["from --cache"])
            if epoch > 0:  # the first one warms up
                for name in ways:
                    spent[name].append(times[name])

        first_samples = {name: partial(way, (0, 0)) for name, way in ways.items()}
        _, memory = run_once(first_samples, torch.device("cpu"))
    torch.set_num_threads(threads)
    print_comparison(
        "loader: a sample of 768 x 768 from PNG of 1024 x 2048, one thread",
        spent,
        memory,
        f"samples from files and from --cache are equal: {agree}",
    )


# ------------------------------------------------------------------ teacher


def published_statistics(logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All members stacked, softmax twice, the predicted class's std picked class by class."""
    stacked = torch.stack(logits)  # [M, B, C, H, W]
    probs = stacked.softmax(dim=2).mean(dim=0)
    std = stacked.softmax(dim=2).std(dim=0)
    prediction = probs.argmax(dim=1)
    uncertainty = torch.zeros_like(probs[:, 0])
    for c in range(probs.shape[1]):
        uncertainty = torch.where(prediction == c, std[:, c], uncertainty)
    return probs, uncertainty


def bench_teacher(args: argparse.Namespace) -> None:
    """Mean and predictive uncertainty of 10 members' logits, one crop of 768 x 768, 19 classes."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    logits = []
    for _ in range(10):
        noise = torch.randn(1, NUM_CLASSES, 768, 768, device=device, generator=generator)
        logits.append(4 * noise)
    ways = {
        "published": lambda: published_statistics(logits),
        "project": lambda: predictive_statistics(iter(logits)),
    }
    spent = take_turns(ways, device, 5)
    results, memory = run_once(ways, device)

    published_probs, published_std = results["published"]
    project = results["project"]
    # Where two classes tie, rounding decides which one is predicted, and so whose std it is.
    same_class = published_probs.argmax(dim=1) == project.probs.argmax(dim=1)
    probs_difference = (published_probs - project.probs).abs().max().item()
    std_difference = (published_std - project.std)[same_class].abs().max().item()
    difference = max(probs_difference, std_difference)
    ties = int((~same_class).sum())
    share = memory["project"] / memory["published"]
    print_comparison(
        "teacher: statistics of 10 members, 768 x 768, 19 classes",
        spent,
        memory,
        f"peak memory above the inputs {share:.2f} of the published way's; "
        f"largest difference {difference:.1e}, {ties} ties apart",
    )


# ------------------------------------------------------------------ distill


class Distillation:
    """A student of 10 resnet18 members on 64 images of 120 x 160, and 16 to validate on.

    views: as --views; with 0 no target is kept. folder: for the targets that are.
    """

    SIZE = (120, 160)
    TRAIN_IMAGES = 64
    VAL_IMAGES = 16

    def __init__(self, views: int, folder: Path, device: torch.device):
        torch.manual_seed(0)
        self.device = device
        self.epoch = 0
        members = [DeepLabV3("resnet18", 11) for _ in range(10)]
        self.teacher = Ensemble(members).to(device)
        self.student = DeepLabV3("resnet18", 11, ("std",)).to(device)

        train_set = data.open_dataset("synthetic", None, "train", self.SIZE)
        train_set.names = train_set.names[: self.TRAIN_IMAGES]
        val_set = data.open_dataset("synthetic", None, "val", self.SIZE)
        val_set.names = val_set.names[: self.VAL_IMAGES]
        train_file = folder / "train.npy" if views > 0 else None
        sampled = data.TrainingViews(
            train_set, self.SIZE, (0.5, 2.0), [1, 2, 3], views, targets_path=train_file
        )
        self.loader = data.training_loader(sampled, 8, 0, device)
        self.names = train_set.names
        self.val_loader = data.evaluation_loader(val_set, 8, 0, device)

        # What the loop of train_ensemble.py reads of its flags.
        self.flags = SimpleNamespace(
            device=device, amp="off", accumulate=1, epochs=40, warmup=0, lr=0.05, save_every=1000
        )
        self.optimizer = train_ensemble.build_optimizer(self.student, 0.05, 1.0, 5e-4)

        self.targets = distill.TeacherTargets(self.teacher, ["std"], with_probs=False, amp="off")
        if views > 0:
            largest = torch.full((1, 1, 1), metrics.MAX_STD, device=device)
            train_shape = (views, self.TRAIN_IMAGES, 1, *self.SIZE)
            val_shape = (1, self.VAL_IMAGES, 1, *data.SYNTHETIC_SIZE)
            val_file = folder / "val.npy"
            self.targets.train_cache = distill.TargetCache(train_file, train_shape, largest, {})
            self.targets.val_cache = distill.TargetCache(val_file, val_shape, largest, {})

    def train(self, loss_fn: Callable) -> None:
        """One epoch of training."""
        state = train_ensemble.RunState(epoch=self.epoch)
        run = train_ensemble.Run(
            path=Path("student.pt"),  # never written: nothing is saved within the epoch
            model=self.student,
            wrapped_model=self.student,
            optimizer=self.optimizer,
            scaler=torch.amp.GradScaler(self.device.type, enabled=False),
            state=state,
            image_names=self.names,
            signals=[],
        )
        num_batches = len(self.loader.batch_sampler)
        progress = train_ensemble.Progress("student", state, self.flags.epochs, num_batches)
        train_ensemble.train_one_epoch(run, loss_fn, self.loader, self.flags, progress)
        self.epoch += 1

    def project(self) -> None:
        """An epoch as distill.py runs it."""
        loss_fn = partial(
            distill.distillation_loss,
            targets=self.targets,
            uncertainty_weight=1.0,
            probs_weight=0.0,
        )
        self.train(loss_fn)
        target = self.targets.for_validation
        evaluate.validate(self.student, self.val_loader, self.device, "off", target)

    @torch.inference_mode()
    def published_target(
        self, images: Tensor, size: tuple[int, int] | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The std of a stacked teacher [B, H, W], computed anew; index is not used."""
        logits = [member(images, size).logits for member in self.teacher.members]
        return published_statistics(logits)[1]

    def published(self) -> None:
        """An epoch with a stacked teacher online, which also sees every validation image."""

        def loss_fn(network: nn.Module, batch: data.Sample) -> tuple[Tensor, dict]:
            target = self.published_target(batch.images).clone()  # out of inference mode
            prediction = network(batch.images)
            cross_entropy = train_ensemble.cross_entropy(prediction.logits, batch.labels)
            valid = batch.labels != data.IGNORED
            rmsle = distill.rmsle(prediction.uncertainty[:, 0], target, valid)
            return cross_entropy + rmsle, {}

        self.train(loss_fn)
        target = self.published_target
        evaluate.validate(self.student, self.val_loader, self.device, "off", target)

    def steps_off(self) -> float:
        """The largest difference of kept and published targets of a batch, in steps of 254."""
        batch = next(iter(self.loader))
        batch = batch._replace(
            images=batch.images.to(self.device), labels=batch.labels.to(self.device)
        )
        kept = self.targets.for_batch(batch).uncertainty[:, 0]  # [B, H, W]
        # The teacher sees the view unflipped, and its target is flipped with the view.
        flip = batch.flip.to(self.device)[:, None, None]
        unflipped = torch.where(flip[:, None], batch.images.flip(-1), batch.images)
        online = self.published_target(unflipped)
        online = torch.where(flip, online.flip(-1), online)
        difference = (online.sqrt() - kept.sqrt()).abs().max().item()
        return difference * 254 / metrics.MAX_STD**0.5


def bench_distill(args: argparse.Namespace) -> None:
    """Epochs of distillation: the published way, a view that is new, and one whose targets are
    kept; what they add up to over 40 and 200 epochs at the default --views.
    """
    device = torch.device(args.device)
    views = train_ensemble.RECIPES["camvid"]["views"]
    with tempfile.TemporaryDirectory() as folder:
        published = Distillation(0, Path(folder), device)
        project = Distillation(views, Path(folder), device)
        spent = {"published": [], "new view": [], "kept targets": []}
        for turn in range(4):
            published_time = seconds(published.published, device)
            project.epoch = turn  # a view that was not met yet
            new_time = seconds(project.project, device)
            project.epoch = views + turn  # the same view, which was now met
            kept_time = seconds(project.project, device)
            if turn == 0:
                # With the one pass of the teacher over the validation images.
                first_time = new_time
            else:
                spent["published"].append(published_time)
                spent["new view"].append(new_time)
                spent["kept targets"].append(kept_time)
        steps = project.steps_off()
        project.epoch = views
        ways = {"published": published.published, "kept targets": project.project}
        _, memory = run_once(ways, device)
    print_comparison(
        "distill: an epoch, 64 images of 120 x 160, 10 members",
        spent,
        memory,
        f"kept targets are within {steps:.2f} steps of 254 of the published ones",
    )
    published_time = statistics.median(spent["published"])
    new_time = statistics.median(spent["new view"])
    kept_time = statistics.median(spent["kept targets"])
    for epochs in (40, 200):
        published_total = published_time * epochs
        total = first_time + (views - 1) * new_time + (epochs - views) * kept_time
        print(
            f"{epochs} epochs, --views {views}: {published_total:,.0f} s published, {total:,.0f} s "
            f"here, {published_total / total:.2f}x faster (from these medians)"
        )


# ------------------------------------------------------------------ inference


class Passes(NamedTuple):
    """What a forward pass is measured on."""

    device: torch.device
    backbone: str
    image: Tensor  # uint8 [3, H, W]
    settings: evaluate.InferenceSettings


def choose_passes(args: argparse.Namespace) -> Passes:
    """The paper's crops on a GPU; on a CPU what takes seconds."""
    device = torch.device(args.device)
    if device.type == "cuda":
        height, width = 768, 768
        batch_size = 16
        backbone = args.backbone or "resnet101"
    else:
        height, width = 256, 512
        batch_size = 1
        backbone = args.backbone or "resnet18"
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    settings = evaluate.InferenceSettings(device, choose_amp("auto", device), batch_size)
    return Passes(device, backbone, image, settings)


def print_costs_of_passes(section: str, passes: Passes, figures: dict[str, dict]) -> None:
    """The table of what `evaluate.compare_costs` returned; one of the networks is "member"."""
    member = figures["member"]
    rows = []
    for name, costs in figures.items():
        row = [name, costs["parameters"] / 1e6]
        for key in ("ms_per_image", "compiled_ms_per_image"):
            row.append(costs[key])
            row.append(f"{costs[key] / member[key]:.3f}")
        row.append(costs["peak_memory_mb"])
        rows.append(row)
    height, width = passes.image.shape[-2:]
    images = f"{passes.settings.batch_size} of {height} x {width}"
    title = f"{section}: {images}, {passes.backbone}, {NUM_CLASSES} classes"
    header = ["", "M parameters", "ms per image", "of a member", "compiled", "of a member"]
    print_table(title, [*header, "peak MB"], rows)


def bench_inference(args: argparse.Namespace) -> None:
    """A member, the teacher of 10 and the student of four measures, as --benchmark has them."""
    passes = choose_passes(args)
    device = passes.device
    torch.manual_seed(0)
    members = [DeepLabV3(passes.backbone, NUM_CLASSES).eval() for _ in range(10)]
    student = DeepLabV3(passes.backbone, NUM_CLASSES, tuple(metrics.MEASURES)).eval()
    teacher = Ensemble(members)
    student.to(device, memory_format=torch.channels_last)
    teacher.to(device, memory_format=torch.channels_last)
    networks = evaluate.Networks(student=student, teacher=teacher)

    figures = evaluate.benchmark(networks, passes.image, passes.settings)
    print_costs_of_passes("inference", passes, figures)
    if device.type == "cuda":
        print_share("a forward pass", figures["member"]["compiled_ms_per_image"] / 1000, 1.9)


# ------------------------------------------------------------------ heads


def bench_heads(args: argparse.Namespace) -> None:
    """A member, and a student with each uncertainty head and all that it learns by default."""
    passes = choose_passes(args)
    torch.manual_seed(0)
    networks = {"member": DeepLabV3(passes.backbone, NUM_CLASSES).eval()}
    for head, measures in distill.DEFAULT_TARGETS.items():
        networks[head] = DeepLabV3(passes.backbone, NUM_CLASSES, measures, head=head).eval()
    for network in networks.values():
        network.to(passes.device, memory_format=torch.channels_last)
    figures = evaluate.compare_costs(networks, passes.image, passes.settings)
    print_costs_of_passes("uncertainty heads", passes, figures)


# ------------------------------------------------------------------ train


def interpolate(images: Tensor, size: tuple[int, int]) -> Tensor:
    """What `model.upsample` does, by torch's own function."""
    return F.interpolate(images, size=size, mode="bilinear")


class TrainingSteps:
    """One batch and everything to make training steps of a student on it."""

    def __init__(self, device: torch.device, size: data.Size | None = None):
        """size: (H, W) of the images, if not what is usual on the device."""
        self.device = device
        if device.type == "cuda":
            self.size = (768, 768)
            self.batch_size = 16
            self.backbone = "resnet101"
        else:
            self.size = (180, 240)
            self.batch_size = 4
            self.backbone = "resnet18"
        self.size = size or self.size
        shape = (self.batch_size, *self.size)
        image_shape = (self.batch_size, 3, *self.size)
        self.images = torch.randint(0, 256, image_shape, dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, NUM_CLASSES, shape, dtype=torch.uint8, device=device)
        self.target = torch.rand(shape, device=device) / 2

    def build(
        self,
        amp: str,
        channels_last: bool = False,
        compiled: bool = False,
        fused: bool = True,
        upsample: Callable = upsample,
    ) -> Callable[[], Tensor]:
        """A function that makes a step of a network of its own and returns the loss."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        network = DeepLabV3(self.backbone, NUM_CLASSES, ("std",)).to(
            self.device, memory_format=layout
        )
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=fused)
        forward = torch.compile(network) if compiled else network

        def step() -> Tensor:
            torch.manual_seed(0)  # of the dropout
            with mock.patch("model.upsample", upsample), autocast(self.device, amp):
                logits, uncertainty = forward(self.images)
            valid = self.labels != data.IGNORED
            loss = train_ensemble.cross_entropy(logits, self.labels)
            loss = loss + distill.rmsle(uncertainty[:, 0], self.target, valid)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step


def bench_train(args: argparse.Namespace) -> None:
    """A student's training step as it is configured on this device, and the alternatives."""
    device = torch.device(args.device)
    steps = TrainingSteps(device)
    amp = choose_amp("auto", device)
    if device.type == "cuda":
        turns = 20
        project = {"channels_last": True, "compiled": True}
        ways = {
            "published": steps.build("fp16", fused=False, upsample=interpolate),
            "project": steps.build(amp, **project),
            "eager": steps.build(amp, channels_last=True),
            "contiguous": steps.build(amp, compiled=True),
            "F.interpolate": steps.build(amp, **project, upsample=interpolate),
        }
    else:
        turns = 9
        ways = {
            "published": steps.build("off", fused=False, upsample=interpolate),
            "project": steps.build(amp),
            "float32": steps.build("off"),
            "channels_last": steps.build(amp, channels_last=True),
            "compiled": steps.build(amp, compiled=True),
            "F.interpolate": steps.build(amp, upsample=interpolate),
        }
    losses, memory = run_once(ways, device)
    gaps = [abs(loss / losses["published"] - 1).item() for loss in losses.values()]
    spent = take_turns(ways, device, turns)
    height, width = steps.size
    print_comparison(
        f"train: a step of {steps.batch_size} images of {height} x {width}, "
        f"{steps.backbone}, {amp}",
        spent,
        memory,
        f"the first step's losses differ by {max(gaps):.1e} at most, relative",
    )
    if device.type == "cuda":
        per_image = statistics.median(spent["project"]) / steps.batch_size
        print_share("a training step", per_image, 6.2)
        print_ceilings(device)


def print_share(what: str, per_image: float, floor: float) -> None:
    """Against the arithmetic and unavoidable memory traffic of ResNet-101 at 768 x 768.

    per_image: seconds; floor: milliseconds.
    """
    share = floor / 1000 / per_image
    print(
        f"{what}: {1000 * per_image:.2f} ms an image, {share:.0%} of the floor of {floor} ms (H200)"
    )


def print_ceilings(device: torch.device) -> None:
    """What the device reaches itself: a large bf16 product and a large copy."""
    gigabyte = torch.empty(2**30, dtype=torch.uint8, device=device)
    copy = seconds(gigabyte.clone, device, 20, 5)
    name = torch.cuda.get_device_name(device)
    teraflops = bf16_ceiling(device) / 1e12
    terabytes = 2 * 2**30 / copy / 1e12
    print(f"{name}: {teraflops:.0f} TFLOP/s bf16, {terabytes:.2f} TB/s")


def bf16_ceiling(device: torch.device) -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds(lambda: matrix @ matrix, device, 20, 5)


# ------------------------------------------------------------------ metrics


def metrics_frame(seed: int, num_classes: int, device: torch.device) -> dict[str, Tensor]:
    """A synthetic 1024 x 2048 frame: mostly right, with void, two uncertainties."""
    generator = torch.Generator(device).manual_seed(seed)
    coarse = torch.randn(1, num_classes, 32, 64, device=device, generator=generator) * 6
    logits = F.interpolate(coarse, (1024, 2048), mode="bilinear")
    probs = logits.softmax(1)
    noise = torch.rand(1, 1024, 2048, device=device, generator=generator)
    prediction = probs.max(1).indices
    labels = prediction.to(torch.uint8)
    labels[noise < 0.1] = 3
    labels[noise > 0.9] = 255
    uncertainty = metrics.max_softmax(probs)
    correct = prediction == labels
    return {
        "probs": probs,
        "labels": labels,
        "prediction": prediction,
        "student": uncertainty,
        "teacher": uncertainty * (0.5 + noise),
        "correct": correct,
        "wrong": ~correct,
        "valid": labels < num_classes,
    }


def forward_seconds(num_classes: int, device: torch.device) -> float:
    """One 1024 x 2048 frame through DeepLabv3-ResNet101: bf16 on CUDA, float32 on a CPU."""
    network = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=num_classes)
    network = network.to(device, memory_format=torch.channels_last).eval()
    image = torch.rand(1, 3, 1024, 2048, device=device)
    image = image.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return seconds(lambda: network(image)["out"], device, repeats=10, warmup=3)
    with torch.inference_mode():
        return seconds(lambda: network(image)["out"], device)


def component_seconds(frame: dict[str, Tensor]) -> float:
    """`metrics.ComponentDetection` of one score of a frame, in which a class is the anomaly."""
    mask = (frame["prediction"] == 3).byte().cpu()
    above = (frame["student"] > 0.3).cpu()
    truth = [metrics.connected_components(mask[0].numpy() == 1)]
    components = metrics.ComponentDetection(500, 100)
    return seconds(partial(components.update, above, mask, truth), mask.device, 10, warmup=1)


def bench_metrics(args: argparse.Namespace) -> None:
    """All accumulators over --images frames, against the forward pass of the same frame."""
    device = torch.device(args.device)
    frames = [metrics_frame(seed, NUM_CLASSES, device) for seed in range(2)]
    uncertainty_arguments = ("student", "prediction", "labels")
    accumulators = {
        "ConfusionMatrix": (metrics.ConfusionMatrix(NUM_CLASSES), ("prediction", "labels")),
        "ProperScores": (metrics.ProperScores(), ("probs", "labels")),
        "CalibrationError": (metrics.CalibrationError(), ("probs", "labels", "prediction")),
        "Detection": (metrics.Detection(), ("student", "wrong", "valid")),
        "SelectivePrediction": (metrics.SelectivePrediction(), ("student", "correct", "valid")),
        "RejectionCurve": (metrics.RejectionCurve(NUM_CLASSES), uncertainty_arguments),
        "ClassUncertainty": (metrics.ClassUncertainty(NUM_CLASSES), uncertainty_arguments),
        "Fidelity": (metrics.Fidelity(), ("student", "teacher", "valid")),
    }

    def update(accumulator: metrics.Accumulator, batches: list[list[Tensor]], images: int) -> None:
        for image in range(images):
            accumulator.update(*batches[image % len(batches)])

    rows = []
    for name, (accumulator, keys) in accumulators.items():
        batches = [[frame[key] for key in keys] for frame in frames]
        update(accumulator, batches, 1)  # warm-up: also moves the state to the device
        accumulator.reset()
        spent = seconds(partial(update, accumulator, batches, args.images), device)
        compute = seconds(accumulator.compute, device)
        state_bytes = sum(state.nbytes for state in accumulator.state.values())
        row = [spent, 1000 * spent / args.images, 1000 * compute, state_bytes / 1e6]
        rows.append([name, *row])
    total = np.array([row[1:] for row in rows]).sum(0).tolist()
    rows.append(["all", *total])
    title = f"metrics: {args.images} frames of 1024 x 2048, {NUM_CLASSES} classes, {device}"
    header = ["accumulator", "seconds", "ms per image", "ms compute", "MB of state"]
    print_table(title, header, rows)

    print(
        f"components: {1000 * component_seconds(frames[0]):,.1f} ms a frame and score, one thread"
    )
    forward = forward_seconds(NUM_CLASSES, device)
    share = total[1] / 1000 / forward
    print(
        f"DeepLabv3-ResNet101 forward {1000 * forward:,.1f} ms; "
        f"all metrics cost {share:.3f} of it (target: below 0.25)"
    )


# ------------------------------------------------------------------ gpu

# Of the paper's ten: each costs the same forward pass more, and the run has to end in minutes.
TEACHER_MEMBERS = 2
WARM_UP_STEPS = 3
# What a compiled network has to reach of the ceiling.
WANTED_SHARES = {
    "training step": 0.50,
    "distilling step": 0.50,
    "forward pass": 0.55,
    "validation": 0.50,  # a forward pass, and the confusion matrix of its pixels
}


class Setting(NamedTuple):
    """What is measured, and where."""

    device: torch.device
    amp: str
    backbone: str
    side: int  # of the images, in pixels
    batch_size: int
    steps: int  # that are timed

    @property
    def image_size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def frame_size(self) -> tuple[int, int]:
        """Of the whole images of a validation, as 1024 x 2048 are to crops of 768 x 768."""
        return self.side * 4 // 3, self.side * 8 // 3


def paper_setting(device: torch.device) -> Setting:
    """The batch of the paper's protocol on a GPU; on a CPU a toy that shows the same faults."""
    amp = choose_amp("auto", device)
    if device.type == "cuda":
        return Setting(device, amp, "resnet101", side=768, batch_size=16, steps=12)
    # 3 images, so that an epoch can end with a smaller batch: batch norm needs 2
    return Setting(device, amp, "resnet18", side=64, batch_size=3, steps=2)


class Cost(NamedTuple):
    """A row of the table; None where this machine cannot tell."""

    work: str  # a key of `WANTED_SHARES`
    compiled: bool
    ms_per_image: float | None = None
    share: float | None = None  # of the ceiling
    peak_mb: float | None = None  # of building, compiling and running
    recompilations: int | None = None  # after the warm-up
    graph_breaks: int | None = None
    waits_per_step: float | None = None  # of the host for the GPU
    note: str = ""  # where it waits, why a graph breaks, or why there are no figures
    kinds: dict[str, float] = {}  # the part that each of `KERNEL_KINDS` has of the device's time

    @property
    def name(self) -> str:
        return f"{self.work}, {'compiled' if self.compiled else 'eager'}"


# What a kernel does, by the words in its name; the first line that fits counts.
KERNEL_KINDS = {
    "fused, number by number": "triton",
    "convolutions and matrix products": "gemm|conv|xmma|cutlass|nvjet|mm|wgrad|dgrad|fprop",
    "batch norm": "batch_norm|bn_",
    "copies": "memcpy|memset|copy",
    "number by number": "elementwise|vectorized|relu|add|mul|div|exp",
    "the rest": "",
}


# ---- what is measured: functions that make a number of steps


def training_batch(setting: Setting) -> data.Sample:
    """A batch as a training loader gives it: on the CPU, for a GPU in pinned memory."""
    count = setting.batch_size
    batch = data.Sample(
        images=torch.randint(0, 256, (count, 3, *setting.image_size), dtype=torch.uint8),
        labels=torch.randint(0, NUM_CLASSES, (count, *setting.image_size), dtype=torch.uint8),
        index=torch.arange(count),
        view=torch.zeros(count, dtype=torch.long),
        flip=torch.arange(count) % 2 == 0,
    )
    if setting.device.type == "cuda":
        pinned = [field.pin_memory() for field in batch]
        batch = data.Sample(*pinned)
    return batch


class RepeatedBatch:
    """A loader that costs nothing: the same batch `steps` times.

    smaller_last: and one of two images more, as an epoch ends whose images the batch size does not
    divide.
    """

    def __init__(self, batch: data.Sample, steps: int, smaller_last: bool):
        self.batch = batch
        batch_size = len(batch.images)
        images = steps * batch_size
        if smaller_last:
            images += 2
        self.batch_sampler = data.EpochBatches(images, batch_size, stream=[0])

    def __iter__(self) -> Iterator[data.Sample]:
        for number in range(len(self.batch_sampler)):
            if self.batch_sampler.is_full(number):
                yield self.batch
            else:
                first_two = [field[:2] for field in self.batch]
                yield data.Sample(*first_two)


def training_flags(setting: Setting) -> SimpleNamespace:
    """What the network and the training loop read of their flags."""
    return SimpleNamespace(
        device=setting.device,
        amp=setting.amp,
        backbone=setting.backbone,
        weights="none",
        batch_size=setting.batch_size,
        crop_size=setting.image_size,
        accumulate=1,
        epochs=1,
        warmup=0,
        lr=1e-4,
        save_every=1000,
    )


def build_training(
    setting: Setting, compiled: bool, measures: tuple[str, ...], loss_fn: Callable
) -> Callable[[int, bool], None]:
    """A function (steps, smaller_last) that trains a new network by the project's own loop."""
    flags = training_flags(setting)
    with contextlib.redirect_stdout(None):
        network = train_ensemble.build_network(flags, 0, NUM_CLASSES, measures)
    wrapped = torch.compile(network, dynamic=False) if compiled else network
    optimizer = train_ensemble.build_optimizer(network, flags.lr, 10.0, 5e-4)
    scaler = torch.amp.GradScaler(setting.device.type, enabled=False)
    batch = training_batch(setting)

    def train(steps: int, smaller_last: bool) -> None:
        loader = RepeatedBatch(batch, steps, smaller_last)
        state = train_ensemble.RunState()
        run = train_ensemble.Run(
            path=Path("network.pt"),  # never written: nothing is saved within the epoch
            model=network,
            wrapped_model=wrapped,
            optimizer=optimizer,
            scaler=scaler,
            state=state,
            image_names=[],
            signals=[],
        )
        progress = train_ensemble.Progress("network", state, 1, len(loader.batch_sampler))
        progress.live_line = evaluate.LiveLine(silent=True)  # it would read the losses
        with train_ensemble.fastest_convolutions():
            train_ensemble.train_one_epoch(run, loss_fn, loader, flags, progress)

    return train


def build_member(setting: Setting, compiled: bool) -> Callable[[int, bool], None]:
    """Training steps of a member."""
    return build_training(setting, compiled, (), train_ensemble.segmentation_loss)


def build_student(setting: Setting, compiled: bool) -> Callable[[int, bool], None]:
    """Steps of a student with the paper's head, whose teacher sees every batch (`--views 0`)."""
    members = []
    for _ in range(TEACHER_MEMBERS):
        members.append(DeepLabV3(setting.backbone, NUM_CLASSES))
    teacher = Ensemble(members)
    teacher.to(setting.device, memory_format=torch.channels_last)
    if compiled:
        teacher.compile_for_one_size()
    measures = tuple(metrics.MEASURES)
    loss_fn = partial(
        distill.distillation_loss,
        targets=distill.TeacherTargets(teacher, list(measures), with_probs=False, amp=setting.amp),
        uncertainty_weight=1.0,
        probs_weight=0.0,
    )
    return build_training(setting, compiled, measures, loss_fn)


def build_forward(setting: Setting, compiled: bool) -> Callable[[int, bool], None]:
    """Passes of a student from uint8 pixels on the device to classes and uncertainties."""
    student = DeepLabV3(setting.backbone, NUM_CLASSES, tuple(metrics.MEASURES)).eval()
    student.to(setting.device, memory_format=torch.channels_last)
    network = evaluate.compiled(student) if compiled else student
    images = training_batch(setting).images.to(setting.device)

    @torch.inference_mode()
    def forward(steps: int, smaller_last: bool) -> None:
        for _ in range(steps):
            with autocast(setting.device, setting.amp):
                logits, _ = network(images)
            predicted_class(logits)

    return forward


class RepeatedFrames:
    """As `data.evaluation_loader`: the same batch `steps` times, and one image more if asked."""

    def __init__(self, setting: Setting, steps: int, smaller_last: bool):
        self.batch_size = setting.batch_size
        self.steps = steps
        self.smaller_last = smaller_last
        count = setting.batch_size
        self.batch = data.EvalSample(
            image=torch.randint(0, 256, (count, 3, *setting.frame_size), dtype=torch.uint8),
            labels=torch.randint(0, NUM_CLASSES, (count, *setting.frame_size), dtype=torch.uint8),
            index=torch.arange(count),
        )
        if setting.device.type == "cuda":
            pinned = [field.pin_memory() for field in self.batch]
            self.batch = data.EvalSample(*pinned)

    def __iter__(self) -> Iterator[list[data.EvalSample]]:
        for _ in range(self.steps):
            yield [self.batch]
        if self.smaller_last:
            first = [field[:1] for field in self.batch]
            yield [data.EvalSample(*first)]


def build_validation(setting: Setting, compiled: bool) -> Callable[[int, bool], None]:
    """The validation of a member between its epochs, on whole images."""
    member = DeepLabV3(setting.backbone, NUM_CLASSES)
    member.to(setting.device, memory_format=torch.channels_last)
    network = torch.compile(member, dynamic=False) if compiled else member
    loader = RepeatedFrames(setting, 0, False)

    def validate(steps: int, smaller_last: bool) -> None:
        loader.steps = steps
        loader.smaller_last = smaller_last
        evaluate.validate(network, loader, setting.device, setting.amp, one_size=True)

    return validate


BUILDERS = {
    "training step": build_member,
    "distilling step": build_student,
    "forward pass": build_forward,
    "validation": build_validation,
}


# ---- how it is measured


def operations_per_image(setting: Setting) -> dict[str, float]:
    """Floating-point operations for one image, two a multiply-add; of the networks alone."""
    # fake tensors have shapes and no numbers
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = DeepLabV3(setting.backbone, NUM_CLASSES)
        images = torch.empty(2, 3, *setting.image_size, dtype=torch.uint8)
        logits = network(images).logits
        forward = counter.get_total_flops() / len(images)
        logits.sum().backward()
    step = counter.get_total_flops() / len(images)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = DeepLabV3(setting.backbone, NUM_CLASSES).eval()
        network(torch.empty(1, 3, *setting.frame_size, dtype=torch.uint8))
    return {
        "training step": step,
        "distilling step": step + TEACHER_MEMBERS * forward,
        "forward pass": forward,
        "validation": counter.get_total_flops(),
    }


def compiled_graphs() -> int:
    """How many graphs torch.compile has made since its counters were cleared."""
    return compiler_counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def noted_waits(device: torch.device) -> Iterator[list[str]]:
    """The places in the code, once for each time, at which the host waits for the GPU meanwhile.

    Where the loop looks at its losses, once in twenty steps and at the end of an epoch, and where
    a validation ends with its figures, they have to wait: that is not noted.
    """
    places = []
    if device.type != "cuda":
        yield places
        return

    def unnoted(function: Callable) -> Callable:
        def call(*arguments) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            result = function(*arguments)
            torch.cuda.set_sync_debug_mode("warn")
            return result

        return call

    look_at_losses = unnoted(train_ensemble.check_finite)
    read_figures = unnoted(metrics.Accumulator._numpy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with (
                mock.patch.object(train_ensemble, "check_finite", look_at_losses),
                mock.patch.object(metrics.Accumulator, "_numpy", read_figures),
            ):
                yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            places.append(f"{Path(warning.filename).name}:{warning.lineno}")


def time_by_kind(make_steps: Callable[[int, bool], None], device: torch.device) -> dict[str, float]:
    """The part that each of `KERNEL_KINDS` has of the device's time in two steps."""
    activity = torch.profiler.ProfilerActivity.CPU
    if device.type == "cuda":
        activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        make_steps(2, smaller_last=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
    times = dict.fromkeys(KERNEL_KINDS, 0.0)
    for event in profile.key_averages():
        spent = event.self_cpu_time_total
        if device.type == "cuda":
            spent = event.self_device_time_total
        for kind, words in KERNEL_KINDS.items():
            if re.search(words, event.key.lower()):
                times[kind] += spent
                break
    total = sum(times.values())
    return {kind: spent / total for kind, spent in times.items() if spent > 0}


def measure_cost(
    work: str, compiled: bool, setting: Setting, ceiling: float | None, operations: float
) -> Cost:
    """Build, warm up, time, and count what should not happen any more.

    ceiling: of the device in operations a second; operations: of one image.
    """
    device = setting.device
    torch.compiler.reset()
    compiler_counters.clear()
    gc.collect()
    torch.manual_seed(0)
    with evaluate.peak_memory(device) as peak:
        make_steps = BUILDERS[work](setting, compiled)
        make_steps(WARM_UP_STEPS, smaller_last=True)
        graphs = compiled_graphs()
        spent = seconds(partial(make_steps, setting.steps, smaller_last=False), device)
    with noted_waits(device) as waits:
        make_steps(setting.steps, smaller_last=True)
    recompilations = compiled_graphs() - graphs
    breaks = dict(compiler_counters["graph_break"])
    kinds = time_by_kind(make_steps, device)

    reasons = [reason.strip().splitlines()[0] for reason in breaks]
    places = [f"waits {times} times at {place}" for place, times in Counter(waits).items()]
    per_image = spent / setting.steps / setting.batch_size
    cost = Cost(
        work,
        compiled,
        ms_per_image=1000 * per_image,
        peak_mb=peak.megabytes,
        recompilations=recompilations,
        graph_breaks=sum(breaks.values()),
        note="; ".join(places + reasons),
        kinds=kinds,
    )
    if device.type != "cuda":
        return cost
    return cost._replace(
        share=operations / per_image / ceiling, waits_per_step=len(waits) / (setting.steps + 1)
    )


def measure_all(setting: Setting, ceiling: float | None) -> list[Cost]:
    """The rows of the table; one that does not fit into the GPU's memory has no figures."""
    operations = operations_per_image(setting)
    costs = []
    for work in BUILDERS:
        for compiled in (False, True):
            print(f"{work}, {'compiled' if compiled else 'eager'} ...", flush=True)
            try:
                cost = measure_cost(work, compiled, setting, ceiling, operations[work])
            except torch.OutOfMemoryError:
                cost = Cost(work, compiled, note="out of memory")
            costs.append(cost)
            if setting.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    return costs


# ---- what is said of it


def shortfalls(costs: list[Cost]) -> list[str]:
    """What a GPU should have reached and did not, a few words each."""
    faults = []
    for cost in costs:
        if cost.ms_per_image is None:
            faults.append(f"{cost.name}: {cost.note}")
            continue
        wanted = WANTED_SHARES[cost.work]
        if cost.compiled and cost.share < wanted:
            faults.append(f"{cost.name}: {cost.share:.0%} of the ceiling, not {wanted:.0%}")
        if cost.recompilations:
            faults.append(f"{cost.name}: {cost.recompilations} recompilations")
        if cost.waits_per_step:
            faults.append(f"{cost.name}: {cost.waits_per_step:.1f} waits a step")
    return faults


def print_costs(setting: Setting, costs: list[Cost], card: str) -> None:
    """Notes first, then what the device spends its time on, then the table."""
    for cost in costs:
        if cost.note:
            print(f"{cost.name}: {cost.note}")
    for cost in costs:
        by_share = sorted(cost.kinds.items(), key=lambda item: -item[1])
        print(f"{cost.name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in by_share))

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for cost in costs:
        row = [
            cost.name,
            cell(cost.ms_per_image, ",.2f"),
            cell(cost.share, ".0%"),
            cell(cost.peak_mb, ",.0f"),
            cell(cost.recompilations, "d"),
            cell(cost.graph_breaks, "d"),
            cell(cost.waits_per_step, ".1f"),
        ]
        rows.append(row)
    header = ["", "ms an image", "of ceiling", "peak MB", "recompilations", "graph breaks"]
    header.append("waits a step")
    print_table(
        f"gpu: {card}; {setting.backbone}, {setting.batch_size} images of {setting.side} x "
        f"{setting.side}, {setting.amp}; the student's teacher has {TEACHER_MEMBERS} members, "
        "where the paper has 10",
        header,
        rows,
    )


def bench_gpu(args: argparse.Namespace) -> None:
    """Steps and passes of the paper's protocol against the card's own limit. SystemExit with one
    line where a GPU falls short.

    On a CPU it is a toy: torch.compile traces its graphs, but translates none.
    """
    device = choose_device(args.device)
    setting = paper_setting(device)
    if device.type != "cuda":
        traced_only = partial(torch.compile, backend="eager")
        with mock.patch.object(torch, "compile", traced_only):
            costs = measure_all(setting, ceiling=None)
        print_costs(setting, costs, "a toy on a CPU")
        return

    with noted_waits(device) as waits:
        torch.ones(1, device=device).item()
    assert len(waits) == 1, "a wait for the GPU is not noticed"
    ceiling = bf16_ceiling(device)
    costs = measure_all(setting, ceiling)
    name = torch.cuda.get_device_name(device)
    print_costs(setting, costs, f"{name}, {ceiling / 1e12:.0f} TFLOP/s in bf16")
    faults = shortfalls(costs)
    if faults:
        sys.exit(f"fell short: {'; '.join(faults)}")


# ------------------------------------------------------------------ small

CPU = torch.device("cpu")
DRAWN_SIZE = (80, 120)  # (H, W) of the drawn scenes


def time_of_step(size: data.Size, amp: str, keeps_memory: bool) -> float:
    """Median seconds of 30 training steps, on one thread as members that train side by side.

    It is called in a process of its own, for what it changes cannot be undone.
    """
    torch.set_num_threads(1)
    if keeps_memory:
        keep_freed_memory()
    step = TrainingSteps(CPU, size).build(amp)
    spent = take_turns({"step": step}, CPU, turns=30)
    return statistics.median(spent["step"])


def compare_memory(size: data.Size, amp: str) -> None:
    """Training steps where freed memory goes back to the system, and where it is kept."""
    spent = {"published": [], "project": []}
    for _ in range(5):
        for name, times in spent.items():
            with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
                times.append(pool.apply(time_of_step, (size, amp, name == "project")))
    print_comparison(
        f"small: a training step of 4 images of {size[0]} x {size[1]}, resnet18, {amp}, one thread",
        spent,
        {},
        "published: freed memory goes back to the system; project: it is kept",
    )


def compare_passes(amp: str) -> None:
    """An image in a pass of an ensemble of ten, by fours and by as many as pass at once."""
    teacher = Ensemble([DeepLabV3("resnet18", 11).eval() for _ in range(10)])
    teacher.to(memory_format=torch.channels_last)
    count = data.images_per_pass(4, math.prod(DRAWN_SIZE))
    images = torch.randint(0, 256, (count, 3, *DRAWN_SIZE), dtype=torch.uint8)

    def run(batch_size: int) -> None:
        with torch.inference_mode(), autocast(CPU, amp):
            for batch in images.split(batch_size):
                teacher(batch, DRAWN_SIZE)

    ways = {"published": partial(run, 4), "project": partial(run, count)}
    height, width = DRAWN_SIZE
    print_comparison(
        f"small: {count} images of {height} x {width} through ten resnet18, {amp}",
        take_turns(ways, CPU, 15),
        {},
        f"published: by fours; project: by {count}",
    )


def compare_loading() -> None:
    """Ten networks read from their checkpoints, drawn at random before and not."""
    config = {"backbone": "resnet18", "classes": ["a"] * 11, "measures": []}
    state = DeepLabV3("resnet18", 11).state_dict()
    checkpoint = {"model": state, "config": config, "args": {}}

    def build_and_copy() -> None:
        DeepLabV3("resnet18", 11).load_state_dict(state)

    ways = {
        "published": lambda: [build_and_copy() for _ in range(10)],
        "project": lambda: [build_model(checkpoint, "a.pt") for _ in range(10)],
    }
    print_comparison(
        "small: ten resnet18 from what their checkpoints hold",
        take_turns(ways, CPU, 5),
        {},
        "published: weights are drawn, and then copied over; project: taken as they are",
    )


def bench_small(args: argparse.Namespace) -> None:
    """What makes networks of small images faster on a CPU, beside the usual way."""
    amp = choose_amp(args.amp, CPU)
    compare_memory(DRAWN_SIZE, amp)
    compare_memory((180, 240), amp)
    keep_freed_memory()
    compare_passes(amp)
    compare_loading()


# ------------------------------------------------------------------ command line

SECTIONS = {
    "loader": bench_loader,
    "teacher": bench_teacher,
    "distill": bench_distill,
    "inference": bench_inference,
    "heads": bench_heads,
    "train": bench_train,
    "metrics": bench_metrics,
    "gpu": bench_gpu,
    "small": bench_small,  # last, for the memory of the process is kept from then on
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--images", type=int, default=500, help="frames (metrics): time grows so")
    parser.add_argument(
        "--backbone",
        choices=BACKBONES,
        help="of inference, heads (resnet101 on a GPU, else resnet18)",
    )
    parser.add_argument(
        "--amp", choices=("auto", "bf16", "off"), default="auto", help="of small (default: auto)"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    return parser


def main(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {args.device}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    parser = get_args_parser()
    arguments = parser.parse_args()
    for section in arguments.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section}; there are {', '.join(SECTIONS)}")
    if arguments.images < 1:
        parser.error(f"--images {arguments.images}: at least 1")
    main(arguments)
