"""Checkpoints and configurations: round trips, and every foreign or broken file refused without running it."""

import pickle

import pytest
import safetensors.torch
import torch

import icseg
from icseg.checkpoint import load_checkpoint, save_checkpoint, save_half_precision, training_record
from icseg.config import PatchICLConfig
from icseg.sparse.config import SparseConfig

TINY = SparseConfig(levels=(16,), target_patches=(4,), support_patches=(4,), dim=16, depth=1, stem_channels=4)


def test_round_trip(tmp_path):
    model = icseg.PatchICL(TINY).eval()
    model.save_pretrained(tmp_path / "model.safetensors")
    loaded = icseg.PatchICL.from_pretrained(tmp_path / "model.safetensors")
    assert loaded.config == TINY
    assert not loaded.training
    inputs = torch.rand(1, 1, 32, 32), torch.rand(1, 2, 1, 32, 32), torch.ones(1, 2, 1, 32, 32)
    assert torch.equal(model(*inputs).logits, loaded(*inputs).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_without_a_dimension(tmp_path):
    """Batch normalisation keeps a count."""
    features = icseg.PatchICLConfig.published(32).to_dict()["features"] | {"extractor": "convolutional", "channels": 4}
    config = icseg.PatchICLConfig.from_dict({**icseg.PatchICLConfig.published(32).to_dict(), "features": features})
    icseg.PatchICL(config).save_pretrained(tmp_path / "model.safetensors")
    assert icseg.PatchICL.from_pretrained(tmp_path / "model.safetensors").config == config


def test_a_copy_in_half_precision(tmp_path):
    model, source, target = icseg.PatchICL(TINY), tmp_path / "model.safetensors", tmp_path / "half.safetensors"
    save_checkpoint(source, TINY, model.state_dict(), {"training": '{"step": 3}', "license": "MIT"})
    save_half_precision(source, target)
    assert target.stat().st_size < 0.6 * source.stat().st_size
    loaded = icseg.PatchICL.from_pretrained(target).state_dict()
    for name, weight in model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weight.half().float())
    assert training_record(target) == training_record(source) == {"step": 3}
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata()["license"] == "MIT"


def test_the_record_of_training(tmp_path):
    assert training_record()["config"]["model"]["architecture"] == "sparse"  # the bundled weights
    icseg.PatchICL(TINY).save_pretrained(tmp_path / "model.safetensors")
    assert training_record(tmp_path / "model.safetensors") == {}
    with pytest.raises(FileNotFoundError, match="checkpoint must be an existing"):
        training_record(tmp_path / "none.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint must be an existing"):
        load_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"])
def test_corrupt_file(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint must"):
        load_checkpoint(path)


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("the checkpoint was unpickled",)


def test_pickle_is_never_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match="checkpoint must be a readable safetensors file"):
        load_checkpoint(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="checkpoint must carry an icseg configuration"):
        load_checkpoint(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    icseg.PatchICL(TINY).save_pretrained(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint must be a readable safetensors file"):
        load_checkpoint(path)


def test_unknown_key_in_a_configuration():
    with pytest.raises(ValueError, match="SparseConfig has no field depht"):
        PatchICLConfig.from_dict({"architecture": "sparse", "depht": 3})
    with pytest.raises(ValueError, match="architecture must be one of sparse, published, universeg, got 'dense'"):
        PatchICLConfig.from_dict({"architecture": "dense"})


def test_fingerprint_changes_with_any_field():
    assert TINY.fingerprint() == PatchICLConfig.from_dict(TINY.to_dict()).fingerprint()
    assert TINY.fingerprint() != SparseConfig().fingerprint()
