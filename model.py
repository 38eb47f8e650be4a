"""DeepLabv3 with an uncertainty head, the ensemble that teaches it, and their checkpoints.

The teacher is M independently trained networks. With softmax taken after upsampling,

    p(c) = 1/M sum_m softmax(logits_m)(c)        y = argmax_c p(c)
    u    = sqrt( 1/(M-1) sum_m (softmax(logits_m)(y) - p(y))^2 )

is its mean prediction and its predictive uncertainty (Landgraf et al. 2024, doi
10.1007/s41064-024-00280-4). The student predicts u with one 1x1 convolution and a sigmoid on the
decoder's features: one pass for both.

    from model import load_model
    network = load_model("ckpts/student.pt")           # eval mode, on the CPU
    logits, uncertainty = network(images)              # uint8 RGB [B, 3, H, W]
"""

import hashlib
import io
import json
import math
import os
import pickle
import platform
import subprocess
import warnings
from collections import OrderedDict
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
Size = tuple[int, int] | None  # (H, W); None: that of the input
TINY = torch.finfo(torch.float32).tiny
BLOCK = 2**18  # numbers of a block of rows in `predictive_statistics`: 1 MB
MAX_STD = math.sqrt(0.5)  # largest unbiased std of values in [0, 1]: of two members, 0 and 1
UNREADABLE = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError,
              TypeError, AttributeError)  # what torch.load answers to damaged bytes  # fmt: skip


class ModelError(ValueError):
    """A checkpoint, weight file or set of members that cannot be used; says what to do."""


# ------------------------------------------------------------ network


class Prediction(NamedTuple):
    """What a network returns."""

    logits: Tensor  # float32 [B, C, H, W]
    uncertainty: Tensor | None  # float32 [B, T, H, W] in (0, 1), a channel per distilled measure


class DeepLabV3(nn.Module):
    """torchvision's DeepLabv3 (`backbone.*` and `classifier.*` keep its names), plus DUDES' head.

    `backbone`, one of `BACKBONES`, has output stride 8 for resnet50 and resnet101, else 16.
    `measures` names the distilled uncertainties, a channel each; without any there is no head.
    """

    def __init__(self, backbone: str, num_classes: int, measures: tuple[str, ...] = ()):
        super().__init__()
        self.num_classes = num_classes
        self.backbone, channels = build_backbone(backbone)
        # DeepLabHead cannot be sliced: ASPP, 3x3 convolution, BN, ReLU, classifier
        self.classifier = nn.ModuleList(DeepLabHead(channels, num_classes))
        for branch in self.classifier[0].convs:
            if isinstance(branch, ASPPConv):
                old = branch[0]
                branch[0] = AtrousConv2d(
                    old.in_channels, old.out_channels, 3, padding=old.padding,
                    dilation=old.dilation, bias=False,
                )  # fmt: skip
        width = self.classifier[-1].in_channels
        self.uncertainty = nn.Conv2d(width, len(measures), kernel_size=1) if measures else None
        if measures:  # start where stds lie, at 0.05: from 0.5 a sigmoid takes epochs to get there
            nn.init.constant_(self.uncertainty.bias, -3.0)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, size: Size = None) -> Prediction:
        """RGB images [B, 3, h, w], uint8 or float in [0, 1]; predicts at `size`, default (h, w)."""
        size = size or images.shape[-2:]
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = self.backbone((x - self.mean) / self.std)
        for layer in self.classifier[:-1]:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 logits would have 256 steps
            x = x.float()
            u = None if self.uncertainty is None else upsample(self.uncertainty(x), size).sigmoid()
            return Prediction(upsample(self.classifier[-1](x), size), u)


class AtrousConv2d(nn.Conv2d):
    """A dilated 3x3 convolution that leaves out the taps which see nothing but padding.

    Where the map is no higher (wider) than the dilation, only the middle row (column) of the kernel
    meets pixels: leaving out the others changes nothing but the work.
    """

    def forward(self, x: Tensor) -> Tensor:
        keep = [size > dilation for size, dilation in zip(x.shape[-2:], self.dilation, strict=True)]
        if all(keep):
            return super().forward(x)
        rows, columns = (slice(None) if whole else slice(1, 2) for whole in keep)
        padding = [dilation * whole for dilation, whole in zip(self.dilation, keep, strict=True)]
        return F.conv2d(x, self.weight[:, :, rows, columns], self.bias, 1, padding, self.dilation)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation (corners not aligned) of float32 [B, C, h, w] to [B, C, H, W].

    As two matrix products: their gradients are products too, which is faster than scattering and,
    unlike F.interpolate's on a GPU, deterministic.
    """
    rows, columns = (
        F.interpolate(torch.eye(n, device=x.device)[None], size=wanted, mode="linear")[0].T
        for n, wanted in zip(x.shape[-2:], size, strict=True)
    )  # [H, h], [W, w]
    return rows @ (x @ columns.T)


def build_backbone(name: str) -> tuple[nn.Sequential, int]:
    """torchvision's classifier without its last layers, dilated, and its output channels."""
    if name not in BACKBONES:
        raise ModelError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    if name == "mobilenet_v3_large":
        return torchvision.models.mobilenet_v3_large(dilated=True).features, 960
    if name == "resnet18":
        network = torchvision.models.resnet18()
        # BasicBlock takes no dilation. The strided convolution still sees the undilated grid; those
        # that follow it step over the pixels which the stride no longer removes.
        first, second = network.layer4
        first.conv1.stride = first.downsample[0].stride = (1, 1)
        for conv in (first.conv2, second.conv1, second.conv2):
            conv.dilation = conv.padding = (2, 2)
    else:
        dilate = [False, True, True]
        network = getattr(torchvision.models, name)(replace_stride_with_dilation=dilate)
    channels = network.fc.in_features
    del network.avgpool, network.fc
    return nn.Sequential(OrderedDict(network.named_children())), channels


def load_weights(network: DeepLabV3, weights: str, backbone: str) -> str:
    """Initialise `network` from `weights`: "imagenet" (downloaded), "none" or a state dict.

    A file may hold a classifier or a DeepLabv3 of torchvision, or a checkpoint of this project. It
    has to fill the whole backbone (else ModelError); of the rest, what fits by name and shape is
    taken. Returns a line that says how much.
    """
    if weights == "none":
        return "weights: random"
    if weights == "imagenet":
        enum = torchvision.models.get_model_weights(backbone).DEFAULT
        try:
            state = enum.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # urllib's are OSErrors; a wrong hash
            raise ModelError(
                f"cannot download {enum.url} ({error}); fetch that file elsewhere and pass it as "
                "--weights FILE, or start with --weights none"
            ) from error
    else:
        state = read_tensors(weights)
        for key in ("model", "state_dict"):
            if isinstance(state.get(key), dict):
                state = state[key]
    own = network.state_dict()
    found = {}
    for name, value in state.items():
        name = str(name).removeprefix("module.").removeprefix("features.")
        for key in (name, "backbone." + name):
            if key in own and isinstance(value, Tensor) and own[key].shape == value.shape:
                found[key] = value
    rest = [name for name in own if name not in found and "num_batches" not in name]
    if missing := [name for name in rest if name.startswith("backbone.")]:
        raise ModelError(
            f"weights {weights!r} do not fit backbone {backbone}: {len(missing)} of its tensors "
            f"are missing or differ in shape, as {missing[0]}; pass a torchvision {backbone}"
        )
    network.load_state_dict(found, strict=False)
    return f"weights: {len(found)} tensors from {weights}, {len(rest)} random"


# ------------------------------------------------------------ ensemble


class EnsemblePrediction(NamedTuple):
    """What a teacher returns."""

    probs: Tensor  # float32 [B, C, H, W], the mean softmax
    std: Tensor  # float32 [B, H, W] in [0, 0.7072], unbiased, of the predicted class's probability
    expected_entropy: Tensor | None  # float32 [B, H, W], the members' mean in nats, if asked for


def predicted(scores: Tensor) -> Tensor:
    """The class of the highest logit or probability [B, C, ...], the first of equals: [B, ...]."""
    return scores.max(dim=1).indices  # five times as fast as argmax on a CPU


def predictive_statistics(member_logits: Iterable[Tensor], expected_entropy=False):
    """The `EnsemblePrediction` of a stream of M >= 2 logits [B, C, H, W]; ModelError if M < 2.

    Memory is that of four [B, C, H, W] tensors whatever M is. Plain sums of p and p^2 cancel where
    probabilities saturate (a std under 1e-3 is lost in float32), so both sums are taken of p - p_0,
    the first member's p. Rows go block by block: what a CPU's cache holds needs no memory.
    """
    count, entropy = 0, None
    for logits in member_logits:
        if count == 0:
            first = torch.empty_like(logits, dtype=torch.float32)
            shift, square = torch.zeros_like(first), torch.zeros_like(first)
            entropy = torch.zeros_like(first[:, 0]) if expected_entropy else None
            rows = max(1, BLOCK * logits.shape[2] // logits.numel())
            starts = range(0, logits.shape[2], logits.shape[2] if logits.is_cuda else rows)
            blocks = [slice(start, start + starts.step) for start in starts]
        for block in blocks:
            p = logits[:, :, block].float().softmax(dim=1)
            if expected_entropy:
                terms = p.clamp(min=TINY).log_().mul_(p)  # 0 log 0 = 0; special.entr takes twice
                entropy[:, block] -= terms.sum(dim=1)  # [B, rows, W]
            if count == 0:
                first[:, :, block] = p
            else:
                p.sub_(first[:, :, block])
                shift[:, :, block] += p
                square[:, :, block].addcmul_(p, p)
        count += 1
    if count < 2:
        raise ModelError(f"predictive uncertainty needs at least 2 predictions, got {count}")
    probs = first.add_(shift, alpha=1 / count)  # [B, C, H, W]
    y = predicted(probs)[:, None]  # [B, 1, H, W]
    shift, square = shift.gather(1, y), square.gather(1, y)
    variance = (square - shift.square() / count) / (count - 1)
    std = variance.clamp_(min=0).sqrt_().squeeze(1)
    return EnsemblePrediction(probs, std, None if entropy is None else entropy.div_(count))


class Ensemble(nn.Module):
    """M >= 2 frozen networks, or dropout samples of one (`mc_samples`; Gal & Ghahramani 2016)."""

    def __init__(self, members: list[DeepLabV3], mc_samples: int = 0):
        super().__init__()
        if not (len(members) == 1 and mc_samples >= 2 if mc_samples else len(members) >= 2):
            raise ModelError(
                f"--mc-samples {mc_samples} with {len(members)} checkpoints: train at least 2 "
                "members, or name a single checkpoint and sample it at least 2 times"
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

    def stream(self, images: Tensor, size: Size = None) -> Iterator[Tensor]:
        """The members' logits [B, C, H, W] one after the other, in the members' order."""
        for index in range(len(self)):
            yield self.members[0 if self.mc_samples else index](images, size).logits

    def forward(self, images: Tensor, size: Size = None, expected_entropy=False):
        """`EnsemblePrediction` of images [B, 3, h, w] as for `DeepLabV3`, at `size` or (h, w)."""
        return predictive_statistics(self.stream(images, size), expected_entropy)


# ------------------------------------------------------------ checkpoints


def save_atomically(path: str | Path, content: dict | str) -> None:
    """Write tensors and plain dicts, or a text; a reader finds the old file or the new one."""
    path = Path(path)
    if isinstance(content, str):
        data = content.encode()
    else:
        buffer = io.BytesIO()  # torch.save makes a RuntimeError of a full disk, write() does not
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
    """`torch.load` of tensors and plain containers: a file that holds code is refused, not run."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no such checkpoint: {path}; check the path, or train it first")
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        reason = reason if path.stat().st_size else "it is empty"
        message = f"{path} is not a readable checkpoint ({reason}); restore it or train it again"
        raise ModelError(message) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dict; name another file")
    return content


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project: `model`, `config`, `args`, `metrics`, `versions`."""
    checkpoint = read_tensors(path)
    missing = {"model", "config", "args"} - checkpoint.keys()
    missing = missing or {"backbone", "classes", "measures"} - set(checkpoint["config"] or ())
    if missing:
        lacks = ", ".join(sorted(missing))
        raise ModelError(f"{path} is no checkpoint of this project: it lacks {lacks}")
    return checkpoint


def build_model(checkpoint: dict, path: str | Path) -> DeepLabV3:
    """The network of a checkpoint that `read_checkpoint` read from `path`, in eval mode."""
    config = checkpoint["config"]
    network = DeepLabV3(config["backbone"], len(config["classes"]), tuple(config["measures"]))
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: its weights do not fit its configuration ({reason})") from error
    return network.eval()


def load_model(path: str | Path) -> DeepLabV3:
    """The network of a checkpoint file, in eval mode, on the CPU; ModelError if it is unusable."""
    return build_model(read_checkpoint(path), path)


def member_files(teacher: list[str | Path]) -> list[Path]:
    """Checkpoint files of a teacher: those of a folder (`member_*.pt`), or the named files."""
    first = Path(teacher[0])
    if len(teacher) > 1 or first.suffix == ".pt" or first.is_file():
        return [Path(path) for path in teacher]
    if files := sorted(first.glob("member_[0-9]*.pt")):
        return files
    raise ModelError(f"no member_*.pt in {first}; first run python train_ensemble.py --members 10")


def load_ensemble(teacher: list[str | Path], mc_samples: int = 0) -> tuple[Ensemble, dict]:
    """The members of a folder or the named files, and the first one's checkpoint without `model`
    but with `identity`, which tells how all of them were trained and what came of it.

    Raises ModelError where a folder lacks members that its training run had, or where members
    differ in backbone, classes or data, naming both files.
    """
    files = member_files(teacher)
    checkpoints = [read_checkpoint(path) for path in files]
    configs = [checkpoint["config"] for checkpoint in checkpoints]
    if Path(teacher[0]).is_dir():
        expected = max(config["members"] for config in configs)
        wanted = {f"member_{index:02d}.pt" for index in range(expected)}
        if absent := ", ".join(sorted(wanted - {path.name for path in files})):
            raise ModelError(f"{teacher[0]} lacks {absent} of a run of {expected} members; finish "
                             "the training, or name the files to use one by one")  # fmt: skip
    for path, config in zip(files, configs, strict=True):
        for key in ("backbone", "classes", "dataset", "hold_out", "image_size"):
            if (other := config[key]) != (one := configs[0][key]):
                raise ModelError(f"{path} has {key} {other}, but {files[0]} has {one}: they are no "
                                 "ensemble")  # fmt: skip
    pairs = zip(checkpoints, files, strict=True)
    members = [build_model(checkpoint, path) for checkpoint, path in pairs]
    first = {key: value for key, value in checkpoints[0].items() if key != "model"}
    trained = json.dumps([[one["args"], one.get("metrics")] for one in checkpoints])
    first["identity"] = hashlib.sha256(trained.encode()).hexdigest()[:16]
    return Ensemble(members, mc_samples), first


def versions() -> dict[str, str]:
    """What a result depends on besides its command: package versions, hardware, git commit."""
    try:
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"]
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
