"""epmesh: expert-parallel all-to-all as a service."""
