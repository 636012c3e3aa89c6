"""Measure storage, decode, transfer, augmentation and step separately, and predict a run on a node."""

from ffcv_convnext.doctor.diagnosis import Diagnosis, diagnose
from ffcv_convnext.doctor.page import format_page

__all__ = ["Diagnosis", "diagnose", "format_page"]
