"""What a data set consists of, by the names of its files; no image is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icseg.data.folders.config import FORMATS, SourceConfig
from icseg.data.images import READERS, list_images, stem_of
from icseg.data.pairs import pair_files

MASK_ENDINGS = ("_mask", "_seg")


@dataclass(frozen=True)
class Item:
    """An image or volume with its mask; or a pack, which holds both and is its own mask.

    patient: whom it shows; None for a pack, which may say so itself.
    """

    image: Path
    mask: Path
    patient: str | None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.image,) if self.image == self.mask else (self.image, self.mask)


@dataclass(frozen=True)
class Listing:
    """config: of the data set; items: its images; class_names: by class id, as far as they are known."""

    config: SourceConfig
    items: list[Item]
    class_names: dict[int, str] = field(default_factory=dict)


def list_source(config: SourceConfig) -> Listing:
    """The images of a data set. Raises ValueError or an OSError that names the file or folder."""
    path = Path(config.path)
    if not path.exists():
        raise FileNotFoundError(f"data set {config.name} must be an existing folder or file, got {path}")
    kind = config.format or _recognised(config)
    if kind == "npz":
        return Listing(config, _pack_items(config))
    return _folders(config) if kind == "folders" else _nnunet(config)


def _recognised(config: SourceConfig) -> str:
    path = Path(config.path)
    found = {
        "folders": (path / config.images).is_dir() and (path / config.masks).is_dir(),
        "nnunet": (path / "dataset.json").is_file(),
        "npz": path.is_file() and path.suffix == ".npz",
    }
    kinds = [kind for kind in FORMATS if found[kind]]
    if len(kinds) != 1:
        raise ValueError(
            f"data set {config.name} must be a folder with {config.images} and {config.masks}, a folder with "
            f"dataset.json, or an .npz file, got {path}, which is {' and '.join(kinds) or 'none of these'}"
        )
    return kinds[0]


def _pack_items(config: SourceConfig) -> list[Item]:
    if config.patient:
        raise ValueError(f"patient must be left out for the pack {config.path}, which names its own")
    return [Item(Path(config.path), Path(config.path), None)]


def _folders(config: SourceConfig) -> Listing:
    root = Path(config.path)
    pairs = pair_files(root / config.images, root / config.masks, "training", MASK_ENDINGS)
    return Listing(config, [Item(image, mask, _patient(config, image, image.name)) for image, mask in pairs])


def _patient(config: SourceConfig, image: Path, file: str) -> str:
    """What the pattern matches in the name without ending, or the file itself."""
    if not config.patient:
        return file
    match = re.search(config.patient, stem_of(image))
    if match is None or match[1] is None:
        raise ValueError(f"patient must match the name of every image, got {config.patient!r} for {image}")
    return match[1]


def _nnunet(config: SourceConfig) -> Listing:
    """Channel 0 of the training cases; also without its number, as single channels had none in older sets."""
    root = Path(config.path)
    description = _description(root / "dataset.json")
    ending = description.get("file_ending", ".nii.gz")
    if ending not in READERS:
        raise ValueError(f"{root / 'dataset.json'} must have a file_ending of {', '.join(READERS)}, got {ending!r}")
    items = []
    for mask in list_images(root / "labelsTr"):
        if not mask.name.endswith(ending):
            continue
        case = mask.name[: -len(ending)]
        images = [root / "imagesTr" / f"{case}{channel}{ending}" for channel in ("_0000", "")]
        image = next((path for path in images if path.is_file()), None)
        if image is None:
            raise FileNotFoundError(f"training mask {mask} must have an image {images[0]}, got none")
        items.append(Item(image, mask, _patient(config, image, case)))
    if not items:
        raise ValueError(f"{root / 'labelsTr'} must hold at least one {ending} file, got none")
    return Listing(config, items, _class_names(description.get("labels"), root / "dataset.json"))


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"an nnU-Net data set must hold dataset.json, got {path.parent} without")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got a damaged file ({error})") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} must hold an object, got {type(description).__name__}")
    return description


def _class_names(labels: Any, path: Path) -> dict[int, str]:
    """{id: name} of `labels`, in nnU-Net's present order {name: id} or its former {id: name}.

    A label of several ids is a region; its parts are the classes, under their numbers.
    """
    if not isinstance(labels, dict):
        raise ValueError(f"{path} must hold labels, an object of names and class ids, got {labels!r}")
    names: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            names |= {int(part): str(part) for part in value if int(part) not in names}
            continue
        number, name = (key, value) if isinstance(value, str) and key.isdigit() else (value, key)
        if not str(number).isdigit():
            raise ValueError(f"{path} must give each label a class id, got {key!r}: {value!r}")
        names[int(number)] = str(name)
    return {number: name for number, name in names.items() if number and name != "ignore"}
