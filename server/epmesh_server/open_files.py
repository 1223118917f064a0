"""How many files, connections among them, a service may have open."""

from __future__ import annotations

import logging
import resource

_log = logging.getLogger(__name__)
MOST_OPEN_FILES = 1 << 16


def allow_open_files() -> None:
    """Raises the soft limit to the hard one, up to `MOST_OPEN_FILES`; children inherit it.

    Only for processes that are ours: in others, `select` might meet descriptors that it cannot take.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _log.info("open files: %d allowed, %d before", wanted, soft)
