"""qcow2: the format's structures (pure modules) and the driver that stands on them."""
