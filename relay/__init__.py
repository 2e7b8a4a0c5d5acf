"""relay: a webhook sidecar. This is the map."""

__version__ = "0.1.0"
