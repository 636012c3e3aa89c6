"""Triton kernels of the augmentation."""
