"""Probes: each looks at one part of the host or the mesh, changes nothing, and ends by itself."""
