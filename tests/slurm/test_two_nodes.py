"""The cluster of the other tests: it behaves like Slurm, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.two_nodes import TwoNodes, processes_of, wait_until

TESTS = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_both_nodes_and_again_after_a_requeue(cluster: TwoNodes, tmp_path: Path) -> None:
    script = "srun bash -c 'echo $SLURMD_NODENAME/$SLURM_PROCID/$SLURM_LOCALID/$CUDA_VISIBLE_DEVICES; sleep 60'"
    tasks = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--open-mode=append")
    job = cluster.command("sbatch", "--parsable", *tasks, f"--output={tmp_path}/out", f"--wrap={script}")
    expected = ["n1/0/0/0,1", "n1/1/1/0,1", "n2/2/0/0,1", "n2/3/1/0,1"]

    def lines() -> list[str]:
        return [line for line in (tmp_path / "out").read_text().splitlines() if line.startswith("n")]

    wait_until(lambda: (tmp_path / "out").exists() and sorted(lines()) == expected, 30, lambda: cluster.describe(job))
    cluster.command("scontrol", "requeue", job)
    wait_until(lambda: sorted(lines()) == sorted(expected * 2), 30, lambda: cluster.describe(job))
    record = cluster.job(job)
    assert (record["JobState"], record["Restarts"], record["NumNodes"]) == ("RUNNING", "1", "2")
    assert cluster.queue() == [f"{job} RUNNING"]


PROGRAM = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, {str(TESTS)!r})
from slurm.two_nodes import TwoNodes, processes_of, wait_until
with TwoNodes() as cluster:
    cluster.command("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=trap '' TERM; srun --ntasks=2 sleep 600")
    wait_until(lambda: str(processes_of(cluster.folder)).count("bin/sleep 600") == 2, 30, "a running job")
    print(cluster.folder, flush=True)
    {{}}
"""


@pytest.mark.parametrize("ending", ["raise ValueError", "time.sleep(60)  # until a Ctrl-C"])
def test_nothing_is_left_when_it_ends_badly(ending: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(ending)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        folder = Path(it.stdout.readline().strip())
        it.send_signal(signal.SIGINT if "Ctrl-C" in ending else signal.SIGCONT)
        _, message = it.communicate(timeout=90)
    assert it.returncode != 0
    assert message.splitlines()[-1] == ("KeyboardInterrupt" if "Ctrl-C" in ending else "ValueError")
    assert folder.name.startswith("two-nodes-")
    assert not folder.exists()
    assert not processes_of(folder)


def test_a_daemon_that_cannot_start_reports_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / ("too_long_for_the_path_of_a_socket" * 3)
    folder.mkdir()
    with pytest.raises(AssertionError, match=r"(?s)^munged ended with status 1\n--- munged.log\n.*Error: "):
        TwoNodes(folder).__enter__()
    assert not folder.exists()
    assert not processes_of(folder)
