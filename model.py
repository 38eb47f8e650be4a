"""DeepLabv3 with an uncertainty head, the ensemble that teaches it, and their checkpoints.

The teacher is M independently trained networks. With softmax taken after upsampling,

    p(c) = 1/M sum_m softmax(logits_m)(c)        y = argmax_c p(c)
    u    = sqrt( 1/(M-1) sum_m (softmax(logits_m)(y) - p(y))^2 )

is its mean prediction and its predictive uncertainty (Landgraf et al. 2024, doi 10.1007/s41064-024-00280-4).
The student predicts u with one 1x1 convolution and a sigmoid on the decoder's features: one pass for both.

    from model import load_model
    network = load_model("ckpts/student.pt")           # eval mode, on the CPU
    logits, uncertainty = network(images)              # uint8 RGB [B, 3, H, W]
"""

import io
import math
import os
import pickle
import platform
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import PIL
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPPConv, DeepLabHead

BACKBONES = ("resnet18", "resnet50", "resnet101", "mobilenet_v3_large")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_STD = math.sqrt(0.5)  # largest unbiased std of values in [0, 1]: two members, one says 0, one says 1


class ModelError(ValueError):
    """A checkpoint, a weight file or a set of members that cannot be used; the message says what to do."""


# ------------------------------------------------------------------------------ network


class Prediction(NamedTuple):
    """What a network returns. `logits` float32 [B, C, H, W]; `uncertainty` float32 [B, T, H, W] in (0, 1),
    one channel per distilled measure, or None where the network has no uncertainty head."""

    logits: Tensor
    uncertainty: Tensor | None


class DeepLabV3(nn.Module):
    """torchvision's DeepLabv3 (`backbone.*` and `classifier.*` keep its parameter names), plus the head of DUDES.

    Args:
        backbone: one of `BACKBONES`. Output stride 8 for resnet50 and resnet101, 16 for the other two.
        num_classes: C.
        measures: names of the distilled uncertainties, one channel each; empty for a network without the head.
    """

    def __init__(self, backbone: str, num_classes: int, measures: tuple[str, ...] = ()):
        super().__init__()
        self.backbone, channels = build_backbone(backbone)
        # DeepLabHead subclasses nn.Sequential and cannot be sliced: ASPP, 3x3 convolution, BN, ReLU, classifier
        self.classifier = nn.ModuleList(DeepLabHead(channels, num_classes))
        for branch in self.classifier[0].convs:
            if isinstance(branch, ASPPConv):
                old = branch[0]
                branch[0] = AtrousConv2d(
                    old.in_channels, old.out_channels, 3, padding=old.padding, dilation=old.dilation, bias=False
                )
        width = self.classifier[-1].in_channels
        self.uncertainty = nn.Conv2d(width, len(measures), kernel_size=1) if measures else None
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, size: tuple[int, int] | None = None) -> Prediction:
        """RGB images [B, 3, h, w], uint8 or float in [0, 1], to a `Prediction` at `size` (H, W), default (h, w)."""
        size = size or images.shape[-2:]
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = self.backbone((x - self.mean) / self.std)
        for layer in self.classifier[:-1]:
            x = layer(x)
        logits = upsample(self.classifier[-1](x), size)
        if self.uncertainty is None:
            return Prediction(logits, None)
        return Prediction(logits, upsample(self.uncertainty(x), size).sigmoid())

    def head_parameters(self) -> list[nn.Parameter]:
        """Everything behind the backbone, which trains at a multiple of its learning rate."""
        return [p for name, p in self.named_parameters() if not name.startswith("backbone.")]


class AtrousConv2d(nn.Conv2d):
    """A dilated 3x3 convolution that leaves out the taps which see nothing but padding.

    Where the map is no higher (wider) than the dilation, only the middle row (column) of the kernel meets pixels:
    the result is the same, and small images cost less (up to a fifth of a training step of resnet18).
    """

    def forward(self, x: Tensor) -> Tensor:
        keep = [size > dilation for size, dilation in zip(x.shape[-2:], self.dilation, strict=True)]
        if all(keep):
            return super().forward(x)
        rows, columns = (slice(None) if whole else slice(1, 2) for whole in keep)
        padding = [dilation * whole for dilation, whole in zip(self.dilation, keep, strict=True)]
        return F.conv2d(x, self.weight[:, :, rows, columns], self.bias, 1, padding, self.dilation)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    # float32 first: interpolating in bf16 would round the logits twice
    return F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False)


def build_backbone(name: str) -> tuple[nn.Sequential, int]:
    """torchvision's classifier without its last layers, dilated; returns (network, output channels)."""
    if name not in BACKBONES:
        raise ModelError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    if name == "mobilenet_v3_large":
        return torchvision.models.mobilenet_v3_large(dilated=True).features, 960
    if name == "resnet18":
        network = torchvision.models.resnet18()
        # BasicBlock refuses dilation in its constructor. The strided convolution still sees the undilated
        # grid; all that follow it step over the pixels which the stride no longer removes.
        first, second = network.layer4
        first.conv1.stride = first.downsample[0].stride = (1, 1)
        for conv in (first.conv2, second.conv1, second.conv2):
            conv.dilation = conv.padding = (2, 2)
    else:
        network = getattr(torchvision.models, name)(replace_stride_with_dilation=[False, True, True])
    channels = network.fc.in_features
    del network.avgpool, network.fc
    layers = nn.Sequential()
    for key, layer in network.named_children():
        layers.add_module(key, layer)
    return layers, channels


def load_weights(network: DeepLabV3, weights: str, backbone: str) -> str:
    """Initialise `network` from `weights`: "imagenet" (downloaded by torchvision), "none", or a state-dict file.

    A file may hold a classifier of torchvision, a DeepLabv3 of torchvision or a checkpoint of this project. It has
    to fill the whole backbone; of the rest, what fits by name and shape is taken. Returns a line that says how much.
    """
    if weights == "none":
        return "weights: random"
    if weights == "imagenet":
        enum = torchvision.models.get_model_weights(backbone).DEFAULT
        try:
            state = enum.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors, a broken download a RuntimeError
            raise ModelError(
                f"cannot download the ImageNet weights {enum.url} ({error}); fetch that file on another machine "
                "and pass it as --weights FILE, or train from scratch with --weights none"
            ) from error
    else:
        state = read_tensors(weights)
        state = state.get("model", state.get("state_dict", state))
    own = network.state_dict()
    found = {}
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("features.")
        for candidate in (name, "backbone." + name):
            if candidate in own and isinstance(value, Tensor) and own[candidate].shape == value.shape:
                found[candidate] = value
    missing = [k for k in own if k.startswith("backbone.") and k not in found and "num_batches" not in k]
    if missing:
        raise ModelError(
            f"weights {weights!r} do not fit backbone {backbone}: {len(missing)} of its tensors are missing or of "
            f"another shape, the first is {missing[0]}; pass the state dict of a torchvision {backbone}"
        )
    network.load_state_dict(found, strict=False)
    rest = [k for k in own if k not in found and "num_batches" not in k]
    return f"weights: {len(found)} tensors from {weights}, {len(rest)} random"


# ------------------------------------------------------------------------------ ensemble


class EnsemblePrediction(NamedTuple):
    """What a teacher returns: `probs` float32 [B, C, H, W], the mean softmax; `std` float32 [B, H, W], the unbiased
    standard deviation over the members of the predicted class's probability, in [0, 0.7072]; `expected_entropy`
    float32 [B, H, W], the mean of the members' entropies in nats, in [0, log C], or None if not asked for."""

    probs: Tensor
    std: Tensor
    expected_entropy: Tensor | None


def predictive_statistics(member_logits: Iterable[Tensor], expected_entropy: bool = False) -> EnsemblePrediction:
    """Mean probabilities and predictive uncertainty of a stream of M >= 2 logits [B, C, H, W].

    Memory is that of four [B, C, H, W] tensors whatever M is. Plain sums of p and p^2 cancel where probabilities
    saturate (a std under 1e-3 is lost in float32), so both sums are taken of p - p_0, the first member's p.
    """
    count, entropy = 0, None
    for logits in member_logits:
        p = logits.float().softmax(dim=1)
        if expected_entropy:
            h = torch.special.entr(p).sum(dim=1)  # [B, H, W]
            entropy = h if entropy is None else entropy.add_(h)
        if count == 0:
            first, shift, square = p, torch.zeros_like(p), torch.zeros_like(p)
        else:
            p.sub_(first)
            shift.add_(p)
            square.addcmul_(p, p)
        count += 1
    if count < 2:
        raise ModelError(f"predictive uncertainty needs at least 2 predictions, got {count}")
    probs = first.add_(shift, alpha=1 / count)  # [B, C, H, W]
    y = probs.argmax(dim=1, keepdim=True)  # [B, 1, H, W]
    shift, square = shift.gather(1, y), square.gather(1, y)
    variance = (square - shift.square() / count) / (count - 1)
    return EnsemblePrediction(
        probs, variance.clamp_(min=0).sqrt_().squeeze(1), None if entropy is None else entropy.div_(count)
    )


class Ensemble(nn.Module):
    """M frozen networks, or M dropout samples of a single one (`mc_samples`; Gal & Ghahramani 2016).

    Raises ModelError unless there are at least two members, or one with `mc_samples` >= 2.
    """

    def __init__(self, members: list[DeepLabV3], mc_samples: int = 0):
        super().__init__()
        if mc_samples and (len(members) != 1 or mc_samples < 2):
            raise ModelError(
                f"--mc-samples {mc_samples} with {len(members)} checkpoints: dropout samples one network, at least "
                "2 times; name a single checkpoint and 2 samples or more"
            )
        if not mc_samples and len(members) < 2:
            raise ModelError(
                f"an ensemble of {len(members)}: the uncertainty needs at least 2 members; "
                "train more, or sample one with --mc-samples N"
            )
        self.members = nn.ModuleList(members).requires_grad_(False)
        self.mc_samples = mc_samples
        self.eval()

    def train(self, mode: bool = True) -> "Ensemble":
        super().train(False)  # a teacher is always frozen, dropout for sampling excepted
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train(bool(self.mc_samples))
        return self

    def __len__(self) -> int:
        return self.mc_samples or len(self.members)

    def stream(self, images: Tensor, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The members' logits [B, C, H, W] one after the other, in the members' order."""
        for index in range(len(self)):
            yield self.members[0 if self.mc_samples else index](images, size).logits

    def forward(
        self, images: Tensor, size: tuple[int, int] | None = None, expected_entropy: bool = False
    ) -> EnsemblePrediction:
        """Images [B, 3, h, w] as for `DeepLabV3` to the statistics at `size` (H, W), default (h, w)."""
        return predictive_statistics(self.stream(images, size), expected_entropy)


# ------------------------------------------------------------------------------ checkpoints


def save_atomically(path: str | Path, content: dict | str) -> None:
    """Write tensors and plain dicts (torch.save) or a text so that a reader finds the old file or the new one."""
    path = Path(path)
    if isinstance(content, str):
        data = content.encode()
    else:
        buffer = io.BytesIO()  # torch.save hides a full disk behind a RuntimeError, write() raises the OSError
        torch.save(content, buffer)
        data = buffer.getbuffer()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> dict:
    """`torch.load` of tensors and plain containers only: a file that holds code is refused, not run."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no such checkpoint: {path}; check the path, or train it first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = "it is empty" if path.stat().st_size == 0 else str(error).strip().splitlines()[0][:120]
        raise ModelError(f"{path} is not a readable checkpoint ({reason}); restore it or train it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; name another file")
    return content


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project: `model`, `config`, `args`, `metrics`, `versions`."""
    checkpoint = read_tensors(path)
    if missing := {"model", "config", "args"} - checkpoint.keys():
        raise ModelError(f"{path} is no checkpoint of this project: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def build_model(checkpoint: dict, path: str | Path) -> DeepLabV3:
    """The network of a checkpoint that `read_checkpoint` read from `path`, in eval mode."""
    config = checkpoint["config"]
    network = DeepLabV3(config["backbone"], len(config["classes"]), tuple(config["measures"]))
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: the weights do not fit the configuration stored with them ({reason})") from error
    return network.eval()


def load_model(path: str | Path) -> DeepLabV3:
    """The network of a checkpoint file, in eval mode, on the CPU. Raises ModelError where it cannot be used."""
    return build_model(read_checkpoint(path), path)


def member_files(teacher: list[str | Path]) -> list[Path]:
    """Checkpoint files of a teacher given as one folder (`member_*.pt`) or as the files themselves."""
    if len(teacher) > 1 or Path(teacher[0]).suffix == ".pt":
        return [Path(path) for path in teacher]
    files = sorted(Path(teacher[0]).glob("member_[0-9]*.pt"))
    if not files:
        raise ModelError(f"no member_*.pt in {teacher[0]}; train them first: python train_ensemble.py --members 10")
    return files


def load_ensemble(teacher: list[str | Path], mc_samples: int = 0) -> tuple[Ensemble, dict]:
    """The members of a folder or of the named files as (Ensemble, first member's checkpoint without the weights).

    Raises ModelError where a folder lacks members that its training run had, or where members differ in backbone,
    classes or data, naming both files.
    """
    files = member_files(teacher)
    checkpoints = [read_checkpoint(path) for path in files]
    if len(teacher) == 1 and Path(teacher[0]).is_dir():
        expected = max(checkpoint["config"]["members"] for checkpoint in checkpoints)
        have = {path.name for path in files}
        wanted = [f"member_{index:02d}.pt" for index in range(expected)]
        if absent := [name for name in wanted if name not in have]:
            raise ModelError(
                f"{teacher[0]} lacks {', '.join(absent)} of a run of {expected} members; finish the training, "
                "or name the files to use one by one"
            )
    for path, checkpoint in zip(files[1:], checkpoints[1:], strict=True):
        for key in ("backbone", "classes", "dataset", "hold_out", "image_size"):
            one, other = checkpoints[0]["config"][key], checkpoint["config"][key]
            if one != other:
                raise ModelError(f"{path} has {key} {other}, but {files[0]} has {one}: they are no ensemble")
    members = [build_model(checkpoint, path) for checkpoint, path in zip(checkpoints, files, strict=True)]
    first = {key: value for key, value in checkpoints[0].items() if key != "model"}
    return Ensemble(members, mc_samples), first


def versions() -> dict[str, str]:
    """What a result depends on besides its command: package versions, hardware, git commit (or "unknown")."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion, which weights_only refuses to read
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
        "commit": commit or "unknown",
    }
