"""Rules for operations that compute at each position or over a few: element-wise, reductions, normalisations, pools."""

from collections.abc import Sequence

from .labels import Strip
from .rules import Call, Rule, Strips, rule, varying, wrapped

# f(0) is not 0, so a gate before it does not take the channel away.
_MAKES_SOMETHING_OF_ZERO = frozenset(
    "sigmoid hardsigmoid exp exp2 cos cosh softplus log_sigmoid_forward reciprocal rsqrt log logit".split()
)
_PRODUCTS = frozenset(["mul", "mul_"])
_SUMS = frozenset(["add", "sub", "rsub"])


@rule(
    *"add where masked_fill hardswish _prelu_kernel rrelu_with_noise native_dropout".split(),
    *"clone copy _to_copy detach alias lift_fresh fill zero".split(),
    *"bernoulli normal uniform random exponential".split(),
)
def element_wise(call: Call) -> list[Strips]:
    shape = call.outputs[0].shape if call.outputs else ()
    met = call.meet([(varying(t, call), call.strips(t)) for t in call.inputs], shape)
    name = call.func._schema.name.removeprefix("aten::")
    if name in _PRODUCTS:
        call.makers = _product(call)
    if name.removesuffix("_") in _MAKES_SOMETHING_OF_ZERO or _shifts(call, name.removesuffix("_")):
        call.makers = dict.fromkeys(call.makers, False)
        call.lose_mixed()
    return [met] * len(call.outputs)


def _shifts(call: Call, name: str) -> bool:
    other = call.arguments.get("other")
    return name in _SUMS and isinstance(other, (int, float)) and other != 0


def _product(call: Call) -> dict[str, bool]:
    """One factor at zero is enough, so the gate of the other would only count a channel's share twice."""
    factors = [found.makers for t in call.inputs if (found := call.carried(t)) and found.makers]
    return next((makers for makers in factors if all(makers.values())), call.makers)


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
def alike(call: Call) -> list[Strips]:
    call.makers = {}
    return [call.strips(call["self"])]


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def sized_like(call: Call) -> list[Strips]:
    """Sizes equal to those of the tensor they are asked from are taken for its own: a wrong guess fails at the cut."""
    like, new = call["self"], call.outputs[0]
    call.makers = {}
    if like.dim() != new.dim():
        return []
    return [[s for s in call.strips(like) if like.shape[s.dim] == new.shape[s.dim]]]


@rule(
    *"mean sum nansum prod var std var_mean std_mean logsumexp norm linalg_vector_norm".split(),
    *"amax amin aminmax max min argmax argmin median any all count_nonzero".split(),
)
def reduction(call: Call) -> list[Strips]:
    tensors = call.inputs
    if len(tensors) > 1:
        return element_wise(call)  # max.other and its kin
    x = tensors[0]
    over = _reduced(call, x.dim())
    kept = call.owe(call.strips(x), over)
    if not call.arguments.get("keepdim"):
        kept = [s.at(s.dim - sum(d < s.dim for d in over)) for s in kept]
    return [kept] * len(call.outputs)


def _reduced(call: Call, rank: int) -> list[int]:
    dims = call.arguments.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [wrapped(d, rank) for d in (dims if isinstance(dims, Sequence) else [dims])]


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "logcumsumexp")
def along_a_dim(call: Call) -> list[Strips]:
    """Positions along ``dim`` depend on one another."""
    x = call["self"]
    call.lose_mixed()
    return [call.freeze_along(call.strips(x), [wrapped(call["dim"], x.dim())])] * len(call.outputs)


@rule(
    *"native_batch_norm cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update".split(),
    *"_native_batch_norm_legit _native_batch_norm_legit_no_training".split(),
)
def batch_norm(call: Call) -> list[Strips]:
    """The channels go together with their affine parameters and statistics; a gate belongs behind them."""
    x, *others = call.inputs
    carried = call.freeze_along(call.strips(x), [d for d in range(x.dim()) if d != 1])
    beside = [t for t in others if t.shape == (x.shape[1],)]
    columns = [((*t.shape, *[1] * (x.dim() - 2)), call.strips(t)) for t in beside]
    call.makers = {}
    return [call.meet([(x.shape, carried), *columns], x.shape)]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Strips]:
    """Statistics are of groups of channels, so groups stay whole; the number of groups follows."""
    x, shape, groups = call["input"], call.outputs[0].shape, call["group"]
    carried = call.keep_unless(call.strips(x), range(2, x.dim()))
    channels = call.single(carried, 1)
    beside = [
        ((*t.shape, *[1] * (x.dim() - 2)), call.strips(t)) for t in (call["weight"], call["bias"]) if t is not None
    ]
    call.makers = {}
    if channels is not None and groups == 1:
        call.freeze([channels])
    elif channels is not None:
        call.count("group", call.ledger.tie(channels.labels.view(groups, -1).t()))
    return [call.meet([(x.shape, carried), *beside], shape)]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
def attention(call: Call) -> list[Strips]:
    """Query, key and value [N, H, T, E]: heads go together; what is attended by can't be cut, what is carried can."""
    query, key, value, shape = call["query"], call["key"], call["value"], call.outputs[0].shape
    before = [
        ((*shape[:2], 1, 1), [_repeated(s, shape) for s in call.strips(t) if s.dim < 2]) for t in (query, key, value)
    ]
    bias = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if bias is not None:
        before.append(((*bias.shape[:-2], 1, 1), [s for s in call.strips(bias) if s.dim < bias.dim() - 2]))
        call.freeze(s for s in call.strips(bias) if s.dim >= bias.dim() - 2)
    call.evidence.inner += [s.labels for t in (query, key) for s in call.strips(t)]
    call.freeze(s for t in (query, key) for s in call.strips(t) if s.dim >= 2)
    call.freeze(s for s in call.strips(value) if s.dim == 2)
    call.consume()
    heads = call.meet(before, (*shape[:2], 1, 1))
    return [heads + [s for s in call.strips(value) if s.dim == 3], heads]  # and a number for each query


def _repeated(strip: Strip, shape: Sequence[int]) -> Strip:
    """Heads of keys and values serve several heads of queries each, where there are fewer."""
    return strip.relabelled(strip.labels.repeat_interleave(shape[strip.dim] // len(strip.labels)))


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Strips]:
    x = call["input"]
    own = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        call.freeze(call.strips(call.arguments.get(name)))
    return [call.freeze_along(call.strips(x), range(x.dim() - own, x.dim()))]


def _mixing(rank: int) -> Rule:
    def pass_channels(call: Call) -> list[Strips]:
        """Positions within the last ``rank`` dimensions mix; the others are left alone."""
        x, *others = call.inputs
        kept = call.keep_unless(call.strips(x), range(x.dim() - rank, x.dim()))
        call.freeze(s for other in others for s in call.strips(other))
        return [kept] * len(call.outputs)

    return pass_channels


_POOLS = """max_pool{}d_with_indices avg_pool{}d adaptive_avg_pool{}d _adaptive_avg_pool{}d adaptive_max_pool{}d
fractional_max_pool{}d reflection_pad{}d replication_pad{}d upsample_nearest{}d _upsample_nearest_exact{}d"""
_RESAMPLING = {
    1: "upsample_linear1d",
    2: "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d",
    3: "upsample_trilinear3d grid_sampler_3d",
}
for _rank, _names in _RESAMPLING.items():
    rule(*_POOLS.replace("{}", str(_rank)).split(), *_names.split())(_mixing(_rank))
