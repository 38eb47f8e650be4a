"""Train the members of a Deep Ensemble, each from its own seed.

    python train_ensemble.py --members 10      # -> ckpts/member_00.pt ..., minutes on a CPU
    python train_ensemble.py --members 10 --dataset camvid --data DIR

A member is a plain segmentation network trained with cross-entropy by SGD, its learning rate

    lr(t) = base * (1 - t/T)^0.9 * min(1, (t + 1) / warmup)        t = 0 ... T - 1

The same command again continues where the last one stopped, down to the bit on a CPU.

Outline:
    recipes             the defaults of each data set, one visible table
    the command         flags resolved, recorded, compared with those of an earlier run
    loss and schedule   cross-entropy, learning rate, optimiser
    the loop            RunState, train_one_epoch, fit; distill.py runs the same one
    the state           saved and read, so that a killed run goes on
    processes           torchrun's groups, members side by side, signals
    progress            one live line, one line an epoch, curves
    members             a network, its loaders, its checkpoint
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
import glob
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as functional_collectives
from torch.utils.data import DataLoader

import data
from data import IGNORED, VOID, Sample
from evaluate import (
    LiveLine,
    Parser,
    chart_sheet,
    exit_code_of,
    finite_number,
    learning_charts,
    non_negative,
    positive,
    print_settings,
    run_main,
    terminal_width,
    training_logs,
    validate,
    warn,
    without_nan,
)
from model import (
    BACKBONES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DeepLabV3,
    UsageError,
    autocast,
    choose_amp,
    choose_device,
    find_members,
    get_rank,
    get_world_size,
    is_first_process,
    load_weights,
    locked,
    member_path,
    read_checkpoint,
    read_tensors,
    save_atomically,
    silence,
    speaks_for_command,
    torchrun_rank,
    versions,
)

# ------------------------------------------------------------------------------------------ recipes

# The defaults of each data set; a flag that is given replaces its entry.
PRETRAINED = dict(
    backbone="resnet101",
    weights="imagenet",
    epochs=100,
    batch_size=8,
    lr=0.01,  # of the backbone; for pretrained weights
    head_lr_mult=10.0,  # the heads are new, so they learn faster
    weight_decay=5e-4,
    warmup=0,  # steps over which the learning rate rises
    scale=(0.5, 2.0),  # a view is resized by a factor from this range
    # for the student alone:
    student_epochs_factor=1,  # its epochs, as a multiple of a member's
    student_lr_factor=1.0,  # its learning rate, likewise
    jitter=0.0,  # strength of the colour jitter
    views=5,  # views of an image whose teacher targets are kept
    distill_probs=1.0,  # weight of the teacher's probabilities
    head_epochs=10,  # for the uncertainty head alone
    uncertainty_weight=1.0,  # of the RMSLE with the paper's head; the paper's value
)
RECIPES = {
    "synthetic": dict(
        backbone="resnet18",
        weights="none",
        epochs=1,
        batch_size=4,
        crop_size=(80, 120),
        lr=0.2,
        head_lr_mult=1.0,
        weight_decay=5e-4,
        warmup=10,
        scale=(1.0, 1.0),
        jitter=0.0,
        views=1,
        student_epochs_factor=3,
        student_lr_factor=0.5,
        # With 0 the student segments better and agrees less with its teacher (docs/RESULTS.md).
        distill_probs=0.2,
        head_epochs=16,
        uncertainty_weight=2.0,
    ),
    "camvid": PRETRAINED | dict(crop_size=(360, 480)),
    # Kept for five views, the probabilities of 19 and of 21 classes would take 170 and 40 GB.
    "cityscapes": PRETRAINED
    | dict(crop_size=(768, 768), epochs=200, batch_size=16, distill_probs=0.0),
    "voc": PRETRAINED
    | dict(
        crop_size=(512, 512),
        batch_size=16,
        lr=0.001,
        weight_decay=1e-4,
        jitter=0.2,
        distill_probs=0.0,
    ),
    "folder": PRETRAINED | dict(crop_size=(512, 512)),
}
# These replace a recipe's entries where --weights none takes the place of pretrained weights.
SCRATCH = dict(lr=0.05, head_lr_mult=1.0, warmup=50)

# `PaperHead` learns at this multiple of the base rate at least. Ten is the paper's for all
# heads; this one, a sigmoid that starts near 0, always needs it.
UNCERTAINTY_LR_MULT = 10.0

# -------------------------------------------------------------------------------------- the command


class TrainingFlags(NamedTuple):
    """The flags that members and student share, each with its value; --help has their units."""

    dataset: str
    data: Path | None
    val: float | None  # of a folder without splits, the part that validates
    split: str
    hold_out: list[str]
    image_size: tuple[int, int] | None  # None: as the images are
    crop_size: tuple[int, int]
    scale: tuple[float, float]
    cache: Path | None
    workers: int
    backbone: str
    weights: str
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    head_lr_mult: float
    weight_decay: float
    warmup: int
    seed: int
    select: str
    validate_every: int | None  # None: as `choose_validation_interval` says
    device: torch.device
    amp: str
    compile: bool
    save_every: float
    overwrite: bool
    recorded: dict  # all flags of the command, as checkpoints store them
    # Two that are no flags: where members are trained side by side, and whether another training
    # goes on from what this one ends with, so that it is saved however short it was.
    place: "SideBySide | None" = None
    keeps_last_state: bool = False


# What may differ between a command and the run that it continues. Of the teacher, its
# identity counts, not its path.
FREE_TO_CHANGE = {
    "members",
    "member_ids",
    "parallel",
    "workers",
    "device",
    "data",
    "cache",
    "out",
    "save_every",
    "overwrite",
    "teacher",
    # Of older versions: they only concerned the images of --strong-views and --extra, and a run
    # that had those is refused.
    "unlabelled_depth",
    "unlabelled_weight",
}


def resolve_flags(command: dict, recipe: dict) -> dict:
    """The flags of a command; those it leaves open (None) come from the recipe or the machine.

    The folder of the data set becomes an absolute path, for checkpoints that are used elsewhere.

    Raises UsageError where the device cannot be used or the scales are out of range, DataError
    where --val is given for a data set with splits of its own.
    """
    flags = dict(command)
    if flags["data"]:
        flags["data"] = Path(os.path.abspath(flags["data"]))
    flags["val"] = data.choose_val_share(flags["dataset"], flags["data"], flags["val"])
    if flags["image_size"] and not flags["crop_size"]:
        height = min(recipe["crop_size"][0], flags["image_size"][0])
        width = min(recipe["crop_size"][1], flags["image_size"][1])
        flags["crop_size"] = (height, width)
    if flags["weights"] == "none" and recipe["weights"] != "none":
        recipe = recipe | SCRATCH
    for name, value in recipe.items():
        if name in flags and flags[name] is None:
            flags[name] = value

    device = choose_device(flags["device"])
    flags["device"] = str(device)
    flags["amp"] = choose_amp(flags["amp"], device)
    if flags["compile"] is None:
        flags["compile"] = device.type == "cuda"
    if flags["workers"] is None:
        flags["workers"] = 0  # on a CPU the training itself needs every core
        if device.type == "cuda":
            flags["workers"] = choose_workers()

    low, high = flags["scale"]
    if not (0 < low <= 1 <= high < math.inf):
        raise UsageError(f"--scale {low:g} {high:g}: needs 0 < LO <= 1 <= HI")
    return flags


def choose_workers() -> int:
    """Loading processes for one GPU: its share of the cores that may be used, up to 16."""
    if hasattr(os, "sched_getaffinity"):
        usable_cores = len(os.sched_getaffinity(0))
    else:  # not Linux
        usable_cores = os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, usable_cores // processes))


def select_training_flags(resolved: dict) -> TrainingFlags:
    """The resolved flags that the training reads; all others are recorded only."""
    recorded = json.loads(json.dumps(resolved, default=str, sort_keys=True))
    shared = {name: resolved[name] for name in TrainingFlags._fields if name in resolved}
    shared["device"] = torch.device(resolved["device"])
    return TrainingFlags(**shared, recorded=recorded)


# The groups of `shown_settings`; what is in none of them is of the run as a whole.
SETTING_GROUPS = {
    "distillation": (
        "teacher",
        "mc_samples",
        "targets",
        "views",
        "distill_probs",
        "head_epochs",
        "uncertainty_weight",
    ),
    "data": (
        "dataset",
        "data",
        "val",
        "split",
        "hold_out",
        "image_size",
        "crop_size",
        "scale",
        "cache",
    ),
    "network": ("backbone", "weights", "head"),
    "optimisation": (
        "epochs",
        "batch_size",
        "accumulate",
        "lr",
        "head_lr_mult",
        "weight_decay",
        "warmup",
        "seed",
        "select",
        "validate_every",
    ),
    "machine": ("device", "amp", "compile", "workers", "parallel", "save_every"),
}


def shown_settings(recorded: dict) -> dict[str, dict]:
    """The resolved flags in groups, for `print_settings`, without those that change nothing."""
    without_effect = {"teacher_identity"}  # digits that tell a reader nothing
    if not recorded.get("mc_samples"):
        without_effect.add("mc_samples")
    if recorded.get("head") == "confidence":
        without_effect.add("uncertainty_weight")  # nothing is weighed against its loss
    if recorded.get("head") == "paper":
        without_effect.add("head_epochs")  # it learns in all epochs
    shown = {name: value for name, value in recorded.items() if name not in without_effect}

    groups: dict[str, dict] = {group: {} for group in ("run", *SETTING_GROUPS)}
    group_of = {}
    for group, names in SETTING_GROUPS.items():
        for name in names:
            group_of[name] = group
            if name in shown:
                groups[group][name] = shown[name]
    for name, value in shown.items():
        if name not in group_of:
            groups["run"][name] = value
    return groups


def check_same(saved: dict, recorded: dict, path: Path) -> None:
    """A run goes on under the flags it was begun with; UsageError names the first difference.

    A flag that did not exist when the run began counts as a difference, too, unless this command
    leaves it at None, which means that it does nothing. A flag of the run that this command does
    not have counts, too, unless it was None or False.
    """
    free = FREE_TO_CHANGE
    if saved["device"].split(":")[0] != recorded["device"].split(":")[0]:
        free = free | {"amp", "compile"}  # their defaults follow the device
    for name in sorted((saved.keys() | recorded.keys()) - free):
        is_gone = name not in recorded
        if is_gone and saved[name] is False:  # the run did not use it
            continue
        if saved.get(name) != recorded.get(name):
            flag = "--" + name.replace("_", "-")
            if name == "teacher_identity":
                flag = "the teacher"
            begun = f"with {flag} {saved.get(name)}"
            if name not in saved:
                begun = f"by an older version, which had no {flag}"
            if is_gone:
                raise UsageError(
                    f"{path} was begun {begun}, which this command does not have; use another "
                    "--out, or --overwrite to start anew"
                )
            raise UsageError(
                f"{path} was begun {begun}, this command says {recorded.get(name)}; use the same "
                "flags, another --out, or --overwrite to start anew"
            )


ROLES = {"member": 0, "student": 1, "head": 2}


class RandomStream(NamedTuple):
    """The seeds of one network; no two networks share them."""

    torch_seed: int  # of its initial weights and its dropout
    view_seeds: list[int]  # of the order, scale, crop and flip of its images


def random_stream(seed: int, role: str, member: int) -> RandomStream:
    """The seeds of a member, the student or its head in the run with --seed `seed`."""
    sequence = np.random.SeedSequence([seed, ROLES[role], member])
    torch_seed, *view_seeds = sequence.generate_state(4).tolist()
    return RandomStream(torch_seed, view_seeds)


# -------------------------------------------------------------------------------- loss and schedule


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels, 0 where there are none.

    logits [B, C, H, W]; labels uint8 [B, H, W], of which 254 and 255 do not count. In a
    process group it is the mean over the pixels of all processes.
    """
    target = torch.where(labels == IGNORED, VOID, labels.long())
    total = F.cross_entropy(logits.float(), target, ignore_index=VOID, reduction="sum")
    count = (target != VOID).sum()
    return sum_over_processes(total) / sum_over_processes(count).clamp(min=1)


def segmentation_loss(network: nn.Module, batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """The members' `loss_fn` for `fit`: the loss of a batch, and what to log of it."""
    logits = network(batch.images).logits
    return cross_entropy(logits, batch.labels), {}


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """1 at step 0 (without warm-up), above 0 at the last step, `steps` - 1."""
    decay = (1 - step / steps) ** 0.9
    rise = min(1.0, (step + 1) / max(1, warmup))
    return decay * rise


def build_optimizer(
    model: DeepLabV3,
    lr: float,
    head_lr_mult: float,
    weight_decay: float,
    uncertainty_weight: float = 1.0,
) -> torch.optim.SGD:
    """SGD with momentum 0.9; `lr_mult` of a parameter group multiplies the learning rate.

    uncertainty_weight multiplies the loss of each uncertainty, so that it shapes the shared
    features more. The uncertainty head's own steps should not grow with it, so its rate is
    divided by the weight and its decay multiplied by it (their product stays). This holds
    while every loss on that head carries the weight.
    """
    uncertainty_lr_mult = max(head_lr_mult, UNCERTAINTY_LR_MULT)
    lr_mults = {
        "backbone": 1.0,
        "classifier": head_lr_mult,
        "uncertainty": uncertainty_lr_mult / uncertainty_weight,
    }
    groups = []
    for name, part in model.named_children():
        decay = weight_decay
        if name == "uncertainty":
            decay = weight_decay * uncertainty_weight
        parameters = list(part.parameters())
        groups.append({"params": parameters, "lr_mult": lr_mults[name], "weight_decay": decay})
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, fused=True)
    # Fused SGD makes its momentum in its first step. Where a GradScaler skips that step, and the
    # first ones of --amp fp16 overflow as a rule, it would stay uninitialised memory.
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# ----------------------------------------------------------------------------------------- the loop


class UnreadLoss(NamedTuple):
    """The loss of a batch that nobody has looked at yet: reading it would wait for a GPU."""

    batch: int  # of the epoch
    indices: Tensor  # of its images
    loss: Tensor


@dataclass
class RunState:
    """Where a training stands: what a later process needs, beside the weights, to go on."""

    epoch: int = 0  # the one that runs now, from 0
    batch: int = 0  # batches of it that are done
    images: int = 0  # images of it that were seen
    sums: dict[str, Tensor] = field(default_factory=dict)  # this epoch's loss and its terms
    history: list[dict] = field(default_factory=list)  # one entry per finished epoch, as in .jsonl
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # with --select best
    unread_losses: list[UnreadLoss] = field(default_factory=list)  # empty whenever it is saved


@dataclass
class Run:
    """A network in training and all that changes with it."""

    path: Path  # of the checkpoint that it becomes; its log and its state lie beside it
    model: nn.Module  # the plain network, whose weights are saved
    wrapped_model: nn.Module  # the same network as it trains: in a process group, compiled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: RunState
    image_names: list[str]  # for messages
    signals: list[int]  # SIGINT, SIGTERM, SIGHUP that arrived
    last_save: float = field(default_factory=time.monotonic)  # of the state, or the beginning


# Seconds of training that are not worth a state of their own at the end of an epoch: one takes
# up to half a second, which is much beside an epoch of the drawn scenes.
LITTLE_TO_LOSE = 30


def fit(
    model: DeepLabV3,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Sample], tuple[Tensor, dict[str, Tensor]]],
    train_loader: DataLoader,
    validation: Callable[[nn.Module], dict],
    flags: TrainingFlags,
    path: Path,
) -> tuple[dict[str, Tensor], dict]:
    """Train `model`; returns the weights to keep, on the CPU, and their epoch's log entry.

    loss_fn(model, batch) returns the loss and a dictionary of what to log; validation(model)
    returns what `evaluate.validate` does. Both get a compiled model with --compile. The state of
    the running training lies in `path`.state and is taken up if it is there; `path`.jsonl gets
    one JSON line per epoch.

    Raises UsageError where the loss is not finite or the state belongs to another command;
    SystemExit 129, 130 or 143, after saving, where a signal asks for it.
    """
    scaler = torch.amp.GradScaler(flags.device.type, enabled=flags.amp == "fp16")
    image_names = train_loader.dataset.dataset.names  # of the data set behind the views
    state_path = path.with_suffix(".state")
    state = load_state(state_path, model, optimizer, scaler, flags, len(image_names))
    wrapped_model = wrap_for_group(model, flags.device)
    validated_model = model  # validation needs no gradients, so nothing that a group wraps around
    if flags.compile:
        wrapped_model = torch.compile(wrapped_model, dynamic=False)
        # Another graph than that of the training. Both are kept, whichever mode comes next.
        validated_model = torch.compile(model, dynamic=False)

    with noted_signals() as signals:
        run = Run(path, model, wrapped_model, optimizer, scaler, state, image_names, signals)
        while state.epoch < flags.epochs:
            num_batches = len(train_loader.batch_sampler)
            with Progress(path.stem, state, flags.epochs, num_batches, flags.place) as progress:
                with fastest_convolutions():
                    train_one_epoch(run, loss_fn, train_loader, flags, progress)
                results = {}
                is_last_epoch = state.epoch + 1 == flags.epochs
                if (state.epoch + 1) % flags.validate_every == 0 or is_last_epoch:
                    progress.show_validation()
                    results = validation(validated_model)
                finish_epoch(run, results, progress, flags.select)
            is_due = seconds_since_save(run) > min(60 * flags.save_every, LITTLE_TO_LOSE)
            another_goes_on = is_last_epoch and flags.keeps_last_state
            save_if_due(run, flags, is_due or another_goes_on)

    weights = model.state_dict()
    if flags.select == "best":
        weights = state.best_weights
        validated = [entry for entry in state.history if "miou" in entry]
        best = kept_epoch(state.history, "best")["epoch"]
        print(f"{path.stem}: best of {len(validated)} validated epochs is epoch {best}")
    weights = {name: value.cpu() for name, value in weights.items()}
    return weights, kept_epoch(state.history, flags.select)


def train_one_epoch(
    run: Run, loss_fn: Callable, loader: DataLoader, flags: TrainingFlags, progress: "Progress"
) -> None:
    """The rest of epoch `run.state.epoch`, from batch `run.state.batch` on.

    An optimiser step takes `--accumulate` batches; the last step of an epoch takes what is
    left. The state is saved every `--save-every` minutes and where a signal asks for it.
    """
    state = run.state
    device = flags.device
    world = get_world_size()
    batches = loader.batch_sampler
    batches.epoch = state.epoch
    batches.start = state.batch
    steps_per_epoch = math.ceil(len(batches) / flags.accumulate)

    run.model.train()
    for batch in loader:
        first_batch_of_step = state.batch - state.batch % flags.accumulate
        batches_of_step = min(flags.accumulate, len(batches) - first_batch_of_step)

        # ---- forward and backward
        # index, view and flip stay on the CPU: reading them there would wait for the GPU
        batch = batch._replace(
            images=batch.images.to(device, non_blocking=True),
            labels=batch.labels.to(device, non_blocking=True),
        )
        # An epoch's last, smaller batch runs uncompiled: a graph of its own would take minutes
        # to compile, for one step in an epoch.
        stance = "default" if batches.is_full(state.batch) else "force_eager"
        with torch.compiler.set_stance(stance), autocast(device, flags.amp):
            loss, logs = loss_fn(run.wrapped_model, batch)
        # times `world`: see `wrap_for_group`
        run.scaler.scale(loss * world / batches_of_step).backward()

        # ---- what happened
        add_to_sums(state.sums, {"loss": loss, **logs})
        state.unread_losses.append(UnreadLoss(state.batch, batch.index, loss.detach()))
        state.batch += 1
        state.images += len(batch.images) * world
        if state.batch < first_batch_of_step + batches_of_step:
            continue
        # Reading a loss waits for a GPU, so there it is done every 20 batches. On a CPU it is
        # free, so it is done before each step: broken weights are never kept.
        epoch_is_done = state.batch == len(batches)
        if device.type == "cpu" or len(state.unread_losses) >= 20 or epoch_is_done:
            check_finite(state, run.image_names)

        # ---- optimiser step
        step = state.epoch * steps_per_epoch + first_batch_of_step // flags.accumulate
        factor = lr_factor(step, flags.epochs * steps_per_epoch, flags.warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = flags.lr * group["lr_mult"] * factor
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        progress.show(state, run.optimizer.param_groups[0]["lr"])

        # ---- save now and then
        # Asking a group waits for all of it, so it is asked only where its processes have just
        # waited for the losses: at the same step in every one of them.
        if world == 1 or not state.unread_losses:
            save_if_due(run, flags, seconds_since_save(run) > 60 * flags.save_every)


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms and keep the fastest: for images of one size alone."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def add_to_sums(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add each value to the sum of its name, without its gradient."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach()


def check_finite(state: RunState, image_names: list[str]) -> None:
    """Look at the unread losses; UsageError names the first batch whose loss is not finite."""
    for batch, indices, loss in state.unread_losses:
        value = loss.item()
        if not math.isfinite(value):
            images = ", ".join(image_names[index] for index in indices.tolist())
            raise UsageError(
                f"the loss is {value} in epoch {state.epoch}, batch {batch} (images {images}); "
                "nothing was saved of it: look at these images, lower --lr, or try --amp off"
            )
    state.unread_losses.clear()


def finish_epoch(run: Run, results: dict, progress: "Progress", select: str) -> None:
    """Log the epoch and its validation results, keep the best weights, go to the next epoch.

    results: {} where the epoch was not validated.
    """
    state = run.state
    entry = progress.finish(state, results, run.optimizer.param_groups[0]["lr"])
    state.history.append(entry)
    iou = results.get("iou", [])
    if learns_nothing(state.history, iou) and is_first_process():
        warn(
            f"{run.path.stem}: after {PATIENCE} validations the network tells classes apart no "
            f"better than by chance (val miou {entry['miou']:.4f}); usual reasons: a learning rate "
            "that is too high or too low (--lr), masks whose numbers mean something else than "
            "classes.txt says, images and masks that do not belong together"
        )
    if select == "best" and kept_epoch(state.history, "best") is entry:
        weights = run.model.state_dict()
        state.best_weights = {name: value.clone() for name, value in weights.items()}
    state.epoch += 1
    state.batch = 0
    state.images = 0
    state.sums = {}
    lines = [json.dumps(without_nan(entry)) + "\n" for entry in state.history]
    write_by_first_process(run.path.with_suffix(".jsonl"), "".join(lines))


PATIENCE = 5  # validations after which a network should have learned something


def learns_nothing(history: list[dict], iou: list[float]) -> bool:
    """Whether the first `PATIENCE` validations, and no more, are there and all are near chance.

    The mean accuracy of classes is 1 / C where the same class is predicted everywhere, and by lot.
    C counts the classes that there are, those whose last `iou` is a number.
    """
    accuracies = []
    for entry in history:
        if "mean_class_accuracy" in entry:
            accuracies.append(entry["mean_class_accuracy"])
    num_classes = sum(not math.isnan(value) for value in iou)
    if len(accuracies) != PATIENCE or num_classes < 2:
        return False
    return max(accuracies) < 1.1 / num_classes


def kept_epoch(history: list[dict], select: str) -> dict:
    """The log entry of the epoch whose weights are kept: the last, or the first of the best.

    The best has the highest validation mIoU. An epoch whose mIoU was not measured, or is not
    a number, is never the best, unless there is no other.
    """
    if select == "best":
        measured = [entry for entry in history if not math.isnan(entry.get("miou", math.nan))]
        if measured:
            return max(measured, key=lambda entry: entry["miou"])
    return history[-1]


# ---------------------------------------------------------------------------------------- the state


def save_state(run: Run, flags: TrainingFlags) -> None:
    """Write all that the same command needs to go on.

    Losses that were not looked at are checked first: a state with broken weights is never
    written.
    """
    state = run.state
    check_finite(state, run.image_names)
    content = {
        "epoch": state.epoch,
        "batch": state.batch,
        "images": state.images,
        "sums": state.sums,
        "history": state.history,
        "best_weights": state.best_weights,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": random_states(flags.device),
        "args": flags.recorded,
        "training_images": len(run.image_names),
    }
    write_by_first_process(run.path.with_suffix(".state"), content)
    run.last_save = time.monotonic()


def seconds_since_save(run: Run) -> float:
    return time.monotonic() - run.last_save


def save_if_due(run: Run, flags: TrainingFlags, is_due: bool) -> None:
    """Save the state if that is due in any process of a group; also at a signal, then end."""
    if any_process(is_due or bool(run.signals), flags.device):
        save_state(run, flags)
        stop_if_signalled(run, flags)


def stop_if_signalled(run: Run, flags: TrainingFlags) -> None:
    """End the process, whose state was just saved, if a signal has arrived in any of a group."""
    # asking also waits until the first process has written
    if not any_process(bool(run.signals), flags.device):
        return
    number = run.signals[0] if run.signals else signal.SIGTERM
    end_by_signal(
        number, run.path, flags, f"saved at epoch {run.state.epoch}, batch {run.state.batch}"
    )


def end_by_signal(number: int, path: Path, flags: TrainingFlags, what_is_kept: str) -> NoReturn:
    """End the process as signal `number` asks, after a line on the network `path` to stderr."""
    if is_first_process():
        without = " without --overwrite" if flags.overwrite else ""
        print(
            f"\n{path.stem}: {what_is_kept}; the same command{without} continues from there",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    flags: TrainingFlags,
    training_images: int,
) -> RunState:
    """Where the training stands: from `path` if a run was interrupted, else its beginning.

    Sets the model, the optimiser, the scaler and the random generators as they were. Raises
    UsageError where the state is of another command, of another number of processes or of a split
    that had not `training_images` images.
    """
    if not path.exists():
        return RunState()
    saved = read_tensors(path)
    check_same(saved["args"], flags.recorded, path)
    check_same_number(saved, training_images, path)
    of_another_version = (
        f"{path} was written by another version of this program; finish it with that one, or "
        "use --overwrite to start anew"
    )
    if "best_weights" not in saved:
        raise UsageError(of_another_version)
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError) as error:  # it has other layers, or other groups of them
        raise UsageError(of_another_version) from error
    if flags.amp == "fp16" and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    restore_random_states(saved["rng"], flags.device, path)

    state = RunState(
        epoch=saved["epoch"],
        batch=saved["batch"],
        images=saved["images"],
        sums={name: value.to(flags.device) for name, value in saved["sums"].items()},
        history=saved["history"],
        best_weights=saved["best_weights"],
    )
    print(f"{path.stem}: continuing at epoch {state.epoch}, batch {state.batch}", flush=True)
    return state


def check_same_number(saved: dict, training_images: int, path: Path) -> None:
    """UsageError where the state `path`, which holds `saved`, is of another number of images."""
    images_before = saved.get("training_images", training_images)
    if images_before != training_images:
        raise UsageError(
            f"{path} was begun with {images_before} training images, now there are "
            f"{training_images}; restore them, or use --overwrite to start anew"
        )


def random_states(device: torch.device) -> list[list[Tensor]]:
    """The state of the generators of every process: the CPU's, and the GPU's where it is used."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    world = get_world_size()
    if world == 1:
        return [states]
    states_of_all = [None] * world
    dist.all_gather_object(states_of_all, states)
    return states_of_all


def restore_random_states(states: list[list[Tensor]], device: torch.device, path: Path) -> None:
    """Set this process's generators; UsageError where another number of processes saved them."""
    if len(states) != get_world_size():
        raise UsageError(
            f"{path} was begun by {len(states)} processes, now there are {get_world_size()}; use "
            "as many, or --overwrite to start anew"
        )
    states_of_process = states[get_rank()]
    torch.set_rng_state(states_of_process[0])
    if device.type == "cuda" and len(states_of_process) > 1:
        torch.cuda.set_rng_state(states_of_process[1], device)


def write_by_first_process(path: Path, content: dict | str) -> None:
    """`save_atomically`, in one process of a group alone."""
    if is_first_process():
        save_atomically(path, content)


# What lies beside a checkpoint until it is finished; the targets are a student's.
UNFINISHED = (".state", ".targets.npy", ".targets.json", ".val-targets.npy", ".val-targets.json")
WRITTEN = (".pt", ".jsonl", *UNFINISHED)  # all that a training writes


def remove_files(path: Path, suffixes: tuple[str, ...]) -> None:
    """Remove the files of those suffixes beside the checkpoint `path`, and half-written ones.

    A run that is killed while it writes leaves a temporary file behind.
    """
    for suffix in suffixes:
        path.with_suffix(suffix).unlink(missing_ok=True)
    for suffix in WRITTEN:
        name = glob.escape(path.with_suffix(suffix).name)
        for half_written in path.parent.glob(f".{name}.*.tmp"):
            half_written.unlink(missing_ok=True)


def refuse_other_command(path: Path, recorded: dict, training_images: int) -> None:
    """UsageError where `path`, or the state beside it, was begun under other flags, or the state
    with another number of training images."""
    state = path.with_suffix(".state")
    if path.exists():
        check_same(read_checkpoint(path)["args"], recorded, path)
    elif state.exists():
        saved = read_tensors(state)
        check_same(saved["args"], recorded, state)
        check_same_number(saved, training_images, state)


def report_finished(path: Path) -> None:
    """Print that the checkpoint `path` is there already; tidy up what a kill left beside it."""
    remove_files(path, UNFINISHED)
    miou = read_checkpoint(path)["metrics"]["miou"]
    print(f"{path.name}: finished, val miou {miou:.4f}", flush=True)


# ---------------------------------------------------------------------------------------- processes


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in a process of the group; waits for all of them."""
    if get_world_size() == 1:
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared)
    return shared.item() > 0


def wait_for_group(device: torch.device) -> None:
    """Return when every process of the group has come here."""
    any_process(False, device)


# How the gradients of a process group come out right: our losses are means over the pixels of
# all processes. Each process differentiates the parts that its own pixels have in the sums
# (`sum_over_processes`), so the gradient of the whole is the SUM of the processes' gradients.
# DistributedDataParallel takes their MEAN, so the training loop multiplies the loss by their
# number.


def wrap_for_group(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it trains in a process group, with gradients averaged; alone, as it is.

    Batch norm takes the statistics of all processes, so that each of them holds the same
    running statistics.
    """
    if get_world_size() == 1:
        return model
    share_batch_norm(model)
    devices = [device] if device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    model.broadcast_buffers = False  # they are the same by themselves
    return model


def share_batch_norm(model: nn.Module) -> None:
    """Turn every batch norm of `model` into a `GroupBatchNorm2d`; parameters stay the same."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupBatchNorm2d


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes of a group, as nn.SyncBatchNorm has it.

    Unlike that one it runs on a CPU too, never waits for a GPU, and torch.compile traces it
    as a part of one graph.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] with any B on each process; all processes have to call it."""
        if not self.training:
            return super().forward(x)
        channels = x.shape[1]
        values = x.float()

        # ---- the statistics of this process, and by one collective those of all
        variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)  # [C] each
        count = torch.full_like(mean[:1], x.numel() // channels)
        statistics = torch.cat([mean, variance, count])  # [2 C + 1]
        # Each process fills a row of zeros of its own, so that the sum over the group holds all
        # rows as they were. To add up x and x^2 would be shorter, but these cancel where the
        # mean is large.
        ranks = torch.arange(get_world_size(), device=x.device)
        is_row_of_this_process = ranks[:, None] == get_rank()
        rows = SumOverGroup.apply(torch.where(is_row_of_this_process, statistics, 0.0))

        # ---- the statistics of the whole batch
        means, variances, counts = rows.split([channels, channels, 1], dim=1)
        total = counts.sum()
        share = counts / total  # [world, 1]
        mean = (share * means).sum(dim=0)
        variance = (share * (variances + (means - mean).square())).sum(dim=0)
        with torch.no_grad():
            unbiased = variance * total / (total - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)

        scale = self.weight * torch.rsqrt(variance + self.eps)
        centred = values - mean.view(1, -1, 1, 1)
        normalised = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalised.to(x.dtype)


class SumOverGroup(torch.autograd.Function):
    """The sum of a tensor over a process group; its gradient is summed over the group too.

    torch.compile traces functional collectives, not those of torch.distributed itself.
    """

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        return functional_collectives.all_reduce(x, "sum", dist.group.WORLD)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        return functional_collectives.all_reduce(gradient, "sum", dist.group.WORLD)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of x over a process group, with the gradient of this process's part alone."""
    if get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + (x - x.detach())


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP go to a list, for the loop to look at when its state is whole.

    A second one ends at once; but a terminal that is closed may send several SIGHUP.
    """
    caught = []

    def note(number: int, frame) -> None:
        if not caught:
            caught.append(number)
        elif number != signal.SIGHUP:
            raise KeyboardInterrupt

    with signals_to(note):
        yield caught


@contextlib.contextmanager
def signals_to(handler: Callable) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP call `handler(number, frame)` for the time being. A SIGHUP that is
    ignored, as under nohup, stays so."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)


# ----------------------------------------------------------------------------------------- progress


TEXT_BYTES = 60  # of a process's part of a live line that several share


class SideBySide(NamedTuple):
    """The place of a process among those that train members side by side."""

    texts: list  # of each process, its part of their one live line, in shared memory
    number: int  # of this process


class SharedLiveLine(LiveLine):
    """The live line of members that train side by side: it shows what each of them says.

    There is no lock, which a process that is killed would keep: every output is one write that
    covers the whole row.
    """

    def __init__(self, place: SideBySide, silent: bool = False):
        super().__init__(silent)
        self.place = place

    def show(self, text: str) -> None:
        """Write all parts over what is there, `text` as that of this process."""
        if not self.active:
            return
        encoded = text.encode("ascii", errors="replace")
        self.place.texts[self.place.number].value = encoded[: TEXT_BYTES - 1]
        parts = [shared.value.decode() for shared in self.place.texts]
        self.text = " " * terminal_width()  # what another process shows may be that long
        super().show(" | ".join(part for part in parts if part))

    def clear(self) -> None:
        """Take the part of this process off the line, and leave the cursor at its beginning."""
        self.show("")
        if self.active:
            print("\r", end="", file=sys.stderr, flush=True)


class RowOutput:
    """stdout or stderr of a process beside others, on their terminal: lines cover the live line."""

    def __init__(self, stream):
        self.stream = stream
        self.unfinished = ""

    def write(self, text: str) -> int:
        """Write as print does, whole lines in one piece each."""
        if text.startswith("\r"):  # the live line itself
            return self.stream.write(text)
        lines = (self.unfinished + text).split("\n")
        self.unfinished = lines.pop()
        for line in lines:
            row = line.ljust(terminal_width() - 1)
            self.stream.write(f"\r{row}\n")
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Progress:
    """Inside a `with`, one live line on a terminal while an epoch runs; one line an epoch anywhere.

    place: that of this process, where several train members side by side: its part of the line
    they share is shorter.
    """

    def __init__(
        self,
        name: str,
        state: RunState,
        epochs: int,
        num_batches: int,
        place: SideBySide | None = None,
    ):
        silent = torchrun_rank() > 0
        if place is None:
            self.live_line = LiveLine(silent)
        else:
            self.live_line = SharedLiveLine(place, silent)
        self.place = place
        self.title = f"{name}  epoch {state.epoch + 1}/{epochs}"
        self.short_title = f"{name} {state.epoch + 1}/{epochs}"
        self.epochs = epochs
        self.num_batches = num_batches
        # above 0 where an epoch is continued: the rate is that of what is done now
        self.first_batch = state.batch
        self.first_image = state.images
        self.started = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.live_line.clear()  # so that an error has a row of its own

    def show(self, state: RunState, lr: float) -> None:
        """The live line: mean loss of the epoch so far, rate, time left of the whole training."""
        if not self.live_line.is_due():
            return
        seconds = time.monotonic() - self.started
        loss = state.sums["loss"].item() / state.batch
        rate = (state.images - self.first_image) / seconds
        batches_left = (self.epochs - state.epoch) * self.num_batches - state.batch
        seconds_left = batches_left * seconds / (state.batch - self.first_batch)
        left = f"{timedelta(seconds=round(seconds_left))} left"
        if self.place is not None:
            self.live_line.show(f"{self.short_title} {state.batch}/{self.num_batches} {left}")
            return
        self.live_line.show(
            f"{self.title}  batch {state.batch}/{self.num_batches}  {left}  loss {loss:.4f}  "
            f"{rate:.1f} images/s  lr {lr:.2e}"
        )

    def show_validation(self) -> None:
        """The live line while the network is validated."""
        title = self.title if self.place is None else self.short_title
        self.live_line.show(f"{title}  validating")

    def finish(self, state: RunState, results: dict, lr: float) -> dict:
        """Print the epoch's line and return it as the dictionary that goes to the log."""
        seconds = time.monotonic() - self.started
        seconds_left = seconds * (self.epochs - state.epoch - 1)
        means = {name: value.item() / self.num_batches for name, value in state.sums.items()}
        logged = ("miou", "pixel_accuracy", "mean_class_accuracy")
        logged_of_student = ("fidelity_rmsle", "fidelity_pearson")
        results = {name: results[name] for name in logged + logged_of_student if name in results}

        words = [self.title]
        words += [f"{name} {mean:.4f}" for name, mean in means.items()]
        if "miou" in results:
            words.append(f"val miou {results['miou']:.4f}")
        if "fidelity_pearson" in results:
            words.append(f"val pearson {results['fidelity_pearson']:.4f}")
        words.append(f"{seconds:.1f} s")
        words.append(f"{timedelta(seconds=round(seconds_left))} left")
        self.live_line.clear()
        print("  ".join(words), flush=True)
        return {
            "epoch": state.epoch + 1,
            "lr": lr,
            **means,
            **results,
            "seconds": round(seconds, 2),
        }


def draw_curves(folder: Path) -> None:
    """curves.svg: loss and validation mIoU by epoch of all members that are in the folder."""
    logs = training_logs(find_members(folder))
    save_atomically(folder / "curves.svg", chart_sheet(learning_charts(logs)))


# ------------------------------------------------------------------------------------------ members


def open_splits(flags: TrainingFlags) -> tuple[data.SegmentationDataset, data.SegmentationDataset]:
    """The training and the validation split; prints what they are, and the resolved flags.

    Warnings about them go to stderr.
    """
    splits = []
    for split in (flags.split, "val"):
        dataset = data.open_dataset(
            flags.dataset, flags.data, split, flags.image_size, flags.hold_out, flags.val
        )
        splits.append(dataset)
    train_set, val_set = splits
    warnings = data.split_warnings(train_set, flags.split, training=True)
    warnings += data.split_warnings(val_set, "val", training=False)
    warnings += overlap_warnings(train_set, val_set, flags.split)
    warnings += warmup_warnings(flags, len(train_set))
    if speaks_for_command():
        for warning in warnings:
            warn(warning)
    if flags.cache:
        data.cache_decoded(train_set, flags.cache)
        data.cache_decoded(val_set, flags.cache)
    print(
        f"{len(train_set)} training and {len(val_set)} validation images, "
        f"{len(train_set.classes)} classes"
    )
    for note in dict.fromkeys(train_set.notes + val_set.notes):  # each once
        print(note)
    print_settings(shown_settings(flags.recorded))
    return train_set, val_set


def overlap_warnings(
    train_set: data.SegmentationDataset, val_set: data.SegmentationDataset, split: str
) -> list[str]:
    """A line where the training split holds images of the validation split, as --split all may."""
    # Drawn scenes have no files, but names.
    shared = set(train_set.images or train_set.names) & set(val_set.images or val_set.names)
    if not shared:
        return []
    return [
        f"{len(shared)} of the {len(train_set)} images of --split {split} are validation images "
        "too, so the val miou flatters, and so does evaluate.py --split val; for figures that "
        "count use --split train"
    ]


def warmup_warnings(flags: TrainingFlags, num_images: int) -> list[str]:
    """A line where the run is too short for the learning rate ever to reach its base."""
    batches = len(data.EpochBatches(num_images, flags.batch_size, stream=[]))
    steps = flags.epochs * math.ceil(batches / flags.accumulate)
    if flags.warmup <= steps:
        return []
    return [
        f"--warmup {flags.warmup} is longer than this run of {steps} steps, whose learning rate "
        f"ends far below --lr {flags.lr:g}: try --warmup {steps // 10}, or more --epochs or a "
        "smaller --batch-size"
    ]


VALIDATION_SHARE = 0.1  # of an epoch's work that validation may take, unless a flag says more


def choose_validation_interval(
    flags: TrainingFlags, train_set: data.SegmentationDataset, val_set: data.SegmentationDataset
) -> TrainingFlags:
    """The flags with `validate_every`: every epoch, or less often where that is expensive.

    A training step costs about three forward passes. What is compared are pixels, not seconds,
    so that the same command always validates after the same epochs. With --select best it is
    every epoch, unless the flag says otherwise.
    """
    if flags.validate_every is not None:
        return flags
    interval = 1
    if flags.select == "last":
        height, width = flags.image_size or val_set.largest_mask()
        crop_height, crop_width = flags.crop_size
        validation_work = len(val_set) * height * width
        training_work = 3 * len(train_set) * crop_height * crop_width
        share = validation_work / training_work
        interval = max(1, math.ceil(share / VALIDATION_SHARE))
    if interval > 1:
        print(
            f"validation would take {100 * share:.0f} % of an epoch's work: every {interval} "
            "epochs and after the last one (--validate-every 1 for each)"
        )
    return flags._replace(validate_every=interval)


# Multiplications of the convolutions in a forward pass, in thousands for a pixel of the image.
WORK_PER_PIXEL = {
    "resnet18": 83,
    "resnet50": 637,
    "resnet101": 940,
    "mobilenet_v3_large": 40,
}
WORTH_SAYING = 2 * 3600  # seconds
# Multiplications that any CPU is through with in `WORTH_SAYING`: up to there nothing is measured.
LITTLE_WORK = 2e13


def seconds_if_long(flags: TrainingFlags, num_views: float) -> float:
    """About how long a training takes on this CPU, where that is over two hours, else 0.

    num_views: training views in all epochs of all networks. On a GPU nothing is estimated.
    """
    work = work_of_views(flags.backbone, flags.crop_size, num_views)
    if flags.device.type != "cpu" or work < LITTLE_WORK:
        return 0.0
    seconds = work * time_of_work(flags.amp)
    return seconds if seconds > WORTH_SAYING else 0.0


def work_of_views(backbone: str, size: data.Size, num_views: float) -> float:
    """Multiplications in the forward passes of that many views of a size (H, W)."""
    return 1000 * WORK_PER_PIXEL[backbone] * math.prod(size) * num_views


def time_of_work(amp: str) -> float:
    """Seconds of a training step for each multiplication of its forward pass, on this CPU.

    It is the best of some convolutions forward and backward, in half a second. Measured on a core,
    the steps of ResNets come within a tenth of that, and those of MobileNet take up to 1.7 times
    as long. What is counted is the time that one thread has a core, divided by the threads: while
    other programs keep the cores busy, and where there are very many, training takes longer.
    """
    images = torch.ones(2, 256, 24, 32, requires_grad=True)
    weight = torch.ones(256, 256, 3, 3, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    best = math.inf
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        started = time.process_time()
        with autocast(torch.device("cpu"), amp):
            output = F.conv2d(images, weight, padding=1)
        output.float().sum().backward()
        best = min(best, time.process_time() - started)
    torch.set_num_threads(threads)
    return best / threads / (images[:, 0].numel() * weight.numel())


def warn_of_hours(flags: TrainingFlags, image_size: data.Size, num_views: float) -> None:
    """Print how long members will take on a CPU where that is hours, and what would be faster.

    num_views as in `seconds_if_long`; image_size: (H, W) of the images.
    """
    seconds = seconds_if_long(flags, num_views)
    if seconds == 0:
        return
    backbone = flags.backbone
    size = flags.crop_size
    changes = []
    if backbone in ("resnet50", "resnet101"):
        backbone = "resnet18"
        changes.append("--backbone resnet18")
    height, width = smaller_size(image_size)
    if height * width < math.prod(size):
        size = (height, width)
        changes.append(f"--image-size {height} {width}")
    advice = "fewer --epochs or --members take less in proportion"
    if changes:
        work = work_of_views(flags.backbone, flags.crop_size, num_views)
        less_work = work_of_views(backbone, size, num_views)
        faster = rough_time(seconds * less_work / work)
        advice = f"{' '.join(changes)} takes about {faster}"
    print(
        f"this will take about {rough_time(seconds)} on this CPU with nothing else to do; {advice}",
        flush=True,
    )


def smaller_size(size: data.Size) -> data.Size:
    """(H, W) of a half, a third ... of `size`, the first with no more than 180x320 pixels."""
    height, width = size
    divisor = 1
    while height // divisor * (width // divisor) > 180 * 320:
        divisor += 1
    return height // divisor, width // divisor


def rough_time(seconds: float) -> str:
    """A time for people: "50 min", "4.5 h", "40 h", "12 days"."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} min"
    hours = seconds / 3600
    if hours < 10:
        return f"{hours:.1f} h"
    if hours < 72:
        return f"{hours:.0f} h"
    return f"{hours / 24:.0f} days"


def build_config(dataset: data.SegmentationDataset, flags: TrainingFlags, members: int) -> dict:
    """A checkpoint's `config`: all it takes to rebuild and use the network without a flag."""
    config = {
        "backbone": flags.backbone,
        "classes": dataset.classes,
        "palette": [list(colour) for colour in dataset.palette],
        "dataset": flags.dataset,
        "hold_out": list(flags.hold_out),
        "image_size": list(dataset.network_size()),
        "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "measures": [],
        "members": members,
    }
    if dataset.division:
        config["division"] = dataset.division
    return config


def build_network(
    flags: TrainingFlags,
    seed: int,
    num_classes: int,
    measures: tuple[str, ...] = (),
    head: str = "paper",
) -> DeepLabV3:
    """A network on its device, initialised from `seed`, which also seeds its dropout."""
    torch.manual_seed(seed)
    model = DeepLabV3(flags.backbone, num_classes, measures, head=head)
    print(load_weights(model, flags.weights, flags.backbone), flush=True)
    if not is_first_process():  # the same weights in all of a group, but other dropout
        torch.manual_seed(seed + get_rank())
    # measured: channels_last is the faster layout on a GPU, the slower one on a CPU
    layout = torch.contiguous_format
    if flags.device.type == "cuda":
        layout = torch.channels_last
        total_bytes = torch.cuda.get_device_properties(flags.device).total_memory
        warn_of_memory(flags, num_classes, total_bytes)
    return model.to(flags.device, memory_format=layout)


def activation_bytes(build_model: Callable[[], nn.Module], flags: TrainingFlags) -> int:
    """Memory of all that one training step keeps for its backward pass, uncompiled.

    build_model() builds the network. Its pass runs on fake tensors, which have shapes but no
    memory. A compiled step keeps less; how much is not estimated.
    """
    storages = {}
    kept_tensors = []  # as long as they live, no two storages share an address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        kept_tensors.append(tensor)
        return tensor

    with FakeTensorMode():
        model = build_model().train()
        images = torch.empty(flags.batch_size, 3, *flags.crop_size, dtype=torch.uint8)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, autocast(torch.device("cpu"), flags.amp):
            model(images)
    return sum(storages.values())


def warn_of_memory(flags: TrainingFlags, num_classes: int, total_bytes: int) -> None:
    """Print what a step takes where it nears the GPU's memory, and which flags halve it."""
    build_model = functools.partial(DeepLabV3, flags.backbone, num_classes)
    needed = activation_bytes(build_model, flags) / get_world_size()
    if needed < 0.7 * total_bytes or flags.batch_size < 4:
        return
    batch_size = flags.batch_size // 2
    accumulate = 2 * flags.accumulate
    print(
        f"a training step keeps about {needed / 1e9:.0f} GB (less when compiled), this GPU has "
        f"{total_bytes / 1e9:.0f}; --batch-size {batch_size} --accumulate {accumulate} takes half"
    )


def build_loaders(
    flags: TrainingFlags,
    views: data.TrainingViews,
    val_set: data.SegmentationDataset,
) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader of one network."""
    if len(views) < flags.batch_size:
        print(
            f"{len(views)} training images are less than a batch of {flags.batch_size}: one batch "
            "of all of them"
        )
    val_loader = data.evaluation_loader(
        val_set,
        flags.batch_size,
        flags.workers,
        flags.device,
        get_rank(),
        get_world_size(),
        fill_passes=not flags.compile,  # which is for batches of one size
    )
    return build_training_loader(flags, views), val_loader


def build_training_loader(flags: TrainingFlags, views: data.TrainingViews) -> DataLoader:
    """The batches that this process trains on."""
    return data.training_loader(
        views, flags.batch_size, flags.workers, flags.device, get_rank(), get_world_size()
    )


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], entry: dict, config: dict, recorded: dict
) -> None:
    """Write a finished network, and remove what lay beside it until now."""
    checkpoint = {
        "model": weights,
        "config": config,
        "args": recorded,
        "versions": versions(),
        "metrics": {name: entry[name] for name in ("miou", "pixel_accuracy", "loss")},
    }
    write_by_first_process(path, checkpoint)
    if is_first_process():
        remove_files(path, UNFINISHED)


def train_member(
    member: int,
    path: Path,
    members: int,
    train_set: data.SegmentationDataset,
    val_set: data.SegmentationDataset,
    flags: TrainingFlags,
    place: SideBySide | None = None,
) -> None:
    """Train member `member` of `members` and write it to `path`, unless it is there already.

    place: that of this process, where several train side by side.
    """
    flags = flags._replace(place=place)
    with locked(path):
        refuse_other_command(path, flags.recorded, len(train_set))
        if path.exists():
            report_finished(path)
            return
        stream = random_stream(flags.seed, "member", member)
        model = build_network(flags, stream.torch_seed, len(train_set.classes))
        optimizer = build_optimizer(model, flags.lr, flags.head_lr_mult, flags.weight_decay)
        views = data.TrainingViews(train_set, flags.crop_size, flags.scale, stream.view_seeds)
        train_loader, val_loader = build_loaders(flags, views, val_set)
        validation = functools.partial(
            validate,
            loader=val_loader,
            device=flags.device,
            amp=flags.amp,
            one_size=flags.compile and val_set.has_one_size(),
        )
        weights, entry = fit(
            model, optimizer, segmentation_loss, train_loader, validation, flags, path
        )
        config = build_config(train_set, flags, members)
        save_checkpoint(path, weights, entry, config, flags.recorded)


def train_members(train: Callable[[int, Path], None], paths: dict[int, Path]) -> None:
    """train(member, path) for one member after the other."""
    for member, path in paths.items():
        train(member, path)


def train_in_processes(
    train: Callable[[int, Path], None],
    paths: dict[int, Path],
    processes: int,
    device: torch.device,
) -> None:
    """`train_members` in several processes with an equal share of the threads each.

    The small convolutions of one member do not keep several cores busy. Signals are passed
    on. Raises SystemExit with the exit code of the first process that failed.
    """
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    members = list(paths)
    children = []
    texts = [context.RawArray("c", TEXT_BYTES) for _ in range(processes)]
    for number in range(processes):
        share = {member: paths[member] for member in members[number::processes]}
        if share:
            place = SideBySide(texts, number)
            arguments = (train, share, threads, device, place)
            children.append(context.Process(target=child_process, args=arguments))

    def pass_on(number: int, frame) -> None:
        for process in children:
            if process.is_alive():
                os.kill(process.pid, number)

    for process in children:
        process.start()
    with signals_to(pass_on):
        for process in children:
            process.join()
    for process in children:
        if process.exitcode > 0:
            raise SystemExit(process.exitcode)
        if process.exitcode < 0:  # killed by that signal
            raise SystemExit(128 - process.exitcode)


def child_process(
    train: Callable[[int, Path], None],
    paths: dict[int, Path],
    threads: int,
    device: torch.device,
    place: SideBySide,
) -> None:
    """A process of `train_in_processes`. It hears signals from its parent and ends with it."""
    if sys.stdout is not None and sys.stdout.isatty() and sys.stderr.isatty():
        sys.stdout = RowOutput(sys.stdout)
        sys.stderr = RowOutput(sys.stderr)
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    choose_device(str(device))  # its settings are those of a process
    with silence(torchrun_rank() > 0):
        train = functools.partial(train, place=place)
        sys.exit(exit_code_of(train_members, train, paths))


def end_with_parent() -> None:
    """Wait for the parent process to end, however that happens, then end this one."""
    torch.multiprocessing.parent_process().join()
    os._exit(1)


# ------------------------------------------------------------------------------------- command line


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- what will be done
    member_ids = choose_members(args.members, args.member_ids)
    rank = torchrun_rank()
    world = int(os.environ.get("WORLD_SIZE", 1))
    resolved = resolve_flags(vars(args), RECIPES[args.dataset])
    if resolved["parallel"] is None:
        # by the command alone: a restart has the same threads, so the same bits
        several = args.members > 1 and torch.get_num_threads() > 1 and world == 1
        resolved["parallel"] = 2 if several and resolved["device"] == "cpu" else 1
    flags = select_training_flags(resolved)

    # Under torchrun, process `rank` of `world` trains every `world`-th member. Members need no
    # communication, so no process group is opened.
    paths = {member: member_path(args.out, member) for member in member_ids[rank::world]}
    with silence(rank > 0):
        train_set, val_set = open_splits(flags)
        flags = choose_validation_interval(flags, train_set, val_set)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            # all of them now: what is there later on is of this run
            surplus = surplus_members(args.out, args.members) if rank == 0 else []
            for path in [*paths.values(), *surplus]:
                with locked(path):
                    remove_files(path, WRITTEN)

        unfinished = [path for path in paths.values() if not path.exists()]
        num_views = len(unfinished) * flags.epochs * len(train_set)
        image_size = flags.image_size or val_set.largest_mask()
        warn_of_hours(flags, image_size, num_views)

        # ------------------------------------------------------------ members
        train = functools.partial(
            train_member, members=args.members, train_set=train_set, val_set=val_set, flags=flags
        )
        if resolved["parallel"] > 1:
            train_in_processes(train, paths, resolved["parallel"], flags.device)
        else:
            train_members(train, paths)

        # ------------------------------------------------------------ what is there now
        present = find_members(args.out)
        if world == 1 or len(present) >= len(member_ids):  # of several processes, the last
            draw_curves(args.out)
        members = "1 member" if len(present) == 1 else f"{len(present)} members"
        next_step = f"next: python distill.py --teacher {args.out}"
        if len(present) == 1:
            next_step = "a teacher takes two or more"
        print(f"{members} in {args.out}; {next_step}")
        surplus = surplus_members(args.out, args.members)
        if surplus:
            print(
                f"note: {len(surplus)} of them are of an earlier, larger run than --members "
                f"{args.members}, and the folder is loaded as a whole; name the files to use fewer"
            )


def choose_members(members: int, member_ids: list[int] | None) -> list[int]:
    """The members that this command trains, in order; UsageError at one that the run lacks."""
    if member_ids is None:
        return list(range(members))
    for member in member_ids:
        if not 0 <= member < members:
            raise UsageError(
                f"--member-ids {member}: the {members} members of this run are 0..{members - 1}"
            )
    return sorted(set(member_ids))


def surplus_members(folder: Path, members: int) -> list[Path]:
    """Checkpoints in the folder of members beyond the first `members`."""
    surplus = []
    for path in find_members(folder):
        number = int(path.stem.removeprefix("member_"))
        if number >= members:
            surplus.append(path)
    return surplus


def integers(text: str) -> list[int]:
    """An argparse type: "3,4" is [3, 4]."""
    return [int(part) for part in text.split(",")]


def batch_size(text: str) -> int:
    """An argparse type: a whole number from 2 on."""
    images = int(text)
    if images < 2:
        raise argparse.ArgumentTypeError(
            f"{images}: batch norm needs at least 2 images; use --accumulate to save memory"
        )
    return images


def fraction(text: str) -> float:
    """An argparse type: a number between 0 and 1, both excluded."""
    number = finite_number(float, text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text}: has to lie between 0 and 1, as 0.2")
    return number


def recipe_table(labels: dict[str, str]) -> str:
    """Entries of the recipes as a table for --help: a row for each, a column for each data set.

    labels: what a row is called, by the name of the entry.
    """
    rows = [["", *RECIPES]]
    for name, label in labels.items():
        row = [label]
        for recipe in RECIPES.values():
            value = recipe[name]
            values = value if isinstance(value, tuple) else (value,)
            row.append(" ".join(str(item) for item in values))
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def recipe_help() -> str:
    """What --help says of the defaults of members."""
    names = ("backbone", "weights", "epochs", "batch_size", "crop_size", "lr")
    names += ("head_lr_mult", "weight_decay", "warmup", "scale")
    table = recipe_table({name: name.replace("_", "-") for name in names})
    scratch = ", ".join(f"--{name.replace('_', '-')} {SCRATCH[name]:g}" for name in SCRATCH)
    return (
        f"recipes, the defaults of each --dataset:\n{table}\n"
        f"where imagenet is the default, --weights none comes with\n  {scratch}"
    )


def add_training_flags(
    parser: argparse.ArgumentParser, unset: str, unset_epochs_and_lr: str
) -> None:
    """Flags that members and student share; None means as the recipe (or the teacher) has it.

    unset: what --help says of such a default. unset_epochs_and_lr: of those two.
    """
    flag = parser.add_argument_group("data").add_argument
    flag(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder of the data set, as published; {data.CLASS_FILE_HELP} (default: none; a "
        "student's: its teacher's)",
    )
    flag(
        "--val",
        type=fraction,
        metavar="SHARE",
        help="of a folder whose images/ and labels/ have no train/ and val/, the part of the "
        "images that validates; images whose names differ in the last number alone stay together "
        f"(default: {data.DEFAULT_VAL_SHARE:g}; a student and evaluate.py divide as the members)",
    )
    flag("--split", default="train", help="training split; voc also has trainaug (default: train)")
    flag(
        "--image-size",
        type=positive(int),
        nargs=2,
        metavar=("H", "W"),
        help="pixels of the network's input, images are resized to it (default: as they are; a "
        "student's: its teacher's)",
    )
    flag(
        "--crop-size",
        type=positive(int),
        nargs=2,
        metavar=("H", "W"),
        help="pixels of a training view; much smaller than the network's input, it leaves taps of "
        "the dilated convolutions untrained which the whole image uses, at a cost in mIoU "
        f"({unset}, but no larger than --image-size)",
    )
    flag(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="a view is resized by a factor, half of the draws in [LO, 1], half in [1, HI] "
        f"({unset})",
    )
    flag(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep decoded images there, 4 bytes a pixel, which load several times faster "
        "(default: none are kept)",
    )
    flag(
        "--workers",
        type=non_negative(int),
        help="processes that load images (default: 0 on a CPU; else one per usable core, up to 16)",
    )

    flag = parser.add_argument_group("network").add_argument
    flag(
        "--weights",
        help="what the backbone starts from: imagenet (downloaded), none, or a state-dict file "
        f"({unset})",
    )

    flag = parser.add_argument_group("optimisation").add_argument
    flag(
        "--epochs",
        type=positive(int),
        help=f"passes over the training split ({unset_epochs_and_lr})",
    )
    flag(
        "--batch-size",
        type=batch_size,
        help=f"images per batch, at least 2; the memory grows with it ({unset})",
    )
    flag(
        "--accumulate",
        type=positive(int),
        default=1,
        metavar="N",
        help="batches per step; batch norm sees one at a time (default: 1)",
    )
    flag(
        "--lr",
        type=positive(float),
        help=f"base learning rate of the backbone ({unset_epochs_and_lr})",
    )
    flag(
        "--head-lr-mult",
        type=positive(float),
        help=f"the heads learn at this multiple of --lr ({unset})",
    )
    flag("--weight-decay", type=non_negative(float), help=f"L2 penalty on all weights ({unset})")
    flag(
        "--warmup",
        type=non_negative(int),
        help=f"steps over which the learning rate rises to its base ({unset})",
    )
    flag(
        "--seed",
        type=non_negative(int),
        default=0,
        help="seeds 0, 1, 2 share no member, no batch (default: 0)",
    )
    flag(
        "--validate-every",
        type=positive(int),
        metavar="N",
        help="epochs from one validation to the next; always after the last one, and --select best "
        "chooses among those (default: 1; without --select best more, where it would take over a "
        "tenth of the work)",
    )
    flag(
        "--select",
        choices=("last", "best"),
        default="last",
        help="weights to keep: the last epoch's, or those of the best val mIoU (default: last)",
    )

    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if any)")
    flag(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="arithmetic of the network: bf16, fp16, or off for float32 with all its bits, not "
        "TF32; heads and losses are always float32 (default: bf16 where the processor has it, "
        "else off)",
    )
    flag(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile: a minute once, then faster steps (default: on a GPU)",
    )
    flag(
        "--save-every",
        type=positive(float),
        default=5,
        metavar="MINUTES",
        help="how much of a training a crash may lose (default: 5)",
    )
    flag("--overwrite", action="store_true", help="start anew where a run is begun or finished")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: what is trained, then what members and student share."""
    parser = Parser(
        prog="train_ensemble.py",
        description=(__doc__ or "").partition("\n")[0],
        epilog=recipe_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # leaves the epilog's rows alone
    )
    flag = parser.add_argument_group("what to train").add_argument
    flag(
        "--dataset",
        choices=data.DATASETS,
        default="synthetic",
        help="synthetic needs no files (default: synthetic)",
    )
    flag(
        "--members",
        type=positive(int),
        default=10,
        metavar="N",
        help="size of the ensemble (default: 10)",
    )
    flag(
        "--member-ids",
        type=integers,
        metavar="3,4",
        help="train only these of the N members (default: all)",
    )
    flag("--backbone", choices=BACKBONES, help="encoder (default: the recipe's, below)")
    flag(
        "--hold-out",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="classes to take out of the network; evaluate.py --ood held-out scores their pixels "
        "(default: none)",
    )
    flag(
        "--out",
        type=Path,
        default=Path("ckpts"),
        metavar="DIR",
        help="folder of the checkpoints (default: ckpts)",
    )
    flag(
        "--parallel",
        type=positive(int),
        metavar="N",
        help="members trained at once, in processes that share the threads (default: 2 on a CPU, "
        "1 on a GPU)",
    )
    recipes = "default: the recipe's, below"
    add_training_flags(parser, unset=recipes, unset_epochs_and_lr=recipes)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main, get_args_parser()))
