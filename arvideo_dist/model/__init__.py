"""ARVideo in pure PyTorch: no Ray, no DeepSpeed, no MLflow, no input or output."""
