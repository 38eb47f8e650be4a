"""The training loop: schedule, loss, reproducibility, resuming, refusals; and the distillation."""

import argparse
import copy
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags_of, small, weights, write_folder
from processes import Forked, run_command, run_with_forks

import data
import distill
import metrics
import model
import train_ensemble
from data import IGNORED, VOID, Sample
from metrics import MAX_STD, MEASURES
from model import DeepLabV3, Ensemble, UsageError, choose_amp, read_checkpoint, upsample

# ------------------------------------------------------------------------------ pieces


def test_schedule_at_both_ends():
    factor = [train_ensemble.lr_factor(t, 10, 0) for t in range(10)]
    assert factor[0] == 1 and factor[9] == pytest.approx(0.1**0.9)
    assert factor == sorted(factor)[::-1]
    warm = [train_ensemble.lr_factor(t, 100, 10) for t in range(100)]
    assert warm[0] == pytest.approx(0.1) and warm[9] == pytest.approx((1 - 9 / 100) ** 0.9)
    assert warm[99] > 0


def test_streams_share_nothing():
    keys = itertools.product(range(3), ("member", "student", "head"), range(5))
    streams = [train_ensemble.random_stream(*key) for key in keys]
    seeds = [seed for stream in streams for seed in (stream.torch_seed, *stream.view_seeds)]
    assert len(seeds) == len(set(seeds)) == 4 * len(streams)


def test_cross_entropy_counts_labelled_pixels_alone():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    labels[0, 0], labels[1, 1] = VOID, IGNORED
    valid = labels < 3
    right = logits.log_softmax(1).gather(1, labels.clamp(max=2).long()[:, None])[:, 0]
    expected = -right[valid].mean().item()
    assert train_ensemble.cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    nothing = torch.full_like(labels, VOID)
    assert train_ensemble.cross_entropy(logits, nothing).item() == 0  # a batch of void is no NaN


def test_rmsle_is_the_papers():
    rng = np.random.default_rng(0)
    student, teacher = rng.random((2, 2, 4, 5))
    valid = rng.random((2, 4, 5)) < 0.7
    expected = np.sqrt(np.mean((np.log(1 + student) - np.log(1 + teacher))[valid] ** 2))
    got = distill.rmsle(*(torch.from_numpy(x) for x in (student, teacher, valid)))
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_rmsle_has_a_gradient_at_zero_error_and_without_pixels():
    for valid in (torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)):
        student = torch.full((1, 2, 2), 0.3, requires_grad=True)
        distill.rmsle(student, torch.full((1, 2, 2), 0.3), valid).backward()
        assert torch.isfinite(student.grad).all()


def test_targets_are_stored_to_half_a_step():
    std, largest = torch.linspace(0, MAX_STD, 10001), torch.tensor(MAX_STD)
    stored = distill.quantise(std, largest)
    assert stored.max() == 254  # 255 is "missing"
    steps = (254 * (std / MAX_STD).sqrt() - stored).abs()
    assert steps.max() <= 0.5 + 1e-3
    again = distill.quantise(distill.dequantise(stored, largest), largest)
    torch.testing.assert_close(again, stored)


def batch_of(flip):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8)
    flips = torch.tensor([flip, False])
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    labels = torch.zeros(2, 32, 48, dtype=torch.uint8)
    return Sample(images, labels, torch.tensor([0, 1]), torch.tensor([0, 0]), flips)


ALL = list(MEASURES)


def targets_of(teacher, measures=("std",), with_probs=False):
    return distill.TeacherTargets(teacher, list(measures), with_probs, "off")


def channels_of(targets, batch):
    """All channels of a batch's target, [B, T, H, W] or with probabilities [B, T + C, H, W]."""
    target = targets.for_batch(batch)
    if target.probs is None:
        return target.uncertainty
    return torch.cat([target.uncertainty, target.probs], dim=1)


def cache_in(folder, channels=1, key=1):
    largest = [measure.largest for measure in MEASURES.values()] + [1.0, 1.0, 1.0]
    largest = torch.tensor(largest[:channels])[:, None, None]
    return distill.TargetCache(folder / "t.npy", (1, 2, channels, 32, 48), largest, {"key": key})


def test_dropout_of_the_teacher_leaves_the_students_alone_and_repeats():
    torch.manual_seed(0)
    targets = targets_of(Ensemble([DeepLabV3("resnet18", 3)], mc_samples=2))
    state = torch.get_rng_state()
    first = channels_of(targets, batch_of(False))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # what the student draws meanwhile
    assert torch.equal(channels_of(targets, batch_of(False)), first)
    other = batch_of(False)._replace(view=torch.tensor([1, 1]))
    assert not torch.equal(channels_of(targets, other), first)


@pytest.mark.parametrize("measures, probs", [(["std"], False), (ALL, True)])
def test_the_teacher_sees_unflipped_views_and_stored_targets_are_the_same(
    tmp_path, measures, probs
):
    torch.manual_seed(0)
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(2)])
    targets = targets_of(teacher, measures, probs)
    online = channels_of(targets, batch_of(False))
    flipped = channels_of(targets, batch_of(True))
    assert torch.equal(flipped[0], online[0].flip(-1)) and torch.equal(flipped[1], online[1])

    channels = len(measures) + (3 if probs else 0)
    cache = cache_in(tmp_path, channels)
    targets.train_cache = cache
    first = channels_of(targets, batch_of(False))
    rounded = distill.dequantise(distill.quantise(online, cache.largest), cache.largest)
    assert torch.equal(first, rounded)  # learned from as it is stored
    cache.targets[0, 1, 0, 3] = distill.MISSING  # a write that was cut short
    reopened = cache_in(tmp_path, channels)
    targets.train_cache = reopened
    assert torch.equal(channels_of(targets, batch_of(False)), first)
    assert not (reopened.targets == distill.MISSING).any()
    teacher.members = None  # from now on the disk alone
    flipped = channels_of(targets, batch_of(True))
    assert torch.equal(flipped[0], first[0].flip(-1))
    other = cache_in(tmp_path, channels, key=2)
    assert (other.targets == distill.MISSING).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_stored_targets_come_with_the_views(tmp_path, monkeypatch, workers):
    torch.manual_seed(0)
    folder = write_folder(tmp_path / "data", train=2)
    train_set = data.open_dataset("folder", folder, "train")
    path = tmp_path / "t.npy"
    views = data.TrainingViews(train_set, (32, 48), (1, 1), [1], num_views=1, targets_path=path)
    loader = data.training_loader(views, 2, workers, torch.device("cpu"))
    largest = torch.full((1, 1, 1), MAX_STD)
    cache = distill.TargetCache(path, (1, 2, 1, 32, 48), largest, {})
    # a teacher that says something else each time, as MC dropout would in another batch
    targets = targets_of(Ensemble([DeepLabV3("resnet18", 4)], mc_samples=2))
    targets.train_cache = cache

    def load(epoch):
        loader.batch_sampler.epoch = epoch
        (batch,) = list(loader)
        return batch

    def unflipped_by_index(batch):
        maps = {}
        uncertainty = targets.for_batch(batch).uncertainty
        for index, flip, values in zip(batch.index, batch.flip, uncertainty, strict=True):
            maps[int(index)] = values.flip(-1) if flip else values
        return [maps[0], maps[1]]

    early = load(0)
    assert early.stored_target.numel() == 0
    first = unflipped_by_index(early)
    targets.teacher = None  # from here on nothing is computed
    # this batch was loaded before its targets were stored
    assert all(map(torch.equal, unflipped_by_index(early), first))
    with monkeypatch.context() as patch:
        patch.setattr(distill.TargetCache, "read", None)  # what is loaded is not read again
        for epoch in range(1, 4):
            batch = load(epoch)
            assert batch.stored_target.shape == (2, 1, 32, 48)
            assert all(map(torch.equal, unflipped_by_index(batch), first))
    cache.targets[0, 1, 0, 5, 5] = distill.MISSING  # a write that was cut short
    assert load(4).stored_target.numel() == 0
    assert pickle.loads(pickle.dumps(views)).stored_targets.targets is None


def test_what_is_distilled_is_what_the_evaluation_calls_so():
    torch.manual_seed(0)
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(3)])
    batch = batch_of(False)
    target = channels_of(targets_of(teacher, ALL, with_probs=True), batch)
    with torch.inference_mode():
        prediction = teacher(batch.images, (32, 48), with_expected_entropy=True)
    scores = metrics.ensemble_measures(prediction, ALL)
    for channel, name in enumerate(ALL):
        scale = math.log(3) if name in ("entropy", "mutual_information") else 1
        torch.testing.assert_close(target[:, channel], scores[name] / scale)
    torch.testing.assert_close(target[:, len(ALL) :], prediction.probs)


def test_a_cache_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr(distill.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match="t.npy takes 0 MB, but the disk has 0 MB; use"):
        cache_in(tmp_path)
    assert not list(tmp_path.iterdir())


def test_padding_enters_no_uncertainty_loss_but_void_does():
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(2)])
    student = DeepLabV3("resnet18", 3, ("std",)).eval()
    targets = targets_of(teacher)
    batch = batch_of(False)
    batch.labels[:, :16] = VOID
    batch.labels[:, 16:] = IGNORED
    _, logs = distill.distillation_loss(student, batch, targets, 1.0, probs_weight=0.0)
    wanted = targets.for_batch(batch).uncertainty[:, 0, :16]
    predicted = student(batch.images).uncertainty[:, 0, :16]
    expected = ((predicted.log1p() - wanted.log1p()) ** 2).mean().sqrt()
    assert logs["ce"] == 0 and logs["rmsle"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_arithmetic_follows_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for has, wanted in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                        ({"avx512_f": True, "avx512_bf16": False}, "off")):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert choose_amp("auto", cpu) == wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_amp("auto", cpu) == "off"
    assert choose_amp("fp16", cpu) == "fp16"


def test_a_run_may_go_on_on_another_device():
    saved = {"device": "cpu", "amp": "off", "compile": False, "lr": 0.1}
    other = {"device": "cuda:1", "amp": "bf16", "compile": True, "lr": 0.1}
    train_ensemble.check_same(saved, other, Path("m.pt"))
    other["device"] = "cpu"
    with pytest.raises(UsageError, match="begun with --amp off, this command says bf16"):
        train_ensemble.check_same(saved, other, Path("m.pt"))


def test_a_run_that_began_before_a_flag_existed_goes_on_where_the_flag_does_nothing():
    saved = {"device": "cpu", "lr": 0.1}
    train_ensemble.check_same(saved, saved | {"val": None}, Path("m.pt"))
    with pytest.raises(
        UsageError, match="by an older version, which had no --val, this .* says 0.2"
    ):
        train_ensemble.check_same(saved, saved | {"val": 0.2}, Path("m.pt"))


def test_a_run_that_was_begun_with_a_flag_that_is_gone_goes_on_where_the_flag_did_nothing():
    recorded = {"device": "cpu", "lr": 0.1}
    unused = {"strong_views": False, "extra": None}
    unused |= {"unlabelled_depth": "all", "unlabelled_weight": 1.0}
    train_ensemble.check_same(recorded | unused, recorded, Path("s.pt"))
    for name, value in (("strong_views", True), ("extra", "photos")):
        begun = recorded | unused | {name: value}
        flag = f"--{name.replace('_', '-')} {value}, which this command does not have; use another"
        with pytest.raises(UsageError, match=f"s.pt was begun with {flag} --out"):
            train_ensemble.check_same(begun, recorded, Path("s.pt"))


def test_every_measure_and_the_probabilities_have_their_own_term():
    torch.manual_seed(0)
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(2)])
    student, batch = DeepLabV3("resnet18", 3, tuple(ALL)).eval(), batch_of(False)
    batch.labels[:, :16] = IGNORED
    targets = targets_of(teacher, ALL, with_probs=True)
    target = channels_of(targets, batch)[:, :, 16:].double()
    loss, logs = distill.distillation_loss(student, batch, targets, 2.0, probs_weight=0.5)
    logits, u = student(batch.images)
    logits, u = logits[:, :, 16:].double(), u[:, :, 16:].double()
    errors = [((u[:, t].log1p() - target[:, t].log1p()) ** 2).mean().sqrt() for t in range(4)]
    p = target[:, 4:]
    kl = (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
    ce = F.cross_entropy(logits, batch.labels[:, 16:].long())
    for name, value in (("ce", ce), ("rmsle", sum(errors) / 4), ("kl", kl)):
        assert logs[name].item() == pytest.approx(value.item(), rel=1e-4)
    total = (ce + 0.5 * kl) / 1.5 + 2 * sum(errors) / 4
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)

    # In turn: the same terms, each in a loss of its own.
    alone, _ = distill.student_segmentation_loss(student, batch, None, probs_weight=0.0)
    assert alone.item() == pytest.approx(ce.item(), rel=1e-4)  # no teacher is needed
    loss, logs = distill.student_segmentation_loss(student, batch, targets, probs_weight=0.5)
    assert loss.item() == pytest.approx(((ce + 0.5 * kl) / 1.5).item(), rel=1e-4)
    assert logs.keys() == {"ce", "kl"}
    loss, logs = distill.head_loss(student, batch, targets)
    assert loss.item() == pytest.approx(sum(errors).item() / 4, rel=1e-4)
    assert logs.keys() == {"rmsle"}


def test_the_error_is_learned_from_the_students_own_mistakes():
    torch.manual_seed(0)
    teacher = Ensemble([DeepLabV3("resnet18", 3) for _ in range(2)])
    student, batch = DeepLabV3("resnet18", 3, ("std", "error")).eval(), batch_of(False)
    batch.labels[:] = torch.randint(0, 3, batch.labels.shape, dtype=torch.uint8)
    batch.labels[:, :10] = VOID
    batch.labels[:, 10:16] = IGNORED
    targets = targets_of(teacher)
    loss, logs = distill.distillation_loss(student, batch, targets, 3.0, probs_weight=0.0)

    logits, uncertainty = student(batch.images)
    wrong = (logits.argmax(1) != batch.labels)[:, 16:]
    expected = F.binary_cross_entropy(uncertainty[:, 1, 16:], wrong.float())
    assert logs["error"].item() == pytest.approx(expected.item(), rel=1e-5)
    total = logs["ce"] + 3 * (logs["rmsle"] + logs["error"]) / 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    loss_of_head, _ = distill.head_loss(student, batch, targets)
    assert loss_of_head.item() == pytest.approx((total - logs["ce"]).item() / 3, rel=1e-6)

    # What the teacher says does not depend on it.
    assert targets.for_batch(batch).uncertainty.shape[1] == 1
    nothing = torch.full_like(batch.labels, VOID)
    assert distill.error_loss(uncertainty[:, 1], logits, nothing).item() == 0


def test_a_certain_prediction_of_error_has_a_finite_loss():
    logits = torch.tensor([[2.0, 0.0]])[:, :, None, None]
    for probability in (0.0, 1.0):
        for label in (0, 1):
            predicted = torch.full((1, 1, 1), probability, requires_grad=True)
            labels = torch.full((1, 1, 1), label, dtype=torch.uint8)
            loss = distill.error_loss(predicted, logits, labels)
            loss.backward()
            assert loss.isfinite() and predicted.grad.isfinite().all()


def test_an_epoch_whose_miou_is_no_number_is_never_the_best():
    history = [{"epoch": 1, "miou": math.nan}, {"epoch": 2, "miou": 0.5}, {"epoch": 3, "miou": 0.4}]
    assert train_ensemble.kept_epoch(history, "best")["epoch"] == 2
    assert train_ensemble.kept_epoch(history[:1], "best")["epoch"] == 1  # there is no other
    assert train_ensemble.kept_epoch(history, "last")["epoch"] == 3
    assert train_ensemble.without_nan(history[0]) == {"epoch": 1, "miou": None}


# ------------------------------------------------------------------------------ runs


def test_the_same_command_gives_the_same_bits_with_any_workers(folder, trained, command, tmp_path):
    flags = [*small(folder), "--members", 1, "--workers", 2, "--out", tmp_path / "c"]
    assert command("train", *flags)[0] == 0
    assert torch.equal(weights(trained[1] / "member_00.pt"), weights(tmp_path / "c/member_00.pt"))
    left = {path.name for path in (tmp_path / "c").iterdir()}
    assert left == {"curves.svg", "member_00.jsonl", "member_00.pt"}
    curves = (tmp_path / "c" / "curves.svg").read_text()
    assert "Training loss" in curves and "Validation mIoU" in curves and "member_00" in curves
    log = (tmp_path / "c" / "member_00.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(0 <= line["miou"] <= 1 for line in lines)


def test_members_differ_and_finished_ones_are_kept(trained, command, tmp_path):
    flags = [*small(trained[0]), "--out", tmp_path]
    first, second = (tmp_path / f"member_0{number}.pt" for number in (0, 1))
    shutil.copy(trained[1] / first.name, first)
    before = first.stat().st_mtime_ns
    first.with_suffix(".state").touch()  # killed after the checkpoint was written
    code, out, _ = command("train", *flags, "--members", 2)
    assert code == 0 and "member_00.pt: finished" in out
    assert first.stat().st_mtime_ns == before and not first.with_suffix(".state").exists()
    assert not torch.equal(weights(first), weights(second))
    assert torch.equal(weights(second), weights(trained[1] / second.name))
    code, _, err = command("train", *flags, "--members", 2, "--lr", 0.5)
    assert code == 2 and "--lr 0.002, this command says 0.5" in err and err.count("\n") == 1


def test_members_side_by_side_are_the_same_and_bad_input_comes_through(folder, trained, tmp_path):
    flags = [*small(folder), "--members", 2, "--parallel", 2, "--out"]
    code, _, err = Forked(run_with_forks, "train_ensemble", *flags, tmp_path / "two").finish()
    assert code == 0, err
    for member in ("member_00.pt", "member_01.pt"):
        assert torch.equal(weights(trained[1] / member), weights(tmp_path / "two" / member))
    (folder / "images/train/0.png").write_bytes(b"no image")
    code, _, err = Forked(run_with_forks, "train_ensemble", *flags, tmp_path / "three").finish()
    assert code == 2 and "Traceback" not in err
    assert set(err.split("\n")) - {""} == {err.split("\n")[0]}  # both say the same


def test_accumulated_batches_make_one_step(tmp_path):
    weights_after = []

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

    class Loader(list):
        batch_sampler = argparse.Namespace()
        dataset = argparse.Namespace(dataset=argparse.Namespace(names=[]))

    class Batches(list):
        epoch = start = 0

        def is_full(self, number):
            return True

    def loss_fn(network, batch):
        return 3 * network.w.sum(), {}

    for accumulate in (1, 2):
        toy = Toy()
        optimizer = torch.optim.SGD([{"params": toy.parameters(), "lr_mult": 1.0}], lr=1.0)
        sample = Sample(*[torch.zeros(2, 1) for _ in Sample._fields])
        loader = Loader([sample] * 3)
        loader.batch_sampler = Batches([0] * 3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = train_ensemble.RunState()
        run = train_ensemble.Run(tmp_path / "m.pt", toy, toy, optimizer, scaler, state, [], [])
        flags = flags_of(accumulate=accumulate, epochs=1, lr=1.0, warmup=0)
        steps = []
        progress = argparse.Namespace(show=lambda state, lr, steps=steps: steps.append(lr))
        train_ensemble.train_one_epoch(run, loss_fn, loader, flags, progress)
        assert len(steps) == math.ceil(3 / accumulate)
        weights_after.append(toy.w.item())
    assert weights_after[0] == pytest.approx(-3 * sum((1 - t / 3) ** 0.9 for t in range(3)))
    assert weights_after[1] == pytest.approx(-3 * sum((1 - t / 2) ** 0.9 for t in range(2)))


def run_slowly(name, flags):
    """A command whose every step waits, so that it can be met half-way."""
    check_finite = train_ensemble.check_finite

    def check_and_wait(*arguments):
        time.sleep(0.3)
        check_finite(*arguments)

    train_ensemble.check_finite = check_and_wait
    return run_command(name, *flags)


def interrupted(name, flags, after, number):
    """Start a command, wait until `after()` is true, send the signal."""
    process = Forked(run_slowly, name, flags)
    deadline = time.monotonic() + 120
    while not after() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    code, _, err = process.finish()
    return code, err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_in_the_same_bits(folder, trained, command, tmp_path, number):
    flags = [*small(folder), "--members", 1, "--save-every", 1e-9]
    cut = [*flags, "--out", tmp_path / "cut"]
    state = tmp_path / "cut" / "member_00.state"
    code, err = interrupted("train_ensemble", cut, state.exists, number)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert state.exists() and not (tmp_path / "cut" / "member_00.pt").exists()
    assert number == signal.SIGKILL or "the same command continues" in err
    code, out, _ = command("train", *cut)
    assert code == 0 and "continuing at epoch" in out and not state.exists()
    assert torch.equal(weights(trained[1] / "member_00.pt"), weights(tmp_path / "cut/member_00.pt"))


def test_a_killed_distillation_ends_in_the_same_bits(trained, command, tmp_path):
    _, ckpts = trained
    cut = tmp_path / "cut.pt"
    flags = ["--teacher", ckpts, "--device", "cpu", "--out", cut]
    often = [*flags, "--save-every", 1e-9]
    interrupted("distill", often, (tmp_path / "cut.state").exists, signal.SIGKILL)
    assert (tmp_path / "cut.state").exists() and (tmp_path / "cut.targets.npy").exists()
    code, out, _ = command("distill", *flags)
    assert code == 0 and "continuing at epoch" in out
    assert torch.equal(weights(ckpts / "student.pt"), weights(cut))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"cut.pt", "cut.jsonl", "cut-head.jsonl"}


def test_what_is_quickly_trained_again_gets_no_state(trained, command, tmp_path, monkeypatch):
    folder, ckpts = trained
    saved = []
    original = train_ensemble.save_state

    def save_state(run, flags):
        saved.append((run.path.stem, run.state.epoch))
        original(run, flags)

    monkeypatch.setattr(train_ensemble, "save_state", save_state)
    train = [*small(folder), "--members", 1, "--out", tmp_path]
    assert command("train", *train)[0] == 0
    assert saved == []
    distill_it = ["--teacher", ckpts, "--device", "cpu", "--out", tmp_path / "student.pt"]
    assert command("distill", *distill_it)[0] == 0
    assert saved == [("student", 2)]  # from which its head goes on

    saved.clear()
    monkeypatch.setattr(train_ensemble, "LITTLE_TO_LOSE", 0)
    assert command("train", *train, "--overwrite")[0] == 0
    assert saved == [("member_00", 1), ("member_00", 2)]


def stopped_in(loss_name, step, patch):
    """From now on a SIGTERM comes in that step, from 1, of the training with that loss."""
    original = getattr(distill, loss_name)
    steps = itertools.count(1)

    def loss_fn(*batch, **settings):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*batch, **settings)

    patch.setattr(distill, loss_name, loss_fn)


def test_a_student_goes_on_in_either_training_and_leaves_nothing(
    trained, command, tmp_path, monkeypatch
):
    path = tmp_path / "s.pt"
    flags = ["--teacher", trained[1], "--device", "cpu", "--out", path]
    for loss_name, state in (
        ("student_segmentation_loss", "s.state"),
        ("head_loss", "s-head.state"),
    ):
        with monkeypatch.context() as patch:
            stopped_in(loss_name, 3, patch)  # the first of the second epoch
            code, _, err = command("distill", *flags)
        assert code == 143 and "saved at epoch 1, batch 1; the same command continues" in err
        assert (tmp_path / state).exists() and not path.exists()
    code, out, _ = command("distill", *flags)
    assert code == 0 and "s-head: continuing at epoch 1, batch 1" in out
    assert torch.equal(weights(trained[1] / "student.pt"), weights(path))
    finished = {"s.pt", "s.jsonl", "s-head.jsonl"}
    assert {file.name for file in tmp_path.iterdir()} == finished

    (tmp_path / "s-head.state").touch()  # killed after the checkpoint was written
    code, out, _ = command("distill", *flags)
    assert code == 0 and "s.pt: finished" in out
    assert {file.name for file in tmp_path.iterdir()} == finished

    # --overwrite takes nothing of the earlier head.
    (tmp_path / "s-head.state").touch()
    nan = lambda logits, labels: logits.sum() * math.nan  # noqa: E731
    monkeypatch.setattr(distill, "cross_entropy", nan)
    assert command("distill", *flags, "--overwrite")[0] == 2
    assert not list(tmp_path.glob("s-head*")) and not path.exists()


def without_head(path):
    """The weights and statistics of a checkpoint's network but for its uncertainty head."""
    weights = read_checkpoint(path)["model"]
    return {name: value for name, value in weights.items() if "uncertainty" not in name}


def assert_same_segmentation(first, second):
    first, second = without_head(first), without_head(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_head_changes_nothing_of_the_network(trained, command, tmp_path):
    flags = ["--teacher", trained[1], "--device", "cpu", "--head-epochs", 1]
    for name in ("s-head.state", "s-head.jsonl"):  # of a student that was removed by hand
        (tmp_path / name).write_text("another")
    code, out, _ = command("distill", *flags, "--out", tmp_path / "s.pt")
    assert code == 0 and "teacher targets: 2 x 5 images" in out  # the head's views are not new
    assert_same_segmentation(trained[1] / "student.pt", tmp_path / "s.pt")  # with ten epochs
    log = (tmp_path / "s-head.jsonl").read_text().splitlines()
    (epoch,) = [json.loads(line) for line in log]
    assert {"rmsle", "error", "fidelity_pearson"} <= epoch.keys()
    # what the head was measured on is the network that was kept
    assert epoch["miou"] == read_checkpoint(tmp_path / "s.pt")["metrics"]["miou"]


def test_a_head_that_learns_from_kept_features_goes_on_to_the_same_bits(
    trained, command, tmp_path, monkeypatch
):
    flags = ["--teacher", trained[1], "--device", "cpu", "--epochs", 1, "--views", 1]
    flags += ["--head-epochs", 4]
    code, out, _ = command("distill", *flags, "--out", tmp_path / "whole.pt")
    assert code == 0 and "features: " in out
    with monkeypatch.context() as patch:
        stopped_in("head_loss", 6, patch)  # in the third epoch
        assert command("distill", *flags, "--out", tmp_path / "cut.pt")[0] == 143
    code, out, _ = command("distill", *flags, "--out", tmp_path / "cut.pt")
    assert code == 0 and "cut-head: continuing at epoch 2" in out
    assert torch.equal(weights(tmp_path / "whole.pt"), weights(tmp_path / "cut.pt"))


class NoisyViews:
    """Stands for `data.TrainingViews`: five images of noise, another for each view."""

    crop_size = (32, 48)

    def __len__(self):
        return 5

    def read_view(self, view, index):
        generator = torch.Generator().manual_seed(10 * view + index)
        image = torch.randint(0, 256, (3, *self.crop_size), dtype=torch.uint8, generator=generator)
        return image, None

    def batch(self, view, index, flip):
        """The `Sample` of some of them; its labels are void."""
        view, index, flip = torch.tensor(view), torch.tensor(index), torch.tensor(flip)
        images = distill.read_views(self, distill.TargetKey(view, index))
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        labels = torch.full((len(images), *self.crop_size), VOID, dtype=torch.uint8)
        return Sample(images, labels, index, view, flip)


def keep_features_of(network, views=1, head_epochs=9, **flags):
    """`distill.keep_features` with that many views of `NoisyViews`."""
    settings = {name: None for name in distill.DistillationFlags._fields}
    settings |= {"views": views, "head_epochs": head_epochs}
    nothing = dict.fromkeys(distill.Lessons._fields)
    loader = argparse.Namespace(dataset=NoisyViews())
    lessons = distill.Lessons(**(nothing | {"train_loader": loader}))
    flags = flags_of(**({"crop_size": NoisyViews.crop_size, "batch_size": 2} | flags))
    distillation = distill.DistillationFlags(**settings)
    return distill.keep_features(network, lessons, flags, distillation, signals=[])


def test_kept_features_are_the_networks(monkeypatch):
    monkeypatch.setattr(data, "PIXELS_PER_PASS", 0)  # so two at a time, and one at last
    network = DeepLabV3("resnet18", 4, ("std",), head="confidence").train()
    kept = keep_features_of(network, views=2)
    batch = NoisyViews().batch([0, 1, 1, 0], [4, 4, 0, 1], [False, True, False, True])
    with torch.inference_mode():
        expected = network.eval()(batch.images)
        found = distill.predict_frozen(network, batch, kept)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-5)
    assert not kept.features.requires_grad


@pytest.mark.parametrize("views, head_epochs, megabytes, kept", [
    (1, 3, 1, True), (1, 2, 1, False), (0, 9, 1, False), (1, 3, 1e-3, False),
])  # fmt: skip
def test_features_are_kept_where_views_come_again_and_there_is_room(
    monkeypatch, capsys, views, head_epochs, megabytes, kept
):
    monkeypatch.setattr(distill, "LARGEST_MEMORY", 1e6 * megabytes)
    network = DeepLabV3("resnet18", 4)
    assert (keep_features_of(network, views, head_epochs) is not None) == kept
    for other in ({"device": torch.device("cuda")}, {"compile": True}):
        assert keep_features_of(network, views, head_epochs, **other) is None
    with monkeypatch.context() as patch:
        patch.setattr(distill, "get_world_size", lambda: 2)
        assert keep_features_of(network, views, head_epochs) is None
    # twice, five views, 256 channels, 2 x 3, four bytes
    assert ("features: 0.1 MB in memory" in capsys.readouterr().out) == kept


def test_targets_are_filled_once_and_to_the_same_bits(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PIXELS_PER_PASS", 0)
    teacher = Ensemble([DeepLabV3("resnet18", 4).eval()], mc_samples=2)
    passes = []
    teacher.members[0].register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    shape = (2, 5, 1, *NoisyViews.crop_size)

    def fill(name):
        cache = distill.TargetCache(tmp_path / name, shape, torch.full((1, 1, 1), MAX_STD), {})
        targets = distill.TeacherTargets(teacher, ["std"], False, "off", train_cache=cache)
        torch.manual_seed(7)
        targets.fill(NoisyViews(), batch_size=2, signals=[])
        return targets

    whole = fill("whole.npy").train_cache.targets
    assert not (whole == data.MISSING).any()
    assert sorted(passes) == 4 * [1] + 8 * [2]  # two samples, two views, of 2 + 2 + 1 images
    passes.clear()
    fill("whole.npy")
    assert passes == []

    # what a killed run has not stored comes out as if it had: a batch has its own draws
    (tmp_path / "cut.json").write_text((tmp_path / "whole.json").read_text())
    half = whole.copy()
    half[0, 3] = half[1, :2] = data.MISSING
    np.save(tmp_path / "cut.npy", half)
    targets = fill("cut.npy")
    assert np.array_equal(targets.train_cache.targets, whole)

    # what a training batch gets is what is stored, mirrored with its view
    batch = NoisyViews().batch([1, 0], [3, 4], [True, False])
    passes.clear()
    expected = targets.train_cache.dequantise(torch.from_numpy(whole[[1, 0], [3, 4]]))
    expected[0] = expected[0].flip(-1)
    assert torch.equal(targets.for_batch(batch).uncertainty, expected) and passes == []


@pytest.mark.parametrize("passes", [2, 5])  # the teacher's, or those for the head's features
def test_a_signal_before_a_training_loses_nothing(trained, command, tmp_path, monkeypatch, passes):
    monkeypatch.setattr(data, "PIXELS_PER_PASS", 0)
    flags = ["--teacher", trained[1], "--device", "cpu", "--views", 1, "--batch-size", 2]
    flags += ["--epochs", 1, "--head-epochs", 3, "--out", tmp_path / "s.pt"]
    with monkeypatch.context() as patch:
        stopped_in("read_views", passes, patch)
        code, _, err = command("distill", *flags)
    assert code == 143 and err.splitlines()[-1] == (
        "s: stopped, nothing of a training is lost; the same command continues from there"
    )
    stored = np.load(tmp_path / "s.targets.npy")
    number = 4 if passes == 2 else 5  # images that the teacher was asked about
    assert (stored[0, :number] != data.MISSING).all()
    assert (stored[0, number:] == data.MISSING).all()
    assert command("distill", *flags)[0] == 0
    assert command("distill", *flags[:-1], tmp_path / "whole.pt")[0] == 0
    assert torch.equal(weights(tmp_path / "s.pt"), weights(tmp_path / "whole.pt"))


@pytest.mark.parametrize("distill_probs, views_asked", [(1, 2), (0, 1)])
def test_a_run_on_a_cpu_asks_its_teacher_before_it_trains(
    trained, command, tmp_path, monkeypatch, distill_probs, views_asked
):
    flags = ["--teacher", trained[1], "--device", "cpu", "--views", 3, "--batch-size", 2]
    flags += ["--epochs", 2, "--head-epochs", 1, "--distill-probs", distill_probs]
    flags += ["--out", tmp_path / "s.pt"]
    asked = []
    run_teacher = distill.TeacherTargets.run_teacher

    def noted(self, images, *arguments, **more):
        asked.append((len(list(tmp_path.glob("s.jsonl"))), len(images)))
        return run_teacher(self, images, *arguments, **more)

    monkeypatch.setattr(distill.TeacherTargets, "run_teacher", noted)
    assert command("distill", *flags)[0] == 0
    # each view of all five images at once, for they are small; later the validation images. From
    # the labels alone the segmentation needs no teacher, and its second view is not asked about.
    before = [images for is_training, images in asked if not is_training]
    assert before == views_asked * [5]
    assert sum(images for is_training, images in asked if is_training) == 3


@pytest.mark.parametrize(
    "views, distill_probs, passes_of_a_member",
    [(5, 1.0, 5), (20, 1.0, 10), (0, 1.0, 14), (0, 0.0, 10)],
)
def test_the_work_of_a_student_counts_the_views_that_its_teacher_sees(
    views, distill_probs, passes_of_a_member
):
    settings = {name: None for name in distill.DistillationFlags._fields}
    settings |= {"head": "confidence", "head_epochs": 10}
    settings |= {"views": views, "distill_probs": distill_probs}
    distillation = distill.DistillationFlags(**settings)
    work = distill.views_of_work(flags_of(epochs=4), distillation, members=2)
    assert work == pytest.approx(4 + (2 * passes_of_a_member + 10) / 3)


def test_without_its_probabilities_the_segmentation_needs_no_teacher(
    trained, command, tmp_path, monkeypatch
):
    flags = ["--teacher", trained[1], "--device", "cpu", "--distill-probs", 0]
    flags += ["--epochs", 1, "--head-epochs", 1, "--out", tmp_path / "s.pt"]
    assert command("distill", *flags)[0] == 0
    # a member that is drawn as the student is
    stream = train_ensemble.random_stream(0, "student", 0)
    monkeypatch.setattr(train_ensemble, "random_stream", lambda *key: stream)
    flags = [*small(trained[0]), "--members", 1, "--epochs", 1, "--out", tmp_path]
    assert command("train", *flags)[0] == 0
    assert_same_segmentation(tmp_path / "member_00.pt", tmp_path / "s.pt")


def test_the_papers_head_learns_as_published(trained, command, tmp_path, monkeypatch):
    """One step of the whole training set, by hand: cross-entropy + RMSLE of the std."""
    seen = []
    original = distill.distillation_loss

    def spy(student, batch, **settings):
        seen.append((copy.deepcopy(student), batch, torch.get_rng_state()))
        return original(student, batch, **settings)

    monkeypatch.setattr(distill, "distillation_loss", spy)
    flags = ["--teacher", trained[1], "--device", "cpu", "--head", "paper", "--views", 0]
    flags += ["--epochs", 1, "--batch-size", 5, "--lr", 0.5, "--amp", "off"]
    flags += ["--out", tmp_path / "s.pt"]
    assert command("distill", *flags)[0] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"s.pt", "s.jsonl"}
    checkpoint = read_checkpoint(tmp_path / "s.pt")
    assert checkpoint["config"]["measures"] == ["std"] and checkpoint["config"]["head"] == "paper"
    assert checkpoint["args"]["distill_probs"] == checkpoint["args"]["head_epochs"] == 0

    ((student, batch, random_state),) = seen
    flip = batch.flip[:, None, None, None]
    unflipped = torch.where(flip, batch.images.flip(-1), batch.images)
    probs = []
    with torch.inference_mode():
        for number in range(2):
            member = model.load_model(trained[1] / f"member_0{number}.pt")
            probs.append(member(unflipped).logits.softmax(1))
    probs = torch.stack(probs)  # [2, B, C, H, W]
    chosen = probs.mean(0).argmax(1, keepdim=True)
    std = probs.gather(2, chosen.expand(2, -1, -1, -1, -1)).std(0)  # [B, 1, H, W]
    std = torch.where(flip, std.flip(-1), std)[:, 0].clone()

    torch.set_rng_state(random_state)
    logits, uncertainty = student(batch.images)
    labelled, inside = batch.labels < IGNORED, batch.labels != IGNORED
    ce = F.cross_entropy(logits.movedim(1, -1)[labelled], batch.labels[labelled].long())
    rmsle = (uncertainty[:, 0].log1p() - std.log1p())[inside].square().mean().sqrt()
    (ce + rmsle).backward()
    decay = checkpoint["args"]["weight_decay"]
    for name, parameter in student.named_parameters():
        rate = 0.5 * (10 if name.startswith("uncertainty") else 1)
        expected = parameter - rate * (parameter.grad + decay * parameter)
        found = checkpoint["model"][name]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_stored_views_differ_by_the_rounding_alone(trained, command, tmp_path, monkeypatch):
    _, ckpts = trained
    seen = {False: [], True: []}
    original = distill.TeacherTargets.for_batch

    def spy(self, batch):
        target = original(self, batch)
        seen[self.train_cache is not None].append((batch.images.clone(), target.uncertainty))
        return target

    monkeypatch.setattr(distill.TeacherTargets, "for_batch", spy)
    for views in (0, 2):
        flags = ["--teacher", ckpts, "--views", views, "--out", tmp_path / f"{views}.pt"]
        flags += ["--head-epochs", 2]  # no view comes again
        assert command("distill", *flags, "--device", "cpu")[0] == 0
    largest = torch.tensor([measure.largest for measure in MEASURES.values()])[:, None, None]
    for (images, target), (same, stored) in zip(seen[False], seen[True], strict=True):
        assert torch.equal(images, same)
        rounded = distill.dequantise(distill.quantise(target, largest), largest)
        assert torch.equal(stored, rounded)


def test_stored_targets_of_a_picture_that_changed_are_computed_anew(
    trained, command, tmp_path, monkeypatch
):
    data_folder, ckpts = tmp_path / "data", trained[1]
    shutil.copytree(trained[0], data_folder)
    made = []
    original = distill.TargetCache.create_empty

    def spy(path, *settings):
        made.append(path.name)
        return original(path, *settings)

    monkeypatch.setattr(distill.TargetCache, "create_empty", staticmethod(spy))
    flags = ["--teacher", ckpts, "--data", data_folder, "--device", "cpu", "--views", 1]
    flags += ["--epochs", 1, "--head-epochs", 1, "--out", tmp_path / "s.pt"]
    # a run that was stopped leaves its targets; a loss that is not finite stops one
    nan = lambda logits, labels: logits.sum() * math.nan  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(distill, "cross_entropy", nan)
        assert command("distill", *flags)[0] == 2
        assert made == ["s.val-targets.npy", "s.targets.npy"]
        assert command("distill", *flags)[0] == 2
        assert len(made) == 2  # the same pictures: the same targets
        for split in ("train", "val"):
            made.clear()
            picture = data_folder / f"images/{split}/0.png"
            shutil.copy(data_folder / f"images/{split}/1.png", picture)
            os.utime(picture, (1, 1))
            assert command("distill", *flags)[0] == 2
            assert made == ["s.val-targets.npy", "s.targets.npy"]
    assert command("distill", *flags)[0] == 0


def test_student_inherits_from_its_teacher(trained):
    student = read_checkpoint(trained[1] / "student.pt")
    member = read_checkpoint(trained[1] / "member_00.pt")
    assert student["config"]["measures"] == [*ALL, "error"]
    assert student["config"]["backbone"] == "resnet18"
    for key in ("crop_size", "epochs", "batch_size", "lr", "weights", "scale", "dataset"):
        assert student["args"][key] == member["args"][key]
    flags = vars(distill.get_args_parser().parse_args(["--image-size", "64", "96"]))
    # the teacher's crop would be a part of the larger image
    assert distill.inherit_from_teacher(flags, member)["crop_size"] is None
    trained_so = member["args"] | {"image_size": [64, 96]}
    assert (
        distill.inherit_from_teacher(flags, {"args": trained_so})["crop_size"]
        == trained_so["crop_size"]
    )
    assert {"torch", "torchvision", "numpy", "commit", "hardware"} <= set(student["versions"])

    # of the drawn scenes, a multiple of the epochs and of the learning rate
    drawn = member["args"] | {"dataset": "synthetic", "data": None, "epochs": 2, "lr": 0.1}
    flags = vars(distill.get_args_parser().parse_args([]))
    student_flags = distill.inherit_from_teacher(flags, {"args": drawn})
    recipe = train_ensemble.RECIPES["synthetic"]
    assert student_flags["epochs"] == 2 * recipe["student_epochs_factor"] != 2
    assert student_flags["lr"] == 0.1 * recipe["student_lr_factor"] != 0.1


def test_a_checkpoint_says_how_its_network_normalises(trained, tmp_path):
    checkpoint = read_checkpoint(trained[1] / "student.pt")
    expected = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert checkpoint["config"]["normalisation"] == expected
    checkpoint["config"]["normalisation"] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    torch.save(checkpoint, tmp_path / "other.pt")
    network = model.load_model(tmp_path / "other.pt")
    assert network.rgb_mean.flatten().tolist() == [0.5] * 3
    assert network.rgb_std.flatten().tolist() == [0.25] * 3


def test_validation_is_rarer_where_it_is_expensive(folder, command, tmp_path):
    flags = [*small(folder), "--members", 1, "--epochs", 3]
    assert command("train", *flags, "--validate-every", 2, "--out", tmp_path / "two")[0] == 0
    entries = [json.loads(x) for x in (tmp_path / "two/member_00.jsonl").read_text().splitlines()]
    assert ["miou" in entry for entry in entries] == [False, True, True]

    train_set = data.open_dataset("folder", folder, "train")  # 5 images
    val_set = data.open_dataset("folder", folder, "val")  # 3 images of 40x56
    unset = flags_of(validate_every=None, select="last", crop_size=(32, 32))
    chosen = train_ensemble.choose_validation_interval(unset, train_set, val_set)
    share = 3 * 40 * 56 / (3 * 5 * 32 * 32)
    assert chosen.validate_every == math.ceil(10 * share) == 5
    large = unset._replace(crop_size=(320, 320))
    assert train_ensemble.choose_validation_interval(large, train_set, val_set).validate_every == 1
    best = unset._replace(select="best")
    assert train_ensemble.choose_validation_interval(best, train_set, val_set).validate_every == 1


def test_fewer_members_than_the_folder_holds_is_said(trained, command, tmp_path):
    shutil.copytree(trained[1], tmp_path / "c")
    flags = [*small(trained[0]), "--out", tmp_path / "c"]
    code, out, _ = command("train", *flags, "--members", 2)
    assert code == 0 and f"2 members in {tmp_path / 'c'}" in out and "note:" not in out
    code, out, _ = command("train", *flags, "--members", 1)
    assert code == 0 and f"2 members in {tmp_path / 'c'}" in out
    assert "note: 1 of them" in out and "larger run than --members 1" in out


def test_another_teacher_is_another_student(trained, folder, command, tmp_path):
    ckpts = tmp_path / "elsewhere"
    shutil.copytree(trained[1], ckpts)
    flags = ["--teacher", ckpts, "--device", "cpu"]
    code, out, _ = command("distill", *flags)  # the same members in another place
    assert code == 0 and "student.pt: finished" in out
    checkpoint = torch.load(ckpts / "member_01.pt", weights_only=True)
    checkpoint["metrics"]["miou"] += 1e-9  # trained anew
    torch.save(checkpoint, ckpts / "member_01.pt")
    code, _, err = command("distill", *flags)
    assert code == 2 and "was begun with the teacher " in err and "--overwrite" in err


def test_every_way_of_distilling_at_once(trained, command, tmp_path):
    ckpts, out = trained[1], tmp_path / "s.pt"
    flags = ["--teacher", ckpts, "--device", "cpu", "--targets", "mutual_information", "entropy",
             "--distill-probs", 1, "--views", 1, "--head", "paper", "--out", out]  # fmt: skip
    code, text, _ = command("distill", *flags)
    assert code == 0 and "kl" in text and "val pearson" in text
    assert "uncertainty-weight 1" in text and "head-epochs" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"s.pt", "s.jsonl"}
    assert read_checkpoint(out)["config"]["measures"] == ["mutual_information", "entropy"]
    flags = ["--student", out, "--teacher", ckpts, "--device", "cpu", "--out", tmp_path / "r"]
    assert command("evaluate", *flags)[0] == 0
    results = json.loads((tmp_path / "r/metrics.json").read_text())
    keys = {key for key in results["uncertainty"] if "dudes" in key}
    assert keys == {"student/dudes_mutual_information", "student/dudes_entropy"}
    assert results["fidelity"]["measure"] == "mutual_information"
    for more in (["--distill-probs", -1], ["--targets", "sum"]):
        code, _, err = command("distill", "--teacher", ckpts, "--device", "cpu", *more,
                               "--out", tmp_path / "t.pt")  # fmt: skip
        assert code == 2 and more[0] in err and err.count("\n") == 1


def test_a_confidence_head_and_the_error_measure(trained, command, tmp_path):
    ckpts, out = trained[1], tmp_path / "s.pt"
    flags = ["--teacher", ckpts, "--device", "cpu", "--views", 1, "--epochs", 1]
    flags += ["--head-epochs", 1, "--targets", "error", "std", "entropy", "--out", out]
    code, text, _ = command("distill", *flags)
    assert code == 0 and "error" in text and "val pearson" in text
    assert "head-epochs 1" in text and "uncertainty-weight" not in text
    config = read_checkpoint(out)["config"]
    assert config["head"] == "confidence"
    assert config["measures"] == ["std", "entropy", "error"]  # what is the teacher's comes first

    code, _, err = command("distill", "--teacher", ckpts, "--device", "cpu", "--targets", "error",
                           "--out", tmp_path / "u.pt")  # fmt: skip
    assert code == 2 and "name a measure of the teacher too" in err and err.count("\n") == 1


def test_mc_dropout_teaches(trained, command, tmp_path):
    member = trained[1] / "member_00.pt"
    flags = ["--teacher", member, "--mc-samples", 2, "--device", "cpu", "--epochs", 1]
    flags += ["--head-epochs", 1, "--batch-size", 8, "--out", tmp_path / "s.pt"]
    code, out, _ = command("distill", *flags)
    assert code == 0
    assert out.count("5 training images are less than a batch of 8") == 1  # for both trainings
    flags = ["--student", tmp_path / "s.pt", "--teacher", member, "--mc-samples", 2, "--panels", 0]
    assert command("evaluate", *flags, "--device", "cpu", "--out", tmp_path / "r")[0] == 0


def test_errors_are_one_line_with_code_2(folder, trained, command, tmp_path):
    ckpts, out = trained[1], ["--out", tmp_path / "new"]
    student = ["--out", tmp_path / "new/student.pt"]
    train = [*small(folder), *out]
    single = write_folder(tmp_path / "single", train=1)
    for name, flags, words in (
        ("train", [*train, "--members", 0], "--members 0"),
        ("train", [*train, "--members", 2, "--member-ids", 2], "--member-ids 2"),
        ("train", [*train, "--member-ids", "a"], "invalid integers value"),
        ("train", [*train, "--epochs", 0], "--epochs 0"),
        ("train", [*train, "--crop-size", 0, 32], "--crop-size 0"),
        ("train", [*train, "--batch-size", 1], "batch norm needs at least 2"),
        ("train", [*train, "--scale", 1.5, 2], "--scale 1.5 2"),
        ("train", [*train, "--hold-out", "cat"], "no such class"),
        ("train", [*train, "--weights", tmp_path / "none.pth"], "no such checkpoint"),
        ("train", [*train, "--data", tmp_path / "gone"], "no such folder"),
        ("train", [*small(single), *out], "at least 2"),
        ("train", ["--dataset", "voc", *out], "needs --data DIR"),
        ("train", [*train, "--backbone", "vgg"], "invalid choice"),
        ("distill", ["--teacher", ckpts, *out], "name a file that ends in .pt"),
        ("distill", ["--teacher", ckpts, "--out", tmp_path / "s-head.pt"], "names that end so"),
        (
            "distill",
            ["--teacher", ckpts, "--head", "paper", "--head-epochs", 3, *student],
            "--head-epochs 3: the paper's head learns with the rest",
        ),
        (
            "distill",
            ["--teacher", ckpts, "--uncertainty-weight", 2, *student],
            "--uncertainty-weight 2: the confidence head learns alone",
        ),
        ("distill", ["--teacher", tmp_path / "gone", *student], "no member_"),
        ("distill", ["--teacher", ckpts / "member_00.pt", *student], "at least 2 members"),
        ("distill", ["--teacher", ckpts, "--mc-samples", 3, *student], "name a single checkpoint"),
        ("distill", ["--teacher", ckpts, "--views", -1, *student], "cannot be negative"),
        ("distill", ["--teacher", ckpts, "--hold-out", "class 1", *student], "knows the classes"),
    ):
        code, _, err = command(name, *flags)
        assert code == 2 and words in err, (flags, err)
        assert err.count("\n") == 1 and err.startswith("error: "), (flags, err)
        assert not list((tmp_path / "new").rglob("*.pt*")), flags


def test_a_loss_that_is_not_finite_names_the_batch(folder, command, tmp_path, monkeypatch):
    nan = lambda logits, labels: logits.sum() * math.nan  # noqa: E731
    monkeypatch.setattr(train_ensemble, "cross_entropy", nan)
    code, _, err = command("train", *small(folder), "--members", 1, "--out", tmp_path / "c")
    assert code == 2 and "the loss is nan in epoch 0, batch 0 (images" in err
    assert not list((tmp_path / "c").glob("*.pt"))


def test_overwrite_and_select_best(trained, command, tmp_path):
    flags = [*small(trained[0]), "--members", 1, "--out", tmp_path]
    shutil.copy(trained[1] / "member_00.pt", tmp_path)
    assert command("train", *flags, "--select", "best")[0] == 2
    assert command("train", *flags, "--select", "best", "--overwrite")[0] == 0
    log = (tmp_path / "member_00.jsonl").read_text()
    best = max((json.loads(line) for line in log.splitlines()), key=lambda entry: entry["miou"])
    metrics = read_checkpoint(tmp_path / "member_00.pt")["metrics"]
    assert metrics == {key: best[key] for key in metrics} and metrics.keys() >= {"miou", "loss"}


def test_resized_upsampling_is_bilinear_without_aligned_corners():
    x = torch.rand(1, 2, 3, 4)
    expected = F.interpolate(x, (9, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(x, (9, 8)), expected)


def test_help_of_every_script(command):
    for name in ("train", "distill", "evaluate"):
        code, out, _ = command(name, "--help")
        assert code == 0 and "usage:" in out
