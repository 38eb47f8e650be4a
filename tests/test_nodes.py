"""Two nodes: two torchrun processes of this machine, which share a folder and nothing else."""

import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from conftest import small, weights
from processes import ROOT, Forked, free_port, torchrun

from model import load_model

NODES = 2
# The files that a node makes tell by their permissions which node it was.
UMASKS = (0o022, 0o077)
PERMISSIONS = (0o644, 0o600)


class Nodes:
    """The same command on every node, each in a torchrun of its own with one process."""

    def __init__(self, script, *flags):
        port = free_port()
        self.processes = []
        for node in range(NODES):
            words = [UMASKS[node], f"--nnodes={NODES}", "--nproc-per-node=1", f"--node-rank={node}"]
            words += ["--master-addr=127.0.0.1", f"--master-port={port}", ROOT / script, *flags]
            self.processes.append(Forked(run_node, *words))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for node in range(NODES):
            self.kill(node)

    def kill(self, node):
        """End a node as a power failure does: torchrun and its process, with no word to anybody."""
        launcher = self.processes[node]
        if launcher.poll() is None:
            for pid in children_of(launcher.process.pid):
                os.kill(pid, signal.SIGKILL)
            launcher.kill()

    def finish(self):
        """Wait for both; their exit codes, outputs and errors, in the nodes' order."""
        codes, outputs, errors = zip(*[node.finish() for node in self.processes], strict=True)
        return list(codes), outputs, errors


def run_node(umask, *words):
    """torchrun, whose files have the permissions that a umask leaves."""
    os.umask(umask)
    torchrun(*words)


def children_of(parent):
    """The processes that `parent` has started."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
        except OSError:  # it has ended meanwhile
            continue
        parent_of_it = int(status.rpartition(")")[2].split()[1])
        if parent_of_it == parent:
            children.append(int(folder.name))
    return children


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def test_members_are_dealt_out_over_two_nodes(trained, shared):
    folder, ckpts = trained
    flags = [*small(folder), "--members", 2, "--out", shared]
    with Nodes("train_ensemble.py", *flags) as nodes:
        codes, outputs, errors = nodes.finish()
    assert codes == [0, 0], errors
    assert "member_00  epoch 2/2" in outputs[0]
    assert outputs[1] == ""  # the first process alone speaks
    for member in range(2):
        path = shared / f"member_{member:02d}.pt"
        # a single process has trained `ckpts`
        assert torch.equal(weights(path), weights(ckpts / path.name))
        assert permissions(path) == PERMISSIONS[member]
        assert permissions(path.with_suffix(".jsonl")) == PERMISSIONS[member]
    names = {path.name for path in shared.iterdir()}
    members = {"member_00.pt", "member_00.jsonl", "member_01.pt", "member_01.jsonl"}
    assert names == members | {"curves.svg"}


def test_a_student_of_two_nodes_goes_on_after_one_was_killed(trained, tmp_path):
    _, ckpts = trained
    path = tmp_path / "student.pt"
    state = path.with_suffix(".state")
    flags = ["--teacher", ckpts, "--batch-size", 4, "--epochs", 4, "--head-epochs", 1]
    flags += ["--views", 1]
    flags += ["--device", "cpu", "--save-every", 1e-9, "--out", path]
    with Nodes("distill.py", *flags) as nodes:
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        nodes.kill(1)
        codes, _, errors = nodes.finish()
    assert codes[0] == 1 and codes[1] == -signal.SIGKILL, errors
    assert "error: the group of processes broke (" in errors[0], errors[0]
    assert state.exists() and not path.exists()

    with Nodes("distill.py", *flags) as nodes:
        codes, outputs, errors = nodes.finish()
    assert codes == [0, 0], errors
    assert "student: continuing at epoch" in outputs[0]
    assert outputs[1] == ""
    log = path.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3, 4]
    assert load_model(path).uncertainty is not None
    left = list(tmp_path.iterdir())
    names = {file.name for file in left}
    assert names == {"student.pt", "student.jsonl", "student-head.jsonl"}
    for file in left:
        assert permissions(file) == PERMISSIONS[0]
