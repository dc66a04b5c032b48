"""UniverSeg against the outputs of the published code, and its factorised form against the published way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from icseg.baselines.universeg import UniverSeg

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    with np.load(DATA / "universeg_8.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def published_state(recorded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("weight/"): v for k, v in recorded.items() if k.startswith("weight/")}


def inputs(recorded: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [recorded[f"in/{name}"] for name in ("target_image", "support_images", "support_masks")]


@pytest.mark.parametrize("factorised", [True, False])
def test_reproduces_the_published_outputs(recorded: dict[str, torch.Tensor], factorised: bool) -> None:
    model = UniverSeg.from_state_dict(published_state(recorded), factorised=factorised)
    with torch.no_grad():
        logits = model(*inputs(recorded))
    assert (logits - recorded["out/logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("images", [1, 2, 5])
def test_factorised_is_the_published_way(images: int) -> None:
    torch.manual_seed(images)
    model = UniverSeg((4, 6, 5)).double()
    slow = UniverSeg((4, 6, 5), factorised=False).double()
    slow.load_state_dict(model.state_dict())
    target = torch.rand(2, 1, 16, 24, dtype=torch.float64)
    support = torch.rand(2, images, 1, 16, 24, dtype=torch.float64)
    masks = (torch.rand(2, images, 1, 16, 24) > 0.5).double()
    fast_logits, slow_logits = model(target, support, masks), slow(target, support, masks)
    torch.testing.assert_close(fast_logits, slow_logits, rtol=0, atol=1e-12)
    fast_logits.square().sum().backward()
    slow_logits.square().sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), slow.named_parameters(), strict=True):
        if name != "decoder.1.support.weight" and name != "decoder.1.support.bias":  # read by nothing
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_support_order_does_not_matter(recorded: dict[str, torch.Tensor]) -> None:
    model = UniverSeg.from_state_dict(published_state(recorded))
    target, images, masks = inputs(recorded)
    with torch.no_grad():
        a, b = model(target, images, masks), model(target, images.flip(1), masks.flip(1))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_flops_of_both_ways() -> None:
    """The published formula, in units of a 64-to-64-channel convolution at full size: 8.594 S + 2.641."""
    unit, gflops = 2 * 9 * 64**2 * 32**2, {}
    for factorised in (False, True):
        model = UniverSeg(factorised=factorised)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.rand(1, 1, 32, 32), torch.rand(1, 3, 1, 32, 32), torch.rand(1, 3, 1, 32, 32))
        gflops[factorised] = counter.get_total_flops() / unit
    assert gflops[False] == pytest.approx(8.594 * 3 + 2.641, rel=2e-3)
    assert gflops[True] == pytest.approx(2.625 * 3 + 7.609, rel=2e-3)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_from_file(recorded: dict[str, torch.Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state = published_state(recorded)
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    model = UniverSeg.from_file(path)
    assert not model.training
    with torch.no_grad():
        assert (model(*inputs(recorded)) - recorded["out/logits"]).abs().max() < 1e-5


def test_foreign_files_are_refused(recorded: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="existing weight file"):
        UniverSeg.from_file(tmp_path / "none.pt")
    for name, content in (
        ("text.pt", b"no weights"),
        ("word.pt", b"hello"),
        ("empty.pt", b""),
        ("text.safetensors", b"no weights at all"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="must be a safetensors file or a torch file of tensors"):
            UniverSeg.from_file(tmp_path / name)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="UniverSeg state dict, got the keys other"):
        UniverSeg.from_file(tmp_path / "other.pt")
    for state in ({"epoch": 3}, {3: torch.zeros(1)}):
        torch.save(state, tmp_path / "mixed.pt")
        with pytest.raises(ValueError, match=r"weights must map names to tensors, got (int|Tensor) at"):
            UniverSeg.from_file(tmp_path / "mixed.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="with a list"):
        UniverSeg.from_file(tmp_path / "list.pt")
    for change in ("missing", "extra", "shape"):
        state = published_state(recorded)
        if change == "missing":
            del state["out_conv.conv.bias"]
        elif change == "extra":
            state["dec_blocks.9.weight"] = torch.zeros(1)
        else:
            state["dec_blocks.0.target.vmapped.conv.bias"] = torch.zeros(3)
        with pytest.raises(ValueError, match="UniverSeg state dict"):
            UniverSeg.from_state_dict(state)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"enc_blocks": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="must be a safetensors file or a torch file of tensors") as caught:
        UniverSeg.from_file(tmp_path / "evil.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_bad_arguments() -> None:
    model = UniverSeg((2, 2, 2, 2))
    image, support = torch.rand(1, 1, 16, 16), torch.rand(1, 2, 1, 16, 16)
    with pytest.raises(ValueError, match="divisible by 8, got 20 x 16"):
        model(torch.rand(1, 1, 20, 16), support, support)
    with pytest.raises(ValueError, match=r"target must have shape \[B, 1, H, W\], got \[1, 3, 16, 16\]"):
        model(torch.rand(1, 3, 16, 16), support, support)
    with pytest.raises(ValueError, match="support_images must have shape"):
        model(image, support[:, :0], support[:, :0])
    with pytest.raises(ValueError, match="support_masks must have the shape"):
        model(image, support, support[:, :1])
    with pytest.raises(ValueError, match="channels must hold at least two positive ints"):
        UniverSeg((8,))


def test_learns_from_its_support_set() -> None:
    """The mask of bright pixels, or of dark ones: only the support set says which."""
    torch.manual_seed(0)
    model = UniverSeg((8, 8))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    images = torch.rand(4, 4, 1, 8, 8)
    masks = (images > 0.5).float()
    masks[2:] = 1 - masks[2:]
    losses = []
    for _ in range(60):
        logits = model(images[:, 0], images[:, 1:], masks[:, 1:])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks[:, 0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
