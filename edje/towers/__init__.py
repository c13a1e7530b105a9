"""Vision towers: the local ViT, and those of transformers, timm and ONNX behind one interface."""
