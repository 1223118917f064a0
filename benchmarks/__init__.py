"""Figures that the project is held to, each by a command of its own."""
