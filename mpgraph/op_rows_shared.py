"""Rows that every preset shares: operators that follow their inputs, or keep their dtype.

Composite operators stand here only when no operator inside them is cast by any preset; the
others (``einsum``, ``pad``, ``tensordot`` ...) have no row, so that they are opened and each
part is decided. ``tests/test_op_table.py`` checks this.
"""

from __future__ import annotations

from mpgraph.op_rule import Rows, Rule, rows, table

_VIEWS = rows(
    Rule.FOLLOW,
    "moves no bits: a view or a change of shape",
    """
    view reshape _unsafe_view _reshape_alias permute transpose.int t numpy_T mT mH matrix_H adjoint
    slice.Tensor select.int narrow narrow.Tensor expand expand_as view_as reshape_as broadcast_to
    squeeze squeeze.dim squeeze.dims unsqueeze flatten.using_ints unflatten.int ravel
    unbind.int split.Tensor split.sizes split_with_sizes unsafe_split.Tensor
    unsafe_split_with_sizes chunk unsafe_chunk tensor_split.sections tensor_split.indices
    diagonal linalg_diagonal as_strided unfold alias movedim.int movedim.intlist moveaxis.int
    moveaxis.intlist swapaxes swapdims real imag view_as_real positive broadcast_tensors
    meshgrid meshgrid.indexing atleast_1d atleast_2d atleast_3d
    resolve_conj resolve_neg conj _conj _neg_view detach
    """,
)

_COPIES = rows(
    Rule.FOLLOW,
    "moves elements and changes none of them",
    """
    contiguous clone repeat tile repeat_interleave.self_int repeat_interleave.self_Tensor
    repeat_interleave.Tensor flip fliplr flipud roll rot90 im2col col2im pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle
    index.Tensor _unsafe_index.Tensor _unsafe_masked_index index_select gather take
    take_along_dim masked_select
    triu tril diag diag_embed diagflat constant_pad_nd _pack_padded_sequence
    _pad_packed_sequence lift_fresh lift_fresh_copy lift view_copy expand_copy permute_copy
    slice_copy.Tensor select_copy.int transpose_copy.int t_copy squeeze_copy squeeze_copy.dim
    squeeze_copy.dims unsqueeze_copy unfold_copy alias_copy detach_copy diagonal_copy
    as_strided_copy split_copy.Tensor split_with_sizes_copy unbind_copy.int _reshape_copy
    """,
)

_LOOKUPS = rows(
    Rule.FOLLOW,
    "copies rows of a table",
    "embedding embedding_renorm",
)

_EXACT = rows(
    Rule.FOLLOW,
    "exact in every dtype",
    """
    relu relu6 neg negative abs absolute sign sgn conj_physical hardtanh threshold
    floor ceil trunc fix round round.decimals nan_to_num isnan isinf isfinite isposinf
    isneginf signbit frac copysign.Tensor copysign.Scalar clamp clamp.Tensor clamp_min
    clamp_min.Tensor clamp_max clamp_max.Tensor clip clip.Tensor maximum minimum fmax fmin
    """,
)

_ORDER = rows(
    Rule.FOLLOW,
    "picks elements by comparing them, adds none up",
    """
    max max.dim max.other min min.dim min.other amax amin aminmax argmax argmin topk sort
    sort.stable argsort argsort.stable msort kthvalue median median.dim nanmedian nanmedian.dim
    mode cummax cummin unique_consecutive unique_dim _unique _unique2 max_pool1d
    max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d
    """,
)

_COMPARE = rows(
    Rule.FOLLOW,
    "torch promotes the operands, then compares; the result is boolean or an index",
    """
    eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor
    gt.Scalar ge.Tensor ge.Scalar greater.Tensor greater.Scalar greater_equal.Tensor
    greater_equal.Scalar less.Tensor less.Scalar less_equal.Tensor less_equal.Scalar
    not_equal.Tensor not_equal.Scalar isclose allclose equal isin.Tensor_Tensor
    isin.Tensor_Scalar isin.Scalar_Tensor all all.dim all.dims any any.dim any.dims
    nonzero nonzero_static nonzero_numpy argwhere count_nonzero count_nonzero.dim_IntList
    logical_and logical_or logical_not logical_xor bitwise_and.Tensor bitwise_and.Scalar
    bitwise_and.Scalar_Tensor bitwise_or.Tensor bitwise_or.Scalar bitwise_or.Scalar_Tensor
    bitwise_xor.Tensor bitwise_xor.Scalar bitwise_xor.Scalar_Tensor bitwise_not
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_left_shift.Scalar_Tensor
    bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar
    bitwise_right_shift.Scalar_Tensor __and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar
    __xor__.Tensor __xor__.Scalar __lshift__.Tensor __lshift__.Scalar __rshift__.Tensor
    __rshift__.Scalar gcd lcm bincount one_hot is_nonzero _is_all_true _is_any_true
    """,
)

_ARITHMETIC = rows(
    Rule.FOLLOW,
    "one rounding per element; torch promotes mixed inputs to the widest",
    """
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar
    div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode subtract.Tensor subtract.Scalar
    multiply.Tensor multiply.Scalar divide.Tensor divide.Scalar divide.Tensor_mode
    divide.Scalar_mode true_divide.Tensor true_divide.Scalar floor_divide floor_divide.Scalar
    fmod.Tensor fmod.Scalar remainder.Tensor remainder.Scalar remainder.Scalar_Tensor
    where.self where.Scalar where.ScalarSelf where.ScalarOther where
    masked_fill.Scalar masked_fill.Tensor index_fill.int_Scalar index_fill.int_Tensor
    lerp.Scalar hypot sqrt deg2rad rad2deg
    """,
)

_ACTIVATIONS = rows(
    Rule.FOLLOW,
    "bounded by its input, computed in float32 inside the kernel and rounded once",
    """
    gelu silu mish sigmoid tanh elu celu selu leaky_relu rrelu glu hardswish hardsigmoid
    hardshrink softshrink sin cos sinc erf erfc atan arctan asinh arcsinh angle
    rrelu_with_noise_functional
    """,
)

_RANDOM = rows(
    Rule.FOLLOW,
    "draws a mask or samples, and scales what arrives",
    """
    dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout bernoulli
    bernoulli.p bernoulli.Tensor multinomial normal_functional uniform exponential
    """,
)

_EXPLICIT_CAST = rows(
    Rule.KEEP,
    "an explicit cast in the model",
    """
    to.dtype to.dtype_layout to.device to.other _to_copy type_as view.dtype _cast_Float _cast_Half
    _cast_Double _cast_Byte _cast_Char _cast_Int _cast_Long _cast_Short _to_cpu pin_memory
    dequantize.self
    """,
)

_FACTORIES = rows(
    Rule.KEEP,
    "creates a tensor; its dtype is part of the call",
    """
    zeros ones full empty.memory_format empty_strided empty_permuted eye eye.m arange
    arange.start arange.start_step range range.step linspace linspace.Tensor_Tensor
    linspace.Tensor_Scalar linspace.Scalar_Tensor logspace logspace.Tensor_Tensor
    logspace.Tensor_Scalar logspace.Scalar_Tensor scalar_tensor tril_indices triu_indices
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like
    randint_like.low_dtype new_zeros new_ones new_full new_empty new_empty_strided rand
    rand.generator randn randn.generator randint randint.low randint.generator
    randint.low_generator randperm randperm.generator normal.float_float
    hann_window hann_window.periodic hamming_window hamming_window.periodic
    hamming_window.periodic_alpha hamming_window.periodic_alpha_beta blackman_window
    blackman_window.periodic bartlett_window bartlett_window.periodic kaiser_window
    kaiser_window.periodic kaiser_window.beta fft_fftfreq fft_rfftfreq
    """,
)

_SCATTER_VIEWS = rows(
    Rule.KEEP,
    "writes into a copy of its first argument and keeps that argument's dtype",
    """
    slice_scatter select_scatter diagonal_scatter as_strided_scatter copy fill.Scalar
    fill.Tensor scatter.value
    """,
)

_QUERIES = rows(
    Rule.KEEP,
    "reads a tensor's shape, dtype or value; computes nothing",
    """
    size.int stride.int dim numel storage_offset is_floating_point is_complex item
    _local_scalar_dense result_type.Tensor result_type.Scalar result_type.Scalar_Tensor
    result_type.Scalar_Scalar _assert_async _assert_async.msg _assert_scalar
    _assert_tensor_metadata _shape_as_tensor bucketize.Scalar searchsorted.Scalar
    sym_size.int sym_numel sym_stride.int sym_storage_offset sym_constrain_range
    sym_constrain_range_for_size is_same_size
    """,
)

_DTYPE_GIVEN = rows(
    Rule.KEEP,
    "the caller names the dtype of the result",
    """
    mm.dtype bmm.dtype addmm.dtype baddbmm.dtype norm.ScalarOpt_dim_dtype norm.ScalarOpt_dtype
    """,
)

_DOUBLE = rows(
    Rule.KEEP,
    "computes in float64 whatever arrives",
    "float_power.Scalar float_power.Tensor_Scalar float_power.Tensor_Tensor",
)

SHARED: Rows = table(
    _VIEWS,
    _COPIES,
    _LOOKUPS,
    _EXACT,
    _ORDER,
    _COMPARE,
    _ARITHMETIC,
    _ACTIVATIONS,
    _RANDOM,
    _EXPLICIT_CAST,
    _FACTORIES,
    _SCATTER_VIEWS,
    _QUERIES,
    _DTYPE_GIVEN,
    _DOUBLE,
)
"""Rows of every preset; a preset's own row for the same operator wins."""

MOVES_DATA: frozenset[str] = frozenset(_VIEWS) | frozenset(_COPIES)
"""Operators that compute nothing: what they return has the dtype of what they were given."""
