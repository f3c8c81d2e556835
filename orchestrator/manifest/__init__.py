"""The manifest: one row per group, slice, curve, event and evaluation, in Parquet."""

from orchestrator.manifest.manifest import Manifest

__all__ = ["Manifest"]
