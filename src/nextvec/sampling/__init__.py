"""Temperature without likelihoods, and the one generation loop."""
