"""Runs of a "network" of a few parameters."""

from recipes import make_setting, mesh_of, quick_compilation

__all__ = ["make_setting", "mesh_of", "quick_compilation"]
