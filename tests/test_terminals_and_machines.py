"""Terminals, pipes, disks, old Pythons and other people's weights, as users have them.

Each test says in one line what a user reported.
"""

import argparse
import ast
import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import tomllib

import pytest
import torch
import torchvision
from conftest import small, weights
from processes import ROOT, Forked, run_command, run_ranks, run_with_forks, torchrun

import data
import distill
import evaluate
import model
import train_ensemble
from model import DeepLabV3, ModelError, load_weights

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def script(name, *flags):
    """The words of a command for a real process."""
    return [sys.executable, str(ROOT / name), *(str(flag) for flag in flags)]


def shell(command, words, **environment):
    """Run a line of bash in which "$@" stands for the words: (exit code, stdout, stderr)."""
    process = subprocess.run(
        ["bash", "-c", command, "bash", *words], capture_output=True, env=ONE_THREAD | environment
    )
    out = process.stdout.decode(errors="surrogateescape")
    return process.returncode, out, process.stderr.decode(errors="surrogateescape")


def evaluation(ckpts, out, *flags):
    """Flags of the shortest evaluation."""
    return ("--student", ckpts / "student.pt", "--device", "cpu", "--panels", 0, "--out", out,
            *flags)  # fmt: skip


# ------------------------------------------------------------------ memory

PAGES = """
import resource, torch, model

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(4_000_000) for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages()
returned = pages()
model.choose_device("cpu")
pages()
print(returned, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does is changed")
def test_the_memory_of_a_tensor_is_kept_for_the_next():
    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[always]" in huge.read_text():
        pytest.skip("huge pages are too few to be counted")
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    # Left alone, glibc keeps some of such tensors by chance: what lies above them decides.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    process = subprocess.run(
        [sys.executable, "-c", PAGES], cwd=ROOT, capture_output=True, env=environment, text=True
    )
    assert process.returncode == 0, process.stderr
    returned, kept = (int(number) for number in process.stdout.split())
    pages_of_tensors = 10 * 4 * 16_000_000 / resource.getpagesize()
    assert returned > pages_of_tensors / 2 and kept < pages_of_tensors / 100


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(model.ctypes, "CDLL", lambda name: object())
    model.keep_freed_memory()


# ------------------------------------------------------------------ scores beyond float16


def test_energy_of_large_logits_gets_a_warning(trained, command, tmp_path):
    """The AUROC of `energy` was 50 % without a word: its values were above 65,504."""
    checkpoint = torch.load(trained[1] / "student.pt", weights_only=True)
    for name in ("classifier.4.weight", "classifier.4.bias"):
        checkpoint["model"][name] *= 1e9
    torch.save(checkpoint, tmp_path / "student.pt")
    code, _, err = command("evaluate", *evaluation(tmp_path, tmp_path / "out", "--ood", "pasted"))
    assert code == 0
    for name in ("val", "OOD pasted"):
        assert re.search(f"^warning: {name}: .*student/energy [0-9.]+ %", err, re.MULTILINE)
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for scores in (results["uncertainty"], results["ood"]["pasted"]):
        assert 0.5 < scores["student/energy"]["beyond_float16"] <= 1
        assert "beyond_float16" not in scores["student/msp"]


def test_the_share_beyond_float16_is_that_of_the_labelled_pixels():
    """A few pixels of a map were infinite as float16; void ones are not asked."""
    detection = evaluate.metrics.Detection()
    scores = torch.tensor([1.0, 7e4, -7e4, 7e4, 65504.0, 2.0])
    detection.update(scores, torch.tensor([0, 1, 1, 255, 0, 0]))
    assert evaluate.detection_results(detection)["beyond_float16"] == pytest.approx(2 / 5)


# ------------------------------------------------------------------ names and encodings

CAFE = os.fsdecode(b"caf\xe9")  # Latin-1, which is no UTF-8


def run_with_stdout(encoding, errors, name, *flags):
    """A command with the stdout of an environment."""
    sys.stdout.reconfigure(encoding=encoding, errors=errors)
    return run_command(name, *flags)


@pytest.mark.parametrize("stdout", [("utf-8", "surrogateescape"), ("ascii", "strict"), "POSIX"])
def test_a_latin_1_name_ends_no_evaluation(trained, tmp_path, stdout):
    """After hours a traceback: report.html could not be written, for an image was caf\\xe9.png."""
    folder = tmp_path / f"data_{CAFE}"
    shutil.copytree(trained[0], folder)
    for kind in ("images", "labels"):
        (folder / kind / "val" / "0.png").rename(folder / kind / "val" / f"{CAFE}.png")
    out = tmp_path / f"results_{CAFE}"
    flags = ("--student", trained[1] / "student.pt", "--device", "cpu", "--out", out)
    flags += ("--data", folder, "--panels", 3, "--save-scores", tmp_path / "scores")
    if stdout == "POSIX":  # ASCII for the names of files too, from the start of the interpreter
        environment = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        code, text, err = shell('"$@"', script("evaluate.py", *flags), **environment)
    else:
        code, text, err = Forked(run_with_stdout, *stdout, "evaluate", *flags).finish()
    assert (code, err) == (0, "")
    assert "3 panels" in text
    assert len(list((out / "panels").glob(f"*{CAFE}.png"))) == 1
    assert (tmp_path / "scores" / "val" / "student-msp" / f"{CAFE}.npy").exists()
    assert "caf?" in (out / "report.html").read_text(encoding="utf-8")
    json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def test_class_names_beyond_ascii_are_printed_anywhere(monkeypatch):
    """UnicodeEncodeError at a print on a terminal that is not UTF-8."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)

    def speak():
        print("Straße", flush=True)
        print(os.fsdecode(b"\xff"))

    assert evaluate.exit_code_of(speak) == 0
    assert terminal.buffer.getvalue() == b"Stra\\xdfe\n\\udcff\n"


# ------------------------------------------------------------------ nothing is lost


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "step, unfinished",
    [
        ("evaluate_ood", "ood pasted, timing"),
        ("benchmark", "timing"),
        ("draw_panels", None),
        ("report", None),
        ("chart_sheet", None),
    ],
)
def test_results_stay_where_a_later_step_fails(
    trained, command, tmp_path, monkeypatch, step, unfinished
):
    """The disk was full at the first panel, and hours of evaluation were lost."""
    monkeypatch.setattr(evaluate, step, no_space)
    flags = evaluation(trained[1], tmp_path, "--ood", "pasted", "--benchmark", "--no-compile")
    code, out, err = command("evaluate", *flags)
    assert code == 2 and err.startswith("error: No space left") and err.count("\n") == 1
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["segmentation"]["student"]["n"] > 0
    assert results["protocol"].get("unfinished") == unfinished
    assert ("Segmentation" in out) == (unfinished is None)  # the table comes before the pictures


# ------------------------------------------------------------------ other people's weights


def reference_training(path, **further):
    """A checkpoint as torchvision's references/segmentation/train.py writes it."""
    network = torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    args = argparse.Namespace(data_path="/datasets/coco", lr=0.01, device="cuda", aux_loss=False)
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 29}
    torch.save(content | {"args": args} | further, path)
    return network


def test_weights_of_torchvisions_reference_training(tmp_path):
    """Called damaged, with escape codes: its `args` are an argparse.Namespace."""
    path = tmp_path / "model_29.pth"
    network = reference_training(path)
    loaded = DeepLabV3("resnet50", 21)
    line = load_weights(loaded, str(path), "resnet50")
    assert torch.equal(loaded.backbone.conv1.weight, network.backbone.conv1.weight)
    assert torch.equal(loaded.classifier[4].weight, network.classifier[4].weight)
    assert line.endswith(", 0 random")


@pytest.fixture(scope="module")
def resnet18_weights():
    return torchvision.models.resnet18().state_dict()


@pytest.mark.parametrize(
    "prefix, key",
    [
        ("module.", "state_dict"),
        ("_orig_mod.", "model"),
        ("module._orig_mod.", "model"),
        ("_orig_mod.module.", None),
        ("model.", "state_dict"),
        ("net.", "state_dict"),
        ("model._orig_mod.backbone.", "state_dict"),
        ("network.", "model_state_dict"),
        ("backbone._orig_mod.", None),
        ("_fsdp_wrapped_module.model.", "model"),
    ],
)
def test_prefixes_of_wrappers_come_off(resnet18_weights, tmp_path, prefix, key):
    """Weights of a compiled, a distributed or a Lightning training "do not fit backbone"."""
    state = {prefix + name: value for name, value in resnet18_weights.items()}
    torch.save({key: state} if key else state, tmp_path / "w.pt")
    network = DeepLabV3("resnet18", 3)
    load_weights(network, str(tmp_path / "w.pt"), "resnet18")
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, resnet18_weights[name])


def test_prefixes_of_torchvisions_mobilenet_come_off(tmp_path):
    """The same for a network whose own names begin with `features`."""
    classifier = torchvision.models.mobilenet_v3_large()
    state = {"module.model." + name: value for name, value in classifier.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    network = DeepLabV3("mobilenet_v3_large", 3)
    load_weights(network, str(tmp_path / "w.pt"), "mobilenet_v3_large")
    assert torch.equal(network.backbone[0][0].weight, classifier.features[0][0].weight)


def test_two_networks_in_one_file_are_refused(resnet18_weights, tmp_path):
    """A file with a network and its moving average: which one was taken depended on the order."""
    state = {}
    for prefix in ("model.", "net."):
        for name, value in resnet18_weights.items():
            state[prefix + name] = value
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="hold two networks, as model.conv1.weight and net.conv1"):
        load_weights(DeepLabV3("resnet18", 3), str(tmp_path / "w.pt"), "resnet18")


@pytest.mark.parametrize(
    "content, words",
    [
        (
            {"model": {}, "args": pathlib.PurePosixPath("a")},
            r"more than tensors: pathlib.*state_di",
        ),
        ({"model": torch.nn.ReLU()}, r"more than tensors: torch.nn.*save its weights alone"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "name a file that torch.save wrote"),
        (b"", "it is empty"),
    ],
)
def test_why_weights_cannot_be_read_is_one_plain_line(tmp_path, content, words):
    """The error for a file of weights was advice of torch with escape codes in it."""
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=words) as caught:
        load_weights(DeepLabV3("resnet18", 3), str(path), "resnet18")
    assert str(caught.value).isprintable()


def test_a_reference_training_is_no_checkpoint_of_this_project(tmp_path):
    """The same file named as --teacher."""
    reference_training(tmp_path / "a.pt", config=argparse.Namespace(backbone="resnet50"))
    with pytest.raises(ModelError, match="no checkpoint of this project: it lacks args, config"):
        model.read_checkpoint(tmp_path / "a.pt")


# ------------------------------------------------------------------ file systems


def train_without_locks(*flags):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.lockf = lockf
    return run_with_forks("train_ensemble", *flags)


def test_a_file_system_without_locks_is_said_once(trained, tmp_path):
    """On a network disk: "No locks available; free the disk"."""
    flags = (*small(trained[0]), "--members", 2, "--parallel", 2, "--out", tmp_path / "out")
    code, _, err = Forked(train_without_locks, *flags).finish()
    assert code == 0
    assert err.startswith(f"note: the file system of {tmp_path / 'out'} has no locks")
    assert err.count("\n") == 1
    assert torch.equal(weights(tmp_path / "out/member_01.pt"), weights(trained[1] / "member_01.pt"))
    assert not list((tmp_path / "out").glob("*.lock"))


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL"])
def test_whatever_says_that_there_are_no_locks(tmp_path, monkeypatch, capsys, name):
    """Disks outside of the kernel have other numbers for it."""

    def lockf(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(model.fcntl, "lockf", lockf)
    for file in ("a.pt", "b.pt"):
        with model.locked(tmp_path / file):
            pass
    assert capsys.readouterr().err.count("has no locks") == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    """A disk that fails while it is asked for a lock is no disk without locks."""

    def lockf(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(model.fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="Input/output"), model.locked(tmp_path / "a.pt"):
        pass


def test_a_file_system_that_cannot_flush_is_written_to(tmp_path, monkeypatch):
    """fsync on a disk outside of the kernel: EINVAL, a traceback."""

    def fsync(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    model.save_atomically(tmp_path / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


NETWORK = "ENOTCONN ESTALE ECONNREFUSED ECONNRESET ETIMEDOUT EHOSTUNREACH ENETUNREACH EKEYEXPIRED"
DISK = "EIO EUCLEAN EBADMSG ENOMEDIUM EROFS ENOSPC EDQUOT EFBIG ENODEV EOPNOTSUPP ENOSYS EXDEV"
NAMES = "EINVAL EILSEQ ENAMETOOLONG ELOOP ENXIO"
LIMITS = "EAGAIN EMFILE ENFILE ENOMEM"


@pytest.mark.parametrize("name", f"{NETWORK} {DISK} {NAMES} {LIMITS}".split())
def test_every_refusal_of_a_system_has_its_remedy(capsys, name):
    """A dead mount, an expired ticket, a name that exFAT refuses: tracebacks."""
    number = getattr(errno, name)

    def refuse():
        raise OSError(number, os.strerror(number), "a:b")

    assert evaluate.exit_code_of(refuse) == 2
    assert re.fullmatch(r"error: .* \(a:b\); .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "text",
    [
        "unable to write to file </torch_1_2_3>: No space left on device (28)",
        "unable to open shared memory object </torch_1_2_3> in read-write mode",
        "can't start new thread",
        "Too many open files. Communication with the workers is no longer possible.",
    ],
)
def test_limits_that_arrive_as_runtime_errors_have_a_remedy(capsys, text):
    """/dev/shm of a container is 64 MB; a cluster counts threads: tracebacks."""

    def fail():
        raise RuntimeError(text)

    assert evaluate.exit_code_of(fail) == 2
    assert "use fewer --workers" in capsys.readouterr().err


# ------------------------------------------------------------------ pipes and closed streams


def run_with_one_pipe(name, *flags):
    """A command with `2>&1`."""
    os.dup2(1, 2)
    return run_command(name, *flags)


def run_with_closed_streams(numbers, name, *flags):
    """A command with `>&-`, `2>&-` or both; Python has None for what is closed."""
    for number in numbers:
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
    return run_command(name, *flags)


@pytest.mark.parametrize(
    "parallel, run", [(1, run_command), (2, run_with_forks), (1, run_with_one_pipe)]
)
def test_a_training_outlives_its_listener(trained, tmp_path, parallel, run):
    """`train_ensemble.py | head -1` ended the training: "Broken pipe; free the disk"."""
    flags = (*small(trained[0]), "--members", 2, "--out", tmp_path, "--parallel", parallel)
    process = Forked(run, "train_ensemble", *flags)
    assert process.stdout.readline().endswith(" classes\n")
    process.stdout.close()
    code, _, err = process.finish()
    assert code == 0
    for name in ("member_00.pt", "member_01.pt"):
        assert torch.equal(weights(tmp_path / name), weights(trained[1] / name))
    if run is run_with_one_pipe:
        assert err == ""
    else:
        lines = set(err.splitlines())
        text = "note: the program that read the output has ended; the work goes on without it"
        assert lines == {text}


def test_an_evaluation_outlives_its_listener(trained, tmp_path):
    """The same for an evaluation; its results are files."""
    process = Forked(run_command, "evaluate", *evaluation(trained[1], tmp_path))
    process.stdout.close()
    code, _, err = process.finish()
    assert code == 0 and err.startswith("note: ") and err.count("\n") == 1
    assert (tmp_path / "metrics.json").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("closed", [(2,), (1,), (1, 2)])
def test_closed_streams_change_nothing(trained, tmp_path, closed):
    """With stderr closed: exit code 1 and no message."""
    flags = evaluation(trained[1], tmp_path)
    code, out, err = Forked(run_with_closed_streams, closed, "evaluate", *flags).finish()
    assert code == 0 and err == ""
    assert ("Segmentation" in out) == (1 not in closed)
    json.loads((tmp_path / "metrics.json").read_text())


def test_streams_that_a_shell_closed_change_nothing(trained, tmp_path):
    """The same of a whole interpreter, with all three closed."""
    words = script("evaluate.py", *evaluation(trained[1], tmp_path))
    code, out, err = shell('"$@" <&- >&- 2>&-', words)
    assert (code, out, err) == (0, "", "")
    json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.parametrize("flags", [("--student", "no.pt"), ("--bogus",)])
def test_an_error_is_seen_where_stderr_is_closed(flags):
    """The same, of an error, of the training and of the command line."""
    code, out, err = Forked(run_with_closed_streams, (2,), "evaluate", *flags).finish()
    begin = "error: no such checkpoint" if "no.pt" in flags else "error: "
    assert code == 2 and out.startswith(begin) and err == ""


def test_a_closed_stderr_takes_no_part_in_a_training(trained, tmp_path):
    """With 2>&- a training in two processes (interpreters of their own) ended in other weights."""
    flags = (*small(trained[0]), "--members", 2, "--out", tmp_path, "--parallel", 2)
    process = Forked(run_with_closed_streams, (2,), "train_ensemble", *flags)
    code, out, err = process.finish()
    assert code == 0 and "2 members in" in out and err == ""
    assert torch.equal(weights(tmp_path / "member_01.pt"), weights(trained[1] / "member_01.pt"))


def test_a_terminal_that_was_closed_ends_no_work(monkeypatch, capsys):
    """A terminal was closed below `disown`ed work: EIO, "the disk fails"."""
    controller, terminal = os.openpty()
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        os.close(controller)

        def work():
            print("a line", flush=True)
            print("done", file=sys.stderr)

        assert evaluate.exit_code_of(work) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: ") and err.endswith("\ndone\n")


# ------------------------------------------------------------------ the live line


class Screen:
    """The rows of a terminal: a full row goes on in the next one, a narrower window cuts."""

    def __init__(self):
        self.rows = [""]
        self.column = 0

    def feed(self, text, columns):
        self.rows = [row[:columns] for row in self.rows]
        for character in text:
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.rows.append("")
                self.column = 0
            else:
                if self.column >= columns:
                    self.rows.append("")
                    self.column = 0
                row = self.rows[-1].ljust(self.column)
                self.rows[-1] = row[: self.column] + character + row[self.column + 1 :]
                self.column += 1

    def text(self):
        return [row.rstrip() for row in self.rows]


class PseudoTerminal:
    """A live line on a terminal of a size that may change."""

    def __init__(self):
        self.controller, terminal = os.openpty()
        self.stderr = open(terminal, "w", encoding="utf-8")
        with contextlib.redirect_stderr(self.stderr):
            self.line = evaluate.LiveLine()

    def show(self, words, columns):
        """What the terminal gets for one line of words while it has so many columns."""
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.controller, termios.TIOCSWINSZ, size)
        with contextlib.redirect_stderr(self.stderr):
            if words == "clear":
                self.line.clear()
            elif words.startswith("print "):
                print(words.removeprefix("print "), file=sys.stderr)
            else:
                self.line.show(words)
        print(end="\0", file=self.stderr, flush=True)  # the end of what was shown
        received = b""
        while not received.endswith(b"\0"):
            received += os.read(self.controller, 65536)
        return received.removesuffix(b"\0").decode()


@pytest.fixture
def pseudo_terminal():
    terminal = PseudoTerminal()
    yield terminal
    terminal.stderr.close()
    os.close(terminal.controller)


@pytest.mark.parametrize("columns", [10, 40, 79, 80, 81, 100, 132, 300])
def test_the_live_line_stays_on_its_row(pseudo_terminal, columns):
    """At 80 columns every update left a row: it was padded to 100."""
    screen = Screen()
    for words in ("x" * 200, "short", "y" * 79, "z" * 100, "clear", "print epoch 1"):
        screen.feed(pseudo_terminal.show(words, columns), columns)
        if words == "short":
            assert screen.text() == ["short"]
    assert screen.text() == ["epoch 1", ""]


def test_the_live_line_follows_a_window(pseudo_terminal):
    """A window was made narrower, then wider, while it trained."""
    screen = Screen()
    for columns in (120, 60, 30, 90, 200, 80):
        screen.feed(pseudo_terminal.show("w" * 300, columns), columns)
        assert screen.text() == ["w" * (columns - 1)]
        screen.feed(pseudo_terminal.show("short", columns), columns)
        assert screen.text() == ["short"]


def test_the_live_line_counts_columns_not_characters(pseudo_terminal):
    """A student called 学生.pt took two columns a character: every update left a row."""
    shown = pseudo_terminal.show("学生" * 100, 80)
    assert shown.isascii() and len(shown.strip("\r")) <= 79
    pseudo_terminal.show("clear", 80)


def test_a_closed_terminal_is_a_reason_to_save():
    """A terminal was closed, or ssh broke: up to five minutes of a training were lost."""
    handler_of_tests = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # they may run under nohup
    with train_ensemble.noted_signals() as caught:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # of the kernel and of the shell
        assert caught == [signal.SIGHUP]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with train_ensemble.noted_signals() as caught:
        os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
    assert signal.signal(signal.SIGHUP, handler_of_tests) == signal.SIG_IGN


class HangingUp(torch.utils.data.Dataset):
    """Two numbers, while the first of which is loaded the terminal is closed."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 0:
            os.kill(os.getpid(), signal.SIGHUP)
        return index


def test_a_closed_terminal_ends_no_process_that_loads():
    """It gets the signal too; where it is no fork (Python 3.14), it died and nothing was saved."""
    settings = data.worker_settings(1, torch.device("cpu"))
    loader = torch.utils.data.DataLoader(HangingUp(), batch_size=None, **settings)
    assert list(loader) == [0, 1]


@pytest.mark.parametrize("words", [("--out", ""), ("--out=",), ("",)])
def test_an_empty_word_is_no_folder(command, words):
    """--out "$RESULTS" with RESULTS unset wrote into the folder where the shell stood."""
    code, _, err = command("train", *words)
    assert code == 2 and err.startswith("error: an empty word after") and err.count("\n") == 1


@pytest.mark.parametrize("module", [train_ensemble, distill, evaluate])
def test_help_without_docstrings(module, monkeypatch):
    """python -OO, or PYTHONOPTIMIZE=2 in a container: a traceback at the start."""
    monkeypatch.setattr(module, "__doc__", None)
    assert module.get_args_parser().format_help().startswith("usage: ")


# ------------------------------------------------------------------ torchrun


def test_torchrun_of_an_evaluation_says_that_it_is_for_one_process(trained, command, tmp_path):
    """One process worked, the other failed at its lock with torchrun's traceback."""
    words = ["--standalone", "--nproc-per-node=2", ROOT / "evaluate.py"]
    words += evaluation(trained[1], tmp_path / "two")
    both = Forked(torchrun, *words)
    assert command("evaluate", *evaluation(trained[1], tmp_path / "one"))[0] == 0
    code, out, err = both.finish()
    assert code == 0
    assert err.count("works in one process") == 1 and "Traceback" not in err
    assert out.count("Segmentation") == 1
    results = []
    for name in ("one", "two"):
        results.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert results[0]["segmentation"] == results[1]["segmentation"]


@pytest.mark.parametrize("name", ["evaluate", "distill"])
def test_torchrun_of_a_wrong_flag_is_one_line(name):
    """Every process printed the same error."""
    first, second = run_ranks(name, "--bogus")
    assert first[0] == second[0] == 2
    errors = first[2] + second[2]
    assert errors.count("error: unrecognized arguments: --bogus") == 1


# ------------------------------------------------------------------ old Pythons

SCRIPTS = ("train_ensemble.py", "distill.py", "evaluate.py")
OLD = "import runpy, sys; sys.version_info = (3, 10, 13); runpy.run_path(sys.argv[1])"


def old_pythons():
    """The interpreters of this machine that are too old, and the present one in disguise."""
    commands = [[sys.executable, "-c", OLD]]
    for minor in range(6, 11):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            commands.append([path])
    return commands


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_old_python_is_told_so_in_one_line(name):
    """With Python 3.10 everything installed, and then every checkpoint was called damaged."""
    for command in old_pythons():
        process = subprocess.run([*command, ROOT / name], capture_output=True, text=True)
        assert process.returncode == 2, process.stderr
        assert re.fullmatch(r"error: .*Python 3\.11 or newer\n", process.stderr)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_old_python_can_read_the_scripts_to_their_end(name):
    """A line that an older Python cannot parse would be met before the line that says why."""
    ast.parse((ROOT / name).read_text(), feature_version=(3, 9))
    first = [node for node in ast.parse((ROOT / name).read_text()).body][1:3]
    assert isinstance(first[0], ast.Import) and isinstance(first[1], ast.If)


def test_every_place_names_the_same_python():
    """requirements.txt alone installs on Python 3.10, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in (ROOT / "README.md").read_text()
