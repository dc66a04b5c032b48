"""Evaluations from end to end: data sets and checkpoints in, files out, interruption and resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from toy_pack import write_varied_pack

from icseg import PatchICL, PatchICLConfig, cli
from icseg.evaluation import EvaluationProtocol, evaluate, evaluate_datasets, load_dataset, model_predictor, run
from icseg.evaluation.outputs import LEGEND

SMALL = EvaluationProtocol(size=32, support=2, limit=3)
CONFIG = PatchICLConfig.sparse(
    levels=(16,), target_patches=(4,), support_patches=(4,), dim=8, depth=1, heads=1, stem_channels=8
)


def save_model(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = PatchICL(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model.safetensors", 0)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return write_varied_pack(tmp_path / "varied.npz")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupted(after: int) -> Callable[..., object]:
    """`score_unit`, until it is called for the time after `after`."""
    usual, calls = run.score_unit, []

    def score_unit(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return usual(*arguments, **options)  # type: ignore[arg-type]

    return score_unit


def test_the_scores_are_those_of_the_checkpoints_weights(pack: Path, checkpoint: Path) -> None:
    report = evaluate_datasets([pack], SMALL, checkpoint=checkpoint, progress=False)
    model = PatchICL.from_pretrained(checkpoint)
    assert list(report.scores) == evaluate(model_predictor(model), pack, SMALL)
    untrained = model_predictor(PatchICL(CONFIG).eval())
    assert report.scores[0].mean("dice") != evaluate(untrained, pack, SMALL)[0].mean("dice")
    assert 0 < report.rows[0].dice.mean < 1
    assert [row.class_name for row in report.rows] == ["box", "bar/strip"]
    assert report.settings["checkpoint"]["name"] == "model.safetensors"
    assert report.settings["data_sets"] == [{"name": "varied", "sha256": load_dataset(pack, 32).digest()}]


def test_a_folder_of_results(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    report = evaluate_datasets([pack], SMALL, checkpoint=checkpoint, synthetic_tasks=2, out=out, progress=False)
    families = [row.class_name for row in report.rows[2:]]
    assert set(files(out)) == {
        "scores.json",
        "scores.csv",
        "table.md",
        "pictures/varied/box.png",
        "pictures/varied/bar%2Fstrip.png",
        "scores.parts/varied/box.json",
        "scores.parts/varied/bar%2Fstrip.json",
        "scores.parts/synthetic/tasks.json",
        *(f"pictures/synthetic/{family}.png" for family in families),
    }
    with Picture.open(out / "pictures/varied/box.png") as picture:
        assert picture.height > 3 * 256
        assert len(np.unique(np.array(picture))) > 50
    content = json.loads((out / "scores.json").read_text())
    assert content["settings"]["seeds"] == [0]
    assert content["settings"]["synthetic_tasks"] == 2
    assert len(content["classes"][0]["scores"]) == 3
    assert str(tmp_path) not in (out / "scores.json").read_text()


def test_pictures_that_are_asked_for(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=tmp_path / "none", pictures=0, progress=False)
    assert not (tmp_path / "none" / "pictures").exists()
    evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=tmp_path / "two", pictures=2, progress=False)
    with Picture.open(tmp_path / "two/pictures/varied/box.png") as picture:
        assert 2 * 256 < picture.height < 3 * 256


def test_an_interrupted_evaluation_goes_on(
    pack: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=whole, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(run, "score_unit", interrupted(after=1))
        with pytest.raises(KeyboardInterrupt):
            evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=out, progress=False)
    assert set(files(out)) == {"scores.parts/varied/box.json", "pictures/varied/box.png"}

    scored = []
    usual = run.score_unit

    def counted(predict: object, unit: run.Unit, **options: object) -> object:
        scored.append(unit.name)
        return usual(predict, unit, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "score_unit", counted)
    evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=out, resume=True, progress=False)
    assert scored == ["bar/strip"]
    assert files(out) == files(whole)
    evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=out, progress=False)
    assert scored == ["bar/strip", "box", "bar/strip"]  # without resume all is scored again


def test_resume_scores_changed_data_again(
    pack: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=out, synthetic_tasks=2, progress=False)
    with np.load(pack) as arrays:
        np.savez(pack, **{**arrays, "images": 255 - arrays["images"]})
    other = evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=out, resume=True, progress=False)
    assert other.rows[0] != first.rows[0]
    assert other.scores == evaluate_datasets([pack], SMALL, checkpoint=checkpoint, progress=False).scores


@pytest.mark.parametrize("changed", ["size", "seeds", "checkpoint", "compare"])
def test_resume_refuses_other_settings(pack: Path, checkpoint: Path, tmp_path: Path, changed: str) -> None:
    out = tmp_path / "out"
    evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=out, pictures=0, progress=False)
    before = files(out)
    other = save_model(tmp_path / "other.safetensors", 1)
    protocol = {
        "size": EvaluationProtocol(size=40, support=2, limit=3),
        "seeds": EvaluationProtocol(size=32, support=2, seeds=(0, 1), limit=3),
    }.get(changed, SMALL)
    with pytest.raises(ValueError, match=rf"resume needs the settings of the run in .*out, got another {changed}$"):
        evaluate_datasets(
            [pack],
            protocol,
            checkpoint=other if changed == "checkpoint" else checkpoint,
            compare=other if changed == "compare" else None,
            out=out,
            resume=True,
            progress=False,
        )
    assert files(out) == before


@pytest.mark.parametrize("text", ["{", "{}", '{"settings": {}, "content": "", "scores": [{}]}', "[]"])
def test_resume_refuses_damaged_parts(pack: Path, checkpoint: Path, tmp_path: Path, text: str) -> None:
    part = tmp_path / "out" / "scores.parts" / "varied" / "box.json"
    part.parent.mkdir(parents=True)
    part.write_text(text)
    with pytest.raises(ValueError, match=r"box\.json must be a part of an earlier evaluation, got a damaged file"):
        evaluate_datasets([pack], SMALL, checkpoint=checkpoint, out=tmp_path / "out", resume=True, progress=False)


def test_what_is_refused_before_anything_is_written(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = files(tmp_path)
    with pytest.raises(ValueError, match="evaluate needs a data set or synthetic tasks to score on, got neither"):
        evaluate_datasets([], checkpoint=checkpoint, out=out)
    with pytest.raises(ValueError, match="data sets must have different names, got varied twice"):
        evaluate_datasets([pack, pack], checkpoint=checkpoint, out=out)
    with pytest.raises(FileNotFoundError, match=r"pack must be an existing \.npz file"):
        evaluate_datasets([pack, tmp_path / "none.npz"], checkpoint=checkpoint, out=out)
    with pytest.raises(FileNotFoundError, match=r"checkpoint must be an existing \.safetensors file, got none"):
        evaluate_datasets([pack], checkpoint="none.safetensors", out=out)
    with pytest.raises(ValueError, match="checkpoint must be a readable safetensors file"):
        evaluate_datasets([pack], checkpoint=checkpoint, compare=pack, out=out)
    with pytest.raises(ValueError, match="out must be a folder that can be written to"):
        evaluate_datasets([pack], checkpoint=checkpoint, out=pack)
    with pytest.raises(ValueError, match="pictures need a folder as out, got none"):
        evaluate_datasets([pack], checkpoint=checkpoint, pictures=3)
    with pytest.raises(ValueError, match=r"resume needs a folder as out, got scores\.json"):
        evaluate_datasets([pack], checkpoint=checkpoint, out="scores.json", resume=True)
    with pytest.raises(ValueError, match="pictures must be at least 0, got -1"):
        evaluate_datasets([pack], checkpoint=checkpoint, out=out, pictures=-1)
    assert files(tmp_path) == before


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.app(["evaluate", *map(str, arguments)], prog_name="icseg")
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command(pack: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "out", save_model(tmp_path / "other.safetensors", 1)
    options = ["--checkpoint", checkpoint, "--size", "32", "--device", "cpu", "--seeds", "2", "--support", "2"]
    code, printed, _ = command(capsys, pack, *options, "--compare", other, "--limit", "3", "--out", out)
    assert code == 0
    assert printed == (out / "table.md").read_text()
    assert printed.endswith(f"{LEGEND}\n")
    assert "| varied | box | 3 |" in printed
    assert "| data set | class | Dice | compared | difference |" in printed
    content = json.loads((out / "scores.json").read_text())
    assert content["settings"]["seeds"] == [0, 1]
    expected = evaluate(model_predictor(PatchICL.from_pretrained(other)), pack, EvaluationProtocol(32, 2, (0, 1), 3))
    assert [target["compared"] for target in content["classes"][0]["scores"]] == [
        target.dice for target in expected[0].targets
    ]


def test_sizes_and_seeds_of_the_command(
    pack: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def settings(*options: str) -> dict[str, object]:
        path = tmp_path / "scores.json"
        fixed = ("--checkpoint", checkpoint, "--device", "cpu", "--limit", "1", "--out", path)
        assert command(capsys, pack, *fixed, *options)[0] == 0
        return json.loads(path.read_text())["settings"]

    default = settings()
    assert [default[name] for name in ("size", "support", "seeds", "limit")] == [256, 3, [0], 1]
    given = settings("--size", "own", "--seed", "4", "--seed", "2")
    assert [given[name] for name in ("size", "seeds")] == [None, [4, 2]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--seed", "1", "--seeds", "2"), "seeds must be given by --seed or by --seeds, got both"),
        (("--size", "16"), "size must be 32 to 4096 pixels, or own, got 16"),
        (("--size", "big"), "size must be an integer or own, got big"),
        (("--pictures", "2"), "pictures need a folder as out, got none"),
    ],
)
def test_refusals_of_the_command(
    pack: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str
) -> None:
    code, printed, error = command(capsys, pack, "--checkpoint", checkpoint, "--device", "cpu", *options)
    assert (code, printed, error) == (2, "", f"icseg: error: {sentence}\n")


def test_an_interruption_is_one_line(
    pack: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "score_unit", interrupted(after=1))
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--size", "32", "--limit", "2", "--out", tmp_path / "out")
    assert command(capsys, pack, *options) == (130, "", "icseg: interrupted\n")
    assert set(files(tmp_path / "out")) == {"scores.parts/varied/box.json", "pictures/varied/box.png"}
