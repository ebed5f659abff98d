"""What a decode step costs by where the experts are: all there, some there, or fetched while the step runs."""
