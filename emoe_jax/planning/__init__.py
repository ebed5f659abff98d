"""Before there are weights or a device: what a model needs of one, and how long its steps take at least."""
