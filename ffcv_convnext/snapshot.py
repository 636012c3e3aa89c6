"""The commit of the running source, and a copy of it that later edits do not change."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
COMMIT = "COMMIT"  # in a snapshot: `source_commit` of the original, then the digest of all other files
BESIDE = ("train.py", "rn_configs")  # beside the package in a checkout


def source_commit() -> str:
    """Return the commit of this package's source, with '+changes' if it was modified."""
    recorded = PACKAGE.parent / COMMIT
    if recorded.is_file():
        commit, _, digest = recorded.read_text(errors="replace").strip().partition("\n")
        return commit if digest == _digest(_contents()) else f"{commit.removesuffix('+changes')}+changes"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _contents() -> dict[str, bytes]:
    """Return the package, train.py and rn_configs/: paths and contents."""
    paths = [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    for name in BESIDE:
        beside = PACKAGE.parent / name
        paths += [beside] if beside.is_file() else sorted(path for path in beside.rglob("*") if path.is_file())
    return {str(path.relative_to(PACKAGE.parent)): path.read_bytes() for path in paths}


def _digest(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def take_snapshot(folder: Path) -> Path:
    """Copy the package, train.py and rn_configs/ to a subfolder of `folder` named after their content.

    Returns the subfolder. An existing one is used again, and a warning names files in it that had to be repaired. It
    contains no data, runs or version control.
    """
    contents = _contents()
    contents[COMMIT] = f"{source_commit()}\n{_digest(contents)}\n".encode()
    snapshot = folder / _digest(contents)[:12]
    if not snapshot.is_dir():
        temporary = folder / f".{snapshot.name}.{os.getpid()}.tmp"
        try:
            for name, content in contents.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            temporary.rename(snapshot)
            return snapshot
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not snapshot.is_dir():  # else another process created it in the meantime
                raise
    _repair(snapshot, contents)
    return snapshot


def _repair(snapshot: Path, contents: dict[str, bytes]) -> None:
    """Write the files of a snapshot again that are damaged or missing."""
    damaged = []
    for name, content in contents.items():
        path = snapshot / name
        if not path.is_file() or path.read_bytes() != content:
            damaged.append(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            new.write_bytes(content)
            new.replace(path)
    if damaged:
        log.warning("%s: %s did not match the source and were written again", snapshot, ", ".join(damaged[:5]))
