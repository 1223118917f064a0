"""A small HTTP service that generates text: attention here, experts on a mesh, an `epmesh.AsyncRouter` in between."""
