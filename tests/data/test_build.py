"""Loaders: from a config, from arguments, and the same batches however they are made."""

import itertools
import pickle

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import detkit.modeling  # noqa: F401  (its models declare the keys of their classes)
from detkit.config import declare_architecture, get_cfg
from detkit.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    build_train_sampler,
    get_test_records,
)
from detkit.data.datasets import register_coco_instances
from detkit.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.data.wrappers import SampleError
from detkit.utils import comm
from detkit.utils.errors import ConfigError
from detkit.utils.image import BadImageError


@pytest.fixture
def cfg(write_coco):
    """A config that trains on six pictures of a registered data set."""
    register_coco_instances("mine", {}, *write_coco(6))
    cfg = get_cfg()
    settings = {
        "DATASETS.TRAIN": ("mine",),
        "DATASETS.TEST": ("mine",),
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "INPUT.MIN_SIZE_TRAIN": (24, 32),
        "INPUT.MIN_SIZE_TEST": 24,
        "SOLVER.IMS_PER_BATCH": 2,
        "DATALOADER.NUM_WORKERS": 0,
        "SEED": 5,
    }
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    return cfg


def test_test_set_is_matched_to_the_training_set_by_name(cfg, write_coco):
    swapped = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    path, root = write_coco(2, "test.json", categories=swapped)
    register_coco_instances("test", {}, path, root)
    build_detection_train_loader(cfg)
    build_detection_test_loader(cfg, "test")
    assert MetadataCatalog.get("test").thing_classes == ["cat", "dog"]
    records = get_test_records(cfg, "test")
    assert [record["annotations"][0]["category_id"] for record in records] == [1, 0]


def test_test_set_that_keeps_another_order_is_an_error_with_the_remedy(cfg, write_coco):
    path, root = write_coco(2, "test.json")
    register_coco_instances("test", {}, path, root, classes=["dog", "cat"])
    build_detection_train_loader(cfg)
    with pytest.raises(
        ConfigError, match=r"training data: cat, dog\. 'test': dog, cat\. .*\[cat, dog\]"
    ):
        build_detection_test_loader(cfg, "test")


def test_training_data_of_another_model_do_not_count(cfg, write_coco):
    MetadataCatalog.get("other").set(thing_classes=["a", "b", "c"])
    cfg.DATASETS.TRAIN = ("other",)
    build_detection_test_loader(cfg, "mine")
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def same(first, second):
    return ids(first) == ids(second) and all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        for batch_a, batch_b in zip(first, second, strict=True)
        for a, b in zip(batch_a, batch_b, strict=True)
    )


class Numbers(Dataset):
    def __init__(self, size=6):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"index": index, "width": index % 2, "height": 1 - index % 2}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"index": i, "width": 2, "height": 1} for i in itertools.count())


# --- training ---


def test_training_loader_from_a_config(cfg):
    batches = take(build_detection_train_loader(cfg), 6)
    assert [len(batch) for batch in batches] == [2] * 6
    assert {i for batch in ids(batches) for i in batch} == set(range(6))
    assert all("instances" in sample for batch in batches for sample in batch)
    assert len({sample["image"].shape for batch in batches for sample in batch}) == 2


def test_same_seed_gives_the_same_batches_with_any_number_of_workers(cfg):
    first = take(build_detection_train_loader(cfg), 8)
    torch.rand(3)
    assert same(first, take(build_detection_train_loader(cfg), 8))
    for workers in (1, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        assert same(first, take(build_detection_train_loader(cfg), 8))


def test_another_seed_gives_other_batches(cfg):
    first = take(build_detection_train_loader(cfg), 8)
    cfg.SEED = 6
    assert not same(first, take(build_detection_train_loader(cfg), 8))


def test_augmentations_differ_from_epoch_to_epoch(cfg):
    cfg.INPUT.MIN_SIZE_TRAIN = (24,)
    samples = [
        s
        for batch in take(build_detection_train_loader(cfg), 30)
        for s in batch
        if s["image_id"] == 0
    ]
    assert len({s["image"].numpy().tobytes() for s in samples}) == 2  # flipped, and not


def test_loading_does_not_disturb_the_generator_of_the_training(cfg):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(build_detection_train_loader(cfg), 4)
    list(build_detection_test_loader(cfg, "mine"))
    assert torch.equal(torch.get_rng_state(), state)


def test_negative_seed_draws_one(cfg):
    cfg.SEED = -1
    torch.manual_seed(0)
    first = take(build_detection_train_loader(cfg), 4)
    torch.manual_seed(0)
    assert same(first, take(build_detection_train_loader(cfg), 4))


def test_each_process_takes_its_share(cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda value: [value, value])
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(build_detection_train_loader(cfg), 3))
    assert [len(batch) for share in shares for batch in share] == [1] * 6
    assert sorted(i for share in shares for batch in ids(share) for i in batch) == list(range(6))


def test_batch_that_cannot_be_shared_out_is_refused(cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH .*got 2 images for 4 processes"):
        build_detection_train_loader(cfg)


def test_own_mapper_sampler_and_data_set(cfg):
    loader = build_detection_train_loader(
        cfg, mapper=lambda record: record["image_id"] * 10, sampler=[3, 1, 2, 0]
    )
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_detection_train_loader(
        cfg, mapper=lambda record: record["image_id"] * 10, sampler=[3, 1, 2, 0]
    )
    assert list(loader) == [[30, 10], [20, 0]]
    loader = build_detection_train_loader(
        cfg, dataset=Numbers(), mapper=lambda sample: sample["index"]
    )
    assert {i for batch in take(loader, 3) for i in batch} == set(range(6))


def test_objects_without_masks_are_for_mappers_that_do_not_need_them(cfg):
    cfg.MODEL.MASK_ON = True
    for record in DatasetCatalog.get("mine"):
        for annotation in record["annotations"]:
            annotation["point_coords"] = [annotation.pop("segmentation", None)]
    with pytest.raises(ConfigError, match="MODEL.MASK_ON needs a mask"):
        build_detection_train_loader(cfg)
    with pytest.raises(ConfigError, match="MODEL.MASK_ON needs a mask"):
        build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_detection_train_loader(cfg, mapper=lambda record: record["image_id"])
    assert len(take(loader, 1)[0]) == 2


def test_grouping_by_aspect():
    loader = build_detection_train_loader(Numbers(), mapper=None, total_batch_size=2, seed=0)
    assert all(len({sample["width"] for sample in batch}) == 1 for batch in take(loader, 10))


def test_explicit_arguments_and_collation():
    loader = build_detection_train_loader(
        Numbers(),
        mapper=lambda s: s["index"],
        total_batch_size=3,
        aspect_ratio_grouping=False,
        collate_fn=sum,
        seed=0,
    )
    assert sum(take(loader, 2)) == 15


def test_stream_brings_its_own_order():
    loader = build_detection_train_loader(
        Stream(), mapper=lambda s: {**s, "seen": True}, total_batch_size=2
    )
    assert [[(s["index"], s["seen"]) for s in batch] for batch in take(loader, 2)] == [
        [(0, True), (1, True)],
        [(2, True), (3, True)],
    ]
    with pytest.raises(ValueError, match="give no sampler"):
        build_detection_train_loader(Stream(), mapper=None, sampler=[1], total_batch_size=2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TrainingSampler", TrainingSampler),
        ("RandomSubsetTrainingSampler", RandomSubsetTrainingSampler),
        ("RepeatFactorTrainingSampler", RepeatFactorTrainingSampler),
    ],
)
def test_sampler_by_name(cfg, name, kind):
    cfg.DATALOADER.SAMPLER_TRAIN = name
    records = [{"annotations": [{"category_id": 0}]}] * 3
    assert isinstance(build_train_sampler(cfg, records, seed=0), kind)
    take(build_detection_train_loader(cfg), 2)


def test_unknown_sampler_lists_the_known_ones(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "Training"
    with pytest.raises(
        ValueError, match=r"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, .*got 'Training'"
    ):
        build_train_sampler(cfg, [], seed=0)


def draws_of(cfg, count=20_000):
    """Count how often each record is drawn; records 0 to 3 are of `mine`, 4 to 13 of `more`."""
    classes = [[0], [0], [0, 1], [0], *[[2]] * 9, []]
    records = [
        {
            "dataset_name": "mine" if k < 4 else "more",
            "annotations": [{"category_id": c} for c in shown],
        }
        for k, shown in enumerate(classes)
    ]
    sampler = build_train_sampler(cfg, records, seed=3)
    return torch.tensor(list(itertools.islice(sampler, count))).bincount(minlength=14) / count


def assert_drawn(shares, expected):
    # Four standard deviations of independent draws.
    expected = torch.tensor(expected)
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 20_000) ** 0.5).all()


def test_classes_are_drawn_equally_often(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "ClassAwareTrainingSampler"
    # Each of three classes and of "no object" a quarter.
    common, rare = 1 / 16, 1 / 16 + 1 / 4
    assert_drawn(draws_of(cfg), [common, common, rare, common, *[1 / 36] * 9, 1 / 4])


@pytest.mark.parametrize("name", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize("ratios", [[3, 1], [0.5, 1.5]])
def test_data_sets_are_drawn_in_their_ratio(cfg, name, ratios):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_RATIOS = ("mine", "more"), ratios
    cfg.DATALOADER.SAMPLER_TRAIN = name
    shares = draws_of(cfg)
    part = ratios[0] / sum(ratios)
    assert_drawn(torch.stack([shares[:4].sum(), shares[4:].sum()]), [part, 1 - part])
    assert_drawn(shares, [part / 4] * 4 + [(1 - part) / 10] * 10)


def test_rare_classes_are_drawn_more_often_within_the_ratio_of_their_data_set(cfg):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_RATIOS = ("mine", "more"), [1, 1]
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = (
        "RepeatFactorTrainingSampler",
        0.2,
    )
    factor = (0.2 * 14) ** 0.5  # class 1 is in one of 14 images
    shares = draws_of(cfg)
    assert_drawn(shares[:4], [w / (3 + factor) / 2 for w in (1, 1, factor, 1)])
    assert_drawn(shares[4:], [1 / 20] * 10)
    cfg.DATALOADER.SAMPLER_TRAIN = "ClassAwareTrainingSampler"
    shares = draws_of(cfg)
    assert_drawn(torch.stack([shares[:4].sum(), shares[2]]), [0.5, 0.5 * 5 / 8])


@pytest.mark.parametrize(
    ("ratios", "sampler", "message"),
    [
        ([1], "TrainingSampler", "a number above 0 for each of DATASETS.TRAIN"),
        ([1, 0], "TrainingSampler", "a number above 0"),
        ([1, 1], "RandomSubsetTrainingSampler", "not the second with DATASETS.TRAIN_RATIOS"),
    ],
)
def test_ratios_that_do_not_fit_are_refused(cfg, ratios, sampler, message):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_RATIOS = ("mine", "more"), ratios
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    with pytest.raises(ConfigError, match=message):
        draws_of(cfg)


def test_ratios_reach_the_loader_and_need_every_data_set(cfg, write_coco):
    register_coco_instances("more", {}, *write_coco(2, name="more.json"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_RATIOS = ("mine", "more"), [1, 3]
    batches = take(build_detection_train_loader(cfg), 40)
    names = [sample["dataset_name"] for batch in batches for sample in batch]
    assert 50 < names.count("more") < 70  # 60 of 80
    with pytest.raises(ConfigError, match="no training image is of data set 'more'"):
        build_train_sampler(cfg, [{"dataset_name": "mine"}], seed=0)


def test_repeat_factors_need_records(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match="counts the classes of a list of records, got a Numbers"):
        build_train_sampler(cfg, Numbers(), seed=0)


# --- errors before and during loading ---


def test_no_data_set_is_explained(cfg):
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        build_detection_train_loader(cfg)


def test_classes_are_not_checked_where_no_model_is_known(cfg, monkeypatch):
    # A program that builds a loader to look at its data need not import detkit.modeling.
    monkeypatch.setattr("detkit.config.architectures._ARCHITECTURES", {})
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    assert len(take(build_detection_train_loader(cfg), 1)) == 1


def test_classes_are_checked_against_the_key_that_a_model_of_ones_own_declares(cfg):
    @declare_architecture(num_classes="MODEL.CUSTOM.THINGS", num_stuff_classes="MODEL.CUSTOM.STUFF")
    class DeclaredForTests: ...

    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "DeclaredForTests", "MODEL.CUSTOM.THINGS", 2])
    cfg.merge_from_list(["MODEL.CUSTOM.STUFF", 1])
    assert len(take(build_detection_train_loader(cfg), 1)) == 1
    cfg.MODEL.CUSTOM.THINGS = 7
    with pytest.raises(ValueError, match=r"MODEL\.CUSTOM\.THINGS is 7"):
        build_detection_train_loader(cfg)


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("PanopticFPN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
def test_classes_are_checked_against_the_key_of_the_model(cfg, architecture, key):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.merge_from_list([key, 7])
    for build in (
        build_detection_train_loader,
        lambda cfg: build_detection_test_loader(cfg, "mine"),
    ):
        with pytest.raises(ValueError, match=f"'mine' .*has 2 classes.*{key} is 7; set {key} to 2"):
            build(cfg)


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "MyOwnNetwork"])
def test_classes_of_other_models_are_not_checked(cfg, architecture):
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", architecture, "MODEL.ROI_HEADS.NUM_CLASSES", 7])
    assert len(take(build_detection_train_loader(cfg), 1)) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_also_from_a_worker(cfg, tmp_path, workers):
    (tmp_path / "images" / "4.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(BadImageError, match=r"images/4\.jpg"):
        take(build_detection_train_loader(cfg), 4)


def test_failing_mapper_is_named_with_its_file(cfg):
    def fail(record):
        raise RuntimeError("cannot augment")

    with pytest.raises(
        SampleError, match=r"fail failed on .*\.jpg \(image_id \d\): RuntimeError: cannot augment"
    ):
        take(build_detection_train_loader(cfg, mapper=fail), 1)


# --- testing ---


@pytest.mark.parametrize("workers", [0, 2])
def test_test_loader_gives_every_image_once_in_order(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_detection_test_loader(cfg, "mine")
    assert ids(loader) == [[i] for i in range(6)]
    assert len(loader) == 6
    assert all("instances" not in sample for batch in loader for sample in batch)


def test_registered_data_sets_of_torch_are_taken_as_they_are(cfg):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from itertools.count()

    cfg.DATASETS.TRAIN = ["endless"]
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    try:
        DatasetCatalog.register("endless", Endless)
        loader = build_detection_train_loader(
            cfg, mapper=lambda x: -x, aspect_ratio_grouping=False, prefetch_factor=3
        )
        assert take(loader, 2) == [[0, -1], [-2, -3]]
        loader = build_detection_test_loader(cfg, "endless", mapper=lambda x: x)
        assert take(loader, 3) == [[0], [1], [2]]
        for name in ("a few", "more"):
            DatasetCatalog.register(name, lambda: DatasetFromList([1, 2, 3]))
        loader = build_detection_test_loader(cfg, ["a few", "more"], mapper=lambda x: x)
        assert list(loader) == [[1], [2], [3], [1], [2], [3]]
    finally:
        for name in ("endless", "a few", "more"):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)


def test_test_loader_keeps_images_without_objects(write_coco):
    register_coco_instances("empty", {}, *write_coco(3, annotations=[]))
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATALOADER.NUM_WORKERS", 0])
    assert len(build_detection_test_loader(cfg, ["empty"])) == 3


def test_test_loader_with_explicit_arguments():
    loader = build_detection_test_loader(
        [{"a": i} for i in range(5)], mapper=lambda r: r["a"], batch_size=2
    )
    assert list(loader) == [[0, 1], [2, 3], [4]]
    loader = build_detection_test_loader(
        Numbers(), mapper=None, sampler=[4, 2], collate_fn=lambda b: b[0]["index"]
    )
    assert list(loader) == [4, 2]


def test_data_set_without_the_proposals_asked_for_is_an_error(cfg):
    cfg.merge_from_list(["MODEL.LOAD_PROPOSALS", True, "DATASETS.TEST", ["other", "mine"]])
    cfg.DATASETS.PROPOSAL_FILES_TEST = ("of_other.pkl",)
    with pytest.raises(
        ValueError,
        match=r"PROPOSAL_FILES_TEST for each of DATASETS\.TEST, .* there is none for 'mine'",
    ):
        build_detection_test_loader(cfg, "mine")
    cfg.DATASETS.PROPOSAL_FILES_TEST = ("of_other.pkl", "of_mine.pkl")
    with pytest.raises(FileNotFoundError, match=r"of_mine\.pkl"):
        build_detection_test_loader(cfg, "mine")


def test_processes_share_the_test_images(monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        seen += [
            i for batch in build_detection_test_loader(list(range(5)), mapper=None) for i in batch
        ]
    assert seen == list(range(5))


def test_declared_data_set_is_registered_by_the_builders(write_coco, tmp_path, monkeypatch):
    write_coco(2)
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "DATASETS.TRAIN",
            ("declared",),
            "MODEL.ROI_HEADS.NUM_CLASSES",
            2,
            "SOLVER.IMS_PER_BATCH",
            1,
        ]
    )
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.REGISTER = [
        {"name": "declared", "format": "coco", "images": "images", "annotations": "train.json"}
    ]
    assert (
        len(take(build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True)), 2))
        == 2
    )
    assert MetadataCatalog.get("declared").thing_classes == ["cat", "dog"]


def test_what_workers_get_can_be_pickled(cfg):
    # Where processes are spawned (Windows, macOS), everything travels to the workers.
    for loader in (
        build_detection_train_loader(cfg).dataset,
        build_detection_test_loader(cfg, "mine"),
    ):
        dataset = pickle.loads(pickle.dumps(loader.dataset))
        pickle.dumps((loader.worker_init_fn, loader.collate_fn))
        assert len(dataset) == 6
