"""Warps and stages by measurement: the table, how launches take from it, and the command."""

import json

import pytest
import torch
from samples import DEVICE

from icseg_kernels import selected_attention, triton_launch, tune, tuning
from icseg_kernels.tuning import Choice


def kernel_of_the_test():
    pass


class Kernel:
    """Records the options of its launches."""

    fn = staticmethod(kernel_of_the_test)

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(options)


@pytest.fixture(autouse=True)
def no_table():
    tuning.use(None)
    yield
    tuning.use(None)


class Clock:
    """Takes the launches that `seconds` says, of the options of the last one."""

    def __init__(self, kernel, seconds):
        self.kernel, self.seconds, self.measured = kernel, seconds, 0

    def __call__(self, run):
        run()
        self.measured += 1
        return self.seconds(self.kernel.launches[-1])


def launch(kernel, **options):
    triton_launch.launch(kernel, (3, 2), torch.device("cpu"), torch.zeros(4), 7, **options)
    return kernel.launches[-1]


def test_a_launch_keeps_the_fastest_choice_and_measures_once():
    kernel = Kernel()
    clock = Clock(kernel, lambda o: 1.0 if (o.get("num_warps"), o.get("num_stages")) == (8, 2) else 2.0)
    with tuning.tuning(clock) as table:
        assert launch(kernel, BLOCK=16) == {"BLOCK": 16, "num_warps": 8, "num_stages": 2}
        measured = clock.measured
        assert launch(kernel, BLOCK=16)["num_warps"] == 8
        assert clock.measured == measured == 15
        launch(kernel, BLOCK=32)
        assert clock.measured > measured
    assert [name.split()[1:] for name in table] == [["8", "float32", "BLOCK=16"], ["8", "float32", "BLOCK=32"]]
    assert launch(kernel, BLOCK=16) == {"BLOCK": 16}
    tuning.use(table)
    assert launch(kernel, BLOCK=16)["num_warps"] == 8
    assert launch(kernel, BLOCK=64) == {"BLOCK": 64}


def test_a_choice_must_beat_the_own_one_clearly():
    kernel = Kernel()
    with tuning.tuning(Clock(kernel, lambda o: 1.0 if o.get("num_warps") == 2 else 1.02)):
        assert launch(kernel, num_warps=8, num_stages=2) == {"num_warps": 8, "num_stages": 2}


@pytest.mark.parametrize("options", [{"num_stages": 1}, {"enable_fp_fusion": False}])
def test_what_bits_or_barriers_depend_on_is_left(options):
    kernel = Kernel()
    with tuning.tuning(Clock(kernel, lambda o: 1.0)) as table:
        assert launch(kernel, **options) == options
    assert table == {}


def test_what_does_not_fit_is_left_out_and_other_errors_are_raised():
    class OutOfResources(Exception):
        pass

    def seconds(options):
        if options.get("num_warps") == 16:
            raise OutOfResources
        return 1.0 / options.get("num_warps", 4)

    kernel = Kernel()
    with tuning.tuning(Clock(kernel, seconds)):
        assert launch(kernel)["num_warps"] == 8

    def broken(options):
        raise RuntimeError("launch failed")

    with tuning.tuning(Clock(kernel, broken)), pytest.raises(RuntimeError, match="launch failed"):
        launch(kernel)
    assert not tuning.is_used()


def test_tables_are_kept_in_files(tmp_path):
    path, table = tmp_path / "table.json", {"a": Choice(8, 2), "b": Choice(1, 4)}
    tuning.save(path, table, "GPU", "3.7.1")
    assert tuning.load(path, "GPU", "3.7.1") == table
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    with pytest.raises(ValueError, match=r"must be made for version 1, other GPU, Triton 3\.7\.1, got version 1, GPU"):
        tuning.load(path, "other GPU", "3.7.1")
    for wrong in ("{", "[]", json.dumps({"version": 1, "device": "GPU", "triton": "3.7.1", "choices": {"a": {}}})):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"must be a table of python -m icseg_kernels\.tune"):
            tuning.load(path, "GPU", "3.7.1")


@pytest.mark.skipif(bool(triton_launch.missing()), reason="needs Triton")
def test_ops_ask_for_their_choices():
    q, k = (torch.randn(1, 2, n, 16, device=DEVICE) for n in (5, 9))
    expected = selected_attention(q, k, k, backend="triton")

    def measure(run):
        run()
        return 1.0

    with tuning.tuning(measure) as table:
        found = selected_attention(q, k, k, backend="triton")
    assert torch.equal(found, expected)
    assert ["forward_kernel" in name for name in table] == [True]


def test_the_command_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        tune.main(["--out", "nowhere.json"])
    reason = "; ".join(triton_launch.missing()) or "a CUDA device is needed, got none"
    assert capsys.readouterr().err.rstrip().endswith(reason)
