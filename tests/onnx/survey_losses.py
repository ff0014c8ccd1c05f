"""The losses of torch.nn, as exported steps have to compute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .survey_row import Ints, Positive, Row, row

_PAIR = ((3, 5), (3, 5))
_CLASSES = ((4, 5), Ints((4,), 5))
_RANKED = torch.tensor([[3, 1, -1, 0, 2], [0, -1, 2, 1, 4], [-1, 0, 0, 0, 0], [4, 3, 2, 1, 0]])


def _signs(y: Tensor) -> Tensor:
    return 2.0 * y - 1


def _ctc(lengths: tuple[int, ...], targets: Any, **options: Any) -> Callable[..., Tensor]:
    """CTC over 9 steps, of targets that are a constant, or as many lengths as numbers."""

    def run(x: Tensor, *given: Tensor) -> Tensor:
        y = given[0] if given else torch.tensor(targets)
        sizes = torch.tensor(lengths[1::2]), torch.tensor(lengths[::2])
        return F.ctc_loss(x.log_softmax(-1), y, sizes[0], sizes[1], **options)

    return run


def _ctc_of_all(x: Tensor, y: Tensor) -> Tensor:
    """Lengths in tensors that the batch makes."""
    steps = torch.full_like(y[:, 0], 7)
    sizes = (y > 2).sum(1)
    return F.ctc_loss(x.log_softmax(-1), y.clamp(min=1), steps, sizes, zero_infinity=True)


# torch 2.11 lacks it.
_NEW = [
    row(name, getattr(F, name), ((4, 3), (5, 3), Ints((4,), 5)))
    for name in ("linear_cross_entropy",)
    if hasattr(F, name)
]
ROWS: tuple[Row, ...] = (
    row("mse sum", lambda x, y: F.mse_loss(x, y, reduction="sum"), _PAIR),
    row("mse of each", lambda x, y: F.mse_loss(x, y, reduction="none"), _PAIR),
    row("mse weighted", lambda x, y, w: F.mse_loss(x, y, weight=w.detach()), (*_PAIR, Positive((3, 5)))),
    row("l1 sum", lambda x, y: F.l1_loss(x, y, reduction="sum"), _PAIR),
    row("smooth_l1 of each", lambda x, y: F.smooth_l1_loss(x, y, reduction="none"), _PAIR),
    row("huber sum", lambda x, y: F.huber_loss(x, y, reduction="sum", delta=2.0), _PAIR),
    row("gaussian_nll written out", lambda x, y, v: (v.log() + (x - y).square() / v).mean() / 2, (*_PAIR, Positive((3, 5)))),
    row("poisson plain", lambda x, y: F.poisson_nll_loss(x, y, log_input=False), (Positive((3, 5)), Positive((3, 5)))),
    row("poisson full", lambda x, y: F.poisson_nll_loss(x, (y * 4).round().detach(), full=True), ((3, 5), Positive((3, 5)))),
    row("kl_div of logs", lambda x, y: F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="sum"), _PAIR),
    row("kl_div of each", lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1).detach(), reduction="none"), _PAIR),
    row("cosine_embedding", lambda x, y, t: F.cosine_embedding_loss(x, y, _signs(t), margin=0.2), ((6, 5), (6, 5), Ints((6,), 2))),
    row("soft_margin", lambda x, t: F.soft_margin_loss(x, _signs(t)), ((3, 5), Ints((3, 5), 2))),
    row("multilabel_soft_margin", lambda x, t: F.multilabel_soft_margin_loss(x, t.to(x.dtype)), ((3, 5), Ints((3, 5), 2))),
    row("multilabel_soft_margin weighted", lambda x, t, w: F.multilabel_soft_margin_loss(x, t.to(x.dtype), w.detach()), ((3, 5), Ints((3, 5), 2), Positive((5,)))),
    row("multi_margin", F.multi_margin_loss, _CLASSES, ((5,), Ints((), 5)), quick=True),
    row("multi_margin squared", lambda x, y: F.multi_margin_loss(x, y, p=2, margin=0.7), _CLASSES),
    row("multi_margin weighted", lambda x, y, w: F.multi_margin_loss(x, y, weight=w.detach(), reduction="sum"), (*_CLASSES, Positive((5,)))),
    row("multi_margin of each", lambda x, y: F.multi_margin_loss(x, y, reduction="none"), _CLASSES),
    row("multilabel_margin", lambda x: F.multilabel_margin_loss(x, _RANKED), ((4, 5),), quick=True, fixed=True),
    row("multilabel_margin sum", lambda x: F.multilabel_margin_loss(x, _RANKED, reduction="sum"), ((4, 5),), fixed=True),
    row("multilabel_margin of each", lambda x: F.multilabel_margin_loss(x, _RANKED, reduction="none"), ((4, 5),), fixed=True),
    row("multilabel_margin of one", lambda x: F.multilabel_margin_loss(x, _RANKED[0]), ((5,),), fixed=True),
    row("multilabel_margin of a batch", lambda x, y: F.multilabel_margin_loss(x, y - 1), ((4, 5), Ints((4, 5), 6))),
    row("hinge_embedding margin", lambda x, t: F.hinge_embedding_loss(x, _signs(t), margin=0.4, reduction="sum"), ((6,), Ints((6,), 2))),
    row("margin_ranking of signs", lambda x, y, t: F.margin_ranking_loss(x, y, _signs(t), 0.3), ((6,), (6,), Ints((6,), 2))),
    row("triplet swapped", lambda a, p, n: F.triplet_margin_loss(a, p, n, margin=0.5, p=1.0, swap=True), ((4, 5), (4, 5), (4, 5))),
    row("triplet with distance", lambda a, p, n: F.triplet_margin_with_distance_loss(a, p, n, distance_function=lambda x, y: 1 - F.cosine_similarity(x, y)), ((4, 5), (4, 5), (4, 5))),
    row("bce weighted", lambda x, y, w: F.binary_cross_entropy(x.sigmoid(), y.sigmoid().detach(), w.detach()), (*_PAIR, Positive((3, 5)))),
    row("bce of each", lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), reduction="none"), _PAIR),
    row("bce with logits weighted", lambda x, y, w, p: F.binary_cross_entropy_with_logits(x, y.sigmoid(), w.detach(), pos_weight=p.detach()), (*_PAIR, Positive((3, 5)), Positive((5,)))),
    row("nll_loss", lambda x, y: F.nll_loss(x.log_softmax(1), y), _CLASSES),
    row("nll_loss weighted", lambda x, y, w: F.nll_loss(x.log_softmax(1), y, w.detach(), ignore_index=1), ((6, 5), Ints((6,), 5), Positive((5,)))),
    row("nll_loss 2d weighted", lambda x, y, w: F.nll_loss(x.log_softmax(1), y, w.detach(), ignore_index=1), ((2, 5, 3, 4), Ints((2, 3, 4), 5), Positive((5,)))),
    row("nll_loss of each", lambda x, y: F.nll_loss(x.log_softmax(1), y, reduction="none"), _CLASSES, ((2, 5, 3, 4), Ints((2, 3, 4), 5))),
    row("cross_entropy sum", lambda x, y: F.cross_entropy(x, y, reduction="sum"), _CLASSES),
    row("cross_entropy of each", lambda x, y: F.cross_entropy(x, y, reduction="none"), _CLASSES, ((2, 5, 3, 4), Ints((2, 3, 4), 5))),
    row("cross_entropy 3d", F.cross_entropy, ((2, 5, 3, 4, 2), Ints((2, 3, 4, 2), 5))),
    row("cross_entropy of one", F.cross_entropy, ((5,), Ints((), 5))),
    row("cross_entropy with all", lambda x, y, w: F.cross_entropy(x, y, w.detach(), ignore_index=2, label_smoothing=0.1), ((6, 5), Ints((6,), 5), Positive((5,)))),
    row("cross_entropy of probabilities, with all", lambda x, y, w: F.cross_entropy(x, y.softmax(1), w.detach(), label_smoothing=0.1), ((4, 5), (4, 5), Positive((5,)))),
    *_NEW,
    row("pairwise_distance", F.pairwise_distance, ((4, 5), (4, 5))),
    row("pdist", torch.pdist, ((4, 5),), fixed=True),
    row("ctc", _ctc((3, 9, 2, 9), [[1, 2, 2], [3, 1, 0]]), ((9, 2, 5),), quick=True),
    row("ctc sum, short", _ctc((3, 9, 2, 5), [[1, 2, 2], [3, 1, 0]], reduction="sum"), ((9, 2, 5),)),
    row("ctc of each, blank 4", _ctc((3, 8, 0, 9), [[1, 2, 2], [3, 1, 0]], reduction="none", blank=4), ((9, 2, 5),)),
    row("ctc in one row", _ctc((3, 9, 2, 7), [1, 2, 2, 3, 1]), ((9, 2, 5),)),
    row("ctc impossible", _ctc((3, 3, 2, 7), [[1, 2, 2], [3, 1, 0]], zero_infinity=True), ((9, 2, 5),)),
    row("ctc of one", lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([1, 2, 2]), torch.tensor(9), torch.tensor(3)), ((9, 5),)),
    row("ctc of lengths in the batch", lambda x, y: _ctc_of_all(x.transpose(0, 1), y), ((3, 9, 5), Ints((3, 4), 5))),
)  # fmt: skip
