"""Sans-IO codecs: bytes to values and back."""
