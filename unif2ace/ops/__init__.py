"""The ops of the engine, each with a reference in plain PyTorch and faster back ends behind the same function.

>>> from unif2ace import ops
>>> plan = ops.route(logits, top_k=2)
>>> with ops.use_backend("native"):
...     y = ops.expert_mlp(x, plan, w_up, w_down)
"""

from unif2ace.ops._registry import BACKENDS, default_backend, use_backend
from unif2ace.ops.diffusion_loss import d3diff_loss, linear_loss
from unif2ace.ops.experts import expert_mlp, grouped_gemm
from unif2ace.ops.linear import linear, linear_gelu
from unif2ace.ops.omni_attention import omni_attention
from unif2ace.ops.rotary import rotate_heads
from unif2ace.ops.routing import RoutingPlan, route
from unif2ace.ops.sampling import head_sample, remask, sample_tokens
from unif2ace.ops.sequence_mix import mix_sequences

__all__ = [
    "BACKENDS",
    "RoutingPlan",
    "d3diff_loss",
    "default_backend",
    "expert_mlp",
    "grouped_gemm",
    "head_sample",
    "linear",
    "linear_gelu",
    "linear_loss",
    "mix_sequences",
    "omni_attention",
    "remask",
    "rotate_heads",
    "route",
    "sample_tokens",
    "use_backend",
]
