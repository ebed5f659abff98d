"""What each routing contract costs in quality and in loads."""
