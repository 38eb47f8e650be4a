"""Distil an ensemble's predictive uncertainty into one network that also segments.

    python distill.py --teacher ckpts/                          # -> ckpts/student.pt
    python distill.py --teacher ckpts/member_00.pt --mc-samples 10      # MC dropout as the teacher

The student learns (Landgraf et al. 2024, doi 10.1007/s41064-024-00280-4)

    L = cross_entropy(logits, labels) + w * RMSLE(u_student, u_teacher)
    RMSLE = sqrt( mean( (log(1 + u_student) - log(1 + u_teacher))^2 ) )

from the labels and from the teacher's standard deviation u (model.py) on the very view that it sees itself.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from data import IGNORED, Sample
from evaluate import Parser, UsageError, autocast, run
from model import BACKBONES, MAX_STD, Ensemble, load_ensemble, member_files, save_atomically
from train_ensemble import (
    RECIPES,
    add_training_flags,
    build,
    cross_entropy,
    describe,
    fit,
    is_finished,
    loaders,
    open_splits,
    print_settings,
    resolve,
    stream,
)

MISSING = 255  # in the target cache; values are 0..254
INHERITED = ("dataset", "data", "split", "backbone", "weights", "image_size", "crop_size", "hold_out", "epochs",
             "batch_size", "lr", "head_lr_mult", "weight_decay", "warmup", "scale")  # fmt: skip


# ------------------------------------------------------------------------------ loss


def rmsle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Root mean squared logarithmic error over the valid pixels, in float32; 0 where there are none.

    student, teacher [B, H, W] in [0, 1]; valid bool [B, H, W]. The epsilon keeps the root's gradient finite at 0.
    """
    difference = torch.log1p(student.float()) - torch.log1p(teacher.float())
    mean = (difference.square() * valid).sum() / valid.sum().clamp(min=1)
    return (mean + 1e-12).sqrt()


def distillation_loss(teacher: Ensemble, cache: "TargetCache | None", weight: float, amp: str):
    """The student's `loss_fn` for `train_ensemble.fit`."""

    def loss_fn(network: nn.Module, batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        target = teacher_target(teacher, batch, cache, amp)
        prediction = network(batch.images)
        segmentation = cross_entropy(prediction.logits, batch.labels)
        # void pixels have an uncertainty, padding and held-out classes do not
        uncertainty = rmsle(prediction.uncertainty[:, 0], target, batch.labels != IGNORED)
        return segmentation + weight * uncertainty, {"ce": segmentation, "rmsle": uncertainty}

    return loss_fn


# ------------------------------------------------------------------------------ targets


def teacher_target(teacher: Ensemble, batch: Sample, cache: "TargetCache | None", amp: str) -> Tensor:
    """The teacher's std [B, H, W] for a batch: computed on the unflipped views, then flipped with them."""
    device = batch.images.device
    flip = batch.flip.to(device, non_blocking=True)[:, None, None]  # [B, 1, 1]
    stored = cache.read(batch) if cache else None
    if stored is None:
        images = torch.where(flip[:, None], batch.images.flip(-1), batch.images)
        with torch.inference_mode(), autocast(device, amp):
            target = teacher(images).std
        target = target.clone()  # out of inference mode: autograd may keep it
        if cache:
            target = dequantise(cache.write(batch, quantise(target)).to(device))
    else:
        target = dequantise(stored.to(device, non_blocking=True))
    return torch.where(flip, target.flip(-1), target)


def quantise(std: Tensor) -> Tensor:
    """std in [0, 0.7072] to uint8 0..254; the root spends the steps where most pixels are, near 0."""
    return (254 * (std / MAX_STD).clamp(0, 1).sqrt()).round().to(torch.uint8)


def dequantise(target: Tensor) -> Tensor:
    return MAX_STD * (target.float() / 254).square()


class TargetCache:
    """The teacher's quantised std of every view, uint8 [K, N, H, W] in a memory-mapped file beside the student.

    A target is stored when its view is first met. Single bytes cannot tear and are the same whenever they are
    computed, so a run that was killed while writing leaves a cache that is valid, if incomplete.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], key: dict):
        self.path, described = path, path.with_suffix(".json")
        key = json.loads(json.dumps(key | {"shape": shape}))
        known = path.exists() and described.exists() and json.loads(described.read_text()) == key
        print(f"teacher targets: {shape[0]} views of {shape[1]} images, {np.prod(shape) / 1e6:.1f} MB in {path}", flush=True)
        if not known:
            described.unlink(missing_ok=True)
            np.lib.format.open_memmap(path, "w+", np.uint8, shape)[:] = MISSING
            save_atomically(described, json.dumps(key))
        self.targets = np.lib.format.open_memmap(path, "r+")

    def read(self, batch: Sample) -> Tensor | None:
        """uint8 [B, H, W], or None if a part of it is missing."""
        stored = self.targets[batch.view.cpu().numpy(), batch.index.cpu().numpy()]
        return None if (stored == MISSING).any() else torch.from_numpy(stored)

    def write(self, batch: Sample, targets: Tensor) -> Tensor:
        """Store what is missing of uint8 [B, H, W]; returns what the cache then holds."""
        place = batch.view.cpu().numpy(), batch.index.cpu().numpy()
        stored = self.targets[place]
        stored = np.where(stored == MISSING, targets.cpu().numpy(), stored)
        self.targets[place] = stored
        return torch.from_numpy(stored)

    def remove(self) -> None:
        del self.targets
        self.path.unlink()
        self.path.with_suffix(".json").unlink()


# ------------------------------------------------------------------------------ command line


def inherit(args: argparse.Namespace, checkpoint: dict) -> None:
    """What the command leaves open is as the teacher was trained."""
    for key in INHERITED:
        if getattr(args, key) is None:
            value = checkpoint["args"].get(key)
            setattr(args, key, Path(value) if key == "data" and value else value)


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- teacher and data
    teacher, checkpoint = load_ensemble(args.teacher, args.mc_samples)
    inherit(args, checkpoint)
    resolve(args, RECIPES[args.dataset])
    if args.uncertainty_weight < 0 or args.views < 0:
        raise UsageError("--uncertainty-weight and --views cannot be negative")
    train_set, val_set = open_splits(args)
    if train_set.classes != checkpoint["config"]["classes"]:
        raise UsageError(f"the teacher knows the classes {', '.join(checkpoint['config']['classes'])}, the data has "
                         f"{', '.join(train_set.classes)}; distil on the teacher's data set")  # fmt: skip
    print_settings(args, train_set, val_set)
    path = Path(args.out) if args.out else member_files(args.teacher)[0].with_name("student.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_finished(path, args):
        return

    # ---------------------------------------------------------------- student
    key, jitter = stream(args.seed, "student", 0), RECIPES[args.dataset]["jitter"]
    model = build(args, key, len(train_set.classes), ("std",))
    config = describe(train_set, args, 1) | {"measures": ["std"], "teacher_members": len(teacher)}
    train_loader, val_loader = loaders(args, train_set, val_set, key, args.views, jitter)

    # ---------------------------------------------------------------- distillation
    teacher.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        for member in teacher.members:
            member.compile()
    cache = None
    if args.views:
        views = min(args.views, args.epochs)
        files = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in member_files(args.teacher)]
        identity = {"teacher": files, "mc_samples": args.mc_samples, "stream": key, "dataset": args.dataset,
                    "image_size": args.image_size, "scale": args.scale, "jitter": jitter}  # fmt: skip
        cache = TargetCache(path.with_suffix(".targets.npy"), (views, len(train_set), *args.crop_size), identity)
    loss_fn = distillation_loss(teacher, cache, args.uncertainty_weight, args.amp)
    fit(model, loss_fn, train_loader, val_loader, args, path, config)
    if cache:
        cache.remove()
    print(f"student in {path}; next: python evaluate.py --student {path} --ood")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="distill.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what to distil")
    group.add_argument("--teacher", nargs="+", default=["ckpts"], metavar="DIR|FILE",
                       help="folder of an ensemble, or its checkpoints one by one (default: ckpts)")
    group.add_argument("--mc-samples", type=int, default=0, metavar="N",
                       help="N dropout samples of a single checkpoint are the teacher (default: 0, an ensemble)")
    group.add_argument("--views", type=int, metavar="K",
                       help="scale and crop repeat after K epochs, whose teacher targets are kept on the disk; the "
                            "teacher's cost falls by epochs / K. 0: new views, float targets, nothing kept")
    group.add_argument("--uncertainty-weight", type=float, default=1.0, metavar="W",
                       help="weight of the RMSLE term (default: 1, the paper's)")
    group.add_argument("--dataset", choices=data.DATASETS, help="(default: the teacher's)")
    group.add_argument("--backbone", choices=BACKBONES, help="(default: the teacher's)")
    group.add_argument("--hold-out", nargs="+", metavar="CLASS", help="(default: the teacher's)")
    group.add_argument("--out", type=Path, metavar="FILE", help="checkpoint (default: student.pt beside the teacher)")
    add_training_flags(parser)
    parser.set_defaults(split=None)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
