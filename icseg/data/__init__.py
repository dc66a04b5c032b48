"""Images and tasks: synthetic tasks for training, file input and output, intensity normalisation."""
