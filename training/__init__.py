"""Recipes that made the bundled models; not imported by the package."""
