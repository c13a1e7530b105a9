"""`python -m trt.build`: a checkpoint to an engine directory."""
