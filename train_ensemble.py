"""Train the members of a Deep Ensemble, each from its own seed.

    python train_ensemble.py --members 10      # -> ckpts/member_00.pt ..., minutes on a CPU
    python train_ensemble.py --members 10 --dataset camvid --data DIR

A member is a plain segmentation network trained with cross-entropy by SGD, its learning rate

    lr(t) = base * (1 - t/T)^0.9 * min(1, (t + 1) / warmup)        t = 0 ... T - 1

The same command again continues where the last one stopped, down to the bit on a CPU.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader

import data
from data import IGNORED, VOID, Sample
from evaluate import (
    Parser,
    UsageError,
    autocast,
    chart_sheet,
    choose_amp,
    choose_device,
    line_chart,
    locked,
    run,
    validate,
)
from model import (
    BACKBONES,
    DeepLabV3,
    load_weights,
    read_checkpoint,
    read_tensors,
    save_atomically,
    versions,
)

# One row a data set. lr, head_lr_mult and warmup (steps) are for pretrained weights; SCRATCH
# replaces them without. scale: a view is resized by a factor from it. The student's alone: jitter
# of the colours (the paper, VOC), views whose teacher targets are kept, epochs to a member's one,
# weight of the RMSLE (the paper: 1, of std alone), of which distill.py's four measures share the
# mean: 8 is 2 for each.
PRETRAINED = dict(backbone="resnet101", weights="imagenet", lr=0.01, head_lr_mult=10.0,
                  weight_decay=5e-4, warmup=0, scale=(0.5, 2.0), jitter=0.0, views=5, student=1,
                  uncertainty_weight=1.0)  # fmt: skip
RECIPES = {
    "synthetic": dict(backbone="resnet18", weights="none", epochs=2, batch_size=4,
                      crop_size=(96, 144), lr=0.1, head_lr_mult=1.0, weight_decay=5e-4,
                      warmup=10, scale=(1.0, 1.0), jitter=0.0, views=1, student=3,
                      uncertainty_weight=8.0),
    "camvid": PRETRAINED | dict(epochs=100, batch_size=8, crop_size=(360, 480)),
    "cityscapes": PRETRAINED | dict(epochs=200, batch_size=16, crop_size=(768, 768)),
    "voc": PRETRAINED | dict(epochs=100, batch_size=16, crop_size=(512, 512), lr=0.001,
                             weight_decay=1e-4, jitter=0.2),
    "folder": PRETRAINED | dict(epochs=100, batch_size=8, crop_size=(512, 512)),
}  # fmt: skip
SCRATCH = dict(lr=0.05, head_lr_mult=1.0, warmup=50)
# The paper's for all heads; this one, a sigmoid near 0, always needs it. Divided by the weight of
# its loss, which is then for the shared features alone: the head's own steps stay as large.
UNCERTAINTY_LR_MULT = 10.0
ROLES = {"member": 0, "student": 1}
# what may differ between a command and the run that it continues
FREE = {"members", "member_ids", "workers", "device", "data", "save_every", "overwrite", "out",
        "parallel", "cache", "teacher"}  # of the teacher, its identity counts  # fmt: skip
# what lies beside a checkpoint until it is finished; the targets are the student's
UNFINISHED = (".state", ".targets.npy", ".targets.json", ".val-targets.npy", ".val-targets.json")


# ------------------------------------------------------------------------------ the run


def stream(seed: int, role: str, member: int) -> list[int]:
    """Four 32-bit integers for a network's random choices; no two networks share them."""
    return np.random.SeedSequence([seed, ROLES[role], member]).generate_state(4).tolist()


def resolve(args: argparse.Namespace, recipe: dict) -> None:
    """Fill what is left open from the recipe and the machine, and refuse what cannot be."""
    if args.image_size and not args.crop_size:
        args.crop_size = tuple(map(min, recipe["crop_size"], args.image_size))
    if args.weights == "none" != recipe["weights"]:
        recipe = recipe | SCRATCH
    for key in vars(args).keys() & recipe.keys():
        if getattr(args, key) is None:
            setattr(args, key, recipe[key])
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    args.device = str(device)
    args.amp = choose_amp(args.amp, device)
    if args.compile is None:
        args.compile = cuda
    if args.workers is None:  # on a CPU the training itself needs every core
        args.workers = min(8, os.cpu_count() or 1) if cuda else 0
    refuse_wrong_numbers(args)


def refuse_wrong_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError naming the first flag whose value is out of range."""
    above_0 = ("epochs", "batch_size", "accumulate", "lr", "head_lr_mult", "save_every")
    from_0 = ("weight_decay", "warmup", "workers", "seed")
    rules = [(key, 0 < getattr(args, key) < math.inf, "has to be positive and finite")
             for key in above_0]  # fmt: skip
    rules += [(key, 0 <= getattr(args, key) < math.inf, "cannot be negative or infinite")
              for key in from_0]  # fmt: skip
    rules += [(key, min(getattr(args, key) or [1]) > 0, "has to be positive")
              for key in ("image_size", "crop_size")]  # fmt: skip
    rules += [("batch_size", args.batch_size > 1,
               "batch norm needs at least 2 images; use --accumulate to save memory"),
              ("scale", 0 < args.scale[0] <= 1 <= args.scale[1] < math.inf,
               "needs 0 < LO <= 1 <= HI")]  # fmt: skip
    for key, fine, reason in rules:
        if not fine:
            value = getattr(args, key)
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise UsageError(f"--{key.replace('_', '-')} {text}: {reason}")


def plain(args: argparse.Namespace) -> dict:
    """The flags as checkpoints store them: lists, numbers and strings."""

    def simple(value):
        if isinstance(value, list | tuple):
            return [simple(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return {key: simple(value) for key, value in sorted(vars(args).items())}


def check_same(saved: dict, args: argparse.Namespace, path: Path) -> None:
    """A run goes on under the flags it was begun with; UsageError names the first difference."""
    now, free = plain(args), FREE
    if saved["device"].split(":")[0] != now["device"].split(":")[0]:
        free = FREE | {"amp", "compile"}  # the defaults follow the device
    for key in sorted((saved.keys() | now.keys()) - free):
        if saved.get(key) != now.get(key):
            raise UsageError(
                f"{path} was begun with {key} = {saved.get(key)}, this command says "
                f"{now.get(key)}; use the same flags, another --out, or --overwrite to start anew"
            )


def open_splits(args: argparse.Namespace) -> list[data.SegmentationDataset]:
    """The training and the validation split; prints their sizes and the resolved flags."""
    common = {"image_size": args.image_size, "hold_out": args.hold_out}
    train_set, val_set = (data.open_dataset(args.dataset, args.data, split, **common)
                          for split in (args.split, "val"))  # fmt: skip
    for dataset in (train_set, val_set) if args.cache else ():
        data.keep_decoded(dataset, args.cache)
    classes = len(train_set.classes)
    print(f"{len(train_set)} training and {len(val_set)} validation images, {classes} classes")
    shown = [f"{k} {v}" for k, v in plain(args).items() if v not in (None, [], False)]
    print("  ".join(shown), flush=True)
    return [train_set, val_set]


def describe(dataset: data.SegmentationDataset, args: argparse.Namespace, members: int) -> dict:
    """A checkpoint's `config`: all it takes to rebuild and use the network without a flag."""
    return {
        "backbone": args.backbone,
        "classes": dataset.classes,
        "palette": [list(colour) for colour in dataset.palette],
        "dataset": args.dataset,
        "hold_out": list(args.hold_out),
        "image_size": list(args.image_size) if args.image_size else None,
        "measures": [],
        "members": members,
    }


# ------------------------------------------------------------------------------ the loop


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels, 0 where there are none; [B, C, H, W] and uint8 [B, H, W]."""
    target = torch.where(labels == IGNORED, VOID, labels.long())
    total = F.cross_entropy(logits.float(), target, ignore_index=VOID, reduction="sum")
    return sum_over_processes(total) / sum_over_processes((target != VOID).sum()).clamp(min=1)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of x over a process group. Its gradient is that of this process's part: what a loss
    made of such sums sends back adds up, over the group, to the gradient of the whole batch."""
    if data.rank_and_world()[1] == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + (x - x.detach())


def segmentation_loss(network: nn.Module, batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """The members' `loss_fn` for `fit`: the loss of a batch, and what to log of it."""
    return cross_entropy(network(batch.images).logits, batch.labels), {}


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """1 at step 0 (without warm-up), above 0 at the last step, `steps` - 1."""
    return (1 - step / steps) ** 0.9 * min(1.0, (step + 1) / max(1, warmup))


def build_optimizer(model: DeepLabV3, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum; `multiple` of a group is what its learning rate is to the base."""
    weight = getattr(args, "uncertainty_weight", None) or 1.0  # a member has none
    weight /= len(getattr(args, "targets", "1"))  # of which the loss takes the mean
    multiples = {"backbone": 1.0, "classifier": args.head_lr_mult,
                 "uncertainty": max(args.head_lr_mult, UNCERTAINTY_LR_MULT) / weight}  # fmt: skip
    groups = [{"params": list(part.parameters()), "multiple": multiples[name],
               "weight_decay": args.weight_decay * (weight if name == "uncertainty" else 1.0)}
              for name, part in model.named_children()]  # fmt: skip
    return torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)


def fit(
    model: DeepLabV3, loss_fn, train_loader: DataLoader, validation, args: argparse.Namespace,
    path: Path, config: dict,
) -> None:  # fmt: skip
    """Train `model` and write the checkpoint `path`; validation(model) returns as `validate` does.

    The state of the running training lies in `path`.state and is taken up if it is there; one JSON
    line an epoch goes to `path`.jsonl. Raises UsageError where the loss is not finite or the state
    belongs to another command; SystemExit 130 or 143, after saving, where a signal asks for it.
    """
    state_path, batches = path.with_suffix(".state"), train_loader.batch_sampler
    device, optimizer = torch.device(args.device), build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    at = load_state(state_path, model, optimizer, scaler, args)
    rank, world = data.rank_and_world()
    network = parallel(model, device)
    if args.compile:  # an epoch's last, smaller batch has a graph of its own
        network = torch.compile(network, dynamic=False)
    with noted_signals() as caught:

        def save() -> None:
            check_finite(at, train_loader.dataset.dataset)
            write(state_path, at | {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "args": plain(args), "rng": random_states(device),
            })  # fmt: skip
            if any_process(bool(caught), device):  # which waits until it is saved
                say_how_to_continue(path, at, args)
                raise SystemExit(128 + (caught or [signal.SIGTERM])[0])

        while at["epoch"] < args.epochs:
            model.train()
            batches.epoch, batches.start = at["epoch"], at["batch"]
            progress, saved = Progress(path.stem, at, args, len(batches)), time.monotonic()
            for _ in train_steps(network, loss_fn, train_loader, optimizer, scaler, args, at):
                progress.show(at, optimizer.param_groups[0]["lr"])
                due = bool(caught) or time.monotonic() - saved > 60 * args.save_every
                # a group asks all of its processes, where it waits for the losses anyway
                if due if world == 1 else not at["recent"] and any_process(due, device):
                    save()
                    saved = time.monotonic()
            share_statistics(model)
            scores = validation(model)
            at["history"].append(progress.epoch(at, scores, optimizer.param_groups[0]["lr"]))
            if args.select == "best" and kept_epoch(at["history"], "best") is at["history"][-1]:
                copy = {name: value.clone() for name, value in model.state_dict().items()}
                at["best"] = {"miou": scores["miou"], "model": copy}
            at.update(epoch=at["epoch"] + 1, batch=0, sums={}, seen=0)
            write(path.with_suffix(".jsonl"), "".join(json.dumps(e) + "\n" for e in at["history"]))
            save()

    weights = at["best"]["model"] if args.select == "best" else model.state_dict()
    kept = kept_epoch(at["history"], args.select)
    write(path, {
        "model": {name: value.cpu() for name, value in weights.items()},
        "config": config, "args": plain(args), "versions": versions(),
        "metrics": {key: kept[key] for key in ("miou", "pixel_accuracy", "loss")},
    })  # fmt: skip
    if rank == 0:
        remove(path, UNFINISHED)


def write(path: Path, content: dict | str) -> None:
    """`save_atomically`, by the first process of a group alone."""
    if data.rank_and_world()[0] == 0:
        save_atomically(path, content)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it trains in a process group: gradients summed, statistics of batch norm those
    of all processes on GPUs (a CPU knows only its own)."""
    if data.rank_and_world()[1] == 1:
        return model
    devices = None
    if device.type == "cuda":
        model, devices = nn.SyncBatchNorm.convert_sync_batchnorm(model), [device]
    # see `share_statistics`; between the two passes of a step it would change what the first one's
    # gradients need
    model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    model.broadcast_buffers = False
    return model


def say_how_to_continue(path: Path, at: dict, args: argparse.Namespace) -> None:
    without = " without --overwrite" if args.overwrite else ""
    if data.rank_and_world()[0] == 0:
        print(f"\n{path.stem}: saved at epoch {at['epoch']}, batch {at['batch']}; the same command"
              f"{without} continues from there", file=sys.stderr)  # fmt: skip


def share_statistics(model: nn.Module) -> None:
    """The first process's statistics of batch norm for all of a group, before each step: what the
    others collect on a CPU would be in no saved state."""
    for buffer in model.buffers() if data.rank_and_world()[1] > 1 else ():
        dist.broadcast(buffer, 0)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in a process of the group; waits for all of them."""
    if data.rank_and_world()[1] == 1:
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared)
    return bool(shared.item())


def random_states(device: torch.device) -> list[list[Tensor]]:
    """The state of the generators of every process: the CPU's, and the GPU's where it is used."""
    own = [torch.get_rng_state()]
    if device.type == "cuda":
        own.append(torch.cuda.get_rng_state(device))
    states = [None] * data.rank_and_world()[1]
    if len(states) == 1:
        return [own]
    dist.all_gather_object(states, own)
    return states


def kept_epoch(history: list[dict], select: str) -> dict:
    """The log entry of the epoch whose weights are kept: the last, or the first of the best."""
    return max(history, key=lambda entry: entry["miou"]) if select == "best" else history[-1]


def train_steps(network: nn.Module, loss_fn, loader, optimizer, scaler, args, at: dict):
    """The rest of epoch at["epoch"] from batch at["batch"] on; yields after every optimiser step,
    `at` up to date. A step takes `--accumulate` batches, an epoch's last one what is left."""
    device, batches = torch.device(args.device), loader.batch_sampler
    world = data.rank_and_world()[1]
    steps = math.ceil(len(batches) / args.accumulate)  # an epoch
    for batch in loader:
        first = at["batch"] - at["batch"] % args.accumulate
        size = min(args.accumulate, len(batches) - first)
        share_statistics(network)
        # the rest stays: reading it would wait for the GPU
        pixels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
        batch = batch._replace(**dict(zip(("images", "labels"), pixels, strict=True)))
        with autocast(device, args.amp):
            loss, logs = loss_fn(network, batch)
        scaler.scale(loss * world / size).backward()  # the group takes the mean over processes
        for name, value in {"loss": loss, **logs}.items():
            at["sums"][name] = at["sums"].get(name, 0) + value.detach()
        at["recent"].append((at["batch"], batch.index, loss.detach()))
        at["batch"] += 1
        at["seen"] += len(batch.images) * world
        if at["batch"] < first + size:
            continue
        # reading a loss waits for the GPU: now and then; on a CPU before the weights take harm
        if device.type == "cpu" or len(at["recent"]) >= 20 or at["batch"] == len(batches):
            check_finite(at, loader.dataset.dataset)
        step = at["epoch"] * steps + first // args.accumulate
        factor = lr_factor(step, args.epochs * steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["multiple"] * factor
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield


def check_finite(at: dict, dataset: data.SegmentationDataset) -> None:
    """Raises UsageError naming the first batch since the last call whose loss is not finite."""
    for number, index, loss in at["recent"]:
        if not math.isfinite(value := loss.item()):
            images = ", ".join(dataset.stem(i) for i in index.tolist() if i < len(dataset))
            raise UsageError(
                f"the loss is {value} in epoch {at['epoch']}, batch {number} (images {images}); "
                "nothing was saved of it: look at these images, lower --lr, or try --amp off"
            )
    at["recent"].clear()


def load_state(path: Path, model: nn.Module, optimizer, scaler, args) -> dict:
    """Where the training stands: from `path` if a run was interrupted, else its beginning."""
    at = {"epoch": 0, "batch": 0, "seen": 0, "sums": {}, "history": [], "best": {}, "recent": []}
    if not path.exists():
        return at
    state = read_tensors(path)
    check_same(state["args"], args, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if args.amp == "fp16" and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    rank, world = data.rank_and_world()
    if len(state["rng"]) != world:
        raise UsageError(f"{path} was begun by {len(state['rng'])} processes, now there are "
                         f"{world}; use as many, or --overwrite to start anew")  # fmt: skip
    on_cpu, *on_gpu = state["rng"][rank]
    torch.set_rng_state(on_cpu)
    if on_gpu and torch.device(args.device).type == "cuda":
        torch.cuda.set_rng_state(*on_gpu, args.device)
    at |= {key: state[key] for key in at}
    at["sums"] = {name: value.to(args.device) for name, value in at["sums"].items()}
    print(f"{path.stem}: continuing at epoch {at['epoch']}, batch {at['batch']}", flush=True)
    return at


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Under torchrun, the group that shares the work; its first process speaks for all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_rank():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to a list, for the loop to look at when its state is whole; a second
    one ends at once."""
    caught = []

    def note(number: int, frame) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    with signals_to(note):
        yield caught


@contextlib.contextmanager
def signals_to(handler) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler(number, frame)` for the time being."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Progress:
    """One live line on a terminal while an epoch runs, one line an epoch anywhere."""

    def __init__(self, name: str, at: dict, args: argparse.Namespace, batches: int):
        self.args, self.batches = args, batches
        self.title = f"{name}  epoch {at['epoch'] + 1}/{args.epochs}"
        self.batch, self.seen = at["batch"], at["seen"]  # above 0 where a run is continued
        self.start = self.shown = time.monotonic()

    def show(self, at: dict, lr: float) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or data.rank_and_world()[0] or now - self.shown < 0.5:
            return
        self.shown, seconds = now, now - self.start
        batches_left = (self.args.epochs - at["epoch"]) * self.batches - at["batch"]
        left = timedelta(seconds=round(batches_left * seconds / (at["batch"] - self.batch)))
        text = (f"{self.title}  batch {at['batch']}/{self.batches}  "
                f"loss {at['sums']['loss'].item() / at['batch']:.4f}  lr {lr:.2e}  "
                f"{(at['seen'] - self.seen) / seconds:.1f} images/s  {left} left")  # fmt: skip
        print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)

    def epoch(self, at: dict, scores: dict, lr: float) -> dict:
        """Print the epoch's line and return it as the dictionary that goes to the log."""
        seconds = time.monotonic() - self.start
        left = timedelta(seconds=round(seconds * (self.args.epochs - at["epoch"] - 1)))
        means = {name: value.item() / self.batches for name, value in at["sums"].items()}
        logs = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        if sys.stderr.isatty():
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr, flush=True)
        kept = ("miou", "pixel_accuracy", "mean_class_accuracy", "fidelity_rmsle",
                "fidelity_pearson")  # the last two are a student's  # fmt: skip
        scores = {key: scores[key] for key in kept if key in scores}
        follows = f"  val pearson {scores[kept[-1]]:.4f}" if kept[-1] in scores else ""
        print(f"{self.title}  {logs}  val miou {scores['miou']:.4f}{follows}  {seconds:.1f} s  "
              f"{left} left", flush=True)  # fmt: skip
        return {"epoch": at["epoch"] + 1, "lr": lr, **means, **scores, "seconds": round(seconds, 2)}


# ------------------------------------------------------------------------------ command line


def remove(path: Path, suffixes: tuple[str, ...]) -> None:
    """Remove the files of those suffixes that lie beside the checkpoint `path`, and what was left
    half written when a run was killed."""
    for suffix in suffixes:
        path.with_suffix(suffix).unlink(missing_ok=True)
    for half in path.parent.glob(f".{path.stem}.*.tmp"):
        half.unlink(missing_ok=True)


def is_finished(path: Path, args: argparse.Namespace) -> bool:
    """Whether `path` was trained by this very command; UsageError where it was by another one."""
    if not path.exists():
        if (state := path.with_suffix(".state")).exists():  # before anything of it is touched
            check_same(read_tensors(state)["args"], args, state)
        return False
    checkpoint = read_checkpoint(path)
    check_same(checkpoint["args"], args, path)
    remove(path, UNFINISHED)  # of a run that was killed while it tidied up
    print(f"{path.name}: finished, val miou {checkpoint['metrics']['miou']:.4f}", flush=True)
    return True


def build(
    args: argparse.Namespace, key: list[int], classes: int, measures: tuple[str, ...] = ()
) -> DeepLabV3:
    """A network initialised from the first integer of its stream, which also seeds its dropout."""
    torch.manual_seed(key[0])
    model = DeepLabV3(args.backbone, classes, measures)
    print(load_weights(model, args.weights, args.backbone), flush=True)
    if rank := data.rank_and_world()[0]:  # the same weights, but dropout of its own
        torch.manual_seed(key[0] + rank)
    # measured: channels_last is the faster layout on a GPU, the slower one on a CPU
    cuda = args.device.startswith("cuda")
    return model.to(args.device, memory_format=(
        torch.channels_last if cuda else torch.contiguous_format))


def loaders(args: argparse.Namespace, views: data.TrainingViews, val_set):
    """The training and the validation loader of one network."""
    device, count = torch.device(args.device), len(views)
    if count < args.batch_size:
        print(f"{count} training images are less than a batch of {args.batch_size}: one batch of "
              "all of them")  # fmt: skip
    return (
        data.training_loader(views, args.batch_size, args.workers, device),
        data.evaluation_loader(val_set, args.batch_size, args.workers, device),
    )


def draw_curves(folder: Path) -> None:
    """curves.svg: loss and validation mIoU by epoch of all members that are in the folder."""
    charts, logs = [], {}
    for path in sorted(folder.glob("member_[0-9]*.jsonl")):
        logs[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    for key, title in (("loss", "Training loss"), ("miou", "Validation mIoU")):
        series = [(name, [entry["epoch"] for entry in log], [entry[key] for entry in log], i % 4,
                   i // 4 % 3) for i, (name, log) in enumerate(logs.items())]  # fmt: skip
        charts.append(line_chart(title, series, "epoch", key, (None, None, 0, None)))
    save_atomically(folder / "curves.svg", chart_sheet(charts))


def train_members(args: argparse.Namespace, paths: dict[int, Path], train_set, val_set) -> None:
    """One member after the other; finished ones are kept."""
    for member, path in paths.items():
        with locked(path):
            if is_finished(path, args):
                continue
            key = stream(args.seed, "member", member)
            model = build(args, key, len(train_set.classes))
            config = describe(train_set, args, args.members)
            views = data.TrainingViews(train_set, args.crop_size, args.scale, key[1:])
            train_loader, val_loader = loaders(args, views, val_set)
            validation = functools.partial(validate, loader=val_loader, amp=args.amp,
                                           device=torch.device(args.device))  # fmt: skip
            fit(model, segmentation_loss, train_loader, validation, args, path, config)


def train_in_processes(args: argparse.Namespace, paths: dict[int, Path], *splits) -> None:
    """`train_members` in `--parallel` processes with an equal share of the threads each: the small
    convolutions of one member do not keep several cores busy. Signals are passed on."""
    context = torch.multiprocessing.get_context("spawn")
    shares = [dict(list(paths.items())[k :: args.parallel]) for k in range(args.parallel)]
    children = [context.Process(target=child, args=(args, s, *splits)) for s in shares if s]

    def pass_on(number: int, frame) -> None:
        for process in children:
            if process.is_alive():
                os.kill(process.pid, number)

    for process in children:
        process.start()
    with signals_to(pass_on):
        for process in children:
            process.join()
    if failed := [process.exitcode for process in children if process.exitcode]:
        raise SystemExit(failed[0] if failed[0] > 0 else 128 - failed[0])


def child(args: argparse.Namespace, paths: dict[int, Path], *splits) -> None:
    """A process of `train_in_processes`. It hears signals from its parent and ends with it."""
    os.setsid()
    parent = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.parallel))
    sys.exit(run(lambda _: train_members(args, paths, *splits), Parser(), []))


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- what will be done
    if args.members < 1:
        raise UsageError(f"--members {args.members}: has to be at least 1")
    ids = list(range(args.members)) if args.member_ids is None else sorted({*args.member_ids})
    if wrong := [i for i in ids if not 0 <= i < args.members]:
        raise UsageError(f"--member-ids {wrong[0]}: the {args.members} members of this run are "
                         f"0..{args.members - 1}")  # fmt: skip
    resolve(args, RECIPES[args.dataset])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.parallel is None:  # by the command alone: a restart has the same threads, so same bits
        several = args.members > 1 and torch.get_num_threads() > 1 and world == 1
        args.parallel = 2 if several and args.device == "cpu" else 1
    if args.parallel < 1:
        raise UsageError(f"--parallel {args.parallel}: has to be at least 1")
    train_set, val_set = open_splits(args)
    args.out.mkdir(parents=True, exist_ok=True)
    # torchrun's processes get every so many members each, and do not speak to each other
    paths = {member: args.out / f"member_{member:02d}.pt" for member in ids[rank::world]}
    if args.overwrite:  # all of them now: what is there later on is of this run
        others = [path for path in args.out.glob("member_[0-9]*.pt")
                  if rank == 0 and int(path.stem.split("_")[1]) >= args.members]  # fmt: skip
        for path in [*paths.values(), *others]:
            with locked(path):
                remove(path, (".pt", ".jsonl", *UNFINISHED))

    # ---------------------------------------------------------------- members
    side_by_side = train_in_processes if args.parallel > 1 else train_members
    side_by_side(args, paths, train_set, val_set)
    draw_curves(args.out)
    print(f"{len(paths)} members in {args.out}; next: python distill.py --teacher {args.out}")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that members and student share; None means as the recipe (or the teacher) has it."""
    flag = parser.add_argument_group("data").add_argument
    flag("--data", type=Path, metavar="DIR", help="folder of the data set, as published")
    flag("--split", default="train", help="training split; voc also has trainaug (default: train)")
    flag("--image-size", type=int, nargs=2, metavar=("H", "W"),
         help="pixels of the network's input, images are resized to it (default: as they are)")
    flag("--crop-size", type=int, nargs=2, metavar=("H", "W"),
         help="pixels of a training view; much smaller than the network's input, it leaves taps of "
              "the dilated convolutions untrained which the whole image uses, at a cost in mIoU")
    flag("--scale", type=float, nargs=2, metavar=("LO", "HI"),
         help="a view is resized by a factor, half of the draws in [LO, 1], half in [1, HI]")
    flag("--cache", type=Path, metavar="DIR", help="keep decoded images there, 4 bytes a pixel, "
         "which load several times faster")
    flag("--workers", type=int, help="processes that load (default: 0 on a CPU, else up to 8)")
    flag = parser.add_argument_group("network").add_argument
    flag("--weights", help="imagenet (downloaded), none, or a state-dict file for the backbone")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--epochs", type=int, help="passes over the training split")
    flag("--batch-size", type=int, help="images a batch, at least 2; the memory grows with it")
    flag("--accumulate", type=int, default=1, metavar="N", help="batches a step (batch norm: one)")
    flag("--lr", type=float, help="base learning rate of the backbone")
    flag("--head-lr-mult", type=float, help="the heads learn at this multiple of --lr")
    flag("--weight-decay", type=float, help="L2 penalty on all weights")
    flag("--warmup", type=int, help="steps over which the learning rate rises to its base")
    flag("--seed", type=int, default=0, help="seeds 0, 1, 2 share no member, no batch (default: 0)")
    flag("--select", choices=("last", "best"), default="last",
         help="weights to keep: the last epoch's, or those of the best val mIoU (default: last)")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if any)")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
         help="arithmetic of the network (default: bf16 where the processor has it, else float32)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=None,
         help="torch.compile: a minute once, then faster steps (default: on a GPU)")
    flag("--save-every", type=float, default=5, metavar="MINUTES",
         help="how much of a running epoch a crash may lose (default: 5)")
    flag("--overwrite", action="store_true", help="start anew where a run is begun or finished")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: what is trained, then what members and student share."""
    parser = Parser(prog="train_ensemble.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument_group("what to train").add_argument
    flag("--dataset", choices=data.DATASETS, default="synthetic",
         help="synthetic needs no files (default: synthetic)")
    flag("--members", type=int, default=10, metavar="N", help="size of the ensemble (default: 10)")
    flag("--member-ids", type=integers, metavar="3,4", help="train only these of the N members")
    flag("--backbone", choices=BACKBONES, help="encoder (default: as the data set's recipe has it)")
    flag("--hold-out", nargs="+", default=[], metavar="CLASS",
         help="classes to take out of the network; evaluate.py --ood held-out scores their pixels")
    flag("--out", type=Path, default=Path("ckpts"), metavar="DIR", help="folder of the checkpoints")
    flag("--parallel", type=int, metavar="N", help="members trained at once, in processes that "
         "share the threads (default: 2 on a CPU, 1 on a GPU)")
    add_training_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
