"""The passes of mpgraph, one file each, and the order in which they run."""

from __future__ import annotations

from mpgraph.passes.assign_dtypes import assign_dtypes
from mpgraph.passes.fold_casts import fold_casts
from mpgraph.passes.hoist_casts import hoist_casts
from mpgraph.passes.hoist_weight_casts import hoist_weight_casts
from mpgraph.passes.insert_casts import insert_casts
from mpgraph.passes.normalize import normalize
from mpgraph.passes.open_composites import open_composites
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.passes.scale_backward import scale_backward
from mpgraph.passes.share_casts import share_casts
from mpgraph.passes.sink_casts import sink_casts
from mpgraph.passes.spread_scale import spread_scale
from mpgraph.pipeline import GraphPass

DEFAULT_PASSES: tuple[GraphPass, ...] = (
    normalize,
    open_composites,  # after normalize: a composite inside a region opens under that region
    assign_dtypes,  # after open_composites: every operator has its final name
    insert_casts,
    hoist_casts,
    sink_casts,
    fold_casts,  # after hoist_casts, which leaves casts there and back
    share_casts,  # after fold_casts, which can leave two equal casts of one value
    remove_dead,
    hoist_weight_casts,  # after all that: it needs to see every use of a parameter
    scale_backward,  # the casts that it rewrites are the final ones
    spread_scale,  # after scale_backward, whose borders it moves
)

__all__ = ["DEFAULT_PASSES"]
