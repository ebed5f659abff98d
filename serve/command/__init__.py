"""What `emoe` runs beside the server, the planner and the doctor."""
