"""The configs that come with detkit, found from any folder, and the weights published for them."""

from detkit.model_zoo.comparison import RecordedModel, compare_with_recorded
from detkit.model_zoo.model_zoo import (
    find_config,
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    list_configs,
)

__all__ = [
    "RecordedModel",
    "compare_with_recorded",
    "find_config",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "list_configs",
]
