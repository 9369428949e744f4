"""Sparse-linear attention: softmax over the important blocks, linear attention for the rest."""

from flora_jax.kernels.sla.api import branches as branches
from flora_jax.kernels.sla.api import sla as sla
from flora_jax.kernels.sla.config import SLAConfig as SLAConfig
