"""Scores of uncertainty, and metrics that say what they are worth.

A *score* is a map [B, H, W] that tells how uncertain a network is at each pixel; a
higher score always means more uncertain. A *metric* is an accumulator: an object that
sees every batch of a split and ends with a few figures.

    confusion = ConfusionMatrix(num_classes=19)
    for prediction, labels in batches:
        confusion.update(prediction, labels)
    confusion.all_reduce()  # under torchrun: the sum over all processes
    print(confusion.compute()["miou"])

Outline

    1. scores of one network          the table FREE_SCORES: add a score here
    2. measures of an ensemble        the table MEASURES: add a measure here
    3. histograms over float16        how scores are counted without loss
    4. what all accumulators share    state, void pixels, NaN, processes
    5. segmentation                   ConfusionMatrix
    6. calibration                    ProperScores, CalibrationError, ErrorCalibration
    7. detection                      Detection (of errors, of anomalies), pairs_auroc
    8. components                     ComponentDetection (anomalies found as wholes)
    9. selective prediction           SelectivePrediction (risk and coverage, thresholds)
    10. rejection                     RejectionCurve (the paper's)
    11. class-wise uncertainty        ClassUncertainty
    12. fidelity                      Fidelity (of the student to the teacher)
    13. comparison                    PairedBootstrap (is one score better than another?)

Every metric keeps these promises; tests/test_metrics_are_exact.py proves them (for
components, tests/test_anomalies.py; for operating points,
tests/test_predict_and_thresholds.py):

- It is pooled over all pixels of the split: the figures do not depend on the size or on
  the order of the batches. Nothing is averaged over images or subsampled.
- Its memory does not grow with the number of pixels (PairedBootstrap: but with the images).
- A figure that is not defined, for example because there are no pixels, is NaN: it is
  never 0, and never a crash.
- Void pixels never count: labels outside 0..C-1, flags other than 0 and 1, and pixels
  where the argument `valid` is False. Their scores may even be NaN.
- `update` never waits for a GPU. ComponentDetection and PairedBootstrap alone do, as they
  work on the CPU.

Scores are rounded to float16, the convention of the SegmentMeIfYouCan benchmark (Chan
et al. 2021). There are only 65,536 such numbers, so a histogram with one bucket for
each holds a whole split, and the metrics of ranking are exact on the rounded scores.
What float16 cannot hold becomes 0 (below 3e-8) or infinite (from 65,520 on); -0.0 and
+0.0 are one score.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# ---------------------------------------------------------------------------- scores of one network
#
# In shapes, B is the number of images and C of classes; "..." stands for the height and
# the width, or for nothing. All scores are computed in float32 (float64 stays), also
# from bf16 or fp16 logits.
#
# Here and below, operations in place (`exp_`, `add_`) work on temporaries that nobody
# else holds. They save a map of the size of a batch each, and change no result.

TINY = torch.finfo(torch.float32).tiny  # 1.2e-38: the smallest number whose log is taken


def predictive_entropy(probs: Tensor) -> Tensor:
    """Entropy H(p) = -sum_c p_c log p_c of probs [B, C, ...]: [B, ...], in nats, 0..log C.

    Of an ensemble's mean probabilities this is its predictive entropy.
    """

    def entropy_term(p: Tensor) -> Tensor:
        return -p * p.clamp(min=TINY).log()  # the clamp makes 0 log 0 = 0

    return _sum_over_classes(entropy_term, probs)


def max_softmax(probs: Tensor) -> Tensor:
    """1 - max_c p_c of probs [B, C, ...]: [B, ...], 0..1-1/C (Hendrycks & Gimpel 2017)."""
    return 1 - _at_least_float32(probs.amax(1))


def max_logit(logits: Tensor) -> Tensor:
    """-max_c of logits [B, C, ...]: [B, ...], unbounded (Hendrycks et al. 2022)."""
    return -_at_least_float32(logits.amax(1))


def energy(logits: Tensor) -> Tensor:
    """-log sum_c exp(logit_c) of logits [B, C, ...]: [B, ...], unbounded.

    This is the energy at temperature 1 of Liu et al. (2020).
    """
    # The largest logit is taken out of the sum, so that exp cannot overflow. One class
    # at a time needs no temporary of the size of the logits and is twice as fast as
    # torch.logsumexp.
    largest = _at_least_float32(logits.amax(1))  # [B, ...]
    classes = logits.unbind(1)
    total = (_at_least_float32(classes[0]) - largest).exp_()
    for class_logits in classes[1:]:
        total.add_((_at_least_float32(class_logits) - largest).exp_())
    return -(largest + total.log_())


# The scores that any single network has without training for them. To add a score, add
# an entry: a function of the logits and the probs [B, C, H, W] of one network that
# returns the score [B, H, W].
FREE_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": lambda logits, probs: predictive_entropy(probs),
    "msp": lambda logits, probs: max_softmax(probs),
    "max_logit": lambda logits, probs: max_logit(logits),
    "energy": lambda logits, probs: energy(logits),
}


def free_scores(logits: Tensor, probs: Tensor) -> dict[str, Tensor]:
    """All `FREE_SCORES` of one network's logits and probs [B, C, H, W], each [B, H, W]."""
    return {name: score(logits, probs) for name, score in FREE_SCORES.items()}


def _at_least_float32(values: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    if values.dtype == torch.float64:
        return values
    return values.float()


def _sum_over_classes(term: Callable[[Tensor], Tensor], probs: Tensor) -> Tensor:
    """Sum over the classes of term(p), of probs [B, C, ...]: [B, ...].

    `term` has to return a new tensor, which is written over.
    """
    if probs.stride(1) == 1:
        # channels_last: the classes of a pixel are neighbours in memory. A single class
        # would touch all of the memory to read a part of it: all are taken at once.
        return term(_at_least_float32(probs)).sum(1)
    # Otherwise one class at a time, added in place: no temporary of the size of probs.
    classes = probs.unbind(1)
    total = term(_at_least_float32(classes[0]))
    for class_probs in classes[1:]:
        total.add_(term(_at_least_float32(class_probs)))
    return total


# -------------------------------------------------------------------------- measures of an ensemble


def largest_std(count: int) -> float:
    """The largest unbiased std of `count` >= 2 values in [0, 1]: half of them are 0, half 1."""
    half = count // 2
    return math.sqrt(half * (count - half) / (count * (count - 1)))


# The largest unbiased standard deviation of any number of members: that of two members,
# one at 0 and one at 1. With more members it is smaller (0.527 for ten).
MAX_STD = largest_std(2)


def mutual_information(probs: Tensor, expected_entropy: Tensor) -> Tensor:
    """H(mean p) - mean H(p) of mean probs [B, C, ...] and mean entropies [B, ...]: [B, ...].

    It is what the members disagree about, in nats, 0..log C (Depeweg et al. 2018). It
    is clamped at 0, below which only rounding leads.
    """
    return (predictive_entropy(probs) - expected_entropy).clamp(min=0)


class Measure(NamedTuple):
    """One uncertainty of an ensemble: how it is computed, and how a student learns it.

    A student's output lies in [0, 1]. What it learns is the measure divided by
    `scale(C)`, which must lie between 0 and `largest`. For example, the variance of a
    probability is at most 0.5, and is no entropy:

        "variance": Measure(lambda prediction: prediction.std.square(), largest=0.5)

    while any entropy, at most log C nats, has largest=1.0 and in_nats=True.
    """

    # Of an ensemble's prediction, anything that has the attributes probs [B, C, H, W],
    # std [B, H, W] and expected_entropy [B, H, W] (model.EnsemblePrediction): the
    # measure, float32 [B, H, W].
    function: Callable[[Any], Tensor]
    # The largest value that the student may have to learn. Stored targets are quantised
    # over 0..largest: a value above it is clipped without a warning.
    largest: float
    in_nats: bool = False  # an entropy, at most log C: the student learns it divided by log C
    needs_expected_entropy: bool = False  # costs the ensemble one entropy per member

    def scale(self, num_classes: int) -> float:
        """What a student's output of 1 stands for: log C nats for an entropy, otherwise 1."""
        return math.log(num_classes) if self.in_nats else 1.0


# What a student can learn of a teacher. "std" is the paper's: the unbiased standard
# deviation over the members of the probability of the predicted class. To add a
# measure, add an entry.
MEASURES: dict[str, Measure] = {
    "std": Measure(lambda prediction: prediction.std, largest=MAX_STD),
    "entropy": Measure(
        lambda prediction: predictive_entropy(prediction.probs),
        largest=1.0,
        in_nats=True,
    ),
    "mutual_information": Measure(
        lambda prediction: mutual_information(prediction.probs, prediction.expected_entropy),
        largest=1.0,
        in_nats=True,
        needs_expected_entropy=True,
    ),
    "msp": Measure(lambda prediction: max_softmax(prediction.probs), largest=1.0),
}


# What a student can learn beside its teacher's measures: the probability that its own
# class is wrong, in 0..1. No teacher can be asked for it, so it is no entry of
# `MEASURES`.
ERROR = "error"


def ensemble_measures(prediction: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The named `MEASURES` of an ensemble's prediction, in that order, each [B, H, W].

    They are as they are, not as a student learns them: entropies are in nats.
    """
    return {name: MEASURES[name].function(prediction) for name in names}


# -------------------------------------------------------------------------- histograms over float16
#
# The bits of a float16 without its sign are in the order of its magnitude. So the
# bucket of a score v is ZERO_BUCKET plus these bits, or minus them where v is negative,
# and buckets are in the order of the scores. Only NaN lies beyond the two infinities.

BUCKETS = 65536
ZERO_BUCKET = 32768  # the bucket of 0.0
INFINITY_BITS = 0x7C00  # the bits of infinity; larger ones are NaN
LOWEST_BUCKET = ZERO_BUCKET - INFINITY_BITS  # the bucket of -infinity
HIGHEST_BUCKET = ZERO_BUCKET + INFINITY_BITS  # the bucket of +infinity


def float16_bucket(scores: Tensor) -> Tensor:
    """The bucket of each score, rounded to float16: int32 0..65535, in the order of the scores.

    NaN lands below LOWEST_BUCKET or above HIGHEST_BUCKET. `bucket_values` leads back.
    Tested by test_buckets_are_in_the_order_of_all_float16_values.
    """
    bits = scores.detach().to(torch.float16).view(torch.int16)
    magnitude = bits & 0x7FFF
    # As an integer, `bits` is negative where the sign bit is set: where the score is.
    offset = magnitude.mul_(bits.sign())
    return offset.int().add_(ZERO_BUCKET)


def bucket_values() -> np.ndarray:
    """The score of each bucket: float64 [65536], ascending between the NaN at both ends."""
    offset = np.arange(BUCKETS) - ZERO_BUCKET
    # The first bucket's bits would be 0x8000, of which the sign is set: any NaN will do.
    bits = np.minimum(np.abs(offset), 0x7FFF)
    magnitude = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return np.copysign(magnitude, offset)


def _histogram_of(index: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """How often each of 0..size-1 occurs in the flat index: int64 [size].

    With weights, one for each entry of index, it holds the sum of the weights instead.
    """
    if index.device.type == "cpu":
        return torch.bincount(index, weights, minlength=size)
    # On CUDA bincount asks for the largest index, and so waits for the device.
    return _histogram_in_lanes(index, size, weights)


def _histogram_in_lanes(index: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """`_histogram_of` without waiting for the device, by atomic additions."""
    # Most pixels share a few buckets (certainty is common), where the additions would
    # queue up. So each bucket is split into lanes, and neighbouring pixels use
    # different ones: about a million cells in all, but at most 1024 a bucket.
    lanes = min(max(2**20 // size, 1), 1024)
    lane = torch.arange(len(index), device=index.device) % lanes
    cell = index.long() * lanes + lane
    if weights is None:
        weights = torch.ones(1, dtype=torch.int32, device=index.device).expand(len(index))
    table = torch.zeros(size * lanes, dtype=weights.dtype, device=index.device)
    table.scatter_add_(0, cell, weights)
    return table.view(size, lanes).sum(1)  # [size]


# ---------------------------------------------------------------------- what all accumulators share

NAN = float("nan")
Device = torch.device | str | None


class MetricError(ValueError):
    """Scores that cannot be measured; the message says what to check."""


class Accumulator:
    """A metric: named tensors (`state`) to which `update` adds and from which `compute` reads.

    A subclass makes its state in __init__ with `_new_counts` (int64) and `_new_sums`
    (float64), all 0 at first, and implements

        update(...)             adds what a batch holds, with `_add`;
        compute() -> dict       the figures as plain floats, ints and lists, from `_numpy`.

    Adding is all that happens to the state: hence neither the batches nor their order
    matter, and the state of several processes is the sum of theirs. device: where the
    state lives; None means where the first batch is.
    """

    def __init__(self, device: Device = None):
        self.device = None if device is None else torch.device(device)
        self.state: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all that was counted."""
        for name, tensor in list(self.state.items()):
            self._new_state(name, tensor.shape, tensor.dtype)

    def all_reduce(self) -> None:
        """Sum over all processes: call it once, after the last update. Alone, it does nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for name in self.state:
            if dist.get_backend() == "nccl":
                # A process that saw no batch still has its zeros on the CPU.
                self.state[name] = self.state[name].cuda()
            dist.all_reduce(self.state[name])

    def _new_counts(self, name: str, *shape: int) -> None:
        """State for counts of pixels; without a shape it is a single number."""
        self._new_state(name, shape, torch.int64)

    def _new_sums(self, name: str, *shape: int) -> None:
        """State for sums of scores; float64, for there are millions of pixels to sum over."""
        self._new_state(name, shape, torch.float64)

    def _new_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        # Nothing could be added to a tensor of inference mode outside of that mode.
        with torch.inference_mode(False):
            self.state[name] = torch.zeros(shape, dtype=dtype, device=self.device or "cpu")

    def _add(self, name: str, values: Tensor) -> None:
        """Add to a state of as many numbers."""
        if self.device is None:
            self.device = values.device
            self.reset()  # nothing is lost: these are the first values
        self.state[name] += values.detach().view(self.state[name].shape)

    def _numpy(self, name: str) -> np.ndarray:
        """A state as an array; waits for the device."""
        return self.state[name].cpu().numpy()


def _flat_classes(labels: Tensor, num_classes: int, valid: Tensor | None = None) -> Tensor:
    """Integers of any shape as flat uint8 [N] in which all that is void is num_classes.

    Void is what lies outside 0..num_classes-1, and what is not valid. Void pixels thus
    get a separate row in a histogram. To leave them out instead, one would have to know
    how many are left, and wait for the GPU to say so.
    """
    if labels.is_floating_point() or num_classes > 254:
        raise ValueError(f"need integer labels, at most 254 classes: {labels.dtype}, {num_classes}")
    if labels.dtype not in (torch.uint8, torch.bool):
        # What is void has to be void as uint8 too: -1 becomes 255.
        labels = labels.long().clamp(-1, 255)
    classes = labels.reshape(-1).to(torch.uint8).clamp(max=num_classes)
    if valid is None:
        return classes
    return torch.where(valid.reshape(-1), classes, num_classes)


def _check_same_shape(**tensors: Tensor | None) -> None:
    """Raises ValueError with all shapes where they differ; None has none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def _check_no_nan(nan_pixels: int, pixels: int) -> None:
    """Raises MetricError where some of the scores were NaN."""
    if nan_pixels:
        raise MetricError(
            f"{nan_pixels} of {pixels} scores are NaN: the networks' outputs are not "
            "finite; check their weights, or use --amp off"
        )


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator / denominator in float64, with broadcasting; NaN where the denominator is 0."""
    numerator = np.asarray(numerator, np.float64)
    denominator = np.asarray(denominator, np.float64)
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    undefined = np.full(numerator.shape, NAN)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)


def _sums(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The sum of the whole numbers `values` that each of 0..size-1 has in `index`: int64 [size]."""
    # They are summed as float64, which is exact below 2^53.
    return np.bincount(index, values, minlength=size).astype(np.int64)


def _mean_of_defined(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return NAN
    return float(defined.mean())


# ------------------------------------------------------------------------------------- segmentation


class ConfusionMatrix(Accumulator):
    """Intersection over union and accuracies of a segmentation, all 0..1.

    With n_ij the number of pixels of class i that are predicted as class j,

        IoU_c               = n_cc / (sum_j n_cj + sum_i n_ic - n_cc)
        mIoU                = mean of IoU_c          over classes with a label or a prediction
        pixel accuracy      = sum_c n_cc / sum_ij n_ij
        mean class accuracy = mean of n_cc / sum_j n_cj      over classes with a label

    NaN: IoU_c of a class that is neither labelled nor predicted; the others without
    pixels. Tested by test_confusion_by_hand,
    test_confusion_all_right_all_wrong_one_class, test_void_labels_of_any_integer_type,
    test_predictions_that_are_no_class_raise.
    """

    def __init__(self, num_classes: int, device: Device = None):
        super().__init__(device)
        self.num_classes = num_classes
        # [label, prediction]; the last row is void, the last column is no class
        self._new_counts("matrix", num_classes + 1, num_classes + 1)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """prediction, labels: integers, [B, H, W] or any one shape."""
        _check_same_shape(prediction=prediction, labels=labels)
        side = self.num_classes + 1
        row = _flat_classes(labels, self.num_classes).int()
        column = _flat_classes(prediction, self.num_classes)
        self._add("matrix", _histogram_of(row * side + column, side * side))

    def pixels_by_class(self) -> list[list[int]]:
        """n_ij: [C][C], how many pixels of each class (row) are predicted as each (column)."""
        return self._numpy("matrix")[:-1, :-1].tolist()

    def compute(self) -> dict:
        """Keys: miou, iou (a list, one per class), pixel_accuracy, mean_class_accuracy, n (pixels).

        Raises ValueError where a prediction at a labelled pixel is no class.
        """
        matrix = self._numpy("matrix")[:-1]  # [C, C + 1], without the void pixels
        no_class = matrix[:, -1].sum()
        if no_class:
            raise ValueError(f"{no_class} predictions outside 0..{self.num_classes - 1}")
        matrix = matrix[:, :-1]  # [C, C]

        correct = np.diag(matrix)  # [C]
        labelled = matrix.sum(1)
        predicted = matrix.sum(0)
        iou = _ratio(correct, labelled + predicted - correct)
        pixels = matrix.sum()
        return {
            "miou": _mean_of_defined(iou),
            "iou": iou.tolist(),
            "pixel_accuracy": float(_ratio(correct.sum(), pixels)),
            "mean_class_accuracy": _mean_of_defined(_ratio(correct, labelled)),
            "n": int(pixels),
        }


# -------------------------------------------------------------------------------------- calibration


class ProperScores(Accumulator):
    """Negative log-likelihood and Brier score: lower is better, the truth is optimal.

    With y the label of a pixel,

        NLL   = mean over pixels of -log p_y                          in nats, 0..87.3
        Brier = mean over pixels of sum_c (p_c - 1[c = y])^2          0..2

    A single p_y that underflows must not make the mean infinite: p_y counts as 1.2e-38
    at least. Both are pooled over all labelled pixels. NaN: both, without any labelled
    pixel. Tested by test_proper_scores_equal_brute_force, test_proper_scores_by_hand.
    """

    def __init__(self, device: Device = None):
        super().__init__(device)
        self._new_counts("pixels")
        self._new_sums("nll")
        self._new_sums("brier")

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """probs: [B, C, ...]; labels: integers [B, ...]."""
        _check_same_shape(probs=probs[:, 0], labels=labels)
        num_classes = probs.shape[1]
        classes = _flat_classes(labels, num_classes).view(labels.shape)
        valid = classes < num_classes
        # `gather` needs a class everywhere: void pixels get class 0, and no part in the sums.
        classes = torch.where(valid, classes, 0).long()
        p_y = probs.gather(1, classes.unsqueeze(1)).squeeze(1)  # [B, ...]
        p_y = _at_least_float32(p_y)

        nll = -p_y.clamp(min=TINY).log()
        # Multiplied out: sum_c (p_c - 1[c = y])^2 = sum_c p_c^2 - 2 p_y + 1
        brier = _sum_over_classes(torch.square, probs) - 2 * p_y + 1
        self._add("pixels", valid.sum())
        self._add("nll", torch.where(valid, nll, 0).sum(dtype=torch.float64))
        self._add("brier", torch.where(valid, brier, 0).sum(dtype=torch.float64))

    def compute(self) -> dict:
        """Keys: nll, brier, n (pixels)."""
        pixels = int(self._numpy("pixels"))
        return {
            "nll": float(_ratio(self._numpy("nll"), pixels)),
            "brier": float(_ratio(self._numpy("brier"), pixels)),
            "n": pixels,
        }


class CalibrationError(Accumulator):
    """How far the confidence is from the accuracy (Guo et al. 2017); 0..1, lower is better.

    The confidence of a pixel is the maximum of its softmax. Pixels are sorted into
    equal bins (b/bins, (b+1)/bins] by it; of n_b pixels in a bin, of N in all,

        ECE = sum_b n_b/N |accuracy_b - confidence_b|
        MCE = max_b       |accuracy_b - confidence_b|       over the bins that are not empty

    where accuracy_b is the bin's share of correct pixels, confidence_b its mean
    confidence. NaN: both, without any labelled pixel; accuracy_b and confidence_b of an
    empty bin. Tested by test_calibration_equals_brute_force, test_calibration_by_hand.
    """

    def __init__(self, bins: int = 15, device: Device = None):
        super().__init__(device)
        self.bins = bins
        self._new_counts("pixels", bins)
        self._new_counts("correct", bins)
        self._new_sums("confidence", bins)

    def update(self, probs: Tensor, labels: Tensor, prediction: Tensor | None = None) -> None:
        """probs: [B, C, ...]; labels: [B, ...]; prediction: probs.max(1).indices, if at hand."""
        _check_same_shape(probs=probs[:, 0], labels=labels, prediction=prediction)
        if prediction is None:
            prediction = probs.max(1).indices
        num_classes = probs.shape[1]
        confidence = _at_least_float32(probs.amax(1)).reshape(-1)
        classes = _flat_classes(labels, num_classes)
        correct = classes == prediction.reshape(-1)
        self._add_to_bins(confidence, correct, classes < num_classes)

    def _add_to_bins(self, confidence: Tensor, correct: Tensor, valid: Tensor) -> None:
        """Count pixels: confidence in 0..1, correct and valid bool, all [N]."""
        # Bin b is (b/bins, (b+1)/bins], hence the ceiling. The clamp keeps confidences
        # outside of 0..1, and NaN, in the table; void pixels go to a bin after the
        # last.
        bin_index = (confidence * self.bins).ceil_().int().sub_(1).clamp_(0, self.bins - 1)
        bin_index = torch.where(valid, bin_index, self.bins)
        bin_of_correct = torch.where(correct & valid, bin_index, self.bins)

        size = self.bins + 1
        self._add("pixels", _histogram_of(bin_index, size)[:-1])
        self._add("correct", _histogram_of(bin_of_correct, size)[:-1])
        self._add("confidence", _histogram_of(bin_index, size, confidence.double())[:-1])

    def compute(self) -> dict:
        """Keys: ece, mce, n (pixels) and bins, the reliability diagram.

        bins has the lists lower (edge of the bin), count, accuracy, confidence.
        """
        count = self._numpy("pixels")  # [bins]
        accuracy = _ratio(self._numpy("correct"), count)
        confidence = _ratio(self._numpy("confidence"), count)
        used = count > 0
        gaps = np.abs(accuracy - confidence)[used]
        ece = _ratio((count[used] * gaps).sum(), count.sum())
        mce = gaps.max() if len(gaps) else NAN
        lower = np.arange(self.bins) / self.bins
        return {
            "ece": float(ece),
            "mce": float(mce),
            "n": int(count.sum()),
            "bins": {
                "lower": lower.tolist(),
                "count": count.tolist(),
                "accuracy": accuracy.tolist(),
                "confidence": confidence.tolist(),
            },
        }


class ErrorCalibration(CalibrationError):
    """How far a predicted probability of error is from the share of errors; 0..1, lower is better.

    It is `CalibrationError` of another forecast: q, the probability that the predicted
    class is wrong. Pixels are sorted into equal bins (b/bins, (b+1)/bins] by q, where 0
    is in the first one; of n_b pixels in a bin, of N in all,

        ECE = sum_b n_b/N |share of wrong pixels_b - mean q_b|
        MCE = max_b       |share of wrong pixels_b - mean q_b|     over the bins that are not empty

    NaN: both, without any valid pixel; the shares and means of an empty bin.
    Tested by test_error_calibration_equals_brute_force.
    """

    def update(self, probability: Tensor, wrong: Tensor, valid: Tensor | None = None) -> None:
        """probability: floats in 0..1, any shape; wrong: bool; valid: bool, False for void."""
        _check_same_shape(probability=probability, wrong=wrong, valid=valid)
        if valid is None:
            valid = torch.ones_like(wrong)
        probability = _at_least_float32(probability).reshape(-1)
        # Wrong pixels are to a probability of error what correct ones are to a confidence.
        self._add_to_bins(probability, wrong.reshape(-1), valid.reshape(-1))

    def compute(self) -> dict:
        """Keys: ece, mce, n (pixels) and bins, the reliability diagram.

        bins has the lists lower (edge of the bin), count, error_rate, probability.
        """
        results = super().compute()
        bins = results["bins"]
        bins["error_rate"] = bins.pop("accuracy")
        bins["probability"] = bins.pop("confidence")
        return results


# ---------------------------------------------------------------------------------------- detection


class ScoreCounts(NamedTuple):
    """How many pixels of flag 0 and of flag 1 have each distinct score; three arrays [S]."""

    scores: np.ndarray  # float64, ascending
    flag_0: np.ndarray  # int64: the negatives of `Detection`, the errors of `SelectivePrediction`
    flag_1: np.ndarray  # int64: the positives of `Detection`, the correct pixels of the other


class _ScoreHistogram(Accumulator):
    """How often each float16 score occurs at pixels of flag 0, of flag 1 and of none (void).

    `Detection` and `SelectivePrediction` are two readings of it. It holds the scores of
    a split without loss: all that is lost is where a pixel was.
    """

    def __init__(self, device: Device = None):
        super().__init__(device)
        self._new_counts("histogram", 3, BUCKETS)  # rows: flag 0, flag 1, void

    def _count(self, scores: Tensor, flags: Tensor, valid: Tensor | None) -> None:
        """Adds a batch; see the public `update` of the subclasses."""
        _check_same_shape(scores=scores, flags=flags, valid=valid)
        row = _flat_classes(flags, 2, valid).int()  # 0, 1, or 2 for void
        index = row.mul_(BUCKETS)  # into the flattened histogram
        index += float16_bucket(scores).reshape(-1)
        self._add("histogram", _histogram_of(index, 3 * BUCKETS))

    def _fill(self, flag_0: Tensor, flag_1: Tensor) -> None:
        """Take over counts [BUCKETS] of pixels that were counted elsewhere."""
        void = torch.zeros_like(flag_0)  # nothing reads how many are void, so zeros will do
        self.state["histogram"] = torch.stack([flag_0, flag_1, void])

    def _score_counts(self) -> ScoreCounts:
        """The scores that occur, and the pixels at each.

        Without any pixel there is one score, NaN, at 0 pixels: then all that is
        computed from it is NaN. Raises MetricError where scores were NaN.
        """
        counts = self._numpy("histogram")[:2]  # [2, BUCKETS], without void
        pixels = counts.sum(0)
        numbers = pixels[LOWEST_BUCKET : HIGHEST_BUCKET + 1].sum()
        _check_no_nan(pixels.sum() - numbers, pixels.sum())
        if pixels.any():
            occupied = np.flatnonzero(pixels)
        else:
            occupied = np.array([0])  # a bucket of NaN
        return ScoreCounts(bucket_values()[occupied], counts[0, occupied], counts[1, occupied])


class Detection(_ScoreHistogram):
    """Does a score tell positives from negatives? Positives are errors or anomalies.

    At a threshold, the pixels with score >= threshold are called positive. If these are
    TP of the P positives and FP of the N negatives,

        TPR = recall = TP / P        FPR = FP / N        precision = TP / (TP + FP)

    The thresholds k = 1, 2, ... are the distinct scores, from the highest to the
    lowest: scores that are equal after rounding cannot be told apart. From FPR_0 = 0
    and TPR_0 = 0 on,

        AUROC = sum_k (FPR_k - FPR_{k-1}) (TPR_k + TPR_{k-1}) / 2        ties count half
        AP    = sum_k (TPR_k - TPR_{k-1}) precision_k
        FPR95 = FPR at the first threshold with TPR >= 0.95

    All lie in 0..1; AUROC and AP are better when higher, FPR95 when lower. evaluate.py
    calls `update` for anomalies alone. For errors it takes the `Detection` that
    `RejectionCurve.error_metrics` makes of its counts, so the AUROC of errors in
    metrics.json never passes `update`. NaN: all three, where there is no positive or no
    negative. Tested by test_detection_equals_brute_force_on_rounded_scores,
    test_detection_equals_scikit_learn, test_detection_by_hand; the best F1 by
    test_best_f1_equals_brute_force.
    """

    def update(self, scores: Tensor, positives: Tensor, valid: Tensor | None = None) -> None:
        """scores: floats, any shape; positives: bool or 0 / 1 / void; valid: bool, False = void."""
        self._count(scores, positives, valid)

    def curves(self) -> dict[str, np.ndarray]:
        """ROC and PR curve at the thresholds, descending; float64 arrays [S].

        Keys: threshold, fpr, tpr, precision, recall. The ROC's first point (0, 0) is
        not in them. `thin_curve` makes them short enough for a plot.
        """
        counts = self._score_counts()
        # From the highest score down, a cumulative sum is what is at or above a threshold.
        tp = np.cumsum(counts.flag_1[::-1])  # positives
        fp = np.cumsum(counts.flag_0[::-1])  # negatives
        tpr = _ratio(tp, tp[-1])
        return {
            "threshold": counts.scores[::-1],
            "fpr": _ratio(fp, fp[-1]),
            "tpr": tpr,
            "precision": _ratio(tp, tp + fp),
            "recall": tpr,
        }

    def compute(self) -> dict:
        """Keys: auroc, ap, fpr95, n (pixels), positives (pixels)."""
        curves = self.curves()  # first of all: it raises where scores are NaN
        negatives, positives = self._numpy("histogram")[:2].sum(1).tolist()
        auroc = ap = fpr95 = NAN
        if positives > 0 and negatives > 0:
            fpr = curves["fpr"]
            tpr = curves["tpr"]
            fpr_steps = np.diff(fpr, prepend=0)
            tpr_steps = np.diff(tpr, prepend=0)
            # (TPR_k + TPR_{k-1}) / 2 is TPR_k less half a step
            auroc = float((fpr_steps * (tpr - tpr_steps / 2)).sum())
            ap = float((tpr_steps * curves["precision"]).sum())
            fpr95 = float(fpr[np.argmax(tpr >= 0.95)])  # argmax: the first that is True
        return {
            "auroc": auroc,
            "ap": ap,
            "fpr95": fpr95,
            "n": positives + negatives,
            "positives": positives,
        }

    def best_f1(self) -> dict[str, float]:
        """The threshold (positive = score >= threshold) with the best F1 = 2 P R / (P + R).

        Keys: f1 (0..1), f1_threshold (the highest, where several do as well); both NaN
        without positives.
        """
        curves = self.curves()
        precision = curves["precision"]
        recall = curves["recall"]
        f1 = np.nan_to_num(_ratio(2 * precision * recall, precision + recall))
        best = np.argmax(f1)
        if f1[best] > 0:
            return {"f1": float(f1[best]), "f1_threshold": float(curves["threshold"][best])}
        return {"f1": NAN, "f1_threshold": NAN}


def pairs_auroc(positives: Iterable[float], negatives: Iterable[float]) -> float:
    """AUROC of two short lists of scores, which are not rounded; NaN if one list is empty.

    It is the share of pairs (positive, negative) in which the positive has the higher
    score, equal scores counting half. Tested by test_auroc_of_lists.
    """
    positives = np.asarray(positives, float)
    negatives = np.sort(np.asarray(negatives, float))
    if len(positives) == 0 or len(negatives) == 0:
        return NAN
    below = np.searchsorted(negatives, positives, side="left")
    below_or_equal = np.searchsorted(negatives, positives, side="right")
    # The mean of the two is what each positive is above of, with ties at a half.
    return float((below + below_or_equal).mean() / (2 * len(negatives)))


def thin_curve(x: np.ndarray, y: np.ndarray, points: int = 200) -> np.ndarray:
    """Indices of at most `points` points of a curve, for plots.

    Both ends are kept. In between the points are even by |dx| + |dy|, each relative to
    its range, so that both flat and steep parts keep theirs. Tested by
    test_thin_curve_keeps_ends_and_shape.
    """
    if len(x) <= points:
        return np.arange(len(x))
    smallest_range = 1e-300  # where x or y never changes
    x_steps = np.abs(np.diff(x)) / max(np.ptp(x), smallest_range)
    y_steps = np.abs(np.diff(y)) / max(np.ptp(y), smallest_range)
    length = np.append(0, np.cumsum(x_steps + y_steps))  # of the curve up to each point
    wanted = np.linspace(0, length[-1], points)
    chosen = np.searchsorted(length, wanted[:-1])
    return np.unique(np.append(chosen, len(x) - 1))


# --------------------------------------------------------------------------------------- components


class Components(NamedTuple):
    """The 8-connected components of a frame [H, W], as runs: pixels side by side in a row.

    Components are numbered 0..n-1 in raster order, by their first pixel. The rows lie
    one after the other in one line, with a gap of one pixel between them that no run
    covers. Runs are in the order of that line.
    """

    starts: np.ndarray  # int64 [R], where in the line each run begins
    ends: np.ndarray  # int64 [R], one pixel behind its last one
    number: np.ndarray  # int64 [R], of the component that it belongs to
    sizes: np.ndarray  # int64 [n], the pixels of each component


def connected_components(mask: np.ndarray) -> Components:
    """The components of a bool mask [H, W]. Tested by test_components_equal_flooding."""
    height, width = mask.shape

    # Runs. One column of False to the right ends the run at the end of every row.
    row_stride = width + 1  # so much further is the pixel below another
    line = np.zeros(height * row_stride + 1, np.int8)
    line[1:].reshape(height, row_stride)[:, :width] = mask
    change = np.diff(line)
    starts = np.flatnonzero(change == 1)
    ends = np.flatnonzero(change == -1)

    # Pairs of touching runs. Moved down by a row, and by a pixel longer on either side,
    # a run overlaps those of the next row that it touches, diagonally too.
    upper, lower = _overlapping(starts + row_stride - 1, ends + row_stride + 1, starts, ends)

    # Union. Every run points to a root, at first itself. Where a pair has two roots,
    # the later one is made to point to the earlier one, and then all runs to the root
    # of their root. In the end the root of a component is its first run. A round goes
    # on with the pairs of roots that are still apart.
    root = np.arange(len(starts))
    while len(upper):
        earlier = np.minimum(upper, lower)
        later = np.maximum(upper, lower)
        np.minimum.at(root, later, earlier)
        grandparent = root[root]
        while (grandparent != root).any():
            root = grandparent
            grandparent = root[root]
        upper = root[upper]
        lower = root[lower]
        apart = upper != lower
        upper = upper[apart]
        lower = lower[apart]

    is_root = root == np.arange(len(root))
    number = (np.cumsum(is_root) - 1)[root]
    sizes = _sums(number, ends - starts, int(is_root.sum()))
    return Components(starts, ends, number, sizes)


def _overlapping(
    starts: np.ndarray, ends: np.ndarray, other_starts: np.ndarray, other_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a run [start, end) and another run that share a pixel of the line.

    Both lists are in the order of the line, and no two of the others overlap. Returns
    the indices of the runs and of the others, a pair each, in the order of the runs.
    """
    first = np.searchsorted(other_ends, starts, side="right")  # the first that ends behind
    behind = np.searchsorted(other_starts, ends, side="left")  # the first that begins too late
    count = behind - first
    run = np.repeat(np.arange(len(starts)), count)
    # The n-th pair of a run, from 0, is with `first + n`.
    pairs_before = np.cumsum(count) - count
    other = np.arange(len(run)) + np.repeat(first - pairs_before, count)
    return run, other


def _without_small(components: Components, smallest: int) -> Components:
    """Those of at least `smallest` pixels, numbered anew."""
    is_kept = components.sizes >= smallest
    new_number = np.cumsum(is_kept) - 1
    runs = is_kept[components.number]
    return Components(
        components.starts[runs],
        components.ends[runs],
        new_number[components.number[runs]],
        components.sizes[is_kept],
    )


def _shared_pixels(one: Components, other: Components) -> tuple[np.ndarray, ...]:
    """The pairs of components of one and the other frame that overlap.

    Returns the number of the component in each, and how many pixels they share: int64,
    a pair each, in the order of the numbers.
    """
    run, other_run = _overlapping(one.starts, one.ends, other.starts, other.ends)
    start = np.maximum(one.starts[run], other.starts[other_run])
    end = np.minimum(one.ends[run], other.ends[other_run])
    columns = max(len(other.sizes), 1)
    code = one.number[run] * columns + other.number[other_run]
    codes, pair = np.unique(code, return_inverse=True)
    return codes // columns, codes % columns, _sums(pair, end - start, len(codes))


class ComponentDetection(Accumulator):
    """Are anomalies found as wholes (SegmentMeIfYouCan, Chan et al. 2021)?

    Components are 8-connected. With P the union of the predicted components that touch
    a true one k,

        sIoU(k) = |k and P| / (|k or P| - |P and other true components|)
        PPV(p)  = |p and truth| / |p|            of a predicted component p

    and at each threshold tau in 0.25, 0.30, ..., 0.75

        TP = true components with sIoU >= tau        FN = true components with sIoU < tau
        FP = predicted components with PPV < tau     F1 = 2 TP / (2 TP + FN + FP)

    All are 0..1, higher is better; the figures are the mean sIoU over the true
    components, the mean PPV over the predicted ones, and the mean F1 over tau.
    Predicted components of fewer than `smallest_predicted` pixels are dropped, true
    ones of fewer than `smallest_true` become void. The benchmark has 500 and 100 for
    anomalies, 50 and 10 for obstacles on the road. NaN: sIoU without a true component,
    PPV without a predicted one, F1 without either. Tested by
    test_component_metrics_equal_brute_force, test_component_metrics_by_hand,
    test_no_component_is_nan.
    """

    TAU = np.arange(5, 16) / 20

    def __init__(self, smallest_predicted: int, smallest_true: int, device: Device = None):
        super().__init__(device)
        self.smallest_predicted = smallest_predicted
        self.smallest_true = smallest_true
        self._new_counts("true_components")
        self._new_counts("predicted_components")
        self._new_sums("siou")
        self._new_sums("ppv")
        for name in ("tp", "fn", "fp"):
            self._new_counts(name, len(self.TAU))

    def update(
        self, prediction: Tensor, mask: Tensor, truth: list[Components] | None = None
    ) -> None:
        """prediction: bool [B, H, W]; mask: 1 anomaly, 0 none, anything else void.

        truth: the `connected_components` of each frame's anomalies, if at hand (they
        are the same for every score). Unlike other updates, this one works on the CPU,
        where it also counts, and waits for the device.
        """
        _check_same_shape(prediction=prediction, mask=mask)
        predictions = prediction.cpu().numpy().astype(bool)
        masks = mask.cpu().numpy()
        if truth is None:
            truth = [connected_components(frame == 1) for frame in masks]

        for frame, frame_mask, frame_truth in zip(predictions, masks, truth, strict=True):
            siou, ppv = self._siou_and_ppv(frame, frame_mask, frame_truth)
            reached = siou[:, None] >= self.TAU  # [true components, tau]
            precise = ppv[:, None] >= self.TAU  # [predicted components, tau]
            self._add_array("true_components", len(siou))
            self._add_array("predicted_components", len(ppv))
            self._add_array("siou", siou.sum())
            self._add_array("ppv", ppv.sum())
            self._add_array("tp", reached.sum(0))
            self._add_array("fn", (~reached).sum(0))
            self._add_array("fp", (~precise).sum(0))

    def _add_array(self, name: str, values: Any) -> None:
        """`_add` of a number or an array of the CPU, where the state is too if no device is set."""
        self._add(name, torch.as_tensor(np.asarray(values), device=self.device))

    def _siou_and_ppv(
        self, prediction: np.ndarray, mask: np.ndarray, truth: Components
    ) -> tuple[np.ndarray, np.ndarray]:
        """sIoU of each true component and PPV of each predicted one of a single frame.

        prediction, mask: [H, W] as in `update`; truth: `connected_components` of the anomalies.
        """
        known = (mask == 0) | (mask == 1)
        found = connected_components(prediction & known)
        predicted = _without_small(found, self.smallest_predicted)
        k, p, overlap = _shared_pixels(truth, predicted)  # a pair each, overlap = |k and p|

        # True components that are too small become void, like the pixels that the mask
        # leaves out. That a predicted one is large enough was said before.
        counted = truth.sizes >= self.smallest_true  # [T]
        is_void = ~counted[k]
        columns = len(predicted.sizes)
        void_pixels = _sums(p[is_void], overlap[is_void], columns)
        predicted_size = predicted.sizes - void_pixels  # [P], |p|
        k = k[~is_void]
        p = p[~is_void]
        overlap = overlap[~is_void]
        predicted_in_truth = _sums(p, overlap, columns)  # [P], |p and truth|

        # For each true component k, with P the union of the predicted ones that touch it:
        true_size = truth.sizes  # [T], |k|
        rows = len(true_size)
        common = _sums(k, overlap, rows)  # |k and P|
        size_of_touched = _sums(k, predicted_size[p], rows)  # |P|
        union = true_size + size_of_touched - common  # |k or P|
        touched_in_truth = _sums(k, predicted_in_truth[p], rows)  # |P and truth|
        in_others = touched_in_truth - common  # |P and other true components|

        siou = _ratio(common, union - in_others)
        ppv = _ratio(predicted_in_truth, predicted_size)
        # A predicted component may lie in the void as a whole.
        return siou[counted], ppv[predicted_size > 0]

    def compute(self) -> dict:
        """Keys: siou, ppv, component_f1, true_components, predicted_components."""
        true_components = int(self._numpy("true_components"))
        predicted_components = int(self._numpy("predicted_components"))
        tp = self._numpy("tp")  # [tau]
        f1 = _ratio(2 * tp, 2 * tp + self._numpy("fn") + self._numpy("fp"))
        return {
            "siou": float(_ratio(self._numpy("siou"), true_components)),
            "ppv": float(_ratio(self._numpy("ppv"), predicted_components)),
            "component_f1": float(f1.mean()),
            "true_components": true_components,
            "predicted_components": predicted_components,
        }


# ----------------------------------------------------------------------------- selective prediction


class SelectivePrediction(_ScoreHistogram):
    """What is left of the errors if only the most certain pixels are kept?

    The risk at coverage k/N is the expected error rate of the k most certain of N
    pixels, where the errors among pixels of equal uncertainty are evenly spread. With r
    the risk at coverage 1,

        AURC   = mean of the risk over k = 1..N            0..1 (Geifman et al. 2019)
        E-AURC = AURC - (r + (1 - r) ln(1 - r))            0..1, the excess over an oracle
        AUSE   = E-AURC / r                                0 or more

    all three better when lower. The oracle ranks all errors last; what is subtracted is
    its AURC for N to infinity, which is O(log N / N) below that for N. So AUSE is the
    area between the risk of the score and that of the oracle, both divided by r.

    At a threshold, a pixel is certain where u <= threshold. Counting pixels that are
    accurate or inaccurate and certain or uncertain (n_ac, n_au, n_ic, n_iu; Mukhoti &
    Gal 2018),

        p(accurate | certain)     = n_ac / (n_ac + n_ic)
        p(uncertain | inaccurate) = n_iu / (n_ic + n_iu)
        PAvPU                     = (n_ac + n_iu) / N

    all 0..1, higher is better; at the median of u (the lower one of two), and at 21
    thresholds min + t (max - min), t = 0, 0.05, ..., 1.

    NaN: all without pixels; AUSE and p(uncertain | inaccurate) without errors;
    p(accurate | certain) where nothing is certain; what is at a threshold between
    infinite scores. Tested by test_selective_prediction_equals_brute_force,
    test_selective_prediction_by_hand,
    test_selective_prediction_all_right_all_wrong_all_tied,
    test_ause_is_eaurc_over_error_rate, test_perfect_ranking_reaches_the_oracle; the
    operating points by test_operating_points_equal_brute_force.
    """

    REJECTED_SHARES = (0.05, 0.1, 0.2)  # of all pixels, the most that an operating point rejects

    def update(self, uncertainty: Tensor, correct: Tensor, valid: Tensor | None = None) -> None:
        """uncertainty: floats, any shape; correct: bool or 0 / 1 / void; valid: False = void."""
        self._count(uncertainty, correct, valid)

    def compute(self) -> dict:
        """Keys: aurc, eaurc, ause, error_rate (r); median (of the uncertainty),
        p_accurate_certain, p_uncertain_inaccurate, pavpu (at it); n (pixels); sweep,
        with lists of 21: t, threshold, and the three measures at the threshold;
        risk_coverage, for a plot, with lists of at most 200: coverage, risk.
        """
        counts = self._score_counts()
        values = counts.scores  # [S], by ascending uncertainty
        wrong = counts.flag_0
        correct = counts.flag_1
        results = self._risk_results(wrong, correct)
        results |= self._results_at_median(values, wrong, correct)
        results["n"] = int(wrong.sum() + correct.sum())
        results["sweep"] = self._sweep(values, wrong, correct)
        results["risk_coverage"] = self._risk_coverage(wrong, correct)
        return results

    def operating_points(self) -> list[dict[str, float]]:
        """Thresholds that reject the 5, 10 and 20 % most uncertain pixels, and what that buys.

        A pixel is rejected where its uncertainty, rounded to float16, is above the
        threshold. Of the uncertainties that occur, the threshold is the lowest one
        above which lie at most `reject` of all pixels. Equal float16 values lie on one
        side together, so that fewer may be rejected than asked for, and none where more
        than `reject` share the highest value.

        Keys: reject (asked for), rejected (the exact share of the pixels), threshold,
        errors_caught (the share of all errors that are rejected), accuracy_kept (the
        share of the kept pixels that are right). All but the threshold are 0..1. NaN:
        all but `reject` without pixels, errors_caught without errors.
        """
        counts = self._score_counts()
        wrong = counts.flag_0[::-1]  # from the highest uncertainty down
        correct = counts.flag_1[::-1]
        pixels_above = np.cumsum(wrong + correct) - (wrong + correct)  # [S]
        wrong_above = np.cumsum(wrong) - wrong
        pixels = (wrong + correct).sum()
        errors = wrong.sum()

        points = []
        for reject in self.REJECTED_SHARES:
            # The last of the ascending counts that is small enough; the first one, 0,
            # always is. (The rounding of e.g. 0.05 * 60 must not cost a pixel, hence
            # the hair more.)
            largest = reject * pixels * (1 + 1e-12)
            lowest = np.searchsorted(pixels_above, largest, side="right") - 1
            rejected = pixels_above[lowest]
            caught = wrong_above[lowest]
            kept = pixels - rejected
            point = {
                "reject": reject,
                "rejected": float(_ratio(rejected, pixels)),
                "threshold": float(counts.scores[::-1][lowest]),
                "errors_caught": float(_ratio(caught, errors)),
                "accuracy_kept": float(_ratio(kept - (errors - caught), kept)),
            }
            points.append(point)
        return points

    def _risk_results(self, wrong: np.ndarray, correct: np.ndarray) -> dict[str, float]:
        """The error rate, and the areas under the risk-coverage curve."""
        errors = wrong.sum()
        error_rate = float(_ratio(errors, errors + correct.sum()))
        aurc = self._area_under_risk(wrong, correct)
        eaurc = aurc - self._oracle_area(error_rate)
        return {
            "aurc": float(aurc),
            "eaurc": float(eaurc),
            "ause": float(_ratio(eaurc, error_rate)),
            "error_rate": error_rate,
        }

    def _risk_coverage(self, wrong: np.ndarray, correct: np.ndarray) -> dict[str, list]:
        """The risk-coverage curve, thinned to what a plot can show."""
        pixels = np.cumsum(wrong + correct)  # pixels with u <= each value
        coverage = _ratio(pixels, pixels[-1])
        risk = _ratio(np.cumsum(wrong), pixels)
        plotted = thin_curve(coverage, risk)
        return {"coverage": coverage[plotted].tolist(), "risk": risk[plotted].tolist()}

    def _results_at_median(
        self, values: np.ndarray, wrong: np.ndarray, correct: np.ndarray
    ) -> dict[str, float]:
        """The median uncertainty, and the three measures of certainty there."""
        pixels = np.cumsum(wrong + correct)  # pixels with u <= each value
        median = values[np.argmax(2 * pixels >= pixels[-1])]  # argmax: the first that is True
        measures = self._at_thresholds(np.array([median]), values, wrong, correct)
        results = {"median": float(median)}
        for name, measure in measures.items():
            results[name] = float(measure[0])
        return results

    def _sweep(self, values: np.ndarray, wrong: np.ndarray, correct: np.ndarray) -> dict[str, list]:
        """The three measures at thresholds from the lowest to the highest uncertainty."""
        t = np.arange(21) / 20
        with np.errstate(invalid="ignore"):  # between infinities no threshold is defined: NaN
            thresholds = values[0] + t * (values[-1] - values[0])
        measures = self._at_thresholds(thresholds, values, wrong, correct)
        sweep = {"t": t.tolist(), "threshold": thresholds.tolist()}
        for name, measure in measures.items():
            sweep[name] = measure.tolist()
        return sweep

    @staticmethod
    def _area_under_risk(wrong: np.ndarray, correct: np.ndarray) -> np.ndarray:
        """AURC from the wrong and the correct pixels at each distinct uncertainty, [S] each.

        Let a tie of n pixels with error rate q come after a pixels with e errors. The
        risk after j more pixels of it is

            (e + q j) / (a + j) = q + (e - q a) / (a + j)        j = 1..n

        which sums up to q n + (e - q a) (H(a + n) - H(a)), H being the harmonic
        numbers. So no pixel has to be walked through. H(x) is digamma(x + 1) but for a
        constant that cancels.
        """
        tie = wrong + correct  # n
        pixels_after = np.cumsum(tie)  # a + n
        pixels_before = pixels_after - tie  # a
        errors_before = np.cumsum(wrong) - wrong  # e
        both = np.stack([pixels_before, pixels_after])  # [2, S]
        harmonic_before, harmonic_after = torch.digamma(torch.from_numpy(both + 1.0)).numpy()
        slope = errors_before - _ratio(wrong, tie) * pixels_before  # e - q a
        # q n is the number of wrong pixels in the tie
        risks = wrong + slope * (harmonic_after - harmonic_before)
        return _ratio(risks.sum(), pixels_after[-1])

    @staticmethod
    def _oracle_area(error_rate: float) -> float:
        """r + (1 - r) ln(1 - r): the AURC of the oracle for very many pixels."""
        if error_rate == 1:
            return 1.0  # the limit; the formula would be 0 times infinity
        return error_rate + (1 - error_rate) * np.log1p(-error_rate)

    @staticmethod
    def _at_thresholds(
        thresholds: np.ndarray, values: np.ndarray, wrong: np.ndarray, correct: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The three measures of certainty at each threshold, NaN where the threshold is NaN.

        values, wrong, correct: the distinct uncertainties, ascending, and the pixels at each.
        """
        # Cumulative counts with a 0 in front: entry k counts the pixels of the first k values.
        wrong_up_to = np.append(0, np.cumsum(wrong))
        correct_up_to = np.append(0, np.cumsum(correct))
        pixels = wrong_up_to[-1] + correct_up_to[-1]
        errors = wrong_up_to[-1]

        # How many of the values are at most the threshold: their pixels are certain.
        certain_values = np.searchsorted(values, thresholds, side="right")
        accurate_certain = correct_up_to[certain_values]
        inaccurate_certain = wrong_up_to[certain_values]
        inaccurate_uncertain = errors - inaccurate_certain
        measures = {
            "p_accurate_certain": _ratio(accurate_certain, accurate_certain + inaccurate_certain),
            "p_uncertain_inaccurate": _ratio(inaccurate_uncertain, errors),
            "pavpu": _ratio(accurate_certain + inaccurate_uncertain, pixels),
        }
        for measure in measures.values():
            measure[np.isnan(thresholds)] = NAN
        return measures


# ---------------------------------------------------------------------------------------- rejection


class RejectionCurve(Accumulator):
    """mIoU after ignoring the 0, 10, ..., 90 % most uncertain pixels of the whole split.

    It is the paper's curve (Landgraf et al. 2024). Of the pixels that are kept, with
    true and false positives and false negatives TP_c, FP_c and FN_c of class c,

        IoU_c = TP_c / (TP_c + FP_c + FN_c)
        mIoU  = mean of IoU_c over the classes that are labelled or predicted among these pixels

    0..1. Where the limit cuts through pixels of equal uncertainty, a share of each of
    them is kept, so that TP_c, FP_c and FN_c may be fractions. They are counted per
    bucket and class: 31 MB at 19 classes.
    NaN: all ten, without any pixel.
    Tested by test_rejection_equals_brute_force, test_rejection_by_hand,
    test_rejection_begins_at_the_miou,
    test_a_rejection_curve_knows_detection_and_selective_prediction_of_errors.
    """

    def __init__(self, num_classes: int, device: Device = None):
        super().__init__(device)
        self.num_classes = num_classes
        # By bucket: TP of each class, FP of each class, void; a pixel is in one of them.
        self._new_counts("predicted", BUCKETS, 2 * num_classes + 1)
        # By bucket: FN of each class, and all other pixels.
        self._new_counts("missed", BUCKETS, num_classes + 1)

    def update(self, uncertainty: Tensor, prediction: Tensor, labels: Tensor) -> None:
        """uncertainty: floats, any shape; prediction, labels: integers of that shape."""
        _check_same_shape(uncertainty=uncertainty, prediction=prediction, labels=labels)
        num_classes = self.num_classes
        bucket = float16_bucket(uncertainty).reshape(-1)
        labels = _flat_classes(labels, num_classes)
        prediction = _flat_classes(prediction, num_classes).int()
        correct = labels == prediction

        # TP or FP of the predicted class
        positive = torch.where(correct, prediction, prediction + num_classes)
        column = torch.where(labels < num_classes, positive, 2 * num_classes)
        self._add_histogram("predicted", bucket, column)

        # FN of the labelled class
        column = torch.where(correct, num_classes, labels.int())
        self._add_histogram("missed", bucket, column)

    def _add_histogram(self, name: str, bucket: Tensor, column: Tensor) -> None:
        """Count every pixel in its bucket and column of a state; writes over `column`."""
        width = self.state[name].shape[1]
        index = column.add_(bucket * width)  # into the flattened state
        self._add(name, _histogram_of(index, BUCKETS * width))

    def error_metrics(self) -> tuple[Detection, SelectivePrediction]:
        """Detection of errors and selective prediction by the same uncertainty.

        They are as if they had seen the same pixels, of which the wrong ones are the
        positives. It saves each of them a pass over the pixels.
        """
        predicted = self.state["predicted"]  # [BUCKETS, 2 C + 1]
        correct = predicted[:, : self.num_classes].sum(1)
        wrong = predicted[:, self.num_classes : -1].sum(1)

        detection = Detection(predicted.device)
        detection._fill(flag_0=correct, flag_1=wrong)  # errors are the positives
        selective = SelectivePrediction(predicted.device)
        selective._fill(flag_0=wrong, flag_1=correct)
        return detection, selective

    def compute(self) -> dict:
        """Keys: rejection, rejection_classes, n (pixels).

        rejection is a list of 10 mIoU, rejection_classes of how many classes are in each.
        """
        predicted = self._numpy("predicted")[:, :-1]  # [BUCKETS, 2 C], without void: TP, FP
        missed = self._numpy("missed")[:, :-1]  # [BUCKETS, C]: FN
        pixels = predicted.sum(1)  # [BUCKETS]; a pixel is either TP or FP
        n = int(pixels.sum())
        _check_no_nan(n - pixels[LOWEST_BUCKET : HIGHEST_BUCKET + 1].sum(), n)

        # The limits: 100, 90, ..., 10 % of the pixels are kept. The buckets in which
        # the limits lie, and which share of their pixels is kept.
        keep = n * np.arange(10, 0, -1) / 10  # [10], in pixels
        up_to = np.cumsum(pixels)
        below = up_to - pixels
        cut = np.searchsorted(up_to, keep)  # [10]
        share = _ratio(keep - below[cut], pixels[cut])

        # All that lies in lower buckets, and that share of the bucket which is cut.
        counts = np.concatenate([predicted, missed], axis=1)  # [BUCKETS, 3 C]
        counts_below = np.cumsum(counts, axis=0) - counts
        kept = counts_below[cut] + share[:, None] * counts[cut]  # [10, 3 C]
        tp, fp, fn = np.split(kept, 3, axis=1)  # [10, C] each
        iou = _ratio(tp, tp + fp + fn)
        return {
            "rejection": [_mean_of_defined(row) for row in iou],
            "rejection_classes": (~np.isnan(iou)).sum(1).tolist(),
            "n": n,
        }


# --------------------------------------------------------------------------- class-wise uncertainty


class ClassUncertainty(Accumulator):
    """Mean uncertainty of the pixels that are predicted as a class, and mUnc.

        U_c  = mean of u over the labelled pixels with prediction c      each network on its own
        mUnc = mean of U_c over the classes that are predicted somewhere

    Both have the range of the uncertainty; zeros count.
    NaN: U_c of a class that is never predicted; mUnc without any pixel.
    Tested by test_class_uncertainty_by_hand.
    """

    def __init__(self, num_classes: int, device: Device = None):
        super().__init__(device)
        self.num_classes = num_classes
        self._new_counts("pixels", num_classes)
        self._new_counts("nan")
        self._new_sums("uncertainty", num_classes)

    def update(self, uncertainty: Tensor, prediction: Tensor, labels: Tensor) -> None:
        """uncertainty: floats, any shape; prediction, labels: integers (labels only tell void)."""
        _check_same_shape(uncertainty=uncertainty, prediction=prediction, labels=labels)
        num_classes = self.num_classes
        labelled = _flat_classes(labels, num_classes) < num_classes
        classes = _flat_classes(prediction, num_classes, labelled)
        uncertainty = uncertainty.reshape(-1).double()
        self._add("pixels", _histogram_of(classes, num_classes + 1)[:-1])
        self._add("nan", (uncertainty.isnan() & (classes < num_classes)).sum())
        self._add("uncertainty", _histogram_of(classes, num_classes + 1, uncertainty)[:-1])

    def compute(self) -> dict:
        """Keys: uncertainty (a list, one per class), munc, n (pixels)."""
        pixels = self._numpy("pixels")  # [C]
        _check_no_nan(self._numpy("nan"), pixels.sum())
        mean = _ratio(self._numpy("uncertainty"), pixels)
        return {
            "uncertainty": mean.tolist(),
            "munc": _mean_of_defined(mean),
            "n": int(pixels.sum()),
        }


# ----------------------------------------------------------------------------------------- fidelity


class Fidelity(Accumulator):
    """How close is the student's uncertainty s to the teacher's t, pixel by pixel?

        RMSE     = sqrt(mean (s - t)^2)
        RMSLE    = sqrt(mean (log(1 + s) - log(1 + t))^2)        the student's loss
        Pearson  = cov(s, t) / (std(s) std(t))                   -1..1
        Spearman = Pearson of the ranks, ties at their middle    -1..1

    RMSE and RMSLE are 0 or more, lower is better; of the others higher is better. Ranks
    are those of the rows of a 1024 x 1024 joint histogram (see `_joint_row`): Spearman
    is within 0.005 where the standard deviation of the scores is at least a third of
    their mean. The others are exact. NaN: all without pixels; the two correlations
    where s or t is constant. Tested by test_fidelity_equals_brute_force,
    test_fidelity_by_hand, test_pearson_survives_a_small_spread.
    """

    SIDE = 1024  # rows and columns of the joint histogram
    STEPS = 16  # rows to a factor of two
    SMALLEST_EXPONENT = -30  # smaller scores share a row with 0
    LARGEST_EXPONENT = 10  # larger ones share the last row

    def __init__(self, device: Device = None):
        super().__init__(device)
        self._new_counts("pixels")
        self._new_counts("nan")
        self._new_counts("joint", self.SIDE, self.SIDE)  # [student, teacher]
        self._new_sums("student")
        self._new_sums("teacher")
        self._new_sums("student_squared")
        self._new_sums("teacher_squared")
        self._new_sums("product")
        self._new_sums("squared_error")
        self._new_sums("squared_log_error")

    def update(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
        """student, teacher: floats above -1, any one shape; valid: bool, False for void."""
        _check_same_shape(student=student, teacher=teacher, valid=valid)
        if valid is None:
            valid = torch.ones_like(student).bool()
        valid = valid.reshape(-1)
        # At void pixels both are 0, which adds nothing to the sums.
        s = torch.where(valid, student.reshape(-1), 0).double()
        t = torch.where(valid, teacher.reshape(-1), 0).double()
        error = s - t
        # log(1 + s) - log(1 + t) would cancel where both are close; this does not.
        log_error = (error / (1 + t)).log1p_()

        self._add("pixels", valid.sum())
        self._add("nan", (s.isnan() | t.isnan()).sum())
        self._add("student", s.sum())
        self._add("teacher", t.sum())
        # A dot product needs no temporary for the squares.
        self._add("student_squared", torch.dot(s, s))
        self._add("teacher_squared", torch.dot(t, t))
        self._add("product", torch.dot(s, t))
        self._add("squared_error", torch.dot(error, error))
        self._add("squared_log_error", torch.dot(log_error, log_error))

        cells = self.SIDE * self.SIDE
        cell = self._joint_row(s) * self.SIDE + self._joint_row(t)
        cell = torch.where(valid, cell, cells)  # void pixels go to a cell after the last one
        self._add("joint", _histogram_of(cell, cells + 1)[:-1])

    @classmethod
    def _joint_row(cls, scores: Tensor) -> Tensor:
        """The row of each score in the joint histogram: int32 0..1023, in the order of the scores.

        The rows are spaced like floating-point numbers, with 16 rows for each factor of
        two from 2^-30 to 2^10. That is enough for the small scores of certain pixels,
        where float16 has few steps. Negative scores have 8 rows for each factor of two,
        below the row of zero.

        For example 0.75 = 1.5 * 2^-1: its exponent is stored as 127 - 1 = 126, its
        mantissa 0.5 begins with the bits 1000, so its number is 126 * 16 + 8 = 2024.
        Less the 1551 steps below 2^-30 that is step 473, and with 322 rows up to zero
        row 795.
        """
        bits = scores.float().view(torch.int32)
        # Without the sign: 8 bits of exponent and 23 of mantissa. The exponent and the
        # first 4 bits of the mantissa are the number of the step, 16 to a factor of
        # two. Step 1 begins at 2^-30, step 0 is for all that is smaller.
        step = (bits & 0x7FFFFFFF) >> 19
        steps_below = cls.STEPS * (127 + cls.SMALLEST_EXPONENT) - 1  # 127 is the exponent's offset
        last = cls.STEPS * (cls.LARGEST_EXPONENT - cls.SMALLEST_EXPONENT) + 1  # 641
        step = step.sub_(steps_below).clamp_(0, last)
        zero_row = (last + 1) // 2 + 1  # 322: below it there are half as many rows as above
        negative_row = zero_row - ((step + 1) >> 1)
        return torch.where(bits < 0, negative_row, zero_row + step)

    def compute(self) -> dict:
        """Keys: rmse, rmsle, pearson, spearman, n (pixels)."""
        pixels = int(self._numpy("pixels"))
        _check_no_nan(self._numpy("nan"), pixels)
        return {
            "rmse": self._mean("squared_error") ** 0.5,
            "rmsle": self._mean("squared_log_error") ** 0.5,
            "pearson": self._pearson(),
            "spearman": self._spearman(),
            "n": pixels,
        }

    def _mean(self, name: str) -> float:
        """The mean over all pixels of one of the sums."""
        return float(_ratio(self._numpy(name), self._numpy("pixels")))

    def _pearson(self) -> float:
        """Correlation of the scores, from their sums, squares and products."""
        mean_s = self._mean("student")
        mean_t = self._mean("teacher")
        square_s = self._mean("student_squared")
        square_t = self._mean("teacher_squared")
        variance_s = square_s - mean_s * mean_s
        variance_t = square_t - mean_t * mean_t
        # Where a side is constant, the difference of equal squares leaves their rounding.
        rounding = 1e-12
        if variance_s > rounding * square_s and variance_t > rounding * square_t:
            covariance = self._mean("product") - mean_s * mean_t
            return covariance / (variance_s * variance_t) ** 0.5
        return NAN

    def _spearman(self) -> float:
        """Correlation of the ranks, from the joint histogram."""
        joint = self._numpy("joint")  # [student, teacher]
        count_s = joint.sum(1)
        count_t = joint.sum(0)
        pixels = max(count_s.sum(), 1)
        # The middle rank of each row as a share of all pixels, less the mean: -0.5..0.5.
        rank_s = (np.cumsum(count_s) - count_s / 2) / pixels - 0.5
        rank_t = (np.cumsum(count_t) - count_t / 2) / pixels - 0.5
        covariance = rank_s @ joint @ rank_t
        variances = (count_s @ rank_s**2) * (count_t @ rank_t**2)
        return float(_ratio(covariance, variances**0.5))


# --------------------------------------------------------------------------------------- comparison


class PairedBootstrap:
    """Is one score better than another, or does it depend on the images of the split?

    All scores see the same pixels, of which some are positive (errors or anomalies).
    AUROC and AURC are pooled over all pixels, as in `Detection` and
    `SelectivePrediction`. The pixels of an image are alike, so it is images that are
    drawn anew. With n of them:

        draw r     n images with replacement; image i is in it m_ri times, sum_i m_ri = n
        A_r        the figure of score A over all pixels of the draw
        A_r - B_r  paired: scores A and B have the same draws
        interval   the 2.5 and the 97.5 percentile of A_r - B_r over the draws

    This is the percentile bootstrap, with a fixed seed. It says what other images of
    the same kind would change, but not what another training would. A draw without a
    positive or without a negative has no figure and is left out.

    Every image is kept as a histogram of its pixels. The cells are groups of 16
    neighbouring float16 scores (`float16_bucket(score) >> CELL_BITS`), the same for all
    images and scores: 64 of them to a factor of two. Within a cell scores count as
    equal, which is less than 1.6 % apart. That shifts an AUROC or an AURC by less than
    0.0005 (test_coarse_cells_cost_little; measured on the drawn scenes: 0.00003).

    Memory: 10 bytes for each cell that occurs in an image, for each score; commonly
    10 kB an image, at most 40 kB. The draws of one score take 16 kB for each cell that
    occurs in the split, 65 MB at most, while its figure is computed.

    The images of a batch are added to those before, so the batch size changes nothing.
    Their order decides which draws are made, but not what is drawn from.

    NaN: a figure without positives or negatives; an interval of fewer images than
    `SMALLEST_SPLIT`, whose draws would hardly differ.
    Tested by test_paired_bootstrap_equals_drawing_images,
    test_paired_bootstrap_does_not_depend_on_the_batches,
    test_paired_bootstrap_of_nothing_is_nan.
    """

    CELL_BITS = 4  # of a bucket's 16, which pixels of one cell may differ in
    CELLS = BUCKETS >> CELL_BITS
    LOWEST_CELL = LOWEST_BUCKET >> CELL_BITS  # scores below it or above the highest are NaN
    HIGHEST_CELL = HIGHEST_BUCKET >> CELL_BITS
    SMALLEST_SPLIT = 5  # images
    DRAWS = 1000
    SEED = 0

    def __init__(self, draws: int = DRAWS, seed: int = SEED):
        self.draws = draws
        self.seed = seed
        # By score, for each image: the cells that occur, and their negatives and positives.
        self.images: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def update(
        self, scores: dict[str, Tensor], positives: Tensor, valid: Tensor | None = None
    ) -> None:
        """scores: by name, floats [B, H, W]; positives: bool or 0 / 1 / void; valid: False = void.

        Raises MetricError where scores are NaN.
        """
        num_images = len(positives)
        row = _flat_classes(positives, 2, valid).int()  # [B * H * W]: 0, 1, or 2 for void
        image = torch.arange(num_images, device=row.device).repeat_interleave(
            positives[0].numel(), output_size=positives.numel()
        )
        row += 3 * image.int()
        for name, values in scores.items():
            _check_same_shape(scores=values, positives=positives, valid=valid)
            cell = float16_bucket(values).reshape(-1) >> self.CELL_BITS
            index = row * self.CELLS + cell
            counts = _histogram_of(index, 3 * num_images * self.CELLS)
            counts = counts.view(num_images, 3, self.CELLS)[:, :2].cpu().numpy()  # without void
            numbers = counts[:, :, self.LOWEST_CELL : self.HIGHEST_CELL + 1]
            _check_no_nan(counts.sum() - numbers.sum(), counts.sum())
            for image_counts in counts:  # [2, CELLS]
                occupied = np.flatnonzero(image_counts.any(0))
                kept = (occupied.astype(np.uint16), image_counts[:, occupied].astype(np.uint32))
                self.images.setdefault(name, []).append(kept)

    def auroc(self, name: str) -> np.ndarray:
        """The AUROC of a score [1 + draws]: first over the split as it is, then of each draw."""
        counts = self._counts_of_draws(name)  # [1 + draws, 2, S]
        negatives = counts[:, 0]
        positives = counts[:, 1]
        positives_above = positives.sum(1, keepdims=True) - np.cumsum(positives, axis=1)
        # Of all pairs of a negative and a positive: those in order, and half of the ties.
        pairs_in_order = (negatives * (positives_above + positives / 2)).sum(1)
        return _ratio(pairs_in_order, negatives.sum(1) * positives.sum(1))

    def aurc(self, name: str) -> np.ndarray:
        """The AURC of a score [1 + draws], as `auroc`; positives are errors."""
        areas = []
        for correct, wrong in self._counts_of_draws(name):  # [S] each
            occupied = correct + wrong > 0
            area = NAN
            if correct.any() and wrong.any():
                area = SelectivePrediction._area_under_risk(wrong[occupied], correct[occupied])
            areas.append(float(area))
        return np.array(areas)

    def interval(self, differences: np.ndarray) -> tuple[float, float]:
        """The 95 % interval of differences [1 + draws] of two scores' figures."""
        defined = differences[1:][~np.isnan(differences[1:])]
        if self.num_images() < self.SMALLEST_SPLIT or len(defined) == 0:
            return NAN, NAN
        low, high = np.percentile(defined, [2.5, 97.5])
        return float(low), float(high)

    def num_images(self) -> int:
        """How many images were seen."""
        return max((len(images) for images in self.images.values()), default=0)

    def _counts_of_draws(self, name: str) -> np.ndarray:
        """Negatives and positives at each occupied cell, ascending: float64 [1 + draws, 2, S].

        First come those of the split as it is.
        """
        images = self.images[name]
        occupied = np.unique(np.concatenate([cells for cells, _ in images]))  # [S]
        counts = np.zeros((len(images), 2, len(occupied)))
        for image, (cells, image_counts) in enumerate(images):
            counts[image][:, np.searchsorted(occupied, cells)] = image_counts

        n = len(images)
        generator = np.random.default_rng(self.seed)
        times_drawn = generator.multinomial(n, np.full(n, 1 / n), size=self.draws)  # [draws, n]
        times_drawn = np.concatenate([np.ones((1, n)), times_drawn])
        drawn = times_drawn @ counts.reshape(n, -1)
        return drawn.reshape(1 + self.draws, 2, -1)
