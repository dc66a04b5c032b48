"""Which backend serves: order, names, scopes, the environment, and what the errors say."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from icseg_kernels import BackendError, use_backend
from icseg_kernels import backend as backends
from icseg_kernels.backend import Backend, declare, select, status

OP = "test_op"
ROOT = Path(__file__).resolve().parent.parent


def even_only(x: Tensor) -> list[str]:
    return [] if x.shape[0] % 2 == 0 else [f"the first dimension must be even, got {x.shape[0]}"]


def float32_only(x: Tensor) -> list[str]:
    return [] if x.dtype == torch.float32 else [f"dtype must be float32, got {x.dtype}"]


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An op with a missing, two particular and one general backend; no choice in the environment."""
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    monkeypatch.setattr(backends, "_from_environment", None)
    declare(
        OP,
        {
            "cuda": Backend(missing=lambda: ["it was not built", "no GPU was found"], unsupported=float32_only),
            "native": Backend(unsupported=lambda x: even_only(x) + float32_only(x)),
            "reference": Backend(),
        },
    )
    yield
    assert backends._forced.get() is None
    assert backends._forced_in_graphs is None


def test_takes_the_first_that_can_serve() -> None:
    assert select(OP, None, torch.zeros(2)) == "native"
    assert select(OP, None, torch.zeros(3)) == "reference"
    assert select(OP, None, torch.zeros(2, dtype=torch.float64)) == "reference"


def test_named_backend_serves_where_it_can() -> None:
    assert select(OP, "native", torch.zeros(2)) == "native"
    assert select(OP, "reference", torch.zeros(2)) == "reference"


def test_named_backend_never_falls_back_and_says_why() -> None:
    with pytest.raises(BackendError) as raised:
        select(OP, "native", torch.zeros(3, 4, dtype=torch.float64))
    assert str(raised.value) == (
        "the native backend cannot serve test_op of (3, 4) torch.float64 on cpu: "
        "the first dimension must be even, got 3; dtype must be float32, got torch.float64"
    )


def test_every_reason_is_given() -> None:
    with pytest.raises(BackendError, match="it was not built; no GPU was found; dtype must be float32"):
        select(OP, "cuda", torch.zeros(2).half())


def test_undeclared_backend_names_the_declared_ones() -> None:
    with pytest.raises(BackendError, match="test_op has no triton backend; it has cuda, native, reference"):
        select(OP, "triton", torch.zeros(2))


def test_backend_error_is_not_implemented_error() -> None:
    assert issubclass(BackendError, NotImplementedError)


@pytest.mark.parametrize("name", ["fast", "Native", ""])
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"backend must be one of cuda, triton, native, reference or None, got '{name}'"
    with pytest.raises(ValueError, match=message):
        select(OP, name, torch.zeros(2))
    with pytest.raises(ValueError, match=message), use_backend(name):
        pass
    if name:
        monkeypatch.setattr(backends, "_from_environment", name)
        with pytest.raises(ValueError, match=f"{message} from ICSEG_BACKEND"):
            select(OP, None, torch.zeros(2))


def test_use_backend_nests_and_lifts() -> None:
    x = torch.zeros(2)
    with use_backend("reference"):
        assert select(OP, None, x) == "reference"
        with use_backend("native"):
            assert select(OP, None, x) == "native"
        with use_backend(None):
            assert select(OP, None, torch.zeros(2)) == "native"
        assert select(OP, None, x) == "reference"
    assert select(OP, None, x) == "native"


def test_use_backend_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert select(OP, None, torch.zeros(2)) == "native"


def test_use_backend_does_not_fall_back() -> None:
    with use_backend("native"), pytest.raises(BackendError, match="the first dimension must be even"):
        select(OP, None, torch.zeros(3))


def test_argument_before_scope_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setattr(backends, "_from_environment", "cuda")
    with pytest.raises(BackendError, match="the cuda backend cannot serve"):
        select(OP, None, x)
    with use_backend("reference"):
        assert select(OP, None, x) == "reference"
        assert select(OP, "native", x) == "native"
    monkeypatch.setattr(backends, "_from_environment", "reference")
    assert select(OP, None, x) == "reference"


@pytest.mark.parametrize(("value", "named"), [("", None), ("fast", "fast")])
def test_environment_is_read_once_at_import(value: str, named: str | None) -> None:
    program = """if True:
        import os
        from icseg_kernels import backend
        os.environ["ICSEG_BACKEND"] = "cuda"
        print(backend.named_by_environment())"""
    environment = {**os.environ, "ICSEG_BACKEND": value}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(named)


def test_threads_choose_apart() -> None:
    both_inside = threading.Barrier(2, timeout=10)
    seen: dict[str, str] = {}

    def inside(name: str) -> None:
        with use_backend(name):
            both_inside.wait()
            seen[name] = select(OP, None, torch.zeros(2))
            both_inside.wait()

    threads = [threading.Thread(target=inside, args=(name,)) for name in ("native", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"native": "native", "reference": "reference"}


def test_a_new_thread_does_not_inherit_the_choice() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(select(OP, None, torch.zeros(2))))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_tasks_choose_apart() -> None:
    async def inside(name: str) -> str:
        with use_backend(name):
            await asyncio.sleep(0)
            return select(OP, None, torch.zeros(2))

    async def both() -> list[str]:
        return await asyncio.gather(inside("native"), inside("reference"))

    assert asyncio.run(both()) == ["native", "reference"]


def test_compiled_code_follows_the_choice() -> None:
    factor = {"native": 2, "reference": 3}
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x * factor[select(OP, None, x)], fullgraph=True, backend="eager")
    x = torch.ones(2)
    assert compiled(x).tolist() == [2, 2]
    with use_backend("reference"):
        assert compiled(x).tolist() == [3, 3]
    assert compiled(x).tolist() == [2, 2]
    assert compiled(torch.ones(3)).tolist() == [3, 3, 3]


def test_status_gives_the_reasons_of_what_is_missing() -> None:
    assert status()[OP] == {"cuda": ["it was not built", "no GPU was found"], "native": [], "reference": []}
    assert list(status()) == sorted(status())


def test_status_knows_every_public_op() -> None:
    ops = {"cross_conv2d", "cross_conv2d_mean", "gather_patches", "gumbel_topk", "sample_patches"}
    ops |= {"cross_conv2d_and_mean", "group_norm_film", "scatter_patches", "selected_attention", "small_convolutions"}
    ops |= {"transformer_block", "halvings", "upsample_with_patches", "qkv_projection"}
    assert ops <= status().keys()
    for op in ops:
        assert status()[op]["reference"] == []


@pytest.mark.parametrize("names", [["native"], ["reference", "fast"], []])
def test_declaring_needs_known_names_and_a_reference(names: list[str]) -> None:
    with pytest.raises(ValueError, match="op other must declare backends among"):
        declare("other", {name: Backend() for name in names})
    assert "other" not in status()
