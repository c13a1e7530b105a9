"""Export: a checkpoint to ONNX graphs."""
