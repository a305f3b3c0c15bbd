"""ARVideo (arXiv 2405.15160): distributed autoregressive pretraining of video transformers."""
