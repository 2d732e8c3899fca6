"""The format, the butterfly rotation and the packed GEMM: a torch reference and Triton kernels, one contract."""
