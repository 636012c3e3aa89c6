"""A Slurm cluster of two nodes on this machine: Debian's slurm-wlm and munge, without systemd.

Everything runs as the user who runs the tests, in one folder: munged with its own key and socket, one slurmctld, two
slurmd with the names n1 and n2 on their own ports. No system-wide Slurm or munge is touched, and several such clusters
can run at the same time.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

NODES = ("n1", "n2")
GPUS, CPUS = 2, 8  # a node; the CPUs are more than the machine may have
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

# cred_expire is also how long Slurm makes a requeued job wait: 2 minutes by default.
# A GPU is a device file that nothing opens: Slurm counts them and sets CUDA_VISIBLE_DEVICES.
SLURM_CONF = """
ClusterName=two-nodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
KillWait=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1
PartitionName=short Nodes=n1,n2 MaxTime=1 PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def wait_until(condition: Callable[[], Any], seconds: float, what: str | Callable[[], str]) -> Any:
    """The condition's first true value. Fails after `seconds`; the message is computed then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
    return found


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines by process id of everything that has this cluster's configuration in its environment."""
    mark = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # already ended, or another user's
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def tails(files: Iterable[Path], lines: int = 25) -> str:
    """The last lines of text files, each under its name."""
    ends = [(path.name, path.read_text(errors="replace").splitlines()[-lines:]) for path in files]
    return "\n".join(line for name, end in ends for line in (f"--- {name}", *end))


@dataclass
class TwoNodes:
    """A context manager; on exit it ends every daemon and job, and removes the folder.

    folder: empty, with a short path because of the socket; default: a new temporary folder.
    """

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="two-nodes-")))
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of commands that use this cluster."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> TwoNodes:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the jobs, then the daemons, then all other processes, each within a bounded time."""
        try:
            if "slurmctld" in self.daemons:
                self.cancel_all(seconds=30)
        finally:
            for name in reversed(self.daemons):  # munged last: the others need it
                self.daemons[name].terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.daemons[name].wait(10)
            for pid in processes_of(self.folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self.daemons.values():
                daemon.wait(10)
            wait_until(lambda: not processes_of(self.folder), 10, lambda: f"an end of {processes_of(self.folder)}")
            shutil.rmtree(self.folder)

    def _start(self) -> None:
        self.folder.chmod(0o711)  # munged requires that every user can reach its socket
        with contextlib.ExitStack() as probes:  # all open at once, so that the ports differ
            sockets = [probes.enter_context(socket.socket()) for _ in range(3)]
            for probe in sockets:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in sockets]
        names = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**names, ports=ports, cpus=CPUS, gpus=GPUS))
        gres = []
        for node in NODES:
            for i in range(GPUS):
                (self.folder / f"{node}-gpu{i}").symlink_to("/dev/null")
            gres.append(f"NodeName={node} Name=gpu File={self.folder}/{node}-gpu[0-{GPUS - 1}]\n")
        (self.folder / "gres.conf").write_text("".join(gres))
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        self._daemon("munged", "--foreground", *(f"--{k}={self.folder}/munge.{end}" for k, end in files.items()))
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        self._wait_for(lambda: self.ask(*states).split() == ["idle", "idle"], "two idle nodes")

    def _daemon(self, *command: str, name: str | None = None) -> None:
        """Start in a new session: Ctrl-C goes to pytest only, which then stops the daemon."""
        name = name or command[0]
        with open(self.folder / f"{name}.log", "wb") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_for(self, condition: Callable[[], Any], what: str) -> None:
        def settled() -> bool:
            return bool(condition()) or any(daemon.poll() is not None for daemon in self.daemons.values())

        wait_until(settled, 60, lambda: f"{what}\n{self.logs()}")
        for name, daemon in self.daemons.items():
            assert daemon.poll() is None, f"{name} ended with status {daemon.returncode}\n{self.logs()}"

    def logs(self) -> str:
        return tails(sorted(self.folder.glob("*.log")))

    def ask(self, *command: str) -> str:
        """A Slurm command's output; empty when it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return result.stdout.strip()

    def command(self, *command: str) -> str:
        """A Slurm command's output; an assertion fails with its message."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout.strip()

    def queue(self) -> list[str]:
        """Jobs that have not ended, array tasks one by one: "ID STATE" from squeue, e.g. "7_1 PENDING"."""
        return self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines()

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`: JobState, Restarts, NumNodes, NumTasks, ExitCode, Partition, ..."""
        record = self.command("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", record))

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait_for_end(self, job_id: str, seconds: float = 150) -> dict[str, str]:
        """The job's record after its end, successful or not."""

        def ended() -> dict[str, str] | None:
            record = self.job(job_id)
            return record if record["JobState"] in ENDED else None

        return wait_until(ended, seconds, lambda: f"an end of {self.describe(job_id)}")

    def describe(self, job_id: str) -> str:
        """State of the job and the ends of its output, for the message of a failure."""
        record = self.job(job_id)
        facts = [f"{key} {record[key]}" for key in ("JobState", "Reason", "Restarts", "ExitCode", "NodeList")]
        output = {path for key in ("StdOut", "StdErr") for path in Path(record[key]).parent.glob(f"{job_id}*log.*")}
        return f"job {job_id}: {', '.join(facts)}\n{tails(sorted(path for path in output if path.is_file()))}"

    def cancel_all(self, seconds: float = 30) -> None:
        """Cancel every job and wait until its processes are gone."""
        self.ask("scancel", "--user", getpass.getuser())
        wait_until(lambda: not self.queue(), seconds, lambda: f"an empty queue: {self.queue()}\n{self.logs()}")
