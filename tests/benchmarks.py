"""Benchmarks: python tests/benchmarks.py [loader teacher distill inference train metrics]

Not collected by pytest. Each section prints a table; without a name all of them run. Project and
published way run in one process and take turns; times are medians. Figures hold for one machine
and its state: compare only what one run prints.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import distill
import evaluate
import metrics as m
import train_ensemble
from model import MAX_STD, DeepLabV3, Ensemble, predictive_statistics, upsample

# ------------------------------------------------------------------ measuring


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


def run_once(candidates: dict, device: torch.device) -> tuple[dict, dict]:
    """What each candidate returns, and the megabytes by which the memory grew meanwhile."""
    results, memory = {}, {}
    for name, function in candidates.items():
        with evaluate.peak_memory(device) as peak:
            results[name] = function()
        memory[name] = peak[0]
    return results, memory


def take_turns(candidates: dict, device: torch.device, turns: int) -> dict[str, list[float]]:
    """Seconds of each of `turns` calls of every candidate, after one call to warm up."""
    spent = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, function in candidates.items():
            once = seconds(function, device)
            if turn:
                spent[name].append(once)
    return spent


def print_comparison(title, spent, reference, memory=None, agrees="") -> None:
    """Medians, the ratio to the candidate `reference`, spread, and peak memory."""
    rows = []
    for name, times in spent.items():
        median = statistics.median(times)
        ratio = statistics.median(spent[reference]) / median
        spread = f"{1000 * min(times):,.1f}-{1000 * max(times):,.1f}"
        held = [memory.get(name, "")] if memory else []
        rows.append([name, 1000 * median, spread, f"{ratio:.2f}x", *held])
    header = ["", "ms", f"of {len(times)}", "faster"] + (["peak MB"] if memory else [])
    print_table(title, header, rows)
    if agrees:
        print(agrees)


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    """First column to the left, the others to the right."""
    cells = [header] + [[x if isinstance(x, str) else f"{x:,.2f}" for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        rest = "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))
        print(f"{row[0]:<{widths[0]}}{rest}", flush=True)


# ------------------------------------------------------------------ loader


def write_cityscapes(root: Path, count: int) -> None:
    """Frames of 1024 x 2048 in the publisher's layout, as smooth and as noisy as photographs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        stem = f"train/city/city_{number:06d}_000000"
        smooth = Image.fromarray(rng.integers(0, 256, (16, 32, 3)).astype(np.uint8))
        pixels = np.asarray(smooth.resize((2048, 1024), Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8)
        ids = np.kron(rng.integers(0, 34, (16, 32)), np.ones((64, 64), int)).astype(np.uint8)
        for place, content in ((f"leftImg8bit/{stem}_leftImg8bit.png", pixels),
                               (f"gtFine/{stem}_gtFine_labelIds.png", ids)):  # fmt: skip
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(root / place)


def published_sample(image: Path, mask: Path, rng, crop: int):
    """As the paper's public loader does it: floats first, every label of the table in turn, the
    whole frame resized, padded on both sides, flipped, cropped last."""
    pixels = to_tensor(Image.open(image))
    labels = np.array(Image.open(mask))
    for raw in (*(i for i in range(34) if i not in data.CITYSCAPES_IDS), -1):
        labels[labels == raw] = 255
    for label, raw in enumerate(data.CITYSCAPES_IDS):
        labels[labels == raw] = label
    labels = torch.tensor(labels, dtype=torch.long)
    scale = rng.uniform(0.5, 1) if rng.random() < 0.5 else rng.uniform(1, 2)
    size = [int(scale * side) for side in labels.shape]
    pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
    labels = F.interpolate(labels[None, None].float(), size, mode="nearest")[0].long()
    rows, columns = (max(0, crop - side) for side in size)
    border = columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    pixels, labels = F.pad(pixels, border), F.pad(labels, border, value=255)
    if rng.random() < 0.5:
        pixels, labels = pixels.flip(-1), labels.flip(-1)
    top, left = (int(rng.integers(side - crop + 1)) for side in labels.shape[1:])
    place = slice(top, top + crop), slice(left, left + crop)
    return pixels[:, *place], labels[:, *place]


def bench_loader(args: argparse.Namespace) -> None:
    """A training sample of 768 x 768 from PNG frames of 1024 x 2048, by one thread, as in a process
    of a DataLoader. The mean of an epoch with equal scales: the published way's time goes with
    their square."""
    count, crop, stream, threads = 16, 768, [1, 2, 3], torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_cityscapes(Path(folder), count)
        plain, cached = (data.open_dataset("cityscapes", Path(folder), "train") for _ in range(2))
        data.keep_decoded(cached, Path(folder, "cache"))

        def published(key: tuple[int, int]):
            files, rng = plain.images[key[1]], np.random.default_rng([*stream, 0, *key])
            return published_sample(files, plain.masks[key[1]], rng, crop)

        ways = {"published": published}
        for name, dataset in {"from files": plain, "from --cache": cached}.items():
            ways[name] = data.TrainingViews(dataset, (crop, crop), (0.5, 2), stream).__getitem__
        spent, agree = {name: [] for name in ways}, True
        for epoch in range(9):
            times = dict.fromkeys(ways, 0.0)
            for index in range(count):
                samples = {}
                for name, way in ways.items():
                    begin = time.perf_counter()
                    samples[name] = way((epoch, index))
                    times[name] += (time.perf_counter() - begin) / count
                pairs = zip(samples["from files"], samples["from --cache"], strict=True)
                agree &= all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)
            for name in ways if epoch else ():  # the first one warms up
                spent[name].append(times[name])
        _, memory = run_once({name: lambda way=way: way((0, 0)) for name, way in ways.items()},
                             torch.device("cpu"))  # fmt: skip
    torch.set_num_threads(threads)
    print_comparison("loader: a sample of 768 x 768 from PNG of 1024 x 2048, one thread",
                     spent, "published", memory,
                     f"samples from files and from --cache are equal: {agree}")  # fmt: skip


# ------------------------------------------------------------------ teacher


def published_statistics(logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """All members stacked, softmax twice, the predicted class's std picked class by class."""
    stacked = torch.stack(logits)  # [M, B, C, H, W]
    probs = stacked.softmax(dim=2).mean(dim=0)
    std = stacked.softmax(dim=2).std(dim=0)
    prediction, u = probs.argmax(dim=1), torch.zeros_like(probs[:, 0])
    for c in range(probs.shape[1]):
        u = torch.where(prediction == c, std[:, c], u)
    return probs, u


def bench_teacher(args: argparse.Namespace) -> None:
    """Mean and predictive uncertainty of 10 members' logits, one crop of 768 x 768, 19 classes."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    logits = [4 * torch.randn(1, 19, 768, 768, device=device, generator=generator)
              for _ in range(10)]  # fmt: skip
    ways = {"published": lambda: published_statistics(logits),
            "project": lambda: predictive_statistics(iter(logits))}  # fmt: skip
    spent = take_turns(ways, device, 5)
    results, memory = run_once(ways, device)
    (probs, u), (mean, std, _) = results.values()
    same = probs.argmax(dim=1) == mean.argmax(dim=1)  # but for rounding, where two classes tie
    difference = max((probs - mean).abs().max().item(), (u - std)[same].abs().max().item())
    share = memory["project"] / memory["published"]
    print_comparison("teacher: statistics of 10 members, 768 x 768, 19 classes", spent, "published",
                     memory, f"peak memory above the inputs {share:.2f} of the published way's; "
                     f"largest difference {difference:.1e}, {int((~same).sum())} ties apart")


# ------------------------------------------------------------------ distill


class Distillation:
    """A student of 10 resnet18 members on 64 images of 120 x 160 and 16 to validate on."""

    def __init__(self, views: int, folder: Path, device: torch.device):
        torch.manual_seed(0)
        self.device, self.epoch = device, 0
        members = [DeepLabV3("resnet18", 11) for _ in range(10)]
        self.teacher = Ensemble(members).to(device)
        self.student = DeepLabV3("resnet18", 11, ("std",)).to(device)
        self.scenes = data.SyntheticScenes("train", (120, 160))
        self.scenes.names = self.scenes.names[:64]
        self.val = data.SyntheticScenes("val", (120, 160))
        self.val.names = self.val.names[:16]
        sampled = data.TrainingViews(self.scenes, (120, 160), (0.5, 2.0), [1, 2, 3], views)
        self.loader = data.training_loader(sampled, 8, 0, device)
        self.val_loader = data.evaluation_loader(self.val, 8, 0, device)
        self.args = argparse.Namespace(device=str(device), amp="off", accumulate=1, epochs=40,
                                       warmup=0, lr=0.05, head_lr_mult=1.0,
                                       weight_decay=5e-4)  # fmt: skip
        self.optimizer = train_ensemble.build_optimizer(self.student, self.args)
        largest = torch.full((1, 1, 1), MAX_STD, device=device)
        self.maps, self.cache = distill.teacher_maps(self.teacher, ["std"], "off"), None
        if views:
            shape, kept = (views, 64, 1, 120, 160), (1, 16, 1, *data.SYNTHETIC_SIZE)
            self.cache = distill.TargetCache(folder / "train.npy", shape, largest, {})
            self.kept = distill.TargetCache(folder / "val.npy", kept, largest, {})

    def run(self, loss_fn) -> None:
        self.student.train()
        self.loader.batch_sampler.epoch = self.epoch
        at = {"epoch": self.epoch, "batch": 0, "seen": 0, "sums": {}, "recent": []}
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        for _ in train_ensemble.train_steps(self.student, loss_fn, self.loader, self.optimizer,
                                            scaler, self.args, at):  # fmt: skip
            pass
        self.epoch += 1

    def val_target(self, images, size, index) -> torch.Tensor:
        def compute() -> torch.Tensor:
            return self.maps(images, size, [0])

        return self.kept.look_up(torch.zeros_like(index), index, compute, size)[:, 0]

    def project(self) -> None:
        """An epoch as distill.py runs it."""
        self.run(distill.distillation_loss(
            lambda batch: distill.teacher_target(self.maps, batch, self.cache), ["std"], 1.0))
        evaluate.validate(self.student, self.val_loader, self.device, "off", self.val_target)

    @torch.inference_mode()
    def stacked(self, images: torch.Tensor, size=None) -> torch.Tensor:
        logits = [member(images, size).logits for member in self.teacher.members]
        return published_statistics(logits)[1]

    def published(self) -> None:
        """An epoch with a stacked teacher online, which also sees every validation image."""

        def loss_fn(network: nn.Module, batch):
            target = self.stacked(batch.images).clone()
            prediction = network(batch.images)
            ce = train_ensemble.cross_entropy(prediction.logits, batch.labels)
            valid = batch.labels != data.IGNORED
            return ce + distill.rmsle(prediction.uncertainty[:, 0], target, valid), {}

        self.run(loss_fn)
        evaluate.validate(self.student, self.val_loader, self.device, "off",
                          lambda images, size, index: self.stacked(images, size))  # fmt: skip


def bench_distill(args: argparse.Namespace) -> None:
    """Epochs of distillation: the published way, a view that is new, and one whose targets are
    kept; what they add up to over 40 and 200 epochs at the default --views."""
    device, views = torch.device(args.device), train_ensemble.RECIPES["camvid"]["views"]
    with tempfile.TemporaryDirectory() as folder:
        published = Distillation(0, Path(folder), device)
        project = Distillation(views, Path(folder), device)
        spent = {"published": [], "new view": [], "kept targets": []}
        for turn in range(4):
            once = seconds(published.published, device)
            project.epoch = turn  # a view that was not met yet
            fresh = seconds(project.project, device)
            project.epoch = views + turn  # and again
            kept = seconds(project.project, device)
            if turn:
                for name, value in zip(spent, (once, fresh, kept), strict=True):
                    spent[name].append(value)
            else:
                first = fresh  # with the one pass of the teacher over the validation images
        batch = next(iter(project.loader))
        with torch.inference_mode():
            online = project.stacked(torch.where(batch.flip[:, None, None, None],
                                                 batch.images.flip(-1), batch.images).to(device))
        kept = distill.teacher_target(project.maps, batch, project.cache)[:, 0]
        online = torch.where(batch.flip[:, None, None].to(device), online.flip(-1), online)
        steps = (online.sqrt() - kept.sqrt()).abs().max().item() * 254 / MAX_STD**0.5
        project.epoch = views
        _, memory = run_once({"published": published.published, "kept targets": project.project},
                             device)  # fmt: skip
    print_comparison("distill: an epoch, 64 images of 120 x 160, 10 members", spent, "published",
                     memory, f"kept targets are within {steps:.2f} steps of 254 of the published "
                     "ones")  # fmt: skip
    old, new, kept = (statistics.median(times) for times in spent.values())
    for epochs in (40, 200):
        total = first + (views - 1) * new + (epochs - views) * kept
        print(f"{epochs} epochs, --views {views}: {old * epochs:,.0f} s published, {total:,.0f} s "
              f"here, {old * epochs / total:.2f}x faster (from these medians)")


# ------------------------------------------------------------------ inference and training


def bench_inference(args: argparse.Namespace) -> None:
    """A member, the teacher of 10 and the student of four measures, as --benchmark has them."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    size, batch, backbone = ((768, 768), 16, "resnet101") if cuda else ((256, 512), 1, "resnet18")
    torch.manual_seed(0)
    members = [DeepLabV3(backbone, 19).eval() for _ in range(10)]
    student = DeepLabV3(backbone, 19, evaluate.MEASURES).eval()
    networks = {"student": student, "teacher": Ensemble(members)}
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last)
    settings = argparse.Namespace(device=args.device, batch_size=batch, compile=True,
                                  amp=evaluate.choose_amp("auto", device))  # fmt: skip
    image = torch.zeros(3, *size, dtype=torch.uint8)
    figures = evaluate.benchmark(networks, image, settings)
    base, keys = figures["member"], ("ms_per_image", "compiled_ms_per_image")
    rows = []
    for name, f in figures.items():
        times = [x for key in keys for x in (f[key], f"{f[key] / base[key]:.3f}")]
        rows.append([name, f["parameters"] / 1e6, *times, f["peak_memory_mb"]])
    print_table(f"inference: {batch} of {size[0]} x {size[1]}, {backbone}, 19 classes",
                ["", "M parameters", "ms per image", "of a member", "compiled", "of a member",
                 "peak MB"], rows)  # fmt: skip
    if cuda:
        print_share("a forward pass", base["compiled_ms_per_image"] / 1000, 1.9)


def bench_train(args: argparse.Namespace) -> None:
    """A student's training step as it is configured on this device, and the alternatives."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    size, batch, backbone = ((768, 768), 16, "resnet101") if cuda else ((180, 240), 4, "resnet18")
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 19, (batch, *size), dtype=torch.uint8, device=device)
    target = torch.rand(batch, *size, device=device) / 2

    def step(layout, amp, compiled, fused, upsample=upsample):
        torch.manual_seed(0)
        network = DeepLabV3(backbone, 19, ("std",)).to(device, memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=fused)
        forward = torch.compile(network) if compiled else network

        def once() -> float:
            torch.manual_seed(0)  # dropout
            with mock.patch("model.upsample", upsample), evaluate.autocast(device, amp):
                logits, u = forward(images)
            loss = train_ensemble.cross_entropy(logits, labels)
            loss = loss + distill.rmsle(u[:, 0], target, labels != data.IGNORED)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return once

    def interpolate(x, size):
        return F.interpolate(x, size=size, mode="bilinear")

    last, first = torch.channels_last, torch.contiguous_format
    amp = evaluate.choose_amp("auto", device)
    ways = {"published": step(first, "fp16" if cuda else "off", False, False, interpolate)}
    if cuda:
        ways |= {"project": step(last, amp, True, True), "eager": step(last, amp, False, True),
                 "contiguous": step(first, amp, True, True),
                 "F.interpolate": step(last, amp, True, True, interpolate)}  # fmt: skip
    else:
        ways |= {"project": step(first, amp, False, True),
                 "float32": step(first, "off", False, True),
                 "channels_last": step(last, amp, False, True),
                 "compiled": step(first, amp, True, True),
                 "F.interpolate": step(first, amp, False, True, interpolate)}  # fmt: skip
    losses, memory = run_once(ways, device)
    gap = max(abs(loss / losses["published"] - 1) for loss in losses.values()).item()
    spent = take_turns(ways, device, 20 if cuda else 9)
    print_comparison(f"train: a step of {batch} images of {size[0]} x {size[1]}, {backbone}, {amp}",
                     spent, "published", memory, f"the first step's losses differ by {gap:.1e} at "
                     "most, relative")  # fmt: skip
    if cuda:
        print_share("a training step", statistics.median(spent["project"]) / batch, 6.2)
        print_ceilings(device)


def print_share(what: str, per_image: float, floor: float) -> None:
    """Against the arithmetic and unavoidable memory traffic of ResNet-101 at 768 x 768."""
    print(f"{what}: {1000 * per_image:.2f} ms an image, {floor / 1000 / per_image:.0%} of the "
          f"floor of {floor} ms (H200)")  # fmt: skip


def print_ceilings(device: torch.device) -> None:
    """What the device reaches itself: a large bf16 product and a large copy."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = seconds(lambda: a @ a, device, 20, 5)
    big = torch.empty(2**30, dtype=torch.uint8, device=device)
    copy = seconds(big.clone, device, 20, 5)
    print(f"{torch.cuda.get_device_name(device)}: {2 * 8192**3 / product / 1e12:.0f} TFLOP/s bf16, "
          f"{2 * 2**30 / copy / 1e12:.2f} TB/s")


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
    """One 1024 x 2048 frame through DeepLabv3-ResNet101: bf16 on CUDA, float32 on a CPU."""
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


SECTIONS = {"loader": bench_loader, "teacher": bench_teacher, "distill": bench_distill,
            "inference": bench_inference, "train": bench_train, "metrics": bench_metrics}


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
