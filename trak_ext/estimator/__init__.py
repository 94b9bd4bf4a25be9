"""The formula of TRAK, once: kernel matrix, damping, scores."""
