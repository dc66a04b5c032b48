"""File formats, one module each: how pixels are read, and how a map is written back in the same geometry."""
