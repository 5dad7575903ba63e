"""Training and prediction: processes, loop, hooks, and defaults that tie the packages together."""

from detkit.config.command_line import default_argument_parser
from detkit.engine import hooks
from detkit.engine.default_predictor import DefaultPredictor
from detkit.engine.default_trainer import DefaultTrainer
from detkit.engine.launch import DEFAULT_TIMEOUT, create_ddp_model, launch
from detkit.engine.model_ema import ModelEMA
from detkit.engine.model_report import (
    format_module_table,
    module_rows,
    warn_about_random_fixed_norms,
)
from detkit.engine.predictor import Prediction, Predictor
from detkit.engine.run_config import prepare
from detkit.engine.setup import default_setup, default_writers
from detkit.engine.simple_trainer import AMPTrainer, SimpleTrainer
from detkit.engine.train_loop import HookBase, TrainerBase

__all__ = [
    "DEFAULT_TIMEOUT",
    "AMPTrainer",
    "DefaultPredictor",
    "DefaultTrainer",
    "HookBase",
    "ModelEMA",
    "Prediction",
    "Predictor",
    "SimpleTrainer",
    "TrainerBase",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "format_module_table",
    "hooks",
    "launch",
    "module_rows",
    "prepare",
    "warn_about_random_fixed_norms",
]
