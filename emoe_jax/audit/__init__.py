"""What the routing contracts cost: answers compared with what all experts would have said, and a target for it."""
