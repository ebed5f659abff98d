"""What the engine does on a GPU, checked and measured in one run that needs no network."""
