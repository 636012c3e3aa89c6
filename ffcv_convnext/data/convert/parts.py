"""The parts of a conversion that several machines share: what is expected, what is there, and joining what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ffcv_convnext.data.beton import Manifest, Split
from ffcv_convnext.data.convert.journal import Journal
from ffcv_convnext.data.convert.open_sources import open_sources
from ffcv_convnext.data.convert.options import ConversionOptions, shard_stem
from ffcv_convnext.data.convert.plan import check_room, make_plans
from ffcv_convnext.data.convert.shards import join_shards

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a finished .beton of a split holds, if no file is skipped."""

    num_samples: int
    classes: tuple[str, ...]
    identity: str  # of its manifest, and of the manifests of its parts


@dataclass(frozen=True, slots=True)
class Part:
    """One of the parts of a split. The files lie in out_dir."""

    out_dir: Path
    split: Split
    index: int
    num_parts: int
    contents: Contents  # of the whole split

    @property
    def num_images(self) -> int:
        """Images of this part."""
        number = self.contents.num_samples
        return number * (self.index + 1) // self.num_parts - number * self.index // self.num_parts

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return shard_stem(self.split, self.index, self.num_parts)

    @property
    def files(self) -> list[Path]:
        """Its finished .beton and its journal: a newer one means that more images are saved."""
        return [self.out_dir / f"{self.stem}.beton", Journal(self.out_dir, self.stem).path]

    def num_done(self) -> int:
        """Return the number of images that are saved or skipped."""
        if is_finished(self.out_dir, self.split, self.contents) or self.is_finished():
            return self.num_images
        return Journal(self.out_dir, self.stem).num_done(self.contents.identity)

    def is_finished(self) -> bool:
        """Return whether its .beton is complete. Raises FileExistsError if there is another file of that name."""
        return _is_finished(self.out_dir / f"{self.stem}.beton", self.contents)

    def remove(self) -> None:
        """Remove its files, finished or not."""
        Journal(self.out_dir, self.stem).remove()
        beton = self.out_dir / f"{self.stem}.beton"
        for path in (beton, Manifest.path_for(beton), Manifest.files_path_for(beton)):
            path.unlink(missing_ok=True)


def expect(options: ConversionOptions, num_parts: int, say: Say) -> dict[Split, Contents]:
    """List the images of each split and check that the conversion can start.

    Raises what `convert` raises before work, and ValueError if a split has fewer images than parts.
    """
    plans = make_plans(open_sources(options), options, say)
    for plan in plans:
        if len(plan) < num_parts:
            raise ValueError(
                f"shards = {num_parts}: {plan.split} has only {len(plan)} images; use --shards {len(plan)} or fewer"
            )
    check_room(plans, options, say)
    return {plan.split: Contents(len(plan), plan.source.classes, plan.identity.beton) for plan in plans}


def is_finished(out_dir: Path, split: Split, contents: Contents) -> bool:
    """Return whether the split is converted and joined. Raises FileExistsError for a .beton with other images."""
    return _is_finished(out_dir / f"{split}.beton", contents)


def _is_finished(beton: Path, contents: Contents) -> bool:
    if not beton.exists():
        return False
    if Manifest.check(beton).identity != contents.identity:
        raise FileExistsError(
            f"{beton} has other images or settings; replace it with --overwrite, or choose another --out_dir"
        )
    return True


def join_parts(out_dir: Path, expected: Mapping[Split, Contents], num_parts: int, *, overwrite: bool, say: Say) -> None:
    """Join the parts of each split that is not joined yet, and remove what an interrupted join left behind.

    overwrite: replace a .beton with other images.   Raises what `join_shards` raises.
    """
    for split, contents in expected.items():
        parts = [Part(out_dir, split, index, num_parts, contents) for index in range(num_parts)]
        beton = out_dir / f"{split}.beton"
        if beton.exists() and Manifest.check(beton).identity == contents.identity:
            for part in parts:
                part.remove()
            say(f"{beton} is already complete")
        else:
            join_shards(out_dir, split, overwrite=overwrite, say=say)
