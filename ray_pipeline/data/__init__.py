"""From microscope files to batches."""
