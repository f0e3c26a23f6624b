"""Rows of the table for ops beyond the common ones, in families."""

from __future__ import annotations

from torchlathe.ir.axes.rule import Rule
from torchlathe.ir.axes.rules.arranging import (
    BroadcastTensors,
    ChannelShuffle,
    Copy,
    Diagonal,
    MeshGrid,
    ReshapeAs,
    Rot90,
    StackAlong,
)
from torchlathe.ir.axes.rules.contraction import Signature
from torchlathe.ir.axes.rules.creation import Filled, FilledLike, Numbered
from torchlathe.ir.axes.rules.embedding import EmbeddingBag
from torchlathe.ir.axes.rules.indexing import Gather, Index, IndexSelect
from torchlathe.ir.axes.rules.padding import Pad
from torchlathe.ir.axes.rules.passing import Passing
from torchlathe.ir.axes.rules.pinned import Extremum, Opaque, PinnedAxis, PinnedTail
from torchlathe.ir.axes.rules.pointwise import Pointwise
from torchlathe.ir.axes.rules.products import (
    DeformableConvolution,
    GroupedMatMul,
    Inner,
    Kronecker,
    TensorDot,
)
from torchlathe.ir.axes.rules.quantised import Dequantize, RoundTokens
from torchlathe.ir.axes.rules.recurrent import Recurrent, RecurrentCell
from torchlathe.ir.axes.rules.reduction import AlongAxis, Reduce
from torchlathe.ir.axes.rules.scattering import (
    IndexPut,
    MaskedScatter,
    Scatter,
    SelectScatter,
    SliceScatter,
)
from torchlathe.ir.axes.rules.shaping import Permute, Repeat, Reshape
from torchlathe.ir.axes.rules.slicing import Split
from torchlathe.ir.axes.rules.spatial import OverPositions
from torchlathe.ir.axes.rules.vectors import Renorm, Similarity, WeightNorm

__all__ = ["further_rows"]

Rows = list[tuple[Rule, str]]


def further_rows() -> Rows:
    """Rules with the schema names that they are for; "aten" where no namespace is given."""
    return [
        *_elementwise(),
        *_products(),
        *_along_axes(),
        *_arranging(),
        *_places(),
        *_windows(),
        *_made(),
        *_opaque(),
        (Dequantize(), "torchlathe::dequantize"),
        (RoundTokens(), "torchlathe::quantize_dequantize_tokens"),
    ]


def _elementwise() -> Rows:
    return [
        (Pointwise("identity"), "resolve_conj resolve_neg alias_copy lift lift_fresh"),
        (
            Pointwise("function"),
            "absolute negative positive arccos arcsin arctan arccosh arcsinh arctanh arctan2 fix "
            "hypot copysign heaviside logaddexp logaddexp2 xlogy sinc erfinv lgamma digamma "
            "polygamma mvlgamma i0 signbit isclose isreal isneginf isposinf ldexp gcd lcm "
            "nextafter float_power special_expit special_erf special_erfc special_erfcx "
            "special_erfinv special_entr special_expm1 special_log1p special_exp2 special_sinc "
            "special_xlogy special_xlog1py special_logit special_ndtr special_round "
            "bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ greater greater_equal "
            "less less_equal not_equal rrelu complex polar real imag angle _conj conj "
            "conj_physical _neg_view fake_quantize_per_tensor_affine igamma igammac special_i0e "
            "special_i1 special_i1e special_ndtri special_log_ndtr special_zeta "
            "special_bessel_j0 special_bessel_j1 _prelu_kernel",
        ),
        (Copy(), "copy"),
        (Passing("input[*b] -> [*b]", zero=("input",)), "native_dropout"),
        (Passing("self[*b, z!] -> [*b]", "its last axis are complex numbers", ("self",)),
         "view_as_complex view_as_complex_copy"),
        (Passing("self[*b] -> [*b, z!]", "its last axis are complex numbers", ("self",)),
         "view_as_real view_as_real_copy"),
    ]  # fmt: skip


def _products() -> Rows:
    return [
        (Signature("mat[n, k] * vec[k] + self[n] -> [n]"), "addmv"),
        (Signature("vec1[n] * vec2[m] + self[n, m] -> [n, m]"), "addr"),
        (Signature("batch1[b, n, k] * batch2[b, k, m] + self[n, m] -> [n, m]"), "addbmm"),
        (Signature("self[i] * vec2[o] -> [i, o]"), "ger"),
        (Signature("self[k] * other[k] -> []"), "vdot"),
        (
            Signature("input1[*b, i] * input2[*b, j] * weight[o, i, j] + bias[o] -> [*b, o]"),
            "bilinear",
        ),
        (TensorDot(), "tensordot"),
        (Inner(), "inner"),
        (Kronecker(), "kron"),
        (GroupedMatMul(), "_grouped_mm"),
        (GroupedMatMul("input", "weight"), "transformers::grouped_mm_fallback"),
        (DeformableConvolution(), "torchvision::deform_conv2d"),
        (Recurrent(4), "lstm"),
        (Recurrent(3), "gru"),
        (Recurrent(1), "rnn_tanh rnn_relu"),
        (RecurrentCell(4), "lstm_cell"),
        (RecurrentCell(3), "gru_cell"),
        (RecurrentCell(1), "rnn_tanh_cell rnn_relu_cell"),
        (WeightNorm(), "_weight_norm _weight_norm_interface"),
        (Renorm(), "renorm"),
        (Similarity(), "cosine_similarity"),
        (Similarity(last=True, exact=False), "pairwise_distance"),
        (Similarity(any_zero=True), "linalg_vecdot"),
        (Similarity(kept=True), "linalg_cross"),
        (Passing("x1[*b, n, d]; x2[*b, m, d] -> [*b, n, m]"), "cdist _cdist_forward"),
        (Passing("x1[n, d]; x2[m, d] -> [n, m]"), "_euclidean_dist"),
        (Passing("self[n!, d] -> [k]", "its rows are compared in pairs"), "pdist _pdist_forward"),
        (Passing("self[n!, m!] -> []", "its diagonal is summed"), "trace"),
    ]


_ORDER = "its order matters"
_PLACES = "its indices change places"


def _along_axes() -> Rows:
    return [
        (Reduce("sum"), "nansum count_nonzero linalg_norm linalg_matrix_norm frobenius_norm"),
        (Reduce("extremum"), "aminmax"),
        (Extremum("extremum"), "nanmedian kthvalue"),
        (Reduce("other"), "nanmean"),
        (Reduce("logsumexp"), "special_logsumexp"),
        (AlongAxis(), "logcumsumexp special_softmax special_log_softmax _safe_softmax softmin"),
        (PinnedAxis(("dims",), _PLACES), "roll flip"),
        (Passing("self[k!, *b] -> [k, *b]", _PLACES, ("self",)), "flipud"),
        (
            Passing("self[a, k!, *b] -> [a, k, *b]", _PLACES, ("self",)),
            "fliplr",
        ),
        (PinnedAxis(("dim",), _PLACES), "fft_fftshift fft_ifftshift"),
        (PinnedAxis(("dim",), _ORDER), "sort topk argsort"),
        (PinnedAxis(("dim",), "its differences are taken", "zeros"), "diff"),
        (
            PinnedAxis(("dimension",), "windows of it are taken"),
            "unfold unfold_copy",
        ),
        (
            PinnedAxis(("dim",), "it is transformed to frequencies", "zeros"),
            "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 "
            "fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfft2 fft_ihfft2 fft_hfftn "
            "fft_ihfftn _fft_r2c "
            "_fft_c2r _fft_c2c",
        ),
        (
            PinnedTail(1, "it is transformed to frequencies over time", zeros=True),
            "stft",
        ),
        (
            PinnedTail(2, "it is transformed from frequencies over time", zeros=True),
            "istft",
        ),
        (PinnedTail(2, "it depends on the position", zeros=True), "tril triu"),
        (PinnedTail(1, "it holds the weights that indices are drawn by"), "multinomial"),
        (Passing("self[k!, *b] -> [k, *b]", _ORDER), "msort"),
        (
            PinnedTail(2, "a matrix decomposition mixes its indices"),
            "linalg_inv inverse linalg_inv_ex linalg_det det logdet linalg_slogdet slogdet "
            "linalg_cholesky cholesky linalg_cholesky_ex linalg_pinv pinverse linalg_qr "
            "linalg_svd svd _linalg_svd linalg_svdvals linalg_eigh _linalg_eigh linalg_eigvalsh "
            "linalg_eig linalg_eigvals linalg_matrix_exp matrix_exp linalg_matrix_power "
            "matrix_power linalg_solve_triangular cholesky_inverse linalg_matrix_rank "
            "linalg_lu_factor linalg_ldl_factor nuclear_norm",
        ),
    ]


def _arranging() -> Rows:
    return [
        (Repeat("dims"), "tile"),
        (ReshapeAs(), "view_as reshape_as"),
        (Reshape(), "atleast_1d atleast_2d atleast_3d"),
        (Permute(), "adjoint mH matrix_H"),
        (Rot90(), "rot90"),
        (Diagonal(), "diagonal diagonal_copy diag diag_embed"),
        (MeshGrid(), "meshgrid"),
        (BroadcastTensors(), "broadcast_tensors"),
        (ChannelShuffle(), "channel_shuffle native_channel_shuffle"),
        (StackAlong(1, 1), "hstack"),
        (StackAlong(0, 2), "vstack row_stack"),
        (StackAlong(2, 3), "dstack"),
        (StackAlong(1, 2, column=True), "column_stack"),
        (Split(), "unsafe_split_with_sizes"),
        (Split(axis=1), "hsplit"),
        (Split(axis=0), "vsplit"),
        (Split(axis=2), "dsplit"),
        (
            Pad(),
            "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
            "replication_pad1d replication_pad2d replication_pad3d _pad_circular",
        ),
    ]


def _places() -> Rows:
    by_value = "its indices are picked by the values of a tensor"
    bounds = "its values are searched in, in order"
    return [
        (Index(), "index"),
        (IndexSelect(), "index_select"),
        (Gather(), "gather take_along_dim"),
        (Scatter(), "scatter"),
        (Scatter(adds=True), "scatter_add scatter_reduce"),
        (Scatter("source", whole=True, adds=True), "index_add index_reduce"),
        (Scatter("source", whole=True), "index_copy index_fill"),
        (IndexPut(), "index_put _unsafe_index_put"),
        (Index(), "_unsafe_index"),
        (SliceScatter(), "slice_scatter"),
        (SelectScatter(), "select_scatter diagonal_scatter"),
        (MaskedScatter(), "masked_scatter"),
        (Passing("self[*s!]; index[*i] -> [*i]", by_value), "take"),
        (Passing("self[*b]; boundaries[k!] -> [*b]", bounds), "bucketize"),
        (Passing("elements[*b]; test_elements[*t!] -> [*b]", bounds), "isin"),
        (
            PinnedTail(1, bounds),
            "searchsorted",
        ),
        (Passing("self[*b] -> [*b, k!]", "it numbers the classes of a one-hot code"), "one_hot"),
        (EmbeddingBag(), "embedding_bag _embedding_bag _embedding_bag_forward_only"),
    ]


_POSITION = "it is a position that a window moves over"
_READ = "places or boxes are read from it"


def _windows() -> Rows:
    return [
        (
            OverPositions(1),
            "max_pool1d max_pool1d_with_indices adaptive_max_pool1d upsample_linear1d "
            "_upsample_nearest_exact1d",
        ),
        (OverPositions(2), "_upsample_lanczos2d_aa"),
        (
            OverPositions(3),
            "max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
            "_upsample_nearest_exact3d",
        ),
        (
            Passing("self[*b, h!, w!]; indices[*b, h!, w!] -> [*b, y, x]", _POSITION, ("self",)),
            "max_unpool2d",
        ),
        (
            Passing(
                "self[*b, d!, h!, w!]; indices[*b, d!, h!, w!] -> [*b, z, y, x]",
                _POSITION,
                ("self",),
            ),
            "max_unpool3d",
        ),
        (
            Passing("self[*b, h!, w!]; random_samples[*b!, r!] -> [*b, y, x]", _POSITION),
            "fractional_max_pool2d",
        ),
        (
            Passing("self[*b, d!, h!, w!]; random_samples[*b!, r!] -> [*b, z, y, x]", _POSITION),
            "fractional_max_pool3d",
        ),
        (Passing("self[*n, c, h!, w!] -> [*n, c k, l]", _POSITION, ("self",)), "im2col"),
        (Passing("self[*n, c k!, l!] -> [*n, c, y, x]", _POSITION, ("self",)), "col2im"),
        (
            Passing("input[n, c, *s!]; grid[n, *p!, k!] -> [n, c, *p]", _READ, ("input",)),
            "grid_sampler grid_sampler_2d grid_sampler_3d",
        ),
        (Passing("theta[n!, r!, k!] -> [n, *p, r]", "it is a map"), "affine_grid_generator"),
        (
            Passing("input[b!, c, h!, w!]; rois[k!, x!] -> [k, c, p, q]", _READ, ("input",)),
            "torchvision::roi_align torchvision::roi_pool",
        ),
        (
            Passing("input[b!, c!, h!, w!]; rois[k!, x!] -> [k, o, p, q]", _READ),
            "torchvision::ps_roi_align torchvision::ps_roi_pool",
        ),
    ]  # fmt: skip


def _made() -> Rows:
    return [
        (Filled(), "empty new_empty"),
        (FilledLike(), "empty_like"),
        (FilledLike(sizes="", name="value"), "fill"),
        (FilledLike(0.0), "zero"),
        (
            Numbered(),
            "logspace range tril_indices triu_indices hann_window hamming_window blackman_window "
            "bartlett_window kaiser_window fft_fftfreq fft_rfftfreq vander",
        ),
    ]


def _opaque() -> Rows:
    return [
        (
            Opaque("the order of its memory is given"),
            "as_strided as_strided_copy as_strided_scatter _reshape_alias empty_permuted "
            "empty_strided new_empty_strided",
        ),
        (
            Opaque("random numbers are drawn for each of its indices in turn"),
            "rand rand_like randn randn_like randint randint_like randperm normal "
            "normal_functional uniform bernoulli exponential poisson binomial cauchy log_normal "
            "geometric random",
        ),
        (
            Opaque("its values say how many indices there are"),
            "nonzero nonzero_static nonzero_numpy argwhere where. unique_dim _unique _unique2 "
            "unique_consecutive unique_dim_consecutive masked_select",
        ),
        (Opaque("its values are counted"), "bincount histc histogram"),
        (
            Opaque("all pairs or combinations of its indices are formed"),
            "cartesian_prod combinations block_diag",
        ),
        (Opaque("quantiles are taken over it"), "quantile nanquantile"),
        (Opaque("its segments are reduced"), "segment_reduce"),
        (Opaque("it is written to at places in its memory"), "put"),
        (
            Opaque("a loss is taken over it"),
            "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward mse_loss l1_loss "
            "smooth_l1_loss huber_loss kl_div binary_cross_entropy "
            "binary_cross_entropy_with_logits ctc_loss _ctc_loss margin_ranking_loss "
            "cosine_embedding_loss hinge_embedding_loss triplet_margin_loss multi_margin_loss "
            "multilabel_margin_loss soft_margin_loss poisson_nll_loss gaussian_nll_loss",
        ),
        (
            Opaque("a fused layer of attention has heads and widths of its own"),
            "_native_multi_head_attention _transformer_encoder_layer_fwd "
            "_transform_bias_rescale_qkv",
        ),
        (
            Opaque("packed sequences are ordered by length"),
            "_pack_padded_sequence lstm.data gru.data rnn_tanh.data rnn_relu.data",
        ),
        (Opaque("sequences are unpacked in order"), "_pad_packed_sequence"),
        (Opaque("boxes are compared with each other"), "torchvision::nms"),
        (
            Opaque("a linear system couples its indices"),
            "linalg_solve linalg_solve_ex _linalg_solve_ex linalg_lstsq cholesky_solve lu_solve "
            "linalg_lu_solve triangular_solve linalg_multi_dot chain_matmul",
        ),
    ]
