"""What a user brings: batches, loaders, checkpoints and a device."""
