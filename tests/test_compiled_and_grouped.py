"""What a GPU or several processes need, as far as a CPU can show it: compilation, fp16, groups."""

import functools
import operator

import numpy as np
import pytest
import torch
from conftest import flags_of, write_folder
from PIL import Image
from processes import in_two_processes
from torch import distributed as dist
from torch import nn

import data
import distill
import evaluate
import train_ensemble
from model import (
    DeepLabV3,
    Prediction,
    UsageError,
    add_member,
    choose_device,
    predictive_statistics,
)
from train_ensemble import GroupBatchNorm2d, build_optimizer, fit, share_batch_norm

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A network of two convolutions with the interface of `DeepLabV3`."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Conv2d(4, num_classes, 1)
        self.uncertainty = None

    def forward(self, images, size=None):
        logits = self.classifier(self.backbone(images.float() / 255))
        return Prediction(logits, logits[:, :1].sigmoid())


# ------------------------------------------------------------------------------ fp16


def test_momentum_is_there_before_a_first_step_that_overflows():
    model = nn.Module()
    model.backbone = nn.Linear(3, 3)
    model.classifier = nn.Linear(3, 3)
    model.uncertainty = None
    with torch.no_grad():  # memory that was used before, where an uninitialised buffer would lie
        junk = [torch.full((3, 3), 1e30) for _ in range(100)]
    del junk
    optimizer = build_optimizer(model, lr=0.1, head_lr_mult=1.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=True)
    before = model.backbone.weight.detach().clone()

    def step(factor):
        loss = factor * model.classifier(model.backbone(torch.ones(2, 3))).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    step(torch.inf)
    assert scaler.get_scale() < 65536  # it overflowed
    assert torch.equal(model.backbone.weight, before)
    step(1.0)
    change = (model.backbone.weight - before).abs().max()
    assert 0 < change < 1  # a step of lr times the gradient


# ------------------------------------------------------------------------------ compilation


@pytest.fixture
def compiled_graphs(monkeypatch):
    """A list that gets the input shape of every graph that is compiled; they run eagerly."""
    graphs = []
    original = torch.compile

    def count(graph, inputs):
        images = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.uint8]
        graphs.append(tuple(images[0].shape))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(original, backend=count))
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


def test_a_training_compiles_once(tmp_path, compiled_graphs):
    folder = write_folder(tmp_path / "data", train=10, val=3)
    train_set = data.open_dataset("folder", folder, "train")
    val_set = data.open_dataset("folder", folder, "val")
    flags = flags_of(epochs=3, lr=0.05, warmup=0, select="last", compile=True)
    for member in range(10):  # more members than torch.compile's limit of recompilations
        views = data.TrainingViews(train_set, (32, 32), (0.5, 2.0), [1, 2, member])
        model = Toy(len(train_set.classes))
        fit(
            model,
            build_optimizer(model, lr=0.05, head_lr_mult=1.0, weight_decay=0.0),
            train_ensemble.segmentation_loss,
            data.training_loader(views, 4, 0, CPU),  # 4 + 4 + 2 images: the last batch is smaller
            functools.partial(
                evaluate.validate,
                loader=data.evaluation_loader(val_set, 2, 0, CPU),  # 2 + 1 images
                device=CPU,
                amp="off",
                one_size=val_set.has_one_size(),
            ),
            flags,
            tmp_path / f"member_{member:02d}.pt",
        )
        # One graph for all members, epochs and full batches, one for the full batches of all
        # their validations; none for the smaller batches.
        assert compiled_graphs == [(4, 3, 32, 32), (2, 3, 40, 56)]


class ToyStudent(Toy):
    """A `Toy` that gets a head of its own."""

    def add_uncertainty(self, measures, head):
        self.uncertainty = nn.Conv2d(4, len(measures), 1)

    def forward(self, images, size=None):
        features = self.backbone(images.float() / 255)
        uncertainty = None
        if self.uncertainty is not None:
            uncertainty = self.uncertainty(features.detach()).sigmoid()
        return Prediction(self.classifier(features), uncertainty)


class Certain:
    """As `distill.TeacherTargets`, of a teacher that is never in doubt."""

    def for_batch(self, batch):
        return distill.Target(torch.zeros(len(batch.images), 1, 32, 32), probs=None)

    def for_validation(self, images, size, index):
        return torch.zeros(len(images), *size)


def test_a_student_compiles_a_graph_for_each_of_its_trainings(
    tmp_path, compiled_graphs, monkeypatch
):
    folder = write_folder(tmp_path / "data", train=6, val=3)
    train_set = data.open_dataset("folder", folder, "train")
    val_set = data.open_dataset("folder", folder, "val")
    views = data.TrainingViews(train_set, (32, 32), (0.5, 2.0), [1, 2, 3])
    train_loader = data.training_loader(views, 4, 0, CPU)  # 4 + 2 images
    lessons = distill.Lessons(
        train_loader=train_loader,
        label_loader=train_loader,
        val_loader=data.evaluation_loader(val_set, 2, 0, CPU),  # 2 + 1 images
        targets=Certain(),
        num_classes=4,
        val_has_one_size=True,
    )
    flags = flags_of(epochs=2, lr=0.05, head_lr_mult=1.0, weight_decay=0.0, warmup=0)
    flags = flags._replace(select="last", compile=True, seed=0)
    settings = {name: 0 for name in distill.DistillationFlags._fields}
    settings |= {"measures": ["std"], "learns_error": False, "head": "confidence"}
    distillation = distill.DistillationFlags(**(settings | {"head_epochs": 2}))
    monkeypatch.setattr(distill, "build_network", lambda *settings: ToyStudent(4))
    distill.train_in_turn(tmp_path / "s.pt", lessons, flags, distillation)
    # The segmentation's steps and validations, then the head's.
    assert compiled_graphs == 2 * [(4, 3, 32, 32), (2, 3, 40, 56)]


def test_the_sums_over_members_compile_once():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(add_member, backend=count, dynamic=False)
    torch.manual_seed(0)
    for _ in range(2):  # batches
        logits = [5 * torch.randn(2, 4, 6, 8) for _ in range(4)]
        with torch.inference_mode():
            expected = predictive_statistics(iter(logits), with_expected_entropy=True)
            found = predictive_statistics(iter(logits), True, compiled)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_validation_of_several_sizes_compiles_nothing(tmp_path, compiled_graphs):
    folder = write_folder(tmp_path / "data", train=2, val=4)
    val_set = data.open_dataset("folder", folder, "val")
    assert val_set.has_one_size()
    for kind in ("images", "labels"):
        for number in (2, 3):
            path = folder / kind / "val" / f"{number}.png"
            with Image.open(path) as image:
                smaller = image.crop((0, 0, 32, 24))
            smaller.save(path)
    val_set = data.open_dataset("folder", folder, "val")
    assert not val_set.has_one_size()
    assert data.open_dataset("synthetic", None, "val").has_one_size()

    network = Toy(len(val_set.classes))
    loader = data.evaluation_loader(val_set, 2, 0, CPU)
    compiled = torch.compile(network, dynamic=False)
    result = evaluate.validate(compiled, loader, CPU, "off", one_size=val_set.has_one_size())
    assert result["n"] > 0
    assert compiled_graphs == []


def test_a_compiled_validation_gives_the_same_figures(tmp_path):
    folder = write_folder(tmp_path / "data", train=2, val=3)
    val_set = data.open_dataset("folder", folder, "val")
    loader = data.evaluation_loader(val_set, 2, 0, CPU)
    torch.manual_seed(0)
    network = Toy(len(val_set.classes))

    def teacher_target(images, size, index):
        return torch.linspace(0, 0.7, size[0] * size[1]).view(1, *size).repeat(len(images), 1, 1)

    results = []
    for model in (network, torch.compile(network, backend="aot_eager", dynamic=False)):
        results.append(evaluate.validate(model, loader, CPU, "off", teacher_target, one_size=True))
    torch.compiler.reset()
    eager, compiled = results
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        np.testing.assert_allclose(compiled[key], value, rtol=1e-4, err_msg=key)


def test_a_compiled_network_takes_the_paths_of_an_eager_one(monkeypatch):
    operations = []

    def note(graph, inputs):
        operations.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    network = DeepLabV3("resnet18", 3)
    compiled = torch.compile(network, backend=note)
    # As up to torch 2.13: while torch.compile traces, this is true.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    compiled(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    torch.compiler.reset()
    assert operations.count(operator.matmul) == 2  # logits are upsampled by two products


# ------------------------------------------------------------------------------ memory


def test_the_memory_of_a_step_is_known_before_it_runs(capsys):
    flags = flags_of(backbone="resnet18", batch_size=4, crop_size=(64, 96))
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept = []
    network = DeepLabV3("resnet18", 5).train()
    images = torch.zeros(4, 3, 64, 96, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(images)
    real = sum(sizes.values())
    estimate = train_ensemble.activation_bytes(lambda: DeepLabV3("resnet18", 5), flags)
    assert estimate == pytest.approx(real, rel=0.02)

    train_ensemble.warn_of_memory(flags, 5, total_bytes=100 * real)
    assert capsys.readouterr().out == ""
    train_ensemble.warn_of_memory(flags, 5, total_bytes=real)
    out = capsys.readouterr().out
    assert "--batch-size 2 --accumulate 2 takes half" in out and out.count("\n") == 1


def test_the_papers_protocol_takes_about_forty_gigabytes_uncompiled():
    flags = flags_of(batch_size=16, crop_size=(768, 768), amp="bf16")
    needed = train_ensemble.activation_bytes(lambda: DeepLabV3("resnet101", 19), flags)
    assert 30e9 < needed < 45e9


# ------------------------------------------------------------------------------ process groups


def test_one_card_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--device cuda:0 would put all 2 processes .* one card"):
        choose_device("cuda:0")


def test_float32_is_float32():
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def batch_norm_of_a_part(rank, folder, compiled):
    """One of two processes that normalise 2 and 3 images of a batch of five."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = 1.5 + 2 * torch.randn(5, 7, 6, 8)
    gradient = torch.randn(5, 7, 6, 8)
    layer = nn.Sequential(nn.BatchNorm2d(7))
    with torch.no_grad():
        layer[0].weight.uniform_(0.5, 2)
        layer[0].bias.normal_()
    share_batch_norm(layer)
    assert type(layer[0]) is GroupBatchNorm2d
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    mine = x[part].clone().requires_grad_()
    function = torch.compile(layer, fullgraph=True) if compiled else layer
    output = function(mine)
    (output * gradient[part]).sum().backward()
    result = {"output": output.detach(), "input gradient": mine.grad, **layer.state_dict()}
    for name, parameter in layer.named_parameters():
        result[name + " gradient"] = parameter.grad
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_norm_of_two_processes_is_that_of_the_whole_batch(tmp_path, compiled):
    in_two_processes(batch_norm_of_a_part, str(tmp_path), compiled)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    torch.manual_seed(0)
    x = (1.5 + 2 * torch.randn(5, 7, 6, 8)).requires_grad_()
    gradient = torch.randn(5, 7, 6, 8)
    layer = nn.Sequential(nn.BatchNorm2d(7))
    with torch.no_grad():
        layer[0].weight.uniform_(0.5, 2)
        layer[0].bias.normal_()
    output = layer(x)
    (output * gradient).sum().backward()

    def both(name):
        return torch.cat([part[name] for part in parts])

    torch.testing.assert_close(both("output"), output.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both("input gradient"), x.grad, rtol=1e-6, atol=1e-6)
    for name, parameter in layer.named_parameters():
        summed = parts[0][name + " gradient"] + parts[1][name + " gradient"]
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-5, atol=1e-4)
    for name, value in layer.state_dict().items():
        assert torch.equal(parts[0][name], parts[1][name])  # nothing to share between steps
        torch.testing.assert_close(parts[0][name], value, rtol=1e-6, atol=1e-6)
