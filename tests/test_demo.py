"""The bundled example, from end to end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import save_file

import icseg
from icseg import cli, demo
from icseg.baselines.floors import otsu
from icseg.checkpoint import bundled_weights
from icseg.data.images import read_image, read_mask
from icseg.data.synthetic import GENERATOR_VERSION, TaskPool, generate_task, pool_task_seed
from icseg.metrics import dice

TINY = icseg.PatchICLConfig.sparse(
    levels=(16, 32), target_patches=(4, 4), support_patches=(4, 4), dim=16, depth=1, heads=2, stem_channels=8
)


def masks():
    return [read_mask(demo.EXAMPLE / f"{name}_mask.png").array for name in demo.SUPPORTS]


def test_example_is_complete_small_and_two_valued():
    assert sum(path.stat().st_size for path in demo.EXAMPLE.iterdir()) < 300_000
    truths = [read_mask(demo.EXAMPLE / f"{name}_truth.png").array for name in demo.TARGETS]
    images = [read_image(demo.EXAMPLE / f"{name}.png").array for name in (*demo.SUPPORTS, *demo.TARGETS)]
    for image, mask in zip(images, [*masks(), *truths], strict=True):
        assert image.shape == mask.shape
        assert np.unique(mask).tolist() == [0, 255]


@pytest.mark.parametrize("name", demo.TARGETS)
def test_example_cannot_be_solved_by_copying_or_by_a_threshold(name):
    image = torch.tensor(read_image(demo.EXAMPLE / f"{name}.png").array).float()[None, None] / 255
    truth = torch.from_numpy(read_mask(demo.EXAMPLE / f"{name}_truth.png").array > 0)[None, None]
    copied = torch.from_numpy(np.mean([mask > 0 for mask in masks()], 0) > 0.5)[None, None, : truth.shape[-2]]
    assert dice(copied, truth).item() < 0.5
    assert dice(otsu(image, truth), truth).item() < 0.5


def test_example_is_of_a_seed_that_no_pool_reaches(tmp_path):
    """It was made by generator version 1, which is gone: its pixels are pinned, and no other version gives them."""
    digest = hashlib.sha256()
    for path in sorted(demo.EXAMPLE.iterdir()):
        with Picture.open(path) as picture:
            digest.update(np.asarray(picture).tobytes())
    assert digest.hexdigest() == "e71ca50532ea8e95deabb59c2dc962e64a59009d3be26d3383a6267e55904b52"
    seed = 2**32 - 14
    again = generate_task(seed, 5, 256, "cells").images
    shown = [read_image(demo.EXAMPLE / f"{name}.png").array for name in (*demo.SUPPORTS, demo.TARGETS[0])]
    assert GENERATOR_VERSION > 1
    assert not any(np.array_equal(image, made) for image in shown for made in again)
    pool_seed, index = divmod(seed, pool_task_seed(1, 0))
    with pytest.raises(ValueError, match="count must be between 1 and"):
        TaskPool(tmp_path, index + 1, 5, seed=pool_seed)


def test_demo_writes_masks_and_overlays(tmp_path, capsys):
    torch.manual_seed(0)
    icseg.PatchICL(TINY).save_pretrained(tmp_path / "w.safetensors")
    report = demo.run_demo(tmp_path / "out", checkpoint=tmp_path / "w.safetensors", device="cpu", progress=False)
    for target, size in zip(report.targets, [(256, 256), (256, 192)], strict=True):
        assert 0 <= target.dice <= 1
        for path in (target.mask, target.overlay):
            with Picture.open(path) as written:
                assert written.size == size
    assert report.command.startswith("icseg segment ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bundled_weights_serve_in_half_precision(dtype):
    def stacked(names):
        return torch.stack([torch.tensor(read_image(demo.EXAMPLE / f"{name}.png").array) for name in names])[:, None]

    images = stacked([demo.TARGETS[0], *demo.SUPPORTS]) / 255
    target, support = images[:1], images[None, 1:]
    labels = (stacked([f"{name}_mask" for name in demo.SUPPORTS]) > 0).float()[None]
    model = icseg.PatchICL.from_pretrained()
    with torch.inference_mode():
        expected = model(target, support, labels).logits
        found = model.to(dtype)(target.to(dtype), support.to(dtype), labels.to(dtype)).logits
    assert found.dtype == dtype
    assert dice(found > 0, expected > 0).item() > 0.99


def foreign_weights(path):
    config = icseg.PatchICLConfig.sparse().to_dict()
    save_file({"x": torch.zeros(3)}, path, {"icseg_config": json.dumps(config)})


REFUSALS = {
    "no checkpoint": (["--checkpoint", "none"], "checkpoint must be an existing .safetensors file"),
    "other weights": (["--checkpoint", "w.safetensors"], "checkpoint must hold the weights that its configuration"),
    "no such device": (["--checkpoint", "w.safetensors", "--device", "cuda:99"], "device must be one of this machine"),
    "out is a file": (["--checkpoint", "good.safetensors", "--out", "file"], "out must be a folder that can be"),
    "folder is a file": (["--checkpoint", "good.safetensors", "--out", "full"], "out must be a folder that can be"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_writes_nothing(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    foreign_weights("w.safetensors")
    icseg.PatchICL(TINY).save_pretrained("good.safetensors")
    Path("file").touch()
    Path("full").mkdir()
    Path("full/targets").touch()
    before = sorted(Path().rglob("*"))
    arguments, sentence = REFUSALS[case]
    with pytest.raises(SystemExit) as ended:
        cli.app(["demo", "--out", "out", "--device", "cpu", *arguments], prog_name="icseg")
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_bundled_weights_segment_the_example(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.app(["demo", "--out", str(tmp_path / "out"), "--device", "cpu"], prog_name="icseg")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines[:2]:
        assert float(line.rsplit("Dice: ")[1]) > 0.5
    assert bundled_weights().stat().st_size < 20_000_000
