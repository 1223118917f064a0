"""`python -m epmesh_server.cli` is `epmesh`."""

from epmesh_server.cli.app import main

main()
