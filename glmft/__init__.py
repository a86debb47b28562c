"""glmft: fine-tune ChatGLM3 with PyTorch Lightning and Hydra."""

__version__ = "0.1.0"
