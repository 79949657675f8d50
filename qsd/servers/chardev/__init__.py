"""Character devices: byte streams to somewhere, for a monitor to speak on or to keep text in."""
