"""The files of the error report: one page that needs no network, and the same numbers as JSON and CSV."""

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from detkit.config import get_cfg
from detkit.evaluation import COCOEvaluator
from detkit.evaluation.coco.ground_truth import load_coco_ground_truth
from detkit.evaluation.report import ReportOptions, read_results, write_report
from detkit.evaluation.report.gallery import _outlines
from detkit.utils.errors import DataError, MissingFileError
from tests.evaluation.coco import test_scoring

HOSTILE = "</script><script>alert('x')</script>"
HOSTILE_FILE = "<img src=x onerror=alert(1)>&amp;.png"
VOID = {"meta", "input", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that elements are nested, and collects attributes and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.scripts, self.styles = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("id"), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            name, text = self.scripts[-1]
            self.scripts[-1] = (name, text + data)
        if self.open and self.open[-1] == "style":
            self.styles.append(data)


@pytest.fixture
def problem(register, tmp_path):
    """A function that gives the name and outputs of a data set of masks and keypoints with images on disk."""

    def make(seed=0):
        records, outputs = test_scoring.random_problem(seed)
        for record in records:
            record["file_name"] = str(tmp_path / f"{record['image_id']}{HOSTILE_FILE}")
            pixels = np.full((*test_scoring.SIZE, 3), 90, dtype=np.uint8)
            Image.fromarray(pixels).save(record["file_name"])
        ids = {5: 0, 2: 1, 9: 2}
        names = [HOSTILE, "b", '"c, d"']
        return register(records, names, thing_dataset_id_to_contiguous_id=ids), outputs

    return make


def config():
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = test_scoring.SIGMAS
    return cfg


def predictions_of(name, outputs, folder):
    """The detections as the evaluator writes them and the report reads them, and the evaluator's scores."""
    evaluator = COCOEvaluator(name, output_dir=str(folder), kpt_oks_sigmas=test_scoring.SIGMAS)
    scores = test_scoring.run(evaluator, outputs)
    truth = load_coco_ground_truth(name)
    return truth, read_results(str(folder / evaluator.results_file), truth), scores


OPTIONS = ReportOptions(num_samples=5)


def test_page_json_and_tables_have_the_same_numbers_as_the_evaluator(problem, tmp_path):
    name, outputs = problem()
    truth, detections, scores = predictions_of(name, outputs, tmp_path)
    page = write_report(tmp_path / "out", truth, detections, config(), options=OPTIONS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["tasks"]) == ["bbox", "segm", "keypoints"]
    for task, numbers in report["tasks"].items():
        expected = {key: value for key, value in scores[task].items() if "-" not in key}
        assert numbers["metrics"] == pytest.approx(expected)
        for row in numbers["classes"][:2]:
            assert row["AP"] == pytest.approx(scores[task][f"AP-{row['name']}"])
    scripts = dict(Page(page.read_text()).scripts)
    assert json.loads(scripts["report"]) == report
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [row["name"] for row in rows[:3]] == [HOSTILE, "b", '"c, d"']
    assert float(rows[0]["AP"]) == report["tasks"]["bbox"]["classes"][0]["AP"]
    errors = list(csv.DictReader((tmp_path / "out" / "errors.csv").open()))
    assert (
        float(errors[0]["cost"])
        == report["tasks"]["bbox"]["errors"]["types"]["classification"]["cost"]
    )


def test_page_fetches_nothing_and_names_cannot_break_it(problem, tmp_path):
    name, outputs = problem()
    truth, detections, _ = predictions_of(name, outputs, tmp_path)
    names = {"first": HOSTILE}
    path = write_report(tmp_path / "o", truth, detections, config(), names=names, options=OPTIONS)
    page = Page(path.read_text())
    for key, value in page.attributes:
        if key in ("src", "href", "action", "data", "srcset", "poster"):
            raise AssertionError(f"{key}={value}")
        assert not key.startswith("on"), key
    assert (
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    ) in page.attributes
    assert not any(re.search(r"@import|url\(", style) for style in page.styles)
    # The data, the data of the images, uPlot and our own: no script of a name.
    assert [name for name, _ in page.scripts] == ["report", "images", None, None]
    assert "innerHTML" not in page.scripts[3][1]
    assert "fetch(" not in page.scripts[3][1]
    images = json.loads(page.scripts[1][1])["images"]
    assert {image["file"] for image in images} == {f"{i}{HOSTILE_FILE}" for i in range(4)}
    assert all(image["picture"].startswith("data:image/jpeg;base64,/9j/") for image in images)


def test_what_is_drawn_over_an_image(register, make_record, make_instances, tmp_path):
    objects = [([10, 10, 30, 30], 0), ([60, 60, 80, 80], 1), ([0, 0, 5, 5], 0, {"iscrowd": 1})]
    name = register([make_record(7, *objects), make_record(3)])
    found = [
        ([10, 10, 30, 30], 1, 0.9),
        ([0, 0, 4, 4], 0, 0.8),
        ([60, 60, 80, 80], 1, 0.7),
        ([50, 0, 60, 9], 0, 0.01),
    ]
    truth, detections, _ = predictions_of(
        name, {7: make_instances(*found), 3: make_instances()}, tmp_path
    )
    path = write_report(tmp_path / "o", truth, detections, config(), options=OPTIONS)
    gallery = json.loads(dict(Page(path.read_text()).scripts)["images"])
    # Worst first; there are no files to show.
    assert [(image["id"], image.get("picture")) for image in gallery["images"]] == [
        (7, None),
        (3, None),
    ]
    drawn = gallery["tasks"]["bbox"]["drawn"][0][0]
    assert drawn["detections"]["error"] == [0, -2, -1]  # the last one has too low a score
    assert drawn["detections"]["box"][0] == [10, 10, 20, 20]
    assert drawn["objects"]["found"] == [-1, pytest.approx(0.8), pytest.approx(0.7)]
    assert drawn["objects"]["ignored"] == [False, True, False]
    assert [gallery["tasks"]["bbox"]["sizes"][k] for k in drawn["objects"]["size"]] == ["small"] * 3


def test_outlines_of_a_mask_have_its_holes_and_no_cuts():
    mask = np.zeros((600, 400), dtype=np.uint8)
    mask[30:90, 60:120] = 1
    mask[45:60, 75:90] = 0
    rle = mask_util.encode(np.asfortranarray(mask))
    outlines = _outlines(rle)  # every third pixel
    assert sorted(len(outline) for outline in outlines) == [8, 8]
    corners = {
        tuple(np.reshape(o, (-1, 2)).min(0)) + tuple(np.reshape(o, (-1, 2)).max(0))
        for o in outlines
    }
    assert corners == {(60, 30, 120, 90), (75, 45, 90, 60)}


def test_comparison_with_itself_is_zero_and_with_another_the_difference(problem, tmp_path):
    name, outputs = problem(1)
    truth, detections, scores = predictions_of(name, outputs, tmp_path)
    fewer = [d for d in detections if d.image_id != 0]
    for others, expected in ((detections, 0.0), (fewer, None)):
        write_report(tmp_path, truth, detections, config(), others=others, options=OPTIONS)
        compare = json.loads((tmp_path / "report.json").read_text())["tasks"]["bbox"]["compare"]
        row = compare["classes"][0]
        assert row["first"] == pytest.approx(scores["bbox"]["AP"])
        if expected is not None:
            assert [row["difference"], row["low"], row["high"]] == [0, 0, 0]
            assert all(image["change"] == 0 for image in compare["images"])
        else:
            assert row["difference"] == pytest.approx(row["second"] - row["first"]) != 0
            assert row["low"] <= row["high"]
            assert [image["image_id"] for image in compare["images"] if image["change"]] in (
                [],
                [0],
            )


def test_files_of_predictions_that_do_not_fit_are_refused(register, make_record, tmp_path):
    truth = load_coco_ground_truth(register([make_record(1), make_record(3)]))
    file = tmp_path / "p.json"
    good = {"image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "score": 0.5}
    with pytest.raises(MissingFileError, match=r"p\.json does not exist"):
        read_results(str(file), truth)
    for content, message in (
        ("{", "not valid JSON"),
        ('{"images": []}', "must hold a list of results; it holds a dict"),
        ("[1]", "result 1 of .* has no 'image_id'"),
        ([good, good | {"image_id": 2}], "result 2 of .* has image_id 2, which .* does not have"),
        ([good | {"image_id": [2]}], r"result 1 of .* has image_id \[2\], which"),
        ([good | {"category_id": 5}], "has category_id 5"),
        ([good | {"bbox": [0, 0, 9]}], "boxes in .* must be"),
        ([good | {"bbox": "abcd"}], "cannot be read"),
        ([good | {"score": "high"}], "cannot be read"),
        ([good | {"segmentation": [[0, 0, 9, 0, 9, 9]]}], "cannot be read"),
        ([good | {"segmentation": {"size": [100, 100], "counts": "zz"}}], "cannot be read"),
        (
            [good | {"segmentation": {"size": [9, 9], "counts": "0a2"}}],
            "are 9x9, but the image is 100x100",
        ),
        ([good | {"score": float("nan")}], "must be finite"),
        ([good | {"keypoints": [1, float("nan"), 1]}], "keypoints in .* must be finite"),
        ([good | {"keypoints": [1, 1, 1]}, good], "1 of the 2 results in .* have 'keypoints'"),
        (
            [
                good | {"segmentation": {"size": [100, 100], "counts": "`b2"}},
                good | {"image_id": 3},
            ],
            "1 of the 2 results in .* have 'segmentation'",
        ),
        (
            [good | {"keypoints": [1, 1, 1]}, good | {"image_id": 3, "keypoints": [1, 1, 1] * 2}],
            "have 1 to 2 keypoints",
        ),
    ):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(DataError, match=message):
            read_results(str(file), truth)
    file.write_text(json.dumps([good]))
    (found,) = read_results(str(file), truth)
    assert found.boxes.tolist() == [[0, 0, 9, 9]]


@pytest.mark.slow
def test_page_runs_in_a_browser(problem, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    name, outputs = problem()
    truth, detections, _ = predictions_of(name, outputs, tmp_path)
    page = write_report(tmp_path / "o", truth, detections, config(), others=detections)
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,3000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [browser, *words, page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    # What the scripts make of the data; nothing of it is there if one of them fails.
    assert done.stdout.count('<div class="uplot') == 3
    assert done.stdout.count('<figure class="picture') == 4
    assert re.search(r"4 images: \d+ right detections, \d+ wrong, \d+ missed objects", done.stdout)
    assert len(re.findall(r'<canvas [^>]*data-boxes="\d+"', done.stdout)) == 4
    assert html.escape(HOSTILE, quote=False) in done.stdout
