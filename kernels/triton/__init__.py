"""Triton kernels: the same operations for GPUs. Nothing that runs on a CPU imports this folder, or triton.

One file per operation, each with its checked public function, its kernel and what the kernel is compared with.
`kernels.triton.variants` lists what is compiled ahead of time; docs/gpu.md says what has run where.
"""
