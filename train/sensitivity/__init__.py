"""`python -m train.sensitivity`: which layers of a model a task needs routed right."""
