"""Offline stage: video data sets in, WebDataset shards with a Parquet index out (`python -m data_prep`)."""
