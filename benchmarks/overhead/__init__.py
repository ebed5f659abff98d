"""What host and HTTP layer add to a token."""
