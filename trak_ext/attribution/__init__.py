"""TRAK end to end: samples to features, features to a store, a store and targets to scores."""
