"""The NBD server: listeners, connections, and the transmission phase's data path."""
