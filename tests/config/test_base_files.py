import pytest


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_base_is_relative_to_the_file_and_is_overridden_by_it(cfg, tmp_path):
    write(tmp_path, "base.yaml", "SOLVER:\n  BASE_LR: 1.0\n  GAMMA: 0.2\n")
    write(tmp_path, "deep/mid.yaml", "_BASE_: ../base.yaml\nSOLVER:\n  BASE_LR: 2.0\n")
    cfg.merge_from_file(
        write(tmp_path, "deep/er/top.yaml", "_BASE_: ../mid.yaml\nSOLVER:\n  MOMENTUM: 0.5\n")
    )
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM) == (2.0, 0.2, 0.5)


def test_base_may_be_absolute(cfg, tmp_path):
    base = write(tmp_path, "x/base.yaml", "SEED: 5\n")
    cfg.merge_from_file(write(tmp_path, "y/top.yaml", f"_BASE_: {base}\n"))
    assert cfg.SEED == 5


def test_base_may_lie_in_the_home_folder(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path, "base.yaml", "SEED: 6\n")
    cfg.merge_from_file(write(tmp_path, "y/top.yaml", "_BASE_: ~/base.yaml\n"))
    assert cfg.SEED == 6


def test_base_may_be_a_packaged_config(cfg, tmp_path):
    cfg.merge_from_file(
        write(tmp_path, "my.yaml", "_BASE_: detkit://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml\n")
    )
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


def test_several_bases_are_merged_in_order(cfg, tmp_path):
    write(tmp_path, "a.yaml", "SEED: 1\nVIS_PERIOD: 1\n")
    write(tmp_path, "b.yaml", "SEED: 2\n")
    cfg.merge_from_file(write(tmp_path, "top.yaml", "_BASE_: [a.yaml, b.yaml]\n"))
    assert (cfg.SEED, cfg.VIS_PERIOD) == (2, 1)


def test_circle_of_bases_is_named(cfg, tmp_path):
    write(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    path = write(tmp_path, "b.yaml", "_BASE_: a.yaml\n")
    with pytest.raises(
        ValueError, match=r"_BASE_ goes in a circle: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"
    ):
        cfg.merge_from_file(path)


def test_bases_that_multiply_are_refused(cfg, tmp_path):
    write(tmp_path, "0.yaml", "SEED: 1\n")
    for i in range(1, 40):
        path = write(tmp_path, f"{i}.yaml", f"_BASE_: [{i - 1}.yaml, {i - 1}.yaml]\n")
    with pytest.raises(
        ValueError, match=r"\.yaml stands for more than 100 files once _BASE_ is followed"
    ):
        cfg.merge_from_file(path)


def test_endless_bases_are_refused(cfg, tmp_path):
    for i in range(101):
        path = write(tmp_path, f"{i}.yaml", f"_BASE_: {i - 1}.yaml\n")
    with pytest.raises(
        ValueError, match=r"100\.yaml has more than 100 files below each other as _BASE_"
    ):
        cfg.merge_from_file(path)


def test_missing_file_is_named(cfg):
    with pytest.raises(FileNotFoundError, match=r"no config file .*nowhere\.yaml"):
        cfg.merge_from_file("nowhere.yaml")


def test_missing_base_names_the_file_that_asks_for_it(cfg, tmp_path):
    path = write(tmp_path, "top.yaml", "_BASE_: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml, named as _BASE_ in .*top\.yaml"):
        cfg.merge_from_file(path)


def test_paths_of_declared_data_sets_are_relative_to_their_file(cfg, tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "train").mkdir()
    text = "DATASETS:\n  REGISTER:\n    - {name: a, format: coco, images: pics, annotations: elsewhere.json, split: train}\n"
    cfg.merge_from_file(write(tmp_path, "a.yaml", text))
    entry = cfg.DATASETS.REGISTER[0]
    assert entry["split"] == "train"  # a name, not the folder of that name
    assert entry["images"] == str(tmp_path / "pics")
    assert (
        entry["annotations"] == "elsewhere.json"
    )  # not beside the file: left for $DETKIT_DATASETS
