from detkit.data.data_report import DataReport


def rows(report):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.table().splitlines()
    ]
    return {name: int(number) for name, number in cells[2:]}


def test_what_is_used_and_what_is_left_out_add_up():
    report = DataReport(["a", "b"], num_images=10, num_annotations=50, num_crowd=3)
    report.dropped_images.update({"without objects": 2, "few keypoints": 1})
    report.add_boxes("not finite", ["annotation 4 of x.jpg", "annotation 5 of x.jpg"])
    report.add_boxes("without area", [])
    report.add_boxes("not finite", ["annotation 9 of y.jpg"])
    assert rows(report) == {
        "images": 10,
        "- left out: without objects": 2,
        "- left out: few keypoints": 1,
        "images used": 7,
        "annotations": 50,
        "- left out: not finite": 3,
        "- regions of crowds, not trained on": 3,
        "objects": 44,
    }


def test_of_nothing_nothing_is_left_out():
    assert rows(DataReport(["a"])) == {
        "images": 0,
        "images used": 0,
        "annotations": 0,
        "objects": 0,
    }
