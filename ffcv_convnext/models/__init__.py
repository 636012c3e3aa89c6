"""The configurable network."""
