"""What a block node can be: protocols, formats, filters."""
