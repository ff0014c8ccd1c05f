"""``torch.autocast``'s own lists, as rows of the presets ``autocast-cpu`` and ``autocast-cuda``.

The categories are those of ATen's ``autocast_mode.h`` (CUDA) and ``autocast_mode.cpp`` (CPU).
``tests/test_op_table.py`` compares both with the dispatcher of the installed torch, and runs
every operator to see which cast it gets.
"""

from __future__ import annotations

from mpgraph.op_rule import Rows, Rule, rows, table

_CPU_LOWER = rows(
    Rule.LOWER,
    "torch.autocast's 16-bit list on CPU",
    """
    conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input _convolution.deprecated
    mm bmm addmm addbmm baddbmm _addmm_activation matmul linear linalg_vecdot prelu
    scaled_dot_product_attention _native_multi_head_attention mkldnn_rnn_layer
    """,
)

_CPU_WIDEN = rows(
    Rule.WIDEN,
    "torch.autocast's float32 list on CPU",
    """
    avg_pool3d adaptive_avg_pool3d max_pool3d adaptive_max_pool3d fractional_max_pool2d
    fractional_max_pool3d max_unpool2d max_unpool3d reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d replication_pad3d grid_sampler grid_sampler_2d
    grid_sampler_3d _grid_sampler_2d_cpu_fallback
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss
    cross_entropy_loss ctc_loss.IntList ctc_loss.Tensor hinge_embedding_loss huber_loss kl_div
    l1_loss margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
    multilabel_margin_loss_forward nll_loss nll_loss2d poisson_nll_loss smooth_l1_loss
    soft_margin_loss triplet_margin_loss
    prod prod.dim_int quantile quantile.scalar nanquantile nanquantile.scalar trace cdist polar
    view_as_complex stft stft.center fake_quantize_per_tensor_affine
    fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2
    fft_irfft2 fft_rfftn fft_irfftn fft_hfft fft_ihfft
    cholesky cholesky_inverse cholesky_solve inverse pinverse qr svd geqrf orgqr ormqr lu_solve
    _lu_with_info triangular_solve linalg_cholesky linalg_cholesky_ex linalg_cond
    linalg_cond.p_str linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
    linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_rank
    linalg_matrix_rank.tol_tensor linalg_matrix_rank.atol_rtol_tensor
    linalg_matrix_rank.atol_rtol_float linalg_qr linalg_solve linalg_svd linalg_svdvals
    linalg_tensorinv linalg_tensorsolve
    """,
)

_CPU_PROMOTE = rows(
    Rule.PROMOTE, "torch.autocast's widest-input list on CPU", "cat stack index_copy"
)

_CUDA_LOWER = rows(
    Rule.LOWER,
    "torch.autocast's 16-bit list on CUDA",
    """
    conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution _convolution _convolution.deprecated cudnn_convolution
    cudnn_convolution_transpose
    mm mv bmm addmm addmv addr addbmm baddbmm matmul linear einsum chain_matmul
    linalg_multi_dot linalg_vecdot prelu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    _thnn_fused_lstm_cell _thnn_fused_gru_cell scaled_dot_product_attention
    _scaled_dot_product_flash_attention
    """,
)

# ATen's cudnn/AutocastRNN.cpp casts to at::kHalf, whatever dtype torch.autocast was given.
_CUDNN_RECURRENT = "torch.autocast runs cuDNN's recurrent layers in fp16, also where bf16 is asked"

CUDA_BUILDS_ONLY: Rows = rows(Rule.LOWER, _CUDNN_RECURRENT, "_cudnn_rnn", dtype="fp16")
"""Rows whose autocast kernel exists only in torch builds with CUDA."""

CUDA_RECURRENT: Rows = rows(
    Rule.LOWER,
    _CUDNN_RECURRENT,
    """
    lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_tanh.data rnn_relu.input
    rnn_relu.data
    """,
    dtype="fp16",
)
"""Composites that stay whole on CUDA: cuDNN's kernel cannot be traced inside them."""

_CUDA_WIDEN = rows(
    Rule.WIDEN,
    "torch.autocast's float32 list on CUDA",
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan softplus
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar
    layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm
    nuclear_norm.dim renorm cosine_similarity dist pdist cdist logsumexp
    poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div
    l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
    soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    """,
)

_CUDA_SET_DTYPE = rows(
    Rule.WIDEN,
    "torch.autocast sets dtype=float32 on CUDA, unless the caller gave a dtype",
    """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
    """,
    set_dtype=True,
)

_CUDA_APPEND_DTYPE = rows(
    Rule.WIDEN,
    "torch.autocast calls the overload with a dtype, with float32, on CUDA",
    "norm.Scalar norm.ScalarOpt_dim",
    append_dtype=True,
)

_CUDA_PROMOTE = rows(
    Rule.PROMOTE,
    "torch.autocast's widest-input list on CUDA",
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
    """,
)

_CUDA_REFUSE = rows(
    Rule.REFUSE,
    "its gradient overflows float16 where the input nears 0 or 1; use "
    "binary_cross_entropy_with_logits, or pin it to fp32",
    "binary_cross_entropy",
)

SINCE: dict[str, tuple[int, int]] = {"aten.rms_norm.default": (2, 12)}
"""The release of torch in which an operator came onto autocast's lists, if after 2.11.

Before, torch.autocast cast nothing in it: it is left alone, composite or not.
"""

AUTOCAST_CPU: Rows = table(_CPU_LOWER, _CPU_WIDEN, _CPU_PROMOTE)
AUTOCAST_CUDA: Rows = table(
    _CUDA_LOWER,
    CUDA_BUILDS_ONLY,
    _CUDA_WIDEN,
    _CUDA_SET_DTYPE,
    _CUDA_APPEND_DTYPE,
    _CUDA_PROMOTE,
    _CUDA_REFUSE,
)

OPENED: frozenset[str] = frozenset({"aten.affine_grid_generator.default"})
"""No composites for autograd, but torch.autocast casts around the matrix product inside."""

SAFE_COMPOSITES_CPU: frozenset[str] = frozenset(
    rows(
        Rule.FOLLOW,
        "",
        """
        batch_norm _batch_norm_impl_index layer_norm group_norm rms_norm _fused_rms_norm
        softmax.int log_softmax.int special_softmax special_log_softmax special_logsumexp
        log_sigmoid square outer kron cross nanmean cosine_similarity pairwise_distance
        norm_except_dim frobenius_norm.dim var var.dim std std.dim var_mean var_mean.dim
        std_mean std_mean.dim avg_pool1d adaptive_avg_pool1d adaptive_avg_pool2d embedding_bag
        embedding_bag.padding_idx upsample_nearest1d.vec upsample_nearest2d.vec
        upsample_nearest3d.vec _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec
        _upsample_nearest_exact3d.vec upsample_linear1d.vec upsample_bilinear2d.vec
        upsample_trilinear3d.vec upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec
        _upsample_bicubic2d_aa.vec
        """,
    )
)
"""Composite operators with nothing inside that torch.autocast casts on CPU."""

SAFE_COMPOSITES_CUDA: frozenset[str] = frozenset(
    rows(
        Rule.FOLLOW,
        "",
        """
        batch_norm _batch_norm_impl_index log_sigmoid outer kron var var.dim std std.dim
        var_mean var_mean.dim std_mean std_mean.dim avg_pool1d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d max_pool3d embedding_bag
        embedding_bag.padding_idx
        """,
    )
)
"""Composite operators with nothing inside that torch.autocast casts on CUDA."""
