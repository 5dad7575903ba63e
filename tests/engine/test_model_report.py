import logging

import pytest
import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer
from detkit.engine import (
    DefaultTrainer,
    format_module_table,
    module_rows,
    warn_about_random_fixed_norms,
)
from detkit.layers import Conv2d, EvalBatchNorm2d, FrozenBatchNorm2d, get_norm
from detkit.layers.norm import keep_in_eval_mode
from detkit.solver import get_default_optimizer_params


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        norms = [
            nn.BatchNorm2d(32),
            nn.BatchNorm2d(32).eval(),
            EvalBatchNorm2d(32),
            FrozenBatchNorm2d(32),
        ]
        self.body = nn.ModuleDict(
            {
                "stem": Conv2d(3, 32, 1, bias=False, norm=FrozenBatchNorm2d(32)),
                "norms": nn.Sequential(*norms),
                "others": nn.Sequential(*(get_norm(name, 32) for name in ("GN", "LN", "GN"))),
                "hooked": nn.Sequential(
                    nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4)
                ),
            }
        )
        keep_in_eval_mode(self.body["hooked"][0])
        self.scale = nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(32, 2)
        self.body["stem"].requires_grad_(False)


def _rows(depth=3, **settings):
    net = Net()
    groups = get_default_optimizer_params(
        net, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0, **settings
    )
    return net, {row.name: row for row in module_rows(net, torch.optim.SGD(groups, lr=0.1), depth)}


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_each_parameter_is_in_one_row(depth):
    net, rows = _rows(depth)
    assert sum(row.num_parameters for row in rows.values()) == sum(
        p.numel() for p in net.parameters()
    )
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(row.num_trained for row in rows.values()) == trained
    assert all(row.num_trained == 0 for row in rows.values() if row.name.startswith("body.stem"))


def test_rows_go_down_to_the_depth_and_layers_stay_whole():
    assert list(_rows(1)[1]) == ["(model)", "body", "fc"]
    assert list(_rows(2)[1]) == [
        "(model)",
        "body.stem",
        "body.norms",
        "body.others",
        "body.hooked",
        "fc",
    ]
    rows = _rows(3)[1]
    assert {"body.stem", "body.norms.0", "body.others.1"} <= rows.keys()
    assert rows["(model)"].num_parameters == 2


def test_norms_are_counted_by_kind_and_mode():
    rows = _rows(2)[1]
    assert rows["body.stem"].norms == ("1 FrozenBN",)
    assert rows["body.norms"].norms == ("1 BN train", "2 BN eval", "1 FrozenBN")
    assert rows["body.others"].norms == ("2 GN", "1 LN")
    assert rows["body.hooked"].norms == ("1 BN eval", "1 SyncBN train", "1 InstanceNorm2d")
    assert rows["fc"].norms == ()


def test_learning_rates_are_factors_and_weight_decays_are_listed():
    rows = _rows(2, bias_lr_factor=2.0)[1]
    assert rows["fc"].lr_factors == (1.0, 2.0)
    assert rows["fc"].weight_decays == (1e-4,)
    # "LN" decays, as in Detectron2.
    assert rows["body.others"].weight_decays == (0.0, 1e-4)
    assert rows["body.stem"].lr_factors == rows["body.stem"].weight_decays == ()


def test_warm_up_does_not_show():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.001)
    assert all(row.lr_factors in ((), (1.0,)) for row in module_rows(net, optimizer))


def test_shared_parameters_count_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    rows = module_rows(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert [row.num_parameters for row in rows] == [6, 2]


def test_table_shows_the_rows_and_their_sum():
    net, rows = _rows(2, bias_lr_factor=2.0)
    lines = format_module_table(list(rows.values())).splitlines()
    assert lines[0].split() == [
        "module",
        "parameters",
        "train",
        "norms",
        "lr",
        "x",
        "weight",
        "decay",
    ]
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert cells["body.stem"] == ["96", "0", "1", "FrozenBN", "-", "-"]
    assert cells["fc"] == ["66", "66", "1,", "2", "0.0001"]
    assert int(cells["all"][0].replace(",", "")) == sum(p.numel() for p in net.parameters())


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_fixed_norms_that_nothing_was_loaded_for_are_warned_about(caplog):
    warn_about_random_fixed_norms(Net(), None)
    (message,) = _warnings(caplog)
    assert message.startswith(
        "2 of 2 FrozenBN layers (body.stem.norm, ...) are fixed as they were built"
    )
    assert "MODEL.RESNETS.NORM BN or GN with MODEL.BACKBONE.FREEZE_AT 0" in message


def test_fixed_norms_that_were_loaded_or_are_not_there_are_not(caplog, tmp_path):
    DetectionCheckpointer(Net(), str(tmp_path)).save("weights")
    net = Net()
    checkpointer = DetectionCheckpointer(net, str(tmp_path))
    checkpointer.load(str(tmp_path / "weights.pth"))
    warn_about_random_fixed_norms(net, checkpointer.load_report)
    warn_about_random_fixed_norms(nn.BatchNorm2d(3), None)
    assert _warnings(caplog) == []


class FrozenInside(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        return FrozenBatchNorm2d.convert_frozen_batchnorm(model)


def test_trainer_logs_the_table_and_warns_when_it_starts_from_nothing(tiny_cfg, caplog):
    with caplog.at_level(logging.INFO, logger="detkit"):
        trainer = FrozenInside(tiny_cfg)
        (table,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("modules:")]
        assert {"conv", "norm", "head", "all"} <= {
            line.split()[0] for line in table.splitlines()[3:]
        }
        assert not any("FrozenBN layers" in message for message in _warnings(caplog))
        trainer.resume_or_load(resume=False)
    assert len([m for m in _warnings(caplog) if "FrozenBN layers (norm" in m]) == 1


def test_parts_that_bring_published_weights_speak_for_themselves(caplog):
    class Published(nn.Sequential):
        def load_initial_weights(self):
            return "somewhere"

    warn_about_random_fixed_norms(
        nn.ModuleDict({"backbone": Published(FrozenBatchNorm2d(2))}), None
    )
    assert caplog.text == ""
