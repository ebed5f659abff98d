"""What the server tells of itself: metrics, state, logs and spans."""
