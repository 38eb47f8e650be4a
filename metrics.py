"""Metrics for segmentation and its uncertainty: pooled over all pixels, exact, in constant memory.

Functions turn probs or logits into scores [B, ...], higher = more uncertain. Accumulators: `update`
with every batch, `all_reduce` under torchrun, `compute` -> floats, ints and lists. Every figure is
the same for any batch size and image order, and NaN where undefined. `update` never waits for the
device. Void never counts: labels outside 0..num_classes-1, flags other than 0 and 1, `valid` False.

Scores are rounded to float16, the convention of the SegmentMeIfYouCan benchmark (Chan et al. 2021).
A histogram with a bucket for each of the 65,536 holds a whole split, so that rank metrics are exact
on the rounded scores. What float16 cannot hold becomes 0 (below 3e-8) or infinite (from 65,520 on);
-0.0 and +0.0 are one score.
"""

import functools

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

BUCKETS, SIDE = 65536, 1024  # of a histogram, and of a joint histogram's sides
ZERO = 32768  # the bucket of 0.0; v lies at ZERO +- (the bits of |v|)
LOWEST, HIGHEST = ZERO - 0x7C00, ZERO + 0x7C00  # the infinities; NaN lands outside
NAN = float("nan")
TINY = torch.finfo(torch.float32).tiny


class MetricError(ValueError):
    """Scores that cannot be measured; says what to check."""


def predictive_entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of probs [B, C, ...]: [B, ...], 0..ln C. An ensemble's: of its mean probs."""
    return _sum_over_classes(lambda p: -p * p.clamp(min=TINY).log(), probs)  # 0 log 0 = 0


def mutual_information(probs: Tensor, expected_entropy: Tensor) -> Tensor:
    """H(mean probs [B, C, ...]) - mean H(probs) [B, ...]: [B, ...], 0..ln C nats, what the members
    disagree about (Depeweg et al. 2018). Clamped at 0, below which only rounding leads."""
    return (predictive_entropy(probs) - expected_entropy).clamp(min=0)


def max_softmax(probs: Tensor) -> Tensor:
    """1 - max of probs [B, C, ...]: [B, ...], 0..1-1/C (Hendrycks & Gimpel 2017)."""
    return 1 - _at_least_float32(probs.amax(1))


def max_logit(logits: Tensor) -> Tensor:
    """-max of logits [B, C, ...]: [B, ...], unbounded (Hendrycks et al. 2022)."""
    return -_at_least_float32(logits.amax(1))


def energy(logits: Tensor) -> Tensor:
    """-logsumexp of logits [B, C, ...]: [B, ...], unbounded (Liu et al. 2020, temperature 1)."""
    top = _at_least_float32(logits.amax(1))  # one class at a time: twice as fast as logsumexp
    terms = ((_at_least_float32(x) - top).exp_() for x in logits.unbind(1))
    return -(top + functools.reduce(Tensor.add_, terms).log_())


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_over_classes(term, probs: Tensor) -> Tensor:
    """Sum of term(p) over dim 1, one class at a time: no temporary of the size of probs."""
    if probs.stride(1) == 1:  # channels_last: each plane would touch all of the memory
        return term(_at_least_float32(probs)).sum(1)
    return functools.reduce(Tensor.add_, (term(_at_least_float32(p)) for p in probs.unbind(1)))


def float16_bucket(scores: Tensor) -> Tensor:
    """Each score's place in float16's order: int32 0..65535, NaN outside LOWEST..HIGHEST."""
    bits = scores.detach().to(torch.float16).view(torch.int16)
    sign = bits >> 15  # 0 or -1
    return (bits & 0x7FFF).bitwise_xor_(sign).sub_(sign).int().add_(ZERO)  # negated where sign


def bucket_values() -> np.ndarray:
    """The score of each bucket: float64 [65536], ascending between the NaN at both ends."""
    offset = np.arange(BUCKETS) - ZERO
    magnitude = np.minimum(np.abs(offset), 0x7FFF).astype(np.uint16).view(np.float16)
    return np.copysign(magnitude.astype(np.float64), offset)


def thin_curve(x: np.ndarray, y: np.ndarray, points: int = 200) -> np.ndarray:
    """Indices of at most `points` points of a curve, for plots: both ends, and evenly in between by
    |dx| + |dy| relative to the ranges, so that flat and steep parts keep theirs."""
    if len(x) <= points:
        return np.arange(len(x))
    steps = sum(np.abs(np.diff(v)) / max(np.ptp(v), 1e-300) for v in (x, y))
    length = np.append(0, np.cumsum(steps))
    chosen = np.searchsorted(length, np.linspace(0, length[-1], points)[:-1])
    return np.unique(np.append(chosen, len(x) - 1))


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else NAN


def _ratio(a, b) -> np.ndarray:
    """a / b in float64, NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.full(a.shape, NAN), where=b != 0)


def _count(index: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """How often each of 0..size-1 is in the flat index, int64 [size]; or the sums of weights."""
    if index.device.type == "cpu":
        return torch.bincount(index, weights, minlength=size)
    # On CUDA bincount waits for the device. Most pixels share a few buckets, where atomic additions
    # would queue up: neighbouring pixels use different lanes of a bucket.
    lanes = min(max(2**20 // size, 1), 1024)
    index = index.long() * lanes + torch.arange(len(index), device=index.device) % lanes
    if weights is None:
        weights = torch.ones(1, dtype=torch.int32, device=index.device).expand(len(index))
    table = torch.zeros(size * lanes, dtype=weights.dtype, device=index.device)
    return table.scatter_add_(0, index, weights).view(size, lanes).sum(1)


def _class_index(labels: Tensor, num_classes: int, valid: Tensor | None = None) -> Tensor:
    """Flat uint8 labels; what is not valid or outside 0..num_classes-1 becomes num_classes."""
    if labels.is_floating_point() or num_classes > 254:
        raise ValueError(f"need integer labels, at most 254 classes: {labels.dtype}, {num_classes}")
    if labels.dtype not in (torch.uint8, torch.bool):
        labels = labels.long().clamp(-1, 255)  # -1 wraps to 255
    labels = labels.reshape(-1).to(torch.uint8).clamp(max=num_classes)
    return labels if valid is None else torch.where(valid.reshape(-1), labels, num_classes)


def _check_shapes(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def _check_nan(number: int, pixels: int) -> None:
    if number:
        raise MetricError(f"{number} of {pixels} scores are NaN: the networks' outputs are not "
                          "finite; check their weights, or use --amp off")  # fmt: skip


class Accumulator:
    """State tensors that `update` adds to. layout: their shapes by name, float64 if it begins with
    "sum", otherwise int64. device: where they live; None means where the first batch is."""

    def __init__(self, device: torch.device | str | None = None, **layout: tuple[int, ...]):
        self.device = None if device is None else torch.device(device)
        self.layout = layout
        self.reset()

    def reset(self) -> None:
        """Forget all that was counted."""
        self.state = {}
        for name, shape in self.layout.items():
            dtype = torch.float64 if name.startswith("sum") else torch.int64
            with torch.inference_mode(False):  # else nothing could add to them outside of it
                self.state[name] = torch.zeros(shape, dtype=dtype, device=self.device or "cpu")

    def all_reduce(self) -> None:
        """Sum over all processes: call it once, after the last update. Alone, it does nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for name in self.state:
            if dist.get_backend() == "nccl":  # without a batch the zeros are still on the CPU
                self.state[name] = self.state[name].cuda()
            dist.all_reduce(self.state[name])

    def _add(self, name: str, values: Tensor) -> None:
        if self.device is None:
            self.device = values.device
            self.reset()  # zeros on that device
        self.state[name] += values.detach().view(self.layout[name])

    def _numpy(self, name: str) -> np.ndarray:
        return self.state[name].cpu().numpy()


class ConfusionMatrix(Accumulator):
    """IoU and accuracies, all 0..1."""

    def __init__(self, num_classes: int, device=None):
        self.num_classes = num_classes  # [label, prediction], and last void and what is no class
        super().__init__(device, matrix=(num_classes + 1, num_classes + 1))

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """prediction, labels: integers, [B, H, W] or any one shape."""
        _check_shapes(prediction=prediction, labels=labels)
        side = self.num_classes + 1
        index = _class_index(labels, side - 1).int() * side + _class_index(prediction, side - 1)
        self._add("matrix", _count(index, side * side))

    def compute(self) -> dict:
        """-> miou (over classes with a non-empty union), iou (list, NaN for the others),
        pixel_accuracy, mean_class_accuracy (over the labelled classes), n (pixels)."""
        matrix = self._numpy("matrix")[:-1]
        if matrix[:, -1].any():
            raise ValueError(f"{matrix[:, -1].sum()} predictions outside 0..{self.num_classes - 1}")
        right, labelled, predicted = np.diag(matrix), matrix.sum(1), matrix[:, :-1].sum(0)
        iou, n = _ratio(right, labelled + predicted - right), int(matrix.sum())
        accuracy, class_accuracy = float(_ratio(right.sum(), n)), _mean(_ratio(right, labelled))
        result = dict(miou=_mean(iou), iou=iou.tolist(), pixel_accuracy=accuracy)
        return result | dict(mean_class_accuracy=class_accuracy, n=n)


class ProperScores(Accumulator):
    """NLL = mean(-log p_y) in nats; Brier = mean(sum_c (p_c - 1[c = y])^2), 0..2."""

    def __init__(self, device=None):
        super().__init__(device, n=(1,), sums=(2,))

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """probs: [B, C, ...]; labels: [B, ...]. p_y counts as 1.2e-38 (87 nats) at least."""
        _check_shapes(probs=probs[:, 0], labels=labels)
        index = _class_index(labels, probs.shape[1]).view(labels.shape)
        valid = index < probs.shape[1]
        index = torch.where(valid, index, 0).long()
        p_y = _at_least_float32(probs.gather(1, index.unsqueeze(1)).squeeze(1))  # [B, ...]
        nll = -p_y.clamp(min=TINY).log()  # one underflow must not make the mean infinite
        brier = _sum_over_classes(torch.square, probs) - 2 * p_y + 1
        self._add("n", valid.sum())
        sums = [torch.where(valid, x, 0).sum(dtype=torch.float64) for x in (nll, brier)]
        self._add("sums", torch.stack(sums))

    def compute(self) -> dict:
        """-> nll, brier, n (pixels)."""
        n, sums = int(self._numpy("n")[0]), self._numpy("sums")
        return dict(nll=float(_ratio(sums[0], n)), brier=float(_ratio(sums[1], n)), n=n)


class CalibrationError(Accumulator):
    """Of the max softmax: ECE = sum_b n_b/N |acc_b - conf_b| over bins (b/bins, (b+1)/bins], MCE =
    the largest of these gaps (Guo et al. 2017)."""

    def __init__(self, bins: int = 15, device=None):
        self.bins = bins
        super().__init__(device, counts=(2, bins), sum_confidence=(bins,))

    def update(self, probs: Tensor, labels: Tensor, prediction: Tensor | None = None) -> None:
        """probs: [B, C, ...]; labels: [B, ...]; prediction: probs.max(1).indices, if at hand."""
        _check_shapes(probs=probs[:, 0], labels=labels, prediction=prediction)
        prediction = probs.max(1).indices if prediction is None else prediction
        confidence = _at_least_float32(probs.amax(1)).reshape(-1)
        index = _class_index(labels, probs.shape[1])
        # clamped, so that confidences outside 0..1 and NaN do not leave the table
        place = (confidence * self.bins).ceil_().int().sub_(1).clamp_(0, self.bins - 1)
        place = torch.where(index < probs.shape[1], place, self.bins)
        right = torch.where(index == prediction.reshape(-1), place, self.bins)
        counts = [_count(x, self.bins + 1)[:-1] for x in (place, right)]
        self._add("counts", torch.stack(counts))
        self._add("sum_confidence", _count(place, self.bins + 1, confidence.double())[:-1])

    def compute(self) -> dict:
        """-> ece, mce (of non-empty bins), 0..1, n (pixels), and bins, the reliability diagram:
        lists lower (edge), count, accuracy, confidence (NaN in empty bins)."""
        count, right = self._numpy("counts")
        accuracy, confidence = _ratio(right, count), _ratio(self._numpy("sum_confidence"), count)
        used = count > 0
        gaps = np.abs(accuracy - confidence)[used]
        ece = float(_ratio((count[used] * gaps).sum(), count.sum()))
        mce = float(gaps.max()) if len(gaps) else NAN
        lower = np.arange(self.bins) / self.bins
        bins = dict(lower=lower, count=count, accuracy=accuracy, confidence=confidence)
        bins = {name: x.tolist() for name, x in bins.items()}
        return dict(ece=ece, mce=mce, n=int(count.sum()), bins=bins)


class _ScoreHistogram(Accumulator):
    def __init__(self, device=None):
        super().__init__(device, histogram=(3, BUCKETS))  # flag 0, flag 1, void

    def _update(self, scores: Tensor, flags: Tensor, valid: Tensor | None) -> None:
        _check_shapes(scores=scores, flags=flags, valid=valid)
        index = _class_index(flags, 2, valid).int().mul_(BUCKETS)
        index += float16_bucket(scores).reshape(-1)
        self._add("histogram", _count(index, 3 * BUCKETS))

    def _distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The scores that occur, ascending, and the counts of flag 0 and of flag 1 at each."""
        counts = self._numpy("histogram")[:2]
        pixels = counts.sum(0)
        _check_nan(pixels.sum() - pixels[LOWEST : HIGHEST + 1].sum(), pixels.sum())
        occupied = np.flatnonzero(pixels) if pixels.any() else [0]  # 0 pixels, at NaN: all is NaN
        return bucket_values()[occupied], counts[0, occupied], counts[1, occupied]


class Detection(_ScoreHistogram):
    """Does a score tell positives (errors or anomalies, where it should be higher) from negatives?
    Equal scores, after rounding, are one threshold."""

    def update(self, scores: Tensor, positives: Tensor, valid: Tensor | None = None) -> None:
        """scores: floats, any shape; positives: bool or 0 / 1 / void; valid: bool, False = void."""
        self._update(scores, positives, valid)

    def curves(self) -> dict[str, np.ndarray]:
        """ROC and PR at the distinct thresholds (positive = score >= threshold), descending: arrays
        threshold, fpr, tpr, precision, recall. The ROC's (0, 0) is not in them. See thin_curve."""
        values, negatives, positives = (x[::-1] for x in self._distinct())
        tp, fp = np.cumsum(positives), np.cumsum(negatives)
        tpr, fpr, precision = _ratio(tp, tp[-1]), _ratio(fp, fp[-1]), _ratio(tp, tp + fp)
        return dict(threshold=values, fpr=fpr, tpr=tpr, precision=precision, recall=tpr)

    def compute(self) -> dict:
        """-> auroc (trapezoid: ties count half), ap = sum (R_n - R_{n-1}) P_n, fpr95 (at the first
        threshold with TPR >= 0.95), all 0..1, NaN if positives or negatives lack; n, positives."""
        negatives, positives = self._numpy("histogram")[:2].sum(1).tolist()
        _, fpr, tpr, precision, _ = self.curves().values()
        auroc = ap = fpr95 = NAN
        if positives and negatives:
            steps = np.diff(tpr, prepend=0)
            auroc = float((np.diff(fpr, prepend=0) * (tpr - steps / 2)).sum())
            ap = float((steps * precision).sum())
            fpr95 = float(fpr[np.argmax(tpr >= 0.95)])
        return dict(auroc=auroc, ap=ap, fpr95=fpr95, n=positives + negatives, positives=positives)

    def best_f1(self) -> dict[str, float]:
        """-> f1, the best of score >= threshold, and f1_threshold, the highest where several do as
        well; NaN without positives."""
        threshold, _, _, precision, recall = self.curves().values()
        f1 = np.nan_to_num(_ratio(2 * precision * recall, precision + recall))
        best = np.argmax(f1)
        found = (f1[best], threshold[best]) if f1[best] > 0 else (NAN, NAN)
        return dict(zip(("f1", "f1_threshold"), map(float, found), strict=True))


def pairs_auroc(positives, negatives) -> float:
    """AUROC of short lists of scores, unrounded: the share of pairs in order, ties half; NaN if one
    list is empty."""
    positives, negatives = np.asarray(positives, float), np.sort(np.asarray(negatives, float))
    if not (len(positives) and len(negatives)):
        return NAN
    below = sum(np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float(below.mean() / (2 * len(negatives)))


def connected_components(mask: np.ndarray) -> np.ndarray:
    """8-connected components of a bool [H, W]: int64 [H, W], 1..n in raster order, 0 outside."""
    height, width = mask.shape
    row = width + 1  # a column of False ends every run
    flat = np.pad(mask, ((0, 0), (0, 1))).ravel().astype(np.int8)
    change = np.diff(flat, prepend=0, append=0)
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    # the runs of the next row that touch a run, diagonally too, are neighbours in the list
    first = np.searchsorted(ends, starts + row, "left")
    number = np.searchsorted(starts, ends + row, "right") - first
    upper = np.repeat(np.arange(len(starts)), number)
    lower = np.arange(number.sum()) + np.repeat(first - (np.cumsum(number) - number), number)
    root = np.arange(len(starts))
    while (root[upper] != root[lower]).any():
        a, b = root[upper], root[lower]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
    labels = np.zeros(height * row, np.int64)
    number = np.unique(root, return_inverse=True)[1] + 1
    labels[flat > 0] = np.repeat(number, ends - starts)
    return labels.reshape(height, row)[:, :width]


class ComponentDetection(Accumulator):
    """Are anomalies found as wholes (SegmentMeIfYouCan, Chan et al. 2021)?

    With P the union of the predicted components that touch a true one k,

        sIoU(k) = |k and P| / (|k or P| - |P and other true components|)
        PPV(p) = |p and truth| / |p|        of a predicted component p

    and at each tau in 0.25, 0.30 ... 0.75: TP sIoU >= tau, FN sIoU < tau, FP PPV < tau. `smallest`:
    predicted components of fewer pixels are dropped, true ones made void.
    """

    TAU = np.arange(5, 16) / 20

    def __init__(self, smallest: tuple[int, int] = (500, 100), device=None):
        self.smallest = smallest
        tau = (len(self.TAU),)
        super().__init__(device, n=(2,), sums=(2,), tp=tau, fn=tau, fp=tau)

    def update(self, prediction: Tensor, mask: Tensor, truth: list | None = None) -> None:
        """prediction: bool [B, H, W]; mask: 1 anomaly, 0 none, anything else void; truth: the
        `connected_components` of each frame's anomalies, if at hand."""
        _check_shapes(prediction=prediction, mask=mask)
        found, masks = prediction.cpu().numpy().astype(bool), mask.cpu().numpy()
        truth = truth or [connected_components(one == 1) for one in masks]
        for frame in zip(found, masks, truth, strict=True):
            siou, ppv = self._frame(*frame)
            reached, exact = (x[:, None] >= self.TAU for x in (siou, ppv))
            for name, values in (("n", [len(siou), len(ppv)]), ("sums", [siou.sum(), ppv.sum()]),
                                 ("tp", reached.sum(0)), ("fn", (~reached).sum(0)),
                                 ("fp", (~exact).sum(0))):  # fmt: skip
                self._add(name, torch.as_tensor(np.asarray(values), device=mask.device))

    def _frame(self, prediction: np.ndarray, mask: np.ndarray, truth: np.ndarray):
        """sIoU of each true, PPV of each predicted component of one frame."""
        found = connected_components(prediction & (mask <= 1))
        small = np.bincount(truth.ravel()) < self.smallest[1]
        small[0] = False
        inside = (mask <= 1) & ~small[truth]
        found *= (np.bincount(found.ravel()) >= self.smallest[0])[found]
        shape = truth.max() + 1, found.max() + 1
        joint = np.bincount((truth * shape[1] + found)[inside], minlength=shape[0] * shape[1])
        joint = joint.reshape(shape)  # pixels of each true component and each predicted one, or 0
        sizes, hit = joint[:, 1:].sum(0), joint[1:, 1:]  # of the predicted; truth and prediction
        true = joint[1:].sum(1)
        touched = hit > 0
        common = hit.sum(1)
        union = true + touched @ sizes - common
        others = touched @ hit.sum(0) - common
        siou, ppv = _ratio(common, union - others), _ratio(hit.sum(0), sizes)
        return siou[true > 0], ppv[sizes > 0]

    def compute(self) -> dict:
        """-> siou, ppv, component_f1 (means over true components, over predicted ones, over tau),
        true_components, predicted_components; NaN where there is none."""
        tp, fn, fp = (self._numpy(name) for name in ("tp", "fn", "fp"))
        n, means = self._numpy("n"), _ratio(self._numpy("sums"), self._numpy("n"))
        f1 = float(_ratio(2 * tp, 2 * tp + fn + fp).mean())
        counts = dict(true_components=int(n[0]), predicted_components=int(n[1]))
        return dict(siou=float(means[0]), ppv=float(means[1]), component_f1=f1) | counts


class SelectivePrediction(_ScoreHistogram):
    """What is left of the errors if only the most certain pixels are kept.

    Risk at coverage k/N: the expected error rate of the k most certain of N pixels, errors evenly
    spread inside a tie; AURC: its mean over k = 1..N (Geifman et al. 2019). With r the risk at 1,
    E-AURC = AURC - (r + (1 - r) ln(1 - r)), the oracle's area for N to infinity (O(log N / N) below
    that for N), and AUSE = E-AURC / r is the area between the two curves, both divided by r.
    """

    def update(self, uncertainty: Tensor, correct: Tensor, valid: Tensor | None = None) -> None:
        """uncertainty: floats, any shape; correct: bool or 0 / 1 / void; valid: False = void."""
        self._update(uncertainty, correct, valid)

    def compute(self) -> dict:
        """-> aurc, eaurc, ause (NaN without an error), error_rate, median, n; at the median:
        p_accurate_certain, p_uncertain_inaccurate, pavpu (certain: u <= median; Mukhoti & Gal
        2018); sweep: lists of 21 of these, of t and of threshold = min + t (max - min);
        risk_coverage: lists coverage, risk of at most 200."""
        values, wrong, right = self._distinct()
        pixels, errors = np.cumsum(wrong + right), np.cumsum(wrong)
        n, coverage, risk = pixels[-1], _ratio(pixels, pixels[-1]), _ratio(errors, pixels)
        aurc, r = self._aurc(wrong, right), risk[-1]
        eaurc = aurc - (r + (1 - r) * np.log1p(-r) if r != 1 else 1)
        t = np.arange(21) / 20
        median = values[np.argmax(2 * pixels >= n)]
        with np.errstate(invalid="ignore"):  # no threshold is defined between infinities: NaN
            thresholds = np.append(median, values[0] + t * (values[-1] - values[0]))
        number = np.searchsorted(values, thresholds, side="right")  # of distinct values
        certain = np.where(np.isnan(thresholds), NAN, np.append(0, pixels)[number])
        certain_wrong = np.append(0, errors)[number]
        uncertain_wrong = errors[-1] - certain_wrong
        measures = {
            "p_accurate_certain": _ratio(certain - certain_wrong, certain),
            "p_uncertain_inaccurate": _ratio(uncertain_wrong + 0 * certain, errors[-1]),
            "pavpu": _ratio(certain - certain_wrong + uncertain_wrong, n),
        }
        numbers = dict(aurc=aurc, eaurc=eaurc, ause=_ratio(eaurc, r), error_rate=r, median=median)
        numbers |= {name: x[0] for name, x in measures.items()}
        sweep = {"t": t, "threshold": thresholds[1:]} | {k: x[1:] for k, x in measures.items()}
        thin = thin_curve(coverage, risk)
        result = {name: float(x) for name, x in numbers.items()} | {"n": int(n)}
        result["sweep"] = {name: x.tolist() for name, x in sweep.items()}
        curve = {"coverage": coverage[thin].tolist(), "risk": risk[thin].tolist()}
        return result | {"risk_coverage": curve}

    @staticmethod
    def _aurc(wrong: np.ndarray, right: np.ndarray) -> np.ndarray:
        """After a pixels with e errors, the risks in a tie of n with error rate q are
        (e + q j) / (a + j), j = 1..n. They sum to q n + (e - q a) (H(a + n) - H(a)), H the harmonic
        numbers: digamma(x + 1) but for a constant."""
        tie, after = wrong + right, np.cumsum(wrong + right)
        before, errors_before = after - tie, np.cumsum(wrong) - wrong
        harmonic = torch.digamma(torch.from_numpy(np.stack([before, after]) + 1.0)).numpy()
        slope = errors_before - _ratio(wrong, tie) * before
        return _ratio((wrong + slope * (harmonic[1] - harmonic[0])).sum(), after[-1])


class RejectionCurve(Accumulator):
    """mIoU after ignoring the 0, 10, ..., 90% most uncertain pixels of the whole split (DUDES).

    True and false positives and false negatives are counted per bucket and class (31 MB at 19
    classes). A tie that the limit cuts is ignored in proportion: fractions of pixels.
    """

    def __init__(self, num_classes: int, device=None):
        self.num_classes = c = num_classes
        # per bucket: true positives, false positives and void; false negatives and all else
        super().__init__(device, predicted=(BUCKETS, 2 * c + 1), missed=(BUCKETS, c + 1))

    def update(self, uncertainty: Tensor, prediction: Tensor, labels: Tensor) -> None:
        """uncertainty: floats, any shape; prediction, labels: integers of that shape."""
        _check_shapes(uncertainty=uncertainty, prediction=prediction, labels=labels)
        c, bucket = self.num_classes, float16_bucket(uncertainty).reshape(-1)
        labels, prediction = _class_index(labels, c), _class_index(prediction, c).int()
        right = labels == prediction
        predicted = torch.where(labels < c, torch.where(right, prediction, prediction + c), 2 * c)
        missed = torch.where(right, c, labels.int())
        for name, kind in (("predicted", predicted), ("missed", missed)):
            width = self.layout[name][1]
            self._add(name, _count(kind.add_(bucket * width), BUCKETS * width))

    def errors(self) -> tuple["Detection", "SelectivePrediction"]:
        """What those would hold of the same uncertainty, a wrong prediction being positive."""
        predicted = self.state["predicted"]
        right = predicted[:, : self.num_classes].sum(1)
        wrong = predicted[:, self.num_classes : -1].sum(1)
        detection, selective = Detection(predicted.device), SelectivePrediction(predicted.device)
        for accumulator, flags in ((detection, (right, wrong)), (selective, (wrong, right))):
            accumulator.state["histogram"] = torch.stack([*flags, torch.zeros_like(right)])
        return detection, selective

    def compute(self) -> dict:
        """-> rejection (10 mIoU, over the classes with a non-empty union among the kept pixels),
        rejection_classes (how many these are, 10 integers), n (pixels)."""
        predicted = self._numpy("predicted")[:, :-1]
        counts = np.concatenate([predicted, self._numpy("missed")[:, :-1]], axis=1)
        pixels = predicted.sum(1)
        n = int(pixels.sum())
        _check_nan(n - pixels[LOWEST : HIGHEST + 1].sum(), n)
        below, counts_below = np.cumsum(pixels) - pixels, np.cumsum(counts, axis=0) - counts
        keep = n * np.arange(10, 0, -1) / 10
        cut = np.searchsorted(below + pixels, keep)  # the buckets with the limits in them
        share = _ratio(keep - below[cut], pixels[cut])[:, None]
        tp, fp, fn = np.split(counts_below[cut] + share * counts[cut], 3, axis=1)  # [10, C] each
        iou = _ratio(tp, tp + fp + fn)
        classes = (~np.isnan(iou)).sum(1).tolist()
        return dict(rejection=[_mean(x) for x in iou], rejection_classes=classes, n=n)


class ClassUncertainty(Accumulator):
    """Mean uncertainty per predicted class, each network on its own prediction."""

    def __init__(self, num_classes: int, device=None):
        self.num_classes = num_classes
        super().__init__(device, n=(num_classes,), sums=(num_classes,), nan=(1,))

    def update(self, uncertainty: Tensor, prediction: Tensor, labels: Tensor) -> None:
        """uncertainty: floats, any shape; prediction, labels: integers (labels only tell void)."""
        _check_shapes(uncertainty=uncertainty, prediction=prediction, labels=labels)
        c = self.num_classes
        index = _class_index(prediction, c, _class_index(labels, c) < c)
        uncertainty = uncertainty.reshape(-1).double()
        self._add("nan", (uncertainty.isnan() & (index < c)).sum())
        self._add("n", _count(index, c + 1)[:-1])
        self._add("sums", _count(index, c + 1, uncertainty)[:-1])

    def compute(self) -> dict:
        """-> uncertainty (list, NaN for a class never predicted), munc (mean of the others), n."""
        n = self._numpy("n")
        _check_nan(self._numpy("nan")[0], n.sum())
        mean = _ratio(self._numpy("sums"), n)
        return dict(uncertainty=mean.tolist(), munc=_mean(mean), n=int(n.sum()))


class Fidelity(Accumulator):
    """How close the student's uncertainty is to the teacher's, per pixel. Spearman is that of the
    rows of a 1024 x 1024 joint histogram: within 0.005 if the scores vary by a third or more."""

    def __init__(self, device=None):
        # sums: s, t, s^2, t^2, s t, (s - t)^2, (log1p(s) - log1p(t))^2
        super().__init__(device, n=(1,), nan=(1,), sums=(7,), joint=(SIDE, SIDE))

    def update(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
        """student, teacher: floats above -1, any one shape; valid: bool, False for void."""
        _check_shapes(student=student, teacher=teacher, valid=valid)
        valid = (torch.ones_like(student).bool() if valid is None else valid).reshape(-1)
        s, t = (torch.where(valid, x.reshape(-1), 0).double() for x in (student, teacher))
        error = s - t
        log_error = (error / (1 + t)).log1p_()  # does not cancel
        pairs = [(s, s), (t, t), (s, t), (error, error), (log_error, log_error)]
        squares = [torch.dot(a, b) for a, b in pairs]
        place = torch.where(valid, self._row(s) * SIDE + self._row(t), SIDE**2)
        self._add("n", valid.sum())
        self._add("nan", (s.isnan() | t.isnan()).sum())
        self._add("sums", torch.stack([s.sum(), t.sum(), *squares]))
        self._add("joint", _count(place, SIDE**2 + 1)[:-1])

    @staticmethod
    def _row(scores: Tensor) -> Tensor:
        """0..1023, in float16's order but not its steps, of which few would be for small scores:
        16 to a factor of two from 2^-30 to 2^10, and 8 below zero."""
        bits = scores.float().view(torch.int32)
        step = ((bits & 0x7FFFFFFF) >> 19).sub_(16 * (127 - 30) - 1).clamp_(0, 641)
        return torch.where(bits < 0, 322 - ((step + 1) >> 1), 322 + step)

    def compute(self) -> dict:
        """-> rmse, rmsle, pearson, spearman (NaN where one side is constant), n (pixels)."""
        n, joint = int(self._numpy("n")[0]), self._numpy("joint")
        _check_nan(self._numpy("nan")[0], n)
        s, t, ss, tt, st, error, log_error = _ratio(self._numpy("sums"), n).tolist()
        var_s, var_t = ss - s * s, tt - t * t
        varies = var_s > 1e-12 * ss and var_t > 1e-12 * tt  # below it is a constant's rounding
        pearson = (st - s * t) / (var_s * var_t) ** 0.5 if varies else NAN
        x, y = joint.sum(1), joint.sum(0)
        rank_x, rank_y = ((np.cumsum(v) - v / 2) / max(n, 1) - 0.5 for v in (x, y))  # -0.5..0.5
        rank_var = (x @ rank_x**2) * (y @ rank_y**2)
        spearman = float(_ratio(rank_x @ joint @ rank_y, rank_var**0.5))
        return dict(rmse=error**0.5, rmsle=log_error**0.5, pearson=pearson, spearman=spearman, n=n)
