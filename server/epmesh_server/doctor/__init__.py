"""The doctor: looks at a host, its container and its mesh, and says what is wrong and what mends it."""

from epmesh_server.doctor.examination import find_out, judge, local_errors
from epmesh_server.doctor.facts import Asked, Facts
from epmesh_server.doctor.findings import Finding, Severity

__all__ = ["Asked", "Facts", "Finding", "Severity", "find_out", "judge", "local_errors"]
