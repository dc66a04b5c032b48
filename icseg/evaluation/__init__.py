"""Scores of a model on labelled images and held-out synthetic tasks, beside floors that need no model.

docs/evaluation.md has the protocol, the floors, the intervals and the files.
"""

from icseg.data.packs import Pack
from icseg.evaluation.bootstrap import Interval
from icseg.evaluation.cases import Case, EvaluationProtocol, pack_cases, synthetic_cases
from icseg.evaluation.datasets import load_dataset
from icseg.evaluation.outputs import markdown, write_folder, write_json
from icseg.evaluation.report import Report, Row
from icseg.evaluation.run import evaluate_datasets
from icseg.evaluation.scoring import (
    ClassScores,
    Predictor,
    TargetScores,
    evaluate,
    evaluate_synthetic,
    model_predictor,
)

__all__ = [
    "Case",
    "ClassScores",
    "EvaluationProtocol",
    "Interval",
    "Pack",
    "Predictor",
    "Report",
    "Row",
    "TargetScores",
    "evaluate",
    "evaluate_datasets",
    "evaluate_synthetic",
    "load_dataset",
    "markdown",
    "model_predictor",
    "pack_cases",
    "synthetic_cases",
    "write_folder",
    "write_json",
]
