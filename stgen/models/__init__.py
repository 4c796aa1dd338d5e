"""The models: the spatial-temporal diffusion transformer and the 3D causal VAE."""
