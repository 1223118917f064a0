"""The test kit behind ``epmesh.testing``: a whole mesh of real processes on loopback."""
