"""The attributes by which modules count their channels and heads: what a cut may change and a saved file carry."""

from torch import nn

# A file tells all of these that its modules have: with another name here files need another format.
KNOWN = frozenset(
    """
    num_heads num_attention_heads n_heads n_head nhead heads num_head n_kv_heads num_kv_heads num_key_value_heads
    head_dim attention_head_size dim_head head_size key_dim val_dim key_value_proj_dim key_attn_dim val_attn_dim
    all_head_size inner_dim attn_dim attention_dim split_size nf n_inner kv_dim q_dim dh d nh_kd
    num_groups groups num_channels num_features
    in_channels out_channels channels in_chs out_chs in_features out_features
    hidden_size hidden_dim hidden_features intermediate_size embed_dim embedding_dim dim d_model out_dim width
    """.split()
)


def widths(module: nn.Module) -> dict[str, int]:
    """The counts that ``module`` itself keeps, by name: plain integers from 1 on, of a name in ``KNOWN``.

    Properties, class attributes, booleans and anything in a config are none. The ``dim`` of torch's own modules
    (``nn.Softmax``, ``nn.GLU`` ...) is an axis, no width.

    >>> sorted(widths(nn.GroupNorm(2, 6)).items()), widths(nn.Softmax(dim=1))
    ([('num_channels', 6), ('num_groups', 2)], {})
    """
    axes = {"dim"} if type(module).__module__.startswith("torch.") else set()
    return {
        name: value
        for name, value in vars(module).items()
        if name in KNOWN and name not in axes and type(value) is int and value >= 1
    }
