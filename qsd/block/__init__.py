"""The pure arithmetic and graph of the block layer, as values."""
