"""Verify, describe and repair .beton files."""

from ffcv_convnext.data.check.info import describe_data
from ffcv_convnext.data.check.repair import repair_data
from ffcv_convnext.data.check.verify import verify_data

__all__ = ["describe_data", "repair_data", "verify_data"]
