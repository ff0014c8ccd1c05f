"""Fine-tuning on a device: numpy and onnxruntime alone."""
