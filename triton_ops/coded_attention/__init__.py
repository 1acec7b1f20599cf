"""Attention over packed codes, decoded in registers (docs/codes.md)."""

from triton_ops.coded_attention.op import Coded, coded_attention
from triton_ops.coded_attention.tables import CodedFactors
from triton_ops.coded_attention.tuning import workspace_bytes

__all__ = ["Coded", "CodedFactors", "coded_attention", "workspace_bytes"]
