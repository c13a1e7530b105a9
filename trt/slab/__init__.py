"""The token slab: layout, host and device memory, staging buffers."""
