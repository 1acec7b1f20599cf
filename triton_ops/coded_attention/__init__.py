"""Attention over packed codes, decoded in registers (docs/kernels.md)."""

from triton_ops.coded_attention.op import Coded, coded_attention
from triton_ops.coded_attention.tables import CodedFactors

__all__ = ["Coded", "CodedFactors", "coded_attention"]
