"""Who listens: NBD, character devices, QMP monitors."""
