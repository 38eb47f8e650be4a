"""Processes that begin where torch is imported already.

A new interpreter takes seconds to import torch. The processes of this file are forks of a server
that imported it once. Where a test is about the interpreter itself (its streams as a shell leaves
them, torchrun, processes that the project starts), it starts a real one.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.run

import evaluate

ROOT = Path(__file__).parent.parent
MODULES = ["torch", "torchvision", "torch.distributed.run", "torch._dynamo", "pytest", "distill"]
SERVER = multiprocessing.get_context("forkserver")


def start_server():
    """Start the server, unless it runs; it finds the project's modules in the working folder."""
    SERVER.set_forkserver_preload(MODULES)
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()


def in_two_processes(function, *arguments):
    """function(rank, *arguments) for the ranks 0 and 1, each in a process of its own."""
    start_server()
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def run_command(name, *flags):
    """The exit code of a command of the project, named by its module."""
    module = importlib.import_module(name)
    words = [str(flag) for flag in flags]
    return evaluate.run_main(module.main, module.get_args_parser(), words)


class SpawnProcess(multiprocessing.context.ForkProcess):
    """A fork of this process, with the name of an interpreter that it would start."""


def run_with_forks(name, *flags):
    """A command of the project whose own processes are forks of its process."""
    shared = multiprocessing.RawArray
    context = SimpleNamespace(Process=SpawnProcess, RawArray=shared)
    torch.multiprocessing.get_context = lambda method: context
    return run_command(name, *flags)


class Forked:
    """function(*arguments) in a process of its own, as subprocess.Popen has one.

    What the function returns is the exit code; stdout and stderr are pipes. environment: variables
    that the process has beside those of here.
    """

    def __init__(self, function, *arguments, environment=None):
        start_server()
        stdout, stdout_of_process = SERVER.Pipe(duplex=False)
        stderr, stderr_of_process = SERVER.Pipe(duplex=False)
        streams = (stdout_of_process, stderr_of_process)
        self.process = SERVER.Process(
            target=call_with_streams,
            args=(streams, environment or {}, function, arguments),
            daemon=True,  # it ends with the tests, should one fail
        )
        self.process.start()
        for stream in streams:
            stream.close()
        self.stdout = open(os.dup(stdout.fileno()), errors="surrogateescape")
        self.stderr = open(os.dup(stderr.fileno()), errors="surrogateescape")

    def poll(self):
        """The exit code, None while it runs."""
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        """End it by SIGKILL, as a power failure does."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
        self.process.join()

    def finish(self):
        """Wait for its end: exit code, stdout, stderr."""
        out = ""
        if not self.stdout.closed:
            out = self.stdout.read()
        err = self.stderr.read()
        self.process.join(timeout=120)
        return self.poll(), out, err


def call_with_streams(streams, environment, function, arguments):
    """The process itself, which does not know that it has a parent.

    By their names the project tells a command, MainProcess, from the processes that it starts, of
    which the first is SpawnProcess-1.
    """
    process = multiprocessing.current_process()
    process.name = "MainProcess"
    process.daemon = False  # it may have children
    process._identity = ()
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream.fileno(), number)
        stream.close()
    # the server's own streams may be files, in which a text stream keeps its place
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.update(environment)
    sys.exit(function(*arguments))


def torchrun(*words):
    """What the command torchrun does with those words: the processes that it starts are real."""
    torch.distributed.run.main([str(word) for word in words])


def run_ranks(name, *flags):
    """A command as torchrun starts it, in two processes; for each exit code, stdout, stderr."""
    port = free_port()
    processes = []
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(Forked(run_command, name, *flags, environment=environment))
    return [process.finish() for process in processes]


def free_port():
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
