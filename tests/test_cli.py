"""The command line: files in and out, every bad input, interruption and resumption."""

from __future__ import annotations

import json
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as Picture
from safetensors.torch import save_file

import icseg
import icseg.evaluation
from icseg import cli, inference, job
from icseg.cli import segmenting
from icseg.sparse.budget import Budget

REPOSITORY = Path(__file__).parents[1]
TINY = icseg.PatchICLConfig.sparse(
    levels=(16, 32), target_patches=(4, 4), support_patches=(4, 4), dim=16, depth=1, heads=2, stem_channels=8
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    model = icseg.PatchICL(TINY)
    for parameter in model.parameters():  # the zero-initialised output layers would predict nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


FOLDERS = ("--support-images", "images", "--support-masks", "masks")
MEMORY = ("--memory", "task.safetensors")


def picture(path, height=40, width=56, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(pixels).save(path)
    return pixels


def labels(path, height=40, width=56, class_id=255):
    ids = np.zeros((height, width), np.uint8)
    ids[5:25, 10:40] = class_id
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(ids).save(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with two support pairs and the targets t/a.png and t/b.png."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        picture(Path("images", f"{i}.png"), seed=i)
        labels(Path("masks", f"{i}.png"))
    picture(Path("t/a.png"), 48, 30, seed=5)
    picture(Path("t/b.png"), 33, 64, seed=6)
    return tmp_path


@pytest.fixture
def run(capsys, checkpoint):
    """Run `icseg segment TARGETS --support-... --out out ...`; gives (exit code, stdout, stderr)."""

    def run_segment(*arguments, targets=("t",), supports=(*FOLDERS, "--size", "128"), out="out", weights=checkpoint):
        options = ["--out", str(out), "--checkpoint", str(weights), "--device", "cpu"]
        return command(capsys, "segment", *targets, *supports, *options, *arguments)

    return run_segment


@pytest.fixture
def encode(capsys, checkpoint):
    """Run `icseg encode --support-... --out task.safetensors ...`; gives (exit code, stdout, stderr)."""

    def run_encode(*arguments, out="task.safetensors", size="128"):
        options = ["--out", str(out), "--size", size, "--checkpoint", str(checkpoint), "--device", "cpu"]
        return command(capsys, "encode", *FOLDERS, *options, *arguments)

    return run_encode


def command(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.app([str(a) for a in arguments], prog_name="icseg")
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def listing(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def names(folder="out"):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_folder_of_targets(here, run):
    code, out, _ = run("--uncertainty", "--overlay")
    assert (code, out) == (0, "2 targets segmented into out; classes: 255 (in 2 examples)\n")
    maps = ["mask.png", "overlay.png", "uncertainty.png"]
    assert names() == [*(f"a_{m}" for m in maps), *(f"b_{m}" for m in maps), "icseg.json"]
    with Picture.open("out/a_mask.png") as mask:
        assert mask.size == (30, 48)
        assert set(np.unique(np.asarray(mask))) <= {0, 255}


def test_every_format_comes_back_in_its_own(here, run):
    grey = np.random.default_rng(0).integers(0, 4000, (20, 24, 6)).astype(np.int16)
    Path("f").mkdir()
    nibabel.save(nibabel.Nifti1Image(grey, np.diag([1, 2, 3, 1])), "f/scan.nii.gz")
    tifffile.imwrite("f/stack.tif", grey.transpose(2, 0, 1).astype(np.uint16), compression="zlib")
    Picture.fromarray((grey[..., 0] // 16).astype(np.uint8)).save("f/photo.jpg")
    np.save("f/array.npy", grey.astype(np.float32))
    np.savez("f/archive.npz", image=grey[..., 0])
    code, _, err = run("--axis", "2", "--uncertainty", targets=["f"])
    assert (code, err) == (0, f"icseg: warning: {inference.ORIENTATION}\n")
    expected = ["archive.npz", "array.npy", "photo.png", "scan.nii.gz", "stack.tif"]
    endings = [(Path(name).name.partition(".")[0], name.partition(".")[2]) for name in expected]
    both = [f"{stem}_{kind}.{ending}" for stem, ending in endings for kind in ("mask", "uncertainty")]
    assert names() == sorted([*both, "icseg.json"])
    scan = nibabel.load("out/scan_mask.nii.gz")
    assert (scan.shape, scan.get_data_dtype()) == ((20, 24, 6), np.int16)
    np.testing.assert_array_equal(scan.affine, np.diag([1, 2, 3, 1]))
    stack = tifffile.imread("out/stack_mask.tif")
    assert (stack.shape, stack.dtype) == ((6, 20, 24), np.uint16)
    array = np.load("out/array_mask.npy")
    assert (array.shape, array.dtype) == ((20, 24, 6), np.uint8)


def test_the_command_does_what_the_function_does(here, run, checkpoint):
    run("--uncertainty", "--seed", "3", "--seed", "4", "--window", "-10", "300", targets=["t/a.png"])
    result = icseg.segment(
        "t/a.png",
        ["images/0.png", "images/1.png"],
        ["masks/0.png", "masks/1.png"],
        model=icseg.PatchICL.from_pretrained(checkpoint),
        size=128,
        seeds=[3, 4],
        window=(-10, 300),
    )
    with Picture.open("out/a_mask.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), result.mask)


def pickle_that_writes(path):
    class Trap:
        def __reduce__(self):
            return (Path("sprung").write_text, ("unpickled",))

    path.write_bytes(pickle.dumps(Trap()))


def file_without_config(path):
    save_file({"x": torch.zeros(3)}, path)


def file_with_other_weights(path):
    save_file({"x": torch.zeros(3)}, path, {"icseg_config": json.dumps(TINY.to_dict())})


def file_with_other_config(path):
    save_file({"x": torch.zeros(3)}, path, {"icseg_config": json.dumps({"colour": "red"})})


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def constant(path):
    Picture.fromarray(np.full((40, 56), 9, np.uint8)).save(path)


def volume(path):
    np.save(path, np.arange(24.0).reshape(2, 3, 4))


def remove(pattern):
    for path in Path().glob(pattern):
        path.unlink()


# name: (what is done in the folder, further arguments, the sentence)
BAD = {
    "truncated target": (
        lambda: truncate(Path("t/b.png")),
        [],
        r"t/b\.png cannot be read: image file is truncated",
    ),
    "truncated support": (lambda: truncate(Path("images/1.png")), [], r"images/1\.png cannot be read"),
    "truncated mask": (lambda: truncate(Path("masks/1.png")), [], r"masks/1\.png cannot be read"),
    "not a picture": (
        lambda: Path("t/c.tif").write_text("x"),
        [],
        r"t/c\.tif cannot be read: not a TIFF file",
    ),
    "one folder for both": (
        lambda: None,
        ["--support-masks", "images"],
        r"support images and masks must be in two folders, got images for both",
    ),
    "image without mask": (
        lambda: Path("masks/1.png").unlink(),
        [],
        r"support image images/1\.png must have a mask named 1 or 1_mask in masks, got only others, such as 0\.png",
    ),
    "mask without image": (
        lambda: Path("images/1.png").unlink(),
        [],
        r"support mask masks/1\.png must have an image named 1 in images, got none",
    ),
    "mask of another size": (
        lambda: labels(Path("masks/1.png"), 56, 40),
        [],
        r"masks/1\.png must have the size of images/1\.png \(40 x 56\), got 56 x 40",
    ),
    "only background": (
        lambda: [labels(Path(f"masks/{i}.png"), class_id=0) for i in (0, 1)],
        [],
        "support_masks must mark at least one pixel, got only background",
    ),
    "constant target": (
        lambda: constant(Path("t/b.png")),
        [],
        r"t/b\.png must not be constant, got 9 everywhere",
    ),
    "constant support": (lambda: constant(Path("images/0.png")), [], r"images/0\.png must not be constant"),
    "NaN": (
        lambda: np.save("t/c.npy", np.array([[1, np.nan]])),
        [],
        r"t/c\.npy must hold finite values, got nan",
    ),
    "class that is absent": (
        lambda: None,
        ["--class", "3"],
        r"classes must be ids in the support masks \(255\), got 3",
    ),
    "mask in fractions": (
        lambda: [Path("masks/1.png").unlink(), np.save("masks/1.npy", np.full((40, 56), 0.25))],
        [],
        r"masks/1\.npy must hold integer class ids, got 0\.25",
    ),
    "JPEG mask": (
        lambda: Path("masks/1.png").unlink() or picture(Path("masks/1.jpg")),
        [],
        r"masks/1\.jpg must hold exact class ids, got a JPEG",
    ),
    "no supports": (
        lambda: [remove("images/*"), remove("masks/*")],
        [],
        "support images must be at least one file, got none of a known format in images",
    ),
    "no support folder": (
        lambda: [remove("images/*"), Path("images").rmdir()],
        [],
        "images must be an existing folder",
    ),
    "volume without axis": (
        lambda: volume("t/c.npy"),
        [],
        r"t/c\.npy must be 2-D unless an axis \(0, 1 or 2\)",
    ),
    "support volume": (
        lambda: [remove("images/1.png"), volume("images/1.npy")],
        [],
        r"images/1\.npy must be 2-D unless an axis",
    ),
    "two targets of one name": (
        lambda: picture(Path("t/a.jpg")),
        [],
        r"targets must have different names without ending, got t/a\.jpg and t/a\.png",
    ),
    "two supports of one name": (
        lambda: picture(Path("images/0.jpg")),
        [],
        r"support files must have different names without ending, got images/0\.jpg and images/0\.png",
    ),
    "empty target folder": (lambda: remove("t/*"), [], "t must hold at least one image to segment"),
    "size": (
        lambda: None,
        ["--size", "20"],
        "size must be an integer from 32 to 4096, or None for the images' own, got 20",
    ),
    "size in words": (lambda: None, ["--size", "big"], "size must be an integer or own, got big"),
    "budget": (
        lambda: None,
        ["--budget", "1.5"],
        r"budget must be a number of patches, GFLOPs such as 1\.5GF, or all, got 1\.5",
    ),
    "negative budget": (lambda: None, ["--budget", "-2GF"], "gflops must be a finite number of at least 0, got -2"),
    "no patches": (lambda: None, ["--budget", "0"], "budget must be at least 1 patch, got 0"),
    "memory and supports": (
        lambda: None,
        ["--memory", "task.safetensors"],
        "supports must be --support-images and --support-masks, or --memory, got --support-images, --support-masks, "
        "--memory",
    ),
    "axis": (lambda: None, ["--axis", "5"], "axis must be 0, 1, 2 or None, got 5"),
    "window": (
        lambda: None,
        ["--window", "9", "1"],
        r"window must be \(low, high\), finite, with low < high",
    ),
    "window beside the values": (
        lambda: None,
        ["--window", "600", "900"],
        r"window must overlap the values of images/0\.png \(0 to 255\), got 600 to 900",
    ),
    "device": (lambda: None, ["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
    "output is an input": (
        lambda: picture(Path("t/b_mask.png")),
        ["--out", "t"],
        "out must not be a folder of targets or supports, got t",
    ),
    "output among the supports": (
        lambda: None,
        ["--out", "t/../images"],
        r"out must not be a folder of targets or supports, got t/\.\./images",
    ),
    "no masks": (
        lambda: remove("masks/*"),
        [],
        "must have a mask named 0 or 0_mask in masks, got none",
    ),
    "two masks of one image": (
        lambda: labels(Path("masks/1_mask.png")),
        [],
        r"support files must have different names without ending, got masks/1\.png and masks/1_mask\.png",
    ),
    "images and masks swapped": (
        lambda: [Path("images").rename("x"), Path("masks").rename("images"), Path("x").rename("masks")],
        [],
        r"masks/0\.png must hold at most 64 class ids .* got 255; are images and masks swapped\?",
    ),
    "mask in colour": (
        lambda: Picture.fromarray(np.eye(3, dtype=np.uint8)[np.zeros((40, 56), int)]).save("masks/0.png"),
        [],
        r"masks/0\.png cannot be read: it is in colour; a mask must have one channel of integer class ids",
    ),
    "support image for its folder": (
        lambda: None,
        ["--support-images", "images/0.png"],
        r"images/0\.png is a file; give its folder",
    ),
    "state of a training run": (
        lambda: save_file({"x": torch.zeros(3)}, "state.safetensors", {"icseg_training": "{}"}),
        ["--checkpoint", "state.safetensors"],
        r"got state\.safetensors, the state of a training run; its model\.safetensors is written at the end",
    ),
    "output is a file": (
        lambda: Path("file").write_text("kept"),
        ["--out", "file"],
        "out must be a folder that can be written to, got file",
    ),
    "output below a file": (
        lambda: Path("file").write_text("kept"),
        ["--out", "file/deep/er"],
        "out must be a folder that can be written to, got file/deep/er",
    ),
    "no checkpoint": (
        lambda: None,
        ["--checkpoint", "none.safetensors"],
        r"none\.safetensors must be an existing file",
    ),
    "corrupt checkpoint": (
        lambda: Path("w.safetensors").write_bytes(b"\x10" * 400),
        ["--checkpoint", "w.safetensors"],
        r"checkpoint must be a readable safetensors file, got w\.safetensors",
    ),
    "pickled checkpoint": (
        lambda: pickle_that_writes(Path("w.pt")),
        ["--checkpoint", "w.pt"],
        r"checkpoint must be a readable safetensors file, got w\.pt",
    ),
    "foreign checkpoint": (
        lambda: file_without_config("w.safetensors"),
        ["--checkpoint", "w.safetensors"],
        "checkpoint must carry an icseg configuration, got w.safetensors without one",
    ),
    "checkpoint of another model": (
        lambda: file_with_other_config("w.safetensors"),
        ["--checkpoint", "w.safetensors"],
        "checkpoint must carry a valid icseg configuration, got w.safetensors",
    ),
    "checkpoint with other weights": (
        lambda: file_with_other_weights("w.safetensors"),
        ["--checkpoint", "w.safetensors"],
        "checkpoint must hold the weights that its configuration names, got w.safetensors",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_written(here, run, monkeypatch, case):
    change, arguments, sentence = BAD[case]
    change()
    monkeypatch.setattr(inference.Segmenter, "__call__", None)  # nothing may be computed
    before = listing(here)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("icseg: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert re.search(sentence, err)
    assert listing(here) == before


def test_output_folder_without_permission(here, run, monkeypatch):
    Path("out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert run() == (2, "", "icseg: error: out must be a folder that can be written to, got out\n")


def test_an_output_must_not_replace_an_input(here, run):
    picture(Path("done/a_mask.png"))
    code, _, err = run(targets=["t/a.png", "done/a_mask.png"], out="done")
    assert code == 2
    assert "out must not make an output replace an input, got done/a_mask.png as both" in err


def test_misused_options_end_with_code_2(capsys, here):
    assert command(capsys, "segment", "t")[0] == 2
    assert command(capsys, "segment", "t", "--colour", "red")[0] == 2


def test_encoded_supports_do_what_their_folders_do(here, run, encode):
    code, out, err = encode("--window", "-10", "300")
    assert (code, out, err) == (
        0,
        "2 examples encoded into task.safetensors; classes: 255 (in 2 examples)\n",
        "",
    )
    run("--uncertainty", "--window", "-10", "300", out="direct")
    code, out, _ = run("--uncertainty", supports=MEMORY)
    assert (code, out) == (0, "2 targets segmented into out; classes: 255 (in 2 examples)\n")
    direct, now = listing("direct"), listing("out")
    for found in (direct, now):
        assert json.loads(found.pop(Path("icseg.json")))["settings"]["size"] == 128
    assert direct == now
    assert run("--uncertainty", "--resume", supports=MEMORY)[1].startswith("0 targets segmented into out, 2 kept")
    encode("--window", "-9", "300")
    code, _, err = run("--uncertainty", "--resume", supports=MEMORY)
    assert (code, err.partition("got another ")[2]) == (2, "support, window\n")


def test_what_a_budget_leaves_uncovered_is_said(here, run):
    own = (*FOLDERS, "--size", "own")
    code, out, err = run("--uncertainty", "--budget", "5", supports=own)
    assert (code, out) == (0, "2 targets segmented into out; classes: 255 (in 2 examples)\n")
    lost = f"about {icseg.PatchICLConfig.sparse().tolerance:.2g} of Dice or more may be lost"
    assert err == f"icseg: 2 of 2 slices: the budget left patches out where {lost}\n"
    assert run("--budget", "5", supports=own)[2] == ""
    assert run("--uncertainty", "--budget", "all", supports=own)[2] == ""
    assert run("--uncertainty", supports=own)[2] == ""
    assert run("--uncertainty", "--budget", "5", "--resume", supports=own)[2].endswith("got another budget\n")


def save_memory(**fields):
    fields = {"fingerprint": "f", "batch": 1, "tensors": {"x": torch.zeros(1)}} | fields
    icseg.SupportMemory(**fields).save("task.safetensors")


BAD_MEMORIES = {
    "no memory": (lambda: Path("task.safetensors").unlink(), [], r"got task\.safetensors$"),
    "truncated": (lambda: truncate(Path("task.safetensors")), [], r"task\.safetensors must be a support memory"),
    "of another model": (save_memory, [], "memory must come from a model with configuration"),
    "of several sets": (lambda: save_memory(batch=3), [], "memory must hold one support set, got 3"),
    "another size": (lambda: None, ["--size", "160"], r"size must be that of the memory \(128\), got 160"),
    "own size": (lambda: None, ["--size", "own"], r"size must be that of the memory \(128\), got the images' own"),
    "absent class": (lambda: None, ["--class", "3"], r"classes must be ids in the memory \(255\), got 3"),
    "one folder": (lambda: None, FOLDERS[:2], "or --memory, got --support-images, --memory"),
}


@pytest.mark.parametrize("case", BAD_MEMORIES)
def test_an_unfit_memory_is_one_sentence_and_nothing_written(here, run, encode, case):
    change, arguments, sentence = BAD_MEMORIES[case]
    encode()
    change()
    before = listing(here)
    code, out, err = run(*arguments, supports=MEMORY)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(sentence, err.strip())
    assert listing(here) == before


def test_supports_must_be_given(here, run):
    code, _, err = run(supports=())
    assert (code, err.endswith("or --memory, got none\n")) == (2, True)
    code, _, err = run(supports=FOLDERS[:2])
    assert (code, err.endswith("or --memory, got --support-images\n")) == (2, True)


BAD_ENCODINGS = {
    "ending": (lambda: None, ["--out", "task.pt"], r"out must end in \.safetensors, got task\.pt"),
    "folder": (lambda: None, ["--out", "none/task.safetensors"], "path must lie in an existing folder"),
    "only background": (
        lambda: [labels(Path(f"masks/{i}.png"), class_id=0) for i in (0, 1)],
        [],
        "support_masks must mark at least one pixel",
    ),
    "image without mask": (lambda: Path("masks/1.png").unlink(), [], r"support image images/1\.png must have a mask"),
    "no checkpoint": (lambda: None, ["--checkpoint", "none.safetensors"], r"none\.safetensors"),
    "output is the checkpoint": (
        lambda: icseg.PatchICL(TINY).save_pretrained("task.safetensors"),
        ["--checkpoint", "task.safetensors"],
        "out must not replace the checkpoint, got task",
    ),
}


@pytest.mark.parametrize("case", BAD_ENCODINGS)
def test_what_cannot_be_encoded_is_one_sentence_and_nothing_written(here, encode, case):
    change, arguments, sentence = BAD_ENCODINGS[case]
    change()
    before = listing(here)
    code, out, err = encode(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(sentence, err)
    assert listing(here) == before


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (None, None),
        ("200", 200),
        ("1.5GF", Budget(gflops=1.5)),
        ("2GF", Budget(gflops=2)),
        ("all", Budget(tolerance=0)),
    ],
)
def test_budgets(text, budget):
    assert segmenting.parse_budget(text) == budget


def interrupt_at(monkeypatch, name, error=KeyboardInterrupt):
    """Raise `error` when the target `name` is segmented."""
    segment = inference.Segmenter.__call__

    def interrupted(self, target, **options):
        if Path(target).name == name:
            raise error
        return segment(self, target, **options)

    monkeypatch.setattr(inference.Segmenter, "__call__", interrupted)


def test_interruption_keeps_what_is_done_and_resume_goes_on(here, run, monkeypatch):
    run("--uncertainty", out="whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "b.png")
        code, _, err = run("--uncertainty")
    assert (code, err) == (130, "icseg: interrupted\n")
    assert names() == ["a_mask.png", "a_uncertainty.png", "icseg.json"]
    first = Path("out/a_mask.png").stat().st_mtime_ns
    code, out, _ = run("--uncertainty", "--resume")
    assert code == 0
    assert out.startswith("1 target segmented into out, 1 kept from an earlier run")
    assert Path("out/a_mask.png").stat().st_mtime_ns == first
    assert listing("out") == listing("whole")


def test_interruption_while_writing_leaves_no_partial_file(here, run, monkeypatch):
    from icseg.data.formats.raster import RasterGeometry

    def half(self, path, array):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RasterGeometry, "write", half)
        assert run()[0] == 130
    assert names() == ["icseg.json"]


def test_termination_is_a_clean_end(here, capsys, checkpoint, monkeypatch):
    def terminated(self, target, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(inference.Segmenter, "__call__", terminated)
    arguments = ["segment", "t", "--support-images", "images", "--support-masks", "masks", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["icseg", *arguments, "--checkpoint", str(checkpoint), "--device", "cpu"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert names() == ["icseg.json"]


def test_resume_makes_again_what_is_missing_or_of_another_input(here, run):
    run("--overlay")
    Path("out/a_overlay.png").unlink()
    picture(Path("t/b.png"), 20, 20, seed=9)
    code, out, _ = run("--overlay", "--resume")
    assert code == 0
    assert out.startswith("2 targets segmented into out;")
    with Picture.open("out/b_mask.png") as mask:
        assert mask.size == (20, 20)


def test_resume_with_nothing_left_loads_no_model(here, run, monkeypatch):
    run()
    before = listing("out")
    monkeypatch.setattr(job, "Segmenter", None)
    monkeypatch.setattr(icseg.PatchICL, "from_pretrained", None)
    code, out, _ = run("--resume")
    assert (code, out) == (
        0,
        "0 targets segmented into out, 2 kept from an earlier run; classes: 255 (in 2 examples)\n",
    )
    assert listing("out") == before


@pytest.mark.parametrize(
    ("arguments", "names_given"),
    [(["--threshold", "0.4"], "threshold"), (["--size", "160", "--overlay"], "overlay, size")],
)
def test_resume_refuses_other_settings(here, run, arguments, names_given):
    run()
    before = listing("out")
    code, _, err = run("--resume", *arguments)
    assert (code, err) == (
        2,
        f"icseg: error: resume needs the settings of the run in out, got another {names_given}\n",
    )
    picture(Path("images/0.png"), seed=99)
    assert run("--resume")[2].endswith("got another support\n")
    assert listing("out") == before


def test_resume_does_not_mind_how_fast(here, run):
    run()
    assert run("--resume", "--batch-size", "1", "--threads", "1")[0] == 0


def test_resume_refuses_a_damaged_record(here, run):
    Path("out").mkdir()
    Path("out/icseg.json").write_text("{")
    code, _, err = run("--resume")
    assert code == 2
    assert "out/icseg.json must be the record of an earlier run, got a damaged file" in err


def test_a_fresh_run_forgets_the_record_of_other_settings(here, run):
    run("--threshold", "0.3")
    run(targets=["t/a.png"])
    assert run("--resume")[1].startswith("1 target segmented into out, 1 kept")


def test_train_and_evaluate_pass_their_options_on(here, capsys, monkeypatch, checkpoint):
    import icseg.training

    calls = []

    def train_from_file(config, directory, **options):
        calls.append((config, directory, options))
        return icseg.training.TrainingResult(3, 0.1, not options["resume"], Path("out/m.safetensors"), 0.25)

    monkeypatch.setattr(icseg.training, "train_from_file", train_from_file)
    code, out, _ = command(capsys, "train", "--config", "c.toml", "--out", "out", "--device", "cpu")
    assert code == 0
    assert out.splitlines() == ["3 steps in 0.1 minutes, validation Dice 0.250", "out/m.safetensors"]
    code, _, err = command(capsys, "train", "--config", "c.toml", "--out", "out", "--resume")
    assert (code, err) == (130, "icseg: interrupted; --resume goes on in out\n")
    assert [call[2]["resume"] for call in calls] == [False, True]
    assert calls[0][:2] == (Path("c.toml"), Path("out"))

    with monkeypatch.context() as second:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            second.setenv(name, value)
        assert command(capsys, "train", "--config", "c.toml", "--out", "out") == (0, "", "")

    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype(np.uint8)
    np.savez("pack.npz", images=images, masks=(images > 128).astype(np.uint8), class_names=["no", "bright"])
    code, out, _ = command(
        capsys, "evaluate", "pack.npz", "--checkpoint", checkpoint, "--limit", "2", "--out", "scores.json"
    )
    assert code == 0
    assert "| pack | bright | 2 |" in out
    assert json.loads(Path("scores.json").read_text())["classes"][0]["class_name"] == "bright"
    code, _, err = command(capsys, "evaluate", "none.npz", "--checkpoint", checkpoint)
    assert (code, err) == (2, "icseg: error: pack must be an existing .npz file, got none.npz\n")


def test_evaluate_checks_before_it_scores(here, capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(icseg.evaluation.run, "score_unit", None)  # nothing may be computed
    evaluate = ("evaluate", "--checkpoint", checkpoint)
    code, _, err = command(capsys, *evaluate)
    assert (code, err) == (2, "icseg: error: evaluate needs a data set or synthetic tasks to score on, got neither\n")
    code, _, err = command(capsys, *evaluate, "--synthetic", "2", "--out", "none/scores.json")
    assert (code, err) == (2, "icseg: error: path must lie in an existing folder, got none/scores.json\n")
    Path("t.json").mkdir()
    code, _, err = command(capsys, *evaluate, "--synthetic", "2", "--out", "t.json")
    assert (code, err) == (2, "icseg: error: path must be that of a file, got the folder t.json\n")
    code, _, err = command(capsys, *evaluate, "--synthetic", "2", "--seed", "-1")
    assert code == 2
    assert "Invalid value for '--seed'" in err


def test_evaluate_on_synthetic_tasks_alone(here, capsys, checkpoint):
    arguments = ("--synthetic", "2", "--size", "32", "--support", "1", "--device", "cpu", "--checkpoint", checkpoint)
    code, out, _ = command(capsys, "evaluate", *arguments)
    assert code == 0
    assert "| synthetic |" in out
    assert out.endswith(f"|\n\n{icseg.evaluation.outputs.LEGEND}\n")


def test_a_pack_without_a_class_to_score_is_one_sentence(here, capsys, checkpoint):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32)).astype(np.uint8)
    np.savez("pack.npz", images=images, masks=(images > 128).astype(np.uint8), class_names=["no", "bright"])
    code, out, err = command(capsys, "evaluate", "pack.npz", "--checkpoint", checkpoint, "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith("icseg: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FloatingPointError("loss became nan at step 3"), "loss became nan at step 3"),
        (MemoryError(), cli.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory."), cli.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), cli.OUT_OF_MEMORY),
    ],
)
def test_what_fails_on_the_way_ends_with_code_1(here, run, monkeypatch, error, sentence):
    interrupt_at(monkeypatch, "b.png", error)
    code, _, err = run()
    assert (code, err.splitlines()[-1]) == (1, f"icseg: error: {sentence}")
    assert names() == ["a_mask.png", "icseg.json"]


def test_other_errors_of_the_program_are_not_hidden(here, run, monkeypatch):
    interrupt_at(monkeypatch, "b.png", RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        run()


def test_help_and_version_do_not_import_torch():
    script = "import sys, icseg.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False).returncode == 0
    version = subprocess.run(
        [sys.executable, "-m", "icseg.cli", "--version"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    assert version.stdout == f"icseg {icseg.__version__}\n"


def test_exit_codes_reach_the_shell(here, checkpoint):
    options = ["--support-images", here / "images", "--support-masks", here / "masks", "--out", here / "out"]
    options += ["--checkpoint", checkpoint, "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, "-m", "icseg.cli", "segment", "none.png", *options],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (2, "icseg: error: none.png must be an existing file\n")
    assert not Path("out").exists()


def test_supports_are_paired_by_name(here):
    picture(Path("images/scan.1.jpg"))
    picture(Path("images/x.png"))
    picture(Path("images/x_mask.png"))
    for name in ("scan.1_mask", "x", "x_mask"):
        labels(Path(f"masks/{name}.png"))
    assert [(a.name, b.name) for a, b in job.pair_supports(Path("images"), Path("masks"))] == [
        ("0.png", "0.png"),
        ("1.png", "1.png"),
        ("scan.1.jpg", "scan.1_mask.png"),
        ("x.png", "x.png"),
        ("x_mask.png", "x_mask.png"),
    ]


def test_curves(here, capsys, monkeypatch):
    Path("run").mkdir()
    Path("run/train.csv").write_text("step,minutes,total\n1,0.1,2.0\n2,0.2,1.0\n")
    assert command(capsys, "curves", "run", "--out", "curves.png", "--minutes") == (0, "curves.png\n", "")
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = command(capsys, "curves", "run", "none", "--out", "curves.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "run must be a folder of icseg train with rows in train.csv, got none" in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command(capsys, "curves", "run", "--out", "curves.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'icseg[train]'" in err


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["icseg", "--version"])
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("icseg", run_name="__main__")
    assert (end.value.code, capsys.readouterr().out) == (0, f"icseg {icseg.__version__}\n")
