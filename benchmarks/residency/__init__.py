"""What each residency policy covers and what it moves, on recorded traces."""
