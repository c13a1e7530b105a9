"""Features: the output of a frozen vision tower for the images of a dataset, extracted once and stored on the disk."""
