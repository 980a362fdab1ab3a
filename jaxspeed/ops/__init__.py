# SPDX-License-Identifier: Apache-2.0
"""The mathematics that model families share: pure functions, no parameters, no modules."""

from jaxspeed.context import need_whole as need_whole
from jaxspeed.ops.attention import attention as attention
from jaxspeed.ops.cross_entropy import fused_cross_entropy as fused_cross_entropy
from jaxspeed.ops.embedding import embed as embed
from jaxspeed.ops.experts import experts as experts
from jaxspeed.ops.linear import (
    linear as linear,
    linears as linears,
)
from jaxspeed.ops.norm import layer_norm as layer_norm, rms_norm as rms_norm
from jaxspeed.ops.places import (
    document_places as document_places,
    row_places as row_places,
)
from jaxspeed.ops.pointwise import (
    dropout as dropout,
    gelu as gelu,
    silu_gate as silu_gate,
)
from jaxspeed.ops.recurrence import recurrence as recurrence
from jaxspeed.ops.remember import remember as remember
from jaxspeed.ops.rope import RopeScaling as RopeScaling, rotate as rotate
from jaxspeed.ops.route import Routing as Routing, route as route
