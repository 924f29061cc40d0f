"""Knowledge editing one request at a time: the slow baseline of the benchmarks and the oracle of the tests.

Every function follows the equations literally, with full forward passes, direct float64 solves and no
caching. Nothing here is shared with the editors, so that an error there cannot hide.

Shapes: ``d_in`` width of the edited projection's input, ``d_out`` width of the residual stream,
``n`` requests.
"""

from benchmarks.reference.descent import (
    FeatureHistory,
    answer_features,
    ft_batch,
    target_nll,
    ultraedit_batch,
)
from benchmarks.reference.keys import (
    block_states,
    covariance,
    keys,
    mlp_outputs,
)
from benchmarks.reference.merging import (
    mask_literal,
    merge_literal,
    merge_shadow,
    row_wise_variant,
)
from benchmarks.reference.models import (
    ARCHITECTURES,
    Architecture,
    architecture,
    attention_of,
    block_of,
    changes,
    projection_of,
    weight_name,
    weight_of,
)
from benchmarks.reference.models import projection_of as _projection
from benchmarks.reference.models import recorded_input as _recorded_input
from benchmarks.reference.routing import (
    route_numeric,
    route_one,
    similarity_weights,
)
from benchmarks.reference.scoring import (
    Likelihood,
    counterfact_rates,
    forced_prediction,
    knowedit_rates,
    likelihood,
    score_record,
)
from benchmarks.reference.targets import (
    PmetResult,
    TargetResult,
    TargetSettings,
    pmet_target,
    pmet_targets,
    rome_target,
    target_value,
    target_values,
)
from benchmarks.reference.tokens import (
    Templates,
    encode,
    filled,
    padded,
    subject_last_index,
    target_ids,
)
from benchmarks.reference.updates import (
    Covariance,
    KeyMemory,
    Prune,
    Solve,
    alphaedit_batch,
    blue_alphaedit_batch,
    blue_memit_batch,
    emmet_batch,
    memit_batch,
    memit_seq_batch,
    nullspace_projector,
    pmet_batch,
    prune_weights,
    rect_batch,
    rect_prune,
    rome_batch,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Covariance",
    "FeatureHistory",
    "KeyMemory",
    "Likelihood",
    "PmetResult",
    "Prune",
    "Solve",
    "TargetResult",
    "TargetSettings",
    "Templates",
    "_projection",
    "_recorded_input",
    "alphaedit_batch",
    "answer_features",
    "architecture",
    "attention_of",
    "block_of",
    "block_states",
    "blue_alphaedit_batch",
    "blue_memit_batch",
    "changes",
    "counterfact_rates",
    "covariance",
    "emmet_batch",
    "encode",
    "filled",
    "forced_prediction",
    "ft_batch",
    "keys",
    "knowedit_rates",
    "likelihood",
    "mask_literal",
    "memit_batch",
    "memit_seq_batch",
    "merge_literal",
    "merge_shadow",
    "mlp_outputs",
    "nullspace_projector",
    "padded",
    "pmet_batch",
    "pmet_target",
    "pmet_targets",
    "projection_of",
    "prune_weights",
    "rect_batch",
    "rect_prune",
    "rome_batch",
    "rome_target",
    "route_numeric",
    "route_one",
    "row_wise_variant",
    "score_record",
    "similarity_weights",
    "subject_last_index",
    "target_ids",
    "target_nll",
    "target_value",
    "target_values",
    "ultraedit_batch",
    "weight_name",
    "weight_of",
]
