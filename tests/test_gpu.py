"""What tests/gpu.sh does on a GPU, as far as a CPU can show it, and tests that run on both."""

import subprocess
import warnings
from pathlib import Path

import benchmarks
import pytest
import torch
from benchmarks import Cost, Setting, measure_cost, noted_waits, shortfalls
from conftest import small, weights
from torch import nn

import metrics
import train_ensemble
from model import DeepLabV3, Ensemble, choose_device

CPU = torch.device("cpu")
TINY = Setting(CPU, "off", "resnet18", side=32, batch_size=3, steps=1)
SCRIPT = Path(__file__).parent / "gpu.sh"

# tests/gpu.sh selects the tests of the device by its name, cuda
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile traces its graphs, which takes a second, and translates none."""
    compile_with = torch.compile

    def trace(network, **options):
        return compile_with(network, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    yield
    torch.compiler.reset()


# ------------------------------------------------------------------------------ the measuring


def test_the_benchmark_measures_every_row(traced_only, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "WARM_UP_STEPS", 1)
    costs = benchmarks.measure_all(TINY, ceiling=None)
    names = ["training step", "distilling step", "forward pass", "validation"]
    assert [cost.work for cost in costs[::2]] == [cost.work for cost in costs[1::2]] == names
    assert [cost.compiled for cost in costs] == 4 * [False, True]
    for cost in costs:
        assert cost.ms_per_image > 0
        assert cost.recompilations == cost.graph_breaks == 0, cost
        assert cost.share is None and cost.waits_per_step is None
        assert sum(cost.kinds.values()) == pytest.approx(1)
        assert cost.kinds["convolutions and matrix products"] > 0.1
    capsys.readouterr()
    benchmarks.print_costs(TINY, costs, "a toy")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 + 3 + 8  # kinds of work; an empty line, the title, the header; costs
    assert lines[0].startswith("training step, eager: ") and "convolutions" in lines[0]
    assert lines[-1].startswith("validation, compiled") and lines[-1].endswith(" -")


def test_the_benchmark_has_all_flags_that_a_gpu_asks_for(capsys):
    """On the first GPU a network was not built: the batch size was missing."""
    flags = benchmarks.training_flags(TINY._replace(batch_size=4))
    train_ensemble.warn_of_memory(flags, 19, total_bytes=10**6)
    assert "a training step keeps about" in capsys.readouterr().out


def test_operations_are_those_of_the_reference():
    paper = Setting(CPU, "bf16", "resnet101", side=768, batch_size=16, steps=1)
    operations = benchmarks.operations_per_image(paper)
    # counted by hand: without the interpolation's two matrix products
    assert operations["forward pass"] == pytest.approx(1085e9, rel=0.005)
    assert operations["training step"] == pytest.approx(3253e9, rel=0.005)
    assert operations["validation"] == pytest.approx(3858e9, rel=0.005)


class Faulty(nn.Module):
    """Its graph breaks once, and every batch has another size."""

    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


def test_recompilations_and_graph_breaks_are_counted(traced_only, monkeypatch):
    sizes = iter(range(2, 100))

    def build(setting, compiled):
        network = torch.compile(Faulty(), dynamic=False)

        def make_steps(steps, smaller_last):
            for _ in range(steps):
                network(torch.zeros(next(sizes)))

        return make_steps

    monkeypatch.setitem(benchmarks.BUILDERS, "forward pass", build)
    monkeypatch.setattr(benchmarks, "WARM_UP_STEPS", 1)
    cost = measure_cost("forward pass", True, TINY, ceiling=None, operations=1.0)
    # one step is timed, another counted; each compiles the halves before and after the break
    assert cost.recompilations == 4
    assert cost.graph_breaks >= 1 and cost.note


def test_waits_for_a_gpu_are_counted_but_those_for_the_losses(monkeypatch):
    mode = ["default"]

    def wait():
        if mode[0] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda name: mode.__setitem__(0, name))
    monkeypatch.setattr(train_ensemble, "check_finite", lambda *arguments: wait())
    monkeypatch.setattr(metrics.Accumulator, "_numpy", lambda *arguments: wait())
    with noted_waits(torch.device("cuda")) as waits:
        wait()
        train_ensemble.check_finite(None, [])
        metrics.Accumulator()._numpy("figures")
        wait()
    assert len(waits) == 2 and waits[0].startswith("test_gpu.py:")
    assert mode == ["default"]


def test_what_falls_short_is_said():
    good = Cost("training step", True, 8.0, 0.51, 30000, 0, 0, 0.0)
    assert shortfalls([good, good._replace(compiled=False, share=0.3)]) == []
    slow = good._replace(work="forward pass", share=0.54)
    waiting = good._replace(recompilations=2, waits_per_step=1.5)
    full = Cost("distilling step", False, note="out of memory")
    assert shortfalls([slow, waiting, full]) == [
        "forward pass, compiled: 54% of the ceiling, not 55%",
        "training step, compiled: 2 recompilations",
        "training step, compiled: 1.5 waits a step",
        "distilling step, eager: out of memory",
    ]


def test_the_script_refuses_what_it_does_not_know():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    refused = subprocess.run([SCRIPT, "--device", "tpu"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --device tpu is not known; use --device cuda")


# ------------------------------------------------------------------------------ on every device


@on_every_device
def test_float32_gives_the_same_on(device):
    torch.manual_seed(0)
    members = [DeepLabV3("resnet18", 4).eval() for _ in range(3)]
    teacher = Ensemble(members)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    device = choose_device(device)
    with torch.inference_mode():
        expected = teacher(images, (50, 70), with_expected_entropy=True)
        teacher.to(device, memory_format=torch.channels_last)
        prediction = teacher(images.to(device), (50, 70), with_expected_entropy=True)
    for name, value in expected._asdict().items():
        found = getattr(prediction, name).cpu()
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@on_every_device
def test_fp16_trains_on(device, folder, command, tmp_path):
    flags = [*small(folder), "--device", device, "--amp", "fp16", "--members", 1, "--workers", 0]
    flags += ["--epochs", 1, "--no-compile", "--out", tmp_path]
    code, _, errors = command("train", *flags)
    assert code == 0, errors
    assert weights(tmp_path / "member_00.pt").isfinite().all()
