"""Rows of the presets ``default`` and ``lean``: the same on every device.

Overloads on named dimensions are left out: they cannot be captured.
"""

from __future__ import annotations

from mpgraph.op_rule import Rows, Rule, rows, table

_MATMUL = rows(
    Rule.LOWER,
    "matrix units take 16-bit inputs and add in float32",
    """
    linear mm bmm mv matmul linalg_matmul addmm addmv addr addbmm baddbmm _addmm_activation
    chain_matmul linalg_multi_dot _grouped_mm
    """,
)

_CONVOLUTION = rows(
    Rule.LOWER,
    "a sum of products: 16-bit inputs, added in float32",
    """
    conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution _convolution
    _convolution.deprecated _convolution_mode convolution_overrideable _conv_depthwise2d
    conv_depthwise3d thnn_conv2d slow_conv3d _slow_conv2d_forward slow_conv3d_forward
    slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d
    cudnn_convolution cudnn_convolution_transpose cudnn_convolution_relu
    cudnn_convolution_add_relu mkldnn_convolution
    """,
)

_ATTENTION = rows(
    Rule.LOWER,
    "two matrix products; the softmax between them is float32 inside the kernel",
    """
    scaled_dot_product_attention _scaled_dot_product_attention_math
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _flash_attention_forward
    _efficient_attention_forward _native_multi_head_attention _transformer_encoder_layer_fwd
    """,
)

_RECURRENT_CELLS = rows(
    Rule.LOWER,
    "two matrix products and bounded gates",
    """
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _thnn_fused_lstm_cell _thnn_fused_gru_cell
    mkldnn_rnn_layer _cudnn_rnn
    """,
)

_RECURRENT = rows(
    Rule.LOWER,
    "the whole network in 16 bit, as cuDNN runs it; opened, it would be unrolled over time",
    """
    lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_tanh.data rnn_relu.input
    rnn_relu.data
    """,
)

_LEARNED_SLOPE = rows(
    Rule.LOWER,
    "torch wants one dtype, and the float32 slope would pull the activation up with it",
    "prelu _prelu_kernel",
)

_SOFTMAX = rows(
    Rule.WIDEN,
    "small probabilities vanish in 16 bit, and a long row no longer adds up to 1",
    "softmax.int log_softmax.int special_softmax special_log_softmax _safe_softmax",
    set_dtype=True,
)
_SOFTMAX_KERNELS = rows(
    Rule.WIDEN,
    "small probabilities vanish in 16 bit, and a long row no longer adds up to 1",
    "_softmax _log_softmax",
)

_LAYER_NORMS = rows(
    Rule.WIDEN,
    "a 16-bit input is rounded before its mean is subtracted, and small deviations are lost",
    """
    layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm
    """,
)
_BATCH_NORMS = rows(
    Rule.WIDEN,
    "statistics over a whole batch, and running averages that move by small steps",
    """
    batch_norm _batch_norm_impl_index native_batch_norm _native_batch_norm_legit.no_stats
    _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _batch_norm_with_update
    _batch_norm_with_update_functional _batch_norm_no_update cudnn_batch_norm instance_norm
    """,
)

_SUMS = rows(
    Rule.WIDEN,
    "a sum leaves float16 at 65504, and the error grows with the length of the axis",
    """
    sum sum.dim_IntList nansum mean mean.dim nanmean cumsum
    """,
    set_dtype=True,
)
_PRODUCTS = rows(
    Rule.WIDEN,
    "a product of n factors leaves float16's range after a few of them",
    "prod prod.dim_int cumprod",
    set_dtype=True,
)
_VARIANCES = rows(
    Rule.WIDEN,
    "a sum of squared deviations: one deviation of 256 overflows float16",
    """
    var var.dim var.correction std std.dim std.correction var_mean var_mean.dim
    var_mean.correction std_mean std_mean.dim std_mean.correction cov corrcoef
    """,
)
_VECTOR_NORMS = rows(
    Rule.WIDEN,
    "the norm of many elements leaves float16's range though each element is well inside",
    """
    linalg_vector_norm linalg_matrix_norm linalg_matrix_norm.str_ord linalg_norm
    linalg_norm.ord_str linalg__powsum
    """,
    set_dtype=True,
)
_NORMS_APPEND = rows(
    Rule.WIDEN,
    "the norm of many elements leaves float16's range though each element is well inside",
    "norm.Scalar norm.ScalarOpt_dim",
    append_dtype=True,
)
_NORMS = rows(
    Rule.WIDEN,
    "the norm of many elements leaves float16's range though each element is well inside",
    """
    frobenius_norm.dim nuclear_norm nuclear_norm.dim norm_except_dim _weight_norm
    _weight_norm_interface renorm
    """,
)
_DISTANCES = rows(
    Rule.WIDEN,
    "a small difference of large numbers, then a sum of squares",
    """
    dist cdist _cdist_forward _euclidean_dist pdist _pdist_forward pairwise_distance
    cosine_similarity
    """,
)
_INNER_PRODUCTS = rows(
    Rule.WIDEN,
    "one long sum and no matrix unit to speed it up",
    "dot vdot linalg_vecdot trace bilinear _trilinear",
)
_SCATTERED_SUMS = rows(
    Rule.WIDEN,
    "adds many values into one place, and each addition rounds",
    """
    scatter_add scatter_reduce.two scatter.reduce scatter.value_reduce index_add index_reduce
    segment_reduce _unsafe_masked_index_put_accumulate
    """,
)
_STATISTICS = rows(
    Rule.WIDEN,
    "interpolates between neighbours or counts them: bins and ranks need exact values",
    """
    quantile quantile.scalar nanquantile nanquantile.scalar histc histogram.bins_tensor
    histogram.bin_ct
    """,
)

_EXPONENTIALS = rows(
    Rule.WIDEN,
    "float16 overflows above x = 11.09",
    "exp expm1 exp2 sinh cosh",
)
_LOG_SUMS = rows(
    Rule.WIDEN,
    "a sum of exponentials, then a logarithm: log-probabilities need absolute accuracy",
    "logsumexp special_logsumexp logcumsumexp _logcumsumexp logaddexp logaddexp2",
)
_LOGARITHMS = rows(
    Rule.WIDEN,
    "16-bit inputs near 1 lose the digits that the logarithm is made of",
    """
    log log2 log10 log1p logit xlogy.Tensor xlogy.Scalar_Self xlogy.Scalar_Other
    special_xlog1py special_xlog1py.self_scalar special_xlog1py.other_scalar special_entr
    softplus log_sigmoid log_sigmoid_forward special_log_ndtr
    """,
)
_POWERS = rows(
    Rule.WIDEN,
    "float16 squares overflow above 256, reciprocals below 1.6e-5",
    "pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar square reciprocal rsqrt ldexp.Tensor",
)
_STEEP = rows(
    Rule.WIDEN,
    "steep near its poles: one 16-bit rounding of the result is many of the input",
    "tan acos asin acosh atanh erfinv special_ndtri special_erfcx",
)
_SPECIAL_FUNCTIONS = rows(
    Rule.WIDEN,
    "grows or oscillates faster than 16-bit steps, and few kernels exist in 16 bit",
    """
    lgamma digamma polygamma mvlgamma igamma igammac i0 special_i0e special_i1 special_i1e
    special_zeta special_zeta.self_scalar special_zeta.other_scalar special_airy_ai
    special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
    special_spherical_bessel_j0 special_modified_bessel_i0 special_modified_bessel_i1
    special_modified_bessel_k0 special_modified_bessel_k1 special_scaled_modified_bessel_k0
    special_scaled_modified_bessel_k1
    """,
)
_SAMPLERS = rows(
    Rule.WIDEN,
    "samples in 16 bit fall on a coarse grid",
    """
    poisson binomial _standard_gamma _sample_dirichlet normal.Tensor_Tensor normal.Tensor_float
    normal.float_Tensor
    """,
)

_LOSSES = rows(
    Rule.WIDEN,
    "a sum over the batch, of logarithms or squares, that starts the backward pass",
    """
    cross_entropy_loss nll_loss nll_loss_nd nll_loss_forward nll_loss2d nll_loss2d_forward
    binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss
    huber_loss kl_div poisson_nll_loss soft_margin_loss margin_ranking_loss
    hinge_embedding_loss cosine_embedding_loss triplet_margin_loss multi_margin_loss
    multilabel_margin_loss multilabel_margin_loss_forward ctc_loss.IntList ctc_loss.Tensor
    _ctc_loss _ctc_loss.Tensor
    """,
)

_FOURIER = rows(
    Rule.WIDEN,
    "sums over a whole axis, and 16-bit transforms exist for few sizes and devices",
    """
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2
    fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn
    fft_ihfftn _fft_r2c _fft_c2r _fft_c2c stft stft.center istft
    """,
)
_COMPLEX = rows(
    Rule.WIDEN,
    "torch has no bfloat16 complex type, and few kernels for a float16 one",
    "complex polar view_as_complex view_as_complex_copy",
)
_LINEAR_ALGEBRA = rows(
    Rule.WIDEN,
    "factorisations amplify rounding errors and have no 16-bit kernels",
    """
    linalg_cholesky linalg_cholesky_ex linalg_cond linalg_cond.p_str linalg_det linalg_eig
    linalg_eigh linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv
    linalg_inv_ex linalg_ldl_factor linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu
    linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp linalg_matrix_power
    linalg_matrix_rank linalg_matrix_rank.tol_tensor linalg_matrix_rank.atol_rtol_tensor
    linalg_matrix_rank.atol_rtol_float linalg_pinv linalg_pinv.atol_rtol_tensor
    linalg_pinv.atol_rtol_float linalg_pinv.rcond_tensor linalg_qr linalg_slogdet linalg_solve
    linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv
    linalg_tensorsolve cholesky cholesky_inverse cholesky_solve _cholesky_solve_helper det
    geqrf inverse logdet lu_solve _lu_with_info lu_unpack matrix_exp matrix_power orgqr ormqr
    pinverse qr slogdet svd triangular_solve _linalg_det _linalg_eigh _linalg_slogdet
    _linalg_solve_ex _linalg_svd _linalg_eigvals linalg_vander
    """,
)

_INTERPOLATION = rows(
    Rule.WIDEN,
    "the backward adds many gradients into one pixel, on CUDA in the input's dtype; the "
    "antialiased kernels have no 16-bit form on CPU",
    """
    upsample_linear1d upsample_linear1d.vec upsample_bilinear2d upsample_bilinear2d.vec
    upsample_trilinear3d upsample_trilinear3d.vec upsample_bicubic2d upsample_bicubic2d.vec
    _upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa
    _upsample_bicubic2d_aa.vec _upsample_lanczos2d_aa _upsample_lanczos2d_aa.vec
    """,
)
_SAMPLING_GRIDS = rows(
    Rule.WIDEN,
    "a coordinate of 8 or 11 bits misses its pixel in an image a few hundred pixels wide",
    """
    grid_sampler grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback
    affine_grid_generator
    """,
)
_QUANTIZATION = rows(
    Rule.WIDEN,
    "scales and zero points are float32, and the rounding grid must not move",
    """
    fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine.tensor_qparams
    fake_quantize_per_channel_affine
    """,
)

_SAME_DTYPE = rows(
    Rule.PROMOTE,
    "torch wants its inputs in one dtype and does not promote them itself",
    """
    index_put _unsafe_index_put index_copy masked_scatter scatter.src put lerp.Tensor lerp.Scalar
    cross linalg_cross heaviside nextafter bucketize.Tensor searchsorted.Tensor embedding_bag
    embedding_bag.padding_idx _embedding_bag _embedding_bag_forward_only meshgrid
    meshgrid.indexing isclose allclose
    """,
)
_JOINS = rows(
    Rule.PROMOTE,
    "joins tensors into one; the widest dtype holds them all exactly",
    "cat stack",
)

_NEAREST = rows(
    Rule.FOLLOW,
    "copies pixels",
    """
    upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec
    upsample_nearest3d upsample_nearest3d.vec _upsample_nearest_exact1d
    _upsample_nearest_exact1d.vec _upsample_nearest_exact2d _upsample_nearest_exact2d.vec
    _upsample_nearest_exact3d _upsample_nearest_exact3d.vec
    """,
)
_SELECTING_POOLS = rows(
    Rule.FOLLOW,
    "picks or places elements, adds none up",
    """
    max_pool3d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_unpool2d
    max_unpool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d
    """,
)
_AVERAGING_POOLS = rows(
    Rule.FOLLOW,
    "an average stays in its inputs' range; the kernel adds in float32 and rounds once",
    """
    avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
    _adaptive_avg_pool2d
    """,
)
_AVERAGING_POOLS_3D = rows(
    Rule.WIDEN,
    "on CPU these add up in the input's dtype, or have no 16-bit kernel",
    "avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d",
)
_TERNARY = rows(
    Rule.FOLLOW,
    "elementwise; torch promotes mixed inputs to the widest",
    "addcmul addcdiv atan2 kron outer",
)

DEFAULT: Rows = table(
    _MATMUL,
    _CONVOLUTION,
    _ATTENTION,
    _RECURRENT_CELLS,
    _RECURRENT,
    _LEARNED_SLOPE,
    _SOFTMAX,
    _SOFTMAX_KERNELS,
    _LAYER_NORMS,
    _BATCH_NORMS,
    _SUMS,
    _PRODUCTS,
    _VARIANCES,
    _VECTOR_NORMS,
    _NORMS_APPEND,
    _NORMS,
    _DISTANCES,
    _INNER_PRODUCTS,
    _SCATTERED_SUMS,
    _STATISTICS,
    _EXPONENTIALS,
    _LOG_SUMS,
    _LOGARITHMS,
    _POWERS,
    _STEEP,
    _SPECIAL_FUNCTIONS,
    _SAMPLERS,
    _LOSSES,
    _FOURIER,
    _COMPLEX,
    _LINEAR_ALGEBRA,
    _INTERPOLATION,
    _SAMPLING_GRIDS,
    _QUANTIZATION,
    _SAME_DTYPE,
    _JOINS,
    _NEAREST,
    _SELECTING_POOLS,
    _AVERAGING_POOLS,
    _AVERAGING_POOLS_3D,
    _TERNARY,
)

LEAN: Rows = table(
    rows(
        Rule.LOWER,
        "the kernel computes its statistics in float32 and rounds the result once; "
        "torch wants weight and input in one dtype",
        "layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm",
    ),
    rows(
        Rule.FOLLOW,
        "the kernel takes a 16-bit input with float32 weights and running averages, which must "
        "not be copied, and computes in float32",
        """
        batch_norm _batch_norm_impl_index native_batch_norm _native_batch_norm_legit.no_stats
        _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training _batch_norm_with_update
        _batch_norm_with_update_functional _batch_norm_no_update cudnn_batch_norm instance_norm
        """,
    ),
    rows(
        Rule.FOLLOW,
        "the kernel computes in float32; only the probabilities are rounded",
        "softmax.int special_softmax _safe_softmax _softmax",
    ),
    rows(
        Rule.LOWER,
        "a lookup: the same bits as rounding its rows, and the residual stream starts in 16 bit",
        "embedding",
    ),
)
"""What ``lean`` does differently from ``default``."""

COMPOSITES: frozenset[str] = frozenset(
    rows(
        Rule.FOLLOW,
        "",
        """
        linear matmul linalg_matmul chain_matmul linalg_multi_dot conv1d conv1d.padding conv2d
        conv2d.padding conv3d conv3d.padding conv_transpose1d conv_transpose2d.input
        conv_transpose3d.input _convolution.deprecated _convolution_mode thnn_conv2d
        slow_conv3d scaled_dot_product_attention _scaled_dot_product_attention_math lstm_cell
        gru_cell rnn_tanh_cell rnn_relu_cell lstm.input lstm.data gru.input gru.data
        rnn_tanh.input rnn_tanh.data rnn_relu.input rnn_relu.data prelu softmax.int
        log_softmax.int special_softmax
        special_log_softmax layer_norm group_norm rms_norm _fused_rms_norm batch_norm
        _batch_norm_impl_index instance_norm nanmean var var.dim std std.dim var_mean
        var_mean.dim std_mean std_mean.dim cov corrcoef linalg_matrix_norm
        linalg_matrix_norm.str_ord linalg_norm linalg_norm.ord_str frobenius_norm.dim
        nuclear_norm nuclear_norm.dim norm_except_dim _weight_norm cdist pdist
        pairwise_distance cosine_similarity linalg_vecdot bilinear quantile quantile.scalar
        nanquantile nanquantile.scalar special_logsumexp log_sigmoid square cross_entropy_loss
        nll_loss nll_loss_nd nll_loss2d l1_loss kl_div poisson_nll_loss margin_ranking_loss
        hinge_embedding_loss cosine_embedding_loss triplet_margin_loss multilabel_margin_loss
        ctc_loss.IntList ctc_loss.Tensor fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft
        fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn
        fft_rfftn fft_irfftn fft_hfftn fft_ihfftn stft stft.center istft linalg_cholesky
        linalg_cond linalg_cond.p_str linalg_det linalg_eigh linalg_eigvals linalg_eigvalsh
        linalg_inv linalg_ldl_factor linalg_lu_factor linalg_matrix_power linalg_matrix_rank
        linalg_matrix_rank.tol_tensor linalg_matrix_rank.atol_rtol_tensor
        linalg_matrix_rank.atol_rtol_float linalg_pinv linalg_pinv.atol_rtol_float
        linalg_pinv.rcond_tensor linalg_slogdet linalg_solve linalg_solve_ex linalg_svd
        linalg_svdvals linalg_tensorinv linalg_tensorsolve det inverse logdet lu_solve
        _lu_with_info matrix_exp matrix_power orgqr pinverse qr slogdet svd linalg_vander
        upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec
        upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec
        _upsample_lanczos2d_aa.vec grid_sampler fake_quantize_per_tensor_affine
        fake_quantize_per_tensor_affine.tensor_qparams fake_quantize_per_channel_affine cross
        embedding_bag embedding_bag.padding_idx upsample_nearest1d.vec upsample_nearest2d.vec
        upsample_nearest3d.vec _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec
        _upsample_nearest_exact3d.vec max_pool3d avg_pool1d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d kron outer
        """,
    )
)
"""The operators of ``DEFAULT`` that are made of other operators, and can be opened."""
