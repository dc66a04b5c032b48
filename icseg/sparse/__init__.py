"""The default architecture: only picked patches are encoded, and the support set once."""
