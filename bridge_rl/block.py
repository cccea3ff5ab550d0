"""The Bridge block (arXiv 2510.01143) and its parameter-matched control, in pure torch.

Shapes: G groups, N width, B = G*N rows, T tokens, D model, H heads, K head size.
"""

from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bridge_rl.errors import UserError, check_kind
from bridge_rl.group import merge_rows, split_rows
from bridge_rl.packed import PackedGroups

EPS = 1e-6  # of the norms


@dataclass(frozen=True)
class BridgeConfig:
    """What is added to a model.

    kind: `bridge`, or `pmatch`, an MLP of as many parameters in the same slot (the paper's control P-Match).
    num_heads, head_dim: the inner width is num_heads * head_dim.
    layers: `all`, or the indices of the decoder layers that carry a block.
    relative: beyond the paper, values are taken relative to the row's own, so that a row that is alone, or whose
        siblings say the same, is left exactly as it is.
    """

    kind: Literal["bridge", "pmatch"] = "bridge"
    num_heads: int = 8
    head_dim: int = 64
    layers: Literal["all"] | list[int] = "all"
    relative: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("bridge", "pmatch"):
            raise UserError(f"bridge.kind is {self.kind!r}: use 'bridge' or 'pmatch'.")
        for name in ("num_heads", "head_dim"):
            check_kind(f"bridge.{name}", getattr(self, name), Integral)
            object.__setattr__(self, name, int(getattr(self, name)))  # numpy's go into no JSON
        check_kind("bridge.relative", self.relative, bool)
        if self.num_heads < 1 or self.head_dim < 1:
            raise UserError(
                f"bridge.num_heads is {self.num_heads} and bridge.head_dim is {self.head_dim}: both must be at least 1."
            )
        if self.relative and self.kind == "pmatch":
            raise UserError("bridge.relative is true, but P-Match's rows have no siblings: leave it out.")
        if isinstance(self.layers, str) and self.layers == "all":  # an array would compare each of its numbers
            return
        if not isinstance(self.layers, list | tuple) or not all(type(index) is int for index in self.layers):
            raise UserError(f"bridge.layers is {self.layers!r}: use 'all' or a list of indices, such as [0, 5].")
        if not self.layers:
            raise UserError("bridge.layers is empty: use 'all' or name at least one layer.")
        object.__setattr__(self, "layers", list(self.layers))  # as it comes back from a checkpoint

    @property
    def inner_width(self) -> int:
        return self.num_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class BridgeBlock(nn.Module):
    """`x + W_O Attention(norm(x))` over the rows of a group, at each token step on its own (paper, section 3).

    Every row that is alive at column t attends to the alive rows of its group at column t: no positions, no causal
    mask, no cache. W_O starts at zero, so that a new block is the identity to the last bit (the paper states the zero
    start, not the means). At width 1 a trained block adds W_O W_V norm(x): it is not the identity, unless values are
    `relative`: then it is `x + W_O (Attention(norm(x)) - W_V norm(x))`.

    W_Q, W_K and W_V are one projection (`qkv_proj`, in this order along its output): one product instead of three.
    The block computes in the dtype of its own weights, whatever the dtype of `x`: a frozen bf16 base can carry a
    trainable fp32 block.
    """

    def __init__(self, hidden_size: int, config: BridgeConfig, **factory: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner_width = config.num_heads, config.head_dim, config.inner_width
        self.relative = config.relative
        self.norm = nn.RMSNorm(hidden_size, eps=EPS, **factory)
        self.qkv_proj = nn.Linear(hidden_size, 3 * config.inner_width, bias=False, **factory)
        self.o_proj = nn.Linear(config.inner_width, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries, keys and values of unit variance on a normed input; zero output."""
        nn.init.normal_(self.qkv_proj.weight, std=self.qkv_proj.in_features**-0.5)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, alive: Tensor | PackedGroups | None = None) -> Tensor:
        """`x` [B, T, D] -> [B, T, D]. `alive`: bool [G, N, T], or of one step a bias [B, B] (`group.sibling_bias`), or
        the groups that are packed into `x` [1, T, D]. None: rows are alone.
        """
        qkv = self.qkv_proj(self.norm(x.to(self.norm.weight.dtype)))
        own = qkv[..., 2 * self.inner_width :]
        if isinstance(alive, PackedGroups):
            mixed = self._mix_packed(qkv, alive)
        elif alive is None or (alive.dim() == 3 and alive.shape[1] == 1):
            mixed = own  # attention over one row gives its value
        elif alive.dim() == 2:
            mixed = self._mix_one_step(qkv, alive)
        else:
            mixed = self._mix_groups(qkv, alive)
        if self.relative:
            mixed = mixed - own
        return x + self.o_proj(mixed).to(x.dtype)

    def _mix_groups(self, qkv: Tensor, alive: Tensor) -> Tensor:
        """`qkv` [B, T, 3*H*K], `alive` bool [G, N, T] -> [B, T, H*K]."""
        q, k, v = self._heads(qkv, alive.shape[1])
        mixed = self._weights(q, k, alive).to(v.dtype) @ v  # [G, T, H, N, K]
        return merge_rows(mixed.permute(0, 3, 1, 2, 4)).flatten(-2)

    def _mix_packed(self, qkv: Tensor, packed: PackedGroups) -> Tensor:
        """`qkv` [1, T, 3*H*K] -> [1, T, H*K]: a prompt's tokens stand for equal rows, so they keep their own value."""
        of_prompts = qkv[:, : packed.num_prompt_tokens, 2 * self.inner_width :]
        columns = qkv[0].index_select(0, packed.tokens.flatten()).view(*packed.tokens.shape, -1)  # [N, S, 3*H*K]
        mixed = self._mix_groups(columns, packed.alive).flatten(0, 1).index_select(0, packed.places)
        return torch.cat([of_prompts, mixed[None]], dim=1)

    def _heads(self, qkv: Tensor, width: int) -> tuple[Tensor, ...]:
        """`qkv` [B, T, 3*H*K] -> queries, keys and values, each [G, T, H, N, K]."""
        heads = split_rows(qkv.unflatten(-1, (3, self.num_heads, self.head_dim)), width)
        return heads.permute(3, 0, 2, 4, 1, 5).unbind(0)

    def _weights(self, q: Tensor, k: Tensor, alive: Tensor) -> Tensor:
        """Softmax over the rows that each row sees, fp32 [G, T, H, N, N]."""
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # [G, T, H, N, N]
        # A row that is not alive sees itself, so that its unused output stays finite.
        itself = torch.eye(alive.shape[1], dtype=torch.bool, device=q.device)
        visible = alive.permute(0, 2, 1)[:, :, None, None, :] | itself
        return scores.float().masked_fill(~visible, float("-inf")).softmax(dim=-1)

    def attention_weights(self, x: Tensor, alive: Tensor) -> Tensor:
        """What `forward` weighs with: `x` [B, T, D], `alive` bool [G, N, T] -> fp32 [G, T, H, N, N].

        The last dimension is over the rows attended to; it sums to 1.
        """
        q, k, _ = self._heads(self.qkv_proj(self.norm(x.to(self.norm.weight.dtype))), alive.shape[1])
        return self._weights(q, k, alive)

    def _mix_one_step(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """`qkv` [B, 1, 3*H*K] over ragged groups, `bias` [B, B] -> [B, 1, H*K]: no loop over groups."""
        heads = qkv.view(1, len(bias), 3 * self.num_heads, self.head_dim).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)  # each [1, H, B, K]: the rows are the sequence
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return mixed.transpose(1, 2).reshape(len(bias), 1, self.inner_width)


class MatchedMLP(nn.Module):
    """`x + W_2 silu(W_1 norm(x))`: as many parameters as the block, in the same slot, with the same zero start.

    Rows do not see each other. The hidden size is twice the block's inner width: 2*D*2W = 4*D*W, an exact match.
    """

    def __init__(self, hidden_size: int, config: BridgeConfig, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=EPS, **factory)
        self.up_proj = nn.Linear(hidden_size, 2 * config.inner_width, bias=False, **factory)
        self.down_proj = nn.Linear(2 * config.inner_width, hidden_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.up_proj.weight, std=self.up_proj.in_features**-0.5)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, alive: Tensor | PackedGroups | None = None) -> Tensor:
        """`x` [B, T, D] -> [B, T, D]. `alive` is not used."""
        y = self.norm(x.to(self.norm.weight.dtype))
        return x + self.down_proj(nn.functional.silu(self.up_proj(y))).to(x.dtype)


BLOCKS: dict[str, type[BridgeBlock] | type[MatchedMLP]] = {"bridge": BridgeBlock, "pmatch": MatchedMLP}
