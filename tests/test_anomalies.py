"""OOD sets in their publishers' layouts, components against brute force, --ood end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import metrics
from data import OOD_LAYOUTS, VOID, DataError, open_dataset, open_ood

SIZE = (24, 32)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
# per set: an image, its mask, an image without a mask, a mask without an image, what lies beside
TREES = {
    "roadanomaly21": (
        "dataset_AnomalyTrack/images/validation0000.jpg",
        "dataset_AnomalyTrack/labels_masks/validation0000_labels_semantic.png",
        "dataset_AnomalyTrack/images/airplane0000.jpg",
        "dataset_AnomalyTrack/labels_masks/validation0001_labels_semantic.png",
        ["dataset_AnomalyTrack/labels_masks/validation0000_labels_semantic_color.png",
         "dataset_ObstacleTrack/images/validation_1.webp",
         "dataset_ObstacleTrack/labels_masks/validation_1_labels_semantic.png"]),
    "roadobstacle21": (
        "images/validation_1.webp", "labels_masks/validation_1_labels_semantic.png",
        "images/curvy-street_1.webp", "labels_masks/validation_2_labels_semantic.png",
        ["labels_masks/validation_1_labels_semantic_color.png"]),
    "roadanomaly": (
        "frames/animals01.jpg", "frames/animals01.labels/labels_semantic.png",
        "frames/animals02.jpg", "frames/animals03.labels/labels_semantic.png",
        ["frames/animals01.labels/labels_semantic_color.png", "frame_list.json"]),
    "fishyscapes-laf": (
        "laf/leftImg8bit/train/04_Maurener_Weg_8/04_Maurener_Weg_8_000000_000030_leftImg8bit.png",
        "fs_val/0000_04_Maurener_Weg_8_000000_000030_labels.png",
        "laf/leftImg8bit/test/02_Hanns/02_Hanns_000000_000010_leftImg8bit.png",
        "fs_val/0001_04_Maurener_Weg_8_000001_000030_labels.png", ["fs_val/README.txt"]),
    "fishyscapes-static": (
        "static/0003_frankfurt_000000_001016_rgb.npz",
        "static/0003_frankfurt_000000_001016_labels.png",
        "static/0004_frankfurt_000000_001016_rgb.npz", "static/0005_lindau_labels.png",
        ["gtFine/val/frankfurt/frankfurt_000000_001016_gtFine_labelIds.png"]),
    "lost-and-found": (
        "leftImg8bit/test/02_H/02_H_000000_000010_leftImg8bit.png",
        "gtCoarse/test/02_H/02_H_000000_000010_gtCoarse_labelIds.png",
        "leftImg8bit/test/02_H/02_H_000000_000020_leftImg8bit.png",
        "gtCoarse/test/03_K/02_H_000000_000020_gtCoarse_labelIds.png",
        ["gtCoarse/test/02_H/02_H_000000_000010_gtCoarse_color.png",
         "rightImg8bit/test/02_H/02_H_000000_000010_rightImg8bit.png",
         "leftImg8bit/train/01_H/01_H_000000_000010_leftImg8bit.png"]),
    "streethazards": (
        "test/images/test/t5/300.png", "test/annotations/test/t5/300.png",
        "test/images/test/t6/301.png", "test/annotations/test/t5/301.png",
        ["train/images/training/t1/300.png"]),
    "folder": ("original/a.b.jpeg", "labels/a.b.png", "original/b.png", "labels/a.png",
               ["labels/a.b_color.txt"]),
}  # fmt: skip
BASE = "leftImg8bit/val/frankfurt/frankfurt_000000_001016_leftImg8bit.png"  # of fishyscapes-static


def write(root, path, content):
    path = root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, rgb=content)
    elif path.suffix in (".txt", ".json"):
        path.write_text("[]")
    else:
        Image.fromarray(content).save(path)
    return path


def raw_mask(name):
    """Every value that a mask of the set may hold, and what it means."""
    values = OOD_LAYOUTS[name].values
    raw = RNG.choice(np.array(sorted(values), np.uint8), SIZE)
    raw.ravel()[: len(values)] = sorted(values)
    return raw, np.vectorize(values.get)(raw)


def write_set(root, name):
    """The tree of `name` with one whole pair: the image's pixels and the mask's labels."""
    image, mask, _, _, beside = TREES[name]
    raw, labels = raw_mask(name)
    pixels = IMAGE
    if name == "fishyscapes-static":
        pixels = RNG.integers(-300, 300, (*SIZE, 3)).astype(np.int16)
        write(root, BASE, IMAGE)
    write(root, image, pixels)
    write(root, mask, raw)
    for path in beside:
        write(root, path, IMAGE)
    return pixels, labels


@pytest.fixture
def split(folder):
    return open_dataset("folder", folder, "val", image_size=(12, 20))


def test_an_input_keeps_the_proportions_of_its_image():
    for size, wanted in (
        ((720, 1280), (180, 320)),
        ((90, 60), (180, 120)),
        ((1, 1), (180, 180)),
        ((1, 5000), (1, 960)),
        ((5000, 1), (180, 1)),
    ):
        assert data.proportional_size(Image.new("L", size[::-1]), (180, 240)) == wanted
    assert data.proportional_size(Image.new("L", (7, 5)), None) == (5, 7)


# ------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("name", OOD_LAYOUTS)
def test_layout(name, tmp_path, split):
    pixels, labels = write_set(tmp_path, name)
    ood = open_ood(str(tmp_path) if name == "folder" else f"{name}:{tmp_path}", split)
    assert len(ood.dataset) == 1 and ood.protocol["skipped"] == {}
    assert ood.name == (tmp_path.name if name == "folder" else name)
    obstacles = name in ("roadobstacle21", "lost-and-found")
    assert ood.smallest == ((50, 10) if obstacles else (500, 100))
    sample = ood.dataset[0]
    np.testing.assert_array_equal(sample.labels, labels)
    assert sample.image.shape == (3, 12, 16)  # the height of --image-size, proportions kept
    assert ood.dataset.names[0] == TREES[name][0].rpartition("/")[2].rpartition(".")[0]
    if name == "fishyscapes-static":
        sums = (IMAGE.astype(int) + pixels).clip(0, 255)
        np.testing.assert_array_equal(np.asarray(ood.dataset.read(0)[0]), sums)

    # what lacks its other half is skipped and counted, never scored as all normal
    write(tmp_path, TREES[name][2], pixels)
    write(tmp_path, TREES[name][3], raw_mask(name)[0])
    ood = open_ood(f"{name}:{tmp_path}", split)
    assert len(ood.dataset) == 1
    assert ood.protocol["skipped"] == {"images without a mask": 1, "masks without an image": 1}


def test_static_without_its_photographs(tmp_path, split):
    write_set(tmp_path, "fishyscapes-static")
    (tmp_path / BASE).rename(tmp_path / "other_leftImg8bit.png")
    with pytest.raises(DataError, match="no image with a mask"):
        open_ood(f"fishyscapes-static:{tmp_path}", split)
    write(tmp_path, BASE, IMAGE)
    for kind in ("rgb.npz", "labels.png"):
        write(tmp_path, f"static/0004_gone_{kind}", np.zeros(SIZE, np.uint8))
    ood = open_ood(f"fishyscapes-static:{tmp_path}", split)
    assert ood.protocol["skipped"] == {"images without their photograph": 1}


def test_images_and_masks_in_two_folders(tmp_path, split):
    write_set(tmp_path / "one", "fishyscapes-laf")
    (tmp_path / "one/fs_val").rename(tmp_path / "masks")
    spec = f"fishyscapes-laf:{tmp_path / 'masks'}:{tmp_path / 'one'}"
    assert len(open_ood(spec, split).dataset) == 1


def test_streethazards_stems_that_repeat(tmp_path, split):
    for town in ("t5", "t6"):
        write(tmp_path, f"test/images/test/{town}/1.png", IMAGE)
        write(tmp_path, f"test/annotations/test/{town}/1.png", np.ones(SIZE, np.uint8))
    dataset = open_ood(f"streethazards:{tmp_path}", split).dataset
    assert dataset.names == ["t5_1", "t6_1"]


@pytest.mark.parametrize("name", OOD_LAYOUTS)
def test_values_outside_the_table_are_refused(name, tmp_path, split):
    write_set(tmp_path, name)
    allowed = OOD_LAYOUTS[name].values
    for value in (VOID, 0, 2, 60):
        if value not in allowed:
            mask = np.full(SIZE, next(iter(allowed)), np.uint8)
            mask[3, 4] = value
            write(tmp_path, TREES[name][1], mask)
            with pytest.raises(DataError, match=f"holds {value}, no label of"):
                open_ood(f"{name}:{tmp_path}", split).dataset[0]


def test_every_bad_ood_set_is_one_line(tmp_path, split):
    def refused(spec, words):
        with pytest.raises(DataError, match=words) as error:
            open_ood(spec, split).dataset[0]
        assert "\n" not in str(error.value)

    refused("elsewhere", "no such set or folder")
    refused("roadanomaly", "no folder was named")
    refused(f"roadanomaly:{tmp_path}/gone", "no folder .*gone")
    refused(f"roadanomaly:{tmp_path}", r"no image with a mask; needs images as frames/\{id\}")
    refused(str(tmp_path), "no image with a mask")
    write(tmp_path, "images/a.png", IMAGE)
    refused(str(tmp_path), "no image with a mask")  # never scored as all normal
    write(tmp_path, "labels/a.png", np.zeros((9, 9), np.uint8))
    refused(str(tmp_path), "the mask .*a.png is 9x9, but .*a.png is 32x24")
    write(tmp_path, "labels/a.png", IMAGE)
    refused(str(tmp_path), "not one class number a pixel")
    (tmp_path / "labels/a.png").write_bytes(b"")
    refused(str(tmp_path), "cannot read the mask .*a.png")
    write(tmp_path, "original/a.png", IMAGE)
    refused(str(tmp_path), "are both the file of a among the images")
    write_set(tmp_path / "static", "fishyscapes-static")
    difference = tmp_path / "static" / TREES["fishyscapes-static"][0]
    write(tmp_path, difference, np.zeros((3, 3, 3)))
    refused(f"fishyscapes-static:{tmp_path / 'static'}", "cannot read the overlay")
    difference.write_bytes(b"no npz")
    refused(f"fishyscapes-static:{tmp_path / 'static'}", "cannot read the overlay")


def test_images_of_any_size_and_mode(tmp_path, split):
    grey = Image.fromarray(IMAGE[..., 0])
    images = {
        "grey.png": grey,
        "palette.png": Image.fromarray(IMAGE).quantize(),
        "odd.webp": grey,
        "alpha.png": Image.fromarray(IMAGE).convert("RGBA"),
        "print.jpg": Image.fromarray(IMAGE).convert("CMYK"),
        "point.bmp": grey.crop((0, 0, 1, 1)),
    }
    for name, image in images.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / name)
        write(tmp_path, f"labels/{name[:-4].rstrip('.')}.png", np.zeros(image.size[::-1], np.uint8))
    turned = Image.fromarray(IMAGE)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "images/turned.jpg", exif=exif)
    write(tmp_path, "labels/turned.png", np.zeros(SIZE[::-1], np.uint8))
    dataset = open_ood(str(tmp_path), split).dataset
    assert len(dataset) == 7
    for image, labels, index in (dataset[i] for i in range(7)):
        height, width = labels.shape
        assert image.shape == (3, 12, max(1, round(12 * width / height))), dataset.names[index]


# ------------------------------------------------------------------------------ components


def flood(mask):
    """8-connected components by flooding, in raster order."""
    labels, number = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        number, stack = number + 1, [start]
        while stack:
            y, x = stack.pop()
            inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if inside and mask[y, x] and not labels[y, x]:
                labels[y, x] = number
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels


def spiral(size):
    """One line that winds inwards: the longest way through a picture."""
    mask = np.zeros((size, size), bool)
    for ring in range(0, size // 2, 2):
        far = size - 1 - ring
        mask[ring, max(0, ring - 1) : far + 1] = mask[ring : far + 1, far] = True
        mask[far, ring : far + 1] = mask[ring + 2 : far + 1, ring] = True
    return mask


def painted(components, shape):
    """The number of the component at each pixel, from 1, and 0 outside: int [H, W]."""
    line = np.zeros(shape[0] * (shape[1] + 1), int)
    runs = zip(components.starts, components.ends, components.number, strict=True)
    for start, end, number in runs:
        line[start:end] = number + 1
    frame = line.reshape(shape[0], shape[1] + 1)
    assert not frame[:, -1].any()  # the gap between the rows
    return frame[:, :-1]


def test_components_equal_flooding():
    rng = np.random.default_rng(0)
    masks = [spiral(41), ~spiral(41), np.ones((3, 1), bool), np.zeros((1, 3), bool)]
    for _ in range(200):
        masks.append(rng.random(rng.integers(1, 30, 2)) < rng.random())
    for mask in masks:
        components = metrics.connected_components(mask)
        expected = flood(mask)
        np.testing.assert_array_equal(painted(components, mask.shape), expected)
        np.testing.assert_array_equal(components.sizes, np.bincount(expected.ravel())[1:])


def brute_components(predictions, masks, smallest):
    """The definition, set by set of pixels."""
    siou, ppv = [], []
    for prediction, mask in zip(predictions, masks, strict=True):

        def parts(binary):
            labels = flood(binary)
            return [set(np.flatnonzero(labels == k)) for k in range(1, labels.max() + 1)]

        known = (mask == 0) | (mask == 1)
        truth, found = parts(mask == 1), parts(prediction & known)
        void = set(np.flatnonzero(~known)).union(*(k for k in truth if len(k) < smallest[1]))
        found = [p - void for p in found if len(p) >= smallest[0]]
        found, truth = [p for p in found if p], [k for k in truth if len(k) >= smallest[1]]
        every = set().union(*truth)
        for k in truth:
            union = set().union(*(p for p in found if p & k))
            siou.append(len(k & union) / (len(k | union) - len(union & (every - k))))
        ppv += [len(p & every) / len(p) for p in found]
    tau = [t / 100 for t in range(25, 80, 5)]
    f1 = []
    for t in tau:
        tp, fn = sum(s >= t for s in siou), sum(s < t for s in siou)
        fp = sum(p < t for p in ppv)
        f1.append(2 * tp / (2 * tp + fn + fp) if tp + fn + fp else np.nan)
    mean = lambda x: np.mean(x) if len(x) else np.nan  # noqa: E731
    return {
        "siou": mean(siou),
        "ppv": mean(ppv),
        "component_f1": mean(f1),
        "true_components": len(siou),
        "predicted_components": len(ppv),
    }


def blobs(rng, share):
    noise = Image.fromarray(rng.random((9, 11)).astype(np.float32)).resize((44, 36))
    return np.asarray(noise) > 1 - share


@pytest.mark.parametrize("smallest", [(1, 1), (12, 5), (60, 40)])
def test_component_metrics_equal_brute_force(smallest):
    rng = np.random.default_rng(1)
    for _ in range(12):
        masks = [np.where(blobs(rng, 0.2), VOID, blobs(rng, 0.4)).astype(np.uint8) for _ in "abc"]
        predictions = [blobs(rng, rng.random()) for _ in "abc"]
        whole = metrics.ComponentDetection(*smallest)
        whole.update(*(torch.from_numpy(np.stack(x)) for x in (predictions, masks)))
        single = metrics.ComponentDetection(*smallest)
        for pair in zip(predictions, masks, strict=True):
            single.update(*(torch.from_numpy(x)[None] for x in pair))
        expected = brute_components(predictions, masks, smallest)
        signed = torch.from_numpy(np.stack(masks)).short()
        signed[signed == VOID] = -1  # void is anything but 0 and 1
        negative_void = metrics.ComponentDetection(*smallest)
        negative_void.update(torch.from_numpy(np.stack(predictions)), signed)
        for result in (whole.compute(), single.compute(), negative_void.compute()):
            assert result == pytest.approx(expected, nan_ok=True, abs=1e-12)


def test_component_metrics_by_hand():
    mask, prediction = np.zeros((2, 20, 20), np.uint8), np.zeros((2, 20, 20), bool)
    mask[0, :4, :4] = mask[0, :4, 10:14] = 1  # two objects of 16 pixels
    prediction[0, :4, :12] = True  # one that covers the first and half of the second
    prediction[0, 10:14, :4] = True  # and a false one
    prediction[0, 18, 18] = True  # too small
    found = metrics.ComponentDetection(2, 2)
    found.update(torch.from_numpy(prediction), torch.from_numpy(mask))
    # 16 / (48 - 8) for the first, 8 / (56 - 16) for the second; PPV 24/48 and 0
    f1 = np.mean([2 / (2 + 1 + 1) if t <= 0.4 else 0 for t in np.arange(5, 16) / 20])
    assert found.compute() == pytest.approx(
        {
            "siou": (16 / 40 + 8 / 40) / 2,
            "ppv": 0.25,
            "component_f1": f1,
            "true_components": 2,
            "predicted_components": 2,
        }
    )


def test_no_component_is_nan():
    nothing = torch.zeros(1, 8, 8)
    empty = metrics.ComponentDetection(1, 1)
    empty.update(nothing.bool(), nothing.byte())
    result = empty.compute()
    assert all(np.isnan(result[key]) for key in ("siou", "ppv", "component_f1"))
    assert result["true_components"] == result["predicted_components"] == 0


def test_a_fault_in_a_thread_is_raised(monkeypatch):
    def fail(*arguments):
        raise ValueError("a fault")

    monkeypatch.setattr(metrics.ComponentDetection, "update", fail)
    batch = (torch.zeros(1, 8, 8, dtype=torch.uint8), {"student/msp": torch.rand(1, 8, 8)})
    with pytest.raises(ValueError, match="a fault"):
        evaluate.component_results([batch], {"student/msp": 0.5}, data.ComponentSizes(1, 1))


def test_best_f1_equals_brute_force():
    rng = np.random.default_rng(2)
    for _ in range(20):
        scores, flags = rng.integers(0, 6, 40) / 4, rng.random(40) < 0.3
        detection = metrics.Detection()
        detection.update(torch.from_numpy(scores), torch.from_numpy(flags))
        best = (-1.0, 0.0)
        for t in np.unique(scores):
            said = scores >= t
            f1 = 2 * (said & flags).sum() / (said.sum() + flags.sum())
            best = max(best, (f1, t))
        assert list(detection.best_f1().values()) == pytest.approx(best)
    negative = metrics.Detection()
    negative.update(torch.rand(9), torch.zeros(9, dtype=torch.bool))
    assert np.isnan(list(negative.best_f1().values())).all()


def test_auroc_of_lists():
    assert metrics.pairs_auroc([2, 3, 3], [1, 3]) == pytest.approx((1 + 1 + 1 + 0 + 0.5 + 0.5) / 6)
    assert np.isnan(metrics.pairs_auroc([], [1])) and np.isnan(metrics.pairs_auroc([1], []))


# ------------------------------------------------------------------------------ end to end


def write_anomalies(root, count=3, positive=True):
    rng = np.random.default_rng(3)
    for number in range(count):
        size = (40 + 8 * number, 56)
        mask = np.zeros(size, np.uint8)
        mask[2] = VOID
        if positive and number:  # the first has none
            mask[10:30, 8:40] = 1
        write(root, f"images/{number}.png", rng.integers(0, 256, (*size, 3)).astype(np.uint8))
        write(root, f"labels/{number}.png", mask)
    return root


@pytest.mark.parametrize("waiting", [2**30, 100_000, 0])  # bytes: all scores, some, none
def test_every_figure_equals_that_of_the_saved_maps(
    trained, command, tmp_path, monkeypatch, waiting
):
    folder, ckpts = trained
    monkeypatch.setattr(evaluate, "MAX_WAITING_BYTES", waiting)
    odd, flat = write_anomalies(tmp_path / "odd"), write_anomalies(tmp_path / "flat", 2, False)
    flags = ["--student", ckpts / "student.pt", "--teacher", ckpts, "--device", "cpu"]
    flags += ["--ood", odd, "pasted", flat, "--in-distribution", folder / "images/val"]
    flags += ["--out", tmp_path / "r", "--save-scores", tmp_path / "s", "--panels", 1]
    code, out, err = command("evaluate", *flags)
    assert code == 0 and "warning: the OOD set flat has no anomalous pixel" in err
    results = json.loads((tmp_path / "r/metrics.json").read_text())
    assert set(results["ood"]) == set(results["protocol"]["ood"]) == {"odd", "pasted", "flat"}
    masks = [np.asarray(Image.open(odd / f"labels/{i}.png")) for i in range(3)]
    labels = np.concatenate([mask.ravel() for mask in masks])
    for key, figures in results["ood"]["odd"].items():
        maps = [np.load(tmp_path / "s/odd" / key.replace("/", "-") / f"{i}.npy") for i in range(3)]
        scores = np.concatenate([values.ravel() for values in maps])[labels != VOID].astype(float)
        flags = labels[labels != VOID] == 1
        order = np.argsort(-scores, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
        tp, all_ = np.cumsum(flags[order])[ends], ends + 1
        tpr, fpr = tp / flags.sum(), (all_ - tp) / (~flags).sum()
        assert figures["ap"] == pytest.approx((np.diff(tpr, prepend=0) * tp / all_).sum(), abs=1e-9)
        steps, heights = np.diff(fpr, prepend=0), tpr - np.diff(tpr, prepend=0) / 2
        assert figures["auroc"] == pytest.approx((steps * heights).sum(), abs=1e-9)
        assert figures["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-9)
        best = np.argmax(2 * tp / (all_ + flags.sum()))
        assert figures["f1_threshold"] == scores[order][ends][best]
        expected = brute_components([m > figures["f1_threshold"] for m in maps], masks, (500, 100))
        for name, value in expected.items():
            value = None if np.isnan(value) else pytest.approx(value, abs=1e-9)
            assert figures[name] == value, (key, name)
        assert 0 <= figures["image_auroc_mean"] <= 1 and 0 <= figures["image_auroc_p99"] <= 1
    for figures in results["ood"]["flat"].values():
        assert figures["auroc"] is figures["ap"] is figures["fpr95"] is figures["f1"] is None
        assert figures["image_auroc_mean"] is None
    protocol = results["protocol"]["ood"]["odd"]
    assert protocol["pixels"] == (labels != VOID).sum() and protocol["images"] == 3
    assert protocol["anomalous_images"] == 2 and protocol["normal_images"] == 1 + 3
    assert protocol["network_input"] == "40x56, 48x56, 56x56" and protocol["scores"] == "float16"
    assert f"{protocol['pixels']:,} pixels" in out and "float16" in out


def test_image_level_auroc_of_images_that_are_told_apart():
    pairs = [(0.9, 5.0), (0.2, 1.0), (0.8, 0.1)]
    statistics = [evaluate.ImageStatistics(mean, p99) for mean, p99 in pairs]
    in_distribution = [evaluate.ImageStatistics(0.5, 3.0)]
    result = evaluate.image_level(statistics, [True, False, True], in_distribution)
    assert result == {"image_auroc_mean": 1.0, "image_auroc_p99": 0.5}
    outputs = {"student": evaluate.Output(None, {"dudes": torch.arange(200.0).view(1, 10, 20)})}
    ((key, statistics),) = evaluate.image_statistics(outputs).items()
    assert key == "student/dudes" and statistics == [(99.5, 197.0)]  # the 198th of 200


def test_held_out_classes_and_their_protocol(trained_without_a_class, tmp_path, command):
    root, ckpts = trained_without_a_class
    flags = ["--teacher", ckpts, "--device", "cpu", "--panels", 0, "--out", tmp_path / "r"]
    code, out, _ = command("evaluate", *flags, "--ood", "held-out", "pasted")
    assert code == 0 and "void: that of the evaluation split" in out
    results = json.loads((tmp_path / "r/metrics.json").read_text())
    whole = open_dataset("folder", root, "val")
    labels = np.stack([whole[i].labels.numpy() for i in range(3)])
    protocol = results["protocol"]["ood"]
    assert protocol["held-out"]["anomalous_pixels"] == (labels == 1).sum()
    assert protocol["held-out"]["pixels"] == (labels != VOID).sum()
    # images that show a held-out class are no in-distribution images
    assert protocol["held-out"]["normal_images"] == protocol["pasted"]["normal_images"] == 0
    assert "siou" in results["ood"]["held-out"]["teacher/std"]


def test_sets_of_one_name_are_refused(trained, command, tmp_path):
    ckpts = trained[1]
    for place in ("a", "b"):
        write_anomalies(tmp_path / place / "odd")
    flags = ["--student", ckpts / "student.pt", "--device", "cpu", "--out", tmp_path / "r"]
    for more, words in (
        (["--ood", tmp_path / "a/odd", tmp_path / "b/odd"], "2 sets odd"),
        (["--ood", "--in-distribution", tmp_path / "none"], "no image"),
    ):
        code, _, err = command("evaluate", *flags, *more)
        assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "r").exists()


def test_data_ood_of_synthetic_scenes():
    ood = open_ood("synthetic", data.SyntheticScenes("val"))
    assert ood.smallest == (50, 10) and len(ood.dataset) == 48
