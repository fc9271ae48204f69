"""A trained teacher for use elsewhere: in timm and on the Hugging Face Hub, as ONNX, and as a program of torch.export."""

TOLERANCE = 8.0  # times the rounding of PyTorch itself
