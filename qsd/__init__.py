"""qsd: a storage daemon with qemu-storage-daemon's command line, QMP and images."""

__version__ = "0.1.0"
