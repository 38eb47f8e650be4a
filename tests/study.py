"""Studies on CamVid: what kept teacher targets cost, and what a distilled uncertainty is worth.

    python tests/study.py views --data CamVid --out study
    python tests/study.py targets --data CamVid --road-anomaly RoadAnomaly --out study

One ensemble that has no labels of bicyclists and pedestrians, and for each variant of the
distillation one student a seed; a seed draws the same batches in every variant. As many members,
which are trained as the students are but learn nothing of a teacher, are the control. The three
commands do the work, so that a study that was stopped continues with the same command. Prints
Markdown tables: mean +- standard deviation over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------ what is compared

HELD_OUT = ("bicyclist", "pedestrian")

# Flags of distill.py, by the name of the variant.
STD = ("--head", "paper")
ALL = ("--head", "paper", "--targets", "std", "entropy", "mutual_information", "msp")
PROBS = ("--distill-probs", "1")
TARGET_VARIANTS = {
    "std alone": STD,
    "all targets": ALL,
    "+ probabilities": (*ALL, *PROBS),
}
VIEW_VARIANTS = {
    "--views 0": (*STD, "--views", "0"),
    "--views 5": (*STD, "--views", "5"),
}
STUDIES = {"views": VIEW_VARIANTS, "targets": TARGET_VARIANTS}

# metrics.json of several runs, by the name of the variant ("member" and "teacher" are two more).
Results = dict[str, list[dict]]


# ------------------------------------------------------------------ runs


@dataclass
class Study:
    """The flags of the command; paths are absolute."""

    study: str  # a key of STUDIES
    data: Path
    road_anomaly: Path | None
    out: Path
    seeds: int
    jobs: int
    members: int
    epochs: int
    backbone: str
    image_size: tuple[int, int]
    crop_size: tuple[int, int] | None
    device: str

    def call(self, script: str, *flags) -> None:
        """One of the three commands, in the study's folder; its failure ends the study."""
        words = [sys.executable, str(ROOT / script), "--device", self.device]
        words += [str(flag) for flag in flags]
        print("$", " ".join([script, *words[2:]]), flush=True)
        code = subprocess.run(words, cwd=self.out).returncode
        if code != 0:
            sys.exit(code)

    def evaluate(self, name: str, checkpoint: Path, *flags) -> dict:
        """metrics.json of an evaluation, run if it is not there or older than its checkpoint."""
        road = "-road" if self.road_anomaly else ""  # one set more is another evaluation
        folder = Path("results", f"{self.study}{road}-{name}")
        file = self.out / folder / "metrics.json"
        trained = (self.out / checkpoint).stat().st_mtime
        if not file.exists() or file.stat().st_mtime < trained:
            flags = (*flags, "--panels", 0, "--batch-size", 8, "--out", folder)
            self.call("evaluate.py", *flags)
        return json.loads(file.read_text())

    def train_members(self) -> None:
        """The ensemble, in the folder `members`."""
        flags = ["--members", self.members, "--dataset", "camvid", "--data", self.data]
        flags += ["--backbone", self.backbone, "--weights", "none"]
        flags += ["--image-size", *self.image_size]
        flags += ["--crop-size", *(self.crop_size or self.image_size)]
        flags += ["--epochs", self.epochs, "--lr", 0.1, "--scale", 0.75, 1.25]
        flags += ["--hold-out", *HELD_OUT, "--cache", "cache", "--out", "members"]
        self.call("train_ensemble.py", *flags)

    def ood_flags(self) -> tuple:
        """The OOD sets of the study "targets"."""
        if self.road_anomaly:
            return ("--ood", "held-out", "pasted", f"roadanomaly:{self.road_anomaly}")
        return ("--ood", "held-out", "pasted")

    def evaluate_members(self) -> Results:
        """The teacher, and as many of its members as there are students of a variant."""
        ood = self.ood_flags()
        files = [Path("members", f"member_{number:02d}.pt") for number in range(self.members)]
        teacher = self.evaluate("teacher", files[0], "--teacher", "members", *ood)
        members = [teacher]  # which has the figures of member 0 too
        for file in files[1 : self.seeds]:
            # The first of the files that --teacher names is the member that is measured.
            members.append(self.evaluate(file.stem, file, "--teacher", file, files[0], *ood))
        return {"member": members, "teacher": [teacher]}

    def student(self, seed: int, variant: str) -> dict:
        """metrics.json of a student, and the minutes that its training took."""
        name = "".join(letter for letter in variant if letter.isalnum()) + f"-{seed}"
        path = Path("students", f"{name}.pt")
        flags = ["--teacher", "members", "--seed", seed, *STUDIES[self.study][variant]]
        self.call("distill.py", *flags, "--cache", "cache", "--out", path)
        if self.study == "targets":
            measured = self.ood_flags()
        else:
            measured = ("--teacher", "members")
        results = self.evaluate(name, path, "--student", path, *measured)

        log = (self.out / path).with_suffix(".jsonl").read_text().splitlines()
        results["minutes"] = sum(json.loads(line)["seconds"] for line in log) / 60
        return results

    def run(self) -> Results:
        """The results of the teacher and, by variant, of each seed's student."""
        (self.out / "students").mkdir(parents=True, exist_ok=True)
        self.train_members()
        results: Results = {}
        if self.study == "targets":
            results = self.evaluate_members()
        for variant in STUDIES[self.study]:
            results[variant] = []

        if self.jobs > 1:  # students share the cores out
            os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // self.jobs))
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = []
            for seed in range(self.seeds):
                for variant in STUDIES[self.study]:
                    waiting.append((variant, pool.submit(self.student, seed, variant)))
            try:
                for variant, student in waiting:
                    results[variant].append(student.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return results


# ------------------------------------------------------------------ tables


def spread(values: list[float | None], factor: float = 100, digits: int = 1) -> str:
    """Mean +- standard deviation of what is not None, times `factor`."""
    values = [factor * value for value in values if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_views(results: Results) -> None:
    """Each --views against --views 0, seed by seed."""
    columns = {
        "mIoU %": lambda result: result["segmentation"]["student"]["miou"],
        "NLL": lambda result: result["segmentation"]["student"]["nll"],
        "Pearson": lambda result: result["fidelity"]["pearson"],
        "error AUROC %": lambda result: result["uncertainty"]["student/dudes"]["auroc"],
    }
    rows = []
    for variant in VIEW_VARIANTS:
        row = [f"`{variant}`"]
        for name, figure in columns.items():
            factor, digits = (100, 2) if "%" in name else (1, 3)
            values = [figure(result) for result in results[variant]]
            base = [figure(result) for result in results["--views 0"]]
            differences = [value - zero for value, zero in zip(values, base, strict=True)]
            row.append(spread(values, factor, digits))
            row.append(spread(differences, factor, digits))
        minutes = [result["minutes"] for result in results[variant]]
        row.append(spread(minutes, 1))
        rows.append(row)
    head = [""]
    for name in columns:
        head += [name, "difference"]
    print_table([*head, "minutes"], rows)


def print_targets(results: Results) -> None:
    """Segmentation, what the distilled scores add to the free ones, then every score."""
    # The network that a row is about, as metrics.json names it.
    networks = {"member": "member", "teacher": "teacher"}
    for variant in TARGET_VARIANTS:
        networks[variant] = "student"
    print_segmentation(results, networks)

    tasks = ["errors", *results["teacher"][0]["ood"]]
    scores = {}
    for name, network in networks.items():
        keys = results[name][0]["uncertainty"]
        scores[name] = [key for key in keys if key.startswith(network + "/")]
    rows = []
    for name in networks:
        gains = [gain(results[name], scores[name], task) for task in tasks]
        rows.append([name, *gains])
    what = "AUROC %: best free → best distilled score, chosen on these figures (difference)"
    print_table([what, *tasks], rows)
    print_scores(results, scores, tasks)


def print_segmentation(results: Results, networks: dict[str, str]) -> None:
    rows = []
    for name, network in networks.items():
        figures = [result["segmentation"][network] for result in results[name]]
        minutes = [result["minutes"] for result in results[name] if "minutes" in result]
        miou = spread([segmentation["miou"] for segmentation in figures])
        nll = spread([segmentation["nll"] for segmentation in figures], 1, 3)
        ece = spread([segmentation["ece"] for segmentation in figures])
        rows.append([name, miou, nll, ece, spread(minutes, 1)])
    print_table(["", "mIoU % ↑", "NLL ↓", "ECE % ↓", "minutes"], rows)


def print_scores(results: Results, scores: dict[str, list[str]], tasks: list[str]) -> None:
    rows = []
    for name, keys in scores.items():
        for key in keys:
            row = [name, f"`{key.partition('/')[2]}`"]
            for task in tasks:
                values = [figures_of(task, result)[key] for result in results[name]]
                auroc = spread([value["auroc"] for value in values])
                if task == "errors":
                    row += [auroc, spread([value["aurc"] for value in values], 1, 4)]
                else:
                    ap = spread([value["ap"] for value in values])
                    fpr95 = spread([value["fpr95"] for value in values])
                    row.append(f"{auroc} / {ap} / {fpr95}")
            rows.append(row)
    head = ["", "score", "errors: AUROC % ↑", "AURC ↓"]
    for task in tasks[1:]:
        head.append(f"{task}: AUROC / AP / FPR95 %")
    print_table(head, rows)


def figures_of(task: str, result: dict) -> dict[str, dict]:
    """The figures of every score at a task: to find errors, or the anomalies of an OOD set."""
    if task == "errors":
        return result["uncertainty"]
    return result["ood"][task]


def gain(results: list[dict], keys: list[str], task: str) -> str:
    """The score of the highest mean AUROC among the free and among the distilled ones."""
    best = []
    for distilled in (False, True):
        candidates = {}
        for key in keys:
            if ("/dudes" in key) == distilled:
                figures = [figures_of(task, result)[key] for result in results]
                candidates[key] = [100 * figure["auroc"] for figure in figures]
        if candidates:
            best_key = max(candidates, key=lambda key: statistics.mean(candidates[key]))
            best.append((best_key, candidates[best_key]))
    cells = [f"`{key.partition('/')[2]}` {spread(values, 1)}" for key, values in best]
    if len(best) == 2:
        free = best[0][1]
        learned = best[1][1]
        differences = [after - before for before, after in zip(free, learned, strict=True)]
        cells[1] += f" ({spread(differences, 1)})"
    return " → ".join(cells)


# ------------------------------------------------------------------ command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="CamVid in the SegNet layout")
    parser.add_argument("--road-anomaly", type=Path, help="RoadAnomaly; without it, one set less")
    parser.add_argument("--out", type=Path, default=Path("study"), help="(default: study)")
    parser.add_argument("--seeds", type=int, default=3, help="students a variant (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="students trained side by side")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=(120, 160), metavar=("H", "W"))
    parser.add_argument(
        "--crop-size", type=int, nargs=2, metavar=("H", "W"), help="(default: the image's size)"
    )
    parser.add_argument("--device", default="auto")
    return parser


def main(args: argparse.Namespace) -> None:
    study = Study(**vars(args))
    # The commands run in another folder, so relative paths would not be found there.
    study.data = study.data.resolve()
    study.out = study.out.resolve()
    if study.road_anomaly:
        study.road_anomaly = study.road_anomaly.resolve()

    results = study.run()
    if study.study == "views":
        print_views(results)
    else:
        print_targets(results)

    protocols = []
    for of_variant in results.values():
        protocols += [result["protocol"] for result in of_variant]
    protocol = protocols[0]
    commits = sorted({each["commit"] for each in protocols})
    print(
        f"\nseeds 0..{study.seeds - 1}, {study.members} members, {study.epochs} epochs, "
        f"{protocol['network_input']}, {study.jobs} at a time, torch {protocol['torch']}, "
        f"{protocol['hardware']}, commit {', '.join(commits)}"
    )


if __name__ == "__main__":
    main(get_args_parser().parse_args())
