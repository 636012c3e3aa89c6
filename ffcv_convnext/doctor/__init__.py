"""Storage, decode, transfer, augmentation and step measured apart, and what they mean for a run on a node."""

from ffcv_convnext.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
