"""Where a run is computed: flags beside a run's own settings, and a profile file for values that stay the same.

They are not part of a run's config.yaml, because the same run may continue elsewhere.
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
    check_ranges,
    collect_settings,
    format_value,
    nearest,
    read_mapping,
    setting,
    to_plain,
)

OTHER = "slurm_"  # prefix of any other sbatch option


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the run is computed: with --job_dir it is submitted, without it runs here."""

    job_dir: Path | None = setting(
        None,
        "submit the run as a job; folder for the job's files, also the run folder unless --output_dir is set",
    )
    executor: Literal["slurm", "local", "debug"] = setting(
        "slurm", "slurm: a batch job; local: processes on this machine; debug: this process"
    )
    nodes: int = setting(1, "nodes to request", minimum=1)
    ngpus: int | None = setting(
        None,
        "GPUs per node, one process each (with --device cpu: processes, no GPUs); none: 8, or all with executor local",
        minimum=1,
    )
    timeout: float = setting(
        72.0, "time limit of a job, hours; then it is requeued and continues", above=0, maximum=100_000
    )
    partition: str | None = setting(None, "partition to submit to; none: the cluster's default")
    constraint: str | None = setting(None, "features the nodes must have")
    account: str | None = setting(None, "account to charge")
    qos: str | None = setting(None, "quality of service")
    comment: str | None = setting(None, "comment for the scheduler")
    exclude: str | None = setting(None, "nodes to exclude")
    mem_gb: float | None = setting(None, "memory per node, GB; none: the cluster's default", above=0, maximum=1_000_000)
    cpus_per_task: int = setting(10, "CPU cores per process", minimum=1)
    job_name: str = setting("convnext", "start of the job's name in the queue; an id follows")
    after: Path | None = setting(
        None,
        "job_dir of a conversion (write_ffcv_dataset.py --job_dir); the run starts when its .beton files are complete",
    )
    sbatch: Mapping[str, str] = field(default_factory=dict)  # any other sbatch option, without the prefix slurm_

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.executor != "slurm" and self.nodes > 1:
            raise ValueError(f"nodes = {self.nodes}: executor {self.executor} uses only this machine; use --nodes 1")
        if self.after is not None and self.executor != "slurm":
            raise ValueError(
                f"after = {self.after}: executor {self.executor} cannot wait for a Slurm job; remove --after"
            )
        if self.after is not None and "dependency" in self.sbatch:
            raise ValueError(f"after = {self.after} and slurm_dependency exclude each other; remove one of them")
        if {"job_name", "job-name"} & self.sbatch.keys():
            raise ValueError("slurm_job_name: the name holds the submission's id; give its start with --job_name NAME")
        if self.job_dir is not None and "%" in str(self.job_dir):
            raise ValueError(
                f"job_dir = {self.job_dir}: expected a path without %, because every job of a run uses the same folder"
            )

    @property
    def timeout_minutes(self) -> int:
        """The time limit in whole minutes, rounded up."""
        return math.ceil(round(self.timeout * 60, 6))  # 1.1 hours are 66 minutes


GROUPS: dict[str, type] = {"cluster": ClusterConfig}
CLUSTER_SETTINGS = collect_settings(GROUPS)
assert not CLUSTER_SETTINGS.keys() & SETTINGS.keys(), "a run's setting has the same name"


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Declare --cluster, --dry_run and one flag for every setting above; `split_slurm_options` reads --slurm_NAME."""
    add_setting_flags(parser, GROUPS)
    section = parser.add_argument_group("submission")
    section.add_argument(
        "--cluster", type=Path, metavar="YAML", help="profile with settings of the group cluster; flags override it"
    )
    section.add_argument(
        "--dry_run", action="store_true", help="print the sbatch script and the resolved config; submit nothing"
    )
    section.add_argument(
        "--slurm_NAME", metavar="VALUE", help="any other sbatch option, e.g. --slurm_reservation x", dest="_"
    )


def split_slurm_options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split --slurm_NAME VALUE off a command line; return the rest and {NAME: VALUE}."""
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
            raise ValueError(f"{name}: expected a value; for an option without a value write {name} true")
        options[name[len(f"--{OTHER}") :]] = found
    return rest, options


def read_profile(path: Path) -> dict[str, Any]:
    """Return a profile's values, parsed. Raises FileNotFoundError, or ValueError for an unknown name or a bad value."""
    if not path.is_file():
        raise FileNotFoundError(f"cluster = {path} does not exist; docs/cluster.md shows a profile")
    values = read_mapping(path)
    if not values:
        raise ValueError(f"{path} holds no settings; docs/cluster.md shows a profile")
    for name in values:
        if not name.startswith(OTHER) and name not in CLUSTER_SETTINGS:
            known = [*CLUSTER_SETTINGS, *SETTINGS]
            hint = "; it is a setting of a run, set it in --config" if name in SETTINGS else nearest(name, known)
            raise ValueError(f"{path}: unknown setting '{name}'{hint}")
        if isinstance(values[name], dict | list if name.startswith(OTHER) else dict):
            raise ValueError(f"{path}: {name} = {values[name]}: expected one value")
    try:
        return {
            name: format_value(value) if name.startswith(OTHER) else CLUSTER_SETTINGS[name].parse(value)
            for name, value in values.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def cluster_from_args(namespace: argparse.Namespace, sbatch: Mapping[str, str]) -> ClusterConfig:
    """Return the cluster settings: defaults < profile < flags. sbatch: from `split_slurm_options`.

    Raises ValueError if a flag about the submission is given without --job_dir.
    """
    given = {name: getattr(namespace, name) for name in CLUSTER_SETTINGS if hasattr(namespace, name)}
    profile = {} if namespace.cluster is None else read_profile(namespace.cluster)
    options = {name[len(OTHER) :]: value for name, value in profile.items() if name.startswith(OTHER)}
    values = {name: value for name, value in profile.items() if not name.startswith(OTHER)} | given
    config = ClusterConfig(
        **{name: CLUSTER_SETTINGS[name].parse(value) for name, value in values.items()}, sbatch={**options, **sbatch}
    )
    submitting = [*given, *(f"{OTHER}{name}" for name in sbatch)]
    submitting += [name for name in ("cluster", "dry_run") if getattr(namespace, name)]
    if config.job_dir is None and submitting:
        raise ValueError(f"--{submitting[0]} has no effect without --job_dir DIR, which submits the run as a job")
    return config


def flat(config: ClusterConfig) -> dict[str, Any]:
    """Return every setting by its flat name, as plain values."""
    values = {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name != "sbatch"}
    return values | {f"{OTHER}{name}": value for name, value in config.sbatch.items()}
