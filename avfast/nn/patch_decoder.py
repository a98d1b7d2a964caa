"""The decoder of one modality in a masked autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avfast.nn.block import PackedBlock, Read, run_blocks
from avfast.nn.pos_embed import sincos_2d
from avfast.ops import AttentionPlan


class PatchDecoder(nn.Module):
    """Predicts the patches of one modality from the tokens of the kept ones and from further tokens.

    A mask token stands in for every patch that was not kept, positions are added, and the further tokens, which have
    none, are put in front; one linear map embeds both kinds.

    Args:
        dim: width of the incoming tokens.
        decoder_dim: width of the decoder.
        depth: blocks.
        num_heads: heads of a block.
        grid: (rows, columns) of patches.
        values: per patch.
        mlp_ratio: of the blocks.
        eps: of the LayerNorms.
        train_positions: the sine-cosine position table is trained.
    """

    def __init__(
        self,
        dim: int,
        decoder_dim: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        values: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        train_positions: bool = False,
    ) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.pos_embed = nn.Parameter(sincos_2d(decoder_dim, grid)[None], requires_grad=train_positions)
        self.blocks = nn.ModuleList(PackedBlock(decoder_dim, num_heads, mlp_ratio, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(decoder_dim, eps=eps)
        self.pred = nn.Linear(decoder_dim, values)
        self.grad_checkpointing = False

    def forward(
        self,
        further: Tensor,
        plan: AttentionPlan,
        tokens: Tensor | None = None,
        places: Tensor | None = None,
        read: Read | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            further: ``(B, F, D)``.
            plan: B sequences of F + N tokens.
            tokens: ``(T, D)`` of the kept patches, or None: mask tokens stand at every position.
            places: ``(T,)`` int64 entry of each in the flattened (B, N) patches.
            read: the M tokens whose prediction is wanted; default all patches.

        Returns:
            ``(B, N, P)`` predictions for all patches, or ``(M, P)``.
        """
        batch, count = further.shape[:2]
        embedded = self.embed(further.flatten(0, 1) if tokens is None else torch.cat([further.flatten(0, 1), tokens]))
        x = self.mask_token.to(embedded.dtype).expand(batch, self.num_patches, -1)
        if places is not None:
            x = x.flatten(0, 1).index_copy(0, places, embedded[batch * count :])
            x = x.unflatten(0, (batch, self.num_patches))
        front = embedded[: batch * count].unflatten(0, (batch, count))
        x = torch.cat([front, x + self.pos_embed], 1).flatten(0, 1)
        x = run_blocks(self.blocks, x, plan, recompute=self.grad_checkpointing, read=read)
        if read is not None:
            return self.pred(self.norm(x))
        return self.pred(self.norm(x.unflatten(0, (batch, count + self.num_patches))[:, count:]))
