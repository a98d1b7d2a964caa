"""The joint audio-visual decoder of CAV-MAE and AVSiam."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avfast.nn.block import PackedBlock, Read, run_blocks
from avfast.nn.pos_embed import sincos_2d
from avfast.ops import AttentionPlan
from avfast.packing import take_rows


class JointDecoder(nn.Module):
    """Predicts the patches of both modalities from the fused tokens of the kept ones.

    A mask token stands in for every patch that was not kept; positions and a vector per modality are added; dense
    transformer blocks run over all audio and visual positions of an instance together.

    Args:
        dim: width of the incoming tokens.
        decoder_dim: width of the decoder.
        depth: blocks.
        num_heads: heads of a block.
        audio_grid: (frequency, time) patches.
        visual_grid: (rows, columns) patches.
        audio_patch: values per audio patch.
        visual_patch: values per visual patch.
        mlp_ratio: of the blocks.
        eps: of the LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        decoder_dim: int,
        depth: int,
        num_heads: int,
        audio_grid: tuple[int, int],
        visual_grid: tuple[int, int],
        audio_patch: int,
        visual_patch: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_audio, self.num_visual = audio_grid[0] * audio_grid[1], visual_grid[0] * visual_grid[1]
        self.embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.modality_a = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.modality_v = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        for vector in (self.mask_token, self.modality_a, self.modality_v):
            nn.init.normal_(vector, std=0.02)
        self.pos_embed_a = nn.Parameter(sincos_2d(decoder_dim, audio_grid)[None])
        self.pos_embed_v = nn.Parameter(sincos_2d(decoder_dim, visual_grid)[None])
        self.blocks = nn.ModuleList(
            PackedBlock(decoder_dim, num_heads, mlp_ratio, qkv_bias=True, eps=eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, eps=eps)
        self.grad_checkpointing = False
        self.pred_a = nn.Linear(decoder_dim, audio_patch)
        self.pred_v = nn.Linear(decoder_dim, visual_patch)

    def forward(
        self,
        tokens: Tensor,
        places: Tensor,
        plan: AttentionPlan,
        read: Read | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            tokens: ``(T, D)`` fused tokens of the kept patches of B instances.
            places: ``(T,)`` int64 entry of each in the flattened (B, Na + Nv) patches, audio first.
            plan: of B sequences of Na + Nv patches.
            read: the patches whose prediction is wanted; default all.
            rows: which of these are audio, ``(Ma,)``, and which visual, ``(Mv,)``.

        Returns:
            Predictions ``(B, Na, Pa)`` and ``(B, Nv, Pv)`` for all patches, ``(Ma, Pa)`` and ``(Mv, Pv)`` for those
            that are read.
        """
        shape = (len(plan), self.num_audio + self.num_visual)
        tokens = self.embed(tokens)
        x = self.mask_token.to(tokens.dtype).expand(*shape, -1).flatten(0, 1).index_copy(0, places, tokens)
        positions = torch.cat([self.pos_embed_a + self.modality_a, self.pos_embed_v + self.modality_v], 1)
        x = (x.unflatten(0, shape) + positions).flatten(0, 1)
        x = run_blocks(self.blocks, x, plan, recompute=self.grad_checkpointing, norm=self.norm, read=read)
        if rows is not None:
            return self.pred_a(take_rows(x, rows[0])), self.pred_v(take_rows(x, rows[1]))
        x = x.unflatten(0, shape)
        return self.pred_a(x[:, : self.num_audio]), self.pred_v(x[:, self.num_audio :])
