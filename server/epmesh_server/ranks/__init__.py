"""Ranks: the data plane. ``join`` makes one of the calling process."""
