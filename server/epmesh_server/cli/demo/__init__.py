"""`epmesh demo`: a real mixture-of-experts model, its experts spread over two nodes with two ranks each."""

from epmesh_server.cli.demo.plan import DemoPlan
from epmesh_server.cli.demo.run import run_demo

__all__ = ["DemoPlan", "run_demo"]
