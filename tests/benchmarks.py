"""Benchmarks, by section: python tests/benchmarks.py [metrics ...] --device cuda

Not collected by pytest. Each section prints a table; without a name all of them run. Figures hold
for one machine and its state: compare only what one run prints.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metrics as m


def seconds(function, device: torch.device, repeats: int = 1, warmup: int = 0) -> float:
    """Mean wall-clock seconds of a call, the device's work included."""
    for _ in range(warmup):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    """First column to the left, the others to the right."""
    cells = [header] + [[x if isinstance(x, str) else f"{x:,.2f}" for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        rest = "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))
        print(f"{row[0]:<{widths[0]}}{rest}", flush=True)


# ------------------------------------------------------------------ metrics


def metrics_frame(seed: int, classes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A synthetic 1024 x 2048 frame: mostly right, with void, two uncertainties."""
    generator = torch.Generator(device).manual_seed(seed)
    coarse = torch.randn(1, classes, 32, 64, device=device, generator=generator) * 6
    logits = torch.nn.functional.interpolate(coarse, (1024, 2048), mode="bilinear")
    probs = logits.softmax(1)
    noise = torch.rand(1, 1024, 2048, device=device, generator=generator)
    labels = probs.max(1).indices.to(torch.uint8)
    labels[noise < 0.1] = 3
    labels[noise > 0.9] = 255
    uncertainty = m.max_softmax(probs)
    return {
        "probs": probs,
        "labels": labels,
        "prediction": probs.max(1).indices,
        "student": uncertainty,
        "teacher": uncertainty * (0.5 + noise),
    }


def forward_seconds(classes: int, device: torch.device) -> float:
    """One 1024 x 2048 frame through DeepLabv3-ResNet101, as evaluation runs it."""
    from torchvision.models.segmentation import deeplabv3_resnet101

    model = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=classes)
    model = model.to(device, memory_format=torch.channels_last).eval()
    image = torch.rand(1, 3, 1024, 2048, device=device)
    image = image.to(memory_format=torch.channels_last)
    on_cuda = device.type == "cuda"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
        return seconds(
            lambda: model(image)["out"], device, repeats=10 if on_cuda else 1, warmup=3 * on_cuda
        )


def bench_metrics(args: argparse.Namespace) -> None:
    """All accumulators over --images frames, against the forward pass of the same frame."""
    classes, device = 19, torch.device(args.device)
    frames = [metrics_frame(seed, classes, device) for seed in range(2)]
    updates = {
        "ConfusionMatrix": (m.ConfusionMatrix(classes), ("prediction", "labels")),
        "ProperScores": (m.ProperScores(), ("probs", "labels")),
        "CalibrationError": (m.CalibrationError(), ("probs", "labels", "prediction")),
        "Detection": (m.Detection(), ("student", "wrong", "valid")),
        "SelectivePrediction": (m.SelectivePrediction(), ("student", "correct", "valid")),
        "RejectionCurve": (m.RejectionCurve(classes), ("student", "prediction", "labels")),
        "ClassUncertainty": (m.ClassUncertainty(classes), ("student", "prediction", "labels")),
        "Fidelity": (m.Fidelity(), ("student", "teacher", "valid")),
    }
    for frame in frames:
        frame["correct"] = frame["prediction"] == frame["labels"]
        frame["wrong"], frame["valid"] = ~frame["correct"], frame["labels"] < classes
    rows, total = [], [0.0, 0.0, 0.0, 0.0]
    for name, (accumulator, keys) in updates.items():
        accumulator.update(*(frames[0][key] for key in keys))  # warm-up: also moves the state
        accumulator.reset()
        batches = [[frame[key] for key in keys] for frame in frames]

        def run(accumulator=accumulator, batches=batches):
            for i in range(args.images):
                accumulator.update(*batches[i % len(batches)])

        spent = seconds(run, device)
        compute = seconds(accumulator.compute, device)
        size = sum(x.nbytes for x in accumulator.state.values())
        row = [spent, 1000 * spent / args.images, 1000 * compute, size / 1e6]
        total = [a + b for a, b in zip(total, row, strict=True)]
        rows.append([name, *row])
    title = f"metrics: {args.images} frames of 1024 x 2048, {classes} classes, {device}"
    header = ["accumulator", "seconds", "ms per image", "ms compute", "MB of state"]
    print_table(title, header, rows + [["all", *total]])
    forward = forward_seconds(classes, device)
    print(
        f"DeepLabv3-ResNet101 forward {1000 * forward:,.1f} ms; "
        f"all metrics cost {total[1] / 1000 / forward:.3f} of it (target: below 0.25)"
    )


SECTIONS = {"metrics": bench_metrics}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--images", type=int, default=500, help="frames (metrics): time grows so")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    return parser


def main(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {args.device}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    parser = get_args_parser()
    arguments = parser.parse_args()
    for section in arguments.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section}; there are {', '.join(SECTIONS)}")
    if arguments.images < 1:
        parser.error(f"--images {arguments.images}: at least 1")
    main(arguments)
