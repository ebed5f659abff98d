"""`python -m train.predictor`: train the expert predictor on a routing trace, or judge one on a trace."""
