import pytest

from detkit.config import configurable, get_cfg


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
