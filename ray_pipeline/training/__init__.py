"""The phase loop and what launches it on Ray."""
