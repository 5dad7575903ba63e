import inspect

import pytest

from detkit.config import configurable, get_cfg
from detkit.utils.errors import ConfigError, DataError


class Part:
    @configurable
    def __init__(self, *, seed: int, name: str = "part") -> None:
        self.seed, self.name = seed, name

    @classmethod
    def from_config(cls, cfg, scale=1):
        return {"seed": cfg.SEED * scale}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.SEED = 3
    return cfg


def test_cfg_and_explicit_arguments_give_the_same(cfg):
    assert Part(cfg).seed == Part(cfg=cfg).seed == Part(seed=3).seed == 3


def test_argument_beside_the_cfg_overrides(cfg):
    assert (Part(cfg, seed=9).seed, Part(cfg, name="x").name) == (9, "x")


def test_argument_of_from_config_goes_there(cfg):
    assert Part(cfg, scale=2).seed == Part(cfg, 2).seed == 6


def test_subclass_may_extend_from_config(cfg):
    class Child(Part):
        @classmethod
        def from_config(cls, cfg):
            return {**super().from_config(cfg), "name": "child"}

    assert Child(cfg).name == "child"


def test_function(cfg):
    @configurable(from_config=lambda cfg: {"seed": cfg.SEED})
    def build(*, seed):
        return seed

    assert (build(cfg), build(seed=1), build(cfg, seed=2)) == (3, 1, 2)


def test_missing_from_config_is_reported():
    class Bare:
        @configurable
        def __init__(self) -> None: ...

    with pytest.raises(
        TypeError, match="Bare is @configurable and needs a classmethod from_config"
    ):
        Bare()


def test_from_config_must_take_cfg_first(cfg):
    class Odd:
        @configurable
        def __init__(self) -> None: ...

        @classmethod
        def from_config(cls, config):
            return {}

    with pytest.raises(TypeError, match=r"must take `cfg` as its first argument, has \['config'\]"):
        Odd(cfg)


def test_only_init_can_be_decorated_without_from_config():
    with pytest.raises(TypeError, match="decorates __init__"):
        configurable(lambda x: x)


class Thresholds:
    def __init__(self, thresholds) -> None:
        if list(thresholds) != sorted(thresholds):
            raise ValueError(f"thresholds must rise, got {thresholds}")


class Network:
    @configurable
    def __init__(
        self, *, nms_thresh: float, topk: tuple[int, int], loss_weight: float, part: object = None
    ) -> None:
        for name, value in (("nms_thresh", nms_thresh), ("loss_weight", loss_weight)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if topk[0] < topk[1]:
            raise ValueError(f"the first of topk must be the larger, got topk={topk}")
        if topk[1] == 7:
            raise ValueError("seven is refused.")

    @classmethod
    def from_config(cls, cfg, thresholds=()):
        rpn = cfg.MODEL.RPN
        Thresholds(rpn.IOU_THRESHOLDS)
        Thresholds(thresholds)
        return {
            "nms_thresh": rpn.NMS_THRESH,
            "topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "loss_weight": rpn.LOSS_WEIGHT,
        }


class Model:
    @configurable
    def __init__(self, *, network: Network, seed: int) -> None:
        pass

    @classmethod
    def from_config(cls, cfg):
        return {"seed": cfg.SEED, "network": Network(cfg)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(["MODEL.RPN.NMS_THRESH", 7.0], "Network: nms_thresh must be in [0, 1], got 7.0 (set by MODEL.RPN.NMS_THRESH)", id="argument"),
        pytest.param(["MODEL.RPN.NMS_THRESH", 7.0, "MODEL.RPN.LOSS_WEIGHT", 7.0], "Network: nms_thresh must be in [0, 1], got 7.0 (set by MODEL.RPN.NMS_THRESH)", id="two of the value"),
        pytest.param(["MODEL.RPN.POST_NMS_TOPK_TRAIN", 5], "Network: the first of topk must be the larger, got topk=(5, 1000) (set by MODEL.RPN.POST_NMS_TOPK_TRAIN, MODEL.RPN.POST_NMS_TOPK_TEST)", id="tuple of two keys"),
        pytest.param(["MODEL.RPN.POST_NMS_TOPK_TEST", 7], "Network: seven is refused (built from the settings of MODEL.RPN)", id="no argument named"),
        pytest.param(["MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]], "Network: thresholds must rise, got [0.7, 0.3] (set by MODEL.RPN.IOU_THRESHOLDS)", id="raised in from_config"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("build", [Network, Model])
def test_error_of_the_constructor_names_class_and_key(cfg, settings, message, build):
    cfg.merge_from_list(settings)
    with pytest.raises(ConfigError) as caught:
        build(cfg)
    assert str(caught.value) == message
    assert type(caught.value.__cause__) is ValueError


def test_error_about_an_argument_of_the_caller_names_no_key(cfg):
    with pytest.raises(ConfigError) as caught:
        Network(cfg, nms_thresh=2)
    assert str(caught.value) == "Network: nms_thresh must be in [0, 1], got 2"


def test_error_without_a_config_is_left_alone():
    with pytest.raises(ValueError, match="^nms_thresh must") as caught:
        Network(nms_thresh=2, topk=(1, 1), loss_weight=1)
    assert not isinstance(caught.value, ConfigError)


def test_message_that_names_the_key_is_not_said_twice(cfg):
    class Old:
        @configurable
        def __init__(self, *, seed: int) -> None: ...

        @classmethod
        def from_config(cls, cfg):
            raise ValueError(f"SEED must be even, got {cfg.SEED}")

    with pytest.raises(ConfigError, match=r"^Old: SEED must be even, got 3$"):
        Old(cfg)


@pytest.mark.parametrize("error", [DataError("no such image"), KeyError("x")], ids=["data", "key"])
def test_other_errors_are_left_alone(cfg, error):
    class Raising:
        @configurable
        def __init__(self) -> None: ...

        @classmethod
        def from_config(cls, cfg):
            raise error

    with pytest.raises(type(error)) as caught:
        Raising(cfg)
    assert caught.value is error


def test_error_of_a_function_names_it_and_that_of_its_from_config_does_not(cfg):
    def from_config(cfg, data=()):
        return {"seed": cfg.SEED, "data": [int(d) for d in data]}

    @configurable(from_config=from_config)
    def build(*, seed, data):
        raise ValueError(f"seed must be even, got {seed}")

    with pytest.raises(ConfigError, match=r"^build: seed must be even, got 3 \(set by SEED\)$"):
        build(cfg)
    with pytest.raises(ValueError, match="^invalid literal") as caught:
        build(cfg, data=["x"])
    assert not isinstance(caught.value, ConfigError)


def test_reads_of_a_copy_are_named_too(cfg):
    class Copying(Network):
        @classmethod
        def from_config(cls, cfg):
            with cfg.edited() as cfg:
                cfg.MODEL.RPN.NMS_THRESH = 7.0
            return super().from_config(cfg)

    with pytest.raises(ConfigError, match=r"^Copying: .* \(set by MODEL\.RPN\.NMS_THRESH\)$"):
        Copying(cfg)


def test_signature_is_kept():
    assert list(inspect.signature(Part).parameters) == ["seed", "name"]


def test_class_without_from_config_is_also_an_attribute_error():
    class Lacking:
        @configurable
        def __init__(self, a=1):
            pass

    with pytest.raises(AttributeError, match="needs a classmethod from_config"):
        Lacking(a=2)
