"""Nothing is lost: kills at random moments, locks, several processes, every kind of bad input."""

import argparse
import contextlib
import errno
import functools
import os
import pickle
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags_of, small, weights, write_folder
from PIL import Image
from processes import Forked, in_two_processes, run_command, run_ranks

import data
import distill
import evaluate
import model
import train_ensemble
from model import DeepLabV3, Ensemble, load_model


def contents(folder):
    """Every file below `folder`: small ones by their bytes, large ones by size and time."""

    def content(path):
        stat = path.stat()
        return path.read_bytes() if stat.st_size < 1e6 else (stat.st_size, stat.st_mtime_ns)

    return {path: content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------ kills


def run_pipeline(train, student):
    """Train and distil under those flags; the exit code of the first command that fails, or 0."""
    for name, flags in (("train_ensemble", train), ("distill", student)):
        code = run_command(name, *flags)
        if code:
            return code
    return 0


def test_killed_at_random_moments_the_pipeline_ends_in_the_same_bits(trained, tmp_path):
    folder, ckpts = trained
    out, chance = tmp_path / "ckpts", random.Random(0)
    train = [*small(folder), "--members", 2, "--out", out, "--save-every", 1e-9]
    student = ["--teacher", out, "--device", "cpu", "--save-every", 1e-9]
    kills = 0
    for _ in range(8):
        process = Forked(run_pipeline, train, student)
        process.stdout.readline()  # it has begun to work
        time.sleep(chance.uniform(0, 0.6))
        kills += process.poll() is None
        process.kill()
    code, _, err = Forked(run_pipeline, train, student).finish()
    assert code == 0, err
    assert kills >= 6, "too fast a machine for these pauses"
    for name in ("member_00.pt", "member_01.pt", "student.pt"):
        assert torch.equal(weights(out / name), weights(ckpts / name)), (name, kills)
    assert {path.name for path in out.iterdir()} == {path.name for path in ckpts.iterdir()}


TARGETS_SHAPE = (20, 300, 1, 96, 96)


def open_caches(folder, cache):
    """Decoded images and a file of targets, opened, or made where they are missing."""
    print("begins", flush=True)
    dataset = data.open_dataset("folder", folder, "train")
    data.cache_decoded(dataset, cache)
    path = cache / "student.targets.npy"
    targets = distill.TargetCache(path, TARGETS_SHAPE, torch.ones(1, 1, 1), {"key": 1}).targets
    return dataset, targets


def make_caches(folder, cache):
    open_caches(folder, cache)
    return 0


def test_caches_that_were_killed_while_they_were_made_are_made_anew(tmp_path):
    folder = write_folder(tmp_path / "data", train=200)
    cache, chance = tmp_path / "cache", random.Random(1)
    for _ in range(5):
        process = Forked(make_caches, folder, cache)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
    code, _, err = Forked(make_caches, folder, cache).finish()
    assert code == 0, err
    dataset, targets = open_caches(folder, cache)
    assert (targets == distill.MISSING).all() and targets.shape == TARGETS_SHAPE
    uncached = data.open_dataset("folder", folder, "train")
    assert len(list(cache.glob("folder-*.bin"))) == 1
    for number in (0, 7, 199):
        image, mask = uncached.read(number)
        np.testing.assert_array_equal(dataset.decoded[number].image, np.asarray(image))
        np.testing.assert_array_equal(dataset.decoded[number].mask, np.asarray(mask))


# ------------------------------------------------------------------------------ locks


def hold(path):
    """Hold the lock of `path`; print the number of a process that outlives this one."""
    with model.locked(path):
        worker = os.fork()  # as that of a loader
        if worker == 0:
            time.sleep(600)
            os._exit(0)
        print(worker, flush=True)
        time.sleep(600)


@contextlib.contextmanager
def holder_of(path):
    """A process that holds the lock of `path`; inside the `with` its worker lives, whether or not
    it does."""
    holder = Forked(hold, path)
    worker = int(holder.stdout.readline())
    try:
        yield holder
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_second_writer_is_refused_and_a_dead_one_blocks_nobody(trained, command, tmp_path):
    folder, ckpts = trained
    out = tmp_path / "out"
    out.mkdir()
    train = ["train", *small(folder, "--epochs", 1), "--members", 1, "--out", out]
    student = ["distill", "--teacher", ckpts, "--device", "cpu", "--epochs", 1, "--views", 0]
    student += ["--head-epochs", 1]
    student += ["--out", out / "student.pt"]
    evaluation = ["evaluate", "--student", ckpts / "student.pt", "--device", "cpu", "--panels", 0]
    evaluation += ["--out", out]
    runs = {"member_00.pt": train, "student.pt": student, "metrics.json": evaluation}
    for name, flags in runs.items():
        with holder_of(out / name) as holder:
            code, _, err = command(*flags)
            assert code == 2 and f"another process is writing {out / name}" in err
            assert err.count("\n") == 1 and not (out / name).exists()
            code, _, err = command(*flags, *(["--overwrite"] if flags[0] != "evaluate" else []))
            assert code == 2 and not (out / name).exists()
            holder.kill()
            assert command(*flags)[0] == 0 and (out / name).exists()
            assert not (out / name).with_suffix(".lock").exists()


def test_members_of_one_folder_can_be_trained_by_two_commands(trained, command, tmp_path):
    folder, ckpts = trained
    flags = [*small(folder), "--members", 2, "--out", tmp_path]
    with model.locked(tmp_path / "member_01.pt"):  # the other command
        assert command("train", *flags, "--member-ids", "0")[0] == 0
    assert torch.equal(weights(ckpts / "member_00.pt"), weights(tmp_path / "member_00.pt"))


# ------------------------------------------------------------------------------ bad input


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_jpeg(path):
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    return path.with_suffix(".jpg")


def mask(path, value, size=(40, 56)):
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def rewrite(path, **config):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"] |= config
    replace(path, checkpoint)


def replace(path, content):
    """Put something else in the place of a checkpoint, which other tests hold a link to."""
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


IMAGE, LABEL = "data/images/train/3.png", "data/labels/train/3.png"
# what is done to a whole experiment, the command that meets it, and words of the one line
DAMAGE = {
    "no folder": (lambda at: shutil.rmtree(at / "data"), "train", "no such folder"),
    "no split": (lambda at: shutil.rmtree(at / "data/images/val"), "train", "no folder images/val"),
    "no image": (lambda at: [p.unlink() for p in (at / "data/images/train").iterdir()], "train",
                 "no images in the split"),
    "single image": (lambda at: [(at / f"data/images/train/{n}.png").unlink() for n in range(4)],
                     "train", "a batch of 1 of the 1 training images is too small"),
    "missing mask": (lambda at: (at / LABEL).unlink(), "train", "no mask .*3.png"),
    "size of a mask": (lambda at: mask(at / LABEL, 0, (9, 9)), "train", "is 9x9, but .* is 56x40"),
    "value of a mask": (lambda at: mask(at / LABEL, 77), "train", "3.png holds 77, no label"),
    "colour mask": (lambda at: shutil.copy(at / IMAGE, at / LABEL), "train", "3.png has mode RGB"),
    "truncated png": (lambda at: truncate(at / IMAGE), "train", "cannot read the image .*3.png"),
    "truncated jpeg": (lambda at: truncate(as_jpeg(at / IMAGE)), "train",
                       "cannot read the image .*3.jpg"),
    "truncated mask": (lambda at: truncate(at / LABEL), "train", "cannot read the mask .*3.png"),
    "text as image": (lambda at: (at / IMAGE).write_text("text"), "train", "cannot read .*3.png"),
    "empty image": (lambda at: (at / IMAGE).write_bytes(b""), "train", "cannot read .*3.png"),
    "folder as image": (lambda at: ((at / LABEL).unlink(), (at / LABEL).mkdir()), "train",
                        "no mask .*3.png"),
    "no classes": (lambda at: (at / "data/classes.txt").unlink(), "train", "no file .*classes.txt"),
    "same classes": (lambda at: (at / "data/classes.txt").write_text("a\na\n"), "train",
                     "names 2 classes"),
    "out is a file": (lambda at: (at / "new").write_text(""), "train", "File exists"),
    "zero-byte state": (lambda at: ((at / "new").mkdir(), (at / "new/member_00.state").touch()),
                        "train", "member_00.state is not a readable checkpoint .it is empty"),
    "zero-byte member": (lambda at: replace(at / "ckpts/member_01.pt", b""), "distill",
                         "member_01.pt is not a readable checkpoint .it is empty"),
    "truncated member": (lambda at: replace(at / "ckpts/member_01.pt", (
        at / "ckpts/member_01.pt").read_bytes()[:99999]), "distill",
                         "member_01.pt is not a readable checkpoint"),
    "missing member": (lambda at: (at / "ckpts/member_01.pt").unlink(), "distill",
                       "lacks member_01.pt of a run of 2 members"),
    "no members": (lambda at: [p.unlink() for p in (at / "ckpts").glob("member*")], "distill",
                   "no member_.*first run python train_ensemble.py"),
    "other classes": (lambda at: rewrite(at / "ckpts/member_01.pt", classes=["a", "b", "c", "d"]),
                      "distill", "member_01.pt has classes .*they are no ensemble"),
    "class count": (lambda at: [rewrite(at / f"ckpts/member_0{n}.pt", classes=["a", "b"])
                                for n in (0, 1)], "distill", "weights do not fit"),
    "other backbone": (lambda at: rewrite(at / "ckpts/member_01.pt", backbone="resnet50"),
                       "distill", "member_01.pt has backbone resnet50"),
    "code": (lambda at: replace(at / "ckpts/member_00.pt", pickle.dumps(Evil())), "distill",
             "member_00.pt is not a readable checkpoint"),
    "code in a zip": (lambda at: replace(at / "ckpts/student.pt", {"model": Evil()}), "evaluate",
                      "student.pt is not a readable checkpoint"),
    "no checkpoint": (lambda at: replace(at / "ckpts/student.pt", {"a": 1}), "evaluate",
                      "no checkpoint of this project: it lacks"),
    "a tensor": (lambda at: replace(at / "ckpts/student.pt", torch.ones(2)), "evaluate",
                 "holds a Tensor, not a dict"),
    "no student": (lambda at: replace(at / "ckpts/student.pt", (
        at / "ckpts/member_00.pt").read_bytes()), "evaluate", "is no student: it predicts no"),
    "student of others": (lambda at: rewrite(at / "ckpts/student.pt", classes=["w", "x", "y", "z"]),
                          "evaluate", "know different classes"),
    "deleted data": (lambda at: shutil.rmtree(at / "data"), "evaluate", "no such folder"),
    "bad val mask": (lambda at: mask(at / "data/labels/val/1.png", 50), "evaluate",
                     "1.png holds 50"),
    "bad val image": (lambda at: truncate(at / "data/images/val/1.png"), "evaluate",
                      "cannot read the image .*1.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_input_is_one_line_and_changes_nothing(trained, command, tmp_path, monkeypatch, name):
    damage, script, words = DAMAGE[name]
    shutil.copytree(trained[0], tmp_path / "data")
    shutil.copytree(trained[1], tmp_path / "ckpts", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    damage(tmp_path)
    flags = {
        "train": [*small(tmp_path / "data"), "--members", 1, "--out", "new"],
        "distill": [
            "--teacher",
            "ckpts",
            "--device",
            "cpu",
            "--views",
            0,
            "--out",
            "new/s.pt",
            "--data",
            "data",
        ],
        "evaluate": ["--out", "new", "--device", "cpu", "--data", "data"],
    }[script]
    before = contents(tmp_path)
    code, _, err = command(script, *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(words, err), err
    assert contents(tmp_path) == before, set(contents(tmp_path)) ^ set(before)


def test_bad_input_met_by_a_worker_is_one_line(trained, command, tmp_path):
    shutil.copytree(trained[0], tmp_path / "data")
    truncate(tmp_path / IMAGE)
    flags = [*small(tmp_path / "data"), "--members", 1, "--workers", 1, "--out", tmp_path / "new"]
    code, _, err = command("train", *flags)
    assert code == 2 and "cannot read the image" in err and err.count("\n") == 1


def test_a_disk_that_refuses(folder, command, tmp_path, monkeypatch):
    flags = [*small(folder, "--epochs", 1), "--members", 1, "--save-every", 1e-9]
    flags += ["--out", tmp_path / "c"]
    real, calls = os.fsync, []

    def fsync(number):
        calls.append(number)
        if len(calls) == 2:  # the second state, where one is on the disk already
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(model.os, "fsync", fsync)
    code, _, err = command("train", *flags)
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    left = {path.name for path in (tmp_path / "c").iterdir()}
    assert "member_00.state" in left and not any(name.endswith("tmp") for name in left)
    code, out, _ = command("train", *flags)  # the disk has room again
    assert code == 0 and "continuing" in out


def test_a_folder_that_cannot_be_written(trained, command, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    flags = [*small(trained[0]), "--members", 1, "--out", tmp_path / "c"]
    code, _, err = command("train", *flags)
    assert code == 2 and "Permission denied" in err and err.count("\n") == 1


def test_a_full_memory_names_the_flag(folder, command, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")

    monkeypatch.setattr(train_ensemble, "cross_entropy", full)
    code, _, err = command("train", *small(folder), "--members", 1, "--out", tmp_path / "c")
    assert code == 2 and "--batch-size" in err and err.count("\n") == 1
    assert not list((tmp_path / "c").iterdir())


def test_data_deleted_while_it_trains(folder, command, tmp_path, monkeypatch):
    real = data.SegmentationDataset.read

    def read(self, index):
        shutil.rmtree(folder / "images", ignore_errors=True)
        return real(self, index)

    monkeypatch.setattr(data.SegmentationDataset, "read", read)
    code, _, err = command("train", *small(folder), "--members", 1, "--out", tmp_path / "c")
    assert code == 2 and "cannot read the image" in err and err.count("\n") == 1


FLAGS = [  # the command, its flags, words of the refusal
    ("train", ["--epochs", "nan"], "invalid int value"),
    ("train", ["--lr", "nan"], "--lr nan"), ("train", ["--lr", "inf"], "--lr inf"),
    ("train", ["--lr", 0], "--lr 0"), ("train", ["--warmup", -1], "--warmup -1"),
    ("train", ["--crop-size", -1, 32], "--crop-size -1"),
    ("train", ["--image-size", 0, 32], "--image-size 0"),
    ("train", ["--scale", 0, 1], "--scale 0"), ("train", ["--scale", 1, "inf"], "--scale 1"),
    ("train", ["--accumulate", 0], "--accumulate 0"), ("train", ["--seed", -1], "--seed -1"),
    ("train", ["--weight-decay", -1], "--weight-decay -1"),
    ("train", ["--workers", -1], "--workers -1"), ("train", ["--save-every", 0], "--save-every 0"),
    ("train", ["--head-lr-mult", 0], "--head-lr-mult 0"),
    ("train", ["--parallel", 0], "--parallel 0"), ("train", ["--members", 0], "--members 0"),
    ("train", ["--member-ids", "2"], "--member-ids 2"),
    ("train", ["--hold-out", "cat"], "no such class"),
    ("train", ["--hold-out", "class 0", "class 1", "class 2"], "leaves 1 classes"),
    ("train", ["--device", "cuda:9"], "--device cuda:9"),
    ("train", ["--dataset", "synthetic"], "the synthetic scenes are drawn"),
    ("train", ["--split", "nowhere"], "no folder images/nowhere"),
    ("distill", ["--uncertainty-weight", -1], "--uncertainty-weight -1"),
    ("distill", ["--uncertainty-weight", "nan"], "--uncertainty-weight nan"),
    ("distill", ["--views", -1], "--views -1"),
    ("distill", ["--mc-samples", 3], "name a single checkpoint"),
    ("distill", ["--hold-out", "class 1"], "the teacher knows the classes"),
    ("evaluate", ["--mc-samples", 3], "name a single checkpoint"),
    ("evaluate", ["--batch-size", 0], "--batch-size 0"),
    ("evaluate", ["--panels", -1], "--panels -1"),
    ("evaluate", ["--image-size", 0, 1], "--image-size 0"),
    ("evaluate", ["--predict", "x", "--ood"], "run --ood in a command of its own"),
    ("evaluate", ["--predict", "x", "--benchmark"], "run --benchmark in a command of its own"),
    ("evaluate", ["--in-distribution", "x"], "--ood, which is missing"),
    ("evaluate", ["--split", "test"], "no folder images/test"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FLAGS)))
def test_impossible_flags_are_refused_with_the_reason(trained, command, tmp_path, number):
    (folder, ckpts), (script, flags, words) = trained, FLAGS[number]
    base = {
        "train": [*small(folder), "--members", 2, "--out", tmp_path / "new"],
        "distill": ["--teacher", ckpts, "--device", "cpu", "--out", tmp_path / "new/s.pt"],
        "evaluate": ["--teacher", ckpts, "--device", "cpu", "--out", tmp_path / "new"],
    }[script]
    code, _, err = command(script, *base, *flags)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not contents(tmp_path)


def test_one_member_is_no_ensemble(trained, command, tmp_path):
    shutil.copy(trained[1] / "member_00.pt", tmp_path)
    rewrite(tmp_path / "member_00.pt", members=1)
    code, _, err = command("distill", "--teacher", tmp_path, "--device", "cpu")
    assert code == 2 and "--mc-samples" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------ odd data


def test_masks_of_one_class_and_of_nothing_but_void(tmp_path, command):
    folder = write_folder(tmp_path / "data", train=4, val=2)
    for number, value in enumerate((255, 255, 1, 1)):
        mask(folder / f"labels/train/{number}.png", value)
    for path in (folder / "labels/val").iterdir():
        mask(path, 255)
    out = tmp_path / "c"
    flags = [*small(folder, "--epochs", 1), "--members", 2, "--out", out]
    assert command("train", *flags)[0] == 0
    assert torch.isfinite(weights(out / "member_00.pt")).all()
    flags = ["--teacher", out, "--device", "cpu", "--head-epochs", 1]
    assert command("distill", *flags)[0] == 0
    flags = ["--student", out / "student.pt", "--teacher", out, "--device", "cpu"]
    code, _, err = command("evaluate", *flags, "--ood", "--out", tmp_path / "r")
    assert code == 0 and "Traceback" not in err
    assert '"miou": null' in (tmp_path / "r/metrics.json").read_text()


def test_images_smaller_than_the_crop_and_a_set_smaller_than_a_batch(tmp_path, command):
    folder = write_folder(tmp_path / "data", train=3, size=(20, 24))
    flags = [*small(folder, "--epochs", 1), "--batch-size", 8, "--members", 1]
    flags += ["--out", tmp_path / "c"]
    code, out, _ = command("train", *flags)
    assert code == 0 and "3 training images are less than a batch of 8" in out
    assert load_model(tmp_path / "c/member_00.pt")


# ------------------------------------------------------------------------------ processes


def test_members_dealt_out_are_the_same_and_a_student_trains_in_two_processes(trained, tmp_path):
    flags = [*small(trained[0]), "--members", 2, "--out", tmp_path]
    first, second = run_ranks("train_ensemble", *flags)
    assert first[0] == second[0] == 0, (first, second)
    assert first[1].count("training and") == 1 and second[1] == ""  # the first process alone speaks
    for name in ("member_00.pt", "member_01.pt"):
        assert torch.equal(weights(trained[1] / name), weights(tmp_path / name))
    curves = (tmp_path / "curves.svg").read_text()
    assert "member_00" in curves and "member_01" in curves

    flags = ["--teacher", tmp_path, "--batch-size", 4, "--epochs", 1, "--views", 1]
    flags += ["--head-epochs", 1, "--device", "cpu"]
    first, second = run_ranks("distill", *flags)
    assert first[0] == second[0] == 0, (first, second)
    for name in ("student", "student-head"):
        assert first[1].count(f"{name}  epoch 1/1") == 1
    assert second[1] == ""
    assert load_model(tmp_path / "student.pt").uncertainty is not None
    names = {path.name for path in tmp_path.glob("student*")}
    assert names == {"student.pt", "student.jsonl", "student-head.jsonl"}


def distil_an_epoch(rank, root, world, frozen):
    """A validation and an epoch of distillation, in one process or as one of two.

    frozen: batch norm stays as in evaluation, and a head learns alone for another epoch.
    """
    root, cpu = Path(root), torch.device("cpu")
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{root}/store", rank=rank, world_size=world
        )
    torch.manual_seed(0)
    teacher = Ensemble([DeepLabV3("resnet18", 4) for _ in range(2)])
    student = DeepLabV3("resnet18", 4, ("std",))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each process draws its own
    targets = distill.TeacherTargets(teacher, ["std"], False, "off")
    val_set = data.open_dataset("folder", root / "data", "val")  # 3 images

    def teacher_target(images, size, index):
        return targets.run_teacher(images, size, [0], ["std"])[:, 0]

    val_loader = data.evaluation_loader(val_set, 2, 0, cpu, rank, world)
    counts = evaluate.validate(student, val_loader, cpu, "off", teacher_target)

    train_set = data.open_dataset("folder", root / "data", "train")  # 14 = 5 + 5 + 4
    views = data.TrainingViews(train_set, (32, 32), (0.5, 2.0), [1, 2, 3])
    loader = data.training_loader(views, 5, 0, cpu, rank, world)
    optimizer = train_ensemble.build_optimizer(student, 0.05, 1.0, 5e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = train_ensemble.RunState()
    network = train_ensemble.wrap_for_group(student, cpu)
    if frozen:
        student.eval()
        student.train = lambda mode=True: student
    run = train_ensemble.Run(root / "s.pt", student, network, optimizer, scaler, state, [], [])
    loss_fn = functools.partial(
        distill.distillation_loss, targets=targets, uncertainty_weight=1.0, probs_weight=0.0
    )
    flags = flags_of(epochs=1, lr=0.05, warmup=0)
    steps = []
    progress = argparse.Namespace(show=lambda state, lr: steps.append(lr))
    train_ensemble.train_one_epoch(run, loss_fn, loader, flags, progress)
    sums = state.sums
    if frozen:
        student.requires_grad_(False)
        torch.manual_seed(0)
        student.add_uncertainty(("std", "error"), "confidence")
        parameters = list(student.uncertainty.parameters())
        run.optimizer = torch.optim.SGD([{"params": parameters, "lr_mult": 1.0}], 0.05)
        run.wrapped_model = train_ensemble.wrap_for_group(student, cpu)
        run.state = train_ensemble.RunState()
        loss_fn = functools.partial(distill.head_loss, targets=targets)
        train_ensemble.train_one_epoch(run, loss_fn, loader, flags, progress)
        sums |= {f"{name} of the head": value for name, value in run.state.sums.items()}
    result = {
        "weights": student.state_dict(),
        "counts": counts,
        "steps": len(steps),
        "sums": sums,
    }
    torch.save(result, root / f"{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def distil_alone_and_in_two(root, frozen):
    """The results of one process, and of each of two."""
    distil_an_epoch(0, root, 1, frozen)
    in_two_processes(distil_an_epoch, str(root), 2, frozen)
    return [torch.load(root / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


def test_two_processes_distil_as_one(tmp_path):
    folder = write_folder(tmp_path / "data", train=14)
    for number in (0, 3, 7):  # unequal numbers of void pixels
        mask(folder / f"labels/train/{number}.png", 255)
    alone, *both = distil_alone_and_in_two(tmp_path, frozen=True)
    for result in both:
        assert result["steps"] == alone["steps"] == 3 + 3
        assert result["counts"]["n"] == alone["counts"]["n"]
        assert result["counts"]["iou"] == alone["counts"]["iou"]  # exactly, though 3 is odd
        for key in ("fidelity_pearson", "fidelity_rmsle"):
            assert result["counts"][key] == pytest.approx(alone["counts"][key], abs=1e-4)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-5, atol=1e-5)
        for name, value in alone["sums"].items():
            torch.testing.assert_close(result["sums"][name], value, rtol=1e-5, atol=1e-5)


def test_two_processes_share_the_statistics_of_batch_norm(tmp_path):
    write_folder(tmp_path / "data", train=5)  # a batch of 3 and 2
    alone, first, second = distil_alone_and_in_two(tmp_path, frozen=False)
    # one step: with more, batch norm over so few pixels amplifies the rounding of the first
    assert first["steps"] == alone["steps"] == 1
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        tolerance = 1e-4 if "running" in name else 1e-5
        close = dict(rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(first["weights"][name], value, **close)


# ------------------------------------------------------------------------------ what people leave


def test_copies_and_missing_logs_beside_members_do_no_harm(trained, command, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(trained[1], out)
    (out / "member_00.jsonl").unlink()  # a checkpoint that was brought from another machine
    shutil.copy(out / "member_01.pt", out / "member_00_old.pt")
    code, text, err = command("train", *small(trained[0]), "--members", 2, "--out", out)
    assert code == 0 and f"2 members in {out}" in text, err
    curves = (out / "curves.svg").read_text()
    assert "member_01" in curves and "member_00" not in curves
    assert [path.name for path in model.find_members(out)] == ["member_00.pt", "member_01.pt"]


def test_tidying_up_leaves_alone_what_another_training_writes(tmp_path):
    """Beside student.pt that of student.v2.pt was removed, which then ended with an error."""
    ours = {".student.pt.1.tmp", ".student.state.1.tmp", ".student.targets.json.1.tmp"}
    others = {".student.v2.pt.2.tmp", ".student.v2.state.2.tmp", ".student_2.state.2.tmp"}
    for name in ours | others:
        (tmp_path / name).touch()
    train_ensemble.remove_files(tmp_path / "student.pt", train_ensemble.UNFINISHED)
    assert {path.name for path in tmp_path.iterdir()} == others


NO_GROUPS = {"state": {}, "param_groups": []}


@pytest.mark.parametrize(
    "of_that_version",
    [
        {"seen": 0},
        {"best_weights": {}, "model": {"another.layer": torch.zeros(1)}},
        {"best_weights": {}, "optimizer": NO_GROUPS},
    ],
    ids=["other entries", "other layers", "other groups of layers"],
)
def test_the_state_of_another_version_is_refused_in_one_line(
    trained, command, tmp_path, of_that_version
):
    flags = [*small(trained[0]), "--members", 1, "--out", tmp_path]
    member = train_ensemble.read_checkpoint(trained[1] / "member_00.pt")
    saved = {"args": member["args"], "epoch": 0, "model": member["model"], **of_that_version}
    torch.save(saved, tmp_path / "member_00.state")
    code, _, err = command("train", *flags)
    assert code == 2 and "was written by another version" in err and err.count("\n") == 1


def test_only_the_first_of_a_group_looks_at_what_stored_targets_depend_on(tmp_path):
    path, shape, largest = tmp_path / "t.npy", (1, 2, 1, 4, 4), torch.ones(1, 1, 1)
    distill.TargetCache(path, shape, largest, {"times of files": 1}).targets[:] = 7
    other = distill.TargetCache(path, shape, largest, identity=None)
    assert (other.targets == 7).all()
