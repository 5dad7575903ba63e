"""The configs that come with detkit, found from any folder, and the weights published for them."""

from detkit.model_zoo.model_zoo import (
    find_config,
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    list_configs,
    published_weights,
)

__all__ = [
    "find_config",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "list_configs",
    "published_weights",
]
