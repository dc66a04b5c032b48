"""What `icseg doctor` reports, as text and as JSON."""

from __future__ import annotations

import json

import pytest
import torch

import icseg
from icseg import cli, doctor
from icseg_kernels import backend, library


def run_doctor(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.app(["doctor", *arguments], prog_name="icseg")
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_json_holds_everything(capsys):
    report = json.loads(run_doctor(capsys, "--json"))
    assert report["versions"]["icseg"] == icseg.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["system"]["threads"] == torch.get_num_threads()
    assert report["devices"][0] == "cpu"
    assert set(report["ops"]) >= {"gather_patches", "gumbel_topk", "selected_attention"}
    for backends in report["ops"].values():
        assert backends["reference"] == []
    assert report["native_library"]["abi"] == library.ABI_VERSION
    assert report["native_library"]["instruction set"] == (None if library.missing() else library.isa())


def test_instruction_set_in_use(capsys, isa):
    assert f", instruction set {isa})" in run_doctor(capsys)


def test_text_names_each_backend_and_why_one_is_missing(capsys, monkeypatch):
    ops = {"gather_patches": {"native": ["it was not built"], "reference": []}}
    monkeypatch.setattr(backend, "status", lambda: ops)
    monkeypatch.setattr(library, "missing", lambda: ["it was not built"])
    monkeypatch.setattr(backend, "_from_environment", "reference")
    monkeypatch.setenv("ICSEG_BACKEND", "native")  # too late: read at import
    lines = run_doctor(capsys).splitlines()
    place = lines.index("gather_patches")
    assert lines[place + 1].split(maxsplit=1) == ["native", "it was not built"]
    assert lines[place + 2].split() == ["reference", "available"]
    assert f"{'library':<16}{library.PATH}: it was not built" in lines
    assert "ICSEG_BACKEND=reference names the backend of every op" in lines


def test_an_unknown_backend_in_the_environment_is_named(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_from_environment", "fast")
    line = "ICSEG_BACKEND=fast names the backend of every op, but must be one of cuda, triton, native, reference"
    assert f"{line}: every call fails" in run_doctor(capsys).splitlines()


def test_missing_packages_and_weights_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-package",))
    monkeypatch.setattr(doctor, "bundled_weights", lambda: tmp_path / "none.safetensors")
    text = run_doctor(capsys)
    assert "no-package not installed" in " ".join(text.split())
    assert "checkpoint must be an existing .safetensors file" in text


def test_weights_are_described(tmp_path, monkeypatch):
    config = icseg.PatchICLConfig.sparse(
        levels=(16,), target_patches=(4,), support_patches=(4,), dim=16, depth=1, heads=2, stem_channels=8
    )
    model = icseg.PatchICL(config)
    model.save_pretrained(tmp_path / "w.safetensors")
    monkeypatch.setattr(doctor, "bundled_weights", lambda: tmp_path / "w.safetensors")
    weights = doctor.examine()["weights"]
    assert weights["architecture"] == "sparse"
    assert weights["parameters"] == sum(t.numel() for t in model.state_dict().values())
    assert weights["problem"] is None
