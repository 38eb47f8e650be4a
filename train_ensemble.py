"""Train the members of a Deep Ensemble, each from its own seed.

    python train_ensemble.py --members 10                                    # built-in scenes, minutes on a CPU
    python train_ensemble.py --members 10 --dataset camvid --data DIR        # -> ckpts/member_00.pt ... member_09.pt

A member is a plain segmentation network trained with cross-entropy by SGD, its learning rate

    lr(t) = base * (1 - t/T)^0.9 * min(1, (t + 1) / warmup)        t = 0 ... T - 1

The same command again continues where the last one stopped, down to the bit on a CPU.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from data import IGNORED, VOID, Sample
from evaluate import Parser, UsageError, autocast, choose_device, run, validate
from model import BACKBONES, DeepLabV3, load_weights, read_checkpoint, read_tensors, save_atomically, versions

# One row a data set. lr, head_lr_mult and warmup are for pretrained weights; SCRATCH replaces them without.
# scale: a view is resized by a factor from it; warmup: steps; jitter, views: colour jitter (the paper, VOC) and
# kept teacher targets of the student.
RECIPES = {
    "synthetic": dict(backbone="resnet18", weights="none", epochs=10, batch_size=8, crop_size=(96, 144), lr=0.01,
                      head_lr_mult=10.0, weight_decay=5e-4, warmup=0, scale=(0.75, 1.5), jitter=0.0, views=5),
    "camvid": dict(backbone="resnet101", weights="imagenet", epochs=100, batch_size=8, crop_size=(360, 480), lr=0.01,
                   head_lr_mult=10.0, weight_decay=5e-4, warmup=0, scale=(0.5, 2.0), jitter=0.0, views=5),
    "cityscapes": dict(backbone="resnet101", weights="imagenet", epochs=200, batch_size=16, crop_size=(768, 768), lr=0.01,
                       head_lr_mult=10.0, weight_decay=5e-4, warmup=0, scale=(0.5, 2.0), jitter=0.0, views=5),
    "voc": dict(backbone="resnet101", weights="imagenet", epochs=100, batch_size=16, crop_size=(512, 512), lr=0.001,
                head_lr_mult=10.0, weight_decay=1e-4, warmup=0, scale=(0.5, 2.0), jitter=0.2, views=5),
    "folder": dict(backbone="resnet101", weights="imagenet", epochs=100, batch_size=8, crop_size=(512, 512), lr=0.01,
                   head_lr_mult=10.0, weight_decay=5e-4, warmup=0, scale=(0.5, 2.0), jitter=0.0, views=5),
}  # fmt: skip
SCRATCH = dict(lr=0.05, head_lr_mult=1.0, warmup=50)
ROLES = {"member": 0, "student": 1}
# what may differ between a command and the run that it continues
FREE = {"members", "member_ids", "workers", "device", "data", "save_every", "overwrite", "out", "cache"}


# ------------------------------------------------------------------------------ the run


def stream(seed: int, role: str, member: int) -> list[int]:
    """Four 32-bit integers for a network's random choices; no two of (seed, role, member) share them."""
    return np.random.SeedSequence([seed, ROLES[role], member]).generate_state(4).tolist()


def resolve(args: argparse.Namespace, recipe: dict) -> argparse.Namespace:
    """Fill what the command left open from the recipe and the machine, and refuse what cannot be."""
    if args.image_size and not args.crop_size:
        recipe = recipe | {"crop_size": tuple(map(min, zip(recipe["crop_size"], args.image_size, strict=True)))}
    if (args.weights or recipe["weights"]) == "none":
        recipe = recipe | SCRATCH
    for key in vars(args).keys() & recipe.keys():
        if getattr(args, key) is None:
            setattr(args, key, recipe[key])
    device = choose_device(args.device)
    args.device = str(device)
    if args.amp == "auto":
        args.amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.workers is None:  # on a CPU the training itself needs every core
        args.workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    for key in ("epochs", "batch_size", "accumulate", "lr", "head_lr_mult", "save_every"):
        if not getattr(args, key) > 0:
            raise UsageError(f"--{key.replace('_', '-')} {getattr(args, key)}: has to be positive")
    for key in ("weight_decay", "warmup", "workers", "seed"):
        if getattr(args, key) < 0:
            raise UsageError(f"--{key.replace('_', '-')} {getattr(args, key)}: cannot be negative")
    if args.batch_size < 2:
        raise UsageError(f"--batch-size {args.batch_size}: batch norm needs at least 2 images; use --accumulate to save memory")
    if not 0 < args.scale[0] <= 1 <= args.scale[1]:
        raise UsageError(f"--scale {args.scale[0]} {args.scale[1]}: needs 0 < LO <= 1 <= HI")
    for key in ("crop_size", "image_size"):
        if getattr(args, key) and min(getattr(args, key)) < 1:
            raise UsageError(f"--{key.replace('_', '-')} {' '.join(map(str, getattr(args, key)))}: has to be positive")
    return args


def check_same(saved: dict, args: argparse.Namespace, path: Path) -> None:
    """A run is continued under the flags that it was begun with; raises UsageError naming the first difference."""
    now = plain(args)
    for key in sorted((saved.keys() | now.keys()) - FREE):
        if saved.get(key) != now.get(key):
            raise UsageError(
                f"{path} was begun with {key} = {saved.get(key)}, this command says {now.get(key)}; "
                "use the same flags, another --out, or --overwrite to start anew"
            )


def plain(args: argparse.Namespace) -> dict:
    """The flags as checkpoints store them: lists, numbers and strings."""
    return {k: str(v) if isinstance(v, Path) else [str(x) if isinstance(x, Path) else x for x in v] if isinstance(v, list | tuple) else v
            for k, v in sorted(vars(args).items())}


def open_splits(args: argparse.Namespace) -> tuple[data.SegmentationDataset, data.SegmentationDataset]:
    """The training and the validation split that the flags name."""
    common = {"image_size": args.image_size, "hold_out": args.hold_out}
    return (
        data.open_dataset(args.dataset, args.data, args.split, **common),
        data.open_dataset(args.dataset, args.data, "val", **common),
    )


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
    """Mean over the labelled pixels, 0 where there are none. logits [B, C, H, W], labels uint8 [B, H, W]."""
    target = labels.long()
    target = torch.where(labels == IGNORED, VOID, target)
    total = F.cross_entropy(logits.float(), target, ignore_index=VOID, reduction="sum")
    return total / (target != VOID).sum().clamp(min=1)


def segmentation_loss(network: nn.Module, batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """The members' loss. A `loss_fn` of `fit` returns the loss of a batch on the device and what to log of it."""
    return cross_entropy(network(batch.images).logits, batch.labels), {}


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Poly schedule with linear warm-up: 1 at step 0 (without warm-up), above 0 at the last step `steps` - 1."""
    return (1 - step / steps) ** 0.9 * min(1.0, (step + 1) / max(1, warmup))


def build_optimizer(model: DeepLabV3, args: argparse.Namespace) -> torch.optim.SGD:
    heads = model.head_parameters()
    known = {id(p) for p in heads}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known], "multiple": 1.0},
        {"params": heads, "multiple": args.head_lr_mult},
    ]
    fused = torch.device(args.device).type == "cuda"
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=fused)


def fit(
    model: DeepLabV3, loss_fn, train_loader: DataLoader, val_loader: DataLoader,
    args: argparse.Namespace, path: Path, config: dict,
) -> dict:  # fmt: skip
    """Train `model` on the device of `args` and write the checkpoint `path`; returns its `metrics`.

    The state of the running training lies in `path`.state and is taken up if it is there. One JSON line an epoch
    goes to `path`.jsonl. Raises UsageError where the loss is not finite or the state belongs to another command;
    SystemExit 130 or 143, after saving, where a signal asks for the end.
    """
    device, state_path = torch.device(args.device), path.with_suffix(".state")
    batches, optimizer = train_loader.batch_sampler, build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    at = load_state(state_path, model, optimizer, scaler, args)
    if at["epoch"] or at["batch"]:
        print(f"{path.name}: continuing at epoch {at['epoch']}, batch {at['batch']}", flush=True)

    def save_state() -> None:
        check_finite(at, train_loader.dataset.dataset)
        save_atomically(state_path, at | {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "rng": torch.get_rng_state(), "args": plain(args),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        })  # fmt: skip

    network = torch.compile(model) if args.compile else model
    with Signals() as signals:
        while at["epoch"] < args.epochs:
            line, saved = Progress(path.stem, args, len(batches)), time.monotonic()
            model.train()
            batches.epoch, batches.start = at["epoch"], at["batch"]
            for _ in train_steps(network, loss_fn, train_loader, optimizer, scaler, args, at):
                line.show(at, optimizer.param_groups[0]["lr"])
                if signals.caught or time.monotonic() - saved > 60 * args.save_every:
                    save_state()
                    saved = time.monotonic()
                if signals.caught:
                    signals.leave(f"{path.stem}: saved at epoch {at['epoch']}, batch {at['batch']}")
            scores = validate(model, val_loader, len(config["classes"]), device, args.amp)
            at["history"].append(line.epoch(at, scores, optimizer.param_groups[0]["lr"]))
            if args.select == "best" and not at["best"].get("miou", -1.0) >= scores["miou"]:
                at["best"] = {"miou": scores["miou"], "model": {k: v.clone() for k, v in model.state_dict().items()}}
            at.update(epoch=at["epoch"] + 1, batch=0, sums={}, seen=0)
            log = "".join(json.dumps(entry) + "\n" for entry in at["history"])
            save_atomically(path.with_suffix(".jsonl"), log)
            save_state()
            if signals.caught:
                signals.leave(f"{path.stem}: saved after epoch {at['epoch']}")
    weights = at["best"]["model"] if args.select == "best" else model.state_dict()
    metrics = {key: at["history"][-1][key] for key in ("miou", "pixel_accuracy", "loss")}
    save_atomically(path, {
        "model": {k: v.cpu() for k, v in weights.items()}, "config": config, "args": plain(args),
        "metrics": metrics | ({"miou": at["best"]["miou"]} if args.select == "best" else {}), "versions": versions(),
    })  # fmt: skip
    state_path.unlink()
    return metrics


def train_steps(network: nn.Module, loss_fn, loader: DataLoader, optimizer, scaler, args, at: dict):
    """The rest of epoch at["epoch"] from batch at["batch"] on; yields after every optimiser step, `at` brought up
    to date. A step takes `--accumulate` batches, the last one of an epoch what is left."""
    device, batches = torch.device(args.device), loader.batch_sampler
    steps = math.ceil(len(batches) / args.accumulate)  # an epoch
    for batch in loader:
        first = at["batch"] - at["batch"] % args.accumulate
        size = min(args.accumulate, len(batches) - first)
        batch = Sample(*(field.to(device, non_blocking=True) for field in batch))
        with autocast(device, args.amp):
            loss, logs = loss_fn(network, batch)
        scaler.scale(loss / size).backward()
        for name, value in {"loss": loss, **logs}.items():
            at["sums"][name] = at["sums"].get(name, 0) + value.detach()
        at["recent"].append((at["batch"], batch.index, loss.detach()))
        at["batch"] += 1
        at["seen"] += len(batch.images)
        if at["batch"] < first + size:
            continue
        # reading a loss waits for the GPU: there only now and then, on a CPU before the weights take harm
        if device.type == "cpu" or len(at["recent"]) >= 20 or at["batch"] == len(batches):
            check_finite(at, loader.dataset.dataset)
        factor = lr_factor(at["epoch"] * steps + first // args.accumulate, args.epochs * steps, args.warmup)
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
            images = ", ".join(dataset.stem(i) for i in index.tolist())
            raise UsageError(
                f"the loss is {value} in epoch {at['epoch']}, batch {number} (images {images}); nothing was saved of "
                "it: look at these images, lower --lr, or try --amp off"
            )
    at["recent"].clear()


def load_state(path: Path, model: nn.Module, optimizer, scaler, args: argparse.Namespace) -> dict:
    """Where the training stands: from `path` if a run was interrupted, else its beginning."""
    at = {"epoch": 0, "batch": 0, "seen": 0, "sums": {}, "history": [], "best": {}, "recent": []}
    if not path.exists():
        return at
    state = read_tensors(path)
    check_same(state["args"], args, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if args.amp == "fp16":
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and torch.device(args.device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], args.device)
    at |= {key: state[key] for key in at}
    at["sums"] = {name: value.to(args.device) for name, value in at["sums"].items()}
    return at


class Signals:
    """SIGINT and SIGTERM as a flag that the loop looks at when its state is whole; a second one ends at once."""

    def __enter__(self) -> "Signals":
        self.caught = 0
        self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number: int, frame) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, message: str) -> None:
        print(f"\n{message}; the same command continues from there", file=sys.stderr)
        raise SystemExit(128 + self.caught)


class Progress:
    """One live line on a terminal while an epoch runs, one line an epoch anywhere."""

    def __init__(self, name: str, args: argparse.Namespace, batches: int):
        self.name, self.args, self.batches = name, args, batches
        self.started = self.shown = time.monotonic()
        self.first = None

    def show(self, at: dict, lr: float) -> None:
        now = time.monotonic()
        if self.first is None:  # the first step warms up (compiles), the rate is taken after it
            self.first = (now, at["seen"], at["batch"])
        if not sys.stderr.isatty() or now - self.shown < 0.5:
            return
        self.shown = now
        rate = (at["batch"] - self.first[2]) / max(now - self.first[0], 1e-9)
        left = ((self.args.epochs - at["epoch"]) * self.batches - at["batch"]) / rate if rate else math.inf
        images = (at["seen"] - self.first[1]) / max(now - self.first[0], 1e-9)
        loss = at["sums"]["loss"].item() / at["batch"]
        text = f"{self.name}  epoch {at['epoch'] + 1}/{self.args.epochs}  batch {at['batch']}/{self.batches}  "
        text += f"loss {loss:.4f}  lr {lr:.2e}  {images:.1f} images/s  {clock(left)} left"
        print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)

    def epoch(self, at: dict, scores: dict, lr: float) -> dict:
        """Print the epoch's line and return it as the dictionary that goes to the log."""
        seconds = time.monotonic() - self.started
        means = {name: value.item() / self.batches for name, value in at["sums"].items()}
        entry = {"epoch": at["epoch"] + 1, "lr": lr, **means}
        entry |= {key: scores[key] for key in ("miou", "pixel_accuracy", "mean_class_accuracy")}
        entry |= {"seconds": round(seconds, 2)}
        if sys.stderr.isatty():
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr, flush=True)
        logs = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        left = clock(seconds * (self.args.epochs - at["epoch"] - 1))
        print(f"{self.name}  epoch {at['epoch'] + 1}/{self.args.epochs}  {logs}  val miou {scores['miou']:.4f}  "
              f"{seconds:.1f} s  {left} left", flush=True)  # fmt: skip
        return entry


def clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# ------------------------------------------------------------------------------ command line


def is_finished(path: Path, args: argparse.Namespace) -> bool:
    """Whether `path` was trained by this very command; with --overwrite it is removed, and its state with it."""
    if args.overwrite:
        for leftover in (path, path.with_suffix(".state"), path.with_suffix(".jsonl")):
            leftover.unlink(missing_ok=True)
    if not path.exists():
        return False
    checkpoint = read_checkpoint(path)
    check_same(checkpoint["args"], args, path)
    print(f"{path.name}: finished, val miou {checkpoint['metrics']['miou']:.4f}", flush=True)
    return True


def build(args: argparse.Namespace, key: list[int], classes: int, measures: tuple[str, ...] = ()) -> DeepLabV3:
    """A network initialised from the first integer of its stream, which also seeds its dropout."""
    torch.manual_seed(key[0])
    model = DeepLabV3(args.backbone, classes, measures)
    print(load_weights(model, args.weights, args.backbone), flush=True)
    return model.to(args.device, memory_format=torch.channels_last)


def loaders(args, train_set, val_set, key: list[int], views: int = 0, jitter: float = 0.0):
    """The training and the validation loader of one network, keyed by the rest of its stream."""
    device = torch.device(args.device)
    sampled = data.TrainingViews(train_set, args.crop_size, args.scale, key[1:], views, jitter)
    if len(train_set) < args.batch_size:
        print(f"{len(train_set)} training images are less than a batch of {args.batch_size}: one batch of all of them")
    return (
        data.training_loader(sampled, args.batch_size, args.workers, device),
        data.evaluation_loader(val_set, args.batch_size, args.workers, device),
    )


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- what will be done
    if args.members < 1:
        raise UsageError(f"--members {args.members}: has to be at least 1")
    ids = list(range(args.members)) if args.member_ids is None else args.member_ids
    if wrong := [i for i in ids if not 0 <= i < args.members]:
        raise UsageError(f"--member-ids {wrong[0]} is not among the {args.members} members 0..{args.members - 1}")
    resolve(args, RECIPES[args.dataset])
    train_set, val_set = open_splits(args)
    print_settings(args, train_set, val_set)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- members
    for member in ids:
        path = out / f"member_{member:02d}.pt"
        if is_finished(path, args):
            continue
        key = stream(args.seed, "member", member)
        model = build(args, key, len(train_set.classes))
        config = describe(train_set, args, args.members)
        train_loader, val_loader = loaders(args, train_set, val_set, key)
        fit(model, segmentation_loss, train_loader, val_loader, args, path, config)
    print(f"{len(ids)} members in {out}; next: python distill.py --teacher {out}")


def print_settings(args: argparse.Namespace, train_set, val_set) -> None:
    settings = "  ".join(f"{k} {v}" for k, v in plain(args).items() if v not in (None, [], False))
    print(f"{len(train_set)} training and {len(val_set)} validation images, {len(train_set.classes)} classes")
    print(settings, flush=True)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that the members and the student share. None means: as the recipe (or the teacher) has it."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set, as its publisher ships it")
    group.add_argument("--split", default="train", help="training split; voc also has trainaug (default: train)")
    group.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"),
                       help="pixels of the network's input, images are resized to it first (default: as they are)")
    group.add_argument("--crop-size", type=int, nargs=2, metavar=("H", "W"), help="pixels of a training view")
    group.add_argument("--scale", type=float, nargs=2, metavar=("LO", "HI"),
                       help="a view is resized by a factor, half of the draws in [LO, 1], half in [1, HI]")
    group.add_argument("--workers", type=int, help="processes that load (default: 0 on a CPU, else up to 8)")
    group = parser.add_argument_group("network")
    group.add_argument("--weights", help="imagenet (downloaded), none, or a state-dict file for the backbone")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="passes over the training split")
    group.add_argument("--batch-size", type=int, help="images a batch, at least 2; the memory grows with it")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step: batch norm sees one each")
    group.add_argument("--lr", type=float, help="base learning rate of the backbone")
    group.add_argument("--head-lr-mult", type=float, help="the heads learn at this multiple of --lr")
    group.add_argument("--weight-decay", type=float, help="L2 penalty on all weights")
    group.add_argument("--warmup", type=int, help="steps over which the learning rate rises to its base")
    group.add_argument("--seed", type=int, default=0, help="seeds 0, 1, 2 share no member and no batch (default: 0)")
    group.add_argument("--select", choices=("last", "best"), default="last",
                       help="weights to keep: the last epoch's, or those of the best val mIoU (default: last)")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    group.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                       help="arithmetic of the network (default: bf16 on a GPU, float32 on a CPU)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile: a minute once, then faster steps (default: on a GPU)")
    group.add_argument("--save-every", type=float, default=5, metavar="MINUTES",
                       help="how much of a running epoch a crash may lose (default: 5)")
    group.add_argument("--overwrite", action="store_true", help="start anew where a run is begun or finished")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="train_ensemble.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what to train")
    group.add_argument("--dataset", choices=data.DATASETS, default="synthetic",
                       help="synthetic needs no files (default: synthetic)")
    group.add_argument("--members", type=int, default=10, metavar="N", help="size of the ensemble (default: 10)")
    group.add_argument("--member-ids", type=integers, metavar="3,4", help="train only these of the N members")
    group.add_argument("--backbone", choices=BACKBONES, help="encoder (default: by data set, resnet18 for synthetic)")
    group.add_argument("--hold-out", nargs="+", default=[], metavar="CLASS",
                       help="classes to take out of the network; evaluate.py --ood held-out scores their pixels")
    group.add_argument("--out", type=Path, default=Path("ckpts"), metavar="DIR", help="folder of the checkpoints")
    add_training_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
