"""Attention between patches: support tokens never look at target tokens; registers look at both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icseg.plain import is_plain
from icseg.published.config import BackboneConfig
from icseg_kernels import Rotation, qkv_projection, selected_attention

POSITIONS = 1024
Bounds = Sequence[tuple[int, int]]


class RotaryEmbedding(nn.Module):
    """Two-dimensional rotary position embedding, real-valued: half of the channels turns with x, half with y.

    The halves are of the whole token, before it is split into heads: with 4 heads, two see x and two see y.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        frequencies = base ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
        angles = torch.arange(POSITIONS)[:, None] * frequencies  # [positions, D / 4]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """Of positions [B, N, 2], int64 (y, x) in [0, 1024): [B, N, D / 2], in float32 or wider."""
        tables = (table.to(torch.promote_types(table.dtype, torch.float32)) for table in (self.cos, self.sin))
        return Rotation(*(table[positions.flip(-1)].flatten(-2) for table in tables))


def still(batch: int, tokens: int, like: Rotation) -> Rotation:
    """The rotation of tokens that have no place: none."""
    shape = (batch, tokens, like.cos.shape[-1])
    return Rotation(like.cos.new_ones(shape), like.sin.new_zeros(shape))


def joined(*rotations: Rotation) -> Rotation:
    """The rotation of the tokens of `rotations` one after the other."""
    return Rotation(torch.cat([r.cos for r in rotations], 1), torch.cat([r.sin for r in rotations], 1))


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x [..., D] turned pair by pair, in float32 or wider."""
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def of_last(rotation: Rotation, queries: int) -> Rotation:
    """The rotation [B, h, N, d / 2] of the last tokens."""
    return Rotation(*(t[:, :, t.shape[2] - queries :] for t in rotation))


def attend(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None, bounds: Bounds, zero_key: bool, dropout: float
) -> Tensor:
    """Attention of q, k, v [B, h, N, d], where q may be of the last tokens only.

    rotation: of all tokens, [B, h, N, d / 2], or None where q and k are turned already; bounds: (queries, keys), runs
    of queries and how many first keys they see. With dropout, which `selected_attention` does not have, one call a run.
    """
    rotary = None if rotation is None else (of_last(rotation, q.shape[2]), rotation)
    if dropout == 0:
        return selected_attention(q, k, v, kv_end=bounds, sink=zero_key, rotary=rotary)
    if rotary is not None:
        q, k = rotated(q, rotary[0]), rotated(k, rotary[1])
    if zero_key:  # in front, so that every run sees it
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    parts, start = [], 0
    for queries, keys in bounds:
        keys += zero_key
        run = q[:, :, start : start + queries]
        parts.append(F.scaled_dot_product_attention(run, k[:, :, :keys], v[:, :, :keys], dropout_p=dropout))
        start += queries
    return torch.cat(parts, dim=2)


class Block(nn.Module):
    """Attention and MLP with pre-normalisation. What a token is, support or target, is added before q, k and v only."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.zero_key, self.dropout = config.heads, config.zero_key, config.dropout
        self.types = nn.Parameter(torch.randn(2, dim) * 0.02)  # support, target
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * dim, dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, support: int, rotation: Rotation, bounds: Bounds) -> Tensor:
        """The last sum(queries) tokens of x [B, N, D], updated.

        support: how many leading tokens are of the support type; bounds: as for `attend`, over those last tokens.
        """
        queries = sum(count for count, _ in bounds)
        turn = Rotation(*(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in rotation))
        kinds = torch.cat([t.expand(n, -1) for t, n in zip(self.types, (support, x.shape[1] - support), strict=True)])
        dropout = self.dropout if self.training else 0.0
        q, k, v, turned = self._projected(x, kinds, queries, turn)
        attended = attend(q, k, v, None if turned else turn, bounds, self.zero_key, dropout)
        x = x[:, x.shape[1] - queries :] + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def _projected(self, x: Tensor, kinds: Tensor, queries: int, turn: Rotation) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Queries of the last tokens, keys and values [B, h, N, d], and whether queries and keys are turned."""
        layers = self.norm1, self.query, self.key_value
        if _turns_early(x) and all(map(_plain, layers, _PROJECTION)):
            weights, biases = [self.query.weight, self.key_value.weight], [self.query.bias, self.key_value.bias]
            q, k, v = qkv_projection(
                x,
                weights,
                biases,
                heads=self.heads,
                queries=queries,
                norm=(self.norm1.weight, self.norm1.bias),
                eps=self.norm1.eps,
                added=kinds,
                rotary=(of_last(turn, queries), turn),
            )
            return q, k, v, True
        normed = self.norm1(x) + kinds
        k, v = self.key_value(normed).chunk(2, dim=-1)
        tokens = self.query(normed[:, x.shape[1] - queries :]), k, v
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in tokens)
        return q, k, v, False


_PROJECTION = nn.LayerNorm, nn.Linear, nn.Linear


def _plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is torch's own, with weight and bias, and nothing comes before or after it."""
    return type(layer) is kind and is_plain(layer) and None not in map(layer._parameters.get, ("weight", "bias"))


def _turns_early(x: Tensor) -> bool:
    """Whether queries and keys are turned as they are projected: on a CPU, attention itself turns them faster."""
    return x.is_cuda


class PatchTransformer(nn.Module):
    """Layers over support tokens and registers alone, then layers over all tokens.

    Tokens are laid out [support | registers | target], so that what a query may see is a number of first keys.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(config.registers, config.dim) * 0.02)
        self.context_layers = nn.ModuleList(Block(config) for _ in range(config.context_layers))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.dim)
        self.rotary = RotaryEmbedding(config.dim)
        self.checkpointing = config.checkpointing

    def context(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Support tokens [B, Ns, D] at positions [B, Ns, 2], and registers [B, R, D], after the context layers."""
        batch, count, _ = tokens.shape
        x = torch.cat([tokens, self.registers.expand(batch, -1, -1)], dim=1)
        rotation = self.rotary(positions)
        rotation = joined(rotation, still(batch, len(self.registers), rotation))
        everything = [(x.shape[1], x.shape[1])]
        for layer in self.context_layers:
            x = self._run(layer, x, x.shape[1], rotation, everything)
        return x[:, :count], x[:, count:]

    def forward(
        self,
        support: Tensor,
        support_positions: Tensor,
        registers: Tensor,
        coarser_registers: Tensor | None,
        target: Tensor,
        target_positions: Tensor,
        *,
        keep_support: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Support tokens (None unless `keep_support`), registers and target tokens, updated and normalised.

        support: [B, Ns, D] and registers: [B, R, D] as `context` gave them; coarser_registers: [B, R, D] or None;
        target: [B, Nt, D]; positions: [B, N, 2] int64.
        """
        batch, ns, _ = support.shape
        nr = registers.shape[1]
        extra = [] if coarser_registers is None else [coarser_registers]
        x = torch.cat([support, registers, *extra, target], dim=1)
        total, leading = x.shape[1], x.shape[1] - target.shape[1]
        rotation = self.rotary(support_positions)
        rotation = joined(rotation, still(batch, leading - ns, rotation), self.rotary(target_positions))
        seeing_all = (total - ns, total)
        for layer in self.layers[:-1]:
            x = self._run(layer, x, leading, rotation, [(ns, leading), seeing_all])
        last = [(ns, leading), seeing_all] if keep_support else [seeing_all]
        x = self.final_norm(self._run(self.layers[-1], x, leading, rotation, last))
        kept = x[:, :ns] if keep_support else None
        rest = x[:, -(total - ns) :]
        return kept, rest[:, :nr], rest[:, leading - ns :]

    def _run(self, layer: nn.Module, x: Tensor, support: int, rotation: Rotation, bounds: Bounds) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(layer, x, support, rotation, bounds, use_reentrant=False)
        return layer(x, support, rotation, bounds)
