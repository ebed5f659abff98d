"""`emoe predictor`."""
