"""Character devices: byte streams by name, for monitors and other front ends."""
