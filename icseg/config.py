"""Model configurations: frozen dataclasses whose every field is checked, and no key that is not a field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from icseg.baselines.dense import DenseConfig
    from icseg.published.config import PublishedConfig
    from icseg.sparse.config import SparseConfig


def check_keys(cls: type, values: dict[str, Any]) -> None:
    """Raise ValueError naming any key of `values` that is not a field of the dataclass `cls`."""
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(fields)}")


def check_int(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def check_ints(config: Any, least: int, *names: str, optional: bool = False) -> None:
    """Raise ValueError unless the fields `names` are ints of at least `least` (or None, if `optional`)."""
    for name in names:
        value = getattr(config, name)
        if not (optional and value is None):
            check_int(name, value, least)


def check_numbers(
    config: Any, *names: str, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> None:
    """Raise ValueError unless the fields `names` are finite numbers within the bounds."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not least <= value <= most or not value > above:
            bounds = f"above {above}" if above > -math.inf else f"of at least {least}"
            bounds = f"in [{least}, {most}]" if most < math.inf else bounds
            raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def check_bools(config: Any, *names: str) -> None:
    """Raise ValueError unless the fields `names` are bools."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(config, name)!r}")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the field `name` is one of `choices`."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")


@dataclass(frozen=True)
class PatchICLConfig:
    """Base of the architectures.

    `PatchICLConfig.sparse()` is the default model, `PatchICLConfig.published(image_size)` the model of
    arXiv 2604.12752, `PatchICLConfig.universeg()` the dense baseline.
    """

    architecture: ClassVar[str]

    @staticmethod
    def sparse(**fields: Any) -> SparseConfig:
        """The default architecture: only picked patches are encoded, the support set once."""
        from icseg.sparse.config import SparseConfig

        return SparseConfig(**fields)

    @staticmethod
    def published(image_size: int = 256, **fields: Any) -> PublishedConfig:
        """The published architecture at `image_size` pixels, with the settings of the paper's final runs."""
        from icseg.published.config import PublishedConfig

        return PublishedConfig.for_image_size(image_size, **fields)

    @staticmethod
    def universeg(**fields: Any) -> DenseConfig:
        """UniverSeg, the dense baseline (arXiv 2304.06131)."""
        from icseg.baselines.dense import DenseConfig

        return DenseConfig(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON) from which `from_dict` makes an equal configuration."""
        return {"architecture": self.architecture, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PatchICLConfig:
        """The configuration that `to_dict` described. Unknown architectures or keys raise ValueError."""
        from icseg.baselines.dense import DenseConfig
        from icseg.published.config import PublishedConfig
        from icseg.sparse.config import SparseConfig

        values = dict(values)
        name = values.pop("architecture", SparseConfig.architecture)
        known: tuple[type[PatchICLConfig], ...] = (SparseConfig, PublishedConfig, DenseConfig)
        architectures = {c.architecture: c for c in known}
        if name not in architectures:
            raise ValueError(f"architecture must be one of {', '.join(architectures)}, got {name!r}")
        return architectures[name]._from_fields(values)

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        """Override where a field is itself a dataclass or a tuple (JSON gives dicts and lists)."""
        check_keys(cls, values)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any field: what a checkpoint or a support memory was made for."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
