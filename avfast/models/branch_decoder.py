"""The decoder of one modality of AudioMAE, MAViL and DiffMAViL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor, nn

from avfast.models.views import BranchDraws
from avfast.nn import CrossBlocks, LocalBlocks
from avfast.nn.block import Read
from avfast.nn.decoder import Decoder, SelfBlocks, Stack
from avfast.nn.patches import positions, table

Attention = Literal["self", "local", "cross"]
DecoderClass = Literal["none", "encoder", "own"]
EPS = 1e-6
"""Of all LayerNorms, as in the released AudioMAE, mae_st and MAViL."""
WINDOW = 4
"""Patches along the side of a window of local attention (AudioMAE, section 3.2)."""


class BranchDecoder(Decoder):
    """Predicts masked patches from the tokens of the kept ones.

    ``"self"``: all places attend to each other; ``"local"``: within shifted windows (AudioMAE, section 3.2);
    ``"cross"``: masked patches read the kept ones and not each other (DiffMAViL, section 3), so that each prediction
    depends on its own place and the kept patches alone.

    Args:
        dim: width of the incoming tokens.
        decoder_dim: width of the decoder, d.
        depth: blocks.
        num_heads: their heads.
        attention: see above.
        grid: patches along each axis, N in all.
        values: to predict per patch.
        patch_values: of a noised patch; None where a mask token stands in for masked patches.
        cls: what goes through ``"self"`` blocks in front of the patches: nothing, the encoder's class token, or one of
            the decoder's own.
        mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        dim: int,
        decoder_dim: int,
        depth: int,
        num_heads: int,
        attention: Attention,
        grid: Sequence[int],
        values: int,
        patch_values: int | None,
        cls: DecoderClass,
        mlp_ratio: float,
    ) -> None:
        super().__init__(dim, decoder_dim, mask_token=patch_values is None)
        self.attention, self.cls, self.num_patches = attention, cls, prod(grid)
        self.embed_noised = None if patch_values is None else nn.Linear(patch_values, decoder_dim)
        self.pos_embed = positions(decoder_dim, grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, decoder_dim)) if cls == "own" else None
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        stack: Stack = SelfBlocks
        if attention == "local":
            if len(grid) != 2 or any(n % WINDOW for n in grid):
                raise ValueError(
                    f"local attention needs multiples of {WINDOW} patches along both axes, got {tuple(grid)}; a global "
                    "decoder takes any"
                )
            stack = partial(LocalBlocks, grid=(grid[0], grid[1]), window=(WINDOW, WINDOW))
        elif attention == "cross":
            stack = CrossBlocks
        self.blocks = stack(decoder_dim, depth, num_heads, mlp_ratio, EPS)
        self.norm = nn.LayerNorm(decoder_dim, eps=EPS)
        self.pred = nn.Linear(decoder_dim, values)

    @property
    def front(self) -> int:
        """Tokens in front of the patches."""
        return int(self.cls != "none")

    def forward(self, tokens: Tensor, draws: BranchDraws, noised: Tensor | None = None, whole: bool = False) -> Tensor:
        """Decode.

        Args:
            tokens: ``(B, 1 + K, D)``, the class token first.
            draws: which patches these are, and which are masked.
            noised: ``(B, M, P)`` masked patches, where no mask token stands in for them.
            whole: predict all patches, not under ``"cross"``.

        Returns:
            ``(B, M, values)``, or ``(B, N, values)``.
        """
        embedded, where = self.embed(tokens), table(self.pos_embed)[0]
        kept, masked, batch = draws.kept[0], draws.masked, embedded.shape[0]
        given = None if self.embed_noised is None or noised is None else self.embed_noised(noised)
        first = torch.arange(batch, device=masked.device)[:, None]
        if self.attention == "cross":
            if whole:
                raise ValueError("a cross decoder predicts masked patches alone")
            if given is None and self.mask_token is not None:
                given = self.mask_token.to(embedded.dtype).expand(*masked.shape, -1)
            # the kept patches and those to predict, no place in between
            ids = torch.cat([kept, masked], 1)
            x = torch.cat([embedded[:, 1:], cast(Tensor, given)], 1) + where[ids]
            rows = torch.arange(ids.shape[1], device=ids.device) + first * ids.shape[1]
            scatter_index, wanted = rows[:, : kept.shape[1]].flatten(), rows[:, kept.shape[1] :].flatten()
        else:
            scatter_index, entries = ((ids + first * self.num_patches).flatten() for ids in (kept, masked))
            stand_in = None if given is None else (given.flatten(0, 1), entries)
            x = self.whole(embedded[:, 1:].flatten(0, 1), scatter_index, (batch, self.num_patches), stand_in) + where
            if self.front:
                own = embedded[:, :1] if self.cls_token is None else self.cls_token.to(x.dtype).expand(batch, -1, -1)
                x = torch.cat([own, x], 1)
            wanted = (masked + self.front + first * x.shape[1]).flatten()
        x = self.run(x, draws.plan("decoder"), scatter_index, None if whole else Read(wanted, draws.plan("read")))
        return self.pred(x[:, self.front :] if whole else x.unflatten(0, masked.shape))
