"""Features of the frozen vision tower: extracted once per dataset, read as memory maps."""
