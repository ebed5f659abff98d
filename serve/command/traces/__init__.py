"""`emoe traces`."""
