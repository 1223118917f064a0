"""Ranks that a node service hosts: processes of their own, kept alive beside it."""
