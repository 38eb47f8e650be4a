"""--predict on one's own images, thresholds that reject pixels, and how the report shows both."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scene
from PIL import Image

import data
import evaluate
import metrics
from data import open_dataset
from model import UsageError, load_model

CPU = torch.device("cpu")
INFERENCE = evaluate.InferenceSettings(CPU, "off")


# ------------------------------------------------------------------ thresholds


def brute_force_point(scores, correct, reject):
    """The operating point of float16 scores, tried threshold by threshold."""
    chosen = None
    for threshold in np.unique(scores)[::-1]:  # from the highest down
        rejected = scores > threshold
        if rejected.mean() > reject + 1e-9:
            break
        chosen = (threshold, rejected)
    threshold, rejected = chosen
    wrong = ~correct
    return {
        "reject": reject,
        "rejected": rejected.mean(),
        "threshold": float(threshold),
        "errors_caught": wrong[rejected].sum() / wrong.sum(),
        "accuracy_kept": correct[~rejected].mean(),
    }


@pytest.mark.parametrize("ties", [0, 7])  # distinct scores, few values
def test_operating_points_equal_brute_force(ties):
    rng = np.random.default_rng(ties)
    scores = rng.random((3, 11, 13)).astype(np.float32) ** 3
    if ties:
        scores = np.round(scores * ties) / ties
    correct = rng.random(scores.shape) > scores
    valid = rng.random(scores.shape) > 0.2
    selective = metrics.SelectivePrediction()
    for k in range(3):  # in batches
        batch = (torch.from_numpy(values[k]) for values in (scores, correct, valid))
        selective.update(*batch)
    points = selective.operating_points()
    assert [point["reject"] for point in points] == [0.05, 0.1, 0.2]
    for point in points:
        rounded = scores[valid].astype(np.float16)
        expected = brute_force_point(rounded, correct[valid], point["reject"])
        assert point == pytest.approx(expected)


def test_operating_points_by_hand():
    def points_of(scores, correct):
        selective = metrics.SelectivePrediction()
        selective.update(torch.tensor(scores), torch.tensor(correct))
        return selective.operating_points()

    # 20 pixels: 5 % is one of them, 10 % two, 20 % four; the wrong ones are the 1st and 3rd
    scores = [k / 32 for k in range(20)]
    correct = [k not in (19, 17) for k in range(20)]
    five, ten, twenty = points_of(scores, correct)
    assert five == pytest.approx(
        dict(
            reject=0.05, rejected=0.05, threshold=18 / 32, errors_caught=0.5, accuracy_kept=18 / 19
        )
    )
    assert (ten["rejected"], ten["errors_caught"], ten["threshold"]) == (0.1, 0.5, 17 / 32)
    assert (twenty["rejected"], twenty["errors_caught"], twenty["accuracy_kept"]) == (0.2, 1, 1)
    # 15 % share the highest score: they stay together, so that 5 and 10 % reject nothing
    tied = [k / 32 for k in range(17)] + [1.0, 1.0, 1.0]
    five, ten, twenty = points_of(tied, correct)
    assert (ten["rejected"], ten["errors_caught"], ten["threshold"]) == (0, 0, 1)
    assert twenty["rejected"] == pytest.approx(0.2) and twenty["threshold"] == 15 / 32
    # as float16, 1 and 1.0001 are one score
    assert points_of([0.0] * 18 + [1.0, 1.0001], [True] * 20)[0]["rejected"] == 0
    # without an error and without a pixel
    point = points_of(scores, [True] * 20)[1]
    assert np.isnan(point["errors_caught"]) and point["accuracy_kept"] == 1
    point = metrics.SelectivePrediction().operating_points()[0]
    assert point.pop("reject") == 0.05 and np.isnan(list(point.values())).all()


def test_the_recommended_score_is_the_one_with_the_lowest_aurc():
    def recommended(**aurc):
        uncertainty = {f"student/{name}": {"aurc": value} for name, value in aurc.items()}
        uncertainty["teacher/std"] = {"aurc": 0.0}
        return evaluate.recommended_score("student", uncertainty)

    assert recommended(dudes=0.3, entropy=0.1, msp=0.2)["score"] == "entropy"
    assert "0.100, of its 3 scores" in recommended(dudes=0.3, entropy=0.1, msp=0.2)["reason"]
    assert recommended(dudes=0.0, entropy=0.0, msp=0.0)["score"] == "msp"  # nothing is wrong
    nan = float("nan")
    assert recommended(dudes=nan, msp=nan)["score"] == "msp"


# ------------------------------------------------------------------ the report


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """(metrics.json, report.html, results folder, folder of score maps) of student and teacher."""
    root = tmp_path_factory.mktemp("evaluated")
    flags = ["--student", trained[1] / "student.pt", "--teacher", trained[1], "--device", "cpu"]
    flags += ["--amp", "off", "--panels", 1, "--ood", "pasted", "--out", root / "r"]
    flags += ["--save-scores", root / "s"]
    words = [str(flag) for flag in flags]
    assert evaluate.run_main(evaluate.main, evaluate.get_args_parser(), words) == 0
    results = json.loads((root / "r/metrics.json").read_text())
    return results, (root / "r/report.html").read_text(), root / "r", root / "s"


def test_operating_points_of_metrics_json_are_those_of_the_saved_maps(trained, evaluated):
    results, page, folder, maps = evaluated
    dataset = open_dataset("folder", trained[0], "val")
    student = load_model(trained[1] / "student.pt").to(memory_format=torch.channels_last)
    correct, valid = [], []
    for image, labels, _ in dataset:
        with torch.inference_mode():
            correct.append((student(image[None]).logits[0].argmax(0) == labels).numpy())
        valid.append((labels < 254).numpy())
    correct, valid = np.stack(correct), np.stack(valid)
    scores = {key.split("/")[1] for key in results["uncertainty"] if key.startswith("student/")}
    assert set(results["operating_points"]) == scores
    for score in ("msp", "dudes", "energy"):
        files = [maps / "val" / f"student-{score}" / f"{name}.npy" for name in dataset.names]
        values = np.stack([np.load(file) for file in files])
        for point in results["operating_points"][score]:
            expected = brute_force_point(values[valid], correct[valid], point["reject"])
            assert point == pytest.approx(expected, abs=1e-3)
    matrix = np.array(results["confusion"]["student"])
    accuracy = results["segmentation"]["student"]["pixel_accuracy"]
    assert matrix.sum() == valid.sum() and np.trace(matrix) / matrix.sum() == accuracy

    # the report names the score, says what 10 % means and shows it
    recommended = results["recommended"]
    assert recommended["network"] == "student" and recommended["score"] in scores
    point = results["operating_points"][recommended["score"]][1]
    assert evaluate.operating_sentence(point) in page and "Reject 10 %: " in page
    heading = f"Reject by {recommended['score'].replace('_', ' ')}"
    assert f"<h2>{heading}</h2>" in page and f"\n{heading} " in evaluate.results_table(results)
    assert Image.open(folder / "reject.png").width > 700


def test_the_page_has_a_lead_training_curves_and_the_confusion_matrix(trained, evaluated):
    results, page, _, _ = evaluated
    name = trained[0].name  # of the folder
    assert results["protocol"]["data"] == name and f"<h1>Uncertainty report: {name}</h1>" in page
    assert "The charts draw dudes, std, entropy and error alone." in page
    assert "void: that of the evaluation split;" in page
    for term in ("mIoU", "ECE", "AUROC", "FPR95", "AURC", "AUSE", "comp. F1", "image AUROC"):
        assert f" {term}: " in page, term  # a page alone says what its figures are
    sentences = re.findall(r'<p class="lead">(.*?)</p>', page)
    assert len(sentences) == 3
    assert sentences[0].startswith(f"The student segments the 3 images of {name} val with an mIoU")
    assert "undecided on these images" in sentences[1]  # three images decide nothing
    assert sentences[2].startswith("Unknown objects are found best by ")
    of_head = "Training loss of the uncertainty head"  # another loss, so a chart of its own
    for title in ("Training loss", "Validation mIoU", of_head, "Confusion matrix"):
        assert f"<title>{title}</title>" in page
    for name in ("member_01", "student"):  # in both legends of the training
        assert page.count(f">{name}</text>") == 2, name
    assert page.count(">student-head</text>") == 1
    # each network has a row of its own above those of its scores, the best of which is bold
    assert page.count('<tr class="network"><th>student') == 3  # errors, anomalies, comparison
    assert page.count('<td class="best">') > 20
    # what is wider than a narrow screen scrolls, and says so
    assert page.count("<table") == page.count('<div class="scroll"><table')
    assert page.count("<img") == page.count('<div class="scroll"><img') == 3


def test_the_lead_says_whether_learning_a_score_paid(evaluated):
    results = json.loads(json.dumps(evaluated[0]))
    gains = results["comparison"]["errors"]["aurc"]["scores"]
    for verdict, words in (
        ("yes", "; learning it paid: "),
        ("no", "; learning a score did not pay: "),
    ):
        for gain in gains.values():
            gain["worth_more"] = verdict
        assert words in evaluate.lead(results)[1]
    results["comparison"] = {}
    results["ood"] = {}
    results["timing"] = {"student": {"ms_per_image": 1.0}, "teacher": {"ms_per_image": 8.0}}
    lead = evaluate.lead(results)
    assert "12.5\u00a0% of the teacher’s time" in lead[0]
    assert "paid" not in lead[1] and "--ood" in lead[2]


@pytest.mark.parametrize("images, few", [(19, True), (20, False)])
def test_the_lead_names_classes_that_are_never_found_and_few_images(evaluated, images, few):
    results = json.loads(json.dumps(evaluated[0]))
    results["protocol"]["images"] = images
    names = [row["name"] for row in results["classes"]]
    confusion = [[0] * len(names) for _ in names]
    for number in (0, 1, 2):  # all taken for the first; the others are not there
        confusion[number][0] = 1
    results["confusion"] = {"teacher": confusion}
    results["recommended"]["network"] = "teacher"
    text = evaluate.lead(results)[0]
    assert f". The teacher finds no pixel of {names[1]}, {names[2]}." in text
    assert (f"So few images as {images} decide little." in text) == few
    confusion[1][1] = confusion[2][2] = 1
    assert "no pixel" not in evaluate.lead(results)[0]


def test_a_damaged_log_costs_its_curves_alone(tmp_path, capsys):
    for content in ("{no json", '{"loss": 1.0}', "[1]"):
        (tmp_path / "student.jsonl").write_text(content)
        assert evaluate.training_logs([tmp_path / "student.pt", tmp_path / "gone.pt"]) == {}
        err = capsys.readouterr().err
        assert err.startswith("warning: ") and "student.jsonl" in err and err.count("\n") == 1
    line = '{"epoch": 1, "loss": 1.0}'
    (tmp_path / "student-head.jsonl").write_text(line)  # of a head that learned alone
    logs = evaluate.training_logs([tmp_path / "student.pt"])
    assert logs == {"student-head": [json.loads(line)]}


def test_learning_curves_pass_over_epochs_without_validation():
    entries = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "miou": 0.5}]
    entries.append({"epoch": 3, "loss": 0.5, "miou": None})
    loss, miou = evaluate.learning_charts({"member_00": entries})
    assert loss.svg.count("L") > miou.svg.count("L")


@pytest.mark.parametrize(
    "value, text",
    [(84.24, "84.2"), (99.96, "100"), (0.05364, "0.0536"), (1234.5, "1,234"), (0, "0")]
    + [(-3.305, "-3.31"), (9.999, "10.0"), (0.00001234, "1.23e-05"), (float("nan"), "–")],
)
def test_numbers_have_three_digits(value, text):
    assert evaluate.three_digits(value) == text


def test_the_best_of_each_network_is_bold():
    results = {
        "student/a": {"auroc": 0.801, "aurc": 0.2},
        "student/b": {"auroc": 0.8012, "aurc": 0.1},  # the same with three digits
        "student/c": {"auroc": 0.7, "aurc": None},
        "teacher/a": {"auroc": 0.9, "aurc": 0.3},  # alone
    }
    section = evaluate.table_section("", "", "", results, ["auroc", "aurc"])
    assert section.best == {(0, 1), (1, 1), (1, 2)}
    assert section.groups == ["student"] * 3 + ["teacher"]


def test_a_rejection_curve_is_pale_where_classes_have_died_out():
    values = {"rejection": [0.5, 0.6, 0.7, 0.8] + [0.9] * 6}
    values["rejection_classes"] = [4, 4, 3, 3] + [2] * 6
    chart = evaluate.curve_chart("rejection", {"student/dudes": values})
    assert chart.svg.count('stroke-opacity="0.3"') == 1
    values["rejection_classes"] = [4] * 10
    chart = evaluate.curve_chart("rejection", {"student/dudes": values})
    assert "stroke-opacity" not in chart.svg


def test_precision_is_drawn_from_one_percent_recall_on():
    curve = evaluate.CURVES["pr"]
    values = {"recall": [0.0001, 0.005, 0.01, 0.5, 1.0], "precision": [0.0, 1.0, 0.4, 0.3, 0.1]}
    xs, ys = evaluate.curve_points(curve, values)
    assert xs.tolist() == [1, 50, 100] and ys.tolist() == [40, 30, 10]


def test_the_axes_of_fidelity_end_where_the_pixels_do():
    density = np.zeros((64, 64), int)
    density[:8, :16] = 1000  # student up to 8/64, teacher up to 16/64 of the largest
    density[60, 60] = 1
    fidelity = {"density": density.tolist(), "density_max": 0.64, "measure": "std"}
    page = evaluate.density_html(fidelity)
    ticks = re.findall(r">([\d.]+)</text>", page)
    assert max(map(float, ticks)) <= 0.2 and "0.1 %" in page


# ------------------------------------------------------------------ pictures


def test_void_is_grey_and_wrong_is_white():
    labels = np.array([[0, 1, 255], [254, 1, 0]], np.uint8)
    prediction = np.array([[0, 0, 0], [1, 1, 1]])
    marked = evaluate.marked_map(prediction != labels, void=labels >= data.IGNORED)
    white, black, grey = evaluate.WHITE, evaluate.BLACK, evaluate.GREY
    expected = [[black, white, grey], [grey, black, white]]
    assert (marked == np.array(expected)).all() and marked.dtype == np.uint8


def test_a_panel_of_right_predictions_shows_no_wrong_pixel():
    """The void outlines of all objects were white in the map of wrong pixels."""
    _, labels = scene(np.random.default_rng(0))
    prediction = labels.copy()
    labels[::8] = 255
    row = evaluate.PanelRow("student", prediction, np.zeros(labels.shape, np.float32))
    networks = evaluate.Networks(classes=list("abcd"), palette=[(0, 0, 0)] * 4)
    photo = Image.new("RGB", (56, 40))
    sheet = evaluate.draw_panel(photo, labels, [row], networks, anomalies=False)
    pixels = np.asarray(sheet)
    cell = evaluate.PANEL_SIDE + evaluate.PANEL_MARGIN
    left = evaluate.PANEL_MARGIN + 3 * cell
    top = evaluate.PANEL_MARGIN + evaluate.PANEL_TITLE
    height = evaluate.PANEL_SIDE * 40 // 56
    accuracy = pixels[top : top + height, left : left + evaluate.PANEL_SIDE]
    assert not (accuracy == 255).all(axis=2).any()
    assert (accuracy == evaluate.GREY).all(axis=2).mean() == pytest.approx(1 / 8, abs=0.02)


def test_the_second_row_of_an_anomaly_panel_shows_the_free_score():
    _, labels = scene(np.random.default_rng(0), classes=2)
    ramp = np.linspace(-3, -1, labels.size, dtype=np.float32).reshape(labels.shape)
    rows = [evaluate.PanelRow(name, labels, ramp + 3) for name in ("student", "teacher")]
    networks = evaluate.Networks(classes=list("ab"), palette=[(0, 0, 0)] * 2)
    photo = Image.new("RGB", (56, 40))
    free = evaluate.ScoreMap("max_logit", ramp)
    pictures = []
    for score in (None, free):
        sheet = evaluate.draw_panel(photo, labels, rows, networks, True, score)
        pictures.append(np.asarray(sheet))
    without, with_free = pictures
    second_row = 300 + 100  # pixels from the top, inside the second picture
    column = evaluate.PANEL_MARGIN + 3 * (evaluate.PANEL_SIDE + evaluate.PANEL_MARGIN)
    grey_levels = np.ptp(without[second_row, column : column + 300].astype(int), axis=1)
    assert (grey_levels == 0).all()  # black and white
    assert np.ptp(with_free[second_row, column : column + 300].astype(int), axis=1).max() > 50


def test_rejected_pixels_are_hatched():
    rejected = np.zeros((40, 56), bool)
    rejected[:, :28] = True
    pixels = np.full((40, 56, 3), 100, np.uint8)
    picture = evaluate.hatched(pixels, rejected, (112, 80))
    assert (picture[:, 56:] == 100).all()
    assert (picture[:, :56] == 255).all(axis=2).mean() == pytest.approx(0.5, abs=0.02)


def test_a_log_gets_a_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    with evaluate.ImageProgress(100) as progress:
        for _ in range(100):
            now[0] += 2
            progress.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{done}/100 images  0.5 images/s  {200 - 2 * done} s left" for done in
                     (30, 60, 90)]  # fmt: skip


# ------------------------------------------------------------------ --predict


def save_photos(folder, **sizes):
    """Pictures of the given sizes (H, W), by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, size) in enumerate(sizes.items()):
        image, _ = scene(np.random.default_rng(number), size)
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def predict_with(trained, command, tmp_path):
    """predict_with(source, flags...) -> (exit code, stdout, stderr), by the student."""

    def call(source, *flags):
        student = ["--student", trained[1] / "student.pt", "--device", "cpu", "--amp", "off"]
        return command("evaluate", *student, "--predict", source, "--out", tmp_path / "out", *flags)

    return call


def test_predict_writes_maps_on_one_scale(trained, predict_with, tmp_path):
    photos = save_photos(tmp_path / "photos", a=(30, 50), b=(40, 56), c=(1, 1))
    (photos / "notes.txt").write_text("no image")
    code, text, _ = predict_with(photos, "--score", "msp", "max_logit", "msp")
    out = tmp_path / "out"
    assert code == 0 and "3 images in" in text and "1 skipped, not images: notes.txt" in text
    assert "trained at 40x56" in text and "40x67 (1)" in text
    classes = Image.open(out / "a_classes.png")
    assert classes.mode == "P" and classes.size == (50, 30) and np.asarray(classes).max() < 4
    assert Image.open(out / "c_overlay.png").size == (1, 1)
    names = {path.name for path in out.glob("b_*")}
    endings = ("classes", "overlay", "msp", "msp16", "max_logit", "max_logit16")
    assert names == {f"b_{ending}.png" for ending in endings}

    # the 16-bit maps give the scores back, by scales.json and by their own text
    scales = json.loads((out / "scales.json").read_text())
    assert scales["network"] == "student" and set(scales["scores"]) == {"msp", "max_logit"}
    student = load_model(trained[1] / "student.pt")
    highest = {"msp": 0.0, "max_logit": -100.0}
    for name in "ab":
        photo = data.read_image(photos / f"{name}.png")
        image = data.to_input(photo, data.proportional_size(photo, (40, 56)))
        with torch.inference_mode():
            logits = student(image[None], (photo.height, photo.width)).logits
        for score, values in metrics.free_scores(logits, logits.softmax(1)).items():
            if score not in highest:
                continue
            picture = Image.open(out / f"{name}_{score}16.png")
            assert picture.mode.startswith("I;16") and picture.size == photo.size
            scale = scales["scores"][score]
            assert float(picture.text["scale"]) == scale["scale"]
            decoded = scale["offset"] + np.asarray(picture) / 65535 * scale["scale"]
            np.testing.assert_allclose(decoded, values[0], atol=scale["scale"] / 30000)
            highest[score] = max(highest[score], decoded.max())
    for score, scale in scales["scores"].items():  # the scale ends at the largest of all images
        assert scale["offset"] + scale["scale"] == pytest.approx(highest[score], rel=1e-3)
    assert scales["scores"]["msp"]["offset"] == 0 > scales["scores"]["max_logit"]["offset"]

    # in colours, above a scale bar
    assert Image.open(out / "a_msp.png").height > 30 + 40
    assert "max_logit: -" in text and "(-largest logit)" in text


def test_predict_runs_at_the_size_of_the_training(trained, command, tmp_path):
    """A network of small scenes ran on photographs at their own size, which gave nonsense."""
    photos = save_photos(tmp_path / "photos", a=(60, 120))
    checkpoint = torch.load(trained[1] / "student.pt", weights_only=True)
    assert checkpoint["config"]["image_size"] == [40, 56]  # crops of images at their own size
    checkpoint["config"]["image_size"] = [20, 28]
    torch.save(checkpoint, tmp_path / "student.pt")
    flags = ["--student", tmp_path / "student.pt", "--device", "cpu", "--predict", photos]
    flags += ["--out", tmp_path / "out"]
    code, out, _ = command("evaluate", *flags)
    assert code == 0 and "trained at 20x28" in out and "20x40 (1)" in out  # 1 : 2, as the photo is
    assert Image.open(tmp_path / "out/a_dudes16.png").size == (120, 60)
    code, out, _ = command("evaluate", *flags, "--image-size", 30, 30)
    assert code == 0 and "--image-size 30 30" in out and "30x60 (1)" in out


def test_default_scores_are_that_for_errors_and_the_std(trained, command, tmp_path):
    photos = save_photos(tmp_path / "photos", a=(40, 56))
    for network, path, names in (
        ("--student", trained[1] / "student.pt", {"error", "dudes"}),
        ("--teacher", trained[1], {"msp", "std"}),
    ):
        out = tmp_path / network
        flags = [network, path, "--device", "cpu", "--predict", photos / "a.png", "--out", out]
        assert command("evaluate", *flags)[0] == 0
        found = {path.name[2:-6] for path in out.glob("a_*16.png")}
        assert found == names


def test_a_video_is_one_line_with_the_command_that_extracts_its_frames(predict_with, tmp_path):
    video = tmp_path / "x.mp4"
    video.write_bytes(b"0000ftypisom")
    code, _, err = predict_with(video)
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"error: --predict {video}: ")
    assert f"extract the frames first: mkdir frames && ffmpeg -i {video} -vf fps=1" in err


def test_predict_refuses_what_holds_no_image(tmp_path):
    """A folder without an image was "0 images", and no error."""
    for name, content in (
        ("clips/y.MOV", b"0000ftypqt  "),
        ("texts/notes.txt", b"no image"),
        ("broken/a.png", b"no png"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    networks = evaluate.Networks()
    for source, words in (
        (tmp_path / "clips", "y.MOV is a video; extract its frames first: ffmpeg -i"),
        (tmp_path / "empty", "an empty folder; name an image"),
        (tmp_path / "texts", "no image among its 1 files, the first is notes.txt"),
        (tmp_path / "texts/notes.txt", "cannot read the image"),
        (tmp_path / "broken", "no image of 1 files can be read; the first: cannot read"),
        (tmp_path / "gone", "no such file or folder"),
        (Path("0"), "not on a camera"),
        (Path("rtsp://camera/1"), "not on a camera or an address"),
        (Path("/dev/null"), "not on a camera"),
    ):
        with pytest.raises((UsageError, data.DataError)) as error:
            evaluate.predict_files(networks, source, tmp_path / "out", None, INFERENCE, [])
        assert words in str(error.value) and not (tmp_path / "out").exists()


def test_a_score_that_is_none_is_refused_with_those_there_are(trained):
    student = load_model(trained[1] / "student.pt")
    networks = evaluate.Networks(student, measures=["std", "entropy"])
    assert evaluate.choose_scores(["msp", "dudes", "msp"], networks) == ["msp", "dudes"]
    with pytest.raises(UsageError) as error:
        evaluate.choose_scores(["msp", "std"], networks)
    expected = "dudes, dudes_entropy, entropy, msp, max_logit, energy"
    assert str(error.value) == f"--score std: the student has no such score; choose of {expected}"


def test_score_is_for_predict(trained, command):
    flags = ["--student", trained[1] / "student.pt", "--device", "cpu", "--score", "msp"]
    code, _, err = command("evaluate", *flags)
    assert code == 2 and "--predict" in err and err.count("\n") == 1


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(UsageError, match="energy of a.png is not finite"):
        values = {"energy": np.array([[0.0, np.inf]])}
        evaluate.refuse_infinite_scores("a.png", values)


def test_large_images_are_predicted_in_tiles(monkeypatch):
    def pointwise(networks, pixels, size, amp):  # a network without context
        values = pixels.float().mean(dim=1)
        values = torch.nn.functional.interpolate(values[None], size, mode="nearest")[0]
        probs = torch.stack([values < 128, values >= 128], dim=1).float()
        return {"student": evaluate.Output(probs, {"dudes": values / 255, "energy": -values})}

    def maps(image_size=None):
        scores = ["dudes", "energy"]
        return evaluate.predict_maps(networks, image, image_size, INFERENCE, scores)

    monkeypatch.setattr(evaluate, "predict", pointwise)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 67, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    networks = evaluate.Networks(student=torch.nn.Identity(), classes=["a", "b"])
    labels, values = maps()
    np.testing.assert_allclose(values["dudes"], pixels.mean(axis=2) / 255, atol=1e-6)
    monkeypatch.setattr(evaluate, "LARGE_IMAGE", 1000)
    for tile, context in ((16, 4), (50, 1), (7, 0), (100, 9)):
        monkeypatch.setattr(evaluate, "TILE", tile)
        monkeypatch.setattr(evaluate, "CONTEXT", context)
        tiled_labels, tiled_values = maps()
        np.testing.assert_array_equal(tiled_labels, labels)
        for score in values:
            np.testing.assert_array_equal(tiled_values[score], values[score])
    # reduced anyway: small maps, enlarged
    labels, values = maps((8, 12))
    assert labels.shape == values["energy"].shape == (45, 67) and labels.dtype == np.uint8
    assert values["dudes"].max() <= 1
    # a network of large images sees a larger one at its size, and in tiles too
    largest_input = []

    def pointwise_and_noted(networks, pixels, size, amp):
        largest_input.append(pixels[0, 0].numel())
        return pointwise(networks, pixels, size, amp)

    monkeypatch.setattr(evaluate, "predict", pointwise_and_noted)
    monkeypatch.setattr(evaluate, "TILE", 20)
    monkeypatch.setattr(evaluate, "CONTEXT", 2)
    labels, values = maps((40, 60))
    assert labels.shape == values["energy"].shape == (45, 67)
    assert max(largest_input) == 22 * 24 and len(largest_input) == 2 * 3


@pytest.mark.parametrize("low, high, offset, scale", [(0.1, 0.5, 0, 0.5), (-4, -2, -4, 2)]
                         + [(0, 0, 0, 1), (-2, 3, -2, 5)])  # fmt: skip
def test_a_scale_holds_all_values(tmp_path, low, high, offset, scale):
    values = np.linspace(low, high, 12, dtype=np.float32).reshape(3, 4)
    value_range = evaluate.ValueRange()
    for row in values:
        value_range.include(row)
    map_scale = value_range.scale()
    assert map_scale == pytest.approx((offset, scale))
    evaluate.write_map(tmp_path / "map.png", values, map_scale)
    np.testing.assert_allclose(evaluate.read_map(tmp_path / "map.png"), values, atol=scale / 6e4)
