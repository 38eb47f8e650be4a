"""Distil an ensemble's predictive uncertainty into one network that also segments.

    python distill.py --teacher ckpts/                          # -> ckpts/student.pt
    python distill.py --teacher ckpts/member_00.pt --mc-samples 10      # MC dropout as the teacher

The student learns (Landgraf et al. 2024, doi 10.1007/s41064-024-00280-4)

    L = cross_entropy(logits, labels) + w * RMSLE(u_student, u_teacher)
    RMSLE = sqrt( mean( (log(1 + u_student) - log(1 + u_teacher))^2 ) )

from the labels and from the teacher's standard deviation u (model.py) on the very view that it
sees itself: --targets std. With several, which is the default, the RMSLE is the mean of theirs;
with --distill-probs V the cross-entropy is
(cross_entropy + V * KL(teacher's mean probabilities || student's)) / (1 + V).
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

import data
import train_ensemble as training
from data import IGNORED, Sample
from evaluate import (
    Parser,
    UsageError,
    autocast,
    locked,
    run,
    teacher_scores,
    unit,
    validate,
)
from model import BACKBONES, MAX_STD, Ensemble, load_ensemble, member_files, save_atomically
from train_ensemble import RECIPES, cross_entropy, fit, sum_over_processes

# what the student can learn of the teacher, and what it ends at (entropies: divided by log C)
LARGEST = {"std": MAX_STD, "entropy": 1.0, "mutual_information": 1.0, "msp": 1.0}
MISSING = 255  # in the target cache; values are 0..254
VALIDATION = 2**31  # in the place of a view's number
INHERITED = (
    "dataset", "data", "split", "backbone", "weights", "image_size", "crop_size", "hold_out",
    "epochs", "batch_size", "lr", "head_lr_mult", "weight_decay", "warmup", "scale",
)  # fmt: skip


# ------------------------------------------------------------------------------ loss


def rmsle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Root mean squared logarithmic error over the valid pixels, float32.

    student, teacher [B, H, W] in [0, 1]; valid bool [B, H, W]. The epsilon keeps the root's
    gradient finite at 0, and makes 1e-6 of no pixels.
    """
    difference = torch.log1p(student.float()) - torch.log1p(teacher.float())
    return (mean_of(difference.square(), valid) + 1e-12).sqrt()


def divergence(logits: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
    """KL(probs || softmax(logits)) in nats, mean over the valid pixels; [B, C, H, W] both."""
    probs = probs / probs.sum(dim=1, keepdim=True)  # stored ones are rounded
    terms = torch.xlogy(probs, probs) - probs * logits.float().log_softmax(dim=1)
    return mean_of(terms.sum(dim=1), valid)


def mean_of(values: Tensor, valid: Tensor) -> Tensor:
    """Over the valid pixels of all processes, 0 where there are none."""
    total, count = map(sum_over_processes, ((values * valid).sum(), valid.sum()))
    return total / count.clamp(min=1)


def distillation_loss(target_of, targets: list[str], weight: float, probs_weight=0.0, paired=False):
    """The student's `loss_fn` for `train_ensemble.fit`; target_of(batch) as `teacher_target`.
    paired: the second half of a batch is for the uncertainty alone (`data.PairedViews`)."""

    def loss_fn(network: nn.Module, batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its terms for the log."""
        labelled, *rest = (Sample(*(field.chunk(1 + paired)[part] for field in batch))
                           for part in range(1 + paired))  # fmt: skip
        target = target_of(labelled)  # [B, T (+ C), H, W]
        logits, uncertainty = network(labelled.images)
        # void pixels have a target, padding and held-out classes do not
        valid = labelled.labels != IGNORED
        logs = {"ce": cross_entropy(logits, labelled.labels)}
        if probs_weight:
            logs["kl"] = divergence(logits, target[:, len(targets) :], valid)
        for others in rest:
            with frozen_statistics(network):
                uncertainty = torch.cat([uncertainty, network(others.images).uncertainty])
            target = torch.cat([target, target_of(others)])
            valid = torch.cat([valid, others.labels != IGNORED])
        terms = [rmsle(uncertainty[:, t], target[:, t], valid) for t in range(len(targets))]
        # means, not sums: what is learned besides asks for no other learning rate
        logs["rmsle"] = torch.stack(terms).mean()
        segmentation = (logs["ce"] + probs_weight * logs.get("kl", 0)) / (1 + probs_weight)
        return segmentation + weight * logs["rmsle"], logs

    return loss_fn


@contextlib.contextmanager
def frozen_statistics(network: nn.Module):
    """Batch norm as in evaluation: images that are unlike the training set do not change it."""
    layers = [layer for layer in network.modules()
              if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training]  # fmt: skip
    for layer in layers:
        layer.eval()
    yield
    for layer in layers:
        layer.train()


# ------------------------------------------------------------------------------ targets


def teacher_maps(teacher: Ensemble, targets: list[str], amp: str, with_probs=False):
    """A function of images [B, 3, h, w], a size (H, W) and a key of integers, which returns what
    the student learns: float32 [B, T, H, W] in [0, 1], entropies divided by log C; with_probs
    appends the mean probabilities, C channels. The key tells the draws of MC dropout apart."""

    def maps(images: Tensor, size: tuple[int, int], key: list[int]) -> Tensor:
        with dropout_of(teacher, key, images), torch.inference_mode(), autocast(images.device, amp):
            prediction = teacher(images, size, "mutual_information" in targets)
            probs, scores = prediction.probs, teacher_scores(prediction, targets)
            classes = probs.shape[1]
            channels = torch.stack([u / unit(name, classes) for name, u in scores.items()], dim=1)
            found = torch.cat([channels, probs], dim=1) if with_probs else channels
        return found.clone()  # out of inference mode: autograd may keep it

    return maps


@contextlib.contextmanager
def dropout_of(teacher: Ensemble, key: list[int], images: Tensor):
    """MC dropout drawn from a stream of its own, not from the student's: a resumed run, which finds
    more targets stored, draws the same for the student."""
    if not teacher.mc_samples:
        yield
        return
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        seed = np.random.SeedSequence([torch.initial_seed(), *key])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        yield


def teacher_target(maps, batch: Sample, cache: "TargetCache | None" = None) -> Tensor:
    """`maps` of a batch's unflipped views, stored ones where there is a cache, flipped with it."""
    flip = batch.flip.to(batch.images.device, non_blocking=True)[:, None, None, None]

    def compute() -> Tensor:
        images = torch.where(flip, batch.images.flip(-1), batch.images)
        return maps(images, images.shape[-2:], [int(batch.view[0]), int(batch.index[0])])

    target = cache.look_up(batch.view, batch.index, compute) if cache else compute()
    return torch.where(flip, target.flip(-1), target)


def quantise(values: Tensor, largest: Tensor) -> Tensor:
    """[0, largest] to uint8 0..254; the root spends the steps near 0, where most pixels are."""
    return (254 * (values / largest).clamp(0, 1).sqrt()).round().to(torch.uint8)


def dequantise(stored: Tensor, largest: Tensor) -> Tensor:
    return largest * (stored.float() / 254).square()


class TargetCache:
    """The teacher's quantised maps of every view, uint8 [K, N, T, H, W], memory-mapped from the
    disk. largest: what each channel ends at, [T, 1, 1].

    A target is stored when its view is first met. Single bytes cannot tear and are the same
    whenever they are computed: a run that was killed leaves a valid, if incomplete, cache.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], largest: Tensor, key: dict):
        described = path.with_suffix(".json")
        key, self.largest = json.loads(json.dumps(key | {"shape": shape})), largest
        size = math.prod(shape) / 1e6
        print(f"teacher targets: {shape[0]} x {shape[1]} images, {size:,.1f} MB in {path}")
        if not (path.exists() and described.exists() and json.loads(described.read_text()) == key):
            described.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            if size > (free := shutil.disk_usage(path.parent).free / 1e6):
                raise UsageError(f"{path} takes {size:,.0f} MB, but the disk has {free:,.0f} MB; "
                                 "use fewer --views or another --out")  # fmt: skip
            offset = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset
            with open(path, "r+b") as file:  # full disk: an OSError here, a SIGBUS in the mapping
                file.seek(offset)
                for _ in range(shape[0] * shape[1]):
                    file.write(bytes([MISSING]) * math.prod(shape[2:]))
                file.flush()
                os.fsync(file.fileno())  # before the description says that it is whole
            save_atomically(described, json.dumps(key))
        self.targets = np.lib.format.open_memmap(path, "r+")

    def look_up(self, view: Tensor, index: Tensor, compute, size=None) -> Tensor:
        """float32 [B, T, H, W] of images `index`; compute() is asked for them if some are missing.

        What is learned from is what is stored, also when it was computed this moment. size: (H, W)
        of the maps where the cache has room for larger ones.
        """
        height, width = size or self.targets.shape[-2:]
        place = view.cpu().numpy(), index.cpu().numpy()
        stored = self.targets[place][..., :height, :width]
        if (stored == MISSING).any():
            if not (values := compute()).isfinite().all():
                raise UsageError("the teacher's uncertainty is not finite; check its checkpoints, "
                                 "or use --amp off")  # fmt: skip
            fresh = quantise(values, self.largest).cpu().numpy()
            stored = np.where(stored == MISSING, fresh, stored)
            for v, i, one in zip(*place, stored, strict=True):
                self.targets[v, i, :, :height, :width] = one
            stored = self.targets[place][..., :height, :width]  # an image may be there twice
        stored = torch.from_numpy(stored)
        stored = stored.pin_memory() if self.largest.is_cuda else stored
        return dequantise(stored.to(self.largest.device, non_blocking=True), self.largest)


# ------------------------------------------------------------------------------ command line


def inherit(args: argparse.Namespace, checkpoint: dict) -> None:
    """What the command leaves open is as the teacher was trained."""
    trained = checkpoint["args"]
    if args.epochs is None:
        args.epochs = int(RECIPES[trained["dataset"]]["student"] * trained["epochs"])
    # another data set has its files elsewhere, another size of image has another crop
    unfit = {key for key, given in (("data", "dataset"), ("crop_size", "image_size"))
             if getattr(args, given) not in (None, trained[given])}  # fmt: skip
    for key in INHERITED:
        if getattr(args, key) is None and key not in unfit:
            value = trained.get(key)
            setattr(args, key, Path(value) if key == "data" and value else value)


def open_cache(path: Path, shape: tuple[int, ...], largest: list[float], identity: dict, device):
    """A `TargetCache` that the first process of a group makes, then the others open it."""
    rank, world = data.rank_and_world()
    if rank:
        dist.barrier()
    cache = TargetCache(path, shape, torch.tensor(largest, device=device)[:, None, None], identity)
    if world > 1 and rank == 0:
        dist.barrier()
    return cache


def open_targets(args: argparse.Namespace, path: Path, teacher: Ensemble, views, val_set):
    """Two functions: the teacher's maps of a training batch, and of validation images.

    Both are kept beside `path`, those of training views only with --views; what the stored values
    depend on is the caches' identity.
    """
    identity = {"stream": views.stream, "jitter": views.jitter, "indices": views.indices()}
    for name in ("teacher_identity", "mc_samples", "dataset", "split", "image_size", "scale", "amp",
                 "batch_size", "targets", "distill_probs", "strong_views"):  # fmt: skip
        identity[name] = training.plain(args)[name]
    if args.extra:
        identity["extra"] = data.fingerprint(views.extra.dataset.images)
    largest = [LARGEST[name] for name in args.targets]
    scored = teacher_maps(teacher, args.targets[:1], args.amp)
    shape = (1, len(val_set), 1, *val_set.largest_mask())
    kept = open_cache(path.with_suffix(".val-targets.npy"), shape, largest[:1], identity,
                      args.device)  # fmt: skip

    def val_target(images: Tensor, size: tuple[int, int], index: Tensor) -> Tensor:
        key = [VALIDATION, int(index[0])]
        view = torch.zeros_like(index)
        with torch.compiler.set_stance("force_eager"):  # each size of image would be compiled
            return kept.look_up(view, index, lambda: scored(images, size, key), size)[:, 0]

    maps, cache = teacher_maps(teacher, args.targets, args.amp, args.distill_probs > 0), None
    if args.views:
        if args.distill_probs:
            largest = largest + [1.0] * len(val_set.classes)
        shape = (min(args.views, args.epochs), views.indices(), len(largest), *args.crop_size)
        cache = open_cache(path.with_suffix(".targets.npy"), shape, largest, identity, args.device)
    return functools.partial(teacher_target, maps, cache=cache), val_target


def distil(args: argparse.Namespace, path: Path, teacher: Ensemble, train_set, val_set) -> None:
    """Train the student and write it to `path`."""
    key, jitter = training.stream(args.seed, "student", 0), RECIPES[args.dataset]["jitter"]
    student = training.build(args, key, len(train_set.classes), tuple(args.targets))
    config = training.describe(train_set, args, 1)
    config |= {"measures": args.targets, "teacher_members": len(teacher)}
    settings = train_set, args.crop_size, args.scale, key[1:], args.views, jitter
    extra = args.extra and data.open_images("--extra", args.extra, args.image_size)
    if paired := bool(args.strong_views or extra):
        views = data.PairedViews(*settings, strong=args.strong_views, extra=extra)
    else:
        views = data.TrainingViews(*settings)
    train_loader, val_loader = training.loaders(args, views, val_set)
    teacher.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        for member in teacher.members:
            member.compile(dynamic=False)
    target_of, val_target = open_targets(args, path, teacher, views, val_set)
    loss_fn = distillation_loss(target_of, args.targets, args.uncertainty_weight,
                                args.distill_probs, paired)  # fmt: skip
    validation = functools.partial(validate, loader=val_loader, device=torch.device(args.device),
                                   amp=args.amp, target=val_target)  # fmt: skip
    fit(student, loss_fn, train_loader, validation, args, path, config)


def main(args: argparse.Namespace) -> None:
    # ---------------------------------------------------------------- teacher and data
    teacher, checkpoint = load_ensemble(args.teacher, args.mc_samples)
    inherit(args, checkpoint)
    args.teacher_identity = checkpoint["identity"]  # another teacher is another student
    training.resolve(args, RECIPES[args.dataset])
    for flag in ("uncertainty_weight", "distill_probs", "views"):
        if not 0 <= (value := getattr(args, flag)) < math.inf:
            raise UsageError(f"--{flag.replace('_', '-')} {value}: cannot be negative or infinite")
    args.targets = list(dict.fromkeys(args.targets))
    path = args.out or member_files(args.teacher)[0].with_name("student.pt")
    if path.suffix != ".pt":  # what lies beside it has its name with another suffix
        raise UsageError(f"--out {path}: name a file that ends in .pt")
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
        named = " ".join(map(str, args.teacher))
        named += f" --mc-samples {args.mc_samples}" if args.mc_samples else ""
        print(f"next: python evaluate.py --student {path} --teacher {named} --ood")


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
              "the teacher's cost falls by epochs / K. 0: new views, float targets, none of them "
              "kept (default: 5, synthetic 1)")
    flag("--targets", nargs="+", choices=LARGEST, default=[*LARGEST], metavar="MEASURE",
         help="what to learn of the teacher, a channel each: std (the paper's only one), entropy, "
              "mutual_information, msp (default: all four)")
    flag("--distill-probs", type=float, default=0.0, metavar="WEIGHT",
         help="weight of the KL divergence from the teacher's mean probabilities, against 1 of the "
              "cross-entropy, in their mean (default: 0)")
    flag("--uncertainty-weight", type=float, metavar="W",
         help="weight of the RMSLE (default: the recipe's; the paper's is 1)")
    flag("--strong-views", action="store_true",
         help="beside every view one in other colours, blurred, noisy, with misplaced pieces, from "
              "which the student learns the teacher's uncertainty alone; twice the work")
    flag("--extra", type=Path, metavar="DIR",
         help="images without labels, used as --strong-views are: beside every view one of them, "
              "drawn by lot (with both flags: one or the other)")
    flag("--dataset", choices=data.DATASETS, help="(default: the teacher's)")
    flag("--backbone", choices=BACKBONES, help="(default: the teacher's)")
    flag("--hold-out", nargs="+", metavar="CLASS", help="(default: the teacher's)")
    flag("--out", type=Path, metavar="FILE", help="(default: student.pt beside the teacher)")
    training.add_training_flags(parser)
    parser.set_defaults(split=None)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
