"""Vision towers: our own ViT, and those of transformers, timm and ONNX behind one interface."""
