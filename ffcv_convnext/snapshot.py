"""The commit of the running source, and a copy of it that later edits do not change."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
COMMIT = "COMMIT"  # in a snapshot: `source_commit` of the original
BESIDE = ("train.py", "rn_configs")  # beside the package in a checkout


def source_commit() -> str:
    """Return the commit of this package's source, with '+changes' if it was modified."""
    recorded = PACKAGE.parent / COMMIT
    if recorded.is_file():
        return recorded.read_text().strip()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def take_snapshot(folder: Path) -> Path:
    """Copy the package, train.py and rn_configs/ to a subfolder of `folder` named after their content.

    Returns the subfolder; an existing one is used again. It contains no data, runs or version control.
    """
    sources = [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    for name in BESIDE:
        beside = PACKAGE.parent / name
        sources += [beside] if beside.is_file() else sorted(path for path in beside.rglob("*") if path.is_file())
    contents = {str(path.relative_to(PACKAGE.parent)): path.read_bytes() for path in sources}
    contents[COMMIT] = f"{source_commit()}\n".encode()
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    snapshot = folder / digest.hexdigest()[:12]
    if snapshot.is_dir():
        return snapshot
    temporary = folder / f".{snapshot.name}.{os.getpid()}.tmp"
    try:
        for name, content in contents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        temporary.rename(snapshot)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not snapshot.is_dir():  # else another process created it in the meantime
            raise
    return snapshot
