"""A study on CamVid: which uncertainty head and loss make a distilled score worth more.

    python tests/study_heads.py --data CamVid --road-anomaly RoadAnomaly --out study --jobs 2

Whole frames: five members of 30 epochs at 180x240 and, for each variant, one student a seed of as
many epochs. A second ensemble, at 120x160, has no labels of bicyclists and pedestrians. Every
second of the validation images is there to choose a variant by, the others to report it.

A head that learns alone changes nothing but itself. So the network of the variant "confidence" is
given several heads at once, and each learns what it would learn alone: `ManyHeads`. Afterwards each
becomes a checkpoint of its own. The other variants are flags of distill.py.

A study that was stopped continues with the same command (several heads at once begin anew). Prints
Markdown tables.
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
from data import IGNORED, Sample  # noqa: E402
from model import ConfidenceHead, upsample  # noqa: E402

# ------------------------------------------------------------------ what is compared


class OffsetHead(ConfidenceHead):
    """A `ConfidenceHead` whose weights b are two numbers a measure, the same everywhere."""

    hidden_layers = 2

    def __init__(self, channels: int, num_measures: int):
        super().__init__(channels, num_measures)
        layers = list(self.stack)
        if self.hidden_layers == 0:
            layers = [nn.Conv2d(channels, 3 * num_measures, kernel_size=1)]
        before = layers.pop()
        last = nn.Conv2d(before.in_channels, num_measures, kernel_size=1)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias, self.START)
        self.stack = nn.Sequential(*layers, last)  # a
        self.weights = nn.Conv2d(2, num_measures, kernel_size=1, bias=False)  # b
        nn.init.constant_(self.weights.weight, self.START_OF_WEIGHTS)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """[B, channels, h, w] and [B, C, H, W] -> [B, T, H, W] in (0, 1)."""
        a = upsample(self.stack(features.detach()), logits.shape[-2:])  # [B, T, H, W]
        return (a + self.weights(self.log_odds(logits.detach()))).sigmoid()


class FlatHead(OffsetHead):
    """An `OffsetHead` of a single 1x1 convolution."""

    hidden_layers = 0


class WideHead(ConfidenceHead):
    WIDTH = 128


class Alone(NamedTuple):
    """A variant that is another head of the network of "confidence"."""

    head: type[ConfidenceHead]
    in_logarithms: bool = False  # smooth L1 of log(1e-3 + u) in place of the RMSLE


ALONE = {
    "b everywhere the same, 1x1": Alone(FlatHead),
    "b everywhere the same": Alone(OffsetHead),
    "confidence, twice as wide": Alone(WideHead),
    "confidence, log loss": Alone(ConfidenceHead, in_logarithms=True),
}
MEASURES = distill.DEFAULT_TARGETS["confidence"]  # of each of them; the last is `ERROR`

# Flags of distill.py.
SINGLE = {
    "published": ("--head", "paper"),
    "paper head, four measures": ("--head", "paper", "--targets", *MEASURES[:-1]),
    "confidence": (),
    "confidence, labels alone": ("--distill-probs", "0"),
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
# What is trained of the second ensemble.
HELD_OUT_VARIANTS = ("published", "confidence")


# ------------------------------------------------------------------ several heads at once


class ManyHeads(nn.Module):
    """All heads of `ALONE`, each with its channels one after the other."""

    def __init__(self, channels: int):
        super().__init__()
        heads = [variant.head(channels, len(MEASURES)) for variant in ALONE.values()]
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return torch.cat([head(features, logits) for head in self.heads], dim=1)


project_build_head = model.build_head


def build_head(name: str, channels: int, num_measures: int) -> nn.Module:
    """`model.build_head` that also knows "many" and the variants of `ALONE` by their names."""
    if name == "many":
        return ManyHeads(channels)
    if name in ALONE:
        return ALONE[name].head(channels, num_measures)
    return project_build_head(name, channels, num_measures)


def many_losses(
    student: nn.Module,
    batch: Sample,
    targets: distill.TeacherTargets,
    kept: distill.KeptFeatures | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distill.head_loss` of every head. Their sum: Adam's steps do not depend on its scale."""
    target = targets.for_batch(batch).uncertainty
    logits, uncertainty = distill.predict_frozen(student, batch, kept)
    channels_of_heads = uncertainty.split(len(MEASURES), dim=1)
    logs = {}
    for (name, variant), channels in zip(ALONE.items(), channels_of_heads, strict=True):
        if variant.in_logarithms:
            logs[name] = logarithmic_loss(channels, logits, batch.labels, target)
        else:
            logs[name], _ = distill.uncertainty_loss(channels, logits, batch.labels, target)
    return torch.stack(list(logs.values())).sum(), logs


def logarithmic_loss(uncertainty: Tensor, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """`distill.uncertainty_loss` with the smooth L1 distance of log(1e-3 + u) for the RMSLE."""
    valid = labels != IGNORED
    terms = [distill.error_loss(uncertainty[:, -1], logits, labels)]
    for student, teacher in zip(uncertainty[:, :-1].unbind(1), target.unbind(1), strict=True):
        distance = nn.functional.smooth_l1_loss(
            (1e-3 + student).log(), (1e-3 + teacher).log(), reduction="none"
        )
        terms.append(distill.mean_of_valid(distance, valid))
    return torch.stack(terms).mean()


def load_segmentation(
    path: Path,
    lessons: distill.Lessons,
    flags: distill.TrainingFlags,
    distillation: distill.DistillationFlags,
) -> tuple[nn.Module, dict]:
    """The network of "confidence", in place of `distill.train_segmentation`."""
    finished = path.with_name(f"confidence-{seed_of(path)}.pt")
    checkpoint = model.read_checkpoint(finished)
    # Its head gives way to the new ones in `distill.train_head`.
    network = model.build_model(checkpoint, finished).to(flags.device)
    return network, checkpoint["metrics"]


def split_heads(path: Path) -> None:
    """A checkpoint for every head of the student of `ManyHeads` at `path`."""
    checkpoint = model.read_checkpoint(path)
    for number, name in enumerate(ALONE):
        prefix = f"uncertainty.heads.{number}."
        weights = {}
        for key, value in checkpoint["model"].items():
            if key.startswith(prefix):
                weights["uncertainty." + key.removeprefix(prefix)] = value
            elif not key.startswith("uncertainty."):
                weights[key] = value
        config = checkpoint["config"] | {"head": name}
        args = checkpoint["args"] | {"head": name}
        single = checkpoint | {"model": weights, "config": config, "args": args}
        model.save_atomically(path.with_name(f"{file_name(name)}-{seed_of(path)}.pt"), single)


def file_name(variant: str) -> str:
    return "".join(letter for letter in variant if letter.isalnum())


def seed_of(path: Path) -> str:
    return path.stem.rpartition("-")[2]


def run_command(script: str, flags: list[str]) -> int:
    """distill.py or evaluate.py in this process, with the heads that only this study has."""
    model.build_head = build_head
    distill.HEADS = (*model.HEADS, "many")
    distill.DEFAULT_TARGETS["many"] = MEASURES
    module = {"distill.py": distill, "evaluate.py": evaluate}[script]
    has_many = "many" in flags
    if has_many:
        distill.train_segmentation = load_segmentation
        distill.head_loss = many_losses
    code = evaluate.run_main(module.main, module.get_args_parser(), flags)
    if has_many and code == 0:
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
        """A student at `student_path`; after "confidence" also the other heads of its network."""
        path = self.student_path(ensemble, variant, seed)
        flags = ["--teacher", ensemble, "--data", self.data, "--seed", seed, *TRAINING]
        flags += ["--views", 1 if ensemble == "members" else 5]
        if not (self.out / path).exists():
            self.call("distill.py", *flags, *SINGLE[variant], "--out", path)

        if (ensemble, variant) == ("members", "confidence"):
            heads = [self.student_path(ensemble, name, seed) for name in ALONE]
            if not all((self.out / head).exists() for head in heads):
                path = self.student_path(ensemble, "alone", seed)
                self.call("distill.py", *flags, "--head", "many", "--out", path)

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
        """(ensemble, variant, seed) of each student, seed by seed."""
        waiting = []
        for seed in range(self.seeds):
            waiting += [("members", variant, seed) for variant in self.variants]
        for seed in range(self.seeds):
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
            of_members = list(self.variants)
            if "confidence" in self.variants:
                of_members += ALONE
            variants_of = {"members": of_members, "held_out": HELD_OUT_VARIANTS}
            for ensemble, variants in variants_of.items():
                for variant in variants:
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
    first_run = results[ensemble, variants[0], part][:1]
    rows = rows_of_model("a member", first_run, "member", ("msp",))
    rows += rows_of_model("the teacher", first_run, "teacher", ("std", "msp"))
    for variant in variants:
        runs = results[ensemble, variant, part]
        rows += rows_of_model(variant, runs, "student", ("dudes", "error", "msp"))
    head = ["", "mIoU %", "NLL", "ECE %", "Pearson, std", "its errors by", "AUROC %", "AURC"]
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


def rows_of_model(
    name: str, runs: list[dict], model_name: str, scores: tuple[str, ...]
) -> list[list[str]]:
    """How a model segments and, a row each, how those scores that it has find its errors."""
    segmentation = [run["segmentation"][model_name] for run in runs]
    if model_name == "student":
        agreement = spread([run["fidelity"]["pearson"] for run in runs], 1, 3)
    elif model_name == "teacher":
        agreement = "1"
    else:
        agreement = ""
    first_cells = [
        name,
        spread([figures["miou"] for figures in segmentation]),
        spread([figures["nll"] for figures in segmentation], 1, 3),
        spread([figures["ece"] for figures in segmentation]),
        agreement,
    ]
    rows = []
    for score in scores:
        key = f"{model_name}/{score}"
        if key in runs[0]["uncertainty"]:
            errors = [run["uncertainty"][key] for run in runs]
            auroc = spread([figures["auroc"] for figures in errors])
            aurc = spread([figures["aurc"] for figures in errors], 1, 4)
            rows.append([*first_cells, f"`{score}`", auroc, aurc])
            first_cells = [""] * len(first_cells)
    return rows


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
