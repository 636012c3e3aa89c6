"""Small networks of several libraries, their weights under each other's names, and a comparison of logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torchvision
from support import REPOSITORY
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from ffcv_convnext.config import load_config
from ffcv_convnext.models import build_model

State = Mapping[str, Tensor]

CONFIGS = REPOSITORY / "rn_configs"
SMALL_CONVNEXT = load_config(
    CONFIGS / "convnext_tiny.yaml", overrides={"resnet_layers": "1-2-1-1", "resnet_embed_dim": 8, "drop_path": 0}
)
SMALL_RESNET = load_config(CONFIGS / "00_resnet50.yaml", overrides={"resnet_layers": "1-2-1-1", "drop_path": 0})
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module) -> nn.Module:
    """Random norms, biases, layer scales and running statistics: fresh ones would hide a wrong name."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1:
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(IMAGES)
    return result


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    assert (logits(theirs).std(0) > 1e-4).any(), "logits do not depend on the image"
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5


def small_timm_convnext() -> nn.Module:
    return randomise(ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 32, 64)))


def small_torchvision_convnext() -> nn.Module:
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 2), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)]
    return randomise(torchvision.models.ConvNeXt(blocks, num_classes=7))


def small_torchvision_resnet() -> nn.Module:
    return randomise(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=7))


# --- other libraries' names, written down from their sources --------------------------------------------------------


def renamed(state: State, *rules: tuple[str, str]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


def released(timm_state: State) -> dict[str, Tensor]:
    """The paper's names: facebookresearch/ConvNeXt, models/convnext.py."""
    return renamed(
        timm_state,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc", ".pwconv"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )


def transformers_convnext(timm_state: State) -> dict[str, Tensor]:
    """ConvNextForImageClassification's names, by the rules of transformers' convert_convnext_to_pytorch.py."""
    return renamed(
        released(timm_state),
        (r"^downsample_layers\.0\.0", "embeddings.patch_embeddings"),
        (r"^downsample_layers\.0\.1", "embeddings.norm"),
        (r"^stages\.(\d)", r"stages.\1.layers"),
        (r"^downsample_layers\.(\d)", r"stages.\1.downsampling_layer"),
        (r"^stages", "encoder.stages"),
        ("norm", "layernorm"),
        ("gamma", "layer_scale_parameter"),
        (r"^(?!head)", "convnext."),
        (r"^head", "classifier"),
    )


def openmmlab_convnext(timm_state: State) -> dict[str, Tensor]:
    """An ImageClassifier's names: mmpretrain/models/backbones/convnext.py."""
    return renamed(
        released(timm_state),
        ("dwconv", "depthwise_conv"),
        ("pwconv", "pointwise_conv"),
        (r"^norm", "norm3"),
        (r"^(?!head)", "backbone."),
        (r"^head", "head.fc"),
    )


def transformers_resnet(torchvision_state: State) -> dict[str, Tensor]:
    """ResNetForImageClassification's names: transformers/models/resnet/modeling_resnet.py."""
    return renamed(
        torchvision_state,
        (r"^conv1", "resnet.embedder.embedder.convolution"),
        (r"^bn1", "resnet.embedder.embedder.normalization"),
        *((f"^layer{i + 1}", f"resnet.encoder.stages.{i}.layers") for i in range(4)),
        *((rf"\.conv{i + 1}\.", f".layer.{i}.convolution.") for i in range(3)),
        *((rf"\.bn{i + 1}\.", f".layer.{i}.normalization.") for i in range(3)),
        (r"downsample\.0", "shortcut.convolution"),
        (r"downsample\.1", "shortcut.normalization"),
        (r"^fc", "classifier.1"),
    )


def openmmlab_resnet(torchvision_state: State) -> dict[str, Tensor]:
    """An ImageClassifier's names: mmpretrain/models/backbones/resnet.py."""
    return renamed(torchvision_state, (r"^(?!fc)", "backbone."), (r"^fc", "head.fc"))


def as_they_are(state: State) -> dict[str, Tensor]:
    return dict(state)


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[State], dict[str, Tensor]]]] = {
    "timm's ConvNeXt": (small_timm_convnext, as_they_are),
    "the paper's ConvNeXt": (small_timm_convnext, released),
    "transformers' ConvNext": (small_timm_convnext, transformers_convnext),
    "OpenMMLab's ConvNeXt": (small_timm_convnext, openmmlab_convnext),
    "torchvision's ConvNeXt": (small_torchvision_convnext, as_they_are),
    "torchvision's ResNet": (small_torchvision_resnet, as_they_are),
    "transformers' ResNet": (small_torchvision_resnet, transformers_resnet),
    "OpenMMLab's ResNet": (small_torchvision_resnet, openmmlab_resnet),
}


def our_network(layout: str, num_classes: int = 7) -> nn.Module:
    return build_model((SMALL_RESNET if layout.endswith("ResNet") else SMALL_CONVNEXT).model, num_classes)
