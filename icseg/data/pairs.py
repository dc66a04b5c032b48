"""Images and their masks in two folders, paired by file name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from icseg.data.images import list_images, stem_of


def pair_files(images: Path, masks: Path, kind: str, endings: Sequence[str]) -> list[tuple[Path, Path]]:
    """(image, mask) files of the two folders, STEM with STEM or STEM and one of `endings`; all must have a partner.

    kind: what messages call them, such as "support". Raises ValueError or an OSError that names a file or folder.
    """
    if images.resolve() == masks.resolve():
        raise ValueError(f"{kind} images and masks must be in two folders, got {images} for both")
    image_files = {stem_of(path): path for path in distinct_files(list_images(images), f"{kind} files")}
    if not image_files:
        raise ValueError(f"{kind} images must be at least one file, got none of a known format in {images}")

    def image_stem(mask: Path) -> str:
        stem = stem_of(mask)
        shorter = [stem.removesuffix(ending) for ending in endings]
        return next((name for name in (stem, *shorter) if name in image_files), stem)

    mask_files = {image_stem(path): path for path in distinct_files(list_images(masks), f"{kind} files", image_stem)}
    for stem, path in image_files.items():
        if stem not in mask_files:
            there = next((f"only others, such as {mask.name}" for mask in mask_files.values()), "none")
            *first, last = [stem, *(stem + ending for ending in endings)]
            names = f"{', '.join(first)} or {last}"
            raise ValueError(f"{kind} image {path} must have a mask named {names} in {masks}, got {there}")
    for stem, path in mask_files.items():
        if stem not in image_files:
            raise ValueError(f"{kind} mask {path} must have an image named {stem} in {images}, got none")
    return [(path, mask_files[stem]) for stem, path in image_files.items()]


def distinct_files(files: list[Path], what: str, stem: Callable[[Path], str] = stem_of) -> list[Path]:
    """The files themselves; ValueError where two have one stem. what: their name in the message."""
    by_stem: dict[str, Path] = {}
    for path in files:
        other = by_stem.setdefault(stem(path), path)
        if other is not path:
            raise ValueError(f"{what} must have different names without ending, got {other} and {path}")
    return files
