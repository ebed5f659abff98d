"""Where experts live: their record layout, the store off the device, the slab on it, and what moves them."""
