"""Clips in and out of WebDataset shards."""
