"""A study on CamVid: which uncertainty head, loss and training make a distilled score worth more.

    python tests/study_heads.py --data CamVid --road-anomaly RoadAnomaly --out study --jobs 2

Whole frames: five members of 30 epochs at 180x240 and, for each variant, one student a seed of as
many epochs. A second ensemble, at 120x160, has no labels of bicyclists and pedestrians. Every
second of the validation images is there to choose a variant by, and only the others are reported.

A head whose features are detached changes nothing but itself. So one student can have several of
them at once, and each learns what it would learn alone: `ManyHeads`. Afterwards each becomes a
checkpoint of its own. The other variants are flags of distill.py.

A study that was stopped continues with the same command. Prints Markdown tables.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from study import print_table, spread
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import train_ensemble  # noqa: E402
from data import IGNORED, Sample  # noqa: E402
from metrics import ERROR  # noqa: E402
from model import ConfidenceHead, upsample  # noqa: E402

# ------------------------------------------------------------------ what is compared

MEASURES = ("std", "entropy", "mutual_information", "msp")  # of the teacher, of every variant


class SlopesHead(ConfidenceHead):
    """A `ConfidenceHead` that predicts its weights b by place, as it does a."""

    def __init__(self, channels: int, num_measures: int):
        super().__init__(channels, num_measures)
        self.num_measures = num_measures
        before = self.from_features[-1]
        last = nn.Conv2d(before.in_channels, 3 * num_measures, kernel_size=1)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias[:num_measures], self.START)
        nn.init.constant_(last.bias[num_measures:], self.START_OF_WEIGHTS)
        self.from_features[-1] = last
        del self.from_confidence

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """[B, channels, h, w] and [B, C, H, W] -> [B, T, H, W] in (0, 1)."""
        predicted = upsample(self.from_features(features.detach()), logits.shape[-2:])
        a, first_b, second_b = predicted.split(self.num_measures, dim=1)  # [B, T, H, W] each
        z = self.log_odds(logits.detach())  # [B, 2, H, W]
        return (a + first_b * z[:, :1] + second_b * z[:, 1:]).sigmoid()


class Detached(NamedTuple):
    """A variant that is a head of its own on detached features."""

    head: str  # as `build_head` here names it
    learns_error: bool = False
    in_logarithms: bool = False  # smooth L1 of log(1e-3 + u) in place of the RMSLE


DETACHED = {
    "confidence, 1x1": Detached("confidence-1x1"),
    "confidence": Detached("confidence"),
    "confidence, slopes": Detached("slopes"),
    "confidence, error": Detached("confidence", learns_error=True),
    "confidence, log loss": Detached("confidence", in_logarithms=True),
}

# Flags of distill.py, and `GRADIENT_VIEWS`, which is this study's own. The published recipe has the
# paper's head and the std alone.
STRONG = ("--strong-views", "--unlabelled-weight", "0.3")
GRADIENT_VIEWS = "--gradient-views"
SINGLE = {
    "published": ("--head", "paper", "--targets", "std"),
    "paper head, four measures": ("--head", "paper"),
    "confidence, attached": ("--head", "confidence-attached"),
    "confidence + probabilities": ("--head", "confidence", "--distill-probs", "1"),
    "attached + strong views, decoder": (
        ("--head", "confidence-attached", "--unlabelled-depth", "decoder") + STRONG
    ),
    "attached + strong views, all": ("--head", "confidence-attached") + STRONG,
    "attached + gradient views": ("--head", "confidence-attached", GRADIENT_VIEWS),
    "paper + strong views": ("--head", "paper") + STRONG,
    "paper + gradient views": ("--head", "paper", GRADIENT_VIEWS),
}

# Flags of both trainings: a process that trains for a minute has no time to compile.
TRAINING = ("--cache", "cache", "--workers", "1", "--no-compile")
# Flags of train_ensemble.py, by the name of the ensemble.
COMMON = ("--dataset", "camvid", "--backbone", "resnet18", "--weights", "none")
COMMON += ("--validate-every", "10")
ENSEMBLES = {
    "members": ("--image-size", "180", "240", "--epochs", "30", "--batch-size", "4")
    + ("--lr", "0.05", "--scale", "1", "1"),
    "held_out": ("--image-size", "120", "160", "--epochs", "20", "--lr", "0.1")
    + ("--scale", "0.75", "1.25", "--hold-out", "bicyclist", "pedestrian"),
}
# What is trained of the second ensemble; it takes no part in choosing.
HELD_OUT_VARIANTS = ("published", "paper head, four measures")


# ------------------------------------------------------------------ several heads at once


class ManyHeads(nn.Module):
    """All `DETACHED` heads; their channels one after the other, as `variant_channels` says."""

    def __init__(self, channels: int, num_measures: int):
        super().__init__()
        self.heads = nn.ModuleList()
        for variant in DETACHED.values():
            count = num_measures + variant.learns_error
            self.heads.append(build_head(variant.head, channels, count))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return torch.cat([head(features, logits) for head in self.heads], dim=1)


project_build_head = model.build_head
project_distillation_loss = distill.distillation_loss


def build_head(name: str, channels: int, num_measures: int) -> nn.Module:
    """`model.build_head` that knows two more."""
    if name == "many":
        return ManyHeads(channels, num_measures)
    if name == "slopes":
        return SlopesHead(channels, num_measures)
    return project_build_head(name, channels, num_measures)


def many_losses(
    network: nn.Module,
    batch: Sample,
    targets: distill.TeacherTargets,
    weights: distill.LossWeights,
    **_,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distill.distillation_loss` of every head; the segmentation learns from labels alone."""
    target = targets.for_batch(batch).uncertainty
    logits, uncertainty = network(batch.images)
    valid = batch.labels != IGNORED
    loss = train_ensemble.cross_entropy(logits, batch.labels)
    logs = {"ce": loss}
    first = 0
    for name, variant in DETACHED.items():
        last = first + len(MEASURES)
        terms = []
        pairs = zip(uncertainty[:, first:last].unbind(1), target.unbind(1), strict=True)
        for student, teacher in pairs:
            if variant.in_logarithms:
                difference = (1e-3 + student).log() - (1e-3 + teacher).log()
                zero = torch.zeros_like(difference)
                error = nn.functional.smooth_l1_loss(difference, zero, reduction="none")
                terms.append(distill.weighted_mean(error, valid))
            else:
                terms.append(distill.rmsle(student, teacher, valid))
        if variant.learns_error:
            terms.append(distill.error_loss(uncertainty[:, last], logits, batch.labels))
            last += 1
        # As each weighs in the mean of four: `build_optimizer` is told of four measures.
        logs[name] = torch.stack(terms).sum() / len(MEASURES)
        loss = loss + weights.uncertainty * logs[name]
        first = last
    return loss, logs


def gradient_loss(
    network: nn.Module,
    batch: Sample,
    targets: distill.TeacherTargets,
    weights: distill.LossWeights,
    **_,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distill.distillation_loss`, and the RMSLE of images that make the members disagree.

    Each image goes a step against the margin of a member, by chance one of them and of a length
    by chance, between its two likeliest classes. From there the student learns the uncertainty
    alone.
    """
    loss, logs = project_distillation_loss(network, batch, targets, weights)
    count = len(batch.images)
    members = targets.teacher.members
    member = members[int(torch.randint(len(members), ()))]
    pixels = (batch.images.float() / 255).requires_grad_()
    with torch.enable_grad():
        two_largest = member(pixels).logits.topk(2, dim=1).values
        margin = (two_largest[:, 0] - two_largest[:, 1]).mean()
    (gradient,) = torch.autograd.grad(margin, pixels)
    length = torch.empty(count, 1, 1, 1, device=pixels.device).uniform_(2 / 255, 16 / 255)
    odd = (255 * (pixels.detach() - length * gradient.sign())).round().clamp(0, 255).byte()

    target = targets.run_teacher(odd, odd.shape[-2:], [0], targets.measures)
    with distill.frozen_statistics(network):
        uncertainty = network(odd).uncertainty
    valid = batch.labels != IGNORED
    pairs = zip(uncertainty.unbind(1), target.unbind(1), strict=True)
    terms = [distill.rmsle(student, teacher, valid) for student, teacher in pairs]
    logs["gradient"] = torch.stack(terms).mean()
    return loss + 0.3 * weights.uncertainty * logs["gradient"], logs


def split_heads(path: Path) -> None:
    """A checkpoint for every head of the student of `ManyHeads` at `path`."""
    checkpoint = torch.load(path, weights_only=True)
    for number, (name, variant) in enumerate(DETACHED.items()):
        prefix = f"uncertainty.heads.{number}."
        weights = {}
        for key, value in checkpoint["model"].items():
            if key.startswith(prefix):
                weights["uncertainty." + key.removeprefix(prefix)] = value
            elif not key.startswith("uncertainty."):
                weights[key] = value
        measures = list(MEASURES)
        if variant.learns_error:
            measures.append(ERROR)
        config = checkpoint["config"] | {"head": variant.head, "measures": measures}
        single = checkpoint | {"model": weights, "config": config}
        model.save_atomically(path.with_name(f"{file_name(name)}-{seed_of(path)}.pt"), single)


def file_name(variant: str) -> str:
    return "".join(letter for letter in variant if letter.isalnum())


def seed_of(path: Path) -> str:
    return path.stem.rpartition("-")[2]


def run_command(script: str, flags: list[str]) -> int:
    """distill.py or evaluate.py in this process, with the heads that only this study has."""
    model.build_head = build_head
    model.HEADS = (*model.HEADS, "many", "slopes")
    distill.HEADS = model.HEADS
    module = {"distill.py": distill, "evaluate.py": evaluate}[script]
    if "many" in flags:
        distill.distillation_loss = many_losses
    if GRADIENT_VIEWS in flags:
        flags.remove(GRADIENT_VIEWS)
        distill.distillation_loss = gradient_loss
    code = evaluate.run_main(module.main, module.get_args_parser(), flags)
    if "many" in flags and code == 0:
        split_heads(Path(flags[flags.index("--out") + 1]))
    return code


# ------------------------------------------------------------------ runs


@dataclass
class Study:
    """The flags of the command; paths are absolute."""

    data: Path
    road_anomaly: Path
    out: Path
    seeds: int
    jobs: int
    variants: list[str]
    device: str

    def call(self, script: str, *flags) -> None:
        """A command in the study's folder; its failure ends the study."""
        words = [str(flag) for flag in (*flags, "--device", self.device)]
        print("$", " ".join([script, *words]), flush=True)
        command = [sys.executable, str(ROOT / script), *words]
        if script != "train_ensemble.py":
            command = [sys.executable, str(Path(__file__).resolve()), "run", script, *words]
        code = subprocess.run(command, cwd=self.out).returncode
        if code != 0:
            sys.exit(f"{script} ended with {code}")

    def train_members(self, name: str) -> None:
        """An ensemble, unless it is there."""
        if len(list((self.out / name).glob("member_*.pt"))) < 5:
            flags = (*COMMON, *ENSEMBLES[name], "--members", 5, "--data", self.data)
            flags += ("--parallel", min(self.jobs, 5))
            self.call("train_ensemble.py", *flags, *TRAINING, "--out", name)

    def train_student(self, ensemble: str, variant: str, seed: int) -> None:
        """A student at `student_path`, or all of `DETACHED` where the variant is "detached"."""
        flags = ["--teacher", ensemble, "--data", self.data, "--seed", seed, *TRAINING]
        flags += ["--views", 1 if ensemble == "members" else 5]
        if variant == "detached":
            path = self.student_path(ensemble, "detached", seed)
            flags += ["--head", "many"]
        else:
            path = self.student_path(ensemble, variant, seed)
            flags += SINGLE[variant]
        if not (self.out / path).exists():
            self.call("distill.py", *flags, "--out", path)

    def student_path(self, ensemble: str, variant: str, seed: int) -> Path:
        return Path("students", ensemble, f"{file_name(variant)}-{seed}.pt")

    def results(self, ensemble: str, variant: str, seed: int, part: str) -> dict:
        """metrics.json of a student on the images to choose by, or on those to report."""
        path = self.student_path(ensemble, variant, seed)
        folder = Path("results", ensemble, f"{path.stem}-{part}")
        file = self.out / folder / "metrics.json"
        trained = (self.out / path).stat().st_mtime
        if not file.exists() or file.stat().st_mtime < trained:
            flags = ["--student", path, "--teacher", ensemble, "--data", part, "--panels", 0]
            if ensemble == "held_out":
                flags += ["--ood", "held-out"]
            elif part == "report":
                flags += ["--ood", "pasted", f"roadanomaly:{self.road_anomaly}"]
            self.call("evaluate.py", *flags, "--batch-size", 4, "--out", folder)
        return json.loads(file.read_text())

    def trainings(self) -> list[tuple[str, str, int]]:
        """(ensemble, variant, seed) of each student, seed by seed, the cheapest answers first."""
        waiting = []
        for seed in range(self.seeds):
            waiting.append(("members", "detached", seed))
            waiting += [("members", variant, seed) for variant in self.variants]
        for seed in range(self.seeds):
            waiting.append(("held_out", "detached", seed))
            waiting += [("held_out", variant, seed) for variant in HELD_OUT_VARIANTS]
        return waiting

    def run(self) -> dict[tuple[str, str, str], list[dict]]:
        """metrics.json of each seed, by ensemble, variant and part."""
        self.split_validation()
        for ensemble in ENSEMBLES:
            self.train_members(ensemble)
            (self.out / "students" / ensemble).mkdir(parents=True, exist_ok=True)
        if self.jobs > 1:  # students share the cores out
            os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // self.jobs))
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(self.train_student, *each) for each in self.trainings()]
            try:
                for student in waiting:
                    student.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

            waiting = {}
            for ensemble, singles in (("members", self.variants), ("held_out", HELD_OUT_VARIANTS)):
                for variant in (*singles, *DETACHED):
                    for part in ("choose", "report"):
                        runs = []
                        for seed in range(self.seeds):
                            runs.append(pool.submit(self.results, ensemble, variant, seed, part))
                        waiting[ensemble, variant, part] = runs
            results = {}
            for key, runs in waiting.items():
                results[key] = [run.result() for run in runs]
        return results

    def split_validation(self) -> None:
        """The data sets "choose" and "report": each has every second validation image."""
        images = sorted((self.data / "val").iterdir())
        masks = sorted((self.data / "valannot").iterdir())
        for first, part in enumerate(("choose", "report")):
            for folder, files in (("val", images), ("valannot", masks)):
                (self.out / part / folder).mkdir(parents=True, exist_ok=True)
                for file in files[first::2]:
                    link = self.out / part / folder / file.name
                    if not link.exists():
                        link.symlink_to(file)


# ------------------------------------------------------------------ tables


def print_part(results: dict, ensemble: str, part: str) -> None:
    """Segmentation, agreement, and what the learned scores are worth, of every variant."""
    variants = [key[1] for key in results if key[0] == ensemble and key[2] == part]
    rows = []
    for variant in variants:
        runs = results[ensemble, variant, part]
        segmentation = [run["segmentation"]["student"] for run in runs]
        dudes = [run["uncertainty"]["student/dudes"] for run in runs]
        rows.append(
            [
                variant,
                spread([figures["miou"] for figures in segmentation]),
                spread([figures["nll"] for figures in segmentation], 1, 3),
                spread([figures["ece"] for figures in segmentation]),
                spread([run["fidelity"]["pearson"] for run in runs], 1, 3),
                spread([figures["auroc"] for figures in dudes]),
                spread([figures["aurc"] for figures in dudes], 1, 4),
            ]
        )
    head = ["", "mIoU %", "NLL", "ECE %", "Pearson, std", "errors by `dudes`: AUROC %", "AURC"]
    print(f"\n{ensemble}, {part}")
    print_table(head, rows)

    comparison = results[ensemble, variants[0], part][0]["comparison"]
    tasks = ["errors", *comparison["ood"]]
    for task in tasks:
        rows = []
        for variant in variants:
            tables = []
            for run in results[ensemble, variant, part]:
                whole = run["comparison"]
                tables.append(whole["errors"] if task == "errors" else whole["ood"][task])
            rows += comparison_rows(variant, tables)
        print(f"\n{ensemble}, {part}: {task}. Gain over the best free score, points of AUROC")
        print_table(["", "score", "AUROC %", "gain", "intervals above, around, below 0"], rows)


def comparison_rows(variant: str, tables: list[dict]) -> list[list[str]]:
    """The best free score of a variant, then what each learned one gains on it, seed by seed."""
    figures = [table["auroc"] for table in tables]
    names = {figure["best_free"].removeprefix("student/") for figure in figures}
    free = " or ".join(f"`{name}`" for name in sorted(names))
    rows = [[variant, f"{free}, free", spread([figure["value"] for figure in figures]), "", ""]]
    for key in figures[0]["scores"]:
        scores = [figure["scores"][key] for figure in figures]
        verdicts = [score["worth_more"] for score in scores]
        counts = ", ".join(str(verdicts.count(word)) for word in ("yes", "undecided", "no"))
        values = spread([score["value"] for score in scores])
        gains = spread([score["gain"] for score in scores], 100, 2)
        rows.append(["", f"`{key.removeprefix('student/')}`", values, gains, counts])
    return rows


# ------------------------------------------------------------------ command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CamVid in the SegNet layout")
    parser.add_argument("--road-anomaly", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("study"), help="(default: study)")
    parser.add_argument("--seeds", type=int, default=3, help="students a variant (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="students trained side by side")
    parser.add_argument("--variants", nargs="+", choices=SINGLE, default=list(SINGLE))
    parser.add_argument("--device", default="auto")
    return parser


def main(args: argparse.Namespace) -> None:
    study = Study(**vars(args))
    # The commands run in another folder, so relative paths would not be found there.
    study.data = study.data.resolve()
    study.out = study.out.resolve()
    study.road_anomaly = study.road_anomaly.resolve()
    results = study.run()
    for ensemble in ENSEMBLES:
        for part in ("choose", "report"):
            print_part(results, ensemble, part)
    protocols = []
    for runs in results.values():
        protocols += [run["protocol"] for run in runs]
    commits = sorted({protocol["commit"] for protocol in protocols})
    print(
        f"\nseeds 0..{study.seeds - 1}, {study.jobs} at a time, torch {protocols[0]['torch']}, "
        f"{protocols[0]['hardware']}, commit {', '.join(commits)}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        sys.exit(run_command(sys.argv[2], sys.argv[3:]))
    main(get_args_parser().parse_args())
