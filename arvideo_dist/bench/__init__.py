"""Measurements that `python -m arvideo_dist.benchmark` offers, one module a subject."""
