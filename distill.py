"""Distil an ensemble's predictive uncertainty into one network that also segments.

    python distill.py --teacher ckpts/                          # -> ckpts/student.pt
    python distill.py --teacher ckpts/member_00.pt --mc-samples 10      # MC dropout as the teacher

The student learns (Landgraf et al. 2024, doi 10.1007/s41064-024-00280-4)

    L = cross_entropy(logits, labels) + w * RMSLE(u_student, u_teacher)
    RMSLE = sqrt( mean( (log(1 + u_student) - log(1 + u_teacher))^2 ) )

from the labels and from the teacher's standard deviation u (model.py) on the very view that it
sees itself.
"""

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

import data
import train_ensemble as training
from data import IGNORED, Sample
from evaluate import Parser, UsageError, autocast, locked, run
from model import BACKBONES, MAX_STD, Ensemble, load_ensemble, member_files, save_atomically
from train_ensemble import RECIPES, cross_entropy, fit, sum_over_processes

MISSING = 255  # in the target cache; values are 0..254
INHERITED = (
    "dataset", "data", "split", "backbone", "weights", "image_size", "crop_size", "hold_out",
    "epochs", "batch_size", "lr", "head_lr_mult", "weight_decay", "warmup", "scale",
)  # fmt: skip


# ------------------------------------------------------------------------------ loss


def rmsle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Root mean squared logarithmic error over the valid pixels, float32; 0 where there are none.

    student, teacher [B, H, W] in [0, 1]; valid bool [B, H, W]. The epsilon keeps the root's
    gradient finite at 0.
    """
    difference = torch.log1p(student.float()) - torch.log1p(teacher.float())
    total, count = map(sum_over_processes, ((difference.square() * valid).sum(), valid.sum()))
    return (total / count.clamp(min=1) + 1e-12).sqrt()


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


def teacher_target(
    teacher: Ensemble, batch: Sample, cache: "TargetCache | None", amp: str
) -> Tensor:
    """The teacher's std [B, H, W] for a batch: of the unflipped views, then flipped with them."""
    flip = batch.flip.to(batch.images.device, non_blocking=True)[:, None, None]  # [B, 1, 1]
    stored = cache.read(batch) if cache else None
    if stored is None:
        images = torch.where(flip[:, None], batch.images.flip(-1), batch.images)
        device = images.device
        with dropout_of(teacher, batch), torch.inference_mode(), autocast(device, amp):
            target = teacher(images).std
        target = target.clone()  # out of inference mode: autograd may keep it
        stored = cache.write(batch, quantise(target)) if cache else None
    if stored is not None:  # what is learned from is what is stored, also when it is new
        target = dequantise(stored.to(flip.device, non_blocking=True))
    return torch.where(flip, target.flip(-1), target)


@contextlib.contextmanager
def dropout_of(teacher: Ensemble, batch: Sample):
    """MC dropout drawn from a stream of (seed, view, first image), not from the student's own: a
    resumed run, which finds more targets stored, draws the same for the student."""
    if not teacher.mc_samples:
        yield
        return
    key = [torch.initial_seed(), int(batch.view[0]), int(batch.index[0])]
    devices = [batch.images.device] if batch.images.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


def quantise(std: Tensor) -> Tensor:
    """[0, 0.7072] to uint8 0..254; the root spends the steps near 0, where most pixels are."""
    return (254 * (std / MAX_STD).clamp(0, 1).sqrt()).round().to(torch.uint8)


def dequantise(target: Tensor) -> Tensor:
    return MAX_STD * (target.float() / 254).square()


class TargetCache:
    """The teacher's quantised std of every view, uint8 [K, N, H, W], memory-mapped from the disk.

    A target is stored when its view is first met. Single bytes cannot tear and are the same
    whenever they are computed: a run that was killed leaves a valid, if incomplete, cache.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], key: dict):
        described = path.with_suffix(".json")
        key = json.loads(json.dumps(key | {"shape": shape}))
        size = f"{np.prod(shape) / 1e6:.1f} MB"
        print(f"teacher targets: {shape[0]} views of {shape[1]} images, {size} in {path}")
        if not (path.exists() and described.exists() and json.loads(described.read_text()) == key):
            described.unlink(missing_ok=True)
            offset = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset
            with open(path, "r+b") as file:  # full disk: an OSError here, a SIGBUS in the mapping
                file.seek(offset)
                for _ in range(shape[0] * shape[1]):
                    file.write(bytes([MISSING]) * (shape[2] * shape[3]))
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


# ------------------------------------------------------------------------------ command line


def inherit(args: argparse.Namespace, checkpoint: dict) -> None:
    """What the command leaves open is as the teacher was trained."""
    trained = checkpoint["args"]
    if args.epochs is None:
        args.epochs = int(RECIPES[trained["dataset"]]["student"] * trained["epochs"])
    for key in INHERITED:
        if getattr(args, key) is None:
            value = trained.get(key)
            setattr(args, key, Path(value) if key == "data" and value else value)


def open_cache(args: argparse.Namespace, key: list[int], count: int, path: Path) -> TargetCache:
    """The cache of `count` images for a student in `path`; what its targets depend on is its key.
    The first process of a group makes it, then the others open it."""
    identity = {"stream": key, "jitter": RECIPES[args.dataset]["jitter"]}
    for name in ("teacher_identity", "mc_samples", "dataset", "split", "image_size", "scale",
                 "batch_size", "amp"):  # fmt: skip
        identity[name] = getattr(args, name)
    shape = (min(args.views, args.epochs), count, *args.crop_size)
    rank, world = data.rank_and_world()
    if rank:
        dist.barrier()
    cache = TargetCache(path.with_suffix(".targets.npy"), shape, identity)
    if world > 1 and rank == 0:
        dist.barrier()
    return cache


def distil(args: argparse.Namespace, path: Path, teacher: Ensemble, train_set, val_set) -> None:
    """Train the student and write it to `path`."""
    key, jitter = training.stream(args.seed, "student", 0), RECIPES[args.dataset]["jitter"]
    student = training.build(args, key, len(train_set.classes), ("std",))
    config = training.describe(train_set, args, 1)
    config |= {"measures": ["std"], "teacher_members": len(teacher)}
    loaders = training.loaders(args, train_set, val_set, key, args.views, jitter)
    teacher.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        for member in teacher.members:
            member.compile()
    cache = open_cache(args, key, len(train_set), path) if args.views else None
    loss_fn = distillation_loss(teacher, cache, args.uncertainty_weight, args.amp)
    fit(student, loss_fn, *loaders, args, path, config)


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- teacher and data
    teacher, checkpoint = load_ensemble(args.teacher, args.mc_samples)
    inherit(args, checkpoint)
    args.teacher_identity = checkpoint["identity"]  # another teacher is another student
    training.resolve(args, RECIPES[args.dataset])
    if not 0 <= args.uncertainty_weight < math.inf or args.views < 0:
        raise UsageError(f"--uncertainty-weight {args.uncertainty_weight} and --views {args.views} "
                         "cannot be negative or infinite")  # fmt: skip
    path = args.out or member_files(args.teacher)[0].with_name("student.pt")
    with training.process_group(args.device):
        train_set, val_set = training.open_splits(args)
        if train_set.classes != (classes := checkpoint["config"]["classes"]):
            raise UsageError(
                f"the teacher knows the classes {', '.join(classes)}, the data has "
                f"{', '.join(train_set.classes)}; use the teacher's data set"
            )

        # ------------------------------------------------------------ student
        path.parent.mkdir(parents=True, exist_ok=True)
        first = data.rank_and_world()[0] == 0
        with locked(path) if first else contextlib.nullcontext():
            if args.overwrite and first:
                training.remove(path, (path.suffix, ".jsonl", *training.UNFINISHED))
            training.any_process(False, torch.device(args.device))  # wait for the first
            if not training.is_finished(path, args):
                distil(args, path, teacher, train_set, val_set)
        print(f"student in {path}; next: python evaluate.py --student {path} --ood")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: the teacher, how it is learned from, and the training flags."""
    parser = Parser(prog="distill.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument_group("what to distil").add_argument
    flag("--teacher", nargs="+", type=Path, default=[Path("ckpts")], metavar="DIR|FILE",
         help="folder of an ensemble, or its checkpoints one by one (default: ckpts)")
    flag("--mc-samples", type=int, default=0, metavar="N",
         help="N dropout samples of a single checkpoint are the teacher (default: 0, an ensemble)")
    flag("--views", type=int, metavar="K",
         help="scale and crop repeat after K epochs, whose teacher targets are kept on the disk; "
              "the teacher's cost falls by epochs / K. 0: new views, float targets, nothing kept")
    flag("--uncertainty-weight", type=float, metavar="W",
         help="weight of the RMSLE term (default: the recipe's; the paper's is 1)")
    flag("--dataset", choices=data.DATASETS, help="(default: the teacher's)")
    flag("--backbone", choices=BACKBONES, help="(default: the teacher's)")
    flag("--hold-out", nargs="+", metavar="CLASS", help="(default: the teacher's)")
    flag("--out", type=Path, metavar="FILE", help="(default: student.pt beside the teacher)")
    training.add_training_flags(parser)
    parser.set_defaults(split=None)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
