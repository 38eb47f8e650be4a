"""DeepLabv3 with an uncertainty head, the ensemble that teaches it, and checkpoints.

The teacher is M independently trained networks. With the softmax taken after the upsampling,

    p(c) = 1/M sum_m softmax(logits_m)(c)        y = argmax_c p(c)
    u    = sqrt( 1/(M-1) sum_m (softmax(logits_m)(y) - p(y))^2 )

is its mean prediction and its predictive uncertainty (Landgraf et al. 2024, doi
10.1007/s41064-024-00280-4). The student predicts u in the pass that predicts the
classes, by one of two heads: `ConfidenceHead`, which weighs what the student's own
softmax says by what the decoder's features show, or `PaperHead`, a 1x1 convolution
and a sigmoid on these features.

    from model import load_model
    network = load_model("ckpts/student.pt")           # eval mode, on the CPU
    logits, uncertainty = network(images)              # uint8 RGB [B, 3, H, W]
    network.classes, network.palette, network.measures, network.image_size

evaluate.py's `load_model` gives the same network with a name for everything that it predicts.

Outline:
    the network         DeepLabV3 and its parts
    uncertainty heads   ConfidenceHead, PaperHead
    initial weights     ImageNet, a file, or none
    the ensemble        mean probabilities and predictive uncertainty, streamed; MC dropout
    checkpoints         save, read, rebuild a network, rebuild an ensemble
    the machine         device, arithmetic, locks, processes, versions
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import PIL
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch import distributed as dist
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.deeplabv3 import ASPPConv, DeepLabHead

BACKBONES = ("resnet18", "resnet50", "resnet101", "mobilenet_v3_large")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]  # height, width in pixels
RGB = tuple[int, int, int]


class ModelError(ValueError):
    """A checkpoint, weight file or set of members that cannot be used; says why."""


class UsageError(ValueError):
    """Flags, or a state of the disk or a training, that a user can mend; says how."""


# -------------------------------------------------------------------------------------- the network


class Prediction(NamedTuple):
    """What a network returns."""

    logits: Tensor  # float32 [B, C, H, W]
    uncertainty: Tensor | None  # float32 [B, T, H, W] in (0, 1), a channel per distilled measure


class DeepLabV3(nn.Module):
    """torchvision's DeepLabv3 (Chen et al. 2017) with the uncertainty head of DUDES.

    backbone: one of `BACKBONES`; output stride 8 for resnet50 and resnet101, else 16.
    measures: names of the distilled uncertainties, a channel each; without any there is no head.
    rgb_mean, rgb_std: of the values in [0, 1], with which the network normalises its input.
    head: one of `HEADS`, which predicts the uncertainties.

    Attributes that `build_model` fills in, for whoever uses the network:
        classes, palette: the names of the classes, and their colours.
        image_size: (H, W) of the images that it was trained for, see `trained_size`; or None.

    The parameters keep torchvision's names, `backbone.*` and `classifier.*`, so that
    its weights fit. Raises ModelError at an unknown backbone or head.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        measures: tuple[str, ...] = (),
        rgb_mean: tuple[float, ...] = IMAGENET_MEAN,
        rgb_std: tuple[float, ...] = IMAGENET_STD,
        head: str = "paper",
    ):
        super().__init__()
        self.num_classes = num_classes
        self.measures: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()
        self.palette: tuple[RGB, ...] = ()
        self.image_size: Size | None = None
        self.backbone, channels = build_backbone(backbone)
        # DeepLabHead is a Sequential that cannot be sliced, so its layers go into a
        # list: ASPP, 3x3 convolution, batch norm, ReLU, classifier.
        self.classifier = nn.ModuleList(DeepLabHead(channels, num_classes))
        branches = self.classifier[0].convs
        for branch in branches:
            if isinstance(branch, ASPPConv):
                branch[0] = AtrousConv2d.like(branch[0])
        branches[-1] = GlobalPooling(*branches[-1])

        self.uncertainty = None
        if measures:
            self.add_uncertainty(measures, head)

        # Not in the weights: a checkpoint names them in its configuration. And never on the meta
        # device, on which `build_model` builds the rest.
        rgb_mean = torch.tensor(rgb_mean, device="cpu").view(1, 3, 1, 1)
        rgb_std = torch.tensor(rgb_std, device="cpu").view(1, 3, 1, 1)
        self.register_buffer("rgb_mean", rgb_mean, persistent=False)
        self.register_buffer("rgb_std", rgb_std, persistent=False)

    def add_uncertainty(self, measures: tuple[str, ...], head: str) -> None:
        """Give the network a new head for those measures, with its layers' usual initial weights.

        Raises ModelError at an unknown head.
        """
        weight = self.classifier[-1].weight  # [C, channels, 1, 1]
        new_head = build_head(head, weight.shape[1], len(measures))
        self.uncertainty = new_head.to(weight.device)
        self.measures = tuple(measures)

    def forward(self, images: Tensor, size: Size | None = None) -> Prediction:
        """Predictions for RGB images [B, 3, h, w], uint8 or float in [0, 1].

        The predictions have `size` (H, W), by default that of the images. Raises
        ModelError, in eval mode, where images that are not uint8 leave [0, 1].
        """
        return self.apply_heads(self.extract_features(images), size or images.shape[-2:])

    def extract_features(self, images: Tensor) -> Tensor:
        """The decoder's features [B, 256, h/s, w/s], of images as `forward` takes them.

        The output stride s is 8 or 16. Raises ModelError as `forward` does.
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not self.training and not torch.compiler.is_compiling():
            # This waits for a GPU. This project's own images are uint8, which need no look.
            check_range(images)
        normalised = (images - self.rgb_mean) / self.rgb_std
        features = self.backbone(normalised)  # [B, channels, h/s, w/s]
        for layer in self.classifier[:-1]:
            features = layer(features)
        return features

    def apply_heads(self, features: Tensor, size: Size) -> Prediction:
        """Predictions of `size` (H, W) from the decoder's features."""
        # The heads work in float32: logits in bfloat16 would have 256 steps to a factor of two.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            logits = upsample(self.classifier[-1](features), size)
            uncertainty = None
            if self.uncertainty is not None:
                uncertainty = self.uncertainty(features, logits)
        return Prediction(logits, uncertainty)


class AtrousConv2d(nn.Conv2d):
    """A dilated 3x3 convolution that leaves out the taps which see nothing but padding.

    Where the feature map is no higher (wider) than the dilation, only the middle row
    (column) of the kernel meets pixels. Leaving out the others changes nothing but the
    work.
    """

    @classmethod
    def like(cls, conv: nn.Conv2d) -> "AtrousConv2d":
        """A new layer of the same shape as a dilated 3x3 convolution without bias."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            kernel_size=3,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h, w]."""
        if is_exporting():
            # An exported graph has one path for all sizes.
            return super().forward(x)
        height, width = x.shape[-2:]
        weight = self.weight  # [out, in, 3, 3]
        padding_y, padding_x = self.dilation  # a 3x3 convolution keeps the size so
        if height <= padding_y:
            weight = weight[:, :, 1:2, :]
            padding_y = 0
        if width <= padding_x:
            weight = weight[:, :, :, 1:2]
            padding_x = 0
        padding = (padding_y, padding_x)
        return F.conv2d(x, weight, self.bias, padding=padding, dilation=self.dilation)


class GlobalPooling(nn.Sequential):
    """The layers of torchvision's ASPPPooling, which see the whole image: its mean comes first."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h, w]."""
        pooled = x
        for layer in self:
            pooled = layer(pooled)  # [B, out, 1, 1] after the first
        # torchvision interpolates this one value, which gives the same; but on a GPU the
        # gradient then adds up the h w places one after the other, in no fixed order.
        return pooled.expand(-1, -1, *x.shape[-2:])


class HalvingMaxPool2d(nn.MaxPool2d):
    """The maximum of each 3x3 neighbourhood, of every second row and column."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, (h + 1) // 2, (w + 1) // 2]."""
        if is_exporting():
            # The oldest supported torch exports strided pooling for odd sizes or for
            # even ones, not for both. This is the same, and costs less than 1 % of a
            # network's time.
            return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)[:, :, ::2, ::2]
        return super().forward(x)


def is_exporting() -> bool:
    """Whether torch.export is tracing a network, as it does by default (not "strict").

    torch.compiler.is_exporting alone says so to torch.compile too, up to torch 2.13: compiled
    networks took the slower paths of exported ones.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def check_range(images: Tensor) -> None:
    """Raises ModelError where float images leave [0, 1] by more than an interpolation rounds."""
    lowest, highest = images.aminmax()
    if not (lowest >= -1e-3 and highest <= 1 + 1e-3):  # so that NaN is refused too
        raise ModelError(
            f"images hold values from {lowest:g} to {highest:g}; pass RGB as uint8, or as float "
            "in [0, 1], not normalised: the network does that"
        )


def upsample(x: Tensor, size: Size) -> Tensor:
    """Bilinear interpolation (corners not aligned) of float32 [B, C, h, w] to [B, C, H, W].

    Bilinear interpolation is linear in the rows and in the columns, so it is two matrix
    products. Their gradients are products too, which is faster than scattering and,
    unlike that of F.interpolate on a GPU, deterministic.
    """
    if is_exporting():
        # Of an exported graph every runtime knows this operation, and no gradients are asked.
        return F.interpolate(x, size=size, mode="bilinear")
    rows = interpolation_matrix(x.shape[-2], size[0], x.device)  # [H, h]
    columns = interpolation_matrix(x.shape[-1], size[1], x.device)  # [W, w]
    return rows @ (x @ columns.T)


def interpolation_matrix(length: int, new_length: int, device: torch.device) -> Tensor:
    """The matrix [new_length, length] that interpolates a signal linearly."""
    unit_signals = torch.eye(length, device=device)[None]  # [1, length, length]
    return F.interpolate(unit_signals, size=new_length, mode="linear")[0].T


def build_backbone(name: str) -> tuple[nn.Sequential, int]:
    """torchvision's classifier, headless and dilated, and its output channels."""
    if name not in BACKBONES:
        raise ModelError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    if name == "mobilenet_v3_large":
        return torchvision.models.mobilenet_v3_large(dilated=True).features, 960
    if name == "resnet18":
        network = torchvision.models.resnet18()
        dilate_last_stage(network.layer4)
    else:
        constructor = getattr(torchvision.models, name)
        network = constructor(replace_stride_with_dilation=[False, True, True])
    channels = network.fc.in_features
    network.maxpool = HalvingMaxPool2d(kernel_size=3, stride=2, padding=1)
    del network.avgpool, network.fc
    return nn.Sequential(OrderedDict(network.named_children())), channels


def dilate_last_stage(stage: nn.Sequential) -> None:
    """Replace the stride of a ResNet-18's last stage by dilation: output stride 16, not 32.

    torchvision's constructor does this for bottleneck blocks alone. The convolution
    that was strided still sees the undilated grid; those that follow it step over the
    pixels which the stride no longer removes.
    """
    first, second = stage
    first.conv1.stride = (1, 1)
    first.downsample[0].stride = (1, 1)
    for conv in (first.conv2, second.conv1, second.conv2):
        conv.dilation = (2, 2)
        conv.padding = (2, 2)


# -------------------------------------------------------------------------------- uncertainty heads

HEADS = ("confidence", "paper")


def build_head(name: str, channels: int, num_measures: int) -> nn.Module:
    """The uncertainty head of that name, for features of so many channels.

    A head takes the decoder's features [B, channels, h, w] and the logits [B, C, H, W],
    and returns the uncertainties [B, T, H, W] in (0, 1). Raises ModelError at an
    unknown name.
    """
    if name == "paper":
        return PaperHead(channels, num_measures)
    if name == "confidence":
        return ConfidenceHead(channels, num_measures)
    raise ModelError(f"unknown uncertainty head {name!r}; choose one of {', '.join(HEADS)}")


class PaperHead(nn.Conv2d):
    """The head of DUDES: a 1x1 convolution of the features, upsampled, and a sigmoid.

    u_t = sigmoid(up(a_t))
    """

    # It starts where most standard deviations lie, at sigmoid(-3) = 0.05. With a bias
    # of 0 it would start at 0.5 and need epochs to come down.
    START = -3.0

    def __init__(self, channels: int, num_measures: int):
        super().__init__(channels, num_measures, kernel_size=1)
        nn.init.constant_(self.bias, self.START)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """[B, channels, h, w] and [B, C, H, W] -> [B, T, H, W] in (0, 1)."""
        a = super().forward(features)  # [B, T, h, w]
        return upsample(a, logits.shape[-2:]).sigmoid()


class ConfidenceHead(nn.Module):
    """A head that starts from how sure the network is, and learns where that misleads.

        u_t = sigmoid( up(a_t) + up(b_t1) z_1 + up(b_t2) z_2 )
        z_1 = log-odds of 1 - max softmax        z_2 = log-odds of entropy / log C

    The features have 1/8 or 1/16 of the resolution: what is made of them alone cannot
    draw the thin lines along borders where the members of an ensemble disagree. z can,
    because the softmax is taken after the upsampling. a_t and the weights b_t are
    predicted for every place by a small stack of convolutions of the features.

    Neither z nor the features pass a gradient back: the head learns to judge the
    network and does not change it, so the segmentation is what it would be without.
    """

    WIDTH = 64  # channels of the hidden layers
    START = -1.5  # of a
    START_OF_WEIGHTS = 0.25  # of b
    SMALLEST = 1e-5  # log-odds are of numbers in [SMALLEST, 1 - SMALLEST], so at most 11.5

    def __init__(self, channels: int, num_measures: int):
        super().__init__()
        self.stack = nn.Sequential(
            nn.Conv2d(channels, self.WIDTH, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(self.WIDTH, self.WIDTH, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(self.WIDTH, 3 * num_measures, kernel_size=1),  # a, b_1 and b_2
        )
        last = self.stack[-1]
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias[:num_measures], self.START)
        nn.init.constant_(last.bias[num_measures:], self.START_OF_WEIGHTS)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """[B, channels, h, w] and [B, C, H, W] -> [B, T, H, W] in (0, 1)."""
        predicted = upsample(self.stack(features.detach()), logits.shape[-2:])  # [B, 3T, H, W]
        a, first_b, second_b = predicted.chunk(3, dim=1)  # [B, T, H, W] each
        z = self.log_odds(logits.detach())  # [B, 2, H, W]
        return (a + first_b * z[:, :1] + second_b * z[:, 1:]).sigmoid()

    @classmethod
    def log_odds(cls, logits: Tensor) -> Tensor:
        """z of float32 logits [B, C, H, W]: [B, 2, H, W]."""
        # One class at a time: temporaries of the size of the logits took twice as long
        # on a CPU. With l the largest logit of a pixel and s = sum_c exp(logit_c - l),
        # the largest probability is 1 / s and the entropy log s - sum_c exp(logit_c -
        # l) (logit_c - l) / s.
        largest = logits.amax(dim=1)  # [B, H, W]
        total = torch.zeros_like(largest)
        weighted = torch.zeros_like(largest)
        for class_logits in logits.unbind(dim=1):
            difference = class_logits - largest
            exponential = difference.exp()
            total += exponential
            weighted += exponential * difference
        error = (total - 1) / total
        entropy = (total.log() - weighted / total) / math.log(logits.shape[1])
        return torch.stack([error, entropy], dim=1).logit(eps=cls.SMALLEST)


# ---------------------------------------------------------------------------------- initial weights


# What DistributedDataParallel, torch.compile and FSDP put into the names of parameters, anywhere.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
# What stands before them where a network is the attribute of another class. The last
# one is torchvision's, in its mobilenets.
HOLDERS = {"model", "net", "network", "encoder", "features"}


def load_weights(network: DeepLabV3, weights: str, backbone: str) -> str:
    """Initialise `network` from `weights`: "imagenet" (downloaded), "none", or a file.

    A file may hold a classifier or a DeepLabv3 of torchvision, alone or in the
    checkpoint of a training, or a checkpoint of this project. It has to fill the whole
    backbone (else ModelError); of the rest, what fits by name and shape is taken.
    Returns a line that says how much.
    """
    if weights == "none":
        zero_residual_branches(network)
        return "weights: random"
    if weights == "imagenet":
        state = download_imagenet(backbone)
    else:
        state = read_state_dict(weights)

    expected = network.state_dict()
    fitting = {}
    source = {}  # the name in the file of what is in `fitting`
    for name, value in state.items():
        plain_name = without_wrappers(str(name))
        # a classifier's names lack the prefix that they have here
        for candidate in (plain_name, "backbone." + plain_name):
            fits = candidate in expected and isinstance(value, Tensor)
            if fits and expected[candidate].shape == value.shape:
                if candidate in fitting:
                    raise ModelError(
                        f"weights {weights!r} hold two networks, as {source[candidate]} and "
                        f"{name} say; save the state_dict of one of them alone"
                    )
                fitting[candidate] = value
                source[candidate] = name

    missing = [name for name in expected if name not in fitting and "num_batches" not in name]
    missing_backbone = [name for name in missing if name.startswith("backbone.")]
    if missing_backbone:
        first_name = next(iter(state), "nothing")
        raise ModelError(
            f"weights {weights!r} do not fit backbone {backbone}: {len(missing_backbone)} of its "
            f"tensors are missing or differ in shape, as {missing_backbone[0]}; the file "
            f"begins with {first_name}; pass a torchvision {backbone}"
        )
    network.load_state_dict(fitting, strict=False)
    return f"weights: {len(fitting)} tensors from {weights}, {len(missing)} random"


def zero_residual_branches(network: DeepLabV3) -> None:
    """Let every residual block of a ResNet begin as the identity (Goyal et al. 2017).

    The last batch norm of its branch starts at 0 (arXiv 1706.02677, section 5.1). Measured on
    the drawn scenes: members learn in one epoch what took them two.
    """
    for block in network.backbone.modules():
        if isinstance(block, BasicBlock):
            nn.init.zeros_(block.bn2.weight)
        elif isinstance(block, Bottleneck):
            nn.init.zeros_(block.bn3.weight)


def without_wrappers(name: str) -> str:
    """The name that a parameter has in the bare network: "conv1.weight" is that of
    "module.model.conv1.weight"."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts and parts[0] in HOLDERS:
        parts.pop(0)
    return ".".join(parts)


def download_imagenet(backbone: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights; ModelError where they cannot be fetched."""
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    # urllib's errors are OSErrors, a wrong hash is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot download {weights.url} ({error}); fetch that file elsewhere and pass it as "
            "--weights FILE, or start with --weights none"
        ) from error


def read_state_dict(path: str | Path) -> dict:
    """The weights in a file, which may lie below keys that say so, one in the other."""
    state = read_tensors(path)
    keys = ("model", "state_dict", "model_state_dict", "net")
    for key in keys * 2:  # in either order
        if isinstance(state.get(key), dict):
            state = state[key]
    return state


# ------------------------------------------------------------------------------------- the ensemble

TINY = torch.finfo(torch.float32).tiny
NUMBERS_PER_BLOCK = 2**18  # of rows that are worked on at once: 1 MB, which a cache holds


class EnsemblePrediction(NamedTuple):
    """What a teacher returns."""

    probs: Tensor  # float32 [B, C, H, W], the mean softmax
    std: Tensor  # float32 [B, H, W] in [0, 0.7072], unbiased, of the predicted class's probability
    expected_entropy: Tensor | None  # float32 [B, H, W], the members' mean in nats, if asked for


def predicted_class(scores: Tensor) -> Tensor:
    """The class of the highest score, the first of equals: [B, C, ...] -> [B, ...]."""
    return scores.max(dim=1).indices  # five times as fast as argmax on a CPU


def add_member(
    logits: Tensor, first: Tensor, shift: Tensor, square: Tensor, entropy: Tensor | None
) -> None:
    """Add a further member's logits [B, C, H, W] to the sums of `predictive_statistics`, in place.

    first, shift, square: [B, C, H, W]; entropy: [B, H, W], None where it is not asked for.
    """
    probs = member_probs(logits, entropy)
    difference = probs.sub_(first)
    shift += difference
    square.addcmul_(difference, difference)


def member_probs(logits: Tensor, entropy: Tensor | None) -> Tensor:
    """A member's softmax, float32 [B, C, H, W]; its entropy is added to `entropy` in place."""
    probs = logits.float().softmax(dim=1)
    if entropy is not None:
        # 0 log 0 = 0 by the clamp; torch.special.entr does it in twice the time
        terms = probs.clamp(min=TINY).log_().mul_(probs)
        entropy -= terms.sum(dim=1)
    return probs


def predictive_statistics(
    member_logits: Iterable[Tensor],
    with_expected_entropy: bool = False,
    add_member: Callable = add_member,
) -> EnsemblePrediction:
    """Mean and spread of a stream of the M >= 2 members' logits [B, C, H, W].

    Memory is that of four [B, C, H, W] tensors, whatever M is. Plain sums of p and p^2
    cancel where probabilities saturate (a std under 1e-3 is lost in float32), so both
    sums are taken of p - p_0, with p_0 the first member's p:

        shift = sum_m (p_m - p_0)        square = sum_m (p_m - p_0)^2
        mean  = p_0 + shift / M          variance = (square - shift^2 / M) / (M - 1)

    add_member: the function of that name, or what torch.compile made of it, which pays
    where all logits have one size. Raises ModelError if M < 2.
    """
    count = 0
    for logits in member_logits:
        if count == 0:
            first = torch.empty_like(logits, dtype=torch.float32)  # p_0, [B, C, H, W]
            shift = torch.zeros_like(first)
            square = torch.zeros_like(first)
            entropy = torch.zeros_like(first[:, 0])  # [B, H, W]
            blocks = blocks_of_rows(logits)
        for block in blocks:
            block_logits = logits[:, :, block]  # [B, C, rows, W]
            block_first = first[:, :, block]
            block_entropy = entropy[:, block] if with_expected_entropy else None
            if count == 0:
                block_first.copy_(member_probs(block_logits, block_entropy))
            else:
                block_shift = shift[:, :, block]
                block_square = square[:, :, block]
                add_member(block_logits, block_first, block_shift, block_square, block_entropy)
        count += 1
    if count < 2:
        raise ModelError(f"predictive uncertainty needs at least 2 predictions, got {count}")

    # The mean takes the place of `first`, which is not needed again.
    mean = first.add_(shift, alpha=1 / count)
    classes = predicted_class(mean)[:, None]  # [B, 1, H, W]
    shift_of_class = shift.gather(1, classes)
    square_of_class = square.gather(1, classes)
    variance = (square_of_class - shift_of_class.square() / count) / (count - 1)
    std = variance.clamp_(min=0).sqrt_().squeeze(1)  # rounding may leave less than 0
    expected_entropy = entropy.div_(count) if with_expected_entropy else None
    return EnsemblePrediction(mean, std, expected_entropy)


def blocks_of_rows(logits: Tensor) -> list[slice]:
    """Slices over the rows of [B, C, H, W]: small ones on a CPU, where a block that
    stays in its cache needs no memory traffic; on a GPU one for all."""
    height = logits.shape[2]
    if logits.is_cuda:
        return [slice(0, height)]
    rows = max(1, NUMBERS_PER_BLOCK * height // logits.numel())
    return [slice(start, start + rows) for start in range(0, height, rows)]


class Ensemble(nn.Module):
    """M >= 2 frozen networks, or dropout samples of one (`mc_samples`; Gal & Ghahramani 2016).

    Raises ModelError at fewer members or samples than two, or at samples of several networks.
    """

    def __init__(self, members: list[DeepLabV3], mc_samples: int = 0):
        super().__init__()
        if mc_samples == 0 and len(members) < 2:
            raise ModelError(
                "one checkpoint is no ensemble: train at least 2 members, or sample this one at "
                "least 2 times (--mc-samples)"
            )
        if mc_samples != 0 and (len(members) != 1 or mc_samples < 2):
            raise ModelError(
                f"--mc-samples {mc_samples} with {len(members)} checkpoints: name a single "
                "checkpoint and sample it at least 2 times"
            )
        self.members = nn.ModuleList(members).requires_grad_(False)
        self.mc_samples = mc_samples
        self.add_member = add_member  # as `predictive_statistics` takes it
        self.eval()

    def train(self, mode: bool = True) -> "Ensemble":
        """Stay frozen whatever `mode` says; dropout that is sampled stays on."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train(self.mc_samples > 0)
        return self

    def __len__(self) -> int:
        return self.mc_samples or len(self.members)

    def compile_for_one_size(self) -> None:
        """From now on run compiled, for images of one size: another one is compiled anew."""
        for member in self.members:
            member.compile(dynamic=False)
        self.compile_sums()

    def compile_sums(self) -> None:
        """On a GPU, let the sums over the members be one compiled pass over their numbers.

        Uncompiled, each operation reads and writes [B, C, H, W] numbers anew: three
        times the traffic. On a CPU, `blocks_of_rows` keeps that in the cache.
        """
        if next(self.parameters()).is_cuda:
            self.add_member = torch.compile(add_member, dynamic=False)

    def member_logits(self, images: Tensor, size: Size | None = None) -> Iterator[Tensor]:
        """The members' logits [B, C, H, W], one after the other, in their order."""
        if self.mc_samples:
            networks = [self.members[0]] * self.mc_samples
        else:
            networks = self.members
        for network in networks:
            yield network(images, size).logits

    def forward(
        self, images: Tensor, size: Size | None = None, with_expected_entropy: bool = False
    ) -> EnsemblePrediction:
        """The prediction for images [B, 3, h, w], as `DeepLabV3.forward` takes them."""
        member_logits = self.member_logits(images, size)
        return predictive_statistics(member_logits, with_expected_entropy, self.add_member)


# -------------------------------------------------------------------------------------- checkpoints

# What torch.load answers to damaged bytes.
UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)

# What a file system answers where it does not know what it is asked for, as network
# disks and others that live outside of the kernel do.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def save_atomically(path: str | Path, content: dict | str | bytes) -> None:
    """Write tensors, a text or bytes; a reader finds the old file or the new one.

    A text is UTF-8. A name of a file that was no UTF-8 has characters that UTF-8 lacks: "?".
    """
    path = Path(path)
    if isinstance(content, str):
        data = content.encode("utf-8", errors="replace")
    elif isinstance(content, bytes):
        data = content
    else:
        # To memory first: on a full disk torch.save raises a RuntimeError, write() an OSError.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getbuffer()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            flush_to_disk(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(file: io.BufferedWriter) -> None:
    """Wait until what was written is on the disk, as far as its file system can be asked to."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def read_tensors(path: str | Path) -> dict:
    """Tensors and plain containers of a file: one that holds code is refused, not run.

    A command line as argparse leaves it, which other trainings save too, is no code.

    Raises ModelError where there is no file, or none of that kind.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path} is a folder; name a checkpoint in it, as {path / 'student.pt'}")
    if not path.is_file():
        raise ModelError(f"no such checkpoint: {path}; check the path, or train it first")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about files that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ModelError(
            f"{path} is not a readable checkpoint {why_unreadable(path, error)}"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dict; name another file")
    return content


def why_unreadable(path: Path, error: Exception) -> str:
    """The reason, in parentheses, why torch.load refused a file, and what to do."""
    # Much of torch's text is advice; what was met stands behind these words, if they are there.
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    refused = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    if refused:
        return (
            f"(it holds more than tensors: {refused[1]}); save its weights alone, with "
            "torch.save(network.state_dict(), FILE)"
        )
    with open(path, "rb") as file:
        head = file.read(24)
    if head.startswith(b"version https://git-lfs"):
        return "(it is a pointer of Git LFS); fetch the file itself with git lfs pull"
    reason = text.splitlines()[0][:120]
    if not head:
        reason = "it is empty"
    return f"({reason}); restore it, train it again, or name a file that torch.save wrote"


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project, with `model`, `config`, `args`, `metrics` and `versions`.

    Raises ModelError where the file lacks what a network is rebuilt from.
    """
    checkpoint = read_tensors(path)
    missing = {"model", "config", "args"} - checkpoint.keys()
    if not missing:
        for key in ("config", "args"):
            if not isinstance(checkpoint[key], dict):  # another program's
                missing.add(key)
    if not missing:
        missing = {"backbone", "classes", "measures"} - checkpoint["config"].keys()
    if missing:
        lacks = ", ".join(sorted(missing))
        raise ModelError(f"{path} is no checkpoint of this project: it lacks {lacks}")
    return checkpoint


def build_model(checkpoint: dict, path: str | Path) -> DeepLabV3:
    """The network of a checkpoint that `read_checkpoint` read from `path`, in eval mode.

    The checkpoint's tensors become its own: two networks of one checkpoint would train each other.
    Raises ModelError where the weights do not fit the configuration.
    """
    config = checkpoint["config"]
    if "uncertainty.from_confidence.weight" in checkpoint["model"]:
        raise ModelError(
            f"{path} was written by another version of this program, whose confidence head was "
            "another; use it with that version, or distil it anew"
        )
    normalisation = config.get("normalisation", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    # Weights on the meta device are shapes alone: drawing random ones, and copying the
    # checkpoint's over them, took half of the time that loading an ensemble takes.
    with torch.device("meta"):
        network = DeepLabV3(
            config["backbone"],
            len(config["classes"]),
            tuple(config["measures"]),
            tuple(normalisation["mean"]),
            tuple(normalisation["std"]),
            config.get("head", "paper"),
        )
    try:
        network.load_state_dict(checkpoint["model"], assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: its weights do not fit its configuration ({reason})") from error
    # As those of a new network are: so far they have the type and the layout of the file.
    network.to(torch.float32, memory_format=torch.contiguous_format)
    network.classes = tuple(config["classes"])
    network.palette = tuple(tuple(colour) for colour in config.get("palette", ()))
    network.image_size = trained_size(checkpoint)
    return network.eval()


def trained_size(checkpoint: dict) -> Size | None:
    """(H, W) of the images that a checkpoint's network was trained for.

    That is what its configuration says under `image_size`: --image-size or, for a
    network that was trained at its images' own sizes, the median of these. Older
    checkpoints leave the latter open: of drawn scenes it is the crop, which is the
    whole scene, and of others None.
    """
    config = checkpoint["config"]
    size = config.get("image_size")
    if not size and config.get("dataset") == "synthetic":
        size = checkpoint["args"].get("crop_size")
    if not size:
        return None
    height, width = size
    return height, width


def load_model(path: str | Path) -> DeepLabV3:
    """The network of a checkpoint, in eval mode, on the CPU; ModelError if unusable."""
    return build_model(read_checkpoint(path), path)


def member_path(folder: Path, member: int) -> Path:
    """The checkpoint of a member in a folder."""
    return folder / f"member_{member:02d}.pt"


def find_members(folder: Path) -> list[Path]:
    """The members' checkpoints in a folder, in order; copies by other names do not count."""
    return [path for path in sorted(folder.glob("member_*.pt")) if is_member_name(path.stem)]


def is_member_name(stem: str) -> bool:
    """Whether a file is called member_ and a number."""
    return stem.removeprefix("member_").isdecimal()


def member_files(teacher: list[str | Path]) -> list[Path]:
    """Checkpoints of a teacher: those of a folder (`member_*.pt`), or the files."""
    first = Path(teacher[0])
    if len(teacher) > 1 or first.suffix == ".pt" or first.is_file():
        return [Path(path) for path in teacher]
    files = find_members(first)
    if not files:
        raise ModelError(
            f"no member_*.pt in {first}; first run python train_ensemble.py --members 10"
        )
    return files


def load_ensemble(teacher: list[str | Path], mc_samples: int = 0) -> tuple[Ensemble, dict]:
    """The members of a folder or the named files, and what the first one's checkpoint says.

    That is the checkpoint without `model`, but with `identity`: sixteen digits that
    tell how all members were trained and what came of it.

    Raises ModelError where a folder lacks members that its training run had, or where
    members differ in backbone, classes or data, naming both files.
    """
    files = member_files(teacher)
    checkpoints = [read_checkpoint(path) for path in files]
    if Path(teacher[0]).is_dir():
        refuse_missing_members(Path(teacher[0]), files, checkpoints)
    refuse_unlike_members(files, checkpoints)

    members = []
    for path, checkpoint in zip(files, checkpoints, strict=True):
        members.append(build_model(checkpoint, path))
    description = {key: value for key, value in checkpoints[0].items() if key != "model"}
    description["identity"] = identity_of(checkpoints)
    return Ensemble(members, mc_samples), description


def identity_of(checkpoints: list[dict]) -> str:
    """Sixteen digits that tell how networks were trained, and what came of it."""
    trained = [[checkpoint["args"], checkpoint.get("metrics")] for checkpoint in checkpoints]
    return hashlib.sha256(json.dumps(trained).encode()).hexdigest()[:16]


def refuse_missing_members(folder: Path, files: list[Path], checkpoints: list[dict]) -> None:
    """Raises ModelError where the folder holds fewer members than its run has."""
    expected = max(checkpoint["config"]["members"] for checkpoint in checkpoints)
    present = {path.name for path in files}
    names = [member_path(folder, member).name for member in range(expected)]
    absent = [name for name in names if name not in present]
    if absent:
        raise ModelError(
            f"{folder} lacks {', '.join(absent)} of a run of {expected} members; finish the "
            "training, or name the files to use one by one"
        )


def refuse_unlike_members(files: list[Path], checkpoints: list[dict]) -> None:
    """Raises ModelError where two members cannot be averaged."""
    reference = what_has_to_agree(checkpoints[0])
    for path, checkpoint in zip(files, checkpoints, strict=True):
        for key, value in what_has_to_agree(checkpoint).items():
            if value != reference[key]:
                raise ModelError(
                    f"{path} has {key} {value}, but {files[0]} has {reference[key]}: they are no "
                    "ensemble"
                )


def what_has_to_agree(checkpoint: dict) -> dict:
    """What the members of an ensemble have in common."""
    config = checkpoint["config"]
    same = {key: config[key] for key in ("backbone", "classes", "dataset", "hold_out")}
    # The flag: in the configuration, older members leave the images' own size open.
    same["image_size"] = checkpoint["args"].get("image_size")
    return same


# -------------------------------------------------------------------------------------- the machine


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one, under torchrun one per process.

    Raises UsageError where the device cannot be used. Sets what float32 means on a GPU, and
    what becomes of freed memory on a CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", 1))
    several_cards = torch.cuda.device_count() > 1  # a scheduler may show a process one alone
    if name.startswith("cuda:") and world > 1 and several_cards:
        raise UsageError(
            f"--device {name} would put all {world} processes of torchrun on one card; use "
            "--device cuda, which gives each its own"
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ and several_cards:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    set_float32_precision()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UsageError(f"--device {name} cannot be used ({reason}); try --device cpu") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


# Numbers of glibc's malloc.h, and the largest size that it takes for the second, in bytes.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Have the C library keep what freed tensors leave, up to 32 MiB each, for later ones.

    glibc returns large blocks to the system soon after they are free, and the next tensor waits
    for the system to clear its pages: members of the drawn scenes took 7 % longer to train, in bf16
    18 %. Other C libraries are left as they are.
    """
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)  # never


def set_float32_precision() -> None:
    """Let float32 mean float32 on a GPU: the heads, the losses, and all of --amp off.

    cuDNN would otherwise round the factors of a float32 convolution to TF32's 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # The oldest supported torch.compile advises the opposite.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def choose_amp(amp: str, device: torch.device) -> str:
    """What "auto" stands for on this device: "bf16" where the processor has it, else "off".

    Measured on a CPU: 1.8 times as fast where the processor has it, slower where it is emulated.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif hasattr(torch.cpu, "get_capabilities"):  # not in the oldest supported torch
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        has_bf16 = False
    return "bf16" if has_bf16 else "off"


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The arithmetic of the networks: "bf16", "fp16" or, with "off", float32."""
    if amp == "off":
        return contextlib.nullcontext()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[amp])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For the one process at a time that may write `path`; a second one gets a UsageError.

    A record lock ends with its process, however that ends, and forked workers do not
    inherit it. Where the file system has no locks, a note says so, and nothing keeps a
    second process out.
    """
    lock_path = path.with_suffix(".lock")
    file = open_locked(lock_path, path)
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        file.close()


def open_locked(lock_path: Path, path: Path) -> io.TextIOWrapper:
    """The lock file, held by this process; UsageError where another one holds it."""
    while True:
        file = open(lock_path, "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise UsageError(
                f"another process is writing {path}; wait for it to end, or name another --out"
            ) from None
        except OSError as error:
            if error.errno not in {errno.ENOLCK, *NOT_SUPPORTED}:
                file.close()
                raise
            say_without_locks(lock_path.parent)
            return file
        # Who held the lock before may have removed the file since it was opened here.
        # Then this process holds a lock that nobody else will look at, and it tries
        # again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock_path), os.fstat(file.fileno())):
                return file
        file.close()


@functools.cache  # so that it is said once
def say_without_locks(folder: Path) -> None:
    """Note on stderr that nothing keeps two commands from writing into `folder`."""
    if speaks_for_command():
        print(
            f"note: the file system of {folder} has no locks: start no second command that "
            "writes there while this one runs",
            file=sys.stderr,
        )


def speaks_for_command() -> bool:
    """Whether this process says what every process of its command would say.

    Under torchrun that is the first one, and so it is of those that train members side by side.
    """
    first_names = ("MainProcess", "SpawnProcess-1")
    is_first = multiprocessing.current_process().name in first_names
    return is_first and torchrun_rank() == 0


def torchrun_rank() -> int:
    """The number that torchrun gave this process, also where it opens no group; alone it is 0."""
    return int(os.environ.get("RANK", 0))


def get_rank() -> int:
    """This process's number in its group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes share the work; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process is the one of its group that writes files and prints."""
    return get_rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Under torchrun, the group that shares the work; its first process alone prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    failed = False
    try:
        with silence(not is_first_process()):
            yield
    except Exception:
        failed = True
        raise
    finally:
        if not failed:  # else see `end_with_open_group`
            dist.destroy_process_group()


def end_with_open_group(exit_code: int) -> None:
    """End this process at once where a fault left its group open; do nothing where there is none.

    What the fault interrupted still holds the group. Python would take it apart while a
    thread of the group waits for Python: with gloo of torch 2.11 such a process never ends.
    What was printed has to be flushed before.
    """
    if dist.is_available() and dist.is_initialized():
        os._exit(exit_code)


@contextlib.contextmanager
def silence(wanted: bool) -> Iterator[None]:
    """Nothing that is printed meanwhile reaches the standard output, if that is wanted."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def versions() -> dict[str, str]:
    """What a result depends on besides its command: packages, hardware, commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion, which weights_only refuses to read
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
        "commit": git_commit(),
    }


def git_commit() -> str:
    """The commit of this checkout, "-dirty" where files differ; or "unknown"."""
    folder = Path(__file__).parent
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"
