"""From ResNet-50 to ConvNeXt-T, one measured step at a time, on FFCV data."""

__version__ = "0.3.0"
