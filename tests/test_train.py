"""The training loop: schedule, loss, reproducibility, resuming, what is refused; and the distillation."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small, write_folder

import distill
import train_ensemble
from data import IGNORED, VOID, Sample
from model import MAX_STD, DeepLabV3, Ensemble, read_checkpoint

ROOT = Path(__file__).parent.parent


def weights(path):
    return torch.cat([v.flatten().double() for v in read_checkpoint(path)["model"].values()])


# ------------------------------------------------------------------------------ pieces


def test_schedule_at_both_ends():
    factor = [train_ensemble.lr_factor(t, 10, 0) for t in range(10)]
    assert factor[0] == 1 and factor[9] == pytest.approx(0.1**0.9) and factor == sorted(factor)[::-1]
    warm = [train_ensemble.lr_factor(t, 100, 10) for t in range(100)]
    assert warm[0] == pytest.approx(0.1) and warm[9] == pytest.approx((1 - 9 / 100) ** 0.9) and warm[99] > 0


def test_streams_share_nothing():
    streams = [tuple(train_ensemble.stream(seed, role, member))
               for seed in range(3) for role in ("member", "student") for member in range(5)]  # fmt: skip
    assert len({value for values in streams for value in values}) == 4 * len(streams)


def test_cross_entropy_counts_labelled_pixels_alone():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    labels[0, 0], labels[1, 1] = VOID, IGNORED
    valid = labels < 3
    expected = -logits.float().log_softmax(1).gather(1, labels.clamp(max=2).long()[:, None])[:, 0][valid].mean()
    assert train_ensemble.cross_entropy(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = torch.full_like(labels, VOID)
    assert train_ensemble.cross_entropy(logits, nothing).item() == 0  # a batch of void is no NaN


def test_rmsle_is_the_papers():
    rng = np.random.default_rng(0)
    student, teacher, valid = rng.random((2, 4, 5)), rng.random((2, 4, 5)), rng.random((2, 4, 5)) < 0.7
    expected = np.sqrt(np.mean((np.log(1 + student) - np.log(1 + teacher))[valid] ** 2))
    got = distill.rmsle(*(torch.from_numpy(x) for x in (student, teacher, valid)))
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_rmsle_has_a_gradient_at_zero_error_and_without_pixels():
    for valid in (torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)):
        student = torch.full((1, 2, 2), 0.3, requires_grad=True)
        distill.rmsle(student, torch.full((1, 2, 2), 0.3), valid).backward()
        assert torch.isfinite(student.grad).all()


def test_targets_are_stored_to_half_a_step():
    std = torch.linspace(0, MAX_STD, 10001)
    stored = distill.quantise(std)
    assert stored.max() == 254  # 255 is "missing"
    steps = (254 * (std / MAX_STD).sqrt() - stored).abs()
    assert steps.max() <= 0.5 + 1e-3
    torch.testing.assert_close(distill.quantise(distill.dequantise(stored)), stored)


def batch_of(flip):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8)
    flips = torch.tensor([flip, False])
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    return Sample(images, torch.zeros(2, 32, 48, dtype=torch.uint8), torch.tensor([0, 1]), torch.tensor([0, 0]), flips)


def test_the_teacher_sees_unflipped_views_and_stored_targets_are_the_same(tmp_path):
    torch.manual_seed(0)
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(2)])
    online = distill.teacher_target(teacher, batch_of(False), None, "off")
    flipped = distill.teacher_target(teacher, batch_of(True), None, "off")
    assert torch.equal(flipped[0], online[0].flip(-1)) and torch.equal(flipped[1], online[1])

    cache = distill.TargetCache(tmp_path / "t.npy", (1, 2, 32, 48), {"key": 1})
    first = distill.teacher_target(teacher, batch_of(False), cache, "off")
    assert torch.equal(first, distill.dequantise(distill.quantise(online)))  # learned from as it is stored
    cache.targets[0, 1, 3] = distill.MISSING  # a write that was cut short
    again = distill.TargetCache(tmp_path / "t.npy", (1, 2, 32, 48), {"key": 1})
    assert again.read(batch_of(False)) is None
    assert torch.equal(distill.teacher_target(teacher, batch_of(False), again, "off"), first)
    teacher.members = None  # from now on the disk alone
    assert torch.equal(distill.teacher_target(None, batch_of(True), again, "off")[0], first[0].flip(-1))
    other = distill.TargetCache(tmp_path / "t.npy", (1, 2, 32, 48), {"key": 2})
    assert (other.targets == distill.MISSING).all()


def test_padding_enters_no_uncertainty_loss_but_void_does():
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(2)])
    student = DeepLabV3("resnet18", 3, ("std",)).eval()
    loss_fn = distill.distillation_loss(teacher, None, 1.0, "off")
    batch = batch_of(False)
    batch.labels[:, :16], batch.labels[:, 16:] = VOID, IGNORED
    _, logs = loss_fn(student, batch)
    target = distill.teacher_target(teacher, batch, None, "off")[:, :16]
    mine = student(batch.images).uncertainty[:, 0, :16]
    expected = ((mine.log1p() - target.log1p()) ** 2).mean().sqrt()
    assert logs["ce"] == 0 and logs["rmsle"].item() == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------ runs


def test_the_same_command_gives_the_same_bits_with_any_workers(folder, command, tmp_path):
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        code, *_ = command("train", *small(folder), "--members", 1, "--workers", workers, "--out", tmp_path / name)
        assert code == 0
    a, b, c = (weights(tmp_path / name / "member_00.pt") for name in "abc")
    assert torch.equal(a, b) and torch.equal(a, c)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["member_00.jsonl", "member_00.pt"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "member_00.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and all(0 <= line["miou"] <= 1 for line in lines)


def test_members_differ_and_finished_ones_are_kept(folder, command, tmp_path):
    flags = [*small(folder, "--epochs", 1), "--out", tmp_path / "c"]
    assert command("train", *flags, "--members", 1)[0] == 0
    before = (tmp_path / "c" / "member_00.pt").stat().st_mtime_ns
    code, out, _ = command("train", *flags, "--members", 2)
    assert code == 0 and "member_00.pt: finished" in out
    assert (tmp_path / "c" / "member_00.pt").stat().st_mtime_ns == before
    assert not torch.equal(weights(tmp_path / "c" / "member_00.pt"), weights(tmp_path / "c" / "member_01.pt"))
    code, _, err = command("train", *flags, "--members", 2, "--lr", 0.5)
    assert code == 2 and "lr = 0.05, this command says 0.5" in err and err.count("\n") == 1


def test_accumulated_batches_make_one_step():
    logits = []

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))



    for accumulate in (1, 2):
        toy = Toy()
        optimizer = torch.optim.SGD([{"params": toy.parameters(), "multiple": 1.0}], lr=1.0)
        args = argparse.Namespace(device="cpu", amp="off", accumulate=accumulate, epochs=1, lr=1.0, warmup=0)
        at = {"epoch": 0, "batch": 0, "seen": 0, "sums": {}, "recent": []}
        sample = Sample(*(torch.zeros(2, 1) for _ in Sample._fields))

        class Loader(list):
            batch_sampler, dataset = [0] * 3, argparse.Namespace(dataset=None)

        steps = list(train_ensemble.train_steps(
            toy, lambda network, batch: (3 * network.w.sum(), {}), Loader([sample] * 3), optimizer,
            torch.amp.GradScaler("cpu", enabled=False), args, at,
        ))  # fmt: skip
        assert len(steps) == math.ceil(3 / accumulate)
        logits.append(toy.w.item())
    assert logits[0] == pytest.approx(-3 * sum((1 - t / 3) ** 0.9 for t in range(3)))
    assert logits[1] == pytest.approx(-3 * sum((1 - t / 2) ** 0.9 for t in range(2)))


SLOW = "import sys, time, train_ensemble as t; f = t.check_finite; t.check_finite = lambda *a: (time.sleep(0.3), f(*a)); "
RUN = {"train_ensemble": "sys.exit(t.run(t.main, t.get_args_parser(), sys.argv[1:]))",
       "distill": "import distill as d; sys.exit(d.run(d.main, d.get_args_parser(), sys.argv[1:]))"}  # fmt: skip


def interrupted(script, flags, after, number):
    """Start `script`, wait until a state of at least `after` bytes of log is there, send the signal."""
    command = [sys.executable, "-c", SLOW + RUN[script], *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not after() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait(60), process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_in_the_same_bits(folder, command, tmp_path, number):
    flags = [*small(folder, "--epochs", 3), "--members", 1, "--save-every", 1e-9]
    assert command("train", *flags, "--out", tmp_path / "whole")[0] == 0
    cut = [*flags, "--out", tmp_path / "cut"]
    state = tmp_path / "cut" / "member_00.state"
    code, err = interrupted("train_ensemble", cut, state.exists, number)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert state.exists() and not (tmp_path / "cut" / "member_00.pt").exists()
    assert number == signal.SIGKILL or "the same command continues" in err
    code, out, _ = command("train", *cut)
    assert code == 0 and "continuing at epoch" in out and not state.exists()
    assert torch.equal(weights(tmp_path / "whole" / "member_00.pt"), weights(tmp_path / "cut" / "member_00.pt"))


def test_a_killed_distillation_ends_in_the_same_bits(trained, command, tmp_path):
    _, ckpts = trained
    flags = ["--teacher", ckpts, "--device", "cpu", "--epochs", 3, "--views", 2, "--save-every", 1e-9]
    assert command("distill", *flags, "--out", tmp_path / "whole.pt")[0] == 0
    cut = tmp_path / "cut.pt"
    interrupted("distill", [*flags, "--out", cut], (tmp_path / "cut.state").exists, signal.SIGKILL)
    assert (tmp_path / "cut.state").exists() and (tmp_path / "cut.targets.npy").exists()
    code, out, _ = command("distill", *flags, "--out", cut)
    assert code == 0 and "continuing at epoch" in out
    assert torch.equal(weights(tmp_path / "whole.pt"), weights(cut))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.jsonl", "cut.pt", "whole.jsonl", "whole.pt"]


def test_views_of_every_epoch_differ_from_none_by_the_rounding_alone(trained, command, tmp_path, monkeypatch):
    _, ckpts = trained
    seen = {}
    original = distill.teacher_target

    def spy(teacher, batch, cache, amp):
        target = original(teacher, batch, cache, amp)
        seen.setdefault(cache is None, []).append((batch.images.clone(), target))
        return target

    monkeypatch.setattr(distill, "teacher_target", spy)
    for views in (0, 2):
        assert command("distill", "--teacher", ckpts, "--device", "cpu", "--views", views, "--out", tmp_path / f"{views}.pt")[0] == 0
    for (images, target), (same, stored) in zip(seen[True], seen[False], strict=True):
        assert torch.equal(images, same)
        assert torch.equal(stored, distill.dequantise(distill.quantise(target)))


def test_student_inherits_from_its_teacher(trained):
    student, member = (read_checkpoint(trained[1] / name) for name in ("student.pt", "member_00.pt"))
    assert student["config"]["measures"] == ["std"] and student["config"]["backbone"] == "resnet18"
    for key in ("crop_size", "epochs", "batch_size", "lr", "weights", "scale", "dataset"):
        assert student["args"][key] == member["args"][key]
    assert {"torch", "torchvision", "numpy", "commit", "hardware"} <= set(student["versions"])


def test_mc_dropout_teaches(trained, command, tmp_path):
    member = trained[1] / "member_00.pt"
    flags = ["--teacher", member, "--mc-samples", 2, "--device", "cpu", "--epochs", 1, "--out", tmp_path / "s.pt"]
    assert command("distill", *flags)[0] == 0
    code, *_ = command("evaluate", "--student", tmp_path / "s.pt", "--teacher", member, "--mc-samples", 2,
                       "--device", "cpu", "--out", tmp_path / "r")  # fmt: skip
    assert code == 0


def test_errors_are_one_line_with_code_2(folder, trained, command, tmp_path):
    out = ["--out", tmp_path / "new"]
    train = [*small(folder), *out]
    single = write_folder(tmp_path / "single", train=1)
    for name, flags, words in (
        ("train", [*train, "--members", 0], "--members 0"),
        ("train", [*train, "--members", 2, "--member-ids", 2], "--member-ids 2"),
        ("train", [*train, "--member-ids", "a"], "invalid integers value"),
        ("train", [*train, "--epochs", 0], "--epochs 0"),
        ("train", [*train, "--crop-size", 0, 32], "--crop-size 0 32"),
        ("train", [*train, "--batch-size", 1], "batch norm needs at least 2"),
        ("train", [*train, "--scale", 1.5, 2], "--scale 1.5 2"),
        ("train", [*train, "--hold-out", "cat"], "no such class"),
        ("train", [*train, "--weights", tmp_path / "none.pth"], "no such checkpoint"),
        ("train", [*train, "--data", tmp_path / "gone"], "no such folder"),
        ("train", [*small(single), *out], "at least 2"),
        ("train", ["--dataset", "voc", *out], "needs --data DIR"),
        ("train", [*train, "--backbone", "vgg"], "invalid choice"),
        ("distill", ["--teacher", tmp_path / "gone", *out], "no member_"),
        ("distill", ["--teacher", trained[1] / "member_00.pt", *out], "at least 2 members"),
        ("distill", ["--teacher", trained[1], "--mc-samples", 3, *out], "name a single checkpoint"),
        ("distill", ["--teacher", trained[1], "--views", -1, *out], "cannot be negative"),
        ("distill", ["--teacher", trained[1], "--hold-out", "class 1", *out], "the teacher knows the classes"),
    ):
        code, _, err = command(name, *flags)
        assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: "), (flags, err)
        assert not list((tmp_path / "new").rglob("*.pt*")), flags


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(folder, command, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ensemble, "cross_entropy", lambda logits, labels: logits.sum() * math.nan)
    code, _, err = command("train", *small(folder), "--members", 1, "--out", tmp_path / "c")
    assert code == 2 and "the loss is nan in epoch 0, batch 0 (images" in err
    assert not list((tmp_path / "c").glob("*.pt"))


def test_overwrite_and_select_best(folder, command, tmp_path):
    flags = [*small(folder), "--members", 1, "--out", tmp_path]
    assert command("train", *flags)[0] == 0
    assert command("train", *flags, "--select", "best")[0] == 2
    assert command("train", *flags, "--select", "best", "--overwrite")[0] == 0
    history = [json.loads(line)["miou"] for line in (tmp_path / "member_00.jsonl").read_text().splitlines()]
    assert read_checkpoint(tmp_path / "member_00.pt")["metrics"]["miou"] == max(history)


def test_resized_upsampling_is_bilinear_without_aligned_corners():
    x = torch.rand(1, 2, 3, 4)
    from model import upsample

    torch.testing.assert_close(upsample(x, (9, 8)), F.interpolate(x, (9, 8), mode="bilinear", align_corners=False))


def test_help_of_every_script():
    for script in ("train_ensemble", "distill", "evaluate"):
        done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True,
                              env=os.environ | {"COLUMNS": "100"})  # fmt: skip
        assert done.returncode == 0 and "usage:" in done.stdout
