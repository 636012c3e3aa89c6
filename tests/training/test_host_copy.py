"""Copies in host memory."""

from __future__ import annotations

import pytest
import torch
from support.runs import assert_equal

from ffcv_convnext.training.host_copy import HostCopy


def test_a_host_copy_uses_its_memory_again_and_keeps_layouts() -> None:
    copy = HostCopy()
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    first = copy.take({"a": {0: [weight, 1]}})
    place = first["a"][0][0].data_ptr()
    assert place != weight.data_ptr()
    second = copy.take({"a": {0: [weight + 1, 2]}})
    assert second["a"][0][0].data_ptr() == place
    assert second["a"][0][0].stride() == weight.stride()
    assert_equal(second, {"a": {0: [weight + 1, 2]}})


def test_a_host_copy_keeps_the_versions_of_a_state_dict() -> None:
    state = torch.nn.BatchNorm2d(3).state_dict()
    copied = HostCopy().take({"model": state})["model"]
    assert copied._metadata == state._metadata
    assert list(copied) == list(state)


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_page_locked_and_not_changed_by_later_work() -> None:
    weight = torch.rand(1 << 22, device="cuda")
    expected = weight.cpu()
    copied = HostCopy().take({"weight": weight})["weight"]
    weight.zero_()
    assert copied.is_pinned()
    assert torch.equal(copied, expected)
