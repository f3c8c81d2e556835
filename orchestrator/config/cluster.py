"""Where to compute: executor, cluster, workers, time limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.config.files import Strict, load_yaml, option_name, typed, validated
from orchestrator.config.options import Cluster


class ClusterConfig(Strict, Cluster, frozen=True):
    """Where to compute. Nothing here affects the bytes of the result."""


def cluster_options(given: Mapping[str, Any]) -> ClusterConfig:
    """Where to compute, from a cluster file and the options; options win.

    Args:
        given: what was given on the command line, by name; `cluster` is the file.

    Raises:
        LestdError: a value is not valid.
    """
    file, here = given.get("cluster"), typed(ClusterConfig, given)
    values = {} if file is None else load_yaml(file)
    names = {key: option_name(key) for key in here}
    return validated(ClusterConfig, values | here, str(file or "options"), names)
