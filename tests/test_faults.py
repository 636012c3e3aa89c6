"""What loading does when something is wrong, or goes on for long: see also test_loader.py and test_restart.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ffcv.reader")

TESTS = Path(__file__).parent


def test_no_mutated_sample_crashes_a_decoder_or_makes_it_leave_its_memory(tmp_path: Path) -> None:
    """20,000 mutated images through both decoders, and 4,800 samples of mutated tables; see fuzz.py."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "fuzz.py"), str(tmp_path), "21500", "1"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["images"]["mutated"] >= 20_000
    assert sum(counts["tables"].values()) == 4_800
    outcomes = {
        "ok",
        "its data lies outside the file",
        "its data does not start with a readable JPEG header",
        "its data has another size than the sample table says",
        "its JPEG data is damaged",
    }
    assert outcomes <= set(counts["images"]), "each of them was met"
    assert counts["images"]["mutated, decoded"] > 1000
    assert outcomes - {"its JPEG data is damaged"} | {"the sample table gives it an unknown encoding"} <= set(
        counts["tables"]
    )
