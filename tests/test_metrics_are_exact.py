"""metrics.py against brute force, hand-computed cases and its promises (pooling, NaN, memory)."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metrics
from metrics import (
    CalibrationError,
    ClassUncertainty,
    ConfusionMatrix,
    Detection,
    ErrorCalibration,
    Fidelity,
    MetricError,
    PairedBootstrap,
    ProperScores,
    RejectionCurve,
    SelectivePrediction,
)

C = 5
NAN = float("nan")
ACCUMULATORS = {
    "confusion": lambda **k: ConfusionMatrix(C, **k),
    "proper": ProperScores,
    "calibration": CalibrationError,
    "error calibration": ErrorCalibration,
    "detection": Detection,
    "selective": SelectivePrediction,
    "rejection": lambda **k: RejectionCurve(C, **k),
    "class": lambda **k: ClassUncertainty(C, **k),
    "fidelity": Fidelity,
}


def make_batch(images=4, seed=0, height=12, width=17):
    """Random probs [B, C, H, W], labels with 254 and 255, prediction, and two uncertainties."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, height, width)
    probs = (3 * torch.randn(images, C, height, width, generator=generator)).softmax(1)
    labels = torch.randint(0, C, shape, generator=generator, dtype=torch.uint8)
    hit = torch.rand(shape, generator=generator) < 0.5
    labels = torch.where(hit, probs.argmax(1).to(torch.uint8), labels)
    labels[torch.rand(shape, generator=generator) < 0.1] = 255
    labels[torch.rand(shape, generator=generator) < 0.1] = 254
    uncertainty = metrics.max_softmax(probs)
    noise = torch.rand(shape, generator=generator)
    return {
        "probs": probs,
        "labels": labels,
        "prediction": probs.argmax(1),
        "uncertainty": uncertainty,
        "teacher": 0.7 * uncertainty + 0.3 * noise * uncertainty,
    }


def arguments_of(name, batch):
    """What `update` of the accumulator `name` takes of a batch."""
    probs = batch["probs"]
    labels = batch["labels"]
    prediction = batch["prediction"]
    uncertainty = batch["uncertainty"]
    valid = labels < C
    return {
        "confusion": (prediction, labels),
        "proper": (probs, labels),
        "calibration": (probs, labels),
        "error calibration": (uncertainty, prediction != labels, valid),
        "detection": (uncertainty, prediction != labels, valid),
        "selective": (uncertainty, prediction == labels, valid),
        "rejection": (uncertainty, prediction, labels),
        "class": (uncertainty, prediction, labels),
        "fidelity": (uncertainty, batch["teacher"], valid),
    }[name]


def accumulate(name, *batches, **kwargs):
    """An accumulator that has seen these batches."""
    accumulator = ACCUMULATORS[name](**kwargs)
    for batch in batches:
        accumulator.update(*arguments_of(name, batch))
    return accumulator


def select_images(batch, index):
    """Some of a batch's images; index: a list or a slice."""
    return {key: x[index] for key, x in batch.items()}


def numbers_of(value):
    """All numbers of a nested result."""
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers_of(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers_of(v)]
    return [value]


def assert_close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(numbers_of(a), numbers_of(b), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ brute force


def oracle_detection(scores, positives):
    """Threshold by threshold, from the definitions. scores: float64 [N], positives: bool [N]."""
    p, n = int(positives.sum()), int((~positives).sum())
    fpr, tpr, precision = [0.0], [0.0], [1.0]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        tp, fp = int((chosen & positives).sum()), int((chosen & ~positives).sum())
        fpr.append(fp / n)
        tpr.append(tp / p)
        precision.append(tp / (tp + fp))
    auroc = sum((fpr[i] - fpr[i - 1]) * (tpr[i] + tpr[i - 1]) / 2 for i in range(1, len(fpr)))
    ap = sum((tpr[i] - tpr[i - 1]) * precision[i] for i in range(1, len(tpr)))
    fpr95 = next(f for f, t in zip(fpr, tpr, strict=True) if t >= 0.95)
    return {"auroc": auroc, "ap": ap, "fpr95": fpr95}


def oracle_risks(u, wrong):
    """Expected risk at k = 1..N by walking pixel by pixel through the ties. -> float64 [N]"""
    risks = []
    errors = 0.0
    for value in sorted(set(u.tolist())):
        tie = wrong[u == value]
        for _ in range(len(tie)):
            errors += tie.mean()
            risks.append(errors / (len(risks) + 1))
    return np.array(risks)


def oracle_certainty(u, wrong, threshold):
    certain = u <= threshold
    ac, ic = (certain & ~wrong).sum(), (certain & wrong).sum()
    iu = (~certain & wrong).sum()
    return (
        ac / (ac + ic) if ac + ic else NAN,
        iu / (ic + iu) if ic + iu else NAN,
        (ac + iu) / len(u),
    )


def oracle_rejection(u, prediction, labels, keep):
    """Each pixel has a weight: 1 below the limit, a share inside the tie that it cuts, 0 above."""
    weights = np.zeros(len(u))
    left = keep
    for value in sorted(set(u.tolist())):
        tie = u == value
        weights[tie] = min(1.0, left / tie.sum())
        left = max(left - tie.sum(), 0)
    ious = []
    for c in range(C):
        union = weights[(prediction == c) | (labels == c)].sum()
        if union > 0:
            ious.append(weights[(prediction == c) & (labels == c)].sum() / union)
    return (np.mean(ious) if ious else NAN), len(ious)


def score_cases():
    generator = torch.Generator().manual_seed(3)
    n = 600
    normal = torch.randn(n, generator=generator)
    positive = [0.0, 6e-8, 1e-5, 1.0, 7e4, math.inf]
    special = torch.tensor(positive + [-x for x in positive])
    return {
        "random": torch.rand(n, generator=generator),
        "float64": torch.rand(n, generator=generator, dtype=torch.float64),
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
        "tied": torch.randint(0, 3, (n,), generator=generator) / 4,
        "constant": torch.full((n,), 0.3),
        "negative": -normal.abs() * 20,
        "both signs": normal,
        "huge": normal * 3e4,
        "tiny": normal * 1e-6,
        "special": special[torch.randint(0, len(special), (n,), generator=generator)],
    }


def as_float16(scores):
    return scores.half().double().numpy() + 0.0  # + 0.0: -0.0 becomes 0.0


@pytest.mark.parametrize("case", score_cases())
def test_detection_equals_brute_force_on_rounded_scores(case):
    scores = score_cases()[case]
    positives = torch.rand(len(scores), generator=torch.Generator().manual_seed(5)) < 0.3
    positives |= scores > 0.9
    accumulator = Detection()
    accumulator.update(scores, positives)
    result = accumulator.compute()
    expected = oracle_detection(as_float16(scores), positives.numpy())
    assert_close({key: result[key] for key in expected}, expected)
    assert (result["n"], result["positives"]) == (len(scores), int(positives.sum()))
    assert len(accumulator.curves()["fpr"]) == len(set(as_float16(scores).tolist()))


@pytest.mark.parametrize("case", ["random", "tied", "negative", "huge"])
def test_detection_equals_scikit_learn(case):
    sk = pytest.importorskip("sklearn.metrics")
    scores = score_cases()[case].half()  # float16 loses nothing of these
    scores = scores.clamp(-6e4, 6e4)
    positives = torch.rand(len(scores), generator=torch.Generator().manual_seed(5)) < 0.3
    accumulator = Detection()
    accumulator.update(scores, positives)
    result = accumulator.compute()
    curves = accumulator.curves()
    y = positives.numpy()
    s = scores.double().numpy()
    assert result["auroc"] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-6)
    assert result["ap"] == pytest.approx(sk.average_precision_score(y, s), abs=1e-6)
    fpr, tpr, thresholds = sk.roc_curve(y, s, drop_intermediate=False)
    assert result["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-6)
    np.testing.assert_allclose(curves["fpr"], fpr[1:])
    np.testing.assert_allclose(curves["tpr"], tpr[1:])
    np.testing.assert_allclose(curves["threshold"], thresholds[1:])
    precision, recall, _ = sk.precision_recall_curve(y, s)
    np.testing.assert_allclose(curves["precision"], precision[:-1][::-1])
    np.testing.assert_allclose(curves["recall"], recall[:-1][::-1])


@pytest.mark.parametrize("case", [c for c in score_cases() if c != "special"])
def test_selective_prediction_equals_brute_force(case):
    u = score_cases()[case]
    wrong = torch.rand(len(u), generator=torch.Generator().manual_seed(6)) < 0.2
    wrong |= (u > 0.8) & (u < 1)
    accumulator = SelectivePrediction()
    accumulator.update(u, ~wrong)
    result = accumulator.compute()
    u = as_float16(u)
    wrong = wrong.numpy()
    risks = oracle_risks(u, wrong)
    r = wrong.mean()
    assert_close(result["aurc"], risks.mean())
    assert_close(result["eaurc"], risks.mean() - (r + (1 - r) * math.log(1 - r)))
    curve = result["risk_coverage"]
    assert_close([risks[round(c * len(u)) - 1] for c in curve["coverage"]], curve["risk"])
    assert curve["coverage"][-1] == 1 and len(curve["coverage"]) <= 200

    median = np.sort(u)[(len(u) + 1) // 2 - 1]
    names = ("p_accurate_certain", "p_uncertain_inaccurate", "pavpu")
    assert result["median"] == median
    assert_close([result[k] for k in names], list(oracle_certainty(u, wrong, median)))
    with np.errstate(all="ignore"):
        thresholds = [u.min() + t / 20 * (u.max() - u.min()) for t in range(21)]
    np.testing.assert_allclose(result["sweep"]["threshold"], thresholds)
    if np.isfinite(thresholds).all():
        expected = np.array([oracle_certainty(u, wrong, t) for t in thresholds])  # [21, 3]
        assert_close([result["sweep"][k] for k in names], expected.T.tolist())
    else:
        assert np.isnan(result["sweep"]["pavpu"]).any()


def test_ause_is_eaurc_over_error_rate():
    """By integrating the area between the two normalised curves, for many pixels."""
    generator = torch.Generator().manual_seed(8)
    u = torch.rand(20000, generator=generator).half()
    wrong = torch.rand(20000, generator=generator) < u.float() ** 3
    accumulator = SelectivePrediction()
    accumulator.update(u, ~wrong)
    result = accumulator.compute()
    r = result["error_rate"]
    assert r == pytest.approx(wrong.double().mean().item(), abs=1e-9)
    assert result["ause"] == pytest.approx(result["eaurc"] / r, rel=1e-12)
    risks = oracle_risks(as_float16(u), wrong.numpy())
    coverage = (np.arange(10**6) + 0.5) / 10**6
    oracle = np.maximum(0, coverage - (1 - r)) / coverage
    assert result["ause"] == pytest.approx(risks.mean() / r - oracle.mean() / r, abs=1e-6)


def test_perfect_ranking_reaches_the_oracle():
    n = 40000
    wrong = torch.arange(n) >= 0.9 * n
    accumulator = SelectivePrediction()
    accumulator.update(wrong.float(), ~wrong)
    result = accumulator.compute()
    assert result["eaurc"] == pytest.approx(0, abs=1e-5)
    assert result["p_accurate_certain"] == 1 and result["pavpu"] == 1
    assert result["p_uncertain_inaccurate"] == 1


@pytest.mark.parametrize("case", ["random", "tied", "constant", "both signs", "special"])
def test_rejection_equals_brute_force(case):
    u = score_cases()[case]
    generator = torch.Generator().manual_seed(9)
    prediction = torch.randint(0, C, u.shape, generator=generator)
    labels = torch.where(torch.rand(u.shape, generator=generator) < 0.6, prediction, 1)
    labels[::7] = 255
    accumulator = RejectionCurve(C)
    accumulator.update(u, prediction, labels)
    result = accumulator.compute()
    valid = (labels < C).numpy()
    u = as_float16(u)[valid]
    prediction = prediction.numpy()[valid]
    labels = labels.numpy()[valid]
    assert result["n"] == len(u)
    for tenth in range(10):
        miou, classes = oracle_rejection(u, prediction, labels, len(u) * (10 - tenth) / 10)
        assert result["rejection"][tenth] == pytest.approx(miou, abs=1e-9)
        assert result["rejection_classes"][tenth] == classes


def test_a_rejection_curve_knows_detection_and_selective_prediction_of_errors():
    batches = [make_batch(seed=seed) for seed in range(3)]
    rejection = accumulate("rejection", *batches)
    detection, selective = rejection.error_metrics()
    for name, derived in (("detection", detection), ("selective", selective)):
        alone = ACCUMULATORS[name]()
        for batch in batches:
            alone.update(*arguments_of(name, batch))
        assert torch.equal(derived.state["histogram"][:2], alone.state["histogram"][:2])
        assert derived.compute() == alone.compute()


def test_rejection_begins_at_the_miou():
    batch = make_batch()
    first = accumulate("rejection", batch).compute()["rejection"][0]
    assert first == pytest.approx(accumulate("confusion", batch).compute()["miou"], abs=1e-12)


def test_calibration_equals_brute_force():
    batch = make_batch(8)
    result = accumulate("calibration", batch).compute()
    valid = (batch["labels"] < C).numpy()
    confidence = batch["probs"].amax(1).double().numpy()[valid]
    right = (batch["prediction"] == batch["labels"]).numpy()[valid]
    place = np.ceil(confidence * 15) - 1
    gaps, shares = [], []
    for b in range(15):
        inside = place == b
        assert result["bins"]["count"][b] == inside.sum()
        if inside.any():
            gaps.append(abs(right[inside].mean() - confidence[inside].mean()))
            shares.append(inside.mean())
            assert result["bins"]["accuracy"][b] == pytest.approx(right[inside].mean())
            assert result["bins"]["confidence"][b] == pytest.approx(confidence[inside].mean())
    assert result["ece"] == pytest.approx(np.dot(gaps, shares), abs=1e-9)
    assert result["mce"] == pytest.approx(max(gaps), abs=1e-9)
    with_prediction = CalibrationError()
    with_prediction.update(batch["probs"], batch["labels"], batch["prediction"])
    assert with_prediction.compute() == result or math.isnan(result["bins"]["accuracy"][0])
    assert with_prediction.compute()["ece"] == result["ece"]


def test_error_calibration_equals_brute_force():
    batch = make_batch(6)
    valid = batch["labels"] < C
    wrong = batch["prediction"] != batch["labels"]
    q = batch["uncertainty"].clone()  # in 0..0.8
    q[0, 0, :5] = 0.0
    q[0, 1, :5] = 1.0
    accumulator = ErrorCalibration(bins=10)
    accumulator.update(q, wrong, valid)
    result = accumulator.compute()

    q, wrong = q[valid].double().numpy(), wrong[valid].numpy()
    ece, gaps = 0.0, []
    for b in range(10):
        inside = (q > b / 10) & (q <= (b + 1) / 10)
        if b == 0:
            inside |= q == 0
        assert result["bins"]["count"][b] == inside.sum()
        if inside.any():
            gap = abs(wrong[inside].mean() - q[inside].mean())
            gaps.append(gap)
            ece += inside.mean() * gap
            assert result["bins"]["error_rate"][b] == pytest.approx(wrong[inside].mean())
            assert result["bins"]["probability"][b] == pytest.approx(q[inside].mean())
    assert result["ece"] == pytest.approx(ece) and result["mce"] == pytest.approx(max(gaps))
    assert result["n"] == len(q)


def test_proper_scores_equal_brute_force():
    batch = make_batch(8)
    result = accumulate("proper", batch).compute()
    valid = (batch["labels"] < C).numpy()
    probs = batch["probs"].double().permute(0, 2, 3, 1).numpy()[valid]  # [N, C]
    labels = batch["labels"].numpy()[valid]
    target = np.eye(C)[labels]
    assert result["nll"] == pytest.approx(-np.log((probs * target).sum(1)).mean(), abs=1e-6)
    assert result["brier"] == pytest.approx(((probs - target) ** 2).sum(1).mean(), abs=1e-6)
    assert result["n"] == len(labels)
    channels_last = ProperScores()
    channels_last.update(
        batch["probs"].contiguous(memory_format=torch.channels_last), batch["labels"]
    )
    assert_close(channels_last.compute(), result, 1e-7)


def midranks(x):
    values, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts / 2)[place]


@pytest.mark.parametrize(
    "case", ["uniform", "saturated", "independent", "tied", "opposite", "negative"]
)
def test_fidelity_equals_brute_force(case):
    generator = torch.Generator().manual_seed(11)
    teacher = torch.rand(30000, generator=generator) * 0.5
    noise = torch.randn(30000, generator=generator)
    if case == "saturated":  # most pixels certain, as in practice
        teacher = teacher**8
    if case == "negative":
        teacher = teacher - 0.25
    student = {
        "negative": teacher + 0.1 * noise,
        "uniform": (teacher + 0.05 * noise).clamp(0, 1),
        "saturated": (teacher * torch.exp(0.7 * noise)).clamp(0, 1),
        "independent": torch.rand(30000, generator=generator),
        "tied": (teacher * 8).round() / 8,
        "opposite": 0.5 - teacher,
    }[case]
    accumulator = Fidelity()
    accumulator.update(student, teacher)
    result = accumulator.compute()
    s, t = student.double().numpy(), teacher.double().numpy()
    assert result["rmse"] == pytest.approx(np.sqrt(((s - t) ** 2).mean()), rel=1e-9)
    rmsle = np.sqrt(((np.log1p(s) - np.log1p(t)) ** 2).mean())
    assert result["rmsle"] == pytest.approx(rmsle, rel=1e-9)
    assert result["pearson"] == pytest.approx(np.corrcoef(s, t)[0, 1], abs=1e-9)
    spearman = np.corrcoef(midranks(s), midranks(t))[0, 1]
    assert result["spearman"] == pytest.approx(spearman, abs=0.005)


def test_pearson_survives_a_small_spread():
    generator = torch.Generator().manual_seed(12)
    teacher = 0.4 + 1e-4 * torch.randn(10000, generator=generator, dtype=torch.float64)
    student = teacher + 1e-4 * torch.randn(10000, generator=generator, dtype=torch.float64)
    accumulator = Fidelity()
    accumulator.update(student, teacher)
    expected = np.corrcoef(student.numpy(), teacher.numpy())[0, 1]
    assert accumulator.compute()["pearson"] == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------ by hand


def test_confusion_by_hand():
    accumulator = ConfusionMatrix(3)
    prediction = torch.tensor([[0, 0, 1, 1, 1, 0, 2]])
    labels = torch.tensor([[0, 0, 0, 1, 1, 255, 254]])
    accumulator.update(prediction, labels)
    result = accumulator.compute()
    assert result["iou"][:2] == pytest.approx([2 / 3, 2 / 3]) and math.isnan(result["iou"][2])
    assert result["miou"] == pytest.approx(2 / 3)
    assert result["pixel_accuracy"] == pytest.approx(4 / 5)
    assert result["mean_class_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["n"] == 5


def test_confusion_all_right_all_wrong_one_class():
    for prediction, labels, expected in (
        ([0, 1], [0, 1], (1.0, 1.0, 1.0)),
        ([1, 0], [0, 1], (0.0, 0.0, 0.0)),
        ([0, 0], [0, 0], (1.0, 1.0, 1.0)),
        ([1, 1], [0, 0], (0.0, 0.0, 0.0)),  # class 1 predicted but not labelled: no class accuracy
    ):
        accumulator = ConfusionMatrix(2)
        accumulator.update(torch.tensor(prediction), torch.tensor(labels))
        r = accumulator.compute()
        assert (r["miou"], r["pixel_accuracy"], r["mean_class_accuracy"]) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_void_labels_of_any_integer_type(dtype):
    values = [0, 1, 2, 254, 255] + ([] if dtype == torch.uint8 else [-1, -100, 256, 1000])
    labels = torch.tensor(values, dtype=dtype)
    accumulator = ConfusionMatrix(2)
    accumulator.update(torch.zeros(len(values), dtype=dtype), labels)
    assert accumulator.compute()["n"] == 2
    assert accumulator.compute()["iou"] == [0.5, 0.0]


def test_predictions_that_are_no_class_raise():
    for bad in (2, 255, -1):
        accumulator = ConfusionMatrix(2)
        accumulator.update(torch.tensor([0, bad, bad]), torch.tensor([0, 1, 255]))
        with pytest.raises(ValueError, match="1 predictions outside 0..1"):
            accumulator.compute()


def test_proper_scores_by_hand():
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.2, 0.8]])  # [B, C], no H and W
    accumulator = ProperScores()
    accumulator.update(probs, torch.tensor([0, 0, 0, 255]))
    result = accumulator.compute()
    assert result["nll"] == pytest.approx((math.log(2) + 0 + 126 * math.log(2)) / 3)  # 2^-126
    assert result["brier"] == pytest.approx((0.5 + 0 + 2) / 3)
    assert result["n"] == 3


def test_calibration_by_hand():
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.0, 1.0], [0.0, 1.0]])
    accumulator = CalibrationError(bins=2)
    accumulator.update(probs, torch.tensor([0, 0, 1, 0, 255]))
    result = accumulator.compute()  # all four in (0.5, 1]
    assert result["bins"]["count"] == [0, 4] and result["bins"]["lower"] == [0.0, 0.5]
    assert result["bins"]["accuracy"][1] == 0.5
    assert result["bins"]["confidence"][1] == pytest.approx(3.25 / 4)
    assert math.isnan(result["bins"]["accuracy"][0])
    assert result["ece"] == result["mce"] == pytest.approx(3.25 / 4 - 0.5)
    accumulator = CalibrationError(bins=4)
    accumulator.update(probs, torch.tensor([0, 0, 1, 0, 255]))
    result = accumulator.compute()  # 0.75 belongs to (0.5, 0.75]
    assert result["bins"]["count"] == [0, 0, 3, 1]
    assert result["ece"] == pytest.approx((3 * (0.75 - 2 / 3) + 1) / 4)
    assert result["mce"] == 1.0


def test_detection_by_hand():
    def detect(scores, positives):
        accumulator = Detection()
        accumulator.update(torch.tensor(scores), torch.tensor(positives))
        r = accumulator.compute()
        return r["auroc"], r["ap"], r["fpr95"]

    assert detect([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == (1.0, 1.0, 0.0)
    assert detect([0.8, 0.9, 0.1, 0.2], [0, 0, 1, 1]) == pytest.approx((0, (1 / 3 + 2 / 4) / 2, 1))
    assert detect([0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1]) == (0.5, 0.25, 1.0)
    assert detect([0.1, 0.2, 0.3, 0.9], [0, 255, 1, 255]) == (1.0, 1.0, 0.0)  # 255 is void
    # 19 of 20 positives above every negative: TPR 0.95 is reached, not passed
    assert detect([1.0] * 19 + [0.5] * 4 + [0.0], [1] * 19 + [0] * 4 + [1])[2] == 0.0
    assert detect([1.0] * 18 + [0.5] * 4 + [0.0] * 2, [1] * 18 + [0] * 4 + [1] * 2)[2] == 1.0


def test_selective_prediction_by_hand():
    accumulator = SelectivePrediction()
    u = torch.tensor([0.0, 0.25, 0.5, 1.0, 9.0])
    accumulator.update(u, torch.tensor([1, 1, 0, 1, 255]))
    r = accumulator.compute()
    assert r["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert r["eaurc"] == pytest.approx(r["aurc"] - (0.25 + 0.75 * math.log(0.75)))
    assert (r["n"], r["error_rate"], r["median"]) == (4, 0.25, 0.25)
    assert (r["p_accurate_certain"], r["p_uncertain_inaccurate"], r["pavpu"]) == (1, 1, 0.75)
    assert r["risk_coverage"]["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert r["risk_coverage"]["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert r["sweep"]["t"][:3] == [0.0, 0.05, 0.1] and r["sweep"]["threshold"][10] == 0.5
    assert r["sweep"]["p_accurate_certain"][0] == 1.0
    assert r["sweep"]["p_accurate_certain"][10] == pytest.approx(2 / 3)
    assert r["sweep"]["p_uncertain_inaccurate"][9:11] == [1.0, 0.0]
    assert r["sweep"]["pavpu"][20] == 0.75


def test_selective_prediction_all_right_all_wrong_all_tied():
    def select(u, correct):
        accumulator = SelectivePrediction()
        accumulator.update(torch.tensor(u), torch.tensor(correct))
        return accumulator.compute()

    r = select([0.1, 0.2], [True, True])
    assert (r["aurc"], r["eaurc"]) == (0, 0) and math.isnan(r["ause"])
    assert math.isnan(r["p_uncertain_inaccurate"])
    r = select([0.1, 0.2], [False, False])
    assert (r["aurc"], r["eaurc"], r["ause"]) == (1, 0, 0)
    r = select([0.3] * 4, [True, True, True, False])
    assert r["aurc"] == pytest.approx(0.25)  # a tie has the overall error rate at every coverage
    assert len(set(r["sweep"]["threshold"])) == 1 and r["sweep"]["pavpu"] == [0.75] * 21


def test_rejection_by_hand():
    u = torch.arange(10) / 16
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    prediction = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 1])
    accumulator = RejectionCurve(3)
    accumulator.update(u, prediction, labels)
    r = accumulator.compute()
    assert r["rejection_classes"] == [3, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert r["rejection"][0] == pytest.approx((4 / 5 + 4 / 6 + 0) / 3)
    assert r["rejection"][1] == pytest.approx((4 / 5 + 4 / 5) / 2)
    assert r["rejection"][2:] == [1.0] * 8
    accumulator.reset()
    accumulator.update(torch.full((10,), 0.5), prediction, labels)
    r = accumulator.compute()  # all tied: ignoring pixels in proportion changes nothing
    assert r["rejection"] == pytest.approx([r["rejection"][0]] * 10)
    assert r["rejection_classes"] == [3] * 10


def test_class_uncertainty_by_hand():
    accumulator = ClassUncertainty(3)
    u = torch.tensor([0.0, 0.5, 0.25, 0.75, NAN])
    accumulator.update(u, torch.tensor([0, 0, 1, 1, 2]), torch.tensor([2, 2, 0, 255, 255]))
    r = accumulator.compute()
    assert r["uncertainty"][:2] == [0.25, 0.25] and math.isnan(r["uncertainty"][2])
    assert (r["munc"], r["n"]) == (0.25, 3)  # zeros count, a class never predicted does not


def test_fidelity_by_hand():
    accumulator = Fidelity()
    student, teacher = torch.tensor([0.0, 0.5, 1.0, 9.0]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    accumulator.update(student, teacher, torch.tensor([True, True, True, False]))
    r = accumulator.compute()
    assert r["rmse"] == pytest.approx(math.sqrt(1.25 / 3))
    assert r["rmsle"] == pytest.approx(math.sqrt((math.log(1.5) ** 2 + math.log(2) ** 2) / 3))
    assert r["pearson"] == pytest.approx(-math.sqrt(3) / 2)
    assert r["spearman"] == pytest.approx(-math.sqrt(3) / 2)
    assert r["n"] == 3
    for value in (0.0, 0.1, 0.3, 0.7, 1 / 3):  # sums of squares leave a variance of rounding errors
        pair = torch.full((10007,), value), torch.rand(10007)
        for student, teacher in (pair, pair[::-1]):
            accumulator.reset()
            accumulator.update(student, teacher)
            r = accumulator.compute()
            assert math.isnan(r["pearson"]) and math.isnan(r["spearman"]) and r["rmse"] > 0


def test_scores_by_hand():
    probs = torch.tensor([[[0.5], [0.25], [0.25]], [[1.0], [0.0], [0.0]]])  # [B, C, 1]
    expected = torch.tensor([[1.5 * math.log(2)], [0.0]])
    torch.testing.assert_close(metrics.predictive_entropy(probs), expected)
    torch.testing.assert_close(metrics.max_softmax(probs), torch.tensor([[0.5], [0.0]]))
    information = metrics.mutual_information(probs, torch.tensor([[math.log(2)], [0.1]]))
    torch.testing.assert_close(information, torch.tensor([[0.5 * math.log(2)], [0.0]]))
    logits = torch.tensor([[[1.0], [3.0]], [[0.0], [0.0]]])
    torch.testing.assert_close(metrics.max_logit(logits), torch.tensor([[-3.0], [0.0]]))
    expected = -torch.tensor([[3 + math.log1p(math.exp(-2))], [math.log(2)]])
    torch.testing.assert_close(metrics.energy(logits), expected)
    assert metrics.energy(logits.half()).dtype == torch.float32
    maps = torch.rand(2, 5, 4, 3).softmax(1)
    last = maps.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(metrics.predictive_entropy(last), metrics.predictive_entropy(maps))


# ------------------------------------------------------------------ the two tables of scores


def test_free_scores_are_those_of_the_table():
    logits = torch.randn(2, C, 4, 3, generator=torch.Generator().manual_seed(1))
    probs = logits.softmax(1)
    scores = metrics.free_scores(logits, probs)
    assert list(scores) == ["entropy", "msp", "max_logit", "energy"] == list(metrics.FREE_SCORES)
    assert torch.equal(scores["entropy"], metrics.predictive_entropy(probs))
    assert torch.equal(scores["msp"], metrics.max_softmax(probs))
    assert torch.equal(scores["max_logit"], metrics.max_logit(logits))
    assert torch.equal(scores["energy"], metrics.energy(logits))


def statistics_of(members):
    """A prediction as `ensemble_measures` takes it. members: their probs [M, B, C, H, W]."""
    probs = members.mean(0)
    predicted_class = probs.argmax(1, keepdim=True)
    std = members.std(0).gather(1, predicted_class).squeeze(1)
    entropies = [metrics.predictive_entropy(member) for member in members]
    expected_entropy = torch.stack(entropies).mean(0)
    return SimpleNamespace(probs=probs, std=std, expected_entropy=expected_entropy)


def test_ensemble_measures_are_those_of_the_table():
    generator = torch.Generator().manual_seed(2)
    prediction = statistics_of(torch.randn(3, 2, C, 4, 3, generator=generator).softmax(2))
    assert list(metrics.MEASURES) == ["std", "entropy", "mutual_information", "msp"]
    measures = metrics.ensemble_measures(prediction, ["msp", "std", "mutual_information"])
    assert list(measures) == ["msp", "std", "mutual_information"]
    assert measures["std"] is prediction.std
    assert torch.equal(measures["msp"], metrics.max_softmax(prediction.probs))
    information = metrics.mutual_information(prediction.probs, prediction.expected_entropy)
    assert torch.equal(measures["mutual_information"], information)
    entropy = metrics.ensemble_measures(prediction, ["entropy"])["entropy"]
    assert torch.equal(entropy, metrics.predictive_entropy(prediction.probs))


def test_what_a_student_learns_reaches_its_largest_value_and_no_more():
    certain = torch.eye(C)[
        :, None, :, None, None
    ]  # [M = C, 1, C, 1, 1], each sure of another class
    uniform = torch.full((2, 1, C, 1, 1), 1 / C)
    reached = {name: [] for name in metrics.MEASURES}
    for members in (certain, certain[:2], uniform):
        prediction = statistics_of(members)
        for name, values in metrics.ensemble_measures(prediction, metrics.MEASURES).items():
            reached[name].append(values.item() / metrics.MEASURES[name].scale(C))
    assert max(reached["std"]) == pytest.approx(metrics.MEASURES["std"].largest)
    assert max(reached["entropy"]) == pytest.approx(metrics.MEASURES["entropy"].largest)
    information = metrics.MEASURES["mutual_information"]
    assert max(reached["mutual_information"]) == pytest.approx(information.largest)
    assert max(reached["msp"]) == pytest.approx(1 - 1 / C)  # below its largest, for many classes
    assert information.scale(C) == metrics.MEASURES["entropy"].scale(C) == math.log(C)
    assert metrics.MEASURES["std"].scale(C) == metrics.MEASURES["msp"].scale(C) == 1.0
    needing = [name for name, measure in metrics.MEASURES.items() if measure.needs_expected_entropy]
    assert needing == ["mutual_information"]


def test_the_tests_that_docstrings_name_exist():
    folder = Path(__file__).parent
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", Path(metrics.__file__).read_text()))
    defined = set()
    for path in folder.glob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE))
    assert len(named) > 20 and named <= defined


# ------------------------------------------------------------------ float16's order


def test_buckets_are_in_the_order_of_all_float16_values():
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    bucket = metrics.float16_bucket(values)
    real = ~values.isnan()
    v, b = values[real].double().numpy(), bucket[real].numpy()
    np.testing.assert_array_equal(metrics.bucket_values()[b], v)
    order = np.argsort(b, kind="stable")
    assert (np.diff(v[order]) >= 0).all()
    assert len(set(b.tolist())) == len(b) - 1  # the two zeros are one score
    nan = bucket[~real]
    assert ((nan < metrics.LOWEST_BUCKET) | (nan > metrics.HIGHEST_BUCKET)).all()
    assert nan.min() >= 0 and nan.max() < 65536
    assert np.isnan(metrics.bucket_values()[nan.numpy()]).all()


@pytest.mark.parametrize("name", ["detection", "selective", "rejection", "class", "fidelity"])
def test_nan_scores_raise_with_their_number_but_not_where_void(name):
    batch = make_batch()
    clean = accumulate(name, batch).compute()
    void = (batch["labels"] >= C).nonzero()
    u = batch["uncertainty"].clone()
    u[tuple(void.T)] = NAN
    assert_close(accumulate(name, dict(batch, uncertainty=u)).compute(), clean, 1e-12)
    real = (batch["labels"] < C).nonzero()[:3]
    u[tuple(real.T)] = torch.tensor([NAN, -NAN, NAN])
    accumulator = accumulate(name, dict(batch, uncertainty=u))
    with pytest.raises(ValueError, match=r"^3 of \d+ scores are NaN"):
        accumulator.compute()


def test_thin_curve_keeps_ends_and_shape():
    x = np.linspace(0, 1, 5000) ** 4
    y = np.sqrt(x)
    chosen = metrics.thin_curve(x, y)
    assert len(chosen) <= 200 and chosen[0] == 0 and chosen[-1] == 4999
    assert (np.diff(chosen) > 0).all()
    assert np.abs(np.interp(x, x[chosen], y[chosen]) - y).max() < 0.01
    assert metrics.thin_curve(x[:7], y[:7]).tolist() == list(range(7))


# ------------------------------------------------------------------ promises of all accumulators


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_batch_size_and_order_change_nothing(name):
    batch = make_batch(6)
    whole = accumulate(name, batch)
    single = accumulate(name, *(select_images(batch, [i]) for i in (3, 0, 5, 1, 4, 2)))
    pairs = accumulate(name, select_images(batch, slice(4, 6)), select_images(batch, slice(0, 4)))
    for other in (single, pairs):
        for key, state in whole.state.items():
            if state.dtype == torch.int64:
                assert torch.equal(state, other.state[key])
            else:
                torch.testing.assert_close(state, other.state[key], rtol=1e-6, atol=1e-12)
        assert_close(other.compute(), whole.compute(), 1e-6)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_undefined_is_nan_and_a_result_is_plain(name):
    batch = make_batch()
    void = dict(batch, labels=torch.full_like(batch["labels"], 255))
    for result in (accumulate(name).compute(), accumulate(name, void).compute()):
        assert result.pop("n") == 0
        for key in ("positives", "bins", "sweep", "rejection_classes"):
            result.pop(key, None)
        assert all(math.isnan(x) for x in numbers_of(result))
    result = accumulate(name, batch).compute()
    assert {type(x) for x in numbers_of(result)} <= {int, float}
    json.dumps(result)
    assert result["n"] == int((batch["labels"] < C).sum())


def test_detection_without_positives_or_negatives_is_nan():
    for value in (True, False):
        accumulator = Detection()
        accumulator.update(torch.rand(50), torch.full((50,), value))
        r = accumulator.compute()
        assert all(math.isnan(r[key]) for key in ("auroc", "ap", "fpr95"))
        assert r["n"] == 50


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_void_pixels_never_count(name):
    batch = make_batch()
    void = batch["labels"] >= C
    other = {key: x.clone() for key, x in batch.items()}
    other["prediction"][void] = 2
    other["uncertainty"][void] = 123.0
    other["teacher"][void] = -0.5
    other["probs"].permute(0, 2, 3, 1)[void] = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1])
    assert_close(accumulate(name, other).compute(), accumulate(name, batch).compute(), 1e-12)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_any_shape_and_float_type(name):
    batch = make_batch()
    batch["probs"] = batch["probs"].half()
    batch["uncertainty"] = batch["uncertainty"].half()
    batch["teacher"] = batch["teacher"].half()
    expected = accumulate(name, batch).compute()
    wide = {k: x.double() if x.is_floating_point() else x.long() for k, x in batch.items()}
    assert_close(accumulate(name, wide).compute(), expected, 1e-6)
    flat = {k: x.flatten(1) if k != "probs" else x.flatten(2) for k, x in batch.items()}
    assert_close(accumulate(name, flat).compute(), expected, 1e-6)
    strided = {k: torch.stack([x, x], -1)[..., 0] for k, x in batch.items()}
    assert not strided["uncertainty"].is_contiguous()
    assert_close(accumulate(name, strided).compute(), expected, 1e-6)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_state_does_not_grow_and_reset_forgets(name):
    batch = make_batch()
    accumulator = accumulate(name)

    def storage():
        return {
            key: (state.shape, state.dtype, state.untyped_storage().nbytes())
            for key, state in accumulator.state.items()
        }

    before = storage()
    for _ in range(3):
        accumulator.update(*arguments_of(name, batch))
    after = storage()
    assert before == after
    tensors = {k for k, x in vars(accumulator).items() if isinstance(x, torch.Tensor | list)}
    assert not tensors
    accumulator.reset()
    accumulator.update(*arguments_of(name, batch))
    assert_close(accumulator.compute(), accumulate(name, batch).compute(), 0)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_update_never_waits_for_the_device(name):
    """A meta tensor has no values: whatever would bring one to the host raises."""
    batch = {key: x.to("meta") for key, x in make_batch().items()}
    accumulator = accumulate(name, batch, batch)
    assert all(x.device.type == "meta" for x in accumulator.state.values())


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_lanes_of_other_devices_count_the_same(name, monkeypatch):
    """The way that other devices count, run on the CPU."""
    batch = make_batch()
    expected = accumulate(name, batch).compute()
    monkeypatch.setattr(metrics, "_histogram_of", metrics._histogram_in_lanes)
    assert_close(accumulate(name, batch).compute(), expected, 1e-9)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_inference_mode_and_gradients(name):
    batch = make_batch()
    with torch.inference_mode():
        accumulator = accumulate(name, batch)
        accumulator.reset()
    accumulator.update(*arguments_of(name, batch))
    with torch.inference_mode():
        accumulator.update(*arguments_of(name, select_images(batch, slice(0, 1))))
    grad = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in batch.items()}
    accumulator.update(*arguments_of(name, grad))
    assert not any(x.requires_grad for x in accumulator.state.values())
    accumulator.compute()


def test_wrong_use_raises():
    with pytest.raises(ValueError, match="shapes differ.*prediction.*labels"):
        ConfusionMatrix(3).update(torch.zeros(2, 3).long(), torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match="integer labels"):
        ConfusionMatrix(3).update(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="254 classes"):
        ConfusionMatrix(255).update(torch.zeros(2).long(), torch.zeros(2).long())
    with pytest.raises(ValueError, match="shapes differ"):
        Detection().update(torch.rand(2, 1, 3), torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="shapes differ"):
        ProperScores().update(torch.rand(2, 4, 3, 3), torch.zeros(2, 3, 4).long())


def reduce_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name in ACCUMULATORS:
        # The shares are unequal, and process 1 sees a batch that process 0 does not.
        batch = make_batch(5)
        if rank == 0:
            mine = [select_images(batch, slice(0, 1))]
        else:
            mine = [select_images(batch, slice(1, 3)), select_images(batch, slice(3, 5))]
        accumulator = accumulate(name, *mine)
        accumulator.all_reduce()
        results[name] = accumulator.state
    empty = accumulate("detection")
    if rank == 1:  # process 0 sees no batch at all
        empty.update(*arguments_of("detection", make_batch()))
    empty.all_reduce()
    results["empty"] = empty.state
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    in_two_processes(reduce_process, str(tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    expected = {name: accumulate(name, make_batch(5)).state for name in ACCUMULATORS}
    expected["empty"] = accumulate("detection", make_batch()).state
    for name, states in expected.items():
        for key, state in states.items():
            for rank in (0, 1):
                if state.dtype == torch.int64:
                    assert torch.equal(both[rank][name][key], state)
                else:
                    torch.testing.assert_close(both[rank][name][key], state, rtol=1e-6, atol=1e-12)


def test_all_reduce_alone_does_nothing():
    accumulator = accumulate("confusion", make_batch())
    before = accumulator.state["matrix"].clone()
    accumulator.all_reduce()
    assert torch.equal(accumulator.state["matrix"], before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_cuda_equals_cpu_without_waiting(name):
    batch = make_batch()
    cuda = {key: x.cuda() for key, x in batch.items()}
    accumulator = accumulate(name, cuda)  # the first update makes the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulator.update(*arguments_of(name, cuda))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(accumulator.compute(), accumulate(name, batch, batch).compute(), 1e-6)


# ------------------------------------------------------------------ comparison


def scores_of_images(images, seed=0, height=20, width=30):
    """Two scores of some use and the positives [B, H, W], images of different difficulty."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, height, width)
    difficulty = torch.rand(images, 1, 1, generator=generator)
    positives = (torch.rand(shape, generator=generator) < 0.05 + 0.3 * difficulty).to(torch.uint8)
    positives[:, 0] = 255
    doubt = positives * (1 - difficulty) + torch.randn(shape, generator=generator)
    other = doubt + 0.5 * torch.randn(shape, generator=generator)
    return {"doubt": doubt.sigmoid(), "other": -10 + 2 * other}, positives


def in_cells(scores):
    """Scores as `PairedBootstrap` sees them: their cells as whole numbers that float16 has."""
    cells = metrics.float16_bucket(scores) >> PairedBootstrap.CELL_BITS
    return cells - PairedBootstrap.CELLS // 2  # from -2048 to 2047


def test_paired_bootstrap_equals_drawing_images():
    scores, positives = scores_of_images(12)
    bootstrap = PairedBootstrap(draws=40, seed=3)
    bootstrap.update(scores, positives)
    draws = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=40)
    draws = [np.ones(12, int), *draws]
    expected = {"auroc": {}, "aurc": {}}
    for name in scores:
        cells = in_cells(scores[name])
        for times in draws:
            chosen = np.repeat(np.arange(12), times)
            detection, selective = Detection(), SelectivePrediction()
            detection.update(cells[chosen], positives[chosen])
            selective.update(cells[chosen], 1 - positives[chosen].int(), positives[chosen] < 2)
            aurocs = expected["auroc"].setdefault(name, [])
            aurocs.append(detection.compute()["auroc"])
            expected["aurc"].setdefault(name, []).append(selective.compute()["aurc"])
        np.testing.assert_allclose(bootstrap.auroc(name), expected["auroc"][name], rtol=1e-9)
        np.testing.assert_allclose(bootstrap.aurc(name), expected["aurc"][name], rtol=1e-9)

    difference = np.subtract(expected["auroc"]["doubt"], expected["auroc"]["other"])
    low, high = bootstrap.interval(bootstrap.auroc("doubt") - bootstrap.auroc("other"))
    assert low == pytest.approx(np.percentile(difference[1:], 2.5))
    assert high == pytest.approx(np.percentile(difference[1:], 97.5))
    assert low < difference[0] < high


def test_paired_bootstrap_does_not_depend_on_the_batches():
    scores, positives = scores_of_images(8)
    whole = PairedBootstrap(draws=20)
    whole.update(scores, positives)
    parts = PairedBootstrap(draws=20)
    for part in (slice(0, 1), slice(1, 6), slice(6, 8)):
        batch = {name: values[part] for name, values in scores.items()}
        valid = positives[part] < 2
        parts.update(batch, positives[part] == 1, valid)
    assert whole.num_images() == parts.num_images() == 8
    for name in scores:
        np.testing.assert_array_equal(whole.auroc(name), parts.auroc(name))
        np.testing.assert_array_equal(whole.aurc(name), parts.aurc(name))


def test_coarse_cells_cost_little():
    scores, positives = scores_of_images(6, height=100, width=100)
    bootstrap = PairedBootstrap(draws=1)
    bootstrap.update(scores, positives)
    for name, values in scores.items():
        detection, selective = Detection(), SelectivePrediction()
        detection.update(values, positives)
        selective.update(values, 1 - positives.int(), positives < 2)
        assert bootstrap.auroc(name)[0] == pytest.approx(detection.compute()["auroc"], abs=5e-4)
        assert bootstrap.aurc(name)[0] == pytest.approx(selective.compute()["aurc"], abs=5e-4)
        for cells, _ in bootstrap.images[name]:
            assert 10 * len(cells) < 40000


def test_paired_bootstrap_of_nothing_is_nan():
    scores, positives = scores_of_images(8)
    for flags in (torch.zeros_like(positives), torch.full_like(positives, 255)):
        bootstrap = PairedBootstrap(draws=5)
        bootstrap.update(scores, flags)
        assert np.isnan(bootstrap.auroc("doubt")).all() and np.isnan(bootstrap.aurc("doubt")).all()
        assert np.isnan(bootstrap.interval(bootstrap.auroc("doubt"))).all()
    few = PairedBootstrap(draws=5)
    few.update({name: values[:4] for name, values in scores.items()}, positives[:4])
    assert few.auroc("doubt")[0] > 0.5 and np.isnan(few.interval(few.auroc("doubt"))).all()
    assert PairedBootstrap().num_images() == 0

    # A draw whose images have no positive is left out, and the others count.
    positives[1:] = torch.where(positives[1:] == 1, 0, positives[1:])
    rare = PairedBootstrap(draws=50)
    rare.update(scores, positives)
    aurocs = rare.auroc("doubt")
    assert np.isnan(aurocs).any() and not np.isnan(rare.interval(aurocs)).any()

    scores["doubt"][0, 5, 5] = NAN
    with pytest.raises(MetricError, match=r"^1 of \d+ scores are NaN"):
        PairedBootstrap().update(scores, positives)
