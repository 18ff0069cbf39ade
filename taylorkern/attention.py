"""Multi-head attention whose heads can be scored and cut, and models whose attention is understood for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .emission import Gated, gate_of, observing, wanted


class MultiheadAttention(Gated, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` whose heads can be scored and cut.

    Arguments, state_dict and repr are torch's. The gate sits on the heads before they are projected, o [N, L, H·D],
    so s = Σ_L o·dL/do is [N, H·D], with head h's D numbers from h·D on; an input without N is a batch of one.

    ``num_heads`` and ``head_dim`` count what is there. A cut takes a head's rows out of the input projections, of
    ``bias_k`` and ``bias_v``, and its columns out of ``out_proj.weight``; ``embed_dim`` is what comes in. Uncut, and as
    long as no gate is wanted, torch's own forward runs, bit for bit, fused kernels and all. Otherwise it is computed
    here, the same up to rounding with every option of torch's, and ``out_proj`` is called as a module. A mask
    [N·H, L, S] is one of the heads that are left.

    >>> attention, x = MultiheadAttention(8, 2, batch_first=True), torch.rand(3, 5, 8)
    >>> attention.in_proj_weight.data = attention.in_proj_weight.data.unflatten(0, (3, 2, 4))[:, 1].flatten(0, 1)
    >>> attention.in_proj_bias.data = attention.in_proj_bias.data.unflatten(0, (3, 2, 4))[:, 1].flatten()
    >>> attention.out_proj.weight.data, attention.num_heads = attention.out_proj.weight.data[:, 4:], 1
    >>> attention.is_cut, attention(x, x, x)[0].shape
    (True, torch.Size([3, 5, 8]))
    """

    @property
    def is_cut(self) -> bool:
        """Whether heads are gone, or what goes out is not what comes in, so that torch's class can't compute it."""
        projection = self._modules.get("out_proj")  # not there yet while torch's constructor runs
        out = self.embed_dim if projection is None else projection.weight.shape[0]  # type: ignore[index]
        return bool(self.num_heads * self.head_dim != self.embed_dim or out != self.embed_dim)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether torch may hand this layer's packed weights to a kernel of its own.

        ``nn.TransformerEncoderLayer`` asks before it leaves its modules out for one fused kernel.
        """
        return bool(vars(self)["_qkv_same_embed_dim"]) and not self._on_its_own()

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        vars(self)["_qkv_same_embed_dim"] = same

    def _on_its_own(self) -> bool:
        """Whether a forward now is computed here."""
        return self.is_cut or observing() or wanted(self) or wanted(self._modules.get("out_proj"))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``torch.nn.MultiheadAttention``; raises what that raises."""
        arguments = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not self._on_its_own():
            output: tuple[Tensor, Tensor | None] = super().forward(query, key, value, *arguments)
            return output
        if query.is_nested:
            return self._nested(query, key, value, *arguments)
        return self._padded(query, key, value, *arguments)

    def _padded(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, average_attn_weights: bool, is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        masks = (key_padding_mask, attn_mask)
        batched = F._mha_shape_check(query, key, value, *masks, self.num_heads)  # type: ignore[attr-defined]
        q, k, v = (self._samples_first(t) for t in self._projected(query, key, value))  # [N, L or S, H·D]
        mask = self._mask(
            key_padding_mask, attn_mask, need_weights, is_causal, query.dtype, (q.size(0), q.size(1), k.size(1))
        )
        k, v = self._lengthened(k, self.bias_k), self._lengthened(v, self.bias_v)
        heads, weights = self._attended(q, k, v, mask, mask is None and is_causal, need_weights)
        output = self.out_proj(self.emit(heads.transpose(1, 2).flatten(2)))  # [N, L, E]
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [..., H·D], every width read from the weights."""
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _samples_first(self, t: Tensor) -> Tensor:
        """[N, L, C] of [L, C], [N, L, C] or [L, N, C]."""
        if t.dim() == 2:
            return t.unsqueeze(0)
        return t if self.batch_first else t.transpose(0, 1)

    def _lengthened(self, t: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values [N, S, H·D] with the positions that are added to every sequence."""
        if bias is not None:
            t = torch.cat([t, bias.expand(t.size(0), -1, -1)], dim=1)
        return F.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _mask(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool, is_causal: bool,
        dtype: torch.dtype, lengths: tuple[int, int, int],
    ) -> Tensor | None:  # fmt: skip
        """What is added to the products of queries and keys, to broadcast to [N, H, L, S] with the positions added.

        None also where torch makes the causal mask itself.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        padding = _of_floats(key_padding_mask, "key_padding_mask", dtype, F._none_or_dtype(attn_mask))
        if is_causal and padding is None and not need_weights:
            return None
        mask = _of_floats(attn_mask, "attn_mask", dtype, None)
        found = [] if mask is None else [self._per_head(mask, lengths)]
        found += [] if padding is None else [_per_sample(padding, lengths)]
        if not found:
            return None
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(found[0] if len(found) == 1 else found[0] + found[1], (0, added))

    def _per_head(self, mask: Tensor, lengths: tuple[int, int, int]) -> Tensor:
        samples, *sizes = lengths
        right = tuple(sizes) if mask.dim() == 2 else (samples * self.num_heads, *sizes)
        if mask.shape != right:
            raise RuntimeError(
                f"The shape of the {mask.dim()}D attn_mask is {tuple(mask.shape)}, but should be {right}; "
                f"this attention has {self.num_heads} heads."
            )
        return mask if mask.dim() == 2 else mask.unflatten(0, (samples, self.num_heads))

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The heads [N, H, L, D], and their weights [N, H, L, S] where they are asked for."""
        shape = (self.num_heads, self.head_dim)
        q, k, v = (t.unflatten(-1, shape).transpose(1, 2) for t in (q, k, v))
        scale = self.head_dim**-0.5
        if not need_weights:
            dropped = self.dropout if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, mask, dropped, is_causal, scale=scale), None
        products = (q * scale) @ k.transpose(-2, -1)
        weights = (products if mask is None else products + mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v, weights

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Self-attention of a nested tensor, which ``nn.TransformerEncoder`` makes of a padded one in evaluation."""
        if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
            raise ValueError(
                "a MultiheadAttention that is cut or scored takes a nested tensor for self-attention without masks "
                "only; give it padded tensors and a key_padding_mask"
            )
        x, lengths = query.to_padded_tensor(0.0), query._nested_tensor_size()[:, :1]
        padding = torch.arange(x.size(1), device=x.device) >= lengths.to(x.device)
        output, weights = self._padded(x, x, x, padding, need_weights, None, *options)
        return torch._nested_tensor_from_mask(output, ~padding), weights


def _of_floats(mask: Tensor | None, name: str, dtype: torch.dtype, other: torch.dtype | None) -> Tensor | None:
    """``mask`` with -inf where a boolean one says True."""
    return F._canonical_mask(mask, name, other, "attn_mask", dtype, check_other=other is not None)


def _per_sample(padding: Tensor, lengths: tuple[int, int, int]) -> Tensor:
    """A padding mask [N, S], or [S] without samples, as [N, 1, 1, S]."""
    samples, _, size = lengths
    if padding.numel() != samples * size or padding.size(-1) != size:
        raise RuntimeError(f"key_padding_mask has shape {tuple(padding.shape)}, but should be {(samples, size)}.")
    return padding.reshape(samples, 1, 1, size)


@contextmanager
def understood(model: nn.Module) -> Iterator[None]:
    """Within, every ``torch.nn.MultiheadAttention`` of ``model`` is one of ours, and no fused kernel hides its layers.

    Tracing and cutting a model that was never converted need that. Subclasses are left alone. Afterwards they are
    torch's again, but for those that were cut meanwhile, which torch's class can't express, or that a Scores gates.

    >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2))
    >>> with understood(model):
    ...     type(model[0].self_attn) is MultiheadAttention
    True
    >>> type(model[0].self_attn) is nn.MultiheadAttention
    True
    """
    plain = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in plain:
        module.__class__ = MultiheadAttention
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        cut = [module for module in plain if isinstance(module, MultiheadAttention) and module.is_cut]
        for module in plain:
            if module not in cut and gate_of(module) is None:
                module.__class__ = nn.MultiheadAttention
