"""Logging of the commands: lines on stderr. Configured here and nowhere else."""

from __future__ import annotations

import enum
import logging
import sys


class LogLevel(enum.StrEnum):
    """Least severe lines that are shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def configure_logging(level: LogLevel, prefix: str = "") -> None:
    """Sends log lines to stderr: time, level, logger, text. `prefix` marks the lines of a supervised child."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s")
    formatter.default_msec_format = "%s.%03d"
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("asyncio", "grpc"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
