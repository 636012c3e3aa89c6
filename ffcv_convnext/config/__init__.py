"""Every setting of a run: its type, range, explanation and flag. Imports neither torch nor numpy."""

from ffcv_convnext.config.fields import (
    Setting,
    check_ranges,
    collect_settings,
    format_value,
    nearest,
    setting,
    to_plain,
)
from ffcv_convnext.config.flags import add_flags, add_setting_flags, config_from_args, settings_from_args
from ffcv_convnext.config.timm_defaults import timm_images
from ffcv_convnext.config.train import (
    GROUPS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    KERNEL_SIZES,
    SETTINGS,
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    differences,
    find_setting,
    steps_per_epoch,
)
from ffcv_convnext.config.yaml_files import load_config, read_mapping, read_yaml

__all__ = [
    "GROUPS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "KERNEL_SIZES",
    "SETTINGS",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "Setting",
    "add_flags",
    "add_setting_flags",
    "check_ranges",
    "collect_settings",
    "config_from_args",
    "differences",
    "find_setting",
    "format_value",
    "load_config",
    "nearest",
    "read_mapping",
    "read_yaml",
    "setting",
    "settings_from_args",
    "steps_per_epoch",
    "timm_images",
    "to_plain",
]
