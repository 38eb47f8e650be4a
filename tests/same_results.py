"""Do two checkouts of the project give the same results, bit for bit?

    git worktree add ../before REVISION
    python tests/same_results.py --before ../before --after .

Trains two members and three students on the drawn scenes and evaluates them, in each checkout, on
the CPU with one thread, and compares weights, teacher targets, score maps, panels and
metrics.json. Prints "same", or what differs (exit code 1). Takes a few minutes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# What a result is known by, not what it depends on.
NOT_COMPARED = ("commit", "teacher", "student", "seconds", "teacher_identity")

MEMBERS = ("--members", "2", "--epochs", "1", "--parallel", "1")
MEMBERS += ("--scale", "0.75", "1.5", "--crop-size", "40", "56")
STUDENTS = {
    "student": ("--epochs", "1"),
    "online": ("--epochs", "1", "--views", "0", "--targets", "std", "--head", "paper"),
    "accumulated": ("--epochs", "2", "--views", "2", "--targets", "std", "entropy")
    + ("--accumulate", "2", "--batch-size", "8", "--select", "best"),
}
EVALUATIONS = {
    "results": ("--student", "ckpts/student.pt", "--teacher", "ckpts", "--panels", "2")
    + ("--ood", "synthetic", "pasted", "--save-scores", "scores"),
    "results-mc": ("--teacher", "ckpts/member_00.pt", "--mc-samples", "3", "--panels", "0"),
}


def start(checkout: Path, folder: Path, script: str, *flags: str) -> subprocess.Popen:
    """One of the checkout's three commands, in `folder`; what it prints goes to log.txt there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(checkout / script), "--device", "cpu", *flags]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait for a command; its failure ends the comparison."""
    if process.wait() != 0:
        sys.exit((folder / "log.txt").read_text()[-3000:])


def run(checkout: Path, folder: Path) -> None:
    """Members, students and evaluations of one checkout, written to `folder`."""
    finish(start(checkout, folder, "train_ensemble.py", *MEMBERS), folder)
    for name, flags in STUDENTS.items():
        out = ("--teacher", "ckpts", "--out", f"ckpts/{name}.pt")
        process = start(checkout, folder, "distill.py", *out, *flags)
        # A finished training removes its targets; a second name for the file keeps it.
        targets = folder / f"ckpts/{name}.targets.npy"
        while process.poll() is None:
            if targets.exists() and not (folder / targets.name).exists():
                os.link(targets, folder / targets.name)
            time.sleep(0.05)
        finish(process, folder)
    for out, flags in EVALUATIONS.items():
        finish(start(checkout, folder, "evaluate.py", *flags, "--out", out), folder)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def leaves(name: str, value) -> dict[str, str]:
    """The values of nested dictionaries as {path: text}."""
    if not isinstance(value, dict):
        return {name: json.dumps(value)}
    flat = {}
    for key, inner in value.items():
        if key not in NOT_COMPARED:
            flat |= leaves(f"{name}/{key}", inner)
    return flat


def collect(folder: Path) -> dict[str, str]:
    """Everything that is compared, as {name: text or digest}."""
    results = {}
    for path in sorted((folder / "ckpts").glob("*.pt")):
        checkpoint = torch.load(path, weights_only=True)
        weights = [tensor.contiguous().numpy().tobytes() for tensor in checkpoint["model"].values()]
        results[f"{path.name} weights"] = digest(b"".join(weights))
        for part in ("args", "config", "metrics"):
            results |= leaves(f"{path.name} {part}", checkpoint[part])
    for path in sorted((folder / "ckpts").glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            results |= leaves(f"{path.name} {number}", json.loads(line))
    for pattern in ("*.targets.npy", "scores/*/*/*.npy", "results*/panels/*.png"):
        for path in sorted(folder.glob(pattern)):
            results[str(path.relative_to(folder))] = digest(path.read_bytes())
    for path in sorted(folder.glob("results*/metrics.json")):
        results |= leaves(str(path.relative_to(folder)), json.loads(path.read_text()))
    return results


def main(args: argparse.Namespace) -> None:
    results = []
    for checkout in (args.before, args.after):
        with tempfile.TemporaryDirectory() as folder:
            run(checkout.resolve(), Path(folder))
            results.append(collect(Path(folder)))
    before, after = results
    different = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            different.append(name)
            print(f"{name}: {before.get(name)} -> {after.get(name)}"[:300])
    if different:
        sys.exit(f"{len(different)} of {len(before.keys() | after.keys())} things differ")
    print(f"same: {len(before)} things")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--after", type=Path, required=True, metavar="CHECKOUT")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
