"""Options of the benchmarks, and the choice of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffcv_convnext.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of every benchmark."""

    photographs: Path | None  # folder of photographs to make images of; None: those of installed packages
    rounds: int  # measured rounds of each contestant
    peers: Sequence[str] | None  # beginnings of the row names to measure beside the reference; None: all
    progress: Callable[[str], None]  # is called with each line about the progress

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}: expected at least 1")

    def choose(self, names: Sequence[str], reference: str) -> list[str]:
        """Return the reference and the names that start with one of `peers`, ignoring case.

        Raises ValueError if no name starts with one of them.
        """
        if self.peers is None:
            return list(names)
        prefixes = tuple(peer.strip().lower() for peer in self.peers)
        for prefix in prefixes:
            if not any(name.lower().startswith(prefix) for name in names):
                raise ValueError(f"peers = {prefix}: expected the beginning of a row's name: {'; '.join(names)}")
        return [name for name in names if name == reference or name.lower().startswith(prefixes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderOptions(Options):
    """Options of the benchmarks that read a folder of images."""

    data_path: Path | None  # an ImageFolder; None: synthetic images
    num_images: int
    cores: int | None  # processor cores to use; None: all available ones

    def check_num_images(self, min_images: int) -> None:
        """Raise ValueError for fewer images than a batch."""
        if self.num_images < min_images:
            raise ValueError(f"num_images = {self.num_images}: expected at least {min_images}, one batch")

    def image_folder(self, work: Path, *, originals: bool = False) -> Path:
        """Make the folder of images in `work`; see synthetic_data.image_folder."""
        from ffcv_convnext.bench.synthetic_data import image_folder

        return image_folder(
            work / "images",
            self.num_images,
            data_path=self.data_path,
            photographs=self.photographs,
            originals=originals,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions(Options):
    """Options of the benchmarks of training's own parts."""

    config: Config
    seconds: float  # of a round of each contestant
    ladder: Path | None = None  # a folder with the YAML files of steps to measure instead of the peers
    flags: Mapping[str, Any] = field(default_factory=dict)  # settings that replace those of each step's file
