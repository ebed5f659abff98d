"""What is asked and what is answered: parameters, deadlines, sequences, texts, structured outputs. Imports no JAX."""
