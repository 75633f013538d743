"""The fused module, and the loop that runs its schedule on a batch."""
