"""Networks: the configurable class of the ladder, timm models by name, their size, their weights."""

from __future__ import annotations

import timm
from torch import nn

from ffcv_convnext.config import ModelConfig, nearest
from ffcv_convnext.models.checkpointing import batch_norms, checkpoint_gradients, fixed_statistics
from ffcv_convnext.models.complexity import count_gmacs, count_parameters
from ffcv_convnext.models.kernels import use_triton
from ffcv_convnext.models.resnet import ResNet
from ffcv_convnext.models.weights import (
    ExportLayout,
    export_weights,
    fit_pretrained,
    load_pretrained,
    read_weights_file,
)

__all__ = [
    "ExportLayout",
    "ResNet",
    "batch_norms",
    "build_model",
    "count_gmacs",
    "count_parameters",
    "export_weights",
    "fit_pretrained",
    "fixed_statistics",
    "load_pretrained",
    "read_weights_file",
    "use_triton",
]


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build and initialise the network `config.model`: images (N, 3, H, W) -> logits (N, num_classes).

    Random numbers come from torch's global generator; under `torch.device("meta")` none are drawn.
    Raises ValueError for a name that timm does not have, or a setting that the model does not support.
    """
    model = ResNet(config, num_classes) if config.model == "resnet" else _build_timm(config, num_classes)
    if config.head_init_scale != 1:
        _scale_head(model, config)
    if config.grad_checkpointing:
        checkpoint_gradients(model, config.model)
    return model


def _build_timm(config: ModelConfig, num_classes: int) -> nn.Module:
    if not timm.is_model(config.model):
        raise ValueError(
            f"model = {config.model}: neither resnet nor a model of timm {timm.__version__}"
            + nearest(config.model, ["resnet", *timm.list_models()])
        )
    rate = {"drop_path_rate": config.drop_path} if config.drop_path > 0 else {}
    try:
        model: nn.Module = timm.create_model(config.model, num_classes=num_classes, **rate)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(
            f"drop_path = {config.drop_path} has no effect with model = {config.model}, which has no stochastic "
            "depth; use --drop_path 0"
        ) from None
    return model


def _scale_head(model: nn.Module, config: ModelConfig) -> None:
    head = model.head if isinstance(model, ResNet) else model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"head_init_scale = {config.head_init_scale:g} does not support model = {config.model}, whose head is no "
            "single layer; remove it"
        )
    for parameter in head.parameters():
        parameter.data.mul_(config.head_init_scale)
