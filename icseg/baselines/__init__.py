"""What the models are compared with: a dense in-context network, and floors without learning."""
