"""What the benchmarks stand on: rows, comparisons, the quick cases, the dense baseline, and accuracy rows."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_pack import write_varied_pack

import icseg
from icseg.baselines.dense import DenseConfig
from icseg.sparse.cost import target_flops
from icseg.sparse.network import SparseNetwork
from icseg.sparse.patches import CONTEXT, CROP, HALO, PATCH, context_corner, cut, patch_inputs
from icseg.sparse.propagation import CELLS, cells, pixels
from icseg.sparse.pyramid import Pyramid

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CHECKS = 2  # calls of each rival before any is timed: of outputs, and of memory


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "harness")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "models")


@pytest.fixture
def no_rates(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda threads: 4e9)
    monkeypatch.setattr(harness, "matrix_rate", lambda threads: 1e9)


class Rival:
    """Returns `value`, and counts its calls."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.full((3,), self.value)


# Rows


def test_rows_without_the_newer_fields_are_read(harness: ModuleType) -> None:
    lines = (BENCHMARKS / "results" / "xeon-avx512-2-threads.jsonl").read_text().splitlines()
    old = [line for line in lines if '"matrix_rate"' not in line]
    rows = [harness.Row(**json.loads(line)) for line in lines]
    assert len(rows) == len(lines)
    assert all(harness.Row(**json.loads(line)).left_out == {} for line in old)


@pytest.mark.usefixtures("no_rates")
def test_a_row_says_what_was_counted_and_left_out(harness: ModuleType, tmp_path: Path) -> None:
    row = harness.compare(
        "subject",
        "case",
        {"torch": Rival(1), "native": Rival(1)},
        tolerance=0.0,
        flops={"native": 8.0, "slow": 1e15},
        bytes=16,
        left_out={"slow": "takes a week"},
        rounds=2,
    )
    assert (row.matrix_rate, row.copy_bandwidth, row.rounds) == (1e9, 4e9, 2)
    assert row.seconds.keys() == {"torch", "native"}
    harness.append(tmp_path / "rows.jsonl", row)
    assert harness.Row(**json.loads((tmp_path / "rows.jsonl").read_text())) == row


def test_what_was_not_counted_has_no_roof(harness: ModuleType) -> None:
    row = harness.compare("subject", "case", {"a": Rival(1)}, tolerance=0.0, rounds=1)
    assert (row.matrix_rate, row.copy_bandwidth) == (0.0, 0.0)
    assert row.share_of_roof("a") is None


@pytest.mark.parametrize(("flops", "expected"), [(1e6, 0.5), (4e6, 1.0), (0.0, 0.5)])
def test_the_roof_is_the_longer_of_moving_and_computing(harness: ModuleType, flops: float, expected: float) -> None:
    """8 MB at 4 GB/s take 2 ms; 1 MFLOP at 1 GFLOP/s takes 1 ms; the call takes 4 ms."""
    counted = {"native": flops} if flops else {}
    row = harness.Row(
        "", "", "", 1, {"native": 4e-3}, {}, counted, 8_000_000, 4e9, 1, "", {}, "", matrix_rate=1e9 if flops else 0.0
    )
    assert row.share_of_roof("native") == pytest.approx(expected)
    summary = row.summary()
    assert (summary["backend"], summary["share_of_roof"]) == ("native", pytest.approx(expected))


def test_the_matrix_rate_is_positive(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "seconds_of", lambda run, repeats=1: 0.5)
    assert harness.matrix_rate.__wrapped__(1) == 2 * 2048**3 / 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc, of Linux")
def test_a_row_says_what_a_call_holds(harness: ModuleType) -> None:
    def large() -> Tensor:
        return torch.ones(2**23).view(4, -1).sum(dim=1)  # 32 MiB

    rivals = {"large": large, "small": lambda: torch.full((4,), 2.0**21)}
    found = harness.compare("s", "c", rivals, tolerance=0.0, rounds=1).megabytes
    assert 31 < found["large"] < 34
    assert found["small"] < 1


# Comparisons


def test_outputs_that_disagree_are_not_timed(harness: ModuleType) -> None:
    rivals = {"a": Rival(1.0), "b": Rival(1.1), "c": Rival(1.0)}
    with pytest.raises(AssertionError, match=r"subject case: outputs must agree within 0.05, got {'b': 0.1"):
        harness.compare("subject", "case", rivals, tolerance=0.05)
    assert [rival.calls for rival in rivals.values()] == [CHECKS] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_disagree(harness: ModuleType, value: float) -> None:
    with pytest.raises(AssertionError, match="must agree"):
        harness.compare("subject", "case", {"a": Rival(1.0), "b": Rival(value)}, tolerance=1e9)


def test_pairs_with_a_rival_that_is_left_out_are_passed_over(harness: ModuleType) -> None:
    rivals, same = {"b": Rival(1.0), "c": Rival(1.0), "d": Rival(7.0)}, {"b": "a", "a": "c", "c": "b"}
    row = harness.compare("s", "c", rivals, tolerance=0.0, same=same, left_out={"a": "too large"}, rounds=1)
    assert row.max_abs_difference == {"c": 0.0}
    with pytest.raises(ValueError, match="left_out must name none of the rivals, got b"):
        harness.compare("s", "c", rivals, tolerance=0.0, left_out={"b": "too large"})


def test_a_limit_leaves_three_rounds(harness: ModuleType) -> None:
    rival = Rival(1.0)
    assert harness.compare("s", "c", {"a": rival}, tolerance=0.0, rounds=9, limit=0.0).rounds == 3
    assert rival.calls == CHECKS + 1 + 3


def test_a_very_slow_rival_is_timed_once(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Rival(1.0), Rival(1.0)
    monkeypatch.setattr(harness, "seconds_of", lambda run, repeats=1: run.calls or {slow: 60.0, fast: 0.1}[run])
    slow.calls = fast.calls = -CHECKS
    row = harness.compare("s", "c", {"slow": slow, "fast": fast}, tolerance=0.0, rounds=3, limit=1.0)
    assert row.seconds == {"slow": 60.0, "fast": 0.1}
    assert (slow.calls, row.rounds) == (0, 3)


def test_the_one_call_of_a_rival_is_its_time(harness: ModuleType) -> None:
    rivals = {"a": Rival(1.0), "b": Rival(1.0)}
    row = harness.compare("s", "c", rivals, tolerance=0.0, rounds=3, single=0.0)
    assert [rival.calls for rival in rivals.values()] == [CHECKS] * 2
    assert 0 < row.seconds["a"] < 1


def test_a_slow_rivals_first_timing_is_its_first_round(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Rival(1.0), Rival(1.0)

    def once(run: Rival, repeats: int = 1) -> float:
        run()
        return {slow: 2.0, fast: 0.1}[run]

    monkeypatch.setattr(harness, "seconds_of", once)
    rivals = {"slow": slow, "fast": fast}
    row = harness.compare("s", "c", rivals, tolerance=0.0, rounds=3, warm=True)
    assert row.seconds == {"slow": 2.0, "fast": 0.1}
    assert (slow.calls, fast.calls) == (CHECKS + 3, CHECKS + 1 + 2 * 3)


# The suite

BENCH = """
import pytest, torch
from harness import compare

@pytest.mark.parametrize("threads", [1])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def bench_shift(record, shift, threads):
    rivals = {"torch": lambda: torch.zeros(2), "native": lambda: torch.zeros(2) + shift}
    record(compare("shift", f"by {shift}", rivals, tolerance=0.5, rounds=1), rivals["native"])
"""


def run_pytest(*arguments: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    # pytest-benchmark times nothing in a worker of pytest-xdist.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=BENCHMARKS.parent)


def test_a_case_whose_outputs_disagree_fails_without_a_time(tmp_path: Path) -> None:
    for name in ("conftest.py", "harness.py"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    (tmp_path / "bench_shift.py").write_text(BENCH)
    results, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    options = ["--benchmark-only", "--results", str(results), "--benchmark-json", str(report)]
    found = run_pytest("-c", str(BENCHMARKS.parent / "pyproject.toml"), str(tmp_path), *options)
    assert found.returncode == 1, found.stderr
    assert "outputs must agree within 0.5, got {'native': 1.0}" in found.stdout
    assert found.stdout.count("\nbench_shift[") == 1, found.stdout  # a line of the table of times
    assert [json.loads(line)["case"] for line in results.read_text().splitlines()] == ["by 0.0"]
    (timed,) = json.loads(report.read_text())["benchmarks"]
    assert timed["params"] == {"shift": 0.0, "threads": 1}
    facts = timed["extra_info"]
    assert facts["max_abs_difference"] == {"native": 0.0}
    assert (facts["case"], facts["backend"], facts["threads"], facts["bytes"]) == ("by 0.0", "native", 1, 0)
    assert facts["share_of_roof"] is None
    assert facts["machine"]
    assert facts["commit"]
    assert facts["versions"]["torch"] == torch.__version__


def test_quick_keeps_few_cases_of_every_file() -> None:
    found = run_pytest(str(BENCHMARKS), "--benchmark-only", "--quick", "--collect-only", "-q", threads=2)
    cases = [line for line in found.stdout.splitlines() if "::" in line]
    assert {Path(case.split("::")[0]).name for case in cases} == {path.name for path in BENCHMARKS.glob("bench_*.py")}
    assert len(cases) <= 30, found.stdout
    assert not [case for case in cases if case.endswith("-1]")]  # with all threads only


# The dense baseline

SIDE, SUPPORT = 32, 2


@pytest.fixture
def task(models: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
    case = models.synthetic_case(SIDE, SUPPORT)
    return case.target[None], case.support_images[None], case.support_masks[None]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value


def plain_block(block: torch.nn.Module, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    x = block.norm_attention(tokens)
    own = block.key_value(x)
    pairs = own if memory is None else torch.cat([memory, own], 1)
    query, key, value = (
        t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in (block.query(x), *pairs.chunk(2, -1))
    )
    attended = softmax_attention(query, key, value, query.shape[-1] ** -0.5)
    tokens = tokens + block.out(attended.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.norm_mlp(tokens)), own


def plain_dense(network: SparseNetwork, target: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Attention over all 8 x 8 patches of a target and its support set, with every score in memory."""
    side = target.shape[-1]
    grid = torch.stack(torch.meshgrid(*[torch.arange(0, side, PATCH)] * 2, indexing="ij"), -1).view(1, -1, 2)
    support, count = images.shape[1], grid.shape[1]

    def encoded(image: Tensor, label: Tensor, around: Tensor, *, is_target: bool) -> tuple[Tensor, Tensor]:
        inputs = patch_inputs(Pyramid.of(image, 1), 0, grid.expand(len(image), -1, -1), label, around)
        return network.encoder(inputs, 0, is_target=is_target)

    coords = grid.expand(support, -1, -1)
    crops = cut(masks[0], coords - HALO, CROP) * 2 - 1
    around = cut(F.avg_pool2d(masks[0], 4) * 2 - 1, context_corner(coords), CONTEXT)
    features, tokens = encoded(images[0], crops, around, is_target=False)
    tokens = torch.cat([network.support_registers, tokens.flatten(0, 1)[None]], 1)
    memory = []
    for block in network.blocks:
        tokens, own = plain_block(block, tokens, None)
        memory.append(own)
    tokens = network.norm(tokens[:, -support * count :])
    inner = crops[..., HALO:-HALO, HALO:-HALO].flatten(0, 1)
    keys, values = network.propagation.support(features, tokens, inner)

    unknown = torch.zeros(1, count, 1, CROP, CROP)
    features, tokens = encoded(target, unknown, unknown, is_target=True)
    tokens = torch.cat([network.target_registers, tokens], 1)
    for block, of_support in zip(network.blocks, memory, strict=True):
        tokens, _ = plain_block(block, tokens, of_support)
    tokens = network.norm(tokens[:, -count:])
    propagation = network.propagation
    query = propagation._match(cells(features), tokens) * propagation.log_scale.exp()
    found = softmax_attention(query, keys, values, 1.0)[0].unflatten(1, (count, CELLS)).permute(1, 2, 0, 3)
    labels, learned = found[..., :4], found[..., 4:]
    propagated = pixels(labels.flatten(2)).unflatten(1, (propagation.heads, 1))
    prior = torch.zeros(count, 1, PATCH, PATCH)
    context = pixels(propagation.out(learned.flatten(2)))
    patches = network.decoder(features, tokens, propagated, context, prior, 0).change
    rows = side // PATCH
    whole = patches.view(rows, rows, PATCH, PATCH).transpose(1, 2).reshape(1, 1, side, side)
    return whole / network.temperature


@torch.inference_mode()
def test_dense_attention_is_over_all_tokens(models: ModuleType, task: tuple[Tensor, Tensor, Tensor]) -> None:
    target, images, masks = task
    dense, count = models.dense_global_attention(SIDE, SUPPORT), (SIDE // PATCH) ** 2
    memory = dense.encode_support(images, masks)
    output = dense(target, memory=memory, budget=models.EVERYTHING)
    assert [level.coords.shape[1] for level in output.levels] == [count]
    assert memory.tensors["level0.block0"].shape[1] == SUPPORT * count + dense.config.registers
    assert memory.tensors["level0.keys"].shape[2] == SUPPORT * count * CELLS
    assert bool(output.coverage.all())
    torch.testing.assert_close(output.logits, plain_dense(dense.network, *task), rtol=0, atol=1e-4)
    case = models.synthetic_case(SIDE, SUPPORT)
    torch.testing.assert_close(models.built(models.DENSE, case)(), output.logits, rtol=0, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize(("side", "level"), [(32, 0), (128, 2), (256, 3), (512, 3)])
def test_dense_attention_has_the_bundled_weights(models: ModuleType, side: int, level: int) -> None:
    bundled = icseg.PatchICL.from_pretrained()
    own, theirs = models.dense_global_attention(side, 1, bundled).state_dict(), bundled.state_dict()
    by_level = {"network.encoder.level_embedding", "network.decoder.propagation_gain"}
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, theirs[name][level : level + 1] if name in by_level else theirs[name])
    with pytest.raises(ValueError, match="side must be a level of a sparse model, got 100"):
        models.dense_global_attention(100, 1)


@torch.inference_mode()
def test_dense_attention_holds_no_scores(models: ModuleType) -> None:
    """Its look-up goes through torch's flash attention, whose cost the counter then names."""
    run = models.built(models.DENSE, models.synthetic_case(SIDE, SUPPORT))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


@torch.inference_mode()
def test_without_values_as_many_flops_are_counted(models: ModuleType) -> None:
    case = models.synthetic_case(64, SUPPORT)
    run = models.built(models.DENSE, case)
    fake = models.counted(models.DENSE, run)
    assert fake == models.counted(models.SPARSE, run)  # with values
    dense = models.dense_global_attention(64, SUPPORT)
    memory = dense.encode_support(case.support_images[None], case.support_masks[None])
    formula = models.support_flops(dense.network, [64 * SUPPORT]) + target_flops(dense.network, memory, [64])
    assert fake == pytest.approx(formula, rel=0.01)


def test_models_that_do_not_fit_are_left_out(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.synthetic_case(SIDE, SUPPORT)
    monkeypatch.setattr(models, "speed", lambda name: 1e9)
    assert models.left_out(models.DENSE, case, 170e9) is None
    reason = models.left_out(models.DENSE, case, 1000e9)
    assert reason == "a call would take about 1000 s, more than 180 s (1000 GFLOPs at the 1 GFLOP/s of 128 px)"
    assert "more than 20 s" in models.left_out(models.UNIVERSEG, case, 170e9, 20)
    monkeypatch.setattr(models, "free_megabytes", lambda: 1.0)
    assert models.left_out(models.DENSE, case, 1.0) == "needs about 2 MB by formula, of which 1 MB are free"
    assert models.left_out(models.SPARSE, case, 1e20) is None


@torch.inference_mode()
@pytest.mark.usefixtures("no_rates")
def test_a_model_that_is_left_out_is_counted_and_not_called(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.config.addinivalue_line("markers", "quick: as the benchmarks' own conftest registers it")
    bench, case = load(monkeypatch, "bench_model"), models.synthetic_case(SIDE, SUPPORT)
    monkeypatch.setattr(models, "speed", lambda name: 1.0)
    monkeypatch.setattr(models, "SLOWEST", 1.0)
    names = models.DENSE, models.SPARSE, models.KEPT
    row = bench.compared("model", "32 px S2", case, names, rounds=1)
    assert list(row.seconds) == [models.SPARSE, models.KEPT]
    assert row.left_out.keys() == {models.DENSE}
    assert row.flops.keys() == set(names)
    assert row.max_abs_difference == {models.KEPT: 0.0}


# Accuracy


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = load(monkeypatch, "accuracy")
    monkeypatch.setattr(
        script, "BUDGETS", {name: script.BUDGETS[name] for name in ("48 patches", "tolerance 0.02", "all")}
    )
    return script


def test_every_budget_is_scored_once(
    accuracy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, out = write_varied_pack(tmp_path / "toy.npz"), tmp_path / "rows.jsonl"
    arguments = [str(pack), "--out", str(out), "--size", "64", "--support", "2", "--limit", "2"]
    assert accuracy.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["class"], row["budget"]) for row in rows] == [
        (name, budget) for name in ("box", "bar/strip") for budget in accuracy.BUDGETS
    ]
    for row in rows:
        assert (row["subject"], row["dataset"], row["size"]) == ("accuracy", "toy", 64)
        assert (row["support"], row["targets"]) == (2, 2)
        assert 0 <= row["dice"] <= 1
        assert row["seconds"] > 0
    by_budget = {row["budget"]: row["gflops"] for row in rows if row["class"] == "box"}
    assert 0 < by_budget["48 patches"] < by_budget["all"]
    assert "| icseg-sparse-small | all | 2 |" in capsys.readouterr().out

    last = out.read_text().splitlines()[-1]
    out.write_text("\n".join(out.read_text().splitlines()[:-1]) + "\n")
    scored = []
    original = accuracy.rows_of
    monkeypatch.setattr(
        accuracy, "rows_of", lambda m, c, budgets: scored.append(list(budgets)) or original(m, c, budgets)
    )
    assert accuracy.main(arguments) == 0
    assert scored == [["all"]]
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[:-1] == rows[:-1]
    assert again[-1]["dice"] == json.loads(last)["dice"]


def test_other_models_are_scored_beside(accuracy: ModuleType, tmp_path: Path) -> None:
    config = DenseConfig(channels=(4, 4), image_size=64)
    icseg.PatchICL(config).save_pretrained(tmp_path / "universeg.safetensors")
    pack, out = write_varied_pack(tmp_path / "toy.npz"), tmp_path / "rows.jsonl"
    arguments = [str(pack), "--out", str(out), "--size", "64", "--support", "2", "--limit", "1"]
    arguments += ["--trained", "no time", "--checkpoint", f"UniverSeg={tmp_path / 'universeg.safetensors'}"]
    assert accuracy.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["trained"], row["budget"]) for row in rows] == [("UniverSeg", "no time", "")] * 2
    assert all(row["gflops"] > 0 for row in rows)
    with pytest.raises(SystemExit):
        accuracy.main([str(pack), "--out", str(out), "--checkpoint", "universeg.safetensors"])


def test_accuracy_is_that_of_the_evaluation(accuracy: ModuleType, tmp_path: Path) -> None:
    from icseg.evaluation import EvaluationProtocol, evaluate, load_dataset, model_predictor, pack_cases

    pack = write_varied_pack(tmp_path / "toy.npz")
    model = icseg.PatchICL.from_pretrained()
    scores = evaluate(model_predictor(model), pack, EvaluationProtocol(size=64, support=2, limit=2))
    expected = {s.class_name: sum(t.dice for t in s.targets) / len(s.targets) for s in scores}
    cases = pack_cases(load_dataset(pack, 64), 1, support=2, limit=2)
    found = accuracy.rows_of(model, cases, {"default": icseg.Budget(tolerance=model.config.tolerance)})
    assert found["default"]["dice"] == pytest.approx(expected["box"])
