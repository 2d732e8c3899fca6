"""The checkpoint format, and butterfly rotation and packed GEMM as a torch reference and as Triton kernels."""
