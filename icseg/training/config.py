"""The configuration of a training run: frozen dataclasses, read from TOML, every key and value checked."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from icseg.config import PatchICLConfig, check_bools, check_int, check_ints, check_keys, check_numbers
from icseg.data.folders import SourceConfig
from icseg.data.synthetic import TRAINING_SEEDS
from icseg.data.synthetic.task import MIN_SIZE
from icseg.losses import LossConfig
from icseg.training.augmentation.config import AugmentationConfig

METHODS = ("muon", "adamw")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class DataConfig:
    """Which tasks are seen, and how one step is made of them.

    pool:               folder of the task pool; "" is `pool` inside the run's folder. Missing tasks are
                        generated.
    fresh:              make the tasks while the training runs, on its device, and use each once: without a pool, and
                        whatever `tasks` says, which then is only the length of a pass in a schedule. For a GPU; a CPU
                        core makes about as many as it trains on.
    tasks:              tasks in the pool; subjects: images a task; size: pixels of a side; seed: of the
                        generator, below 10,000 (the seeds of held-out tasks lie above).
    fine_every:         every so many-th run of 50 tasks of the pool has twice the size (0: none); `sizes` must then say
                        what a step's images are brought to.
    absent:             share of the pool's tasks in which one image lacks class 1: it may be a target, not a support.
    validation_tasks:   held-out tasks that the log's Dice is taken on, class 1 alone.
    tasks_per_step:     T, tasks a step, or a micro-batch where a step accumulates several; targets: Q, targets that
                        share one support set.
    min_support, max_support: the support size of a step is drawn from this range, both ends included.
    classes:            most classes that a step asks for at once.
    multi_class:        share of the steps that ask for several: `classes`, or as many as each of its tasks has. The
                        published architecture takes one: 0.
    other_class:        probability that a task asks for one of its further classes in a step of one class.
    sizes:              the longer side of a step's images, one drawn for each step, in pixels; none keeps theirs.
    augmentation:       random changes of each task; its tables [data.augmentation], [data.augmentation.task] and
                        [data.augmentation.example] change single values of the defaults.
    sources:            tables [[data.sources]]: data sets on disk that tasks are drawn from beside the synthetic pool.
                        Their images are scaled to `size`, and `tasks` counts the tasks of all.
    synthetic_weight:   share of the synthetic tasks, beside the sources' weights; 0 makes no training pool.
    cache:              folder of the sources' images as they are read; "" is `cache` inside the run's folder.
    """

    pool: str = ""
    fresh: bool = False
    tasks: int = 1600
    subjects: int = 6
    size: int = 256
    fine_every: int = 0
    absent: float = 0.03
    seed: int = 0
    validation_tasks: int = 16
    tasks_per_step: int = 2
    targets: int = 3
    min_support: int = 1
    max_support: int = 3
    classes: int = 4
    multi_class: float = 0.25
    other_class: float = 0.3
    sizes: tuple[int, ...] = ()
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    sources: tuple[SourceConfig, ...] = ()
    synthetic_weight: float = 1.0
    cache: str = ""

    def __post_init__(self) -> None:
        check_ints(self, 1, "tasks", "subjects", "tasks_per_step", "targets", "min_support", "size", "classes")
        check_ints(self, 0, "validation_tasks", "fine_every")
        check_bools(self, "fresh")
        if self.fresh and self.sources:
            raise ValueError("fresh must be false where tasks are mixed with those of data sources, got true")
        if self.fine_every and not self.sizes:
            raise ValueError("sizes must not be empty where fine_every gives tasks of two sizes, got none")
        check_numbers(self, "synthetic_weight", least=0)
        check_numbers(self, "absent", least=0, most=1)
        check_numbers(self, "multi_class", "other_class", least=0, most=1)
        if not isinstance(self.sizes, tuple):
            raise ValueError(f"sizes must be a list of ints, got {self.sizes!r}")
        for size in self.sizes:
            check_int("sizes", size, MIN_SIZE)
        if self.seed not in TRAINING_SEEDS:
            raise ValueError(
                f"seed must lie in [0, {TRAINING_SEEDS.stop}), apart from the seeds of held-out tasks, got {self.seed}"
            )
        if self.max_support < self.min_support:
            raise ValueError(f"max_support must be at least min_support = {self.min_support}, got {self.max_support}")
        if self.max_support + self.targets > self.subjects:
            raise ValueError(
                f"max_support + targets must be at most subjects = {self.subjects}, "
                f"got {self.max_support} + {self.targets}"
            )
        if not self.synthetic_weight and not self.sources:
            raise ValueError("synthetic_weight must be above 0 where there are no sources, got 0")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, got {', '.join(names)}")


@dataclass(frozen=True)
class OptimiserConfig:
    """Muon or AdamW, gradient clipping, the moving average of the weights, and gradient accumulation.

    method:       "muon" takes the weights of linear and convolution layers along their orthogonalised momentum, with
                  `muon_ratio` times the learning rate, and the other parameters by AdamW, as "adamw" takes all.
    weight_decay: on the weights of linear and convolution layers only.
    clip:         largest gradient norm.
    ema:          decay of the moving average that is validated and saved; 0 is the weights themselves.
    accumulate:   micro-batches a step, of `tasks_per_step` tasks each; the gradient is their mean. Several processes
                  share them out, so that it must be a multiple of their number.
    """

    method: str = "muon"
    muon_ratio: float = 13.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.998
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_ints(self, 1, "accumulate")
        check_numbers(self, "muon_ratio", above=0)
        if not self.learning_rate > 0 or not self.clip > 0:
            raise ValueError(f"learning_rate and clip must be above 0, got {self.learning_rate} and {self.clip}")
        check_numbers(self, "weight_decay", least=0)
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine down to `floor` times the learning rate.

    steps:       optimiser steps of the run.
    stop:        steps after which the run ends although its schedule goes on, as a first stage does; 0 is none.
    max_minutes: wall-clock budget; 0 is none. Progress is then the larger of steps done and time spent, so
                 how far the run gets, and with it the result, depends on the machine: only a run without this
                 budget gives the same weights when it is repeated or resumed.
    warmup:      steps of the warm-up.
    """

    steps: int = 2000
    stop: int = 0
    max_minutes: float = 0.0
    warmup: int = 100
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_ints(self, 1, "steps")
        check_ints(self, 0, "stop", "warmup")
        if self.stop > self.steps:
            raise ValueError(f"stop must be at most steps = {self.steps}, got {self.stop}")
        check_numbers(self, "max_minutes", least=0)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the run that is over after `step` steps and `elapsed` seconds, in [0, 1]."""
        spent = elapsed / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(step / self.steps, spent))

    def is_over(self, step: int, elapsed: float) -> bool:
        """Whether the run ends after `step` steps and `elapsed` seconds."""
        return self.progress(step, elapsed) >= 1 or 0 < self.stop <= step

    def factor(self, step: int, progress: float) -> float:
        """What the learning rate is multiplied by at `step` (from 0)."""
        warmup = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warmup * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class RunConfig:
    """How the run is carried out; the only section that may differ when a run is resumed, but for `seed`.

    seed:               fixes the initial weights, the order of the data, the augmentation and every draw.
    initial:            checkpoint whose weights the run starts from; "" starts from random ones.
    precision:          "auto" is bfloat16 autocast where the device has it in hardware, else float32.
    checkpoint_minutes: minutes between checkpoints; checkpoint_steps: steps between them, 0 is by time only.
    validate_steps:     steps between validations; log_steps: steps between rows of the log.
    keep_steps:         steps between copies of the averaged weights that are kept, model-STEP.safetensors; 0 is none.
    tensorboard:        also write the log as event files for TensorBoard (needs the extra `train`).
    workers:            processes that make missing tasks of the pool; 0 makes them in this one.
    licence:            of the trained weights, an SPDX identifier; it is written into their files.
    """

    seed: int = 0
    initial: str = ""
    precision: str = "auto"
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    validate_steps: int = 250
    log_steps: int = 20
    keep_steps: int = 0
    tensorboard: bool = False
    workers: int = 0
    licence: str = "Apache-2.0"

    def __post_init__(self) -> None:
        check_ints(self, 0, "seed", "checkpoint_steps", "keep_steps", "workers")
        check_bools(self, "tensorboard")
        check_numbers(self, "checkpoint_minutes", least=0)
        check_ints(self, 1, "validate_steps", "log_steps")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run. In TOML each field is a table; [model] holds `architecture` and its fields."""

    model: PatchICLConfig = field(default_factory=PatchICLConfig.sparse)
    data: DataConfig = DataConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = RunConfig()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The configuration that `values` (tables by name) describe; what they leave out has its default.

        Raises ValueError that names the table for an unknown key or a value of the wrong type or range.
        """
        check_keys(cls, values)
        made: dict[str, Any] = {}
        for name, table in values.items():
            if not isinstance(table, dict):
                raise ValueError(f"[{name}] must be a table, got {table!r}")
            try:
                made[name] = _model_config(table) if name == "model" else _section(_SECTIONS[name], table)
            except (TypeError, ValueError) as error:
                raise ValueError(f"[{name}] {error}") from error
        return cls(**made)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainingConfig:
        """Read a TOML file. Raises FileNotFoundError, or ValueError if it is not a configuration."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"config must be an existing TOML file, got {path}")
        try:
            return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON, TOML) from which `from_dict` makes an equal configuration."""
        tables = {f.name: dataclasses.asdict(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**tables, "model": self.model.to_dict()}


_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "optimiser": OptimiserConfig,
    "schedule": ScheduleConfig,
    "loss": LossConfig,
    "run": RunConfig,
}


def _section(cls: type, table: dict[str, Any], default: Any = None) -> Any:
    """A `cls` with the values of `table`; what it leaves out is that of `default`, or has the default of `cls`."""
    check_keys(cls, table)
    kinds = get_type_hints(cls)
    values = {name: _typed(name, value, kinds[name], getattr(default, name, None)) for name, value in table.items()}
    return cls(**values) if default is None else dataclasses.replace(default, **values)


def _typed(name: str, value: Any, kind: Any, default: Any = None) -> Any:
    """`value` as the field's type; an integer serves as a float. Fields of several types check themselves."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _table(name, value, kind, kind() if default is None else default)
    for item in get_args(kind):
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name} must be an array of tables, got {value!r}")
            return tuple(_table(f"{name}[{i}]", table, item) for i, table in enumerate(value))
    if not isinstance(kind, type):
        return tuple(value) if isinstance(value, list) else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def _table(name: str, table: Any, cls: type, default: Any = None) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table, got {table!r}")
    try:
        return _section(cls, table, default)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _model_config(table: dict[str, Any]) -> PatchICLConfig:
    """The named architecture's configuration; what `table` leaves out has its default for the image size."""
    fields = dict(table)
    architecture = fields.pop("architecture", "sparse")
    if architecture != "published":
        return PatchICLConfig.from_dict({"architecture": architecture, **fields})
    image_size = {"image_size": fields["image_size"]} if "image_size" in fields else {}
    merged = PatchICLConfig.published(**image_size).to_dict()
    for name, value in fields.items():
        part = merged.get(name)
        merged[name] = {**part, **value} if isinstance(part, dict) and isinstance(value, dict) else value
    return PatchICLConfig.from_dict(merged)
