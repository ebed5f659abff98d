"""Which experts should be on the device: predicted, planned (eMoE eq. 2), kept up between steps, and accounted for."""
