"""The formal, executable model of Intel TDX live migration."""

__version__ = "0.1.0"
