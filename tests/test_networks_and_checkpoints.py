"""The network, the ensemble's statistics, checkpoints and what is refused."""

import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision

from metrics import MAX_STD
from model import (
    HEADS,
    AtrousConv2d,
    DeepLabV3,
    Ensemble,
    GlobalPooling,
    ModelError,
    build_backbone,
    build_head,
    load_ensemble,
    load_model,
    load_weights,
    predictive_statistics,
    read_checkpoint,
    save_atomically,
    upsample,
)


@pytest.mark.parametrize(
    "backbone, stride", [("resnet18", 16), ("mobilenet_v3_large", 16), ("resnet50", 8)]
)
def test_shapes_and_output_stride(backbone, stride):
    network = DeepLabV3(backbone, 5, ("std", "entropy")).eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    assert network.backbone(images.float()).shape[-2:] == (64 // stride, 96 // stride)
    logits, uncertainty = network(images)
    assert logits.shape == (1, 5, 64, 96) and uncertainty.shape == (1, 2, 64, 96)
    assert logits.dtype == uncertainty.dtype == torch.float32
    assert 0 < uncertainty.min() and uncertainty.max() < 1
    torch.testing.assert_close(
        network(images / 255).logits, logits
    )  # float in [0, 1] is the same picture
    assert network(images, (20, 31)).logits.shape == (1, 5, 20, 31)


def test_equals_torchvisions_deeplab():
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=4
    ).eval()
    ours = DeepLabV3("resnet50", 4).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(1, 3, 65, 97)
    with torch.inference_mode():
        expected = theirs((images - ours.rgb_mean) / ours.rgb_std)["out"]
        torch.testing.assert_close(ours(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_dilated_resnet18_is_the_strided_one_seen_finer():
    dilated, channels = build_backbone("resnet18")
    strided = torchvision.models.resnet18().eval()
    assert channels == 512
    strided.load_state_dict(dilated.state_dict(), strict=False)
    x = torch.rand(1, 3, 96, 128)
    with torch.inference_mode():
        fine = dilated.eval()(x)
        for name, layer in strided.named_children():
            if name not in ("avgpool", "fc"):
                x = layer(x)
    torch.testing.assert_close(fine[:, :, ::2, ::2], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 5), (12, 30), (13, 12), (40, 40)])
def test_atrous_convolution_without_its_padding_taps(size):
    ours, theirs = (
        AtrousConv2d(3, 4, 3, padding=12, dilation=12),
        torch.nn.Conv2d(3, 4, 3, padding=12, dilation=12),
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-10, atol=1e-12)


def test_global_pooling_is_torchvisions():
    theirs = torchvision.models.segmentation.deeplabv3.ASPPPooling(3, 4)
    ours = GlobalPooling(*theirs)
    gradients = []
    outputs = []
    for branch in (theirs, ours):
        x = torch.linspace(-1, 1, 2 * 3 * 5 * 7).view(2, 3, 5, 7).requires_grad_()
        output = branch(x)
        (output * torch.arange(35).view(5, 7)).sum().backward()
        outputs.append(output)
        gradients.append(x.grad)
    assert outputs[1].std() > 0.1 and gradients[1].abs().max() > 1e-5
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_statistics_against_float64(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(5, 2, 7, 9, 11, generator=generator)
    logits[:, :, 0] += scale * 2  # the first class saturates in most pixels
    stats = predictive_statistics(iter(logits), with_expected_entropy=True)
    p = logits.double().softmax(2)
    mean = p.mean(0)
    y = mean.argmax(1, keepdim=True)
    std = p.gather(2, y[None].expand(5, -1, -1, -1, -1)).std(0, unbiased=True)[:, 0]
    torch.testing.assert_close(stats.probs.double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.std.double(), std, rtol=1e-3, atol=1e-6)
    entropy = torch.special.entr(p).sum(2).mean(0)
    torch.testing.assert_close(stats.expected_entropy.double(), entropy, rtol=1e-4, atol=1e-5)


def test_statistics_by_hand():
    p = torch.tensor([[0.7, 0.3], [0.9, 0.1]])[:, None, :, None, None]
    stats = predictive_statistics(iter(p.log()))
    assert stats.probs.flatten().tolist() == pytest.approx([0.8, 0.2])
    assert stats.std.item() == pytest.approx(0.1 * 2**0.5)  # unbiased: divided by M - 1
    opposite = torch.tensor([[60.0, -60.0], [-60.0, 60.0]])[:, None, :, None, None]
    assert predictive_statistics(iter(opposite)).std.item() == pytest.approx(MAX_STD)
    with pytest.raises(ModelError, match="at least 2"):
        predictive_statistics(iter(p[:1]))


def test_small_std_survives_saturation():
    # p near 1 with a spread of 1e-5: plain float32 sums of p and p^2 give 0 or noise
    p = 1 - 1e-4 + 1e-5 * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], 1).float()[:, None, :, None, None]
    assert predictive_statistics(iter(logits)).std.item() == pytest.approx(1e-5, rel=0.02)


def test_ensemble_streams_and_stays_frozen():
    members = [DeepLabV3("resnet18", 3) for _ in range(3)]
    ensemble = Ensemble(members).train()
    assert not any(m.training for m in ensemble.modules()) and not any(
        p.requires_grad for p in ensemble.parameters()
    )
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.inference_mode():
        expected = torch.stack([member(images).logits.softmax(1) for member in members]).mean(0)
        torch.testing.assert_close(ensemble(images).probs, expected)


def test_mc_dropout_samples_dropout_alone():
    ensemble = Ensemble([DeepLabV3("resnet18", 3)], mc_samples=3)
    assert all(m.training == isinstance(m, torch.nn.Dropout) for m in ensemble.modules())
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    with torch.inference_mode():
        assert len(ensemble) == 3 and ensemble(images).std.max() > 0


def test_impossible_ensembles_are_refused():
    network = DeepLabV3("resnet18", 3)
    with pytest.raises(ModelError, match="at least 2 members"):
        Ensemble([network])
    with pytest.raises(ModelError, match="--mc-samples 5 with 2"):
        Ensemble([network, network], mc_samples=5)
    with pytest.raises(ModelError, match="--mc-samples 1"):
        Ensemble([network], mc_samples=1)


# ------------------------------------------------------------------------------ uncertainty heads


@pytest.mark.parametrize("head", HEADS)
def test_every_head_predicts_a_channel_a_measure(head):
    network = DeepLabV3("resnet18", 5, ("std", "error"), head=head).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    for size in (None, (20, 31)):
        logits, uncertainty = network(images, size)
        assert uncertainty.shape == (2, 2, *logits.shape[-2:])
        assert uncertainty.dtype == torch.float32
        assert 0 < uncertainty.min() and uncertainty.max() < 1


def test_the_papers_head_is_a_convolution_and_a_sigmoid():
    head = build_head("paper", 8, 2)
    features = torch.randn(2, 8, 3, 4)
    a = F.conv2d(features, head.weight, head.bias)
    assert torch.equal(head(features, torch.zeros(2, 5, 12, 16)), upsample(a, (12, 16)).sigmoid())
    assert list(head.state_dict()) == ["weight", "bias"]
    assert head.bias.sigmoid().tolist() == pytest.approx([0.047] * 2, abs=1e-3)


def test_the_confidence_head_equals_its_definition():
    torch.manual_seed(0)
    features = torch.randn(2, 8, 3, 4)
    logits = 4 * torch.randn(2, 5, 12, 16)
    logits[0, 0, 0] = 1000.0  # certain: 1 - max softmax is 0
    logits[1, :, 0] = 0.0  # the entropy is log C
    head = build_head("confidence", 8, 3)
    torch.nn.init.normal_(head.stack[-1].weight)  # so that the weights differ by place

    p = logits.double().softmax(1)
    entropy = torch.special.entr(p).sum(1) / math.log(5)
    z = torch.stack([1 - p.amax(1), entropy], 1).clamp(1e-5, 1 - 1e-5)
    z = (z / (1 - z)).log()
    predicted = upsample(head.stack(features), (12, 16)).double()  # [B, 3 T, H, W]
    a, b = predicted[:, :3], predicted[:, 3:].unflatten(1, (2, 3))  # b [B, 2, T, H, W]
    expected = (a + torch.einsum("bkthw,bkhw->bthw", b, z)).sigmoid()
    # near 1e-5 the float32 of 1 - max softmax is good to half a percent
    torch.testing.assert_close(head(features, logits).double(), expected, rtol=5e-3, atol=1e-6)


def test_the_confidence_head_starts_near_the_networks_own_doubt():
    head = build_head("confidence", 8, 1)
    even = head(torch.zeros(1, 8, 3, 4), torch.zeros(1, 2, 12, 16))  # p = 1/2 each
    assert even.mean().item() == pytest.approx(1 / (1 + math.exp(1.5 - 0.25 * 11.5)), abs=0.01)
    assert [type(layer).__name__ for layer in head.stack] == [
        "Conv2d",
        "GELU",
        "Conv2d",
        "GELU",
        "Conv2d",
    ]


@pytest.mark.parametrize("head, reaches_the_features", [("paper", True), ("confidence", False)])
def test_a_detached_head_does_not_change_the_network(head, reaches_the_features):
    network = DeepLabV3("resnet18", 3, ("std",), head=head)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    network(images).uncertainty.mean().backward()
    assert (network.backbone.conv1.weight.grad is not None) == reaches_the_features
    assert network.classifier[-1].weight.grad is None  # the log-odds are detached
    assert all(parameter.grad is not None for parameter in network.uncertainty.parameters())


# ------------------------------------------------------------------------------ checkpoints


def config(members=2, classes=3, **other):
    names = {"classes": [f"c{i}" for i in range(classes)], "palette": [[0, 0, 0]] * classes}
    rest = {"dataset": "folder", "hold_out": [], "image_size": None, "measures": []}
    return {"backbone": "resnet18", "members": members} | names | rest | other


def save_member(path, **changes):
    entries = config(**changes)
    network = DeepLabV3("resnet18", len(entries["classes"]))
    save_atomically(
        path,
        {
            "model": network.state_dict(),
            "config": entries,
            "args": {},
            "metrics": {},
            "versions": {},
        },
    )
    return network


def test_checkpoint_round_trip(tmp_path):
    network = save_member(tmp_path / "a.pt")
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(
        load_model(tmp_path / "a.pt")(images).logits, network.eval()(images).logits
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_network_is_read_without_a_draw_and_is_like_a_new_one(tmp_path):
    network = save_member(tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    values = {}  # with the channels last, as a GPU has them, and one in half the bits
    for name, value in checkpoint["model"].items():
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        if name == "backbone.bn1.running_mean":
            value = value.half()  # zeros, so nothing is lost
        values[name] = value
    save_atomically(tmp_path / "a.pt", checkpoint | {"model": values})
    state = torch.get_rng_state()
    loaded = load_model(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in loaded.state_dict().items():
        expected = network.state_dict()[name]
        assert torch.equal(value, expected) and value.dtype == expected.dtype, name
        assert value.is_contiguous(), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(buffer.device.type == "cpu" for buffer in loaded.buffers())
    assert torch.equal(loaded.rgb_mean, network.rgb_mean)


def test_an_incomplete_or_mixed_ensemble_is_refused_by_name(tmp_path):
    save_member(tmp_path / "member_00.pt", members=3)
    save_member(tmp_path / "member_02.pt", members=3)
    with pytest.raises(ModelError, match=r"lacks member_01\.pt of a run of 3"):
        load_ensemble([tmp_path])
    assert len(load_ensemble([tmp_path / "member_00.pt", tmp_path / "member_02.pt"])[0]) == 2
    save_member(tmp_path / "member_01.pt", members=3, classes=4)
    with pytest.raises(ModelError, match=r"member_01\.pt has classes .* no ensemble"):
        load_ensemble([tmp_path])
    with pytest.raises(ModelError, match="no member_"):
        load_ensemble([tmp_path / "empty"])


def test_a_checkpoint_says_which_head_it_has(tmp_path):
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    for head in HEADS:
        network = DeepLabV3("resnet18", 3, ("std",), head=head).eval()
        entries = config(measures=["std"], head=head)
        if head == "paper":  # as older checkpoints are, which name no head
            del entries["head"]
        checkpoint = {"model": network.state_dict(), "config": entries, "args": {}}
        save_atomically(tmp_path / "s.pt", checkpoint)
        loaded = load_model(tmp_path / "s.pt")
        assert torch.equal(loaded(images).uncertainty, network(images).uncertainty)
    checkpoint["config"]["head"] = "new"
    save_atomically(tmp_path / "s.pt", checkpoint)
    with pytest.raises(ModelError, match="unknown uncertainty head 'new'; choose one of confid"):
        load_model(tmp_path / "s.pt")


def test_a_confidence_head_of_another_version_is_refused_in_one_line(tmp_path):
    network = DeepLabV3("resnet18", 3, ("std",), head="confidence")
    weights = network.state_dict()
    for name in list(weights):
        if name.startswith("uncertainty.stack"):
            weights[name.replace("stack", "from_features")] = weights.pop(name)
    weights["uncertainty.from_confidence.weight"] = torch.zeros(1, 2, 1, 1)
    entries = config(measures=["std"], head="confidence")
    save_atomically(tmp_path / "s.pt", {"model": weights, "config": entries, "args": {}})
    with pytest.raises(ModelError, match=r"s\.pt was written by another version") as refusal:
        load_model(tmp_path / "s.pt")
    assert "\n" not in str(refusal.value) and "distil it anew" in str(refusal.value)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    torch.save(
        {"model": Malicious(tmp_path / "ran"), "config": {}, "args": {}}, tmp_path / "evil.pt"
    )
    (tmp_path / "evil2.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ModelError, match="not a readable checkpoint"):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_broken_files_are_named(tmp_path):
    save_member(tmp_path / "a.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    torch.save([1], tmp_path / "list.pt")
    torch.save({"x": 1}, tmp_path / "other.pt")
    for name, words in (
        ("none", "no such checkpoint"),
        ("empty", "empty"),
        ("cut", "not a readable"),
        ("list", "holds a list"),
        ("other", "no checkpoint of this project"),
    ):
        with pytest.raises(ModelError, match=words):
            read_checkpoint(tmp_path / f"{name}.pt")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_atomically(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------ weights


def test_weights_from_a_torchvision_classifier(tmp_path):
    for name in ("resnet18", "mobilenet_v3_large"):
        classifier = getattr(torchvision.models, name)()
        torch.save(classifier.state_dict(), tmp_path / "w.pt")
        network = DeepLabV3(name, 3)
        line = load_weights(network, str(tmp_path / "w.pt"), name)
        first = next(v for v in classifier.state_dict().values() if v.dim() == 4)
        assert torch.equal(next(iter(network.backbone.parameters())), first) and "random" in line


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_residual_blocks_from_scratch_begin_as_the_identity(backbone):
    network = DeepLabV3(backbone, 3)
    stage = network.backbone.layer2.eval()
    x = torch.rand(1, stage[0].conv1.in_channels, 8, 8)
    assert not torch.equal(stage[1](stage[0](x)), stage[0].downsample(x).relu())
    assert load_weights(network, "none", backbone) == "weights: random"
    first = stage[0](x)
    torch.testing.assert_close(first, stage[0].downsample(x).relu())
    torch.testing.assert_close(stage[1](first), first)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="do not fit backbone resnet18"):
        load_weights(DeepLabV3("resnet18", 3), str(tmp_path / "w.pt"), "resnet18")


def test_imagenet_weights_come_from_torchvision_or_an_error_says_what_to_do(monkeypatch):
    enum = torchvision.models.get_model_weights("resnet18").DEFAULT
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(type(enum), "get_state_dict", lambda self, **_: state)
    network = DeepLabV3("resnet18", 3)
    load_weights(network, "imagenet", "resnet18")
    assert torch.equal(network.backbone.conv1.weight, state["conv1.weight"])

    def offline(self, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(type(enum), "get_state_dict", offline)
    with pytest.raises(ModelError, match=r"https://.*--weights FILE"):
        load_weights(network, "imagenet", "resnet18")


def test_normalisation_is_imagenets():
    network = DeepLabV3("resnet18", 3)
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    seen = {}
    network.backbone.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    network.eval()(F.interpolate(white.float(), (32, 32)).to(torch.uint8))
    assert seen["x"][0, :, 0, 0].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    )
