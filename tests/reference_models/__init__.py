"""Structural copies of published in-context models: their module names, state_dict keys and arithmetic."""
