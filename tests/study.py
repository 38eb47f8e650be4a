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
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

HELD_OUT = ("bicyclist", "pedestrian")
STD, ALL = ("--targets", "std"), ("--targets", "std", "entropy", "mutual_information", "msp")
VARIANTS = {
    "std alone": STD,
    "all targets": ALL,
    "+ probabilities": (*ALL, "--distill-probs", "1"),
    "+ strong views": (*ALL, "--distill-probs", "1", "--strong-views"),
    "+ extra images": (*ALL, "--distill-probs", "1", "--strong-views", "--extra", "extra"),
}
STUDIES = {"views": ("--views 0", "--views 5"), "targets": tuple(VARIANTS)}


def call(args: argparse.Namespace, script: str, *flags) -> None:
    """One of the three commands, in the study's folder; its failure ends the study."""
    words = [sys.executable, str(ROOT / script), "--device", args.device, *map(str, flags)]
    print("$", " ".join([script, *words[2:]]), flush=True)
    if code := subprocess.run(words, cwd=args.out).returncode:
        sys.exit(code)


def write_extra(folder: Path, count: int = 240) -> None:
    """Drawn street scenes without the classes that are held out, as the images without labels."""
    if folder.exists():
        return
    held_out = [*map([*data.CAMVID_CLASSES].index, HELD_OUT)]
    unfinished = folder.with_suffix(".tmp")
    unfinished.mkdir(exist_ok=True)
    number = 0
    while count:
        image, labels = data.draw_scene(np.random.default_rng([3, number]), data.SYNTHETIC_SIZE)
        if not np.isin(labels, held_out).any():
            Image.fromarray(image).save(unfinished / f"{number:05d}.png")
            count -= 1
        number += 1
    unfinished.rename(folder)


def measure(args: argparse.Namespace, name: str, checkpoint: Path, *flags) -> dict:
    """metrics.json of an evaluation, which runs if it is not there or older than `checkpoint`."""
    road = "-road" if args.road_anomaly else ""  # a set more is another evaluation
    folder = Path("results", f"{args.study}{road}-{name}")
    file = args.out / folder / "metrics.json"
    if not file.exists() or file.stat().st_mtime < (args.out / checkpoint).stat().st_mtime:
        call(args, "evaluate.py", *flags, "--panels", 0, "--batch-size", 8, "--out", folder)
    return json.loads(file.read_text())


def run(args: argparse.Namespace) -> dict[str, list[dict]]:
    """The results of the teacher and, by variant, of each seed's student."""
    call(args, "train_ensemble.py", "--members", args.members, "--dataset", "camvid", "--data",
         args.data, "--backbone", args.backbone, "--weights", "none", "--image-size",
         *args.image_size, "--crop-size", *(args.crop_size or args.image_size),
         "--epochs", args.epochs, "--lr", 0.1, "--scale", 0.75, 1.25,
         "--hold-out", *HELD_OUT, "--cache", "cache", "--out", "members")  # fmt: skip
    teacher = ("--teacher", "members")
    if args.study == "targets":
        write_extra(args.out / "extra")
        road = [f"roadanomaly:{args.road_anomaly}"] if args.road_anomaly else []
        ood = ("--ood", "held-out", "pasted", *road)
        first, *others = (Path("members", f"member_{n:02d}.pt") for n in range(args.members))
        whole = measure(args, "teacher", first, *teacher, *ood)
        # of the teacher that is named, the first is the member which is measured
        others = [measure(args, other.stem, other, "--teacher", other, first, *ood)
                  for other in others[: args.seeds - 1]]  # fmt: skip
        more, found = ood, {"member": [whole, *others], "teacher": [whole]}
    else:
        found, more = {}, teacher

    def student(seed: int, variant: str) -> dict:
        flags = VARIANTS.get(variant, (*STD, *variant.split()))
        name = "".join(c for c in variant if c.isalnum()) + f"-{seed}"
        path = Path("students", f"{name}.pt")
        call(args, "distill.py", *teacher, "--seed", seed, *flags, "--cache", "cache",
             "--out", path)  # fmt: skip
        results = measure(args, name, path, "--student", path, *more)
        log = (args.out / path).with_suffix(".jsonl").read_text().splitlines()
        return results | {"minutes": sum(json.loads(line)["seconds"] for line in log) / 60}

    if args.jobs > 1:  # students share the cores out
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [(variant, pool.submit(student, seed, variant))
                   for seed in range(args.seeds) for variant in STUDIES[args.study]]  # fmt: skip
        try:
            for variant, result in waiting:
                found.setdefault(variant, []).append(result.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


# ------------------------------------------------------------------ tables


def spread(values: list[float], factor: float = 100, digits: int = 1) -> str:
    """Mean +- standard deviation."""
    values = [factor * value for value in values if value is not None]
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_views(found: dict[str, list[dict]]) -> None:
    """Each --views against --views 0, seed by seed."""
    columns = {
        "mIoU %": lambda r: r["segmentation"]["student"]["miou"],
        "NLL": lambda r: r["segmentation"]["student"]["nll"],
        "Pearson": lambda r: r["fidelity"]["pearson"],
        "error AUROC %": lambda r: r["uncertainty"]["student/dudes"]["auroc"],
    }
    rows = []
    for variant in STUDIES["views"]:
        row = [f"`{variant}`"]
        for name, figure in columns.items():
            factor, digits = (100, 2) if "%" in name else (1, 3)
            values = [figure(result) for result in found[variant]]
            base = [figure(result) for result in found["--views 0"]]
            paired = [a - b for a, b in zip(values, base, strict=True)]
            row += [spread(values, factor, digits), spread(paired, factor, digits)]
        rows.append([*row, spread([result["minutes"] for result in found[variant]], 1)])
    head = [part for name in columns for part in (name, "difference")]
    table(["", *head, "minutes"], rows)


def print_targets(found: dict[str, list[dict]]) -> None:
    """Segmentation, what the distilled scores add to the free ones, then every score."""
    kinds = {"member": "member", "teacher": "teacher"}
    kinds |= dict.fromkeys(STUDIES["targets"], "student")
    rows = []
    for name, kind in kinds.items():
        part = [result["segmentation"][kind] for result in found[name]]
        minutes = [result["minutes"] for result in found[name] if "minutes" in result]
        rows.append([name, spread([p["miou"] for p in part]),
                     spread([p["nll"] for p in part], 1, 3),
                     spread([p["ece"] for p in part]), spread(minutes, 1)])  # fmt: skip
    table(["", "mIoU % ↑", "NLL ↓", "ECE % ↓", "minutes"], rows)

    tasks = {"errors": lambda result: result["uncertainty"]}
    for ood in found["teacher"][0]["ood"]:
        tasks[ood] = lambda result, ood=ood: result["ood"][ood]
    scores = {name: [key for key in found[name][0]["uncertainty"] if key.startswith(kind + "/")]
              for name, kind in kinds.items()}  # fmt: skip
    rows = [[name, *(gain(found[name], scores[name], figures) for figures in tasks.values())]
            for name in kinds]  # fmt: skip
    what = "AUROC %: best free → best distilled score, chosen on these figures (difference)"
    table([what, *tasks], rows)

    rows = []
    for name in kinds:
        for key in scores[name]:
            row = [name, f"`{key.partition('/')[2]}`"]
            for task, figures in tasks.items():
                values = [figures(result)[key] for result in found[name]]
                keys = ("auroc",) if task == "errors" else ("auroc", "ap", "fpr95")
                row.append(" / ".join(spread([v[k] for v in values]) for k in keys))
                if task == "errors":
                    row.append(spread([v["aurc"] for v in values], 1, 4))
            rows.append(row)
    sets = [f"{task}: AUROC / AP / FPR95 %" for task in tasks if task != "errors"]
    table(["", "score", "errors: AUROC % ↑", "AURC ↓", *sets], rows)


def gain(results: list[dict], keys: list[str], figures) -> str:
    """The score of the highest mean AUROC among the free and among the distilled ones."""
    best = []
    for distilled in (False, True):
        among = {key: [100 * figures(result)[key]["auroc"] for result in results]
                 for key in keys if ("/dudes" in key) == distilled}  # fmt: skip
        if among:
            best.append(max(among.items(), key=lambda item: statistics.mean(item[1])))
    cells = [f"`{key.partition('/')[2]}` {spread(values, 1)}" for key, values in best]
    if len(best) == 2:
        difference = [b - a for a, b in zip(best[0][1], best[1][1], strict=True)]
        cells[1] += f" ({spread(difference, 1)})"
    return " → ".join(cells)


def main(args: argparse.Namespace) -> None:
    for name in ("data", "road_anomaly", "out"):  # the commands run in another folder
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "students").mkdir(exist_ok=True)
    found = run(args)
    {"views": print_views, "targets": print_targets}[args.study](found)
    protocols = [result["protocol"] for results in found.values() for result in results]
    protocol, commits = protocols[0], sorted({p["commit"] for p in protocols})
    print(f"\nseeds 0..{args.seeds - 1}, {args.members} members, {args.epochs} epochs, "
          f"{protocol['network_input']}, {args.jobs} at a time, torch {protocol['torch']}, "
          f"{protocol['hardware']}, commit {', '.join(commits)}")  # fmt: skip


if __name__ == "__main__":
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
    parser.add_argument("--crop-size", type=int, nargs=2, metavar=("H", "W"),
                        help="(default: the image's size)")  # fmt: skip
    parser.add_argument("--device", default="auto")
    main(parser.parse_args())
