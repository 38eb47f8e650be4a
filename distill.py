"""Distil an ensemble's predictive uncertainty into one network that also segments.

    python distill.py --teacher ckpts/                          # -> ckpts/student.pt
    python distill.py --teacher ckpts/member_00.pt --mc-samples 10      # MC dropout as the teacher

The student learns twice. First the whole network learns the classes, from the labels and
from the teacher's mean probabilities on the very view that it sees itself:

    L = (cross_entropy + V * KL(teacher's probabilities || student's)) / (1 + V)

Then the network is done, and its uncertainty head learns alone for --head-epochs, on the
features and the softmax as they are in evaluation. It learns the teacher's standard
deviation u and further measures (metrics.py), each by

    RMSLE = sqrt( mean( (log(1 + u_student) - log(1 + u_teacher))^2 ) )

and "error", the probability that the student's own class is wrong, from the labels:

    error_loss = mean over labelled pixels of -(e log u + (1 - e) log(1 - u))
    e = 1 where argmax(logits) is not the label, else 0

Its loss is the mean of error_loss and the RMSLE of each measure.

With --head paper everything is learned at once, as published (Landgraf et al. 2024, doi
10.1007/s41064-024-00280-4):

    L = cross_entropy + W * RMSLE of the standard deviation

The loop, the loaders and the checkpoints are those of train_ensemble.py.

Outline:
    losses              of the segmentation, of the uncertainty head, of both at once
    teacher targets     TeacherTargets: one pass of the teacher, or what is stored of it
    stored targets      TargetCache: the file that keeps them
    the student         views, targets, training
    command line        main and the flags
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036, an older Python reads until here
    version = sys.version.split()[0]
    remedy = "make the virtual environment with Python 3.11 or newer"
    print(f"error: this is Python {version}; {remedy}", file=sys.stderr)
    sys.exit(2)

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from data import IGNORED, MISSING, Sample
from evaluate import (
    HEAD_ENDING,
    ImageProgress,
    Parser,
    division_warnings,
    non_negative,
    positive,
    refuse_moved_data,
    run_main,
    validate,
    warn,
)
from metrics import ERROR, MEASURES, ensemble_measures
from model import (
    BACKBONES,
    HEADS,
    DeepLabV3,
    Ensemble,
    Prediction,
    UsageError,
    autocast,
    get_world_size,
    is_first_process,
    load_ensemble,
    locked,
    member_files,
    predicted_class,
    process_group,
    save_atomically,
    speaks_for_command,
)
from train_ensemble import (
    RECIPES,
    UNFINISHED,
    WRITTEN,
    TrainingFlags,
    add_training_flags,
    build_config,
    build_loaders,
    build_network,
    build_optimizer,
    build_training_loader,
    choose_validation_interval,
    cross_entropy,
    end_by_signal,
    fit,
    noted_signals,
    open_splits,
    random_stream,
    recipe_table,
    refuse_other_command,
    remove_files,
    report_finished,
    resolve_flags,
    rough_time,
    save_checkpoint,
    seconds_if_long,
    select_training_flags,
    sum_over_processes,
    wait_for_group,
)

# What each head learns unless --targets says otherwise; a measure that is added to
# `metrics.MEASURES` is learned where it is asked for.
DEFAULT_TARGETS = {
    "confidence": ("std", "entropy", "mutual_information", "msp", ERROR),
    "paper": ("std",),
}

# ------------------------------------------------------------------------------------------- losses


def student_segmentation_loss(
    student: nn.Module, batch: Sample, targets: "TeacherTargets", probs_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the segmentation alone, and its terms for the log."""
    probs = None
    if probs_weight > 0:
        probs = targets.for_batch(batch).probs
    logits = student(batch.images).logits
    return segmentation_loss(logits, batch.labels, probs, probs_weight)


def head_loss(
    student: nn.Module,
    batch: Sample,
    targets: "TeacherTargets",
    kept: "KeptFeatures | None" = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the uncertainty head alone, and its terms for the log."""
    target = targets.for_batch(batch)
    logits, uncertainty = predict_frozen(student, batch, kept)
    return uncertainty_loss(uncertainty, logits, batch.labels, target.uncertainty)


def predict_frozen(
    student: nn.Module, batch: Sample, kept: "KeptFeatures | None" = None
) -> Prediction:
    """The predictions of a network of which the uncertainty head alone learns.

    The rest is as it is in evaluation: its dropout is off, and its batch norms take the running
    statistics and leave them alone. kept: the features that it has given already.
    """
    student.eval()
    if kept is None:
        return student(batch.images)
    return student.apply_heads(kept.for_batch(batch), batch.images.shape[-2:])


def distillation_loss(
    student: nn.Module,
    batch: Sample,
    targets: "TeacherTargets",
    uncertainty_weight: float,
    probs_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The published loss of segmentation and uncertainty at once, and its terms for the log."""
    target = targets.for_batch(batch)
    logits, uncertainty = student(batch.images)
    loss, logs = segmentation_loss(logits, batch.labels, target.probs, probs_weight)
    loss_of_head, logs_of_head = uncertainty_loss(
        uncertainty, logits, batch.labels, target.uncertainty
    )
    return loss + uncertainty_weight * loss_of_head, logs | logs_of_head


def segmentation_loss(
    logits: Tensor, labels: Tensor, probs: Tensor | None, probs_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy with the labels and, with probs_weight > 0, the divergence from `probs`.

    logits, probs [B, C, H, W]; labels uint8 [B, H, W]. Void pixels (255) have no label, but the
    teacher has probabilities there. Padding and held-out classes (254) enter nothing.
    """
    ce = cross_entropy(logits, labels)
    if probs_weight == 0:
        return ce, {"ce": ce}
    kl = kl_divergence(logits, probs, labels != IGNORED)
    # A weighted mean, so that the loss keeps its scale and the learning rate fits.
    return (ce + probs_weight * kl) / (1 + probs_weight), {"ce": ce, "kl": kl}


def uncertainty_loss(
    uncertainty: Tensor, logits: Tensor, labels: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of the measures' losses.

    uncertainty [B, T or T + 1, H, W] has the teacher's measures and then, where it is learned,
    `ERROR`; logits [B, C, H, W]; labels uint8 [B, H, W]; target [B, T, H, W]. Void pixels (255)
    enter the RMSLE and not the error; padding and held-out classes (254) enter nothing.
    """
    logs = {}
    error_terms = []
    num_measures = target.shape[1]
    if uncertainty.shape[1] > num_measures:
        error_terms = [error_loss(uncertainty[:, num_measures], logits, labels)]
        logs["error"] = error_terms[0]

    valid = labels != IGNORED  # [B, H, W]
    rmsle_terms = []
    for channel in range(num_measures):
        rmsle_terms.append(rmsle(uncertainty[:, channel], target[:, channel], valid))
    logs["rmsle"] = torch.stack(rmsle_terms).mean()
    # Every measure, `ERROR` too, has the same part of the weight.
    return torch.stack(rmsle_terms + error_terms).mean(), logs


def rmsle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Root mean squared logarithmic error over the valid pixels, float32.

    student, teacher [B, H, W] in [0, 1]; valid bool [B, H, W]. The epsilon keeps the root's
    gradient finite at 0. Where no pixel is valid the result is 1e-6.
    """
    difference = torch.log1p(student.float()) - torch.log1p(teacher.float())
    return (mean_of_valid(difference.square(), valid) + 1e-12).sqrt()


def error_loss(predicted_error: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of a predicted probability of error, mean over the labelled pixels.

    predicted_error [B, H, W] in (0, 1); logits [B, C, H, W]; labels uint8 [B, H, W], of which
    254 and 255 do not count. What is right and wrong is taken from the logits as they are: no
    gradient leads there.
    """
    labelled = labels < IGNORED
    wrong = predicted_class(logits.detach()) != labels  # [B, H, W]
    # A sigmoid in float32 ends in exactly 0 or 1, whose logarithm would be infinite.
    probability = predicted_error.float().clamp(1e-6, 1 - 1e-6)
    terms = -torch.where(wrong, probability, 1 - probability).log()
    return mean_of_valid(terms, labelled)


def kl_divergence(logits: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
    """KL(probs || softmax(logits)) in nats, mean over the valid pixels.

    logits, probs [B, C, H, W]; valid bool [B, H, W].
    """
    probs = probs / probs.sum(dim=1, keepdim=True)  # stored ones are rounded
    terms = torch.xlogy(probs, probs) - probs * logits.float().log_softmax(dim=1)
    return mean_of_valid(terms.sum(dim=1), valid)


def mean_of_valid(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of the valid values of all processes, 0 where there are none; valid: bool."""
    total = sum_over_processes((values * valid).sum())
    count = sum_over_processes(valid.sum())
    return total / count.clamp(min=1)


# ---------------------------------------------------------------------------------- teacher targets

VALIDATION = 2**31  # stands for the view's number in the seed of MC dropout


class Target(NamedTuple):
    """What a student learns of its teacher, for a batch."""

    uncertainty: Tensor  # float32 [B, T, H, W] in [0, 1]; entropies are divided by log C
    probs: Tensor | None  # float32 [B, C, H, W], with --distill-probs above 0


class TargetKey(NamedTuple):
    """Which targets of a cache are meant."""

    view: Tensor  # [B]
    index: Tensor  # [B], of the images
    size: tuple[int, int] | None = None  # (H, W), where the cache has room for larger ones


class TeacherTargets:
    """What the student learns of its teacher, for training batches and validation images.

    measures: names from `metrics.MEASURES`, a channel each. with_probs: the teacher's
    mean probabilities are learned too. train_cache, val_cache: where the targets of
    training views and of validation images are kept; without one they are computed each
    time.
    """

    def __init__(
        self,
        teacher: Ensemble,
        measures: list[str],
        with_probs: bool,
        amp: str,
        train_cache: "TargetCache | None" = None,
        val_cache: "TargetCache | None" = None,
    ):
        self.teacher = teacher
        self.measures = measures
        self.with_probs = with_probs
        self.amp = amp
        self.train_cache = train_cache
        self.val_cache = val_cache

    def for_batch(self, batch: Sample) -> Target:
        """The target of a training batch.

        The teacher always sees the view as it is before its flip, and its target is flipped
        with the view: so a stored target serves both.
        """
        flip = batch.flip.to(batch.images.device, non_blocking=True)[:, None, None, None]
        if self.train_cache is None:
            values = self.run_on_unflipped(batch, flip)
        else:
            stored = batch.stored_target
            if stored.numel() == 0:
                stored = self.complete_targets(batch, flip)
            values = self.train_cache.dequantise(stored)
        values = torch.where(flip, values.flip(-1), values)  # [B, T, H, W] or [B, T + C, H, W]

        uncertainty = values[:, : len(self.measures)]
        probs = values[:, len(self.measures) :] if self.with_probs else None
        return Target(uncertainty, probs)

    def fill(self, views: data.TrainingViews, batch_size: int, signals: list[int]) -> None:
        """Compute all training targets that are not stored yet, with a live line.

        signals: of `train_ensemble.noted_signals`, of which the first ends it.
        """
        num_views = self.train_cache.targets.shape[0]
        incomplete = []
        for key in keys_of_views(views, num_views, batch_size):
            if is_incomplete(self.train_cache.read(key)):
                incomplete.append(key)
        total = sum(len(key.index) for key in incomplete)
        if total > 0:
            print(f"asking the teacher about {total} views", flush=True)
        with ImageProgress(total) as progress:
            for key in incomplete:
                if signals:
                    break
                fresh = self.run_on_views(read_views(views, key), key)
                self.train_cache.complete(key, self.train_cache.read(key), fresh)
                progress.advance(len(key.index))

    def complete_targets(self, batch: Sample, flip: Tensor) -> Tensor:
        """The stored targets of a batch that came without, uint8 [B, T, H, W].

        A process that loads looks for them some batches ahead of the training, so here they are
        looked for again: of MC dropout, what is stored would not come out the same a second time.
        """
        key = TargetKey(batch.view, batch.index)
        stored = self.train_cache.read(key)
        if is_incomplete(stored):
            fresh = self.run_on_unflipped(batch, flip)
            stored = self.train_cache.complete(key, stored, fresh)
        return stored

    def run_on_unflipped(self, batch: Sample, flip: Tensor) -> Tensor:
        """The teacher's channels for a batch's views as they were before their flip."""
        images = torch.where(flip, batch.images.flip(-1), batch.images)
        return self.run_on_views(images, TargetKey(batch.view, batch.index))

    def run_on_views(self, images: Tensor, key: TargetKey) -> Tensor:
        """The teacher's channels for views as they were before their flip."""
        dropout_key = [int(key.view[0]), int(key.index[0])]
        size = images.shape[-2:]
        return self.run_teacher(images, size, dropout_key, self.measures, self.with_probs)

    def for_validation(self, images: Tensor, size: tuple[int, int], index: Tensor) -> Tensor:
        """The first measure, float32 [B, H, W], of validation images `index` at `size` (H, W)."""
        first_measure = self.measures[:1]
        dropout_key = [VALIDATION, int(index[0])]
        if self.val_cache is None:
            return self.run_teacher(images, size, dropout_key, first_measure)[:, 0]
        key = TargetKey(torch.zeros_like(index), index, size)
        stored = self.val_cache.read(key)
        if is_incomplete(stored):
            # uncompiled: every size of image would be compiled anew
            with torch.compiler.set_stance("force_eager"):
                fresh = self.run_teacher(images, size, dropout_key, first_measure)
            stored = self.val_cache.complete(key, stored, fresh)
        return self.val_cache.dequantise(stored)[:, 0]

    def run_teacher(
        self,
        images: Tensor,
        size: tuple[int, int],
        dropout_key: list[int],
        measures: list[str],
        with_probs: bool = False,
    ) -> Tensor:
        """One pass of the teacher: float32 [B, T, H, W], or [B, T + C, H, W] with probabilities.

        dropout_key: integers that seed the draws of MC dropout.
        """
        with_entropy = any(MEASURES[name].needs_expected_entropy for name in measures)
        with (
            dropout_of(self.teacher, dropout_key, images),
            torch.inference_mode(),
            autocast(images.device, self.amp),
        ):
            prediction = self.teacher(images, size, with_entropy)
            num_classes = prediction.probs.shape[1]
            channels = []
            for name, values in ensemble_measures(prediction, measures).items():
                channels.append(values / MEASURES[name].scale(num_classes))
            values = torch.stack(channels, dim=1)
            if with_probs:
                values = torch.cat([values, prediction.probs], dim=1)
        return values.clone()  # out of inference mode: autograd may keep it


@contextlib.contextmanager
def dropout_of(teacher: Ensemble, key: list[int], images: Tensor) -> Iterator[None]:
    """MC dropout drawn from a random stream of its own, seeded by `key`.

    A resumed run finds more targets stored, and so calls the teacher less often; the
    student's own dropout must not depend on that.
    """
    if teacher.mc_samples == 0:
        yield
        return
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices):
        sequence = np.random.SeedSequence([torch.initial_seed(), *key])
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        yield


# ----------------------------------------------------------------------------------- stored targets


def is_incomplete(stored: Tensor) -> bool:
    """Whether a target of these was never computed."""
    return bool((stored == MISSING).any())


def quantise(values: Tensor, largest: Tensor) -> Tensor:
    """[0, largest] to uint8 0..254; the root spends the steps near 0, where most pixels are."""
    return (254 * (values / largest).clamp(0, 1).sqrt()).round().to(torch.uint8)


def dequantise(stored: Tensor, largest: Tensor) -> Tensor:
    """The values in [0, largest] that the uint8 numbers of `quantise` stand for."""
    return largest * (stored.float() / 254).square()


class TargetCache:
    """The teacher's quantised targets of every view, uint8 [K, N, T, H, W], mapped from the disk.

    A target is stored when its view is first met or, on a CPU, before the training (see
    `passes_ahead`). From then on the loading processes read it, as `data.StoredTargets`, and it
    comes with the view. Single bytes cannot tear and are the same whenever they are computed: a run
    that was killed leaves a valid, if incomplete, cache.

    path: an .npy file; the .json beside it holds `identity`, all that the targets
    depend on, and a file with another identity is made anew. None: it is there already.
    largest: what each channel ends at, [T, 1, 1], on the device where targets are used.
    Raises UsageError where the disk is too small.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], largest: Tensor, identity: dict | None):
        self.largest = largest
        megabytes = math.prod(shape) / 1e6
        print(f"teacher targets: {shape[0]} x {shape[1]} images, {megabytes:,.1f} MB in {path}")
        if identity is not None:
            identity = json.loads(json.dumps(identity | {"shape": shape}))
            if not self.is_current(path, identity):
                self.create_empty(path, shape, identity)
        self.targets = np.lib.format.open_memmap(path, "r+")

    @staticmethod
    def is_current(path: Path, identity: dict) -> bool:
        """Whether `path` was made, as a whole, for the same targets."""
        description = path.with_suffix(".json")
        if not (path.exists() and description.exists()):
            return False
        return json.loads(description.read_text()) == identity

    @staticmethod
    def create_empty(path: Path, shape: tuple[int, ...], identity: dict) -> None:
        """Write a file in which every target is missing, and last the description beside it."""
        description = path.with_suffix(".json")
        description.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        needed = math.prod(shape) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        if needed > free:
            raise UsageError(
                f"{path} takes {needed:,.0f} MB, but the disk has {free:,.0f} MB; use fewer "
                "--views, --distill-probs 0 or another --out"
            )
        offset = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset
        image = bytes([MISSING]) * math.prod(shape[2:])
        # written, not mapped: a full disk is an OSError here, a SIGBUS in the mapping
        with open(path, "r+b") as file:
            file.seek(offset)
            for _ in range(shape[0] * shape[1]):
                file.write(image)
            file.flush()
            os.fsync(file.fileno())  # before the description says that it is whole
        save_atomically(description, json.dumps(identity))

    def read(self, key: TargetKey) -> Tensor:
        """What is stored of those targets: uint8 [B, T, H, W], on the CPU."""
        height, width = key.size or self.targets.shape[-2:]
        stored = self.targets[key.view.cpu().numpy(), key.index.cpu().numpy()]
        return torch.from_numpy(stored[..., :height, :width])

    def complete(self, key: TargetKey, stored: Tensor, values: Tensor) -> Tensor:
        """Store of `values` [B, T, H, W] what is missing in `stored`; what is stored then.

        What is learned from is always what is stored, also when it was computed this
        moment: a run that is resumed sees the same. Raises UsageError where a value is
        not finite.
        """
        if not values.isfinite().all():
            raise UsageError(
                "the teacher's uncertainty is not finite; check its checkpoints, or use --amp off"
            )
        fresh = quantise(values, self.largest).cpu()
        completed = torch.where(stored == MISSING, fresh, stored).numpy()
        height, width = completed.shape[-2:]
        for index_in_batch, target in enumerate(completed):
            view = key.view[index_in_batch]
            image = key.index[index_in_batch]
            self.targets[view, image, :, :height, :width] = target
        # Read again: an image that is in the batch twice was stored twice, and the last counts.
        return self.read(key)

    def dequantise(self, stored: Tensor) -> Tensor:
        """The values that `stored` [B, T, H, W] stands for, float32, on the device."""
        if self.largest.is_cuda and not stored.is_pinned():  # what a loader brings is
            stored = stored.pin_memory()
        return dequantise(stored.to(self.largest.device, non_blocking=True), self.largest)


def open_cache(
    path: Path, shape: tuple[int, ...], largest: list[float], identity: dict, device: torch.device
) -> TargetCache:
    """A `TargetCache` that the first process of a group makes if need be; then the others open it.

    Only the first looks at the identity: with copies of the data on each machine, the
    files' times would make the machines disagree.
    """
    largest = torch.tensor(largest, device=device)[:, None, None]
    cache = None
    if is_first_process():
        cache = TargetCache(path, shape, largest, identity)
    wait_for_group(device)
    return cache or TargetCache(path, shape, largest, identity=None)


# -------------------------------------------------------------------------------------- the student


class DistillationFlags(NamedTuple):
    """The flags of a student beyond those that it shares with a member."""

    measures: list[str]  # of the teacher, each name once
    learns_error: bool  # whether `ERROR` is learned too
    head: str
    head_epochs: int  # 0 with the paper's head
    views: int
    uncertainty_weight: float
    distill_probs: float
    jitter: float  # strength of the colour jitter, from the recipe

    def channels(self) -> tuple[str, ...]:
        """What the student's channels are: the teacher's measures in their order, then `ERROR`."""
        if self.learns_error:
            return (*self.measures, ERROR)
        return tuple(self.measures)


class Lessons(NamedTuple):
    """What a student learns from, and what it is validated on."""

    train_loader: DataLoader  # of views that come with their stored targets
    label_loader: DataLoader  # of the same views without
    val_loader: DataLoader
    targets: "TeacherTargets"
    num_classes: int
    val_has_one_size: bool


def train_student(
    path: Path,
    teacher: Ensemble,
    train_set: data.SegmentationDataset,
    val_set: data.SegmentationDataset,
    flags: TrainingFlags,
    distillation: DistillationFlags,
) -> None:
    """Train the student and write it to `path`."""
    # ---------------------------------------------------------------- views and their targets
    targets_path = path.with_suffix(".targets.npy")
    stream = random_stream(flags.seed, "student", 0)
    views = build_views(flags, distillation, train_set, stream.view_seeds, targets_path)
    train_loader, val_loader = build_loaders(flags, views, val_set)
    teacher.to(flags.device, memory_format=torch.channels_last)
    if flags.compile:
        teacher.compile_for_one_size()
    targets = open_targets(teacher, flags, distillation, views, val_set, path)
    if distillation.views > 0 and passes_ahead(flags):
        torch.manual_seed(stream.torch_seed)  # for MC dropout
        with stop_after_signal(path, flags) as signals:
            targets.fill(views, flags.batch_size, signals)
    views_without_targets = build_views(flags, distillation, train_set, stream.view_seeds, None)
    label_loader = build_training_loader(flags, views_without_targets)
    lessons = Lessons(
        train_loader=train_loader,
        label_loader=label_loader,
        val_loader=val_loader,
        targets=targets,
        num_classes=len(train_set.classes),
        val_has_one_size=val_set.has_one_size(),
    )

    # ---------------------------------------------------------------- training
    if distillation.head == "paper":
        weights, entry = train_at_once(path, lessons, flags, distillation)
    else:
        weights, entry = train_in_turn(path, lessons, flags, distillation)
    config = build_config(train_set, flags, members=1)
    config |= {
        "measures": list(distillation.channels()),
        "head": distillation.head,
        "teacher_members": len(teacher),
    }
    save_checkpoint(path, weights, entry, config, flags.recorded)
    if is_first_process():
        remove_files(path_of_head(path), UNFINISHED)


def train_at_once(
    path: Path, lessons: Lessons, flags: TrainingFlags, distillation: DistillationFlags
) -> tuple[dict[str, Tensor], dict]:
    """The published training: one loss for segmentation and uncertainty. Returns as `fit` does."""
    channels = distillation.channels()
    seed = random_stream(flags.seed, "student", 0).torch_seed
    student = build_network(flags, seed, lessons.num_classes, channels, distillation.head)
    # The loss takes the mean of the measures, so each has its part of the weight. With weight 0
    # the head learns nothing, and its rate does not matter.
    weight_of_measure = 1.0
    if distillation.uncertainty_weight > 0:
        weight_of_measure = distillation.uncertainty_weight
    weight_of_measure /= len(channels)
    optimizer = build_optimizer(
        student, flags.lr, flags.head_lr_mult, flags.weight_decay, weight_of_measure
    )
    loss_fn = functools.partial(
        distillation_loss,
        targets=lessons.targets,
        uncertainty_weight=distillation.uncertainty_weight,
        probs_weight=distillation.distill_probs,
    )
    validation = build_validation(lessons, flags, with_uncertainty=True)
    return fit(student, optimizer, loss_fn, lessons.train_loader, validation, flags, path)


# Of Adam, for `ConfidenceHead`. It does not depend on the network's own rate and optimiser.
HEAD_LR = 1e-3


def train_in_turn(
    path: Path, lessons: Lessons, flags: TrainingFlags, distillation: DistillationFlags
) -> tuple[dict[str, Tensor], dict]:
    """First the segmentation, then the uncertainty head alone. Returns as `fit` does.

    Each has a log and, while it runs, a state of its own. A command that finds the first one
    finished goes on with the second. The epochs of the head meet the same views in the same order
    as the first ones of the segmentation.
    """
    student, entry = train_segmentation(path, lessons, flags, distillation)
    return train_head(student, path, lessons, flags, distillation), entry


def train_segmentation(
    path: Path, lessons: Lessons, flags: TrainingFlags, distillation: DistillationFlags
) -> tuple[nn.Module, dict]:
    """A network without an uncertainty head, and its log entry."""
    seed = random_stream(flags.seed, "student", 0).torch_seed
    student = build_network(flags, seed, lessons.num_classes)
    optimizer = build_optimizer(student, flags.lr, flags.head_lr_mult, flags.weight_decay)
    loss_fn = functools.partial(
        student_segmentation_loss,
        targets=lessons.targets,
        probs_weight=distillation.distill_probs,
    )
    loader = lessons.train_loader
    if distillation.distill_probs == 0:
        loader = lessons.label_loader
    validation = build_validation(lessons, flags, with_uncertainty=False)
    flags = flags._replace(keeps_last_state=True)  # for the head
    weights, entry = fit(student, optimizer, loss_fn, loader, validation, flags, path)
    student.load_state_dict(weights)
    return student, entry


def train_head(
    student: nn.Module,
    path: Path,
    lessons: Lessons,
    flags: TrainingFlags,
    distillation: DistillationFlags,
) -> dict[str, Tensor]:
    """Give the finished network its uncertainty head; returns the weights of all, on the CPU."""
    student.requires_grad_(False)
    torch.manual_seed(random_stream(flags.seed, "head", 0).torch_seed)
    student.add_uncertainty(distillation.channels(), distillation.head)
    if flags.device.type == "cuda":  # as `build_network` has it
        student.to(memory_format=torch.channels_last)
    parameters = list(student.uncertainty.parameters())
    optimizer = torch.optim.Adam([{"params": parameters, "lr_mult": 1.0}], HEAD_LR)
    with stop_after_signal(path, flags) as signals:
        kept = keep_features(student, lessons, flags, distillation, signals)
    loss_fn = functools.partial(head_loss, targets=lessons.targets, kept=kept)
    validation = build_validation(lessons, flags, with_uncertainty=True)
    flags_of_head = flags._replace(
        epochs=distillation.head_epochs,
        lr=HEAD_LR,
        warmup=0,
        validate_every=distillation.head_epochs,
        select="last",
    )
    weights, _ = fit(
        student,
        optimizer,
        loss_fn,
        lessons.train_loader,
        validation,
        flags_of_head,
        path_of_head(path),
    )
    return weights


class KeptFeatures:
    """The features of a network that learns no more, of every view as it is and mirrored.

    features: [2, K, N, 256, h, w], of K views of N images, in memory.
    """

    def __init__(self, features: Tensor):
        self.features = features

    def for_batch(self, batch: Sample) -> Tensor:
        """[B, 256, h, w]"""
        return self.features[batch.flip.long(), batch.view, batch.index]


# Of `KeptFeatures`, in bytes: a quarter of what a small machine has.
LARGEST_MEMORY = 1e9


@torch.no_grad()
def keep_features(
    student: DeepLabV3,
    lessons: Lessons,
    flags: TrainingFlags,
    distillation: DistillationFlags,
    signals: list[int],
) -> KeptFeatures | None:
    """`KeptFeatures` where they save time and there is room for them; else None.

    signals: of `train_ensemble.noted_signals`, of which the first ends it.

    A view comes as it is and mirrored, so that an image has twice as many forms as views. Where
    the head has no more epochs than that, to compute every form once saves nothing.
    """
    forms_of_image = 2 * distillation.views
    comes_again = 0 < forms_of_image < distillation.head_epochs
    if not passes_ahead(flags) or not comes_again:
        return None
    views = lessons.train_loader.dataset
    student.eval()

    # ---- is there room for them?
    with autocast(flags.device, flags.amp):
        black = torch.zeros(1, 3, *flags.crop_size, dtype=torch.uint8)
        example = student.extract_features(black)  # [1, 256, h, w]
    needed = forms_of_image * len(views) * example.nbytes
    if needed > LARGEST_MEMORY:
        return None
    print(f"features: {needed / 1e6:,.1f} MB in memory")

    # ---- all views, as they are and mirrored
    shape = (2, distillation.views, len(views), *example.shape[1:])
    features = torch.empty(shape, dtype=example.dtype)
    with ImageProgress(distillation.views * len(views)) as progress:
        for key in keys_of_views(views, distillation.views, flags.batch_size):
            if signals:
                break
            images = read_views(views, key)
            with autocast(flags.device, flags.amp):
                features[0, key.view, key.index] = student.extract_features(images)
                features[1, key.view, key.index] = student.extract_features(images.flip(-1))
            progress.advance(len(images))
    return KeptFeatures(features)


def passes_ahead(flags: TrainingFlags) -> bool:
    """Whether all views pass through a network before the training that needs its outputs.

    On a CPU: there small images pass faster in batches that are larger than those of a training,
    and views are read in no time beside that. And what a view gives does not depend on the
    batches of the training: a run that is resumed, and computes it anew, gets the same bits.
    """
    return flags.device.type == "cpu" and not flags.compile and get_world_size() == 1


@contextlib.contextmanager
def stop_after_signal(path: Path, flags: TrainingFlags) -> Iterator[list[int]]:
    """Ends the process after its block, if a signal came.

    The block gets the list of `noted_signals`, and breaks off its pass over the views when that is
    no longer empty.
    """
    with noted_signals() as signals:
        yield signals
    if signals:
        end_by_signal(signals[0], path, flags, "stopped, nothing of a training is lost")


def keys_of_views(
    views: data.TrainingViews, num_views: int, batch_size: int
) -> Iterator[TargetKey]:
    """All `num_views` views of all images, in order, as many at a time as pass at once."""
    images = torch.arange(len(views))
    count = data.images_per_pass(batch_size, math.prod(views.crop_size))
    for view in range(num_views):
        for index in images.split(count):
            yield TargetKey(torch.full_like(index, view), index)


def read_views(views: data.TrainingViews, key: TargetKey) -> Tensor:
    """Those views as they are before their flip: uint8 [B, 3, h, w]."""
    images = []
    for view, index in zip(key.view.tolist(), key.index.tolist(), strict=True):
        image, _ = views.read_view(view, index)
        images.append(image)
    return torch.stack(images)


def path_of_head(path: Path) -> Path:
    """Beside which the log and the state of the head's own training lie; no file has this name."""
    return path.with_name(f"{path.stem}{HEAD_ENDING}.pt")


def build_validation(lessons: Lessons, flags: TrainingFlags, with_uncertainty: bool) -> Callable:
    """`evaluate.validate` of a network; with its uncertainty against the teacher's, or without."""
    return functools.partial(
        validate,
        loader=lessons.val_loader,
        device=flags.device,
        amp=flags.amp,
        teacher_target=lessons.targets.for_validation if with_uncertainty else None,
        one_size=flags.compile and lessons.val_has_one_size,
    )


def build_views(
    flags: TrainingFlags,
    distillation: DistillationFlags,
    train_set: data.SegmentationDataset,
    view_seeds: list[int],
    targets_path: Path | None,
) -> data.TrainingViews:
    """The student's training views.

    targets_path: where the targets that come with them are kept, with --views; None if they come
    without.
    """
    stored = targets_path if distillation.views > 0 else None
    return data.TrainingViews(
        train_set,
        flags.crop_size,
        flags.scale,
        view_seeds,
        distillation.views,
        distillation.jitter,
        stored,
    )


def open_targets(
    teacher: Ensemble,
    flags: TrainingFlags,
    distillation: DistillationFlags,
    views: data.TrainingViews,
    val_set: data.SegmentationDataset,
    path: Path,
) -> TeacherTargets:
    """The teacher's targets, kept beside `path`: validation images' always, views' with --views."""
    measures = distillation.measures
    with_probs = distillation.distill_probs > 0
    identity = cache_identity(flags, views, val_set)
    largest = [MEASURES[name].largest for name in measures]

    val_shape = (1, len(val_set), 1, *val_set.largest_mask())
    val_path = path.with_suffix(".val-targets.npy")
    val_cache = open_cache(val_path, val_shape, largest[:1], identity, flags.device)

    train_cache = None
    if distillation.views > 0:
        if with_probs:
            largest += [1.0] * len(val_set.classes)
        shape = (views_of_teacher(flags, distillation), len(views), len(largest), *flags.crop_size)
        train_path = path.with_suffix(".targets.npy")
        train_cache = open_cache(train_path, shape, largest, identity, flags.device)
    return TeacherTargets(teacher, measures, with_probs, flags.amp, train_cache, val_cache)


def cache_identity(
    flags: TrainingFlags,
    views: data.TrainingViews,
    val_set: data.SegmentationDataset,
) -> dict:
    """All that stored targets depend on; where it differs they are of another teacher or view.

    The seed is in the views' stream, the crop in the cache's shape, and the classes in
    the teacher's identity.
    """
    identity = {
        "stream": views.stream,
        "jitter": views.jitter,
        "train_images": data.fingerprint(views.dataset.images),
        "val_images": data.fingerprint(val_set.images),
    }
    # the batch size, for MC dropout is seeded by the first image of a batch or, on a CPU, a pass
    recorded = (
        "teacher_identity",
        "mc_samples",
        "dataset",
        "split",
        "image_size",
        "scale",
        "amp",
        "batch_size",
        "targets",
        "distill_probs",
    )
    for name in recorded:
        identity[name] = flags.recorded[name]
    return identity


# ------------------------------------------------------------------------------------- command line

# What a student takes from its teacher where the command leaves it open.
INHERITED = (
    "dataset",
    "data",
    "split",
    "backbone",
    "weights",
    "image_size",
    "crop_size",
    "hold_out",
    "batch_size",
    "head_lr_mult",
    "weight_decay",
    "warmup",
    "validate_every",
    "scale",
)


def inherit_from_teacher(command: dict, checkpoint: dict) -> dict:
    """The flags of a command; those it leaves open (None) are as the teacher was trained.

    Epochs and learning rate are those of the teacher, times the factors of its data set's recipe.
    Raises UsageError where the teacher's data set has moved, or was divided otherwise than --val
    says.
    """
    flags = dict(command)
    trained = checkpoint["args"]
    recipe = RECIPES[trained["dataset"]]
    if flags["epochs"] is None:
        flags["epochs"] = int(recipe["student_epochs_factor"] * trained["epochs"])
    if flags["lr"] is None:
        flags["lr"] = recipe["student_lr_factor"] * trained["lr"]

    if flags["val"] is not None and trained.get("val") not in (None, flags["val"]):
        raise UsageError(
            f"--val {flags['val']:g}: the teacher was trained with {trained['val']:g}, and has "
            "learned from images that would validate; leave it out"
        )
    inherited = set(INHERITED)
    if flags["dataset"] not in (None, trained["dataset"]):
        inherited.remove("data")  # another data set has its files elsewhere
    if flags["image_size"] not in (None, trained["image_size"]):
        inherited.remove("crop_size")  # another size of image has another crop
    for name in inherited:
        if flags[name] is None:
            flags[name] = trained.get(name)
    if flags["data"]:
        flags["data"] = Path(flags["data"])
    if command["data"] is None:
        refuse_moved_data(flags["data"])
    if flags["val"] is None and data.is_flat(flags["dataset"], flags["data"]):
        flags["val"] = trained.get("val")
    return flags


def choose_lessons(command: dict) -> dict:
    """The flags with what the head decides: --targets, --head-epochs and the weights.

    Raises UsageError at a flag that the other head has.
    """
    flags = dict(command)
    head = flags["head"]
    targets = flags["targets"] or DEFAULT_TARGETS[head]
    flags["targets"] = list(dict.fromkeys(targets))  # each once, in the order named
    if head == "paper":
        if flags["head_epochs"] is not None:
            raise UsageError(
                f"--head-epochs {flags['head_epochs']}: the paper's head learns with the rest of "
                "the network; leave it out, or use --head confidence"
            )
        flags["head_epochs"] = 0
        if flags["distill_probs"] is None:
            flags["distill_probs"] = 0.0
    else:
        if flags["uncertainty_weight"] is not None:
            raise UsageError(
                f"--uncertainty-weight {flags['uncertainty_weight']:g}: the {head} head learns "
                "alone, so nothing is weighed against it; leave it out, or use --head paper"
            )
        flags["uncertainty_weight"] = 0.0
    return flags


def views_of_work(flags: TrainingFlags, distillation: DistillationFlags, members: int) -> float:
    """How many training steps the work on one image is worth: one for each epoch, and a third for
    each pass of a member and for each epoch of the head alone (less where `KeptFeatures` are)."""
    passes = members * views_of_teacher(flags, distillation) + distillation.head_epochs
    return flags.epochs + passes / 3


def views_of_teacher(flags: TrainingFlags, distillation: DistillationFlags) -> int:
    """How many views of each image the teacher is asked about."""
    epochs_with_teacher = flags.epochs
    if distillation.head != "paper" and distillation.distill_probs == 0:
        epochs_with_teacher = 0  # the segmentation learns from the labels alone
    if distillation.views == 0:
        return epochs_with_teacher + distillation.head_epochs  # a new one in each
    # The head's epochs begin with the same views as those of the segmentation.
    most_epochs = max(epochs_with_teacher, distillation.head_epochs)
    return min(distillation.views, most_epochs)


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- teacher and flags
    teacher, teacher_checkpoint = load_ensemble(args.teacher, args.mc_samples)
    inherited = inherit_from_teacher(vars(args), teacher_checkpoint)
    recipe = RECIPES[inherited["dataset"]]
    resolved = resolve_flags(choose_lessons(inherited), recipe)
    measures = [name for name in resolved["targets"] if name != ERROR]
    if not measures:
        raise UsageError(
            f"--targets {ERROR} is learned from the labels alone; name a measure of the teacher "
            "too, such as std"
        )
    resolved["teacher_identity"] = teacher_checkpoint["identity"]  # part of what is compared
    flags = select_training_flags(resolved)
    distillation = DistillationFlags(
        measures=measures,
        learns_error=ERROR in resolved["targets"],
        head=resolved["head"],
        head_epochs=resolved["head_epochs"],
        views=resolved["views"],
        uncertainty_weight=resolved["uncertainty_weight"],
        distill_probs=resolved["distill_probs"],
        jitter=recipe["jitter"],
    )
    path = args.out or member_files(args.teacher)[0].with_name("student.pt")
    if path.suffix != ".pt":  # the files beside it have its name with another suffix
        raise UsageError(f"--out {path}: name a file that ends in .pt")
    if path.stem.endswith(HEAD_ENDING):
        raise UsageError(
            f"--out {path}: the files of a student's head have names that end so; use another name"
        )

    with process_group(flags.device):
        # ------------------------------------------------------------ data
        train_set, val_set = open_splits(flags)
        flags = choose_validation_interval(flags, train_set, val_set)
        classes = teacher_checkpoint["config"]["classes"]
        if train_set.classes != classes:
            raise UsageError(
                f"the teacher knows the classes {', '.join(classes)}, the data has "
                f"{', '.join(train_set.classes)}; use the teacher's data set"
            )
        if flags.data is not None and speaks_for_command():
            for warning in division_warnings(train_set, flags.data, teacher_checkpoint):
                warn(warning)

        if args.overwrite or not path.exists():
            num_views = len(train_set) * views_of_work(flags, distillation, len(teacher))
            seconds = seconds_if_long(flags, num_views)
            if seconds > 0:
                print(
                    f"this will take about {rough_time(seconds)} on this CPU with nothing else to "
                    "do; fewer --epochs or --head-epochs, or --views 1, take less",
                    flush=True,
                )

        # ------------------------------------------------------------ student
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(path) if is_first_process() else contextlib.nullcontext()
        with lock:
            if args.overwrite and is_first_process():
                remove_files(path, WRITTEN)
                remove_files(path_of_head(path), (".jsonl", *UNFINISHED))
            wait_for_group(flags.device)
            refuse_other_command(path, flags.recorded, len(train_set))
            if path.exists():
                report_finished(path)
                remove_files(path_of_head(path), UNFINISHED)  # a kill may have left them
            else:
                if is_first_process() and not path.with_suffix(".state").exists():
                    # of another student, which was removed by hand
                    remove_files(path_of_head(path), (".jsonl", *UNFINISHED))
                wait_for_group(flags.device)
                train_student(path, teacher, train_set, val_set, flags, distillation)

        # ------------------------------------------------------------ what is next
        names = " ".join(str(name) for name in args.teacher)
        if args.mc_samples:
            names += f" --mc-samples {args.mc_samples}"
        print(f"next: python evaluate.py --student {path} --teacher {names} --ood")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: the teacher, how it is learned from, and the training flags."""
    student_defaults = {
        "student_epochs_factor": "epochs, times a member's",
        "student_lr_factor": "lr, times a member's",
        "views": "views",
        "distill_probs": "distill-probs",
        "head_epochs": "head-epochs",
        "uncertainty_weight": "uncertainty-weight",
    }
    parser = Parser(
        prog="distill.py",
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"recipes, the defaults of each --dataset:\n{recipe_table(student_defaults)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # leaves the epilog's rows alone
    )
    flag = parser.add_argument_group("what to distil").add_argument
    flag(
        "--teacher",
        nargs="+",
        type=Path,
        default=[Path("ckpts")],
        metavar="DIR|FILE",
        help="folder of an ensemble, or its checkpoints one by one (default: ckpts)",
    )
    flag(
        "--mc-samples",
        type=non_negative(int),
        default=0,
        metavar="N",
        help="N dropout samples of a single checkpoint are the teacher (default: 0, an ensemble)",
    )
    flag(
        "--views",
        type=non_negative(int),
        metavar="K",
        help="scale and crop repeat after K epochs, whose teacher targets are kept on the disk; "
        "the teacher's cost falls by E / K, where E epochs ask it: those of the head, and all with "
        "--distill-probs or --head paper. 0: new views, float targets, none of them "
        "kept (default: the recipe's, below)",
    )
    flag(
        "--targets",
        nargs="+",
        choices=[*MEASURES, ERROR],
        metavar="MEASURE",
        help="what to learn, a channel each: of the teacher std, entropy, mutual_information, "
        "msp; of the labels error, the probability that the student's class is wrong (default: "
        "all five; with --head paper std, the paper's only one)",
    )
    flag(
        "--head",
        choices=HEADS,
        default=HEADS[0],
        help="what predicts the uncertainty. confidence: weighs the student's own softmax, at "
        "full resolution, with weights that it predicts from the features; it learns alone, when "
        "the network is done. "
        "paper: a 1x1 convolution of the features, which learns with the network (default: "
        f"{HEADS[0]})",
    )
    flag(
        "--head-epochs",
        type=positive(int),
        metavar="N",
        help="epochs of the confidence head alone; each costs about a third of an epoch of the "
        "whole network, and on a CPU far less where N is several times 2 K of --views "
        "(default: the recipe's, below)",
    )
    flag(
        "--distill-probs",
        type=non_negative(float),
        metavar="V",
        help="weight of the KL divergence from the teacher's mean probabilities, against 1 of the "
        "cross-entropy, in their mean. Kept targets take a byte more for each class and pixel "
        "(default: the recipe's, below; 0 with --head paper)",
    )
    flag(
        "--uncertainty-weight",
        type=non_negative(float),
        metavar="W",
        help="with --head paper: weight of the RMSLE; the paper's is 1 (default: the recipe's, "
        "below)",
    )
    flag("--dataset", choices=data.DATASETS, help="(default: the teacher's)")
    flag("--backbone", choices=BACKBONES, help="(default: the teacher's)")
    flag("--hold-out", nargs="+", metavar="CLASS", help="(default: the teacher's)")
    flag("--out", type=Path, metavar="FILE", help="(default: student.pt beside the teacher)")
    add_training_flags(
        parser,
        unset="default: the teacher's",
        unset_epochs_and_lr="default: the teacher's, times the recipe's factor below",
    )
    parser.set_defaults(split=None)  # inherited, where --help says "train"
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main, get_args_parser()))
