"""CUDA: context, memory, kernels, graphs, copy timing. Imports pycuda and cuda-bindings."""
