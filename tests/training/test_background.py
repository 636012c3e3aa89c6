"""Copies in host memory and the thread that writes them."""

from __future__ import annotations

import torch
from support.runs import assert_equal

from ffcv_convnext.training.background import Snapshot


def test_a_snapshot_uses_its_memory_again_and_keeps_layouts() -> None:
    snapshot = Snapshot()
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    first = snapshot.take({"a": {0: [weight, 1]}})
    place = first["a"][0][0].data_ptr()
    assert place != weight.data_ptr()
    second = snapshot.take({"a": {0: [weight + 1, 2]}})
    assert second["a"][0][0].data_ptr() == place
    assert second["a"][0][0].stride() == weight.stride()
    assert_equal(second, {"a": {0: [weight + 1, 2]}})


def test_a_snapshot_keeps_the_versions_of_a_state_dict() -> None:
    state = torch.nn.BatchNorm2d(3).state_dict()
    copied = Snapshot().take({"model": state})["model"]
    assert copied._metadata == state._metadata
    assert list(copied) == list(state)
