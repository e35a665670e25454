"""The networks: patch autoencoder, backbone, heads, CALM, and the token baseline on the same blocks."""
