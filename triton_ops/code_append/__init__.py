"""What a decode step does before attention over codes: tokens stored, and coded as they age."""

from triton_ops.code_append.op import code_append
from triton_ops.code_append.reference import coded_after, ring_rows, store_rows

__all__ = ["code_append", "coded_after", "ring_rows", "store_rows"]
