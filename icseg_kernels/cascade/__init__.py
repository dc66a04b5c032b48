"""The cascade of the sparse PatchICL in few launches, for GPUs."""
