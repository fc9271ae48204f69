"""A trained teacher for use elsewhere: in timm and on the Hugging Face Hub, as ONNX, and as a program of torch.export."""
