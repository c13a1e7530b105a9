"""The engine runtimes: torch, ONNX Runtime, TensorRT, and a constant one for benchmarks."""
