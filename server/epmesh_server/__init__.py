"""The service side of epmesh: coordinator, node service, ranks, command line."""
