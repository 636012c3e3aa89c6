"""Where a run shall be computed: flags beside a run's own settings, and a profile for what is the same every time.

They are no part of a run's config.yaml: the same run may go on elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ffcv_convnext.config import (
    SETTINGS,
    add_setting_flags,
    collect_settings,
    format_value,
    nearest,
    read_mapping,
    setting,
    to_plain,
)

OTHER = "slurm_"  # begins the name of any other sbatch option


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the run is computed; with --job_dir it is submitted, without it runs here."""

    job_dir: Path | None = setting(
        None,
        "submit instead of running here: folder for the job's files, and the run folder unless --output_dir is set",
    )
    executor: Literal["slurm", "local", "debug"] = setting(
        "slurm", "a batch job; processes on this machine, waited for; or this very process"
    )
    nodes: int = setting(1, "nodes to request")
    ngpus: int | None = setting(
        None, "GPUs to request on each node, a process each (none requested with --device cpu); none: 8, here all"
    )
    timeout: float = setting(72.0, "hours after which the job is stopped and put back into the queue")
    partition: str | None = setting(None, "partition to submit to; none: the cluster's default")
    constraint: str | None = setting(None, "features the nodes must have")
    account: str | None = setting(None, "account to charge")
    qos: str | None = setting(None, "quality of service")
    comment: str | None = setting(None, "comment for the scheduler")
    exclude: str | None = setting(None, "nodes to leave out")
    mem_gb: float | None = setting(None, "memory to request on each node, GB; none: the cluster's default")
    cpus_per_task: int = setting(10, "processor cores for each process")
    job_name: str = setting("convnext", "name of the job in the queue")
    sbatch: Mapping[str, str] = field(default_factory=dict)  # any other option of sbatch, without its slurm_

    def __post_init__(self) -> None:
        for name in ("nodes", "ngpus", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        if self.timeout <= 0:
            raise ValueError(f"timeout = {format_value(self.timeout)}: expected a positive number of hours")
        if self.mem_gb is not None and self.mem_gb <= 0:
            raise ValueError(f"mem_gb = {format_value(self.mem_gb)}: expected a positive number")
        if self.executor != "slurm" and self.nodes > 1:
            raise ValueError(f"nodes = {self.nodes}: executor {self.executor} has this machine only; --nodes 1")
        if self.job_dir is not None and "%" in str(self.job_dir):
            raise ValueError(
                f"job_dir = {self.job_dir}: expected a path without %; a run keeps its folder in every job"
            )

    @property
    def timeout_minutes(self) -> int:
        return math.ceil(round(self.timeout * 60, 6))  # 1.1 hours are 66 minutes


GROUPS: dict[str, type] = {"cluster": ClusterConfig}
CLUSTER_SETTINGS = collect_settings(GROUPS)
assert not CLUSTER_SETTINGS.keys() & SETTINGS.keys(), "a run's setting has the same name"


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Declare --cluster, --dry_run and one flag for every setting above; see `cluster_from_args` for --slurm_NAME."""
    add_setting_flags(parser, GROUPS)
    section = parser.add_argument_group("submission")
    section.add_argument(
        "--cluster", type=Path, metavar="YAML", help="profile: settings of the group cluster; flags win over it"
    )
    section.add_argument(
        "--dry_run", action="store_true", help="print the sbatch script and the resolved config, submit nothing"
    )
    section.add_argument(
        "--slurm_NAME", metavar="VALUE", help="any other option of sbatch, e.g. --slurm_reservation x", dest="_"
    )


def split_slurm_options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command line without its --slurm_NAME VALUE, and those: {NAME: VALUE}."""
    rest: list[str] = []
    options: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if not name.startswith(f"--{OTHER}"):
            rest.append(word)
            continue
        found = value if given else next(words, None)
        if found is None:
            raise ValueError(f"{name}: expected a value; for an option that takes none: {name} true")
        options[name[len(f"--{OTHER}") :]] = found
    return rest, options


def read_profile(path: Path) -> dict[str, Any]:
    """A profile's lines `name: value`, unparsed. Raises FileNotFoundError, or ValueError naming the nearest names."""
    if not path.is_file():
        raise FileNotFoundError(f"cluster = {path} does not exist; docs/cluster.md shows a profile")
    values = read_mapping(path)
    for name in map(str, values):
        if not name.startswith(OTHER) and name not in CLUSTER_SETTINGS:
            known = [*CLUSTER_SETTINGS, *SETTINGS]
            hint = "; it is a setting of runs and belongs into --config" if name in SETTINGS else nearest(name, known)
            raise ValueError(f"{path}: unknown setting '{name}'{hint}")
    return values


def cluster_from_args(namespace: argparse.Namespace, sbatch: Mapping[str, str]) -> ClusterConfig:
    """Defaults < the profile < flags. sbatch: of `split_slurm_options`.

    Raises ValueError where a flag says how to submit and there is no --job_dir to submit to.
    """
    given = {name: getattr(namespace, name) for name in CLUSTER_SETTINGS if hasattr(namespace, name)}
    profile = {} if namespace.cluster is None else read_profile(namespace.cluster)
    options = {name[len(OTHER) :]: format_value(value) for name, value in profile.items() if name.startswith(OTHER)}
    values = {name: value for name, value in profile.items() if not name.startswith(OTHER)} | given
    config = ClusterConfig(
        **{name: CLUSTER_SETTINGS[name].parse(value) for name, value in values.items()}, sbatch={**options, **sbatch}
    )
    submitting = [*given, *(f"{OTHER}{name}" for name in sbatch)]
    submitting += [name for name in ("cluster", "dry_run") if getattr(namespace, name)]
    if config.job_dir is None and submitting:
        raise ValueError(f"--{submitting[0]} has no meaning without --job_dir, the folder to submit a job from")
    return config


def flat(config: ClusterConfig) -> dict[str, Any]:
    """Every setting by its flat name, as plain values."""
    values = {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name != "sbatch"}
    return values | {f"{OTHER}{name}": value for name, value in config.sbatch.items()}
