"""Compressed models on disk: safetensors, ONNX, and the check of what they promise."""
