"""Inputs that once were findings, as targets whose damage is no matter of chance."""

from __future__ import annotations

from driver import Target

REGRESSIONS: list[Target] = []
