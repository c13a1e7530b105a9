"""The drawn scenes: world, captions, pixels and the dataset they make."""
