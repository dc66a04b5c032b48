"""The protocol: who may support whom, what the seeds draw, and arguments that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_pack import write_pack, write_varied_pack

from icseg.data.synthetic import EVALUATION_SEED, generate_task, pool_task_seed
from icseg.evaluation import EvaluationProtocol, Pack, load_dataset, pack_cases, synthetic_cases

SEEDS = tuple(range(8))


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    return load_dataset(write_pack(tmp_path / "toy.npz"))


def draws(pack: Pack, **options: object) -> list[tuple[int, tuple[int, ...]]]:
    return [(case.number, case.supports) for case in pack_cases(pack, 1, **options)]  # type: ignore[arg-type]


def test_supports_contain_the_class_and_are_other_patients_for_every_seed(pack: Pack) -> None:
    cases = pack_cases(pack, 1, seeds=SEEDS)
    assert len(cases) == 9 * len(SEEDS)
    assert {case.number for case in cases} == set(range(9))
    for case in cases:
        assert len(set(case.supports)) == 3
        assert all(s < 9 and s // 2 != case.number // 2 for s in case.supports)
        assert case.patient == f"p{case.number // 2}"
        assert case.source == case.number // 2


def test_a_case_holds_the_images_that_it_names(pack: Pack) -> None:
    for case in pack_cases(pack, 1):
        for number, image, mask in zip(
            (case.number, *case.supports),
            (case.target, *case.support_images),
            (case.mask, *case.support_masks),
            strict=True,
        ):
            assert torch.equal((image[0] * 255).round().to(torch.uint8), torch.from_numpy(pack.images[number]))
            assert torch.equal(mask[0] > 0.5, torch.from_numpy(pack.masks[number] == 1))
        assert case.class_name == "square"


def test_without_patients_any_other_image_supports(tmp_path: Path) -> None:
    pack = load_dataset(write_pack(tmp_path / "toy.npz", patient=None))
    for case in pack_cases(pack, 1, support=8):
        assert sorted([case.number, *case.supports]) == list(range(9))
        assert case.patient is None


def test_seeds_change_the_draws_and_the_same_seed_repeats_them(pack: Pack) -> None:
    first, again, other = draws(pack), draws(pack), draws(pack, seeds=(1,))
    assert first == again
    assert dict(first) != dict(other)
    assert dict(first).keys() == dict(other).keys()


def test_several_seeds_draw_as_each_of_them_alone(pack: Pack) -> None:
    several = draws(pack, seeds=(3, 7))
    assert [target for target, _ in several[::2]] == [target for target, _ in several[1::2]]
    assert dict(several[::2]) == dict(draws(pack, seeds=(3,)))
    assert dict(several[1::2]) == dict(draws(pack, seeds=(7,)))


def test_the_limit_takes_the_first_of_all(pack: Pack) -> None:
    assert draws(pack, limit=4) == draws(pack)[:4]
    assert draws(pack, limit=4, seeds=(0, 1)) == draws(pack, seeds=(0, 1))[:8]
    assert draws(pack, limit=4, seeds=(1,)) != draws(pack, limit=4)


def test_fewer_supports_than_asked_are_used(pack: Pack) -> None:
    assert {len(supports) for _, supports in draws(pack, support=100)} == {7, 8}


def test_a_class_of_one_patient_has_no_targets(pack: Pack) -> None:
    assert len(pack_cases(pack, 2)) == 0


def test_cases_by_number_and_slice(tmp_path: Path) -> None:
    pack = load_dataset(write_varied_pack(tmp_path / "varied.npz"))
    cases = pack_cases(pack, 2, seeds=(0, 1))
    target = cases[2].number
    assert cases.of(target).supports == cases[2].supports
    assert [case.supports for case in cases[2:4]] == [cases[2].supports, cases[3].supports]
    assert cases[-1].number == cases[len(cases) - 1].number
    with pytest.raises(IndexError):
        cases[len(cases)]


def test_synthetic_cases_are_held_out_tasks_of_class_1() -> None:
    cases = synthetic_cases(4, support=2, size=64)
    tasks = [generate_task(pool_task_seed(EVALUATION_SEED, i), 3, 64) for i in range(4)]
    assert any(task.masks.max() > 1 for task in tasks)
    for number, (case, task) in enumerate(zip(cases, tasks, strict=True)):
        assert (case.number, case.class_name, case.supports) == (number, task.family, ())
        shown = torch.cat([case.mask, case.support_masks[:, 0]])
        assert np.array_equal(shown.numpy() > 0.5, task.masks == 1)
    assert torch.equal(cases.of(2).target, cases[2].target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 31}, "size must be 32 to 4096 pixels, or own, got 31"),
        ({"size": 5000}, "size must be 32 to 4096 pixels, or own, got 5000"),
        ({"support": 0}, "support must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"seeds": ()}, r"seeds must be at least one number from 0, each once, got \[\]"),
        ({"seeds": (0, -1)}, r"seeds must be at least one number from 0, each once, got \[0, -1\]"),
        ({"seeds": (2, 2)}, r"seeds must be at least one number from 0, each once, got \[2, 2\]"),
    ],
)
def test_bad_protocols(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationProtocol(**fields)  # type: ignore[arg-type]


def test_bad_arguments(pack: Pack) -> None:
    with pytest.raises(ValueError, match="support must be at least 1, got 0"):
        pack_cases(pack, 1, support=0)
    with pytest.raises(ValueError, match="seeds must be at least one number"):
        pack_cases(pack, 1, seeds=())
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        synthetic_cases(0)
